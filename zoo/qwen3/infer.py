"""Generate text with Qwen3: a chat that streams, or a file of prompts in batches. Score what others wrote.

    bash zoo/qwen3/generate.sh --weights Qwen3-8B --prompt "Why is the sky blue?"
    bash zoo/qwen3/generate.sh --weights Qwen3-8B --prompts questions.txt --out answers.jsonl

Of a .jsonl of prompts a row's `messages` are continued; other keys are ignored.

Prompts of about one length share a batch without any padding: while the shorter ones already answer, what is left of
the longer ones is read a token a step. Tensor parallelism works as in training; pipeline stages work one after the other
(no micro-batches in between): for models that fit no other way.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from transformers import AutoTokenizer

from common import checkpoint, lora, ops, release
from common.records import BadRow

from . import convert, data
from .config import Qwen3Config, model_config
from .model import Qwen3, build, draw
from .options import InferOptions, read_questions

NOT_FINITE = (
    "the model's logits are not finite: damaged weights, or too large for this precision; fix: --weights or --precision"
)


class Cache:
    """Keys and values of every layer so far, [S, B, K, E], for B sequences of one length."""

    def __init__(self, batch: int, length: int):
        self.batch, self.length, self.kept, self.used = batch, length, {}, 0

    def attend(self, layer: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of the newest tokens to all; q [B*n, 1, H, E], k and v [B*n, 1, K, E], sequences end to end."""
        q, k, v = (t.unflatten(0, (self.batch, -1)).squeeze(2).transpose(0, 1) for t in (q, k, v))  # [n, B, H, E]
        if layer not in self.kept:
            self.kept[layer] = k.new_empty(2, self.length, *k.shape[1:])
        kept, end = self.kept[layer], self.used + len(k)
        kept[0, self.used : end], kept[1, self.used : end] = k, v
        out = ops.attention(q, kept[0, :end], kept[1, :end], causal=len(q) > 1)  # [n, B, H, E]; one query sees all
        return out.transpose(0, 1).flatten(0, 1).unsqueeze(1)


def choose(logits: torch.Tensor, o: InferOptions, generators: list[torch.Generator | None]) -> torch.Tensor:
    """The next token [B] of logits fp32 [B, V]: the likeliest at temperature 0, else drawn from the top_k likeliest of
    those that make up top_p of the probability, each row with its own generator (None: the likeliest, which nobody
    reads). -1 where logits are not finite."""
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
            usable = probabilities[i].nan_to_num(nan=1.0)  # of a row that is -1 already
            chosen.append(tokens[i, torch.multinomial(usable, 1, generator=generator)])
    return torch.where(likeliest < 0, -1, torch.cat(chosen))


def batches(lengths: list[int], o: InferOptions) -> Iterator[list[int]]:
    """Which prompts are generated together, by their lengths: neighbours, where reading the rest of the longest adds at
    most a quarter to the steps of the answer."""
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
    model: Qwen3,
    prompts: list[list[int]],
    o: InferOptions,
    ends: set[int],
    show: Callable[[int], None] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """What follows each prompt (token ids), up to an end token (left out), o.max_new_tokens, or stop(answer so far).
    show: called with each token of a single prompt as it comes. Greedy generation is transformers'
    `generate(do_sample=False)`. What is drawn for a prompt depends on o.seed, its tokens and how many equal prompts stand
    before it, not on the batch.

    Raises:
        ValueError: the model's logits are not finite.
    """
    where = next(model.parameters()).device
    answers: list[list[int]] = [[] for _ in prompts]
    seeds, seen = [], Counter()
    for prompt in map(tuple, prompts):
        seeds.append(checkpoint.stable_seed(o.seed, seen[prompt], *prompt))
        seen[prompt] += 1
    for rows in batches([len(p) for p in prompts], o):
        shortest, longest = len(prompts[rows[0]]), len(prompts[rows[-1]])
        cache = Cache(len(rows), longest + o.max_new_tokens)
        generators = [torch.Generator(where).manual_seed(seeds[i]) for i in rows]
        tokens = torch.tensor([prompts[i][:shortest] for i in rows], device=where)  # [B, n]
        rest = [prompts[i][shortest:] + [-1] * (longest - len(prompts[i])) for i in rows]
        rest = torch.tensor(rest, dtype=torch.int64, device=where)  # [B, longest - shortest], -1: the answer's own
        done = [False] * len(rows)
        for step in range(longest - shortest + o.max_new_tokens):
            n = tokens.shape[1]
            positions = torch.arange(cache.used, cache.used + n, device=where).repeat(len(rows))
            hidden = through_stages(model, tokens.flatten(), positions, cache)
            cache.used += n
            chosen = tokens.new_empty(len(rows))
            if model.last:
                logits = whole_logits(hidden.view(len(rows), n, -1)[:, -1], model)
                # A row whose prompt is still being read draws nothing: its answer's draws are the same in any batch.
                reads = [step < len(prompts[i]) - shortest for i in rows]
                chosen = choose(logits, o, [None if r else g for r, g in zip(reads, generators, strict=True)])
            if not (model.first and model.last):
                last = mpu.get_pipeline_model_parallel_last_rank()
                dist.broadcast(chosen, last, group=mpu.get_pipeline_model_parallel_group())
            if step < longest - shortest:
                chosen = torch.where((rest[:, step] < 0) | (chosen < 0), chosen, rest[:, step])
            for place, token in enumerate(chosen.tolist()):  # the reader waits for it, and so do we
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


