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
        parked: dict[StorageWeakRef, _Parked] = {}  # of storages that this forward has saved and that are still alive

        def pack(tensor: torch.Tensor):
            if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
                return tensor
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in parked or parked[storage].storage.expired():  # an address may be used again
                parked[storage] = _Parked(tensor, storage)
            parked[storage].readers += 1
            return parked[storage], tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()

        def unpack(packed):
            if isinstance(packed, torch.Tensor):
                return packed
            where, dtype, *view = packed
            storage = where.fetch()
            return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, *view)

        super().__init__(pack, unpack)


class _Parked:
    """A storage's copy on the host, and on the device again from its first reader in the backward to its last."""

    def __init__(self, tensor: torch.Tensor, storage: StorageWeakRef):
        self.storage, self.device, self.readers = storage, tensor.device, 0
        self.host, self.back = (
            to_host(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())),
            None,
        )

    def fetch(self) -> torch.UntypedStorage:
        if self.back is None:
            self.back = self.host.to(self.device, non_blocking=True, copy=True)
        back, self.readers = self.back, self.readers - 1
        if self.readers <= 0:
            self.back = None
        return back.untyped_storage()


def to_host(raw: torch.Tensor) -> torch.Tensor:
    """Bytes [n] -> their copy in host memory, pinned where there is a device."""
    host = torch.empty(raw.shape, dtype=raw.dtype, pin_memory=raw.device.type != "cpu")
    return host.copy_(raw, non_blocking=True)
