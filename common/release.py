"""Released weights by a recipe's table: read strictly into any layout, written back, merged with adapters.

A recipe's `convert.py` holds the `Table` of a model: its parameters, their keys in the release and, for tensors that
are stacked here (experts), their pieces. Everything done with released weights follows from this table.

The launcher reads tables and headers too, so functions import torch only where they need a tensor.
"""

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import adapters, weights

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
SCALES = "scales.safetensors"  # in a checkpoint: the scales of the fp8 release that its weights come from


@dataclass(frozen=True, kw_only=True)
class Table:
    """How a release stores a model.

    shapes: our name -> shape, for every parameter, in the order in which they are written
    rename: our name -> key, for a tensor that the release stores as it is
    pieces: our name -> {key: index}, for a tensor that is stacked here: tensor[index] is the transpose of the key's
    copies: key -> the key whose tensor it must equal, for tensors that some releases store twice
    writes_copies: whether a folder that is written here stores them twice, too
    ignored: prefixes or suffixes of keys that some releases hold and no version of the model reads
    fp8: suffixes of the keys, all of matrices, that a release may store as float8_e4m3fn with scales (common/fp8.py)
    block: rows and columns of an fp8 tensor that share a scale
    optional: our names of parameters that weights may lack; training then draws them
    stem: prefix of the names of the release's files
    """

    shapes: dict[str, Shape]
    rename: Callable[[str], str]
    stem: str
    pieces: dict[str, dict[str, tuple]] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    writes_copies: bool = False
    ignored: tuple[str, ...] = ()
    fp8: tuple[str, ...] = ()
    block: tuple[int, int] = (128, 128)
    optional: tuple[str, ...] = ()

    def released_shapes(self) -> dict[str, Shape]:
        """Returns the shape of every tensor of the release, by its key. Scales of fp8 tensors are in `scale_shapes`."""
        shapes = {}
        for name, shape in self.shapes.items():
            stacked = {key: _transposed(shape, index) for key, index in self.pieces.get(name, {}).items()}
            shapes |= stacked or {self.rename(name): shape}
        return shapes | {copy: shapes[key] for copy, key in self.copies.items() if self.writes_copies}

    def scale_shapes(self) -> dict[str, Shape]:
        """Returns the shape of the scales of every tensor that a release may store in fp8, by the tensor's key."""
        fp8 = {key: shape for key, shape in self.released_shapes().items() if key.endswith(self.fp8)}
        return {key: (-(-m // self.block[0]), -(-n // self.block[1])) for key, (m, n) in fp8.items()}

    def entries(self, folder: Path) -> dict[str, weights.Entry]:
        """Returns the tensors of a released folder, by key. The entry of an fp8 tensor holds that of its scales.

        Raises:
            ValueError: tensors are missing, extra, misshaped or quantised, scales do not fit, or files are pickled or
                cut short.
        """
        entries = weights.index(folder)
        if self.ignored:
            left_out = {key for key in entries if key.startswith(self.ignored) or key.endswith(self.ignored)}
            entries = {key: entry for key, entry in entries.items() if key not in left_out}
        if self.fp8:
            entries = weights.join_scales(entries, self.scale_shapes().keys(), self.block, folder)
        expected, absent = self.released_shapes(), {self.rename(name) for name in self.optional} - entries.keys()
        copies = {copy: expected[key] for copy, key in self.copies.items() if copy in entries}
        expected = {k: shape for k, shape in expected.items() if k not in self.copies and k not in absent} | copies
        weights.check(entries, expected, folder)
        return entries


def _transposed(shape: Shape, index: tuple) -> Shape:
    """Returns the shape of the transpose of tensor[index]; the index holds integers and whole slices."""
    sizes = [n for n, at in zip(shape, (*index, *[slice(None)] * len(shape)), strict=False) if at == slice(None)]
    return tuple(reversed(sizes))


# ------------------------------------------------------------------------------------------------------------ folders


def is_sharded(folder: Path) -> bool:
    """Returns whether a folder is one of our sharded checkpoints."""
    return (folder / "manifest.json").is_file()


def differences(actual: Any, expected: Any, free: Iterable[str] = ()) -> list[str]:
    """Describes the fields in which two architectures of one dataclass differ. free: fields that may differ."""
    names = [f.name for f in dataclasses.fields(actual) if f.name not in free]
    pairs = {name: (getattr(actual, name), getattr(expected, name)) for name in names}
    return [f"{name} {value} != {other}" for name, (value, other) in pairs.items() if value != other]


def name_size(folder: Path, differs: dict[str, list[str]]) -> str:
    """Returns the published size whose architecture a folder has. differs: size -> fields in which the folder differs.

    Raises:
        ValueError: no size has it; names the nearest.
    """
    nearest = min(differs, key=lambda name: len(differs[name]))
    if differs[nearest]:
        raise ValueError(
            f"{folder} has an architecture that is none of {', '.join(differs)} (nearest {nearest}: "
            f"{', '.join(differs[nearest])}); fix: --weights, or add the size to config.py"
        )
    return nearest


def fp8_config(table: Table) -> dict:
    """Returns the `quantization_config` that the config.json of a release in fp8 holds."""
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [*table.block]}


def is_fp8(folder: Path, table: Table, entries: dict[str, weights.Entry]) -> bool:
    """Returns whether a released folder is in fp8, of which its config.json and its tensors, `table.entries(folder)`,
    must say the same.

    Raises:
        ValueError: they say different things, or config.json names another format of numbers or size of blocks.
    """
    stated = weights.read_json(folder / "config.json").get("quantization_config")
    count = sum(entry.scale is not None for entry in entries.values())
    names = ("fmt", "quant_method", "weight_block_size")  # how activations are quantised is up to who runs the model
    expected = {name: fp8_config(table)[name] for name in names} if count else None
    actual = stated and {name: ({"fmt": "e4m3"} | stated).get(name) for name in names}  # transformers writes no fmt
    if actual != expected:
        raise ValueError(
            f"{folder / 'config.json'} states quantization_config {stated}, but {count or 'no'} tensors are fp8 with "
            f"scales; expected {expected}; fix: --weights with the config.json and the tensors of one release"
        )
    return bool(count)


def copy_files(names: Iterable[str], source: Path | None, out: Path) -> None:
    """Copies the files and folders of these names that `source` has."""
    for path in (source / name for name in names if source):
        if path.is_dir():
            shutil.copytree(path, out / path.name)
        elif path.is_file():
            shutil.copy2(path, out)


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Source:
    """The parameters of a model in a folder, by our names.

    element: bytes of one element
    read: the whole tensor; one that is stored in fp8 comes as bf16
    scales: key of an fp8 tensor of the release that the folder is, or comes from -> its scales
    """

    element: Callable[[str], int]
    read: Callable[[str], "torch.Tensor"]
    scales: dict[str, weights.Entry] = field(default_factory=dict)


def open_source(folder: Path, table: Table, ema: bool = False) -> Source:
    """Opens a released folder, strictly checked, or a sharded checkpoint (ema: its averaged weights)."""
    if is_sharded(folder):
        from common import checkpoint

        sizes, prefix, scales = checkpoint.tensor_sizes(folder), "ema." if ema else "", {}
        if (folder / SCALES).is_file():
            scales = {key.removesuffix(weights.SCALE): e for key, e in weights.index_file(folder / SCALES).items()}
        return Source(
            lambda name: sizes[prefix + name] // math.prod(table.shapes[name]),
            lambda name: checkpoint.read_tensor(folder, prefix + name),
            scales,
        )
    entries, reader = table.entries(folder), weights.Reader()

    def first(name: str) -> weights.Entry:
        return entries[next(iter(table.pieces.get(name, ())), None) or table.rename(name)]

    def read(name: str) -> "torch.Tensor":
        import torch

        if name not in table.pieces:
            return reader.read(first(name), dtype=torch.bfloat16)
        whole = torch.empty(table.shapes[name], dtype=reader.read(first(name), dtype=torch.bfloat16).dtype)
        for key, index in table.pieces[name].items():
            reader.read_into(whole[index].t(), entries[key])
        return whole

    def element(name: str) -> int:
        return 2 if first(name).scale else first(name).bytes // math.prod(first(name).shape)

    return Source(element, read, {key: entry.scale for key, entry in entries.items() if entry.scale})


def fill(chunks, o, table: Table, draw: Callable, folder: Path | None = None, packed: list[str] | None = None) -> None:
    """Fills a model's parameters from a released folder or a checkpoint, each rank with its slices; with --from-scratch
    draws them. Those that the table calls optional and the weights lack are drawn, too. draw(name, whole tensor,
    generator) fills one. folder: the release's folder (default: --weights). packed: names of the weights that become
    4 bits, part by part, of a model on the meta device (`quantize.blocks`). All ranks read a checkpoint together, so it is
    one part."""
    from common import checkpoint, quantize

    from_checkpoint = not o.from_scratch and is_sharded(o.weights)
    entries, absent = {} if o.from_scratch or from_checkpoint else table.entries(folder or o.weights), set()
    if entries:
        _check_copies(entries, table)
        absent = {name for name in table.optional if table.rename(name) not in entries}
    elif from_checkpoint and table.optional:
        absent = set(table.optional) - checkpoint.tensor_sizes(o.weights).keys()
    for part in quantize.blocks(chunks, packed, whole=from_checkpoint) if packed else [chunks]:
        if from_checkpoint:
            checkpoint.load(o.weights, part, without=absent)
        elif entries:
            _fill_parameters(part, entries, table, absent)
        checkpoint.initialize(part, o.seed, draw, bool if o.from_scratch else absent.__contains__)


def load(chunks, entries: dict[str, weights.Entry], table: Table) -> None:
    """Copies released tensors into this rank's parameters. Each rank reads only its slices. Collective.

    Raises:
        ValueError: a tensor that is stored twice differs from its copy.
    """

    _check_copies(entries, table)
    _fill_parameters(chunks, entries, table)


def _fill_parameters(chunks, entries: dict[str, weights.Entry], table: Table, absent: Container[str] = ()) -> None:
    """Fills this rank's parameters, except those that the folder lacks (`absent`)."""
    import torch

    from common import checkpoint

    reader = weights.Reader()
    checkpoint.load_released(
        chunks, entries, lambda name: None if name in table.pieces or name in absent else table.rename(name)
    )
    pieces = []  # (entry, its place) of those that this rank holds
    with torch.no_grad():
        for name, parameter in checkpoint.parameters(chunks):
            cuts = checkpoint.cuts(parameter)
            places = ((entries[key], _place(parameter, i, cuts)) for key, i in table.pieces.get(name, {}).items())
            pieces += [(entry, *place) for entry, place in places if place]
        for i, (entry, target, cut) in enumerate(pieces):
            for ahead, *_ in pieces[i + checkpoint.READ_AHEAD : i + checkpoint.READ_AHEAD + 1]:
                reader.prefetch(ahead)
            reader.read_into(target, entry, *cut)


def _check_copies(entries: dict[str, weights.Entry], table: Table) -> None:
    """Compares tensors with their copies, each rank a slice, or as many ranks as divide the first dimension.
    Collective."""
    import torch
    import torch.distributed as dist

    from common import checkpoint

    reader = weights.Reader()
    for copy, key in table.copies.items():
        if copy not in entries:
            continue
        parts = math.gcd(entries[key].shape[0], dist.get_world_size())
        cut = (0, dist.get_rank() % parts, parts)
        equal = torch.equal(reader.read(entries[key], *cut), reader.read(entries[copy], *cut))
        if checkpoint.first_problem(None if equal else copy):
            raise ValueError(
                f"{entries[copy].file}: {copy} differs from {key}, to which it is tied; fix: --weights, or what its "
                "config.json says of it"
            )


def _place(parameter, index: tuple, cuts: list) -> tuple["torch.Tensor", tuple] | None:
    """Returns where a piece goes in this rank's part of a stacked tensor, and the piece's cut (dimension, part, parts).
    Returns None if this rank does not hold it. A cut of the first dimension (experts) keeps pieces whole; a cut of
    another dimension cuts every piece alike."""
    (g, *where), cut = index, (None, 0, 1)
    for dim, part, parts in cuts:
        if dim == 0:
            g -= part * len(parameter)
            continue
        kept = [i for i in range(parameter.ndim) if i >= len(index) or index[i] == slice(None)]
        cut = (len(kept) - 1 - kept.index(dim), part, parts)  # the piece has these dimensions, in reverse
    return (parameter[g, *where].t(), cut) if 0 <= g < len(parameter) else None


# ------------------------------------------------------------------------------------------------------------ writing


def write(out: Path, table: Table, source: Source, fp8: bool = False) -> None:
    """Writes the tensors of a new folder. It holds one file's tensors at a time, and a stacked tensor while it writes
    its pieces.

    fp8: whether the table's fp8 tensors are stored so. A block whose weights are those of the release that the source
    comes from keeps every byte of weights and scale, see `fp8.quantise`.

    Raises:
        ValueError: a weight to be stored in fp8 is not finite.
    """
    pieces: dict[str, tuple[str, tuple | None]] = {}  # key -> (our name, index)
    for name in table.shapes:
        stacked = {key: (name, index) for key, index in table.pieces.get(name, {}).items()}
        pieces |= stacked or {table.rename(name): (name, None)}
    element = {name: source.element(name) for name in table.shapes}
    blocks, sizes = table.scale_shapes() if fp8 else {}, {}
    for key, shape in table.released_shapes().items():
        pieces[key] = pieces[table.copies.get(key, key)]
        sizes[key] = math.prod(shape) * (1 if key in blocks else element[pieces[key][0]])
        if key in blocks:
            sizes[key + weights.SCALE] = math.prod(blocks[key]) * 4
    held: dict[str, torch.Tensor] = {}  # a stacked tensor serves many keys in a row
    made: dict[str, torch.Tensor] = {}  # the scales of the tensor before

    def tensor(key: str) -> "torch.Tensor":
        from common.fp8 import quantise

        if key in made:
            return made.pop(key)
        name, index = pieces[key]
        if name not in held:
            held.clear()
            held[name] = source.read(name)
        weight = held[name] if index is None else held[name][index].t()
        if key not in blocks:  # safetensors refuses two tensors in the same memory
            return weight.clone() if key in table.copies else weight
        scale = weights.read_scales(source.scales[key]) if key in source.scales else None
        weight, made[key + weights.SCALE] = quantise(weight, scale, table.block)
        if not made[key + weights.SCALE].isfinite().all():
            raise ValueError(f"{key} holds weights that are not finite, which fp8 cannot; fix: other weights, or bf16")
        return weight

    weights.save(out, sizes, tensor, table.stem)


def write_sharded(out: Path, table: Table, source: Source, state: dict, extra_files: Iterable[Path] = ()) -> None:
    """Writes a sharded checkpoint at step 0, which any layout can read. Collective: every rank reads and writes its
    share of the tensors.

    state: facts about the model that the checkpoint stores; extra_files: small files that are copied into it. The
    scales of an fp8 release go with it, too.
    """
    import torch.distributed as dist

    from common import checkpoint

    mine = list(table.shapes)[dist.get_rank() :: dist.get_world_size()]
    with tempfile.TemporaryDirectory() as folder:
        files = [*extra_files, *(save_scales(source, Path(folder)) if dist.get_rank() == 0 else ())]
        checkpoint.save_tensors(out, {name: source.read(name) for name in mine}, {"step": 0} | state, files)


def save_scales(source: Source, folder: Path) -> list[Path]:
    """Writes the scales of the fp8 release that a source comes from to one file. Returns [its path], or [] if there are
    none. With it in a checkpoint's `extra_files`, `write` stores what was not trained as the release did."""
    from safetensors.torch import save_file

    if not source.scales:
        return []
    save_file({entry.key: weights.read_scales(entry) for entry in source.scales.values()}, folder / SCALES)
    return [folder / SCALES]


def keep_scales(o, table: Table) -> list[Path]:
    """Returns the `extra_files` with which a run's checkpoints keep the scales of --weights, see `save_scales`. Rank 0
    writes the file to the run folder, and it is the rank that copies it."""
    import torch.distributed as dist

    if o.from_scratch or dist.get_rank():
        return []
    o.out.mkdir(parents=True, exist_ok=True)
    return save_scales(open_source(o.weights, table), o.out)


# ------------------------------------------------------------------------------------------------------------ adapters


def merge_adapter(
    source: Source,
    pairs: dict[str, adapters.Pair],
    differences: dict[str, weights.Entry] | None = None,
    pieces: dict[str, dict[str, tuple]] | None = None,
) -> Source:
    """Returns `source` with an adapter (`adapters.read`) merged into each tensor when it is read: s B A and full-weight
    differences are added to W in fp32, and the sum is rounded once to the dtype of W. pieces: the table's, if pairs may
    be of the matrices in a stack; they have the names of the release."""
    from common import lora

    reader, full = weights.Reader(), differences or {}

    def read(name: str) -> "torch.Tensor":
        whole = lora.merge_from_files(
            source.read(name), pairs.get(name.removesuffix(".weight")), full.get(name), reader
        )
        indices = {key.removesuffix(".weight"): index for key, index in (pieces or {}).get(name, {}).items()}
        whole = whole.clone() if indices.keys() & pairs.keys() else whole
        for matrix in indices.keys() & pairs.keys():
            index = indices[matrix]
            whole[index] = lora.merge_from_files(whole[index].t(), pairs[matrix], None, reader).t()
        return whole

    return dataclasses.replace(source, read=read)


def merge_into(chunks, pairs: dict[str, adapters.Pair], differences: dict[str, weights.Entry]) -> None:
    """Adds an adapter to a model's weights. Each rank reads only the rows of B, or the columns of A, that belong to the
    outputs, or inputs, that it holds."""
    import torch

    from common import checkpoint, lora

    reader = weights.Reader()
    with torch.no_grad():
        for name, parameter in checkpoint.parameters(chunks):
            pair, difference = pairs.get(name.removesuffix(".weight")), differences.get(name)
            if pair or difference:
                cut = next(iter(checkpoint.cuts(parameter)), (None, 0, 1))
                parameter.copy_(lora.merge_from_files(parameter, pair, difference, reader, cut))
