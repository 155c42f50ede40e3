"""dpo_t2v.sh and dpo_i2v.sh: loss and gradients equal the formula on diffusers' model, layouts equal one process; the
reference; pairs; resume."""

import contextlib
import dataclasses
import functools
import importlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import wan_case as case
from layouts import whole_gradients
from ranks import run_ranks
from test_wan21 import oracle

from common import lora, parallel, worker
from common import train as loop
from common.diffusion.buckets import Bucket
from common.diffusion.dataset import Index, IndexRow, PairDataset, VideoTextDataset
from common.diffusion.lists import read_pairs
from common.diffusion.preference import with_reference, without_adapters
from common.margins import Margins

preference = importlib.import_module(f"zoo.{case.RECIPE}.preference")
TOLERANCE = 1e-5
CONFIGS = {"t2v": case.CONFIG, "i2v": case.I2V}
BETA, SFT = 30.0, 0.4  # the loss is not flat here, though errors of random weights are far apart


def pairs(places: list[int], config) -> dict:
    """Makes a micro-batch of the pairs at these places of the global batch: chosen videos, then rejected ones."""
    chosen, rejected = ([case.sample_batch(first + i, 0, config) for i in places] for first in (0, 100))
    for preferred, worse in zip(chosen, rejected, strict=True):
        worse.update({key: preferred[key] for key in ("t", "weight", "text", "y", "image") if key in preferred})
    return {key: torch.cat([b[key] for b in chosen + rejected]) for key in chosen[0]}


def options(**layout) -> SimpleNamespace:
    o = case.options(**layout)
    fields = {name: getattr(o, name) for name in dir(o) if not name.startswith("_")}
    return SimpleNamespace(**fields | {"beta": BETA, "sft_weight": SFT})


def measuring(o, config):
    """Returns the function that measures the errors of micro-batches."""
    return functools.partial(preference.measure, o, lambda batches: case.sequence_length(o, config))


# ---------------------------------------------------------------------------------------------------------- one process


def by_hand(policy, reference, batch: dict) -> torch.Tensor:
    """Computes Diffusion-DPO, arXiv:2311.12908 equation 14, with velocities, a pair at a time."""
    half, losses = len(batch["x"]) // 2, []
    for i in range(half):
        e = {}
        for side, j in (("w", i), ("l", half + i)):
            image = batch["image"][j : j + 1] if "image" in batch else None
            x = torch.cat((batch["x"], batch["y"]), 1)[j : j + 1] if image is not None else batch["x"][j : j + 1]
            for name, model in (("theta", policy), ("ref", reference)):
                v = model(x, batch["t"][j : j + 1], batch["text"][j : j + 1], image).sample
                e[side, name] = batch["weight"][j] * (batch["target"][j] - v[0]).square().mean()
        inside = (e["w", "theta"] - e["w", "ref"]) - (e["l", "theta"] - e["l", "ref"])
        losses.append(-F.logsigmoid(-BETA / 2 * inside) + SFT * e["w", "theta"])
    return torch.stack(losses).mean()


def beside_diffusers(which: str) -> dict:
    """Returns {name: (ours, theirs)} of the loss and of every gradient."""
    o = options(micro_batch=4)
    config = CONFIGS[which] if which == "t2v" else dataclasses.replace(case.I2V, text_len=512)  # as diffusers needs it
    parallel.initialize(o)
    states = [case.random_state(seed, config) for seed in (0, 1)]
    diffusers_models = [oracle(config) for _ in states]
    for model, state in zip(diffusers_models, states, strict=True):
        model.load_state_dict({case.convert.to_diffusers(k): v for k, v in state.items()}, strict=True)
    batch = pairs([0, 1], config)
    want = by_hand(*diffusers_models, batch)
    want.backward()
    policy, reference = (case.model.build(o, config) for _ in states)
    for chunks, state in zip((policy, reference), states, strict=True):
        case.load(chunks, state)
    copies = functools.partial(contextlib.nullcontext, reference)
    (batch,) = with_reference(copies, measuring(o, config), [batch])
    margins = Margins()
    output, loss = preference.forward_step(o, margins, iter([batch]), policy[0])
    got, reported = loss(output)
    got.backward()
    assert reported["loss"] == got and margins()["accuracy"] in (0, 0.5, 1)
    gradients = dict(diffusers_models[0].named_parameters())
    both = {name: (p.grad, gradients[case.convert.to_diffusers(name)].grad) for name, p in policy[0].named_parameters()}
    return both | {"loss": (got.detach(), want.detach())}


