# SPDX-License-Identifier: Apache-2.0
"""From conversations to tokens, and which of these are trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_moefold.recipes import InputError
from lightning_moefold.recipes.conversation import read_feedback, read_preference, read_row
from lightning_moefold.recipes.template import Document
from lightning_moefold.recipes.tokenizing import Encoder, Reading
from tests.recipes import chats
from tests.recipes.chats import CALLS, TALK, TEMPLATES, TOOLS, chat_tokenizer

FAMILIES = {
    "mixtral": (chats.mixtral, {"bos": "<s>", "eos": "</s>"}),
    "qwen2": (chats.qwen2, {}),
    "qwen2_tagged": (chats.qwen2, {}),
    "qwen3": (chats.qwen3, {}),
}
THOUGHT = [
    {"role": "user", "content": "What is one and one?"},
    {"role": "assistant", "content": "<think>\nOne and one.\n</think>\n\nTwo."},
    {"role": "user", "content": "And one more?"},
    {"role": "assistant", "content": "<think>\nTwo and one.\n</think>\n\nThree."},
]


def encode(folder: Path, row: dict[str, Any], **reading: Any) -> list[Document]:
    return Encoder(Reading(str(folder), **reading)).encode(row, "", "a.jsonl, line 1")


def said(folder: Path, documents: list[Document]) -> list[str]:
    """What each document is trained on."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.decode([t for t, on in zip(d.tokens, d.trained, strict=True) if on]) for d in documents]


@pytest.mark.parametrize("train_on", ["assistant", "last"])
@pytest.mark.parametrize("talk", [TALK, TALK[1:], TALK[:3], [*TALK, {"role": "user", "content": "Why?"}]])
@pytest.mark.parametrize("family", FAMILIES)
def test_templates_of_our_families_token_by_token(tmp_path, family, talk, train_on):
    oracle, tokens = FAMILIES[family]
    chat_tokenizer(tmp_path, family, **tokens)
    turns = [number for number, message in enumerate(talk) if message["role"] == "assistant"]
    found = encode(tmp_path, {"messages": talk}, train_on=train_on)
    talk = talk[: turns[-1] + 1]  # what follows the last answer is left out
    wanted = oracle(talk, set(turns[-1:] if train_on == "last" else turns))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert [document[:2] for document in found] == [chats.expected(tokenizer, parts) for parts in wanted]


def test_a_template_that_drops_thoughts_makes_a_document_of_every_turn(tmp_path):
    chat_tokenizer(tmp_path, "qwen3")
    found = encode(tmp_path, {"messages": THOUGHT})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert [d[:2] for d in found] == [chats.expected(tokenizer, p) for p in chats.qwen3(THOUGHT, {1, 3})]
    assert said(tmp_path, found) == [
        "<think>\nOne and one.\n</think>\n\nTwo.<|im_end|>", "<think>\nTwo and one.\n</think>\n\nThree.<|im_end|>"
    ]  # fmt: skip
    assert "One and one." not in tokenizer.decode(found[1].tokens)
    quiet = encode(tmp_path, {"messages": TALK}, template_options={"enable_thinking": False})
    assert said(tmp_path, quiet) == ["Two.<|im_end|>", "Three, I think.<|im_end|>"]


def test_all_tokens(tmp_path):
    chat_tokenizer(tmp_path, "qwen2")
    [document] = encode(tmp_path, {"messages": TALK}, train_on="all")
    assert document.trained is None
    assert AutoTokenizer.from_pretrained(tmp_path).decode(document.tokens) == "".join(
        part for part, _ in chats.qwen2(TALK, set())[0]
    )


def test_generation_tags_mark_what_transformers_marks(tmp_path):
    chat_tokenizer(tmp_path, "qwen2_tagged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    wanted = tokenizer.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    [found] = encode(tmp_path, {"messages": TALK})
    assert found.tokens == wanted["input_ids"]
    assert found.trained == [bool(flag) for flag in wanted["assistant_masks"]]


def test_tool_calls(tmp_path):
    chat_tokenizer(tmp_path, "qwen3")
    found = encode(tmp_path, {"messages": CALLS, "tools": TOOLS})
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 1}}\n</tool_call><|im_end|>'
    assert said(tmp_path, found) == [f"<think>\n\n</think>\n\n{call}", "<think>\n\n</think>\n\nTwo.<|im_end|>"]
    spelled = json.loads(json.dumps(CALLS))
    spelled[1] |= {"content": None}
    spelled[1]["tool_calls"][0]["function"]["arguments"] = '{"a": 1, "b": 1}'  # as OpenAI spells them
    assert encode(tmp_path, {"messages": spelled, "tools": json.dumps(TOOLS)}) == found


