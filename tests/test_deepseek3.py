"""What is unlike other models in zoo/deepseek3: the authors' own implementation, balancing by a bias, the balance loss of
a sequence, what its releases may look like. The proofs that all recipes share are in tests/test_models.py."""

import dataclasses
import functools
import json
import math
import os
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from layouts import whole_gradients
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_models import differences, filled, random_state, run, trained
from torch.testing._internal.distributed.fake_pg import FakeStore

from common import checkpoint, parallel, release
from common import train as loop
from common.language import decode
from common.language import generate as generation
from zoo.deepseek3 import case, config, convert, infer, model, options, train

GOLDEN = Path(__file__).parent / "goldens" / "deepseek_v3_yarn_bias"
PARTS = {  # the authors' names of what the release calls otherwise (their convert.py)
    "attn.wq_a": "self_attn.q_a_proj", "attn.q_norm": "self_attn.q_a_layernorm", "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv_a": "self_attn.kv_a_proj_with_mqa", "attn.kv_norm": "self_attn.kv_a_layernorm",
    "attn.wkv_b": "self_attn.kv_b_proj", "attn.wo": "self_attn.o_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "ffn.": "mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.",
    ".w3.": ".up_proj.", "gate.bias": "gate.e_score_correction_bias",
}  # fmt: skip


def released(key: str) -> str:
    """'layers.1.ffn.experts.5.w2.weight' -> 'model.layers.1.mlp.experts.5.down_proj.weight'."""
    if not key.startswith("layers."):
        return {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}.get(key, f"model.{key}")
    for theirs, ours in PARTS.items():
        key = key.replace(theirs, ours)
    return f"model.{key}"


@pytest.mark.L2
def test_logits_routing_and_gradients_are_those_of_the_authors_implementation(tmp_path):
    golden = load_file(GOLDEN.with_suffix(".safetensors"))
    weights = {released(key.removeprefix("sd.")): t for key, t in golden.items() if key.startswith("sd.")}
    save_file(weights, tmp_path / "model.safetensors")
    found = run_ranks(1, beside_the_authors, tmp_path)[0]
    for name in ("p1", "p2"):
        got = found[name]
        want = {key.removeprefix(f"{name}."): t for key, t in golden.items() if key.startswith(f"{name}.")}
        assert not differences({"logits": got["logits"]}, {"logits": want["logits_all"]})
        for layer, (experts, chosen) in got["routing"].items():
            # In no fixed order: sort by expert.
            order, theirs = experts.argsort(1), want[f"routing_idx.{layer}"].argsort(1)
            assert torch.equal(experts.gather(1, order), want[f"routing_idx.{layer}"].gather(1, theirs))
            assert torch.allclose(chosen.gather(1, order), want[f"routing_w.{layer}"].gather(1, theirs), rtol=1e-5)
        gradients = {key.removeprefix("grad."): t for key, t in want.items() if key.startswith("grad.")}
        assert len(gradients) == 5
        assert not differences({key: got["gradients"][released(key)] for key in gradients}, gradients)


