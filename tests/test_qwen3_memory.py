"""Tests that what saves memory changes nothing else: activations on the host, recomputation, bf16 moments. The
optimizer with which they are compared equals torch's: twenty steps of the loop equal transformers with
torch.optim.AdamW."""

import importlib
import json
import shutil
from collections import Counter
from pathlib import Path
from unittest import mock

import npu_contract
import pytest
import qwen_case as case
import test_qwen3_layouts as layouts
import torch
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from common import checkpoint, offload, ops, parallel
from common import memory as counting
from common import train as loop
from common.optimizer import PackedAdamW

pytestmark = pytest.mark.L3

# ------------------------------------------------------------------------------------- twenty steps against torch.optim

STEPS, ROWS = 20, 4
RUN = {"steps": STEPS, "lr": 1e-3, "warmup": 5, "weight_decay": 0.1, "beta2": 0.95, "save_every": 0, "keep": 1}


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws tokens and labels, both [ROWS, L]. The labels are already shifted, and some have no loss."""
    generator = torch.Generator().manual_seed(step)
    tokens, labels = (torch.randint(96, (ROWS, case.LENGTH), generator=generator) for _ in range(2))
    labels[:, : 1 + step % 5] = -100
    return tokens, labels


def trained(which: str, out: Path, options: dict) -> dict:
    """Runs our loop over `rows` with these options. Returns {"losses", "state": weights by our name, "moments": those
    of the optimizer}."""
    o = case.options(**RUN | options | {"out": out, "global_batch": ROWS})
    parallel.initialize(o)
    config = case.CONFIGS[which]
    chunks = case.model.build(o, config)
    case.load(chunks, case.random_state(config))
    wrapped = parallel.wrap(chunks, o, case.model.Qwen3Block)

    def prepare(batch):
        mine = range(parallel.mpu.get_data_parallel_rank(), ROWS, o.dp)
        positions, bounds = torch.arange(case.LENGTH), {"cu_seqlens": [0, case.LENGTH], "rows": 1}
        return case.train.weighted(
            [{"tokens": batch[0][i], "labels": batch[1][i], "positions": positions} | bounds for i in mine], o.dp
        )

    result = loop.train(
        o, wrapped, case.train.forward_step, lambda start: map(rows, range(start, o.steps)), prepare,
        sequence_length=lambda batch: case.LENGTH, samples=lambda batch: (case.LENGTH, 1),
        header={"hardware": "cpu", "starts_from": "drawn weights"}, state={},
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tensors = {
        key: checkpoint.read_tensor(result["checkpoint"], key) for key in checkpoint.tensor_sizes(result["checkpoint"])
    }
    return {
        "losses": [line["loss"] for line in lines if line["kind"] == "step"],
        "state": {key: tensor for key, tensor in tensors.items() if not key.startswith("optimizer.")},
        "moments": {key: tensor for key, tensor in tensors.items() if ".exp_avg" in key},
    }


def trained_by_torch(which: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    config = case.CONFIGS[which]
    cls = Qwen3MoeConfig if config.num_experts else Qwen3Config
    values = {k: v for k, v in config.to_released().items() if k not in ("architectures", "model_type")}
    theirs = AutoModelForCausalLM.from_config(cls(**values), attn_implementation="eager", dtype=torch.float32)
    ours, named = case.random_state(config), dict(theirs.named_parameters())
    with torch.no_grad():
        for name, tensor in ours.items():
            stacked = name.endswith(("mlp.gate_up", "mlp.down"))
            target = named[their_name(name) if stacked else case.convert.released(name)]
            target.copy_(as_theirs(name, tensor))
    decayed = [p for p in theirs.parameters() if p.dim() > 1]  # norms are not decayed, as in megatron-core
    not_decayed = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RUN["lr"], betas=(0.9, RUN["beta2"]), weight_decay=RUN["weight_decay"])
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RUN["lr"] * min(1.0, (step + 1) / RUN["warmup"])
        tokens, labels = rows(step)
        logits = theirs(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: as_ours(name, named) for name in ours}


def their_name(name: str) -> str:
    """Returns transformers' name of stacked experts: gate_up_proj [G, 2F, D] or down_proj [G, D, F]."""
    return (
        f"model.{name.replace('mlp.gate_up', 'mlp.experts.gate_up_proj').replace('mlp.down', 'mlp.experts.down_proj')}"
    )


