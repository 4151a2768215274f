"""What a layout is: how the cases of a data set lie on disk."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from prism_meta.data.cases import Case
from prism_meta.data.layouts.names import FileNames, endings, nearest_ending
from prism_meta.errors import Fault, one_line
from prism_meta.modalities import composed

#: Bytes. File systems take 255, of which the names of outputs need some for suffixes.
_LONGEST_NAME = 200
#: Endings in a message.
_SHOWN = 8


@dataclass
class Found:
    """The cases that a layout found.

    Args:
        layout: what the layout is called.
        cases: those without faults, sorted by name.
        faults: of the other cases, and of the data set.
        others: how files end that belong to no modality and no label, and how many end so.
        kind: what ``others`` are, for messages. Defaults to "files that end in".
        refused: cases with faults that have files nevertheless.
        only_predicted: whether there are images without labels, which only predictions use.
    """

    layout: str
    cases: list[Case] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    kind: str = "files that end in"
    refused: list[Case] = field(default_factory=list)
    only_predicted: bool = False

    def sentence(self) -> str:
        """The layout and the number of cases.

        Example:
            >>> Found("BIDS").sentence()
            'layout: BIDS, 0 cases'
        """
        count = len(self.cases)
        sites = {case.site for case in self.cases if case.site is not None}
        said = f"layout: {self.layout}, {count} case{'' if count == 1 else 's'}"
        return f"{said}, {len(sites)} sites" if len(sites) > 1 else said

    def add(self, case: Case, faults: Sequence[str]) -> None:
        """Add a case without faults, or its faults."""
        self.faults.extend(faults)
        if not faults:
            self.cases.append(case)
        elif case.files:
            self.refused.append(case)

    def modality_faults(self, names: FileNames) -> list[str]:
        """The modalities that no case has: a fault of names rather than a missing rate of 1."""
        if not self.cases:
            return []
        return [
            self._absent(name, f"data.modalities: none of {len(self.cases)} cases has {name!r}")
            for name in names.modalities
            if not any(name in case.files for case in self.cases)
        ]

    def notes(self, names: FileNames) -> list[str]:
        """What a prediction should know, although all its cases are usable: modalities that none has,
        while there are files that belong to no modality."""
        absent = [m for m in names.modalities if not any(m in case.files for case in self.cases)]
        if not self.cases or not absent or not self.others:
            return []
        return [f"no case has {', '.join(absent)}; found other {self._others()}"]

    def label_faults(self, names: FileNames) -> list[str]:
        """The label, if most cases lack it."""
        count = len(self.cases)
        there = sum(case.label is not None for case in self.cases)
        if names.label is None or 2 * there >= count:
            return []
        return [
            self._absent(
                names.label, f"data.label: only {there} of {count} cases have {names.label!r}"
            )
        ]

    def _others(self) -> str:
        listed = [f"{ending} ({count})" for ending, count in self.others.most_common(_SHOWN)]
        if len(self.others) > _SHOWN:
            listed.append(f"{len(self.others) - _SHOWN} more")
        return f"{self.kind} {', '.join(listed)}"

    def _absent(self, name: str, lack: str) -> str:
        near = nearest_ending(name, self.others)
        if not self.others:
            others, fix = "no other files", "add its files, or correct the name"
        else:
            others = self._others()
            fix = f"name it as they do, or set data.files.{name} to a pattern of its files"
        if near is not None:
            others += f", of which {near} is the nearest"
            word = near.strip("_-")
            fix = f'name it {word} there, or set data.files.{name} = ["*{near}*"]'
        return f"{lack}, expected files like *{name}.nii.gz, found {others}; {fix}"


class Layout(ABC):
    """A way in which the cases of a data set lie on disk.

    Attributes:
        name: the value of ``data.layout``.
        title: what messages call it.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def matches(self, root: Path, names: FileNames) -> bool:
        """Whether the data set at ``root`` has this layout."""

    @abstractmethod
    def find(self, root: Path, names: FileNames) -> Found:
        """Find the cases at ``root``; reads headers, but no voxels."""


def build_case(
    name: str,
    names: FileNames,
    owned: Mapping[str, Sequence[Path]],
    *,
    channels: Mapping[str, int] | None = None,
    site: str | None = None,
    patient: str = "",
) -> tuple[Case, list[str]]:
    """A case of the files that belong to it, and its faults: of its name, its files and their headers.

    Args:
        name: of the case.
        names: modalities and label.
        owned: modality or label -> its files; more than one is a fault.
        channels: see ``Case``.
        site: see ``Case``.
        patient: see ``Case``.
    """
    # Tables and file systems differ in how they write letters with accents.
    name = composed(name)
    faults: list[str] = [*name_faults(name)]
    for key, files in owned.items():
        if len(files) > 1:
            listed = ", ".join(path.name for path in files)
            message = f"case {name}: {len(files)} files for {key!r} ({listed}); keep one per folder"
            faults.append(Fault(message, "files"))
    label = owned.get(names.label, []) if names.label is not None else []
    case = Case(
        name,
        names.modalities,
        files={m: owned[m][0] for m in names.modalities if owned.get(m)},
        label=label[0] if label else None,
        channels=dict(channels or {}),
        site=site,
        patient=patient,
        align=names.align,
    )
    return case, [*faults, *case.header_faults(names.notes)] if case.files else faults


def name_faults(name: str, what: str = "the name of the folder") -> list[str]:
    """What keeps outputs and tables from using the name of a case."""
    fix = "rename the folder" if what == "the name of the folder" else "rename the case"
    faults = []
    if one_line(name) != name:
        faults.append(
            f"case {name}: {what} is not UTF-8, or has control characters, expected a name that tables "
            f"can hold; {fix}"
        )
    if "/" in name or name in (".", ".."):
        faults.append(
            f"case {name}: {what} has a slash or is a folder, expected a name of files; {fix}"
        )
    size = len(os.fsencode(name))
    if size > _LONGEST_NAME:
        faults.append(
            f"case {name}: the name has {size} bytes, expected at most {_LONGEST_NAME}, because outputs "
            f"are named after the case; {fix}"
        )
    return faults


def only_once(found: Found, counts: Counter[str], fault: str) -> None:
    """Leave out the cases whose name occurs more than once, and say so.

    Args:
        found: receives the faults.
        counts: name of a case -> how often it occurs.
        fault: what is said after the count.
    """
    twice = {name: count for name, count in counts.items() if count > 1}
    found.faults[:0] = [f"case {name}: {count} {fault}" for name, count in twice.items()]
    found.cases = [case for case in found.cases if case.id not in twice]
    found.refused = [case for case in found.refused if case.id not in twice]


def remaining(files: Iterable[str], owned: Mapping[str, Sequence[str]], case: str) -> Counter[str]:
    """How those files of a case end that belong to no modality and no label."""
    taken = {file for matches in owned.values() for file in matches}
    return endings((file for file in files if file not in taken), case)


def is_folder(path: Path) -> bool:
    """Whether there is a folder at a path, which may be too long, or have a NUL."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
