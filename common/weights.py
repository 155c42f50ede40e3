"""Released weights: safetensors folders read strictly, streamed slice by slice into any layout, and written back.

Headers are read without torch, so that a wrong folder is refused before anything heavy is imported.
Only safetensors are read: `.bin`, `.pt` and `.pth` files are pickles from outside and are refused.
"""

import glob
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PEFT_FILES = "adapter_model*.safetensors"  # in an adapter's folder, where other tools' files may lie beside them
SHARD_BYTES = 5 * 2**30  # released checkpoints are cut into files of about this size
NUMBERS = ("F64", "F32", "F16", "BF16")  # dtypes whose values are the weights themselves
BUFFERS = ("I64", "BOOL")  # positions and masks, which some releases hold beside their weights
FP8, SCALE = "F8_E4M3", "_scale_inv"  # float8_e4m3fn; what the key of its scales adds to the weight's
ON_DEVICE = False  # whether fp8 weights travel to the model's device as stored, to be multiplied there. Not yet timed.
SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q"}  # dtype -> format for struct.unpack


@dataclass(frozen=True)
class Entry:
    """One tensor of a folder: where it lies and what its header says."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    offset: int  # of its first byte in the file
    scale: "Entry | None" = None  # of an fp8 weight: its blocks' scales, see `join_scales`
    block: tuple[int, int] = (0, 0)  # of an fp8 weight: rows and columns that share a scale


def index(folder: Path, names: str = "*.safetensors") -> dict[str, Entry]:
    """Returns every tensor of a folder's safetensors files (those whose names match the pattern), by headers alone.

    Raises:
        ValueError: no safetensors there (pickled weights are named and refused), a file that is cut short, a tensor
            stored twice, or an index.json that names files or tensors the folder lacks.
    """
    files = sorted(folder.glob(names))
    if not files:
        pickles = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        if pickles:
            raise ValueError(
                f"{folder} holds pickled weights ({', '.join(pickles[:3])}); expected *.safetensors: a pickle runs code "
                "when it is read; fix: download the safetensors release or convert it with its own tools"
            )
        raise ValueError(f"{folder} holds no {names}; fix: --weights")
    entries: dict[str, Entry] = {}
    for file in files:
        data_start, headers, _ = _header(file)
        for key, header in headers.items():
            if key in entries:
                raise ValueError(f"{key} is stored in both {entries[key].file.name} and {file.name}; fix: {folder}")
            start, end = header["data_offsets"]
            entries[key] = Entry(file, key, header["dtype"], tuple(header["shape"]), end - start, data_start + start)
    for listing in folder.glob(f"{names}.index.json"):
        promised = read_json(listing).get("weight_map", {})
        missing = sorted(k for k, name in promised.items() if k not in entries or entries[k].file.name != name)
        if missing:
            raise ValueError(
                f"{listing} promises {len(missing)} tensors that its files lack, first {missing[:3]}; fix: download again"
            )
    return entries


def index_file(file: Path) -> dict[str, Entry]:
    """Returns every tensor of one safetensors file, whatever lies beside it."""
    return index(file.parent, glob.escape(file.name))


def metadata(file: Path) -> dict[str, str]:
    """Returns the metadata in the header of a safetensors file."""
    return _header(file)[2]


def scalar(entry: Entry) -> float:
    """Returns the number in a tensor of one element. ValueError: the tensor has more, or another dtype."""
    if entry.shape not in ((), (1,)) or entry.dtype not in (*SCALARS, "BF16"):
        raise ValueError(
            f"{entry.file}: {entry.key} is {entry.dtype} {list(entry.shape)}; expected one number; fix: another file"
        )
    with open(entry.file, "rb") as f:
        f.seek(entry.offset)
        raw = f.read(entry.bytes)
    if entry.dtype == "BF16":  # the upper half of an F32
        return struct.unpack("<f", b"\0\0" + raw)[0]
    return float(struct.unpack(SCALARS[entry.dtype], raw)[0])


def _header(file: Path) -> tuple[int, dict, dict]:
    """Returns where a safetensors file's data begins, its tensors' headers, and its metadata. The file is 8 bytes of
    length, a JSON header, and the data."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{file} is not a whole safetensors file ({size} bytes); fix: download it again")
        try:
            header = json.loads(f.read(length))
        except ValueError:
            raise ValueError(f"{file} has no readable safetensors header; fix: download it again") from None
    extra = header.pop("__metadata__", None) or {}
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < 8 + length + end:
        raise ValueError(f"{file} is cut short: {size} bytes of {8 + length + end}; fix: download it again")
    return 8 + length, header, extra


