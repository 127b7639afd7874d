# SPDX-License-Identifier: Apache-2.0
"""What is to be trained, which plans there are, and which is best."""
