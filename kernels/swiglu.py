"""SwiGLU (Shazeer, arXiv:2002.05202): y = silu(a) b with (a, b) the two halves of the last dimension.

    da = dy b sigma(a) (1 + a (1 - sigma(a))),  db = dy a sigma(a)

Unusual: only x is saved for the backward, which recomputes sigma(a).

With N output elements of s bytes, a forward moves 3 N s bytes and does 5 N FLOPs (an exponential counts as one), a
backward moves 5 N s and does 12 N.

The kernels keep to the subset that triton-ascend compiles too: no CUDA-only intrinsics, no inline assembly, no atomics,
power-of-two blocks, explicit masks. Their speed on a device is unmeasured. The tests run them in Triton's interpreter
and compile them for sm_90; triton-ascend 3.2.0 lowers them to linalg.
"""

import torch
import triton
import triton.language as tl

TILE, MOST_COLS = 4096, 1024  # elements a program holds of one tensor; columns of that tile at most
MOST_PROGRAMS = 4096  # along the rows; each strides over the rest


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2F] fp32, bf16 or fp16 -> silu(x[..., :F]) * x[..., F:], [..., F] in x's dtype, computed in fp32."""
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"x is {list(x.shape)}; expected [..., 2F], an even last dimension")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}; expected torch.float32, bfloat16 or float16")
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        x_ND = _rows(x)  # D = 2F
        N, F = x_ND.shape[0], x.shape[-1] // 2
        y = torch.empty(*x.shape[:-1], F, dtype=x.dtype, device=x.device)
        grid, sizes = _tiling(N, F)
        _forward_kernel[grid](x_ND, y, N, F, x_ND.stride(0), **sizes)
        return y

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        x_ND, dy_NF = _rows(x), _rows(dy)
        N, F = dy_NF.shape
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grid, sizes = _tiling(N, F)
        _backward_kernel[grid](dy_NF, x_ND, dx, N, F, dy_NF.stride(0), x_ND.stride(0), **sizes)
        return dx


def _rows(t):
    """[..., D] -> [N, D], each row contiguous: a view where strides allow it."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _tiling(rows, F):
    """Returns the grid, and the sizes of a tile: [ROWS, BLOCK] elements."""
    BLOCK = min(triton.next_power_of_2(F), MOST_COLS)
    ROWS = TILE // BLOCK
    return (min(triton.cdiv(rows, ROWS), MOST_PROGRAMS), triton.cdiv(F, BLOCK)), {"ROWS": ROWS, "BLOCK": BLOCK}


@triton.jit
def _forward_kernel(x_ptr, y_ptr, N, F, x_row, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    for start in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # a tensor may hold more than 2^31 elements
        mask = (rows < N) & (cols < F)
        a = tl.load(x_ptr + rows * x_row + cols, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + rows * x_row + F + cols, mask=mask, other=0.0).to(tl.float32)
        y = a / (1.0 + tl.exp(-a)) * b
        tl.store(y_ptr + rows * F + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(dy_ptr, x_ptr, dx_ptr, N, F, dy_row, x_row, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    for start in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (rows < N) & (cols < F)
        dy = tl.load(dy_ptr + rows * dy_row + cols, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(x_ptr + rows * x_row + cols, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + rows * x_row + F + cols, mask=mask, other=0.0).to(tl.float32)
        sigma = 1.0 / (1.0 + tl.exp(-a))
        da, db = dy * b * sigma * (1.0 + a * (1.0 - sigma)), dy * a * sigma
        tl.store(dx_ptr + rows * 2 * F + cols, da.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + rows * 2 * F + F + cols, db.to(dx_ptr.dtype.element_ty), mask=mask)
