"""Numbers as people read them, and names explained."""

from __future__ import annotations

import math
import re

from hybridengine.report.read import number

__all__ = [
    "EFFECTS",
    "PASSES",
    "amount",
    "compact",
    "describe_effect",
    "duration",
    "is_share",
    "lower_is_better",
    "metric",
    "percent",
    "short_percent",
    "size",
    "title",
]

PASSES = {
    "F": "forward pass",
    "B": "backward pass, gradients complete",
    "b": "backward pass, more to come",
    "G": "gradient of the perturbation alone",
    "H": "gradient of an inner step",
    "P": "pull-back through the inner steps",
    "W": "weights moved and restored",
    "S": "optimizer step",
}

EFFECTS = {
    "delta_norm": "size of the change added to the embeddings, per text",
    "perturbation_norm": "size of the perturbation tried on the weights",
    "kl": "disagreement of two views of a text (KL divergence)",
    "loss_gain": "how much its perturbation raised the loss",
    "loss_change": "how much it changed the loss, per text",
    "support_loss": "loss on the support rows before adapting",
    "shift": "how far adapting moved the weights",
    "distance": "distance between its weights and the trained ones",
    "tensors": "parameter tensors touched",
    "trainable": "parameter tensors being trained",
    "trainable_share": "share of the parameters being trained",
    "sure": "share of the unlabelled texts of which the model was sure enough",
    "labelled": "share of the unlabelled texts that the model labelled itself",
    "confidence": "how sure the model was of its likeliest label for unlabelled texts",
    "dropped": "share of the labels of which the model was too sure to count",
    "changed": "share of the texts that it changed",
}

_SHARES = re.compile(r"accuracy|precision|recall|f1|auroc|auc|exact_match")
_LOWER_IS_BETTER = re.compile(r"loss|perplexity|error|ece|brier")
_ACRONYMS = {"f1": "F1", "mcc": "MCC", "auroc": "AUROC", "ece": "ECE", "kl": "KL", "lr": "learning rate"}


def is_share(name: str) -> bool:
    """Whether a metric is a share of 1 that reads best as a percentage."""
    return bool(_SHARES.search(name))


def lower_is_better(name: str) -> bool:
    """Whether a smaller value of a metric is the better one."""
    return bool(_LOWER_IS_BETTER.search(name))


def percent(value: float | None, digits: int = 1) -> str:
    """0.9123 as `91.2%`."""
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def short_percent(value: float | None) -> str:
    """0.9 as `90%`, 0.9123 as `91.2%`."""
    return percent(value).replace(".0%", "%")


def metric(name: str, value: object) -> str:
    """A metric in its own form: shares as percentages, others with four digits."""
    found = number(value)
    if found is None:
        return "–"
    return percent(found) if is_share(name) and 0 <= found <= 1 else compact(found)


def compact(value: float | None) -> str:
    """Up to four significant digits: `0.0123`, `3.2e-5`, `1,204`."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}".rstrip("0").rstrip(".")


def amount(value: object) -> str:
    """A count, in millions or thousands where it is large: `22.7 M`."""
    found = number(value)
    if found is None:
        return "–"
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if abs(found) >= size:
            return f"{found / size:.1f} {unit}"
    return f"{found:,.0f}"


def size(value: object) -> str:
    """Bytes as `90.9 MB`."""
    found = number(value)
    if found is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if abs(found) < 1000:
            return f"{found:.{0 if unit == 'B' else 1}f} {unit}"
        found /= 1000
    return f"{found:.1f} GB"


def duration(value: object) -> str:
    """Seconds as `2 min 15 s`."""
    seconds = number(value)
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def title(name: str) -> str:
    """`f1_macro` as `F1 macro`."""
    words = [_ACRONYMS.get(word, word) for word in name.replace("_", " ").split()]
    joined = " ".join(words)
    return joined[:1].upper() + joined[1:]


def describe_effect(name: str) -> str:
    """What an effect measures, in words."""
    return EFFECTS.get(name, name.replace("_", " "))
