"""Wan2.1 against independent oracles: diffusers' transformer and pipeline, the published counts and golden values."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
import wan_case as case
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from ranks import run_ranks
from torch.utils.flop_counter import FlopCounterMode

from common import checkpoint, device, parallel, release, weights
from common import train as loop

pytestmark = [pytest.mark.L2, pytest.mark.usefixtures("one_rank")]

TOLERANCE = 1e-5  # relative to the largest entry
PUBLISHED = {
    "1.3B": (1_418_996_800, 825),
    "14B": (14_288_491_584, 1095),
    "14B-i2v": (16_394_878_784, 1303),
    "14B-flf2v": (16_395_536_704, 1304),
}


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return (got - want).abs().max() <= TOLERANCE * want.abs().max()


def oracle(config=case.CONFIG) -> WanTransformer3DModel:
    values = {k: v for k, v in config.to_diffusers().items() if not k.startswith("_")}
    return WanTransformer3DModel(**values | {"patch_size": tuple(values["patch_size"])})


def ours(state: dict[str, torch.Tensor], config=case.CONFIG, **layout):
    chunk = case.model.build(case.options(**layout), config)[0]
    case.load([chunk], state)
    return chunk


# ------------------------------------------------------------------------------------------------- full-size identity


@pytest.mark.L1
@pytest.mark.parametrize("size", PUBLISHED)
def test_published_size_has_exactly_the_released_parameters_and_keys(size):
    config = case.config.SIZES[size]
    with torch.device("meta"):
        reference = oracle(config)
    model = case.model.build(case.options(), config, torch.device("meta"))[0]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    count, tensors = PUBLISHED[size]
    assert sum(math.prod(s) for s in shapes.values()) == count == config.parameters
    assert shapes == case.convert.shapes(config) and len(shapes) == tensors
    released = {case.convert.to_diffusers(name): shape for name, shape in shapes.items()}
    assert released == {name: tuple(p.shape) for name, p in reference.state_dict().items()}


@pytest.mark.L1
@pytest.mark.parametrize("size", PUBLISHED)
def test_flops_formula_equals_a_counted_forward_of_the_reference(size):
    config, grid = case.config.SIZES[size], (21, 60, 104)  # 81x480x832
    with torch.device("meta"), FlopCounterMode(display=False) as counted, torch.no_grad():
        latents, text = torch.empty(1, config.in_dim, *grid), torch.empty(1, config.text_len, config.text_dim)
        image = torch.empty(1 + config.first_last, config.image_tokens, config.image_dim) if config.image_dim else None
        oracle(config)(latents, torch.ones(1), text, image)
    assert counted.get_total_flops() == config.flops(grid)


@pytest.mark.parametrize("size", ["14B", "14B-i2v", "14B-flf2v"])
def test_config_survives_both_released_formats(size, tmp_path):
    config = case.config.SIZES[size]
    for name, values in (("diffusers", config.to_diffusers()), ("original", config.to_original())):
        folder = tmp_path / name
        config_folder = folder / "transformer" if name == "diffusers" else folder
        config_folder.mkdir(parents=True)
        (config_folder / "config.json").write_text(json.dumps(values))
        assert case.config.WanConfig.from_folder(folder) == config


# ----------------------------------------------------------------------------------------------------- oracle parity


# In image-to-video, diffusers treats the last 512 rows of the context as the text.
LONG = {"text_len": 512}
CONFIGS = {
    "t2v": case.CONFIG,
    "i2v": dataclasses.replace(case.I2V, **LONG),
    "flf2v": dataclasses.replace(case.FLF2V, **LONG),
}


@pytest.mark.parametrize(
    ("task", "recompute"),
    [("t2v", "none"), ("t2v", "selective"), ("t2v", "full"), ("i2v", "none"), ("i2v", "full"), ("flf2v", "selective")],
)
def test_forward_and_gradients_equal_diffusers(task, recompute):
    config = CONFIGS[task]
    state = case.random_state(config=config)
    model, reference = ours(state, config, recompute=recompute), oracle(config)
    reference.load_state_dict({case.convert.to_diffusers(k): v for k, v in state.items()}, strict=True)
    batches = [case.sample_batch(i, config=config) for i in range(3)]
    batch = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
    x, t, text, y, image = (batch.get(k) for k in ("x", "t", "text", "y", "image"))
    pictures = (
        image.view(-1, config.image_tokens, config.image_dim) if config.first_last else image
    )  # theirs: [2B, I, …]
    want = reference(x if y is None else torch.cat((x, y), 1), t, text, pictures).sample
    got = case.model.unpatchify(model(x, t, text, y, image), x.shape[2:], config.patch_size)
    assert close(got, want)
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (want * direction).sum().backward()
    (got * direction).sum().backward()
    gradients = {case.convert.to_diffusers(name): p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == dict(reference.named_parameters()).keys()
    unequal = [name for name, p in reference.named_parameters() if not close(gradients[name], p.grad)]
    assert not unequal


def test_a_swapped_query_and_key_would_be_noticed():
    """The parity test detects errors: exchanging two weights of equal shape moves the output beyond the tolerance."""
    state = case.random_state()
    swapped = dict(state)
    swapped["blocks.1.norm3.weight"], swapped["blocks.2.norm3.weight"] = (
        state["blocks.2.norm3.weight"],
        state["blocks.1.norm3.weight"],
    )
    batch = case.sample_batch(0)
    inputs = batch["x"], batch["t"], batch["text"]
    assert not close(ours(swapped)(*inputs), ours(state)(*inputs))


def test_bf16_forward_stays_near_fp32():
    state = case.random_state()
    batch = case.sample_batch(0)
    inputs = batch["x"], batch["t"], batch["text"]
    want, got = ours(state)(*inputs), ours(state, precision="bf16")(*inputs)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.03 * want.norm()


def test_patches_survive_a_round_trip():
    x = torch.randn(2, 16, *case.GRID)
    tokens = case.model.velocity_tokens(x, case.CONFIG.patch_size)
    assert torch.equal(case.model.unpatchify(tokens, case.GRID, case.CONFIG.patch_size), x)


@pytest.mark.parametrize("sampler", ["unipc", "dpm", "euler"])
def test_sampling_equals_the_diffusers_pipeline(sampler):
    folder = case.jobs.DEMO_WEIGHTS
    from importlib import import_module

    infer, encoders = (import_module(f"zoo.{case.RECIPE}.{name}") for name in ("infer", "encoders"))
    o = case.jobs.parse("train", ["--job", "finetune", "--weights", str(folder)])
    config = case.config.model_config(o)
    chunk = case.model.build(o, config)[0]
    case.convert.fill([chunk], o, config, case.model.draw)
    encoder = encoders.TextEncoder(folder, device.current(), torch.float32, config.text_len)
    prompt, grid = "a handwritten three moves to the left", (4, 6, 6)
    got = infer.sample(
        [chunk], o, config, encoder.encode([prompt]), encoder.encode([""])[0], grid, [5],
        sampler=sampler, shift=5.0, steps=6, cfg=4.0,
    )  # fmt: skip
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    if sampler == "dpm":
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    if sampler == "euler":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipeline.set_progress_bar_config(disable=True)
    want = pipeline(
        prompt=prompt, negative_prompt="", height=48, width=48, num_frames=13, num_inference_steps=6,
        guidance_scale=4.0, max_sequence_length=config.text_len, output_type="latent",
        latents=torch.randn(16, *grid, generator=torch.Generator().manual_seed(5))[None],
    ).frames  # fmt: skip
    assert close(got, want)


# ---------------------------------------------------------------------------------------------------------- objective


@pytest.mark.parametrize(
    ("kind", "min_lr", "decay"),  # decay: by progress from the end of warm-up to the step after the last
    [
        ("constant", None, lambda p: 1.0),
        ("cosine", None, lambda p: (1 + math.cos(math.pi * p)) / 2),
        ("cosine", 1e-4, lambda p: 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2),
        ("linear", None, lambda p: 1 - p),
        ("WSD", None, lambda p: min(1.0, (1 - p) * 17 / 2)),  # over the last two of 20 steps
    ],
)
def test_learning_rate_warms_up_and_decays_to_where_it_should(kind, min_lr, decay):
    o = case.options(lr=1e-3, lr_schedule=kind, min_lr=min_lr, warmup=4, steps=20)
    chunks = parallel.wrap(case.model.build(o, case.CONFIG), o, case.model.WanBlock)
    optimizer = loop.build_optimizer(o, chunks)
    scheduler = loop.build_scheduler(o, optimizer)
    rates = []
    for _ in range(o.steps):
        scheduler.step(1)
        rates.append(optimizer.param_groups[0]["lr"] / o.lr)
    want = [0.25, 0.5, 0.75, *(decay((step - 4) / 17) for step in range(4, 21))]
    assert rates == pytest.approx(want, abs=1e-6)


def test_timestep_schedule_and_weights_equal_the_published_values():
    index = torch.tensor([0, 100, 500, 750, 999])
    sigma = [1.0, 0.978261, 0.833333, 0.625, 0.004980]
    weight = [0.0, 0.139075, 1.024862, 1.914043, 0.031879]
    assert case.train.sigma(index, 5.0).tolist() == pytest.approx(sigma, abs=1e-6)
    assert case.train.bell_weights(5.0)[index].tolist() == pytest.approx(weight, abs=1e-6)
    assert case.train.bell_weights(5.0).mean().item() == pytest.approx(1.0, abs=1e-6)


def noised(o, slots, step=3, batch=None):
    latents = torch.ones(len(slots), 16, *case.GRID) if batch is None else batch
    text = torch.ones(len(slots), 4, case.CONFIG.text_dim)
    return case.train.FlowMatching(o).noised(latents, text, torch.zeros(4, case.CONFIG.text_dim), step, slots)


def test_target_and_input_follow_the_flow():
    latents = torch.randn(3, 16, *case.GRID)
    out = noised(case.options(), range(3), batch=latents)
    s = (out["t"] / 1000).view(-1, 1, 1, 1, 1)
    noise = out["target"] + latents
    assert torch.allclose(out["x"], (1 - s) * latents + s * noise, atol=1e-6)
    assert noise.std() == pytest.approx(1.0, abs=0.1)


def test_every_sample_has_its_own_timestep_unless_asked():
    assert len(set(noised(case.options(), range(8))["t"].tolist())) > 4
    assert len(set(noised(case.options(timesteps="per-batch"), range(8))["t"].tolist())) == 1


def test_noise_depends_on_the_place_in_the_global_batch_not_on_the_layout():
    whole, part = noised(case.options(), range(6)), noised(case.options(), range(3, 6))
    assert torch.equal(whole["x"][3:], part["x"]) and torch.equal(whole["t"][3:], part["t"])
    assert not torch.equal(whole["x"], noised(case.options(), range(6), step=4)["x"])


def test_captions_are_dropped_at_the_stated_rate():
    o = case.options(caption_dropout=0.3)
    dropped = int((noised(o, range(2000))["text"] == 0).all(2).all(1).sum())
    assert dropped / 2000 == pytest.approx(0.3, abs=0.04)


def test_loss_is_the_weighted_mean_squared_error():
    model, batch = ours(case.random_state()), case.sample_batch(1)
    output, loss_of = case.train.forward_step(iter([batch]), model)
    got, _ = loss_of(output)
    predicted = case.model.unpatchify(output, case.GRID, case.CONFIG.patch_size)
    want = (batch["weight"] * (predicted - batch["target"]).square().mean()).squeeze()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


# --------------------------------------------------------------------------------------------------------- round trips


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Makes a folder as diffusers writes it, with every parameter random."""
    folder = tmp_path_factory.mktemp("released")
    reference = oracle()
    reference.load_state_dict({case.convert.to_diffusers(k): v for k, v in case.random_state(7).items()})
    reference.save_pretrained(folder / "transformer")
    return folder


