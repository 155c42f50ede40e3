"""Low-rank adapters (LoRA, arXiv:2106.09685) on linears, plain and tensor parallel, in PEFT's folder format.

y = W x + b becomes y = W x + b + s B A x with A [r, in], B [out, r], s = alpha / r (rank-stabilised, arXiv:2312.03732:
alpha / sqrt(r)); only A and B train. They are parameters `lora_A` and `lora_B` of the linear itself, so every other
name of the model, and what reads weights and checkpoints by it, stays. Order: released weights, adapters, wrapping.

What can be adapted is a linear that the model calls and that is one matrix of the release: names map one to one.
Matrices fused or stacked here (experts) are no linears and are left out; so is a vocabulary projection split over tp,
whose weight the loss reads. A recipe must not offer as target what its model does not call (a router read as weight).
The base stays in the precision of the run, or after `quantize_` in 4 bits.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from torch import nn
from torch.distributed.tensor import DTensor

from common import checkpoint, parallel, weights
from common.adapters import Pair, Settings, matches

# ---------------------------------------------------------------------------------------------------- adapted linears


def _narrow(module: nn.Module, x: torch.Tensor, lora_A: torch.Tensor) -> torch.Tensor:
    """s A dropout(x): [..., in] -> [..., r]. Scaled here, where the tensor is small."""
    return F.linear(module.lora_dropout(x), lora_A) * module.lora.scale


class LoraLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + F.linear(_narrow(self, x, self.lora_A), self.lora_B)


class LoraColumnLinear(parallel.ColumnLinear):
    """A is whole on every rank, B split over outputs: each rank has its outputs' part of A's gradient. Under sequence
    parallel megatron-core sums those once a step, together with the norms'; else the backward does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[L, B, inputs] -> [L, B, outputs/tp]."""
        lora_A = self.lora_A if self.config.sequence_parallel else parallel.shared_by_tp(self.lora_A, self.config)
        return super().forward(x) + F.linear(_narrow(self, x, lora_A), self.lora_B)


class LoraRowLinear(parallel.RowLinear):
    """A is split over inputs, B whole on every rank: what the ranks sum is only r wide."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[L, B, inputs/tp] -> [L(/tp), B, outputs]."""
        narrow = parallel.leave_tensor_parallel(_narrow(self, x, self.lora_A), self.config)  # [L(/tp), B, r]
        return super().forward(x) + F.linear(narrow, self.lora_B)


ADAPTED = {nn.Linear: LoraLinear, parallel.ColumnLinear: LoraColumnLinear, parallel.RowLinear: LoraRowLinear}
PLAIN = {adapted: plain for plain, adapted in ADAPTED.items()}


class LoraQuantized(nn.Module):
    """Any of them, at tp = 1, whose frozen weight is kept as NF4 (QLoRA, arXiv:2305.14314)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FrozenLinear.apply(x, self) + F.linear(_narrow(self, x, self.lora_A), self.lora_B)


def unpacked(module: LoraQuantized) -> torch.Tensor:
    """[out, in]."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*module.nf4).view(len(module.lora_B), -1)


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b; W is unpacked where it is used, once forward and once backward, and never kept."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return F.linear(x, unpacked(module), module.bias)

    @staticmethod
    def backward(ctx, dy):
        return dy @ unpacked(ctx.module), None


def quantize_(chunks: list[nn.Module]) -> None:
    """The frozen weights of the adapted linears become NF4 in blocks of 64, their scales 8-bit: 4.13 bits a weight. To be
    called before wrapping, at tp = 1 and without FSDP."""
    from bitsandbytes.functional import quantize_4bit

    for _, module in list(_modules(chunks, PLAIN)):
        # Flat: bitsandbytes 0.50.2 on CPU unpacks a matrix wrongly if its rows are no multiple of a block.
        weight = module.weight.data.flatten()
        packed = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        del module.weight
        module.__class__, module.nf4 = LoraQuantized, packed


