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
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from megatron.core.pipeline_parallel import get_forward_backward_func

from common import checkpoint, device, parallel, perf
from common import train as loop
from common.language import preprocess
from common.language.generate import generate as generate_answers
from common.language.pool import in_order

from . import convert
from .config import SIZES, Qwen3Config, model_config
from .model import Qwen3Block, build, draw
from .options import DEMO, DEMO_DATA, HERE, InferOptions, PerfOptions, PreprocessOptions, parse, prepare
from .train import Batches, forward_step, weighted

CLIP = 1.0
LOSS_BOUND = {"fp32": 1e-5, "bf16": 2e-3}  # relative; bf16: the peer keeps fp32 weights, we round them
OURS, COMPILED = "this zoo", "torch.compile"
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
        report(rows, o.record)


# Copied from zoo.wan21.perf.report
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


# Adapted from zoo.wan21.perf.facts: the shape is a row's length, and a size that was cut down says so
def facts(o: PerfOptions) -> dict:
    cut = [f"{o.layers} layers"] * bool(o.layers) + [f"vocabulary {o.vocabulary}"] * bool(o.vocabulary)
    return {
        "source": "measured",
        "system": OURS + (f" + {COMPILED}" if o.compile else ""),
        "model": "Qwen3",
        "size": ", ".join([o.size, *cut]),
        "hardware": device.name(),
        "devices": o.world,
        "layout": o.layout,
        "precision": o.precision,
        "shape": f"{o.micro_batch} x {o.seq_len}",
        "mfu": None,
        "commit": loop.commit(),
        "command": os.environ.get("ZOO_COMMAND", ""),
        "date": datetime.date.today().isoformat(),
    }


# Copied from zoo.wan21.perf.rounded
def rounded(values: dict) -> dict:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}


# -------------------------------------------------------------------------------------------------------------- step


def batch_of(o: PerfOptions, config: Qwen3Config) -> list[dict]:
    """This rank's micro-batches of random tokens, sequences of seq_len, as training sees them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (o.micro_batch, o.seq_len + 1), generator=generator).to(device.current())
    batch = {
        "tokens": tokens[:, :-1].flatten(), "labels": tokens[:, 1:].flatten(), "rows": o.micro_batch,
        "positions": torch.arange(o.seq_len, device=tokens.device).repeat(o.micro_batch),
        "cu_seqlens": list(range(0, o.micro_batch * o.seq_len + 1, o.seq_len)),
    }  # fmt: skip
    return weighted([batch] * o.micro_batches, o.dp)


# Adapted from zoo.wan21.perf.ours: this model's step, which is given its micro-batches
def ours(o: PerfOptions, config: Qwen3Config) -> Callable[[list[dict]], list[dict]]:
    """One training step of this recipe: everything `common.train` does between preparing a batch and logging. Returns
    what the schedule does: this rank's losses, still on the device."""
    chunks = build(o, config)
    checkpoint.initialize(chunks, o.seed, functools.partial(draw, config))
    wrapped = parallel.wrap(chunks, o, Qwen3Block)
    optimizer = loop.build_optimizer(o, wrapped)
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    run_schedule = get_forward_backward_func()

    def step(batches: list[dict]) -> list[dict]:
        for chunk in wrapped:
            if hasattr(chunk, "zero_grad_buffer"):
                chunk.zero_grad_buffer()
        optimizer.zero_grad()
        results = run_schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in wrapped] if len(wrapped) > 1 else iter(batches),
            model=wrapped if len(wrapped) > 1 else wrapped[0],
            num_microbatches=len(batches),
            seq_length=o.seq_len,
            micro_batch_size=o.micro_batch,
        )
        optimizer.prepare_grads()
        loop.clip_gradients(optimizer, CLIP, optimizer.get_grad_norm())
        optimizer.step_with_ready_grads()
        return results

    return step


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


