"""The parts of an evaluation that are the same for every model: reading clips, sharing scores over ranks, the table.

Real clips and samples are both read from files, at one shape and one rate. Shapes: F frames, H height, W width.
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
from common.drops import DropReport

from . import scores, videos
from .buckets import Bucket
from .dataset import Index, VideoTextDataset, scan
from .lists import Row
from .requests import Request

# ---- clips ----


def scan_readable(o, rows: list[Row], bucket: Bucket, fps: float | None) -> Index:
    """Returns the rows with videos of this shape, on every rank. Raises ValueError if over --max-drop have none."""
    indices = [None]
    if dist.get_rank() == 0:
        report = DropReport()
        indices = [scan(rows, [bucket], fps, report, decoder=o.decoder)]
        if report.drops:
            print(report, file=sys.stderr, flush=True)
        report.check(len(rows), o.max_drop)
    dist.broadcast_object_list(indices)
    return indices[0]


def read_clip(clips: Index, place: int) -> np.ndarray:
    """Reads a clip as uint8 [F, H, W, 3]. Raises ValueError if it cannot be decoded."""
    batch = VideoTextDataset(clips).fetch([place])
    if batch["rows"] != [place]:  # the next one, which training would use instead
        raise ValueError(f"cannot decode {batch['dropped'][place]}; fix: take it out of --data or --videos")
    return batch["pixels"][0].permute(1, 2, 3, 0).numpy()


def score_shares(clips: Index, score: Callable, what: str) -> list:
    """Returns score(video, caption) of every clip, in order, on every rank. Each rank computes its share."""
    rank, world = dist.get_rank(), dist.get_world_size()
    bar = tqdm(range(rank, len(clips.rows), world), desc=what, disable=rank > 0 or not sys.stderr.isatty())
    parts = [None] * world
    dist.all_gather_object(parts, [score(read_clip(clips, i), clips.rows[i].caption) for i in bar])
    return [parts[i % world][i // world] for i in range(len(clips.rows))]


def note_settings(o, requests: list[Request]) -> None:
    """Writes OUT/settings.json, which says what the samples depend on. Raises ValueError if those in OUT differ."""
    rows = [[value for value in (r.prompt, r.image, r.last_image) if value is not None] for r in requests]
    current = json.loads(json.dumps(videos.describe(o) | {"asked": rows}, default=str))
    path = o.out / "settings.json"
    saved = json.loads(path.read_text()) if path.is_file() else current
    differences = [f"{key} {saved.get(key)!r}, not {current[key]!r}" for key in current if key != "asked"
                   and saved.get(key) != current[key]]  # fmt: skip
    pairs = zip(saved["asked"], current["asked"], strict=False)  # --limit may give one more rows than the other
    differences += [f"row {i} {a!r}, not {b!r}" for i, (a, b) in enumerate(pairs) if a != b][:1]
    if differences:
        raise ValueError(f"{o.out} has samples made otherwise: {'; '.join(differences)}; fix: --out")
    path.write_text(json.dumps(current | {"asked": max(saved["asked"], current["asked"], key=len)}, indent=2))


# ---- scores ----


def measure(o, made: Index, real: Index | None) -> list[dict]:
    """Returns a row for each score by frozen models. The row of a score without its model or data says so."""
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
        means = [np.mean(score_shares(side, score, "CLIP score")) if side else None for side in (made, real)]
        rows.append({"score": "CLIP score", "samples": means[0], "real": means[1], "n": count})
    return rows


def measure_vbench(o, made: Index) -> list[dict]:
    """Returns a row for each of VBench's dimensions. VBench needs a folder that holds the videos only."""
    out = o.out / "vbench"
    folder, captions = out / "videos", {}
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.iterdir():
        stale.unlink()
    for i, row in enumerate(made.rows):
        name = f"{i:05d}{Path(row.path).suffix}"
        (folder / name).symlink_to(row.path)
        captions[name] = row.caption
    kind = "cuda" if device.KIND == "cuda" else "cpu"
    values = scores.vbench(o.vbench_python, o.vbench.split(","), captions, folder, out, kind)
    return [{"score": f"VBench {key}", "samples": value, "n": len(captions)} for key, value in values.items()]


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
    """Writes OUT/results.json and prints the table."""
    facts = {
        "command": os.environ.get("ZOO_COMMAND", " ".join(sys.argv)), "commit": runlog.commit(),
        "hardware": device.name(), "devices": o.world, "shape": o.video, "fps": o.fps,
        "feature model": o.feature_model, "clip": o.clip, "scores": rows,
    }  # fmt: skip
    (o.out / "results.json").write_text(json.dumps(facts, indent=2, default=str) + "\n")
    print(f"{_table(rows)}\nresults     {o.out / 'results.json'}", flush=True)
