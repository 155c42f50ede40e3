"""The fused ops: one plain function each, dispatched explicitly to npu (torch_npu), cuda or the reference.

    python -m common.ops          self-test and speed table of every op on this device, see common/ops_speed.py

npu calls `torch.ops.npu.<op>` with the published argument names of torch_npu 2.13, so it also runs over the contract
that the tests register on CPU. That is a contract check, not a run on Ascend.
cuda calls torch's fused op where there is one, else a Triton kernel of `kernels/`, which only cuda imports.
cpu is the readable reference, against which the other two are tested.

Shape legend: L tokens of the queries, S of the keys, B batch, H heads, K heads of keys and values (H a multiple of K),
E head dim of queries and keys, V that of values or the vocabulary, D hidden, F its expansion, N tokens without a batch,
G groups. Tokens come first, as megatron-core's sequence parallel wants them. Statistics, modulations, rotations and
losses are computed in fp32 whatever the input dtype; results come back in the input's dtype.
"""

import functools
import inspect
import itertools
import math
import os
from typing import NamedTuple

from common import device  # isort: skip  (before megatron)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.optim.adamw import adamw

from common.ops import flash4, nf4

BACKEND = device.KIND  # tests set it to "npu" to run over the op contract

# ---------------------------------------------------------------------------------------------------------- attention


class Bounds(NamedTuple):
    """The bounds [0, ..., T] of sequences packed along T tokens, in the forms that the kernels take. `pack_bounds` makes
    them once per micro-batch."""

    on_host: list[int]  # [n + 1]
    on_device: torch.Tensor  # int32 [n + 1]
    tokens: int  # T
    longest: int  # tokens of the longest sequence
    rows: int  # n if all sequences have one length, else 0


def pack_bounds(cu_seqlens: list[int], where: torch.device) -> Bounds:
    """Returns bounds, host integers [0, ..., T], for attention on the device `where`. It is called outside of what
    torch.compile traces: tracing refuses pinned memory, and would compile anew for each micro-batch's integers.

    Raises:
        ValueError: the bounds do not rise from 0.
    """
    lengths = [b - a for a, b in itertools.pairwise(cu_seqlens)]
    if cu_seqlens[0] != 0 or min(lengths) < 0:
        raise ValueError(f"bounds {cu_seqlens}; expected rising numbers from 0")
    on_device = torch.tensor(cu_seqlens, dtype=torch.int32)
    if where.type == "cuda":  # elsewhere no kernel reads them
        on_device = on_device.pin_memory().to(where, non_blocking=True)
    rows = len(lengths) if len(set(lengths)) == 1 else 0
    return Bounds(cu_seqlens, on_device, cu_seqlens[-1], max(lengths), rows)


@torch.compiler.assume_constant_result
@functools.cache
def attention_kernel() -> str:
    """Returns which library computes attention in fp16 and bf16 here. It is chosen once: on cuda FlashAttention-4 if it
    is installed and the card can run it, else cuDNN, else FlashAttention-2. `ZOO_ATTENTION` overrides the choice.

    Raises:
        ValueError: ZOO_ATTENTION is none of flash4, cudnn and flash2, or cannot run here.
    """
    if BACKEND != "cuda":
        return {"npu": "npu_fusion_attention", "cpu": "torch SDPA"}[BACKEND]
    wanted = os.environ.get("ZOO_ATTENTION", "")
    if wanted not in ("", *ATTENTION_NAMES):
        names = ", ".join(ATTENTION_NAMES)
        raise ValueError(f"ZOO_ATTENTION={wanted!r}; expected one of {names}; fix: export ZOO_ATTENTION=cudnn")
    if wanted == "flash4" and flash4.refusal():
        raise ValueError(f"ZOO_ATTENTION=flash4: {flash4.refusal()}; fix: pip install --pre flash-attn-4, or unset it")
    if not wanted:
        has_cudnn = torch.backends.cudnn.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        wanted = "flash4" if flash4.refusal() is None else "cudnn" if has_cudnn else "flash2"
    return ATTENTION_NAMES[wanted]


def describe_attention() -> str:
    """Says in words which library `attention_kernel` has chosen, and why not FlashAttention-4."""
    kernel = attention_kernel()
    if os.environ.get("ZOO_ATTENTION"):
        why = ", as ZOO_ATTENTION says"
    elif BACKEND == "cuda" and flash4.refusal():
        why = f": {flash4.refusal()}"
    else:
        why = ""
    rest = {
        "cuDNN": ", on FlashAttention-2 in a ring and where sequences of unlike lengths share a row",
        "FlashAttention-4": ", on torch's own kernels for head dims above 128 (but 192 with values of 128) or no multiple "
        "of 8",
    }.get(kernel, "")
    return kernel + rest + why


ATTENTION_NAMES = {"flash4": "FlashAttention-4", "cudnn": "cuDNN", "flash2": "FlashAttention-2"}


