"""megatron-core's AdamW and its schedule, and the parts of one step as functions: zero, reduce, update."""

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from common import device, offload, ops, parallel
from common.cli import TrainOptions


def final_lr(o: TrainOptions) -> float:
    """Returns the last learning rate of the schedule: --min-lr if given, else 0, or --lr if the rate is constant."""
    return o.min_lr if o.min_lr is not None else (o.lr if o.lr_schedule == "constant" else 0.0)


def build_optimizer(o: TrainOptions, chunks: list[torch.nn.Module]):
    """Builds AdamW through megatron-core: fp32 master weights, fp32 or bf16 moments, sharded over data parallel.
    chunks: as `parallel.wrap` returns them."""
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
        overlap_param_gather=o.overlap_param_gather,
    )
    packs = o.moments == "bf16" or o.offload_optimizer or o.master_remainders
    # The option that sets this, use_precision_aware_optimizer, insists on Transformer Engine's optimizer.
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = o.offload_optimizer or o.master_remainders
    optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=dist.get_backend() != "fake")
    if o.overlap_param_gather:
        optimizer.__class__ = OverlappedOptimizer
    for inner in (each.optimizer for each in optimizer.chained_optimizers if packs or ops.BACKEND == "npu"):
        # PackedAdamW: megatron-core leaves such states to Transformer Engine's optimizer, and those in host memory to
        # an optimizer that updates on the host and takes no parameters on cpu.
        # ops.AdamW: the update is one kernel; torch_npu's own AdamW is a loop.
        inner.__class__ = PackedAdamW if packs else ops.AdamW
        if packs:
            inner.moments = {"fp32": torch.float32, "bf16": torch.bfloat16}[o.moments]
            inner.on_host, inner.remainders = o.offload_optimizer, o.master_remainders
    for group in optimizer.param_groups if not packs and ops.BACKEND != "npu" else ():
        group["fused"] = True  # torch's one-kernel AdamW; megatron-core 0.16 keeps torch's default, a loop
    return optimizer


class OverlappedOptimizer(ChainedOptimizer):
    """megatron-core's chain of optimizers (of dense parameters, of experts), for --overlap-param-gather: the all-gathers
    of the updated parameters start after the whole chain's update, and the next forward waits for them."""

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        parallel.finish_gathers(self.model_chunks)
        done = super().step_with_ready_grads()
        parallel.start_gathers(self.model_chunks)
        return done


