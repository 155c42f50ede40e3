"""The extraction loop: it runs the frozen encoders once over every video of an index, and writes a features folder.

Of the missing shards, rank r of n makes number r, r + n, … It encodes one video at a time, so that a shard's bits
depend on nothing else. Shards that exist already are kept. features.py describes the folder.
"""

import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import weights
from common.data import start_decoding, without_collecting_inherited
from common.drops import check_drops, note_drops
from common.video import VideoError

from .dataset import Index, VideoTextDataset, without_padding
from .features import shard_path, write_json, write_tensors


class Decoded:
    """Decodes a row, in the loader's processes, to pixels uint8 [1, 3, F, H, W], or to the reason why it cannot."""

    def __init__(self, dataset: VideoTextDataset):
        self.dataset = dataset

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor | str]:
        try:
            pixels = torch.from_numpy(self.dataset.read(row))  # [F, H, W, 3]
        except VideoError as error:
            return row, str(error)
        return row, pixels.permute(3, 0, 1, 2).unsqueeze(0).contiguous()


def extract(o, index: Index, encode: Callable, encode_text: Callable) -> None:
    """Makes the shards that are missing, and the manifest when all are there. Collective.

    encode(pixels uint8 [B, 3, F, H, W], captions) -> (latents [B, C, f, h, w], text [B, T, D], condition: named
    tensors); encode_text(captions) -> text. A rank without a shard to make calls neither, so it need not load the
    encoders.

    Raises:
        ValueError: more than the share --max-drop of the videos cannot be decoded.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    missing = _missing_shards(o, len(index.rows))
    dist.barrier()  # every rank looks before any rank writes
    mine = missing[rank::world]
    if rank == 0:
        print(f"{len(index.rows)} rows, {sum(map(len, missing))} of them to do, on {world} ranks", flush=True)
    quiet = rank > 0 or not sys.stderr.isatty()
    rows = _make_shards(o, index, mine, encode, encode_text) if mine else ()
    for _ in tqdm(rows, total=sum(map(len, mine)), disable=quiet, unit="video", desc="rank 0"):
        pass
    dist.barrier()
    if rank == 0:
        report = check_drops(o.out / "drops.jsonl", len(index.rows), o.max_drop)
        extracted = len(index.rows) - len(_write_manifest(o, index))
        print(f"{report}\nfeatures    {o.out}: {extracted} videos", flush=True)
    dist.barrier()


def _missing_shards(o, rows: int) -> list[range]:
    """Returns the rows of every shard that is missing, or has another size than in the manifest of an earlier run."""
    manifest = o.out / "manifest.json"
    sizes = weights.read_json(manifest)["shards"] if manifest.is_file() else {}
    shards = [range(first, min(first + o.rows_of_shard, rows)) for first in range(0, rows, o.rows_of_shard)]

    def there(number: int) -> bool:
        path = shard_path(o.out, number)
        return path.is_file() and sizes.get(path.name, path.stat().st_size) == path.stat().st_size

    return [shard for number, shard in enumerate(shards) if not there(number)]


def _make_shards(o, index: Index, shards: list[range], encode: Callable, encode_text: Callable) -> Iterator[int]:
    """Writes these shards and, on rank 0, the empty caption's text embedding. Yields each row when it is done."""
    if dist.get_rank() == 0:
        write_tensors(o.out / "empty.safetensors", {"text": without_padding(encode_text([""])[0])})
    dataset = VideoTextDataset(index)
    last = {shard[-1] for shard in shards}
    tensors: dict[str, torch.Tensor] = {}
    order = [row for shard in shards for row in shard]
    loader = DataLoader(
        Decoded(dataset), batch_size=None, sampler=order, num_workers=o.workers, worker_init_fn=start_decoding
    )
    with without_collecting_inherited():
        loader = iter(loader)
    for row, pixels in loader:
        if isinstance(pixels, str):
            note_drops(o.out / "drops.jsonl", dataset.drops({row: pixels}), len(index.rows), o.max_drop)
        else:
            latents, text, condition = encode(pixels, [index.rows[row].caption])
            tensors[f"{row}.text"] = without_padding(text[0])
            for name, value in ({"latents": latents} | condition).items():
                tensors[f"{row}.{name}"] = value[0].float().cpu().contiguous()
        if row in last:
            write_tensors(shard_path(o.out, row // o.rows_of_shard), tensors)
            tensors = {}
        yield row


def _write_manifest(o, index: Index) -> list[int]:
    """Writes the manifest: the shards, and the rows that they hold no features of. Returns these rows."""
    paths, present = sorted((o.out / "shards").glob("*.safetensors")), set()
    names: set[str] = set()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            keys = [key.partition(".") for key in file.keys()]  # noqa: SIM118  (it is no dict)
        present |= {int(row) for row, _, _ in keys}
        names |= {name for _, _, name in keys}
    missing = sorted(set(range(len(index.rows))) - present)
    values = {"rows_of_shard": o.rows_of_shard, "rows": len(index.rows), "missing": missing, "tensors": sorted(names)}
    write_json(o.out / "manifest.json", values | {"shards": {p.name: p.stat().st_size for p in paths}})
    return missing
