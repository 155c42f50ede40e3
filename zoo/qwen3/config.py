"""Qwen3: the architecture, its published sizes, and the options of this recipe's jobs.

Sources: the released config.json files (Qwen/Qwen3-*), arXiv:2505.09388 tables 1 and 2.
No torch here: options are checked before anything heavy is imported.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import cli, weights
from common.cli import option

from . import convert, preprocess

HERE = Path(__file__).parent

# What a released config.json must say, where it says anything, for this model to be its.
FIXED = {
    "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "n_shared_experts": 0, "attention_dropout": 0.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Field names are those of the released `config.json`. num_experts 0: a dense model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool

    @property
    def parameters(self) -> int:
        """Exact number of parameters."""
        return self._parameters(self.num_experts)

    @property
    def active_parameters(self) -> int:
        """Parameters a token meets: k experts of a layer."""
        return self._parameters(self.num_experts_per_tok)

    def _parameters(self, experts: int) -> int:
        D, E = self.hidden_size, self.head_dim
        attention = 2 * D * E * (self.num_attention_heads + self.num_key_value_heads) + 2 * E
        mlp = 3 * D * self.intermediate_size
        if self.num_experts:
            mlp = 3 * D * self.moe_intermediate_size * experts + D * self.num_experts
        embeddings = self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * (attention + mlp + 2 * D) + embeddings + D

    def flops(self, length: int) -> int:
        """Model FLOPs of the forward of one sequence, a multiply-add counted as two, the vocabulary projection
        included, the lower triangle of attention alone (half of L^2); training is three times that."""
        D, E, layers = self.hidden_size, self.head_dim, self.num_hidden_layers
        attention = 2 * D * E * (self.num_attention_heads + self.num_key_value_heads)
        mlp = 3 * D * self.intermediate_size
        if self.num_experts:
            mlp = 3 * D * self.moe_intermediate_size * self.num_experts_per_tok + D * self.num_experts
        linear = 2 * length * (layers * (attention + mlp) + self.vocab_size * D)
        return linear + layers * 2 * length**2 * self.num_attention_heads * E

    @classmethod
    def from_folder(cls, folder: Path) -> "Qwen3Config":
        """The architecture of a released folder.

        Raises:
            ValueError: no config.json, one of another model, or one that asks for what this model does not do.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(f"{path} does not exist; expected a released Hugging Face folder; fix: --weights")
        values = weights.read_json(path)
        kind = values.get("model_type")
        if kind not in ("qwen3", "qwen3_moe"):
            raise ValueError(f"{path} is of model_type {kind!r}; expected qwen3 or qwen3_moe; fix: --weights")
        for key, wanted in FIXED.items():
            if (values.get(key) or wanted) != wanted:
                raise ValueError(f"{path} has {key}={values[key]!r}; this model only does {wanted!r}; fix: --weights")
        rope = values.get("rope_parameters") or {}  # transformers 5; releases write rope_theta and rope_scaling
        scaling = values.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
        if scaling:
            raise ValueError(f"{path} scales its rotary embedding ({scaling}); this model does not; fix: --weights")
        values["rope_theta"] = values.get("rope_theta", rope.get("rope_theta"))
        values.setdefault("num_experts", values.get("num_local_experts"))  # as transformers 5 writes it
        if kind == "qwen3":
            values |= {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0, "norm_topk_prob": False}
        missing = [f.name for f in dataclasses.fields(cls) if values.get(f.name) is None]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; fix: download it again")
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})

    def to_released(self) -> dict:
        """The released config.json."""
        values = dataclasses.asdict(self)
        kind, name = ("qwen3_moe", "Qwen3MoeForCausalLM") if self.num_experts else ("qwen3", "Qwen3ForCausalLM")
        if self.num_experts:
            values |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001}
        else:
            for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
                del values[key]
        return values | {
            "architectures": [name], "model_type": kind, "hidden_act": "silu", "attention_bias": False,
            "attention_dropout": 0.0, "rope_scaling": None, "use_sliding_window": False, "initializer_range": 0.02,
        }  # fmt: skip


_RELEASED = dict(
    vocab_size=151936, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=40960,
)  # fmt: skip
_DENSE = dict(num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, norm_topk_prob=False)
_SPARSE = dict(num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, num_key_value_heads=4)
_TINY = dict(
    vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=48, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=2048,
    tie_word_embeddings=True,
)  # fmt: skip


