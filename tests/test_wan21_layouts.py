"""Tests that every layout equals one process: loss, per-parameter gradients and two steps of AdamW (fp32, gloo). One
layout of each kind of data parallelism takes twenty steps."""

import importlib

import npu_contract
import pytest
import torch.distributed as dist
import wan_case as case
from layouts import whole_gradients, whole_weights
from ranks import run_ranks

from common import ops, parallel
from common import train as loop

pytestmark = pytest.mark.L3

recipe_case = importlib.import_module(f"zoo.{case.RECIPE}.case")
TOLERANCE = 1e-5  # relative to the largest entry of the tensor
# Relative, over twenty steps. Measured: 2.2e-7 for losses; at most 1.8e-5 for weights (keys, whose gradients cancel),
# under 2e-7 for most.
TRAJECTORY, WEIGHTS = 1e-6, 1e-4

# For image-to-video, and for video from a first and a last frame: layouts that together split every dimension.
IMAGE_LAYOUTS = {
    "i2v": ["tp2 sp cp2 ulysses", "pp2 vpp2 tp2 sp", "fsdp4 as dp2 cp2"],
    "flf2v": ["tp2 cp2 ring", "pp2 cp2", "tp2 recompute full"],
}
LONG = ("dp2", "fsdp2")  # these layouts take twenty steps
LAYOUTS = {
    "dp2": (2, {}),
    "dp2 micro 2": (2, {"micro_batch": 2}),
    "fsdp2": (2, {"fsdp": True}),
    "tp2": (2, {"tp": 2}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "cp2 ulysses": (2, {"cp": 2}),
    "cp2 ring": (2, {"cp": 2, "ulysses": 1}),
    "pp2": (2, {"pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp2 vpp2 tp2 sp": (4, {"pp": 2, "vpp": 2, "tp": 2, "sp": True}),
    "tp2 recompute full": (2, {"tp": 2, "sp": True, "recompute": "full"}),
    "tp2 recompute selective": (2, {"tp": 2, "recompute": "selective"}),
    "cp2 ring recompute selective": (2, {"cp": 2, "ulysses": 1, "recompute": "selective"}),
    "fsdp2 recompute full": (2, {"fsdp": True, "recompute": "full"}),
    "tp2 sp cp2 ulysses": (4, {"tp": 2, "sp": True, "cp": 2}),
    "tp2 cp2 ring": (4, {"tp": 2, "cp": 2, "ulysses": 1}),
    "cp4 ulysses2 ring2": (4, {"cp": 4, "ulysses": 2}),
    "tp2 sp pp2": (4, {"tp": 2, "sp": True, "pp": 2}),
    "pp2 cp2": (4, {"pp": 2, "cp": 2}),
    "dp2 tp2": (4, {"tp": 2}),
    "fsdp4 as dp2 cp2": (4, {"fsdp": True, "cp": 2}),
    "compile tp2 sp recompute full": (2, {"compile": True, "tp": 2, "sp": True, "recompute": "full"}),
}


def run_layout(layout: dict, steps: int, want_gradients: bool, adapt=None, config=case.CONFIG) -> dict:
    """Trains `steps` steps from the shared weights. `adapt` changes the chunks before they are wrapped. Rank 0 returns
    the whole gradients of the first step (gathered over tensor and pipeline parallel), the losses, and the final whole
    weights; the others return {}."""
    o = case.options(**layout)
    parallel.initialize(o)
    chunks = case.model.build(o, config)
    case.load(chunks, case.random_state(config=config))
    if adapt:
        adapt(chunks)
    wrapped = parallel.wrap(chunks, o, case.model.WanBlock)
    optimizer = loop.build_optimizer(o, wrapped)
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    out = {"losses": []}
    for step in range(steps):
        loop.zero_gradients(wrapped, optimizer)
        shape = {"micro_batch": o.micro_batch, "sequence_length": case.sequence_length(o, config)}
        results = loop.forward(wrapped, case.train.forward_step, case.my_batches(o, step, config), **shape)
        if step == 0 and want_gradients:
            out["gradients"] = whole_gradients(o, wrapped)
        optimizer.prepare_grads()
        out["losses"].append(loop.global_loss(o, results, False)[0])
        optimizer.step_with_ready_grads()
    out["weights"] = whole_weights(wrapped)
    return out if dist.get_rank() == 0 else {}


def through_npu(layout: dict, steps: int) -> dict:
    """Calls `run_layout` with the npu branch of `common.ops` and the kernels of npu_contract.py: nothing runs on
    Ascend."""
    npu_contract.install()
    ops.BACKEND = "npu"
    try:
        return run_layout(layout, steps, True)
    finally:
        ops.BACKEND = "cpu"


@pytest.fixture(scope="module")
def single() -> dict:
    """Returns {number of steps: results of one process}."""
    return {steps: run_ranks(1, run_layout, {}, steps, True)[0] for steps in (2, 20)}


# tests/test_models.py runs two steps of these layouts. Two of them stay here because they run twenty steps. Those of
# IMAGE_LAYOUTS run below, in models that have all modules of text-to-video.
ELSEWHERE = {name for name, (_, _, which) in recipe_case.LAYOUTS.items() if "t2v" in which} - set(LONG)
ELSEWHERE |= {name for names in IMAGE_LAYOUTS.values() for name in names}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ELSEWHERE])
def test_layout_equals_single_process(name, single):
    world, layout = LAYOUTS[name]
    steps = 20 if name in LONG else 2
    compare(run_ranks(world, run_layout, layout, steps, True)[0], single[steps], layout)


@pytest.mark.parametrize("name", ["one process", "tp2 sp", "cp2 ring recompute selective", "fsdp2"])
def test_npu_branch_equals_single_process(name, single):
    world, layout = LAYOUTS.get(name, (1, {}))
    compare(run_ranks(world, through_npu, layout, 2)[0], single[2], layout)


@pytest.mark.parametrize("task", IMAGE_LAYOUTS)
def test_layouts_of_image_to_video_equal_single_process(task):
    config = {"i2v": case.I2V, "flf2v": case.FLF2V}[task]
    reference = run_ranks(1, run_layout, {}, 2, True, None, config)[0]
    for name in IMAGE_LAYOUTS[task]:
        world, layout = LAYOUTS[name]
        compare(run_ranks(world, run_layout, layout, 2, True, None, config)[0], reference, layout)


def compare(got: dict, single: dict, layout: dict) -> None:
    assert got["losses"][0] == pytest.approx(single["losses"][0], rel=TOLERANCE), layout
    assert got["gradients"].keys() == single["gradients"].keys()
    errors = {
        key: ((got["gradients"][key] - want).abs().max() / want.abs().max()).item()
        for key, want in single["gradients"].items()
    }
    bad = {k: v for k, v in errors.items() if not v <= TOLERANCE}
    assert not bad, f"{layout}: gradients off by {bad}"
    # Adam divides small gradients by their own size, so rounding grows from step to step.
    assert got["losses"] == pytest.approx(single["losses"], rel=TRAJECTORY), layout
    assert got["weights"].keys() == single["weights"].keys()
    errors = {
        key: ((got["weights"][key] - want).abs().max() / want.abs().max()).item()
        for key, want in single["weights"].items()
    }
    bad = {k: v for k, v in errors.items() if not v <= WEIGHTS}
    assert not bad, f"{layout}: weights off by {bad}"
