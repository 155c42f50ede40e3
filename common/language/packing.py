"""Packs conversations, pairs or solutions in steps into rows of equal length, once, and reads micro-batches of these.

    rows = PackedRows(prepare_chats("chats.jsonl", "released-folder", seq_len=4096, cache="data/cache"))
    for step in prefetch(rows, rows.sampler(8, 1, dp_rank, dp_size, seed=0), start_step, end_step):
        train(step.micro_batches)

Packing rule: best fit decreasing, so whole conversations fill rows of seq_len (to 99 % and more if some are short).
The rest of a row is padding, which is a sequence of its own without loss. Both conversations of a pair are in one row,
and only their last answers are learnt. A conversation or pair longer than a row is dropped and counted, or cut
(`too_long`).

Reading and checking data works without torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common import jsonl
from common.data import BucketSampler
from common.drops import DropReport
from common.language.chat import Chat, say_error, to_chat, to_pair, to_tools
from common.language.files import CHATS, list_files, read_rows, tokenizer_hash
from common.language.pool import in_order
from common.language.steps import RIGHT, encode_steps, to_steps
from common.records import BadRow

IGNORE = -100  # label of a token that predicts nothing
BATCH = 64  # rows a worker tokenizes at a time


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Decides which items share a row, by best fit decreasing. The same lengths always give the same rows.

    Every length is at most `capacity`. Items of equal length keep their order; rows are in the order of their opening.
    """
    rows: list[list[int]] = []
    spaces: list[int] = []  # the distinct free spaces, ascending
    with_space: dict[int, list[int]] = {}
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[item])
        place = bisect_left(spaces, length)
        if place == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        assert space >= length, f"item {item} of {length} in rows of {capacity}"
        rows[row].append(item)
        if space > length:
            if space - length not in with_space:
                insort(spaces, space - length)
            with_space.setdefault(space - length, []).append(row)
    return rows


def micro_batch(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Lays sequences (tokens [n], labels [n], already shifted) end to end. Returns tokens, labels and positions, int64
    [T], and cu_seqlens, a list of the sequences' bounds [0, …, T]."""
    from torch import from_numpy

    tokens, labels = (np.concatenate(parts).astype(np.int64) for parts in zip(*sequences, strict=True))
    lengths = [len(part) for part, _ in sequences]
    positions = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])
    bounds = [0, *itertools.accumulate(lengths)]
    arrays = {"tokens": tokens, "labels": labels, "positions": positions}
    return {name: from_numpy(array) for name, array in arrays.items()} | {"cu_seqlens": bounds}


# ---- conversations and pairs ----


