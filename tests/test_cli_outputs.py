"""An output file is complete or absent, and one that cannot be written is found before the work."""

import os
from pathlib import Path

import pytest

from logitless.cli.errors import InputError
from logitless.cli.outputs import check_distinct, staged


def test_the_file_appears_only_when_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with staged(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["out.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_failed_block_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")

    def fail_halfway() -> None:
        with staged(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]


def test_unwritable_places_are_refused_before_the_block(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "missing" / "out.json", tmp_path / "file" / "out.json"):
        with pytest.raises(InputError, match="cannot write"), staged(path):
            pytest.fail("the block ran")


def test_two_outputs_must_be_two_files(tmp_path: Path) -> None:
    check_distinct(tmp_path / "a", tmp_path / "b", None, None)
    with pytest.raises(InputError, match="same file"):
        check_distinct(tmp_path / "a", tmp_path / "x" / ".." / "a")
