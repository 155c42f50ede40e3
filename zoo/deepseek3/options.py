"""The options of this recipe's jobs, the values that the demo fills in, and every check that is possible before a
process starts.

Each job has a dataclass of options and a function that completes and checks them (`JOBS`). What all language jobs share
is in common/language/options.py. No torch here: `--help` and every error come before anything heavy is imported.
"""

import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import cli, jobs, release, resume, weights
from common.cli import option
from common.language import options as language
from common.language import preprocess
from common.language.demo import make_data
from common.language.options import Demo
from common.weights import refuse_existing

from . import convert
from .config import (
    Deepseek3Config,
    adaptable,
    adapted,
    adapted_shapes,
    is_sharded,
    memory_estimate,
    model_config,
    size_of,
    stage_memory,
    stage_shapes,
    stored_config,
)

HERE = Path(__file__).parent

DEMO_TOKENIZER = HERE / "demo" / "tokenizer"
DEMO_WEIGHTS = HERE / "demo" / "weights"  # size tiny, trained by sft.sh
DEMO_PROMPT = "Sort the digits: 52913"
DEMO_RUN = {  # these tasks take fewer steps than the docstrings; 15 conversations fill 99.6 % of a row of 512
    "sft": {"steps": 600, "lr": 3e-3, "save_every": 300, "seq_len": 512},
    "lora": {"steps": 200, "lr": 3e-3, "save_every": 200, "seq_len": 512},
    "dpo": {"steps": 200, "lr": 3e-4, "save_every": 200, "seq_len": 512, "sft_weight": 1.0},  # see demo/README.md
}
DEMO_FILES = {"pretrain": ("text/train", "text/validation")} | {
    job: (f"{job}/train.jsonl", f"{job}/test.jsonl") for job in ("sft", "lora", "dpo")
}
DEMO_DATA = HERE.parents[1] / "data" / f"{HERE.name}-demo"
DEMO_TASKS = HERE / "demo" / "tasks"
DEMO = Demo(DEMO_WEIGHTS, DEMO_TOKENIZER, DEMO_DATA)
DEMO_END = "<|endoftext|>"  # the token that ends a document of the demo's
# Learning rates of jobs on published sizes, whose layouts hold pretraining's. dpo: all parameters; adapters: 10 times
# it.
RATES = {"sft": 1e-5, "lora": 1e-4, "dpo": 5e-7}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of the experts and of the multi-token prediction module."""

    bias_speed: float = option(
        "how far the routers' biases move after each step, to balance the experts", 1e-3, group="objective",
        layout=True, within="[0, inf)",
    )  # fmt: skip
    aux: float = option(
        "weight of each layer's sequence-wise balance loss", 0.0, group="objective", layout=True, within="[0, inf)"
    )
    dispatch: Literal["alltoall", "allgather"] = option(
        "how tokens reach experts on other ranks; gathered where ep is smaller than the experts of a token", "alltoall",
        group="layout", layout=True,
    )  # fmt: skip
    mtp: bool = option(
        "train the multi-token prediction module, too (pretrain and sft of all parameters)", True, group="objective"
    )
    mtp_weight: float = option("weight of its loss", 0.3, group="objective", layout=True, within="(0, inf)")
    device_memory: float | None = option(
        "refuse a run whose estimated memory per device is more than this (GiB)", group="layout", within="(0, inf)"
    )
    experts = None


@dataclass(frozen=True, kw_only=True)
class TrainOptions(
    language.PreferenceOptions,
    language.AdapterOptions,
    ModelOptions,
    language.TrainOptions,
):
    data: Path | None = option(
        "pretrain: prefix of an indexed data set; sft, lora: .jsonl or .json of messages, conversations, or instruction, "
        "input, output, history, system; dpo: of these or prompt, with chosen, rejected; all: tools (default: the demo's)",
        group="data",
    )

    def targets(self, config: Deepseek3Config) -> list[str]:
        """Returns the name endings of the linears that get adapters."""
        return self.lora_targets.split(",") if self.lora_targets else adapted(config)


@dataclass(frozen=True, kw_only=True)
class InferOptions(language.InferOptions):
    speculative: bool = option(
        "let the multi-token prediction module guess a token ahead; the answer is the same", False, group="job"
    )
    experts = None

    @property
    def mtp(self) -> bool:
        return self.speculative


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(language.EvaluateOptions):
    mtp, experts = False, None


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(language.JobOptions):
    to: Literal["released", "sharded"] = option("what to write; the kind of --weights is recognised", group="job")
    out: Path = option("folder to write", group="job")
    adapter: Path | None = option("PEFT adapter merged into what is written, folder or file", group="job")
    fp8: bool = option(
        "write matrices in fp8 with scales of 128 x 128 blocks, as the release has them", False, group="job"
    )
    mtp, experts = True, None


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions(preprocess.PreprocessOptions):
    end: str = option("token that ends every document (default: the tokenizer's own)", "", group="data")
    mtp, experts = True, None


@dataclass(frozen=True, kw_only=True)
class PerfOptions(TrainOptions):
    only: Literal["all", "step", "sft", "generate", "preprocess", "load"] = option(
        "which benchmark", "all", group="job"
    )
    repeats: int = option("timed training steps", 20, group="job", within="[1, inf)")
    layers: int | None = option("this many layers instead of the size's", group="model", within="[1, inf)")
    experts: int | None = option("this many experts per layer instead of the size's", group="model", within="[2, inf)")
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
    drawn = o.weights is None and o.job in ("pretrain", "sft")
    if drawn and not o.size.startswith("tiny") and o.data is not None and not o.from_scratch:
        raise ValueError(f"size {o.size} has no weights; fix: --weights DIR, or --from-scratch")
    o = _with_training_defaults(dataclasses.replace(o, from_scratch=o.from_scratch or drawn), flags)
    o = language.fill_tokenizer(o if o.from_scratch else language.fill_weights(o, DEMO), DEMO)
    o = _with_module(o, flags)
    config = model_config(o)
    o = _complete_layout(o, config, o.seq_len * o.micro_batch)
    _check_objective(o, config)
    check_memory(o, config)
    _check_weights(o, config)
    cli.check_run(o)
    language.check_tokenizer(o, config.vocab_size)
    if o.job == "pretrain":
        document_end(o.tokenizer)
    language.check_data(o, DEMO)
    if o.adapts:
        _check_adapters(o, config)
    resume.check(o, run_facts(o))
    jobs.check_written(o)
    return o


def _infer(o: InferOptions, flags: set[str]) -> InferOptions:
    if o.weights is None and o.prompt is None and o.prompts is None:
        o = dataclasses.replace(o, prompt=DEMO_PROMPT)
    is_demo = o.weights is None
    o = language.fill_tokenizer(language.fill_weights(language.drop_batch(o, flags), DEMO), DEMO)
    if is_demo and o.temperature == 0 and o.pp == 1 and "--no-speculative" not in flags:
        o = dataclasses.replace(o, speculative=True)
    if (o.vpp, o.cp, o.sp, o.fsdp) != (1, 1, False, False):
        raise ValueError("generation runs with --tp, --pp and --ep alone; fix: --vpp 1 --cp 1 --no-sp --no-fsdp")
    config = model_config(o)
    if o.speculative and not config.num_nextn_predict_layers:
        raise ValueError(f"{o.weights} has no multi-token prediction module; fix: leave --speculative out")
    if o.speculative and (o.pp > 1 or o.temperature):
        raise ValueError("--speculative is greedy and on one pipeline stage; fix: --pp 1 --temperature 0")
    o = _complete_layout(o, config)
    if o.dp != o.ep:
        raise ValueError(
            f"{o.world} processes, tp*pp*ep = {o.tp * o.pp * o.ep} of which generate; fix: --tp, --pp, --ep or NPROC"
        )
    _check_weights(o, config)
    language.check_tokenizer(o, config.vocab_size)
    language.check_lengths(o, config.positions, "--max-new-tokens, or a shorter prompt")
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
    _check_weights(o, config)
    if o.to is None:
        raise ValueError("nothing to convert to; fix: --to released or sharded")
    if o.fp8 and o.to != "released":
        raise ValueError("a sharded checkpoint is not in fp8; expected --to released; fix: leave --fp8 out")
    refuse_existing(o.out, "--out")
    if o.adapter:
        convert.adapter(o.adapter, config)
    return o


def _preprocess(o: PreprocessOptions, flags: set[str]) -> PreprocessOptions:
    tokenizer = o.tokenizer or o.weights or DEMO_TOKENIZER
    o = dataclasses.replace(o, end=o.end or document_end(tokenizer))
    return preprocess.check(o, model_config(o).vocab_size, DEMO)


def document_end(tokenizer: Path) -> str:
    """Returns the token that ends a document of text: the demo's if a tokenizer has it, else its end of sequence.

    Raises:
        ValueError: the tokenizer's files do not say what it is.
    """
    added = weights.read_json(tokenizer / "tokenizer.json").get("added_tokens", [])
    if DEMO_END in [token["content"] for token in added]:
        return DEMO_END
    settings = tokenizer / "tokenizer_config.json"
    end = weights.read_json(settings).get("eos_token") if settings.is_file() else None
    end = end.get("content") if isinstance(end, dict) else end
    if not end:
        raise ValueError(f"{settings} names no eos_token, which ends a document; fix: --end, or --tokenizer")
    return end


def _perf(o: PerfOptions, flags: set[str]) -> PerfOptions:
    if o.weights is not None:
        raise ValueError("the benchmarks draw their weights; fix: --size instead of --weights")
    if o.mtp and "--mtp" in flags:
        raise ValueError("transformers' training step has no multi-token prediction module; fix: leave --mtp out")
    o = language.fill_tokenizer(dataclasses.replace(o, from_scratch=True, mtp=False), DEMO)
    config = model_config(o)
    o = _complete_layout(o, config, o.seq_len * o.micro_batch)
    _check_objective(o, config)
    return o


JOBS = {  # a launcher's script -> its options, its description in --help, the function that completes and checks them
    "train": (TrainOptions, "Train DeepSeek-V3.", _train),
    "infer": (InferOptions, "Generate text with DeepSeek-V3.", _infer),
    "evaluate": (EvaluateOptions, "Evaluate DeepSeek-V3 on benchmarks through lm-eval-harness.", _evaluate),
    "preprocess": (PreprocessOptions, "Tokenize text for pretraining.", _preprocess),
    "perf": (PerfOptions, "Measure this recipe on this machine.", _perf),
    "convert": (
        ConvertOptions,
        "Convert DeepSeek-V3 weights: released or sharded, from either; merge a LoRA.",
        _convert,
    ),
}


# ------------------------------------------------------------------------------------------------- weights and layout


def _complete_layout(o, config: Deepseek3Config, tokens: int | None = None):
    """Completes and checks the layout: `cli.check_layout`, then what this model requires besides."""
    o = cli.check_layout(
        o,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
        tokens=tokens,
        experts=config.n_routed_experts,
    )
    if config.n_routed_experts % config.n_group or config.n_routed_experts < 2 * config.n_group:
        raise ValueError(
            f"{config.n_routed_experts} experts in n_group={config.n_group}; expected groups of one size, at least 2; "
            "fix: config.json"
        )
    for flag, count, noun in (
        ("tp", config.vocab_size, "tokens of the vocabulary"),
        ("tp", config.intermediate_size, "columns of the MLP"),
        ("tp", config.n_shared_experts * config.moe_intermediate_size, "columns of the shared expert"),
        ("etp", config.moe_intermediate_size, "columns of an expert"),
    ):
        if count % getattr(o, flag):
            raise ValueError(f"{flag}={getattr(o, flag)} does not divide {count} {noun} (size {o.size}); fix: --{flag}")
    if o.fused_comm:
        rows = (config.num_attention_heads * config.v_head_dim, config.intermediate_size)
        cli.check_fused_comm(o, [config.hidden_size, *(width // o.tp for width in rows)])
    return o


def _check_weights(o, config: Deepseek3Config) -> None:
    """Checks that the tensors of --weights are exactly the model's, and in fp8 if its config.json says so."""
    if o.weights is not None and not is_sharded(o.weights) and not o.from_scratch:
        table = convert.table(config)
        release.is_fp8(o.weights, table, table.entries(o.weights))


