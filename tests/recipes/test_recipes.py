# SPDX-License-Identifier: Apache-2.0
"""Every recipe can be read, and holds what the planner gives for its model and machine."""

from __future__ import annotations

import importlib.util
import inspect
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_moefold import Fold, MoEFoldStrategy
from lightning_moefold.planner.search.models_zoo import MODELS
from lightning_moefold.recipes import FineTuneModule, TextData

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("make_recipes", ROOT / "scripts" / "make_recipes.py")
assert spec is not None
assert spec.loader is not None
make_recipes: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_recipes)
#: Nothing fits: the base alone takes more than a GPU has.
NONE = [("mixtral-8x7b", 1), ("qwen2-57b-a14b", 1)]
CASES = [case for case in product(make_recipes.CHECKPOINTS, make_recipes.BATCHES) if case not in NONE]
#: All parameters do not fit, with float32 weights or copies of them.
LORA = [("mixtral-8x7b", 8), ("qwen1.5-moe-a2.7b", 1), ("qwen2-57b-a14b", 8), ("qwen3-30b-a3b", 1)]


@pytest.mark.parametrize(("model", "gpus"), CASES)
def test_recipe(model: str, gpus: int) -> None:
    text = (ROOT / "recipes" / make_recipes.name_of(model, gpus)).read_text()
    assert text == make_recipes.recipe(model, gpus), "run scripts/make_recipes.py"
    config = yaml.safe_load(text)
    trainer, given = config["trainer"], config["trainer"]["strategy"]["init_args"]
    strategy = MoEFoldStrategy(**given)
    sizes = {name: size for name, size in given.items() if name.endswith("_parallel_size")}
    fold = Fold(trainer["devices"] * trainer["num_nodes"], **sizes)
    assert fold.world_size == gpus
    fold.validate(MODELS[model])
    strategy.settings.check_pipeline(fold.pp)
    for part, kind in (("model", FineTuneModule), ("data", TextData)):  # made with a name on the hub, they would ask it
        assert config[part]["class_path"] == f"lightning_moefold.recipes.{kind.__name__}"
        inspect.signature(kind).bind(**config[part]["init_args"])
    adapter, precision = config["model"]["init_args"].get("adapter"), trainer["precision"]
    assert (adapter, precision) == (({"rank": 16}, "bf16-true") if (model, gpus) in LORA else (None, "bf16-mixed"))
    rows = make_recipes.BATCHES[gpus] // trainer.get("accumulate_grad_batches", 1)
    assert config["data"]["init_args"]["batch_size"] == rows
    assert rows % (fold.dp * given.get("num_microbatches", 1)) == 0


def test_there_is_none_where_nothing_fits() -> None:
    assert [make_recipes.recipe(*case) for case in NONE] == [None, None]


def test_there_are_no_others() -> None:
    assert {path.name for path in (ROOT / "recipes").iterdir()} == {make_recipes.name_of(*case) for case in CASES}
