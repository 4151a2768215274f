"""The labelled cases that a run is adapted to, and the subset of modalities that all of them have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from prism_meta.data.cases import Case
from prism_meta.data.checks import no_label
from prism_meta.errors import CaseError, ConfigError, PrismError, raise_faults
from prism_meta.modalities import composed, subset_name
from prism_meta.training.config import Config
from prism_meta.training.setup.cases import find_configured


class Support(NamedTuple):
    """Labelled cases, which have exactly the modalities of one subset.

    Args:
        cases: with the files of the subset; others are left out, so that nothing is read from them.
        subset: bool (M,).
        name: of the subset, e.g. ``flair+t1``.
    """

    cases: list[Case]
    subset: Tensor
    name: str


def find_support(
    config: Config, cases: Path | str | Sequence[Case], subset: str | Sequence[str] | None
) -> Support:
    """Find labelled cases, and choose the subset to adapt to.

    Args:
        config: of the run: modalities, names of files, layout.
        cases: a folder, a manifest, or cases.
        subset: names, or one text with + or commas between them. Defaults to all modalities that every
            case has.

    Raises:
        ConfigError: names of the subset are unknown or occur twice, or cases have other modalities.
        CaseError: there is no case, or cases have faults, no label, or not the whole subset.
    """
    modalities = config.data.modalities
    names = None if subset is None else _names(subset, modalities)
    faults: list[str] = []
    if isinstance(cases, (Path, str)):
        found, faults = find_configured(config, cases, label=True)
    else:
        found = list(cases)
        _check_modalities(found, modalities)
    if not found and not faults:
        faults = ["cases: got none, expected at least one labelled case; give a folder of cases"]
    faults += [no_label(case) for case in found if not case.label]
    if names is not None:
        for case in found:
            lacks = [name for name in names if name not in case.files]
            if lacks:
                faults.append(
                    f"case {case.id}: has no {', '.join(lacks)}; leave it out of the subset, or leave the "
                    "case out"
                )
        shown = torch.tensor([name in names for name in modalities])
    else:
        shown = torch.tensor([all(name in case.files for case in found) for name in modalities])
        if found and not shown.any():
            faults.append(
                "cases: have no modality in common; leave cases out, or give a subset that they have"
            )
    raise_faults(CaseError, faults)
    return Support([case.restrict(shown) for case in found], shown, subset_name(shown, modalities))


def _names(subset: str | Sequence[str], modalities: Sequence[str]) -> list[str]:
    given = subset.replace("+", ",").split(",") if isinstance(subset, str) else list(subset)
    known = {composed(name): name for name in modalities}
    names = [known.get(composed(name.strip()), name.strip()) for name in given if name.strip()]
    faults = [
        f"subset: unknown modality {name}; use some of {', '.join(modalities)}"
        for name in dict.fromkeys(names)
        if name not in modalities
    ]
    twice = sorted({name for name in names if names.count(name) > 1 and name in modalities})
    faults += [f"subset: {name} occurs twice; give each name once" for name in twice]
    if not names:
        faults.append(
            f"subset: got no modality, expected at least one; use some of {', '.join(modalities)}"
        )
    raise_faults(ConfigError, faults)
    return names


def _check_modalities(cases: Sequence[Case], modalities: Sequence[str]) -> None:
    raise_faults(
        PrismError,
        [
            f"case {case.id}: has the modalities {', '.join(case.modalities)}, but the run was trained on "
            f"{', '.join(modalities)}; load it with these names in this order"
            for case in cases
            if case.modalities != tuple(modalities)
        ],
    )
