"""Tests zoo/new.sh in a copy of the repository: a new recipe is the old one and claims nothing; bad input makes nothing.
tests/test_planted.py tests that a new recipe passes the suite's proofs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from test_conformance import RECIPES, ROOT, tracked

from zoo.new import class_names, with_classes

pytestmark = pytest.mark.L0

NAME = "planted"


def copy_of_the_repository(root: Path) -> Path:
    for path in tracked():
        target = root / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    subprocess.run(["git", "init", "-q", str(root)], check=True)  # the conformance suite lists files with git
    interpreter = root / "runs" / "python"  # an interpreter without packages is enough
    interpreter.parent.mkdir()
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    interpreter.chmod(0o755)
    return root


def new(root: Path, *argv: str, interpreter: str | None = None) -> subprocess.CompletedProcess:
    """Calls new.sh by an interpreter without packages, or by this one, which formats the copy."""
    env = os.environ | {"ZOO_PYTHON": str(interpreter or root / "runs" / "python")}
    return subprocess.run(["bash", root / "zoo" / "new.sh", *argv], env=env, capture_output=True, text=True, timeout=60)


def python(root: Path, *argv: str) -> subprocess.CompletedProcess:
    env = os.environ | {"ZOO_RECIPE": NAME, "ZOO_DEVICE": "cpu", "PYTHONPATH": str(root)}
    command = [sys.executable, *argv]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module", params=RECIPES)
def made(request, tmp_path_factory) -> tuple[Path, str]:
    """Returns (a repository with a new recipe, the recipe that was copied)."""
    root = copy_of_the_repository(tmp_path_factory.mktemp("repository"))
    done = new(root, NAME, "--from", request.param, interpreter=sys.executable)
    assert done.returncode == 0 and f"bash tests/verify.sh {NAME}" in done.stdout, done.stderr
    return root, request.param


def code(text: str) -> str:
    """Dumps the statements of a file without its docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    return ast.dump(tree)


def test_only_documents_and_records_differ(made):
    root, nearest = made
    old, copy = root / "zoo" / nearest, root / "zoo" / NAME
    classes = class_names(old, NAME)
    assert len(classes) > 3 and all(name.startswith("Planted") for name in classes.values())
    pictures = {
        copy / name for name in re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "zoo" / nearest / "README.md").read_text())
    }
    for path in tracked(f"zoo/{nearest}/*"):
        twin = copy / path.relative_to(ROOT / "zoo" / nearest)
        assert (root / path.relative_to(ROOT)).read_bytes() == path.read_bytes(), "the source recipe must not change"
        assert twin.exists() != (twin in pictures)
        if twin.suffix == ".py":
            assert code(twin.read_text()) == code(with_classes(path.read_text(), classes))
        elif twin.exists() and twin.suffix in (".safetensors", ".json", ".toml"):
            assert twin.read_bytes() == path.read_bytes()
        if twin.suffix in (".py", ".sh", ".md"):
            assert not re.search(rf"zoo[/.]{nearest}\b", twin.read_text())
    assert len(list(copy.rglob("*"))) == len(list(old.rglob("*"))) - len(pictures)


def test_new_recipe_has_no_record_and_no_verified_status(made):
    root, nearest = made
    assert (root / "zoo" / NAME / "perf.jsonl").read_bytes() == b""
    card, table = ((root / name).read_text() for name in (f"zoo/{NAME}/README.md", "perf_table.md"))
    assert not re.search(r"\bverified\b|!\[|\bon one H\d00.* \|", card, re.I)
    assert re.search(r"<!-- perf:begin -->\nNothing recorded yet.\n<!-- perf:end -->", card)
    assert f"## {NAME}\n\nNothing recorded yet.\n" in table
    assert python(root, "-m", "common.perf", "--check").returncode == 0
    for name in ("README.md", "README.zh.md"):
        readme = (root / name).read_text()
        old, rows = (re.findall(rf"^\| \[{n}\]\(zoo/{n}/README.md\) \|.*", readme, re.M) for n in (nearest, NAME))
        assert rows and len(rows) == len(old) and not re.search(r"\bverified\b|已验证|H\d00", "".join(rows))
        assert readme.replace("".join(row + "\n" for row in rows), "") == (ROOT / name).read_text()


def everything(root: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in root.rglob("*") if "__pycache__" not in p.parts}


NEAREST = RECIPES[-1]
BAD_INPUT = [
    ([], "usage: bash zoo/new.sh NAME --from NEAREST; recipes: "),
    ([NAME], "usage: bash zoo/new.sh NAME --from NEAREST"),
    ([NAME, "--from"], "usage: bash zoo/new.sh NAME --from NEAREST"),
    ([NAME, "--form", NEAREST], "usage: bash zoo/new.sh NAME --from NEAREST"),
    ([NAME, "--from", NEAREST[:-1]], f"unknown recipe {NEAREST[:-1]!r}; did you mean {NEAREST}?; fix: --from"),
    ([NAME, "--from", "../zoo/" + NEAREST], "unknown recipe"),
    ([NEAREST, "--from", NEAREST], f"zoo/{NEAREST} exists"),
    (["new", "--from", NEAREST], "zoo/new.py exists"),
    *(([name, "--from", NEAREST], f"NAME {name!r}") for name in ("a-b", "3d", "class", "_mine", "../mine", "a.b", "")),
]


@pytest.mark.parametrize(("argv", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_changes_nothing(argv, message, tmp_path):
    root = copy_of_the_repository(tmp_path)
    before = everything(root)
    done = new(root, *argv)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert everything(root) == before


def test_an_interpreter_without_ruff_copies_and_says_what_is_not_done(tmp_path):
    root, bare = copy_of_the_repository(tmp_path / "repository"), tmp_path / "bare"
    venv.create(bare)
    done = new(root, NAME, "--from", NEAREST, interpreter=str(bare / "bin" / "python"))
    assert done.returncode == 0 and (root / "zoo" / NAME / "model.py").is_file()
    assert done.stderr.endswith(f"has no ruff, the copy is not formatted; fix: ruff format zoo/{NAME}\n")


def test_copy_that_fails_half_way_leaves_nothing(tmp_path):
    root = copy_of_the_repository(tmp_path)
    (root / "zoo" / NEAREST / "notes.md").write_bytes(b"\xff")  # cannot be read as text
    before = everything(root)
    done = new(root, NAME, "--from", NEAREST)
    assert done.returncode == 2 and "decode" in done.stderr
    assert everything(root) == before
