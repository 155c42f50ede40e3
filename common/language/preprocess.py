"""Tokenizes text into a megatron-core indexed data set for pretraining: OUT.bin, OUT.idx and the counts OUT.meta.json.

`--data` is a file, or a folder of files that are read in the order of their names. Formats:

    .jsonl, .json, .csv     a document per line, item or row, under the key or column --field
    .txt                    a document per block of lines; blank lines separate blocks, and lines end at \\n or \\r\\n
    .parquet, .arrow        a document per row, in the column --field; these need the package pyarrow

Each document is one sequence and ends in the token --end. No other special tokens are added; their names in a text are
ordinary text. One process reads the texts and makes shards of about 4 million characters; --workers processes tokenize
the shards. Finished shards are kept in OUT.parts/ until all are done, so the same command continues a killed run, with
any number of workers and the same result. The result is complete or absent. Memory: 0.5 GB for the reading process,
0.35 GB per worker (most of it shared libraries), and 120 bytes per document while the index is written. A worker makes
about a million tokens a second with a vocabulary of 2,048.
Rows without text and malformed lines are dropped and counted by reason (OUT.drops.jsonl).

This module does not import torch: options are checked before anything heavy is imported.
"""

import dataclasses
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import cli, jsonl, processes
from common.cli import option
from common.drops import DropReport
from common.language.files import list_files, tokenizer_hash
from common.language.options import Demo
from common.language.pool import in_order
from common.records import (
    LONGEST_CELL,
    BadRow,
    import_pyarrow,
    parse_json,
    read_column,
    read_csv,
    read_json,
    read_lines,
)

SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet", ".arrow")
SHARD = 4_000_000  # characters of the rows of a shard
BATCH = 256  # documents given to the tokenizer at a time
READING = 2  # version of the reading: raise it when files are read differently, so that no older result is reused
FEW = 10_000  # rows; with fewer, the dropped share says little about the rest


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions(cli.JobOptions):
    """The recipe sets the default of `end`."""

    yarn = layers = vocabulary = None  # the recipe's model config reads them

    size: str = option("the model whose vocabulary must hold the tokenizer's", "tiny", group="model")
    weights: Path | None = option("released Hugging Face folder, instead of --size and --tokenizer", group="model")
    tokenizer: Path | None = option(
        "folder with a tokenizer.json (default: of --weights; of size tiny the demo's)", group="model"
    )
    data: Path | None = option("your text, a file or a folder (default: the demo's)", group="data")
    field: str = option("key or column that holds the text", "text", group="data")
    end: str = option("token that ends every document", group="data")
    max_drop: float = option("share of rows that may be dropped", 0.05, group="data", within="[0, 1]")
    out: Path | None = option("prefix of the files to write (default: the name of --data)", group="run")
    workers: int = option(
        "tokenizing processes (0: the reading one; default: one per core)", group="run", within="[0, inf)"
    )
    dry_run: bool = option("check everything checkable, write nothing", False, group="run")
    print_config: bool = option("print the resolved options as TOML and stop", False, group="run")


def check(o: PreprocessOptions, vocab_size: int, demo: Demo) -> PreprocessOptions:
    """Checks the options and fills in their defaults. It does not look for the demo's text, which is made on first use.

    Raises:
        ValueError: there is no such data, or of a kind that cannot be read here; or the tokenizer is missing or broken,
            lacks the end token, or has tokens without an embedding in the model (of `vocab_size`).
    """
    tokenizer = o.tokenizer or o.weights or (demo.tokenizer if o.size.startswith("tiny") else None)
    if tokenizer is None:
        raise ValueError(f"size {o.size} has no tokenizer of its own; fix: --tokenizer, or --weights with one")
    data, workers = o.data or demo.text / "train.jsonl", os.cpu_count() if o.workers is None else o.workers
    out = o.out or (data.absolute() if data.is_dir() else data.with_suffix(""))
    o = dataclasses.replace(o, data=data, tokenizer=tokenizer, out=out, workers=workers)
    if data.is_dir() and out.absolute().is_relative_to(data.absolute()) and out != data:
        raise ValueError(f"--out {out} is inside --data {data}, which is read in full; fix: --out")
    if data.parent != demo.text:
        for file in list_files(data, SUFFIXES):
            if file.suffix in (".parquet", ".arrow"):
                import_pyarrow(file)
    load_tokenizer(o, vocab_size)
    return o


