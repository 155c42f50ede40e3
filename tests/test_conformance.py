"""Checks every folder of zoo/: files, imports, launchers, layouts, documentation, and the silent failures below.

The collection that this one replaces had these silent failures. The right column names what prevents each of them:

    partial load, missing keys only logged        test_no_partial_load_and_no_pickle, test_cli.py, test_weights.py
    inverted comparison in a test                 test_every_approx_is_compared_for_equality_in_an_assert
    samples dropped without a word                test_data.py test_every_dropped_row_is_counted_*,
                                                  test_cli.py too_many_dropped
    exit code lost in a pipe, perf after a crash  test_launcher_is_one_plain_launch, test_cli.py exit_code_*
    chmod makes checkpoints unreadable            test_launcher_is_one_plain_launch
    optimizer not saved by default                test_every_job_saves_and_resumes_by_default, test_resume.py
    save interval above the number of steps       a checkpoint is always written at the end: test_resume.py
    batch size follows CP or TP silently          test_global_batch_does_not_follow_the_layout
    one timestep per batch                        test_wan21.py test_every_sample_has_its_own_timestep_unless_asked
    launchers that point at other data, models    test_launcher_is_one_plain_launch, test_no_folder_name_in_code
    conversion to fp16 by default                 test_wan21.py test_released_layouts_convert_bit_exactly
    one micro-batch under deep pipelines          test_named_layout_is_legal_and_says_where_it_comes_from
    import deletes a shared build folder          nothing is built at import; test_cli.py torch_is_not_imported
"""

import ast
import contextlib
import difflib
import functools
import importlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import cli
from zoo.new import MEASURED

pytestmark = pytest.mark.L0

ROOT = Path(__file__).parents[1]
# A folder whose name starts with an underscore is a copy made by a test.
RECIPES = sorted(p.parent.name for p in ROOT.glob("zoo/*/config.py") if not p.parent.name.startswith("_"))
RECIPES = [os.environ["ZOO_RECIPE"]] if "ZOO_RECIPE" in os.environ else RECIPES
LAUNCHERS = [str(p.relative_to(ROOT)) for recipe in RECIPES for p in sorted(ROOT.glob(f"zoo/{recipe}/*.sh"))]
LAYOUTS = [
    (recipe, name)
    for recipe in RECIPES
    for name in tomllib.loads((ROOT / "zoo" / recipe / "parallel.toml").read_text())
]
REQUIRED = [
    "README.md", "config.py", "options.py", "model.py", "data.py", "parallel.toml", "train.py", "infer.py", "convert.py",
    "case.py", "perf.jsonl", "convert.sh",
]  # fmt: skip
ALIKE, ALIKE_LINES = 0.90, 150  # similarity and length above which two files need a marker


def tracked(*patterns: str) -> list[Path]:
    """Returns the files that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / n for n in sorted(set(names)) if (ROOT / n).is_file() and not n.startswith("zoo/_")]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def sources(*folders: str) -> list[Path]:
    return [p for folder in folders for p in tracked(f"{folder}/*.py")]


def imports(path: Path) -> Iterator[str]:
    """Yields the absolute name of everything that a file imports. Relative imports are resolved."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@functools.cache
def run_launcher(launcher: str, *options: str) -> subprocess.CompletedProcess:
    """Runs the command of a launcher in this process: a shell and an interpreter for each would take minutes."""
    recipe, (script, *given) = Path(launcher).parent.name, launch_line(launcher)[1:-1]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ZOO_DEVICE": "cpu", "NPROC": "1", "NNODES": "1", "COLUMNS": "80"}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["cli.py", f"zoo.{recipe}", script, *given, *options])
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as end:
                code = end.code or 0
    return subprocess.CompletedProcess(["bash", launcher, *options], code, out.getvalue(), err.getvalue())


def launch_line(launcher: str) -> list[str]:
    lines = [line for line in (ROOT / launcher).read_text().splitlines() if re.match(r"(exec )?launch ", line)]
    assert len(lines) == 1, f"{launcher} has {len(lines)} lines that begin with launch; expected 1"
    return shlex.split(lines[0])


def job(launcher: str):
    """Returns the dataclass of a launcher's options."""
    jobs = importlib.import_module(f"zoo.{Path(launcher).parent.name}.options")
    return jobs.JOBS[launch_line(launcher)[1]][0]


