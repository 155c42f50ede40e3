"""Qwen3, dense and mixture of experts, on megatron-core.

Paper: Qwen3 Technical Report, arXiv:2505.09388. Reference implementation: transformers 5.23 `models/qwen3/
modeling_qwen3.py` and `models/qwen3_moe/modeling_qwen3_moe.py` (Apache-2.0). Parameter names are those of the released
checkpoints; the exceptions are the experts, which are stacked here (convert.py).

What is unusual:
- Queries and keys are RMS-normalised per head before the rotary embedding; no linear has a bias.
- heads * head_dim is not the hidden width for most sizes: q and o are not square.
- The rotary embedding pairs entry i with i + E/2 (rotate-half); YaRN (arXiv:2309.00071) extends it beyond the
  pretrained length. Positions restart at every document of a packed row.
- Mixture of experts: softmax over all experts in fp32, the top k renormalised to sum 1, every layer sparse, no token
  dropped and no shared expert; auxiliary load-balancing loss over all layers together (or of each layer), z-loss.

A micro-batch is one row of tokens. Its sequences stand end to end, and attention does not cross their bounds.

Parallelism (tokens are the first dimension of every activation):
- Tensor parallelism splits heads, FFN columns (also of every expert) and the vocabulary. Under sequence parallelism,
  activations between these regions hold T/tp tokens.
- Context parallelism splits the tokens for the whole network, in zig-zag order. Only attention communicates.
- Expert parallelism spreads the experts over ranks that hold different tokens. Tokens are sent to the experts and back.
- A parameter that every rank holds whole, but applies to its own heads or columns only (q_norm, k_norm, the router, key
  and value heads if they are fewer than the ranks), goes through `copy_to_tensor_model_parallel_region`, whose backward
  sums its gradient over the ranks.
- A pipeline stage sends only hidden states to the next one. The first and the last stage hold the tied embedding and
  sum its gradient.

Shape legend: T tokens of this rank, D hidden, H query heads and K key heads of this rank, E head dim, F FFN columns of
this rank, G experts, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import nn

from common import device, lora, ops, parallel
from common.recompute import recomputed

from .config import Qwen3Config


class Qwen3RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Qwen3SharedHeads(nn.Linear):
    """Projects keys or values with fewer heads than tensor-parallel ranks. Every rank holds the weights of all heads
    and computes the one head that its query heads attend to (query head h of H attends to head h*K//H)."""

    def __init__(self, config: Qwen3Config, mc: TransformerConfig):
        K, E = config.num_key_value_heads, config.head_dim
        super().__init__(config.hidden_size, K * E, bias=False, dtype=mc.params_dtype)
        head = parallel.mpu.get_tensor_model_parallel_rank() * K // mc.tensor_model_parallel_size
        self.mc, self.rows = mc, slice(head * E, (head + 1) * E)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, 1, D] -> [T, 1, E]."""
        return F.linear(x, parallel.shared_by_tp(self.weight, self.mc)[self.rows])


class Qwen3Attention(nn.Module):
    def __init__(self, config: Qwen3Config, mc: TransformerConfig):
        super().__init__()
        self.config, self.mc = config, mc
        D, E = config.hidden_size, config.head_dim
        self.q_proj = parallel.ColumnLinear(D, config.num_attention_heads * E, mc, bias=False)
        if config.num_key_value_heads % mc.tensor_model_parallel_size:
            self.k_proj, self.v_proj = Qwen3SharedHeads(config, mc), Qwen3SharedHeads(config, mc)
        else:
            self.k_proj = parallel.ColumnLinear(D, config.num_key_value_heads * E, mc, bias=False)
            self.v_proj = parallel.ColumnLinear(D, config.num_key_value_heads * E, mc, bias=False)
        self.o_proj = parallel.RowLinear(config.num_attention_heads * E, D, mc, bias=False)
        self.q_norm = Qwen3RMSNorm(E, config.rms_norm_eps, mc.params_dtype)
        self.k_norm = Qwen3RMSNorm(E, config.rms_norm_eps, mc.params_dtype)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], bounds: ops.Bounds | None, cache=None
    ) -> torch.Tensor:
        """x [T(/tp), 1, D], rope cos and sin [T, 1, 1, E] -> [T(/tp), 1, D]. cache: a cache of `decode`, only
        for generation."""
        E, eps = self.config.head_dim, self.config.rms_norm_eps
        x, q = parallel.enter_with(self.q_proj, x, self.mc)  # [T, 1, D], [T, 1, H*E]
        q = q.unflatten(2, (-1, E))  # [T, 1, H, E]
        k = self.k_proj(x).unflatten(2, (-1, E))  # [T, 1, K, E]
        v = self.v_proj(x).unflatten(2, (-1, E))
        q = recomputed(ops.norm_rotary_half, q, parallel.shared_by_tp(self.q_norm.weight, self.mc), *rope, eps)
        k = recomputed(ops.norm_rotary_half, k, parallel.shared_by_tp(self.k_norm.weight, self.mc), *rope, eps)
        if cache is not None:
            out = cache.attend(self, q, k, v)
        else:
            out = parallel.context_parallel_attention(q, k, v, causal=True, bounds=bounds)  # [T, 1, H, E]
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
        x, gate = parallel.enter_with(self.gate_proj, x, self.mc)  # [T, 1, D], [T, 1, F]
        return self.down_proj(recomputed(ops.swiglu, gate, self.up_proj(x)))


@dataclass(frozen=True)
class RouterOptions:
    """How tokens reach their experts under expert parallelism, and what a layer's router adds to the loss: `balance`
    times its own load-balancing loss and `z` times its z-loss, the mean over tokens of logsumexp(logits)^2 (ST-MoE,
    arXiv:2202.08906, equation 5). A layer may lie on a pipeline stage that does not compute the loss, so
    megatron-core's `MoEAuxLossAutoScaler` adds the gradients of these two losses during the layer's backward."""

    dispatch: str  # alltoall or allgather
    balance: float
    z: float

    def add_losses(self, chosen, logits, probs, counts, mc: TransformerConfig) -> torch.Tensor:
        """Returns chosen [T, k] with the losses' gradient attached. logits and probs [T, G]; counts [G]: choices of
        each expert."""
        if not (self.balance or self.z):
            return chosen
        share = _over_ranks(counts / len(logits))
        value = self.balance * probs.shape[1] * (share * probs.mean(0)).sum()
        value = value + self.z * logits.logsumexp(-1).square().mean()
        # Gradients are summed over the tp*cp ranks of a row: each holds a part of its tokens, or all hold the same.
        return MoEAuxLossAutoScaler.apply(chosen, value / (mc.tensor_model_parallel_size * mc.context_parallel_size))


class Qwen3SparseMLP(nn.Module):
    """Mixture of experts. `gate` is the router. `gate_up` [G, D, 2, F] and `down` [G, F, D] are the released per-expert
    matrices, transposed and stacked. This rank holds G/ep experts, with F/etp of their columns.

    With etp = tp, every tensor-parallel rank routes all tokens of its group and computes its columns. With etp = 1
    (under sequence parallelism), each rank routes its own T/tp tokens to whole experts.
    """

    def __init__(self, config: Qwen3Config, mc: TransformerConfig, router: RouterOptions):
        super().__init__()
        self.config, self.mc, self.router = config, mc, router
        G, D, dtype = config.num_experts, config.hidden_size, mc.params_dtype
        held, width = G // mc.expert_model_parallel_size, config.moe_intermediate_size // mc.expert_tensor_parallel_size
        self.gate = nn.Linear(D, G, bias=False, dtype=dtype)
        self.gate_up = nn.Parameter(torch.empty(held, D, 2, width, dtype=dtype))
        self.down = nn.Parameter(torch.empty(held, width, D, dtype=dtype))
        parallel.mark_expert(self.gate_up, 3, mc)
        parallel.mark_expert(self.down, 1, mc)
        self.split_experts = mc.expert_tensor_parallel_size == mc.tensor_model_parallel_size
        if not self.split_experts:
            parallel.mark_replicated([self.gate.weight], mc)
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None  # sums since the last `router_metrics`

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T(/tp), 1, D] -> (output [T(/tp), 1, D], the router's logits [T, G] fp32)."""
        gate = self.gate.weight
        if self.split_experts:
            x, gate = parallel.enter_tensor_parallel(x, self.mc), parallel.shared_by_tp(gate, self.mc)
        tokens = x.flatten(0, 1)  # [T, D]
        logits = F.linear(tokens, gate).float()  # [T, G]
        probs = logits.softmax(-1)
        chosen, experts = probs.topk(self.config.num_experts_per_tok)  # [T, k] each
        if self.config.norm_topk_prob:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        counts = torch.zeros(self.config.num_experts, dtype=torch.int64, device=x.device)
        counts.index_add_(0, experts.flatten(), torch.ones_like(experts.flatten()))  # [G]
        if self.training and torch.is_grad_enabled():
            chosen = self.router.add_losses(chosen, logits, probs, counts, self.mc)
        if self.mc.expert_model_parallel_size > 1 and self.router.dispatch == "allgather":
            out, computed = self.compute_by_allgather(tokens, experts, chosen)
        else:
            rows, position = recomputed(ops.token_permute, tokens, experts)  # [T*k, D], sorted by expert
            if self.mc.expert_model_parallel_size > 1:
                rows, computed = self.compute_by_alltoall(rows, counts)
            else:
                rows, computed = self.compute(rows, counts), counts.sum()
            out = ops.token_unpermute(rows, position, chosen.to(x.dtype))
        if self.training:
            self.observe(counts, probs, logits, computed)
        out = out.view_as(x)
        return parallel.leave_tensor_parallel(out, self.mc) if self.split_experts else out, logits

    def compute(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Applies this rank's experts: rows [N, D] sorted by expert, counts [G/ep] of each -> [N, D]."""
        ends = counts.cumsum(0)
        inner = recomputed(ops.swiglu, lora.expert_matmul(self, "gate_up", rows, ends))  # [N, F/etp]
        return lora.expert_matmul(self, "down", inner, ends)

    def compute_by_alltoall(self, rows: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sends rows [T*k, D] (sorted by expert, counts [G] of each) to the ranks of their experts and gets the outputs
        back, in the same order. The two all-to-alls carry every row (no token is dropped); their sizes cost one host
        synchronisation. Returns the outputs and how many rows were computed here."""
        group = parallel.mpu.get_expert_model_parallel_group()
        ep, first = group.size(), group.rank() * len(self.gate_up)
        all_counts = counts.new_empty(ep, len(counts))  # [source rank, G]
        dist.all_gather_into_tensor(all_counts, counts.unsqueeze(0), group=group)
        local_counts = all_counts[:, first : first + len(self.gate_up)]  # [source rank, G/ep]
        sent, received = torch.stack((counts.view(ep, -1).sum(1), local_counts.sum(1))).tolist()  # the synchronisation
        received_rows = parallel.all_to_all(group, rows, received, sent)  # [N, D], by source rank, then by expert
        expert = torch.arange(local_counts.shape[1], device=rows.device).repeat(ep)
        expert = expert.repeat_interleave(local_counts.flatten(), output_size=sum(received))  # [N]
        by_expert, position = ops.token_permute(received_rows, expert.unsqueeze(1))
        out = self.compute(by_expert, local_counts.sum(0))
        out = ops.token_unpermute(out, position, torch.ones_like(expert, dtype=out.dtype).unsqueeze(1))
        return parallel.all_to_all(group, out, sent, received), local_counts.sum()

    def compute_by_allgather(self, tokens, experts, chosen) -> tuple[torch.Tensor, torch.Tensor]:
        """Gathers tokens [T, D] of all ranks on every rank, which computes its own experts; a reduce-scatter sums their
        outputs. This sends fewer bytes than `compute_by_alltoall` if ep < k. experts and chosen are [T, k]. Returns
        [T, D] and how many rows were computed here; that number costs one host synchronisation."""
        group = parallel.mpu.get_expert_model_parallel_group()
        first, held = group.rank() * len(self.gate_up), len(self.gate_up)
        tokens = parallel.gather_from_sequence_parallel_region(tokens, tensor_parallel_output_grad=True, group=group)
        chosen = parallel.gather_from_sequence_parallel_region(chosen, tensor_parallel_output_grad=True, group=group)
        all_experts = experts.new_empty(len(tokens), experts.shape[1])  # [T*ep, k]
        dist.all_gather_into_tensor(all_experts, experts.contiguous(), group=group)
        local = (all_experts - first).flatten()
        local = torch.where((local >= 0) & (local < held), local, held)
        counts = torch.zeros(held + 1, dtype=torch.int64, device=local.device).index_add_(
            0, local, torch.ones_like(local)
        )
        computed = counts[:held].sum()
        order = local.argsort(stable=True)[: int(computed)]  # choices of this rank's experts, sorted
        source = order // experts.shape[1]
        rows = self.compute(tokens[source], counts[:held]).float() * chosen.flatten()[order].unsqueeze(1)
        out = torch.zeros_like(tokens, dtype=torch.float32).index_add(0, source, rows).to(tokens.dtype)
        return parallel.reduce_scatter_to_sequence_parallel_region(out, group=group), computed

    @torch.no_grad()
    def observe(self, counts, probs, logits, computed) -> None:
        """Adds two tensors to `seen`, for `router_metrics`. [G + 1]: how often each expert was chosen, and how many
        choices were computed here. [G + 3]: sums over tokens of the experts' probabilities, of 1, of entropy and of
        logsumexp^2. Activation recomputation adds a forward twice, which changes no ratio of these sums."""
        tokens, entropy = probs.new_full((), len(probs)), -torch.xlogy(probs, probs).sum()
        token_sums = torch.stack((tokens, entropy, logits.logsumexp(-1).square().sum()))
        sums = torch.cat((counts, computed.view(1))), torch.cat((probs.sum(0), token_sums))
        self.seen = sums if self.seen is None else (self.seen[0] + sums[0], self.seen[1] + sums[1])


class Qwen3Block(nn.Module):
    def __init__(self, config: Qwen3Config, mc: TransformerConfig, router: RouterOptions):
        super().__init__()
        eps, dtype = config.rms_norm_eps, mc.params_dtype
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps, dtype)
        self.self_attn = Qwen3Attention(config, mc)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps, dtype)
        self.mlp = Qwen3SparseMLP(config, mc, router) if config.num_experts else Qwen3MLP(config, mc)
        parallel.mark_replicated([self.input_layernorm.weight, self.post_attention_layernorm.weight], mc)

    def forward(self, x, cos, sin, bounds, cache=None):
        """x [T(/tp), 1, D], cos and sin [T, 1, 1, E] -> (x, the router's logits [T, G] or an empty tensor)."""
        y = self.self_attn(recomputed(self.input_layernorm, x), (cos, sin), bounds, cache)
        norm = self.post_attention_layernorm
        y, x = recomputed(ops.add_rms_norm, y, x, norm.weight, norm.eps)
        y, logits = self.mlp(y) if isinstance(self.mlp, Qwen3SparseMLP) else (self.mlp(y), x.new_empty(0))
        return x + y, logits


class Qwen3(MegatronModule):
    """One model chunk of a pipeline stage. `layers` are the global indices of its blocks.

    A `first` chunk embeds the tokens. A `last` chunk applies the final norm and computes the loss.
    """

    model_type = ModelType.encoder_or_decoder  # read by megatron-core's schedules

    def __init__(
        self,
        config: Qwen3Config,
        mc: TransformerConfig,
        layers: range,
        first: bool,
        last: bool,
        recompute: str,
        offload: bool,
        router: RouterOptions,
    ):
        super().__init__(mc)
        self.qwen, self.first, self.last, self.recompute, self.offload = config, first, last, recompute, offload
        D, dtype, vocabulary = config.hidden_size, mc.params_dtype, config.vocab_size // mc.tensor_model_parallel_size
        tied = config.is_tied
        if first or (last and tied):
            self.embed_tokens = nn.Embedding(vocabulary, D, dtype=dtype)
            parallel.set_tensor_model_parallel_attributes(self.embed_tokens.weight, True, 0, 1)
        if tied and first != last:
            parallel.mark_tied(self.embed_tokens.weight, copy=last)
        self.layers = nn.ModuleDict({str(i): Qwen3Block(config, mc, router) for i in layers})
        if last:
            self.norm = Qwen3RMSNorm(D, config.rms_norm_eps, dtype)
            parallel.mark_replicated([self.norm.weight], mc)
        if last and config.num_labels:
            self.score = nn.Linear(D, config.num_labels, bias=False, dtype=dtype)
            parallel.mark_replicated([self.score.weight], mc)
        elif last and not tied:
            self.lm_head = nn.Linear(D, vocabulary, bias=False, dtype=dtype)
            parallel.set_tensor_model_parallel_attributes(self.lm_head.weight, True, 0, 1)
        self._input: torch.Tensor | None = None

    @property
    def hidden_size(self) -> int:
        return self.qwen.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.qwen.vocab_size

    @property
    def output_weight(self) -> torch.Tensor:
        """Weight [V/tp, D] of the vocabulary projection: the embedding's own if they are tied."""
        return self.embed_tokens.weight if self.qwen.is_tied else self.lm_head.weight

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """Called by megatron-core, which sums this parameter's gradient over the first and the last pipeline stage."""
        return self.embed_tokens.weight if self.qwen.is_tied else None

    def set_input_tensor(self, tensor) -> None:
        """Called by the pipeline schedule with what the previous stage sent, or None."""
        self._input = tensor[0] if isinstance(tensor, list) else tensor

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, cu_seqlens: list[int], rows: int = 1,
        labels: torch.Tensor | None = None, weight: torch.Tensor | None = None, cache=None,
        reward_tokens: torch.Tensor | None = None,
    ):  # fmt: skip
        """Takes the whole micro-batch: tokens and positions int64 [T*cp], cu_seqlens (the sequences' bounds), the
        number of rows of equal length, and labels int64 (negative: no loss) with their weight fp32, both [T*cp]. The
        loss is computed in here, together with the vocabulary projection, because FSDP gathers that weight only in
        here.

        Returns on the last pipeline stage a pair. First: of a reward model, the scores fp32 [T]; with reward_tokens
        (the ids of right and wrong int64 [2]), the first one's logit less the second's fp32 [T]; with labels and
        weight, the sum over this rank's tokens of weight * cross entropy; with labels only, their log-probabilities fp32
        [T]; without labels, the states after the last norm [T(/tp), 1, D]. Second: router logits of this chunk's layers
        [layers, T, G], or None. Other stages return hidden states in the shape that the schedule sends,
        [T(/tp)/rows, rows, D].
        """
        D, tied = self.qwen.hidden_size, self.qwen.is_tied
        tokens, positions = (parallel.context_tokens(t, causal=True) for t in (tokens, positions))  # [T]
        if self.first:
            x = parallel.vocab_parallel_embedding(tokens, self.embed_tokens.weight, self.config, tied).unsqueeze(1)
        else:
            x = self._input.reshape(-1, 1, D)
        cos, sin = rotary_table(positions, self.qwen)
        bounds = ops.pack_bounds(cu_seqlens, x.device) if cache is None else None
        routing = []
        for block in self.layers.values():
            x, logits = parallel.with_recomputation(block, self.recompute, self.offload)(x, cos, sin, bounds, cache)
            routing.append(logits)
        if not self.last:
            return x.view(-1, rows, D)
        x, routing = self.norm(x), torch.stack(routing) if self.qwen.num_experts else None
        if self.qwen.num_labels:
            scores = F.linear(x.float(), self.score.weight.float()).flatten()  # [T(/tp)]
            if self.config.sequence_parallel:  # the loss on every rank then reads all scores; each has one gradient
                scores = parallel.gather_from_sequence_parallel_region(scores, tensor_parallel_output_grad=False)
            return scores, routing
        if reward_tokens is not None:
            x = parallel.enter_tensor_parallel(x, self.config).flatten(0, 1)  # [T, D]
            logits = parallel.vocab_parallel_logits(x, reward_tokens, self.output_weight, self.config, tied)  # [T, 2]
            return logits[:, 0] - logits[:, 1], routing
        if labels is None:
            return x, routing
        labels = parallel.context_tokens(labels, causal=True)  # [T]
        x = parallel.enter_tensor_parallel(x, self.config).flatten(0, 1)  # [T, D]
        tp = self.config.tensor_model_parallel_size
        if weight is None:
            return ops.linear_log_probs(x, self.output_weight, labels, tp), routing
        weight = parallel.context_tokens(weight, causal=True)
        return ops.linear_cross_entropy(x, self.output_weight, labels, weight, tp, tied)[0], routing


def rotary_table(positions: torch.Tensor, config: Qwen3Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and sin [T, 1, 1, E] fp32 of every token's angles; the two halves of E are equal.

    If config.rope_factor is not 1, YaRN divides the frequencies of pairs that turn less than once in the original
    length by the factor, keeps those of pairs that turn more than 32 times, and interpolates in between. It also scales
    cos and sin up a little.
    """
    E, factor = config.head_dim, config.rope_factor
    pairs = torch.arange(0, E, 2, dtype=torch.int64, device=positions.device)
    periods = config.rope_theta ** (pairs.float() / E)  # [E/2], tokens per radian
    frequencies = 1.0 / periods
    if factor != 1:  # in transformers' order of operations: far positions multiply a rounding difference
        turns = config.original_max_position_embeddings / (2 * math.pi)
        low, high = (E * math.log(turns / n) / (2 * math.log(config.rope_theta)) for n in (32, 1))
        low, high = max(math.floor(low), 0), min(math.ceil(high), E - 1)
        unscaled = 1 - ((pairs / 2 - low) / (high - low or 0.001)).clamp(0, 1)  # [E/2]
        frequencies = 1.0 / (factor * periods) * (1 - unscaled) + frequencies * unscaled
    angles = positions.float()[:, None] * frequencies  # [T, E/2]
    angles = torch.cat((angles, angles), -1)[:, None, None]
    scale = 0.1 * math.log(factor) + 1
    return angles.cos() * scale, angles.sin() * scale


def load_balancing_loss(routing: torch.Tensor, k: int) -> torch.Tensor:
    """Computes G * sum over experts of (share of the tokens' k choices) * (mean probability), over all layers and
    tokens together: the auxiliary loss of Switch Transformers (arXiv:2101.03961, equations 4 to 6) as transformers'
    `load_balancing_loss_func` has it. routing: router logits [layers, T, G] of this rank's tokens. The loss of the
    whole row is the mean of the results over tensor and context parallel ranks."""
    probs = routing.flatten(0, 1).softmax(-1)  # [layers*T, G]
    chosen = torch.zeros_like(probs).scatter_(1, probs.topk(k).indices, 1.0)
    return probs.shape[1] * (_over_ranks(chosen.mean(0)) * probs.mean(0)).sum()


def _over_ranks(share: torch.Tensor) -> torch.Tensor:
    """Averages over the ranks that hold one row's tokens, without gradient."""
    group = parallel.mpu.get_tensor_and_context_parallel_group()
    if group.size() > 1:
        dist.all_reduce(share, group=group)
    return share / group.size()


def router_metrics(chunks: list[nn.Module], config: Qwen3Config) -> dict:
    """Returns what the routers did since the last call, over all ranks, for metrics.jsonl: each expert's load (its
    share of the choices times G; 1: balanced), as the mean over layers and as the largest of any layer; means over
    layers of entropy in nats, load-balancing loss (k: balanced) and z-loss; choices that no expert computed. Waits for
    the device once."""
    G = config.num_experts
    counts = torch.zeros(config.num_hidden_layers, G + 1, dtype=torch.int64, device=device.current())
    sums = torch.zeros(config.num_hidden_layers, G + 3, device=device.current())
    for layers in (parallel.unwrapped(chunk).layers for chunk in chunks):
        for i, block in layers.items():
            counts[int(i)], sums[int(i)] = block.mlp.seen
            block.mlp.seen = None
    for each in (counts, sums):
        dist.all_reduce(each)
    (chosen, computed), (probs, token_sums) = counts.split([G, 1], 1), sums.split([G, 3], 1)
    tokens, entropy, z = token_sums.unbind(1)  # [layers] each
    load = G * chosen / chosen.sum(1, keepdim=True)  # [layers, G]
    balance = G * (chosen * probs).sum(1) / tokens.square()
    means = torch.stack((entropy / tokens, balance, z / tokens)).mean(1)  # [3]
    dropped = (chosen.sum() - computed.sum()).float().view(1)  # exact in fp32: it is small
    *each, largest, dropped, entropy, balance, z = torch.cat(
        (load.mean(0), load.max().view(1), dropped, means)
    ).tolist()
    return {
        "router_load": each, "router_load_max": largest, "router_entropy": entropy, "router_balance_loss": balance,
        "router_z_loss": z, "router_dropped": int(dropped),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- this rank's part


def build(o, config: Qwen3Config, where: torch.device | None = None) -> list[Qwen3]:
    """Builds this rank's model chunks, unwrapped, with uninitialised parameters on this rank's device or on `where`."""
    mc = parallel.megatron_config(
        o,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
        experts=config.num_experts,
    )
    per_layer = 1 / config.num_hidden_layers
    balance = per_layer * o.aux if o.aux_over == "layer" else 0.0
    router = RouterOptions(o.dispatch, balance, per_layer * o.z_loss)
    chunks = []
    with where or device.current():
        for i in range(o.vpp):
            stage = None if o.vpp == 1 else i
            first = parallel.mpu.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage)
            last = parallel.mpu.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage)
            layers = parallel.stage_layers(o, config.num_hidden_layers, i)
            offload = o.offload_activations
            chunks.append(Qwen3(config, mc, layers, first, last, o.recompute, offload, router))
            chunks[-1].vp_stage = stage
    return chunks


def draw(config: Qwen3Config, name: str, whole: torch.Tensor, generator: torch.Generator) -> None:
    """Fills a whole parameter with initial values: 1 for norms, N(0, initializer_range / sqrt(2 layers)) for the
    outputs of attention and MLP (o_proj, down), N(0, initializer_range) for the rest. This is the rule of GPT-2 and of
    Megatron-LM (`scaled_init_method_normal`)."""
    if name.endswith("norm.weight"):
        whole.fill_(1.0)
        return
    residual = name.endswith(("o_proj.weight", "down_proj.weight", "mlp.down"))
    scale = (2 * config.num_hidden_layers) ** -0.5 if residual else 1.0
    whole.normal_(std=config.initializer_range * scale, generator=generator)