def as_theirs(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.endswith("mlp.gate_up"):
        return tensor.permute(0, 2, 3, 1).flatten(1, 2)
    return tensor.transpose(1, 2) if name.endswith("mlp.down") else tensor


def as_ours(name: str, named: dict) -> torch.Tensor:
    if name.endswith("mlp.gate_up"):
        return named[their_name(name)].detach().unflatten(1, (2, -1)).permute(0, 3, 1, 2)
    if name.endswith("mlp.down"):
        return named[their_name(name)].detach().transpose(1, 2)
    return named[case.convert.released(name)].detach()


@pytest.mark.parametrize("which", ["dense", "moe"])
def test_twenty_steps_equal_transformers_and_torch_adamw(which, tmp_path):
    ours = run_ranks(1, trained, which, tmp_path / "run", {})[0]
    losses, weights = trained_by_torch(which)
    assert ours["losses"] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0]
    # Measured: 4e-6. Adam divides a gradient by its own size, and a gradient near zero is mostly rounding.
    errors = {k: ((ours["state"][k] - w).abs().max() / w.abs().max()).item() for k, w in weights.items()}
    assert not {k: v for k, v in errors.items() if not v <= 1e-4}


# ------------------------------------------------------------------------------------------------------- bf16 moments


class SmallMoments(PackedAdamW):
    moments = torch.bfloat16


def test_second_moments_follow_a_gradient_that_shrinks():
    """Rounded to nearest they would not move: at beta2 = 0.999 a step changes them by less than half of bf16's last
    place."""

    def second_moments(cls, nearest: bool = False) -> torch.Tensor:
        generator, p = torch.Generator().manual_seed(0), torch.nn.Parameter(torch.zeros(20_000))
        optimizer = cls([p], betas=(0.9, 0.999))
        for step in range(400):
            p.grad = torch.randn(p.shape, generator=generator) * (1.0 if step < 100 else 0.05)
            optimizer.step()
            if nearest:
                v = optimizer.state[p]["exp_avg_sq"]
                v.copy_(v.bfloat16())
        assert nearest or cls is torch.optim.AdamW or optimizer.state[p]["exp_avg_sq"].dtype == torch.bfloat16
        return optimizer.state[p]["exp_avg_sq"].double()

    want, got = second_moments(torch.optim.AdamW), second_moments(SmallMoments)
    assert got.mean().item() == pytest.approx(want.mean().item(), rel=1e-3)
    assert ((got - want).norm() / want.norm()).item() < 0.06
    assert second_moments(torch.optim.AdamW, nearest=True).mean() > 1.2 * want.mean()


