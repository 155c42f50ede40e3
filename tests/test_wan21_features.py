"""extract_features.sh: training on its folder equals online training, without encoders; resume, damage, refusals."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import av
import pytest
import torch
import wan_case as case
from ranks import run_ranks
from safetensors.torch import load_file

from common.diffusion import options as shared
from common.diffusion.dataset import Index
from common.diffusion.features import FeatureDataset

pytestmark = pytest.mark.L4

DEMO = case.jobs.DEMO_WEIGHTS
CLIPS = 13


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Makes a list of 13 videos, one of which is damaged so that only decoding detects it."""
    folder = tmp_path_factory.mktemp("clips") / "demo"
    import_module(f"zoo.{case.RECIPE}.demo.make_data").make(folder, train=CLIPS, test=0)
    damaged = folder / "clips" / "train-00005.mp4"
    with av.open(str(damaged)) as container:
        later = list(container.streams.video[0].index_entries)[6:]
    content = bytearray(damaged.read_bytes())
    for frame in later:
        content[frame.pos : frame.pos + frame.size] = bytes(frame.size)
    damaged.write_bytes(content)
    return folder / "train.jsonl"


SHAPES = ["--buckets", "13x48x48,9x32x48"]


def extracting(clips: Path, out: Path) -> list:
    return ["--data", clips, *SHAPES, "--out", out, "--rows-of-shard", "3", "--workers", "0", "--max-drop", "0.1"]


@pytest.fixture(scope="module")
def folder(clips, tmp_path_factory) -> Path:
    """Extracts the features with two processes."""
    out = tmp_path_factory.mktemp("features") / "features"
    run_ranks(2, case.job, "extract", *extracting(clips, out))
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted((folder / "shards").glob("*.safetensors")) for k, v in load_file(path).items()}


def trained(out: Path, *options) -> dict:
    fixed = ["--job", "finetune", "--global-batch", "4", "--micro-batch", "2", "--steps", "5", "--workers", "0"]
    fixed += ["--sample-steps", "2", "--lr", "1e-5", "--lr-schedule", "constant", "--warmup", "1", "--max-drop", "0.1"]
    run_ranks(1, case.job, "train", *fixed, "--out", out, *options)
    return case.steps_of(out)


def test_features_train_as_online_does_without_the_encoders(clips, folder, tmp_path):
    """In both, the same other row replaces the one that cannot be decoded."""
    bare = tmp_path / "bare"
    shutil.copytree(DEMO, bare, ignore=shutil.ignore_patterns("vae", "text_encoder", "tokenizer"))
    online = trained(tmp_path / "online", "--data", clips, *SHAPES)
    drops = [json.loads(line) for line in (tmp_path / "online" / "drops.jsonl").read_text().splitlines()]
    assert [(d["reason"], d["where"]) for d in drops[1:]] == [("corrupt video (decode)", "train.jsonl:6")]
    for name, weights in (("features", DEMO), ("bare", bare)):
        got = trained(tmp_path / name, "--features", folder, "--weights", weights)
        assert got.keys() == online.keys()
        for step, numbers in online.items():
            assert got[step] == pytest.approx(numbers, rel=1e-6), step
    assert list((tmp_path / "features" / "samples").glob("*.gif")) and not (tmp_path / "bare" / "samples").exists()


def test_image_conditions_are_features_too(clips, tmp_path):
    image = ["--size", "tiny-i2v", "--weights", case.jobs.DEMO_I2V]
    bare = tmp_path / "bare"
    shutil.copytree(case.jobs.DEMO_I2V / "transformer", bare / "transformer")
    run_ranks(1, case.job, "extract", *extracting(clips, tmp_path / "features"), *image)
    assert {key.partition(".")[2] for key in tensors(tmp_path / "features")} == {"latents", "text", "y", "image"}
    online = trained(tmp_path / "online", "--data", clips, *SHAPES, *image, "--steps", "2")
    got = trained(tmp_path / "run", "--features", tmp_path / "features", *image[:2], "--weights", bare, "--steps", "2")
    for step, numbers in online.items():
        assert got[step] == pytest.approx(numbers, rel=1e-6), step
    with pytest.raises(ValueError, match="was made with .*task 'i2v' and not 't2v'"):
        case.jobs.parse("train", ["--features", str(tmp_path / "features")])


