"""Compares adapters with peft's, in memory and in folders, and every kind of layout with one process (fp32, gloo)."""

import json
import math
import shutil
from pathlib import Path

import pytest
import test_wan21_layouts as layouts
import torch
import wan_case as case
from layouts import whole_weights
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from common import adapters, checkpoint, lora, parallel, release, weights
from common import train as loop

TARGETS = ["q_proj", "v_proj", "o_proj", "mlp.down_proj", "lm_head"]
PREFIX = "base_model.model."
TOKENS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(3))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def randomise(parameters, seed: int = 1) -> None:
    """Fills parameters with random numbers: while B is zero, A has no effect. The seed comes from the name up to lora_A
    or lora_B, so that peft's adapters get the same numbers as ours."""
    for name, p in parameters:
        short_name = name.removeprefix(PREFIX).replace(".default.weight", "")
        generator = torch.Generator().manual_seed(checkpoint.stable_seed(seed, short_name))
        p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))


def qwen(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Builds transformers' Qwen3 and draws every parameter at random."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=40,
        num_hidden_layers=2, vocab_size=50, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for name, p in model.named_parameters():
        p.data.normal_(std=0.3).add_(1.0 if "norm" in name else 0.0)
    return model.to(dtype)


def peft_qwen(**options):
    import peft

    values = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options
    config = peft.LoraConfig(**values)
    model = peft.get_peft_model(qwen(), config)
    randomise((n, p) for n, p in model.named_parameters() if p.requires_grad)
    return model.train()


def our_qwen(**options) -> torch.nn.Module:
    model = qwen()
    lora.add([model], TARGETS, rank=3, alpha=5, seed=7, **options)
    randomise(((n, p) for n, p in model.named_parameters() if p.requires_grad))
    return model.train()


def found_in(path: Path) -> dict[str, adapters.Pair]:
    """Reads an adapter of `qwen`, in which linears have the names of the release."""
    shapes = {name: tuple(p.shape) for name, p in qwen().named_parameters()}
    linears = [
        name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name
    ]
    form = adapters.Format(prefix=PREFIX, linears={name: name for name in linears}, settings=True)
    return adapters.read(path, {"PEFT's": form}, shapes)[0]


def alone(function, *args):
    """Calls the function in a process group of one rank."""
    return run_ranks(1, _alone, function, *args)[0]


def _alone(function, *args):
    parallel.initialize(case.options())
    return function(*args)


# ------------------------------------------------------------------------------------------------------- against peft


def beside_peft(rslora: bool, dropout: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns {name: (ours, peft's)} of the logits and of every gradient. Both models draw their dropout masks from the
    same random state."""
    results = []
    for model in (our_qwen(rslora=rslora, dropout=dropout), peft_qwen(use_rslora=rslora, lora_dropout=dropout)):
        torch.manual_seed(11)
        logits = model(TOKENS).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        parameters = ((n.removeprefix(PREFIX).replace(".default.weight", ""), p) for n, p in model.named_parameters())
        results.append({"logits": logits.detach()} | {n: p.grad for n, p in parameters if p.requires_grad})
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    return {name: (ours[name], theirs[name]) for name in ours}


@pytest.mark.L2
@pytest.mark.parametrize(("rslora", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.4)])
def test_logits_and_gradients_equal_peft(rslora, dropout):
    pairs = alone(beside_peft, rslora, dropout)
    assert len(pairs) == 1 + 2 * (2 * 4 + 1)  # the logits, A and B of four linears in two layers and of the head
    bad = {name: error for name, (got, want) in pairs.items() if (error := relative(got, want)) > 1e-5}
    assert not bad


def through_folders(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the logits of our adapters, of our folder in peft, of peft's adapters, and of peft's folder in our
    code."""
    import peft

    ours, theirs, loaded = our_qwen(rslora=True), peft_qwen(lora_dropout=0.1).eval(), qwen()
    lora.save_adapter(folder / "ours", [ours], str, task="CAUSAL_LM")
    theirs.save_pretrained(folder / "peft", save_embedding_layers=False)  # otherwise with a copy of the base's head
    lora.load_adapter(found_in(folder / "peft"), [loaded])
    lora.save_adapter(folder / "again", [loaded], str, task="CAUSAL_LM")
    models = {"ours": ours, "ours in peft": peft.PeftModel.from_pretrained(qwen(), folder / "ours"),
              "peft": theirs, "peft's here": loaded.eval()}  # fmt: skip
    with torch.no_grad():
        return {name: model(TOKENS).logits for name, model in models.items()}


@pytest.mark.L2
def test_folders_pass_to_peft_and_back(tmp_path):
    logits = alone(through_folders, tmp_path)
    assert relative(logits["ours in peft"], logits["ours"]) < 1e-5
    assert relative(logits["peft's here"], logits["peft"]) < 1e-5
    theirs, rewritten = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again"))
    assert theirs.keys() == rewritten.keys()
    assert all(torch.equal(theirs[key], rewritten[key]) for key in theirs)


UNSLOTH = (  # the pattern that Unsloth's FastModel.get_peft_model makes for attention and mlp of the language model
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)))"
)
CHOICES = {  # what chooses linears and scales -> (options of peft, number of linears that get an adapter)
    "a regular expression": ({"target_modules": UNSLOTH}, 2 * 7),
    "layers": ({"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]}, 2),
    "one layer by its pattern, and a linear by its whole name": (
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        5,
    ),
    "all but some": ({"exclude_modules": ["v_proj", "lm_head"]}, 6),
    "ranks and alphas of their own": (
        {
            "rank_pattern": {"v_proj": 2, r"model.layers.\d+.mlp.down_proj": 7, "layers.1.self_attn.o_proj": 4},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 11, "self_attn.v_proj": 1.5},
        },
        9,
    ),
    "ranks of their own, stabilised": ({"rank_pattern": {"o_proj": 6}, "use_rslora": True}, 9),
}


def chosen(folder: Path, options: dict) -> tuple[int, dict[str, torch.Tensor], dict]:
    """Loads peft's folder in our code, and the folder that we then write in peft. Returns the number of adapted
    linears, the logits of each model, and {linear: settings}."""
    import peft

    theirs, ours, merged = peft_qwen(**options).eval(), qwen(), qwen()
    theirs.save_pretrained(folder / "peft", save_embedding_layers=False)
    pairs, reader = found_in(folder / "peft"), weights.Reader()
    lora.load_adapter(pairs, [ours])
    lora.save_adapter(folder / "ours", [ours], str, task="CAUSAL_LM")
    for name, p in merged.named_parameters():
        p.data = lora.merge_from_files(p.data, pairs.get(name.removesuffix(".weight")), None, reader)
    models = {"theirs": theirs, "here": ours.eval(), "merged": merged,
              "ours in peft": peft.PeftModel.from_pretrained(qwen(), folder / "ours")}  # fmt: skip
    settings = {name: pair.settings for name, pair in found_in(folder / "ours").items()}
    assert settings == {name: pair.settings for name, pair in pairs.items()}
    with torch.no_grad():
        return len(pairs), {name: model(TOKENS).logits for name, model in models.items()}, settings


@pytest.mark.L2
@pytest.mark.parametrize("choice", CHOICES)
def test_each_linear_has_the_adapter_and_the_scale_that_peft_gives_it(choice, tmp_path):
    options, linears = CHOICES[choice]
    count, logits, _ = alone(chosen, tmp_path, options)
    assert count == linears
    with torch.no_grad():
        assert relative(logits["theirs"], qwen()(TOKENS).logits) > 0.1
    bad = {name: error for name in logits if (error := relative(logits[name], logits["theirs"])) > 1e-5}
    assert not bad


# ------------------------------------------------------------------------------------------------------ what add does


def added() -> tuple[dict, dict, dict]:
    """Returns {name: whether it trains} before and after `lora.add`, and the initial values of the adapters."""
    before = dict.fromkeys(dict(qwen().named_parameters()), False)
    model = qwen()
    lora.add([model], ["q_proj", "down_proj"], rank=64, alpha=5, seed=7)
    after = {n: p.requires_grad for n, p in model.named_parameters()}
    return before, after, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.L2
def test_only_adapters_train_and_start_as_nothing():
    before, after, adapters = alone(added)
    linears = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")]
    assert after == before | {f"{linear}.lora_{part}": True for linear in linears for part in "AB"}
    for name, tensor in adapters.items():
        if name.endswith("lora_B"):
            assert not tensor.any()
        else:
            bound = 1 / math.sqrt(tensor.shape[1])
            assert 0.98 * bound < tensor.abs().max() <= bound
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    initial_A = [adapters[f"{linear}.lora_A"] for linear in linears]
    assert not torch.equal(initial_A[0], initial_A[2])


def merged(dtype: torch.dtype) -> tuple[dict, dict, torch.Tensor, torch.Tensor]:
    """Returns the weights merged in fp64 and rounded once, the weights that `lora.merge` computes, and the logits
    before and after merging."""
    model, plain = qwen(dtype), qwen(dtype)
    lora.add([model], TARGETS, rank=3, alpha=5, seed=7)
    randomise((n, p) for n, p in model.named_parameters() if p.requires_grad)
    want, got = ({n: p.detach().clone() for n, p in plain.named_parameters()} for _ in range(2))
    for name, a in ((n, p.detach()) for n, p in model.named_parameters() if n.endswith("lora_A")):
        weight, b = name.replace("lora_A", "weight"), model.get_parameter(name.replace("lora_A", "lora_B")).detach()
        want[weight] = (want[weight].double() + 5 / 3 * (b.double() @ a.double())).to(dtype)
        got[weight] = lora.merge(got[weight], a, b, 5 / 3)
    plain.load_state_dict(got)
    with torch.no_grad():
        return want, got, model(TOKENS).logits, plain(TOKENS).logits


@pytest.mark.L2
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_unmerged(dtype):
    want, got, before, after = alone(merged, dtype)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    if dtype == torch.bfloat16:  # lora.merge rounds once too, so nearly all entries are equal
        different = torch.cat([(got[name] != want[name]).flatten() for name in want])
        assert different.float().mean() < 1e-3
    else:
        assert relative(after, before) < 1e-5


# ------------------------------------------------------------------------------------------------------------ refusals


def saved(folder: Path) -> None:
    lora.save_adapter(folder, [our_qwen()], str)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "a"
    alone(saved, folder)
    return folder


NAME = "base_model.model.model.layers.1.self_attn.q_proj"
KEY = f"{NAME}.lora_B.weight"


def lose(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(KEY))


def cross(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({KEY: tensors[KEY].mT.contiguous()}))


def stray(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({KEY.replace(".1.", ".2."): torch.zeros(1)}))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def edit_config(folder: Path, **facts) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def dora(folder: Path) -> None:
    edit_config(folder, use_dora=True)


def pissa(folder: Path) -> None:
    edit_config(folder, init_lora_weights="pissa")


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32):
    """Returns a change that adds a tensor of ones."""

    def change(folder: Path) -> None:
        edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(shape).to(dtype)}))

    return change


