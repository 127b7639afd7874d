# SPDX-License-Identifier: Apache-2.0
"""What lies beside the weights goes along with them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_moefold import MoECausalLM
from lightning_moefold.checkpoint.side_files import files_to_carry, side_files, warn_of_end
from lightning_moefold.testing import make_checkpoint

CARRIED = (
    "LICENSE", "README.md", "added_tokens.json", "additional_chat_templates/tool_use.jinja", "chat_template.jinja",
    "chat_template.json", "encoding/encode.py", "generation_config.json", "merges.txt", "modeling_own.py",
    "preprocessor_config.json", "qwen.tiktoken", "special_tokens_map.json", "spiece.model", "tekken.json",
    "tokenization_own.py", "tokenizer.json", "tokenizer.model.v3", "tokenizer_config.json", "vocab.bpe",
)  # fmt: skip
LEFT = (
    ".cache/huggingface/a.lock", ".gitattributes", "__pycache__/tokenization_own.cpython-311.pyc", "adapter_config.json",
    "config.json", "model.safetensors", "model.safetensors.index.json", "original/consolidated.00.pth",
    "original/tokenizer.model", "params.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "runs/1/last.ckpt",
    "runs/1/metrics.csv", "consolidated.safetensors", "model.gguf",
)  # fmt: skip


CHAT = [{"role": "user", "content": "a"}]


def fill(folder: Path, names: tuple[str, ...], content: str = "") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content or name)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text("latin-1") for p in folder.rglob("*") if p.is_file()}


def test_everything_but_weights_index_and_config_is_carried(tmp_path):
    fill(tmp_path, CARRIED + LEFT)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert sorted(side_files(tmp_path)) == sorted(CARRIED)


def test_another_tokenizer_replaces_all_files_of_the_first(tmp_path):
    model = fill(tmp_path / "model", CARRIED)
    other = fill(tmp_path / "other", ("config.json", "tokenizer.json", "README.md", "model.safetensors", "words.py"))
    (other / "tokenizer_config.json").write_text("{}")
    own = (
        "LICENSE", "README.md", "encoding/encode.py", "generation_config.json", "modeling_own.py",
        "preprocessor_config.json",
    )  # fmt: skip
    carried = files_to_carry(model, other)
    assert {name: path.parent.name for name, path in carried.items()} == {
        **{name: Path(name).parent.name or "model" for name in own},
        "tokenizer.json": "other",
        "tokenizer_config.json": "other",
    }
    (other / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["words.Words", None]}}))
    assert files_to_carry(model, other)["words.py"] == other / "words.py"
    assert sorted(files_to_carry(model, model)) == sorted(CARRIED)
    assert sorted(files_to_carry(None, other)) == ["tokenizer.json", "tokenizer_config.json", "words.py"]


def test_a_directory_that_is_gone_is_said(tmp_path):
    model = fill(tmp_path / "model", CARRIED)
    with pytest.warns(UserWarning, match="trained with cannot be exported, as .*gone is gone"):
        assert sorted(files_to_carry(model, tmp_path / "gone")) == sorted(CARRIED)
    with pytest.warns(UserWarning, match="beside the weights cannot be exported, as .*gone is gone"):
        assert files_to_carry(tmp_path / "gone", None) == {}


@pytest.mark.parametrize(("stops", "warned"), [(1, False), ([4, 1], False), (2, True), ([2, 4], True), (None, True)])
@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_a_tokenizer_that_ends_texts_otherwise_is_said(tmp_path, stops, warned, place):
    words(tmp_path, "abc")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    fields, carried = {"eos_token_id": 1}, {"generation_config.json": tmp_path / "generation_config.json"}
    if place == "config.json":
        fields, carried = {"eos_token_id": stops}, {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_of_end(tmp_path, fields, carried)
    assert [
        f"token 1, but generation from this export stops at eos_token_id={stops};" in str(w.message) for w in said
    ] == ([True] if warned else [])


def words(path: Path, tokens: str) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "</s>": 1} | {token: 2 + i for i, token in enumerate(tokens)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
    fast.chat_template = {"default": f"{tokens} default", "tool_use": f"{tokens} tools"}
    fast.save_pretrained(path)
    return fast


@pytest.mark.filterwarnings("ignore:router_aux_loss_coef")
def test_an_export_has_the_tokenizer_and_its_templates(tmp_path):
    path = make_checkpoint(tmp_path / "model", "qwen3_moe")
    words(path, "abc")
    fill(path, ("tokenizer.model.v3", "LICENSE"))
    model, out = MoECausalLM.from_pretrained(path), tmp_path / "out"
    model.save_pretrained(out)
    beside = side_files(path)
    assert {name: text for name, text in contents(path).items() if name in beside}.items() <= contents(out).items()
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded("cab")["input_ids"] == [4, 2, 3]
    assert loaded.apply_chat_template(CHAT, chat_template="tool_use", tokenize=False) == "abc tools"

    words(tmp_path / "other", "cba")
    model.tokenizer_path = tmp_path / "other"
    with pytest.warns(UserWarning, match="ends texts with token 1, but generation .* eos_token_id=(None|2|7)"):
        model.save_pretrained(out)  # replaces its own files
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded("cab")["input_ids"] == [2, 4, 3]
    assert loaded.apply_chat_template(CHAT, chat_template="tool_use", tokenize=False) == "cba tools"
    assert not (out / "tokenizer.model.v3").exists()
    assert (out / "LICENSE").read_text() == "LICENSE"

    before = contents(path)
    model.save_pretrained(path)  # over the model that it came from
    assert (before.keys() | {"checksums.json"}) - {"tokenizer.model.v3"} == contents(path).keys()


@pytest.mark.filterwarnings("ignore:router_aux_loss_coef")
@pytest.mark.parametrize(
    "name", ["notes.md", "LICENSE", "data/a.txt", "additional_chat_templates/a.py", "pytorch_model.bin"]
)
def test_a_directory_with_files_of_somebodys_own_is_not_replaced(tmp_path, name):
    path = make_checkpoint(tmp_path / "model", "qwen3_moe")
    fill(path, ("LICENSE", "assets/logo.svg"))
    model, out = MoECausalLM.from_pretrained(path), tmp_path / "out"
    model.save_pretrained(out)
    model.save_pretrained(out)
    fill(out, (name,), "mine")
    before = sorted(out.rglob("*"))
    with pytest.raises(FileExistsError, match=f"holds '{name}', which is no part of a checkpoint"):
        model.save_pretrained(out)
    assert sorted(out.rglob("*")) == before
    assert (out / name).read_text() == "mine"
