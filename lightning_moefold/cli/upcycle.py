# SPDX-License-Identifier: Apache-2.0
"""``moefold upcycle``: a dense checkpoint as a mixture of experts that computes the same at first."""

from __future__ import annotations

import argparse

from lightning_moefold.compression.upcycling import Upcycling, upcycle


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``moefold upcycle``."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="Llama, Mistral or Qwen2 model, or its name on the hub")
    add("--experts", type=int, default=8, help="experts in all, each of the dense width over the granularity (8)")
    add("--top-k", type=int, default=2, help="experts of a token (2)")
    add("--granularity", type=int, default=1, help="parts of the dense layer; divides --experts and --top-k (1)")
    add("--noise", type=float, default=0.0, help="noise on experts, as a share of each matrix's deviation (0: exact)")
    add("--router-std", type=float, help="deviation of router rows (initializer_range)")
    add("--seed", type=int, default=0, help="of noise and router rows (0)")
    add("--output", required=True, metavar="DIR", help="directory to write; one with a model is replaced")


def run(arguments: argparse.Namespace) -> int:
    """Runs ``moefold upcycle``."""
    how = Upcycling(
        arguments.experts, arguments.top_k, arguments.granularity, arguments.noise, arguments.router_std, arguments.seed
    )
    config = upcycle(arguments.checkpoint, arguments.output, how)
    print(
        f"{arguments.output} written: {config.model_type} with {config.num_experts} experts of width "
        f"{config.moe_intermediate_size}, {config.num_experts_per_tok} for each token; "
        f"{config.num_parameters():,} parameters, {config.num_parameters(active=True):,} active"
    )
    return 0
