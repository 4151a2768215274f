"""The Medical Segmentation Decathlon: images whose fourth axis are the modalities."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from prism_meta.data.layouts.base import Found, Layout, build_case, is_folder, only_once
from prism_meta.data.layouts.dataset_json import CONTENTS, DatasetJson, read_contents
from prism_meta.data.layouts.names import FileNames
from prism_meta.errors import CaseError

#: Folders of training and of test images.
_IMAGES = ("imagesTr", "imagesTs")


class Decathlon(Layout):
    """``imagesTr/BRATS_001.nii.gz`` with all modalities, ``labelsTr`` and ``dataset.json``.

    The table ``modality`` of ``dataset.json`` names the channels. Test images have no labels, so they
    are cases only if none are asked for, as for predictions. A folder of images (``imagesTs``) may be
    given instead of the whole data set.

    Source: Antonelli et al., Nature Communications 13:4128 (2022).
    """

    name = "decathlon"
    title = "Medical Segmentation Decathlon"

    def matches(self, root: Path, names: FileNames) -> bool:
        base = root.parent if root.name in _IMAGES else root
        return any(is_folder(base / name) for name in _IMAGES) and (base / CONTENTS).exists()

    def find(self, root: Path, names: FileNames) -> Found:
        found = Found(self.title)
        images = root.name if root.name in _IMAGES else None
        base = root.parent if images else root
        try:
            contents = read_contents(base / CONTENTS, lists_training=True)
        except CaseError as error:
            found.faults.extend(error.faults)
            return found
        found.only_predicted = names.label is not None and bool(contents.test)
        channels = contents.assign(names, found)
        counts: Counter[str] = Counter()
        for image, label in sorted(_listed(contents, names, images)):
            name = _name_of(image)
            counts[name] += 1
            lost = [f for f in (image, label) if f is not None and not (base / f).exists()]
            found.faults.extend(
                f"case {name}: {contents.path} lists {file}, but there is no such file; restore it, or "
                "remove the entry"
                for file in lost
            )
            if lost or not channels:
                continue
            owned = {modality: [base / image] for modality in channels}
            if label is not None and names.label is not None:
                owned[names.label] = [base / label]
            case, faults = build_case(
                name, names, owned, channels=channels if len(contents.channels) > 1 else None
            )
            found.add(case, faults)
        only_once(found, counts, "entries of this name; rename all but one")
        return found


def _listed(
    contents: DatasetJson, names: FileNames, images: str | None
) -> list[tuple[str, str | None]]:
    """The images with their labels, in one folder or in both."""
    listed: list[tuple[str, str | None]] = list(contents.training or ())
    if names.label is None:
        images_only = [image for image, _ in listed] + list(contents.test)
        listed = [(image, None) for image in images_only]
    return [(i, label) for i, label in listed if images is None or images in Path(i).parts]


def _name_of(image: str) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", Path(image).name, flags=re.IGNORECASE)
