"""Tokens for Qwen3: documents, conversations or preference pairs -> rows of seq_len -> micro-batches.

    rows = TextRows("data/qwen3-demo/text/train", seq_len=512, eos=0, seed=0)
    rows = PackedRows(prepare_chats("chats.jsonl", "Qwen3-8B", seq_len=4096, cache="data/cache"))
    for step in prefetch(rows, rows.sampler(8, 1, dp_rank, dp_size, seed=0), start_step, end_step):
        train(step.micro_batches)

Pretraining reads a megatron-core indexed data set (PREFIX.bin, PREFIX.idx; `preprocess.py` writes one), one document per
sequence. The documents of an epoch, shuffled, stand end to end with an end-of-text token after each; row r is tokens
r * seq_len … of that endless stream, so a run's place in the data is (seed, rows consumed) and is found again by
arithmetic. Nothing is dropped or padded; a document is cut where a row ends. With `separate_documents` no token sees
another document, and none is asked to predict the first token of one. Cost: 16 bytes of memory per document and process.

Conversations and pairs (`--data`), .jsonl or .json, a file or a folder of them; other keys are ignored; `tools` and
`tool_calls` may be JSON texts:

    {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "…", "history": [["q", "a"]]}    Alpaca
    {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}             ShareGPT
    {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}         OpenAI
    {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}      a pair; text or messages, or any of the above as the prompt

`chosen` and `rejected` may be answers or whole conversations, with which a prompt beside them must agree; the beginning
that they share is taken once.

The tokenizer's own template renders them, and the loss is on what the assistant generates: from where the prompt for a
generation ends (so the empty thoughts that `enable_thinking=False` puts there are no target, real thoughts are) through
the token that closes the turn. What follows the last answer is cut off. Of a conversation `--train-on` chooses all
answers, the last one, or the complete ones, whose thoughts the template does not leave out; an answer with `"weight": 0`,
`"loss": false` or `"train": false` is never learnt. In a pair only the last answer counts.
Packing rule: best fit decreasing, so whole conversations fill rows of seq_len (99 % and more where there are short ones);
the rest of a row is padding, a sequence of its own without loss. A pair shares a row. One longer than a row is dropped
and counted, or cut (`too_long`).

Reading and checking data works without torch.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from common import processes
from common.data import BucketSampler, DropReport, partial_name
from common.records import BadRow, parse_json, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # label of a token that predicts nothing
DOCUMENT_END = "<|endoftext|>"
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "tool": "tool", "observation": "tool",
}  # fmt: skip
BATCH = 64  # rows a worker tokenizes at a time


# ---- the user's files ----


def list_files(path: str | Path, suffixes: Sequence[str]) -> list[Path]:
    """The file, or the files of those kinds anywhere under the folder, sorted.

    Raises:
        ValueError: missing, of another kind, or an empty folder.
    """
    path, kinds = Path(path), ", ".join(suffixes)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
        if not files:
            raise ValueError(f"{path} holds no data file; expected {kinds}; fix: --data")
        return files
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a file ({kinds}) or a folder of them; fix: --data")
    if path.suffix not in suffixes:
        raise ValueError(f"unknown kind of file: {path}; expected {kinds}; fix: --data")
    return [path]


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(file:line, row, or BadRow) of .jsonl and .json files.

    Raises:
        ValueError: malformed, or not UTF-8, which names file and line; or there is no row at all.
    """
    found = False
    for file in list_files(path, (".jsonl", ".json")):
        for line, row in read_json(file):
            found = True
            yield f"{file.name}:{line}", row
    if not found:
        raise ValueError(f"{path} holds no row; expected an object per line; fix: {path}")


# ---- rows to messages ----


