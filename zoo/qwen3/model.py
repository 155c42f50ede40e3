"""Qwen3, dense and mixture of experts, on megatron-core.

Paper: Qwen3 Technical Report, arXiv:2505.09388. Reference implementation: transformers 5.23 `models/qwen3/
modeling_qwen3.py` and `models/qwen3_moe/modeling_qwen3_moe.py` (Apache-2.0). Parameter names are those of the released
checkpoints; the exceptions are the experts, which are stacked here (convert.py).

What is unusual:
- Queries and keys are RMS-normalised per head before the rotary embedding; no linear has a bias.
- heads * head_dim is not the hidden width for most sizes: q and o are not square.
- Rotary embedding over rotate-half pairs; positions restart at every document of a packed row.
- Mixture of experts: softmax over all experts in fp32, the top k renormalised to sum 1, every layer sparse, no token
  dropped and no shared expert; auxiliary load-balancing loss over all layers together.

A micro-batch is one row of tokens, its sequences end to end, with the bounds that attention must not cross.

Parallelism: tokens first. Under tensor parallelism heads, FFN columns (of every expert too) and the vocabulary are
split; under sequence parallelism everything between holds T/tp tokens. Context parallelism splits the tokens for the whole network, in zig-zag order, and
meets only in attention. What every rank holds whole but uses on its own
heads or columns (q_norm, k_norm, the router) goes through `copy_to_tensor_model_parallel_region`, whose backward sums
its gradient. A pipeline stage hands on the hidden states alone.

Shape legend: T tokens of this rank, D hidden, H query heads and K key heads of this rank, E head dim, F FFN columns of
this rank, G experts, V vocabulary.
"""

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import nn

from common import checkpoint, device, ops, parallel

from . import convert
from .config import Qwen3Config


class Qwen3RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Qwen3Attention(nn.Module):
    def __init__(self, config: Qwen3Config, mc: TransformerConfig):
        super().__init__()
        self.config, self.mc = config, mc
        D, E = config.hidden_size, config.head_dim
        self.q_proj = parallel.ColumnLinear(D, config.num_attention_heads * E, mc, bias=False)
        self.k_proj = parallel.ColumnLinear(D, config.num_key_value_heads * E, mc, bias=False)
        self.v_proj = parallel.ColumnLinear(D, config.num_key_value_heads * E, mc, bias=False)
        self.o_proj = parallel.RowLinear(config.num_attention_heads * E, D, mc, bias=False)
        self.q_norm = Qwen3RMSNorm(E, config.rms_norm_eps, mc.params_dtype)
        self.k_norm = Qwen3RMSNorm(E, config.rms_norm_eps, mc.params_dtype)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], cu_seqlens: list[int], cache=None
    ) -> torch.Tensor:
        """x [T(/tp), 1, D], rope cos and sin [T, 1, 1, E] -> [T(/tp), 1, D]. cache: `infer.Cache`, when generating."""
        E, eps = self.config.head_dim, self.config.rms_norm_eps
        x = parallel.enter_tensor_parallel(x, self.mc)  # [T, 1, D]
        q = self.q_proj(x).unflatten(2, (-1, E))  # [T, 1, H, E]
        k = self.k_proj(x).unflatten(2, (-1, E))  # [T, 1, K, E]
        v = self.v_proj(x).unflatten(2, (-1, E))
        q = ops.rotary_half(ops.rms_norm(q, parallel.shared_by_tp(self.q_norm.weight, self.mc), eps), *rope)
        k = ops.rotary_half(ops.rms_norm(k, parallel.shared_by_tp(self.k_norm.weight, self.mc), eps), *rope)
        if cache is not None:
            out = cache.attend(self, q, k, v)
        else:
            out = parallel.context_parallel_attention(q, k, v, causal=True, cu_seqlens=cu_seqlens)  # [T, 1, H, E]
        return self.o_proj(out.flatten(2))


