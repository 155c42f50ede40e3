"""Runs benchmarks through lm-eval-harness (EleutherAI, MIT licence), which supplies the prompts, filters and metrics.

Rank 0 runs the harness and sends its requests to every rank; each data-parallel rank computes a share. Answers are
appended to OUT/answers.jsonl as they come, so the same command with the same --out continues where it stopped.
OUT/results.json holds the figures, OUT/samples/ every question with its answer.

Nothing is downloaded. The harness runs in the folder --task-folder, so a task's data set `cais/mmlu` is the folder of
that name in it,

    hf download --repo-type dataset cais/mmlu --local-dir benchmarks/cais/mmlu

or an entry in the cache of the datasets library, whose pinned version runs no code of a data set. Your own tasks are
.yaml files of the harness in --task-folder. generate.py says what a model must have.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import lm_eval
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from megatron.core import parallel_state as mpu
from tqdm import tqdm

from common import device, jsonl, runlog
from common.language.generate import generate, score
from common.language.options import EvaluateOptions, InferOptions, task_names

THOUGHT_END = "</think>"
# Generation settings that are not supported, with the values at which they have no effect.
NEUTRAL = {"num_beams": (1,), "repetition_penalty": (1, None), "num_return_sequences": (1,)}


# ------------------------------------------------------------------------------------------------- what every rank does


def answer(
    job: tuple[dict | None, list], model, tokenizer, ends: set[int], o: EvaluateOptions, decoders: list | None = None
) -> list:
    """Returns the results of a job, in its order; each data-parallel rank computes a share. job: (None, requests of
    `score`) or (generation settings, prompts). decoders: of `generate`."""
    settings, requests = job
    mine = requests[mpu.get_data_parallel_rank() :: o.dp]
    if settings is None:
        results = score(model, mine, o.row_tokens)
    else:
        options = dataclasses.replace(InferOptions(), batch=o.batch, seed=o.seed, **settings["draw"])
        stop = make_stop(tokenizer, settings["until"], o.thinking)
        results = generate(model, mine, options, ends, stop=stop, decoders=decoders)
    if o.dp == 1:
        return results
    parts, merged = [None] * o.dp, [None] * len(requests)
    dist.all_gather_object(parts, results, group=mpu.get_data_parallel_group())
    for i, part in enumerate(parts):
        merged[i :: o.dp] = part
    return merged


def make_stop(tokenizer, until: list[str], thinking: bool) -> Callable[[list[int]], bool]:
    """Returns a function that says whether an answer has just reached one of the strings, outside of its thought."""
    longest = max((len(text.encode()) for text in until), default=0)  # enough tokens: each has a byte or more
    thought_end = tokenizer.convert_tokens_to_ids(THOUGHT_END) if thinking else None

    def stop(tokens: list[int]) -> bool:
        if thinking:
            if thought_end not in tokens:
                return False
            tokens = tokens[tokens.index(thought_end) + 1 :]
        tail = tokenizer.decode(tokens[-longest:]) if longest else ""
        return any(text in tail for text in until)

    return stop


def broadcast(job):
    """Returns rank 0's job on every rank."""
    jobs = [job]
    dist.broadcast_object_list(jobs, src=0)
    return jobs[0]


# -------------------------------------------------------------------------------------------- what the harness talks to


class Answers:
    """The model's answers by request, in a file from which an interrupted run continues."""

    def __init__(self, path: Path, about: dict):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        jsonl.mend(path)  # a killed run may leave half a line
        header, *answers = jsonl.read(path) or [None]
        if header not in (None, about):
            header = header if isinstance(header, dict) else {}  # the header line is damaged
            differences = ", ".join(f"{k} {header.get(k)!r}, not {v!r}" for k, v in about.items() if header.get(k) != v)
            raise ValueError(f"{path} has the answers of another run: {differences}; expected the same; fix: --out")
        self.known = dict(answers)
        self.file = open(path, "a")
        self.file.write(json.dumps(about) + "\n" if header is None else "")

    def get(self, requests: list, ask: Callable[[list], list], together: int, what: str) -> list:
        """Returns the answer to each request. Only unknown ones are asked, `together` at a time, the longest
        first."""
        keys = [hashlib.sha256(json.dumps(r).encode()).hexdigest()[:32] for r in requests]
        new = {key: r for key, r in zip(keys, requests, strict=True) if key not in self.known}
        new = sorted(new.items(), key=lambda item: -len(item[1][0]))
        bar = tqdm(total=len(new), desc=what, disable=not (new and sys.stderr.isatty()))
        for part in (new[i : i + together] for i in range(0, len(new), together)):
            for (key, _), result in zip(part, ask([r for _, r in part]), strict=True):
                self.known[key] = result
                self.file.write(json.dumps([key, result]) + "\n")
            self.file.flush()
            bar.update(len(part))
        bar.close()
        return [self.known[key] for key in keys]