def to_messages(row: Any) -> list[dict]:
    """Alpaca, ShareGPT or OpenAI -> [{"role", "content", …}, …], the roles as they stand.

    Raises:
        BadRow: which field is not what it should be.
    """
    if not isinstance(row, dict):
        raise BadRow("bad row", f"{str(row)[:40]!r}; expected an object")
    row = {key: value for key, value in row.items() if value is not None}  # parquet has every key in every row
    field = next((f for f in ("messages", "conversations") if f in row), None)
    if field:
        if not isinstance(row[field], list):
            raise BadRow("bad row", f"{field} is {type(row[field]).__name__}; expected a list")
        messages = [_message(turn, f"{field}[{i}]") for i, turn in enumerate(row[field])]
    elif "instruction" in row:
        history = row.get("history") or []
        if not isinstance(history, list) or not all(isinstance(h, list) and len(h) == 2 for h in history):
            raise BadRow("bad row", "history; expected a list of [question, answer]")
        texts = [(text, "history") for pair in history for text in pair]
        question = "\n".join(_text(row[f], f) for f in ("instruction", "input") if row.get(f))
        texts += [(question, "instruction")] + ([(row["output"], "output")] if "output" in row else [])
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": next(roles), "content": _text(text, name)} for text, name in texts]
    else:
        raise BadRow("unknown format", f"keys: {', '.join(row)}; expected messages, conversations or instruction")
    if row.get("system") and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": _text(row["system"], "system")})
    return messages


def _text(value: Any, field: str) -> str:
    """Text, or the joined text parts of OpenAI's list form; without lone surrogates, on which a tokenizer stops."""
    if isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadRow("bad row", f"{field} is {type(value).__name__}; expected text")
    return value.encode(errors="replace").decode()


def _message(turn: Any, field: str) -> dict:
    """A turn as {"role", "content"}, with "reasoning_content" and "tool_calls" where it has them, and "train": False on an
    answer that is not to be learnt."""
    if not isinstance(turn, dict):
        raise BadRow("bad row", f"{field} is {type(turn).__name__}; expected an object")
    turn = {key: value for key, value in turn.items() if value is not None}
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow("unknown role", f"{field} has role {role!r}; expected {', '.join(ROLES)}")
    calls = _read_calls(turn.get("tool_calls"), f"{field}.tool_calls")
    content = turn.get("content", turn.get("value", "" if calls else None))
    message = {"role": ROLES[role], "content": _text(content, f"{field}.content")}
    if turn.get("reasoning_content"):
        message["reasoning_content"] = _text(turn["reasoning_content"], f"{field}.reasoning_content")
    if calls:
        message["tool_calls"] = calls
    if message["role"] == "assistant" and not _is_learnt(turn, field):
        message["train"] = False
    return message


def _is_learnt(turn: dict, field: str) -> bool:
    """What an answer says of itself, in the words of OpenAI (weight), ms-swift (loss) or Axolotl (train, training)."""
    if turn.get("train_detail"):
        raise BadRow("bad row", f"{field}.train_detail chooses parts of an answer; expected train, true or false")
    for key in ("weight", "loss", "train", "training"):
        if turn.get(key, 1) not in (0, 1):
            raise BadRow("bad row", f"{field}.{key} is {turn[key]!r}; expected 0 or 1, false or true")
    return all(turn.get(key, 1) for key in ("weight", "loss", "train", "training"))


