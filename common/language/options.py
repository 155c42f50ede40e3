"""Options that language jobs share, and the checks of them that are possible before a process starts.

A recipe's option classes extend these, and its `parse` calls the checks in its own order. Facts of the model come as
plain values: positions of a sequence, size of the vocabulary, names of linears. This module does not import torch.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import cli, jobs, resume
from common.cli import option
from common.jobs import LORA_RANK, LORA_SETTINGS
from common.language import megatron_import
from common.language.chat import to_question, to_tools
from common.language.files import CHATS, largest_token, list_files, read_rows, tokenizer_hash
from common.records import BadRow, read_prompts
from common.release import is_sharded

ONLY = {  # group of options: the jobs that read it
    "adapters": ("lora", "dpo"), "preference": ("dpo",), "steps": ("prm",), "reward": ("orm", "prm"),
}  # fmt: skip
# Named layouts are for training. Generation and conversion use these values unless --layout or the option is given.
ONE_DEVICE = {
    "tp": 1, "sp": False, "pp": 1, "vpp": 1, "stages": "", "cp": 1, "ulysses": None, "ep": 1, "etp": None, "fsdp": False,
}  # fmt: skip
PACKED_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # of a weight under --quantize nf4, see common/ops/nf4.py
RUNS_CODE = ("humaneval", "mbpp")  # names of benchmarks that run programs of the model begin with these


@dataclass(frozen=True, kw_only=True)
class JobOptions(cli.LayoutOptions):
    """Values for jobs without these options. They are class attributes, not options. The dry run reads seq_len."""

    yarn = layers = vocabulary = None
    seq_len, dispatch, aux, aux_over, z_loss = 4096, "alltoall", 0.0, "model", 0.0


@dataclass(frozen=True, kw_only=True)
class TrainOptions(JobOptions, cli.TrainOptions):
    job: str = option("which launcher this is: pretrain, sft, lora, dpo, orm or prm", "pretrain", group="job")
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


@dataclass(frozen=True, kw_only=True)
class RoutingOptions:
    """Options of mixtures of experts."""

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


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(jobs.AdapterOptions):
    lora_rank: int | None = option(
        f"rank of the adapters (lora: {LORA_RANK} if not given; dpo: all parameters train if not given)",
        group="adapters", within="[1, inf)",
    )  # fmt: skip
    lora_targets: str = option(
        "linears to adapt, q_proj,v_proj,…, also of experts (default: all but experts)", "", group="adapters"
    )
    quantize: Literal["none", "nf4"] = option(
        "how the frozen weights of the blocks are kept (nf4: QLoRA, needs bitsandbytes)", "none", group="adapters"
    )

    @property
    def adapts(self) -> bool:
        """Whether only adapters train."""
        return self.lora_rank is not None or self.adapter is not None


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
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


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    placeholder_token: str = option(
        "text that ends every step of a solution; its last token is judged", "ки", group="steps"
    )
    reward_tokens: str = option("two tokens, of a right and of a wrong step", "+,-", group="steps")
    score: Path | None = option(
        "train nothing; score these rows with --weights into scores.jsonl (labels not needed)", group="reward"
    )


@dataclass(frozen=True, kw_only=True)
class InferOptions(JobOptions):
    tokenizer: Path | None = option("tokenizer's folder (default: --weights)", group="model")
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
class EvaluateOptions(JobOptions):
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


@dataclass(frozen=True)
class Demo:
    """The paths of a recipe's embedded demo."""

    weights: Path
    tokenizer: Path
    data: Path  # made on first use

    @property
    def text(self) -> Path:
        """The folder of the text to pretrain on."""
        return self.data / "text"

    def has(self, path: Path | None) -> bool:
        """Returns whether a data file belongs to the demo."""
        return path is not None and self.data in path.parents


# ------------------------------------------------------------------------------------------------------------ defaults


def fill_weights(o, demo: Demo):
    """Fills in the demo's weights for the tiny size without --weights. Raises ValueError for another size."""
    if o.weights is None and o.size != "tiny":
        raise ValueError(f"size {o.size} has no weights; fix: --weights DIR, or --size tiny")
    return o if o.weights is not None else dataclasses.replace(o, weights=demo.weights)


