"""Train Qwen3: data, model, objective, loop.

    bash zoo/qwen3/pretrain.sh                                                # laptop: tiny model, docstrings of Python
    NPROC=8 bash zoo/qwen3/pretrain.sh --size 8B --weights Qwen3-8B-Base --data corpus

All ranks of a tensor x context x pipeline group read the same rows. The loss is the mean over the labelled tokens of
the whole global batch, so neither packing nor the layout changes the loss or its gradients. The losses of dpo.sh are in
common/language/preference.py, those of orm.sh and prm.sh in common/language/reward.py.
"""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from common import lora, parallel, release, runlog
from common import train as loop
from common.language import preference, reward
from common.language.options import starts_from
from common.margins import Margins

from . import convert, score
from .config import Qwen3Config, model_config, quantized
from .data import Batches, rows_of, weighted
from .demo import judge
from .model import Qwen3Block, build, draw, load_balancing_loss, router_metrics
from .options import DEMO, HERE, TrainOptions, run_facts, starting_point

# --------------------------------------------------------------------------------------------------------- objective


def forward_step(iterator: Iterator[dict], model: torch.nn.Module):
    """Runs one micro-batch through one model chunk. megatron-core's schedules require (output, loss function)."""
    batch = next(iterator)
    output = model(*(batch[k] for k in ("tokens", "positions", "cu_seqlens", "rows", "labels", "weight")))
    return output, lambda output: loss(output, batch, model)


def loss(output: tuple, batch: dict, model: torch.nn.Module) -> tuple[torch.Tensor, dict]:
    """Returns the cross entropy of this rank's tokens, plus aux * load-balancing loss if the model has experts.
    `weighted` has chosen the tokens' weights so that the sum over context parallel ranks, averaged over micro-batches
    and data parallel ranks, is the mean over all labelled tokens of the global batch, wherever packing has put a
    document."""
    value, routing = output
    chunk = parallel.unwrapped(model)
    tp = chunk.config.tensor_model_parallel_size
    # All tp ranks have computed the same value. global_loss averages over them; under sequence parallelism it sums.
    reported = value.detach() / (tp if chunk.config.sequence_parallel else 1)
    if batch["aux"]:  # divided below, because gradients are summed over the tp*cp ranks of a row
        balance = load_balancing_loss(routing, chunk.qwen.num_experts_per_tok)
        value = value + batch["aux"] / (tp * chunk.config.context_parallel_size) * balance
    return value, {"loss": reported.clone()}  # a copy, because the schedule scales `value` in place


# ---------------------------------------------------------------------------------------------------------- adapters


def adapt(chunks: list[torch.nn.Module], o: TrainOptions, config: Qwen3Config) -> None:
    """Adds low-rank adapters to the model and freezes all other parameters."""
    if o.adapter:
        lora.load_adapter(convert.adapter(o.adapter, config), chunks, convert.expert_pieces(config))
    else:
        kind = {"rank": o.lora_rank, "alpha": o.lora_alpha, "dropout": o.lora_dropout, "rslora": o.rslora}
        lora.add(chunks, o.targets(config), **kind, seed=o.seed, pieces=convert.expert_pieces(config))


def write_adapter(o: TrainOptions, config: Qwen3Config, wrapped: list[torch.nn.Module]) -> None:
    """Writes the adapters as a PEFT folder and, with --merge, the released weights with the adapters added."""
    folder = o.export or o.out / "adapter"
    if dist.get_rank() == 0 and not o.export:
        shutil.rmtree(folder, ignore_errors=True)  # left by this run with fewer --steps
    base, pieces = str(o.weights or ""), convert.expert_pieces(config)
    lora.save_adapter(folder, wrapped, convert.released, pieces=pieces, base=base, task="CAUSAL_LM")
    if dist.get_rank() == 0:
        print(f"adapter     {folder}", flush=True)
    if dist.get_rank() == 0 and o.merge:
        source = convert.open_source(o.weights, config)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[o.precision]
        rounded = release.Source(lambda name: dtype.itemsize, lambda name: source.read(name).to(dtype))
        merged = release.merge_adapter(rounded, convert.adapter(folder, config), pieces=pieces)
        convert.write_released(o.merge, config, merged, o.tokenizer)
        print(f"merged      {o.merge}", flush=True)