def _from_json(value: Any, field: str) -> Any:
    """What a JSON text holds (None: nothing); anything else as it stands."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise BadRow("malformed JSON", f"{field}: {error.msg}") from error


def _read_objects(value: Any, field: str) -> list[dict]:
    """The objects of a list, of one object, or of JSON texts of either."""
    value = _from_json(value, field)
    items = value if isinstance(value, list) else [value] if value else []
    items = [_from_json(item, f"{field}[{i}]") for i, item in enumerate(items)]
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise BadRow("bad row", f"{field}[{i}] is {type(item).__name__}; expected an object")
    return items


def _read_calls(value: Any, field: str) -> list[dict]:
    """Calls whose arguments are an object each, which templates print as they like; empty if there are none."""
    calls = []
    for i, call in enumerate(_read_objects(value, field)):
        function = call.get("function") or call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("bad row", f"{field}[{i}] names no function")
        arguments = _from_json(function.get("arguments"), f"{field}[{i}].arguments")
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            raise BadRow("bad row", f"{field}[{i}].arguments is {type(arguments).__name__}; expected an object")
        function = function | {"arguments": arguments}
        calls.append(call | {"function": function} if call.get("function") else function)
    return calls


def to_tools(row: dict) -> list[dict] | None:
    """The functions that the assistant may call. BadRow: they are no objects."""
    return _read_objects(row.get("tools"), "tools") or None


def to_chat(row: Any) -> list[dict]:
    """The messages of a conversation to learn from, up to its last answer. BadRow: there is none, or no question."""
    messages = to_messages(row)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise BadRow("no assistant turn", f"keys: {', '.join(row)}")
    for i, message in enumerate(messages):
        if message["role"] == "system" and i:
            raise BadRow("bad row", f"message {i} is a system message; expected it first")
        if not message["content"].strip() and not message.get("tool_calls"):
            raise BadRow("empty turn", f"message {i}, of {message['role']}")
    if next(m["role"] for m in messages if m["role"] != "system") != "user":
        raise BadRow("no question", "the first turn is not the user's")
    return messages


def to_question(row: Any) -> list[dict]:
    """The messages of a conversation to continue; a text or messages under `prompt`, or any format. BadRow: what is wrong."""
    messages = _prompt_messages(row)
    if not messages or messages[-1]["role"] == "assistant":
        raise BadRow("no question", "the conversation ends in an answer" if messages else "there is no message")
    if not messages[-1]["content"].strip():
        raise BadRow("empty turn", f"message {len(messages) - 1}, of {messages[-1]['role']}")
    return messages


def _prompt_messages(row: Any) -> list[dict]:
    """The messages under `prompt`, or of any format."""
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if prompt is None:
        return to_messages(row)
    key = "instruction" if isinstance(prompt, str) else "messages"
    return to_messages({key: prompt, "system": row.get("system")})


def to_pair(row: Any) -> tuple[list[dict], list[dict]]:
    """A preference pair -> (conversation ending in the chosen answer, in the rejected one). BadRow: what is wrong."""
    if not isinstance(row, dict):
        raise BadRow("bad row", f"{str(row)[:40]!r}; expected an object")
    if lacking := [side for side in ("chosen", "rejected") if side not in row]:
        raise BadRow("unknown format", f"keys: {', '.join(row)}; expected chosen and rejected, lacks {lacking[0]}")
    given = {key: value for key, value in row.items() if value and key != "output"}
    prompts = {"prompt", "messages", "conversations", "instruction"} & set(given)
    # without one chosen and rejected are whole conversations
    asked = _without_flags(_prompt_messages(given)) if prompts else []
    sides = {}
    for side in ("chosen", "rejected"):
        answer = row[side] if isinstance(row[side], list) else [row[side]]
        turns = [{"role": "assistant", "content": a} if isinstance(a, str) else a for a in answer]
        sides[side] = [_message(turn, f"{side}[{i}]") for i, turn in enumerate(turns)]
        if not turns or sides[side][-1]["role"] != "assistant":
            raise BadRow("no assistant turn", f"{side} does not end in one")
    if asked in map(_without_flags, sides.values()):
        asked = asked[:-1]  # the messages beside the pair are one of its conversations
    pair = []
    for side, turns in sides.items():
        chat = to_chat({"messages": _join(asked, turns, side, isinstance(given.get("prompt"), str))})
        if len(chat) > 1 and chat[-2]["role"] == "assistant":
            raise BadRow("answer before the answer", f"message {len(chat) - 2} of {side} is the assistant's")
        pair.append(chat)
    if _without_flags(pair[0][:-1]) != _without_flags(pair[1][:-1]):
        raise BadRow("bad row", "chosen and rejected answer different questions")
    if _without_flags(pair[0]) == _without_flags(pair[1]):
        raise BadRow("equal answers", "chosen is rejected")
    return pair[0], pair[1]


def _without_flags(messages: list[dict]) -> list[dict]:
    """The messages alone, without what says whether they are learnt."""
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def _join(asked: list[dict], turns: list[dict], side: str, by_text: bool) -> list[dict]:
    """What was asked and the turns of a side, an answer or a whole conversation; their common beginning once.

    Args:
        by_text: what was asked is the text of a question, maybe not of the first one.

    Raises:
        BadRow: the conversation begins with something else than was asked.
    """
    if all(turn["role"] != "user" for turn in turns):
        return asked + turns
    (system, asked), (own, turns) = (_split_system(messages) for messages in (asked, turns))
    begins = _without_flags(turns[: len(asked)]) == asked
    if by_text:
        begins = any(m["role"] == "user" and m["content"].strip() == asked[0]["content"].strip() for m in turns)
    if not begins or (system and own and _without_flags(own) != system):
        raise BadRow("another question", f"{side} begins otherwise than the prompt")
    return (own or system) + turns


def _split_system(messages: list[dict]) -> tuple[list[dict], list[dict]]:
    count = int(bool(messages) and messages[0]["role"] == "system")
    return messages[:count], messages[count:]


# ---- messages to tokens ----


class Chat:
    """A tokenizer's own conversation template: messages -> tokens, and which of them the assistant generates.

    A template may render the turns before the last question otherwise than when they were last (Qwen3's leaves their
    thoughts out), so the rendering of a longer conversation need not begin with that of a shorter one. A turn is
    therefore found by rendering the whole conversation with a mark in its place: what then stands before the mark, up to
    the opening of a turn, and what stands after it are the parts of the rendering that are not this turn.
    """

    MARK = "\ue000\ue0ff\ue000"  # private use characters

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        name = tokenizer.name_or_path
        if not tokenizer.chat_template or not tokenizer.is_fast:
            raise ValueError(
                f"{name} has no chat template or no tokenizer.json; expected both; fix: --tokenizer of a chat model"
            )
        question, marked = {"role": "user", "content": "question"}, {"role": "assistant", "content": self.MARK}
        try:
            asked, answered, turns = map(self.render, ([question], [question, marked], [question, marked, question]))
            prompts = [self.render([question], add_generation_prompt=True, enable_thinking=t) for t in (True, False)]
        except BadRow as error:
            raise ValueError(f"the chat template of {name} fails: {error.args[1]}; fix: --tokenizer") from error
        before, mark, _ = turns.partition(self.MARK)
        if not mark or not before.startswith(asked):
            raise ValueError(f"the chat template of {name} does not show answers in order; fix: --tokenizer")
        self.opening = before[len(asked) :]
        self.closing = answered.partition(self.MARK)[2].rstrip()
        # what a prompt for a generation holds beyond the opening, with and without thinking; the longest first
        begin = len(asked + self.opening)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.reserved = [text for text in (*special, self.closing, self.MARK) if text]
        self.prompts = sorted({p[begin:] for p in prompts if p.startswith(asked + self.opening)}, key=len)[::-1]
        if not self.opening or not self.prompts:
            raise ValueError(f"the chat template of {name} has no prompt for an answer; fix: --tokenizer")

    def render(self, messages: list[dict], tools: list | None = None, **options) -> str:
        return render(self.tokenizer, messages, tools, **options)

    def spans(self, messages: list[dict], tools: list | None = None) -> tuple[str, list[tuple[int, int]]]:
        """The rendering, and where in it each assistant turn is generated: [start, end) characters.

        Raises:
            BadRow: the template refuses the messages, or does more to other turns than leaving their thoughts out.
        """
        text = self.render(messages, tools)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            marked = {k: v for k, v in message.items() if k != "reasoning_content"} | {"content": self.MARK}
            rendered = self.render([*messages[:i], marked, *messages[i + 1 :]], tools)
            head, mark, tail = rendered.partition(self.MARK)
            rest = tail.partition(self.closing)[2] if self.closing else tail  # the calls end before the closing
            start = head.rfind(self.opening) + len(self.opening)
            end = len(text) - len(rest)
            whole = text.startswith(head[:start]) and text.endswith(self.closing + rest)
            whole = whole and start <= end - len(self.closing)
            if not mark or self.opening not in head or self.closing not in tail or not whole:
                raise BadRow(
                    "refused by the template",
                    f"that of {self.tokenizer.name_or_path} changes the rest of a conversation with the answer in "
                    f"message {i}; expected one that does not",
                )
            start += next((len(p) for p in self.prompts if text.startswith(p, start)), 0)
            spans.append((start, end))
        return text, spans

    def find_bare_answers(self, messages: list[dict], tools: list | None = None) -> set[int]:
        """The numbers of the answers whose thoughts the template leaves out."""
        found = set()
        for i, message in enumerate(messages):
            before, end, after = message["content"].partition("</think>")
            before, begin, thoughts = before.rpartition("<think>")
            if message["role"] != "assistant":
                continue
            if message.get("reasoning_content", "").strip():
                marked = {"reasoning_content": self.MARK}
            elif end and thoughts.strip():
                marked = {"content": before + begin + self.MARK + end + after}
            else:
                continue
            if self.MARK not in self.render([*messages[:i], message | marked, *messages[i + 1 :]], tools):
                found.add(i)
        return found

    def encode(
        self, messages: list[dict], tools: list | None = None, train_on: str = "all"
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [n], learnt bool [n]): the template's tokens; those that reach into the span of an answer to learn.

        Args:
            train_on: "all" answers, the "last", or the "complete" ones, whose thoughts the template does not leave out.

        Raises:
            BadRow: a special token's name in a text, the template refuses the messages, or no answer is to be learnt.
        """
        texts = [("tools", json.dumps(tools, ensure_ascii=False))]
        for i, message in enumerate(messages):
            calls = json.dumps(message.get("tool_calls"), ensure_ascii=False)
            texts += [(f"message {i}", t) for t in (message["content"], message.get("reasoning_content", ""), calls)]
        for where, text in texts:
            if found := [reserved for reserved in self.reserved if reserved in text]:
                raise BadRow("special token in the text", f"{where} holds {found[0]!r}")
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        bare = self.find_bare_answers(messages, tools) if train_on == "complete" else set()
        learnt = answers[-1:] if train_on == "last" else [i for i in answers if i not in bare]
        text, spans = self.spans(messages, tools)
        inside = np.zeros(len(text) + 2, np.int64)  # of the characters before i, how many are in a span
        for i, (start, end) in zip(answers, spans, strict=True):
            inside[start + 1 : end + 1] = i in learnt and messages[i].get("train", True)
        if not inside.any():
            raise BadRow("nothing to learn", f"no answer is left of {len(answers)} (weight, loss, train, --train-on)")
        inside = inside.cumsum()
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        ends = np.maximum(ends, starts + 1)  # some tokenizers trim the offsets of a space to nothing
        return np.array(encoded["input_ids"], np.int32), inside[ends] > inside[starts]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: list | None = None, **options) -> str:
    """What the tokenizer's chat template makes of messages. BadRow: anything that it fails with."""
    try:
        return tokenizer.apply_chat_template(_without_flags(messages), tools=tools, tokenize=False, **options)
    except Exception as error:  # its own refusals, and whatever a template or its filters raise on odd values
        raise BadRow("refused by the template", _say(error)) from error