@pytest.mark.L2
@pytest.mark.parametrize("which", CONFIGS)
def test_loss_and_gradients_equal_the_formula_on_diffusers_model(which):
    values = run_ranks(1, beside_diffusers, which)[0]
    errors = {name: ((g - w).abs().max() / w.abs().max()).item() for name, (g, w) in values.items()}
    assert not {name: value for name, value in errors.items() if not value <= TOLERANCE}
    assert 0.05 < values["loss"][0] < 50


# -------------------------------------------------------------------------------------------------------------- layouts

LAYOUTS = {
    "dp2": {},
    "fsdp2": {"fsdp": True},
    "tp2": {"tp": 2},
    "tp2 sp recompute full": {"tp": 2, "sp": True, "recompute": "full"},
    "cp2 ulysses": {"cp": 2},
    "cp2 ring": {"cp": 2, "ulysses": 1},
    "pp2": {"pp": 2},
}


def run_layout(layout: dict, which: str) -> dict:
    """Runs a step on every rank, with adapters that are not zero. Rank 0 returns loss, margins and whole gradients."""
    config, o = CONFIGS[which], options(micro_batch=2, **layout)
    parallel.initialize(o)
    chunks = case.model.build(o, config)
    case.load(chunks, case.random_state(0, config))
    lora.add(chunks, ["q", "v", "o", "ffn.0", "ffn.2"], rank=3, alpha=6, seed=5)
    lora.checkpoint.initialize(chunks, 7, lambda n, w, g: w.normal_(std=0.1, generator=g), lambda n: "lora_" in n)
    wrapped = parallel.wrap(chunks, o, case.model.WanBlock)
    optimizer, margins = loop.build_optimizer(o, wrapped), Margins()
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    rank, length = parallel.mpu.get_data_parallel_rank(), case.sequence_length(o, config)
    batches = [pairs([micro * o.dp + rank], config) for micro in range(o.micro_batches)]
    reference = functools.partial(without_adapters, wrapped)
    batches = with_reference(reference, measuring(o, config), batches)
    forward_step, shape = functools.partial(preference.forward_step, o, margins), {"micro_batch": o.micro_batch}
    results = loop.forward(wrapped, forward_step, batches, sequence_length=length, **shape)
    gradients, value = whole_gradients(o, wrapped), loop.global_loss(o, results, False)[0]
    errors = [b["reference"] for b in batches if "reference" in b]
    out = {"gradients": gradients, "loss": value, "errors": errors} | margins()
    return out if dist.get_rank() == 0 else {}


@functools.cache
def single(which: str) -> dict:
    return run_ranks(1, run_layout, {}, which)[0]


@pytest.mark.L3
@pytest.mark.parametrize(("name", "which"), [*((name, "t2v") for name in LAYOUTS), ("cp2 ring", "i2v"), ("pp2", "i2v")])
def test_layout_equals_single_process(name, which):
    got, want = run_ranks(2, run_layout, LAYOUTS[name], which)[0], single(which)
    scale = BETA / 2 * max(error.max().item() for error in want["errors"])  # a margin is a difference of these
    assert got["loss"] == pytest.approx(want["loss"], rel=TOLERANCE) and got["accuracy"] == want["accuracy"]
    assert got["margin"] == pytest.approx(want["margin"], abs=TOLERANCE * scale)
    assert got["gradients"].keys() == want["gradients"].keys() and all("lora_" in key for key in want["gradients"])
    worst = {k: ((got["gradients"][k] - g).abs().max() / g.abs().max()).item() for k, g in want["gradients"].items()}
    assert not {k: v for k, v in worst.items() if not v <= TOLERANCE}, name


def base_errors() -> list[torch.Tensor]:
    """Returns the errors of the same model that never had adapters."""
    o = options(micro_batch=2)
    parallel.initialize(o)
    chunks = case.model.build(o, case.CONFIG)
    case.load(chunks, case.random_state())
    batches = [pairs([i], case.CONFIG) for i in range(2)]
    return measuring(o, case.CONFIG)(chunks, batches)


@pytest.mark.L2
def test_the_reference_is_the_model_before_it_had_adapters():
    got, want = single("t2v")["errors"], run_ranks(1, base_errors)[0]
    errors = [((a - b).abs().max() / b.max()).item() for a, b in zip(got, want, strict=True)]
    assert len(errors) == 2 and max(errors) < 1e-6, errors