def _modules(chunks: list[nn.Module], types) -> Iterator[tuple[str, nn.Module]]:
    """(global name, module) of exactly these types, but for plain linears whose weight is split over tp."""
    for name, module in ((n, m) for chunk in chunks for n, m in chunk.named_modules() if type(m) in types):
        if not isinstance(module, nn.Linear) or not getattr(module.weight, "tensor_model_parallel", False):
            yield name.removeprefix("module."), module


def _union(mine: dict) -> dict:
    """The pipeline stages' dicts as one; in a rehearsal without real groups, this stage's."""
    group = mpu.get_pipeline_model_parallel_group()
    if group.size() == 1 or dist.get_backend() == "fake":
        return mine
    stages: list[dict] = [{}] * group.size()
    dist.all_gather_object(stages, mine, group=group)
    return {key: value for stage in stages for key, value in stage.items()}


def _attach(chunks: list[nn.Module], settings: dict[str, Settings]) -> None:
    """Freeze the model and give the linears named adapters, memory allocated and not filled."""
    for chunk in chunks:
        chunk.requires_grad_(False)
    for module, its in [(module, settings[name]) for name, module in _modules(chunks, ADAPTED) if name in settings]:
        weight = module.weight
        split = weight.partition_dim if getattr(weight, "tensor_model_parallel", False) else None
        module.__class__, module.lora = ADAPTED[type(module)], its
        module.lora_dropout = nn.Dropout(its.lora_dropout) if its.lora_dropout else nn.Identity()
        module.lora_A = nn.Parameter(weight.new_empty(its.r, weight.shape[1]))
        module.lora_B = nn.Parameter(weight.new_empty(weight.shape[0], its.r))
        for parameter, dim in ((module.lora_A, 1), (module.lora_B, 0)):
            if dim == split:
                parallel.set_tensor_model_parallel_attributes(parameter, True, dim, 1)
            elif split is not None:
                parallel.mark_replicated([parameter], module.config)
            else:  # like the linear's own weight: the same on all tokens, or on this rank's
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
) -> None:
    """Freeze the model and give each linear whose name ends in one of `targets` ("q_proj", "self_attn.o", "ffn.0") an
    adapter that trains: A drawn as PEFT does, the same in every layout, B zero. With dropout, see `seed_dropout`.

    Raises:
        ValueError: a target that no linear of the model is called; lists those that there are.
    """
    names = _union({name: None for name, _ in _modules(chunks, ADAPTED)})
    unknown = [target for target in targets if not any(matches(name, [target]) for name in names)]
    if unknown:
        kinds = sorted({re.sub(r"\.\d+\.", ".N.", name, count=1) for name in names})
        raise ValueError(f"no linear is called {', '.join(unknown)}; expected the end of one of: {', '.join(kinds)}")
    settings = Settings(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora)
    _attach(chunks, {name: settings for name in names if matches(name, targets)})
    checkpoint.initialize(chunks, seed, _draw, lambda name: name.endswith((".lora_A", ".lora_B")))


def _draw(name: str, whole: torch.Tensor, generator: torch.Generator) -> None:
    whole.zero_()
    if name.endswith(".lora_A"):
        nn.init.kaiming_uniform_(whole, a=5**0.5, generator=generator)  # U(-1, 1) / sqrt(in)


def seed_dropout(seed: int, step: int) -> None:
    """To be called before each step: masks that a resumed run draws again, different where tokens or layers differ and
    equal over tp, where copies of a linear must drop the same entries. Another layout draws others."""
    place = (mpu.get_data_parallel_rank(with_context_parallel=True), mpu.get_pipeline_model_parallel_rank())
    torch.manual_seed(checkpoint.stable_seed(seed, step, *place))


def merged(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float) -> torch.Tensor:
    """W + s B A [out, in], computed in fp32 and rounded once to the dtype of W."""
    return (weight.float() + lora_B.float() @ lora_A.float() * scale).to(weight.dtype)