def _say(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


# ---- packing ----


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which items share a row: best fit decreasing, the same for the same lengths.

    Every length is at most `capacity`. Items of one length keep their order; rows are in the order they were opened.
    """
    rows: list[list[int]] = []
    spaces: list[int] = []  # the distinct free spaces, ascending
    with_space: dict[int, list[int]] = {}
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[item])
        place = bisect_left(spaces, length)
        if place == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        assert space >= length, f"item {item} of {length} in rows of {capacity}"
        rows[row].append(item)
        if space > length:
            if space - length not in with_space:
                insort(spaces, space - length)
            with_space.setdefault(space - length, []).append(row)
    return rows


def micro_batch(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Sequences (tokens [n], labels [n], already shifted) laid end to end: tokens, labels, positions int64 [T], and
    cu_seqlens, host bounds [0, …, T]."""
    from torch import from_numpy

    tokens, labels = (np.concatenate(parts).astype(np.int64) for parts in zip(*sequences, strict=True))
    lengths = [len(part) for part, _ in sequences]
    positions = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])
    bounds = [0, *itertools.accumulate(lengths)]
    arrays = {"tokens": tokens, "labels": labels, "positions": positions}
    return {name: from_numpy(array) for name, array in arrays.items()} | {"cu_seqlens": bounds}


