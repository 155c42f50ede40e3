"""The options of this recipe's jobs: what they are called, what the demo fills in, and all that can be known to be
wrong with them before a process starts.

Each job has a dataclass of options and a function that completes and checks one (`JOBS`). No torch here: `--help` and
every refusal come before anything heavy is imported.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import adapters, cli, resume, weights
from common.cli import option
from common.records import BadRow, read_prompts

from . import convert, data, megatron_import, preprocess
from .config import (
    Qwen3Config,
    adaptable,
    adapted_shapes,
    is_sharded,
    memory_estimate,
    model_config,
    resized,
    size_of,
)

HERE = Path(__file__).parent

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
# Learning rates by job on a published size, whose layout has pretraining's. dpo: of all parameters, of adapters x 10.
RATES = {"sft": 1e-5, "lora": 1e-4, "dpo": 5e-7}
LORA_RANK = 16  # of lora.sh, where nothing else is asked
LORA_SETTINGS = ("--lora-rank", "--lora-alpha", "--lora-dropout", "--lora-targets", "--rslora")
ONLY = {"adapters": ("lora", "dpo"), "preference": ("dpo",)}  # group of options: the jobs that read it


@dataclass(frozen=True, kw_only=True)
class TrainOptions(cli.TrainOptions):
    job: str = option("which launcher this is: pretrain, sft, lora or dpo", "pretrain", group="job")
    data: Path | None = option(
        "pretrain: prefix of an indexed data set; sft, lora: .jsonl or .json of messages, conversations, or instruction, "
        "input, output, history, system; dpo: of these or prompt, with chosen, rejected; all: tools (default: the demo's)",
        group="data",
    )
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
    train_on: Literal["all", "last", "complete"] = option(
        "answers of a conversation that are learnt: all, the last, or those whose thoughts the template does not leave out",
        "all", group="data",
    )  # fmt: skip
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
    adapter: Path | None = option("PEFT adapter to start from, folder or file; its settings decide", group="adapters")
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


@dataclass(frozen=True, kw_only=True)
class InferOptions(cli.LayoutOptions):
    tokenizer: Path | None = option("tokenizer's folder (default: --weights)", group="model")
    yarn: float = option(YARN_HELP, None, group="model", layout=True, within="[1, inf)")
    adapter: Path | None = option("PEFT adapter's folder or file, as lora.sh or peft write it", group="model")
    prompt: str = option("what to answer", group="job")
    prompts: Path | None = option(
        "text file, a prompt per line, or .jsonl of prompt, or of messages to continue; tools", group="job"
    )
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
    adapter: Path | None = option("PEFT adapter merged into what is written, folder or file", group="job")


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


# ---------------------------------------------------------------------------------------------------------------- jobs


def parse(script: str, argv: list[str]):
    """argv of a job -> its completed and checked options. See common/cli.py for the contract.

    Raises:
        ValueError: anything about the options, the weights folder or the data that can be known to be wrong.
    """
    cls, description, completed = JOBS[script]
    o = cli.parse_options(cls, argv, description, HERE / "parallel.toml", _default_size)
    if script in ("train", "convert", "evaluate", "perf") and o.out is None:
        o = dataclasses.replace(
            o, out=cli.default_out(HERE.name, script if script == "perf" else getattr(o, "job", script))
        )
    return completed(o, {word.split("=")[0] for word in argv})


def _default_size(folder: Path | None) -> str:
    """The size whose architecture the weights folder has; without one, tiny."""
    return "tiny" if folder is None else size_of(folder)


def _train(o: TrainOptions, asked: set[str]) -> TrainOptions:
    _check_job(o, asked)
    drawn = o.weights is None and o.job in ("pretrain", "sft")
    if drawn and not o.size.startswith("tiny") and o.data is not None and not o.from_scratch:
        raise ValueError(f"size {o.size} has no weights; fix: --weights DIR, or --from-scratch")
    o = _with_training_defaults(dataclasses.replace(o, from_scratch=o.from_scratch or drawn), asked)
    o = _with_tokenizer(o if o.from_scratch else _with_weights(o))
    config = model_config(o)
    o = _laid_out(o, config, o.seq_len * o.micro_batch)
    _check_objective(o, config)
    _check_weights(o, config)
    cli.check_run(o)
    _check_data(o, config)
    if o.adapts:
        _check_adapters(o, config)
    if o.merge and o.from_scratch:
        raise ValueError("--merge adds adapters to released weights, and these are drawn; fix: leave --merge out")
    resume.check(o, run_facts(o))
    for folder, flag in ((o.export, "--export"), (o.merge, "--merge")):
        if folder:
            weights.refuse_existing(folder, flag)
    return o


def _infer(o: InferOptions, asked: set[str]) -> InferOptions:
    if o.weights is None and o.prompt is None and o.prompts is None:
        o = dataclasses.replace(o, prompt=DEMO_PROMPT)
    o = _with_tokenizer(_with_weights(_without_batch(o, asked)))
    if (o.vpp, o.cp, o.sp, o.fsdp) != (1, 1, False, False):
        raise ValueError("generation runs with --tp, --pp and --ep alone; fix: --vpp 1 --cp 1 --no-sp --no-fsdp")
    config = model_config(o)
    o = _laid_out(o, config)
    if o.dp != o.ep:
        raise ValueError(
            f"{o.world} processes, tp*pp*ep = {o.tp * o.pp * o.ep} of which generate; fix: --tp, --pp, --ep or NPROC"
        )
    _check_weights(o, config)
    _check_tokenizer(o, config)
    _check_lengths(o, config)
    if o.adapter:
        _check_adapters(o, config)
    return o


def _evaluate(o: EvaluateOptions, asked: set[str]) -> EvaluateOptions:
    if o.tasks is None:
        o = dataclasses.replace(o, tasks="sort_digits,sort_digits_choice", chat=o.chat or "--no-chat" not in asked)
    o = dataclasses.replace(o, task_folder=o.task_folder or DEMO_TASKS)
    o = _with_tokenizer(_with_weights(_without_batch(o, asked)))
    config = model_config(o)
    o = _laid_out(o, config)
    if (o.pp, o.cp, o.sp, o.fsdp, o.ep) != (1, 1, False, False, 1):
        raise ValueError("evaluation runs with --tp and data parallel; fix: --pp 1 --cp 1 --ep 1 --no-sp --no-fsdp")
    _check_weights(o, config)
    _check_tokenizer(o, config)
    _check_tasks(o)
    return o


def _convert(o: ConvertOptions, asked: set[str]) -> ConvertOptions:
    o = _with_weights(_without_batch(o, asked))
    config = model_config(o)
    o = _laid_out(o, config)
    if megatron_import.is_checkpoint(o.weights):
        megatron_import.files(o.weights)
    else:
        _check_weights(o, config)
    if o.to is None:
        raise ValueError("nothing to convert to; fix: --to released or sharded")
    weights.refuse_existing(o.out, "--out")
    if o.adapter:
        convert.adapter(o.adapter, config)
    return o


def _preprocess(o: preprocess.PreprocessOptions, asked: set[str]) -> preprocess.PreprocessOptions:
    return preprocess.checked(o, model_config(o).vocab_size)


def _perf(o: PerfOptions, asked: set[str]) -> PerfOptions:
    if o.weights is not None:
        raise ValueError("the benchmarks draw their weights; fix: --size instead of --weights")
    o = _with_tokenizer(dataclasses.replace(o, from_scratch=True))
    config = model_config(o)
    o = _laid_out(o, config, o.seq_len * o.micro_batch)
    _check_objective(o, config)
    return o


JOBS = {  # a launcher's script -> its options, what --help says of it, what completes and checks them
    "train": (TrainOptions, "Train Qwen3.", _train),
    "infer": (InferOptions, "Generate text with Qwen3.", _infer),
    "evaluate": (EvaluateOptions, "Evaluate Qwen3 on benchmarks through lm-eval-harness.", _evaluate),
    "preprocess": (preprocess.PreprocessOptions, "Tokenize text for pretraining.", _preprocess),
    "perf": (PerfOptions, "Measure this recipe on this machine.", _perf),
    "convert": (
        ConvertOptions,
        "Convert Qwen3 weights: released or sharded, from either or from Megatron-LM; merge a LoRA.",
        _convert,
    ),
}


# ------------------------------------------------------------------------------------------------- weights and layout


def _with_weights(o):
    """Without --weights the tiny size has the demo's."""
    if o.weights is None and o.size != "tiny":
        raise ValueError(f"size {o.size} has no weights; fix: --weights DIR, or --size tiny")
    return o if o.weights is not None else dataclasses.replace(o, weights=DEMO_WEIGHTS)


