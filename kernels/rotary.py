"""Rotary position embedding (Su et al., arXiv:2104.09864): rotates pairs of the head dimension by angles per token.

    (x_i, x_j) -> (x_i cos - x_j sin, x_j cos + x_i sin)

    rotary_interleaved   pairs (0, 1), (2, 3), ...           one (cos, sin) per pair
    rotary_half          pairs (0, E/2), (1, E/2 + 1), ...   cos and sin of full width, as rotate_half wants them

Unusual: x may be strided (a slice of a fused qkv) and may be overwritten. The backward applies the transpose (for one
(cos, sin) per pair, the inverse rotation) to the incoming gradient. It needs cos and sin, never x. cos and sin get no
gradient.

With N = L x B x H x E elements of s bytes, each direction moves 2 N s bytes and does 3 N FLOPs; the table is read once
per token, not per head.

The kernels keep to the subset that triton-ascend compiles too: no CUDA-only intrinsics, no inline assembly, no atomics,
power-of-two blocks, explicit masks. Their speed on a device is unmeasured. The tests run them in Triton's interpreter
and compile them for sm_90; triton-ascend 3.2.0 lowers them to linalg.
"""

import torch
import triton
import triton.language as tl

TILE = 2048  # elements of x a program holds
MOST_PROGRAMS = 4096  # each strides over the tokens


def rotary_interleaved(x: torch.Tensor, rope: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """Rotates the pairs (x_0, x_1), (x_2, x_3), ... of the head dimension, in fp32.

    x [L, B, H, E] fp32, bf16 or fp16, strided or not; rope [L or 1, B or 1, 1, E/2, 2] fp32 holds (cos, sin) of each
    pair -> [L, B, H, E] in x's dtype: x itself if inplace, else contiguous. In place, autograd needs x to be a slice
    of a tensor, not an output of `split`, `chunk` or `unbind`.
    """
    _check(x, inplace)
    _check_table("rope", rope, x, (x.shape[3] // 2, 2))
    return _Interleaved.apply(x, rope, inplace)


def rotary_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """Returns x * cos + cat(-x_2, x_1) * sin with (x_1, x_2) the halves of the head dimension, in fp32.

    cos and sin [L or 1, B or 1, 1, E] fp32, of one shape; x, inplace and the result as in `rotary_interleaved`.
    """
    _check(x, inplace)
    for name, table in (("cos", cos), ("sin", sin)):
        _check_table(name, table, x, (x.shape[3],))
    if cos.shape != sin.shape:
        raise ValueError(f"sin is {list(sin.shape)}, cos {list(cos.shape)}; expected one shape")
    return _Half.apply(x, cos, sin, inplace)


def _check(x, inplace):
    if x.dim() != 4 or x.shape[3] % 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}; expected float32, bfloat16 or float16 [L, B, H, E] with E even"
        )
    if inplace and x.stride(3) != 1:
        raise ValueError(f"x has strides {list(x.stride())}; expected 1 last to be rotated in place")


def _check_table(name, table, x, last):
    L, B = x.shape[:2]
    shape = tuple(table.shape)
    fits = table.dim() == 3 + len(last) and shape[0] in (1, L) and shape[1] in (1, B) and shape[2:] == (1, *last)
    if not fits or table.dtype != torch.float32:
        raise ValueError(
            f"{name} is {table.dtype} {list(shape)}, x {list(x.shape)}; "
            f"expected torch.float32 [L or 1, B or 1, 1, {', '.join(map(str, last))}]"
        )


class _Interleaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rope, inplace):
        ctx.save_for_backward(rope)
        if inplace:
            ctx.mark_dirty(x)
        return _rotate(_interleaved_kernel, x, (rope,), x if inplace else None, transpose=False)

    @staticmethod
    def backward(ctx, dy):
        return _rotate(_interleaved_kernel, dy, ctx.saved_tensors, None, transpose=True), None, None


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, inplace):
        ctx.save_for_backward(cos, sin)
        if inplace:
            ctx.mark_dirty(x)
        return _rotate(_half_kernel, x, (cos, sin), x if inplace else None, transpose=False)

    @staticmethod
    def backward(ctx, dy):
        return _rotate(_half_kernel, dy, ctx.saved_tensors, None, transpose=True), None, None, None


