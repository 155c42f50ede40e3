"""Learning from pairs of videos of one caption, of which the first is preferred (Diffusion-DPO, arXiv:2311.12908, for flow
matching).

With e(v) the mean squared error of the velocity predicted for a video v, and e_ref(v) that of the model as training
starts, both at the same timestep and with the same noise for the two videos of a pair,

    r(v)  = -beta / 2 * (e(v) - e_ref(v))                                       the implicit reward
    loss  = -log sigmoid(r(chosen) - r(rejected)) + sft_weight * e(chosen)      mean over the pairs of the global batch

MindSpeed-MM has the same with -beta * t in place of -beta / 2 and t in 0..1000, and a factor for the pair's scores which
its published settings make 1.

A micro-batch holds the chosen videos of its P pairs, then the rejected ones: one forward serves both. The reference takes
another forward, without gradients. The recipe says how an error is measured: `measure(chunks, micro_batches)` gives the
errors [2P] of each micro-batch, and nothing on the earlier pipeline stages.
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

DRAWS = 4  # of noise and timestep for each held-out pair


# ---- loss ----


def sum_over_tokens(error: torch.Tensor, mc) -> torch.Tensor:
    """[B], of this rank's tokens -> [B] of all tokens, whole on every rank. mc: the model's megatron config.

    The backward gives each rank the gradient of its own tokens' part only: gradients are summed over the ranks later.
    """
    groups = [mpu.get_context_parallel_group()] if mc.context_parallel_size > 1 else []
    groups += [mpu.get_tensor_model_parallel_group()] if mc.sequence_parallel else []
    whole = error.detach().clone()
    for group in groups:
        dist.all_reduce(whole, group=group)
    return error + (whole - error.detach())


def pair_losses(o, error: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, reward margins) [P] of the errors [2P] of P chosen and then P rejected videos."""
    chosen, rejected = (-o.beta / 2 * (error - reference)).chunk(2)
    margin = chosen - rejected
    return o.sft_weight * error.chunk(2)[0] - F.logsigmoid(margin), margin.detach()


def mean_loss(o, margins: Margins, error: torch.Tensor, reference: torch.Tensor, mc) -> tuple[torch.Tensor, dict]:
    """The mean over this micro-batch's pairs of their errors [2P], and what the loop reports of it."""
    losses, margin = pair_losses(o, error, reference)
    margins.seen.append(margin)
    value = losses.mean()
    # Every rank of cp has the whole of it, and so has every rank of tp. The loop adds them up over cp and, if they hold
    # different tokens, over tp; else it takes the mean over tp.
    copies = mc.context_parallel_size * (mc.tensor_model_parallel_size if mc.sequence_parallel else 1)
    return value, {"loss": value.detach() / copies}


# ---- reference ----


@contextlib.contextmanager
def without_adapters(chunks: list[torch.nn.Module]):
    """The model as it was before it had adapters: their scale is 0 inside this block."""
    adapted = [module for chunk in chunks for module in chunk.modules() if hasattr(module, "lora")]
    settings = [module.lora for module in adapted]
    for module in adapted:
        module.lora = dataclasses.replace(module.lora, lora_alpha=0.0)
    try:
        yield chunks
    finally:
        for module, kept in zip(adapted, settings, strict=True):
            module.lora = kept


def with_reference(reference: Callable, measure: Callable, batches: list[dict]) -> list[dict]:
    """The micro-batches with the reference's errors, on the ranks where the loss is computed. reference() is a context
    that gives the reference's chunks."""
    with reference() as chunks:
        errors = measure(chunks, batches)
    return [batch | {"reference": error} for batch, error in zip(batches, errors, strict=True)] if errors else batches


# ---- evaluation ----


def held_out(o, batches, chunks: list[torch.nn.Module], reference: Callable, measure: Callable) -> dict:
    """Of the pairs of `batches`: the shares whose chosen video has the smaller error, before and after training, and the
    greater reward; and their mean margin. Collective."""
    for chunk in chunks:
        chunk.eval()  # an adapter's dropout
    steps = -(-DRAWS * len(batches.dataset) * 2 // o.global_batch)
    numbers = torch.zeros(5, device=device.current())
    for loaded in batches(0, steps):
        micro_batches = batches.prepare(loaded)
        with reference() as start:
            before = measure(start, micro_batches)
        for error, ref in zip(measure(chunks, micro_batches), before, strict=True):
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


def describe(found: dict) -> str:
    return (
        f"        {found['pairs']} held-out pairs: smaller error for the chosen video in {found['after']:.0%} (before "
        f"{found['before']:.0%}), greater reward in {found['reward accuracy']:.0%}, mean margin {found['margin']:.2f}"
    )
