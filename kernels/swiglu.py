"""SwiGLU (Shazeer, arXiv:2002.05202): y = silu(a) b with a and b two tensors, or the two halves of one.

    da = dy b sigma(a) (1 + a (1 - sigma(a))),  db = dy a sigma(a)

Unusual: a and b are read where they lie, each with its own row stride, so one kernel serves both forms and nothing is
concatenated. Only a and b are saved for the backward, which recomputes sigma(a).

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


def swiglu(x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """Returns silu(a) * b in x's dtype, computed in fp32: x [..., 2F] holds a and b, its halves -> [..., F]. With up, a
    and b are x and up, each [..., F] -> [..., F]. fp32, bf16 or fp16."""
    if x.dim() == 0 or (up is None and x.shape[-1] % 2):
        raise ValueError(f"x is {list(x.shape)}; expected [..., 2F], an even last dimension")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}; expected torch.float32, bfloat16 or float16")
    if up is not None and (up.shape != x.shape or up.dtype != x.dtype):
        raise ValueError(f"up is {up.dtype} {list(up.shape)}; expected x's {x.dtype} {list(x.shape)}")
    return _SwiGLU.apply(x, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up):
        ctx.save_for_backward(x, up)
        a, b = _halves(x, up)  # [N, F] each
        y = torch.empty(*x.shape[:-1], a.shape[1], dtype=x.dtype, device=x.device)
        grid, sizes = _tiling(*a.shape)
        _forward_kernel[grid](a, b, y, *a.shape, a.stride(0), b.stride(0), **sizes)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, up = ctx.saved_tensors
        (a, b), dy = _halves(x, up), _rows(dy)
        dx, dup = (None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, up))
        da, db = _halves(dx, dup)
        grid, sizes = _tiling(*a.shape)
        strides = (t.stride(0) for t in (dy, a, b, da, db))
        _backward_kernel[grid](dy, a, b, da, db, *a.shape, *strides, **sizes)
        return dx, dup


def _halves(x, up):
    """Returns a and b [N, F], of which each row is contiguous."""
    return _rows(x).tensor_split(2, 1) if up is None else (_rows(x), _rows(up))


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
def _forward_kernel(a_ptr, b_ptr, y_ptr, N, F, a_row, b_row, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    for start in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # a tensor may hold more than 2^31 elements
        mask = (rows < N) & (cols < F)
        a = tl.load(a_ptr + rows * a_row + cols, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + rows * b_row + cols, mask=mask, other=0.0).to(tl.float32)
        y = a / (1.0 + tl.exp(-a)) * b
        tl.store(y_ptr + rows * F + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    a_ptr,
    b_ptr,
    da_ptr,
    db_ptr,
    N,
    F,
    dy_row,
    a_row,
    b_row,
    da_row,
    db_row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    for start in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (rows < N) & (cols < F)
        dy = tl.load(dy_ptr + rows * dy_row + cols, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + rows * a_row + cols, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + rows * b_row + cols, mask=mask, other=0.0).to(tl.float32)
        sigma = 1.0 / (1.0 + tl.exp(-a))
        da, db = dy * b * sigma * (1.0 + a * (1.0 - sigma)), dy * a * sigma
        tl.store(da_ptr + rows * da_row + cols, da.to(da_ptr.dtype.element_ty), mask=mask)
        tl.store(db_ptr + rows * db_row + cols, db.to(db_ptr.dtype.element_ty), mask=mask)
