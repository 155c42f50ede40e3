"""Ascend's fused ops on CPU (level A of three): reference kernels behind the published schemas, with strict checks.

`install()` registers the ops of `npu_schemas.txt` under `torch.ops.npu`, so the npu branch of `common/ops` runs without
a device. Tests with it prove names, order and kinds of arguments, their documented constraints (dtypes, layouts, mask
polarity, cumulative lists), and that the npu branch computes what the reference branch does, gradients included. They
do not prove an NPU's numerics or speed. The checks encode one reading of the documentation (torch_npu 2.13.0,
`_op_plugin_docs.py`); `test_npu_library.py` (levels B and C) compares shapes and schemas with the real library.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
UNBOUNDED = 2147483647


def _read_schemas() -> dict[str, str]:
    """Reads {op name, with its overload: schema} from npu_schemas.txt."""
    lines = (Path(__file__).parent / "npu_schemas.txt").read_text().splitlines()
    matches = (re.match(r"npu::([\w.]+)(\(.*)", line) for line in lines if not line.startswith("#"))
    return {m[1]: m[1] + m[2] for m in matches}


SCHEMAS = _read_schemas()


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"npu contract: {message}")


def same_floats(op: str, *tensors: torch.Tensor) -> None:
    kinds = {t.dtype for t in tensors}
    check(len(kinds) == 1 and kinds <= set(FLOATS), f"{op} takes one dtype of fp16, bf16, fp32, not {kinds}")


# ---------------------------------------------------------------------------------------------------------- attention


def _to_bnsd(t: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    if layout == "BSND":
        return t.transpose(1, 2)
    if layout == "BSH":
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)
    if layout == "SBH":
        return t.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
    return t


def _from_bnsd(t: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "BSND":
        t = t.transpose(1, 2)
    elif layout == "BSH":
        t = t.transpose(1, 2).flatten(2)
    elif layout == "SBH":
        t = t.permute(2, 0, 1, 3).flatten(2)
    return t.contiguous()


def _key_heads(layout: str, key: torch.Tensor, width: int) -> int:
    return {"BNSD": key.shape[1], "BSND": key.shape[2]}.get(layout) or key.shape[-1] // width


def _hidden(L: int, S: int, mask, mode: int, before: int, after: int) -> torch.Tensor | None:
    """Returns the masked positions: bool, broadcastable to [.., L, S], True = masked out; or None."""
    if mask is None:
        return None  # sparse_mode and the bounds have no effect without a mask
    check(mask.dtype in (torch.bool, torch.uint8), f"atten_mask is bool or uint8, not {mask.dtype}")
    distance = torch.arange(S) - torch.arange(L)[:, None]
    if mode in (2, 3, 4):
        want = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        check(
            mask.shape[-2:] == want.shape and torch.equal(mask.bool().reshape(want.shape), want),
            f"sparse_mode {mode} takes the compressed [2048, 2048] mask, True above the diagonal (masked out)",
        )
        if mode == 4:
            shifted = distance - (S - L)  # from the lower right corner
            return (shifted > after) | (shifted < -before)
        return distance > (0 if mode == 2 else S - L)
    check(mode in (0, 1), f"sparse_mode {mode} is not stood in for")
    check(mask.shape[-2:] == (L, S), f"atten_mask {tuple(mask.shape)} does not end in {(L, S)}")
    if mode == 1:
        return mask.bool()
    return mask.bool() | (distance > after) | (-distance > before)


def _probabilities(q, k, scale, hidden):
    """Returns the fp32 softmax, its row maximum and its row sum, for GQA. q [B, N, L, D], k [B, K, S, D]."""
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.float() @ k.transpose(-1, -2) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(torch.float32).min)
    peak = scores.amax(-1, keepdim=True)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total, peak, total


def _attend(q, k, v, scale, hidden):
    p, peak, total = _probabilities(q, k, scale, hidden)
    return p @ v.float().repeat_interleave(q.shape[1] // v.shape[1], 1), peak, total


def _attend_backward(q, k, v, dy, out, lse, scale, hidden):
    """Computes gradients from the saved statistics and output, as a flash kernel does. lse [B, N, L, 1]."""
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (t.float().repeat_interleave(group, 1) for t in (k, v))
    scores = q.float() @ wide_k.transpose(-1, -2) * scale
    p = (scores - lse).exp()
    if hidden is not None:
        p = p.masked_fill(hidden, 0)
    dy = dy.float()
    dp = dy @ wide_v.transpose(-1, -2)
    ds = p * (dp - (dy * out.float()).sum(-1, keepdim=True)) * scale

    def folded(t):  # summed over the query heads that share a key head
        return t.unflatten(1, (-1, group)).sum(2)

    return ds @ wide_k, folded(ds.transpose(-1, -2) @ q.float()), folded(p.transpose(-1, -2) @ dy)


def _spans(q, k, ends_q, ends_k) -> list[tuple[int, int, int, int]]:
    """Returns (start and end of its queries, start and end of its keys) of every packed sequence."""
    check(ends_q is not None and ends_k is not None, "TND needs actual_seq_qlen and actual_seq_kvlen")
    for ends, tokens in ((ends_q, q.shape[0]), (ends_k, k.shape[0])):
        rising = all(a <= b for a, b in zip(ends, ends[1:], strict=False))
        check(rising and ends[-1] == tokens, f"actual_seq lengths are cumulative and end at T={tokens}, not {ends}")
    return list(zip([0, *ends_q], ends_q, [0, *ends_k], ends_k, strict=False))


# The documentation says Dk >= Dv and, two lines before, that key and value have one shape. False reads it strictly.
NARROW_VALUES = {"allowed": False}


def _check_attention(query, key, value, head_num, layout, o) -> None:
    same_floats("npu_fusion_attention", query, key, value)
    dims = {"BSH": 3, "SBH": 3, "BSND": 4, "BNSD": 4, "TND": 3}
    check(layout in dims, f"input_layout {layout!r}; one of {', '.join(dims)}")
    check(query.dim() == key.dim() == dims[layout], f"{layout} has {dims[layout]} dimensions, not {query.dim()}")
    is_narrow = NARROW_VALUES["allowed"] and value.shape[-1] < key.shape[-1]
    fits = value.shape == (*key.shape[:-1], value.shape[-1] if is_narrow else key.shape[-1])
    check(fits, f"key {tuple(key.shape)} and value {tuple(value.shape)} differ")
    for name in ("pse", "padding_mask", "prefix", "sink"):
        check(o.get(name) is None, f"{name} is not stood in for")
    check(o.get("keep_prob", 1.0) == 1.0, "dropout is not stood in for")
    if layout in ("BSH", "SBH"):
        check(query.shape[-1] % head_num == 0, f"head_num {head_num} does not divide {query.shape[-1]}")
        width, key_heads = query.shape[-1] // head_num, key.shape[-1] // (query.shape[-1] // head_num)
    else:
        axis = 2 if layout == "BSND" else 1
        check(query.shape[axis] == head_num, f"head_num {head_num}, but {layout} has {query.shape[axis]} query heads")
        width, key_heads = query.shape[-1], key.shape[axis]
    check(width <= 768 and key_heads > 0 and head_num % key_heads == 0, f"{head_num} heads over {key_heads} of {width}")
    if layout != "TND":
        batch = {"SBH": 1}.get(layout, 0)
        check(query.shape[batch] == key.shape[batch], f"{layout}: batch {query.shape[batch]} and {key.shape[batch]}")


def fusion_attention(query, key, value, head_num, input_layout, scale=1.0, **o):
    _check_attention(query, key, value, head_num, input_layout, o)
    rule = (
        o.get("atten_mask"), o.get("sparse_mode", 0), o.get("pre_tockens", UNBOUNDED), o.get("next_tockens", UNBOUNDED)
    )  # fmt: skip
    empty = query.new_empty(0)
    if input_layout == "TND":
        outs, statistics = [], []
        for a, b, c, d in _spans(query, key, o.get("actual_seq_qlen"), o.get("actual_seq_kvlen")):
            q, k, v = (t.transpose(0, 1)[None] for t in (query[a:b], key[c:d], value[c:d]))
            out, *row_statistics = _attend(q, k, v, scale, _hidden(b - a, d - c, *rule))
            outs.append(out[0].transpose(0, 1))
            statistics.append([s[0].transpose(0, 1) for s in row_statistics])
        peak, total = (torch.cat(s) for s in zip(*statistics, strict=True))  # [T, N, 1]
        out = torch.cat(outs)
    else:
        q = _to_bnsd(query, input_layout, head_num)
        heads = _key_heads(input_layout, key, q.shape[-1])
        k, v = (_to_bnsd(t, input_layout, heads) for t in (key, value))
        out, peak, total = _attend(q, k, v, scale, _hidden(q.shape[2], k.shape[2], *rule))
        out = _from_bnsd(out, input_layout)
    peak, total = (s.expand(*s.shape[:-1], 8).contiguous() for s in (peak, total))
    return out.to(query.dtype), peak, total, empty, 0, 0, 0


def fusion_attention_grad(
    query, key, value, dy, head_num, input_layout, *, softmax_max, softmax_sum, attention_in, scale_value=1.0, **o
):
    _check_attention(query, key, value, head_num, input_layout, o)
    expected = query.shape if value.shape == key.shape else attention_in.shape
    check(dy.shape == expected and dy.dtype == query.dtype, f"dy {tuple(dy.shape)} {dy.dtype}")
    rule = (
        o.get("atten_mask"), o.get("sparse_mode", 0), o.get("pre_tockens", UNBOUNDED), o.get("next_tockens", UNBOUNDED)
    )  # fmt: skip
    lse = (softmax_max + softmax_sum.log())[..., :1]
    empty = query.new_empty(0)
    if input_layout == "TND":
        gradients = []
        for a, b, c, d in _spans(query, key, o.get("actual_seq_qlen"), o.get("actual_seq_kvlen")):
            heads_first = (query[a:b], key[c:d], value[c:d], dy[a:b], attention_in[a:b], lse[a:b])
            parts = (t.transpose(0, 1)[None] for t in heads_first)
            found = _attend_backward(*parts, scale_value, _hidden(b - a, d - c, *rule))
            gradients.append([g[0].transpose(0, 1) for g in found])
        dq, dk, dv = (torch.cat(g).to(query.dtype) for g in zip(*gradients, strict=True))
    else:
        q, dy, out = (_to_bnsd(t, input_layout, head_num) for t in (query, dy, attention_in))
        heads = _key_heads(input_layout, key, q.shape[-1])
        k, v = (_to_bnsd(t, input_layout, heads) for t in (key, value))
        found = _attend_backward(q, k, v, dy, out, lse, scale_value, _hidden(q.shape[2], k.shape[2], *rule))
        dq, dk, dv = (_from_bnsd(g.to(query.dtype), input_layout) for g in found)
    return dq, dk, dv, empty, empty.clone()


def _check_blocks(query, key, value, mask, block_shape, layout, key_heads) -> torch.Tensor:
    """Checks the arguments of the block-sparse op. Returns the masked positions [B, N, L, S]."""
    check(query.dtype in FLOATS[:2] and query.dtype == key.dtype == value.dtype, "fp16 or bf16, one for q, k and v")
    check(layout == "BNSD", f"layout {layout!r} is not stood in for")
    (B, N, L, D), S = query.shape, key.shape[2]
    check(key.shape == value.shape == (B, key_heads, S, D) and N % key_heads == 0, f"key {tuple(key.shape)}")
    x, y = block_shape
    check(x > 0 and y > 0 and y % 128 == 0, f"block_shape {block_shape}: the second is a multiple of 128")
    check(D in (64, 128), f"head dim {D}; 64 or 128")
    want = (B, N, -(-L // x), -(-S // y))
    check(mask.shape == want, f"block_sparse_mask {tuple(mask.shape)}; expected {want}")
    check(mask.dtype in (torch.int8, torch.int32, torch.bool), f"block_sparse_mask is int8, not {mask.dtype}")
    return ~mask.bool().repeat_interleave(x, 2)[:, :, :L].repeat_interleave(y, 3)[..., :S]


def block_sparse_attention(
    query, key, value, block_sparse_mask, block_shape, *, q_input_layout="TND", kv_input_layout="TND",
    num_key_value_heads=1, scale_value=0.0, inner_precise=1, softmax_lse_flag=0,
):  # fmt: skip
    check(q_input_layout == kv_input_layout, "both layouts must be one")
    check(query.dtype != torch.bfloat16 or inner_precise == 0, "bf16 needs inner_precise 0")
    hidden = _check_blocks(query, key, value, block_sparse_mask, block_shape, q_input_layout, num_key_value_heads)
    out, peak, total = _attend(query, key, value, scale_value, hidden)
    lse = (peak + total.log()) if softmax_lse_flag else peak * 0
    return out.masked_fill(hidden.all(-1, keepdim=True), 0).to(query.dtype), lse


def block_sparse_attention_backward(
    d_out, query, key, value, attention_out, softmax_lse, block_sparse_mask, block_shape, actual_seq_lengths,
    actual_seq_lengths_kv, q_input_layout, kv_input_layout, num_key_value_heads, scale_value,
):  # fmt: skip
    hidden = _check_blocks(query, key, value, block_sparse_mask, block_shape, q_input_layout, num_key_value_heads)
    check(query.shape[3] == 128, f"the backward takes head dim 128, not {query.shape[3]}")
    check(bool(softmax_lse.any()), "the backward needs softmax_lse_flag=1 in the forward")
    out = attention_out, softmax_lse
    gradients = _attend_backward(query, key, value, d_out, *out, scale_value, hidden)
    return tuple(g.to(query.dtype) for g in gradients)


# -------------------------------------------------------------------------------------------------------------- norms


def rms_norm(input, gamma, epsilon=1e-6):
    same_floats("npu_rms_norm", input, gamma)
    check(
        input.shape[input.dim() - gamma.dim() :] == gamma.shape, f"gamma {tuple(gamma.shape)}, x {tuple(input.shape)}"
    )
    dims = tuple(range(input.dim() - gamma.dim(), input.dim()))
    rstd = torch.rsqrt(input.float().square().mean(dims, keepdim=True) + epsilon)
    return (input.float() * rstd * gamma.float()).to(input.dtype), rstd


def rms_norm_backward(dy, input, gamma, rstd):
    same_floats("npu_rms_norm_backward", dy, input, gamma)
    first = input.dim() - gamma.dim()
    normed, dnormed = input.float() * rstd, dy.float() * gamma.float()
    along = (dnormed * normed).mean(tuple(range(first, input.dim())), keepdim=True)
    dgamma = (dy.float() * normed).flatten(0, first - 1).sum(0) if first else dy.float() * normed
    return (rstd * (dnormed - normed * along)).to(input.dtype), dgamma  # dgamma stays fp32


def add_rms_norm(x1, x2, gamma, epsilon=1e-6):
    same_floats("npu_add_rms_norm", x1, x2, gamma)
    check(x1.shape == x2.shape, f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} differ")
    total = x1 + x2
    y, rstd = rms_norm(total, gamma, epsilon)
    return y, rstd, total


# --------------------------------------------------------------------------------------------- activations and rotary


def _halves(op: str, x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    same_floats(op, x)
    check(x.shape[dim] % 2 == 0, f"{op} splits dimension {dim} of {tuple(x.shape)} in two")
    return x.float().chunk(2, dim)


def swiglu(input, dim=-1):
    a, b = _halves("npu_swiglu", input, dim)
    return (F.silu(a) * b).to(input.dtype)


def swiglu_backward(grad_output, input, dim=-1):
    a, b = _halves("npu_swiglu_backward", input, dim)
    s, dy = a.sigmoid(), grad_output.float()
    return torch.cat((dy * b * s * (1 + a * (1 - s)), dy * a * s), dim).to(input.dtype)


def _turned(x, mode):
    if mode == "half":
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _check_rotary(x, cos, sin, mode) -> None:
    same_floats("npu_rotary_mul", x, cos, sin)
    check(mode in ("half", "interleave"), f"rotary_mode {mode!r}; half or interleave")
    check(x.dim() == cos.dim() == 4 and cos.shape == sin.shape, f"x {tuple(x.shape)}, cos {tuple(cos.shape)}: 4-D")
    check(x.shape[3] % 2 == 0 and x.shape[3] < 896 and cos.shape[3] == x.shape[3], f"head dim {x.shape[3]}")
    check(
        all(c in (1, n) for c, n in zip(cos.shape, x.shape, strict=True)), f"cos {tuple(cos.shape)} does not broadcast"
    )
    wide = sum(c > 1 for c in cos.shape[:3])
    check(mode == "half" or wide <= 1, f"interleave takes cos and sin of the sequence alone, not {tuple(cos.shape)}")
    check(bool(cos.abs().max() <= 1) and bool(sin.abs().max() <= 1), "cos and sin lie in [-1, 1]")


def rotary_mul(input, r1, r2, rotary_mode="half", rotate=None):
    check(rotate is None, "rotate is not stood in for")
    _check_rotary(input, r1, r2, rotary_mode)
    x = input.float()
    return (x * r1.float() + _turned(x, rotary_mode) * r2.float()).to(input.dtype)


def rotary_mul_backward(grad, input, r1, r2, rotary_mode="half"):
    _check_rotary(input, r1, r2, rotary_mode)
    dy, x = grad.float(), input.float()
    dx = dy * r1.float() - _turned(dy * r2.float(), rotary_mode)  # the transpose of `_turned` is its negative
    dr1, dr2 = (g.sum_to_size(r1.shape).to(r1.dtype) for g in (dy * x, dy * _turned(x, rotary_mode)))
    return dx.to(input.dtype), dr1, dr2


# -------------------------------------------------------------------------------------------------- mixture of experts


def moe_token_permute(tokens, indices, num_out_tokens=None, padded_mode=False):
    same_floats("npu_moe_token_permute", tokens)
    check(
        tokens.dim() == 2 and indices.dim() == 2 and indices.shape[1] <= 512, "tokens and indices are 2-D, topK <= 512"
    )
    check(
        indices.dtype in (torch.int32, torch.int64) and bool((indices >= 0).all()), "indices are int32 or int64, >= 0"
    )
    check(len(tokens) == len(indices), f"{len(tokens)} tokens, {len(indices)} rows of indices")
    check(not padded_mode and num_out_tokens is None, "dropping tokens is not stood in for")
    order = indices.flatten().argsort(stable=True)
    return tokens[order // indices.shape[1]], order.argsort().to(torch.int32)


def moe_token_permute_grad(tokens, grad_permuted_tokens, indices, sorted_indices, padded_mode=False):
    copies = grad_permuted_tokens[sorted_indices.long()].unflatten(0, indices.shape)
    return copies.float().sum(1).to(tokens.dtype)


def moe_token_unpermute(permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None):
    check(sorted_indices.dim() == 1 and sorted_indices.dtype == torch.int32, "sorted_indices is 1-D int32")
    check(not padded_mode and restore_shape is None, "padded mode is not supported")
    shape = (len(sorted_indices), 1) if probs is None else tuple(probs.shape)
    if probs is not None:
        same_floats("npu_moe_token_unpermute", permuted_tokens, probs)
    check(
        len(shape) == 2 and shape[0] * shape[1] == len(sorted_indices), f"probs {shape} for {len(sorted_indices)} rows"
    )
    copies = permuted_tokens[sorted_indices.long()].unflatten(0, shape).float()
    if probs is not None:
        copies = copies * probs.float().unsqueeze(-1)
    return copies.sum(1).to(permuted_tokens.dtype)


def moe_token_unpermute_grad(
    permuted_tokens, grad_unpermuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None
):
    dy, index = grad_unpermuted_tokens.float(), sorted_indices.long()
    weights = torch.ones(len(index), 1) if probs is None else probs.float()
    drows = torch.empty_like(permuted_tokens)
    drows[index] = (dy.unsqueeze(1) * weights.unsqueeze(-1)).flatten(0, 1).to(drows.dtype)
    dprobs = (permuted_tokens[index].unflatten(0, weights.shape).float() * dy.unsqueeze(1)).sum(-1)
    return drows, dprobs.to(permuted_tokens.dtype)


def grouped_matmul(
    x, weight, *, group_list=None, split_item=0, group_type=None, group_list_type=0, act_type=0, **unused
):
    check(all(v is None for v in unused.values()) and act_type == 0, f"only plain products are stood in for: {unused}")
    check(len(x) == len(weight) == 1, "lists of one tensor each")
    check(split_item in (2, 3), f"split_item {split_item}: one tensor comes out of 2 or 3 only")
    check(
        group_list is not None and group_list.dtype == torch.int64 and group_list.dim() == 1, "group_list: int64, 1-D"
    )
    (x,), (weight,), ends = x, weight, group_list
    same_floats("npu_grouped_matmul", x, weight)
    if group_list_type == 1:
        ends = ends.cumsum(0)
    summed = 0 if group_type == 0 else 1  # the dimension of x that is split into groups
    check(group_type in (0, 2), f"group_type {group_type}: 0 shares out the rows, 2 the summed dimension")
    check(bool((ends.diff(prepend=ends.new_zeros(1)) >= 0).all()), f"group_list falls: {group_list.tolist()}")
    check(ends[-1] == x.shape[summed], f"group_list ends at {int(ends[-1])}, not at {x.shape[summed]} rows")
    spans = list(zip([0, *ends.tolist()], ends.tolist(), strict=False))
    if group_type == 0:
        check(weight.dim() == 3 and len(weight) == len(ends), f"weight {tuple(weight.shape)} for {len(ends)} groups")
        check(x.shape[1] == weight.shape[1], f"x {tuple(x.shape)} times weight {tuple(weight.shape)}")
        return [torch.cat([(x[a:b].float() @ w.float()).to(x.dtype) for (a, b), w in zip(spans, weight, strict=True)])]
    check(weight.dim() == 2 and x.shape[1] == weight.shape[0], f"x {tuple(x.shape)} times weight {tuple(weight.shape)}")
    return [torch.stack([(x[:, a:b].float() @ weight[a:b].float()).to(x.dtype) for a, b in spans])]


def grouped_matmul_add_(input, x, weight, group_list, *, transpose_x=True, transpose_weight=False, group_type=2,
                        group_list_type=0):  # fmt: skip
    check(transpose_x and not transpose_weight and group_type == 2, "only x^T weight, summed by group, is supported")
    check(group_list.dtype == torch.int64 and group_list.dim() == 1, "group_list: int64, 1-D")
    check(input.dtype == torch.float32, f"input is {input.dtype}, not fp32")
    check(
        x.dtype == weight.dtype and x.dtype in (torch.float16, torch.bfloat16), "x and weight: both fp16 or both bf16"
    )
    check(x.dim() == weight.dim() == 2 and len(x) == len(weight), f"x {tuple(x.shape)}, weight {tuple(weight.shape)}")
    check(input.shape == (len(group_list), x.shape[1], weight.shape[1]), f"input {tuple(input.shape)}")
    check(max(x.shape[1], weight.shape[1]) < 65536, "last dimensions below 65536")
    ends = group_list if group_list_type == 0 else group_list.cumsum(0)
    check(
        bool((ends.diff(prepend=ends.new_zeros(1)) >= 0).all()) and ends[-1] <= len(x),
        f"group_list {group_list.tolist()}",
    )
    for group, (a, b) in enumerate(zip([0, *ends.tolist()], ends.tolist(), strict=False)):
        input[group].addmm_(x[a:b].float().t(), weight[a:b].float())
    return input


# ------------------------------------------------------------------------------------------------ fused communication

GROUPS: dict[str, object] = {}  # a communicator's name -> its group
# What the documentation allows. A proof of equations on a tiny fp32 model widens it.
FUSED = {"dtypes": FLOATS[:2], "widths": range(256, 65535), "worlds": (2, 4, 8, 16)}


def communicator(group) -> str:
    """Replaces `fused_comm._communicator`, because gloo gives its groups no name of hccl's."""
    GROUPS[group.group_name] = group
    return group.group_name


