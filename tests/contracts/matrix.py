"""Every pair of shipped methods on three kinds of models, and 2,000 random stacks: run, recorded, told in the docs.

    python tests/contracts/matrix.py pairs --shard 1/2      # what has no record, or whose methods changed since
    python tests/contracts/matrix.py stacks --shard 1/2     # 2,000 random triples and quadruples, in blocks of 50
    python tests/contracts/matrix.py write                  # tests/contracts/matrix.json and docs/support-matrix.md

Each line of `build/matrix/*.jsonl` is one stack: it trained, it was refused, or it failed. A command that is
interrupted goes on where it stopped; shards may run side by side.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import itertools
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from stack_checks import check, complete
from stack_draws import GROUNDS, PARAMETERS, Ground, stacks
from support_page import page

from hybridengine.plugin import Catalogue

ROOT = Path(__file__).parents[2]
RECORDS, RESULT, PAGE = ROOT / "build/matrix", Path(__file__).with_name("matrix.json"), ROOT / "docs/support-matrix.md"
PAIR_GROUNDS: dict[str, Ground] = {"encoder": GROUNDS[0], "decoder": GROUNDS[3], "encoder-decoder": GROUNDS[7]}
BLOCK, BLOCKS = 50, 40


# ---- one stack -------------------------------------------------------------------------------------------------------


def outcome(ground: Ground, methods: list[dict[str, Any]], **train: Any) -> dict[str, Any]:
    """Train a stack in passing: `trains`, `refused` with the reason, or `failed` with what was raised."""
    folder = Path(tempfile.mkdtemp(prefix="hybridengine-stack-"))
    started = time.perf_counter()
    try:
        reason = check(ground, methods, folder / "run", **train)
        found = {"result": "trains" if reason is None else "refused", "reason": reason}
    except Exception as error:  # the record tells it, and the command fails
        found = {"result": "failed", "reason": "".join(traceback.format_exception_only(error)).strip()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {**found, "seconds": round(time.perf_counter() - started, 2)}


def run_pair(kind: str, pair: tuple[str, str]) -> dict[str, Any]:
    """Two steps of a pair of methods on a kind of model."""
    ground = PAIR_GROUNDS[kind]
    return outcome(ground, complete(pair, ground), max_steps=2)


# ---- records ---------------------------------------------------------------------------------------------------------


def records(what: str) -> Iterator[dict[str, Any]]:
    """All lines written so far, later ones of the same key last."""
    for path in sorted(RECORDS.glob(f"{what}-*.jsonl"), key=lambda p: p.stat().st_mtime):
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _pair_records() -> Iterator[dict[str, Any]]:
    """Records of pairs: those that the result holds, whose members have not changed since, then all lines written."""
    stored = json.loads(RESULT.read_text(encoding="utf-8"))
    same = [n for n in stored["methods"] if n in PARAMETERS and stored["sources"][n] == digest(n)]
    for kind in PAIR_GROUNDS:
        refused, missing = stored["refused"][kind], set(stored["missing"][kind])
        for pair in itertools.combinations(same, 2):
            if (key := "+".join(pair)) not in missing:
                reason = stored["reasons"][refused[key]] if key in refused else None
                found = {"result": "refused" if reason else "trains", "reason": reason, "seconds": 0.0}
                yield {"kind": kind, "pair": list(pair), "digest": digest(*pair), **found}
    yield from records("pairs")


def digest(*names: str) -> str:
    """Of the sources of these methods: a pair is run again when one of its members changed."""
    return hashlib.sha256(b"".join(map(_source, names))).hexdigest()[:12]


@functools.cache
def _source(name: str) -> bytes:
    return Path(inspect.getsourcefile(Catalogue().find(name).load()) or "").read_bytes()


def mine(shard: str, items: list[Any]) -> list[Any]:
    """The share of shard K/N."""
    index, count = map(int, shard.split("/"))
    return items[index - 1 :: count]


def _append(what: str, shard: str, record: dict[str, Any]) -> None:
    RECORDS.mkdir(parents=True, exist_ok=True)
    with (RECORDS / f"{what}-{shard.replace('/', 'of')}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    if record["result"] == "failed":
        print("failed:", json.dumps(record, ensure_ascii=False), flush=True)


def pairs(shard: str) -> bool:
    """Run what this shard has not recorded; returns whether nothing failed."""
    known = {(r["kind"], *r["pair"], r["digest"]) for r in _pair_records() if r["result"] != "failed"}
    every = [(kind, *pair) for pair in itertools.combinations(sorted(PARAMETERS), 2) for kind in PAIR_GROUNDS]
    good = True
    for kind, *pair in mine(shard, every):
        if (kind, *pair, mark := digest(*pair)) in known:
            continue
        found = run_pair(kind, (pair[0], pair[1]))
        _append("pairs", shard, {"kind": kind, "pair": pair, "digest": mark, **found})
        good &= found["result"] != "failed"
    return good


def random_stacks(shard: str) -> bool:
    """Run the blocks of draws that this shard has not finished."""
    good = True
    finished = {r["block"] for r in records("stacks") if r.get("last")}
    for block in mine(shard, sorted(set(range(BLOCKS)) - finished)):
        drawn: list[dict[str, Any]] = []

        @seed(block)
        @settings(
            max_examples=BLOCK, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(stacks(least=3))
        def run(stack: tuple[Ground, list[dict[str, Any]], dict[str, Any]], drawn: Any = drawn, b: int = block) -> None:
            ground, methods, train = stack
            found = outcome(ground, methods, **train)
            drawn.append({"block": b, "ground": str(ground), "methods": methods, "train": train, **found})

        run()
        for index, record in enumerate(drawn):
            _append("stacks", shard, {**record, "last": index == len(drawn) - 1})
            good &= record["result"] != "failed"
    return good


# ---- what is committed -----------------------------------------------------------------------------------------------


def write() -> bool:
    """Gather the records of present methods into `matrix.json`, and tell them in `docs/support-matrix.md`."""
    now = sorted(PARAMETERS)
    latest = _latest(set(now))
    drawn = {(r["block"], json.dumps(r["methods"]), r["ground"]): r for r in records("stacks")}.values()
    expected = len(PAIR_GROUNDS) * len(now) * (len(now) - 1) // 2
    for found in latest.values():
        found["reason"] = found["reason"] and anonymous(found["reason"], found["pair"])
    reasons = sorted({r["reason"] for r in latest.values() if r["reason"]})
    results = {
        "torch": torch.__version__,
        "methods": now,
        "sources": {name: digest(name) for name in now},
        "expected_pairs": expected,
        "pairs": _counts(list(latest.values())),
        "stacks": _counts(list(drawn)),
        "reasons": reasons,
        "refused": {
            kind: {
                "+".join(r["pair"]): reasons.index(r["reason"])
                for (k, *_), r in sorted(latest.items())
                if k == kind and r["reason"]
            }
            for kind in PAIR_GROUNDS
        },
    }
    results["missing"] = {
        kind: ["+".join(pair) for pair in itertools.combinations(now, 2) if (kind, *pair) not in latest]
        for kind in PAIR_GROUNDS
    }
    RESULT.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")
    print(f"pairs: {results['pairs']} of {expected}; random stacks: {results['stacks']}")
    return results["pairs"]["total"] == expected and not results["pairs"]["failed"] and not results["stacks"]["failed"]


def _latest(now: set[str]) -> dict[tuple[str, ...], dict[str, Any]]:
    """The record of each pair whose members are as they were then; a failure only where nothing better came since."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in _pair_records():
        key = (record["kind"], *record["pair"])
        known = found.get(key, {"result": "failed"})["result"] != "failed"
        if now.issuperset(record["pair"]) and record["digest"] == digest(*record["pair"]):
            if not (known and record["result"] == "failed"):
                found[key] = record
    return found