def _with_module(o: TrainOptions, flags: set[str]) -> TrainOptions:
    """Decides whether the multi-token prediction module trains: only where all parameters train on text, and only if the
    weights have it.

    Raises:
        ValueError: --mtp is given and it cannot.
    """
    fault = None
    if o.adapts or o.job == "dpo":
        fault = f"the multi-token prediction module has no loss in {o.job}.sh"
    elif o.mtp and not stored_config(o).num_nextn_predict_layers:
        fault = f"{o.weights or o.size} has no multi-token prediction module"
        cli.note(f"{fault}: it is not trained")
    if fault and "--mtp" in flags:
        raise ValueError(f"{fault}; fix: --no-mtp")
    return dataclasses.replace(o, mtp=o.mtp and not fault)


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


def _check_objective(o: TrainOptions, config: Deepseek3Config) -> None:
    """Checks that rows fit the model and the layout."""
    if o.seq_len > config.positions:
        raise ValueError(f"seq_len={o.seq_len} is more than the model's {config.positions} positions; fix: --seq-len")
    language.check_rows(o)
    if o.dispatch == "allgather" and o.ep == 1:
        raise ValueError("dispatch=allgather: with ep=1 no token travels; fix: --ep, or --dispatch alltoall")
    if o.aux and o.job == "dpo":
        raise ValueError("aux is no part of the preference losses; fix: --aux 0")


