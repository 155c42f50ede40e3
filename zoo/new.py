"""Makes a new recipe for `bash zoo/new.sh NAME --from NEAREST`, as a copy of the nearest one.

The model's classes are renamed too. Measurements and statuses of NEAREST do not hold for the copy. So it loses the rows
of `perf.jsonl`, the text between the `measured` markers of its README, the pictures shown there, and every status. Then
the tables are rendered again, and the tables of recipes in the root README and its translation get a row for the copy.
"""

import ast
import difflib
import io
import keyword
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

from common import cli, perf

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
MEASURED = re.compile(r"(?<=<!-- measured:begin -->\n).*?(?=<!-- measured:end -->)", re.S)


def arguments(argv: list[str]) -> tuple[str, str]:
    """Parses and checks (NAME, NEAREST).

    Raises:
        ValueError: the usage is wrong, NAME cannot be a new folder and module, or NEAREST is not a recipe.
    """
    recipes = sorted(p.parent.name for p in ROOT.glob("zoo/[!_]*/config.py"))
    match argv:
        case [name, "--from", nearest] | ["--from", nearest, name]:
            pass
        case _:
            raise ValueError(f"usage: bash zoo/new.sh NAME --from NEAREST; recipes: {', '.join(recipes)}")
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        raise ValueError(f"NAME {name!r} is no module's name; expected letters, digits and _, no keyword; fix: NAME")
    for path in (ROOT / "zoo" / name, ROOT / "zoo" / f"{name}.py"):
        if path.exists():
            raise ValueError(f"{path.relative_to(ROOT)} exists; expected a new name; fix: NAME")
    if nearest not in recipes:
        suggestion = difflib.get_close_matches(nearest, recipes, n=1) or [", ".join(recipes)]
        raise ValueError(f"unknown recipe {nearest!r}; did you mean {suggestion[0]}?; fix: --from")
    return name, nearest


def renamed(text: str, old: str, new: str) -> str:
    """Renames paths and modules named after a recipe. Elsewhere the name is the model's (`model_type`) and stays."""
    return re.sub(rf"\b(zoo[/.]|data/|runs/){old}\b", rf"\g<1>{new}", text)


def class_names(folder: Path, new: str) -> dict[str, str]:
    """Maps the classes of a recipe that are named after its model, in all its files, to their new names. The common
    prefix of the classes in model.py (Qwen3, Wan) becomes NAME in camel case."""
    defined = {
        path: [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
        for path in folder.glob("*.py")
    }
    blocks = [name for name in defined[folder / "model.py"] if name.endswith(("Block", "MLP", "Attention"))]
    old = os.path.commonprefix(blocks)
    camel = "".join(word.capitalize() for word in new.split("_"))
    names = {name for classes in defined.values() for name in classes if old and name.startswith(old)}
    return {name: camel + name.removeprefix(old) for name in names}


def with_classes(text: str, names: dict[str, str]) -> str:
    """Renames these classes in Python code. A name after a dot stays, because it is a library's."""
    lines = text.splitlines(keepends=True)
    for token in reversed(list(tokenize.generate_tokens(io.StringIO(text).readline))):
        row, start = token.start[0] - 1, token.start[1]
        if token.type == tokenize.NAME and token.string in names and lines[row][start - 1 : start] != ".":
            line = lines[row]
            lines[row] = line[:start] + names[token.string] + line[start + len(token.string) :]
    return "".join(lines)


def unverified(text: str) -> str:
    """Sets every status to unverified: a table's whole cell (also one that names a card), and words in sentences."""
    text = re.sub(r"(?<=\| )((un)?verified\b|[^|\n]*\bon one H\d00)[^|\n]*(?= \|)", "unverified", text, flags=re.I)
    text = re.sub(r"(?<=\| )(已验证|[^|\n]*单张 H\d00)[^|\n]*(?= \|)", "未验证", text)
    return re.sub(r"\bverified\b", "unverified", text).replace("Verified", "Unverified")


def copy(nearest: str, name: str, folder: Path) -> None:
    """Copies a recipe's folder under its new name, without measurements and statuses."""
    shutil.copytree(ROOT / "zoo" / nearest, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "perf.jsonl").write_text("")
    readme = folder / "README.md"
    for record in MEASURED.findall(readme.read_text()):
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", record):
            (folder / picture).unlink(missing_ok=True)
    readme.write_text(MEASURED.sub("Not measured yet.\n", readme.read_text()))
    classes = class_names(folder, name)
    for path in folder.rglob("*"):
        if path.suffix in (".md", ".py", ".sh", ".toml"):
            text = renamed(path.read_text(), nearest, name)
            text = with_classes(text, classes) if path.suffix == ".py" else text
            path.write_text(unverified(text) if path.suffix == ".md" else text)


def listed(readme: str, nearest: str, name: str) -> str:
    """Returns a root README with the copy's rows below those of the recipe it comes from."""
    rows = re.findall(rf"^\| \[{nearest}\]\(zoo/{nearest}/.*\n", readme, re.M)
    if not rows:
        raise ValueError(f"README.md has no row [{nearest}](zoo/{nearest}/README.md); expected one; fix: README.md")
    new_rows = unverified(renamed("".join(rows), nearest, name).replace(f"[{nearest}]", f"[{name}]"))
    return readme.replace(rows[-1], rows[-1] + new_rows)


def make(argv: list[str]) -> None:
    """Makes the copy in a temporary folder and moves it into place after all checks, so an error leaves nothing."""
    name, nearest = arguments(argv)
    readmes = {path: listed(path.read_text(), nearest, name) for path in READMES}
    perf.rendered()  # raises if the record of any recipe is broken
    with tempfile.TemporaryDirectory(dir=ROOT / "zoo", prefix="_") as temporary:
        copy(nearest, name, Path(temporary) / name)
        (Path(temporary) / name).rename(ROOT / "zoo" / name)
    # A longer name may push a line over the limit.
    if subprocess.run(
        [sys.executable, "-m", "ruff", "format", "-q", ROOT / "zoo" / name], capture_output=True
    ).returncode:
        print(
            f"note: {sys.executable} has no ruff, the copy is not formatted; fix: ruff format zoo/{name}",
            file=sys.stderr,
        )
    for path, text in (readmes | perf.rendered()).items():
        path.write_text(text)
    print(
        f"zoo/{name} is a copy of zoo/{nearest}: nothing in it is verified, its record is empty\n"
        f"next: bash tests/verify.sh {name}        climbs L0-L4, stops at the first thing to mend\n"
        f"then: config.py, model.py, convert.py and case.py for your model, the ladder after each; README.md, demo/"
    )


if __name__ == "__main__":
    cli.exit_on_bad_input(make, sys.argv[1:])
