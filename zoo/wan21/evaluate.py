"""Score sampled videos: the demo's by a judge that knows its captions, yours by frozen models that you name.

    bash zoo/wan21/evaluate.sh                                   the shipped tiny model, every digit in every direction
    bash zoo/wan21/evaluate.sh --checkpoint runs/my-run/checkpoints
    NPROC=8 bash zoo/wan21/evaluate.sh --weights Wan2.1-T2V-1.3B-Diffusers --data held-out.jsonl \
        --feature-model dinov2-base --clip clip-vit-large-patch14

Samples are kept in OUT/videos as they come, so the same command with the same --out goes on where it stopped. Real clips
and samples are read alike, from their files, at the shape --video and the rate --fps. OUT/results.json has the scores.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from common import device, parallel
from common import train as loop
from common.data import DropReport

from . import data, images, scores
from .config import model_config
from .infer import lane_of, latents_of, load, pixels_of
from .options import EvaluateOptions, demo_list, requests, videos_of
from .videos import settings, write

SHOWN = 8  # clips in the GIF

# ------------------------------------------------------------------------------------------------------------ the demo


def judge_demo(videos: list[np.ndarray], real: list[np.ndarray], captions: list[str]) -> list[dict]:
    """Rows of scores, by the demo's judge, of samples and of real clips of the same captions, uint8 [F, H, W, 3] each."""
    from .demo import judge

    found, truth = judge.score(videos, captions), judge.score(real, captions)
    chance = {"digit": 1 / 10, "direction": 1 / 8, "both": 1 / 80}
    return [
        {"score": key, "samples": found[key], "real": truth[key], "chance": chance[key], "n": found["n"]}
        for key in chance
    ]


def in_words(rows: list[dict]) -> str:
    """The judge's scores in one line."""
    text = [
        f"{r['score']} {r['samples']:.0%} (chance {100 * r['chance']:.4g}%, real clips {r['real']:.0%})" for r in rows
    ]
    return f"{rows[0]['n']} samples: {', '.join(text)}"


def compare(folder: Path, videos: list[np.ndarray], real: list[np.ndarray], fps: float) -> None:
    """A GIF of the first samples, uint8 [F, H, W, 3] each, below the real clips of their captions if there are any."""
    strips = [np.concatenate(side[:SHOWN], axis=2) for side in (real, videos) if side]  # [F, H, SHOWN * W, 3]
    thin = max(1, strips[0].shape[1] // 128)
    strip = np.concatenate(strips, axis=1)[:, ::thin, ::thin]
    write(strip, folder / ("real_above_sampled_below" if real else "sampled"), fps or 16, "gif")


# -------------------------------------------------------------------------------------------------------------- clips


def readable(o: EvaluateOptions, rows: list[data.Row], fps: float | None) -> data.Index:
    """The rows that are videos of --video's shape, the same on every rank. ValueError: too few are."""
    held = [None]
    if dist.get_rank() == 0:
        report = DropReport()
        held = [data.scan(rows, data.parse_buckets(o.video, 1), fps, report, decoder=o.decoder)]
        if report.drops:
            print(report, file=sys.stderr, flush=True)
        report.check(len(rows), o.max_drop)
    dist.broadcast_object_list(held)
    return held[0]


def clip(clips: data.Index, place: int) -> np.ndarray:
    """uint8 [F, H, W, 3]. ValueError: it cannot be decoded."""
    batch = data.VideoTextDataset(clips).fetch([place])
    if batch["rows"] != [place]:  # training would go on with the next one
        raise ValueError(f"cannot decode {batch['dropped'][place]}; fix: take it out of --data or --videos")
    return batch["pixels"][0].permute(1, 2, 3, 0).numpy()


def shared(clips: data.Index, score: Callable, what: str) -> list:
    """score(video, caption) of every clip, in order; each rank computes its share."""
    rank, world = dist.get_rank(), dist.get_world_size()
    bar = tqdm(range(rank, len(clips.rows), world), desc=what, disable=rank > 0 or not sys.stderr.isatty())
    parts = [None] * world
    dist.all_gather_object(parts, [score(clip(clips, i), clips.rows[i].caption) for i in bar])
    return [parts[i % world][i // world] for i in range(len(clips.rows))]


# ------------------------------------------------------------------------------------------------------------ sampling


def sampled(o: EvaluateOptions, asked: list[images.Request], seeds: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(place, video uint8 [F, H, W, 3]) of what is asked, in any order; seeds: of each one's noise.

    Data-parallel ranks share them out; a video is given by the first of the ranks that made it, and by no other.
    """
    o = dataclasses.replace(o, fit="crop") if o.data else o
    config = model_config(o)
    parts = load(o, config)
    mine = list(range(lane_of(o), len(asked), o.lanes))
    for start in range(0, -(-len(asked) // o.lanes), o.micro_batch):
        places = mine[start : start + o.micro_batch]
        some = places or [0]  # every rank does every turn: FSDP gathers in all of them
        latents = latents_of(o, config, parts, [asked[i] for i in some], [seeds[i] for i in some])
        writes = parts.video_group.rank() == 0
        if places and (writes or o.vae_parallel):
            made = pixels_of(o, parts, latents).permute(0, 2, 3, 4, 1).numpy()
            yield from zip(places, made, strict=True) if writes else ()


def sample_missing(o: EvaluateOptions, asked: list[images.Request]) -> list[Path]:
    """The samples' files, one of each asked for; those that are not there yet are made. Number i has seed + i, as in
    infer.py."""
    folder = o.out / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        note_settings(o, asked)
    files = [folder / f"{i:05d}.mp4" for i in range(len(asked))]
    missing = [i for i, file in enumerate(files) if not file.is_file()]
    dist.barrier()  # before anyone writes, for everyone to miss the same
    if missing:
        bar = tqdm(total=len(missing), desc="videos", disable=dist.get_rank() > 0 or not sys.stderr.isatty())
        for turn, video in sampled(o, [asked[i] for i in missing], [o.seed + i for i in missing]):
            i = missing[turn]
            (written,) = write(video, folder / f".{i:05d}", o.fps or 16, "mp4", {"prompt": asked[i].prompt})
            os.replace(written, files[i])
            bar.update(o.lanes)
        bar.close()
    dist.barrier()
    return files


def note_settings(o: EvaluateOptions, asked: list[images.Request]) -> None:
    """OUT/settings.json says what the samples depend on. ValueError: those in OUT were made otherwise."""
    rows = [[value for value in (r.prompt, r.image, r.last_image) if value is not None] for r in asked]
    now = json.loads(json.dumps(settings(o) | {"asked": rows}, default=str))
    path = o.out / "settings.json"
    before = json.loads(path.read_text()) if path.is_file() else now
    differs = [f"{key} {before.get(key)!r}, not {now[key]!r}" for key in now if key != "asked"
               and before.get(key) != now[key]]  # fmt: skip
    pairs = zip(before["asked"], now["asked"], strict=False)  # one may have more than the other: --limit
    differs += [f"row {i} {a!r}, not {b!r}" for i, (a, b) in enumerate(pairs) if a != b][:1]
    if differs:
        raise ValueError(f"{o.out} has samples made otherwise: {'; '.join(differs)}; fix: --out")
    path.write_text(json.dumps(now | {"asked": max(before["asked"], now["asked"], key=len)}, indent=2))


# ------------------------------------------------------------------------------------------------------------- scores


def measure(o: EvaluateOptions, made: data.Index, real: data.Index | None) -> list[dict]:
    """Rows of the scores by frozen models, those too that nothing was given for."""
    rows, count = [], len(made.rows)
    needs = "--feature-model DIR" if o.feature_model is None else "--data LIST, of real clips" if real is None else None
    if needs:
        rows.append({"score": "FVD-like", "note": f"not measured: needs {needs}"})
    else:
        features = scores.Features(o.feature_model, device.current())
        ours, theirs = (
            np.stack(shared(side, lambda video, _: features(video), what))
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
        found = [np.mean(shared(side, score, "CLIP score")) if side else None for side in (made, real)]
        rows.append({"score": "CLIP score", "samples": found[0], "real": found[1], "n": count})
    return rows


def by_vbench(o: EvaluateOptions, made: data.Index) -> list[dict]:
    """Rows of VBench's dimensions."""
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


def table(rows: list[dict]) -> str:
    def text(row: dict, key: str) -> str:
        value = row.get(key)
        return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    heads = {"score": "score", "samples": "samples", "real": "real clips", "chance": "chance", "n": "n", "note": ""}
    cells = [
        list(heads.values()),
        *([text(row, key) if key != "note" else row.get(key, "") for key in heads] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:-1], widths[1:-1], strict=True)), line[-1]])
             for line in cells]  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)


