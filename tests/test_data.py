"""The data path of videos: drop report, sampler and loader of common/data.py, and common/diffusion on them."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from video_case import CASES, DAMAGES, clip, damage, draw, numbers

from common import data
from common.data import BucketSampler, prefetch
from common.diffusion.buckets import Bucket, Strides, choose_bucket, make_buckets, parse_buckets
from common.diffusion.dataset import Index, IndexRow, VideoTextDataset, count_frames, scan, store
from common.diffusion.lists import Row, read_rows
from common.drops import DropReport, check_drops, note_drops
from common.video import VideoInfo

pytestmark = pytest.mark.L2

STRIDES = Strides(frames=4, side=16)


def write_list(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- lists and the drop report ----


def check_rows(path: Path, folder: Path):
    rows, report = read_rows(path)
    assert [(row.path, row.caption) for row in rows] == [
        (str(folder / "a.mp4"), "red"),
        (str(folder / "b.mp4"), "blue, too"),
    ]
    assert report.counts == {}
    return rows


def test_jsonl_with_either_key_name_and_a_list_of_captions(clips):
    items = [{"path": "a.mp4", "cap": "red", "unknown": 1}, {"video": str(clips / "b.mp4"), "text": ["blue, too", "x"]}]
    rows = check_rows(write_list(clips / "list.jsonl", items), clips)
    assert [row.where for row in rows] == ["list.jsonl:1", "list.jsonl:2"]
    seen = {read_rows(clips / "list.jsonl", seed)[0][1].caption for seed in range(20)}
    assert seen == {"blue, too", "x"}
    assert read_rows(clips / "list.jsonl", 3)[0] == read_rows(clips / "list.jsonl", 3)[0]


@pytest.mark.parametrize("path", ["path", "video", "file_path", "file_name"])
@pytest.mark.parametrize("caption", ["cap", "caption", "text", "prompt"])
def test_path_and_caption_under_every_name_that_readme_and_help_give(clips, path, caption):
    names = [("a.mp4", "red"), ("b.mp4", "blue, too")]
    check_rows(write_list(clips / "names.jsonl", [{path: video, caption: text} for video, text in names]), clips)
    (clips / "names.csv").write_text(f'{caption},{path}\nred,a.mp4\n"blue, too",b.mp4\n')
    check_rows(clips / "names.csv", clips)


def test_captions_keep_what_other_readers_take_for_line_ends(clips):
    rows = [{"path": "a.mp4", "cap": "one\u2028two\x85three"}, {"path": "b.mp4", "cap": "four"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (clips / "odd.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (clips / "odd.txt").write_bytes("\ufeff,odd.jsonl\r\n".encode())
    for name in ("odd.jsonl", "odd.txt"):
        read, report = read_rows(clips / name)
        assert [(row.caption, row.where) for row in read] == [
            ("one\u2028two\x85three", "odd.jsonl:1"), ("four", "odd.jsonl:2")
        ] and not report.drops  # fmt: skip


def test_rows_that_cannot_be_read_are_dropped_by_file_and_line(clips):
    rows = [
        '{"path": "a.mp4", "cap": "x"}',
        "[" * 100_000 + "]" * 100_000,
        '{"path": "a.mp4", "n": ' + "9" * 5000 + "}",
    ]
    (clips / "deep.jsonl").write_text("\n".join(rows))
    (clips / "deep.json").write_text("[" + ",\n".join(rows) + "]")
    (clips / "long.csv").write_text(f"path,cap\na.mp4,x\na.mp4,{'y' * 140_000}\na.mp4,1\r2\n")
    for name, drops in (
        ("deep.jsonl", [("unreadable JSON", 2), ("unreadable JSON", 3)]),
        ("deep.json", [("unreadable JSON", 2), ("unreadable JSON", 3)]),
        ("long.csv", [("too long a cell", 3), ("malformed CSV", 4)]),
    ):
        read, report = read_rows(clips / name)
        assert [row.caption for row in read] == ["x"]
        assert [(d["reason"], d["where"]) for d in report.drops] == [
            (reason, f"{name}:{line}") for reason, line in drops
        ]


MM_LIST = """[
  {"path": "a.mp4", "cap": "red",
   "num_frames": 60, "fps": 24, "resolution": {"height": 64, "width": 96}},

  {"path": "b.mp4", "cap": "blue, too"}
]"""


def test_json_list_knows_the_line_of_each_row(clips):
    (clips / "list.json").write_text(MM_LIST)
    assert [row.where for row in check_rows(clips / "list.json", clips)] == ["list.json:2", "list.json:5"]


def test_data_txt_lists_folder_and_annotation(clips, tmp_path):
    (tmp_path / "list.json").write_text(MM_LIST)
    (tmp_path / "data.txt").write_text(f"{clips},{tmp_path / 'list.json'}\n\n")
    check_rows(tmp_path / "data.txt", clips)
    (tmp_path / "data.txt").write_text(f"{os.path.relpath(clips, tmp_path)}, list.json")
    check_rows(tmp_path / "data.txt", clips)


def test_csv_with_a_header(clips):
    (clips / "list.csv").write_text('\ufeffid,video,caption\n1,a.mp4,red\n2,b.mp4,"blue, too"\n', encoding="utf-8")
    assert [row.where for row in check_rows(clips / "list.csv", clips)] == ["list.csv:2", "list.csv:3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"path": "a.mp4", "cap": "x"}\n\n{"path": "a.mp4"', r"x\.jsonl:3: malformed"),
        ("x.jsonl", '{"path": "a.mp4", "cap": "x"}\n[1]\n', r"x\.jsonl:2: the row is '\[1\]'"),
        ("x.json", '[\n{"path": "a.mp4",\n "cap": }\n]', r"x\.json:3: malformed"),
        ("x.json", '[\n{"path": "a.mp4", "cap": "x"},\n\n7]', r"x\.json:4: the row is '7'"),
        ("x.json", '{"path": "a.mp4"}', r"x\.json:1: malformed JSON, expected \["),
        ("x.csv", "file,cap\na.mp4,x\n", r"x\.csv:1: the header has file, cap"),
        ("x.csv", "", r"x\.csv:1: the header has nothing"),
        ("x.txt", "\nnowhere.json\n", r"x\.txt:2: no such list"),
        ("x.txt", "videos,nowhere.json\n", r"x\.txt:1: no such list"),
        ("x.parquet", "", r"unknown kind of list"),
        ("x.jsonl", b"\xff\xfe{", r"x\.jsonl:1: the bytes ff fe"),
        ("x.csv", 'path,cap\na.mp4,x\na.mp4,"y\n', r"x\.csv:3: a quote is opened and never closed"),
        ("x.csv", "path,cap\na.mp4,caf\xe9\n".encode("latin-1"), r"x\.csv:2: the bytes e9"),
        ("x.txt", "caf\xe9,list.json".encode("latin-1"), r"x\.txt:1: the bytes e9"),
        ("x.jsonl", "", r"x\.jsonl holds no row"),
        ("x.json", "[]", r"x\.json holds no row"),
        ("x.csv", "path,cap\n", r"x\.csv holds no row"),
        ("missing.jsonl", None, r"cannot read .*missing\.jsonl"),
    ],
)
def test_malformed_list_names_file_and_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=f"(?s){message}.*; expected .*; fix: "):
        read_rows(tmp_path / name)


def test_every_dropped_row_is_counted_with_its_reason_and_place(clips, tmp_path):
    clip(clips / "short.mp4", frames=4)
    clip(clips / "wide.mp4", frames=20, size=(32, 192))
    damage(clips / "half.mp4", "truncated in half", clips / "fast.mp4")
    items = [
        {"path": "a.mp4", "cap": "kept"},
        {"cap": "no path"},
        {"path": "a.mp4"},
        {"path": "a.mp4", "cap": "  "},
        {"path": "nowhere.mp4", "cap": "x"},
        {"path": 5, "cap": "x"},
        {"path": "a.mp4", "cap": 5},
        {"path": "half.mp4", "cap": "x"},
        {"path": "short.mp4", "cap": "x"},
        {"path": "wide.mp4", "cap": "x"},
    ]
    rows, report = read_rows(write_list(clips / "drops.jsonl", items))
    index = scan(rows, [Bucket(17, 32, 48)], None, report, workers=2)
    assert [row.caption for row in index.rows] == ["kept"]
    reasons = [(drop["reason"], drop["where"]) for drop in report.drops]
    lines = {"no path": [2], "no caption": [3, 4], "missing file": [5], "bad row": [6, 7]}
    lines |= {"corrupt video": [8], "too short": [9], "aspect": [10]}
    assert reasons == [
        (reason, f"drops.jsonl:{line}") for reason, numbers_of_lines in lines.items() for line in numbers_of_lines
    ]
    assert report.counts == {reason: len(numbers_of_lines) for reason, numbers_of_lines in lines.items()}
    for part in (
        "2 no caption (first: drops.jsonl:3 a.mp4)",
        "truncated",
        "4 frames at 24.00 fps of 64x96",
        "keys: cap",
    ):
        assert part in str(report)
    report.save(tmp_path)
    saved = [json.loads(line) for line in (tmp_path / "drops.jsonl").read_text().splitlines()]
    assert saved[0] == {"kind": "summary", "dropped": 9, "reasons": report.counts} and len(saved) == 10
    with pytest.raises(ValueError, match=r"dropped 9 rows: 2 no caption .*, of 10; expected at most 5\.0%.*--max-drop"):
        report.check(10)
    report.check(10, max_drop=0.9)


def test_lone_surrogates_of_a_caption_are_replaced(clips):
    rows, _ = read_rows(write_list(clips / "surrogate.jsonl", [{"path": "a.mp4", "cap": "caf\u00e9 \ud83d"}]))
    assert rows[0].caption == "caf\u00e9 ?"
    _, report = read_rows(write_list(clips / "surrogate.jsonl", [{"path": "\ud83d.mp4", "cap": "x", "\ud83d": 1}]))
    assert report.counts == {"missing file": 1} and str(report).encode()


def test_csv_row_with_too_many_fields_is_a_bad_row(clips):
    (clips / "more.csv").write_text("path,cap\na.mp4,red, and blue\nb.mp4,x\n")
    rows, report = read_rows(clips / "more.csv")
    assert [row.caption for row in rows] == ["x"] and report.counts == {"bad row": 1}


def test_drop_limit_is_five_percent_and_one_row_must_stay():
    report = DropReport()
    report.add("aspect", "x.jsonl:1")
    report.check(20)
    with pytest.raises(ValueError, match="of 19"):
        report.check(19)
    with pytest.raises(ValueError, match="one row left"):
        report.check(1, max_drop=1.0)
    with pytest.raises(ValueError, match="dropped 0 rows, of 0"):
        DropReport().check(0)


def found(*rows: int) -> list[dict]:
    """Makes the drops that decoding reports for these rows."""
    return [{"reason": "corrupt", "where": f"x:{i}", "detail": f"{i}.mp4: {i}", "file": f"{i}.mp4"} for i in rows]


def test_drop_found_while_decoding_is_printed_and_counted_once(tmp_path, capsys):
    """This holds whichever epoch, worker or rank finds the drop, before a resume or after it."""
    scanned, path = DropReport(), tmp_path / "drops.jsonl"
    scanned.add("aspect", "x:0", "0.mp4")
    scanned.save(tmp_path)
    for rows in ((3,), (3, 4), (4,), (3,)):
        note_drops(path, found(*rows), 99, 0.03)
    assert capsys.readouterr().out.splitlines() == [f"dropped x:{i}: corrupt: {i}.mp4: {i}" for i in (3, 4)]
    assert DropReport.load(path).drops == scanned.drops + found(3, 4)
    twin = [found(3)[0] | {"file": "other.mp4"}]  # a row of another list of the same name
    with pytest.raises(
        ValueError, match=r"dropped 4 rows: 3 corrupt \(first: x:3 3.mp4: 3\), 1 aspect .*, of 100; .*--max-drop"
    ):
        note_drops(path, twin, 99, 0.03)
    with pytest.raises(ValueError, match="of 100"):  # a run that is resumed all the same stops again
        note_drops(path, found(3), 99, 0.03)
    assert len(check_drops(path, 99, 0.04).drops) == 4


def test_line_that_a_kill_cut_off_is_passed_over(tmp_path):
    path = tmp_path / "drops.jsonl"
    note_drops(path, found(1), 9, 0.5)
    with open(path, "a") as file:
        file.write('{"kind": "drop", "rea')
    note_drops(path, found(2), 9, 0.5)
    assert DropReport.load(path).drops == found(1, 2)


# ---- buckets ----


def test_buckets_are_parsed_and_checked():
    assert parse_buckets("81x480x832, 1x16x32", STRIDES) == [Bucket(81, 480, 832), Bucket(1, 16, 32)]
    for text, message in {
        "80x480x832": r"80 frames; expected 4n\+1 \(77, 81\)",
        "0x480x832": r"0 frames; expected 4n\+1 \(1, 5\)",
        "81x480x840": r"side of 840; expected a multiple of 16 \(832, 848\)",
        "81x8x832": r"side of 8; expected a multiple of 16 \(16, 32\)",
        "81x480": "expected FRAMESxHEIGHTxWIDTH",
        "81x480x832,": "expected FRAMESxHEIGHTxWIDTH",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_buckets(text, STRIDES)
    assert parse_buckets("81x480x840", Strides(4, 8)) == [Bucket(81, 480, 840)]


@pytest.mark.parametrize(
    ("frames", "fps", "size", "train_fps", "expected"),
    [
        (81, 16, (480, 832), 16, 0),
        (80, 16, (480, 832), 16, 1),
        (122, 24, (480, 832), 16, 0),  # 122 / 1.5 = 81.3
        (120, 24, (480, 832), 16, 1),  # 120 / 1.5 = 80
        (120, 24, (480, 832), None, 0),  # the video's own rate
        (41, 8, (480, 832), 16, 0),  # frames repeated
        (81, 16.05, (480, 832), 16, 0),  # 16.05 and 16 count as one rate
        (200, 16, (1080, 1920), 16, 0),  # 1.73 and 1.78 count as one aspect: the longest bucket
        (200, 16, (832, 480), 16, 2),
        (60, 16, (832, 480), 16, "aspect"),  # long enough for landscape only
        (20, 16, (480, 832), 16, "too short"),
        (1, 0, (480, 832), 16, "too short"),  # a still is not repeated
        (200, 16, (480, 2080), 16, "aspect"),
        (200, 16, (480, 1600), 16, 0),  # 1.92 times wider
    ],
)
def test_bucket_choice(frames, fps, size, train_fps, expected):
    buckets = [Bucket(81, 480, 832), Bucket(49, 720, 1280), Bucket(81, 832, 480)]
    assert choose_bucket(VideoInfo(frames, fps, *size), buckets, train_fps) == expected


def test_bucket_of_a_variable_rate_is_chosen_by_its_duration():
    """The video has 61 frames in 4 s, 4 of them in the first 3 s. At 16 frames a second it has 64, by its duration as
    by its mean rate. At its own rate it has 61."""
    buckets = [Bucket(65, 48, 48), Bucket(61, 48, 48), Bucket(5, 48, 48)]
    info = VideoInfo(61, 61 / 4, 48, 48, duration=4.0)
    assert choose_bucket(info, buckets, 16) == 1 and choose_bucket(info, buckets, None) == 1
    assert choose_bucket(replace(info, duration=4.01), buckets, 16) == 0
    assert choose_bucket(replace(info, fps=16.05), buckets[:1], 16) == "too short", "16.05 and 16 are not one rate here"
    assert choose_bucket(VideoInfo(2, 0.5, 48, 48, duration=4.0), buckets, 16) == 1


@pytest.mark.parametrize(("text", "split"), [("auto:81x480x832", 1), ("auto:81x720x1280", 8), ("auto:13x48x48", 2)])
def test_made_buckets_are_legal_and_lose_little(text, split):
    """The area of a bucket is at most a twentieth below that of the given shape, and a video of a usual aspect loses at
    most a twentieth. Tiny areas are exempt, because sides are multiples of 16."""
    largest, buckets = parse_buckets(text[5:], STRIDES)[0], make_buckets(text, STRIDES, split)
    area = largest.height * largest.width
    for bucket in buckets:
        assert bucket.check(STRIDES).frames <= largest.frames and bucket.height * bucket.width <= area
        assert bucket.height * bucket.width // 256 % split == 0
    if area > 400 * 400:
        assert largest in buckets and min(b.height * b.width for b in buckets) > 0.95 * area
        for size in ((1080, 1920), (480, 640), (512, 512), (1920, 1080), (600, 400)):
            chosen = buckets[choose_bucket(VideoInfo(500, 16.0, *size), buckets, 16)]
            scale = max(chosen.height / size[0], chosen.width / size[1])
            assert chosen.frames == 81 and chosen.height * chosen.width > 0.95 * scale**2 * size[0] * size[1]
    lengths = {b.frames for b in buckets}
    assert lengths == ({81, 65, 49, 33, 17, 1} if largest.frames == 81 else {13, 1})


def test_made_buckets_come_of_one_shape():
    for text in ("auto:81x480x832,49x480x832", "auto:81", "auto:80x480x832"):
        with pytest.raises(ValueError, match="expected .*; fix: --buckets"):
            make_buckets(text, STRIDES)


def test_used_frames_are_counted_by_bucket():
    buckets = [Bucket(81, 480, 832), Bucket(49, 480, 832), Bucket(17, 480, 832)]
    facts = [(0, 100, 16.0), (0, 122, 24.0), (1, 60, 16.0)]  # bucket, frames, rate: 100, 82 and 60 frames at 16
    rows = [IndexRow(f"{i}", "", "", b, frames, fps, 0, 0) for i, (b, frames, fps) in enumerate(facts)]
    assert count_frames(Index(rows, buckets, 16), 2).splitlines() == [
        "buckets: 211 of 242 frames used (87.2%)",
        "  81x480x832: 2 videos, 162 of 182 frames",
        "  49x480x832: 1 videos, 49 of 60 frames; fewer than a batch of 2, which repeats some",
    ]


# ---- micro-batches ----


def make_dataset(
    clips: Path, names: list[str], bucket: Bucket, fps: float | None = None, **options
) -> VideoTextDataset:
    rows = [Row(str(clips / name), f"caption of {name}", f"list:{i}") for i, name in enumerate(names)]
    return VideoTextDataset(scan(rows, [bucket], fps, DropReport(), workers=1), **options)


def shown(batch: dict) -> list[list[int]]:
    return [numbers(video.permute(1, 2, 3, 0).numpy()) for video in batch["pixels"]]


@pytest.mark.parametrize(
    ("train_fps", "expected"),
    [
        (None, list(range(23, 36))),  # 60 frames: 47 to spare, 23 of them before the window
        (12, list(range(16, 41, 2))),  # 30 frames: the window starts at 8
        (16, [19, 21, 22, 24, 25, 27, 28, 30, 31, 33, 34, 36, 37]),  # 40 frames: at 13
        (48, [26, 27, 27, 28, 28, 29, 29, 30, 30, 31, 31, 32, 32]),  # 120 frames: at 53
        (23.976, list(range(23, 36))),
    ],
)
def test_window_is_centred_and_resampled(clips, train_fps, expected):
    batch = make_dataset(clips, ["a.mp4"], Bucket(13, 64, 96), train_fps).fetch([0])
    assert batch["pixels"].shape == (1, 3, 13, 64, 96) and batch["pixels"].dtype == torch.uint8
    assert shown(batch) == [expected]
    assert batch["captions"] == ["caption of a.mp4"] and batch["rows"] == [0]
    assert batch["latents"] is None and batch["text"] is None and batch["keys"] is None


def test_window_of_a_variable_rate_is_centred_in_time():
    """The grey value is 60 times the time. Of 64 frames in 4 s, the window of 33 frames begins at frame 31 // 2."""
    dataset = make_dataset(CASES, ["vfr.mp4"], Bucket(33, 64, 64), 16)
    grey = dataset.fetch([0])["pixels"][0].float().mean((0, 2, 3))
    times = [(15 + n) / 16 for n in range(33)]
    shown_at = [int(t * 30 + 1e-6) / 30 if t < 2 else int(t * 5 + 1e-6) / 5 for t in times]
    assert (grey / 60).tolist() == pytest.approx(shown_at, abs=0.025)


