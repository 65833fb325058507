"""Named stacks to start from: `preset: NAME` stands for the methods listed here."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

__all__ = ["PRESETS", "expand"]


Entry = str | dict[str, dict[str, Any]]

PRESETS: Mapping[str, tuple[Entry, ...]] = {
    # Little memory or time: a frozen backbone needs no weight gradients and no optimizer state.
    "cheap": ({"lora": {"r": 8}}, "linear"),
    # A few dozen rows: a new head is trained before it may distort the encoder, and little data is regularised.
    "few-shot": (
        {"lp-ft": {"steps": 20}},
        {"linear": {"warmup": 0.1}},
        {"label-smoothing": {"smoothing": 0.1}},
        "rdrop",
    ),
    # Hundreds of rows, any language: lower layers, which hold it, move least; an average steadies a short run.
    "low-resource": ({"llrd": {"decay": 0.9}}, {"linear": {"warmup": 0.1}}, "rdrop", "ema"),
    # Inputs unlike the training rows: the worst small change is trained on, and dropout may not change predictions.
    "robust": ("fgm", "rdrop", "ema", "linear"),
}


def expand(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values with the methods of its preset behind its own, which win where both name one.

    What is malformed is left as it is, for the fields' own checks to tell.
    """
    preset, methods = PRESETS.get(str(values.get("preset"))), values.get("methods") or []
    if preset is None or not isinstance(methods, list):
        return dict(values)
    own = {_name(entry) for entry in methods}
    return {**values, "methods": [*methods, *(copy.deepcopy(m) for m in preset if _name(m) not in own)]}


def _name(entry: Any) -> str:
    return str(next(iter(entry), "") if isinstance(entry, dict) else entry)