class Qwen3MLP(nn.Module):
    def __init__(self, config: Qwen3Config, mc: TransformerConfig):
        super().__init__()
        self.mc = mc
        D, width = config.hidden_size, config.intermediate_size
        self.gate_proj = parallel.ColumnLinear(D, width, mc, bias=False)
        self.up_proj = parallel.ColumnLinear(D, width, mc, bias=False)
        self.down_proj = parallel.RowLinear(width, D, mc, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T(/tp), 1, D] -> [T(/tp), 1, D]."""
        x = parallel.enter_tensor_parallel(x, self.mc)
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))  # [T, 1, F] in between


class Qwen3SparseMLP(nn.Module):
    """Mixture of experts. `gate` routes; `gate_up` [G, D, 2, F] and `down` [G, F, D] are the released per-expert
    matrices, transposed and stacked."""

    def __init__(self, config: Qwen3Config, mc: TransformerConfig):
        super().__init__()
        self.config, self.mc = config, mc
        G, D, dtype = config.num_experts, config.hidden_size, mc.params_dtype
        width = config.moe_intermediate_size // mc.tensor_model_parallel_size
        self.gate = nn.Linear(D, G, bias=False, dtype=dtype)
        self.gate_up = nn.Parameter(torch.empty(G, D, 2, width, dtype=dtype))
        self.down = nn.Parameter(torch.empty(G, width, D, dtype=dtype))
        parallel.set_tensor_model_parallel_attributes(self.gate_up, True, 3, 1)
        parallel.set_tensor_model_parallel_attributes(self.down, True, 1, 1)

    def forward(self, x: torch.Tensor, routing: list[torch.Tensor]) -> torch.Tensor:
        """[T(/tp), 1, D] -> [T(/tp), 1, D]; appends the router's logits [T, G] fp32 to `routing`."""
        x = parallel.enter_tensor_parallel(x, self.mc)  # [T, 1, D]
        tokens = x.flatten(0, 1)
        logits = F.linear(tokens, parallel.shared_by_tp(self.gate.weight, self.mc))  # [T, G]
        routing.append(logits.float())
        probs, experts = logits.softmax(-1, dtype=torch.float32).topk(self.config.num_experts_per_tok)  # [T, k] each
        if self.config.norm_topk_prob:
            probs = probs / probs.sum(-1, keepdim=True)
        rows, position = ops.token_permute(tokens, experts)  # [T*k, D], sorted by expert
        counts = torch.zeros(self.config.num_experts, dtype=torch.int64, device=x.device)
        ends = counts.index_add_(0, experts.flatten(), torch.ones_like(experts.flatten())).cumsum(0)
        inner = ops.swiglu(ops.grouped_matmul(rows, self.gate_up.flatten(2), ends))  # [T*k, F]
        out = ops.token_unpermute(ops.grouped_matmul(inner, self.down, ends), position, probs.to(x.dtype))
        return parallel.leave_tensor_parallel(out.unsqueeze(1), self.mc)


class Qwen3Block(nn.Module):
    def __init__(self, config: Qwen3Config, mc: TransformerConfig):
        super().__init__()
        eps, dtype = config.rms_norm_eps, mc.params_dtype
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps, dtype)
        self.self_attn = Qwen3Attention(config, mc)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps, dtype)
        self.mlp = Qwen3SparseMLP(config, mc) if config.num_experts else Qwen3MLP(config, mc)
        parallel.mark_replicated([self.input_layernorm.weight, self.post_attention_layernorm.weight], mc)

    def forward(self, x, cos, sin, cu_seqlens, cache=None):
        """x [T(/tp), 1, D], cos and sin [T, 1, 1, E] -> (x, the router's logits [T, G] or an empty tensor)."""
        y = self.self_attn(self.input_layernorm(x), (cos, sin), cu_seqlens, cache)
        norm = self.post_attention_layernorm
        y, x = ops.add_rms_norm(y, x, norm.weight, norm.eps)
        routing: list[torch.Tensor] = []
        y = self.mlp(y, routing) if isinstance(self.mlp, Qwen3SparseMLP) else self.mlp(y)
        return x + y, routing[0] if routing else x.new_empty(0)


