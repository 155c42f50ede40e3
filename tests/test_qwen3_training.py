"""Numbers that a run of Qwen3 reports are recomputed independently: the held-out loss and its count by transformers on
the exported weights, the routers' metrics by transformers' functions. Also: which runs share a reference."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import qwen_case as case
import torch
import torch.nn.functional as F
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from ranks import run_ranks
from test_qwen3_layouts import my_batches, run_layout
from test_qwen3_preference import write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import parallel
from common.language import packing, preference

LENGTH, END = 32, 0  # of a row; <|endoftext|>
RUN = ["--seq-len", LENGTH, "--steps", 2, "--lr", 3e-3, "--lr-schedule", "constant", "--warmup", 0, "--workers", 0,
       "--micro-batch", 1, "--precision", "fp32"]  # fmt: skip


def log_probs(model, tokens: list[int], first: int = 1) -> torch.Tensor:
    """Returns the log-probabilities of tokens[first:], each given the tokens before it."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0].double()
    return logits.log_softmax(-1)[range(first - 1, len(tokens) - 1), tokens[first:]]


def reported(out: Path) -> tuple[float, int, list[str]]:
    result = json.loads((out / "result.json").read_text())
    return result["held_out_loss"], result["count"], result["lines"]


# --------------------------------------------------------------------------------------------------------- held-out text


def documents(seed: int, count: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 2048) for _ in range(draw.randrange(1, 40))] for _ in range(count)]


