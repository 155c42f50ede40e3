"""Reward margins of preference training: how far the preferred answer or video is ahead of the other."""

import torch
import torch.distributed as dist

from common import device


class Margins:
    """Collects reward margins. A call returns the mean of those since the last call, and the share of pairs above 0."""

    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def __call__(self) -> dict[str, float]:
        """Collective. All ranks that work on a sample have seen the same margins, or (earlier pipeline stages) none."""
        margins = torch.cat([torch.zeros(0, device=device.current()), *self.seen])
        numbers = torch.stack((margins.sum(), (margins > 0).sum(), torch.ones_like(margins).sum()))
        dist.all_reduce(numbers)
        self.seen.clear()
        total, right, pairs = numbers.tolist()
        return {"margin": total / pairs, "accuracy": right / pairs}
