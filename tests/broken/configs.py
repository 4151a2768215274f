"""Configurations that cannot be used: bad values of every key, contradictions, and damaged files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from broken import Broken, whole

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

#: Networks that are named by their module have sizes of their own.
_OWN_SIZES = ("model.width=8", "model.depth=4")

#: Overrides that are valid one by one, and what is said of them together.
TOGETHER: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "patch 1": (("data.patch=[1, 1]",), ("data.patch, model.depth", "use more than 2")),
    "patch 3, depth 4": (
        ("data.patch=[3, 3]", "model.depth=4"),
        ("data.patch, model.depth", "use more than 8"),
    ),
    "depth 12": (("model.depth=12",), ("data.patch, model.depth", "smaller depth")),
    "width 4096": (
        ("model.width=4096", "model.depth=8", "data.patch=[256, 256]"),
        ("model.width", "of memory", "smaller"),
    ),
    "batch of a million": (
        ("data.batch_size=1000000", "data.patch=[256, 256]"),
        ("data.batch_size", "of memory", "smaller"),
    ),
    "all sizes at once": (
        ("data.patch=[4096, 4096, 4096]", "model.depth=12", "model.width=4096"),
        ("data.batch_size, data.patch, model.width, model.depth",),
    ),
    "U-Net, patch 10": (
        ("model.network=unet", "data.patch=[10, 10]", "model.depth=3"),
        ("data.patch: the U-Net halves it 2 times", "multiples of 4"),
    ),
    "U-Net with a fusion": (
        ("model.network=unet", "model.fusion=mean"),
        ("fusion: mean needs network = prism",),
    ),
    "two weights for four modalities": (
        ("objective.beta=[1, 2]",),
        ("objective.beta: got 2 weights for 4 modalities",),
    ),
    "weighting without unimodal": (
        ("objective.unimodal=false", "objective.weighting=preference"),
        ("weighting: preference has nothing to weigh",),
    ),
    "learned weights from 0": (
        ("objective.weighting=learned", "objective.beta=0"),
        ("beta, delta: learned weights start at numbers > 0",),
    ),
    "learned weights without a meta-gradient": (
        ("objective.weighting=learned", "meta.strategy=reptile"),
        ("objective.weighting: learned weights follow the gradient",),
    ),
    "learned subsets without a meta-gradient": (
        ("objective.subset_weights=learned", "meta.strategy=joint"),
        ("objective.subset_weights: learned weights follow the gradient",),
    ),
    "a meta loss that is only measured": (
        ("objective.meta_loss=ranking", "meta.strategy=single_level"),
        ("objective.meta_loss: meta.strategy single_level only measures the meta loss",),
    ),
    "a temperature of no soft worst": (
        ("objective.meta_temperature=1", "objective.meta_loss=ranking"),
        ("meta_temperature: only meta_loss = soft_worst has one",),
    ),
    "shared state of SGD": (
        ("meta.inner_state=shared",),
        ("inner_state: shared needs inner = adamw",),
    ),
    "shared state without inner steps": (
        ("meta.inner_state=shared", "meta.inner=adamw", "meta.strategy=single_level"),
        ("inner_state: shared does not go with single_level",),
    ),
    "epsilon without Reptile": (
        ("meta.epsilon=0.5",),
        ("meta: epsilon: first_order has none; leave it out, or use reptile",),
    ),
    "parameters of nobody": (
        ("meta.outer_parameters=fusions.*", "meta.alpha=0"),
        ("meta: alpha, outer_parameters: with alpha 0",),
    ),
    "hard masks without all subsets": (
        ("masks.train=hard", "masks.meta=full"),
        ("masks: meta: hard masks follow the losses", "use dynamic"),
    ),
    "a network that cannot be imported": (
        (*_OWN_SIZES, "model.network=nomodule:Net"),
        ("model.network: nomodule:Net cannot be imported (No module named 'nomodule')", "give an"),
    ),
    "a network of MONAI in small letters": (
        (*_OWN_SIZES, "model.network=monai:segresnet"),
        (
            "model.network: monai.networks.nets has no function or class 'segresnet'",
            "did you mean SegResNet?",
        ),
    ),
    "a function that returns no network": (
        (*_OWN_SIZES, "model.network=builtins:dict"),
        ("model.network: builtins:dict returned dict, expected a torch.nn.Module", "correct it"),
    ),
    "a network without its arguments": (
        (*_OWN_SIZES, "model.network=monai:UNet"),
        ("model.arguments: UNet() missing 2 required", "correct them"),
    ),
    "a network with an unknown argument": (
        (*_OWN_SIZES, "model.network=monai:SegResNet", "model.arguments={filters = 4}"),
        (
            "model.arguments: SegResNet() got an unexpected keyword argument 'filters'",
            "correct them",
        ),
    ),
    "a network of MONAI with a width": (
        ("model.network=monai:SegResNet", "model.width=4"),
        ("model: width: monai:SegResNet has no such size", "use arguments"),
    ),
    "a network of MONAI with a fusion": (
        ("model.network=monai:SegResNet", "model.fusion=mean"),
        ("model: fusion: mean needs network = prism, because monai:SegResNet has no fusion",),
    ),
    "warm-up longer than the training": (
        ("training.warmup=50", "training.steps=50"),
        ("training: warmup: got 50 steps of 50", "use fewer"),
    ),
    "a logger twice": (
        ("training.loggers=['wandb', 'wandb']",),
        ("training: loggers: one of them occurs twice; give each name once",),
    ),
    "patience without validation": (
        ("validation.patience=3",),
        ("validation: patience: needs validation", "set cases"),
    ),
    "a validation case twice": (
        ('validation.cases=["p1", "p1"]',),
        ("validation: cases: a case occurs twice",),
    ),
    "a power of no hard masks": (("masks.power=2",), ("power: only hard masks have one",)),
    "a step of no group DRO": (
        ("masks.step=2", "masks.train=hard"),
        ("step: only dro masks have one; leave it out, or use dro for train",),
    ),
    "group DRO without all subsets": (
        ("masks.train=dro", "masks.meta=single"),
        ("masks: meta: dro masks follow the losses", "use dynamic"),
    ),
    "support without tasks": (
        ("episodes.support=2",),
        ("support: 2 support cases need kind = task",),
    ),
    "tasks with masks": (
        ("episodes.kind=task", "masks.train=static"),
        ("masks, episodes.kind: all samples of a task show one subset",),
    ),
    "more support cases than there are": (
        ("episodes.kind=task", "episodes.support=50"),
        ("no task can be drawn", "use fewer support cases", "episodes.support"),
    ),
    "rates and a table": (
        ("data.missing_rates=[0, 0, 0, 0]", "data.availability=a.csv"),
        ("missing_rates, availability: got both",),
    ),
    "three rates for four modalities": (
        ("data.missing_rates=[0, 0, 0]",),
        ("missing_rates: got 3 rates; give 4",),
    ),
    "rates that leave nothing": (
        ("data.missing_rates=[0.99, 0.99, 0.99, 0.99]",),
        ("leave 0 files for 3 cases", "data.missing_rates"),
    ),
    "test cases and a holdout": (
        ("data.test_cases=['p0']", "data.holdout=1"),
        ("test_cases, holdout: got both",),
    ),
    "a test case twice": (("data.test_cases=['p0', 'p0']",), ("test_cases: a case occurs twice",)),
    "an unknown test case": (("data.test_cases=['p9']",), ("data.test_cases", "p9")),
    "folds and a holdout": (
        ("data.folds=3", "data.fold=0", "data.holdout=1"),
        ("folds: got test_cases or holdout, too",),
    ),
    "folds without a fold": (("data.folds=3",), ("folds, fold: got one without the other",)),
    "a fold without folds": (("data.fold=0",), ("folds, fold: got one without the other",)),
    "the fold after the last": (
        ("data.folds=3", "data.fold=3"),
        ("fold: got 3, expected at most 2",),
    ),
    "more folds than patients": (
        ("data.folds=4", "data.fold=0"),
        ("got 4 folds for 3 patients", "(set data.folds)"),
    ),
    "sites that are not known": (
        ("data.split=site", "data.holdout=1"),
        ("3 cases have no site (p0, p1, p2)", "(set data.split)"),
    ),
    "all cases held out": (("data.holdout=3",), ("data.holdout: leaves none of 3 cases",)),
    "one case to train on": (("data.holdout=2",), ("1 training case", "data.holdout")),
    "no modalities": (("data.modalities=[]",), ("modalities",)),
    "no labels": (("data.labels={}",), ("labels: none given",)),
    "a label value twice": (("data.labels={a=1, b=1}",), ("labels", "its own value")),
    "a region of an unknown class": (("data.regions={WT=['x']}",), ("'WT'", "unknown class 'x'")),
    "an unknown key": (
        ("data.pach=[8, 8]",),
        ("data.pach: unknown key; did you mean data.patch?",),
    ),
    "an unknown section": (
        ("trainning.steps=5",),
        ("trainning: unknown section; did you mean training?",),
    ),
    "a section that is a value": (("data=5",), ("data: got 5, expected a section of keys",)),
    "a value that is a section": (("training.steps.x=5",), ("training.steps",)),
    "half precision on a CPU": (
        ("fabric.precision=16-mixed", "fabric.accelerator=cpu"),
        ("fabric.precision: got '16-mixed' on a CPU", "use bf16-mixed"),
    ),
    "nodes without a launcher": (
        ("fabric.nodes=2", "fabric.accelerator=cpu"),
        ("fabric.nodes: got 2", "torchrun"),
    ),
    "a thousand processes": (
        ("fabric.devices=1000", "fabric.accelerator=cpu"),
        ("fabric.devices: got 1000 processes",),
    ),
    "an index of a CPU": (
        ("fabric.devices='3,'", "fabric.accelerator=cpu"),
        ("fabric.devices: got '3,' with accelerator 'cpu'",),
    ),
    "three faults at once": (
        ("training.steps=0", "model.network=x", "data.foo=1"),
        ("training.steps: got 0", "model.network: got 'x'", "data.foo: unknown key"),
    ),
}
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