def anonymous(reason: str, pair: list[str]) -> str:
    """A reason with X for the method that it names first and Y for the other: one line for all pairs it is given to."""
    reason = re.sub(r"\S*hybridengine-tiny-\w+", "MODEL", reason)
    places = {name: re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", reason) for name in pair}
    order = sorted((place.start(), name) for name, place in places.items() if place)
    for (_, name), letter in zip(order, "XY", strict=False):
        reason = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", letter, reason)
    return reason


def _counts(found: list[dict[str, Any]]) -> dict[str, int]:
    tally = {result: sum(r["result"] == result for r in found) for result in ("trains", "refused", "failed")}
    return {"total": len(found), **tally}


def covering_stacks(size: int = 4) -> list[tuple[str, ...]]:
    """Stacks in which every pair that trains on an encoder stands together at least once, drawn greedily."""
    known = json.loads(RESULT.read_text(encoding="utf-8"))
    refused = {tuple(sorted(pair.split("+"))) for pair in known["refused"]["encoder"]}
    missing = {tuple(pair.split("+")) for pair in known["missing"]["encoder"]}
    fits = set(itertools.combinations(known["methods"], 2)) - refused - missing
    left, order, chosen = set(fits), random.Random(0), []
    while left:
        stack = list(min(left))
        others = [name for name in known["methods"] if name not in stack]
        order.shuffle(others)
        while len(stack) < size:
            gains = {
                name: sum(tuple(sorted((name, one))) in left for one in stack)
                for name in others
                if name not in stack and all(tuple(sorted((name, one))) in fits for one in stack)
            }
            if not gains or not max(gains.values()):
                break
            stack.append(max(gains, key=lambda name: gains[name]))
        left -= set(itertools.combinations(sorted(stack), 2))
        chosen.append(tuple(sorted(stack)))
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pairs", "stacks", "write"))
    parser.add_argument("--shard", default="1/1", metavar="K/N")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.what == "write":
        return 0 if write() else 1
    return 0 if {"pairs": pairs, "stacks": random_stacks}[options.what](options.shard) else 1


if __name__ == "__main__":
    sys.exit(main())