def refuse_quantised(entries: dict[str, Entry], where: Path, fix: str = "--weights", expected=()) -> None:
    """Raises ValueError for tensors whose values are no weights without a scale. Integer and bool buffers pass, unless
    they are expected as weights."""
    odd = {
        key: entry.dtype
        for key, entry in sorted(entries.items())
        if entry.dtype not in NUMBERS and not entry.scale and (key in expected or entry.dtype not in BUFFERS)
    }
    if odd:
        key = next(iter(odd))
        raise ValueError(
            f"{where} holds {len(odd)} tensors as {', '.join(sorted(set(odd.values())))}, first {key} ({odd[key]}); "
            f"expected {', '.join(NUMBERS)}: quantised releases (fp8, int8, 4 bits), with scales or without, are not read "
            f"here; fix: {fix} with the release in bf16"
        )


def join_scales(
    entries: dict[str, Entry], fp8: Collection[str], block: tuple[int, int], where: Path
) -> dict[str, Entry]:
    """Returns the tensors of a folder with each fp8 weight's scales in its entry, and no more under their own keys.

    fp8: keys that the folder may hold as float8_e4m3fn [m, n], all of them or none, each with scales under its key +
    SCALE, fp32 [ceil(m / rows), ceil(n / columns)] for the rows and columns of a block.

    Raises:
        ValueError: scales are missing, misshaped or of another dtype, or have no fp8 weight; a weight is fp8 that must
            not be, or is not fp8 though others are. It names file and key of the first.
    """
    quantised = {key for key, entry in entries.items() if entry.dtype == FP8}
    scaled = {key.removesuffix(SCALE) for key in entries if key.endswith(SCALE)}
    for key in sorted(quantised | scaled | (entries.keys() & fp8 if quantised else set())):
        entry, scale, problem = entries.get(key), entries.get(key + SCALE), None
        shape = tuple(-(-n // size) for n, size in zip(entry.shape if entry else (), block, strict=False))
        if key not in quantised and scale:
            there = f"{key} is {entry.dtype}" if entry else f"there is no {key}"
            problem = f"{scale.file} holds {scale.key}, but {there}; expected {FP8}"
        elif key not in quantised:
            problem = f"{entry.file}: {key} is {entry.dtype}, but {len(quantised)} others are {FP8}; expected {FP8}"
        elif key not in fp8:
            problem = f"{entry.file}: {key} is {FP8}; expected {', '.join(NUMBERS)} for this tensor of the model"
        elif not scale:
            problem = f"{entry.file}: {key} is {FP8}, but there is no {key + SCALE}; expected it as F32 {list(shape)}"
        elif (scale.dtype, scale.shape) != ("F32", shape):
            problem = f"{scale.file}: {scale.key} is {scale.dtype} {list(scale.shape)}; expected F32 {list(shape)}"
        if problem:
            raise ValueError(f"{problem}; fix: --weights, or download {where} again")
    return {
        key: replace(entry, scale=entries[key + SCALE], block=block) if key in quantised else entry
        for key, entry in entries.items()
        if not key.endswith(SCALE)
    }


def check(entries: dict[str, Entry], expected: dict[str, tuple[int, ...]], where: Path) -> None:
    """Checks that a folder has exactly the expected keys, each of the expected shape, in a dtype that needs no scale.

    Raises:
        ValueError: listing what is missing, extra and misshaped, or naming quantised tensors.
    """
    refuse_quantised(entries, where, expected=expected)
    missing = sorted(expected.keys() - entries.keys())
    extra = sorted(entries.keys() - expected.keys())
    shapes = [
        f"{k} is {list(entries[k].shape)}, expected {list(expected[k])}"
        for k in sorted(expected.keys() & entries.keys())
        if entries[k].shape != tuple(expected[k])
    ]
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}"
        for kind, keys in (("missing", missing), ("not of this model", extra), ("misshaped", shapes))
        if keys
    ]
    if problems:
        raise ValueError(f"weights in {where} do not fit: {'; '.join(problems)}; fix: --weights or --size")


