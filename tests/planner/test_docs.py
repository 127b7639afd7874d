# SPDX-License-Identifier: Apache-2.0
"""The code of docs/planner.md runs."""

import re
from pathlib import Path

from lightning_moefold.planner import find_hardware

PAGE = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/planner.md", "exec"), {})
    assert "pp" in capsys.readouterr().out


def test_toml_blocks_are_machines(tmp_path):
    blocks = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        file = tmp_path / f"box{number}.toml"
        file.write_text(block)
        assert find_hardware(str(file)).gpus_per_node == 8
