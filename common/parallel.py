"""Process groups, context parallelism and the wrapping of a model, on megatron-core.

megatron-core does tensor, sequence, pipeline and data parallelism. This module splits the tokens over ranks, computes
attention over the context-parallel group (its ring is in `common/ring.py`) and sets the order of all wrapping.

Shape legend: L tokens, B batch, H heads, K heads of keys and values, E head dim of queries and keys, V that of values,
D hidden, cp = ulysses * ring.
"""

import functools
import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    TorchFullyShardedDataParallel,
    finalize_model_grads,
)
from megatron.core.distributed.torch_fully_sharded_data_parallel_config import TorchFullyShardedDataParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer import TransformerConfig
from torch.utils.checkpoint import checkpoint

from common import device, ops
from common.cli import LayoutOptions
from common.offload import OffloadActivations
from common.ops import fused_comm
from common.recompute import Recomputation, recomputed
from common.ring import RingAttention, unzigzag, zigzag

_SAMPLE_GROUP: dist.ProcessGroup | None = None  # the tp*cp*pp ranks that work on the same samples


def initialize(o: LayoutOptions) -> None:
    """Joins the job that torchrun started and builds megatron-core's groups for the layout."""
    global _SAMPLE_GROUP
    if device.KIND != "cpu":
        getattr(torch, device.KIND).set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group(device.BACKEND, timeout=timedelta(minutes=30))
    mpu.initialize_model_parallel(
        o.tp,
        o.pp,
        o.vpp if o.vpp > 1 else None,
        context_parallel_size=o.cp,
        hierarchical_context_parallel_sizes=[o.ulysses, o.ring] if o.cp > 1 else None,
        expert_model_parallel_size=o.ep,
        expert_tensor_parallel_size=o.etp,
        create_gloo_process_groups=dist.get_backend() != "fake",
    )
    generator = mpu.RankGenerator(tp=o.tp, ep=1, dp=o.dp, pp=o.pp, cp=o.cp, order="tp-cp-ep-dp-pp")
    for ranks in generator.get_ranks("tp-cp-pp"):
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            _SAMPLE_GROUP = group
    if o.fused_comm:
        fused_comm.check_fused_communication(mpu.get_tensor_model_parallel_group())


def shutdown() -> None:
    global _SAMPLE_GROUP
    _SAMPLE_GROUP = None
    mpu.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def sample_group() -> dist.ProcessGroup:
    """Returns the group of ranks that work on the same samples (all of tensor, context and pipeline parallel)."""
    return _SAMPLE_GROUP


