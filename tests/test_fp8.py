"""Releases in fp8 with scales of blocks: read into any layout, refused if they do not fit, written back byte by byte."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import qwen_case as case
import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from common import checkpoint, fp8, parallel, release, weights

pytestmark = pytest.mark.L2

GOLDEN = Path(__file__).parent / "goldens" / "deepseek_v3_fp8_blocks.safetensors"
WHOLE = slice(None)
EXPERTS = range(4)
TABLE = release.Table(  # slices of every layout begin and end within blocks
    shapes={
        "embed": (12, 9), "up": (20, 14), "down": (14, 20), "norm": (9,), "gate_up": (4, 14, 2, 10), "out": (4, 10, 14),
    },
    rename="{}.weight".format,
    pieces={
        "gate_up": {f"{g}.{part}.weight": (g, WHOLE, i) for g in EXPERTS for i, part in enumerate(("gate", "up"))},
        "out": {f"{g}.out.weight": (g,) for g in EXPERTS},
    },
    copies={"again.weight": "embed.weight"},
    writes_copies=True,
    fp8=("up.weight", "down.weight", "gate.weight", "out.weight"),
    block=(4, 6),
    stem="model",
)  # fmt: skip
COLUMNS = {"up": 0, "down": 1, "gate_up": 3, "out": 1}  # the dimension that (expert) tensor parallelism cuts


def number(code: int) -> float:
    """Returns the number that a byte of e4m3 stands for: 4 bits of exponent with bias 7, 3 of mantissa."""
    exponent, mantissa = code >> 3 & 15, code & 7
    size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -size if code & 128 else size


def reference(stored: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Returns the fp32 weights of fp8 blocks, element by element."""
    out = torch.empty(stored.shape)
    for i, row in enumerate(stored.view(torch.uint8).tolist()):
        for j, code in enumerate(row):
            out[i, j] = torch.tensor(number(code)) * scale[i // block[0], j // block[1]]
    return out


def draw(shape: tuple[int, int], block: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws fp8 weights, of all codes except the two of NaN, and scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 254, shape, generator=generator).to(torch.uint8)
    codes += codes >= 127
    codes.view(-1)[:6] = torch.tensor([0, 128, 1, 129, 126, 254])  # 0, -0, the smallest, the largest
    blocks = [-(-n // size) for n, size in zip(shape, block, strict=True)]
    return codes.view(torch.float8_e4m3fn), 1e-4 * (0.1 + torch.rand(blocks, generator=generator))


def stored_release() -> dict[str, torch.Tensor]:
    """Returns the tensors of a release of the table, by key."""
    tensors, fp8_keys = {}, TABLE.scale_shapes()
    for seed, (key, shape) in enumerate(TABLE.released_shapes().items()):
        if key in fp8_keys:
            tensors[key], tensors[f"{key}_scale_inv"] = draw(shape, TABLE.block, seed)
        else:
            tensors[key] = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    tensors["again.weight"] = tensors["embed.weight"].clone()
    zero = tensors["down.weight_scale_inv"]
    zero[1, 1], tensors["down.weight"].view(torch.uint8)[4:8, 6:12] = 0.5, 0  # a scale that no weight needs
    return tensors


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Writes tensors in two files. Scales may lie in another file than their weights."""
    folder.mkdir(exist_ok=True)
    for part in range(2):
        save_file({k: t.contiguous() for i, (k, t) in enumerate(tensors.items()) if i * 2 // len(tensors) == part},
                  folder / f"model-{part}.safetensors")  # fmt: skip
    return folder


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def whole_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns what the parameters of the whole model must be, fp32 by our names."""
    fp8_keys = TABLE.scale_shapes()
    values = {key: tensors[key].float() for key in TABLE.released_shapes()}
    values |= {key: reference(tensors[key], tensors[f"{key}_scale_inv"], TABLE.block) for key in fp8_keys}
    whole = {}
    for name, shape in TABLE.shapes.items():
        whole[name] = torch.empty(shape)
        for key, index in TABLE.pieces.get(name, {f"{name}.weight": ...}).items():
            whole[name][index] = values[key].t() if name in TABLE.pieces else values[key]
    return whole


# ---------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(("name", "cuts"), [("w0", [(0, 4), (1, 8)]), ("w1", [(0, 3), (1, 257)]), ("w2", [(0, 5)])])
def test_blocks_of_the_official_release_give_its_numbers_and_come_back(name, cuts):
    golden, block = load_file(GOLDEN), (128, 128)
    keys = [key for key in golden if key.endswith(".weight")]
    entry = weights.join_scales(weights.index_file(GOLDEN), keys, block, GOLDEN)[f"{name}.weight"]
    want, reader = golden[f"{name}.dequant_fp32"], weights.Reader()
    assert torch.equal(bits(reader.read(entry)), bits(want))
    assert torch.equal(reader.read(entry, dtype=torch.bfloat16), want.bfloat16())
    for dim, size in cuts:
        for rank in range(size):
            assert torch.equal(reader.read(entry, dim, rank, size), want.chunk(size, dim)[rank])
    stored, scale = fp8.quantise(want.bfloat16(), golden[f"{name}.weight_scale_inv"], block)
    assert torch.equal(bits(stored), bits(golden[f"{name}.weight"]))
    assert torch.equal(scale, golden[f"{name}.weight_scale_inv"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_slice_of_every_code_is_the_number_times_its_scale(dtype, tmp_path):
    block, shape = (5, 7), (24, 20)  # 480 elements, so nearly every code; ragged both ways
    stored, scale = draw(shape, block)
    save_file({"w": stored, "w_scale_inv": scale}, tmp_path / "m.safetensors")
    entry = weights.join_scales(weights.index(tmp_path), ["w"], block, tmp_path)["w"]
    want, reader = reference(stored, scale, block).to(dtype), weights.Reader()
    for dim, size in [(None, 1), (0, 8), (0, 24), (1, 2), (1, 5), (1, 20)]:
        for rank in range(size):
            part = want.chunk(size, dim or 0)[rank]
            assert torch.equal(bits(reader.read(entry, dim, rank, size, dtype)), bits(part)), (dim, size, rank)
            transposed = torch.empty(part.t().shape, dtype=dtype)
            assert torch.equal(reader.read_into(transposed.t(), entry, dim, rank, size), part)
    if dtype != torch.float16:  # in which most of these weights are subnormal
        again = fp8.quantise(want, scale, block)
        assert torch.equal(bits(again[0]), bits(stored)) and torch.equal(again[1], scale)


def test_codes_that_are_no_number_stay_so():
    codes = torch.tensor([[0, 127], [255, 1]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    out = torch.empty(2, 2)
    fp8.dequantise(codes, torch.ones(1, 1), (128, 128), (0, 0), out)
    assert out.isnan().tolist() == [[False, True], [True, False]]


def test_only_a_block_that_its_scale_cannot_represent_gets_a_new_one():
    block = (4, 6)
    stored, scale = draw((10, 14), block)
    weight = reference(stored, scale, block).bfloat16()
    weight[9, 13] = 0.11  # in the ragged corner
    weight[4:8, 6:12] = 0.0
    weight[:4, :6] = -weight[:4, :6]  # representable
    got, scales = fp8.quantise(weight, scale, block)
    want = scale.clone()
    want[2, 2] = weight[8:, 12:].float().abs().max() / 448
    assert torch.equal(scales, want)
    back = reference(got, scales, block)
    assert (back.bfloat16() != weight).nonzero().amin(0).tolist() >= [8, 12]  # all others are as they were
    error = (back - weight.float()).abs()[8:, 12:]
    assert (error <= weight[8:, 12:].float().abs() / 16 + scales[2, 2] * 2**-10).all()  # half a unit of 3 bits
    assert fp8.quantise(torch.zeros(5, 7), None, block)[1].tolist() == [[1, 1], [1, 1]]
    for scale_before in (None, torch.zeros(1, 1)):
        minus_zero, kept = fp8.quantise(torch.tensor([[-0.0, 0.0]]), scale_before, block)
        assert bits(minus_zero).tolist() == [[128, 0]] and kept.item() == (1 if scale_before is None else 0)


# -------------------------------------------------------------------------------------------------------------- layouts


class Toy(torch.nn.Module):
    """The table's parameters, cut by tensor, expert and expert tensor parallelism."""

    def __init__(self, o, dtype: torch.dtype):
        super().__init__()
        for name, shape in TABLE.shapes.items():
            shape = list(shape)
            if name in COLUMNS:
                shape[COLUMNS[name]] //= o.etp if name in TABLE.pieces else o.tp
            if name in TABLE.pieces:
                shape[0] //= o.ep
            parameter = torch.nn.Parameter(torch.full(shape, float("nan"), dtype=dtype))
            if name in COLUMNS:
                set_tensor_model_parallel_attributes(parameter, True, COLUMNS[name], 1)
                parameter.allreduce = name not in TABLE.pieces
            self.register_parameter(name, parameter)


def loaded(layout: dict, folder: Path) -> list[tuple]:
    """Returns (name, cuts, this rank's part) of every parameter, in fp32 and in bf16."""
    o = case.options(**layout)
    parallel.initialize(o)
    parts = []
    for dtype in (torch.float32, torch.bfloat16):
        chunks = [Toy(o, dtype)]
        release.load(chunks, TABLE.entries(folder), TABLE)
        parts += [(name, checkpoint.cuts(p), p.detach()) for name, p in checkpoint.parameters(chunks)]
    return parts


@pytest.mark.parametrize("layout", [{"ep": 2, "tp": 2}, {"ep": 2, "tp": 2, "sp": True, "etp": 1}], ids=str)
def test_each_rank_reads_its_part_of_an_fp8_release(layout, tmp_path):
    tensors = stored_release()
    whole = whole_model(tensors)
    for parts in run_ranks(4, loaded, layout, save(tmp_path, tensors)):
        assert len(parts) == 2 * len(whole)
        for name, cuts, part in parts:
            want = whole[name].to(part.dtype)
            for dim, place, size in cuts:
                want = want.chunk(size, dim)[place]
            assert torch.equal(part, want), (name, part.dtype)


# ------------------------------------------------------------------------------------------------------- there and back


def converted(folder: Path) -> None:
    """Writes a sharded checkpoint of a release, and another as training does."""
    o = dataclasses.replace(case.options(tp=2), weights=folder / "fp8", out=folder / "run")
    parallel.initialize(o)
    release.write_sharded(folder / "sharded", TABLE, release.open_source(o.weights, TABLE), {})
    chunks = [Toy(o, torch.bfloat16)]
    release.load(chunks, TABLE.entries(o.weights), TABLE)
    checkpoint.save(o.out, 3, chunks, None, {}, extra_files=release.keep_scales(o, TABLE))


def written_again(folder: Path) -> None:
    """Writes what lies in other forms as fp8 again, and the release itself as bf16."""
    parallel.initialize(case.options())
    weights.SHARD_BYTES = 500
    for name in ("fp8", "sharded", "run/step-000003"):
        release.write(folder / f"{Path(name).name} again", TABLE, release.open_source(folder / name, TABLE), fp8=True)
    release.write(folder / "bf16", TABLE, release.open_source(folder / "fp8", TABLE))


def test_untrained_weights_come_back_as_the_bytes_of_the_release_with_their_scales(tmp_path):
    tensors = stored_release()
    save(tmp_path / "fp8", tensors)
    run_ranks(2, converted, tmp_path)
    run_ranks(1, written_again, tmp_path)
    for name in ("fp8 again", "sharded again", "step-000003 again"):
        entries = weights.index(tmp_path / name)
        assert entries.keys() == tensors.keys()
        reader = weights.Reader()
        for key, want in tensors.items():
            got = reader.read(entries[key])
            assert got.dtype == want.dtype and torch.equal(bits(got), bits(want)), (name, key)
        files = {entry.file for entry in entries.values()}
        sizes = {file: sum(e.bytes for e in entries.values() if e.file == file) for file in files}
        assert len(files) > 3 and max(sizes.values()) <= 500
        listed = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        assert listed["metadata"]["total_size"] == sum(sizes.values()) == sum(t.nbytes for t in tensors.values())
    plain = TABLE.entries(tmp_path / "bf16")
    assert {entry.dtype for entry in plain.values()} == {"BF16"} and plain.keys() == TABLE.released_shapes().keys()
    bf16, whole = release.open_source(tmp_path / "bf16", TABLE), whole_model(tensors)
    assert all(torch.equal(bf16.read(name), want.bfloat16()) for name, want in whole.items())


def test_weights_that_are_not_finite_are_not_written_in_fp8(tmp_path):
    tensors = {name: torch.ones(shape) for name, shape in TABLE.shapes.items()}
    tensors["gate_up"][2, 3, 1, 4] = math.inf
    with pytest.raises(ValueError, match=r"2\.up\.weight holds weights that are not finite"):
        release.write(tmp_path / "out", TABLE, release.Source(lambda name: 4, tensors.__getitem__), fp8=True)


def tied(folder: Path) -> str:
    o = case.options(tp=2)
    parallel.initialize(o)
    try:
        release.load([Toy(o, torch.float32)], TABLE.entries(folder), TABLE)
    except ValueError as error:
        return str(error)
    return ""


def test_a_copy_that_differs_on_one_ranks_slice_is_refused_by_all(tmp_path):
    tensors = stored_release()
    tensors["again.weight"][11, 8] += 1
    for message in run_ranks(2, tied, save(tmp_path, tensors)):
        assert "again.weight differs from embed.weight" in message


# ------------------------------------------------------------------------------------------------------------- refusals

ONES, SCALE = torch.ones(20, 14), "up.weight_scale_inv"
DAMAGE = {  # what is changed -> what the message says
    "no scale": ({SCALE: None}, rf"up\.weight is F8_E4M3, but there is no {SCALE}; expected it as F32 \[5, 3\]"),
    "shape": ({SCALE: torch.ones(3, 5)}, rf"{SCALE} is F32 \[3, 5\]; expected F32 \[5, 3\]"),
    "dtype": ({SCALE: torch.ones(5, 3).half()}, rf"{SCALE} is F16 \[5, 3\]; expected F32"),
    "bf16 with scale": ({"up.weight": ONES.bfloat16()}, rf"holds {SCALE}, but up\.weight is BF16"),
    "scale alone": ({"up.weight": None}, rf"holds {SCALE}, but there is no up\.weight;"),
    "scale of another": (
        {"norm.weight_scale_inv": torch.ones(1, 1)},
        r"norm\.weight_scale_inv, but norm\.weight is BF16",
    ),
    "not of the table": (
        {"embed.weight": torch.ones(12, 9).to(torch.float8_e4m3fn), "embed.weight_scale_inv": torch.ones(3, 2)},
        r"embed\.weight is F8_E4M3; expected F64, F32",
    ),
    "one in bf16": ({"up.weight": ONES.bfloat16(), SCALE: None}, r"up\.weight is BF16, but 13 others are F8_E4M3"),
    "e5m2": ({"up.weight": ONES.to(torch.float8_e5m2), SCALE: None}, r"up\.weight is F8_E5M2, but 13 others"),
    "missing": ({"0.up.weight": None, "0.up.weight_scale_inv": None}, r"1 missing: 0\.up\.weight"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_scales_that_do_not_fit_are_refused_by_file_and_key(change, message, tmp_path):
    tensors = {key: tensor for key, tensor in (stored_release() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message) as error:
        TABLE.entries(save(tmp_path, tensors))
    assert str(tmp_path) in str(error.value) and "fix: --weights" in str(error.value)


def config_of(quantization: dict | None) -> str:
    return json.dumps({} if quantization is None else {"quantization_config": quantization})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"fmt": None}, None),  # what transformers writes
        ({"fmt": "e5m2"}, "e5m2"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"weight_block_size": [128, 128]}, r"expected .*\[4, 6\]"),
        (None, "states quantization_config None, but 14 tensors are fp8"),
    ],
)
def test_config_and_tensors_must_agree_that_a_release_is_fp8(change, message, tmp_path):
    entries = TABLE.entries(save(tmp_path, stored_release()))
    stated = None if change is None else release.fp8_config(TABLE) | change
    stated = stated and {name: value for name, value in stated.items() if value is not None}
    (tmp_path / "config.json").write_text(config_of(stated))
    if message is None:
        assert release.is_fp8(tmp_path, TABLE, entries)
    else:
        with pytest.raises(ValueError, match=message):
            release.is_fp8(tmp_path, TABLE, entries)


def test_a_bf16_folder_is_not_fp8_and_must_not_be_named_so(tmp_path):
    tensors = {key: torch.zeros(shape).bfloat16() for key, shape in TABLE.released_shapes().items()}
    entries = TABLE.entries(save(tmp_path, tensors))
    (tmp_path / "config.json").write_text(config_of(None))
    assert not release.is_fp8(tmp_path, TABLE, entries)
    (tmp_path / "config.json").write_text(config_of(release.fp8_config(TABLE)))
    with pytest.raises(ValueError, match="but no tensors are fp8 with scales; expected None"):
        release.is_fp8(tmp_path, TABLE, entries)


def test_an_fp8_release_is_checked_without_torch(tmp_path):
    save_file({"w.q": draw((9, 5), (128, 128))[0], "w.q_scale_inv": torch.ones(1, 1)}, tmp_path / "m.safetensors")
    code = (
        "import sys; from pathlib import Path; from common import release\n"
        "table = release.Table(shapes={'w': (9, 5)}, rename='{}.q'.format, stem='m', fp8=('.q',))\n"
        "folder = Path(sys.argv[1]); config = {'quantization_config': release.fp8_config(table)}\n"
        "import json; (folder / 'config.json').write_text(json.dumps(config))\n"
        "assert release.is_fp8(folder, table, table.entries(folder))\n"
        "assert not {'torch', 'safetensors', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
