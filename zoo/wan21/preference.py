"""Preferences for Wan2.1: the error of a video, and the model that training is compared with. The loss is in
common/diffusion/preference.py; with --weighting bell both errors are times the weight of the timestep (the paper has none,
nor has dpo_*.sh by default).

With adapters the reference is the same model with their scale at 0. Else it is a frozen second copy, 2 bytes a parameter
(fp32: 4) over tp and pp (and dp under FSDP).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from common import parallel
from common import train as loop
from common.diffusion.preference import mean_loss, sum_over_tokens, without_adapters
from common.margins import Margins

from . import convert
from .config import WanConfig
from .model import WanBlock, build, draw, velocity_tokens
from .options import TrainOptions


def errors(output: torch.Tensor, batch: dict, chunk: torch.nn.Module) -> torch.Tensor:
    """Mean squared error of the predicted velocity of each video, fp32 [B], whole on every rank. output: this rank's
    tokens [L(/cp)(/tp), B, C*patch]."""
    target = velocity_tokens(batch["target"], chunk.wan.patch_size)  # [L, B, C*patch]
    error = (output.float() - parallel.local_tokens(target, chunk.config)).square().sum((0, 2))
    error = error / (target.shape[0] * target.shape[2]) * batch["weight"]
    return sum_over_tokens(error, chunk.config)


def predict(batch: dict, model: torch.nn.Module) -> torch.Tensor:
    return model(batch["x"], batch["t"], batch["text"], batch.get("y"), batch.get("image"))


def forward_step(o: TrainOptions, margins: Margins, iterator: Iterator[dict], model: torch.nn.Module):
    """One micro-batch through one model chunk, as megatron-core's schedules want it once o and margins are given."""
    batch, chunk = next(iterator), parallel.unwrapped(model)

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return mean_loss(o, margins, errors(output, batch, chunk), batch["reference"], chunk.config)

    return predict(batch, model), loss


@torch.no_grad()
def measure(o: TrainOptions, sequence_length: Callable, chunks: list[torch.nn.Module], batches: list[dict]) -> list:
    """`errors` of each micro-batch; nothing on the earlier pipeline stages."""

    def step(iterator: Iterator[dict], model: torch.nn.Module):
        batch, chunk = next(iterator), parallel.unwrapped(model)
        return predict(batch, model), lambda output: (output.sum(), {"errors": errors(output, batch, chunk)})

    length = sequence_length(batches)
    results = loop.forward(chunks, step, batches, micro_batch=o.micro_batch, sequence_length=length, backward=False)
    return [result["errors"] for result in results]


def reference_model(
    o: TrainOptions, config: WanConfig, wrapped: list[torch.nn.Module]
) -> Callable[[], AbstractContextManager[list[torch.nn.Module]]]:
    """What gives the model as training starts, for the time of a `with`."""
    if o.adapts:
        return functools.partial(without_adapters, wrapped)
    copy = build(o, config)
    convert.fill(copy, o, config, draw)
    for chunk in copy:
        chunk.requires_grad_(False)
    copy = parallel.wrap(copy, o, WanBlock) if o.fsdp else copy
    return functools.partial(contextlib.nullcontext, copy)
