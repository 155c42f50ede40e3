"""orm.sh and prm.sh: losses and gradients equal transformers' models with plain torch losses, layouts equal one process;
rows of steps; reward models start from language models, are exported, and score rows as transformers does."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest
import qwen_case as case
import test_qwen3 as oracle
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from layouts import whole_gradients
from ranks import run_ranks

from common import parallel, release
from common import train as loop
from common.language import packing, reward
from common.language.files import read_rows
from common.language.steps import encode_steps, to_steps
from common.margins import Margins
from common.records import BadRow

TOLERANCE = 1e-5
TOKENS = [61, 7]  # ids of right and wrong: on different tensor parallel ranks
DEMO_TOKENIZER = case.jobs.DEMO_TOKENIZER


def architecture(job: str, which: str):
    return dataclasses.replace(case.CONFIGS[which], num_labels=int(job == "orm"))


# --------------------------------------------------------------------------------------- against plain torch, layouts


def row(job: str, place: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draws the sequences (tokens, labels) of a row of LENGTH tokens, padding included: one or two pairs, or two
    solutions with a step at two or three tokens."""
    g = np.random.default_rng(place)
    sizes = ([5, 4, 3, 4] if place % 2 else [6, 8]) if job == "orm" else [5 + place % 3, 8]
    sequences = []
    for n in sizes:
        labels = np.full(n, -100)
        if job == "prm":
            labels[[2, n - 1]] = g.integers(2, size=2)
        sequences.append((g.integers(96, size=n), labels))
    rest = case.LENGTH - sum(sizes)
    return [*sequences, (np.ones(rest, np.int64), np.full(rest, -100))] if rest else sequences


def joined(job: str, places: list[int]) -> dict:
    """Makes a micro-batch as `PackedRows` does."""
    sequences = [sequence for place in places for sequence in row(job, place)]
    batch = packing.micro_batch(sequences) | {"rows": len(places)}
    if job == "prm":
        return batch | {"steps": (batch["labels"] >= 0).nonzero().flatten()}
    starts, pairs = 0, []
    for place in places:
        pairs += [starts, starts + 2] if place % 2 else [starts]
        starts += len(row(job, place))
    last = [[batch["cu_seqlens"][pair + side] - 1 for side in (1, 2)] for pair in pairs]
    return batch | {"pairs": torch.tensor(pairs), "last": torch.tensor(last)}


