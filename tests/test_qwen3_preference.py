"""dpo.sh: losses and gradients equal trl's formulas on transformers' logits, and layouts equal one process; the cached
reference; resume."""

import functools
import json
import math
from types import SimpleNamespace

import pytest
import qwen_case as case
import test_qwen3 as oracle
import torch
import torch.distributed as dist
import torch.nn.functional as F
from layouts import whole_gradients
from ranks import run_ranks

from common import parallel
from common import train as loop
from common.language import packing, preference
from common.margins import Margins

TOLERANCE = 1e-5
LOSSES = {
    "sigmoid": {"preference": "sigmoid", "beta": 0.3},
    "smoothed": {"preference": "sigmoid", "beta": 0.3, "label_smoothing": 0.2},
    "hinge": {"preference": "hinge", "beta": 0.3},
    "ipo": {"preference": "ipo", "beta": 0.7},
    "simpo": {"preference": "simpo", "beta": 2.0, "gamma": 0.9},
    "simpo smoothed": {"preference": "simpo", "beta": 2.0, "gamma": 0.9, "label_smoothing": 0.1},
    "with the chosen answers' own": {"preference": "sigmoid", "beta": 0.3, "sft_weight": 0.6},
}


def options(**values) -> SimpleNamespace:
    """Returns the tiny case's options of a layout, with the fields that the objective reads."""
    objective = {"preference": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "gamma": 0.5, "sft_weight": 0.0}
    layout = {key: value for key, value in values.items() if key not in objective}
    o = case.options(**layout)
    fields = {name: getattr(o, name) for name in dir(o) if not name.startswith("_")}
    return SimpleNamespace(**fields | objective | {key: value for key, value in values.items() if key in objective})


def row(place: int, step: int = 0, length: int = case.LENGTH) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Draws one or two pairs by the row's place. A pair is (tokens, labels) twice, its first labels ignored."""
    g, pairs = torch.Generator().manual_seed(1000 * step + place), []
    for sizes in [(5, 4), (3, 4)] if place % 2 else [(6, 8)]:
        pair = []
        for n in sizes:
            tokens = torch.randint(96, (n,), generator=g)
            labels = torch.cat((tokens[1:], torch.tensor([-100])))
            labels[: 1 if n < 5 else 2] = -100
            pair.append((tokens, labels))
        pairs.append(pair)
    return pairs


def joined(rows: list[list]) -> dict:
    """Makes a micro-batch as `PackedRows` does. Each row is padded to LENGTH."""
    sequences, pairs = [], []
    for pairs_of_row in rows:
        rest = case.LENGTH
        for pair in pairs_of_row:
            pairs.append(len(sequences))
            sequences += [tuple(t.numpy() for t in each) for each in pair]
            rest -= sum(len(tokens) for tokens, _ in pair)
        if rest:
            filling = torch.full((rest,), 1)
            sequences.append((filling.numpy(), (filling * -100).numpy()))
    batch = packing.micro_batch(sequences)
    sizes = torch.tensor(batch["cu_seqlens"]).diff()
    pairs = torch.tensor(pairs)
    chosen = [int(sequences[i][0].sum()) for i in pairs]
    reference = torch.stack([-5 - 3 * torch.rand(2, generator=torch.Generator().manual_seed(n)) for n in chosen])
    sequence = torch.repeat_interleave(torch.arange(len(sequences)), sizes)
    return batch | {"pairs": pairs, "sequence": sequence, "reference": reference, "rows": len(rows)}


# -------------------------------------------------------------------------------------------------------- against trl


def trl_loss(o, theirs, pairs: list, reference: torch.Tensor) -> torch.Tensor:
    """Computes trl's DPOTrainer.dpo_loss and CPOTrainer.cpo_loss as they are written there, a pair at a time."""
    losses = []
    for (chosen, rejected), reference_logps in zip(pairs, reference, strict=True):
        logps, lengths = [], []
        for tokens, labels in (chosen, rejected):
            logits = theirs(input_ids=tokens[None]).logits[0]
            mask = labels >= 0
            picked = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
            logps.append((picked * mask).sum())
            lengths.append(mask.sum())
        (policy_chosen, policy_rejected), (reference_chosen, reference_rejected) = logps, reference_logps
        nll = -policy_chosen / lengths[0]
        if o.preference in ("ipo", "simpo"):
            policy_chosen, policy_rejected = policy_chosen / lengths[0], policy_rejected / lengths[1]
            reference_chosen, reference_rejected = reference_chosen / lengths[0], reference_rejected / lengths[1]
        if o.preference == "simpo":
            logits = policy_chosen - policy_rejected - o.gamma / o.beta
        else:
            logits = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
        if o.preference == "hinge":
            loss = torch.relu(1 - o.beta * logits)
        elif o.preference == "ipo":
            loss = (logits - 1 / (2 * o.beta)) ** 2
        else:
            loss = (
                -F.logsigmoid(o.beta * logits) * (1 - o.label_smoothing)
                - F.logsigmoid(-o.beta * logits) * o.label_smoothing
            )
        losses.append(loss + o.sft_weight * nll)
    return torch.stack(losses).mean()


