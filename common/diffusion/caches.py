"""Parts that make sampling cheaper at some cost in quality. The recipe puts them around its own blocks.

- reuse: a value is computed at every `interval`-th step and reused at the steps between.
- window order: the order of tokens in which sparse attention leaves out blocks of tokens.
- int8: linears keep weights of one byte, with a scale per output channel.

They read which step and branch it is from a `SamplerPosition`, and count nothing themselves. A cached value is keyed by
the guidance branch, the video and the step at which it was computed. Each block has its own `Reuse`, so values never
mix.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from common import parallel

WINDOW = 8  # side, in tokens, of the spatial windows of sparse attention


@dataclass
class SamplerPosition:
    """The sampler's position. The sampler writes it; the modules here read it."""

    video: int = -1
    step: int = 0
    branch: int = 0  # guidance branch: 0 with the prompt, 1 without


# ---- caches ----


@dataclass
class Schedule:
    """From step `start` on, values are kept at every `interval`-th step and reused at the steps between, up to and
    including `end` (MindIE-SD's rule)."""

    start: int | None
    interval: int | None
    end: int | None


class Reuse:
    """The last computed value of each branch, and the rule for its reuse."""

    def __init__(self, schedule: Schedule, position: SamplerPosition):
        self.schedule, self.position = schedule, position
        self.kept: dict[int, tuple[int, int, torch.Tensor]] = {}  # branch -> video, step, value

    def get(self) -> torch.Tensor | None:
        """Returns the value to reuse at this position, or None if it must be computed."""
        plan, now = self.schedule, self.position
        age = (now.step - plan.start) % plan.interval
        if not plan.start < now.step <= plan.end or age == 0 or now.branch not in self.kept:
            return None
        video, step, value = self.kept[now.branch]
        return value if (video, step) == (now.video, now.step - age) else None

    def put(self, value: torch.Tensor) -> None:
        """Keeps a computed value if a later step may reuse it; drops the value that it replaces."""
        plan, now = self.schedule, self.position
        self.kept.pop(now.branch, None)
        if plan.interval > 1 and plan.start <= now.step < plan.end:
            self.kept[now.branch] = now.video, now.step, value


# ---- sparse attention ----


def window_order(frames: int, rows: int, columns: int) -> torch.Tensor:
    """Returns token indices [F*H*W] by frame, then by 8x8 window (smaller at the far edges), each row by row."""
    t, y, x = torch.meshgrid(*(torch.arange(n) for n in (frames, rows, columns)), indexing="ij")
    place = t
    for value, values in ((y // WINDOW, rows), (x // WINDOW, columns), (y % WINDOW, WINDOW), (x % WINDOW, WINDOW)):
        place = place * values + value
    return place.flatten().argsort()


# ---- int8 ----


class Int8Weight(nn.Module):
    """Keeps a linear's weight [outputs, inputs] as int8, rounded to nearest, times an fp32 scale per output.

    It is a parametrisation: the linear still reads `weight`, which is computed from the bytes at every read. This saves
    memory, not time. Under tensor parallelism each rank rounds its own slice.
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
    """Keeps the weights of the blocks' parallel linears as int8. Biases and norms do not change."""
    for block in blocks:
        for linear in [m for m in block.modules() if isinstance(m, (parallel.ColumnLinear, parallel.RowLinear))]:
            linear.weight.requires_grad_(False)
            parametrize.register_parametrization(linear, "weight", Int8Weight(linear.weight.dtype))
