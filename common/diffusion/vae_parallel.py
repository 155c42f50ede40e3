"""Runs a causal VAE's decoder on several ranks, a strip of the latents' rows on each. The result is that of one rank.

A convolution of three rows needs one row of each neighbouring strip, so every such convolution first exchanges these
rows. Zero padding stands only outside the first and the last strip. An attention over a whole frame at latent
resolution gathers the strips, and every rank computes it. Everything else works row by row, including the causal
feature cache: it holds rows of the strip, and they are exchanged in the same way.

It is for diffusers' decoders whose convolutions are called as conv(x, cache_x), with the frames before x in cache_x.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def split_decoder(
    vae: nn.Module, attention: type[nn.Module], group: dist.ProcessGroup
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Changes `vae`'s decoder in place to work on strips, and returns the function to decode with. attention: the class
    of its attention blocks.

    The function takes latents [B, C, f, h, w] and returns pixels [B, 3, F, H, W], both whole on every rank of `group`;
    h is at least the number of ranks. After this, decode only with it.
    """
    rows: list[int] = []  # number of latent rows of each rank's strip, set at every call
    for parent in list(vae.decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, attention):
                setattr(parent, name, GatheredAttention(child, rows, group))
            elif isinstance(child, nn.Conv2d | nn.Conv3d) and child.kernel_size[-2] > 1:
                setattr(parent, name, StripConv(child, group))

    def decode(latents: torch.Tensor) -> torch.Tensor:
        rows[:] = [len(part) for part in torch.arange(latents.shape[3]).tensor_split(group.size())]
        strip = vae.decode(latents.split(rows, 3)[group.rank()]).sample
        scale = strip.shape[3] // rows[group.rank()]
        return gather_rows(strip, [scale * n for n in rows], group)

    return decode


class StripConv(nn.Module):
    """Applies a convolution of 3 x 3 pixels, which for video also looks at frames before, to a strip of rows."""

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, group: dist.ProcessGroup):
        super().__init__()
        if conv.kernel_size[-2:] != (3, 3) or conv.stride[-2:] != (1, 1):
            raise ValueError(f"{conv}; expected a decoder of 3x3 convolutions; fix: --no-vae-parallel")
        self.conv, self.group = conv, group

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        """Takes x [B, C, F, h, W] with the frames before it in cache_x, or an image [B, C, h, W]. Returns this strip's
        rows of the convolution of the whole, [B, C', F, h, W] or [B, C', h, W]."""
        weight, bias = self.conv.weight, self.conv.bias
        if x.ndim == 4:
            return F.conv2d(F.pad(add_neighbours(x, self.group), (1, 1)), weight, bias)
        before = self.conv.kernel_size[0] - 1  # causal: the number of earlier frames it reads
        if cache_x is not None:
            x, before = torch.cat((cache_x, x), 2), before - cache_x.shape[2]
        return F.conv3d(F.pad(add_neighbours(x, self.group), (1, 1, 0, 0, before, 0)), weight, bias)


class GatheredAttention(nn.Module):
    def __init__(self, attention: nn.Module, rows: list[int], group: dist.ProcessGroup):
        super().__init__()
        self.attention, self.rows, self.group = attention, rows, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns this strip's rows of the attention over all rows, [B, C, F, h, W] -> [B, C, F, h, W]."""
        return self.attention(gather_rows(x, self.rows, self.group)).split(self.rows, 3)[self.group.rank()]


def add_neighbours(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Adds the last row of the strip above and the first row of the strip below, or zeros at the edges of the picture:
    [..., h, W] -> [..., h + 2, W]."""
    above, below = (torch.zeros_like(x[..., :1, :], memory_format=torch.contiguous_format) for _ in range(2))
    exchanges = []
    for received, sent, peer in ((above, x[..., :1, :], group.rank() - 1), (below, x[..., -1:, :], group.rank() + 1)):
        if 0 <= peer < group.size():
            exchanges.append(dist.P2POp(dist.isend, sent.contiguous(), group=group, group_peer=peer))
            exchanges.append(dist.P2POp(dist.irecv, received, group=group, group_peer=peer))
    for request in dist.batch_isend_irecv(exchanges) if exchanges else ():
        request.wait()
    return torch.cat((above, x, below), -2)


def gather_rows(x: torch.Tensor, rows: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Gathers the strips [B, C, F, h, W] of `rows` rows each to the whole [B, C, F, sum(rows), W] on every rank."""
    padded = F.pad(x, (0, 0, 0, max(rows) - x.shape[3])).contiguous()  # all-gather needs equal shapes
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[..., :n, :] for part, n in zip(parts, rows, strict=True)], 3)
