"""The files of a language job: the user's rows, and what decides the tokens of a text. No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import weights
from common.records import read_json

CHATS = (".jsonl", ".json")  # what rows of conversations and of pairs are read from


def list_files(path: str | Path, suffixes: Sequence[str]) -> list[Path]:
    """The file, or the files of those kinds anywhere under the folder, sorted.

    Raises:
        ValueError: missing, of another kind, or an empty folder.
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
    """(file:line, row, or BadRow) of .jsonl and .json files.

    Raises:
        ValueError: malformed, or not UTF-8, which names file and line; or there is no row at all.
    """
    found = False
    for file in list_files(path, CHATS):
        for line, row in read_json(file):
            found = True
            yield f"{file.name}:{line}", row
    if not found:
        raise ValueError(f"{path} holds no row; expected an object per line; fix: {path}")


def tokenizer_hash(folder: str | Path) -> str:
    """Of what decides the tokens of a text and of a conversation. ValueError: no tokenizer.json."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; expected a released tokenizer's folder; fix: --tokenizer")
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    contents = [(Path(folder) / name).read_bytes() for name in names if (Path(folder) / name).is_file()]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()


def largest_token(tokenizer: Path) -> int:
    """The largest id of a tokenizer.json."""
    values = weights.read_json(tokenizer)
    added = [token["id"] for token in values.get("added_tokens", [])]
    return max([*values["model"]["vocab"].values(), *added])
