"""Name map between the released Qwen3 layout and ours, and conversion to and from sharded checkpoints.

Our names are the released ones without their `model.`; the only tensors that differ are the experts, which are stacked:

    layers.N.mlp.gate_up [G, D, 2, F]   mlp.experts.g.gate_proj.weight^T and mlp.experts.g.up_proj.weight^T, [F, D] each
    layers.N.mlp.down    [G, F, D]      mlp.experts.g.down_proj.weight^T, [D, F]

so every conversion is bit-exact, dtypes included. The released 0.6B and 1.7B store their tied embedding twice; the
second copy is compared, and not written again.

    bash zoo/qwen3/convert.sh --weights Qwen3-8B --to sharded --out Qwen3-8B-sharded
    bash zoo/qwen3/convert.sh --weights runs/my-run/checkpoints/step-005000 --to released --out my-8B
    bash zoo/qwen3/convert.sh --weights megatron-run --size 8B --to released --out my-8B      (megatron_import.py)
    bash zoo/qwen3/convert.sh --weights Qwen3-8B --adapter my-lora --to released --out my-8B
"""

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common import adapters, weights
from common.language import megatron_import as megatron

from . import megatron_import
from .config import Qwen3Config, is_sharded, model_config, shapes

if TYPE_CHECKING:
    import torch

    from .options import ConvertOptions

STEM = "model"  # the release names its files so
COPIED = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "generation_config.json",
          "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")  # fmt: skip


def released(name: str) -> str:
    """'layers.3.self_attn.q_proj.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
    return name if name.startswith("lm_head") else f"model.{name}"


def expert_pieces(name: str, config: Qwen3Config) -> dict[str, tuple]:
    """Released key -> the index of its transpose in our stacked tensor; empty for a tensor that is not stacked."""
    found = re.fullmatch(r"layers\.(\d+)\.mlp\.(gate_up|down)", name)
    if not found:
        return {}
    stem, every = f"model.layers.{found[1]}.mlp.experts", slice(None)
    if found[2] == "down":
        return {f"{stem}.{g}.down_proj.weight": (g,) for g in range(config.num_experts)}
    parts = [(g, i, part) for g in range(config.num_experts) for i, part in enumerate(("gate", "up"))]
    return {f"{stem}.{g}.{part}_proj.weight": (g, every, i) for g, i, part in parts}


def released_shapes(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the release, by its key."""
    D, width = config.hidden_size, config.moe_intermediate_size
    out = {}
    for name, shape in shapes(config).items():
        pieces = expert_pieces(name, config)
        out |= {key: (D, width) if "down" in key else (width, D) for key in pieces} or {released(name): shape}
    return out


def released_entries(folder: Path, config: Qwen3Config) -> dict[str, weights.Entry]:
    """The tensors of a released folder, strictly checked.

    Raises:
        ValueError: missing, extra or misshaped tensors, pickled or torn files.
    """
    entries = weights.index(folder)
    expected = released_shapes(config)
    if config.tie_word_embeddings and "lm_head.weight" in entries:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    weights.check(entries, expected, folder)
    return entries


def fill(chunks, o, config: Qwen3Config) -> None:
    """A model's memory: released weights or a checkpoint's, each rank its slice; or, with --from-scratch, drawn ones."""
    from common import checkpoint

    from .model import draw

    if getattr(o, "from_scratch", False):
        checkpoint.initialize(chunks, o.seed, functools.partial(draw, config))
    elif is_sharded(o.weights):
        checkpoint.load(o.weights, chunks)
    else:
        load(chunks, released_entries(o.weights, config), config)


def load(chunks, entries: dict[str, weights.Entry], config: Qwen3Config) -> None:
    """Copy released tensors into this rank's parameters: each rank reads only its slice.

    Raises:
        ValueError: a tied embedding's second copy differs from the first.
    """
    import torch
    from megatron.core import parallel_state as mpu

    from common import checkpoint

    reader = weights.Reader()
    if config.tie_word_embeddings and "lm_head.weight" in entries:
        embedding, copy = entries["model.embed_tokens.weight"], entries["lm_head.weight"]
        if not torch.equal(reader.read(embedding), reader.read(copy)):
            raise ValueError(
                f"{copy.file}: lm_head.weight differs from the embedding it is tied to; fix: --weights, or "
                "tie_word_embeddings in its config.json"
            )
    checkpoint.load_released(chunks, entries, lambda name: None if expert_pieces(name, config) else released(name))
    etp = (mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size())
    with torch.no_grad():
        for name, parameter in checkpoint.parameters(chunks):
            first = mpu.get_expert_model_parallel_rank() * len(parameter)  # of the experts held here
            for key, (g, *where) in expert_pieces(name, config).items():
                if first <= g < first + len(parameter):
                    # The experts' columns are split: rows of the released gate and up, columns of down.
                    part = reader.read(entries[key], 1 if "down" in key else 0, *etp)
                    parameter[g - first, *where].copy_(part.t())


