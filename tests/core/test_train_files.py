"""Sealed folders: whatever happens to a manifest is noticed, and nothing that it then says can raise."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridengine.train.files import MANIFEST, damage, replace_folder


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    with replace_folder(tmp_path / "sealed") as staging:
        (staging / "a.json").write_text("{}")
        (staging / "deep").mkdir()
        (staging / "deep" / "b.txt").write_text("content")
    return tmp_path / "sealed"


def test_a_folder_as_it_was_written_is_sound(sealed: Path) -> None:
    assert damage(sealed) is None


def test_every_flipped_bit_of_a_manifest_is_damage(sealed: Path) -> None:
    path = sealed / MANIFEST
    good = path.read_bytes()
    for position in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            path.write_bytes(bad)
            assert damage(sealed), (position, bit)


@pytest.mark.parametrize(
    "manifest", ["[]", "1", '{"files": []}', '{"files": {"a.json": 1}}', '{"files": {"a.json": {}}}']
)
def test_another_json_is_no_manifest(sealed: Path, manifest: str) -> None:
    (sealed / MANIFEST).write_text(manifest)
    assert "unreadable" in (damage(sealed) or "")