def _check_adapters(o, config: Deepseek3Config) -> None:
    """Checks that every linear with an adapter, new or of --adapter, is one that can have it (see `adaptable`)."""
    if o.adapter:
        linears = {linear.rpartition(".")[2] for linear in convert.adapter(o.adapter, config)}
    else:
        linears = set(o.targets(config))
    language.check_adapters(o, linears, list(dict.fromkeys(adaptable(config) + adapted(config))))


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
            make = {"sft": make_data.make_sft, "lora": make_data.make_descending, "dpo": make_data.make_pairs}
            make[o.job](DEMO_DATA / o.job)
            return
        make_data.make(DEMO.text)
        for split in (o.data, o.validation):
            split_options = PreprocessOptions(data=split.with_suffix(".jsonl"), workers=0, out=split, end=DEMO_END)
            vocabulary = model_config(o).vocab_size
            preprocess.run(preprocess.check(split_options, vocabulary, DEMO), vocabulary)


def trained_parameters(o, config: Deepseek3Config) -> int:
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
    text = language.describe(o, config, trained, memory_estimate(o, config, o.seq_len, trained))
    return f"{text}\n{describe_stages(o, config, trained)}" if isinstance(o, TrainOptions) else text


def describe_stages(o: TrainOptions, config: Deepseek3Config, trained: int) -> str:
    """Describes what a rank of every pipeline stage holds, and what a rank sends in a step."""
    blocks, rows = o.stage_layers(config.num_hidden_layers), []
    blocks[-1] += config.num_nextn_predict_layers
    for stage, held in enumerate(stage_shapes(o, config)):
        memory = stage_memory(o, config, o.seq_len, trained, stage)
        kinds = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in memory.items())
        count, total = sum(map(math.prod, held.values())), sum(memory.values()) / 2**30
        rows.append(f"stage {stage}: {blocks[stage]} layers, {count:,} parameters; GiB of a rank: {kinds}; {total:.2f}")
    tokens = o.seq_len * o.micro_batch // (o.cp * (o.tp if o.etp < o.tp else 1))  # that a rank routes
    choices, bytes_per_number = tokens * config.num_experts_per_tok, 4 if o.precision == "fp32" else 2
    sent = choices * config.hidden_size * bytes_per_number / 2**20
    layers = max(sum(name.endswith("mlp.gate_up") for name in held) for held in stage_shapes(o, config))
    travels = o.ep > 1 and o.dispatch == "alltoall"
    exchanges = o.micro_batches * layers * (4 + 2 * (o.recompute == "full")) if travels else 0
    state = o.seq_len * o.micro_batch * config.hidden_size * bytes_per_number / (o.cp * (o.tp if o.sp else 1)) / 2**20
    return "\n".join([
        *rows,
        f"a micro-batch gives an expert {choices * o.ep / config.n_routed_experts:,.1f} tokens, if they spread evenly",
        f"a step of a rank: {exchanges:,} all-to-alls of {sent:,.1f} MiB, {2 * o.micro_batches * (o.pp > 1) * o.vpp:,} "
        f"messages of {state:,.1f} MiB between stages",
    ])  # fmt: skip


