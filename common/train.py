"""The training loop every recipe runs: megatron-core's optimizer and schedules, and what a person wants around them
(checkpoints, resume, metrics, a guard against bad steps, signals, profiles).

The recipe hands in its model chunks, a `forward_step` for megatron-core's schedules and a function that yields each
step's micro-batches; losses, models and data stay in the recipe.

One host synchronisation per step, on purpose: loss, gradient norm and the stop flag are read together after the
backward, to decide whether the step is applied.
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from tqdm import tqdm

from common import checkpoint, device, jsonl, ops, perf, profiling, resume
from common.cli import TrainOptions, as_json, to_toml
from common.profiling import part

BAD_STEPS_EXIT = 3  # exit code of a run stopped by the guard
NOT_SAVED_EXIT = 4  # of one that was to export its last step and could not save it


def final_lr(o: TrainOptions) -> float:
    """Where the schedule ends: --min-lr, or 0 if it decays at all."""
    return o.min_lr if o.min_lr is not None else (o.lr if o.lr_schedule == "constant" else 0.0)


def build_optimizer(o: TrainOptions, chunks: list[torch.nn.Module]):
    """AdamW through megatron-core: fp32 master weights, fp32 or bf16 moments, sharded over data parallel."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=final_lr(o),
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.adam_eps,
        clip_grad=o.clip,
        bf16=o.precision == "bf16",
        params_dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[o.precision],
        use_distributed_optimizer=not o.fsdp,
    )
    optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=dist.get_backend() != "fake")
    if o.moments == "bf16" or ops.BACKEND == "npu":
        for each in optimizer.chained_optimizers:
            # One kernel; torch_npu's own is a loop. megatron-core's bf16 moments need Transformer Engine's optimizer.
            each.optimizer.__class__ = SmallMoments if o.moments == "bf16" else ops.AdamW
    else:
        for group in optimizer.param_groups:
            group["fused"] = True  # torch's one-kernel AdamW; megatron-core 0.16 leaves torch's default, a loop
    return optimizer


def forward(
    chunks: list[torch.nn.Module],
    forward_step: Callable,
    micro_batches: list,
    *,
    micro_batch: int,
    sequence_length: int,
    backward: bool = True,
) -> list[dict]:
    """Micro-batches through this rank's model chunks, and unless told otherwise back, by megatron-core's schedule.

    forward_step: as that schedule calls it. micro_batch: samples of each; sequence_length: of one, as the pipeline tensor
    has it times what megatron-core divides it by. Returns what the loss function reports of each micro-batch: nothing on
    the earlier pipeline stages.
    """
    several = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks] if several else iter(micro_batches),
        model=chunks if several else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=sequence_length,
        micro_batch_size=micro_batch,
        forward_only=not backward,
    )


def zero_gradients(chunks: list[torch.nn.Module], optimizer) -> None:
    """To be called before each `forward` with a backward."""
    for chunk in chunks:
        if hasattr(chunk, "zero_grad_buffer"):  # FSDP2 has no buffer of its own
            chunk.zero_grad_buffer()
    optimizer.zero_grad()


def reduce_gradients(optimizer) -> float:
    """Hands the gradients of a backward to the optimizer; returns their norm over all parameters of the model."""
    optimizer.prepare_grads()
    return optimizer.get_grad_norm()


def update(optimizer, limit: float, norm: float) -> None:
    """One step of the optimizer, its gradients scaled so that their norm, which is `norm`, is at most `limit` (0: any)."""
    clip_gradients(optimizer, limit, norm)
    optimizer.step_with_ready_grads()


