"""Name map between the two released layouts of Wan2.1, and conversion to and from sharded checkpoints.

Our parameter names and shapes are the original checkpoint's. diffusers renames them (and swaps norm2 and norm3) but
changes no tensor. So every conversion only renames and is bit-exact, dtypes included.

    bash zoo/wan21/convert.sh --weights Wan2.1-T2V-14B --to diffusers --out Wan2.1-T2V-14B-Diffusers
    bash zoo/wan21/convert.sh --weights runs/my-run/checkpoints/step-005000 --to original --out my-14B
    bash zoo/wan21/convert.sh --weights Wan2.1-T2V-14B-Diffusers --adapter my-lora --to diffusers --out merged
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common import adapters, release, weights
from common.release import Source, Table, is_sharded

from .config import WanConfig, model_config, shapes

if TYPE_CHECKING:
    from .options import ConvertOptions

PARTS = ("vae", "text_encoder", "tokenizer", "scheduler", "image_encoder", "image_processor")  # besides the transformer

# original name -> diffusers name; `N` stands for a block index.
TABLE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    **{
        f"img_emb.proj.{ours}": f"condition_embedder.image_embedder.{theirs}"
        for ours, theirs in {0: "norm1", 1: "ff.net.0.proj", 3: "ff.net.2", 4: "norm2"}.items()
    },
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    "blocks.N.modulation": "blocks.N.scale_shift_table",
    "blocks.N.norm3": "blocks.N.norm2",
    "blocks.N.ffn.0": "blocks.N.ffn.net.0.proj",
    "blocks.N.ffn.2": "blocks.N.ffn.net.2",
    **{
        f"blocks.N.{ours}.{part}": f"blocks.N.{theirs}.{new}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, new in {
            "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
        }.items()
    },
    "blocks.N.cross_attn.k_img": "blocks.N.attn2.add_k_proj",
    "blocks.N.cross_attn.v_img": "blocks.N.attn2.add_v_proj",
    "blocks.N.cross_attn.norm_k_img": "blocks.N.attn2.norm_added_k",
}  # fmt: skip


def to_diffusers(name: str) -> str:
    """'blocks.3.self_attn.q.weight' -> 'blocks.3.attn1.to_q.weight'. KeyError: not a name of this model."""
    module, _, leaf = name.rpartition(".") if not name.endswith(("modulation", "emb_pos")) else (name, "", "")
    index = re.search(r"\.(\d+)\.", module) if module.startswith("blocks.") else None
    pattern = re.sub(r"^blocks\.\d+\.", "blocks.N.", module)
    new = TABLE[pattern].replace("N", index.group(1)) if index else TABLE[pattern]
    return f"{new}.{leaf}" if leaf else new


def table(config: WanConfig, diffusers: bool) -> Table:
    """Returns the table of the release in the diffusers layout or in the original one, whose names are ours. Some early
    exports hold a norm that no version of the model applies. It is ignored, as in diffusers."""
    ignored = (".attn2.norm_added_q.weight",) if diffusers and config.image_dim is not None else ()
    rename = to_diffusers if diffusers else str
    return Table(shapes=shapes(config), rename=rename, ignored=ignored, stem="diffusion_pytorch_model")


def find_transformer(folder: Path, config: WanConfig) -> tuple[Path, Table]:
    """Returns the folder that holds the transformer of a weights folder, and its table."""
    diffusers = (folder / "transformer").is_dir()
    return folder / "transformer" if diffusers else folder, table(config, diffusers)


def fill(chunks, o, config: WanConfig, draw: Callable) -> None:
    """Fills the model's parameters: each rank reads its slices of --weights. With --from-scratch, `draw` fills them."""
    folder, names = find_transformer(o.weights, config)
    release.fill(chunks, o, names, draw, folder)