def _check_fused(op, a, b, world, options, widths):
    check(a.dtype == b.dtype and a.dtype in FUSED["dtypes"], f"{op} takes fp16 or bf16, not {a.dtype} and {b.dtype}")
    check(a.is_contiguous() and a.numel() > 0, f"the first argument of {op} may be neither transposed nor empty")
    check(b.dim() == 2 and a.shape[-1] == b.shape[0], f"{op}: {tuple(a.shape)} times {tuple(b.shape)}")
    check(a.shape[-1] in widths, f"{op}: {a.shape[-1]} summed products; expected {widths}")
    check(world in FUSED["worlds"], f"{op} runs on {FUSED['worlds']} ranks, not {world}")
    given = {k: v for k, v in options.items() if torch.is_tensor(v) or v}
    check(not given, f"{op}: {', '.join(given)} is not stood in for")


def mm_all_reduce_base(x1, x2, hcom, *, reduce_op="sum", **options):
    group = GROUPS[hcom]
    _check_fused("npu_mm_all_reduce_base", x1, x2, group.size(), options, range(1, UNBOUNDED))
    check(reduce_op == "sum" and x1.dim() in (2, 3), f"reduce_op {reduce_op!r}, x1 {tuple(x1.shape)}")
    total = x1.float() @ x2.float()
    group.allreduce([total]).wait()
    return total.to(x1.dtype)


