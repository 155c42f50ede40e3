"""Tiny Wan cases that the tests of zoo/wan21 share. All dimensions are different, all parameters are random, and grids
are not square."""

import dataclasses
import importlib
import json
import os
from pathlib import Path

import pytest
import torch

from common import cli, parallel, worker

RECIPE = os.environ.get("ZOO_RECIPE", "wan21")
config = importlib.import_module(f"zoo.{RECIPE}.config")
if not hasattr(config, "WanConfig"):
    pytest.skip(f"zoo/{RECIPE} is another model", allow_module_level=True)
convert = importlib.import_module(f"zoo.{RECIPE}.convert")
jobs = importlib.import_module(f"zoo.{RECIPE}.options")
model = importlib.import_module(f"zoo.{RECIPE}.model")
train = importlib.import_module(f"zoo.{RECIPE}.train")

CONFIG = config.WanConfig(
    dim=48, ffn_dim=80, num_heads=4, num_layers=4, in_dim=16, out_dim=16, patch_size=(1, 2, 2),
    text_dim=20, text_len=7, freq_dim=32, eps=1e-6, image_dim=None, image_tokens=0, first_last=False,
)  # fmt: skip
I2V = dataclasses.replace(CONFIG, in_dim=36, image_dim=28, image_tokens=5)
FLF2V = dataclasses.replace(I2V, first_last=True)
GRID = (3, 4, 8)  # 3*2*4 = 24 tokens
GLOBAL_BATCH = 4


def options(**layout) -> "jobs.TrainOptions":
    """Returns checked training options of the tiny case under a layout. Needs WORLD_SIZE."""
    values = {"size": "tiny", "layout": "tiny", "precision": "fp32", "micro_batch": 1, "global_batch": GLOBAL_BATCH,
              "steps": 20, "lr": 1e-3, "lr_schedule": "constant"} | layout  # fmt: skip
    o = jobs.TrainOptions(**{f.name: f.default for f in dataclasses.fields(jobs.TrainOptions)} | values)
    tokens = CONFIG.tokens(GRID)
    return cli.check_layout(o, heads=CONFIG.num_heads, layers=CONFIG.num_layers, tokens=tokens)


def random_state(seed: int = 0, config=CONFIG) -> dict[str, torch.Tensor]:
    """Draws every parameter at random, norms, biases and zero-initialised ones too. Returns {original name: tensor}."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in convert.shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        state[name] = 1 + 0.1 * noise if name.endswith("weight") and len(shape) == 1 else 0.1 * noise  # norms
    return state


def sample_batch(place: int, step: int = 0, config=CONFIG) -> dict:
    """Draws the sample at a place of the global batch. It is the same in every layout."""
    g = torch.Generator().manual_seed(1000 * step + place)
    x, target = (torch.randn(1, config.out_dim, *GRID, generator=g) for _ in range(2))
    text = torch.randn(1, config.text_len, config.text_dim, generator=g)
    text[:, config.text_len - 5 + place % 4 :] = 0  # captions have different lengths
    t = torch.rand(1, generator=g) * 1000
    batch = {"x": x, "target": target, "t": t, "weight": torch.rand(1, generator=g) + 0.5, "text": text}
    if config.image_dim is not None:
        batch["y"] = torch.randn(1, config.in_dim - config.out_dim, *GRID, generator=g)
        batch["image"] = torch.randn(1, config.image_rows, config.image_dim, generator=g)
    return batch


def my_batches(o, step: int = 0, config=CONFIG) -> list[dict]:
    """Returns this rank's micro-batches of the global batch."""
    rank = parallel.mpu.get_data_parallel_rank()
    samples = [sample_batch(i, step, config) for i in range(o.global_batch)]
    batches = []
    for micro in range(o.micro_batches):
        start = (micro * o.dp + rank) * o.micro_batch
        micro_batch = samples[start : start + o.micro_batch]
        batches.append({k: torch.cat([b[k] for b in micro_batch]) for k in micro_batch[0]})
    return batches


def load(chunks, state: dict[str, torch.Tensor]) -> None:
    """Copies whole tensors into this rank's shards."""
    from common import checkpoint

    tp = (parallel.mpu.get_tensor_model_parallel_rank(), parallel.mpu.get_tensor_model_parallel_world_size())
    with torch.no_grad():
        for name, p in checkpoint.parameters(chunks):
            split = p.partition_dim if getattr(p, "tensor_model_parallel", False) else None
            p.copy_(state[name] if split is None else state[name].chunk(tp[1], split)[tp[0]])


def sequence_length(o, config=CONFIG) -> int:
    split = o.cp * (o.tp if o.sp else 1)
    return (config.tokens(GRID) // split + config.context_rows) * split


def job(script: str, *argv) -> None:
    """Runs train, infer or convert in this process, as its launcher does. Call it through `run_ranks`."""
    recipe = f"zoo.{RECIPE}"
    try:
        worker.run(recipe, script, importlib.import_module(f"{recipe}.options").parse(script, [*map(str, argv)]))
    finally:
        torch.use_deterministic_algorithms(False)


def steps_of(out: Path) -> dict[int, tuple[float, float]]:
    """Reads {step: (loss, gradient norm)} from a run folder."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if row["kind"] == "step"}
