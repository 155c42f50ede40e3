"""Train Qwen3: data, model, objective, loop.

bash zoo/qwen3/pretrain.sh                                                # laptop: tiny model, docstrings of Python
NPROC=8 bash zoo/qwen3/pretrain.sh --size 8B --weights Qwen3-8B-Base --data corpus
"""

from collections.abc import Iterator

from common import device  # noqa: F401  isort: skip  (before megatron)
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from common import parallel

from .model import load_balancing_loss

# --------------------------------------------------------------------------------------------------------- objective


def forward_step(iterator: Iterator[dict], model: torch.nn.Module):
    """One micro-batch through one model chunk, as megatron-core's schedules want it."""
    batch = next(iterator)
    output = model(*(batch[k] for k in ("tokens", "positions", "cu_seqlens", "rows", "labels", "weight")))
    return output, lambda output: loss(output, batch, model)


def loss(output: tuple, batch: dict, model: torch.nn.Module) -> tuple[torch.Tensor, dict]:
    """The cross entropy of this rank's tokens, weighted (see `weighted`) so that summing over context parallel ranks,
    and averaging over micro-batches and data parallel ranks, gives the mean over every labelled token of the global
    batch: a document counts by its tokens, wherever packing has put it. For experts also aux * load-balancing loss."""
    value, routing = output
    chunk = parallel.unwrapped(model)
    tp = chunk.config.tensor_model_parallel_size
    # Every tp rank has computed the same number; global_loss takes the mean over them unless they hold other tokens.
    reported = value.detach() / (tp if chunk.config.sequence_parallel else 1)
    if batch["aux"]:  # tp ranks hold the same logits, whose gradients are summed
        value = value + batch["aux"] / tp * load_balancing_loss(routing, chunk.qwen.num_experts_per_tok)
    return value, {"loss": reported.clone()}  # the schedule scales the first one in place


def weighted(micro_batches: list[dict], dp: int, aux: float = 0.0) -> list[dict]:
    """Adds to each micro-batch the weight of its tokens, fp32 [T]: micro-batches * dp / (labelled tokens of the whole
    global batch). The count is summed on the device: nothing waits for it."""
    count = torch.stack([(b["labels"] >= 0).sum() for b in micro_batches]).sum(0, keepdim=True).float()
    if dp > 1:
        dist.all_reduce(count, group=mpu.get_data_parallel_group())
    scale = len(micro_batches) * dp / count
    return [b | {"weight": (b["labels"] >= 0) * scale, "aux": aux} for b in micro_batches]