def _size(D: int, width: int, layers: int, heads: int, tied: bool, **rest) -> Qwen3Config:
    shape = dict(hidden_size=D, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=heads)
    return Qwen3Config(**_RELEASED | {"num_key_value_heads": 8} | shape | {"tie_word_embeddings": tied} | rest)


SIZES = {
    "tiny": Qwen3Config(**_TINY, **_DENSE),
    "tiny-moe": Qwen3Config(
        **_TINY, **_DENSE | dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True)
    ),
    "0.6B": _size(1024, 3072, 28, 16, True, **_DENSE),
    "1.7B": _size(2048, 6144, 28, 16, True, **_DENSE),
    "4B": _size(2560, 9728, 36, 32, True, **_DENSE),
    "8B": _size(4096, 12288, 36, 32, False, **_DENSE),
    "14B": _size(5120, 17408, 40, 40, False, **_DENSE),
    "32B": _size(5120, 25600, 64, 64, False, **_DENSE),
    "30B-A3B": _size(2048, 6144, 48, 32, False, **_SPARSE, moe_intermediate_size=768),
    "235B-A22B": _size(4096, 12288, 94, 64, False, **_SPARSE, moe_intermediate_size=1536),
}


# ----------------------------------------------------------------------------------------------------------- options

DEMO_TOKENIZER = HERE / "demo" / "tokenizer"
DEMO_WEIGHTS = HERE / "demo" / "weights"  # what sft.sh made of the tiny size
DEMO_PROMPT = "Sort the digits: 52913"
DEMO_SFT = {"steps": 600, "lr": 3e-3, "save_every": 300}  # its task is learnt sooner than the docstrings
DEMO_DATA = HERE.parents[1] / "data" / f"{HERE.name}-demo"
DEMO_TASKS = HERE / "demo" / "tasks"
RUNS_CODE = ("humaneval", "mbpp")  # benchmarks that run what the model wrote, by the start of their names


@dataclass(frozen=True, kw_only=True)
class TrainOptions(cli.TrainOptions):
    job: str = option("which launcher this is: pretrain or sft", "pretrain", group="job")
    from_scratch: bool = option("draw the weights instead of loading them", False, group="model")
    tokenizer: Path | None = option("tokenizer's folder (default: --weights)", group="data")
    validation: Path | None = option("held-out data of the same kind, evaluated at the end", group="data")
    seq_len: int = option("tokens of a row", 4096, group="data", layout=True, within="[2, inf)")
    separate_documents: bool = option(
        "documents packed into a row do not see each other (pretrain)", True, group="data", layout=True
    )
    too_long: Literal["drop", "cut"] = option(
        "what becomes of a conversation longer than a row (sft)", "drop", group="data", layout=True
    )
    cache: Path | None = option("folder that keeps rendered conversations (default data/<recipe>-cache)", group="data")
    aux: float = option(
        "weight of the experts' load-balancing loss", 0.0, group="objective", layout=True, within="[0, inf)"
    )


@dataclass(frozen=True, kw_only=True)
class InferOptions(cli.LayoutOptions):
    tokenizer: Path | None = option("tokenizer's folder (default: --weights)", group="model")
    prompt: str = option("what to answer", group="job")
    prompts: Path | None = option("text file, a prompt per line", group="job")
    out: Path | None = option("file for the answers (.jsonl)", group="job")
    chat: bool = option("put the prompt into the tokenizer's chat template", True, group="job")
    thinking: bool = option("let the template open a thought first", False, group="job")
    max_new_tokens: int = option("longest answer", 256, group="job", layout=True, within="[1, inf)")
    batch: int = option("prompts of one length generated together", 16, group="job", within="[1, inf)")
    temperature: float = option("0: always the likeliest token", 0.0, group="job", within="[0, inf)")
    top_p: float = option("share of the probability drawn from", 1.0, group="job", within="(0, 1]")
    top_k: int = option("number of tokens drawn from (0: all)", 0, group="job", within="[0, inf)")
    seed: int = option("seed of the draws", 0, group="job")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(cli.LayoutOptions):
    tokenizer: Path | None = option("tokenizer's folder (default: --weights)", group="model")
    tasks: str | None = option(
        "benchmarks by the harness' names, e.g. mmlu,c-eval,boolq,bbh,agieval,humaneval,gsm8k (default: the demo's)",
        group="job",
    )
    task_folder: Path | None = option(
        "your own tasks (.yaml, whose Python is run), and data sets under their hub names (default: the demo's)",
        group="data",
    )
    limit: int | None = option("questions of each task (default: all)", group="data", within="[1, inf)")
    num_fewshot: int | None = option(
        "answered examples before a question (default: the task's)", group="job", within="[0, inf)"
    )
    chat: bool = option("put the questions into the tokenizer's chat template", False, group="job")
    thinking: bool = option("let the template open a thought first", False, group="job")
    max_new_tokens: int | None = option("longest answer (default: the task's)", group="job", within="[1, inf)")
    allow_code_execution: bool = option(
        "run programs the model wrote, with your rights (humaneval)", False, group="job"
    )
    batch: int = option("prompts generated together", 16, group="job", within="[1, inf)")
    row_tokens: int = option("tokens of a row of texts that are scored", 8192, group="job", within="[1, inf)")
    out: Path = option("run folder; the same again goes on where it stopped", group="run")
    seed: int = option("seed of the draws", 0, group="run")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(cli.LayoutOptions):
    to: Literal["released", "sharded"] = option("what to write; the kind of --weights is recognised", group="job")
    out: Path = option("folder to write", group="job")


