"""What preference optimisation minimises: a pair of answers to one question, the first of which is preferred.

With s(y) the score of an answer y of |y| tokens to x, D = s(chosen) - s(rejected), e = --label-smoothing:

    sigmoid   s = log pi(y|x) - log ref(y|x)              -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D)
    hinge     the same                                    max(0, 1 - beta D)
    ipo       s = (log pi(y|x) - log ref(y|x)) / |y|      (D - 1 / (2 beta))^2
    simpo     s = log pi(y|x) / |y|                       that of sigmoid with beta D - gamma in place of beta D

plus sft_weight * -log pi(chosen|x) / |chosen|, as a mean over the pairs of the global batch. DPO: arXiv:2305.18290, its
smoothing: arXiv:2403.00409; hinge: SLiC, arXiv:2305.10425; IPO: arXiv:2310.12036; SimPO: arXiv:2405.14734; the last
term: arXiv:2404.19733. trl's DPOTrainer and CPOTrainer have the same.

ref is the model as training starts. Its log-probabilities of every answer are computed once and kept beside the rendered
pairs (8 bytes a pair), so that one model is in memory, not two.

A model chunk is called as model(tokens, positions, cu_seqlens, rows, labels). On the last pipeline stage it returns a tuple
that begins with the labels' log-probabilities fp32 [T].
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
    """(losses, reward margins beta D) [P] of pairs. policy and reference: log-probabilities fp32 [P, 2] of the chosen and
    the rejected answer, tokens [P, 2]: their lengths. The reference of simpo is not read."""
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
    """Log-probabilities of the labels of this rank's tokens [T] -> those of the answers of each pair, and their lengths
    in tokens, fp32 [P, 2] each."""
    sequence, count = batch["sequence"], len(batch["cu_seqlens"]) - 1
    sums = log_probs.new_zeros(count).index_add(0, parallel.context_tokens(sequence, causal=True), log_probs)
    if mpu.get_context_parallel_world_size() > 1:
        # An answer's tokens lie on all context parallel ranks, and each rank goes on with the whole sum. The backward
        # hands each its own tokens' part only, for the gradients of those ranks are summed.
        whole = sums.detach().clone()
        dist.all_reduce(whole, group=mpu.get_context_parallel_group())
        sums = sums + (whole - sums.detach())
    tokens = log_probs.new_zeros(count).index_add(0, sequence, (batch["labels"] >= 0).float())
    pairs = torch.stack((batch["pairs"], batch["pairs"] + 1), 1)
    return sums[pairs], tokens[pairs]


def forward_step(o: PreferenceOptions, margins: Margins, iterator: Iterator[dict], model: torch.nn.Module):
    """One micro-batch through one model chunk, as megatron-core's schedules want it once o and margins are given."""
    batch = next(iterator)
    output = model(*(batch[k] for k in ("tokens", "positions", "cu_seqlens", "rows", "labels")))
    return output, functools.partial(loss, o, margins, batch, parallel.unwrapped(model))


def loss(o: PreferenceOptions, margins: Margins, batch: dict, chunk: torch.nn.Module, output: tuple):
    """The losses of this micro-batch's pairs, weighted by batch["weight"] [P] so that averaging over micro-batches and data
    parallel ranks gives the mean over every pair of the global batch."""
    policy, tokens = sum_answers(output[0], batch)
    losses, margin = pair_losses(o, policy, batch.get("reference"), tokens)
    margins.seen.append(margin)
    value = losses @ batch["weight"]
    # Every context parallel rank has the whole of it, and every tp rank: global_loss takes the mean over those of tp
    # unless they hold other tokens.
    reported = value.detach() / mpu.get_context_parallel_world_size()
    return value, {
        "loss": reported / (chunk.config.tensor_model_parallel_size if chunk.config.sequence_parallel else 1)
    }


# --------------------------------------------------------------------------------------------------------- reference


@torch.no_grad()
def compute_reference(
    o: TrainOptions, rows: PackedRows, facts: list, forwards: Callable, on_device: Callable
) -> np.ndarray:
    """Log-probabilities of the answers of every pair by the model as it is, fp32 [units, 2]. They are computed on the
    first call, and found again by the next run with the same facts.

    Args:
        facts: what decides the numbers beside the pairs (weights, architecture, precision), as JSON can hold it.
        forwards: (forward step, micro-batches) -> what the loss function reported of each.
        on_device: batch -> the batch on this rank's device.
    """
    path = rows.folder / f"reference-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.npy"
    found = torch.full((rows.unit_count, 2), -torch.inf, device=device.current())
    if dist.get_rank() == 0 and path.is_file():
        found.copy_(torch.from_numpy(np.load(path)))
    dist.broadcast(found, 0)
    if found.isfinite().all():
        return found.cpu().numpy()

    def step(iterator: Iterator[dict], model: torch.nn.Module):
        batch = next(iterator)
        output = model(*(batch[k] for k in ("tokens", "positions", "cu_seqlens", "rows", "labels")))
        return output, lambda output: (output[0].sum(), {"answers": sum_answers(output[0], batch)[0]})

    rank = mpu.get_data_parallel_rank()
    for first in range(0, len(rows), o.global_batch):
        starts = range(first + rank * o.micro_batch, first + o.global_batch, o.micro_batch * o.dp)
        taken = [[(i + k) % len(rows) for k in range(o.micro_batch)] for i in starts]  # the last batch begins anew
        batches = [on_device(rows.fetch(numbers)) for numbers in taken]
        for batch, seen in zip(batches, forwards(step, batches), strict=False):  # none but on the last stage
            found[batch["units"]] = seen["answers"]
    dist.all_reduce(found, dist.ReduceOp.MAX)  # each rank has its rows' numbers, and -inf in place of the others'
    if dist.get_rank() == 0:
        partial = path.with_name(f".{os.getpid()}-{path.name}")
        np.save(partial, found.cpu().numpy())
        os.replace(partial, path)
    return found.cpu().numpy()
