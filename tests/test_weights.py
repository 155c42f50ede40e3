"""Released weights: what is refused by headers alone; slices, dtypes and shards are read and written exactly."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common import weights

pytestmark = pytest.mark.L2

TENSORS = {
    "a": torch.arange(48, dtype=torch.float32).reshape(4, 6, 2),
    "b": torch.linspace(-3, 3, 12).reshape(2, 6).bfloat16(),
    "c": torch.arange(5, dtype=torch.int64),
}


@pytest.fixture
def folder(tmp_path):
    """Writes two shards and their index."""
    save_file({"a": TENSORS["a"]}, tmp_path / "m-00001-of-00002.safetensors")
    save_file({k: TENSORS[k] for k in "bc"}, tmp_path / "m-00002-of-00002.safetensors")
    write_map(tmp_path, {"a": 1, "b": 2, "c": 2})
    return tmp_path


def write_map(folder, shard_of: dict[str, int]) -> None:
    names = {key: f"m-{shard:05d}-of-00002.safetensors" for key, shard in shard_of.items()}
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_index_knows_shape_dtype_and_size_of_every_tensor_of_a_sharded_folder(folder):
    entries = weights.index(folder)
    assert {k: (e.shape, e.dtype, e.bytes) for k, e in entries.items()} == {
        "a": ((4, 6, 2), "F32", 192),
        "b": ((2, 6), "BF16", 24),
        "c": ((5,), "I64", 40),
    }


@pytest.mark.parametrize("shard_of", [{"a": 1, "b": 2, "c": 2, "lost": 1}, {"a": 2, "b": 2, "c": 2}])
def test_index_that_promises_what_its_files_lack_is_refused(folder, shard_of):
    write_map(folder, shard_of)
    with pytest.raises(ValueError, match=r"promises 1 tensors that its files lack, first \['(lost|a)'\]"):
        weights.index(folder)


def test_missing_shard_is_refused(folder):
    (folder / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="promises 2 tensors"):
        weights.index(folder)


def test_tensor_stored_twice_is_refused(folder):
    save_file({"a": TENSORS["a"]}, folder / "other.safetensors")
    with pytest.raises(ValueError, match="a is stored in both m-00001-of-00002.safetensors and other.safetensors"):
        weights.index(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "is cut short"),
        (lambda data: data[:40], "not a whole safetensors file"),
        (lambda data: b"", "not a whole safetensors file"),
        (lambda data: data[:8] + b"\xff" * (len(data) - 8), "no readable safetensors header"),
    ],
    ids=["last byte", "in the header", "empty", "header overwritten"],
)
def test_torn_file_is_refused_by_name(folder, damage, message):
    file = folder / "m-00001-of-00002.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{file.name}.*{message}"):
        weights.index(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused_and_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"a pickle would run code")
    with pytest.raises(ValueError, match=f"{name}.*safetensors"):
        weights.index(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_json_that_is_no_object_is_refused_by_name(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        weights.read_json(tmp_path / "config.json")


def test_check_lists_missing_extra_and_misshaped_keys_together(folder):
    with pytest.raises(ValueError) as error:
        weights.check(weights.index(folder), {"a": (4, 2, 6), "b": (2, 6), "d": (1,)}, folder)
    for part in ("1 missing: d", "1 not of this model: c", "1 misshaped: a is [4, 6, 2], expected [4, 2, 6]"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.int32, "I32"),
        (torch.int64, "I64"),
    ],
)
def test_weights_whose_numbers_need_a_scale_are_refused_by_dtype_and_key(tmp_path, dtype, name):
    save_file({"w": torch.ones(4, 6).to(dtype), "a": TENSORS["a"]}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=rf"1 tensors as {name}, first w \({name}\); expected F64, .*; fix: --weights"):
        weights.check(weights.index(tmp_path), {"a": (4, 6, 2), "w": (4, 6)}, tmp_path)


def test_scales_beside_the_weights_do_not_make_them_readable_and_positions_of_a_buffer_are_no_weights(tmp_path):
    save_file({"w": torch.ones(4).to(torch.float8_e5m2), "w_scale": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"w \(F8_E5M2\)"):
        weights.check(weights.index(tmp_path), {"w": (4,)}, tmp_path)
    save_file({"a": TENSORS["a"], "position_ids": TENSORS["c"]}, tmp_path / "m.safetensors")
    weights.refuse_quantised(weights.index(tmp_path), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_number_is_read_from_its_file_in_every_dtype(tmp_path, dtype, shape):
    value = -7 if dtype == torch.int64 else -2.75
    save_file({"a": TENSORS["a"], "n": torch.full(shape, value, dtype=dtype)}, tmp_path / "m.safetensors")
    assert weights.scalar(weights.index(tmp_path)["n"]) == value


def test_headers_are_checked_without_torch(folder):
    code = (
        "import sys; from pathlib import Path; from common import weights\n"
        "entries = weights.index(Path(sys.argv[1]))\n"
        "weights.check({k: entries[k] for k in 'ab'}, {'a': (4, 6, 2), 'b': (2, 6)}, Path())\n"
        "assert not {'torch', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


@pytest.mark.parametrize(("dim", "size"), [(0, 2), (0, 4), (1, 3), (2, 2), (None, 1)])
def test_slices_equal_torch_slices(folder, dim, size):
    entry, reader = weights.index(folder)["a"], weights.Reader()
    wanted = TENSORS["a"].chunk(size, dim or 0)
    for rank in range(size):
        assert torch.equal(reader.read(entry, dim, rank, size), wanted[rank])


def test_stored_dtypes_are_kept(folder):
    entries, reader = weights.index(folder), weights.Reader()
    for key, want in TENSORS.items():
        got = reader.read(entries[key])
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize(("shard_bytes", "files"), [(2**30, 1), (200, 2), (1, 3)])
def test_saved_shards_are_read_back_by_us_and_by_safetensors(tmp_path, monkeypatch, shard_bytes, files):
    monkeypatch.setattr(weights, "SHARD_BYTES", shard_bytes)
    sizes = {k: t.nbytes for k, t in TENSORS.items()}
    weights.save(tmp_path / "out", sizes, TENSORS.__getitem__, "model")
    written = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(written) == files
    assert {f.stat().st_mode & 0o777 for f in written} == {(tmp_path / "out").stat().st_mode & 0o666}  # group may read
    assert {k: e.bytes for k, e in weights.index(tmp_path / "out").items()} == sizes
    loaded = {k: t for file in written for k, t in load_file(file).items()}
    assert loaded.keys() == TENSORS.keys()
    assert all(loaded[k].dtype == t.dtype and torch.equal(loaded[k], t) for k, t in TENSORS.items())
    listing = tmp_path / "out" / "model.safetensors.index.json"
    assert listing.is_file() == (files > 1)
    if files > 1:
        listed = json.loads(listing.read_text())
        assert listed["metadata"]["total_size"] == sum(sizes.values())
        for key, name in listed["weight_map"].items():
            with safe_open(tmp_path / "out" / name, "pt") as f:
                assert key in f.keys()  # noqa: SIM118  not a dict


def test_failing_read_leaves_no_target_folder_and_the_next_save_succeeds(tmp_path):
    sizes = {k: t.nbytes for k, t in TENSORS.items()}

    def failing(key: str) -> torch.Tensor:
        if key == "c":
            raise OSError("disk gone")
        return TENSORS[key]

    with pytest.raises(OSError, match="disk gone"):
        weights.save(tmp_path / "out", sizes, failing, "model")
    assert not (tmp_path / "out").exists()
    weights.save(tmp_path / "out", sizes, TENSORS.__getitem__, "model")
    assert weights.index(tmp_path / "out").keys() == TENSORS.keys()


def test_fingerprint_changes_with_the_weights(folder):
    before = weights.fingerprint(folder)
    save_file({"a": TENSORS["a"] + 1}, folder / "m-00001-of-00002.safetensors")
    assert weights.fingerprint(folder) != before
    (folder / "adapter_config.json").write_text('{"lora_alpha": 4}')  # an adapter's config, which has its scale
    scaled = weights.fingerprint(folder)
    (folder / "adapter_config.json").write_text('{"lora_alpha": 8}')
    assert scaled != weights.fingerprint(folder) != before
    first, second = (weights.fingerprint(folder / f"m-0000{i}-of-00002.safetensors") for i in (1, 2))
    assert first != second


@pytest.mark.parametrize("make", [lambda p: p.write_text("x"), lambda p: (p.mkdir(), (p / "x").write_text("x"))])
def test_nothing_is_written_over_what_exists(tmp_path, make):
    weights.refuse_existing(tmp_path / "out", "--out")
    make(tmp_path / "out")
    with pytest.raises(ValueError, match="fix: --out"):
        weights.refuse_existing(tmp_path / "out", "--out")
