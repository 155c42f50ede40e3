"""What the options of low-rank adapters are checked for, without torch: names of linears, an adapter folder's headers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from common import weights

from . import convert

if TYPE_CHECKING:
    from .config import WanConfig
    from .options import TrainOptions


def check_targets(o: TrainOptions, config: WanConfig) -> None:
    """Every target is the end of a linear's name. Those are the matrices; other parameters are called by nobody."""
    linears = [name.removesuffix(".weight") for name, shape in convert.shapes(config).items() if len(shape) == 2]
    unknown = [t for t in o.lora_targets.split(",") if not any(f".{name}".endswith(f".{t}") for name in linears)]
    if unknown:
        kinds = dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", name) for name in linears)
        raise ValueError(
            f"lora_targets: no linear is called {', '.join(map(repr, unknown))}; expected the ends of some of "
            f"{', '.join(kinds)}; fix: --lora-targets"
        )


def check_folder(folder: Path, config: WanConfig) -> None:
    """An adapter folder fits this size, by its headers."""
    settings = folder / "adapter_config.json"
    if not settings.is_file():
        raise ValueError(f"{settings} does not exist; expected an adapter's folder (PEFT's format); fix: --adapter")
    rank = weights.read_json(settings).get("r")
    linears = {convert.to_diffusers(n).removesuffix(".weight"): s for n, s in convert.shapes(config).items()}
    for key, entry in weights.index(folder, weights.PEFT_FILES).items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        if len(shape := linears.get(name, ())) != 2:
            raise ValueError(f"{folder} has {key}, of which this model has no linear; fix: --adapter or --weights")
        want = (rank, shape[1]) if part.startswith("A") else (shape[0], rank)
        if entry.shape != want:
            raise ValueError(
                f"{folder}: {key} is {list(entry.shape)}; expected {list(want)} (rank {rank} of adapter_config.json, "
                f"hidden size {config.dim} of the model); fix: --adapter, --size or --weights"
            )


# Adapted from zoo.qwen3.options.starting_point: no quantised base; the transformer alone is trained.
def starting_point(o: TrainOptions) -> dict:
    """What a run starts from, told by content: it goes on beside no other weights."""
    folder = o.weights / "transformer" if (o.weights / "transformer").is_dir() else o.weights
    base = f"drawn with seed {o.seed}" if o.from_scratch else weights.fingerprint(folder)
    start = {"weights": str(o.weights.absolute()), "base": base}
    if o.adapter:
        settings = weights.read_json(o.adapter / "adapter_config.json")
        adapter = {
            "adapter": weights.fingerprint(o.adapter),
            "r": settings.get("r"),
            "alpha": settings.get("lora_alpha"),
        }
        return start | adapter
    if not o.adapts:
        return start
    return start | {"r": o.lora_rank, "alpha": o.lora_alpha, "rslora": o.rslora, "targets": o.lora_targets}
