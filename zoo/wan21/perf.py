"""Benchmarks of this recipe on the machine it runs on, each against its peer in the same run.

    bash zoo/wan21/perf.sh                       all of them
    bash zoo/wan21/perf.sh --only step --size 1.3B
    bash zoo/wan21/perf.sh --record              and add the rows to perf.jsonl; needs a committed tree

step   a training step (forward, backward, clipping, optimizer) of this model through megatron-core, and of diffusers'
       WanTransformer3DModel with torch's fused AdamW, plain and under torch.compile (--no-compiled-peer leaves that out;
       --compile is for this model's own blocks), on the same device, batch, weights and dtype, turn by turn; peak memory (of the compiled peer: compiling included).
       A contender whose first loss is not the same is refused. Beside it, what is published for the same workload:
       --size 1.3B and --size 14B are MindSpeed-MM's, on as many devices as there are
run    the launcher as a user starts it: seconds to the first step and for --help, the share of a step spent waiting
       for data that is really decoded, and (latents cached) outside data, forward, backward and optimizer
generation
       sampling with each of its accelerations against a named baseline, seconds beside quality: perf_generation.py
load   a released folder of 1.3B random weights from disk: rate against reading the same files, memory beyond the model
decode frames per second of PyAV, and of decord where it is installed, at random places of a video

Each number is the median of its repeats, with the 10th and the 90th percentile.
"""

import dataclasses
import datetime
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from common import checkpoint, device, parallel, perf
from common import train as loop
from common.diffusion.buckets import Bucket
from common.diffusion.videos import write_video
from common.video import decord_refusal, read_frames

from . import convert
from .config import SIZES, WanConfig, latent_grid, model_config
from .model import WanBlock, build, draw
from .options import HERE, PerfOptions, parse_buckets
from .perf_generation import generation
from .train import FlowMatching, forward_step

CLIP = 1.0


LOSS_BOUND = {"fp32": 1e-5, "bf16": 2e-3}  # relative; bf16: the peer keeps fp32 weights, we round them
OURS, COMPILED = "this zoo", "torch.compile"


def main(o: PerfOptions) -> None:
    rows = []
    for name, benchmark in (
        ("step", step),
        ("generation", generation),
        ("run", run),
        ("load", load),
        ("decode", decode),
    ):
        if o.only in (name, "all") and (name in ("step", "generation") or dist.get_rank() == 0):
            rows += [facts(o) | row for row in benchmark(o)]
        dist.barrier()
    if dist.get_rank() == 0:
        report(rows, o.record)


def report(rows: list[dict], record: bool) -> None:
    """Print every row, ours beside the published ones of its workload; with record, add those not refused."""
    for row in rows:
        if "refused" in row:
            print(f"{row['task']:<34} refused, not recorded: {row['system']}: {row['refused']}", flush=True)
            continue
        print(f"{row['task']:<34} {row['value']:>10.4g} {row['unit']:<28} {row['system']} {row['raw']}", flush=True)
        if row["task"] == "pretrain step" and row["system"].startswith(OURS):
            print("\n".join("  " + line for line in perf.compare(row, HERE / "perf.jsonl")), flush=True)
    if record:
        for row in rows:
            if "refused" not in row:
                perf.append(HERE / "perf.jsonl", row)
        print(f"recorded in {HERE / 'perf.jsonl'}; render the tables with: python -m common.perf")


def facts(o: PerfOptions) -> dict:
    return {
        "source": "measured",
        "system": OURS + (f" + {COMPILED}" if o.compile else ""),
        "model": f"Wan2.1-{SIZES[o.size].task.upper()}",
        "size": o.size,
        "hardware": device.name(),
        "devices": o.world,
        "layout": o.layout,
        "precision": o.precision,
        "shape": o.buckets,
        "mfu": None,
        "commit": loop.commit(),
        "command": os.environ.get("ZOO_COMMAND", ""),
        "date": datetime.date.today().isoformat(),
    }


def rounded(values: dict) -> dict:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}


# -------------------------------------------------------------------------------------------------------------- step


