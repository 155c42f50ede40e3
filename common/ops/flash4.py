"""FlashAttention-4 (the optional package flash-attn-4; Hopper and newer) as two operators of torch.

The library calls are those that torch makes in `torch/nn/attention/_fa4.py`; torch's own adapter expects two results,
where the library has returned more since its version 4.0.0b20. As operators they are opaque to torch.compile, and
backward takes the lse of other keys too, which ring attention needs.

Shape legend: B batch, L queries, S keys, T tokens of packed sequences, n their number, H heads, K heads of keys and
values, E head dim of queries and keys, V that of values.
"""

import functools
import importlib
import importlib.util

import torch


@functools.cache
def refusal() -> str | None:
    """Returns why FlashAttention-4 cannot run on this machine, or None if it can."""
    try:
        if importlib.util.find_spec("flash_attn.cute") is None:
            return "flash-attn-4 is not installed"
        _library()
    except ModuleNotFoundError as error:
        missing = error.name or "flash_attn"
        return "flash-attn-4 is not installed" if missing.startswith("flash_attn") else f"flash-attn-4 needs {missing}"
    except Exception as error:  # a library of CUDA that does not load, or another version of its compiler
        return f"flash-attn-4 does not load: {type(error).__name__}: {error}"
    major, minor = torch.cuda.get_device_capability()
    return None if major in (9, 10, 11) else f"flash-attn-4 does not train on compute capability {major}.{minor}"


def takes(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Returns whether the library has kernels for these head dims on every card that it runs on."""
    widths = q.shape[-1], v.shape[-1]
    return widths == (192, 128) or all(8 <= width <= 128 and width % 8 == 0 for width in widths)


def _library():
    return importlib.import_module("flash_attn.cute.interface")


def attention(
    q, k, v, window: tuple[int, int] | None, bounds: torch.Tensor | None = None, longest: int = 0,
    scale: float | None = None,
):  # fmt: skip
    """Returns (softmax(scale q k^T) v, lse fp32). Differentiable, except for lse. scale: None is 1/sqrt(E).

    q [B, L, H, E], k [B, S, K, E], v [B, S, K, V] -> [B, L, H, V] in the memory layout of q, and lse [B, H, L]. With
    bounds, int32 [n + 1] on the device, of sequences of at most `longest` tokens: q [T, H, E], k and v likewise ->
    [T, H, V] and [H, T]. window: (left, right) as in `ops.attention`; None is no mask.
    """
    left, right = (-1, -1) if window is None else window
    return torch.ops.zoo.flash4(q, k, v, bounds, longest, left, right, scale)


def backward(dout, q, k, v, out, lse, window: tuple[int, int] | None, scale: float | None = None):
    """Returns (dq, dk, dv) of `attention` without bounds, given out and the lse of all keys that the queries see."""
    left, right = (-1, -1) if window is None else window
    return torch.ops.zoo.flash4_backward(dout, q, k, v, out, lse, None, 0, left, right, scale)


def _options(bounds, longest: int, left: int, right: int, scale: float | None) -> dict:
    """Returns the arguments that the library's forward and backward share. It takes None where there is no bound."""
    options = {"softmax_scale": scale, "causal": (left, right) == (-1, 0)}
    if not options["causal"]:
        options |= {"window_size_left": left if left >= 0 else None, "window_size_right": right if right >= 0 else None}
    if bounds is not None:
        options |= {f"cu_seqlens_{x}": bounds for x in "qk"} | {f"max_seqlen_{x}": longest for x in "qk"}
    return options


@torch.library.custom_op("zoo::flash4", mutates_args=())
def _flash4(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor | None, longest: int, left: int, right: int,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    out, options = _output(q, v), _options(bounds, longest, left, right, scale)
    lse = _library()._flash_attn_fwd(q, k, v, out=out, return_lse=True, **options)[1]
    return out, lse.contiguous()


def _output(q, v):
    return torch.empty_like(q[..., : v.shape[-1]])  # keeps the order of q's strides


@_flash4.register_fake
def _(q, k, v, bounds, longest, left, right, scale):
    lse = q.shape[:2][::-1] if bounds is not None else (q.shape[0], q.shape[2], q.shape[1])
    return _output(q, v), q.new_empty(lse, dtype=torch.float32)


@torch.library.custom_op("zoo::flash4_backward", mutates_args=())
def _flash4_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    bounds: torch.Tensor | None, longest: int, left: int, right: int, scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    options = _options(bounds, longest, left, right, scale)
    options["deterministic"] = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv, *_ = _library()._flash_attn_bwd(q, k, v, out, dout, lse, **options)
    return dq, dk, dv


@_flash4_backward.register_fake
def _(dout, q, k, v, out, lse, bounds, longest, left, right, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, output):
    q, k, v, bounds, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    q, k, v, out, lse, bounds = ctx.saved_tensors
    return *torch.ops.zoo.flash4_backward(dout, q, k, v, out, lse, bounds, *ctx.rest), None, None, None, None, None


_flash4.register_autograd(_backward, setup_context=_setup_context)
