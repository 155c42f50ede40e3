"""Evaluation: each score equals its formula, or transformers' own; the job on the demo; refusals."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
import wan_case as case
from ranks import run_ranks
from scipy.linalg import sqrtm

from common import worker
from common.diffusion import scores
from common.video import probe_video, read_frames

TOLERANCE = 1e-5
CLIP_TEXT = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
             "vocab_size": 400, "max_position_embeddings": 12, "eos_token_id": 1}  # fmt: skip
VISION = {"hidden_size": 36, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 32, "patch_size": 16}  # fmt: skip


def clips(count: int = 3) -> list[np.ndarray]:
    """Draws videos, uint8 [F, H, W, 3], neither square nor of the models' size."""
    return list(np.random.default_rng(0).integers(256, size=(count, 5, 40, 56, 3), dtype=np.uint8))


def vision_model(kind: str, folder):
    """Makes a tiny model, every parameter drawn, and its image processor. Saves both and returns both."""
    torch.manual_seed(3)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=20)
        model, processor = transformers.CLIPModel(config), transformers.CLIPImageProcessor
        shutil.copytree(case.jobs.DEMO_WEIGHTS / "tokenizer", folder)
    elif kind == "dinov2":
        config = transformers.Dinov2Config(**VISION, mlp_ratio=2)
        model, processor = transformers.Dinov2Model(config), transformers.BitImageProcessor
    else:
        config = transformers.VideoMAEConfig(**VISION, num_frames=4, tubelet_size=2)
        model, processor = transformers.VideoMAEModel(config), transformers.VideoMAEImageProcessor
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    image_processor = processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image_processor.save_pretrained(folder)
    return model.eval(), image_processor


# ---------------------------------------------------------------------------------------------------------- one score


@pytest.mark.L2
@pytest.mark.parametrize("features", [6, 40])  # fewer features than clips, and more
def test_frechet_distance_is_the_closed_formula(features):
    generator = np.random.default_rng(0)
    a = generator.normal(size=(30, features)) @ generator.normal(size=(features, features))
    b = 2 + generator.normal(size=(25, features)) @ generator.normal(size=(features, features))
    means, (A, B) = a.mean(0) - b.mean(0), (np.cov(x, rowvar=False) for x in (a, b))
    root = np.trace(sqrtm(A @ B)).real if features < 25 else np.sqrt(np.linalg.eigvals(A @ B).real.clip(0)).sum()
    want = means @ means + np.trace(A) + np.trace(B) - 2 * root
    rounding = 1e-9 if features < 25 else 1e-7  # the formula takes roots of eigenvalues that are 0 but for rounding
    assert scores.frechet_distance(a, b) == pytest.approx(want, rel=rounding)
    assert scores.frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * np.trace(A))
    assert scores.frechet_distance(a, a + 3) == pytest.approx(9 * features, rel=1e-9)


