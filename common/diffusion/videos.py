"""Writes video files that say how they were made, so that an interrupted list of prompts continues where it stopped."""

import dataclasses
import json
from pathlib import Path

import av
import numpy as np
from PIL import Image

from common import weights

from .requests import Request

SPEED = ("cfg_parallel", "vae_parallel", "compile", "cpu_offload")  # options that change the pixels by rounding only
_FREE = {*SPEED, "out", "format", "prompts", "task", "prompt", "image", "last_image"}  # `describe` leaves these out


def write_video(frames: np.ndarray, stem: Path, fps: float, kind: str, made: dict | None = None) -> list[Path]:
    """Writes uint8 [F, H, W, 3] to stem.mp4 (H.264), stem.gif or both. `made` becomes the comment in their metadata, as
    JSON. A file appears under its name only when it is complete."""
    written, comment = [], json.dumps(made or {}, ensure_ascii=False, sort_keys=True)
    if kind in ("mp4", "both"):
        partial = stem.with_suffix(".part.mp4")
        with av.open(str(partial), "w") as file:
            file.metadata["comment"] = comment
            stream = file.add_stream("libx264", rate=max(1, round(fps)), options={"crf": "12"})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode())
        written.append(partial.rename(stem.with_suffix(".mp4")))
    if kind in ("gif", "both"):
        partial = stem.with_suffix(".part.gif")
        first, *rest = [Image.fromarray(frame) for frame in frames]
        first.save(
            partial, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, comment=comment.encode()
        )
        written.append(partial.rename(stem.with_suffix(".gif")))
    return written


def write_strips(sides: list[list[np.ndarray]], stem: Path, fps: float) -> None:
    """Writes a GIF of rows of videos, one row below another. Videos are uint8 [F, H, W, 3] and all of one shape."""
    strips = [np.concatenate(side, axis=2) for side in sides]  # [F, H, n * W, 3]
    stride = max(1, strips[0].shape[1] // 128)
    write_video(np.concatenate(strips, axis=1)[:, ::stride, ::stride], stem, fps or 16, "gif")


def read_metadata(path: Path) -> dict | None:
    """Returns what `write_video` put into a file's metadata, or None if it is not there or the file cannot be read."""
    try:
        if path.suffix == ".mp4":
            with av.open(str(path)) as file:
                comment = file.metadata["comment"]
        else:
            with Image.open(path) as image:
                comment = image.info["comment"].decode()
        return json.loads(comment)
    except (OSError, KeyError, ValueError):  # av's errors are OSErrors or ValueErrors
        return None


def is_written(stem: Path, kind: str, made: dict) -> bool:
    """Returns whether all files that `write_video` would write are there, made in this way.

    Raises:
        ValueError: a file was made in another way; the message names it and what differs.
    """
    suffixes = {"both": (".mp4", ".gif")}.get(kind, (f".{kind}",))
    present = [path for path in map(stem.with_suffix, suffixes) if path.exists()]
    wanted = json.loads(json.dumps(made))
    for path in present:
        saved = read_metadata(path)
        if saved != wanted:
            keys = sorted(set(saved) | set(wanted)) if saved else []
            changes = [f"{k} {saved.get(k)!r}, now {wanted.get(k)!r}" for k in keys if saved.get(k) != wanted.get(k)]
            raise ValueError(
                f"{path} was made in another way ({'; '.join(changes) or 'it does not say how'}); expected a folder of "
                "this run's videos or an empty one; fix: --out"
            )
    return len(present) == len(suffixes)


def describe(o) -> dict:
    """Returns what the pixels of a run's videos depend on: every option but those of layout, speed and files, and the
    content of the weights, which their path alone does not identify."""
    groups = {f.name: f.metadata["group"] for f in dataclasses.fields(o)}
    names = [n for n, group in groups.items() if group in ("model", "job", "acceleration") and n not in _FREE]
    values = {n: getattr(o, n) for n in [*names, "precision"]}
    folder = o.checkpoint or o.weights
    marker = next((folder / n for n in ("manifest.json", "latest") if (folder / n).is_file()), None)  # if sharded
    part = folder / "transformer" if (folder / "transformer").is_dir() else folder
    values["content"] = str(marker.stat().st_mtime_ns) if marker else weights.fingerprint(part)
    if o.adapter:
        values["adapter_content"] = weights.fingerprint(o.adapter)
    return values


def describe_request(values: dict, i: int, request: Request) -> dict:
    """Returns `describe`'s values with those of request number i, in a form for JSON."""
    values = values | dataclasses.asdict(request) | {"seed": values["seed"] + i}
    return {n: str(v) if isinstance(v, Path) else v for n, v in values.items() if v is not None}


def list_missing(o, requests: list[Request]) -> list[int]:
    """Returns the indices of the requests whose videos are not in --out yet. Raises ValueError if one differs."""
    stems, values = [o.out / f"{i:04d}" for i in range(len(requests))], describe(o)
    return [i for i, r in enumerate(requests) if not is_written(stems[i], o.format, describe_request(values, i, r))]
