"""Phantoms of several sites, whose scanners have different contrasts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
import torch

from prism_meta.data.phantom import write_phantoms
from prism_meta.modalities import BRATS

#: Voxels of a phantom, and their size in mm.
SHAPE, SPACING = (54, 64, 48), 3.0


def write_sites(
    folder: Path, sites: Sequence[str], count: int, *, seed: int = 0, strength: float = 0.6
) -> Path:
    """Write ``count`` complete phantoms of each site, with names like those of BraTS 2018.

    Each modality of a site has a contrast of its own: intensities x in [0, 1] become x^g, with log g normal,
    and an offset that grows along one axis by up to a third.

    Args:
        folder: output folder.
        sites: names such as ``TCIA10``.
        count: number of phantoms per site.
        seed: random seed.
        strength: standard deviation of log g.
    """
    for number, site in enumerate(sites):
        contrast = np.random.default_rng((seed, number))
        gammas = {name: float(np.exp(contrast.normal(0, strength))) for name in BRATS}
        slopes = {name: float(contrast.uniform(-0.3, 0.3)) for name in BRATS}
        with TemporaryDirectory() as plain:
            complete = torch.ones(count, len(BRATS), dtype=torch.bool)
            cases = write_phantoms(
                plain, complete, seed=seed * 1000 + number, shape=SHAPE, spacing=SPACING
            )
            for k, case in enumerate(cases):
                target = folder / f"Brats18_{site}_{k + 1:03d}_1"
                target.mkdir(parents=True)
                for file in case.iterdir():
                    image = nib.load(file)  # type: ignore[attr-defined]
                    name, values = file.name.split(".")[0], np.asarray(image.dataobj)
                    if name in gammas:
                        values = _changed(values.astype(np.float32), gammas[name], slopes[name])
                    saved = nib.Nifti1Image(values, image.affine)
                    nib.save(saved, target / f"{target.name}_{file.name}")
    return folder


def _changed(image: np.ndarray, gamma: float, slope: float) -> np.ndarray:
    inside, top = image > 0, float(np.percentile(image, 99.9))
    along = np.linspace(-1, 1, image.shape[0], dtype=np.float32)[:, None, None]
    changed = np.clip(image / top, 0, 1) ** gamma * np.exp(slope * along)
    return np.where(inside, 1 + 1000 * changed, 0).astype(np.float32)