def reference_facts(o: TrainOptions, config: Qwen3Config) -> list:
    """Returns everything that the reference's log-probabilities depend on, besides the pairs."""
    start = {key: value for key, value in starting_point(o).items() if key in ("base", "adapter")}
    return [start, dataclasses.asdict(config), o.precision]


# -------------------------------------------------------------------------------------------------------- evaluation


def held_out_rows(o: TrainOptions):
    """Opens the rows to evaluate on after training, or returns None. ValueError: they do not fill a global batch."""
    if o.validation is None:
        return None
    rows = rows_of(o.validation, o, shuffle=False)
    if len(rows) < o.global_batch:
        raise ValueError(
            f"{o.validation} holds {len(rows)} rows of {o.seq_len} tokens, a global batch takes {o.global_batch}; "
            "fix: --validation or --global-batch"
        )
    return rows


@torch.no_grad()
def evaluate_micro_batches(
    o: TrainOptions, wrapped: list[torch.nn.Module], step, micro_batches: list[dict]
) -> list[dict]:
    """Evaluates micro-batches with dropout off, under the run's own layout. Returns what the loss function of `step`
    reports for each; on all but the last pipeline stage, an empty list."""
    for chunk in wrapped:
        chunk.eval()
    results = loop.forward(
        wrapped, step, micro_batches, micro_batch=o.micro_batch, sequence_length=o.seq_len, backward=False
    )
    for chunk in wrapped:
        chunk.train()
    return results


