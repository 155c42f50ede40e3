"""Low-rank adapters (LoRA, arXiv:2106.09685) on linears, plain and tensor parallel, in PEFT's folder format.

y = W x + b becomes y = W x + b + s B A x with A [r, in], B [out, r], s = alpha / r (rank-stabilised, arXiv:2312.03732:
alpha / sqrt(r)); only A and B train. They are parameters `lora_A` and `lora_B` of the linear itself, so no other name
in the model changes, and code that reads weights and checkpoints by name still works. The order is: load the released
weights, add the adapters, wrap the model.

A linear can be adapted if the model calls it and if it is one matrix of the release, so that names map one to one.
Matrices that are fused or stacked here (experts) are not linears and are left out. A vocabulary projection split over
tp is left out too, because the loss reads its weight directly. A recipe must not offer a target that its model does not
call, such as a router whose weight alone is read. The base stays in the run's precision, after `quantize_` in 4 bits.
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
    """Return s A dropout(x): [..., in] -> [..., r]. The scale is applied here, where the tensor is small."""
    return F.linear(module.lora_dropout(x), lora_A) * module.lora.scale


class LoraLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + F.linear(_narrow(self, x, self.lora_A), self.lora_B)


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


ADAPTED = {nn.Linear: LoraLinear, parallel.ColumnLinear: LoraColumnLinear, parallel.RowLinear: LoraRowLinear}
PLAIN = {adapted: plain for plain, adapted in ADAPTED.items()}


class LoraQuantized(nn.Module):
    """Any of the adapted linears, at tp = 1, with its frozen weight in NF4 (QLoRA, arXiv:2305.14314)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FrozenLinear.apply(x, self) + F.linear(_narrow(self, x, self.lora_A), self.lora_B)


def unpacked(module: LoraQuantized) -> torch.Tensor:
    """Return the weight [out, in], dequantised."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*module.nf4).view(len(module.lora_B), -1)


def effective_weight(linear: nn.Module) -> torch.Tensor:
    """Return the weight [out, in] that a linear multiplies by, its adapter included, for code that multiplies itself."""
    weight = unpacked(linear) if isinstance(linear, LoraQuantized) else linear.weight
    if not hasattr(linear, "lora"):
        return weight
    return weight + (linear.lora_B @ linear.lora_A) * linear.lora.scale


class _FrozenLinear(torch.autograd.Function):
    """Computes x W^T + b. W is unpacked once in the forward and once in the backward, and never kept."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return F.linear(x, unpacked(module), module.bias)

    @staticmethod
    def backward(ctx, dy):
        return dy @ unpacked(ctx.module), None


def quantize_(chunks: list[nn.Module]) -> None:
    """Convert the frozen weights of the adapted linears to NF4 in blocks of 64 with 8-bit scales: 4.13 bits a weight.
    Call it before wrapping, at tp = 1 and without FSDP."""
    from bitsandbytes.functional import quantize_4bit

    for _, module in list(_modules(chunks, PLAIN)):
        # Flat, because bitsandbytes 0.50.2 on CPU unpacks a matrix wrongly if a row is not a multiple of a block.
        weight = module.weight.data.flatten()
        packed = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        del module.weight
        module.__class__, module.nf4 = LoraQuantized, packed


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


def _attach(chunks: list[nn.Module], settings: dict[str, Settings]) -> None:
    """Freeze the model and add an adapter to each linear named in `settings`. Its memory is allocated, not filled."""
    for chunk in chunks:
        chunk.requires_grad_(False)
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
) -> None:
    """Freeze the model and give each linear whose name ends in one of `targets` ("q_proj", "self_attn.o", "ffn.0") an
    adapter that trains. A is drawn as in PEFT, the same in every layout; B is zero. With dropout, see `seed_dropout`.

    Raises:
        ValueError: no linear of the model has the name of a target; lists the linears that can be adapted.
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


def _adapters(chunks: list[nn.Module], rename: Callable[[str], str]) -> dict[str, tuple[str, nn.Parameter]]:
    """Return {our name: (PEFT's key, parameter)}."""
    return {
        f"{name}.{part}": (f"base_model.model.{_released(name, rename)}.{part}.weight", getattr(module, part))
        for name, module in _modules(chunks, (*PLAIN, LoraQuantized))
        for part in ("lora_A", "lora_B")
    }


def save_adapter(
    folder: Path, chunks: list[nn.Module], rename: Callable[[str], str], *, base: str = "", task: str | None = None
) -> None:
    """Write a new adapter folder in PEFT's format. Every rank must call it; rank 0 writes.

    rename: our parameter name -> released key; base: name or path of the released weights; task: PEFT's task type, for
    example "CAUSAL_LM".
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
        "rank_pattern": {name: s.r for name, s in sorted(linears.items()) if s.r != usual.r},
        "alpha_pattern": {n: s.lora_alpha for n, s in sorted(linears.items()) if s.lora_alpha != usual.lora_alpha},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(facts, indent=2))


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    """Return the whole parameter on the CPU, gathered over FSDP or tensor parallel ranks."""
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
    """Freeze the model and add trainable adapters from files (`adapters.read`). Each rank reads only its slices.

    Raises:
        ValueError: an adapter is for a linear that the model does not have or does not call.
    """
    names = _union({name: None for name, _ in _modules(chunks, ADAPTED)})
    if extra := sorted(pairs.keys() - names.keys()):
        raise ValueError(f"adapters of {len(extra)} linears that the model does not call: {extra[:5]}; fix: --adapter")
    _attach(chunks, {name: pair.settings for name, pair in pairs.items()})
    entries = {f"{name}.lora_{part}": getattr(pair, part) for name, pair in pairs.items() for part in "AB"}
    checkpoint.load_released(chunks, entries, lambda name: name if name in entries else None)
