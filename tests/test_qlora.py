"""Frozen weights in NF4 under every layout, and adapters of experts: gradients, folders, merging, bytes. Where
bitsandbytes is not installed, nf4_contract.py stands in for it."""

import json
import math
import shutil

import nf4_contract
import pytest
import qwen_case as case
import test_qwen3_lora as adapted
import torch
from layouts import _gather
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_qwen3_layouts import my_batches
from torch import nn

from common import adapters, checkpoint, lora, parallel, quantize, release
from common import train as loop
from common.language.options import PACKED_BYTES
from common.ops import nf4

PACKED = case.config.quantized(case.CONFIGS["moe"])
TOLERANCE = 1e-5  # relative to the largest entry of a tensor


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


# -------------------------------------------------------------------------------------------------------- the format


@pytest.mark.L2
def test_the_stand_in_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64 * 300 + 7, generator=torch.Generator().manual_seed(0))
    options = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"}
    codes, state = functional.quantize_4bit(weight, **options)
    ours, ours_state = nf4_contract.quantize_4bit(weight, **options)
    assert torch.equal(ours, codes)
    unpacked = nf4_contract.dequantize_4bit(ours, ours_state)
    assert relative(unpacked, functional.dequantize_4bit(codes, state)) < 0.01  # the scales' 8 bits differ


def tensors_of(value) -> list[torch.Tensor]:
    """Lists the tensors in an object's attributes and in those of its attributes."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [
        t
        for each in vars(value).values()
        if isinstance(each, torch.Tensor) or hasattr(each, "__dict__")
        for t in tensors_of(each)
    ]


def loaded_in_parts() -> tuple[list[int], int, list[int]]:
    """Loads tiny-moe from scratch. Returns, at the time when each part is there to be filled, how many of its weights
    to pack are not packed; at the end, the bytes of all packed weights and how many each has."""
    nf4_contract.install()
    config, unpacked = case.config.SIZES["tiny-moe"], []
    o = case.options()
    parallel.initialize(o)
    chunks, names = case.model.build(o, config, torch.device("meta")), case.config.quantized(config)
    for part in quantize.blocks(chunks, names):
        checkpoint.initialize(part, 0, lambda name, whole, generator: whole.normal_(generator=generator))
        plain = dict(chunks[0].named_parameters())
        unpacked.append(
            sum(
                p.numel()
                for n, p in plain.items()
                if not p.is_meta and adapters.matches(n.removesuffix(".weight"), names)
            )
        )
    assert not any(p.is_meta for p in chunks[0].parameters())
    packed = [v for module in chunks[0].modules() for v in vars(module).values() if isinstance(v, nf4.Packed)]
    return unpacked, sum(t.nbytes for p in packed for t in tensors_of(p)), [p.shape.numel() for p in packed]


@pytest.mark.L2
def test_a_model_is_packed_while_it_is_loaded_and_takes_the_bytes_that_are_said():
    config = case.config.SIZES["tiny-moe"]
    unpacked, size, counts = run_ranks(1, loaded_in_parts)[0]
    names = [name for name in case.convert.shapes(config) if adapters.matches(name.removesuffix(".weight"), PACKED)]
    assert sum(counts) == sum(map(math.prod, (case.convert.shapes(config)[name] for name in names)))
    assert max(unpacked) == sum(counts) // config.num_hidden_layers  # one block at a time
    # Each weight also has the tables of its 16 and 256 levels, up to 1.2 KiB.
    assert PACKED_BYTES <= size / sum(counts) < PACKED_BYTES + 1200 * len(counts) / sum(counts) + 0.001


def filled(folder, in_parts: bool) -> dict[str, torch.Tensor]:
    """Fills a model on two uneven pipeline stages, in NF4 at once or after it was filled. Returns what this rank has."""
    nf4_contract.install()
    o, config = case.options(pp=2, stages="3,1", weights=folder), case.CONFIGS["moe"]
    parallel.initialize(o)
    chunks = case.model.build(o, config, torch.device("meta") if in_parts else None)
    release.fill(chunks, o, case.convert.table(config), None, packed=PACKED if in_parts else None)
    if not in_parts:
        quantize.pack("", chunks[0], PACKED)
    held = {f"{name}.{key}": value for name, module in chunks[0].named_modules() for key, value in vars(module).items()}
    held = {name: value.unpack() for name, value in held.items() if isinstance(value, nf4.Packed)}
    return held | {name: parameter.detach() for name, parameter in chunks[0].named_parameters()}


def sharded(folder, out) -> None:
    config = case.CONFIGS["moe"]
    parallel.initialize(case.options())
    release.write_sharded(out, case.convert.table(config), case.convert.open_source(folder, config), {})


@pytest.mark.L2
def test_a_release_and_a_checkpoint_are_packed_to_the_same_weights_in_parts_as_after_loading(tmp_path):
    case.save_oracle(tmp_path / "released", case.CONFIGS["moe"])
    run_ranks(1, sharded, tmp_path / "released", tmp_path / "sharded")
    want = run_ranks(2, filled, tmp_path / "released", False)
    for kind in ("released", "sharded"):
        for rank, whole in zip(run_ranks(2, filled, tmp_path / kind, True), want, strict=True):
            assert rank.keys() == whole.keys() and all(torch.equal(rank[name], whole[name]) for name in whole)


def plain_linear() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns (over a packed nn.Linear, by the weight that it stands for) of outputs and input gradients, before and
    after it gets an adapter."""
    nf4_contract.install()
    parallel.initialize(case.options())
    model, pairs = nn.ModuleDict({"a": nn.Linear(40, 24)}).requires_grad_(False), []
    quantize.pack("", model, ["a"])
    for is_adapted in (False, True):
        weight = model["a"].weight.unpack()
        if is_adapted:
            lora.add([model], ["a"], rank=3, alpha=6, seed=1)
            nn.init.normal_(model["a"].lora_B)
            weight = weight + 2 * model["a"].lora_B.detach() @ model["a"].lora_A.detach()
        x = torch.randn(5, 40, requires_grad=True)
        y = model["a"](x)
        y.sum().backward()
        pairs += [
            (y.detach(), nn.functional.linear(x, weight, model["a"].bias).detach()),
            (x.grad, weight.sum(0).expand(5, 40)),
        ]
    return pairs