class HarnessModel(TemplateLM):
    """The model as the harness sees it. Tokenization, truncation and windows are those of the harness's own HFLM.

    ask(job) runs a job on all ranks and returns its results; see `answer`.
    """

    def __init__(self, o: EvaluateOptions, positions: int, tokenizer, answers: Answers, ask: Callable):
        super().__init__()
        self.o, self.tokenizer, self.answers, self.ask = o, tokenizer, answers, ask
        self.max_length = positions

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.tokenizer.encode(string, add_special_tokens=False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, enable_thinking=self.o.thinking, **options
        )

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """Scores requests: (texts, context tokens, ending tokens). Endings for which the model reads the same tokens
        are scored together, so a question whose choices are letters is read once."""
        if self.o.thinking:
            raise ValueError("a task scores given answers, which no thought precedes; fix: --no-thinking")
        places, endings = [], defaultdict(list)
        for _texts, context, ending in requests:
            if not 0 < len(ending) <= self.max_length:
                raise ValueError(
                    f"a text of {len(ending)} tokens to score; expected 1 to {self.max_length}; fix: --tasks"
                )
            inputs = tuple((context + ending)[-(self.max_length + 1) : -1])
            places.append((inputs, len(endings[inputs])))
            endings[inputs].append(ending)
        together = 64 * self.o.dp
        scored = self.answers.get(
            [list(item) for item in endings.items()], lambda part: self.ask((None, part)), together, "scoring"
        )
        results = dict(zip(endings, scored, strict=True))
        return [tuple(results[inputs][i]) for inputs, i in places]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            windows.append([(None, *make_disjoint_window(window)) for window in rolling])
        scored = iter(self._loglikelihood_tokens([w for group in windows for w in group]))
        return [sum(value for value, _ in itertools.islice(scored, len(group))) for group in windows]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        texts, groups = [""] * len(requests), defaultdict(list)
        repeats = Counter()  # with drawn answers, a repeated question is another request
        for i, request in enumerate(requests):
            settings, prompt = self.settings(request.args[1]), self.tok_encode(request.args[0])
            room = self.max_length - settings["draw"]["max_new_tokens"]
            if room < 1:
                raise ValueError(f"an answer may take all {self.max_length} positions; fix: --max-new-tokens")
            key = json.dumps(settings)
            drawn = settings["draw"]["temperature"] > 0
            groups[key].append((i, [prompt[-room:], key, repeats[request.args[0]] if drawn else 0]))
            repeats[request.args[0]] += 1
        for key, members in groups.items():
            settings = json.loads(key)

            def ask(part: list, settings=settings) -> list:
                return self.ask((settings, [prompt for prompt, *_ in part]))

            together = 4 * self.o.batch * self.o.dp
            for (i, _), tokens in zip(
                members, self.answers.get([r for _, r in members], ask, together, "generating"), strict=True
            ):
                texts[i] = self.cut(self.tokenizer.decode(tokens, skip_special_tokens=True), settings["until"])
        return texts

    def settings(self, wanted: dict) -> dict:
        """Checks a task's generation settings and returns {"until": strings, "draw": fields of InferOptions}."""
        wanted = normalize_gen_kwargs(wanted, 256)  # HFLM's default length of an answer
        until = wanted.pop("until", None) or []
        eos = self.tokenizer.decode([self.tokenizer.eos_token_id])
        sampled, longest = wanted.pop("do_sample"), wanted.pop("max_gen_toks")
        temperature, top_p, top_k = (wanted.pop(key, None) for key in ("temperature", "top_p", "top_k"))
        draw = {
            "max_new_tokens": self.o.max_new_tokens or longest, "temperature": float(temperature or 0) * sampled,
            "top_p": float(top_p or 1), "top_k": int(top_k or 0),
        }  # fmt: skip
        if unknown := {k: v for k, v in wanted.items() if v not in NEUTRAL.get(k, ())}:
            raise ValueError(f"a task wants answers generated with {unknown}, which is not there; fix: --tasks")
        return {"until": [*([until] if isinstance(until, str) else until), eos], "draw": draw}

    def cut(self, text: str, until: list[str]) -> str:
        """Returns the answer without its thought, up to the first of the strings."""
        if self.o.thinking:
            text = text.split(THOUGHT_END)[-1].lstrip()
        for end in filter(None, until):
            text = text.split(end)[0]
        return text


# -------------------------------------------------------------------------------------------------------------- results