@pytest.mark.parametrize("to", ["original", "diffusers"])
@pytest.mark.parametrize(
    ("task", "dtype"),
    [("t2v", torch.float32), ("t2v", torch.bfloat16), ("i2v", torch.bfloat16), ("flf2v", torch.float32)],
)
def test_released_layouts_convert_bit_exactly(to, task, dtype, tmp_path):
    reference = oracle(CONFIGS[task]).to(dtype)
    reference.save_pretrained(tmp_path / "a" / "transformer")
    first = tmp_path / "b"
    convert(tmp_path / "a", to, first, CONFIGS[task])
    convert(first, "diffusers", tmp_path / "c", CONFIGS[task])
    reader, back = weights.Reader(), weights.index(tmp_path / "c" / "transformer")
    assert back.keys() == reference.state_dict().keys()
    for key, want in reference.state_dict().items():
        got = reader.read(back[key])
        assert got.dtype == dtype and torch.equal(got, want), key


def convert(source, to, out, config):
    case.convert.write_released(
        out, to, config, release.open_source(*case.convert.find_transformer(source, config)), None
    )


def test_a_norm_that_no_model_applies_is_passed_over_and_nothing_else(tmp_path):
    """Early diffusers exports of image-to-video hold `norm_added_q`."""
    from safetensors.torch import save_file

    where, state = tmp_path / "transformer", case.random_state(config=case.I2V)
    table = case.convert.table(case.I2V, diffusers=True)
    where.mkdir()
    tensors = {case.convert.to_diffusers(name): value for name, value in state.items()}
    for extra, fits in (("blocks.0.attn2.norm_added_q.weight", True), ("blocks.0.attn2.norm_added_v.weight", False)):
        tensors[extra] = torch.ones(case.I2V.dim)
        save_file(tensors, where / "model.safetensors")
        if fits:
            assert table.entries(where).keys() == tensors.keys() - {extra}
        else:
            with pytest.raises(ValueError, match="1 not of this model: blocks.0.attn2.norm_added_v.weight"):
                table.entries(where)


