"""Training of Wan2.1 beyond a step's gradients: what a random draw decides, what a pair shares, and which weights are
averaged and sampled."""

import dataclasses
import functools
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import wan_case as case
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from ranks import run_ranks
from safetensors.torch import load_file
from test_resume import tensors

from common import checkpoint, parallel
from common.diffusion.preference import held_out, without_adapters

preference = importlib.import_module(f"zoo.{case.RECIPE}.preference")

# ------------------------------------------------------------------------------------------------- timesteps, positions


def by_index(shift: float) -> tuple[list[float], list[float]]:
    """Computes (t, bell weight) of the timesteps 0 .. 999 by hand."""
    noise = [1 - i / 1000 for i in range(1000)]
    t = [1000 * shift * u / (1 + (shift - 1) * u) for u in noise]
    bell = [math.exp(-2 * ((each - 500) / 1000) ** 2) for each in t]
    bell = [each - min(bell) for each in bell]
    return t, [1000 * each / sum(bell) for each in bell]


@pytest.mark.L2
@pytest.mark.parametrize(
    ("timesteps", "weighting"), [("per-sample", "bell"), ("per-sample", "none"), ("per-batch", "bell")]
)
def test_noise_level_and_loss_weight_are_of_one_timestep_and_every_one_is_drawn(timesteps, weighting, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    o, count = case.options(shift=3.0, timesteps=timesteps, weighting=weighting), 10_000
    latents, text = torch.ones(count, 1, 1, 1, 1), torch.ones(count, 1, 1)
    out = case.train.FlowMatching(o).noised(latents, text, text[0], 7, range(count))
    t, weight = (torch.tensor(values, dtype=torch.float64) for values in by_index(3.0))
    index = (out["t"].double()[:, None] - t).abs().argmin(1)
    assert (out["t"] - t[index]).abs().max() < 2e-4  # neighbours are 0.33 apart or more
    want = weight[index] if weighting == "bell" else torch.ones(count, dtype=torch.float64)
    assert (out["weight"] - want).abs().max() < 1e-5
    s = (out["t"] / 1000).view(-1, 1, 1, 1, 1)
    assert (out["x"] - (1 - s) * latents - s * (out["target"] + latents)).abs().max() < 1e-5
    drawn = torch.bincount(index, minlength=1000)
    if timesteps == "per-sample":
        assert drawn.min() > 0 and drawn.max() < 30  # 10 of each on the average
    else:
        assert drawn.max() == count


@pytest.mark.L2
def test_rotary_tables_are_diffusers_whatever_grid_came_before():
    """The six grids have equal numbers of tokens, heads have two widths, and each table is requested twice."""
    wider = dataclasses.replace(case.CONFIG, num_heads=2)
    for grid in [(2, 4, 8), (2, 8, 4), (4, 2, 8), (4, 8, 2), (8, 2, 4), (8, 4, 2)] * 2:
        for config in (case.CONFIG, wider):
            reference = WanRotaryPosEmbed(config.head_dim, config.patch_size, 32)(torch.empty(1, 16, *grid))
            got = case.model.rotary_table([*grid], config, torch.device("cpu"))[:, 0, 0]  # [L, E/2, (cos, sin)]
            for part, want in zip(got.unbind(-1), reference, strict=True):
                assert (part - want[0, :, 0, ::2]).abs().max() < 1e-6, grid


# ------------------------------------------------------------------------------------------------------ pairs, dropout


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Makes a list of eight demo clips, and beside it a list of their four pairs."""
    make_data = importlib.import_module(f"zoo.{case.RECIPE}.demo.make_data")
    folder = tmp_path_factory.mktemp("clips") / "demo"
    make_data.make(folder, train=8, test=0)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    path = next(key for key, value in rows[0].items() if (folder / str(value)).is_file())
    pairs = [
        {"chosen": a[path], "rejected": b[path], "caption": f"clip {a[path]}"}
        for a, b in zip(rows[::2], rows[1::2], strict=True)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder / "train.jsonl"


def training(data: Path, out: Path, *argv):
    """Returns (options, architecture, chunks with adapters that are not zero, batches) of a job with dropout."""
    common = ["--data", str(data), "--out", str(out), "--workers", "0", "--buckets", "13x48x48", "--lora-rank", "4",
              "--lora-dropout", "0.5", "--sample-steps", "2", "--weighting", "bell", "--caption-dropout", "0.5"]  # fmt: skip
    o = case.jobs.parse("train", [*common, *argv])
    parallel.initialize(o)
    config, index = case.config.model_config(o), case.train.build_index(o, o.data)
    chunks = case.model.build(o, config)
    case.convert.fill(chunks, o, config, case.model.draw)
    case.train.adapt(chunks, o, config)
    checkpoint.initialize(chunks, 8, lambda n, w, g: w.normal_(std=0.3, generator=g), lambda n: n.endswith("lora_B"))
    return o, config, chunks, case.train.Batches(o, config, index, case.train.FlowMatching(o))


def pairs_of(data: Path, out: Path, task: str) -> tuple[list[dict], list[dict], dict, list[dict]]:
    """Returns two micro-batches of two pairs each, latents and conditions of their videos encoded apart, and the
    held-out measures: with dropout modules in the model, then without them."""
    batch = ["--micro-batch", "4", "--global-batch", "8"]
    o, config, chunks, batches = training(data, out, "--job", "dpo", "--task", task, *batch)
    loaded = next(iter(batches(0, 1)))
    prepared, alone = batches.prepare(loaded), []
    for batch in loaded.micro_batches:
        latents, _, condition = batches.encoders.encode(batch["pixels"], batch["captions"])
        alone.append({"latents": latents} | condition)
    reference, measures = functools.partial(without_adapters, chunks), []

    def length(batch: list[dict]) -> int:
        return config.tokens(batch[0]["x"].shape[2:]) + config.context_rows

    measure = functools.partial(preference.measure, o, length)
    for _ in range(2):
        measures.append(held_out(o, batches, chunks, reference, measure))
        for module in (m for chunk in chunks for m in chunk.modules() if hasattr(m, "lora_dropout")):
            module.lora_dropout = torch.nn.Identity()
    return prepared, alone, measures


@pytest.mark.L2
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_videos_of_a_pair_share_all_but_their_latents_and_are_measured_without_dropout(task, clips, tmp_path):
    prepared, alone, (first, plain) = run_ranks(1, pairs_of, clips.with_name("pairs.jsonl"), tmp_path, task)[0]
    noises = []
    for batch, encoded in zip(prepared, alone, strict=True):
        s = (batch["t"] / 1000).view(-1, 1, 1, 1, 1)
        latents, noise = batch["x"] - s * batch["target"], batch["x"] + (1 - s) * batch["target"]
        assert (latents - encoded["latents"]).abs().max() < 1e-4  # the chosen videos, then the rejected ones
        chosen, rejected = latents.chunk(2)
        assert all((a - b).abs().max() > 0.1 for a, b in zip(chosen, rejected, strict=True))
        assert (noise[:2] - noise[2:]).abs().max() < 1e-4 and noise.std() > 0.9
        for name in ("t", "weight", "text"):
            assert torch.equal(batch[name][:2], batch[name][2:]), name
        for name in ("y", "image") if task == "i2v" else ():
            assert torch.equal(batch[name][:2], batch[name][2:]), name
            assert (batch[name][:2] - encoded[name][:2]).abs().max() < 1e-4, name
            assert (encoded[name][:2] - encoded[name][2:]).abs().max() > 0.1, name  # a rejected video's own differs
        noises += [*noise[:2]]
    assert len({round(noise.sum().item(), 2) for noise in noises}) == len(noises) == 4
    assert len({each for batch in prepared for each in batch["t"].tolist()}) == 4
    assert first == plain and first["pairs"] == 4 and first["margin"] != 0


def sampled_twice(data: Path, out: Path) -> tuple[list[np.ndarray], list[bool]]:
    """Samples twice under different random states. Returns the videos, and which modules are in training mode then."""
    o, config, chunks, batches = training(data, out, "--job", "lora", "--micro-batch", "2", "--global-batch", "4")
    requests, videos = case.train.to_sample(o, config, batches.index)[:2], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        videos.append(np.stack(case.train.sample_videos(o, config, chunks, batches, requests)))
    return videos, [module.training for chunk in chunks for module in chunk.modules()]


@pytest.mark.L2
def test_samples_are_made_without_dropout_and_training_goes_on_with_it(clips, tmp_path):
    (first, again), training = run_ranks(1, sampled_twice, clips, tmp_path)[0]
    assert np.array_equal(first, again) and not np.array_equal(first[0], first[1])
    assert all(training)


# ------------------------------------------------------------------------------------------------------ averaged weights


def sampled_from(*argv) -> dict[str, torch.Tensor]:
    """Runs a training job, but without samples. Returns the trained parameters that it would sample from at its end."""
    seen = {}

    def finish(o, config, chunks, *rest) -> None:
        seen.update({name: p.detach().clone() for name, p in checkpoint.trained(chunks)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case.train, "finish", finish)
        case.job("train", *argv)
    return seen


@pytest.mark.L4
@pytest.mark.parametrize("job", ["finetune", "lora"])
def test_averaged_weights_are_what_is_exported_and_sampled_and_converted(job, clips, tmp_path):
    settings = ["--job", job, "--data", clips, "--workers", "0", "--buckets", "13x48x48", "--micro-batch", "2", "--steps", "2",
                "--global-batch", "4", "--lr", "1e-2", "--lr-schedule", "constant", "--warmup", "0", "--ema", "0.75"]  # fmt: skip
    used = run_ranks(1, sampled_from, *settings, "--out", tmp_path / "run", "--export", tmp_path / "mine")[0]
    last = tmp_path / "run" / "checkpoints" / "step-000002"
    stored = tensors(last)
    average = {key.removeprefix("ema."): value for key, value in stored.items() if key.startswith("ema.")}
    assert average.keys() == used.keys() and all(torch.equal(average[key], used[key]) for key in used)
    assert max((average[key] - stored[key]).abs().max().item() for key in average) > 1e-3
    if job == "lora":
        adapter = load_file(tmp_path / "mine" / "adapter_model.safetensors")
        linears = {key: case.convert.to_diffusers(f"{key.rpartition('.')[0]}.weight") for key in average}
        keys = {
            key: f"base_model.model.{name[:-7]}.{key[-6:]}.weight" for key, name in linears.items()
        }  # lora_A, lora_B
        assert adapter.keys() == set(keys.values())
        assert all(torch.equal(adapter[keys[key]], value) for key, value in average.items())
        return
    (exported,) = (tmp_path / "mine" / "transformer").glob("*.safetensors")
    kinds = {"ema": ["--ema"], "plain": []}
    for name, more in kinds.items():
        run_ranks(1, case.job, "convert", "--weights", last, "--to", "diffusers", "--out", tmp_path / name, *more)
    exported, ema, plain = map(
        load_file, (exported, *(next((tmp_path / n / "transformer").glob("*.safetensors")) for n in kinds))
    )
    for key, value in average.items():
        theirs = case.convert.to_diffusers(key)
        assert torch.equal(exported[theirs], value) and torch.equal(ema[theirs], value), key
        assert torch.equal(plain[theirs], stored[key]), key
