"""Tests accelerated sampling. Exact accelerations equal plain sampling in one process; the others equal their
definition."""

import contextlib
import dataclasses
import io
import math
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import wan_case as case
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock
from PIL import Image, ImageSequence
from ranks import run_ranks
from torch.utils.flop_counter import FlopCounterMode

from common import cli, parallel, worker
from common.diffusion import caches, sampling, scores, vae_parallel, videos

accelerate, infer = (import_module(f"zoo.{case.RECIPE}.{name}") for name in ("accelerate", "infer"))
pytestmark = [pytest.mark.L3, pytest.mark.usefixtures("one_rank")]

TOLERANCE = 1e-5  # relative to the largest entry
STEPS = 6
WIDE = (3, 16, 64)  # grid of latents, 3*8*32 = 768 tokens: six blocks of 128, two of them in the first frame


def options(grid=case.GRID, **values) -> "case.jobs.InferOptions":
    """Returns checked sampling options of the tiny case. Needs WORLD_SIZE."""
    cls = case.jobs.InferOptions
    fixed = {
        "size": "tiny",
        "precision": "fp32",
        "video": "13x48x48",
        "cfg": 3.0,
        "sample_steps": STEPS,
        "sample_shift": 3.0,
    }
    o = cls(**{f.name: f.default for f in dataclasses.fields(cls)} | fixed | values)
    tokens = case.CONFIG.tokens(grid)
    o = cli.check_layout(o, heads=case.CONFIG.num_heads, layers=case.CONFIG.num_layers, tokens=tokens)
    return case.jobs.check_acceleration(o, case.CONFIG, grid)


def quantize(chunks) -> None:
    caches.quantize([m for chunk in chunks for m in chunk.modules() if isinstance(m, case.model.WanBlock)])


def built(o, state, grid=case.GRID) -> tuple:
    """Returns (chunks, position), built as infer.py builds them."""
    chunks = case.model.build(o, case.CONFIG)
    case.load(chunks, state)
    if o.quantize == "int8":
        quantize(chunks)
    if o.fsdp:
        chunks = parallel.wrap(chunks, o, case.model.WanBlock)
    for block in [m for chunk in chunks for m in chunk.modules() if isinstance(m, case.model.WanBlock) and o.compile]:
        block.compile()
    return chunks, accelerate.apply(chunks, o, case.CONFIG, grid)


