"""Videos and pictures as RGB frames: what a file is, its frames by their number or at a rate, resize and crop.

    info = probe_video("a.mp4")
    first_five = read_frames("a.mp4", range(5), fps=16)     # what is to be seen at 0, 1/16, …, 4/16 s

Frame number n at a rate is the last one whose timestamp is at or before n / rate, counted from the first frame shown.
PyAV decodes, on every host the same pixels: OpenCV skips damaged frames, and decord returns wrong ones after a seek into
an open group of pictures; neither says so. decord is therefore only let to files that `decord_refusal` passes.

Importing this module imports neither torch nor a decoder.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PICTURE_SUFFIXES = {".png", ".apng", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}
ANIMATED = {"GIF", "PNG", "WEBP"}  # formats in which several pictures are a video; in others (MPO) they are versions
ROUNDED = 1e-3  # s; Matroska, FLV and much recording software round timestamps to milliseconds


class VideoError(Exception):
    """A file that cannot be decoded in full: missing, corrupt, truncated, or without a video stream."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)  # both in args, so that it survives pickling between processes
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class VideoInfo:
    """`frames` that a decoder will show, their rate (0 for a still), height and width as they are to be shown.

    `duration` in seconds is that of a variable rate, of which `fps` is the mean. It is None where the rate is constant:
    frame k is then shown from k / fps to (k + 1) / fps.
    """

    frames: int
    fps: float
    height: int
    width: int
    duration: float | None = None


# ---- time ----


def frame_step(fps: float, train_fps: float | None) -> float:
    """Source frames per training frame; 1 for a still (fps 0), and for 23.976 and 24, lest a frame be shown twice."""
    return 1.0 if not fps or train_fps is None or abs(fps - train_fps) < 0.1 else fps / train_fps


def resampled_length(video: Any, train_fps: float | None) -> int:
    """How many frames at `train_fps` (None: its own) a video has, given its `frames`, `fps` and `duration` (`VideoInfo`); a
    rate below the training rate repeats frames."""
    if video.duration is None or train_fps is None:
        return math.ceil(video.frames / frame_step(video.fps, train_fps) - 1e-6)
    return math.ceil(video.duration * train_fps - 1e-6)


@dataclass(frozen=True)
class _Timeline:
    """`times` [n] of the frames in seconds since the first, and what `VideoInfo` has of them."""

    times: np.ndarray
    fps: float
    duration: float | None

    @property
    def frames(self) -> int:
        return len(self.times)

    @classmethod
    def of(cls, times: np.ndarray, last: float, tick: float, rates: Iterable[Any] = ()) -> _Timeline:
        """times: sorted, in seconds, as the file has them; last: seconds that the last frame is shown, 0 if unknown; tick:
        seconds to which the file is exact; rates: those its header names, the likeliest first, None for no rate.

        Raises:
            ValueError: the file does not say how long its only frame is shown.
        """
        times, count = times - times[0], len(times)
        mean = (count - 1) / times[-1] if times[-1] > 0 else 0.0
        exact = ROUNDED + min(tick, ROUNDED)
        for rate in (float(rate) for rate in (*rates, mean) if rate):
            meant = np.arange(count) / rate  # of a constant rate the file has these, rounded
            if np.abs(times - meant).max() < exact and last < 1 / rate + 2 * exact:
                return cls(meant, rate, None)
        if not (last or mean):
            raise ValueError(f"{count} frames of unknown duration")
        duration = float(times[-1]) + (last or 1 / mean)
        return cls(times, count / duration, duration)

    def numbers(self, indices: np.ndarray, fps: float | None) -> np.ndarray:
        """Frame numbers of the indices, counted at `fps`. ValueError: the video is shorter."""
        length = resampled_length(self, fps)
        if not len(indices) or indices.min() < 0 or indices.max() >= length:
            raise ValueError(f"frames {indices[:3].tolist()}… asked for, the file has {length}")
        if self.duration is None or fps is None:
            return (indices * frame_step(self.fps, fps) + 1e-6).astype(np.int64)
        return np.searchsorted(self.times, indices / fps + 1e-6, side="right") - 1


# ---- videos ----


def _open(path: str | Path, stored: bool = True) -> Any:
    """A PyAV container. stored: with the timestamps that are in the file and no others. FFmpeg invents presentation
    times for files that have none (.avi), and where frames are reordered wrong ones."""
    import av

    return av.open(str(path), options={"fflags": "nofillin"} if stored else {})