@pytest.mark.L2
def test_a_plain_linear_is_packed_with_and_without_an_adapter():
    assert max(relative(*pair) for pair in run_ranks(1, plain_linear)[0]) <= TOLERANCE


# ----------------------------------------------------------------------------------------------------------- layouts

LAYOUTS = {
    "tp2 sp": ("moe", 2, {"tp": 2, "sp": True, "recompute": "selective"}),
    "ep2": ("moe", 2, {"ep": 2}),
    "tp2 sp etp1 ep2": ("moe", 2, {"tp": 2, "sp": True, "etp": 1, "ep": 2, "recompute": "full"}),
    "tp2 ep2": ("moe", 4, {"tp": 2, "ep": 2, "dispatch": "allgather"}),
    "pp2": ("moe", 2, {"pp": 2}),
    "dense tp2 sp": ("dense", 2, {"tp": 2, "sp": True}),
}


def trained(which: str, layout: dict, state: dict | None = None) -> tuple[dict, dict]:
    """Computes gradients over a base in NF4, or over `state`. Rank 0 returns {"loss", "gradients", "norm"} and the
    weights that the base stands for."""
    nf4_contract.install()
    o, config = case.options(**layout), case.CONFIGS[which]
    parallel.initialize(o)
    if state is None:
        chunks = case.model.build(o, config, torch.device("meta"))
        for part in quantize.blocks(chunks, case.config.quantized(config)):
            case.load(part, case.random_state(config))
    else:
        chunks = case.model.build(o, config)
        case.load(chunks, state)
    found = {}
    for chunk in chunks:
        for name, module in chunk.named_modules():
            packed = {key: value for key, value in vars(module).items() if isinstance(value, nf4.Packed)}
            found |= {f"{name}.{key}": (value, value.unpack()) for key, value in packed.items()}
    weights = _gather(found)
    adapted.adapt(chunks, config)
    return adapted.step(o, chunks), weights


@pytest.mark.L3
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_over_packed_shards_equal_one_process_over_the_weights_they_stand_for(name):
    """Blocks of NF4 differ with the shards, so one process gets the weights that the shards stand for, unpacked. All
    linears have adapters, the experts' too."""
    which, world, layout = LAYOUTS[name]
    config = case.CONFIGS[which]
    got, packed = run_ranks(world, trained, which, layout)[0]
    state = case.random_state(config)
    names = {n for n in state if adapters.matches(n.removesuffix(".weight"), case.config.quantized(config))}
    assert packed.keys() == names
    assert all(0 < relative(packed[n], state[n]) < 0.2 for n in names)
    want, _ = run_ranks(1, trained, which, {}, state | packed)[0]
    assert got["loss"] == pytest.approx(want["loss"], rel=TOLERANCE)
    assert got["norm"] == pytest.approx(want["norm"], rel=TOLERANCE)
    assert got["gradients"].keys() == want["gradients"].keys() and len(want["gradients"]) == 2 * 4 * 7
    errors = {k: relative(got["gradients"][k], g) for k, g in want["gradients"].items()}
    assert not {k: v for k, v in errors.items() if not v <= TOLERANCE}


# ----------------------------------------------------------------------------------------------- adapters of experts


