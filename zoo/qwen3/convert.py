"""Name map between the released Qwen3 layout and ours, and conversion to and from sharded checkpoints.

Our names are the released ones without the prefix `model.`. Only the experts' tensors differ, which are stacked here:

    layers.N.mlp.gate_up [G, D, 2, F]   mlp.experts.g.gate_proj.weight^T and mlp.experts.g.up_proj.weight^T, [F, D] each
    layers.N.mlp.down    [G, F, D]      mlp.experts.g.down_proj.weight^T, [D, F]

So every conversion is bit-exact, dtypes included. The released 0.6B and 1.7B store their tied embedding twice. Loading
checks that both copies are equal; writing stores one.

    bash zoo/qwen3/convert.sh --weights Qwen3-8B --to sharded --out Qwen3-8B-sharded
    bash zoo/qwen3/convert.sh --weights runs/my-run/checkpoints/step-005000 --to released --out my-8B
    bash zoo/qwen3/convert.sh --weights megatron-run --size 8B --to released --out my-8B      (megatron_import.py)
    bash zoo/qwen3/convert.sh --weights Qwen3-8B --adapter my-lora --to released --out my-8B
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from common import adapters, release, weights
from common.language.megatron_import import is_checkpoint
from common.release import Source, Table

from . import megatron_import
from .config import Qwen3Config, model_config, shapes

if TYPE_CHECKING:
    from .options import ConvertOptions

COPIED = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "generation_config.json",
          "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")  # fmt: skip


def released(name: str) -> str:
    """'layers.3.self_attn.q_proj.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
    return name if name.startswith(("lm_head", "score")) else f"model.{name}"


def expert_pieces(config: Qwen3Config) -> dict[str, dict[str, tuple]]:
    """Maps each of our stacked tensors to the released keys in it, each with the index where its transpose lies."""
    pieces, whole = {}, slice(None)
    for i in range(config.num_hidden_layers if config.num_experts else 0):
        keys = [f"model.layers.{i}.mlp.experts.{g}" for g in range(config.num_experts)]
        parts = [(g, key, p, part) for g, key in enumerate(keys) for p, part in enumerate(("gate", "up"))]
        pieces[f"layers.{i}.mlp.gate_up"] = {f"{key}.{part}_proj.weight": (g, whole, p) for g, key, p, part in parts}
        pieces[f"layers.{i}.mlp.down"] = {f"{key}.down_proj.weight": (g,) for g, key in enumerate(keys)}
    return pieces


def table(config: Qwen3Config) -> Table:
    return Table(
        shapes=shapes(config),
        rename=released,
        pieces=expert_pieces(config),
        copies={"lm_head.weight": "model.embed_tokens.weight"} if config.is_tied else {},
        ignored=("lm_head.weight",) if config.num_labels else (),  # a reward model may start from a language model
        optional=("score.weight",) if config.num_labels else (),
        stem="model",
    )


def has_score(folder: Path) -> bool:
    """Returns whether a released folder or a sharded checkpoint is a reward model."""
    if release.is_sharded(folder):
        return bool(json.loads((folder / "state.json").read_text())["model"].get("num_labels"))
    return "score.weight" in weights.index(folder)


def open_source(folder: Path, config: Qwen3Config) -> Source:
    """Opens the parameters of a folder: a sharded checkpoint, a released folder, or a checkpoint of Megatron-LM."""
    if is_checkpoint(folder):
        return megatron_import.open_source(folder, config)
    return release.open_source(folder, table(config))


def write_released(out: Path, config: Qwen3Config, source: Source, copy_from: Path | None) -> None:
    """Writes the released layout, and copies the tokenizer's files from the folder `copy_from`."""
    release.write(out, table(config), source)
    (out / "config.json").write_text(json.dumps(config.to_released(), indent=2))
    release.copy_files(COPIED, copy_from, out)


def adapter(path: Path, config: Qwen3Config) -> dict[str, adapters.Pair]:
    """Reads an adapter's folder or file for this model. Every matrix of the release can have one. Those of experts have
    their names in the release, the others ours.

    Raises:
        ValueError: see `adapters.read` and `adapters.of_experts`.
    """
    ours, pieces = shapes(config), expert_pieces(config)
    linears = {name.removesuffix(".weight"): released(name) for name, shape in ours.items() if len(shape) == 2}
    experts = [key for keys in pieces.values() for key in keys]
    linears |= {key.removesuffix(".weight"): key for key in experts}
    linears = {linear: key.removesuffix(".weight") for linear, key in linears.items()}
    file_format = adapters.Format(prefix="base_model.model.", linears=linears, settings=True)
    released_shapes = table(config).released_shapes()
    found, _ = adapters.read(path, {"PEFT's": file_format}, ours | {key: released_shapes[key] for key in experts})
    adapters.of_experts(found, adapters.families(pieces))
    return found


def main(o: "ConvertOptions") -> None:
    import torch.distributed as dist

    config = model_config(o)
    source = open_source(o.weights, config)
    if o.adapter:
        source = release.merge_adapter(source, adapter(o.adapter, config), pieces=expert_pieces(config))
    if o.to == "sharded":
        state = {"model": dataclasses.asdict(config)}
        release.write_sharded(o.out, table(config), source, state, [o.weights / name for name in COPIED])
    elif dist.get_rank() == 0:
        write_released(o.out, config, source, o.weights)
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"{o.out}: {config.parameters:,} parameters, {len(shapes(config))} tensors", flush=True)
        if not (o.out / "tokenizer.json").is_file():
            print(f"note: {o.weights} has no tokenizer.json to copy; add the tokenizer's files to {o.out}", flush=True)
