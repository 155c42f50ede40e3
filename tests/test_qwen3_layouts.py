"""Loss, per-parameter gradients and an AdamW trajectory of every layout equal one process (fp32, gloo)."""

import npu_contract
import pytest
import qwen_case as case
import torch
import torch.distributed as dist
from ranks import run_ranks

from common import checkpoint, ops, parallel
from common import train as loop

pytestmark = pytest.mark.L3

TOLERANCE = 1e-5  # relative to the largest entry of the tensor
STEPS = 10

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
}
MOE = ["dp2", "fsdp2", "tp2", "tp2 sp", "pp2 vpp2", "cp2 ring"]
CASES = (
    [("dense", n) for n in LAYOUTS] + [("moe", n) for n in MOE] + [("dense tied", "tp2 sp"), ("dense tied", "fsdp2")]
)


def sample(place: int, step: int, packed: bool) -> dict:
    """One sequence of the global batch, drawn by its place; packed: three documents and a few tokens without loss."""
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
    return case.train.weighted(batches, o.dp)


def run_layout(which: str, layout: dict, packed: bool, backend: str = "cpu") -> dict:
    """On every rank: train from the shared weights. Returns rank 0's whole gradients of the first step, and losses."""
    npu_contract.install()
    ops.BACKEND = backend
    try:
        return _run_layout(which, layout, packed)
    finally:
        ops.BACKEND = "cpu"


def _run_layout(which: str, layout: dict, packed: bool) -> dict:
    o, config = case.options(**layout), case.CONFIGS[which]
    parallel.initialize(o)
    chunks = case.model.build(o, config)
    case.load(chunks, case.random_state(config))
    wrapped = parallel.wrap(chunks, o, case.model.Qwen3Block)
    optimizer = loop.build_optimizer(o, wrapped)
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    out = {"losses": []}
    for step in range(STEPS):
        for chunk in wrapped:
            if hasattr(chunk, "zero_grad_buffer"):
                chunk.zero_grad_buffer()
        optimizer.zero_grad()
        batches = my_batches(o, step, packed)
        results = loop.get_forward_backward_func()(
            forward_step_func=case.train.forward_step,
            data_iterator=[iter(batches) for _ in wrapped] if len(wrapped) > 1 else iter(batches),
            model=wrapped if len(wrapped) > 1 else wrapped[0],
            num_microbatches=len(batches),
            seq_length=case.LENGTH,
            micro_batch_size=o.micro_batch,
        )
        if step == 0:
            out["gradients"] = whole_gradients(o, wrapped)
        optimizer.prepare_grads()
        out["losses"].append(loop.global_loss(o, results, False)[0])
        optimizer.step_with_ready_grads()
    return out if dist.get_rank() == 0 else {}


# Copied from tests.test_wan21_layouts: the gradients of the whole model, put together on every rank.
def whole_gradients(o, wrapped) -> dict[str, torch.Tensor]:
    if not o.fsdp and o.dp * o.cp > 1:
        # The distributed optimizer leaves each rank only its reduced part; the others' are whatever they held.
        group = parallel.mpu.get_data_parallel_group(with_context_parallel=True)
        for bucket in (b for chunk in wrapped for buffer in chunk.buffers for b in buffer.buckets):
            parts = list(bucket.grad_data.chunk(group.size()))
            gathered = [torch.empty_like(p) for p in parts]
            dist.all_gather(gathered, parts[group.rank()].clone(), group=group)
            bucket.grad_data.copy_(torch.cat(gathered))
    mine, splits = {}, {}
    for name, p in checkpoint.trained(wrapped):
        value = p.grad if o.fsdp else p.main_grad
        mine[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        splits[name] = p.partition_dim if getattr(p, "tensor_model_parallel", False) and o.tp > 1 else None
    world = [None] * dist.get_world_size()
    dist.all_gather_object(world, (parallel.mpu.get_tensor_model_parallel_rank(), mine, splits))
    found: dict[str, dict[int, torch.Tensor]] = {}
    for tp_rank, tensors, cuts in world:
        splits |= cuts
        for name, tensor in tensors.items():
            found.setdefault(name, {}).setdefault(tp_rank, tensor)
    return {
        name: parts[0] if splits[name] is None else torch.cat([parts[i] for i in sorted(parts)], splits[name])
        for name, parts in found.items()
    }


SINGLE: dict = {}


def single(which: str, packed: bool) -> dict:
    if (which, packed) not in SINGLE:
        SINGLE[which, packed] = run_ranks(1, run_layout, which, {}, packed)[0]
    return SINGLE[which, packed]


def compare(got: dict, want: dict, layout: dict) -> None:
    assert got["losses"][0] == pytest.approx(want["losses"][0], rel=TOLERANCE), layout
    assert got["gradients"].keys() == want["gradients"].keys()
    worst = {k: ((got["gradients"][k] - g).abs().max() / g.abs().max()).item() for k, g in want["gradients"].items()}
    assert not {k: v for k, v in worst.items() if not v <= TOLERANCE}, layout
    # A trajectory amplifies rounding: Adam divides small gradients by their own size.
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-4), layout


@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed"])
@pytest.mark.parametrize(("which", "name"), CASES)
def test_layout_equals_single_process(which, name, packed):
    world, layout = LAYOUTS[name]
    compare(run_ranks(world, run_layout, which, layout, packed)[0], single(which, packed), layout)


@pytest.mark.parametrize(("which", "name"), [("dense", "one"), ("moe", "one"), ("dense", "tp2 sp"), ("moe", "tp2 sp")])
def test_npu_branch_equals_single_process(which, name):
    """Over the published contract: not a run on Ascend."""
    world, layout = LAYOUTS.get(name, (1, {}))
    compare(run_ranks(world, run_layout, which, layout, True, "npu")[0], single(which, True), layout)


def test_packing_changes_neither_loss_nor_gradients():
    """The documents of a packed row, one row each and padded with tokens without loss, give the same step."""
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
    results = loop.get_forward_backward_func()(
        forward_step_func=case.train.forward_step, data_iterator=iter(case.train.weighted(batches, 1)),
        model=wrapped[0], num_microbatches=12, seq_length=case.LENGTH, micro_batch_size=1,
    )  # fmt: skip
    return {"loss": loop.global_loss(o, results, False)[0], "gradients": whole_gradients(o, wrapped)}
