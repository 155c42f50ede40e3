"""What the proofs of tests/test_models.py need to know of this model: small architectures, an oracle, a training
sample, layouts. A copied recipe has its own; change it right after model.py.
"""

import dataclasses

import torch
import torch.nn.functional as F
import transformers
from transformers.modeling_layers import MtpModel

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
    kv_lora_rank=14, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, first_k_dense_replace=1,
    n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=20, routed_scaling_factor=2.5, rms_norm_eps=1e-6,
    rope_theta=1e4, max_position_embeddings=64, initializer_range=0.02,
)  # fmt: skip
CONFIGS = {
    "grouped": Deepseek3Config(
        **_SHAPE, q_lora_rank=18, n_shared_experts=1, n_group=4, topk_group=2, num_nextn_predict_layers=1,
        rope_factor=4.0, rope_mscale=1.0, original_max_position_embeddings=16,
    ),
    "plain": Deepseek3Config(
        **_SHAPE, q_lora_rank=0, n_shared_experts=2, n_group=1, topk_group=1, num_nextn_predict_layers=0,
        rope_factor=1.0, rope_mscale=0.0, original_max_position_embeddings=64,
    ),
}  # fmt: skip
PUBLISHED = {"671B": (682_636_487_424, 46_181)}  # parameters, tensors on disk in bf16
BLOCK = Deepseek3Block
LENGTH, GLOBAL_BATCH = 16, 4
LAYOUTS = {  # processes, options, architectures
    "dp2": (2, {}, ["grouped"]),
    "fsdp2": (2, {"fsdp": True}, ["grouped"]),
    "tp2": (2, {"tp": 2}, ["grouped", "plain"]),
    "tp2 sp": (2, {"tp": 2, "sp": True}, ["grouped", "plain"]),
    "cp2 ulysses": (2, {"cp": 2}, ["grouped"]),
    "cp2 ring": (2, {"cp": 2, "ulysses": 1}, ["grouped"]),
    "pp2": (2, {"pp": 2, "stages": "3,1"}, ["grouped"]),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}, ["plain"]),
    "tp2 sp pp2": (4, {"tp": 2, "sp": True, "pp": 2}, ["grouped"]),
    "ep2": (2, {"ep": 2}, ["grouped"]),
    "ep2 gathered": (2, {"ep": 2, "dispatch": "allgather"}, ["grouped"]),
    "tp2 sp etp1 ep2": (2, {"tp": 2, "sp": True, "etp": 1, "ep": 2}, ["grouped"]),
}
QUICK: list[str] = []  # options that shorten the steps and the work after training
REFUSED = {"experts that do not split": (3, {"ep": 3}, "ep=3")}
MTP_WEIGHT = 0.3


def options(config: Deepseek3Config, **values) -> TrainOptions:
    """Returns checked options of a training run with four rows per step."""
    defaults = {"size": "tiny", "layout": "tiny", "precision": "fp32", "micro_batch": 1, "global_batch": GLOBAL_BATCH,
             "seq_len": LENGTH, "steps": 20, "lr": 1e-3, "lr_schedule": "constant", "mtp_weight": MTP_WEIGHT,
             "mtp": bool(config.num_nextn_predict_layers)}  # fmt: skip
    o = TrainOptions(**{f.name: f.default for f in dataclasses.fields(TrainOptions)} | defaults | values)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    return cli.check_layout(o, heads=heads, layers=layers, tokens=LENGTH, experts=config.n_routed_experts)


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
    return weighted(micro_batches, o.dp, o.mtp_weight if o.mtp else 0.0)


# ------------------------------------------------------------------------------------------------------------- oracle


class Oracle(torch.nn.Module):
    """transformers' model and, if the architecture has it, its multi-token prediction module."""

    def __init__(self, config: Deepseek3Config):
        super().__init__()
        values = {k: v for k, v in config.to_released().items() if k not in ("architectures", "model_type")}
        theirs = transformers.DeepseekV3Config(**values)
        self.main = transformers.AutoModelForCausalLM.from_config(
            theirs, attn_implementation="eager", dtype=torch.float32
        )
        if config.num_nextn_predict_layers:
            self.mtp = MtpModel(self.main, 1)


def oracle(config: Deepseek3Config) -> torch.nn.Module:
    """Builds transformers' model, in fp32."""
    return Oracle(config)


def to_oracle(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Converts a name and its tensor (a weight or its gradient) to the oracle's, whose stacked experts have another
    order of axes."""
    key, module = convert.released(name), f"model.layers.{_SHAPE['num_hidden_layers']}."
    if key.startswith(module):
        part = key.removeprefix(module).replace("shared_head.norm", "post_norm")
        is_block = not part.startswith(("enorm", "hnorm", "eh_proj", "post_norm"))
        key = f"mtp.layers.0.{'mtp_block.' * is_block}{part}"
    else:
        key = f"main.{key}"
    if name.endswith("mlp.gate_up"):  # [G, D, 2, F] -> [G, 2F, D]
        return key.replace("gate_up", "experts.gate_up_proj"), tensor.permute(0, 2, 3, 1).flatten(1, 2)
    if name.endswith("mlp.down"):  # [G, F, D] -> [G, D, F]
        return key.replace("down", "experts.down_proj"), tensor.transpose(1, 2)
    return key, tensor


def oracle_loss(model: torch.nn.Module, samples: list[dict]) -> torch.Tensor:
    """Computes the oracle's loss on the samples of a step."""
    main, ahead = oracle_losses(model, samples)
    return main if ahead is None else main + MTP_WEIGHT * ahead


def oracle_losses(model: torch.nn.Module, samples: list[dict]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes the losses of the oracle and of its prediction module, which read every document by itself."""
    main, ahead = [], []

    def add(losses: list, logits: torch.Tensor, labels: torch.Tensor) -> None:
        losses.append(F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")[labels >= 0])

    for s in samples:
        for start, end in zip(s["bounds"], s["bounds"][1:], strict=False):
            tokens, labels = s["tokens"][None, start:end], s["labels"][start:end]
            states = model.main.model(input_ids=tokens).last_hidden_state
            add(main, model.main.lm_head(states)[0], labels)
            if hasattr(model, "mtp"):
                positions = torch.arange(end - start - 1)[None]
                states = model.mtp.forward_layer(0, states[:, :-1], positions, None, input_ids=tokens[:, 1:])
                add(ahead, model.main.lm_head(states)[0], labels[1:])
    return torch.cat(main).mean(), torch.cat(ahead).mean() if ahead else None