class PackedAdamW(torch.optim.AdamW):
    """AdamW whose states take less of the device's memory. They are unpacked to fp32 and updated piece by piece.

    moments: the moments' dtype. bf16 takes 4 bytes a parameter instead of 8. bf16 moments are rounded stochastically.
    Rounded to nearest, a second moment could hardly fall: a step moves it by (1 - beta2) of its distance to g^2, which
    for beta2 = 0.999 is less than half of bf16's last place. The noise is a hash of the gradient's bits and the step.
    It is unbiased over the steps, and the same on every copy of a parameter and in a resumed run.

    on_host: the states wait in pinned host memory, those of bf16 parameters together with their fp32 weights. The
    copies are queued in the compute stream: the host never waits for them, and they do not overlap with the update.

    remainders: of the fp32 weight of a bf16 parameter only the remainder is kept, 2 bytes instead of 4 (`unite`).

    With the last two, the optimizer holds the fp32 weights itself, as state `master_param`, and updates the bf16
    parameter. megatron-core calls such an optimizer precision-aware (see `build_optimizer`): gradients are in
    `decoupled_grad`, and checkpoints read and write states through `get_unscaled_state` and `set_scaled_state`.
    """

    PIECE = 2**22  # elements in fp32 at a time: some 100 MiB, temporaries included
    moments, on_host, remainders = torch.float32, False, False

    @torch.no_grad()
    def step(self, closure=None):
        done = next((int(state["step"]) for state in self.state.values() if state), 0)  # equal for all parameters
        for group in self.param_groups:
            for p in (p for p in group["params"] if gradient(p) is not None):
                if not self.state[p]:
                    self.state[p] = self.new_state(p)
                state = self.state[p]
                packed = state.get("master_param", p), state["exp_avg"], state["exp_avg_sq"]
                flat = [ops.local(t).view(-1) for t in (p, gradient(p), *packed)]
                for weight, grad, *parts in zip(*(t.split(self.PIECE) for t in flat), strict=True):
                    self._step_piece(weight, grad, parts, done, group)
                state["step"] += 1

    def _step_piece(self, weight, grad, parts: list[torch.Tensor], done: int, group: dict) -> None:
        """Updates a piece [n]: the weight, and parts (what is kept of the fp32 weight, both moments), in place."""
        owns_master = weight.dtype == torch.float32
        master, *moments = ([weight] if owns_master else []) + [self._fetch(t) for t in parts[owns_master:]]
        if self.remainders and not owns_master:
            master = unite(weight, master)
        ops.adamw_(master, grad, *moments, done, group)
        if self.moments == torch.bfloat16:
            noise = grad.view(torch.int32) * -1640531535 + done * 97  # Fibonacci hashing; int32 wraps around
            noise = (noise ^ (noise >> 15)) * -2048144789
            for i, exact in enumerate(moments):
                exact.view(torch.int32).add_(noise >> 16 * i & 0xFFFF).bitwise_and_(-0x10000)
        if self.remainders and not owns_master:
            rounded, master = divide(master)
            weight.copy_(rounded)
        elif not owns_master:
            weight.copy_(master)
        for kept, value in zip(parts[owns_master:], [master, *moments][owns_master:], strict=True):
            if kept is not value:
                kept.copy_(value.to(kept.dtype), non_blocking=True)

    def _fetch(self, kept: torch.Tensor) -> torch.Tensor:
        """Returns a state's piece on the device: the remainder in int16, others in fp32. On cpu a piece of a state on
        the host is copied, too: so `common.memory` counts what it takes elsewhere."""
        if self.on_host:
            kept = kept.to(device.current(), non_blocking=True, copy=True)
        return kept if kept.dtype == torch.int16 else kept.float()

    def new_state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the first states of a parameter. p: as megatron-core hands it over, [n] or FSDP's DTensor."""
        keep = offload.to_host if self.on_host else lambda t: t
        state = {"step": torch.tensor(0.0), "exp_avg": keep(torch.zeros_like(p, dtype=self.moments))}
        state["exp_avg_sq"] = keep(torch.zeros_like(p, dtype=self.moments))
        if p.dtype == torch.float32 and (self.on_host or self.remainders):
            state["master_param"] = p
        elif self.on_host or self.remainders:
            state["master_param"] = keep(torch.zeros_like(p, dtype=torch.int16) if self.remainders else p.float())
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Does nothing. megatron-core hands over the optimizer's own states before it reads a checkpoint into them, and
        torch would cast them to the parameter's dtype and move them to its device."""

    def get_unscaled_state(self, p: torch.Tensor, name: str) -> torch.Tensor:
        """Returns a state as checkpoints hold it: `master_param` in fp32. Called by megatron-core."""
        device.synchronize()  # for states whose copy to the host is under way
        kept = self.state[p][name]
        return unite(p, kept.to(p.device)) if kept.dtype == torch.int16 else kept

    @torch.no_grad()
    def set_scaled_state(self, p: torch.Tensor, name: str, value: torch.Tensor) -> None:
        """Writes a state of a checkpoint: the inverse of `get_unscaled_state`. Called by megatron-core."""
        device.synchronize()
        if self.state[p][name].dtype == torch.int16:
            rounded, value = divide(value.to(p.device))
            p.copy_(rounded)
        self.state[p][name].copy_(value)


def unite(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Returns the fp32 numbers [n] whose bits are those of the bf16 weight [n], as the upper half, plus the remainder
    int16 [n]: the inverse of `divide`."""
    return ((weight.view(torch.int16).int() << 16) + remainder).view(torch.float32)


def divide(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Divides fp32 numbers [n] into bf16 numbers and the remainders of their bits, int16. No bit is lost.

    bf16 is the nearest number, and of two equally near ones the larger in size, where `.bfloat16()` takes the even one:
    the remainder of that one, +32768, is no int16.
    """
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def gradient(p: torch.Tensor) -> torch.Tensor | None:
    """Returns the fp32 gradient that megatron-core has prepared for a parameter of its inner optimizer."""
    return p.decoupled_grad if hasattr(p, "decoupled_grad") else p.grad


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
        grads = [gradient(p) for each in optimizer.chained_optimizers for p in each.get_parameters()]
        torch._foreach_mul_([ops.local(grad) for grad in grads if grad is not None], limit / (norm + 1e-6))