def _with_tokenizer(o):
    """--tokenizer, or that of the weights: a release has one, and a checkpoint a copy of its run's. The demo's is for the
    demo's weights, and for drawn ones of its size or on its data.

    Raises:
        ValueError: none of these is there, or the weights are still to be converted.
    """
    if o.weights is not None and megatron_import.is_checkpoint(o.weights):
        raise ValueError(f"{o.weights} is a Megatron-LM checkpoint; fix: convert.sh --to sharded or released, first")
    if o.tokenizer is not None:
        return o
    if o.weights is not None and o.weights.resolve() != DEMO_WEIGHTS.resolve():
        if not (o.weights / "tokenizer.json").is_file():
            raise ValueError(
                f"{o.weights} has no tokenizer.json (an incomplete download?); fix: --tokenizer with the folder of the "
                "tokenizer these weights were trained with"
            )
        return dataclasses.replace(o, tokenizer=o.weights)
    own_data = getattr(o, "data", None) is not None and not _is_demo(o.data)
    if o.weights is None and own_data and not o.size.startswith("tiny"):
        raise ValueError(f"size {o.size} has drawn weights and no tokenizer; fix: --tokenizer")
    return dataclasses.replace(o, tokenizer=DEMO_TOKENIZER)


def _without_batch(o, asked: set[str]):
    """For jobs without a batch to train; of a named layout they take what splits a model only if --layout names it."""
    alone = {k: v for k, v in ONE_DEVICE.items() if not {f"--{k}", f"--no-{k}", "--layout"} & asked}
    return dataclasses.replace(o, micro_batch=1, global_batch=None, **alone)


