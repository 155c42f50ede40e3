"""Makes test videos, and damages them. Every frame shows its own number, so a reader can be checked frame by frame."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH = 64, 96
MS = Fraction(1, 1000)
CASES = Path(__file__).parent / "cases" / "wan21"  # files that are easy to read wrongly


def draw(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Draws a frame. Top half: the number as 8 binary blocks, lowest bit left. Bottom half: red left, blue right."""
    frame = np.full((height, width, 3), 30, np.uint8)
    for bit in range(8):
        if number >> bit & 1:
            frame[: height // 2, bit * width // 8 : (bit + 1) * width // 8] = 225
    frame[height // 2 :, : width // 2] = (220, 20, 20)
    frame[height // 2 :, width // 2 :] = (20, 20, 220)
    return frame


def numbers(frames: np.ndarray) -> list[int]:
    """Reads the numbers back from [T, H, W, 3]; asserts that the frames are upright, unmirrored RGB."""
    height, width = frames.shape[1:3]
    below = frames[:, height * 3 // 4]
    assert (below[:, width // 4, 0] > 150).all(), "red is not at the bottom left"
    assert (below[:, width * 3 // 4, 2] > 150).all(), "blue is not at the bottom right"
    blocks = frames[:, height // 4, [int((bit + 0.5) * width / 8) for bit in range(8)], 0] > 128
    return [int(sum(1 << bit for bit in range(8) if row[bit])) for row in blocks]


def clip(
    path: Path,
    frames=60,
    fps=24,
    codec="libx264",
    quarter_turns=0,
    gop=24,
    faststart=False,
    size=(HEIGHT, WIDTH),
    mirrored=False,
):
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        options = {"x265-params": "log-level=none:open-gop=1"} if codec == "libx265" else {}
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = np.rot90(np.empty(size), quarter_turns).shape
        stream.pix_fmt, stream.gop_size = "yuv420p", gop
        if quarter_turns or mirrored:
            stream.set_display_rotation(-90 * quarter_turns, hflip=mirrored)
        for number in range(frames):
            shown = draw(number, *size)[:, :: -1 if mirrored else 1]
            image = np.ascontiguousarray(np.rot90(shown, quarter_turns))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def damage(path: Path, kind: str, source: Path) -> Path:
    whole = source.read_bytes()
    body = whole.index(b"mdat") + 4
    flipped = bytearray(whole)
    for place in np.random.default_rng(0).integers((body + len(whole)) // 2, len(whole), 400):  # past the first frames
        flipped[place] ^= 0xFF
    zeroed = whole[: body + 600] + bytes(len(whole) - body - 600)
    contents = {
        "empty": b"",
        "garbage": np.random.default_rng(0).bytes(5000),
        "text": b"this is not a video\n" * 50,
        "truncated in half": whole[: len(whole) // 2],
        "truncated at the end": whole[:-200],
        "flipped bytes": bytes(flipped),
        "zeroed": zeroed,
    }
    path.write_bytes(contents[kind])
    return path


def timed(path: Path, times: list[float], last: float, rate=30, codec="mpeg4") -> Path:
    """Writes a video. It shows frame k from times[k] on, the last one for `last` seconds. Its header says `rate`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.time_base = HEIGHT, WIDTH, "yuv420p", MS
        stream.codec_context.max_b_frames = 0
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(draw(number), format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), MS
            for packet in stream.encode(frame):
                packet.duration = round(1000 * ((times + [times[-1] + last])[number + 1] - time))
                container.mux(packet)
        container.mux(stream.encode(None))
    return path


DAMAGES = ["empty", "garbage", "text", "truncated in half", "truncated at the end", "flipped bytes", "zeroed"]
