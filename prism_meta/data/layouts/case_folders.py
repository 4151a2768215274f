"""A folder per case, with files named after their modality, as in BraTS."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from prism_meta.data.layouts.base import Found, Layout, build_case, is_folder, only_once, remaining
from prism_meta.data.layouts.names import FileNames, patient_and_site
from prism_meta.data.layouts.search import FoundFolder, output_mark, search_folders
from prism_meta.modalities import composed


class CaseFolders(Layout):
    """A folder per case, at any depth.

    A file belongs to modality ``flair`` if it is named ``flair.nii.gz`` or ends in ``_flair.nii.gz`` or
    ``-flair.nii.gz`` (BraTS 2018-2021), or in another name of it (BraTS 2023: ``-t2f.nii.gz``). Folders
    within the folder of a case are no cases.
    """

    name = "folders"
    title = "a folder per case"

    def matches(self, root: Path, names: FileNames) -> bool:
        return is_folder(root)

    def find(self, root: Path, names: FileNames) -> Found:
        found = Found(self.title)
        if not is_folder(root):
            found.faults.append(f"{root}: no such folder; give a folder with one folder per case")
            return found
        mark = output_mark(root)
        if mark is not None:
            found.faults.append(
                f"{root}: has {mark}, so it is an output of prism-meta, expected a folder of cases; "
                f"give the folder of the cases, or rename {mark} if it is yours"
            )
            return found
        counts: Counter[str] = Counter()
        for folder in sorted(self._folders(root, names, found.faults), key=_name_of):
            name = _name_of(folder)
            counts[name] += 1
            owned = names.assign(folder.files)
            found.others += remaining(folder.files, owned, name)
            patient, site = patient_and_site(name)
            case, faults = build_case(
                name,
                names,
                {key: [folder.path / file for file in files] for key, files in owned.items()},
                site=site,
                patient=patient,
            )
            if not case.files:
                faults.append(
                    f"case {name}: no modality; expected a file like {names.expected()}, found "
                    f"{', '.join(folder.files) or 'nothing'}; add a file or remove the folder"
                )
            found.add(case, faults)
        only_once(found, counts, "folders of this name; rename all but one")
        if not found.cases and not found.faults:
            found.faults.append(
                f"{root}: no case found; expected folders with files like {names.expected()}"
            )
        return found

    def _folders(self, root: Path, names: FileNames, faults: list[str]) -> list[FoundFolder]:
        """The folders that should be cases."""
        folders = list(
            search_folders(
                root,
                faults,
                is_case=lambda files: bool(names.assign(files)),
                nested=names.is_nested,
            )
        )
        if any(folder.path == root and names.assign(folder.files) for folder in folders):
            # The root is a case, so that its subfolders may be other things.
            return [folder for folder in folders if names.assign(folder.files)]
        return [folder for folder in folders if folder.path != root]


def _name_of(folder: FoundFolder) -> str:
    path = folder.path
    name = path.resolve().name if path.name in ("", "..") else path.name
    return composed(name)