class SmallMoments(torch.optim.AdamW):
    """AdamW whose moments are kept in bf16, 4 bytes a parameter in place of 8, and updated in fp32, a piece at a time.

    They are rounded stochastically. To nearest, a second moment could hardly fall: a step moves it by (1 - beta2) of its
    distance to g^2, with beta2 = 0.999 less than half of bf16's last place. The noise is a hash of the gradient's bits
    and the step: unbiased over the steps, and the same on every copy of a parameter and in a resumed run.
    """

    moments, PIECE = torch.bfloat16, 2**22  # elements in fp32 at a time: some 100 MiB with what is made on the way

    @torch.no_grad()
    def step(self, closure=None):
        done = next((int(state["step"]) for state in self.state.values() if state), 0)  # they all step together
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p, dtype=self.moments)}
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=self.moments)
                flat = [ops.local(t).view(-1) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
                for weight, grad, *small in zip(*(t.split(self.PIECE) for t in flat), strict=True):
                    wide = [moment.float() for moment in small]
                    ops.adamw_(weight, grad, *wide, done, group)
                    noise = grad.view(torch.int32) * -1640531535 + done * 97  # Fibonacci hashing; int32 wraps around
                    noise = (noise ^ (noise >> 15)) * -2048144789
                    for i, (moment, exact) in enumerate(zip(small, wide, strict=True)):
                        exact.view(torch.int32).add_(noise >> 16 * i & 0xFFFF).bitwise_and_(-0x10000)
                        moment.copy_(exact)
                state["step"] += 1


def build_scheduler(o: TrainOptions, optimizer) -> OptimizerParamScheduler:
    """Learning rate by optimizer step; moved to step n with `.step(n)`."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=final_lr(o),
        lr_warmup_steps=o.warmup,
        lr_decay_steps=o.steps + 1,  # reaches the end one step after the last, which else would train at rate 0
        lr_decay_style=o.lr_schedule,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=max(1, o.steps // 10),
        lr_wsd_decay_style="linear",
    )


class Log:
    """Rank 0's view of a run: console, log.txt, metrics.jsonl, TensorBoard. Silent on other ranks."""

    def __init__(self, o: TrainOptions, header: dict, append: bool):
        self.main = dist.get_rank() == 0
        if not self.main:
            return
        o.out.mkdir(parents=True, exist_ok=True)
        self.text = open(o.out / "log.txt", "a")
        self.metrics = open(o.out / "metrics.jsonl", "a" if append else "w")
        write_config(o)
        self.record({"kind": "run", **header})
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(o.out / "tensorboard")

    def say(self, line: str) -> None:
        if self.main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
            self.text.write(line + "\n")
            self.text.flush()

    def record(self, row: dict) -> None:
        if self.main:
            self.metrics.write(json.dumps(row) + "\n")
            self.metrics.flush()

    def step(self, row: dict, o: TrainOptions, nan_steps: int) -> None:
        if not self.main:
            return
        self.record({"kind": "step", **row})
        for key, value in row.items():
            if isinstance(value, float):
                self.board.add_scalar(key, value, row["step"])
        if row["step"] % o.log_every == 0 or row["step"] == o.steps:
            self.say(console_line(row, o, nan_steps))


def write_config(o: TrainOptions) -> None:
    """config.toml, of this call; that of an earlier call with other options stays as config.1.toml, config.2.toml, …"""
    path, text = o.out / "config.toml", to_toml(o)
    if path.is_file() and path.read_text() != text:
        earlier = len(list(o.out.glob("config.*.toml")))
        path.rename(o.out / f"config.{earlier + 1}.toml")
    path.write_text(text)


def console_line(row: dict, o: TrainOptions, nan_steps: int) -> str:
    """The line people's awk scripts read: field 5 by ':' is the step time in ms."""
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.3f}"
    return (
        f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration {row['step']:8d}/{o.steps:8d} |"
        f" consumed samples: {row['samples']:12d} |"
        f" elapsed time per iteration (ms): {row['step_time_ms']:.1f} | learning rate: {row['lr']:.3E} |"
        f" global batch size: {o.global_batch:5d} | loss: {row['loss']:.6E} | loss scale: 1.0 |"
        f" grad norm: {row['grad_norm']:.3f} | number of skipped iterations: {row['skipped']:3d} |"
        f" number of nan iterations: {nan_steps:3d} | samples/s: {row['samples_per_second']:.3f} |"
        f" tokens/s/device: {row['tokens_per_second_per_device']:.1f} |"
        f" TFLOP/s/device: {row['tflops_per_device']:.3f} | MFU: {mfu} | mem (GiB): {row['memory_gib']:.2f}"
    )


