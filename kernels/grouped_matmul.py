"""Multiplies rows sorted by expert by each expert's own matrix: the GEMMs of a mixture of experts in one launch.

y[t] = x[t] @ weight[g]   for ends[g-1] <= t < ends[g]    (MegaBlocks, arXiv 2211.15841; torch_npu's npu_grouped_matmul)
dx[t] = dy[t] @ weight[g]^T,    dweight[g] = x[rows of g]^T @ dy[rows of g]

Unusual: `ends` stays on the device, so nothing waits for it, and the grid follows from shapes alone. Group g owns the
tiles from ends[g-1] // ROWS + g on. Until group g + 1 begins, these are ends[g] // ROWS - ends[g-1] // ROWS + 1 tiles,
never fewer than it needs, whatever the ends. So a tile finds its group without a prefix sum: it counts the groups that
begin at or below it. At most one tile a group has nothing to do. The rows behind ends[-1] are one more group, of zeros.

T rows, G matrices [D, F], s bytes an element: 2 T D F FLOPs for the forward, twice that for the backward. Each of the
three products moves about T (D + F) s + G D F s bytes, if tiles that share an operand find it in the cache.

The kernels keep to the subset that triton-ascend compiles too (no CUDA-only intrinsics, no inline assembly, no atomics,
power-of-two blocks, explicit masks). Their speed on a device is unmeasured; the tests run them in Triton's interpreter.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS, DEPTH_BYTES = 128, 128, 128  # of a tile


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [T, D], weight [G, D, F] of the same dtype, ends [G] int32 or int64, the rows at which the groups end, on the
    device -> [T, F]. A group may be empty; rows from ends[-1] on give zeros. Differentiable in x and weight.

    ends must lie from 0 to T and must not decrease. This is not checked, because the host does not read ends.
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[1] or ends.shape != weight.shape[:1]:
        raise ValueError(
            f"x {list(x.shape)}, weight {list(weight.shape)}, ends {list(ends.shape)}; expected [T, D], [G, D, F], [G]"
        )
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}; expected one dtype, fp32, bf16 or fp16")
    if ends.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ends is {ends.dtype}; expected int32 or int64")
    return _GroupedMatmul.apply(x, weight, ends.contiguous())


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(x, weight, ends)
        return _by_rows(x, weight, ends)

    @staticmethod
    def backward(ctx, dy):
        x, weight, ends = ctx.saved_tensors
        dx = _by_rows(dy, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
        dweight = _by_groups(x, dy, ends) if ctx.needs_input_grad[1] else None
        return dx, dweight, None


def _by_rows(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [T, D], weight [G, D, F] -> [T, F]"""
    (T, D), (G, _, F) = x.shape, weight.shape
    y = x.new_empty(T, F)
    if y.numel():
        _rows_kernel[T // ROWS + G + 1, triton.cdiv(F, COLUMNS)](
            x, weight, ends, y, T, D, F, *x.stride(), *weight.stride(), F,
            G=G, GROUPS=triton.next_power_of_2(G + 1),
            ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH_BYTES // x.element_size(),
            OPERAND=_operand(x), num_warps=8,
        )  # fmt: skip
    return y


