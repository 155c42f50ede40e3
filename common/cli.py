"""The options that all launchers share (design in README.md, "Options"), and the start of a job's processes.

    python -m common.cli zoo.wan21 train --size tiny --steps 10

checks the options in one process without torch, so that `--help` and every refusal take well under two seconds and come
before any process group. Then torchrun starts `common.worker zoo.wan21 train` on every device. The workers read the
resolved options from the environment.

A recipe's `options.py` holds its option dataclasses, built on the ones here, and `parse(script, argv)`. A value comes
from the first of these that sets it: the command line, the named layout of `parallel.toml`, the dataclass default. Bad
input raises `ValueError("<what is wrong>; expected <rule>; fix: <flag or file>")`: printed as one line, exit code 2.
"""

import argparse
import dataclasses
import difflib
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from common import processes

FROM_LAYOUT = "from_layout"


def option(help: str, default: Any = None, *, group: str = "job", layout: bool = False, within: str = "") -> Any:
    """Return a dataclass field that --help shows under `group`.

    layout: a layout of parallel.toml may set it. within: the interval in which a number must lie, e.g. "[0, 1)".
    """
    return field(default=default, metadata={"help": help, "group": group, FROM_LAYOUT: layout, "within": within})


def _count(variable: str) -> int:
    text = os.environ.get(variable, "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{variable}={text!r}; expected a whole number of at least 1; fix: {variable}")
    return int(text)


class JobOptions:
    """Values of options that shared code reads from every job, for jobs without an option of that name. An option
    dataclass extends this class, and its options replace the class attributes. A misspelt name still fails."""

    job = data = out = export = merge = adapter = global_batch = None
    from_scratch = adapts = compile = offload_activations = fused_comm = False
    overlap_param_gather = offload_optimizer = master_remainders = False
    moments, quantize = "fp32", "none"


