"""Tiny Qwen3 cases that the tests of zoo/qwen3 share. All dimensions are different, and all parameters are random."""

import dataclasses
import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from common import cli, release, worker

RECIPE = os.environ.get("ZOO_RECIPE", "qwen3")
config = importlib.import_module(f"zoo.{RECIPE}.config")
if not hasattr(config, "Qwen3Config"):
    pytest.skip(f"zoo/{RECIPE} is another model", allow_module_level=True)
convert = importlib.import_module(f"zoo.{RECIPE}.convert")
jobs = importlib.import_module(f"zoo.{RECIPE}.options")
infer = importlib.import_module(f"zoo.{RECIPE}.infer")
model = importlib.import_module(f"zoo.{RECIPE}.model")
train = importlib.import_module(f"zoo.{RECIPE}.train")

_SHAPE = dict(
    vocab_size=96, hidden_size=40, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
    rope_factor=1.0, original_max_position_embeddings=64, initializer_range=0.02,
)  # fmt: skip
_NO_EXPERTS = dict(num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, norm_topk_prob=False)
CONFIGS = {
    "dense": config.Qwen3Config(**_SHAPE, **_NO_EXPERTS, tie_word_embeddings=False),
    "dense tied": config.Qwen3Config(**_SHAPE, **_NO_EXPERTS, tie_word_embeddings=True),
    "moe": config.Qwen3Config(
        **_SHAPE, tie_word_embeddings=False, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20,
        norm_topk_prob=True,
    ),
}  # fmt: skip
CONFIGS["yarn"] = dataclasses.replace(CONFIGS["dense"], rope_factor=4.0)
LENGTH, GLOBAL_BATCH = 16, 4


def options(**layout):
    """Returns checked training options of the tiny case under a layout. Needs WORLD_SIZE."""
    cls = jobs.TrainOptions
    values = {"size": "tiny", "layout": "tiny", "precision": "fp32", "micro_batch": 1, "global_batch": GLOBAL_BATCH,
              "steps": 20, "lr": 1e-3, "lr_schedule": "constant"} | layout  # fmt: skip
    o = cls(**{f.name: f.default for f in dataclasses.fields(cls)} | values)
    return cli.check_layout(o, heads=_SHAPE["num_attention_heads"], layers=4, tokens=LENGTH, experts=6)


def random_state(which, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draws every parameter at random, also norms. Returns {our name: tensor}."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in convert.shapes(which).items():
        noise = torch.randn(shape, generator=generator)
        state[name] = 1 + 0.1 * noise if name.endswith("norm.weight") else 0.15 * noise
    return state


def source(state: dict[str, torch.Tensor]) -> release.Source:
    """Makes whole tensors a source from which a release is written or merged."""
    return release.Source(lambda name: state[name].element_size(), state.__getitem__)


def load(chunks, state: dict[str, torch.Tensor]) -> None:
    """Copies whole tensors into this rank's shards."""
    from common import checkpoint

    with torch.no_grad():
        for name, p in checkpoint.parameters(chunks):
            part = state[name]
            for dim, rank, size in checkpoint.cuts(p):
                part = part.chunk(size, dim)[rank]
            p.copy_(part)


def oracle_config(which) -> Qwen3Config | Qwen3MoeConfig:
    """Returns transformers' own config."""
    cls = Qwen3MoeConfig if which.num_experts else Qwen3Config
    return cls(**{k: v for k, v in which.to_released().items() if k not in ("architectures", "model_type")})


def oracle(which):
    config = oracle_config(which)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)


def save_oracle(folder, config, seed=0):
    """Draws every parameter of transformers' model at random, saves it as a release, and returns it."""
    hf_model, generator = oracle(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in hf_model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else 0.15 * noise)
    hf_model.save_pretrained(folder)
    return hf_model


def job(*argv) -> None:
    """Trains with the recipe in this process. Call it through `run_ranks`."""
    o = jobs.parse("train", [*map(str, argv)])
    jobs.prepare(o)  # as the launcher does: a fresh checkout has no demo data
    try:
        worker.run(f"zoo.{RECIPE}", "train", o)
    finally:
        torch.use_deterministic_algorithms(False)


def steps_of(out: Path) -> dict[int, dict]:
    """Reads from a run folder, for each step, the values that are equal in two equal runs."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    fields = ("loss", "grad_norm", "lr", "margin", "accuracy")
    return {row["step"]: {key: row[key] for key in fields if key in row} for row in rows if row["kind"] == "step"}