def batch_of(o: PerfOptions, config: WanConfig) -> dict:
    """A micro-batch of random latents and text, [B, C, F, H, W] and [B, T, D], as training sees them."""
    grid = latent_grid(parse_buckets(o.buckets)[0])
    where, generator = device.current(), torch.Generator().manual_seed(0)
    latents = torch.randn(o.micro_batch, config.out_dim, *grid, generator=generator).to(where)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[o.precision]
    text = torch.randn(o.micro_batch, config.text_len, config.text_dim, generator=generator).to(where, dtype)
    batch = FlowMatching(o).noised(latents, text, torch.zeros_like(text[0]), 0, range(o.micro_batch))
    if config.image_dim is not None:
        y = torch.randn(o.micro_batch, config.in_dim - config.out_dim, *grid, generator=generator)
        image = torch.randn(o.micro_batch, config.image_rows, config.image_dim, generator=generator)
        batch |= {"y": y.to(where), "image": image.to(where, dtype)}
    return batch


def draw_all(name: str, whole: torch.Tensor, generator: torch.Generator) -> None:
    """The recipe's initial values, with noise where those are zero: behind a zero output head any model has the same loss."""
    draw(name, whole, generator)
    if not whole.any():
        whole.normal_(std=whole.shape[-1] ** -0.5, generator=generator)


def ours(o: PerfOptions, config: WanConfig) -> Callable[[], list[dict]]:
    """One training step of this recipe: everything `common.train` does between loading a batch and logging. Returns
    what the schedule does: this rank's losses, still on the device."""
    chunks = build(o, config)
    checkpoint.initialize(chunks, o.seed, draw_all)
    wrapped = parallel.wrap(chunks, o, WanBlock)
    optimizer = loop.build_optimizer(o, wrapped)
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    batch, run_schedule = batch_of(o, config), get_forward_backward_func()
    tokens = config.tokens(tuple(batch["x"].shape[2:]))
    split = o.cp * (o.tp if o.sp else 1)

    def step() -> list[dict]:
        for chunk in wrapped:
            if hasattr(chunk, "zero_grad_buffer"):
                chunk.zero_grad_buffer()
        optimizer.zero_grad()
        batches = [batch] * o.micro_batches
        results = run_schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in wrapped] if len(wrapped) > 1 else iter(batches),
            model=wrapped if len(wrapped) > 1 else wrapped[0],
            num_microbatches=o.micro_batches,
            seq_length=(tokens // split + config.context_rows) * split,
            micro_batch_size=o.micro_batch,
        )
        optimizer.prepare_grads()
        loop.clip_gradients(optimizer, CLIP, optimizer.get_grad_norm())
        optimizer.step_with_ready_grads()
        return results

    return step


def peer(o: PerfOptions, config: WanConfig, compiled: bool) -> Callable[[], torch.Tensor]:
    """The same step by diffusers and torch on one device, from our weights; returns the loss, still on the device.
    bf16: fp32 weights under autocast, as its trainers do."""
    values = {k: v for k, v in config.to_diffusers().items() if not k.startswith("_")}
    values["patch_size"] = tuple(values["patch_size"])
    with device.current():
        model = diffusers.WanTransformer3DModel(**values)
    weights = {}
    for name, shape in convert.shapes(config).items():
        whole = weights[convert.to_diffusers(name)] = torch.empty(shape)
        draw_all(name, whole, torch.Generator().manual_seed(checkpoint.stable_seed(o.seed, name)))
    model.load_state_dict(weights)
    if o.recompute == "full":
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, (o.beta1, o.beta2), weight_decay=o.weight_decay, fused=True)
    batch, where = batch_of(o, config), device.current().type
    forward = torch.compile(model) if compiled else model
    x = torch.cat((batch["x"], batch["y"]), 1) if "y" in batch else batch["x"]

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), device=batch["x"].device)
        for _ in range(o.micro_batches):
            with torch.autocast(where, torch.bfloat16, enabled=o.precision == "bf16"):
                out = forward(x, batch["t"], batch["text"], batch.get("image"), return_dict=False)[0]
            error = (out.float() - batch["target"]).square().mean((1, 2, 3, 4))
            loss = (error * batch["weight"]).mean() / o.micro_batches
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return total

    return step


