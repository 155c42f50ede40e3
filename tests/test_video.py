"""common/video.py: which frames it reads from a video or picture, and what it refuses."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from video_case import CASES, DAMAGES, HEIGHT, WIDTH, clip, damage, draw, numbers, timed

from common.video import VideoError, VideoInfo, decord_refusal, probe_video, read_frames, resampled_length, resize_crop

pytestmark = pytest.mark.L2


@pytest.mark.parametrize(
    "indices", [range(120), [97, 3, 3, 50], [119], range(70, 119, 2)], ids=["all", "any", "last", "range"]
)
def test_exactly_the_frames_asked_for_are_returned(clips, indices):
    frames = read_frames(clips / "fast.mp4", indices)
    assert frames.dtype == np.uint8 and frames.shape == (len(indices), HEIGHT, WIDTH, 3)
    assert numbers(frames) == list(indices)


@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
@pytest.mark.parametrize("mirrored", [False, True])
def test_display_matrix_is_applied(tmp_path, quarter_turns, mirrored):
    """As in FFmpeg, a frame is turned first, then mirrored from left to right."""
    path = clip(tmp_path / "turned.mp4", frames=10, quarter_turns=quarter_turns, mirrored=mirrored)
    assert probe_video(path) == VideoInfo(10, 24.0, HEIGHT, WIDTH)
    assert numbers(read_frames(path, range(10))) == list(range(10))


@pytest.mark.parametrize(
    ("name", "codec"),
    [("x.mp4", "libx265"), ("x.mp4", "libsvtav1"), ("x.webm", "libvpx-vp9"), ("x.avi", "mpeg4"), ("x.mkv", "libx264")],
)
def test_frames_after_a_seek_are_exact_in_every_codec(tmp_path, name, codec):
    path = clip(tmp_path / name, frames=70, codec=codec)
    info = probe_video(path)
    assert (info.frames, info.height, info.width) == (70, HEIGHT, WIDTH) and info.fps == pytest.approx(24, abs=0.05)
    for first in range(40, 56):  # windows that begin before, at and after a keyframe; x265's groups are open
        assert numbers(read_frames(path, range(first, 69, 3))) == list(range(first, 69, 3))


@pytest.mark.parametrize("name", ["long.mp4", "long.mkv", "h264.ts", "h264.avi", "mpeg4_b.avi", "h264.flv", "vfr.mp4"])
def test_frames_are_those_of_decoding_from_the_start(name):
    """Without an index (.ts) a seek may land behind the frame. B frames in .avi have no presentation times."""
    with av.open(str(CASES / name)) as container:
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert probe_video(CASES / name).frames == len(whole)
    for first in range(0, len(whole), 7):
        window = range(first, min(first + 9, len(whole)), 4)
        for number, frame in zip(window, read_frames(CASES / name, window), strict=True):
            assert np.array_equal(frame, whole[number]), number


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video"])
def test_recording_that_begins_between_keyframes_is_shown_from_the_first_on(tmp_path, codec):
    path = clip(tmp_path / "whole.ts", frames=70, codec=codec)
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    later = next(p for p in packets[1:] if p.is_keyframe)
    content = path.read_bytes()
    cut = tmp_path / "cut.ts"
    cut.write_bytes(content[: 188 * 3] + content[packets[9].pos :])  # the tables, then from the tenth frame on
    info = probe_video(cut)
    first = round((later.pts - packets[0].pts) * later.time_base * 24)
    assert info.frames == 70 - first and info.fps == pytest.approx(24) and info.duration is None
    assert numbers(read_frames(cut, range(info.frames))) == list(range(first, 70))
    assert numbers(read_frames(cut, [30])) == [first + 30]


# ---- at a rate ----


def seconds(frames: np.ndarray) -> list[float]:
    """Returns the time of each frame of a case whose grey value is 60 times the time."""
    return [float(frame.mean()) / 60 for frame in frames]


@pytest.mark.parametrize("name", ["vfr.mp4", "cfr30.mp4"])
def test_frames_at_a_rate_show_their_time(name):
    """vfr.mp4: 2 s at 30 frames a second, then 2 s at 5. cfr30.mp4: 4 s at 30, its timestamps rounded to ms."""
    frames = read_frames(CASES / name, range(64), fps=16)
    step = [1 / 30 if name == "cfr30.mp4" or n < 32 else 1 / 5 for n in range(64)]
    shown = [int(n / 16 / s + 1e-6) * s for n, s in enumerate(step)]
    assert seconds(frames) == pytest.approx(shown, abs=0.025)
    assert seconds(frames[[16, 32, 48]]) == pytest.approx([1, 2, 3], abs=0.025)
    with pytest.raises(VideoError, match="the file has 64"):
        read_frames(CASES / name, [64], fps=16)


def test_length_at_a_rate_follows_from_timestamps_and_the_last_duration():
    info = probe_video(CASES / "vfr.mp4")
    assert info == VideoInfo(70, 17.5, 64, 64, duration=4.0)
    assert [resampled_length(info, fps) for fps in (16, 30, 2.5, None)] == [64, 120, 10, 70]


TIMES = {  # name: (when each frame is shown, for how long the last one), in s; the headers say 30 a second
    "a frame for 3 s": ([0, 0.1, 0.2, 3.2, 3.3, 3.4], 0.1),
    "the last one for 3 s": ([0, 0.1, 0.2, 0.3], 3.0),
    "slower and slower": ([0, 0.033, 0.1, 0.25, 0.6, 1.9], 0.033),
    "late from the start": ([1.5, 1.6, 1.9, 2.1], 0.2),
}


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv", "ts"])
def test_variable_rates_are_followed_in_every_container(tmp_path, name, suffix):
    times, last = TIMES[name]
    last = 0.1 if suffix == "flv" else last  # flv declares the whole duration: else the file counts as cut off
    codec = {"flv": "flv1", "ts": "libx264"}.get(suffix, "mpeg4")
    path = timed(tmp_path / f"x.{suffix}", times, last, codec=codec)
    info = probe_video(path)
    if suffix == "mp4":  # the other containers do not store how long the last frame is shown
        assert info.duration == pytest.approx(times[-1] + last - times[0], abs=1e-3)
    for fps in (16, 7):
        length = resampled_length(info, fps)
        shown = [max(k for k, t in enumerate(times) if t - times[0] <= n / fps + 1e-6) for n in range(length)]
        assert length >= (times[-1] - times[0]) * fps and numbers(read_frames(path, range(length), fps=fps)) == shown


@pytest.mark.parametrize(
    ("name", "rate"), [("x.mp4", Fraction(24000, 1001)), ("x.mkv", Fraction(24000, 1001)), ("x.mkv", 30)]
)
def test_constant_rates_stay_constant_where_the_container_rounds(tmp_path, name, rate):
    path = clip(tmp_path / name, frames=50, fps=rate)
    assert probe_video(path) == VideoInfo(50, float(rate), HEIGHT, WIDTH)
    near = round(rate)
    assert numbers(read_frames(path, range(50), fps=near)) == list(range(50)), "no frame twice"
    step = float(rate) / 15
    assert numbers(read_frames(path, range(25), fps=15)) == [int(n * step + 1e-6) for n in range(25)]


# ---- pictures ----


def test_still_image_is_a_video_of_one_frame(tmp_path):
    Image.fromarray(draw(77)).save(tmp_path / "still.png")
    assert probe_video(tmp_path / "still.png") == VideoInfo(1, 0.0, HEIGHT, WIDTH)
    assert np.array_equal(read_frames(tmp_path / "still.png", [0])[0], draw(77))
    Image.fromarray(draw(5)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-300])
    with pytest.raises(VideoError, match="cut.jpg"):
        probe_video(tmp_path / "cut.jpg")


def test_grey_of_16_bits_keeps_its_high_byte(tmp_path):
    values = np.arange(0, 65536, 257 * 3, dtype=np.uint16).reshape(2, 43)
    Image.fromarray(values).save(tmp_path / "grey.png")
    assert Image.open(tmp_path / "grey.png").mode == "I;16"
    assert np.array_equal(read_frames(tmp_path / "grey.png", [0])[0], np.repeat((values >> 8)[..., None], 3, axis=2))
    assert 120 < read_frames(CASES / "gray16.png", [0]).mean() < 135


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_white(tmp_path, mode):
    picture = Image.new("RGBA", (4, 2), (90, 90, 90, 255))
    picture.putpixel((0, 0), (90, 90, 90, 0))
    picture = picture.convert("LA") if mode == "LA" else picture
    if mode == "P":
        picture = Image.new("P", (4, 2), 1)
        picture.putpalette([7, 8, 9, 90, 90, 90])
        picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "x.png", **({"transparency": 0} if mode == "P" else {}))
    seen = read_frames(tmp_path / "x.png", [0])[0]
    assert seen[0, 0].tolist() == [255] * 3 and (seen.reshape(-1, 3)[1:] == 90).all()


@pytest.mark.parametrize("kind", ["webp", "png", "gif"])
def test_animated_picture_is_a_video_with_its_durations(tmp_path, kind):
    first, *more = [Image.fromarray(draw(number)) for number in (3, 200, 77)]
    path, lossless = tmp_path / f"x.{kind}", {"lossless": True} if kind == "webp" else {}
    first.save(path, save_all=True, append_images=more, duration=[100, 300, 200], loop=0, **lossless)
    info = probe_video(path)
    assert (info.frames, info.height, info.width, info.duration) == (3, HEIGHT, WIDTH, pytest.approx(0.6))
    assert numbers(read_frames(path, range(6), fps=10)) == [3, 200, 200, 200, 77, 77]
    assert numbers(read_frames(path, [2, 0])) == [77, 3]
    first.save(path, save_all=True, append_images=more, duration=125, loop=0, **lossless)
    assert probe_video(path) == VideoInfo(3, pytest.approx(8 if kind != "gif" else 1 / 0.12), HEIGHT, WIDTH)


def test_default_picture_of_an_animated_png_and_further_versions_of_a_jpeg_are_not_shown(tmp_path):
    first, *more = [Image.fromarray(draw(number)) for number in (3, 200, 77)]
    first.save(tmp_path / "x.png", save_all=True, append_images=more, duration=100, default_image=True)
    assert probe_video(tmp_path / "x.png").frames == 2
    assert numbers(read_frames(tmp_path / "x.png", [0, 1])) == [200, 77]
    first.save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=more)
    assert probe_video(tmp_path / "x.jpg") == VideoInfo(1, 0.0, HEIGHT, WIDTH)


# ---- damage ----


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_file_raises_video_error(clips, tmp_path, kind):
    path = damage(tmp_path / "bad.mp4", kind, clips / "fast.mp4")
    with pytest.raises(VideoError) as caught:
        read_frames(path, range(120))
    assert caught.value.path == str(path) and caught.value.reason


@pytest.mark.parametrize("kind", [k for k in DAMAGES if k not in ("flipped bytes", "zeroed")])
def test_probe_rejects_what_is_no_whole_video(clips, tmp_path, kind):
    with pytest.raises(VideoError, match="bad.mp4"):
        probe_video(damage(tmp_path / "bad.mp4", kind, clips / "fast.mp4"))


def test_truncated_mkv_without_a_frame_index_is_rejected(tmp_path):
    path = clip(tmp_path / "x.mkv", frames=120)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match="truncated"):
        probe_video(path)


def test_video_without_timestamps_is_rejected(tmp_path):
    with pytest.raises(VideoError, match="without timestamps"):
        probe_video(clip(tmp_path / "x.h264", frames=10))


def test_audio_alone_and_missing_file_raise_video_error(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="no video stream"):
        probe_video(tmp_path / "sound.mp4")
    with pytest.raises(VideoError, match="gone.mp4"):
        probe_video(tmp_path / "gone.mp4")


def test_index_outside_the_file_raises_video_error(clips):
    with pytest.raises(VideoError, match="the file has 40"):
        read_frames(clips / "b.mp4", [0, 40])


@pytest.mark.parametrize(("height", "width"), [(32, 48), (32, 32), (48, 32), (128, 160)])
def test_resize_crop_keeps_the_centre_and_the_aspect(height, width):
    frame = np.zeros((2, 64, 96, 3), np.uint8)
    frame[:, 28:36, 44:52] = 255  # a square of 8 in the centre
    out = resize_crop(frame, height, width)
    assert out.shape == (2, height, width, 3) and out.dtype == np.uint8
    rows, columns = np.nonzero(out[0, :, :, 0] > 127)
    side = 8 * max(height / 64, width / 96)
    assert abs(np.ptp(rows) + 1 - side) <= 1 and abs(np.ptp(columns) + 1 - side) <= 1
    assert abs(rows.mean() - (height - 1) / 2) <= 1 and abs(columns.mean() - (width - 1) / 2) <= 1


# ---- decord ----


def test_decord_reads_what_it_reads_right_and_no_open_groups(tmp_path):
    pytest.importorskip("decord")
    for name in ("long.mp4", "long.mkv", "vfr.mp4"):
        assert decord_refusal(CASES / name) is None
        for window in (range(3, 40, 2), [25], [0, 69]):
            by_decord = read_frames(CASES / name, window, fps=16 if len(window) > 2 else None, decoder="decord")
            by_pyav = read_frames(CASES / name, window, fps=16 if len(window) > 2 else None)
            assert np.array_equal(by_decord, by_pyav)
    refused = {"h264.ts": "another container", "h264.avi": "another container", "gray16.png": "a picture"}
    for name, why in refused.items():
        assert why in decord_refusal(CASES / name)
    assert "open groups" in decord_refusal(clip(tmp_path / "open.mp4", frames=70, codec="libx265"))
    assert "first or last picture" in decord_refusal(clip(tmp_path / "turned.mp4", frames=30, mirrored=True))
    with pytest.raises(VideoError, match="gone.mp4"):
        decord_refusal(tmp_path / "gone.mp4")
