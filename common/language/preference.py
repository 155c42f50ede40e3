"""The losses of preference optimisation, on pairs of answers to one question of which the first is preferred.

With s(y) the score of an answer y of |y| tokens to x, D = s(chosen) - s(rejected), e = --label-smoothing:

    sigmoid   s = log pi(y|x) - log ref(y|x)              -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D)
    hinge     the same                                    max(0, 1 - beta D)
    ipo       s = (log pi(y|x) - log ref(y|x)) / |y|      (D - 1 / (2 beta))^2
    simpo     s = log pi(y|x) / |y|                       that of sigmoid with beta D - gamma in place of beta D

sft_weight * -log pi(chosen|x) / |chosen| is added to each. The mean is over the pairs of the global batch. DPO:
arXiv:2305.18290, its smoothing: arXiv:2403.00409; hinge: SLiC, arXiv:2305.10425; IPO: arXiv:2310.12036; SimPO:
arXiv:2405.14734; the added term: arXiv:2404.19733. trl's DPOTrainer and CPOTrainer have the same losses.

ref is the model at the start of training. Its log-probabilities of every answer are computed once and kept beside the
rendered pairs (8 bytes a pair), so that only one model is in memory.

A model chunk is called as model(tokens, positions, cu_seqlens, rows, labels). On the last pipeline stage it returns a
tuple that begins with the labels' log-probabilities fp32 [T].
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu

from common import device, parallel
from common.language.options import PreferenceOptions, TrainOptions
from common.language.packing import PackedRows
from common.margins import Margins

# --------------------------------------------------------------------------------------------------------- objective


def pair_losses(
    o: PreferenceOptions, policy: torch.Tensor, reference: torch.Tensor | None, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (losses, reward margins beta D) [P] of pairs. policy, reference: log-probabilities fp32 [P, 2] of the
    chosen and the rejected answers. tokens: their lengths [P, 2]. simpo does not read the reference."""
    score = policy if o.preference == "simpo" else policy - reference
    if o.preference in ("ipo", "simpo"):
        score = score / tokens
    difference = score[:, 0] - score[:, 1]
    margin = o.beta * difference
    if o.preference == "hinge":
        losses = F.relu(1 - margin)
    elif o.preference == "ipo":
        losses = (difference - 1 / (2 * o.beta)) ** 2
    else:
        x = margin - o.gamma if o.preference == "simpo" else margin
        losses = -(1 - o.label_smoothing) * F.logsigmoid(x) - o.label_smoothing * F.logsigmoid(-x)
    if o.sft_weight:
        losses = losses - o.sft_weight * (policy / tokens)[:, 0]
    return losses, margin.detach()


def sum_answers(log_probs: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums the log-probabilities of the labels of this rank's tokens [T] over each answer. Returns the sums and the
    answers' lengths in tokens, fp32 [P, 2] each."""
    sequence, count = batch["sequence"], len(batch["cu_seqlens"]) - 1
    sums = log_probs.new_zeros(count).index_add(0, parallel.context_tokens(sequence, causal=True), log_probs)
    sums = add_over_context(sums)
    tokens = log_probs.new_zeros(count).index_add(0, sequence, (batch["labels"] >= 0).float())
    pairs = torch.stack((batch["pairs"], batch["pairs"] + 1), 1)
    return sums[pairs], tokens[pairs]


def add_over_context(x: torch.Tensor) -> torch.Tensor:
    """Sums x over the context parallel ranks, on each of which a part of the answer's tokens lies. The backward gives
    each rank the gradient of its own tokens only, because the gradients of these ranks are summed later."""
    if mpu.get_context_parallel_world_size() == 1:
        return x
    whole = x.detach().clone()
    dist.all_reduce(whole, group=mpu.get_context_parallel_group())
    return x + (whole - x.detach())


def share_of(value: torch.Tensor, chunk: torch.nn.Module) -> torch.Tensor:
    """Returns this rank's share of a loss that every context and tensor parallel rank has whole, as `global_loss` adds
    them: over cp and, if they hold different tokens (sp), over tp; otherwise it takes the mean over tp."""
    share = value.detach() / mpu.get_context_parallel_world_size()
    return share / (chunk.config.tensor_model_parallel_size if chunk.config.sequence_parallel else 1)


def forward_step(o: PreferenceOptions, margins: Margins, iterator: Iterator[dict], model: torch.nn.Module):
    """Runs one micro-batch through one model chunk. With o and margins bound, megatron-core's schedules can call it."""
    batch = next(iterator)
    output = model(*(batch[k] for k in ("tokens", "positions", "cu_seqlens", "rows", "labels")))
    return output, functools.partial(loss, o, margins, batch, parallel.unwrapped(model))


def loss(o: PreferenceOptions, margins: Margins, batch: dict, chunk: torch.nn.Module, output: tuple):
    """Sums the losses of this micro-batch's pairs, weighted by batch["weight"] [P] so that averaging over micro-batches
    and data parallel ranks gives the mean over all pairs of the global batch."""
    policy, tokens = sum_answers(output[0], batch)
    losses, margin = pair_losses(o, policy, batch.get("reference"), tokens)
    margins.seen.append(margin)
    value = losses @ batch["weight"]
    return value, {"loss": share_of(value, chunk)}


# --------------------------------------------------------------------------------------------------------- reference


@torch.no_grad()
def compute_reference(
    o: TrainOptions, rows: PackedRows, facts: list, forwards: Callable, on_device: Callable
) -> np.ndarray:
    """Returns the current model's log-probabilities of the answers of every pair, fp32 [units, 2]. The first run
    computes and stores them; a later run with the same facts loads them.

    Args:
        facts: what decides the numbers besides the pairs (weights, architecture, precision), in a form for JSON.
        forwards: (forward step, micro-batches) -> what the loss function reports for each.
        on_device: batch -> the batch on this rank's device.
    """
    path = rows.folder / f"reference-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.npy"
    log_probs = torch.full((rows.unit_count, 2), -torch.inf, device=device.current())
    if dist.get_rank() == 0 and path.is_file():
        log_probs.copy_(torch.from_numpy(np.load(path)))
    dist.broadcast(log_probs, 0)
    if log_probs.isfinite().all():
        return log_probs.cpu().numpy()

    def step(iterator: Iterator[dict], model: torch.nn.Module):
        batch = next(iterator)
        output = model(*(batch[k] for k in ("tokens", "positions", "cu_seqlens", "rows", "labels")))
        return output, lambda output: (output[0].sum(), {"answers": sum_answers(output[0], batch)[0]})

    rank = mpu.get_data_parallel_rank()
    for first in range(0, len(rows), o.global_batch):
        starts = range(first + rank * o.micro_batch, first + o.global_batch, o.micro_batch * o.dp)
        row_lists = [[(i + k) % len(rows) for k in range(o.micro_batch)] for i in starts]  # the last batch wraps around
        batches = [on_device(rows.fetch(row_list)) for row_list in row_lists]
        for batch, reported in zip(batches, forwards(step, batches), strict=False):  # empty before the last stage
            log_probs[batch["units"]] = reported["answers"]
    dist.all_reduce(log_probs, dist.ReduceOp.MAX)  # each rank has the numbers of its rows, and -inf elsewhere
    if dist.get_rank() == 0:
        partial = path.with_name(f".{os.getpid()}-{path.name}")
        np.save(partial, log_probs.cpu().numpy())
        os.replace(partial, path)
    return log_probs.cpu().numpy()
