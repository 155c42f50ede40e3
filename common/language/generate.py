"""Generates answers to many prompts with a key-value cache, and scores given texts.

Prompts of about the same length share a batch without padding: while the shorter prompts are already answered, the
model reads the rest of the longer ones, one token a step. Tensor parallelism works as in training. Pipeline stages work
one after the other, without micro-batches: they are for models that fit no other way.

A model here is this pipeline stage's only chunk. It has the attributes

    first, last                 whether it is the first and the last stage
    config                      megatron-core's: tensor_model_parallel_size, params_dtype
    hidden_size, vocab_size     D and V of the whole model
    output_weight               [V/tp, D], on the last stage
    set_input_tensor(states)    keeps the states that the previous stage sent

and is called as model(tokens [T], positions [T], cu_seqlens, cache=None) with sequences end to end. The last stage
returns a tuple that begins with the states after the last norm [T, 1, D]; the other stages return the states for the
next one. With a cache, the attention layers call `cache.attend(self, q, k, v)`, and cu_seqlens is not read.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from common import checkpoint, ops
from common.language.chat import render
from common.language.options import InferOptions
from common.records import BadRow

NOT_FINITE = (
    "the model's logits are not finite: damaged weights, or too large for this precision; fix: --weights or --precision"
)


class Cache:
    """The keys and values of every layer so far, [S, B, K, E], for B sequences of the same length."""

    def __init__(self, batch: int, length: int):
        self.batch, self.length, self.kept, self.used = batch, length, {}, 0

    def attend(self, layer: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stores k and v, and returns the attention of the n newest tokens to all tokens, [B*n, 1, H, E].
        q [B*n, 1, H, E], k and v [B*n, 1, K, E] hold the sequences end to end."""
        q, k, v = (t.unflatten(0, (self.batch, -1)).squeeze(2).transpose(0, 1) for t in (q, k, v))  # [n, B, H, E]
        if layer not in self.kept:
            self.kept[layer] = tuple(t.new_empty(self.length, *t.shape[1:]) for t in (k, v))
        (keys, values), end = self.kept[layer], self.used + len(k)
        keys[self.used : end], values[self.used : end] = k, v
        out = ops.attention(q, keys[:end], values[:end], causal=len(q) > 1)  # [n, B, H, E]; a single query sees all
        return out.transpose(0, 1).flatten(0, 1).unsqueeze(1)


def choose(logits: torch.Tensor, o: InferOptions, generators: list[torch.Generator | None]) -> torch.Tensor:
    """Returns the next token [B] for logits fp32 [B, V], or -1 where logits are not finite.

    At temperature 0 it is the likeliest token. Otherwise each row draws with its own generator, from the top_k
    likeliest of the tokens that make up top_p of the probability. A row without a generator gets the likeliest; its
    caller ignores it.
    """
    likeliest = torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)
    if o.temperature == 0:
        return likeliest
    probabilities, tokens = (logits / o.temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= o.top_p, 0)
    if o.top_k:
        probabilities[:, o.top_k :] = 0
    chosen = []
    for i, generator in enumerate(generators):
        if generator is None:
            chosen.append(likeliest[i : i + 1])
        else:
            usable = probabilities[i].nan_to_num(nan=1.0)  # a row with NaN becomes -1 below
            chosen.append(tokens[i, torch.multinomial(usable, 1, generator=generator)])
    return torch.where(likeliest < 0, -1, torch.cat(chosen))


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
) -> list[list[int]]:
    """Generates the answer to each prompt, as token ids. An answer ends before an end token, after o.max_new_tokens, or
    when stop(answer so far) is true.

    show: called with each token of a single prompt as it comes. Greedy generation equals transformers'
    `generate(do_sample=False)`. The draws for a prompt depend on o.seed, its tokens and the number of equal prompts
    before it, not on the batch.

    Raises:
        ValueError: the model's logits are not finite.
    """
    device = next(model.parameters()).device
    answers: list[list[int]] = [[] for _ in prompts]
    seeds, seen = [], Counter()
    for prompt in map(tuple, prompts):
        seeds.append(checkpoint.stable_seed(o.seed, seen[prompt], *prompt))
        seen[prompt] += 1
    for rows in batch_prompts([len(p) for p in prompts], o):
        shortest, longest = len(prompts[rows[0]]), len(prompts[rows[-1]])
        cache = Cache(len(rows), longest + o.max_new_tokens)
        generators = [torch.Generator(device).manual_seed(seeds[i]) for i in rows]
        tokens = torch.tensor([prompts[i][:shortest] for i in rows], device=device)  # [B, n]
        rest = [prompts[i][shortest:] + [-1] * (longest - len(prompts[i])) for i in rows]
        rest = torch.tensor(rest, dtype=torch.int64, device=device)  # [B, longest - shortest], -1 after a prompt
        done = [False] * len(rows)
        for step in range(longest - shortest + o.max_new_tokens):
            n = tokens.shape[1]
            positions = torch.arange(cache.used, cache.used + n, device=device).repeat(len(rows))
            hidden = run_stages(model, tokens.flatten(), positions, cache)
            cache.used += n
            chosen = tokens.new_empty(len(rows))
            if model.last:
                logits = gather_logits(hidden.view(len(rows), n, -1)[:, -1], model)
                # A row draws nothing while its prompt is read, so the draws of its answer are the same in any batch.
                reads = [step < len(prompts[i]) - shortest for i in rows]
                chosen = choose(logits, o, [None if r else g for r, g in zip(reads, generators, strict=True)])
            if not (model.first and model.last):
                last = mpu.get_pipeline_model_parallel_last_rank()
                dist.broadcast(chosen, last, group=mpu.get_pipeline_model_parallel_group())
            if step < longest - shortest:
                chosen = torch.where((rest[:, step] < 0) | (chosen < 0), chosen, rest[:, step])
            for place, token in enumerate(chosen.tolist()):  # waits for the device
                if token < 0:
                    raise ValueError(NOT_FINITE)
                answer = answers[rows[place]]
                if done[place] or step < len(prompts[rows[place]]) - shortest:
                    continue
                done[place] = token in ends
                if not done[place]:
                    answer.append(token)
                    if show:
                        show(token)
                    done[place] = len(answer) == o.max_new_tokens or (stop is not None and stop(answer))
            if all(done):
                break
            tokens = chosen.unsqueeze(1)
    return answers


def run_stages(model, tokens: torch.Tensor, positions: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Runs this pipeline stage on the states of the previous one. Returns its states [T, 1, D], normalised if it is the
    last; the others send them to the next stage."""
    group = mpu.get_pipeline_model_parallel_group()
    if not model.first:
        states = torch.empty(len(tokens), 1, model.hidden_size, dtype=model.config.params_dtype, device=tokens.device)
        dist.recv(states, mpu.get_pipeline_model_parallel_prev_rank(), group=group)
        model.set_input_tensor(states)
    out = model(tokens, positions, [], cache=cache)
    if model.last:
        return out[0]
    dist.send(out.contiguous(), mpu.get_pipeline_model_parallel_next_rank(), group=group)
    return out


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
            logits, target = gather_logits(hidden[part], model), targets[part]  # [n, V], [n]
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


def gather_logits(hidden: torch.Tensor, model) -> torch.Tensor:
    """Returns logits fp32 [B, V] of states [B, D], with the vocabulary gathered over tensor parallel ranks."""
    local = (hidden @ model.output_weight.t()).float()
    tp = model.config.tensor_model_parallel_size
    if tp == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(tp)]
    dist.all_gather(parts, local, group=mpu.get_tensor_model_parallel_group())
    return torch.cat(parts, -1)


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