def prepare_chats(
    data: str | Path,
    tokenizer: str | Path,
    seq_len: int,
    cache: str | Path,
    *,
    kind: Literal["sft", "dpo", "prm"] = "sft",
    too_long: Literal["drop", "cut"] = "drop",
    train_on: Literal["all", "last", "complete"] = "all",
    placeholder: str = "",
    max_drop: float = 0.05,
    workers: int = 0,
) -> Path:
    """Renders, tokenizes and packs the user's rows into a folder under `cache`, once; `PackedRows` reads it.

    The folder's name is a hash of the data files (size, time), the tokenizer and the arguments that decide the rows.
    The folder also holds drops.jsonl.

    Args:
        tokenizer: folder of a released tokenizer with its chat template.
        kind: conversations, pairs, or solutions in steps (steps.py), which need no chat template.
        too_long: what becomes of a conversation, or pair, of more than seq_len tokens.
        train_on: the answers of a conversation that are learnt. A template may leave out the thoughts of earlier
            answers. The model would never generate such answers, and "complete" does not learn them.
        placeholder: what ends a step of a solution.
        workers: number of processes; 0 does the work in this process.

    Raises:
        ValueError: more than the share `max_drop` of the rows cannot be used, a file is malformed, or the tokenizer has
            no chat template.
    """
    files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in list_files(data, CHATS)]
    settings = [files, tokenizer_hash(tokenizer), seq_len, kind, too_long, placeholder if kind == "prm" else train_on]
    folder = Path(cache) / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    chat, report = None if kind == "prm" else Chat(loaded), DropReport()

    def encode(rows: list[tuple[str, Any]]) -> list[tuple[str, Any, int]]:
        """Returns of each row (where, [(tokens, learnt), …] or (reason, detail), number of answers whose thoughts the
        template leaves out)."""
        results = []
        for where, row in rows:
            bare_count = 0
            try:
                if isinstance(row, BadRow):
                    raise row
                if kind == "prm":
                    sequences = [encode_steps(loaded, *to_steps(row, placeholder), placeholder)]
                else:
                    unit, tools = [to_chat(row)] if kind == "sft" else to_pair(row), to_tools(row)
                    sequences = [chat.encode(m, tools, train_on if kind == "sft" else "last") for m in unit]
                    bare_count = len(chat.find_bare_answers(unit[0], tools)) if kind == "sft" else 0
                result = _fit(sequences, seq_len, too_long)
            except BadRow as error:
                result = error.args
            except Exception as error:  # no row may end a run; --max-drop limits how many are lost
                result = "unusable row", say_error(error)
            results.append((where, result, bare_count))
        return results

    building = jsonl.partial_name(folder)
    building.mkdir(parents=True)
    try:
        batches = in_order(encode, _batched(read_rows(data), BATCH), workers)
        unit_count, bare_count = _write_units(building, batches, report)
        report.save(building)
        report.check(unit_count + len(report.drops), max_drop)
        bounds = np.load(building / "bounds.npy")
        per_unit = 2 if kind == "dpo" else 1
        rows = pack(np.diff(bounds[::per_unit]).tolist(), seq_len)
        np.save(building / "units.npy", np.array(list(itertools.chain(*rows)), np.int64))
        np.save(building / "row_bounds.npy", np.cumsum([0, *map(len, rows)], dtype=np.int64))
        pad = loaded.pad_token_id if loaded.pad_token_id is not None else loaded.eos_token_id
        meta = {"seq_len": seq_len, "per_unit": per_unit, "pad": pad} | ({"steps": True} if kind == "prm" else {})
        (building / "meta.json").write_text(json.dumps(meta))
        left_out = "learnt without them" if train_on == "all" else f"train on: {train_on}"
        left_out = f"; the template leaves out the thoughts of {bare_count} answers ({left_out})" if bare_count else ""
        print(f"{data}: {unit_count} rows of {bounds[-1]} tokens in {len(rows)} rows of {seq_len}; {report}{left_out}")
        try:
            os.rename(building, folder)
        except OSError:  # another process was faster, with the same content
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _fit(unit: list[tuple[np.ndarray, np.ndarray]], seq_len: int, too_long: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the sequences of a unit (a conversation or a pair) if they fit a row together. Otherwise cuts them to
    equal shares of a row, or raises BadRow."""
    total, share = sum(len(tokens) for tokens, _ in unit), seq_len // len(unit)
    if total > seq_len and too_long == "cut":
        unit = [(tokens[:share], generated[:share]) for tokens, generated in unit]
        if not all(generated[1:].any() for _, generated in unit):
            raise BadRow("too long", f"no answer in the first {share} tokens")
    elif total > seq_len:
        raise BadRow("too long", f"{total} tokens, a row has {seq_len}")
    return unit


def _write_units(folder: Path, done: Iterable[list[tuple[str, Any, int]]], report: DropReport) -> tuple[int, int]:
    """Writes the tokens, flags and bounds of the sequences, end to end. Returns the number of units, and of answers
    whose thoughts the template leaves out."""
    from tqdm import tqdm

    unit_count, left_out, lengths = 0, 0, [0]
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "generated.bin", "wb") as flags_file:
        progress = tqdm(desc="rendering conversations", unit=" rows", mininterval=1)
        for batch in done:
            for where, result, bare in batch:
                if isinstance(result, tuple):
                    report.add(result[0], where, result[1])
                    continue
                unit_count, left_out = unit_count + 1, left_out + bare
                for tokens, generated in result:
                    tokens_file.write(tokens.tobytes())
                    flags_file.write(generated.tobytes())
                    lengths.append(len(tokens))
            progress.update(len(batch))
        progress.close()
    np.save(folder / "bounds.npy", np.cumsum(lengths, dtype=np.int64))
    return unit_count, left_out


class PackedRows:
    """Rows of whole conversations or pairs; see the head of this file. The tokens stay on disk, memory-mapped.

    A micro-batch of pairs also has `pairs` [P], the indices of the chosen sequences in cu_seqlens (the rejected one
    follows each); `last` [P, 2], the indices of the last tokens of both; `units` [P], the indices of the pairs in the
    data; `sequence` [T], the index of each token's sequence; and, if `reference` is set, the rows [P, 2] of `reference`
    for these pairs.

    A micro-batch of solutions has as labels 1 at the last token of a right step, 0 at that of a wrong one, and as
    `steps` int64 [S] the indices of these tokens.
    """

    reference: np.ndarray | None = None  # fp32 [units, 2], see preference.py

    def __init__(self, folder: str | Path):
        """folder: what `prepare_chats` returned."""
        self.folder = Path(folder)
        meta = json.loads((self.folder / "meta.json").read_text())
        self.seq_len, self.per_unit, self.pad = meta["seq_len"], meta["per_unit"], meta["pad"]
        self.has_steps = meta.get("steps", False)
        arrays = (np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("bounds", "units", "row_bounds"))
        self._bounds, self._units, self._row_bounds = arrays
        self._tokens = np.memmap(self.folder / "tokens.bin", np.int32, "r")
        self._generated = np.memmap(self.folder / "generated.bin", np.uint8 if self.has_steps else bool, "r")

    def __len__(self) -> int:
        return len(self._row_bounds) - 1

    @property
    def unit_count(self) -> int:
        return len(self._units)

    @property
    def fill(self) -> float:
        """The share of the rows' tokens that are not padding."""
        return len(self._tokens) / (len(self) * self.seq_len)

    def where(self, row: int) -> str:
        return f"{self.folder} row {row}"

    def sampler(self, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int, seed: int) -> BucketSampler:
        return BucketSampler(np.zeros(len(self), np.int8), global_batch, micro_batch, dp_rank, dp_size, seed)

    def units(self, row: int) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        """Yields the conversations or pairs of a row, each as a list of sequences (tokens, labels)."""
        for unit in self._units[self._row_bounds[row] : self._row_bounds[row + 1]].tolist():
            bounds = self._bounds[unit * self.per_unit : (unit + 1) * self.per_unit + 1].tolist()
            yield [self._sequence(start, end) for start, end in itertools.pairwise(bounds)]

    def _sequence(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.array(self._tokens[start:end])
        if self.has_steps:
            flags = self._generated[start:end]
            return tokens, np.where(flags > 0, flags == RIGHT, IGNORE)
        labels = np.where(self._generated[start + 1 : end], tokens[1:], IGNORE)
        return tokens, np.append(labels, IGNORE)

    def fetch(self, rows: Sequence[int], epoch: int = 0) -> dict[str, Any]:
        """Returns a micro-batch of these rows. Rows do not change between epochs."""
        sequences, pairs = [], []
        for row in rows:
            rest = self.seq_len
            for unit in self.units(row):
                pairs.append(len(sequences))
                sequences += unit
                rest -= sum(len(tokens) for tokens, _ in unit)
            if rest:
                sequences.append((np.full(rest, self.pad), np.full(rest, IGNORE)))
        batch = micro_batch(sequences)
        if self.has_steps:
            return batch | {"steps": (batch["labels"] >= 0).nonzero().flatten()}
        if self.per_unit == 1:
            return batch
        from torch import from_numpy

        units = np.concatenate([self._units[self._row_bounds[row] : self._row_bounds[row + 1]] for row in rows])
        sequence = np.repeat(np.arange(len(sequences)), np.diff(batch["cu_seqlens"]))
        last = np.array(batch["cu_seqlens"])[np.add.outer(pairs, [1, 2])] - 1
        pair_arrays = {"pairs": np.array(pairs), "last": last, "units": units, "sequence": sequence}
        if self.reference is not None:
            pair_arrays["reference"] = self.reference[units]
        return batch | {name: from_numpy(array) for name, array in pair_arrays.items()}
