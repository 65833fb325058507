"""Logits that are computed only where somebody reads them, and a model's head that returns such logits.

A language model makes logits [..., V] of every position and then reads few of them: a loss reads each row once, prompt
learning reads the positions of the masks. `LazyLogits` stands in for `x @ weight.T + bias` and keeps what it is made
of. Reshaping it, scaling it and choosing positions or classes stay lazy; a cross-entropy of it becomes
`linear_cross_entropy`; everything else computes it, whole, as if it had always been there.
"""

from __future__ import annotations

from hybridengine.kernels.lazy_logits.operations import HANDLERS
from hybridengine.kernels.lazy_logits.patching import patch, why_not_patched
from hybridengine.kernels.lazy_logits.tensor import LAZY, LazyLogits

__all__ = ["LazyLogits", "patch", "why_not_patched"]

LAZY.update(HANDLERS)
