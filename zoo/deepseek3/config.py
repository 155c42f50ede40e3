"""DeepSeek-V3: the architecture, its published size, and what follows from it.

Sources: the released config.json (deepseek-ai/DeepSeek-V3), arXiv:2412.19437 sections 2 and 4.2.
No torch here: options are checked before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from common import release, weights
from common.language.options import PACKED_BYTES
from common.release import is_sharded

# The only values that this model implements. A released config.json may omit any of these keys.
FIXED = {
    "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "moe_layer_freq": 1,
    "rope_interleave": True,
}  # fmt: skip
YARN = {"type", "rope_type", "factor", "original_max_position_embeddings", "rope_theta", "mscale", "mscale_all_dim"}
YARN_USUAL = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1.0}  # other keys: only value


@dataclass(frozen=True, kw_only=True)
class Deepseek3Config:
    """Field names are those of the released `config.json`. q_lora_rank 0: queries have one projection.
    num_nextn_predict_layers: 1 with the multi-token prediction module, else 0. rope_factor is YaRN's factor over
    original_max_position_embeddings, the positions of pretraining; 1 means no YaRN."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the first first_k_dense_replace layers
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    first_k_dense_replace: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    num_nextn_predict_layers: int
    rms_norm_eps: float
    rope_theta: float
    rope_factor: float
    rope_mscale: float  # YaRN's mscale_all_dim, which scales the softmax
    max_position_embeddings: int
    original_max_position_embeddings: int
    initializer_range: float  # standard deviation of initial weights

    @property
    def positions(self) -> int:
        """Maximum number of tokens in a sequence."""
        return max(self.max_position_embeddings, int(self.rope_factor * self.original_max_position_embeddings))

    @property
    def head_dim(self) -> int:
        """Width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """What scores are multiplied by. YaRN scales it by the square of 0.1 mscale ln(factor) + 1."""
        return self.head_dim**-0.5 * (0.1 * self.rope_mscale * math.log(self.rope_factor) + 1) ** 2

    @property
    def expert_layers(self) -> range:
        """The indices of the layers with experts. The last may be the multi-token prediction module."""
        return range(self.first_k_dense_replace, self.num_hidden_layers + self.num_nextn_predict_layers)

    @property
    def parameters(self) -> int:
        """Exact number of parameters, biases of the routers included."""
        return sum(map(math.prod, shapes(self).values()))

    @property
    def active_parameters(self) -> int:
        """Parameters used for one token: of each layer's experts, only num_experts_per_tok. The multi-token prediction
        module is not counted."""
        alone = dataclasses.replace(self, num_nextn_predict_layers=0)
        expert = 3 * self.hidden_size * self.moe_intermediate_size
        unused = self.n_routed_experts - self.num_experts_per_tok
        return alone.parameters - len(alone.expert_layers) * unused * expert

    def flops(self, length: int, frozen: bool = False) -> int:
        """Counts the model FLOPs of one sequence's forward. A multiply-add counts as two. Both vocabulary projections,
        the model's and the multi-token prediction module's, are included; attention counts only its lower triangle (half
        of L^2). A training step takes three times that. With frozen, the result is a third of a step that computes no
        weight gradients; adapters' FLOPs are not counted."""
        V, D, layers = self.vocab_size, self.hidden_size, self.num_hidden_layers + self.num_nextn_predict_layers
        expert = 3 * D * self.moe_intermediate_size
        linear = self.parameters - V * D  # the embedding is read, not multiplied
        linear -= len(self.expert_layers) * (self.n_routed_experts - self.num_experts_per_tok) * expert
        linear = 2 * length * (linear + self.num_nextn_predict_layers * V * D)
        linear = linear * 2 // 3 if frozen else linear
        return linear + layers * length**2 * self.num_attention_heads * (self.head_dim + self.v_head_dim)

    @classmethod
    def from_folder(cls, folder: Path) -> Deepseek3Config:
        """Reads the architecture from a released folder's config.json. A folder whose index lacks the multi-token
        prediction module has none, whatever its config.json says: transformers leaves it out.

        Raises:
            ValueError: config.json is missing, incomplete, of another model, or asks for what is not implemented.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(f"{path} does not exist; expected a released Hugging Face folder; fix: --weights")
        values = weights.read_json(path)
        kind = values.get("model_type")
        if kind != "deepseek_v3":
            other = " (its router is a softmax)" if kind == "deepseek_v2" else ""
            raise ValueError(f"{path} is of model_type {kind!r}{other}; expected deepseek_v3; fix: --weights")
        for key, expected in FIXED.items():
            if values.get(key) not in (None, expected):
                raise ValueError(f"{path} has {key}={values[key]!r}; this model only does {expected!r}; fix: --weights")
        if values.get("num_key_value_heads") not in (None, values.get("num_attention_heads")):
            raise ValueError(f"{path} has fewer key-value heads than heads; expected as many; fix: --weights")
        values |= _rotary(values, path)
        values["q_lora_rank"] = values.get("q_lora_rank") or 0
        values.setdefault("initializer_range", 0.02)  # transformers' default
        values.setdefault("num_nextn_predict_layers", values.get("num_mtp_layers", 0))  # transformers 5 writes this key
        if values["num_nextn_predict_layers"] > 1:
            raise ValueError(
                f"{path} has several prediction modules (num_nextn_predict_layers); expected 0 or 1; fix: --weights"
            )
        missing = [f.name for f in dataclasses.fields(cls) if values.get(f.name) is None]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; fix: download it again")
        if values["num_nextn_predict_layers"] and not _has_module(folder, values.get("num_hidden_layers")):
            values["num_nextn_predict_layers"] = 0
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})

    def to_released(self) -> dict:
        """Returns the content of the released config.json, for weights in bf16 or fp32."""
        values = dataclasses.asdict(self)
        factor, mscale, original = (
            values.pop(key) for key in ("rope_factor", "rope_mscale", "original_max_position_embeddings")
        )
        yarn = {
            "type": "yarn", "factor": factor, "original_max_position_embeddings": original, "beta_fast": 32,
            "beta_slow": 1, "mscale": mscale, "mscale_all_dim": mscale,
        }  # fmt: skip
        return values | FIXED | {
            "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
            "num_key_value_heads": self.num_attention_heads, "q_lora_rank": self.q_lora_rank or None,
            "rope_scaling": None if factor == 1 else yarn,
        }  # fmt: skip


def _has_module(folder: Path, layer: int) -> bool:
    """Whether a released folder holds the multi-token prediction module, layer `layer`. The index of a large release says
    so in one file; otherwise the headers of all files do."""
    listing = folder / "model.safetensors.index.json"
    keys = weights.read_json(listing).get("weight_map", {}) if listing.is_file() else weights.index(folder)
    return any(key.startswith(f"model.layers.{layer}.") for key in keys)


def _rotary(values: dict, path: Path) -> dict:
    """Returns the rotary fields of a config.json. Releases write rope_theta and rope_scaling, transformers 5 writes
    rope_parameters. ValueError: it scales the embedding in a way that this model does not implement."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    theta, positions = rope.get("rope_theta", values.get("rope_theta")), values.get("max_position_embeddings")
    kind, factor, mscale = rope.get("rope_type", rope.get("type", "default")), rope.get("factor"), 0.0
    if kind == "default":
        factor, original = 1.0, positions
    else:
        unsupported = [key for key, value in rope.items() if key not in YARN and value != YARN_USUAL.get(key)]
        mscale, original = rope.get("mscale_all_dim", 0), rope.get("original_max_position_embeddings") or positions
        unequal = rope.get("mscale", mscale) != mscale or not mscale  # cos and sin would be scaled, too
        if kind != "yarn" or unsupported or unequal or not isinstance(factor, int | float) or factor < 1:
            raise ValueError(
                f"{path} scales its rotary embedding by {rope}; this model only does rope_type 'yarn' with a factor, equal "
                "mscale and mscale_all_dim, original_max_position_embeddings and the usual rest; fix: --weights"
            )
    return {
        "rope_theta": theta, "rope_factor": float(factor), "rope_mscale": float(mscale),
        "original_max_position_embeddings": original,
    }  # fmt: skip