def run(o: EvaluateOptions, lm: HarnessModel) -> dict:
    """Runs the tasks through the harness and returns its results.

    Raises:
        ValueError: a task or its data set is missing, or a task runs programs without --allow-code-execution.
    """
    names, folder = task_names(o), o.task_folder.absolute()
    if o.allow_code_execution:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # read by the metric that runs the programs
    else:
        os.environ.pop("HF_ALLOW_CODE_EVAL", None)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # reading the harness' own 14,000 files takes 10 s
        manager = TaskManager(include_path=folder)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(
            f"the harness has no task {', '.join(unknown)}, nor has {folder}; fix: --tasks or --task-folder"
        )
    with contextlib.chdir(folder):
        try:
            loaded = manager.load(names)  # also loads the data sets, so a missing one is reported first
        except Exception as error:  # of many kinds, from the datasets library
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"cannot load {', '.join(names)}: {why[:300]}; expected its data sets under {folder}; "
                "fix: hf download --repo-type dataset OWNER/NAME --local-dir TASK-FOLDER/OWNER/NAME"
            ) from error
        code_tasks = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
        if code_tasks and not o.allow_code_execution:
            raise ValueError(f"{', '.join(code_tasks)} runs programs that the model wrote; fix: --allow-code-execution")
        manager.load = lambda _: loaded  # simple_evaluate need not load them again
        return lm_eval.simple_evaluate(
            lm,
            tasks=names,
            task_manager=manager,
            num_fewshot=o.num_fewshot,
            limit=o.limit,
            apply_chat_template=o.chat,
            fewshot_as_multiturn=o.chat,
            confirm_run_unsafe_code=o.allow_code_execution,
        )


def find_chance(name: str, metric: str, results: dict) -> float | None:
    """Returns what guessing scores: `chance` of a task's metadata, else 1 / number of choices; None if unknown."""
    config = results["configs"].get(name, {})
    stated = (config.get("metadata") or {}).get("chance")
    if stated is not None or config.get("output_type") != "multiple_choice" or metric not in ("acc", "acc_norm"):
        return stated
    choices = [len(sample["arguments"]) for sample in results["samples"][name]]
    return sum(1 / n for n in choices) / len(choices)


def list_results(results: dict) -> list[dict]:
    """Returns a row per task and metric, {"task", "metric", "value", "stderr", "chance", "n"}; groups come last."""
    rows = []
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        leaves = [name] if name in results["n-samples"] else list_tasks(name, results)
        sizes = {leaf: results["n-samples"][leaf]["effective"] for leaf in leaves}
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            chances = [find_chance(leaf, metric, results) for leaf in leaves]
            known = chances and None not in chances
            mean = (
                sum(c * n for c, n in zip(chances, sizes.values(), strict=True)) / sum(sizes.values())
                if known
                else None
            )
            rows.append({
                "task": name, "metric": metric if kind == "none" else f"{metric} ({kind})", "value": value,
                "stderr": stderr if isinstance(stderr, float) else None, "chance": mean, "n": sum(sizes.values()),
            })  # fmt: skip
    return rows


def list_tasks(group: str, results: dict) -> list[str]:
    """Returns the tasks of a group and of the groups in it."""
    members = results["group_subtasks"].get(group, [])
    return [
        leaf for name in members for leaf in ([name] if name in results["n-samples"] else list_tasks(name, results))
    ]


def format_table(rows: list[dict]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    width, metric = (max(len(key), *(len(row[key]) for row in rows)) for key in ("task", "metric"))
    lines = [f"{'task':<{width}}  {'metric':<{metric}}  {'value':>8}  {'stderr':>8}  {'chance':>8}  {'n':>6}"]
    for row in rows:
        numbers = "  ".join(f"{number(row[key]):>8}" for key in ("value", "stderr", "chance"))
        lines.append(f"{row['task']:<{width}}  {row['metric']:<{metric}}  {numbers}  {row['n']:>6}")
    return "\n".join(lines)


def report(o: EvaluateOptions, results: dict, about: dict) -> None:
    rows = list_results(results)
    samples = o.out / "samples"
    samples.mkdir(exist_ok=True)
    for name, task_samples in results["samples"].items():
        lines = [json.dumps(sample, ensure_ascii=False, default=str) for sample in task_samples]
        (samples / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    facts = about | {
        "command": os.environ.get("ZOO_COMMAND", " ".join(sys.argv)), "commit": runlog.commit(),
        "hardware": device.name(), "devices": o.world, "harness": f"lm_eval {lm_eval.__version__}",
        "task versions": results["versions"], "examples before a question": results["n-shot"], "limit": o.limit,
        "chat": o.chat, "results": rows,
    }  # fmt: skip
    (o.out / "results.json").write_text(json.dumps(facts, indent=2, default=str) + "\n")
    print(f"{format_table(rows)}\nresults     {o.out / 'results.json'}", flush=True)