def through_stages(model: Qwen3, tokens: torch.Tensor, positions: torch.Tensor, cache: Cache) -> torch.Tensor:
    """States [T, 1, D] after this stage, the last one's normalised; what the stage before sends comes in first."""
    group = mpu.get_pipeline_model_parallel_group()
    if not model.first:
        states = torch.empty(
            len(tokens), 1, model.qwen.hidden_size, dtype=model.config.params_dtype, device=tokens.device
        )
        dist.recv(states, mpu.get_pipeline_model_parallel_prev_rank(), group=group)
        model.set_input_tensor(states)
    out = model(tokens, positions, [], cache=cache)
    if model.last:
        return out[0]
    dist.send(out.contiguous(), mpu.get_pipeline_model_parallel_next_rank(), group=group)
    return out


@torch.no_grad()
def score(
    model: Qwen3, requests: list[tuple[list[int], list[list[int]]]], row_tokens: int
) -> list[list[tuple[float, bool]]]:
    """How likely texts are. requests: (tokens the model reads, endings); an ending is what the last of its length of
    these tokens are followed by, one place further each. Per ending (its log-probability, whether each of its tokens is
    the likeliest). Requests are packed into rows of at most row_tokens, if none alone is longer; only the places of
    endings get logits, ops.CHUNK of them at a time."""
    where = next(model.parameters()).device
    results: list[list[tuple[float, bool]]] = []
    for row in rows_of_at_most(row_tokens, [len(tokens) for tokens, _ in requests]):
        row = [requests[i] for i in row]
        bounds = [0]
        for tokens, _ in row:
            bounds.append(bounds[-1] + len(tokens))
        endings = [(end, ending) for end, (_, few) in zip(bounds[1:], row, strict=True) for ending in few]
        tokens = torch.tensor([t for tokens, _ in row for t in tokens], device=where)  # [T]
        positions = torch.cat([torch.arange(len(tokens)) for tokens, _ in row]).to(where)
        places = torch.cat([torch.arange(end - len(ending), end) for end, ending in endings]).to(where)  # [N]
        targets = torch.tensor([t for _, ending in endings for t in ending], device=where)  # [N]
        hidden = model(tokens, positions, bounds)[0][places, 0]  # [N, D]
        logs, likeliest = [], []
        step = max(1, ops.CHUNK // model.qwen.vocab_size)
        for part in (slice(i, i + step) for i in range(0, len(places), step)):
            logits, target = whole_logits(hidden[part], model), targets[part]  # [n, V], [n]
            logs.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1))
            likeliest.append(logits.argmax(1) == target)
        sizes = [len(ending) for _, ending in endings]
        sums = torch.stack([t.sum() for t in torch.cat(logs).cpu().double().split(sizes)])
        if not sums.isfinite().all():
            raise ValueError(NOT_FINITE)
        sums = sums.tolist()
        every = [bool(t.all()) for t in torch.cat(likeliest).cpu().split(sizes)]
        found = iter(zip(sums, every, strict=True))
        results += [[next(found) for _ in few] for _, few in row]
    return results


