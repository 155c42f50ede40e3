"""Detects the device of this process and adapts torch so that unmodified megatron-core runs there.

Importing this module is the zoo's only import-time side effect. It is idempotent, reads no argv, and must come
before the first `import megatron`:

    npu   torch_npu's own `transfer_to_npu` points torch.cuda at the NPU
    cuda  nothing is changed
    cpu   the handful of `torch.cuda` calls megatron-core makes get CPU stand-ins (`_install_cpu`)

A script that trains megatron-core's own models needs nothing else from the zoo; tests/megatron_gpt.py is an example.

`ZOO_DEVICE=npu|cuda|cpu` overrides detection.
"""

import functools
import inspect
import logging
import os
import resource
import sys
from collections.abc import Callable

# Every loader reads local folders. A model's name must not start a download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch


def _detect() -> str:
    """Return 'npu', 'cuda' or 'cpu': `ZOO_DEVICE` if it is set, else what the machine has."""
    chosen = os.environ.get("ZOO_DEVICE", "")
    if chosen not in ("", "npu", "cuda", "cpu"):
        raise ValueError(f"ZOO_DEVICE={chosen!r}; expected npu, cuda or cpu; fix: export ZOO_DEVICE=cpu")
    if chosen:
        return chosen
    if os.path.exists("/dev/davinci_manager"):
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"


KIND = _detect()
BACKEND = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}[KIND]


def current() -> torch.device:
    """The device this rank computes on."""
    return torch.device("cpu") if KIND == "cpu" else torch.device(KIND, int(os.environ.get("LOCAL_RANK", 0)))


def name() -> str:
    """Return the human-readable hardware name, for the performance record."""
    if KIND == "cpu":
        with open("/proc/cpuinfo") as f:
            model = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), "unknown CPU")
        return f"{model}, {os.cpu_count()} cores"
    return getattr(torch, KIND).get_device_name()


def synchronize() -> None:
    if KIND != "cpu":
        getattr(torch, KIND).synchronize()


def memory_gib() -> float:
    """Return the peak memory so far in GiB: allocated on the device, or on cpu the resident set of the process."""
    if KIND == "cpu":
        if sys.platform == "linux":  # getrusage's peak includes the memory of the process that started this one
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS: bytes
    return getattr(torch, KIND).max_memory_allocated() / 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out: the device's, or on cpu what torch's allocator asked for."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(w in str(error) for w in words)


