"""Metrics, their intervals, and comparisons of systems."""

from hybridengine.evaluate.classification import ClassificationMetrics
from hybridengine.evaluate.metrics import LossMetrics, check_metric, greater_is_better
from hybridengine.evaluate.rouge import RougeMetrics, check_rouge
from hybridengine.evaluate.spans import SpanMetrics, spans, word_tags
from hybridengine.evaluate.statistics import (
    bootstrap_interval,
    mcnemar,
    paired_bootstrap,
    rows_interval,
    wilson_interval,
)

__all__ = [
    "ClassificationMetrics",
    "LossMetrics",
    "RougeMetrics",
    "SpanMetrics",
    "bootstrap_interval",
    "check_metric",
    "check_rouge",
    "greater_is_better",
    "mcnemar",
    "paired_bootstrap",
    "rows_interval",
    "spans",
    "wilson_interval",
    "word_tags",
]
