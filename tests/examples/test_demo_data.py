"""The demo's data: text, tokenizer, checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import demo_data
from demo_data import read_python_topics, split_text, train_tokenizer, write_demo_checkpoint

VOCAB_SIZE = 512


@pytest.fixture(scope="module")
def text() -> str:
    return read_python_topics()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("demo") / "checkpoint", vocab_size=VOCAB_SIZE, seed=3)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path):
    return AutoTokenizer.from_pretrained(checkpoint)


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """What tells whether any file was written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.iterdir()}


def test_the_text_is_english_about_python(text):
    assert len(text) > 300_000
    assert 'The "while" statement is used for repeated execution' in text


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_split_cuts_at_a_paragraph_near_the_fraction(text, fraction):
    first, second = split_text(text, fraction)
    assert first + "\n\n" + second == text
    assert 0 <= fraction - len(first) / len(text) < 0.02


def test_split_of_one_paragraph_loses_nothing():
    assert split_text("abcdefghij", 0.7) == ("abcdefg", "hij")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 0.001])
def test_split_refuses_an_empty_part(fraction):
    with pytest.raises(ValueError, match="fraction"):
        split_text("one paragraph\n\nanother", fraction)


def test_tokenizer_gives_back_every_byte(tokenizer):
    sample = "def f(x):\n\treturn 'naïve 東京 🙂'\n\n\n  # two  spaces\r\n"
    assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample


def test_tokenizer_survives_saving(text, tokenizer):
    fresh = train_tokenizer(text, VOCAB_SIZE)
    assert tokenizer.get_vocab() == fresh.get_vocab()
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.eos_token, tokenizer.pad_token) == (demo_data.EOS, demo_data.PAD)
    assert tokenizer(text[:5000])["input_ids"] == fresh(text[:5000])["input_ids"]


def test_tokenizer_refuses_a_vocabulary_smaller_than_the_bytes(text):
    with pytest.raises(ValueError, match="vocab_size=257"):
        train_tokenizer(text, 257)


def test_checkpoint_loads_in_transformers(checkpoint, tokenizer):
    model, report = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.model_type == "qwen2_moe"
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    input_ids = torch.randint(VOCAB_SIZE, (2, 16))
    output = model(input_ids=input_ids, labels=input_ids)
    assert torch.isfinite(output.loss)
    assert output.aux_loss > 0


def test_checkpoint_has_shards_with_the_names_of_every_expert(checkpoint):
    weight_map = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 1
    assert "model.layers.3.mlp.experts.7.down_proj.weight" in weight_map
    for shard in set(weight_map.values()):
        with safe_open(checkpoint / shard, framework="pt") as tensors:
            assert set(tensors.keys()) == {name for name, home in weight_map.items() if home == shard}


def test_demo_model_has_the_promised_size_and_divides():
    config = demo_data.demo_config(4096)
    with torch.device("meta"):
        model = demo_data.Qwen2MoeForCausalLM(config)
    assert 5e6 < sum(parameter.numel() for parameter in model.parameters()) < 10e6
    for size in (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.num_experts,
        config.moe_intermediate_size,
        config.shared_expert_intermediate_size,
        config.hidden_size,
        config.num_hidden_layers,
    ):
        assert size % 4 == 0
    assert not config.tie_word_embeddings


def test_checkpoint_is_written_once(checkpoint):
    before = snapshot(checkpoint)
    assert write_demo_checkpoint(checkpoint, vocab_size=VOCAB_SIZE, seed=3) == checkpoint
    assert snapshot(checkpoint) == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_seed_fixes_the_weights_and_leaves_the_callers_random_state(checkpoint, tmp_path):
    state = torch.get_rng_state()
    same = write_demo_checkpoint(tmp_path / "same", vocab_size=VOCAB_SIZE, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    other = write_demo_checkpoint(tmp_path / "other", vocab_size=VOCAB_SIZE, seed=4)
    shard = sorted(path.name for path in checkpoint.glob("*.safetensors"))[0]
    assert (same / shard).read_bytes() == (checkpoint / shard).read_bytes()
    assert (other / shard).read_bytes() != (checkpoint / shard).read_bytes()


def test_incomplete_or_other_checkpoint_is_replaced(tmp_path):
    directory = write_demo_checkpoint(tmp_path / "checkpoint", vocab_size=VOCAB_SIZE)
    shard = next(directory.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    write_demo_checkpoint(directory, vocab_size=VOCAB_SIZE)
    assert shard.read_bytes() == whole

    write_demo_checkpoint(directory, vocab_size=300)
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == 300
    assert list(tmp_path.iterdir()) == [directory]


def test_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        write_demo_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_first_writer_wins_a_race(tmp_path, monkeypatch):
    directory = tmp_path / "checkpoint"
    write_model = demo_data._write_model_and_tokenizer
    inodes = []

    def overtaken(draft, *arguments):
        monkeypatch.setattr(demo_data, "_write_model_and_tokenizer", write_model)
        write_demo_checkpoint(directory, vocab_size=VOCAB_SIZE)
        inodes.append(directory.stat().st_ino)
        write_model(draft, *arguments)

    monkeypatch.setattr(demo_data, "_write_model_and_tokenizer", overtaken)
    write_demo_checkpoint(directory, vocab_size=VOCAB_SIZE)
    assert [directory.stat().st_ino] == inodes
    assert list(tmp_path.iterdir()) == [directory]


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(demo_data, "_write_model_and_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        write_demo_checkpoint(tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []
