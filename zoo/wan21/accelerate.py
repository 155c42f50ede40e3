"""What makes sampling cheaper at a price in quality: small modules that `apply` puts around the model's own.

- cache attention: a block's self-attention output is computed at every `interval`-th step and reused in between.
- cache blocks: the same with what a run of blocks adds to its input.
- sparse: each block of queries attends to the key blocks it seems to need (RainFusion's rule, MindIE-SD's v2).

When a value is reused, the order of tokens and int8 weights are in common/diffusion/caches.py.
"""

import torch
from torch import nn

from common import device, ops, parallel
from common.diffusion.caches import Moment, Reuse, Schedule, window_order

from .config import WanConfig
from .model import WanDiT
from .options import InferOptions

BLOCK = 128  # tokens attended to or left out together: two windows of 8x8


def apply(chunks: list[nn.Module], o: InferOptions, config: WanConfig, grid: tuple[int, int, int]) -> Moment:
    """Put what `o` asks for around the blocks of `chunks` (after weights are loaded and FSDP has wrapped them), for
    latents of one grid (F, H, W). Returns the Moment to sample with."""
    moment, schedule = Moment(), Schedule(o.cache_start, o.cache_interval, o.cache_end)
    for chunk in map(parallel.unwrapped, chunks):
        for block in chunk.blocks.values() if o.sparse else ():
            block.self_attn.attend = SparseAttention(grid, config, o.sparse, o.sparse_start, moment)
        if o.cache == "attention":
            cache_attention(chunk, schedule, moment)
        if o.cache == "blocks":
            cache_blocks(chunk, o.cached_blocks(config.num_layers), schedule, moment)
        for module in chunk.modules() if o.compile else ():
            if isinstance(module, SparseAttention | CachedAttention):  # does another thing at another step
                module.forward = torch.compiler.disable(module.forward, recursive=False)
    return moment


# ---- caches ----


class CachedAttention(nn.Module):
    """A block's self-attention, computed at some steps and reused at the others."""

    def __init__(self, attention: nn.Module, reuse: Reuse):
        super().__init__()
        self.attention, self.reuse = attention, reuse

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """x [L(/tp), B, D], rope [L, 1, 1, E/2, 2] -> [L(/tp), B, D]."""
        value = self.reuse.get()
        if value is None:
            value = self.attention(x, rope)
            self.reuse.put(value)
        return value


class CachedBlocks(nn.Module):
    """A run of blocks: what they add to their input is computed at some steps and added again at the others."""

    def __init__(self, blocks: list[nn.Module], reuse: Reuse):
        super().__init__()
        self.blocks, self.reuse = nn.ModuleList(blocks), reuse

    def forward(self, x: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        """As `WanBlock.forward`: x [L(/tp), B, D], and what else a block takes -> [L(/tp), B, D]."""
        added = self.reuse.get()
        if added is not None:
            return x + added
        y = x
        for block in self.blocks:
            y = block(y, *rest)
        self.reuse.put(y - x)
        return y


def cache_attention(chunk: WanDiT, schedule: Schedule, moment: Moment) -> None:
    """Cache the self-attention of each of this chunk's blocks."""
    for block in chunk.blocks.values():
        block.self_attn = CachedAttention(block.self_attn, Reuse(schedule, moment))


def cache_blocks(chunk: WanDiT, run: range, schedule: Schedule, moment: Moment) -> None:
    """Put the blocks of `run` that this chunk holds into one CachedBlocks, in the place of the first."""
    mine = [str(i) for i in run if str(i) in chunk.blocks]
    if mine:
        together = CachedBlocks([chunk.blocks[i] for i in mine], Reuse(schedule, moment))
        for i in mine[1:]:
            del chunk.blocks[i]
        chunk.blocks[mine[0]] = together


# ---- sparse attention ----


class SparseAttention(nn.Module):
    """Self-attention that from step `start` on leaves out the share `sparse` of the key blocks of each query block.

    Tokens are put in the order of 8x8 windows within a frame, so that a block of 128 is two neighbouring windows.
    The blocks of the first frame are attended to by all queries, and attend to all keys.
    """

    def __init__(self, grid: tuple[int, int, int], config: WanConfig, sparse: float, start: int, moment: Moment):
        super().__init__()
        self.keep, self.start, self.moment = 1 - sparse, start, moment
        frames, rows, columns = (n // p for n, p in zip(grid, config.patch_size, strict=True))
        self.first_frame = rows * columns
        order = window_order(frames, rows, columns).to(device.current())
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", order.argsort(), persistent=False)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v and the result [L/cp, B, N, E]. Under Ulysses every rank sees all tokens of its heads."""
        if self.moment.step < self.start:
            return parallel.context_parallel_attention(q, k, v)
        group = parallel.mpu.get_context_parallel_group()
        if group.size() > 1:
            q, k, v = parallel.scatter_heads(q, k, v, group)  # [L, B, N/cp, E]
        q, k, v = (t[self.order] for t in (q, k, v))
        blocks = ops.select_blocks(q, k, self.keep, BLOCK, self.first_frame, self.first_frame)
        out = ops.block_sparse_attention(q, k, v, blocks, BLOCK)[self.back]
        return parallel.gather_heads(out, group) if group.size() > 1 else out
