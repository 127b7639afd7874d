# SPDX-License-Identifier: Apache-2.0
"""Models: configurations, names of weights, and the causal language model."""

from typing import TYPE_CHECKING

from lightning_moefold.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_moefold.errors import ConfigError
    from lightning_moefold.models.causal_lm import CausalLMOutput, MoECausalLM
    from lightning_moefold.models.config import MoEConfig
    from lightning_moefold.models.families import register_family

__all__ = ["CausalLMOutput", "ConfigError", "MoECausalLM", "MoEConfig", "register_family"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CausalLMOutput": "causal_lm",
        "ConfigError": "config",
        "MoECausalLM": "causal_lm",
        "MoEConfig": "config",
        "register_family": "families",
    },
)