def test_every_row_is_there_or_counted(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["missing"] == [5] and manifest["rows"] == CLIPS
    assert {key.partition(".")[0] for key in tensors(folder)} == {str(i) for i in range(CLIPS) if i != 5}
    drops = [json.loads(line) for line in (folder / "drops.jsonl").read_text().splitlines()]
    assert [d["where"] for d in drops if d["kind"] == "drop"] == ["train.jsonl:6"]


def test_a_stopped_extraction_goes_on_and_makes_the_same_bits(clips, folder, tmp_path):
    out = tmp_path / "features"
    shutil.copytree(folder, out)
    lost, short, kept = (out / "shards" / f"{i:05d}.safetensors" for i in range(3))
    for path in (lost, short):
        whole = path.read_bytes()
        path.unlink()
        if path is short:
            path.write_bytes(whole[:-8])
        with pytest.raises(ValueError, match=f"{path.name} has .* bytes; expected .*; fix: run extract_features.sh"):
            case.jobs.parse("train", ["--features", str(out)])
        before = kept.stat().st_mtime_ns
        run_ranks(1, case.job, "extract", *extracting(clips, out))
        assert kept.stat().st_mtime_ns == before
    want, got = tensors(folder), tensors(out)
    assert want.keys() == got.keys() and all(torch.equal(got[key], want[key]) for key in want)
    assert (out / "manifest.json").read_text() == (folder / "manifest.json").read_text()


def test_a_damaged_shard_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "features")
    shard = tmp_path / "features" / "shards" / "00001.safetensors"
    shard.write_bytes(bytes(200) + shard.read_bytes()[200:])
    index = Index.load(folder / "index.jsonl")
    dataset = FeatureDataset(tmp_path / "features", index)
    dataset.fetch([0])
    with pytest.raises(ValueError, match="00001.safetensors is damaged .*; fix: delete it and run extract_features.sh"):
        dataset.fetch([3])


@pytest.mark.parametrize("script", ["train", "extract"])
def test_drops_while_decoding_count_against_max_drop(clips, tmp_path, script):
    options = ["--data", clips, *SHAPES, "--out", tmp_path, "--workers", "0", "--max-drop", "0.05"]
    options += ["--global-batch", "4", "--steps", "5"] if script == "train" else []
    with pytest.raises(
        AssertionError, match=r"ValueError: dropped 1 rows: 1 corrupt video \(decode\) .*, of 13; .*--max-drop"
    ):
        run_ranks(1, case.job, script, *options)


WRONG = {
    "other buckets": (["--buckets", "13x48x48"], "was made with buckets 13x48x48,9x32x48 and not 13x48x48"),
    "other rate": (["--fps", "8"], "was made with fps 16.0 and not 8.0"),
    "other precision": (["--precision", "bf16"], "was made with precision 'fp32' and not 'bf16'"),
    "other data": (["--data", "my.jsonl"], "--data beside --features"),
    "other encoders": (["--weights", "OTHER"], "was made with vae "),
    "unfinished": (["--features", "OTHER"], "has no manifest.json; expected a finished features folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_features_of_something_else_are_refused(name, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    options, message = WRONG[name]
    other = tmp_path / "other"
    shutil.copytree(DEMO, other)
    weights = next((other / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    options = [str(other) if o == "OTHER" else o for o in options]
    with pytest.raises(ValueError) as error:
        case.jobs.parse("train", ["--features", str(folder), *options])
    assert message in str(error.value) and "fix: " in str(error.value)


def test_an_extraction_goes_on_only_as_it_was_begun(clips, folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    argv = [str(word) for word in extracting(clips, folder)]
    case.jobs.parse("extract", argv)
    for options, message in (
        (["--buckets", "9x48x48"], "was begun with buckets '13x48x48,9x32x48' and not '9x48x48'"),
        (["--tp", "2"], "--tp: extraction splits no model"),
    ):
        with pytest.raises(ValueError, match=message):
            case.jobs.parse("extract", [*argv, *options])


def test_decord_is_refused_where_it_is_missing_and_beside_worker_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    for found, message in (
        (None, "it is not installed; fix: pip install decord"),
        (True, "with workers=2: it hangs in forked processes; fix: --workers 0"),
    ):
        monkeypatch.setattr(shared, "find_spec", lambda name, found=found: found)
        with pytest.raises(ValueError, match=message):
            case.jobs.parse("train", ["--decoder", "decord", "--workers", "2"])
    assert case.jobs.parse("train", ["--decoder", "decord", "--workers", "0"]).decoder == "decord"
