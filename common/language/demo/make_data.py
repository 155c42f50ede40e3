"""Demo data: English that every Python carries, and a task whose answers can be checked.

    python -m common.language.demo.make_data --out data/demo

writes these files:

    text/{train,validation}.jsonl    rows {"text": docstring}
    sft/{train,test}.jsonl           conversations that ask for five digits in ascending order
    lora/{train,test}.jsonl          the same in descending order
    dpo/{train,test}.jsonl           the questions of sft; chosen: digits with spaces between them, rejected: without
    orm/{train,test}.jsonl           the questions of sft; chosen: the answer, rejected: another order of its digits
    prm/{train,test}.jsonl           its answers digit by digit, each step with a label; five of six go wrong
    tasks/sort_digits.jsonl          test questions with four answers to choose from; this file is in the repository

The texts are the docstrings of at least 100 characters of the running Python's own standard library (PSF licence). In
3.11 these are about 3,600 documents, 1.4 million characters. Other versions have others, so the repository holds none.

One eighth of the multisets of digits is in no train file, in any order. So no answer of the test files is trained on.
Chance: a random order of the given digits is right in 2 % of the questions.
"""

import argparse
import ast
import hashlib
import json
import os
import platform
import random
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from itertools import combinations_with_replacement, permutations
from pathlib import Path

from common import processes

SHORTEST = 100  # characters of a document
HELD_OUT = 20  # one in 20 documents, by hash, is for validation
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
DIGITS = 5
PROMPT = "Sort the digits: {}"
DESCENDING = "Sort the digits, largest first: {}"


