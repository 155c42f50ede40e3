"""Low-rank adapters (LoRA, arXiv:2106.09685) on linears, plain and tensor parallel, in PEFT's folder format.

y = W x + b becomes y = W x + b + s B A x with A [r, in], B [out, r], s = alpha / r (rank-stabilised, arXiv:2312.03732:
alpha / sqrt(r)); only A and B train. They are parameters `lora_A` and `lora_B` of the linear itself, so no other name
in the model changes, and code that reads weights and checkpoints by name still works. The order is: load the released
weights, add the adapters, wrap the model.

A linear can be adapted if the model calls it and if it is one matrix of the release, so that names map one to one. A
vocabulary projection split over tp is left out, because the loss reads its weight directly. A recipe must not offer a
target that its model does not call, such as a router whose weight alone is read.

Experts are matrices of the release that are stacked here. Their adapters are stacked too (`LoraExperts`), and the model
multiplies by both through `expert_matmul`. In files each expert has its own pair.

The frozen base is in the run's precision or, packed while it was loaded, in 4 bits (`common/quantize.py`).
"""

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Set
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.transformer import TransformerConfig
from torch import nn
from torch.distributed.tensor import DTensor

from common import checkpoint, ops, parallel, weights
from common.adapters import Family, Pair, Settings, families, matches, of_experts
from common.ops import nf4
from common.quantize import PackedLinear

# ---------------------------------------------------------------------------------------------------- adapted linears


def _narrow(module: nn.Module, x: torch.Tensor, lora_A: torch.Tensor) -> torch.Tensor:
    """Return s A dropout(x): [..., in] -> [..., r]. The scale is applied here, where the tensor is small."""
    return F.linear(module.lora_dropout(x), lora_A) * module.lora.scale


class LoraLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.weight, self.bias) + F.linear(_narrow(self, x, self.lora_A), self.lora_B)


