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


def test_values_that_need_32_bits() -> None:
    values = {"a": 1, "b": 32768, "c": 2**31 - 1}
    labels = LabelSet(values)
    decoded = labels.decode(torch.tensor([0, 1, 2, 3]))
    assert decoded.dtype == np.int32
    assert decoded.tolist() == [0, *values.values()]
    assert labels.encode(decoded).tolist() == [0, 1, 2, 3]
    assert labels.encode(decoded.astype(np.int64)).tolist() == [0, 1, 2, 3]


def test_255_classes_keep_their_values() -> None:
    labels = LabelSet({f"c{k}": 1000 + k for k in range(255)})
    label = np.arange(1000, 1255)
    classes = labels.encode(label)
    assert classes.tolist() == list(range(1, 256))
    np.testing.assert_array_equal(labels.decode(classes), label)
    assert faults_of(lambda: LabelSet({f"c{k}": 1000 + k for k in range(256)})) == (
        "labels: got 256 classes, expected at most 255; merge some of them",
    )


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
        ([1234567, 2**40, -32768], "-32768, 1234567, 1099511627776"),
        ([1e30, np.inf], "1000000000000000019884624838656, inf"),
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
    for values in ({"a": 0}, {"a": -1}, {"a": 1, "b": 1}, {"a": 1.5}, {"a": True}, {"a": "1"}):
        assert faults_of(lambda values=values: LabelSet(values)) == (
            f"labels: got {values}; give each class its own value >= 1 (0 is background)",
        )
    assert faults_of(lambda: LabelSet({"a": 1, "b": 1}, {"all": ("a", "c"), "x": ("d",)})) == (
        "labels: got {'a': 1, 'b': 1}; give each class its own value >= 1 (0 is background)",
        "region 'all': unknown class 'c'; use some of a, b",
        "region 'x': unknown class 'd'; use some of a, b",
    )
    assert faults_of(lambda: LabelSet({"a": 2**31})) == (
        "labels: got the value 2147483648, expected at most 2147483647, the largest that label files "
        "hold; use smaller values",
    )
    assert faults_of(lambda: LabelSet({"background": 1, "a": 2}, {"all": ()})) == (
        "class 'background': is value 0 in every label set; leave it out or give it another name",
        "region 'all': has no classes; name at least one of background, a",
    )
    for name in ("", " ", "a\nb"):
        assert faults_of(lambda name=name: LabelSet({"a": 1}, {name: ("a",)})) == (
            f"region {name!r}: is empty or has control characters; give it a name that tables can hold",
        )
