"""Qwen3 equals transformers and has the published counts of parameters and tensors."""

import dataclasses
import json
import math
import shutil

import pytest
import qwen_case as case
import torch
from transformers import AutoModelForCausalLM

from common import release, weights
from common.language import decode
from common.language import generate as generation

pytestmark = [pytest.mark.L2, pytest.mark.usefixtures("one_rank")]

TOLERANCE = 1e-5  # relative to the largest entry
PUBLISHED = {  # parameters, tensors on disk
    "0.6B": (596_049_920, 310), "1.7B": (1_720_574_976, 310), "4B": (4_022_468_096, 398), "8B": (8_190_735_360, 399),
    "14B": (14_768_307_200, 443), "32B": (32_762_123_264, 707), "30B-A3B": (30_532_122_624, 18_867),
    "235B-A22B": (235_093_634_560, 36_945),
}  # fmt: skip
ACTIVE = {"30B-A3B": 3_353_032_704, "235B-A22B": 22_190_763_520}


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return (got - want).abs().max() <= TOLERANCE * want.abs().max()


def ours(folder, **layout):
    config = case.config.Qwen3Config.from_folder(folder)
    chunk = case.model.build(case.options(**layout), config)[0]
    table = case.convert.table(config)
    release.load([chunk], table.entries(folder), table)
    return chunk


# ------------------------------------------------------------------------------------------------- full-size identity


@pytest.mark.L1
@pytest.mark.parametrize("size", PUBLISHED)
def test_published_size_has_exactly_the_released_parameters_and_keys(size):
    config = case.config.SIZES[size]
    with torch.device("meta"):
        reference = case.oracle(config)
    model = case.model.build(case.options(), config, torch.device("meta"))[0]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    count, tensors = PUBLISHED[size]
    assert sum(math.prod(s) for s in shapes.values()) == count == config.parameters == reference.num_parameters()
    assert shapes == case.convert.shapes(config)
    released = case.convert.table(config).released_shapes()
    assert len(released) == tensors and sum(math.prod(s) for s in released.values()) == count
    assert config.active_parameters == ACTIVE.get(size, count)


@pytest.mark.L1
@pytest.mark.parametrize("size", ["tiny", "tiny-moe", "0.6B"])
def test_flops_formula_equals_a_counted_forward(size):
    from torch.utils.flop_counter import FlopCounterMode

    config, length = case.config.SIZES[size], 64
    model = case.model.build(case.options(), config, torch.device("cpu" if "tiny" in size else "meta"))[0]
    device = next(model.parameters()).device
    if device.type == "cpu":
        for p in model.parameters():
            p.data.normal_()
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        tokens = torch.zeros(length, dtype=torch.int64, device=device)
        hidden, _ = model(tokens, torch.arange(length, device=device), [0, length])
        hidden.flatten(0, 1) @ model.output_weight.t()
    attention = config.num_hidden_layers * 2 * length**2 * config.num_attention_heads * config.head_dim
    # The counter counts the whole square where attention is decomposed (meta), and nothing for the CPU's flash kernel.
    assert counted.get_total_flops() == config.flops(length) + (attention if device.type == "meta" else -attention)


# ------------------------------------------------------------------------------------------------------- oracle parity


