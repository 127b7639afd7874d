# SPDX-License-Identifier: Apache-2.0
"""Reports about a failed run: which rank failed, in which stage and which collective."""