def report(o: EvaluateOptions, rows: list[dict]) -> None:
    facts = {
        "command": os.environ.get("ZOO_COMMAND", " ".join(sys.argv)), "commit": loop.commit(),
        "hardware": device.name(), "devices": o.world, "shape": o.video, "fps": o.fps,
        "feature model": o.feature_model, "clip": o.clip, "scores": rows,
    }  # fmt: skip
    (o.out / "results.json").write_text(json.dumps(facts, indent=2, default=str) + "\n")
    print(f"{table(rows)}\nresults     {o.out / 'results.json'}", flush=True)


def main(o: EvaluateOptions) -> None:
    o.out.mkdir(parents=True, exist_ok=True)
    listed = data.read_rows(o.data)[0][: o.limit] if o.data else []
    real = readable(o, listed, o.fps or None) if listed else None
    if o.videos:
        files, captions = videos_of(o.videos), [row.caption for row in listed]
    else:
        config = model_config(o)
        if real:  # image-to-video: their own first (and last) frames
            asked = [images.Request(row.caption, *[Path(row.path)] * config.given_frames) for row in real.rows]
        else:
            asked = requests(o, config)[: o.limit]
        files, captions = sample_missing(o, asked), [request.prompt for request in asked]
    rows = [data.Row(str(file.absolute()), c, str(file)) for file, c in zip(files, captions, strict=True)]
    made = readable(o, rows, (o.fps or None) if o.videos else None)
    judged, first = [], dist.get_rank() == 0
    if first:
        demo = o.data == demo_list("test")
        few = len(captions) if demo else SHOWN
        shown = [[clip(side, i) for i in range(len(side.rows[:few]))] if side else [] for side in (made, real)]
        judged = judge_demo(*shown, captions) if demo else []
        compare(o.out, *shown, o.fps)
    judged += measure(o, made, real)
    dist.barrier()
    parallel.shutdown()  # VBench may take hours; the other ranks would give up waiting
    if first:
        judged += by_vbench(o, made) if o.vbench else []
        report(o, judged)
