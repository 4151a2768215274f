"""Which cases are held out."""

from __future__ import annotations

import unicodedata

import pytest
from helpers import faults_of

from prism_meta.data.cases import Case
from prism_meta.errors import ConfigError
from prism_meta.training.config import load_config
from prism_meta.training.setup.splitting import split

NAME = "Jos\u00e9"
FORMS = ("NFC", "NFD")


@pytest.mark.parametrize("of_case", FORMS)
@pytest.mark.parametrize("of_config", FORMS)
def test_cases_are_named_in_any_unicode_form(of_case: str, of_config: str) -> None:
    names = [unicodedata.normalize(of_case, NAME), "p1", "p2"]
    cases = [Case(name, ("t1",), files={}) for name in names]
    config = load_config(
        overrides=[f"data.test_cases=['{unicodedata.normalize(of_config, NAME)}']"]
    )
    made = split(config, cases)
    assert made.test == cases[:1] and made.training == cases[1:]


def test_a_case_twice_in_two_unicode_forms() -> None:
    names = [unicodedata.normalize(form, NAME) for form in FORMS]
    (fault,) = faults_of(lambda: load_config(overrides=[f"data.test_cases={names}"]), ConfigError)
    assert "test_cases: a case occurs twice" in fault
