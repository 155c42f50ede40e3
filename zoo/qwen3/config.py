"""Qwen3: the architecture, its published sizes, and the options of this recipe's jobs.

Sources: the released config.json files (Qwen/Qwen3-*), arXiv:2505.09388 tables 1 and 2.
No torch here: options are checked before anything heavy is imported.
"""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import cli, weights
from common.cli import option

from . import convert, megatron_import, preprocess

HERE = Path(__file__).parent

# What a released config.json must say, where it says anything, for this model to be its.
FIXED = {
    "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "n_shared_experts": 0, "attention_dropout": 0.0,
}  # fmt: skip
YARN = {"type", "rope_type", "factor", "original_max_position_embeddings", "rope_theta"}  # read from such an entry
YARN_USUAL = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1.0}  # what else it may say


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Field names are those of the released `config.json`. num_experts 0: a dense model. rope_factor: YaRN's, over the
    original_max_position_embeddings of pretraining; 1: none."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_factor: float
    max_position_embeddings: int
    original_max_position_embeddings: int
    tie_word_embeddings: bool
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool

    @property
    def positions(self) -> int:
        """Tokens that a sequence may have."""
        return max(self.max_position_embeddings, int(self.rope_factor * self.original_max_position_embeddings))

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

    def flops(self, length: int, frozen: bool = False) -> int:
        """Model FLOPs of the forward of one sequence, a multiply-add counted as two, the vocabulary projection
        included, the lower triangle of attention alone (half of L^2); training is three times that. frozen: a third of
        what training with frozen weights, whose gradients nobody makes, takes; the adapters' own work not counted."""
        D, E, layers = self.hidden_size, self.head_dim, self.num_hidden_layers
        attention = 2 * D * E * (self.num_attention_heads + self.num_key_value_heads)
        mlp = 3 * D * self.intermediate_size
        if self.num_experts:
            mlp = 3 * D * self.moe_intermediate_size * self.num_experts_per_tok + D * self.num_experts
        linear = 2 * length * (layers * (attention + mlp) + self.vocab_size * D)
        linear = linear * 2 // 3 if frozen else linear
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
        values |= _rotary(values, path)
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
        factor, original = values.pop("rope_factor"), values.pop("original_max_position_embeddings")
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        kind, name = ("qwen3_moe", "Qwen3MoeForCausalLM") if self.num_experts else ("qwen3", "Qwen3ForCausalLM")
        if self.num_experts:
            values |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001}
        else:
            for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
                del values[key]
        return values | {
            "architectures": [name], "model_type": kind, "hidden_act": "silu", "attention_bias": False,
            "attention_dropout": 0.0, "use_sliding_window": False, "initializer_range": 0.02,
            "rope_scaling": None if factor == 1 else yarn,
        }  # fmt: skip


