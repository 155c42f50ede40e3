"""Attention over chosen blocks of keys; `common.ops.select_blocks` chooses them.

out[i] = sum_j p[i, j] v[j],  p[i, :] = softmax over the keys j of the kept blocks of row i of q[i] . k[j] / sqrt(E)

The kernels are FlashAttention-2's (arXiv 2307.08691), with the loop over all key blocks replaced by one over a list:

  forward  per tile of queries: m = running max, l = running sum of exp, out = sum / l, lse = m + log l
  dq       per tile of queries: p = exp(s - lse), ds = p (dout . v - delta), delta = dout . out, dq = ds k / sqrt(E)
  dk, dv   per tile of keys, over the heads of its group and the query blocks that keep it: dv = p^T dout,
           dk = ds^T q / sqrt(E)

Unusual: a sort of the mask makes the lists (kept columns of each row, and rows of each column) on the device, so a
masked block costs nothing and nothing waits for a count. The backward has one writer per element, without atomics, even
where several query heads share a key head. The exponentials are powers of two; the scale includes the change of base.

Per kept block of b queries and b keys, s bytes an element: 4 b^2 E FLOPs in the forward, 14 b^2 E in the backward (3
products for dq, 4 for dk and dv). In the forward, each of the b / TILE tiles of a block reads k and v, 2 b E s bytes.
In the backward it reads k and v for dq, and q and dout for dk and dv, 4 b E s bytes. Most reads come from the cache.
Each tile loads its own rows once.

The kernels keep to the subset that triton-ascend compiles too (no CUDA-only intrinsics, no inline assembly, no atomics,
power-of-two blocks, explicit masks). Their speed on a device is unmeasured; the tests run them in Triton's interpreter.
"""

import torch
import triton
import triton.language as tl

TILE_BYTES = 128  # times the head dim: tiles of 64 tokens, of 32 in fp32


