"""Methods that make sampling cheaper and lower its quality. `apply` puts small modules around the model's own.

- cache attention: computes a block's self-attention at every `interval`-th step and reuses its output in between.
- cache blocks: does the same with what a run of blocks adds to its input.
- sparse: each block of queries attends only to the key blocks with the highest scores (RainFusion's rule, MindIE-SD's
  v2).

common/diffusion/caches.py decides when a value is reused, and has the order of tokens and the int8 weights.
"""

import torch
from torch import nn

from common import device, ops, parallel
from common.diffusion.caches import Reuse, SamplerPosition, Schedule, window_order

from .config import WanConfig
from .model import WanDiT
from .options import InferOptions

BLOCK = 128  # tokens per block of sparse attention: two windows of 8x8


def apply(chunks: list[nn.Module], o: InferOptions, config: WanConfig, grid: tuple[int, int, int]) -> SamplerPosition:
    """Puts the modules that `o` asks for around the blocks of `chunks`, for latents of one grid (F, H, W). Weights must
    be loaded and FSDP applied before. Returns the position to sample with."""
    position, schedule = SamplerPosition(), Schedule(o.cache_start, o.cache_interval, o.cache_end)
    for chunk in map(parallel.unwrapped, chunks):
        for block in chunk.blocks.values() if o.sparse else ():
            block.self_attn.attend = SparseAttention(grid, config, o.sparse, o.sparse_start, position)
        if o.cache == "attention":
            cache_attention(chunk, schedule, position)
        if o.cache == "blocks":
            cache_blocks(chunk, o.cached_blocks(config.num_layers), schedule, position)
        for module in chunk.modules() if o.compile else ():
            if isinstance(module, SparseAttention | CachedAttention):  # takes different paths at different steps
                module.forward = torch.compiler.disable(module.forward, recursive=False)
    return position


# ---- caches ----


class CachedAttention(nn.Module):
    """Computes a block's self-attention at some steps and reuses its output at the others."""

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
    """Runs consecutive blocks at some steps; at the others adds again what they added to their input."""

    def __init__(self, blocks: list[nn.Module], reuse: Reuse):
        super().__init__()
        self.blocks, self.reuse = nn.ModuleList(blocks), reuse

    def forward(self, x: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        """x [L(/tp), B, D] and the other arguments of `WanBlock.forward` -> [L(/tp), B, D]."""
        added = self.reuse.get()
        if added is not None:
            return x + added
        y = x
        for block in self.blocks:
            y = block(y, *rest)
        self.reuse.put(y - x)
        return y


def cache_attention(chunk: WanDiT, schedule: Schedule, position: SamplerPosition) -> None:
    """Caches the self-attention of each block of this chunk."""
    for block in chunk.blocks.values():
        block.self_attn = CachedAttention(block.self_attn, Reuse(schedule, position))


def cache_blocks(chunk: WanDiT, run: range, schedule: Schedule, position: SamplerPosition) -> None:
    """Replaces the blocks of `run` that this chunk holds by one CachedBlocks, in the place of the first."""
    names = [str(i) for i in run if str(i) in chunk.blocks]
    if names:
        cached = CachedBlocks([chunk.blocks[i] for i in names], Reuse(schedule, position))
        for i in names[1:]:
            del chunk.blocks[i]
        chunk.blocks[names[0]] = cached


# ---- sparse attention ----


class SparseAttention(nn.Module):
    """Self-attention that skips the share `sparse` of the key blocks of each query block, from step `start` on.

    Tokens are sorted by 8x8 windows within a frame, so that a block of 128 tokens is two neighbouring windows. All
    queries attend to the blocks of the first frame, and these attend to all keys.
    """

    def __init__(
        self, grid: tuple[int, int, int], config: WanConfig, sparse: float, start: int, position: SamplerPosition
    ):
        super().__init__()
        self.keep, self.start, self.position = 1 - sparse, start, position
        frames, rows, columns = (n // p for n, p in zip(grid, config.patch_size, strict=True))
        self.first_frame = rows * columns
        order = window_order(frames, rows, columns).to(device.current())
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", order.argsort(), persistent=False)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v and the result [L/cp, B, N, E]. Under Ulysses every rank sees all tokens of its heads."""
        if self.position.step < self.start:
            return parallel.context_parallel_attention(q, k, v)
        group = parallel.mpu.get_context_parallel_group()
        if group.size() > 1:
            q, k, v = parallel.scatter_heads(q, k, v, group)  # [L, B, N/cp, E]
        q, k, v = (t[self.order] for t in (q, k, v))
        blocks = ops.select_blocks(q, k, self.keep, BLOCK, self.first_frame, self.first_frame)
        out = ops.block_sparse_attention(q, k, v, blocks, BLOCK)[self.back]
        return parallel.gather_heads(out, group) if group.size() > 1 else out