# ---- pretraining ----


class StreamSampler(BucketSampler):
    """The rows of an endless stream in its own order: step n takes rows n * global_batch …"""

    def __init__(self, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int):
        super().__init__([0], global_batch, micro_batch, dp_rank, dp_size, seed=0, shuffle=False)

    def epoch(self, step: int) -> int:
        return 0

    def batch(self, step: int) -> tuple[int, list[int]]:
        return 0, list(range(step * self.global_batch, (step + 1) * self.global_batch))


class TextRows:
    """Rows of an indexed data set; see the head of this file."""

    def __init__(
        self,
        prefix: str | Path,
        seq_len: int,
        eos: int,
        seed: int = 0,
        separate_documents: bool = True,
        shuffle: bool = True,
    ):
        """
        Args:
            eos: id of the token that ends a document; added where the data set has none.
            shuffle: False takes the documents as they stand, to evaluate on rows 0 … rows_per_epoch - 1.

        Raises:
            ValueError: no such data set, one made with another tokenizer, or one of which some documents end in `eos`.
        """
        self.prefix = re.sub(r"\.(bin|idx)$", "", str(prefix))
        self.seq_len, self.eos, self.seed = seq_len, eos, seed
        self.separate, self.shuffle = separate_documents, shuffle
        self._indexed = _indexed(self.prefix)
        lengths = self._indexed.sequence_lengths
        self._documents = np.flatnonzero(lengths)
        some = self._documents[np.linspace(0, len(self._documents) - 1, 1000).astype(int)]
        ended = [int(self._indexed.get(int(d), int(lengths[d]) - 1, 1)[0]) == eos for d in some]
        if any(ended) and not all(ended):
            raise ValueError(
                f"{self.prefix}: {sum(ended)} of {len(ended)} documents end in token {eos}; expected all or none; "
                "fix: preprocess it again"
            )
        self._lengths = lengths + (0 if all(ended) else 1)
        self.tokens_per_epoch = int(self._lengths[self._documents].sum(dtype=np.int64))
        self.rows_per_epoch = (self.tokens_per_epoch - 1) // seq_len
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def __len__(self) -> int:
        return self.rows_per_epoch

    def where(self, row: int) -> str:
        return f"{self.prefix} row {row}"

    def sampler(self, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int) -> StreamSampler:
        return StreamSampler(global_batch, micro_batch, dp_rank, dp_size)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents in the order of an epoch, and where in it each ends."""
        order = (
            np.random.default_rng([self.seed, epoch]).permutation(self._documents) if self.shuffle else self._documents
        )
        return order, np.cumsum(self._lengths[order], dtype=np.int64)

    def _pieces(self, start: int, count: int) -> Iterator[np.ndarray]:
        """Tokens start … start + count - 1 of the stream, cut where documents meet."""
        epoch, at = divmod(start, self.tokens_per_epoch)
        order, ends = self._epoch(epoch)
        place = int(np.searchsorted(ends, at, side="right"))
        while count:
            if place == len(order):
                epoch, place, at = epoch + 1, 0, 0
                order, ends = self._epoch(epoch)
            document, end = int(order[place]), int(ends[place])
            length = int(self._lengths[document])
            taken = min(count, end - at)
            yield self._read(document, at - (end - length), taken)
            count, at, place = count - taken, at + taken, place + 1

    def _read(self, document: int, offset: int, count: int) -> np.ndarray:
        stored = int(self._indexed.sequence_lengths[document])
        tokens = self._indexed.get(document, offset, min(count, stored - offset)) if offset < stored else []
        return np.append(tokens, self.eos).astype(np.int32) if offset + count > stored else tokens.astype(np.int32)

    def row(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Sequences (tokens, labels) of a row of the stream."""
        pieces = list(self._pieces(number * self.seq_len, self.seq_len + 1))  # the last token is a label only
        tokens = np.concatenate(pieces)
        labels = tokens[1:].copy()
        if not self.separate:
            return [(tokens[:-1], labels)]
        starts = np.cumsum([len(piece) for piece in pieces])[:-1]
        labels[starts - 1] = IGNORE
        cuts = starts[starts < self.seq_len]
        return list(zip(np.split(tokens[:-1], cuts), np.split(labels, cuts), strict=True))

    def fetch(self, rows: Sequence[int], epoch: int = 0) -> dict[str, Any]:
        """A micro-batch; `epoch` is in the row's number."""
        return micro_batch([sequence for number in rows for sequence in self.row(number)])


