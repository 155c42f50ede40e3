"""Runs the real torch_npu library without an NPU, for contract checks in host memory. Nothing here ran on Ascend, and
times measured here mean nothing.

    environment()   returns what a subprocess needs to import the real library: the wheel from PyPI, unzipped into
                    .cache/ (never installed), over a stub of Ascend's runtime (fake_ascend.c) in host memory
    install()       makes that library's `npu` device compute: PyTorch's CPU kernels and the reference kernels of
                    npu_contract.py replace its kernels, on zero-copy views of the same memory; gloo replaces hccl

Everything above the kernels is the library's own: schemas, argument checks, autograd formulas, device and stream
objects, allocator, `transfer_to_npu`. Known gaps: an op without a CPU kernel raises; random numbers are the CPU's, and
those of the default generator ignore the NPU's RNG state; streams never overlap, so a missing wait is not found.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from npu_contract import KERNELS
from torch.distributed import ProcessGroup, ProcessGroupGloo
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[1]
# The libraries that torch_npu links against; one stub stands for all of them.
LIBRARIES = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "atb")


class Unavailable(RuntimeError):
    """The environment cannot be made here; the message says what is missing."""


# --------------------------------------------------------------------------------------------------------- environment


@functools.cache
def environment(folder: Path = ROOT / ".cache" / "ascend", device: bool = False) -> dict[str, str]:
    """Returns environment variables with which `import torch_npu` works in a subprocess. device=True: its device
    computes.

    Raises:
        Unavailable: there is no wheel for this platform, no network, or no C compiler.
    """
    site = _unzipped_wheel(folder)
    home = _stub_runtime(folder, site)
    paths = [str(site), str(ROOT), str(ROOT / "tests"), *([str(home / "autoload")] if device else [])]
    return {
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "LD_LIBRARY_PATH": os.pathsep.join([str(home / "runtime"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
        "ASCEND_HOME_PATH": str(home),
        "ASCEND_OPP_PATH": str(home),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(device)),  # on a real machine `import torch` loads torch_npu too
        "TASK_QUEUE_ENABLE": "0",  # the queue's release thread polls, and would take a core from the ranks
    }


def _unzipped_wheel(folder: Path) -> Path:
    """Returns the folder of the torch_npu of this torch's version. The wheel is downloaded once."""
    version = importlib.metadata.version("torch").split("+")[0]
    site = folder / f"torch_npu-{version}"
    if not site.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            done = subprocess.run([*pip, f"torch-npu=={version}", "-d", work], capture_output=True, text=True)
            wheels = list(Path(work).glob("*.whl"))
            if not wheels:
                raise Unavailable(f"no torch-npu {version} wheel: {done.stderr.strip() or 'pip downloaded nothing'}")
            with zipfile.ZipFile(wheels[0]) as wheel:
                wheel.extractall(Path(work) / "site")
            os.replace(Path(work) / "site", site)  # atomic: the folder is never there in part
    return site


def _stub_runtime(folder: Path, site: Path) -> Path:
    """Makes a folder laid out like CANN's. Its libraries consist of fake_ascend.c and of weak functions for the symbols
    that torch_npu leaves undefined."""
    source = Path(__file__).with_suffix(".c")
    for tool in ("gcc", "nm"):
        if not shutil.which(tool):
            raise Unavailable(f"no {tool} to make the stub of Ascend's runtime with")
    binaries = [*site.glob("torch_npu/_C.*.so"), *site.glob("torch_npu/lib/*.so")]
    listed = subprocess.run(["nm", "-D", "--undefined-only", *binaries], capture_output=True, text=True, check=True)
    symbols = sorted(set(re.findall(r" U ((?:acl|rt[A-Z]|Msprof|_ZN3atb)\w*)$", listed.stdout, re.M)))
    weak_functions = "".join(f"__attribute__((weak)) int {name}() {{ return 0; }}\n" for name in symbols)
    home = folder / f"stub-{hashlib.sha256(source.read_bytes() + weak_functions.encode()).hexdigest()[:12]}"
    if home.is_dir():
        return home
    with tempfile.TemporaryDirectory(dir=folder) as work:
        stub = Path(work) / "stub"
        for part in ("runtime", "compiler", "autoload/fake_ascend-1.dist-info"):
            (stub / part).mkdir(parents=True)
        weak = Path(work) / "weak.c"
        weak.write_text(weak_functions)
        library = stub / "runtime" / "libascendcl.so"
        subprocess.run(["gcc", "-w", "-O1", "-shared", "-fPIC", "-o", library, source, weak], check=True)
        for name in LIBRARIES[1:]:
            (stub / "runtime" / f"lib{name}.so").symlink_to(library.name)
        # `import torch` calls the entry points of this group, so launchers and workers need no change.
        info = stub / "autoload" / "fake_ascend-1.dist-info"
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-ascend\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[torch.backends]\nfake_ascend = fake_ascend:install\n")
        if not home.is_dir():
            os.replace(stub, home)
    return home