def mm_reduce_scatter_base(input, x2, hcom, world_size, *, reduce_op="sum", **options):
    group = GROUPS[hcom]
    _check_fused("npu_mm_reduce_scatter_base", input, x2, world_size, options, FUSED["widths"])
    check(world_size == group.size() and reduce_op == "sum", f"world_size {world_size}, reduce_op {reduce_op!r}")
    check(input.dim() == 2 and len(input) % world_size == 0, f"input {tuple(input.shape)} on {world_size} ranks")
    total = input.float() @ x2.float()
    group.allreduce([total]).wait()
    return total.chunk(world_size)[group.rank()].to(input.dtype)


def all_gather_base_mm(input, x2, hcom, world_size, *, gather_index=0, gather_output=True, **options):
    group = GROUPS[hcom]
    _check_fused("npu_all_gather_base_mm", input, x2, world_size, options, FUSED["widths"])
    check(world_size == group.size() and input.dim() == 2, f"world_size {world_size}, input {tuple(input.shape)}")
    check(gather_index == 0, "gather_index 1 is not supported")
    gathered = torch.zeros(world_size, *input.shape)
    gathered[group.rank()] = input.float()
    group.allreduce([gathered]).wait()
    gathered = gathered.flatten(0, 1)
    product = (gathered @ x2.float()).to(input.dtype)
    return product, gathered.to(input.dtype) if gather_output else input.new_empty(0)


