"""Options, and checks of them, that the jobs of every recipe share. This module does not import torch."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import adapters, cli, weights
from common.cli import TrainOptions, option
from common.release import is_sharded

LORA_RANK = 16  # rank of adapters if no other is given
LORA_SETTINGS = ("--lora-rank", "--lora-alpha", "--lora-dropout", "--lora-targets", "--rslora")


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """The options of adapters. A recipe redefines those that have another default there."""

    lora_rank: int | None = option(
        f"rank of the adapters ({LORA_RANK} if not given)", group="adapters", within="[1, inf)"
    )
    lora_alpha: float = option("their output is scaled by alpha / rank", 32.0, group="adapters", within="(0, inf)")
    lora_dropout: float = option("dropout of their input", 0.0, group="adapters", within="[0, 1)")
    lora_targets: str = option("linears to adapt, by the ends of their names", "", group="adapters")
    rslora: bool = option("scale by alpha / sqrt(rank)", False, group="adapters")
    adapter: Path | None = option("adapter folder or file to start from; its settings decide", group="adapters")
    merge: Path | None = option("write released weights with the adapters added here at the end", group="adapters")


def flag_of(name: str) -> str:
    """'lora_rank' -> '--lora-rank'."""
    return "--" + name.replace("_", "-")


def fill_defaults(
    o: TrainOptions, flags: set[str], job_values: dict[str, Any], demo_values: dict[str, Any]
) -> TrainOptions:
    """Return the options with a job's own values in place of the layout's.

    flags: those given on the command line. job_values: values for options whose flag is not given. demo_values: values
    that the embedded demo always has.
    """
    changes = demo_values | {name: value for name, value in job_values.items() if flag_of(name) not in flags}
    return cli.shorten_warmup(dataclasses.replace(o, **changes), flags)


def check_written(o) -> None:
    """Check what a training run writes at its end. Raise ValueError if it exists already, or if --merge has no released
    weights to merge into."""
    if o.merge and o.from_scratch:
        raise ValueError("--merge adds adapters to released weights, and these are drawn; fix: leave --merge out")
    for folder, flag in ((o.export, "--export"), (o.merge, "--merge")):
        if folder:
            weights.refuse_existing(folder, flag)


def content_name(folder: Path) -> str:
    """Return a short name for the content of a released folder, an adapter or a checkpoint."""
    manifest = folder / "manifest.json"
    return f"{folder.resolve()} {manifest.stat().st_mtime_ns}" if is_sharded(folder) else weights.fingerprint(folder)


def starting_point(o, base: Path, pairs: dict[str, adapters.Pair], targets: list[str] | str) -> dict:
    """Return what a run starts from, identified by content: checkpoints of adapters, and log-probabilities of a
    reference, are valid only for the same weights.

    base: folder of the weights that train or are adapted; pairs: the adapters of --adapter; targets: of new adapters.
    """
    start = {
        "weights": str(o.weights and o.weights.absolute()),
        "base": f"drawn with seed {o.seed}" if o.from_scratch else content_name(base),
    }
    if o.adapter:
        settings = [pair.settings for pair in pairs.values()]
        r, alpha = adapters.shared_or_all(s.r for s in settings), adapters.shared_or_all(s.lora_alpha for s in settings)
        start |= {"adapter": content_name(o.adapter), "r": r, "alpha": alpha}
    elif o.adapts:
        start |= {"r": o.lora_rank, "alpha": o.lora_alpha, "rslora": o.rslora, "targets": targets}
    return start
