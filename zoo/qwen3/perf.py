"""Benchmarks of this recipe on the machine it runs on, each against its peer in the same run.

    bash zoo/qwen3/perf.sh                       all of them
    bash zoo/qwen3/perf.sh --only step --size 0.6B --layers 2 --vocabulary 32768 --precision fp32 --seq-len 512 \\
        --global-batch 1                         a published shape on a laptop
    bash zoo/qwen3/perf.sh --record              and add the rows to perf.jsonl; needs a committed tree

step        a training step (forward, backward, clipping, optimizer) of this model through megatron-core, and of
            transformers' model with torch's fused AdamW, both plain and under torch.compile (--no-compiled leaves that
            out), on the same device, batch, weights and dtype, turn by turn, each with its peak memory (under
            torch.compile: compiling included). A contender whose first loss is not the same is refused. --layers and
            --vocabulary cut a size down; the row says so
sft         that step on packed conversations against pretraining's on documents, rows of one length: tokens that are no
            padding per second
generate    greedy generation with a cache, against transformers' generate; one prompt, and eight
preprocess  text to an indexed data set, against the tokenizer library's encode_batch_fast alone, in as many processes
load        a released folder of random weights from disk into a model, and converted to another: rates against reading
            and copying the same files, memory beyond the model

Each number is the median of its repeats, with the 10th and the 90th percentile.
"""

import dataclasses
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from common import bench, checkpoint, device, perf, release
from common.bench import OURS, rounded, timed
from common.language import preprocess
from common.language.generate import generate as generate_answers
from common.language.pool import in_order

from . import convert
from .config import SIZES, Qwen3Config, model_config
from .demo import make_data
from .model import Qwen3Block, build, draw
from .options import DEMO, DEMO_DATA, HERE, InferOptions, PerfOptions, PreprocessOptions, parse, prepare
from .train import Batches, forward_step, weighted

PROMPT, ANSWER = 128, 64  # tokens
TEXT = 30_000_000  # characters to tokenize


def main(o: PerfOptions) -> None:
    rows = []
    for benchmark in (step, sft, generate, tokenize, load):
        name = "preprocess" if benchmark is tokenize else benchmark.__name__
        if o.only in (name, "all") and (name in ("step", "sft") or dist.get_rank() == 0):
            rows += [facts(o) | row for row in benchmark(o)]
        dist.barrier()
    if dist.get_rank() == 0:
        bench.report(rows, HERE / "perf.jsonl", o.record)


def facts(o: PerfOptions) -> dict:
    """What all rows of this call have in common. A size that was cut down says so."""
    cut = [f"{o.layers} layers"] * bool(o.layers) + [f"vocabulary {o.vocabulary}"] * bool(o.vocabulary)
    size = ", ".join([o.size, *cut])
    return bench.facts(o, model="Qwen3", size=size, shape=f"{o.micro_batch} x {o.seq_len}")


# -------------------------------------------------------------------------------------------------------------- step


def batch_of(o: PerfOptions, config: Qwen3Config) -> dict:
    """A micro-batch of random tokens, rows of seq_len, before its tokens are weighted."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (o.micro_batch, o.seq_len + 1), generator=generator).to(device.current())
    return {
        "tokens": tokens[:, :-1].flatten(), "labels": tokens[:, 1:].flatten(), "rows": o.micro_batch,
        "positions": torch.arange(o.seq_len, device=tokens.device).repeat(o.micro_batch),
        "cu_seqlens": list(range(0, o.micro_batch * o.seq_len + 1, o.seq_len)),
    }  # fmt: skip


def batches_of(o: PerfOptions, config: Qwen3Config) -> list[dict]:
    """This rank's micro-batches of a step, as training sees them."""
    return weighted([batch_of(o, config)] * o.micro_batches, o.dp)


def ours(o: PerfOptions, config: Qwen3Config) -> Callable[[list[dict]], list[dict]]:
    """This model's training step."""
    drawn = functools.partial(draw, config)
    return bench.own_step(o, build(o, config), drawn, Qwen3Block, forward_step, o.seq_len)