# ------------------------------------------------------------------------------------------------- loss and optimizer


def _check_labels(log_prob, target, options) -> None:
    same_floats("npu_cross_entropy_loss", log_prob)
    check(target.dtype == torch.int64 and target.shape == log_prob.shape[:1], f"target {target.dtype} {target.shape}")
    check(bool(((target >= 0) & (target < log_prob.shape[1])).all()), f"labels lie in [0, {log_prob.shape[1]})")
    check(len(target) <= 200000, f"{len(target)} rows; at most 200000")
    neutral = {"weight": None, "ignore_index": -100, "label_smoothing": 0.0, "lse_square_scale_for_zloss": 0.0}
    changed = {k: v for k, v in options.items() if v is not None and v != neutral.get(k) and v is not False}
    check(not changed, f"{changed} is not stood in for")


def cross_entropy_loss(input, target, weight=None, reduction="mean", *options, **named):
    check(not options, "options by position are not stood in for")
    _check_labels(input, target, {"weight": weight} | named)
    log_prob = input.float().log_softmax(1)
    losses = -log_prob.gather(1, target[:, None])[:, 0]
    loss = losses if reduction == "none" else getattr(losses, reduction)()[None]
    zloss, lse = torch.zeros_like(loss), torch.zeros_like(losses)  # the op returns them even if not requested
    return tuple(t.to(input.dtype) for t in (loss, log_prob, zloss, lse))


