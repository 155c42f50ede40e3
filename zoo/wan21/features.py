"""Latents and text embeddings computed once by extract_features.sh, for training that loads no VAE and no encoder.

    features/settings.json       what they depend on: the encoders' content, precision, list, buckets, frame rate
    features/index.jsonl         the videos and their buckets, as in a run folder
    features/shards/00003.safetensors    rows 192 to 255: "200.latents" fp32 [16, f, h, w], "200.text" [n, D]
                                 and, of image-to-video, "200.y", "200.image": see encoders.py
    features/empty.safetensors   the empty caption's "text" [n, D], for dropped captions
    features/manifest.json       written last: each shard's bytes, the rows that could not be decoded

A shard is there whole or not at all, and holds the same bits whichever rank of however many made it: so a stopped
extraction goes on where it was. Reading settings and manifest needs no torch.
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

from . import data

if TYPE_CHECKING:
    from torch import Tensor

    from .config import WanConfig
    from .options import ExtractOptions, TrainOptions


def parts(config: WanConfig) -> list[str]:
    """Of a weights folder what makes latents, embeddings and, for image-to-video, the condition of them."""
    return ["vae", "text_encoder", "tokenizer"] + (["image_encoder", "image_processor"] if config.given_frames else [])


def has_encoders(folder: Path, config: WanConfig) -> bool:
    """Whether a weights folder has what samples need."""
    return all((folder / part).is_dir() for part in parts(config))


def frozen_parts(folder: Path, config: WanConfig) -> dict[str, str]:
    """The content of the VAE and the encoders, as far as a weights folder has them."""
    names = ["vae", "text_encoder"] + (["image_encoder"] if config.given_frames else [])
    return {name: weights.fingerprint(folder / name) for name in names if (folder / name).is_dir()}


def encoders(o, config: WanConfig) -> dict[str, str]:
    """What decides features besides pixels and captions. A part that the weights folder lacks is left out."""
    found = frozen_parts(o.weights, config) | {"precision": o.precision}
    found |= {"vae_tiling": "tiled"} if o.vae_tiling else {}
    return found | ({"task": config.task} if config.given_frames else {})


def shard(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:05d}.safetensors"


def write_json(path: Path, values: dict) -> None:
    """Whole or not at all."""
    partial = partial_name(path)
    partial.write_text(json.dumps(values, indent=2))
    os.replace(partial, path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    save_file(tensors, partial)
    partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner reads
    os.replace(partial, path)


def made(folder: Path) -> dict:
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


def applied(o: TrainOptions, asked: set[str]) -> TrainOptions:
    """A features folder brings its buckets and its frame rate."""
    if o.features is None:
        return o
    if both := {"--data", "--cache", "--decoder"} & asked:
        raise ValueError(f"{both.pop()} beside --features, which are of their own data; fix: leave one of them out")
    found = made(o.features)
    for flag, key in (("--buckets", "buckets"), ("--fps", "fps")):
        if flag in asked and getattr(o, key) != found[key]:
            raise ValueError(
                f"{o.features} was made with {key} {found[key]} and not {getattr(o, key)}; fix: leave {flag} out, or "
                "extract_features.sh with it"
            )
    return dataclasses.replace(o, buckets=found["buckets"], fps=found["fps"])


def check(o: TrainOptions, config: WanConfig) -> None:
    """They were made by the VAE and the text encoder of --weights, as far as those are there."""
    found, now = made(o.features), encoders(o, config) | {"task": config.task, "text_dim": config.text_dim}
    now.pop("vae_tiling", None)  # of the samples
    if differs := [
        f"{key} {found.get(key)!r} and not {value!r}" for key, value in now.items() if found.get(key) != value
    ]:
        raise ValueError(
            f"{o.features} was made with {', '.join(differs)}; fix: --weights or --precision, or extract_features.sh again"
        )


def settings(o: ExtractOptions, config: WanConfig) -> dict:
    """All that the bits of a features folder depend on."""
    mine = {"data": str(o.data.absolute()), "list": resume.content([o.data]) if o.data.is_file() else None}
    mine |= {"buckets": o.buckets, "fps": o.fps, "rows_of_shard": o.rows_of_shard}
    shape = {"task": config.task, "text_len": config.text_len, "text_dim": config.text_dim}
    return mine | encoders(o, config) | shape | {"image_tokens": config.image_tokens}


def check_begun(o: ExtractOptions, config: WanConfig) -> None:
    """A folder goes on with the options it was begun with."""
    begun, now = o.out / "settings.json", settings(o, config)
    saved = weights.read_json(begun) if begun.is_file() else now
    if differs := [f"{key} {saved.get(key)!r} and not {now[key]!r}" for key in now if saved.get(key) != now[key]]:
        raise ValueError(
            f"{o.out} was begun with {', '.join(differs)}; fix: --out another folder, or these as they were"
        )


class FeatureDataset:
    """Micro-batches of a features folder, as `data.VideoTextDataset` gives cached ones. A row without features is
    replaced by the next of its bucket, as a video that cannot be decoded is while training."""

    def __init__(self, folder: Path, index: data.Index):
        manifest = weights.read_json(folder / "manifest.json")
        self.folder, self.index, self.rows_of_shard = folder, index, manifest["rows_of_shard"]
        self.names: list[str] = manifest["tensors"]
        self._missing = set(manifest["missing"])
        self._bucket_rows: dict[int, list[int]] = {}
        for row, entry in enumerate(index.rows):
            self._bucket_rows.setdefault(entry.bucket, []).append(row)
        self._open = functools.lru_cache(maxsize=64)(_opened)  # files: a run may have more than a process may open

    def where(self, row: int) -> str:
        return str(shard(self.folder, row // self.rows_of_shard))

    def fetch(self, rows: Sequence[int], epoch: int = 0) -> dict[str, Any]:
        """As `data.VideoTextDataset.fetch`. ValueError: a damaged shard, named."""
        from safetensors import SafetensorError
        from torch import stack
        from torch.nn.utils.rnn import pad_sequence

        found, read = [self._present(row) for row in rows], {name: [] for name in self.names}
        for row in found:
            try:
                for name, tensors in read.items():
                    tensors.append(self._open(self.where(row)).get_tensor(f"{row}.{name}"))
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{self.where(row)} is damaged ({error}); fix: delete it and run extract_features.sh --out "
                    f"{self.folder} again with the options it was made with"
                ) from error
        return {
            "rows": found, "captions": [self.index.rows[row].caption for row in found], "keys": None, "pixels": None,
            "dropped": {},  # those were counted when the features were made
        } | {name: stack(tensors) for name, tensors in read.items() if name != "text"} | {
            "text": pad_sequence(read["text"], batch_first=True)
        }  # fmt: skip

    def _present(self, row: int) -> int:
        same = self._bucket_rows[self.index.rows[row].bucket]
        start = bisect_left(same, row)
        found = next((r for r in (*same[start:], *same[:start]) if r not in self._missing), None)
        if found is None:
            bucket = self.index.buckets[self.index.rows[row].bucket]
            raise ValueError(f"none of the {len(same)} videos of bucket {bucket} has features; fix: extract others")
        return found


def _opened(path: str):
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def empty_text(folder: Path) -> Tensor:
    """[n, D] of the empty caption."""
    from safetensors.torch import load_file

    return load_file(folder / "empty.safetensors")["text"]
