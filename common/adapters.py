"""Reads files of low-rank adapters, in the formats of their trainers, from headers alone and without torch. It finds
the linear to which a tensor belongs, which factor the tensor is, and the scale of the product.

A tensor's name is a prefix, the linear's name in the file, and a suffix. A recipe's `Format` gives the first two;
`PARTS` lists the suffixes. Every tensor of a file must be recognised. The scale of a linear is alpha / r, from:

    adapter_config.json, or the same settings in the header     alpha and r of all linears, or of those a pattern names
    a tensor NAME.alpha (kohya's trainers)                      that linear's alpha; r is from the shape of A
    neither                                                     alpha = r; an error if the format requires settings
"""

import dataclasses
import fnmatch
import json
import re
from pathlib import Path

from common import weights

PARTS = {  # suffix after a linear's name -> A [r, in], B [out, r], or alpha
    "lora_A.weight": "A", "lora_A.default.weight": "A", "lora_down.weight": "A", "lora.down.weight": "A",
    "lora_B.weight": "B", "lora_B.default.weight": "B", "lora_up.weight": "B", "lora.up.weight": "B",
    "alpha": "alpha",
}  # fmt: skip
NOT_PLAIN = {  # pattern in a tensor's name -> what the tensor is; a plain adapter has none of these
    r"lora_magnitude_vector|dora_scale": "DoRA's magnitudes",
    r"\.hada_": "LoHa's factors",
    r"\.lokr_": "LoKr's factors",
    r"\.oft_|\.boft_": "rotations (OFT)",
    r"lora_mid": "a middle factor (Tucker)",
    r"lora_embedding_": "an embedding's adapter",
    r"lora_B\.(default\.)?bias$": "a bias of B (lora_bias)",
    r"\.diff(_b|_m)?$": "differences of whole parameters",
    r"^(?!.*lora).*\.bias$": "trained biases",
    r"^(?!.*lora).*\.weight$": "whole weights (modules_to_save)",
}
PIPELINE_FILE = "pytorch_lora_weights.safetensors"  # the file that diffusers' pipelines look for in a folder
HEADER = "lora_adapter_metadata"  # key in that file's header; its value is what PEFT has in adapter_config.json

# adapter_config.json of a plain LoRA: a field in UNDERSTOOD has one of these values, a field in FREE any value, and
# every other field is false or empty. Other values of init_lora_weights change the base weights too.
UNDERSTOOD = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}
FREE = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_alpha", "rank_pattern",
        "alpha_pattern", "lora_dropout", "use_rslora", "megatron_core", "qalora_group_size", "eva_config"}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one adapter, named as in PEFT."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """The adapter of one linear: A [r, in] and B [out, r]."""

    A: weights.Entry
    B: weights.Entry
    settings: Settings

    @property
    def parameters(self) -> int:
        return self.settings.r * (self.A.shape[1] + self.B.shape[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One linear of every expert. The matrices lie in a stack: `stack`[g, :, part], or `stack`[g] if it has no parts, is
    the transpose of that of expert g, whose name in the release is `experts`[g]."""

    stack: str
    part: int
    experts: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How one kind of file names the linears and parameters that it changes."""

    prefix: str  # every tensor's name begins with it
    linears: dict[str, str]  # our linear -> its name after the prefix
    differences: dict[str, str] = dataclasses.field(default_factory=dict)  # name after the prefix -> our parameter
    settings: bool = False  # whether a file must come with settings (adapter_config.json), which alone give the scale


def matches(name: str, targets: list[str] | set[str] | str) -> bool:
    """Tell whether `targets` choose `name`, by PEFT's rule: a list holds whole names or their last parts, a string is a
    regular expression for the whole name."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    parts = name.split(".")
    return any(".".join(parts[i:]) in targets for i in range(len(parts)))