def test_files_without_an_index_or_presentation_times_train_like_others():
    rows, report = read_rows(CASES / "mixed_ts.jsonl")
    index = scan(rows, [Bucket(17, 64, 64)], 16, report)
    assert [Path(row.path).name for row in index.rows] == [Path(row.path).name for row in rows] and not report.drops
    batch = VideoTextDataset(index).fetch(range(6))
    assert batch["rows"] == list(range(6)) and batch["dropped"] == {}
    grey = [video.float().mean((0, 2, 3)).round().tolist() for video in batch["pixels"]]
    assert grey[0] == grey[1] and grey[2] == grey[3] == grey[5] and grey[0] != grey[2]
    assert all(video == sorted(video) and video[-1] - video[0] > 50 for video in grey[2:])  # 16 steps of 1.9 frames


def test_animated_picture_of_a_list_is_a_video(tmp_path):
    first, *more = [Image.fromarray(draw(number)) for number in range(1, 14)]
    first.save(tmp_path / "x.webp", save_all=True, append_images=more, duration=125, lossless=True)
    first.save(tmp_path / "still.webp", lossless=True)
    dataset = make_dataset(tmp_path, ["x.webp", "still.webp"], Bucket(13, 64, 96), 8)
    assert len(dataset) == 1 and shown(dataset.fetch([0])) == [list(range(1, 14))]