def held_out_loss(o: TrainOptions, wrapped, step, batches: Batches, rows) -> tuple[float, int]:
    """Returns (mean loss, count) over the labelled tokens, pairs or steps of the held-out rows. Rows that do not fill a
    global batch are left out."""
    rank, loss_sum, total_count = mpu.get_data_parallel_rank(), 0.0, 0
    for number in range(len(rows) // o.global_batch):
        first = number * o.global_batch + rank * o.micro_batch
        starts = range(first, (number + 1) * o.global_batch, o.micro_batch * o.dp)
        loaded = [rows.fetch(list(range(i, i + o.micro_batch))) for i in starts]
        micro_batches = weighted([batches.on_device(b) for b in loaded], o.dp)
        count = torch.stack([(b["weight"] > 0).sum() for b in micro_batches]).sum()
        dist.all_reduce(count, group=mpu.get_data_parallel_group())
        results = evaluate_micro_batches(o, wrapped, step, micro_batches)
        loss_sum += loop.global_loss(o, results, False)[0] * int(count)
        total_count += int(count)
    return loss_sum / total_count, total_count


def finish(o: TrainOptions, steps: int, loss: float, count: int, pairs: dict, compared: str) -> None:
    """Prints the run's result and writes result.json. loss: the mean over count held-out tokens, pairs or steps. pairs:
    what `Margins` says of the pairs or steps. compared: the demo's addition to the text."""
    if o.job in ("orm", "prm"):
        right, units = ("preferred answers ahead", "pairs") if o.job == "orm" else ("verdicts right", "steps")
        text = (
            f"result: step {steps}, loss {loss:.4f} on {count:,} held-out {units}, {right} in {pairs['accuracy']:.1%}"
        )
    elif o.job == "dpo":
        text = (
            f"result: step {steps}, loss {loss:.4f} on {count:,} held-out pairs\n"
            f"        preferred answers gained on the others in {pairs['accuracy']:.0%}, mean margin {pairs['margin']:.2f}"
        )
    else:
        text = f"result: step {steps}, perplexity {math.exp(loss):.2f} on {count:,} held-out tokens"
    lines = (text + compared).split("\n")
    print(f"run folder  {o.out}\nloss curve  {o.out / 'loss.png'}")
    print("\n".join(lines), flush=True)
    (o.out / "result.json").write_text(json.dumps({"held_out_loss": loss, "count": count, "lines": lines}))


def command_that_generates(o: TrainOptions, checkpoint) -> str:
    """Returns the shell command that generates text, or scores rows, with the weights or adapters of this run."""
    args = f"--weights {o.export or checkpoint}"
    if o.job in ("orm", "prm"):
        return f"bash zoo/{HERE.name}/{o.job}.sh {args} --score ROWS.jsonl"
    if o.adapts:
        args = f"--weights {o.merge}" if o.merge else f"--weights {o.weights} --adapter {o.export or o.out / 'adapter'}"
    if o.adapts and o.tokenizer != o.weights:
        args += f" --tokenizer {o.tokenizer}"
    return f"bash zoo/{HERE.name}/generate.sh {args} --prompt TEXT{' --no-chat' if o.job == 'pretrain' else ''}"


# -------------------------------------------------------------------------------------------------------------- main


def main(o: TrainOptions) -> None:
    if o.score:
        return score.write_scores(o)
    config = model_config(o)
    o = loop.count_epochs(o, len(rows_of(o.data, o)))
    packed = None if o.quantize == "none" else quantized(config)
    chunks = build(o, config, torch.device("meta") if packed else None)
    release.fill(chunks, o, convert.table(config), functools.partial(draw, config), packed=packed)
    if o.adapts:
        adapt(chunks, o, config)
    before = None if o.from_scratch else judge.answer(o, chunks[0])
    wrapped = parallel.wrap(chunks, o, Qwen3Block)
    batches, held_out = Batches(o), held_out_rows(o)
    step, margins = forward_step, Margins() if o.job in ("dpo", "orm", "prm") else None
    if o.job in ("orm", "prm"):
        step = functools.partial(reward.forward_step, margins, score.reward_tokens(o))
    elif o.job == "dpo":
        step = functools.partial(preference.forward_step, o, margins)
        for rows in (batches.rows, held_out) if o.preference != "simpo" else ():
            if rows is not None:
                evaluate = functools.partial(evaluate_micro_batches, o, wrapped)
                rows.reference = preference.compute_reference(
                    o, rows, reference_facts(o, config), evaluate, batches.on_device
                )
    routers = functools.partial(router_metrics, wrapped, config) if config.num_experts else dict
    flops = config.flops(o.seq_len, frozen=o.adapts)
    result = loop.train(
        o,
        wrapped,
        step,
        batches,
        batches.prepare,
        sequence_length=lambda batch: o.seq_len,
        samples=lambda batch: (o.seq_len, flops),
        header=runlog.run_header(o, HERE.name, o.job, config.parameters, flops, starts_from(o, DEMO)),
        state={"model": dataclasses.asdict(config), "start": run_facts(o)},
        extra_files=[o.tokenizer / name for name in convert.COPIED],
        measure=lambda: routers() | (margins() if margins else {}),
    )
    finished = result["reason"] == "finished"
    if finished and held_out is not None:
        loss, count = held_out_loss(o, wrapped, step, batches, held_out)
        pairs = margins() if margins else {}
        after = judge.answer(o, parallel.unwrapped(wrapped[0]))
        if dist.get_rank() == 0:
            finish(o, result["steps"], loss, count, pairs, judge.compare(o, config.vocab_size, before, after))
    if finished and o.adapts:
        write_adapter(o, config, wrapped)
    elif finished and o.export and (saved := loop.last_checkpoint(o, result)) and dist.get_rank() == 0:
        convert.write_released(o.export, config, convert.open_source(saved, config), o.tokenizer)
        print(f"exported {o.export}", flush=True)
    usable = not o.from_scratch if o.adapts else o.export or result["checkpoint"]  # initial weights are not stored
    if finished and usable and dist.get_rank() == 0:
        print(f"try it      {command_that_generates(o, result['checkpoint'])}", flush=True)
    dist.barrier()