def count_epochs(o: TrainOptions, samples: int) -> TrainOptions:
    """Says how many steps it takes to see `samples` once. Of --epochs makes the steps, a tenth of which may warm up."""
    of_epoch = samples / o.global_batch
    if o.epochs is not None:
        steps = math.ceil(o.epochs * of_epoch)
        o = dataclasses.replace(o, steps=steps, warmup=min(o.warmup, steps // 10))
    if dist.get_rank() == 0:
        print(
            f"an epoch is {of_epoch:,.1f} steps ({samples:,} samples, {o.global_batch} a step): {o.steps} steps, "
            f"{o.warmup} of them warm-up, are {o.steps / of_epoch:.2f} epochs",
            flush=True,
        )
    return o


def run_header(
    o: TrainOptions, recipe: str, job: str, parameters: int, flops_per_sample: int, starts_from: str
) -> dict:
    """The header line of metrics.jsonl."""
    import megatron.core

    return {
        "starts_from": starts_from,
        "command": os.environ.get("ZOO_COMMAND", " ".join(sys.argv)),
        "commit": commit(),
        "recipe": recipe,
        "job": job,
        "size": o.size,
        "layout": {
            k: getattr(o, k) for k in ("layout", "tp", "sp", "pp", "vpp", "cp", "ulysses", "fsdp", "dp", "recompute")
        },
        "hardware": device.name(),
        "devices": o.world,
        "precision": o.precision,
        "versions": {"torch": torch.__version__, "megatron-core": megatron.core.__version__},
        "model_parameters": parameters,
        "model_flops_per_sample": flops_per_sample,
    }


def commit() -> str:
    """The commit of the checkout, '-dirty' appended if tracked files differ, other than the performance records, which
    nothing that is measured reads; 'unknown' outside a checkout."""
    try:
        git = ["git", "-C", str(Path(__file__).parents[1])]
        revision = subprocess.check_output(
            [*git, "rev-parse", "--short=12", "HEAD"], stderr=subprocess.DEVNULL, text=True
        )
        changed = [*git, "status", "--porcelain", "-uno", "--", ".", ":(exclude)*perf.jsonl"]
        dirty = subprocess.check_output(changed, stderr=subprocess.DEVNULL, text=True)
        return revision.strip() + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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
    beside: Iterable[Path] = (),
    ema_decay: float = 0.0,
    measure: Callable[[], dict] | None = None,
) -> dict:
    """Train until o.steps, SIGTERM, or the guard stops it.

    chunks: this rank's wrapped model chunks. forward_step: as megatron-core's schedules call it, its loss function
    returning (this rank's contribution to the micro-batch's mean loss, {"loss": the same, detached}). batches(start
    step): yields each step's data as loaded. prepare(loaded): this rank's micro-batches of the step, on the device.
    sequence_length(batch): the length that megatron-core multiplies out to the pipeline tensor. samples(batch):
    (tokens, model FLOPs) of one sample of it. header: run facts; state: what checkpoints remember of the recipe; beside:
    files that each checkpoint holds a copy of. measure, called on every rank after each backward: what else belongs into
    the step's row; reading it waits for the device.

    Returns {"steps", "reason", "checkpoint", "ema"}, the checkpoint being the one of the last step, None if it could not
    be written; exits the process with code 3 after o.max_bad_steps consecutive non-finite steps, having saved the batch
    that caused the last one.
    """
    if o.deterministic:
        torch.use_deterministic_algorithms(True)
    folder = o.out / "checkpoints"
    optimizer, ema = build_optimizer(o, chunks), None
    scheduler = build_scheduler(o, optimizer)
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    chunks[0].config.timers = profiling.megatron_timer
    if ema_decay:
        ema = {name: p.detach().float().clone() for name, p in checkpoint.trained(chunks)}

    if dist.get_rank() == 0:  # before the ranks meet, and any of their processes adds a line
        for name in ("metrics.jsonl", "drops.jsonl"):
            jsonl.mend(o.out / name)
    found, saved = checkpoint.load_found(folder, o.resume, chunks, optimizer, ema=ema, fsdp=o.fsdp)
    start, applied = saved["step"], saved["optimizer_steps"]
    scheduler.step(applied + 1)  # step k of the run uses the schedule at k, so the first is not wasted at rate 0

    log = Log(o, header, append=bool(found))
    if not found:
        log.say(f"starts from {header['starts_from']}")
    if found:
        log.say(f"resumed from {found} at step {start}")
        if changed := resume.changes(saved.get("options", {}), o):
            log.say(f"changed since then: {', '.join(changed)}")
        if start >= o.steps:
            log.say(f"all {o.steps} steps are done: nothing to train; more are trained with a larger --steps")
    stop = _StopFlag()
    bad, skipped, reason, rows = 0, 0, "finished", deque(maxlen=10_000)
    saves = [found]  # the checkpoints of this run and what it goes on from, None for one that could not be written
    first_profiled, last_profiled = _profile_range(o)
    profiler, profiled_ranks = None, {int(r) for r in o.profile_ranks.split(",")}

    def save(step: int) -> Path | None:
        facts = {**state, "step": step, "optimizer_steps": applied, "options": as_json(o)}
        try:
            path = checkpoint.save(
                folder, step, chunks, optimizer, facts, beside=beside, ema=ema, keep=o.keep, fsdp=o.fsdp
            )
        except OSError as error:
            log.say(f"warning: {error}; training goes on from memory")
            return None
        log.say(f"saved {path}")
        return path

    bar = tqdm(total=o.steps, initial=start, disable=not (log.main and sys.stderr.isatty()), unit="step")
    iterator, step = batches(start), start
    began = time.perf_counter()
    while step < o.steps:
        if profiler is None and first_profiled <= step < last_profiled and dist.get_rank() in profiled_ranks:
            profiler = profiling.profiler()
            began = time.perf_counter()
        waited = time.perf_counter()
        with part("data"):
            loaded = next(iterator)
        waited = time.perf_counter() - waited

        computing = time.perf_counter()
        with part("prepare"):
            batch = prepare(loaded)
        preparing = time.perf_counter() - computing
        with part("optimizer"):
            zero_gradients(chunks, optimizer)
        results = forward(
            chunks, forward_step, batch, micro_batch=o.micro_batch, sequence_length=sequence_length(batch)
        )
        with part("optimizer"):
            grad_norm = reduce_gradients(optimizer)
        loss, stopping = global_loss(o, results, stop.asked)
        measured = measure() if measure else {}  # here, where the host has just waited and the update is not begun

        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            lr = optimizer.param_groups[0]["lr"]
            with part("optimizer"):
                update(optimizer, o.clip, grad_norm)
                scheduler.step(1)
                if ema:
                    values = [p.detach().float() for _, p in checkpoint.trained(chunks)]
                    torch._foreach_lerp_(list(ema.values()), values, 1 - ema_decay)
            applied, bad = applied + 1, 0
        else:
            lr, bad, skipped = optimizer.param_groups[0]["lr"], bad + 1, skipped + 1
            _save_bad_batch(o, step + 1, batch, loss, grad_norm)
        computing = time.perf_counter() - computing  # ends with the optimizer; the read of the loss has waited for all
        step += 1

        now = time.perf_counter()
        seconds, began = now - began, now
        tokens, flops = samples(batch)
        rate = o.global_batch / seconds
        tflops = 3 * flops * rate / o.world / 1e12
        peak = perf.peak_tflops(header["hardware"], o.precision)
        row = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "step_time_ms": seconds * 1e3,
            "samples": step * o.global_batch,
            "tokens": tokens * o.global_batch,
            "samples_per_second": rate,
            "tokens_per_second_per_device": tokens * rate / o.world,
            "tflops_per_device": tflops,
            "mfu": tflops / peak if peak else None,
            "memory_gib": device.memory_gib(),
            "data_wait_ms": waited * 1e3,
            "prepare_ms": preparing * 1e3,
            "compute_ms": computing * 1e3,
            "skipped": skipped,
        } | measured
        if first_profiled < step <= last_profiled:
            row["profiled"] = True
        rows.append({k: row.get(k) for k in ("step", "step_time_ms", "samples_per_second", "mfu", "profiled")})
        log.step(row, o, skipped)
        bar.update()
        if profiler is not None and step == last_profiled:
            usual = perf.steady(list(rows))
            log.say(profiling.write(profiler, o.out / "profile", dist.get_rank(), o.profile_steps, usual))
            profiler, began = None, time.perf_counter()
        if bad >= o.max_bad_steps:
            reason = f"{bad} consecutive steps with a loss or gradient that is not finite; batch saved in {o.out / 'bad_batch'}"
            break
        if stopping:
            reason = "SIGTERM"
            break
        if o.save_every and step % o.save_every == 0 and step < o.steps:
            saves.append(save(step))
            began = time.perf_counter()
    bar.close()
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


