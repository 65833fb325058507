"""From raw rows to checked splits in the task's roles, and the card that tells how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hybridengine.data.card import data_card
from hybridengine.data.carve import CARVE_RULE, carve, limit_rows
from hybridengine.data.checks import row_problem
from hybridengine.data.columns import resolve_columns
from hybridengine.data.labels import is_measured, label_name, labels_of, map_labels
from hybridengine.data.rows import SPLITS, TARGET_ROLES, Split
from hybridengine.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from hybridengine.config import DataConfig
    from hybridengine.seams.task import Task

__all__ = ["prepare_splits"]

_LISTED = 5  # bad rows named in an error
_REASONS = 20  # distinct reasons kept per split; the rest count as "other reasons"


def prepare_splits(
    data: DataConfig, task: Task, splits: Mapping[str, Split], *, episodic: bool = False
) -> tuple[dict[str, Split], dict[str, Any]]:
    """Name the roles, map labels, check every row, carve missing splits, limit training, describe it all.

    Args:
        data: the section `data` of the config.
        task: tells roles and what a usable row is.
        splits: raw rows by split, as `build_data` returns them.
        episodic: training comes in episodes that relabel classes, so validation may hold classes of its own.

    Returns:
        Splits in the task's roles, and the data card. Rows that are skipped are counted in the card.

    Raises:
        DataError: missing columns; bad rows under `on_bad_row: error` (the first five and the number); an empty
            split; a label that training lacks; training rows of one class only.
    """
    _check_names(splits)
    task_roles = dict(task.columns)
    inputs = [role for role in task_roles if role not in TARGET_ROLES]
    card: dict[str, Any] = {"columns": {}, "inferred": {}, "skipped": {}, "carved": {}}
    clean: dict[str, Split] = {}
    for name, split in ((name, splits[name]) for name in SPLITS if name in splits):
        if not len(split):
            raise DataError(f"{split.source}: the {name} split holds no rows")
        roles, inferred = resolve_columns(split, task_roles, task.optional_columns, data.columns)
        if name == "unlabelled":
            roles = {role: column for role, column in roles.items() if role not in TARGET_ROLES}
        card["columns"][name] = roles
        if inferred:
            card["inferred"][name] = {role: roles[role] for role in inferred}
        clean[name] = _usable(data, task, split, roles, card)
    shares: dict[str, float] = {name: share for name, share in data.carve.items() if name not in clean}
    if shares:
        clean.update(carve(clean["train"], shares, inputs))
        card.update(carved=dict(shares), carve_rule=CARVE_RULE)
    if data.limit and data.limit < len(clean["train"]):
        card["limit"] = {"rows": data.limit, "of": len(clean["train"])}
        clean["train"] = limit_rows(clean["train"], data.limit, inputs)
    _check_classes(clean["train"], data)
    if not episodic:
        clean = _known_labels(data, clean, card)
    ordered = {name: clean[name] for name in SPLITS if name in clean}
    return ordered, {**data_card(ordered, inputs), **card}


def _check_names(splits: Mapping[str, Split]) -> None:
    for name in splits:
        if name not in SPLITS:
            raise DataError(f"unknown split {name!r}.{did_you_mean(name, SPLITS)}")
    if "train" not in splits:
        raise DataError("there is no training split; give data.train")


def _usable(data: DataConfig, task: Task, split: Split, roles: Mapping[str, str], card: dict[str, Any]) -> Split:
    """The rows that can be used, in the task's roles; the others raise or are counted."""
    rows, kept, bad = [], [], []
    for index, raw in enumerate(split.rows):
        problem = row_problem(raw, roles, task.optional_columns)
        row = {role: raw[column] for role, column in roles.items() if raw.get(column) is not None}
        if problem is None and data.labels and split.name != "unlabelled":
            problem = map_labels(row, data.labels)
        if problem is None:
            problem = task.check_row(row)
        if problem is None:
            rows.append(row)
            kept.append(split.lines[index])
        else:
            bad.append((index, problem))
    _refuse_or_count(data, split, bad, card)
    if not rows:
        raise DataError(f"{split.source}: no usable row is left in the {split.name} split; every row was skipped")
    return Split(split.name, rows, split.source, kept)


def _refuse_or_count(data: DataConfig, split: Split, bad: list[tuple[int, str]], card: dict[str, Any]) -> None:
    if not bad:
        return
    if data.on_bad_row == "error":
        listed = "\n".join(f"  {split.where(index)}: {problem}" for index, problem in bad[:_LISTED])
        more = f"\n  and {len(bad) - _LISTED:,} more" if len(bad) > _LISTED else ""
        raise DataError(
            f"{len(bad):,} of {len(split):,} {split.name} rows cannot be used:\n{listed}{more}\n"
            "Correct them, or set data.on_bad_row: skip to leave them out (they are counted)."
        )
    counts = Counter(card["skipped"].get(split.name, {}))
    counts.update(problem for _, problem in bad)
    frequent = dict(counts.most_common(_REASONS))
    if rest := sum(counts.values()) - sum(frequent.values()):
        frequent["other reasons"] = frequent.get("other reasons", 0) + rest
    card["skipped"][split.name] = frequent


def _check_classes(train: Split, data: DataConfig) -> None:
    values = [row["label"] for row in train.rows if "label" in row]
    if not values or any(isinstance(value, list | tuple) or is_measured(value) for value in values):
        return
    names = {label_name(value) for value in values}
    if len(names) == 1:
        limited = " Raise data.limit." if data.limit else " Is data.columns.label the right column?"
        raise DataError(
            f"{train.source}: all {len(values):,} training rows have the label {names.pop()!r}; "
            f"a classifier needs two classes.{limited}"
        )


def _known_labels(data: DataConfig, splits: dict[str, Split], card: dict[str, Any]) -> dict[str, Split]:
    """Refuse, or skip and count, rows of validation and test whose label training lacks."""
    known = {label for row in splits["train"].rows for label in labels_of(row)}
    if any(is_measured(row.get("label")) for row in splits["train"].rows):
        return splits
    out = dict(splits)
    for name in ("validation", "test"):
        if name not in splits or not known:
            continue
        unknown = {i: _missing(labels_of(row), known) for i, row in enumerate(splits[name].rows)}
        bad = {i: label for i, label in unknown.items() if label is not None}
        if bad and data.on_bad_row == "error":
            index, label = next(iter(bad.items()))
            limited = " raise data.limit," if data.limit else ""
            raise DataError(
                f"{splits[name].where(index)}: label {label!r} of the {name} split does not occur in training "
                f"({len(bad):,} such rows); add training rows with it,{limited} map it in data.labels, "
                "or set data.on_bad_row: skip"
            )
        _refuse_or_count(data, splits[name], [(i, "label that training lacks") for i in bad], card)
        out[name] = splits[name].select([i for i in range(len(splits[name])) if i not in bad])
        if not len(out[name]):
            raise DataError(f"{splits[name].source}: no row of the {name} split has a label that training holds")
    return out


def _missing(labels: Iterable[str], known: set[str]) -> str | None:
    return next((label for label in labels if label not in known), None)
