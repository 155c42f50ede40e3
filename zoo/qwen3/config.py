"""Qwen3: the architecture, its published sizes, and what follows from them.

Sources: the released config.json files (Qwen/Qwen3-*), arXiv:2505.09388 tables 1 and 2.
No torch here: options are checked before anything heavy is imported.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from common import release, weights
from common.language import megatron_import
from common.release import is_sharded

# What a released config.json must say, where it says anything, for this model to be its.
FIXED = {
    "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "n_shared_experts": 0, "attention_dropout": 0.0, "qkv_bias": False, "use_qk_norm": True,
    "shared_expert_intermediate_size": 0,
}  # fmt: skip
YARN = {"type", "rope_type", "factor", "original_max_position_embeddings", "rope_theta"}  # read from such an entry
YARN_USUAL = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1.0}  # what else it may say


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Field names are those of the released `config.json`. num_experts 0: a dense model. rope_factor: YaRN's, over the
    original_max_position_embeddings of pretraining; 1: none."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_factor: float
    max_position_embeddings: int
    original_max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float  # standard deviation of drawn weights
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool

    @property
    def positions(self) -> int:
        """Tokens that a sequence may have."""
        return max(self.max_position_embeddings, int(self.rope_factor * self.original_max_position_embeddings))

    @property
    def parameters(self) -> int:
        """Exact number of parameters."""
        return self._parameters(self.num_experts)

    @property
    def active_parameters(self) -> int:
        """Parameters a token meets: k experts of a layer."""
        return self._parameters(self.num_experts_per_tok)

    def _parameters(self, experts: int) -> int:
        D, E = self.hidden_size, self.head_dim
        attention = 2 * D * E * (self.num_attention_heads + self.num_key_value_heads) + 2 * E
        mlp = 3 * D * self.intermediate_size
        if self.num_experts:
            mlp = 3 * D * self.moe_intermediate_size * experts + D * self.num_experts
        embeddings = self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * (attention + mlp + 2 * D) + embeddings + D

    def flops(self, length: int, frozen: bool = False) -> int:
        """Model FLOPs of the forward of one sequence, a multiply-add counted as two, the vocabulary projection
        included, the lower triangle of attention alone (half of L^2); training is three times that. frozen: a third of
        what training with frozen weights, whose gradients nobody makes, takes; the adapters' own work not counted."""
        D, E, layers = self.hidden_size, self.head_dim, self.num_hidden_layers
        attention = 2 * D * E * (self.num_attention_heads + self.num_key_value_heads)
        mlp = 3 * D * self.intermediate_size
        if self.num_experts:
            mlp = 3 * D * self.moe_intermediate_size * self.num_experts_per_tok + D * self.num_experts
        linear = 2 * length * (layers * (attention + mlp) + self.vocab_size * D)
        linear = linear * 2 // 3 if frozen else linear
        return linear + layers * 2 * length**2 * self.num_attention_heads * E

    @classmethod
    def from_folder(cls, folder: Path) -> "Qwen3Config":
        """The architecture of a released folder.

        Raises:
            ValueError: no config.json, one of another model, or one that asks for what this model does not do.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(f"{path} does not exist; expected a released Hugging Face folder; fix: --weights")
        values = weights.read_json(path)
        kind = values.get("model_type")
        if kind not in ("qwen3", "qwen3_moe"):
            raise ValueError(f"{path} is of model_type {kind!r}; expected qwen3 or qwen3_moe; fix: --weights")
        for key, wanted in FIXED.items():
            if values.get(key) not in (None, wanted):
                raise ValueError(f"{path} has {key}={values[key]!r}; this model only does {wanted!r}; fix: --weights")
        values |= _rotary(values, path)
        values.setdefault("initializer_range", 0.02)  # transformers' default
        values.setdefault("num_experts", values.get("num_local_experts"))  # as transformers 5 writes it
        if kind == "qwen3":
            values |= {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0, "norm_topk_prob": False}
        missing = [f.name for f in dataclasses.fields(cls) if values.get(f.name) is None]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; fix: download it again")
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})

    def to_released(self) -> dict:
        """The released config.json."""
        values = dataclasses.asdict(self)
        factor, original = values.pop("rope_factor"), values.pop("original_max_position_embeddings")
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        kind, name = ("qwen3_moe", "Qwen3MoeForCausalLM") if self.num_experts else ("qwen3", "Qwen3ForCausalLM")
        if self.num_experts:
            values |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001}
        else:
            for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
                del values[key]
        return values | {
            "architectures": [name], "model_type": kind, "hidden_act": "silu", "attention_bias": False,
            "attention_dropout": 0.0, "use_sliding_window": False,
            "rope_scaling": None if factor == 1 else yarn,
        }  # fmt: skip


def _rotary(values: dict, path: Path) -> dict:
    """The rotary fields of a config.json: releases write rope_theta and rope_scaling, transformers 5 rope_parameters."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    theta, longest = rope.get("rope_theta", values.get("rope_theta")), values.get("max_position_embeddings")
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
    if kind == "default":  # does not say how many were trained: of the released 40,960, 8,192 are for an answer
        factor, original = 1.0, 32768 if longest == 40960 else longest
    else:
        odd = [key for key, value in rope.items() if key not in YARN and value != YARN_USUAL.get(key)]
        if kind != "yarn" or odd or not isinstance(factor, int | float) or factor < 1:
            raise ValueError(
                f"{path} scales its rotary embedding by {rope}; this model only does rope_type 'yarn' with a factor, "
                "original_max_position_embeddings and the usual rest; fix: --weights"
            )
        key = "original_max_position_embeddings"
        original = values.get(key) or rope.get(key) or longest
    return {"rope_theta": theta, "rope_factor": float(factor), "original_max_position_embeddings": original}