def last_checkpoint(o: TrainOptions, result: dict) -> Path:
    """The checkpoint of a run's last step, to export from: no older one stands in for it. Where it could not be written,
    every rank exits with code 4; `train` has said what there is."""
    if result["checkpoint"] is None:
        if dist.get_rank() == 0:
            lost = f"error: step {result['steps']} is not on disk, so {o.export} is not written"
            print(f"{lost}; fix: free space and run the same again", file=sys.stderr, flush=True)
        sys.exit(NOT_SAVED_EXIT)
    return result["checkpoint"]


class _StopFlag:
    """SIGTERM (a scheduler's notice, a Ctrl-C passed on by torchrun) asks for a checkpoint after the current step."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *args):
        self.asked = True


def clip_gradients(optimizer, limit: float, norm: float) -> None:
    """Scale an optimizer's prepared gradients so that their norm, which is `norm` now, is at most `limit` (0: any).
    megatron-core's own clipping, without apex, makes a copy of each."""
    if 0 < limit < norm + 1e-6:
        trained = [p for each in optimizer.chained_optimizers for p in each.get_parameters()]
        torch._foreach_mul_([ops.local(p.grad) for p in trained if p.grad is not None], limit / (norm + 1e-6))


def global_loss(o: TrainOptions, results: list[dict], stop: bool) -> tuple[float, bool]:
    """Mean loss over the global batch and whether any rank was asked to stop: one reduction of two numbers."""
    numbers = torch.zeros(2, device=torch.cuda.current_device())
    if results:
        numbers[0] = torch.stack([r["loss"] for r in results]).sum() / (o.micro_batches * o.dp)
        if not o.sp:
            numbers[0] /= o.tp  # every tensor-parallel rank holds the same tokens
    numbers[1] = float(stop)
    dist.all_reduce(numbers)
    loss, stopping = numbers.tolist()
    return loss, stopping > 0


def _profile_range(o: TrainOptions) -> tuple[int, int]:
    if not o.profile_steps:
        return -1, -1
    first, _, last = o.profile_steps.partition("-")
    return int(first) - 1, min(int(last or first), o.steps)


def _save_bad_batch(o: TrainOptions, step: int, batch: list[dict], loss: float, grad_norm: float) -> None:
    """What went into a non-finite step, for looking at it later: one safetensors and one json per rank."""
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
