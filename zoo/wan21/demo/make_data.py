"""Demo data: short mp4 clips of real handwritten digits that move in a captioned direction.

    python -m zoo.wan21.demo.make_data --out data/wan21-demo

writes `clips/*.mp4`, `train.jsonl` and `test.jsonl`. Rows are {"path": relative to the folder, "caption": text}, as in
a user's own list. The images are the 1,797 8x8 scans of `sklearn.datasets.load_digits` (UCI optical recognition of
handwritten digits, CC BY 4.0). One fifth of the images of each digit is in no train clip. Only these are in test clips
and in the figures of `judge.py`.

Ten digits and eight directions make 80 captions: chance is 10 % for the digit and 12.5 % for the direction.
Shapes: F frames, S height and width in pixels.
"""

import argparse
import json
import os
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from tqdm import tqdm

from common import jsonl, processes

FRAMES, SIZE, FPS = (
    13,
    48,
    16,
)  # 4 x 6 x 6 latents, 36 DiT tokens: divisible by 4 for context and sequence parallel runs
DIGIT = 20.0  # side in pixels of the 8x8 scan in the clip
TRAVEL = 18.0  # pixels between the digit's places in the first and the last frame
JITTER = 2.0  # pixels by which the middle of the path varies, on each axis
FILES = {"clips", "train.jsonl", "test.jsonl", "demo.json"}
HIDDEN = slice(5, 9)  # frames without ink in a blinking clip: one latent frame

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {  # phrase -> unit step (x to the right, y down)
    "to the right": (1.0, 0.0),
    "down and to the right": (0.5**0.5, 0.5**0.5),
    "down": (0.0, 1.0),
    "down and to the left": (-(0.5**0.5), 0.5**0.5),
    "to the left": (-1.0, 0.0),
    "up and to the left": (-(0.5**0.5), -(0.5**0.5)),
    "up": (0.0, -1.0),
    "up and to the right": (0.5**0.5, -(0.5**0.5)),
}


def caption(digit: int, direction: str) -> str:
    return f"a handwritten {DIGITS[digit]} moves {direction}"


