"""Released weights by a recipe's table: read strictly into any layout, written back, merged with adapters.

A recipe's `convert.py` holds the `Table` of a model: its parameters, their keys in the release and, for tensors that
are stacked here (experts), their pieces. Everything done with released weights follows from this table.

The launcher reads tables and headers too, so functions import torch only where they need a tensor.
"""

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import adapters, weights

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """How a release stores a model.

    shapes: our name -> shape, for every parameter, in the order in which they are written
    rename: our name -> key, for a tensor that the release stores as it is
    pieces: our name -> {key: index}, for a tensor that is stacked here: tensor[index] is the transpose of the key's
    copies: key -> the key whose tensor it must equal, for tensors that some releases store twice
    ignored: prefixes or suffixes of keys that some releases hold and no version of the model reads
    stem: prefix of the names of the release's files
    """

    shapes: dict[str, Shape]
    rename: Callable[[str], str]
    stem: str
    pieces: dict[str, dict[str, tuple]] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def released_shapes(self) -> dict[str, Shape]:
        """Returns the shape of every tensor of the release, by its key."""
        shapes = {}
        for name, shape in self.shapes.items():
            stacked = {key: _transposed(shape, index) for key, index in self.pieces.get(name, {}).items()}
            shapes |= stacked or {self.rename(name): shape}
        return shapes

    def entries(self, folder: Path) -> dict[str, weights.Entry]:
        """Returns the tensors of a released folder, by key.

        Raises:
            ValueError: tensors are missing, extra, misshaped or quantised, or files are pickled or cut short.
        """
        entries = weights.index(folder)
        if self.ignored:
            left_out = [key for key in entries if key.startswith(self.ignored) or key.endswith(self.ignored)]
            entries = {key: entry for key, entry in entries.items() if key not in set(left_out)}
        expected = self.released_shapes()
        expected |= {copy: expected[key] for copy, key in self.copies.items() if copy in entries}
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
    """The parameters of a model in a folder, by our names. element: bytes of one element; read: the whole tensor."""

    element: Callable[[str], int]
    read: Callable[[str], "torch.Tensor"]


