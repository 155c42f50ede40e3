"""Generates answers to many prompts with a key-value cache, and scores given texts.

Prompts of about the same length share a batch without padding: while the shorter prompts are already answered, the
model reads the rest of the longer ones, one token a step. Tensor parallelism works as in training. Pipeline stages work
one after the other, without micro-batches: they are for models that fit no other way.

A model here is this pipeline stage's only chunk. It has the attributes

    first, last                 whether it is the first and the last stage
    config                      megatron-core's: the parallel sizes, params_dtype, num_moe_experts
    hidden_size, vocab_size     D and V of the whole model
    output_weight               [V/tp, D], on the last stage
    set_input_tensor(states)    keeps the states that the previous stage sent

and is called as model(tokens [T], positions [T], cu_seqlens, cache=None) with sequences end to end. The last stage
returns a tuple that begins with the states after the last norm [T, 1, D]; the other stages return the states for the
next one. With a cache (decode.py), the attention layers call `cache.attend(self, q, k, v)`, and cu_seqlens is not read.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from common import checkpoint, ops
from common.language import decode
from common.language.chat import render
from common.language.options import InferOptions
from common.records import BadRow

NOT_FINITE = (
    "the model's logits are not finite: damaged weights, or too large for this precision; fix: --weights or --precision"
)


def batch_prompts(lengths: list[int], o: InferOptions) -> Iterator[list[int]]:
    """Yields the indices of prompts to generate together, given their lengths. They are of similar length: reading the
    rest of the longest adds at most a quarter to the steps of the answer."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == o.batch or lengths[i] - lengths[batch[0]] > o.max_new_tokens // 4):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def generate(
    model,
    prompts: list[list[int]],
    o: InferOptions,
    ends: set[int],
    show: Callable[[int], None] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    decoders: list[decode.Decoder] | None = None,
) -> list[list[int]]:
    """Generates the answer to each prompt, as token ids. An answer ends before an end token, after o.max_new_tokens, or
    when stop(answer so far) is true.

    show: called with each token of a single prompt as it comes. Greedy generation equals transformers'
    `generate(do_sample=False)`. The draws for a prompt depend on o.seed, its tokens and the number of equal prompts
    before it, not on the batch.

    decoders: keeps CUDA graphs and their cache from one call to the next. A list, empty at first.

    Raises:
        ValueError: the model's logits are not finite.
    """
    device = next(model.parameters()).device
    answers: list[list[int]] = [[] for _ in prompts]
    seeds, seen = [], Counter()
    for prompt in map(tuple, prompts):
        seeds.append(checkpoint.stable_seed(o.seed, seen[prompt], *prompt))
        seen[prompt] += 1
    batches, obstacle = list(batch_prompts([len(p) for p in prompts], o)), decode.graph_obstacle(model)
    decode.announce(obstacle)
    decoders = [] if decoders is None else decoders
    for rows in batches:
        batch = [prompts[i] for i in rows]
        generators = [torch.Generator(device).manual_seed(seeds[i]) for i in rows]
        if obstacle:
            steps = decode.decode_eagerly(model, batch, o, generators)
        else:
            longest = max(len(prompts[other[-1]]) for other in batches if len(other) == len(rows))
            steps = decode.fitting(decoders, model, len(rows), longest + o.max_new_tokens).decode(batch, o, generators)
        done = [False] * len(rows)
        looks_behind = decode.LOOKS_BEHIND and o.temperature == 0  # a draw waits for the device anyway
        for length, tokens in enumerate(decode.read_tokens(steps, looks_behind), len(batch[0])):
            for place, token in enumerate(tokens):
                if token < 0:
                    raise ValueError(NOT_FINITE)
                answer = answers[rows[place]]
                if done[place] or length < len(batch[place]):
                    continue
                done[place] = token in ends
                if not done[place]:
                    answer.append(token)
                    if show:
                        show(token)
                    done[place] = len(answer) == o.max_new_tokens or (stop is not None and stop(answer))
            if all(done):
                break
    return answers


