"""Reads the rows of files that users bring, each with the line it begins on: JSON lines, JSON lists, CSV, prompts, and
columns of parquet and Arrow files.

    for line, row in read_json("chats.jsonl"):
        if isinstance(row, BadRow):
            report.add(row.args[0], f"chats.jsonl:{line}", row.args[1])

Files are UTF-8; a byte order mark at the start is not content. A line ends at \\n or \\r\\n and nowhere else: U+2028,
U+0085 and the form feed are content, which other programs write unescaped into JSON. A complete row that cannot be read
comes as a BadRow, and the reader goes on. Where the reader cannot tell where a row ends, it raises an error.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CHUNK = 1 << 20  # bytes read at a time
DEPTH = 100  # of nested JSON: deeper rows raise RecursionError here, or later when printed or sent to a process
CELL = 131_072  # default limit of characters in a CSV cell: without its closing quote, it takes in the next lines
LONGEST_CELL = 1 << 30
PROMPT_SUFFIXES = (".txt", ".tsv", "", ".jsonl", ".json")


class BadRow(Exception):
    """A row that cannot be used. Its arguments are (reason, detail) for the drop report."""


# ---- lines ----


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yields (number, line without its end) of every line. ValueError: no such file, or not UTF-8; names the line."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, _decode(line, path, number).removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; expected a file; fix: {path}") from error


def _decode(line: bytes, path: str | Path, number: int) -> str:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error) from None
    if number == 1 and "\0" in text:
        raise ValueError(f"{path}:1: a zero byte, as UTF-16 has; expected UTF-8 text; fix: {path}")
    return text


def _not_utf8(path: str | Path, line: int, error: UnicodeDecodeError) -> ValueError:
    wrong = error.object[error.start : error.start + 4]
    return ValueError(f"{path}:{line}: the bytes {wrong.hex(' ')} ({error.reason}); expected UTF-8 text; fix: {path}")


# ---- JSON ----


def parse_json(text: str) -> Any:
    """Parses a JSON text.

    Raises:
        json.JSONDecodeError: the text is malformed.
        BadRow: the JSON is nested too deep, or holds a number too long to read.
    """
    try:
        value = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise _unreadable(error) from None
    return _shallow(value, text)


def _unreadable(error: Exception) -> Exception:
    if isinstance(error, json.JSONDecodeError):
        return error
    deep = isinstance(error, RecursionError)
    return BadRow("unreadable JSON", f"nested more than {DEPTH} deep" if deep else "a number of too many digits")


def _shallow(value: Any, text: str) -> Any:
    """Returns the value parsed from the text. BadRow: it is nested more than DEPTH deep."""
    level = [value] if text.count("[") + text.count("{") > DEPTH else []
    for _ in range(DEPTH):
        children = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for vs in children for v in vs if isinstance(v, (dict, list))]
    if level:
        raise _unreadable(RecursionError())
    return value


def read_json(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields (line, value or BadRow) for the lines of a .jsonl file, or for the items of the list in a .json file.

    Raises:
        ValueError: no such file, not UTF-8, or malformed; names the line.
    """
    yield from (_read_json_list if Path(path).suffix == ".json" else _read_json_lines)(path)


def _read_json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except BadRow as error:
            value = error
        except json.JSONDecodeError as error:
            rule = f"malformed JSON, {error.msg}; expected an object a line"
            raise ValueError(f"{path}:{number}: {rule}; fix: {path}") from None
        yield number, value


def _read_json_list(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Reads the file in pieces, because a list may not fit into memory."""
    decoder, separator = json.JSONDecoder(), re.compile(r"\s*([\[,\]]?)\s*")
    chunks = _read_chunks(path)
    text, at, line, wanted = next(chunks, ""), 0, 1, "["
    while True:
        match, expected = separator.match(text, at), wanted
        try:
            if match[1] == "]" and wanted != "[":
                break
            if match[1] not in wanted or not match[1]:
                raise json.JSONDecodeError(f"expected {' or '.join(wanted)}", text, match.start(1))
            start, wanted = match.end(), ",]"
            if match[1] == "[" and text[start : start + 1] == "]":
                match = separator.match(text, start)
                break
            try:
                item, end = decoder.raw_decode(text, start)
                item = _shallow(item, text[start:end])
            except json.JSONDecodeError:
                raise
            except (RecursionError, ValueError, BadRow) as error:
                item, end = error if isinstance(error, BadRow) else _unreadable(error), _end_of(text, start)
            if NUMBER.match(text, end):  # the item ends with the text so far, and a number may go on
                raise json.JSONDecodeError("the list is not closed", text, end)
        except json.JSONDecodeError as error:
            pieces, size, wanted = [], 0, expected
            while size < max(1, len(text) - at) and (piece := next(chunks, "")):  # at least doubles the text
                pieces.append(piece)
                size += len(piece)
            if not pieces:
                where = line + text.count("\n", at, error.pos)
                rule = f"malformed JSON, {error.msg}; expected a list of objects"
                raise ValueError(f"{path}:{where}: {rule}; fix: {path}") from None
            text, at = text[at:] + "".join(pieces), 0
            continue
        line += text.count("\n", at, start)
        yield line, item
        line, at = line + text.count("\n", start, end), end
    line += text.count("\n", at, match.end())
    if any(piece.strip() for piece in (text[match.end() :], *chunks)):
        raise ValueError(
            f"{path}:{line}: malformed JSON, more after the end of the list; expected one list; fix: {path}"
        )


NUMBER = re.compile(r"[-+.\deE]*\Z")  # characters that may belong to a number, up to the end of a text
TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]|[^\s,:"\[\]{}]+', re.DOTALL)


def _end_of(text: str, start: int) -> int:
    """Returns where the JSON value at `start` ends, whatever it holds; the text's end if it goes on beyond the text."""
    depth = 0
    for token in TOKEN.finditer(text, start):
        if token[0] == '"':  # opens a string that is not closed
            break
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth == 0:
            return token.end()
    return len(text)


def _read_chunks(path: str | Path) -> Iterator[str]:
    """Yields the text of a file in pieces of CHUNK bytes. Raises ValueError as `read_lines` does."""
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    try:
        with open(path, "rb") as file:
            data = True
            while data:
                data = file.read(CHUNK)
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, line + error.object.count(b"\n", 0, error.start), error) from None
                if text:
                    yield text
                line += text.count("\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; expected a file; fix: {path}") from error