def their_loss(theirs, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the loss of transformers. tokens and labels are [B, L]; labels are already shifted."""
    logits = theirs(input_ids=tokens).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("which", case.CONFIGS)
def test_loss_and_gradients_equal_transformers(which, recompute, tmp_path):
    config = case.CONFIGS[which]
    reference, model = case.save_oracle(tmp_path, config), ours(tmp_path, recompute=recompute)
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(config.vocab_size, (3, 16), generator=generator) for _ in range(2))
    want = their_loss(reference, tokens, labels)
    want.backward()
    positions = torch.arange(16).repeat(3)
    weight = torch.full((48,), 1 / 48)
    got, _ = model(tokens.flatten(), positions, [0, 16, 32, 48], 3, labels.flatten(), weight)
    got.backward()
    assert got.item() == pytest.approx(want.item(), rel=TOLERANCE)
    gradients = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        assert close(p.grad, expected(name, gradients, config)), name


def expected(name: str, gradients: dict, config) -> torch.Tensor:
    """Returns transformers' gradient of one of our parameters. transformers stacks its experts in another way."""
    if name.endswith("mlp.gate_up"):
        fused = gradients[f"model.{name.replace('mlp.gate_up', 'mlp.experts.gate_up_proj')}"].grad  # [G, 2F, D]
        return fused.unflatten(1, (2, -1)).permute(0, 3, 1, 2)
    if name.endswith("mlp.down"):
        return gradients[f"model.{name.replace('mlp.down', 'mlp.experts.down_proj')}"].grad.transpose(1, 2)
    return gradients[case.convert.released(name)].grad


def test_documents_of_a_packed_row_do_not_see_each_other(tmp_path):
    config = case.CONFIGS["dense"]
    reference, model = case.save_oracle(tmp_path, config), ours(tmp_path)
    documents = [torch.randint(96, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 1, 10)]
    positions = torch.cat([torch.arange(len(d)) for d in documents])
    hidden, _ = model(torch.cat(documents), positions, [0, 5, 6, 16])
    got = hidden.flatten(0, 1) @ model.output_weight.t()
    want = torch.cat([reference(input_ids=d[None]).logits[0] for d in documents])
    assert close(got, want)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_rotary_table_of_the_released_sizes_is_transformers_to_the_last_bit(factor):
    """At far positions a wrong last bit of a frequency makes a wrong angle."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = dataclasses.replace(case.config.SIZES["8B"], rope_factor=factor)
    positions = torch.cat((torch.arange(100), torch.arange(100, config.positions, 997)))
    reference = Qwen3RotaryEmbedding(case.oracle_config(config))(torch.zeros(1), positions[None])
    for got, want in zip(case.model.rotary_table(positions, config), reference, strict=True):
        assert torch.equal(got.flatten(1), want[0])


def test_experts_and_balancing_loss_are_transformers(tmp_path):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    config = case.CONFIGS["moe"]
    theirs, model = case.save_oracle(tmp_path, config), ours(tmp_path)
    tokens = torch.randint(96, (1, 16), generator=torch.Generator().manual_seed(3))
    want = theirs(input_ids=tokens, output_router_logits=True).router_logits
    _, routing = model(tokens[0], torch.arange(16), [0, 16])
    assert routing.shape == (4, 16, 6)
    for mine, other in zip(routing, want, strict=True):
        probabilities = mine.softmax(-1)
        reference = other if other.min() >= 0 else other.softmax(-1)  # some versions return probabilities
        assert torch.equal(mine.topk(2).indices.sort(-1).values, other.topk(2).indices.sort(-1).values)
        assert close(probabilities, reference)
    got = case.model.load_balancing_loss(routing, 2)
    assert got.item() == pytest.approx(load_balancing_loss_func(tuple(routing), 6, 2).item(), rel=TOLERANCE)


# --------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", case.CONFIGS)
def test_release_survives_loading_and_writing_bit_exactly(which, dtype, tmp_path):
    config = case.CONFIGS[which]
    reference = case.save_oracle(tmp_path / "a", config).to(dtype)
    reference.save_pretrained(tmp_path / "a")
    assert case.config.Qwen3Config.from_folder(tmp_path / "a") == config
    precision = "fp32" if dtype == torch.float32 else "bf16"
    parameters = dict(ours(tmp_path / "a", precision=precision).named_parameters())
    state = {name: p.detach() for name, p in parameters.items()}
    case.convert.write_released(tmp_path / "b", config, case.source(state), None)
    first, second = weights.index(tmp_path / "a"), weights.index(tmp_path / "b")
    assert {k: e.shape for k, e in second.items()} == case.convert.table(config).released_shapes()
    reader = weights.Reader()
    for key, entry in second.items():
        assert torch.equal(reader.read(entry), reader.read(first[key])), key
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), reference.parameters(), strict=True))


def test_a_second_copy_of_the_tied_embedding_is_taken_if_it_is_one(tmp_path):
    from safetensors.torch import load_file, save_file

    case.save_oracle(tmp_path, case.CONFIGS["dense tied"])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    assert ours(tmp_path).output_weight.shape == (96, 40)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        ours(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "expected qwen3"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "only does rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "only does rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}}, "and the usual rest"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}}, "and the usual rest"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "and the usual rest"),
        ({"attention_bias": True}, "only does False"),
        ({"hidden_act": "gelu"}, "only does 'silu'"),
        ({"head_dim": None}, "lacks head_dim"),
    ],
)
def test_a_config_of_another_model_is_refused(change, message, tmp_path):
    values = case.CONFIGS["dense"].to_released() | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        case.config.Qwen3Config.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "pretrained", "positions"),
    [
        ({"max_position_embeddings": 32768}, 32768, 32768),  # the base models
        ({"max_position_embeddings": 262144, "rope_theta": 5e6}, 262144, 262144),  # the 2507 releases
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            32768,
            131072,
        ),
    ],
)
def test_a_release_has_its_own_positions(change, pretrained, positions, tmp_path, monkeypatch):
    """Such a release still counts as its size. Named layouts are for training and do not apply to generation."""
    monkeypatch.setattr(release.Table, "entries", lambda table, folder: {})
    monkeypatch.setenv("WORLD_SIZE", "2")
    shutil.copy(case.jobs.DEMO_TOKENIZER / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(case.config.SIZES["8B"].to_released() | change))
    o = case.jobs.parse("infer", ["--weights", str(tmp_path), "--prompt", "?", "--pp", "2"])
    assert (o.size, o.tp, o.sp, o.pp) == ("8B", 1, False, 2)
    config = case.config.model_config(o)
    assert (config.original_max_position_embeddings, config.positions) == (pretrained, positions)
    assert config.rope_theta == change.get("rope_theta", 1e6)
    longer = case.config.model_config(dataclasses.replace(o, yarn=8.0))
    assert (longer.rope_factor, longer.positions) == (8, 8 * pretrained)


# ---------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("which", case.CONFIGS)
def test_greedy_generation_equals_transformers_token_for_token(which, tmp_path):
    config = case.CONFIGS[which]
    reference, model = case.save_oracle(tmp_path, config), ours(tmp_path)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(96, (n,), generator=generator).tolist() for n in (7, 3, 7, 1)]
    o = infer_options(max_new_tokens=12, batch=2)
    got = generation.generate(model, prompts, o, ends=set())
    for prompt, answer in zip(prompts, got, strict=True):
        want = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer == want[0, len(prompt) :].tolist()


def infer_options(**values):
    cls = case.jobs.InferOptions
    return cls(**{f.name: f.default for f in dataclasses.fields(cls)} | values)


def test_generation_stops_at_an_end_token_which_is_left_out(tmp_path):
    case.save_oracle(tmp_path, case.CONFIGS["dense"])
    model, o = ours(tmp_path), infer_options(max_new_tokens=10)
    whole = generation.generate(model, [[1, 2, 3]], o, ends=set())[0]
    stop = whole[4]
    shown = []
    assert generation.generate(model, [[1, 2, 3]], o, {stop}, shown.append)[0] == whole[: whole.index(stop)] == shown


def test_draws_follow_temperature_top_p_and_top_k():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).log_softmax(-1)
    generator = torch.Generator().manual_seed(0)

    def shares(**values):
        drawn = decode.choose(logits.expand(20000, 4), infer_options(**values), [generator] * 20000)
        return torch.bincount(drawn, minlength=4) / 20000

    p = logits.exp()[0]
    assert torch.allclose(shares(temperature=1.0), p, atol=0.015)
    assert torch.allclose(shares(temperature=2.0), (logits[0] / 2).softmax(-1), atol=0.015)
    assert torch.allclose(shares(temperature=1.0, top_k=2), torch.tensor([*(p[:2] / p[:2].sum()), 0, 0]), atol=0.015)
    assert torch.allclose(shares(temperature=1.0, top_p=0.7), torch.tensor([*(p[:2] / p[:2].sum()), 0, 0]), atol=0.015)
    assert shares(temperature=0)[0] == 1


def test_what_is_drawn_for_a_prompt_does_not_depend_on_its_neighbours(tmp_path):
    case.save_oracle(tmp_path, case.CONFIGS["dense"])
    model, generator = ours(tmp_path), torch.Generator().manual_seed(5)
    prompts = [torch.randint(96, (n,), generator=generator).tolist() for n in (7, 3, 5, 7, 1)]
    prompts.append(prompts[0])  # the same prompt again gets another answer
    o = infer_options(max_new_tokens=12, temperature=1.0)
    alone = generation.generate(model, prompts, dataclasses.replace(o, batch=1), ends=set())
    for batch in (2, 6):
        assert generation.generate(model, prompts, dataclasses.replace(o, batch=batch), ends=set()) == alone
    assert generation.generate(model, prompts[:2][::-1], o, ends=set()) == alone[:2][::-1]
    assert alone[5] != alone[0] and generation.generate(model, prompts[:1], infer_options(**vars(o) | {"seed": 1}),
                                                        ends=set()) != alone[:1]  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_finite_give_an_error_and_no_empty_answer(temperature, tmp_path):
    case.save_oracle(tmp_path, case.CONFIGS["dense"])
    model = ours(tmp_path)
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
    o = infer_options(max_new_tokens=5, temperature=temperature)
    with pytest.raises(ValueError, match="logits are not finite.*fix: --weights"):
        generation.generate(model, [[1, 2, 3], [4, 5]], o, ends={0})
    with pytest.raises(ValueError, match="logits are not finite.*fix: --weights"):
        generation.score(model, [([1, 2, 3], [[4]])], 64)


def test_trigram_baseline_is_a_distribution(tmp_path):
    """The probabilities of all continuations of a history of a tiny corpus sum to 1."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from common.language.demo import trigram

    def write(prefix, documents):
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for document in documents:
            builder.add_item(torch.tensor(document))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")

    write(tmp_path / "train", [[0, 1, 2, 0, 1, 3], [1, 2, 3]])
    total = 0.0
    for token in range(5):
        write(tmp_path / f"v{token}", [[0, 1, token]])
        first = trigram.perplexity(tmp_path / "train", tmp_path / f"v{token}", 5) ** -2  # p(1 | 0) p(token | 0 1)
        write(tmp_path / f"w{token}", [[0, 1]])
        total += first / trigram.perplexity(tmp_path / "train", tmp_path / f"w{token}", 5) ** -1
    assert total == pytest.approx(1.0, rel=1e-9)
