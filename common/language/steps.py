"""Turns rows of solutions in steps into tokens, with a label at the token that ends each step.

    text, verdicts = to_steps({"prompt": "1 + 1?", "steps": ["1 + 1 = 3"], "labels": [False]}, "ки")
    tokens, flags = encode_steps(tokenizer, text, verdicts, "ки")

A placeholder ends every step. A row has one of three forms:

    {"prompt": "1 + 1?", "steps": ["1 + 1 = 3", "So 3."], "labels": [false, false]}     question: prompt, completions: steps
    {"input": "1 + 1? 1 + 1 = 3 ки\\nSo 3. ки", "value": ["-", "-"]}                     MindSpeed-LLM, OpenRLHF
    {"input": "1 + 1? 1 + 1 = 3 ки\\nSo 3. ки", "label": "1 + 1? 1 + 1 = 3 -\\nSo 3. -"}  Math-Shepherd, arXiv:2312.08935

The first form becomes the text of the others: the prompt, then for each step a line break, the step, a space and the
placeholder. No chat template is applied. Text after the last placeholder is cut off.

Importing this module imports neither torch nor numpy, which the options do not need.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from common.records import BadRow

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

VERDICTS = {True: True, False: False, "+": True, "-": False}  # 1 and 0 equal True and False
RIGHT, WRONG = 1, 2  # flags of a step's last token; other tokens have 0


def to_steps(row: Any, placeholder: str, labelled: bool = True) -> tuple[str, list[bool]]:
    """Returns the text up to its last placeholder, and for every step whether it is right.

    labelled: whether the row must have labels. Without labels every step counts as right.

    Raises:
        BadRow: the form is unknown, there is no step or no label, a step is empty, or their numbers differ.
    """
    if not isinstance(row, dict):
        raise BadRow("bad row", f"{str(row)[:40]!r}; expected an object")
    row = {key: value for key, value in row.items() if value is not None}
    prompt, steps = row.get("prompt", row.get("question")), row.get("steps", row.get("completions"))
    if prompt is not None and steps is not None:
        text, labels = _join(prompt, steps, placeholder), row.get("labels")
    elif "input" in row:
        text, labels = _text(row["input"], "input"), row.get("value", row.get("label"))
        labels = _labels_in(labels, text, placeholder) if isinstance(labels, str) else labels
    else:
        raise BadRow("unknown format", f"keys: {', '.join(row)}; expected prompt, steps, labels, or input, value")
    count = text.count(placeholder)
    if not count:
        raise BadRow("no step", f"no {placeholder!r} ends one (--placeholder-token)")
    if labels is None and labelled:
        raise BadRow("no labels", f"keys: {', '.join(row)}; expected labels, value or label")
    labels = [True] * count if labels is None else labels
    if not isinstance(labels, list) or len(labels) != count:
        number = len(labels) if isinstance(labels, list) else "no list of"
        raise BadRow("another number of labels", f"{count} steps, {number} labels")
    bad = [label for label in labels if not isinstance(label, bool | int | float | str) or label not in VERDICTS]
    if bad:
        raise BadRow("bad label", f"{str(bad[0])[:40]!r}; expected true or false, + or -, 1 or 0")
    return text[: text.rindex(placeholder) + len(placeholder)], [VERDICTS[label] for label in labels]


def _text(value: Any, field: str) -> str:
    """Returns a text. Replaces lone surrogates, which a tokenizer refuses."""
    if not isinstance(value, str):
        raise BadRow("bad row", f"{field} is {type(value).__name__}; expected text")
    return value.encode(errors="replace").decode()


def _join(prompt: Any, steps: Any, placeholder: str) -> str:
    """Returns the text of a prompt and its steps."""
    if not isinstance(steps, list):
        raise BadRow("bad row", f"the steps are {type(steps).__name__}; expected a list")
    parts = [_text(prompt, "the prompt"), *(_text(step, f"step {i}").strip() for i, step in enumerate(steps))]
    if placeholder in "\n".join(parts):
        raise BadRow("placeholder in the text", f"{placeholder!r} is in the prompt or a step (--placeholder-token)")
    if not all(parts[1:]):
        raise BadRow("empty step", f"step {parts[1:].index('')}")
    return parts[0] + "".join(f"\n{step} {placeholder}" for step in parts[1:])


def _labels_in(marked: str, text: str, placeholder: str) -> list[str]:
    """Returns the labels of Math-Shepherd, whose `label` is the text with a label in place of each placeholder."""
    labels, at = [], 0
    *parts, _ = text.split(placeholder)
    for part in parts:
        if not marked.startswith(part, at):
            raise BadRow("bad row", "label is not the input with + or - in place of each placeholder")
        at += len(part)
        labels.append(marked[at : at + 1])
        at += 1
    return labels


def encode_steps(
    tokenizer: PreTrainedTokenizerBase, text: str, verdicts: list[bool], placeholder: str
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes a text of steps: (tokens int32 [n], flags uint8 [n]). The flag RIGHT or WRONG stands at the last token
    of each placeholder. Raises BadRow if two placeholders end in one token."""
    import numpy as np

    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)[:, 0]
    ends = [match.end() for match in re.finditer(re.escape(placeholder), text)]
    at = np.searchsorted(starts, ends) - 1  # the last token that begins before the placeholder's end
    if len(set(at.tolist())) != len(ends):
        raise BadRow("empty step", f"two {placeholder!r} in one token")
    flags = np.zeros(len(starts), np.uint8)
    flags[at] = np.where(verdicts, RIGHT, WRONG)
    return np.array(encoded["input_ids"], np.int32), flags
