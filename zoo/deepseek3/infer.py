"""Generate text with DeepSeek-V3: a chat that streams, or a file of prompts in batches.

    bash zoo/deepseek3/generate.sh --weights DeepSeek-V3 --prompt "Why is the sky blue?"
    bash zoo/deepseek3/generate.sh --weights DeepSeek-V3 --prompts questions.txt --out answers.jsonl
    bash zoo/deepseek3/generate.sh --weights DeepSeek-V3 --prompt "Why is the sky blue?" --speculative

A row of a .jsonl of prompts has a `prompt`, or `messages` that the answer continues; other keys are ignored. The
mechanics of generation are in common/language/generate.py.
"""

import functools
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from common import cli, lora, release
from common.language import decode
from common.language.generate import NOT_FINITE, generate, render_questions, show_answer, write_answers
from common.language.options import read_questions

from . import convert
from .config import Deepseek3Config, model_config
from .model import Deepseek3, build, draw
from .options import InferOptions


def load_model(o, config: Deepseek3Config) -> Deepseek3:
    """Loads this pipeline stage of the model: --weights (a released folder or a checkpoint) and --adapter, if given."""
    chunks = build(o, config)
    release.fill(chunks, o, convert.table(config), functools.partial(draw, config))
    if o.adapter:
        lora.load_adapter(convert.adapter(o.adapter, config), chunks, convert.expert_pieces(config))
    return chunks[0].eval()


def end_tokens(tokenizer) -> set[int]:
    """Returns the ids of the tokens that end an answer."""
    ids = {tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")}  # of the demo's tokenizer
    ids |= {tokenizer.eos_token_id}
    return {i for i in ids if i is not None and i != tokenizer.unk_token_id}


@torch.no_grad()
def speculate(
    model: Deepseek3, prompt: list[int], o: InferOptions, ends: set[int], show: Callable[[int], None] | None
) -> tuple[list[int], int, int]:
    """Generates the answer that `generate` gives at temperature 0, with up to two tokens a step: the multi-token
    prediction module guesses the token after the next one, and the model reads both. Its own choice after the first says
    whether the guess was right. Returns (answer, number of guesses, how many were right).

    Raises:
        ValueError: the model's logits are not finite.
    """
    where = next(model.parameters()).device
    cache = decode.Cache(1, len(prompt) + o.max_new_tokens + 1)

    def likeliest(states: torch.Tensor) -> list[int]:  # [n, 1, D] -> [n]
        chosen = decode.choose(decode.gather_logits(states[:, 0], model), o, [None] * len(states)).tolist()
        if min(chosen) < 0:
            raise ValueError(NOT_FINITE)
        return chosen

    answer, guesses, right = [], 0, 0
    tokens, first, guess = prompt, 0, None  # what the model reads next, its position, and the guess, which is its last
    while True:
        positions = torch.arange(first, first + len(tokens), device=where)
        cache.used = first
        states, _ = model(torch.tensor(tokens, device=where), positions, [], cache=cache)
        chosen = likeliest(states)
        n = len(tokens) if guess in (None, chosen[0]) else 1  # of a wrong guess, nothing is kept
        if guess is not None:
            guesses, right = guesses + 1, right + (n == 2)
        following = [*tokens[1:n], chosen[n - 1]]
        for token in following if guess is not None else following[-1:]:
            if token in ends:
                return answer, guesses, right
            answer.append(token)
            if show:
                show(token)
            if len(answer) == o.max_new_tokens:
                return answer, guesses, right
        ahead = model.predict_ahead(states[:n], torch.tensor(following, device=where), positions[:n], cache)
        (guess,) = likeliest(ahead[-1:])
        tokens, first = [following[-1], guess], first + n


def describe_cache(config: Deepseek3Config, element: int) -> str:
    """Says what generation keeps of every token. element: bytes of a number."""
    size = element * config.num_hidden_layers / 1024
    latents, heads = config.kv_lora_rank + config.qk_rope_head_dim, config.num_attention_heads
    whole = heads * (config.head_dim + config.v_head_dim)
    return f"cache: {latents * size:.1f} KiB a token, {whole * size:.1f} KiB as keys and values"


def main(o: InferOptions) -> None:
    config = model_config(o)
    model = load_model(o, config)
    tokenizer = AutoTokenizer.from_pretrained(o.tokenizer)
    questions = read_questions(o)
    texts = [messages[-1]["content"] for _, messages, _ in questions]
    rendered = render_questions(tokenizer, questions, o.thinking) if o.chat else texts
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in rendered]
    longest = max(map(len, prompts)) + o.max_new_tokens
    if longest > config.positions:
        raise ValueError(
            f"prompt and answer may take {longest} tokens, the model has {config.positions} positions; "
            "fix: --max-new-tokens, or shorter prompts"
        )
    main_rank, single = dist.get_rank() == 0, len(texts) == 1
    show = show_answer(tokenizer) if main_rank and single else None
    ends, began, said = end_tokens(tokenizer), time.perf_counter(), []
    if o.speculative:
        results = [speculate(model, prompt, o, ends, show) for prompt in prompts]
        tokens, guesses, right = [r[0] for r in results], sum(r[1] for r in results), sum(r[2] for r in results)
        said = [f"{right} of {guesses} guesses of the multi-token prediction module were right"]
    else:
        tokens = generate(model, prompts, o, ends, show)
    rate = sum(map(len, tokens)) / (time.perf_counter() - began)
    answers = [tokenizer.decode(a) for a in tokens]
    if main_rank:
        print("\n" * single, end="")
        said += [f"{rate:.1f} tokens/s", describe_cache(config, model.config.params_dtype.itemsize)]
        cli.say("; ".join(said))
    if main_rank and o.out:
        write_answers(o.out, questions, answers)
    elif main_rank and not single:
        for text, answer in zip(texts, answers, strict=True):
            print(f"> {text}\n{answer}\n")
