"""The data path of Qwen3: preprocessing, rows of documents, conversations and pairs, and the demo that feeds them."""

from __future__ import annotations

import json
import os
import random
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
from common.data import DropReport, prefetch
from zoo.qwen3 import data, preprocess
from zoo.qwen3.data import IGNORE, BadRow, Chat, PackedRows, TextRows, pack, prepare_chats, to_chat, to_pair
from zoo.qwen3.demo import make_data
from zoo.qwen3.preprocess import DEMO_TOKENIZER, PreprocessOptions

pytestmark = pytest.mark.L2

ROOT = Path(__file__).parents[1]
VOCABULARY = 2048
END = 0  # <|endoftext|>
CASES = ROOT / "tests" / "cases" / "qwen3"
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
    train, held = (lines(tmp_path / "text" / f"{split}.jsonl") for split in ("train", "validation"))
    assert [train, held] == [lines(demo / "text" / f"{split}.jsonl") for split in ("train", "validation")]
    texts = [row["text"] for row in train + held]
    assert len(texts) == len(set(texts)) > 2000 and min(map(len, texts)) >= 100 and sum(map(len, texts)) > 800_000
    assert 0.03 < len(held) / len(texts) < 0.07


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
    """Qwen3's format restated: pieces of text, and whether the assistant generates them."""
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
    """Turns of any order a chat may have, texts that look like the template's own, thoughts in both spellings."""
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
    """What is trained continues what inference will feed, with real thoughts and without any."""
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
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = template
    return other


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


# ---- rows to messages ----

CHAT = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


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
    ],
)
def test_every_format_of_a_pair_becomes_two_conversations(row):
    assert to_pair(row) == (CHAT, [CHAT[0], {"role": "assistant", "content": "3"}])


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
            list(data.read_rows(path))


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
    seen = []
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
            assert labels[-1] == IGNORE  # the next token is another conversation's
            kept = labels != IGNORE
            assert (labels[kept] == tokens.roll(-1)[kept]).all()
            seen.append((tuple(tokens.tolist()), tuple((labels != IGNORE).tolist())))
    assert sorted(seen) == sorted((tuple(t.tolist()), (*g[1:].tolist(), False)) for t, g in wanted)
    assert packed.fill >= 0.98  # 27 rows, the last of them a third full


def test_full_demo_is_packed_to_99_percent(demo, tmp_path):
    assert PackedRows(prepare_chats(demo / "sft" / "train.jsonl", DEMO_TOKENIZER, 512, tmp_path)).fill >= 0.99


def test_pairs_stay_together_and_only_the_last_answer_counts(demo, tmp_path, tokenizer):
    system = {"role": "system", "content": "S"}
    rows = [{"prompt": [system, *CHAT, CHAT[0]], "chosen": f"yes {i}", "rejected": f"no {i}" * 3} for i in range(40)]
    path = write(tmp_path / "pairs.jsonl", rows)
    packed = PackedRows(prepare_chats(path, DEMO_TOKENIZER, 512, tmp_path / "cache", kind="dpo"))
    said = []
    for micro in ([i, (i + 1) % len(packed)] for i in range(len(packed))):
        batch = packed.fetch(micro)
        assert batch["cu_seqlens"][-1] == 1024 == len(batch["tokens"])
        for chosen in batch["pairs"]:
            spans = [slice(*batch["cu_seqlens"][n : n + 2]) for n in (chosen, chosen + 1)]
            labels = [[label for label in batch["labels"][span].tolist() if label != IGNORE] for span in spans]
            said.append(tuple(tokenizer.decode(part) for part in labels))
    wanted = [(f"yes {i}<|im_end|>", f"no {i}" * 3 + "<|im_end|>") for i in range(40)]
    assert sorted(said) == sorted(2 * wanted)  # every row was in two micro-batches


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
    """50 documents of 1 to 30 tokens; document d holds d * 31 + 1, d * 31 + 2, …, so a token says where it is from."""
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
    found = [token for number in range(len(rows)) for token in rows.row(number)[0][0].tolist()]
    assert found == wanted[: len(rows) * 16] and len(wanted) - len(found) <= 16


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
    found = [rows.fetch([number]) for number in range(6)]
    assert torch.cat([batch["tokens"] for batch in found]).tolist() == list(range(1, 97))
    assert torch.cat([batch["labels"] for batch in found]).tolist() == list(range(2, 98))
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
    return preprocess.checked(o, VOCABULARY)