def _rotary(values: dict, path: Path) -> dict:
    """The rotary fields of a config.json: releases write rope_theta and rope_scaling, transformers 5 rope_parameters."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    theta, longest = rope.get("rope_theta", values.get("rope_theta")), values.get("max_position_embeddings")
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
    if kind == "default":  # does not say how many were trained: of the released 40,960, 8,192 are for an answer
        factor, original = 1.0, 32768 if longest == 40960 else longest
    else:
        odd = [key for key, value in rope.items() if key not in YARN and value != YARN_USUAL.get(key)]
        if kind != "yarn" or odd or not isinstance(factor, int | float) or factor < 1:
            raise ValueError(
                f"{path} scales its rotary embedding by {rope}; this model only does rope_type 'yarn' with a factor, "
                "original_max_position_embeddings and the usual rest; fix: --weights"
            )
        key = "original_max_position_embeddings"
        original = values.get(key) or rope.get(key) or longest
    return {"rope_theta": theta, "rope_factor": float(factor), "original_max_position_embeddings": original}


_RELEASED = dict(
    vocab_size=151936, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, rope_factor=1.0, max_position_embeddings=40960,
    original_max_position_embeddings=32768,
)  # fmt: skip
_DENSE = dict(num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, norm_topk_prob=False)
_SPARSE = dict(num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, num_key_value_heads=4)
_TINY = dict(
    vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=48, rms_norm_eps=1e-6, rope_theta=1e4, rope_factor=1.0,
    max_position_embeddings=2048, original_max_position_embeddings=2048, tie_word_embeddings=True,
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
DEMO_RUN = {  # these tasks are learnt sooner than the docstrings; rows of 512: 15 conversations fill 99.6 % of one
    "sft": {"steps": 600, "lr": 3e-3, "save_every": 300, "seq_len": 512},
    "lora": {"steps": 200, "lr": 3e-3, "save_every": 200, "seq_len": 512},
    "dpo": {"steps": 200, "lr": 3e-4, "save_every": 200, "seq_len": 512, "sft_weight": 1.0},  # see demo/README.md
}
DEMO_FILES = {"pretrain": ("text/train", "text/validation")} | {
    job: (f"{job}/train.jsonl", f"{job}/test.jsonl") for job in ("sft", "lora", "dpo")
}
DEMO_DATA = HERE.parents[1] / "data" / f"{HERE.name}-demo"
DEMO_TASKS = HERE / "demo" / "tasks"
RUNS_CODE = ("humaneval", "mbpp")  # benchmarks that run what the model wrote, by the start of their names
YARN_HELP = "lengthen the model's positions by YaRN: factor over the pretrained ones (default: as its config.json says)"
# Named layouts are for training: generation and conversion take these of one only if --layout names it.
ONE_DEVICE = {
    "tp": 1, "sp": False, "pp": 1, "vpp": 1, "stages": "", "cp": 1, "ulysses": None, "ep": 1, "etp": None, "fsdp": False,
}  # fmt: skip


LORA_RANK = 16  # of lora.sh, where nothing else is asked
ONLY = {"adapters": ("lora", "dpo"), "preference": ("dpo",)}  # group of options: the jobs that read it


@dataclass(frozen=True, kw_only=True)
class TrainOptions(cli.TrainOptions):
    job: str = option("which launcher this is: pretrain, sft, lora or dpo", "pretrain", group="job")
    from_scratch: bool = option("draw the weights instead of loading them", False, group="model")
    tokenizer: Path | None = option("tokenizer's folder (default: --weights)", group="data")
    validation: Path | None = option("held-out data of the same kind, evaluated at the end", group="data")
    seq_len: int = option("tokens of a row", 4096, group="data", layout=True, within="[2, inf)")
    separate_documents: bool = option(
        "documents packed into a row do not see each other (pretrain)", True, group="data", layout=True
    )
    too_long: Literal["drop", "cut"] = option(
        "what becomes of a conversation, or pair, longer than a row", "drop", group="data", layout=True
    )
    cache: Path | None = option("folder that keeps rendered conversations (default data/<recipe>-cache)", group="data")
    yarn: float = option(YARN_HELP, None, group="model", layout=True, within="[1, inf)")
    aux: float = option(
        "weight of the experts' load-balancing loss", 0.0, group="objective", layout=True, within="[0, inf)"
    )
    aux_over: Literal["model", "layer"] = option(
        "what that balances: choices over all layers (transformers), or the mean over layers of each", "model",
        group="objective", layout=True,
    )  # fmt: skip
    dispatch: Literal["alltoall", "allgather"] = option(
        "how tokens reach experts on other ranks; gathered where ep is smaller than the experts of a token", "alltoall",
        group="layout", layout=True,
    )  # fmt: skip
    z_loss: float = option("weight of the routers' z-loss", 0.0, group="objective", layout=True, within="[0, inf)")
    lora_rank: int | None = option(
        f"rank of the adapters (lora: {LORA_RANK} if not given; dpo: all parameters train if not given)",
        group="adapters", within="[1, inf)",
    )  # fmt: skip
    lora_alpha: float = option("their output is scaled by alpha / rank", 32.0, group="adapters", within="(0, inf)")
    lora_dropout: float = option("dropout of their input", 0.0, group="adapters", within="[0, 1)")
    lora_targets: str = option("linears to adapt, q_proj,v_proj,… (default: all but experts)", "", group="adapters")
    rslora: bool = option("scale by alpha / sqrt(rank)", False, group="adapters")
    adapter: Path | None = option("PEFT adapter folder to start from; its settings decide", group="adapters")
    quantize: Literal["none", "nf4"] = option(
        "how the frozen weights below adapters are kept (nf4: QLoRA, needs bitsandbytes)", "none", group="adapters"
    )
    merge: Path | None = option("write released weights with the adapters added here at the end", group="adapters")
    preference: Literal["sigmoid", "hinge", "ipo", "simpo"] = option(
        "loss of a pair: DPO's, SLiC's, IPO's, or SimPO's, which has no reference", "sigmoid", group="preference"
    )
    beta: float = option(
        "weight of a pair's margin (ipo: 1/(2 beta) is its target)", 0.1, group="preference", within="(0, inf)"
    )
    label_smoothing: float = option(
        "share of pairs taken to be the wrong way round (sigmoid, simpo)", 0.0, group="preference", within="[0, 0.5)"
    )
    gamma: float = option("margin that simpo asks for", 0.5, group="preference", within="[0, inf)")
    sft_weight: float = option(
        "weight of the chosen answers' own loss per token", 0.0, group="preference", within="[0, inf)"
    )

    @property
    def adapts(self) -> bool:
        """Whether adapters train, and nothing else."""
        return self.lora_rank is not None or self.adapter is not None

    def targets(self, config: Qwen3Config) -> list[str]:
        """Ends of the names of the linears that get adapters."""
        return self.lora_targets.split(",") if self.lora_targets else adaptable(config)


def adaptable(config: Qwen3Config) -> list[str]:
    """The linears that adapters go on: not the experts, which are stacked, nor the router and the vocabulary's, whose
    weights are read and not called."""
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return attention if config.num_experts else [*attention, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class InferOptions(cli.LayoutOptions):
    tokenizer: Path | None = option("tokenizer's folder (default: --weights)", group="model")
    yarn: float = option(YARN_HELP, None, group="model", layout=True, within="[1, inf)")
    adapter: Path | None = option("PEFT adapter's folder, as lora.sh writes it", group="model")
    prompt: str = option("what to answer", group="job")
    prompts: Path | None = option("text file, a prompt per line", group="job")
    out: Path | None = option("file for the answers (.jsonl)", group="job")
    chat: bool = option("put the prompt into the tokenizer's chat template", True, group="job")
    thinking: bool = option("let the template open a thought first", False, group="job")
    max_new_tokens: int = option("longest answer", 256, group="job", layout=True, within="[1, inf)")
    batch: int = option("prompts generated together", 16, group="job", within="[1, inf)")
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
    adapter: Path | None = option("PEFT folder of a LoRA, merged into what is written", group="job")


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
    "convert": (
        ConvertOptions,
        "Convert Qwen3 weights: released or sharded, from either or from Megatron-LM; merge a LoRA.",
    ),
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
    asked = {word.split("=")[0] for word in argv}
    if script == "train":
        _check_job(o, asked)
    o = _with_demo(o, script, asked)
    if script not in ("train", "perf"):  # these have no batch
        alone = {k: v for k, v in ONE_DEVICE.items() if not {f"--{k}", f"--no-{k}", "--layout"} & asked}
        o = dataclasses.replace(o, micro_batch=1, global_batch=None, **alone)
    if script == "infer" and (o.vpp, o.cp, o.sp, o.fsdp) != (1, 1, False, False):
        raise ValueError("generation runs with --tp, --pp and --ep alone; fix: --vpp 1 --cp 1 --no-sp --no-fsdp")
    config = model_config(o)
    tokens = o.seq_len * o.micro_batch if script in ("train", "perf") else None
    o = cli.check_layout(
        o,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
        tokens=tokens,
        experts=config.num_experts,
    )
    _check_model(o, config, script)
    foreign = o.weights is not None and megatron_import.is_checkpoint(o.weights)
    if foreign and script != "convert":
        raise ValueError(f"{o.weights} is a Megatron-LM checkpoint; fix: convert.sh --to sharded or released, first")
    if foreign:
        megatron_import.files(o.weights)
    elif o.weights is not None and not is_sharded(o.weights) and not getattr(o, "from_scratch", False):
        convert.released_entries(o.weights, config)
    if script == "train":
        cli.check_run(o)
        _check_data(o, config)
        if o.adapts:
            _check_adapters(o, config)
        if o.merge and o.from_scratch:
            raise ValueError("--merge adds adapters to released weights, and these are drawn; fix: leave --merge out")
        _check_start(o)
        for folder, flag in ((o.export, "--export"), (o.merge, "--merge")):
            if folder:
                weights.refuse_existing(folder, flag)
    if script == "infer":
        if not (o.prompt or o.prompts):
            raise ValueError("nothing to answer; fix: --prompt TEXT or --prompts FILE")
        if o.prompts:
            read_prompts(o.prompts)
        if o.adapter:
            _check_adapters(o, config)
    if script == "evaluate":
        _check_tasks(o)
    if script == "convert":
        if o.to is None:
            raise ValueError("nothing to convert to; fix: --to released or sharded")
        weights.refuse_existing(o.out, "--out")
        if o.adapter:
            convert.adapter(o.adapter, config)
    return o


def _check_job(o: TrainOptions, asked: set[str]) -> None:
    """Options of another job, or of another loss, are not ignored."""

    def refuse(flag: str, where: str) -> None:
        raise ValueError(f"{flag} is of {where}, not of {o.job}.sh as it is called here; fix: leave {flag} out")

    for f in dataclasses.fields(o):
        flag, jobs = "--" + f.name.replace("_", "-"), ONLY.get(f.metadata["group"], (o.job,))
        if flag in asked and o.job not in jobs:
            refuse(flag, " and ".join(f"{job}.sh" for job in jobs))
        if flag in asked and o.adapter and flag in LORA_SETTINGS:
            refuse(flag, f"new adapters (--adapter {o.adapter} brings its own settings)")
    if "--gamma" in asked and o.preference != "simpo":
        refuse("--gamma", "--preference simpo")
    if o.label_smoothing and o.preference in ("hinge", "ipo"):
        refuse("--label-smoothing", "--preference sigmoid or simpo")
    for flag in {"--merge", "--quantize"} & asked:
        if o.job == "dpo" and not o.adapts:
            refuse(flag, "adapters (--lora-rank or --adapter)")


LORA_SETTINGS = ("--lora-rank", "--lora-alpha", "--lora-dropout", "--lora-targets", "--rslora")


def _check_model(o, config: Qwen3Config, script: str) -> None:
    """What this model asks of a layout beyond `cli.check_layout`."""
    keys = config.num_key_value_heads
    if keys % o.tp and o.tp % keys:
        raise ValueError(
            f"tp={o.tp} with {keys} key-value heads (size {o.size}); expected that one divides the other; fix: --tp"
        )
    columns = ("tp", config.intermediate_size, "columns of the MLP")
    if config.num_experts:
        columns = ("etp", config.moe_intermediate_size, "columns of an expert")
    for cut, count, what in (("tp", config.vocab_size, "tokens of the vocabulary"), columns):
        if count % getattr(o, cut):
            raise ValueError(f"{cut}={getattr(o, cut)} does not divide {count} {what} (size {o.size}); fix: --{cut}")
    if script == "infer" and o.dp != o.ep:
        raise ValueError(
            f"{o.world} processes, tp*pp*ep = {o.tp * o.pp * o.ep} of which generate; fix: --tp, --pp, --ep or NPROC"
        )
    if script == "evaluate" and (o.pp, o.cp, o.sp, o.fsdp, o.ep) != (1, 1, False, False, 1):
        raise ValueError("evaluation runs with --tp and data parallel; fix: --pp 1 --cp 1 --ep 1 --no-sp --no-fsdp")
    if script not in ("train", "perf"):
        return
    if o.seq_len > config.positions:
        raise ValueError(
            f"seq_len={o.seq_len} is more than the model's {config.positions} positions; fix: --seq-len or --yarn"
        )
    if o.ring > 1 and o.seq_len * o.micro_batch % (2 * o.cp * (o.tp if o.sp else 1)):
        raise ValueError(
            f"{o.seq_len * o.micro_batch} tokens do not split into zig-zag halves over cp={o.cp}; fix: --seq-len or --cp"
        )
    if o.quantize != "none" and (o.tp > 1 or o.fsdp or o.compile):
        raise ValueError(
            f"quantize={o.quantize} keeps whole weights; fix: --tp 1 --no-fsdp --no-compile, or --quantize none"
        )
    if o.quantize != "none" and not importlib.util.find_spec("bitsandbytes"):
        raise ValueError(f"quantize={o.quantize} needs bitsandbytes; fix: pip install bitsandbytes, or --quantize none")
    if (o.aux or o.z_loss) and not config.num_experts:
        raise ValueError(f"aux={o.aux}, z_loss={o.z_loss}: size {o.size} has no experts; fix: --aux 0 --z-loss 0")
    if (o.aux or o.z_loss) and o.job == "dpo":
        raise ValueError("aux and z_loss are no part of the preference losses; fix: --aux 0 --z-loss 0")
    if o.dispatch == "allgather" and o.ep == 1:
        raise ValueError("dispatch=allgather: with ep=1 no token travels; fix: --ep, or --dispatch alltoall")
    if o.aux and o.aux_over == "model" and o.pp > 1:
        raise ValueError(
            f"aux over the model's layers, which pp={o.pp} parts; fix: --aux-over layer, --aux 0 or --pp 1"
        )


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
            what = "preference pairs" if o.job == "dpo" else "conversations"
            raise ValueError(f"{path} does not exist; expected .jsonl or .json {what}; fix: {flag}")


def _check_adapters(o, config: Qwen3Config) -> None:
    """What gets adapters, or has them in the folder given, is a linear that the model has and calls."""
    if o.adapter:
        settings = o.adapter / "adapter_config.json"
        if not settings.is_file():
            raise ValueError(f"{settings} does not exist; expected a PEFT adapter's folder; fix: --adapter")
        found = {key.rpartition(".lora_")[0].rpartition(".")[2] for key in weights.index(o.adapter)}
    else:
        found = set(o.targets(config))
    if bad := sorted(found - set(adaptable(config))):
        flag, good = f"--adapter {o.adapter}" if o.adapter else "--lora-targets", ", ".join(adaptable(config))
        raise ValueError(f"adapters on {', '.join(bad)}; expected some of {good} (size {o.size}); fix: {flag}")


def starting_point(o: TrainOptions) -> dict:
    """What a run starts from, told by content: checkpoints of adapters and a reference's log-probabilities are of no use
    beside other weights."""
    start = {"weights": str(o.weights), "base": f"drawn with seed {o.seed}" if o.from_scratch else content(o.weights)}
    if o.quantize != "none":
        start["base"] += f" as {o.quantize}"
    if o.adapter:
        settings = weights.read_json(o.adapter / "adapter_config.json")
        start |= {"adapter": content(o.adapter), "r": settings.get("r"), "alpha": settings.get("lora_alpha")}
    elif o.adapts:
        start |= {"r": o.lora_rank, "alpha": o.lora_alpha, "rslora": o.rslora, "targets": o.targets(model_config(o))}
    return start


def content(folder: Path) -> str:
    """A short name for what a released folder, an adapter's or a checkpoint holds."""
    manifest = folder / "manifest.json"
    return f"{folder.resolve()} {manifest.stat().st_mtime_ns}" if is_sharded(folder) else weights.fingerprint(folder)