def cross_entropy_loss_backward(grad_loss, log_prob, target, weight=None, *options, reduction="mean", **named):
    check(not options and reduction == "none", f"reduction {reduction!r} is not stood in for in the backward")
    _check_labels(log_prob, target, {"weight": weight} | named)
    check(grad_loss.shape == target.shape, f"grad_loss {tuple(grad_loss.shape)}; expected one per row")
    gradient = log_prob.float().exp().scatter_add(1, target[:, None], -torch.ones(len(target), 1))
    return (gradient * grad_loss.float()[:, None]).to(log_prob.dtype)


def apply_adam_w(
    beta1_power, beta2_power, lr, weight_decay, beta1, beta2, epsilon, grad, max_grad_norm, amsgrad, maximize, *, out
):
    check(len(out) == 3, f"out is (var, m, v), not {len(out)} tensors")
    var, m, v = out
    same_floats("npu_apply_adam_w", grad, *out)
    check(len({t.shape for t in (grad, *out)}) == 1, f"shapes differ: {[tuple(t.shape) for t in (grad, *out)]}")
    check(not amsgrad and not maximize and max_grad_norm is None, "amsgrad and maximize are not stood in for")
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # beta1_power and beta2_power are those of the previous step
    mean, square = m / (1 - beta1_power * beta1), v / (1 - beta2_power * beta2)
    var.mul_(1 - lr * weight_decay).sub_(lr * mean / (square.sqrt() + epsilon))
    return var, m, v