_RELEASED = dict(
    vocab_size=151936, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, rope_factor=1.0, max_position_embeddings=40960,
    original_max_position_embeddings=32768, initializer_range=0.02,
)  # fmt: skip
_DENSE = dict(num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, norm_topk_prob=False)
_SPARSE = dict(num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, num_key_value_heads=4)
_TINY = dict(
    vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=48, rms_norm_eps=1e-6, rope_theta=1e4, rope_factor=1.0,
    max_position_embeddings=2048, original_max_position_embeddings=2048, tie_word_embeddings=True,
    initializer_range=0.08,
)  # fmt: skip


def _size(D: int, width: int, layers: int, heads: int, tied: bool, **rest) -> Qwen3Config:
    shape = dict(hidden_size=D, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=heads)
    return Qwen3Config(**_RELEASED | {"num_key_value_heads": 8} | shape | {"tie_word_embeddings": tied} | rest)


SIZES = {
    "tiny": Qwen3Config(**_TINY, **_DENSE),
    "tiny-moe": Qwen3Config(
        **_TINY, **_DENSE | dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True)
    ),
    "0.6B": _size(1024, 3072, 28, 16, True, **_DENSE),
    "1.7B": _size(2048, 6144, 28, 16, True, **_DENSE),
    "4B": _size(2560, 9728, 36, 32, True, **_DENSE),
    "8B": _size(4096, 12288, 36, 32, False, **_DENSE),
    "14B": _size(5120, 17408, 40, 40, False, **_DENSE),
    "32B": _size(5120, 25600, 64, 64, False, **_DENSE),
    "30B-A3B": _size(2048, 6144, 48, 32, False, **_SPARSE, moe_intermediate_size=768),
    "235B-A22B": _size(4096, 12288, 94, 64, False, **_SPARSE, moe_intermediate_size=1536),
}


