"""Rows of the user's text files: ends of lines, other encodings than UTF-8, unreadable rows, and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common import records
from common.records import BadRow, parse_json, read_csv, read_json, read_lines, read_prompts

pytestmark = pytest.mark.L2

CASES = Path(__file__).parent / "cases"
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5_000
ODD = "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1d \x1e \r"  # str.splitlines ends a line at each of these


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def readable(rows) -> list:
    """Returns (line, row) of every row. The reason takes the place of a row that cannot be read."""
    return [(line, row.args[0] if isinstance(row, BadRow) else row) for line, row in rows]


# ---- lines ----


def test_lines_end_at_newlines_alone_and_a_byte_order_mark_is_no_content(tmp_path):
    path = write(tmp_path / "a.txt", f"\ufeffone\r\n{ODD}x\n\n\ufefflast\r")
    assert list(read_lines(path)) == [(1, "one"), (2, f"{ODD}x"), (3, ""), (4, "\ufefflast")]


def test_rows_keep_the_characters_that_other_readers_take_for_line_ends(tmp_path):
    for mark, end in (("", "\n"), ("\ufeff", "\r\n")):
        lax = json.dumps({"a": "\u2028\x85", "b": 1}, ensure_ascii=False)
        path = write(tmp_path / "a.jsonl", mark + lax + end + '{"c": 2}' + end)
        assert list(read_json(path)) == [(1, {"a": "\u2028\x85", "b": 1}), (2, {"c": 2})]
        path = write(tmp_path / "a.json", f'{mark}[{lax},{end}{{"c": 2}}{end}]{end}')
        assert list(read_json(path)) == [(1, {"a": "\u2028\x85", "b": 1}), (2, {"c": 2})]
    path = write(tmp_path / "a.csv", f'\ufeffx,y\r\n"{ODD}","two\r\nlines"\r\n3,4\r\n')
    assert list(read_csv(path, [["y"]])) == [(2, {"x": ODD, "y": "two\nlines"}), (4, {"x": "3", "y": "4"})]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize(("encoding", "line"), [("latin-1", 2), ("utf-16", 1), ("utf-16-le", "[12]")])
def test_another_encoding_is_an_error_that_names_file_and_line(tmp_path, name, encoding, line):
    text = {"a.txt": "one\ncafé\n", "a.jsonl": '{"a": 1}\n{"a": "é"}\n', "a.json": '[{"a": 1},\n{"a": "é"}]'}
    path = write(tmp_path / name, text.get(name, "a,b\né,2\n").encode(encoding))
    read = {"a.txt": read_lines, "a.csv": lambda path: read_csv(path, [["a"]])}.get(name, read_json)
    with pytest.raises(ValueError, match=rf"{name}:{line}: .*; expected .*; fix: ") as error:
        list(read(path))
    assert "\n" not in str(error.value) and type(error.value) is ValueError


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "no.jsonl"):
        with pytest.raises(ValueError, match=f"cannot read {path}: .*; expected .*; fix: "):
            list(read_json(path))


# ---- JSON ----


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
def test_json_list_is_read_in_pieces_with_the_line_of_each_item(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(records, "CHUNK", chunk)
    rows = [{"a": "[1, 2],"}, {"b": {"c": ["}", '"']}}, -12.5e20, "x\n", [], {"é": "你好 🙂"}]
    path = write(tmp_path / "rows.json", "\ufeff\n" + json.dumps(rows, indent=1, ensure_ascii=False))
    assert list(read_json(path)) == list(zip([3, 6, 14, 15, 16, 17], rows, strict=True))
    assert list(read_json(write(tmp_path / "none.json", " [ ] "))) == []


@pytest.mark.parametrize("chunk", [70_000, 1 << 20])
def test_rows_that_cannot_be_read_are_bad_rows_and_the_others_stay(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(records, "CHUNK", chunk)
    rows = ['{"a": 1}', DEEP, f'{{"n": [{LONG}]}}', '{"s": "]]\\"]"}', f'{{"d": "[{{", "e": {DEEP}}}', '{"b": 2}']
    wanted = [(1, {"a": 1}), *((n, "unreadable JSON") for n in (2, 3)), (4, {"s": ']]"]'}), (5, "unreadable JSON")]
    wanted.append((6, {"b": 2}))
    assert readable(read_json(write(tmp_path / "a.jsonl", "\n".join(rows)))) == wanted
    assert readable(read_json(write(tmp_path / "a.json", "[" + ",\n".join(rows) + "]"))) == wanted
    with pytest.raises(ValueError, match="b.json:2: malformed JSON, the list is not closed"):
        list(read_json(write(tmp_path / "b.json", "[1,\n" + DEEP)))


def test_json_is_read_to_a_depth_of_100_whatever_python_could(tmp_path):
    for opening, closing in ("[]", ('{"a":', "}")):
        assert parse_json(opening * 100 + "1" * (closing == "}") + closing * 100)
        with pytest.raises(BadRow, match="nested more than 100 deep"):
            parse_json(opening * 101 + "1" * (closing == "}") + closing * 101)
    assert len(parse_json(json.dumps([[{}]] * 200))) == 200  # wide is not deep


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"messages": []}', "a.json:1: malformed JSON, expected \\["),
        ("a.json", '[\n{"a": 1}\n{"b": 2}]', "a.json:3: malformed JSON, expected , or \\]"),
        ("a.json", '[\n{"a": 1},\n{"b": }]', "a.json:3: malformed JSON, Expecting value"),
        ("a.json", '[\n{"a": 1},\n', "a.json:3: malformed JSON"),
        ("a.json", "", "a.json:1: malformed JSON"),
        ("a.json", '[{"a": 1}[{"b": 2}]', "a.json:1: malformed JSON, expected , or \\]"),
        ("a.json", "[]]", "a.json:1: malformed JSON, more after the end of the list"),
        ("a.json", '[\n{"a": 1}]\n[{"b": 2}]', "a.json:3: malformed JSON, more after the end of the list"),
        ("a.jsonl", '{"a": 1}\n\n{"b": \n', "a.jsonl:3: malformed JSON, Expecting value"),
    ],
)
def test_malformed_file_is_an_error_with_its_line(tmp_path, monkeypatch, chunk, name, content, message):
    monkeypatch.setattr(records, "CHUNK", chunk)
    with pytest.raises(ValueError, match=message):
        list(read_json(write(tmp_path / name, content)))


# ---- CSV ----


def test_csv_rows_that_cannot_be_read_are_bad_rows_and_the_others_stay(tmp_path):
    text = f"path,cap\na,one\nb,{'x' * 131_073}\nc,{'y' * 131_072}\nd,a\rb\n\ne\nf,g,h\n"
    path = write(tmp_path / "a.csv", text)
    wanted = [
        (2, {"path": "a", "cap": "one"}), (3, "too long a cell"), (4, {"path": "c", "cap": "y" * 131_072}),
        (5, "malformed CSV"), (7, {"path": "e", "cap": None}), (8, {"path": "f", "cap": "g", None: ["h"]}),
    ]  # fmt: skip
    assert readable(read_csv(path, [["path"], ["cap"]])) == wanted
    assert [line for line, row in read_csv(path, [["cap"]], longest=1 << 20) if isinstance(row, BadRow)] == [5]


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_quote_that_is_never_closed_is_an_error_with_its_line_and_a_closed_one_is_not(tmp_path, end):
    rows = read_csv(write(tmp_path / "a.csv", f'path,cap\na,one\nb,"two\nc,three{end}'), [["cap"]])
    assert next(rows) == (2, {"path": "a", "cap": "one"})
    with pytest.raises(ValueError, match=r"a.csv:3: a quote is opened and never closed; expected .*; fix: "):
        next(rows)
    path = write(tmp_path / "a.csv", f'path,cap\nb,"two\n"{end}')
    assert list(read_csv(path, [["cap"]])) == [(2, {"path": "b", "cap": "two\n"})]


# ---- prompts ----


def test_prompts_of_a_text_file_are_its_lines(tmp_path):
    rows = read_prompts(CASES / "qwen3" / "prompts_bom_u2028.txt", "--prompts")
    texts = ["Sort the digits: 52913", "Sort the digits: 11111", "Sort the digits:\u202852913"]
    assert [row for _, row in rows] == [{"prompt": text} for text in texts]
    assert [where.rpartition(":")[2] for where, _ in rows] == ["1", "2", "4"]
    rows = read_prompts(write(tmp_path / "a.txt", '{"a": 1} is JSON\n{"a": 1}\n'), "--prompts")
    assert [row["prompt"] for _, row in rows] == ['{"a": 1} is JSON', '{"a": 1}']


def test_rows_of_json_are_prompts_by_their_keys_and_never_the_text_of_one(tmp_path):
    path = CASES / "qwen3" / "prompts.jsonl"
    question = "Sort the digits: 52913"
    wanted = [{"prompt": question}, {"messages": [{"role": "user", "content": question}]}]
    assert read_prompts(path, "--prompts") == [(f"{path}:{n}", row) for n, row in enumerate(wanted, 1)]
    listed = write(tmp_path / "a.json", json.dumps(wanted))
    assert [row for _, row in read_prompts(listed, "--prompts")] == wanted
    renamed = write(tmp_path / "a.txt", path.read_bytes())
    with pytest.raises(ValueError, match=r"a.txt:1 is a row of JSON; expected .*; fix: .*\.jsonl"):
        read_prompts(renamed, "--prompts")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.txt", None, "--prompts .*no.txt does not exist; expected"),
        ("a.csv", "prompt\nx\n", "unknown kind of file: --prompts .*a.csv; expected"),
        ("a.txt", " \r\n\n", "--prompts .*a.txt holds no prompt; expected"),
        ("a.jsonl", "", "--prompts .*a.jsonl holds no prompt; expected"),
        ("a.jsonl", '{"prompt": "x"}\n"y"\n', "a.jsonl:2: 'y'; expected an object"),
        ("a.jsonl", f'{{"prompt": "x"}}\n{DEEP}\n', "a.jsonl:2: unreadable JSON, nested more than 100 deep; expected"),
        ("a.jsonl", f'{{"prompt": {LONG}}}\n', "a.jsonl:1: unreadable JSON, a number of too many digits; expected"),
        ("a.txt", "café".encode("latin-1"), "a.txt:1: the bytes e9 .*; expected UTF-8"),
    ],
)
def test_a_file_without_prompts_is_refused_with_its_name(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message + ".*; fix: ") as error:
        read_prompts(tmp_path / name, "--prompts")
    assert "\n" not in str(error.value)
