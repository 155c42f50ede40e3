"""The data path of Qwen3: preprocessing, rows of documents, conversations and pairs, and the demo data."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from transformers import AutoTokenizer

from common import cli
from common.data import prefetch
from common.drops import DropReport
from common.language import generate, packing, preprocess
from common.language.chat import Chat, to_chat, to_pair, to_question, to_tools
from common.language.demo import make_data
from common.language.files import read_rows
from common.language.options import read_questions
from common.language.packing import IGNORE, PackedRows, pack, prepare_chats
from common.language.text import TextRows
from common.records import BadRow
from zoo.qwen3 import data
from zoo.qwen3 import options as jobs
from zoo.qwen3.options import DEMO, DEMO_TOKENIZER, PreprocessOptions

pytestmark = pytest.mark.L2

ROOT = Path(__file__).parents[1]
VOCABULARY = 2048
END = 0  # <|endoftext|>
CASES = ROOT / "tests" / "cases" / "qwen3"
CHAT = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
WRONG = [CHAT[0], {"role": "assistant", "content": "3"}]
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_TOKENIZER)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_data.make(folder / "text")
    make_data.make_sft(folder / "sft")
    make_data.make_descending(folder / "lora")
    make_data.make_pairs(folder / "dpo")
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- the demo ----


def test_demo_text_is_the_same_every_time_and_its_validation_apart(demo, tmp_path):
    make_data.make(tmp_path / "text")
    train, validation = (lines(tmp_path / "text" / f"{split}.jsonl") for split in ("train", "validation"))
    assert [train, validation] == [lines(demo / "text" / f"{split}.jsonl") for split in ("train", "validation")]
    texts = [row["text"] for row in train + validation]
    assert len(texts) == len(set(texts)) > 2000 and min(map(len, texts)) >= 100 and sum(map(len, texts)) > 800_000
    assert 0.03 < len(validation) / len(texts) < 0.07


def test_demo_folder_is_kept_or_made_anew_and_never_another_folder_overwritten(tmp_path):
    folder = make_data.make_sft(tmp_path / "sft", train=50, test=10)
    before = (folder / "train.jsonl").stat().st_mtime_ns
    assert (make_data.make_sft(folder, train=50, test=10) / "train.jsonl").stat().st_mtime_ns == before
    assert len(lines(make_data.make_sft(folder, train=60, test=10) / "train.jsonl")) == 60
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="holds other files"):
        make_data.make_sft(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


def test_demo_answers_are_right_and_no_test_answer_is_in_training(demo):
    answers = {}
    for split in ("train", "test"):
        answers[split] = set()
        for kind, order in (("sft", ""), ("lora", ", largest first")):
            for question, answer in (row["messages"] for row in lines(demo / kind / f"{split}.jsonl")):
                digits = question["content"].removeprefix(f"Sort the digits{order}: ")
                assert len(digits) == 5 and answer["content"] == "".join(sorted(digits, reverse=bool(order)))
                answers[split].add("".join(sorted(digits)))
        for row in lines(demo / "dpo" / f"{split}.jsonl"):
            assert row["rejected"] == "".join(sorted(row["prompt"][-5:])) and row["chosen"] == " ".join(row["rejected"])
            answers[split].add(row["rejected"])
    assert not answers["train"] & answers["test"]


def test_demo_tokenizer_is_small_has_the_models_vocabulary_and_gives_any_text_back(tokenizer):
    assert sum(file.stat().st_size for file in DEMO_TOKENIZER.iterdir()) < 200_000
    assert len(tokenizer) == VOCABULARY and tokenizer.convert_tokens_to_ids("<|endoftext|>") == END
    for text in ("def f(x):\n\treturn  x ** 2", "naïve 你好 🙂\r\n", " 12345 <think>\nhm\n</think>", "\x00\ufffd"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("4096") == list("4096")
    assert tokenizer.decode(tokenizer("<think>a</think><|im_end|>")["input_ids"], skip_special_tokens=True) == (
        "<think>a</think>"
    )


# ---- the chat template and the mask ----


def expected(messages: list[dict]) -> list[tuple[str, bool]]:
    """Restates Qwen3's format: returns pieces of text, and whether the assistant generates each."""
    pieces = []
    question = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=len(messages))
    for i, message in enumerate(messages):
        text = message["content"]
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        if message["role"] != "assistant":
            pieces.append((f"{text}<|im_end|>\n", False))
            continue
        thoughts = message.get("reasoning_content", "")
        if not thoughts and "</think>" in text:
            thoughts, text = text.removeprefix("<think>").split("</think>")
            text = text.lstrip("\n")
        thoughts, last = thoughts.strip("\n"), i == len(messages) - 1
        if i > question and (last or thoughts):
            pieces.append((f"<think>\n{thoughts}\n</think>\n\n", bool(thoughts)))
            text = text.lstrip("\n")
        pieces += [(f"{text}<|im_end|>", True), ("\n", False)]
    return pieces


def conversation(rng: random.Random) -> list[dict]:
    """Draws turns in any order a chat may have, texts that look like the template's, and thoughts in both spellings."""
    words = [
        "hello",
        "assistant\n",
        "\n",
        "  ",
        "你好",
        "🙂",
        "<think>",
        "user",
        "im_end",
        "x = 1",
        "-100",
        "\n\n",
        "é",
    ]

    def text() -> str:
        return "".join(rng.choices(words, k=rng.randint(0, 8))) + rng.choice("abc")

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.4 else []
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": text()})
        for _ in range(rng.choice([1, 1, 1, 2])):
            answer = {"role": "assistant", "content": text().replace("<think>", "")}
            thoughts = text().replace("<think>", "")
            kind = rng.randrange(4)
            if kind == 0:
                answer["content"] = f"<think>\n{thoughts}\n</think>\n\n{answer['content']}"
            elif kind == 1:
                answer["reasoning_content"] = thoughts
            elif kind == 2 and rng.random() < 0.3:
                answer["content"] = f"<think>\n\n</think>\n\n{answer['content']}"
            messages.append(answer)
    return messages


def flags_of(pieces: list[tuple[str, bool]], tokenizer) -> tuple[list[int], list[bool]]:
    text = "".join(text for text, _ in pieces)
    inside = [flag for text, flag in pieces for _ in text]
    encoded = tokenizer(text, return_offsets_mapping=True)
    return encoded["input_ids"], [any(inside[start:end]) for start, end in encoded["offset_mapping"]]


def test_template_and_mask_of_a_thousand_conversations_are_qwen3s(tokenizer):
    rng, chat, thought = random.Random(0), Chat(tokenizer), 0
    for _ in range(1000):
        messages = conversation(rng)
        pieces = expected(messages)
        assert chat.render(messages) == "".join(text for text, _ in pieces), messages
        tokens, generated = chat.encode(messages)
        wanted, flags = flags_of(pieces, tokenizer)
        assert tokens.tolist() == wanted and generated.tolist() == flags, messages
        thought += any(flag and text.startswith("<think>") for text, flag in pieces)
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert tokens.tolist() == ids
    assert thought > 200


def test_generation_prompt_with_and_without_thinking(tokenizer):
    question = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    base = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    for options, prompt in (({}, ""), ({"enable_thinking": True}, ""), ({"enable_thinking": False}, True)):
        rendered = Chat(tokenizer).render(question, add_generation_prompt=True, **options)
        assert rendered == base + ("<think>\n\n</think>\n\n" if prompt else "")


def test_mask_begins_where_the_prompt_for_a_generation_ends(tokenizer):
    """The tokens that are trained continue the prompt that inference feeds, with thoughts and without."""
    chat = Chat(tokenizer)
    question = {"role": "user", "content": "Q"}
    for content, thinking in (("A", False), ("<think>\nhm\n</think>\n\nA", True)):
        messages = [question, {"role": "assistant", "content": content}]
        text, [(start, end)] = chat.spans(messages)
        assert text[:start] == chat.render([question], add_generation_prompt=True, enable_thinking=thinking)
        assert text[start:end] == content + "<|im_end|>"


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = CHATML.replace("m.content +", "(m.content | trim) +").replace(
    "'<|im_start|>' + m.role + '\n'", "m.role + ':\n'"
)
TRIMMED = TRIMMED.replace("'<|im_start|>assistant\n'", "'assistant:\n'")
THINKS = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")


def with_template(tokenizer, template: str):
    changed = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize(("template", "begin"), [(CHATML, ""), (TRIMMED, ""), (THINKS, "<think>\n")])
