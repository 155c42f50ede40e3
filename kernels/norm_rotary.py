"""RMSNorm of each head and the rotary embedding by halves, in one kernel: what queries and keys go through in models that
normalise them (QK-norm: Henry et al., arXiv:2010.04245; rotary: Su et al., arXiv:2104.09864).

    n = x r,  r = (mean(x^2) + eps)^-1/2,  u = n w,  y_1 = u_1 cos_1 - u_2 sin_1,  y_2 = u_2 cos_2 + u_1 sin_2
    g_1 = dy_1 cos_1 + dy_2 sin_2,  g_2 = dy_2 cos_2 - dy_1 sin_1,  d = g w
    dx = r (d - n mean(d n));      dw = sum over tokens and heads of g n

(x_1, x_2) are the halves of the head dimension.

Unusual: x may be strided (a slice of a fused qkv). The normalised heads exist in registers only, in fp32, so y is
rounded once. Only x and r (one fp32 number a head) are saved. The sum over tokens and heads takes two steps, a partial
sum per program and then a sum over programs, so every run gives the same bits. cos and sin get no gradient.

With N = L x B x H x E elements of s bytes, a forward moves 2 N s bytes and does 7 N FLOPs, a backward moves 3 N s and
does 12 N. The table is read once per token, not per head. Partial sums of dw add at most 2 x 2112 E bytes.

The kernels keep to the subset that triton-ascend compiles too: no CUDA-only intrinsics, no inline assembly, no atomics,
power-of-two blocks, explicit masks. Their speed on a device is unmeasured. The tests run them in Triton's interpreter
and compile them for sm_90.
"""

import torch
import triton
import triton.language as tl

TILE = 2048  # elements of x a program holds
FORWARD_PROGRAMS = 4096  # each strides over the tokens
BACKWARD_PROGRAMS = 528  # the same, and each keeps one row of dw: 4 for each of the 132 processors of an H100 or H200


def norm_rotary_half(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """Normalises every head, n = x / sqrt(mean(x^2) + eps) * weight, and rotates it: n * cos + cat(-n_2, n_1) * sin, in
    fp32.

    x [L, B, H, E] fp32, bf16 or fp16, strided or not; weight [E] of those dtypes; cos and sin [L or 1, B or 1, 1, E]
    fp32, of one shape -> [L, B, H, E] contiguous, in x's dtype. Differentiable in x and weight.
    """
    if x.dim() != 4 or x.shape[3] % 2:
        raise ValueError(f"x is {list(x.shape)}; expected [L, B, H, E] with E even")
    if weight.shape != x.shape[3:]:
        raise ValueError(f"weight is {list(weight.shape)}, x {list(x.shape)}; expected weight [E] for x [L, B, H, E]")
    for name, t in (("x", x), ("weight", weight)):
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {t.dtype}; expected torch.float32, bfloat16 or float16")
    L, B, _, E = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() == 4 and table.shape[0] in (1, L) and table.shape[1] in (1, B) and table.shape[2:] == (1, E)
        if not fits or table.dtype != torch.float32:
            raise ValueError(
                f"{name} is {table.dtype} {list(table.shape)}, x {list(x.shape)}; "
                f"expected torch.float32 [L or 1, B or 1, 1, {E}]"
            )
    if cos.shape != sin.shape:
        raise ValueError(f"sin is {list(sin.shape)}, cos {list(cos.shape)}; expected one shape")
    return _NormRotaryHalf.apply(x, weight, cos, sin, eps)


class _NormRotaryHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, cos, sin, eps):
        x = _unit(x)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inverse = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)  # r
        grid, sizes = _tiling(x, FORWARD_PROGRAMS)
        L, _, H, _ = x.shape
        tables, table_strides = _tables(cos, sin, x)
        _forward_kernel[grid](
            x, weight.contiguous(), *tables, y, inverse, L, H, eps, *x.stride()[:3], *table_strides, **sizes
        )
        ctx.save_for_backward(x, weight, cos, sin, inverse)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, cos, sin, inverse = ctx.saved_tensors
        dy = _unit(dy)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grid, sizes = _tiling(x, BACKWARD_PROGRAMS)
        L, B, H, E = x.shape
        partial = torch.empty(grid[0] * B, E, dtype=torch.float32, device=x.device)  # dw of each program's tokens
        tables, table_strides = _tables(cos, sin, x)
        pointers = dy, x, weight.contiguous(), *tables, inverse, dx, partial
        strides = *dy.stride()[:3], *x.stride()[:3], *table_strides
        _backward_kernel[grid](*pointers, L, H, *strides, **sizes)
        return dx, partial.sum(0).to(weight.dtype), None, None, None


def _unit(t):
    """Returns t with a contiguous last dimension, copied only if t has none."""
    return t if t.stride(3) == 1 else t.contiguous()


def _tables(cos, sin, x):
    """Returns cos and sin, and the strides along tokens and samples of both: 0 where a table is shared."""
    cos, sin = (t.contiguous().expand(*x.shape[:2], 1, -1) for t in (cos, sin))
    return (cos, sin), cos.stride()[:2]


