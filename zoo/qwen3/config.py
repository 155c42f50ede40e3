"""Qwen3: the architecture, its published sizes, and what follows from them.

Sources: the released config.json files (Qwen/Qwen3-*), arXiv:2505.09388 tables 1 and 2.
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
from common.language import megatron_import
from common.language.options import PACKED_BYTES
from common.release import is_sharded

# The only values that this model implements. A released config.json may omit any of these keys.
FIXED = {
    "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "n_shared_experts": 0, "attention_dropout": 0.0, "qkv_bias": False, "use_qk_norm": True,
    "shared_expert_intermediate_size": 0,
}  # fmt: skip
YARN = {"type", "rope_type", "factor", "original_max_position_embeddings", "rope_theta"}  # keys that `_rotary` reads
YARN_USUAL = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1.0}  # other keys: only value


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Field names are those of the released `config.json`. A dense model has num_experts 0. rope_factor is YaRN's
    factor over original_max_position_embeddings, the positions of pretraining; 1 means no YaRN."""

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
    initializer_range: float  # standard deviation of initial weights
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    num_labels: int = 0  # 1: a reward model, with a scalar score in place of the vocabulary projection

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is the vocabulary projection, too."""
        return self.tie_word_embeddings and not self.num_labels

    @property
    def positions(self) -> int:
        """Maximum number of tokens in a sequence."""
        return max(self.max_position_embeddings, int(self.rope_factor * self.original_max_position_embeddings))

    @property
    def parameters(self) -> int:
        """Exact number of parameters."""
        return self._parameters(self.num_experts)

    @property
    def active_parameters(self) -> int:
        """Parameters used for one token: of each layer's experts, only num_experts_per_tok."""
        return self._parameters(self.num_experts_per_tok)

    def _parameters(self, experts: int) -> int:
        D, E = self.hidden_size, self.head_dim
        attention = 2 * D * E * (self.num_attention_heads + self.num_key_value_heads) + 2 * E
        mlp = 3 * D * self.intermediate_size
        if self.num_experts:
            mlp = 3 * D * self.moe_intermediate_size * experts + D * self.num_experts
        outputs = self.num_labels or (0 if self.is_tied else self.vocab_size)
        return self.num_hidden_layers * (attention + mlp + 2 * D) + (self.vocab_size + outputs) * D + D

    def flops(self, length: int, frozen: bool = False) -> int:
        """Counts the model FLOPs of one sequence's forward. A multiply-add counts as two. The vocabulary projection is
        included; attention counts only its lower triangle (half of L^2). A training step takes three times that. With
        frozen, the result is a third of a step that computes no weight gradients; adapters' FLOPs are not counted."""
        D, E, layers = self.hidden_size, self.head_dim, self.num_hidden_layers
        attention = 2 * D * E * (self.num_attention_heads + self.num_key_value_heads)
        mlp = 3 * D * self.intermediate_size
        if self.num_experts:
            mlp = 3 * D * self.moe_intermediate_size * self.num_experts_per_tok + D * self.num_experts
        linear = 2 * length * (layers * (attention + mlp) + (self.num_labels or self.vocab_size) * D)
        linear = linear * 2 // 3 if frozen else linear
        return linear + layers * 2 * length**2 * self.num_attention_heads * E

    @classmethod
    def from_folder(cls, folder: Path) -> Qwen3Config:
        """Reads the architecture from a released folder's config.json.

        Raises:
            ValueError: config.json is missing, incomplete, of another model, or asks for what is not implemented.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(f"{path} does not exist; expected a released Hugging Face folder; fix: --weights")
        values = weights.read_json(path)
        kind = values.get("model_type")
        if kind not in ("qwen3", "qwen3_moe"):
            raise ValueError(f"{path} is of model_type {kind!r}; expected qwen3 or qwen3_moe; fix: --weights")
        for key, expected in FIXED.items():
            if values.get(key) not in (None, expected):
                raise ValueError(f"{path} has {key}={values[key]!r}; this model only does {expected!r}; fix: --weights")
        values |= _rotary(values, path)
        values.setdefault("initializer_range", 0.02)  # transformers' default
        values.setdefault("num_experts", values.get("num_local_experts"))  # transformers 5 writes this key
        values["num_labels"] = _count_labels(values, path)
        if kind == "qwen3":
            values |= {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0, "norm_topk_prob": False}
        missing = [f.name for f in dataclasses.fields(cls) if values.get(f.name) is None]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; fix: download it again")
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})

    def to_released(self) -> dict:
        """Returns the content of the released config.json."""
        values = dataclasses.asdict(self)
        factor, original = values.pop("rope_factor"), values.pop("original_max_position_embeddings")
        labels = values.pop("num_labels")
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        kind, name = ("qwen3_moe", "Qwen3MoeForCausalLM") if self.num_experts else ("qwen3", "Qwen3ForCausalLM")
        if self.num_experts:
            values |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001}
        else:
            for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
                del values[key]
        if labels:
            name = name.replace("CausalLM", "SequenceClassification")
            values |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # transformers counts these
        return values | {
            "architectures": [name], "model_type": kind, "hidden_act": "silu", "attention_bias": False,
            "attention_dropout": 0.0, "use_sliding_window": False,
            "rope_scaling": None if factor == 1 else yarn,
        }  # fmt: skip


def _count_labels(values: dict, path: Path) -> int:
    """Returns 1 for the config.json of a reward model, 0 for that of a language model. ValueError: a classifier."""
    if "SequenceClassification" not in str(values.get("architectures")):
        return 0
    labels = len(values.get("id2label") or "01")  # transformers leaves out two labels
    if labels != 1:
        raise ValueError(f"{path} is of a classifier with {labels} labels; expected one, a score; fix: --weights")
    return labels


def _rotary(values: dict, path: Path) -> dict:
    """Returns the rotary fields of a config.json. Releases write rope_theta and rope_scaling, transformers 5 writes
    rope_parameters. ValueError: it scales the embedding in a way that this model does not implement."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    theta, positions = rope.get("rope_theta", values.get("rope_theta")), values.get("max_position_embeddings")
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
    if kind == "default":  # without the pretrained length: of the released 40,960 positions, 8,192 are for an answer
        factor, original = 1.0, 32768 if positions == 40960 else positions
    else:
        unsupported = [key for key, value in rope.items() if key not in YARN and value != YARN_USUAL.get(key)]
        if kind != "yarn" or unsupported or not isinstance(factor, int | float) or factor < 1:
            raise ValueError(
                f"{path} scales its rotary embedding by {rope}; this model only does rope_type 'yarn' with a factor, "
                "original_max_position_embeddings and the usual rest; fix: --weights"
            )
        key = "original_max_position_embeddings"
        original = values.get(key) or rope.get(key) or positions
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
    """Returns the full shape of every parameter, by this recipe's name of it."""
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
    if config.num_labels:
        return out | {"score.weight": (config.num_labels, D)}
    return out if config.is_tied else out | {"lm_head.weight": (V, D)}