def _laid_out(o, config: Qwen3Config, tokens: int | None = None):
    """The layout, completed and checked: by `cli.check_layout`, and for what this model asks beyond it."""
    o = cli.check_layout(
        o,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
        tokens=tokens,
        experts=config.num_experts,
    )
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
    return o


def _check_weights(o, config: Qwen3Config) -> None:
    """The tensors of --weights are exactly the model's."""
    if (said := resized(o, config)) is not None:
        cli.note(said)
    if o.weights is None or is_sharded(o.weights):
        return
    if not getattr(o, "from_scratch", False):
        convert.table(config).entries(o.weights)


# ------------------------------------------------------------------------------------------------------------ training


def _check_job(o: TrainOptions, asked: set[str]) -> None:
    """Options of another job, or of another loss, are not ignored."""

    def refuse(flag: str, where: str) -> None:
        raise ValueError(f"{flag} is of {where}, not of {o.job}.sh as it is called here; fix: leave {flag} out")

    if "--train-on" in asked and o.job in ("pretrain", "dpo"):
        refuse("--train-on", "sft.sh and lora.sh")
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


def _with_training_defaults(o: TrainOptions, asked: set[str]) -> TrainOptions:
    """What the job, and the demo where no data are named, have unlike the layout; what was asked for stays."""
    usual = {"cache": DEMO_DATA.with_name(f"{HERE.name}-cache")}
    if o.job == "lora" and not o.adapts:
        usual |= {"lora_rank": LORA_RANK}
    changes = {}
    if o.data is None:
        changes["data"], validation = (DEMO_DATA / name for name in DEMO_FILES[o.job])
        usual |= {"validation": validation}
        usual |= DEMO_RUN.get(o.job, {}) if o.size.startswith("tiny") else {}
    if not o.size.startswith("tiny") and o.job in RATES and not _layout_is_of_job(o, asked):
        rate = RATES[o.job] * (10 if o.job == "dpo" and o.adapts else 1)
        usual |= {"lr": rate, "min_lr": (o.lr if "--lr" in asked else rate) / 10}
    changes |= {name: value for name, value in usual.items() if "--" + name.replace("_", "-") not in asked}
    return cli.shorten_warmup(dataclasses.replace(o, **changes), asked)


