"""Ring attention: the order of its tokens, the blocks that a rank computes, and the passing of keys and values.

Shape legend: L tokens of the whole ring, n its ranks, B batch, H heads, K heads of keys and values, E head dim of queries
and keys, V that of values.
"""

import functools

import torch
import torch.distributed as dist

from common import ops


def zigzag(x: torch.Tensor, n: int) -> torch.Tensor:
    """Reorders [L, ...] so that the r-th of n equal parts holds chunks r and 2n-1-r of 2n. This pairs an early chunk,
    whose queries see few keys, with a late one, so that causal attention is the same work for every rank."""
    if n == 1:
        return x
    if x.shape[0] % (2 * n):
        raise ValueError(
            f"{x.shape[0]} tokens do not split into 2*ring = {2 * n} chunks; expected a multiple; "
            "fix: --seq-len, --micro-batch, or fewer ranks in the ring (--cp, --ulysses)"
        )
    chunks = x.chunk(2 * n)
    return torch.cat([chunks[i] for r in range(n) for i in (r, 2 * n - 1 - r)])


def unzigzag(x: torch.Tensor, n: int) -> torch.Tensor:
    """Inverse of `zigzag`."""
    chunks = x.chunk(2 * n)
    return torch.cat([*chunks[::2], *chunks[::-1][::2]]) if n > 1 else x


@functools.lru_cache(maxsize=1024)  # the same for all layers
def ring_blocks(
    mine: int, theirs: int, n: int, held: int, causal: bool, bounds: tuple[int, ...]
) -> list[tuple[slice, slice, bool]]:
    """Returns which of the `held` queries of rank `mine` see which keys of rank `theirs` in a ring of n, as (queries,
    keys, whether the causal mask applies between them): at most one such block per document of `bounds`.

    One block is enough because ranks hold their tokens in rising order, so a document's tokens are contiguous on every
    rank. If causal, ranks r < s hold the chunks r < s < 2n-1-s < 2n-1-r: the late queries of r see all keys of s, and
    all queries of s see the early keys of r.
    """
    width = held // 2 if causal else held

    def before(rank: int, bound: int) -> int:
        """Returns how many of the rank's tokens come before token `bound`."""
        chunks = (rank, 2 * n - 1 - rank) if causal else (rank,)
        return sum(min(max(bound - chunk * width, 0), width) for chunk in chunks)

    blocks = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        first_query, last_query = before(mine, start), before(mine, end)
        first_key, last_key = before(theirs, start), before(theirs, end)
        if causal and theirs < mine:
            last_key = min(last_key, width)
        if causal and theirs > mine:
            first_query = max(first_query, width)
        if first_query < last_query and first_key < last_key:
            blocks.append((slice(first_query, last_query), slice(first_key, last_key), causal and mine == theirs))
    return blocks


class RingAttention(torch.autograd.Function):
    """Attention in which keys and values travel around the ring while each rank keeps its queries. q [B, H, L/n, E], k
    [B, K, L/n, E], v [B, K, L/n, V], in `zigzag` order if causal -> [B, H, L/n, V]. bounds (0, ..., L): of the packed
    documents, (0, L) for one. scale: as of `ops.attention`.

    The forward merges blocks by their log-sum-exp. The backward gives every block the lse of the whole row, which makes
    each block's gradient exact. The gradients of keys and values travel with their block, in fp32, back to its owner.

    A step costs one kernel call per document that has queries here and keys in the block: one if nothing is packed. A
    document that lies in one chunk has its only call in the first step; still, every block makes the whole round. With
    one document, all ranks do the same work. With short documents of mixed lengths (log-normal, mean a quarter of a
    chunk), the busiest of 4 ranks does 1.5 times the mean.
    """

    @staticmethod
    def forward(ctx, q, k, v, group, causal, bounds, scale):
        n, me = group.size(), group.rank()
        out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=torch.float32)
        lse = torch.full_like(q[..., 0], -torch.inf, dtype=torch.float32)
        block = _join(k, v)
        for step in range(n):
            incoming, wait = _pass_on(block, group) if step < n - 1 else (None, None)
            for rows, columns, masked in ring_blocks(me, (me - step) % n, n, q.shape[2], causal, bounds):
                k_, v_ = _cut(columns, *_divide(block, k, v))
                part, part_lse = ops.attention_with_lse(*_cut(rows, q), k_, v_, masked, scale)
                share = torch.sigmoid(part_lse - lse[:, :, rows]).unsqueeze(-1)  # of the sum of exponentials
                out[:, :, rows].lerp_(part.float(), share)
                lse[:, :, rows] = torch.logaddexp(lse[:, :, rows], part_lse)
            if wait:
                wait()
                block = incoming
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.causal, ctx.bounds, ctx.scale = group, causal, bounds, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        n, me, dout = ctx.group.size(), ctx.group.rank(), dout.contiguous()
        dq = torch.zeros_like(q, dtype=torch.float32)
        block = _join(k, v)
        arriving, wait_gradient = None, None
        for step in range(n):
            incoming, wait = _pass_on(block, ctx.group) if step < n - 1 else (None, None)
            added = torch.zeros_like(block, dtype=torch.float32)
            dk, dv = _divide(added, k, v)
            for rows, columns, masked in ring_blocks(me, (me - step) % n, n, q.shape[2], ctx.causal, ctx.bounds):
                (dout_, q_, out_, lse_), (k_, v_) = _cut(rows, dout, q, out, lse), _cut(columns, *_divide(block, k, v))
                dq_part, dk_part, dv_part = ops.attention_backward(dout_, q_, k_, v_, out_, lse_, masked, ctx.scale)
                dq[:, :, rows] += dq_part
                dk[:, :, columns] += dk_part
                dv[:, :, columns] += dv_part
            if step > 0:  # the gradient that earlier ranks summed has travelled while this rank computed
                wait_gradient()
                added += arriving
            dblock = added  # keeps the tensor alive while it is being sent
            arriving, wait_gradient = _pass_on(dblock, ctx.group)
            if wait:
                wait()
                block = incoming
        wait_gradient()  # after n passes the gradient is back at the block's owner
        dk, dv = _divide(arriving, k, v)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _join(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Returns keys and values, whatever their widths, as one vector: a single message."""
    return torch.cat((k.flatten(), v.flatten()))


def _divide(block: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `_join`, as views in the shapes of k and v."""
    keys, values = block.split((k.numel(), v.numel()))
    return keys.view(k.shape), values.view(v.shape)


def _cut(tokens: slice, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Cuts these tokens out of [B, H, L, ...] tensors, contiguous for the kernels (no copy if these are all tokens)."""
    return [t[:, :, tokens].contiguous() for t in tensors]


def _pass_on(x: torch.Tensor, group: dist.ProcessGroup):
    """Sends x to the next rank of the ring while receiving that of the previous rank; returns (incoming, wait)."""
    ranks, me, incoming = dist.get_process_group_ranks(group), group.rank(), torch.empty_like(x)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, ranks[(me + 1) % len(ranks)], group),
            dist.P2POp(dist.irecv, incoming, ranks[me - 1], group),
        ]
    )
    return incoming, lambda: [work.wait() for work in works]
