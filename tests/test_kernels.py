"""The Triton kernels, run by Triton's interpreter, equal plain torch in fp64 in every output and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the kernels are interpreted by triton: bash tests/run.sh installs it")

from kernels import block_sparse_attention as bsa
from kernels import grouped_matmul as gmm
from kernels import linear_cross_entropy as lce
from kernels import moe_permute as moe

pytestmark = pytest.mark.L2

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def difference(got, want):
    """Returns the largest error, relative to the largest entry."""
    assert got.shape == want.shape and want.dtype == torch.float64
    if not want.numel():
        return 0.0
    error = (got.detach().double() - want.detach()).abs().max() / want.detach().abs().max().clamp(min=1e-30)
    return float(error.nan_to_num(nan=float("inf")))


def differences(function, reference, *inputs):
    """Returns the errors of the output and of the gradient of each input, for a random gradient of the output."""
    got_inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    want_inputs = [x.detach().double().requires_grad_() for x in inputs]
    got, want = function(*got_inputs), reference(*want_inputs)
    assert got.dtype == inputs[0].dtype
    dout = randn(*got.shape, dtype=got.dtype, seed=7)
    gradients = zip(
        torch.autograd.grad(got, got_inputs, dout), torch.autograd.grad(want, want_inputs, dout.double()), strict=True
    )
    return {"out": difference(got, want)} | {f"gradient {i}": difference(*pair) for i, pair in enumerate(gradients)}


def assert_equal(function, reference, *inputs):
    tolerance = TOLERANCE[inputs[0].dtype]
    for name, error in differences(function, reference, *inputs).items():
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance} at {[list(x.shape) for x in inputs]}"


class Recorder(TorchDispatchMode):
    """Records the names of the torch ops that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **kwargs or {})

    @property
    def host_reads(self):
        return {name for name in self.names if "_local_scalar_dense" in name or "nonzero" in name or "item" in name}


# linear cross entropy


def sharded_loss(logits, labels, weight, shards):
    """Runs linear_cross_entropy.py's algorithm over column shards -> loss [n], d (loss . weight) / d logits [n, V]"""
    parts = [part.clone() for part in logits.chunk(shards, 1)]
    firsts = [i * parts[0].shape[1] for i in range(shards)]
    peak, total, target = (
        torch.stack(x)
        for x in zip(*(lce.row_statistics(p, labels - f) for p, f in zip(parts, firsts, strict=True)), strict=True)
    )
    top = peak.amax(0)
    lse = top + (total * (peak - top).exp()).sum(0).log()
    gradients = [lce.softmax_gradient_(p, lse, labels - f, weight.float()) for p, f in zip(parts, firsts, strict=True)]
    return lse - target.sum(0), torch.cat(gradients, 1)


def reference_loss(logits, labels, weight):
    logits = logits.double().requires_grad_()
    loss = F.cross_entropy(logits, labels, reduction="none")
    return loss.detach(), torch.autograd.grad((loss * weight).sum(), logits)[0]


@DTYPES
@pytest.mark.parametrize("n, V, shards", [(3, 33, 1), (5, 130, 2), (2, 8198, 1), (1, 8198, 2), (4, 12, 3)])
def test_linear_cross_entropy_over_shards_equals_cross_entropy_and_its_gradient(n, V, shards, dtype):
    logits, weight = randn(n, V, dtype=dtype) * 8, randn(n, seed=1)
    labels = torch.randint(V, (n,), generator=torch.Generator().manual_seed(2))
    for got, want in zip(
        sharded_loss(logits, labels, weight, shards), reference_loss(logits, labels, weight), strict=True
    ):
        assert difference(got, want) <= TOLERANCE[dtype]


@pytest.mark.parametrize("V", [1, 33, 4096, 5000])
def test_row_statistics_are_peak_sum_and_label_of_each_row(V):
    logits, labels = randn(4, V) * 20 - 300, torch.tensor([0, V - 1, V, -100])
    peak, total, target = lce.row_statistics(logits, labels)
    assert torch.equal(peak, logits.amax(1))
    assert difference(total, (logits.double() - logits.double().amax(1, keepdim=True)).exp().sum(1)) <= 1e-5
    assert torch.equal(target, torch.stack([logits[0, 0], logits[1, V - 1], torch.zeros(()), torch.zeros(())]))


