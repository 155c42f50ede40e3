"""The two modulations of a diffusion transformer's block (adaLN-Zero: Peebles and Xie, arXiv:2212.09748).

    layer_norm_modulate   n = (x - mean) r,  r = (var(x) + eps)^-1/2,  y = n (1 + scale) + shift
                          dx = r (g - mean(g) - n mean(g n)),  g = dy (1 + scale)
                          dscale = sum over tokens of dy n,  dshift = sum over tokens of dy
    gate_residual         out = x + y gate
                          dx = dout,  dy = dout gate,  dgate = sum over tokens of dout y

Unusual: x and y are saved in their own dtype and n is recomputed; everything between is fp32 and rounded once. Sums
over tokens take two steps, a partial sum per program and then a sum over programs, so every run gives the same bits.

With N = L x B x D elements of s bytes: layer_norm_modulate moves 2 N s bytes forward (7 N FLOPs) and 3 N s backward
(13 N); gate_residual 3 N s forward (2 N) and 3 N s backward (3 N). Partial sums add at most 4096 D bytes a sum.

The kernels keep to the subset that triton-ascend compiles too: no CUDA-only intrinsics, no inline assembly, no atomics,
power-of-two blocks, explicit masks. Their speed on a device is unmeasured. The tests run them in Triton's interpreter
and compile them for sm_90; triton-ascend 3.2.0 lowers them to linalg.
"""

import torch
import triton
import triton.language as tl

TILE, GATE_COLS = 4096, 1024  # elements a program holds of one tensor (or D if more); columns of a gate_residual tile
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 4096, 512  # each strides over the tokens; a backward one keeps partial sums


def layer_norm_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns LayerNorm(x) * (1 + scale) + shift, where LayerNorm has no affine, [L, B, D] in x's dtype.

    x [L, B, D] fp32, bf16 or fp16; scale and shift fp32 [B, D].
    """
    _check(x, scale=scale, shift=shift)
    return _LayerNormModulate.apply(x, scale, shift, eps)


def gate_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Returns x + y * gate in fp32, rounded once to x's dtype. x and y [L, B, D], gate fp32 [B, D]."""
    _check(x, gate=gate)
    _check(y, gate=gate)
    if x.shape != y.shape:
        raise ValueError(f"y is {list(y.shape)}, x {list(x.shape)}; expected the same [L, B, D]")
    return _GateResidual.apply(x, y, gate)


def _check(x, **modulations):
    if x.dim() != 3 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"tokens are {x.dtype} {list(x.shape)}; expected float32, bfloat16 or float16 [L, B, D]")
    for name, t in modulations.items():
        if t.shape != x.shape[1:] or t.dtype != torch.float32:
            raise ValueError(
                f"{name} is {t.dtype} {list(t.shape)}, tokens {list(x.shape)}; expected torch.float32 [B, D]"
            )


class _LayerNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, eps):
        x = _unit(x)
        L, B, D = x.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        mean, inverse = torch.empty(2, L, B, dtype=torch.float32, device=x.device)
        programs, sizes = _row_tiling(L, B, D, FORWARD_PROGRAMS)
        _norm_forward_kernel[programs, B](
            x, scale.contiguous(), shift.contiguous(), y, mean, inverse, L, D, eps, *x.stride()[:2], **sizes
        )
        ctx.save_for_backward(x, scale, mean, inverse)
        return y

    @staticmethod
    def backward(ctx, dy):
        dy = _unit(dy)
        x, scale, mean, inverse = ctx.saved_tensors
        L, B, D = x.shape
        programs, sizes = _row_tiling(L, B, D, BACKWARD_PROGRAMS)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dscale, dshift = torch.empty(2, programs, B, D, dtype=torch.float32, device=x.device)
        _norm_backward_kernel[programs, B](
            dy,
            x,
            scale.contiguous(),
            mean,
            inverse,
            dx,
            dscale,
            dshift,
            L,
            D,
            *dy.stride()[:2],
            *x.stride()[:2],
            **sizes,
        )
        return dx, dscale.sum(0), dshift.sum(0), None


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gate):
        x, y = _unit(x), _unit(y)
        L, B, D = x.shape
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grid, sizes = _gate_tiling(L, B, D, FORWARD_PROGRAMS)
        _gate_forward_kernel[grid](x, y, gate.contiguous(), out, L, D, *x.stride()[:2], *y.stride()[:2], **sizes)
        ctx.save_for_backward(y, gate)
        return out

    @staticmethod
    def backward(ctx, dout):
        dout = _unit(dout)
        y, gate = ctx.saved_tensors
        L, B, D = y.shape
        grid, sizes = _gate_tiling(L, B, D, BACKWARD_PROGRAMS)
        dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        dgate = torch.empty(grid[0], B, D, dtype=torch.float32, device=y.device)
        _gate_backward_kernel[grid](
            dout, y, gate.contiguous(), dy, dgate, L, D, *dout.stride()[:2], *y.stride()[:2], **sizes
        )
        return dout, dy, dgate.sum(0)


