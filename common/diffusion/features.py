"""Latents and text embeddings computed once by extract_features.sh, for training that loads no VAE and no encoder.

    features/settings.json       what they depend on: the encoders' content, precision, list, buckets, frame rate
    features/index.jsonl         the videos and their buckets, as in a run folder
    features/shards/00003.safetensors    rows 192 to 255: "200.latents" fp32 [C, f, h, w], "200.text" [n, D] and, of
                                 image-to-video, "200.NAME" of each tensor of the condition
    features/empty.safetensors   the empty caption's "text" [n, D], for dropped captions
    features/manifest.json       written last: each shard's bytes, the rows that could not be decoded

A shard is there whole or not at all. It holds the same bits whichever rank of however many made it, so a stopped
extraction goes on where it was. Importing this module imports no torch.
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

from common import resume, weights
from common.data import partial_name

from .dataset import Index, rows_by_bucket

if TYPE_CHECKING:
    from torch import Tensor


def shard_path(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:05d}.safetensors"


def write_json(path: Path, values: dict) -> None:
    """The file appears under its name only when it is whole."""
    partial = partial_name(path)
    partial.write_text(json.dumps(values, indent=2))
    os.replace(partial, path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """The file appears under its name only when it is whole."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    save_file(tensors, partial)
    partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner reads
    os.replace(partial, path)


# ---- what features depend on ----


def encoder_facts(o, frozen: dict[str, str], task: str | None) -> dict[str, str]:
    """What decides features besides pixels and captions. frozen: the content of the encoders, as far as they are there.
    task: of a model that is given frames."""
    facts = frozen | {"precision": o.precision}
    facts |= {"vae_tiling": "tiled"} if o.vae_tiling else {}
    return facts | ({"task": task} if task else {})


def describe(o, facts: dict) -> dict:
    """settings.json of the features folder that `o` asks for. facts: of the encoders and of the model."""
    data = {"data": str(o.data.absolute()), "list": resume.content([o.data]) if o.data.is_file() else None}
    return data | {"buckets": o.buckets, "fps": o.fps, "rows_of_shard": o.rows_of_shard} | facts


def check_begun(out: Path, now: dict) -> None:
    """ValueError: the folder was begun with other settings than `now`."""
    begun = out / "settings.json"
    saved = weights.read_json(begun) if begun.is_file() else now
    if differs := [f"{key} {saved.get(key)!r} and not {now[key]!r}" for key in now if saved.get(key) != now[key]]:
        raise ValueError(f"{out} was begun with {', '.join(differs)}; fix: --out another folder, or these as they were")


def read_settings(folder: Path) -> dict:
    """The settings of a finished folder whose shards are all there with their sizes.

    Raises:
        ValueError: it is not finished, or a shard, named, is lost or cut short.
    """
    again = f"run extract_features.sh --out {folder} again with the options it was made with"
    if not (folder / "manifest.json").is_file():
        raise ValueError(
            f"{folder} has no manifest.json; expected a finished features folder; fix: --features, or {again}"
        )
    for name, size in weights.read_json(folder / "manifest.json")["shards"].items():
        path = folder / "shards" / name
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise ValueError(f"{path} has {found} bytes; expected {size}; fix: {again}")
    return weights.read_json(folder / "settings.json")


def apply_features(o, asked: set[str]):
    """The options with the buckets and the frame rate of --features. asked: the flags on the command line.

    Raises:
        ValueError: data of its own beside --features, or other buckets or another rate asked for.
    """
    if o.features is None:
        return o
    if both := {"--data", "--cache", "--decoder"} & asked:
        raise ValueError(f"{both.pop()} beside --features, which are of their own data; fix: leave one of them out")
    made = read_settings(o.features)
    for flag, key in (("--buckets", "buckets"), ("--fps", "fps")):
        if flag in asked and getattr(o, key) != made[key]:
            raise ValueError(
                f"{o.features} was made with {key} {made[key]} and not {getattr(o, key)}; fix: leave {flag} out, or "
                "extract_features.sh with it"
            )
    return dataclasses.replace(o, buckets=made["buckets"], fps=made["fps"])


def check_features(folder: Path, now: dict) -> None:
    """ValueError: the folder was made by other encoders, or for another model, than those of `now`."""
    made = read_settings(folder)
    now = {
        key: value for key, value in now.items() if key != "vae_tiling"
    }  # of training that concerns the samples only
    if differs := [
        f"{key} {made.get(key)!r} and not {value!r}" for key, value in now.items() if made.get(key) != value
    ]:
        raise ValueError(
            f"{folder} was made with {', '.join(differs)}; fix: --weights or --precision, or extract_features.sh again"
        )


# ---- micro-batches ----


class FeatureDataset:
    """Micro-batches of a features folder, as `VideoTextDataset` gives cached ones. A row without features is replaced by
    the next of its bucket, like a video that cannot be decoded in training."""

    def __init__(self, folder: Path, index: Index):
        manifest = weights.read_json(folder / "manifest.json")
        self.folder, self.index, self.rows_of_shard = folder, index, manifest["rows_of_shard"]
        self.names: list[str] = manifest["tensors"]
        self._missing = set(manifest["missing"])
        self._bucket_rows = rows_by_bucket(index)
        self._open = functools.lru_cache(maxsize=64)(_open_shard)  # a run may have more shards than a process may open

    def where(self, row: int) -> str:
        return str(shard_path(self.folder, row // self.rows_of_shard))

    def fetch(self, rows: Sequence[int], epoch: int = 0) -> dict[str, Any]:
        """As `VideoTextDataset.fetch`. ValueError: a damaged shard, named."""
        from safetensors import SafetensorError
        from torch import stack
        from torch.nn.utils.rnn import pad_sequence

        present, read = [self._present(row) for row in rows], {name: [] for name in self.names}
        for row in present:
            try:
                for name, tensors in read.items():
                    tensors.append(self._open(self.where(row)).get_tensor(f"{row}.{name}"))
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{self.where(row)} is damaged ({error}); fix: delete it and run extract_features.sh --out "
                    f"{self.folder} again with the options it was made with"
                ) from error
        return {
            "rows": present, "captions": [self.index.rows[row].caption for row in present], "keys": None,
            "pixels": None, "dropped": {},  # those were counted when the features were made
        } | {name: stack(tensors) for name, tensors in read.items() if name != "text"} | {
            "text": pad_sequence(read["text"], batch_first=True)
        }  # fmt: skip

    def _present(self, row: int) -> int:
        same = self._bucket_rows[self.index.rows[row].bucket]
        start = bisect_left(same, row)
        present = next((r for r in (*same[start:], *same[:start]) if r not in self._missing), None)
        if present is None:
            bucket = self.index.buckets[self.index.rows[row].bucket]
            raise ValueError(f"none of the {len(same)} videos of bucket {bucket} has features; fix: extract others")
        return present


def _open_shard(path: str):
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def read_empty_text(folder: Path) -> Tensor:
    """[n, D] of the empty caption."""
    from safetensors.torch import load_file

    return load_file(folder / "empty.safetensors")["text"]