REMEDIES = {  # what makes a run smaller, the cheapest first
    "--recompute selective": {"recompute": "selective"}, "--moments bf16": {"moments": "bf16"},
    "--master-remainders": {"master_remainders": True}, "--recompute full": {"recompute": "full"},
    "--offload-activations": {"offload_activations": True}, "--offload-optimizer": {"offload_optimizer": True},
}  # fmt: skip


def check_memory(o: TrainOptions, config: Deepseek3Config) -> None:
    """Checks that the estimated memory fits --device-memory.

    Raises:
        ValueError: it does not; names the smallest change that does, one option or else several of them.
    """
    if o.device_memory is None:
        return

    def gib(changes: dict) -> float:
        changed = dataclasses.replace(o, **changes)
        return memory_estimate(changed, config, o.seq_len, trained_parameters(o, config)) / 2**30

    if gib({}) <= o.device_memory:
        return
    candidates, flags, changes = [([flag], change) for flag, change in REMEDIES.items()], [], {}
    for flag, change in REMEDIES.items():
        flags, changes = [*flags, flag], changes | change
        candidates.append((flags, changes))
    fits = next((flags for flags, changes in candidates if gib(changes) <= o.device_memory), None)
    fix = " ".join(fits) if fits else "more devices (--pp, --ep or --tp)"
    raise ValueError(f"a rank needs about {gib({}):.1f} GiB, the device has {o.device_memory:g}; fix: {fix}")
