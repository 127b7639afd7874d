# SPDX-License-Identifier: Apache-2.0
"""What a machine can do: constants with their sources, and how they are measured."""