def write_released(out: Path, to: str, config: WanConfig, source: Source, copy_from: Path | None) -> None:
    """Writes the transformer in the `diffusers` or `original` layout. For diffusers it also copies the other parts that
    the folder `copy_from`."""
    if to == "original":
        release.write(out, table(config, False), source)
        (out / "config.json").write_text(json.dumps(config.to_original(), indent=2))
        return
    out.mkdir(parents=True, exist_ok=True)
    release.write(out / "transformer", table(config, True), source)
    (out / "transformer" / "config.json").write_text(json.dumps(config.to_diffusers(), indent=2))
    release.copy_files((*PARTS, "model_index.json"), copy_from, out)
    if not (out / "model_index.json").is_file():
        print(f"note: {out} holds the transformer only; take the VAE and text encoder from the diffusers release")


# ---- adapters ----


def _in_diffusers(linear: str) -> str:
    return to_diffusers(f"{linear}.weight").removesuffix(".weight")


def _underscored(linear: str) -> str:
    return linear.replace(".", "_")


FORMATS = {  # the tool that writes an adapter -> (prefix of every name, function from our linear's name to its name)
    "PEFT's over diffusers": ("base_model.model.", _in_diffusers),
    "PEFT's over the original code": ("base_model.model.", str),
    "diffusers'": ("transformer.", _in_diffusers),
    "diffusers' of a transformer alone": ("", _in_diffusers),
    "diffusion-pipe's, ComfyUI's or lightx2v's": ("diffusion_model.", str),
    "musubi's or kohya's": ("lora_unet_", _underscored),
    "kohya's of Wan-Fun": ("lora_unet__", _underscored),
    "DiffSynth's": ("", str),
    "DiffSynth's of a pipeline": ("pipe.dit.", str),
}
# Whole differences of parameters in lightx2v's distilled adapters: last part of our name -> what replaces it there.
DIFFERENCES = {"weight": ["diff"], "bias": ["diff_b"], "modulation": ["diff_m", "modulation.diff"]}


def adapter(path: Path, config: WanConfig) -> tuple[dict[str, adapters.Pair], dict[str, weights.Entry]]:
    """Reads an adapter's folder or file for this model.

    Raises:
        ValueError: see `adapters.read`.
    """
    ours = shapes(config)
    linears = [name.removesuffix(".weight") for name, shape in ours.items() if len(shape) == 2]
    leaves = ((name, *name.rpartition(".")[::2]) for name in ours)  # (name, module, leaf)
    differences = {f"{module}.{end}": name for name, module, leaf in leaves for end in DIFFERENCES.get(leaf, ())}
    formats = {
        kind: adapters.Format(
            prefix=prefix,
            linears={linear: rename(linear) for linear in linears},
            differences=differences if prefix == "diffusion_model." else {},
            settings=prefix == "base_model.model.",
        )
        for kind, (prefix, rename) in FORMATS.items()
    }
    return adapters.read(path, formats, ours)


def write_pipeline_file(folder: Path) -> None:
    """Adds to a PEFT adapter folder the file that `WanPipeline.load_lora_weights` looks for: the same tensors with
    names under `transformer.`, and the settings in the header. Without settings, diffusers takes the rank as alpha."""
    from safetensors.torch import save_file

    reader, file = weights.Reader(), folder / adapters.PIPELINE_FILE
    tensors = {
        key.replace("base_model.model.", "transformer.", 1): reader.read(entry)
        for key, entry in weights.index(folder, weights.PEFT_FILES).items()
    }
    facts = weights.read_json(folder / "adapter_config.json")
    keys = ("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "target_modules", "rank_pattern", "alpha_pattern")
    header = {adapters.HEADER: json.dumps({f"transformer.{key}": facts[key] for key in keys}), "format": "pt"}
    save_file(tensors, file, metadata=header)
    file.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read


def main(o: "ConvertOptions") -> None:
    import torch.distributed as dist

    config = model_config(o)
    source = release.open_source(*find_transformer(o.weights, config), o.ema)
    if o.adapter:
        source = release.merge_adapter(source, *adapter(o.adapter, config))
    if o.to == "sharded":
        release.write_sharded(o.out, table(config, False), source, {"model": dataclasses.asdict(config)})
    elif dist.get_rank() == 0:
        to = "original" if o.to == "original" else "diffusers"
        write_released(o.out, to, config, source, None if is_sharded(o.weights) else o.weights)
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"{o.out}: {config.parameters:,} parameters, {len(shapes(config))} tensors", flush=True)