def beside_trl(folder, which: str, values: dict) -> dict:
    """Returns {name: (ours, theirs)} of the loss and of every gradient."""
    o, config = options(global_batch=1, **values), case.CONFIGS[which]
    parallel.initialize(o)
    transformers_model, model = case.save_oracle(folder, config), oracle.ours(folder)
    rows = [row(0), row(1)]
    batch = joined(rows)
    want = trl_loss(o, transformers_model, [pair for each in rows for pair in each], batch["reference"])
    want.backward()
    margins = Margins()
    (batch,) = case.train.weighted([batch], 1)
    output, loss = preference.forward_step(o, margins, iter([batch]), model)
    got, reported = loss(output)
    got.backward()
    assert reported["loss"] == got and margins()["accuracy"] in (0, 1 / 3, 2 / 3, 1)
    gradients = dict(transformers_model.named_parameters())
    pairs = {name: (p.grad, oracle.expected(name, gradients, config)) for name, p in model.named_parameters()}
    return pairs | {"loss": (got.detach(), want.detach())}


@pytest.mark.L2
@pytest.mark.parametrize(
    ("name", "which"), [*((name, "dense") for name in LOSSES), ("sigmoid", "dense tied"), ("sigmoid", "moe")]
)
def test_loss_and_gradients_equal_trls_formulas(name, which, tmp_path):
    pairs = run_ranks(1, beside_trl, tmp_path, which, LOSSES[name])[0]
    errors = {n: (g - w).abs().max() / w.abs().max() for n, (g, w) in pairs.items() if not oracle.close(g, w)}
    assert not errors


# ------------------------------------------------------------------------------------------------------------- layouts

