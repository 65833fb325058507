"""Fast kernels with a plain torch reference beside each: usable without the rest of the engine.

    from hybridengine import kernels

    loss = kernels.cross_entropy(logits, target)                      # forward and gradient in one pass
    loss = kernels.linear_cross_entropy(hidden, head.weight, target)  # the logits of all rows never exist
    smooth = kernels.kl_pair(logits, other_logits, reduction="mean")  # of two predictions, and both gradients
    delta = kernels.perturb_step(delta, gradient, mask, step_size=1.0, epsilon=2.0)
    with kernels.patch(model):                                        # a whole language model's loss, the same way
        loss = model(input_ids, labels=labels).loss
    with kernels.perturb_weights(weights, gradients, rho=0.05):       # SAM's move, and back to the bit
        ...
    with kernels.fast_forward():                                      # a model's own dropout, GELU, ..., on CPUs
        output = model(**inputs)
    kernels.explain()                                                 # which implementation runs, and why not another

One folder an operation: `reference.py` is the specification, its neighbours are the ways to run it.
"""

# The functions take the names of their packages. That holds because a package is bound to its parent only when it is
# first imported, which happens here, before the line that imports the function from it is finished.
from hybridengine.kernels.cross_entropy import CrossEntropyLoss, cross_entropy
from hybridengine.kernels.dispatch import Row, explain, read_environment, reset_used, used
from hybridengine.kernels.dropout import dropout
from hybridengine.kernels.ema import ema_update
from hybridengine.kernels.embedding import embedding
from hybridengine.kernels.forward import fast_forward
from hybridengine.kernels.gelu import gelu
from hybridengine.kernels.keep import Kept, keep
from hybridengine.kernels.kl_pair import KLPairLoss, kl_pair
from hybridengine.kernels.label_row_head import label_row_head
from hybridengine.kernels.lazy_logits import LazyLogits, patch, why_not_patched
from hybridengine.kernels.linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
from hybridengine.kernels.memory import pool_report, release_pool, tune_allocator
from hybridengine.kernels.native import set_isa
from hybridengine.kernels.norm import total_norm
from hybridengine.kernels.perturb import perturb_step
from hybridengine.kernels.perturb_start import perturb_start
from hybridengine.kernels.perturb_weights import MovedWeights, Rule, perturb_weights

__all__ = [
    "CrossEntropyLoss",
    "KLPairLoss",
    "Kept",
    "LazyLogits",
    "LinearCrossEntropyLoss",
    "MovedWeights",
    "Row",
    "Rule",
    "cross_entropy",
    "dropout",
    "ema_update",
    "embedding",
    "explain",
    "fast_forward",
    "gelu",
    "keep",
    "kl_pair",
    "label_row_head",
    "linear_cross_entropy",
    "patch",
    "perturb_start",
    "perturb_step",
    "perturb_weights",
    "pool_report",
    "read_environment",
    "release_pool",
    "reset_used",
    "set_isa",
    "total_norm",
    "tune_allocator",
    "used",
    "why_not_patched",
]
