"""Named stacks to start from: `preset: NAME` stands for the methods listed here."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["PRESETS", "Preset", "expand"]


class Preset(NamedTuple):
    """A stack with what it is for, and why these methods."""

    purpose: str
    methods: tuple[str | dict[str, dict[str, Any]], ...]
    why: str


PRESETS: Mapping[str, Preset] = {
    "cheap": Preset(
        "little memory or time",
        ({"lora": {"r": 8}}, "linear"),
        "the frozen backbone needs no weight gradients and no optimizer state",
    ),
    "few-shot": Preset(
        "a few dozen labelled rows",
        ({"lp-ft": {"steps": 20}}, {"linear": {"warmup": 0.1}}, {"label-smoothing": {"smoothing": 0.1}}, "rdrop"),
        "a new head is trained before it may distort the encoder, and little data is regularised",
    ),
    "low-resource": Preset(
        "hundreds of labelled rows, any language",
        ({"llrd": {"decay": 0.9}}, {"linear": {"warmup": 0.1}}, "rdrop", "ema"),
        "lower layers, which hold the language, move least; the average of the weights steadies a short run",
    ),
    "robust": Preset(
        "inputs that differ from the training rows",
        ("fgm", "rdrop", "ema", "linear"),
        "the worst small change of the embeddings is trained on, and predictions may not depend on dropout",
    ),
}


def expand(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values with the methods of its preset behind its own, which win where both name one.

    What is malformed is left as it is, for the fields' own checks to tell.
    """
    preset, methods = PRESETS.get(str(values.get("preset"))), values.get("methods") or []
    if preset is None or not isinstance(methods, list):
        return dict(values)
    own = {_name(entry) for entry in methods}
    return {**values, "methods": [*methods, *(copy.deepcopy(m) for m in preset.methods if _name(m) not in own)]}


def _name(entry: Any) -> str:
    return str(next(iter(entry), "") if isinstance(entry, dict) else entry)