def attention(
    q_LBHE: torch.Tensor,
    k_SBKE: torch.Tensor,
    v_SBKV: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    bounds: Bounds | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Returns softmax(scale q k^T) v over the keys that each query may see, [L, B, H, V] contiguous.

    q [L, B, H, E], k [S, B, K, E], v [S, B, K, V], one dtype, V <= E; H/K query heads share a key head. scale: None is
    1/sqrt(E). With a mask, the last query is aligned with the last key:
      causal   query i sees key j if j <= i + S - L
      window   (left, right): also i + S - L - left <= j <= i + S - L + right; -1 is no bound
      bounds   of sequences packed along L = S with B = 1, none of which sees another

    A kernel that takes only V = E gets v with zeros behind it. `_takes_widths` says which those are, and the cost.
    """
    if causal:
        window = (-1, 0) if window is None else (window[0], 0)
    (L, B), S = q_LBHE.shape[:2], len(k_SBKE)
    if bounds is not None and (B != 1 or S != L or bounds.tokens != L):
        raise ValueError(f"bounds end at {bounds.tokens} for q {tuple(q_LBHE.shape)}; expected its tokens, and B = 1")
    by_sdpa = (window is None or window == (-1, 0) and S == L) and (bounds is None or bounds.rows > 0)
    if not _takes_widths(q_LBHE, v_SBKV, by_sdpa):
        wide = _widened(v_SBKV, q_LBHE)
        out = attention(q_LBHE, k_SBKE, wide, window=window, bounds=bounds, scale=scale)
        return out[..., : v_SBKV.shape[-1]].contiguous()
    if bounds is None:
        attend = _attention_npu if BACKEND == "npu" else _attention_dense
        return attend(q_LBHE, k_SBKE, v_SBKV, window, scale).contiguous()
    return _attention_packed(q_LBHE, k_SBKE, v_SBKV, window, bounds, scale).contiguous()


# Whether values narrower than the keys go to npu_fusion_attention as they are. Not yet tried on a device: torch_npu 2.13
# infers the result's shape for them, but its documentation says both Dk >= Dv and that key and value have one shape.
NARROW_ON_NPU = False


def _takes_widths(q, v, by_sdpa: bool) -> bool:
    """Returns whether the kernel that is called here takes values [..., V] narrower than the queries [..., E].

      npu   npu_fusion_attention: no, until NARROW_ON_NPU
      cuda  FlashAttention-4 and cuDNN: E = 192 with V = 128, the former also all widths to 128, the latter only on Hopper
            and Blackwell and where the call is SDPA's (`by_sdpa`). FlashAttention-2: no. fp32: yes
      cpu   torch's fused SDPA: no, and its plain one would write all scores

    Where it does not, v gets E - V zeros. At 192 and 128, this is 1.2 times the forward's FLOPs, and 5E / (3E + 2V) =
    1.15 times the backward's. It also copies v and the result, and their gradients.
    """
    E, V = q.shape[-1], v.shape[-1]
    if V == E:
        return True
    if BACKEND != "cuda":
        return BACKEND == "npu" and NARROW_ON_NPU
    if not _takes_flash(q) or (attention_kernel() == "FlashAttention-4" and flash4.takes(q, v)):
        return True
    return by_sdpa and attention_kernel() != "FlashAttention-2" and _cudnn_takes(E, V)


@functools.cache
@torch.compiler.assume_constant_result  # below the cache, through which torch.compile looks
def _cudnn_takes(E: int, V: int) -> bool:
    """Returns whether torch would run cuDNN's attention, and its backward, with these widths on this card."""
    of = {"dtype": torch.bfloat16, "device": device.current(), "requires_grad": True}
    q, v = (torch.empty(1, 1, 64, width, **of) for width in (E, V))
    return torch.backends.cuda.can_use_cudnn_attention(torch.backends.cuda.SDPAParams(q, q, v, None, 0.0, True, False))


def _widened(v, q):
    """Returns v [..., V] with zeros behind it, as wide as q [..., E]."""
    added = q.shape[-1] - v.shape[-1]
    assert added >= 0, f"values of width {v.shape[-1]} for queries of width {q.shape[-1]}"
    return F.pad(v, (0, added))


def _attention_dense(q, k, v, window, scale):
    """Returns [L, B, H, V], in the memory layout of q where the kernel allows."""
    if not _takes_flash(q):
        return _attention_plain(q, k, v, window, scale)
    if attention_kernel() == "FlashAttention-4" and flash4.takes(q, v):
        return flash4.attention(*(t.transpose(0, 1) for t in (q, k, v)), window, scale=scale)[0].transpose(0, 1)
    if window is not None and (window != (-1, 0) or len(k) != len(q)):  # SDPA would need the mask as a tensor
        (L, B), S = q.shape[:2], len(k)
        bounds = [pack_bounds(list(range(0, B * n + 1, n)), q.device) for n in (L, S)]
        q, k, v = (t.transpose(0, 1).flatten(0, 1) for t in (q, k, v))  # [B*L, H, E]
        return _attention_varlen(q, k, v, window, *bounds, scale).unflatten(0, (B, L)).transpose(0, 1)
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if attention_kernel() != "FlashAttention-2":
        order.insert(0, SDPBackend.CUDNN_ATTENTION)
    with sdpa_kernel(order, set_priority=True):
        return _attention_plain(q, k, v, window, scale)


def _attention_packed(q, k, v, window, bounds: Bounds, scale):
    if not _takes_flash(q):
        return _attention_by_sequence(q, k, v, window, bounds, scale)
    if bounds.rows:  # a batch: the kernels for sequences of any lengths are slower
        rows = (t.view(bounds.rows, -1, *t.shape[2:]).transpose(0, 1) for t in (q, k, v))  # [L/n, n, H, E] views
        return _attention_dense(*rows, window, scale).transpose(0, 1).flatten(0, 1).unsqueeze(1)
    q, k, v = (t.squeeze(1) for t in (q, k, v))  # [L, H, E]
    if attention_kernel() == "FlashAttention-4" and flash4.takes(q, v):
        return flash4.attention(q, k, v, window, bounds.on_device, bounds.longest, scale)[0].unsqueeze(1)
    return _attention_varlen(q, k, v, window or (-1, -1), bounds, bounds, scale).unsqueeze(1)


@torch.compiler.disable  # tracing would compile anew for each micro-batch's bounds
def _attention_by_sequence(q, k, v, window, bounds: Bounds, scale):
    if BACKEND == "npu":
        return _attention_npu(q, k, v, window, scale, bounds.on_host)
    lengths = [b - a for a, b in itertools.pairwise(bounds.on_host)]
    # Split, not sliced: the backward of each sequence's slice would fill a gradient of all L tokens.
    sequences = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([_attention_plain(*each, window, scale) for each in sequences])


def _takes_flash(q: torch.Tensor) -> bool:
    """Returns whether flash attention's kernels on cuda take q: not in fp32."""
    return BACKEND == "cuda" and q.dtype in (torch.float16, torch.bfloat16)


def _attention_plain(q, k, v, window, scale):
    L, S, grouped = q.shape[0], k.shape[0], q.shape[2] != k.shape[2]
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))  # [B, H, L, E] views
    if window == (-1, 0) and L == S:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        seen = None if window is None else visible(L, S, window, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3)