def _unit(t):
    """Returns t with a contiguous last dimension, copied only if t has none."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _row_tiling(L, B, D, most):
    """Returns programs along the tokens, and the sizes of a tile of whole rows: [ROWS, BLOCK] elements, BLOCK >= D."""
    BLOCK = triton.next_power_of_2(D)
    ROWS = max(1, TILE // BLOCK)
    sizes = {"ROWS": ROWS, "BLOCK": BLOCK, "num_warps": min(max(BLOCK // 1024, 4), 16)}
    return min(triton.cdiv(L, ROWS), triton.cdiv(most, max(B, 1))), sizes


def _gate_tiling(L, B, D, most):
    """Returns the grid (programs along the tokens, B, blocks of columns) and a tile's sizes: [ROWS, BLOCK] elements."""
    BLOCK = min(triton.next_power_of_2(D), GATE_COLS)
    ROWS, blocks = TILE // BLOCK, triton.cdiv(D, BLOCK)
    return (min(triton.cdiv(L, ROWS), triton.cdiv(most, max(B, 1) * blocks)), B, blocks), {"ROWS": ROWS, "BLOCK": BLOCK}


@triton.jit
def _norm_forward_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    mean_ptr,
    inverse_ptr,
    L,
    D,
    eps,
    x_l,
    x_b,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, B = tl.program_id(1).to(tl.int64), tl.num_programs(1)  # a tensor may hold more than 2^31 elements
    cols = tl.arange(0, BLOCK)[None, :]
    scale = 1.0 + tl.load(scale_ptr + b * D + cols, mask=cols < D, other=0.0)
    shift = tl.load(shift_ptr + b * D + cols, mask=cols < D, other=0.0)
    for start in range(tl.program_id(0) * ROWS, L, tl.num_programs(0) * ROWS):
        tokens = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (tokens < L)[:, None] & (cols < D)
        x = tl.load(x_ptr + tokens[:, None] * x_l + b * x_b + cols, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=1) / D
        centred = tl.where(mask, x - mean[:, None], 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
        tl.store(mean_ptr + tokens * B + b, mean, mask=tokens < L)
        tl.store(inverse_ptr + tokens * B + b, inverse, mask=tokens < L)
        y = centred * inverse[:, None] * scale + shift
        tl.store(y_ptr + (tokens[:, None] * B + b) * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward_kernel(
    dy_ptr,
    x_ptr,
    scale_ptr,
    mean_ptr,
    inverse_ptr,
    dx_ptr,
    dscale_ptr,
    dshift_ptr,
    L,
    D,
    dy_l,
    dy_b,
    x_l,
    x_b,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, B = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    cols = tl.arange(0, BLOCK)[None, :]
    scale = 1.0 + tl.load(scale_ptr + b * D + cols, mask=cols < D, other=0.0)
    dscale, dshift = tl.zeros([ROWS, BLOCK], dtype=tl.float32), tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, L, tl.num_programs(0) * ROWS):
        tokens = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (tokens < L)[:, None] & (cols < D)
        x = tl.load(x_ptr + tokens[:, None] * x_l + b * x_b + cols, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + tokens[:, None] * dy_l + b * dy_b + cols, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + tokens * B + b, mask=tokens < L, other=0.0)[:, None]
        inverse = tl.load(inverse_ptr + tokens * B + b, mask=tokens < L, other=0.0)[:, None]
        normed = (x - mean) * inverse  # beyond D it is not zero, but dy is
        dscale += dy * normed
        dshift += dy
        dnormed = dy * scale
        mean_gn, mean_g = tl.sum(dnormed * normed, axis=1)[:, None] / D, tl.sum(dnormed, axis=1)[:, None] / D
        dx = inverse * (dnormed - mean_g - normed * mean_gn)
        tl.store(dx_ptr + (tokens[:, None] * B + b) * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    cols = tl.arange(0, BLOCK)
    partial = (tl.program_id(0) * B + b) * D + cols
    tl.store(dscale_ptr + partial, tl.sum(dscale, axis=0), mask=cols < D)
    tl.store(dshift_ptr + partial, tl.sum(dshift, axis=0), mask=cols < D)


@triton.jit
def _gate_forward_kernel(
    x_ptr, y_ptr, gate_ptr, out_ptr, L, D, x_l, x_b, y_l, y_b, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    b, B = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    cols = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)[None, :]
    gate = tl.load(gate_ptr + b * D + cols, mask=cols < D, other=0.0)
    for start in range(tl.program_id(0) * ROWS, L, tl.num_programs(0) * ROWS):
        tokens = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (tokens < L) & (cols < D)
        x = tl.load(x_ptr + tokens * x_l + b * x_b + cols, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + tokens * y_l + b * y_b + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + (tokens * B + b) * D + cols, (x + y * gate).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate_backward_kernel(
    dout_ptr,
    y_ptr,
    gate_ptr,
    dy_ptr,
    dgate_ptr,
    L,
    D,
    dout_l,
    dout_b,
    y_l,
    y_b,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, B = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first = tl.program_id(2) * BLOCK
    cols = first + tl.arange(0, BLOCK)[None, :]
    gate = tl.load(gate_ptr + b * D + cols, mask=cols < D, other=0.0)
    dgate = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, L, tl.num_programs(0) * ROWS):
        tokens = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (tokens < L) & (cols < D)
        dout = tl.load(dout_ptr + tokens * dout_l + b * dout_b + cols, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + tokens * y_l + b * y_b + cols, mask=mask, other=0.0).to(tl.float32)
        dgate += dout * y
        tl.store(dy_ptr + (tokens * B + b) * D + cols, (dout * gate).to(dy_ptr.dtype.element_ty), mask=mask)
    cols = first + tl.arange(0, BLOCK)
    partial = (tl.program_id(0) * B + b) * D + cols
    tl.store(dgate_ptr + partial, tl.sum(dgate, axis=0), mask=cols < D)
