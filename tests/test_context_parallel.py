"""Attention split over the context-parallel group, and its gradients, equal one process: causal or not, with documents
packed or not, with fewer key heads than query heads, with narrower values and a scale (fp32, gloo). Further tests: which tokens a rank holds, which
blocks it computes, and how many bytes it sends."""

import itertools
import random

import npu_contract
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from common import ops, parallel, ring
from common.cli import LayoutOptions

pytestmark = pytest.mark.L3

TOLERANCE = 1e-5  # relative to the largest entry of the tensor
L, E = 48, 8

LAYOUTS = {
    "one process": {"cp": 1},
    "ulysses 2": {"cp": 2, "ulysses": 2},
    "ring 2": {"cp": 2, "ulysses": 1},
    "ulysses 4": {"cp": 4, "ulysses": 4},
    "ulysses 2 ring 2": {"cp": 4, "ulysses": 2},
    "ring 4": {"cp": 4, "ulysses": 1},
}
DOCUMENTS = {
    "one document": None,
    "bounds inside chunks": [0, 1, 5, 9, 16, 17, 22, 35, 37, 48],
    "spanning several chunks": [0, 31, 48],
    "rows": [0, 12, 24, 36, 48],
}
HEADS = {  # heads, key heads, width of the values, scale; no group size here divides 3
    "4 on 4": (4, 4, E, None),
    "4 on 2": (4, 2, E, None),
    "4 on 1": (4, 1, E, None),
    "12 on 3": (12, 3, E, None),
    "4 on 2, narrow": (4, 2, 5, 0.6),
}
CASES = list(itertools.product((True, False), HEADS, DOCUMENTS))


def draw(heads: str, documents: str) -> list[torch.Tensor]:
    """Draws q, k, v and the gradient of the result, for all tokens. There are two samples where nothing is packed."""
    generator = torch.Generator().manual_seed(0)
    H, K, V, _ = HEADS[heads]
    B = 2 if DOCUMENTS[documents] is None else 1
    return [torch.randn(L, B, n, width, generator=generator) for n, width in ((H, E), (K, E), (K, V), (H, V))]


def start(layout: dict):
    o = LayoutOptions(size="tiny", precision="fp32", **layout)
    parallel.initialize(o)
    return parallel.megatron_config(o, hidden=4 * E, heads=4, layers=1)


def packed(documents: str) -> ops.Bounds | None:
    return None if DOCUMENTS[documents] is None else ops.pack_bounds(DOCUMENTS[documents], torch.device("cpu"))


def attend(layout: dict, cases: list, backend: str = "cpu") -> list:
    """Computes this rank's share of the attention and gradients of each case and gathers them. Rank 0 returns them."""
    config = start(layout)
    npu_contract.install()
    ops.BACKEND = backend
    try:
        results = []
        for causal, heads, documents in cases:
            *leaves, dout = (parallel.local_tokens(t, config, causal).clone() for t in draw(heads, documents))
            leaves = [t.requires_grad_() for t in leaves]
            options = {"causal": causal, "bounds": packed(documents), "scale": HEADS[heads][3]}
            out = parallel.context_parallel_attention(*leaves, **options)
            out.backward(dout)
            tensors = (out.detach(), *(t.grad for t in leaves))
            results.append([parallel.gather_tokens(t, config, causal) for t in tensors])
        return results if dist.get_rank() == 0 else []
    finally:
        ops.BACKEND = "cpu"


def whole(causal: bool, heads: str, documents: str) -> list[torch.Tensor]:
    *leaves, dout = draw(heads, documents)
    leaves = [t.requires_grad_() for t in leaves]
    out = ops.attention(*leaves, causal=causal, bounds=packed(documents), scale=HEADS[heads][3])
    out.backward(dout)
    return [out.detach(), *(t.grad for t in leaves)]


