# SPDX-License-Identifier: Apache-2.0
"""Pipelines: the plan, the engine that runs a schedule, and what a stage of a model computes."""