def their_model(o: PerfOptions, config: Qwen3Config, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' model with the weights `checkpoint.initialize` draws for ours."""
    cls = transformers.Qwen3MoeConfig if config.num_experts else transformers.Qwen3Config
    values = {k: v for k, v in config.to_released().items() if k not in ("architectures", "model_type")}
    with device.current():
        model = transformers.AutoModelForCausalLM.from_config(cls(**values), dtype=dtype)
    parameters = dict(model.named_parameters())
    for name, shape in convert.shapes(config).items():
        whole = torch.empty(shape)
        draw(config, name, whole, torch.Generator().manual_seed(checkpoint.stable_seed(o.seed, name)))
        key = convert.released(name)
        if key.endswith("mlp.gate_up"):  # the experts are stacked there too, [G, 2F, D] and [G, D, F]
            key, whole = key.replace("mlp.gate_up", "mlp.experts.gate_up_proj"), whole.permute(0, 2, 3, 1).flatten(1, 2)
        elif key.endswith("mlp.down"):
            key, whole = key.replace("mlp.down", "mlp.experts.down_proj"), whole.transpose(1, 2)
        parameters.pop(key).data.copy_(whole)
    assert not parameters, f"not drawn: {', '.join(parameters)}"
    return model


def peer(o: PerfOptions, config: Qwen3Config, compiled: bool) -> Callable[[], torch.Tensor]:
    """transformers' training step, from our weights."""
    model = their_model(o, config, torch.float32).train()
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


def step(o: PerfOptions) -> list[dict]:
    config = model_config(o)
    what = workload(o, config)
    return bench.step(o, config, what, ours=ours, batches_of=batches_of, peer=peer, compiled=o.compiled)


# --------------------------------------------------------------------------------------------------------------- sft


def sft(o: PerfOptions) -> list[dict]:
    """Both jobs' steps of one model on the demo's data, which has rows enough: documents, and conversations packed."""
    mine, prepared, filled = ours(o, model_config(o)), {}, {}
    argv = [f"--{key}={getattr(o, key.replace('-', '_'))}" for key in ("layout", "seq-len", "micro-batch", "precision")]
    argv += [f"--global-batch={o.global_batch}", "--size", o.size, "--from-scratch", f"--tp={o.tp}", f"--pp={o.pp}"]
    for job in ("pretrain", "sft"):
        its = parse("train", [f"--job={job}", *argv])
        if dist.get_rank() == 0:
            prepare(its)
        dist.barrier()
        batches = Batches(its)
        steps = list(itertools.islice(batches(0), 8))
        prepared[job] = [batches.prepare(loaded) for loaded in steps]
        filled[job] = getattr(batches.rows, "fill", 1.0)
    seconds = {job: [] for job in prepared}
    for i in range(perf.WARMUP + o.repeats):
        for job, few in prepared.items():  # turn by turn
            seconds[job].append(timed(functools.partial(mine, few[i % len(few)]))[0])
    if dist.get_rank():
        return []
    tokens = {job: o.global_batch * o.seq_len * share for job, share in filled.items()}
    rates = {job: [tokens[job] / s for s in taken[perf.WARMUP :]] for job, taken in seconds.items()}
    ratio = bench.median_ratio(rates["sft"], rates["pretrain"])
    raw = {f"{job} tokens/s": rounded(perf.spread(few)) for job, few in rates.items()}
    raw["tokens that are no padding"] = round(filled["sft"], 4)
    return [{"task": "sft step on packed rows", "value": ratio, "unit": "x pretraining's tokens/s", "raw": raw}]


# ---------------------------------------------------------------------------------------------------------- generate


def generate(o: PerfOptions) -> list[dict]:
    if o.world > 1:
        return [{"task": "generate", "system": OURS, "refused": "measured in one process; fix: NPROC=1"}]
    config = model_config(o)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[o.precision]
    chunks = build(o, config)
    checkpoint.initialize(chunks, o.seed, functools.partial(draw, config))
    mine, theirs, rows = chunks[0].eval(), their_model(o, config, dtype).eval(), []
    for batch in (1, 8):
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(config.vocab_size, (batch, PROMPT), generator=generator).to(device.current())
        asked = dataclasses.replace(InferOptions(), max_new_tokens=ANSWER, batch=batch)
        lists, length = prompts.tolist(), {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER}

        def ours_now(lists=lists, asked=asked):
            return generate_answers(mine, lists, asked, set())

        @torch.no_grad()
        def theirs_now(prompts=prompts, length=length):
            return theirs.generate(prompts, **length, do_sample=False, eos_token_id=None, pad_token_id=0)[:, PROMPT:]

        seconds, theirs_seconds = [], []
        for _ in range(1 + max(3, o.repeats // 4)):
            taken, answers = timed(ours_now)
            theirs_taken, theirs_answers = timed(theirs_now)
            seconds.append(taken)
            theirs_seconds.append(theirs_taken)
        task = f"generate, batch {batch}"
        same = sum(a == b for a, b in zip(answers, theirs_answers.tolist(), strict=True))
        if same < batch and o.precision == "fp32":
            rows.append(
                {"task": task, "refused": f"{batch - same} of {batch} answers are not transformers'", "system": OURS}
            )
            continue
        rates, theirs_rates = ([batch * ANSWER / s for s in taken[1:]] for taken in (seconds, theirs_seconds))
        ratio = bench.median_ratio(rates, theirs_rates)
        shape = {"shape": f"{batch} x ({PROMPT} + {ANSWER})"}
        raw = {"rate": rounded(perf.spread(rates)), "equal answers": f"{same} of {batch}"}
        other = {
            "system": f"transformers {transformers.__version__}",
            "raw": {"rate": rounded(perf.spread(theirs_rates))},
        }
        row = {"task": task, "unit": "tokens/s", "devices": 1} | shape
        rows += [
            row | {"value": round(statistics.median(rates), 1), "raw": raw},
            row | {"value": round(statistics.median(theirs_rates), 1)} | other,
            shape | {"task": f"{task}, ratio to transformers", "unit": "x", "value": ratio, "raw": {}},
        ]
    return rows


# -------------------------------------------------------------------------------------------------------- preprocess


def tokenize(o: PerfOptions) -> list[dict]:
    """The demo's text, several times over."""
    text = make_data.make(DEMO_DATA / "text") / "train.jsonl"
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    copies = -(-TEXT // sum(map(len, documents)))
    workers, rates, alone = os.cpu_count(), [], []
    with tempfile.TemporaryDirectory(dir=o.out.parent if o.out.parent.is_dir() else None) as folder:
        file = Path(folder) / "text.jsonl"
        file.write_text(text.read_text() * copies)
        size = copies * sum(len(document.encode()) for document in documents) / 1e6  # MB
        asked = PreprocessOptions(data=file, workers=workers, out=Path(folder) / "out")
        asked = preprocess.check(asked, SIZES["tiny"].vocab_size, DEMO)
        tokenizer, _ = preprocess.load_tokenizer(asked, SIZES["tiny"].vocab_size)

        def encode(some: list[str]) -> int:
            few = (some[i : i + preprocess.BATCH] for i in range(0, len(some), preprocess.BATCH))
            return sum(len(e.ids) for part in few for e in tokenizer.encode_batch_fast(part, add_special_tokens=False))

        shares = [(documents * copies)[i::workers] for i in range(workers)]
        for _ in range(3):  # turn by turn
            start = time.perf_counter()
            # Many shards a worker, as a corpus has, so that none waits for another at the end.
            found = preprocess.run(asked, SIZES["tiny"].vocab_size, TEXT // (8 * workers))
            rates.append(size / (time.perf_counter() - start))
            start = time.perf_counter()
            tokens = sum(in_order(encode, shares, workers))
            alone.append(size / (time.perf_counter() - start))
            assert tokens + found["documents"] == found["tokens"], (tokens, found)
            for made in Path(folder).glob("out*"):
                made.unlink()
    raw = {"MB/s": rounded(perf.spread(rates)), "tokenizer alone MB/s": rounded(perf.spread(alone)), "workers": workers}
    return [{"task": "preprocess", "size": "demo tokenizer", "layout": None, "precision": "-", "shape": None, "devices": 1,
             "value": bench.median_ratio(rates, alone), "unit": "x the tokenizer's rate", "raw": raw}]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- load


def load(o: PerfOptions) -> list[dict]:
    """Of --size, and for the tiny ones of the smallest published one."""
    size = "0.6B" if o.size.startswith("tiny") else o.size
    config = dataclasses.replace(SIZES[size], num_hidden_layers=o.layers or SIZES[size].num_hidden_layers)
    chunks = build(bench.unsplit(dataclasses.replace(o, precision="bf16")), config, torch.device("cpu"))
    largest = max(p.numel() * p.element_size() for p in chunks[0].parameters())
    shapes, table = convert.shapes(config), convert.table(config)
    halves = release.Source(lambda name: 2, lambda name: torch.full(shapes[name], 0.5, dtype=torch.bfloat16))
    with tempfile.TemporaryDirectory(dir=o.out.parent if o.out.parent.is_dir() else None) as folder:
        target, again = Path(folder) / "released", Path(folder) / "again"
        release.write(target, table, halves)
        files = sorted(target.glob("*.safetensors"))
        for p in chunks[0].parameters():
            p.data.zero_()  # its pages exist before the clock starts

        def load_released() -> None:
            release.load(chunks, table.entries(target), table)

        def convert_released() -> None:
            release.write(again, table, release.open_source(target, table))

        works = {
            "reading": functools.partial(bench.read_files, files),
            "loading": load_released,
            "copying": functools.partial(bench.copy_files, files, again),
            "converting": convert_released,
        }
        rates, extras = bench.race(works, files, made=again)
    rows, same = [], {"size": size, "layout": None, "precision": "bf16", "shape": None, "devices": 1}
    for mine, theirs in (("loading", "reading"), ("converting", "copying")):
        ratio = bench.median_ratio(rates[mine], rates[theirs])
        raw = {f"{name} GB/s": rounded(perf.spread(rates[name])) for name in (mine, theirs)}
        task, extra = f"released weights, {mine}", round(max(extras[mine]) / largest, 3)
        rows += [
            same | {"task": task, "value": ratio, "unit": f"x {theirs} the files", "raw": raw},
            same | {"task": f"{task}, memory", "value": extra, "unit": "x largest tensor",
                    "raw": {"largest tensor MiB": round(largest / 2**20, 1)}},
        ]  # fmt: skip
    return rows
