"""What convert.sh imports: Megatron-LM checkpoints of every parallel layout, compared with megatron-core's own model,
and LoRA adapters, compared with peft."""

import argparse
import contextlib
import dataclasses
import json
import os
import random
from collections import OrderedDict

import numpy as np
import pytest
import qwen_case as case
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common import release, worker

pytestmark = [pytest.mark.L2, pytest.mark.usefixtures("one_rank")]

PADDING = 8  # rows by which Megatron-LM pads the vocabulary


def job(*argv) -> None:
    """Converts in this process, as the launcher does."""
    worker.run(f"zoo.{case.RECIPE}", "convert", case.jobs.parse("convert", [*map(str, argv)]))


# ---------------------------------------------------------------------------------------- Megatron-LM, written by hand


def common_state() -> dict:
    """Returns what Megatron-LM saves beside the model."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    args = argparse.Namespace(
        model_type=ModelType.encoder_or_decoder, attention_backend=AttnBackend.auto, params_dtype=torch.float32,
        save=None, norm_epsilon=1e-6, rotary_base=10000, moe_router_topk=2,
    )  # fmt: skip
    rng = {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
           "torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {}}  # fmt: skip
    return {"args": args, "checkpoint_version": 3.0, "iteration": 10, "rng_state": [rng], "optimizer": {"state": {}}}


def rank_state(state: dict, config, layers, first, last, tp, ep, how) -> OrderedDict:
    """Returns the state dict of one rank's chunk, as Megatron-LM names and shards it. tp and ep are (rank, size)."""
    K, E, D = config.num_key_value_heads, config.head_dim, config.hidden_size
    n, out = config.num_attention_heads // K, OrderedDict()

    def cut(name, dim):
        return state[name].chunk(tp[1], dim)[tp[0]]

    def vocabulary(name):
        whole = torch.cat((state[name], torch.full((PADDING, D), 7.0, dtype=state[name].dtype)))
        return whole.chunk(tp[1])[tp[0]]

    if first:
        out["embedding.word_embeddings.weight"] = vocabulary("embed_tokens.weight")
    for local, i in enumerate(layers):
        ours, megatron = f"layers.{i}.", f"decoder.layers.{local}."
        q, k, v = (cut(f"{ours}self_attn.{p}_proj.weight", 0).view(K // tp[1], -1, E, D) for p in "qkv")
        assert q.shape[1] == n
        fused = how["fused norms"]
        norm = "self_attention.linear_qkv.layer_norm_weight" if fused else "input_layernorm.weight"
        out[megatron + norm] = state[ours + "input_layernorm.weight"]
        out[megatron + "self_attention.linear_proj.weight"] = cut(ours + "self_attn.o_proj.weight", 1)
        out[megatron + "self_attention.linear_proj._extra_state"] = None
        out[megatron + "self_attention.linear_qkv.weight"] = torch.cat((q, k, v), 1).reshape(-1, D)
        out[megatron + "self_attention.q_layernorm.weight"] = state[ours + "self_attn.q_norm.weight"]
        out[megatron + "self_attention.k_layernorm.weight"] = state[ours + "self_attn.k_norm.weight"]
        norm = "mlp.linear_fc1.layer_norm_weight" if fused and not config.num_experts else "pre_mlp_layernorm.weight"
        out[megatron + norm] = state[ours + "post_attention_layernorm.weight"]
        if not config.num_experts:
            gate, up = (cut(f"{ours}mlp.{p}_proj.weight", 0) for p in ("gate", "up"))
            out[megatron + "mlp.linear_fc1.weight"] = torch.cat((gate, up))
            out[megatron + "mlp.linear_fc2.weight"] = cut(ours + "mlp.down_proj.weight", 1)
            continue
        out[megatron + "mlp.router.weight"] = state[ours + "mlp.gate.weight"]
        gate_up, down = state[ours + "mlp.gate_up"], state[ours + "mlp.down"]  # [G, D, 2, F] and [G, F, D]
        if how.get("extend"):  # each tensor parallel rank holds whole experts of its own
            part, parts = ep[0] * tp[1] + tp[0], ep[1] * tp[1]
        else:
            part, parts = ep
        gate_up, down = gate_up.chunk(parts)[part], down.chunk(parts)[part]
        if not how.get("extend") and not how.get("etp1"):
            gate_up, down = gate_up.chunk(tp[1], 3)[tp[0]], down.chunk(tp[1], 1)[tp[0]]
        experts = megatron + "mlp.experts."
        if how["experts"] == "grouped":
            out[experts + "weight1"] = gate_up.reshape(D, -1)
            out[experts + "weight2"] = down.reshape(-1, D)
        for e, (gate_up_of_expert, down_of_expert) in enumerate(zip(gate_up, down, strict=True)):
            fc1, fc2 = gate_up_of_expert.permute(1, 2, 0).reshape(-1, D), down_of_expert.t().contiguous()
            if how["experts"] == "local":
                out |= {f"{experts}local_experts.{e}.linear_fc1.weight": fc1,
                        f"{experts}local_experts.{e}.linear_fc2.weight": fc2}  # fmt: skip
            if how["experts"] == "te":
                out |= {f"{experts}linear_fc1.weight{e}": fc1, f"{experts}linear_fc2.weight{e}": fc2}
    if last:
        out["decoder.final_layernorm.weight"] = state["norm.weight"]
        if not config.tie_word_embeddings:
            out["output_layer.weight"] = vocabulary("lm_head.weight")
        elif not first:
            out["output_layer.weight"] = vocabulary("embed_tokens.weight")
    return out


def write(folder, config, state, tp=1, pp=1, vpp=1, ep=1, **how):
    """Writes a checkpoint as Megatron-LM shards it. `how`: fused norms, experts local, grouped or te, extend, etp1."""
    how = {"fused norms": False, "experts": "local"} | how
    depth = config.num_hidden_layers // (pp * vpp)
    args = common_state()
    args["args"].moe_tp_extend_ep = bool(how.get("extend"))
    args["args"].expert_tensor_parallel_size = 1 if how.get("etp1") else None
    for t in range(tp):
        for p in range(pp):
            for e in range(ep):
                if how.get("etp1") and e % tp != t % ep:  # such ranks do not exist
                    continue
                chunks = []
                for v in range(vpp):
                    start = (v * pp + p) * depth
                    ends = (v == p == 0, (v, p) == (vpp - 1, pp - 1))
                    chunks.append(rank_state(state, config, range(start, start + depth), *ends, (t, tp), (e, ep), how))
                name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") + (f"_{e:03d}" if ep > 1 else "")
                target = folder / "iter_0000010" / name
                target.mkdir(parents=True)
                named = {"model": chunks[0]} if vpp == 1 else {f"model{v}": chunk for v, chunk in enumerate(chunks)}
                torch.save(args | named, target / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    return folder


def imported(folder, config) -> dict[str, torch.Tensor]:
    source = case.convert.open_source(folder, config)
    tensors = {name: source.read(name) for name in case.convert.shapes(config)}
    assert all(source.element(name) == tensors[name].element_size() for name in tensors)
    return tensors


CUT = {
    "one rank": ("dense", {}),
    "fused norms": ("dense", {"fused norms": True}),
    "tp2": ("dense", {"tp": 2}),
    "pp2": ("dense", {"pp": 2}),
    "tp2 pp2": ("dense", {"tp": 2, "pp": 2, "fused norms": True}),
    "pp2 vpp2": ("dense", {"pp": 2, "vpp": 2}),
    "tied tp2": ("dense tied", {"tp": 2}),
    "tied tp2 pp2 vpp2": ("dense tied", {"tp": 2, "pp": 2, "vpp": 2}),
    "experts": ("moe", {}),
    "experts tp2": ("moe", {"tp": 2}),
    "experts ep2": ("moe", {"ep": 2}),
    "experts tp2 pp2 vpp2 ep3": ("moe", {"tp": 2, "pp": 2, "vpp": 2, "ep": 3, "fused norms": True}),
    "experts tp2 ep3 extended": ("moe", {"tp": 2, "ep": 3, "extend": True}),
    "experts tp2 ep2 whole": ("moe", {"tp": 2, "ep": 2, "etp1": True}),
    "experts tp2 ep6 whole": ("moe", {"tp": 2, "ep": 6, "etp1": True}),
    "experts tp2 whole, twice": ("moe", {"tp": 2, "etp1": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "experts"),
    [(name, kind) for name in CUT for kind in (("local", "grouped", "te") if "experts" in name else ("local",))],
)
def test_megatron_checkpoint_is_imported_bit_exactly(name, experts, dtype, tmp_path):
    which, how = CUT[name]
    config = case.CONFIGS[which]
    state = {key: tensor.to(dtype) for key, tensor in case.random_state(config).items()}
    tensors = imported(write(tmp_path, config, state, experts=experts, **how), config)
    assert tensors.keys() == state.keys()
    for key, tensor in state.items():
        assert tensors[key].dtype == dtype and torch.equal(tensors[key], tensor), key


# -------------------------------------------------------------------------------- Megatron-LM, by megatron-core's model


@pytest.mark.parametrize(
    "which", [name for name in case.CONFIGS if name != "yarn"]
)  # a Megatron-LM run does not record it
def test_imported_model_computes_what_megatron_cores_own_does(which, tmp_path, monkeypatch):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils

    monkeypatch.setattr(CudaRNGStatesTracker, "fork", lambda *args: contextlib.nullcontext())  # no dropout is drawn
    # megatron-core leaves this name undefined without Transformer Engine
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    c = case.CONFIGS[which]
    moe = dict(
        num_moe_experts=c.num_experts, moe_router_topk=c.num_experts_per_tok, moe_aux_loss_coeff=0.0,
        moe_ffn_hidden_size=c.moe_intermediate_size, moe_router_load_balancing_type="none",
    )  # fmt: skip
    settings = TransformerConfig(
        num_layers=c.num_hidden_layers, hidden_size=c.hidden_size, ffn_hidden_size=c.intermediate_size,
        num_attention_heads=c.num_attention_heads, num_query_groups=c.num_key_value_heads, kv_channels=c.head_dim,
        normalization="RMSNorm", layernorm_epsilon=c.rms_norm_eps, qk_layernorm=True, add_bias_linear=False,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, use_cpu_initialization=True,
        attention_dropout=0.0, hidden_dropout=0.0, transformer_impl="local", bias_activation_fusion=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False, persist_layer_norm=False,
        gradient_accumulation_fusion=False, **moe if c.num_experts else {},
    )  # fmt: skip
    model_parallel_cuda_manual_seed(0)
    spec = get_gpt_layer_local_spec(num_experts=c.num_experts or None, qk_layernorm=True, normalization="RMSNorm")
    reference = GPTModel(
        settings, spec, vocab_size=c.vocab_size + PADDING, max_sequence_length=64, position_embedding_type="rope",
        rotary_base=int(c.rope_theta), share_embeddings_and_output_weights=c.tie_word_embeddings,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    for name, p in reference.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data.copy_(1 + 0.1 * noise if "layernorm" in name else 0.15 * noise)
    target = tmp_path / "release" / "mp_rank_00"
    target.mkdir(parents=True)
    torch.save(common_state() | {"model": reference.state_dict_for_save_checkpoint()}, target / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")

    ours = case.model.build(case.options(), c)[0]
    case.load([ours], imported(tmp_path, c))
    tokens, positions = torch.randint(c.vocab_size, (16,), generator=generator), torch.arange(16)
    with torch.no_grad():
        mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
        want = reference(tokens[None], positions[None], mask)[0, :, : c.vocab_size]
        got = ours(tokens, positions, [0, 16])[0].flatten(0, 1) @ ours.output_weight.t()
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


# --------------------------------------------------------------------------------------------- Megatron-LM, refusals


class Unheard:
    pass


def spoil(folder, change, rank="mp_rank_00"):
    path = folder / "iter_0000010" / rank / "model_optim_rng.pt"
    values = torch.load(path, weights_only=False)
    change(values)
    torch.save(values, path)


LAYER = "decoder.layers.1."
REFUSED = {
    "missing": (
        lambda v: v["model"].pop(LAYER + "input_layernorm.weight"),
        f"1 missing: {LAYER}input_layernorm.weight",
    ),
    "extra": (lambda v: v["model"].update({LAYER + "bias": torch.ones(1)}), f"not of this model: {LAYER}bias"),
    "misshaped": (
        lambda v: v["model"].update({LAYER + "mlp.linear_fc2.weight": torch.ones(40, 8)}),
        f"{LAYER}mlp.linear_fc2.weight is [40, 8], expected [40, 56]",
    ),
    "another's object": (lambda v: setattr(v["args"], "timer", Unheard()), "Unsupported global: GLOBAL"),
    "another's rotary base": (lambda v: setattr(v["args"], "rotary_base", 1000000), "rotary_base=1000000; expected"),
    "no model": (lambda v: v.pop("model"), "without `model`"),
    "stages in another order": (lambda v: v["model"].pop("decoder.final_layernorm.weight"), "no final norm"),
    "few tokens": (
        lambda v: v["model"].update({"output_layer.weight": torch.ones(90, 40)}),
        "output_layer.weight is [90, 40], expected [96, 40]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_checkpoint_that_does_not_fit_is_refused(name, tmp_path):
    change, says = REFUSED[name]
    config = case.CONFIGS["dense"]
    spoil(write(tmp_path, config, case.random_state(config)), change)
    with pytest.raises(ValueError) as error:
        case.convert.open_source(tmp_path, config)
    assert says in str(error.value)


def test_pickle_that_runs_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    config = case.CONFIGS["dense"]
    path = write(tmp_path, config, case.random_state(config)) / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    torch.save({"args": Evil(), "model": {}}, path)
    with pytest.raises(ValueError, match=r"GLOBAL posix\.mkdir; .*strip it where you trust it"):
        case.convert.open_source(tmp_path, config)
    assert not (tmp_path / "run").exists()


def test_protocol_4_and_a_lost_rank_are_refused(tmp_path):
    config = case.CONFIGS["dense"]
    write(tmp_path, config, case.random_state(config), tp=2, pp=2)
    rank = tmp_path / "iter_0000010" / "mp_rank_01_001"
    values = torch.load(rank / "model_optim_rng.pt", weights_only=False)
    torch.save(values, rank / "model_optim_rng.pt", pickle_protocol=4)
    with pytest.raises(ValueError, match="operand 149.*protocol 2"):
        case.convert.open_source(tmp_path, config)
    (rank / "model_optim_rng.pt").unlink()
    with pytest.raises(ValueError, match=r"lacks the files of .*\[\(1, 1\)\]"):
        case.convert.open_source(tmp_path, config)


def test_grouped_experts_that_do_not_say_how_they_are_shared_are_refused(tmp_path):
    config = case.CONFIGS["moe"]
    write(tmp_path, config, case.random_state(config), tp=2, experts="grouped")
    for rank in ("mp_rank_00", "mp_rank_01"):
        spoil(tmp_path, lambda values: values.pop("args"), rank)
    with pytest.raises(ValueError, match="fix: keep `args`"):
        case.convert.open_source(tmp_path, config)


def test_tied_embeddings_that_differ_are_refused(tmp_path):
    config = case.CONFIGS["dense tied"]
    write(tmp_path, config, case.random_state(config), pp=2)
    spoil(tmp_path, lambda values: values["model"]["output_layer.weight"].add_(1), "mp_rank_00_001")
    with pytest.raises(ValueError, match="differs from the embedding"):
        case.convert.open_source(tmp_path, config)


@pytest.mark.L4
def test_the_job_imports_a_megatron_checkpoint(tmp_path):
    config = case.config.SIZES["tiny"]
    state = case.random_state(config)
    folder = write(tmp_path / "megatron", config, state, tp=2, pp=2)
    with pytest.raises(ValueError, match="fix: --size"):
        case.jobs.parse("convert", ["--weights", str(folder), "--to", "released", "--out", str(tmp_path / "a")])
    with pytest.raises(ValueError, match="fix: convert.sh"):
        case.jobs.parse("infer", ["--weights", str(folder), "--size", "tiny"])
    run_ranks(1, job, "--weights", folder, "--size", "tiny", "--to", "released", "--out", tmp_path / "a")
    released = load_file(tmp_path / "a" / "model.safetensors")
    assert {case.convert.released(name) for name in state} == released.keys()
    assert all(torch.equal(released[case.convert.released(name)], tensor) for name, tensor in state.items())


# ------------------------------------------------------------------------------------------------------------ adapters

TARGETS = ["q_proj", "v_proj", "o_proj", "mlp.down_proj", "lm_head"]


def adapter_and_base(folder, which: str, dtype=torch.float32, **options):
    """Writes a released folder and a PEFT adapter for it. Returns (config, base tensors, peft's merged model)."""
    import peft

    config, targets = case.CONFIGS[which], [t for t in TARGETS if which == "dense" or "proj" in t and "mlp" not in t]
    state = {}
    for name, tensor in case.random_state(config).items():
        pieces = case.convert.expert_pieces(config).get(name, {})
        state |= {k: tensor[where].t() for k, where in pieces.items()} or {case.convert.released(name): tensor}
    (folder / "base").mkdir(parents=True)
    state = {k: v.to(dtype).contiguous() for k, v in state.items()}
    save_file(state, folder / "base" / "model.safetensors", {"format": "pt"})
    (folder / "base" / "config.json").write_text(json.dumps(config.to_released()))
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    values = {"r": 3, "lora_alpha": 5, "target_modules": targets, "task_type": "CAUSAL_LM"} | options
    model = peft.get_peft_model(model, peft.LoraConfig(**values))
    generator = torch.Generator().manual_seed(6)
    for p in model.parameters():
        if p.requires_grad:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return config, state, model.merge_and_unload()


def merged(folder, config) -> dict[str, torch.Tensor]:
    """Returns what convert.sh --adapter --to released writes."""
    source = case.convert.open_source(folder / "base", config)
    source = release.merge_adapter(source, case.convert.adapter(folder / "adapter", config))
    case.convert.write_released(folder / "out", config, source, None)
    return load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("which", case.CONFIGS)
def test_merged_adapter_equals_peft(which, rslora, tmp_path):
    config, before, reference = adapter_and_base(tmp_path, which, use_rslora=rslora)
    got = merged(tmp_path, config)
    reference.save_pretrained(tmp_path / "theirs")
    want = load_file(tmp_path / "theirs" / "model.safetensors")
    assert got.keys() == before.keys() >= want.keys()
    for key, tensor in want.items():
        assert (got[key] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), key
    changed = {key for key in before if not torch.equal(got[key], before[key])}
    assert len(changed) == config.num_hidden_layers * (4 if which == "dense" else 3) + (which == "dense")


@pytest.mark.parametrize(("which", "linears"), [("dense", 7), ("moe", 4)])
def test_an_adapter_of_unsloths_with_ranks_and_alphas_of_its_own_is_merged_as_peft_merges_it(which, linears, tmp_path):
    options = {
        "target_modules": r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj"
        r"|up_proj|down_proj)))",
        "rank_pattern": {r"layers.\d+.self_attn.q_proj": 2, "layers.3.self_attn.o_proj": 6},
        "alpha_pattern": {"v_proj": 9, "layers.1.self_attn.q_proj": 0.5},
    }
    config, before, reference = adapter_and_base(tmp_path, which, **options)
    got, want = merged(tmp_path, config), {}
    reference.save_pretrained(tmp_path / "theirs")
    want = load_file(tmp_path / "theirs" / "model.safetensors")
    assert not [k for k, t in want.items() if (got[k] - t).abs().max() > 1e-6 * t.abs().max()]
    assert sum(not torch.equal(got[key], before[key]) for key in before) == config.num_hidden_layers * linears


def test_merged_adapter_keeps_the_dtype_and_is_rounded_once(tmp_path):
    config, before, _ = adapter_and_base(tmp_path, "dense", torch.bfloat16)
    got, lora = merged(tmp_path, config), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    for key in ("lm_head", "model.layers.2.self_attn.q_proj"):
        a, b = (lora[f"base_model.model.{key}.lora_{part}.weight"].double() for part in "AB")
        exact = (before[f"{key}.weight"].double() + 5 / 3 * (b @ a)).bfloat16()
        assert (got[f"{key}.weight"] != exact).float().mean() < 1e-3


def other_size(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {key: torch.zeros(3, 64)}, folder / "adapter_model.safetensors")


def edited(**facts):
    def edit(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | facts))

    return edit


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_size, "layers.1.self_attn.q_proj.lora_A.weight is [3, 64], expected [3, 40]"),
        (edited(use_dora=True), "not a plain LoRA: it has {'use_dora': True}"),
        (edited(target_modules=["q_proj"]), "not of its target_modules: base_model.model.lm_head, base_model"),
        (edited(modules_to_save=["embed_tokens"]), "not a plain LoRA: it has {'modules_to_save': ['embed_tokens']}"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    ],
    ids=["of another size", "dora", "tensors beyond its targets", "whole modules", "no adapter"],
)
def test_adapter_that_does_not_fit_is_refused(change, says, tmp_path):
    config, _, _ = adapter_and_base(tmp_path, "dense")
    change(tmp_path / "adapter")
    with pytest.raises(ValueError) as error:
        case.convert.adapter(tmp_path / "adapter", config)
    assert says in str(error.value)


def test_one_factor_of_one_expert_is_refused(tmp_path):
    config, _, _ = adapter_and_base(tmp_path, "moe")
    folder = tmp_path / "adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight"
    save_file(tensors | {key: torch.zeros(3, 40)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: B of .*experts\.3\.up_proj"):
        case.convert.adapter(folder, config)


def test_folder_without_an_adapter_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ValueError, match="fix: --adapter"):
        case.jobs.parse("convert", ["--adapter", str(tmp_path), "--to", "released", "--out", str(tmp_path / "out")])


# ------------------------------------------------------------------------------------------- releases unlike their size

CODER = {  # Qwen3-Coder-30B-A3B-Instruct: all layers have experts, so none has its intermediate_size
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5472,
    "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "qkv_bias": False, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 10000000, "shared_expert_intermediate_size": 0, "tie_word_embeddings": False,
    "use_qk_norm": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def a_release(folder, size: str, **facts):
    """Writes drawn weights in the released layout: of `size`, but with 4 layers and with `facts` replaced."""
    config = dataclasses.replace(case.config.SIZES[size], num_hidden_layers=4, **facts)
    state = case.random_state(config)
    case.convert.write_released(folder, config, case.source(state), None)
    return config


def options(folder, script="infer", *more):
    argv = {"infer": ["--prompt", "a"], "convert": ["--to", "released", "--out", str(folder / "new")]}
    tokenizer = ["--tokenizer", str(case.jobs.DEMO_TOKENIZER)] if script == "infer" else []
    return case.jobs.parse(script, ["--weights", str(folder), *tokenizer, *argv.get(script, []), *map(str, more)])


def test_a_width_that_no_layer_uses_does_not_make_another_size(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CODER))
    assert case.config.size_of(tmp_path) == "30B-A3B"
    config = case.config.Qwen3Config.from_folder(tmp_path)
    o = argparse.Namespace(
        size="30B-A3B", weights=tmp_path, yarn=None, layers=None, vocabulary=None, from_scratch=False, job="sft"
    )
    assert case.config.model_config(o) == config and config.parameters == case.config.SIZES["30B-A3B"].parameters
    written = config.to_released()
    assert {k: written[k] for k in CODER if k in written} == {k: v for k, v in CODER.items() if k in written}
    for facts, says in (
        ({"moe_intermediate_size": 5472}, "moe_intermediate_size 5472 != 768"),
        ({"use_qk_norm": False}, "use_qk_norm=False"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(CODER | facts))
        with pytest.raises(ValueError, match=says):
            case.config.size_of(tmp_path)


@pytest.mark.parametrize(("size", "facts"), [("tiny-moe", {"intermediate_size": 999}), ("tiny", {"vocab_size": 2053})])
def test_a_release_unlike_its_size_where_no_layer_differs_loads_and_is_written_back_so(
    size, facts, tmp_path, capsys, monkeypatch
):
    config, warning = (
        a_release(tmp_path / "r", size, **facts),
        "a vocabulary of 2,053 tokens; the published tiny has 2,048",
    )
    o = options(tmp_path / "r")
    assert o.size == size and case.config.model_config(o) == config
    assert warning not in capsys.readouterr().err  # only the launcher prints it, not the ranks it starts
    monkeypatch.delenv("RANK")
    options(tmp_path / "r")
    assert capsys.readouterr().err.count(warning) == (size == "tiny")
    assert options(tmp_path / "r", "infer", "--size", size).size == size
    case.convert.write_released(tmp_path / "w", config, case.convert.open_source(tmp_path / "r", config), None)
    for key, value in facts.items():
        assert json.loads((tmp_path / "w" / "config.json").read_text())[key] == value
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "rw")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_by_every_job_that_reads_tokens(tmp_path):
    a_release(tmp_path / "r", "tiny", vocab_size=2040)
    demo = ["--tokenizer", case.jobs.DEMO_TOKENIZER]
    for script, more in (("infer", []), ("train", ["--job", "sft", *demo]), ("evaluate", ["--tasks", "gsm8k", *demo])):
        with pytest.raises(ValueError, match="token ids up to 2047, .* a vocabulary of 2040; .* fix: --tokenizer"):
            options(tmp_path / "r", script, *more)
    options(tmp_path / "r", "convert")


def test_a_checkpoint_in_shards_is_compared_with_the_size_asked_for(tmp_path):
    step = tmp_path / "step-000002"
    step.mkdir()
    (step / "manifest.json").write_text("{}")
    values = dataclasses.asdict(case.config.SIZES["tiny-moe"]) | {"vocab_size": 2053, "intermediate_size": 7}
    (step / "state.json").write_text(json.dumps({"model": values}))
    assert options(step).size == "tiny-moe" and case.config.model_config(options(step)).vocab_size == 2053
    with pytest.raises(ValueError, match="is not of size tiny: .*num_experts 8 != 0"):
        options(step, "infer", "--size", "tiny")