@dataclass(frozen=True, kw_only=True)
class PerfOptions(TrainOptions):
    only: Literal["all", "step", "sft", "generate", "preprocess", "load"] = option(
        "which benchmark", "all", group="job"
    )
    repeats: int = option("timed training steps", 20, group="job", within="[1, inf)")
    layers: int | None = option("this many layers instead of the size's", group="model", within="[1, inf)")
    vocabulary: int | None = option("this many tokens instead of the size's", group="model", within="[2048, inf)")
    compiled: bool = option("let all also run under torch.compile", True, group="job")
    record: bool = option("add the rows to perf.jsonl", False, group="job")


JOBS = {
    "train": (TrainOptions, "Train Qwen3."),
    "infer": (InferOptions, "Generate text with Qwen3."),
    "evaluate": (EvaluateOptions, "Evaluate Qwen3 on benchmarks through lm-eval-harness."),
    "preprocess": (preprocess.PreprocessOptions, "Tokenize text for pretraining."),
    "perf": (PerfOptions, "Measure this recipe on this machine."),
    "convert": (ConvertOptions, "Convert Qwen3 weights between the released and the sharded layout."),
}


def parse(script: str, argv: list[str]):
    """argv of a job -> its checked options. See common/cli.py for the contract.

    Raises:
        ValueError: anything about the options, the weights folder or the data that can be known to be wrong.
    """
    cls, description = JOBS[script]
    o = cli.parse_options(cls, argv, description, HERE / "parallel.toml", _default_size)
    if script == "preprocess":
        return preprocess.checked(o, model_config(o).vocab_size)
    o = _with_demo(o, script, asked={word.split("=")[0] for word in argv})
    if script not in ("train", "perf"):  # these have no batch
        o = dataclasses.replace(o, micro_batch=1, global_batch=None)
    config = model_config(o)
    tokens = o.seq_len * o.micro_batch if script in ("train", "perf") else None
    o = cli.check_layout(o, heads=config.num_attention_heads, layers=config.num_hidden_layers, tokens=tokens)
    _check_model(o, config, script)
    if o.weights is not None and not is_sharded(o.weights) and not getattr(o, "from_scratch", False):
        convert.released_entries(o.weights, config)
    if script == "train":
        cli.check_run(o)
        _check_data(o, config)
        if o.export:
            weights.refuse_existing(o.export, "--export")
    if script == "infer":
        if not (o.prompt or o.prompts):
            raise ValueError("nothing to answer; fix: --prompt TEXT or --prompts FILE")
        if o.prompts:
            read_prompts(o.prompts)
    if script == "evaluate":
        _check_tasks(o)
    if script == "convert":
        if o.to is None:
            raise ValueError("nothing to convert to; fix: --to released or sharded")
        weights.refuse_existing(o.out, "--out")
    return o


