"""Score sampled videos: the demo's by a judge that knows its captions, yours by frozen models that you name.

    bash zoo/wan21/evaluate.sh                                   the shipped tiny model, every digit in every direction
    bash zoo/wan21/evaluate.sh --checkpoint runs/my-run/checkpoints
    NPROC=8 bash zoo/wan21/evaluate.sh --weights Wan2.1-T2V-1.3B-Diffusers --data held-out.jsonl \
        --feature-model dinov2-base --clip clip-vit-large-patch14

Samples are kept in OUT/videos as they come, so the same command with the same --out goes on where it stopped. Real clips
and samples are read alike, from their files, at the shape --video and the rate --fps. OUT/results.json has the scores.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from common import parallel
from common.diffusion import evaluation
from common.diffusion.buckets import Strides, parse_buckets
from common.diffusion.lists import Row, read_rows
from common.diffusion.options import videos_of
from common.diffusion.requests import Request
from common.diffusion.sampling import share_out
from common.diffusion.videos import write_strips, write_video

from .config import model_config
from .demo.report import judge_demo
from .infer import latents_of, load, pixels_of
from .options import STRIDES, EvaluateOptions, demo_list, requests_of

SHOWN = 8  # clips in the GIF


def sample_videos(o: EvaluateOptions, requests: list[Request], places: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(place, video uint8 [F, H, W, 3]) of the requests at these places, in any order. Number i has seed + i, as in
    infer.py.

    Data-parallel ranks share them out. A video is given by the first of the ranks that made it, and by no other.
    """
    o = dataclasses.replace(o, fit="crop") if o.data else o
    config = model_config(o)
    parts = load(o, config)
    for some, counts in share_out(places, o, o.micro_batch):
        latents = latents_of(o, config, parts, [requests[i] for i in some], [o.seed + i for i in some])
        writes = parts.video_group.rank() == 0
        if counts and (writes or o.vae_parallel):
            made = pixels_of(o, parts, latents).permute(0, 2, 3, 4, 1).numpy()
            yield from zip(some, made, strict=True) if writes else ()


def sample_missing(o: EvaluateOptions, requests: list[Request]) -> list[Path]:
    """The samples' files, one of each request. Those that are not there yet are made."""
    folder = o.out / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        evaluation.note_settings(o, requests)
    files = [folder / f"{i:05d}.mp4" for i in range(len(requests))]
    missing = [i for i, file in enumerate(files) if not file.is_file()]
    dist.barrier()  # before anyone writes, for everyone to miss the same
    if missing:
        bar = tqdm(total=len(missing), desc="videos", disable=dist.get_rank() > 0 or not sys.stderr.isatty())
        for i, video in sample_videos(o, requests, missing):
            (written,) = write_video(video, folder / f".{i:05d}", o.fps or 16, "mp4", {"prompt": requests[i].prompt})
            os.replace(written, files[i])
            bar.update(o.lanes)
        bar.close()
    dist.barrier()
    return files


def main(o: EvaluateOptions) -> None:
    o.out.mkdir(parents=True, exist_ok=True)
    listed = read_rows(o.data)[0][: o.limit] if o.data else []
    (bucket,) = parse_buckets(o.video, Strides(STRIDES.frames, side=1))  # videos of others may have any sides
    real = evaluation.scan_readable(o, listed, bucket, o.fps or None) if listed else None
    if o.videos:
        files, captions = videos_of(o.videos), [row.caption for row in listed]
    else:
        config = model_config(o)
        if real:  # image-to-video: their own first (and last) frames
            requests = [Request(row.caption, *[Path(row.path)] * config.given_frames) for row in real.rows]
        else:
            requests = requests_of(o, config)[: o.limit]
        files, captions = sample_missing(o, requests), [request.prompt for request in requests]
    rows = [Row(str(file.absolute()), c, str(file)) for file, c in zip(files, captions, strict=True)]
    made = evaluation.scan_readable(o, rows, bucket, (o.fps or None) if o.videos else None)
    judged, first = [], dist.get_rank() == 0
    if first:
        demo = o.data == demo_list("test")
        few = len(captions) if demo else SHOWN
        shown = [
            [evaluation.read_clip(side, i) for i in range(len(side.rows[:few]))] if side else []
            for side in (made, real)
        ]
        judged = judge_demo(*shown, captions) if demo else []
        strips = [side[:SHOWN] for side in reversed(shown) if side]
        write_strips(strips, o.out / ("real_above_sampled_below" if shown[1] else "sampled"), o.fps)
    judged += evaluation.measure(o, made, real)
    dist.barrier()
    parallel.shutdown()  # VBench may take hours; the other ranks would give up waiting
    if first:
        judged += evaluation.measure_vbench(o, made) if o.vbench else []
        evaluation.report(o, judged)
