"""Scores of the demo's samples by its judge, beside those of real clips and of chance, and GIFs of both."""

import json

import numpy as np

from common.diffusion.lists import Row, read_pairs, read_rows
from common.diffusion.videos import write_strips, write_video
from common.video import probe_video, read_frames

from ..options import DEMO_CAPTIONS, TrainOptions
from . import judge

SHOWN = 8  # clips in a GIF


def demo_rows(o: TrainOptions) -> list[Row]:
    """Lists the demo's held-out real clips: every digit in every direction."""
    path = o.data.with_name("test.jsonl")
    rows = read_pairs(path)[0][::2] if o.job == "dpo" else read_rows(path)[0]
    return rows[:DEMO_CAPTIONS]


def judge_demo(videos: list[np.ndarray], real: list[np.ndarray], captions: list[str]) -> list[dict]:
    """Returns rows of the judge's scores of samples and real clips with the same captions, uint8 [F, H, W, 3] each."""
    scores, truth = judge.score(videos, captions), judge.score(real, captions)
    chance = {"digit": 1 / 10, "direction": 1 / 8, "both": 1 / 80}
    return [
        {"score": key, "samples": scores[key], "real": truth[key], "chance": chance[key], "n": scores["n"]}
        for key in chance
    ]


def in_words(rows: list[dict]) -> str:
    """Formats the judge's scores as one line."""
    text = [
        f"{r['score']} {r['samples']:.0%} (chance {100 * r['chance']:.4g}%, real clips {r['real']:.0%})" for r in rows
    ]
    return f"{rows[0]['n']} samples: {', '.join(text)}"


def report_demo(o: TrainOptions, videos: list, captions: list[str], steps: int, before: list) -> None:
    """Scores the samples and real clips, writes scores.json and GIFs of both, and prints the run's line of result.
    before: the samples without adapters, if adapters were trained."""
    rows = demo_rows(o)
    real = [read_frames(r.path, range(probe_video(r.path).frames)) for r in rows]
    scores, folder = judge_demo(videos, real, captions), o.out / "samples"
    words = f"result: step {steps}, {in_words(scores)}"
    write_strips([real[:SHOWN], videos[:SHOWN]], folder / "real_above_sampled_below", o.fps)
    if before:
        clips = {"samples": videos, "before": before, "real": real}
        blinking = {name: sum(map(judge.blinks, group)) / len(group) for name, group in clips.items()}
        scores.append({"score": "blinking"} | blinking | {"n": len(videos)})
        words += f", blinking {blinking['samples']:.0%} (before {blinking['before']:.0%}, real {blinking['real']:.0%})"
        strip = np.concatenate([np.concatenate(side[:8], axis=2) for side in (before, videos)], axis=1)
        write_video(strip, folder / "before_above_after_below", o.fps or 16, "gif")
    (folder / "scores.json").write_text(json.dumps(scores, indent=2))
    print(f"run folder  {o.out}\nloss curve  {o.out / 'loss.png'}\nsamples     {folder} (clips above, sampled below)")
    print(words, flush=True)
