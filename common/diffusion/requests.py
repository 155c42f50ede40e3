"""Reads the requests to sample: prompts, their pictures for image-to-video, and the video of video-to-video.

A file of prompts (`--prompts`) holds one per line. For image-to-video a line is `picture<TAB>prompt`; for sizes with a
last frame it is `picture<TAB>last picture<TAB>prompt`. The file may also be a .jsonl (or a .json list) of rows, whose
other keys are ignored:

    {"prompt": "a cat jumps", "image": "cat.png"}      "image" where the size takes one, and "last_image" likewise

Paths are relative to the file's folder. A picture is a still, or a video of which the first frame is taken (the last
frame if it is a last picture). Importing this module imports neither torch nor numpy, because
requests are checked before they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.records import read_prompts
from common.video import VideoError, VideoInfo, probe_video, read_frames, resampled_length, resize_crop

from .buckets import Bucket

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Request:
    """One video to sample. `image` and `last_image` are set only if the size is conditioned on them."""

    prompt: str
    image: Path | None = None
    last_image: Path | None = None


def choose_requests(o, given_frames: int, task: str, default: list[Request]) -> list[Request]:
    """Returns the requests of --prompt, --prompts, --image, --last-image and --video-in; `default` if none is given.

    given_frames: pictures that the size takes: 0, 1, or 2 with a last one. task: what the size does, in words.

    Raises:
        ValueError: there is nothing to sample, options exclude each other, or the size takes other pictures.
    """
    image = o.video_in if o.image is None and given_frames == 1 and o.prompts is None else o.image
    given = [flag for flag, value in (("--image", image), ("--last-image", o.last_image)) if value is not None]
    expected = ["--image", "--last-image"][:given_frames]
    if o.prompt is not None and not o.prompt.strip():
        raise ValueError("--prompt is empty; expected what to show; fix: --prompt TEXT")
    if o.prompts is not None and o.prompt is not None:
        raise ValueError(f"--prompt and --prompts {o.prompts}; expected one of them; fix: leave out --prompt")
    if o.prompts is not None and given:
        raise ValueError(f"--prompts and {given[0]}; expected the pictures in the file's rows; fix: no {given[0]}")
    if o.prompts is not None:
        return read_requests(o.prompts, "--prompts", given_frames)
    if o.prompt is None and not given and default:
        return default
    if o.prompt is None:
        raise ValueError("nothing to sample; fix: --prompt TEXT or --prompts FILE")
    if given != expected:
        change = [f"give {flag}" for flag in expected if flag not in given]
        change += [f"leave out {flag}" for flag in given if flag not in expected]
        raise ValueError(
            f"{task} with {' and '.join(given) or 'no picture'}; expected "
            f"{' and '.join(expected) or 'no picture'}; fix: {', '.join(change)}, or another --size"
        )
    return [Request(o.prompt, image, o.last_image)]


def read_requests(path: Path, flag: str, given_frames: int = 0) -> list[Request]:
    """Returns the requests of a file whose rows hold `given_frames` pictures: 0, 1, or 2 with a last one.

    Raises:
        ValueError: the file is missing or has no row, or a row (named by its line) has another form.
    """
    keys, requests = ["image", "last_image"][:given_frames] + ["prompt"], []
    for where, row in read_prompts(path, flag):
        table = path.suffix in (".jsonl", ".json")
        cells = _cells(row, keys, where) if table else row["prompt"].split("\t", given_frames)
        cells = [cell.strip() for cell in cells]
        if len(cells) != len(keys) or not all(cells):
            form = "\t".join(["PICTURE", "LAST PICTURE"][:given_frames] + ["PROMPT"])
            raise ValueError(f"{where}: {row['prompt'][:60]!r}; expected {form!r}, tabs between; fix: {path}")
        requests.append(Request(cells[-1], *(path.parent / cell for cell in cells[:-1])))
    return requests


def _cells(row: dict, keys: list[str], where: str) -> list[str]:
    """Returns the texts under `keys`. Raises ValueError if one is missing or empty, or a picture is not taken."""
    bad = [key for key in keys if not isinstance(row.get(key), str) or not row[key].strip()]
    bad += [key for key in ("image", "last_image") if key not in keys and row.get(key)]
    if bad:
        raise ValueError(f"{where}: {bad[0]} is {row.get(bad[0])!r}; expected texts {', '.join(keys)}; fix: {where}")
    return [row[key].encode(errors="replace").decode() for key in keys]  # a tokenizer fails on lone surrogates


def check_requests(requests: list[Request], bucket: Bucket, fit: str) -> None:
    """Raises ValueError if a picture is missing or broken, or if `fit` does not allow it in the video's shape."""
    for path in (p for request in requests for p in (request.image, request.last_image) if p is not None):
        _probe(path, bucket, fit, "--image, or its row in --prompts")