def test_what_decord_does_not_read_is_said_once_and_read_by_pyav(tmp_path, capsys):
    pytest.importorskip("decord")
    clip(tmp_path / "open.mp4", frames=70, codec="libx265")
    clip(tmp_path / "a.mp4", frames=60)
    rows = [Row(str(tmp_path / name), "x", f"list:{i}") for i, name in enumerate(["a.mp4", "open.mp4"])]
    index = scan(rows, [Bucket(17, 64, 96)], None, DropReport(), decoder="decord")
    assert capsys.readouterr().out == (
        "decord reads 1 of 2 videos, PyAV the others: 1 open groups of pictures (first: list:1 "
        f"{tmp_path / 'open.mp4'})\n"
    )
    index.save(tmp_path / "index.jsonl")
    assert [row.decoder for row in Index.load(tmp_path / "index.jsonl").rows] == ["decord", "pyav"]
    assert index.decoder == Index.load(tmp_path / "index.jsonl").decoder == "decord"
    assert shown(VideoTextDataset(index).fetch([0, 1])) == [list(range(21, 38)), list(range(26, 43))]


def test_random_start_depends_on_seed_epoch_and_row_alone(clips):
    dataset = make_dataset(clips, ["a.mp4", "a.mp4"], Bucket(5, 64, 96), random_start=7)
    starts = [[video[0] for video in shown(dataset.fetch([0, 1], epoch))] for epoch in range(4)]
    assert len({start for pair in starts for start in pair}) > 4
    assert [video[0] for video in shown(dataset.fetch([0, 1], 2))] == starts[2]
    with pytest.raises(ValueError, match="cache"):
        make_dataset(clips, ["a.mp4"], Bucket(5, 64, 96), random_start=7, cache_dir=clips)