def read(
    path: Path, formats: dict[str, Format], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Pair], dict[str, weights.Entry]]:
    """Read an adapter's folder or file: ({our linear: its adapter}, {our parameter: the difference to add to it}).

    formats: writer of the file -> its format; shapes: shape of each of our parameters.

    Raises:
        ValueError: there is no adapter; tensors are missing, misshaped or unknown to the format; the file holds more
            than an adapter; the settings are not a plain LoRA's.
    """
    entries = _entries(path)
    weights.refuse_quantised(entries, path, "--adapter")
    readings = {kind: _sort(entries, form) for kind, form in formats.items()}
    kind = min(readings, key=lambda kind: len(readings[kind][2]))  # the first format with the fewest unknown names
    form, (factors, differences, unknown) = formats[kind], readings[kind]
    facts = _read_settings(path, next(iter(entries.values())).file, form)
    if unknown:
        raise ValueError(_unknown(path, kind, unknown))
    if facts is None and form.settings:
        raise ValueError(f"{path} has no adapter_config.json, which says its scale; expected it beside; fix: --adapter")
    if facts and any("alpha" in parts for parts in factors.values()):
        raise ValueError(
            f"{path} says its scale twice, by settings and by .alpha; expected one of them; fix: --adapter"
        )

    targets = {ours for ours, name in form.linears.items() if _chosen(name, facts)} if facts else factors.keys()
    both = {ours: factors.get(ours, {}) for ours in [*factors, *sorted(targets - factors.keys())]}
    missing = [f"{p} of {form.prefix}{form.linears[ours]}" for ours in both for p in "AB" if p not in both[ours]]
    stray = [form.prefix + form.linears[ours] for ours in factors if ours not in targets]
    pairs, misshaped = {}, []
    for ours, parts in factors.items():
        if not {"A", "B"} <= parts.keys():
            continue
        settings, (outputs, inputs) = _settings(form.linears[ours], facts, parts), shapes[f"{ours}.weight"]
        pairs[ours] = Pair(A=parts["A"], B=parts["B"], settings=settings)
        for entry, expected in ((parts["A"], (settings.r, inputs)), (parts["B"], (outputs, settings.r))):
            if entry.shape != expected:
                misshaped.append(f"{entry.key} is {list(entry.shape)}, expected {list(expected)}")
    misshaped += [
        f"{entry.key} is {list(entry.shape)}, expected {list(shapes[ours])}"
        for ours, entry in differences.items()
        if entry.shape != tuple(shapes[ours])
    ]
    problems = [
        f"{len(names)} {fault}: {_first(names)}"
        for fault, names in (("missing", missing), ("not of its target_modules", stray), ("misshaped", misshaped))
        if names
    ]
    if problems:
        raise ValueError(f"{path}, read as {kind}, does not fit: {'; '.join(problems)}; fix: --adapter, or --weights")
    return pairs, differences


def families(pieces: dict[str, dict[str, tuple]]) -> dict[str, Family]:
    """Return the linears of stacked experts: layers.2.mlp.experts.up_proj -> its family. pieces: see `release.Table`."""
    found: dict[str, Family] = {}
    for stack, keys in pieces.items():
        for key, (_, *where) in keys.items():
            expert = key.removesuffix(".weight")
            name = f"{stack.rpartition('.')[0]}.experts.{expert.rpartition('.')[2]}"
            family = found.setdefault(name, Family(stack=stack, part=where[-1] if where else 0, experts=[]))
            family.experts.append(expert)
    return found


def of_experts(pairs: dict[str, Pair], linears: dict[str, Family]) -> dict[str, list[Pair]]:
    """Return {linear: the adapter of every expert} of those linears that have adapters.

    Raises:
        ValueError: only some experts of a layer have one, or their settings differ.
    """
    found = {name: [pairs[e] for e in family.experts if e in pairs] for name, family in linears.items()}
    found = {name: of_linear for name, of_linear in found.items() if of_linear}
    for name, of_linear in found.items():
        if len(of_linear) < len(linears[name].experts) or len({pair.settings for pair in of_linear}) > 1:
            raise ValueError(
                f"{len(of_linear)} of the {len(linears[name].experts)} experts of {name} have adapters, with "
                f"{len({pair.settings for pair in of_linear})} different settings; expected all, with the same; fix: --adapter"
            )
    return found


def shared_or_all(values) -> object:
    """Return the value that all adapters of a model share, or the sorted list of their distinct values."""
    distinct = sorted(set(values))
    return distinct[0] if len(distinct) == 1 else distinct


def _entries(path: Path) -> dict[str, weights.Entry]:
    """List the tensors of an adapter's file, or of a folder's PEFT files, else diffusers file, else only file."""
    if path.is_dir():
        files = {file.name: file for file in sorted(path.glob("*.safetensors"))}
        if fnmatch.filter(files, weights.PEFT_FILES):
            return weights.index(path, weights.PEFT_FILES)
        if not files:
            raise ValueError(
                f"{path} holds no .safetensors; expected an adapter in that format (pickles run code when they are "
                "read); fix: --adapter"
            )
        if len(files) > 1 and PIPELINE_FILE not in files:
            raise ValueError(f"{path} holds {len(files)} files: {_first(list(files))}; fix: --adapter with one of them")
        file = files.get(PIPELINE_FILE, next(iter(files.values())))
    elif path.is_file() and path.suffix == ".safetensors":
        file = path
    else:
        problem = "is no .safetensors file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {problem}; expected an adapter's folder or .safetensors file; fix: --adapter")
    entries = weights.index_file(file)
    if not entries:
        raise ValueError(f"{file} holds no tensors; fix: --adapter")
    return entries


def _sort(entries: dict[str, weights.Entry], form: Format) -> tuple[dict, dict, list[str]]:
    """Sort the tensors: ({our linear: {part: entry}}, {our parameter: entry}, names that the format does not know)."""
    ours_of = {linear: ours for ours, linear in form.linears.items()}
    factors, differences, unknown = {}, {}, []
    for key, entry in entries.items():
        name = key.removeprefix(form.prefix)
        suffix = next((suffix for suffix in PARTS if name.endswith(f".{suffix}")), "")
        ours = ours_of.get(name.removesuffix(f".{suffix}"))
        if key != form.prefix + name or not (name in form.differences or suffix and ours):
            unknown.append(key)
        elif name in form.differences:
            differences[form.differences[name]] = entry
        elif PARTS[suffix] in factors.setdefault(ours, {}):
            unknown.append(key)  # the same factor under a second name
        else:
            factors[ours][PARTS[suffix]] = entry
    return factors, differences, unknown


