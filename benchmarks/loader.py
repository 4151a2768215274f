"""Which share of a training step waits for data?

    python benchmarks/loader.py                        # 2-D and 3-D, 0, 1 and 2 workers; about 5 minutes
    python benchmarks/loader.py --steps 10 --rounds 1  # a short look

The demo's cases and settings: 2-D patches of 48 x 48 in batches of 8, and for 3-D patches of 32 x 32 x 32
in batches of 2. Each step is timed in two parts: the wait for the episode, and the step itself, as the
trainer takes it. Workers also take time from the step, because they use the same cores. So the script also
times steps whose episodes lie in memory ("ready"), and compares the whole time per step with theirs.

Rounds go through all numbers of workers in turn, because the speed of a machine drifts. Shares are medians
over the rounds.

Result (two cores, two threads): without workers 2.5 % of a step waits in 2-D and 1.9 % in 3-D. In turn on the
same machine it was 5.8 and 3.4 % before patches lay together in the cache and the bookkeeping of transforms
went, and 2.4 and 1.9 % after. One worker lowers the share to 1.5 and 0.9 %. It has the lowest priority, and
the whole time per step is 1.07 and 1.05 times that without it. (At the priority of the training it made steps
19 to 29 % slower in 2-D, and 6 to 14 % in 3-D.) So the default is no worker on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from measuring import facts
from rich.console import Console
from rich.table import Table

#: Overrides of the demo's settings.
SETTINGS: dict[str, tuple[str, ...]] = {
    "2-D, 48 x 48, batch 8": (),
    "3-D, 32 x 32 x 32, batch 2": ("data.patch=[32, 32, 32]", "data.batch_size=2"),
}
READY = "ready"


class Problem:
    """The demo's training with some overrides."""

    def __init__(self, cached: Sequence[Any], config: Any) -> None:
        from prism_meta.bilevel.learner import MetaLearner
        from prism_meta.training import build

        torch.manual_seed(config.seed)
        model = build.build_model(config)
        objective = build.build_objective(config.objective, build.missing_rates(cached))
        strategy = build.build_strategy(
            config.meta, torch.tensor(config.meta.inner_lr), weight_decay=0.0
        )
        outer = build.build_outer(config, model, objective, strategy, steps=config.training.steps)
        self.learner = MetaLearner(
            model,
            objective,
            strategy,
            outer.optimizer,
            alpha=outer.alpha,
            inner_state=config.meta.inner_state,
            clip_norm=config.training.clip_norm,
        )
        self.episodes = build.build_episodes(config, cached)
        self.ready = [self.episodes[t] for t in range(4)]

    def time(self, workers: int | str, steps: int) -> tuple[float, float]:
        """Seconds of waiting and of computing per step, without the first step."""
        from prism_meta.training.episodes.loader import load_episodes

        if isinstance(workers, int):
            loaded: Iterator[Any] = load_episodes(
                self.episodes, range(steps + 1), workers=workers, give_way=True
            )
        else:
            loaded = (episode for episode in islice(cycle(self.ready), steps + 1))
        waits, steps_taken = [], []
        with closing(loaded) as episodes:  # type: ignore[type-var]
            for _ in range(steps + 1):
                start = time.perf_counter()
                episode = next(episodes)
                ready = time.perf_counter()
                self.learner.step(*episode)
                waits.append(ready - start)
                steps_taken.append(time.perf_counter() - ready)
        return statistics.fmean(waits[1:]), statistics.fmean(steps_taken[1:])

    def patch(self, episodes: int) -> float:
        """Seconds to draw one patch in this process."""
        start = time.perf_counter()
        for t in range(episodes):
            self.episodes[t]
        drawn = 2 * self.ready[0][1].image.shape[0] * episodes
        return (time.perf_counter() - start) / drawn


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from prism_meta.cli import demo
    from prism_meta.data.cache import prepare
    from prism_meta.data.layouts.folders import load_cases
    from prism_meta.training import build
    from prism_meta.training.config import load_config

    train, _ = demo.FULL.write(folder, seed=arguments.seed, on_case=lambda case: None)
    found = []
    for name, overrides in SETTINGS.items():
        config = load_config(overrides=[*demo.FULL.overrides, *overrides])
        cached = prepare(
            load_cases(train, config.data.modalities),
            folder / "cache",
            preprocessing=build.build_preprocessing(config.data),
            labels=build.build_label_set(config.data),
        )
        problem = Problem(cached, config)
        problem.time(READY, 1)
        times: dict[int | str, list[tuple[float, float]]] = {}
        patches = []
        for _ in range(arguments.rounds):
            patches.append(problem.patch(4))
            for workers in (READY, *arguments.workers):
                times.setdefault(workers, []).append(problem.time(workers, arguments.steps))
        for workers in arguments.workers:
            pairs = list(zip(times[workers], times[READY], strict=True))
            found.append(
                {
                    "setting": name,
                    "workers": workers,
                    "patch_ms": 1000 * statistics.median(patches),
                    "wait_ms": 1000 * statistics.median(wait for (wait, _), _ in pairs),
                    "step_ms": 1000 * statistics.median(wait + step for (wait, step), _ in pairs),
                    "share": statistics.median(wait / (wait + step) for (wait, step), _ in pairs),
                    "against_ready": statistics.median(sum(a) / sum(b) for a, b in pairs),
                }
            )
    return found


def table(rows: Sequence[dict[str, Any]]) -> Table:
    result = Table("setting", "workers", "a patch, ms", "wait, ms", "step, ms", "share", "/ ready")
    for row in rows:
        result.add_row(
            row["setting"],
            str(row["workers"]),
            f"{row['patch_ms']:.2f}",
            f"{row['wait_ms']:.1f}",
            f"{row['step_ms']:.0f}",
            f"{row['share']:.1%}",
            f"{row['against_ready']:.2f}",
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=25, help="steps per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/loader.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    Console().print(table(rows))
    result = {**facts(arguments, ["torch", "monai"]), "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
