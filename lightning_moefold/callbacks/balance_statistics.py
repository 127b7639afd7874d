# SPDX-License-Identifier: Apache-2.0
"""Statistics of how evenly experts are used, as pure functions of counts.

Aggregates that NeMo AutoModel also logs have the same names as there.

Legend: L layers, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Statistics of one layer, as :func:`layer_statistics` names them.
LAYER_STATISTICS = ("max_over_mean", "cv", "dead_expert_frac", "entropy")


def layer_statistics(counts_E: ArrayLike) -> dict[str, float]:
    """Computes how evenly one layer uses its experts.

    Args:
        counts_E: Load of each expert.

    Returns:
        ``max_over_mean`` (1 is balanced, E is all on one), ``cv`` (standard deviation over mean), ``dead_expert_frac``
        (share of experts without any load), and ``entropy`` of the load over ``log E`` (1 is balanced, 0 is all on one;
        1 if E is 1). Empty for a layer without load.
    """
    load_E = np.asarray(counts_E, dtype=np.float64)
    total = load_E.sum()
    if total == 0:
        return {}
    used = load_E[load_E > 0] / total
    entropy = -(used * np.log(used)).sum() / np.log(load_E.size) if load_E.size > 1 else 1.0
    return {
        "max_over_mean": float(load_E.max() / load_E.mean()),
        "cv": float(load_E.std() / load_E.mean()),
        "dead_expert_frac": float((load_E == 0).mean()),
        "entropy": float(entropy) + 0.0,  # not -0.0
    }


def balance_statistics(counts_LE: Iterable[ArrayLike]) -> dict[str, float]:
    """Computes how evenly a model uses its experts.

    Args:
        counts_LE: Load of each expert, layer by layer; layers may have different numbers of experts.

    Returns:
        ``load_imbalance`` and ``load_imbalance_max`` (mean and max over layers of max over mean), ``cv_mean``,
        ``cv_median``, ``cv_min``, ``cv_max``, ``dead_expert_frac_mean``, ``entropy_mean``, ``expert_diversity_mean``
        and ``expert_diversity_min`` (exp of the entropy over E: the share of experts that would give the same entropy
        if evenly loaded), and quantiles, over all experts of all layers, of the load divided by the layer's mean,
        ``expert_utilization_min``, ``_p25``,
        ``_median``, ``_p75`` and ``_max``. Layers without load are left out; empty if there are no others.
    """
    loaded = [row for row in (np.asarray(counts_E, dtype=np.float64) for counts_E in counts_LE) if row.sum() > 0]
    if not loaded:
        return {}
    layers = [layer_statistics(row) for row in loaded]
    peak_L, cv_L, dead_L, entropy_L = (np.array([layer[name] for layer in layers]) for name in LAYER_STATISTICS)
    experts_L = np.array([row.size for row in loaded])
    diversity_L = experts_L ** (entropy_L - 1)  # exp(entropy * log E) / E
    utilization = np.concatenate([row / row.mean() for row in loaded])
    names = ("min", "p25", "median", "p75", "max")
    quantiles = zip(names, np.quantile(utilization, (0, 0.25, 0.5, 0.75, 1)), strict=True)
    values = {
        "load_imbalance": peak_L.mean(),
        "load_imbalance_max": peak_L.max(),
        "cv_mean": cv_L.mean(),
        "cv_median": np.median(cv_L),
        "cv_min": cv_L.min(),
        "cv_max": cv_L.max(),
        "dead_expert_frac_mean": dead_L.mean(),
        "entropy_mean": entropy_L.mean(),
        "expert_diversity_mean": diversity_L.mean(),
        "expert_diversity_min": diversity_L.min(),
        **{f"expert_utilization_{name}": quantile for name, quantile in quantiles},
    }
    return {name: float(value) for name, value in values.items()}


def rank_imbalance(rows_LR: NDArray[np.int64]) -> float | None:
    """Returns the busiest rank's rows over the ranks' mean, averaged over layers; None if there is no load.

    Ranks wait for each other in every layer's exchange, so this is the factor by which the busiest rank prolongs the
    experts' work.

    Args:
        rows_LR: Number of rows that each rank's experts compute, per layer.
    """
    loaded_LR = rows_LR[rows_LR.sum(1) > 0]
    return float((loaded_LR.max(1) / loaded_LR.mean(1)).mean()) if len(loaded_LR) else None