def say(**facts):
    """Returns a change of the settings."""
    return lambda folder: edit_config(folder, **facts)


def without_settings(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def named_otherwise_twice(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "epoch-1.safetensors")
    (folder / "epoch-2.safetensors").write_bytes((folder / "epoch-1.safetensors").read_bytes())


def other(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"model_type": "qwen3"}')


def biases(folder: Path) -> None:
    edit_config(folder, bias="all")


@pytest.mark.L2
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lose, f"1 missing: B of {NAME}"),
        (cross, f"{KEY} is [3, 32], expected [32, 3]"),
        (stray, f"1 not of this model: {KEY.replace('.1.', '.2.')}"),
        (dora, "'use_dora': True"),
        (pissa, "'init_lora_weights': 'pissa'"),
        (biases, "'bias': 'all'"),
        (other, "'model_type': 'qwen3', 'peft_type': None"),
        (say(peft_type="LOHA"), "'peft_type': 'LOHA'"),
        (say(modules_to_save=["lm_head"]), "'modules_to_save': ['lm_head']"),
        (say(target_parameters=["mlp.experts.gate_up_proj"]), "'target_parameters': ['mlp.experts.gate_up_proj']"),
        (say(lora_bias=True), "'lora_bias': True"),
        (say(target_modules=["q_proj"]), "7 not of its target_modules: base_model.model.lm_head, "),
        (
            say(target_modules=[*TARGETS, "up_proj"]),
            "4 missing: A of base_model.model.model.layers.0.mlp.up_proj, B of ",
        ),
        (say(target_modules="(q_proj"), "no regular expression"),
        (say(rank_pattern={"q_proj": 4}), "is [3, 24], expected [4, 24]"),
        (say(lora_alpha="16"), "not a plain LoRA: it has {'lora_alpha': '16'}"),
        (say(r=None), "not a plain LoRA: it has {'r': None}"),
        (put(f"{NAME}.lora_magnitude_vector.weight", 32), "more than an adapter, it has DoRA's magnitudes: " + NAME),
        (
            put("base_model.model.lm_head.weight", 50, 24),
            "more than an adapter, it has whole weights (modules_to_save)",
        ),
        (put(f"{NAME}.bias", 32), "more than an adapter, it has trained biases: " + NAME),
        (put(f"{NAME}.hada_w1_a", 32), "more than an adapter, it has LoHa's factors: " + NAME),
        (put(f"{NAME}.lokr_w1", 32), "more than an adapter, it has LoKr's factors: " + NAME),
        (put(f"{NAME}.lora_B.bias", 32), "more than an adapter, it has a bias of B (lora_bias): " + NAME),
        (put(f"{NAME}.lora_C.weight", 32), f"1 not of this model: {NAME}.lora_C.weight"),
        (put(f"{NAME}.lora_up.weight", 32, 3), f"1 not of this model: {NAME}.lora_up.weight"),  # B under a second name
        (put(f"{NAME}.alpha"), "says its scale twice"),
        (put(KEY, 32, 3, dtype=torch.int8), f"1 tensors as I8, first {KEY}"),
        (without_settings, "has no adapter_config.json, which says its scale"),
        (pickled, "holds no .safetensors"),
        (named_otherwise_twice, "holds 2 files: epoch-1.safetensors, epoch-2.safetensors; fix: --adapter with one"),
    ],
)
def test_what_is_no_adapter_of_the_model_is_refused_by_name(spoil, says, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "a")
    assert len(found_in(folder)) == 9
    spoil(folder)
    with pytest.raises(ValueError) as error:
        found_in(folder)
    assert says in str(error.value) and "; fix: " in str(error.value)