def test_rounding_depends_on_no_piece_layout_or_generator(monkeypatch):
    start, grads = torch.randn(3, 1000), torch.randn(5, 3, 1000)

    def run(piece: int, seed: int, shards: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        monkeypatch.setattr(SmallMoments, "PIECE", piece)
        ps = [torch.nn.Parameter(part.clone()) for part in start.view(-1).chunk(shards)]
        optimizer = SmallMoments(ps, lr=0.1)
        for grad in grads:
            for p, g in zip(ps, grad.view(-1).chunk(shards), strict=True):
                p.grad = g.clone()
            optimizer.step()
        return [torch.cat([optimizer.state[p][k] for p in ps]) for k in ("exp_avg", "exp_avg_sq")] + [torch.cat(ps)]

    for got, want in zip(run(256, 1, 3), run(2**22, 2, 1), strict=True):
        assert torch.equal(got, want)


def test_moments_of_npu_equal_those_of_cpu(monkeypatch):
    npu_contract.install()
    weights = []
    for backend in ("cpu", "npu"):
        monkeypatch.setattr(ops, "BACKEND", backend)
        generator, p = torch.Generator().manual_seed(0), torch.nn.Parameter(torch.ones(7, 5))
        optimizer = SmallMoments([p], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
        for _ in range(5):
            p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        weights.append(p.detach())
    assert torch.allclose(*weights, rtol=1e-2, atol=1e-3)  # if fp32 differs in its last bit, bf16 may round differently


def test_bf16_moments_train_as_fp32_ones_and_take_half(tmp_path):
    small, full = (
        run_ranks(1, trained, "dense", tmp_path / kind, {"moments": kind, "beta2": 0.999})[0]
        for kind in ("bf16", "fp32")
    )
    # Measured differences after twenty steps: 2e-5 of the losses, 2.3e-4 of a tensor's largest weight.
    assert small["losses"] == pytest.approx(full["losses"], rel=1e-4)
    for name, weight in full["state"].items():
        assert (small["state"][name] - weight).abs().max() <= 1e-3 * weight.abs().max(), name
    for name, moment in small["moments"].items():  # stored as fp32; each value is a bf16 number
        assert moment.dtype == torch.float32 and torch.equal(moment, moment.bfloat16().float()), name


@pytest.mark.parametrize("layout", [{"tp": 2, "sp": True}, {"fsdp": True}], ids=lambda layout: " ".join(layout))
def test_bf16_moments_resume_bitwise_and_on_another_layout(layout, tmp_path):
    options = layout | {"moments": "bf16", "resume": "auto", "steps": 4, "warmup": 1}
    unbroken = run_ranks(2, trained, "dense", tmp_path / "whole", options)[0]
    run_ranks(2, trained, "dense", tmp_path / "parts", options | {"steps": 2})
    shutil.copytree(tmp_path / "parts", tmp_path / "other")
    resumed = run_ranks(2, trained, "dense", tmp_path / "parts", options)[0]
    assert resumed["losses"] == unbroken["losses"]
    for kind in ("state", "moments"):
        assert resumed[kind].keys() == unbroken[kind].keys()
        assert not [k for k, tensor in unbroken[kind].items() if not torch.equal(resumed[kind][k], tensor)]
    # The other layout is dp2, with fp32 moments.
    other = run_ranks(2, trained, "dense", tmp_path / "other", {"resume": "auto", "steps": 4, "warmup": 1})[0]
    assert other["losses"] == pytest.approx(unbroken["losses"], rel=3e-4)


# ------------------------------------------------------------------------------------------------ activations offloaded


def step(which: str, settings: dict) -> tuple[dict, list[tuple[int, int, bool]]]:
    """Computes one packed micro-batch. Returns {"loss", gradients by name}, and (number, bytes, whether of a parameter)
    for every move of a storage to the host; the number identifies the storage."""
    o, config, moved = case.options(**settings), case.CONFIGS[which], []
    parallel.initialize(o)
    original = offload.to_host

    def to_host(flat):
        moved.append(flat)  # kept alive, so that no other storage gets its address
        return original(flat)

    offload.to_host = to_host
    try:
        model = case.model.build(o, config)[0]
        case.load([model], case.random_state(config))
        if o.compile:
            for block in model.layers.values():
                block.compile(backend="aot_eager")  # shows what is saved and when, without the time for code generation
        tokens, labels = rows(0)
        positions, weight = torch.arange(case.LENGTH).repeat(ROWS), torch.full((ROWS * case.LENGTH,), 0.01)
        bounds = list(range(0, ROWS * case.LENGTH + 1, case.LENGTH))
        loss, _ = model(tokens.flatten(), positions, bounds, ROWS, labels.flatten(), weight)
        loss.backward()
    finally:
        offload.to_host = original
    parameters, places = {p.data_ptr() for p in model.parameters()}, [flat.data_ptr() for flat in moved]
    moves = [(places.index(place), flat.nbytes, place in parameters) for place, flat in zip(places, moved, strict=True)]
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}, moves


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("which", ["dense", "moe"])
def test_offloaded_step_is_bitwise_the_plain_one(which, recompute):
    want, moved_without = run_ranks(1, step, which, {"recompute": recompute})[0]
    got, moved = run_ranks(1, step, which, {"recompute": recompute, "offload_activations": True})[0]
    assert moved_without == [] and got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    config, tokens = case.CONFIGS[which], ROWS * case.LENGTH
    assert not any(parameter for _, _, parameter in moved)
    # Each storage moves once, however many operations read it. cos and sin, which all blocks read, move once per block.
    counts = Counter(moved)
    table_bytes = 4 * tokens * config.head_dim
    assert {(size, n) for (_, size, _), n in counts.items() if n > 1} == {(table_bytes, 4)}
    assert sum(n > 1 for n in counts.values()) == 2
    inputs = [size for (_, size, _), n in counts.items() if size == 4 * tokens * config.hidden_size]
    if recompute == "full":  # each block moves its input, cos and sin
        assert len(inputs) == 4 and len(moved) == 4 * 3
    else:
        assert len(inputs) > 4 and len(moved) > 4 * 3


def test_offloaded_step_compiles():
    want, _ = run_ranks(1, step, "dense", {"compile": True})[0]
    got, moved = run_ranks(1, step, "dense", {"compile": True, "offload_activations": True})[0]
    assert moved and all(torch.equal(got[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize(
    ("which", "world", "layout"),
    [
        ("dense", 2, {"fsdp": True, "offload_activations": True}),
        ("moe", 2, {"tp": 2, "sp": True, "recompute": "full", "offload_activations": True}),
        ("dense", 2, {"pp": 2, "vpp": 2, "recompute": "full", "offload_activations": True}),
        ("moe", 1, {"recompute": "selective", "offload_activations": True}),
    ],
    ids=lambda value: str(value),
)
def test_layout_that_saves_memory_equals_single_process(which, world, layout):
    layouts.compare(run_ranks(world, layouts.run_layout, which, layout, True)[0], layouts.single(which, True), layout)


def calls(recompute: str) -> Counter:
    """Counts the calls of each npu op in a step of the model with experts. The kernels are those of npu_contract.py."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[func.name().removeprefix("npu::npu_")] += 1
            return func(*args, **kwargs or {})

    npu_contract.install()
    counts, ops.BACKEND = Counter(), "npu"
    try:
        with Calls():
            step("moe", {"recompute": recompute})
    finally:
        ops.BACKEND = "cpu"
    return counts


def test_selective_recompute_does_norms_and_activations_again_and_no_product():
    none, selective, full = (run_ranks(1, calls, kind)[0] for kind in ("none", "selective", "full"))
    for op in ("fusion_attention", "grouped_matmul"):
        assert none[op] == selective[op] < full[op]
    for op in ("rms_norm", "add_rms_norm", "swiglu"):
        assert none[op] < selective[op] == full[op]


def test_npu_branch_under_selective_recompute_equals_single_process():
    """The kernels are those of npu_contract.py: nothing runs on Ascend."""
    layout = {"recompute": "selective"}
    got = run_ranks(1, layouts.run_layout, "moe", layout, True, "npu")[0]
    layouts.compare(got, layouts.single("moe", True), layout)


# --------------------------------------------------------------------------------------------------------------- memory


PLAIN = 93 * 2**20  # peak bytes of a step of size tiny with 1,024 tokens and no feature


def measured(name: str, size: str, length: int, fake: bool = True) -> tuple[int, int, float]:
    """Returns (peak, bytes between steps, estimate of the peak) in bytes, with a feature of the recipe's memory.py."""
    memory = importlib.import_module(f"zoo.{case.RECIPE}.memory")
    o, config, counted = memory.options(name, size, length, "fp32"), case.config.SIZES[size], counting.counted
    estimate = memory.memory_estimate(o, config, length, case.jobs.trained_parameters(o, config))
    with mock.patch.object(counting, "counted", counted if fake else lambda fake: counted(False)):
        return *memory.measure(o), estimate


def test_fake_tensors_count_as_real_ones():
    fake, real = (run_ranks(1, measured, "plain", "tiny", 256, kind)[0] for kind in (True, False))
    assert fake[:2] == pytest.approx(real[:2], rel=1e-4)  # some scalars differ
    config = case.config.SIZES["tiny"]
    assert fake[1] == pytest.approx(16 * config.parameters, rel=1e-3)  # weights, gradients and moments, all fp32


@pytest.mark.parametrize(
    "name",
    ["plain", "recompute selective", "recompute full", "offloaded activations", "bf16 moments",
     "offloaded optimizer", "fsdp 2", "tp 2, sequence parallel"],
)  # fmt: skip
def test_memory_estimate_is_within_an_eighth_of_the_measurement(name):
    peak, between, estimate = run_ranks(1, measured, name, "tiny", 1024)[0]
    assert 0.875 * peak <= estimate <= 1.05 * peak
    assert name == "plain" or peak < PLAIN
    if name == "offloaded optimizer":  # weights and gradients stay
        assert between == pytest.approx(8 * case.config.SIZES["tiny"].parameters, rel=3e-3)


def test_memory_estimate_of_experts():
    peak, _, estimate = run_ranks(1, measured, "plain", "tiny-moe", 512)[0]
    assert 0.875 * peak <= estimate <= 1.05 * peak