LAYOUTS = {
    "dp2": (2, {}),
    "dp2 micro 2": (2, {"micro_batch": 2}),
    "fsdp2": (2, {"fsdp": True}),
    "tp2": (2, {"tp": 2}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "cp2 ulysses": (2, {"cp": 2}),
    "cp2 ring": (2, {"cp": 2, "ulysses": 1}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "tp2 sp cp2 ring": (4, {"tp": 2, "sp": True, "cp": 2, "ulysses": 1}),
}


def run_layout(values: dict) -> dict:
    """Runs a step on every rank. Rank 0 returns its whole gradients, its loss and its margins."""
    o, config = options(**values), case.CONFIGS["dense"]
    parallel.initialize(o)
    chunks = case.model.build(o, config)
    case.load(chunks, case.random_state(config))
    wrapped = parallel.wrap(chunks, o, case.model.Qwen3Block)
    optimizer, margins = loop.build_optimizer(o, wrapped), Margins()
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    rank = parallel.mpu.get_data_parallel_rank()
    starts = [(micro * o.dp + rank) * o.micro_batch for micro in range(o.micro_batches)]
    batches = [joined([row(start + i) for i in range(o.micro_batch)]) for start in starts]
    batches = case.train.weighted(batches, o.dp)
    forward_step, shape = functools.partial(preference.forward_step, o, margins), {"micro_batch": o.micro_batch}
    results = loop.forward(wrapped, forward_step, batches, sequence_length=case.LENGTH, **shape)
    out = {"gradients": whole_gradients(o, wrapped), "loss": loop.global_loss(o, results, False)[0]} | margins()
    return out if dist.get_rank() == 0 else {}


@functools.cache
def single(name: str) -> dict:
    return run_ranks(1, run_layout, LOSSES[name])[0]


@pytest.mark.L3
@pytest.mark.parametrize(
    ("name", "loss"), [*((name, "with the chosen answers' own") for name in LAYOUTS), ("cp2 ring", "ipo")]
)
def test_layout_equals_single_process(name, loss):
    world, layout = LAYOUTS[name]
    got, want = run_ranks(world, run_layout, layout | LOSSES[loss])[0], single(loss)
    for key in ("loss", "margin", "accuracy"):
        assert got[key] == pytest.approx(want[key], rel=TOLERANCE), key
    assert got["gradients"].keys() == want["gradients"].keys()
    worst = {k: ((got["gradients"][k] - g).abs().max() / g.abs().max()).item() for k, g in want["gradients"].items()}
    assert not {k: v for k, v in worst.items() if not v <= TOLERANCE}, layout


# ----------------------------------------------------------------------------------------------------------------- jobs


def write_pairs(folder, count: int):
    folder.mkdir(exist_ok=True)
    rows = [
        {"prompt": f"Double {i}.", "chosen": f"{2 * i}", "rejected": f"about {i}, or {i + 1}"} for i in range(count)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.L4
def test_a_resumed_run_is_bitwise_the_unbroken_one_and_the_reference_is_made_once(tmp_path):
    path = write_pairs(tmp_path, 60)
    settings = ["--job", "dpo", "--data", path, "--validation", path, "--cache", tmp_path / "cache", "--seq-len", "128",
                "--deterministic", "--save-every", "2", "--lr-schedule", "constant", "--warmup", "1", "--workers", "0"]  # fmt: skip
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        run_ranks(1, case.job, *settings, "--out", tmp_path / out, "--steps", steps)
    (reference,) = (tmp_path / "cache").glob("*/reference-*.npy")
    assert case.steps_of(tmp_path / "parts") == case.steps_of(tmp_path / "whole")
    first = case.steps_of(tmp_path / "whole")[1]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6) and first["margin"] == 0
    made_at = reference.stat().st_mtime_ns
    # Another layout uses the same reference. Adapters over a checkpoint have a new one, which equals them at the start.
    run_ranks(2, case.job, *settings, "--out", tmp_path / "tp2", "--steps", 4, "--tp", 2, "--sp")
    two, one = (case.steps_of(tmp_path / name) for name in ("tp2", "whole"))
    assert [two[i]["loss"] for i in one] == pytest.approx([row["loss"] for row in one.values()], rel=1e-4)
    trained = tmp_path / "whole" / "checkpoints" / "step-000004"
    more = ["--weights", trained, "--lora-rank", 4, "--preference", "hinge", "--out", tmp_path / "adapters"]
    run_ranks(1, case.job, *settings, *more, "--steps", 2)
    assert case.steps_of(tmp_path / "adapters")[1]["loss"] == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "adapters" / "adapter" / "adapter_model.safetensors").is_file()
    assert reference.stat().st_mtime_ns == made_at and len(list((tmp_path / "cache").glob("*/reference-*.npy"))) == 2


@pytest.mark.L2
@pytest.mark.parametrize(
    "layout", [{}, {"tp": 2, "sp": True}, {"pp": 2}, {"cp": 2, "ulysses": 1}, {"fsdp": True}], ids=str
)
def test_reference_is_the_log_probabilities_of_every_pair_whatever_the_layout(layout, tmp_path):
    path = write_pairs(tmp_path, 13)
    tokenizer = case.jobs.DEMO_TOKENIZER
    folder = packing.prepare_chats(path, tokenizer, 128, tmp_path / "cache", kind="dpo")  # two pairs a row
    world = 1 if not layout else 2
    got = run_ranks(world, reference_of, layout, folder)[0]
    want = run_ranks(1, plainly, folder)[0]
    assert got.shape == (13, 2)
    assert oracle.close(torch.from_numpy(got), want)


def recipe_options(layout: dict, world: int):
    argv = [
        "--job",
        "dpo",
        "--size",
        "tiny",
        "--from-scratch",
        "--seq-len",
        "128",
        "--micro-batch",
        "1",
        "--global-batch",
        "4",
    ]
    for key, value in layout.items():
        argv += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return case.jobs.parse("train", argv)


def reference_of(layout: dict, folder):
    """Computes the reference of a model with untied embeddings, which a pipeline can split."""
    import dataclasses

    o = recipe_options({k: v for k, v in layout.items() if k != "pp"}, 2)
    o = dataclasses.replace(o, pp=layout.get("pp", 1))
    config = dataclasses.replace(case.config.SIZES["tiny"], tie_word_embeddings=False)
    parallel.initialize(o)
    chunks = case.model.build(o, config)
    case.load(chunks, case.random_state(config))
    wrapped, rows = parallel.wrap(chunks, o, case.model.Qwen3Block), packing.PackedRows(folder)
    forwards = functools.partial(case.train.evaluate_micro_batches, o, wrapped)
    on_device = functools.partial(case.train.Batches.on_device, SimpleNamespace(o=o))
    facts = case.train.reference_facts(o, case.config.model_config(o))
    reference = preference.compute_reference(o, rows, facts, forwards, on_device)
    cached = preference.compute_reference(o, rows, facts, None, None)  # read from the disk, without a model
    assert (reference == cached).all()
    return reference


@torch.no_grad()
def plainly(folder) -> torch.Tensor:
    """Computes the log-probabilities [units, 2] of the answers, a sequence at a time."""
    import dataclasses

    config = dataclasses.replace(case.config.SIZES["tiny"], tie_word_embeddings=False)
    parallel.initialize(case.options())
    (model,) = case.model.build(case.options(), config)
    case.load([model], case.random_state(config))
    rows, sums = packing.PackedRows(folder), torch.zeros(13, 2)
    for number in range(len(rows)):
        units = rows._units[rows._row_bounds[number] : rows._row_bounds[number + 1]]
        for unit, pair in zip(units, rows.units(number), strict=True):
            for side, (tokens, labels) in enumerate(pair):
                tokens, labels = torch.from_numpy(tokens).long(), torch.from_numpy(labels).long()
                hidden, _ = model(tokens, torch.arange(len(tokens)), [0, len(tokens)])
                log_probs = (hidden.flatten(0, 1) @ model.output_weight.t()).log_softmax(-1)
                picked = log_probs.gather(1, labels.clamp(min=0)[:, None])[:, 0]
                sums[unit, side] = picked[labels >= 0].sum()
    return sums