def test_mask_of_other_templates(tokenizer, template, begin):
    chat = Chat(with_template(tokenizer, template))
    messages = [
        {"role": "user", "content": " Q "}, {"role": "assistant", "content": "first"},
        {"role": "user", "content": "assistant:\n"}, {"role": "assistant", "content": begin + "second"},
    ]  # fmt: skip
    tokens, generated = chat.encode(messages)
    assert tokenizer.decode(tokens) == chat.render(messages)
    assert tokenizer.decode(tokens[generated]) == "first<|im_end|>second<|im_end|>"
    last = chat.encode(messages, train_on="last")[1]
    assert tokenizer.decode(tokens[last]) == "second<|im_end|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ messages[-1].content }}", "does not show answers in order"),
        (CHATML.split("{% if add")[0], "no prompt for an answer"),
        (
            "{{ messages[-1].content | length }}" + CHATML,
            "changes the rest of a conversation with the answer in message 1",
        ),
        ("{{ messages | length }}" + CHATML, "show answers in order"),
        ("{{ 1 / 0 }}" + CHATML, "fails: ZeroDivisionError.*; fix: --tokenizer"),
        ("{% if %}" + CHATML, "fails: TemplateSyntaxError.*; fix: --tokenizer"),
    ],
)
def test_template_that_cannot_be_masked_is_refused(tokenizer, template, message):
    with pytest.raises((ValueError, BadRow), match=message):
        Chat(with_template(tokenizer, template)).encode(
            [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a longer answer"}]
        )


# Renders conversations, thoughts and calls as the released template does. A newline precedes a call only after text.
# Tool results are a user's turn. Thoughts are shown only after the last question that is no tool result.
RELEASED = (
    "{%- set ns = namespace(last=messages | length - 1) -%}"
    "{%- if tools %}{{ '<|im_start|>system\n# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' ~ (tool | tojson) }}{% endfor %}"
    "{{ '\n</tools><|im_end|>\n' }}{% endif -%}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'tool' -%}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif -%}"
    "{%- elif m.role != 'assistant' -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}"
    "{%- else -%}"
    "{%- set ns.text = m.content -%}{%- set ns.thoughts = m.reasoning_content or '' -%}"
    "{%- if not ns.thoughts and '</think>' in m.content -%}"
    "{%- set ns.thoughts = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set ns.text = m.content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- if loop.index0 > ns.last and (loop.last or ns.thoughts) -%}"
    "{{- '<think>\n' + ns.thoughts + '\n</think>\n\n' -}}{%- endif -%}"
    "{{- ns.text -}}"
    "{%- for call in m.tool_calls or [] -%}"
    "{%- if not loop.first or ns.text %}{{ '\n' }}{% endif -%}{%- set f = call.function or call -%}"
    '{{- \'<tool_call>\n{"name": "\' + f.name + \'", "arguments": \' -}}'
    "{{- f.arguments if f.arguments is string else f.arguments | tojson -}}{{- '}\n</tool_call>' -}}"
    "{%- endfor -%}{{- '<|im_end|>\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif -%}"
)


@pytest.fixture(scope="module")
def released(tokenizer, tmp_path_factory) -> Path:
    """Saves the demo's tokenizer with that template in a folder."""
    folder = tmp_path_factory.mktemp("released")
    with_template(tokenizer, RELEASED).save_pretrained(folder)
    return folder


load = functools.cache(AutoTokenizer.from_pretrained)


def learnt(row: dict, folder: Path, train_on: str = "all") -> list[str]:
    """Returns what is learnt from a row: one text per answer."""
    tokenizer = load(folder)
    tokens, generated = Chat(tokenizer).encode(to_chat(row), to_tools(row), train_on)
    runs = [list(run) for flag, run in itertools.groupby(range(len(tokens)), generated.__getitem__) if flag]
    return [tokenizer.decode(tokens[run]) for run in runs]


CALL = '<tool_call>\n{"name": "lookup", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize("name", ["tc_empty", "tools_list", "tools_string", "tool_calls_string"])
def test_calls_without_text_are_learnt_to_the_end_of_their_turn_however_they_are_written(name, released, tmp_path):
    path = CASES / f"{name}.jsonl"
    row = lines(path)[-1]
    assert learnt(row, released) == [f"{CALL}<|im_end|>", "In Norway.<|im_end|>"]
    assert "find a city" in Chat(load(released)).render(to_chat(row), to_tools(row))
    folder = prepare_chats(path, released, 512, tmp_path)
    assert lines(folder / "drops.jsonl") == [{"kind": "summary", "dropped": 0, "reasons": {}}]


def test_calls_beside_text_and_thoughts_and_several_calls_are_learnt_whole(released):
    call = {"name": "lookup", "arguments": {"city": "Oslo"}}
    ask = {"role": "assistant", "content": "Let me see.", "tool_calls": [{"type": "function", "function": call}, call]}
    result = {"role": "tool", "content": "Norway"}
    row = {"messages": [CHAT[0], ask | {"reasoning_content": "hm"}, result, result, CHAT[1]]}
    assert learnt(row, released) == [
        f"<think>\nhm\n</think>\n\nLet me see.\n{CALL}\n{CALL}<|im_end|>", "2<|im_end|>"
    ]  # fmt: skip
    row = {"messages": [CHAT[0], ask | {"content": ""}]}
    assert learnt(row, released) == [f"{CALL}\n{CALL}<|im_end|>"]


FUNCTION = {"name": "lookup", "description": "d"}


@pytest.mark.parametrize(
    ("tools", "wanted"),
    [
        (None, None), ("", None), ("[]", None), ([], None), ("null", None), ({}, None),
        (FUNCTION, [FUNCTION]), ([FUNCTION], [FUNCTION]), (json.dumps(FUNCTION), [FUNCTION]),
        ([json.dumps(FUNCTION), json.dumps({"name": "b"})], [FUNCTION, {"name": "b"}]),
        ("[5]", r"tools\[0\] is int; expected an object"), (["lookup"], r"tools\[0\]: Expecting value"),
        ("lookup", "tools: Expecting value"), (5, r"tools\[0\] is int"), (DEEP, "nested more than 100 deep"),
    ],
)  # fmt: skip
def test_tools_are_objects_or_json_texts_of_them(tools, wanted, released):
    row = {"messages": CHAT, "tools": tools}
    if isinstance(wanted, str):
        with pytest.raises(BadRow, match=wanted):
            to_tools(row)
    else:
        assert to_tools(row) == wanted and learnt(row, released) == ["2<|im_end|>"]


@pytest.mark.parametrize(
    ("calls", "wanted"),
    [
        ({"name": "f"}, [{"name": "f", "arguments": {}}]),
        ([{"name": "f", "arguments": '{"a": 1}'}], [{"name": "f", "arguments": {"a": 1}}]),
        (['{"name": "f", "arguments": null}'], [{"name": "f", "arguments": {}}]),
        ([{"id": "1", "function": {"name": "f", "arguments": ""}}], [{"id": "1", "function": {"name": "f", "arguments": {}}}]),
        ([{"function": None, "name": "f"}], [{"function": None, "name": "f", "arguments": {}}]),
        ("[]", "empty turn"), (["f"], r"messages\[1\].tool_calls\[0\]: Expecting value"),
        ([{"function": "f"}], r"tool_calls\[0\] names no function"), ([{"name": ["f"]}], "names no function"),
        ([{"name": "f", "arguments": "{"}], r"tool_calls\[0\].arguments: "),
        ([{"name": "f", "arguments": "[1]"}], r"tool_calls\[0\].arguments is list; expected an object"),
    ],
)  # fmt: skip
def test_tool_calls_are_objects_or_json_texts_of_them(calls, wanted):
    row = {"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": calls}]}
    if isinstance(wanted, str):
        with pytest.raises(BadRow) as caught:
            to_chat(row)
        assert re.search(wanted, " ".join(caught.value.args))
    else:
        assert to_chat(row)[1]["tool_calls"] == wanted


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_whatever_a_row_or_the_template_raises_is_a_drop_by_file_and_line(tokenizer, tmp_path, kind):
    """With a template that fails on a value, a role that is no text, and a row nested deeper than Python allows."""
    other = with_template(tokenizer, "{% for m in messages if m.content == 'three' %}{{ 1 / 0 }}{% endfor %}" + CHATML)
    other.save_pretrained(tmp_path / "tokenizer")
    pair = {"chosen": "2", "rejected": "3"}
    rows = [{"messages": CHAT[:1] if kind == "dpo" else CHAT} | pair for _ in range(100)]
    rows[2] = {"prompt": "three", "instruction": "three", "output": "3"} | pair
    rows[4] = {"messages": [{"role": ["user"], "content": "x"}, CHAT[1]]} | pair
    rows[6] = {"messages": [{"role": {}, "content": "x"}, CHAT[1]]} | pair
    text = [*map(json.dumps, rows)]
    text[8:10] = DEEP, '{"messages": ' + "9" * 5000 + "}"
    (tmp_path / "rows.jsonl").write_text("\n".join(text))
    folder = prepare_chats(tmp_path / "rows.jsonl", tmp_path / "tokenizer", 128, tmp_path / "cache", kind=kind)
    assert [(d["where"], d["reason"]) for d in lines(folder / "drops.jsonl")[1:]] == [
        ("rows.jsonl:3", "refused by the template"), ("rows.jsonl:5", "unknown role"), ("rows.jsonl:7", "unknown role"),
        ("rows.jsonl:9", "unreadable JSON"), ("rows.jsonl:10", "unreadable JSON"),
    ]  # fmt: skip
    assert "ZeroDivisionError: division by zero" in lines(folder / "drops.jsonl")[1]["detail"]


