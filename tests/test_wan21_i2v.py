"""Image-to-video of Wan2.1: condition and samples equal those of diffusers' pipeline; pictures; prompt files."""

import dataclasses
import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import wan_case as case
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanVideoToVideoPipeline
from PIL import Image
from ranks import run_ranks
from test_wan21 import close

from common import device
from common.diffusion.buckets import Bucket
from common.diffusion.requests import Request, check_clip, check_requests, read_clip, read_frame, read_requests
from common.diffusion.videos import write_video

pytestmark = [pytest.mark.L2, pytest.mark.usefixtures("one_rank")]

infer, encoders = (import_module(f"zoo.{case.RECIPE}.{name}") for name in ("infer", "encoders"))
FOLDER, PROMPT = case.jobs.DEMO_I2V, "a handwritten three moves to the left"


@pytest.fixture(scope="module")
def pipeline() -> WanImageToVideoPipeline:
    loaded = WanImageToVideoPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def frames() -> "encoders.FrameEncoder":
    return encoders.FrameEncoder(FOLDER, encoders.VideoCodec(FOLDER, device.current()))


def pictures(count: int, height: int = 48, width: int = 48) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("last", [False, True], ids=["first", "first and last"])
@pytest.mark.parametrize("length", [5, 13])
def test_condition_equals_that_of_the_diffusers_pipeline(pipeline, frames, last, length):
    shown = pictures(1 + last, 48, 64)
    pixels = [pipeline.video_processor.preprocess(p, height=48, width=64).float() for p in shown]
    _, y = pipeline.prepare_latents(
        pixels[0], 1, 16, 48, 64, length, torch.float32, torch.device("cpu"), None, None, pixels[1] if last else None
    )
    image = pipeline.encode_image(shown).flatten(0, 1)[None]
    given = torch.from_numpy(np.stack([np.asarray(p) for p in shown])).permute(3, 0, 1, 2)[None]  # [1, 3, n, H, W]
    got = frames.encode(given, length)
    assert got["y"].shape == y.shape and close(got["y"], y) and torch.equal(got["y"][:, :4], y[:, :4])
    assert close(got["image"], image)


def test_sampling_equals_the_diffusers_pipeline(pipeline, frames, tmp_path):
    o = case.jobs.parse("train", ["--job", "finetune", "--task", "i2v"])
    config = dataclasses.replace(case.config.model_config(o), text_len=512)  # with an image diffusers supports no other
    chunk = case.model.build(o, config)[0]
    case.convert.fill([chunk], o, config, case.model.draw)
    encoder = encoders.TextEncoder(FOLDER, device.current(), torch.float32, config.text_len)
    grid, bucket = (4, 6, 6), Bucket(13, 48, 48)
    pictures(1)[0].save(tmp_path / "a.png")
    got = infer.sample(
        [chunk], o, config, encoder.encode([PROMPT]), encoder.encode([""])[0], grid, [5],
        sampler="unipc", shift=5.0, steps=4, cfg=4.0,
        condition=infer.condition_on(frames, [Request(PROMPT, tmp_path / "a.png")], bucket, "exact"),
    )  # fmt: skip
    want = pipeline(
        image=Image.open(tmp_path / "a.png"), prompt=PROMPT, negative_prompt="", height=48, width=48, num_frames=13,
        num_inference_steps=4, guidance_scale=4.0, max_sequence_length=512, output_type="latent",
        latents=torch.randn(16, *grid, generator=torch.Generator().manual_seed(5))[None],
    ).frames  # fmt: skip
    assert close(got, want)


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_video_to_video_equals_the_diffusers_pipeline(frames, sampler):
    folder = case.jobs.DEMO_WEIGHTS
    o = case.jobs.parse("train", ["--job", "finetune"])
    config = case.config.model_config(o)
    chunk = case.model.build(o, config)[0]
    case.convert.fill([chunk], o, config, case.model.draw)
    encoder = encoders.TextEncoder(folder, device.current(), torch.float32, config.text_len)
    shown, grid = pictures(13), (4, 6, 6)
    clip = torch.from_numpy(np.stack([np.asarray(p) for p in shown])).permute(3, 0, 1, 2)[None]  # [1, 3, F, H, W]
    got = infer.sample(
        [chunk], o, config, encoder.encode([PROMPT]), encoder.encode([""])[0], grid, [5],
        sampler=sampler, shift=5.0, steps=5, cfg=4.0, start=frames.codec.encode(clip), strength=0.7,
    )  # fmt: skip
    pipeline = WanVideoToVideoPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae_scale_factor_spatial = 8  # it counts the VAE's stages, but the tiny VAE folds 2x2 pixels instead
    if sampler == "euler":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    want = pipeline(
        video=shown, prompt=PROMPT, negative_prompt="", height=48, width=48, num_inference_steps=5, strength=0.7,
        guidance_scale=4.0, max_sequence_length=config.text_len, output_type="latent",
        generator=torch.Generator().manual_seed(5),
    ).frames  # fmt: skip
    assert close(got, want)


