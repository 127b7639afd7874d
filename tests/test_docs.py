# SPDX-License-Identifier: Apache-2.0
"""The Python code in README and docs runs."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import yaml

from lightning_moefold import MoECausalLM
from lightning_moefold.testing import PoolEnvironment, RankPool, make_checkpoint
from tests.quick import quick
from tests.recipes.chats import TALK, chat_tokenizer, write

ROOT = Path(__file__).parents[1]
PAGES = [
    f"docs/{name}.md"
    for name in (
        "data",
        "preference",
        "distillation",
        "networks",
        "routers",
        "folds",
        "training",
        "pipeline",
        "planner",
        "inference",
        "dispatch",
        "balance",
        "adapters",
        "compression",
    )
]


def test_the_site_has_every_page_and_the_reference_names_what_exists() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def listed(part: Any) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [page for inner in (part.values() if isinstance(part, dict) else part) for page in listed(inner)]

    docs = ROOT / "docs"
    outside = {"benchmarks/RESULTS.md", "CHANGELOG.md"}
    pages = listed(site["nav"])
    assert len(pages) == len(set(pages))
    assert set(pages) - outside == {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert all((ROOT / page).exists() for page in outside)
    named = re.findall(r"^::: (\S+)$", "\n".join(p.read_text() for p in (docs / "reference").iterdir()), re.MULTILINE)
    assert len(named) > 40
    for name in named:
        assert pkgutil.resolve_name(name).__doc__, name


def test_links_lead_somewhere() -> None:
    """Files and headings; `make docs` checks the same of the site."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target, heading in re.findall(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]*))?\)", text):
            file = page.parent / target if target else page
            assert file.exists(), f"{page}: {target}"
            assert not heading or heading in headings(file), f"{page}: {target}#{heading}"


def headings(page: Path) -> set[str]:
    """Anchors of a page, as MkDocs and GitHub name them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def names_of(page: str, folder: Path) -> dict[str, Any]:
    """What a page's code takes as given."""
    for name in ("teacher", "student") if page == "docs/distillation.md" else ():
        make_checkpoint(folder / name, "mixtral")
    if page in ("docs/data.md", "docs/preference.md"):
        pairs = [{"prompt": "Hi", "chosen": f"Ho {n}", "rejected": "No"} for n in range(20)]
        write(folder / "pairs.jsonl", pairs)
        chat_tokenizer(folder / "path" / "to" / "checkpoint", "qwen2")
        write(folder / "chats.jsonl", [{"messages": TALK[: 2 * n + 3]} for n in (0, 1) for _ in range(10)])
    if page in ("docs/adapters.md", "docs/compression.md"):
        wide = {"hidden_size": 64, "intermediate_size": 64} if page == "docs/adapters.md" else {}  # whole blocks
        make_checkpoint(folder / "model", "mixtral", **wide)
    if page != "docs/inference.md":
        return {"__name__": "docs"}
    model = MoECausalLM.from_pretrained(make_checkpoint(folder / "model", "mixtral"), output_router_logits=True)
    ids = torch.randint(3, 90, (2, 5))
    return {
        "__name__": "docs", "torch": torch, "Finetune": L.LightningModule, "model": model, "scores": [],
        "my_batches": [{"input_ids": ids}], "input_ids": ids, "attention_mask": torch.ones_like(ids),
    }  # fmt: skip


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = names_of(page, tmp_path)
    code = blocks(page)
    assert code
    for block in code:
        exec(compile(block, page, "exec", dont_inherit=True), names)


class _ShortTrainer(L.Trainer):
    """The page's Trainer on the ranks of the pool, for two steps."""

    def __init__(self, **arguments: Any) -> None:
        here = {"accelerator": "cpu", "plugins": [PoolEnvironment()], "max_steps": 2, "logger": False}
        super().__init__(**{**arguments, **here, "enable_progress_bar": False, "enable_checkpointing": False})


def run_on_a_rank(code: list[str], folder: str) -> list[str]:
    """Executes a page in a folder with a checkpoint where the page says; returns what it has written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(L, "Trainer", _ShortTrainer)
        rows = [torch.randint(96, (8,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
        names: dict[str, Any] = {"__name__": "docs", "token_rows": rows}
        for block in code:
            exec(compile(block, "README.md", "exec"), names)
    dist.barrier()
    return sorted(path.name for path in Path(folder, "finetuned").iterdir())


@pytest.mark.parametrize("page", quick(["README.md", "docs/getting-started.md"], "README.md"))
def test_code_of_a_page_runs_on_four_ranks(pool: RankPool, tmp_path: Path, page: str) -> None:
    make_checkpoint(tmp_path / "path" / "to" / "checkpoint", "qwen2_moe")
    code = [block for block in blocks(page) if not block.startswith("trainer = ")]  # a fragment
    assert code
    for written in pool.run(run_on_a_rank, code, str(tmp_path), ranks=4):
        assert "config.json" in written
        assert any(name.endswith(".safetensors") for name in written)