def _layout_is_of_job(o: TrainOptions, asked: set[str]) -> bool:
    """Whether the layout's rates are this job's: its name says so, or it was named to train all parameters."""
    return o.job in o.layout.split("-") or ("--layout" in asked and o.job == "sft")


def _check_objective(o: TrainOptions, config: Qwen3Config) -> None:
    """Rows fit the model and the layout; quantisation and the routers' losses go with what else is asked."""
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


def _check_tokenizer(o, config: Qwen3Config) -> None:
    """The model has an embedding for each of its tokens."""
    tokenizer = o.tokenizer / "tokenizer.json"
    if not tokenizer.is_file():
        raise ValueError(f"{tokenizer} does not exist; expected a released tokenizer's folder; fix: --tokenizer")
    largest = _largest_token(tokenizer)
    if largest >= config.vocab_size:
        raise ValueError(
            f"{tokenizer} has token ids up to {largest}, the model (size {o.size}) a vocabulary of {config.vocab_size}; "
            "expected ids below it; fix: --tokenizer, --size or --weights"
        )


def _check_data(o: TrainOptions, config: Qwen3Config) -> None:
    _check_tokenizer(o, config)
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
        else:
            next(data.read_rows(path))  # says what is wrong with a file that is empty or of another kind


def _check_adapters(o, config: Qwen3Config) -> None:
    """What gets adapters, or has them in the folder given, is a linear that the model has and calls."""
    if o.adapter:
        found = {linear.rpartition(".")[2] for linear in convert.adapter(o.adapter, config)}
    else:
        found = set(o.targets(config))
    if bad := sorted(found - set(adaptable(config))):
        flag, good = f"--adapter {o.adapter}" if o.adapter else "--lora-targets", ", ".join(adaptable(config))
        named = ", ".join(name or "an empty name" for name in bad)
        raise ValueError(f"adapters on {named}; expected some of {good} (size {o.size}); fix: {flag}")


def starting_point(o: TrainOptions) -> dict:
    """What a run starts from, told by content: checkpoints of adapters and a reference's log-probabilities are of no use
    beside other weights."""
    start = {
        "weights": str(o.weights and o.weights.absolute()),
        "base": f"drawn with seed {o.seed}" if o.from_scratch else content(o.weights),
    }
    if o.quantize != "none":
        start["base"] += f" as {o.quantize}"
    if o.adapter:
        settings = [pair.settings for pair in convert.adapter(o.adapter, model_config(o)).values()]
        r, alpha = adapters.spread(s.r for s in settings), adapters.spread(s.lora_alpha for s in settings)
        start |= {"adapter": content(o.adapter), "r": r, "alpha": alpha}
    elif o.adapts:
        start |= {"r": o.lora_rank, "alpha": o.lora_alpha, "rslora": o.rslora, "targets": o.targets(model_config(o))}
    return start


def content(folder: Path) -> str:
    """A short name for what a released folder, an adapter's or a checkpoint holds."""
    manifest = folder / "manifest.json"
    return f"{folder.resolve()} {manifest.stat().st_mtime_ns}" if is_sharded(folder) else weights.fingerprint(folder)


def starts_from(o: TrainOptions) -> str:
    """What the weights of a new run are, in words."""
    if o.from_scratch:
        return f"drawn weights, seed {o.seed}"
    what = "checkpoint" if is_sharded(o.weights) else "released weights"
    if o.weights.resolve() == DEMO_WEIGHTS.resolve():
        what = "the demo's weights"
    return f"{what} {o.weights}" + (f" and adapter {o.adapter}" if o.adapter else "")


