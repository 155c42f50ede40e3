"""What an evaluation does whatever the model: clips read back from their files, scores shared out over the ranks, a table.

Real clips and samples are read alike, from their files, at one shape and one rate. Shapes: F frames, H height, W width.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from common import device, runlog
from common.data import DropReport

from . import scores, videos
from .buckets import Bucket
from .dataset import Index, VideoTextDataset, scan
from .lists import Row
from .requests import Request

# ---- clips ----


def scan_readable(o, rows: list[Row], bucket: Bucket, fps: float | None) -> Index:
    """The rows that are videos of this shape, the same on every rank. ValueError: more than --max-drop are not."""
    held = [None]
    if dist.get_rank() == 0:
        report = DropReport()
        held = [scan(rows, [bucket], fps, report, decoder=o.decoder)]
        if report.drops:
            print(report, file=sys.stderr, flush=True)
        report.check(len(rows), o.max_drop)
    dist.broadcast_object_list(held)
    return held[0]


def read_clip(clips: Index, place: int) -> np.ndarray:
    """uint8 [F, H, W, 3]. ValueError: it cannot be decoded."""
    batch = VideoTextDataset(clips).fetch([place])
    if batch["rows"] != [place]:  # training would go on with the next one
        raise ValueError(f"cannot decode {batch['dropped'][place]}; fix: take it out of --data or --videos")
    return batch["pixels"][0].permute(1, 2, 3, 0).numpy()


def score_shares(clips: Index, score: Callable, what: str) -> list:
    """score(video, caption) of every clip, in order, on every rank. Each rank computes its share."""
    rank, world = dist.get_rank(), dist.get_world_size()
    bar = tqdm(range(rank, len(clips.rows), world), desc=what, disable=rank > 0 or not sys.stderr.isatty())
    parts = [None] * world
    dist.all_gather_object(parts, [score(read_clip(clips, i), clips.rows[i].caption) for i in bar])
    return [parts[i % world][i // world] for i in range(len(clips.rows))]


def note_settings(o, requests: list[Request]) -> None:
    """Write OUT/settings.json, which says what the samples depend on. ValueError: those in OUT were made otherwise."""
    rows = [[value for value in (r.prompt, r.image, r.last_image) if value is not None] for r in requests]
    now = json.loads(json.dumps(videos.describe(o) | {"asked": rows}, default=str))
    path = o.out / "settings.json"
    before = json.loads(path.read_text()) if path.is_file() else now
    differs = [f"{key} {before.get(key)!r}, not {now[key]!r}" for key in now if key != "asked"
               and before.get(key) != now[key]]  # fmt: skip
    pairs = zip(before["asked"], now["asked"], strict=False)  # one may have more than the other: --limit
    differs += [f"row {i} {a!r}, not {b!r}" for i, (a, b) in enumerate(pairs) if a != b][:1]
    if differs:
        raise ValueError(f"{o.out} has samples made otherwise: {'; '.join(differs)}; fix: --out")
    path.write_text(json.dumps(now | {"asked": max(before["asked"], now["asked"], key=len)}, indent=2))


# ---- scores ----


def measure(o, made: Index, real: Index | None) -> list[dict]:
    """Rows of the scores by frozen models. A score that nothing was given for says so."""
    rows, count = [], len(made.rows)
    needs = "--feature-model DIR" if o.feature_model is None else "--data LIST, of real clips" if real is None else None
    if needs:
        rows.append({"score": "FVD-like", "note": f"not measured: needs {needs}"})
    else:
        features = scores.Features(o.feature_model, device.current())
        ours, theirs = (
            np.stack(score_shares(side, lambda video, _: features(video), what))
            for side, what in ((made, "features"), (real, "features of real clips"))
        )
        distance = scores.frechet_distance(ours, theirs)
        note = f"{features.kind}, {ours.shape[1]} features, to {len(theirs)} real clips"
        if min(count, len(theirs)) <= ours.shape[1]:
            note += "; no more clips than features: too high"
        rows.append({"score": "FVD-like", "samples": distance, "n": count, "note": note})
    if o.clip is None:
        rows.append({"score": "CLIP score", "note": "not measured: needs --clip DIR"})
    else:
        score = scores.ClipScore(o.clip, device.current())
        found = [np.mean(score_shares(side, score, "CLIP score")) if side else None for side in (made, real)]
        rows.append({"score": "CLIP score", "samples": found[0], "real": found[1], "n": count})
    return rows


def measure_vbench(o, made: Index) -> list[dict]:
    """Rows of VBench's dimensions, which needs a folder of the videos by itself."""
    out = o.out / "vbench"
    folder, captions = out / "videos", {}
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for i, row in enumerate(made.rows):
        name = f"{i:05d}{Path(row.path).suffix}"
        (folder / name).symlink_to(row.path)
        captions[name] = row.caption
    where = "cuda" if device.KIND == "cuda" else "cpu"
    found = scores.vbench(o.vbench_python, o.vbench.split(","), captions, folder, out, where)
    return [{"score": f"VBench {key}", "samples": value, "n": len(captions)} for key, value in found.items()]


def _table(rows: list[dict]) -> str:
    def text(row: dict, key: str) -> str:
        value = row.get(key)
        return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    heads = {"score": "score", "samples": "samples", "real": "real clips", "chance": "chance", "n": "n", "note": ""}
    lines = [list(heads.values())]
    lines += [[text(row, key) if key != "note" else row.get(key, "") for key in heads] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:-1], strict=True)), note]
        for first, *cells, note in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def report(o, rows: list[dict]) -> None:
    """Write OUT/results.json and print the table."""
    facts = {
        "command": os.environ.get("ZOO_COMMAND", " ".join(sys.argv)), "commit": runlog.commit(),
        "hardware": device.name(), "devices": o.world, "shape": o.video, "fps": o.fps,
        "feature model": o.feature_model, "clip": o.clip, "scores": rows,
    }  # fmt: skip
    (o.out / "results.json").write_text(json.dumps(facts, indent=2, default=str) + "\n")
    print(f"{_table(rows)}\nresults     {o.out / 'results.json'}", flush=True)
