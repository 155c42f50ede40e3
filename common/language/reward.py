"""The losses of reward models, and the scores that a reward model gives.

An outcome reward model (orm) gives every answer one number r, read at the last token of the rendered conversation. It
learns from pairs of answers to one question, of which the first is preferred (Bradley and Terry; InstructGPT,
arXiv:2203.02155, equation 1). The mean is over the pairs of the global batch:

    -log sigmoid(r(chosen) - r(rejected))

A process reward model (prm) is a language model that judges every step of a solution, at the last token of the
placeholder that ends the step. Two tokens of its vocabulary mean right and wrong. The loss is the cross entropy over
the logits of these two (Math-Shepherd, arXiv:2312.08935; MindSpeed-LLM's `--stage prm`), as the mean over the steps of
the global batch. With r = logit(right) - logit(wrong), a step is right with probability sigmoid(r), and its loss is

    -log sigmoid(r) if the step is right, else -log sigmoid(-r)

A model chunk is called as model(tokens, positions, cu_seqlens, rows, reward_tokens=…). On the last pipeline stage it
returns a tuple that begins with r of every token of this rank, fp32 [T].
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from common import device, parallel
from common.language.chat import Chat, to_chat, to_pair, to_tools
from common.language.packing import micro_batch
from common.language.preference import add_over_context, share_of
from common.language.steps import encode_steps, to_steps
from common.margins import Margins

# --------------------------------------------------------------------------------------------------------- objective


def scores_at(scores: torch.Tensor, at: torch.Tensor, length: int) -> torch.Tensor:
    """Returns the scores of the tokens `at` int64 [S] of a micro-batch of `length` tokens, fp32 [S], on every context
    parallel rank. scores [length/cp]: those of this rank's tokens."""
    place = parallel.context_tokens(torch.arange(length, device=scores.device), causal=True)
    return add_over_context(scores.new_zeros(length).index_copy(0, place, scores)[at])


def forward_step(
    margins: Margins, reward_tokens: torch.Tensor | None, iterator: Iterator[dict], model: torch.nn.Module
):
    """Runs one micro-batch through one model chunk. With its first two arguments bound, megatron-core's schedules can
    call it. reward_tokens: the ids of right and wrong int64 [2], or None for an outcome reward model."""
    batch = next(iterator)
    inputs = (batch[key] for key in ("tokens", "positions", "cu_seqlens", "rows"))
    return model(*inputs, reward_tokens=reward_tokens), functools.partial(
        loss, margins, batch, parallel.unwrapped(model)
    )


def loss(margins: Margins, batch: dict, chunk: torch.nn.Module, output: tuple) -> tuple[torch.Tensor, dict]:
    """Sums the losses of this micro-batch's pairs or steps, weighted by batch["weight"] (`preference.loss` says how). A
    margin is how far the chosen answer is ahead, or how far the score of a step is on the side of its label."""
    length = len(batch["tokens"])
    if "pairs" in batch:
        chosen, rejected = scores_at(output[0], batch["last"].flatten(), length).view(-1, 2).unbind(1)
        margin = chosen - rejected
    else:
        sign = 2 * batch["labels"][batch["steps"]] - 1
        margin = sign * scores_at(output[0], batch["steps"], length)
    margins.seen.append(margin.detach())
    value = -F.logsigmoid(margin) @ batch["weight"]
    return value, {"loss": share_of(value, chunk)}


# ------------------------------------------------------------------------------------------------------------ scores


def encoder(tokenizer, placeholder: str | None) -> Callable[[Any], list[tuple[np.ndarray, np.ndarray]]]:
    """Returns a function from a row to its sequences, each as (tokens int32 [n], whether a token's score is read bool
    [n]). The function raises BadRow. Rows need no labels.

    placeholder: what ends a step; None for an outcome reward model, whose row is a conversation that ends in the answer,
    or a pair.
    """
    if placeholder is not None:

        def encode_solution(row: Any) -> list[tuple[np.ndarray, np.ndarray]]:
            tokens, flags = encode_steps(tokenizer, *to_steps(row, placeholder, labelled=False), placeholder)
            return [(tokens, flags > 0)]

        return encode_solution
    chat = Chat(tokenizer)

    def encode_answers(row: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        chats = to_pair(row) if isinstance(row, dict) and "chosen" in row else [to_chat(row)]
        encoded = [chat.encode(messages, to_tools(row), "last")[0] for messages in chats]
        return [(tokens, np.arange(len(tokens)) == len(tokens) - 1) for tokens in encoded]

    return encode_answers


@torch.no_grad()
def score(
    model: torch.nn.Module,
    sequences: Sequence[tuple[np.ndarray, np.ndarray]],
    length: int,
    reward_tokens: torch.Tensor | None = None,
) -> list[list[float]]:
    """Returns of each sequence of `encoder` the scores r that are read. Sequences share a forward of up to `length`
    tokens. Every tensor and expert parallel rank calls it with the same sequences; no pipeline, no split of tokens."""
    groups: list[list] = []
    for sequence in sequences:
        if not groups or sum(len(tokens) for tokens, _ in groups[-1]) + len(sequence[0]) > length:
            groups.append([])
        groups[-1].append(sequence)
    results = []
    for group in groups:
        batch = micro_batch(group)
        tokens, positions = (batch[key].to(device.current()) for key in ("tokens", "positions"))
        scores = model(tokens, positions, batch["cu_seqlens"], reward_tokens=reward_tokens)[0].cpu()
        parts = scores.split([len(flags) for _, flags in group])
        results += [part[torch.from_numpy(flags)].tolist() for part, (_, flags) in zip(parts, group, strict=True)]
    return results