SIZES = {
    "tiny": Deepseek3Config(
        vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
        first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=4, topk_group=2,
        moe_intermediate_size=96, routed_scaling_factor=2.5, num_nextn_predict_layers=1, rms_norm_eps=1e-6,
        rope_theta=1e4, rope_factor=1.0, rope_mscale=1.0, max_position_embeddings=2048,
        original_max_position_embeddings=2048, initializer_range=0.08,
    ),
    "671B": Deepseek3Config(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61, num_attention_heads=128,
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        first_k_dense_replace=3, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, n_group=8,
        topk_group=4, moe_intermediate_size=2048, routed_scaling_factor=2.5, num_nextn_predict_layers=1,
        rms_norm_eps=1e-6, rope_theta=1e4, rope_factor=40.0, rope_mscale=1.0, max_position_embeddings=163840,
        original_max_position_embeddings=4096, initializer_range=0.02,
    ),
}  # fmt: skip


def shapes(config: Deepseek3Config) -> dict[str, tuple[int, ...]]:
    """Returns the full shape of every parameter, by this recipe's name of it."""
    D, V, G, layers = config.hidden_size, config.vocab_size, config.n_routed_experts, config.num_hidden_layers
    heads, Q, R = config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
    attention = {"q_proj.weight": (heads * config.head_dim, D)}
    if Q:
        attention = {"q_a_proj.weight": (Q, D), "q_a_layernorm.weight": (Q,)}
        attention["q_b_proj.weight"] = (heads * config.head_dim, Q)
    attention |= {
        "kv_a_proj_with_mqa.weight": (R + config.qk_rope_head_dim, D), "kv_a_layernorm.weight": (R,),
        "kv_b_proj.weight": (heads * (config.qk_nope_head_dim + config.v_head_dim), R),
        "o_proj.weight": (D, heads * config.v_head_dim),
    }  # fmt: skip

    def mlp(name: str, width: int) -> dict[str, tuple[int, ...]]:
        parts = {"gate": (width, D), "up": (width, D), "down": (D, width)}
        return {f"{name}.{part}_proj.weight": shape for part, shape in parts.items()}

    width = config.moe_intermediate_size
    experts = {"mlp.gate.weight": (G, D), "mlp.gate.e_score_correction_bias": (G,)}
    experts |= {"mlp.gate_up": (G, D, 2, width), "mlp.down": (G, width, D)}
    experts |= mlp("mlp.shared_experts", config.n_shared_experts * width)
    out = {"embed_tokens.weight": (V, D)}
    for i in range(layers + config.num_nextn_predict_layers):
        layer = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        layer |= {f"self_attn.{name}": shape for name, shape in attention.items()}
        layer |= experts if i in config.expert_layers else mlp("mlp", config.intermediate_size)
        if i == layers:
            layer |= {f"{name}.weight": (D,) for name in ("enorm", "hnorm", "shared_head.norm")}
            layer["eh_proj.weight"] = (D, 2 * D)
        out |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return out | {"norm.weight": (D,), "lm_head.weight": (V, D)}


