"""What a plan says: the configuration, the reasons, and the memory that is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from prism_meta.training.config import Config
from prism_meta.training.devices import device_kind
from prism_meta.training.profiling.memory import StepMemory

#: What an allocator loses to fragments, as a share of a step's memory. glibc on a CPU lost 0.1 to 0.5 in ten
#: steps (``benchmarks/planning.py``), and more in long trainings on small patches. Torch's own allocator on
#: a GPU was not measured.
FRAGMENTS = {"cpu": 0.5, "cuda": 0.1}
#: Bytes beside the steps: Python, the libraries and a process that loads data; CUDA's context on a GPU.
OUTSIDE = {"cpu": 650 * 2**20, "cuda": 500 * 2**20}


class Choice(NamedTuple):
    """A key of the configuration that was chosen, and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Plan:
    """A configuration that fits the data and the memory. See ``plan``.

    Args:
        config: the configuration.
        choices: what was chosen, and why.
        step: the memory of an outer step.
        masks: (B, M) bool, the masks of the train batches and of the meta batch that need it.
        preparation: what preparing the largest case needs, in bytes; that is over before the first step.
    """

    config: Config
    choices: tuple[Choice, ...]
    step: StepMemory
    masks: tuple[Tensor, ...]
    preparation: int

    @property
    def parts(self) -> dict[str, int]:
        """What needs memory during the steps -> bytes."""
        kind = device_kind(self.config.fabric.accelerator)
        return {
            "weights and optimizer": self.step.model,
            "the batches of an episode": self.step.batches,
            "activations, graphs and copies of a step": self.step.graphs,
            f"fragments, {FRAGMENTS[kind]:.0%} of these": int(FRAGMENTS[kind] * self.step.total),
            "outside of steps": OUTSIDE[kind],
        }

    @property
    def total(self) -> int:
        """Predicted peak in bytes, of the steps or of the preparation."""
        return max(sum(self.parts.values()), self.preparation)

    def to_toml(self) -> str:
        """The configuration as a TOML file, with the reasons."""
        reasons = [f"# {key} = {value}: {reason}\n" for key, value, reason in self.choices]
        return "".join(["# Planned by prism-meta plan.\n", *reasons, "\n", self.config.to_toml()])
