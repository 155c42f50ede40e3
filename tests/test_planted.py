"""Tests that a copied recipe keeps the contract, and that the proofs of tests/test_models.py find bugs in it. Each bug
is planted alone in the copy, whose `case.py` the proofs use. The proofs must fail, and first those of the level that
names the cause."""

import contextlib
import importlib
import io
import json
import re
import sys

import pytest
from test_conformance import ROOT
from test_new_recipe import NAME, copy_of_the_repository, new, python

pytestmark = pytest.mark.L0

QUICK = {"qwen3": "0.6B or dense", "wan21": "1.3B or t2v"}  # pytest -k: a few of each proof's cases
BUGS = {  # recipe, file, text to replace (a pattern in model.py), replacement, levels to run, first level to fail
    "an export without a tensor": (
        "qwen3", "convert.py", r"shapes=shapes\(config\),",
        'shapes={n: s for n, s in shapes(config).items() if not n.endswith("k_norm.weight")},', "L1 or L2", "L1",
    ),
    "keys and values swapped": (
        "qwen3", "model.py", r"(k = self\.)k_proj(.*\n.*v = self\.)v_proj", r"\1v_proj\2k_proj", "L1 or L2", "L2",
    ),
    "a norm left out": (
        "qwen3", "model.py", r"recomputed\(self\.input_layernorm, x\), ", "x, ", "L1 or L2", "L2",
    ),
    "another rotary pairing": (
        "qwen3", "model.py", r"torch\.cat\(\(angles, angles\), -1\)", "angles.repeat_interleave(2, -1)", "L1 or L2", "L2",
    ),
    "a row-parallel bias added on every rank": (
        "wan21", "model.py", r"return self\.o\(x\.flatten\(2\)\)",
        "return parallel.leave_tensor_parallel(F.linear(x.flatten(2), self.o.weight, self.o.bias), self.mc)",
        "L2 or L3", "L3",
    ),
}  # fmt: skip
LEVEL = {"published": "L1", "oracles": "L2", "release": "L2", "layout": "L3"}  # word in a proof's name -> its level


@pytest.fixture(scope="module", params=QUICK)
def results(request, tmp_path_factory) -> dict[str, tuple]:
    """Returns, for each bug of a recipe and for the copy without one (""): the level of the first proof that fails (None:
    none does), and what pytest printed. "conformance": pytest's exit code and what it printed. All of this is done in
    one copy by one process, which imports torch once."""
    recipe, root = request.param, copy_of_the_repository(tmp_path_factory.mktemp("repository"))
    done = new(root, NAME, "--from", recipe, interpreter=sys.executable)
    assert done.returncode == 0, done.stderr
    done = python(
        root, "-c", f"import sys; sys.path.insert(0, 'tests'); import test_planted as t; t.prove_all({recipe!r})"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((root / "results.json").read_text())


def prove_all(recipe: str) -> None:
    """Runs in the copied repository. Raises ImportError if a module of the copy does not import."""
    results: dict = {"conformance": conformance(), "": prove(recipe, "L1 or L2 or L3")}
    for path in (ROOT / "zoo" / NAME).rglob("*.py"):
        if not path.with_name(f"requirements-{path.stem}.txt").exists():  # it needs more packages
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for bug, (bug_of, file, old, new_text, levels, _) in BUGS.items():
        if bug_of == recipe:
            path = ROOT / "zoo" / NAME / file
            text = path.read_text()
            spoiled, count = re.subn(old, new_text, text)
            assert count == 1 and spoiled != text, bug
            path.write_text(spoiled)
            results[bug] = prove(recipe, levels)
            path.write_text(text)
    (ROOT / "results.json").write_text(json.dumps(results))


def run_pytest(file: str, *options: str) -> tuple[int, str]:
    """Returns pytest's exit code and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = pytest.main([str(ROOT / "tests" / file), *options, "-p", "no:cacheprovider", "--durations=0"])
    return int(code), printed.getvalue()


def conformance() -> tuple[int, str]:
    """Runs the conformance suite over the copy and what stands once. What is said of the other recipes and of a module of
    `common` or `kernels` alone is proved in this repository."""
    others = {path.parent.name for path in ROOT.glob("zoo/*/config.py")} - {NAME} | {"[common", "[kernels", "[tests"}
    return run_pytest("test_conformance.py", "-k", f"{NAME} or not ({' or '.join(sorted(others))})")


def prove(recipe: str, levels: str) -> tuple[str | None, str]:
    """Runs the proofs of the copy's model as it now stands in its files. They stand in the order of the levels."""
    for module in [m for m in sys.modules if m.split(".")[0] in ("zoo", "test_models")]:
        del sys.modules[module]
    only = QUICK[recipe] + (" and not (pp2 or cp2 or fsdp2 or dp2)" if "L3" in levels else "")
    code, printed = run_pytest("test_models.py", "-x", "-m", levels, "-k", only)
    name = re.search(r"^FAILED \S+::test_(\w+)", printed, re.M)
    level = next((level for word, level in LEVEL.items() if name and word in name[1]), None)
    return level if code else None, printed


def test_a_new_recipe_passes_the_conformance_suite(results):
    code, printed = results["conformance"]
    assert code == 0, printed[-3000:]
    assert f"bash zoo/{NAME}/" in printed  # a launcher of the new folder ran


@pytest.mark.parametrize("bug", ["", *BUGS])
def test_a_planted_bug_fails_the_proof_that_names_its_cause_and_the_copy_none(bug, results):
    if bug not in results:
        pytest.skip("a bug of another recipe")
    level, printed = results[bug]
    assert level == (BUGS[bug][-1] if bug else None), printed[-3000:]
    assert bug or " passed" in printed
