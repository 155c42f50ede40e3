"""Keeps the frozen weights below adapters in 4 bits (`common/ops/nf4.py`), each rank its own shard.

A weight is unpacked where it is used, in the forward and in the backward, and never kept unpacked. Weights are packed
while they are loaded, one block of the model after the other: a rank never holds its whole part in the run's precision.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from common import device, ops, parallel
from common.adapters import matches
from common.ops.nf4 import Packed


class PackedLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.weight, self.bias)


LINEARS = (nn.Linear, parallel.ColumnLinear, parallel.RowLinear)  # no subclasses: they may read their weight otherwise


def pack(name: str, module: nn.Module, names: list[str]) -> None:
    """Packs the weights of linears, and the stacks of experts, whose name ends in one of `names`. Call it before
    adapters are added. name: the module's own name in the model."""
    for path, owner in module.named_modules():
        for key, parameter in list(owner.named_parameters(recurse=False)):
            if key == "weight" and type(owner) not in LINEARS:
                continue
            if matches(".".join(filter(None, (name, path, key))).removesuffix(".weight"), names):
                delattr(owner, key)
                setattr(owner, key, Packed(parameter))
                if type(owner) is nn.Linear:
                    owner.__class__ = PackedLinear


def blocks(chunks: list[nn.Module], names: list[str], whole: bool = False) -> Iterator[list[nn.Module]]:
    """Yields the parts of a model that was built on the meta device, to be filled: each block of a ModuleDict, each
    other child of a chunk. Memory for a part is allocated just before, and its weights are packed (`pack`) when the
    next one is asked for. whole: everything is one part. What is yielded has the parameters' names in the model."""
    for chunk in chunks:
        assert not [*chunk.buffers(recurse=False), *chunk.parameters(recurse=False)], "only children are filled"
    parts = [[child] for chunk in chunks for child in _children(chunk)]
    for part in [list(itertools.chain(*parts))] if whole else parts:
        for _, module in part:
            _allocate(module)
        yield [_named(name, module) for name, module in part]
        for name, module in part:
            pack(name, module, names)


def _children(chunk: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in chunk.named_children():
        if isinstance(child, nn.ModuleDict):
            yield from ((f"{name}.{key}", block) for key, block in child.items())
        else:
            yield name, child


def _named(name: str, module: nn.Module) -> nn.Module:
    """Returns a module whose parameters are those of `module`, with its name before theirs."""
    for part in reversed(name.split(".")):
        module = nn.ModuleDict({part: module})
    return module


def _allocate(module: nn.Module) -> None:
    """Replaces parameters and buffers on the meta device by uninitialised ones on this rank's device. The parameters'
    marks stay."""
    for owner in module.modules():
        for key, parameter in list(owner.named_parameters(recurse=False)):
            allocated = nn.Parameter(torch.empty_like(parameter, device=device.current()))
            allocated.__dict__.update(vars(parameter))
            setattr(owner, key, allocated)
        for key, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, key, torch.empty_like(buffer, device=device.current()))


def is_packed(model: nn.Module) -> bool:
    """Returns whether the model has weights in 4 bits."""
    return any(isinstance(value, Packed) for module in model.modules() for value in vars(module).values())
