"""The seams: the values that travel through them, the onion, and `ctx`."""

from hybridengine.seams.average import Average
from hybridengine.seams.backbone import Backbone
from hybridengine.seams.context import Context
from hybridengine.seams.divergence import js_rows, kl_rows, sequence_norms
from hybridengine.seams.inner import InnerUpdate, distance, inner_loop, leaves_at, queries_of, support_of
from hybridengine.seams.layered import evaluating, width_projection
from hybridengine.seams.layers import Layers
from hybridengine.seams.likelihood import log_likelihoods
from hybridengine.seams.matching import attention_distance, hidden_distance, paired_layers
from hybridengine.seams.overriding import override_forward
from hybridengine.seams.pooling import pooled
from hybridengine.seams.power_iteration import keyed_noise, power_iteration, replayable
from hybridengine.seams.precision import wide
from hybridengine.seams.randomness import KeyedRows, mix, permutation, seeded
from hybridengine.seams.sites import Site, Sites
from hybridengine.seams.soft_tokens import Vectors
from hybridengine.seams.task import Feature, Metrics, RandomRows, Row, Task
from hybridengine.seams.types import Batch, Draw, Out, Prediction, Term, View, Work, add_terms, weighted_sum
from hybridengine.seams.uphill import Uphill, gradient_uphill, orthogonal

__all__ = [
    "Average",
    "Backbone",
    "Batch",
    "Context",
    "Draw",
    "Feature",
    "InnerUpdate",
    "KeyedRows",
    "Layers",
    "Metrics",
    "Out",
    "Prediction",
    "RandomRows",
    "Row",
    "Site",
    "Sites",
    "Task",
    "Term",
    "Uphill",
    "Vectors",
    "View",
    "Work",
    "add_terms",
    "attention_distance",
    "distance",
    "evaluating",
    "gradient_uphill",
    "hidden_distance",
    "inner_loop",
    "js_rows",
    "keyed_noise",
    "kl_rows",
    "leaves_at",
    "log_likelihoods",
    "mix",
    "orthogonal",
    "override_forward",
    "paired_layers",
    "permutation",
    "pooled",
    "power_iteration",
    "queries_of",
    "replayable",
    "seeded",
    "sequence_norms",
    "support_of",
    "weighted_sum",
    "wide",
    "width_projection",
]