def test_undecodable_video_is_replaced_by_the_next_of_its_bucket_and_reported(clips):
    damage(clips / "flipped.mp4", "flipped bytes", clips / "fast.mp4")
    names = ["a.mp4", "flipped.mp4", "b.mp4", "flipped.mp4"]
    dataset = make_dataset(clips, names, Bucket(17, 64, 96))
    assert len(dataset) == 4, "the damage does not show in the scan"
    batch = dataset.fetch([0, 1, 3])
    assert batch["rows"] == [0, 2, 0] and shown(batch)[1] == list(range(11, 28))
    assert batch["captions"] == ["caption of a.mp4", "caption of b.mp4", "caption of a.mp4"]
    drops = dataset.drops(batch["dropped"])
    assert [(d["reason"], d["where"]) for d in drops] == [("corrupt video (decode)", f"list:{i}") for i in (1, 3)]
    assert all("flipped.mp4: " in drop["detail"] for drop in drops)
    with pytest.raises(ValueError, match=r"2 of the 2 videos of bucket 17x64x96 fail .*flipped\.mp4"):
        make_dataset(clips, ["flipped.mp4"] * 2, Bucket(17, 64, 96)).fetch([1])


def test_index_survives_saving_and_changed_files(clips, tmp_path):
    index = make_dataset(clips, ["a.mp4", "b.mp4"], Bucket(17, 64, 96), 16).index
    assert [row.frames for row in index.rows] == [60, 40] and [row.bucket for row in index.rows] == [0, 0]
    index.save(tmp_path / "index.jsonl")
    assert Index.load(tmp_path / "index.jsonl") == index
    assert os.listdir(tmp_path) == ["index.jsonl"]


