"""Every op of `common.ops` equals plain torch in fp64, on the reference branch and on the npu branch over the published
contract (`npu_contract.py`: not a run on Ascend). The contract refuses wrong calls."""

import dataclasses
from types import SimpleNamespace

import npu_contract
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from common import ops, ops_check, ops_speed, parallel
from common.ops_check import CASES, SMALL, Draw
from common.optimizer import clip_gradients

pytestmark = pytest.mark.L2

CPU = torch.device("cpu")
npu = torch.ops.npu


@pytest.fixture(params=["cpu", "npu"])
def backend(request, monkeypatch):
    npu_contract.install()
    monkeypatch.setattr(ops, "BACKEND", request.param)
    return request.param


@pytest.fixture
def contract():
    npu_contract.install()


class Called(TorchDispatchMode):
    """Records the npu ops that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "npu":
            self.names.add(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ops_check.TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_op_and_its_gradients_equal_fp64(name, dtype, backend):
    case = CASES[name]
    if backend == "npu" and "sparse" in name and dtype == torch.float32:
        with pytest.raises(RuntimeError, match="fp16 or bf16"):
            ops_check.errors(case, dtype, CPU)
        return
    worst = ops_check.errors(case, dtype, CPU)
    assert max(worst.values()) <= ops_check.TOLERANCE[dtype], worst


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "kernels/" in case.backends["cuda"]])
def test_cuda_branch_hands_its_kernel_what_it_wants(name, monkeypatch):
    """Triton's interpreter runs on the host: this proves the call and its gradients, nothing about a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(ops, "BACKEND", "cuda")
    case = CASES[name]
    if "sparse" in name:  # as many blocks, of a sixteenth of the scores: 1 s in the interpreter, not 30
        case = dataclasses.replace(case, fixed={"E": 32, "BLOCK": 32, "L": 100})
    worst = ops_check.errors(case, torch.float32, CPU)
    assert max(worst.values()) <= ops_check.TOLERANCE[torch.float32], worst


@pytest.mark.parametrize("own", [False, True])
def test_rms_norm_of_the_cuda_branch_is_the_kernel_that_the_switch_names(own, monkeypatch):
    kernel = pytest.importorskip("kernels.rms_norm")
    called, run = [], kernel.rms_norm
    monkeypatch.setattr(kernel, "rms_norm", lambda *args: (called.append(1), run(*args))[1])
    monkeypatch.setattr(ops, "BACKEND", "cuda")
    monkeypatch.setattr(ops, "RMS_NORM_KERNEL", own)
    worst = ops_check.errors(CASES["rms_norm"], torch.float32, CPU)
    assert max(worst.values()) <= ops_check.TOLERANCE[torch.float32] and len(called) == own, worst


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "(fp32: torch SDPA)" in case.backends["cuda"]])
def test_fp32_attention_of_the_cuda_branch_needs_no_flash_kernel(name, monkeypatch):
    """torch's variable-length kernel takes only fp16 and bf16 and has no host version: fp32 must not reach it."""
    monkeypatch.setattr(ops, "BACKEND", "cuda")
    worst = ops_check.errors(CASES[name], torch.float32, CPU)
    assert max(worst.values()) <= ops_check.TOLERANCE[torch.float32], worst


@pytest.mark.parametrize("torch_version", ["2.11", "2.13"])
def test_shared_key_heads_are_told_to_the_torch_that_wants_to_know(torch_version, monkeypatch):
    """varlen_attn of 2.13 refuses fewer key heads without enable_gqa=True; that of 2.11 has no such argument."""

    def as_2_11(q, k, v, bounds_q, bounds_k, longest_q, longest_k, *, window_size):
        bounds = ops.pack_bounds(bounds_q.tolist(), CPU)
        return ops._attention_by_sequence(*(t.unsqueeze(1) for t in (q, k, v)), (-1, 0), bounds, None).squeeze(1)

    def as_2_13(*inputs, enable_gqa=False, **options):
        assert enable_gqa
        return as_2_11(*inputs, **options)

    case = CASES["attention, packed"]
    inputs = case.make(Draw(SMALL | case.fixed, torch.float32, CPU))
    want = case.op(**inputs)
    monkeypatch.setattr(ops, "varlen_attn", {"2.11": as_2_11, "2.13": as_2_13}[torch_version])
    monkeypatch.setattr(ops, "_VARLEN_TAKES_GQA", torch_version == "2.13")
    q, k, v = (inputs[x].squeeze(1) for x in "qkv")
    got = ops._attention_varlen(q, k, v, (-1, 0), inputs["bounds"], inputs["bounds"], None)
    torch.testing.assert_close(got.unsqueeze(1), want)


