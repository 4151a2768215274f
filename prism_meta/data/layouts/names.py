"""Which modality or label a file belongs to, by its name."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files as package_files
from typing import Any

import tomlkit

from prism_meta.data.grids import Align, Notes
from prism_meta.data.layouts.search import SUFFIXES
from prism_meta.modalities import composed, file_tokens

#: A file that matches better than another belongs to the modality: by a pattern, by the modality's own
#: name, by a name that another data set has for it.
_PATTERN, _OWN, _OTHER = 3, 2, 1
#: The section of names that only messages know.
_SUGGESTED = "suggested"


@dataclass(frozen=True)
class FileNames:
    """The names that the files of a data set have.

    Args:
        modalities: names of the M modalities, in the model's order.
        label: name of the label files. None ignores them.
        patterns: modality or label -> patterns of its files, with ``*`` and ``?``, e.g. ``*_DE*``. A
            pattern with a slash also names folders within that of the case. Defaults to none.
        align: what happens to files that lie on other grids, see ``Case``.
        notes: receives what is odd about the files, but no fault.

    Example:
        >>> names = FileNames(("t1", "lge"), "seg", {"lge": ("*_late*",)})
        >>> names.assign(["p1_T1.nii.gz", "p1_late_sa.nii.gz", "p1_gd.nii.gz", "p1_dwi.nii.gz"])
        {'t1': ['p1_T1.nii.gz'], 'lge': ['p1_late_sa.nii.gz'], 'seg': ['p1_gd.nii.gz']}
    """

    modalities: tuple[str, ...]
    label: str | None = "seg"
    patterns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    align: Align = "refuse"
    notes: Notes = field(default_factory=Notes, compare=False)

    @property
    def all(self) -> tuple[str, ...]:
        """The modalities, and the label if there is one."""
        return self.modalities if self.label is None else (*self.modalities, self.label)

    def assign(self, files: Iterable[str], *, nested: bool = False) -> dict[str, list[str]]:
        """The files of each modality and of the label; other files are left out.

        A file belongs to the name that it matches best. Of the files of one name, only those that match
        it best are returned: more than one is a fault of the case.

        Args:
            files: names, or paths within the folder of a case.
            nested: whether files in subfolders belong to the case like all others. Defaults to False:
                they do if a name or pattern with a slash says so.
        """
        found: dict[str, list[tuple[int, str]]] = {name: [] for name in self.all}
        for file in files:
            matches = [
                (*match, name) for name in self.all if (match := self._match(file, name, nested))
            ]
            if matches:
                how, *_, name = max(matches)
                found[name].append((how, file))
        best = {name: max(how for how, _ in owned) for name, owned in found.items() if owned}
        return {
            name: [file for how, file in found[name] if how == most] for name, most in best.items()
        }

    def owner(self, text: str) -> str | None:
        """The modality or label that a channel or a column of this name belongs to."""
        return next(iter(self.assign([text])), None)

    def case_of(self, file: str) -> str:
        """What stands before the ending of a modality or of the label in a file's name; else nothing.

        Example:
            >>> FileNames(("t1_post", "lge"), None, {"lge": ("*_DE*",)}).case_of("sub/p1_T1_post.nii")
            'p1'
        """
        name = file.rpartition("/")[2]
        matches = [match for one in self.all if (match := self._match(name, one, False))]
        return _stem(name)[: max(matches)[2]].rstrip("_-") if matches else ""

    def is_nested(self, path: str) -> bool:
        """Whether a file in a subfolder belongs to the case, because a name with a slash says so."""
        return any(self._match(path, name, False) for name in self.all)

    def expected(self) -> str:
        """The files that a case should have, for messages."""
        shown = [self.patterns.get(name, (f"*{name}.nii.gz",))[0] for name in self.modalities]
        return " or ".join(shown)

    def _match(self, file: str, name: str, nested: bool) -> tuple[int, int, int] | None:
        """How well a file matches a name: the kind of the match, its length, and where it starts."""
        path = _folded(file)
        stem = _stem(path)
        inside = "/" in path and not nested  # in a folder that only a name with a slash reaches
        own = [(_PATTERN, pattern) for pattern in map(_folded, self.patterns.get(name, ()))]
        own += [(_OWN, token) for token in file_tokens(name)]
        own += [(_OTHER, token) for token in other_names(name)]
        return max(
            (
                (kind, len(token), start)
                for kind, token in own
                if ("/" in token or not inside)
                and (start := _start(token, path, stem, whole=kind == _PATTERN)) is not None
            ),
            default=None,
        )


def other_names(name: str) -> tuple[str, ...]:
    """What data sets call a modality or label, without the names that ``file_tokens`` knows.

    Example:
        >>> other_names("LGE")
        ('de',)
    """
    known = file_tokens(name)
    listed = (
        other
        for title, preset in _presets().items()
        if title != _SUGGESTED
        for other in preset.get("names", {}).get(known[0], ())
    )
    return tuple(dict.fromkeys(other for other in listed if other not in known))


def patient_and_site(case: str) -> tuple[str, str | None]:
    """Whose case it is, and from where, if the names of a known data set tell it.

    Example:
        >>> patient_and_site("Brats18_TCIA01_425_1")
        ('Brats18_TCIA01_425', 'TCIA01')
        >>> patient_and_site("p1")
        ('p1', None)
    """
    for preset in _presets().values():
        for pattern in preset.get("cases", {}).values():
            match = re.fullmatch(pattern, case)
            if match is not None:
                return match["patient"], match.groupdict().get("site")
    return case, None


def endings(files: Iterable[str], case: str) -> Counter[str]:
    """How the files of a case end: what follows the name of the case, or the last word.

    Example:
        >>> dict(endings(["p1_LGE_sa.nii.gz", "t1.nii", "scan-2_T2.nii.gz"], "p1"))
        {'_LGE_sa': 1, 't1': 1, '_T2': 1}
    """
    found: Counter[str] = Counter()
    for file in files:
        stem = _stem(composed(file.rpartition("/")[2]))
        rest = stem.removeprefix(case) if stem.startswith(case) else ""
        found[rest or re.sub(r"^.*(?=[_-][^_-]+$)", "", stem)] += 1
    return found


def nearest_ending(name: str, found: Iterable[str]) -> str | None:
    """The ending that most likely means a modality or label, or None.

    Example:
        >>> nearest_ending("DE", ["_bSSFP", "_LGE", "_T2"])
        '_LGE'
        >>> nearest_ending("flair", ["_CT"]) is None
        True
    """
    wanted = _synonyms(name)

    def likeness(ending: str) -> float:
        text = _folded(ending).strip("_-")
        if text in wanted or any(text in _synonyms(other) for other in wanted):
            return 1.0
        if wanted & set(re.split(r"[_-]", text)):
            return 0.9
        return max(difflib.SequenceMatcher(None, text, other).ratio() for other in wanted)

    best = max(found, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


def _synonyms(name: str) -> set[str]:
    """All names that mean the same modality as ``name``, whichever of them it is."""
    own = set(file_tokens(name)) | set(other_names(name))
    own |= set(_presets()[_SUGGESTED]["names"].get(_folded(name), ()))
    for preset in _presets().values():
        for canonical, others in preset.get("names", {}).items():
            if _folded(name) in others:
                own |= {canonical, *others}
    return own


@cache
def _presets() -> Mapping[str, Any]:
    text = package_files("prism_meta.data.layouts").joinpath("names.toml").read_text("utf-8")
    return dict(tomlkit.parse(text).unwrap())


def _folded(text: str) -> str:
    return composed(text).lower()


def _stem(file: str) -> str:
    lower = file.lower()
    return next((file[: -len(suffix)] for suffix in SUFFIXES if lower.endswith(suffix)), file)


def _start(token: str, path: str, stem: str, *, whole: bool) -> int | None:
    """Where in a path the name of a modality begins; None if the path has another name.

    Args:
        token: a pattern, if ``whole`` or if it has a ``*``; otherwise the last word of a file's name.
        path: of the file, with its suffix.
        stem: the same without its suffix.
        whole: whether the token is a pattern.
    """
    if not whole and "*" not in token:
        ends = stem == token or stem.endswith((f"_{token}", f"-{token}", f"/{token}"))
        return len(stem) - len(token) if ends else None
    if "/" not in token:
        path, stem = path.rpartition("/")[2], stem.rpartition("/")[2]
    # With or without the suffix, and wherever the folders of the pattern begin.
    if not any(fnmatchcase(text, form) for text in (path, stem) for form in (token, f"*/{token}")):
        return None
    return max(0, stem.rfind(re.split(r"[*?\[]", token.lstrip("*"))[0]))
