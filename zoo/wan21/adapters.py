"""What the options of low-rank adapters are checked for, without torch: names of linears, an adapter folder's headers, and
that a run goes on from what it began with."""

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
    """What adapters start from, and dpo compares with, told by content: a run goes on beside no other weights."""
    base = f"drawn with seed {o.seed}" if o.from_scratch else weights.fingerprint(o.weights / "transformer")
    start = {"weights": str(o.weights), "base": base}
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


# Adapted from zoo.qwen3.options._check_start: adapters, and dpo with or without them, have a starting point here.
def check_start(o: TrainOptions) -> None:
    """A run goes on from what it started from; without --weights, say, it would go on from the demo's."""
    named = Path(o.resume) if o.resume not in ("auto", "never") else None
    states = [named / "state.json"] if named else sorted(o.out.glob("checkpoints/step-*/state.json"))
    if o.resume == "never" or not states or not states[-1].is_file():
        return
    saved = weights.read_json(states[-1]).get("start", {})
    now = starting_point(o) if o.adapts or o.job == "dpo" else {}
    differs = [f"{key} {saved.get(key)!r} and not {now.get(key)!r}" for key in {**saved, **now} if key != "weights"
               and saved.get(key) != now.get(key)]  # fmt: skip
    if differs:
        raise ValueError(
            f"{states[-1].parent} was trained from {', '.join(differs)}; fix: --weights {saved.get('weights')} and the "
            "adapters' options as they were, or --resume never"
        )