def compare(got: list[torch.Tensor], case: tuple, layout: str) -> None:
    for name, tensor, want in zip(("out", "dq", "dk", "dv"), got, whole(*case), strict=True):
        error = ((tensor - want).abs().max() / want.abs().max()).item()
        assert error <= TOLERANCE, f"{layout}, causal, heads, documents = {case}: {name} off by {error}"


@pytest.fixture(scope="module")
def split() -> dict:
    """Caches the results of a layout, so that one start of its ranks computes all cases."""
    return {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: ("causal " if case[0] else "full ") + ", ".join(case[1:]))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_attention_equals_single_process(layout, case, split):
    if layout not in split:
        split[layout] = dict(
            zip(CASES, run_ranks(LAYOUTS[layout]["cp"], attend, LAYOUTS[layout], CASES)[0], strict=True)
        )
    compare(split[layout][case], case, layout)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "one process"])
def test_npu_branch_equals_single_process(layout):
    """The npu branch runs over the published contract, not on Ascend."""
    cases = [(True, heads, "bounds inside chunks") for heads in ("4 on 2", "4 on 2, narrow")]
    results = run_ranks(LAYOUTS[layout]["cp"], attend, LAYOUTS[layout], cases, "npu")[0]
    for case, got in zip(cases, results, strict=True):
        compare(got, case, layout)


def bounds_of_one_rank_alone() -> str:
    start(LAYOUTS["ring 2"])
    share, bounds = torch.zeros(L // 2, 1, 4, E), ops.pack_bounds([0, 7, L // 2], torch.device("cpu"))
    with pytest.raises(ValueError) as refused:
        parallel.context_parallel_attention(share, share, share, causal=True, bounds=bounds)
    return str(refused.value)


def test_bounds_that_leave_out_other_ranks_tokens_are_refused():
    want = "bounds [0, 7, 24] for 48 tokens; expected [0, ..., 48]"
    assert run_ranks(2, bounds_of_one_rank_alone) == [want] * 2


# ------------------------------------------------------------------------------------------------------------- tokens


def shares(layout: dict) -> tuple[list[int], list[int], list[int]]:
    """Returns this rank's places in the sequence, those over context parallel alone, and all ranks' places gathered."""
    config, places = start(layout), torch.arange(16)
    local = parallel.local_tokens(places, config, causal=True)
    rows = parallel.gather_tokens(local[:, None].float(), config, causal=True)
    return local.tolist(), parallel.context_tokens(places, causal=True).tolist(), rows.flatten().int().tolist()


@pytest.mark.parametrize(
    "layout", [{"cp": 4, "ulysses": 2}, {"cp": 2, "ulysses": 1, "tp": 2, "sp": True}], ids=["ulysses 2", "tp2 sp"]
)
def test_a_ring_of_two_holds_first_and_last_quarter_and_the_two_between(layout):
    local, over_context, gathered = zip(*run_ranks(4, shares, layout), strict=True)
    quarters = [list(range(start, start + 4)) for start in (0, 12, 4, 8)]
    assert list(local) == quarters
    halves = [quarters[0] + quarters[1]] * 2 + [quarters[2] + quarters[3]] * 2
    assert list(over_context) == (halves if "sp" in layout else quarters)
    assert list(gathered) == [list(range(16))] * 4


@pytest.mark.parametrize("n", [1, 2, 3])
def test_unzigzag_inverts_zigzag(n):
    x = torch.randn(12, 5)
    assert torch.equal(ring.unzigzag(ring.zigzag(x, n), n), x)
    assert (n == 1) == torch.equal(ring.zigzag(x, n), x)


def test_tokens_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match=r"14 tokens do not split into 2\*ring = 4 chunks"):
        ring.zigzag(torch.zeros(14), 2)