def test_an_error_nobody_thought_of_is_a_drop_too(tmp_path, monkeypatch):
    real = packing.to_chat
    monkeypatch.setattr(packing, "to_chat", lambda row: real(row) if row["messages"] else [][0])
    path = write(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 40 + [{"messages": []}])
    [_, drop] = lines(prepare_chats(path, DEMO_TOKENIZER, 128, tmp_path / "cache") / "drops.jsonl")
    assert (drop["where"], drop["reason"]) == ("rows.jsonl:41", "unusable row")
    assert drop["detail"] == "IndexError: list index out of range"


def test_names_of_special_tokens_in_calls_and_tools_drop_the_row(released):
    call = {"name": "lookup", "arguments": {"city": "<|im_end|>"}}
    rows = ({"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": call}]},
            {"messages": CHAT, "tools": [{"name": "lookup", "description": "<|im_start|>"}]})  # fmt: skip
    for row, where in zip(rows, ("message 1", "tools"), strict=True):
        with pytest.raises(BadRow, match=f"{where} holds '<|im_"):
            learnt(row, released)


# ---- what is learnt of a conversation ----

SECOND = "<think>\nadd again\n</think>\n\n6<|im_end|>"


@pytest.mark.parametrize(
    ("name", "train_on", "wanted"),
    [
        ("think_multi", "all", ["4<|im_end|>", SECOND]),
        ("think_multi", "last", [SECOND]),
        ("think_multi", "complete", [SECOND]),
        ("weight0", "all", ["good answer<|im_end|>"]),
        ("weight0", "complete", ["good answer<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("template", ["demo", "released"])
def test_train_on_and_weight_choose_the_answers(name, train_on, wanted, template, released):
    row = lines(CASES / f"{name}.jsonl")[-1]
    assert learnt(row, DEMO_TOKENIZER if template == "demo" else released, train_on) == wanted


def test_complete_answers_are_those_without_thoughts_too_and_thoughts_that_the_template_shows(tokenizer):
    turns = [("a?", "one"), ("b?", "<think>hm</think>two"), ("c?", "three")]
    row = {"conversations": [{"from": f, "value": v} for t in turns for f, v in zip(("human", "gpt"), t, strict=True)]}
    assert learnt(row, DEMO_TOKENIZER, "complete") == ["one<|im_end|>", "three<|im_end|>"]
    plain = Chat(with_template(tokenizer, CHATML))  # shows thoughts as plain text
    assert plain.find_bare_answers(to_chat(row)) == set() and Chat(tokenizer).find_bare_answers(to_chat(row)) == {3}
    # thoughts that are also the answer or a part of it, and empty thoughts
    for thoughts, answer, bare in (("4", "4", {1}), ("add", "to add", {1}), ("\n \n", "4", set())):
        row = {"messages": [CHAT[0], {"role": "assistant", "content": answer, "reasoning_content": thoughts}, *CHAT]}
        assert Chat(tokenizer).find_bare_answers(to_chat(row)) == bare


@pytest.mark.parametrize(
    "flag",
    [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"training": False}, {"weight": 1, "loss": 0}],
)
def test_an_answer_says_itself_that_it_is_not_learnt(flag):
    messages = [
        CHAT[0],
        CHAT[1] | flag,
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "because"},
    ]
    assert learnt({"messages": messages}, DEMO_TOKENIZER) == ["because<|im_end|>"]
    messages[1] = CHAT[1] | dict.fromkeys(flag, 1) | {"loss": None}
    assert learnt({"messages": messages}, DEMO_TOKENIZER) == ["2<|im_end|>", "because<|im_end|>"]


@pytest.mark.parametrize(
    ("flag", "reason", "detail"),
    [
        ({"weight": 0}, "nothing to learn", "no answer is left of 1"),
        ({"weight": 0.5}, "bad row", r"messages\[1\].weight is 0.5; expected 0 or 1"),
        ({"loss": "false"}, "bad row", r"messages\[1\].loss is 'false'; expected 0 or 1, false or true"),
        ({"train": [1]}, "bad row", r"messages\[1\].train is \[1\]"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "bad row", "train_detail"),
    ],
)
def test_flags_that_leave_nothing_or_say_nothing_drop_the_row(flag, reason, detail):
    with pytest.raises(BadRow, match=detail) as caught:
        learnt({"messages": [CHAT[0], CHAT[1] | flag]}, DEMO_TOKENIZER)
    assert caught.value.args[0] == reason


def test_the_last_answer_is_not_replaced_by_an_earlier_one_where_it_is_not_learnt():
    messages = [*CHAT, CHAT[0], {"role": "assistant", "content": "3", "weight": 0}]
    with pytest.raises(BadRow, match="no answer is left of 2"):
        learnt({"messages": messages}, DEMO_TOKENIZER, "last")


def test_thoughts_left_out_are_counted_in_what_is_printed_and_the_choice_has_a_cache_of_its_own(tmp_path, capsys):
    path, counts = CASES / "think_multi.jsonl", {}
    for train_on, note in (
        ("all", "learnt without them"),
        ("complete", "train on: complete"),
        ("last", "train on: last"),
    ):
        folder = prepare_chats(path, DEMO_TOKENIZER, 512, tmp_path, train_on=train_on)
        assert f"; the template leaves out the thoughts of 1 answers ({note})" in capsys.readouterr().out
        labels = PackedRows(folder).fetch(range(len(PackedRows(folder))))["labels"]
        counts[folder.name] = int((labels != IGNORE).sum())
    assert len(counts) == 3 and sorted(counts.values()) == [min(counts.values())] * 2 + [max(counts.values())]
    prepare_chats(CASES / "weight0.jsonl", DEMO_TOKENIZER, 512, tmp_path)
    assert "thoughts" not in capsys.readouterr().out


# ---- rows to messages ----


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "1 + 1?", "input": "", "output": "2"},
        {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}], "id": 7},
        {"messages": CHAT},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "1 + "}, {"text": "1?"}]}, CHAT[1]]},
        {"messages": [*CHAT, {"role": "user", "content": "never answered"}]},
    ],
)
def test_every_format_becomes_the_same_messages(row):
    assert to_chat(row) == CHAT