def read_json(path: Path) -> dict:
    """Reads a JSON file that holds an object. ValueError: it holds none, or is cut short."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; fix: download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; fix: download it again")
    return values


def fingerprint(path: Path) -> str:
    """Returns a short hash of the content of a part of a released folder, or of an adapter's folder or file. It covers
    names and sizes of config and weights, and 64 samples of 64 KiB spread over each file. Hashing all 11 GB of a text
    encoder would take as long as loading it."""
    digest = hashlib.sha256()
    names = ("config.json", "adapter_config.json", "*.safetensors")
    for file in [path] if path.is_file() else sorted(file for name in names for file in path.glob(name)):
        with open(file, "rb") as f:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            for i in range(64):
                f.seek(i * size // 64)
                digest.update(f.read(2**16))
    return digest.hexdigest()[:16]


def read_scales(entry: Entry) -> "torch.Tensor":
    """Returns the scales of an fp8 weight, fp32, whole. They are not mapped: a release has tens of thousands of these
    small tensors, and for each the kernel would read megabytes around it ahead."""
    import torch

    with open(entry.file, "rb", buffering=0) as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        raw = os.pread(f.fileno(), entry.bytes, entry.offset)
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).view(entry.shape)


class Reader:
    """Reads tensors, or shards of them, from memory-mapped files that are opened once."""

    def __init__(self):
        self._open: dict[Path, object] = {}

    def read(self, entry: Entry, dim: int | None = None, rank: int = 0, size: int = 1, dtype=None) -> "torch.Tensor":
        """Returns a tensor, or its `rank`-th of `size` equal slices along `dim`, as stored. Copies only that slice.
        An fp8 weight is returned as `dtype` (default: fp32), in which its products with its scales are rounded once."""
        import torch

        if entry.scale is None:
            return self._stored(entry, dim, rank, size)
        shape = [n // size if i == dim else n for i, n in enumerate(entry.shape)]
        return self.read_into(torch.empty(shape, dtype=dtype or torch.float32), entry, dim, rank, size)

    def read_into(
        self, out: "torch.Tensor", entry: Entry, dim: int | None = None, rank: int = 0, size: int = 1
    ) -> "torch.Tensor":
        """Copies what `read` would return into `out`, which may have any dtype, strides and device. Returns `out`."""
        if entry.scale is None or out.device.type != "cpu" and not ON_DEVICE:
            return out.copy_(self.read(entry, dim, rank, size, out.dtype))
        from common import fp8

        start = tuple(rank * (n // size) if i == dim else 0 for i, n in enumerate(entry.shape))
        stored, scale = self._stored(entry, dim, rank, size), read_scales(entry.scale)
        fp8.dequantise(stored.to(out.device), scale.to(out.device), entry.block, start, out)
        return out

    def _stored(self, entry: Entry, dim: int | None = None, rank: int = 0, size: int = 1) -> "torch.Tensor":
        from safetensors import safe_open

        if entry.file not in self._open:
            self._open[entry.file] = safe_open(entry.file, framework="pt")
        if dim is None or size == 1:
            return self._open[entry.file].get_tensor(entry.key)
        view = self._open[entry.file].get_slice(entry.key)
        n = entry.shape[dim] // size
        return view[(slice(None),) * dim + (slice(rank * n, (rank + 1) * n),)]

    def prefetch(self, entry: Entry) -> None:
        """Has the kernel read a tensor ahead into its page cache, which the ranks of a node share. Without this, page
        faults of the mapped file wait for the disk in small pieces."""
        with open(entry.file, "rb") as f:
            os.posix_fadvise(f.fileno(), entry.offset, entry.bytes, os.POSIX_FADV_WILLNEED)


def save(folder: Path, sizes: dict[str, int], read: Callable[[str], "torch.Tensor"], stem: str) -> None:
    """Writes a new folder of tensors as `stem.safetensors`, cut into files of 5 GiB with an index if it is larger.

    sizes: key -> bytes; they decide the cut before a tensor is read. read(key) returns the tensor. One file's tensors
    are held at a time. The folder is written under another name and then renamed: a partial release is never visible.
    """
    from safetensors.torch import save_file

    groups: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += size
    names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    names = names if len(groups) > 1 else [f"{stem}.safetensors"]
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, keys in zip(names, groups, strict=True):
        save_file({key: read(key).contiguous() for key in keys}, partial / name, metadata={"format": "pt"})
        (partial / name).chmod(partial.stat().st_mode & 0o666)  # safetensors makes files that only their owner reads
    if len(groups) > 1:
        listing = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {key: name for name, keys in zip(names, groups, strict=True) for key in keys},
        }
        (partial / f"{stem}.safetensors.index.json").write_text(json.dumps(listing, indent=2))
    os.replace(partial, folder)


def refuse_existing(folder: Path, flag: str) -> None:
    """Raises ValueError if the folder to write exists and is not an empty folder: nothing is overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; fix: {flag}, or remove it")
