"""Which library computes attention on cuda, how it is called, and that torch.compile traces a block around it whole.

There is no GPU here: a stand-in takes the place of flash-attn-4. It has the arguments of its version 4.0.0b36, computes
in plain torch, and refuses other arguments."""

import importlib
import itertools
import sys
from types import ModuleType

import pytest
import qwen_case as case
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from common import ops, ops_check
from common.ops import flash4
from common.ops_check import CASES, plain_attention

CPU = torch.device("cpu")
ATTENTION = [name for name in CASES if name.startswith("attention") and "sparse" not in name]
pytestmark = pytest.mark.L2


class Library(ModuleType):
    """flash_attn.cute.interface: the two functions that we call. `calls` lists address and shape of q, and whether it is packed."""

    def __init__(self):
        super().__init__("flash_attn.cute.interface")
        self.calls = []

    def _flash_attn_fwd(
        self, q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal=False,
        window_size_left=None, window_size_right=None, return_lse=False, out=None, softmax_scale=None,
    ):  # fmt: skip
        assert return_lse and out.stride(-1) == q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        self.calls.append((q.data_ptr(), tuple(q.shape), cu_seqlens_q is not None))
        lse = q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=torch.float32)
        for rows in self.sequences(cu_seqlens_q, max_seqlen_q):
            scores, wide = self.scores(q, k, v, rows, causal, window_size_left, window_size_right, softmax_scale)
            out[rows] = torch.einsum("...hls,...shv->...lhv", scores.softmax(-1).nan_to_num(), wide[2]).to(out.dtype)
            lse.transpose(-1, -2)[rows] = scores.logsumexp(-1).transpose(-1, -2)
        return out, lse, None, None, None

    def _flash_attn_bwd(
        self, q, k, v, out, dout, lse, causal=False, window_size_left=None, window_size_right=None, cu_seqlens_q=None,
        cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False, softmax_scale=None,
    ):  # fmt: skip
        gradients = tuple(map(torch.empty_like, (q, k, v)))
        for rows in self.sequences(cu_seqlens_q, max_seqlen_q):
            scores, wide = self.scores(q, k, v, rows, causal, window_size_left, window_size_right, softmax_scale)
            p = (scores - lse.transpose(-1, -2)[rows].transpose(-1, -2).unsqueeze(-1)).exp()  # [..., H, L, S]
            d = dout[rows].float()
            rest = (d * out[rows]).sum(-1).transpose(-1, -2).unsqueeze(-1)
            dscores = (
                p * (torch.einsum("...lhv,...shv->...hls", d, wide[2]) - rest) * (softmax_scale or q.shape[-1] ** -0.5)
            )
            dq = torch.einsum("...hls,...she->...lhe", dscores, wide[1])
            dk = torch.einsum("...hls,...lhe->...she", dscores, wide[0])
            dv = torch.einsum("...hls,...lhv->...shv", p, d)
            heads = k.shape[-2]
            for gradient, whole in zip(
                gradients, (dq, *(g.unflatten(-2, (heads, -1)).sum(-2) for g in (dk, dv))), strict=True
            ):
                gradient[rows] = whole.to(q.dtype)
        return gradients

    def sequences(self, bounds, longest) -> list:
        if bounds is None:
            return [...]
        assert bounds.dtype == torch.int32 and int(bounds.diff().max()) <= longest
        return [slice(a, b) for a, b in itertools.pairwise(bounds.tolist())]

    def scores(self, q, k, v, rows, causal, left, right, scale):
        assert not (causal and (left is not None or right is not None))
        assert all(x is None or x >= 0 for x in (left, right))
        window = (-1, 0) if causal else (-1 if left is None else left, -1 if right is None else right)
        q, k, v = (t[rows].float() for t in (q, k, v))
        k, v = (t.repeat_interleave(q.shape[-2] // t.shape[-2], -2) for t in (k, v))
        scores = torch.einsum("...lhe,...she->...hls", q, k) * (scale or q.shape[-1] ** -0.5)
        seen = ops.visible(scores.shape[-2], scores.shape[-1], window, q.device)
        return scores.masked_fill(~seen, -torch.inf), (q, k, v)


@pytest.fixture
def library(monkeypatch):
    """Makes this process believe that it is on a Hopper card with flash-attn-4."""
    made = Library()
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", made)
    monkeypatch.setattr(ops, "BACKEND", "cuda")
    monkeypatch.setattr(ops, "attention_kernel", lambda: "FlashAttention-4")
    return made


@pytest.mark.parametrize("name", ATTENTION)
def test_flash_attention_4_is_called_as_it_wants_and_has_fp64s_output_and_gradients(name, library):
    worst = ops_check.errors(CASES[name], torch.bfloat16, CPU)
    assert max(worst.values()) <= ops_check.TOLERANCE[torch.bfloat16], worst
    assert [packed for *_, packed in library.calls] == ["packed" in name]


@pytest.mark.parametrize("cu_seqlens", [[0, 24], [0, 8, 16, 24], [0, 5, 24]])
def test_rows_of_one_length_are_a_batch_and_nothing_is_copied(cu_seqlens, library):
    q, k, v = (torch.randn(24, 1, heads, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))
    bounds = ops.pack_bounds(cu_seqlens, CPU)
    got = ops.attention(q, k, v, causal=True, bounds=bounds)
    n = len(cu_seqlens) - 1
    packed = bounds.rows == 0
    assert library.calls == [(q.data_ptr(), (24, 4, 16) if packed else (n, 24 // n, 4, 16), packed)]
    want = plain_attention(*(t.double() for t in (q, k, v)), causal=True, bounds=bounds)
    assert (got - want).abs().max() <= ops_check.TOLERANCE[torch.bfloat16] * want.abs().max()


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_of_the_ring_has_flash_attention_4s_lse_and_takes_the_lse_of_all(causal, library, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    shapes = ((4, 16), (2, 16), (2, 8), (4, 8))  # heads and widths
    q, k, v, dout = (torch.randn(2, heads, 16, width, generator=generator) for heads, width in shapes)
    monkeypatch.setattr(ops, "BACKEND", "cpu")
    out, lse = ops.attention_with_lse(q, k, v, causal, 0.4)
    lse_of_all, out_of_all = lse + 0.3, out + 0.1
    want = ops.attention_backward(dout, q, k, v, out_of_all, lse_of_all, causal, 0.4)
    monkeypatch.setattr(ops, "BACKEND", "cuda")
    monkeypatch.setattr(ops, "_takes_flash", lambda t: True)
    got_out, got_lse = ops.attention_with_lse(q, k, v, causal, 0.4)
    torch.testing.assert_close((got_out, got_lse), (out, lse), rtol=1e-5, atol=1e-5)
    got = ops.attention_backward(dout, q, k, v, out_of_all, lse_of_all, causal, 0.4)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert library.calls == [(q.data_ptr(), (2, 16, 4, 16), False)]


@pytest.mark.parametrize(
    ("kernel", "cudnn_takes", "V", "cu_seqlens", "width"),
    [
        ("FlashAttention-4", False, 128, [0, 5, 24], None),
        ("FlashAttention-4", False, 96, [0, 5, 24], 192),
        ("cuDNN", True, 128, None, 128),
        ("cuDNN", True, 128, [0, 12, 24], 128),
        ("cuDNN", False, 128, None, 192),
        ("cuDNN", True, 128, [0, 5, 24], 192),
        ("FlashAttention-2", True, 128, None, 192),
    ],
)
def test_values_are_widened_only_for_kernels_that_want_one_width(
    kernel, cudnn_takes, V, cu_seqlens, width, library, monkeypatch
):
    """width: that of the values as torch's kernels get them. Queries and keys have 192 numbers, as in latent attention."""
    widths, sdpa = [], F.scaled_dot_product_attention

    def recording(q, k, v, **options):
        widths.append(v.shape[-1])
        return sdpa(q, k, v, **options)

    def varlen(q, k, v, bounds_q, bounds_k, longest_q, longest_k, *, window_size, scale, **options):
        bounds = ops.pack_bounds(bounds_q.tolist(), CPU)
        q, k, v = (t.unsqueeze(1) for t in (q, k, v))
        return ops._attention_by_sequence(q, k, v, window_size, bounds, scale).squeeze(1)

    monkeypatch.setattr(ops, "attention_kernel", lambda: kernel)
    monkeypatch.setattr(ops, "_cudnn_takes", lambda E, V: cudnn_takes)
    monkeypatch.setattr(ops, "varlen_attn", varlen)
    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    bounds = None if cu_seqlens is None else ops.pack_bounds(cu_seqlens, CPU)
    case = ops_check.attention_case(
        lambda d: (
            dict(q=d.floats(24, 1, 2, 192), k=d.floats(24, 1, 2, 192), v=d.floats(24, 1, 2, V))
            | dict(causal=True, bounds=bounds, scale=0.1)
        ),
        "",
    )
    worst = ops_check.errors(case, torch.bfloat16, CPU)
    assert max(worst.values()) <= ops_check.TOLERANCE[torch.bfloat16], worst
    assert set(widths) == ({width} if width else set()) and len(library.calls) == (width is None)


@pytest.mark.parametrize(
    ("refusal", "cudnn", "wanted", "chosen"),
    [
        (None, True, "", "FlashAttention-4"),
        ("flash-attn-4 is not installed", True, "", "cuDNN"),
        ("flash-attn-4 is not installed", False, "", "FlashAttention-2"),
        (None, True, "flash2", "FlashAttention-2"),
        (None, True, "cudnn", "cuDNN"),
        ("flash-attn-4 is not installed", True, "flash4", "flash-attn-4 is not installed; fix: "),
        (None, True, "flash3", "ZOO_ATTENTION='flash3'; expected one of flash4, cudnn, flash2; fix: "),
    ],
)
def test_the_choice_falls_on_what_the_machine_has_unless_the_user_says(refusal, cudnn, wanted, chosen, monkeypatch):
    monkeypatch.setattr(ops, "BACKEND", "cuda")
    monkeypatch.setattr(flash4, "refusal", lambda: refusal)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: cudnn)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("ZOO_ATTENTION", wanted)
    choose = ops.attention_kernel.__wrapped__
    if "fix: " in chosen:
        with pytest.raises(ValueError, match=chosen):
            choose()
    else:
        assert choose() == chosen


def test_why_flash_attention_4_cannot_run_is_said(library, monkeypatch):
    refusal = flash4.refusal.__wrapped__
    monkeypatch.setattr(flash4.importlib.util, "find_spec", lambda name: object())
    for capability, want in (((9, 0), None), ((8, 0), "compute capability 8.0")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert refusal() == want or want in refusal()
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)
    monkeypatch.setattr(flash4.importlib.util, "find_spec", lambda name: None)
    assert refusal() == "flash-attn-4 is not installed"


def test_what_cudnn_takes_is_asked_of_torch_and_not_traced(monkeypatch):
    asked = []

    def can_use(params):
        asked.append((params.query.shape[-1], params.value.shape[-1]))
        return True

    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", can_use)
    monkeypatch.setattr(ops, "BACKEND", "cuda")
    monkeypatch.setattr(ops, "attention_kernel", lambda: "cuDNN")
    q, k, v = (torch.randn(16, 1, 2, width, dtype=torch.bfloat16) for width in (24, 24, 16))
    ops._cudnn_takes.cache_clear()
    torch._dynamo.reset()
    try:
        want = ops.attention(q, k, v, scale=0.2)
        compiled = torch.compile(ops.attention, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(q, k, v, scale=0.2), want) and set(asked) == {(24, 16)}
    finally:
        ops._cudnn_takes.cache_clear()


def permute(tokens, experts):
    order = experts.flatten().argsort(stable=True)
    return tokens[order // experts.shape[1]], order.argsort().int()


def unpermute(rows, position, probs):
    return (rows[position].unflatten(0, probs.shape) * probs.unsqueeze(-1)).sum(1)


def grouped_matmul(x, weight, ends):
    group = torch.bucketize(torch.arange(len(x)), ends, right=True)
    return torch.einsum("nd,gdf,ng->nf", x, weight, torch.nn.functional.one_hot(group, len(weight)).to(x.dtype))


PLAIN = {  # what torch.compile traces into on a GPU; Triton's interpreter cannot be traced
    "rms_norm.add_rms_norm": CASES["add_rms_norm"].plain,
    "norm_rotary.norm_rotary_half": CASES["norm_rotary_half"].plain,
    "swiglu.swiglu": lambda x, up=None: CASES["swiglu"].plain(x if up is None else torch.cat((x, up), -1)),
    "moe_permute.permute": permute,
    "moe_permute.unpermute": unpermute,
    "grouped_matmul.grouped_matmul": grouped_matmul,
}


@pytest.mark.parametrize("which", ["dense", "moe"])
def test_a_block_is_traced_whole_and_not_anew_for_the_documents_of_each_micro_batch(
    which, library, one_rank, monkeypatch
):
    monkeypatch.setattr(ops, "_takes_flash", lambda t: True)
    monkeypatch.setattr(flash4, "takes", lambda q, v: True)  # a head dim of 12
    for name, plain in PLAIN.items():
        module, function = name.split(".")
        monkeypatch.setattr(importlib.import_module(f"kernels.{module}"), function, plain)
    config = case.CONFIGS[which]
    block = case.model.build(case.options(), config)[0].layers["0"]
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.1)
    rope = case.model.rotary_table(torch.arange(24), config)

    def run(forward, cu_seqlens: list[int]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(len(cu_seqlens))
        x, dy = (torch.randn(24, 1, config.hidden_size, generator=generator) for _ in range(2))
        out = forward(x.requires_grad_(), *rope, ops.pack_bounds(cu_seqlens, CPU))[0]
        return [out, *torch.autograd.grad(out, [x, *block.parameters()], dy)]

    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=graphs)  # fullgraph: a break is an error
    for cu_seqlens in ([0, 5, 24], [0, 7, 24], [0, 3, 9, 24], [0, 2, 8, 11, 24], [0, 9, 24]):
        for got, want in zip(run(compiled, cu_seqlens), run(block, cu_seqlens), strict=True):
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert graphs.frame_count <= 3  # the first documents; other lengths; other numbers of them


def test_on_the_cpu_documents_stay_out_of_the_trace():
    torch._dynamo.reset()
    attend = torch.compile(lambda q, b: ops.attention(q * 2, q, q, causal=True, bounds=b) + 1, backend="aot_eager")
    for number, cu_seqlens in enumerate(([0, 3, 12], [0, 5, 12], [0, 7, 12], [0, 1, 12])):
        bounds, q = ops.pack_bounds(cu_seqlens, CPU), torch.randn(12, 1, 2, 8)
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            assert torch.equal(attend(q, bounds), ops.attention(q * 2, q, q, causal=True, bounds=bounds) + 1)


def test_a_run_on_cuda_says_what_attention_runs_on_and_why(monkeypatch):
    monkeypatch.setattr(ops, "BACKEND", "cuda")
    monkeypatch.setattr(ops, "attention_kernel", lambda: "cuDNN")
    monkeypatch.setattr(flash4, "refusal", lambda: "flash-attn-4 is not installed")
    packed = "cuDNN, on FlashAttention-2 in a ring and where sequences of unlike lengths share a row"
    assert ops.describe_attention() == f"{packed}: flash-attn-4 is not installed"
    monkeypatch.setenv("ZOO_ATTENTION", "cudnn")
    assert ops.describe_attention() == f"{packed}, as ZOO_ATTENTION says"
