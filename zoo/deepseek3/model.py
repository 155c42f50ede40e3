"""DeepSeek-V3: latent attention, experts balanced by a bias, multi-token prediction, on megatron-core.

Paper: DeepSeek-V3 Technical Report, arXiv:2412.19437, sections 2.1 (attention, experts) and 2.2 (multi-token prediction).
Reference implementations: transformers 5.23 `models/deepseek_v3/modeling_deepseek_v3.py` (Apache-2.0) and the authors'
`inference/model.py`. Parameter names are those of the released checkpoints; the exceptions are the experts, which are
stacked here (convert.py).

What is unusual:
- Attention (MLA): keys and values are computed from a latent of kv_lora_rank numbers per token, queries from one of
  q_lora_rank. The rotary embedding is on qk_rope_head_dim separate entries of every query and on one key that all heads
  share; it pairs entries 2i and 2i + 1. Queries and keys are wider than values.
- Generation keeps the latent and the shared key of a token, and no keys and values. The projection from the latent to
  the keys is applied to the queries instead, and that to the values to attention's output ("absorbed").
- YaRN (arXiv:2309.00071) extends the rotary embedding; it scales the softmax, not cos and sin.
- Experts: the first layers are dense. A router scores every expert by a sigmoid in fp32. A bias is added to choose the
  experts, not to weigh them: first the groups with the best sums of their two best experts, then the best experts in
  these groups. The weights are normalised and scaled. One shared expert sees every token. The bias rises for experts with
  little load and falls for the others after each step (`balance_experts`); it has no gradient.
- Multi-token prediction (MTP): one more layer, named after the last, reads the final state of a token and the embedding of
  the next one, and predicts the one after that. It shares the embedding and the vocabulary projection.

A micro-batch is one row of tokens. Its sequences stand end to end, and attention does not cross their bounds.

Parallelism (tokens are the first dimension of every activation):
- Tensor parallelism splits heads, FFN columns (also of every expert) and the vocabulary. Every rank holds the projections
  to the latents whole. Under sequence parallelism, activations between these regions hold T/tp tokens, and only latents
  are gathered for attention.
- Context parallelism splits the tokens for the whole network, in zig-zag order. Only attention communicates.
- Expert parallelism spreads the experts over ranks that hold different tokens. Tokens are sent to the experts and back.
- A pipeline stage sends only hidden states to the next one. The last stage holds the MTP module and a copy of the
  embedding, whose gradient it sums with the first stage's.

Shape legend: T tokens of this rank, D hidden, H heads of this rank, E width of queries and keys (N without and P with the
rotary embedding), V width of values, Q and R widths of the latents of queries and of keys and values, F FFN columns of
this rank, G experts.
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

from .config import Deepseek3Config

LATENT_EPS = 1e-6  # of the latents' norms, whatever the config says of the others
ABSORBS = True  # whether generation keeps latents; keys and values otherwise, to compare


class Deepseek3RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Deepseek3Attention(nn.Module):
    def __init__(self, config: Deepseek3Config, mc: TransformerConfig):
        super().__init__()
        self.config, self.mc = config, mc
        D, Q, R, dtype = config.hidden_size, config.q_lora_rank, config.kv_lora_rank, mc.params_dtype
        heads, keys_and_values = config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim
        if Q:
            self.q_a_proj = nn.Linear(D, Q, bias=False, dtype=dtype)
            self.q_a_layernorm = Deepseek3RMSNorm(Q, LATENT_EPS, dtype)
            self.q_b_proj = parallel.ColumnLinear(Q, heads * config.head_dim, mc, bias=False)
            parallel.mark_replicated([self.q_a_proj.weight, self.q_a_layernorm.weight], mc)
        else:
            self.q_proj = parallel.ColumnLinear(D, heads * config.head_dim, mc, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, R + config.qk_rope_head_dim, bias=False, dtype=dtype)
        self.kv_a_layernorm = Deepseek3RMSNorm(R, LATENT_EPS, dtype)
        self.kv_b_proj = parallel.ColumnLinear(R, heads * keys_and_values, mc, bias=False)
        self.o_proj = parallel.RowLinear(heads * config.v_head_dim, D, mc, bias=False)
        parallel.mark_replicated([self.kv_a_proj_with_mqa.weight, self.kv_a_layernorm.weight], mc)

    def forward(self, x: torch.Tensor, rope: torch.Tensor, bounds: ops.Bounds | None, cache=None) -> torch.Tensor:
        """x [T(/tp), 1, D], rope [T, 1, 1, P/2, 2] -> [T(/tp), 1, D]. cache: a cache of `decode`, only for
        generation."""
        c = self.config
        N, P, R = c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
        latent, shared_key = self.kv_a_proj_with_mqa(x).split((R, P), -1)
        latents = (recomputed(self.kv_a_layernorm, latent), shared_key)
        if c.q_lora_rank:
            latents = (*latents, recomputed(self.q_a_layernorm, self.q_a_proj(x)))
            entered = parallel.enter_tensor_parallel(torch.cat(latents, -1), self.mc)
            latent, shared_key, query_latent = entered.split((R, P, c.q_lora_rank), -1)  # [T, 1, R], [.., P], [.., Q]
            q = self.q_b_proj(query_latent)
        else:
            latent, shared_key = parallel.enter_tensor_parallel(torch.cat(latents, -1), self.mc).split((R, P), -1)
            q = self.q_proj(parallel.enter_tensor_parallel(x, self.mc))
        q, q_rotary = q.unflatten(2, (-1, N + P)).split((N, P), -1)  # [T, 1, H, N], [T, 1, H, P]
        q_rotary = recomputed(ops.rotary_interleaved, q_rotary, rope)
        shared_key = recomputed(ops.rotary_interleaved, shared_key.unsqueeze(2), rope)  # [T, 1, 1, P]
        if cache is not None and ABSORBS:
            return self.o_proj(self.attend_absorbed(q, q_rotary, latent, shared_key, cache).flatten(2))
        k, v = self.kv_b_proj(latent).unflatten(2, (-1, N + c.v_head_dim)).split((N, c.v_head_dim), -1)
        q = torch.cat((q, q_rotary), -1)  # [T, 1, H, E]
        k = torch.cat((k, shared_key.expand(-1, -1, k.shape[2], -1)), -1)
        if cache is not None:
            out = cache.attend(self, q, k, v, c.softmax_scale)
        else:
            out = parallel.context_parallel_attention(q, k, v, causal=True, bounds=bounds, scale=c.softmax_scale)
        return self.o_proj(out.flatten(2))  # from [T, 1, H, V]

    def attend_absorbed(self, q, q_rotary, latent, shared_key, cache) -> torch.Tensor:
        """Attends to cached latents, which are the keys and the values of one head that all queries share: q [T, 1, H,
        N], q_rotary [T, 1, H, P], latent [T, 1, R], shared_key [T, 1, 1, P] -> [T, 1, H, V]."""
        c = self.config
        weight = lora.effective_weight(self.kv_b_proj).unflatten(0, (q.shape[2], -1))  # [H, N + V, R]
        to_keys, to_values = weight.split((c.qk_nope_head_dim, c.v_head_dim), 1)
        q = torch.einsum("tbhn,hnr->tbhr", q, to_keys)
        queries = torch.cat((q, q_rotary), -1)  # [T, 1, H, R + P]
        keys = torch.cat((latent.unsqueeze(2), shared_key), -1)  # [T, 1, 1, R + P]
        out = cache.attend(self, queries, keys, c.kv_lora_rank, c.softmax_scale)  # [T, 1, H, R]
        return torch.einsum("tbhr,hvr->tbhv", out, to_values)


class Deepseek3MLP(nn.Module):
    def __init__(self, D: int, width: int, mc: TransformerConfig):
        super().__init__()
        self.mc = mc
        self.gate_proj = parallel.ColumnLinear(D, width, mc, bias=False)
        self.up_proj = parallel.ColumnLinear(D, width, mc, bias=False)
        self.down_proj = parallel.RowLinear(width, D, mc, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T(/tp), 1, D] -> [T(/tp), 1, D]."""
        x, gate = parallel.enter_with(self.gate_proj, x, self.mc)  # [T, 1, D], [T, 1, F]
        return self.down_proj(recomputed(ops.swiglu, gate, self.up_proj(x)))


