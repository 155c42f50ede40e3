"""Features: extract_features.sh computes latents and text embeddings once. Training then loads no VAE and no encoder.

    features/settings.json       what they depend on: the encoders' content, precision, list, buckets, frame rate
    features/index.jsonl         the videos and their buckets, as in a run folder
    features/shards/00003.safetensors    rows 192 to 255: "200.latents" fp32 [C, f, h, w], "200.text" [n, D] and, for
                                 image-to-video, "200.NAME" of each tensor of the condition
    features/empty.safetensors   the empty caption's "text" [n, D], for dropped captions
    features/manifest.json       written last: each shard's size in bytes, the rows that could not be decoded

A shard exists only when it is complete. Its bits do not depend on the rank that makes it or on the number of ranks, so
a stopped extraction continues where it was. Importing this module does not import torch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import jsonl, resume, weights

from .dataset import Index, rows_by_bucket

if TYPE_CHECKING:
    from torch import Tensor


def shard_path(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:05d}.safetensors"


def write_json(path: Path, values: dict) -> None:
    """Writes a file, which appears under its name only when it is complete."""
    partial = jsonl.partial_name(path)
    partial.write_text(json.dumps(values, indent=2))
    os.replace(partial, path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a file, which appears under its name only when it is complete."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = jsonl.partial_name(path)
    save_file(tensors, partial)
    partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
    os.replace(partial, path)


# ---- what features depend on ----


def encoder_facts(o, frozen: dict[str, str], task: str | None) -> dict[str, str]:
    """Returns what decides features besides pixels and captions. frozen: the content of the encoders, as far as they
    are there. task: that of a model that is given frames, else None."""
    facts = frozen | {"precision": o.precision}
    facts |= {"vae_tiling": "tiled"} if o.vae_tiling else {}
    return facts | ({"task": task} if task else {})


def describe(o, facts: dict) -> dict:
    """Returns settings.json of the features folder that `o` asks for. facts: those of the encoders and the model."""
    data = {"data": str(o.data.absolute()), "list": resume.content_hash([o.data]) if o.data.is_file() else None}
    return data | {"buckets": o.buckets, "fps": o.fps, "rows_of_shard": o.rows_of_shard} | facts


def check_begun(out: Path, now: dict) -> None:
    """Raises ValueError if the folder was begun with other settings than `now`."""
    path = out / "settings.json"
    saved = weights.read_json(path) if path.is_file() else now
    if changes := [f"{key} {saved.get(key)!r} and not {now[key]!r}" for key in now if saved.get(key) != now[key]]:
        raise ValueError(f"{out} was begun with {', '.join(changes)}; fix: --out another folder, or these as they were")


def read_settings(folder: Path) -> dict:
    """Returns the settings of a finished folder, whose shards must all have the sizes of the manifest.

    Raises:
        ValueError: the folder is not finished, or a shard (named) is missing or has another size.
    """
    remedy = f"run extract_features.sh --out {folder} again with the options it was made with"
    if not (folder / "manifest.json").is_file():
        raise ValueError(
            f"{folder} has no manifest.json; expected a finished features folder; fix: --features, or {remedy}"
        )
    for name, size in weights.read_json(folder / "manifest.json")["shards"].items():
        path = folder / "shards" / name
        actual = path.stat().st_size if path.is_file() else 0
        if actual != size:
            raise ValueError(f"{path} has {actual} bytes; expected {size}; fix: {remedy}")
    return weights.read_json(folder / "settings.json")


def apply_features(o, flags: set[str]):
    """Returns the options with the buckets and the frame rate of --features. flags: those given on the command line.

    Raises:
        ValueError: the command line also has options of data, or other buckets or another rate.
    """
    if o.features is None:
        return o
    if refused := {"--data", "--cache", "--decoder"} & flags:
        raise ValueError(f"{refused.pop()} beside --features, which are of their own data; fix: leave one of them out")
    saved = read_settings(o.features)
    for flag, key in (("--buckets", "buckets"), ("--fps", "fps")):
        if flag in flags and getattr(o, key) != saved[key]:
            raise ValueError(
                f"{o.features} was made with {key} {saved[key]} and not {getattr(o, key)}; fix: leave {flag} out, or "
                "extract_features.sh with it"
            )
    return dataclasses.replace(o, buckets=saved["buckets"], fps=saved["fps"])


def check_features(folder: Path, now: dict) -> None:
    """Raises ValueError if the folder was made by other encoders, or for another model, than those of `now`."""
    saved = read_settings(folder)
    now = {
        key: value for key, value in now.items() if key != "vae_tiling"
    }  # in training, tiling concerns the samples only
    if changes := [
        f"{key} {saved.get(key)!r} and not {value!r}" for key, value in now.items() if saved.get(key) != value
    ]:
        raise ValueError(
            f"{folder} was made with {', '.join(changes)}; fix: --weights or --precision, or extract_features.sh again"
        )


# ---- micro-batches ----


class FeatureDataset:
    """Micro-batches of a features folder, like the cached ones of `VideoTextDataset`. A row without features is
    replaced by the next of its bucket, like a video that cannot be decoded in training."""

    def __init__(self, folder: Path, index: Index):
        manifest = weights.read_json(folder / "manifest.json")
        self.folder, self.index, self.rows_of_shard = folder, index, manifest["rows_of_shard"]
        self.names: list[str] = manifest["tensors"]
        self._missing = set(manifest["missing"])
        self._bucket_rows = rows_by_bucket(index)
        self._open = functools.lru_cache(maxsize=64)(_open_shard)  # a process may not hold every shard open

    def where(self, row: int) -> str:
        return str(shard_path(self.folder, row // self.rows_of_shard))

    def fetch(self, rows: Sequence[int], epoch: int = 0) -> dict[str, Any]:
        """Works like `VideoTextDataset.fetch`. Raises ValueError, which names it, for a damaged shard."""
        from safetensors import SafetensorError
        from torch import stack
        from torch.nn.utils.rnn import pad_sequence

        present, columns = [self._present(row) for row in rows], {name: [] for name in self.names}
        for row in present:
            try:
                for name, tensors in columns.items():
                    tensors.append(self._open(self.where(row)).get_tensor(f"{row}.{name}"))
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{self.where(row)} is damaged ({error}); fix: delete it and run extract_features.sh --out "
                    f"{self.folder} again with the options it was made with"
                ) from error
        return {
            "rows": present, "captions": [self.index.rows[row].caption for row in present], "keys": None,
            "pixels": None, "dropped": {},  # the drops were counted when the features were made
        } | {name: stack(tensors) for name, tensors in columns.items() if name != "text"} | {
            "text": pad_sequence(columns["text"], batch_first=True)
        }  # fmt: skip

    def _present(self, row: int) -> int:
        rows = self._bucket_rows[self.index.rows[row].bucket]
        start = bisect_left(rows, row)
        present = next((r for r in (*rows[start:], *rows[:start]) if r not in self._missing), None)
        if present is None:
            bucket = self.index.buckets[self.index.rows[row].bucket]
            raise ValueError(f"none of the {len(rows)} videos of bucket {bucket} has features; fix: extract others")
        return present


def _open_shard(path: str):
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def read_empty_text(folder: Path) -> Tensor:
    """Returns the text embedding [n, D] of the empty caption."""
    from safetensors.torch import load_file

    return load_file(folder / "empty.safetensors")["text"]