def load_tokenizer(o: PreprocessOptions, vocab_size: int) -> tuple[Any, int]:
    """Returns the tokenizer and the id of the end token."""
    from tokenizers import Tokenizer

    tokenizer_hash(o.tokenizer)  # raises if tokenizer.json is missing
    tokenizer = Tokenizer.from_file(str(o.tokenizer / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # "<|im_end|>" in a text is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= vocab_size:
        raise ValueError(
            f"{o.tokenizer} has token ids up to {largest}, the model (size {o.size}) a vocabulary of {vocab_size}; "
            "expected ids below it; fix: --tokenizer, --size or --weights"
        )
    end = tokenizer.token_to_id(o.end)
    if end is None:
        raise ValueError(f"{o.tokenizer} has no token {o.end!r}; expected one that ends a document; fix: --end")
    return tokenizer, end


# ---- reading ----


def read_records(path: Path, field: str) -> Iterator[tuple[int, Any]]:
    """Yields (line or row number, record for `text_of`) of one file. Raises ValueError if it is not of the kind that
    its suffix says."""
    if path.suffix == ".jsonl":
        yield from ((number, line) for number, line in read_lines(path) if line.strip())  # parsed by the workers
    elif path.suffix == ".json":
        yield from read_json(path)
    elif path.suffix == ".csv":
        yield from read_csv(path, [[field]], LONGEST_CELL, fix="--field")
    elif path.suffix == ".txt":
        yield from ((line, {field: text}) for line, text in _read_blocks(path))
    else:
        yield from read_column(path, field, fix="--field")


def text_of(record: Any, field: str) -> str:
    """Returns the document of a record. Raises BadRow if it has none."""
    if isinstance(record, BadRow):
        raise record
    if isinstance(record, str):
        try:
            record = parse_json(record)
        except json.JSONDecodeError as error:
            raise BadRow("malformed JSON", error.msg) from error
    if not isinstance(record, dict):
        raise BadRow("bad row", f"{str(record)[:40]!r}; expected an object")
    if record.get(field) is None:
        raise BadRow("no text", f"no {field!r}, keys: {', '.join(map(str, record))}")
    if not isinstance(record[field], str):
        raise BadRow("bad row", f"{field} is {type(record[field]).__name__}; expected text")
    if not record[field].strip():
        raise BadRow("empty text", field)
    return record[field].encode(errors="replace").decode()  # a tokenizer fails on lone surrogates


def _read_blocks(path: Path) -> Iterator[tuple[int, str]]:
    block, first = [], 0
    for number, line in read_lines(path):
        if line.strip():
            first = first if block else number
            block.append(line)
        elif block:
            yield first, "\n".join(block)
            block = []
    if block:
        yield first, "\n".join(block)


def _shards(o: PreprocessOptions, size: int) -> Iterator[tuple[int, list[tuple[str, Any]]]]:
    """Yields (number, [(file:line, record), …]) of each shard. Cuts depend on the characters read only, so shards are
    always the same."""
    number, records, characters = 0, [], 0
    for file in list_files(o.data, SUFFIXES):
        for line, record in read_records(file, o.field):
            records.append((f"{file.name}:{line}", record))
            characters += len(record if isinstance(record, str) else str(record))
            if characters >= size:
                yield number, records
                number, records, characters = number + 1, [], 0
    if records:
        yield number, records


# ---- writing ----


def run(o: PreprocessOptions, vocab_size: int, shard_size: int = SHARD) -> dict:
    """Preprocesses the data of checked options. Returns the content of OUT.meta.json: documents, tokens, drops, and
    their source. If two runs have the same data and tokenizer, one makes the result and the other waits.

    Raises:
        ValueError: more than --max-drop of the rows are dropped (checked from FEW rows on and at the end), a file
            cannot be read, or another process writes something else to OUT.
    """
    tokenizer, end = load_tokenizer(o, vocab_size)
    files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in list_files(o.data, SUFFIXES)]
    about = {
        "files": files, "field": o.field, "tokenizer": tokenizer_hash(o.tokenizer), "vocabulary": vocab_size,
        "end": end, "shard_size": shard_size, "reading": READING,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    if meta := _made(o.out, key):
        return meta
    with processes.exclusive(o.out, key):
        return _made(o.out, key) or _make(o, key, about, tokenizer, shard_size)


def _made(out: Path, key: str) -> dict | None:
    path = _beside(out, ".meta.json")
    if path.is_file() and (meta := json.loads(path.read_text()))["key"] == key:
        return meta
    return None


def _make(o: PreprocessOptions, key: str, about: dict, tokenizer, shard_size: int) -> dict:
    from common import device  # noqa: F401  isort: skip  (before the first import of megatron)
    from megatron.core.datasets.indexed_dataset import DType
    from tqdm import tqdm

    end, vocab_size = about["end"], about["vocabulary"]
    folder, dtype = _open_parts(o.out, key), DType.optimal_dtype(vocab_size)

    def tokenize(task: tuple[int, list[tuple[str, Any]]]) -> dict:
        return _write_shard(folder / f"{task[0]:06d}", task[1], o.field, tokenizer, end, dtype)

    report, rows, documents, tokens, shards = DropReport(), 0, 0, 0, []
    progress = tqdm(desc=f"tokenizing {o.data.name}", unit=" documents", mininterval=1)
    for number, shard in enumerate(in_order(tokenize, _shards(o, shard_size), o.workers)):
        shards.append(folder / f"{number:06d}")
        rows, documents, tokens = rows + shard["rows"], documents + shard["documents"], tokens + shard["tokens"]
        for drop in shard["drops"]:
            report.add(*drop)
        progress.update(shard["documents"])
        progress.set_postfix(tokens=f"{tokens:,}", dropped=len(report.drops))
        if rows >= FEW:
            report.check(rows, o.max_drop)
    progress.close()
    if not rows:
        raise ValueError(f"{o.data} holds no document; expected one at least; fix: --data")
    report.check(rows, o.max_drop)

    meta = {"key": key, "documents": documents, "tokens": tokens, "dropped": report.counts, "from": about}
    _publish(shards, folder, o.out, dtype, report, meta)
    print(f"{o.out}: {documents:,} documents, {tokens:,} tokens; {report}")
    return meta


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(out.name + suffix)


def _open_parts(out: Path, key: str) -> Path:
    """Returns the folder of the finished shards of `key`. Removes partial shards and those of another key."""
    parts = _beside(out, ".parts")
    folder = parts / key
    for stale in parts.glob("*"):
        if stale != folder:
            shutil.rmtree(stale)
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(".*"):
        partial.unlink()
    return folder


def _write_shard(base: Path, records: list[tuple[str, Any]], field: str, tokenizer, end: int, dtype) -> dict:
    """Writes BASE.bin and BASE.idx, then BASE.json, which marks the shard as finished. Leaves a finished shard as it
    is. Returns the content of BASE.json."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    if base.with_suffix(".json").is_file():
        return json.loads(base.with_suffix(".json").read_text())
    texts, drops, tokens = [], [], 0
    for where, record in records:
        try:
            texts.append(text_of(record, field))
        except BadRow as error:
            drops.append((error.args[0], where, error.args[1]))
    partial = jsonl.partial_name(base)
    builder = IndexedDatasetBuilder(f"{partial}.bin", dtype=dtype)
    for first in range(0, len(texts), BATCH):
        for encoding in tokenizer.encode_batch_fast(texts[first : first + BATCH], add_special_tokens=False):
            ids = [*encoding.ids, end]
            builder.add_document(ids, [len(ids)])
            tokens += len(ids)
    builder.finalize(f"{partial}.idx")
    result = {"documents": len(texts), "tokens": tokens, "rows": len(records), "drops": drops}
    Path(f"{partial}.json").write_text(json.dumps(result))
    for suffix in (".bin", ".idx", ".json"):
        os.replace(f"{partial}{suffix}", base.with_suffix(suffix))
    return result


def _publish(shards: list[Path], folder: Path, out: Path, dtype, report: DropReport, meta: dict) -> None:
    """Joins the shards into OUT.*. Removes the old .meta.json first and writes the new one last, so that it always
    describes the files that are there."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / ".joined.bin"), dtype=dtype)
    gc.freeze()  # megatron-core collects garbage after each index; freezing keeps this to new objects
    for shard in shards:
        builder.add_index(str(shard))
    gc.unfreeze()
    builder.finalize(str(folder / ".joined.idx"))
    report.save(folder)
    os.replace(folder / "drops.jsonl", folder / ".joined.drops.jsonl")
    (folder / ".joined.meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    for suffix in (".meta.json", ".idx"):
        _beside(out, suffix).unlink(missing_ok=True)
    for suffix in (".bin", ".drops.jsonl", ".idx", ".meta.json"):
        os.replace(folder / f".joined{suffix}", _beside(out, suffix))
    shutil.rmtree(folder.parent)
