"""Copies tokens of a mixture of experts into the experts' order, and sums them back with the router's weights.

permute:    rows[position[n K + k]] = tokens[n]                       dtokens[n] = sum_k drows[position[n K + k]]
unpermute:  out[n] = sum_k probs[n, k] rows[position[n K + k]]        drows[position[n K + k]] = probs[n, k] dout[n]
                                                                      dprobs[n, k] = dout[n] . rows[position[n K + k]]

`position` is the permutation of the N K copies that sorts them by expert and, within an expert, by token. This is the
contract of torch_npu's `npu_moe_token_permute`, and MegaBlocks' routing without a capacity (arXiv 2211.15841). Two
kernels do all four: a spread from tokens to rows and a sum from rows to tokens. In both, a program owns a token, so
every output element has one writer, nothing is added atomically, and the sum over k is always in the same order.

Unusual: a sum is the backward of a spread, so `permute` saves nothing but `position`.

N tokens of D elements of s bytes, K experts each: a spread reads N D s and writes N K D s bytes, and a sum does the
reverse; the backward of `unpermute` with probs reads N (K + 1) D s and writes N K D s bytes. A sum takes 2 N K D FLOPs,
that backward 3 N K D. The sort of N K expert ids is torch's.

The kernels keep to the subset that triton-ascend compiles too (no CUDA-only intrinsics, no inline assembly, no atomics,
power-of-two blocks, explicit masks). Their speed on a device is unmeasured; the tests run them in Triton's interpreter.
"""

import torch
import triton
import triton.language as tl

