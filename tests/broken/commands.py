"""Command lines that make no sense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from broken import Broken, whole

#: Arguments as they are, and what is said of them.
PLAIN: dict[str, tuple[str, ...]] = {
    "trian": ("no such command 'trian'",),
    "cases": ("missing argument 'CASES'",),
    "cases a b": ("unexpected extra argument",),
    "cases --json": ("missing argument",),
    "cases a --fast=1": ("--fast",),
    "plan": ("missing argument 'CASES'",),
    "plan a b": ("unexpected extra argument",),
    "plan a --memory": ("--memory",),
    "plan a --memory lots": ("memory: got 'lots'",),
    "plan a --memory -1GB": ("memory: got '-1GB'",),
    "plan a --time soon": ("soon",),
    "plan a --out": ("--out",),
    "train": ("got no cases", "--resume"),
    "train --fast": ("no such option: --fast",),
    "train a b": ("unexpected extra argument",),
    "train --out": ("--out",),
    "train --set": ("--set",),
    "train a --extend 5": ("--resume",),
    "train a --extend x": ("--extend",),
    "train a --time-limit soon": ("soon",),
    "profile": ("missing argument 'RUN'",),
    "profile a b": ("unexpected extra argument",),
    "profile a --only both": ("--only",),
    "profile a --repeats 1": ("--repeats",),
    "profile a --repeats many": ("--repeats",),
    "profile a --weights newest": ("--weights",),
    "evaluate": ("missing argument 'RUN'",),
    "evaluate a b c": ("unexpected extra argument",),
    "predict": ("missing argument",),
    "predict a": ("missing argument 'CASES'",),
    "predict a b": ("missing argument 'OUT'",),
    "predict a b c d": ("no run",),
    "compare": ("missing argument",),
    "compare a": ("missing argument 'B'",),
    "compare a b --seed x": ("--seed",),
    "compare a b --seed -1": ("--seed",),
    "compare a b --seed 99999999999999": ("--seed",),
    "report": ("missing argument",),
    "report a": ("missing argument 'B'",),
    "report a b --seed -1": ("--seed",),
    "report a b --out": ("--out",),
    "demo --seed 1.5": ("--seed",),
    "demo --seed 99999999999999": ("--seed",),
    "demo quick": ("unexpected extra argument",),
    "evaluate ~nobody-here/run": ("home folder is unknown",),
}
#: Overrides that are no ``section.key=value``.
OVERRIDES = ("", "=", "=5", "seed", ".=3", ".seed=3", "training.=3", "a..b=3", "seed=1\nseed=2",
             "data.label=a\tb", "data.label=\x00", "data.label=\udcff")  # fmt: skip
#: Paths that no file has.
PATHS = ("", " ", "a\0b")

Command = Callable[[Path], Sequence[object]]


def _with_run(*arguments: str) -> Command:
    """Words in capitals are paths below the folder."""

    def command(folder: Path) -> Sequence[object]:
        whole.trained(folder)
        whole.cases(folder)
        (folder / "file").write_text("text")
        (folder / "empty").mkdir()
        return [folder / word.lower() if word.isupper() else word for word in arguments]

    return command


#: Commands on a folder with the run RUN, three CASES, an EMPTY folder and a FILE.
FOLDERS: dict[str, tuple[Command, tuple[str, ...]]] = {
    "train on a file": (_with_run("train", "FILE", "--out", "OUT"), ("file",)),
    "train on an empty folder": (_with_run("train", "EMPTY", "--out", "OUT"), ("empty",)),
    "train on an absent folder": (_with_run("train", "NONE", "--out", "OUT"), ("none",)),
    "train into a run": (_with_run("train", "CASES", "--out", "RUN"), ("run",)),
    "train into a file": (_with_run("train", "CASES", "--out", "FILE"), ("file",)),
    "resume a file": (_with_run("train", "--resume", "FILE"), ("file", "no run in this folder")),
    "resume an empty folder": (_with_run("train", "--resume", "EMPTY"), ("no run in this folder",)),
    "resume an absent folder": (_with_run("train", "--resume", "NONE"), ("no run in this folder",)),
    "resume with --out": (_with_run("train", "--resume", "RUN", "--out", "OUT"), ("--out",)),
    "resume with --set": (_with_run("train", "--resume", "RUN", "--set", "seed=3"), ("--set",)),
    "resume with --config": (
        _with_run("train", "--resume", "RUN", "--config", "FILE"),
        ("--config",),
    ),
    "resume with --baseline": (
        _with_run("train", "--resume", "RUN", "--baseline", "prism"),
        ("--baseline",),
    ),
    "an unknown baseline": (
        _with_run("train", "CASES", "--out", "OUT", "--baseline", "best"),
        ("baseline: got 'best'",),
    ),
    "profile a file": (_with_run("profile", "FILE"), ("no run in this folder",)),
    "profile an empty folder": (_with_run("profile", "EMPTY"), ("no run in this folder",)),
    "profile an absent folder": (_with_run("profile", "NONE"), ("no run in this folder",)),
    "profile no subset": (_with_run("profile", "RUN", "--subsets", ","), ("subsets: got ','",)),
    "profile unknown subsets": (
        _with_run("profile", "RUN", "--subsets", "flair+pet,t1,t1+t1"),
        ("subsets: 'flair+pet' is no subset", "subsets: 't1+t1' is no subset"),
    ),
    "profile a subset twice": (
        _with_run("profile", "RUN", "--subsets", "t1+t2,t2+t1"),
        ("subsets: 't1+t2,t2+t1' has one of them twice",),
    ),
    "profile no strategy": (_with_run("profile", "RUN", "--strategies", ""), ("strategies: got",)),
    "profile an unknown strategy": (
        _with_run("profile", "RUN", "--strategies", "first_order,third_order"),
        (
            "strategies: unknown strategy 'third_order'; use some of single_level, joint, first_order",
        ),
    ),
    "profile a case of no size": (
        _with_run("profile", "RUN", "--shape", "0x9x9"),
        ("shape: got '0x9x9'",),
    ),
    "profile for no time": (_with_run("profile", "RUN", "--limit", "soon"), ("limit: got 'soon'",)),
    "profile weights that are not there": (
        _with_run("profile", "RUN", "--weights", "ema"),
        ("has no ema weights",),
    ),
    "evaluate a file": (_with_run("evaluate", "FILE"), ("no run in this folder",)),
    "evaluate an empty folder": (_with_run("evaluate", "EMPTY"), ("no run in this folder",)),
    "evaluate on a file": (_with_run("evaluate", "RUN", "FILE"), ("file",)),
    "evaluate on an empty folder": (_with_run("evaluate", "RUN", "EMPTY"), ("empty",)),
    "evaluate into a file": (_with_run("evaluate", "RUN", "CASES", "--out", "FILE"), ("file",)),
    "predict with a file": (_with_run("predict", "FILE", "CASES", "OUT"), ("no run",)),
    "predict a file": (_with_run("predict", "RUN", "FILE", "OUT"), ("file",)),
    "predict an empty folder": (_with_run("predict", "RUN", "EMPTY", "OUT"), ("empty",)),
    "predict an absent folder": (_with_run("predict", "RUN", "NONE", "OUT"), ("none",)),
    "predict into a file": (_with_run("predict", "RUN", "CASES", "FILE"), ("file",)),
    "predict an unknown subset": (
        _with_run("predict", "RUN", "CASES", "OUT", "--subset", "flair+pet"),
        ("pet",),
    ),
    "predict on the grid of an unknown modality": (
        _with_run("predict", "RUN", "CASES", "OUT", "--grid", "pet"),
        ("grid: unknown modality pet; use one of",),
    ),
    "predict a subset that has a name twice": (
        _with_run("predict", "RUN", "CASES", "OUT", "--subset", "t1+flair+t1,t2+t2+pet"),
        (
            "subset: t1 occurs twice; give each name once",
            "subset: t2 occurs twice",
            "unknown modality pet",
        ),
    ),
    "compare with an empty folder": (_with_run("compare", "RUN", "EMPTY"), ("no records.csv",)),
    "compare a run without evaluation": (_with_run("compare", "RUN", "RUN"), ("evaluate",)),
    "report of a run without evaluation": (_with_run("report", "RUN", "RUN"), ("evaluate",)),
    "compare a text": (_with_run("compare", "FILE", "FILE"), ("file", "line 1")),
}


def _set(override: str) -> Command:
    return lambda folder: whole.train(folder, whole.cases(folder), "--set", override)


def _path(*arguments: str) -> Command:
    return lambda folder: arguments


BROKEN = [
    *(Broken(f"prism-meta {line}", _path(*line.split()), says) for line, says in PLAIN.items()),
    *(Broken(f"--set {override!r}", _set(override), ()) for override in OVERRIDES),
    *(
        Broken(f"{command} {path!r}", _path(command, path, *more), ("expected a file or folder",))
        for path in PATHS
        for command, more in (
            ("cases", ()),
            ("plan", ()),
            ("train", ()),
            ("profile", ()),
            ("evaluate", ()),
            ("predict", ("a", "b")),
            ("compare", ("a",)),
            ("report", ("a",)),
        )
    ),
    *(Broken(name, command, says) for name, (command, says) in FOLDERS.items()),
]
