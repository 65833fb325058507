"""Rows from files, from Python values, or from Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hybridengine.data import SPLITS, SUFFIXES, columns_to_rows, read_rows
from hybridengine.errors import DataError
from hybridengine.model import hub_or_cache
from hybridengine.plugin import Run, Split, Traits, hook, parameter

__all__ = ["Files"]

_HUB = "hf:"
_SOURCE = "a path, hf:NAME[/CONFIG][:SPLIT], or from Python rows, columns or a dataset"


@dataclass(eq=False)
class Files:
    """Read each split from where its key points.

    - a file: `.jsonl`, `.json`, `.csv`, `.tsv` (each also `.gz`) or `.parquet`, UTF-8;
    - a list of files, read one after the other;
    - a folder: one that `datasets` wrote with `save_to_disk`, otherwise every data file in it, in order of name;
    - `hf:NAME`, `hf:NAME/CONFIG`, each with `:SPLIT` where the hub's split has another name: a hub dataset;
    - from Python: a list of mappings, a mapping of columns, or a `datasets.Dataset`.

    Class ids of a Hugging Face dataset become class names. Every row keeps its `file:line` (Parquet, JSON and
    datasets: row number) for messages.

    Hooks: `build_data`.
    """

    traits: ClassVar[Traits] = Traits(kind="data", family="data", cost="reads every row once", combines="any task")

    train: Any = parameter(help=f"training rows: {_SOURCE}", example="rows.jsonl")
    validation: Any = parameter(None, f"validation rows: {_SOURCE}; carved from training when left out")
    test: Any = parameter(None, f"test rows: {_SOURCE}")
    unlabelled: Any = parameter(None, f"rows without labels, for methods that use them: {_SOURCE}")
    quoted: bool = parameter(True, "whether fields of CSV and TSV may stand in double quotes (GLUE's TSV: false)")

    @hook
    def build_data(self, run: Run) -> dict[str, Split]:
        """Raw rows of every split that is given."""
        sources = {name: getattr(self, name) for name in SPLITS}
        return {name: self._split(name, source) for name, source in sources.items() if source is not None}

    def _split(self, name: str, source: Any) -> Split:
        if isinstance(source, Split):
            return Split(name, source.rows, source.source, source.lines)
        if isinstance(source, str) and source.startswith(_HUB):
            return _from_dataset(name, _load_from_hub(source, name), source)
        if isinstance(source, str | Path):
            return self._from_path(name, Path(source))
        if hasattr(source, "column_names"):
            return _from_dataset(name, _choose(source, name, f"data.{name}"), f"data.{name}")
        if isinstance(source, Mapping):
            columns = {key: list(values) for key, values in source.items()}
            return Split(name, columns_to_rows(columns, f"data.{name}"), f"data.{name}")
        if isinstance(source, list | tuple) and source and all(isinstance(item, str | Path) for item in source):
            return _joined(name, (self._from_path(name, Path(item)) for item in source))
        if isinstance(source, list | tuple):
            return _from_list(name, source)
        raise DataError(f"data.{name}: cannot read rows from a {type(source).__name__}; give {_SOURCE}")

    def _from_path(self, name: str, path: Path) -> Split:
        if not _is_folder(path):
            lines, rows = _columns(read_rows(path, quoted=self.quoted))
            return Split(name, rows, str(path), lines)
        if any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            return _from_dataset(name, _load_folder(path, name), str(path))
        files = sorted(f for f in path.iterdir() if f.name.removesuffix(".gz").endswith(SUFFIXES))
        if not files:
            raise DataError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file and no saved dataset")
        return _joined(name, (self._from_path(name, file) for file in files))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # e.g. a name that is too long; reading it as a file tells why
        return False


def _columns(numbered: Iterator[tuple[int, dict[str, Any]]]) -> tuple[list[int], list[dict[str, Any]]]:
    lines, rows = [], []
    for number, row in numbered:
        lines.append(number)
        rows.append(row)
    return lines, rows


def _joined(name: str, parts: Iterator[Split]) -> Split:
    rows: list[Mapping[str, Any]] = []
    lines: list[int | str] = []
    for part in parts:
        rows.extend(part.rows)
        lines.extend(part.where(i) for i in range(len(part)))
    return Split(name, rows, "", lines)


def _from_list(name: str, rows: list[Any] | tuple[Any, ...]) -> Split:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            kind = type(row).__name__
            raise DataError(f"data.{name}:{number}: expected a mapping such as {{'text': ...}}, got a {kind}")
    return Split(name, rows, f"data.{name}")


# ---- Hugging Face datasets -------------------------------------------------------------------------------------------


def _load_folder(path: Path, name: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises whatever Arrow, JSON and the file system raise
        raise DataError(f"{path}: not a readable saved dataset ({type(error).__name__}: {error})") from error
    return _choose(loaded, name, str(path))


def _load_from_hub(source: str, name: str) -> Any:
    import datasets

    identity, _, split = source.removeprefix(_HUB).partition(":")
    parts = identity.split("/")
    if not all(parts) or len(parts) > 3:
        raise DataError(f"data.{name}: {source!r} is not hf:NAME[/CONFIG][:SPLIT], e.g. hf:stanfordnlp/sst2")
    candidates: list[tuple[str, str | None]] = [("/".join(parts[:2]), parts[2] if len(parts) == 3 else None)]
    if len(parts) == 2:  # an old name without owner, and its configuration
        candidates.append((parts[0], parts[1]))
    failure: Exception | None = None
    for repository, config in candidates:
        try:
            with hub_or_cache():
                return datasets.load_dataset(repository, config, split=split or name)
        except Exception as error:  # network, hub, parsing and configuration errors share no base class
            failure = failure or error
    raise DataError(
        f"{source}: cannot be loaded from the hub ({type(failure).__name__}: {str(failure).partition(chr(10))[0]}). "
        "Without network: where there is one, save it with datasets' save_to_disk(FOLDER), copy the folder here and "
        f"set data.{name}: FOLDER. A split of another name is written {_HUB}{identity}:SPLIT"
    ) from failure


def _choose(loaded: Any, name: str, source: str) -> Any:
    """The dataset itself, or the split of a DatasetDict."""
    if not isinstance(loaded, Mapping):
        return loaded
    if name not in loaded:
        raise DataError(f"{source}: the saved dataset has no split {name!r}, only {', '.join(loaded)}; name its folder")
    return loaded[name]


def _from_dataset(name: str, dataset: Any, source: str) -> Split:
    names = {column: _class_names(feature) for column, feature in (dataset.features or {}).items()}
    named = {column: classes for column, classes in names.items() if classes}
    rows = []
    for row in dataset:
        for column, classes in named.items():
            row[column] = _to_names(row[column], classes)
        rows.append(row)
    return Split(name, rows, source)


def _class_names(feature: Any) -> list[str] | None:
    """Names of a ClassLabel, also inside a list."""
    while getattr(feature, "feature", None) is not None:
        feature = feature.feature
    return getattr(feature, "names", None)


def _to_names(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_to_names(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
