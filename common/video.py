"""Videos and pictures as RGB frames: probes a file, reads frames by number or at a rate, resizes and crops them.

    info = probe_video("a.mp4")
    first_five = read_frames("a.mp4", range(5), fps=16)     # the frames shown at 0, 1/16, …, 4/16 s

Frame number n at a rate is the last one whose timestamp is at or before n / rate, counted from the first frame shown.
PyAV decodes to the same pixels on every host. OpenCV skips damaged frames, and decord returns wrong frames after a seek
into an open group of pictures; neither reports it. So decord reads only files that `decord_refusal` accepts.

Importing this module imports neither torch nor numpy nor a decoder: `--help` and bad input need none of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    """The number of `frames` that a decoder will show, their rate `fps` (0 for a still), and height and width as shown.

    `duration` (seconds) is given for a variable rate only; `fps` is then the mean rate. It is None for a constant rate,
    at which frame k is shown from k / fps to (k + 1) / fps.
    """

    frames: int
    fps: float
    height: int
    width: int
    duration: float | None = None


# ---- time ----


def frame_step(fps: float, train_fps: float | None) -> float:
    """Returns source frames per training frame: 1 for a still (fps 0), and for 23.976 and 24, to repeat no frame."""
    return 1.0 if not fps or train_fps is None or abs(fps - train_fps) < 0.1 else fps / train_fps


def resampled_length(video: Any, train_fps: float | None) -> int:
    """Returns how many frames a video has at `train_fps` (None: its own rate). video has the `frames`, `fps` and
    `duration` of `VideoInfo`. A rate below the training rate repeats frames."""
    if video.duration is None or train_fps is None:
        return math.ceil(video.frames / frame_step(video.fps, train_fps) - 1e-6)
    return math.ceil(video.duration * train_fps - 1e-6)


@dataclass(frozen=True)
class _Timeline:
    """`times` [n] of the frames in seconds since the first, and `fps` and `duration` as in `VideoInfo`."""

    times: np.ndarray
    fps: float
    duration: float | None

    @property
    def frames(self) -> int:
        return len(self.times)

    @classmethod
    def of(cls, times: np.ndarray, last: float, tick: float, rates: Iterable[Any] = ()) -> _Timeline:
        """Builds a timeline: of a constant rate if one fits the times, else of a variable rate.

        times: the file's timestamps, sorted, in seconds. last: seconds for which the last frame is shown, 0 if unknown.
        tick: the file's resolution of time in seconds. rates: those in its header, the likeliest first; None: no rate.

        Raises:
            ValueError: the file does not say how long its only frame is shown.
        """
        import numpy as np

        times, count = times - times[0], len(times)
        mean = (count - 1) / times[-1] if times[-1] > 0 else 0.0
        tolerance = ROUNDED + min(tick, ROUNDED)
        for rate in (float(rate) for rate in (*rates, mean) if rate):
            expected = np.arange(count) / rate  # at a constant rate, the file holds these times rounded
            if np.abs(times - expected).max() < tolerance and last < 1 / rate + 2 * tolerance:
                return cls(expected, rate, None)
        if not (last or mean):
            raise ValueError(f"{count} frames of unknown duration")
        duration = float(times[-1]) + (last or 1 / mean)
        return cls(times, count / duration, duration)

    def numbers(self, indices: np.ndarray, fps: float | None) -> np.ndarray:
        """Returns the frame numbers of indices that count at `fps`. ValueError: the video is shorter."""
        import numpy as np

        length = resampled_length(self, fps)
        if not len(indices) or indices.min() < 0 or indices.max() >= length:
            raise ValueError(f"frames {indices[:3].tolist()}… asked for, the file has {length}")
        if self.duration is None or fps is None:
            return (indices * frame_step(self.fps, fps) + 1e-6).astype(np.int64)
        return np.searchsorted(self.times, indices / fps + 1e-6, side="right") - 1


# ---- videos ----


def _open(path: str | Path, stored: bool = True) -> Any:
    """Opens a PyAV container. stored: use only the timestamps in the file. Otherwise FFmpeg invents presentation times
    for files that have none (.avi), and wrong ones if frames are reordered."""
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
    """The frames of a stream: frame k is shown from `times[k]` (ticks, sorted) on, the last for `last` (0: unknown).

    `labelled`: the timestamp of a decoded frame identifies it; otherwise only the order of frames does. `open_groups`:
    some frames that are shown before a keyframe stand behind it, so that a seek to the keyframe loses them.
    """

    times: list[int]
    last: int
    tick: float  # seconds
    labelled: bool
    open_groups: bool


def _shown(packets: Iterable[Any], tick: float) -> _Shown:
    """Returns the frames of a stream from its packets in file order. tick: seconds per tick of their times.

    Frames that come before the first keyframe, or whose time is before it, are never shown: a cut recording begins with
    frames whose references are lost.

    Raises:
        ValueError: there is no frame, or one has no timestamp.
    """
    spans, first, keyframe, labelled, open_groups = [], None, None, True, False
    for packet in packets:
        if not packet.size or packet.is_discard or (keyframe is None and not packet.is_keyframe):
            continue
        time = _time(packet)
        if time is None:
            raise ValueError("frames without timestamps")
        if packet.is_keyframe:
            keyframe = time
            first = time if first is None else first
        open_groups |= time < keyframe
        if time >= first:
            spans.append((time, packet.duration or 0))
            labelled &= packet.pts is not None
    if not spans:
        raise ValueError("no frames")
    spans.sort()
    times = [time for time, _ in spans]
    return _Shown(times, spans[-1][1], tick, labelled and len(set(times)) == len(times), open_groups)


def _whole(container: Any, stream: Any) -> Iterator[Any]:
    """Yields the stream's packets. ValueError at their end: the file, with all its streams, ends before it should."""
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
    """Returns what the `packets` of a container's stream say of its frames, without decoding."""
    import numpy as np

    def read(stored: bool) -> tuple[_Shown, _Timeline]:
        with _open(path, stored) as container:
            stream = _video_stream(container)
            tick = float(stream.time_base)
            shown = _shown(packets(container, stream), tick)
            rates = stream.guessed_rate, stream.average_rate  # the average counts the last frame's duration in
            return shown, _Timeline.of(np.array(shown.times) * tick, shown.last * tick, tick, rates)

    try:
        return read(stored=True)
    except ValueError:  # a program stream stores times of some frames only, from which FFmpeg derives the others
        shown, timeline = read(stored=False)
        return dataclasses.replace(shown, labelled=False), timeline