def write_released(
    out: Path, config: Qwen3Config, dtypes: dict[str, int], read: Callable[[str], "torch.Tensor"], source: Path | None
) -> None:
    """Write the released layout, with the tokenizer of `source` if it has one.

    dtypes: bytes of an element by our parameter name; read(our name) gives the tensor.
    """
    pieces = {}  # released key -> (our name, where in it)
    for name in shapes(config):
        stacked = expert_pieces(name, config)
        pieces |= {key: (name, where) for key, where in stacked.items()} or {released(name): (name, None)}
    sizes = {key: dtypes[pieces[key][0]] * _count(shape) for key, shape in released_shapes(config).items()}
    held: dict[str, torch.Tensor] = {}  # a stacked tensor serves many keys in a row

    def tensor(key: str) -> "torch.Tensor":
        name, where = pieces[key]
        if name not in held:
            held.clear()
            held[name] = read(name)
        return held[name] if where is None else held[name][where].t()

    weights.save(out, sizes, tensor, STEM)
    (out / "config.json").write_text(json.dumps(config.to_released(), indent=2))
    for name in COPIED:
        if source and (source / name).is_file():
            shutil.copy2(source / name, out)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def source(folder: Path, config: Qwen3Config) -> tuple[Callable[[str], int], Callable[[str], "torch.Tensor"]]:
    """(bytes of an element, the tensor) of a parameter by our name; folder: sharded, released, or of Megatron-LM."""
    import torch

    from common import checkpoint

    wanted = shapes(config)
    if is_sharded(folder):
        sizes = checkpoint.tensor_sizes(folder)
        return lambda name: sizes[name] // _count(wanted[name]), functools.partial(checkpoint.read_tensor, folder)
    if megatron.is_checkpoint(folder):
        return megatron_import.source(folder, config)
    entries, reader = released_entries(folder, config), weights.Reader()
    first = {name: entries[next(iter(expert_pieces(name, config)), released(name))] for name in wanted}

    def read(name: str) -> "torch.Tensor":
        pieces = expert_pieces(name, config)
        if not pieces:
            return reader.read(entries[released(name)])
        whole = torch.empty(wanted[name], dtype=reader.read(first[name]).dtype)
        for key, where in pieces.items():
            whole[where] = reader.read(entries[key]).t()
        return whole

    return lambda name: first[name].bytes // _count(first[name].shape), read


def adapter(path: Path, config: Qwen3Config) -> dict[str, adapters.Pair]:
    """`adapters.read` of an adapter's folder or file for this model: of every matrix of the release but the experts'.

    Raises:
        ValueError: as there.
    """
    ours = shapes(config)
    linears = [name.removesuffix(".weight") for name, shape in ours.items() if len(shape) == 2]
    theirs = {linear: released(linear) for linear in linears}
    form = adapters.Format(prefix="base_model.model.", linears=theirs, settings=True)
    return adapters.read(path, {"PEFT's": form}, ours)[0]


def merging(path: Path, config: Qwen3Config, read: Callable) -> Callable[[str], "torch.Tensor"]:
    """`read` with an adapter merged into each tensor as it passes: W + s B A in fp32, rounded once to the dtype of W."""
    from common import lora

    pairs, reader = adapter(path, config), weights.Reader()
    return lambda name: lora.added(read(name), pairs.get(name.removesuffix(".weight")), None, reader)


def main(o: "ConvertOptions") -> None:
    import torch.distributed as dist

    from common import checkpoint

    config, wanted = model_config(o), shapes(model_config(o))
    element, read = source(o.weights, config)
    if o.adapter:
        read = merging(o.adapter, config, read)

    if o.to == "sharded":  # every rank reads and writes its share of the tensors; any layout reads the result
        mine = list(wanted)[dist.get_rank() :: dist.get_world_size()]
        state = {"step": 0, "model": dataclasses.asdict(config)}
        tokenizer = [o.weights / name for name in COPIED]
        checkpoint.save_tensors(o.out, {name: read(name) for name in mine}, state, tokenizer)
    elif dist.get_rank() == 0:
        write_released(o.out, config, {name: element(name) for name in wanted}, read, o.weights)
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"{o.out}: {config.parameters:,} parameters, {len(wanted)} tensors", flush=True)
        if not (o.out / "tokenizer.json").is_file():
            print(f"note: {o.weights} has no tokenizer.json to copy; add the tokenizer's files to {o.out}", flush=True)
