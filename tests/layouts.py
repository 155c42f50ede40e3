"""What the tests compare of a parallel layout with one process: the weights or the gradients of the whole model."""

import torch
import torch.distributed as dist

from common import checkpoint


def whole_weights(wrapped) -> dict[str, torch.Tensor]:
    """Returns every parameter of the whole model, on every rank. wrapped: this rank's chunks."""
    return _gather({name: (p, p.detach()) for name, p in checkpoint.parameters(wrapped)})


def whole_gradients(o, wrapped) -> dict[str, torch.Tensor]:
    """Returns the gradient of every trained parameter of the whole model, on every rank. wrapped: this rank's chunks,
    after a backward pass whose gradients are reduced."""
    if not o.fsdp:
        # The distributed optimizer reduces on each rank only its own part of the buffers.
        for buffer in (b for chunk in wrapped for b in (*chunk.buffers, *chunk.expert_parallel_buffers)):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets if group.size() > 1 else ():
                parts = list(bucket.grad_data.chunk(group.size()))
                gathered = [torch.empty_like(p) for p in parts]
                dist.all_gather(gathered, parts[group.rank()].clone(), group=group)
                bucket.grad_data.copy_(torch.cat(gathered))
    return _gather({name: (p, p.grad if o.fsdp else p.main_grad) for name, p in checkpoint.trained(wrapped)})


def _gather(values: dict[str, tuple[torch.nn.Parameter, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Puts together tensors of which this rank has the parts that it has of their parameters."""
    mine = {}
    for name, (parameter, value) in values.items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        mine[name] = (checkpoint.cuts(parameter), value.clone())
    world = [None] * dist.get_world_size()
    dist.all_gather_object(world, mine)
    whole: dict[str, torch.Tensor] = {}
    for name, (cuts, value) in ((name, part) for tensors in world for name, part in tensors.items()):
        shape = list(value.shape)
        for dim, _, size in cuts:
            shape[dim] *= size
        where = whole.setdefault(name, torch.full(shape, float("nan"), dtype=value.dtype))
        for dim, rank, size in cuts:
            where = where.chunk(size, dim)[rank]
        where.copy_(value)
    return whole