def visible(L: int, S: int, window: tuple[int, int], where: torch.device) -> torch.Tensor:
    """Returns which keys each query of a window sees, bool [L, S], True = seen."""
    distance = torch.arange(S, device=where) - torch.arange(S - L, S, device=where)[:, None]  # [L, S], key minus query
    left, right = window
    seen = torch.ones(L, S, dtype=torch.bool, device=where)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def _attention_npu(q, k, v, window, scale, cu_seqlens=None):
    H = q.shape[2]
    options = {"scale": _scale(q, scale)}
    if window is not None:
        left, right = (bound if bound >= 0 else 2**31 - 1 for bound in window)
        options |= {"atten_mask": _compressed_mask(q.device), "sparse_mode": 3 if window == (-1, 0) else 4}
        if window != (-1, 0):  # the causal mode ignores the bounds
            options |= {"pre_tockens": left, "next_tockens": right}
    if cu_seqlens is None:
        q, k, v = (t.flatten(2) for t in (q, k, v))  # [L, B, H*E], the layout SBH
        return torch.ops.npu.npu_fusion_attention(q, k, v, H, "SBH", **options)[0].unflatten(2, (H, -1))
    ends = cu_seqlens[1:]  # cumulative lengths without the leading 0
    options |= {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    q, k, v = (t.squeeze(1) for t in (q, k, v))  # [T, H, E], the layout TND
    return torch.ops.npu.npu_fusion_attention(q, k, v, H, "TND", **options)[0].unsqueeze(1)


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


_MASKS: dict[torch.device, torch.Tensor] = {}


def _compressed_mask(where: torch.device) -> torch.Tensor:
    """Returns the mask of npu_fusion_attention's sparse modes 2, 3 and 4, the same for every sequence length:
    [2048, 2048], True (masked out) above the diagonal."""
    if where not in _MASKS:
        _MASKS[where] = torch.ones(2048, 2048, dtype=torch.bool, device=where).triu(1)
    return _MASKS[where]


# torch 2.13 needs an argument for shared key heads; 2.11 takes such heads without it.
_VARLEN_TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def _attention_varlen(q, k, v, window, bounds_q: Bounds, bounds_k: Bounds, scale):
    """Calls torch's attention for packed sequences, FlashAttention-2: q [T, H, E] -> [T, H, E]."""
    options = {"enable_gqa": q.shape[1] != k.shape[1]} if _VARLEN_TAKES_GQA else {}
    if scale is not None:
        options["scale"] = scale
    sizes = bounds_q.on_device, bounds_k.on_device, bounds_q.longest, bounds_k.longest
    return varlen_attn(q, k, v, *sizes, window_size=window, **options)


def attention_with_lse(
    q_BHLE: torch.Tensor,
    k_BKSE: torch.Tensor,
    v_BKSV: torch.Tensor,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention over one block of keys, and the lse by which it is merged with other blocks.

    q [B, H, L, E], k [B, K, S, E], v [B, K, S, V], V <= E; causal needs L = S; scale: None is 1/sqrt(E) -> out
    [B, H, L, V], lse = log sum_s exp(scale q k_s) [B, H, L] fp32. Not differentiable by itself: `ring.RingAttention`
    pairs it with `attention_backward`.
    """
    H, V = q_BHLE.shape[1], v_BKSV.shape[3]
    if not _takes_widths(q_BHLE, v_BKSV, by_sdpa=False):
        out, lse = attention_with_lse(q_BHLE, k_BKSE, _widened(v_BKSV, q_BHLE), causal, scale)
        return out[..., :V], lse
    if BACKEND == "npu":
        options = {"scale": _scale(q_BHLE, scale)} | _causal_options(q_BHLE, causal)
        out, peak, total, *_ = torch.ops.npu.npu_fusion_attention(q_BHLE, k_BKSE, v_BKSV, H, "BNSD", **options)
        return out, (peak + total.log())[..., 0]  # both are [B, H, L, 8], eight equal columns
    if BACKEND == "cuda" and not _takes_flash(q_BHLE):
        scores, _ = _plain_scores(q_BHLE, k_BKSE, causal, scale)
        lse = scores.logsumexp(-1)
        return (scores - lse.unsqueeze(-1)).exp() @ _repeated(v_BKSV, H), lse
    if BACKEND == "cuda" and attention_kernel() == "FlashAttention-4" and flash4.takes(q_BHLE, v_BKSV):
        q, k, v = (t.transpose(1, 2) for t in (q_BHLE, k_BKSE, v_BKSV))
        out, lse = flash4.attention(q, k, v, (-1, 0) if causal else None, scale=scale)
        return out.transpose(1, 2), lse
    aten = torch.ops.aten
    if BACKEND == "cuda":
        return aten._scaled_dot_product_flash_attention(q_BHLE, k_BKSE, v_BKSV, 0.0, causal, scale=scale)[:2]
    return aten._scaled_dot_product_flash_attention_for_cpu(q_BHLE, k_BKSE, v_BKSV, 0.0, causal, scale=scale)


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns gradients (dq, dk, dv) of one key block, given out and lse of *all*. Shapes: see `attention_with_lse`."""
    if not _takes_widths(q, v, by_sdpa=False):
        wide_dout, wide_v, wide_out = (_widened(t, q) for t in (dout, v, out))
        dq, dk, dv = attention_backward(wide_dout, q, k, wide_v, wide_out, lse, causal, scale)
        return dq, dk, dv[..., : v.shape[3]]
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
            scale_value=_scale(q, scale),
            **_causal_options(q, causal),
        )[:3]
    if BACKEND == "cuda" and not _takes_flash(q):
        scores, keys = _plain_scores(q, k, causal, scale)
        probabilities = (scores - lse.unsqueeze(-1)).exp()  # [B, H, L, S], of the softmax over all blocks
        rest = (dout * out).sum(-1, keepdim=True)  # [B, H, L, 1]
        dscores = probabilities * (dout @ _repeated(v, q.shape[1]).mT - rest) * _scale(q, scale)
        dk, dv = (g.unflatten(1, (k.shape[1], -1)).sum(2) for g in (dscores.mT @ q, probabilities.mT @ dout))
        return dscores @ keys, dk, dv
    if BACKEND == "cuda" and attention_kernel() == "FlashAttention-4" and flash4.takes(q, v):
        tensors = (t.transpose(1, 2) for t in (dout, q, k, v, out))
        gradients = flash4.backward(*tensors, lse, (-1, 0) if causal else None, scale)
        return tuple(g.transpose(1, 2) for g in gradients)
    aten = torch.ops.aten
    if BACKEND == "cuda":
        none = torch.empty(0, dtype=torch.uint64, device=q.device)
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, none, none, scale=scale
        )
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


