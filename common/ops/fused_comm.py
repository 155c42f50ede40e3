"""Matmuls of tensor parallelism that communicate in the same kernel, for --fused-comm: torch_npu's on npu, torch's
symmetric-memory ops on cuda. `parallel.enter_with` and `parallel.RowLinear` call them.

Shape legend: L tokens of the whole tensor-parallel region, B batch, n ranks of the group, T = L B rows.
"""

import importlib.util
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import ops


def linear_reduce(x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup, scatter: bool) -> torch.Tensor:
    """Returns the sum over a group of n ranks of x weight^T. One kernel multiplies and, meanwhile, sends the rows that
    are done.

    x [L, B, inputs/n], weight [outputs, inputs/n] -> [L, B, outputs], or with scatter this rank's tokens of it,
    [L/n, B, outputs]. Backward: dx = dy weight, dweight = dy^T x. With scatter, the kernel that computes dx also gathers
    dy, and dweight is computed from the gathered dy, which then is freed. cuda has only the kernels of scatter.
    """
    return _LinearReduce.apply(x, weight, group, scatter)


class _LinearReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, group, scatter):
        ctx.save_for_backward(x)
        ctx.weight, ctx.group, ctx.scatter = weight, group, scatter  # the weight is not saved: see `ops._Linear`
        y = _matmul_reduce(x.flatten(0, -2).contiguous(), weight.t(), group, scatter)
        return y.view(-1, *x.shape[1:-1], len(weight))

    @staticmethod
    def backward(ctx, dy):
        (x,), weight, dy = ctx.saved_tensors, ctx.weight, dy.flatten(0, -2).contiguous()
        dx, dy = _gather_matmul(dy, weight, ctx.group) if ctx.scatter else (dy @ weight, dy)
        dweight = _weight_gradient(weight, dy, x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return dx.view_as(x), dweight, None, None


def gather_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: dist.ProcessGroup, scattered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x of all tokens of a group of n ranks, and its product with weight^T, plus bias: the first of the linears
    that share this input. One kernel gathers the tokens and, meanwhile, multiplies those that are here.

    x [L/n, B, inputs], weight [outputs/n, inputs] -> [L, B, inputs], [L, B, outputs/n]. If x is not scattered it is
    [L, B, inputs] on every rank, and only the backward communicates.

    Backward: dx is the sum over the group of dothers + dy weight, where dothers is what the other linears return, and is
    scattered if x is. Without other linears, one kernel multiplies and sends. With them, the collective runs while the
    weight's gradient is computed. The gathered x is kept for the backward, as all linears of the input keep it.
    """
    return _GatherLinear.apply(x, weight, bias, group, scattered)


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, group, scattered):
        ctx.set_materialize_grads(False)  # None says that no other linear reads the gathered x
        ctx.weight, ctx.group, ctx.scattered = weight, group, scattered
        if scattered:
            y, rows = _gather_matmul(x.flatten(0, -2).contiguous(), weight.t(), group)
            x = rows.view(-1, *x.shape[1:])
            y = y if bias is None else y + bias  # the npu kernel takes no bias
        else:
            y = F.linear(x, weight, bias)
        ctx.save_for_backward(x)
        return x, y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, dothers, dy):
        (x,), weight, group = ctx.saved_tensors, ctx.weight, ctx.group
        shape, dy = (-1, *x.shape[1:]), dy.flatten(0, -2).contiguous()
        dx, sending, wanted = None, None, ctx.needs_input_grad
        if wanted[0] and dothers is None:
            dx = _matmul_reduce(dy, weight, group, ctx.scattered)
        elif wanted[0]:
            total = torch.addmm(dothers.flatten(0, -2), dy, weight)
            if ctx.scattered:
                dx = total.new_empty(len(total) // group.size(), total.shape[1])
                sending = dist.reduce_scatter_tensor(dx, total, group=group, async_op=True)
            else:
                dx, sending = total, dist.all_reduce(total, group=group, async_op=True)
        dweight = _weight_gradient(weight, dy, x.flatten(0, -2)) if wanted[1] else None
        dbias = dy.sum(0) if wanted[2] else None
        if sending is not None:
            sending.wait()
        return None if dx is None else dx.view(shape), dweight, dbias, None, None


def _matmul_reduce(a: torch.Tensor, b: torch.Tensor, group: dist.ProcessGroup, scatter: bool) -> torch.Tensor:
    """Returns the sum over the group of a b, or this rank's rows of it: a [T, K], b [K, N] -> [T, N] or [T/n, N]."""
    if ops.BACKEND != "npu":
        assert scatter, "torch fuses no all-reduce"
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(a, b, "sum", 0, group.group_name)
    if scatter:
        return torch.ops.npu.npu_mm_reduce_scatter_base(a, b, _communicator(group), group.size())
    return torch.ops.npu.npu_mm_all_reduce_base(a, b, _communicator(group))


def _gather_matmul(a: torch.Tensor, b: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Gathers the rows of a: a [T/n, K], b [K, N] -> (gathered a times b [T, N], gathered a [T, K])."""
    if ops.BACKEND == "npu":
        return torch.ops.npu.npu_all_gather_base_mm(a, b, _communicator(group), group.size())
    gathered, (product,) = torch.ops.symm_mem.fused_all_gather_matmul(a, [b], 0, group.group_name)
    return product, gathered


def _communicator(group: dist.ProcessGroup) -> str:
    """Returns the name under which npu's kernels find the group's communicator."""
    return group._get_backend(torch.device("npu")).get_hccl_comm_name(dist.get_rank())


def check_fused_communication(group: dist.ProcessGroup) -> None:
    """Checks that the kernels of `linear_reduce` and `gather_linear` exist, and on cuda that the group's devices reach
    each other's memory. ValueError: one of the two is not so."""
    namespace, names = "symm_mem", ("fused_matmul_reduce_scatter", "fused_all_gather_matmul")
    if ops.BACKEND == "npu":
        namespace = "npu"
        names = ("npu_mm_all_reduce_base", "npu_mm_reduce_scatter_base", "npu_all_gather_base_mm")
    elif importlib.util.find_spec("torch.distributed._symmetric_memory"):
        importlib.import_module("torch.distributed._symmetric_memory")  # registers the ops
    missing = [name for name in names if not hasattr(getattr(torch.ops, namespace), name)]
    if missing:
        raise ValueError(f"fused_comm: torch {torch.__version__} has no {', '.join(missing)}; fix: --no-fused-comm")
    if ops.BACKEND != "cuda":
        return
    here = int(os.environ["LOCAL_RANK"])
    devices = [here + rank - dist.get_rank() for rank in dist.get_process_group_ranks(group)]  # all on this node
    unreachable = [i for i in devices if i != here and not torch.cuda.can_device_access_peer(here, i)]
    if unreachable:
        raise ValueError(
            f"fused_comm: GPU {here} cannot reach the memory of GPU {unreachable[0]}; fix: --no-fused-comm"
        )


def _weight_gradient(weight: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns dy^T x for a weight, or adds it to the weight's buffer as `linear` does. dy [T, outputs], x [T, inputs]."""
    if not ops.can_accumulate(x, weight):
        return dy.t() @ x
    ops.add_products_(weight.main_grad.unsqueeze(0), dy, x, None)
    return ops.mark_accumulated(weight)
