"""Rows of seq_len tokens from a megatron-core indexed data set (PREFIX.bin, PREFIX.idx) with one document per sequence.

    rows = TextRows("corpus", seq_len=512, eos=0, seed=0)
    for step in prefetch(rows, rows.sampler(8, 1, dp_rank, dp_size), start_step, end_step):
        train(step.micro_batches)

The documents of each epoch are shuffled and laid end to end, with an end-of-text token after each; the epochs form an
endless stream. Row r starts at token r * seq_len of that stream, so a run's place in the data is (seed, rows consumed)
and resume computes it. Nothing is dropped or padded; a document is cut where a row ends. With `separate_documents` no
token attends to another document, and the first token of a document is never a label. Cost: 16 bytes of memory per
document and process.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data import BucketSampler
from common.language.packing import IGNORE, micro_batch


class StreamSampler(BucketSampler):
    """Takes the rows of an endless stream in their order: step n takes the rows from n * global_batch on."""

    def __init__(self, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int):
        super().__init__([0], global_batch, micro_batch, dp_rank, dp_size, seed=0, shuffle=False)

    def epoch(self, step: int) -> int:
        return 0

    def batch(self, step: int) -> tuple[int, list[int]]:
        return 0, list(range(step * self.global_batch, (step + 1) * self.global_batch))


class TextRows:
    """Rows of an indexed data set; see the head of this file."""

    def __init__(
        self,
        prefix: str | Path,
        seq_len: int,
        eos: int,
        seed: int = 0,
        separate_documents: bool = True,
        shuffle: bool = True,
    ):
        """
        Args:
            eos: id of the token that ends a document. It is added if no document has it.
            shuffle: False keeps the stored order of the documents, to evaluate on rows 0 … rows_per_epoch - 1.

        Raises:
            ValueError: the data set is missing or empty, or only some of its documents end in `eos`.
        """
        self.prefix = re.sub(r"\.(bin|idx)$", "", str(prefix))
        self.seq_len, self.eos, self.seed = seq_len, eos, seed
        self.separate, self.shuffle = separate_documents, shuffle
        self._indexed = _indexed(self.prefix)
        lengths = self._indexed.sequence_lengths
        self._documents = np.flatnonzero(lengths)
        sampled = self._documents[np.linspace(0, len(self._documents) - 1, 1000).astype(int)]
        ended = [int(self._indexed.get(int(d), int(lengths[d]) - 1, 1)[0]) == eos for d in sampled]
        if any(ended) and not all(ended):
            raise ValueError(
                f"{self.prefix}: {sum(ended)} of {len(ended)} documents end in token {eos}; expected all or none; "
                "fix: preprocess it again"
            )
        self._lengths = lengths + (0 if all(ended) else 1)
        self.tokens_per_epoch = int(self._lengths[self._documents].sum(dtype=np.int64))
        self.rows_per_epoch = (self.tokens_per_epoch - 1) // seq_len
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def __len__(self) -> int:
        return self.rows_per_epoch

    def where(self, row: int) -> str:
        return f"{self.prefix} row {row}"

    def sampler(self, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int) -> StreamSampler:
        return StreamSampler(global_batch, micro_batch, dp_rank, dp_size)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the documents in the order of an epoch, and the end of each in the epoch's tokens."""
        order = (
            np.random.default_rng([self.seed, epoch]).permutation(self._documents) if self.shuffle else self._documents
        )
        return order, np.cumsum(self._lengths[order], dtype=np.int64)

    def _pieces(self, start: int, count: int) -> Iterator[np.ndarray]:
        """Yields tokens start … start + count - 1 of the stream, cut where documents meet."""
        epoch, at = divmod(start, self.tokens_per_epoch)
        order, ends = self._epoch(epoch)
        place = int(np.searchsorted(ends, at, side="right"))
        while count:
            if place == len(order):
                epoch, place, at = epoch + 1, 0, 0
                order, ends = self._epoch(epoch)
            document, end = int(order[place]), int(ends[place])
            length = int(self._lengths[document])
            taken = min(count, end - at)
            yield self._read(document, at - (end - length), taken)
            count, at, place = count - taken, at + taken, place + 1

    def _read(self, document: int, offset: int, count: int) -> np.ndarray:
        stored = int(self._indexed.sequence_lengths[document])
        tokens = self._indexed.get(document, offset, min(count, stored - offset)) if offset < stored else []
        return np.append(tokens, self.eos).astype(np.int32) if offset + count > stored else tokens.astype(np.int32)

    def row(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns the sequences (tokens, labels) of a row of the stream."""
        pieces = list(self._pieces(number * self.seq_len, self.seq_len + 1))  # the last token is a label only
        tokens = np.concatenate(pieces)
        labels = tokens[1:].copy()
        if not self.separate:
            return [(tokens[:-1], labels)]
        starts = np.cumsum([len(piece) for piece in pieces])[:-1]
        labels[starts - 1] = IGNORE
        cuts = starts[starts < self.seq_len]
        return list(zip(np.split(tokens[:-1], cuts), np.split(labels, cuts), strict=True))

    def fetch(self, rows: Sequence[int], epoch: int = 0) -> dict[str, Any]:
        """Returns a micro-batch of these rows. `epoch` is not read: the row's number includes it."""
        return micro_batch([sequence for number in rows for sequence in self.row(number)])


def _indexed(prefix: str):
    from common import device  # noqa: F401  before the first import of megatron

    for suffix in (".bin", ".idx"):
        if not os.path.isfile(prefix + suffix):
            raise ValueError(
                f"{prefix}{suffix} does not exist; expected an indexed data set; fix: --data, or preprocess.sh"
            )
    if not os.path.getsize(f"{prefix}.bin"):
        raise ValueError(f"{prefix}.bin holds no token; expected text; fix: --data")
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(prefix)