@pytest.mark.parametrize("name", CASES)
def test_plain_version_takes_the_inputs_of_the_speed_table(name):
    """Their dtype is bf16 on an accelerator, except for inputs that are fp32 by contract. Its results have the op's."""
    case = CASES[name]
    inputs = case.make(Draw(SMALL | case.fixed, torch.bfloat16, CPU))
    plain = ops_speed.rounded_as_op(case, inputs)
    ops_speed.forward_and_backward(plain, inputs)()
    results = (case.op(**inputs), plain(**inputs))
    mine, theirs = ([out.dtype for out in (r if isinstance(r, tuple) else (r,))] for r in results)
    assert mine == theirs


@pytest.mark.parametrize("name", CASES)
def test_npu_branch_calls_the_op_it_names(name, contract, monkeypatch):
    monkeypatch.setattr(ops, "BACKEND", "npu")
    case = CASES[name]
    with Called() as called:
        ops_check.outputs_and_gradients(case.op, case.make(Draw(SMALL | case.fixed, torch.bfloat16, CPU)))
    named = {word for word in case.backends["npu"].split(", ") if word.startswith("npu_")}
    assert named == {n for n in called.names if not n.endswith(("_grad", "_backward"))}


def test_comparison_has_teeth():
    """A causal op against the full reference is far beyond the tolerance."""
    wrong = ops_check.Case(CASES["attention"].make, CASES["attention"].op, lambda q, k, v: ops_check.plain_attention(
        q, k, v, causal=True), {})  # fmt: skip
    assert max(ops_check.errors(wrong, torch.float32, CPU).values()) > 0.1


# ----------------------------------------------------------------------------------------- what the cases do not reach


def test_packed_bounds_that_do_not_fit_are_refused(backend):
    q = torch.randn(6, 1, 2, 8)
    for bounds in ([0, 4], [0, 3, 7]):
        with pytest.raises(ValueError, match="expected its tokens"):
            ops.attention(q, q, q, bounds=ops.pack_bounds(bounds, CPU))
    for bounds in ([2, 6], [0, 4, 3, 6]):
        with pytest.raises(ValueError, match="expected rising numbers from 0"):
            ops.pack_bounds(bounds, CPU)