def encode(dataset: VideoTextDataset, rows: list[int]) -> dict:
    """Stands for the frozen VAE and text encoder: it stores and returns random tensors."""
    batch = dataset.fetch(rows)
    assert batch["latents"] is None
    tensors = {"latents": torch.randn(len(rows), 16, 5, 8, 12), "text": torch.randn(len(rows), 9, 7).bfloat16()}
    for i, text in enumerate(tensors["text"]):
        text[3 + i :] = 0  # padding after the caption
    for i, key in enumerate(batch["keys"]):
        store(dataset.cache_dir, key, tensors["latents"][i], tensors["text"][i])
    return tensors


def test_second_read_returns_the_stored_tensors_without_opening_a_video(clips, tmp_path, monkeypatch):
    dataset = make_dataset(clips, ["a.mp4", "b.mp4"], Bucket(17, 64, 96), cache_dir=tmp_path / "cache", encoder="vae-1")
    stored = encode(dataset, [0, 1])
    monkeypatch.setattr("common.diffusion.dataset.read_frames", lambda *_: pytest.fail("opened a video"))
    batch = dataset.fetch([1, 0])
    assert batch["pixels"] is None and batch["captions"] == ["caption of b.mp4", "caption of a.mp4"]
    assert batch["latents"].dtype == torch.float32 and torch.equal(batch["latents"], stored["latents"].flip(0))
    assert batch["text"].dtype == torch.bfloat16 and torch.equal(batch["text"], stored["text"].flip(0)[:, :4])
    assert all(name.endswith(".safetensors") for name in os.listdir(tmp_path / "cache"))


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_partly_cached_micro_batch_decodes_every_row(clips, tmp_path, how):
    dataset = make_dataset(clips, ["a.mp4", "b.mp4"], Bucket(17, 64, 96), cache_dir=tmp_path)
    encode(dataset, [0, 1])
    entry = tmp_path / f"{dataset.key(1)}.safetensors"
    entry.unlink() if how == "missing" else entry.write_bytes(entry.read_bytes()[:50])
    batch = dataset.fetch([0, 1])
    assert batch["latents"] is None and [video[0] for video in shown(batch)] == [21, 11]
    assert dataset.fetch([0])["latents"].shape == (1, 16, 5, 8, 12)


