"""Human-rated review sentences from the source archive of vaderSentiment 0.5."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hybridengine.errors import DataError
from hybridengine.plugin import Run, Split, Traits, hook, parameter

__all__ = ["VaderReviews", "read_ratings", "recipe"]

SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
"""Of `vaderSentiment-0.5.zip`, as the package registry serves it."""

_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
_MEMBERS = ("movieReviewSnippets_GroundTruth.txt", "amazonReviewSnippets_GroundTruth.txt")
_GET = "get it with: pip download --no-deps --no-binary :all: vaderSentiment==0.5"

Rating = tuple[str, float, str]
"""Origin `member:line`, mean rating in [-4, 4], text."""


@dataclass(eq=False)
class VaderReviews:
    """Sentences of film and product reviews with the mean rating of the people who judged each, in [-4, 4].

    Source: `additional_resources/hutto_ICWSM_2014.tar.gz` in `vaderSentiment-0.5.zip` (MIT licence): 10,605
    sentences of film reviews and 3,708 of product reviews. Both archives are read in memory, nothing is unpacked;
    the SHA-256 of the outer one is checked.

    Recipe, fixed:

    1. rows with |rating| < 1 are dropped (the judges were undecided);
    2. the label is the sign of the rating, `negative` or `positive`;
    3. of rows with the same lower-cased text the first stays;
    4. h = SHA-1 of the lower-cased text (UTF-8), as an integer, mod 10: 0 is validation, 1 is test, the rest train.

    This gives 9,297 / 1,177 / 1,143 rows; what was dropped is counted in the run's notes.

    Paper: Hutto & Gilbert 2014, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text.
    Hooks: `build_data`.
    """

    traits: ClassVar[Traits] = Traits(
        kind="data",
        family="data",
        cost="reads 14,313 sentences",
        paper="Hutto & Gilbert 2014",
        combines="text-classification and anything that reads text",
    )

    archive: str = parameter(help=f"path of vaderSentiment-0.5.zip; {_GET}", min_length=1)

    @hook
    def build_data(self, run: Run) -> dict[str, Split]:
        """The three splits; says what was dropped."""
        path = Path(self.archive)
        splits, dropped = recipe(read_ratings(_verified(path)), str(path))
        run.say(
            f"vader-reviews: dropped {dropped['undecided']:,} sentences with |rating| < 1 "
            f"and {dropped['duplicate']:,} duplicates of {dropped['read']:,}"
        )
        return splits


def _verified(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {_GET}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise DataError(f"{path}: not the archive this recipe was written for (SHA-256 {found}, not {SHA256}); {_GET}")
    return content


def read_ratings(archive: bytes) -> list[Rating]:
    """Every rated sentence of the archive, in order.

    Args:
        archive: a zip whose member `.../additional_resources/hutto_ICWSM_2014.tar.gz` holds both rating files.

    Raises:
        DataError: a damaged archive, a missing member, or a line that is not id, rating and text.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as outer:
            inner = next((name for name in outer.namelist() if name.endswith(_INNER)), None)
            if inner is None:
                raise DataError(f"the archive has no member {_INNER}; {_GET}")
            content = outer.read(inner)
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as inner_archive:
            return [rating for member in _MEMBERS for rating in _member(inner_archive, member)]
    except (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"the archive is damaged ({error}); {_GET}") from None


def _member(archive: tarfile.TarFile, name: str) -> Iterator[Rating]:
    info = next((info for info in archive.getmembers() if info.isfile() and info.name.endswith("/" + name)), None)
    file = archive.extractfile(info) if info else None
    if file is None:
        raise DataError(f"{_INNER} has no member {name}; {_GET}")
    text = file.read().decode("utf-8-sig", errors="strict")
    for number, line in enumerate(text.split("\r\n"), 1):
        if not line:
            continue
        fields = line.split("\t")
        try:
            _, rating, sentence = fields
            yield f"{name}:{number}", float(rating), sentence
        except ValueError:
            raise DataError(f"{name}:{number}: expected id, rating and text, got {len(fields)} fields") from None


def recipe(ratings: list[Rating], source: str) -> tuple[dict[str, Split], Counter[str]]:
    """Label, filter, de-duplicate and split; also counts `read`, `undecided` and `duplicate`."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    lines: dict[str, list[str]] = {name: [] for name in rows}
    dropped: Counter[str] = Counter(read=len(ratings), undecided=0, duplicate=0)
    seen: set[str] = set()
    for origin, rating, text in ratings:
        key = text.lower()
        if abs(rating) < 1:
            dropped["undecided"] += 1
        elif key in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(key)
            tenth = int(hashlib.sha1(key.encode(), usedforsecurity=False).hexdigest(), 16) % 10
            name = {0: "validation", 1: "test"}.get(tenth, "train")
            rows[name].append({"text": text, "label": "positive" if rating > 0 else "negative"})
            lines[name].append(origin)
    return {name: Split(name, rows[name], source, lines[name]) for name in rows}, dropped