@pytest.mark.L2
def test_clip_score_is_transformers_own_logits(tmp_path):
    model, processor = vision_model("clip", tmp_path / "clip")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "clip")
    score = scores.ClipScore(tmp_path / "clip", torch.device("cpu"))
    for video, caption in zip(clips(), ["a handwritten three moves up", "one", "to the left " * 9], strict=True):
        text = tokenizer([caption], truncation=True, max_length=12, return_tensors="pt")
        pixels = processor(list(video), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = model(input_ids=text.input_ids, attention_mask=text.attention_mask, pixel_values=pixels)
        want = 100 * (logits.logits_per_image / model.logit_scale.exp()).mean().item()
        assert score(video, caption) == pytest.approx(want, rel=TOLERANCE)


@pytest.mark.L2
@pytest.mark.parametrize("kind", ["clip", "dinov2", "videomae"])
def test_features_are_the_models_own_a_frame_at_a_time(kind, tmp_path):
    model, processor = vision_model(kind, tmp_path / kind)
    features = scores.Features(tmp_path / kind, torch.device("cpu"))
    for video in clips():
        with torch.no_grad():
            if kind == "videomae":  # 4 of 5 frames
                pixels = processor([video[i] for i in (0, 1, 3, 4)], return_tensors="pt")["pixel_values"]
                want = model(pixels).last_hidden_state[0].mean(0)
            else:
                vision = model.vision_model if kind == "clip" else model
                pixels = [processor(frame, return_tensors="pt")["pixel_values"] for frame in video]
                want = torch.cat([vision(p).pooler_output for p in pixels]).mean(0)
        got = torch.from_numpy(features(video))
        assert got.shape == (36,) and (got - want).abs().max() <= TOLERANCE * want.abs().max()


STAND_IN = """
import json, os
class VBench:  # the signatures of vbench 0.1.5
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.output_path = device, output_path
    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        assert mode == "custom_input" and sorted(prompt_list) == sorted(os.listdir(videos_path))
        assert "RANK" not in os.environ and self.device.type == "cpu"
        found = {d: [len(prompt_list) / 8, []] for d in dimension_list}
        with open(os.path.join(self.output_path, name + "_eval_results.json"), "w") as file:
            json.dump(found, file)
"""


# ---------------------------------------------------------------------------------------------------------------- jobs


def job(*argv) -> None:
    worker.run(f"zoo.{case.RECIPE}", "evaluate", case.jobs.parse("evaluate", [*map(str, argv)]))


def refused(*argv) -> str:
    with pytest.raises(ValueError, match="fix: ") as error:
        job(*argv)
    return str(error.value)


@pytest.mark.L4
def test_the_job_goes_on_where_it_stopped_in_any_layout_and_says_what_it_did_not_measure(tmp_path):
    for kind in ("clip", "videomae"):
        vision_model(kind, tmp_path / kind)
    out = tmp_path / "out"
    settings = ["--sample-steps", 3, "--micro-batch", 3, "--out", out]
    run_ranks(2, job, *settings, "--limit", 5)
    rows = {row["score"]: row for row in json.loads((out / "results.json").read_text())["scores"]}
    assert list(rows) == ["digit", "direction", "both", "FVD-like", "CLIP score"]
    assert all(rows[key]["real"] == 1.0 and rows[key]["n"] == 5 for key in ("digit", "direction", "both"))
    assert [rows[key]["note"] for key in ("FVD-like", "CLIP score")] == [
        "not measured: needs --feature-model DIR",
        "not measured: needs --clip DIR",
    ]
    assert (out / "real_above_sampled_below.gif").is_file()
    # One is lost and one more is wanted: these two are made, the others are kept, in another layout.
    files = [out / "videos" / f"{i:05d}.mp4" for i in range(6)]
    lost = frames(files[3])
    files[3].unlink()
    made_at = {file: file.stat().st_mtime_ns for file in files if file.is_file()}
    models = ["--feature-model", tmp_path / "videomae", "--clip", tmp_path / "clip"]
    run_ranks(2, job, *settings, "--limit", 6, "--tp", 2, "--sp", *models)
    assert all(file.stat().st_mtime_ns == before for file, before in made_at.items()) and len(made_at) == 4
    assert np.abs(frames(files[3]) - lost).mean() < 0.5  # of 255: the codec sees rounding differences
    rows = {row["score"]: row for row in json.loads((out / "results.json").read_text())["scores"]}
    assert rows["digit"]["n"] == 6 and rows["FVD-like"]["samples"] > 0
    assert "videomae, 36 features, to 6 real clips; no more clips than features" in rows["FVD-like"]["note"]
    message = run_ranks(1, refused, *settings, "--limit", 6, "--cfg", 2)[0]
    assert "cfg 4.0, not 2.0" in message and "fix: --out" in message
    # The same files, given as videos that exist, get the same scores.
    demo_list = case.jobs.demo_list("test")
    rows_of_list = [json.loads(line) for line in demo_list.read_text().splitlines()][:6]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(r | {"path": str(demo_list.parent / r["path"])}) + "\n" for r in rows_of_list))
    python = stand_in(tmp_path)
    argv = ["--data", own, *models, "--vbench", "motion_smoothness", "--vbench-python", python]
    run_ranks(2, job, "--videos", out / "videos", *argv, "--out", tmp_path / "again")
    again = {row["score"]: row for row in json.loads((tmp_path / "again" / "results.json").read_text())["scores"]}
    for key, side in (("FVD-like", "samples"), ("CLIP score", "samples"), ("CLIP score", "real")):
        assert again[key][side] == pytest.approx(rows[key][side], rel=TOLERANCE)
    assert again["VBench motion_smoothness"]["samples"] == 6 / 8


def stand_in(folder):
    """Makes an interpreter whose package vbench is a stand-in."""
    (folder / "vb").mkdir()
    (folder / "vb" / "vbench.py").write_text(STAND_IN)
    python = folder / "vb" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder / "vb"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def frames(path) -> np.ndarray:
    return read_frames(path, range(probe_video(path).frames)).astype(np.float32)


WRONG = {
    "videos alone": ("--videos {folder}", ["--data"]),
    "fewer videos than rows": ("--videos {folder} --data {data}", ["0 mp4s for 1 rows", "--limit"]),
    "no such list": ("--data no.jsonl", ["no.jsonl", "--data"]),
    "captions twice": ("--data {data} --prompt x", ["--data has captions", "--prompts"]),
    "no model": ("--feature-model {folder}", ["config.json", "--feature-model"]),
    "no clip": ("--clip {vision}", ["is a dinov2", "--clip"]),
    "pickles": ("--feature-model {pickled}", [".safetensors", "--feature-model"]),
    "no such dimension": ("--vbench color", ["vbench=color", "motion_smoothness"]),
    "no vbench": ("--vbench motion_smoothness", ["no package vbench", "--vbench-python"]),
    "shape of the demo": ("--video 13x64x64", ["13x48x48", "--video"]),
    "no captions": ("--limit 0", ["limit=0", "--limit"]),
    "a video to start from": ("--video-in {data}", ["--video-in", "leave it out"]),
    "no checkpoint": ("--checkpoint nowhere", ["nowhere", "--checkpoint"]),
}


@pytest.mark.L4
def test_bad_input_is_said_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "a.mp4").write_bytes(b"")
    for name, files in (("folder", ()), ("pickled", ("config.json", "preprocessor_config.json", "pytorch_model.bin")),
                        ("vision", ("config.json", "preprocessor_config.json", "model.safetensors"))):  # fmt: skip
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text('{"model_type": "dinov2"}')
    (tmp_path / "data.jsonl").write_text('{"path": "a.mp4", "caption": "a"}\n')
    places = {p.stem: p for p in tmp_path.iterdir()}
    for case_name, (argv, parts) in WRONG.items():
        with pytest.raises(ValueError, match="fix: ") as error:
            case.jobs.parse("evaluate", argv.format(**places).split())
        assert all(part in str(error.value) for part in parts), (case_name, str(error.value))
