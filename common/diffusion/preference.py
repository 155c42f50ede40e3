"""Learns from pairs of videos of one caption, the first of which is preferred: Diffusion-DPO (arXiv:2311.12908) for
flow matching.

Let e(v) be the mean squared error of the velocity predicted for a video v, and e_ref(v) that of the model at the start
of training. Both have the same timestep and noise, which the two videos of a pair share. Then

    r(v)  = -beta / 2 * (e(v) - e_ref(v))                                       the implicit reward
    loss  = -log sigmoid(r(chosen) - r(rejected)) + sft_weight * e(chosen)      mean over the pairs of the global batch

MindSpeed-MM has -beta * t in place of -beta / 2, with t in 0..1000, and a factor for the pair's scores, which is 1 in
its published settings.

A micro-batch holds the chosen videos of its P pairs, then the rejected ones, so one forward serves both. The reference
takes another forward, without gradients. The recipe measures errors: `measure(chunks, micro_batches)` returns the
errors [2P] of each micro-batch, and an empty list on the earlier pipeline stages.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu

from common import device
from common.margins import Margins

DRAWS = 4  # draws of noise and timestep for each held-out pair


# ---- loss ----


def sum_over_tokens(error: torch.Tensor, mc) -> torch.Tensor:
    """Sums errors [B] of this rank's tokens to those of all tokens, on every rank. mc: the model's megatron config.

    The backward gives each rank the gradient of its own tokens only, because gradients are summed over the ranks later.
    """
    groups = [mpu.get_context_parallel_group()] if mc.context_parallel_size > 1 else []
    groups += [mpu.get_tensor_model_parallel_group()] if mc.sequence_parallel else []
    whole = error.detach().clone()
    for group in groups:
        dist.all_reduce(whole, group=group)
    return error + (whole - error.detach())


def pair_losses(o, error: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (losses, reward margins) [P] from the errors [2P] of P chosen and then P rejected videos."""
    chosen, rejected = (-o.beta / 2 * (error - reference)).chunk(2)
    margin = chosen - rejected
    return o.sft_weight * error.chunk(2)[0] - F.logsigmoid(margin), margin.detach()


def mean_loss(o, margins: Margins, error: torch.Tensor, reference: torch.Tensor, mc) -> tuple[torch.Tensor, dict]:
    """Returns the mean loss of this micro-batch's pairs, given their errors [2P], and what the loop reports of it."""
    losses, margin = pair_losses(o, error, reference)
    margins.seen.append(margin)
    value = losses.mean()
    # Every context and tensor parallel rank has the whole value. The loop adds over cp and, if they hold different
    # tokens (sp), over tp; otherwise it takes the mean over tp.
    copies = mc.context_parallel_size * (mc.tensor_model_parallel_size if mc.sequence_parallel else 1)
    return value, {"loss": value.detach() / copies}


# ---- reference ----


@contextlib.contextmanager
def without_adapters(chunks: list[torch.nn.Module]):
    """Yields the model without the effect of its adapters: their scale is 0 inside this block."""
    adapted = [module for chunk in chunks for module in chunk.modules() if hasattr(module, "lora")]
    settings = [module.lora for module in adapted]
    for module in adapted:
        module.lora = dataclasses.replace(module.lora, lora_alpha=0.0)
    try:
        yield chunks
    finally:
        for module, setting in zip(adapted, settings, strict=True):
            module.lora = setting


def with_reference(reference: Callable, measure: Callable, batches: list[dict]) -> list[dict]:
    """Returns the micro-batches with the reference's errors added, on the ranks that compute the loss. reference() is a
    context manager that yields the reference's chunks."""
    with reference() as chunks:
        errors = measure(chunks, batches)
    return [batch | {"reference": error} for batch, error in zip(batches, errors, strict=True)] if errors else batches


# ---- evaluation ----


def held_out(o, batches, chunks: list[torch.nn.Module], reference: Callable, measure: Callable) -> dict:
    """Measures the pairs of `batches`. Returns the shares whose chosen video has the smaller error, before and after
    training, the share where it has the greater reward, and the mean margin. Collective."""
    for chunk in chunks:
        chunk.eval()  # turns off the adapters' dropout
    steps = -(-DRAWS * len(batches.dataset) * 2 // o.global_batch)
    numbers = torch.zeros(5, device=device.current())
    for loaded in batches(0, steps):
        micro_batches = batches.prepare(loaded)
        with reference() as reference_chunks:
            before = measure(reference_chunks, micro_batches)
        for error, ref in zip(measure(chunks, micro_batches), before, strict=True):
            margin = pair_losses(o, error, ref)[1]
            chosen, rejected = torch.stack((ref, error)).chunk(2, dim=1)  # [2, P] each
            right = (chosen < rejected).sum(1)
            numbers += torch.stack((*right, (margin > 0).sum(), margin.sum(), torch.ones_like(margin).sum()))
    dist.all_reduce(numbers)  # ranks of a sample add the same; earlier pipeline stages add nothing
    for chunk in chunks:
        chunk.train()
    before, after, rewards, margin, count = numbers.tolist()
    totals = {"before": before, "after": after, "reward accuracy": rewards, "margin": margin}
    return {key: value / count for key, value in totals.items()} | {"pairs": len(batches.dataset), "draws": DRAWS}


def describe(results: dict) -> str:
    return (
        f"        {results['pairs']} held-out pairs: smaller error for the chosen video in {results['after']:.0%} (before "
        f"{results['before']:.0%}), greater reward in {results['reward accuracy']:.0%}, mean margin {results['margin']:.2f}"
    )