def timed(step: Callable) -> tuple[float, object]:
    """Seconds of one call, the device's queue empty before and after, and what it returned."""
    device.synchronize()
    start = time.perf_counter()
    result = step()
    device.synchronize()
    return time.perf_counter() - start, result


def serve_peer(pipe, o: PerfOptions, config: WanConfig, compiled: bool) -> None:
    """A process of its own, so that its memory is its own: a step for every request, then its peak memory."""
    before = device.memory_gib()
    step = peer(o, config, compiled)
    while pipe.recv():
        try:
            seconds, loss = timed(step)
        except Exception as error:  # torch.compile fails at its first call, in as many ways as there are machines
            if not compiled:
                raise
            pipe.send(f"torch.compile does not work here: {type(error).__name__}: {error}".splitlines()[0])
            return
        pipe.send((seconds, float(loss)))
    pipe.send(device.memory_gib() - before)


class Peer:
    """A contender in a process of its own, asked for one step at a time."""

    def __init__(self, o: PerfOptions, config: WanConfig, compiled: bool):
        self.name = f"diffusers {diffusers.__version__}" + (f" + {COMPILED}" if compiled else "")
        self.seconds, self.losses, self.memory, self.failure = [], [], None, None
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve_peer, args=(theirs, o, config, compiled), daemon=True)
        self.process.start()
        theirs.close()  # so that a process that dies is noticed

    def step(self) -> None:
        if self.failure is None:
            self.pipe.send(True)
            answer = self.pipe.recv()
            if isinstance(answer, str):
                self.failure = answer
            else:
                self.seconds.append(answer[0])
                self.losses.append(answer[1])

    def finish(self) -> None:
        if self.failure is None:
            self.pipe.send(False)
            self.memory = self.pipe.recv()
        self.process.join()


def step(o: PerfOptions) -> list[dict]:
    config, before = model_config(o), device.memory_gib()
    if config.image_dim is not None:  # diffusers takes the last 512 rows of its context for the text, whatever they are
        config = dataclasses.replace(config, text_len=512)
    mine = ours(o, config)
    main = dist.get_rank() == 0
    peers = [Peer(o, config, compiled) for compiled in ((False, True) if o.compiled_peer else (False,))] if main else []
    seconds, losses = [], []
    for _ in range(perf.WARMUP + o.repeats):
        dist.barrier()
        taken, results = timed(mine)
        seconds.append(taken)
        losses.append(loop.global_loss(o, results, False)[0])
        for contender in peers:
            contender.step()
        dist.barrier()  # nobody computes while a peer does
    memory = device.memory_gib() - before
    for contender in peers:
        contender.finish()
    return step_rows(o, config, seconds, losses, memory, peers) if main else []


def step_rows(o: PerfOptions, config: WanConfig, seconds: list, losses: list, memory: float, peers: list) -> list[dict]:
    """The record's rows of one `step` benchmark; what must not be recorded says so in `refused`."""
    task, unit = "pretrain step", "SPS"
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    taken = perf.spread(seconds[perf.WARMUP :])
    rate = o.global_batch / taken["median"]
    tflops = 3 * config.flops(latent_grid(parse_buckets(o.buckets)[0])) * rate / o.world / 1e12
    peak = perf.peak_tflops(device.name(), o.precision)
    raw = {"step s": rounded(taken), "TFLOP/s/device": float(f"{tflops:.4g}"), "memory GiB": round(memory, 3)}
    raw |= {"first loss": losses[0]} | versions
    mine = {
        "task": task,
        "value": round(rate, 3),
        "unit": unit,
        "mfu": round(tflops / peak, 4) if peak else None,
        "raw": raw,
    }
    rows = [mine]
    for contender in peers:
        row = {"task": task, "unit": unit, "system": contender.name, "devices": 1, "layout": None}
        ratio = {"task": f"{task}, ratio to diffusers", "unit": "x per device"}
        if contender.name.endswith(COMPILED):
            ratio["task"] += f" + {COMPILED}"
        if contender.failure:
            rows.append(row | {"refused": contender.failure})
            continue
        apart = abs(contender.losses[0] - losses[0]) / abs(losses[0])
        if not apart <= LOSS_BOUND[o.precision]:
            why = (
                f"its first loss is {contender.losses[0]:.8g}, ours {losses[0]:.8g}: {apart:.1e} apart, expected at most "
                f"{LOSS_BOUND[o.precision]:.0e} in {o.precision}; these are not the same step"
            )
            rows += [row | {"refused": why}, ratio | {"system": OURS, "refused": why}]
            if not contender.name.endswith(COMPILED):
                mine["refused"] = why.replace("its first loss", f"the first loss of {contender.name}")
            continue
        taken = perf.spread(contender.seconds[perf.WARMUP :])
        theirs = o.global_batch / o.dp / taken["median"]
        peer_raw = {"step s": rounded(taken), "first step s": float(f"{contender.seconds[0]:.4g}")}
        peer_raw |= {"memory GiB": round(contender.memory, 3), "loss apart": float(f"{apart:.1e}")} | versions
        rows.append(row | {"value": round(theirs, 3), "raw": peer_raw})
        rows.append(
            ratio
            | {"value": round(rate / o.world / theirs, 3), "raw": {"memory ratio": round(memory / contender.memory, 3)}}
        )
    return rows


