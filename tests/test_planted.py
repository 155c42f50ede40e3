"""Tests that the proofs of tests/test_models.py find bugs. Each bug is planted alone in a copied recipe, whose
`case.py` the proofs use. The proofs must fail, and first those of the level that names the cause."""

import re
import subprocess

import pytest
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
        "qwen3", "model.py", r"self\.self_attn\(self\.input_layernorm\(x\), ", "self.self_attn(x, ", "L1 or L2", "L2",
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
def copied(request, tmp_path_factory):
    """Returns (a repository with a copied recipe, the recipe that was copied)."""
    root = copy_of_the_repository(tmp_path_factory.mktemp("repository"))
    done = new(root, NAME, "--from", request.param)
    assert done.returncode == 0, done.stderr
    return root, request.param


def first_failure(root, levels: str, quick: str) -> tuple[str | None, subprocess.CompletedProcess]:
    """Runs the proofs, which stand in the order of their levels. Returns the level of the first that fails, and the
    process."""
    expression = quick + (" and not (pp2 or cp2 or fsdp2 or dp2)" if "L3" in levels else "")
    arguments = ["tests/test_models.py", "-x", "-m", levels, "-k", expression, "-p", "no:cacheprovider"]
    done = python(root, "-m", "pytest", *arguments)
    match = re.search(r"^FAILED \S+::test_(\w+)", done.stdout, re.M)
    return next((level for word, level in LEVEL.items() if match and word in match[1]), None), done


def test_the_copy_itself_passes_them(copied):
    root, nearest = copied
    level, done = first_failure(root, "L1 or L2 or L3", QUICK[nearest])
    assert done.returncode == 0 and level is None, done.stdout[-3000:]


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_fails_the_proof_that_names_its_cause(bug, copied):
    recipe, file, old, new_text, levels, expected = BUGS[bug]
    root, copied_from = copied
    if recipe != copied_from:
        pytest.skip(f"a bug of {recipe}")
    path = root / "zoo" / NAME / file
    text = path.read_text()
    spoiled, count = re.subn(old, new_text, text)
    assert count == 1 and spoiled != text
    path.write_text(spoiled)
    try:
        level, done = first_failure(root, levels, QUICK[recipe])
    finally:
        path.write_text(text)
    assert level == expected, done.stdout[-3000:]
