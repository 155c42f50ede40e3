"""megatron-core's AdamW and its schedule, and the parts of one step as functions: zero, reduce, update."""

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from common import ops
from common.cli import TrainOptions


def final_lr(o: TrainOptions) -> float:
    """Returns the last learning rate of the schedule: --min-lr if given, else 0, or --lr if the rate is constant."""
    return o.min_lr if o.min_lr is not None else (o.lr if o.lr_schedule == "constant" else 0.0)


def build_optimizer(o: TrainOptions, chunks: list[torch.nn.Module]):
    """Builds AdamW through megatron-core: fp32 master weights, fp32 or bf16 moments, sharded over data parallel."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=final_lr(o),
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.adam_eps,
        clip_grad=o.clip,
        bf16=o.precision == "bf16",
        params_dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[o.precision],
        use_distributed_optimizer=not o.fsdp,
    )
    optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=dist.get_backend() != "fake")
    if o.moments == "bf16" or ops.BACKEND == "npu":
        for each in optimizer.chained_optimizers:
            # SmallMoments: megatron-core's bf16 moments need Transformer Engine's optimizer.
            # ops.AdamW: the update is one kernel; torch_npu's own AdamW is a loop.
            each.optimizer.__class__ = SmallMoments if o.moments == "bf16" else ops.AdamW
    else:
        for group in optimizer.param_groups:
            group["fused"] = True  # torch's one-kernel AdamW; megatron-core 0.16 keeps torch's default, a loop
    return optimizer


class SmallMoments(torch.optim.AdamW):
    """AdamW that keeps its moments in bf16, 4 bytes a parameter instead of 8, and updates them in fp32, piece by piece.

    Moments are rounded stochastically. Rounded to nearest, a second moment could hardly fall: a step moves it by
    (1 - beta2) of its distance to g^2, which for beta2 = 0.999 is less than half of bf16's last place. The noise is a
    hash of the gradient's bits and the step. It is unbiased over the steps, and the same on every copy of a parameter
    and in a resumed run.
    """

    moments, PIECE = torch.bfloat16, 2**22  # elements in fp32 at a time: some 100 MiB, temporaries included

    @torch.no_grad()
    def step(self, closure=None):
        done = next((int(state["step"]) for state in self.state.values() if state), 0)  # equal for all parameters
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p, dtype=self.moments)}
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=self.moments)
                flat = [ops.local(t).view(-1) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
                for weight, grad, *moments in zip(*(t.split(self.PIECE) for t in flat), strict=True):
                    moments_fp32 = [moment.float() for moment in moments]
                    ops.adamw_(weight, grad, *moments_fp32, done, group)
                    noise = grad.view(torch.int32) * -1640531535 + done * 97  # Fibonacci hashing; int32 wraps around
                    noise = (noise ^ (noise >> 15)) * -2048144789
                    for i, (moment, exact) in enumerate(zip(moments, moments_fp32, strict=True)):
                        exact.view(torch.int32).add_(noise >> 16 * i & 0xFFFF).bitwise_and_(-0x10000)
                        moment.copy_(exact)
                state["step"] += 1


def build_scheduler(o: TrainOptions, optimizer) -> OptimizerParamScheduler:
    """Builds the schedule of the learning rate by optimizer step. `.step(n)` moves it n steps on."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=final_lr(o),
        lr_warmup_steps=o.warmup,
        lr_decay_steps=o.steps + 1,  # ends one step after the last step, which would otherwise train at rate 0
        lr_decay_style=o.lr_schedule,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=max(1, o.steps // 10),
        lr_wsd_decay_style="linear",
    )


def zero_gradients(chunks: list[torch.nn.Module], optimizer) -> None:
    """Clears all gradients. It must be called before each `forward` with a backward."""
    for chunk in chunks:
        if hasattr(chunk, "zero_grad_buffer"):  # FSDP2 has no gradient buffer
            chunk.zero_grad_buffer()
    optimizer.zero_grad()


def reduce_gradients(optimizer) -> float:
    """Hands the gradients of a backward to the optimizer and returns their norm over all parameters of the model."""
    optimizer.prepare_grads()
    return optimizer.get_grad_norm()


def update(optimizer, limit: float, norm: float) -> None:
    """Clips the gradients, whose norm is `norm`, to the norm `limit` (0: no limit) and applies one optimizer step."""
    clip_gradients(optimizer, limit, norm)
    optimizer.step_with_ready_grads()


def clip_gradients(optimizer, limit: float, norm: float) -> None:
    """Scales an optimizer's prepared gradients from the norm `norm` to at most `limit` (0: no limit).
    Without apex, megatron-core's own clipping would copy each gradient."""
    if 0 < limit < norm + 1e-6:
        parameters = [p for each in optimizer.chained_optimizers for p in each.get_parameters()]
        torch._foreach_mul_([ops.local(p.grad) for p in parameters if p.grad is not None], limit / (norm + 1e-6))