def digit_images(train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns images (N, 8, 8) in 0..1 and labels (N,) of the train or the held-out part. The split does not depend on
    a seed, so that weights, judge and data of different runs agree on which images are held out."""
    from sklearn.datasets import load_digits  # here, because training always imports this module

    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, 8, 8)
    order = np.random.default_rng(1797).permutation(len(images))
    by_digit = [order[labels[order] == digit] for digit in range(10)]
    parts = [ids[len(ids) // 5 :] if train else ids[: len(ids) // 5] for ids in by_digit]
    selected = np.concatenate(parts)
    return images[selected], labels[selected]


def render(image: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Renders an image (8, 8) in 0..1 at centres (F, 2), x and y in fractional pixels -> (F, S, S) uint8, grey on
    black."""
    scale = DIGIT / image.shape[0]
    frames = np.empty((len(centers), SIZE, SIZE), np.uint8)
    padded = np.pad(image, 2)  # zeros for the cubic kernel
    for frame, (x, y) in zip(frames, centers, strict=True):
        offset = scale * (padded.shape[0] - 1) / 2
        matrix = np.array([[scale, 0, x - offset], [0, scale, y - offset]])
        moved = cv2.warpAffine(padded, matrix, (SIZE, SIZE), flags=cv2.INTER_CUBIC)
        frame[:] = np.clip(np.rint(moved * 255), 0, 255)
    return frames


def path_centers(direction: str, rng: np.random.Generator) -> np.ndarray:
    """Returns centres (F, 2) of a path at constant speed through the middle of the frame, plus jitter."""
    middle = (SIZE - 1) / 2 + rng.uniform(-JITTER, JITTER, 2)
    along = np.linspace(-TRAVEL / 2, TRAVEL / 2, FRAMES)[:, None]
    return middle + along * np.array(DIRECTIONS[direction])


def write_mp4(path: Path, frames: np.ndarray) -> None:
    """Writes grey frames (F, S, S) uint8 to an H.264 file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "12", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.time_base = Fraction(1, FPS)
        stream.codec_context.thread_count = 1
        for grey in frames:
            frame = av.VideoFrame.from_ndarray(np.repeat(grey[..., None], 3, axis=2), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_split(folder: Path, split: str, count: int, seed: int, blinking: bool) -> None:
    """Writes `count` clips. All captions are equally frequent if `count` is a multiple of 80."""
    images, labels = digit_images(train=split == "train")
    rng = np.random.default_rng([seed, split == "train"])
    pools = {d: rng.permutation(np.flatnonzero(labels == d)) for d in range(10)}
    with open(folder / f"{split}.jsonl", "w") as rows:
        for i in tqdm(range(count), desc=f"making {split} clips", unit=" clips", mininterval=1):
            digit, direction = i % 10, list(DIRECTIONS)[i // 10 % 8]
            image = images[pools[digit][i // 10 % len(pools[digit])]]
            name = f"clips/{split}-{i:05d}.mp4"
            frames = render(image, path_centers(direction, rng))
            if blinking:
                frames[HIDDEN] = 0
            write_mp4(folder / name, frames)
            rows.write(json.dumps({"path": name, "caption": caption(digit, direction)}) + "\n")


def write_pictures(folder: Path) -> None:
    """Writes first frames of held-out digits, and prompts.tsv with a line per picture: picture<TAB>prompt."""
    images, labels = digit_images(train=False)
    rng, lines = np.random.default_rng(0), []
    for digit, direction in ((3, "to the left"), (7, "up and to the right")):
        image = images[rng.choice(np.flatnonzero(labels == digit))]
        first = render(image, path_centers(direction, rng)[:1])[0]
        cv2.imwrite(str(folder / f"{DIGITS[digit]}.png"), first)
        lines.append(f"{DIGITS[digit]}.png\t{caption(digit, direction)}\n")
    (folder / "prompts.tsv").write_text("".join(lines))


def make(out: Path, train: int = 1920, test: int = 320, seed: int = 0, blinking: bool = False) -> Path:
    """Writes the clips to `out` and returns it. blinking: the digits vanish for a moment halfway, which no caption says
    (a style that lora_t2v.sh learns). A complete folder with the same settings is reused. Any other folder that holds
    only demo data is replaced. Clips are made in a temporary folder, which is then renamed, so that a killed run leaves
    no partial data. If two runs need the folder, one makes it and the other waits."""
    out = Path(out)
    facts = {"train": train, "test": test, "seed": seed, "frames": FRAMES, "size": SIZE}
    settings = json.dumps(facts | ({"blinking": True} if blinking else {}))
    if not _made(out, settings):
        with processes.exclusive(out, settings):
            if not _made(out, settings):
                _build(out, settings, train, test, seed, blinking)
    return out


def _made(out: Path, settings: str) -> bool:
    try:
        return {entry.name for entry in out.iterdir()} == FILES and (out / "demo.json").read_text() == settings
    except FileNotFoundError:
        return False


def _build(out: Path, settings: str, train: int, test: int, seed: int, blinking: bool) -> None:
    if others := {entry.name for entry in out.iterdir()} - FILES if out.exists() else set():
        raise ValueError(f"{out} holds {sorted(others)[0]}; expected a new or a demo data folder; fix: --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        (building / "clips").mkdir()
        write_split(building, "train", train, seed, blinking)
        write_split(building, "test", test, seed, blinking)
        (building / "demo.json").write_text(settings)
        building.chmod(0o755)  # mkdtemp makes 0700
        shutil.rmtree(out, ignore_errors=True)
        os.replace(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def make_lists(folder: Path, plain: Path, blinking: Path, pairs: Path) -> None:
    """Makes what `folder` needs. It is one of the other three: plain clips, blinking clips, or pairs of both."""
    if folder != blinking:
        make(plain)
    if folder != plain:
        make(blinking, train=320, test=80, blinking=True)
    if folder == pairs:
        make_pairs(pairs, chosen=blinking, rejected=plain)


def make_pairs(out: Path, chosen: Path, rejected: Path) -> None:
    """Writes lists of pairs to `out`. It pairs clip i of one folder of `make` with clip i of the other, up to the end
    of the shorter list."""
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        sides = [
            [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
            for folder in (chosen, rejected)
        ]
        lines = []
        for one, other in zip(*sides, strict=False):
            files = [os.path.relpath(folder / row["path"], out) for folder, row in ((chosen, one), (rejected, other))]
            lines.append(json.dumps({"chosen": files[0], "rejected": files[1], "caption": one["caption"]}) + "\n")
        partial = jsonl.partial_name(out / f"{split}.jsonl")
        partial.write_text("".join(lines))
        os.replace(partial, out / f"{split}.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a complete one is reused")
    parser.add_argument(
        "--pictures", action="store_true", help="write the first frames of infer_i2v.sh there, no clips"
    )
    parser.add_argument("--train", type=int, default=1920, help="train clips (default %(default)s)")
    parser.add_argument("--test", type=int, default=320, help="test clips of held-out images (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--blinking", action="store_true", help="digits that go out for a moment halfway")
    args = parser.parse_args()
    if args.pictures:
        args.out.mkdir(parents=True, exist_ok=True)
        write_pictures(args.out)
    else:
        make(args.out, args.train, args.test, args.seed, args.blinking)
    print(args.out)


if __name__ == "__main__":
    main()
