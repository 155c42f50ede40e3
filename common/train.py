"""The training loop of every recipe: megatron-core's optimizer and schedules, with checkpoints, resume, metrics, a
guard against bad steps, signals and profiles.

The recipe passes its model chunks, a `forward_step` for megatron-core's schedules and a function that yields each
step's micro-batches. Losses, models and data stay in the recipe.

Each step has one host synchronisation, on purpose: the loop reads the loss, the gradient norm and the stop flag
together after the backward, to decide whether to apply the step.
"""

import dataclasses
import json
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from tqdm import tqdm

from common import checkpoint, device, jsonl, parallel, perf, profiling, resume
from common.cli import TrainOptions, as_json
from common.optimizer import build_optimizer, build_scheduler, reduce_gradients, update, zero_gradients
from common.profiling import part
from common.runlog import Log

BAD_STEPS_EXIT = 3  # exit code of a run stopped by the guard
NOT_SAVED_EXIT = 4  # exit code of a run that was to export its last step but could not save it


def forward(
    chunks: list[torch.nn.Module],
    forward_step: Callable,
    micro_batches: list,
    *,
    micro_batch: int,
    sequence_length: int,
    backward: bool = True,
) -> list[dict]:
    """Runs micro-batches forward, and by default backward, through this rank's chunks, by megatron-core's schedule.

    forward_step: as that schedule calls it. micro_batch: samples per micro-batch. sequence_length: length of the
    pipeline tensor, times cp and under sp times tp, by which megatron-core divides it. Returns what the loss function
    reports of each micro-batch: nothing on the earlier pipeline stages.
    """
    has_several_chunks = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks] if has_several_chunks else iter(micro_batches),
        model=chunks if has_several_chunks else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=sequence_length,
        micro_batch_size=micro_batch,
        forward_only=not backward,
    )


