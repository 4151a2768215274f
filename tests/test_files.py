"""Files are whole or not there, and a place that cannot be written is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from niftis import forbidden

from prism_meta.errors import OutputError
from prism_meta.files import atomic, writable_folder


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_atomic_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old", "the old file must stand until the block has ended"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_who_reads_meanwhile_keeps_the_old_file(tmp_path: Path) -> None:
    """The name moves to the new file in one step; the old one is not written over."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    with path.open() as reader:
        with atomic(path) as partial:
            partial.write_text("new")
        assert reader.read() == "old"


def test_atomic_makes_the_folder(tmp_path: Path) -> None:
    with atomic(str(tmp_path / "b" / "c" / "a.txt")) as partial:
        partial.write_text("new")
    assert (tmp_path / "b" / "c" / "a.txt").read_text() == "new"


def test_atomic_writes_to_a_hidden_neighbour_with_the_same_suffixes(tmp_path: Path) -> None:
    with atomic(tmp_path / "map.nii.gz") as partial:
        partial.write_text("new")
        assert partial.parent == tmp_path
        assert partial.name.startswith(".")
        assert partial.suffixes[-2:] == [".nii", ".gz"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_atomic_keeps_the_old_file_when_the_block_raises(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, atomic(path) as partial:
        partial.write_text("half")
        raise error
    assert caught.value is error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_atomic_leaves_nothing_when_the_block_raises_and_there_was_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), atomic(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise RuntimeError("stop")
    assert names(tmp_path) == []


def test_atomic_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(OutputError) as caught, atomic(path) as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    assert str(caught.value) == (
        f"cannot write {path}: no space left on device; choose a folder that you may write to"
    )
    assert names(tmp_path) == []


def test_atomic_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "a.txt"
    with pytest.raises(OutputError) as caught, atomic(path):
        pytest.fail("the block must not run")
    assert (
        str(caught.value)
        == f"cannot write {path}: file exists; choose a folder that you may write to"
    )


def test_atomic_target_is_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OutputError) as caught, atomic(path) as partial:
        partial.write_text("new")
    assert str(caught.value) == (
        f"cannot write {path}: is a directory; choose a folder that you may write to"
    )
    assert names(tmp_path) == ["folder"]


def test_atomic_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with forbidden(tmp_path), pytest.raises(OutputError) as caught, atomic(path) as partial:
        partial.write_text("new")
    assert str(caught.value) == (
        f"cannot write {path}: permission denied; choose a folder that you may write to"
    )
    assert path.read_text() == "old"


def test_writable_folder_makes_it_and_leaves_it_empty(tmp_path: Path) -> None:
    folder = writable_folder(str(tmp_path / "b" / "c"))
    assert folder == tmp_path / "b" / "c"
    assert names(folder) == []


def test_writable_folder_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    with pytest.raises(OutputError) as caught:
        writable_folder(path)
    assert (
        str(caught.value)
        == f"cannot write {path}: file exists; choose a folder that you may write to"
    )
    assert path.read_text() == "kept"


@pytest.mark.parametrize("below", [".", "new"])
def test_writable_folder_no_permission(tmp_path: Path, below: str) -> None:
    folder = tmp_path / below
    with forbidden(tmp_path), pytest.raises(OutputError) as caught:
        writable_folder(folder)
    assert str(caught.value) == (
        f"cannot write {folder}: permission denied; choose a folder that you may write to"
    )