def fill_tokenizer(o, demo: Demo):
    """Fills in --tokenizer with that of the weights: a release has one, and a checkpoint has a copy of its run's. The
    demo's tokenizer is for the demo's weights, and for drawn weights of a tiny size or on the demo's data.

    Raises:
        ValueError: there is no such tokenizer, or the weights must be converted first.
    """
    if o.weights is not None and megatron_import.is_checkpoint(o.weights):
        raise ValueError(f"{o.weights} is a Megatron-LM checkpoint; fix: convert.sh --to sharded or released, first")
    if o.tokenizer is not None:
        return o
    if o.weights is not None and o.weights.resolve() != demo.weights.resolve():
        if not (o.weights / "tokenizer.json").is_file():
            raise ValueError(
                f"{o.weights} has no tokenizer.json (an incomplete download?); fix: --tokenizer with the folder of the "
                "tokenizer these weights were trained with"
            )
        return dataclasses.replace(o, tokenizer=o.weights)
    own_data = o.data is not None and not demo.has(o.data)
    if o.weights is None and own_data and not o.size.startswith("tiny"):
        raise ValueError(f"size {o.size} has drawn weights and no tokenizer; fix: --tokenizer")
    return dataclasses.replace(o, tokenizer=demo.tokenizer)


def drop_batch(o, flags: set[str]):
    """Resets the batch options for a job that does not train. A named layout's split of the model counts only if
    --layout or the split's own option is given."""
    one_device = {k: v for k, v in ONE_DEVICE.items() if not {f"--{k}", f"--no-{k}", "--layout"} & flags}
    return dataclasses.replace(o, micro_batch=1, global_batch=None, **one_device)


def run_facts(o: TrainOptions, start: dict) -> dict:
    """Returns the facts that a run cannot change: its start (`start`), and what decides its rows and their order."""
    facts = {"job": o.job, "seed": o.seed, "seq_len": o.seq_len, "global_batch": o.global_batch}
    if o.job == "pretrain":
        files = [Path(f"{o.data}{suffix}") for suffix in (".bin", ".idx")]
        facts |= {"separate_documents": o.separate_documents}
    else:
        files = list_files(o.data, CHATS) if o.data.exists() else [o.data]
        facts |= {"too_long": o.too_long, "train_on": o.train_on}
    if o.job == "prm":
        facts |= {"placeholder_token": o.placeholder_token, "reward_tokens": o.reward_tokens}
    exist = all(file.is_file() for file in files)  # the demo's files are made after the first call
    return start | facts | {
        "data": {"path": str(o.data), "content": resume.content_hash(files) if exist else None},
        "tokenizer": {"path": str(o.tokenizer), "content": tokenizer_hash(o.tokenizer)},
    }  # fmt: skip


def starts_from(o: TrainOptions, demo: Demo) -> str:
    """Describes the weights that a new run starts from."""
    if o.from_scratch:
        return f"drawn weights, seed {o.seed}"
    kind = "checkpoint" if is_sharded(o.weights) else "released weights"
    if o.weights.resolve() == demo.weights.resolve():
        kind = "the demo's weights"
    return f"{kind} {o.weights}" + (f" and adapter {o.adapter}" if o.adapter else "")


def describe(o, config, trained: int, memory: float) -> str:
    """Describes a run from its options alone.

    Args:
        config: has parameters, active_parameters, num_hidden_layers and flops(length, frozen).
        trained: number of parameters that train.
        memory: bytes per rank.
    """
    flops, step = config.flops(o.seq_len), 3 * config.flops(o.seq_len, o.adapts) * (o.global_batch or 1)
    return "\n".join([
        cli.to_toml(o),
        f"parameters: {config.parameters:,}, of which a token meets {config.active_parameters:,}"
        + (f", in training {trained:,}" if isinstance(o, TrainOptions) else ""),
        f"world {o.world}: tp {o.tp} cp {o.cp} dp {o.dp} pp {o.pp}, layers of the stages: "
        + " ".join(map(str, o.stage_layers(config.num_hidden_layers))),
        cli.rank_map(o),
        f"{flops / 1e12:.3f} TFLOP per row of {o.seq_len} tokens forward, {step / 1e12:.3f} TFLOP per training step",
        f"memory per rank, estimated: {memory / 2**30:.2f} GiB",
    ])  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- checks


def check_job(o: TrainOptions, flags: set[str]) -> None:
    """Refuses options of another job or of another loss, so that none is silently ignored."""

    def refuse(flag: str, where: str) -> None:
        raise ValueError(f"{flag} is of {where}, not of {o.job}.sh as it is called here; fix: leave {flag} out")

    if "--train-on" in flags and o.job not in ("sft", "lora"):
        refuse("--train-on", "sft.sh and lora.sh")
    for f in dataclasses.fields(o):
        flag, jobs = "--" + f.name.replace("_", "-"), ONLY.get(f.metadata["group"], (o.job,))
        if flag in flags and o.job not in jobs:
            refuse(flag, " and ".join(f"{job}.sh" for job in jobs))
        if flag in flags and o.adapter and flag in LORA_SETTINGS:
            refuse(flag, f"new adapters (--adapter {o.adapter} brings its own settings)")
    if "--gamma" in flags and o.preference != "simpo":
        refuse("--gamma", "--preference simpo")
    if o.label_smoothing and o.preference in ("hinge", "ipo"):
        refuse("--label-smoothing", "--preference sigmoid or simpo")
    for flag in {"--merge", "--quantize"} & flags:
        if o.job == "dpo" and not o.adapts:
            refuse(flag, "adapters (--lora-rank or --adapter)")