# ----------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.L0
def test_pairs_are_read_with_both_videos_or_reported_by_line(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
    rows = [
        {"chosen": "a.mp4", "rejected": "b.mp4", "caption": "one"},
        {"chosen": "a.mp4", "caption": "two"},
        {"chosen": "a.mp4", "rejected": "b.mp4"},
        {"chosen": "a.mp4", "rejected": "gone.mp4", "text": "four"},
        {"chosen": "a.mp4", "rejected": "a.mp4", "text": "five"},
        {"chosen": "c.mp4", "rejected": "a.mp4", "cap": "six"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    videos, report = read_pairs(path)
    assert [(row.path[-5:], row.caption, row.where) for row in videos] == [
        ("a.mp4", "one", "pairs.jsonl:1"), ("b.mp4", "one", "pairs.jsonl:1"),
        ("c.mp4", "six", "pairs.jsonl:6"), ("a.mp4", "six", "pairs.jsonl:6"),
    ]  # fmt: skip
    assert [(d["reason"], d["where"]) for d in report.drops] == [
        ("no rejected", "pairs.jsonl:2"), ("no caption", "pairs.jsonl:3"), ("missing file", "pairs.jsonl:4"),
        ("one video twice", "pairs.jsonl:5"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="pairs.csv; expected .jsonl or .json; fix: --data"):
        read_pairs(tmp_path / "pairs.csv")
    path.write_text("{}\n[1]\n")
    with pytest.raises(ValueError, match=r"pairs.jsonl:2: .*expected an object"):
        read_pairs(path)


# ------------------------------------------------------------------------------------------------------------------ jobs


@pytest.mark.L0
def test_a_pair_that_cannot_be_decoded_gives_way_to_the_next_one_whole(monkeypatch):
    rows = [IndexRow(f"{i}.mp4", "c", f"l:{i // 2}", 0, 13, 16.0, 1, 1) for i in range(6)]
    damaged, read = {3}, []

    def fetch(self, wanted, epoch=0):
        read.append(list(wanted))
        lost = {row: "torn" for row in wanted if row in damaged}
        return {"rows": [row + 1 if row in damaged else row for row in wanted], "dropped": lost}

    monkeypatch.setattr(VideoTextDataset, "fetch", fetch)
    dataset = PairDataset(Index(rows, [Bucket(13, 48, 48)], 16.0))
    assert len(dataset) == 3
    batch = dataset.fetch([0, 1])
    assert batch["rows"] == [0, 4, 1, 5] and batch["dropped"] == {3: "torn"} and read[0] == [0, 2, 1, 3]
    damaged.update(range(6))
    with pytest.raises(ValueError, match="cannot be decoded; fix"):
        dataset.fetch([0])


def job(*argv) -> None:
    try:
        worker.run(f"zoo.{case.RECIPE}", "train", case.jobs.parse("train", [*map(str, argv)]))
    finally:
        torch.use_deterministic_algorithms(False)


def steps_of(out) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    columns = ("step", "loss", "grad_norm", "margin", "accuracy")
    return [{key: row[key] for key in columns} for row in rows if row["kind"] == "step"]


@pytest.mark.L4
@pytest.mark.parametrize(("task", "how"), [("i2v", ["--lora-rank", "2"]), ("t2v", ["--full"])])
def test_a_resumed_run_is_bitwise_the_unbroken_one_and_starts_at_no_margin(task, how, tmp_path):
    o = case.jobs.parse("train", ["--job", "dpo"])
    case.jobs.prepare(o)
    settings = ["--job", "dpo", "--task", task, *how, "--micro-batch", 4, "--global-batch", 8, "--deterministic",
                "--lr-schedule", "constant", "--warmup", 0, "--save-every", 1, "--workers", 0, "--sample-steps", 1,
                "--data", few(o.data, tmp_path), "--beta", 100, "--lr", 1e-3]  # fmt: skip
    for out, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
        run_ranks(1, job, *settings, "--out", tmp_path / out, "--steps", steps)
    first, last = unbroken = steps_of(tmp_path / "whole")
    assert steps_of(tmp_path / "parts") == unbroken
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6) and first["margin"] == pytest.approx(0, abs=1e-6)
    assert last["margin"] != 0
    if task == "i2v":
        run_ranks(2, job, *settings, "--out", tmp_path / "dp2", "--steps", 2, "--micro-batch", 2)
        losses = [row["loss"] for row in steps_of(tmp_path / "dp2")]
        assert losses == pytest.approx([row["loss"] for row in unbroken], rel=1e-4)


def few(path, folder):
    """Writes a list of the first ten pairs of the list at `path`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[:10]]
    for row in rows:
        row |= {side: str(path.parent / row[side]) for side in ("chosen", "rejected")}
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "few.jsonl"