class _Stream:
    """Stands in for a CUDA stream or event. On cpu everything runs in order, so its methods do nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False

    def wait_stream(self, *args):
        pass

    wait_event = record_event = record = wait = synchronize = wait_stream


def _name_types_cuda(prefix: str) -> None:
    """Make `x.type()` return torch.cuda.FloatTensor where this device returns `prefix` + FloatTensor, and so for every
    type: megatron's optimizers compare it with "torch.cuda.BFloat16Tensor" and other names."""
    original = torch.Tensor.type

    def type_name(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return result.replace(prefix, "torch.cuda.") if isinstance(result, str) else result

    torch.Tensor.type = type_name


def _install_npu() -> None:
    # Without it torch.cuda.get_device_capability() is None, and torch.distributed.broadcast compares its first number.
    os.environ.setdefault("TORCH_NPU_DEVICE_CAPABILITY", "8.0")
    import torch_npu
    from torch_npu.contrib import transfer_to_npu  # noqa: F401

    # Ascend's private formats reorder a tensor's memory; the flat buffers of megatron's optimizer need it in order.
    torch_npu.npu.config.allow_internal_format = False
    _name_types_cuda("torch.npu.")


def _install_cpu() -> None:
    """Replace what megatron-core 0.16 calls in torch.cuda by CPU stand-ins. Their values are a one-device machine's."""
    from torch.utils._device import _device_constructors

    cpu, cuda = torch.device("cpu"), torch.cuda

    def always(value):  # a new function for each name, because torch.compile's tables refuse one object under two names
        return lambda *args, **kwargs: value

    cuda.current_device, cuda.device_count = always(cpu), always(1)
    cuda.set_device, cuda.synchronize, cuda.empty_cache = always(None), always(None), always(None)
    cuda.is_current_stream_capturing = always(False)
    cuda.Stream = cuda.Event = cuda.stream = _Stream
    cuda.current_stream, cuda.default_stream = always(_Stream()), always(_Stream())
    # torch.cuda's generator is the CPU's. megatron sets its state through `_lazy_call`. It warns when numbers drawn on
    # the device change the CPU's generator, as they do here; that warning is silenced below.
    cuda.default_generators = {cpu: torch.default_generator}
    cuda._lazy_call = lambda call, **kwargs: call()
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        for seed in ("manual_seed", "manual_seed_all"):  # torch.manual_seed calls the second one with its own seed
            setattr(module, seed, lambda seed: torch.default_generator.manual_seed(int(seed)))
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)

    def to_cpu(device):
        return cpu if device is not None and "cuda" in str(device) else device

    def redirect(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if "device" in kwargs:
                kwargs["device"] = to_cpu(kwargs["device"])
            return function(*args, **kwargs)

        return call

    # `with torch.device(...)` looks up the factories once and caches them. This call caches the real ones before they
    # are replaced: each replacement calls the real one, which must be recognised.
    _device_constructors()
    for factory in ("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "randint", "as_tensor"):
        setattr(torch, factory, redirect(getattr(torch, factory)))

    move = torch.Tensor.to

    def to(self, *args, **kwargs):
        args = tuple(to_cpu(a) if isinstance(a, (str, torch.device)) else a for a in args)
        if "device" in kwargs:
            kwargs["device"] = to_cpu(kwargs["device"])
        return move(self, *args, **kwargs)

    torch.Tensor.to = to
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    _name_types_cuda("torch.")

    # gloo takes the place of nccl, as hccl does in transfer_to_npu.
    join = torch.distributed.init_process_group

    @functools.wraps(join)
    def init_process_group(backend=None, *args, **kwargs):
        return join("gloo" if backend == "nccl" else backend, *args, **kwargs)

    torch.distributed.init_process_group = init_process_group

    # megatron's FSDP2 wrapper builds its mesh for "cuda".
    from torch.distributed import DeviceMesh

    from_group = DeviceMesh.from_group
    DeviceMesh.from_group = staticmethod(
        lambda group, device_type, *args, **kwargs: from_group(group, "cpu", *args, **kwargs)
    )

    # In a group of one rank these are copies, which gloo would make in a thread of its own. That thread keeps the OpenMP
    # threads that a large copy needs, and where a process has more of these than cores, idle ones sleep instead of
    # spinning: after its first checkpoint a step took 1.7 times as long on two cores.
    def alone(collective: Callable, copy: Callable) -> Callable:
        signature = inspect.signature(collective)

        @functools.wraps(collective)
        def run(*args, **options):
            given = signature.bind(*args, **options).arguments
            if torch.distributed.get_world_size(given.get("group")) != 1 or given.get("async_op"):
                return collective(*args, **options)
            copy(*list(given.values())[:2])

        return run

    c10d = torch.distributed.distributed_c10d
    for name, copy in (
        ("gather", lambda tensor, gathered: gathered[0].copy_(tensor)),
        ("scatter", lambda tensor, scattered: tensor.copy_(scattered[0])),
        ("all_gather", lambda gathered, tensor: gathered[0].copy_(tensor)),
    ):
        one = alone(getattr(c10d, name), copy)
        setattr(c10d, name, one)
        setattr(torch.distributed, name, one)

    # megatron-core compiles functions of its own models when it is imported. That loads inductor, in one to two
    # seconds, so here each is compiled at its first call.
    compile_now = torch.compile

    def compile_later(function):
        compiled = functools.cache(lambda: compile_now(function))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later
    import megatron.core  # noqa: F401

    torch.compile = compile_now


if not getattr(torch.cuda, "_zoo_adapter", False):
    if KIND == "npu":
        _install_npu()
    elif KIND == "cpu":
        _install_cpu()
    torch.cuda._zoo_adapter = True
