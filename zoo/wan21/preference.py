"""What dpo_t2v.sh and dpo_i2v.sh minimise: of two videos of one caption the first is preferred (Diffusion-DPO,
arXiv:2311.12908, for flow matching).

With e(v) the mean squared error of the velocity predicted for a video v, and e_ref(v) that of the model as training
starts, both at the same timestep and with the same noise for the two videos of a pair,

    r(v)  = -beta / 2 * (e(v) - e_ref(v))                                       the implicit reward
    loss  = -log sigmoid(r(chosen) - r(rejected)) + sft_weight * e(chosen)      mean over the pairs of the global batch

(--weighting bell: e and e_ref times the weight of the timestep; the paper has none, nor has this by default). MindSpeed-MM
has the same with -beta * t in place of -beta / 2 and t in 0..1000, and a factor for the pair's scores which its published
settings make 1.

A micro-batch holds the chosen videos of its pairs, then the rejected ones: one forward serves both. The reference takes
another, without gradients. With adapters it is the same model with their scale at 0; else it is a frozen second copy,
2 bytes a parameter (fp32: 4) over tp and pp (and dp under FSDP).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu

from common import device, parallel
from common import train as loop

from . import convert
from .config import WanConfig
from .model import WanBlock, build, draw, velocity_tokens
from .options import TrainOptions

if TYPE_CHECKING:
    from .train import Batches

# --------------------------------------------------------------------------------------------------------- objective


def errors(output: torch.Tensor, batch: dict, chunk: torch.nn.Module) -> torch.Tensor:
    """Mean squared error of the predicted velocity of each video, fp32 [B], whole on every rank. output: this rank's
    tokens [L(/cp)(/tp), B, C*patch]."""
    target = velocity_tokens(batch["target"], chunk.wan.patch_size)  # [L, B, C*patch]
    error = (output.float() - parallel.local_tokens(target, chunk.config)).square().sum((0, 2))
    error = error / (target.shape[0] * target.shape[2]) * batch["weight"]
    groups = [mpu.get_context_parallel_group()] if chunk.config.context_parallel_size > 1 else []
    groups += [mpu.get_tensor_model_parallel_group()] if chunk.config.sequence_parallel else []
    whole = error.detach().clone()
    for group in groups:
        dist.all_reduce(whole, group=group)
    # Each rank goes on with the whole error. The backward hands it its own tokens' part only: gradients are summed.
    return error + (whole - error.detach())


def pair_losses(o: TrainOptions, error: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, reward margins) [P] of the errors [2P] of P chosen and then P rejected videos."""
    chosen, rejected = (-o.beta / 2 * (error - reference)).chunk(2)
    margin = chosen - rejected
    return o.sft_weight * error.chunk(2)[0] - F.logsigmoid(margin), margin.detach()


def predicted(batch: dict, model: torch.nn.Module) -> torch.Tensor:
    return model(batch["x"], batch["t"], batch["text"], batch.get("y"), batch.get("image"))


def forward_step(o: TrainOptions, margins: "Margins", iterator: Iterator[dict], model: torch.nn.Module):
    """One micro-batch through one model chunk, as megatron-core's schedules want it once o and margins are given."""
    batch = next(iterator)
    return predicted(batch, model), functools.partial(loss, o, margins, batch, parallel.unwrapped(model))


def loss(o: TrainOptions, margins: "Margins", batch: dict, chunk: torch.nn.Module, output: torch.Tensor):
    """The mean over this micro-batch's pairs."""
    losses, margin = pair_losses(o, errors(output, batch, chunk), batch["reference"])
    margins.seen.append(margin)
    value = losses.mean()
    # Every context parallel rank has the whole of it, and every tp rank: global_loss takes the mean over those of tp
    # unless they hold other tokens.
    copies = chunk.config.context_parallel_size
    copies *= chunk.config.tensor_model_parallel_size if chunk.config.sequence_parallel else 1
    return value, {"loss": value.detach() / copies}


