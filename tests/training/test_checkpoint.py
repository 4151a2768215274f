"""Checkpoints: the last two are kept, and a damaged one is never used."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prism_meta.errors import OutputError, PrismError
from prism_meta.training.folder.checkpoint import load_checkpoint, previous, save_checkpoint

CPU = torch.device("cpu")


def saved(folder: Path, *steps: int) -> Path:
    path = folder / "checkpoint.pt"
    for step in steps:
        save_checkpoint(path, {"step": step, "weights": torch.full((64,), float(step))})
    return path


def flipped(content: bytes, byte: int) -> bytes:
    return content[:byte] + bytes([content[byte] ^ 1]) + content[byte + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "garbage": lambda content: b"\x00\x01garbage" * 50,
    "another pickle": lambda content: b"cos\nsystem\n(S'echo'\ntR.",
}


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    path = saved(tmp_path, 1, 2, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]
    steps = [torch.load(p, weights_only=True)["step"] for p in (path, previous(path))]
    assert steps == [3, 2]


def test_none_at_all(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "checkpoint.pt", CPU) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_previous_one_replaces_a_damaged_one(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path, 1, 2)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        state = load_checkpoint(path, CPU)
    assert state is not None and state["step"] == 1
    (message,) = caplog.messages
    assert message.startswith(f"{path}: cannot be read as a checkpoint (")
    assert message.endswith("; training continues from checkpoint.previous.pt")


def test_the_previous_one_replaces_one_that_was_never_renamed(tmp_path: Path) -> None:
    path = saved(tmp_path, 1, 2)
    path.unlink()
    state = load_checkpoint(path, CPU)
    assert state is not None and state["step"] == 1


def test_every_flipped_bit_of_a_tensor_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    content = path.read_bytes()
    start = content.index(torch.full((64,), 1.0).numpy().tobytes())
    for byte in range(start, start + 256):
        path.write_bytes(flipped(content, byte))
        with pytest.raises(PrismError, match=r"the checksum of .* is wrong"):
            load_checkpoint(path, CPU)


def test_no_flipped_bit_anywhere_gives_other_values(tmp_path: Path) -> None:
    path = saved(tmp_path, 7)
    content = path.read_bytes()
    for byte in range(0, len(content), 5):
        path.write_bytes(flipped(content, byte))
        try:
            state = load_checkpoint(path, CPU)
        except PrismError:
            continue
        assert state is not None and state["step"] == 7
        assert torch.equal(state["weights"], torch.full((64,), 7.0))


def test_both_damaged(tmp_path: Path) -> None:
    path = saved(tmp_path, 1, 2)
    path.write_bytes(b"")
    previous(path).write_bytes(b"x")
    with pytest.raises(PrismError) as caught:
        load_checkpoint(path, CPU)
    assert [fault.split(": ")[0] for fault in caught.value.faults] == [
        str(path), str(previous(path)),
    ]  # fmt: skip
    assert all(
        fault.endswith("; restore the file, or delete it to train from the start")
        for fault in caught.value.faults
    )


@pytest.mark.parametrize("call", [(Path, "write_bytes"), (os, "fsync")], ids=lambda call: call[1])
def test_a_full_disk_keeps_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: tuple[object, str]
) -> None:
    """Some disks tell only when a file is synced that they are full."""
    path = saved(tmp_path, 1, 2)

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*call, full)
        with pytest.raises(OutputError, match="no space left on device; free some space"):
            saved(tmp_path, 3)
    state = load_checkpoint(path, CPU)
    assert state is not None and state["step"] == 2
    assert previous(path).exists() and len(list(tmp_path.iterdir())) == 2