def block_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, block: int = 128
) -> torch.Tensor:
    """Returns softmax(q k^T / sqrt(E)) v over the blocks where mask is True. Differentiable in q, k and v.

    q [B, H, Lq, E], k and v [B, K, Lk, E] of one dtype, H a multiple of K; mask bool [B, H, Lq/block, Lk/block], both
    rounded up -> [B, H, Lq, E], contiguous. Queries that keep no block give zeros. block is a power of two from 16 on.
    Views are copied: the copy is linear in L, the attention is not.
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
    """mask [..., rows, columns] -> int32 [..., rows, columns], in each row the columns that it keeps, then the others,
    both in order; int32 [..., rows], how many columns it keeps."""
    mask = mask.contiguous()  # a sort keeps the strides of a transposed mask
    columns = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return columns.int(), mask.sum(-1, dtype=torch.int32)


def _launch(q: torch.Tensor, k: torch.Tensor, block: int) -> tuple[tuple[int, int], dict]:
    """Returns the grid over queries, and the arguments that all three kernels share."""
    B, H, Lq, E = q.shape
    tile = min(block, TILE_BYTES // q.element_size())
    operand = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[q.dtype]
    if not isinstance(_forward_kernel, triton.JITFunction):
        operand = tl.float32  # the interpreter would multiply bf16 as bit patterns, and truncates where a device rounds
    sizes = dict(
        scale=E**-0.5, H=H, K=k.shape[1], Lq=Lq, Lk=k.shape[2], E=E,
        E_PAD=max(16, triton.next_power_of_2(E)), BLOCK=block, TILE=tile, OPERAND=operand,
        num_warps=8,  # with 4 the dk and dv of E = 128 do not fit in registers
    )  # fmt: skip
    return (triton.cdiv(Lq, tile), B * H), sizes


@triton.jit
def _offsets(head, first, L, E: tl.constexpr, E_PAD: tl.constexpr, TILE: tl.constexpr):
    """Returns offsets of tokens first, ..., first + TILE - 1 of one head in [heads, L, E], and which of them exist."""
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

    q_offsets, q_mask = _offsets(head, first, Lq, E, E_PAD, TILE)
    queries = tl.load(q + q_offsets, mask=q_mask, other=0.0)
    peak = tl.full([TILE], -float("inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, E_PAD], tl.float32)
    for i in range(0, tl.load(counts + row) * (BLOCK // TILE)):
        # A block's first tile always holds a key. So the maximum is finite before a tile behind the end comes.
        first_key = tl.load(columns + i // (BLOCK // TILE)) * BLOCK + i % (BLOCK // TILE) * TILE
        kv_offsets, kv_mask = _offsets(kv_head, first_key, Lk, E, E_PAD, TILE)
        keys = tl.load(k + kv_offsets, mask=kv_mask, other=0.0)
        values = tl.load(v + kv_offsets, mask=kv_mask, other=0.0)
        logits = _dot(queries, tl.trans(keys), OPERAND) * (scale * 1.4426950408889634)  # log2(e)
        logits = tl.where(first_key + tl.arange(0, TILE)[None, :] < Lk, logits, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        p = tl.exp2(logits - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None] + _dot(p, values, OPERAND)
        peak = new_peak
    total = tl.where(total > 0, total, 1.0)  # a row without blocks: 0 / 1
    tl.store(out + q_offsets, (acc / total[:, None]).to(out.dtype.element_ty), mask=q_mask)
    tokens = first + tl.arange(0, TILE)
    tl.store(lse + head.to(tl.int64) * Lq + tokens, peak + tl.log2(total), mask=tokens < Lq)  # base 2


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

    q_offsets, q_mask = _offsets(head, first, Lq, E, E_PAD, TILE)
    queries = tl.load(q + q_offsets, mask=q_mask, other=0.0)
    gradients = tl.load(dout + q_offsets, mask=q_mask, other=0.0)
    outputs = tl.load(out + q_offsets, mask=q_mask, other=0.0)
    tokens = first + tl.arange(0, TILE)
    statistics = head.to(tl.int64) * Lq + tokens
    log_total = tl.load(lse + statistics, mask=tokens < Lq, other=0.0)
    delta_rows = tl.sum(gradients.to(tl.float32) * outputs.to(tl.float32), 1)
    tl.store(delta + statistics, delta_rows, mask=tokens < Lq)  # for _dkv_kernel, which runs next
    result = tl.zeros([TILE, E_PAD], tl.float32)
    for i in range(0, tl.load(counts + row) * (BLOCK // TILE)):
        first_key = tl.load(columns + i // (BLOCK // TILE)) * BLOCK + i % (BLOCK // TILE) * TILE
        kv_offsets, kv_mask = _offsets(kv_head, first_key, Lk, E, E_PAD, TILE)
        keys = tl.load(k + kv_offsets, mask=kv_mask, other=0.0)
        values = tl.load(v + kv_offsets, mask=kv_mask, other=0.0)
        logits = _dot(queries, tl.trans(keys), OPERAND) * (scale * 1.4426950408889634)
        # A logit of 0 behind the end may be far above log_total. Its p would be inf, and inf times a zero key is NaN.
        logits = tl.where(first_key + tl.arange(0, TILE)[None, :] < Lk, logits, -float("inf"))
        p = tl.exp2(logits - log_total[:, None])
        dlogits = p * (_dot(gradients, tl.trans(values), OPERAND) - delta_rows[:, None])
        result += _dot(dlogits, keys, OPERAND)
    tl.store(dq + q_offsets, (result * scale).to(dq.dtype.element_ty), mask=q_mask)


@triton.jit
def _dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, lists, counts, scale, H, K, Lq, Lk,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)  # of B * K
    first = tl.program_id(0) * TILE
    kv_offsets, kv_mask = _offsets(kv_head, first, Lk, E, E_PAD, TILE)
    keys = tl.load(k + kv_offsets, mask=kv_mask, other=0.0)
    values = tl.load(v + kv_offsets, mask=kv_mask, other=0.0)
    dkeys = tl.zeros([TILE, E_PAD], tl.float32)
    dvalues = tl.zeros([TILE, E_PAD], tl.float32)
    for member in range(0, H // K):
        head = kv_head * (H // K) + member
        column = head * tl.cdiv(Lk, BLOCK) + first // BLOCK
        rows = lists + column.to(tl.int64) * tl.cdiv(Lq, BLOCK)
        for i in range(0, tl.load(counts + column) * (BLOCK // TILE)):
            first_query = tl.load(rows + i // (BLOCK // TILE)) * BLOCK + i % (BLOCK // TILE) * TILE
            q_offsets, q_mask = _offsets(head, first_query, Lq, E, E_PAD, TILE)
            queries = tl.load(q + q_offsets, mask=q_mask, other=0.0)
            gradients = tl.load(dout + q_offsets, mask=q_mask, other=0.0)  # zeros behind the end add nothing below
            tokens = first_query + tl.arange(0, TILE)
            statistics = head.to(tl.int64) * Lq + tokens
            log_total = tl.load(lse + statistics, mask=tokens < Lq, other=0.0)
            delta_rows = tl.load(delta + statistics, mask=tokens < Lq, other=0.0)
            logits = _dot(keys, tl.trans(queries), OPERAND) * (scale * 1.4426950408889634)  # [keys, queries]
            p = tl.exp2(logits - log_total[None, :])  # may be inf for keys behind the end, which are not stored
            dvalues += _dot(p, gradients, OPERAND)
            dlogits = p * (_dot(values, tl.trans(gradients), OPERAND) - delta_rows[None, :])
            dkeys += _dot(dlogits, queries, OPERAND)
    tl.store(dk + kv_offsets, (dkeys * scale).to(dk.dtype.element_ty), mask=kv_mask)
    tl.store(dv + kv_offsets, dvalues.to(dv.dtype.element_ty), mask=kv_mask)
