"""--fused-comm: matmuls fused with their collectives compute what matmul and collective one after the other do. The
kernels are stand-ins on CPU ranks with the signatures of torch_npu and of torch. Nothing here ran on a device."""

import npu_contract
import pytest
import test_qwen3_layouts as qwen
import test_wan21_layouts as wan
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_wan21_lora import adapt

from common import ops, parallel
from common.ops import fused_comm

BF16 = torch.bfloat16
ROWS, BATCH, IN, OUT = 6, 2, 512, 520  # tokens of one rank, samples, inputs and outputs of the whole linear
_kept: list = []  # a registration lasts as long as its library


def torch_kernels() -> None:
    """Registers torch's own fallbacks of its fused ops for CPU tensors. They call matmul and collective in turn."""
    import torch.distributed._symmetric_memory as symmetric

    _kept.append(torch.library.Library("symm_mem", "IMPL"))
    _kept[-1].impl("fused_all_gather_matmul", symmetric._fused_all_gather_matmul_fallback, "CPU")
    _kept[-1].impl("fused_matmul_reduce_scatter", symmetric._fused_matmul_reduce_scatter_fallback, "CPU")


def use(backend: str) -> None:
    """Lets this process run the fused ops of a backend, which is not that of its tensors."""
    npu_contract.install()
    fused_comm._communicator = npu_contract.communicator
    ops.BACKEND = backend
    if backend == "cuda":
        torch_kernels()


# ------------------------------------------------------------------------------------------------- ops, on two ranks


def drawn(*shape: int, dtype=torch.float64) -> torch.Tensor:
    """Draws bf16 values, the same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(BF16).to(dtype)


def differences(backend: str, scatter: bool, accumulate: bool) -> dict[str, float]:
    """Returns the largest difference of every result and gradient from the whole fp64 computation, of its largest
    entry. Each rank holds its part: rows of tokens (with scatter), columns of x and weight (linear_reduce), rows of
    weight and bias (gather_linear)."""
    use(backend)
    ops.ACCUMULATE = accumulate
    dist.init_process_group("gloo")
    group, rank, n = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    found = {}

    def mine(whole: torch.Tensor, dim: int | None) -> torch.Tensor:
        part = whole if dim is None else whole.chunk(n, dim)[rank]
        return part.detach().to(BF16).contiguous().requires_grad_(whole.requires_grad)

    def look(name: str, got: torch.Tensor, whole: torch.Tensor, dim: int | None) -> None:
        want = whole if dim is None else whole.chunk(n, dim)[rank]
        assert got.shape == want.shape, name
        found[name] = ((got.double() - want).abs().max() / want.abs().max()).item()

    def weight_of(whole: torch.Tensor, dim: int) -> torch.nn.Parameter:
        weight = torch.nn.Parameter(mine(whole.detach(), dim))
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape), False
        return weight

    def gradient(weight: torch.nn.Parameter) -> torch.Tensor:
        assert weight.grad_added_to_main_grad == accumulate
        return weight.main_grad if accumulate else weight.grad

    tokens = 0 if scatter else None  # the dimension over which tokens are split
    x, w = drawn(n * ROWS, BATCH, IN).requires_grad_(), drawn(OUT, IN).requires_grad_()
    y = x @ w.t()
    y.backward(drawn(*y.shape))
    x_mine, w_mine = mine(x, 2), weight_of(w, 1)
    y_mine = fused_comm.linear_reduce(x_mine, w_mine, group, scatter)
    y_mine.backward(mine(drawn(*y.shape), tokens))
    look("reduce: y", y_mine, y, tokens)
    look("reduce: dx", x_mine.grad, x.grad, 2)
    look("reduce: dweight", gradient(w_mine), w.grad, 1)

    for others in (True, False):  # whether another linear reads the gathered x
        name = f"gather, others {others}: "
        x, w, b = (drawn(*shape).requires_grad_() for shape in ((n * ROWS, BATCH, IN), (OUT, IN), (OUT,)))
        y, other = x @ w.t() + b, drawn(OUT, IN)
        z = x @ other.t() * others
        torch.autograd.backward([y, z], [drawn(*y.shape), drawn(*z.shape)])
        x_mine, w_mine, b_mine = mine(x, tokens), weight_of(w, 0), mine(b, 0)
        whole, y_mine = fused_comm.gather_linear(x_mine, w_mine, b_mine, group, scatter)
        roots, directions = [y_mine], [mine(drawn(*y.shape), 2)]
        if others:
            roots.append(whole @ mine(other, 0).t())
            directions.append(mine(drawn(*z.shape), 2))
        torch.autograd.backward(roots, directions)
        look(name + "x", whole, x, None)
        look(name + "y", y_mine, y, 2)
        look(name + "dx", x_mine.grad, x.grad, tokens)
        look(name + "dweight", gradient(w_mine), w.grad, 0)
        look(name + "dbias", b_mine.grad, b.grad, 0)
    return found


@pytest.mark.L3
@pytest.mark.parametrize(
    ("backend", "scatter", "accumulate"),
    [("npu", True, True), ("npu", False, False), ("cuda", True, False)],
)
def test_fused_ops_equal_the_whole_matmul_in_fp64(backend, scatter, accumulate):
    """bf16 with the documented limits of the npu kernels. Sums over ranks are rounded to bf16 once per rank; weight
    gradients added in the matmul are fp32."""
    for found in run_ranks(2, differences, backend, scatter, accumulate):
        assert len(found) == 13
        assert not {name: error for name, error in found.items() if not error <= 1e-2}, found
        exact = [error for name, error in found.items() if name.endswith((": x", "dweight") if accumulate else ": x")]
        assert max(exact) <= 1e-6, found


# --------------------------------------------------------------------------------------------------- whole models, fp32

WAN = {"wan": None, "wan adapters": adapt}  # what changes the model before it is trained
SP = {"tp": 2, "sp": True, "fused_comm": True}
NAMES = ("npu_mm_all_reduce_base", "npu_mm_reduce_scatter_base", "npu_all_gather_base_mm")
# What runs, its layout, and calls of each op of NAMES per layer and micro-batch, forward and backward. A dense Qwen3 block
# has 2 row linears and 2 regions whose input several linears read; experts have neither. A Wan block has 3 of each. In
# 2 of its regions one linear alone reads the input, so its backward is fused, too; an adapter is another reader.
MODELS = {
    "dense recompute selective": ("dense", SP | {"recompute": "selective"}, (0, 2, 2 + 2)),
    "dense without sp": ("dense", SP | {"sp": False}, (2, 0, 0)),
    "moe ep2 recompute full": ("moe", SP | {"etp": 1, "ep": 2, "recompute": "full"}, (0, 1 + 1, 1 + 1 + 1)),
    "wan": ("wan", SP, (0, 3 + 2, 3 + 3)),
    "wan adapters": ("wan adapters", SP, (0, 3, 3 + 3)),
}


def trained(which: str, layout: dict) -> tuple[dict, list[int]]:
    """Trains two steps. Returns what the layout's own test compares, and how often each op of NAMES was called."""
    calls = dict.fromkeys(NAMES, 0)
    npu_contract.FUSED |= {"dtypes": (torch.float32,), "widths": range(1, 65535)}  # for the equations alone
    for name in NAMES:
        kernel = npu_contract.KERNELS[name]
        npu_contract.KERNELS[name] = counted(kernel, name, calls)
    use("npu")
    if which in WAN:
        return wan.run_layout(layout, 2, True, WAN[which]), [*calls.values()]
    return qwen.run_layout(which, layout, True, "npu", 0, 2), [*calls.values()]


