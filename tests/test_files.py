"""Files are whole or not there, and a place that cannot be written is said in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from niftis import forbidden

from prism_meta.errors import OutputError
from prism_meta.files import atomic, kept_if_used, writable_folder, write_whole


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
    assert str(caught.value) == (f"cannot write {path}: no space left on device; free some space")
    assert names(tmp_path) == []


def test_what_fails_within_is_said_of_the_file_that_the_user_knows(tmp_path: Path) -> None:
    """A function that writes whole files may fill the temporary file of another."""
    path = tmp_path / "a.txt"
    with atomic(path) as outer:
        write_whole(outer, "new")
        assert names(tmp_path) == [outer.name], "no second temporary file"
    assert path.read_text() == "new"
    with pytest.raises(OutputError) as caught, atomic(path) as outer, atomic(outer):
        raise OSError(28, "No space left on device")
    assert str(caught.value) == f"cannot write {path}: no space left on device; free some space"
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


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


def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name has a random part; even the right name is refused, because it is created exclusively."""
    outside = tmp_path / "outside"
    outside.write_text("kept")
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 16)
    folder = tmp_path / "out"
    folder.mkdir()
    with atomic(folder / "a.txt") as partial:
        planted = partial.name
    (folder / planted).symlink_to(outside)
    with pytest.raises(OutputError, match="file exists"), atomic(folder / "a.txt") as partial:
        partial.write_text("new")
    assert outside.read_text() == "kept"


def test_temporary_names_differ(tmp_path: Path) -> None:
    with atomic(tmp_path / "a.txt") as first, atomic(tmp_path / "a.txt") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a.txt").read_text() == "1"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "a.txt", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 248 + ".nii.gz")
    write_whole(path, "text")
    assert names(tmp_path) == [path.name]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from prism_meta.files import atomic\n"
        "with atomic(sys.argv[1]) as partial: os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.txt"], check=False)
    (left,) = names(tmp_path)
    assert re.match(r"\.partial-", left)
    with atomic(tmp_path / "b.txt") as ours:
        writable_folder(tmp_path)
        assert names(tmp_path) == [ours.name], "a file that is being written must stay"


@pytest.mark.parametrize("days", [0.5, 2])
def test_those_of_another_host_are_removed_after_a_day(tmp_path: Path, days: float) -> None:
    left = tmp_path / f".partial-elsewhere-1-{'0' * 16}.txt"
    left.write_text("half")
    then = left.stat().st_mtime - days * 24 * 3600
    os.utime(left, (then, then))
    writable_folder(tmp_path)
    assert left.exists() == (days < 1)


def test_a_new_folder_is_kept_only_if_it_is_used(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "old" / "a" / "b"
    old.mkdir()
    with pytest.raises(RuntimeError), kept_if_used(new):
        new.mkdir(parents=True)
        raise RuntimeError("refused")
    assert names(old) == []
    with pytest.raises(RuntimeError), kept_if_used(new):
        new.mkdir(parents=True)
        (new / "file").write_text("used")
        raise RuntimeError("later")
    assert names(new) == ["file"]