def check_rows(o: TrainOptions) -> None:
    """Checks that rows split over the ranks of a ring, and that quantisation goes with the other options."""
    if o.ring > 1 and o.seq_len * o.micro_batch % (2 * o.cp * (o.tp if o.sp else 1)):
        raise ValueError(
            f"{o.seq_len * o.micro_batch} tokens do not split into zig-zag halves over cp={o.cp}; fix: --seq-len or --cp"
        )
    refused = [flag for flag in ("fsdp", "compile", "fused_comm") if getattr(o, flag)]
    if o.quantize != "none" and refused:
        raise ValueError(
            f"quantize={o.quantize} with {', '.join(refused)}; expected neither FSDP, a compiler nor a fused kernel, which "
            f"take no 4-bit weights; fix: {' '.join(jobs.flag_of(f'no_{flag}') for flag in refused)}, or --quantize none"
        )
    if o.quantize != "none" and not importlib.util.find_spec("bitsandbytes"):
        raise ValueError(f"quantize={o.quantize} needs bitsandbytes; fix: pip install bitsandbytes, or --quantize none")


def check_routing(o, experts: int) -> None:
    """Checks that the routers' options go with the layout, the job and the model's number of experts."""
    if (o.aux or o.z_loss) and not experts:
        raise ValueError(f"aux={o.aux}, z_loss={o.z_loss}: size {o.size} has no experts; fix: --aux 0 --z-loss 0")
    if (o.aux or o.z_loss) and o.job in ("dpo", "orm", "prm"):
        losses = "preference losses" if o.job == "dpo" else "reward models' losses"
        raise ValueError(f"aux and z_loss are no part of the {losses}; fix: --aux 0 --z-loss 0")
    if o.dispatch == "allgather" and o.ep == 1:
        raise ValueError("dispatch=allgather: with ep=1 no token travels; fix: --ep, or --dispatch alltoall")
    if o.aux and o.aux_over == "model" and o.pp > 1:
        raise ValueError(
            f"aux over the model's layers, which pp={o.pp} parts; fix: --aux-over layer, --aux 0 or --pp 1"
        )


def check_tokenizer(o, vocab_size: int) -> None:
    """Checks that the model has an embedding for each token of the tokenizer."""
    tokenizer = o.tokenizer / "tokenizer.json"
    if not tokenizer.is_file():
        raise ValueError(f"{tokenizer} does not exist; expected a released tokenizer's folder; fix: --tokenizer")
    largest = largest_token(tokenizer)
    if largest >= vocab_size:
        raise ValueError(
            f"{tokenizer} has token ids up to {largest}, the model (size {o.size}) a vocabulary of {vocab_size}; "
            "expected ids below it; fix: --tokenizer, --size or --weights"
        )


def check_data(o: TrainOptions, demo: Demo) -> None:
    """Checks that the files of --data and --validation are there, and that files of rows have at least one."""
    for path, flag in ((o.data, "--data"), (o.validation, "--validation")):
        if path is None or demo.has(path):
            continue
        if o.job == "pretrain":
            for suffix in (".bin", ".idx"):
                if not Path(f"{path}{suffix}").is_file():
                    raise ValueError(
                        f"{path}{suffix} does not exist; expected an indexed data set; fix: {flag}, or preprocess.sh"
                    )
        elif not path.exists():
            kinds = {"dpo": "preference pairs", "orm": "preference pairs", "prm": "solutions in steps"}
            kind = kinds.get(o.job, "conversations")
            raise ValueError(f"{path} does not exist; expected .jsonl or .json {kind}; fix: {flag}")
        else:
            next(read_rows(path))  # raises for a file that is empty or of another kind