def test_key_changes_with_everything_that_decides_the_tensors(clips, tmp_path):
    path = clip(tmp_path / "a.mp4", frames=40)
    bucket = Bucket(17, 64, 96)

    def key(where=tmp_path, caption=None, bucket=bucket, fps=None, encoder="x"):
        dataset = make_dataset(where, ["a.mp4"], bucket, fps, encoder=encoder)
        if caption:
            dataset.index.rows[0] = replace(dataset.index.rows[0], caption=caption)
        return dataset.key(0)

    keys = [key(), key(clips), key(caption="other"), key(bucket=Bucket(13, 64, 96)), key(fps=16), key(encoder="y")]
    dataset, before = make_dataset(tmp_path, ["a.mp4"], bucket, encoder="x"), key()
    os.utime(path, ns=(1, 1))
    assert len({*keys, dataset.key(0)}) == 7
    os.utime(path, ns=(dataset.index.rows[0].mtime_ns,) * 2)
    assert dataset.key(0) == before == keys[0]
    path.unlink()
    assert dataset.key(0) == before, "the cache must serve after the videos are gone"


# ---- sampling ----

SIZES = {0: 11, 3: 5, 7: 40}
BUCKETS = [bucket for bucket, size in SIZES.items() for _ in range(size)]


def sampler(
    buckets=BUCKETS, global_batch=8, micro_batch=2, dp_rank=0, dp_size=1, seed=3, shuffle=True
) -> BucketSampler:
    return BucketSampler(buckets, global_batch, micro_batch, dp_rank, dp_size, seed, shuffle)