def _rotate(kernel, x, tables, out, transpose):
    """Rotates x by the tables, or by their transpose, into out or else a new contiguous tensor."""
    L, B, H, E = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tables = [t.contiguous().expand(L, B, *t.shape[2:]) for t in tables]  # a stride of 0 where a table is shared
    PAIRS = triton.next_power_of_2(E // 2)
    HEADS = min(triton.next_power_of_2(H), max(1, TILE // (2 * PAIRS)))
    kernel[min(L, MOST_PROGRAMS), B](
        x,
        *tables,
        out,
        L,
        H,
        *x.stride()[:3],
        *tables[0].stride()[:2],
        *out.stride()[:3],
        E=E,  # a constant, so that the mask of a full tile vanishes
        TRANSPOSE=transpose,
        HEADS=HEADS,
        PAIRS=PAIRS,
        num_warps=4,  # 2, for 8 heads of 128, would pass the table through shared memory
    )
    return out


@triton.jit
def _interleaved_kernel(
    x_ptr,
    rope_ptr,
    out_ptr,
    L,
    H,
    x_l,
    x_b,
    x_h,
    rope_l,
    rope_b,
    out_l,
    out_b,
    out_h,
    E: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)  # a tensor may hold more than 2^31 elements
    cols = tl.arange(0, 2 * PAIRS)
    for token in range(tl.program_id(0), L, tl.num_programs(0)):
        l = tl.cast(token, tl.int64)
        rope = tl.load(rope_ptr + l * rope_l + b * rope_b + cols, mask=cols < E, other=0.0)
        cos, sin = tl.split(tl.reshape(rope, [1, PAIRS, 2]))  # [1, PAIRS]
        if TRANSPOSE:
            sin = -sin
        for first in range(0, H, HEADS):
            heads = first + tl.arange(0, HEADS)[:, None]
            mask = (heads < H) & (cols[None, :] < E)
            x = tl.load(x_ptr + l * x_l + b * x_b + heads * x_h + cols[None, :], mask=mask, other=0.0)
            even, odd = tl.split(tl.reshape(x.to(tl.float32), [HEADS, PAIRS, 2]))
            out = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [HEADS, 2 * PAIRS])
            tl.store(
                out_ptr + l * out_l + b * out_b + heads * out_h + cols[None, :],
                out.to(out_ptr.dtype.element_ty),
                mask=mask,
            )


@triton.jit
def _half_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    L,
    H,
    x_l,
    x_b,
    x_h,
    table_l,
    table_b,
    out_l,
    out_b,
    out_h,
    E: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    cols, half = tl.arange(0, PAIRS)[None, :], E // 2
    for token in range(tl.program_id(0), L, tl.num_programs(0)):
        l = tl.cast(token, tl.int64)
        cos, sin = cos_ptr + l * table_l + b * table_b + cols, sin_ptr + l * table_l + b * table_b + cols
        cos1, cos2 = tl.load(cos, mask=cols < half, other=0.0), tl.load(cos + half, mask=cols < half, other=0.0)
        sin1, sin2 = tl.load(sin, mask=cols < half, other=0.0), tl.load(sin + half, mask=cols < half, other=0.0)
        if TRANSPOSE:
            sin1, sin2 = -sin2, -sin1
        for first in range(0, H, HEADS):
            heads = first + tl.arange(0, HEADS)[:, None]
            mask = (heads < H) & (cols < half)
            x = x_ptr + l * x_l + b * x_b + heads * x_h + cols
            x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
            x2 = tl.load(x + half, mask=mask, other=0.0).to(tl.float32)
            out = out_ptr + l * out_l + b * out_b + heads * out_h + cols
            tl.store(out, (x1 * cos1 - x2 * sin1).to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(out + half, (x2 * cos2 + x1 * sin2).to(out_ptr.dtype.element_ty), mask=mask)
