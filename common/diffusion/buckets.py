"""Buckets are the shapes that training videos are cut to. This module makes them and chooses the bucket of a video.

A video goes to the bucket of the nearest aspect ratio, among the buckets for which it has enough frames. Ratios within
5 % count as equal, and of equal ones the longest bucket is taken. A bucket of 1 frame holds pictures.

`auto:81x480x832` makes the buckets. For each usual aspect ratio it takes the shape that loses least of 480*832 pixels,
and for each shape the lengths 81, 65, … (16 frames fewer each) down to 1.

This module does not import torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.video import VideoInfo, resampled_length

MAX_ASPECT = 2.0  # a video this much wider or taller than every bucket would lose half of its picture
SAME_ASPECT = 0.05  # aspects this near (in log) count as equal: 480x832 is as good for 16:9 as 720x1280
ASPECTS = (16 / 9, 3 / 2, 4 / 3, 1.0, 3 / 4, 2 / 3, 9 / 16)  # width / height of the buckets made by auto
LENGTH_STEP = 16  # frames between the lengths made by auto: one second at 16 fps


@dataclass(frozen=True)
class Strides:
    """The rules of a model for shapes."""

    frames: int  # the causal VAE's stride in time: a video has n * frames + 1 frames
    side: int  # pixels along the side of a token: the VAE's stride times the patch size


@dataclass(frozen=True)
class Bucket:
    """The shape of a training video, in frames and pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    def check(self, strides: Strides, flag: str = "--buckets") -> "Bucket":
        """Returns this bucket. Raises ValueError, which names the nearest possible shapes, if the model refuses it."""
        n, side = strides.frames, strides.side
        if self.frames < 1 or (self.frames - 1) % n:
            near = max(1, (self.frames - 1) // n * n + 1)
            raise ValueError(
                f"shape {self} has {self.frames} frames; expected {n}n+1 ({near}, {near + n}); fix: {flag}"
            )
        for length in (self.height, self.width):
            if length < side or length % side:
                near = max(side, length // side * side)
                rule = f"a multiple of {side} ({near}, {near + side})"
                raise ValueError(f"shape {self} has a side of {length}; expected {rule}; fix: {flag}")
        return self


def parse_buckets(text: str, strides: Strides | None, flag: str = "--buckets") -> list[Bucket]:
    """Parses `81x480x832,49x480x832` (frames x height x width) to buckets, and checks them unless strides is None.
    flag: the option that the text comes from.

    Raises:
        ValueError: the text is not a list of shapes, or as `Bucket.check`.
    """
    buckets = []
    for part in text.split(","):
        numbers = part.strip().split("x")
        if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"shape {part.strip()!r}; expected FRAMESxHEIGHTxWIDTH such as 81x480x832; fix: {flag}")
        bucket = Bucket(*map(int, numbers))
        buckets.append(bucket.check(strides, flag) if strides else bucket)
    return buckets


def make_buckets(text: str, strides: Strides, split: int = 1) -> list[Bucket]:
    """Makes the buckets of `auto:81x480x832`, with at most that many frames and pixels. The tokens of a frame are a
    multiple of `split`, the number of ranks that share a sequence."""
    largest, *more = parse_buckets(text.removeprefix("auto:"), strides)
    if more:
        raise ValueError(f"{text} names {1 + len(more)} shapes; expected one, the largest; fix: --buckets")
    area, side = largest.height * largest.width, strides.side
    sides = range(side, math.isqrt(2 * area) + 1, side)
    shapes = [(h, w) for h in sides for w in sides if h * w <= area and h * w // side**2 % split == 0]

    def lost(shape: tuple[int, int], aspect: float) -> float:
        """Returns what cropping loses of the picture plus what the shape lacks of the area, as logarithms."""
        return abs(math.log(shape[1] / shape[0] / aspect)) + math.log(area / shape[0] / shape[1])

    lengths = [*range(largest.frames, 1, -LENGTH_STEP), 1]
    best = dict.fromkeys(min(shapes, key=lambda shape, aspect=aspect: lost(shape, aspect)) for aspect in ASPECTS)
    return [Bucket(frames, *shape) for shape in best for frames in lengths]


def choose_bucket(info: VideoInfo, buckets: Sequence[Bucket], fps: float | None) -> int | str:
    """Returns the bucket index of a video resampled to `fps` (None: its own rate), or the reason why none fits."""
    frames = resampled_length(info, fps)
    long_enough = [i for i, bucket in enumerate(buckets) if bucket.frames <= frames]
    aspect = {i: abs(math.log(info.width / info.height * buckets[i].height / buckets[i].width)) for i in long_enough}
    if not aspect:
        return "too short"
    if min(aspect.values()) > math.log(MAX_ASPECT):
        return "aspect"
    near = [i for i in long_enough if aspect[i] <= min(aspect.values()) + SAME_ASPECT]
    return min(near, key=lambda i: (-buckets[i].frames, aspect[i]))