def test_alpaca_with_input_system_and_history():
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "S", "history": [["q", "a"]]}
    wanted = [("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "Add.\n1 + 1"), ("assistant", "2")]
    assert [(m["role"], m["content"]) for m in to_chat(row)] == wanted
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "S"}
    assert to_chat(row)[0] == {"role": "system", "content": "S"}


BAD_CHATS = [
    ("text", "bad row", "expected an object"),
    ({"text": "a document"}, "unknown format", "keys: text"),
    ({"messages": "hello"}, "bad row", "messages is str"),
    ({"messages": []}, "no assistant turn", "keys: messages"),
    ({"messages": CHAT[:1]}, "no assistant turn", "keys: messages"),
    ({"messages": ["hello"]}, "bad row", r"messages\[0\] is str"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "unknown role", r"messages\[0\] has role 'bot'"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "bad row", r"messages\[1\].content is NoneType"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": " \n"}]}, "empty turn", "message 1, of assistant"),
    ({"messages": [CHAT[1]]}, "no question", "not the user's"),
    ({"messages": [*CHAT, {"role": "system", "content": "S"}, *CHAT]}, "bad row", "message 2 is a system"),
    ({"conversations": [{"from": "human", "value": 1}]}, "bad row", r"conversations\[0\].content is int"),
    ({"instruction": "a", "output": 5}, "bad row", "output is int"),
    ({"instruction": "a"}, "no assistant turn", "keys: instruction"),
    ({"instruction": "", "output": "x"}, "empty turn", "message 0, of user"),
    ({"instruction": "a", "output": "x", "history": ["q"]}, "bad row", "history"),
]
BAD_PAIRS = [
    ({"prompt": "a", "chosen": "b"}, "unknown format", "chosen and rejected, lacks rejected"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "equal answers", "rejected"),
    ({"prompt": "a", "chosen": "b", "rejected": 5}, "bad row", r"rejected\[0\] is int"),
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "empty turn", "message 1"),
    ({"prompt": "a", "chosen": [], "rejected": "c"}, "no assistant turn", "chosen"),
    ({"chosen": "b", "rejected": "c"}, "no question", "user"),
    (
        {"chosen": CHAT, "rejected": [{"role": "user", "content": "2 + 2?"}, CHAT[1]]},
        "bad row", "different questions",
    ),
    ({"prompt": "2 + 2?", "chosen": CHAT, "rejected": WRONG}, "another question", "chosen begins otherwise"),
    ({"prompt": [{"role": "user", "content": "?"}], "chosen": CHAT, "rejected": WRONG}, "another question", "chosen begins"),
    ({"prompt": CHAT[:1], "chosen": "2", "rejected": [{"role": "user", "content": "?"}, WRONG[1]]}, "another question", "rejected"),
    ({"prompt": [CHAT[1], CHAT[0]], "chosen": CHAT, "rejected": WRONG}, "another question", "chosen begins"),
    (
        {"prompt": "1 + 1?", "system": "S", "chosen": [{"role": "system", "content": "T"}, *CHAT], "rejected": WRONG},
        "another question", "chosen begins",
    ),
    ({"messages": CHAT, "chosen": "2", "rejected": "3"}, "answer before the answer", "message 1 of chosen"),
    ({"prompt": CHAT, "chosen": "4", "rejected": [WRONG[1]]}, "answer before the answer", "message 1 of chosen"),
    ({"prompt": "q", "chosen": "2", "rejected": [CHAT[1], WRONG[1]]}, "answer before the answer", "message 1 of rejected"),
    ({"chosen": [*CHAT, CHAT[1]], "rejected": [*CHAT, WRONG[1]]}, "answer before the answer", "message 1 of chosen"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "row", "reason", "detail"), [(to_chat, *bad) for bad in BAD_CHATS] + [(to_pair, *bad) for bad in BAD_PAIRS]
)
def test_bad_row_names_reason_and_field(make, row, reason, detail):
    with pytest.raises(BadRow, match=detail) as caught:
        make(row)
    assert caught.value.args[0] == reason


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"},
        {"prompt": CHAT[:1], "chosen": [CHAT[1]], "rejected": [{"role": "assistant", "content": "3"}]},
        {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "3"}]},
        {"instruction": "1 + 1?", "input": "", "chosen": "2", "rejected": "3"},
        {
            "conversations": [{"from": "human", "value": "1 + 1?"}],
            "chosen": {"from": "gpt", "value": "2"},
            "rejected": {"from": "gpt", "value": "3"},
        },
        {"prompt": "1 + 1? ", "chosen": CHAT, "rejected": WRONG, "messages": CHAT},  # as in UltraFeedback
        {"prompt": CHAT[:1], "chosen": CHAT, "rejected": WRONG},
        {"messages": CHAT, "chosen": CHAT, "rejected": WRONG},
        {"messages": WRONG, "chosen": CHAT, "rejected": WRONG, "prompt": None},
        {"instruction": "1 + 1?", "output": "2", "chosen": CHAT, "rejected": WRONG},
        {"prompt": "", "chosen": CHAT, "rejected": WRONG},
        {
            "prompt": "1 + 1?",
            "chosen": [CHAT[0], CHAT[1] | {"weight": 1}],
            "rejected": [CHAT[0] | {"weight": 0}, WRONG[1]],
        },
    ],
)
def test_every_format_of_a_pair_becomes_two_conversations(row):
    assert to_pair(row) == (CHAT, WRONG)


TURNS = [
    {"role": "system", "content": "S"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, *CHAT
]  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TURNS[:4], "chosen": "2", "rejected": "3"},
        {"prompt": TURNS[:4], "chosen": TURNS, "rejected": [*TURNS[:4], WRONG[1]]},
        {"prompt": TURNS[1:4], "chosen": TURNS, "rejected": [*TURNS[:4], WRONG[1]]},
        {"prompt": TURNS[:4], "chosen": TURNS[1:], "rejected": [*TURNS[1:4], WRONG[1]]},
        {"prompt": TURNS[:3], "chosen": TURNS, "rejected": [*TURNS[:4], WRONG[1]]},  # up to an earlier answer
        {"prompt": "q", "chosen": TURNS, "rejected": [*TURNS[:4], WRONG[1]]},  # the first question alone
        {"prompt": "1 + 1?", "chosen": TURNS, "rejected": [*TURNS[:4], WRONG[1]]},  # the last question alone
        {"prompt": "q", "system": "S", "chosen": TURNS[1:], "rejected": [*TURNS[1:4], WRONG[1]]},
    ],
)
def test_the_common_beginning_of_a_prompt_and_whole_conversations_is_taken_once(row):
    assert to_pair(row) == (TURNS, [*TURNS[:4], WRONG[1]])


def test_pairs_of_the_commonest_public_layout_ask_once(tmp_path, tokenizer):
    folder = prepare_chats(CASES / "dpo_ultra.jsonl", DEMO_TOKENIZER, 128, tmp_path, kind="dpo")
    batch = PackedRows(folder).fetch([0])
    first, second = (slice(*batch["cu_seqlens"][n : n + 2]) for n in (0, 1))
    prompt = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for part, answer in ((first, "Red."), (second, "Seven.")):
        assert tokenizer.decode(batch["tokens"][part]) == f"{prompt}{answer}<|im_end|>\n"
        labels = batch["labels"][part]
        assert tokenizer.decode(labels[labels != IGNORE]) == f"{answer}<|im_end|>"


# ---- reading files ----


def test_missing_unknown_and_empty_data_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("")
    (tmp_path / "a").mkdir()
    for name, text in (("a.jsonl", "\r\n"), ("a.json", "[]"), ("a/b.jsonl", "")):
        (tmp_path / name).write_text(text)
    for path, message in (
        (tmp_path / "no", "does not exist"),
        (tmp_path / "a.yaml", "unknown kind"),
        (tmp_path / "a.jsonl", "a.jsonl holds no row; expected .*; fix: "),
        (tmp_path / "a.json", "a.json holds no row"),
        (tmp_path / "a", "a holds no row"),
    ):
        with pytest.raises(ValueError, match=message):
            list(read_rows(path))


# ---- questions ----


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1 + 1?", "id": 7},
        {"prompt": CHAT[:1]},
        {"messages": CHAT[:1]},
        {"conversations": [{"from": "human", "value": "1 + 1?"}], "prompt": None},
        {"instruction": "1 + 1?"},
        {"prompt": "1 + 1?", "messages": CHAT, "chosen": CHAT},
    ],
)
def test_a_row_of_prompts_is_a_text_or_a_conversation_to_continue(row):
    assert to_question(row) == CHAT[:1]
    system = {"role": "system", "content": "S"}
    assert to_question(row | {"system": "S"}) == [system, *CHAT[:1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, "empty turn"), ({"prompt": " \n"}, "empty turn"), ({"text": "x"}, "unknown format"),
        ({"messages": CHAT}, "ends in an answer"), ({"messages": []}, "there is no message"), ({"prompt": 5}, "messages is int"),
    ],
)  # fmt: skip
def test_a_row_that_asks_nothing_is_a_bad_row(row, message):
    with pytest.raises(BadRow) as caught:
        to_question(row)
    assert message in " ".join(caught.value.args)


def asked(*argv) -> list:
    return read_questions(jobs.parse("infer", list(map(str, argv))))


