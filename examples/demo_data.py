"""Data for the demo and the examples, made on the spot and without a network.

Text that every Python has (the language's own help topics), a tokenizer trained on it, and a small Qwen2-MoE
checkpoint in Hugging Face format.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

EOS = "<|endoftext|>"
PAD = "<|pad|>"
MANIFEST = "demo_manifest.json"


def read_python_topics() -> str:
    """The help topics of this Python, some 450,000 characters of English about the language."""
    return "\n\n".join(topics.topics[name].strip() for name in sorted(topics.topics))


def split_text(text: str, fraction: float) -> tuple[str, str]:
    """Cuts a text in two at a paragraph border; the first part has about `fraction` of the characters.

    The border is the last one that leaves the first part no longer than asked. A text without one is cut to the
    character.

    Raises:
        ValueError: If `fraction` is not between 0 and 1, or a part would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} must lie between 0 and 1")
    cut = int(len(text) * fraction)
    border = text.rfind("\n\n", 0, cut)
    first, second = (text[:border], text[border + 2 :]) if border > 0 else (text[:cut], text[cut:])
    if not first.strip() or not second.strip():
        raise ValueError(f"fraction={fraction} leaves a part of this text of {len(text)} characters empty")
    return first, second


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE: no text is unknown to it, and decoding gives back every byte.

    Args:
        text: The text to learn merges from.
        vocab_size: Number of tokens, the 256 bytes and the two special tokens included. A short text may not have
            as many merges; then the tokenizer is smaller.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"vocab_size={vocab_size} is too small: {len(alphabet)} bytes and 2 special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def demo_config(vocab_size: int, **overrides: object) -> Qwen2MoeConfig:
    """The shape of the demo's model, 6.4 million parameters with 4096 tokens.

    Heads, widths and experts divide by 4, so that tp2 dp2 with ep4, tp4, or pp2 with ep2 are legal folds.
    """
    shape: dict[str, object] = {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 512,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 192,
        "shared_expert_intermediate_size": 384,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": True,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    return Qwen2MoeConfig(**{"vocab_size": vocab_size, **shape, **overrides})


def write_demo_checkpoint(directory: str | Path, *, vocab_size: int = 4096, seed: int = 0, **overrides: object) -> Path:
    """Writes a small Qwen2-MoE with random weights, and its tokenizer, as `save_pretrained` would.

    The checkpoint is complete or invisible: it is written beside `directory` and renamed. Where the same one is
    there already nothing is done, so every rank of a job may call this.

    Args:
        directory: Where it goes. A checkpoint that this function wrote with other settings is replaced.
        vocab_size: Number of tokens of tokenizer and model.
        seed: Of the weights; the caller's random state is not touched.
        **overrides: Fields of :func:`demo_config`.

    Returns:
        The directory.

    Raises:
        FileExistsError: If `directory` holds something that this function did not write.
    """
    directory = Path(directory)
    text = read_python_topics()
    settings = {
        "config": demo_config(vocab_size, **overrides).to_dict(),
        "seed": seed,
        "text": hashlib.sha256(text.encode()).hexdigest(),
    }
    if _is_complete(directory, settings):
        return directory
    if directory.exists() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
        raise FileExistsError(f"{directory} is not empty and holds no demo checkpoint: choose another directory")

    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _write_model_and_tokenizer(draft, text, vocab_size, seed, overrides)
        sizes = {path.name: path.stat().st_size for path in sorted(draft.iterdir())}
        (draft / MANIFEST).write_text(json.dumps({"settings": settings, "sizes": sizes}, indent=1))
        draft.chmod(0o755)  # mkdtemp's directories are for their owner only
        _put_in_place(draft, directory, settings)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return directory


def _is_complete(directory: Path, settings: dict[str, object]) -> bool:
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        sizes = {name: (directory / name).stat().st_size for name in manifest["sizes"]}
    except (FileNotFoundError, NotADirectoryError):
        return False
    # Through JSON, which knows neither tuples nor integer keys.
    return sizes == manifest["sizes"] and manifest["settings"] == json.loads(json.dumps(settings))


def _write_model_and_tokenizer(
    directory: Path, text: str, vocab_size: int, seed: int, overrides: dict[str, object]
) -> None:
    tokenizer = train_tokenizer(text, vocab_size)
    tokenizer.save_pretrained(directory)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = demo_config(vocab_size, **special, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2MoeForCausalLM(config)
    # Several shards and an index, as large checkpoints have.
    model.save_pretrained(directory, max_shard_size="8MB")


def _put_in_place(draft: Path, directory: Path, settings: dict[str, object]) -> None:
    """Renames the draft to `directory`, where other processes may be doing the same."""
    for _ in range(10):
        try:
            os.rename(draft, directory)  # replaces nothing, or an empty directory
            return
        except OSError:
            if _is_complete(directory, settings):
                return  # another process was first
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
        try:
            os.rename(directory, old)
        except FileNotFoundError:
            pass  # another process has just moved it
        finally:
            shutil.rmtree(old)
    raise OSError(f"{directory} changes all the time: several processes write different checkpoints to it")