@dataclass(frozen=True, kw_only=True)
class LayoutOptions(JobOptions):
    """Options that choose the model and its layout over the devices."""

    size: str = option("published size, or tiny", group="model")
    weights: Path | None = option("released Hugging Face / diffusers folder (safetensors)", group="model")
    layout: str = option("named layout of parallel.toml (default: the one named like the size)", group="layout")
    tp: int = option("tensor parallel", 1, group="layout", layout=True, within="[1, inf)")
    sp: bool = option("sequence parallel over the tensor-parallel group", False, group="layout", layout=True)
    pp: int = option("pipeline stages", 1, group="layout", layout=True, within="[1, inf)")
    vpp: int = option(
        "model chunks per pipeline stage (interleaved 1F1B)", 1, group="layout", layout=True, within="[1, inf)"
    )
    stages: str = option(
        "layers of each pipeline stage (with --vpp: of each of its chunks, in the network's order), e.g. 10,12,14 "
        "(default: as many each)",
        "", group="layout", layout=True,
    )  # fmt: skip
    cp: int = option("context parallel", 1, group="layout", layout=True, within="[1, inf)")
    ulysses: int = option(
        "ranks of --cp that exchange heads; the rest form a ring", None, group="layout", layout=True, within="[1, inf)"
    )
    ep: int = option(
        "expert parallel, over data x context (x tensor) parallel ranks",
        1,
        group="layout",
        layout=True,
        within="[1, inf)",
    )
    etp: int = option(
        "ranks of --tp that split one expert: all of them, or 1 (default: all)",
        None,
        group="layout",
        layout=True,
        within="[1, inf)",
    )
    fsdp: bool = option("shard parameters over data parallel (ZeRO-3, FSDP2)", False, group="layout", layout=True)
    micro_batch: int = option(
        "samples per forward of one rank, at most its share of the batch",
        1,
        group="layout",
        layout=True,
        within="[1, inf)",
    )
    global_batch: int = option(
        "samples per optimizer step, whole cluster", None, group="layout", layout=True, within="[1, inf)"
    )
    precision: Literal["fp32", "bf16"] = option("compute and weight precision", "bf16", group="layout", layout=True)
    recompute: Literal["none", "selective", "full"] = option(
        "activations recomputed in the backward: norms, activations and such (selective), or whole blocks",
        "none",
        group="layout",
        layout=True,
    )
    dry_run: bool = option("say what would run, check everything checkable, run nothing", False, group="run")
    print_config: bool = option("print the resolved options as TOML and stop", False, group="run")

    @property
    def world(self) -> int:
        """Number of processes, from the launcher's or torchrun's environment."""
        return _count("WORLD_SIZE") if "WORLD_SIZE" in os.environ else _count("NPROC") * _count("NNODES")

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def ring(self) -> int:
        """Ranks of the attention ring: cp = ulysses * ring."""
        return self.cp // self.ulysses

    def chunk_layers(self, layers: int) -> list[int]:
        """Number of layers of every model chunk, in the network's order: chunk v of stage p has index v*pp + p."""
        chunks = self.pp * self.vpp
        return [int(n) for n in self.stages.split(",")] if self.stages else [layers // chunks] * chunks

    def stage_layers(self, layers: int) -> list[int]:
        """Number of layers of every pipeline stage."""
        return [sum(self.chunk_layers(layers)[stage :: self.pp]) for stage in range(self.pp)]

    @property
    def micro_batches(self) -> int:
        """Forward passes of one rank per optimizer step."""
        return self.global_batch // (self.micro_batch * self.dp)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes per trained parameter that AdamW keeps on the device: two moments and, beside bf16 weights, fp32 ones."""
        moments = 4 if self.moments == "bf16" else 8
        masters = 0 if self.precision == "fp32" else 2 if self.master_remainders else 4
        return 0 if self.offload_optimizer else moments + masters


@dataclass(frozen=True, kw_only=True)
class TrainOptions(LayoutOptions):
    """The options of the training loop in common/train.py. A recipe's own training options extend this class."""

    data: Path | None = option("your data; formats in the recipe's README (default: the demo data)", group="data")
    max_drop: float = option(
        "share of rows that may be dropped before training refuses to start", 0.05, group="data", within="[0, 1]"
    )
    workers: int = option("decoding processes per rank", 2, group="data", layout=True, within="[0, inf)")
    compile: bool = option(
        "torch.compile each block: fuses what lies between its matmuls", False, group="layout", layout=True
    )

    offload_activations: bool = option(
        "what the backward needs of a block waits in host memory", False, group="layout", layout=True
    )
    overlap_param_gather: bool = option(
        "updated parameters are gathered while the next forward runs", False, group="layout", layout=True
    )
    fused_comm: bool = option(
        "tensor-parallel matmuls and their collectives in one kernel, which sends while it multiplies", False,
        group="layout", layout=True,
    )  # fmt: skip

    out: Path = option("run folder (default runs/<recipe>-<job>-<time>)", group="run")
    steps: int = option("optimizer steps", None, group="run", layout=True, within="[1, inf)")
    epochs: float = option("times the data are seen, in place of --steps", None, group="run", within="(0, inf)")
    seed: int = option("seed of weights, data order, noise", 0, group="run")
    resume: str = option(
        "auto (continue if the run folder holds a checkpoint), never, or a checkpoint", "auto", group="run"
    )
    save_every: int = option(
        "steps between checkpoints (0: only at the end)", 500, group="run", layout=True, within="[0, inf)"
    )
    keep: int = option("checkpoints kept", 2, group="run", within="[1, inf)")
    export: Path | None = option("write a released-format folder here at the end", group="run")
    deterministic: bool = option("bitwise reproducible run", False, group="run")
    log_every: int = option("steps between console lines", 1, group="run", within="[1, inf)")
    max_bad_steps: int = option(
        "consecutive non-finite steps skipped before the run stops", 5, group="run", within="[1, inf)"
    )
    profile_steps: str = option("steps to profile, e.g. 10-12", "", group="run")
    profile_ranks: str = option("ranks to profile, e.g. 0,8", "0", group="run")

    lr: float = option("peak learning rate", None, group="optimizer", layout=True, within="(0, inf)")
    min_lr: float = option("final learning rate", None, group="optimizer", layout=True, within="[0, inf)")
    lr_schedule: Literal["constant", "cosine", "linear", "WSD"] = option(
        "decay after warm-up; WSD: linear over the last tenth", "constant", group="optimizer", layout=True
    )
    warmup: int = option(
        "warm-up steps, fewer than --steps (a layout's: at most a tenth of them)", 0,
        group="optimizer", layout=True, within="[0, inf)",
    )  # fmt: skip
    weight_decay: float = option("AdamW weight decay", 0.01, group="optimizer", layout=True, within="[0, inf)")
    beta1: float = option("AdamW beta1", 0.9, group="optimizer", layout=True, within="[0, 1)")
    beta2: float = option("AdamW beta2", 0.999, group="optimizer", layout=True, within="[0, 1)")
    adam_eps: float = option("AdamW epsilon", 1e-8, group="optimizer", layout=True, within="[0, inf)")
    moments: Literal["fp32", "bf16"] = option(
        "precision in which AdamW's two moments are kept", "fp32", group="optimizer", layout=True
    )
    offload_optimizer: bool = option(
        "AdamW's moments, and in bf16 the fp32 weights, wait in host memory", False, group="optimizer", layout=True
    )
    master_remainders: bool = option(
        "of the fp32 weights only the 16 bits are kept that the bf16 weights lack", False,
        group="optimizer", layout=True,
    )  # fmt: skip
    clip: float = option(
        "gradient norm clipped to this (0: never)", 1.0, group="optimizer", layout=True, within="[0, inf)"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message}; fix: see --help")


def _add(parser: argparse._ArgumentGroup, f: dataclasses.Field) -> None:
    """Add one dataclass field as one option. An option that is not given is None, so that the layout can fill it."""
    kind = _kind(f)
    if get_origin(f.type) is Literal:
        kwargs = {"choices": get_args(f.type)}
    elif f.type is bool:
        kwargs = {"action": argparse.BooleanOptionalAction}
    else:
        kwargs = {"type": kind, "metavar": kind.__name__.upper()}
    shown = "from the layout" if f.metadata[FROM_LAYOUT] else f.default
    text = f.metadata["help"] + ("" if shown is None or shown is False or shown == "" else f" [{shown}]")
    parser.add_argument("--" + f.name.replace("_", "-"), help=text.replace("%", "%%"), default=None, **kwargs)


def parse_options(cls: type, argv: list[str], description: str, layouts: Path, default_size: Callable) -> Any:
    """Return the option dataclass `cls`, filled from argv, the layout and the defaults.

    `--help` prints the grouped options and exits 0. default_size(weights folder or None) names the size if neither
    --size nor --layout does.

    Raises:
        ValueError: unknown option or value (with the nearest name), unknown layout or layout key.
    """
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups: dict[str, argparse._ArgumentGroup] = {}
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for f in fields.values():
        group = f.metadata["group"]
        _add(groups.setdefault(group, parser.add_argument_group(group)), f)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        known = ["--" + name.replace("_", "-") for name in fields]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        raise ValueError(f"unknown option {unknown[0]!r}; {hint}")

    values = {name: f.default for name, f in fields.items()}
    if "layout" in fields:
        table = tomllib.loads(layouts.read_text())
        layout_size = table.get(given.layout, {}).get("size")
        size = given.size or layout_size or default_size(given.weights)
        layout = given.layout or size
        layout_values = _pick(table, layout, size, layouts)
        values.update({k: v for k, v in layout_values.items() if k in fields}, size=size, layout=layout)
    values.update({k: v for k, v in vars(given).items() if v is not None})
    for f in fields.values():
        rule = _broken_rule(f, values[f.name])
        if rule:
            raise ValueError(f"{f.name}={values[f.name]!r}; expected {rule}; fix: --{f.name.replace('_', '-')}")
    o = cls(**values)
    if o.global_batch and o.global_batch >= o.dp > 0:
        o = dataclasses.replace(o, micro_batch=min(o.micro_batch, o.global_batch // o.dp))
    return o


def _kind(f: dataclasses.Field) -> type:
    return next((a for a in get_args(f.type) if a is not type(None)), f.type)  # Path | None -> Path


def _broken_rule(f: dataclasses.Field, value: Any) -> str | None:
    """Return the rule that an option's value breaks, or None. argparse does not check the values of a layout."""
    if value is None:
        return None
    if get_origin(f.type) is Literal:
        return None if value in get_args(f.type) else "one of " + ", ".join(get_args(f.type))
    kind = _kind(f)
    if kind is not bool and isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        return f"a value of type {kind.__name__}"
    within = f.metadata["within"]
    if within:
        low, high = map(float, within[1:-1].split(","))
        above = value >= low if within[0] == "[" else value > low
        below = value <= high if within[-1] == "]" else value < high
        return None if above and below else f"a number in {within}"  # nan is in no interval
    return None


def _pick(table: dict, layout: str, size: str, path: Path) -> dict:
    """Return the named layout. Its keys must be layout options of some job, and its size must be `size`."""
    if layout not in table:
        near = difflib.get_close_matches(layout, table, n=1) or [", ".join(table)]
        raise ValueError(f"unknown layout or size {layout!r} in {path}; did you mean {near[0]}?")
    layout_values = table[layout]
    allowed = {f.name for c in _subclasses(LayoutOptions) for f in dataclasses.fields(c) if f.metadata[FROM_LAYOUT]}
    for key in layout_values:
        if key not in allowed | {"size", "source"}:
            near = difflib.get_close_matches(key, allowed, n=1)
            raise ValueError(
                f"unknown key {key!r} in layout {layout!r}; fix: {path}" + (f" ({near[0]}?)" if near else "")
            )
    if layout_values.get("size") != size:
        raise ValueError(
            f"layout {layout!r} is for size {layout_values.get('size')}, not {size}; fix: --size or --layout"
        )
    return layout_values


def _subclasses(cls: type) -> list[type]:
    return [cls, *(c for sub in cls.__subclasses__() for c in _subclasses(sub))]


def divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def check_layout(o: LayoutOptions, *, heads: int, layers: int, tokens: int | None, experts: int = 0) -> LayoutOptions:
    """Check everything about a layout that can be wrong before a process group exists. Return the options with the
    values that it implies (ulysses, etp, global_batch).

    heads: attention heads; layers: transformer blocks; tokens: sequence length of a sample, None if it varies; experts:
    number per layer, 0 for a dense model.

    Raises:
        ValueError: says which number does not divide which, and which numbers would.
    """
    ulysses = o.cp if o.ulysses is None else o.ulysses
    if o.cp % ulysses:
        raise ValueError(f"ulysses={ulysses} does not divide cp={o.cp}; use {divisors(o.cp)}; fix: --ulysses")
    if o.world % (o.tp * o.pp * o.cp):
        raise ValueError(
            f"tp*pp*cp = {o.tp}*{o.pp}*{o.cp} = {o.tp * o.pp * o.cp} does not divide {o.world} processes; "
            "fix: NPROC, NNODES, --tp, --pp or --cp"
        )
    if heads % o.tp:
        raise ValueError(
            f"tp={o.tp} does not divide {heads} attention heads (size {o.size}); use {divisors(heads)}; fix: --tp"
        )
    if heads // o.tp % ulysses:
        raise ValueError(
            f"ulysses={ulysses} does not divide the {heads // o.tp} heads of a tensor-parallel rank (size {o.size}, "
            f"tp={o.tp}); use {divisors(heads // o.tp)}; fix: --ulysses (the rest of --cp becomes a ring)"
        )
    if o.sp and o.tp == 1:
        raise ValueError("sp needs tp > 1: it splits the sequence over the tensor-parallel group; fix: --tp or --no-sp")
    if o.vpp > 1 and o.pp == 1:
        raise ValueError(f"vpp={o.vpp} needs pp > 1; fix: --pp or --vpp 1")
    if not o.stages and layers % (o.pp * o.vpp):
        raise ValueError(
            f"pp*vpp = {o.pp}*{o.vpp} does not divide {layers} layers (size {o.size}); use {divisors(layers)}; "
            "fix: --pp or --vpp, or uneven --stages"
        )
    if o.stages and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", o.stages):
        raise ValueError(f"stages={o.stages!r}; expected numbers of layers, e.g. 10,12,14; fix: --stages")
    sizes = o.chunk_layers(layers)
    if (len(sizes), sum(sizes)) != (o.pp * o.vpp, layers):
        raise ValueError(
            f"stages={o.stages}: {len(sizes)} numbers with sum {sum(sizes)}; expected pp*vpp = {o.pp * o.vpp} with sum "
            f"{layers} (layers of size {o.size}); fix: --stages"
        )
    etp = o.tp if o.etp is None else o.etp
    if not experts and (o.ep > 1 or etp != o.tp):
        raise ValueError(f"ep={o.ep}, etp={etp}: size {o.size} has no experts; fix: --ep 1, no --etp")
    if experts % o.ep:
        raise ValueError(
            f"ep={o.ep} does not divide {experts} experts (size {o.size}); use {divisors(experts)}; fix: --ep"
        )
    if etp not in (1, o.tp) or (etp < o.tp and not o.sp):
        raise ValueError(
            f"etp={etp} with tp={o.tp}; expected {o.tp}, or 1 under sequence parallel (else every rank of tp has the same "
            "tokens); fix: --etp or --sp"
        )
    if o.world // o.pp % (o.ep * etp):
        raise ValueError(
            f"ep*etp = {o.ep}*{etp} does not divide the {o.world // o.pp} processes of a pipeline stage; fix: --ep or --etp"
        )
    if o.fsdp and (o.pp > 1 or o.tp > 1 or o.ep > 1):
        raise ValueError(
            f"fsdp with tp={o.tp}, pp={o.pp}, ep={o.ep}; expected tp=pp=ep=1 (cp is allowed); fix: --tp 1 --pp 1 --ep 1 "
            "or --no-fsdp"
        )
    split = o.cp * (o.tp if o.sp else 1)
    if tokens is not None and tokens % split:
        raise ValueError(
            f"{tokens} tokens per sample are not divisible by {split} (cp={o.cp}{f', sp over tp={o.tp}' if o.sp else ''}); "
            "fix: --cp, --no-sp, or another resolution"
        )
    batch = o.global_batch if o.global_batch is not None else o.micro_batch * o.dp
    if batch % (o.micro_batch * o.dp):
        raise ValueError(
            f"global_batch={batch} is not a multiple of micro_batch*dp = {o.micro_batch}*{o.dp}; fix: --global-batch or --micro-batch"
        )
    if o.vpp > 1 and (batch // (o.micro_batch * o.dp)) % o.pp:
        raise ValueError(
            f"vpp={o.vpp} wants micro-batches ({batch // (o.micro_batch * o.dp)}) to be a multiple of pp={o.pp}; fix: --global-batch"
        )
    return dataclasses.replace(o, ulysses=ulysses, etp=etp, global_batch=batch)


def check_compile(o) -> None:
    """Raise ValueError if `--compile` has no compiler here."""
    if os.environ.get("ZOO_DEVICE") == "npu":
        raise ValueError("compile: torch_npu brings no backend for torch.compile; fix: --no-compile")
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if os.environ.get("ZOO_DEVICE") != "cuda" and not any(map(shutil.which, compilers)):
        raise ValueError("compile needs a C++ compiler on cpu, and there is no g++; fix: install one, or --no-compile")


def check_fused_comm(o, widths: list[int]) -> None:
    """Check that `--fused-comm` has kernels on this device that take this layout. widths: on one rank, how many products
    each fused matmul sums, forward and backward.

    Raises:
        ValueError: says what the kernels of this device do not take.
    """
    where, fix = os.environ.get("ZOO_DEVICE", "cpu"), "or --no-fused-comm"
    if where == "cpu":
        raise ValueError("fused_comm on cpu; expected npu or cuda, which have such kernels; fix: --no-fused-comm")
    if o.tp == 1 or _count("NPROC") % o.tp:
        raise ValueError(
            f"fused_comm with tp={o.tp} and {_count('NPROC')} devices on a node; expected tp > 1, its ranks on one node; "
            f"fix: --tp {fix}"
        )
    if o.compile:
        raise ValueError(f"fused_comm with compile; expected one of them; fix: --no-compile {fix}")
    if where == "cuda" and not o.sp:
        raise ValueError(f"fused_comm without sp on cuda; expected sp: torch fuses no all-reduce; fix: --sp {fix}")
    if where == "npu" and (o.precision == "fp32" or o.tp not in ((2, 4, 8, 16) if o.sp else (2, 4, 8))):
        raise ValueError(
            f"fused_comm with precision={o.precision}, tp={o.tp} on npu; expected bf16 and a tp of 2, 4, 8 or, with sp, 16; "
            f"fix: --precision, --tp {fix}"
        )
    refused = [width for width in widths if not 256 <= width < 65535]
    if where == "npu" and o.sp and refused:
        raise ValueError(
            f"fused_comm: a matmul of size {o.size} at tp={o.tp} sums {refused[0]} products; expected 256 to 65534 on npu; "
            f"fix: --tp {fix}"
        )


def shorten_warmup(o: TrainOptions, flags: set[str]) -> TrainOptions:
    """Limit the warm-up to a tenth of the steps, unless --warmup is given: a layout's warm-up is meant for the layout's
    own number of steps. flags: those given on the command line.

    Raises:
        ValueError: both --steps and --epochs.
    """
    if {"--steps", "--epochs"} <= flags:
        raise ValueError(f"--steps {o.steps} and --epochs {o.epochs}; expected one of them; fix: leave one out")
    if "--warmup" in flags or o.steps is None:
        return o
    return dataclasses.replace(o, warmup=min(o.warmup, o.steps // 10))


def check_run(o: TrainOptions) -> None:
    """Check what would otherwise stop a training run only later.

    Raises:
        ValueError: --resume names no folder; no step follows the warm-up; --min-lr is above --lr; the steps or ranks to
            profile are not numbers; the steps to profile lie beyond the run; --compile has no compiler; as
            `check_sharding`.
    """
    if o.compile:
        check_compile(o)
    check_sharding(o)
    if o.resume not in ("auto", "never") and not Path(o.resume).is_dir():
        raise ValueError(f"--resume {o.resume}: no such folder; expected auto, never or a checkpoint; fix: --resume")
    if o.warmup >= o.steps:
        raise ValueError(f"warmup={o.warmup} of {o.steps} steps; expected fewer; fix: --warmup or --steps")
    if o.min_lr is not None and o.min_lr > o.lr:
        raise ValueError(f"min_lr={o.min_lr} is above lr={o.lr}; fix: --min-lr or --lr")
    first, _, last = o.profile_steps.partition("-")
    if o.profile_steps and not (re.fullmatch(r"\d+(-\d+)?", o.profile_steps) and 1 <= int(first) <= int(last or first)):
        raise ValueError(f"profile_steps={o.profile_steps!r}; expected FIRST-LAST, e.g. 10-12; fix: --profile-steps")
    if o.profile_steps and int(first) > o.steps:
        raise ValueError(
            f"profile_steps={o.profile_steps} of a run of {o.steps} steps; fix: --profile-steps or --steps"
        )
    if not re.fullmatch(r"\d+(,\d+)*", o.profile_ranks):
        raise ValueError(f"profile_ranks={o.profile_ranks!r}; expected ranks, e.g. 0,8; fix: --profile-ranks")


def check_sharding(o: TrainOptions) -> None:
    """Raise ValueError if an option of the distributed optimizer is given where it would do nothing, or with --fsdp."""
    if o.overlap_param_gather and o.dp * o.cp == 1:
        raise ValueError(
            "overlap_param_gather with dp*cp = 1, where no parameter is gathered; expected more ranks of data or context "
            "parallel; fix: NPROC, or --no-overlap-param-gather"
        )
    if o.master_remainders and o.precision == "fp32":
        raise ValueError(
            "master_remainders with precision=fp32, whose weights have no fp32 copy; expected bf16; fix: --precision bf16 "
            "or --no-master-remainders"
        )
    for name in ("overlap_param_gather", "offload_optimizer", "master_remainders"):
        if o.fsdp and getattr(o, name):
            raise ValueError(
                f"{name} with fsdp; expected the distributed optimizer, which FSDP2 replaces; fix: --no-fsdp or "
                f"--no-{name.replace('_', '-')}"
            )


def rank_map(o: LayoutOptions) -> str:
    """Return the coordinates of the ranks as text, a line each, in megatron-core's order tp-cp-dp-pp (fastest first).
    Experts have their own order, etp-ep-(copies)-pp. Of more than 16 ranks only the first and last 8 are shown."""
    rows = []
    for rank in range(o.world):
        tp, rest = rank % o.tp, rank // o.tp
        cp, rest = rest % o.cp, rest // o.cp
        experts = f" ep {rank // o.etp % o.ep}" if o.ep > 1 else ""
        rows.append(f"  rank {rank:4d}: tp {tp} cp {cp} dp {rest % o.dp} pp {rest // o.dp}{experts}")
    return "\n".join(rows if len(rows) <= 16 else [*rows[:8], f"  … {o.world - 16} more …", *rows[-8:]])


def to_toml(options: Any) -> str:
    """Return a resolved option dataclass as TOML. Unset options are left out."""
    lines = []
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if value is None:
            continue
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, (int, float)):
            text = repr(value)
        else:
            text = json.dumps(str(value), ensure_ascii=False)  # a JSON string is a TOML string
        lines.append(f"{f.name} = {text}")
    return "\n".join(lines) + "\n"


def as_json(options: Any) -> dict[str, Any]:
    """Return the value of every option in a type that JSON can hold."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def from_json(cls: type, text: str) -> Any:
    """Return options of class `cls` from the JSON text of their `as_json`."""
    values = json.loads(text)
    paths = {f.name for f in dataclasses.fields(cls) if _kind(f) is Path}
    return cls(**{n: Path(v) if n in paths and v is not None else v for n, v in values.items()})


def default_out(recipe: str, job: str) -> Path:
    return Path("runs") / f"{recipe}-{job}-{time.strftime('%Y%m%d-%H%M%S')}"


def note(text: str) -> None:
    """Print a line on stderr from the launcher; its worker processes do not print it again."""
    if "RANK" not in os.environ:
        print(f"note: {text}", file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Print on stderr, where progress bars go too, what is being done while seconds pass before the next output."""
    print(line, file=sys.stderr, flush=True)


def exit_on_bad_input(function, *args):
    """Run `function(*args)`; a ValueError, or a missing file, becomes one line on stderr and exit code 2."""
    try:
        return function(*args)
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        if "RANK" in os.environ and "fix: " not in str(error):
            raise  # in a worker, an error without our wording comes from a library: its traceback is needed
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    recipe, script, argv = sys.argv[1], sys.argv[2], sys.argv[3:]
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):  # some clusters set them per node; torchrun sets the workers'
        os.environ.pop(name, None)
    job = importlib.import_module(f"{recipe}.options")
    options = exit_on_bad_input(job.parse, script, argv)
    if options.print_config:
        print(to_toml(options), end="")
        return
    if options.dry_run:
        print(job.dry_run(options))
        return
    if "ZOO_LAUNCHER" in os.environ:  # a benchmark's worker has started this launcher
        processes.die_with(os.getppid())
    rendezvous = exit_on_bad_input(_rendezvous)
    writes = _writes(options)
    if os.environ.get("NODE_RANK", "0") == "0":
        for out, doing, wait in writes:
            exit_on_bad_input(processes.lock, out, doing, wait, "launcher.")
            if exit_on_bad_input(processes.lock, out, doing, wait):  # refused if a rank 0 has outlived its launcher
                processes.release(out)
    exit_on_bad_input(job.prepare, options)
    os.environ["ZOO_COMMAND"] = os.environ.get("ZOO_COMMAND", shlex.join(["python", "-m", "common.cli", *sys.argv[1:]]))
    devices = f"NPROC={_count('NPROC')} on {os.environ.get('ZOO_DEVICE', 'cpu')}"
    say(f"starting {devices}; importing torch takes seconds, up to a minute on busy cores")
    sys.exit(_torchrun(rendezvous, recipe, script, options, writes))


def _writes(options: Any) -> list[tuple[Path, str, bool]]:
    """Return what a job writes, as arguments of `processes.lock`: the path, a digest of the options, and whether to
    wait for another process that makes the same. A second training is refused: it would only continue the first."""
    places = (options.out, options.export, options.merge)
    doing = hashlib.sha256(to_toml(options).encode()).hexdigest()
    return [(place, doing, not isinstance(options, TrainOptions)) for place in places if place is not None]


def _rendezvous() -> list[str]:
    """Return torchrun's options that say where the nodes meet."""
    env = os.environ
    if _count("NNODES") == 1:
        return ["--standalone"]
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if not env.get(name)]
    if missing:
        raise ValueError(f"NNODES={env['NNODES']} but no {' and no '.join(missing)}; fix: set them on every node")
    return [
        *("--nnodes", env["NNODES"], "--node-rank", env["NODE_RANK"]),
        *("--master-addr", env["MASTER_ADDR"], "--master-port", env.get("MASTER_PORT", "29500")),
    ]


def _torchrun(where: list[str], recipe: str, script: str, options: Any, writes: list[tuple]) -> int:
    """Start one process per device, which runs the job with these options. Return 0, or the exit code of the first rank
    that failed, 128+N if signal N ended it.

    where: see `_rendezvous`. writes: see `_writes`. The processes end with this one, see worker.py.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    count = os.environ.get("NPROC", "1")
    os.environ["ZOO_LAUNCHER"], os.environ["ZOO_WRITES"] = str(os.getpid()), json.dumps(writes, default=str)
    os.environ["ZOO_OPTIONS"] = json.dumps(as_json(options))
    worker = ["-m", "common.worker", recipe, script]
    args = get_args_parser().parse_args([*where, "--nproc-per-node", count, *worker])
    try:
        run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"error: rank {rank} failed first, exit code {failure.exitcode}; see its message above", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    main()
