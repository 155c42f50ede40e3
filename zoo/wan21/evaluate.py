"""Scores sampled videos. A judge that knows the demo's captions scores the demo's; models that you name score yours.

    bash zoo/wan21/evaluate.sh                                   the shipped tiny model, every digit in every direction
    bash zoo/wan21/evaluate.sh --checkpoint runs/my-run/checkpoints
    NPROC=8 bash zoo/wan21/evaluate.sh --weights Wan2.1-T2V-1.3B-Diffusers --data held-out.jsonl \
        --feature-model dinov2-base --clip clip-vit-large-patch14

Each sample is written to OUT/videos when it is ready, so the same command with the same --out continues where it
stopped. Real clips and samples are read in the same way: from files, at the shape --video and the rate --fps.
OUT/results.json has the scores.
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
from common.diffusion.sampling import turns_of_rank
from common.diffusion.videos import write_strips, write_video

from .config import model_config
from .demo.report import judge_demo
from .infer import latents_of, load, pixels_of
from .options import STRIDES, EvaluateOptions, demo_list, requests_of

SHOWN = 8  # clips in the GIF


def sample_videos(o: EvaluateOptions, requests: list[Request], places: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Samples the requests at these places. Yields (place, video uint8 [F, H, W, 3]) in any order. The seed of request
    i is seed + i, as in infer.py.

    Data-parallel ranks divide the requests. Of the ranks that make one video, only the first yields it.
    """
    o = dataclasses.replace(o, fit="crop") if o.data else o
    config = model_config(o)
    parts = load(o, config)
    for turn, counts in turns_of_rank(places, o, o.micro_batch):
        latents = latents_of(o, config, parts, [requests[i] for i in turn], [o.seed + i for i in turn])
        writes = parts.video_group.rank() == 0
        if counts and (writes or o.vae_parallel):
            videos = pixels_of(o, parts, latents).permute(0, 2, 3, 4, 1).numpy()
            yield from zip(turn, videos, strict=True) if writes else ()


def sample_missing(o: EvaluateOptions, requests: list[Request]) -> list[Path]:
    """Returns the files of the samples, one per request. Samples those that do not exist yet."""
    folder = o.out / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        evaluation.note_settings(o, requests)
    files = [folder / f"{i:05d}.mp4" for i in range(len(requests))]
    missing = [i for i, file in enumerate(files) if not file.is_file()]
    dist.barrier()  # all ranks list the files before one writes
    if missing:
        bar = tqdm(total=len(missing), desc="videos", disable=dist.get_rank() > 0 or not sys.stderr.isatty())
        for i, video in sample_videos(o, requests, missing):
            (written,) = write_video(video, folder / f".{i:05d}", o.fps or 16, "mp4", {"prompt": requests[i].prompt})
            os.replace(written, files[i])
            bar.update(o.videos_at_once)
        bar.close()
    dist.barrier()
    return files


def main(o: EvaluateOptions) -> None:
    o.out.mkdir(parents=True, exist_ok=True)
    listed = read_rows(o.data)[0][: o.limit] if o.data else []
    (bucket,) = parse_buckets(o.video, Strides(STRIDES.frames, side=1))  # videos of other models may have any sides
    real = evaluation.scan_readable(o, listed, bucket, o.fps or None) if listed else None
    if o.videos:
        files, captions = videos_of(o.videos), [row.caption for row in listed]
    else:
        config = model_config(o)
        if real:  # image-to-video is given their own first (and last) frames
            requests = [Request(row.caption, *[Path(row.path)] * config.given_frames) for row in real.rows]
        else:
            requests = requests_of(o, config)[: o.limit]
        files, captions = sample_missing(o, requests), [request.prompt for request in requests]
    rows = [Row(str(file.absolute()), c, str(file)) for file, c in zip(files, captions, strict=True)]
    sampled = evaluation.scan_readable(o, rows, bucket, (o.fps or None) if o.videos else None)
    judged, is_main = [], dist.get_rank() == 0
    if is_main:
        demo = o.data == demo_list("test")
        shown_count = len(captions) if demo else SHOWN
        shown = [
            [evaluation.read_clip(side, i) for i in range(len(side.rows[:shown_count]))] if side else []
            for side in (sampled, real)
        ]
        judged = judge_demo(*shown, captions) if demo else []
        strips = [side[:SHOWN] for side in reversed(shown) if side]
        write_strips(strips, o.out / ("real_above_sampled_below" if shown[1] else "sampled"), o.fps)
    judged += evaluation.measure(o, sampled, real)
    dist.barrier()
    parallel.shutdown()  # VBench may take hours, after which waiting ranks would time out
    if is_main:
        judged += evaluation.measure_vbench(o, sampled) if o.vbench else []
        evaluation.report(o, judged)