# --------------------------------------------------------------------------------------------------- files and imports


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_has_the_files_of_the_contract(recipe):
    missing = [name for name in REQUIRED if not (ROOT / "zoo" / recipe / name).is_file()]
    assert not missing, f"zoo/{recipe} lacks {', '.join(missing)}"


@pytest.mark.parametrize("path", sources("zoo", "common", "kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_from_recipe_to_common_to_kernels(path):
    where = path.relative_to(ROOT).parts
    allowed = {"zoo": {f"zoo.{where[1]}", "common", "kernels"}, "common": {"common", "kernels"}, "kernels": {"kernels"}}
    ours = [name for name in imports(path) if name.split(".")[0] in ("zoo", "common", "kernels", "tests")]
    wrong = [n for n in ours if not any(n == a or n.startswith(a + ".") for a in allowed[where[0]])]
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


MODELS = (
    r"\b(qwen|wan(\d|\b|[-_.])|deepseek|glm|kimi|llama|mixtral|intern|open-?sora|hunyuan|cogvideo|flux|ltx|step-?\d)"
)


@pytest.mark.parametrize("path", sources("common/language", "common/diffusion"), ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_family_shares_names_no_model(path):
    """A recipe decides what differs from model to model. Shared code takes it as an argument."""
    lines = enumerate(path.read_text().splitlines(), 1)
    matches = [f"{path.relative_to(ROOT)}:{i}: {line.strip()}" for i, line in lines if re.search(MODELS, line, re.I)]
    assert not matches, "\n".join(matches)


HEAVY = ("torch", "megatron", "transformers", "diffusers", "triton", "av", "cv2")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sources("zoo", "common", "kernels")
}


@functools.cache
def runtime_imports(name: str) -> list[tuple[str, bool]]:
    """Returns (module, whether at the top of the file) of every import of a module except those for type checkers
    alone."""
    path, names = MODULES[name], []
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    type_checking = {
        id(node)
        for block in ast.walk(parsed(path))
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(parsed(path)):
        if id(node) in type_checking:
            continue
        if isinstance(node, ast.Import):
            names += [(alias.name, node.col_offset == 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                member = f"{module}.{alias.name}"
                names.append((member if member in MODULES else module, node.col_offset == 0))
    return names


@functools.cache
def reached(name: str, at_the_top: bool = False) -> frozenset[str]:
    """Returns our modules that a module imports, also through others. Imports inside functions count unless
    `at_the_top`."""
    modules, queue = set(), [name]
    while queue:
        for module, top in runtime_imports(queue.pop()):
            if module in MODULES and module not in modules and (top or not at_the_top):
                modules.add(module)
                queue.append(module)
    return frozenset(modules)


def is_heavy(name: str) -> bool:
    """Returns whether importing a module of ours imports torch or another library of HEAVY."""
    names = {name, *reached(name, at_the_top=True)}
    return any(top and module.split(".")[0] in HEAVY for m in names for module, top in runtime_imports(m))


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_itself_in_the_end(name):
    assert name not in reached(name)


@pytest.mark.parametrize("name", MODULES)
def test_only_what_would_load_torch_too_early_is_imported_where_it_is_used(name):
    """The launcher reads options without torch. A kernel is imported only on the device that runs it."""
    late = [module for module, top in runtime_imports(name) if module in MODULES and not top]
    wrong = [m for m in late if not m.startswith("kernels") and (is_heavy(name) or not is_heavy(m))]
    assert not wrong, f"{name} imports {', '.join(wrong)} inside a function; fix: at the top of the file"


def strings_in_code(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, text) of absolute imports and of strings other than docstrings, which a copied recipe would
    keep."""
    docstrings = {id(n.value) for n in ast.walk(parsed(path)) if isinstance(n, ast.Expr)}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_folder_name_in_code(recipe):
    """A recipe that is copied with `cp -r` must work."""
    places = [
        f"{path.relative_to(ROOT)}:{line}: {text[:60]!r}"
        for path in sources(f"zoo/{recipe}")
        for line, text in strings_in_code(path)
        if re.search(rf"\b(zoo|data|runs)[./]{re.escape(recipe)}\b", text)  # alone it may be the model's name
    ]
    for path in tracked(f"zoo/{recipe}/*.sh"):
        code = [re.sub(r"(^|\s)#.*", "", line) for line in path.read_text().splitlines()]
        places += [f"{path.relative_to(ROOT)}:{i}" for i, line in enumerate(code, 1) if recipe in line]
    assert not places, "\n".join(places)


@pytest.mark.parametrize("recipe", RECIPES)
def test_constructors_name_every_argument(recipe):
    """`**kwargs` accepts misspelt names."""
    places = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(f"zoo/{recipe}")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef) and node.name == "__init__" and node.args.kwarg
    ]
    assert not places, places


def test_no_partial_load_and_no_pickle():
    calls = []
    for path in sources("zoo", "common", "kernels"):
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            disabled = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is False}
            disabled |= {"strict" for a in node.args[1:2] if isinstance(a, ast.Constant) and a.value is False}
            # Checkpoints of other trainers are read in one file, with torch's restricted reader.
            safe = {ast.unparse(k) for k in node.keywords} >= {
                "weights_only=True"
            } and path.name == "megatron_import.py"
            if (
                (name.endswith("load_state_dict") and "strict" in disabled)
                or name in ("torch.load", "pickle.load", "pickle.loads")
                and not (name == "torch.load" and safe)
                or "weights_only" in disabled
                or any(k.arg == "trust_remote_code" for k in node.keywords)
            ):
                calls.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:80]}")
    assert not calls, "\n".join(calls)


def test_every_approx_is_compared_for_equality_in_an_assert():
    """`if actual == approx(expected): raise` passes on unequal losses."""
    wrong = []
    for path in tracked("tests/*.py"):
        conditions = [n.test for n in ast.walk(parsed(path)) if isinstance(n, ast.Assert)]
        equalities = [
            c
            for condition in conditions
            for c in ast.walk(condition)
            if isinstance(c, ast.Compare) and ast.unparse(condition)[:4] != "not "
        ]
        compared = {id(n) for c in equalities if all(isinstance(op, ast.Eq) for op in c.ops) for n in ast.walk(c)}
        uses = [n for n in ast.walk(parsed(path)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "pytest.approx"]
        wrong += [f"{path.name}:{n.lineno}" for n in uses if id(n) not in compared]
    assert not wrong, f"expected `assert value == pytest.approx(…)` in {', '.join(wrong)}"


def test_ruff_finds_nothing():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------ launchers


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_is_one_plain_launch(launcher):
    text = (ROOT / launcher).read_text()
    lines = text.splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and lines[1].startswith("# "), (
        "line 2 must be a comment that says what it does"
    )
    assert f"bash {launcher}" in text.split("set -euo")[0], "the first comment must show its command"
    assert "set -euo pipefail" in lines
    assert 'source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"' in lines
    assert launch_line(launcher)[-1] == "$@" and lines[-1].split()[0] in ("launch", "exec")
    assert len(lines) <= 25
    code = "\n".join(line for line in lines if not line.startswith("#"))
    assert not re.search(r"chmod|\btee\b|\||/path/to|/home/|/mnt/|sleep|awk", code)
    assert "/path/to" not in text
    subprocess.run(["bash", "-n", launcher], cwd=ROOT, check=True)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_help_names_every_option(launcher):
    done = run_launcher(launcher, "--help")
    assert done.returncode == 0 and done.stderr == ""
    for name, f in job(launcher).__dataclass_fields__.items():
        flag = "--" + name.replace("_", "-")
        assert re.search(rf"{flag}\b", done.stdout) and f.metadata["help"], f"{flag} is not explained"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_prints_its_default_config(launcher):
    required = ["--to", "released"] if Path(launcher).name == "convert.sh" else []
    done = run_launcher(launcher, *required, "--print-config")
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout)["size"].startswith("tiny")


@pytest.mark.L4
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_dry_runs(launcher):
    required = ["--to", "released"] if Path(launcher).name == "convert.sh" else []
    done = run_launcher(launcher, *required, "--dry-run")
    assert done.returncode == 0 and "parameters: " in done.stdout, done.stderr


@pytest.mark.parametrize("launcher", {launcher.split("/")[1]: launcher for launcher in LAUNCHERS}.values())
def test_shell_answers_as_the_process(launcher, capsys):
    """Calls one launcher of each recipe as a user does."""
    env = {
        **os.environ,
        "ZOO_PYTHON": sys.executable,
        "ZOO_DEVICE": "cpu",
        "NPROC": "1",
        "NNODES": "1",
        "COLUMNS": "80",
    }
    for option in ("--help", "--print-config"):
        start = time.perf_counter()
        command = ["bash", launcher, option]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        with capsys.disabled():
            print(f"\n{' '.join(command)}: {time.perf_counter() - start:.2f} s", end="")
        outputs = [re.sub(r"\d{4}-\d{6}", "", text) for text in (done.stdout, run_launcher(launcher, option).stdout)]
        assert (done.returncode, done.stderr) == (0, "") and outputs[0] == outputs[1]  # without the time in --out


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if "train" in Path(name).name])
def test_every_job_saves_and_resumes_by_default(launcher):
    values = tomllib.loads(run_launcher(launcher, "--print-config").stdout)
    assert values["resume"] == "auto" and values["keep"] >= 1


class Begun(Exception):
    """Raised instead of slow work."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_making_the_demo_data_is_said_before_it_begins(recipe, monkeypatch, capsys):
    jobs = importlib.import_module(f"zoo.{recipe}.options")

    def make(*args, **kwargs):
        raise Begun

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    own = f"zoo.{recipe}.demo.make_data"
    is_shared = importlib.util.find_spec(own) is None
    monkeypatch.setattr(importlib.import_module("common.language.demo.make_data" if is_shared else own), "make", make)
    with pytest.raises(Begun):
        jobs.prepare(jobs.parse("train", []))
    assert str(jobs.DEMO_DATA) in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES)
def test_starting_the_processes_is_said_before_torch_is_imported(recipe, tmp_path, monkeypatch, capsys):
    messages, jobs = [], importlib.import_module(f"zoo.{recipe}.options")
    monkeypatch.setattr(jobs, "prepare", lambda o: None)
    monkeypatch.setattr(cli, "_torchrun", lambda *args: messages.append(capsys.readouterr().err) or 0)
    monkeypatch.setattr(sys, "argv", ["cli", f"zoo.{recipe}", "train", "--out", str(tmp_path / "run")])
    for name, value in {"NPROC": "2", "ZOO_DEVICE": "cpu", "ZOO_COMMAND": "test"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0 and "NPROC=2 on cpu" in messages[0]


# -------------------------------------------------------------------------------------------------------------- layouts


def as_options(values: dict) -> list[str]:
    """Converts the keys of a layout to command-line options."""
    argv = []
    for key, value in values.items():
        flag = key.replace("_", "-")
        argv += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}={value}"]
    return argv


@pytest.mark.parametrize(("recipe", "name"), LAYOUTS)
def test_named_layout_is_legal_and_says_where_it_comes_from(recipe, name, monkeypatch):
    jobs = importlib.import_module(f"zoo.{recipe}.options")
    layout = tomllib.loads((ROOT / "zoo" / recipe / "parallel.toml").read_text())[name]
    assert layout["source"].strip()
    if layout["size"] == "custom":  # any other architecture: that of --weights
        return
    assert layout["size"] in importlib.import_module(f"zoo.{recipe}.config").SIZES
    fields = {f for f in jobs.JOBS["train"][0].__dataclass_fields__ if f in layout}
    argv = ["--layout", name, *as_options({k: layout[k] for k in fields})]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    smallest = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1)
    stated = re.search(r"(\d+) devices?\b", layout["source"])
    refused = []
    for processes in [int(stated[1])] if stated else [smallest * replicas for replicas in range(1, 65)]:
        monkeypatch.setenv("NPROC", str(processes))
        try:
            o = jobs.parse("train", argv)
        except ValueError as error:
            refused.append(f"{processes} processes: {error}")
            continue
        assert f"world {processes}" in jobs.dry_run(o)
        assert o.micro_batches >= o.pp, "fewer micro-batches than pipeline stages: most stages would wait"
        assert o.layout == name and all(getattr(o, k) == layout[k] for k in fields - {"size"})
        return
    pytest.fail(f"its options are refused for every number of processes: {refused[0]}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_global_batch_does_not_follow_the_layout(recipe, monkeypatch):
    jobs = importlib.import_module(f"zoo.{recipe}.options")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("NPROC", "4")
    accepted = 0
    for layout in (["--tp", "2"], ["--cp", "2"], ["--pp", "2"], ["--tp", "4"], []):
        try:
            o = jobs.parse("train", ["--global-batch", "8", "--micro-batch", "1", *layout])
        except ValueError as error:  # not every model's smallest size fits every layout
            assert f"fix: {layout[0]}" in str(error)
            continue
        assert o.global_batch == 8
        accepted += 1
    assert accepted >= 3


# -------------------------------------------------------------------------------------------------------- documentation

MARKDOWN = tracked("*.md")
EXAMPLES = {"mine", "NAME"}  # placeholders for a reader's own folder


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Yields (launcher, rest of its line) for every `bash zoo/x/y.sh …` in a text."""
    text = re.sub(r"\\\n[ \t#]*", " ", text)
    for match in re.finditer(r"bash (zoo/[\w.-]+/[\w.-]+\.sh)([^\n`|;&]*)", text):
        if match[1].split("/")[1] not in EXAMPLES:
            yield match[1], re.split(r"\s#\s|\s{4,}", match[2])[0]


def options_of(launcher: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", run_launcher(launcher, "--help").stdout))


@pytest.mark.parametrize("path", [*MARKDOWN, *tracked("zoo/*.sh", "zoo/*.py")], ids=lambda p: str(p.relative_to(ROOT)))
def test_documented_commands_use_launchers_and_options_that_exist(path):
    for launcher, rest in commands(path.read_text()):
        assert (ROOT / launcher).is_file(), f"{launcher} does not exist"
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", rest))
        assert used <= options_of(launcher), f"{launcher} has no {', '.join(used - options_of(launcher))}"


def mentioned(text: str) -> Iterator[str]:
    """Yields the words in back-ticks and code blocks that look like paths."""
    blocks = re.findall(r"```[^\n]*\n(.*?)```", text, re.S)
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for word in itertools.chain(*(b.split() for b in blocks), *(s.split() for s in re.findall(r"`([^`\n]+)`", prose))):
        word = word.strip("()[]{},:;\"'").rstrip(".")
        if re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", word):
            yield word


def exists(word: str, folder: Path) -> bool | None:
    """Returns whether a path exists, or None if it is not a path of this repository."""
    first, *rest = word.rstrip("/").split("/")
    if rest and first in ("zoo", "common", "kernels", "tests", ".ci"):
        return rest[0] in EXAMPLES or any(ROOT.glob(word.rstrip("/")))
    if rest and (folder / first).is_dir() and folder != ROOT:
        return any(folder.glob(word.rstrip("/")))
    if not rest and re.search(r"\w\.(py|sh|md)$", word):
        return any(p.match(word) for p in tracked())
    return None


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_documented_paths_and_links_exist(path):
    text = path.read_text()
    missing = [word for word in mentioned(text) if exists(word, path.parent) is False]
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target = link.split("#")[0]
        if target and not re.match(r"\w+:", target) and not (path.parent / target).exists():
            missing.append(link)
    assert not missing, f"{path.relative_to(ROOT)} names {missing}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_pictures_of_runs_stand_where_a_copy_loses_them(recipe):
    """Otherwise a recipe made by zoo/new.sh would show the samples and the loss curve of another model."""
    copied_text = MEASURED.sub("", (ROOT / "zoo" / recipe / "README.md").read_text())
    pictures = re.findall(r"!\[[^\]]*\]\([^)]*\)", copied_text)
    assert not pictures, (
        f"{pictures}: put them, and figures of runs, between <!-- measured:begin --> and <!-- measured:end -->"
    )


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_documentation_has_no_machine_paths(path):
    assert not re.search(r"(?<![\w.])/(work|home|root|mnt|tmp|Users)/|/path/to", path.read_text())


# --------------------------------------------------------------------------------------------------------- size, copies


def alike(root: Path, one: str, other: str) -> list[str]:
    """Returns the files of two recipes that are nearly equal and have no marker that says which was copied."""
    pairs = []
    for path in sorted((root / "zoo" / one).rglob("*.py")):
        twin = root / "zoo" / other / path.relative_to(root / "zoo" / one)
        if not twin.is_file():
            continue
        a, b = path.read_text().splitlines(), twin.read_text().splitlines()
        ratio = difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()
        marked = any(re.match(rf"\s*# (Copied|Adapted) from zoo\.({one}|{other})\b", line) for line in a + b)
        if min(len(a), len(b)) > ALIKE_LINES and ratio > ALIKE and not marked:
            pairs.append(f"{path.relative_to(root)} and {other}'s are {ratio:.2f} alike")
    return pairs


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(RECIPES, 2)))
def test_no_file_is_in_two_recipes_unmarked(one, other):
    pairs = alike(ROOT, one, other)
    assert not pairs, f"{pairs}: move what both need to common/, or mark what one took ('# Copied from zoo.…')"


@pytest.mark.parametrize(
    ("changed", "mark", "found"),
    [(0, "", True), (10, "", True), (60, "", False), (0, "# Copied from zoo.alpha.data.f", False)],
)
def test_planted_twin_is_found_unless_it_differs_or_says_where_it_is_from(changed, mark, found, tmp_path):
    lines = [f"a{i} = {i}" for i in range(ALIKE_LINES + 50)]
    for recipe, text in (("alpha", lines), ("beta", [mark, *("x = 1" for _ in range(changed)), *lines[changed:]])):
        (tmp_path / "zoo" / recipe).mkdir(parents=True)
        (tmp_path / "zoo" / recipe / "data.py").write_text("\n".join(text))
    assert bool(alike(tmp_path, "alpha", "beta")) == found


COPIED = r"# Copied from (zoo(?:\.\w+)+)(?: with (\w+->\w+(?:, \w+->\w+)*))?"
ADAPTED = r"# Adapted from (zoo(?:\.\w+)+): \S.*"


def definition(root: Path, name: str) -> ast.stmt | None:
    """Returns the class, function or method of a dotted name, or None if there is none. It imports nothing."""
    parts = name.split(".")
    for i in range(2, len(parts)):
        path = root.joinpath(*parts[:i]).with_suffix(".py")
        if path.is_file():
            node = parsed(path)
            for part in parts[i:]:
                node = next((n for n in getattr(node, "body", []) if getattr(n, "name", None) == part), None)
            return node
    return None


def marked(path: Path) -> Iterator[tuple[int, str, ast.stmt | None]]:
    """Yields (line, marker, the class or function right below it) for everything that a file marks as taken from a
    recipe."""
    lines = path.read_text().splitlines()
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in ast.walk(parsed(path)) if isinstance(n, kinds)]
    below = {min([n, *n.decorator_list], key=lambda part: part.lineno).lineno: n for n in nodes}
    for i, line in enumerate(lines, 1):
        if re.match(r"\s*#\s*(copied|adapted) from\W*zoo\b", line, re.I):
            start = next((k for k, text in enumerate(lines[i:], i + 1) if not text.lstrip().startswith("#")), 0)
            yield i, line.strip(), below.get(start)


def copy_faults(root: Path, path: Path) -> Iterator[str]:
    """Yields the faults of the marked copies in a file. Line breaks and comments may differ, docstrings may not."""
    for line, marker, copy in marked(path):
        where = f"{path.relative_to(root)}:{line}"
        match = re.fullmatch(COPIED, marker) or re.fullmatch(ADAPTED, marker)
        if not match:
            yield (
                f"{where}: {marker!r}; expected '# Copied from zoo.recipe.module.Name', with or without ' with X->Y', "
                "or '# Adapted from zoo.recipe.module.Name: what differs'"
            )
        elif (original := definition(root, match[1])) is None:
            yield f"{where}: there is no {match[1]}"
        elif copy is None:
            yield f"{where}: no class or function stands right below the marker"
        elif match.re.pattern == COPIED:
            expected = ast.unparse(original)
            for pair in match[2].split(", ") if match[2] else ():
                expected = expected.replace(*pair.split("->"))
            if expected != ast.unparse(copy):
                texts = expected.splitlines(), ast.unparse(copy).splitlines()
                diff = "\n".join(difflib.unified_diff(*texts, match[1], where, n=0, lineterm=""))
                yield f"{diff}\nfix: make them equal, or mark it '# Adapted from {match[1]}: what differs'"


@pytest.mark.parametrize("recipe", RECIPES)
def test_marked_copies_equal_their_source(recipe):
    faults = [fault for path in sources(f"zoo/{recipe}") for fault in copy_faults(ROOT, path)]
    assert not faults, "\n".join(faults)


ORIGINAL = '''
@final
class AlphaMLP(Module):
    """gate, up: [F, D]; down: [D, F]."""

    def forward(self, x):
        """x: [L, D]."""
        return self.down(silu(self.gate(x)) * self.up(x))  # [L, D]


def swap(x): return x.mT
'''
PLANTED = [
    ("# Copied from zoo.alpha.model.AlphaMLP", {}, ""),
    ("# Copied from zoo.alpha.model.AlphaMLP", {"silu(self.gate(x))": "silu(\n  self.gate(x)\n  )", "  # [L, D]": ""}, ""),
    ("# Copied from zoo.alpha.model.AlphaMLP with Alpha->Beta", {"Alpha": "Beta"}, ""),
    ("# Copied from zoo.alpha.model.AlphaMLP with Alpha->Beta, silu->gelu", {"Alpha": "Beta", "silu": "gelu"}, ""),
    ("# Copied from zoo.alpha.model.AlphaMLP\n# Why it is here.", {}, ""),
    ("# Copied from zoo.alpha.model.AlphaMLP", {"silu": "gelu"}, "+        return self.down(gelu("),
    ("# Copied from zoo.alpha.model.AlphaMLP", {"[L, D].": "[B, D]."}, '+        """x: [B, D]."""'),
    ("# Copied from zoo.alpha.model.AlphaMLP", {"@final\n": ""}, "-@final"),
    ("# Copied from zoo.alpha.model.AlphaMLP", {"Alpha": "Beta"}, "+class BetaMLP"),
    ("# Copied from zoo.alpha.model.AlphaMLP with Alpha->Beta", {"Alpha": "Beta", "silu": "gelu"}, "+        return self"),
    ("# Copied from zoo.alpha.model.AlphaMLP with Alpha->Beta", {}, "-class BetaMLP"),
    ("# Copied from zoo.alpha.model.OmegaMLP", {}, "there is no zoo.alpha.model.OmegaMLP"),
    ("# Copied from zoo.alpha.modle.AlphaMLP", {}, "there is no zoo.alpha.modle.AlphaMLP"),
    ("# Copied from zoo.alpha.model.AlphaMLP\n", {}, "no class or function stands right below"),
    ("# Copied from zoo.alpha.model.AlphaMLP with Alpha to Beta", {"Alpha": "Beta"}, "expected '# Copied from"),
    ("# copied from zoo.alpha.model.AlphaMLP", {}, "expected '# Copied from"),
    ("# Adapted from zoo.alpha.model.AlphaMLP: gelu", {"silu": "gelu"}, ""),
    ("# Adapted from zoo.alpha.model.AlphaMLP", {"silu": "gelu"}, "expected '# Copied from"),
    ("# Adapted from zoo.alpha.model.OmegaMLP: gelu", {"silu": "gelu"}, "there is no zoo.alpha.model.OmegaMLP"),
]  # fmt: skip


@pytest.mark.parametrize(("marker", "changes", "fault"), PLANTED)
def test_planted_copy_is_accepted_only_if_equal(marker, changes, fault, tmp_path):
    body = ORIGINAL.lstrip()
    for old, new in changes.items():
        assert old in body
        body = body.replace(old, new)
    for recipe, text in (("alpha", ORIGINAL), ("beta", f"{marker}\n{body}")):
        (tmp_path / "zoo" / recipe).mkdir(parents=True)
        (tmp_path / "zoo" / recipe / "model.py").write_text(text)
    faults = "\n".join(copy_faults(tmp_path, tmp_path / "zoo" / "beta" / "model.py"))
    assert fault in faults if fault else not faults, faults


@pytest.mark.parametrize(("factor", "equal"), [(1, False), (2, True)])
def test_copied_method_is_compared_with_that_of_its_class(factor, equal, tmp_path):
    template = "class {}:\n    {}\n    def forward(self, x): return {} * x\n"
    (tmp_path / "zoo" / "alpha").mkdir(parents=True)
    (tmp_path / "zoo" / "alpha" / "model.py").write_text(template.format("A", "", 1) + template.format("B", "", 2))
    copy = tmp_path / "zoo" / "copy.py"
    copy.write_text(template.format("C", "# Copied from zoo.alpha.model.B.forward", factor))
    assert (list(copy_faults(tmp_path, copy)) == []) == equal