def test_prompts_of_text_and_of_json_ask_the_same_and_messages_are_continued(tokenizer, tmp_path):
    questions = asked("--prompts", CASES / "prompts.jsonl")
    question = [{"role": "user", "content": "Sort the digits: 52913"}]
    assert questions == [(f"{CASES / 'prompts.jsonl'}:{n}", question, None) for n in (1, 2)]
    texts = [messages[0]["content"] for _, messages, _ in asked("--prompts", CASES / "prompts_bom_u2028.txt")]
    assert texts == ["Sort the digits: 52913", "Sort the digits: 11111", "Sort the digits:\u202852913"]
    assert asked("--prompt", texts[0])[0][1:] == (question, None) == asked()[0][1:]
    path = write(tmp_path / "a.jsonl", [{"messages": [*CHAT, *question], "tools": [FUNCTION]}])
    [(where, messages, tools)] = asked("--prompts", path)
    assert messages == [*CHAT, *question] and tools == [FUNCTION]
    [text] = generate.render_questions(tokenizer, [(where, messages, None)], thinking=False)
    whole = Chat(tokenizer).render([*messages, {"role": "assistant", "content": "12359"}])
    assert whole == text + "12359<|im_end|>\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", ""], "--prompt: empty turn"),
        (["--prompt", " "], "--prompt: empty turn"),
        (["--prompt", "x", "--prompts", "FILE"], "--prompt and --prompts .*; expected one of them"),
        (["--prompts", "FILE"], "a.jsonl:2: no question, the conversation ends in an answer; expected"),
        (["--prompts", "TALK", "--no-chat"], "b.jsonl:1: a conversation with --no-chat; expected"),
        (["--prompts", "TOOLS"], "c.jsonl:1: bad row, tools.0. is int; expected"),
        (["--prompts", "LATIN"], "d.txt:2: the bytes e9"),
    ],
)
def test_a_prompt_that_asks_nothing_is_refused_by_its_line(argv, message, tmp_path):
    files = {
        "FILE": write(tmp_path / "a.jsonl", [{"prompt": "x"}, {"messages": CHAT}]),
        "TALK": write(tmp_path / "b.jsonl", [{"messages": [*CHAT, CHAT[0]]}]),
        "TOOLS": write(tmp_path / "c.jsonl", [{"prompt": "x", "tools": 5}]),
        "LATIN": tmp_path / "d.txt",
    }
    files["LATIN"].write_bytes(b"one\ncaf\xe9")
    with pytest.raises(ValueError, match=message + ".*; fix: ") as error:
        asked(*[files.get(word, word) for word in argv])
    assert "\n" not in str(error.value)


def test_a_conversation_that_the_template_refuses_is_named_by_its_line(tokenizer):
    messages = [*CHAT, {"role": "tool", "content": "x"}]
    with pytest.raises(ValueError, match="a.jsonl:3: refused by the template, .*tool.*; expected .*; fix: "):
        generate.render_questions(tokenizer, [("a.jsonl:3", messages, None)], thinking=False)


def test_train_on_reaches_sft_and_lora_and_is_refused_elsewhere():
    for job in ("sft", "lora"):
        assert jobs.parse("train", ["--job", job, "--train-on", "complete"]).train_on == "complete"
        assert jobs.parse("train", ["--job", job]).train_on == "all"
    for job in ("pretrain", "dpo"):
        with pytest.raises(ValueError, match="--train-on is of sft.sh and lora.sh.*; fix: "):
            jobs.parse("train", ["--job", job, "--train-on", "last"])


def test_train_on_of_the_options_decides_what_is_learnt(tmp_path, monkeypatch):
    monkeypatch.setattr(data.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(data.dist, "barrier", lambda: None)
    counts = []
    for train_on in ("all", "complete"):
        argv = ["--job", "sft", "--data", CASES / "think_multi.jsonl", "--cache", tmp_path, "--train-on", train_on]
        o = jobs.parse("train", [*map(str, argv), "--seq-len", "512"])
        rows = data.rows_of(o.data, o)
        counts.append(int((rows.fetch(range(len(rows)))["labels"] != IGNORE).sum()))
    assert counts[0] == counts[1] + 2  # "4" and the end of its turn


@pytest.mark.parametrize("job", ["sft", "dpo"])
def test_chats_that_are_empty_or_of_another_encoding_are_refused_with_the_options(job, tmp_path):
    for content, message in ((b"", "a.jsonl holds no row"), (b'{"a": "\xe9"}', "a.jsonl:1: the bytes e9")):
        (tmp_path / "a.jsonl").write_bytes(content)
        for flag in ("--data", "--validation"):
            with pytest.raises(ValueError, match=message + ".*; expected .*; fix: "):
                jobs.parse("train", ["--job", job, flag, str(tmp_path / "a.jsonl")])


def test_help_and_readme_list_the_keys_a_row_may_have(capsys):
    help_of = {}
    for script in ("train", "infer"):
        with pytest.raises(SystemExit):
            jobs.parse(script, ["--help"])
        help_of[script] = capsys.readouterr().out
    keys = ["messages", "conversations", "instruction", "input", "output", "history", "system", "tools", "prompt"]
    readme = (ROOT / "zoo" / "qwen3" / "README.md").read_text()
    for key in [*keys, "chosen", "rejected"]:
        assert re.search(rf"\b{key}\b", help_of["train"].split("  --data PATH")[1].split("  --max-drop")[0]), key
        assert f'"{key}":' in readme or f"`{key}`" in readme, key
    for key in ("prompt", "messages", "tools"):
        assert re.search(rf"\b{key}\b", help_of["infer"].split("  --prompts PATH")[1].split("  --out")[0]), key


# ---- packing ----


def test_packing_fills_rows_and_loses_nothing():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.0, 5000).astype(int), 1, 2048)
    rows = pack(lengths.tolist(), 2048)
    assert sorted(item for row in rows for item in row) == list(range(5000))
    used = [int(lengths[row].sum()) for row in rows]
    assert max(used) <= 2048 and sum(used) / (len(rows) * 2048) >= 0.99
    assert pack([5, 5, 5, 3, 3, 3, 2, 8], 8) == [[7], [0, 5], [1, 4], [2, 3], [6]]


def test_packing_takes_the_tightest_space_and_a_hundred_thousand_lengths_in_seconds():
    assert pack([6, 5, 3, 4], 10) == [[0, 3], [1, 2]]
    start = time.process_time()
    rows = pack(np.random.default_rng(1).integers(1, 30_000, 100_000).tolist(), 32_768)
    assert time.process_time() - start < 10 and len(rows) > 40_000


@pytest.fixture(scope="module")
def packed(demo, tmp_path_factory) -> PackedRows:
    cache = tmp_path_factory.mktemp("cache")
    return PackedRows(prepare_chats(demo / "sft" / "test.jsonl", DEMO_TOKENIZER, 512, cache))


def test_demo_conversations_fill_their_rows_and_come_back_bit_equal(demo, packed, tokenizer):
    chat = Chat(tokenizer)
    wanted = [chat.encode(row["messages"]) for row in lines(demo / "sft" / "test.jsonl")]
    conversations = []
    for row in range(len(packed)):
        batch = packed.fetch([row])
        assert batch["tokens"].shape == batch["labels"].shape == batch["positions"].shape == (512,)
        assert {batch[name].dtype for name in ("tokens", "labels", "positions")} == {torch.int64}
        bounds = batch["cu_seqlens"]
        assert bounds[0] == 0 and bounds[-1] == 512 and all(type(bound) is int for bound in bounds)
        for start, end in zip(bounds, bounds[1:], strict=False):
            assert batch["positions"][start:end].tolist() == list(range(end - start))
            tokens, labels = batch["tokens"][start:end], batch["labels"][start:end]
            if (tokens == packed.pad).all():
                assert end == 512 and (labels == IGNORE).all()
                continue
            assert labels[-1] == IGNORE  # the next token belongs to another conversation
            learnt_here = labels != IGNORE
            assert (labels[learnt_here] == tokens.roll(-1)[learnt_here]).all()
            conversations.append((tuple(tokens.tolist()), tuple((labels != IGNORE).tolist())))
    assert sorted(conversations) == sorted((tuple(t.tolist()), (*g[1:].tolist(), False)) for t, g in wanted)
    assert packed.fill >= 0.98  # 27 rows, the last of them a third full


def test_full_demo_is_packed_to_99_percent(demo, tmp_path):
    assert PackedRows(prepare_chats(demo / "sft" / "train.jsonl", DEMO_TOKENIZER, 512, tmp_path)).fill >= 0.99


def test_pairs_stay_together_and_only_the_last_answer_counts(demo, tmp_path, tokenizer):
    system = {"role": "system", "content": "S"}
    rows = [{"prompt": [system, *CHAT, CHAT[0]], "chosen": f"yes {i}", "rejected": f"no {i}" * 3} for i in range(40)]
    path = write(tmp_path / "pairs.jsonl", rows)
    packed = PackedRows(prepare_chats(path, DEMO_TOKENIZER, 512, tmp_path / "cache", kind="dpo"))
    answers = []
    for micro in ([i, (i + 1) % len(packed)] for i in range(len(packed))):
        batch = packed.fetch(micro)
        assert batch["cu_seqlens"][-1] == 1024 == len(batch["tokens"])
        for chosen in batch["pairs"]:
            spans = [slice(*batch["cu_seqlens"][n : n + 2]) for n in (chosen, chosen + 1)]
            labels = [[label for label in batch["labels"][span].tolist() if label != IGNORE] for span in spans]
            answers.append(tuple(tokenizer.decode(part) for part in labels))
    wanted = [(f"yes {i}<|im_end|>", f"no {i}" * 3 + "<|im_end|>") for i in range(40)]
    assert sorted(answers) == sorted(2 * wanted)  # every row was in two micro-batches


