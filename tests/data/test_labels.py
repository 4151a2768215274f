"""Label sets: values of files to classes and back, and regions."""

from __future__ import annotations

import niftis
import numpy as np
import pytest
import torch
from helpers import faults_of

from prism_meta.data.labels import BRATS_LABELS, LabelSet


def test_encode_and_decode() -> None:
    label = niftis.draw_label(values=(2, 1, 4))
    classes = BRATS_LABELS.encode(label)
    assert classes.dtype == torch.uint8
    assert BRATS_LABELS.names == ("background", "necrotic", "oedema", "enhancing")
    for value, index in ((0, 0), (1, 1), (2, 2), (4, 3)):
        assert torch.equal(classes == index, torch.from_numpy(label == value)), value
    decoded = BRATS_LABELS.decode(classes)
    assert decoded.dtype == np.int16
    np.testing.assert_array_equal(decoded, label)
    np.testing.assert_array_equal(BRATS_LABELS.encode(label.astype(np.float64)), classes)


def test_values_above_255_are_labels_too() -> None:
    labels = LabelSet({"cortex": 1035, "lesion": 77})
    assert labels.encode(np.array([0, 77, 1035])).tolist() == [0, 2, 1]
    assert labels.decode(torch.tensor([0, 2, 1])).tolist() == [0, 77, 1035]


def test_regions() -> None:
    classes = torch.tensor([0, 1, 2, 3])
    expected = {
        "WT": [False, True, True, True],
        "TC": [False, True, False, True],
        "ET": [False, False, False, True],
    }
    assert set(BRATS_LABELS.regions) == set(expected)
    for name, where in expected.items():
        assert BRATS_LABELS.region(classes, name).tolist() == where, name
        assert BRATS_LABELS.region(classes.to(torch.uint8), name).tolist() == where, name


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([0, 3], "3"),
        ([0, 1, -1], "-1"),
        ([0, 2.5], "2.5"),
        ([0, np.nan], "nan"),
        ([9, 8, 7, 6, 5, 3], "3, 5, 6, 7, 8"),
    ],
)
def test_values_outside_the_label_set(values: list[float], named: str) -> None:
    assert faults_of(lambda: BRATS_LABELS.encode(np.array(values))) == (
        f"label values {named} are not in the label set "
        "{0: background, 1: necrotic, 2: oedema, 4: enhancing}; "
        "correct the file or the label set",
    )


def test_label_set_faults() -> None:
    assert faults_of(lambda: LabelSet({})) == (
        "labels: none given; name at least one class, e.g. {'lesion': 1}",
    )
    for values in ({"a": 0}, {"a": -1}, {"a": 1, "b": 1}):
        assert faults_of(lambda values=values: LabelSet(values)) == (
            f"labels: got {values}; give each class its own value >= 1 (0 is background)",
        )
    assert faults_of(lambda: LabelSet({"a": 1, "b": 1}, {"all": ("a", "c"), "x": ("d",)})) == (
        "labels: got {'a': 1, 'b': 1}; give each class its own value >= 1 (0 is background)",
        "region 'all': unknown class 'c'; use some of a, b",
        "region 'x': unknown class 'd'; use some of a, b",
    )