def sampled(o, chunks, position, grid=case.GRID, pair=None, video: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(video)
    text = torch.randn(1, case.CONFIG.text_len, case.CONFIG.text_dim, generator=g)
    empty = torch.randn(case.CONFIG.text_len, case.CONFIG.text_dim, generator=torch.Generator().manual_seed(99))
    return infer.sample(
        chunks, o, case.CONFIG, text, empty, grid, [o.seed + video],
        sampler=o.sampler, shift=o.sample_shift, steps=o.sample_steps, cfg=o.cfg, position=position, pair=pair,
    )  # fmt: skip


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


# ------------------------------------------------------------------------------------------------------------- layouts

CACHED = {"cache": "attention", "cache_start": 1, "cache_interval": 2, "cache_end": 4}
BLOCKS = CACHED | {"cache": "blocks", "cache_blocks": "1-3"}
SPARSE = {"sparse": 0.5, "sparse_start": 2}
ULYSSES, RING, SHARDED = {"cp": 2}, {"cp": 2, "ulysses": 1}, {"tp": 2, "sp": True}
LAYOUTS = [  # processes, options of the layout, options of both the layout and the single process
    (2, {"cfg_parallel": True}, {}),
    (4, {"cfg_parallel": True}, {}),  # two videos at a time
    (4, {"cfg_parallel": True} | ULYSSES, {}),
    (4, {"cfg_parallel": True} | RING, CACHED),
    (4, {"cfg_parallel": True} | SHARDED, BLOCKS),
    (4, {"cfg_parallel": True, "pp": 2}, {}),
    (4, {"cfg_parallel": True, "fsdp": True} | ULYSSES, CACHED),
    (2, ULYSSES, SPARSE),
    (2, {"tp": 2}, SPARSE | CACHED),
    (2, {"pp": 2}, BLOCKS),
    (2, SHARDED, {"quantize": "int8"}),
]


def on_ranks(cases: list[tuple[dict, tuple]]) -> list[tuple[int, torch.Tensor]]:
    """Samples every case (options, grid) on this rank. Returns (index of the video that it made, latents) for each."""
    out = []
    for values, grid in cases:
        o = options(grid, **values)
        parallel.initialize(o)
        video_group, pair_group = sampling.video_groups(o)
        chunks, position = built(o, case.random_state(), grid)
        index = parallel.mpu.get_data_parallel_rank() // (o.dp // o.videos_at_once)
        out.append((index, sampled(o, chunks, position, grid, pair_group, index)))
        import_module(f"zoo.{case.RECIPE}.perf_generation").leave_groups(video_group, pair_group)
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_samples_what_one_process_samples(world):
    cases, wants = [], []
    for _, layout, shared in (entry for entry in LAYOUTS if entry[0] == world):
        grid = WIDE if "sparse" in shared else case.GRID
        cases.append((layout | shared, grid))
        if "quantize" in shared:  # each tensor-parallel rank rounds its own slice
            o, state = options(grid), rounded_by_slices(case.random_state(), layout["tp"])
        else:
            o, state = options(grid, **shared), case.random_state()
        chunks, position = built(o, state, grid)
        wants.append([sampled(o, chunks, position, grid, video=i) for i in range(2)])
    results = run_ranks(world, on_ranks, cases)
    for i, (values, _) in enumerate(cases):
        indices = {result[i][0] for result in results}
        assert indices == ({0, 1} if world == 4 and values == {"cfg_parallel": True} else {0}), values
        worst = max(apart(latents, wants[i][index]) for index, latents in (result[i] for result in results))
        assert worst <= TOLERANCE, f"{world} ranks, {values}: {worst:.1e} apart"
    assert apart(wants[0][0], wants[0][1]) > 0.1  # the videos differ, so a swap would show


def test_compiled_blocks_sample_the_same_beside_cache_sparse_attention_and_int8():
    shared, got = CACHED | SPARSE | {"quantize": "int8"}, []
    for compiled in (False, True):
        o = options(WIDE, **shared, compile=compiled)
        got.append(sampled(o, *built(o, case.random_state(), WIDE), WIDE))
    assert apart(*got) <= TOLERANCE and torch._dynamo.utils.counters["stats"]["unique_graphs"]


def rounded_by_slices(state: dict, tp: int) -> dict:
    """Returns the weights after rounding to int8. Each tensor-parallel slice is rounded by itself."""
    out = dict(state)
    for name, weight in state.items():
        if name.endswith(".weight") and ".norm" not in name and name.startswith("blocks."):
            split = 1 if name.endswith((".o.weight", "ffn.2.weight")) else 0
            parts = [caches.Int8Weight(torch.float32) for _ in range(tp)]
            pieces = zip(parts, weight.chunk(tp, split), strict=True)
            out[name] = torch.cat([part(*part.right_inverse(piece)) for part, piece in pieces], split)
    return out


# -------------------------------------------------------------------------------------------------------------- caches


@pytest.fixture(scope="module")
def state():
    return case.random_state()


@pytest.mark.parametrize("kind", ["attention", "blocks"])
def test_cache_of_interval_1_is_bitwise_no_cache(kind, state):
    o = options(cache=kind, cache_start=1, cache_interval=1, cache_end=4)
    assert torch.equal(sampled(o, *built(o, state)), sampled(options(), *built(options(), state)))


@pytest.mark.parametrize("cfg", [3.0, 1.0])
def test_cached_attention_is_that_of_the_step_the_rule_names(cfg, state):
    """The oracle is a plain model whose hooks reuse outputs by the rule. They find the step by counting calls, because
    every step makes the same number."""
    o, plain = options(cfg=cfg, **CACHED), options(cfg=cfg)
    got = sampled(o, *built(o, state))
    chunks, position = built(plain, state)
    branches, outputs = (2 if cfg != 1 else 1), {}

    def replace(block: int):
        calls = []

        def hook(module, inputs, output):
            step, branch = divmod(len(calls), branches)
            calls.append(step)
            source = {2: 1, 4: 3}.get(step, step)  # start 1, interval 2, end 4
            return outputs.setdefault((block, branch, source), output)

        return hook

    for i, block in chunks[0].blocks.items():
        block.self_attn.register_forward_hook(replace(int(i)))
    want = sampled(plain, chunks, position)
    assert torch.equal(got, want)
    assert apart(want, sampled(plain, *built(plain, state))) > 1e-3  # the cache changes the result


@pytest.mark.parametrize("settings", [CACHED, BLOCKS], ids=lambda s: s["cache"])
def test_cache_is_not_fooled_by_further_calls_or_further_videos(settings, state, monkeypatch):
    o = options(**settings)
    chunks, position = built(o, state)
    first, second = (sampled(o, chunks, position, video=i) for i in range(2))
    assert torch.equal(second, sampled(o, *built(o, state), video=1))
    velocity, calls = infer.velocity, []

    def twice(*args, **kwargs):
        calls.append(position.step)
        for _ in range(len(calls) % 3):  # 0, 1 or 2 extra calls, in turn
            velocity(*args, **kwargs)
        return velocity(*args, **kwargs)

    monkeypatch.setattr(infer, "velocity", twice)
    assert torch.equal(first, sampled(o, chunks, position, video=0)) and len(calls) == 2 * STEPS
    stored = [m.reuse.kept for m in chunks[0].modules() if hasattr(m, "reuse")]
    assert len(stored) == (4 if o.cache == "attention" else 1) and not any(stored)  # nothing is held after the last use


def test_stated_size_of_the_cache_is_what_it_holds(state):
    o = options(**CACHED | {"cache_start": 0, "cache_end": STEPS - 1})
    chunks, position = built(o, state)
    sampled(o, chunks, position)
    cached = [v for m in chunks[0].modules() if hasattr(m, "reuse") for _, _, v in m.reuse.kept.values()]
    assert sum(v.nbytes for v in cached) == case.config.cache_gib(o, case.CONFIG, case.CONFIG.tokens(case.GRID)) * 2**30


# ---------------------------------------------------------------------------------------------------- sparse attention


def test_sparse_attention_is_dense_attention_under_its_mask():
    position = caches.SamplerPosition(step=2)
    frames, rows, columns = 3, 8, 32
    L, N, E = frames * rows * columns, 2, 24
    q, k, v = (torch.randn(L, 1, N, E, generator=torch.Generator().manual_seed(i)) for i in range(3))
    sparse = accelerate.SparseAttention(WIDE, case.CONFIG, 0.5, 2, position)
    plain = F.scaled_dot_product_attention
    with FlopCounterMode(display=False) as work:
        got = sparse(q, k, v)
    # The block of each token by its position: frame first, then 8x8 window; a block holds two windows.
    block = torch.tensor([2 * f + x // 16 for f in range(frames) for _ in range(rows) for x in range(columns)])
    pooled = [torch.stack([t[block == b].mean(0) for b in range(6)], 2)[0] for t in (q, k)]  # [N, 6, E]
    scores = pooled[0] @ pooled[1].mT
    block_mask = scores >= scores.topk(3, -1).values[..., -1:]
    block_mask[:, :2], block_mask[:, :, :2] = True, True
    mask = block_mask[:, block][:, :, block]  # [N, L, L]
    heads = [t.permute(1, 2, 0, 3) for t in (q, k, v)]
    want = plain(*heads, attn_mask=mask).permute(2, 0, 1, 3)
    assert apart(got, want) <= TOLERANCE and not mask.all()
    pooling = 2 * N * 6 * 6 * E
    assert work.get_total_flops() == 4 * E * mask.sum() + pooling  # scores that are masked out are not computed
    position.step = 1
    dense = plain(*heads).permute(2, 0, 1, 3)
    assert apart(sparse(q, k, v), dense) <= TOLERANCE and apart(got, dense) > 1e-3
    everything = accelerate.SparseAttention(WIDE, case.CONFIG, 0.0, 0, position)
    assert apart(everything(q, k, v), dense) <= TOLERANCE


@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (10, 13)])
def test_windows_hold_neighbours_and_every_token_once(rows, columns):
    order = caches.window_order(2, rows, columns)
    assert order.sort().values.equal(torch.arange(2 * rows * columns))
    assert (order[: rows * columns] < rows * columns).all()  # frame by frame
    window = order[:64]
    assert {(int(i) // columns, int(i) % columns) for i in window} == {(y, x) for y in range(8) for x in range(8)}


# ---------------------------------------------------------------------------------------------------------------- int8


def test_int8_weights_are_within_half_a_step_and_take_a_quarter_of_the_room(state):
    chunks = case.model.build(options(), case.CONFIG)
    case.load(chunks, state)
    before = {n: p.nbytes for n, p in chunks[0].blocks.named_parameters()}
    quantize(chunks)
    after = sum(p.nbytes for p in chunks[0].blocks.parameters())
    linears = [n for n in before if n.endswith(".weight") and ".norm" not in n]
    assert len(linears) == 10 * case.CONFIG.num_layers
    for name in linears:
        module, weight = chunks[0].blocks.get_submodule(name.removesuffix(".weight")), state[f"blocks.{name}"]
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((module.weight - weight).abs() <= 0.5001 * step).all(), name
        x = torch.randn(5, 1, weight.shape[1])
        assert torch.equal(module(x), F.linear(x, module.weight, module.bias))
    scales = sum(4 * state[f"blocks.{n}"].shape[0] for n in linears)
    weights = sum(before[n] for n in linears)
    assert after == sum(before.values()) - weights + weights // 4 + scales


# ----------------------------------------------------------------------------------------------------------------- VAE

WAN21 = {"base_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}


def small_vae(kind: str) -> AutoencoderKLWan:
    torch.manual_seed(3)
    if kind == "demo":
        return AutoencoderKLWan.from_pretrained(case.jobs.DEMO_WEIGHTS / "vae").eval()
    return AutoencoderKLWan(**WAN21, z_dim=16).eval()


VIDEOS = {kind: [torch.randn(1, 16, 3, rows, 3, generator=torch.Generator().manual_seed(rows)) for rows in (5, 7)]
          for kind in ("released", "demo")}  # fmt: skip


def decoded_in_strips(world: int) -> dict:
    parallel.initialize(options(**{"tp": world}))
    out = {}
    with torch.no_grad():
        for kind, latents in VIDEOS.items():
            decode = vae_parallel.split_decoder(small_vae(kind), WanAttentionBlock, parallel.sample_group())
            out[kind] = [decode(x) for x in latents]
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_decoding_in_strips_equals_decoding_at_once(world):
    """Five and seven rows give strips of unequal height, some of a single row."""
    got = run_ranks(world, decoded_in_strips, world)
    for kind, latents in VIDEOS.items():
        whole = small_vae(kind)
        for i, x in enumerate(latents):
            with torch.no_grad():
                want = whole.decode(x).sample
            assert want.shape == (1, 3, 9, 8 * x.shape[3], 24) and want.std() > 1e-3 and (want.abs() < 1).any()
            assert all(apart(rank[kind][i], want) <= TOLERANCE for rank in got), (kind, x.shape)


# ------------------------------------------------------------------------------------------------- the job as a whole


def generate(argv: list[str]) -> str:
    """Runs the job on this rank and returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        worker.run(f"zoo.{case.RECIPE}", "infer", case.jobs.parse("infer", argv))
    return printed.getvalue()


def test_list_of_prompts_goes_on_where_it_stopped(tmp_path):
    lines = ["a handwritten three moves up", "a handwritten seven moves down", "a handwritten one moves up"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    argv = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out"), "--sample-steps", "2"]
    parallel_flags = ["--cfg-parallel", "--vae-parallel"]
    run_ranks(2, generate, argv + parallel_flags)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert sorted(before) == [f"{i:04d}.{kind}" for i in range(3) for kind in ("gif", "mp4")]
    for i, line in enumerate(lines):
        for suffix in ("gif", "mp4"):
            facts = videos.read_metadata(tmp_path / "out" / f"{i:04d}.{suffix}")
            assert (facts["prompt"], facts["seed"], facts["sample_steps"], facts["cache"]) == (line, i, 2, "none")
    (tmp_path / "out" / "0001.gif").unlink()
    printed = run_ranks(1, generate, argv)[0]  # another layout gives the same pixels
    assert "2 of 3 videos are in" in printed and "0001.gif" in printed and "0002" not in printed
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert {name for name in before if after[name] != before[name]} == {"0001.gif", "0001.mp4"}
    o = case.jobs.parse("infer", [*argv, "--cfg", "2.5"])
    with pytest.raises(ValueError, match=r"0000.mp4 was made in another way \(cfg 4.0, now 2.5\).*fix: --out"):
        case.jobs.prepare(o)


def test_image_to_video_takes_the_accelerations_too(tmp_path):
    plain = ["--task", "i2v", "--sample-steps", "3", "--format", "gif"]
    fast = ["--cfg-parallel", "--vae-parallel", "--cache", "blocks", "--cache-start", "1", "--cache-interval", "1"]
    run_ranks(2, generate, [*plain, "--out", str(tmp_path / "plain")])
    run_ranks(2, generate, [*plain, *fast, "--cache-end", "2", "--out", str(tmp_path / "fast")])
    for i in range(2):
        made, want = (frames_of(tmp_path / name / f"{i:04d}.gif") for name in ("fast", "plain"))
        assert scores.psnr(made, want) > 50 and want.float().std() > 10
        assert videos.read_metadata(tmp_path / "fast" / f"{i:04d}.gif")["image"].endswith(".png")


def frames_of(path) -> torch.Tensor:
    """Reads the frames of a GIF, uint8 [F, H, W]."""
    with Image.open(path) as gif:
        return torch.stack([torch.from_numpy(np.array(frame.convert("L"))) for frame in ImageSequence.Iterator(gif)])


# ------------------------------------------------------------------------------------------------------------- quality


def test_psnr_and_ssim_follow_their_formulas():
    g = torch.Generator().manual_seed(0)
    want = torch.randint(0, 256, (2, 3, 14, 13), generator=g, dtype=torch.uint8)
    got = (want.int() + torch.randint(-20, 21, want.shape, generator=g)).clamp(0, 255).to(torch.uint8)
    error = sum((int(a) - int(b)) ** 2 for a, b in zip(got.flatten(), want.flatten(), strict=True)) / got.numel()
    assert scores.psnr(got, want) == pytest.approx(20 * math.log10(255) - 10 * math.log10(error), rel=1e-9)
    bell = torch.tensor(
        [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)]
    ).double()
    bell /= bell.sum()
    values = []
    for x, y in zip(got.flatten(0, 1).double(), want.flatten(0, 1).double(), strict=True):
        for i in range(4):
            for j in range(3):
                a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                ma, mb = (bell * a).sum(), (bell * b).sum()
                va, vb, vab = (
                    (bell * (a - ma) ** 2).sum(),
                    (bell * (b - mb) ** 2).sum(),
                    (bell * (a - ma) * (b - mb)).sum(),
                )
                c1, c2 = 2.55**2, 7.65**2
                values.append((2 * ma * mb + c1) * (2 * vab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert scores.ssim(got, want) == pytest.approx(float(torch.stack(values).mean()), rel=1e-9)
    assert scores.psnr(want, want) == math.inf and scores.ssim(want, want) == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(ValueError, match="one shape"):
        scores.psnr(got, want[:1])
    with pytest.raises(ValueError, match="11x11"):
        scores.ssim(got[..., :10], want[..., :10])