def _indexed(prefix: str):
    from common import device  # noqa: F401  before the first import of megatron

    for suffix in (".bin", ".idx"):
        if not os.path.isfile(prefix + suffix):
            raise ValueError(
                f"{prefix}{suffix} does not exist; expected an indexed data set; fix: --data, or preprocess.sh"
            )
    if not os.path.getsize(f"{prefix}.bin"):
        raise ValueError(f"{prefix}.bin holds no token; expected text; fix: --data")
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(prefix)


# ---- conversations and pairs ----


def prepare_chats(
    data: str | Path,
    tokenizer: str | Path,
    seq_len: int,
    cache: str | Path,
    *,
    kind: Literal["sft", "dpo"] = "sft",
    too_long: Literal["drop", "cut"] = "drop",
    train_on: Literal["all", "last", "complete"] = "all",
    max_drop: float = 0.05,
    workers: int = 0,
) -> Path:
    """Renders, tokenizes and packs the user's rows into a folder under `cache`, once; `PackedRows` reads it.

    The folder's name stands for the data files (size, time), the tokenizer and the arguments. It holds drops.jsonl.

    Args:
        tokenizer: folder of a released tokenizer with its chat template.
        too_long: what becomes of a conversation, or pair, of more than seq_len tokens.
        train_on: the answers of a conversation that are learnt. A template that leaves the thoughts of earlier ones out
            shows these as the model would never generate them: "complete" is without them.
        workers: processes; 0 does the work in this one.

    Raises:
        ValueError: more than the share `max_drop` of the rows cannot be used, a file is malformed, or no chat template.
    """
    files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in list_files(data, (".jsonl", ".json"))]
    settings = [files, tokenizer_hash(tokenizer), seq_len, kind, too_long, train_on]
    folder = Path(cache) / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    chat, report = Chat(loaded), DropReport()

    def encode(rows: list[tuple[str, Any]]) -> list[tuple[str, Any, int]]:
        """(where, [(tokens, learnt), …] or (reason, detail), answers whose thoughts are left out) of each row."""
        done = []
        for where, row in rows:
            bare = 0
            try:
                if isinstance(row, BadRow):
                    raise row
                unit, tools = [to_chat(row)] if kind == "sft" else to_pair(row), to_tools(row)
                found = [chat.encode(m, tools, train_on if kind == "sft" else "last") for m in unit]
                bare = len(chat.find_bare_answers(unit[0], tools)) if kind == "sft" else 0
                result = _fit(found, seq_len, too_long)
            except BadRow as error:
                result = error.args
            except Exception as error:  # no row ends a run, whatever it holds; --max-drop limits how many are lost
                result = "unusable row", _say(error)
            done.append((where, result, bare))
        return done

    building = partial_name(folder)
    building.mkdir(parents=True)
    try:
        batches = in_order(encode, _batched(read_rows(data), BATCH), workers)
        kept, bare = _write_units(building, batches, report)
        report.save(building)
        report.check(kept + len(report.drops), max_drop)
        bounds = np.load(building / "bounds.npy")
        per_unit = 1 if kind == "sft" else 2
        rows = pack(np.diff(bounds[::per_unit]).tolist(), seq_len)
        np.save(building / "units.npy", np.array(list(itertools.chain(*rows)), np.int64))
        np.save(building / "row_bounds.npy", np.cumsum([0, *map(len, rows)], dtype=np.int64))
        pad = loaded.pad_token_id if loaded.pad_token_id is not None else loaded.eos_token_id
        (building / "meta.json").write_text(json.dumps({"seq_len": seq_len, "per_unit": per_unit, "pad": pad}))
        left_out = "learnt without them" if train_on == "all" else f"train on: {train_on}"
        left_out = f"; the template leaves out the thoughts of {bare} answers ({left_out})" if bare else ""
        print(f"{data}: {kept} rows of {bounds[-1]} tokens in {len(rows)} rows of {seq_len}; {report}{left_out}")
        try:
            os.rename(building, folder)
        except OSError:  # another process was faster, with the same content
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def tokenizer_hash(folder: str | Path) -> str:
    """Of what decides the tokens of a text and of a conversation. ValueError: no tokenizer.json."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; expected a released tokenizer's folder; fix: --tokenizer")
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    contents = [(Path(folder) / name).read_bytes() for name in names if (Path(folder) / name).is_file()]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()


def _batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _fit(unit: list[tuple[np.ndarray, np.ndarray]], seq_len: int, too_long: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The sequences of a unit if they fit a row together, else cut to equal shares of it, or BadRow."""
    total, share = sum(len(tokens) for tokens, _ in unit), seq_len // len(unit)
    if total > seq_len and too_long == "cut":
        unit = [(tokens[:share], generated[:share]) for tokens, generated in unit]
        if not all(generated[1:].any() for _, generated in unit):
            raise BadRow("too long", f"no answer in the first {share} tokens")
    elif total > seq_len:
        raise BadRow("too long", f"{total} tokens, a row has {seq_len}")
    return unit