def through_layout(layout: dict, source: str, target: str) -> None:
    """Loads released weights in this layout and saves a sharded checkpoint."""
    from pathlib import Path

    o = case.options(**layout)
    parallel.initialize(o)
    chunks = case.model.build(o, case.CONFIG)
    folder, table = case.convert.find_transformer(Path(source), case.CONFIG)
    release.load(chunks, table.entries(folder), table)
    wrapped = parallel.wrap(chunks, o, case.model.WanBlock)
    checkpoint.save(Path(target), 1, wrapped, None, {}, fsdp=o.fsdp)


@pytest.mark.parametrize(
    "layout",
    [{"tp": 2, "sp": True}, {"pp": 2, "vpp": 2}, {"fsdp": True}, {"cp": 2}, {}],
    ids=lambda layout: " ".join(layout) or "dp",
)
def test_weights_survive_a_layout_bit_exactly(layout, released, tmp_path):
    run_ranks(2, through_layout, layout, str(released), str(tmp_path))
    source, saved = release.open_source(*case.convert.find_transformer(released, case.CONFIG)), tmp_path / "step-000001"
    for name in case.convert.shapes(case.CONFIG):
        assert torch.equal(checkpoint.read_tensor(saved, name), source.read(name)), name


def restored_as(folder, part: str, dtype: torch.dtype, name: str = "") -> None:
    """Stores the matrices of a part of a release in another dtype, in their file or in a file `name` beside it."""
    from safetensors.torch import load_file, save_file

    (file,) = (folder / part).glob("*.safetensors")
    tensors = {key: t.to(dtype) if t.ndim > 1 else t for key, t in load_file(file).items()}
    save_file(tensors, file.with_name(name or file.name), {"format": "pt"})