# ----------------------------------------------------------------------------------------------------------- options


ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def adaptable() -> list[str]:
    """Returns the linears that can have adapters. The router and the vocabulary projection cannot: the model reads their
    weights and does not call the modules."""
    return ATTENTION + MLP


def adapted(config: Qwen3Config) -> list[str]:
    """Returns the linears that get adapters unless --lora-targets says otherwise: all but the experts'."""
    return ATTENTION if config.num_experts else ATTENTION + MLP


def quantized(config: Qwen3Config) -> list[str]:
    """Returns the weights that --quantize packs: all matrices of the blocks except the router."""
    return ATTENTION + (["gate_up", "down"] if config.num_experts else MLP)


# ------------------------------------------------------------------------------------------------------------ a folder


def size_of(folder: Path) -> str:
    """Returns the published size that has the architecture of a weights folder. ValueError: no size has it (the message
    names the nearest), or the folder does not hold its architecture."""
    if _architecture_unsaid(folder):
        raise ValueError(f"{folder} is a Megatron-LM checkpoint, which does not say its size; fix: --size")
    architecture = _sharded_config(folder) if is_sharded(folder) else Qwen3Config.from_folder(folder)
    return release.name_size(folder, {name: _differs(architecture, config) for name, config in SIZES.items()})


def _differs(actual: Qwen3Config, expected: Qwen3Config) -> list[str]:
    """Lists how an architecture differs from that of a size. Some fields do not count: the releases of one size (base,
    2507, Coder, ...) differ in positions, and in the width of dense layers where no layer is dense; users resize the
    vocabulary."""
    free = {"rope_theta", "rope_factor", "max_position_embeddings", "original_max_position_embeddings"}
    free |= {"vocab_size", "initializer_range", "num_labels"}
    free |= {"intermediate_size"} if actual.num_experts and expected.num_experts else set()
    return release.differences(actual, expected, free)


