"""README.zh.md says what README.md says. The prose is translated; everything that is not prose is compared: sections,
commands, tables, and in each cell or paragraph the code, links, flags, numbers, paths and statuses.

Whether paths exist and commands run is tested in test_conformance.py for every Markdown file.
"""

import itertools
import re

import pytest
from test_conformance import MARKDOWN, ROOT

pytestmark = pytest.mark.L0

ENGLISH, CHINESE = (ROOT / name for name in ("README.md", "README.zh.md"))
LINKS = {ENGLISH: "\n[中文](README.zh.md)\n", CHINESE: "\n[English](README.md)\n"}  # below the titles
STATUS = {
    "unverified": "未验证",
    "verified": "已验证",
    "runs (": "可运行（",
    "not measured": "未实测",
    "not needed": "无需",
}
KEPT = re.compile(  # code, the target of a link, a status, a word or number with a digit in it
    rf"`[^`]+`|(?<=\]\()[^)]+|{'|'.join(map(re.escape, STATUS))}|[A-Za-z0-9](?:[\w.+-]*\w)?", re.ASCII
)


def kept(text: str) -> list[str]:
    """Returns the words that a translation keeps, in the order of the text."""
    for english, chinese in STATUS.items():
        text = text.replace(chinese, f" {english}")
    words = (match[0] for match in KEPT.finditer(text))
    return [w for w in words if w in STATUS or w.startswith("`") or "/" in w or re.search(r"\d|\.md$", w)]


def sections(text: str) -> list[tuple[str, dict[str, list]]]:
    """Returns (heading, parts) of each section. The parts are the heading's level, commands without comments, cells of
    tables, and the words that prose keeps. These are sorted, because a translation changes the order of words."""
    result = []
    for section in re.split(r"^(?=#)", text, flags=re.M)[1:]:
        heading, *lines = section.splitlines()
        prose = "\n".join(line for line in lines if not line.startswith(("    ", "|")))
        parts = {
            "level": [heading.split()[0]],
            "commands": [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.startswith("    ")],
            "tables": [[kept(c) for c in re.split(r"(?<!\\)\|", line)] for line in lines if line.startswith("|")],
            "prose": sorted(kept(f"{heading}\n{prose}")),
        }
        result.append((heading, parts))
    return result


def differences(english: str, chinese: str) -> list[str]:
    """Returns one line for each place where the two texts differ."""
    both = [sections(text) for text in (english, chinese)]
    if len(both[0]) != len(both[1]):
        return [f"{len(both[0])} sections in README.md, {len(both[1])} in README.zh.md"]
    return [
        f"{heading}, {part}: README.md has {one}, README.zh.md {other}"
        for (heading, english), (_, chinese) in zip(*both, strict=True)
        for part in english
        for one, other in itertools.zip_longest(english[part], chinese[part])
        if one != other
    ]


def read(path) -> str:
    return path.read_text().replace(LINKS[path], "", 1)


def test_readmes_say_the_same():
    differing = differences(read(ENGLISH), read(CHINESE))
    assert not differing, "\n".join(differing)


@pytest.mark.parametrize("path", LINKS, ids=lambda path: path.name)
def test_readmes_link_to_each_other_below_their_titles(path):
    title, _, rest = path.read_text().partition("\n")
    assert title.startswith("# ") and rest.startswith(LINKS[path])


def test_conformance_suite_reads_both():
    assert {ENGLISH, CHINESE} <= set(MARKDOWN)


CHANGES = {
    "a command": ("bash zoo/qwen3/pretrain.sh ", "bash zoo/qwen3/sft.sh "),
    "an option of a command": ("bash zoo/new.sh mine --from qwen3", "bash zoo/new.sh mine --from wan21"),
    "a path": ("`parallel.toml`", "`layouts.toml`"),
    "a link": ("](perf_table.md)", "](README.md)"),
    "a flag": ("`--tp --sp ", "`--tp "),
    "a number": ("1.6 GB", "2.1 GB"),
    "a number in a row": ("8.6e-3", "8.6e-2"),
    "a section": ("## ", "### "),
    "a row": (re.compile(r"^\| `--deterministic`.*\n", re.M), ""),
    "the order of rows": (re.compile(r"^(\| `zoo/`.*\n)(\| `common/`.*\n)", re.M), r"\2\1"),
    "a status": (re.compile("not measured|未实测"), "verified"),
    "a cell": (re.compile(r"^(\| cpu \|.*)\|$", re.M), r"\1"),
}


@pytest.mark.parametrize("path", LINKS, ids=lambda path: path.name)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_one_readme_is_found(change, path):
    old, new = CHANGES[change]
    texts = {path: read(path) for path in LINKS}
    texts[path] = re.sub(old if isinstance(old, re.Pattern) else re.escape(old), new, texts[path], count=1)
    assert texts[path] != read(path) and differences(*texts.values())