def beside_the_authors(folder: Path) -> dict:
    theirs = json.loads(GOLDEN.with_suffix(".json").read_text())["config"]
    same = {key: theirs[key] for key in ("vocab_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")}
    same |= {key: theirs[key] for key in ("qk_rope_head_dim", "rope_theta")}
    mine = config.Deepseek3Config(
        **same, hidden_size=theirs["dim"], intermediate_size=theirs["inter_dim"], num_hidden_layers=theirs["n_layers"],
        num_attention_heads=theirs["n_heads"], first_k_dense_replace=theirs["n_dense_layers"],
        n_routed_experts=theirs["n_routed_experts"], n_shared_experts=theirs["n_shared_experts"],
        num_experts_per_tok=theirs["n_activated_experts"], n_group=theirs["n_expert_groups"],
        topk_group=theirs["n_limited_groups"], moe_intermediate_size=theirs["moe_inter_dim"],
        routed_scaling_factor=theirs["route_scale"], num_nextn_predict_layers=0, rms_norm_eps=1e-6,
        rope_factor=float(theirs["rope_factor"]), rope_mscale=theirs["mscale"], initializer_range=0.02,
        max_position_embeddings=theirs["max_seq_len"], original_max_position_embeddings=theirs["original_seq_len"],
    )  # fmt: skip
    assert mine.softmax_scale == pytest.approx(0.35412515893994395)
    parallel.initialize(case.options(mine))
    chunks, table = model.build(case.options(mine), mine), convert.table(mine)
    release.load(chunks, table.entries(folder), table)
    golden, out = load_file(GOLDEN.with_suffix(".safetensors")), {}
    for name in ("p1", "p2"):
        routing, choose = {}, model.choose_experts

        def keep(scores, *args, routing=routing, choose=choose):
            experts = choose(scores, *args)
            chosen = scores.gather(1, experts)
            weights = chosen / chosen.sum(-1, keepdim=True) * mine.routed_scaling_factor
            routing[len(routing) + mine.first_k_dense_replace] = experts, weights.detach()
            return experts

        tokens = golden[f"{name}.input_ids"]
        B, L = tokens.shape
        positions = torch.arange(L).repeat(B)
        model.choose_experts = keep
        states, _ = chunks[0](tokens.flatten(), positions, list(range(0, B * L + 1, L)), B)
        model.choose_experts = choose
        logits = (states.flatten(0, 1) @ chunks[0].output_weight.t()).unflatten(0, (B, L))
        chunks[0].zero_grad()
        torch.nn.functional.cross_entropy(logits[:, -1], golden[f"{name}.target"]).backward()
        gradients = {}
        for ours, p in chunks[0].named_parameters():
            pieces = table.pieces.get(ours, {})
            gradients |= {key: p.grad[index].t() for key, index in pieces.items()} or {convert.released(ours): p.grad}
        out[name] = {"logits": logits.detach(), "routing": routing, "gradients": gradients}
    return out


@pytest.mark.L2
def test_twenty_steps_with_the_prediction_module_equal_transformers_and_torch_adamw():
    losses = run_ranks(1, trained, "deepseek3", "grouped", {"weight_decay": 0.1, "beta2": 0.95}, 20)[0]["losses"]
    mine, expected = case.CONFIGS["grouped"], []
    oracle, state = case.oracle(mine), random_state(convert.table(mine).shapes)
    oracle.load_state_dict(dict(case.to_oracle(name, tensor) for name, tensor in state.items()), strict=False)
    # All parameters are decayed: it is the schedule, absent here, that spares norms.
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(20):
        samples = [case.sample(mine, place, step) for place in range(case.GLOBAL_BATCH)]
        optimizer.zero_grad()
        main, ahead = case.oracle_losses(oracle, samples)
        (main + case.MTP_WEIGHT * ahead).backward()
        optimizer.step()
        expected.append(main.item())
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.L1
def test_the_release_in_fp8_has_its_tensors_and_elements():
    table = convert.table(config.SIZES["671B"])
    tensors, scales = table.released_shapes(), table.scale_shapes()
    elements = sum(map(math.prod, [*tensors.values(), *scales.values()]))
    assert (len(tensors) + len(scales), elements) == (91_991, 684_531_386_000)
    assert sum(map(math.prod, scales.values())) == 41_540_496


@pytest.mark.L1
def test_stages_of_the_named_layouts_hold_what_the_dry_run_says():
    """On rank 0 of the first, the second and the last pipeline stage, built at full size without memory."""
    layouts = tomllib.loads((Path(config.__file__).parent / "parallel.toml").read_text())
    published = [name for name, values in layouts.items() if values["size"] == "671B"]
    assert len(published) == 8
    for name, wrong, whole in run_ranks(1, stages_of, {name: layouts[name] for name in published})[0]:
        assert not wrong, name
        assert whole == 682_636_487_424, name


WORLDS = {"671B": 512, "671B-A3": 512, "671B-sft": 512, "671B-sft-A3": 256, "671B-lora": 64, "671B-lora-16K": 128,
          "671B-qlora": 32, "671B-generate": 32}  # fmt: skip


