"""Runs a study: what is due is trained in several processes, until nothing is due any more."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock, Timeout

from prism_meta import training
from prism_meta.data.phantom import write_phantoms
from prism_meta.errors import PrismError
from prism_meta.files import writable_folder, write_whole
from prism_meta.training.stopping import StopRequest, TrainingStopped
from prism_meta.training.study.jobs import Job, Plan
from prism_meta.training.study.results import Results
from prism_meta.training.study.schema import PhantomsConfig, Study
from prism_meta.training.study.work import run_job

#: Runs per process after which the plan is made anew.
_WAVE = 4


class OnRun(Protocol):
    """Told after each run."""

    def __call__(self, done: int, total: int, note: str) -> None:
        """``done`` of the ``total`` runs that are known by now are made; ``note`` names the last one."""


@dataclass(frozen=True)
class Made:
    """What a call of ``run_study`` did.

    Args:
        made: number of runs that it made.
        left: number of known runs that are still to be made.
        faults: a line for each run that failed.
    """

    made: int
    left: int
    faults: tuple[str, ...]


def run_study(
    study: Study,
    folder: Path | str,
    *,
    jobs: int | None = None,
    limit: float | None = None,
    keep: bool = False,
    on_run: OnRun = lambda done, total, note: None,
) -> Made:
    """Make the runs of a study that are not made yet.

    Each run has one process and one thread on a CPU, and a GPU of its own where there are GPUs. Several
    calls, e.g. the tasks of a SLURM array, can share a folder: a run that one works on is left to it.

    Args:
        study: see ``read_study``.
        folder: gets ``runs.jsonl``, and holds prepared cases and unfinished runs. A study that was
            interrupted goes on with the same folder.
        jobs: number of processes. Defaults to one per GPU, otherwise one per core.
        limit: seconds after which unfinished runs are saved, and no other is started.
        keep: keep the folders of the runs, with their weights.
        on_run: called after each run.

    Raises:
        PrismError: the folder cannot be written, or the cases cannot be read.
    """
    from joblib import Parallel, delayed

    folder = writable_folder(folder)
    cases = _cases(study, folder)
    gpus = torch.cuda.device_count()
    count = jobs or gpus or _cores()
    deadline = None if limit is None else time.time() + limit
    results, failed, made = Results(folder), dict[str, str](), 0
    plan, tried = Plan(study, results), set[str]()
    # What was tried and is still due failed, or another process works on it.
    while due := [job for job in plan.due() if job.key not in tried]:
        # Not all at once: with the results of some, others are due, which come first.
        due = due[: _WAVE * count]
        parallel = Parallel(
            n_jobs=min(count, len(due)),
            return_as="generator_unordered",
            pre_dispatch="n_jobs",
            batch_size=1,
        )
        tasks = (delayed(_one)(job, cases, folder, deadline, keep) for job in due)
        for job, outcome in parallel(tasks):
            tried.add(job.key)
            if isinstance(outcome, str):
                failed[job.key] = f"{job.title}: {outcome}"
            made += outcome is True
            results.read()
            known = plan.jobs()
            on_run(sum(each.key in results for each in known), len(known), job.title)
        if deadline is not None and time.time() >= deadline:
            break
    left = [job for job in plan.due() if job.key not in failed]
    return Made(made, len(left), tuple(failed.values()))


def _one(
    job: Job, cases: Path, folder: Path, deadline: float | None, keep: bool
) -> tuple[Job, bool | str]:
    """The job, and whether it was made here; or what went wrong. Others may work on it, or time be over."""
    torch.set_num_threads(1)
    lock = FileLock(writable_folder(folder / "work") / f"{job.key}.lock")
    try:
        with lock.acquire(timeout=0), _quiet():
            results = Results(folder)
            left = None if deadline is None else deadline - time.time()
            if job.key in results or (left is not None and left <= 0):
                return job, False
            with own_gpu(folder, torch.cuda.device_count()) as gpu:
                result = run_job(
                    job, cases, folder, gpu=gpu, keep=keep, should_stop=StopRequest(left)
                )
            results.append(result)
            with suppress(OSError):
                Path(lock.lock_file).unlink()
            return job, True
    except (Timeout, TrainingStopped):
        return job, False
    except PrismError as error:
        return job, "; ".join(error.faults)


@contextmanager
def own_gpu(folder: Path, count: int) -> Iterator[int | None]:
    """The index of a GPU that no other run of the study on this host has; None if all are taken.

    Args:
        folder: of the study; it gets a lock for each GPU.
        count: number of GPUs of this host.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with own_gpu(folder, 2) as a, own_gpu(folder, 2) as b, own_gpu(folder, 2) as c:
        ...     print(a, b, c)
        0 1 None
    """
    for index in range(count):
        lock = FileLock(folder / f"gpu-{socket.gethostname()}-{index}.lock", is_singleton=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            yield index
        finally:
            lock.release()
        return
    yield None


@contextmanager
def _quiet() -> Iterator[None]:
    """Each run would tell the same of its cases."""
    said = logging.getLogger(training.__name__)
    before = said.level
    said.setLevel(logging.WARNING)
    try:
        yield
    finally:
        said.setLevel(before)


def _cores() -> int:
    """The number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def _cases(study: Study, folder: Path) -> Path:
    """The folder of the cases; phantoms are written if they are not there."""
    if study.data is not None:
        return study.data
    assert study.phantoms is not None  # the study was validated
    phantoms, root = study.phantoms, folder / "phantoms"
    stamp = folder / "phantoms.json"
    said = phantoms.model_dump_json()
    with FileLock(folder / "phantoms.lock"):
        if stamp.exists() and stamp.read_text(encoding="utf-8") == said + "\n":
            return root
        _write(phantoms, root)
        write_whole(stamp, said + "\n")
    return root


def _write(phantoms: PhantomsConfig, root: Path) -> None:
    complete = torch.ones(phantoms.train + phantoms.test, 4, dtype=torch.bool)
    write_phantoms(
        root, complete, seed=phantoms.seed, shape=phantoms.shape, spacing=phantoms.spacing
    )
