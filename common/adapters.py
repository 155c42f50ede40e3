"""Low-rank adapters as their trainers write them, read from headers alone, without torch: to which linear a tensor
belongs, which factor it is, and by what the product is scaled.

What stands before a linear's name in a file, and how the linear is called there, a recipe says (`Format`); what stands
behind it is below (`PARTS`). Every tensor of a file must be accounted for. The scale of a linear is alpha / r:

    adapter_config.json, or the same facts in the file's header     alpha and r of all, or of some by their patterns
    a tensor NAME.alpha (kohya's trainers)                          that linear's alpha; r from the shape of A
    neither                                                         alpha = r, unless the format must have the first
"""

import dataclasses
import fnmatch
import json
import re
from pathlib import Path

from common import weights

PARTS = {  # what stands behind a linear's name: A [r, in], B [out, r], or alpha
    "lora_A.weight": "A", "lora_A.default.weight": "A", "lora_down.weight": "A", "lora.down.weight": "A",
    "lora_B.weight": "B", "lora_B.default.weight": "B", "lora_up.weight": "B", "lora.up.weight": "B",
    "alpha": "alpha",
}  # fmt: skip
MORE = {  # in a tensor's name: what it is, which is more than an adapter
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
PIPELINE_FILE = "pytorch_lora_weights.safetensors"  # the one diffusers' pipelines look for in a folder
HEADER = "lora_adapter_metadata"  # where in it they keep what PEFT keeps in adapter_config.json

# What a plain LoRA's adapter_config.json may say; in any other field only "no" is understood. Other ways to draw the
# first weights change the base's too.
UNDERSTOOD = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}
FREE = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_alpha", "rank_pattern",
        "alpha_pattern", "lora_dropout", "use_rslora", "megatron_core", "qalora_group_size", "eva_config"}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one adapter, by PEFT's names."""

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
class Format:
    """How a kind of file calls what it changes."""

    prefix: str  # of every tensor
    linears: dict[str, str]  # our linear -> its name behind the prefix
    differences: dict[str, str] = dataclasses.field(default_factory=dict)  # name of a whole difference -> our parameter
    settings: bool = False  # whether the scale is known from an adapter_config.json alone


def matches(name: str, targets: list[str] | str) -> bool:
    """PEFT's rule: a list holds whole names or ends of names, a string is a regular expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def read(
    path: Path, formats: dict[str, Format], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Pair], dict[str, weights.Entry]]:
    """({our linear: its adapter}, {our parameter: what is added to it}) of an adapter's folder or file.

    formats: by who writes them; shapes: of our parameters.

    Raises:
        ValueError: no adapter there; tensors that are missing, misshaped or of no format; more than an adapter; settings
            that are not a plain LoRA's.
    """
    entries = _entries(path)
    weights.refuse_quantised(entries, path, "--adapter")
    sorted_by = {kind: _sort(entries, form) for kind, form in formats.items()}
    kind = min(sorted_by, key=lambda kind: len(sorted_by[kind][2]))  # the first of those with fewest unknown names
    form, (factors, differences, unknown) = formats[kind], sorted_by[kind]
    facts = _facts(path, next(iter(entries.values())).file, form)
    if unknown:
        raise ValueError(_unknown(path, kind, unknown))
    if facts is None and form.settings:
        raise ValueError(f"{path} has no adapter_config.json, which says its scale; expected it beside; fix: --adapter")
    if facts and any("alpha" in parts for parts in factors.values()):
        raise ValueError(
            f"{path} says its scale twice, by settings and by .alpha; expected one of them; fix: --adapter"
        )

    targets = {ours for ours, theirs in form.linears.items() if _chosen(theirs, facts)} if facts else factors.keys()
    both = {ours: factors.get(ours, {}) for ours in [*factors, *sorted(targets - factors.keys())]}
    missing = [f"{p} of {form.prefix}{form.linears[ours]}" for ours in both for p in "AB" if p not in both[ours]]
    stray = [form.prefix + form.linears[ours] for ours in factors if ours not in targets]
    pairs, misshaped = {}, []
    for ours, parts in factors.items():
        if not {"A", "B"} <= parts.keys():
            continue
        settings, (outputs, inputs) = _settings(form.linears[ours], facts, parts), shapes[f"{ours}.weight"]
        pairs[ours] = Pair(A=parts["A"], B=parts["B"], settings=settings)
        for entry, want in ((parts["A"], (settings.r, inputs)), (parts["B"], (outputs, settings.r))):
            if entry.shape != want:
                misshaped.append(f"{entry.key} is {list(entry.shape)}, expected {list(want)}")
    misshaped += [
        f"{entry.key} is {list(entry.shape)}, expected {list(shapes[ours])}"
        for ours, entry in differences.items()
        if entry.shape != tuple(shapes[ours])
    ]
    problems = [
        f"{len(found)} {what}: {_first(found)}"
        for what, found in (("missing", missing), ("not of its target_modules", stray), ("misshaped", misshaped))
        if found
    ]
    if problems:
        raise ValueError(f"{path}, read as {kind}, does not fit: {'; '.join(problems)}; fix: --adapter, or --weights")
    return pairs, differences


def spread(values) -> object:
    """The one value that all have, or those that some have, in order: for what is said of all adapters of a model."""
    found = sorted(set(values))
    return found[0] if len(found) == 1 else found


def _entries(path: Path) -> dict[str, weights.Entry]:
    """The tensors of an adapter: of a file, or of a folder's PEFT files, its diffusers file, or its only one."""
    if path.is_dir():
        every = {file.name: file for file in sorted(path.glob("*.safetensors"))}
        if fnmatch.filter(every, weights.PEFT_FILES):
            return weights.index(path, weights.PEFT_FILES)
        if not every:
            raise ValueError(
                f"{path} holds no .safetensors; expected an adapter in that format (pickles run code when they are "
                "read); fix: --adapter"
            )
        if len(every) > 1 and PIPELINE_FILE not in every:
            raise ValueError(f"{path} holds {len(every)} files: {_first(list(every))}; fix: --adapter with one of them")
        file = every.get(PIPELINE_FILE, next(iter(every.values())))
    elif path.is_file() and path.suffix == ".safetensors":
        file = path
    else:
        what = "is no .safetensors file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; expected an adapter's folder or .safetensors file; fix: --adapter")
    entries = weights.index_file(file)
    if not entries:
        raise ValueError(f"{file} holds no tensors; fix: --adapter")
    return entries