# Copied from zoo.qwen3.preference.Margins
class Margins:
    """The reward margins seen since the last call, which returns their mean and the share of pairs above 0."""

    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def __call__(self) -> dict[str, float]:
        """Collective. Ranks of one sample count alike, or (earlier pipeline stages) not at all."""
        margins = torch.cat([torch.zeros(0, device=device.current()), *self.seen])
        numbers = torch.stack((margins.sum(), (margins > 0).sum(), torch.ones_like(margins).sum()))
        dist.all_reduce(numbers)
        self.seen.clear()
        total, right, pairs = numbers.tolist()
        return {"margin": total / pairs, "accuracy": right / pairs}


# --------------------------------------------------------------------------------------------------------- reference


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


@contextlib.contextmanager
def without_adapters(chunks: list[torch.nn.Module]):
    """The model as it was before it had adapters."""
    adapted = [module for chunk in chunks for module in chunk.modules() if hasattr(module, "lora")]
    settings = [module.lora for module in adapted]
    for module in adapted:
        module.lora = dataclasses.replace(module.lora, lora_alpha=0.0)
    try:
        yield chunks
    finally:
        for module, its in zip(adapted, settings, strict=True):
            module.lora = its


@torch.no_grad()
def errors_of(o: TrainOptions, chunks: list[torch.nn.Module], batches: list[dict], seq_length: int) -> list:
    """`errors` of each micro-batch; nothing on the earlier pipeline stages."""

    def step(iterator: Iterator[dict], model: torch.nn.Module):
        batch, chunk = next(iterator), parallel.unwrapped(model)
        return predicted(batch, model), lambda output: (output.sum(), {"errors": errors(output, batch, chunk)})

    results = loop.forward(chunks, step, batches, micro_batch=o.micro_batch, sequence_length=seq_length, backward=False)
    return [result["errors"] for result in results]


def with_reference(o: TrainOptions, reference: Callable, batches: list[dict], seq_length: int) -> list[dict]:
    """The micro-batches with the reference's errors, where the loss is computed."""
    with reference() as chunks:
        found = errors_of(o, chunks, batches, seq_length)
    return [batch | {"reference": error} for batch, error in zip(batches, found, strict=True)] if found else batches


# ---------------------------------------------------------------------------------------------------------- evaluation

DRAWS = 4  # of noise and timestep for each held-out pair


def held_out(o: TrainOptions, batches: "Batches", chunks: list, reference: Callable, seq_length: Callable) -> dict:
    """Of the pairs of `batches`: the share whose chosen video has the smaller error, before training and after it, and
    whose chosen video has the greater reward; and their mean margin. Collective."""
    for chunk in chunks:
        chunk.eval()  # an adapter's dropout
    steps = -(-DRAWS * len(batches.dataset) * 2 // o.global_batch)
    numbers = torch.zeros(5, device=device.current())
    for loaded in batches(0, steps):
        micro_batches = batches.prepare(loaded)
        length = seq_length(micro_batches)
        with reference() as start:
            before = errors_of(o, start, micro_batches, length)
        for error, ref in zip(errors_of(o, chunks, micro_batches, length), before, strict=True):
            margin = pair_losses(o, error, ref)[1]
            chosen, rejected = torch.stack((ref, error)).chunk(2, dim=1)  # [2, P] each
            right = (chosen < rejected).sum(1)
            numbers += torch.stack((*right, (margin > 0).sum(), margin.sum(), torch.ones_like(margin).sum()))
    dist.all_reduce(numbers)  # ranks of one sample count alike, or (earlier pipeline stages) not at all
    for chunk in chunks:
        chunk.train()
    before, after, rewards, margin, count = numbers.tolist()
    found = {"before": before, "after": after, "reward accuracy": rewards, "margin": margin}
    return {key: value / count for key, value in found.items()} | {"pairs": len(batches.dataset), "draws": DRAWS}


def in_words(found: dict) -> str:
    return (
        f"        {found['pairs']} held-out pairs: smaller error for the chosen video in {found['after']:.0%} (before "
        f"{found['before']:.0%}), greater reward in {found['reward accuracy']:.0%}, mean margin {found['margin']:.2f}"
    )
