"""Benchmarks of this recipe on the machine it runs on, each against its peer in the same run.

    bash zoo/qwen3/perf.sh                       all of them
    bash zoo/qwen3/perf.sh --only step --size 0.6B --layers 2 --vocabulary 32768 --precision fp32 --seq-len 512 \\
        --global-batch 1                         a published shape on a laptop
    bash zoo/qwen3/perf.sh --record              and add the rows to perf.jsonl; needs a committed tree

step        a training step (forward, backward, clipping, optimizer) of this model through megatron-core, and of
            transformers' model with torch's fused AdamW. Both run plain and under torch.compile (--no-compiled leaves
            that out) on the same device, batch, weights and dtype: by turns on a CPU or on several ranks, one after
            another on one accelerator. Each row has its peak memory, which under torch.compile includes compiling. A
            contender that has another first loss, or does not fit, is refused. --layers and --vocabulary cut a size
            down; the row says so
sft         that step on packed conversations, against pretraining's on documents in rows of the same length: tokens
            per second, without padding
generate    greedy generation with a cache, against transformers' generate, for one prompt and for eight
preprocess  text to an indexed data set, against the tokenizer library's encode_batch_fast alone, in as many processes
load        a released folder of constant weights, loaded from disk into a model and converted to another folder: rates
            against reading and copying the same files, and memory beyond the model

Each number is the median of its repeats, with the 10th and the 90th percentile. Repeats end early where they would take
longer than the time budget of common/bench.py.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import transformers

from common import bench, checkpoint, device, perf
from common.bench import OURS, rounded, timed
from common.language import benchmarks
from common.language.demo import make_data

from . import convert
from .config import SIZES, Qwen3Config, model_config
from .model import Qwen3Block, build, draw
from .options import DEMO, DEMO_DATA, DOCUMENT_END, HERE, PerfOptions, parse, prepare
from .train import Batches, forward_step, weighted


def main(o: PerfOptions) -> None:
    bench.report(rows(o), o.out, HERE / "perf.jsonl", o.record)


def rows(o: PerfOptions) -> Iterator[dict]:
    """Yields the rows of the chosen benchmarks as they come."""
    for benchmark in (step, sft, generate, tokenize, load):
        name = "preprocess" if benchmark is tokenize else benchmark.__name__
        if o.only in (name, "all") and (name in ("step", "sft") or dist.get_rank() == 0):
            yield from (facts(o) | row for row in benchmark(o))
        dist.barrier()


def facts(o: PerfOptions) -> dict:
    """Returns the fields that all rows of this call share. The size says how it was cut down."""
    cut = [f"{o.layers} layers"] * bool(o.layers) + [f"vocabulary {o.vocabulary}"] * bool(o.vocabulary)
    size = ", ".join([o.size, *cut])
    return bench.facts(o, model="Qwen3", size=size, shape=f"{o.micro_batch} x {o.seq_len}")


# -------------------------------------------------------------------------------------------------------------- step


def batch_of(o: PerfOptions, config: Qwen3Config) -> dict:
    """Draws a micro-batch of random tokens in rows of seq_len, before `weighted`."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (o.micro_batch, o.seq_len + 1), generator=generator).to(device.current())
    return {
        "tokens": tokens[:, :-1].flatten(), "labels": tokens[:, 1:].flatten(), "rows": o.micro_batch,
        "positions": torch.arange(o.seq_len, device=tokens.device).repeat(o.micro_batch),
        "cu_seqlens": list(range(0, o.micro_batch * o.seq_len + 1, o.seq_len)),
    }  # fmt: skip


def batches_of(o: PerfOptions, config: Qwen3Config) -> list[dict]:
    """Returns this rank's micro-batches of a step, as training prepares them."""
    return weighted([batch_of(o, config)] * o.micro_batches, o.dp)


def ours(o: PerfOptions, config: Qwen3Config) -> Callable[[list[dict]], list[dict]]:
    """Builds this model's training step."""
    initial = functools.partial(draw, config)
    return bench.own_step(o, build(o, config), initial, Qwen3Block, forward_step, o.seq_len)


def build_peer_model(o: PerfOptions, config: Qwen3Config, dtype: torch.dtype) -> torch.nn.Module:
    """Builds transformers' model with the weights that are drawn for ours, too."""
    cls = transformers.Qwen3MoeConfig if config.num_experts else transformers.Qwen3Config
    values = {k: v for k, v in config.to_released().items() if k not in ("architectures", "model_type")}
    with device.current():
        model = transformers.AutoModelForCausalLM.from_config(cls(**values), dtype=dtype)
    parameters = dict(model.named_parameters())
    for name, shape in convert.shapes(config).items():
        whole = checkpoint.drawn(name, shape, o.seed, functools.partial(draw, config), device.current())
        key = convert.released(name)
        if key.endswith("mlp.gate_up"):  # transformers stacks experts as [G, 2F, D] and [G, D, F]
            key, whole = key.replace("mlp.gate_up", "mlp.experts.gate_up_proj"), whole.permute(0, 2, 3, 1).flatten(1, 2)
        elif key.endswith("mlp.down"):
            key, whole = key.replace("mlp.down", "mlp.experts.down_proj"), whole.transpose(1, 2)
        parameters.pop(key).data.copy_(whole)
    assert not parameters, f"not drawn: {', '.join(parameters)}"
    return model