def stages_of(layouts: dict) -> list[tuple[str, dict, int]]:
    """Returns (layout, stages whose parameters differ from the dry run's, parameters of all stages)."""
    found, mine = [], config.SIZES["671B"]
    for name, values in layouts.items():
        os.environ["WORLD_SIZE"] = str(WORLDS[name])
        o = case.options(
            mine, **{"global_batch": None, "precision": "bf16"} | {k: v for k, v in values.items() if k != "source"}
        )
        stages, wrong = config.stage_shapes(o, mine), {}
        for stage in sorted({0, 1, o.pp - 1}):
            rank = stage * o.world // o.pp
            torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=o.world)
            parallel.initialize(o)
            chunks = model.build(o, mine, torch.device("meta"))
            built = {n: math.prod(p.shape) for n, p in checkpoint.parameters(chunks) if not getattr(p, "shared", False)}
            said = {n: math.prod(shape) // config.cut(o, n)[0] for n, shape in stages[stage].items()}
            if built != said:
                wrong[stage] = built.items() ^ said.items()
            parallel.shutdown()
        found.append((name, wrong, sum(math.prod(shape) for held in stages for shape in held.values())))
    return found


@pytest.mark.parametrize(
    ("gib", "fix"),
    [(40, None), (36, "--moments bf16"), (30, "--offload-optimizer"), (5, "more devices")],
)
def test_a_run_that_does_not_fit_is_refused_with_the_smallest_change_that_does(gib, fix, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "512")
    mine = config.SIZES["671B"]
    layout = tomllib.loads((Path(config.__file__).parent / "parallel.toml").read_text())["671B"]
    values = {k: v for k, v in layout.items() if k != "source"}
    o = case.options(mine, **values | {"precision": "bf16", "device_memory": gib})
    if fix is None:
        options.check_memory(o, mine)
        return
    with pytest.raises(ValueError, match=f"needs about .* the device has {gib}; fix: {fix}"):
        options.check_memory(o, mine)


# ------------------------------------------------------------------------------------------------------------- balance


def test_a_bias_that_changes_the_group_changes_the_experts_and_not_their_weights():
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.2, 0.7, 0.6, 0.3, 0.4]])
    grouped = dataclasses.replace(case.CONFIGS["grouped"], n_group=2, topk_group=1, num_experts_per_tok=2)
    assert model.choose_experts(scores, torch.zeros(8), grouped).sort().values.tolist() == [[0, 1]]
    bias = torch.tensor([0.0, 0, 0, 0, 0, 0, 0.5, 0.4])  # the best sums of two: 1.7 and 1.6
    assert model.choose_experts(scores, bias, grouped).sort().values.tolist() == [[0, 1]]
    bias[7] += 0.11  # 0.8 + 0.91
    assert model.choose_experts(scores, bias, grouped).sort().values.tolist() == [[6, 7]]


def test_biases_move_towards_an_even_load_and_only_by_their_speed():
    before, after, load, metrics = run_ranks(2, moved_biases)[0]
    expected = before + 0.25 * (load.float().mean(1, keepdim=True) - load).sign()
    assert torch.equal(after, expected) and (before != after).any()
    mean = (8 * load / load.sum(1, keepdim=True)).mean(0)
    assert metrics["router_load"] == pytest.approx(mean.tolist()) and metrics["router_dropped"] == 0


def moved_biases():
    """Runs one micro-batch on each of two ranks; the load is counted from the experts that each layer chooses."""
    mine = case.CONFIGS["grouped"]
    o = case.options(mine, bias_speed=0.25, ep=2)
    parallel.initialize(o)
    (chunk,) = model.build(o, mine)
    checkpoint.initialize([chunk], 0, lambda name, whole, generator: model.draw(mine, name, whole, generator))
    load, choose = [], model.choose_experts

    def count(*args):
        load.append(choose(*args).flatten().bincount(minlength=8))
        return choose(*args)

    model.choose_experts = count
    rank = torch.distributed.get_rank()
    batch = case.prepare(o, [case.collate([case.sample(mine, rank, 0)])])
    _, loss = train.forward_step(iter(batch), chunk)
    loss(_)
    load = torch.stack(load)
    torch.distributed.all_reduce(load)
    before = torch.stack([bias.clone() for _, bias in checkpoint.buffers([chunk])])
    metrics = model.balance_experts([chunk], o, mine)
    return before, torch.stack([bias for _, bias in checkpoint.buffers([chunk])]), load, metrics