class Qwen3(MegatronModule):
    """One pipeline stage's chunk of the model: `layers` are the global indices of its blocks.

    `first` chunks embed, `last` ones normalise and make the loss.
    """

    model_type = ModelType.encoder_or_decoder  # what megatron-core's schedules ask

    def __init__(
        self,
        config: Qwen3Config,
        mc: TransformerConfig,
        layers: range,
        first: bool,
        last: bool,
        recompute: str = "none",
    ):
        super().__init__(mc)
        self.qwen, self.first, self.last, self.recompute = config, first, last, recompute
        D, dtype, vocabulary = config.hidden_size, mc.params_dtype, config.vocab_size // mc.tensor_model_parallel_size
        if first:
            self.embed_tokens = nn.Embedding(vocabulary, D, dtype=dtype)
            parallel.set_tensor_model_parallel_attributes(self.embed_tokens.weight, True, 0, 1)
        self.layers = nn.ModuleDict({str(i): Qwen3Block(config, mc) for i in layers})
        if last:
            self.norm = Qwen3RMSNorm(D, config.rms_norm_eps, dtype)
            parallel.mark_replicated([self.norm.weight], mc)
        if last and not config.tie_word_embeddings:
            self.lm_head = nn.Linear(D, vocabulary, bias=False, dtype=dtype)
            parallel.set_tensor_model_parallel_attributes(self.lm_head.weight, True, 0, 1)
        self._input: torch.Tensor | None = None

    @property
    def output_weight(self) -> torch.Tensor:
        """[V/tp, D]: the embedding's own where they are tied."""
        return self.embed_tokens.weight if self.qwen.tie_word_embeddings else self.lm_head.weight

    def set_input_tensor(self, tensor) -> None:
        """Called by the pipeline schedule: what the previous stage sent, or None."""
        self._input = tensor[0] if isinstance(tensor, list) else tensor

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, cu_seqlens: list[int], rows: int = 1,
        labels: torch.Tensor | None = None, weight: torch.Tensor | None = None, cache=None,
    ):  # fmt: skip
        """tokens and positions int64 [T*cp] of the whole micro-batch, cu_seqlens its sequences' bounds, rows: how many
        sequences of one length lie end to end in it. With labels int64 (negative: no loss) and their weight fp32, both
        [T*cp], the vocabulary projection is done inside the loss, and in here, where FSDP has gathered its weight.

        Returns on the last pipeline stage (sum over this rank's tokens of weight * cross entropy, router logits of this
        chunk's layers [layers, T, G] or None), without labels the states after the last norm [T(/tp), 1, D] in place of
        the sum; on the others the hidden states as the schedule passes them on, [T(/tp)/rows, rows, D].
        """
        D = self.qwen.hidden_size
        tokens, positions = (parallel.context_tokens(t, causal=True) for t in (tokens, positions))  # [T]
        if self.first:
            x = parallel.vocab_parallel_embedding(tokens, self.embed_tokens.weight, self.config).unsqueeze(1)
        else:
            x = self._input.reshape(-1, 1, D)
        cos, sin = rotary_table(positions, self.qwen)
        routing = []
        for block in self.layers.values():
            x, logits = parallel.recomputed(block, self.recompute)(x, cos, sin, cu_seqlens, cache)
            routing.append(logits)
        if not self.last:
            return x.view(-1, rows, D)
        x, routing = self.norm(x), torch.stack(routing) if self.qwen.num_experts else None
        if labels is None:
            return x, routing
        labels, weight = (parallel.context_tokens(t, causal=True) for t in (labels, weight))  # [T]
        x = parallel.enter_tensor_parallel(x, self.config).flatten(0, 1)  # [T, D]
        tp = self.config.tensor_model_parallel_size
        return ops.linear_cross_entropy(x, self.output_weight, labels, weight, tp)[0], routing


def rotary_table(positions: torch.Tensor, config: Qwen3Config) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, 1, 1, E] fp32 of every token's angles, both halves alike."""
    E = config.head_dim
    exponents = torch.arange(0, E, 2, dtype=torch.int64, device=positions.device).float() / E
    angles = positions.float()[:, None] * (1.0 / config.rope_theta**exponents)  # [T, E/2]
    angles = torch.cat((angles, angles), -1)[:, None, None]
    return angles.cos(), angles.sin()


def load_balancing_loss(routing: torch.Tensor, k: int) -> torch.Tensor:
    """G * sum over experts of (share of the tokens' k choices) * (mean probability), over all layers and tokens
    together: the auxiliary loss of Switch Transformers (arXiv:2101.03961, equations 4 to 6) as transformers'
    `load_balancing_loss_func` has it. routing: router logits [layers, T, G]."""
    probs = routing.flatten(0, 1).softmax(-1)  # [layers*T, G]
    chosen = torch.zeros_like(probs).scatter_(1, probs.topk(k).indices, 1.0)
    return probs.shape[1] * (chosen.mean(0) * probs.mean(0)).sum()


# ---------------------------------------------------------------------------------------------- this rank's part


def build(o, config: Qwen3Config, where: torch.device | None = None) -> list[Qwen3]:
    """This rank's unwrapped model chunks, memory allocated (on this rank's device, or on `where`) and not filled."""
    mc = parallel.megatron_config(
        o, hidden=config.hidden_size, heads=config.num_attention_heads, layers=config.num_hidden_layers
    )
    chunks = []
    with where or device.current():
        for i in range(o.vpp):
            stage = None if o.vpp == 1 else i
            first = parallel.mpu.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage)
            last = parallel.mpu.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage)
            layers = parallel.stage_layers(o, config.num_hidden_layers, i)
            chunks.append(Qwen3(config, mc, layers, first, last, o.recompute))
            chunks[-1].vp_stage = stage
    return chunks


def fill(chunks: list[Qwen3], o, config: Qwen3Config) -> None:
    """Released weights, each rank its slice; or, with --from-scratch, drawn ones."""
    if getattr(o, "from_scratch", False):
        checkpoint.initialize(chunks, o.seed, draw)
    else:
        convert.load(chunks, convert.released_entries(o.weights, config), config)


def draw(name: str, whole: torch.Tensor, generator: torch.Generator) -> None:
    """Initial values: N(0, 0.02), unit norms (`initializer_range` of the released configs)."""
    if name.endswith("norm.weight"):
        whole.fill_(1.0)
    else:
        whole.normal_(std=0.02, generator=generator)