def _by_groups(x: torch.Tensor, dy: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [T, D], dy [T, F] -> [G, D, F]"""
    dweight = x.new_empty(len(ends), x.shape[1], dy.shape[1])
    _launch_groups(dweight, x, dy, ends, accumulate=False)
    return dweight


def add_weight_gradient_(total: torch.Tensor, x: torch.Tensor, dy: torch.Tensor, ends: torch.Tensor) -> None:
    """Adds x[rows of g]^T @ dy[rows of g] to total[g], in place and rounded only there. total fp32 [G, D, F], contiguous;
    x [T, D], dy [T, F] and ends [G] as in `grouped_matmul`."""
    if total.shape != (len(ends), x.shape[1], dy.shape[1]) or total.dtype != torch.float32 or not total.is_contiguous():
        raise ValueError(
            f"total {list(total.shape)} {total.dtype} for x {list(x.shape)}, dy {list(dy.shape)}, {len(ends)} groups; "
            "expected fp32 [G, D, F], contiguous"
        )
    _launch_groups(total, x, dy, ends, accumulate=True)


def _launch_groups(out: torch.Tensor, x: torch.Tensor, dy: torch.Tensor, ends: torch.Tensor, accumulate: bool) -> None:
    """out [G, D, F] = (or +=) the products of the groups."""
    (T, D), F, G = x.shape, dy.shape[1], len(ends)
    if out.numel():
        _groups_kernel[G, triton.cdiv(D, ROWS), triton.cdiv(F, COLUMNS)](
            x, dy, ends, out, T, D, F, *x.stride(), *dy.stride(),
            ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH_BYTES // x.element_size(),
            OPERAND=_operand(x), ACCUMULATE=accumulate, num_warps=8,
        )  # fmt: skip


def _operand(x: torch.Tensor) -> tl.dtype:
    """Returns the dtype of the products' operands. The interpreter would multiply bf16 as bit patterns."""
    if not isinstance(_rows_kernel, triton.JITFunction):
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype]


@triton.jit
def _rows_kernel(
    x, weight, ends, y, T, D, F, x_t: tl.int64, x_d, w_g: tl.int64, w_d, w_f, y_t: tl.int64,
    G: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Computes one tile [ROWS, COLUMNS] of y. GROUPS is the power of two that holds the G groups and that of zeros."""
    tile = tl.program_id(0)
    groups = tl.arange(0, GROUPS)
    group_ends = tl.load(ends + groups, mask=groups < G, other=0).to(tl.int32)
    group = tl.sum(tl.where((groups < G) & (group_ends // ROWS + groups + 1 <= tile), 1, 0), 0)
    start = tl.load(ends + group - 1, mask=group > 0, other=0).to(tl.int32)
    end = tl.load(ends + group, mask=group < G, other=T).to(tl.int32)
    first_row = start + (tile - start // ROWS - group) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = rows[:, None] < end, columns[None, :] < F

    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    depth = tl.where((group < G) & (first_row < end), D, 0)  # nothing to add for the group of zeros or in a spare tile
    for first in range(0, depth, DEPTH):
        d = first + tl.arange(0, DEPTH)
        a = tl.load(x + rows[:, None] * x_t + d[None, :] * x_d, mask=row_mask & (d[None, :] < D), other=0.0)
        b = tl.load(
            weight + group * w_g + d[:, None] * w_d + columns[None, :] * w_f,
            mask=(d[:, None] < D) & column_mask,
            other=0.0,
        )
        product = tl.dot(a.to(OPERAND), b.to(OPERAND), product, input_precision="ieee")
    tl.store(y + rows[:, None] * y_t + columns[None, :], product.to(y.dtype.element_ty), mask=row_mask & column_mask)


@triton.jit
def _groups_kernel(
    x, dy, ends, dweight, T, D, F, x_t: tl.int64, x_d, dy_t: tl.int64, dy_f,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, OPERAND: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Computes one tile [ROWS, COLUMNS] of dweight[group], [D, F]: a sum over the group's rows of x and dy, added to what
    is there if ACCUMULATE."""
    group = tl.program_id(0)
    start = tl.load(ends + group - 1, mask=group > 0, other=0).to(tl.int32)
    end = tl.load(ends + group).to(tl.int32)
    d = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)

    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(start, end, DEPTH):
        t = first + tl.arange(0, DEPTH)
        a = tl.load(x + t[None, :] * x_t + d[:, None] * x_d, mask=(d[:, None] < D) & (t[None, :] < end), other=0.0)
        b = tl.load(dy + t[:, None] * dy_t + f[None, :] * dy_f, mask=(t[:, None] < end) & (f[None, :] < F), other=0.0)
        product = tl.dot(a.to(OPERAND), b.to(OPERAND), product, input_precision="ieee")
    tile = dweight + (group.to(tl.int64) * D + d[:, None]) * F + f[None, :]
    inside = (d[:, None] < D) & (f[None, :] < F)
    if ACCUMULATE:
        product += tl.load(tile, mask=inside, other=0.0)
    tl.store(tile, product.to(dweight.dtype.element_ty), mask=inside)
