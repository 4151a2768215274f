"""TOML files and overrides: what wins, and what is said of each fault."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import faults_of
from pydantic import BaseModel

from prism_meta.errors import ConfigError
from prism_meta.training.config import Config, load_config
from prism_meta.training.config.file import read_config


class Section(BaseModel, extra="forbid"):
    sizes: tuple[int, ...] = (1, 2)
    name: str = "a"
    rate: float = 0.5


class Schema(BaseModel, extra="forbid"):
    seed: int = 0
    first: Section = Section()
    second: Section = Section()


def test_the_file_comes_after_the_start_and_overrides_after_both(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('seed = 3\n[first]\nname = "file"\nrate = 0.25\n')
    start = {"seed": 1, "first": {"name": "start", "sizes": [7]}, "second": {"name": "start"}}
    before = copy.deepcopy(start)
    read = read_config(Schema, path, ["first.name=override"], start=start)
    first = Section(sizes=(7,), name="override", rate=0.25)
    assert read == Schema(seed=3, first=first, second=Section(name="start"))
    read_config(Schema, overrides=["first.name=x", "second.rate=1"], start=start)
    assert start == before, "it is the caller's"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("first.sizes=[64, 64]", (64, 64)),
        ("first.sizes = [ 3 ]", (3,)),
        ("first.name=balanced", "balanced"),
        ("first.name='a=b'", "a=b"),
        ("first.name=a=b", "a=b"),
        ("first.rate=1e-3", 0.001),
    ],
)
def test_an_overrides_value_is_toml_or_a_bare_word(override: str, value: Any) -> None:
    read = read_config(Schema, overrides=[override], start={})
    assert getattr(read.first, override[len("first.") :].partition("=")[0].strip()) == value


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("seed", "'seed': expected section.key=value; write e.g. training.steps=500"),
        (" =3", "' =3': expected section.key=value; write e.g. training.steps=500"),
        ("seed.a=3", "seed.a: seed is a value, not a section; leave out what follows seed"),
        (
            "first.name=b\nseed=3",
            "'first.name=b\\nseed=3': has a line break or another character that is not printed; give "
            "one --set per key",
        ),
        ("first.nme=b", "first.nme: unknown key; did you mean first.name?"),
    ],
)
def test_an_override_that_cannot_be_is_refused(override: str, fault: str) -> None:
    action = partial(read_config, Schema, overrides=[override], start={"seed": 1})
    assert faults_of(action, ConfigError) == (fault,)


def test_all_faults_are_reported_together() -> None:
    overrides = ["seed=x", "first.rate=[]", "second.nam=b"]
    action = partial(read_config, Schema, overrides=overrides, start={})
    assert faults_of(action, ConfigError) == (
        "seed: got 'x', expected a whole number; e.g. seed = 0",
        "first.rate: got [], expected a number; e.g. first.rate = 0.5",
        "second.nam: unknown key; did you mean second.name?",
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"[first\n", "at line"),
        (b"a = \xc3(\n", "'utf-8' codec"),
        ("seed = 1\n".encode("utf-16"), "UTF-16, expected UTF-8"),
        (b"seed = 1\nseed = 2\n", "already exists"),
        (b"seed = " + b"1" * 5000, "cannot be read"),
        (b"seed = " + b"[" * 5000, "cannot be read"),
        (b"#" * 10**6 + b"#", "more than 1000000 bytes"),
    ],
    ids=["absent", "no TOML", "no text", "UTF-16", "twice", "digits", "nested", "long"],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_bytes(content)
    (fault,) = faults_of(partial(read_config, Schema, path, start={}), ConfigError)
    assert fault.startswith(f"{path}: cannot be read as TOML (") and reason in fault


def test_a_written_config_is_read_back(tmp_path: Path) -> None:
    config = load_config(overrides=["data.patch=[8, 8, 8]", "objective.beta=[1, 2, 3, 4]"])
    assert config != Config()
    (tmp_path / "c.toml").write_text(config.to_toml())
    assert load_config(tmp_path / "c.toml") == config


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbfseed = 4\n")
    assert read_config(Schema, tmp_path / "c.toml", start={}).seed == 4


def test_the_last_override_of_a_key_counts() -> None:
    overrides = ["seed=1", "first={rate=1}", "seed=2", "first={name='x'}"]
    read = read_config(Schema, overrides=overrides, start={"first": {"sizes": [3]}})
    assert read == Schema(seed=2, first=Section(sizes=(3,), name="x", rate=1))


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    data = load_config(overrides=["data.availability=a/b.csv", "data.cache=~/cache"]).data
    assert (data.availability, data.cache) == (tmp_path / "a" / "b.csv", Path("/home/me/cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.toml").write_text("seed = 7\n")
    assert load_config("~/c.toml").seed == 7


@pytest.mark.parametrize("value", ["5.0", '"5"', "true", "inf", "nan", "1e3", "[5]"])
def test_a_number_of_another_type_is_refused(value: str) -> None:
    (fault,) = faults_of(partial(load_config, overrides=[f"training.steps={value}"]), ConfigError)
    assert fault.endswith(", expected a whole number; e.g. training.steps = 1000")


def test_a_whole_number_can_be_a_rate() -> None:
    assert load_config(overrides=["training.lr=1"]).training.lr == 1.0
