"""What may stand together. Every refusal names both sides, the reason, and a way out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hybridengine.plugin.stacking import Method

__all__ = ["NEEDS", "check_stack"]

NEEDS = {
    "cloze": "nothing writes the rows as a cloze; add `template: {verbalizer: {label: word}}`, or `template` alone"
    " beside a method that finds or learns words",
    "augmentation": "no method rewrites texts; add eda, synonym, mask-infill or back-translation",
    "dropout": "the model has no dropout, so two passes are identical; use a model with dropout, or"
    " `lora: {dropout: 0.1}`",
    "episodes": "training must come in episodes; add `episodes: {ways: N, shots: K}`",
    "embeddings": "the model has no token embeddings to perturb; use a text model",
    "functional": "functional parameters cannot be recomputed under gradient checkpointing (the recomputation would see"
    " the base weights); set `train.checkpointing: false`",
    "labels": "the task has no class labels; use a classification task",
    "lm_head": "the model has no language-model head; use a checkpoint that was trained as a language model",
    "unlabelled": "there are no unlabelled rows; add `data.unlabelled`",
    "text": "the task's rows are not plain texts; use a task with a `text` column",
}
"""Why a required capability may be missing, and the way out."""


def check_stack(methods: Sequence[Method], capabilities: Iterable[str]) -> list[str]:
    """Slots, requirements, conflicts and ignored layers of a stack.

    Args:
        capabilities: what task, model, data and configuration provide.
    """
    ordered = sorted(methods, key=lambda m: m.order)
    have = set(capabilities).union(*(m.provides for m in ordered)) if ordered else set(capabilities)
    return [*_slots(ordered), *_requirements(ordered, have), *_conflicts(ordered, have), *_ignored(ordered)]


def _slots(methods: Sequence[Method]) -> list[str]:
    taken: dict[str, Method] = {}
    problems = []
    for method in methods:
        for slot in method.traits.slots:
            if slot in taken:
                other = taken[slot].name
                problems.append(
                    f"{other!r} and {method.name!r} cannot be combined: both take the place {slot!r}, which holds one"
                    f" method; remove {other!r} or {method.name!r}"
                )
            taken.setdefault(slot, method)
    return problems


def _requirements(methods: Sequence[Method], have: set[str]) -> list[str]:
    problems = []
    for method in methods:
        for need in method.traits.requires:
            if need not in have:
                reason = NEEDS.get(need, f"nothing in this run provides {need!r}; add a method or model that does")
                problems.append(f"{method.name!r} needs {need!r}: {reason}")
    return problems


def _conflicts(methods: Sequence[Method], have: set[str]) -> list[str]:
    problems = {}
    names = {m.name: m for m in methods}
    for method in methods:
        for other, reason in method.traits.conflicts.items():
            partners = [other] if other in names else [m.name for m in methods if other in m.provides]
            if not partners and other in have:
                partners = [other]
            for partner in partners:
                if partner != method.name:
                    key = tuple(sorted((method.name, partner)))
                    problems[key] = f"{method.name!r} and {partner!r} cannot be combined: {reason}"
    return list(problems.values())


def _ignored(methods: Sequence[Method]) -> list[str]:
    problems = []
    for outer in methods:
        for seam in outer.traits.ignores_inner:
            for inner in methods:
                if inner is not outer and inner.order <= outer.order and hasattr(inner.plugin, f"wrap_{seam}"):
                    problems.append(
                        f"{outer.name!r} never calls the layers inside it in the seam {seam!r}, so {inner.name!r} would"
                        f" silently do nothing; remove {inner.name!r} or {outer.name!r}"
                    )
    return problems