def counted(kernel, name: str, calls: dict[str, int]):
    def call(*args, **kwargs):
        calls[name] += 1
        return kernel(*args, **kwargs)

    return call


@pytest.mark.L3
@pytest.mark.parametrize("name", MODELS)
def test_training_with_fused_communication_equals_one_process(name):
    """Losses and gradients of every parameter, to 1e-5 of their largest entry. The calls show that nothing was left to
    the plain path."""
    which, layout, calls_each = MODELS[name]
    got, calls = run_ranks(2, trained, which, layout)[0]
    assert calls == [4 * 4 * 2 * each for each in calls_each]  # layers, micro-batches, steps
    if which in WAN:
        want = run_ranks(1, wan.run_layout, {}, 2, True, WAN[which])[0]
        if which == "wan adapters":  # Adam divides an adapter's tiny gradients by their own size: see `wan.compare`
            got, want = ({**result, "weights": {}} for result in (got, want))
        wan.compare(got, want, layout)
    else:
        qwen.compare(got, qwen.single(which, True), layout, 2)


# ------------------------------------------------------------------------------------------------------------ refusals

FUSED = ["--size", "4B", "--from-scratch", "--fused-comm"]
REFUSED = {  # device, processes, options, parts of the message
    "cpu": ("cpu", 2, "--tp 2 --sp", ["on cpu", "npu or cuda"]),
    "one rank": ("npu", 1, "", ["tp=1"]),
    "two nodes": ("npu", 2, "--tp 4", ["tp=4 and 2 devices on a node"]),
    "fp32": ("npu", 2, "--tp 2 --precision fp32", ["precision=fp32", "bf16"]),
    "compile": ("cuda", 2, "--tp 2 --sp --compile", ["with compile"]),
    "all-reduce on cuda": ("cuda", 2, "--tp 2", ["without sp on cuda", "--sp"]),
    "narrow": ("npu", 4, "--size tiny --tp 4 --sp --precision bf16", ["size tiny at tp=4", "256 to 65534"]),
}


@pytest.mark.L4
@pytest.mark.parametrize("case", REFUSED)
def test_what_the_fused_kernels_do_not_take_is_refused_before_a_process_starts(case, monkeypatch):
    where, processes, options, parts = REFUSED[case]
    monkeypatch.setenv("ZOO_DEVICE", where)
    monkeypatch.setenv("NPROC", str(processes))
    monkeypatch.setenv("NNODES", "2" if case == "two nodes" else "1")
    with pytest.raises(ValueError) as error:
        qwen.case.jobs.parse("perf", [*FUSED, *options.split()])
    message = str(error.value)
    assert all(part in message for part in [*parts, "--no-fused-comm"]), message


def joined_without_peer_access() -> str:
    """Joins the groups of a layout with --fused-comm as on cuda, whose GPUs do not reach each other's memory."""
    ops.BACKEND, torch.cuda.can_device_access_peer = "cuda", lambda one, other: False
    try:
        parallel.initialize(qwen.case.options(tp=2, sp=True, fused_comm=True))
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.L4
def test_gpus_that_do_not_reach_each_other_are_refused_when_the_groups_are_built():
    for rank, message in enumerate(run_ranks(2, joined_without_peer_access)):
        assert "cannot reach the memory of GPU" in message and "--no-fused-comm" in message, (rank, message)


@pytest.mark.L4
def test_a_library_without_the_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(ops, "BACKEND", "npu")
    monkeypatch.setattr(torch.ops, "npu", object(), raising=False)
    with pytest.raises(ValueError, match="has no npu_mm_all_reduce_base.*fix: --no-fused-comm"):
        fused_comm.check_fused_communication(None)