# What the balance loss needs to know of a micro-batch's rows, each of which is one sequence of that loss: the index of
# the row of each token int64 [T], how many rows there are, and how many tokens each has.
Sequences = tuple[torch.Tensor, int, int]


@dataclass(frozen=True)
class RouterOptions:
    """How tokens reach their experts under expert parallelism, and the weight of the sequence-wise balance loss of every
    layer (arXiv:2412.19437, equations 17 to 20). A layer may lie on a pipeline stage that does not compute the loss, so
    megatron-core's `MoEAuxLossAutoScaler` adds the gradient of this one during the layer's backward."""

    dispatch: str  # alltoall or allgather
    balance: float

    def add_loss(self, weights, scores, experts, sequences: Sequences, copies: int) -> torch.Tensor:
        """Returns weights [T, k] with the gradient of the balance loss attached: the mean over sequences of balance *
        sum over experts of (share of the sequence's choices times G) * (mean over its tokens of the normalised score).

        scores [T, G], experts [T, k]. copies: how many tensor-parallel ranks hold the same tokens."""
        sequence, number, length = sequences
        chosen = torch.zeros_like(scores).scatter_(1, experts, 1.0)
        normalised = scores / scores.sum(-1, keepdim=True)
        choices, probabilities = (
            scores.new_zeros(number, scores.shape[1]).index_add(0, sequence, t) for t in (chosen, normalised)
        )
        group = (
            parallel.mpu.get_tensor_and_context_parallel_group()
        )  # the ranks that hold the tokens of these sequences
        if group.size() > 1:
            dist.all_reduce(choices, group=group)
        shares = choices * scores.shape[1] / (experts.shape[1] * length * copies)  # [sequences, G]
        # Each rank adds the part of the loss that its own tokens have in the means.
        return MoEAuxLossAutoScaler.apply(
            weights, self.balance / (number * length * copies) * (shares * probabilities).sum()
        )