# ------------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_blocks_cover_what_is_visible_once(n, causal):
    held, draws = 6, random.Random(n)
    tokens = n * held
    places = torch.arange(tokens)
    places = (ring.zigzag(places, n) if causal else places).view(n, held)
    for documents in range(1, 9):
        bounds = (0, *sorted(draws.sample(range(1, tokens), documents - 1)), tokens)
        seen = torch.zeros(tokens, tokens, dtype=torch.int)  # [query, key], by place in the sequence
        for mine, theirs in itertools.product(range(n), repeat=2):
            blocks = ring.ring_blocks(mine, theirs, n, held, causal, bounds)
            assert len(blocks) <= documents
            for rows, columns, masked in blocks:
                block = torch.ones(len(places[mine, rows]), len(places[theirs, columns]), dtype=torch.int)
                assert not masked or rows == columns
                seen[places[mine, rows, None], places[theirs, columns]] += block.tril() if masked else block
        document = torch.bucketize(torch.arange(tokens), torch.tensor(bounds[1:]), right=True)
        want = (document[:, None] == document).int()
        assert torch.equal(seen, want.tril() if causal else want), bounds


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_every_rank_computes_the_same_amount_in_a_causal_step(step):
    n, held = 4, 10
    for mine in range(n):
        ((rows, columns, masked),) = ring.ring_blocks(mine, (mine - step) % n, n, held, True, (0, n * held))
        amount = (rows.stop - rows.start) * (columns.stop - columns.start)
        assert (amount, masked) == ((held * held, True) if step == 0 else (held * held // 2, False))


# ------------------------------------------------------------------------------------------------------------ traffic


def sent(layout: dict, heads: str) -> dict[str, int]:
    """Counts the bytes this rank sends to its ring and its Ulysses group in a causal forward and backward in bf16."""
    config = start(layout)
    counted = {"ring": 0, "ulysses": 0}
    pass_on, all_to_all = ring._pass_on, parallel.all_to_all

    def counting_pass_on(x, group):
        counted["ring"] += x.numel() * x.element_size()
        return pass_on(x, group)

    def counting_all_to_all(group, x):
        counted["ulysses"] += x.numel() * x.element_size()
        return all_to_all(group, x)

    ring._pass_on, parallel.all_to_all = counting_pass_on, counting_all_to_all
    try:
        *leaves, dout = (parallel.local_tokens(t, config, True).bfloat16().clone() for t in draw(heads, "one document"))
        leaves = [t.requires_grad_() for t in leaves]
        parallel.context_parallel_attention(*leaves, causal=True).backward(dout)
    finally:
        ring._pass_on, parallel.all_to_all = pass_on, all_to_all
    return counted


@pytest.mark.parametrize("heads", ["4 on 4", "4 on 2", "4 on 1"])
@pytest.mark.parametrize("layout", ["ring 2", "ring 4"])
def test_keys_and_values_travel_the_ring_with_their_own_heads(layout, heads):
    n, (_, K, V, _) = LAYOUTS[layout]["cp"], HEADS[heads]
    entries = 2 * (L // n) * K * (E + V)  # keys and values of this rank's tokens, two samples
    want = (n - 1) * entries * 2 + (n - 1) * entries * 2 + n * entries * 4  # forward, backward, gradients in fp32
    assert run_ranks(n, sent, LAYOUTS[layout], heads) == [{"ring": want, "ulysses": 0}] * n


@pytest.mark.parametrize(("heads", "copied"), [("4 on 4", 4), ("4 on 2", 2), ("4 on 1", 2), ("4 on 2, narrow", 2)])
def test_ulysses_sends_no_more_key_heads_than_ranks_need(heads, copied):
    (H, _, V, _), tokens = HEADS[heads], 2 * L // 4
    (counted, *others) = run_ranks(4, sent, LAYOUTS["ulysses 2 ring 2"], heads)
    # q, k and v go out and the result comes back; the backward of autograd does not pass through the counted call
    assert counted["ulysses"] == tokens * (H + copied) * (E + V) * 2
    assert others == [counted] * 3
    entries = (2 * tokens) * (copied // 2) * (E + V)  # each rank of the ring has half the heads of twice the tokens
    assert counted["ring"] == entries * 2 + entries * 2 + 2 * entries * 4
