"""Does a clip show what its caption says? The digit by a classifier trained on real scans, the direction by centroids.

    python -m zoo.wan21.demo.judge DATA [--split test] [--weights zoo/wan21/demo/weights]

scores real clips of a `make_data` folder and, with `--weights`, the same clips after the VAE. The classifier (a support
vector machine, fitted in seconds) is trained only on train scans, rendered as in the clips. Test clips show other
scans. A frame counts if its ink is one blob of a digit's size. If half of its frames do not count, a clip has no digit
and no direction. So blank and noise clips are wrong on both.
Shapes: T frames, H height, W width.
"""

import argparse
import json
from functools import cache
from pathlib import Path

import av
import cv2
import numpy as np

from . import make_data

WINDOW = 28  # pixels, side of the square around the centroid that must hold the ink
FEATURE = 14  # side of the window after downscaling, for the classifier
INK_FLOOR = 0.15  # fainter pixels are background
FAINT = 0.25  # a clip blinks if its ink falls below this share of that at its ends
MIN_MOVE = make_data.TRAVEL / 3  # pixels; a smaller move has no direction


def parse_caption(text: str) -> tuple[str, str]:
    """Parses a caption: "a handwritten three moves to the left" -> ("three", "to the left"). ValueError: it is none."""
    subject, _, direction = text.strip().partition(" moves ")
    digit = subject.rpartition(" ")[2]
    if digit not in make_data.DIGITS or direction not in make_data.DIRECTIONS:
        raise ValueError(f"caption {text!r} names no digit and direction; expected e.g. {make_data.caption(3, 'up')!r}")
    return digit, direction


def look(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns centroid (x, y) and feature (FEATURE^2,) of a frame (H, W), grey in 0..1. None: it has no single blob."""
    ink = np.where(frame > INK_FLOOR, frame, 0.0).astype(np.float32)
    total = ink.sum()
    if not 20 < total < 250:  # ink in units of a white pixel; rendered scans have 78 to 171
        return None
    y, x = (float((ink.sum(axis) * np.arange(ink.shape[1 - axis])).sum() / total) for axis in (1, 0))
    to_window = np.array([[1, 0, (WINDOW - 1) / 2 - x], [0, 1, (WINDOW - 1) / 2 - y]])
    window = cv2.warpAffine(ink, to_window, (WINDOW, WINDOW))
    if window.sum() < 0.8 * total:
        return None
    return np.array([x, y]), cv2.resize(window, (FEATURE, FEATURE), interpolation=cv2.INTER_AREA).ravel()


@cache
def classifier():
    """Fits scikit-learn's support vector machine on train scans at random sub-pixel places, three frames per scan: as
    rendered, blurred, and blurred with noise."""
    from sklearn.svm import SVC  # here, because training always imports this module

    images, labels = make_data.digit_images(train=True)
    rng = np.random.default_rng(0)
    features, targets = [], []
    for image, label in zip(images, labels, strict=True):
        centers = (make_data.SIZE - 1) / 2 + rng.uniform(-2, 2, (3, 2))
        frames = make_data.render(image, centers).astype(np.float32) / 255
        frames[1] = cv2.GaussianBlur(frames[1], (0, 0), 1.0)
        frames[2] = cv2.GaussianBlur(frames[2], (0, 0), 0.7) + rng.normal(0, 0.04, frames[2].shape)
        for frame in frames:
            centroid_and_feature = look(frame)
            assert centroid_and_feature is not None
            features.append(centroid_and_feature[1])
            targets.append(label)
    return SVC(C=10.0, gamma="scale").fit(np.array(features), np.array(targets))


def judge(video: np.ndarray) -> tuple[str, str]:
    """Judges a clip (T, H, W, 3) uint8. Returns (digit word, direction phrase); each may be "none"."""
    grey = video.astype(np.float32).mean(-1) / 255
    looks = [look(frame) for frame in grey]
    valid = [s for s in looks if s is not None]
    edge = max(1, len(looks) // 4)
    first, last = ([s[0] for s in part if s is not None] for part in (looks[:edge], looks[-edge:]))
    if 2 * len(valid) <= len(looks) or not first or not last:
        return "none", "none"
    votes = classifier().decision_function(np.array([feature for _, feature in valid])).mean(0)
    move = np.mean(last, axis=0) - np.mean(first, axis=0)
    phrases, steps = list(make_data.DIRECTIONS), np.array(list(make_data.DIRECTIONS.values()))
    direction = phrases[int(np.argmax(steps @ move))] if np.linalg.norm(move) >= MIN_MOVE else "none"
    return make_data.DIGITS[int(votes.argmax())], direction


def blinks(video: np.ndarray) -> bool:
    """Whether a clip (T, H, W, 3) uint8 is (nearly) black somewhere in the middle, and not at its ends."""
    grey = video.astype(np.float32).mean(-1) / 255
    ink = np.where(grey > INK_FLOOR, grey, 0.0).sum((1, 2))  # (T,)
    edge = max(1, len(ink) // 4)
    return bool(ink[edge:-edge].min() < FAINT * min(ink[:edge].mean(), ink[-edge:].mean()))


def score(videos: list[np.ndarray], captions: list[str]) -> dict[str, float | int]:
    """Returns the fractions of `videos`, each (T, H, W, 3) uint8, that show the digit of their caption, its direction,
    and both. Chance: 0.1, 0.125 and 0.0125."""
    if len(videos) != len(captions) or not videos:
        raise ValueError(f"{len(videos)} videos and {len(captions)} captions; expected as many, at least one")
    hits = np.array([np.equal(judge(v), parse_caption(c)) for v, c in zip(videos, captions, strict=True)])
    digit, direction = hits.mean(0)
    return {"digit": float(digit), "direction": float(direction), "both": float(hits.all(1).mean()), "n": len(hits)}


def read_mp4(path: Path) -> np.ndarray:
    """Returns a clip (T, H, W, 3) uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)])


def read_clips(data: Path, split: str) -> tuple[list[np.ndarray], list[str]]:
    rows = [json.loads(line) for line in (Path(data) / f"{split}.jsonl").read_text().splitlines()]
    return [read_mp4(Path(data) / row["path"]) for row in rows], [row["caption"] for row in rows]


def reconstruction(videos: list[np.ndarray], weights: Path) -> list[np.ndarray]:
    """Encodes (posterior mode) and decodes videos of one shape with the VAE of a weights folder."""
    import torch  # here, because scoring needs no torch
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(weights, subfolder="vae", torch_dtype=torch.float32).eval()
    pixels = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1  # (N, 3, T, H, W)
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in pixels.split(16)])
    return list(((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder written by make_data")
    parser.add_argument("--split", default="test", choices=("train", "test"))
    parser.add_argument("--weights", type=Path, help="also score the clips after this folder's VAE")
    args = parser.parse_args()
    videos, captions = read_clips(args.data, args.split)
    print("real clips", score(videos, captions))
    if args.weights:
        print("after the VAE", score(reconstruction(videos, args.weights), captions))


if __name__ == "__main__":
    main()
