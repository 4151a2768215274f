"""Run folders that are damaged: every file with every damage, met by train --resume, evaluate, predict."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from broken import Broken, whole

Damage = Callable[[bytes], bytes | None]

#: What can happen to any file; None makes a folder of it.
DAMAGES: dict[str, Damage] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "garbage": lambda content: b"\xff\x00\x81garbage\n" * 20,
    "a folder": lambda content: None,
}


def write(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
        path.mkdir()
    else:
        path.write_bytes(content)


def resume(folder: Path) -> Sequence[object]:
    return ["train", "--resume", folder / "run"]


def evaluate(folder: Path) -> Sequence[object]:
    return ["evaluate", folder / "run", "--out", folder / "evaluation"]


def predict(folder: Path) -> Sequence[object]:
    return ["predict", folder / "run", whole.cases(folder), folder / "labels"]


def damaged(
    name: str, damage: Damage, then: Callable[[Path], Sequence[object]], folder: Path
) -> Sequence[object]:
    """The command ``then`` on a run whose file ``name`` is damaged; the other checkpoint is gone."""
    run = whole.trained(folder)
    path = run / name
    content = path.read_bytes()
    (run / "checkpoint.previous.pt").unlink()
    write(path, damage(content))
    return then(folder)


def files() -> Iterator[Broken]:
    commands = {"resume": resume, "evaluate": evaluate, "predict": predict}
    needed = {
        "run.json": commands,
        "config.toml": commands,
        "checkpoint.pt": {"resume": resume},
        "weights/last.safetensors": {"evaluate": evaluate, "predict": predict},
        "metrics.jsonl": {"evaluate": evaluate},
    }
    for name, of_name in needed.items():
        for kind, damage in DAMAGES.items():
            if (name, kind) in {
                ("metrics.jsonl", "empty"),
                ("metrics.jsonl", "cut"),
            }:
                continue  # a log without lines, or without the last one, is whole
            for command, then in of_name.items():
                yield Broken(
                    f"{name}: {kind}, {command}", partial(damaged, name, damage, then), (name,)
                )


def cleanups() -> Iterator[Broken]:
    """The clean-up of a run with validation."""
    rule = (
        '{"regions": {"XX": {"largest": true, "component_ml": 0.0, "total_ml": 0.0}}, "cases": [], '
    )
    damages: dict[str, Damage] = {
        **DAMAGES,
        "a region of another run": lambda content: (
            f'{rule}"dice": 0.5, "cleaned_dice": 0.5}}'.encode()
        ),
    }

    def command(damage: Damage, folder: Path) -> Sequence[object]:
        run = whole.trained(folder)
        config = run / "config.toml"
        text = config.read_text()
        assert "[validation]\ncases = 0" in text
        config.write_text(text.replace("[validation]\ncases = 0", "[validation]\ncases = 1"))
        write(run / "postprocessing.json", damage(b"{}"))
        return [*predict(folder), "--weights", "last"]

    for name, damage in damages.items():
        yield Broken(
            f"postprocessing.json: {name}",
            partial(command, damage),
            ("postprocessing.json: ", "choose it again with prism-meta train --resume"),
        )


def facts(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(content: bytes) -> bytes:
        values = json.loads(content)
        changed = change(values)
        return json.dumps(values if changed is None else changed).encode()

    return damage


def schema() -> Iterator[Broken]:
    """Values of another type in run.json."""
    wrong: dict[str, object] = {
        "started": 5, "command": "train", "seed": "0", "versions": [], "data": 7, "train": ["p0"],
        "test": "p1", "own": [], "config": "x", "validation": ["p1"],
    }  # fmt: skip
    for key, value in wrong.items():
        change = facts(lambda values, key=key, value=value: values.update({key: value}))
        for command, then in {"resume": resume, "evaluate": evaluate}.items():
            yield Broken(
                f"run.json: {key} is {value!r}, {command}", partial(damaged, "run.json", change, then),
                ("run.json: is damaged", key),
            )  # fmt: skip
        if key not in ("own", "validation"):
            change = facts(lambda values, key=key: {k: v for k, v in values.items() if k != key})
            yield Broken(
                f"run.json: no {key}", partial(damaged, "run.json", change, evaluate),
                ("run.json: is damaged", key),
            )  # fmt: skip
    for value in ([], "run", 5, None):
        yield Broken(
            f"run.json: {value!r}",
            partial(damaged, "run.json", lambda content, v=value: json.dumps(v).encode(), predict),
            ("run.json: is damaged",),
        )


def state(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(content: bytes) -> bytes:
        values = torch.load(io.BytesIO(content), weights_only=True)
        changed = change(values)
        buffer = io.BytesIO()
        torch.save(values if changed is None else changed, buffer)
        return buffer.getvalue()

    return damage


def checkpoints() -> Iterator[Broken]:
    """Whole files that do not fit the run."""
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "step -1": lambda s: s.update(step=-1),
        "step beyond the end": lambda s: s.update(step=99),
        "step as text": lambda s: s.update(step="2"),
        "step as a number with a fraction": lambda s: s.update(step=1.5),
        "a tensor": lambda s: torch.zeros(3),
        "a list": lambda s: [s],
        "an empty dict": lambda s: {},
        "a model of another shape": lambda s: s["model"].update(
            {n: torch.zeros(1, 1) for n in list(s["model"])[:1]}
        ),
        "an optimizer of another model": lambda s: s["optimizer"].update(param_groups=[]),
    }
    for key in ("step", "steps", "model", "learner", "optimizer", "scheduler", "objective"):
        changes[f"no {key}"] = lambda s, key=key: {k: v for k, v in s.items() if k != key}
        if key != "step":
            changes[f"{key} is a text"] = lambda s, key=key: s.update({key: "text"})
    for name, change in changes.items():
        if name in ("no objective", "objective is a text", "steps is a text"):
            continue  # fixed weights have no state; a length of another kind is another length
        yield Broken(
            f"checkpoint: {name}", partial(damaged, "checkpoint.pt", state(change), resume),
            ("checkpoint.pt: ",),
        )  # fmt: skip


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(content: bytes) -> bytes:
        values = load(content)
        change(values)
        return save(values)

    return damage


def models() -> Iterator[Broken]:
    """Weights that are whole files, but not those of the model."""
    changes: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        "NaN": lambda w: w[next(iter(w))].fill_(float("nan")),
        "infinite": lambda w: w[next(iter(w))].view(-1)[:1].fill_(float("inf")),
        "minus infinity": lambda w: w[list(w)[-1]].fill_(float("-inf")),
        "one missing": lambda w: w.pop(next(iter(w))),
        "one too many": lambda w: w.update(more=torch.zeros(3)),
        "another shape": lambda w: w.update({next(iter(w)): torch.zeros(2, 2)}),
        "none": lambda w: w.clear(),
    }
    for name, change in changes.items():
        for command, then in {"evaluate": evaluate, "predict": predict}.items():
            yield Broken(
                f"weights: {name}, {command}",
                partial(damaged, "weights/last.safetensors", weights(change), then),
                ("weights/last.safetensors: ", "restore the file"),
            )


def logs() -> Iterator[Broken]:
    """Lines of metrics.jsonl that are no lines of the log; read before any prediction."""
    for line in (
        "[]",
        "5",
        "{}",
        '{"step": 1}',
        '{"step": "1", "train_loss": 1, "meta_loss": 1}',
        "{",
    ):
        yield Broken(
            f"metrics.jsonl: {line}",
            partial(
                damaged, "metrics.jsonl", lambda content, new=line: new.encode() + b"\n", evaluate
            ),
            ("metrics.jsonl, line 1: ",),
        )


def unlike(change: Callable[[Path], object], folder: Path) -> Sequence[object]:
    change(whole.trained(folder))
    return resume(folder)


def others() -> Iterator[Broken]:
    def edit(run: Path) -> None:
        path = run / "config.toml"
        path.write_text(path.read_text().replace("steps = 2", "steps = 9"))

    yield Broken(
        "an edited config", partial(unlike, edit), ("training.steps from 2 to 9", "--extend")
    )
    yield Broken("no run", partial(unlike, shutil.rmtree), ("no run in this folder",))
    yield Broken(
        "an ended run again",
        lambda folder: ["train", whole.cases(folder), "--out", whole.trained(folder)],
        ("holds a run already",),
    )

    def own_config(folder: Path) -> Sequence[object]:
        (folder / "out").mkdir()
        shutil.copy(whole.trained(folder) / "config.toml", folder / "out")
        return [
            "train",
            whole.cases(folder),
            "-c",
            folder / "out" / "config.toml",
            "--out",
            folder / "out",
        ]

    yield Broken(
        "a config of the user's own in --out", own_config, ("config.toml, which the run would",)
    )

    def lost(folder: Path) -> Sequence[object]:
        root = whole.cases(folder)
        shutil.rmtree(root / "p1")
        shutil.rmtree(root / "p2")
        whole.trained(folder)
        return ["train", "--resume", folder / "run", root]

    yield Broken("fewer cases", lost, ("case",))

    def changed(folder: Path) -> Sequence[object]:
        root = whole.cases(folder)
        whole.trained(folder)
        next(root.rglob("*_t1.nii.gz")).unlink()
        return ["train", "--resume", folder / "run", root]

    yield Broken("a file fewer", changed, ("the cases have changed", "p"))
    yield Broken(
        "--out with --resume",
        lambda folder: ["train", "--resume", whole.trained(folder), "--out", folder / "other"],
        ("leave --out",),
    )
    for steps in (10**9, 10**12):
        yield Broken(
            f"{steps} more steps",
            lambda folder, n=steps: ["train", "--resume", whole.trained(folder), "--extend", n],
            ("training.steps",),
        )
    for text in ("", "soon", "-1h", "1.5h", "5", "1h1h"):
        yield Broken(
            f"time limit {text!r}",
            lambda folder, t=text: whole.train(folder, whole.cases(folder), f"--time-limit={t}"),
            ("time limit: got", "e.g. 11h30m"),
        )


BROKEN = [*files(), *cleanups(), *schema(), *checkpoints(), *models(), *logs(), *others()]
