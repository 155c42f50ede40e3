"""The options of this recipe's jobs, the values that the demo fills in, and every check that is possible before a
process starts.

Each job has a dataclass of options and a function that completes and checks them (`JOBS`). What all language jobs share
is in common/language/options.py. No torch here: `--help` and every error come before anything heavy is imported.
"""

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import cli, jobs, resume
from common.cli import option
from common.language import megatron_import, preprocess
from common.language import options as language
from common.language.demo import make_data
from common.language.files import read_rows
from common.language.options import Demo, EvaluateOptions
from common.weights import refuse_existing

from . import convert
from .config import (
    Qwen3Config,
    adaptable,
    adapted,
    adapted_shapes,
    describe_vocabulary_change,
    is_sharded,
    memory_estimate,
    model_config,
    size_of,
)

HERE = Path(__file__).parent

DEMO_TOKENIZER = HERE / "demo" / "tokenizer"
DEMO_WEIGHTS = HERE / "demo" / "weights"  # size tiny, trained by sft.sh
DEMO_PROMPT = "Sort the digits: 52913"
DEMO_RUN = {  # these tasks take fewer steps than the docstrings; 15 conversations fill 99.6 % of a row of 512
    "sft": {"steps": 600, "lr": 3e-3, "save_every": 300, "seq_len": 512},
    "lora": {"steps": 200, "lr": 3e-3, "save_every": 200, "seq_len": 512},
    "dpo": {"steps": 200, "lr": 3e-4, "save_every": 200, "seq_len": 512, "sft_weight": 1.0},  # see demo/README.md
    "orm": {"steps": 200, "lr": 1e-3, "save_every": 200, "seq_len": 512},
    "prm": {"steps": 800, "lr": 3e-3, "save_every": 400, "seq_len": 512},
}
DEMO_FILES = {"pretrain": ("text/train", "text/validation")} | {
    job: (f"{job}/train.jsonl", f"{job}/test.jsonl") for job in ("sft", "lora", "dpo", "orm", "prm")
}
DEMO_DATA = HERE.parents[1] / "data" / f"{HERE.name}-demo"
DEMO_TASKS = HERE / "demo" / "tasks"
DEMO = Demo(DEMO_WEIGHTS, DEMO_TOKENIZER, DEMO_DATA)
DOCUMENT_END = "<|endoftext|>"
# Learning rates of jobs on published sizes, whose layouts hold pretraining's. dpo: all parameters; adapters: 10 times
# it.
RATES = {"sft": 1e-5, "lora": 1e-4, "dpo": 5e-7, "orm": 1e-5, "prm": 1e-6}