def _check_model(o, config: Qwen3Config, script: str) -> None:
    """What this model asks of a layout beyond `cli.check_layout`."""
    for count, what in (
        (config.num_key_value_heads, "key-value heads"),
        (config.vocab_size, "tokens of the vocabulary"),
        (config.moe_intermediate_size if config.num_experts else config.intermediate_size, "columns of the MLP"),
    ):
        if count % o.tp:
            raise ValueError(f"tp={o.tp} does not divide {count} {what} (size {o.size}); fix: --tp")
    if config.tie_word_embeddings and o.pp > 1:
        raise ValueError(f"pp={o.pp} would part the tied embeddings of size {o.size}; fix: --pp 1")
    if script == "infer" and (o.pp, o.cp, o.sp, o.fsdp) != (1, 1, False, False):
        raise ValueError("generation runs on one device or with --tp; fix: --pp 1 --cp 1 --no-sp --no-fsdp")
    if script == "evaluate" and (o.pp, o.cp, o.sp, o.fsdp) != (1, 1, False, False):
        raise ValueError("evaluation runs with --tp and data parallel; fix: --pp 1 --cp 1 --no-sp --no-fsdp")
    if script not in ("train", "perf"):
        return
    if o.seq_len > config.max_position_embeddings:
        raise ValueError(
            f"seq_len={o.seq_len} is more than the model's {config.max_position_embeddings} positions; fix: --seq-len"
        )
    if o.ring > 1 and o.seq_len * o.micro_batch % (2 * o.cp * (o.tp if o.sp else 1)):
        raise ValueError(
            f"{o.seq_len * o.micro_batch} tokens do not split into zig-zag halves over cp={o.cp}; fix: --seq-len or --cp"
        )
    if o.aux and (not config.num_experts or o.pp > 1 or o.cp > 1):
        raise ValueError("aux balances experts that one rank sees whole; fix: --aux 0, or a size with experts, pp=cp=1")


def _check_data(o: TrainOptions, config: Qwen3Config) -> None:
    tokenizer = o.tokenizer / "tokenizer.json"
    if not tokenizer.is_file():
        raise ValueError(f"{tokenizer} does not exist; expected a released tokenizer's folder; fix: --tokenizer")
    largest = _largest_token(tokenizer)
    if largest >= config.vocab_size:
        raise ValueError(
            f"{tokenizer} has token ids up to {largest}, the model (size {o.size}) a vocabulary of {config.vocab_size}; "
            "expected ids below it; fix: --tokenizer, --size or --weights"
        )
    for path, flag in ((o.data, "--data"), (o.validation, "--validation")):
        if path is None or _is_demo(path):
            continue
        if o.job == "pretrain":
            for suffix in (".bin", ".idx"):
                if not Path(f"{path}{suffix}").is_file():
                    raise ValueError(
                        f"{path}{suffix} does not exist; expected an indexed data set; fix: {flag}, or preprocess.sh"
                    )
        elif not path.exists():
            raise ValueError(f"{path} does not exist; expected .jsonl or .json conversations; fix: {flag}")


def _check_tasks(o: EvaluateOptions) -> None:
    names = task_names(o)
    if not names:
        raise ValueError("nothing to evaluate; expected names of tasks; fix: --tasks mmlu,gsm8k")
    if not o.task_folder.is_dir():
        raise ValueError(f"{o.task_folder} does not exist; expected a folder of tasks or data sets; fix: --task-folder")
    if running := [name for name in names if name.startswith(RUNS_CODE) and not o.allow_code_execution]:
        raise ValueError(
            f"{', '.join(running)} runs programs that the model wrote, with your rights and no sandbox; "
            "fix: --allow-code-execution where that may be, or leave it out of --tasks"
        )


def task_names(o: EvaluateOptions) -> list[str]:
    """--tasks as the harness calls them."""
    names = [name.strip() for name in (o.tasks or "").split(",") if name.strip()]
    return [{"c-eval": "ceval-valid", "ceval": "ceval-valid"}.get(name.lower(), name) for name in names]


def _largest_token(tokenizer: Path) -> int:
    """The largest id of a tokenizer.json."""
    values = weights.read_json(tokenizer)
    added = [token["id"] for token in values.get("added_tokens", [])]
    return max([*values["model"]["vocab"].values(), *added])


def _is_demo(path: Path) -> bool:
    return DEMO_DATA in path.parents


def _default_size(folder: Path | None) -> str:
    """The size whose architecture the weights folder has; without one, tiny on a CPU, else the smallest published."""
    if folder is None:
        return "tiny" if os.environ.get("ZOO_DEVICE", "cpu") == "cpu" else "0.6B"
    found = _sharded_config(folder) if is_sharded(folder) else Qwen3Config.from_folder(folder)
    for name, config in SIZES.items():
        if not _differs(found, config):
            return name
    nearest = min(SIZES, key=lambda name: len(_differs(found, SIZES[name])))
    raise ValueError(
        f"{folder} has an architecture that is none of {', '.join(SIZES)} (nearest {nearest}: "
        f"{', '.join(_differs(found, SIZES[nearest]))}); fix: --weights, or add the size to config.py"
    )


