"""What the options of low-rank adapters are checked for, without torch: names of linears, what can be trained of an
adapter's file."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from common import adapters, weights

from . import convert
from .config import model_config

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


def check_trained(o: TrainOptions, config: WanConfig) -> None:
    """What --adapter brings is factors, which train, and nothing else."""
    _, differences = convert.adapter(o.adapter, config)
    if differences:
        raise ValueError(
            f"{o.adapter} also changes {len(differences)} whole parameters, first {next(iter(differences))}, which no "
            "adapter holds; expected factors alone to train; fix: convert.sh --adapter with it, then --weights with that"
        )


# Adapted from zoo.qwen3.options.starting_point: no quantised base; the transformer alone is trained.
def starting_point(o: TrainOptions) -> dict:
    """What a run starts from, told by content: it goes on beside no other weights."""
    folder = o.weights / "transformer" if (o.weights / "transformer").is_dir() else o.weights
    base = f"drawn with seed {o.seed}" if o.from_scratch else weights.fingerprint(folder)
    start = {"weights": str(o.weights.absolute()), "base": base}
    if o.adapter:
        settings = [pair.settings for pair in convert.adapter(o.adapter, model_config(o))[0].values()]
        r, alpha = adapters.spread(s.r for s in settings), adapters.spread(s.lora_alpha for s in settings)
        return start | {"adapter": weights.fingerprint(o.adapter), "r": r, "alpha": alpha}
    if not o.adapts:
        return start
    return start | {"r": o.lora_rank, "alpha": o.lora_alpha, "rslora": o.rslora, "targets": o.lora_targets}
