"""Score rows with a reward model: answers (orm.sh --score) or the steps of solutions (prm.sh --score).

    bash zoo/qwen3/orm.sh --weights my-reward-model --score answers.jsonl --out scores
    bash zoo/qwen3/prm.sh --weights my-step-judge --score solutions.jsonl --out scores

Writes scores.jsonl to the run folder, a row for each row that is read: the score of an answer, or of `chosen` and
`rejected`; for steps, the probability that each is right.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from common import device, jsonl
from common.drops import DropReport
from common.language import reward
from common.language.files import read_rows
from common.language.options import reward_token_ids
from common.records import BadRow

from .config import model_config
from .infer import load_model
from .options import TrainOptions


def encoder(o: TrainOptions) -> Callable:
    """Returns the function from a row to its sequences (`reward.encoder`)."""
    return reward.encoder(AutoTokenizer.from_pretrained(o.tokenizer), o.placeholder_token if o.job == "prm" else None)


def reward_tokens(o: TrainOptions) -> torch.Tensor | None:
    """Returns the ids of the tokens of right and wrong, int64 [2] on the device; None for orm, which has a score."""
    return torch.tensor(reward_token_ids(o), device=device.current()) if o.job == "prm" else None


def score_units(o: TrainOptions, model: torch.nn.Module, units: list[list]) -> list[list[list[float]]]:
    """Returns the scores of each row's sequences: one for an answer, one for each step of a solution."""
    sequences = [sequence for unit in units for sequence in unit]
    scores = iter(reward.score(model, sequences, o.seq_len, reward_tokens(o)))
    return [[next(scores) for _ in unit] for unit in units]


def as_row(o: TrainOptions, where: str, scores: list[list[float]]) -> dict:
    """Returns a row of scores.jsonl."""
    if o.job == "prm":
        return {"where": where, "scores": torch.tensor(scores[0]).sigmoid().tolist()}
    names = ("chosen", "rejected") if len(scores) == 2 else ("score",)
    return {"where": where} | {name: score for name, (score,) in zip(names, scores, strict=True)}


def write_scores(o: TrainOptions) -> None:
    """Scores the rows of --score. Rows that cannot be scored are counted as in training.

    Raises:
        ValueError: they are more than the share --max-drop.
    """
    config, encode = model_config(o), encoder(o)
    report, places, units = DropReport(), [], []
    for where, row in read_rows(o.score):
        try:
            if isinstance(row, BadRow):
                raise row
            unit = encode(row)
            if (longest := max(len(tokens) for tokens, _ in unit)) > config.positions:
                raise BadRow("too long", f"{longest} tokens, the model has {config.positions} positions")
        except BadRow as error:
            report.add(error.args[0], where, error.args[1])
        else:
            places.append(where)
            units.append(unit)
    report.check(len(units) + len(report.drops), o.max_drop)
    scores = score_units(o, load_model(o, config), units)
    if dist.get_rank() == 0:
        o.out.mkdir(parents=True, exist_ok=True)
        jsonl.write(o.out / "scores.jsonl", [as_row(o, *each) for each in zip(places, scores, strict=True)])
        report.save(o.out)
        print(f"{o.out / 'scores.jsonl'}: {len(units)} rows; {report}", flush=True)
