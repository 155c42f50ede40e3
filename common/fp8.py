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
    if out.stride(0) < out.stride(1):  # a piece of a stack: bytes are transposed faster than weights
        return dequantise(_transposed(stored), scale.t(), block[::-1], start[::-1], out.t())
    scale = scale[:, (start[1] + torch.arange(stored.shape[1], device=scale.device)) // block[1]]
    values = torch.empty(min(block[0], len(stored)), stored.shape[1], device=stored.device)
    for first in range(-(start[0] % block[0]), len(stored), block[0]):  # the rows of one block, which fit into a cache
        rows = slice(max(first, 0), first + block[0])
        part = _widen(stored[rows], values[: len(stored[rows])])
        out[rows].copy_(part.mul_(scale[(start[0] + first) // block[0]]))


def _transposed(stored: torch.Tensor) -> torch.Tensor:
    """Returns the transpose [n, m] of bytes [m, n] in memory. Four at a time are transposed first, which one thread does
    at 2.4 GB/s; then all threads part the fours. One thread transposes single bytes at 0.7 GB/s."""
    width = 4 if stored.shape[1] % 4 == 0 and stored.data_ptr() % 4 == 0 else 1
    words = stored.view(torch.int32 if width == 4 else torch.int8).t().contiguous().view(torch.int8)  # [n/4, m*4]
    return words.unflatten(1, (-1, width)).transpose(1, 2).flatten(0, 1).view(stored.dtype)


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
        columns = F.pad(values.amax(0), (0, scales.shape[1] * block[1] - values.shape[1]))
        return columns.unflatten(0, (-1, block[1])).amax(1)

    for i, rows in enumerate(weight.split(block[0])):
        part, values = stored[i * block[0] :][: len(rows)], rows.float()
        if scale is not None:
            scales[i] = scale[i]
            part.copy_(_divide(values, scale[i, column]))
            back = _widen(part, torch.empty_like(values)).mul_(scale[i, column]).to(rows.dtype)
            if back.equal(rows):
                continue
        new = largest(values.abs()) / LARGEST
        new.masked_fill_(new == 0, 1)
        scales[i] = new if scale is None else torch.where(largest(back != rows), new, scale[i])
        part.copy_(_divide(values, scales[i, column]))
    return stored, scales


def _divide(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns values / scale, in the range of float8_e4m3fn. A scale of zero counts as one: such a block is zero."""
    return (values / scale.masked_fill(scale == 0, 1)).clamp_(-LARGEST, LARGEST)


def _widen(stored: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copies float8_e4m3fn numbers to `out`, fp32. On CPUs, torch's own cast takes six times as long. It does not move
    the bits to those of fp16, which has the same form with a bias of 15 instead of 7: the numbers become 2^8 smaller."""
    codes = stored.view(torch.int8)
    if (codes | -128).max() == -1:  # NaN, codes 127 and 255, would become a number
        return out.copy_(stored)
    half = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))  # the sign came to bit 14, too
    return out.copy_(half.view(torch.float16)).mul_(256)
