"""Saved activations wait for the backward in host memory.

Around a block, what autograd saves is copied to pinned memory when it is saved and back when the backward asks for it;
around a recomputed block that is its inputs alone. torch's own `save_on_cpu` copies a tensor once for every operation
that saves it, and parameters too; here a storage goes once and parameters stay. Copies are queued in the compute stream:
nothing waits on the host, and nothing overlaps.
"""

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class offloaded(torch.autograd.graph.saved_tensors_hooks):
    """Context of one block's forward."""

    def __init__(self):
        parked: dict[tuple[StorageWeakRef, torch.dtype], _Parked] = {}  # what this forward has saved

        def pack(tensor: torch.Tensor):
            if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
                return tensor
            key = StorageWeakRef(tensor.untyped_storage()), tensor.dtype
            if key not in parked or parked[key].storage.expired():  # an address may be used again
                parked[key] = _Parked(tensor, key[0])
            parked[key].readers += 1
            return parked[key], tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(packed):
            return packed if isinstance(packed, torch.Tensor) else packed[0].fetch().as_strided(*packed[1:])

        super().__init__(pack, unpack)


class _Parked:
    """A storage's copy on the host, and on the device again from its first reader in the backward to its last."""

    def __init__(self, tensor: torch.Tensor, storage: StorageWeakRef):
        self.storage, self.device, self.readers, self.back = storage, tensor.device, 0, None
        whole = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.host = to_host(tensor.detach().as_strided((whole,), (1,), 0))

    def fetch(self) -> torch.Tensor:
        back = self.host.to(self.device, non_blocking=True, copy=True) if self.back is None else self.back
        self.readers -= 1
        self.back = back if self.readers > 0 else None
        return back


def to_host(flat: torch.Tensor) -> torch.Tensor:
    """[n] -> its copy in host memory, pinned where there is a device."""
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.device.type != "cpu")
    return host.copy_(flat, non_blocking=True)
