# SPDX-License-Identifier: Apache-2.0
"""What a row says: a text, or a conversation in one of the spellings that people keep them in.

    text                 {"text": "..."}
    messages             {"messages": [{"role", "content"}, ...]}, with ``tools`` beside
    ShareGPT             {"conversations": [{"from", "value"}, ...]}, with ``tools`` beside
    Alpaca               {"instruction", "output"}, with ``input`` and ``history`` beside
    prompt, completion   {"prompt", "completion"}, strings or lists of messages; what the prompt says is not trained on

A ``system`` beside any of the conversations is their first message. A completion that repeats its prompt, as answers of
preferences often do, is read without it.

Every conversation becomes messages as chat templates of ``transformers`` take them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_moefold.errors import InputError
from lightning_moefold.recipes.documents import RepeatedKey, parsed

Format = Literal["auto", "text", "messages", "sharegpt", "alpaca", "prompt_completion"]
ROLES = ("system", "developer", "user", "assistant", "tool")
_ASKING = ("system", "developer", "user")
_SHAREGPT = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "call",
}  # fmt: skip


@dataclass
class Conversation:
    """Messages of a row.

    Args:
        messages: Each with ``role`` and a string ``content``, and whatever else a template reads (``tool_calls``,
            ``reasoning_content``, ...).
        tools: Descriptions of the tools that the assistant may call.
        trained: Of each message, whether it may be trained on: an assistant's, without ``"weight": 0``, not in a prompt.
        masked: Of each message, whether it is never trained on, whoever says it: with ``"weight": 0``, or in a prompt.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    trained: list[bool] = field(default_factory=list)
    masked: list[bool] = field(default_factory=list)

    def mask(self, count: int) -> None:
        """Has the first messages not trained on."""
        self.trained[:count], self.masked[:count] = [False] * count, [True] * count


def read_row(found: Any, where: str, form: Format = "auto") -> str | Conversation:
    """The text or the conversation of a row.

    Args:
        found: The object, or a string for a text.
        where: File and place, for a sentence.
        form: How it is spelled; ``"auto"`` to see by its keys.

    Raises:
        InputError: If it is spelled otherwise, or in several ways.
    """
    if isinstance(found, str) and form in ("auto", "text"):
        return found
    fields = _fields(found)
    spelled = [name for name, (keys, _) in _SPELLINGS.items() if keys <= set(fields) and form in ("auto", name)]
    if len(spelled) == 1:
        return _SPELLINGS[spelled[0]][1](fields, where)
    if spelled:
        raise InputError(f"{where} can be read in several ways; say format={' or '.join(map(repr, spelled))}.")
    wanted = _SPELLINGS if form == "auto" else {form: _SPELLINGS[form]}
    known = ", or ".join(" with ".join(f'"{key}"' for key in sorted(keys)) for keys, _ in wanted.values())
    raise _other_object(found, where, known)


def _text(row: Mapping[str, Any], where: str) -> str:
    if not isinstance(row["text"], str):
        raise InputError(f'{where} is not a JSON object with a string "text".')
    return row["text"]


def _sharegpt(row: Mapping[str, Any], where: str) -> Conversation:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(f'{where}: "conversations" is not a list of turns.')
    if turns and "role" in turns[0]:  # messages under another name
        return _made(turns, row, where)
    messages = []
    for turn in turns:
        said = turn.get("from")
        role = _SHAREGPT.get(said) if isinstance(said, str) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise InputError(
                f'{where} has a turn from {said!r}; turns have a string "value" and are from '
                f"{', '.join(map(repr, _SHAREGPT))}."
            )
        beside = _only(turn, "weight", "reasoning_content")
        if role == "call":
            call = _json(turn["value"], where, "function_call")
            calls = [{"type": "function", "function": one} for one in (call if isinstance(call, list) else [call])]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls} | beside)
        else:
            messages.append({"role": role, "content": turn["value"]} | beside)
    return _made(messages, row, where)


def _alpaca(row: Mapping[str, Any], where: str) -> Conversation:
    messages, history = [], row.get("history") or []
    if not isinstance(history, (list, tuple)) or any(not isinstance(x, (list, tuple)) or len(x) != 2 for x in history):
        raise InputError(f'{where}: "history" is not a list of pairs of an instruction and an output.')
    for pair in history:
        messages += [{"role": role, "content": said} for role, said in zip(("user", "assistant"), pair, strict=True)]
    asked, given = row["instruction"], row.get("input", "")
    if not isinstance(asked, str) or not isinstance(given, str):
        raise InputError(f'{where}: "instruction" and "input" must be strings.')
    messages.append({"role": "user", "content": f"{asked}\n{given}" if given else asked})
    return _made([*messages, {"role": "assistant", "content": row["output"]}], row, where)


def _completion(row: Mapping[str, Any], where: str) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    completion = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise InputError(f'{where}: "prompt" and "completion" must be strings or lists of messages.')
    made = _made([*prompt, *completion], row, where)
    begin = len(made.messages) - len(completion)
    asked, answer = made.messages[begin - len(prompt) : begin], made.messages[begin:]
    if prompt and completion and answer[: len(prompt)] == asked:
        for part in (made.messages, made.trained, made.masked):
            del part[begin : begin + len(prompt)]
        answer = made.messages[begin:]
    if completion and not answer:
        raise InputError(f"{where}: an answer holds nothing but its prompt; leave the row out.")
    if asked and answer and asked[-1]["role"] == "user" and answer[0]["role"] in _ASKING:
        raise InputError(
            f"{where}: an answer begins with a message of {answer[0]['role']!r} that does not belong to the whole prompt; let it "
            "begin with all messages of the prompt, or with what the assistant says."
        )
    made.mask(begin)
    return made