def open_source(folder: Path, table: Table, ema: bool = False) -> Source:
    """Opens a released folder, strictly checked, or a sharded checkpoint (ema: its averaged weights)."""
    if is_sharded(folder):
        from common import checkpoint

        sizes, prefix = checkpoint.tensor_sizes(folder), "ema." if ema else ""
        return Source(
            lambda name: sizes[prefix + name] // math.prod(table.shapes[name]),
            lambda name: checkpoint.read_tensor(folder, prefix + name),
        )
    entries, reader = table.entries(folder), weights.Reader()

    def first(name: str) -> weights.Entry:
        return entries[next(iter(table.pieces.get(name, ())), None) or table.rename(name)]

    def read(name: str) -> "torch.Tensor":
        import torch

        if name not in table.pieces:
            return reader.read(first(name))
        whole = torch.empty(table.shapes[name], dtype=reader.read(first(name)).dtype)
        for key, index in table.pieces[name].items():
            whole[index] = reader.read(entries[key]).t()
        return whole

    return Source(lambda name: first(name).bytes // math.prod(first(name).shape), read)


def fill(chunks, o, table: Table, draw: Callable, folder: Path | None = None, packed: list[str] | None = None) -> None:
    """Fills a model's parameters from a released folder or a checkpoint, each rank with its slices; with --from-scratch
    draws them. draw(name, whole tensor, generator) fills one. folder: the release's folder (default: --weights).
    packed: names of the weights that become 4 bits, part by part, of a model on the meta device (`quantize.blocks`). All
    ranks read a checkpoint together, so it is one part."""
    from common import checkpoint, quantize

    from_checkpoint = not o.from_scratch and is_sharded(o.weights)
    entries = {} if o.from_scratch or from_checkpoint else table.entries(folder or o.weights)
    for part in quantize.blocks(chunks, packed, whole=from_checkpoint) if packed else [chunks]:
        if o.from_scratch:
            checkpoint.initialize(part, o.seed, draw)
        elif from_checkpoint:
            checkpoint.load(o.weights, part)
        else:
            load(part, entries, table)


def load(chunks, entries: dict[str, weights.Entry], table: Table) -> None:
    """Copies released tensors into this rank's parameters. Each rank reads only its slices.

    Raises:
        ValueError: a tensor that is stored twice differs from its copy.
    """
    import torch

    from common import checkpoint

    reader, keys = weights.Reader(), {table.rename(name) for name, _ in checkpoint.parameters(chunks)}
    for copy, key in table.copies.items():
        if copy in entries and key in keys and not torch.equal(reader.read(entries[key]), reader.read(entries[copy])):
            raise ValueError(
                f"{entries[copy].file}: {copy} differs from {key}, to which it is tied; fix: --weights, or what its "
                "config.json says of it"
            )
    checkpoint.load_released(chunks, entries, lambda name: None if name in table.pieces else table.rename(name))
    with torch.no_grad():
        for name, parameter in checkpoint.parameters(chunks):
            for key, index in table.pieces.get(name, {}).items():
                _load_piece(parameter, index, entries[key], checkpoint.cuts(parameter), reader)


def _load_piece(parameter, index: tuple, entry: weights.Entry, cuts: list, reader: weights.Reader) -> None:
    """Copies one piece into this rank's part of a stacked tensor, if this rank holds it. A cut of the first dimension
    (experts) keeps pieces whole; a cut of another dimension cuts every piece alike."""
    first, (g, *where) = 0, index
    dim, part, parts = None, 0, 1
    for cut, rank, size in cuts:
        if cut == 0:
            first = rank * len(parameter)
            continue
        piece_dims = [i for i, at in enumerate((*index, *[slice(None)] * parameter.ndim)) if at == slice(None)]
        piece_dims = piece_dims[: len(entry.shape)]  # the piece has these dimensions, in reverse
        dim, part, parts = len(piece_dims) - 1 - piece_dims.index(cut), rank, size
    if first <= g < first + len(parameter):
        parameter[g - first, *where].copy_(reader.read(entry, dim, part, parts).t())


# ------------------------------------------------------------------------------------------------------------ writing


def write(out: Path, table: Table, source: Source) -> None:
    """Writes the tensors of a new folder. It holds one file's tensors at a time, and a stacked tensor while it writes
    its pieces."""
    pieces: dict[str, tuple[str, tuple | None]] = {}  # key -> (our name, index)
    for name in table.shapes:
        stacked = {key: (name, index) for key, index in table.pieces.get(name, {}).items()}
        pieces |= stacked or {table.rename(name): (name, None)}
    element = {name: source.element(name) for name in table.shapes}
    sizes = {key: element[pieces[key][0]] * math.prod(shape) for key, shape in table.released_shapes().items()}
    held: dict[str, torch.Tensor] = {}  # a stacked tensor serves many keys in a row

    def tensor(key: str) -> "torch.Tensor":
        name, index = pieces[key]
        if name not in held:
            held.clear()
            held[name] = source.read(name)
        return held[name] if index is None else held[name][index].t()

    weights.save(out, sizes, tensor, table.stem)


def write_sharded(out: Path, table: Table, source: Source, state: dict, extra_files: Iterable[Path] = ()) -> None:
    """Writes a sharded checkpoint at step 0, which any layout can read. Collective: every rank reads and writes its
    share of the tensors.

    state: facts about the model that the checkpoint stores; extra_files: small files that are copied into it.
    """
    import torch.distributed as dist

    from common import checkpoint

    mine = list(table.shapes)[dist.get_rank() :: dist.get_world_size()]
    checkpoint.save_tensors(out, {name: source.read(name) for name in mine}, {"step": 0} | state, extra_files)


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

    return Source(source.element, read)


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
