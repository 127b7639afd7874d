# SPDX-License-Identifier: Apache-2.0
"""What is imported when: commands that need no PyTorch start without it, and the strategy is known by name in any case."""

import importlib
import subprocess
import sys

import pytest

import lightning_moefold

PACKAGES = (
    "",
    ".models",
    ".modules",
    ".modules.attention",
    ".modules.experts",
    ".modules.routers",
    ".dispatch",
    ".parallel",
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = "print(sorted({'torch', 'lightning', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)))"


@pytest.mark.parametrize(
    "code",
    [
        "import lightning_moefold",
        "from lightning_moefold.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from lightning_moefold.cli.main import main\nmain(['plan', '--model', 'mixtral-8x7b', '--gpus', '8', "
        "'--global-batch-size', '64', '--fold', 'tp2 | ep4'])",
        "import lightning_moefold.cli.plot, lightning_moefold.planner, lightning_moefold.models.hf_config",
    ],
)
def test_what_needs_no_torch_imports_none(code: str) -> None:
    assert run(f"import sys\n{code}\n{HEAVY}").splitlines()[-1] == "[]"


@pytest.mark.parametrize("order", ["lightning_moefold, lightning", "lightning, lightning_moefold"])
@pytest.mark.more
def test_the_strategy_is_known_by_name_in_either_order(order: str) -> None:
    code = (
        f"import sys, {order}\nloaded = 'lightning_moefold.strategy' in sys.modules\n"
        "import lightning.pytorch as pl\n"
        "trainer = pl.Trainer(strategy='moefold', accelerator='cpu', devices=1, logger=False, enable_progress_bar=False)\n"
        "print(loaded, type(trainer.strategy).__name__)"
    )
    assert run(code).splitlines()[-1] == "False MoEFoldStrategy"


@pytest.mark.more
def test_the_strategy_that_was_registered_first_stays() -> None:
    code = (
        "from lightning.pytorch.strategies import StrategyRegistry, SingleDeviceStrategy\n"
        "StrategyRegistry.register('moefold', SingleDeviceStrategy)\n"
        "import lightning_moefold\nprint(StrategyRegistry['moefold']['strategy'].__name__)"
    )
    assert run(code).splitlines()[-1] == "SingleDeviceStrategy"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package: str) -> None:
    module = importlib.import_module(lightning_moefold.__name__ + package)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing


@pytest.mark.more
def test_a_router_of_the_users_own_may_take_a_built_in_name() -> None:
    code = (
        "from lightning_moefold.modules import Router, register_router\n"
        "@register_router('swipe')\nclass Mine(Router): pass\n"
        "import lightning_moefold.modules.routers.swipe\n"
        "from lightning_moefold.modules.routers import make_router\nprint(type(make_router('swipe', 4, 2, 1)).__name__)"
    )
    assert run(code).splitlines()[-1] == "Mine"
