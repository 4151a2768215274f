"""Faults keep their arguments, and a command can name the configuration keys of them."""

from __future__ import annotations

import pickle

from prism_meta.errors import CaseError, ConfigError, Fault, PrismError


def test_faults_are_text_with_arguments() -> None:
    error = ConfigError(["no case", Fault("the patch is too large", "patch", "spacing")])
    assert str(error) == "no case\nthe patch is too large"
    assert [fault.arguments for fault in error.faults] == [(), ("patch", "spacing")]
    assert error.faults[1].prefixed("case p0") == "case p0: the patch is too large"
    assert error.faults[1].prefixed("case p0").arguments == ("patch", "spacing")


def test_keys_are_named_after_the_faults_that_they_fix() -> None:
    error = CaseError([Fault("too large", "patch", "spacing", "other"), "no case"])
    keys = error.with_keys({"patch": "data.patch", "spacing": "data.spacing"})
    assert type(keys) is CaseError
    assert keys.faults == ("too large (set data.patch or data.spacing)", "no case")
    assert PrismError("alone").with_keys({"patch": "data.patch"}).faults == ("alone",)


def test_errors_survive_pickling() -> None:
    """Worker processes send their errors as pickles."""
    error = pickle.loads(pickle.dumps(ConfigError([Fault("too large", "patch")])))
    assert type(error) is ConfigError
    assert error.faults == ("too large",)
    assert error.faults[0].arguments == ("patch",)