def _from_index(path: str | Path, container: Any, stream: Any, start: int | None) -> _Timeline | None:
    """Returns the timeline from the container's index, which has only decoding times, and the packets from the last
    keyframe on; None if the index lacks frames. start: when the first frame is shown."""
    import numpy as np

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
    times = np.append(times[:-1] - times[0], end - start)  # shown at the distances of decoding, after a delay
    rates = stream.guessed_rate, stream.average_rate
    return _Timeline.of(times * tick, last * tick, tick, rates)


def probe_video(path: str | Path) -> VideoInfo:
    """Returns the facts of a file, from the container's index and its first and last frames. Of a file without an index
    (mkv, webm, ts) it reads every packet and decodes the first. An animated picture is a video; a still has 1 frame.

    Raises:
        VideoError: the file is missing, not a video, or truncated. Damage in later frames shows when they are read.
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
    """Reads frames `indices` (any order, repeats allowed), counted at the rate `fps` (None: the file's own), as RGB
    uint8 [T, H, W, 3], upright.

    `transform` maps each [H, W, 3] frame when it is decoded, so that 81 frames of 4K (2 GB) never stand in memory.
    decoder: pyav, or decord for a file that `decord_refusal` accepts.

    Raises:
        VideoError: a requested frame cannot be decoded.
    """
    import numpy as np

    try:
        requested = np.asarray(indices, dtype=np.int64)
        if _is_picture(path):
            shown, timeline = None, _picture_timeline(path)
        else:
            shown, timeline = _demuxed(path, lambda container, stream: container.demux(stream))
        numbers, inverse = np.unique(timeline.numbers(requested, fps), return_inverse=True)
        if shown is None:
            source = _decode_picture(path, numbers.tolist())
        elif decoder == "decord":
            source = _decode_by_decord(path, numbers.tolist())
        else:
            source = _decode(path, shown, numbers.tolist())
        return np.stack([transform(frame) if transform else frame for frame in source])[inverse]
    except Exception as error:
        raise VideoError(path, f"{type(error).__name__}: {error}") from error


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Yields decoded frames from the next keyframe on."""
    for packet in itertools.dropwhile(lambda packet: packet.size and not packet.is_keyframe, container.demux(stream)):
        yield from stream.decode(packet)


def _decode(path: str | Path, shown: _Shown, numbers: list[int]) -> Iterator[np.ndarray]:
    """Yields the frames of a sorted list of numbers, the same as decoding from the start gives.

    The seek goes 16 frames further back: codecs reorder at most that many, and a seek to the keyframe of an open group
    loses the frames shown before it. In containers without an index (.ts) a seek may end behind the frame; it then goes
    back further, at last to the start. Where only the order identifies frames, decoding always begins at the start, at
    the cost of decoding all earlier frames.
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
                except av.FFmpegError:  # the seek ended inside a frame
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
    """Returns a decoded frame as RGB uint8 [H, W, 3], rotated and mirrored by its display matrix as FFmpeg does.

    Raises:
        ValueError: the matrix rotates by other than quarter turns.
    """
    import numpy as np

    # One thread: by default PyAV starts one per core for every frame, and such threads do not survive a fork.
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
    """Yields a file's PIL image at each of its pictures, and the seconds it is shown. A still has one picture."""
    from PIL import Image

    with Image.open(path) as image:
        count = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
        for number in range(int(count > 1 and image.info.get("default_image", False)), count):
            image.seek(number)
            image.load()
            seconds = image.info.get("duration", 0) / 1000
            yield image, seconds if seconds > 0.01 else 0.1  # as browsers do


def _rgb(image: Any) -> np.ndarray:
    """Returns a PIL image as RGB uint8 [H, W, 3], upright. Of 16 bits it keeps the high byte; the background of
    transparent pixels is white.

    Raises:
        ValueError: the image holds floating-point numbers.
    """
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL would make every value above 255 white
        return np.repeat((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("a picture of floating-point numbers; expected colours of 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _picture_timeline(path: str | Path) -> _Timeline:
    import numpy as np

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
    """Returns why decord must not read a file; None if it gives the same frames, timestamps, first and last picture as
    PyAV. Open groups of pictures and containers without an index are refused: decord returns wrong frames after a seek.

    Raises:
        VideoError: PyAV cannot read the file either.
    """
    import numpy as np

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
        expected = read_frames(path, [end])[0]
        if picture.shape != expected.shape or np.abs(picture.astype(int) - expected).max() > 2:
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
    """Scales frames to cover the size (area down, bicubic up), then centre-crops: uint8 [T, H, W, 3] -> [T, height,
    width, 3]."""
    import cv2
    import numpy as np

    cv2.setNumThreads(0)  # its thread pool does not survive the fork of a DataLoader worker
    old_height, old_width = frames.shape[1:3]
    scale = max(height / old_height, width / old_width)
    new_height, new_width = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    top, left = (new_height - height) // 2, (new_width - width) // 2
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    scaled = (cv2.resize(frame, (new_width, new_height), interpolation=interpolation) for frame in frames)
    return np.stack([frame[top : top + height, left : left + width] for frame in scaled])