KERNELS = {
    "npu_fusion_attention": fusion_attention,
    "npu_fusion_attention_grad": fusion_attention_grad,
    "npu_block_sparse_attention": block_sparse_attention,
    "npu_block_sparse_attention_backward": block_sparse_attention_backward,
    "npu_rms_norm": rms_norm,
    "npu_rms_norm_backward": rms_norm_backward,
    "npu_add_rms_norm": add_rms_norm,
    "npu_swiglu": swiglu,
    "npu_swiglu_backward": swiglu_backward,
    "npu_rotary_mul": rotary_mul,
    "npu_rotary_mul_backward": rotary_mul_backward,
    "npu_moe_token_permute": moe_token_permute,
    "npu_moe_token_permute_grad": moe_token_permute_grad,
    "npu_moe_token_unpermute": moe_token_unpermute,
    "npu_moe_token_unpermute_grad": moe_token_unpermute_grad,
    "npu_grouped_matmul": grouped_matmul,
    "npu_grouped_matmul_add_": grouped_matmul_add_,
    "npu_mm_all_reduce_base": mm_all_reduce_base,
    "npu_mm_reduce_scatter_base": mm_reduce_scatter_base,
    "npu_all_gather_base_mm": all_gather_base_mm,
    "npu_cross_entropy_loss": cross_entropy_loss,
    "npu_cross_entropy_loss_backward": cross_entropy_loss_backward,
    "npu_apply_adam_w.out": apply_adam_w,
}


