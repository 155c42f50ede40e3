"""Weights stored as float8_e4m3fn with one fp32 scale per block: a weight is its stored number times its block's scale.

The product is taken in fp32 and rounded once, so that a bf16 model gets what the releases' own conversion gives. Blocks
at the ends of a tensor may be cut short.
"""

import torch
import torch.nn.functional as F

LARGEST = 448.0  # of float8_e4m3fn, which has no infinity: from 464 on a cast gives NaN


def dequantise(
    stored: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], start: tuple[int, int], out: torch.Tensor
) -> None:
    """Writes weights to `out` [m, n], which may have any dtype and any strides.

    stored: float8_e4m3fn [m, n], the part of a tensor that begins at row and column `start`. scale: fp32, of all blocks
    of that tensor. block: rows and columns of one.
    """
    scale = scale[:, (start[1] + torch.arange(stored.shape[1], device=scale.device)) // block[1]]
    for first in range(-(start[0] % block[0]), len(stored), block[0]):  # the rows of one block, which fit into a cache
        rows = slice(max(first, 0), first + block[0])
        out[rows].copy_(stored[rows].float().mul_(scale[(start[0] + first) // block[0]]))


def quantise(
    weight: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weights as float8_e4m3fn [m, n], and the fp32 scale of each block [ceil(m / rows), ceil(n / columns)].

    A block keeps its scale in `scale`, if that gives back each of its weights exactly. Otherwise its scale is its
    largest magnitude / 448, or 1 if all its weights are zero. weight: [m, n] of any dtype.
    """
    column = torch.arange(weight.shape[1]) // block[1]
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty([-(-n // size) for n, size in zip(weight.shape, block, strict=True)])
    assert scale is None or scale.shape == scales.shape, f"scales {list(scale.shape)} of {list(scales.shape)} blocks"

    def largest(values: torch.Tensor) -> torch.Tensor:  # of each block: [rows, n] -> [blocks]
        whole = F.pad(values, (0, scales.shape[1] * block[1] - values.shape[1]))
        return whole.unflatten(1, (-1, block[1])).amax((0, 2))

    for i, rows in enumerate(weight.split(block[0])):
        part, values = stored[i * block[0] :][: len(rows)], rows.float()
        scales[i] = largest(values.abs()) / LARGEST
        scales[i].masked_fill_(scales[i] == 0, 1)
        if scale is not None:
            part.copy_(_divide(values, scale[i, column]))
            exact = (part.float() * scale[i, column]).to(rows.dtype) == rows
            scales[i] = torch.where(largest(~exact), scales[i], scale[i])
        part.copy_(_divide(values, scales[i, column]))
    return stored, scales


def _divide(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns values / scale, in the range of float8_e4m3fn. A scale of zero counts as one: such a block is zero."""
    return (values / scale.masked_fill(scale == 0, 1)).clamp_(-LARGEST, LARGEST)