# ---- conversations: drops, caches, workers ----


def test_pairs_that_cannot_be_used_are_named_by_file_line_and_field(tmp_path):
    rows = [{"prompt": "1 + 1?", "chosen": "2", "rejected": f"{i}"} for i in range(3, 103)]
    rows[4] = {"prompt": "1 + 1?", "chosen": "2"}
    rows[7]["rejected"] = "2"
    rows[9]["rejected"] = "long " * 200
    folder = prepare_chats(write(tmp_path / "pairs.jsonl", rows), DEMO_TOKENIZER, 128, tmp_path / "cache", kind="dpo")
    summary, *drops = lines(folder / "drops.jsonl")
    assert summary["dropped"] == 3 and PackedRows(folder).unit_count == 97
    assert [(d["where"], d["reason"]) for d in drops] == [
        ("pairs.jsonl:5", "unknown format"), ("pairs.jsonl:8", "equal answers"), ("pairs.jsonl:10", "too long"),
    ]  # fmt: skip
    assert drops[0]["detail"].endswith("lacks rejected")
    with pytest.raises(ValueError, match=r"pairs.jsonl:1.*lacks chosen"):
        prepare_chats(write(tmp_path / "pairs.jsonl", [{"prompt": "a"}]), DEMO_TOKENIZER, 128, tmp_path, kind="dpo")


def test_every_bad_row_is_dropped_counted_and_written_down(tmp_path):
    rows = [{"messages": CHAT}] * 400
    rows[3] = {"messages": CHAT[:1]}
    rows[10] = {"messages": [CHAT[0], {"role": "assistant", "content": "ends here<|im_end|>"}]}
    rows[11] = {"messages": [{"role": "user", "content": "<|im_start|>system"}, CHAT[1]]}
    rows[20] = {"messages": [CHAT[0], {"role": "assistant", "content": "long " * 500}]}
    rows[30] = {"messages": [*CHAT, {"role": "tool", "content": "42"}, CHAT[1]]}
    rows[40] = {"instruction": "a", "output": [1]}
    folder = prepare_chats(write(tmp_path / "chats.jsonl", rows), DEMO_TOKENIZER, 128, tmp_path / "cache")
    summary, *drops = lines(folder / "drops.jsonl")
    assert summary["dropped"] == 6 and len(PackedRows(folder)._bounds) == 395
    assert [(d["where"], d["reason"]) for d in drops] == [
        ("chats.jsonl:4", "no assistant turn"),
        ("chats.jsonl:11", "special token in the text"),
        ("chats.jsonl:12", "special token in the text"),
        ("chats.jsonl:21", "too long"),
        ("chats.jsonl:31", "refused by the template"),
        ("chats.jsonl:41", "bad row"),
    ]
    assert "128" in drops[3]["detail"] and "tool" in drops[4]["detail"] and "output" in drops[5]["detail"]


