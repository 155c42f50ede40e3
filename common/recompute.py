"""Selective recomputation: a block keeps the inputs of its cheap pieces, and computes the pieces again in the backward.

A model names a piece where it calls it: `recomputed(ops.swiglu, gate, up)` is `ops.swiglu(gate, up)`. Inside
`Recomputation`, autograd then saves neither the piece's output nor what lies within it. The linears and the attention
that read the output save a note instead: which piece, and which part of its output.

In the backward, the first operation that asks for its note computes the piece again, from the same inputs and with the
same kernels. So the gradients are bitwise those without recomputation. Autograd runs the readers of an output before the
piece itself. So nothing has to say when to compute, and the graph is the ordinary one: no second backward pass runs
inside the first. An input that is another piece's output is itself computed again.

A piece is worth its name if it costs little and its output is saved, as the input of a linear is. If nobody saves the
output (a frozen linear does not), the piece is left as it is. Random numbers must not be drawn in a piece. megatron-core
does the same (`CheckpointWithoutOutput`), but runs each piece as a graph of its own and restores random states.
"""

import functools
from collections.abc import Callable

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from common.offload import OffloadActivations

_running: "Recomputation | None" = None  # that of the block whose forward runs


def recomputed(function: Callable, *args):
    """Returns function(*args), a tensor or a tuple of tensors. Inside `Recomputation`, it is computed again in the
    backward. Tensors that the function uses are its arguments, parameters excepted; it does not change them."""
    return function(*args) if _running is None else _running.run(function, args)


class Recomputation(saved_tensors_hooks):
    """Context manager for the forward of one block. offload: what is kept waits in host memory."""

    def __init__(self, offload: OffloadActivations | None = None):
        # Detached: a node that saves its own output would else hold itself.
        keep, bring = (offload.pack_hook, offload.unpack_hook) if offload else (torch.Tensor.detach, lambda kept: kept)
        self.keep, self.bring = keep, bring
        self.inside: _Piece | None = None
        self.pieces: list[_Piece] = []
        self.outputs: dict[int, tuple] = {}  # storage -> (weak reference to it, dtype, its piece, number of the output)
        super().__init__(self._pack, lambda kept: kept() if isinstance(kept, functools.partial) else bring(kept))

    def run(self, function: Callable, args: tuple):
        if self.inside is not None:
            return function(*args)
        piece = self.inside = _Piece(function, args, self.bring)
        result = function(*args)
        self.inside = None
        self.pieces.append(piece)
        inputs = [x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)]
        for number, output in enumerate(result if isinstance(result, tuple) else (result,)):
            storage = StorageWeakRef(output.untyped_storage())  # while it exists, no other storage has the address
            if storage.cdata not in inputs:
                self.outputs[storage.cdata] = storage, output.dtype, piece, number
        return result

    def _pack(self, tensor: torch.Tensor):
        """Returns what autograd keeps of a tensor that an operation saves."""
        if self.inside is not None:
            return self.inside.note(tensor)
        _, dtype, piece, number = self.outputs.get(tensor.untyped_storage()._cdata, (None, None, None, None))
        if dtype != tensor.dtype:
            return self.keep(tensor)
        if not piece.dropped:
            piece.drop(self._pack)
        piece.readers += 1
        return functools.partial(piece.output, number, tensor.size(), tensor.stride(), tensor.storage_offset())

    def __enter__(self) -> None:
        global _running
        _running = self
        super().__enter__()

    def __exit__(self, *error) -> None:
        global _running
        super().__exit__(*error)
        _running = self.pack_hook = None
        for piece in self.pieces:
            if not piece.dropped:
                piece.stay(self.keep)
        self.pieces, self.outputs = [], {}


class _Piece:
    """One call of a function. `saved`: what its operations save, in order. Until the first reader of an output it keeps
    these tensors; from then on its arguments alone, and in the backward each tensor until it is asked for."""

    def __init__(self, function: Callable, args: tuple, bring: Callable):
        self.function, self.args, self.bring = function, args, bring
        self.saved: list = []
        self.outputs: list[torch.Tensor] | None = None
        self.dropped, self.readers = False, 0

    def note(self, tensor: torch.Tensor) -> functools.partial:
        self.saved.append(tensor.detach())
        return functools.partial(self.inner, len(self.saved) - 1)

    def drop(self, pack: Callable) -> None:
        self.dropped, self.saved = True, [None] * len(self.saved)
        self.args = [
            functools.partial(_argument, self.bring, pack(x), x.requires_grad) if isinstance(x, torch.Tensor) else x
            for x in self.args
        ]

    def stay(self, keep: Callable) -> None:
        self.saved, self.function, self.args = [keep(tensor) for tensor in self.saved], None, ()

    def inner(self, number: int) -> torch.Tensor:
        """Returns what an operation of the piece saved."""
        if not self.dropped:
            return self.bring(self.saved[number])
        if self.saved[number] is None:
            self.compute()
        tensor, self.saved[number] = self.saved[number], None
        return tensor

    def output(self, number: int, *view) -> torch.Tensor:
        """Returns a view, (size, stride, offset), of an output."""
        if self.outputs is None:
            self.compute()
        whole, self.readers = self.outputs[number], self.readers - 1
        if self.readers <= 0:
            self.outputs = None
        return whole.as_strided(*view)

    def compute(self) -> None:
        saved: list[torch.Tensor] = []
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: saved.append(tensor.detach()), _refuse):
            result = self.function(*(x() if isinstance(x, functools.partial) else x for x in self.args))
        assert len(saved) == len(self.saved), f"{self.function}: saves {len(saved)} tensors, saved {len(self.saved)}"
        self.saved = saved
        self.outputs = [output.detach() for output in (result if isinstance(result, tuple) else (result,))]


def _argument(bring: Callable, kept, requires_grad: bool) -> torch.Tensor:
    tensor = kept() if isinstance(kept, functools.partial) else bring(kept)
    return tensor.detach().requires_grad_(requires_grad)


def _refuse(_) -> torch.Tensor:
    raise AssertionError("nothing is differentiated through a recomputed piece")