def describe_vocabulary_change(o, config: Qwen3Config) -> str | None:
    """Says in words how the vocabulary of --weights differs from the published one. None: it does not."""
    published = SIZES[o.size].vocab_size
    if o.weights is None or config.vocab_size == published:
        return None
    return f"{o.weights} has a vocabulary of {config.vocab_size:,} tokens; the published {o.size} has {published:,}"


def _architecture_unsaid(folder: Path) -> bool:
    """Whether the folder is a Megatron-LM checkpoint without a copy of the release's config.json."""
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
    """Returns the architecture of --weights, or else of --size. --yarn lengthens its positions. orm.sh gives it a
    score."""
    config, factor = _own_config(o), o.yarn
    if o.job == "orm":
        config = dataclasses.replace(config, num_labels=1)
    return config if factor is None else dataclasses.replace(config, rope_factor=factor)


def _own_config(o) -> Qwen3Config:
    if o.size not in SIZES:
        raise ValueError(f"unknown size {o.size!r}; expected {', '.join(SIZES)}; fix: --size, or add it to config.py")
    if o.weights is None:
        changes = {"num_hidden_layers": o.layers, "vocab_size": o.vocabulary}
        return dataclasses.replace(SIZES[o.size], **{k: v for k, v in changes.items() if v})
    if _architecture_unsaid(o.weights):
        return SIZES[o.size]
    stored = _sharded_config(o.weights) if is_sharded(o.weights) else Qwen3Config.from_folder(o.weights)
    if not o.from_scratch and (differences := _differs(stored, SIZES[o.size])):
        raise ValueError(f"{o.weights} is not of size {o.size}: {', '.join(differences)}; fix: --size or --weights")
    return stored


# ------------------------------------------------------------------------------------------------------------- memory


def adapted_shapes(o, config: Qwen3Config) -> list[tuple[int, int]]:
    """Returns the shapes [out, in] of the linears that get new adapters, of each expert's too."""
    D, F, targets = config.hidden_size, config.moe_intermediate_size, o.targets(config)
    ends = tuple(f"{target}.weight" for target in targets)
    dense = [shape for name, shape in shapes(config).items() if name.endswith(ends)]
    experts = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    of_expert = [shape for name, shape in experts.items() if name in targets]
    return dense + of_expert * (config.num_experts * config.num_hidden_layers)