def test_batch_is_a_pure_function_of_the_step():
    batches = sampler()
    forward = [batches.batch(step) for step in range(60)]
    again = sampler()
    for step in [59, 0, 33, 7, 58, 12]:
        assert again.batch(step) == forward[step] == sampler().batch(step)
    assert forward != [sampler(seed=4).batch(step) for step in range(60)]


def test_every_global_batch_has_one_bucket():
    batches = sampler()
    for step in range(60):
        bucket, rows = batches.batch(step)
        assert len(rows) == 8 and {BUCKETS[row] for row in rows} == {bucket}


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2), (8, 1)])
def test_ranks_share_out_the_same_global_batch(dp_size, micro_batch):
    ranks = [sampler(dp_rank=rank, dp_size=dp_size, micro_batch=micro_batch) for rank in range(dp_size)]
    for step in range(20):
        wanted, placed = sampler().batch(step)[1], {}
        for rank in ranks:
            for micro, rows in enumerate(rank.micro_batches(step)):
                assert len(rows) == micro_batch
                for slot, row in zip(rank.slots(micro), rows, strict=True):
                    assert slot not in placed
                    placed[slot] = row
        assert [placed[slot] for slot in range(8)] == wanted


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_is_seen_once_per_epoch(shuffle):
    batches = sampler([0] * 16 + [1] * 24, shuffle=shuffle)
    epochs = [[row for step in range(5 * e, 5 * e + 5) for row in batches.batch(step)[1]] for e in range(4)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert [batches.epoch(step) for step in range(20)] == [e for e in range(4) for _ in range(5)]
    assert (epochs[0] == epochs[1]) is not shuffle
    assert (epochs[0] == list(range(40))) is not shuffle


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_an_order_of_its_own_of_buckets_and_of_each_buckets_rows(shuffle):
    """Two of the buckets have one size, and neither takes the other's order."""
    buckets = [0] * 32 + [1] * 32 + [2] * 16
    batches, other_seed = sampler(buckets, shuffle=shuffle), sampler(buckets, seed=4, shuffle=shuffle)
    epochs = [[batches.batch(step) for step in range(10 * e, 10 * e + 10)] for e in range(6)]
    orders = {tuple(bucket for bucket, _ in epoch) for epoch in epochs}
    first, second = (  # the batches of each epoch, by the rows' places in the bucket
        [{tuple(row - 32 * bucket for row in rows) for drawn, rows in epoch if drawn == bucket} for epoch in epochs]
        for bucket in (0, 1)
    )
    assert len(orders) == len(set(map(frozenset, first))) == len(set(map(frozenset, second))) == (6 if shuffle else 1)
    assert not any(a == b for a, b in zip(first, second, strict=True)) if shuffle else first == second
    assert ([other_seed.batch(step)[0] for step in range(10)] == [bucket for bucket, _ in epochs[0]]) is not shuffle


def test_remainders_are_carried_over_and_no_row_is_lost():
    batches = sampler()
    steps = 8 * 56 // 8  # after 8 epochs of 56 rows all remainders are used up
    counts = Counter(row for step in range(steps) for row in batches.batch(step)[1])
    assert counts == dict.fromkeys(range(56), 8)
    assert batches.epoch(steps - 1) == 7 and batches.epoch(steps) == 8


def test_fewer_rows_than_a_batch_wrap_around():
    batches = sampler([5, 5, 5])
    rows = [row for step in range(3) for row in batches.batch(step)[1]]
    assert Counter(rows) == {0: 8, 1: 8, 2: 8}
    assert all(max(Counter(batches.batch(step)[1]).values()) == 3 for step in range(3))


def test_sampler_of_many_rows_is_quick_at_a_late_step():
    batches = BucketSampler(np.arange(300_000) % 5, 64, 1, 0, 1, 0)
    assert len(set(batches.batch(10**6)[1])) == 64
    assert BucketSampler([0], 1024, 1, 0, 1, 0).batch(10**9)[1] == [0] * 1024


@pytest.mark.parametrize(("global_batch", "micro_batch", "dp_size"), [(8, 3, 1), (8, 2, 8), (0, 1, 1)])
def test_indivisible_batch_is_an_error(global_batch, micro_batch, dp_size):
    with pytest.raises(
        ValueError, match=f"global batch {global_batch}.*expected a multiple of {micro_batch * dp_size}; fix"
    ):
        sampler(global_batch=global_batch, micro_batch=micro_batch, dp_size=dp_size)
    with pytest.raises(ValueError, match="no rows"):
        sampler([])


# ---- loading ----


class Rows:
    """A dataset that returns the numbers of the rows, and fails on row 9."""

    def fetch(self, rows, epoch):
        if 9 in rows:
            raise KeyError("broken")
        return {"rows": rows, "epoch": epoch}

    def where(self, row):
        return f"file-{row}.mp4"


def same(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("start", [0, 2])
def test_data_do_not_depend_on_the_number_of_workers(clips, start):
    damage(clips / "flipped.mp4", "flipped bytes", clips / "fast.mp4")
    names = ["a.mp4", "b.mp4", "c.mp4", "flipped.mp4", "fast.mp4"]
    dataset = make_dataset(clips, names, Bucket(5, 64, 96), random_start=1)
    batches = sampler([0] * 5, global_batch=4, micro_batch=2)
    state = torch.get_rng_state()
    in_process, in_workers = (list(prefetch(dataset, batches, start, 4, workers=workers)) for workers in (0, 2))
    assert torch.equal(torch.get_rng_state(), state), "reading must leave the training's random state alone"
    assert [step.step for step in in_process] == [step.step for step in in_workers] == list(range(start, 4))
    for a, b in zip(in_process, in_workers, strict=True):
        assert a.bucket == b.bucket == 0 and a.numbers == b.numbers == [0, 1]
        for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
            assert x.keys() == y.keys() and all(same(x[name], y[name]) for name in x)
    assert 3 not in [row for step in in_process for micro in step.micro_batches for row in micro["rows"]]
    assert {row for step in in_workers for micro in step.micro_batches for row in micro["dropped"]} == {3}


class _Threaded:
    """Stands for PyAV's scaler in a forked process, where its destructor waits for threads of the parent process."""

    def __init__(self):
        self.me, self.owner = self, os.getpid()  # a cycle, so the garbage collector deletes it

    def __del__(self):
        if os.getpid() != self.owner:
            os._exit(3)


class _Collecting(Rows):
    def fetch(self, rows, epoch):
        gc.collect()
        return {"rows": rows, "epoch": epoch}


def test_a_decoding_process_collects_nothing_that_it_inherits():
    gc.disable()
    try:
        _Threaded()
        [step] = prefetch(
            _Collecting(), sampler([0] * 4, global_batch=2, micro_batch=2, shuffle=False), 0, 1, workers=1
        )
    finally:
        gc.enable()
    assert step.micro_batches == [{"rows": [0, 1], "epoch": 0}] and not gc.get_freeze_count()


def test_ranks_of_a_model_parallel_group_share_the_micro_batches():
    parts = [list(prefetch(Rows(), sampler([0] * 8, 8, 1), 0, 1, share=(i, 3)))[0] for i in range(3)]
    assert [part.numbers for part in parts] == [[0, 3, 6], [1, 4, 7], [2, 5]]


@pytest.mark.parametrize("workers", [0, 1])
def test_failure_while_reading_names_rows_and_files(workers):
    steps = prefetch(Rows(), sampler([0] * 12, global_batch=2, micro_batch=2, shuffle=False), 0, 6, workers=workers)
    with pytest.raises(
        RuntimeError, match=r"reading rows \[8, 9\] \(file-8.mp4, file-9.mp4\) failed: KeyError: 'broken'"
    ):
        for step in steps:
            assert step.micro_batches == [{"rows": [2 * step.step, 2 * step.step + 1], "epoch": 0}]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_file_neither_hangs_nor_crashes_a_worker(clips, tmp_path, kind):
    path = clip(tmp_path / "bad.mp4", frames=120)
    dataset = make_dataset(clips, [str(path), "a.mp4"], Bucket(57, 64, 96))
    damage(path, kind, clips / "fast.mp4")  # after the scan
    steps = list(prefetch(dataset, sampler([0, 0], 2, 2, shuffle=False), 0, 1, workers=1, timeout=20))
    [batch] = steps[0].micro_batches
    if kind == "truncated at the end":  # the damage lies behind the window, whose frames are whole
        assert batch["rows"] == [0, 1] and not batch["dropped"]
    else:
        assert batch["rows"] == [1, 1] and "bad.mp4" in batch["dropped"][0]


def test_lists_and_buckets_are_read_without_torch(clips):
    write_list(clips / "list.jsonl", [{"path": "a.mp4", "cap": "x"}])
    program = (
        "import sys; from common.data import BucketSampler; from common.diffusion import features, requests;"
        "from common.diffusion import buckets, dataset, lists, options;"
        f"rows, report = lists.read_rows({str(clips / 'list.jsonl')!r});"
        "index = dataset.scan(rows, buckets.parse_buckets('5x32x48', buckets.Strides(4, 16)), 16, report);"
        "assert len(index.rows) == 1 and BucketSampler([0], 1, 1, 0, 1, 0).batch(0) == (0, [0]);"
        "assert 'torch' not in sys.modules"
    )
    root = Path(data.__file__).parent.parent
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, timeout=60)
