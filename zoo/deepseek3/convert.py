"""Name map between the released DeepSeek-V3 layout and ours, and conversion to and from sharded checkpoints.

Our names are the released ones without the prefix `model.`. Only the experts' tensors differ, which are stacked here:

    layers.N.mlp.gate_up [G, D, 2, F]   mlp.experts.g.gate_proj.weight^T and mlp.experts.g.up_proj.weight^T, [F, D] each
    layers.N.mlp.down    [G, F, D]      mlp.experts.g.down_proj.weight^T, [D, F]

So every conversion is bit-exact, dtypes included. The release stores embedding and vocabulary projection a second time,
in layer 61, the multi-token prediction module. Loading checks that the copies are equal.

    bash zoo/deepseek3/convert.sh --weights DeepSeek-V3 --to sharded --out DeepSeek-V3-sharded
    bash zoo/deepseek3/convert.sh --weights runs/my-run/checkpoints/step-005000 --to released --out my-V3
    bash zoo/deepseek3/convert.sh --weights DeepSeek-V3 --adapter my-lora --to released --out my-V3
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from common import adapters, release
from common.release import Source, Table

from .config import Deepseek3Config, model_config, shapes, stored_config

if TYPE_CHECKING:
    from .options import ConvertOptions

COPIED = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "generation_config.json",
          "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")  # fmt: skip


FP8 = tuple(
    f"{linear}.weight"
    for linear in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj",
                   "down_proj")
)  # fmt: skip


def released(name: str) -> str:
    """'layers.3.self_attn.q_proj.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
    return name if name.startswith("lm_head") else f"model.{name}"


def expert_pieces(config: Deepseek3Config) -> dict[str, dict[str, tuple]]:
    """Maps each of our stacked tensors to the released keys in it, each with the index where its transpose lies."""
    pieces, whole = {}, slice(None)
    for i in config.expert_layers:
        keys = [f"model.layers.{i}.mlp.experts.{g}" for g in range(config.n_routed_experts)]
        parts = [(g, key, p, part) for g, key in enumerate(keys) for p, part in enumerate(("gate", "up"))]
        pieces[f"layers.{i}.mlp.gate_up"] = {f"{key}.{part}_proj.weight": (g, whole, p) for g, key, p, part in parts}
        pieces[f"layers.{i}.mlp.down"] = {f"{key}.down_proj.weight": (g,) for g, key in enumerate(keys)}
    return pieces


def table(config: Deepseek3Config) -> Table:
    """Returns the table of the release. Without the multi-token prediction module, its tensors are ignored."""
    module = f"model.layers.{config.num_hidden_layers}."
    shared = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    return Table(
        shapes=shapes(config),
        rename=released,
        pieces=expert_pieces(config),
        copies={module + name: key for name, key in shared.items()} if config.num_nextn_predict_layers else {},
        writes_copies=True,
        ignored=() if config.num_nextn_predict_layers else (module,),
        fp8=FP8,
        stem="model",
    )


def open_source(folder: Path, config: Deepseek3Config) -> Source:
    """Opens the parameters of a folder: a sharded checkpoint or a released folder."""
    return release.open_source(folder, table(config))


def write_released(
    out: Path, config: Deepseek3Config, source: Source, copy_from: Path | None, fp8: bool = False
) -> None:
    """Writes the released layout, with fp8 in the release's own dtypes, and copies the tokenizer's files from the folder
    `copy_from`."""
    release.write(out, table(config), source, fp8)
    values = config.to_released() | ({"quantization_config": release.fp8_config(table(config))} if fp8 else {})
    (out / "config.json").write_text(json.dumps(values, indent=2))
    release.copy_files(COPIED, copy_from, out)


def with_module(o, config: Deepseek3Config, source: Source) -> tuple[Deepseek3Config, Source]:
    """Adds to what a run of lora.sh or dpo.sh writes the multi-token prediction module of --weights, which such a run
    leaves alone. Returns the architecture and the parameters to write."""
    full = stored_config(o)
    if o.from_scratch or not full.num_nextn_predict_layers or not (o.adapts or o.job == "dpo"):
        return config, source
    base, own = open_source(o.weights, full), shapes(config)
    return full, Source(
        lambda name: (source if name in own else base).element(name),
        lambda name: (source if name in own else base).read(name),
        base.scales,
    )


def adapter(path: Path, config: Deepseek3Config) -> dict[str, adapters.Pair]:
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
        write_released(o.out, config, source, o.weights, o.fp8)
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"{o.out}: {config.parameters:,} parameters, {len(shapes(config))} tensors", flush=True)
        if not (o.out / "tokenizer.json").is_file():
            print(f"note: {o.weights} has no tokenizer.json to copy; add the tokenizer's files to {o.out}", flush=True)
