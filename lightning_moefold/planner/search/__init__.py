# SPDX-License-Identifier: Apache-2.0
"""Training jobs, their possible plans, and the search for the best one."""