def test_a_token_across_the_border_of_a_turn_is_not_trained_on(tmp_path):
    """A line feed that begins an answer makes one token with that which ends the prompt."""
    chat_tokenizer(tmp_path, "qwen2")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nWhat is one and one?"}]
    [found] = encode(tmp_path, {"messages": talk})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("assistant\n\nWhat") != tokenizer.tokenize("assistant\n") + tokenizer.tokenize("\nWhat")
    assert found[:2] == chats.expected(tokenizer, chats.qwen2(talk, {1})[0])
    assert any(found.trained)


QA = {"question": "What is one and one?", "answer": "Two."}
SPELLINGS = [
    {"messages": [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{answer}"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "{question}"}]},
                  {"role": "assistant", "content": "{answer}", "tool_calls": None, "weight": 1}], "tools": None},
    {"conversations": [{"from": "human", "value": "{question}"}, {"from": "gpt", "value": "{answer}"}]},
    {"conversations": [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{answer}"}]},
    {"instruction": "{question}", "input": "", "output": "{answer}"},
    {"prompt": "{question}", "completion": "{answer}"},
    {"prompt": [{"role": "user", "content": "{question}"}], "completion": [{"role": "assistant", "content": "{answer}"}]},
]  # fmt: skip


@pytest.mark.parametrize("row", SPELLINGS)
def test_spellings(row):
    filled = json.loads(json.dumps(row).replace("{question}", QA["question"]).replace("{answer}", QA["answer"]))
    talk = read_row(filled, "a.jsonl, line 1")
    said = [(message["role"], message["content"]) for message in talk.messages]
    assert said == [("user", QA["question"]), ("assistant", QA["answer"])]
    assert talk.trained == [False, True]
    assert talk.tools is None


def test_other_parts_of_spellings():
    alpaca = {"instruction": "Add.", "input": "1 1", "output": "2", "system": "Be brief.", "history": [["a", "b"]]}
    talk = read_row(alpaca, "")
    assert [m["content"] for m in talk.messages] == ["Be brief.", "a", "b", "Add.\n1 1", "2"]
    assert talk.trained == [False, False, True, False, True]
    turns = [("human", "One and one?"), ("function_call", '{"name": "add", "arguments": {"a": 1}}'),
             ("observation", "2"), ("gpt", "Two.")]  # fmt: skip
    shared = {"conversations": [{"from": who, "value": value} for who, value in turns], "system": "S"}
    talk = read_row(shared, "")
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert talk.messages[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    weighed = {"messages": [dict(message, weight=0) if message["content"] == "Two." else message for message in TALK]}
    assert read_row(weighed, "").trained == [False, False, False, False, True]
    prompt = {"prompt": TALK[:4], "completion": TALK[4:]}
    assert read_row(prompt, "").trained == [False, False, False, False, True]
    both = {"instruction": "a", "output": "b", "text": "a b"}
    with pytest.raises(InputError, match="several ways; say format='text' or 'alpaca'"):
        read_row(both, "a.jsonl, line 1")
    assert read_row(both, "", "text") == "a b"


U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
S, B = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "No"}
BESIDE = [
    {"messages": [U, A]},
    {"conversations": [U, A]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    {"instruction": "Hi", "output": "Ho"},
    {"prompt": "Hi", "completion": "Ho"},
    {"prompt": [U], "completion": [U, A]},
]


@pytest.mark.parametrize("row", BESIDE)
def test_a_system_beside_the_messages_is_the_first_of_them(row):
    talk = read_row(row | {"system": "Be brief."}, "")
    assert talk.messages == [S, U, A]
    assert talk.trained == [False, False, True]
    assert read_row(row | {"system": ""}, "").messages == read_row(row, "").messages == [U, A]
    with pytest.raises(InputError, match='"system" is not a string'):
        read_row(row | {"system": ["Be brief."]}, "")


def test_a_system_beside_preferences_and_feedback():
    system = {"system": "Be brief."}
    for row in ({"prompt": "Hi", "chosen": "Ho", "rejected": "No"}, {"chosen": [U, A], "rejected": [U, B]}):
        both = read_preference(row | system, "")
        assert [talk.messages for talk in both] == [[S, U, A], [S, U, B]]
        assert [talk.trained for talk in both] == [[False, False, True]] * 2
    assert read_feedback({"prompt": "Hi", "completion": "Ho", "label": True} | system, "")[0].messages == [S, U, A]
    other = {"role": "user", "content": "Hey"}
    with pytest.raises(InputError, match="begin with different messages"):
        read_preference({"chosen": [U, A], "rejected": [other, B]} | system, "")


@pytest.mark.parametrize("prompt", ["Hi", [U], [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]])
def test_an_answer_that_repeats_its_prompt_is_read_without_it(prompt):
    both = read_preference({"prompt": prompt, "chosen": [U, A], "rejected": [B]}, "")
    assert [talk.messages for talk in both] == [[U, A], [U, B]]
    assert [(talk.trained, talk.masked) for talk in both] == [([False, True], [True, False])] * 2
    assert read_feedback({"prompt": prompt, "completion": [U, A], "label": True}, "")[0].messages == [U, A]
    longer = read_row({"prompt": [U, A], "completion": [U, B]}, "")  # another question is no repetition
    assert longer.messages == [U, A, U, B]
    assert longer.trained == [False, False, False, True]


def test_a_call_with_weight_0_is_not_trained_on():
    turns = [{"from": "human", "value": "Add."}, {"from": "function_call", "value": '{"name": "add"}', "weight": 0},
             {"from": "observation", "value": "2"}, {"from": "gpt", "value": "Two."}]  # fmt: skip
    assert read_row({"conversations": turns}, "").trained == [False, False, False, True]


def test_a_last_turn_with_weight_0_leaves_nothing_to_train_on(tmp_path):
    chat_tokenizer(tmp_path, "qwen2")
    row = {"messages": [*TALK[:4], TALK[4] | {"weight": 0}]}
    assert encode(tmp_path, row, train_on="last") == []
    assert said(tmp_path, encode(tmp_path, row)) == ["Two.<|im_end|>"]
    [found] = encode(tmp_path, {"messages": [*TALK, TALK[1]]}, train_on="last")
    assert said(tmp_path, [found]) == ["Three, I think.<|im_end|>"]


def test_all_is_trained_on_but_messages_with_weight_0_and_prompts(tmp_path):
    chat_tokenizer(tmp_path, "qwen2")
    weighed = {"messages": [TALK[0], TALK[1], TALK[2] | {"weight": 0}, TALK[3] | {"weight": 1}, TALK[4]]}
    found = encode(tmp_path, weighed, train_on="all")
    assert found[0].tokens == encode(tmp_path, {"messages": TALK}, train_on="all")[0].tokens
    parts = chats.qwen2(TALK, {4})[0]
    whole = "".join(part for part, _ in parts)
    assert said(tmp_path, found) == [whole.replace("<|im_start|>assistant\nTwo.<|im_end|>\n", "")]
    prompted = {"prompt": TALK[:4], "completion": [*TALK[4:], U]}
    assert said(tmp_path, encode(tmp_path, prompted, train_on="all")) == [
        "Three, I think.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    ]
    nothing = {"messages": [message | {"weight": 0} for message in TALK]}
    assert encode(tmp_path, nothing, train_on="all") == []
    chat_tokenizer(tmp_path / "other", BACKWARDS)
    with pytest.raises(
        InputError, match="what is not trained on cannot be told from the rest; give train_on='assistant'"
    ):
        encode(tmp_path / "other", weighed, train_on="all")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [U, {"role": "assistant", "content": "  "}]}, "line 1, message 2 is an assistant's turn without content"),
        ({"messages": [U, {"role": "assistant", "content": None}]}, "message 2 is an assistant's turn without content"),
        ({"messages": [U, {"role": "bot", "content": "Ho"}]}, "message 2 has the role 'bot'; roles are system"),
        ({"messages": [U, {"role": "assistant", "content": 7}]}, "message 2 has no string content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, A]}, "something else than text"),
        ({"messages": []}, "no list of messages"),
        ({"messages": [U, A | {"weight": 0.5}]}, "neither 0 nor 1"),
        ({"messages": [U, A | {"tool_calls": [{"function": {}}]}]}, "a tool call without a name"),
        ({"messages": [U, A], "tools": "{"}, "tools is not JSON"),
        ({"conversations": [{"from": "me", "value": "Hi"}]}, "a turn from 'me'; turns have a string"),
        ({"conversations": [{"from": ["x"], "value": "Hi"}]}, r"a turn from \['x'\]; turns have a string"),
        ({"instruction": "a", "output": "b", "history": 5}, '"history" is not a list of pairs'),
        ({"messages": [U, A | {"tool_calls": 5}]}, "message 2 has tool_calls that are no list"),
        ({"messages": [U, A], "tools": "[" * 100_000}, "tools is not JSON"),
        ({"messages": [U, A], "tools": '[{"name": "a", "name": "b"}]'}, "tools has the key 'name' twice; leave one of them out"),
        ({"messages": [S, U, A], "system": "Be kind."}, 'a system message and a "system" beside the messages'),
        ({"prompt": "Hi", "completion": [S, U, A]}, "begins with a message of 'system' that does not belong to the whole prompt"),
        ({"prompt": [S, U], "completion": [U, A]}, "begins with a message of 'user' that does not belong to the whole prompt"),
        ({"prompt": "Hi", "completion": [U]}, "an answer holds nothing but its prompt"),
        ({"prompt": "a", "completion": 3}, "must be strings or lists"),
        ({"instruction": 3, "output": "a"}, "must be strings"),
        ({"question": "a"}, "not a JSON object with \"text\", or \"messages\", .*; its keys are 'question'"),
    ],
)  # fmt: skip
def test_wrong_rows(row, message):
    with pytest.raises(InputError, match=message) as caught:
        read_row(row, "a.jsonl, line 1")
    assert str(caught.value).startswith("a.jsonl, line 1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["messages", "sharegpt", "alpaca", "prompt_completion"])
def test_a_bare_string_is_no_conversation(form):
    assert read_row("words", "", "auto") == read_row("words", "", "text") == "words"
    with pytest.raises(InputError, match='a.txt is not a JSON object with "'):
        read_row("words", "a.txt", form)


FLAT = "{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}"
BACKWARDS = "{% for m in messages | reverse %}{{ m.role + ' ' + m.content + '\\n' }}{% endfor %}"
DEAF = "{% for m in messages if m.role != 'system' %}{{ m.role + ' ' + m.content + '\\n' }}{% endfor %}"
TAGS = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{% generation %}{% endgeneration %}"


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (None, {"messages": [U, A]}, "has no chat template"),
        (FLAT, {"messages": [U, A]}, "does not tell roles apart"),
        (BACKWARDS, {"messages": [U, A]}, "is no beginning of what it writes with that turn"),
        (DEAF, {"messages": TALK}, r"leaves out the content of message 1 \(system\)"),
        ("qwen2", {"messages": [U, A], "tools": TOOLS}, "leaves out the tool 'add'"),
        ("qwen2", {"messages": [U, A | {"reasoning_content": "Hm."}]}, "leaves out the reasoning_content of message 2"),
        ("qwen2", {"messages": CALLS}, "leaves out the tool call of message 2"),
        ("mixtral", {"messages": [U, U, A]}, "does not take this conversation .*roles must alternate"),
        (TAGS, {"messages": [*TALK]}, "mark 1 parts of a conversation in which an assistant speaks 2 times"),
    ],
)
def test_templates_that_cannot_be_trained_with(tmp_path, template, row, message):
    chat_tokenizer(tmp_path, template, bos="<s>")
    with pytest.raises(InputError, match=message) as caught:
        encode(tmp_path, row)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_small_templates_write_what_those_of_the_families_write(tmp_path, name):
    """Against the files that trl carries: Qwen3's is the published one, Qwen2.5's differs from Qwen2's in one sentence."""
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    published = (folder / {"qwen3": "qwen3.jinja", "qwen2": "qwen2_5.jinja"}[name]).read_text()
    published = published.replace("You are Qwen, created by Alibaba Cloud. You are", "You are")
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer(tmp_path, name))
    cases = [TALK, TALK[1:], TALK[:4], THOUGHT, *([CALLS, CALLS[:2], CALLS[:4]] if name == "qwen3" else [])]
    for talk in cases:
        for prompt in (True, False):
            options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt}
            ours = tokenizer.apply_chat_template(talk, **options)
            assert ours == tokenizer.apply_chat_template(talk, chat_template=published, **options)


def test_a_template_of_a_file(tmp_path):
    chat_tokenizer(tmp_path, None)
    file = str(TEMPLATES / "qwen2.jinja")
    assert said(tmp_path, encode(tmp_path, {"messages": TALK[:3]}, chat_template=file)) == ["Two.<|im_end|>"]
    with pytest.raises(InputError, match=r"chat_template .*nowhere.jinja cannot be read"):
        encode(tmp_path, {"messages": TALK}, chat_template="nowhere.jinja")