def _plain_scores(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float | None) -> tuple[torch.Tensor, ...]:
    """Returns scale q k^T [B, H, L, S], -inf where causal hides a key, and k for each query head [B, H, S, E]."""
    keys = _repeated(k, q.shape[1])
    scores = q @ keys.mT * _scale(q, scale)
    if causal:
        scores = scores.masked_fill(~visible(q.shape[2], k.shape[2], (-1, 0), q.device), -torch.inf)
    return scores, keys


def _repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeats key or value heads, [B, K, S, E] -> [B, H, S, E]: query head h uses head h*K//H."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _causal_options(q: torch.Tensor, causal: bool) -> dict:
    return {"atten_mask": _compressed_mask(q.device), "sparse_mode": 3} if causal else {}


def select_blocks(
    q_LBHE: torch.Tensor,
    k_SBKE: torch.Tensor,
    keep: float,
    block: int = 128,
    always_queries: int = 0,
    always_keys: int = 0,
) -> torch.Tensor:
    """Selects the key blocks that each query block attends to, like RainFusion (MindIE-SD's v2; v1 arXiv:2505.21036).

    Blocks are scored by mean-pooled q k^T, and each row keeps the ceil(keep * columns) largest. Every query keeps the
    blocks that hold the first `always_keys` keys (text, first frame). The blocks of the first `always_queries` queries
    keep every key. It is useful if the tokens of a block are neighbours: order video tokens by small windows first.

    q [L, B, H, E], k [S, B, K, E] -> bool [B, H, ceil(L/block), ceil(S/block)], True = attended; no gradient.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep={keep}; expected a fraction from 0 to 1")
    with torch.no_grad():
        q, k = (_pooled(t, block) for t in (q_LBHE, k_SBKE))  # [B, H, L/block, E] fp32
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(2, 3)  # a softmax keeps the order
        kept = math.ceil(round(keep * scores.shape[3], 6))  # rounded, because in floats 0.07 * 100 > 7
        blocks = torch.zeros_like(scores, dtype=torch.bool).scatter_(3, scores.topk(kept).indices, True)
        blocks[:, :, : math.ceil(always_queries / block)] = True
        blocks[:, :, :, : math.ceil(always_keys / block)] = True
    return blocks


def _pooled(x_LBHE: torch.Tensor, block: int) -> torch.Tensor:
    """Averages blocks of tokens, of which the last may be short: [L, B, H, E] -> [B, H, ceil(L/block), E] fp32."""
    x, padding = x_LBHE.permute(1, 2, 0, 3).float(), -x_LBHE.shape[0] % block
    sums = F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, block)).sum(3)
    sums[:, :, -1] *= block / (block - padding)
    return sums / block


def block_sparse_attention(
    q_LBHE: torch.Tensor, k_SBKE: torch.Tensor, v_SBKE: torch.Tensor, blocks: torch.Tensor, block: int = 128
) -> torch.Tensor:
    """Computes `attention` over the kept blocks only; the output of a query without blocks is zero. q [L, B, H, E], k
    and v [S, B, K, E], blocks bool [B, H, ceil(L/block), ceil(S/block)] from `select_blocks` -> [L, B, H, E].

    npu: fp16 and bf16, block a multiple of 128, E 64 or 128 (128 to train).
    """
    L, B, H, E = q_LBHE.shape
    S, K = k_SBKE.shape[0], k_SBKE.shape[2]
    if blocks.shape != (B, H, -(-L // block), -(-S // block)):
        raise ValueError(f"blocks {tuple(blocks.shape)}; expected {(B, H, -(-L // block), -(-S // block))}")
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_LBHE, k_SBKE, v_SBKE))  # [B, H, L, E] views
    if BACKEND == "npu":
        q, k, v = (t.contiguous() for t in (q, k, v))
        layout = {"q_input_layout": "BNSD", "kv_input_layout": "BNSD", "num_key_value_heads": K}
        out = torch.ops.npu.npu_block_sparse_attention(
            q, k, v, blocks.to(torch.int8), [block, block], **layout,
            scale_value=E**-0.5, inner_precise=0, softmax_lse_flag=1,
        )[0]  # fmt: skip
    elif BACKEND == "cuda":
        from kernels import block_sparse_attention as kernel

        out = kernel.block_sparse_attention(q, k, v, blocks, block)
    else:
        out, padding = torch.zeros_like(q), -S % block
        k, v = (F.pad(t, (0, 0, 0, padding)).unflatten(2, (-1, block)) for t in (k, v))  # [B, K, S/block, block, E]
        for b, h, i in itertools.product(range(B), range(H), range(blocks.shape[2])):
            kept, rows = blocks[b, h, i].nonzero()[:, 0], slice(i * block, (i + 1) * block)
            if len(kept):  # one query block over the key blocks it keeps, and no work for the others
                keys = len(kept) * block - (padding if kept[-1] == blocks.shape[3] - 1 else 0)
                ks, vs = (t[b, h * K // H].index_select(0, kept).flatten(0, 1)[:keys] for t in (k, v))
                scores = (q[b, h, rows] @ ks.mT).float() * E**-0.5  # torch's fused kernel is slow for so few queries
                out[b, h, rows] = scores.softmax(-1).to(vs.dtype) @ vs
    return out.permute(2, 0, 1, 3).contiguous()


# -------------------------------------------------------------------------------------------------------------- norms


RMS_NORM_KERNEL = False  # on cuda, kernels/rms_norm.py instead of torch's own, against which it is not yet timed


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, tp_size: int = 1) -> torch.Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * weight over the last dimension, [..., D/tp] -> [..., D/tp].

    With tp_size > 1 the last dimension is one tensor-parallel shard of the normalised width. One sum per row is then
    reduced over the tensor-parallel group in the forward, and one in the backward.
    """
    if tp_size == 1 and BACKEND == "npu":
        return torch.ops.npu.npu_rms_norm(x, weight, epsilon=eps)[0]
    if tp_size == 1 and BACKEND == "cuda" and RMS_NORM_KERNEL:
        from kernels import rms_norm as kernel

        return kernel.rms_norm(x, weight, eps)
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


