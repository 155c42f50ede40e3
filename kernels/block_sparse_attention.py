"""Attention over chosen blocks of keys (`common.ops.select_blocks` chooses).

out[i] = sum_j p[i, j] v[j],  p[i, :] = softmax over the keys j of the kept blocks of row i of q[i] . k[j] / sqrt(E)

The kernels are
FlashAttention-2's (arXiv 2307.08691) with its loop over all key blocks replaced by one over a list:

  forward  per tile of queries: m = running max, l = running sum of exp, out = sum / l, lse = m + log l
  dq       per tile of queries: p = exp(s - lse), ds = p (dout . v - delta), delta = dout . out, dq = ds k / sqrt(E)
  dk, dv   per tile of keys, over the heads of its group and the query blocks that keep it: dv = p^T dout,
           dk = ds^T q / sqrt(E)

Unusual: the lists (kept columns of each row, and rows of each column) are made on the device by a sort of the mask, so
a masked block costs nothing and nothing waits for a count; the backward has one writer per element, without atomics,
also where several query heads share a key head; the exponentials are powers of two, the change of base being in the
scale.

Per kept block of b queries and b keys, s bytes an element: 4 b^2 E FLOPs in the forward, 14 b^2 E in the backward (3
products for dq, 4 for dk and dv). Each of the b / TILE tiles of a block reads k and v in the forward, 2 b E s bytes,
and in the backward those for dq, q and dout for dk and dv, 4 b E s, mostly from the cache. What a tile keeps passes
once.

Written in the subset that triton-ascend compiles as well (no CUDA-only intrinsics, no inline assembly, no atomics,
power-of-two blocks, explicit masks). Unmeasured on a device so far; checked by the interpreter.
"""

import torch
import triton
import triton.language as tl

TILE_BYTES = 128  # times the head dim: tiles of 64 tokens, of 32 in fp32


def block_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, block: int = 128
) -> torch.Tensor:
    """softmax(q k^T / sqrt(E)) v over the blocks where mask is True. Differentiable in q, k and v.

    q [B, H, Lq, E], k and v [B, K, Lk, E] of one dtype, H a multiple of K; mask bool [B, H, Lq/block, Lk/block], both
    rounded up -> [B, H, Lq, E], contiguous. Queries that keep no block give zeros. block is a power of two from 16 on.
    Views are copied: that is linear in L, the attention is not.
    """
    _check_qkv(q, k, v)
    if block < 16 or block & (block - 1):
        raise ValueError(f"block is {block}; expected a power of two from 16 on")
    shape = (*q.shape[:2], triton.cdiv(q.shape[2], block), triton.cdiv(k.shape[2], block))
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}; expected bool {list(shape)} for block {block}")
    return _BlockSparseAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), mask, block)


def _check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"{shapes}; expected [B, H, Lq, E] and twice [B, K, Lk, E]")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{shapes}; expected query heads in a multiple of the key heads, not {q.shape[1]} of {k.shape[1]}"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; expected one dtype, fp32, bf16 or fp16")


class _BlockSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, block):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        if out.numel():
            grid, sizes = _launch(q, k, block)
            _forward_kernel[grid](q, k, v, out, lse, *_lists(mask), **sizes)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.block = block
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, mask = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        if out.numel():
            dout, delta = dout.contiguous(), torch.empty_like(lse)
            grid, sizes = _launch(q, k, ctx.block)
            _dq_kernel[grid](q, k, v, out, dout, lse, delta, dq, *_lists(mask), **sizes)
            grid = (triton.cdiv(k.shape[2], sizes["TILE"]), k.shape[0] * k.shape[1])
            _dkv_kernel[grid](q, k, v, dout, lse, delta, dk, dv, *_lists(mask.transpose(-1, -2)), **sizes)
        return dq, dk, dv, None, None