def reward_token_ids(o: RewardOptions) -> list[int]:
    """Returns the ids of the tokens of a right and of a wrong step. Raises ValueError if they are no two tokens, or if
    nothing ends a step."""
    from tokenizers import Tokenizer

    if not o.placeholder_token.strip():
        raise ValueError(f"placeholder_token={o.placeholder_token!r}; expected a text; fix: --placeholder-token")
    tokenizer = Tokenizer.from_file(str(o.tokenizer / "tokenizer.json"))
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in o.reward_tokens.split(",")]
    if [len(each) for each in ids] != [1, 1] or ids[0] == ids[1]:
        raise ValueError(
            f"reward_tokens={o.reward_tokens!r} are {ids} in {o.tokenizer}; expected two different single tokens, "
            "RIGHT,WRONG; fix: --reward-tokens"
        )
    return [ids[0][0], ids[1][0]]


def check_adapters(o, linears: set[str], adaptable: list[str]) -> None:
    """Checks that the linears with adapters (of --lora-targets or of the folder --adapter) are linears that the model
    has and calls. Both arguments are ends of names."""
    if bad := sorted(linears - set(adaptable)):
        flag, good = f"--adapter {o.adapter}" if o.adapter else "--lora-targets", ", ".join(adaptable)
        named = ", ".join(name or "an empty name" for name in bad)
        raise ValueError(f"adapters on {named}; expected some of {good} (size {o.size}); fix: {flag}")


def check_tasks(o: EvaluateOptions) -> None:
    names = task_names(o)
    if not names:
        raise ValueError("nothing to evaluate; expected names of tasks; fix: --tasks mmlu,gsm8k")
    if not o.task_folder.is_dir():
        raise ValueError(f"{o.task_folder} does not exist; expected a folder of tasks or data sets; fix: --task-folder")
    if code_tasks := [name for name in names if name.startswith(RUNS_CODE) and not o.allow_code_execution]:
        raise ValueError(
            f"{', '.join(code_tasks)} runs programs that the model wrote, with your rights and no sandbox; "
            "fix: --allow-code-execution where that may be, or leave it out of --tasks"
        )


def task_names(o: EvaluateOptions) -> list[str]:
    """Returns --tasks under the harness' names."""
    names = [name.strip() for name in (o.tasks or "").split(",") if name.strip()]
    return [{"c-eval": "ceval-valid", "ceval": "ceval-valid"}.get(name.lower(), name) for name in names]


def read_questions(o: InferOptions) -> list[tuple[str, list[dict], list[dict] | None]]:
    """Returns (file:line, messages, tools) of every question to answer.

    Raises:
        ValueError: there is no question, or a row (its line is named) is not a question.
    """
    if (o.prompt is None) == (o.prompts is None):
        fault = "nothing to answer" if o.prompt is None else f"--prompt and --prompts {o.prompts}; expected one of them"
        raise ValueError(f"{fault}; fix: --prompt TEXT or --prompts FILE")
    rows = [("--prompt", {"prompt": o.prompt})] if o.prompts is None else read_prompts(o.prompts, "--prompts")
    questions = []
    for where, row in rows:
        try:
            messages, tools = to_question(row), to_tools(row)
        except BadRow as error:
            rule = "a prompt, or messages that end in a question"
            raise ValueError(f"{where}: {error.args[0]}, {error.args[1]}; expected {rule}; fix: {where}") from None
        if not o.chat and (len(messages) > 1 or tools):
            raise ValueError(f"{where}: a conversation with --no-chat; expected a text alone; fix: --chat")
        questions.append((where, messages, tools))
    return questions


def check_lengths(o: InferOptions, positions: int, fix: str) -> None:
    """Checks that every question and its answer fit the model's positions; the template's few tokens are not counted.
    Only a text with more bytes than there is room is tokenized, as no other text can have too many tokens."""
    room = positions - o.max_new_tokens
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
                f"{positions} positions; fix: {fix}"
            )


def install(requirements: Path) -> None:
    """Adds packages to the zoo's own .venv without changing those that it has. Raises ValueError if ZOO_PYTHON names
    another Python, or if pip fails."""
    if "ZOO_PYTHON" in os.environ:
        raise ValueError(
            f"{sys.executable} lacks the packages of {requirements.name}; fix: {sys.executable} -m pip install -r "
            f"{requirements}, or unset ZOO_PYTHON"
        )
    print(f"installing {requirements.name} into {sys.prefix} (once, about a minute)", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip"]
    pins = Path(sys.prefix) / ".kept"
    pins.write_text(subprocess.check_output([*pip, "list", "--format=freeze"], text=True))
    failed = subprocess.run([*pip, "install", "--quiet", "--no-compile", "-r", requirements, "-c", pins]).returncode
    pins.unlink()
    if failed:
        raise ValueError(f"pip could not install {requirements}, see above; fix: a package index that has them")
