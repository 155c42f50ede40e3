"""The rows of text files that users bring, each with the line it begins on: JSON lines, JSON lists, CSV, prompts, and the
columns of parquet and Arrow files.

    for line, row in read_json("chats.jsonl"):
        if isinstance(row, BadRow):
            report.add(row.args[0], f"chats.jsonl:{line}", row.args[1])

Files are UTF-8; a byte order mark at the start is no content. A line ends at \\n or \\r\\n and nowhere else: U+2028, U+0085
and the form feed are content, and stand unescaped in JSON that other programs write. A row that is whole but cannot be
read comes as a BadRow, and the reader goes on; where rows cannot be told apart any more, the file is an error.
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
DEPTH = 100  # of JSON: deeper rows end in RecursionError here, or later where they are printed or sent to a process
CELL = 131_072  # characters of a CSV cell, unless more are asked for: a lost quote swallows the lines after it
LONGEST_CELL = 1 << 30
PROMPT_SUFFIXES = (".txt", ".tsv", "", ".jsonl", ".json")


class BadRow(Exception):
    """A row that cannot be used: (reason, detail) of the drop report."""


# ---- lines ----


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number, line without its end) of every line. ValueError: no such file, or not UTF-8; names the line."""
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
    found = error.object[error.start : error.start + 4]
    return ValueError(f"{path}:{line}: the bytes {found.hex(' ')} ({error.reason}); expected UTF-8 text; fix: {path}")


# ---- JSON ----


def parse_json(text: str) -> Any:
    """The value of a text.

    Raises:
        json.JSONDecodeError: malformed.
        BadRow: it is JSON that is nested too deep, or holds a number too long to read.
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
    """The value that stands in the text. BadRow: it is nested more than DEPTH deep."""
    level = [value] if text.count("[") + text.count("{") > DEPTH else []
    for _ in range(DEPTH):
        children = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for vs in children for v in vs if isinstance(v, (dict, list))]
    if level:
        raise _unreadable(RecursionError())
    return value


def read_json(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line, value, or BadRow) of a .jsonl file, or of the items of the list that a .json file is.

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
    """In pieces, as a list need not fit into memory."""
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
            if NUMBER.match(text, end):  # which may go on
                raise json.JSONDecodeError("the list is not closed", text, end)
        except json.JSONDecodeError as error:
            more, size, wanted = [], 0, expected
            while size < max(1, len(text) - at) and (piece := next(chunks, "")):  # at least twice as much as before
                more.append(piece)
                size += len(piece)
            if not more:
                where = line + text.count("\n", at, error.pos)
                rule = f"malformed JSON, {error.msg}; expected a list of objects"
                raise ValueError(f"{path}:{where}: {rule}; fix: {path}") from None
            text, at = text[at:] + "".join(more), 0
            continue
        line += text.count("\n", at, start)
        yield line, item
        line, at = line + text.count("\n", start, end), end
    line += text.count("\n", at, match.end())
    if any(piece.strip() for piece in (text[match.end() :], *chunks)):
        raise ValueError(
            f"{path}:{line}: malformed JSON, more after the end of the list; expected one list; fix: {path}"
        )


NUMBER = re.compile(r"[-+.\deE]*\Z")  # what may belong to a number at the end of a text
TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]|[^\s,:"\[\]{}]+', re.DOTALL)


def _end_of(text: str, start: int) -> int:
    """Where the JSON value at `start` ends, whatever it holds; the end of the text if it does not end in it."""
    depth = 0
    for token in TOKEN.finditer(text, start):
        if token[0] == '"':  # of a string that is not closed
            break
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth == 0:
            return token.end()
    return len(text)


def _read_chunks(path: str | Path) -> Iterator[str]:
    """The text of a file in pieces of CHUNK bytes. ValueError as of `read_lines`."""
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    try:
        with open(path, "rb") as file:
            more = True
            while more:
                more = file.read(CHUNK)
                try:
                    text = decoder.decode(more, final=not more)
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
    """(line, row by the names of the header) of a .csv file; what a row has beyond the header stands under None.

    Args:
        columns: of each group of names the header must have one.
        longest: characters of a cell; a row with a longer one is a BadRow.
        fix: the option that says which columns are read (default: the file itself).

    Raises:
        ValueError: no such file, not UTF-8, another header, or a quote that is not closed; names the line.
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
        if lines.gi_frame is None:  # the row asked for a line after the last one
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
    """The package that reads these files. ValueError: it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{path} needs the package pyarrow, not installed; fix: pip install pyarrow") from None
    return pyarrow


def read_column(path: Path, column: str, fix: str = "") -> Iterator[tuple[int, dict]]:
    """(number, {column: value}) of the rows of a .parquet or .arrow file, from 1.

    Raises:
        ValueError: none of its kind, or without the column; `fix` is the option that named it.
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
            except pyarrow.ArrowInvalid:  # what the datasets library writes is a stream
                file = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
                names, batches = file.schema.names, lambda: file
        if column not in names:
            found = ", ".join(names)
            raise ValueError(f"{path} has the columns {found}; expected {column!r}; fix: {fix or path}")
        number = 0
        for batch in batches():
            for value in batch.column(column):
                number += 1
                yield number, {column: value.as_py()}
    except pyarrow.ArrowException as error:
        raise ValueError(f"cannot read {path}: {error}; expected a {path.suffix} file; fix: {path}") from error


# ---- prompts ----


def read_prompts(path: Path, flag: str) -> list[tuple[str, dict]]:
    """(file:line, row) of what a model is asked: the objects of a .jsonl or .json file; of a text file, which has a prompt
    on each line that is not blank, {"prompt": line}. What the keys of a row may be is the recipe's.

    Raises:
        ValueError: no such file, another kind of file, no prompt in it, or a row that cannot be read; names the line.
    """
    rule = "a text file with a prompt per line, or .jsonl"
    if not path.is_file():
        raise ValueError(f"{flag} {path} does not exist; expected {rule}; fix: {flag}")
    if path.suffix not in PROMPT_SUFFIXES:
        raise ValueError(f"unknown kind of file: {flag} {path}; expected {rule}; fix: {flag}")
    rows = read_json(path) if path.suffix in (".jsonl", ".json") else _read_text_prompts(path)
    found = [(f"{path}:{line}", row) for line, row in rows]
    for where, row in found:
        if isinstance(row, BadRow):
            raise ValueError(f"{where}: {row.args[0]}, {row.args[1]}; expected an object; fix: {path}")
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {str(row)[:60]!r}; expected an object; fix: {path}")
    if not found:
        raise ValueError(f"{flag} {path} holds no prompt; expected {rule}; fix: {flag}")
    return found


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