# ------------------------------------------------------------------------------------------------------------ a folder


def size_of(folder: Path) -> str:
    """Returns the published size that has the architecture of a weights folder, or `custom`: this recipe reads every
    model of the architecture."""
    return _size_name(_folder_config(folder))


def _size_name(config: Deepseek3Config) -> str:
    # Not decisive: positions (they differ between releases), the vocabulary (users resize it), a module left out.
    free = {"rope_theta", "rope_factor", "rope_mscale", "max_position_embeddings", "original_max_position_embeddings"}
    free |= {"vocab_size", "initializer_range", "num_nextn_predict_layers"}
    return next((name for name, size in SIZES.items() if not release.differences(config, size, free)), "custom")


def _folder_config(folder: Path) -> Deepseek3Config:
    """Returns the architecture of a released folder or of a sharded checkpoint."""
    if not is_sharded(folder):
        return Deepseek3Config.from_folder(folder)
    state = json.loads((folder / "state.json").read_text())
    if "r" in state.get("start", {}):
        raise ValueError(
            f"{folder} holds adapters of {state['start']['weights']} and no whole model; fix: --weights with that, or "
            "what the run wrote with --merge"
        )
    return Deepseek3Config(**state["model"])


def stored_config(o) -> Deepseek3Config:
    """Returns the architecture of --weights, or else of --size.

    Raises:
        ValueError: --size names no size, or the weights have another.
    """
    if o.weights is None:
        if o.size not in SIZES:
            known = ", ".join(SIZES)
            raise ValueError(f"size {o.size!r} without weights; expected one of {known}; fix: --size, or --weights DIR")
        changes = {"num_hidden_layers": o.layers, "vocab_size": o.vocabulary, "n_routed_experts": o.experts}
        changes["first_k_dense_replace"] = 1 if o.layers else None  # a slice has one dense layer
        return dataclasses.replace(SIZES[o.size], **{k: v for k, v in changes.items() if v})
    config = _folder_config(o.weights)
    if (size := _size_name(config)) != o.size:
        raise ValueError(f"{o.weights} is of size {size}, not {o.size}; fix: --size or --weights")
    return config


