"""The fused ops: one plain function each, dispatched explicitly to npu (torch_npu), cuda or the reference.

The npu branch calls `torch.ops.npu.<op>` with the published argument names of torch_npu 2.13, so it also runs over
the contract the tests register on CPU. That is a contract check, not a run on Ascend.

Shape legend: L tokens, B batch, H heads, E head dim, D hidden. Tokens come first, as megatron-core's sequence
parallel wants them. Statistics and modulations are computed in fp32 whatever the input dtype.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu

from common import device

BACKEND = device.KIND  # tests switch it to "npu" over the op contract


def attention(q_LBHE: torch.Tensor, k_SBHE: torch.Tensor, v_SBHE: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(E)) v, every query seeing every key.

    q [L, B, H, E], k and v [S, B, H, E], one dtype -> [L, B, H, E] contiguous.
    """
    H, E = q_LBHE.shape[2:]
    if BACKEND == "npu":
        q, k, v = (t.flatten(2) for t in (q_LBHE, k_SBHE, v_SBHE))  # [L, B, H*E], the layout SBH
        return torch.ops.npu.npu_fusion_attention(q, k, v, H, "SBH", scale=E**-0.5)[0].unflatten(2, (H, E))
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_LBHE, k_SBHE, v_SBHE))  # [B, H, L, E] views
    return F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).contiguous()


def attention_with_lse(
    q_BHLE: torch.Tensor, k_BHSE: torch.Tensor, v_BHSE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over one block of keys, and what is needed to merge it with other blocks.

    q [B, H, L, E], k and v [B, H, S, E] -> out [B, H, L, E], lse = log sum_s exp(q k_s / sqrt(E)) [B, H, L] fp32.
    Not differentiable by itself: `parallel.ring_attention` pairs it with `attention_backward`.
    """
    H, E = q_BHLE.shape[1], q_BHLE.shape[3]
    if BACKEND == "npu":
        out, peak, total, *_ = torch.ops.npu.npu_fusion_attention(q_BHLE, k_BHSE, v_BHSE, H, "BNSD", scale=E**-0.5)
        return out, (peak + total.log())[..., 0]  # both come as [B, H, L, 8], eight equal columns
    if BACKEND == "cuda":
        return torch.ops.aten._scaled_dot_product_flash_attention(q_BHLE, k_BHSE, v_BHSE)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_BHLE, k_BHSE, v_BHSE)


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (dq, dk, dv) of one key block, given the output and lse over *all* blocks. Shapes as above."""
    if BACKEND == "npu":
        peak = lse.unsqueeze(-1).expand(*lse.shape, 8).contiguous()
        return torch.ops.npu.npu_fusion_attention_grad(
            q,
            k,
            v,
            dout,
            q.shape[1],
            "BNSD",
            softmax_max=peak,
            softmax_sum=torch.ones_like(peak),
            attention_in=out,
            scale_value=q.shape[3] ** -0.5,
        )[:3]
    if BACKEND == "cuda":
        none = torch.empty(0, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, none, none
        )
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, False)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, tp_size: int = 1) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, [..., D/tp] -> [..., D/tp].

    With tp_size > 1 the last dimension is one tensor-parallel shard of the normalised width: one sum per row is
    reduced over the tensor-parallel group in the forward, and one in the backward.
    """
    if tp_size == 1 and BACKEND == "npu":
        return torch.ops.npu.npu_rms_norm(x, weight, epsilon=eps)[0]
    if tp_size == 1 and BACKEND == "cuda":
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps, tp_size)


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = (sum(x^2) / D + eps)^-1/2; dx = r (dy w - x r^2 sum(dy w x) / D), dw = sum(dy x r)."""

    @staticmethod
    def forward(ctx, x, weight, eps, tp_size):
        ctx.tp_size, wide = tp_size, x.float()
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse = _tp_sum(squares, tp_size).div_(x.shape[-1] * tp_size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, inverse = ctx.saved_tensors
        dy, normed, wide_weight = dy.float(), x.float() * inverse, weight.float()
        product = dy * normed
        along = _tp_sum((product @ wide_weight).unsqueeze(-1), ctx.tp_size).div_(-x.shape[-1] * ctx.tp_size)
        dx = (dy * wide_weight).addcmul_(normed, along).mul_(inverse)
        return dx.to(x.dtype), product.flatten(0, -2).sum(0).to(weight.dtype), None, None


def _tp_sum(x: torch.Tensor, tp_size: int) -> torch.Tensor:
    """In place: the sum over the tensor-parallel group."""
    if tp_size > 1:
        dist.all_reduce(x, group=mpu.get_tensor_model_parallel_group())
    return x


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over the last dimension with fp32 statistics, [..., D] -> [..., D]."""
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


def layer_norm_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """adaLN: LayerNorm(x) without affine * (1 + scale) + shift. x [L, B, D], scale and shift fp32 [B, D]."""
    return _LayerNormModulate.apply(x, scale, shift, eps)


class _LayerNormModulate(torch.autograd.Function):
    """y = n (1 + scale) + shift, n = (x - mean) r; dscale = sum of dy n, dshift = sum of dy, both over tokens; dx is
    LayerNorm's for dy (1 + scale). Keeps x in its own dtype and computes n again."""

    @staticmethod
    def forward(ctx, x, scale, shift, eps):
        normed, mean, inverse = torch.native_layer_norm(x.float(), x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, scale, mean, inverse)
        return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, scale, mean, inverse = ctx.saved_tensors
        wide, dy = x.float(), dy.float()
        dscale = torch.addcmul(-mean * inverse, wide, inverse).mul_(dy).sum(0)
        dx = torch.ops.aten.native_layer_norm_backward(
            dy * (1 + scale), wide, x.shape[-1:], mean, inverse, None, None, [True, False, False]
        )[0]
        return dx.to(x.dtype), dscale, dy.sum(0), None


def gate_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + y * gate in fp32, rounded once. x and y [L, B, D], gate fp32 [B, D]."""
    return _GateResidual.apply(x, y, gate)


class _GateResidual(torch.autograd.Function):
    """dx = dout, dy = dout gate, dgate = sum over tokens of dout y; keeps y in its own dtype."""

    @staticmethod
    def forward(ctx, x, y, gate):
        ctx.save_for_backward(y, gate)
        return torch.addcmul(x.float(), y.float(), gate).to(x.dtype)

    @staticmethod
    def backward(ctx, dout):
        (y, gate), wide = ctx.saved_tensors, dout.float()
        return dout, (wide * gate).to(y.dtype), (wide * y.float()).sum(0)


def rotary_interleaved(x_LBHE: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x_0, x_1), (x_2, x_3), ... of the head dimension, in fp32.

    x [L, B, H, E]; rope [L, 1, 1, E/2, 2] fp32 holds (cos, sin) of each pair's angle -> [L, B, H, E].
    """
    if BACKEND == "npu":
        cos, sin = (rope[..., i].repeat_interleave(2, dim=-1) for i in (0, 1))  # [L, 1, 1, E]
        return torch.ops.npu.npu_rotary_mul(x_LBHE, cos.to(x_LBHE.dtype), sin.to(x_LBHE.dtype), "interleave")
    pairs = torch.view_as_complex(x_LBHE.float().unflatten(-1, (-1, 2)))  # [L, B, H, E/2]
    return torch.view_as_real(pairs * torch.view_as_complex(rope)).flatten(-2).to(x_LBHE.dtype)
