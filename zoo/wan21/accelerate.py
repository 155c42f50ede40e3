"""What makes sampling cheaper at a price in quality: small modules that `apply` puts around the model's own.

- cache attention: a block's self-attention output is computed at every `interval`-th step and reused in between.
- cache blocks: the same with what a run of blocks adds to its input.
- sparse: each block of queries attends to the key blocks it seems to need (RainFusion's rule, MindIE-SD's v2).
- int8: the blocks' linears keep weights of one byte, with a scale per output channel.

They read where the sampler is from a `Moment` and count nothing themselves: a cached value is keyed by block, branch
of guidance, video and the step it was computed at, and is never taken for another.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from common import device, ops, parallel

from .config import WanConfig
from .model import WanBlock, WanDiT
from .options import InferOptions

BLOCK, WINDOW = 128, 8  # tokens attended to or left out together; side of the spatial windows they are made of


@dataclass
class Moment:
    """Where the sampler is; it writes, the modules here read."""

    video: int = -1
    step: int = 0
    branch: int = 0  # of the guidance: 0 with the prompt, 1 without


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


# ------------------------------------------------------------------------------------------------------------- caches


@dataclass
class Schedule:
    """Values are kept from step `start` on at every `interval`-th step and given back at the steps between, up to and
    including `end` (MindIE-SD's rule)."""

    start: int | None
    interval: int | None
    end: int | None


class Reuse:
    """The last computed value of each branch, and when it may stand for a new one."""

    def __init__(self, schedule: Schedule, moment: Moment):
        self.schedule, self.moment = schedule, moment
        self.kept: dict[int, tuple[int, int, torch.Tensor]] = {}  # branch -> video, step, value

    def get(self) -> torch.Tensor | None:
        """The value to use at this moment instead of computing; None: compute."""
        plan, now = self.schedule, self.moment
        age = (now.step - plan.start) % plan.interval
        if not plan.start < now.step <= plan.end or age == 0 or now.branch not in self.kept:
            return None
        video, step, value = self.kept[now.branch]
        return value if (video, step) == (now.video, now.step - age) else None

    def put(self, value: torch.Tensor) -> None:
        """Keep a computed value if a later step may want it; drop the one it replaces."""
        plan, now = self.schedule, self.moment
        self.kept.pop(now.branch, None)
        if plan.interval > 1 and plan.start <= now.step < plan.end:
            self.kept[now.branch] = now.video, now.step, value


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


# ---------------------------------------------------------------------------------------------------- sparse attention


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


def window_order(frames: int, rows: int, columns: int) -> torch.Tensor:
    """Token indices [F*H*W], frame by frame, within a frame by 8x8 windows (smaller at the far edges), row by row."""
    t, y, x = torch.meshgrid(*(torch.arange(n) for n in (frames, rows, columns)), indexing="ij")
    place = t
    for value, values in ((y // WINDOW, rows), (x // WINDOW, columns), (y % WINDOW, WINDOW), (x % WINDOW, WINDOW)):
        place = place * values + value
    return place.flatten().argsort()


# --------------------------------------------------------------------------------------------------------------- int8


class Int8Weight(nn.Module):
    """How a linear keeps its weight [outputs, inputs]: int8 rounded to nearest, times an fp32 scale per output.

    A parametrisation: the linear goes on reading `weight`, which is made from the bytes whenever it is read. It saves
    memory, not time. Under tensor parallelism each rank rounds the slice it holds.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, rounded: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (rounded * scale).to(self.dtype)

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        return (weight.float() / scale).round().to(torch.int8), scale


def quantize(chunks: list[nn.Module]) -> None:
    """Keep the weights of the blocks' linears as int8; biases, norms, embeddings and the head stay as they are."""
    for block in (m for chunk in chunks for m in chunk.modules() if isinstance(m, WanBlock)):
        for linear in [m for m in block.modules() if isinstance(m, (parallel.ColumnLinear, parallel.RowLinear))]:
            linear.weight.requires_grad_(False)
            parametrize.register_parametrization(linear, "weight", Int8Weight(linear.weight.dtype))
