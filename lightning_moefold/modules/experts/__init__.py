# SPDX-License-Identifier: Apache-2.0
"""The routed experts of a layer, and how their products are computed."""

from lightning_moefold.modules.experts.experts import Experts

__all__ = ["Experts"]