def _differs(found: Qwen3Config, wanted: Qwen3Config) -> list[str]:
    pairs = {f.name: (getattr(found, f.name), getattr(wanted, f.name)) for f in dataclasses.fields(Qwen3Config)}
    return [f"{name} {ours} != {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]


def is_sharded(folder: Path) -> bool:
    """Whether a folder is one of our sharded checkpoints."""
    return (folder / "manifest.json").is_file()


def _sharded_config(folder: Path) -> Qwen3Config:
    return Qwen3Config(**json.loads((folder / "state.json").read_text())["model"])


def _with_demo(o, script: str, asked: set[str]):
    """Fill in the embedded demo where the user named no data or no weights; what was asked for stays."""
    changes = {}
    if script == "train" and o.data is None and o.job == "sft" and o.size in ("tiny", "tiny-moe"):
        changes |= {k: v for k, v in DEMO_SFT.items() if f"--{k.replace('_', '-')}" not in asked}
    if script == "train" and o.data is None:
        stem = "text" if o.job == "pretrain" else "sft"
        names = ("train", "validation") if o.job == "pretrain" else ("train.jsonl", "test.jsonl")
        changes["data"], validation = (DEMO_DATA / stem / name for name in names)
        changes["validation"] = o.validation or validation
    if script == "perf":
        if o.weights is not None:
            raise ValueError("the benchmarks draw their weights; fix: --size instead of --weights")
        changes["from_scratch"] = True
    elif o.weights is None and script == "train":
        if o.size not in ("tiny", "tiny-moe") and o.data is not None and not o.from_scratch:
            raise ValueError(f"size {o.size} has no weights; fix: --weights DIR, or --from-scratch")
        changes["from_scratch"] = True
    elif o.weights is None:
        if o.size != "tiny":
            raise ValueError(f"size {o.size} has no weights; fix: --weights DIR")
        changes["weights"] = DEMO_WEIGHTS
        if script == "infer" and not o.prompt and not o.prompts:
            changes["prompt"] = DEMO_PROMPT
        if script == "evaluate" and o.tasks is None:
            changes |= {"tasks": "sort_digits,sort_digits_choice", "chat": o.chat or "--no-chat" not in asked}
    if script == "evaluate" and o.task_folder is None:
        changes["task_folder"] = DEMO_TASKS
    if hasattr(o, "tokenizer") and o.tokenizer is None:
        has_one = o.weights is not None and (o.weights / "tokenizer.json").is_file()
        changes["tokenizer"] = o.weights if has_one else DEMO_TOKENIZER
    if script in ("train", "convert", "evaluate", "perf") and o.out is None:
        changes["out"] = cli.default_out(HERE.name, script if script == "perf" else getattr(o, "job", script))
    if script == "train":
        changes["cache"] = o.cache or DEMO_DATA.with_name(f"{HERE.name}-cache")
    return dataclasses.replace(o, **changes)


def model_config(o) -> Qwen3Config:
    """The architecture: the weights folder's own, or the size's."""
    if o.size not in SIZES:
        raise ValueError(f"unknown size {o.size!r}; expected {', '.join(SIZES)}; fix: --size, or add it to config.py")
    if o.weights is None:
        changes = {"num_hidden_layers": getattr(o, "layers", None), "vocab_size": getattr(o, "vocabulary", None)}
        return dataclasses.replace(SIZES[o.size], **{k: v for k, v in changes.items() if v})
    if is_sharded(o.weights):
        return _sharded_config(o.weights)
    found = Qwen3Config.from_folder(o.weights)
    if not getattr(o, "from_scratch", False) and (differs := _differs(found, SIZES[o.size])):
        raise ValueError(f"{o.weights} is not of size {o.size}: {', '.join(differs)}; fix: --size or --weights")
    return found


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty. ValueError: there is none."""
    if not path.is_file():
        raise ValueError(f"--prompts {path} does not exist; expected a text file, a prompt per line; fix: --prompts")
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--prompts {path} holds no prompt; expected a prompt per line; fix: --prompts")
    return lines


def prepare(o) -> None:
    """Before any process starts: make the demo data if this job uses it, and install what this job alone needs."""
    if isinstance(o, EvaluateOptions) and importlib.util.find_spec("lm_eval") is None:
        _install(HERE / "requirements-evaluate.txt")
    if getattr(o, "data", None) is not None and _is_demo(o.data):
        from .demo import make_data

        if o.job == "sft":
            make_data.make_sft(DEMO_DATA / "sft")
            return
        make_data.make(DEMO_DATA / "text")
        for split in (o.data, o.validation):
            text = preprocess.PreprocessOptions(
                **_defaults(preprocess.PreprocessOptions) | {"workers": 0, "out": split}
            )
            text = dataclasses.replace(text, data=split.with_suffix(".jsonl"))
            vocabulary = model_config(o).vocab_size
            preprocess.run(preprocess.checked(text, vocabulary), vocabulary)


def _install(requirements: Path) -> None:
    """Add packages to the zoo's own .venv, none of whose own may change. ValueError: this Python is not that one."""
    if "ZOO_PYTHON" in os.environ:
        raise ValueError(
            f"{sys.executable} lacks the packages of {requirements.name}; fix: {sys.executable} -m pip install -r "
            f"{requirements}, or unset ZOO_PYTHON"
        )
    print(f"installing {requirements.name} into {sys.prefix} (once, about a minute)", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip"]
    kept = Path(sys.prefix) / ".kept"
    kept.write_text(subprocess.check_output([*pip, "list", "--format=freeze"], text=True))
    if subprocess.run([*pip, "install", "--quiet", "--no-compile", "-r", requirements, "-c", kept]).returncode:
        raise ValueError(f"pip could not install {requirements}, see above; fix: a package index that has them")


def _defaults(cls) -> dict:
    return {f.name: f.default for f in dataclasses.fields(cls)}


def dry_run(o) -> str:
    """What a run would be, from the options alone."""
    if isinstance(o, preprocess.PreprocessOptions):
        return f"{cli.to_toml(o)}\nfor a model of parameters: {model_config(o).parameters:,}"
    config = model_config(o)
    length = getattr(o, "seq_len", 4096)
    flops = config.flops(length)
    return "\n".join([
        cli.to_toml(o),
        f"parameters: {config.parameters:,}, of which a token meets {config.active_parameters:,}",
        f"world {o.world}: tp {o.tp} cp {o.cp} dp {o.dp} pp {o.pp}",
        cli.rank_map(o),
        f"{flops / 1e12:.3f} TFLOP per row of {length} tokens forward, "
        f"{3 * flops * (o.global_batch or 1) / 1e12:.3f} TFLOP per training step",
        f"memory per rank, estimated: {memory_estimate(o, config, length) / 2**30:.2f} GiB",
    ])  # fmt: skip


def memory_estimate(o, config: Qwen3Config, length: int) -> float:
    """Bytes per rank of weights, gradients, optimizer and saved activations; workspace not counted.

    Weights and gradients in their dtypes, fp32 master weights and two moments sharded over dp*cp; of the activations
    what the backward reads of each block (recompute none: all of it; full: the block's input alone). Experts' rows as
    if spread evenly.
    """
    dtype = 4 if o.precision == "fp32" else 2
    share, shards = config.parameters / (o.tp * o.pp), o.dp * o.cp
    kept_weights = share * dtype / (shards if o.fsdp else 1)
    gradients = share * (dtype if o.fsdp else 4) / (shards if o.fsdp else 1)
    master = share * (8 if o.fsdp and dtype == 4 else 12) / shards
    tokens = length / o.cp * o.micro_batch
    D, E, sp = config.hidden_size, config.head_dim, o.tp if o.sp else 1
    attention = E * (2 * config.num_attention_heads + 2 * config.num_key_value_heads) / o.tp
    width, copies = config.intermediate_size, 1
    if config.num_experts:
        width, copies = config.moe_intermediate_size, config.num_experts_per_tok
    mlp = copies * (3 * width / o.tp + (2 * D if config.num_experts else 0))
    everything = tokens * dtype * (4 * D / sp + attention + mlp)
    kept = {
        "none": everything,
        "selective": tokens * dtype * (2 * D / sp + attention + mlp),
        "full": tokens * D * dtype / sp,
    }
    blocks = config.num_hidden_layers / o.pp
    peak = everything if o.recompute == "full" else 0
    return kept_weights + gradients + master + kept[o.recompute] * blocks + peak
