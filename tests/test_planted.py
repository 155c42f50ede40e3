"""The ladder has teeth: bugs planted in the model of a copied recipe, one at a time, fail the proofs that its `case.py` feeds,
and first those of the level that names the cause."""

import re
import subprocess

import pytest
from test_new_recipe import NAME, copy_of_the_repository, new, python

pytestmark = pytest.mark.L0

QUICK = {"qwen3": "0.6B or dense", "wan21": "1.3B or t2v"}  # of the proofs of a recipe
BUGS = {  # recipe, file, what stands there, what is put there, levels that run, the first that fails
    "an export without a tensor": (
        "qwen3", "convert.py", "shapes=shapes(config),",
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
LEVEL = {"published": "L1", "oracles": "L2", "release": "L2", "layout": "L3"}


@pytest.fixture(scope="module", params=QUICK)
def copied(request, tmp_path_factory):
    """(a repository with a copied recipe, the recipe it came from)."""
    root = copy_of_the_repository(tmp_path_factory.mktemp("repository"))
    done = new(root, NAME, "--from", request.param)
    assert done.returncode == 0, done.stderr
    return root, request.param


def first_failure(root, levels: str, quick: str) -> tuple[str | None, subprocess.CompletedProcess]:
    """The level of the first proof that fails: they stand in the order of the levels."""
    only = quick + (" and not (pp2 or cp2 or fsdp2 or dp2)" if "L3" in levels else "")
    chosen = ["tests/test_models.py", "-x", "-m", levels, "-k", only, "-p", "no:cacheprovider"]
    done = python(root, "-m", "pytest", *chosen)
    name = re.search(r"^FAILED \S+::test_(\w+)", done.stdout, re.M)
    return next((level for word, level in LEVEL.items() if name and word in name[1]), None), done


def test_the_copy_itself_passes_them(copied):
    root, nearest = copied
    level, done = first_failure(root, "L1 or L2 or L3", QUICK[nearest])
    assert done.returncode == 0 and level is None, done.stdout[-3000:]


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_fails_the_proof_that_names_its_cause(bug, copied):
    nearest, name, there, instead, levels, first = BUGS[bug]
    root, copied_from = copied
    if nearest != copied_from:
        pytest.skip(f"a bug of {nearest}")
    path = root / "zoo" / NAME / name
    text = path.read_text()
    spoiled, count = re.subn(there, instead, text, count=1) if name == "model.py" else (text.replace(there, instead), 1)
    assert count == 1 and spoiled != text
    path.write_text(spoiled)
    try:
        level, done = first_failure(root, levels, QUICK[nearest])
    finally:
        path.write_text(text)
    assert level == first, done.stdout[-3000:]