# Adapted from zoo.wan21.perf.peer: transformers' model and its own loss
def peer(o: PerfOptions, config: Qwen3Config, compiled: bool) -> Callable[[], torch.Tensor]:
    """The same step by transformers and torch on one device, from our weights; returns the loss, still on the device.
    bf16: fp32 weights under autocast, as its trainers do."""
    model = their_model(o, config, torch.float32).train()
    if o.recompute == "full":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, (o.beta1, o.beta2), weight_decay=o.weight_decay, fused=True)
    batch, where = batch_of(dataclasses.replace(o, global_batch=o.micro_batch * o.dp), config)[0], device.current().type
    tokens, labels = (batch[key].unflatten(0, (o.micro_batch, -1)) for key in ("tokens", "labels"))  # [B, L]
    forward = torch.compile(model) if compiled else model

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), device=tokens.device)
        for _ in range(o.micro_batches):
            with torch.autocast(where, torch.bfloat16, enabled=o.precision == "bf16"):
                out = forward(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False)
            loss = out.loss / o.micro_batches
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return total

    return step


def ours_alone(o: PerfOptions, config: Qwen3Config) -> Callable[[], torch.Tensor]:
    """Our step in a process that is no rank of this job."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(device.BACKEND, init_method=f"file://{folder}/store", rank=0, world_size=1)
        parallel.initialize(o)
    step, batches = ours(o, config), batch_of(o, config)
    return lambda: torch.stack([r["loss"] for r in step(batches)]).sum() / o.micro_batches


# Copied from zoo.wan21.perf.timed
def timed(step: Callable) -> tuple[float, object]:
    """Seconds of one call, the device's queue empty before and after, and what it returned."""
    device.synchronize()
    start = time.perf_counter()
    result = step()
    device.synchronize()
    return time.perf_counter() - start, result


# Adapted from zoo.wan21.perf.serve_peer: serves our compiled step too, and says that a contender has no room
def serve(pipe, o: PerfOptions, config: Qwen3Config, mine: bool, compiled: bool) -> None:
    """A process of its own, so that its memory is its own: a step for every request, then its peak memory."""
    before, step = device.memory_gib(), None
    while pipe.recv():
        try:
            if step is None:
                step = ours_alone(dataclasses.replace(o, compile=True), config) if mine else peer(o, config, compiled)
            seconds, loss = timed(step)
        except torch.OutOfMemoryError as error:
            pipe.send(f"does not fit: {error}".splitlines()[0])
            return
        except Exception as error:  # torch.compile fails at its first call, in as many ways as there are machines
            if not compiled:
                raise
            pipe.send(f"torch.compile does not work here: {type(error).__name__}: {error}".splitlines()[0])
            return
        pipe.send((seconds, float(loss)))
    pipe.send(device.memory_gib() - before)


# Adapted from zoo.wan21.perf.Peer: ours under torch.compile is one of them
class Contender:
    """A contender in a process of its own, asked for one step at a time."""

    def __init__(self, o: PerfOptions, config: Qwen3Config, mine: bool, compiled: bool):
        self.mine, self.compiled = mine, compiled
        self.name = (OURS if mine else f"transformers {transformers.__version__}") + f" + {COMPILED}" * compiled
        self.seconds, self.losses, self.memory, self.failure = [], [], None, None
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, o, config, mine, compiled), daemon=True)
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
    mine, batches = ours(o, config), batch_of(o, config)
    main, others = dist.get_rank() == 0, [(False, False)]
    if o.compiled:  # of several ranks: --compile, a run of its own
        others = [(True, True)] * (o.world == 1 and not o.compile) + [*others, (False, True)]
    contenders = [Contender(o, config, *which) for which in others] if main else []
    seconds, losses = [], []
    for _ in range(perf.WARMUP + o.repeats):
        dist.barrier()
        taken, results = timed(functools.partial(mine, batches))
        seconds.append(taken)
        losses.append(loop.global_loss(o, results, False)[0])
        for contender in contenders:
            contender.step()
        dist.barrier()  # nobody computes while another does
    memory = device.memory_gib() - before
    for contender in contenders:
        contender.finish()
    return step_rows(o, config, seconds, losses, memory, contenders) if main else []