def plain_loss(job: str, theirs, places: list[int]) -> torch.Tensor:
    """Computes the loss from transformers' logits, a sequence at a time."""
    losses = []
    for place in places:
        sequences = [(torch.from_numpy(t)[None], torch.from_numpy(labels)) for t, labels in row(job, place)]
        if job == "orm":
            scores = [theirs(input_ids=tokens).logits[0, 0] for tokens, _ in sequences]
            losses += [-torch.log(torch.sigmoid(scores[i] - scores[i + 1])) for i in range(0, len(scores) // 2 * 2, 2)]
        else:
            for tokens, labels in sequences:
                if (at := labels >= 0).any():  # the reference takes the cross entropy over the two tokens' logits
                    logits = theirs(input_ids=tokens).logits[0][at][:, TOKENS]
                    losses += F.cross_entropy(logits, 1 - labels[at], reduction="none").unbind()
    return torch.stack(losses).mean()


def save_oracle(folder, job: str, config):
    """Draws every parameter of transformers' model at random, saves it as a release, and returns it."""
    if job == "prm":
        return case.save_oracle(folder, config)
    cls = transformers.AutoModelForSequenceClassification
    model = cls.from_config(case.oracle_config(config), attn_implementation="eager", dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_((1 if name.endswith("norm.weight") else 0) + 0.15 * torch.randn(p.shape, generator=g))
    model.save_pretrained(folder)
    return model


def beside_torch(folder, job: str, which: str) -> dict:
    """Returns {name: (ours, theirs)} of the loss and of every gradient."""
    config = architecture(job, which)
    o = case.options(global_batch=1)
    parallel.initialize(o)
    theirs = save_oracle(folder, job, config)
    assert case.config.Qwen3Config.from_folder(folder) == config
    (model,) = case.model.build(o, config)
    table = case.convert.table(config)
    release.load([model], table.entries(folder), table)
    want = plain_loss(job, theirs, [0, 1])
    want.backward()
    margins, tokens = Margins(), torch.tensor(TOKENS) if job == "prm" else None
    (batch,) = case.train.weighted([joined(job, [0, 1])], 1)
    output, loss = reward.forward_step(margins, tokens, iter([batch]), model)
    got, _ = loss(output)
    got.backward()
    gradients = dict(theirs.named_parameters())
    pairs = {name: (p.grad, oracle.expected(name, gradients, config)) for name, p in model.named_parameters()}
    return pairs | {"loss": (got.detach(), want.detach())}


@pytest.mark.L2
@pytest.mark.parametrize(
    ("job", "which"),
    [("orm", "dense"), ("orm", "dense tied"), ("orm", "moe"), ("prm", "dense"), ("prm", "dense tied")],
)
def test_loss_and_gradients_equal_plain_torch(job, which, tmp_path):
    pairs = run_ranks(1, beside_torch, tmp_path, job, which)[0]
    assert (job == "orm") == ("score.weight" in pairs)
    errors = {n: (g - w).abs().max() / w.abs().max() for n, (g, w) in pairs.items() if not oracle.close(g, w)}
    assert not errors


LAYOUTS = {
    "dp2": (2, {}),
    "fsdp2": (2, {"fsdp": True}),
    "tp2": (2, {"tp": 2}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "cp2 ulysses": (2, {"cp": 2}),
    "cp2 ring": (2, {"cp": 2, "ulysses": 1}),
    "pp2": (2, {"pp": 2}),
    "tp2 sp cp2 ring": (4, {"tp": 2, "sp": True, "cp": 2, "ulysses": 1}),
}


def run_layout(job: str, which: str, values: dict) -> dict:
    """Runs a step on every rank. Rank 0 returns its whole gradients, its loss and its margins."""
    o, config = case.options(**values), architecture(job, which)
    parallel.initialize(o)
    chunks = case.model.build(o, config)
    case.load(chunks, case.random_state(config))
    wrapped = parallel.wrap(chunks, o, case.model.Qwen3Block)
    optimizer, margins = loop.build_optimizer(o, wrapped), Margins()
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    rank = parallel.mpu.get_data_parallel_rank()
    batches = [joined(job, [micro * o.dp + rank]) for micro in range(o.micro_batches)]
    step = functools.partial(reward.forward_step, margins, torch.tensor(TOKENS) if job == "prm" else None)
    batches = case.train.weighted(batches, o.dp)
    results = loop.forward(wrapped, step, batches, micro_batch=1, sequence_length=case.LENGTH)
    out = {"gradients": whole_gradients(o, wrapped), "loss": loop.global_loss(o, results, False)[0]} | margins()
    return out if dist.get_rank() == 0 else {}


@functools.cache
def single(job: str, which: str) -> dict:
    return run_ranks(1, run_layout, job, which, {})[0]


@pytest.mark.L3
@pytest.mark.parametrize(
    ("job", "which", "name"),
    [
        *(("orm", "dense tied", name) for name in LAYOUTS),
        *(("prm", "dense tied", name) for name in ("dp2", "tp2 sp", "pp2", "tp2 sp cp2 ring")),
        ("prm", "dense", "tp2"),
    ],
)
def test_layout_equals_single_process(job, which, name):
    world, layout = LAYOUTS[name]
    got, want = run_ranks(world, run_layout, job, which, layout)[0], single(job, which)
    for key in ("loss", "margin", "accuracy"):
        assert got[key] == pytest.approx(want[key], rel=TOLERANCE), key
    assert got["gradients"].keys() == want["gradients"].keys()
    worst = {k: ((got["gradients"][k] - g).abs().max() / g.abs().max()).item() for k, g in want["gradients"].items()}
    assert not {k: v for k, v in worst.items() if not v <= TOLERANCE}


# ---------------------------------------------------------------------------------------------------------------- rows

TEXT = "2 + 2? Two plus two.\n2 + 2 = 4 ки\nSo 5. ки"
SAME = [
    {"prompt": "2 + 2? Two plus two.", "steps": ["2 + 2 = 4", "So 5."], "labels": [True, False]},
    {"question": "2 + 2? Two plus two.", "completions": ["2 + 2 = 4", " So 5.\n"], "labels": ["+", 0]},
    {"input": TEXT + "\n", "value": ["+", "-"], "task": "GSM8K"},
    {"input": TEXT + " the end", "label": TEXT.replace("4 ки", "4 +").replace("5. ки", "5. -") + " the end"},
]
BAD = {
    "no labels": {"prompt": "a", "steps": ["b"]},
    "another number of labels": {"prompt": "a", "steps": ["b"], "labels": [True, False]},
    "no step": {"input": "a b c", "value": ["+"]},
    "empty step": {"prompt": "a", "steps": ["b", " "], "labels": [True, False]},
    "placeholder in the text": {"prompt": "a", "steps": ["b ки c"], "labels": [True]},
    "bad label": {"input": "a ки", "value": [0.5]},
    "unknown format": {"text": "a ки"},
    "bad row": {"input": "a ки b ки", "label": "a + c -"},
}


@pytest.mark.parametrize("form", range(len(SAME)))
def test_forms_of_a_solution_are_the_same_text_with_a_label_at_each_placeholders_last_token(form):
    text, verdicts = to_steps(SAME[form], "ки")
    assert (text, verdicts) == (TEXT, [True, False])
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_TOKENIZER)
    tokens, flags = encode_steps(tokenizer, text, verdicts, "ки")
    assert tokenizer.decode(tokens) == TEXT
    ends = [tokenizer.decode(tokens[: at + 1]) for at in np.flatnonzero(flags)]
    assert ends == [TEXT[: TEXT.index("ки") + 2], TEXT] and flags[flags > 0].tolist() == [1, 2]


def test_bad_solutions_are_drops_with_their_reasons_and_packed_ones_keep_their_labels(tmp_path):
    for reason, bad in BAD.items():
        with pytest.raises(BadRow, match=f"^\\('{reason}'"):
            to_steps(bad, "ки")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*SAME, *BAD.values()]))
    folder = packing.prepare_chats(path, DEMO_TOKENIZER, 128, tmp_path, kind="prm", placeholder="ки", max_drop=0.7)
    drops = [json.loads(line)["reason"] for line in (folder / "drops.jsonl").read_text().splitlines()[1:]]
    assert drops == list(BAD)
    rows = packing.PackedRows(folder)
    batch = rows.fetch(range(len(rows)))
    assert batch["labels"][batch["steps"]].tolist() == [1, 0] * len(SAME)
    assert (batch["labels"] >= 0).sum() == len(batch["steps"])