def peer(o: PerfOptions, config: Qwen3Config, compiled: bool) -> Callable[[], torch.Tensor]:
    """Builds transformers' training step, with our weights."""
    model = build_peer_model(o, config, torch.float32).train()
    if o.recompute == "full":
        model.gradient_checkpointing_enable()

    batch = batch_of(o, config)
    tokens, labels = (batch[key].unflatten(0, (o.micro_batch, -1)) for key in ("tokens", "labels"))  # [B, L]

    def loss(forward: Callable) -> torch.Tensor:
        return forward(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False).loss

    return bench.peer_step(o, model, loss, compiled)


def workload(o: PerfOptions, config: Qwen3Config) -> bench.Workload:
    flops = config.flops(o.seq_len)
    return bench.Workload(library="transformers", unit="tokens/s", units=o.seq_len, digits=1, flops=flops)


def step(o: PerfOptions) -> Iterator[dict]:
    config = model_config(o)
    described = workload(o, config)
    return bench.step(o, config, described, ours=ours, batches_of=batches_of, peer=peer, compiled=o.compiled)


# --------------------------------------------------------------------------------------------------------------- sft


def sft(o: PerfOptions) -> list[dict]:
    """Times the steps of both jobs with one model, on the demo's data: documents, and packed conversations."""
    train_step, prepared, fill = ours(o, model_config(o)), {}, {}
    argv = [f"--{key}={getattr(o, key.replace('-', '_'))}" for key in ("layout", "seq-len", "micro-batch", "precision")]
    argv += [f"--global-batch={o.global_batch}", "--size", o.size, "--from-scratch", f"--tp={o.tp}", f"--pp={o.pp}"]
    for job in ("pretrain", "sft"):
        job_options = parse("train", [f"--job={job}", *argv])
        if dist.get_rank() == 0:
            prepare(job_options)
        dist.barrier()
        batches = Batches(job_options)
        steps = list(itertools.islice(batches(0), 8))
        prepared[job] = [batches.prepare(loaded) for loaded in steps]
        fill[job] = getattr(batches.rows, "fill", 1.0)
    seconds, turns = {job: [] for job in prepared}, []
    while bench.goes_on(turns, o.repeats):
        i = len(turns)
        for job, values in prepared.items():  # the two jobs take turns
            seconds[job].append(timed(functools.partial(train_step, values[i % len(values)]))[0])
        turns.append(bench.agreed(sum(times[-1] for times in seconds.values())))
    warmup = bench.warmup(turns)
    if dist.get_rank():
        return []
    tokens = {job: o.global_batch * o.seq_len * share for job, share in fill.items()}
    rates = {job: [tokens[job] / s for s in times[warmup:]] for job, times in seconds.items()}
    ratio = bench.median_ratio(rates["sft"], rates["pretrain"])
    raw = {f"{job} tokens/s": rounded(perf.spread(values)) for job, values in rates.items()}
    raw["tokens that are no padding"] = round(fill["sft"], 4)
    return [{"task": "sft step on packed rows", "value": ratio, "unit": "x pretraining's tokens/s", "raw": raw}]


# ------------------------------------------------------------------------------------------------ generate, preprocess


def generate(o: PerfOptions) -> Iterator[dict]:
    if o.world > 1:
        yield {"task": "generate", "system": OURS, "refused": "measured in one process; fix: NPROC=1"}
        return
    config, dtype = model_config(o), {"fp32": torch.float32, "bf16": torch.bfloat16}[o.precision]
    chunks = build(o, config)
    checkpoint.initialize(chunks, o.seed, functools.partial(draw, config), drawn_on=device.current())
    yield from benchmarks.generate(o, chunks[0].eval(), build_peer_model(o, config, dtype).eval(), config.vocab_size)


def tokenize(o: PerfOptions) -> list[dict]:
    """Times preprocessing of several copies of the demo's text."""
    return benchmarks.tokenize(
        o, make_data.make(DEMO_DATA / "text") / "train.jsonl", SIZES["tiny"].vocab_size, DEMO, DOCUMENT_END
    )


# -------------------------------------------------------------------------------------------------------------- load


def load(o: PerfOptions) -> list[dict]:
    """Times loading and converting weights of --size; for a tiny size, those of 0.6B."""
    size = "0.6B" if o.size.startswith("tiny") else o.size
    config = dataclasses.replace(SIZES[size], num_hidden_layers=o.layers or SIZES[size].num_hidden_layers)
    chunks = build(bench.unsplit(dataclasses.replace(o, precision="bf16")), config, torch.device("cpu"))
    return bench.load(o, size, chunks, convert.table(config))