def _video_stream(container: Any) -> Any:
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        raise ValueError("no video stream" if stream is None else "no decoder for its video")
    stream.codec_context.thread_count = 1  # DataLoader workers are the parallelism
    return stream


def _time(packet: Any) -> int | None:
    return packet.dts if packet.pts is None else packet.pts


@dataclass(frozen=True)
class _Shown:
    """The frames of a stream: number k is shown from `times[k]` (ticks, sorted) on, the last one for `last` (0: unknown).

    `labelled`: a decoded frame says which it is; else they only come in this order. `open_groups`: some that are shown
    before a keyframe stand behind it, so that a seek to it loses them.
    """

    times: list[int]
    last: int
    tick: float  # seconds
    labelled: bool
    open_groups: bool


def _shown(packets: Iterable[Any], tick: float) -> _Shown:
    """Of a stream's packets, in their order, with times in ticks of so many seconds. Those that come or are to be shown before the first keyframe never are: a
    cut recording begins with frames whose references are lost.

    Raises:
        ValueError: there is no frame, or one has no timestamp.
    """
    found, first, key, labelled, open_groups = [], None, None, True, False
    for packet in packets:
        if not packet.size or packet.is_discard or (key is None and not packet.is_keyframe):
            continue
        time = _time(packet)
        if time is None:
            raise ValueError("frames without timestamps")
        if packet.is_keyframe:
            key = time
            first = time if first is None else first
        open_groups |= time < key
        if time >= first:
            found.append((time, packet.duration or 0))
            labelled &= packet.pts is not None
    if not found:
        raise ValueError("no frames")
    found.sort()
    times = [time for time, _ in found]
    return _Shown(times, found[-1][1], tick, labelled and len(set(times)) == len(times), open_groups)