# Adapted from zoo.wan21.perf.step_rows: tokens per second; plain against plain and compiled against compiled
def step_rows(
    o: PerfOptions, config: Qwen3Config, seconds: list, losses: list, memory: float, contenders: list
) -> list[dict]:
    """The record's rows of one `step` benchmark; what must not be recorded says so in `refused`."""
    task, unit = "pretrain step", "tokens/s"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    peak = perf.peak_tflops(device.name(), o.precision)

    def measured(seconds: list, memory: float, samples: float, devices: int, raw: dict) -> dict:
        taken = perf.spread(seconds[perf.WARMUP :])
        tflops = 3 * config.flops(o.seq_len) * samples / taken["median"] / devices / 1e12
        raw = {"step s": rounded(taken), "TFLOP/s/device": float(f"{tflops:.4g}"), "memory GiB": round(memory, 3)} | raw
        value = round(samples * o.seq_len / taken["median"], 1)
        mfu = round(tflops / peak, 4) if peak else None
        return {"task": task, "unit": unit, "value": value, "mfu": mfu, "raw": raw | versions}

    mine = measured(seconds, memory, o.global_batch, o.world, {"first loss": losses[0]})
    rows, alike = [mine], {o.compile: (seconds, memory, o.world)}
    for contender in contenders:
        who = {"task": task, "unit": unit, "system": contender.name}
        who |= {} if contender.mine else {"devices": 1, "layout": None}
        ratio = {
            "task": f"{task}, ratio to transformers" + f" + {COMPILED}" * contender.compiled,
            "unit": "x per device",
        }
        if contender.failure:
            rows.append(who | {"refused": contender.failure})
            continue
        apart = abs(contender.losses[0] - losses[0]) / abs(losses[0])
        if not apart <= LOSS_BOUND[o.precision]:
            why = (
                f"its first loss is {contender.losses[0]:.8g}, ours {losses[0]:.8g}: {apart:.1e} apart, expected at most "
                f"{LOSS_BOUND[o.precision]:.0e} in {o.precision}; these are not the same step"
            )
            rows += [who | {"refused": why}, ratio | {"system": OURS, "refused": why}]
            if not contender.compiled:
                mine["refused"] = why.replace("its first loss", f"the first loss of {contender.name}")
            continue
        raw = {"first step s": float(f"{contender.seconds[0]:.4g}"), "loss apart": float(f"{apart:.1e}")}
        rows.append(measured(contender.seconds, contender.memory, o.global_batch / o.dp, 1, raw) | who)
        if contender.mine:
            alike[True] = (contender.seconds, contender.memory, 1)
            continue
        compiled = contender.compiled if contender.compiled in alike else o.compile
        ours_seconds, ours_memory, devices = alike[compiled]
        pairs = zip(contender.seconds[perf.WARMUP :], ours_seconds[perf.WARMUP :], strict=True)
        value = round(statistics.median(theirs / s for theirs, s in pairs) * o.dp / devices, 3)  # turn by turn
        raw = {"memory ratio": round(ours_memory / contender.memory, 3)}
        rows.append(ratio | {"system": OURS + f" + {COMPILED}" * compiled, "value": value, "raw": raw})
    return rows


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
    ratio = statistics.median(a / b for a, b in zip(rates["sft"], rates["pretrain"], strict=True))
    raw = {f"{job} tokens/s": rounded(perf.spread(few)) for job, few in rates.items()}
    raw["tokens that are no padding"] = round(filled["sft"], 4)
    return [
        {"task": "sft step on packed rows", "value": round(ratio, 3), "unit": "x pretraining's tokens/s", "raw": raw}
    ]


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
        ratio = statistics.median(a / b for a, b in zip(rates, theirs_rates, strict=True))
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
            shape | {"task": f"{task}, ratio to transformers", "unit": "x", "value": round(ratio, 3), "raw": {}},
        ]
    return rows


# -------------------------------------------------------------------------------------------------------- preprocess


