"""The tensors of Qwen3 in Megatron-LM's legacy checkpoints, which common/language/megatron_import.py reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.language import megatron_import
from common.language.megatron_import import EMBEDDING, EXPERT, HEAD, NORM
from common.release import Source

if TYPE_CHECKING:
    import torch

    from .config import Deepseek3Config

TOP = {"embed_tokens.weight": EMBEDDING, "norm.weight": NORM, "lm_head.weight": HEAD}
LAYER = {  # our name -> the key that holds it, or for stacked experts the first of the keys
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attn.q_proj.weight": "self_attention.linear_qkv.weight",
    "self_attn.k_proj.weight": "self_attention.linear_qkv.weight",
    "self_attn.v_proj.weight": "self_attention.linear_qkv.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "mlp.gate_proj.weight": "mlp.linear_fc1.weight",
    "mlp.up_proj.weight": "mlp.linear_fc1.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate_up": EXPERT.format(0, "fc1"),
    "mlp.down": EXPERT.format(0, "fc2"),
}


def expected(config: Deepseek3Config) -> dict[str, tuple[int, ...]]:
    """Returns the full shapes of all tensors by Megatron-LM's keys, every expert under its own key."""
    D, E = config.hidden_size, config.head_dim
    attention = {
        "input_layernorm.weight": (D,), "pre_mlp_layernorm.weight": (D,),
        "self_attention.linear_qkv.weight": ((config.num_attention_heads + 2 * config.num_key_value_heads) * E, D),
        "self_attention.q_layernorm.weight": (E,), "self_attention.k_layernorm.weight": (E,),
        "self_attention.linear_proj.weight": (D, config.num_attention_heads * E),
    }  # fmt: skip
    width = config.moe_intermediate_size if config.num_experts else config.intermediate_size
    mlp = {"mlp.linear_fc1.weight": (2 * width, D), "mlp.linear_fc2.weight": (D, width)}
    if config.num_experts:
        mlp = {EXPERT.format(e, "fc1"): (2 * width, D) for e in range(config.num_experts)}
        mlp |= {EXPERT.format(e, "fc2"): (D, width) for e in range(config.num_experts)}
        mlp["mlp.router.weight"] = (config.num_experts, D)
    layers = range(config.num_hidden_layers)
    shapes = {f"decoder.layers.{i}.{key}": shape for i in layers for key, shape in (attention | mlp).items()}
    shapes |= {EMBEDDING: (config.vocab_size, D), NORM: (D,)}
    return shapes if config.tie_word_embeddings else shapes | {HEAD: (config.vocab_size, D)}


def open_source(folder: Path, config: Deepseek3Config) -> Source:
    """Opens the parameters of a Megatron-LM checkpoint.

    Raises:
        ValueError: see `common.language.megatron_import.index`.
    """
    import torch

    args = {"rotary_base": config.rope_theta, "norm_epsilon": config.rms_norm_eps}
    args |= {"moe_router_topk": config.num_experts_per_tok} if config.num_experts else {}
    slices = megatron_import.index(folder, config, expected(config), args)
    queries_per_key = config.num_attention_heads // config.num_key_value_heads

    def theirs(name: str) -> str:
        if name in TOP:
            return TOP[name]
        _, layer, part = name.split(".", 2)
        return f"decoder.layers.{layer}.{LAYER[part]}"

    def joined(key: str) -> torch.Tensor:
        return megatron_import.whole(slices[key], key)

    def read(name: str) -> torch.Tensor:
        key, part = theirs(name), name.removesuffix(".weight").rpartition(".")[2]
        if part in ("q_proj", "k_proj", "v_proj"):
            return megatron_import.query_key_value(slices[key], part[0], queries_per_key, config.head_dim)
        if ".local_experts." in key:
            experts = (joined(key.replace(".0.linear", f".{g}.linear")) for g in range(config.num_experts))
            return torch.stack([e.permute(2, 0, 1) if part == "gate_up" else e.t() for e in experts])
        if part in ("gate_proj", "up_proj"):
            return joined(key)[("gate_proj", "up_proj").index(part)].clone()
        return joined(key)[: config.vocab_size] if name in ("embed_tokens.weight", "lm_head.weight") else joined(key)

    return Source(lambda name: slices[theirs(name)][0].element_size(), read)