def choose_experts(scores: torch.Tensor, bias: torch.Tensor, config: Deepseek3Config) -> torch.Tensor:
    """Returns the experts int64 [T, k] of every token, for scores [T, G] and bias [G] in fp32: the k with the largest
    biased score in the topk_group groups whose two best biased scores have the largest sums."""
    biased = (scores.detach() + bias).unflatten(1, (config.n_group, -1))  # [T, groups, G/groups]
    kept = biased.topk(2, -1).values.sum(-1).topk(config.topk_group, -1).indices  # [T, topk_group]
    left_out = torch.ones_like(biased[..., 0], dtype=torch.bool).scatter_(1, kept, False)
    biased = biased.masked_fill(left_out.unsqueeze(-1), -torch.inf).flatten(1)
    return biased.topk(config.num_experts_per_tok, -1).indices


class Deepseek3SparseMLP(nn.Module):
    """Mixture of experts. `gate` is the router. `gate_up` [G, D, 2, F] and `down` [G, F, D] are the released per-expert
    matrices, transposed and stacked. This rank holds G/ep experts, with F/etp of their columns.

    With etp = tp, every tensor-parallel rank routes all tokens of its group and computes its columns. With etp = 1
    (under sequence parallelism), each rank routes its own T/tp tokens to whole experts.
    """

    def __init__(self, config: Deepseek3Config, mc: TransformerConfig, router: RouterOptions):
        super().__init__()
        self.config, self.mc, self.router = config, mc, router
        G, D, dtype = config.n_routed_experts, config.hidden_size, mc.params_dtype
        held, width = G // mc.expert_model_parallel_size, config.moe_intermediate_size // mc.expert_tensor_parallel_size
        self.gate = nn.Linear(D, G, bias=False, dtype=dtype)
        self.gate.register_buffer("e_score_correction_bias", torch.empty(G, dtype=torch.float32))
        self.gate_up = nn.Parameter(torch.empty(held, D, 2, width, dtype=dtype))
        self.down = nn.Parameter(torch.empty(held, width, D, dtype=dtype))
        self.shared_experts = Deepseek3MLP(D, config.n_shared_experts * config.moe_intermediate_size, mc)
        parallel.mark_expert(self.gate_up, 3, mc)
        parallel.mark_expert(self.down, 1, mc)
        self.split_experts = mc.expert_tensor_parallel_size == mc.tensor_model_parallel_size
        if not self.split_experts:
            parallel.mark_replicated([self.gate.weight], mc)
        self.seen: torch.Tensor | None = None  # sums since the last `balance_experts`

    def forward(self, x: torch.Tensor, sequences: Sequences | None) -> torch.Tensor:
        """[T(/tp), 1, D] -> [T(/tp), 1, D]. sequences: None where there is no balance loss."""
        shared, gate = self.shared_experts(x), self.gate.weight
        if self.split_experts:
            x, gate = parallel.enter_tensor_parallel(x, self.mc), parallel.shared_by_tp(gate, self.mc)
        tokens = x.flatten(0, 1)  # [T, D]
        scores = F.linear(tokens.float(), gate.float()).sigmoid()  # [T, G]
        experts = choose_experts(scores, self.gate.e_score_correction_bias, self.config)  # [T, k]
        weights = scores.gather(1, experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.config.routed_scaling_factor
        counts = torch.zeros(self.config.n_routed_experts, dtype=torch.int64, device=x.device)
        counts.index_add_(0, experts.flatten(), torch.ones_like(experts.flatten()))  # [G]
        if sequences is not None and self.training and torch.is_grad_enabled():
            copies = self.mc.tensor_model_parallel_size if self.split_experts else 1
            weights = self.router.add_loss(weights, scores, experts, sequences, copies)
        if self.mc.expert_model_parallel_size > 1 and self.router.dispatch == "allgather":
            out, computed = self.compute_by_allgather(tokens, experts, weights)
        else:
            rows, position = recomputed(ops.token_permute, tokens, experts)  # [T*k, D], sorted by expert
            if self.mc.expert_model_parallel_size > 1:
                rows, computed = self.compute_by_alltoall(rows, counts)
            else:
                rows, computed = self.compute(rows, counts), counts.sum()
            out = ops.token_unpermute(rows, position, weights.to(x.dtype))
        if self.training:  # recomputation adds a forward twice, which changes no ratio of these sums
            sums = torch.cat(
                (counts, computed.view(1))
            )  # how often each expert was chosen, how many were computed here
            self.seen = sums if self.seen is None else self.seen + sums
        out = out.view_as(x)
        return shared + (parallel.leave_tensor_parallel(out, self.mc) if self.split_experts else out)

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


class Deepseek3Block(nn.Module):
    def __init__(self, config: Deepseek3Config, mc: TransformerConfig, router: RouterOptions, layer: int):
        super().__init__()
        D, eps, dtype = config.hidden_size, config.rms_norm_eps, mc.params_dtype
        self.input_layernorm = Deepseek3RMSNorm(D, eps, dtype)
        self.self_attn = Deepseek3Attention(config, mc)
        self.post_attention_layernorm = Deepseek3RMSNorm(D, eps, dtype)
        is_sparse = layer in config.expert_layers
        self.mlp = (
            Deepseek3SparseMLP(config, mc, router) if is_sparse else Deepseek3MLP(D, config.intermediate_size, mc)
        )
        parallel.mark_replicated([self.input_layernorm.weight, self.post_attention_layernorm.weight], mc)

    def forward(self, x, rope, bounds, sequences, cache=None):
        """x [T(/tp), 1, D], rope [T, 1, 1, P/2, 2] -> [T(/tp), 1, D]. sequences: see `Sequences`."""
        y = self.self_attn(recomputed(self.input_layernorm, x), rope, bounds, cache)
        norm = self.post_attention_layernorm
        y, x = recomputed(ops.add_rms_norm, y, x, norm.weight, norm.eps)
        return x + (self.mlp(y, sequences) if isinstance(self.mlp, Deepseek3SparseMLP) else self.mlp(y))


class Deepseek3MTP(Deepseek3Block):
    """The multi-token prediction module: a block, with an entrance for two inputs and a last norm of its own."""

    def __init__(self, config: Deepseek3Config, mc: TransformerConfig, router: RouterOptions, layer: int):
        super().__init__(config, mc, router, layer)
        D, eps, dtype = config.hidden_size, config.rms_norm_eps, mc.params_dtype
        self.enorm, self.hnorm = Deepseek3RMSNorm(D, eps, dtype), Deepseek3RMSNorm(D, eps, dtype)
        self.eh_proj = nn.Linear(2 * D, D, bias=False, dtype=dtype)
        self.shared_head = nn.ModuleDict({"norm": Deepseek3RMSNorm(D, eps, dtype)})
        replicated = (self.enorm, self.hnorm, self.eh_proj, self.shared_head["norm"])
        parallel.mark_replicated([module.weight for module in replicated], mc)

    def forward(self, x, following, rope, bounds, sequences, cache=None):
        """x [T(/tp), 1, D]: the model's final states. following [T(/tp), 1, D]: embeddings of the next tokens. Returns the
        states [T(/tp), 1, D] that predict the tokens after these."""
        x = self.eh_proj(torch.cat((self.enorm(following), self.hnorm(x)), -1))
        return self.shared_head["norm"](super().forward(x, rope, bounds, sequences, cache))


class Deepseek3(MegatronModule):
    """One model chunk of a pipeline stage. `layers` are the global indices of its blocks.

    A `first` chunk embeds the tokens. A `last` chunk applies the final norm and computes the loss, also that of the MTP
    module, which it holds as its last layer.
    """

    model_type = ModelType.encoder_or_decoder  # read by megatron-core's schedules

    def __init__(
        self,
        config: Deepseek3Config,
        mc: TransformerConfig,
        layers: range,
        first: bool,
        last: bool,
        recompute: str,
        offload: bool,
        router: RouterOptions,
    ):
        super().__init__(mc)
        self.deepseek, self.first, self.last, self.recompute, self.offload = config, first, last, recompute, offload
        self.balance = router.balance
        D, dtype, vocabulary = config.hidden_size, mc.params_dtype, config.vocab_size // mc.tensor_model_parallel_size
        self.predicts = last and config.num_nextn_predict_layers > 0
        if first or self.predicts:
            self.embed_tokens = nn.Embedding(vocabulary, D, dtype=dtype)
            parallel.set_tensor_model_parallel_attributes(self.embed_tokens.weight, True, 0, 1)
        if config.num_nextn_predict_layers and first != last:
            parallel.mark_tied(self.embed_tokens.weight, copy=last)
        self.layers = nn.ModuleDict({str(i): Deepseek3Block(config, mc, router, i) for i in layers})
        if self.predicts:
            i = config.num_hidden_layers
            self.layers[str(i)] = Deepseek3MTP(config, mc, router, i)
        if last:
            self.norm = Deepseek3RMSNorm(D, config.rms_norm_eps, dtype)
            parallel.mark_replicated([self.norm.weight], mc)
            self.lm_head = nn.Linear(D, vocabulary, bias=False, dtype=dtype)
            parallel.set_tensor_model_parallel_attributes(self.lm_head.weight, True, 0, 1)
        self.mtp_loss: torch.Tensor | None = None  # sum since the last `balance_experts`
        self._input: torch.Tensor | None = None

    @property
    def hidden_size(self) -> int:
        return self.deepseek.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.deepseek.vocab_size

    @property
    def output_weight(self) -> torch.Tensor:
        """Weight [V/tp, D] of the vocabulary projection."""
        return self.lm_head.weight

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """Called by megatron-core, which sums this parameter's gradient over the first and the last pipeline stage."""
        return self.embed_tokens.weight if self.deepseek.num_nextn_predict_layers else None

    def set_input_tensor(self, tensor) -> None:
        """Called by the pipeline schedule with what the previous stage sent, or None."""
        self._input = tensor[0] if isinstance(tensor, list) else tensor

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, cu_seqlens: list[int], rows: int = 1,
        labels: torch.Tensor | None = None, weight: torch.Tensor | None = None, following=None, cache=None,
    ):  # fmt: skip
        """Takes the whole micro-batch: tokens and positions int64 [T*cp], cu_seqlens (the sequences' bounds), the
        number of rows of equal length, and labels int64 (negative: no loss) with their weight fp32, both [T*cp].
        following: None, or what the MTP module needs: the tokens after those, and the labels and weights of what it
        predicts. The loss is computed in here, together with the vocabulary projection, because FSDP gathers that weight
        only in here.

        Returns on the last pipeline stage a pair. First: with labels and weight, the sum over this rank's tokens of
        weight * cross entropy, the MTP module's included; with labels only, their log-probabilities fp32 [T]; without
        labels, the states after the last norm [T(/tp), 1, D]. Second: the part of that sum that is not the MTP module's,
        without gradient, or None. Other stages return hidden states in the shape that the schedule sends,
        [T(/tp)/rows, rows, D].
        """
        mc = self.config
        sequences = self.locate_sequences(len(tokens), rows) if self.balance else None
        tokens, positions = (parallel.context_tokens(t, causal=True) for t in (tokens, positions))  # [T]
        x = self.embed(tokens) if self.first else self._input.reshape(-1, 1, self.hidden_size)
        rope = rotary_table(positions, self.deepseek)
        bounds = ops.pack_bounds(cu_seqlens, x.device) if cache is None else None
        blocks = [parallel.with_recomputation(block, self.recompute, self.offload) for block in self.layers.values()]
        for block in blocks[:-1] if self.predicts else blocks:
            x = block(x, rope, bounds, sequences, cache)
        if not self.last:
            return x.view(-1, rows, self.hidden_size)
        x = self.norm(x)
        if labels is None:
            return x, None
        labels = parallel.context_tokens(labels, causal=True)  # [T]
        hidden = parallel.enter_tensor_parallel(x, mc).flatten(0, 1)  # [T, D]
        tp, T = mc.tensor_model_parallel_size, len(labels)
        if weight is None:
            return ops.linear_log_probs(hidden, self.output_weight, labels, tp), None
        weight = parallel.context_tokens(weight, causal=True)
        if self.predicts and following is not None:  # the rows of both losses pass the vocabulary projection together
            next_tokens, *others = (parallel.context_tokens(t, causal=True) for t in following)
            x = blocks[-1](x, self.embed(next_tokens), rope, bounds, sequences)
            hidden = torch.cat((hidden, parallel.enter_tensor_parallel(x, mc).flatten(0, 1)))  # [2T, D]
            labels, weight = (torch.cat(both) for both in zip((labels, weight), others, strict=True))
        total, losses = ops.linear_cross_entropy(hidden, self.output_weight, labels, weight, tp)
        return total, (losses[:T] * weight[:T]).sum()

    def locate_sequences(self, tokens: int, rows: int) -> Sequences:
        """Returns where the tokens that this rank routes lie, of a micro-batch of that many tokens and rows."""
        mc, length = self.config, tokens // rows
        sequence = torch.arange(tokens, device=device.current()) // length
        routes_own = mc.expert_tensor_parallel_size != mc.tensor_model_parallel_size
        sequence = parallel.local_tokens(sequence, mc, True) if routes_own else parallel.context_tokens(sequence, True)
        return sequence, rows, length

    def predict_ahead(self, states, following, positions, cache) -> torch.Tensor:
        """Lets the MTP module read n tokens of one sequence, for generation: the model's final states [n, 1, D], the tokens
        after them and their own positions, int64 [n] both. Returns states [n, 1, D], of which the last predicts the token
        after the last of `following`."""
        module = self.layers[str(self.deepseek.num_hidden_layers)]
        rope = rotary_table(positions, self.deepseek)
        return module(states, self.embed(following), rope, None, None, cache)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T] -> [T(/tp), 1, D]."""
        weight = self.embed_tokens.weight
        return parallel.vocab_parallel_embedding(tokens, weight, self.config, tied=False).unsqueeze(1)


def rotary_table(positions: torch.Tensor, config: Deepseek3Config) -> torch.Tensor:
    """Returns (cos, sin) [T, 1, 1, P/2, 2] fp32 of the angle of every token and pair.

    If config.rope_factor is not 1, YaRN divides the frequencies of pairs that turn less than once in the original
    length by the factor, keeps those of pairs that turn more than 32 times, and interpolates in between.
    """
    P, factor = config.qk_rope_head_dim, config.rope_factor
    pairs = torch.arange(0, P, 2, dtype=torch.int64, device=positions.device)
    periods = config.rope_theta ** (pairs.float() / P)  # [P/2], tokens per radian
    frequencies = 1.0 / periods
    if factor != 1:  # in transformers' order of operations: far positions multiply a rounding difference
        turns = config.original_max_position_embeddings / (2 * math.pi)
        low, high = (P * math.log(turns / n) / (2 * math.log(config.rope_theta)) for n in (32, 1))
        low, high = max(math.floor(low), 0), min(math.ceil(high), P - 1)
        unscaled = 1 - ((pairs / 2 - low) / (high - low or 0.001)).clamp(0, 1)  # [P/2]
        frequencies = 1.0 / (factor * periods) * (1 - unscaled) + frequencies * unscaled
    angles = positions.float()[:, None] * frequencies  # [T, P/2]
    return torch.stack((angles.cos(), angles.sin()), -1)[:, None, None]


@torch.no_grad()
def balance_experts(chunks: list[nn.Module], o, config: Deepseek3Config) -> dict:
    """Moves the routers' biases after a step, over all ranks: up by o.bias_speed for experts with less than the mean
    load, down for those with more (arXiv:2412.19437, section 2.1.2). Returns what the routers did since the last call, for
    metrics.jsonl: each expert's load (its share of the choices times G; 1: balanced), as the mean over layers and as the
    largest of any layer; choices that no expert computed; the MTP module's mean loss. Waits for the
    device once."""
    G, layers, where = config.n_routed_experts, config.expert_layers, device.current()
    counts, biases = torch.zeros(len(layers), G + 1, dtype=torch.int64, device=where), {}
    mtp_loss = torch.zeros(1, device=where)
    for chunk in map(parallel.unwrapped, chunks):
        for i, block in chunk.layers.items():
            if int(i) in layers:
                place = int(i) - layers.start
                counts[place], block.mlp.seen = block.mlp.seen, None
                biases[place] = block.mlp.gate.e_score_correction_bias
        if chunk.mtp_loss is not None:
            mtp_loss, chunk.mtp_loss = mtp_loss + chunk.mtp_loss, None
    for each in (counts, mtp_loss):
        dist.all_reduce(each)
    mtp_loss /= o.mtp_weight * o.micro_batches * o.dp * o.tp if o.mtp else 1  # all tp ranks have the same value
    chosen, computed = counts.split([G, 1], 1)
    for place, bias in biases.items():
        bias += o.bias_speed * (chosen[place].sum() - G * chosen[place]).sign()
    load = G * chosen / chosen.sum(1, keepdim=True)  # [layers, G]
    dropped = (chosen.sum() - computed.sum()).float().view(1)  # exact in fp32: it is small
    *each, largest, dropped, mtp_loss = torch.cat((load.mean(0), load.max().view(1), dropped, mtp_loss)).tolist()
    measured = {"router_load": each, "router_load_max": largest, "router_dropped": int(dropped)}
    return measured | ({"mtp_loss": mtp_loss} if o.mtp else {})


# ---------------------------------------------------------------------------------------------- this rank's part


def build(o, config: Deepseek3Config, where: torch.device | None = None) -> list[Deepseek3]:
    """Builds this rank's model chunks, unwrapped, with uninitialised parameters on this rank's device or on `where`."""
    mc = parallel.megatron_config(
        o,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
        experts=config.n_routed_experts,
    )
    router = RouterOptions(o.dispatch, o.aux)
    chunks = []
    with where or device.current():
        for i in range(o.vpp):
            stage = None if o.vpp == 1 else i
            first = parallel.mpu.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage)
            last = parallel.mpu.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage)
            layers = parallel.stage_layers(o, config.num_hidden_layers, i)
            offload = o.offload_activations
            chunks.append(Deepseek3(config, mc, layers, first, last, o.recompute, offload, router))
            chunks[-1].vp_stage = stage
    return chunks


def draw(config: Deepseek3Config, name: str, whole: torch.Tensor, generator: torch.Generator) -> None:
    """Fills a whole parameter with initial values: 1 for norms, 0 for the routers' biases, N(0, initializer_range /
    sqrt(2 layers)) for the outputs of attention and MLP (o_proj, down), N(0, initializer_range) for the rest. This is
    the rule of GPT-2 and of Megatron-LM (`scaled_init_method_normal`)."""
    if name.endswith(("norm.weight", "bias")):
        whole.fill_(float(name.endswith("weight")))
        return
    residual = name.endswith(("o_proj.weight", "down_proj.weight", "mlp.down"))
    scale = (2 * config.num_hidden_layers) ** -0.5 if residual else 1.0
    whole.normal_(std=config.initializer_range * scale, generator=generator)