def tokenize(o: PerfOptions) -> list[dict]:
    """The demo's text, several times over."""
    from .demo import make_data

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
    ratio = statistics.median(a / b for a, b in zip(rates, alone, strict=True))
    raw = {"MB/s": rounded(perf.spread(rates)), "tokenizer alone MB/s": rounded(perf.spread(alone)), "workers": workers}
    return [{"task": "preprocess", "size": "demo tokenizer", "layout": None, "precision": "-", "shape": None, "devices": 1,
             "value": round(ratio, 3), "unit": "x the tokenizer's rate", "raw": raw}]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- load


# Copied from zoo.wan21.perf.PeakMemory
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


# Copied from zoo.wan21.perf.forget
def forget(files: list[Path]) -> None:
    """Make the kernel drop the files' pages, so that the next read is from disk."""
    for file in files:
        with open(file, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# Adapted from zoo.wan21.perf.load: of --size, the smallest published one for the tiny ones; and written again
def load(o: PerfOptions) -> list[dict]:
    """One rank reads everything: the layout with the most to read."""
    size = "0.6B" if o.size.startswith("tiny") else o.size
    config = dataclasses.replace(SIZES[size], num_hidden_layers=o.layers or SIZES[size].num_hidden_layers)
    single = dataclasses.replace(
        o, precision="bf16", tp=1, sp=False, pp=1, vpp=1, stages="", cp=1, ep=1, etp=1, fsdp=False
    )
    chunks = build(single, config, torch.device("cpu"))
    largest = max(p.numel() * p.element_size() for p in chunks[0].parameters())
    shapes = convert.shapes(config)
    element = dict.fromkeys(shapes, 2)
    with tempfile.TemporaryDirectory(dir=o.out.parent if o.out.parent.is_dir() else None) as folder:
        target, again = Path(folder) / "released", Path(folder) / "again"
        convert.write_released(
            target, config, element, lambda name: torch.full(shapes[name], 0.5, dtype=torch.bfloat16), None
        )
        files = sorted(target.glob("*.safetensors"))
        total = sum(f.stat().st_size for f in files)
        for p in chunks[0].parameters():
            p.data.zero_()  # its pages exist before the clock starts

        def loading() -> None:
            convert.load(chunks, convert.released_entries(target, config), config)

        def converting() -> None:
            convert.write_released(again, config, element, convert.source(target, config)[1], None)

        def reading() -> None:
            buffer = bytearray(2**24)
            for file in files:
                with open(file, "rb", buffering=0) as f:
                    while f.readinto(buffer):
                        pass

        def copying() -> None:
            again.mkdir()
            for file in files:
                with open(file, "rb", buffering=0) as f, open(again / file.name, "wb", buffering=0) as copy:
                    shutil.copyfileobj(f, copy, 2**24)

        works = (reading, loading, copying, converting)
        rates, extras = ({work.__name__: [] for work in works} for _ in range(2))
        for _ in range(5):  # turn by turn: a disk's rate wanders
            for work in works:
                forget(files)
                before, start = PeakMemory.now(), time.perf_counter()
                with PeakMemory() as memory:
                    work()
                rates[work.__name__].append(total / (time.perf_counter() - start) / 1e9)
                extras[work.__name__].append(max(0, memory.peak - before) / largest)
                shutil.rmtree(again, ignore_errors=True)
    rows, same = [], {"size": size, "layout": None, "precision": "bf16", "shape": None, "devices": 1}
    for mine, theirs in (("loading", "reading"), ("converting", "copying")):
        ratio = statistics.median(a / b for a, b in zip(rates[mine], rates[theirs], strict=True))
        raw = {f"{name} GB/s": rounded(perf.spread(rates[name])) for name in (mine, theirs)}
        task = f"released weights, {mine}"
        rows += [
            same | {"task": task, "value": round(ratio, 3), "unit": f"x {theirs} the files", "raw": raw},
            same | {"task": f"{task}, memory", "value": round(max(extras[mine]), 3), "unit": "x largest tensor",
                    "raw": {"largest tensor MiB": round(largest / 2**20, 1)}},
        ]  # fmt: skip
    return rows