def count_epochs(o: TrainOptions, samples: int) -> TrainOptions:
    """Prints how many steps one epoch of `samples` takes. With --epochs, returns options with the steps of that many
    epochs and a warm-up of at most a tenth of them; else returns o."""
    steps_per_epoch = samples / o.global_batch
    if o.epochs is not None:
        steps = math.ceil(o.epochs * steps_per_epoch)
        o = dataclasses.replace(o, steps=steps, warmup=min(o.warmup, steps // 10))
    if dist.get_rank() == 0:
        print(
            f"an epoch is {steps_per_epoch:,.1f} steps ({samples:,} samples, {o.global_batch} a step): {o.steps} steps, "
            f"{o.warmup} of them warm-up, are {o.steps / steps_per_epoch:.2f} epochs",
            flush=True,
        )
    return o


def train(
    o: TrainOptions,
    chunks: list[torch.nn.Module],
    forward_step: Callable,
    batches: Callable[[int], Iterator],
    prepare: Callable[[Any], list[dict]],
    *,
    sequence_length: Callable[[list[dict]], int],
    samples: Callable[[list[dict]], tuple[int, int]],
    header: dict,
    state: dict,
    extra_files: Iterable[Path] = (),
    ema_decay: float = 0.0,
    measure: Callable[[], dict] | None = None,
) -> dict:
    """Trains until o.steps, SIGTERM, or the guard stops it.

    chunks: this rank's wrapped model chunks. forward_step: as megatron-core's schedules call it. Its loss function
    returns (this rank's contribution to the micro-batch's mean loss, {"loss": the same, detached}). batches(start
    step): yields each step's data as loaded. prepare(loaded): this rank's micro-batches of the step, on the device.
    sequence_length(batch): as in `forward`. samples(batch): (tokens, model FLOPs) of one sample. header: run facts.
    state: facts of the recipe that checkpoints store. extra_files: files that are copied into each checkpoint.
    measure(): called on every rank after each backward; returns more values for the step's row, and may wait for the device.

    Returns {"steps", "reason", "checkpoint", "ema"}. The checkpoint is that of the last step, None if it could not be
    written. After o.max_bad_steps consecutive non-finite steps, exits the process with code 3; the batch of the last
    one is saved.
    """
    if o.deterministic:
        torch.use_deterministic_algorithms(True)
    folder = o.out / "checkpoints"
    optimizer = build_optimizer(o, chunks)
    scheduler = build_scheduler(o, optimizer)
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    chunks[0].config.timers = profiling.megatron_timer
    ema = {name: p.detach().float().clone() for name, p in checkpoint.trained(chunks)} if ema_decay else None

    if dist.get_rank() == 0:  # before the ranks synchronise, so before any process adds a line
        for name in ("metrics.jsonl", "drops.jsonl"):
            jsonl.mend(o.out / name)
    resumed_from, saved = checkpoint.load_found(folder, o.resume, chunks, optimizer, ema=ema, fsdp=o.fsdp)
    start, applied = saved["step"], saved["optimizer_steps"]
    scheduler.step(applied + 1)  # step k uses the schedule at k, so that the first does not train at rate 0
    log = Log(o, header, append=bool(resumed_from))
    log.say(f"resumed from {resumed_from} at step {start}" if resumed_from else f"starts from {header['starts_from']}")
    if resumed_from and (changed := resume.changes(saved.get("options", {}), o)):
        log.say(f"changed since then: {', '.join(changed)}")
    if resumed_from and start >= o.steps:
        log.say(f"all {o.steps} steps are done: nothing to train; more are trained with a larger --steps")

    def save(step: int) -> Path | None:
        facts = {**state, "step": step, "optimizer_steps": applied, "options": as_json(o)}
        try:
            path = checkpoint.save(
                folder, step, chunks, optimizer, facts, extra_files=extra_files, ema=ema, keep=o.keep, fsdp=o.fsdp
            )
        except OSError as error:
            log.say(f"warning: {error}; training goes on from memory")
            return None
        log.say(f"saved {path}")
        return path

    stop, profile = _StopFlag(), profiling.Window(o)
    bad, skipped, reason, rows = 0, 0, "finished", deque(maxlen=10_000)
    saves = [resumed_from]  # then the checkpoints of this run; None for one that could not be written
    bar = tqdm(total=o.steps, initial=start, disable=not (log.main and sys.stderr.isatty()), unit="step")
    iterator, step = batches(start), start
    began = time.perf_counter()
    while step < o.steps:
        began = profile.begin(step, began)
        waited = time.perf_counter()
        with part("data"):
            loaded = next(iterator)
        computing = time.perf_counter()
        with part("prepare"):
            batch = prepare(loaded)
        prepared = time.perf_counter()
        with part("optimizer"):
            zero_gradients(chunks, optimizer)
        results = forward(
            chunks, forward_step, batch, micro_batch=o.micro_batch, sequence_length=sequence_length(batch)
        )
        with part("optimizer"):
            grad_norm = reduce_gradients(optimizer)
        loss, stopping = global_loss(o, results, stop.asked)
        measured = measure() if measure else {}  # the host has just waited and the update has not begun

        lr = optimizer.param_groups[0]["lr"]
        if math.isfinite(loss) and math.isfinite(grad_norm):
            with part("optimizer"):
                update(optimizer, o.clip, grad_norm)
                scheduler.step(1)
                if ema:
                    values = [p.detach().float() for _, p in checkpoint.trained(chunks)]
                    torch._foreach_lerp_(list(ema.values()), values, 1 - ema_decay)
            applied, bad = applied + 1, 0
        else:
            bad, skipped = bad + 1, skipped + 1
            _save_bad_batch(o, step + 1, batch, loss, grad_norm)
        step += 1

        now = time.perf_counter()  # the read of the loss has waited for everything but the update
        row = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        row |= rates(o, header["hardware"], now - began, step, *samples(batch))
        row |= {"memory_gib": device.memory_gib(), "data_wait_ms": (computing - waited) * 1e3}
        row |= {"prepare_ms": (prepared - computing) * 1e3, "compute_ms": (now - computing) * 1e3, "skipped": skipped}
        row |= measured | profile.mark(step)
        began = now
        rows.append({k: row.get(k) for k in ("step", "step_time_ms", "samples_per_second", "mfu", "profiled")})
        log.step(row, o, skipped)
        bar.update()
        if table := profile.end(step, list(rows)):
            log.say(table)
            began = time.perf_counter()
        if bad >= o.max_bad_steps:
            description = "consecutive steps with a loss or gradient that is not finite"
            reason = f"{bad} {description}; batch saved in {o.out / 'bad_batch'}"
            break
        if stopping:
            reason = "SIGTERM"
            break
        if o.save_every and step % o.save_every == 0 and step < o.steps:
            saves.append(save(step))
            began = time.perf_counter()
    bar.close()
    parallel.finish_gathers(chunks)  # the caller reads the parameters
    if bad < o.max_bad_steps and step > start:
        saves.append(save(step))
    steady = perf.steady(list(rows))
    log.say(perf.steady_line(steady))
    log.record({"kind": "end", "steps": step, "reason": reason, "steady": steady})
    if log.main:
        perf.plot_loss(o.out / "metrics.jsonl", o.out / "loss.png")
    if bad >= o.max_bad_steps:
        log.say(f"stopped: {reason}; fix: lower --lr, or look at the batch")
        sys.exit(BAD_STEPS_EXIT)
    if step and not saves[-1]:
        older = next(filter(None, reversed(saves)), "no checkpoint of this run")
        log.say(f"the weights of step {step} are not on disk, their checkpoint could not be written; there is {older}")
    return {"steps": step, "reason": reason, "checkpoint": saves[-1], "ema": ema}


def rates(o: TrainOptions, hardware: str, seconds: float, step: int, tokens: int, flops: int) -> dict:
    """Returns the rates of a step that took these seconds, for metrics.jsonl. tokens and flops: of one sample. A step
    counts as three forwards."""
    rate = o.global_batch / seconds
    tflops, peak = 3 * flops * rate / o.world / 1e12, perf.peak_tflops(hardware, o.precision)
    return {
        "step_time_ms": seconds * 1e3,
        "samples": step * o.global_batch,
        "tokens": tokens * o.global_batch,
        "samples_per_second": rate,
        "tokens_per_second_per_device": tokens * rate / o.world,
        "tflops_per_device": tflops,
        "mfu": tflops / peak if peak else None,
    }


def last_checkpoint(o: TrainOptions, result: dict) -> Path:
    """Returns the checkpoint of a run's last step, to export from; never an older one. If it could not be written,
    every rank exits with code 4; `train` has printed which checkpoint there is."""
    if result["checkpoint"] is None:
        if dist.get_rank() == 0:
            lost = f"error: step {result['steps']} is not on disk, so {o.export} is not written"
            print(f"{lost}; fix: free space and run the same again", file=sys.stderr, flush=True)
        sys.exit(NOT_SAVED_EXIT)
    return result["checkpoint"]


class _StopFlag:
    """SIGTERM (a scheduler's notice, or a Ctrl-C that torchrun passes on) or SIGINT sets it. The run then saves a
    checkpoint after the current step and stops."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *args):
        self.asked = True


def global_loss(o: TrainOptions, results: list[dict], stop: bool) -> tuple[float, bool]:
    """Returns the mean loss over the global batch and whether any rank must stop, by one reduction of two numbers."""
    numbers = torch.zeros(2, device=torch.cuda.current_device())
    if results:
        numbers[0] = torch.stack([r["loss"] for r in results]).sum() / (o.micro_batches * o.dp)
        if not o.sp:
            numbers[0] /= o.tp  # every tensor-parallel rank holds the same tokens
    numbers[1] = float(stop)
    dist.all_reduce(numbers)
    loss, stopping = numbers.tolist()
    return loss, stopping > 0


def _save_bad_batch(o: TrainOptions, step: int, batch: list[dict], loss: float, grad_norm: float) -> None:
    """Saves the inputs of a non-finite step for inspection: one safetensors and one json file per rank."""
    from safetensors.torch import save_file

    folder = o.out / "bad_batch"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step{step}-rank{dist.get_rank()}"
    tensors = {
        f"{i}.{k}": v.contiguous().cpu() for i, b in enumerate(batch) for k, v in b.items() if torch.is_tensor(v)
    }
    save_file(tensors, folder / f"{name}.safetensors")
    facts = [{k: v for k, v in b.items() if not torch.is_tensor(v)} for b in batch]
    (folder / f"{name}.json").write_text(
        json.dumps({"loss": str(loss), "grad_norm": str(grad_norm), "batch": facts}, default=str)
    )