# ---- CSV ----


def read_csv(
    path: str | Path, columns: Sequence[Sequence[str]], longest: int = CELL, fix: str = ""
) -> Iterator[tuple[int, dict | BadRow]]:
    """Yields (line, {column of the header: cell}) of a .csv file. Cells beyond the header stand under the key None.

    Args:
        columns: groups of names; the header must have one name of each group.
        longest: most characters of a cell; a row with a longer cell is a BadRow.
        fix: the option that says which columns are read (default: the file itself).

    Raises:
        ValueError: no such file, not UTF-8, a header without these columns, or an unclosed quote; names the line.
    """
    csv.field_size_limit(LONGEST_CELL)
    lines = (line + "\n" for _, line in read_lines(path))
    reader = csv.reader(lines)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise ValueError(f"{path}:1: {error}; expected a header; fix: {path}") from None
    if not all(set(names) & set(header) for names in columns):
        rule = " and one of ".join(", ".join(map(repr, names)) for names in columns)
        rule = rule if len(columns) == 1 else f"one of {rule}"
        raise ValueError(
            f"{path}:1: the header has {', '.join(header) or 'nothing'}; expected {rule}; fix: {fix or path}"
        )
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield first, BadRow("malformed CSV", str(error))
            continue
        if cells is None:
            return
        if lines.gi_frame is None:  # the row goes on beyond the last line
            raise ValueError(f"{path}:{first}: a quote is opened and never closed; expected a closing one; fix: {path}")
        row = dict(zip(header, cells + [None] * (len(header) - len(cells)), strict=False))
        if len(cells) > len(header):
            row[None] = cells[len(header) :]
        if (size := max(map(len, cells), default=0)) > longest:
            detail = f"{size:,} characters in a cell, of at most {longest:,}; is a quote missing?"
            yield first, BadRow("too long a cell", detail)
        elif cells:
            yield first, row


# ---- parquet and Arrow ----


def import_pyarrow(path: Path):
    """Imports the package that reads these files. ValueError: it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{path} needs the package pyarrow, not installed; fix: pip install pyarrow") from None
    return pyarrow


def read_column(path: Path, column: str, fix: str = "") -> Iterator[tuple[int, dict]]:
    """Yields (number, {column: value}) for the rows of a .parquet or .arrow file, counted from 1.

    Raises:
        ValueError: the file is of another kind, or lacks the column; `fix` is the option that named the column.
    """
    pyarrow = import_pyarrow(path)
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            file = ParquetFile(path)
            names, batches = file.schema_arrow.names, lambda: file.iter_batches(1000, columns=[column])
        else:
            try:
                file = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
                names, batches = file.schema.names, lambda: map(file.get_batch, range(file.num_record_batches))
            except pyarrow.ArrowInvalid:  # the datasets library writes a stream
                file = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
                names, batches = file.schema.names, lambda: file
        if column not in names:
            present = ", ".join(names)
            raise ValueError(f"{path} has the columns {present}; expected {column!r}; fix: {fix or path}")
        number = 0
        for batch in batches():
            for value in batch.column(column):
                number += 1
                yield number, {column: value.as_py()}
    except pyarrow.ArrowException as error:
        raise ValueError(f"cannot read {path}: {error}; expected a {path.suffix} file; fix: {path}") from error


# ---- prompts ----


def read_prompts(path: Path, flag: str) -> list[tuple[str, dict]]:
    """Returns (file:line, row) for every prompt. A row is an object of a .jsonl or .json file, or {"prompt": line} for
    each line of a text file that is not blank. The recipe decides which keys a row may have.

    Raises:
        ValueError: no such file, another kind of file, no prompt in it, or a row that cannot be read; names the line.
    """
    rule = "a text file with a prompt per line, or .jsonl"
    if not path.is_file():
        raise ValueError(f"{flag} {path} does not exist; expected {rule}; fix: {flag}")
    if path.suffix not in PROMPT_SUFFIXES:
        raise ValueError(f"unknown kind of file: {flag} {path}; expected {rule}; fix: {flag}")
    rows = read_json(path) if path.suffix in (".jsonl", ".json") else _read_text_prompts(path)
    prompts = [(f"{path}:{line}", row) for line, row in rows]
    for where, row in prompts:
        if isinstance(row, BadRow):
            raise ValueError(f"{where}: {row.args[0]}, {row.args[1]}; expected an object; fix: {path}")
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {str(row)[:60]!r}; expected an object; fix: {path}")
    if not prompts:
        raise ValueError(f"{flag} {path} holds no prompt; expected {rule}; fix: {flag}")
    return prompts


def _read_text_prompts(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in read_lines(path):
        prompt = line.strip()
        try:
            row = parse_json(prompt) if prompt.startswith("{") else None
        except (json.JSONDecodeError, BadRow):
            row = None
        if isinstance(row, dict) and {"prompt", "messages"} & set(row):
            raise ValueError(f"{path}:{number} is a row of JSON; expected a prompt; fix: call the file .jsonl")
        if prompt:
            yield number, {"prompt": prompt}
