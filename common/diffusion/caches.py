"""Pieces of what makes sampling cheaper at a price in quality. The recipe puts them around its own blocks.

- reuse: a value is computed at every `interval`-th step and reused in between.
- window order: the order of tokens in which sparse attention leaves out blocks of them.
- int8: linears keep weights of one byte, with a scale per output channel.

They read from a `Moment` where the sampler is, and count nothing themselves. A cached value is keyed by branch of guidance,
video and the step it was computed at, and each block has a `Reuse` of its own, so no value is taken for another.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from common import parallel

WINDOW = 8  # side, in tokens, of the spatial windows of sparse attention


@dataclass
class Moment:
    """Where the sampler is. It writes, the modules here read."""

    video: int = -1
    step: int = 0
    branch: int = 0  # of the guidance: 0 with the prompt, 1 without


# ---- caches ----


@dataclass
class Schedule:
    """Values are kept from step `start` on at every `interval`-th step. They are given back at the steps between, up to
    and including `end` (MindIE-SD's rule)."""

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


# ---- sparse attention ----


def window_order(frames: int, rows: int, columns: int) -> torch.Tensor:
    """Token indices [F*H*W], frame by frame, within a frame by 8x8 windows (smaller at the far edges), row by row."""
    t, y, x = torch.meshgrid(*(torch.arange(n) for n in (frames, rows, columns)), indexing="ij")
    place = t
    for value, values in ((y // WINDOW, rows), (x // WINDOW, columns), (y % WINDOW, WINDOW), (x % WINDOW, WINDOW)):
        place = place * values + value
    return place.flatten().argsort()


# ---- int8 ----


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


def quantize(blocks: Iterable[nn.Module]) -> None:
    """Keep the weights of the blocks' parallel linears as int8. Biases and norms stay as they are."""
    for block in blocks:
        for linear in [m for m in block.modules() if isinstance(m, (parallel.ColumnLinear, parallel.RowLinear))]:
            linear.weight.requires_grad_(False)
            parametrize.register_parametrization(linear, "weight", Int8Weight(linear.weight.dtype))