# ------------------------------------------------------------------------------------------------------- registration


# Backwards of the ops that are differentiable by themselves on an NPU. Each takes torch.ops.npu, the gradients of the
# outputs, the inputs by name, and the output tensors. It returns {name of an input: its gradient}.
def _rms_norm_grad(ops, dys, i, out):
    dx, dgamma = ops.npu_rms_norm_backward(dys[0], i["input"], i["gamma"], out[1])
    return {"input": dx, "gamma": dgamma.to(i["gamma"].dtype)}


def _attention_grad(ops, dys, i, out):
    shared = ("atten_mask", "pre_tockens", "next_tockens", "actual_seq_qlen", "actual_seq_kvlen", "sparse_mode")
    dq, dk, dv, *_ = ops.npu_fusion_attention_grad(
        i["query"], i["key"], i["value"], dys[0].contiguous(), i["head_num"], i["input_layout"], softmax_max=out[1],
        softmax_sum=out[2], attention_in=out[0], scale_value=i["scale"], **{k: i[k] for k in shared},
    )  # fmt: skip
    return {"query": dq, "key": dk, "value": dv}


def _block_sparse_grad(ops, dys, i, out):
    dq, dk, dv = ops.npu_block_sparse_attention_backward(
        dys[0].contiguous(), i["query"], i["key"], i["value"], out[0], out[1], i["block_sparse_mask"], i["block_shape"],
        None, None, i["q_input_layout"], i["kv_input_layout"], i["num_key_value_heads"], i["scale_value"],
    )  # fmt: skip
    return {"query": dq, "key": dk, "value": dv}