# -------------------------------------------------------------------------------------------------------------- device

# Ops of allocation, metadata and raw bytes. The library does these over the stub itself; they need no kernel.
NATIVE = (
    "empty", "new_empty", "resize_", "as_strided_", "set_", "is_set_to", "record_stream", "is_pinned", "_pin_memory",
    "_copy_from", "_local_scalar_dense", "_lazy_clone",
)  # fmt: skip
HOST_KEYS = (
    "CPU", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd",
)  # fmt: skip
_kept: list = []  # registrations and communicators last as long as these objects
_host_groups: dict = {}


def install() -> None:
    """Gives the `npu` device kernels. `import torch` itself calls this, once per process (see `environment`)."""
    import torch_npu  # noqa: F401

    if _kept:
        return
    aten, npu, c10d = (torch.library.Library(name, "IMPL") for name in ("aten", "npu", "c10d"))
    _kept.extend((aten, npu, c10d))

    def override(library, name, kernel, key="PrivateUse1"):
        library.impl(name, kernel, key, allow_override=True)

    registered = torch._C._dispatch_get_registrations_for_dispatch_key
    on_host = {name for key in HOST_KEYS for name in registered(key)}
    for qualified in registered("PrivateUse1"):
        namespace, name = qualified.split("::")
        if namespace == "aten" and qualified in on_host and not name.startswith(NATIVE) and not _is_view(op(qualified)):
            override(aten, name, _on_host(op(qualified)))
        elif namespace == "c10d":
            override(c10d, name, _collective(op(qualified)))
    for name, kernel in KERNELS.items():
        override(npu, name, _on_host(op(f"npu::{name}"), kernel))
    override(aten, "copy_", _copy)
    override(aten, "_to_copy", _to_copy)
    for name, kernel in LIBRARY_OWN.items():
        override(npu, name, _on_host(op(f"npu::{name}"), kernel))
    for name in ("npu_dtype_cast", "_npu_dtype_cast"):  # the library's own kernels and autograd cast with these
        override(npu, name, _on_host(op(f"npu::{name}"), _cast))
        override(npu, f"{name}_backward", _on_host(op(f"npu::{name}_backward"), _cast))
    override(aten, "matmul_backward", _on_host(op("aten::matmul_backward"), _matmul_backward))
    for key in ("PrivateUse1", "AutogradPrivateUse1"):  # the library's own versions bypass the dispatcher
        override(aten, "scaled_dot_product_attention", _attention, key)
        override(aten, "one_hot", _on_host(op("aten::one_hot")), key)

    torch.distributed.Backend.register_backend("hccl", _communicator, extended_api=True, devices=["npu"])


def op(full: str):
    """'aten::add.Tensor' -> torch.ops.aten.add.Tensor"""
    namespace, name, overload = re.fullmatch(r"(\w+)::(\w+)\.?(\w*)", full).groups()
    return getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")


def _is_view(op) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)


def host(x):
    """Returns a CPU tensor over the memory of an npu tensor, which it keeps alive. Returns anything else unchanged."""
    if not isinstance(x, torch.Tensor) or x.device.type != "npu":
        return x
    storage = x.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    memory.owner = storage
    flat = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(flat, x.storage_offset(), x.shape, x.stride())


def on_device(x):
    """Returns a copy of a CPU tensor in npu memory, with the same strides. Returns anything else unchanged."""
    if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
        return x
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="npu")
    host(copy).copy_(x)
    return copy


def _on_host(op, kernel=None):
    """Returns a kernel for npu tensors: `kernel` (default: the op itself on the CPU) runs over their host views."""
    names = [a.name for a in op._schema.arguments]
    written = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]

    def argument(x):
        if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.dim() > 0:
            raise RuntimeError(f"{op}: expected all tensors on npu, found one of shape {tuple(x.shape)} on cpu")
        if isinstance(x, torch.Generator):
            return _host_generator(x)
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return host(x)

    def call(*args, **kwargs):
        host_kw = tree_map(argument, kwargs)
        if "pin_memory" in host_kw:
            host_kw["pin_memory"] = False
        host_args = tree_map(argument, args)
        # The dispatcher may pass an argument by position that a reference kernel takes by name.
        result = kernel(**dict(zip(names, host_args, strict=False)), **host_kw) if kernel else op(*host_args, **host_kw)
        if not written:
            return tree_map(on_device, result)
        npu_values, host_values = (
            dict(zip(names, args, strict=False)) | kwargs,
            dict(zip(names, host_args, strict=False)) | host_kw,
        )
        outputs, output_views = (
            tree_leaves([values[name] for name in written]) for values in (npu_values, host_values)
        )
        for output, view in zip(outputs, output_views, strict=True):
            if view.shape != output.shape:  # the CPU kernel has resized an `out` argument
                output.resize_(view.shape)
                host(output).copy_(view)
        returns = len(op._schema.returns)
        return None if returns == 0 else outputs[0] if returns == 1 else tuple(outputs)

    return call


