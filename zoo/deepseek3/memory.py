"""Measures the peak memory of a training step on one rank, feature by feature: the second optimizer step, on one row.

    .venv/bin/python -m zoo.deepseek3.memory [--size tiny] [--seq-len 8192] [--record]      --record: into perf.jsonl

common/memory.py says how it is counted. Fused kernels save less than the reference ops counted here: one output of
attention and one of the activation less. The model is really computed, because only then it is known how many rows each
expert gets.
"""

import functools
from collections.abc import Iterator
from unittest import mock

from common import device  # isort: skip  (before megatron)
import torch

from common import cli, memory, ops

from .config import SIZES, memory_estimate
from .model import Deepseek3Block, build
from .options import HERE, TrainOptions, trained_parameters
from .train import forward_step, weighted

FEATURES = {  # name -> (ranks, options)
    "plain": (1, {}),
    "logits of all tokens at once": (1, {}),
    "recompute selective": (1, {"recompute": "selective"}),
    "recompute full": (1, {"recompute": "full"}),
    "offloaded activations": (1, {"offload_activations": True}),
    "bf16 moments": (1, {"moments": "bf16"}),
    "offloaded optimizer": (1, {"offload_optimizer": True}),
    "fsdp 2": (2, {"fsdp": True}),
    "tp 2, sequence parallel": (2, {"tp": 2, "sp": True}),
}


def steps(o: TrainOptions) -> Iterator[list[dict]]:
    """Yields the micro-batches of each step: one micro-batch of one row of tokens."""
    tokens = torch.zeros(o.seq_len, dtype=torch.int64, device=device.current())
    batch = {"tokens": tokens, "labels": tokens, "positions": tokens, "cu_seqlens": [0, o.seq_len], "rows": 1}
    while True:
        yield weighted([batch], o.dp, o.mtp_weight)


def measure(o: TrainOptions) -> tuple[int, int]:
    """Measures (bytes at the peak of a step, bytes that stay between steps) of rank 0."""
    return memory.measure(
        o, functools.partial(build, o, SIZES[o.size]), Deepseek3Block, forward_step, functools.partial(steps, o),
        o.seq_len, fake=False,
    )  # fmt: skip


def options(name: str, size: str, length: int, precision: str) -> TrainOptions:
    """Returns checked options of a run with this feature: one micro-batch of one row."""
    (ranks, layout), config = FEATURES[name], SIZES[size]
    o = memory.options(TrainOptions, ranks, size=size, seq_len=length, precision=precision, **layout)
    return cli.check_layout(o, heads=config.num_attention_heads, layers=config.num_hidden_layers, tokens=length)


def table(size: str, length: int, precision: str) -> Iterator[dict]:
    """Yields a row of perf.jsonl for each feature."""
    for name in FEATURES:
        o = options(name, size, length, precision)
        with mock.patch.object(ops, "CHUNK", 2**62 if name.startswith("logits") else ops.CHUNK):
            measured = measure(o)
        estimate = memory_estimate(o, SIZES[size], length, trained_parameters(o, SIZES[size]))
        yield memory.row(
            o,
            model="DeepSeek-V3",
            layout=name,
            shape=length,
            sample=f"{length} tokens",
            measured=measured,
            estimate=estimate,
        )


def main() -> None:
    description = "Peak memory of a training step on one rank, feature by feature."
    args = memory.parser(SIZES, description, size="tiny", seq_len=1024, precision="fp32").parse_args()
    rows = table(args.size, args.seq_len, args.precision)
    memory.report(rows, "{layout:<30} {raw} GiB", HERE / "perf.jsonl" if args.record else None)


if __name__ == "__main__":
    main()