def test_a_clip_is_read_at_the_rate_asked_and_must_be_long_enough(tmp_path):
    bucket = Bucket(5, 48, 48)
    video = np.repeat(np.arange(0, 250, 25, dtype=np.uint8)[:, None, None, None], 48, 1).repeat(48, 2).repeat(3, 3)
    [path] = write_video(video, tmp_path / "a", 16, "mp4")  # ten frames, each lighter than the one before
    check_clip(path, bucket, 8.0, "exact")
    shades = read_clip(path, bucket, 8.0, "exact").mean((1, 2, 3))
    assert np.abs(shades - [0, 50, 100, 150, 200]).max() < 5
    with pytest.raises(ValueError, match="5 frames at 8 fps .10 at 16.; expected 9; fix: --video"):
        check_clip(path, Bucket(9, 48, 48), 8.0, "exact")


@pytest.mark.parametrize(("fit", "rows", "columns"), [("crop", 48, 48), ("pad", 24, 48)])
def test_a_picture_of_another_aspect_is_refused_or_fitted_as_asked(fit, rows, columns, tmp_path):
    path, bucket = tmp_path / "wide.png", Bucket(5, 48, 48)
    Image.fromarray(np.full((60, 120, 3), 255, np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"120x60 \(aspect 2.000\).*48x48 \(1.000\).*fix: --fit crop"):
        check_requests([Request("x", path)], bucket, "exact")
    check_requests([Request("x", path)], bucket, fit)
    shown = read_frame(path, 0, bucket, fit)[..., 0] > 0
    assert shown.shape == (48, 48) and shown.any(1).sum() == rows and shown.any(0).sum() == columns


def test_a_run_between_first_and_last_frames_trains_in_a_layout_and_its_export_samples(tmp_path):
    make_data = import_module(f"zoo.{case.RECIPE}.demo.make_data")
    make_data.make(tmp_path / "clips", train=8, test=0)
    run, export = tmp_path / "run", tmp_path / "export"
    options = [
        "--job",
        "pretrain",
        "--task",
        "i2v",
        "--size",
        "tiny-flf2v",
        "--data",
        tmp_path / "clips" / "train.jsonl",
    ]
    short = ["--buckets", "13x48x48", "--steps", 2, "--global-batch", 4, "--workers", 0, "--sample-steps", 1]
    run_ranks(2, case.job, "train", *options, *short, "--tp", 2, "--sp", "--out", run, "--export", export)
    assert len(case.steps_of(run)) == 2 and len(list((run / "samples").glob("*.gif"))) == 4
    assert case.config.size_of(export) == "tiny-flf2v"
    shown = [FOLDER / "../images" / name for name in ("three.png", "seven.png")]
    argv = [
        "--weights",
        export,
        "--prompt",
        PROMPT,
        "--video",
        "5x48x48",
        "--sample-steps",
        2,
        "--out",
        tmp_path / "out",
    ]
    run_ranks(1, case.job, "infer", *argv, "--image", shown[0], "--last-image", shown[1], "--fit", "crop")
    with Image.open(tmp_path / "out" / "0000.gif") as gif:
        assert gif.n_frames == 5


REFUSED = {
    "no tab": ("prompts.tsv", "a.png\tone\njust words\n", 1, r"prompts.tsv:2: 'just words'; expected"),
    "no last picture": ("prompts.tsv", "a.png\tone\n", 2, r"prompts.tsv:1: .*LAST PICTURE"),
    "broken row": ("prompts.jsonl", '{"image": "a.png"\n', 1, r"prompts.jsonl:1: malformed JSON"),
    "wrong key": ("prompts.jsonl", '{"image": "a.png", "text": "one"}\n', 1, r"prompts.jsonl:1: .*image, prompt"),
    "no picture": ("prompts.jsonl", '{"prompt": "one"}\n', 1, r"prompts.jsonl:1: image is None; .*image, prompt"),
    "a picture too many": (
        "prompts.jsonl",
        '{"prompt": "one", "image": "a.png"}\n',
        0,
        r"prompts.jsonl:1: image is 'a.png'",
    ),
    "empty prompt": ("prompts.jsonl", '{"prompt": "one"}\n{"prompt": " "}\n', 0, r"prompts.jsonl:2: prompt is ' '"),
    "JSON in a .txt": ("prompts.txt", '{"prompt": "one"}\n', 0, r"prompts.txt:1 is a row of JSON"),
    "another encoding": ("prompts.tsv", b"a.png\tcaf\xe9\n", 1, r"prompts.tsv:1: the bytes e9"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_row_of_prompts_that_is_not_of_the_form_is_refused_with_its_line(what, tmp_path):
    name, text, count, message = REFUSED[what]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_requests(tmp_path / name, "--prompts", count)


def test_prompts_with_pictures_are_read_from_lines_and_from_json(tmp_path):
    (tmp_path / "a.tsv").write_bytes("\ufeffx/first.png\tlast.png\tone,\u2028two\r\n\r\n".encode())
    row = {"image": "x/first.png", "last_image": "last.png", "prompt": "one,\u2028two", "id": 7}
    (tmp_path / "b.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    want = [Request("one,\u2028two", tmp_path / "x/first.png", tmp_path / "last.png")]
    assert read_requests(tmp_path / "a.tsv", "--prompts", 2) == want
    assert read_requests(tmp_path / "b.jsonl", "--prompts", 2) == want


def test_rows_of_json_are_prompts_of_text_to_video_and_not_their_text():
    requests = read_requests(Path(__file__).parent / "cases" / "wan21" / "prompts.jsonl", "--prompts")
    assert [request.prompt for request in requests] == [
        "a handwritten three moves to the left", "a handwritten seven moves up"
    ]  # fmt: skip


WRONG = {
    "t2v launcher, i2v weights": (["--task", "t2v", "--weights", "I2V", "--prompt", "x"], "launcher named _i2v.sh"),
    "i2v launcher, t2v weights": (["--task", "i2v", "--weights", "T2V", "--prompt", "x"], "launcher named _t2v.sh"),
    "t2v launcher, i2v size": (["--task", "t2v", "--size", "tiny-i2v"], "launcher named _i2v.sh"),
    "no picture": (["--task", "i2v", "--prompt", "x"], "no picture; expected --image"),
    "an empty prompt": (["--task", "t2v", "--prompt", ""], "--prompt is empty"),
    "a blank prompt": (["--task", "i2v", "--prompt", " ", "--image", "a.png"], "--prompt is empty"),
    "two kinds of prompts": (["--prompt", "x", "--prompts", "PROMPTS"], "expected one of them"),
    "a picture too many": (["--task", "i2v", "--prompt", "x", "--image", "a", "--last-image", "b"], "--last-image"),
    "a picture for text-to-video": (["--task", "t2v", "--prompt", "x", "--image", "a"], "text-to-video with --image"),
    "a picture that is not there": (["--task", "i2v", "--prompt", "x", "--image", "no.png"], "no.png"),
    "no strength": (["--task", "t2v", "--video", "1x48x48", "--video-in", "CLIP", "--strength", "0.01"], "--strength"),
    "a video of one frame": (["--task", "i2v", "--video", "1x48x48"], "at least 5 frames"),
}


@pytest.mark.parametrize("what", WRONG)
def test_pictures_and_weights_of_another_task_are_refused(what):
    argv, part = WRONG[what]
    folders = {"I2V": str(FOLDER), "T2V": str(case.jobs.DEMO_WEIGHTS), "CLIP": str(FOLDER / "../images/three.png")}
    folders["PROMPTS"] = str(Path(__file__).parent / "cases" / "wan21" / "prompts.jsonl")
    with pytest.raises(ValueError, match="fix: ") as error:
        case.jobs.parse("infer", [folders.get(word, word) for word in argv])
    assert part in str(error.value) and "\n" not in str(error.value)
