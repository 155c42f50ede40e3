"""Extract features: the frozen VAE and text encoder over every video of a list, once.

    bash zoo/wan21/extract_features.sh --out features                                  # the demo's clips, any laptop
    NPROC=8 bash zoo/wan21/extract_features.sh --weights Wan2.1-T2V-14B-Diffusers --data my.jsonl --out features

Rank r of n makes the shards r, r + n, … one video at a time, so that a shard's bits depend on nothing else. Shards that
are there already are kept. `--features` of the training jobs reads the result (features.py says what it looks like).
"""

import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import jsonl, weights
from common.data import check_drops, inheritance_kept, note_drops, start_decoding
from common.video import VideoError

from . import data, features
from .config import model_config
from .encoders import Encoders
from .options import ExtractOptions
from .train import indexed


class Decoded:
    """What worker processes do: pixels uint8 [1, 3, F, H, W] of a row, or why it cannot be decoded."""

    def __init__(self, dataset: data.VideoTextDataset):
        self.dataset = dataset

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor | str]:
        try:
            pixels = torch.from_numpy(self.dataset.read(row))  # [F, H, W, 3]
        except VideoError as error:
            return row, str(error)
        return row, pixels.permute(3, 0, 1, 2).unsqueeze(0).contiguous()


def missing_shards(o: ExtractOptions, rows: int) -> list[range]:
    """The rows of every shard that is not there, or not with the size the manifest of an earlier run gives it."""
    manifest = o.out / "manifest.json"
    sizes = weights.read_json(manifest)["shards"] if manifest.is_file() else {}
    shards = [range(first, min(first + o.rows_of_shard, rows)) for first in range(0, rows, o.rows_of_shard)]

    def there(number: int) -> bool:
        path = features.shard(o.out, number)
        return path.is_file() and sizes.get(path.name, path.stat().st_size) == path.stat().st_size

    return [shard for number, shard in enumerate(shards) if not there(number)]


def extract(o: ExtractOptions, index: data.Index, shards: list[range]) -> Iterator[int]:
    """Makes and writes these shards; yields each row when it is done. ValueError: too many cannot be decoded."""
    frozen = Encoders(o.weights, model_config(o), o.precision, o.vae_tiling)
    if dist.get_rank() == 0:
        empty = data.without_padding(frozen.text.encode([""])[0])
        features.write_tensors(o.out / "empty.safetensors", {"text": empty})
    dataset = data.VideoTextDataset(index)
    last = {shard[-1] for shard in shards}
    tensors: dict[str, torch.Tensor] = {}
    order = [row for shard in shards for row in shard]
    loader = DataLoader(
        Decoded(dataset), batch_size=None, sampler=order, num_workers=o.workers, worker_init_fn=start_decoding
    )
    with inheritance_kept():
        loader = iter(loader)
    for row, pixels in loader:
        if isinstance(pixels, str):
            note_drops(o.out / "drops.jsonl", dataset.drops({row: pixels}), len(index.rows), o.max_drop)
        else:
            latents, text, condition = frozen.encode(pixels, [index.rows[row].caption])
            tensors[f"{row}.text"] = data.without_padding(text[0])
            for name, value in ({"latents": latents} | condition).items():
                tensors[f"{row}.{name}"] = value[0].float().cpu().contiguous()
        if row in last:
            features.write_tensors(features.shard(o.out, row // o.rows_of_shard), tensors)
            tensors = {}
        yield row


def write_manifest(o: ExtractOptions, index: data.Index) -> list[int]:
    """Lists the shards and, from what they really hold, the rows that have no features, which it returns."""
    paths, present = sorted((o.out / "shards").glob("*.safetensors")), set()
    names: set[str] = set()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            keys = [key.partition(".") for key in file.keys()]  # noqa: SIM118  (it is no dict)
        present |= {int(row) for row, _, _ in keys}
        names |= {name for _, _, name in keys}
    missing = sorted(set(range(len(index.rows))) - present)
    values = {"rows_of_shard": o.rows_of_shard, "rows": len(index.rows), "missing": missing, "tensors": sorted(names)}
    features.write_json(o.out / "manifest.json", values | {"shards": {p.name: p.stat().st_size for p in paths}})
    return missing


def main(o: ExtractOptions) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        o.out.mkdir(parents=True, exist_ok=True)
        jsonl.mend(o.out / "drops.jsonl")
        features.write_json(o.out / "settings.json", features.settings(o, model_config(o)))
    index = indexed(o, o.data)
    shards = missing_shards(o, len(index.rows))
    dist.barrier()  # all have looked before one writes
    mine = shards[rank::world]
    todo = sum(map(len, mine))
    if rank == 0:
        print(f"{len(index.rows)} rows, {sum(map(len, shards))} of them to do, on {world} ranks", flush=True)
    hidden = rank > 0 or not sys.stderr.isatty()
    for _ in tqdm(extract(o, index, mine) if mine else (), total=todo, disable=hidden, unit="video", desc="rank 0"):
        pass
    dist.barrier()
    if rank == 0:
        report = check_drops(o.out / "drops.jsonl", len(index.rows), o.max_drop)
        there = len(index.rows) - len(write_manifest(o, index))
        print(f"{report}\nfeatures    {o.out}: {there} videos", flush=True)
    dist.barrier()