@pytest.mark.L2
def test_an_adapter_is_a_folder_or_one_of_its_files_whatever_lies_beside_it(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "a[1]")  # a name that would be a pattern if it were globbed
    want = {name: pair.settings for name, pair in found_in(good).items()}
    put("stray", 3)(folder)
    (folder / "adapter_model.safetensors").rename(folder / "pytorch_lora_weights.safetensors")
    shutil.copy2(good / "adapter_model.safetensors", folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-00001-of-00002.safetensors"}}')
    for path in (folder, folder / "adapter_model.safetensors"):
        assert {name: pair.settings for name, pair in found_in(path).items()} == want
    with pytest.raises(ValueError, match="1 not of this model: stray"):
        found_in(folder / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="nowhere does not exist; expected an adapter's folder or .safetensors file"):
        found_in(tmp_path / "nowhere")


def uncalled() -> str:
    pair = adapters.Pair(A=None, B=None, settings=adapters.Settings(r=1, lora_alpha=1))
    with pytest.raises(ValueError) as error:
        lora.load_adapter({"model.layers.7.mlp.up_proj": pair}, [qwen()])
    return str(error.value)


@pytest.mark.L2
def test_an_adapter_of_what_the_model_does_not_call_is_refused():
    assert "model.layers.7.mlp.up_proj" in alone(uncalled)


def misnamed() -> str:
    with pytest.raises(ValueError) as error:
        # Names end in proj, but proj is the whole last part of none.
        lora.add([qwen()], ["q_proj", "proj"], rank=3, alpha=5, seed=7)
    return str(error.value)


@pytest.mark.L2
def test_unknown_target_is_refused_with_the_names_there_are():
    message = alone(misnamed)
    assert "called proj;" in message
    assert "lm_head, model.layers.N.mlp.down_proj, " in message


# ------------------------------------------------------------------------------------------------------------- layouts

WAN_TARGETS = ["self_attn.q", "cross_attn.k", "o", "ffn.0", "ffn.2", "text_embedding.2", "time_projection.1", "head"]
LAYOUTS = {
    "dp2": (2, {}),
    "fsdp2": (2, {"fsdp": True}),
    "tp2": (2, {"tp": 2}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "tp2 sp recompute full": (2, {"tp": 2, "sp": True, "recompute": "full"}),
    "cp2 ulysses": (2, {"cp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "tp2 sp pp2": (4, {"tp": 2, "sp": True, "pp": 2}),
}


def adapt(chunks) -> None:
    """Adds adapters to linears of all three kinds. `lora.add` draws A and leaves B zero; B is drawn here by its
    name."""
    lora.add(chunks, WAN_TARGETS, rank=6, alpha=9, seed=7)
    checkpoint.initialize(chunks, 8, draw_b, lambda name: name.endswith(".lora_B"))


def draw_b(name: str, whole: torch.Tensor, generator: torch.Generator) -> None:
    whole.normal_(std=0.1, generator=generator)


@pytest.fixture(scope="module")
def single() -> dict:
    return run_ranks(1, layouts.run_layout, {}, 2, True, adapt)[0]


@pytest.mark.L3
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_single_process(name, single):
    world, layout = LAYOUTS[name]
    got = run_ranks(world, layouts.run_layout, layout, 2, True, adapt)[0]
    layouts.compare(got, single, layout)


@pytest.mark.L3
def test_optimizer_moves_every_adapter_and_nothing_else(single):
    start = case.random_state()
    adapters = {name for name in single["weights"] if ".lora_" in name}
    assert single["gradients"].keys() == adapters
    assert single["weights"].keys() - adapters == start.keys()
    assert all(torch.equal(single["weights"][name], value) for name, value in start.items())
    untrained = run_ranks(1, layouts.run_layout, {}, 0, False, adapt)[0]["weights"]
    assert all((single["weights"][name] - untrained[name]).abs().min() > 0 for name in adapters)


def written(layout: dict, folder: Path) -> None:
    o = case.options(**layout)
    parallel.initialize(o)
    chunks = case.model.build(o, case.CONFIG)
    case.load(chunks, case.random_state())
    adapt(chunks)
    if o.fsdp:
        chunks = parallel.wrap(chunks, o, case.model.WanBlock)
    lora.save_adapter(folder, chunks, case.convert.to_diffusers)


def read_back(layout: dict, folder: Path, copy: Path) -> None:
    o = case.options(**layout)
    parallel.initialize(o)
    chunks = case.model.build(o, case.CONFIG)
    lora.load_adapter(case.convert.adapter(folder, case.CONFIG)[0], chunks)
    lora.save_adapter(copy, chunks, case.convert.to_diffusers)


@pytest.mark.L3
def test_folders_do_not_know_the_layout(tmp_path):
    four_ranks = {"tp": 2, "sp": True, "pp": 2}
    run_ranks(1, written, {}, tmp_path / "one")
    run_ranks(4, written, four_ranks, tmp_path / "four")
    run_ranks(2, written, {"fsdp": True}, tmp_path / "fsdp")
    run_ranks(4, read_back, four_ranks, tmp_path / "one", tmp_path / "again")
    one = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert one["base_model.model.blocks.3.attn1.to_q.lora_B.weight"].shape == (48, 6)
    assert one["base_model.model.blocks.3.ffn.net.2.lora_A.weight"].shape == (6, 80)
    for name in ("four", "fsdp", "again"):
        other = load_file(tmp_path / name / "adapter_model.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
        settings = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("one", name)]
        assert settings[0] == settings[1]


def merged_shards(layout: dict, folder: Path) -> dict:
    o = case.options(**layout)
    parallel.initialize(o)
    chunks = case.model.build(o, case.CONFIG)
    case.load(chunks, case.random_state())
    release.merge_into(chunks, *case.convert.adapter(folder, case.CONFIG))
    return whole_weights(chunks)


@pytest.mark.L3
def test_merged_shards_equal_single_process(tmp_path):
    run_ranks(1, written, {}, tmp_path / "adapter")
    want = run_ranks(1, merged_shards, {}, tmp_path / "adapter")[0]
    got = run_ranks(2, merged_shards, {"tp": 2}, tmp_path / "adapter")[0]
    assert want.keys() == got.keys() == case.random_state().keys()
    assert all(relative(got[name], want[name]) < 1e-6 for name in want)
    assert not torch.equal(want["blocks.0.ffn.2.weight"], case.random_state()["blocks.0.ffn.2.weight"])


# ------------------------------------------------------------------------------------------------- dropout and resume


def gradients(layout: dict, dropout: float, compiled: bool = False) -> dict:
    """Returns {name: (gradient, whether tp splits the parameter)} of one micro-batch: this rank's part, not
    gathered."""
    o = case.options(**layout)
    parallel.initialize(o)
    chunks = case.model.build(o, case.CONFIG)
    case.load(chunks, case.random_state())
    lora.add(chunks, WAN_TARGETS, rank=6, alpha=9, dropout=dropout, seed=7)
    checkpoint.initialize(chunks, 8, draw_b, lambda name: name.endswith(".lora_B"))
    if compiled:
        for block in chunks[0].blocks.values():
            block.compile(backend="aot_eager", fullgraph=True)
    lora.seed_dropout(3, step=5)
    output, loss = case.train.forward_step(iter(case.my_batches(o)), chunks[0])
    loss(output)[0].backward()
    return {
        n: (p.grad, getattr(p, "tensor_model_parallel", False))
        for n, p in checkpoint.parameters(chunks)
        if p.requires_grad
    }


@pytest.mark.L3
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute_draws_the_same_masks(recompute):
    want, got = (run_ranks(1, gradients, {"recompute": kind}, 0.5)[0] for kind in ("none", recompute))
    bad = {name: error for name in want if (error := relative(got[name][0], want[name][0])) > 1e-5}
    assert not bad


@pytest.mark.L3
def test_adapted_block_compiles_whole():
    want, got = (run_ranks(1, gradients, {}, 0.0, compiled)[0] for compiled in (False, True))
    bad = {name: error for name in want if (error := relative(got[name][0], want[name][0])) > 1e-5}
    assert not bad


@pytest.mark.L3
def test_dropout_keeps_copies_equal_over_tp():
    first, second = run_ranks(2, gradients, {"tp": 2}, 0.5)
    copies = [name for name, (_, split) in first.items() if not split]
    assert len(copies) == 2 * 3 + 6 * 4  # both factors of a plain linear, one factor of a split one
    bad = {name: error for name in copies if (error := relative(first[name][0], second[name][0])) > 1e-5}
    assert not bad


def masks(layout: dict) -> dict:
    """Returns this rank's place in each direction of the layout, and the masks that it draws at a step, at the next
    step, under another seed, and at the first step again."""
    o = case.options(**layout)
    parallel.initialize(o)
    drawn = []
    for seed, step in ((3, 5), (3, 6), (4, 5), (3, 5)):
        lora.seed_dropout(seed, step)
        drawn.append(torch.nn.functional.dropout(torch.ones(64), 0.5))
    mpu = parallel.mpu
    place = mpu.get_data_parallel_rank(), mpu.get_context_parallel_rank(), mpu.get_pipeline_model_parallel_rank()
    return {"place": place, "masks": drawn}


@pytest.mark.L3
@pytest.mark.parametrize("layout", [{}, {"cp": 2}, {"pp": 2}, {"tp": 2}], ids=lambda layout: " ".join(layout) or "dp")
def test_dropout_masks_differ_where_tokens_or_layers_do_and_by_step_and_seed(layout):
    """Under tp alone, both ranks hold copies of the same tokens and draw the same masks."""
    first, second = run_ranks(2, masks, layout)
    assert (first["place"] == second["place"]) == ("tp" in layout)
    for one, other in zip(first["masks"], second["masks"], strict=True):
        assert torch.equal(one, other) == ("tp" in layout)
    for drawn in (first["masks"], second["masks"]):
        mask, next_step, other_seed, again = drawn
        assert torch.equal(mask, again) and not torch.equal(mask, next_step) and not torch.equal(mask, other_seed)


def interrupted(folder: Path, layout: dict) -> float:
    """Trains two steps without a break, and the second one again from the checkpoint of the first, with a fresh model
    and optimizer. Returns the largest difference of any parameter."""
    o = case.options(**layout)
    parallel.initialize(o)
    states = []
    for saved in (None, folder / "step-000001"):
        chunks = case.model.build(o, case.CONFIG)
        case.load(chunks, case.random_state())
        adapt(chunks)
        if saved:
            randomise(checkpoint.trained(chunks))
            assert all(".lora_" in name for name in checkpoint.tensor_sizes(saved))
        wrapped = parallel.wrap(chunks, o, case.model.WanBlock)
        optimizer = loop.build_optimizer(o, wrapped)
        if saved is None:
            train_step(o, wrapped, optimizer)
            checkpoint.save(folder, 1, wrapped, optimizer, {"optimizer_steps": 1}, fsdp=o.fsdp)
        else:
            checkpoint.load(saved, wrapped, optimizer, fsdp=o.fsdp)
        train_step(o, wrapped, optimizer)
        states.append(whole_weights(wrapped))
    return max((states[0][name] - states[1][name]).abs().max().item() for name in states[0])


def train_step(o, wrapped, optimizer) -> None:
    loop.zero_gradients(wrapped, optimizer)
    shape = {"micro_batch": o.micro_batch, "sequence_length": case.sequence_length(o)}
    loop.forward(wrapped, case.train.forward_step, case.my_batches(o), **shape)
    optimizer.step()


@pytest.mark.L3
@pytest.mark.parametrize("layout", [{"tp": 2, "sp": True}, {}, {"fsdp": True}], ids=str)
def test_checkpoint_resumes_adapters(layout, tmp_path):
    assert run_ranks(2, interrupted, tmp_path, layout) == [0.0, 0.0]
