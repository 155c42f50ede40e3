"""How far preferred answers, or videos, are ahead of the others while a preference is trained."""

import torch
import torch.distributed as dist

from common import device


class Margins:
    """The reward margins seen since the last call, which returns their mean and the share of pairs above 0."""

    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def __call__(self) -> dict[str, float]:
        """Collective. Ranks of one sample count alike, or (earlier pipeline stages) not at all."""
        margins = torch.cat([torch.zeros(0, device=device.current()), *self.seen])
        numbers = torch.stack((margins.sum(), (margins > 0).sum(), torch.ones_like(margins).sum()))
        dist.all_reduce(numbers)
        self.seen.clear()
        total, right, pairs = numbers.tolist()
        return {"margin": total / pairs, "accuracy": right / pairs}
