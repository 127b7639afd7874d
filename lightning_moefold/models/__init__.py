# SPDX-License-Identifier: Apache-2.0
"""Models: configurations, names of weights, and the causal language model."""

from lightning_moefold.errors import ConfigError
from lightning_moefold.models.causal_lm import CausalLMOutput, MoECausalLM
from lightning_moefold.models.config import MoEConfig

__all__ = ["CausalLMOutput", "ConfigError", "MoECausalLM", "MoEConfig"]