def test_balance_loss_is_the_papers():
    """Its gradient, on two rows of 3 tokens, 4 experts of which 2 are chosen, worked out by autograd from the formula."""
    torch.manual_seed(0)
    logits, weights = torch.randn(6, 4, requires_grad=True), torch.ones(6, 2, requires_grad=True)
    experts, row = logits.topk(2).indices, torch.tensor([0, 0, 0, 1, 1, 1])
    got = run_ranks(1, balance_gradient, logits, weights, experts, row)[0]
    total = 0.0
    for tokens in (slice(0, 3), slice(3, 6)):
        scores = logits[tokens].sigmoid()
        normalised = scores / scores.sum(1, keepdim=True)
        for i in range(4):
            f = 4 / (2 * 3) * (experts[tokens] == i).sum()
            total = total + 0.7 * f * normalised[:, i].mean() / 2
    total.backward()
    assert not differences({"logits": got}, {"logits": logits.grad})


def balance_gradient(logits, weights, experts, row):
    parallel.initialize(case.options(case.CONFIGS["grouped"]))
    logits = logits.detach().requires_grad_()
    router = model.RouterOptions("alltoall", 0.7)
    router.add_loss(weights, logits.sigmoid(), experts, (row, 2, 3), 1).sum().backward()
    return logits.grad


@pytest.mark.L3
@pytest.mark.parametrize("layout", ["tp2", "tp2 sp etp1 ep2", "cp2 ring", "tp2 sp pp2"])
def test_balance_loss_has_the_gradients_of_one_process(layout):
    processes, values, _ = case.LAYOUTS[layout]
    rows = {"micro_batch": 2, "aux": 0.5}
    got = run_ranks(processes, trained, "deepseek3", "grouped", values | rows, 1)[0]
    assert not differences(got["gradients"], balanced(0.5)["gradients"])
    assert differences(balanced(0.0)["gradients"], balanced(0.5)["gradients"])  # the loss has an effect


@functools.cache
def balanced(aux: float) -> dict:
    return run_ranks(1, trained, "deepseek3", "grouped", {"micro_batch": 2, "aux": aux}, 1)[0]


@pytest.mark.L3
def test_an_expert_with_all_tokens_and_experts_without_any_train_as_in_one_process():
    got, want = (run_ranks(n, with_one_sided_biases, {"ep": n})[0] for n in (2, 1))
    assert not differences(got, want)
    assert want["layers.1.mlp.down"][0].abs().max() > 0 and want["layers.1.mlp.down"][7].abs().max() == 0


def with_one_sided_biases(values: dict) -> dict:
    """Returns the gradients where the biases give experts 0 to 2 every token, and 5 to 7 none."""
    import test_models

    drawn = random_state(convert.table(case.CONFIGS["plain"]).shapes)
    biases = {name: torch.tensor([9.0, 9, 9, 0, 0, -9, -9, -9]) for name in drawn if name.endswith("correction_bias")}
    test_models.random_state = lambda shapes: drawn | biases
    out = trained("deepseek3", "plain", values, 1)
    return {k: v for k, v in out.get("gradients", {}).items() if v.abs().max() > 0}


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.L3
@pytest.mark.parametrize("layout", ["tp2 sp etp1 ep2", "tp2", "pp2"])
def test_adapters_of_latents_and_experts_have_the_gradients_of_one_process(layout):
    processes, values, _ = case.LAYOUTS[layout]
    got, want = run_ranks(processes, adapter_gradients, values)[0], adapters_alone()
    assert len(want) == 2 * (4 * 5 + 3 + 3 * (3 + 3)) and not differences(got, want)


@functools.cache
def adapters_alone() -> dict:
    return run_ranks(1, adapter_gradients, {})[0]


def adapter_gradients(values: dict) -> dict:
    """Returns the gradients of adapters on every linear, those of experts included, after one step of two micro-batches."""
    mine = dataclasses.replace(case.CONFIGS["grouped"], num_nextn_predict_layers=0)
    o, chunks = filled("deepseek3", mine, mtp=False, job="lora", lora_rank=4, lora_targets=ALL, **values)
    train.adapt(chunks, o, mine)
    checkpoint.initialize(
        chunks, 1, lambda name, whole, g: whole.normal_(std=0.02, generator=g), lambda n: n.endswith("lora_B")
    )
    wrapped = parallel.wrap(chunks, o, case.BLOCK)
    optimizer = loop.build_optimizer(o, wrapped)
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    rank = parallel.mpu.get_data_parallel_rank()
    places = [micro * o.dp + rank for micro in range(o.micro_batches)]
    batches = case.prepare(o, [case.collate([case.sample(mine, place, 0)]) for place in places])
    loop.zero_gradients(wrapped, optimizer)
    loop.forward(wrapped, train.forward_step, batches, micro_batch=1, sequence_length=case.LENGTH)
    gradients = whole_gradients(o, wrapped)
    return gradients if torch.distributed.get_rank() == 0 else {}


