"""Qwen3: the architecture, its published sizes, and the options of this recipe's jobs.

Sources: the released config.json files (Qwen/Qwen3-*), arXiv:2505.09388 tables 1 and 2.
No torch here: options are checked before anything heavy is imported.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from common import weights

HERE = Path(__file__).parent

# What a released config.json must say for this model to be its; None: the key may be absent.
FIXED = {
    "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "n_shared_experts": 0, "attention_dropout": 0.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Field names are those of the released `config.json`. num_experts 0: a dense model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool

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

    def flops(self, length: int) -> int:
        """Model FLOPs of the forward of one sequence, a multiply-add counted as two, the vocabulary projection
        included, the lower triangle of attention alone (half of L^2); training is three times that."""
        D, E, layers = self.hidden_size, self.head_dim, self.num_hidden_layers
        attention = 2 * D * E * (self.num_attention_heads + self.num_key_value_heads)
        mlp = 3 * D * self.intermediate_size
        if self.num_experts:
            mlp = 3 * D * self.moe_intermediate_size * self.num_experts_per_tok + D * self.num_experts
        linear = 2 * length * (layers * (attention + mlp) + self.vocab_size * D)
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
            if (values.get(key) or wanted) != wanted:
                raise ValueError(f"{path} has {key}={values[key]!r}; this model only does {wanted!r}; fix: --weights")
        rope = values.get("rope_parameters") or {}  # transformers 5; releases write rope_theta and rope_scaling
        scaling = values.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
        if scaling:
            raise ValueError(f"{path} scales its rotary embedding ({scaling}); this model does not; fix: --weights")
        values["rope_theta"] = values.get("rope_theta", rope.get("rope_theta"))
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
        kind, name = ("qwen3_moe", "Qwen3MoeForCausalLM") if self.num_experts else ("qwen3", "Qwen3ForCausalLM")
        if self.num_experts:
            values |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001}
        else:
            for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
                del values[key]
        return values | {
            "architectures": [name], "model_type": kind, "hidden_act": "silu", "attention_bias": False,
            "attention_dropout": 0.0, "rope_scaling": None, "use_sliding_window": False, "initializer_range": 0.02,
        }  # fmt: skip


_RELEASED = dict(
    vocab_size=151936, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=40960,
)  # fmt: skip
_DENSE = dict(num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, norm_topk_prob=False)
_SPARSE = dict(num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, num_key_value_heads=4)
_TINY = dict(
    vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=48, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=2048,
    tie_word_embeddings=True,
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