def _sort(entries: dict[str, weights.Entry], form: Format) -> tuple[dict, dict, list[str]]:
    """({our linear: {part: entry}}, {our parameter: entry}, names that the format does not have)."""
    ours_of = {theirs: ours for ours, theirs in form.linears.items()}
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
            unknown.append(key)  # the same factor by two names
        else:
            factors[ours][PARTS[suffix]] = entry
    return factors, differences, unknown


def _unknown(path: Path, kind: str, keys: list[str]) -> str:
    """What is wrong with a file that has these tensors besides an adapter's."""
    more = {}
    for key in keys:
        what = next((what for pattern, what in MORE.items() if re.search(pattern, key)), None)
        more.setdefault(what, []).append(key)
    rest = more.pop(None, [])
    if more:
        named = "; ".join(f"{what}: {_first(found)}" for what, found in more.items())
        return f"{path} is more than an adapter, it has {named}; fix: merge it into its base with what wrote it"
    return f"{path}, read as {kind}, has {len(rest)} not of this model: {_first(rest)}; fix: --adapter, or --weights"


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _facts(path: Path, file: Path, form: Format) -> dict | None:
    """What the file's header, or adapter_config.json beside it, says of the adapters; None if neither does.

    Raises:
        ValueError: it is not a plain LoRA.
    """
    said, beside = weights.metadata(file).get(HEADER), file.parent / "adapter_config.json"
    its_own = path.is_dir() or fnmatch.fnmatch(path.name, weights.PEFT_FILES)  # not another file's, for which one lies
    if said is not None:
        try:
            facts = {k.removeprefix(form.prefix): v for k, v in json.loads(said).items() if k.startswith(form.prefix)}
        except (ValueError, AttributeError):
            raise ValueError(f"{file}: {HEADER} in its header is no JSON object; fix: download it again") from None
        facts.setdefault("peft_type", "LORA")
    elif its_own and beside.is_file():
        facts = weights.read_json(beside)
    else:
        return None
    odd = {k: v for k, v in facts.items() if v and k not in FREE and v not in UNDERSTOOD.get(k, ())}
    odd |= {k: None for k in ("peft_type", "target_modules") if not facts.get(k)}
    odd |= {k: facts.get(k) for k in ("r", "lora_alpha") if not isinstance(v := facts.get(k), int | float) or v <= 0}
    if odd:
        raise ValueError(f"{path} is not a plain LoRA: it has {odd}; fix: merge it into its base with peft")
    patterns = [facts["target_modules"], facts.get("exclude_modules"), *(facts.get("rank_pattern") or {})]
    for pattern in [*patterns, *(facts.get("alpha_pattern") or {})]:
        try:
            re.compile(pattern if isinstance(pattern, str) else "")
        except re.error as error:
            raise ValueError(f"{path} says {pattern!r}, no regular expression ({error}); fix: --adapter") from None
    return facts


def _chosen(name: str, facts: dict) -> bool:
    """Whether PEFT gives the linear of this name an adapter: layers narrow what the ends of names choose."""
    targets, layers = facts["target_modules"], facts.get("layers_to_transform")
    if not matches(name, targets) or matches(name, facts.get("exclude_modules") or []):
        return False
    if isinstance(targets, str) or name in targets or layers in (None, []):
        return True
    patterns = facts.get("layers_pattern") or []
    patterns = [rf"(?:^|.*?\.){p}" for p in ([patterns] if isinstance(patterns, str) else patterns)]
    found = next((m for p in patterns or [r".*?\.[^.]*"] if (m := re.match(rf"{p}\.(\d+)\.", name))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _settings(name: str, facts: dict | None, parts: dict[str, weights.Entry]) -> Settings:
    """Of the linear that a file calls so."""
    if facts is None:
        r = parts["A"].shape[0] if parts["A"].shape else 0
        return Settings(r=r, lora_alpha=weights.scalar(parts["alpha"]) if "alpha" in parts else r)

    def own(values: dict | None, usual):
        """PEFT's rule: the first pattern that is the name or its end."""
        return next((v for key, v in (values or {}).items() if re.match(rf"(.*\.)?({key})$", name)), usual)

    return Settings(
        r=own(facts.get("rank_pattern"), facts["r"]),
        lora_alpha=own(facts.get("alpha_pattern"), facts["lora_alpha"]),
        lora_dropout=facts.get("lora_dropout") or 0.0,
        use_rslora=facts.get("use_rslora") or False,
    )