def check_clip(path: Path, bucket: Bucket, fps: float, fit: str) -> None:
    """Raises ValueError if a video to start from does not fit the shape, or is too short at `fps`."""
    info = _probe(path, bucket, fit, "--video-in")
    length = resampled_length(info, fps or None)
    if length < bucket.frames:
        raise ValueError(
            f"--video-in {path}: {length} frames at {fps or info.fps:g} fps ({info.frames} at {info.fps:g}); expected "
            f"{bucket.frames}; fix: --video, --fps or --video-in"
        )


def _probe(path: Path, bucket: Bucket, fit: str, flags: str) -> VideoInfo:
    """Returns the measurements of a still or video.

    Raises:
        ValueError: it is missing or broken or, with fit "exact", a pixel or more off the bucket's aspect.
    """
    try:
        info = probe_video(path)
    except VideoError as error:
        raise ValueError(f"cannot read {error}; expected a picture or video; fix: {flags}") from None
    height, width = info.height * bucket.width / info.width, info.width * bucket.height / info.height
    if fit == "exact" and min(abs(height - bucket.height), abs(width - bucket.width)) >= 1:
        raise ValueError(
            f"{path} is {info.width}x{info.height} (aspect {info.width / info.height:.3f}), the video "
            f"{bucket.width}x{bucket.height} ({bucket.width / bucket.height:.3f}); expected the same aspect; "
            "fix: --fit crop, --fit pad, or --video FRAMESxHEIGHTxWIDTH of that aspect"
        )
    return info


def read_clip(path: Path, bucket: Bucket, fps: float, fit: str) -> np.ndarray:
    """Reads the first frames of a video, at `fps` (0: its own), as uint8 [F, H, W, 3] of the bucket."""
    return read_frames(path, range(bucket.frames), lambda image: fit_image(image, bucket, fit), fps or None)


def read_frame(path: Path, index: int, bucket: Bucket, fit: str) -> np.ndarray:
    """Reads frame `index` (0: the first, -1: the last) of a still or a video as uint8 [H, W, 3] of the bucket."""
    return fit_image(read_frames(path, [index % probe_video(path).frames])[0], bucket, fit)


def fit_image(image: np.ndarray, bucket: Bucket, fit: str) -> np.ndarray:
    """Brings an image uint8 [h, w, 3] to [H, W, 3] of the bucket. fit "crop" scales it to cover the bucket and cuts it.
    "pad" scales it to fit inside, with black around. "exact" only scales it, as it has the bucket's aspect."""
    import numpy as np

    if fit == "pad":
        scale = min(bucket.height / image.shape[0], bucket.width / image.shape[1])
        inside = [max(1, round(side * scale)) for side in image.shape[:2]]
        image = resize_crop(image[None], *inside)[0]
        top, left = (bucket.height - inside[0]) // 2, (bucket.width - inside[1]) // 2
        whole = np.zeros((bucket.height, bucket.width, 3), np.uint8)
        whole[top : top + inside[0], left : left + inside[1]] = image
        return whole
    return resize_crop(image[None], bucket.height, bucket.width)[0]


def read_given_frames(requests: list[Request], bucket: Bucket, fit: str) -> np.ndarray:
    """Reads the pictures of requests as uint8 [B, n, H, W, 3], where n = 1, or 2 with last pictures."""
    import numpy as np

    return np.stack(
        [
            np.stack([read_frame(path, i, bucket, fit) for path, i in ((r.image, 0), (r.last_image, -1)) if path])
            for r in requests
        ]
    )
