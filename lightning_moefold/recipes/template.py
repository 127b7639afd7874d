# SPDX-License-Identifier: Apache-2.0
"""Conversations through a chat template, and which of their tokens are trained on.

What an assistant says is found in one of two ways:

    generation tags   the template marks it itself: ``{% generation %} ... {% endgeneration %}``
    turn prefixes     the text before turn i, with the header that asks for an answer, must begin the whole text, and so must the
                      text that ends with turn i; what lies between is the turn

A template that writes earlier turns otherwise than the last one (Qwen3 drops what was thought before) fulfils the second for
its last turn only. Such a conversation becomes one document for each turn that is trained on, which ends there: just what the
model is shown when it has to say that turn. A template that fulfils it for no turn is refused.

Legend: T tokens of a document.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_moefold.errors import InputError
from lightning_moefold.recipes.conversation import Conversation

TrainOn = Literal["assistant", "last", "all"]


class Kind(IntEnum):
    """What a document is."""

    TEXT = 0
    CHAT = 1
    UNDESIRED = 2  # a conversation that the model should not hold


class Document(NamedTuple):
    """Tokens, and what of them is trained on.

    Args:
        tokens: T ids.
        trained: T flags; None for all.
        kind: What it is.
    """

    tokens: list[int]
    trained: list[bool] | None = None
    kind: Kind = Kind.TEXT


class _Rendered(NamedTuple):
    """A text and the characters in it that are trained on, from and to; None for all."""

    text: str
    spans: list[tuple[int, int]] | None


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: Of ``transformers``.
        name: What the tokenizer is called in sentences.
        template: Jinja to use in place of the tokenizer's own.
        options: Further values that the template reads, such as ``{"enable_thinking": False}``.
        train_on: ``"assistant"`` for every turn of an assistant, ``"last"`` for the last one, ``"all"`` for all
            tokens but those of masked messages.

    Raises:
        InputError: If there is no template, or it does not tell roles apart.
    """

    def __init__(
        self, tokenizer: Any, name: str, template: str | None, options: dict[str, Any], train_on: TrainOn
    ) -> None:
        self._tokenizer, self._name, self._template = tokenizer, name, template
        self._options, self._train_on = options, train_on
        if template is None and not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer of {name} has no chat template, which conversations are written with; give chat_template, a "
                "file of jinja."
            )
        self._special = sorted({str(token) for token in tokenizer.added_tokens_decoder.values()})
        self._check_roles()

    def _check_roles(self) -> None:
        """Refuses a template that writes what a user says as it writes what an assistant says."""
        said: list[object] = []
        for roles in (("user", "assistant"), ("assistant", "user")):
            messages = [{"role": role, "content": text} for role, text in zip(roles, ("one", "two"), strict=True)]
            try:
                said.append(self._render(messages, None, False))
            except Exception:  # some refuse the second order, or the first
                said.append(object())
        if said[0] == said[1]:
            raise InputError(f"the chat template of {self._name} does not tell roles apart; give one that does.")

    # ---- rendering ---------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Any], tools: Any, prompt: bool) -> str:
        """The text of messages; with ``prompt``, what the model is given to say the next turn."""
        return self._tokenizer.apply_chat_template(
            list(messages), tools=tools, chat_template=self._template, add_generation_prompt=prompt, tokenize=False,
            **self._options,
        )  # fmt: skip

    def encode(self, talk: Conversation, where: str) -> list[Document]:
        """The documents that a conversation makes; none if nothing of it is to be trained on.

        Args:
            talk: The conversation.
            where: Its file and place.

        Raises:
            InputError: If the template does not take it, or leaves out a part of it.
        """
        # A turn that begins a conversation answers nothing.
        turns = [number for number, trained in enumerate(talk.trained) if trained and number]
        if self._train_on == "last":
            last = max(number for number, one in enumerate(talk.messages) if one["role"] == "assistant" or not number)
            turns = [number for number in turns if number == last]
        try:
            if self._train_on == "all":
                rendered = [] if all(talk.masked) else [self._all(talk, where)]
                for one in rendered:
                    self._check_whole(talk, len(talk.messages), one.text, where, turns)
            else:
                rendered = self._turns(talk, turns, where) if turns else []
        except InputError:
            raise
        except Exception as error:  # a template raises what it likes
            said = " ".join(str(error).split())
            raise InputError(
                f"{where}: the chat template of {self._name} does not take this conversation ({said[:200]})."
            ) from None
        return [self._tokenized(one, where) for one in rendered]

    def _all(self, talk: Conversation, where: str) -> _Rendered:
        """The whole conversation, of which all is trained on but messages that are masked."""
        text, masked = self._render(talk.messages, talk.tools, False), talk.masked
        borders = [n for n in range(1, len(masked)) if masked[n] != masked[n - 1]]
        if not borders:
            return _Rendered(text, None)
        places = {0: 0, len(masked): len(text)}
        for number in borders:
            # The header that asks for an answer is what the model is given, unless the answer is left out with it.
            prompt = talk.messages[number]["role"] == "assistant" and not masked[number]
            before = self._render(talk.messages[:number], talk.tools, prompt)
            if not text.startswith(before):
                raise InputError(
                    f"{where}: what the chat template of {self._name} writes before message {number + 1} is no beginning of what "
                    "it writes in all, so that what is not trained on cannot be told from the rest; give train_on='assistant'."
                )
            places[number] = len(before)
        begins = [n for n in (0, *borders) if not masked[n]]
        ends = [next(place for place in (*borders, len(masked)) if place > n) for n in begins]
        return _Rendered(text, [(places[a], places[b]) for a, b in zip(begins, ends, strict=True)])

    def _turns(self, talk: Conversation, turns: list[int], where: str) -> list[_Rendered]:
        """The conversation until the last turn that is trained on."""
        end = turns[-1] + 1
        tagged = self._by_tags(talk, turns, end, where)
        if tagged is not None:
            self._check_whole(talk, end, tagged.text, where, turns)
            return [tagged]
        whole = self._render(talk.messages[:end], talk.tools, False)
        spans = [self._span(talk, turn, whole, turn == end - 1) for turn in turns]
        if None not in spans:
            self._check_whole(talk, end, whole, where, turns)
            return [_Rendered(whole, [span for span in spans if span is not None])]
        made = []
        for turn in turns:
            text = self._render(talk.messages[: turn + 1], talk.tools, False)
            span = self._span(talk, turn, text, True)
            if span is None:
                raise InputError(
                    f"{where}: what the chat template of {self._name} writes before turn {turn + 1} is no beginning of what it "
                    "writes with that turn, so that the turn cannot be told from its prompt; give a template with generation "
                    "tags, or train_on='all'."
                )
            self._check_whole(talk, turn + 1, text, where, [turn])
            made.append(_Rendered(text, [span]))
        return made

    def _span(self, talk: Conversation, turn: int, whole: str, last: bool) -> tuple[int, int] | None:
        """The characters of a turn in a text that holds it, as its last turn maybe; None where prefixes do not tell."""
        before = self._render(talk.messages[:turn], talk.tools, True)
        after = whole if last else self._render(talk.messages[: turn + 1], talk.tools, False)
        if not (whole.startswith(after) and after.startswith(before)) or len(before) >= len(after):
            return None
        # White space that a template puts after the token that ends a turn is never said by the model.
        said = after.rstrip()
        ends = any(said.endswith(token) for token in self._special) and len(said) > len(before)
        return len(before), len(said) if ends else len(after)

    def _by_tags(self, talk: Conversation, turns: list[int], end: int, where: str) -> _Rendered | None:
        """By the template's generation tags; None where it has none.

        Raises:
            InputError: If they mark nothing, or not one part for each turn of an assistant.
        """
        template = self._template or self._tokenizer.get_chat_template(None, talk.tools)
        if not _has_tags(template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        constants = {**self._tokenizer.special_tokens_map, **self._options}
        [text], [spans] = render_jinja_template(
            conversations=[talk.messages[:end]], tools=talk.tools, chat_template=template,
            return_assistant_tokens_mask=True, **constants,
        )  # fmt: skip
        said = [number for number, message in enumerate(talk.messages[:end]) if message["role"] == "assistant"]
        if len(spans) != len(said):
            raise InputError(
                f"{where}: the generation tags in the chat template of {self._name} mark {len(spans)} parts of a conversation in "
                f"which an assistant speaks {len(said)} times; mend the template, or give train_on='all'."
            )
        return _Rendered(text, [tuple(span) for number, span in zip(said, spans, strict=True) if number in turns])

    def _check_whole(self, talk: Conversation, end: int, text: str, where: str, turns: Sequence[int]) -> None:
        """Refuses a template that leaves out a message, a tool or a call, or a thought of ``turns``.

        What an assistant has said in other turns may be shortened on purpose.
        """
        for number, message in enumerate(talk.messages[:end]):
            parts = [("tool call", call["function"]["name"]) for call in message.get("tool_calls", ())]
            if message["role"] != "assistant" or number in turns:
                parts.append(("content", _after_thought(message["content"])))
            if number in turns:
                parts.append(("reasoning_content", str(message.get("reasoning_content", "")).strip()))
            for kind, part in parts:
                if part not in text:
                    raise InputError(
                        f"{where}: the chat template of {self._name} leaves out the {kind} of message {number + 1} "
                        f"({message['role']}); give one that writes it."
                    )
        for tool in talk.tools or ():
            name = (tool.get("function", tool) if isinstance(tool, dict) else {}).get("name")
            if not isinstance(name, str):
                raise InputError(f"{where} describes a tool without a name: {json.dumps(tool)[:80]}.")
            if name not in text:
                raise InputError(
                    f"{where}: the chat template of {self._name} leaves out the tool {name!r}; give one that writes it."
                )

    # ---- tokens ------------------------------------------------------------------------------------------------

    def _tokenized(self, rendered: _Rendered, where: str) -> Document:
        """Tokens of the whole text; those that lie whole in a span are trained on.

        The tokens of the text until each end of a span must begin the tokens of the whole. Where letters on both sides of it
        make one token, that token is not trained on, as the model never says it in this place.
        """
        text, spans = rendered
        try:
            if spans is None:
                return Document(self._encode([text])[0], None, Kind.CHAT)
            places = sorted({place for span in spans for place in span} - {len(text)})
            tokens, *befores = self._encode([text, *(text[:place] for place in places)])
            counts = dict(zip(places, map(len, befores), strict=True)) | {len(text): len(tokens)}
            across = {place for place, before in zip(places, befores, strict=True) if tokens[: len(before)] != before}
            trained = [False] * len(tokens)
            for begin, end in spans:
                first, last = counts[begin], counts[end]
                if begin in across or end in across:
                    first, last = self._inside(text, begin, end, where)
                trained[first:last] = [True] * (last - first)
        except UnicodeError:  # half of a surrogate pair, which JSON can spell
            raise InputError(f"{where} holds characters that are no Unicode text; remove them.") from None
        return Document(tokens, trained, Kind.CHAT)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _inside(self, text: str, begin: int, end: int, where: str) -> tuple[int, int]:
        """The tokens that lie whole between two characters."""
        if not self._tokenizer.is_fast:
            raise InputError(
                f"{where}: the tokenizer of {self._name} makes one token of the end of a prompt and the beginning of a turn, and "
                "cannot tell which; use a fast tokenizer."
            )
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        inside = [n for n, (a, b) in enumerate(offsets["offset_mapping"]) if begin <= a and b <= end and a < b]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _has_tags(template: str) -> bool:
    """Whether a template marks what is generated."""
    return any(tag.split("%}")[0].strip("-+ \n\t") == "generation" for tag in template.split("{%")[1:])


def _after_thought(content: str) -> str:
    """What an assistant says after thinking; templates may write the thought apart."""
    return content.split("</think>")[-1].strip()


def read_template(path: str | None) -> str | None:
    """The jinja in a file.

    Raises:
        InputError: If it cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"chat_template {path} cannot be read ({error}); give a file of jinja.") from None