def _check_start(o: TrainOptions) -> None:
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
    if _architecture_unsaid(folder):
        raise ValueError(f"{folder} is a Megatron-LM checkpoint, which does not say its size; fix: --size")
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
    """In what an architecture is not that of a size, whose releases (base, 2507, ...) differ in their positions."""
    pairs = {f.name: (getattr(found, f.name), getattr(wanted, f.name)) for f in dataclasses.fields(Qwen3Config)}
    for name in ("rope_theta", "rope_factor", "max_position_embeddings", "original_max_position_embeddings"):
        del pairs[name]
    return [f"{name} {ours} != {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]


def is_sharded(folder: Path) -> bool:
    """Whether a folder is one of our sharded checkpoints."""
    return (folder / "manifest.json").is_file()


def _architecture_unsaid(folder: Path) -> bool:
    """Whether it is a Megatron-LM checkpoint to which nobody has added the release's config.json."""
    return megatron_import.is_checkpoint(folder) and not (folder / "config.json").is_file()


def _sharded_config(folder: Path) -> Qwen3Config:
    state = json.loads((folder / "state.json").read_text())
    if "r" in state.get("start", {}):
        raise ValueError(
            f"{folder} holds adapters of {state['start']['weights']} and no whole model; fix: --weights with that, or "
            "what the run wrote with --merge"
        )
    return Qwen3Config(**state["model"])


def _with_demo(o, script: str, asked: set[str]):
    """Fill in the embedded demo where the user named no data or no weights; what was asked for stays."""
    changes = {}
    train = script == "train"
    if train and o.job == "lora" and not o.adapts:
        changes["lora_rank"] = LORA_RANK
    if train and o.data is None and o.size in ("tiny", "tiny-moe"):
        run = DEMO_RUN.get(o.job, {})
        changes |= {k: v for k, v in run.items() if f"--{k.replace('_', '-')}" not in asked}
    if train and o.data is None:
        changes["data"], validation = (DEMO_DATA / name for name in DEMO_FILES[o.job])
        changes["validation"] = o.validation or validation
    if script == "perf":
        if o.weights is not None:
            raise ValueError("the benchmarks draw their weights; fix: --size instead of --weights")
        changes["from_scratch"] = True
    elif o.weights is None and train and o.job in ("pretrain", "sft"):
        if o.size not in ("tiny", "tiny-moe") and o.data is not None and not o.from_scratch:
            raise ValueError(f"size {o.size} has no weights; fix: --weights DIR, or --from-scratch")
        changes["from_scratch"] = True
    elif o.weights is None and not getattr(o, "from_scratch", False):
        if o.size != "tiny":
            raise ValueError(f"size {o.size} has no weights; fix: --weights DIR, or --size tiny")
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
    """The architecture: the weights folder's own, or the size's, its positions lengthened by --yarn."""
    config, factor = _own_config(o), getattr(o, "yarn", None)
    return config if factor is None else dataclasses.replace(config, rope_factor=factor)


def _own_config(o) -> Qwen3Config:
    if o.size not in SIZES:
        raise ValueError(f"unknown size {o.size!r}; expected {', '.join(SIZES)}; fix: --size, or add it to config.py")
    if o.weights is None:
        changes = {"num_hidden_layers": getattr(o, "layers", None), "vocab_size": getattr(o, "vocabulary", None)}
        return dataclasses.replace(SIZES[o.size], **{k: v for k, v in changes.items() if v})
    if is_sharded(o.weights):
        return _sharded_config(o.weights)
    if _architecture_unsaid(o.weights):
        return SIZES[o.size]
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

        if o.job != "pretrain":
            make = {"sft": make_data.make_sft, "lora": make_data.make_descending, "dpo": make_data.make_pairs}
            make[o.job](DEMO_DATA / o.job)
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
    failed = subprocess.run([*pip, "install", "--quiet", "--no-compile", "-r", requirements, "-c", kept]).returncode
    kept.unlink()
    if failed:
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
    step = 3 * config.flops(length, getattr(o, "adapts", False)) * (o.global_batch or 1)
    return "\n".join([
        cli.to_toml(o),
        f"parameters: {config.parameters:,}, of which a token meets {config.active_parameters:,}"
        + (f", in training {trained_parameters(o, config):,}" if isinstance(o, TrainOptions) else ""),
        f"world {o.world}: tp {o.tp} cp {o.cp} dp {o.dp} pp {o.pp}, layers of the stages: "
        + " ".join(map(str, o.stage_layers(config.num_hidden_layers))),
        cli.rank_map(o),
        f"{flops / 1e12:.3f} TFLOP per row of {length} tokens forward, "
        f"{step / 1e12:.3f} TFLOP per training step",
        f"memory per rank, estimated: {memory_estimate(o, config, length) / 2**30:.2f} GiB",
    ])  # fmt: skip


def trained_parameters(o, config: Qwen3Config) -> int:
    """All, or those of the adapters."""
    if not getattr(o, "adapts", False):
        return config.parameters
    if o.adapter:
        return sum(math.prod(entry.shape) for entry in weights.index(o.adapter).values())
    return sum(o.lora_rank * sum(shape) for shape in _adapted(o, config))


def _adapted(o, config: Qwen3Config) -> list[tuple[int, int]]:
    """[out, in] of the linears with adapters; those of an adapter's folder taken to be all."""
    ends = tuple(f"{target}.weight" for target in o.targets(config))
    return [shape for name, shape in convert.shapes(config).items() if name.endswith(ends)]


def memory_estimate(o, config: Qwen3Config, length: int) -> float:
    """Bytes per rank of weights, gradients, optimizer, saved activations and loss; kernels' workspace not counted.

    Weights and gradients in their dtypes, fp32 master weights and two moments sharded over dp*cp; of the activations
    what the backward reads of each block (recompute none: all of it; full: the block's input alone), for as many
    micro-batches as 1F1B holds (stage s: pp - s). The fullest stage counts; experts' rows as if spread evenly. At the
    peak the loss holds the gradient of the vocabulary and a chunk of logits, or one block is whole again. memory.py
    measures it.
    """
    dtype, stages = 4 if o.precision == "fp32" else 2, o.stage_layers(config.num_hidden_layers)
    experts = 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts * config.num_hidden_layers
    trained = trained_parameters(o, config) / config.parameters
    moments = 4 if getattr(o, "moments", "fp32") == "bf16" else 8
    kept_weights = gradients = master = 0.0
    if getattr(o, "quantize", "none") == "nf4":
        kept_weights -= sum(map(math.prod, _adapted(o, config))) * max(stages) / sum(stages) * (dtype - 4.13 / 8)
    for parameters, cut in ((config.parameters - experts, o.tp), (experts, o.etp * o.ep)):
        share, shards = parameters / cut * max(stages) / sum(stages), o.world / (cut * o.pp)
        kept_weights += share * dtype / (shards if o.fsdp else 1)
        gradients += trained * share * (dtype if o.fsdp else 4) / (shards if o.fsdp else 1)
        # fp32 weights are their own master
        master += trained * share * (moments if dtype == 4 else 4 + moments) / shards
    tokens = length / o.cp * o.micro_batch
    D, E, sp = config.hidden_size, config.head_dim, o.tp if o.sp else 1
    attention = E * (config.num_attention_heads + config.num_key_value_heads) / o.tp
    width, copies, rows = config.intermediate_size, 1, 0
    if config.num_experts:
        width, copies, rows = config.moe_intermediate_size, config.num_experts_per_tok, D * o.etp / o.tp
    # Normed inputs of attention and MLP, which sequence parallel gathers; queries and keys twice, values, output.
    # Of the MLP gate, up and their product; the reference op of cpu also silu(gate).
    mlp = copies * width / o.tp
    parts = 4 if os.environ.get("ZOO_DEVICE", "cpu") == "cpu" else 3
    everything = tokens * dtype * (2 * D / sp + 2 * D + 3 * attention + parts * mlp + copies * 2 * rows)
    kept = {
        "none": everything,
        "selective": tokens * dtype * (D / sp + 2 * D - rows + 2 * attention + 2 * mlp + copies * rows),
        "full": tokens * D * dtype / sp,
    }
    offload, vocabulary = getattr(o, "offload_activations", False), config.vocab_size / o.tp
    blocks = 0 if offload else max(n * min(o.pp - stage, o.micro_batches) for stage, n in enumerate(stages))
    # Logits become their own gradient; in bf16 an fp32 copy of them does, and two bf16 ones are beside it.
    loss = vocabulary * D * (4 + dtype % 4) + min(2**26, tokens * vocabulary) * (4 + 2 * (dtype % 4))
    gathered = vocabulary * D * dtype if o.fsdp else 0  # the root's weight stays whole
    again = {"none": 0.0, "full": everything, "selective": everything - kept["selective"]}[o.recompute]
    if again:
        again += 2 * tokens * dtype * mlp  # the gradients of gate and up
    peak = max(loss, again, everything if offload else 0) + gathered
    return kept_weights + gradients + master + kept[o.recompute] * blocks + peak