def _unknown(path: Path, kind: str, keys: list[str]) -> str:
    """Return the error message for a file that also holds the tensors `keys`, which the format does not know."""
    keys_by_meaning = {}
    for key in keys:
        meaning = next((meaning for pattern, meaning in NOT_PLAIN.items() if re.search(pattern, key)), None)
        keys_by_meaning.setdefault(meaning, []).append(key)
    rest = keys_by_meaning.pop(None, [])
    if keys_by_meaning:
        listed = "; ".join(f"{meaning}: {_first(names)}" for meaning, names in keys_by_meaning.items())
        return f"{path} is more than an adapter, it has {listed}; fix: merge it into its base with what wrote it"
    return f"{path}, read as {kind}, has {len(rest)} not of this model: {_first(rest)}; fix: --adapter, or --weights"


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _read_settings(path: Path, file: Path, form: Format) -> dict | None:
    """Return the settings of adapters from the file's header or the adapter_config.json beside it; None without both.

    Raises:
        ValueError: it is not a plain LoRA.
    """
    text, config = weights.metadata(file).get(HEADER), file.parent / "adapter_config.json"
    # An adapter_config.json beside a file that PEFT did not name may belong to another file.
    config_applies = path.is_dir() or fnmatch.fnmatch(path.name, weights.PEFT_FILES)
    if text is not None:
        try:
            facts = {k.removeprefix(form.prefix): v for k, v in json.loads(text).items() if k.startswith(form.prefix)}
        except (ValueError, AttributeError):
            raise ValueError(f"{file}: {HEADER} in its header is no JSON object; fix: download it again") from None
        facts.setdefault("peft_type", "LORA")
    elif config_applies and config.is_file():
        facts = weights.read_json(config)
    else:
        return None
    bad = {k: v for k, v in facts.items() if v and k not in FREE and v not in UNDERSTOOD.get(k, ())}
    bad |= {k: None for k in ("peft_type", "target_modules") if not facts.get(k)}
    bad |= {k: facts.get(k) for k in ("r", "lora_alpha") if not isinstance(v := facts.get(k), int | float) or v <= 0}
    if bad:
        raise ValueError(f"{path} is not a plain LoRA: it has {bad}; fix: merge it into its base with peft")
    patterns = [facts["target_modules"], facts.get("exclude_modules"), *(facts.get("rank_pattern") or {})]
    for pattern in [*patterns, *(facts.get("alpha_pattern") or {})]:
        try:
            re.compile(pattern if isinstance(pattern, str) else "")
        except re.error as error:
            raise ValueError(f"{path} says {pattern!r}, no regular expression ({error}); fix: --adapter") from None
    targets = facts["target_modules"]
    return facts | {"target_modules": targets if isinstance(targets, str) else set(targets)}  # may name every expert


def _chosen(name: str, facts: dict) -> bool:
    """Tell whether PEFT adapts the linear with this name. layers_to_transform restricts targets that are last parts of
    names to the given layers; it does not restrict whole names and regular expressions."""
    targets, layers = facts["target_modules"], facts.get("layers_to_transform")
    if not matches(name, targets) or matches(name, facts.get("exclude_modules") or []):
        return False
    if isinstance(targets, str) or name in targets or layers in (None, []):
        return True
    patterns = facts.get("layers_pattern") or []
    patterns = [rf"(?:^|.*?\.){p}" for p in ([patterns] if isinstance(patterns, str) else patterns)]
    layer = next((m for p in patterns or [r".*?\.[^.]*"] if (m := re.match(rf"{p}\.(\d+)\.", name))), None)
    return layer is not None and int(layer[1]) in ([layers] if isinstance(layers, int) else layers)


def _settings(name: str, facts: dict | None, parts: dict[str, weights.Entry]) -> Settings:
    """Return the settings of the linear with this name in the file."""
    if facts is None:
        r = parts["A"].shape[0] if parts["A"].shape else 0
        return Settings(r=r, lora_alpha=weights.scalar(parts["alpha"]) if "alpha" in parts else r)

    def own(values: dict | None, usual):
        """Return the value of the first pattern that matches the whole name or its end (PEFT's rule), else `usual`."""
        return next((v for key, v in (values or {}).items() if re.match(rf"(.*\.)?({key})$", name)), usual)

    return Settings(
        r=own(facts.get("rank_pattern"), facts["r"]),
        lora_alpha=own(facts.get("alpha_pattern"), facts["lora_alpha"]),
        lora_dropout=facts.get("lora_dropout") or 0.0,
        use_rslora=facts.get("use_rslora") or False,
    )