def _write_units(folder: Path, done: Iterable[list[tuple[str, Any, int]]], report: DropReport) -> tuple[int, int]:
    """Tokens, flags and bounds of the sequences, end to end; how many units there are, and answers without thoughts."""
    from tqdm import tqdm

    kept, left_out, lengths = 0, 0, [0]
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "generated.bin", "wb") as flags_file:
        progress = tqdm(desc="rendering conversations", unit=" rows", mininterval=1)
        for batch in done:
            for where, result, bare in batch:
                if isinstance(result, tuple):
                    report.add(result[0], where, result[1])
                    continue
                kept, left_out = kept + 1, left_out + bare
                for tokens, generated in result:
                    tokens_file.write(tokens.tobytes())
                    flags_file.write(generated.tobytes())
                    lengths.append(len(tokens))
            progress.update(len(batch))
        progress.close()
    np.save(folder / "bounds.npy", np.cumsum(lengths, dtype=np.int64))
    return kept, left_out


class PackedRows:
    """Rows of whole conversations or pairs; see the head of this file. The tokens stay on disk, memory-mapped.

    A micro-batch of pairs also has `pairs` [P], the numbers of the chosen sequences in cu_seqlens (the rejected ones
    follow), `units` [P], their numbers in the data, `sequence` [T], of each token the number of its sequence, and, once
    `reference` is set, its rows [P, 2].
    """

    reference: np.ndarray | None = None  # fp32 [units, 2], see preference.py

    def __init__(self, folder: str | Path):
        """folder: what `prepare_chats` returned."""
        self.folder = Path(folder)
        meta = json.loads((self.folder / "meta.json").read_text())
        self.seq_len, self.per_unit, self.pad = meta["seq_len"], meta["per_unit"], meta["pad"]
        arrays = (np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("bounds", "units", "row_bounds"))
        self._bounds, self._units, self._row_bounds = arrays
        self._tokens = np.memmap(self.folder / "tokens.bin", np.int32, "r")
        self._generated = np.memmap(self.folder / "generated.bin", bool, "r")

    def __len__(self) -> int:
        return len(self._row_bounds) - 1

    @property
    def unit_count(self) -> int:
        return len(self._units)

    @property
    def fill(self) -> float:
        """Share of the rows that is not padding."""
        return len(self._tokens) / (len(self) * self.seq_len)

    def where(self, row: int) -> str:
        return f"{self.folder} row {row}"

    def sampler(self, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int, seed: int) -> BucketSampler:
        return BucketSampler(np.zeros(len(self), np.int8), global_batch, micro_batch, dp_rank, dp_size, seed)

    def units(self, row: int) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        """The conversations or pairs of a row: sequences (tokens, labels)."""
        for unit in self._units[self._row_bounds[row] : self._row_bounds[row + 1]].tolist():
            bounds = self._bounds[unit * self.per_unit : (unit + 1) * self.per_unit + 1].tolist()
            yield [self._sequence(start, end) for start, end in itertools.pairwise(bounds)]

    def _sequence(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.array(self._tokens[start:end])
        labels = np.where(self._generated[start + 1 : end], tokens[1:], IGNORE)
        return tokens, np.append(labels, IGNORE)

    def fetch(self, rows: Sequence[int], epoch: int = 0) -> dict[str, Any]:
        """A micro-batch; rows do not change between epochs."""
        sequences, pairs = [], []
        for row in rows:
            rest = self.seq_len
            for unit in self.units(row):
                pairs.append(len(sequences))
                sequences += unit
                rest -= sum(len(tokens) for tokens, _ in unit)
            if rest:
                sequences.append((np.full(rest, self.pad), np.full(rest, IGNORE)))
        batch = micro_batch(sequences)
        if self.per_unit == 1:
            return batch
        from torch import from_numpy

        units = np.concatenate([self._units[self._row_bounds[row] : self._row_bounds[row + 1]] for row in rows])
        sequence = np.repeat(np.arange(len(sequences)), np.diff(batch["cu_seqlens"]))
        found = {"pairs": np.array(pairs), "units": units, "sequence": sequence}
        if self.reference is not None:
            found["reference"] = self.reference[units]
        return batch | {name: from_numpy(array) for name, array in found.items()}


# ---- processes ----

_function: Callable | None = None


def _start(function: Callable) -> None:
    """What a worker does first: keep the function, and see to it that it ends with its parent."""
    global _function
    _function = function
    processes.die_with(multiprocessing.parent_process().pid)


def _call(task: Any) -> Any:
    return _function(task)


def in_order(function: Callable, tasks: Iterable, workers: int) -> Iterator:
    """function(task) of each task, in order, by `workers` forked processes (0: this one); two tasks a worker wait.

    The function is inherited, not pickled, so it may hold a tokenizer; nothing but tasks and results travels.
    """
    if not workers:
        yield from map(function, tasks)
        return
    waiting: deque = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start, (function,))
    try:
        for task in tasks:
            waiting.append(pool.submit(_call, task))
            if len(waiting) >= 2 * workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
