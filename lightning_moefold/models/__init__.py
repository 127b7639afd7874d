# SPDX-License-Identifier: Apache-2.0
"""Models: configurations, names of weights, and the causal language model."""

from lightning_moefold.models.causal_lm import CausalLMOutput, MoECausalLM
from lightning_moefold.models.config import ConfigError, MoEConfig

__all__ = ["CausalLMOutput", "ConfigError", "MoECausalLM", "MoEConfig"]
