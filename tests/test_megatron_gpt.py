"""One import adapts megatron-core. The script megatron_gpt.py trains megatron-core's own GPTModel; its losses and
gradient norms equal those of the same model in plain torch, in several layouts on CPU and in one process on the
stand-in device (fake_ascend.py; nothing here ran on Ascend)."""

import json
import os
import re
import subprocess
import sys

import fake_ascend
import megatron_gpt
import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from ranks import run_ranks

pytestmark = pytest.mark.L3

TOLERANCE = 1e-5  # relative, of losses and gradient norms in fp32


# ------------------------------------------------------------------------------------------------------- in plain torch

HEADS, GROUPS, CHANNELS, LAYERS = 4, 2, 12, 4


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Applies rotary position embedding to [B, L, heads, CHANNELS]. Dimensions i and i + CHANNELS / 2 are a pair."""
    frequencies = 10000.0 ** (-torch.arange(0, CHANNELS, 2) / CHANNELS)
    angles = torch.outer(torch.arange(x.shape[1]), frequencies)[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)


def gpt(w: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Computes int64 [B, L] -> logits [B, L, vocabulary] with the parameters of a GPTModel, under its own names."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = w["embedding.word_embeddings.weight"][tokens]
    for i in range(LAYERS):
        layer = f"decoder.layers.{i}"
        qkv = linear(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attention.linear_qkv")
        # Each group holds its query heads, then its key head, then its value head.
        q, k, v = qkv.unflatten(-1, (GROUPS, -1, CHANNELS)).split([HEADS // GROUPS, 1, 1], 3)
        q, k, v = rotate(q.flatten(2, 3)), rotate(k.flatten(2, 3)), v.flatten(2, 3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        x = x + linear(out, f"{layer}.self_attention.linear_proj")
        hidden = F.gelu(linear(norm(x, f"{layer}.pre_mlp_layernorm"), f"{layer}.mlp.linear_fc1"))
        x = x + linear(hidden, f"{layer}.mlp.linear_fc2")
    return norm(x, "decoder.final_layernorm") @ w["output_layer.weight"].t()


def train_in_plain_torch(weights: dict[str, torch.Tensor]) -> list[tuple[float, float]]:
    o = megatron_gpt.OPTIMIZER
    weights = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
    # The script has no scheduler. Without one, megatron-core's weight decay applies to all parameters alike.
    optimizer = torch.optim.AdamW(
        weights.values(), o["lr"], (o["adam_beta1"], o["adam_beta2"]), o["adam_eps"], o["weight_decay"]
    )
    record = []
    for step in range(megatron_gpt.STEPS):
        tokens = megatron_gpt.samples(step)
        loss = F.cross_entropy(gpt(weights, tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), o["clip_grad"])
        optimizer.step()
        record.append((loss.item(), norm.item()))
    return record


# -------------------------------------------------------------------------------------------------------- by the script


def shapes() -> dict[str, list[int]]:
    megatron_gpt.join(tp=1, pp=1)
    return {name: list(p.shape) for name, p in megatron_gpt.build().named_parameters()}


def draw(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Draws the weights of the whole model, none of them 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    noise = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + value if name.endswith("norm.weight") else value for name, value in noise.items()}


@torch.no_grad()
def load(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copies this rank's part of every weight. The names of a pipeline stage count its layers from 0."""
    first = model.decoder.layers[0].layer_number - 1
    for name, p in model.named_parameters():
        whole = weights[re.sub(r"(?<=layers\.)\d+", lambda i: str(first + int(i[0])), name)]
        if getattr(p, "tensor_model_parallel", False):
            whole = whole.chunk(mpu.get_tensor_model_parallel_world_size(), p.partition_dim)[
                mpu.get_tensor_model_parallel_rank()
            ]
        p.copy_(whole)


def train(shapes: dict[str, list[int]], tp: int = 1, pp: int = 1, **settings) -> list[tuple[float, float]]:
    megatron_gpt.join(tp, pp)
    model = megatron_gpt.build(**settings)
    load(model, draw(shapes))
    return megatron_gpt.train(model)


@pytest.fixture(scope="module")
def of_one_process() -> dict[str, list[int]]:
    return run_ranks(1, shapes)[0]


@pytest.fixture(scope="module")
def expected(of_one_process) -> list[tuple[float, float]]:
    record = train_in_plain_torch(draw(of_one_process))
    assert record[-1][0] < 0.9 * record[0][0]  # it learns
    return record


