"""Weight gradients that matmuls add to megatron-core's fp32 buffers equal those that autograd writes and DDP adds."""

import npu_contract
import pytest
import torch
from ranks import run_ranks
from test_qwen3_layouts import compare, run_layout, single

from common import ops

BF16 = torch.bfloat16
LAYOUTS = {
    "one": (1, {}),
    "recompute full": (1, {"recompute": "full"}),
    "recompute selective": (1, {"recompute": "selective"}),
    "dp2": (2, {}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "tp2 sp etp1 ep2": (2, {"tp": 2, "sp": True, "etp": 1, "ep": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "fsdp2": (2, {"fsdp": True}),
}
CASES = [("dense", name) for name, (_, layout) in LAYOUTS.items() if "ep" not in layout]
CASES += [("moe", name) for name in ("one", "dp2", "tp2 sp etp1 ep2")] + [("dense tied", "pp2 vpp2")]


def accumulated(which: str, layout: dict) -> tuple[dict, int]:
    """Returns what `run_layout` does with accumulation on, and how many products were added in a buffer."""
    calls, add = [], ops.add_products_
    ops.add_products_ = lambda *args: (calls.append(1), add(*args))
    ops.ACCUMULATE = ops.ACCUMULATE_EXPERTS = True
    ops.CHUNK = 96 * 5  # the loss sums several chunks, too
    return run_layout(which, layout, True, "cpu", 0, 2), len(calls)


@pytest.mark.L3
@pytest.mark.parametrize(("which", "name"), CASES)
def test_training_with_accumulation_equals_plain_training(which, name):
    world, layout = LAYOUTS[name]
    got, calls = run_ranks(world, accumulated, which, layout)[0]
    compare(got, single(which, True), layout, 2)
    assert (calls == 0) == (name == "fsdp2")  # FSDP2 has no buffer


def weight_with_buffer(*shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
    """Returns bf16 values in this dtype, with the buffer that megatron-core's DDP gives a parameter."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(*shape, generator=generator).bfloat16().to(dtype))
    weight.main_grad = torch.zeros(*shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    weight.grad_added_to_main_grad = False
    return weight


def fill(function, weight: torch.nn.Parameter, width: int) -> torch.Tensor:
    """Runs four micro-batches of bf16 values, and does what megatron-core's DDP does after each. Returns the buffer."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        x = torch.randn(50, width, generator=generator).bfloat16().to(weight.dtype).requires_grad_()
        y = function(x, weight)
        y.backward(torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype))
        if not weight.grad_added_to_main_grad:
            weight.main_grad.add_(weight.grad)
        weight.grad = None
    return weight.main_grad


@pytest.mark.L2
def test_rows_of_an_embedding_are_added_to_the_buffer_unless_it_is_tied(monkeypatch):
    monkeypatch.setattr(ops, "ACCUMULATE", True)
    weight = weight_with_buffer(9, 4, dtype=BF16)
    tokens = torch.tensor([[1, 8, 1], [1, 0, 8]])
    dy = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3)).bfloat16()
    for _ in range(2):
        ops.embedding(tokens, weight).backward(dy)
    want = torch.zeros(9, 4, dtype=torch.float64).index_add_(0, tokens.flatten(), dy.double().flatten(0, 1))
    assert weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad.double(), 2 * want, rtol=1e-6, atol=1e-6)
    weight.grad, weight.grad_added_to_main_grad = None, False
    ops.embedding(tokens, weight, tied=True).backward(dy)
    assert not weight.grad_added_to_main_grad and weight.grad.count_nonzero()


ENDS = torch.tensor([10, 10, 37, 50])
FUNCTIONS = {
    "linear": (lambda x, weight: ops.linear(x, weight), (24, 16), 16),
    "experts": (lambda x, weight: ops.grouped_matmul(x, weight, ENDS), (4, 16, 2, 12), 16),
}


