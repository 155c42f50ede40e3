"""Decode steps that a CUDA graph can repeat: with a stand-in for the graph, answers are transformers' and those of the
plain steps, on tensors that stay where they are. Which models take graphs. Attention over a cache equals the formula.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import qwen_case as case
import torch
from ranks import run_ranks
from test_qwen3 import infer_options, ours
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import ops, ops_check, parallel, release
from common.language import decode
from common.language import generate as generation
from common.ops import nf4

pytestmark = [pytest.mark.L2, pytest.mark.usefixtures("one_rank")]

aten = torch.ops.aten
READS = {  # what reads values on the host, so that cuda refuses it during a capture
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.is_nonzero.default, aten.repeat_interleave.Tensor, aten._unique2.default,
}  # fmt: skip


class NoReads(TorchDispatchMode):
    """Raises where an operation would wait for the device."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in READS:
            raise RuntimeError(f"{op} is not permitted when stream is capturing")
        return op(*args, **(kwargs or {}))


class Graph:
    """Stands in for torch.cuda.CUDAGraph: repeats the recorded operations on the tensors of the capture."""

    made = []

    def __init__(self):
        self.calls, self.replays = [], 0
        Graph.made.append(self)

    def replay(self):
        self.replays += 1
        for op, args, kwargs, out in self.calls:
            if any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns):
                continue  # a view of memory that is written elsewhere
            for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Capturing(NoReads):
    """Stands in for torch.cuda.graph: records operations and undoes what they wrote, because a capture runs nothing."""

    def __init__(self, graph, pool, stream, capture_error_mode):
        super().__init__()
        self.graph, self.written = graph, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for i, argument in enumerate(op._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                tensor = kwargs[argument.name] if argument.kwarg_only else args[i]
                self.written.append((tensor, tensor.clone()))
        out = super().__torch_dispatch__(op, types, args, kwargs)
        self.graph.calls.append((op, args, kwargs, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in reversed(self.written):
            tensor.copy_(before)


def grouped_matmul(x, weight, ends):
    """Restates `ops.grouped_matmul` without reading the ends, as cuda's kernels do."""
    group = torch.searchsorted(ends, torch.arange(len(x)), right=True)
    return (x.unsqueeze(1) @ weight.flatten(2)[group]).squeeze(1)


@pytest.fixture
def graphs(monkeypatch):
    """Captures decode steps with the stand-ins, and returns the list of graphs."""
    Graph.made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(decode, "graph_obstacle", lambda model: "")
    monkeypatch.setattr(decode, "LOOKS_BEHIND", True)
    monkeypatch.setattr(decode, "SHORTEST", 4)
    monkeypatch.setattr(ops, "grouped_matmul", grouped_matmul)
    return Graph.made


def prompts_of(*lengths) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(96, (n,), generator=generator).tolist() for n in lengths]


def oracle_answers(oracle, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    settings = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return [oracle.generate(torch.tensor([p]), **settings)[0, len(p) :].tolist() for p in prompts]


def addresses(decoder: decode.Decoder) -> list[int]:
    cache = decoder.cache
    tensors = [decoder.tokens, decoder.chosen, decoder.given, decoder.states, cache.position, cache.places, cache.zeros]
    return [t.data_ptr() for t in [*tensors, *tree_leaves(list(cache.kept.values()))]]


@pytest.mark.parametrize(("which", "fused"), [("dense", True), ("dense tied", False), ("moe", True), ("yarn", True)])
def test_repeated_steps_equal_transformers_token_for_token_and_move_no_tensor(
    which, fused, graphs, tmp_path, monkeypatch
):
    """Prompts of unequal length, in two batches; then others, with the graphs and the cache that are there already."""
    monkeypatch.setattr(decode, "FUSED", fused)
    oracle, model = case.save_oracle(tmp_path, case.CONFIGS[which]), ours(tmp_path)
    prompts, o, decoders = prompts_of(7, 3, 7, 1), infer_options(max_new_tokens=12, batch=2), []
    got = generation.generate(model, prompts, o, set(), decoders=decoders)
    assert got == oracle_answers(oracle, prompts, 12)
    # The first batch has 3 to 14 tokens before its last step, the second 7 to 18: places by fours, up to 20.
    before = addresses(decoders[0])
    assert sorted(decoders[0].replays) == [(reach, True) for reach in (4, 8, 12, 16, 20)] and len(graphs) == 5
    steps = 13 + 11  # after the first
    assert sum(graph.replays for graph in graphs) == steps - len(graphs)
    others = prompts_of(2, 4, 6)[1:]
    assert generation.generate(model, others, o, set(), decoders=decoders) == oracle_answers(oracle, others, 12)
    assert addresses(decoders[0]) == before and len(graphs) == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_repeated_steps_end_and_show_as_the_plain_ones(temperature, graphs, tmp_path, monkeypatch):
    """Batches in which answers end at different steps, by an end token, by `stop` and by their length; one that needs
    a longer cache than the one before; a single prompt that is shown. At most one step more is launched."""
    case.save_oracle(tmp_path, case.CONFIGS["dense"])
    model, prompts = ours(tmp_path), prompts_of(5, 5, 6, 9, 12, 5, 2)
    steps = []
    run_stages = decode.run_stages
    monkeypatch.setattr(decode, "run_stages", lambda *args: (steps.append(1), run_stages(*args))[1])
    o = infer_options(max_new_tokens=10, batch=3, temperature=temperature)
    whole = generation.generate(model, prompts, o, set())
    ends = {whole[0][3], whole[2][6], whole[4][0]}

    def answers(prompts, **values) -> tuple[list[list[int]], list[int], int]:
        shown, before = [], [len(graphs), sum(graph.replays for graph in graphs)]
        steps.clear()
        show = shown.append if len(prompts) == 1 else None
        stop = lambda answer: answer[-1] == whole[1][4]  # noqa: E731
        got = generation.generate(model, prompts, dataclasses.replace(o, **values), ends, show, stop)
        captures, replays = len(graphs) - before[0], sum(graph.replays for graph in graphs) - before[1]
        return got, shown, len(steps) - captures + replays

    for asked, values in ((prompts, {}), (prompts[:1], {}), (prompts[:1], {"max_new_tokens": 1}), (prompts[3:4], {})):
        mine = answers(asked, **values)
        with monkeypatch.context() as plain:
            plain.setattr(decode, "graph_obstacle", lambda model: "none here")
            plain.setattr(decode, "LOOKS_BEHIND", False)
            want = answers(asked, **values)
        assert mine[:2] == want[:2] and any(want[0])
        batches = len(list(generation.batch_prompts([len(p) for p in asked], dataclasses.replace(o, **values))))
        assert want[2] <= mine[2] <= want[2] + batches * (temperature == 0)
    assert len(want[1]) == len(want[0][0])


def test_plain_steps_may_look_behind_too(tmp_path, monkeypatch):
    """Under tensor parallelism on cuda, for example. Damaged weights are noticed a step late, and give no embedding a
    negative token."""
    oracle, prompts = case.save_oracle(tmp_path, case.CONFIGS["dense"]), prompts_of(4, 3)
    model, o = ours(tmp_path), infer_options(max_new_tokens=6)
    monkeypatch.setattr(decode, "LOOKS_BEHIND", True)
    assert generation.generate(model, prompts, o, set()) == oracle_answers(oracle, prompts, 6)
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
    for obstacle in ("", "none here"):
        monkeypatch.setattr(decode, "graph_obstacle", lambda model, obstacle=obstacle: obstacle)
        monkeypatch.setattr(decode, "capture", lambda step, side, pool: (step(), step)[1])
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        with pytest.raises(ValueError, match="logits are not finite"):
            generation.generate(model, prompts, o, set())


@pytest.mark.parametrize("which", ["dense", "moe"])
def test_a_step_of_the_cuda_branch_reads_nothing_on_the_host(which, tmp_path, monkeypatch):
    """The kernels are interpreted. Experts in fp32 go through the zoo's own kernel; torch's, in bf16, is not here."""
    case.save_oracle(tmp_path, case.CONFIGS[which])
    model, prompts, o = ours(tmp_path).eval(), prompts_of(4, 3), infer_options(max_new_tokens=3)
    want = generation.generate(model, prompts, o, set())
    with torch.no_grad():
        decoder = decode.Decoder(model, 2, 8)
        monkeypatch.setattr(ops, "BACKEND", "cuda")
        ran = []

        def step_without_reads(step, greedy):
            with NoReads():
                step()
            ran.append(greedy)

        monkeypatch.setattr(decoder, "repeat", step_without_reads)
        steps = torch.stack([chosen.clone() for chosen in decoder.decode(prompts[::-1], o, [None] * 2)])  # [4, B]
    assert ran == [True] * 3 and [steps[1:, 1].tolist(), steps[:3, 0].tolist()] == want


def layouts_answers(folder, layout: dict, prompts: list[list[int]]) -> list[list[int]]:
    """Answers with the steps of `Decoder`, uncaptured, on this rank of a layout."""
    config = case.config.Qwen3Config.from_folder(folder)
    o = case.options(**layout)
    parallel.initialize(o)
    chunks = case.model.build(o, config)
    table = case.convert.table(config)
    release.load(chunks, table.entries(folder), table)
    assert decode.graph_obstacle(chunks[0])
    decode.graph_obstacle, decode.LOOKS_BEHIND, decode.SHORTEST = (lambda model: ""), True, 4
    decode.capture, torch.cuda.graph_pool_handle = (lambda step, side, pool: (step(), step)[1]), lambda: "pool"
    return generation.generate(chunks[0].eval(), prompts, infer_options(max_new_tokens=12, batch=2), set())


@pytest.mark.L3
@pytest.mark.parametrize(("which", "layout"), [("dense tied", {"tp": 2}), ("moe", {"pp": 2})])
def test_steps_on_fixed_tensors_equal_transformers_under_layouts(which, layout, tmp_path):
    oracle, prompts = case.save_oracle(tmp_path, case.CONFIGS[which]), prompts_of(7, 3, 7, 1)
    want = oracle_answers(oracle, prompts, 12)
    assert run_ranks(2, layouts_answers, tmp_path, layout, prompts) == [want, want]


FORMS = {"latent": (1, 576, 512), "narrow values": (2, 12, 8), "shared heads": (2, 8, 8)}  # K, E, V


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["growing", "static", "static, fused"])
def test_attention_over_a_cache_equals_the_formula_for_prompts_and_for_steps(kind, form, monkeypatch):
    """A prompt is read in blocks of queries, and then again what a growing cache has not yet seen."""
    B, H, n, length, (K, E, V) = 2, 4, 9, 16, FORMS[form]
    monkeypatch.setattr(decode, "FUSED", "fused" in kind)
    monkeypatch.setattr(decode, "SCORES", 2 * B * H * n)  # two queries at a time
    generator, layer = torch.Generator().manual_seed(2), torch.nn.Identity()
    shapes = ((H, E), (K, E), (K, V))
    q, k, v = (torch.randn(length, B, heads, width, generator=generator) / E**0.25 for heads, width in shapes)
    v = k[..., :V] if form == "latent" else v
    scale = None if form == "shared heads" else 2 * E**-0.5
    want = ops_check.plain_attention(*(t.double() for t in (q, k, v)), causal=True, scale=scale)
    if kind == "growing":
        cache = decode.Cache(B, length)
    else:
        cache = decode.StaticCache(B, length, q.device, q.dtype)
        cache.position.fill_(n - 1)
    ends = [n, 13, *range(14, length + 1)] if kind == "growing" else range(n, length + 1)
    start = 0
    for end in ends:
        if kind != "growing" and start:
            cache.reach = decode.reach_of(end, length)
            cache.advance()
        new = [t[start:end].transpose(0, 1).flatten(0, 1).unsqueeze(1) for t in (q, k, v)]
        got = cache.attend(layer, *new[:2], V if form == "latent" else new[2], scale)
        cache.used, expected = end, want[start:end].transpose(0, 1).flatten(0, 1).unsqueeze(1)
        assert got.shape == expected.shape and (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        start = end
    numbers = 576 if form == "latent" else K * (E + V)  # a token
    assert decode.held_bytes(cache) == B * length * numbers * 4


@pytest.mark.L0
def test_a_reach_is_little_more_than_the_length_and_serves_many_lengths():
    lengths = range(1, 40001)
    reaches = [decode.reach_of(n, 40000) for n in lengths]
    assert all(n <= reach <= n + max(decode.SHORTEST - 1, n / 4) for n, reach in zip(lengths, reaches, strict=True))
    assert reaches == sorted(reaches) and len(set(reaches)) < 30


OBSTACLES = {
    "": {}, "ranks communicate (tp=2": {"tensor_model_parallel_size": 2}, "pp=4": {"pipeline_model_parallel_size": 4},
    "experts (ep=8)": {"expert_model_parallel_size": 8, "num_moe_experts": 8}, "4-bit": {"quantized": True},
    "cpu has none": {"kind": "cpu"}, "npu has none": {"kind": "npu"}, "GRAPHS is off": {"on": False},
    "grouped matmul": {"num_moe_experts": 8, "capability": (8, 0)},
}  # fmt: skip


@pytest.mark.L0
@pytest.mark.parametrize("message", OBSTACLES)
def test_which_models_take_graphs_is_decided_and_said(message, monkeypatch, capsys):
    defaults = {f"{kind}_model_parallel_size": 1 for kind in ("tensor", "pipeline", "expert")} | {"num_moe_experts": 4}
    values = {"kind": "cuda", "capability": (9, 0), "on": True, "quantized": False} | defaults | OBSTACLES[message]
    monkeypatch.setattr(decode.device, "KIND", values["kind"])
    monkeypatch.setattr(decode, "GRAPHS", values["on"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: values["capability"])
    modules = [torch.nn.Module()]
    modules[0].weight = nf4.Packed.__new__(nf4.Packed) if values["quantized"] else None
    obstacle = decode.graph_obstacle(SimpleNamespace(config=SimpleNamespace(**values), modules=lambda: modules))
    assert (message in obstacle) if message else obstacle == ""
    decode.announce.cache_clear()
    decode.announce(obstacle)
    decode.announce(obstacle)
    said = capsys.readouterr().err
    assert said.count("\n") == (values["kind"] == "cuda") and (
        not obstacle or values["kind"] != "cuda" or obstacle in said
    )
    decode.announce.cache_clear()