def _host_generator(generator):
    """Returns a CPU generator for one draw. The first one after seeding draws what the CPU draws from that seed."""
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # the library requires multiples of 4
    return torch.Generator("cpu").manual_seed(generator.initial_seed() + offset * 0x9E3779B9)


def _copy(to, source, non_blocking=False):
    host(to).copy_(host(source))
    return to


def _to_copy(x, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    copy = host(x).to(dtype=dtype or x.dtype, copy=True, memory_format=memory_format or torch.preserve_format)
    return copy if device is not None and device.type == "cpu" else on_device(copy)


def _unpermute(permuted_tokens, sorted_indices, **options):
    """Returns the tokens, and the permuted tokens for the backward."""
    return KERNELS["npu_moe_token_unpermute"](permuted_tokens, sorted_indices, **options), permuted_tokens


def _unpermute_grad(
    grad_unpermuted_tokens, sorted_indices, permuted_tokens_size_0, permuted_tokens=None, probs=None, **_
):
    if permuted_tokens is None:  # only the gradient of probs depends on their values
        permuted_tokens = grad_unpermuted_tokens.new_zeros(permuted_tokens_size_0, grad_unpermuted_tokens.shape[1])
    return KERNELS["npu_moe_token_unpermute_grad"](permuted_tokens, grad_unpermuted_tokens, sorted_indices, probs)


def _permute_grad(grad_permuted_tokens, sorted_indices, tokens_size_0, num_topK, **_):
    tokens = grad_permuted_tokens.new_empty(0)  # for its dtype
    indices = sorted_indices.new_empty(tokens_size_0, num_topK)  # for its shape
    return KERNELS["npu_moe_token_permute_grad"](tokens, grad_permuted_tokens, indices, sorted_indices)


# The ops that the library's autograd calls in place of the published ones.
LIBRARY_OWN = {
    "_npu_moe_token_unpermute": _unpermute,
    "npu_moe_token_unpermute_grad_v2": _unpermute_grad,
    "npu_moe_token_permute_grad_v2": _permute_grad,
}


def _cast(dtype, input=None, grad=None, **_):
    """Casts `input` (in the backward: `grad`). `dtype` is a dtype's number, which the dispatcher takes."""
    return torch.ops.aten._to_copy(grad if input is None else input, dtype=dtype)


def _matmul_backward(grad, self, other, mask):
    """Replaces torch_npu's own backward of matmul. One-dimensional operands are not needed here and not supported."""
    if self.dim() < 2 or other.dim() < 2:
        raise NotImplementedError("matmul_backward of a vector")
    first = (grad @ other.transpose(-1, -2)).sum_to_size(self.shape) if mask[0] else None
    second = (self.transpose(-1, -2) @ grad).sum_to_size(other.shape) if mask[1] else None
    return first, second


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    return torch.ops.aten._scaled_dot_product_attention_math(
        q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


class Communicator(ProcessGroupGloo):
    """Stands for an HCCL communicator where torch_npu calls it directly. `_collective` handles the other calls."""

    def allgather(self, outputs, inputs, *options):
        return super().allgather(tree_map(host, outputs), tree_map(host, inputs), *options)

    def batch_isend_irecv(self, kinds, tensors, ranks):
        works = [
            (self.send if kind == "isend" else self.recv)([host(tensor)], rank, 0)
            for kind, tensor, rank in zip(kinds, tensors, ranks, strict=True)
        ]
        return _All(works)


class _All(list):
    def wait(self):
        return all([work.wait() for work in self])


def _communicator(options, _):
    """Builds the process group that torch.distributed requests for the backend hccl."""
    gloo = Communicator(options.store, options.group_rank, options.group_size, timeout=options.timeout)
    _kept.append(gloo)  # without a reference in Python only its C++ half would live on
    return gloo


def _collective(op):
    """Returns a c10d op for npu tensors. It runs the same op over their host views, in a twin group that has gloo for
    CPU tensors. The group itself has no backend for CPU tensors, so it refuses them as hccl does."""

    def argument(x):
        if not isinstance(x, torch.ScriptObject) or "ProcessGroup" not in str(x._type()):
            return host(x)
        group = ProcessGroup.unbox(x)
        if group not in _host_groups:
            twin = ProcessGroup(group.rank(), group.size())
            gloo = group._get_backend(torch.device("npu"))
            twin._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, gloo)
            _host_groups[group] = twin
        return _host_groups[group].boxed()

    def call(*args, **kwargs):
        result = op(*tree_map(argument, args), **tree_map(argument, kwargs))
        return (args[0], result[1]) if isinstance(result, tuple) else result  # returns the npu outputs, not their views

    return call
