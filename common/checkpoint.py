"""Checkpoints through megatron-core dist_checkpointing: layout-independent, atomic, verified before they are read.

    checkpoints/step-000100/   model and optimizer shards, state.json, manifest.json
    checkpoints/latest         the name of the newest complete checkpoint

A checkpoint is written into `.partial-…`, its files are listed with their sizes in manifest.json, and only then it is
renamed. So what a kill, a full disk or a lost file leaves behind is never taken for a checkpoint: `find` says what is
wrong with it and falls back to the one before. Tensors are stored under their global names (`blocks.7.ffn.0.weight`,
`optimizer.state.exp_avg.…`), so any layout, FSDP2 included, reads what any other layout wrote.
"""

import functools
import json
import math
import os
import queue
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException  # not an Exception
from torch.distributed.tensor import DTensor

from common import parallel, weights
from common.optimizer import PackedAdamW
from common.resume import checkpoints

FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,  # experts have their own optimizer in a chain; keys name only the parameters
}
READ_AHEAD = 8  # how many tensors before its copy a tensor is requested from the disk


def parameters(chunks: list[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield (global name, parameter) of this rank's model chunks, then their `buffers`. Names have no prefixes of
    wrappers. Waits first for parameters that are still being gathered."""
    parallel.finish_gathers(chunks)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield name.removeprefix("module."), parameter
    yield from buffers(chunks)


def buffers(chunks: list[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (global name, tensor) of the persistent buffers: weights of the release that no gradient moves, such as the
    biases of routers. Every tensor-parallel rank holds them whole."""
    for name, module in ((n, m) for chunk in chunks for n, m in chunk.named_modules()):
        for key, tensor in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                yield f"{name}.{key}".removeprefix("module."), tensor


def trained(chunks: list[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield those of `parameters` that train. Frozen parameters are not stored: resume takes them from --weights, or
    draws them again, as the start did."""
    return ((name, parameter) for name, parameter in parameters(chunks) if parameter.requires_grad)


def cuts(parameter: torch.nn.Parameter) -> list[tuple[int, int, int]]:
    """List the cuts of a parameter by tensor and expert parallelism: (dimension, this rank's part, number of parts)."""
    splits, is_expert = [], not getattr(parameter, "allreduce", True)  # see parallel.mark_expert
    if is_expert:
        splits.append((0, mpu.get_expert_model_parallel_rank(), mpu.get_expert_model_parallel_world_size()))
    if getattr(parameter, "tensor_model_parallel", False):
        rank, size = mpu.get_tensor_model_parallel_rank, mpu.get_tensor_model_parallel_world_size
        if is_expert:
            rank, size = mpu.get_expert_tensor_parallel_rank, mpu.get_expert_tensor_parallel_world_size
        splits.append((parameter.partition_dim, rank(), size()))
    return [cut for cut in splits if cut[2] > 1]


def sharded(name: str, owner: torch.nn.Parameter, data: torch.Tensor) -> ShardedTensor:
    """Wrap `data`, which is laid out like the parameter `owner`, for dist_checkpointing."""
    if isinstance(owner, DTensor):  # FSDP2: rows of dimension 0, unevenly cut
        local = data.to_local()
        rank, size = owner.device_mesh.get_local_rank(), owner.device_mesh.size()
        rows = -(-owner.shape[0] // size)
        offset = (min(rank * rows, owner.shape[0]), *(0 for _ in owner.shape[1:]))
        # The shards of the ranks do not overlap, so the replica id is always 0. Callers leave out empty shards.
        return ShardedTensor(name, local, local.dtype, tuple(local.shape), tuple(owner.shape), offset, None, 0)
    copy = int(getattr(owner, "shared", False))  # 1: a copy of the first pipeline stage's, see parallel.mark_tied
    split = getattr(owner, "tensor_model_parallel", False)
    if not getattr(owner, "allreduce", True):
        tp = 0 if split else mpu.get_expert_tensor_parallel_rank()
        replica = (copy, tp, mpu.get_expert_data_parallel_rank())
    else:
        tp = 0 if split else mpu.get_tensor_model_parallel_rank()
        replica = (copy, tp, mpu.get_data_parallel_rank(with_context_parallel=True))
    return ShardedTensor.from_rank_offsets(name, data, *cuts(owner), replica_id=replica)


def _model_state(chunks, ema: dict[str, torch.Tensor] | None) -> dict:
    owners = dict(trained(chunks)) | dict(buffers(chunks))
    state = {name: sharded(name, p, p.data if isinstance(p, DTensor) else p) for name, p in owners.items()}
    state = {name: s for name, s in state.items() if s.data.numel()}
    if ema is not None:
        extra = {f"ema.{name}": sharded(f"ema.{name}", owners[name], value) for name, value in ema.items()}
        state |= {name: s for name, s in extra.items() if s.data.numel()}
    return state


def _allocate_moments(optimizer) -> None:
    """Create zero moments for parameters that have none, so that there are tensors to load into. torch's AdamW itself
    creates them only in its first step."""
    for inner in (each.optimizer for each in optimizer.chained_optimizers):
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter] and isinstance(inner, PackedAdamW):
                inner.state[parameter] = inner.new_state(parameter)
            elif not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _set_steps(optimizer, steps: int) -> None:
    for each in optimizer.chained_optimizers:
        for parameter, values in each.optimizer.state.items():
            values["step"] = torch.tensor(float(steps), device=parameter.device)


def _optimizer_state(optimizer, model: dict, is_loading: bool = False) -> dict:
    """Return moments and master weights of the distributed optimizers (of dense parameters, of experts) by their index
    in the chain."""
    # megatron-core 0.16 joins the buckets without the padding at their ends, but cuts out the parameters at offsets
    # that include it: each parameter after a padded bucket would be saved shifted. So the padding is declared content.
    for buffer in (buffer for inner in optimizer.chained_optimizers for buffer in inner.buffers):
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
    shards = {name: s for name, s in model.items() if not name.startswith("ema.")}
    chain = enumerate(optimizer.chained_optimizers)
    return {i: each.sharded_state_dict(shards, is_loading, metadata=FORMAT) for i, each in chain}


def _fsdp_optimizer_state(chunks, optimizer) -> dict:
    """Return moments and master weights of a torch optimizer over DTensors, under the distributed optimizer's keys."""
    inner = optimizer.chained_optimizers[0].optimizer
    state = {}
    for name, parameter in trained(chunks):
        master = getattr(parameter, "main_param", parameter)
        for kind, value in (*inner.state[master].items(), ("param", master.data)):
            if kind != "step" and value.to_local().numel():
                state[f"{kind}.{name}"] = sharded(f"optimizer.state.{kind}.{name}", parameter, value)
    return state


def save(
    folder: Path,
    step: int,
    chunks,
    optimizer,
    state: dict,
    *,
    extra_files: Iterable[Path] = (),
    ema=None,
    keep: int = 2,
    fsdp: bool = False,
) -> Path:
    """Write checkpoint `step` under `folder`.

    state: small JSON (step, model config, what the run began with). extra_files: small files, for
    example a tokenizer's, that are copied into the checkpoint if they exist.

    Raises:
        OSError: some rank could not write its part; earlier checkpoints are untouched.
    """
    model = _model_state(chunks, ema)
    shards = {"model": model}
    if optimizer is not None:
        _allocate_moments(optimizer)
    if optimizer is not None and fsdp:
        shards["optimizer"] = _fsdp_optimizer_state(chunks, optimizer)
    elif optimizer is not None:
        shards["optimizer"] = _optimizer_state(optimizer, model)
    target = folder / f"step-{step:06d}"
    _write(target, shards, state, extra_files)
    if dist.get_rank() == 0:
        # A run that starts anew in a used folder numbers its checkpoints below the old ones: keep the one just written.
        others = [path for path in checkpoints(folder) if path != target]
        for old in others[keep - 1 :]:
            shutil.rmtree(old, ignore_errors=True)  # a part that stays is a torn checkpoint; the next save removes it
        try:
            _write_atomically(folder / "latest", target.name)
        except OSError as error:  # only a warning: the checkpoint itself is complete
            print(f"warning: {folder / 'latest'} still names an older one: {error}", file=sys.stderr, flush=True)
    return target


def _write(target: Path, shards: dict, state: dict, extra_files: Iterable[Path] = ()) -> None:
    """Write to a partial folder, list its files with their sizes, then rename it. If any rank fails, raise OSError on
    every rank."""
    partial = target.with_name(f".partial-{target.name}")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    problem = None
    # The queue for the writers' results. This process reads it itself, so a plain queue is enough. megatron-core's own
    # queue needs a spawned process, which imports the whole program again (seconds) and outlives a killed rank.
    filesystem_async._results_queue = queue.SimpleQueue()
    try:
        dist_checkpointing.save(shards, str(partial), content_metadata=FORMAT)
        if dist.get_rank() == 0:
            (partial / "state.json").write_text(json.dumps(state, indent=2))
            for path in (p for p in extra_files if p.is_file()):
                shutil.copyfile(path, partial / path.name)
            sizes = {p.name: p.stat().st_size for p in partial.iterdir()}
            (partial / "manifest.json").write_text(json.dumps(sizes, indent=2))
            for p in partial.iterdir():
                with open(p, "rb") as f:
                    os.fsync(f.fileno())
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
    except (Exception, CheckpointException) as error:  # every rank must learn of the failure before any goes on
        problem = error
    failed = torch.tensor([problem is not None], dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(failed)
    if failed.item():
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"checkpoint {target} could not be written: {problem or 'another rank failed'}; is the disk full?"
        )


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def problem_with(checkpoint: Path) -> str | None:
    """Return why this folder is not a whole checkpoint, or None."""
    name = "manifest.json"
    try:
        sizes = json.loads((checkpoint / name).read_text())
        for name, size in sizes.items():
            actual = (checkpoint / name).stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes, expected {size}"
    except ValueError:
        return "manifest.json is cut short"
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    return None


def find(folder: Path, resume: str) -> Path | None:
    """Return the checkpoint to continue from: the newest whole one for `auto`, none for `never`, else the named one.

    Raises:
        ValueError: an explicitly named checkpoint is missing or torn, or checkpoints exist and none is whole.
    """
    if resume == "never":
        return None
    if resume != "auto":
        named = Path(resume)
        if (named / "latest").is_file():
            named = named / (named / "latest").read_text()
        problem = problem_with(named)
        if problem:
            raise ValueError(f"--resume {named}: {problem}; expected a checkpoint folder; fix: --resume")
        return named
    candidates = checkpoints(folder)
    for candidate in candidates:
        problem = problem_with(candidate)
        if problem is None:
            return candidate
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"checkpoint {candidate} is torn ({problem}); trying the one before", file=sys.stderr, flush=True)
    if candidates:
        raise ValueError(f"no checkpoint in {folder} is whole; fix: --resume never to start again, or restore one")
    return None


def load_found(
    folder: Path, resume: str, chunks, optimizer, *, ema=None, fsdp: bool = False
) -> tuple[Path | None, dict]:
    """Find the checkpoint to continue from (`find`, on rank 0 for all ranks), load it into this layout and return
    (checkpoint, its state.json). Without a checkpoint, return (None, the state of step 0). If a checkpoint vanishes
    before it is read, all ranks skip it like a torn one.

    Raises:
        ValueError: as `find`; the checkpoint is there but cannot be read; it vanished and there is no other.
    """
    vanished = None
    while candidate := _on_rank_0(find, folder, resume):
        # The ranks agree first, because a rank that fails alone in `load` leaves the others waiting.
        problem = first_problem(_unreadable(candidate))
        if not problem:
            try:
                return candidate, load(candidate, chunks, optimizer, ema=ema, fsdp=fsdp)
            except CheckpointException as error:  # raised on every rank
                problem = " ".join(str(error).split())
        if _on_rank_0(problem_with, candidate) is None:
            raise ValueError(
                f"{candidate} cannot be read: {problem}; expected it whole on every node; fix: --resume, or --out"
            )
        vanished = candidate
    if vanished:
        raise ValueError(
            f"{vanished} vanished while it was read, and no other is in {folder}; fix: --resume never to start again"
        )
    return None, {"step": 0, "optimizer_steps": 0}


def _on_rank_0(function: Callable, *args):
    """Call `function(*args)` on rank 0; return its result, or raise its ValueError, on every rank."""
    outcome = [None, None]  # result, message
    if dist.get_rank() == 0:
        try:
            outcome[0] = function(*args)
        except ValueError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def first_problem(problem: str | None) -> str | None:
    """Return, on every rank, the problem of the first rank that has one, or None."""
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), None)


def _unreadable(checkpoint: Path) -> str | None:
    """Return why this rank cannot read a checkpoint, or None. The files that each rank reads whole must be readable,
    and all files must be there with their sizes."""
    try:
        for name in ("state.json", "metadata.json", "common.pt", ".metadata"):
            (checkpoint / name).read_bytes()
        return problem_with(checkpoint)
    except OSError as error:
        return str(error)


def load(
    checkpoint: Path, chunks, optimizer=None, *, ema=None, fsdp: bool = False, without: Iterable[str] = ()
) -> dict:
    """Read the model, except the parameters `without`, and the optimizer unless it is None, into this layout. Return
    the saved state.json."""
    model = {name: shard for name, shard in _model_state(chunks, ema).items() if name not in without}
    request = {"model": model}
    if optimizer is not None:
        _allocate_moments(optimizer)
        if fsdp:
            request["optimizer"] = _fsdp_optimizer_state(chunks, optimizer)
        else:
            request["optimizer"] = _optimizer_state(optimizer, model, is_loading=True)
    targets = {name: s.data for name, s in model.items()}
    moments = {key: s.data for key, s in request["optimizer"].items()} if optimizer is not None and fsdp else {}
    state = json.loads((checkpoint / "state.json").read_text())
    loaded = dist_checkpointing.load(request, str(checkpoint), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(loaded["model"][name])
        for key, target in moments.items():
            target.copy_(loaded["optimizer"][key])
    if optimizer is not None:
        if not fsdp:
            # Not `load_state_dict`: in megatron-core 0.16 it puts torch AdamW's `step` into a state that may hold only
            # tensors of this format. The other values that it restores (learning rate, decay) follow from the schedule.
            for i, inner in enumerate(optimizer.chained_optimizers):
                for values in inner.optimizer.state.values():
                    del values["step"]
                inner.load_parameter_state_from_fully_reshardable(loaded["optimizer"][i]["param_state"])
            if any(getattr(inner.optimizer, "remainders", False) for inner in optimizer.chained_optimizers):
                for chunk in chunks:  # this rank's part of the bf16 weights has been rounded anew
                    chunk.start_param_sync(force_sync=True)
        _set_steps(optimizer, state["optimizer_steps"])
    return state


def tensor_sizes(checkpoint: Path) -> dict[str, int]:
    """Return the bytes of every tensor in a checkpoint, by key."""
    tensors = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    return {key: math.prod(t.global_shape) * t.dtype.itemsize for key, t in tensors.items()}


@functools.lru_cache(maxsize=1)
def _reader(checkpoint: Path, written: int):
    """Return a reader that reads the checkpoint's metadata once. `written`, the time of its metadata, makes a new
    reader for a checkpoint that has replaced another in the same folder."""
    from torch.distributed.checkpoint import FileSystemReader

    reader = FileSystemReader(checkpoint)
    metadata = reader.read_metadata()
    reader.read_metadata = lambda *args, **kwargs: metadata
    return reader


def read_tensor(checkpoint: Path, key: str) -> torch.Tensor:
    """Return a whole tensor of a checkpoint, in its stored dtype, on CPU. Collective: needs a group of one rank."""
    from torch.distributed.checkpoint import load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = _reader(checkpoint, (checkpoint / ".metadata").stat().st_mtime_ns)
    facts = reader.read_metadata().state_dict_metadata[key]
    assert isinstance(facts, TensorStorageMetadata), key
    tensor = torch.empty(facts.size, dtype=facts.properties.dtype)
    load({key: tensor}, storage_reader=reader, no_dist=True)
    return tensor


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], state: dict, extra_files: Iterable[Path] = ()) -> None:
    """Write a checkpoint of whole tensors, each given by exactly one rank, without an optimizer."""
    _write(
        folder, {"model": {n: ShardedTensor.from_rank_offsets(n, t) for n, t in tensors.items()}}, state, extra_files
    )


def load_released(chunks, entries: dict[str, weights.Entry], rename) -> None:
    """Copy released tensors into this rank's parameters. Each rank reads only its slices.

    entries: the result of `weights.index`, already checked; rename: our parameter name -> released key, or None for a
    parameter that is not filled here.
    """
    reader = weights.Reader()
    named = ((rename(name), parameter) for name, parameter in parameters(chunks))
    targets = [(entries[key], parameter) for key, parameter in named if key is not None]
    with torch.no_grad():
        for i, (entry, parameter) in enumerate(targets):
            for ahead, _ in targets[i + READ_AHEAD : i + READ_AHEAD + 1]:
                reader.prefetch(ahead)
            # At most one cut: only stacks of experts have two, and they are not filled here.
            parameter.copy_(reader.read(entry, *next(iter(cuts(parameter)), (None, 0, 1))))


def initialize(
    chunks, seed: int, draw, chosen: Callable[[str], bool] = bool, drawn_on: torch.device | None = None
) -> None:
    """Fill parameters from scratch, with the same values in every layout. Each parameter (with a `chosen` name) is
    drawn whole, see `drawn`, then sliced. On the host, the default, the values are also the same on every device."""
    with torch.no_grad():
        for name, parameter in ((n, p) for n, p in parameters(chunks) if chosen(n)):
            shape, splits = list(parameter.shape), cuts(parameter)
            for dim, _, parts in splits:
                shape[dim] *= parts
            whole = drawn(name, shape, seed, draw, drawn_on)
            for dim, part, parts in splits:
                whole = whole.chunk(parts, dim)[part]
            parameter.copy_(whole)


def drawn(name: str, shape: Iterable[int], seed: int, draw, drawn_on: torch.device | None = None) -> torch.Tensor:
    """Return the initial values of a whole parameter, fp32 [*shape] on the device `drawn_on` or on the host.
    draw(name, whole tensor, generator) fills them, with a generator of that device, seeded by (seed, name)."""
    whole = torch.empty(tuple(shape), device=drawn_on or torch.device("cpu"))
    draw(name, whole, torch.Generator(whole.device).manual_seed(stable_seed(seed, name)))
    return whole


def stable_seed(*parts) -> int:
    """Return a 63-bit seed made from anything printable, the same in every process and version of Python."""
    import hashlib

    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
