"""Configurations that cannot be used: bad values of every key, contradictions, and damaged files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from broken import Broken, whole
from broken.together import TOGETHER

#: Values that are neither a number nor anything else that a key takes.
_NO_NUMBERS = ("nan", "inf", "-inf", '""', '"5"', "[]", "true", "{a = 1}", "1979-05-27")
#: Smallest and largest value of each whole number.
INTEGERS = {
    "seed": (0, 2**32 - 1),
    "data.batch_size": (1, 10**6),
    "data.holdout": (0, 10**6),
    "data.workers": (0, 256),
    "model.width": (1, 4096),
    "model.depth": (2, 12),
    "episodes.support": (1, 10_000),
    "meta.inner_steps": (1, 10_000),
    "meta.episodes": (1, 10_000),
    "meta.cg_steps": (1, 10_000),
    "training.steps": (1, 10**8),
    "training.warmup": (0, 10**8),
    "training.checkpoint_every": (1, 10**8),
    "training.cosine_every": (0, 10**8),
    "validation.every": (1, 10**8),
    "validation.patience": (1, 10_000),
    "fabric.nodes": (1, 10_000),
}
#: Values out of the range of each number.
FLOATS = {
    "data.foreground": ("-0.1", "1.1"),
    "masks.power": ("-1", "101"),
    "masks.step": ("-1", "101"),
    "objective.beta": ("-1", "1e9"),
    "objective.delta": ("-1", "1e9"),
    "objective.preference_rate": ("-1", "1e9"),
    "objective.weights_lr": ("0", "1e9"),
    "objective.temperature": ("0", "1e9"),
    "objective.meta_temperature": ("0", "1e9"),
    "objective.ranking_weight": ("0", "1e9"),
    "meta.inner_lr": ("-1e-9", "1e9"),
    "meta.inner_momentum": ("-1", "2"),
    "meta.alpha": ("-1", "1.5"),
    "meta.epsilon": ("0", "1.1", "[0.1]", "[0, 1]", "[0.1, 0.5, 1]"),
    "meta.proximal": ("0", "1e9"),
    "training.lr": ("0", "1e9"),
    "training.weight_decay": ("-1", "1e9"),
    "training.clip_norm": ("0", "1e9"),
    "training.ema": ("-0.1", "1"),
    "evaluation.overlap": ("-0.5", "1"),
}
CHOICES = (
    "masks.train", "masks.meta", "episodes.kind", "model.fusion", "objective.weighting",
    "objective.direction", "objective.prototype", "meta.strategy", "meta.inner", "meta.inner_state",
    "meta.step_weights", "objective.subset_weights", "objective.meta_loss",
    "fabric.accelerator", "fabric.precision", "evaluation.empty", "data.layout", "data.split", "data.align",
    "training.schedule", "validation.select",
)  # fmt: skip
SWITCHES = (
    "objective.scale_decay", "objective.weighted", "objective.unimodal", "meta.inner_decay",
    "training.augment",
)  # fmt: skip
PATHS = ("data.availability", "data.cache", "training.init")
#: Other keys with values that they do not take.
OTHERS = {
    "data.modalities": ("3", "flair", "[1, 2]", "[[]]", "{a = 1}"),
    "data.label": ("3", "[]", "true", "{a = 1}"),
    "data.labels": ("3", "[]", "{a = 0}", "{a = -1}", "{a = 1.5}", "{a = true}", "{a = 1e9}", "{a = []}"),
    "data.regions": ("3", "[]", "{WT = 3}", "{WT = 'necrotic'}", "{WT = [1]}"),
    "data.spacing": ("1", "[1, 1]", "[1, 1, 0]", "[1, 1, -1]", "[1, nan, 1]", "[1, inf, 1]", "[1e-9, 1, 1]",
                     "[1, 1, 1, 1]", "['a', 1, 1]"),
    "data.patch": ("16", "[16]", "[0, 16]", "[-1, 16]", "[16, 16, 16, 16]", "[16.5, 16]", "[true, 16]",
                   "[1e9, 16]", "[100000, 16]", "[]"),
    "data.missing_rates": ("0.5", "[1, 0, 0, 0]", "[-1, 0, 0, 0]", "[nan, 0, 0, 0]", "['a', 0, 0, 0]"),
    "data.meta_missing_rates": ("0.5", "[1, 0, 0, 0]", "[-1, 0, 0, 0]", "[nan, 0, 0, 0]", "['a', 0, 0, 0]",
                                "[0, 0, 0]"),
    "data.test_cases": ("p0", "[1]", "3", "true"),
    "model.network": ('""', "unett", "3", "true", "[]", "a b:c", "a:", ":b", "a:b:c", "../a:b", "a.b"),
    "model.arguments": ("3", "a", "[]", "true", "{a = 1}"),
    "meta.outer_parameters": ("3", "''", "[]", "[1]", "true", "{a = 1}", "*none*"),
    "validation.cases": ("p0", "[1]", "-1", "1.5", "true", "{a = 1}", "nan"),
    "training.loggers": ("tensorbord", "3", "[1]", "true", "{a = 1}", "''", "['wandb', 'x']"),
    "data.folds": ("0", "1", "-3", "1.5", "true", "[]", "[3]", "{a = 1}", "nan"),
    "data.fold": ("-1", "1.5", "true", "a", "[]", "1e9"),
    "data.files": ("3", "[]", "'*_t1*'", "{t1 = 3}", "{t1 = []}", "{t1 = [1]}", "{t1 = ''}", "{t1 = '/a'}",
                   "{t1 = '../a'}", "{t1 = ['*_t1*', ' ']}", "{t9 = '*_t1*'}"),
    "fabric.devices": ("0", "-5", "abc", '""', "1.5", "true", "[0]", "{a = 1}", "'3,'", "100000", "'1,x'"),
}  # fmt: skip
KEYS = {*INTEGERS, *FLOATS, *CHOICES, *SWITCHES, *PATHS, *OTHERS}

#: Names of modalities and labels that no file, table or subset can have.
NAMES = ("", " ", "a/b", "../a", "a+b", "a,b", "a b", "a.nii.gz")

#: Contents of configuration files.
FILES: dict[str, bytes] = {
    "UTF-16": "seed = 1\n".encode("utf-16"),
    "UTF-16 without a mark": "seed = 1\n".encode("utf-16-le"),
    "UTF-32": "seed = 1\n".encode("utf-32"),
    "latin-1": 'data.label = "ä"\n'.encode("latin-1"),
    "an image": bytes(range(256)) * 4,
    "zeros": bytes(1000),
    "too long": b"#" * 2_000_000,
    "an open section": b"[data\n",
    "an open list": b"[data]\npatch = [16, 16\n",
    "an open string": b'[data]\nlabel = "seg\n',
    "no value": b"seed =\n",
    "no key": b"= 3\n",
    "only a word": b"seed\n",
    "JSON": b'{"seed": 1}\n',
    "YAML": b"data:\n  patch: [16, 16]\n",
    "a key twice": b"seed = 1\nseed = 2\n",
    "a section twice": b"[data]\nholdout = 1\n[data]\nworkers = 1\n",
    "a section that is a value": b"data = 3\n[data]\nholdout = 1\n",
    "an array of sections": b"[[data]]\nholdout = 1\n",
    "deep lists": b"seed = " + b"[" * 5000 + b"\n",
    "a number of 5000 digits": b"seed = " + b"1" * 5000 + b"\n",
    "a date": b"seed = 2020-13-45\n",
    "a control character": b'[data]\nlabel = "a\x00b"\n',
    "a line break in a path": b'[data]\ncache = "a\\nb"\n',
    "a NUL in a path": b'[data]\navailability = "a\\u0000b"\n',
    "an escape that is none": b'[data]\nlabel = "\\q"\n',
    "numbers without a fraction": b"seed = 1.\n",
    "a wrong key": b"[training]\nstep = 5\n",
}


def _set(*overrides: str) -> Callable[[Path], Sequence[object]]:
    options = [part for override in overrides for part in ("--set", override)]
    return lambda folder: whole.train(folder, whole.cases(folder), *options)


def _file(content: bytes) -> Callable[[Path], Sequence[object]]:
    def command(folder: Path) -> Sequence[object]:
        (folder / "config.toml").write_bytes(content)
        return whole.train(folder, whole.cases(folder), "--config", folder / "config.toml")

    return command


def _of_values() -> Iterator[Broken]:
    values: dict[str, Sequence[object]] = {}
    for key, (low, high) in INTEGERS.items():
        values[key] = (low - 1, high + 1, 10**30, "1.5", *_NO_NUMBERS)
    for key, wrong in FLOATS.items():
        # A list is a value of the weights, one number per modality.
        values[key] = (*wrong, *(v for v in _NO_NUMBERS if v != "[]"))
    for key in CHOICES:
        values[key] = ("none-such", '""', "3", "true", "[]", "{a = 1}")
    for key in SWITCHES:
        values[key] = ("maybe", "2", '""', "[]", "{a = 1}", "nan")
    for key in PATHS:
        values[key] = ("3", "true", "[]", '""', '"a\\u0000b"', "~nobody-here/x")
    values |= OTHERS
    for key, wrong in values.items():
        for value in wrong:
            yield Broken(f"{key} = {value}", _set(f"{key}={value}"), (f"{key.split('.')[-1]}",))


def _of_names() -> Iterator[Broken]:
    for name in NAMES:
        quoted = f'"{name}"'
        yield Broken(
            f"modality {quoted}", _set(f"data.modalities=[{quoted}, 't1']"), ("modalities",)
        )
        yield Broken(f"label {quoted}", _set(f"data.label={quoted}"), ("label",))
    for first, second in (("t1", "t1"), ("t1", "T1")):
        command = _set(f"data.modalities=['{first}', '{second}']")
        yield Broken(f"modalities {first}, {second}", command, ("modalities", "keep one of them"))
    for label in ("flair", "FLAIR"):
        yield Broken(
            f"the label is {label}", _set(f"data.label={label}"), ("label", "another name")
        )
    for name in ("", "background"):
        command = _set(f'data.labels={{"{name}" = 1}}')
        yield Broken(f"class {name!r}", command, (repr(name),))
    yield Broken("a region without classes", _set("data.regions={WT = []}"), ("WT", "classes"))
    many = ", ".join(f"c{k} = {k + 1}" for k in range(256))
    yield Broken("256 classes", _set(f"data.labels={{{many}}}"), ("at most 255",))
    yield Broken("a huge label value", _set("data.labels={a = 4294967296}"), ("labels",))


def _absent(folder: Path) -> Sequence[object]:
    return whole.train(folder, whole.cases(folder), "--config", folder / "absent.toml")


def _a_folder(folder: Path) -> Sequence[object]:
    return whole.train(folder, whole.cases(folder), "--config", folder)


BROKEN = [
    *_of_values(),
    *_of_names(),
    *(Broken(name, _set(*overrides), says) for name, (overrides, says) in TOGETHER.items()),
    *(Broken(f"a file: {name}", _file(content), ()) for name, content in FILES.items()),
    Broken("an absent file", _absent, ("absent.toml: cannot be read", "No such file")),
    Broken("a folder for a file", _a_folder, ("cannot be read", "directory")),
]