def rows_of_at_most(most: int, lengths: list[int]) -> Iterator[list[int]]:
    """Indices of neighbours that fit a row; one that is longer than a row has one for itself."""
    row, used = [], 0
    for i, length in enumerate(lengths):
        if row and used + length > most:
            yield row
            row, used = [], 0
        row.append(i)
        used += length
    if row:
        yield row


def whole_logits(hidden: torch.Tensor, model: Qwen3) -> torch.Tensor:
    """Logits fp32 [B, V] of states [B, D], the vocabulary gathered over tensor parallel."""
    local = (hidden @ model.output_weight.t()).float()
    tp = model.config.tensor_model_parallel_size
    if tp == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(tp)]
    dist.all_gather(parts, local, group=mpu.get_tensor_model_parallel_group())
    return torch.cat(parts, -1)


def load_model(o, config: Qwen3Config) -> Qwen3:
    """This pipeline stage of the model of --weights, a released folder or a run's checkpoint, with --adapter if given."""
    chunks = build(o, config)
    release.fill(chunks, o, convert.table(config), functools.partial(draw, config))
    if getattr(o, "adapter", None):
        lora.load_adapter(convert.adapter(o.adapter, config), chunks)
    return chunks[0].eval()


def end_tokens(tokenizer) -> set[int]:
    """The ids at which an answer ends."""
    found = {tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")} | {tokenizer.eos_token_id}
    return {i for i in found if i is not None and i != tokenizer.unk_token_id}


def render_questions(tokenizer, asked: list[tuple], thinking: bool) -> list[str]:
    """What the chat template makes of `read_questions`. ValueError: it refuses one; names its line."""
    found = []
    for where, messages, tools in asked:
        try:
            found.append(data.render(tokenizer, messages, tools, add_generation_prompt=True, enable_thinking=thinking))
        except BadRow as error:
            rule = "messages of its roles"
            raise ValueError(f"{where}: {error.args[0]}, {error.args[1]}; expected {rule}; fix: {where}") from None
    return found


def main(o: InferOptions) -> None:
    config = model_config(o)
    model = load_model(o, config)
    tokenizer = AutoTokenizer.from_pretrained(o.tokenizer)
    asked = read_questions(o)
    texts = [messages[-1]["content"] for _, messages, _ in asked]
    rendered = render_questions(tokenizer, asked, o.thinking) if o.chat else texts
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in rendered]
    longest = max(map(len, prompts)) + o.max_new_tokens
    if longest > config.positions:
        raise ValueError(
            f"prompt and answer may take {longest} tokens, the model has {config.positions} positions; "
            "fix: --max-new-tokens, --yarn, or shorter prompts"
        )
    main_rank, shown = dist.get_rank() == 0, []

    def show(token: int) -> None:  # only what is whole: half a character decodes to a replacement mark
        before = tokenizer.decode(shown)
        shown.append(token)
        text = tokenizer.decode(shown)
        if main_rank and not text.endswith("\ufffd"):
            print(text[len(before.rstrip("\ufffd")) :], end="", flush=True)

    answers = generate(model, prompts, o, end_tokens(tokenizer), show if len(texts) == 1 else None)
    if main_rank and len(texts) == 1:
        print()
    if main_rank and o.out:
        o.out.parent.mkdir(parents=True, exist_ok=True)
        asked = [{"prompt": m[0]["content"]} if len(m) == 1 else {"messages": m} for _, m, _ in asked]
        rows = [row | {"answer": tokenizer.decode(a)} for row, a in zip(asked, answers, strict=True)]
        o.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{len(rows)} answers in {o.out}")
    elif main_rank and len(texts) > 1:
        for text, answer in zip(texts, answers, strict=True):
            print(f"> {text}\n{tokenizer.decode(answer)}\n")