def check(record: list, expected: list[tuple[float, float]]) -> None:
    assert len(record) == len(expected)
    flat = [[number for row in rows for number in row] for rows in (record, expected)]
    assert flat[0] == pytest.approx(flat[1], rel=TOLERANCE)


LAYOUTS = {
    "one process": (1, {}),
    "dp2": (2, {}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
}


def with_settings(shapes: dict[str, list[int]], layout: dict) -> list[tuple[float, float]]:
    return train(shapes, **layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatrons_gpt_trains_as_in_plain_torch(layout, of_one_process, expected):
    world, settings = LAYOUTS[layout]
    check(run_ranks(world, with_settings, of_one_process, settings)[-1], expected)


def train_on_stand_in(shapes: str) -> None:
    """Trains in a process whose npu device computes. Prints the record of the run, and the seed of the device's
    generator before, in and after a fork of megatron-core's random state."""
    record, seeds = train(json.loads(shapes)), [torch.cuda.initial_seed()]
    with get_cuda_rng_tracker().fork():
        seeds.append(torch.cuda.initial_seed())
    print("\n" + json.dumps({"record": record, "seeds": [*seeds, torch.cuda.initial_seed()]}))


def test_on_the_stand_in_device_it_trains_as_in_plain_torch(of_one_process, expected):
    try:
        env = os.environ | fake_ascend.environment(device=True)
    except fake_ascend.Unavailable as error:
        pytest.skip(str(error))
    env |= {"ZOO_DEVICE": "npu", "OMP_NUM_THREADS": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    call = f"import torch, test_megatron_gpt; test_megatron_gpt.train_on_stand_in('''{json.dumps(of_one_process)}''')"
    done = subprocess.run([sys.executable, "-c", call], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    check(answer["record"], expected)
    assert answer["seeds"] == [1, 1 + 2718, 1]  # what model_parallel_cuda_manual_seed(1) gives to rank 0 of tp


# ------------------------------------------------------------------------------------------------------- random numbers


def random_numbers() -> dict[str, list[float]]:
    """Draws on the device outside and in two forks of the tracker; then, with the same seed, outside and in one."""
    megatron_gpt.join(tp=2, pp=1)
    drawn = {"outside": torch.rand(3, device="cuda").tolist(), "inside": []}
    for _ in range(2):
        with get_cuda_rng_tracker().fork():
            drawn["inside"] += torch.rand(3, device="cuda").tolist()
    drawn["outside"] += torch.rand(3, device="cuda").tolist()
    model_parallel_cuda_manual_seed(1)
    drawn["no fork"] = torch.rand(3, device="cuda").tolist() + torch.rand(3, device="cuda").tolist()
    with get_cuda_rng_tracker().fork():
        drawn["one fork"] = torch.rand(3, device="cuda").tolist() + torch.rand(3, device="cuda").tolist()
    return drawn


def test_megatrons_random_numbers_differ_over_tp_where_they_should():
    """Dropout and initial values of tensor-parallel regions are drawn in a fork, all others outside."""
    first, second = run_ranks(2, random_numbers)
    assert first["outside"] == second["outside"] and not set(first["inside"]) & set(second["inside"])
    for drawn in (first, second):
        assert drawn["outside"] == drawn["no fork"] and drawn["inside"] == drawn["one fork"]
        assert len(set(drawn["inside"])) == 6


def train_with_dropout(shapes: dict[str, list[int]]) -> list[list[tuple[float, float]]]:
    """Returns the records without recomputation, with recomputed attention, and with recomputed layers."""
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    records = []
    for recompute in ({}, {"recompute_granularity": "selective"}, full):
        if records:
            model_parallel_cuda_manual_seed(1)
        else:
            megatron_gpt.join(tp=1, pp=1)
        model = megatron_gpt.build(attention_dropout=0.1, hidden_dropout=0.1, **recompute)
        load(model, draw(shapes))
        model_parallel_cuda_manual_seed(1)
        records.append(megatron_gpt.train(model))
    return records


def test_recomputation_draws_the_same_dropout_again(of_one_process, expected):
    plain, selective, full = run_ranks(1, train_with_dropout, of_one_process)[0]
    assert selective == plain and full == plain
    with pytest.raises(AssertionError):  # dropout changes the record
        check(plain, expected)
