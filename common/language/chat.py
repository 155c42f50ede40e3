"""Turns rows of conversations or preference pairs into messages, and messages into tokens and flags of those to learn.

    chat = Chat(AutoTokenizer.from_pretrained(folder))
    tokens, learnt = chat.encode(to_chat(row), to_tools(row))

A row has the format of Alpaca (instruction), ShareGPT (conversations) or OpenAI (messages), or is a pair (chosen,
rejected). The sides of a pair may be whole conversations. A prompt beside them must agree with them, and their common
beginning is taken once.

The tokenizer's own chat template renders the messages. The learnt part of an answer starts where a generation prompt
ends and includes the token that closes the turn. So the empty thoughts that `enable_thinking=False` puts into a
generation prompt are no training target, and real thoughts are. Messages after the last answer are cut off. An answer
with `"weight": 0`, `"loss": false`, `"train": false` or `"training": false` is never learnt. Thoughts stand between
<think> and </think>, or under `reasoning_content`.

Importing this module imports neither torch nor numpy, which the options do not need.
"""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

from common.records import BadRow, parse_json

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "tool": "tool", "observation": "tool",
}  # fmt: skip


# ---- rows to messages ----


def to_messages(row: Any) -> list[dict]:
    """Converts a row of Alpaca, ShareGPT or OpenAI to [{"role", "content", …}, …], with roles in any order.

    Raises:
        BadRow: the format is unknown, or a field (named) has a wrong value.
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
    """Returns a text, or the joined text parts of OpenAI's list form. Replaces lone surrogates, which a tokenizer
    refuses."""
    if isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadRow("bad row", f"{field} is {type(value).__name__}; expected text")
    return value.encode(errors="replace").decode()


def _message(turn: Any, field: str) -> dict:
    """Returns a turn as {"role", "content"}, with "reasoning_content" and "tool_calls" if the turn has them, and with
    "train": False if it is an answer that is not to be learnt."""
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
    """Whether an answer is to be learnt, by the keys of OpenAI (weight), ms-swift (loss), Axolotl (train, training)."""
    if turn.get("train_detail"):
        raise BadRow("bad row", f"{field}.train_detail chooses parts of an answer; expected train, true or false")
    for key in ("weight", "loss", "train", "training"):
        if turn.get(key, 1) not in (0, 1):
            raise BadRow("bad row", f"{field}.{key} is {turn[key]!r}; expected 0 or 1, false or true")
    return all(turn.get(key, 1) for key in ("weight", "loss", "train", "training"))


def _from_json(value: Any, field: str) -> Any:
    """Parses a text as JSON (a blank text as None); returns any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise BadRow("malformed JSON", f"{field}: {error.msg}") from error


def _read_objects(value: Any, field: str) -> list[dict]:
    """Returns a list of objects from a list, from one object, or from JSON texts of either."""
    value = _from_json(value, field)
    items = value if isinstance(value, list) else [value] if value else []
    items = [_from_json(item, f"{field}[{i}]") for i, item in enumerate(items)]
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise BadRow("bad row", f"{field}[{i}] is {type(item).__name__}; expected an object")
    return items


def _read_calls(value: Any, field: str) -> list[dict]:
    """Returns the tool calls, the arguments of each as an object, because each template prints them in its own way."""
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
    """Returns the functions that the assistant may call, or None. Raises BadRow if they are not objects."""
    return _read_objects(row.get("tools"), "tools") or None


def to_chat(row: Any) -> list[dict]:
    """Returns the messages of a conversation to learn from, up to its last answer. Raises BadRow if there is no answer,
    the first turn is not the user's, a turn is empty, or a system message is not the first."""
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
    """Returns the messages of a conversation to continue. They are a text or messages under `prompt`, or have a format
    of `to_messages`. Raises BadRow if the last message is missing, empty or an answer."""
    messages = _prompt_messages(row)
    if not messages or messages[-1]["role"] == "assistant":
        raise BadRow("no question", "the conversation ends in an answer" if messages else "there is no message")
    if not messages[-1]["content"].strip():
        raise BadRow("empty turn", f"message {len(messages) - 1}, of {messages[-1]['role']}")
    return messages


def _prompt_messages(row: Any) -> list[dict]:
    """Returns the messages under `prompt`, or those of a row of `to_messages`."""
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if prompt is None:
        return to_messages(row)
    key = "instruction" if isinstance(prompt, str) else "messages"
    return to_messages({key: prompt, "system": row.get("system")})


