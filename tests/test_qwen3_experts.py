"""Mixture of experts under parallelism: the routers' losses and metrics, experts without tokens, loading, generation.
test_qwen3_layouts.py tests the plain layouts, and runs that are resumed on another layout."""

import pytest
import qwen_case as case
import torch
from ranks import run_ranks
from test_qwen3 import infer_options
from test_qwen3_layouts import TOLERANCE, compare, my_batches, run_layout

from common import checkpoint, parallel, release
from common.language import generate as generation

pytestmark = pytest.mark.L3

LAYOUTS = {
    "ep2": (2, {"ep": 2}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "tp2 sp etp1 ep2": (2, {"tp": 2, "sp": True, "etp": 1, "ep": 2}),
    "cp2 ring": (2, {"cp": 2, "ulysses": 1}),
    "pp2": (2, {"pp": 2}),
}
BY_LAYER = {"aux": 0.5, "aux_over": "layer", "z_loss": 0.3}
OVER_MODEL = {"aux": 0.5, "aux_over": "model"}


def test_router_losses_are_transformers():
    """The gradients that they add equal those of transformers' functions over the same logits."""
    plain, by_layer, over_model, want = run_ranks(1, router_gradients)[0]
    for got, losses in ((by_layer, "by layer"), (over_model, "over model")):
        for name, reference in want[losses].items():
            difference = got["gradients"][name] - plain["gradients"][name]
            # The two gradients, each right to 1e-5, are some ten times as large as their difference.
            assert (difference - reference).abs().max() <= 1e-4 * reference.abs().max(), (losses, name)


def router_gradients():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    runs = []
    for losses in ({}, BY_LAYER, OVER_MODEL):
        runs.append(run_layout("moe", losses, False, "cpu", 0, 1))
        parallel.shutdown()
    o, config = case.options(), case.CONFIGS["moe"]
    parallel.initialize(o)
    model = case.model.build(o, config)[0]
    case.load([model], case.random_state(config))
    total = {"by layer": 0.0, "over model": 0.0}
    for batch in (batches := my_batches(o, 0, False)):
        _, logits = model(batch["tokens"], batch["positions"], batch["cu_seqlens"])
        each = [load_balancing_loss_func((layer,), 6, 2) for layer in logits]
        z = torch.stack([router_z_loss_func(layer.unsqueeze(0)) for layer in logits]).mean()
        total["by layer"] += 0.5 * torch.stack(each).mean() + 0.3 * z
        total["over model"] += 0.5 * load_balancing_loss_func(tuple(logits), 6, 2)
    want = {}
    for losses, value in total.items():
        model.zero_grad()
        (value / len(batches)).backward(retain_graph=True)
        want[losses] = {n: p.grad.clone() for n, p in model.named_parameters() if n.endswith("gate.weight")}
    return *runs, want


@pytest.fixture(scope="module")
def single():
    return {
        "by layer": run_ranks(1, run_layout, "moe", BY_LAYER, True, "cpu", 0, 3)[0],
        "over model": run_ranks(1, run_layout, "moe", OVER_MODEL, True, "cpu", 0, 3)[0],
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_router_losses_equal_single_process(name, single):
    world, layout = LAYOUTS[name]
    got = run_ranks(world, run_layout, "moe", layout | BY_LAYER, True, "cpu", 0, 3)[0]
    compare(got, single["by layer"], layout, steps=3)  # in later steps a near tie may send a token to another expert
    for key, value in single["by layer"]["router"].items():
        assert got["router"][key] == pytest.approx(value, rel=1e-5), key
    if "pp" not in layout:
        got = run_ranks(world, run_layout, "moe", layout | OVER_MODEL, True, "cpu", 0, 3)[0]
        compare(got, single["over model"], layout, steps=3)


def test_router_metrics_are_what_they_say(single):
    metrics = single["by layer"]["router"]
    assert metrics["router_dropped"] == 0
    assert sum(metrics["router_load"]) == pytest.approx(6)
    assert metrics["router_load_max"] >= max(metrics["router_load"])
    assert 0 < metrics["router_entropy"] < torch.tensor(6.0).log()


def first_experts(layout: dict, backend: str) -> dict:
    return run_layout("moe", layout, False, backend, 0, 1, change=all_to_the_first)


def all_to_the_first(state: dict) -> dict:
    """Makes every token choose experts 0 and 1: the hidden state's mean decides, and the norm makes it positive."""
    for name in state:
        if name.endswith("mlp.gate.weight"):
            state[name] = torch.tensor([9.0, 8.0, 1.0, 0.0, 0.0, 0.0]).unsqueeze(1) * torch.ones(6, 40) / 40
        if name.endswith("post_attention_layernorm.weight"):
            state[name] = torch.zeros(40)
            state[name][0] = 1.0
        if name == "embed_tokens.weight":
            state[name][:, 0] = 30.0
    return state


@pytest.mark.parametrize(("backend", "dispatch"), [("cpu", "alltoall"), ("cpu", "allgather"), ("npu", "alltoall")])
def test_a_rank_whose_experts_nobody_asks_for_takes_part(backend, dispatch):
    want = run_ranks(1, first_experts, {}, backend)[0]
    assert want["router"]["router_load"] == pytest.approx([3, 3, 0, 0, 0, 0])
    got = run_ranks(2, first_experts, {"ep": 2, "dispatch": dispatch}, backend)[0]
    assert got["losses"][0] == pytest.approx(want["losses"][0], rel=TOLERANCE)
    for name, gradient in want["gradients"].items():
        assert (got["gradients"][name] - gradient).abs().max() <= TOLERANCE * gradient.abs().max(), name


@pytest.mark.parametrize("layout", [{"ep": 2, "tp": 2}, {"ep": 2, "tp": 2, "sp": True, "etp": 1}], ids=str)
def test_each_rank_loads_its_experts_of_a_release(layout, tmp_path):
    config = case.CONFIGS["moe"]
    case.save_oracle(tmp_path, config)
    whole = run_ranks(1, loaded, {}, tmp_path)[0]
    for rank in run_ranks(4, loaded, layout, tmp_path):
        for name, (cuts, part) in rank.items():
            want = whole[name][1]
            for dim, place, size in cuts:
                want = want.chunk(size, dim)[place]
            assert torch.equal(part, want), name


def loaded(layout: dict, folder) -> dict[str, tuple]:
    """Returns {name: (how it is sharded, this rank's part)} of the parameters."""
    o, config = case.options(**layout), case.CONFIGS["moe"]
    parallel.initialize(o)
    chunks = case.model.build(o, config)
    table = case.convert.table(config)
    release.load(chunks, table.entries(folder), table)
    return {name: (checkpoint.cuts(p), p.detach()) for name, p in checkpoint.parameters(chunks)}


def test_generation_with_spread_experts_is_the_plain_one(tmp_path):
    case.save_oracle(tmp_path, case.CONFIGS["moe"])
    want = run_ranks(1, answers, {}, tmp_path)[0]
    assert run_ranks(2, answers, {"ep": 2}, tmp_path) == [want, want]


def answers(layout: dict, folder) -> list[list[int]]:
    o, config = case.options(**layout), case.CONFIGS["moe"]
    parallel.initialize(o)
    model = case.model.build(o, config)[0].eval()
    table = case.convert.table(config)
    release.load([model], table.entries(folder), table)
    generation_options = infer_options(max_new_tokens=6)
    return generation.generate(model, [[1, 2, 3], [4, 5, 6], [7, 8]], generation_options, set())