class Experts(nn.Module):
    """The experts of every layer, one linear each, with the names of the release: what transformers 4 had."""

    def __init__(self, config):
        super().__init__()
        D, F = config.hidden_size, config.moe_intermediate_size

        def expert() -> nn.ModuleDict:
            sizes = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
            return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})

        experts = [nn.ModuleList(expert() for _ in range(config.num_experts)) for _ in range(config.num_hidden_layers)]
        layers = [nn.ModuleDict({"mlp": nn.ModuleDict({"experts": e})}) for e in experts]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def forward(self, layer: int, x: torch.Tensor, experts: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """x [T, D], experts and chosen [T, k] -> [T, D]."""
        own = self.model["layers"][layer]["mlp"]["experts"]
        rows = []
        for token, numbers, shares in zip(x, experts.tolist(), chosen, strict=True):
            outputs = [
                own[g]["down_proj"](nn.functional.silu(own[g]["gate_proj"](token)) * own[g]["up_proj"](token))
                for g in numbers
            ]
            rows.append(sum(share * y for share, y in zip(shares, outputs, strict=True)))
        return torch.stack(rows)


def beside_peft(folder, layout: dict) -> dict:
    """Returns {name: (ours, peft's)} of a layer's output and of every expert's gradients. peft reads our folder."""
    import peft

    o, config = case.options(**layout), case.CONFIGS["moe"]
    parallel.initialize(o)
    chunks, state, pieces = case.model.build(o, config), case.random_state(config), case.convert.expert_pieces(config)
    case.load(chunks, state)
    lora.add(chunks, ["gate_proj", "up_proj", "down_proj"], rank=6, alpha=9, rslora=True, seed=7, pieces=pieces)
    checkpoint.initialize(chunks, 8, adapted.draw_b, lambda name: name.endswith(".lora_B"))
    lora.save_adapter(folder, chunks, case.convert.released, pieces=pieces)
    oracle = Experts(config)
    indices = {key: (name, index) for name, keys in pieces.items() for key, index in keys.items()}
    oracle.load_state_dict({key: state[name][index].t() for key, (name, index) in indices.items()})
    theirs = peft.PeftModel.from_pretrained(oracle, folder, is_trainable=True)
    mlp, generator = chunks[0].layers["2"].mlp, torch.Generator().manual_seed(3)
    x = torch.randn(9, 1, config.hidden_size, generator=generator)
    ours, logits = mlp(x)
    chosen, experts = logits.softmax(-1).topk(config.num_experts_per_tok)
    want = theirs(2, x[:, 0], experts, chosen / chosen.sum(-1, keepdim=True))
    mix = torch.randn(want.shape, generator=generator)
    for out in (ours[:, 0], want):
        (out * mix).sum().backward()
    pairs = {"output": (ours[:, 0].detach(), want.detach())}
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for family in adapters.families(pieces).values():
        if family.stack.startswith("layers.2."):
            module = mlp.experts[family.experts[0].rpartition(".")[2]]
            for g, name in enumerate(family.experts):
                for part in ("lora_A", "lora_B"):
                    theirs_of = gradients.pop(f"base_model.model.{name}.{part}.default.weight", None)
                    if theirs_of is not None:
                        pairs[f"{name}.{part}"] = getattr(module, part).grad[g].t(), theirs_of
    assert not gradients
    return pairs


@pytest.mark.L2
def test_experts_adapters_are_pefts(tmp_path):
    """Over one linear for each expert. `test_adapter_and_merged_weights_equal_pefts` does it over transformers' stacks,
    for which peft joins the adapters of a folder."""
    pairs = run_ranks(1, beside_peft, tmp_path / "adapter", {})[0]
    assert len(pairs) > 1 + 2 * 3 * 4  # at least four experts were chosen
    assert not {name: relative(*pair) for name, pair in pairs.items() if not relative(*pair) <= TOLERANCE}


def written(folder, layout: dict) -> dict[str, torch.Tensor]:
    """Writes adapters of experts and of q_proj from a layout. Returns their whole factors."""
    o, config = case.options(**layout), case.CONFIGS["moe"]
    parallel.initialize(o)
    chunks = case.model.build(o, config)
    adapted.adapt(chunks, config, targets=["q_proj", "up_proj", "down_proj"])
    pieces = case.convert.expert_pieces(config)
    lora.save_adapter(folder, chunks, case.convert.released, pieces=pieces)
    return _gather({name: (p, p.detach()) for name, p in checkpoint.trained(chunks)})


def read(folder, layout: dict) -> dict[str, torch.Tensor]:
    o, config = case.options(**layout), case.CONFIGS["moe"]
    parallel.initialize(o)
    chunks = case.model.build(o, config)
    lora.load_adapter(case.convert.adapter(folder, config), chunks, case.convert.expert_pieces(config))
    return _gather({name: (p, p.detach()) for name, p in checkpoint.trained(chunks)})


@pytest.mark.L3
def test_a_folder_of_experts_adapters_passes_between_layouts_and_merges_bit_by_bit(tmp_path):
    config, folder = case.CONFIGS["moe"], tmp_path / "adapter"
    want = run_ranks(4, written, folder, {"tp": 2, "ep": 2})[0]
    for world, layout in ((1, {}), (2, {"tp": 2, "sp": True, "etp": 1, "ep": 2}), (2, {"pp": 2})):
        got = run_ranks(world, read, folder, layout)[0]
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 4 * (1 + 2 * config.num_experts)
    facts = json.loads((folder / "adapter_config.json").read_text())
    assert facts["target_modules"] == sorted(
        ["up_proj", "down_proj", *(f"model.layers.{i}.self_attn.q_proj" for i in range(4))]
    )
    state = {name: tensor.bfloat16() for name, tensor in case.random_state(config).items()}
    pieces = case.convert.expert_pieces(config)
    merged = release.merge_adapter(case.source(state), case.convert.adapter(folder, config), pieces=pieces)
    for name, keys in pieces.items():
        got = merged.read(name)
        for key, index in keys.items():
            A, B = (tensors.get(f"base_model.model.{key.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
            base = state[name][index].t()
            summed = base if A is None else (base.float() + B @ A * (9 / 6)).bfloat16()
            assert torch.equal(got[index].t(), summed) and (A is None) == torch.equal(summed, base)


def losses(layout: dict, folder, first: int, last: int) -> list[float]:
    """Trains adapters of all linears from step `first`, whose checkpoint is read, to step `last`, which is saved."""
    o, config = case.options(**layout), case.CONFIGS["moe"]
    parallel.initialize(o)
    chunks = case.model.build(o, config)
    case.load(chunks, case.random_state(config))
    adapted.adapt(chunks, config)
    wrapped = parallel.wrap(chunks, o, case.model.Qwen3Block)
    optimizer = loop.build_optimizer(o, wrapped)
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    if first:
        checkpoint.load(folder / f"step-{first:06d}", wrapped, optimizer)
    out = []
    for step in range(first, last):
        loop.zero_gradients(wrapped, optimizer)
        shape = {"micro_batch": o.micro_batch, "sequence_length": case.LENGTH}
        results = loop.forward(wrapped, case.train.forward_step, my_batches(o, step, packed=True), **shape)
        out.append(loop.global_loss(o, results, False)[0])
        optimizer.step()
    checkpoint.save(folder, last, wrapped, optimizer, {"optimizer_steps": last}, keep=9)
    return out


@pytest.mark.L3
def test_experts_adapters_that_go_on_in_another_layout_are_those_of_the_unbroken_run(tmp_path):
    want = run_ranks(1, losses, {}, tmp_path / "unbroken", 0, 4)[0]
    got = run_ranks(4, losses, {"tp": 2, "ep": 2}, tmp_path / "parts", 0, 2)[0]
    got += run_ranks(2, losses, {"tp": 2, "sp": True, "etp": 1, "ep": 2}, tmp_path / "parts", 2, 3)[0]
    got += run_ranks(1, losses, {}, tmp_path / "parts", 3, 4)[0]
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.L4
def test_adapters_of_some_experts_alone_are_refused(tmp_path):
    config = case.CONFIGS["moe"]
    run_ranks(1, written, tmp_path / "a", {})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    kept = {k: t for k, t in tensors.items() if "layers.1.mlp.experts.4." not in k}
    save_file(kept, tmp_path / "b" / "adapter_model.safetensors")
    facts = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    names = sorted({k.removeprefix("base_model.model.").partition(".lora_")[0] for k in kept})
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(facts | {"target_modules": names}))
    with pytest.raises(ValueError, match=r"5 of the 6 experts of layers.1.mlp.experts.up_proj have adapters"):
        case.convert.adapter(tmp_path / "b", config)


# --------------------------------------------------------------------------------------------------------------- jobs


def job(*argv) -> None:
    nf4_contract.install()
    case.job(*argv)


@pytest.mark.L4
def test_a_packed_run_with_experts_adapters_resumes_bitwise(tmp_path):
    settings = [
        *adapted.chats(tmp_path), "--size", "tiny-moe", "--from-scratch", "--quantize", "nf4", "--global-batch", "2",
        "--lora-rank", "4", "--lora-targets", "q_proj,gate_proj,up_proj,down_proj", "--save-every", "1", "--ep", "2",
        "--warmup", "0",
    ]  # fmt: skip
    for out, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
        run_ranks(2, job, *settings, "--out", tmp_path / out, "--steps", steps)
    assert case.steps_of(tmp_path / "parts") == case.steps_of(tmp_path / "whole")
    names = checkpoint.tensor_sizes(tmp_path / "whole" / "checkpoints" / "step-000002")
    assert names and all(".lora_" in name for name in names)
