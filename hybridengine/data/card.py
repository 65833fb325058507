"""The data card: what a run was trained and measured on, as JSON and as text."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hybridengine.data.carve import text_key
from hybridengine.data.labels import labels_of
from hybridengine.data.rows import Split

__all__ = ["add_token_lengths", "card_lines", "data_card", "describe_split"]

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
_SHOWN_LABELS = 12


def data_card(splits: Mapping[str, Split], inputs: Sequence[str]) -> dict[str, Any]:
    """Describe prepared splits.

    Args:
        splits: rows by split, columns renamed to roles.
        inputs: roles that make up the text.

    Returns:
        JSON-able: `source`; `splits.{name}` with `rows`, `source`, `labels` (counts), `words` (median, p95, max),
        `duplicates` (rows whose lower-cased text stood earlier in the split) and `digest` (of every row, in order); and
        `overlap` (`"train/test"`: rows of the second whose text the first holds too).
    """
    keys = {name: [text_key(row, inputs) for row in split.rows] for name, split in splits.items()}
    described = {name: {**_describe(split, keys[name]), "digest": _digest(split)} for name, split in splits.items()}
    names = list(splits)
    overlap = {}
    for index, first in enumerate(names):
        known = set(keys[first])
        for second in names[index + 1 :]:
            overlap[f"{first}/{second}"] = sum(key in known for key in keys[second])
    source = ", ".join(dict.fromkeys(str(split["source"]) for split in described.values()))
    return {"source": source, "splits": described, "overlap": overlap}


def describe_split(split: Split, inputs: Sequence[str]) -> dict[str, Any]:
    """What a card says of a split that methods made of others: all but the digest, for it follows from theirs."""
    return _describe(split, [text_key(row, inputs) for row in split.rows])


def _describe(split: Split, keys: Sequence[str]) -> dict[str, Any]:
    labels = Counter(label for row in split.rows for label in labels_of(row))
    return {
        "rows": len(split),
        "source": split.source or _files(split),
        "labels": dict(sorted(labels.items())),
        "words": _spread([_words(key) for key in keys]),
        "duplicates": len(keys) - len(set(keys)),
    }


def _digest(split: Split) -> str:
    """Tells other rows, or another order of them, when a run goes on: rows are keyed by position."""
    content = hashlib.blake2b(digest_size=16)
    for row in split.rows:
        content.update(f"{sorted(row.items())!r}\n".encode("utf-8", "surrogatepass"))
    return content.hexdigest()


def _files(split: Split) -> str:
    files = list(dict.fromkeys(str(line).rpartition(":")[0] for line in split.lines))
    return files[0] + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _words(text: str) -> int:
    """Words by white space; each Chinese or Japanese character counts as one."""
    return len(text.split()) if text.isascii() else len(_WORD.findall(text))


def _spread(values: Sequence[int]) -> dict[str, int]:
    """Median and 95th percentile by nearest rank, and the maximum."""
    ordered = sorted(values)
    at = [ordered[-(-len(ordered) * percent // 100) - 1] for percent in (50, 95, 100)]
    return dict(zip(("median", "p95", "max"), at, strict=True))


def add_token_lengths(
    card: dict[str, Any], lengths: Mapping[str, Sequence[int]], cut: Mapping[str, Sequence[bool]], max_length: int
) -> None:
    """Add token counts to a card in place.

    Args:
        card: a data card.
        lengths: tokens that were kept of each row, by split; splits that the card lacks are ignored.
        cut: whether each row lost tokens.
        max_length: tokens that are kept.
    """
    for name, values in lengths.items():
        if name in card["splits"] and len(values):
            truncated = sum(cut[name]) / len(values)
            card["splits"][name]["tokens"] = {**_spread(values), "truncated": truncated}
    card["max_length"] = max_length


def card_lines(card: Mapping[str, Any]) -> list[str]:
    """The card as plain lines for a terminal; control characters in names are removed."""
    lines = []
    for name, split in card["splits"].items():
        words = split["words"]
        line = f"{name}: {split['rows']:,} rows of {split['source']}; words {_show(words)}"
        if tokens := split.get("tokens"):
            line += f"; tokens {_show(tokens)}, {tokens['truncated']:.1%} cut at {card['max_length']}"
        lines.append(line)
        if labels := _label_list(split["labels"]):
            lines.append(f"  labels: {labels}")
        if split["duplicates"]:
            lines.append(f"  {split['duplicates']:,} rows repeat a text of this split")
    for pair, count in card["overlap"].items():
        if count:
            first, second = pair.split("/")
            lines.append(f"warning: {count:,} rows of {second} have a text that {first} holds too")
    for name, reasons in card.get("skipped", {}).items():
        listed = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.items())
        lines.append(f"warning: skipped {sum(reasons.values()):,} {name} rows: {listed}")
    for name, share in card.get("carved", {}).items():
        lines.append(f"{name} is {share:.0%} of the training texts: {card['carve_rule']}")
    if limit := card.get("limit"):
        lines.append(f"train is limited to {limit['rows']:,} of {limit['of']:,} rows, chosen by hash")
    for name, roles in card.get("inferred", {}).items():
        lines.append(f"{name}: read " + ", ".join(f"{role} from column {col!r}" for role, col in roles.items()))
    return ["".join(c for c in line if c.isprintable()) for line in lines]


def _show(spread: Mapping[str, Any]) -> str:
    return f"{spread['median']} median, {spread['p95']} p95, {spread['max']} max"


def _label_list(labels: Mapping[str, int]) -> str:
    ordered = sorted(labels.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{name}: {count:,}" for name, count in ordered[:_SHOWN_LABELS])
    return shown + (f" and {len(ordered) - _SHOWN_LABELS} more" if len(ordered) > _SHOWN_LABELS else "")