def run_facts(o: TrainOptions) -> dict:
    """What a run cannot change any more: what it starts from, and what decides its rows and their order."""
    facts = {"job": o.job, "seed": o.seed, "seq_len": o.seq_len, "global_batch": o.global_batch}
    if o.job == "pretrain":
        files = [Path(f"{o.data}{suffix}") for suffix in (".bin", ".idx")]
        facts |= {"separate_documents": o.separate_documents}
    else:
        files = data.list_files(o.data, (".jsonl", ".json")) if o.data.exists() else [o.data]
        facts |= {"too_long": o.too_long, "train_on": o.train_on}
    made = all(file.is_file() for file in files)  # the demo's are made after this was asked for the first time
    return starting_point(o) | facts | {
        "data": {"path": str(o.data), "content": resume.content(files) if made else None},
        "tokenizer": {"path": str(o.tokenizer), "content": data.tokenizer_hash(o.tokenizer)},
    }  # fmt: skip


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


def read_questions(o: InferOptions) -> list[tuple[str, list[dict], list[dict] | None]]:
    """(file:line, messages, tools) of everything to answer.

    Raises:
        ValueError: there is nothing, or a row is no question; names its line.
    """
    if (o.prompt is None) == (o.prompts is None):
        given = "nothing to answer" if o.prompt is None else f"--prompt and --prompts {o.prompts}; expected one of them"
        raise ValueError(f"{given}; fix: --prompt TEXT or --prompts FILE")
    rows = [("--prompt", {"prompt": o.prompt})] if o.prompts is None else read_prompts(o.prompts, "--prompts")
    found = []
    for where, row in rows:
        try:
            messages, tools = data.to_question(row), data.to_tools(row)
        except BadRow as error:
            rule = "a prompt, or messages that end in a question"
            raise ValueError(f"{where}: {error.args[0]}, {error.args[1]}; expected {rule}; fix: {where}") from None
        if not o.chat and (len(messages) > 1 or tools):
            raise ValueError(f"{where}: a conversation with --no-chat; expected a text alone; fix: --chat")
        found.append((where, messages, tools))
    return found


def _check_lengths(o: InferOptions, config: Qwen3Config) -> None:
    """Every question and its answer have positions in the model, the template's few tokens not counted. Only what has
    more bytes than that, so may have more tokens, is tokenized."""
    room = config.positions - o.max_new_tokens
    texts = {where: "".join(m["content"] for m in messages) for where, messages, _ in read_questions(o)}
    longer = {where: text for where, text in texts.items() if len(text.encode()) > room}
    if not longer:
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(o.tokenizer / "tokenizer.json"))
    tokenizer.no_truncation()
    for where, text in longer.items():
        if (length := len(tokenizer.encode(text, add_special_tokens=False))) > room:
            raise ValueError(
                f"{where} has {length} tokens, and {o.max_new_tokens} of an answer make more than the model's "
                f"{config.positions} positions; fix: --max-new-tokens, --yarn, or a shorter prompt"
            )


def prepare(o) -> None:
    """Before any process starts: make the demo data if this job uses it, and install what this job alone needs."""
    if isinstance(o, EvaluateOptions) and importlib.util.find_spec("lm_eval") is None:
        _install(HERE / "requirements-evaluate.txt")
    if getattr(o, "data", None) is not None and _is_demo(o.data):
        cli.say(f"looking for the demo data in {DEMO_DATA}, or making them")
        from .demo import make_data

        if isinstance(o, preprocess.PreprocessOptions):  # which tokenizes it itself
            make_data.make(DEMO_DATA / "text")
            return
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


def trained_parameters(o, config: Qwen3Config) -> int:
    """All, or those of the adapters."""
    if not getattr(o, "adapts", False):
        return config.parameters
    if o.adapter:
        return sum(pair.parameters for pair in convert.adapter(o.adapter, config).values())
    return sum(o.lora_rank * sum(shape) for shape in adapted_shapes(o, config))


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
        f"memory per rank, estimated: {memory_estimate(o, config, length, trained_parameters(o, config)) / 2**30:.2f} GiB",
    ])  # fmt: skip
