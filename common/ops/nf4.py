"""Frozen weights in four bits: NF4 with double quantisation (QLoRA, arXiv:2305.14314, section 3), by bitsandbytes.

A block of 64 weights has one scale; 256 scales are kept in 8 bits each, with one fp32 scale of their own. So a weight
takes 1/2 + 1/64 + 4/(64 * 256) bytes (`PACKED_BYTES` of common/language/options.py).
"""

import torch

BLOCK = 64


class Packed:
    """A weight in NF4, in the place of the parameter that it was: with its shape, dtype, device and marks (how it is
    split over ranks). It never trains and has no gradient. `ops.linear` and `ops.grouped_matmul` take it as a weight."""

    def __init__(self, weight: torch.Tensor):
        from bitsandbytes.functional import quantize_4bit

        self.__dict__.update(vars(weight))
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        # Flat, because bitsandbytes 0.50.2 on CPU unpacks a matrix wrongly if a row is not a multiple of a block.
        flat = weight.detach().flatten()
        self.codes, self.state = quantize_4bit(flat, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")

    def __len__(self) -> int:
        return self.shape[0]

    def new_empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def unpack(self) -> torch.Tensor:
        """Returns the weight as it was, except for rounding."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.codes, self.state).view(self.shape)