# ---------------------------------------------------------------------------------------------------------------- jobs

REFUSED = {
    "adapters": (["--job", "orm", "--lora-rank", "8"], "--lora-rank is of lora.sh and dpo.sh, not of orm.sh"),
    "another loss": (["--job", "orm", "--beta", "1"], "--beta is of dpo.sh"),
    "steps of pairs": (["--job", "orm", "--placeholder-token", "x"], "--placeholder-token is of prm.sh"),
    "scores of another job": (["--job", "dpo", "--score", "rows"], "--score is of orm.sh and prm.sh"),
    "answers to learn": (["--job", "prm", "--train-on", "last"], "--train-on is of sft.sh and lora.sh"),
    "balance": (["--job", "orm", "--size", "tiny-moe", "--from-scratch", "--aux", "1"], "reward models' losses"),
    "words": (["--job", "prm", "--reward-tokens", "good,bad"], "expected two different single tokens"),
    "no placeholder": (["--job", "prm", "--placeholder-token", " "], "expected a text"),
    "no reward model": (["--job", "orm", "--score", "rows.jsonl"], "has no score.weight"),
    "no rows": (["--job", "prm", "--score", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    "both": (["--job", "prm", "--score", "rows.jsonl", "--data", "x.jsonl"], "leave --data and --validation out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_go_together_are_refused(name, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    argv, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        case.jobs.parse("train", argv)


@pytest.mark.L4
def test_a_reward_model_is_what_transformers_loads_and_scores_rows_as_it_does(tmp_path, capsys):
    """It starts from a language model in either kind of folder, resumes bitwise and is no language model any more."""
    data = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"Double {i}.", "chosen": f"{2 * i}", "rejected": f"about {i}"} for i in range(24)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = ["--job", "orm", "--data", data, "--validation", data, "--cache", tmp_path / "cache", "--seq-len", "128",
                "--deterministic", "--save-every", "1", "--lr-schedule", "constant", "--warmup", "0"]  # fmt: skip
    run_ranks(1, case.job, *settings, "--out", tmp_path / "whole", "--steps", 3, "--export", tmp_path / "mine")
    for steps in (1, 3):
        run_ranks(1, case.job, *settings, "--out", tmp_path / "parts", "--steps", steps)
    assert case.steps_of(tmp_path / "parts") == case.steps_of(tmp_path / "whole")
    assert "preferred answers ahead in" in (tmp_path / "whole" / "result.json").read_text()
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000003"
    scores = {}
    for weights in (tmp_path / "mine", checkpoint):
        run_ranks(1, case.job, "--job", "orm", "--weights", weights, "--score", data, "--out", tmp_path / "scores")
        scores[weights] = [row for _, row in read_rows(tmp_path / "scores" / "scores.jsonl")]
    assert scores[tmp_path / "mine"] == scores[checkpoint] and len(scores[checkpoint]) == 24
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "mine", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "mine")
    assert type(model).__name__ == "Qwen3ForSequenceClassification" and model.num_labels == 1
    for pair, got in zip(pairs[:4], scores[checkpoint], strict=False):
        for side in ("chosen", "rejected"):
            messages = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
            inputs = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt")
            with torch.no_grad():
                want = model(input_ids=inputs.input_ids).logits.item()
            assert got[side] == pytest.approx(want, rel=1e-5, abs=1e-5)
    for script, argv in (("infer", []), ("train", ["--job", "sft"])):
        with pytest.raises(ValueError, match="is a reward model, which has no vocabulary projection"):
            case.jobs.parse(script, [*argv, "--weights", str(tmp_path / "mine")])
    case.jobs.parse(
        "convert", ["--weights", str(tmp_path / "mine"), "--to", "released", "--out", str(tmp_path / "new")]
    )
    assert "a score is drawn" not in capsys.readouterr().err
    case.jobs.parse("train", ["--job", "orm"])  # from the demo's weights
    assert "is a language model: its vocabulary projection is left out, and a score is drawn" in capsys.readouterr().err
    lm = tmp_path / "lm"
    run_ranks(1, case.job, "--job", "sft", "--steps", "1", "--warmup", "0", "--seq-len", "128", "--out", lm)
    more = ["--weights", lm / "checkpoints" / "step-000001", "--out", tmp_path / "again", "--steps", "1"]
    run_ranks(1, case.job, *settings, *more)
    assert case.convert.has_score(tmp_path / "again" / "checkpoints" / "step-000001")
    assert not case.convert.has_score(lm / "checkpoints" / "step-000001")
