"""`docs/support-matrix.md` from the recorded results: which pairs of methods train, which are refused, and why."""

from __future__ import annotations

from typing import Any

_HEAD = """# Which methods go together

Made by `tests/contracts/matrix.py`: every pair of methods was planned and, unless refused, trained for two steps on an
encoder, a decoder (both classify texts) and an encoder-decoder (it summarises). Checked: passes, effects, finite loss,
that nothing moves but what is optimised, and that the saved run predicts. Parameters are typical ones; what a method
refuses by its parameters alone `hybridengine validate` tells. In the reasons X is the method named first.
"""


def page(results: dict[str, Any]) -> str:
    """The page, as Markdown."""
    pairs, stacks = results["pairs"], results["stacks"]
    lines = [
        _HEAD,
        f"| with torch {results['torch']} | runs | trained | refused with a reason | failed |",
        "|---|---|---|---|---|",
        f"| pairs of {len(results['methods'])} methods | {pairs['total']:,} | {pairs['trains']:,} "
        f"| {pairs['refused']:,} | {pairs['failed']:,} |",
        *_missing(results),
        *_random(stacks),
        "",
    ]
    for kind in results["refused"]:
        lines += [f"## On an {kind}" if kind[0] in "aeiou" else f"## On a {kind}", "", *_grid(results, kind), ""]
    lines += ["## Reasons", ""]
    lines += [f"{index + 1}. {'; '.join(reason.splitlines())}" for index, reason in enumerate(results["reasons"])]
    return "\n".join(lines) + "\n"


def _missing(results: dict[str, Any]) -> list[str]:
    count = sum(map(len, results["missing"].values()))
    return [f"| pairs not run since a member was added or changed | {count:,} | | | |"] if count else []


def _random(stacks: dict[str, int]) -> list[str]:
    if not stacks["total"]:
        return []
    shown = " | ".join(f"{stacks[key]:,}" for key in ("total", "trains", "refused", "failed"))
    return [f"| random triples and quadruples | {shown} |"]


def _grid(results: dict[str, Any], kind: str) -> list[str]:
    """A row a method: what it is refused with, by the number of the reason; everything else trains."""
    refused: dict[str, dict[int, list[str]]] = {name: {} for name in results["methods"]}
    for pair, reason in results["refused"][kind].items():
        one, other = pair.split("+")
        for name, partner in ((one, other), (other, one)):
            refused[name].setdefault(reason, []).append(partner)
    open_pairs = [name for pair in results["missing"][kind] for name in pair.split("+")]
    rows = ["| method | trains with | refused with (reason) |", "|---|---|---|"]
    for name, found in refused.items():
        lost = sum(map(len, found.values()))
        told = "; ".join(f"{', '.join(partners)} ([{r + 1}](#reasons))" for r, partners in sorted(found.items()))
        run = len(results["methods"]) - 1 - open_pairs.count(name)
        rows.append(f"| `{name}` | {run - lost} of {run} | {told} |")
    return rows