def added(
    weight: torch.Tensor,
    pair: Pair | None,
    difference: weights.Entry | None,
    reader: weights.Reader,
    cut: tuple[int | None, int, int] = (None, 0, 1),
) -> torch.Tensor:
    """A parameter, or the part that a cut (see `checkpoint.cuts`) leaves of it, with an adapter and a difference added
    that lie in files: computed in fp32 and rounded once."""
    dim, part, parts = cut
    if difference:
        weight, dtype = weight.float() + reader.read(difference, *cut).to(weight.device), weight.dtype
        return added(weight, pair, None, reader, cut).to(dtype)
    if pair is None:
        return weight
    lora_A = reader.read(pair.A, 1, part, parts if dim == 1 else 1).to(weight.device)
    lora_B = reader.read(pair.B, 0, part, parts if dim == 0 else 1).to(weight.device)
    return merged(weight, lora_A, lora_B, pair.settings.scale)


# ------------------------------------------------------------------------------------------------ PEFT's folder format


def _released(linear: str, rename: Callable[[str], str]) -> str:
    return rename(f"{linear}.weight").removesuffix(".weight")


def _adapters(chunks: list[nn.Module], rename: Callable[[str], str]) -> dict[str, tuple[str, nn.Parameter]]:
    """Our name -> (PEFT's key, parameter)."""
    return {
        f"{name}.{part}": (f"base_model.model.{_released(name, rename)}.{part}.weight", getattr(module, part))
        for name, module in _modules(chunks, (*PLAIN, LoraQuantized))
        for part in ("lora_A", "lora_B")
    }


def save_adapter(
    folder: Path, chunks: list[nn.Module], rename: Callable[[str], str], *, base: str = "", task: str | None = None
) -> None:
    """Write a new folder as PEFT would, from rank 0; every rank calls.

    rename: our parameter name -> released key; base: name or path of the released weights; task: PEFT's task type,
    "CAUSAL_LM" for one.
    """
    linears = {_released(name, rename): module.lora for name, module in _modules(chunks, (*PLAIN, LoraQuantized))}
    linears, tensors = _union(linears), _union({key: _whole(p) for key, p in _adapters(chunks, rename).values()})
    if dist.get_rank() != 0:
        return
    weights.save(folder, {key: tensor.nbytes for key, tensor in tensors.items()}, tensors.__getitem__, "adapter_model")
    usual, _ = collections.Counter(linears.values()).most_common(1)[0]
    facts = dataclasses.asdict(usual) | {
        "peft_type": "LORA", "task_type": task, "base_model_name_or_path": base, "inference_mode": True, "bias": "none",
        "target_modules": sorted(linears),
        "rank_pattern": {name: its.r for name, its in sorted(linears.items()) if its.r != usual.r},
        "alpha_pattern": {n: its.lora_alpha for n, its in sorted(linears.items()) if its.lora_alpha != usual.lora_alpha},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(facts, indent=2))


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    """Put together over FSDP or tensor parallel, on the CPU."""
    value = parameter.detach()
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    group = mpu.get_tensor_model_parallel_group()
    if group.size() > 1 and getattr(parameter, "tensor_model_parallel", False):
        parts = [torch.empty_like(value) for _ in range(group.size())]
        dist.all_gather(parts, value.contiguous(), group=group)
        value = torch.cat(parts, parameter.partition_dim)
    return value.cpu()


def load_adapter(pairs: dict[str, Pair], chunks: list[nn.Module]) -> None:
    """Freeze the model and give it adapters from files (`adapters.read`), which train; each rank reads its slices.

    Raises:
        ValueError: of a linear that the model has not, or does not call.
    """
    called = _union({name: None for name, _ in _modules(chunks, ADAPTED)})
    if lost := sorted(pairs.keys() - called.keys()):
        raise ValueError(f"adapters of {len(lost)} linears that the model does not call: {lost[:5]}; fix: --adapter")
    _attach(chunks, {name: pair.settings for name, pair in pairs.items()})
    entries = {f"{name}.lora_{part}": getattr(pair, part) for name, pair in pairs.items() for part in "AB"}
    checkpoint.load_released(chunks, entries, lambda name: name if name in entries else None)
