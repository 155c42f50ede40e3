"""Judges a run on the demo's data: by its answers to held-out questions, or beside a trigram model's perplexity."""

from transformers import AutoTokenizer

from common.language.chat import to_chat, to_pair
from common.language.demo import trigram
from common.language.files import read_rows
from common.language.generate import generate

from ..infer import end_tokens
from ..options import DEMO, InferOptions, TrainOptions
from ..score import encoder, score_units


def answer(o: TrainOptions, model) -> tuple[int, int] | None:
    """Answers the demo's held-out questions greedily. Returns (number of right, or for dpo preferred, answers; number
    of questions). For orm, counts the pairs of which the right answer has the higher score, and for prm the solutions
    whose first wrong step is found. None: the run is not on these data, or its layout is not supported here."""
    if not DEMO.has(o.data) or o.job == "pretrain" or (o.vpp, o.cp, o.fsdp, o.sp) != (1, 1, False, False):
        return None
    tokenizer = AutoTokenizer.from_pretrained(o.tokenizer)
    rows = [row for _, row in read_rows(o.validation)]
    if o.job in ("orm", "prm"):
        if o.pp > 1:
            return None
        scores = score_units(o, model.eval(), list(map(encoder(o), rows)))
        model.train()
        return sum(map(_is_found, rows, scores)), len(rows)
    chats = [to_pair(row)[0] if o.job == "dpo" else to_chat(row) for row in rows]
    options = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
    prompts = [
        tokenizer(tokenizer.apply_chat_template(c[:-1], **options), add_special_tokens=False).input_ids for c in chats
    ]
    model.eval()
    answers = generate(model, prompts, InferOptions(max_new_tokens=24, batch=64), end_tokens(tokenizer))
    model.train()
    right = [tokenizer.decode(a).strip() == c[-1]["content"].strip() for a, c in zip(answers, chats, strict=True)]
    return sum(right), len(right)


def _is_found(row: dict, scores: list[list[float]]) -> bool:
    """Returns whether the scores of a row of the demo rank its answers, or find its first wrong step."""
    if "chosen" in row:
        (chosen,), (rejected,) = scores
        return chosen > rejected
    right = [score > 0 for score in scores[0]]
    return [*right, False].index(False) == [*row["labels"], False].index(False)


def compare(o: TrainOptions, vocabulary: int, before: tuple[int, int] | None, after: tuple[int, int] | None) -> str:
    """Returns the text that follows a run's result. before and after are what `answer` returned at the run's start
    (None for initial weights) and at its end."""
    if not DEMO.has(o.data):
        return ""
    if o.job == "pretrain":
        return f" (trigram model of the same text: {trigram.perplexity(o.data, o.validation, vocabulary):.2f})"
    if after is None:
        return "\n        answers: not measured under this layout; see generate.sh"
    right, questions = after
    measures = {"dpo": "as preferred", "orm": "right answers ahead", "prm": "first wrong steps found"}
    measure = f"{measures.get(o.job, 'exactly right')} on {questions} questions never trained on"
    chance = {"orm": "chance 50%", "prm": "chance 17%"}.get(o.job, "chance 2%")
    comparison = f"before: {before[0] / questions:.0%}" if before else chance
    comparison += f", {chance}" if before and o.job in ("orm", "prm") else ""
    return f"\n        {measure}: {right / questions:.0%} ({comparison})"