def read_preference(found: Any, where: str) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation of a row.

    Args:
        found: ``{"prompt", "chosen", "rejected"}``, or the last two with the same first messages.
        where: File and place, for a sentence.

    Raises:
        InputError: If it is not such an object.
    """
    row = _object(found, where, "chosen", "rejected")
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        made = [_completion({**row, "completion": answer}, where) for answer in (chosen, rejected)]
    else:
        made = [_made(answer, row, where) for answer in (chosen, rejected)]
        pairs = zip(made[0].messages, made[1].messages, strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one.messages) for one in made))
        if same <= len(made[0].messages) - len(chosen):  # no more than the system beside both
            raise InputError(
                f'{where}: "chosen" and "rejected" begin with different messages; give a "prompt" beside them.'
            )
        for one in made:
            one.mask(same)
    if made[0].messages == made[1].messages:
        raise InputError(
            f'{where}: "chosen" and "rejected" are the same, so that nothing can be learned; leave the row out.'
        )
    return made[0], made[1]


def read_feedback(found: Any, where: str) -> tuple[Conversation, bool]:
    """A conversation, and whether its last answer is desired.

    Args:
        found: ``{"prompt", "completion", "label"}``.
        where: File and place, for a sentence.

    Raises:
        InputError: If it is not such an object.
    """
    row = _object(found, where, "prompt", "completion", "label")
    if not isinstance(row["label"], bool):
        raise InputError(f'{where}: "label" is {row["label"]!r}; give true for a desired answer, or false.')
    return _completion(row, where), row["label"]


def _object(found: Any, where: str, *keys: str) -> dict[str, Any]:
    row = _fields(found)
    if not set(keys) <= set(row):
        raise _other_object(found, where, ", ".join(map(repr, keys)))
    return row


def _fields(found: Any) -> dict[str, Any]:
    """The fields that a row has: in columns of a table, what one row has, all others have as null."""
    return {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else {}


def _other_object(found: Any, where: str, wanted: str) -> InputError:
    keys = f"; its keys are {', '.join(map(repr, found))}" if isinstance(found, dict) else ""
    return InputError(f"{where} is not a JSON object with {wanted}{keys}.")


#: The keys by which a spelling is known, and what reads it.
_SPELLINGS: dict[str, tuple[set[str], Callable[[Mapping[str, Any], str], str | Conversation]]] = {
    "text": ({"text"}, _text),
    "messages": ({"messages"}, lambda row, where: _made(row["messages"], row, where)),
    "sharegpt": ({"conversations"}, _sharegpt),
    "alpaca": ({"instruction", "output"}, _alpaca),
    "prompt_completion": ({"prompt", "completion"}, _completion),
}


def _made(messages: Any, row: Mapping[str, Any], where: str) -> Conversation:
    """Messages as templates take them.

    Raises:
        InputError: For messages that are none.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{where} holds no list of messages; each is an object with role and content.")
    made = [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, start=1)]
    if system := row.get("system"):
        made = _with_system(system, made, where)
    weights = [message.pop("weight", 1) for message in made]
    if any(weight not in (0, 1) for weight in weights):
        raise InputError(
            f"{where}: a message has a weight that is neither 0 nor 1; leave it out, or keep the row away."
        )
    trained = [m["role"] == "assistant" and bool(weight) for m, weight in zip(made, weights, strict=True)]
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, where, "tools") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise InputError(f'{where}: "tools" is not a list of descriptions.')
    return Conversation(made, tools or None, trained, [not weight for weight in weights])


def _with_system(system: Any, made: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Messages that begin with the ``system`` beside them."""
    if not isinstance(system, str):
        raise InputError(f'{where}: "system" is not a string.')
    if any(message["role"] in ("system", "developer") for message in made):
        raise InputError(f'{where} has a system message and a "system" beside the messages; leave one of them out.')
    return [{"role": "system", "content": system}, *made]


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    made = {key: value for key, value in message.items() if value is not None}  # columns of a table are never absent
    if made.get("role") not in ROLES:
        raise InputError(f"{where} has the role {made.get('role')!r}; roles are {', '.join(ROLES)}.")
    content = made.get("content", "")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise InputError(f"{where} holds something else than text; images and sound are not trained on.")
        content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise InputError(f"{where} has no string content.")
    made["content"] = content
    if calls := made.pop("tool_calls", None):
        if not isinstance(calls, list):
            raise InputError(f"{where} has tool_calls that are no list.")
        made["tool_calls"] = [_call(call, where) for call in calls]
    if made["role"] == "assistant" and not content.strip() and "tool_calls" not in made:
        raise InputError(f"{where} is an assistant's turn without content; leave such rows out.")
    return made


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call whose arguments are an object, as templates expect them; OpenAI writes them as a string."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise InputError(f"{where} has a tool call without a name.")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments, where, "arguments")
    return _only(call, "id", "type") | {"function": {"name": inner["name"], "arguments": arguments}}


def _only(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: mapping[key] for key in keys if mapping.get(key) is not None}


def _json(text: str, where: str, name: str) -> Any:
    try:
        return parsed(text)
    except RepeatedKey as error:
        raise InputError(f"{where}: {name} has {error}; leave one of them out.") from None
    except (ValueError, RecursionError):
        raise InputError(f"{where}: {name} is not JSON.") from None