@dataclass(frozen=True, kw_only=True)
class YarnOptions:
    yarn: float = option(
        "lengthen the model's positions by YaRN: factor over the pretrained ones (default: as its config.json says)",
        group="model", layout=True, within="[1, inf)",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainOptions(
    language.PreferenceOptions,
    language.RewardOptions,
    language.AdapterOptions,
    language.RoutingOptions,
    YarnOptions,
    language.TrainOptions,
):
    data: Path | None = option(
        "pretrain: prefix of an indexed data set; sft, lora: .jsonl or .json of messages, conversations, or instruction, "
        "input, output, history, system; dpo, orm: of these or prompt, with chosen, rejected; all these: tools; prm: "
        "prompt, steps, labels, or input, value (default: the demo's)",
        group="data",
    )

    def targets(self, config: Qwen3Config) -> list[str]:
        """Returns the name endings of the linears that get adapters."""
        return self.lora_targets.split(",") if self.lora_targets else adapted(config)


@dataclass(frozen=True, kw_only=True)
class InferOptions(YarnOptions, language.InferOptions):
    pass


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(language.JobOptions):
    to: Literal["released", "sharded"] = option("what to write; the kind of --weights is recognised", group="job")
    out: Path = option("folder to write", group="job")
    adapter: Path | None = option("PEFT adapter merged into what is written, folder or file", group="job")


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions(preprocess.PreprocessOptions):
    end: str = option("token that ends every document", DOCUMENT_END, group="data")


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
    """Parses a job's argv to its completed and checked options. See common/cli.py for the contract.

    Raises:
        ValueError: any fault of the options, the weights folder or the data that shows before a process starts.
    """
    cls, description, completed = JOBS[script]
    o = cli.parse_options(cls, argv, description, HERE / "parallel.toml", _default_size)
    if script in ("train", "convert", "evaluate", "perf") and o.out is None:
        o = dataclasses.replace(o, out=cli.default_out(HERE.name, o.job if script == "train" else script))
    return completed(o, {word.split("=")[0] for word in argv})


def _default_size(folder: Path | None) -> str:
    """Returns the size whose architecture the weights folder has; tiny without a folder."""
    return "tiny" if folder is None else size_of(folder)


def _train(o: TrainOptions, flags: set[str]) -> TrainOptions:
    language.check_job(o, flags)
    if o.score:
        return _score(o, flags)
    drawn = o.weights is None and o.job in ("pretrain", "sft")
    if drawn and not o.size.startswith("tiny") and o.data is not None and not o.from_scratch:
        raise ValueError(f"size {o.size} has no weights; fix: --weights DIR, or --from-scratch")
    o = _with_training_defaults(dataclasses.replace(o, from_scratch=o.from_scratch or drawn), flags)
    o = language.fill_tokenizer(o if o.from_scratch else language.fill_weights(o, DEMO), DEMO)
    config = model_config(o)
    o = _complete_layout(o, config, o.seq_len * o.micro_batch)
    _check_objective(o, config)
    _check_weights(o, config)
    cli.check_run(o)
    language.check_tokenizer(o, config.vocab_size)
    language.check_data(o, DEMO)
    if o.job == "prm":
        language.reward_token_ids(o)
    if o.adapts:
        _check_adapters(o, config)
    resume.check(o, run_facts(o))
    jobs.check_written(o)
    return o


def _score(o: TrainOptions, flags: set[str]) -> TrainOptions:
    """Completes and checks a call of orm.sh or prm.sh that scores rows and trains nothing."""
    if "--data" in flags or "--validation" in flags:
        raise ValueError(f"--score {o.score} trains nothing; fix: leave --data and --validation out")
    o = language.fill_tokenizer(language.fill_weights(language.drop_batch(o, flags), DEMO), DEMO)
    config = model_config(o)
    o = _complete_layout(o, config)
    if (o.dp, o.pp, o.vpp, o.cp, o.sp, o.fsdp) != (o.ep, 1, 1, 1, False, False):
        raise ValueError("rows are scored with --tp and --ep alone; fix: --pp 1 --cp 1 --no-sp --no-fsdp, or NPROC")
    _check_weights(o, config)
    if o.job == "orm" and not convert.has_score(o.weights):
        raise ValueError(f"{o.weights} is no reward model, it has no score.weight; fix: --weights")
    language.check_tokenizer(o, config.vocab_size)
    if o.job == "prm":
        language.reward_token_ids(o)
    if not o.score.exists():
        raise ValueError(f"{o.score} does not exist; expected .jsonl or .json rows; fix: --score")
    next(read_rows(o.score))
    return o


def _infer(o: InferOptions, flags: set[str]) -> InferOptions:
    if o.weights is None and o.prompt is None and o.prompts is None:
        o = dataclasses.replace(o, prompt=DEMO_PROMPT)
    o = language.fill_tokenizer(language.fill_weights(language.drop_batch(o, flags), DEMO), DEMO)
    if (o.vpp, o.cp, o.sp, o.fsdp) != (1, 1, False, False):
        raise ValueError("generation runs with --tp, --pp and --ep alone; fix: --vpp 1 --cp 1 --no-sp --no-fsdp")
    config = model_config(o)
    o = _complete_layout(o, config)
    if o.dp != o.ep:
        raise ValueError(
            f"{o.world} processes, tp*pp*ep = {o.tp * o.pp * o.ep} of which generate; fix: --tp, --pp, --ep or NPROC"
        )
    _check_weights(o, config)
    language.check_tokenizer(o, config.vocab_size)
    language.check_lengths(o, config.positions, "--max-new-tokens, --yarn, or a shorter prompt")
    if o.adapter:
        _check_adapters(o, config)
    return o


def _evaluate(o: EvaluateOptions, flags: set[str]) -> EvaluateOptions:
    if o.tasks is None:
        o = dataclasses.replace(o, tasks="sort_digits,sort_digits_choice", chat=o.chat or "--no-chat" not in flags)
    o = dataclasses.replace(o, task_folder=o.task_folder or DEMO_TASKS)
    o = language.fill_tokenizer(language.fill_weights(language.drop_batch(o, flags), DEMO), DEMO)
    config = model_config(o)
    o = _complete_layout(o, config)
    if (o.pp, o.cp, o.sp, o.fsdp, o.ep) != (1, 1, False, False, 1):
        raise ValueError("evaluation runs with --tp and data parallel; fix: --pp 1 --cp 1 --ep 1 --no-sp --no-fsdp")
    _check_weights(o, config)
    language.check_tokenizer(o, config.vocab_size)
    language.check_tasks(o)
    return o


def _convert(o: ConvertOptions, flags: set[str]) -> ConvertOptions:
    o = language.fill_weights(language.drop_batch(o, flags), DEMO)
    config = model_config(o)
    o = _complete_layout(o, config)
    if megatron_import.is_checkpoint(o.weights):
        megatron_import.files(o.weights)
    else:
        _check_weights(o, config)
    if o.to is None:
        raise ValueError("nothing to convert to; fix: --to released or sharded")
    refuse_existing(o.out, "--out")
    if o.adapter:
        convert.adapter(o.adapter, config)
    return o


def _preprocess(o: PreprocessOptions, flags: set[str]) -> PreprocessOptions:
    return preprocess.check(o, model_config(o).vocab_size, DEMO)


def _perf(o: PerfOptions, flags: set[str]) -> PerfOptions:
    if o.weights is not None:
        raise ValueError("the benchmarks draw their weights; fix: --size instead of --weights")
    o = language.fill_tokenizer(dataclasses.replace(o, from_scratch=True), DEMO)
    config = model_config(o)
    o = _complete_layout(o, config, o.seq_len * o.micro_batch)
    _check_objective(o, config)
    return o


JOBS = {  # a launcher's script -> its options, its description in --help, the function that completes and checks them
    "train": (TrainOptions, "Train Qwen3.", _train),
    "infer": (InferOptions, "Generate text with Qwen3.", _infer),
    "evaluate": (EvaluateOptions, "Evaluate Qwen3 on benchmarks through lm-eval-harness.", _evaluate),
    "preprocess": (PreprocessOptions, "Tokenize text for pretraining.", _preprocess),
    "perf": (PerfOptions, "Measure this recipe on this machine.", _perf),
    "convert": (
        ConvertOptions,
        "Convert Qwen3 weights: released or sharded, from either or from Megatron-LM; merge a LoRA.",
        _convert,
    ),
}


# ------------------------------------------------------------------------------------------------- weights and layout


def _complete_layout(o, config: Qwen3Config, tokens: int | None = None):
    """Completes and checks the layout: `cli.check_layout`, then what this model requires besides."""
    o = cli.check_layout(
        o,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
        tokens=tokens,
        experts=config.num_experts,
    )
    kv_heads = config.num_key_value_heads
    if kv_heads % o.tp and o.tp % kv_heads:
        raise ValueError(
            f"tp={o.tp} with {kv_heads} key-value heads (size {o.size}); expected that one divides the other; fix: --tp"
        )
    columns = ("tp", config.intermediate_size, "columns of the MLP")
    if config.num_experts:
        columns = ("etp", config.moe_intermediate_size, "columns of an expert")
    for flag, count, noun in (("tp", config.vocab_size, "tokens of the vocabulary"), columns):
        if count % getattr(o, flag):
            raise ValueError(f"{flag}={getattr(o, flag)} does not divide {count} {noun} (size {o.size}); fix: --{flag}")
    if o.fused_comm:
        rows = [
            config.num_attention_heads * config.head_dim,
            *([] if config.num_experts else [config.intermediate_size]),
        ]
        cli.check_fused_comm(o, [config.hidden_size, *(width // o.tp for width in rows)])
    return o


def _check_weights(o, config: Qwen3Config) -> None:
    """Checks that the tensors of --weights are exactly the model's. Notes a vocabulary other than the published one."""
    if config.num_labels and o.job != "orm" and not isinstance(o, ConvertOptions):
        raise ValueError(
            f"{o.weights} is a reward model, which has no vocabulary projection; fix: --weights, or orm.sh"
        )
    if (note := describe_vocabulary_change(o, config)) is not None:
        cli.note(note)
    if o.weights is None or o.from_scratch:
        return
    if config.num_labels and not convert.has_score(o.weights):
        cli.note(f"{o.weights} is a language model: its vocabulary projection is left out, and a score is drawn")
    if not is_sharded(o.weights):
        convert.table(config).entries(o.weights)


# ------------------------------------------------------------------------------------------------------------ training


def _with_training_defaults(o: TrainOptions, flags: set[str]) -> TrainOptions:
    """Replaces defaults of the layout by the job's, and by the demo's if --data is not given. Given options stay."""
    defaults = {"cache": DEMO_DATA.with_name(f"{HERE.name}-cache")}
    if o.job == "lora" and not o.adapts:
        defaults |= {"lora_rank": jobs.LORA_RANK}
    demo = {}
    if o.data is None:
        demo["data"], validation = (DEMO_DATA / name for name in DEMO_FILES[o.job])
        defaults |= {"validation": validation}
        defaults |= DEMO_RUN.get(o.job, {}) if o.size.startswith("tiny") else {}
    if not o.size.startswith("tiny") and o.job in RATES and not _layout_is_of_job(o, flags):
        rate = RATES[o.job] * (10 if o.job == "dpo" and o.adapts else 1)
        defaults |= {"lr": rate, "min_lr": (o.lr if "--lr" in flags else rate) / 10}
    return jobs.fill_defaults(o, flags, defaults, demo)


def _layout_is_of_job(o: TrainOptions, flags: set[str]) -> bool:
    """Whether the layout's learning rate is for this job: its name holds the job, or --layout names it for sft."""
    return o.job in o.layout.split("-") or ("--layout" in flags and o.job == "sft")


def _check_objective(o: TrainOptions, config: Qwen3Config) -> None:
    """Checks that rows fit the model and the layout, and that the router's losses fit the model."""
    if o.seq_len > config.positions:
        raise ValueError(
            f"seq_len={o.seq_len} is more than the model's {config.positions} positions; fix: --seq-len or --yarn"
        )
    language.check_rows(o)
    language.check_routing(o, config.num_experts)


def _check_adapters(o, config: Qwen3Config) -> None:
    """Checks that every linear with an adapter, new or of --adapter, is one that can have it (see `adaptable`)."""
    if o.adapter:
        linears = {linear.rpartition(".")[2] for linear in convert.adapter(o.adapter, config)}
    else:
        linears = set(o.targets(config))
    language.check_adapters(o, linears, adaptable())
    if config.num_key_value_heads % o.tp and linears & {"k_proj", "v_proj"}:
        raise ValueError(
            f"adapters on k_proj, v_proj with tp={o.tp}, where every rank holds all {config.num_key_value_heads} "
            f"key-value heads; expected a tp that divides them; fix: --tp, or --lora-targets without the two"
        )


def starting_point(o: TrainOptions) -> dict:
    """Identifies by content what a run starts from: weights and adapters."""
    config = model_config(o)
    pairs = convert.adapter(o.adapter, config) if o.adapter else {}
    return jobs.starting_point(o, o.weights, pairs, o.targets(config))


def run_facts(o: TrainOptions) -> dict:
    """Returns what a resumed run must keep: what it starts from, and what decides its rows and their order."""
    return language.run_facts(o, starting_point(o))


def prepare(o) -> None:
    """Runs before any process starts: makes the demo data if this job uses it, and installs packages only it needs."""
    if isinstance(o, EvaluateOptions) and importlib.util.find_spec("lm_eval") is None:
        language.install(HERE / "requirements-evaluate.txt")
    if DEMO.has(o.data):
        cli.say(f"looking for the demo data in {DEMO_DATA}, or making them")
        if isinstance(o, PreprocessOptions):  # the job itself tokenizes it
            make_data.make(DEMO.text)
            return
        if o.job != "pretrain":
            make = {"sft": make_data.make_sft, "lora": make_data.make_descending, "dpo": make_data.make_pairs,
                    "orm": make_data.make_ranked, "prm": make_data.make_steps}  # fmt: skip
            make[o.job](DEMO_DATA / o.job)
            return
        make_data.make(DEMO.text)
        for split in (o.data, o.validation):
            split_options = PreprocessOptions(data=split.with_suffix(".jsonl"), workers=0, out=split)
            vocabulary = model_config(o).vocab_size
            preprocess.run(preprocess.check(split_options, vocabulary, DEMO), vocabulary)


def trained_parameters(o, config: Qwen3Config) -> int:
    """Counts the parameters that train: all, or the adapters'."""
    if not o.adapts:
        return config.parameters
    if o.adapter:
        return sum(pair.parameters for pair in convert.adapter(o.adapter, config).values())
    return sum(o.lora_rank * sum(shape) for shape in adapted_shapes(o, config))


def dry_run(o) -> str:
    """Describes a run from its options alone."""
    if isinstance(o, PreprocessOptions):
        return f"{cli.to_toml(o)}\nfor a model of parameters: {model_config(o).parameters:,}"
    config = model_config(o)
    trained = trained_parameters(o, config)
    return language.describe(o, config, trained, memory_estimate(o, config, o.seq_len, trained))
