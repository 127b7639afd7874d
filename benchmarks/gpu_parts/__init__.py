# SPDX-License-Identifier: Apache-2.0
"""The parts of `benchmarks/gpu.py`: each measures one subject in a process of its own."""