MAX_GRID = 65535  # programs in a launch on Ascend
MAX_BLOCK = 2048
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def permute(tokens: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens [N, D], indices [N, K] int32 or int64 expert ids -> rows [N*K, D] sorted by expert, tokens in order within
    one, and position [N*K] int32: copy k of token n is row position[n*K + k]. Differentiable in tokens."""
    if tokens.dim() != 2 or indices.dim() != 2 or len(tokens) != len(indices):
        raise ValueError(f"tokens {list(tokens.shape)} and indices {list(indices.shape)}; expected [N, D] and [N, K]")
    if tokens.dtype not in FLOATS or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"tokens are {tokens.dtype}, indices {indices.dtype}; expected fp32, bf16 or fp16, and int32 or int64"
        )
    order = indices.flatten().argsort(stable=True)
    position = torch.empty_like(order, dtype=torch.int32)
    position[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return _Permute.apply(tokens, position, indices.shape[1]), position


def unpermute(
    rows: torch.Tensor, position: torch.Tensor, probs: torch.Tensor | None, top_k: int | None = None
) -> torch.Tensor:
    """Returns out[n] = sum over k of probs[n, k] rows[position[n*K + k]], computed in fp32 and rounded once.

    rows [N*K, D], position [N*K] int32 of `permute`, probs [N, K] float -> [N, D] in the dtype of rows. Without probs
    the sum is plain and K is top_k. Differentiable in rows and probs.
    """
    K = top_k if probs is None else probs.shape[-1]
    if not K or rows.dim() != 2 or position.shape != rows.shape[:1] or len(rows) % K:
        raise ValueError(
            f"rows {list(rows.shape)}, position {list(position.shape)}, top_k {K}; expected [N*K, D], [N*K] and, where "
            "there are no probs, top_k = K"
        )
    if rows.dtype not in FLOATS or position.dtype != torch.int32:
        raise ValueError(f"rows are {rows.dtype}, position {position.dtype}; expected fp32, bf16 or fp16, and int32")
    if probs is not None and (probs.shape != (len(rows) // K, K) or top_k not in (None, K)):
        raise ValueError(
            f"probs {list(probs.shape)}, top_k {top_k}, {len(rows)} rows; expected probs [{len(rows) // K}, {K}]"
        )
    return _Unpermute.apply(rows, position.contiguous(), probs, K)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, position, K):
        ctx.save_for_backward(position)
        ctx.K = K
        return _spread(tokens, position, K)

    @staticmethod
    def backward(ctx, drows):
        return _sum(drows, *ctx.saved_tensors, None, ctx.K), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, position, probs, K):
        ctx.save_for_backward(position, *(() if probs is None else (rows, probs)))
        ctx.K = K
        return _sum(rows, position, probs, K)

    @staticmethod
    def backward(ctx, dout):
        position, *weighted = ctx.saved_tensors
        if not weighted:
            return _spread(dout, position, ctx.K), None, None, None
        drows, dprobs = _spread_weighted(dout, position, *weighted)
        return drows, None, dprobs, None


def _spread(tokens: torch.Tensor, position: torch.Tensor, K: int) -> torch.Tensor:
    tokens, (N, D) = tokens.contiguous(), tokens.shape
    rows = tokens.new_empty(N * K, D)
    if rows.numel():
        _spread_kernel[_grid(N)](
            tokens, position, rows, None, None, None, N, D, D, K=K, WEIGHTED=False, BLOCK=_block(D)
        )
    return rows


def _spread_weighted(
    dout: torch.Tensor, position: torch.Tensor, rows: torch.Tensor, probs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    (N, K), D = probs.shape, rows.shape[1]
    drows, dprobs = rows.new_empty(N * K, D), probs.new_empty(N, K)
    if dprobs.numel():
        _spread_kernel[_grid(N)](
            dout.contiguous(), position, drows, rows.contiguous(), probs.contiguous(), dprobs, N, D, D,
            K=K, WEIGHTED=True, BLOCK=_block(D),
        )  # fmt: skip
    return drows, dprobs


def _sum(rows: torch.Tensor, position: torch.Tensor, probs: torch.Tensor | None, K: int) -> torch.Tensor:
    rows, N, D = rows.contiguous(), len(rows) // K, rows.shape[1]
    out = rows.new_empty(N, D)
    if out.numel():
        probs = None if probs is None else probs.contiguous()
        _sum_kernel[_grid(N)](rows, position, probs, out, N, D, D, K=K, WEIGHTED=probs is not None, BLOCK=_block(D))
    return out


def _grid(N: int) -> tuple[int]:
    return (min(N, MAX_GRID),)


def _block(D: int) -> int:
    return min(MAX_BLOCK, triton.next_power_of_2(max(D, 1)))


@triton.jit
def _spread_kernel(
    tokens, position, rows, x, probs, dprobs, N, D, row_stride: tl.int64,
    K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rows[position[n, k]] = tokens[n]. If WEIGHTED, times probs[n, k], and also
    dprobs[n, k] = tokens[n] . x[position[n, k]]."""
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        for k in range(K):
            row = tl.load(position + n * K + k)
            if WEIGHTED:
                weight = tl.load(probs + n * K + k).to(tl.float32)
            product = tl.zeros([BLOCK], tl.float32)
            for start in range(0, D, BLOCK):
                d = start + tl.arange(0, BLOCK)
                token = tl.load(tokens + n * row_stride + d, mask=d < D, other=0.0)  # from the cache after the first k
                if WEIGHTED:
                    wide = token.to(tl.float32)
                    product += wide * tl.load(x + row * row_stride + d, mask=d < D, other=0.0).to(tl.float32)
                    token = (wide * weight).to(rows.dtype.element_ty)
                tl.store(rows + row * row_stride + d, token, mask=d < D)
            if WEIGHTED:
                tl.store(dprobs + n * K + k, tl.sum(product, 0).to(dprobs.dtype.element_ty))


@triton.jit
def _sum_kernel(
    rows, position, probs, out, N, D, row_stride: tl.int64, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """out[n] = sum over k of rows[position[n, k]], times probs[n, k] if WEIGHTED."""
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], tl.float32)
            for k in range(K):
                row = tl.load(position + n * K + k)
                x = tl.load(rows + row * row_stride + d, mask=d < D, other=0.0).to(tl.float32)
                if WEIGHTED:
                    x *= tl.load(probs + n * K + k).to(tl.float32)
                total += x
            tl.store(out + n * row_stride + d, total.to(out.dtype.element_ty), mask=d < D)
