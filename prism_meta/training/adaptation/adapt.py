"""``adapt``: from a run and a few labelled cases of a site to a run for that site."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from prism_meta.bilevel.strategies import Objective
from prism_meta.data.cache import CachedCase
from prism_meta.data.cases import Case
from prism_meta.errors import ConfigError, PrismError, raise_faults
from prism_meta.evaluation.predictor import Predictor
from prism_meta.files import writable_folder, write_whole
from prism_meta.training.adaptation.cases import Support, find_support
from prism_meta.training.adaptation.choice import Choice, Setting
from prism_meta.training.adaptation.fine_tuning import DEFAULT, LENGTHS, RATES, Adapter
from prism_meta.training.adaptation.result import (
    AdaptationFacts,
    By,
    adapted_config,
    adapted_objective,
)
from prism_meta.training.build import (
    build_fabric,
    build_label_set,
    build_objective,
    build_predictor,
    missing_rates,
)
from prism_meta.training.cleanup.file import CLEANUP, read_cleanup
from prism_meta.training.config.schema import Config, FabricConfig
from prism_meta.training.folder.places import cache_folder, own_folder
from prism_meta.training.folder.weights import WEIGHTS, Kind, save_weights, weights_file
from prism_meta.training.processes.agreement import Processes
from prism_meta.training.progress import Advance, progress_bars
from prism_meta.training.run import Run
from prism_meta.training.setup.cases import prepare_configured


@dataclass(frozen=True)
class Adapted:
    """The result of ``adapt``.

    Args:
        predictor: the adapted model, ready to predict and evaluate cases.
        facts: what was done, and what leave-one-out found; ``run.json`` has it as ``adaptation``.
        run: the run folder; None without ``out``.
    """

    predictor: Predictor
    facts: AdaptationFacts
    run: Run | None = None

    @property
    def model(self) -> nn.Module:
        """The adapted model, in evaluation mode."""
        return self.predictor.model


def adapt(
    run: Run | Path | str,
    cases: Path | str | Sequence[Case],
    *,
    subset: str | Sequence[str] | None = None,
    out: Path | str | None = None,
    steps: int | None = None,
    lr: float | None = None,
    weights: Kind | None = None,
    seed: int | None = None,
    model: nn.Module | None = None,
    objective: Objective | None = None,
    progress: bool = True,
) -> Adapted:
    """Fine-tune a run to a site from a few labelled cases, as the command ``prism-meta adapt`` does.

    All weights are trained with Adam on patches of the cases, which all show one subset of modalities, and
    averaged. The loss is L_fuse + L_prm (E5, E7): what is deployed is the fused output.

    The rate and the number of steps are chosen by leave-one-out on the cases, see
    ``adaptation_choice.choose``. If adapting is not better than not adapting by more than the standard
    error, the weights are kept as they are. One patient leaves nothing to hold out: a cautious setting is
    used then, and the weights are kept if the case itself is not segmented better with it.

    Args:
        run: a run whose training has ended, or its folder.
        cases: folder of labelled cases of the site, or cases; one to ten are usual.
        subset: names of the modalities to adapt to, e.g. ``"flair+t1"``. Defaults to all that every case has.
        out: run folder to write. Defaults to none.
        steps: number of steps. Defaults to the best of those that are tried.
        lr: rate. Defaults to the best of those that are tried. With both there is no leave-one-out, and the
            weights are adapted in any case.
        weights: which weights of the run; see ``Run.load_model``.
        seed: of patches and dropout. Defaults to that of the run.
        model: gets the weights; needed for a run that trained a model of your own. It is not changed by
            the adaptation.
        objective: needed for a run that trained with an objective of your own.
        progress: show progress bars on standard error.

    Returns:
        The predictor of the adapted model, and what was found.

    Raises:
        PrismError: the run or the cases cannot be used, ``out`` holds a run already, or training diverged.
            Nothing is left in ``out`` then.

    Source: fine-tuning on the support set, MAML, Finn et al., ICML 2017.

    Example:
        >>> import tempfile
        >>> import prism_meta as pm
        >>> from prism_meta.data.phantom import write_phantoms
        >>> folder = tempfile.mkdtemp()
        >>> _ = write_phantoms(folder + "/cases", [[True] * 4] * 3, shape=(40, 48, 36), spacing=4.0)
        >>> config = pm.load_config(overrides=[
        ...     "data.spacing=[4, 4, 4]", "data.patch=[32, 32]", "data.batch_size=2", "model.width=2",
        ...     "training.steps=2",
        ... ])
        >>> trained = pm.train(folder + "/cases", config, out=folder + "/run", progress=False)
        >>> adapted = pm.adapt(
        ...     folder + "/run", folder + "/cases", subset="flair+t1", steps=2, lr=1e-3,
        ...     out=folder + "/site", progress=False,
        ... )
        >>> adapted.facts.subset, adapted.facts.steps, adapted.run.kinds
        ('flair+t1', 2, ('ema', 'last'))
    """
    _check_numbers(steps, lr)
    run = run if isinstance(run, Run) else Run.open(run)
    config = run.config
    if out is not None:
        _check_out(Path(out), run)
    theirs = run.facts.get("own", {}).get("objective")
    if theirs is not None and objective is None:
        raise PrismError(
            f"{run.folder}: was trained with an objective of its own ({theirs}); adapt it in Python with "
            "prism_meta.adapt(..., objective=...)"
        )
    fabric = build_fabric(FabricConfig())
    kind = weights or run.kinds[0]
    start = run.load_model(fabric.device, model=model, weights=weights)
    support = find_support(config, cases, subset)
    seed = config.seed if seed is None else seed
    with ExitStack() as stack:
        if out is not None:
            stack.enter_context(own_folder(Path(out)))
        advance = stack.enter_context(
            progress_bars("prepare", "hold out", "adapt", quiet=not progress)
        )
        fabric.launch()
        prepared = prepare_configured(
            config,
            support.cases,
            cache_folder(config, out, stack),
            processes=Processes(fabric),
            on_case=advance,
        )
        adapter = Adapter(
            support.subset,
            objective or build_objective(adapted_objective(config), missing_rates(prepared)),
            config.data.modalities,
            build_label_set(config.data),
            patch=config.data.patch,
            batch_size=config.data.batch_size,
            foreground=config.data.foreground,
            augment=config.training.augment,
            overlap=config.evaluation.overlap,
            clip_norm=config.training.clip_norm,
            seed=seed,
            fabric=fabric,
        )
        files = Path(stack.enter_context(TemporaryDirectory()))
        choice, by, adapted = _adapted(adapter, start, prepared, steps, lr, files, advance)
        facts = AdaptationFacts.of(
            choice,
            by=by,
            run=run.folder,
            weights=kind,
            subset=support.name,
            cases=[case.id for case in support.cases],
        )
        made = adapted_config(config, choice.setting, parent=run.folder, seed=seed)
        written = None
        if out is not None:
            own = {"model": model, "objective": objective}
            names = {key: type(value).__name__ for key, value in own.items() if value is not None}
            root = Path(cases) if isinstance(cases, (Path, str)) else None
            content = _Content(run, files, adapted)
            written = content.write(Path(out), made, facts, support, root=root, own=names)
    cleanup = read_cleanup(run.folder, config)
    return Adapted(build_predictor(made, adapted, cleanup=cleanup), facts, written)


def _adapted(
    adapter: Adapter,
    model: nn.Module,
    cases: Sequence[CachedCase],
    steps: int | None,
    lr: float | None,
    folder: Path,
    advance: Advance,
) -> tuple[Choice, By, nn.Module]:
    """The choice, how it was made, and the model that follows; its files are in ``folder``."""
    by: By = "user"
    if steps is not None and lr is not None:
        choice = Choice(Setting(lr, steps), "chosen by the user; no case was held out")
    elif len({case.patient for case in cases}) < 2:
        by = "default"
        choice = Choice(
            Setting(lr or DEFAULT.lr, steps or DEFAULT.steps),
            "there is one patient, so that none could be held out; a cautious setting was used",
        )
    else:
        by = "leave_one_out"
        choice = adapter.choose(
            model,
            cases,
            rates=RATES if lr is None else (lr,),
            lengths=LENGTHS if steps is None else (steps,),
            progress=lambda done, total, note: advance(done, total, note, task="hold out"),
        )
    if choice.setting is None:
        return choice, by, model
    total = choice.setting.steps
    advance(0, total, "", task="adapt")
    adapted, _ = adapter.train(
        model,
        cases,
        choice.setting,
        folder=folder,
        on_step=lambda step, line: advance(step, total, "", task="adapt"),
    )
    if by == "default":
        before, after = adapter.dice(model, cases), adapter.dice(adapted, cases)
        if after <= before:
            reason = (
                "there is one patient, so that none could be held out, and even its own cases are not "
                f"segmented better (Dice {100 * before:.1f} before, {100 * after:.1f} after)"
            )
            return Choice(None, reason), by, model
    return choice, by, adapted


@dataclass(frozen=True)
class _Content:
    """What a new run folder gets.

    Args:
        parent: the run that was adapted.
        files: folder with the log and the weights of the adaptation.
        model: the model that predicts.
    """

    parent: Run
    files: Path
    model: nn.Module

    def write(
        self,
        out: Path,
        config: Config,
        facts: AdaptationFacts,
        support: Support,
        *,
        root: Path | None,
        own: dict[str, str],
    ) -> Run:
        """Write the folder. ``run.json`` comes last: without it there is no run, and a new call starts again.

        Files of a call that was killed here are replaced or removed.
        """
        log, cleanup = self.files / "metrics.jsonl", self.parent.folder / CLEANUP
        found = {out / CLEANUP: cleanup} if cleanup.exists() else {}
        if facts.steps:
            found |= {out / log.name: log}
            found |= {weights_file(out, k): weights_file(self.files, k) for k in ("ema", "last")}
        for path in (out / log.name, out / CLEANUP, weights_file(out, "ema")):
            if path not in found:
                path.unlink(missing_ok=True)
        writable_folder(out / WEIGHTS)
        for path, source in found.items():
            write_whole(path, source.read_bytes())
        if not facts.steps:
            save_weights(weights_file(out, "last"), self.model)
        return Run.create(
            out,
            config,
            root=root,
            train=support.cases,
            test=[],
            own=own,
            adaptation=facts.model_dump(mode="json"),
        )


def _check_numbers(steps: int | None, lr: float | None) -> None:
    faults = []
    if steps is not None and not 1 <= steps <= 100_000:
        faults.append(f"steps: got {steps}, expected 1 to 100000; 20 is usual")
    if lr is not None and not 0 < lr <= 1:
        faults.append(f"lr: got {lr:g}, expected more than 0, and at most 1; 0.001 is usual")
    raise_faults(ConfigError, faults)


def _check_out(out: Path, run: Run) -> None:
    """Check that the new run can be written, before anything that takes time."""
    if out.resolve() == run.folder.resolve():
        raise PrismError(f"{out}: is the run to adapt, which is kept; give another --out")
    if (out / "run.json").exists():
        raise PrismError(f"{out}: holds a run already; give another --out, or remove it")
    Run.check_new(out)