def docstrings() -> Iterator[str]:
    """Yields the docstrings of the standard library's modules, classes and functions, each once, in order of files."""
    library, seen = Path(sysconfig.get_paths()["stdlib"]), set()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.rglob("*.py")):
        if NOT_LIBRARY & set(path.relative_to(library).parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some files are examples of another Python version's syntax
            continue
        for node in ast.walk(tree):
            text = (ast.get_docstring(node) or "") if isinstance(node, kinds) else ""
            if len(text) >= SHORTEST and text not in seen:
                seen.add(text)
                yield text


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_text(folder: Path) -> None:
    splits = {"train": [], "validation": []}
    for text in docstrings():
        digest = int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big")
        splits["train" if digest % HELD_OUT else "validation"].append({"text": text})
    for split, rows in splits.items():
        _write(folder / f"{split}.jsonl", rows)


def questions(split: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Returns `count` different pairs (digits, digits in ascending order) from the multisets of a split."""
    answers = ["".join(digits) for digits in combinations_with_replacement("0123456789", DIGITS)]
    random.Random(seed).shuffle(answers)
    answers = answers[len(answers) // 8 :] if split == "train" else answers[: len(answers) // 8]
    pairs = sorted({("".join(order), answer) for answer in answers for order in permutations(answer)})
    random.Random(f"{seed} {split}").shuffle(pairs)
    if count > len(pairs):
        raise ValueError(f"{count} questions; expected at most {len(pairs)}, all there are of {split}; fix: --{split}")
    return pairs[:count]


def write_sft(folder: Path, train: int, test: int, seed: int, prompt: str = PROMPT) -> None:
    for split, count in (("train", train), ("test", test)):
        rows = []
        for digits, answer in questions(split, count, seed):
            question = {"role": "user", "content": prompt.format(digits)}
            answer = answer[::-1] if prompt == DESCENDING else answer
            rows.append({"messages": [question, {"role": "assistant", "content": answer}]})
        _write(folder / f"{split}.jsonl", rows)


def write_pairs(folder: Path, train: int, test: int, seed: int) -> None:
    """Writes pairs. The rejected answer is the one without spaces, which the demo's weights give."""
    for split, count in (("train", train), ("test", test)):
        rows = [
            {"prompt": PROMPT.format(digits), "chosen": " ".join(answer), "rejected": answer}
            for digits, answer in questions(split, count, seed)
        ]
        _write(folder / f"{split}.jsonl", rows)


def write_ranked(folder: Path, train: int, test: int, seed: int) -> None:
    """Writes pairs of which the chosen answer is right, and the rejected one has the same digits in another order."""
    draw = random.Random(f"{seed} orders")
    for split, count in (("train", train), ("test", test)):
        rows = []
        for digits, answer in questions(split, 2 * count, seed):
            wrong = "".join(draw.sample(answer, DIGITS))
            if wrong != answer and len(rows) < count:
                rows.append({"prompt": PROMPT.format(digits), "chosen": answer, "rejected": wrong})
        _write(folder / f"{split}.jsonl", rows)


def write_steps(folder: Path, train: int, test: int, seed: int) -> None:
    """Writes solutions in five steps, each of which gives the next digit of the answer. At one step, or at none with
    the same chance, another digit is given. That step is wrong, and so are those after it."""
    draw = random.Random(f"{seed} steps")
    for split, count in (("train", train), ("test", test)):
        rows = []
        for digits, answer in questions(split, count, seed):
            wrong = draw.randrange(DIGITS + 1)
            if wrong < DIGITS:
                other = draw.choice([digit for digit in "0123456789" if digit != answer[wrong]])
                answer = answer[:wrong] + other + answer[wrong + 1 :]
            labels = [i < wrong for i in range(DIGITS)]
            rows.append({"prompt": PROMPT.format(digits), "steps": list(answer), "labels": labels})
        _write(folder / f"{split}.jsonl", rows)


def write_tasks(folder: Path, count: int, seed: int) -> None:
    """Writes questions with four choices: the right answer and three other orders of its digits."""
    draw, rows = random.Random(seed), []
    for digits, answer in questions("test", 2 * count, seed):
        wrong = sorted({"".join(order) for order in permutations(answer)} - {answer})
        if len(wrong) >= 3 and len(rows) < count:
            choices = draw.sample([answer, *draw.sample(wrong, 3)], 4)
            rows.append({"digits": digits, "choices": choices, "answer": choices.index(answer)})
    _write(folder / "sort_digits.jsonl", rows)


def _make(out: Path, settings: dict, write) -> Path:
    """Runs write(folder) in a temporary folder and renames it to `out`, so that a killed run leaves no partial data. A
    folder made with the same settings is reused. A folder without demo data is refused. If two runs need the folder,
    one makes it and the other waits."""
    out, marker = Path(out), json.dumps(settings)
    if not _made(out, marker):
        with processes.exclusive(out, marker):
            if not _made(out, marker):
                _build(out, marker, write)
    return out


def _made(out: Path, marker: str) -> bool:
    try:
        return (out / "demo.json").read_text() == marker
    except FileNotFoundError:
        return False


def _build(out: Path, marker: str, write) -> None:
    if out.exists() and any(out.iterdir()) and not (out / "demo.json").is_file():
        raise ValueError(f"{out} holds other files; expected a new or a demo data folder; fix: --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write(building)
        (building / "demo.json").write_text(marker)
        building.chmod(0o755)  # mkdtemp makes 0700
        shutil.rmtree(out, ignore_errors=True)
        os.replace(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def make(out: Path) -> Path:
    """Writes train.jsonl and validation.jsonl to `out`: text of the standard library, the same in every run."""
    return _make(out, {"python": platform.python_version(), "held out": HELD_OUT}, write_text)


def make_sft(out: Path, train: int = 8000, test: int = 400, seed: int = 0) -> Path:
    """Writes train.jsonl and test.jsonl to `out`: conversations that ask for ascending order."""
    settings = {"sft": PROMPT, "train": train, "test": test, "seed": seed}
    return _make(out, settings, lambda folder: write_sft(folder, train, test, seed))


def make_descending(out: Path, train: int = 8000, test: int = 400, seed: int = 0) -> Path:
    """Writes train.jsonl and test.jsonl to `out`: conversations that ask for descending order."""
    settings = {"sft": DESCENDING, "train": train, "test": test, "seed": seed}
    return _make(out, settings, lambda folder: write_sft(folder, train, test, seed, DESCENDING))


def make_pairs(out: Path, train: int = 4000, test: int = 400, seed: int = 0) -> Path:
    """Writes train.jsonl and test.jsonl to `out`: preference pairs."""
    settings = {"pairs": PROMPT, "preferred": "spaces", "train": train, "test": test, "seed": seed}
    return _make(out, settings, lambda folder: write_pairs(folder, train, test, seed))


def make_ranked(out: Path, train: int = 4000, test: int = 400, seed: int = 0) -> Path:
    """Writes train.jsonl and test.jsonl to `out`: pairs of a right and a wrong answer."""
    settings = {"ranked": PROMPT, "train": train, "test": test, "seed": seed}
    return _make(out, settings, lambda folder: write_ranked(folder, train, test, seed))


def make_steps(out: Path, train: int = 8000, test: int = 400, seed: int = 0) -> Path:
    """Writes train.jsonl and test.jsonl to `out`: solutions in steps with labels."""
    settings = {"steps": PROMPT, "each": "a digit", "train": train, "test": test, "seed": seed}
    return _make(out, settings, lambda folder: write_steps(folder, train, test, seed))


def make_tasks(out: Path, count: int = 100, seed: int = 0) -> Path:
    """Writes sort_digits.jsonl to `out`: the questions of the tasks in `tasks/`."""
    settings = {"tasks": PROMPT, "count": count, "seed": seed}
    return _make(out, settings, lambda folder: write_tasks(folder, count, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; complete parts are reused")
    out = parser.parse_args().out
    kinds = {"text": make, "sft": make_sft, "lora": make_descending, "dpo": make_pairs, "orm": make_ranked,
             "prm": make_steps, "tasks": make_tasks}  # fmt: skip
    print(*(function(out / name) for name, function in kinds.items()), sep="\n")


if __name__ == "__main__":
    main()
