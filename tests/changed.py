"""Lists the test files that a change touches; `bash tests/run.sh --changed [COMMIT]` runs them.

A change is everything that differs from COMMIT, by default HEAD: all that is not committed yet. It touches a test file
if it contains that file or a module that the file imports, directly or indirectly. A test of one recipe depends on the
whole folder of that recipe; a test of all recipes depends on the folders of all recipes. A change of any other kind of
file (documents, launchers, layouts) touches the conformance suite.
"""

import subprocess
import sys
from pathlib import Path

from test_conformance import MODULES, ROOT, imports, reached

CASES = {"qwen_case": "qwen3", "wan_case": "wan21"}  # helper module of a recipe's tests -> the recipe


def differing(commit: str) -> set[str]:
    """Returns the paths of the files that differ from a commit, untracked files included."""
    git = ["git", "-C", str(ROOT)]
    tracked = subprocess.check_output([*git, "diff", "--name-only", commit], text=True).splitlines()
    return {*tracked, *subprocess.check_output([*git, "ls-files", "-o", "--exclude-standard"], text=True).splitlines()}


def needed(test: Path, seen: set[Path] | None = None) -> set[str]:
    """Returns the paths of the files that a test file, or a helper module beside it, depends on."""
    seen = seen if seen is not None else set()
    if test in seen:
        return set()
    seen.add(test)
    paths, names = {str(test.relative_to(ROOT))}, set(imports(test))
    modules = {name for name in names if name in MODULES} | {name.rpartition(".")[0] for name in names} & MODULES.keys()
    for module in modules:
        paths |= {str(MODULES[each].relative_to(ROOT)) for each in (module, *reached(module))}
    helpers = {name.split(".")[0] for name in names} | {name.split(".")[-1] for name in names}
    recipes = {CASES[name] for name in {test.stem, *helpers} & CASES.keys()}
    if not recipes and "zoo." in test.read_text():
        recipes = {path.name for path in (ROOT / "zoo").iterdir() if path.is_dir() and not path.name.startswith("_")}
    for recipe in recipes:
        for module in [name for name in MODULES if name.startswith(f"zoo.{recipe}.")]:
            paths |= {str(MODULES[each].relative_to(ROOT)) for each in (module, *reached(module))}
    for helper in helpers:
        if (path := ROOT / "tests" / f"{helper}.py").is_file():
            paths |= needed(path, seen)
    return paths


def touched(changed: set[str]) -> list[str]:
    """Returns the test files that a change of these files touches."""
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    selected = {str(test.relative_to(ROOT)) for test in tests if needed(test) & changed}
    if any(not name.endswith(".py") for name in changed):
        selected.add("tests/test_conformance.py")
    return sorted(selected)


if __name__ == "__main__":
    print("\n".join(touched(differing(sys.argv[1] if len(sys.argv) > 1 else "HEAD"))))