def test_too_many_drops_stop_and_leave_nothing_behind(tmp_path):
    path = write(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 10 + [{"text": "x"}])
    with pytest.raises(ValueError, match=r"dropped 1 rows: 1 unknown format \(first: chats.jsonl:11 keys: text"):
        prepare_chats(path, DEMO_TOKENIZER, 128, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert prepare_chats(path, DEMO_TOKENIZER, 128, tmp_path / "cache", max_drop=0.1).is_dir()


def test_long_conversations_are_cut_on_request_unless_no_answer_is_left(tmp_path, tokenizer):
    rows = [
        {"messages": [CHAT[0], {"role": "assistant", "content": "long " * 500}]},
        {"messages": [{"role": "user", "content": "long " * 500}, CHAT[1]]},
    ]
    path = write(tmp_path / "chats.jsonl", rows)
    folder = prepare_chats(path, DEMO_TOKENIZER, 128, tmp_path / "cache", too_long="cut", max_drop=0.5)
    [[(tokens, labels)]] = PackedRows(folder).units(0)
    whole, _ = Chat(tokenizer).encode(rows[0]["messages"])
    assert tokens.tolist() == whole[:128].tolist() and (labels != IGNORE).sum() > 100
    assert lines(folder / "drops.jsonl")[1]["detail"] == "no answer in the first 128 tokens"


def test_workers_change_nothing_and_the_cache_serves_until_the_data_change(demo, tmp_path):
    path = demo / "sft" / "test.jsonl"
    one, two = (prepare_chats(path, DEMO_TOKENIZER, 256, tmp_path / str(n), workers=n) for n in (0, 2))
    assert one.name == two.name
    for name in ("tokens.bin", "generated.bin", "bounds.npy", "units.npy", "row_bounds.npy"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    before = (one / "tokens.bin").stat().st_mtime_ns
    assert prepare_chats(path, DEMO_TOKENIZER, 256, tmp_path / "0") == one
    assert (one / "tokens.bin").stat().st_mtime_ns == before
    assert prepare_chats(path, DEMO_TOKENIZER, 512, tmp_path / "0") != one
    copy = tmp_path / "chats.jsonl"
    copy.write_bytes(path.read_bytes())
    first = prepare_chats(copy, DEMO_TOKENIZER, 256, tmp_path / "0")
    write(copy, lines(copy)[:100])
    second = prepare_chats(copy, DEMO_TOKENIZER, 256, tmp_path / "0")
    assert len(PackedRows(second)._bounds) == 101 and len(PackedRows(first)._bounds) == 401


# ---- rows of documents ----


def indexed(prefix: Path, documents: list[list[int]]) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def numbered(tmp_path) -> tuple[Path, list[list[int]]]:
    """Writes 50 documents of 1 to 30 tokens. Document d holds d * 31 + 1, d * 31 + 2, …: a token tells its document."""
    rng = np.random.default_rng(0)
    documents = [[d * 31 + 1 + i for i in range(rng.integers(1, 31))] for d in range(50)]
    return indexed(tmp_path / "numbered", documents), documents


@pytest.mark.parametrize("ended", [False, True])
def test_stream_is_every_document_once_an_epoch_in_another_order(tmp_path, numbered, ended):
    prefix, documents = numbered
    if ended:
        prefix = indexed(tmp_path / "ended", [[*document, END] for document in documents])
    rows = TextRows(prefix, seq_len=16, eos=END, seed=3, separate_documents=False)
    assert rows.tokens_per_epoch == sum(map(len, documents)) + 50
    count = 3 * rows.tokens_per_epoch // 16
    sequences = [rows.row(number) for number in range(count)]
    stream = np.concatenate([tokens for [(tokens, _)] in sequences])
    labels = np.concatenate([labels for [(_, labels)] in sequences])
    assert (labels[:-1] == stream[1:]).all()
    epochs = []
    for epoch in range(2):
        part = stream[epoch * rows.tokens_per_epoch : (epoch + 1) * rows.tokens_per_epoch]
        split = np.split(part, np.flatnonzero(part == END) + 1)
        assert len(split.pop()) == 0
        epochs.append([document.tolist()[:-1] for document in split])
        assert sorted(epochs[-1]) == sorted(documents)
    assert epochs[0] != epochs[1]
    again = TextRows(prefix, 16, END, seed=3, separate_documents=False)
    assert (again.row(count - 1)[0][0] == sequences[-1][0][0]).all()
    assert (TextRows(prefix, 16, END, seed=4, separate_documents=False).row(0)[0][0] != stream[:16]).any()


def test_unshuffled_rows_are_the_documents_as_they_stand(numbered):
    prefix, documents = numbered
    rows = TextRows(prefix, 16, END, separate_documents=False, shuffle=False)
    wanted = [token for document in documents for token in (*document, END)]
    tokens = [token for number in range(len(rows)) for token in rows.row(number)[0][0].tolist()]
    assert tokens == wanted[: len(rows) * 16] and len(wanted) - len(tokens) <= 16


def test_separated_documents_see_and_predict_only_themselves(numbered):
    prefix, _ = numbered
    plain, separate = (TextRows(prefix, 16, END, seed=1, separate_documents=s) for s in (False, True))
    for number in range(0, 300, 2):
        a, b = (rows.fetch([number, number + 1]) for rows in (plain, separate))
        assert torch.equal(a["tokens"], b["tokens"]) and len(b["tokens"]) == 32
        assert a["cu_seqlens"] == [0, 16, 32] and a["positions"].tolist() == 2 * list(range(16))
        bounds = b["cu_seqlens"]
        assert bounds[0] == 0 and 16 in bounds and bounds[-1] == 32
        for start, end in zip(bounds, bounds[1:], strict=False):
            tokens, labels = b["tokens"][start:end].tolist(), b["labels"][start:end].tolist()
            assert b["positions"][start:end].tolist() == list(range(end - start))
            assert END not in tokens[:-1] and len({(t - 1) // 31 for t in tokens if t != END}) <= 1
            for token, label in zip(tokens, labels, strict=True):
                assert label == IGNORE if token == END else label in (END, token + 1)
        ends = b["tokens"] == END
        assert torch.equal(a["labels"][~ends], b["labels"][~ends])


def test_document_longer_than_a_row_goes_on_in_the_next(tmp_path):
    rows = TextRows(indexed(tmp_path / "long", [list(range(1, 100))]), 16, END, seed=0)
    batches = [rows.fetch([number]) for number in range(6)]
    assert torch.cat([batch["tokens"] for batch in batches]).tolist() == list(range(1, 97))
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == list(range(2, 98))
    assert rows.fetch([6])["cu_seqlens"] == [0, 4, 16]  # 97 98 99 END, then the next epoch


def test_bad_prefixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing.bin does not exist"):
        TextRows(tmp_path / "nothing.bin", 16, END)
    with pytest.raises(ValueError, match="holds no token"):
        TextRows(indexed(tmp_path / "empty", [[], []]), 16, END)
    with pytest.raises(ValueError, match="expected all or none"):
        TextRows(indexed(tmp_path / "mixed", [[5, END], [6]]), 16, END)
    rows = TextRows(indexed(tmp_path / "gap", [[5], [], [6]]), 4, END, shuffle=False)
    assert rows.row(0)[0][0].tolist() == [5, END] and rows.tokens_per_epoch == 4


# ---- steps ----


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name] for name in a
    )


@pytest.mark.parametrize("kind", ["documents", "conversations"])
def test_steps_after_a_resume_are_the_same_and_do_not_depend_on_ranks_or_workers(numbered, packed, kind):
    def steps(start: int, end: int, micro_batch: int = 2, dp_rank: int = 0, dp_size: int = 1, workers: int = 0):
        rows = TextRows(numbered[0], 16, END, seed=5) if kind == "documents" else PackedRows(packed.folder)
        seed = () if kind == "documents" else (5,)
        sampler = rows.sampler(8, micro_batch, dp_rank, dp_size, *seed)
        return [step.micro_batches for step in prefetch(rows, sampler, start, end, workers)]

    whole = steps(0, 30)
    for resumed in (steps(17, 30), steps(17, 30, workers=2)):
        for a, b in zip(whole[17:], resumed, strict=True):
            assert all(equal(x, y) for x, y in zip(a, b, strict=True))
    tokens = [[micro["tokens"].tolist() for micro in step] for step in whole]
    assert len({tuple(map(tuple, step)) for step in tokens}) == 30
    size = 16 if kind == "documents" else 512
    slots = [sum(step, []) for step in tokens]
    by_rank = [steps(0, 30, micro_batch=1, dp_rank=rank, dp_size=4) for rank in range(4)]
    for step in range(30):
        parts = [by_rank[slot % 4][step][slot // 4]["tokens"].tolist() for slot in range(8)]
        assert sum(parts, []) == slots[step] and len(slots[step]) == 8 * size


# ---- preprocess ----


def options(path: Path, **changes) -> PreprocessOptions:
    o = PreprocessOptions(data=path, **{"workers": 0, "out": path.parent / "out" / "text"} | changes)
    return preprocess.check(o, VOCABULARY, DEMO)


def documents_of(prefix: Path, tokenizer) -> list[str]:
    dataset = IndexedDataset(str(prefix))
    assert len(dataset) == len(dataset.document_indices) - 1
    assert all(document[-1] == END for document in dataset)
    return [tokenizer.decode(document[:-1].astype(int)) for document in dataset]


def test_demo_text_goes_through_preprocessing_and_back(demo, tmp_path, tokenizer):
    o = options(demo / "text" / "validation.jsonl", out=tmp_path / "new" / "validation")
    summary = preprocess.run(o, VOCABULARY)
    texts = [row["text"] for row in lines(o.data)]
    assert documents_of(o.out, tokenizer) == texts
    assert summary["documents"] == len(texts) and summary["dropped"] == {}
    assert summary["tokens"] == sum(IndexedDataset(str(o.out)).sequence_lengths) < sum(map(len, texts)) / 2.5
    assert IndexedDataset(str(o.out)).index.dtype == np.uint16
    assert sorted(file.name for file in o.out.parent.iterdir()) == [
        "validation.bin", "validation.drops.jsonl", "validation.idx", "validation.meta.json",
    ]  # fmt: skip
    rows = TextRows(o.out, 128, END)
    assert rows.tokens_per_epoch == summary["tokens"]


FORMATS = {
    "a.jsonl": '{"text": "one\\nline"}\n\n{"text": "two", "id": 5}\n',
    "a.json": '[{"text": "one\\nline"},\n {"text": "two"}]',
    "a.csv": 'id,text\n1,"one\nline"\n2,two\n',
    "a.txt": "\n\none\nline\n\n \n\ntwo\n",
}


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents_whatever_ends_its_lines(tmp_path, tokenizer, name, end, start):
    (tmp_path / name).write_bytes((start + FORMATS[name].replace("\n", end)).encode())
    o = options(tmp_path / name)
    preprocess.run(o, VOCABULARY)
    assert documents_of(o.out, tokenizer) == ["one\nline", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_documents_keep_what_other_readers_take_for_line_ends(tmp_path, tokenizer, name):
    text = "one\u2028two\x85three"
    row = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / name).write_text({"a.txt": text, "a.jsonl": row, "a.json": f"[{row}]", "a.csv": f"text\n{text}"}[name])
    o = options(tmp_path / name)
    preprocess.run(o, VOCABULARY)
    assert documents_of(o.out, tokenizer) == [text]


def test_documents_that_cannot_be_read_are_dropped_and_long_ones_are_not(tmp_path, tokenizer):
    rows = ['{"text": "one"}', DEEP, f'{{"text": "x", "n": {"9" * 5000}}}', '{"text": "two"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b.json").write_text("[" + ",\n".join(rows) + "]")
    (tmp_path / "c.csv").write_text(f"text\n{'long ' * 30_000}\n1\r2\n")
    for name, drops, count in (
        ("a.jsonl", {"unreadable JSON": 2}, 2), ("b.json", {"unreadable JSON": 2}, 2), ("c.csv", {"malformed CSV": 1}, 1),
    ):  # fmt: skip
        o = options(tmp_path / name, max_drop=0.5)
        summary = preprocess.run(o, VOCABULARY)
        assert summary["dropped"] == drops and summary["documents"] == count
        assert lines(o.out.with_name("text.drops.jsonl"))[1]["where"] == f"{name}:{3 if count == 1 else 2}"
    assert documents_of(o.out, tokenizer) == ["long " * 30_000]


def test_folder_is_read_in_the_order_of_names_and_another_field_is_taken(tmp_path, tokenizer):
    (tmp_path / "corpus" / "b").mkdir(parents=True)
    write(tmp_path / "corpus" / "c.jsonl", [{"body": "third"}])
    write(tmp_path / "corpus" / "b" / "x.jsonl", [{"body": "second"}])
    write(tmp_path / "corpus" / "a.jsonl", [{"body": "first"}])
    o = options(tmp_path / "corpus", field="body", out=None)
    assert o.out == tmp_path / "corpus"
    preprocess.run(o, VOCABULARY)
    assert documents_of(o.out, tokenizer) == ["first", "second", "third"]
    with pytest.raises(ValueError, match="is inside --data"):
        options(tmp_path / "corpus", out=tmp_path / "corpus" / "out")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".stream.arrow"])
def test_arrow_tables_are_read_with_pyarrow(tmp_path, tokenizer, suffix):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path, table = tmp_path / f"a{suffix}", pyarrow.table({"id": [1, 2, 3], "text": ["one\nline", None, "two"]})
    if suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        new = pyarrow.ipc.new_stream if "stream" in suffix else pyarrow.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
    o = options(path, max_drop=0.5)
    assert preprocess.run(o, VOCABULARY)["dropped"] == {"no text": 1}
    assert documents_of(o.out, tokenizer) == ["one\nline", "two"]
    with pytest.raises(ValueError, match="has the columns id, text; expected 'body'"):
        preprocess.run(replace(o, field="body"), VOCABULARY)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_arrow_tables_without_pyarrow_name_the_package(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="needs the package pyarrow"):
        options(tmp_path / name)


def test_names_of_special_tokens_in_a_text_are_text(tmp_path, tokenizer):
    text = "a <|endoftext|> b <|im_end|>"
    o = options(write(tmp_path / "a.jsonl", [{"text": text}]))
    preprocess.run(o, VOCABULARY)
    dataset = IndexedDataset(str(o.out))  # keeps the memory map open that its arrays view
    document = dataset[0]
    assert (document == END).sum() == 1 and tokenizer.decode(document[:-1].astype(int)) == text


def test_every_bad_text_is_dropped_counted_and_written_down(tmp_path, tokenizer):
    good = [f'{{"text": "document {i}"}}' for i in range(200)]
    bad = ['{"text": ', '{"body": "x"}', '{"text": 5}', '{"text": " \\n"}', "[1]", '{"text": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(good[:100] + bad + good[100:]))
    o = options(tmp_path / "a.jsonl")
    assert preprocess.run(o, VOCABULARY, shard_size=1000)["dropped"] == {
        "no text": 2, "bad row": 2, "malformed JSON": 1, "empty text": 1,
    }  # fmt: skip
    assert len(documents_of(o.out, tokenizer)) == 200
    summary, *drops = lines(o.out.with_name("text.drops.jsonl"))
    assert summary["dropped"] == 6
    assert [drop["where"] for drop in drops] == [f"a.jsonl:{line}" for line in range(101, 107)]
    assert "body" in drops[1]["detail"] and "text is int" in drops[2]["detail"]


def test_shard_of_nothing_but_bad_rows_is_an_empty_one(tmp_path, tokenizer):
    o = options(write(tmp_path / "a.jsonl", [{"text": "first"}, {}, {"text": "second"}, {}]), max_drop=0.5)
    assert preprocess.run(o, VOCABULARY, shard_size=1)["documents"] == 2
    assert documents_of(o.out, tokenizer) == ["first", "second"]


def test_too_many_bad_texts_stop_and_early_in_a_long_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}] * 8 + [{"txt": "x"}] * 2)
    with pytest.raises(
        ValueError, match="dropped 2 rows: 2 no text .*first: a.jsonl:9 no 'text', keys: txt.*--max-drop"
    ):
        preprocess.run(options(path), VOCABULARY)
    assert not (tmp_path / "out" / "text.idx").exists()
    monkeypatch.setattr(preprocess, "FEW", 100)
    read = []
    monkeypatch.setattr(preprocess, "read_records", lambda *a: ((i, read.append(i) or {}) for i in range(10_000)))
    with pytest.raises(ValueError, match="dropped"):
        preprocess.run(options(path), VOCABULARY, shard_size=100)
    assert len(read) < 200


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,body\n1,x\n", "the header has id, body; expected 'text'; fix: --field"),
        ("a.csv", b"", "the header has nothing"),
        ("a.csv", b"text\n\xff\xff\n", "a.csv:2: the bytes ff ff .*; expected UTF-8"),
        ("a.csv", b'text\nx\n"y\n', "a.csv:3: a quote is opened and never closed"),
        ("a.txt", b"one\n\xff\xff", "a.txt:2: the bytes ff ff .*; expected UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl:1: the bytes e9 .*; expected UTF-8"),
        ("a.json", b'{"text": "x"}', "a.json:1: malformed JSON"),
        ("a.txt", b"\n\n", "a.txt holds no document; expected .*; fix: --data"),
        ("a.jsonl", b"", "a.jsonl holds no document"),
    ],
)
def test_unreadable_file_is_an_error_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        preprocess.run(options(tmp_path / name), VOCABULARY)


