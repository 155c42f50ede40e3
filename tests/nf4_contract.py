"""bitsandbytes' NF4 on CPU: `quantize_4bit` and `dequantize_4bit` with the library's signatures and a readable reference
(QLoRA, arXiv:2305.14314, section 3 and appendix E).

The codes are those of bitsandbytes. It keeps the 8-bit scales in a dynamic data type; here they are evenly spaced.
"""

import importlib.machinery
import importlib.util
import sys
import types

import torch

LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[n] -> [ceil(n / size), size], with zeros at the end."""
    return torch.nn.functional.pad(x, (0, -len(x) % size)).view(-1, size)


def quantize_4bit(
    A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_type="fp4", quant_storage=torch.uint8
):
    """Returns (codes uint8, two to a byte [ceil(n / 2), 1], state)."""
    assert (compress_statistics, quant_type, quant_storage, A.ndim) == (True, "nf4", torch.uint8, 1)
    values = blocks(A.float(), blocksize)
    scales = values.abs().amax(1)
    codes = torch.bucketize(values / scales.clamp(min=1e-30)[:, None], (LEVELS[1:] + LEVELS[:-1]) / 2).flatten()
    codes = codes[: len(A) + len(A) % 2].to(torch.uint8)
    offset = scales.mean()
    scales = blocks(scales - offset, 256)
    coarse = scales.abs().amax(1)
    eighth = (scales / coarse.clamp(min=1e-30)[:, None] * 127).round().to(torch.int8).flatten()
    eighth = eighth[: -(-len(A) // blocksize)].clone()
    outer = types.SimpleNamespace(absmax=coarse, blocksize=256)
    state = types.SimpleNamespace(
        absmax=eighth, state2=outer, offset=offset, blocksize=blocksize, dtype=A.dtype, n=len(A)
    )
    return (codes[::2] << 4 | codes[1::2]).unsqueeze(1), state


def dequantize_4bit(A, quant_state=None, absmax=None, out=None, blocksize=None, quant_type="fp4"):
    """Returns the weights [n] in the dtype that they had."""
    scales = (blocks(quant_state.absmax.float(), 256) / 127 * quant_state.state2.absmax[:, None]).flatten()
    scales = scales[: len(quant_state.absmax)] + quant_state.offset
    codes = torch.stack((A >> 4, A & 15), 1).flatten()[: quant_state.n]
    values = blocks(LEVELS[codes.int()], quant_state.blocksize) * scales[:, None]
    return values.flatten()[: quant_state.n].to(quant_state.dtype)


def install() -> None:
    """Stands in for bitsandbytes in this process where the library is not installed."""
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes"):
        return
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules["bitsandbytes.functional"].quantize_4bit = quantize_4bit
    sys.modules["bitsandbytes.functional"].dequantize_4bit = dequantize_4bit
