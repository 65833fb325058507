"""Label words from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hybridengine.errors import ConfigError, did_you_mean

__all__ = ["read_words"]


def read_words(path: str, labels: Sequence[str], method: str) -> list[list[str]]:
    """The words of each label, in the labels' order, from a YAML or JSON file that maps labels to words.

    Raises:
        ConfigError: it cannot be read, is no such mapping, or has other labels; `method` is named.
    """
    try:
        found: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{method}: {path} cannot be read ({reason}); give lines of `label: [word, ...]`") from None
    words = {str(k): [v] if isinstance(v, str) else v for k, v in found.items()} if isinstance(found, Mapping) else {}
    if not words or not all(map(_are_words, words.values())):
        raise ConfigError(
            f"{method}: {path} must map each label to a list of words; write lines of `label: [word, ...]`, and quotes"
            " around words such as 'no' that YAML reads as something else"
        )
    lost = [label for label in labels if label not in words]
    unknown = [name for name in words if name not in labels]
    problems = [f"{method}: {path} has no words for label {label!r}; add them" for label in lost] + [
        f"{method}: {path} has words for {name!r}, which is no label; remove them.{did_you_mean(name, labels)}"
        for name in unknown
    ]
    if problems:
        raise ConfigError(problems)
    return [words[label] for label in labels]


def _are_words(group: Any) -> bool:
    return isinstance(group, list) and bool(group) and all(isinstance(w, str) and w.strip() for w in group)
