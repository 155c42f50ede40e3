"""Rows of conversations or preference pairs -> messages -> tokens, and which of them the assistant generates.

    chat = Chat(AutoTokenizer.from_pretrained(folder))
    tokens, learnt = chat.encode(to_chat(row), to_tools(row))

A row is Alpaca's (instruction), ShareGPT's (conversations), OpenAI's (messages) or a pair (chosen, rejected). A prompt beside
whole conversations must agree with them, and the beginning that they share is taken once.

The tokenizer's own template renders the messages. An answer is learnt from where the prompt for a generation ends through
the token that closes the turn. So the empty thoughts that `enable_thinking=False` puts into a prompt are no target, and
real thoughts are. What follows the last answer is cut off. An answer with `"weight": 0`, `"loss": false` or
`"train": false` is never learnt. Thoughts stand between <think> and </think>, or under `reasoning_content`.

No torch here.
"""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from common.records import BadRow, parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "tool": "tool", "observation": "tool",
}  # fmt: skip


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

    A template may render the turns before the last question otherwise than when they were last (many leave their
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
        raise BadRow("refused by the template", say_error(error)) from error


def say_error(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