def to_pair(row: Any) -> tuple[list[dict], list[dict]]:
    """Returns two conversations of a preference pair: one ends in the chosen answer, one in the rejected answer. Raises
    BadRow, which says what is wrong, if the row is no such pair."""
    if not isinstance(row, dict):
        raise BadRow("bad row", f"{str(row)[:40]!r}; expected an object")
    if missing := [side for side in ("chosen", "rejected") if side not in row]:
        raise BadRow("unknown format", f"keys: {', '.join(row)}; expected chosen and rejected, lacks {missing[0]}")
    filled = {key: value for key, value in row.items() if value and key != "output"}
    prompt_keys = {"prompt", "messages", "conversations", "instruction"} & set(filled)
    # Without a prompt, chosen and rejected are whole conversations.
    question = _without_flags(_prompt_messages(filled)) if prompt_keys else []
    sides = {}
    for side in ("chosen", "rejected"):
        answer = row[side] if isinstance(row[side], list) else [row[side]]
        turns = [{"role": "assistant", "content": a} if isinstance(a, str) else a for a in answer]
        sides[side] = [_message(turn, f"{side}[{i}]") for i, turn in enumerate(turns)]
        if not turns or sides[side][-1]["role"] != "assistant":
            raise BadRow("no assistant turn", f"{side} does not end in one")
    if question in map(_without_flags, sides.values()):
        question = question[:-1]  # the messages beside the pair are one of its conversations, answer included
    pair = []
    for side, turns in sides.items():
        chat = to_chat({"messages": _join(question, turns, side, isinstance(filled.get("prompt"), str))})
        if len(chat) > 1 and chat[-2]["role"] == "assistant":
            raise BadRow("answer before the answer", f"message {len(chat) - 2} of {side} is the assistant's")
        pair.append(chat)
    if _without_flags(pair[0][:-1]) != _without_flags(pair[1][:-1]):
        raise BadRow("bad row", "chosen and rejected answer different questions")
    if _without_flags(pair[0]) == _without_flags(pair[1]):
        raise BadRow("equal answers", "chosen is rejected")
    return pair[0], pair[1]


def _without_flags(messages: list[dict]) -> list[dict]:
    """Returns the messages without the "train" flags."""
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def _join(asked: list[dict], turns: list[dict], side: str, by_text: bool) -> list[dict]:
    """Joins the messages of the prompt (`asked`) and the turns of a side, which are an answer or a whole conversation.
    Their common beginning is taken once.

    Args:
        by_text: the prompt is a text, which may be any question of the conversation, not only the first.

    Raises:
        BadRow: the conversation does not agree with the prompt.
    """
    if all(turn["role"] != "user" for turn in turns):
        return asked + turns
    (system, asked), (own_system, turns) = (_split_system(messages) for messages in (asked, turns))
    agrees = _without_flags(turns[: len(asked)]) == asked
    if by_text:
        agrees = any(m["role"] == "user" and m["content"].strip() == asked[0]["content"].strip() for m in turns)
    if not agrees or (system and own_system and _without_flags(own_system) != system):
        raise BadRow("another question", f"{side} begins otherwise than the prompt")
    return (own_system or system) + turns


def _split_system(messages: list[dict]) -> tuple[list[dict], list[dict]]:
    count = int(bool(messages) and messages[0]["role"] == "system")
    return messages[:count], messages[count:]


# ---- messages to tokens ----