def _lists(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """mask [..., rows, columns] -> int32 [..., rows, columns], the columns each row keeps and then the others, both in
    order; int32 [..., rows], how many it keeps"""
    mask = mask.contiguous()  # a sort keeps the strides of a transposed mask
    columns = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return columns.int(), mask.sum(-1, dtype=torch.int32)


def _launch(q: torch.Tensor, k: torch.Tensor, block: int) -> tuple[tuple[int, int], dict]:
    """The grid over queries, and the arguments that all three kernels share."""
    B, H, Lq, E = q.shape
    tile = min(block, TILE_BYTES // q.element_size())
    operand = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[q.dtype]
    if not isinstance(_forward_kernel, triton.JITFunction):
        operand = tl.float32  # the interpreter would multiply the bits of bf16, and cuts where a device rounds
    sizes = dict(
        scale=E**-0.5, H=H, K=k.shape[1], Lq=Lq, Lk=k.shape[2], E=E,
        E_PAD=max(16, triton.next_power_of_2(E)), BLOCK=block, TILE=tile, OPERAND=operand,
        num_warps=8,  # with 4 the dk and dv of E = 128 do not fit in registers
    )  # fmt: skip
    return (triton.cdiv(Lq, tile), B * H), sizes


@triton.jit
def _offsets(head, first, L, E: tl.constexpr, E_PAD: tl.constexpr, TILE: tl.constexpr):
    """Offsets of tokens first, ..., first + TILE - 1 of one head in [heads, L, E], and which of them exist."""
    tokens = first + tl.arange(0, TILE)
    e = tl.arange(0, E_PAD)
    offsets = head.to(tl.int64) * L * E + tokens[:, None] * E + e[None, :]
    return offsets, (tokens[:, None] < L) & (e[None, :] < E)


@triton.jit
def _dot(a, b, OPERAND: tl.constexpr):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision="ieee")


@triton.jit
def _forward_kernel(
    q, k, v, out, lse, lists, counts, scale, H, K, Lq, Lk,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)  # of B * H
    kv_head = head // (H // K)
    first = tl.program_id(0) * TILE
    row = head * tl.cdiv(Lq, BLOCK) + first // BLOCK
    columns = lists + row.to(tl.int64) * tl.cdiv(Lk, BLOCK)

    here, exists = _offsets(head, first, Lq, E, E_PAD, TILE)
    queries = tl.load(q + here, mask=exists, other=0.0)
    peak = tl.full([TILE], -float("inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    summed = tl.zeros([TILE, E_PAD], tl.float32)
    for i in range(0, tl.load(counts + row) * (BLOCK // TILE)):
        # a block's first tile always holds a key, so the maximum is finite before a tile behind the end is met
        there = tl.load(columns + i // (BLOCK // TILE)) * BLOCK + i % (BLOCK // TILE) * TILE
        at, present = _offsets(kv_head, there, Lk, E, E_PAD, TILE)
        keys = tl.load(k + at, mask=present, other=0.0)
        values = tl.load(v + at, mask=present, other=0.0)
        logits = _dot(queries, tl.trans(keys), OPERAND) * (scale * 1.4426950408889634)  # log2(e)
        logits = tl.where(there + tl.arange(0, TILE)[None, :] < Lk, logits, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        p = tl.exp2(logits - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        summed = summed * shrink[:, None] + _dot(p, values, OPERAND)
        peak = new_peak
    total = tl.where(total > 0, total, 1.0)  # a row without blocks: 0 / 1
    tl.store(out + here, (summed / total[:, None]).to(out.dtype.element_ty), mask=exists)
    tokens = first + tl.arange(0, TILE)
    tl.store(lse + head.to(tl.int64) * Lq + tokens, peak + tl.log2(total), mask=tokens < Lq)  # to the base 2


@triton.jit
def _dq_kernel(
    q, k, v, out, dout, lse, delta, dq, lists, counts, scale, H, K, Lq, Lk,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    kv_head = head // (H // K)
    first = tl.program_id(0) * TILE
    row = head * tl.cdiv(Lq, BLOCK) + first // BLOCK
    columns = lists + row.to(tl.int64) * tl.cdiv(Lk, BLOCK)

    here, exists = _offsets(head, first, Lq, E, E_PAD, TILE)
    queries = tl.load(q + here, mask=exists, other=0.0)
    gradients = tl.load(dout + here, mask=exists, other=0.0)
    outputs = tl.load(out + here, mask=exists, other=0.0)
    tokens = first + tl.arange(0, TILE)
    statistics = head.to(tl.int64) * Lq + tokens
    log_total = tl.load(lse + statistics, mask=tokens < Lq, other=0.0)
    along = tl.sum(gradients.to(tl.float32) * outputs.to(tl.float32), 1)
    tl.store(delta + statistics, along, mask=tokens < Lq)  # for _dkv_kernel, which runs next
    result = tl.zeros([TILE, E_PAD], tl.float32)
    for i in range(0, tl.load(counts + row) * (BLOCK // TILE)):
        there = tl.load(columns + i // (BLOCK // TILE)) * BLOCK + i % (BLOCK // TILE) * TILE
        at, present = _offsets(kv_head, there, Lk, E, E_PAD, TILE)
        keys = tl.load(k + at, mask=present, other=0.0)
        values = tl.load(v + at, mask=present, other=0.0)
        logits = _dot(queries, tl.trans(keys), OPERAND) * (scale * 1.4426950408889634)
        # a logit of 0 behind the end may lie far above log_total: its p would be inf, and inf times a zero key NaN
        logits = tl.where(there + tl.arange(0, TILE)[None, :] < Lk, logits, -float("inf"))
        p = tl.exp2(logits - log_total[:, None])
        dlogits = p * (_dot(gradients, tl.trans(values), OPERAND) - along[:, None])
        result += _dot(dlogits, keys, OPERAND)
    tl.store(dq + here, (result * scale).to(dq.dtype.element_ty), mask=exists)


@triton.jit
def _dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, lists, counts, scale, H, K, Lq, Lk,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)  # of B * K
    first = tl.program_id(0) * TILE
    at, present = _offsets(kv_head, first, Lk, E, E_PAD, TILE)
    keys = tl.load(k + at, mask=present, other=0.0)
    values = tl.load(v + at, mask=present, other=0.0)
    dkeys = tl.zeros([TILE, E_PAD], tl.float32)
    dvalues = tl.zeros([TILE, E_PAD], tl.float32)
    for member in range(0, H // K):
        head = kv_head * (H // K) + member
        column = head * tl.cdiv(Lk, BLOCK) + first // BLOCK
        rows = lists + column.to(tl.int64) * tl.cdiv(Lq, BLOCK)
        for i in range(0, tl.load(counts + column) * (BLOCK // TILE)):
            there = tl.load(rows + i // (BLOCK // TILE)) * BLOCK + i % (BLOCK // TILE) * TILE
            here, exists = _offsets(head, there, Lq, E, E_PAD, TILE)
            queries = tl.load(q + here, mask=exists, other=0.0)
            gradients = tl.load(dout + here, mask=exists, other=0.0)  # zeros behind the end: they add nothing below
            tokens = there + tl.arange(0, TILE)
            statistics = head.to(tl.int64) * Lq + tokens
            log_total = tl.load(lse + statistics, mask=tokens < Lq, other=0.0)
            along = tl.load(delta + statistics, mask=tokens < Lq, other=0.0)
            logits = _dot(keys, tl.trans(queries), OPERAND) * (scale * 1.4426950408889634)  # [keys, queries]
            p = tl.exp2(logits - log_total[None, :])  # of keys behind the end too, perhaps inf: not stored below
            dvalues += _dot(p, gradients, OPERAND)
            dlogits = p * (_dot(values, tl.trans(gradients), OPERAND) - along[None, :])
            dkeys += _dot(dlogits, queries, OPERAND)
    tl.store(dk + at, (dkeys * scale).to(dk.dtype.element_ty), mask=present)
    tl.store(dv + at, dvalues.to(dv.dtype.element_ty), mask=present)