def documents_of(prefix: Path, tokenizer) -> list[str]:
    found = IndexedDataset(str(prefix))
    assert len(found) == len(found.document_indices) - 1
    assert all(document[-1] == END for document in found)
    return [tokenizer.decode(document[:-1].astype(int)) for document in found]


def test_demo_text_goes_through_preprocessing_and_back(demo, tmp_path, tokenizer):
    o = options(demo / "text" / "validation.jsonl", out=tmp_path / "new" / "validation")
    found = preprocess.run(o, VOCABULARY)
    texts = [row["text"] for row in lines(o.data)]
    assert documents_of(o.out, tokenizer) == texts
    assert found["documents"] == len(texts) and found["dropped"] == {}
    assert found["tokens"] == sum(IndexedDataset(str(o.out)).sequence_lengths) < sum(map(len, texts)) / 2.5
    assert IndexedDataset(str(o.out)).index.dtype == np.uint16
    assert sorted(file.name for file in o.out.parent.iterdir()) == [
        "validation.bin", "validation.drops.jsonl", "validation.idx", "validation.meta.json",
    ]  # fmt: skip
    rows = TextRows(o.out, 128, END)
    assert rows.tokens_per_epoch == found["tokens"]


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
        found = preprocess.run(o, VOCABULARY)
        assert found["dropped"] == drops and found["documents"] == count
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
    found = IndexedDataset(str(o.out))  # its arrays are views of a map that goes with it
    document = found[0]
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
        preprocess.checked(PreprocessOptions(data=path), VOCABULARY - 1)
    with pytest.raises(ValueError, match="no token '<eos>'"):
        preprocess.checked(PreprocessOptions(data=path, end="<eos>"), VOCABULARY)
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        preprocess.checked(PreprocessOptions(data=path, tokenizer=tmp_path), VOCABULARY)
    with pytest.raises(ValueError, match="does not exist"):
        preprocess.checked(PreprocessOptions(data=tmp_path / "b.jsonl"), VOCABULARY)


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
    found = preprocess.run(replace(o, data=write(tmp_path / "b.jsonl", [{"text": "other"}])), VOCABULARY)
    assert found["documents"] == 1 == len(IndexedDataset(str(o.out)))


KILLED = """
import sys, time, pathlib
import common.device
from zoo.qwen3 import preprocess
write = preprocess._write_shard
def slowly(base, *rest):
    if int(base.name) >= 3:
        (base.parent / f".{base.name}.half.bin").write_bytes(b"half")
        time.sleep(600)
    return write(base, *rest)
preprocess._write_shard = slowly
o = preprocess.PreprocessOptions(data=pathlib.Path(sys.argv[1]), out=pathlib.Path(sys.argv[2]), workers=2)
preprocess.run(preprocess.checked(o, 2048), 2048, shard_size=13_000)
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
    kept = {file: file.stat().st_mtime_ns for file in sorted(parts.glob("00000[012].*"))}
    assert len(kept) == 9 and not (out.parent / "text.idx").exists()
    redone = []
    write_shard = preprocess._write_shard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "_publish", lambda shards, *rest: redone.extend(shards))
        o = options(source, out=out)
        preprocess.run(o, VOCABULARY, shard_size=13_000)
    assert write_shard is preprocess._write_shard and len(redone) > 5
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "finished shards were made again"
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
    assert len(IndexedDataset(str(o.out))) == 1  # still the first one, whole
    monkeypatch.undo()
    assert preprocess.run(o, VOCABULARY)["documents"] == 2 == len(IndexedDataset(str(o.out)))
