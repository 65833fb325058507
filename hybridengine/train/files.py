"""Files that survive a crash: staged beside their destination, flushed to disk, renamed at the end."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hybridengine.errors import OutputError

__all__ = [
    "MANIFEST",
    "append_lines",
    "clear_leftovers",
    "damage",
    "finite",
    "replace_folder",
    "write_json",
    "write_text",
]

MANIFEST = "manifest.json"
_STAGING, _RETIRED, _STAGED = ".staging-", ".retired-", ".staged"


def write_text(path: Path, text: str) -> None:
    """Replace a file's content atomically."""
    staged = path.with_name(f".{path.name}{_STAGED}")
    with _explained(path, len(text)):
        try:
            staged.write_text(text, encoding="utf-8")
            _flush(staged)
            os.replace(staged, path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        _flush(path.parent)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines to the end of a file."""
    with _explained(path), path.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically; NaN is refused by JSON and written as null."""
    write_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """The value with None for every NaN and infinity in it, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


@contextlib.contextmanager
def replace_folder(destination: Path) -> Iterator[Path]:
    """Write a folder's files inside; it appears under its name complete, with a SHA-256 manifest, or not at all.

    An existing folder of that name is replaced; a crash leaves the old one or the new one, after `clear_leftovers`.
    """
    parent = destination.parent
    staging = parent / f"{_STAGING}{destination.name}"
    retired = parent / f"{_RETIRED}{destination.name}"
    with _explained(destination):
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in (staging, retired):
            shutil.rmtree(leftover, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
            _seal(staging)
            if destination.exists():
                os.rename(destination, retired)
            os.rename(staging, destination)
            _flush(parent)
            shutil.rmtree(retired, ignore_errors=True)
        except BaseException:
            if retired.exists() and not destination.exists():
                os.rename(retired, destination)
            shutil.rmtree(staging, ignore_errors=True)
            raise


def clear_leftovers(folder: Path) -> None:
    """Remove what a crash left half-written in a folder, and put back what it had moved out of the way."""
    with _explained(folder):
        for left in folder.glob(f"{_RETIRED}*"):
            destination = folder / left.name.removeprefix(_RETIRED)
            if not destination.exists():
                os.rename(left, destination)
        for left in (*folder.glob(f"{_STAGING}*"), *folder.glob(f"{_RETIRED}*")):
            shutil.rmtree(left)
        for file in folder.glob(f".*{_STAGED}"):
            file.unlink()


def damage(folder: Path) -> str | None:
    """Why a sealed folder cannot be trusted (a file missing, cut or changed), or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a changed byte can make it any other JSON
        return f"{folder / MANIFEST} is missing or unreadable"
    for name, (size, digest) in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size or _digest(path) != digest:
            return f"{path} has changed since it was written"
    return None


def _seal(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:  # safetensors makes its files private; the folder's own mode follows the umask
        path.chmod(folder.stat().st_mode & 0o666)
    listed = {
        str(p.relative_to(folder)): {"sha256": _digest(p), "bytes": p.stat().st_size}
        for p in files
        if p.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"files": listed}, indent=1) + "\n", encoding="utf-8")
    for path in [*files, folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _flush(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _explained(path: Path, size: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(_explain(path, size, error)) from error
    except Exception as error:  # safetensors and tokenizers, written in Rust, tell the system's error in words only
        told = re.search(r"\(os error (\d+)\)", str(error))
        if told is None:
            raise
        raise OutputError(_explain(path, size, OSError(int(told[1]), os.strerror(int(told[1]))))) from error


def _explain(path: Path, size: int, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(where).free
        need = f"{size:,} bytes are needed and " if size else ""
        return (
            f"{path}: cannot be written, the disk or quota is full ({need}{free:,} bytes are free). Earlier"
            " checkpoints are intact; free some space and run the same command to go on."
        )
    reason = error.strerror or str(error)
    return f"{path}: cannot be written ({reason}); choose another `output` folder or change its permissions"