ALL = "q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj,gate_proj,up_proj,down_proj"


# ---------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"ep": 2}], ids=str)
def test_latent_and_plain_cache_and_guesses_give_the_tokens_of_transformers(layout):
    plain, latent, speculative, sizes = run_ranks(max([1, *layout.values()]), generated, layout)[0]
    assert plain == latent == [answer for answer, _, _ in speculative] == transformers_greedy()
    assert all(0 <= right <= guesses < 12 for _, guesses, right in speculative)
    mine, heads = case.CONFIGS["grouped"], 4 // layout.get("tp", 1)
    assert sizes[1] / sizes[0] == heads * (mine.head_dim + mine.v_head_dim) / (
        mine.kv_lora_rank + mine.qk_rope_head_dim
    )


PROMPTS = [[5, 3, 80, 41], [7], list(range(20, 31))]


def generated(layout: dict) -> tuple:
    """Returns the answers to PROMPTS with a cache of keys and values, with latents, and with guesses; and the bytes of both
    caches for two tokens."""
    mine = case.CONFIGS["grouped"]
    train_options, (chunk,) = filled("deepseek3", mine, **layout)
    infer_options = options.InferOptions(size="custom", layout="custom", max_new_tokens=12, **layout)
    model.ABSORBS = False
    plain = generation.generate(chunk.eval(), PROMPTS, infer_options, set())
    model.ABSORBS = True
    latent = generation.generate(chunk, PROMPTS, infer_options, set())
    speculative = [infer.speculate(chunk, prompt, infer_options, set(), None) for prompt in PROMPTS]
    sizes = []
    for model.ABSORBS in (True, False):
        cache = decode.Cache(1, 2)
        with torch.no_grad():
            chunk(torch.tensor([1, 2]), torch.arange(2), [], cache=cache)
        sizes.append(decode.held_bytes(cache))
    return plain, latent, speculative, sizes


