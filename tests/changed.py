"""Which test files a change touches: `bash tests/run.sh --changed [COMMIT]` runs them.

A file is touched if it, or anything that it imports in the end, differs from COMMIT (HEAD if not given: what is not
committed yet). A test of a recipe depends on the whole folder of that recipe; one that goes over all recipes, on all of
them. Documents, launchers and layouts are the conformance suite's.
"""

import subprocess
import sys
from pathlib import Path

from test_conformance import MODULES, ROOT, imports, reached

CASES = {"qwen_case": "qwen3", "wan_case": "wan21"}  # helper of a recipe's own tests -> the recipe


def differing(commit: str) -> set[str]:
    """Paths of files that differ from a commit, files that git does not know yet too."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.check_output([*git, "diff", "--name-only", commit], text=True).splitlines()
    return {*found, *subprocess.check_output([*git, "ls-files", "-o", "--exclude-standard"], text=True).splitlines()}


def needed(test: Path, seen: set[Path] | None = None) -> set[str]:
    """Paths of the files that a test file, or a helper beside it, depends on."""
    seen = seen if seen is not None else set()
    if test in seen:
        return set()
    seen.add(test)
    found, names = {str(test.relative_to(ROOT))}, set(imports(test))
    modules = {name for name in names if name in MODULES} | {name.rpartition(".")[0] for name in names} & MODULES.keys()
    for module in modules:
        found |= {str(MODULES[each].relative_to(ROOT)) for each in (module, *reached(module))}
    helpers = {name.split(".")[0] for name in names} | {name.split(".")[-1] for name in names}
    recipes = {CASES[name] for name in {test.stem, *helpers} & CASES.keys()}
    if not recipes and "zoo." in test.read_text():
        recipes = {path.name for path in (ROOT / "zoo").iterdir() if path.is_dir() and not path.name.startswith("_")}
    for recipe in recipes:
        for module in [name for name in MODULES if name.startswith(f"zoo.{recipe}.")]:
            found |= {str(MODULES[each].relative_to(ROOT)) for each in (module, *reached(module))}
    for helper in helpers:
        if (path := ROOT / "tests" / f"{helper}.py").is_file():
            found |= needed(path, seen)
    return found


def touched(changed: set[str]) -> list[str]:
    """The test files that a change of these files touches."""
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    found = {str(test.relative_to(ROOT)) for test in tests if needed(test) & changed}
    if any(not name.endswith(".py") for name in changed):
        found.add("tests/test_conformance.py")
    return sorted(found)


if __name__ == "__main__":
    print("\n".join(touched(differing(sys.argv[1] if len(sys.argv) > 1 else "HEAD"))))