def _tiling(x, most):
    """Returns the grid (programs along the tokens, B), and the sizes of a tile: twice [HEADS, PAIRS] elements. E is a
    constant, so that the mask of a full tile vanishes. With 2 warps, for 8 heads of 128, the table would pass through
    shared memory."""
    L, B, H, E = x.shape
    PAIRS = triton.next_power_of_2(E // 2)
    HEADS = min(triton.next_power_of_2(H), max(1, TILE // (2 * PAIRS)))
    return (min(L, triton.cdiv(most, max(B, 1))), B), {"E": E, "HEADS": HEADS, "PAIRS": PAIRS, "num_warps": 4}


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    inverse_ptr,
    L,
    H,
    eps,
    x_l,
    x_b,
    x_h,
    table_l,
    table_b,
    E: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    b, B = tl.program_id(1).to(tl.int64), tl.num_programs(1)  # a tensor may hold more than 2^31 elements
    half: tl.constexpr = E // 2
    cols = tl.arange(0, PAIRS)[None, :]
    inside = cols < half
    w1 = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(weight_ptr + half + cols, mask=inside, other=0.0).to(tl.float32)
    for token in range(tl.program_id(0), L, tl.num_programs(0)):
        l = tl.cast(token, tl.int64)
        cos, sin = cos_ptr + l * table_l + b * table_b + cols, sin_ptr + l * table_l + b * table_b + cols
        cos1, cos2 = tl.load(cos, mask=inside, other=0.0), tl.load(cos + half, mask=inside, other=0.0)
        sin1, sin2 = tl.load(sin, mask=inside, other=0.0), tl.load(sin + half, mask=inside, other=0.0)
        head = (l * B + b) * H  # of y and inverse, which are contiguous
        for first in range(0, H, HEADS):
            heads = first + tl.arange(0, HEADS)
            mask = (heads < H)[:, None] & inside
            x = x_ptr + l * x_l + b * x_b + heads[:, None] * x_h + cols
            x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
            x2 = tl.load(x + half, mask=mask, other=0.0).to(tl.float32)
            inverse = 1.0 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / E + eps)
            tl.store(inverse_ptr + head + heads, inverse, mask=heads < H)
            u1, u2 = x1 * inverse[:, None] * w1, x2 * inverse[:, None] * w2
            y = y_ptr + head * E + heads[:, None] * E + cols
            tl.store(y, (u1 * cos1 - u2 * sin1).to(y_ptr.dtype.element_ty), mask=mask)
            tl.store(y + half, (u2 * cos2 + u1 * sin2).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    inverse_ptr,
    dx_ptr,
    partial_ptr,
    L,
    H,
    dy_l,
    dy_b,
    dy_h,
    x_l,
    x_b,
    x_h,
    table_l,
    table_b,
    E: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    b, B = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    half: tl.constexpr = E // 2
    cols = tl.arange(0, PAIRS)[None, :]
    inside = cols < half
    w1 = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(weight_ptr + half + cols, mask=inside, other=0.0).to(tl.float32)
    dw1, dw2 = tl.zeros([HEADS, PAIRS], dtype=tl.float32), tl.zeros([HEADS, PAIRS], dtype=tl.float32)
    for token in range(tl.program_id(0), L, tl.num_programs(0)):
        l = tl.cast(token, tl.int64)
        cos, sin = cos_ptr + l * table_l + b * table_b + cols, sin_ptr + l * table_l + b * table_b + cols
        cos1, cos2 = tl.load(cos, mask=inside, other=0.0), tl.load(cos + half, mask=inside, other=0.0)
        sin1, sin2 = tl.load(sin, mask=inside, other=0.0), tl.load(sin + half, mask=inside, other=0.0)
        head = (l * B + b) * H
        for first in range(0, H, HEADS):
            heads = first + tl.arange(0, HEADS)
            mask = (heads < H)[:, None] & inside
            dy = dy_ptr + l * dy_l + b * dy_b + heads[:, None] * dy_h + cols
            dy1 = tl.load(dy, mask=mask, other=0.0).to(tl.float32)
            dy2 = tl.load(dy + half, mask=mask, other=0.0).to(tl.float32)
            x = x_ptr + l * x_l + b * x_b + heads[:, None] * x_h + cols
            inverse = tl.load(inverse_ptr + head + heads, mask=heads < H, other=0.0)[:, None]
            n1 = tl.load(x, mask=mask, other=0.0).to(tl.float32) * inverse
            n2 = tl.load(x + half, mask=mask, other=0.0).to(tl.float32) * inverse
            g1, g2 = dy1 * cos1 + dy2 * sin2, dy2 * cos2 - dy1 * sin1
            dw1 += g1 * n1
            dw2 += g2 * n2
            d1, d2 = g1 * w1, g2 * w2
            along = (tl.sum(d1 * n1 + d2 * n2, axis=1) / E)[:, None]
            dx = dx_ptr + head * E + heads[:, None] * E + cols
            tl.store(dx, (inverse * (d1 - n1 * along)).to(dx_ptr.dtype.element_ty), mask=mask)
            tl.store(dx + half, (inverse * (d2 - n2 * along)).to(dx_ptr.dtype.element_ty), mask=mask)
    cols = tl.arange(0, PAIRS)
    partial = partial_ptr + (tl.program_id(0) * B + b) * E + cols
    tl.store(partial, tl.sum(dw1, axis=0), mask=cols < half)
    tl.store(partial + half, tl.sum(dw2, axis=0), mask=cols < half)