@functools.cache
def transformers_greedy() -> list[list[int]]:
    """Returns the likeliest tokens by transformers, which reads the whole text for each."""
    oracle, answers = case.oracle(case.CONFIGS["grouped"]), []
    state = random_state(convert.table(case.CONFIGS["grouped"]).shapes)
    oracle.load_state_dict(dict(case.to_oracle(name, tensor) for name, tensor in state.items()), strict=False)
    for prompt in PROMPTS:
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(12):
                tokens.append(int(oracle.main(torch.tensor([tokens])).logits[0, -1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


# ------------------------------------------------------------------------------------------------------------ releases


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deepseek_v2"}, "its router is a softmax"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"rope_scaling": {"type": "yarn", "factor": 40, "mscale": 0.7, "mscale_all_dim": 1.0}}, "equal mscale"),
        ({"num_nextn_predict_layers": 2}, "expected 0 or 1"),
        ({"n_group": None}, "lacks n_group"),
    ],
)
def test_a_config_that_asks_for_another_model_is_refused(change, message, tmp_path):
    values = case.CONFIGS["grouped"].to_released() | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{message}.*fix: "):
        config.Deepseek3Config.from_folder(tmp_path)


@pytest.mark.parametrize("which", case.CONFIGS)
def test_an_architecture_survives_its_config_json(which, tmp_path):
    mine = case.CONFIGS[which]
    release.write(tmp_path / "whole", convert.table(mine), release_of(mine))
    (tmp_path / "whole" / "config.json").write_text(json.dumps(mine.to_released()))
    assert config.Deepseek3Config.from_folder(tmp_path / "whole") == mine
    assert config.size_of(tmp_path / "whole") == "custom"
    without = dataclasses.replace(mine, num_nextn_predict_layers=0)
    release.write(tmp_path / "without", convert.table(without), release_of(mine))
    (tmp_path / "without" / "config.json").write_text(json.dumps(mine.to_released()))  # as transformers saves it
    assert config.Deepseek3Config.from_folder(tmp_path / "without") == without


def release_of(mine: config.Deepseek3Config) -> release.Source:
    state = random_state(convert.table(mine).shapes)
    return release.Source(lambda name: state[name].element_size(), state.__getitem__)


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        ("train", ["--job", "dpo", "--mtp"], "module has no loss in dpo.sh.*--no-mtp"),
        ("train", ["--job", "lora", "--mtp"], "module has no loss in lora.sh.*--no-mtp"),
        ("train", ["--dispatch", "allgather"], "with ep=1 no token travels.*--ep"),
        ("train", ["--job", "dpo", "--aux", "0.1"], "aux is no part of the preference losses.*--aux 0"),
        ("infer", ["--speculative", "--temperature", "1"], "greedy and on one pipeline stage.*--temperature 0"),
        ("convert", ["--to", "sharded", "--fp8"], "a sharded checkpoint is not in fp8.*--fp8"),
        ("perf", ["--mtp"], "has no multi-token prediction module.*--mtp"),
    ],
)
def test_options_that_do_not_go_together_are_refused(script, argv, message, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    out = [] if script == "infer" else ["--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=f"{message}"):
        options.parse(script, [*argv, *out])


def test_weights_without_the_prediction_module_train_without_it_and_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    weights = demo_weights(tmp_path / "weights")
    module = f"model.layers.{config.SIZES['tiny'].num_hidden_layers}."
    tensors = load_file(weights / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if not k.startswith(module)}, weights / "model.safetensors")
    argv = ["--job", "sft", "--weights", str(weights), "--out", str(tmp_path / "run")]
    assert options.parse("train", argv).mtp is False
    assert "has no multi-token prediction module: it is not trained" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no multi-token prediction module; fix: --no-mtp"):
        options.parse("train", [*argv, "--mtp"])
    with pytest.raises(ValueError, match="fix: leave --speculative out"):
        options.parse("infer", ["--weights", str(weights), "--prompt", "a", "--speculative"])
    monkeypatch.setenv("NPROC", "2")
    assert options.parse("infer", ["--pp", "2"]).speculative is False  # the demo's default gives way to the layout


@pytest.mark.parametrize("eos", ["<end>", {"content": "<end>"}, None], ids=str)
def test_a_release_ends_documents_with_its_own_token(eos, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tokenizer = Path(shutil.copytree(options.DEMO_TOKENIZER, tmp_path / "tokenizer"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tokenizer / name).write_text((tokenizer / name).read_text().replace("<|endoftext|>", "<end>"))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": eos}))
    (tmp_path / "text.txt").write_text("a text")
    argv = ["--data", str(tmp_path / "text.txt"), "--tokenizer", str(tokenizer)]
    if eos is None:
        with pytest.raises(ValueError, match="names no eos_token, which ends a document; fix: --end"):
            options.parse("preprocess", argv)
        with pytest.raises(ValueError, match="names no eos_token"):
            options.parse("train", ["--tokenizer", str(tokenizer), "--out", str(tmp_path / "run")])
        assert options.parse("preprocess", [*argv, "--end", "<end>"]).end == "<end>"
        return
    assert options.parse("preprocess", argv).end == options.document_end(tokenizer) == "<end>"
    assert options.document_end(options.DEMO_TOKENIZER) == "<|endoftext|>"


@pytest.mark.L4
def test_what_dpo_exports_holds_the_prediction_module_that_it_left_alone(tmp_path):
    argv = ["--job", "dpo", "--steps", "1", "--warmup", "0", "--out", str(tmp_path / "run")]
    options.prepare(options.parse("train", argv))
    run_ranks(1, run, "deepseek3", [*argv, "--export", str(tmp_path / "new")])
    got, want = (load_file(folder / "model.safetensors") for folder in (tmp_path / "new", options.DEMO_WEIGHTS))
    module = f"model.layers.{config.SIZES['tiny'].num_hidden_layers}."
    copies = {module + name for name in ("embed_tokens.weight", "shared_head.head.weight")}  # the demo's lack these
    assert got.keys() == want.keys() | copies
    own = [key for key in want if key.startswith(module)]
    assert len(own) > 30 and all(torch.equal(got[key].float(), want[key].float()) for key in own)
    assert any(not torch.equal(got[key].float(), want[key].float()) for key in want if key not in own)
    assert config.Deepseek3Config.from_folder(tmp_path / "new").num_nextn_predict_layers == 1


def demo_weights(folder: Path) -> Path:
    """Copies the demo's weights with their tokenizer."""
    shutil.copytree(options.DEMO_WEIGHTS, folder)
    return Path(shutil.copytree(options.DEMO_TOKENIZER, folder, dirs_exist_ok=True))
