# SPDX-License-Identifier: Apache-2.0
"""Live expert balance: where experts live, which are copied for one pass, and what either is worth. Pure numpy."""