@pytest.mark.parametrize(("V", "scale"), [(8, None), (5, 0.6)])
@pytest.mark.parametrize("K", [6, 3, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("where", ["cpu", "npu", "cuda"])  # fp32: the cuda branch runs plain torch
def test_blockwise_attention_has_the_lse_and_gradients_of_the_whole(causal, K, V, scale, where, contract, monkeypatch):
    monkeypatch.setattr(ops, "BACKEND", where)
    generator = torch.Generator().manual_seed(K)
    shapes = ((6, 8), (K, 8), (K, V), (6, V))  # heads and widths
    q, k, v, dout = (torch.randn(2, heads, 10, width, generator=generator) for heads, width in shapes)
    out, lse = ops.attention_with_lse(q, k, v, causal, scale)
    scores = q @ k.repeat_interleave(6 // K, 1).transpose(2, 3) * (scale or 8**-0.5)
    if causal:
        scores = scores.masked_fill(torch.ones(10, 10, dtype=torch.bool).triu(1), -torch.inf)
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-5)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    want = F.scaled_dot_product_attention(*leaves, is_causal=causal, scale=scale, enable_gqa=True)
    assert torch.allclose(out, want, atol=1e-5)
    want.backward(dout)
    for got, leaf in zip(ops.attention_backward(dout, q, k, v, out, lse, causal, scale), leaves, strict=True):
        assert torch.allclose(got, leaf.grad, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if "narrow" in name])
def test_narrow_values_go_to_npu_as_they_are_only_if_a_switch_says_so(name, contract, monkeypatch):
    """The documentation can be read in two ways. The default reading refuses them."""
    monkeypatch.setattr(ops, "BACKEND", "npu")
    monkeypatch.setattr(ops, "NARROW_ON_NPU", True)
    with pytest.raises(RuntimeError, match="and value .* differ"):
        ops_check.errors(CASES[name], torch.float32, CPU)
    monkeypatch.setitem(npu_contract.NARROW_VALUES, "allowed", True)
    worst = ops_check.errors(CASES[name], torch.float32, CPU)
    assert max(worst.values()) <= ops_check.TOLERANCE[torch.float32], worst


@pytest.mark.parametrize(("keep", "kept"), [(0.0, 0), (0.2, 1), (0.34, 2), (0.6, 3), (1.0, 5)])
def test_selected_blocks_have_the_largest_pooled_softmax(keep, kept):
    q, k = torch.randn(70, 2, 4, 24), torch.randn(75, 2, 2, 24)
    blocks = ops.select_blocks(q, k, keep, 16)
    pooled = [torch.stack([part.double().mean(0) for part in x.split(16)], 2) for x in (q, k)]  # [B, H, 5, E]
    probabilities = (pooled[0] @ pooled[1].repeat_interleave(2, 1).mT * 24**-0.5).softmax(-1)
    assert blocks.shape == (2, 4, 5, 5)
    assert torch.equal(blocks, probabilities.argsort(-1, descending=True).argsort(-1) < kept)


def test_packed_attention_fills_no_whole_gradient_for_each_sequence():
    """The backward of a slice fills a gradient of all tokens; the backward of a split joins the pieces once."""
    from torch.profiler import profile

    q, k, v = (torch.randn(24, 1, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out = ops.attention(q, k, v, causal=True, bounds=ops.pack_bounds([0, 5, 11, 24], CPU))
    with profile() as profiled:
        out.sum().backward()
    called = {event.key for event in profiled.key_averages()}
    assert "aten::slice_backward" not in called and "SplitWithSizesBackward0" in " ".join(called)
    whole = [x.grad for x in (q, k, v)]
    for a, b in ((0, 5), (5, 11), (11, 24)):
        parts = [x[a:b].detach().requires_grad_() for x in (q, k, v)]
        ops.attention(*parts, causal=True).sum().backward()
        assert all(torch.equal(x.grad, grad[a:b]) for x, grad in zip(parts, whole, strict=True))


def test_selected_blocks_hold_those_always_kept():
    q, k = torch.randn(70, 1, 2, 16), torch.randn(90, 1, 1, 16)
    free = ops.select_blocks(q, k, 0.3, 16)
    held = ops.select_blocks(q, k, 0.3, 16, always_queries=17, always_keys=16)
    assert held[:, :, :2].all() and held[..., 0].all()
    assert torch.equal(held[:, :, 2:, 1:], free[:, :, 2:, 1:]) and not held[:, :, 2:].all()


def test_block_sparse_attention_equals_masked_attention_on_a_cpu():
    """With short last blocks, shared key heads and a query block that keeps nothing; gradients too."""
    q, k, v = (torch.randn(n, 2, heads, 24, requires_grad=True) for n, heads in ((70, 4), (75, 2), (75, 2)))
    blocks = torch.rand(2, 4, 5, 5) < 0.4
    blocks[..., 1, :], blocks[..., 2, 4] = False, True
    seen = blocks.repeat_interleave(16, 2)[:, :, :70].repeat_interleave(16, 3)[..., :75]
    mask = torch.zeros(seen.shape).masked_fill(~seen, -1e30)
    plain = F.scaled_dot_product_attention(*(t.permute(1, 2, 0, 3) for t in (q, k, v)), attn_mask=mask, enable_gqa=True)
    want = plain.masked_fill(~seen.any(-1, keepdim=True), 0).permute(2, 0, 1, 3)
    got, direction = ops.block_sparse_attention(q, k, v, blocks, 16), torch.randn(want.shape)
    assert torch.allclose(got, want, atol=1e-5) and not got[16:32].any()
    for mine, theirs in zip(*(torch.autograd.grad((t * direction).sum(), (q, k, v)) for t in (got, want)), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5 * float(theirs.abs().max()))


def test_selected_share_is_rounded_up_only_if_it_is_not_whole():
    q, k = torch.randn(16, 1, 1, 4), torch.randn(1600, 1, 1, 4)
    assert 0.07 * 100 > 7 and ops.select_blocks(q, k, 0.07, 16).sum() == 7
    assert ops.select_blocks(q, k, 0.071, 16).sum() == 8
    with pytest.raises(ValueError, match="a fraction"):
        ops.select_blocks(q, k, 7, 16)


def test_a_query_without_blocks_gives_zeros():
    q = torch.randn(40, 1, 2, 128, dtype=torch.bfloat16)
    blocks = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    blocks[:, :, 1] = False
    out = ops.block_sparse_attention(q, q, q, blocks, block=16)
    assert not out[16:32].any() and out[:16].abs().sum() > 0


def test_adamw_of_npu_equals_torch(contract, monkeypatch):
    monkeypatch.setattr(ops, "BACKEND", "npu")
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    start = torch.randn(7, 5)
    mine, reference = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = ops.AdamW([mine], **options), torch.optim.AdamW([reference], **options)
    for step in range(5):
        for p in (mine, reference):
            p.grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        for optimizer in optimizers:
            optimizer.step()
        assert torch.allclose(mine, reference, rtol=1e-5, atol=1e-6), f"step {step}"


def split_vocabulary(backend: str) -> dict:
    """Computes loss and gradients on two ranks, each of which holds half of the vocabulary."""
    from megatron.core import parallel_state as mpu

    npu_contract.install()
    ops.BACKEND = backend
    try:
        import wan_case

        parallel.initialize(wan_case.options(tp=2))
        hidden, weight, labels, token_weight = loss_inputs()
        mine = weight.detach().chunk(2)[mpu.get_tensor_model_parallel_rank()].clone().requires_grad_()
        return loss_and_gradients(hidden, mine, labels, token_weight, tp_size=2)
    finally:
        ops.BACKEND = "cpu"


def loss_and_gradients(hidden, weight, labels, token_weight, tp_size: int = 1) -> dict:
    """Computes the weighted loss, the same with log-probabilities weighted afterwards, and the gradients of both."""
    loss, losses = ops.linear_cross_entropy(hidden, weight, labels, token_weight, tp_size)
    first = torch.autograd.grad(loss, (hidden, weight))
    log_probs = ops.linear_log_probs(hidden, weight, labels, tp_size)
    later = torch.autograd.grad(-log_probs @ token_weight, (hidden, weight))
    frozen = ops.linear_cross_entropy(hidden, weight.detach(), labels, token_weight, tp_size)[0]
    afterwards = ops.linear_log_probs(hidden, weight.detach(), labels, tp_size)
    return {
        "loss": loss.detach(), "losses": losses, "log_probs": log_probs.detach(),
        "hidden": first[0], "weight": first[1], "hidden later": later[0], "weight later": later[1],
        "hidden, weight frozen": torch.autograd.grad(frozen, hidden)[0],
        "hidden later, weight frozen": torch.autograd.grad(-afterwards @ token_weight, hidden)[0],
    }  # fmt: skip


def loss_inputs():
    d = Draw(SMALL | {"V": 64}, torch.float32, CPU)
    return tuple(ops_check.labelled(d).values())


@pytest.mark.parametrize("which", ["cpu", "npu"])
def test_split_vocabulary_equals_the_whole(which, monkeypatch):
    monkeypatch.setattr(ops, "CHUNK", 500)  # several chunks
    hidden, weight, labels, token_weight = loss_inputs()
    want = loss_and_gradients(hidden, weight, labels, token_weight)
    ranks = run_ranks(2, split_vocabulary, which)
    got = {name: ranks[1][name] for name in want}
    for name in want:
        if "hidden" in name:  # the backward of enter_tensor_parallel sums these
            got[name] = ranks[0][name] + ranks[1][name]
        elif "weight" in name:
            got[name] = torch.cat([r[name] for r in ranks])
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    assert not want["losses"][labels < 0].any() and torch.equal(want["log_probs"], -want["losses"])
    for name in ("hidden", "weight"):
        assert torch.allclose(want[f"{name} later"], want[name], rtol=1e-5, atol=1e-6)
    for name in ("hidden", "hidden later"):
        assert torch.equal(want[f"{name}, weight frozen"], want[name])


@pytest.mark.parametrize(("name", "passes"), [("linear_cross_entropy", 1), ("linear_log_probs", 2)])
def test_the_loss_never_holds_more_logits_than_a_chunk(name, passes, monkeypatch):
    monkeypatch.setattr(ops, "CHUNK", 10 * 101)
    rows = []
    plain = ops._softmax_loss
    monkeypatch.setattr(ops, "_softmax_loss", lambda logits, *rest: (rows.append(len(logits)), plain(logits, *rest))[1])
    case = CASES[name]
    ops_check.outputs_and_gradients(case.op, case.make(Draw(SMALL, torch.float32, CPU)))
    assert rows == passes * [10, 10, 9]


# --------------------------------------------------------------------------------------- wrong calls the contract refuses

CAUSAL = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def floats(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def attend(layout="SBH", heads=2, shape=(6, 1, 16), **options):
    q = floats(*shape)
    return npu.npu_fusion_attention(q, q, q, heads, layout, **options)


def pack(ends, **options):
    q = floats(6, 2, 8)
    return npu.npu_fusion_attention(q, q, q, 2, "TND", actual_seq_qlen=ends, actual_seq_kvlen=ends, **options)


def grouped(ends, x=None, weight=None, **how):
    x, weight = floats(6, 4) if x is None else x, floats(2, 4, 3) if weight is None else weight
    how = {"split_item": 2, "group_type": 0, "group_list_type": 0} | how
    return npu.npu_grouped_matmul([x], [weight], group_list=torch.tensor(ends), **how)


def sparse(dtype=torch.bfloat16, block=128, E=128, mask=None, **options):
    q = floats(1, 2, 200, E, dtype=dtype)
    mask = torch.ones(1, 2, 2, 2, dtype=torch.int8) if mask is None else mask
    layout = {"q_input_layout": "BNSD", "kv_input_layout": "BNSD", "num_key_value_heads": 2, "scale_value": 0.1}
    return npu.npu_block_sparse_attention(q, q, q, mask, [block, block], **layout | {"inner_precise": 0} | options)


def rotate(mode="half", table=(6, 1, 1, 8), **options):
    return npu.npu_rotary_mul(floats(6, 2, 3, 8), torch.zeros(table), torch.zeros(table), mode, **options)


def adamw(out=3, grad=None, **named):
    p = floats(4)
    return npu.npu_apply_adam_w(1.0, 1.0, 0.1, 0.0, 0.9, 0.9, 1e-8, p if grad is None else grad, None, False, False,
                                out=[floats(4) for _ in range(out)], **named)  # fmt: skip


RIGHT = {
    "attention": attend, "packed": lambda: pack([2, 6]), "grouped": lambda: grouped([2, 6]), "sparse": sparse,
    "rotary": rotate, "adamw": adamw, "causal": lambda: attend(atten_mask=CAUSAL, sparse_mode=3),
}  # fmt: skip

WRONG = {
    "mask upside down": (lambda: attend(atten_mask=~CAUSAL, sparse_mode=3), "masked out"),
    "mask not compressed": (lambda: attend(atten_mask=CAUSAL[:6, :6], sparse_mode=3), "compressed"),
    "mask of floats": (lambda: attend(atten_mask=CAUSAL.float(), sparse_mode=3), "bool or uint8"),
    "band without the compressed mask": (lambda: attend(atten_mask=CAUSAL[:6, :6], sparse_mode=4), "compressed"),
    "full mask of another length": (lambda: attend(atten_mask=CAUSAL[:6, :5], sparse_mode=1), "does not end in"),
    "layout of four dimensions": (lambda: attend("BSND"), "4 dimensions"),
    "unknown layout": (lambda: attend("LBHE"), "one of"),
    "heads of another number": (lambda: attend("BNSD", 3, (1, 2, 6, 8)), "query heads"),
    "heads that do not divide": (lambda: attend(heads=3), "does not divide"),
    "head_num left out": (lambda: npu.npu_fusion_attention(*[floats(6, 1, 16)] * 3, input_layout="SBH"), "head_num"),
    "keyword of another library": (lambda: attend(softmax_scale=0.5), "softmax_scale"),
    "counts for cumulative lengths": (lambda: pack([2, 4]), "cumulative"),
    "falling lengths": (lambda: pack([6, 2]), "cumulative"),
    "packed without lengths": (lambda: pack(None), "actual_seq_qlen"),
    "dtypes mixed": (lambda: npu.npu_rms_norm(floats(3, 4).bfloat16(), floats(4), epsilon=1e-6), "one dtype"),
    "eps for epsilon": (lambda: npu.npu_rms_norm(floats(3, 4), floats(4), eps=1e-6), "eps"),
    "gamma of another width": (lambda: npu.npu_rms_norm(floats(3, 4), floats(3)), "gamma"),
    "odd width": (lambda: npu.npu_swiglu(floats(3, 5), -1), "in two"),
    "rotary mode": (lambda: rotate("interleaved"), "half or interleave"),
    "rotary of three dimensions": (
        lambda: npu.npu_rotary_mul(floats(6, 2, 8), torch.zeros(6, 1, 8), torch.zeros(6, 1, 8)), "4-D"),
    "angles by sample, interleaved": (lambda: rotate("interleave", (6, 2, 1, 8)), "sequence alone"),
    "angles for cosines": (
        lambda: npu.npu_rotary_mul(floats(6, 2, 3, 8), torch.full((6, 1, 1, 8), 3.0), torch.zeros(6, 1, 1, 8)), r"\[-1, 1\]"),
    "counts for cumulative groups": (lambda: grouped([2, 4]), "not at 6 rows"),
    "cumulative groups called counts": (lambda: grouped([2, 6], group_list_type=1), "not at 6 rows"),
    "split_item of several outputs": (lambda: grouped([2, 6], split_item=0), "one tensor"),
    "int32 group list": (lambda: npu.npu_grouped_matmul(
        [floats(6, 4)], [floats(2, 4, 3)], group_list=torch.tensor([2, 6], dtype=torch.int32), split_item=2, group_type=0),
        "int64"),
    "weight not transposed": (lambda: grouped([2, 6], weight=floats(2, 3, 4)), "times weight"),
    "weight gradient without transposing": (
        lambda: grouped([2, 6], floats(6, 4), floats(6, 3), split_item=3, group_type=2), "not at 4 rows"),
    "sparse fp32": (lambda: sparse(torch.float32), "fp16 or bf16"),
    "sparse block of 64": (lambda: sparse(block=64), "multiple of 128"),
    "sparse bf16 at low precision": (lambda: sparse(inner_precise=1), "inner_precise"),
    "sparse mask by token": (lambda: sparse(mask=torch.ones(1, 2, 200, 200, dtype=torch.int8)), "expected"),
    "label out of range": (lambda: npu.npu_cross_entropy_loss(floats(2, 5), torch.tensor([0, -100])), "labels lie"),
    "int32 labels": (lambda: npu.npu_cross_entropy_loss(floats(2, 5), torch.tensor([0, 1], dtype=torch.int32)), "int32"),
    "adamw without moments": (lambda: adamw(out=1), "var, m, v"),
    "adamw of a bf16 gradient": (lambda: adamw(grad=floats(4).bfloat16()), "one dtype"),
    "permute by float experts": (lambda: npu.npu_moe_token_permute(floats(3, 4), floats(3, 2)), "int32 or int64"),
    "unpermute by int64 rows": (
        lambda: npu.npu_moe_token_unpermute(floats(4, 3), torch.arange(4), probs=floats(2, 2)), "int32"),
    "unpermute with wide probs": (
        lambda: npu.npu_moe_token_unpermute(floats(4, 3).bfloat16(), torch.arange(4).int(), probs=floats(2, 2)), "one dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right_call_passes_the_contract(name, contract):
    assert RIGHT[name]() is not None


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call_is_refused(name, contract):
    call, reason = WRONG[name]
    with pytest.raises(RuntimeError, match=reason):
        call()


def test_a_missing_backward_is_an_error(contract):
    """npu_grouped_matmul has no backward: if it is called alone on a device, its weight silently never trains."""
    x = floats(6, 4).requires_grad_()
    out = npu.npu_grouped_matmul([x], [floats(2, 4, 3)], group_list=torch.tensor([2, 6]), split_item=2, group_type=0)[0]
    with pytest.raises(RuntimeError, match="has no backward"):
        out.sum().backward()


def test_block_sparse_gradient_needs_the_lse(contract):
    q = floats(1, 2, 200, 128, dtype=torch.bfloat16).requires_grad_()
    layout = {"q_input_layout": "BNSD", "kv_input_layout": "BNSD", "num_key_value_heads": 2, "scale_value": 0.1}
    out = npu.npu_block_sparse_attention(
        q, q, q, torch.ones(1, 2, 2, 2, dtype=torch.int8), [128, 128], **layout, inner_precise=0
    )[0]
    with pytest.raises(RuntimeError, match="softmax_lse_flag"):
        out.float().sum().backward()


@pytest.mark.parametrize("limit", [0.5, 100.0, 0.0])
def test_gradients_are_clipped_as_torch_clips_them(limit):
    values = [torch.randn(3, 4), torch.randn(5), None]  # one parameter has no gradient
    mine, reference = ([torch.nn.Parameter(torch.zeros(1 if v is None else v.shape)) for v in values] for _ in range(2))
    for parameters in (mine, reference):
        for p, value in zip(parameters, values, strict=True):
            p.grad = None if value is None else value.clone()
    norm = torch.nn.utils.clip_grad_norm_(reference, limit or float("inf"))
    parts = [SimpleNamespace(get_parameters=lambda some=some: some) for some in (mine[:1], mine[1:])]
    clip_gradients(SimpleNamespace(chained_optimizers=parts), limit, float(norm))
    for p, q in zip(mine[:2], reference[:2], strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)
    assert mine[2].grad is None