def megatron_config(o: LayoutOptions, *, hidden: int, heads: int, layers: int, experts: int = 0) -> TransformerConfig:
    """Builds the config of megatron-core's layers and schedules. experts: experts per layer, 0 for a dense model."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[o.precision]
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        tensor_model_parallel_size=o.tp,
        pipeline_model_parallel_size=o.pp,
        virtual_pipeline_model_parallel_size=o.vpp if o.vpp > 1 else None,
        context_parallel_size=o.cp,
        expert_model_parallel_size=o.ep,
        expert_tensor_parallel_size=o.etp,
        num_moe_experts=experts or None,  # makes the schedule scale the routers' auxiliary loss
        moe_ffn_hidden_size=hidden if experts else None,  # megatron-core warns without it; only its own layers read it
        add_bias_linear=not experts,
        sequence_parallel=o.sp,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=o.precision == "bf16",
        # Interleaved with pp=2, a batch would hold two messages between the same two ranks and could swap them.
        overlap_p2p_comm=o.vpp > 1,
        batch_p2p_comm=o.vpp == 1,
        use_cpu_initialization=True,  # allocates on the device of `with torch.device(...)`, the meta device included
        perform_initialization=False,  # weights are loaded, or drawn independently of the layout (checkpoint.py)
        transformer_impl="local",
        recompute_granularity="full" if o.recompute == "full" else None,
        recompute_method="uniform" if o.recompute == "full" else None,
        recompute_num_layers=1 if o.recompute == "full" else None,
    )
    config.fused_comm = o.fused_comm  # ours: megatron-core does not read it
    return config


# ------------------------------------------------------------------------------------------ tensor parallel linears


class ColumnLinear(ColumnParallelLinear):
    """y = x W^T + b with the outputs split over tp. The input comes through `enter_with` or `enter_tensor_parallel`, once
    for all linears that share it. So the layer itself does not communicate: it is a plain linear, with the bias in the
    same kernel (megatron-core's own forward adds it apart)."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig, bias: bool = True):
        super().__init__(inputs, outputs, config=config, init_method=None, disable_grad_reduce=True, bias=bias)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[L, B, inputs] -> [L, B, outputs/tp]."""
        return ops.linear(x, self.weight, self.bias)

    def enter(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Does what `enter_with` says under --fused-comm: [L(/tp), B, inputs] -> [L, B, inputs], [L, B, outputs/tp]."""
        group = mpu.get_tensor_model_parallel_group()
        return fused_comm.gather_linear(x, self.weight, self.bias, group, self.config.sequence_parallel)


class RowLinear(RowParallelLinear):
    """y = (sum over tp of x_r W_r^T) + b, by all-reduce, or under sequence parallel by reduce-scatter over tokens."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig, bias: bool = True):
        super().__init__(
            inputs, outputs, config=config, init_method=None, bias=bias, input_is_parallel=True, skip_bias_add=False
        )
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[L, B, inputs/tp] -> [L(/tp), B, outputs]."""
        if self.config.tensor_model_parallel_size == 1:
            return ops.linear(x, self.weight, self.bias)
        if self.config.fused_comm:
            group = mpu.get_tensor_model_parallel_group()
            x = fused_comm.linear_reduce(x, self.weight, group, self.config.sequence_parallel)
        else:
            x = leave_tensor_parallel(ops.linear(x, self.weight), self.config)
        return x if self.bias is None else x + self.bias


# Selective recompute: whether inputs that sequence parallelism gathered are gathered again, or kept. Not yet timed.
GATHER_AGAIN = True


def enter_tensor_parallel(x: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """[L/tp, B, D] -> [L, B, D] under sequence parallel (backward: reduce-scatter), else x (backward: all-reduce).
    Selective recompute gathers again in the backward, as megatron-core's own linears do."""
    if config.tensor_model_parallel_size == 1:
        return x
    if config.sequence_parallel:
        gather = functools.partial(gather_from_sequence_parallel_region, tensor_parallel_output_grad=True)
        return recomputed(gather, x) if GATHER_AGAIN else gather(x)
    return copy_to_tensor_model_parallel_region(x)


def enter_with(
    linear: torch.nn.Module, x: torch.Tensor, config: TransformerConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Enters the tensor-parallel region and applies the first of the linears that read x there: [L(/tp), B, D] ->
    (x as of `enter_tensor_parallel`, linear(x) [L, B, outputs/tp]).

    With --fused-comm the first linear's matmul hides the all-gather of x, and in the backward the matmul of its weight
    gradient, or of dx if no other linear reads x, hides the reduce-scatter (without sp: the all-reduce). The gathered x
    serves all linears: each rank receives (n-1)/n L B D elements once, as without the option. Three linears with a
    fused gather each would receive that three times, to hide what the first matmul already hides.
    """
    if config.tensor_model_parallel_size > 1 and config.fused_comm:
        return linear.enter(x)
    x = enter_tensor_parallel(x, config)
    return x, linear(x)


def leave_tensor_parallel(x: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """Sums each rank's part over tp: [L, B, D] -> [L/tp, B, D] under sequence parallel, else [L, B, D]."""
    if config.tensor_model_parallel_size == 1:
        return x
    if config.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(x)
    return reduce_from_tensor_model_parallel_region(x)  # in place: no operation has saved x


def shared_by_tp(weight: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """Returns a weight that all tp ranks hold and apply to their own heads or columns. Backward sums its gradient."""
    return weight if config.tensor_model_parallel_size == 1 else copy_to_tensor_model_parallel_region(weight)


def vocab_parallel_embedding(
    tokens: torch.Tensor, weight: torch.Tensor, config: TransformerConfig, tied: bool
) -> torch.Tensor:
    """Looks up an embedding whose vocabulary is split over tp (arXiv:1909.08053, section 3): sums over tp the rows that
    each rank holds, with zeros for the others. tokens int64 [L, ...], weight [V/tp, D] -> [L(/tp), ..., D]. tied: see
    `ops.embedding`."""
    return leave_tensor_parallel(_held_rows(tokens, weight, config, tied), config)


def vocab_parallel_logits(
    x: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, config: TransformerConfig, tied: bool
) -> torch.Tensor:
    """Returns the logits fp32 [L, N] of N tokens int64 alone, whole on every tp rank, by a projection whose vocabulary
    is split over tp. x [L, D] has come through `enter_tensor_parallel`. weight [V/tp, D]. tied: see `ops.embedding`."""
    logits = torch.nn.functional.linear(x.float(), _held_rows(tokens, weight, config, tied).float())
    return logits if config.tensor_model_parallel_size == 1 else reduce_from_tensor_model_parallel_region(logits)


def _held_rows(tokens: torch.Tensor, weight: torch.Tensor, config: TransformerConfig, tied: bool) -> torch.Tensor:
    """Returns the rows [..., D] of a weight [V/tp, D] at tokens of the whole vocabulary, zeros for what this tp rank
    does not hold."""
    if config.tensor_model_parallel_size == 1:
        return ops.embedding(tokens, weight, tied)
    local = tokens - mpu.get_tensor_model_parallel_rank() * weight.shape[0]
    is_held = (local >= 0) & (local < weight.shape[0])
    return ops.embedding(local.clamp(0, weight.shape[0] - 1), weight, tied) * is_held.unsqueeze(-1)


def mark_replicated(parameters, config: TransformerConfig) -> None:
    """Marks parameters that every tp rank holds whole but, under sequence parallel, applies to its own tokens:
    megatron-core sums their gradients over tp."""
    for parameter in parameters:
        parameter.sequence_parallel = config.sequence_parallel


def mark_expert(parameter: torch.nn.Parameter, columns: int | None, config: TransformerConfig) -> None:
    """Marks an expert stack [G/ep, ...], which is split over experts and, at dimension `columns`, over expert tensor
    parallel. None: each of those ranks holds all columns (`shared_by_etp`). megatron-core reduces the gradient, and
    shards the optimizer, over the ranks that hold the same part."""
    # Of parameters that are not marked as split, megatron-core counts in the gradient's norm those of tp rank 0 alone.
    is_split = columns is not None or config.expert_tensor_parallel_size == 1
    set_tensor_model_parallel_attributes(parameter, is_split, 1 if columns is None else columns, 1)
    cut = (config.expert_model_parallel_size, config.expert_tensor_parallel_size)
    parameter.allreduce = cut == (1, config.tensor_model_parallel_size)  # True: reduced like a dense parameter


def shared_by_etp(weight: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """Returns a weight that all expert-tensor-parallel ranks hold and apply to their own columns. Backward sums its
    gradient. More than one such rank are the tp ranks."""
    return weight if config.expert_tensor_parallel_size == 1 else shared_by_tp(weight, config)


def mark_tied(parameter: torch.nn.Parameter, copy: bool) -> None:
    """Marks an embedding that both the first and the last pipeline stage hold. megatron-core sums its gradient over the
    two (`wrap`). The last stage holds the `copy`, which the gradient norm and checkpoints leave out."""
    parameter.shared_embedding, parameter.shared = True, copy


def context_tokens(x: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """Returns this context-parallel rank's share of the first dimension, [L, ...] -> [L/cp, ...]: a contiguous part,
    for causal attention of the `zigzag` order. Positions, labels and everything else per token are split alike."""
    if mpu.get_context_parallel_world_size() > 1:
        x = zigzag(x, ring_size()) if causal else x
        x = x.chunk(mpu.get_context_parallel_world_size())[mpu.get_context_parallel_rank()]
    return x


def local_tokens(x: torch.Tensor, config: TransformerConfig, causal: bool = False) -> torch.Tensor:
    """Returns this rank's share of the first dimension, [L, ...] -> [L/cp(/tp), ...]: `context_tokens`, under sp split
    over tp too."""
    x = context_tokens(x, causal)
    if config.sequence_parallel:
        x = x.chunk(config.tensor_model_parallel_size)[mpu.get_tensor_model_parallel_rank()]
    return x


def gather_tokens(x: torch.Tensor, config: TransformerConfig, causal: bool = False) -> torch.Tensor:
    """Inverse of `local_tokens`, without gradient: [L/cp(/tp), ...] -> [L, ...] on every rank."""
    for size, group in (
        (config.tensor_model_parallel_size if config.sequence_parallel else 1, mpu.get_tensor_model_parallel_group()),
        (config.context_parallel_size, mpu.get_context_parallel_group()),
    ):
        if size > 1:
            out = x.new_empty(size * x.shape[0], *x.shape[1:])
            dist.all_gather_into_tensor(out, x.contiguous(), group=group)
            x = out
    return unzigzag(x, ring_size()) if causal else x


def ring_size() -> int:
    """Returns the number of ranks in the attention ring: cp = ulysses * ring."""
    return mpu.get_hierarchical_context_parallel_groups()[1].size() if mpu.get_context_parallel_world_size() > 1 else 1


# ------------------------------------------------------------------------------------------ context parallel attention


def context_parallel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    bounds: ops.Bounds | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Computes `ops.attention` over all tokens of the context-parallel group.

    q [L/cp, B, H, E], k [L/cp, B, K, E], v [L/cp, B, K, V] -> [L/cp, B, H, V], with tokens split as by
    `context_tokens`; bounds are of all L tokens. Ulysses (arXiv:2309.14509) exchanges tokens for heads inside the inner
    group. Ring attention (arXiv:2310.01889) passes keys and values around the outer group. Each does nothing if its
    group has one rank.
    """
    if mpu.get_context_parallel_world_size() == 1:
        return ops.attention(q, k, v, causal=causal, bounds=bounds, scale=scale)
    ulysses, ring = mpu.get_hierarchical_context_parallel_groups()
    if ulysses.size() > 1:
        q, k, v = scatter_heads(q, k, v, ulysses)  # [L/ring, B, H/ulysses, E], k and v likewise
    if ring.size() > 1:
        tokens = q.shape[0] * ring.size()
        documents = (0, tokens) if bounds is None else tuple(bounds.on_host)
        if documents[-1] != tokens:
            raise ValueError(f"bounds {list(documents)} for {tokens} tokens; expected [0, ..., {tokens}]")
        q, k, v = (recomputed(_heads_first, t) for t in (q, k, v))  # [B, H/ulysses, L/ring, E]
        out = RingAttention.apply(q, k, v, ring, causal, documents, scale).permute(2, 0, 1, 3)
    else:
        out = ops.attention(q, k, v, causal=causal, bounds=bounds, scale=scale)
    return gather_heads(out, ulysses) if ulysses.size() > 1 else out


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(1, 2, 0, 3).contiguous()


def scatter_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All-to-all, tokens for heads: q [L/n, B, H, E] -> [L, B, H/n, E] over a group of n, and likewise k [L/n, B, K, E]
    and v [L/n, B, K, V]. Their K heads are first repeated to lcm(K, n) heads, which n divides and the H query heads
    still share evenly."""
    n = group.size()
    copies = n // math.gcd(n, k.shape[2])
    if copies > 1:
        k, v = (t.repeat_interleave(copies, 2) for t in (k, v))
    parts = [t.unflatten(2, (n, -1)).permute(2, 0, 1, 3, 4).flatten(3) for t in (q, k, v)]  # [n, L/n, B, H E/n]
    x = torch.cat(parts, 3).contiguous().flatten(0, 1)
    x = all_to_all(group, x)  # [L, B, (H E + K E + K V)/n], source ranks in token order
    parts = x.split([part.shape[3] for part in parts], 2)
    return tuple(part.unflatten(2, (-1, t.shape[3])) for part, t in zip(parts, (q, k, v), strict=True))


def gather_heads(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All-to-all, heads for tokens: [L, B, H/n, E] -> [L/n, B, H, E] over a group of n."""
    n = group.size()
    x = all_to_all(group, x.contiguous())  # [n source ranks * L/n, B, H/n, E]
    return x.unflatten(0, (n, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)


# ------------------------------------------------------------------------------------------ wrapping, in order


def with_recomputation(block: torch.nn.Module, kind: str, offload: bool = False):
    """Returns the block's forward under activation recomputation. kind: selective recomputes the pieces that the model
    names (`recomputed`: norms, activations, rotary embedding), in a compiled block those that the compiler finds
    (`wrap`); full keeps only the block's input; none recomputes nothing. offload: kept tensors stay on the host until
    the backward."""
    is_compiled = hasattr(block.forward, "_torchdynamo_orig_callable")  # by `wrap`
    if kind == "selective" and (is_compiled or not torch.is_grad_enabled()):
        kind = "none"
    if kind == "selective":

        def run_selectively(*args):
            with Recomputation(OffloadActivations() if offload else None):
                return block(*args)

        return run_selectively
    if offload:

        def run(*args):
            with OffloadActivations():
                return with_recomputation(block, kind)(*args)

        return run
    if kind == "none":
        return block
    # Only an adapter's dropout (lora.py) draws random numbers; without it there is no RNG state to restore.
    has_dropout = any(isinstance(module, torch.nn.Dropout) for module in block.modules())
    return lambda *args: checkpoint(block, *args, use_reentrant=False, preserve_rng_state=has_dropout)


def stage_layers(o: LayoutOptions, layers: int, chunk: int) -> range:
    """Returns the global indices of the blocks in one of this rank's model chunks."""
    sizes = o.chunk_layers(layers)
    position = chunk * o.pp + mpu.get_pipeline_model_parallel_rank()
    return range(sum(sizes[:position]), sum(sizes[: position + 1]))


# The share of what a compiled block keeps under selective recompute, of what it would keep without it. Just below 1, the
# compiler first computes again all that it can fuse into its readers. That is nearly always enough, and it stops there.
COMPILED_BUDGET = 0.99


def wrap(chunks: list[torch.nn.Module], o: LayoutOptions, block_type: type) -> list[torch.nn.Module]:
    """Wraps the model chunks. From the inside out: torch.compile of every block with --compile, then data parallelism.
    That is megatron-core's DDP, with the distributed optimizer's buffers and overlapped gradient reduction, or FSDP2
    over every block. Recomputation lies between the two, in the model's own forward. With --overlap-param-gather the
    all-gather of parameters is overlapped too (`_overlap_gathers`)."""
    config = chunks[0].config
    for chunk in chunks:  # megatron-core reads these to find an embedding that two stages share (`mark_tied`)
        chunk.pre_process = chunk.share_embeddings_and_output_weights = hasattr(
            chunk, "shared_embedding_or_output_weight"
        )
    if o.compile:
        if o.recompute == "selective":
            torch._functorch.config.activation_memory_budget = COMPILED_BUDGET
        for block in (m for chunk in chunks for m in chunk.modules() if isinstance(m, block_type)):
            block.forward = torch.compile(block.forward)  # `block.compile()` would trace the block's hooks, too
    if o.fsdp:  # FSDP2 reduces gradients itself; tensor and pipeline parallel are 1, so nothing else needs reducing
        ddp = TorchFullyShardedDataParallelConfig(reshard_after_forward=True, use_distributed_optimizer=False)
        return [TorchFullyShardedDataParallel(config, ddp, chunks[0], sub_modules_to_wrap={block_type})]
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=o.dp * o.cp > 1,
        overlap_param_gather=o.overlap_param_gather,
    )
    config.finalize_model_grads_func = finalize_model_grads
    wrapped = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    # One rank has nothing to reduce or to divide by. gloo would still copy it, in a thread that slows down ours.
    for model in wrapped if o.dp * o.cp == 1 else ():
        model.bucket_groups = []
        if mpu.get_expert_data_parallel_world_size() == 1:
            model.expert_parallel_bucket_groups = []
    config.no_sync_func = [model.no_sync for model in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    if ddp.overlap_grad_reduce and len(wrapped) > 1:
        config.grad_sync_func = [model.start_grad_sync for model in wrapped]
    for model in wrapped if o.overlap_param_gather else ():
        _overlap_gathers(model, block_type)
    return wrapped


def _overlap_gathers(model: DistributedDataParallel, block_type: type) -> None:
    """Makes the forward of a wrapped chunk wait for parameters that are still being gathered (`start_gathers`).

    A block waits for its own parameters when it is called, before anything that is compiled or recomputed. The chunk
    waits for all others when it is called. So the module that reads a parameter need not be the one that owns it.
    megatron-core's own hooks wait in each module for the parameters that the module owns: they are removed.
    """
    model.disable_forward_pre_hook(param_sync=False)
    blocks = [module for module in model.modules() if isinstance(module, block_type)]
    owned = [list(block.parameters()) for block in blocks]
    in_blocks = {p for parameters in owned for p in parameters}
    others = [p for p in model.parameters() if p not in in_blocks]
    model.gathers = []  # all bucket groups, in the order of their first use
    for module, parameters in zip((model.module, *blocks), (others, *owned), strict=True):
        trained = [p for p in parameters if p in model.param_to_bucket_group]  # frozen ones have no bucket
        groups = list(dict.fromkeys(model.param_to_bucket_group[p] for p in trained))
        model.gathers += [group for group in groups if group not in model.gathers]
        module.register_forward_pre_hook(functools.partial(_wait, groups))


def _wait(groups: list, *_) -> None:
    """Waits for those all-gathers of bucket groups that are under way. Starts none: ranks may differ in their calls."""
    for group in groups:
        if group.param_gather_handle is not None:
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def start_gathers(chunks: list[torch.nn.Module]) -> None:
    """Starts the all-gathers of all parameters, in the order in which the forward waits for them."""
    for chunk in chunks:
        for group in chunk.gathers:
            group.start_param_sync()


def finish_gathers(chunks: list[torch.nn.Module]) -> None:
    """Waits for all parameters of chunks that are still being gathered, if any. What reads or writes parameters outside
    a forward calls this first; `checkpoint.parameters` does."""
    for chunk in chunks:
        _wait(getattr(chunk, "gathers", ()))


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the recipe's own module inside DDP or FSDP."""
    return model.module if hasattr(model, "module") else model