def test_a_shard_of_padding_counts_for_nothing():
    logits, labels, weight = randn(3, 40), torch.tensor([3, 0, 19]), randn(3, seed=1)
    logits[:, 20:] = -float("inf")
    loss, gradient = sharded_loss(logits, labels, weight, 2)
    want_loss, want_gradient = reference_loss(logits[:, :20], labels, weight)
    assert difference(loss, want_loss) <= 1e-5 and difference(gradient[:, :20], want_gradient) <= 1e-5
    assert not gradient[:, 20:].any()


def test_a_label_in_no_shard_and_a_huge_one_take_nothing_from_the_gradient():
    labels = torch.tensor([-100, 2**32 + 1])  # the second, cut to 32 bits, would be column 1
    logits, lse, weight = randn(2, 9), torch.zeros(2), torch.ones(2)
    assert difference(lce.softmax_gradient_(logits.clone(), lse, labels, weight), logits.double().exp()) <= 1e-5


@pytest.mark.parametrize("view", [lambda x: x.t().contiguous().t(), lambda x: x.repeat(1, 2)[:, : x.shape[1]]])
def test_linear_cross_entropy_takes_strided_logits(view):
    logits, labels, weight = randn(6, 33), torch.arange(6), randn(6, seed=1)
    strided = view(logits)
    assert not strided.is_contiguous()
    for got, want in zip(lce.row_statistics(strided, labels), lce.row_statistics(logits, labels), strict=True):
        assert torch.equal(got, want)
    lse = logits.logsumexp(1)
    assert lce.softmax_gradient_(strided, lse, labels, weight) is strided
    assert torch.equal(strided, lce.softmax_gradient_(logits, lse, labels, weight))


def test_linear_cross_entropy_of_no_tokens_is_empty():
    none = torch.empty(0)
    assert [len(x) for x in lce.row_statistics(torch.empty(0, 8), none.long())] == [0, 0, 0]
    assert lce.softmax_gradient_(torch.empty(0, 8), none, none.long(), none).shape == (0, 8)


# MoE permutation


def routing(N, K, experts=5):
    generator = torch.Generator().manual_seed(N + K)
    return torch.stack([torch.randperm(experts, generator=generator)[:K] for _ in range(N)]) if N else torch.empty(0, K)


