"""One folder with the files of all cases, as in MyoPS."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from prism_meta.data.layouts.base import Found, Layout, build_case, is_folder, only_once
from prism_meta.data.layouts.names import FileNames, endings, patient_and_site
from prism_meta.data.layouts.search import SUFFIXES


class Flat(Layout):
    """Files of all cases in one folder: ``case_101_C0.nii.gz``, ``case_101_T2.nii.gz``.

    The name of a case is what stands before the ending of a modality or of the label. If
    ``data.layout`` names this layout, files may also lie in subfolders, such as one for the labels.
    """

    name = "flat"
    title = "one folder for all cases"

    def matches(self, root: Path, names: FileNames) -> bool:
        owned = names.assign(_files(root, names, subfolders=False))
        return any(len({names.case_of(file) for file in files}) > 1 for files in owned.values())

    def find(self, root: Path, names: FileNames) -> Found:
        found = Found(self.title)
        if not is_folder(root):
            found.faults.append(f"{root}: no such folder; give the folder of the files")
            return found
        files = _files(root, names, subfolders=not self.matches(root, names))
        by_case: dict[str, list[str]] = {}
        others: list[str] = []
        for file in files:
            name = names.case_of(file)
            if name:
                by_case.setdefault(name, []).append(file)
            else:
                others.append(file)
        found.others = endings(others, "")
        for name, own in sorted(by_case.items()):
            owned = names.assign(own, nested=True)
            patient, site = patient_and_site(name)
            case, faults = build_case(
                name,
                names,
                {key: [root / file for file in listed] for key, listed in owned.items()},
                site=site,
                patient=patient,
            )
            if not case.files:
                faults.append(
                    f"case {name}: no modality; expected a file like {names.expected()}, found "
                    f"{', '.join(own)}; add a file or remove these"
                )
            found.add(case, faults)
        only_once(found, Counter(case.id for case in found.cases), "cases of this name; rename one")
        if not found.cases and not found.faults:
            found.faults.append(f"{root}: no case found; expected files like {names.expected()}")
        return found


def _files(root: Path, names: FileNames, *, subfolders: bool) -> list[str]:
    """NIfTI files in a folder, as paths below it."""
    if not is_folder(root):
        return []
    try:
        listed = sorted(root.rglob("*") if subfolders else root.iterdir())
    except OSError:
        return []
    paths = [path.relative_to(root) for path in listed]
    return [
        path.as_posix()
        for path in paths
        if path.name.lower().endswith(SUFFIXES) and not any(p.startswith(".") for p in path.parts)
    ]