def _tp_sum(x: torch.Tensor, tp_size: int, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """Sums (or reduces by another op) over the tensor-parallel group, in place."""
    if tp_size > 1:
        dist.all_reduce(x, op, group=mpu.get_tensor_model_parallel_group())
    return x


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (rms_norm(x + residual), x + residual), both [..., D]. The sum is the next residual; it is rounded to x's
    dtype before it is normalised."""
    if BACKEND == "npu":
        return _NpuAddRMSNorm.apply(x, residual, weight, eps)
    if BACKEND == "cuda":
        from kernels import rms_norm as kernel

        return kernel.add_rms_norm(x, residual, weight, eps)
    total = x + residual
    return rms_norm(total, weight, eps), total


class _NpuAddRMSNorm(torch.autograd.Function):
    """Uses the backward of npu_rms_norm over the sum, because torch_npu has none for npu_add_rms_norm."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        y, inverse, total = torch.ops.npu.npu_add_rms_norm(x, residual, weight, epsilon=eps)
        ctx.save_for_backward(total, weight, inverse)
        return y, total

    @staticmethod
    def backward(ctx, dy, dtotal):
        total, weight, inverse = ctx.saved_tensors
        dx, dweight = torch.ops.npu.npu_rms_norm_backward(dy, total, weight, inverse)
        dx = dx + dtotal
        return dx, dx, dweight.to(weight.dtype), None


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over the last dimension with fp32 statistics, [..., D] -> [..., D]. torch's own on every device."""
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


def layer_norm_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """adaLN: returns LN(x) * (1 + scale) + shift, with LN without affine. x [L, B, D], scale and shift fp32 [B, D]."""
    if BACKEND == "cuda":
        from kernels import modulate as kernel

        return kernel.layer_norm_modulate(x, scale, shift, eps)
    return _LayerNormModulate.apply(x, scale, shift, eps)


class _LayerNormModulate(torch.autograd.Function):
    """y = n (1 + scale) + shift, n = (x - mean) r; dscale = sum of dy n, dshift = sum of dy, both over tokens; dx is
    LayerNorm's for dy (1 + scale). Saves x in its own dtype and recomputes n in the backward."""

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
    """Returns x + y * gate, computed in fp32 and rounded once. x and y [L, B, D], gate fp32 [B, D]."""
    if BACKEND == "cuda":
        from kernels import modulate as kernel

        return kernel.gate_residual(x, y, gate)
    return _GateResidual.apply(x, y, gate)


class _GateResidual(torch.autograd.Function):
    """dx = dout, dy = dout gate, dgate = sum over tokens of dout y. Saves y in its own dtype."""

    @staticmethod
    def forward(ctx, x, y, gate):
        ctx.save_for_backward(y, gate)
        return torch.addcmul(x.float(), y.float(), gate).to(x.dtype)

    @staticmethod
    def backward(ctx, dout):
        (y, gate), wide = ctx.saved_tensors, dout.float()
        return dout, (wide * gate).to(y.dtype), (wide * y.float()).sum(0)


# -------------------------------------------------------------------------------------------------------- activations


def swiglu(x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """Returns silu(a) * b with (a, b) the halves of x's last dimension, [..., 2F] -> [..., F]. With up, (a, b) is
    (x, up), each [..., F]; npu's op takes one tensor, so there they are concatenated."""
    if BACKEND == "npu":
        return torch.ops.npu.npu_swiglu(x if up is None else torch.cat((x, up), -1), -1)
    if BACKEND == "cuda":
        from kernels import swiglu as kernel

        return kernel.swiglu(x, up)
    gate, up = x.chunk(2, -1) if up is None else (x, up)
    return (F.silu(gate.float()) * up.float()).to(x.dtype)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Returns 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), any shape. torch's own on every device."""
    return F.gelu(x, approximate="tanh")


# ------------------------------------------------------------------------------------------------------------- rotary


def rotary_interleaved(x_LBHE: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (x_0, x_1), (x_2, x_3), ... of the head dimension.

    x [L, B, H, E], rope [L, 1, 1, E/2, 2] fp32 -> [L, B, H, E]. rope holds (cos, sin) of each pair's angle; the recipe
    computes it from one or three coordinates of a token.
    """
    if BACKEND == "npu":
        cos, sin = (rope[..., i].repeat_interleave(2, dim=-1) for i in (0, 1))  # [L, 1, 1, E]
        return torch.ops.npu.npu_rotary_mul(x_LBHE.float(), cos, sin, "interleave").to(x_LBHE.dtype)
    if BACKEND == "cuda":
        from kernels import rotary as kernel

        return kernel.rotary_interleaved(x_LBHE, rope)
    pairs = torch.view_as_complex(x_LBHE.float().unflatten(-1, (-1, 2)))  # [L, B, H, E/2]
    return torch.view_as_real(pairs * torch.view_as_complex(rope)).flatten(-2).to(x_LBHE.dtype)


def rotary_half(x_LBHE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (x_0, x_{E/2}), (x_1, x_{E/2+1}), ... of the head dimension: x cos + (-x_2nd, x_1st) sin.

    x [L, B, H, E], cos and sin [L, 1 or B, 1, E] fp32 of each entry's angle -> [L, B, H, E]. The recipe computes cos
    and sin (for mrope from the three coordinates of a token, which differ between samples).
    """
    if BACKEND == "npu":
        return torch.ops.npu.npu_rotary_mul(x_LBHE.float(), cos, sin, "half").to(x_LBHE.dtype)
    if BACKEND == "cuda":
        from kernels import rotary as kernel

        return kernel.rotary_half(x_LBHE, cos, sin)
    wide = x_LBHE.float()
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-second, first), -1) * sin).to(x_LBHE.dtype)