@torch.no_grad()
def score(model, requests: list[tuple[list[int], list[list[int]]]], row_tokens: int) -> list[list[tuple[float, bool]]]:
    """Returns how likely texts are: for each ending (its log-probability, whether each of its tokens is the likeliest).

    requests: (tokens the model reads, endings). The last n tokens read predict the n tokens of an ending, each the one
    at its own place. Requests are packed into rows of at most row_tokens; a longer one has a row for itself. Only the
    places of endings get logits, at most ops.CHUNK numbers at a time.
    """
    device = next(model.parameters()).device
    results: list[list[tuple[float, bool]]] = []
    for row in fill_rows(row_tokens, [len(tokens) for tokens, _ in requests]):
        row = [requests[i] for i in row]
        bounds = [0]
        for tokens, _ in row:
            bounds.append(bounds[-1] + len(tokens))
        endings = [(end, ending) for end, (_, group) in zip(bounds[1:], row, strict=True) for ending in group]
        tokens = torch.tensor([t for tokens, _ in row for t in tokens], device=device)  # [T]
        positions = torch.cat([torch.arange(len(tokens)) for tokens, _ in row]).to(device)
        places = torch.cat([torch.arange(end - len(ending), end) for end, ending in endings]).to(device)  # [N]
        targets = torch.tensor([t for _, ending in endings for t in ending], device=device)  # [N]
        hidden = model(tokens, positions, bounds)[0][places, 0]  # [N, D]
        log_probs, likeliest = [], []
        step = max(1, ops.CHUNK // model.vocab_size)
        for part in (slice(i, i + step) for i in range(0, len(places), step)):
            logits, target = decode.gather_logits(hidden[part], model), targets[part]  # [n, V], [n]
            log_probs.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1))
            likeliest.append(logits.argmax(1) == target)
        sizes = [len(ending) for _, ending in endings]
        sums = torch.stack([t.sum() for t in torch.cat(log_probs).cpu().double().split(sizes)])
        if not sums.isfinite().all():
            raise ValueError(NOT_FINITE)
        sums = sums.tolist()
        all_likeliest = [bool(t.all()) for t in torch.cat(likeliest).cpu().split(sizes)]
        scores = iter(zip(sums, all_likeliest, strict=True))
        results += [[next(scores) for _ in group] for _, group in row]
    return results


def fill_rows(most: int, lengths: list[int]) -> Iterator[list[int]]:
    """Yields the indices of successive items that fit a row of `most` tokens; a longer item has a row for itself."""
    row, used = [], 0
    for i, length in enumerate(lengths):
        if row and used + length > most:
            yield row
            row, used = [], 0
        row.append(i)
        used += length
    if row:
        yield row


def render_questions(tokenizer, questions: list[tuple], thinking: bool) -> list[str]:
    """Renders the result of `read_questions` with the chat template. Raises ValueError, which names the line, if the
    template refuses a question."""
    texts = []
    for where, messages, tools in questions:
        try:
            texts.append(render(tokenizer, messages, tools, add_generation_prompt=True, enable_thinking=thinking))
        except BadRow as error:
            rule = "messages of its roles"
            raise ValueError(f"{where}: {error.args[0]}, {error.args[1]}; expected {rule}; fix: {where}") from None
    return texts


def show_answer(tokenizer) -> Callable[[int], None]:
    """Returns a function that prints an answer as its tokens come. It prints only whole characters: half a character
    decodes to a replacement mark."""
    shown: list[int] = []

    def show(token: int) -> None:
        before = tokenizer.decode(shown)
        shown.append(token)
        text = tokenizer.decode(shown)
        if not text.endswith("\ufffd"):
            print(text[len(before.rstrip("\ufffd")) :], end="", flush=True)

    return show


def write_answers(out: Path, questions: list[tuple], answers: list[str]) -> None:
    """Writes a JSON line for each question of `read_questions`, with its answer."""
    out.parent.mkdir(parents=True, exist_ok=True)
    questions = [{"prompt": m[0]["content"]} if len(m) == 1 else {"messages": m} for _, m, _ in questions]
    rows = [row | {"answer": answer} for row, answer in zip(questions, answers, strict=True)]
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows)} answers in {out}")
