# SPDX-License-Identifier: Apache-2.0
"""What `transformers` writes for models without a sliding window is read without complaint."""

import warnings

import pytest

from lightning_moefold import MoEConfig
from lightning_moefold.testing import make_checkpoint


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_checkpoint_of_transformers_has_no_unknown_fields(family, tmp_path):
    make_checkpoint(tmp_path, family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = MoEConfig.from_pretrained(tmp_path)
    assert set(config.sliding_windows) == {None}


def test_the_window_counts_only_where_it_is_used(tmp_path):
    make_checkpoint(tmp_path, "qwen3_moe")
    unused = MoEConfig.from_pretrained(tmp_path, sliding_window=8)
    used = MoEConfig.from_pretrained(tmp_path, sliding_window=8, use_sliding_window=True)
    assert set(unused.sliding_windows) == {None}
    assert set(used.sliding_windows) == {8}
