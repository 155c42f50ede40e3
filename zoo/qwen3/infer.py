"""Generate text with Qwen3: a chat that streams, or a file of prompts in batches.

    bash zoo/qwen3/generate.sh --weights Qwen3-8B --prompt "Why is the sky blue?"
    bash zoo/qwen3/generate.sh --weights Qwen3-8B --prompts questions.txt --out answers.jsonl

A row of a .jsonl of prompts has a `prompt`, or `messages` that the answer continues; other keys are ignored. The
mechanics of generation are in common/language/generate.py.
"""

import functools

import torch.distributed as dist
from transformers import AutoTokenizer

from common import lora, release
from common.language.generate import generate, render_questions, show_answer, write_answers
from common.language.options import read_questions

from . import convert
from .config import Qwen3Config, model_config
from .model import Qwen3, build, draw
from .options import InferOptions


def load_model(o, config: Qwen3Config) -> Qwen3:
    """Loads this pipeline stage of the model: --weights (a released folder or a checkpoint) and --adapter, if given."""
    chunks = build(o, config)
    release.fill(chunks, o, convert.table(config), functools.partial(draw, config))
    if o.adapter:
        lora.load_adapter(convert.adapter(o.adapter, config), chunks, convert.expert_pieces(config))
    return chunks[0].eval()


def end_tokens(tokenizer) -> set[int]:
    """Returns the ids of the tokens that end an answer."""
    ids = {tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")} | {tokenizer.eos_token_id}
    return {i for i in ids if i is not None and i != tokenizer.unk_token_id}


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
            "fix: --max-new-tokens, --yarn, or shorter prompts"
        )
    main_rank, single = dist.get_rank() == 0, len(texts) == 1
    show = show_answer(tokenizer) if main_rank and single else None
    answers = [tokenizer.decode(a) for a in generate(model, prompts, o, end_tokens(tokenizer), show)]
    if main_rank and single:
        print()
    if main_rank and o.out:
        write_answers(o.out, questions, answers)
    elif main_rank and not single:
        for text, answer in zip(texts, answers, strict=True):
            print(f"> {text}\n{answer}\n")