@pytest.mark.parametrize(
    ("part", "dtype", "name"),
    [("transformer", torch.int8, "I8"), ("text_encoder", torch.float8_e4m3fn, "F8_E4M3"), ("vae", torch.uint8, "U8")],
)
def test_a_part_whose_numbers_need_a_scale_is_refused_by_dtype(part, dtype, name, tmp_path):
    folder = shutil.copytree(case.jobs.DEMO_WEIGHTS, tmp_path / "w")
    restored_as(folder, part, dtype, "weights.fp8.safetensors" if part != "transformer" else "")
    if part != "transformer":  # a variant beside the weights that are loaded does not matter
        case.jobs.parse("infer", ["--weights", str(folder), "--prompt", "a"])
        (folder / part / "weights.fp8.safetensors").unlink()
        restored_as(folder, part, dtype)
    with pytest.raises(
        ValueError, match=rf"{part}.* tensors as {name}, first .* \({name}\); expected F64.* release in bf16"
    ):
        case.jobs.parse("infer", ["--weights", str(folder), "--prompt", "a"])


def test_a_checkpoint_in_shards_is_compared_with_the_size_asked_for(tmp_path):
    tiny = case.config.SIZES["tiny"]
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "state.json").write_text(json.dumps({"model": dataclasses.asdict(tiny)}))
    convert = ["--weights", str(tmp_path), "--to", "original", "--out", str(tmp_path / "o")]
    assert case.jobs.parse("convert", convert).size == "tiny"
    with pytest.raises(ValueError, match="is not of size 1.3B: dim 128 != 1536"):
        case.jobs.parse("convert", [*convert, "--size", "1.3B"])


def weights_from(folder: str) -> dict[str, torch.Tensor]:
    o = case.jobs.parse("train", ["--job", "finetune", "--weights", folder])
    parallel.initialize(o)
    config = case.config.model_config(o)
    chunks = case.model.build(o, config)
    case.convert.fill(chunks, o, config, case.model.draw)
    return {name: p.detach() for name, p in checkpoint.parameters(chunks)}


def test_a_sharded_folder_fills_a_model_as_the_release_does(tmp_path):
    """The frozen parts lie beside it, as training from such a folder requires."""
    released, sharded = case.jobs.DEMO_WEIGHTS, tmp_path / "sharded"
    run_ranks(1, case.job, "convert", "--weights", released, "--to", "sharded", "--out", sharded)
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(released / part, sharded / part)
    want, got = (run_ranks(1, weights_from, str(folder))[0] for folder in (released, sharded))
    assert want.keys() == got.keys() and all(torch.equal(got[name], want[name]) for name in want)