def reference_permute(tokens, indices):
    copies = sorted(range(indices.numel()), key=lambda copy: (int(indices.flatten()[copy]), copy))
    return tokens[torch.tensor(copies, dtype=torch.int64) // indices.shape[1]], copies


def reference_unpermute(rows, position, probs):
    return (rows[position.long()].unflatten(0, probs.shape) * probs.unsqueeze(-1)).sum(1)


MOE_SHAPES = pytest.mark.parametrize("N, K, D", [(7, 2, 33), (4, 1, 1), (3, 3, 130), (2, 4, 4100), (1, 5, 16)])


@DTYPES
@MOE_SHAPES
def test_permute_sorts_by_expert_and_its_gradient_sums_the_copies(N, K, D, dtype):
    indices = routing(N, K)
    assert_equal(
        lambda x: moe.permute(x, indices)[0], lambda x: reference_permute(x, indices)[0], randn(N, D, dtype=dtype)
    )
    rows, position = moe.permute(randn(N, D, dtype=dtype), indices.int())
    assert position.dtype == torch.int32 and rows.dtype == dtype
    assert position.argsort().tolist() == reference_permute(rows, indices)[1]


@DTYPES
@MOE_SHAPES
def test_unpermute_is_the_weighted_sum_of_each_tokens_rows(N, K, D, dtype):
    rows, position = moe.permute(randn(N, D), routing(N, K))
    rows, probs = randn(*rows.shape, dtype=dtype, seed=1), torch.rand(N, K) + 0.1
    assert_equal(
        lambda rows, probs: moe.unpermute(rows, position, probs),
        lambda rows, probs: reference_unpermute(rows, position, probs),
        rows,
        probs,
    )
    ones = torch.ones(N, K, dtype=torch.float64)
    assert_equal(
        lambda rows: moe.unpermute(rows, position, None, top_k=K),
        lambda rows: reference_unpermute(rows, position, ones),
        rows,
    )


def test_unpermute_takes_probs_in_bf16_and_returns_their_gradient_in_it():
    _, position = moe.permute(randn(6, 3), routing(6, 2))
    assert_equal(
        lambda rows, probs: moe.unpermute(rows, position, probs),
        lambda rows, probs: reference_unpermute(rows, position, probs),
        randn(12, 40, dtype=torch.bfloat16),
        randn(6, 2, dtype=torch.bfloat16),
    )


def test_unpermute_undoes_permute():
    tokens = randn(9, 33)
    rows, position = moe.permute(tokens, routing(9, 4))
    assert difference(moe.unpermute(rows, position, torch.full((9, 4), 0.25)), tokens.double()) <= 1e-6


def test_permutation_takes_strided_tensors():
    tokens, indices = randn(33, 6).t(), routing(6, 3)
    assert_equal(lambda x: moe.permute(x, indices)[0], lambda x: reference_permute(x, indices)[0], tokens)
    _, position = moe.permute(tokens, indices)
    assert_equal(
        lambda rows, probs: moe.unpermute(rows, position, probs),
        lambda rows, probs: reference_unpermute(rows, position, probs),
        randn(10, 18).t(),
        randn(3, 6).t(),
    )


def test_permutation_of_no_tokens_is_empty():
    tokens = torch.empty(0, 8, requires_grad=True)
    rows, position = moe.permute(tokens, torch.empty(0, 2, dtype=torch.int64))
    out = moe.unpermute(rows, position, torch.empty(0, 2))
    out.sum().backward()
    assert rows.shape == out.shape == tokens.grad.shape == (0, 8) and position.shape == (0,)


# grouped matmul


def reference_grouped_matmul(x, weight, ends):
    starts = [0, *ends.tolist()]
    parts = [x[a:b] @ w for a, b, w in zip(starts, starts[1:], weight, strict=False)]
    return torch.cat([*parts, x[starts[-1] :] @ weight[0] * 0])


def assert_grouped_matmul(counts, T, D, F, dtype, index=torch.int64, view=lambda x: x):
    ends = torch.tensor(counts).cumsum(0).to(index)
    assert_equal(
        lambda x, weight: gmm.grouped_matmul(x, weight, ends),
        lambda x, weight: reference_grouped_matmul(x, weight, ends),
        view(randn(T, D, dtype=dtype)),
        view(randn(len(counts), D, F, dtype=dtype)),
    )


@DTYPES
@pytest.mark.parametrize(
    "counts, T",
    [
        ([5, 1, 7], 13),
        ([0, 3, 0, 150, 1, 0], 154),
        ([128, 128], 256),
        ([127, 2, 127, 0, 1], 300),  # with rows behind the last group
        ([0, 0, 0], 4),
        ([0, 0, 129], 129),
        ([1] * 17, 140),
    ],
)
def test_grouped_matmul_multiplies_each_row_by_its_groups_matrix(counts, T, dtype):
    assert_grouped_matmul(counts, T, 33, 20, dtype)


@pytest.mark.parametrize("D, F", [(1, 1), (130, 1), (1, 130), (64, 129), (200, 33)])
def test_grouped_matmul_takes_any_width(D, F):
    assert_grouped_matmul([3, 0, 6], 10, D, F, torch.float32, torch.int32)


def test_grouped_matmul_takes_fp16():
    assert_grouped_matmul([3, 0, 6], 10, 40, 24, torch.float16)


def test_grouped_matmul_takes_strided_tensors():
    assert_grouped_matmul([3, 0, 6], 10, 33, 20, torch.float32, view=lambda x: x.mT.contiguous().mT)


@pytest.mark.parametrize("ROWS", [1, 2, 3, 4, 8])
def test_the_tiles_cover_every_row_of_every_group_once(ROWS):
    """Checks the closed form of grouped_matmul.py's schedule for all ways to cut 9 rows into 3 groups and a rest."""
    T, G = 9, 3
    for ends in ([a, b, c] for c in range(T + 1) for b in range(c + 1) for a in range(b + 1)):
        seen = []
        for tile in range(T // ROWS + G + 1):
            group = sum(end // ROWS + g + 1 <= tile for g, end in enumerate(ends))
            start, end = ([0, *ends])[group], ([*ends, T])[group]
            first = start + (tile - start // ROWS - group) * ROWS
            seen += [(group, row) for row in range(first, min(first + ROWS, end))]
        assert seen == [(sum(end <= row for end in ends), row) for row in range(T)], (ROWS, ends)


def test_rows_behind_the_last_group_may_hold_anything():
    x, weight, ends = randn(12, 8), randn(2, 8, 6), torch.tensor([3, 7])
    dout = randn(12, 6)
    x[7:], dout[7:] = float("nan"), float("inf")
    x.requires_grad_(), weight.requires_grad_()
    out = gmm.grouped_matmul(x, weight, ends)
    gradients = torch.autograd.grad(out, (x, weight), dout)
    want = torch.autograd.grad(reference_grouped_matmul(x[:7], weight, ends), (x, weight), dout[:7])
    assert not out[7:].any() and not gradients[0][7:].any()
    assert all(difference(got, right.double()) <= 1e-5 for got, right in zip(gradients, want, strict=True))


@DTYPES
@pytest.mark.parametrize("counts, T", [([5, 1, 7], 13), ([0, 130, 0, 3], 140), ([0, 0], 4)])
def test_weight_gradients_of_groups_are_added_to_what_is_there(counts, T, dtype):
    ends = torch.tensor(counts).cumsum(0)
    x, dy, total = randn(T, 33, dtype=dtype), randn(T, 20, dtype=dtype), randn(len(counts), 33, 20)
    starts = [0, *ends.tolist()]
    products = [x[a:b].double().T @ dy[a:b].double() for a, b in zip(starts, starts[1:], strict=False)]
    want = total.double() + torch.stack(products)
    gmm.add_weight_gradient_(total, x, dy, ends)
    assert (total - want).abs().max() <= 1e-6 * want.abs().max()
    with pytest.raises(ValueError, match="expected fp32"):
        gmm.add_weight_gradient_(total.bfloat16(), x, dy, ends)


def test_grouped_matmul_of_no_rows_has_zero_gradients():
    x, weight = torch.empty(0, 8, requires_grad=True), randn(2, 8, 4).requires_grad_()
    out = gmm.grouped_matmul(x, weight, torch.zeros(2, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (0, 4) and x.grad.shape == (0, 8) and not weight.grad.any()


# block-sparse attention


def reference_attention(q, k, v, mask, block):
    mask = mask.repeat_interleave(block, -1).repeat_interleave(block, -2)[..., : q.shape[2], : k.shape[2]]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -1e30)
    return (logits.softmax(-1) * mask) @ v  # a row that sees nothing is zero


def qkv(B, H, K, Lq, Lk, E, dtype=torch.float32):
    return [randn(B, heads, L, E, dtype=dtype, seed=i) for i, (heads, L) in enumerate([(H, Lq), (K, Lk), (K, Lk)])]


def random_mask(B, H, Lq, Lk, block, kept=0.5):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(B, H, -(-Lq // block), -(-Lk // block), generator=generator) < kept


def assert_attention(inputs, mask, block):
    assert_equal(
        lambda q, k, v: bsa.block_sparse_attention(q, k, v, mask, block),
        lambda q, k, v: reference_attention(q, k, v, mask, block),
        *inputs,
    )


@DTYPES
@pytest.mark.parametrize(
    "B, H, K, Lq, Lk, E, block",
    [
        (2, 4, 2, 40, 53, 24, 16),
        (1, 3, 1, 33, 64, 33, 32),
        (1, 2, 2, 70, 31, 16, 16),
        (1, 1, 1, 1, 1, 1, 16),
        (1, 2, 1, 130, 140, 20, 128),  # two tiles a block; the last tile of keys lies behind the end
    ],
)
def test_block_sparse_attention_equals_masked_attention(B, H, K, Lq, Lk, E, block, dtype):
    mask = random_mask(B, H, Lq, Lk, block)
    mask[..., 0, 0] = True
    assert_attention(qkv(B, H, K, Lq, Lk, E, dtype), mask, block)


def test_block_sparse_attention_with_every_block_is_attention():
    inputs = qkv(1, 2, 2, 40, 50, 32)
    mask = torch.ones(1, 2, 3, 4, dtype=torch.bool)
    want = F.scaled_dot_product_attention(*(x.double() for x in inputs))
    assert difference(bsa.block_sparse_attention(*inputs, mask, 16), want) <= 1e-5


def test_queries_without_blocks_give_zeros_and_no_gradient():
    mask = random_mask(1, 2, 40, 40, 16)
    mask[:, :, 1], mask[:, :, 0], mask[:, :, :, 2] = False, True, False
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 1, 40, 40, 16))
    out = bsa.block_sparse_attention(q, k, v, mask, 16)
    out.sum().backward()
    assert not out[:, :, 16:32].any() and not q.grad[:, :, 16:32].any() and q.grad[:, :, :16].any()
    assert not k.grad[:, :, 32:].any() and not v.grad[:, :, 32:].any() and v.grad[:, :, :32].any()
    assert_attention([x.detach() for x in (q, k, v)], mask, 16)
    assert not bsa.block_sparse_attention(q, k, v, torch.zeros_like(mask), 16).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # keys behind the end cause it; the kernel drops them
def test_block_sparse_attention_survives_logits_far_below_zero():
    """Keys behind the end have logits of 0. Beside real logits of -100, a missing mask there gives inf and NaN."""
    q, k, v = qkv(1, 1, 1, 20, 20, 16)
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    errors = differences(
        lambda q, k, v: bsa.block_sparse_attention(q, k, v, mask, 16),
        lambda q, k, v: reference_attention(q, k, v, mask, 16),
        *(q * 0.1 + 5, k * 0.1 - 5, v),
    )
    assert max(errors.values()) < 1e-4  # a logit of -100 is rounded to 1e-5


def test_block_sparse_attention_takes_strided_tensors():
    inputs = [randn(L, 1, heads, 16, seed=L).permute(1, 2, 0, 3) for heads, L in ((4, 20), (2, 36), (2, 36))]
    assert_attention(inputs, random_mask(1, 4, 20, 36, 16, kept=0.7), 16)


# all


def call_grouped_matmul():
    x, weight = randn(10, 8).requires_grad_(), randn(3, 8, 4).requires_grad_()
    gmm.grouped_matmul(x, weight, torch.tensor([3, 3, 9])).sum().backward()


def call_attention():
    q, k, v = (x.requires_grad_() for x in qkv(1, 1, 1, 20, 20, 16))
    bsa.block_sparse_attention(q, k, v, random_mask(1, 1, 20, 20, 16, kept=0.5), 16).sum().backward()


def call_permute():
    rows, position = moe.permute(randn(4, 8).requires_grad_(), torch.tensor([[0, 1], [2, 1], [1, 0], [0, 2]]))
    moe.unpermute(rows, position, torch.rand(4, 2)).sum().backward()


@pytest.mark.parametrize("call", [call_grouped_matmul, call_attention, call_permute])
def test_nothing_is_read_on_the_host(call):
    with Recorder() as recorder:
        call()
    assert len(recorder.names) > 2 and not recorder.host_reads
    with Recorder() as recorder:
        torch.tensor([3]).item()
    assert recorder.host_reads


def swapped_keys(q, k, v):
    return bsa.block_sparse_attention(q, v, k, torch.ones(1, 2, 2, 2, dtype=torch.bool), 16)


def transposed_mask(q, k, v):
    return bsa.block_sparse_attention(q, k, v, torch.tensor([[1, 1], [0, 1]]).bool().expand(1, 2, 2, 2), 16)


@pytest.mark.parametrize(
    "wrong, reference",
    [
        (swapped_keys, lambda q, k, v: reference_attention(q, k, v, torch.ones(1, 2, 2, 2).bool(), 16)),
        (
            transposed_mask,
            lambda q, k, v: reference_attention(q, k, v, torch.tensor([[1, 0], [1, 1]]).bool().expand(1, 2, 2, 2), 16),
        ),
    ],
)
def test_a_planted_error_in_attention_is_seen_in_the_output_and_every_gradient(wrong, reference):
    assert min(differences(wrong, reference, *qkv(1, 2, 2, 30, 30, 16)).values()) > 0.05


def test_a_planted_error_in_grouped_matmul_is_seen_in_the_output_and_every_gradient():
    right, wrong = torch.tensor([3, 9]), torch.tensor([4, 9])
    errors = differences(
        lambda x, weight: gmm.grouped_matmul(x, weight, wrong),
        lambda x, weight: reference_grouped_matmul(x, weight, right),
        randn(10, 8),
        randn(2, 8, 6),
    )
    assert min(errors.values()) > 0.05


def test_a_planted_error_in_the_permutation_is_seen_in_the_output_and_every_gradient():
    _, position = moe.permute(randn(6, 3), routing(6, 2))
    errors = differences(
        lambda rows, probs: moe.unpermute(rows, position.flip(0), probs),
        lambda rows, probs: reference_unpermute(rows, position, probs),
        randn(12, 8),
        randn(6, 2),
    )
    assert min(errors.values()) > 0.05


def test_a_planted_error_in_the_cross_entropy_is_seen_in_the_loss_and_the_gradient():
    logits, labels, weight = randn(3, 20), torch.tensor([1, 5, 9]), randn(3, seed=1)
    got, want = sharded_loss(logits, labels + 1, weight, 2), reference_loss(logits, labels, weight)
    assert all(difference(*pair) > 0.05 for pair in zip(got, want, strict=True))


REFUSED = {
    "logits": (lambda: lce.row_statistics(torch.ones(3), torch.zeros(3).long()), r"\[3\]; expected \[n, V\]"),
    "labels": (lambda: lce.row_statistics(torch.ones(3, 4), torch.zeros(2).long()), r"labels is torch.int64 \[2\]"),
    "label dtype": (lambda: lce.row_statistics(torch.ones(3, 4), torch.zeros(3)), "float32 .*expected torch.int64"),
    "lse": (
        lambda: lce.softmax_gradient_(torch.ones(2, 4), torch.ones(2).double(), torch.zeros(2).long(), torch.ones(2)),
        "lse is torch.float64",
    ),
    "tokens": (
        lambda: moe.permute(torch.ones(3, 4), torch.zeros(2, 2).long()),
        r"tokens \[3, 4\] and indices \[2, 2\]",
    ),
    "token dtype": (
        lambda: moe.permute(torch.ones(3, 4).double(), torch.zeros(3, 2).long()),
        "tokens are torch.float64",
    ),
    "row dtype": (
        lambda: moe.unpermute(torch.ones(4, 2).double(), torch.arange(4).int(), None, 2),
        "rows are torch.float64",
    ),
    "indices": (lambda: moe.permute(torch.ones(3, 4), torch.zeros(3, 2)), "indices torch.float32"),
    "top_k": (lambda: moe.unpermute(torch.ones(4, 2), torch.arange(4).int(), None), "top_k None"),
    "position": (lambda: moe.unpermute(torch.ones(4, 2), torch.arange(4), None, 2), "position torch.int64"),
    "probs": (lambda: moe.unpermute(torch.ones(4, 2), torch.arange(4).int(), torch.ones(1, 2)), r"probs \[1, 2\]"),
    "width": (
        lambda: gmm.grouped_matmul(torch.ones(4, 3), torch.ones(2, 5, 3), torch.tensor([1, 4])),
        r"x \[4, 3\], weight \[2, 5, 3\]",
    ),
    "weight dtype": (
        lambda: gmm.grouped_matmul(torch.ones(4, 3), torch.ones(2, 3, 5).bfloat16(), torch.tensor([1, 4])),
        "x is torch.float32, weight torch.bfloat16",
    ),
    "ends": (
        lambda: gmm.grouped_matmul(torch.ones(4, 3), torch.ones(2, 3, 5), torch.tensor([1.0, 4.0])),
        "ends is torch.float32",
    ),
    "block": (
        lambda: bsa.block_sparse_attention(*qkv(1, 1, 1, 4, 4, 4), torch.ones(1, 1, 1, 1).bool(), 48),
        "block is 48",
    ),
    "mask": (
        lambda: bsa.block_sparse_attention(*qkv(1, 1, 1, 40, 4, 4), torch.ones(1, 1, 1, 3).bool(), 16),
        r"\[1, 1, 1, 3\]; expected bool \[1, 1, 3, 1\]",
    ),
    "mask dtype": (
        lambda: bsa.block_sparse_attention(*qkv(1, 1, 1, 4, 4, 4), torch.ones(1, 1, 1, 1), 16),
        "mask is torch.float32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_is_refused_with_both_sides_named(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
