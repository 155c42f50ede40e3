"""What the proofs of tests/test_models.py need to know of this model: small architectures, an oracle, a training
sample, layouts. A copied recipe has its own; change it right after model.py.
"""

import dataclasses

import torch
import torch.nn.functional as F
import transformers

from common import cli
from common.release import Table

from . import convert
from .config import Deepseek3Config
from .data import weighted
from .model import Deepseek3Block
from .options import TrainOptions

# All dimensions are different, so that a test notices two that are swapped.
_SHAPE = dict(
    vocab_size=96, hidden_size=40, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
    rope_factor=1.0, original_max_position_embeddings=64, initializer_range=0.02,
)  # fmt: skip
_DENSE = dict(num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, norm_topk_prob=False)
_EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20, norm_topk_prob=True)
CONFIGS = {
    "dense": Deepseek3Config(**_SHAPE, **_DENSE, tie_word_embeddings=False),
    "tied": Deepseek3Config(**_SHAPE, **_DENSE, tie_word_embeddings=True),
    "experts": Deepseek3Config(**_SHAPE, **_EXPERTS, tie_word_embeddings=False),
}
PUBLISHED = {  # parameters, tensors on disk
    "0.6B": (596_049_920, 310), "1.7B": (1_720_574_976, 310), "4B": (4_022_468_096, 398), "8B": (8_190_735_360, 399),
    "14B": (14_768_307_200, 443), "32B": (32_762_123_264, 707), "30B-A3B": (30_532_122_624, 18_867),
    "235B-A22B": (235_093_634_560, 36_945),
}  # fmt: skip
BLOCK = Deepseek3Block
LENGTH, GLOBAL_BATCH = 16, 4
LAYOUTS = {  # processes, options, architectures
    "dp2": (2, {}, ["dense", "experts"]),
    "fsdp2": (2, {"fsdp": True}, ["tied", "experts"]),
    "tp2": (2, {"tp": 2}, ["dense", "experts"]),
    "tp2 sp": (2, {"tp": 2, "sp": True}, ["tied", "experts"]),
    "cp2 ulysses": (2, {"cp": 2}, ["dense"]),
    "cp2 ring": (2, {"cp": 2, "ulysses": 1}, ["dense"]),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}, ["tied", "experts"]),
    "tp2 sp pp2": (4, {"tp": 2, "sp": True, "pp": 2}, ["tied"]),
    "ep2": (2, {"ep": 2}, ["experts"]),
    "tp2 sp etp1 ep2": (2, {"tp": 2, "sp": True, "etp": 1, "ep": 2}, ["experts"]),
}
QUICK: list[str] = []  # options that shorten the steps and the work after training
REFUSED = {"experts of a dense model": (2, {"ep": 2}, "has no experts")}


def options(config: Deepseek3Config, **values) -> TrainOptions:
    """Returns checked options of a training run with four rows per step."""
    defaults = {"size": "tiny", "layout": "tiny", "precision": "fp32", "micro_batch": 1, "global_batch": GLOBAL_BATCH,
             "seq_len": LENGTH, "steps": 20, "lr": 1e-3, "lr_schedule": "constant"}  # fmt: skip
    o = TrainOptions(**{f.name: f.default for f in dataclasses.fields(TrainOptions)} | defaults | values)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    return cli.check_layout(o, heads=heads, layers=layers, tokens=LENGTH, experts=config.num_experts)


def sequence_length(o: TrainOptions, config: Deepseek3Config) -> int:
    return LENGTH


def tables(config: Deepseek3Config) -> dict[str, Table]:
    """Returns the table of every layout in which the model is released."""
    return {"released": convert.table(config)}


# ------------------------------------------------------------------------------------------------------------- a step


def sample(config: Deepseek3Config, place: int, step: int) -> dict:
    """Draws the row at a place of the step's global batch: three documents; the first few tokens have no loss."""
    generator = torch.Generator().manual_seed(1000 * step + place)
    tokens, labels = (torch.randint(config.vocab_size, (LENGTH,), generator=generator) for _ in range(2))
    labels[: 1 + place % 3] = -100
    bounds = [0, 3 + place % 4, 9, LENGTH]
    positions = torch.cat([torch.arange(b - a) for a, b in zip(bounds, bounds[1:], strict=False)])
    return {"tokens": tokens, "labels": labels, "positions": positions, "bounds": bounds}


def collate(samples: list[dict]) -> dict:
    """Joins samples to one micro-batch."""
    joined = {key: torch.cat([s[key] for s in samples]) for key in ("tokens", "labels", "positions")}
    ends = [i * LENGTH + end for i, s in enumerate(samples) for end in s["bounds"][1:]]
    return joined | {"cu_seqlens": [0, *ends], "rows": len(samples)}


def prepare(o: TrainOptions, micro_batches: list[dict]) -> list[dict]:
    """Prepares a step's micro-batches as training does before it runs them."""
    return weighted(micro_batches, o.dp)


# ------------------------------------------------------------------------------------------------------------- oracle


def oracle(config: Deepseek3Config) -> torch.nn.Module:
    """Builds transformers' model, in fp32."""
    cls = transformers.Qwen3MoeConfig if config.num_experts else transformers.Qwen3Config
    values = {k: v for k, v in config.to_released().items() if k not in ("architectures", "model_type")}
    return transformers.AutoModelForCausalLM.from_config(
        cls(**values), attn_implementation="eager", dtype=torch.float32
    )


def to_oracle(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Converts a name and its tensor (a weight or its gradient) to the oracle's, whose stacked experts have another
    order of axes."""
    key = convert.released(name)
    if name.endswith("mlp.gate_up"):  # [G, D, 2, F] -> [G, 2F, D]
        return key.replace("gate_up", "experts.gate_up_proj"), tensor.permute(0, 2, 3, 1).flatten(1, 2)
    if name.endswith("mlp.down"):  # [G, F, D] -> [G, D, F]
        return key.replace("down", "experts.down_proj"), tensor.transpose(1, 2)
    return key, tensor


def oracle_loss(model: torch.nn.Module, samples: list[dict]) -> torch.Tensor:
    """Computes the oracle's loss on the samples of a step. It reads every document by itself."""
    losses = []
    for s in samples:
        for start, end in zip(s["bounds"], s["bounds"][1:], strict=False):
            logits, labels = model(input_ids=s["tokens"][None, start:end]).logits[0], s["labels"][start:end]
            losses.append(F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")[labels >= 0])
    return torch.cat(losses).mean()
