"""Tests that every layout equals one process: loss, per-parameter gradients and two steps of AdamW (fp32, gloo). One
layout of each kind of data parallelism takes ten steps."""

import dataclasses
import importlib

import npu_contract
import pytest
import qwen_case as case
import torch
import torch.distributed as dist
from layouts import whole_gradients
from ranks import run_ranks

from common import checkpoint, ops, parallel, release
from common import train as loop
from common.language import generate as generation

pytestmark = pytest.mark.L3

recipe_case = importlib.import_module(f"zoo.{case.RECIPE}.case")
TOLERANCE = 1e-5  # relative to the largest entry of the tensor
TRAJECTORY, NORMS = 1e-6, 3e-6  # relative, over ten steps; measured: losses 2e-7, gradient norms 6e-7
STEPS, LONG = 10, ("dp2", "fsdp2", "ep2")  # the other layouts take two steps

LAYOUTS = {
    "dp2": (2, {}),
    "dp2 micro 2": (2, {"micro_batch": 2}),
    "fsdp2": (2, {"fsdp": True}),
    "tp2": (2, {"tp": 2}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "cp2 ulysses": (2, {"cp": 2}),
    "cp2 ring": (2, {"cp": 2, "ulysses": 1}),
    "pp2": (2, {"pp": 2}),
    "pp2 micro 2": (2, {"pp": 2, "micro_batch": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "tp2 sp recompute full": (2, {"tp": 2, "sp": True, "recompute": "full"}),
    "tp2 sp cp2 ring": (4, {"tp": 2, "sp": True, "cp": 2, "ulysses": 1}),
    "tp2 sp pp2": (4, {"tp": 2, "sp": True, "pp": 2}),
    "ep2": (2, {"ep": 2}),
    "cp2 ring ep2 recompute full": (2, {"cp": 2, "ulysses": 1, "ep": 2, "recompute": "full"}),
    "tp2 sp etp1": (2, {"tp": 2, "sp": True, "etp": 1}),
    "tp2 sp etp1 ep2": (2, {"tp": 2, "sp": True, "etp": 1, "ep": 2}),
    "tp2 sp etp1 ep2 gathered": (2, {"tp": 2, "sp": True, "etp": 1, "ep": 2, "dispatch": "allgather"}),
    "tp2 ep2": (4, {"tp": 2, "ep": 2}),
    "pp2 ep2": (4, {"pp": 2, "ep": 2}),
}
DENSE = [name for name, (_, layout) in LAYOUTS.items() if "ep" not in layout and "etp" not in layout]
MOE = ["dp2", "fsdp2", "tp2", "tp2 sp", "pp2 vpp2", "cp2 ring", *(name for name in LAYOUTS if name not in DENSE)]
LAYOUTS |= {
    "pp2 uneven": (2, {"pp": 2, "stages": "3,1"}),
    "dp2 pp2": (4, {"pp": 2}),
    "tp4": (4, {"tp": 4}),  # twice as many ranks as key-value heads
    "tp4 sp": (4, {"tp": 4, "sp": True}),
}
CASES = [
    (which, name, True)
    for which, names in (("dense", DENSE), ("moe", MOE), ("dense tied", ["tp2 sp", "fsdp2"]))
    for name in names
]
CASES += [("dense", name, False) for name in ("dp2 micro 2", "cp2 ulysses", "cp2 ring", "pp2 micro 2")]  # not packed
CASES += [("dense", name, True) for name in ("pp2 uneven", "tp4", "tp4 sp")]
CASES += [("dense tied", name, True) for name in ("pp2", "pp2 vpp2", "dp2 pp2", "tp2 sp pp2")]
# tests/test_models.py runs two steps of these cases. Two of them stay here because they run ten steps.
CALLED = {"dense": "dense", "dense tied": "tied", "moe": "experts"}
GENERIC = {(which, name) for name, (_, _, names) in recipe_case.LAYOUTS.items() for which in names}
GENERIC -= {("dense", "dp2"), ("experts", "ep2")}
CASES = [(which, name, packed) for which, name, packed in CASES if not packed or (CALLED[which], name) not in GENERIC]


def sample(place: int, step: int, packed: bool) -> dict:
    """Draws the sequence at a place of the global batch; its first few tokens have no loss. packed: it is three
    documents."""
    g = torch.Generator().manual_seed(1000 * step + place)
    tokens, labels = (torch.randint(96, (case.LENGTH,), generator=g) for _ in range(2))
    bounds = [0, 3 + place % 4, 9, case.LENGTH] if packed else [0, case.LENGTH]
    positions = torch.cat([torch.arange(b - a) for a, b in zip(bounds, bounds[1:], strict=False)])
    labels[: 1 + place % 3] = -100
    return {"tokens": tokens, "labels": labels, "positions": positions, "bounds": bounds}


def my_batches(o, step: int, packed: bool) -> list[dict]:
    rank, batches = parallel.mpu.get_data_parallel_rank(), []
    for micro in range(o.micro_batches):
        first = (micro * o.dp + rank) * o.micro_batch
        rows = [sample(first + i, step, packed) for i in range(o.micro_batch)]
        joined = {k: torch.cat([r[k] for r in rows]) for k in ("tokens", "labels", "positions")}
        ends = [i * case.LENGTH + e for i, r in enumerate(rows) for e in r["bounds"][1:]]
        batches.append(joined | {"cu_seqlens": [0, *ends], "rows": o.micro_batch})
    return case.train.weighted(batches, o.dp, o.aux if o.aux_over == "model" else 0.0)


def run_layout(which: str, layout: dict, packed: bool, backend: str = "cpu", *steps, change=None) -> dict:
    """Trains from the shared weights, or from what `change` makes of them. Rank 0 returns the whole gradients and
    router metrics of the first step, and all gradient norms and losses; the others return {}. steps: `first`, `last`
    and `folder` of `_run_layout`."""
    npu_contract.install()
    ops.BACKEND = backend
    try:
        return _run_layout(which, layout, packed, change, *steps)
    finally:
        ops.BACKEND = "cpu"


def _run_layout(which, layout, packed, change, first: int = 0, last: int = STEPS, folder=None) -> dict:
    """Trains from step `first` to step `last`. folder: if first > 0, checkpoint `first` is read there; checkpoint
    `last` is written there."""
    o, config = case.options(**layout), case.CONFIGS[which]
    parallel.initialize(o)
    chunks = case.model.build(o, config)
    state = case.random_state(config)
    case.load(chunks, change(state) if change else state)
    wrapped = parallel.wrap(chunks, o, case.model.Qwen3Block)
    optimizer = loop.build_optimizer(o, wrapped)
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    if first:
        checkpoint.load(folder / f"step-{first:06d}", wrapped, optimizer, fsdp=o.fsdp)
    out = {"losses": [], "norms": []}
    for step in range(first, last):
        loop.zero_gradients(wrapped, optimizer)
        shape = {"micro_batch": o.micro_batch, "sequence_length": case.LENGTH}
        results = loop.forward(wrapped, case.train.forward_step, my_batches(o, step, packed), **shape)
        if step == first:
            out["gradients"] = whole_gradients(o, wrapped)
            out["router"] = case.model.router_metrics(wrapped, config) if config.num_experts else {}
        optimizer.prepare_grads()
        out["norms"].append(optimizer.get_grad_norm())
        out["losses"].append(loop.global_loss(o, results, False)[0])
        optimizer.step_with_ready_grads()
    if folder:
        checkpoint.save(folder, last, wrapped, optimizer, {"optimizer_steps": last}, keep=9, fsdp=o.fsdp)
    return out if dist.get_rank() == 0 else {}


SINGLE: dict = {}


def single(which: str, packed: bool) -> dict:
    if (which, packed) not in SINGLE:
        SINGLE[which, packed] = run_ranks(1, run_layout, which, {}, packed)[0]
    return SINGLE[which, packed]


def compare(got: dict, want: dict, layout: dict, steps: int = STEPS) -> None:
    assert got["losses"][0] == pytest.approx(want["losses"][0], rel=TOLERANCE), layout
    assert got["gradients"].keys() == want["gradients"].keys()
    errors = {k: ((got["gradients"][k] - g).abs().max() / g.abs().max()).item() for k, g in want["gradients"].items()}
    assert not {k: v for k, v in errors.items() if not v <= TOLERANCE}, layout
    assert got["norms"][:steps] == pytest.approx(want["norms"][:steps], rel=NORMS), layout
    assert got["losses"][:steps] == pytest.approx(want["losses"][:steps], rel=TRAJECTORY), layout


@pytest.mark.parametrize(("which", "name", "packed"), CASES)
def test_layout_equals_single_process(which, name, packed):
    world, layout = LAYOUTS[name]
    steps = STEPS if name in LONG else 2
    compare(
        run_ranks(world, run_layout, which, layout, packed, "cpu", 0, steps)[0], single(which, packed), layout, steps
    )


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("dense tied", ["pp2 vpp2", "one", "dp2 pp2"]),
        ("dense", ["tp4 sp", "one", "pp2 uneven"]),
        ("moe", ["ep2", "one", "tp2 sp etp1 ep2"]),
        ("moe", ["fsdp2", "pp2 ep2", "one"]),
    ],
)
def test_a_run_continued_on_other_layouts_is_the_unbroken_one(which, names, tmp_path):
    """A weight that stages share, or that tensor-parallel ranks hold whole, is written once and read by all of them.
    Experts move to other ranks."""
    losses = []
    for i, name in enumerate(names):
        world, layout = LAYOUTS.get(name, (1, {}))
        losses += run_ranks(world, run_layout, which, layout, True, "cpu", 3 * i, 3 * i + 3, tmp_path)[0]["losses"]
    assert losses == pytest.approx(single(which, True)["losses"][:9], rel=TRAJECTORY)
    assert checkpoint.tensor_sizes(tmp_path / "step-000003") == checkpoint.tensor_sizes(tmp_path / "step-000006")


def generate(folder, layout: dict, prompts: list[list[int]]) -> list[list[int]]:
    config = case.config.Qwen3Config.from_folder(folder)
    o = case.options(**layout)
    parallel.initialize(o)
    chunks = case.model.build(o, config)
    table = case.convert.table(config)
    release.load(chunks, table.entries(folder), table)
    values = {f.name: f.default for f in dataclasses.fields(case.jobs.InferOptions)} | {
        "max_new_tokens": 12,
        "batch": 2,
    }
    return generation.generate(chunks[0].eval(), prompts, case.jobs.InferOptions(**values), set())


@pytest.mark.parametrize(
    ("which", "name"), [("dense tied", "pp2 uneven"), ("dense tied", "tp2 pp2"), ("moe", "pp2"), ("dense", "tp4")]
)
def test_greedy_generation_equals_transformers_token_for_token(which, name, tmp_path):
    world, layout = LAYOUTS.get(name, (4, {"tp": 2, "pp": 2}))
    oracle, generator = case.save_oracle(tmp_path, case.CONFIGS[which]), torch.Generator().manual_seed(5)
    prompts = [torch.randint(96, (n,), generator=generator).tolist() for n in (7, 3, 7, 1)]
    settings = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    want = [oracle.generate(torch.tensor([p]), **settings)[0, len(p) :].tolist() for p in prompts]
    assert run_ranks(world, generate, tmp_path, layout, prompts) == [want] * world


@pytest.mark.parametrize(("which", "name"), [("dense", "one"), ("moe", "one"), ("dense", "tp2 sp"), ("moe", "tp2 sp")])
def test_npu_branch_equals_single_process(which, name):
    """The kernels are those of npu_contract.py: nothing runs on Ascend."""
    world, layout = LAYOUTS.get(name, (1, {}))
    compare(run_ranks(world, run_layout, which, layout, True, "npu", 0, 2)[0], single(which, True), layout, 2)


def test_packing_changes_neither_loss_nor_gradients():
    """The documents of a packed row give the same step as one row each, padded with tokens without loss."""
    got = run_ranks(1, unpacked, "dense")[0]
    want = single("dense", True)
    assert got["loss"] == pytest.approx(want["losses"][0], rel=TOLERANCE)
    for name, gradient in want["gradients"].items():
        assert (got["gradients"][name] - gradient).abs().max() <= TOLERANCE * gradient.abs().max(), name


def unpacked(which: str) -> dict:
    o, config = case.options(global_batch=12), case.CONFIGS[which]
    parallel.initialize(o)
    chunks = case.model.build(o, config)
    case.load(chunks, case.random_state(config))
    wrapped = parallel.wrap(chunks, o, case.model.Qwen3Block)
    batches = []
    for row in (sample(place, 0, packed=True) for place in range(case.GLOBAL_BATCH)):
        for a, b in zip(row["bounds"], row["bounds"][1:], strict=False):
            pad = case.LENGTH - (b - a)
            tokens, positions = (torch.nn.functional.pad(row[k][a:b], (0, pad)) for k in ("tokens", "positions"))
            labels = torch.nn.functional.pad(row["labels"][a:b], (0, pad), value=-100)
            batches.append({"tokens": tokens, "labels": labels, "positions": positions,
                            "cu_seqlens": [0, case.LENGTH], "rows": 1})  # fmt: skip
    wrapped[0].config.grad_scale_func = None
    shape = {"micro_batch": 1, "sequence_length": case.LENGTH}
    results = loop.forward(wrapped, case.train.forward_step, case.train.weighted(batches, 1), **shape)
    return {"loss": loop.global_loss(o, results, False)[0], "gradients": whole_gradients(o, wrapped)}
