"""From a study and its results to what the report shows."""

from __future__ import annotations

from collections import Counter
from typing import Any

from prism_meta.report.study.scores import ScoredRun
from prism_meta.report.study.table import Comparisons, Row
from prism_meta.training.study.jobs import Plan, Stage
from prism_meta.training.study.results import Results
from prism_meta.training.study.schema import Study

#: What is equal between the methods that are compared in a stage.
BUDGETS: dict[Stage, str] = {"evaluations": "equal gradients", "time": "equal time"}


def scored_runs(study: Study, results: Results) -> list[ScoredRun]:
    """All runs that are compared and made."""
    plan, found = Plan(study, results), []
    for job in plan.compared():
        if job.key not in results:
            continue
        result = results[job.key]
        found.append(
            ScoredRun(
                job.method,
                job.condition,
                BUDGETS[job.stage],
                job.seed,
                result.scores,
                steps=result.steps,
                evaluations=job.evaluations,
                seconds=result.seconds,
                memory=result.memory,
                curves=result.curves,
            )
        )
    return found


def search_rows(study: Study, results: Results) -> list[dict[str, str]]:
    """A row for each point of the searches, with its score and whether it was chosen."""
    plan, rows = Plan(study, results), []
    for condition in study.conditions:
        for method in study.methods:
            chosen = plan.chosen(method, condition)
            for point in study.grid(method):
                score = plan.score(method, condition, point)
                rows.append(
                    {
                        "condition": condition.name,
                        "method": method.name,
                        "values": ", ".join(f"{key} = {value}" for key, value in point.items()),
                        "validation Dice, %": "–" if score is None else f"{100 * score:.1f}",
                        "chosen": "yes" if point == chosen else "",
                    }
                )
    return rows


def study_facts(study: Study, results: Results, *, command: str) -> dict[str, str]:
    """How the numbers were made."""
    machines = Counter(
        ", ".join(f"{name} {value}" for name, value in result.machine.items())
        for result in results.values()
    )
    hours = sum(result.seconds for result in results.values()) / 3600
    plan = Plan(study, results)
    known = plan.jobs()
    return {
        "command": command,
        "runs": f"{sum(job.key in results for job in known)} of {len(known)} that are known by now",
        "hours of training": f"{hours:.1f}, of the processor on a CPU",
        "machine": "; ".join(f"{text} ({count} runs)" for text, count in machines.items()),
        "gradients per run": str(study.evaluations),
        "seeds": f"0 to {study.seeds - 1}",
        "test": f"{study.folds} folds of the cases, drawn for each seed"
        if study.phantoms is None
        else f"{study.phantoms.test} phantoms, the same for all seeds",
    }


def table_facts(table: Comparisons) -> dict[str, Any]:
    """A table of methods as JSON values; Dice is in [0, 1], memory in bytes."""
    return {
        "condition": table.condition,
        "budget": table.budget,
        "methods": [_row_facts(row) for row in table.rows],
    }


def _row_facts(row: Row) -> dict[str, Any]:
    facts = {
        "method": row.method,
        "seeds": len(row.scores.seeds),
        "steps": row.steps,
        "gradients": row.evaluations,
        "relative_time": row.time,
        "memory": row.memory,
        "mean": row.averages.mean.to_dict(),
        "worst": row.averages.worst.to_dict(),
        "against_reference": None,
    }
    if row.against is not None:
        facts["against_reference"] = {
            "seeds": row.against.seeds,
            "mean": row.against.averages.mean.to_dict(),
            "worst": row.against.averages.worst.to_dict(),
            "effect_size": row.against.effect_size,
            "p_holm": row.against.corrected,
            "seeds_needed": row.needed,
        }
    return facts