def model_config(o) -> Deepseek3Config:
    """Returns the architecture that a job builds: `stored_config`, with the multi-token prediction module only if the
    job uses it (o.mtp)."""
    config = stored_config(o)
    return config if o.mtp else dataclasses.replace(config, num_nextn_predict_layers=0)


MLP = ["gate_proj", "up_proj", "down_proj"]  # of dense layers, shared experts and experts


def attention_linears(config: Deepseek3Config) -> list[str]:
    """Returns the linears of attention."""
    queries = ["q_a_proj", "q_b_proj"] if config.q_lora_rank else ["q_proj"]
    return [*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def adaptable(config: Deepseek3Config) -> list[str]:
    """Returns the linears that can have adapters, by the ends of their names. The router and the vocabulary projection
    cannot: the model reads their weights and does not call the modules."""
    return attention_linears(config) + MLP


def adapted(config: Deepseek3Config) -> list[str]:
    """Returns the linears that get adapters unless --lora-targets says otherwise: all but the experts'."""
    return attention_linears(config) + [f"mlp.{part}" for part in MLP] + [f"shared_experts.{part}" for part in MLP]


def quantized(config: Deepseek3Config) -> list[str]:
    """Returns the weights that --quantize packs: all matrices of the blocks except the router."""
    return [*attention_linears(config), *MLP, "mlp.gate_up", "mlp.down"]


# ------------------------------------------------------------------------------------------------------------- memory


def adapted_shapes(o, config: Deepseek3Config) -> list[tuple[int, int]]:
    """Returns the shapes [out, in] of the linears that get new adapters, of each expert's too."""
    D, F, targets = config.hidden_size, config.moe_intermediate_size, o.targets(config)
    ends = tuple(f"{target}.weight" for target in targets)
    dense = [shape for name, shape in shapes(config).items() if name.endswith(ends)]
    experts = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    of_expert = [shape for name, shape in experts.items() if name in targets]
    return dense + of_expert * (config.n_routed_experts * len(config.expert_layers))


def stage_shapes(o, config: Deepseek3Config) -> list[dict[str, tuple[int, ...]]]:
    """Returns the parameters of every pipeline stage, whole, as `shapes` does. The last stage's copy of the embedding,
    which the multi-token prediction module reads, is not among them."""
    sizes, stages = o.chunk_layers(config.num_hidden_layers), [{} for _ in range(o.pp)]
    owner = [position % o.pp for position, layers in enumerate(sizes) for _ in range(layers)]
    owner += [o.pp - 1] * config.num_nextn_predict_layers
    for name, shape in shapes(config).items():
        layer = name.split(".")[1] if name.startswith("layers.") else None
        stage = owner[int(layer)] if layer else 0 if name.startswith("embed_tokens") else o.pp - 1
        stages[stage][name] = shape
    return stages


def cut(o, name: str) -> tuple[int, int]:
    """Returns (how many ranks share a parameter of one stage, how many hold the same part of it)."""
    ranks = o.world // o.pp
    if name.endswith(("mlp.gate_up", "mlp.down")):
        return o.ep * o.etp, ranks // (o.ep * o.etp)
    whole = ("norm.weight", "q_a_proj.weight", "kv_a_proj_with_mqa.weight", "gate.weight", "bias", "eh_proj.weight")
    parts = 1 if name.endswith(whole) else o.tp
    return parts, ranks // o.tp


def stage_memory(o, config: Deepseek3Config, length: int, trained: int, stage: int) -> dict[str, float]:
    """Estimates the bytes of a rank of a pipeline stage, by kind; memory.py measures them. Kernels' workspace is not
    counted. trained: number of parameters that train, of the whole model.

    Weights and gradients count in their dtypes. The fp32 master weights and the two moments are sharded over the ranks
    that hold the same part of a parameter. Activations are what the backward reads of each block (recompute none:
    everything; full: only the block's input), for as many micro-batches as 1F1B holds (stage s: pp - s). Tokens are
    assumed to spread evenly over experts. At the peak, either the loss holds the gradient of the vocabulary projection
    and a chunk of logits, or one block is recomputed and holds all its activations.
    """
    dtype, last, share_trained = 4 if o.precision == "fp32" else 2, stage == o.pp - 1, trained / config.parameters
    held, ends = stage_shapes(o, config)[stage], tuple(quantized(config))
    memory = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "peak"), 0.0)
    for name, shape in held.items():
        parts, copies = cut(o, name)
        count = math.prod(shape) / parts
        packed = o.quantize == "nf4" and name.removesuffix(".weight").endswith(ends)
        memory["weights"] += count * (PACKED_BYTES if packed else dtype) / (o.world if o.fsdp else 1)
        memory["gradients"] += share_trained * count * (dtype / o.world if o.fsdp else 4)
        memory["optimizer"] += share_trained * count * o.optimizer_bytes / copies
    if last and config.num_nextn_predict_layers and o.pp > 1:  # the second embedding
        memory["weights"] += config.vocab_size * config.hidden_size / o.tp * (dtype + 4 * share_trained)
    tokens, sp = length / o.cp * o.micro_batch, o.tp if o.sp else 1
    D, heads, k = config.hidden_size, config.num_attention_heads / o.tp, config.num_experts_per_tok
    latents = config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim
    keys = heads * config.head_dim
    values = heads * (config.qk_nope_head_dim + config.v_head_dim)  # the output of kv_b_proj
    # A block saves the inputs of its two norms, the normed inputs of attention and MLP (gathered under sequence
    # parallelism), the latents before and after their norms, queries and keys, values, and the attention's output. The
    # MLP saves gate, up and their product; the CPU's reference op also saves silu(gate).
    width, sent = config.moe_intermediate_size, D * o.etp / o.tp
    shared = config.n_shared_experts * width / o.tp
    inner = k * width / o.tp + shared
    parts = 4 if os.environ.get("ZOO_DEVICE", "cpu") == "cpu" else 3
    attention = 2 * latents + 2 * keys + values + heads * config.v_head_dim
    everything = tokens * dtype * (3 * D / sp + D + attention + parts * inner + 2 * k * sent)
    saved = {
        "none": everything,
        # Recomputed: normed inputs, the product of gate and up, rows sorted by expert.
        "selective": tokens * dtype * (2 * D / sp + attention + 2 * inner + k * sent),
        "full": tokens * D * dtype / sp,
    }
    blocks = o.stage_layers(config.num_hidden_layers)[stage] + last * config.num_nextn_predict_layers
    if not o.offload_activations:
        memory["activations"] = saved[o.recompute] * blocks * min(o.pp - stage, o.micro_batches)
    vocabulary, losses = config.vocab_size / o.tp, 1 + config.num_nextn_predict_layers
    # The gradient overwrites the logits. In bf16 it overwrites an fp32 copy of them, beside two bf16 tensors.
    loss = vocabulary * D * (4 + dtype % 4) + min(2**26, tokens * losses * vocabulary) * (4 + 2 * (dtype % 4))
    recomputed = {"none": 0.0, "full": everything, "selective": everything - saved["selective"]}[o.recompute]
    if recomputed:
        recomputed += 2 * tokens * dtype * inner  # the gradients of gate and up
    if o.quantize == "nf4":  # a layer's gate_up is unpacked at once
        recomputed += 2 * D * width * config.n_routed_experts / (o.ep * o.etp) * dtype
    memory["peak"] = max(loss if last else 0, recomputed, everything if o.offload_activations else 0)
    memory["peak"] += vocabulary * D * dtype if o.fsdp else 0  # FSDP keeps the root module gathered
    return memory


def memory_estimate(o, config: Deepseek3Config, length: int, trained: int) -> float:
    """Estimates the bytes of a rank of the fullest stage: the sum of `stage_memory`."""
    return max(sum(stage_memory(o, config, length, trained, stage).values()) for stage in range(o.pp))