def memory_estimate(o, config: Qwen3Config, length: int, trained: int) -> float:
    """Estimates the bytes per rank of weights, gradients, optimizer, saved activations and loss; memory.py measures
    them. Kernels' workspace is not counted. trained: number of parameters that train.

    Weights and gradients count in their dtypes. The fp32 master weights and the two moments are sharded over dp*cp.
    A packed weight is unpacked while it is used. Activations are what the backward reads of each block (recompute none:
    everything; full: only the block's input), for as many micro-batches as 1F1B holds (stage s: pp - s). The fullest
    stage counts. Tokens are assumed to spread evenly over experts. At the peak, either the loss holds the gradient of
    the vocabulary projection and a chunk of logits, or one block is recomputed and holds all its activations.
    """
    dtype, stages = 4 if o.precision == "fp32" else 2, o.stage_layers(config.num_hidden_layers)
    experts = 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts * config.num_hidden_layers
    share_trained = trained / config.parameters
    weight_bytes = gradients = master = 0.0
    ends = tuple(f"{name}.weight" for name in quantized(config))
    linears = sum(math.prod(shape) for name, shape in shapes(config).items() if name.endswith(ends))
    for parameters, packed, cut in (
        (config.parameters - experts, linears, o.tp),
        (experts, experts, o.etp * o.ep),
    ):
        share, shards = parameters / cut * max(stages) / sum(stages), o.world / (cut * o.pp)
        if o.quantize == "nf4":
            weight_bytes -= packed / cut * max(stages) / sum(stages) * (dtype - PACKED_BYTES)
        weight_bytes += share * dtype / (shards if o.fsdp else 1)
        gradients += share_trained * share * (dtype if o.fsdp else 4) / (shards if o.fsdp else 1)
        master += share_trained * share * o.optimizer_bytes / shards
    tokens = length / o.cp * o.micro_batch
    D, E, sp = config.hidden_size, config.head_dim, o.tp if o.sp else 1
    attention = E * (config.num_attention_heads + config.num_key_value_heads) / o.tp
    width, copies, row_width = config.intermediate_size, 1, 0
    if config.num_experts:
        width, copies, row_width = config.moe_intermediate_size, config.num_experts_per_tok, D * o.etp / o.tp
    # A block saves the inputs of its two norms, the normed inputs of attention and MLP (gathered under sequence
    # parallelism), queries and keys twice, values, and the attention's output. The MLP saves gate, up and their
    # product; the CPU's reference op also saves silu(gate).
    mlp = copies * width / o.tp
    parts = 4 if os.environ.get("ZOO_DEVICE", "cpu") == "cpu" else 3
    everything = tokens * dtype * (2 * D / sp + 2 * D + 3 * attention + parts * mlp + copies * 2 * row_width)
    saved = {
        "none": everything,
        # Recomputed: normed inputs, queries and keys after the norm, the product of gate and up, rows sorted by expert.
        "selective": tokens * dtype * (2 * D / sp + 2 * attention + 2 * mlp + copies * row_width),
        "full": tokens * D * dtype / sp,
    }
    offload, vocabulary = o.offload_activations, config.vocab_size / o.tp
    blocks = 0 if offload else max(n * min(o.pp - stage, o.micro_batches) for stage, n in enumerate(stages))
    # The gradient overwrites the logits. In bf16 it overwrites an fp32 copy of them, beside two bf16 tensors.
    loss = vocabulary * D * (4 + dtype % 4) + min(2**26, tokens * vocabulary) * (4 + 2 * (dtype % 4))
    loss = 0 if config.num_labels else loss
    gathered = vocabulary * D * dtype if o.fsdp else 0  # FSDP keeps the root module gathered
    unpacked = dtype * max(2 * experts / 3 / sum(stages) / (o.etp * o.ep), D * config.intermediate_size / o.tp)
    unpacked = unpacked if o.quantize == "nf4" else 0.0  # the largest weight, while it is used
    recomputed = {"none": 0.0, "full": everything, "selective": everything - saved["selective"]}[o.recompute]
    if recomputed:
        recomputed += 2 * tokens * dtype * mlp  # the gradients of gate and up
    peak = max(loss, recomputed + unpacked, everything if offload else 0) + gathered
    return weight_bytes + gradients + master + saved[o.recompute] * blocks + peak
