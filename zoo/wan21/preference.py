"""Preference optimisation for Wan2.1: the error of a video, and the reference model. The loss of the two is in
common/diffusion/preference.py. With --weighting bell, the errors of both models are multiplied by the weight of the
timestep. The paper does not weight them, and by default dpo_*.sh does not either.

With adapters, the reference is the same model with the adapters' scale set to 0. With --full it is a frozen second
copy, which takes 2 bytes per parameter (fp32: 4), sharded over tp and pp (and over dp under FSDP).
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
    """Returns the mean squared error of each video's predicted velocity, fp32 [B], whole on every rank. output: that of
    this rank's tokens, [L(/cp)(/tp), B, C*patch]."""
    target = velocity_tokens(batch["target"], chunk.wan.patch_size)  # [L, B, C*patch]
    error = (output.float() - parallel.local_tokens(target, chunk.config)).square().sum((0, 2))
    error = error / (target.shape[0] * target.shape[2]) * batch["weight"]
    return sum_over_tokens(error, chunk.config)


def predict(batch: dict, model: torch.nn.Module) -> torch.Tensor:
    return model(batch["x"], batch["t"], batch["text"], batch.get("y"), batch.get("image"))


def forward_step(o: TrainOptions, margins: Margins, iterator: Iterator[dict], model: torch.nn.Module):
    """Runs one micro-batch through one model chunk. With o and margins bound, megatron-core's schedules call it."""
    batch, chunk = next(iterator), parallel.unwrapped(model)

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return mean_loss(o, margins, errors(output, batch, chunk), batch["reference"], chunk.config)

    return predict(batch, model), loss


@torch.no_grad()
def measure(o: TrainOptions, sequence_length: Callable, chunks: list[torch.nn.Module], batches: list[dict]) -> list:
    """Returns the `errors` of each micro-batch, or an empty list on all but the last pipeline stage."""

    def step(iterator: Iterator[dict], model: torch.nn.Module):
        batch, chunk = next(iterator), parallel.unwrapped(model)
        return predict(batch, model), lambda output: (output.sum(), {"errors": errors(output, batch, chunk)})

    length = sequence_length(batches)
    results = loop.forward(chunks, step, batches, micro_batch=o.micro_batch, sequence_length=length, backward=False)
    return [result["errors"] for result in results]


def reference_model(
    o: TrainOptions, config: WanConfig, wrapped: list[torch.nn.Module]
) -> Callable[[], AbstractContextManager[list[torch.nn.Module]]]:
    """Returns a function that makes a context manager, which yields the model as it is at the start of training."""
    if o.adapts:
        return functools.partial(without_adapters, wrapped)
    copy = build(o, config)
    convert.fill(copy, o, config, draw)
    for chunk in copy:
        chunk.requires_grad_(False)
    copy = parallel.wrap(copy, o, WanBlock) if o.fsdp else copy
    return functools.partial(contextlib.nullcontext, copy)
