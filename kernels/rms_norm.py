"""RMSNorm over the last dimension (Zhang and Sennrich, arXiv:1910.07467), alone or after a residual add.

    n = x r,  r = (mean(x^2) + eps)^-1/2,  y = n w
    dx = r (g - n mean(g n)),  g = dy w;      dw = sum over rows of dy n

Unusual: `add_rms_norm` returns the sum too, and the gradient that reaches the sum is added where dx is written, so the
residual stream crosses memory once. The sum is normalised as stored, that is, rounded to the input's dtype.

With N = rows x D elements of s bytes, a forward moves 2 N s bytes (4 N s with the add) and does 4 N FLOPs, a backward
moves 3 N s (4 N s with the add) and does 9 N. The rest (r, w, partial sums of dw) is small against N.

The kernels keep to the subset that triton-ascend compiles too: no CUDA-only intrinsics, no inline assembly, no atomics,
power-of-two blocks, explicit masks. Their speed on a device is unmeasured. The tests run them in Triton's interpreter
and compile them for sm_90; triton-ascend 3.2.0 lowers them to linalg.
"""

import torch
import triton
import triton.language as tl

TILE = 4096  # elements a program holds of one tensor; a longer row makes the tile longer
FORWARD_PROGRAMS = 4096  # each strides over the rows
BACKWARD_PROGRAMS = 264  # the same, and each keeps one row of dw: 2 for each of the 132 processors of an H100 or H200


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D] fp32, bf16 or fp16, weight [D] -> x / sqrt(mean(x^2) + eps) * weight in x's dtype."""
    _check(x, weight)
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual [..., D] of one dtype, weight [D] -> (rms_norm(x + residual), x + residual)."""
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual is {residual.dtype} {list(residual.shape)}; expected x's {x.dtype} {list(x.shape)}")
    return _AddRMSNorm.apply(x, residual, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, _, inverse = _forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, inverse = ctx.saved_tensors
        return *_backward(dy, None, x, weight, inverse), None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        y, total, inverse = _forward(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, inverse)
        return y, total

    @staticmethod
    def backward(ctx, dy, dtotal):
        total, weight, inverse = ctx.saved_tensors
        dx, dweight = _backward(dy, dtotal, total, weight, inverse)
        return dx, dx, dweight, None


def _check(x, weight):
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {list(weight.shape)}, x {list(x.shape)}; expected weight [D] for x [..., D]")
    for name, t in (("x", x), ("weight", weight)):
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {t.dtype}; expected torch.float32, bfloat16 or float16")


def _rows(t):
    """[..., D] -> [N, D], each row contiguous: a view where strides allow it."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _tiling(rows, D, most):
    """Returns the number of programs, and the sizes of a tile: [ROWS, BLOCK] elements, BLOCK >= D.

    A thread holds 16 elements of each tensor. With 32, a backward for sm_90 takes 142 to 193 registers a thread instead
    of 80 to 104, and fewer threads are at work.
    """
    BLOCK = triton.next_power_of_2(D)
    ROWS = max(1, TILE // BLOCK)
    sizes = {"ROWS": ROWS, "BLOCK": BLOCK, "num_warps": min(max(ROWS * BLOCK // 512, 4), 16)}
    return min(triton.cdiv(rows, ROWS), most), sizes


def _forward(x, residual, weight, eps):
    """Returns (y, x + residual or None, r [N] fp32)."""
    x_ND, add = _rows(x), residual is not None
    N, D = x_ND.shape
    residual_ND = _rows(residual) if add else x_ND  # without ADD it is never read, and total never written
    y, inverse = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(N, dtype=torch.float32)
    total = torch.empty_like(y) if add else None
    programs, sizes = _tiling(N, D, FORWARD_PROGRAMS)
    pointers = x_ND, residual_ND, weight.contiguous(), y, total if add else y, inverse
    _forward_kernel[(programs,)](*pointers, N, D, eps, x_ND.stride(0), residual_ND.stride(0), ADD=add, **sizes)
    return y, total, inverse


def _backward(dy, dtotal, x, weight, inverse):
    """Returns (dx, dweight). x: what was normalised; dtotal: the gradient that it receives directly, or None."""
    x_ND, dy_ND, add = _rows(x), _rows(dy), dtotal is not None
    N, D = x_ND.shape
    dtotal_ND = _rows(dtotal) if add else dy_ND  # never read without ADD
    programs, sizes = _tiling(N, D, BACKWARD_PROGRAMS)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs, D, dtype=torch.float32, device=x.device)  # dw of each program's rows
    pointers = dy_ND, dtotal_ND, x_ND, weight.contiguous(), inverse, dx, partial
    strides = dy_ND.stride(0), dtotal_ND.stride(0), x_ND.stride(0)
    _backward_kernel[(programs,)](*pointers, N, D, *strides, ADD=add, **sizes)
    return dx, partial.sum(0).to(weight.dtype)


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    inverse_ptr,
    N,
    D,
    eps,
    x_row,
    residual_row,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    for start in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & (cols < D)
        row_index = rows.to(tl.int64)[:, None]  # a tensor may hold more than 2^31 elements
        x = tl.load(x_ptr + row_index * x_row + cols, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            residual = tl.load(residual_ptr + row_index * residual_row + cols, mask=mask, other=0.0)
            total = (x + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row_index * D + cols, total, mask=mask)
            x = total.to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
        tl.store(inverse_ptr + rows, inverse, mask=rows < N)
        y = x * inverse[:, None] * weight
        tl.store(y_ptr + row_index * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    inverse_ptr,
    dx_ptr,
    partial_ptr,
    N,
    D,
    dy_row,
    dtotal_row,
    x_row,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & (cols < D)
        row_index = rows.to(tl.int64)[:, None]
        inverse = tl.load(inverse_ptr + rows, mask=rows < N, other=0.0)[:, None]
        normed = tl.load(x_ptr + row_index * x_row + cols, mask=mask, other=0.0).to(tl.float32) * inverse
        dy = tl.load(dy_ptr + row_index * dy_row + cols, mask=mask, other=0.0).to(tl.float32)
        dweight += dy * normed
        dnormed = dy * weight
        dx = inverse * (dnormed - normed * (tl.sum(dnormed * normed, axis=1) / D)[:, None])
        if ADD:
            dtotal = tl.load(dtotal_ptr + row_index * dtotal_row + cols, mask=mask, other=0.0)
            dx += dtotal.to(tl.float32)
        tl.store(dx_ptr + row_index * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(
        partial_ptr + tl.program_id(0) * D + tl.arange(0, BLOCK), tl.sum(dweight, axis=0), mask=tl.arange(0, BLOCK) < D
    )