class LoraColumnLinear(parallel.ColumnLinear):
    """A is whole on every rank and B is split over outputs, so each rank computes its outputs' part of A's gradient.
    Under sequence parallel megatron-core sums the parts once a step, as for norms; otherwise the backward sums them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[L, B, inputs] -> [L, B, outputs/tp]."""
        return super().forward(x) + self.update(x)

    def enter(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[L(/tp), B, inputs] -> [L, B, inputs], [L, B, outputs/tp]: see `parallel.enter_with`."""
        x, y = super().enter(x)
        return x, y + self.update(x)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """[L, B, inputs] -> s B A x of this rank's outputs [L, B, outputs/tp]."""
        lora_A = self.lora_A if self.config.sequence_parallel else parallel.shared_by_tp(self.lora_A, self.config)
        return F.linear(_narrow(self, x, lora_A), self.lora_B)


class LoraRowLinear(parallel.RowLinear):
    """A is split over inputs and B is whole on every rank, so the tensor that the ranks sum is only r wide."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[L, B, inputs/tp] -> [L(/tp), B, outputs]."""
        narrow = parallel.leave_tensor_parallel(_narrow(self, x, self.lora_A), self.config)  # [L(/tp), B, r]
        return super().forward(x) + F.linear(narrow, self.lora_B)


ADAPTED = {PackedLinear: LoraLinear, nn.Linear: LoraLinear, parallel.ColumnLinear: LoraColumnLinear,
           parallel.RowLinear: LoraRowLinear}  # fmt: skip
PLAIN = {adapted: plain for plain, adapted in ADAPTED.items()}


class LoraExperts(nn.Module):
    """The adapters of one linear of this rank's experts: A [G/ep, in, r] and B [G/ep, r, out], transposed and stacked
    like the experts. The factor whose outer dimension is the expert's split one is split too. The other is whole on
    every expert-tensor-parallel rank, and each rank computes its columns' part of that factor's gradient."""

    def __init__(self, weight: torch.Tensor, family: Family, lora: Settings, config: TransformerConfig):
        super().__init__()
        self.family, self.lora, self.config, self.splits_inputs = family, lora, config, weight.partition_dim == 1
        self.lora_dropout = nn.Dropout(lora.lora_dropout) if lora.lora_dropout else nn.Identity()
        self.lora_A = nn.Parameter(weight.new_empty(len(weight), weight.shape[1], lora.r))
        self.lora_B = nn.Parameter(weight.new_empty(len(weight), lora.r, weight.shape[-1]))
        parallel.mark_expert(self.lora_A, 1 if self.splits_inputs else None, config)
        parallel.mark_expert(self.lora_B, None if self.splits_inputs else 2, config)

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """x [N, in], sorted by expert, ends [G/ep] -> s B A x of each row's expert [N, out]."""
        lora_A, lora_B = self.lora_A, self.lora_B
        if self.splits_inputs:
            lora_B = parallel.shared_by_etp(lora_B, self.config)
        else:
            lora_A = parallel.shared_by_etp(lora_A, self.config)
        narrow = ops.grouped_matmul(self.lora_dropout(x), lora_A, ends) * self.lora.scale
        return ops.grouped_matmul(narrow, lora_B, ends)


def expert_matmul(owner: nn.Module, stack: str, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Returns `ops.grouped_matmul` by a stack of experts, `owner.<stack>` [G/ep, in, ..., out], plus what the experts'
    adapters add. x [N, in] sorted by expert, ends [G/ep] -> [N, ... * out]."""
    weight = getattr(owner, stack)
    y = ops.grouped_matmul(x, weight, ends)
    parts = y.unflatten(1, (-1, weight.shape[-1]))
    for adapter in getattr(owner, "experts", {}).values():
        if adapter.family.stack.endswith(f".{stack}"):
            parts[:, adapter.family.part] += adapter(x, ends)
    return y


def effective_weight(linear: nn.Module) -> torch.Tensor:
    """Return the weight [out, in] that a linear multiplies by, its adapter included, for code that multiplies itself."""
    weight = linear.weight.unpack() if isinstance(linear.weight, nf4.Packed) else linear.weight
    if not hasattr(linear, "lora"):
        return weight
    return weight + (linear.lora_B @ linear.lora_A) * linear.lora.scale


ADAPTERS = (*PLAIN, LoraExperts)
Pieces = dict[str, dict[str, tuple]]  # what the stacks of experts hold, see `release.Table`


def _modules(chunks: list[nn.Module], types) -> Iterator[tuple[str, nn.Module]]:
    """Yield (global name, module) of exactly these types, except plain linears whose weight is split over tp."""
    for name, module in ((n, m) for chunk in chunks for n, m in chunk.named_modules() if type(m) in types):
        if not isinstance(module, nn.Linear) or not getattr(module.weight, "tensor_model_parallel", False):
            yield name.removeprefix("module."), module


def _union(mine: dict) -> dict:
    """Merge the dicts of all pipeline stages. With fake process groups (common/memory.py) return this stage's alone."""
    group = mpu.get_pipeline_model_parallel_group()
    if group.size() == 1 or dist.get_backend() == "fake":
        return mine
    stages: list[dict] = [{}] * group.size()
    dist.all_gather_object(stages, mine, group=group)
    return {key: value for stage in stages for key, value in stage.items()}


def _attach(chunks: list[nn.Module], settings: dict[str, Settings], stacked: dict[str, Family]) -> None:
    """Freeze the model and add an adapter to each linear named in `settings`. Its memory is allocated, not filled."""
    for chunk in chunks:
        chunk.requires_grad_(False)
        owners = {name.removeprefix("module."): module for name, module in chunk.named_modules()}
        for name, family in stacked.items():
            path, _, stack = family.stack.rpartition(".")
            if name in settings and (owner := owners.get(path)) is not None:
                owner.experts = getattr(owner, "experts", nn.ModuleDict())
                adapter = LoraExperts(getattr(owner, stack), family, settings[name], chunk.config)
                owner.experts[name.rpartition(".")[2]] = adapter
    for module, lora in [(module, settings[name]) for name, module in _modules(chunks, ADAPTED) if name in settings]:
        weight = module.weight
        split = weight.partition_dim if getattr(weight, "tensor_model_parallel", False) else None
        module.__class__, module.lora = ADAPTED[type(module)], lora
        module.lora_dropout = nn.Dropout(lora.lora_dropout) if lora.lora_dropout else nn.Identity()
        module.lora_A = nn.Parameter(weight.new_empty(lora.r, weight.shape[1]))
        module.lora_B = nn.Parameter(weight.new_empty(weight.shape[0], lora.r))
        for parameter, dim in ((module.lora_A, 1), (module.lora_B, 0)):
            if dim == split:
                parallel.set_tensor_model_parallel_attributes(parameter, True, dim, 1)
            elif split is not None:
                parallel.mark_replicated([parameter], module.config)
            else:  # as for the linear's own weight: it is applied to all tokens, or only to this rank's
                parameter.sequence_parallel = getattr(weight, "sequence_parallel", False)


def add(
    chunks: list[nn.Module],
    targets: list[str],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int,
    pieces: Pieces | None = None,
) -> None:
    """Freeze the model and give each linear whose name ends in one of `targets` ("q_proj", "self_attn.o", "ffn.0") an
    adapter that trains. A is drawn as in PEFT, the same in every layout; B is zero. With dropout, see `seed_dropout`.

    pieces: what the model's stacks hold (`release.Table`). The linears of experts have names like layers.2.mlp.experts.
    up_proj.

    Raises:
        ValueError: no linear of the model has the name of a target; lists the linears that can be adapted.
    """
    stacked = families(pieces or {})
    names = _union({name: None for name, _ in _modules(chunks, ADAPTED)}) | dict.fromkeys(stacked)
    unknown = [target for target in targets if not any(matches(name, [target]) for name in names)]
    if unknown:
        kinds = sorted({re.sub(r"\.\d+\.", ".N.", name, count=1) for name in names})
        raise ValueError(f"no linear is called {', '.join(unknown)}; expected the end of one of: {', '.join(kinds)}")
    settings = Settings(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora)
    _attach(chunks, {name: settings for name in names if matches(name, targets)}, stacked)
    checkpoint.initialize(chunks, seed, _draw, lambda name: name.endswith((".lora_A", ".lora_B")))


def _draw(name: str, whole: torch.Tensor, generator: torch.Generator) -> None:
    whole.zero_()
    if name.endswith(".lora_A"):
        for lora_A in [whole] if whole.ndim == 2 else whole.mT:  # experts' are [G, in, r]
            nn.init.kaiming_uniform_(lora_A, a=5**0.5, generator=generator)  # U(-1, 1) / sqrt(in)


def seed_dropout(seed: int, step: int) -> None:
    """Seed the dropout masks; call it before each step. A resumed run draws the same masks again. Masks differ between
    ranks with other tokens or layers and are equal over tp, where copies of a linear must drop the same entries.
    Another layout draws other masks."""
    place = (mpu.get_data_parallel_rank(with_context_parallel=True), mpu.get_pipeline_model_parallel_rank())
    torch.manual_seed(checkpoint.stable_seed(seed, step, *place))


def merge(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float) -> torch.Tensor:
    """Return W + s B A [out, in], computed in fp32 and rounded once to the dtype of W."""
    return (weight.float() + lora_B.float() @ lora_A.float() * scale).to(weight.dtype)


def merge_from_files(
    weight: torch.Tensor,
    pair: Pair | None,
    difference: weights.Entry | None,
    reader: weights.Reader,
    cut: tuple[int | None, int, int] = (None, 0, 1),
) -> torch.Tensor:
    """Return a parameter, or the part that a cut (see `checkpoint.cuts`) leaves of it, plus an adapter and a difference
    that are read from files. The sum is computed in fp32 and rounded once."""
    dim, part, parts = cut
    if difference:
        weight, dtype = weight.float() + reader.read(difference, *cut).to(weight.device), weight.dtype
        return merge_from_files(weight, pair, None, reader, cut).to(dtype)
    if pair is None:
        return weight
    lora_A = reader.read(pair.A, 1, part, parts if dim == 1 else 1).to(weight.device)
    lora_B = reader.read(pair.B, 0, part, parts if dim == 0 else 1).to(weight.device)
    return merge(weight, lora_A, lora_B, pair.settings.scale)


# ------------------------------------------------------------------------------------------------ PEFT's folder format


def _released(linear: str, rename: Callable[[str], str]) -> str:
    return rename(f"{linear}.weight").removesuffix(".weight")


def _tensors(chunks: list[nn.Module], rename: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """Return the whole tensors of this rank's pipeline stage on the CPU, by PEFT's keys."""
    tensors = {}
    for name, module in _modules(chunks, ADAPTERS):
        for part in ("lora_A", "lora_B"):
            whole = _whole(getattr(module, part))
            matrices = {_released(name, rename): whole}
            if isinstance(module, LoraExperts):  # copies, because a view would be sent with the whole stack
                matrices = {
                    e: m.clone(memory_format=torch.contiguous_format)
                    for e, m in zip(module.family.experts, whole.mT, strict=True)
                }
            tensors |= {f"base_model.model.{linear}.{part}.weight": matrix for linear, matrix in matrices.items()}
    return tensors


def save_adapter(
    folder: Path,
    chunks: list[nn.Module],
    rename: Callable[[str], str],
    *,
    pieces: Pieces | None = None,
    base: str = "",
    task: str | None = None,
) -> None:
    """Write a new adapter folder in PEFT's format. Every rank must call it; rank 0 writes.

    rename: our parameter name -> released key; pieces: see `add`; base: name or path of the released weights; task:
    PEFT's task type, for example "CAUSAL_LM".
    """
    mine = {}
    for name, module in _modules(chunks, ADAPTERS):
        names = module.family.experts if isinstance(module, LoraExperts) else [_released(name, rename)]
        mine |= dict.fromkeys(names, module.lora)
    linears, tensors = _union(mine), _union(_tensors(chunks, rename))
    others = _union({_released(name, rename): None for name, _ in _modules(chunks, ADAPTED)}).keys()
    if dist.get_rank() != 0:
        return
    weights.save(folder, {key: tensor.nbytes for key, tensor in tensors.items()}, tensors.__getitem__, "adapter_model")
    usual, _ = collections.Counter(linears.values()).most_common(1)[0]
    facts = dataclasses.asdict(usual) | {
        "peft_type": "LORA", "task_type": task, "base_model_name_or_path": base, "inference_mode": True, "bias": "none",
        "target_modules": _short_names(linears.keys(), others, pieces or {}),
        "rank_pattern": {name: s.r for name, s in sorted(linears.items()) if s.r != usual.r},
        "alpha_pattern": {n: s.lora_alpha for n, s in sorted(linears.items()) if s.lora_alpha != usual.lora_alpha},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(facts, indent=2))


def _short_names(adapted: Set[str], others: Set[str], pieces: Pieces) -> list[str]:
    """Return the names of adapted linears. The many names of experts' linears become one, their last part, if all
    linears of the model with this last part are adapted."""
    experts = [name for family in families(pieces).values() for name in family.experts]

    def last(name: str) -> str:
        return name.rpartition(".")[2]

    short = set(map(last, adapted & set(experts))) - set(map(last, {*others, *experts} - adapted))
    return sorted({last(name) if last(name) in short else name for name in adapted})


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    """Return the whole parameter on the CPU, gathered over FSDP, tensor or expert parallel ranks."""
    value = parameter.detach()
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    is_expert = not getattr(parameter, "allreduce", True)
    for dim, _, size in checkpoint.cuts(parameter):
        group = mpu.get_tensor_model_parallel_group()
        if is_expert:
            group = mpu.get_expert_tensor_parallel_group() if dim else mpu.get_expert_model_parallel_group()
        parts = [torch.empty_like(value) for _ in range(size)]
        dist.all_gather(parts, value.contiguous(), group=group)
        value = torch.cat(parts, dim)
    return value.cpu()


def load_adapter(pairs: dict[str, Pair], chunks: list[nn.Module], pieces: Pieces | None = None) -> None:
    """Freeze the model and add trainable adapters from files (`adapters.read`). Each rank reads only its slices. pieces:
    see `add`; pairs of experts have their names in the release.

    Raises:
        ValueError: an adapter is for a linear that the model does not have or does not call; see `of_experts`.
    """
    stacked = families(pieces or {})
    experts = of_experts(pairs, stacked)
    in_stacks = {expert for name in experts for expert in stacked[name].experts}
    of_linears = {name: pair for name, pair in pairs.items() if name not in in_stacks}
    names = _union({name: None for name, _ in _modules(chunks, ADAPTED)})
    if extra := sorted(of_linears.keys() - names.keys()):
        raise ValueError(f"adapters of {len(extra)} linears that the model does not call: {extra[:5]}; fix: --adapter")
    settings = {name: pair.settings for name, pair in of_linears.items()}
    _attach(chunks, settings | {name: of_linear[0].settings for name, of_linear in experts.items()}, stacked)
    entries = {f"{name}.lora_{part}": getattr(pair, part) for name, pair in of_linears.items() for part in "AB"}
    checkpoint.load_released(chunks, entries, lambda name: name if name in entries else None)
    reader = weights.Reader()
    for name, module in _modules(chunks, [LoraExperts]):
        for part in "AB":
            _read_stack(getattr(module, f"lora_{part}"), [getattr(pair, part) for pair in experts[name]], reader)


@torch.no_grad()
def _read_stack(parameter: nn.Parameter, entries: list[weights.Entry], reader: weights.Reader) -> None:
    """Fill this rank's part of a factor [G/ep, in, out] from the matrices [out, in] of all G experts."""
    first, cut = 0, (None, 0, 1)
    for dim, rank, size in checkpoint.cuts(parameter):
        if dim:
            cut = (2 - dim, rank, size)
        else:
            first = rank * len(parameter)
    for matrix, entry in zip(parameter, entries[first : first + len(parameter)], strict=True):
        matrix.copy_(reader.read(entry, *cut).t())