# --------------------------------------------------------------------------------------------------------------- run


def user_environment() -> dict[str, str]:
    """This process's environment without what torchrun added."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "OMP_", "ZOO_COMMAND")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {"ZOO_PYTHON": sys.executable}


def run(o: PerfOptions) -> list[dict]:
    launcher, env = str(HERE / "pretrain_t2v.sh"), user_environment()
    helps = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(["bash", launcher, "--help"], env=env, check=True, stdout=subprocess.DEVNULL)
        helps.append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        firsts, rows = [], []
        # The first call warms the disk and makes the demo data, the second decodes, the third finds the second's latents.
        for i in range(3):
            out = Path(folder) / f"run{i}"
            command = ["bash", launcher, "--size", o.size, "--layout", o.layout, "--out", str(out)]
            command += ["--steps", "30" if i else "1", "--save-every", "0", "--sample-steps", "1"]
            command += ["--cache", str(Path(folder) / ("cache" if i else "none"))]
            start, first = time.perf_counter(), None
            with open(Path(folder) / "log", "w") as log:
                process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
                while process.poll() is None:
                    metrics = out / "metrics.jsonl"
                    if first is None and metrics.is_file() and '"kind": "step"' in metrics.read_text():
                        first = time.perf_counter() - start
                    time.sleep(0.05)
            if process.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{Path(log.name).read_text()[-2000:]}")
            firsts.append(first)
            rows.append(perf.steady_rows(perf.read_metrics(out / "metrics.jsonl")[1], warmup=5))
    _, decoded, cached = rows
    waits = [r["data_wait_ms"] / r["step_time_ms"] for r in decoded]
    encoding = [r["prepare_ms"] / r["step_time_ms"] for r in decoded]
    # prepare: reading the cached latents, drawing noise and timesteps
    around = [1 - (r["data_wait_ms"] + r["compute_ms"] - r["prepare_ms"]) / r["step_time_ms"] for r in cached]
    return [
        {"task": "launcher --help", "value": round(statistics.median(helps), 3), "unit": "s", "raw": rounded(perf.spread(helps))},
        {"task": "launcher to first step, warm", "value": round(firsts[1], 2), "unit": "s", "raw": {"cold": round(firsts[0], 2)}},
        {"task": "data wait, decoding every clip", "value": round(100 * statistics.median(waits), 3), "unit": "% of step",
         "raw": rounded(perf.spread(waits)) | {"of it encoding (VAE, text), not waiting": round(statistics.median(encoding), 4)}},
        {"task": "trainer overhead", "value": round(100 * statistics.median(around), 3), "unit": "% of step",
         "raw": rounded(perf.spread(around))},
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- load


class PeakMemory:
    """The largest anonymous memory of this process while inside, in bytes: mapped files do not count."""

    def __enter__(self):
        self.peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def __exit__(self, *args) -> None:
        self._done.set()
        self._thread.join()


def forget(files: list[Path]) -> None:
    """Make the kernel drop the files' pages, so that the next read is from disk."""
    for file in files:
        with open(file, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(o: PerfOptions) -> list[dict]:
    """One rank reads everything: the layout with the most to read."""
    config = SIZES["1.3B"]
    single = dataclasses.replace(o, size="1.3B", precision="bf16", tp=1, sp=False, pp=1, vpp=1, cp=1, fsdp=False)
    chunks = build(single, config, torch.device("cpu"))
    largest = max(p.numel() * p.element_size() for p in chunks[0].parameters())
    with tempfile.TemporaryDirectory(dir=o.out.parent if o.out.parent.is_dir() else None) as folder:
        shapes = convert.shapes(config)
        sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
        target = Path(folder) / "released"
        convert.write_released(
            target, "original", config, sizes, lambda name: torch.full(shapes[name], 0.5, dtype=torch.bfloat16), None
        )
        files = sorted(target.glob("*.safetensors"))
        total = sum(f.stat().st_size for f in files)
        for p in chunks[0].parameters():
            p.data.zero_()  # its pages exist before the clock starts
        rates, disk_rates, extras = [], [], []
        for _ in range(5):  # turn by turn: a disk's rate wanders
            forget(files)
            start, buffer = time.perf_counter(), bytearray(2**24)
            for file in files:
                with open(file, "rb", buffering=0) as f:
                    while f.readinto(buffer):
                        pass
            disk_rates.append(total / (time.perf_counter() - start) / 1e9)
            forget(files)
            before, start = PeakMemory.now(), time.perf_counter()
            with PeakMemory() as memory:
                entries, rename = convert.released_entries(target, config)
                checkpoint.load_released(chunks, entries, rename)
            rates.append(total / (time.perf_counter() - start) / 1e9)
            extras.append(max(0, memory.peak - before) / largest)
    ratio = statistics.median(mine / disk for mine, disk in zip(rates, disk_rates, strict=True))
    return [
        {"task": "released weights, loading", "size": "1.3B", "layout": None, "precision": "bf16", "value": round(ratio, 3),
         "unit": "x disk read rate", "raw": {"GB/s": rounded(perf.spread(rates)), "disk GB/s": rounded(perf.spread(disk_rates))}},
        {"task": "released weights, memory", "size": "1.3B", "layout": None, "precision": "bf16", "value": round(max(extras), 3),
         "unit": "x largest tensor", "raw": {"largest tensor MiB": round(largest / 2**20, 1)}},
    ]  # fmt: skip


def decode(o: PerfOptions) -> list[dict]:
    """Frames per second of each decoder at windows of 17 frames, at random places of a clip of 10 s and 480x832."""
    bucket, frames = Bucket(17, 480, 832), 300
    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.default_rng(0).integers(0, 256, (frames // 10, 30, 52, 3), dtype=np.uint8)
        clip = np.stack([np.kron(noise[i // 10], np.ones((16, 16, 1), np.uint8)) for i in range(frames)])
        [path] = write_video(clip, Path(folder) / "clip", 30, "mp4")
        decoders = ["pyav"] + (["decord"] if find_spec("decord") and decord_refusal(path) is None else [])
        rates: dict[str, list[float]] = {name: [] for name in decoders}
        for start in np.random.default_rng(1).integers(0, 10 * 16 - bucket.frames, 20).tolist():
            for name, seen in rates.items():  # turn by turn
                began = time.perf_counter()
                read_frames(path, range(start, start + bucket.frames), fps=16.0, decoder=name)
                seen.append(bucket.frames / (time.perf_counter() - began))
    return [
        {"task": "decoding, random windows", "size": None, "layout": None, "precision": None, "shape": str(bucket),
         "system": f"{OURS}, {name} {version(name if name == 'decord' else 'av')}",
         "value": round(statistics.median(seen), 1), "unit": "frames/s", "raw": {"frames/s": rounded(perf.spread(seen))}}
        for name, seen in rates.items()
    ]  # fmt: skip