def _whole(container: Any, stream: Any) -> Iterator[Any]:
    """The stream's packets; ValueError at their end if the file, with all its streams, ends before it should."""
    end = 0.0
    for packet in container.demux():
        if packet.size and _time(packet) is not None:
            end = max(end, float((_time(packet) + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index:
            yield packet
    declared = (container.duration or 0) / 1e6
    if end < declared - max(1.0, 0.05 * declared):
        raise ValueError(f"truncated: {end:.1f} s of the declared {declared:.1f} s")


def _demuxed(path: str | Path, packets: Callable[[Any, Any], Iterable[Any]]) -> tuple[_Shown, _Timeline]:
    """What the `packets` of a container's stream say of its frames, none of them decoded."""

    def read(stored: bool) -> tuple[_Shown, _Timeline]:
        with _open(path, stored) as container:
            stream = _video_stream(container)
            tick = float(stream.time_base)
            shown = _shown(packets(container, stream), tick)
            rates = stream.guessed_rate, stream.average_rate  # which counts the duration of the last frame in
            return shown, _Timeline.of(np.array(shown.times) * tick, shown.last * tick, tick, rates)

    try:
        return read(stored=True)
    except ValueError:  # a program stream has times for some frames alone, and FFmpeg counts on from those
        shown, timeline = read(stored=False)
        return dataclasses.replace(shown, labelled=False), timeline


def _from_index(path: str | Path, container: Any, stream: Any, start: int | None) -> _Timeline | None:
    """The timeline by the container's index, which has decoding times alone, and the packets from the last keyframe on;
    None if it has no index of all frames. start: when the first frame is shown."""
    entries = list(stream.index_entries)
    if not stream.frames or len(entries) != stream.frames:
        return None
    needed, size = max(e.pos + e.size for e in entries), os.path.getsize(path)
    if needed > size:
        raise ValueError(f"truncated: {size} bytes, its index needs {needed}")
    times = np.array([e.timestamp for e in entries if not e.is_discard])
    start = times[0] if start is None else start
    container.seek(entries[-1].timestamp, stream=stream)
    tick = float(stream.time_base)
    tail = [(_time(p), p.duration or 0) for p in container.demux(stream) if p.size and not p.is_discard]
    end, last = max(tail)
    times = np.append(times[:-1] - times[0], end - start)  # shown at the same distances, but for the delay
    rates = stream.guessed_rate, stream.average_rate
    return _Timeline.of(times * tick, last * tick, tick, rates)


def probe_video(path: str | Path) -> VideoInfo:
    """What a file is, from the container's index and its first and last frames; of a file without an index (mkv, webm, ts)
    every packet is read, and none but the first decoded. An animated picture is a video; a still has 1 frame.

    Raises:
        VideoError: missing, not a video, or truncated. Damage inside later frames shows only when they are read.
    """
    try:
        if _is_picture(path):
            return _probe_picture(path)
        with _open(path) as container:
            stream = _video_stream(container)
            first = next(_frames(container, stream))
            height, width, _ = _upright(first).shape
            timeline = _from_index(path, container, stream, first.pts) or _demuxed(path, _whole)[1]
            return VideoInfo(timeline.frames, timeline.fps, height, width, timeline.duration)
    except Exception as error:  # PyAV raises its own errors, OSError, IndexError, StopIteration
        raise VideoError(path, f"{type(error).__name__}: {error}") from error


def read_frames(
    path: str | Path,
    indices: Sequence[int],
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    fps: float | None = None,
    decoder: str = "pyav",
) -> np.ndarray:
    """Frames `indices` (any order, repeats allowed), counted at the rate `fps` (None: the file's own), as RGB uint8
    [T, H, W, 3], upright.

    `transform` maps each [H, W, 3] frame as it is decoded, so that 81 frames of 4K (2 GB) never stand in memory.
    decoder: pyav, or decord for a file that `decord_refusal` passes.

    Raises:
        VideoError: not every frame asked for can be decoded.
    """
    try:
        asked = np.asarray(indices, dtype=np.int64)
        if _is_picture(path):
            shown, timeline = None, _picture_timeline(path)
        else:
            shown, timeline = _demuxed(path, lambda container, stream: container.demux(stream))
        numbers, places = np.unique(timeline.numbers(asked, fps), return_inverse=True)
        if shown is None:
            source = _decode_picture(path, numbers.tolist())
        elif decoder == "decord":
            source = _decode_by_decord(path, numbers.tolist())
        else:
            source = _decode(path, shown, numbers.tolist())
        return np.stack([transform(frame) if transform else frame for frame in source])[places]
    except Exception as error:
        raise VideoError(path, f"{type(error).__name__}: {error}") from error


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames from the next keyframe on."""
    for packet in itertools.dropwhile(lambda packet: packet.size and not packet.is_keyframe, container.demux(stream)):
        yield from stream.decode(packet)


def _decode(path: str | Path, shown: _Shown, numbers: list[int]) -> Iterator[np.ndarray]:
    """The frames of a sorted list of numbers, the same as decoding from the start gives.

    16 frames early is the most that codecs reorder; frames leading the keyframe of an open group are lost by a seek. Some
    containers (.ts) have no index, and a seek leads behind the frame: then earlier, at last from the start. So it is too
    where frames are known by their order alone, at the cost of decoding all before them.
    """
    import av

    starts = [numbers[0] - early for early in (16, 256) if shown.labelled and numbers[0] > early]
    for start in (*starts, 0):
        with _open(path) as container:
            stream = _video_stream(container)
            frames = _frames(container, stream)
            if start:
                try:
                    container.seek(shown.times[start], stream=stream)
                    first = next(frames, None)
                except av.FFmpegError:  # the seek led into the midst of a frame
                    continue
                if first is None or first.pts > shown.times[numbers[0]]:
                    continue
                frames = itertools.chain([first], frames)
            timed = ((f.pts, f) for f in frames) if shown.labelled else zip(shown.times, frames, strict=False)
            for number in numbers:
                time, frame = next(((t, f) for t, f in timed if t >= shown.times[number]), (None, None))
                if time != shown.times[number] or frame.is_corrupt:
                    raise ValueError(f"frame {number} is damaged or missing")
                yield _upright(frame)
            return


def _upright(frame: Any) -> np.ndarray:
    """A decoded frame as RGB uint8 [H, W, 3], turned and mirrored by its display matrix as FFmpeg does.

    Raises:
        ValueError: the matrix turns by something else than quarters.
    """
    # One thread: PyAV's default is one for every core, made anew for every frame, and such threads survive no fork.
    image, matrix = frame.to_ndarray(format="rgb24", threads=1), frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    # The pixel (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(float)
    if max(abs(b), abs(c)) < min(abs(a), abs(d)) / 50:
        columns, rows = a, d
    elif max(abs(a), abs(d)) < min(abs(b), abs(c)) / 50:
        image, columns, rows = image.swapaxes(0, 1), c, b
    else:
        raise ValueError(f"turned by {frame.rotation} degrees; expected quarters of a turn")
    return np.ascontiguousarray(image[:: 1 if rows > 0 else -1, :: 1 if columns > 0 else -1])


# ---- pictures ----


def _is_picture(path: str | Path) -> bool:
    return Path(path).suffix.lower() in PICTURE_SUFFIXES


def _pictures(path: str | Path) -> Iterator[tuple[Any, float]]:
    """A file's PIL image at each of its pictures, and the seconds it is shown; one, of a still."""
    from PIL import Image

    with Image.open(path) as image:
        count = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
        for number in range(int(count > 1 and image.info.get("default_image", False)), count):
            image.seek(number)
            image.load()
            seconds = image.info.get("duration", 0) / 1000
            yield image, seconds if seconds > 0.01 else 0.1  # as browsers do


def _rgb(image: Any) -> np.ndarray:
    """RGB uint8 [H, W, 3] of a PIL image, upright: of 16 bits the high byte; what is transparent shows white.

    Raises:
        ValueError: its numbers are no colours.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # of which PIL would make white all that is above 255
        return np.repeat((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("a picture of floating-point numbers; expected colours of 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _picture_timeline(path: str | Path) -> _Timeline:
    seconds = [seconds for _, seconds in _pictures(path)]
    if len(seconds) == 1:
        return _Timeline(np.zeros(1), 0.0, None)
    return _Timeline.of(np.cumsum([0.0, *seconds[:-1]]), seconds[-1], 0.0)


def _probe_picture(path: str | Path) -> VideoInfo:
    timeline, first = _picture_timeline(path), next(_decode_picture(path, [0]))
    return VideoInfo(timeline.frames, timeline.fps, *first.shape[:2], timeline.duration)


def _decode_picture(path: str | Path, numbers: list[int]) -> Iterator[np.ndarray]:
    yield from (_rgb(image) for number, (image, _) in enumerate(_pictures(path)) if number in set(numbers))


# ---- decord ----


def decord_refusal(path: str | Path) -> str | None:
    """Why decord is not to read a file; None if it has the frames, timestamps, first and last picture that PyAV has. After
    a seek it returns wrong frames of open groups of pictures and of containers without an index, which are refused.

    Raises:
        VideoError: PyAV cannot read it either.
    """
    if _is_picture(path):
        return "a picture"
    try:
        with _open(path) as container:
            if container.format.name.split(",")[0] not in ("mov", "matroska"):
                return "another container than mp4, mov, mkv, webm"
        shown = _demuxed(path, lambda container, stream: container.demux(stream))[0]
    except Exception as error:
        raise VideoError(path, f"{type(error).__name__}: {error}") from error
    if shown.open_groups:
        return "open groups of pictures"
    if not shown.labelled:
        return "no presentation times"
    ends = [len(shown.times) - 1, 0]
    try:
        reader = _decord_reader(path)
        times = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        pictures = [reader[i].asnumpy() for i in ends] if len(reader) == len(shown.times) else []
    except Exception as error:
        return f"not opened ({str(error).splitlines()[0][:60]})"
    if not pictures:
        return "another number of frames"
    if np.abs(times - (np.array(shown.times) - shown.times[0]) * shown.tick).max() > ROUNDED:
        return "other timestamps"
    for picture, end in zip(pictures, ends, strict=True):
        true = read_frames(path, [end])[0]
        if picture.shape != true.shape or np.abs(picture.astype(int) - true).max() > 2:
            return "another first or last picture"
    return None


def _decord_reader(path: str | Path) -> Any:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)


def _decode_by_decord(path: str | Path, numbers: list[int]) -> Iterator[np.ndarray]:
    reader = _decord_reader(path)
    yield from (reader[number].asnumpy() for number in numbers)


# ---- shape ----


def resize_crop(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [T, H, W, 3] -> [T, height, width, 3]: scaled to cover (area down, bicubic up), then centre-cropped."""
    import cv2

    cv2.setNumThreads(0)  # its thread pool does not survive the fork of a DataLoader worker
    old_height, old_width = frames.shape[1:3]
    scale = max(height / old_height, width / old_width)
    new_height, new_width = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    top, left = (new_height - height) // 2, (new_width - width) // 2
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    scaled = (cv2.resize(frame, (new_width, new_height), interpolation=how) for frame in frames)
    return np.stack([frame[top : top + height, left : left + width] for frame in scaled])
