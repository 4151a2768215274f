"""What the configuration of a MONAI Bundle calls; ``prism_meta.export.bundle`` writes it.

Bundles outlive versions of this package, so the names here and their arguments stay as they are.
"""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor, nn

from prism_meta.errors import CaseError, OutputError, raise_faults
from prism_meta.evaluation.predictions import PredictionTable
from prism_meta.evaluation.predictor import Predictor
from prism_meta.evaluation.saving import region_volumes, save_labels
from prism_meta.files import writable_folder
from prism_meta.modalities import subset_name
from prism_meta.training.build import build_model as build_model
from prism_meta.training.build import build_predictor as build_predictor
from prism_meta.training.config import Config
from prism_meta.training.setup.cases import find_configured

_log = logging.getLogger(__name__)


class BundleNet(nn.Module):
    """The fused logits of a ``SegmentationModel`` as one tensor, which is what MONAI expects of a network.

    Args:
        model: e.g. a ``PrismNet``.

    Example:
        >>> import torch
        >>> from prism_meta.networks.prism import PrismNet
        >>> net = BundleNet(PrismNet(num_modalities=2, num_classes=3, spatial_dims=2, width=2))
        >>> image = torch.randn(1, 2, 16, 16)
        >>> net(image).shape
        torch.Size([1, 3, 16, 16])
        >>> image[:, 1] = 0
        >>> torch.equal(net(image), net(image, torch.tensor([[True, False]])))
        True
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """The fused logits (B, K, *S).

        Args:
            image: (B, M, *S) float.
            mask: bool (B, M), the modalities to show; each row has at least one. Defaults to those that are
                not 0 everywhere, and to all of a sample that is 0 everywhere.
        """
        if mask is None:
            mask = (image != 0).flatten(2).any(2)
            mask = mask | ~mask.any(1, keepdim=True)
        logits: Tensor = self.model.segment(image, mask)  # type: ignore[operator]
        return logits


class LabelVolumes:
    """The label volumes of a folder of cases, as ``prism-meta predict`` writes them.

    Args:
        predictor: the model with its preprocessing, labels and clean-up.
        config: how the files of the cases are named.
        dataset_dir: folder of cases; any modality may be missing.
        output_dir: folder of the label volumes and of ``predictions.csv``, which has their volumes in ml.
    """

    def __init__(
        self, predictor: Predictor, config: Config, dataset_dir: Path | str, output_dir: Path | str
    ) -> None:
        self.predictor, self.config = predictor, config
        self.dataset_dir, self.output_dir = Path(dataset_dir), Path(output_dir)

    def run(self) -> list[Path]:
        """Predict and write all cases. A faulty one does not stop the others.

        Returns:
            The label volumes.

        Raises:
            CaseError: cases have faults; the other cases are written.
            OutputError: the label volumes cannot be written, or would lie among the cases.
        """
        if self.output_dir.resolve() == self.dataset_dir.resolve():
            raise OutputError(f"output_dir: {self.output_dir} holds the cases; give another folder")
        cases, faults = find_configured(self.config, self.dataset_dir, label=False)
        labels = self.predictor.labels
        table = PredictionTable(self.output_dir, list(labels.regions))
        writable_folder(self.output_dir)
        refused = {case.id: table.faults(case) for case in cases}
        written = []
        for number, case in enumerate(cases, start=1):
            if refused[case.id]:
                faults += refused[case.id]
                continue
            try:
                values = self.predictor.predict(case)
            except CaseError as error:
                faults += error.faults
                continue
            volumes = region_volumes(values, case, labels)
            shown = subset_name(case.availability.tolist(), case.modalities)
            # The table first: it marks the folder as an output before that holds a label volume.
            table.add(case.id, subset=shown, volumes=volumes)
            save_labels(table.label_file(case.id), values, case)
            written.append(table.label_file(case.id))
            _log.info("%d of %d: %s from %s", number, len(cases), case.id, shown)
        raise_faults(CaseError, faults)
        return written
