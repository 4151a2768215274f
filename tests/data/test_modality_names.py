"""Names of modalities and labels: which are refused, and which mean the same files."""

from __future__ import annotations

import pytest

from prism_meta.modalities import BRATS, file_tokens, modality_faults


def test_usual_names_have_no_faults() -> None:
    assert modality_faults(BRATS, "seg") == []
    assert modality_faults(("T1_post", "t1-pre", "ADC", "b1000", "Übersicht")) == []
    assert modality_faults(("t1",), label=None) == []


@pytest.mark.parametrize("name", ["", " ", "\t", "\n"])
def test_empty_names(name: str) -> None:
    (fault,) = modality_faults(("t1", name), "seg")
    assert fault == (
        f"modalities: got the empty name {name!r}; give the word that your file names end in"
    )


@pytest.mark.parametrize(
    "name",
    ["a/b", "../x", "a\\b", "t1+t2", "a b", "a\tb", "a\0b", "a\nb", "a,b", "a\x1b", "\udcff"],
)
def test_characters_that_no_file_or_table_or_subset_can_hold(name: str) -> None:
    for faults, what in (
        (modality_faults((name,), "seg"), "modalities"),
        (modality_faults(("t1",), name), "label"),
    ):
        (fault,) = faults
        assert fault.startswith(f"{what}: {name!r} has the characters ")
        assert fault.endswith("; leave them out")
        fault.encode()  # it can be printed


def test_a_suffix_is_no_part_of_a_name() -> None:
    assert modality_faults(("t1.nii.gz",)) == [
        "modalities: 't1.nii.gz' ends in a suffix of files; leave the suffix out"
    ]


@pytest.mark.parametrize(
    ("first", "second"), [("t1", "T1"), ("t1", "t1n"), ("T1CE", "t1gd"), ("é", "e\u0301")]
)
def test_names_of_the_same_files(first: str, second: str) -> None:
    assert modality_faults((first, "x", second), "seg") == [
        f"modalities: {first!r} and {second!r} mean the same files; keep one of them"
    ]
    assert modality_faults((first,), second) == [
        f"label: {second!r} means the same files as modality {first!r}, so the model would be shown "
        "the labels; give the label files another name"
    ]


def test_a_label_that_ends_like_a_modality() -> None:
    assert modality_faults(("t1", "t2"), "lesion_t2w") == [
        "label: 'lesion_t2w' ends like modality 't2', so that label files could be taken for it; "
        "give the label files another name"
    ]
    assert modality_faults(("t1_seg",), "seg") == []


def test_all_faults_of_the_names_come_together() -> None:
    assert modality_faults((), "seg") == [
        "modalities: got none, expected at least one name; name the modalities of your files"
    ]
    faults = modality_faults(("t1", "t1", "a b"), "t1")
    assert [fault.split(";")[0].split(",")[0] for fault in faults] == [
        "modalities: 'a b' has the characters ' '",
        "modalities: 't1' occurs twice",
        "label: 't1' means the same files as modality 't1'",
    ]


def test_tokens() -> None:
    assert file_tokens("Flair") == ("flair", "t2f")
    assert file_tokens("e\u0301") == file_tokens("É") == ("é",)
