"""Keeps saved activations in host memory until the backward.

Inside `OffloadActivations`, every tensor that autograd saves is copied to pinned memory, and copied back when the
backward asks for it. Around a recomputed block these are the block's inputs alone. torch's own `save_on_cpu` copies a
tensor once for every operation that saves it, and parameters too. This module copies each storage once and leaves
parameters in place. The copies are queued in the compute stream: the host never waits for them, and they do not overlap
with compute.
"""

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class OffloadActivations(torch.autograd.graph.saved_tensors_hooks):
    """Context manager for the forward of one block."""

    def __init__(self):
        parked: dict[tuple[StorageWeakRef, torch.dtype], _Parked] = {}  # storages that this forward has saved

        def pack(tensor: torch.Tensor):
            if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
                return tensor
            key = StorageWeakRef(tensor.untyped_storage()), tensor.dtype
            if key not in parked or parked[key].storage.expired():  # a new storage may reuse the address of a freed one
                parked[key] = _Parked(tensor, key[0])
            parked[key].readers += 1
            return parked[key], tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(packed):
            return packed if isinstance(packed, torch.Tensor) else packed[0].fetch().as_strided(*packed[1:])

        super().__init__(pack, unpack)


class _Parked:
    """A storage's host copy, and from its first to its last reader in the backward also its device copy."""

    def __init__(self, tensor: torch.Tensor, storage: StorageWeakRef):
        self.storage, self.device, self.readers, self.back = storage, tensor.device, 0, None
        numel = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.host = to_host(tensor.detach().as_strided((numel,), (1,), 0))

    def fetch(self) -> torch.Tensor:
        back = self.host.to(self.device, non_blocking=True, copy=True) if self.back is None else self.back
        self.readers -= 1
        self.back = back if self.readers > 0 else None
        return back


def to_host(flat: torch.Tensor) -> torch.Tensor:
    """Copies [n] to host memory, which is pinned where there is a device."""
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.device.type != "cpu")
    return host.copy_(flat, non_blocking=True)