def write_documents(prefix: Path, texts: list[list[int]]) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin")
    for tokens in texts:
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.L4
@pytest.mark.parametrize(
    ("world", "options", "separate"),
    [(1, [], True), (1, ["--no-separate-documents"], False), (2, ["--size", "tiny-moe", "--aux", 0.5], True)],
    ids=["one process", "documents see each other", "dp2, experts and their loss"],
)
def test_held_out_perplexity_of_text_is_transformers_on_the_exported_weights(world, options, separate, tmp_path):
    held_out = documents(2, 17)
    for name, texts in (("train", documents(1, 20)), ("held", held_out)):
        write_documents(tmp_path / name, texts)
    paths = [
        "--data",
        tmp_path / "train",
        "--validation",
        tmp_path / "held",
        "--out",
        tmp_path / "run",
        "--export",
        tmp_path / "mine",
    ]
    run_ranks(world, case.job, "--job", "pretrain", *RUN, "--global-batch", 4, *options, *paths)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", dtype=torch.float32)
    stream = [(i, token) for i, tokens in enumerate(held_out) for token in [*tokens, END]]
    rows = (len(stream) - 1) // LENGTH
    assert rows % 4  # rows that fill no global batch are left out
    scored = []
    for row in range(rows // 4 * 4):
        part = stream[row * LENGTH : (row + 1) * LENGTH + 1]
        for _, together in itertools.groupby(part, key=lambda item: item[0] if separate else None):
            tokens = [token for _, token in together]
            scored += [log_probs(model, tokens)] if len(tokens) > 1 else []
    scored = torch.cat(scored)
    loss, count, lines = reported(tmp_path / "run")
    assert count == len(scored) and loss == pytest.approx(-scored.mean().item(), rel=1e-5)
    assert f"perplexity {math.exp(loss):.2f} on {count:,} held-out tokens" in lines[0]


# ------------------------------------------------------------------------------------------- held-out answers and pairs


def asked_and_answered(question: str, answer: str) -> tuple[list[int], int]:
    """Returns (tokens of a conversation in the demo's template, index where the answer with its end token begins)."""
    before = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    tokens = AutoTokenizer.from_pretrained(case.jobs.DEMO_TOKENIZER)(
        f"{before}{answer}<|im_end|>", return_offsets_mapping=True
    )
    return tokens.input_ids, next(i for i, (start, _) in enumerate(tokens.offset_mapping) if start >= len(before))


@pytest.mark.L4
@pytest.mark.parametrize(
    ("job", "folder"),
    [(["sft"], "--export"), (["lora", "--lora-rank", 4, "--lora-dropout", 0.5], "--merge")],
    ids=["sft", "lora"],
)
def test_held_out_perplexity_of_answers_is_transformers_on_the_trained_weights(job, folder, tmp_path):
    """The dropout of an adapter is off in this evaluation."""
    chats = {"train": range(30), "held": range(100, 107)}
    for name, numbers in chats.items():
        rows = [{"instruction": f"Double {i}.", "output": " ".join([str(2 * i)] * (i % 3 + 1))} for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = ["--data", tmp_path / "train.jsonl", "--validation", tmp_path / "held.jsonl", "--cache", tmp_path / "cache"]
    paths += ["--out", tmp_path / "run", folder, tmp_path / "mine", "--global-batch", 1]
    run_ranks(1, case.job, "--job", *job, *RUN, "--seq-len", 128, *paths)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", dtype=torch.float32)
    scored = torch.cat([log_probs(model, *asked_and_answered(row["instruction"], row["output"])) for row in rows])
    loss, count, lines = reported(tmp_path / "run")
    assert count == len(scored) and loss == pytest.approx(-scored.mean().item(), rel=1e-5)
    assert f"perplexity {math.exp(loss):.2f} on {count:,} held-out tokens" in lines[0]


@pytest.mark.L4
def test_held_out_loss_of_pairs_is_the_formula_on_transformers_before_and_after(tmp_path):
    path = write_pairs(tmp_path, 9)
    paths = ["--data", path, "--validation", path, "--cache", tmp_path / "cache", "--out", tmp_path / "run"]
    more = ["--seq-len", 128, "--global-batch", 1, "--beta", 0.3, "--export", tmp_path / "mine"]
    run_ranks(1, case.job, "--job", "dpo", *RUN, *more, *paths)
    folders, scores = (case.jobs.DEMO_WEIGHTS, tmp_path / "mine"), []
    for model in (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders):
        sums = [
            log_probs(model, *asked_and_answered(row["prompt"], row[side])).sum()
            for row in map(json.loads, path.read_text().splitlines())
            for side in ("chosen", "rejected")
        ]
        scores.append(torch.stack(sums).view(-1, 2))
    gained = scores[1] - scores[0]
    margin = 0.3 * (gained[:, 0] - gained[:, 1])
    loss, count, lines = reported(tmp_path / "run")
    assert count == 9 and loss == pytest.approx(-F.logsigmoid(margin).mean().item(), rel=1e-5)
    assert f"loss {loss:.4f} on 9 held-out pairs" in lines[0] and abs(margin.mean()) > 0.02
    assert f"in {(margin > 0).double().mean():.0%}, mean margin {margin.mean():.2f}" in lines[1]


# ------------------------------------------------------------------------------------------------------ which reference


@pytest.mark.L2
@pytest.mark.usefixtures("one_rank")
def test_a_reference_is_found_again_only_by_runs_from_the_same_model_in_the_same_precision(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    folder = packing.prepare_chats(
        write_pairs(tmp_path, 5), case.jobs.DEMO_TOKENIZER, 128, tmp_path / "cache", kind="dpo"
    )
    rows, computed = packing.PackedRows(folder), []

    def reference(value: float, *argv) -> torch.Tensor:
        def forwards(step, batches: list[dict]) -> list[dict]:
            computed.append(value)
            return [{"answers": torch.full((len(batch["pairs"]), 2), value)} for batch in batches]

        settings = ["--job", "dpo", "--size", "tiny", "--seq-len", "128", "--micro-batch", "1", "--global-batch", "1"]
        o = case.jobs.parse("train", [*settings, *argv])
        facts = case.train.reference_facts(o, case.config.model_config(o))
        return torch.from_numpy(preference.compute_reference(o, rows, facts, forwards, lambda batch: batch))

    drawn = ["--from-scratch", "--precision", "fp32"]
    models = [drawn, ["--from-scratch", "--precision", "bf16"], [*drawn, "--seed", "5"], [*drawn, "--yarn", "2"],
              ["--precision", "fp32"], ["--precision", "bf16"]]  # fmt: skip
    for turn in (0, 10):  # in the second turn every reference is read from the disk
        for value, argv in enumerate(models):
            assert torch.equal(reference(float(value + turn), *argv), torch.full((5, 2), float(value))), argv
    assert torch.equal(reference(20.0, *drawn, "--beta", "0.7", "--lr", "1e-4", "--steps", "3"), torch.zeros(5, 2))
    assert set(computed) == set(range(len(models))) and len(list(folder.glob("reference-*.npy"))) == len(models)


# -------------------------------------------------------------------------------------------------------------- routers


def router_logits() -> torch.Tensor:
    """Returns the router logits [layers, tokens of the global batch, experts]."""
    o, config = case.options(), case.CONFIGS["moe"]
    parallel.initialize(o)
    model = case.model.build(o, config)[0]
    case.load([model], case.random_state(config))
    with torch.no_grad():
        each = [model(b["tokens"], b["positions"], b["cu_seqlens"])[1] for b in my_batches(o, 0, False)]
    return torch.cat(each, dim=1)


@pytest.mark.L3
def test_router_metrics_are_those_of_transformers_over_the_global_batch():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    got, logits = run_ranks(1, run_layout, "moe", {}, False, "cpu", 0, 1)[0]["router"], run_ranks(1, router_logits)[0]
    probs = logits.softmax(-1)
    load = 6 * F.one_hot(probs.topk(2).indices, 6).double().mean((1, 2))  # [layers, experts]
    want = {
        "router_load": load.mean(0).tolist(),
        "router_load_max": load.max().item(),
        "router_entropy": -(probs * probs.log()).sum(-1).mean().item(),
        "router_balance_loss": torch.stack([load_balancing_loss_func((layer,), 6, 2) for layer in logits])
        .mean()
        .item(),
        "router_z_loss": torch.stack([router_z_loss_func(layer.unsqueeze(0)) for layer in logits]).mean().item(),
        "router_dropped": 0,
    }
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-5), key