@pytest.mark.L2
@pytest.mark.parametrize("backend", ["cpu", "npu"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_bf16_gradients_added_in_the_matmul_are_nearer_to_fp64_than_those_added_after_it(kind, backend, monkeypatch):
    """npu: over the published contract, not a run on Ascend."""
    function, shape, width = FUNCTIONS[kind]
    want = fill(function, weight_with_buffer(*shape, dtype=torch.float64), width)
    plain = fill(function, weight_with_buffer(*shape, dtype=BF16), width)
    npu_contract.install()
    monkeypatch.setattr(ops, "BACKEND", backend)
    monkeypatch.setattr(ops, "ACCUMULATE", True)
    weight = weight_with_buffer(*shape, dtype=BF16)
    fused = fill(function, weight, width)
    assert weight.grad_added_to_main_grad
    errors = [((got - want).norm() / want.norm()).item() for got in (fused, plain)]
    assert errors[0] < 1e-6 < 1e-3 < errors[1]


@pytest.mark.L2
def test_npu_does_not_accumulate_in_fp32(monkeypatch):
    monkeypatch.setattr(ops, "BACKEND", "npu")
    monkeypatch.setattr(ops, "ACCUMULATE", True)
    x, weight = torch.zeros(1, 2, dtype=BF16), weight_with_buffer(5, 2, dtype=BF16)
    assert ops.can_accumulate(x, weight) and not ops.can_accumulate(x.float(), weight)


def add_in_fp32(total, a, b, *, out_dtype, out):
    """Stands in for torch.addmm with out_dtype, which torch has for cuda only (aten::addmm.dtype_out)."""
    assert out_dtype == total.dtype == torch.float32 and out is total and a.dtype == b.dtype == BF16
    return out.addmm_(a.float(), b.float())


def error_of_fused_loss(backend: str, monkeypatch) -> tuple[float, float]:
    """Returns the errors of the weight's gradient of two chunks, as summed and as returned, relative to the exact sum
    of the chunks' products. The second is of a weight without buffer, whose gradient is rounded once more."""
    monkeypatch.setattr(ops, "BACKEND", backend)
    monkeypatch.setattr(ops, "ACCUMULATE", True)
    gradients, softmax_loss = [], ops._softmax_loss

    def recorded(*args):
        losses, gradient = softmax_loss(*args)
        gradients.append(gradient.double())
        return losses, gradient

    generator = torch.Generator().manual_seed(3)
    hidden, labels = (
        torch.randn(150, 16, generator=generator).bfloat16(),
        torch.randint(70, (150,), generator=generator),
    )
    weights = [weight_with_buffer(70, 16, dtype=BF16) for _ in range(2)]
    del weights[1].main_grad
    with monkeypatch.context() as patch:
        patch.setattr(ops, "_softmax_loss", recorded)
        for weight in weights:
            ops.linear_cross_entropy(hidden, weight, labels, torch.ones(150))[0].backward()
    assert [len(g) for g in gradients] == 2 * [128, 22]
    want = torch.cat(gradients[:2]).t() @ hidden.double()
    pairs = (weights[0].main_grad, want), (weights[1].grad, want.bfloat16().double())
    return tuple(((got.double() - exact).norm() / exact.norm()).item() for got, exact in pairs)


@pytest.mark.L2
@pytest.mark.parametrize("backend", ["npu", "cuda"])
def test_no_product_of_the_fused_loss_is_rounded_before_it_is_added(backend, monkeypatch):
    """npu: over the published contract, with columns in parts. cuda: kernels interpreted."""
    if backend == "cuda":
        pytest.importorskip("triton")
    npu_contract.install()
    monkeypatch.setattr(ops, "NPU_COLUMNS", 30)
    monkeypatch.setattr(ops, "CHUNK", 70 * 128)
    monkeypatch.setattr(ops, "CHUNK_TOKENS", 128)
    monkeypatch.setattr(torch, "addmm", add_in_fp32)
    summed, returned = error_of_fused_loss(backend, monkeypatch)
    assert summed < 1e-6 and returned < 1e-4
    assert error_of_fused_loss("cpu", monkeypatch)[1] > 1e-3  # there, every product is rounded


@pytest.mark.L2
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "chunk"),
    [(8192, 151_936, 2048), (4100, 151_936, 1408), (8192, 18_992, 2816), (100, 151_936, 128), (0, 151_936, 128)],
)
def test_chunks_of_cuda_are_equal_and_as_large_as_their_matmuls_need(tokens, vocabulary, chunk, monkeypatch):
    assert ops._chunk_tokens(tokens, vocabulary) == 2**26 // vocabulary
    monkeypatch.setattr(ops, "BACKEND", "cuda")
    assert ops._chunk_tokens(tokens, vocabulary) == chunk
