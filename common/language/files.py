"""Reads the user's files of a language job, and identifies its tokenizer. This module does not import torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import weights
from common.records import read_json

CHATS = (".jsonl", ".json")  # kinds of files that hold conversations or pairs


def list_files(path: str | Path, suffixes: Sequence[str]) -> list[Path]:
    """Returns the file, or the files of these kinds anywhere under the folder, sorted.

    Raises:
        ValueError: the path is missing, the file is of another kind, or the folder holds no such file.
    """
    path, kinds = Path(path), ", ".join(suffixes)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
        if not files:
            raise ValueError(f"{path} holds no data file; expected {kinds}; fix: --data")
        return files
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a file ({kinds}) or a folder of them; fix: --data")
    if path.suffix not in suffixes:
        raise ValueError(f"unknown kind of file: {path}; expected {kinds}; fix: --data")
    return [path]


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yields (file:line, row or BadRow) of .jsonl and .json files.

    Raises:
        ValueError: a file is malformed or not UTF-8 (the message names file and line), or there is no row at all.
    """
    has_rows = False
    for file in list_files(path, CHATS):
        for line, row in read_json(file):
            has_rows = True
            yield f"{file.name}:{line}", row
    if not has_rows:
        raise ValueError(f"{path} holds no row; expected an object per line; fix: {path}")


def tokenizer_hash(folder: str | Path) -> str:
    """Returns a hash of the files that decide the tokens of a text and of a conversation. Raises ValueError if there is
    no tokenizer.json."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; expected a released tokenizer's folder; fix: --tokenizer")
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    contents = [(Path(folder) / name).read_bytes() for name in names if (Path(folder) / name).is_file()]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()


def largest_token(tokenizer: Path) -> int:
    """Returns the largest token id of a tokenizer.json."""
    values = weights.read_json(tokenizer)
    added = [token["id"] for token in values.get("added_tokens", [])]
    return max([*values["model"]["vocab"].values(), *added])