def norm_rotary_half(
    x_LBHE: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """Returns rotary_half(rms_norm(x)): every head is normalised over its E entries, and then rotated.

    x [L, B, H, E], a view or not, weight [E], cos and sin as in `rotary_half` -> [L, B, H, E]. On cuda it is one kernel,
    which keeps x for the backward and does not round in between.
    """
    if BACKEND == "cuda":
        from kernels import norm_rotary as kernel

        return kernel.norm_rotary_half(x_LBHE, weight, cos, sin, eps)
    return rotary_half(rms_norm(x_LBHE, weight, eps), cos, sin)


# -------------------------------------------------------------------------------------------------- mixture of experts


def token_permute(tokens: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies each token K times and sorts the copies by expert. tokens [N, D], experts [N, K] integer -> rows [N*K, D]
    and the row of each copy, int32 [N*K] (copy k of token n at n*K + k). Ties keep the tokens' order."""
    if BACKEND == "npu":
        return torch.ops.npu.npu_moe_token_permute(tokens, experts.to(torch.int32))
    if BACKEND == "cuda":
        from kernels import moe_permute as kernel

        return kernel.permute(tokens, experts)
    order = experts.flatten().argsort(stable=True)  # [N*K], the copy in each row
    position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return tokens[order // experts.shape[1]], position.to(torch.int32)


def token_unpermute(rows: torch.Tensor, position: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Inverse of `token_permute`: sums probs[n, k] * rows[position[n*K + k]] over k. rows [N*K, D], probs [N, K] ->
    [N, D]. npu multiplies by probs in the dtype of rows."""
    if BACKEND == "npu":
        return torch.ops.npu.npu_moe_token_unpermute(rows, position, probs=probs.to(rows.dtype))
    if BACKEND == "cuda":
        from kernels import moe_permute as kernel

        return kernel.unpermute(rows, position, probs)
    copies = rows[position].unflatten(0, probs.shape)  # [N, K, D]
    return (copies.float() * probs.float().unsqueeze(-1)).sum(1).to(rows.dtype)


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor | nf4.Packed, ends: torch.Tensor) -> torch.Tensor:
    """Multiplies each group's rows by its own matrix: y[ends[g-1]:ends[g]] = x[ends[g-1]:ends[g]] @ weight[g].

    x [N, D], weight [G, D, ...] of F columns, ends [G] int64 on the device, cumulative, ends[-1] = N; groups may be
    empty -> [N, F]. On npu and cuda the ends stay on the device. Give the parameter itself, not a view of it: its
    gradient may then be accumulated as in `linear`. A frozen weight may be packed (`nf4.Packed`).
    """
    if isinstance(weight, nf4.Packed):
        return _GroupedMatmulPacked.apply(x, weight, ends)
    if can_accumulate(x, weight) and (BACKEND != "cuda" or ACCUMULATE_EXPERTS):
        return _GroupedMatmulAccumulate.apply(x, weight, ends)
    return _grouped_matmul(x, weight.flatten(2), ends)


def _grouped_matmul(x, weight, ends):
    if BACKEND == "npu":
        return _GroupedMatmulNpu.apply(x, weight, ends)
    if BACKEND == "cuda":
        aligned = x.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0
        if x.dtype == torch.bfloat16 and aligned and x.is_cuda:  # what torch's kernel takes
            return F.grouped_mm(x, weight, offs=ends.to(torch.int32))
        from kernels import grouped_matmul as kernel

        return kernel.grouped_matmul(x, weight, ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([part @ w for part, w in zip(x.split(sizes), weight, strict=True)])


class _GroupedMatmulAccumulate(torch.autograd.Function):
    """`grouped_matmul` whose backward adds the weight's gradient to its `main_grad`, see `linear`."""

    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(x, ends)
        ctx.weight = weight
        return _grouped_matmul(x, weight.flatten(2), ends)

    @staticmethod
    def backward(ctx, dy):
        (x, ends), weight, dy = ctx.saved_tensors, ctx.weight, dy.contiguous()
        dx = _grouped_matmul(dy, weight.flatten(2).transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
        add_products_(weight.main_grad.flatten(2), x, dy, ends)
        return dx, mark_accumulated(weight), None


class _GroupedMatmulPacked(torch.autograd.Function):
    """`grouped_matmul` with a packed weight, which is unpacked once in the forward and once in the backward. All groups
    are: which of them have rows is known on the device alone."""

    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(ends)
        ctx.weight = weight
        return _grouped_matmul(x, weight.unpack().flatten(2), ends)

    @staticmethod
    def backward(ctx, dy):
        (ends,) = ctx.saved_tensors
        return _grouped_matmul(dy.contiguous(), ctx.weight.unpack().flatten(2).transpose(1, 2), ends), None, None


class _GroupedMatmulNpu(torch.autograd.Function):
    """Adds the backward that npu_grouped_matmul lacks: dx = dy weight^T by group, dweight[g] = x_g^T dy_g.

    split_item 2 and 3 give one output tensor; group_type 0 groups the rows, 2 the summed dimension; group_list_type 0
    is cumulative.
    """

    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(x, weight, ends)
        return _grouped_npu(x, weight, ends, split_item=2, group_type=0)

    @staticmethod
    def backward(ctx, dy):
        x, weight, ends = ctx.saved_tensors
        dx = _grouped_npu(dy, weight.transpose(1, 2), ends, split_item=2, group_type=0)
        return dx, _grouped_npu(x.t(), dy, ends, split_item=3, group_type=2), None


def _grouped_npu(x, weight, ends, **how):
    return torch.ops.npu.npu_grouped_matmul([x], [weight], group_list=ends, group_list_type=0, **how)[0]


# -------------------------------------------------------------------------------------------------- weight gradients

# Whether weight gradients are added to megatron-core's fp32 buffers inside the matmul. On cpu they are not, so that its
# sums stay the reference. Experts on cuda: the accumulating kernel is not yet timed against torch's grouped_mm and an add.
ACCUMULATE, ACCUMULATE_EXPERTS = BACKEND != "cpu", False
NPU_COLUMNS = 2**15  # columns of a that npu's kernel gets at a time: it takes fewer than 65,536, a vocabulary has more


def linear(x: torch.Tensor, weight: torch.Tensor | nf4.Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns x weight^T + bias: x [..., inputs], weight [outputs, inputs] -> [..., outputs].

    If megatron-core's DDP has given the weight an fp32 `main_grad`, the backward adds the weight's gradient to it inside
    the matmul. Otherwise a gradient is written in the weight's dtype, rounded, read again and added. This is Megatron-LM's
    gradient accumulation fusion, with its protocol: `grad_added_to_main_grad` tells DDP that it is done.

    A frozen weight may be packed (`nf4.Packed`); then the bias is frozen, too.
    """
    if isinstance(weight, nf4.Packed):
        return _LinearPacked.apply(x, weight, bias)
    return _Linear.apply(x, weight, bias) if can_accumulate(x, weight) else F.linear(x, weight, bias)


def can_accumulate(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Returns whether the backward may write to `main_grad`. FSDP2 and frozen weights have none. A compiled graph does
    not see the buffer. npu's kernel takes fp16 and bf16 only."""
    refused = BACKEND == "npu" and x.dtype == torch.float32
    return not refused and _has_buffer(weight)


def _has_buffer(weight: torch.Tensor) -> bool:
    used = ACCUMULATE and not torch.compiler.is_compiling() and weight.requires_grad
    return used and getattr(weight, "main_grad", None) is not None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x)
        ctx.weight = weight  # not saved: under recomputation a saved weight comes back without its main_grad
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        (x,), weight = ctx.saved_tensors, ctx.weight
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dy = dy.flatten(0, -2)
        add_products_(weight.main_grad.unsqueeze(0), dy, x.flatten(0, -2), None)
        return dx, mark_accumulated(weight), dy.sum(0) if ctx.needs_input_grad[2] else None


class _LinearPacked(torch.autograd.Function):
    """`linear` with a packed weight, which is unpacked once in the forward and once in the backward."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return F.linear(x, weight.unpack(), bias)

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.weight.unpack(), None, None


def embedding(tokens: torch.Tensor, weight: torch.Tensor, tied: bool = False) -> torch.Tensor:
    """Returns the rows of weight [V, D] at tokens int64 [...] -> [..., D]. The weight's gradient is accumulated as in
    `linear`, unless the weight is `tied` to the output projection, which has another gradient for it."""
    if tied or not _has_buffer(weight):
        return F.embedding(tokens, weight)
    return _Embedding.apply(tokens, weight)


class _Embedding(torch.autograd.Function):
    """`F.embedding` whose backward adds its rows to `main_grad`: no gradient of the whole vocabulary is made."""

    @staticmethod
    def forward(ctx, tokens, weight):
        ctx.save_for_backward(tokens)
        ctx.weight = weight
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx, dy):
        (tokens,), weight = ctx.saved_tensors, ctx.weight
        weight.main_grad.index_add_(0, tokens.flatten(), dy.flatten(0, -2).float())
        return None, mark_accumulated(weight)


def add_products_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor | None) -> None:
    """Adds a[rows of g]^T b[rows of g] to total[g], fp32 [G, M, N]: a [T, M], b [T, N]. ends: see `grouped_matmul`; None
    is one group."""
    if BACKEND == "npu" and a.dtype != torch.float32:
        ends = _one_group(len(a), a.device) if ends is None else ends
        for total_part, a_part in zip(total.split(NPU_COLUMNS, 1), a.split(NPU_COLUMNS, 1), strict=True):
            torch.ops.npu.npu_grouped_matmul_add_(
                total_part, a_part.contiguous(), b, ends, transpose_x=True, group_type=2, group_list_type=0
            )
    elif ends is None and BACKEND == "cuda" and a.dtype != torch.float32:
        only = total[0]  # one object twice: torch copies self into another out first, even if both are the same memory
        torch.addmm(only, a.t(), b, out_dtype=torch.float32, out=only)
    elif ends is None:
        total[0].addmm_(a.t().float(), b.float())
    elif BACKEND == "cuda":
        from kernels import grouped_matmul as kernel

        kernel.add_weight_gradient_(total, a, b, ends)
    else:
        for group, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
            total[group].addmm_(a[start:end].t().float(), b[start:end].float())


@functools.lru_cache(maxsize=32)
def _one_group(rows: int, where: torch.device) -> torch.Tensor:
    return torch.full((1,), rows, dtype=torch.int64, device=where)


def mark_accumulated(weight: torch.Tensor) -> torch.Tensor:
    """Tells megatron-core's DDP that the gradient is in its buffer. Returns a gradient that nobody reads: without one,
    autograd might not call DDP's hook on the thread of the backward."""
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


# --------------------------------------------------------------------------------------------------------------- loss

CHUNK = 2**26  # number of logits that exist at a time: 128 MiB in bf16
# Tokens of a chunk on cuda, at least: every chunk reads and writes the weight's whole fp32 gradient. Logits of 2048
# tokens over a vocabulary of 151,936 take 594 MiB in bf16 and 1187 MiB in fp32.
CHUNK_TOKENS = 2048


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, token_weight: torch.Tensor, tp_size: int = 1,
    tied: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Computes the output projection and the loss in one, so that the logits of all tokens never exist together.

    hidden [N, D], weight [V/tp, D] (this rank's rows of the vocabulary), labels [N] int64 in [0, V) or negative (no
    loss), token_weight fp32 [N] -> (sum_i token_weight_i loss_i, losses fp32 [N] without gradient) with loss_i =
    log sum_v exp(hidden_i weight_v) - hidden_i weight_label. The vocabulary-parallel merge is Megatron-LM's
    (arXiv:1909.08053, section 3), the chunking Liger-Kernel's (arXiv:2410.10989): the forward computes the gradients,
    and the backward only scales them. Logits have the dtype of hidden, their softmax is fp32, and the weight's gradient
    is summed over chunks in fp32. Under tensor parallelism each rank returns its vocabulary's part of the gradient of
    hidden, so hidden must come through `parallel.enter_tensor_parallel`. The weight's gradient is accumulated as in
    `linear`, unless the weight is `tied` to the embedding, which has another gradient for it.
    """
    accumulates = not tied and can_accumulate(hidden, weight)
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weight, tp_size, accumulates)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weight, tp_size, accumulates):
        N, V = hidden.shape[0], weight.shape[0]
        losses = torch.empty(N, dtype=torch.float32, device=hidden.device)
        dhidden, dweight = torch.empty_like(hidden), None
        token_weight = token_weight.float() * (labels >= 0)
        training, step = any(ctx.needs_input_grad), _chunk_tokens(N, V)
        learning = ctx.needs_input_grad[1]  # not frozen
        added = accumulates or BACKEND != "cpu"  # On cpu, products are added after they are rounded: the reference.
        if learning and (added or not N):
            dweight = torch.zeros_like(weight, dtype=torch.float32)
        for part in (slice(i, i + step) for i in range(0, N, step)):
            logits = hidden[part] @ weight.t()  # [n, V/tp]
            losses[part], gradient = _softmax_loss(logits, labels[part], token_weight[part], tp_size)
            if training:
                torch.mm(gradient, weight, out=dhidden[part])
            if learning and added:
                add_products_(dweight.unsqueeze(0), gradient, hidden[part], None)
            elif learning:
                product = gradient.t() @ hidden[part]
                dweight = product.float() if dweight is None else dweight.add_(product)
            del logits, gradient  # before the next chunk's
        losses = losses.masked_fill(labels < 0, 0)
        if dweight is not None and not accumulates:
            dweight = dweight.to(weight.dtype)
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight = weight if accumulates else None
        ctx.mark_non_differentiable(losses)
        return losses @ token_weight, losses

    @staticmethod
    def backward(ctx, dloss, _):
        dhidden, dweight = ctx.saved_tensors  # scaled in place, because torch refuses a second backward
        if ctx.weight is not None:
            ctx.weight.main_grad.addcmul_(dweight, dloss.float())
            dweight = mark_accumulated(ctx.weight)
        elif dweight is not None:
            dweight = dweight.mul_(dloss)
        return dhidden.mul_(dloss), dweight, None, None, None, None


def _chunk_tokens(N: int, V: int) -> int:
    """Returns how many of N tokens have their logits at a time. On cuda chunks are about equal, in whole tiles of 128."""
    tokens = max(1, CHUNK // V)
    if BACKEND != "cuda":
        return tokens
    tokens = max(tokens // 128 * 128, CHUNK_TOKENS)
    chunks = max(1, math.ceil(N / tokens))
    return math.ceil(N / chunks / 128) * 128 or 128


def linear_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, tp_size: int = 1
) -> torch.Tensor:
    """Returns log softmax(hidden_i weight)[label_i], fp32 [N], 0 where the label is negative. Arguments are those of
    `linear_cross_entropy`.

    It is for objectives in which a token's weight depends on other tokens (preferences: on two whole answers) and is
    known only after the forward. The backward computes the logits again, which adds a third to the projection's work. A
    first pass without gradients would instead add a third to the whole model's work.
    """
    return _LinearLogProbs.apply(hidden, weight, labels, tp_size)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, tp_size):
        ctx.save_for_backward(hidden, weight, labels)
        ctx.tp_size, zero_weight = tp_size, torch.zeros(len(labels), device=labels.device)
        return -linear_cross_entropy(hidden.detach(), weight.detach(), labels, zero_weight, tp_size)[1]

    @staticmethod
    def backward(ctx, dlog_probs):
        (hidden, weight), labels = (t.detach() for t in ctx.saved_tensors[:2]), ctx.saved_tensors[2]
        wanted = [hidden.requires_grad_(), *([weight.requires_grad_()] if ctx.needs_input_grad[1] else [])]
        with torch.enable_grad():
            loss = linear_cross_entropy(hidden, weight, labels, -dlog_probs, ctx.tp_size)[0]
        dhidden, *dweight = torch.autograd.grad(loss, wanted)
        return dhidden, dweight[0] if dweight else None, None, None


def _softmax_loss(logits, labels, token_weight, tp_size) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns losses fp32 [n] of a chunk of logits [n, V/tp] and token_weight times their gradient, in logits.dtype."""
    if BACKEND == "npu" and tp_size == 1:
        labels = labels.clamp(min=0)
        loss, log_prob, *_ = torch.ops.npu.npu_cross_entropy_loss(logits.float(), labels, reduction="none")
        gradient = torch.ops.npu.npu_cross_entropy_loss_backward(token_weight, log_prob, labels, reduction="none")
        return loss, gradient.to(logits.dtype)
    if tp_size > 1:
        labels = labels - mpu.get_tensor_model_parallel_rank() * logits.shape[1]  # outside [0, V/tp): of another rank
    if BACKEND == "cuda":
        from kernels import linear_cross_entropy as kernel

        peak, total, target = kernel.row_statistics(logits, labels)
    else:
        wide = logits.float()
        is_local = ((labels >= 0) & (labels < logits.shape[1])).unsqueeze(1)
        column = labels.unsqueeze(1).clamp(0, logits.shape[1] - 1)
        peak = wide.amax(1)
        target = (wide.gather(1, column) * is_local).squeeze(1)
        wide.sub_(peak.unsqueeze(1)).exp_()  # in place: the logits are not needed again
        total = wide.sum(1)
    highest = _tp_sum(peak.clone(), tp_size, dist.ReduceOp.MAX)
    total, target = _tp_sum(torch.stack((total * (peak - highest).exp(), target)), tp_size)
    lse = highest + total.log()
    if BACKEND == "cuda":
        kernel.softmax_gradient_(logits, lse, labels, token_weight)
        return lse - target, logits
    gradient = wide.mul_(((peak - lse).exp() * token_weight).unsqueeze(1))
    gradient.scatter_add_(1, column, is_local * -token_weight.unsqueeze(1))
    return lse - target, gradient.to(logits.dtype)


# ---------------------------------------------------------------------------------------------------------- optimizer


class AdamW(torch.optim.AdamW):
    """torch's AdamW with npu's one-kernel update; elsewhere torch's own. `common.optimizer` gives this class to the
    optimizer that megatron-core has built. fp32 parameters, moments and gradients."""

    @torch.no_grad()
    def step(self, closure=None):
        if BACKEND != "npu":
            return super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)  # on the host, as torch keeps it
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                adamw_(*map(local, (p, p.grad, state["exp_avg"], state["exp_avg_sq"])), int(state["step"]), group)
                state["step"] += 1
        return None


def adamw_(p, grad, exp_avg, exp_avg_sq, done: int, group: dict) -> None:
    """Applies one step of AdamW in place, in one kernel. done: earlier steps; group: lr, betas, eps, weight_decay."""
    beta1, beta2 = group["betas"]
    if BACKEND == "npu":
        torch.ops.npu.npu_apply_adam_w(  # it takes the powers of the step before this one
            beta1**done, beta2**done, group["lr"], group["weight_decay"], beta1, beta2, group["eps"],
            grad, None, False, False, out=[p, exp_avg, exp_avg_sq],
        )  # fmt: skip
        return
    steps = [torch.full((), float(done), device=p.device)]
    adamw(
        [p], [grad], [exp_avg], [exp_avg_sq], [], steps, fused=True, amsgrad=False, maximize=False,
        beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip


def local(t: torch.Tensor) -> torch.Tensor:
    """Returns this rank's part of a tensor that FSDP2 shards, or any other tensor itself."""
    return t.to_local() if hasattr(t, "to_local") else t