def test_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match="token ids up to 2047, the model .* vocabulary of 2047"):
        preprocess.check(PreprocessOptions(data=path), VOCABULARY - 1, DEMO)
    with pytest.raises(ValueError, match="no token '<eos>'"):
        preprocess.check(PreprocessOptions(data=path, end="<eos>"), VOCABULARY, DEMO)
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        preprocess.check(PreprocessOptions(data=path, tokenizer=tmp_path), VOCABULARY, DEMO)
    with pytest.raises(ValueError, match="does not exist"):
        preprocess.check(PreprocessOptions(data=tmp_path / "b.jsonl"), VOCABULARY, DEMO)


def test_options_come_from_the_command_line(tmp_path):
    argv = ["--data", "a.jsonl", "--workers", "3", "--max-drop", "0.1", "--out", "x/y"]
    o = cli.parse_options(PreprocessOptions, argv, "", tmp_path, str)
    assert o == PreprocessOptions(data=Path("a.jsonl"), workers=3, max_drop=0.1, out=Path("x/y"))
    with pytest.raises(ValueError, match="workers=-1; expected a number in"):
        cli.parse_options(PreprocessOptions, ["--workers", "-1"], "", tmp_path, str)


def test_workers_and_a_second_run_change_nothing_but_other_data_do(demo, tmp_path):
    source = demo / "text" / "validation.jsonl"
    results = {}
    for workers in (0, 2):
        o = options(source, out=tmp_path / str(workers) / "text", workers=workers)
        preprocess.run(o, VOCABULARY, shard_size=13_000)
        results[workers] = [o.out.with_name(f"text{suffix}").read_bytes() for suffix in (".bin", ".idx")]
    assert results[0] == results[2]
    before = o.out.with_name("text.bin").stat().st_mtime_ns
    preprocess.run(o, VOCABULARY, shard_size=13_000)
    assert o.out.with_name("text.bin").stat().st_mtime_ns == before
    summary = preprocess.run(replace(o, data=write(tmp_path / "b.jsonl", [{"text": "other"}])), VOCABULARY)
    assert summary["documents"] == 1 == len(IndexedDataset(str(o.out)))


KILLED = """
import sys, time, pathlib
import common.device
from common.language import preprocess
from zoo.qwen3.options import DEMO, PreprocessOptions
write = preprocess._write_shard
def slowly(base, *rest):
    if int(base.name) >= 3:
        (base.parent / f".{base.name}.half.bin").write_bytes(b"half")
        time.sleep(600)
    return write(base, *rest)
preprocess._write_shard = slowly
o = PreprocessOptions(data=pathlib.Path(sys.argv[1]), out=pathlib.Path(sys.argv[2]), workers=2)
preprocess.run(preprocess.check(o, 2048, DEMO), 2048, shard_size=13_000)
"""


def test_killed_run_keeps_its_finished_shards_and_ends_like_an_unbroken_one(demo, tmp_path):
    source, out = demo / "text" / "validation.jsonl", tmp_path / "out" / "text"
    process = subprocess.Popen([sys.executable, "-c", KILLED, source, out], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(out.parent.glob("text.parts/*/.00000*.half.bin"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(pid) for pid in children.read_text().split()] if children.is_file() else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    [parts] = out.parent.glob("text.parts/*")
    finished = {file: file.stat().st_mtime_ns for file in sorted(parts.glob("00000[012].*"))}
    assert len(finished) == 9 and not (out.parent / "text.idx").exists()
    redone = []
    write_shard = preprocess._write_shard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "_publish", lambda shards, *rest: redone.extend(shards))
        o = options(source, out=out)
        preprocess.run(o, VOCABULARY, shard_size=13_000)
    assert write_shard is preprocess._write_shard and len(redone) > 5
    assert {file: file.stat().st_mtime_ns for file in finished} == finished, "finished shards were made again"
    assert not list(parts.glob(".*"))
    preprocess.run(o, VOCABULARY, shard_size=13_000)
    whole = options(source, out=tmp_path / "whole" / "text")
    preprocess.run(whole, VOCABULARY, shard_size=13_000)
    for suffix in (".bin", ".idx"):
        assert out.with_name(f"text{suffix}").read_bytes() == whole.out.with_name(f"text{suffix}").read_bytes()
    assert not out.with_name("text.parts").exists()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") and "Z" not in state(pid) for pid in workers):
        assert time.monotonic() < deadline, "the workers of a killed run live on"
        time.sleep(0.1)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_killed_while_joining_leaves_no_index_without_its_tokens(demo, tmp_path, monkeypatch):
    o = options(write(tmp_path / "a.jsonl", [{"text": "first"}]))
    preprocess.run(o, VOCABULARY)
    write(o.data, [{"text": "second"}, {"text": "third"}])
    monkeypatch.setattr(DropReport, "save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        preprocess.run(o, VOCABULARY)
    assert len(IndexedDataset(str(o.out))) == 1  # still the first data set, complete
    monkeypatch.undo()
    assert preprocess.run(o, VOCABULARY)["documents"] == 2 == len(IndexedDataset(str(o.out)))
