"""Stable choices of rows: missing splits carved out of training, and a limit on training rows.

Every choice orders texts by a salted SHA-1 and takes the first ones, so it depends neither on the order of the rows
nor on a random state.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridengine.data.labels import is_measured, label_name, labels_of
from hybridengine.data.rows import Split
from hybridengine.errors import DataError

__all__ = ["CARVE_RULE", "carve", "limit_rows", "text_key"]

CARVE_RULE = (
    "per label, the texts with the smallest SHA-1 (lower case, white space folded); "
    "equal texts and equal groups stay together"
)


def text_key(row: Mapping[str, Any], inputs: Sequence[str]) -> str:
    """The text of a row as identity: input roles in lower case, white space folded."""
    parts = []
    for role in inputs:
        value = row.get(role)
        text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "")
        parts.append(" ".join(text.lower().split()))
    return "\x1f".join(parts)


def _hash(salt: str, key: str) -> bytes:
    return hashlib.sha1(f"{salt}\x1f{key}".encode(), usedforsecurity=False).digest()


@dataclass(frozen=True)
class _Group:
    """Rows that must stay together: equal texts, or equal values of the role `group`."""

    digest: bytes
    rows: tuple[int, ...]
    labels: frozenset[str]
    stratum: str


def carve(split: Split, shares: Mapping[str, float], inputs: Sequence[str]) -> dict[str, Split]:
    """Cut new splits out of one, stratified by label and without leaks.

    Of each label's n distinct texts, round(share · n) go to the new split: those with the smallest hash. The order
    of the rows is irrelevant; m further texts of a label move at most m texts of that label per carved split.
    A class never loses its last text to a carved split.

    Args:
        split: prepared rows.
        shares: new split to its share of the texts.
        inputs: roles that make up the text; a role `group` keeps further rows together.

    Returns:
        The rest under the split's own name, and the new splits; rows in their original order.

    Raises:
        DataError: shares that leave nothing to train on, or too few texts to carve any.
    """
    if sum(shares.values()) >= 1:
        raise DataError(f"data.carve {dict(shares)} leaves no training rows; the shares must add up to less than 1")
    strata: dict[str, list[_Group]] = defaultdict(list)
    for group in _groups(split, inputs):
        strata[group.stratum].append(group)
    strata = _pool_rare(strata)
    left = Counter(label for groups in strata.values() for group in groups for label in group.labels)
    taken: dict[int, str] = {}
    for groups in (strata[name] for name in sorted(strata)):
        groups.sort(key=lambda g: g.digest)
        _deal(groups, {name: int(share * len(groups) + 0.5) for name, share in shares.items()}, left, taken)
    for name in shares:
        if name not in taken.values():  # so few texts that every quota rounds to 0
            for groups in (strata[key] for key in sorted(strata)):
                _deal([g for g in groups if g.rows[0] not in taken], {name: 1}, left, taken)
    return _cut(split, shares, taken)


def _deal(groups: Sequence[_Group], quotas: dict[str, int], left: Counter[str], taken: dict[int, str]) -> None:
    """Hand groups out in order until each quota is met, never the last one of a class."""
    remaining = iter(groups)
    for name, quota in quotas.items():
        while quota > 0 and (group := next(remaining, None)) is not None:
            if all(left[label] > 1 for label in group.labels):
                left.subtract(group.labels)
                taken.update((row, name) for row in group.rows)
                quota -= 1


def _cut(split: Split, shares: Mapping[str, float], taken: Mapping[int, str]) -> dict[str, Split]:
    out = {}
    for name in (split.name, *shares):
        rows = [i for i in range(len(split)) if taken.get(i, split.name) == name]
        if not rows:
            raise DataError(
                f"{split.source}: {len(split)} training rows are too few to carve a {name} split; "
                f"give data.{name}, more rows, or set data.carve: {{}}"
            )
        out[name] = split.select(rows, name)
    return out


def _groups(split: Split, inputs: Sequence[str]) -> list[_Group]:
    keys = [text_key(row, inputs) for row in split.rows]
    groups = []
    for rows in _components(keys, [row.get("group") for row in split.rows]):
        labels = frozenset(label for i in rows for label in labels_of(split.rows[i]))
        votes = Counter(_stratum(split.rows[i]) for i in rows)
        stratum = min(votes, key=lambda name: (-votes[name], name))
        groups.append(_Group(min(_hash("carve", keys[i]) for i in rows), tuple(rows), labels, stratum))
    return groups


def _components(keys: Sequence[str], groups: Sequence[Any]) -> list[list[int]]:
    """Positions linked by an equal text or an equal group, by union-find."""
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, (key, group) in enumerate(zip(keys, groups, strict=True)):
        for link in [("text", key)] + ([("group", str(group))] if group is not None else []):
            parent[root(i)] = root(first.setdefault(link, i))
    components: dict[int, list[int]] = defaultdict(list)
    for i in range(len(keys)):
        components[root(i)].append(i)
    return list(components.values())


def _stratum(row: Mapping[str, Any]) -> str:
    value = row.get("label")
    if isinstance(value, list | tuple):
        return "+".join(sorted(map(label_name, value)))
    return "" if value is None or is_measured(value) else label_name(value)


def _pool_rare(strata: Mapping[str, list[_Group]]) -> dict[str, list[_Group]]:
    """Combinations of labels that only one text has share a stratum; alone they would never be carved."""
    pooled: dict[str, list[_Group]] = defaultdict(list)
    for name, groups in strata.items():
        pooled[name if len(groups) > 1 else ""].extend(groups)
    return pooled


def limit_rows(split: Split, limit: int, inputs: Sequence[str]) -> Split:
    """The `limit` rows with the smallest hash of text and content, in their original order."""
    if len(split) <= limit:
        return split
    order = sorted(
        range(len(split)), key=lambda i: (_hash("limit", text_key(split.rows[i], inputs)), _content(split, i))
    )
    return split.select(sorted(order[:limit]))


def _content(split: Split, index: int) -> str:
    return repr(sorted(split.rows[index].items()))