def shapes(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model, by our name."""
    D, E, V = config.hidden_size, config.head_dim, config.vocab_size
    queries, keys = config.num_attention_heads * E, config.num_key_value_heads * E
    out = {"embed_tokens.weight": (V, D)}
    for i in range(config.num_hidden_layers):
        layer = {
            "input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (queries, D), "self_attn.k_proj.weight": (keys, D),
            "self_attn.v_proj.weight": (keys, D), "self_attn.o_proj.weight": (D, queries),
            "self_attn.q_norm.weight": (E,), "self_attn.k_norm.weight": (E,),
        }  # fmt: skip
        if config.num_experts:
            G, width = config.num_experts, config.moe_intermediate_size
            layer |= {"mlp.gate.weight": (G, D), "mlp.gate_up": (G, D, 2, width), "mlp.down": (G, width, D)}
        else:
            width = config.intermediate_size
            layer |= {f"mlp.{part}_proj.weight": (width, D) for part in ("gate", "up")}
            layer |= {"mlp.down_proj.weight": (D, width)}
        out |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    out["norm.weight"] = (D,)
    return out if config.tie_word_embeddings else out | {"lm_head.weight": (V, D)}


# ----------------------------------------------------------------------------------------------------------- options


def adaptable(config: Qwen3Config) -> list[str]:
    """The linears that adapters go on: not the experts, which are stacked, nor the router and the vocabulary's, whose
    weights are read and not called."""
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return attention if config.num_experts else [*attention, "gate_proj", "up_proj", "down_proj"]


# ------------------------------------------------------------------------------------------------------------ a folder


def size_of(folder: Path) -> str:
    """The published size whose architecture a weights folder has. ValueError: none has it; the nearest is named."""
    if _architecture_unsaid(folder):
        raise ValueError(f"{folder} is a Megatron-LM checkpoint, which does not say its size; fix: --size")
    found = _sharded_config(folder) if is_sharded(folder) else Qwen3Config.from_folder(folder)
    return release.name_size(folder, {name: _differs(found, config) for name, config in SIZES.items()})


def _differs(found: Qwen3Config, wanted: Qwen3Config) -> list[str]:
    """In what an architecture is not that of a size. Its releases (base, 2507, Coder, ...) differ in their positions, in
    a width of dense layers where there are none, and by their users' hands in the vocabulary."""
    free = {"rope_theta", "rope_factor", "max_position_embeddings", "original_max_position_embeddings"}
    free |= {"vocab_size", "initializer_range"}
    free |= {"intermediate_size"} if found.num_experts and wanted.num_experts else set()
    return release.differences(found, wanted, free)


def resized(o, config: Qwen3Config) -> str | None:
    """In what the vocabulary of --weights is not the published one, in words."""
    usual = SIZES[o.size].vocab_size
    if o.weights is None or config.vocab_size == usual:
        return None
    return f"{o.weights} has a vocabulary of {config.vocab_size:,} tokens; the published {o.size} has {usual:,}"


def _architecture_unsaid(folder: Path) -> bool:
    """Whether it is a Megatron-LM checkpoint to which nobody has added the release's config.json."""
    return megatron_import.is_checkpoint(folder) and not (folder / "config.json").is_file()


def _sharded_config(folder: Path) -> Qwen3Config:
    state = json.loads((folder / "state.json").read_text())
    if "r" in state.get("start", {}):
        raise ValueError(
            f"{folder} holds adapters of {state['start']['weights']} and no whole model; fix: --weights with that, or "
            "what the run wrote with --merge"
        )
    return Qwen3Config(**state["model"])


def model_config(o) -> Qwen3Config:
    """The architecture: the weights folder's own, or the size's, its positions lengthened by --yarn."""
    config, factor = _own_config(o), o.yarn
    return config if factor is None else dataclasses.replace(config, rope_factor=factor)


def _own_config(o) -> Qwen3Config:
    if o.size not in SIZES:
        raise ValueError(f"unknown size {o.size!r}; expected {', '.join(SIZES)}; fix: --size, or add it to config.py")
    if o.weights is None:
        changes = {"num_hidden_layers": o.layers, "vocab_size": o.vocabulary}
        return dataclasses.replace(SIZES[o.size], **{k: v for k, v in changes.items() if v})
    if _architecture_unsaid(o.weights):
        return SIZES[o.size]
    found = _sharded_config(o.weights) if is_sharded(o.weights) else Qwen3Config.from_folder(o.weights)
    if not o.from_scratch and (differs := _differs(found, SIZES[o.size])):
        raise ValueError(f"{o.weights} is not of size {o.size}: {', '.join(differs)}; fix: --size or --weights")
    return found


# ------------------------------------------------------------------------------------------------------------- memory


def adapted_shapes(o, config: Qwen3Config) -> list[tuple[int, int]]:
    """[out, in] of the linears with adapters; those of an adapter's folder taken to be all."""
    ends = tuple(f"{target}.weight" for target in o.targets(config))
    return [shape for name, shape in shapes(config).items() if name.endswith(ends)]


def memory_estimate(o, config: Qwen3Config, length: int, trained: int) -> float:
    """Bytes per rank of weights, gradients, optimizer, saved activations and loss; kernels' workspace not counted.
    trained: number of parameters that train.

    Weights and gradients in their dtypes, fp32 master weights and two moments sharded over dp*cp; of the activations
    what the backward reads of each block (recompute none: all of it; full: the block's input alone), for as many
    micro-batches as 1F1B holds (stage s: pp - s). The fullest stage counts; experts' rows as if spread evenly. At the
    peak the loss holds the gradient of the vocabulary and a chunk of logits, or one block is whole again. memory.py
    measures it.
    """
    dtype, stages = 4 if o.precision == "fp32" else 2, o.stage_layers(config.num_hidden_layers)
    experts = 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts * config.num_hidden_layers
    share_trained = trained / config.parameters
    moments = 4 if o.moments == "bf16" else 8
    kept_weights = gradients = master = 0.0
    if o.quantize == "nf4":
        kept_weights -= sum(map(math.prod, adapted_shapes(o, config))) * max(stages) / sum(stages) * (dtype - 4.13 / 8)
    for parameters, cut in ((config.parameters - experts, o.tp), (experts, o.etp * o.ep)):
        share, shards = parameters / cut * max(stages) / sum(stages), o.world / (cut * o.pp)
        kept_weights += share * dtype / (shards if o.fsdp else 1)
        gradients += share_trained * share * (dtype if o.fsdp else 4) / (shards if o.fsdp else 1)
        # fp32 weights are their own master
        master += share_trained * share * (moments if dtype == 4 else 4 + moments) / shards
    tokens = length / o.cp * o.micro_batch
    D, E, sp = config.hidden_size, config.head_dim, o.tp if o.sp else 1
    attention = E * (config.num_attention_heads + config.num_key_value_heads) / o.tp
    width, copies, rows = config.intermediate_size, 1, 0
    if config.num_experts:
        width, copies, rows = config.moe_intermediate_size, config.num_experts_per_tok, D * o.etp / o.tp
    # Normed inputs of attention and MLP, which sequence parallel gathers; queries and keys twice, values, output.
    # Of the MLP gate, up and their product; the reference op of cpu also silu(gate).
    mlp = copies * width / o.tp
    parts = 4 if os.environ.get("ZOO_DEVICE", "cpu") == "cpu" else 3
    everything = tokens * dtype * (2 * D / sp + 2 * D + 3 * attention + parts * mlp + copies * 2 * rows)
    kept = {
        "none": everything,
        "selective": tokens * dtype * (D / sp + 2 * D - rows + 2 * attention + 2 * mlp + copies * rows),
        "full": tokens * D * dtype / sp,
    }
    offload, vocabulary = o.offload_activations, config.vocab_size / o.tp
    blocks = 0 if offload else max(n * min(o.pp - stage, o.micro_batches) for stage, n in enumerate(stages))
    # Logits become their own gradient; in bf16 an fp32 copy of them does, and two bf16 ones are beside it.
    loss = vocabulary * D * (4 + dtype % 4) + min(2**26, tokens * vocabulary) * (4 + 2 * (dtype % 4))
    gathered = vocabulary * D * dtype if o.fsdp else 0  # the root's weight stays whole
    again = {"none": 0.0, "full": everything, "selective": everything - kept["selective"]}[o.recompute]
    if again:
        again += 2 * tokens * dtype * mlp  # the gradients of gate and up
    peak = max(loss, again, everything if offload else 0) + gathered
    return kept_weights + gradients + master + kept[o.recompute] * blocks + peak