def _permute_grad(ops, dys, i, out):
    return {"tokens": ops.npu_moe_token_permute_grad(i["tokens"], dys[0], i["indices"], out[1])}


def _unpermute_grad(ops, dys, i, out):
    rows, probs = ops.npu_moe_token_unpermute_grad(i["permuted_tokens"], dys[0], i["sorted_indices"], i["probs"])
    return {"permuted_tokens": rows, "probs": None if i["probs"] is None else probs}


GRADIENTS = {
    "npu_rms_norm": _rms_norm_grad,
    "npu_fusion_attention": _attention_grad,
    "npu_block_sparse_attention": _block_sparse_grad,
    "npu_moe_token_permute": _permute_grad,
    "npu_moe_token_unpermute": _unpermute_grad,
    "npu_swiglu": lambda ops, dys, i, out: {"input": ops.npu_swiglu_backward(dys[0], i["input"], i["dim"])},
    "npu_rotary_mul": lambda ops, dys, i, out: dict(
        zip(
            ("input", "r1", "r2"),
            ops.npu_rotary_mul_backward(dys[0], i["input"], i["r1"], i["r2"], i["rotary_mode"]),
            strict=True,
        )
    ),
}

_LIBRARY: torch.library.Library | None = None  # kept alive as long as the process


def install() -> None:
    """Registers the ops of npu_schemas.txt for CPU tensors. Later calls do nothing."""
    global _LIBRARY
    if _LIBRARY is not None:
        return
    _LIBRARY = torch.library.Library("npu", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, _positional(KERNELS[name], schema), "CPU")
        if name in GRADIENTS:
            _register_gradient(name, GRADIENTS[name])
        elif "." not in name:
            _LIBRARY.impl(name, _without_backward(getattr(torch.ops.npu, name).default), "AutogradCPU")


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, out, *inputs):
        ctx.op = op
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"npu contract: {ctx.op} has no backward; wrap it in an autograd.Function")


def _without_backward(op):
    """Returns the op with a backward that raises. On a device the gradient would silently stop at this op."""

    def call(*args, **kwargs):
        with torch._C._AutoDispatchBelowAutograd():
            out = op(*args, **kwargs)
        leaves = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t) and t.requires_grad]
        if leaves and torch.is_grad_enabled():
            return tree_map_only(torch.Tensor, lambda t: _NoBackward.apply(op, t, *leaves), out)
        return out

    return call


def _positional(kernel, schema: str):
    """Returns the kernel with arguments also by position: the dispatcher decides which it passes so. No gradients are
    recorded inside, because an op is differentiable by its registered backward or not at all."""
    names = [a.name for a in torch._C.parse_schema(f"npu::{schema}").arguments]

    @torch.no_grad()
    def call(*args, **kwargs):
        return kernel(**dict(zip(names, args, strict=False)), **kwargs)

    return call


def _register_gradient(name: str, gradient) -> None:
    arguments = getattr(torch.ops.npu, name).default._schema.arguments
    names = [a.name for a in arguments if not a.kwarg_only]

    def setup(ctx, inputs, keyword_only_inputs, output):
        arguments_by_name = dict(zip(names, inputs, strict=True)) | keyword_only_inputs
        output = output if isinstance(output, tuple) else (output,)
        keep = {n: t for n, t in arguments_by_name.items() if torch.is_tensor(t)}
        ctx.names, ctx.settings = list(keep), {n: v for n, v in arguments_by_name.items() if n not in keep}
        ctx.save_for_backward(*keep.values(), *(t for t in output if torch.is_tensor(t)))

    def backward(ctx, *dys):
        tensors = ctx.saved_tensors
        i = ctx.settings | dict(zip(ctx.names, tensors, strict=False))
        gradients = gradient(torch.ops.npu, dys, i, tensors[len(ctx.names) :])
        return tuple(gradients.get(n) for n in names)

    def setup_positional(ctx, inputs, output):
        setup(ctx, inputs, {}, output)

    keyword_only = any(a.kwarg_only for a in arguments)
    torch.library.register_autograd(
        f"npu::{name}", backward, setup_context=setup if keyword_only else setup_positional, lib=_LIBRARY
    )
