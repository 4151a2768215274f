"""``dataset.json``, the table of contents of the Decathlon and of nnU-Net."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_meta.data.layouts.base import Found
from prism_meta.data.layouts.names import FileNames
from prism_meta.data.layouts.search import SUFFIXES
from prism_meta.errors import CaseError, Fault

#: Name of the file.
CONTENTS = "dataset.json"
#: No table of contents is as long as this, in bytes; a volume or a device is.
_LONGEST = 10**8


@dataclass(frozen=True)
class DatasetJson:
    """The part of ``dataset.json`` that tells where the cases are.

    Args:
        path: the file.
        channels: names of the channels, in order.
        training: pairs of an image and its label, as the file lists them; None if it lists none.
        test: images without labels.
    """

    path: Path
    channels: tuple[str, ...]
    training: tuple[tuple[str, str], ...] | None
    test: tuple[str, ...]

    def assign(self, names: FileNames, found: Found) -> dict[str, int]:
        """The channel of each modality that has one.

        Args:
            names: modalities and the patterns of their names.
            found: receives the other channels, and a fault for each that two channels have.
        """
        found.kind = "channels that are called"
        owned: dict[str, int] = {}
        images = FileNames(names.modalities, None, names.patterns)
        for index, channel in enumerate(self.channels):
            name = images.owner(channel)
            if name is None:
                found.others[channel] += 1
            elif name in owned:
                message = (
                    f"{self.path}: the channels {self.channels[owned[name]]!r} and {channel!r} both mean "
                    f"{name}, expected one; tell them apart with a pattern"
                )
                found.faults.append(Fault(message, "files"))
            else:
                owned[name] = index
        if not owned:
            message = (
                f"{self.path}: has the channels {', '.join(self.channels)}, expected some of "
                f"{', '.join(names.modalities)}; name the modalities so, or give patterns"
            )
            found.faults.append(Fault(message, "modalities", "files"))
        return owned


def read_contents(path: Path, *, lists_training: bool) -> DatasetJson:
    """Read ``dataset.json``.

    Args:
        path: the file.
        lists_training: whether it must list the training cases.

    Raises:
        CaseError: it cannot be read, or is not of this form (all faults together).
    """
    content = read_json(path, "dataset.json")
    faults: list[str] = []
    if not isinstance(content, dict):
        raise CaseError(
            f"{path}: has a {_kind(content)}, expected an object with channel names; restore the file"
        )
    channels = _channels(content, faults)
    if "file_ending" in content and content["file_ending"] not in SUFFIXES:
        faults.append(
            f"file_ending is {content['file_ending']!r}, expected .nii.gz or .nii; convert the files to "
            "NIfTI"
        )
    training = _training(content, faults, needed=lists_training)
    test = _test(content, faults) if lists_training else ()
    if faults:
        raise CaseError([f"{path}: {fault}" for fault in faults])
    return DatasetJson(path, channels, training, test)


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file.

    Raises:
        CaseError: it cannot be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("no regular file")
        with path.open("rb") as file:
            content = file.read(_LONGEST + 1)
        if len(content) > _LONGEST:
            raise ValueError(f"more than {_LONGEST} bytes")
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique)
    # ValueError: also no UTF-8, a NUL in the path, or a number of thousands of digits.
    except (OSError, ValueError, RecursionError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or "too deep"
        raise CaseError(
            f"{path}: cannot be read as {what} ({reason[:120]}); correct or restore the file"
        ) from error


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object; JSON itself would keep only the last of two equal keys."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} occurs twice")
        found[key] = value
    return found


def _channels(content: dict[str, Any], faults: list[str]) -> tuple[str, ...]:
    key = next((key for key in ("channel_names", "modality") if key in content), None)
    if key is None:
        faults.append(
            'has no channel_names (nnU-Net) and no modality (Decathlon), expected e.g. "channel_names": '
            '{"0": "T1", "1": "T2"}; add them'
        )
        return ()
    table = content[key]
    if isinstance(table, list):
        table = {str(index): name for index, name in enumerate(table)}
    valid = (
        isinstance(table, dict)
        and table
        and all(isinstance(name, str) and name.strip() for name in table.values())
        and sorted(table) == sorted(map(str, range(len(table))))
    )
    if not valid:
        faults.append(
            f"{key} is {_short(content[key])}, expected the name of each channel by its number, from 0 "
            'without a gap, e.g. {"0": "T1", "1": "T2"}; correct it'
        )
        return ()
    names = tuple(table[str(index)].strip() for index in range(len(table)))
    twice = sorted({name for name in names if names.count(name) > 1})
    faults.extend(
        f"{key} has the name {name!r} twice, expected different names; rename one" for name in twice
    )
    return names


def _training(
    content: dict[str, Any], faults: list[str], *, needed: bool
) -> tuple[tuple[str, str], ...] | None:
    if not needed:
        return None
    listed = content.get("training")
    if not isinstance(listed, list) or not listed:
        faults.append(f"training is {_short(listed)}, expected a list of images and labels; add it")
        return ()
    pairs = []
    for number, entry in enumerate(listed, start=1):
        pair = (
            tuple(entry.get(key) for key in ("image", "label")) if isinstance(entry, dict) else ()
        )
        if len(pair) == 2 and all(map(_is_path, pair)):
            pairs.append((str(pair[0]), str(pair[1])))
        else:
            faults.append(
                f"training, entry {number}: is {_short(entry)}, expected the paths of an image and a "
                'label, e.g. {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}; correct it'
            )
    return tuple(pairs)


def _test(content: dict[str, Any], faults: list[str]) -> tuple[str, ...]:
    listed = content.get("test", [])
    if not isinstance(listed, list):
        faults.append(f"test is {_short(listed)}, expected a list of images; correct it")
        return ()
    found = []
    for number, entry in enumerate(listed, start=1):
        path = entry.get("image") if isinstance(entry, dict) else entry
        if _is_path(path):
            found.append(str(path))
        else:
            faults.append(
                f"test, entry {number}: is {_short(entry)}, expected the path of an image; correct it"
            )
    return tuple(found)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _kind(value: object) -> str:
    return {list: "list", str: "text", bool: "truth value", type(None): "null"}.get(
        type(value), "number"
    )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:77]}..."