class Chat:
    """Tokenizes messages with the tokenizer's own chat template, and finds which tokens the assistant generates.

    A template may render earlier turns differently from the last one (many leave out their thoughts), so the rendering
    of a longer conversation need not begin with that of a shorter one. Therefore a turn is found by rendering the whole
    conversation with a mark in place of the turn. The text before the mark, up to the opening of a turn, and the text
    after the mark belong to the other turns. The rest of the real rendering is this turn.
    """

    MARK = "\ue000\ue0ff\ue000"  # private use characters of Unicode

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        name = tokenizer.name_or_path
        if not tokenizer.chat_template or not tokenizer.is_fast:
            raise ValueError(
                f"{name} has no chat template or no tokenizer.json; expected both; fix: --tokenizer of a chat model"
            )
        question, marked = {"role": "user", "content": "question"}, {"role": "assistant", "content": self.MARK}
        try:
            prefix, answered, turns = map(self.render, ([question], [question, marked], [question, marked, question]))
            prompts = [self.render([question], add_generation_prompt=True, enable_thinking=t) for t in (True, False)]
        except BadRow as error:
            raise ValueError(f"the chat template of {name} fails: {error.args[1]}; fix: --tokenizer") from error
        before, mark, _ = turns.partition(self.MARK)
        if not mark or not before.startswith(prefix):
            raise ValueError(f"the chat template of {name} does not show answers in order; fix: --tokenizer")
        self.opening = before[len(prefix) :]
        self.closing = answered.partition(self.MARK)[2].rstrip()
        begin = len(prefix + self.opening)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.reserved = [text for text in (*special, self.closing, self.MARK) if text]
        # what a generation prompt holds after the opening, with and without thinking; the longest first
        self.prompts = sorted({p[begin:] for p in prompts if p.startswith(prefix + self.opening)}, key=len)[::-1]
        if not self.opening or not self.prompts:
            raise ValueError(f"the chat template of {name} has no prompt for an answer; fix: --tokenizer")

    def render(self, messages: list[dict], tools: list | None = None, **options) -> str:
        return render(self.tokenizer, messages, tools, **options)

    def spans(self, messages: list[dict], tools: list | None = None) -> tuple[str, list[tuple[int, int]]]:
        """Renders the messages. Returns the text, and [start, end) in characters of what the assistant generates per
        turn.

        Raises:
            BadRow: the template refuses the messages, or changes other turns by more than leaving out their thoughts.
        """
        text = self.render(messages, tools)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            marked = {k: v for k, v in message.items() if k != "reasoning_content"} | {"content": self.MARK}
            rendered = self.render([*messages[:i], marked, *messages[i + 1 :]], tools)
            head, mark, tail = rendered.partition(self.MARK)
            rest = tail.partition(self.closing)[2] if self.closing else tail  # tool calls stand before the closing
            start = head.rfind(self.opening) + len(self.opening)
            end = len(text) - len(rest)
            unchanged = text.startswith(head[:start]) and text.endswith(self.closing + rest)
            unchanged = unchanged and start <= end - len(self.closing)
            if not mark or self.opening not in head or self.closing not in tail or not unchanged:
                raise BadRow(
                    "refused by the template",
                    f"that of {self.tokenizer.name_or_path} changes the rest of a conversation with the answer in "
                    f"message {i}; expected one that does not",
                )
            start += next((len(p) for p in self.prompts if text.startswith(p, start)), 0)
            spans.append((start, end))
        return text, spans

    def find_bare_answers(self, messages: list[dict], tools: list | None = None) -> set[int]:
        """Returns the message indices of the answers whose thoughts the template leaves out."""
        bare = set()
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
                bare.add(i)
        return bare

    def encode(
        self, messages: list[dict], tools: list | None = None, train_on: str = "all"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Renders and tokenizes a conversation: (tokens int32 [n], learnt bool [n]). A token is learnt if it overlaps
        the span of an answer to learn.

        Args:
            train_on: "all" answers, the "last", or the "complete" ones, whose thoughts the template does not leave out.

        Raises:
            BadRow: a special token's name in a text, the template refuses the messages, or no answer is to be learnt.
        """
        import numpy as np

        texts = [("tools", json.dumps(tools, ensure_ascii=False))]
        for i, message in enumerate(messages):
            calls = json.dumps(message.get("tool_calls"), ensure_ascii=False)
            texts += [(f"message {i}", t) for t in (message["content"], message.get("reasoning_content", ""), calls)]
        for where, text in texts:
            if matches := [reserved for reserved in self.reserved if reserved in text]:
                raise BadRow("special token in the text", f"{where} holds {matches[0]!r}")
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        bare = self.find_bare_answers(messages, tools) if train_on == "complete" else set()
        learnt = answers[-1:] if train_on == "last" else [i for i in answers if i not in bare]
        text, spans = self.spans(messages, tools)
        inside = np.zeros(len(text) + 2, np.int64)  # after cumsum: learnt characters before character i
        for i, (start, end) in zip(answers, spans, strict=True):
            inside[start + 1 : end + 1] = i in learnt and messages[i].get("train", True)
        if not inside.any():
            raise BadRow("nothing to learn", f"no answer is left of {len(answers)} (weight, loss, train, --train-on)")
        inside = inside.cumsum()
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        ends = np.maximum(ends, starts + 1)  # some tokenizers give a space an empty range of characters
        return np.array(encoded["input_ids"], np.int32), inside[ends] > inside[starts]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: list | None = None, **options) -> str:
    """Renders messages with the tokenizer's chat template. Raises BadRow for every error of the template."""
    try:
        return tokenizer.apply_chat_template(_without_flags(messages), tools=tools, tokenize=False, **options)
    except Exception as error:  # a template's own refusals, and any error of it or its filters on odd values
        raise BadRow("refused by the template", say_error(error)) from error


def say_error(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
