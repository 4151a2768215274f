"""The initial weights of a training, from another run; modalities are matched by name.

Which weights belong to a modality is found by building the network for one modality more, without values:
what it has in addition are the weights of that modality, whatever the network is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tomlkit import item
from torch import Tensor, nn

from prism_meta.errors import ConfigError
from prism_meta.training.config import Config
from prism_meta.training.folder.weights import read_weights
from prism_meta.training.networks import build_model
from prism_meta.training.run import Run

#: Names of parameters in one message.
_SHOWN = 4


@dataclass(frozen=True)
class Initial:
    """What was taken from another run.

    Args:
        source: the run, and the kind of its weights.
        whole: number of tensors taken as they are.
        by_modality: number of tensors in which modalities were matched.
        taken: modalities that both have.
        new: modalities that only this training has; their weights are random.
        dropped: modalities that only the other run has.
    """

    source: str
    whole: int
    by_modality: int
    taken: tuple[str, ...]
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """A table, line by line.

        Example:
            >>> print("\\n".join(Initial("runs/a (last)", 40, 12, ("t1",), ("dwi",), ("t2",)).lines()))
            initial weights from runs/a (last)
              shared by all modalities  40 tensors, all taken
              of modalities             12 tensors, matched by name
                taken                   t1
                new, random             dwi
                left out                t2
        """
        rows = [("shared by all modalities", f"{self.whole} tensors, all taken")]
        if self.by_modality:
            rows.append(("of modalities", f"{self.by_modality} tensors, matched by name"))
            named = (("taken", self.taken), ("new, random", self.new), ("left out", self.dropped))
            rows += [(f"  {what}", ", ".join(names)) for what, names in named if names]
        return [f"initial weights from {self.source}", *(f"  {a:<24}  {b}" for a, b in rows)]


def settings_of(source: Run) -> list[str]:
    """Overrides with which a network has the size and the grid of that of another run."""
    keys = [f"model.{key}" for key in type(source.config.model).model_fields]
    keys += ["data.spacing", "data.patch", "data.batch_size"]
    values = source.config.model_dump(mode="json")
    pairs = [(key, key.split(".")) for key in keys]
    return [f"{key}={_inline(values[section][name])}" for key, (section, name) in pairs]


def _inline(value: Any) -> str:
    """A value as TOML in one line."""
    if isinstance(value, Mapping):
        parts = (f"{item(key).as_string()} = {_inline(each)}" for key, each in value.items())
        return f"{{{', '.join(parts)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_inline, value))}]"
    return str(item(value).as_string())


def load_initial(model: nn.Module, config: Config, source: Run) -> Initial:
    """Load the weights of another run into ``model``.

    All weights must be there, with the same shapes, except for those of modalities that only one of the two
    has. The weights are those that the other run predicts with (``Run.kinds``).

    Args:
        model: a fresh model of this training.
        config: of this training.
        source: a run whose training has ended.

    Raises:
        PrismError: the weights of the run cannot be used.
        ConfigError: they do not fit: another network, another size, or other classes.
    """
    path = source.existing_weights()
    own, theirs = config.data.modalities, source.config.data.modalities
    state, fresh = read_weights(path), model.state_dict()
    parts = {} if own == theirs else _parts_of_modalities(config)
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    faults: list[str] = []
    for name, value in fresh.items():
        part = parts.get(name)
        if part is None:
            found[name] = state.get(name, value)
            used.add(name)
            if name not in state or state[name].shape != value.shape:
                there = tuple(state[name].shape) if name in state else "none"
                faults.append(f"{name} is {tuple(value.shape)} here and {there} there")
        else:
            found[name] = part.taken(value, state, own, theirs, used)
    faults += [
        f"{name} is only there"
        for name in state
        if name not in used and not any(part.is_of(name) for part in parts.values())
    ]
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ConfigError(
            f"training.init: the weights of {source.folder} do not fit this network: "
            f"{', '.join(faults[:_SHOWN])}{more}; use the same [model], number of axes and classes as there"
        )
    model.load_state_dict(found)
    return Initial(
        f"{source.folder} ({path.stem})",
        whole=len(fresh) - len(parts),
        by_modality=len(parts),
        taken=tuple(m for m in own if m in theirs),
        new=tuple(m for m in own if m not in theirs),
        dropped=tuple(m for m in theirs if m not in own),
    )


@dataclass(frozen=True)
class _Indexed:
    """A tensor of one modality, whose name has the modality's number: ``encoders.2.weight``."""

    before: str
    modality: int
    after: str

    def taken(
        self,
        fresh: Tensor,
        state: Mapping[str, Tensor],
        own: Sequence[str],
        theirs: Sequence[str],
        used: set[str],
    ) -> Tensor:
        name = own[self.modality]
        if name not in theirs:
            return fresh
        source = f"{self.before}{theirs.index(name)}{self.after}"
        used.add(source)
        return _of_shape(state, source, fresh.shape)

    def is_of(self, name: str) -> bool:
        pattern = f"{re.escape(self.before)}[0-9]+{re.escape(self.after)}"
        return re.fullmatch(pattern, name) is not None


@dataclass(frozen=True)
class _Axis:
    """A tensor with an entry for each modality along one axis, e.g. the input channels of a convolution."""

    name: str
    axis: int

    def taken(
        self,
        fresh: Tensor,
        state: Mapping[str, Tensor],
        own: Sequence[str],
        theirs: Sequence[str],
        used: set[str],
    ) -> Tensor:
        used.add(self.name)
        shape = [*fresh.shape]
        shape[self.axis] = len(theirs)
        source = _of_shape(state, self.name, torch.Size(shape))
        pairs = [(k, theirs.index(m)) for k, m in enumerate(own) if m in theirs]
        if not pairs:
            return fresh
        here, there = (
            torch.tensor(column, device=fresh.device) for column in zip(*pairs, strict=True)
        )
        return fresh.index_copy(self.axis, here, source.to(fresh).index_select(self.axis, there))

    def is_of(self, name: str) -> bool:
        return name == self.name


def _of_shape(state: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in state or state[name].shape != shape:
        there = f"is {tuple(state[name].shape)}" if name in state else "is not there"
        raise ConfigError(
            f"training.init: {name} {there}, expected {tuple(shape)}; use a run with the same [model], "
            "number of axes and classes"
        )
    return state[name]


def _parts_of_modalities(config: Config) -> dict[str, _Indexed | _Axis]:
    """The tensors that belong to modalities, by name.

    Raises:
        ConfigError: a tensor depends on the number of modalities in another way.
    """
    modalities = config.data.modalities
    count = len(modalities)
    now, more = (_shapes(config, names) for names in (modalities, (*modalities, "one more")))
    parts: dict[str, _Indexed | _Axis] = {}
    for name in more.keys() - now.keys():
        for match in re.finditer(rf"(?<![0-9]){count}(?![0-9])", name):
            before, after = name[: match.start()], name[match.end() :]
            names = [f"{before}{k}{after}" for k in range(count)]
            if all(other in now for other in names):
                parts |= {other: _Indexed(before, k, after) for k, other in enumerate(names)}
    for name, shape in now.items():
        grown = more.get(name)
        if grown is None or grown == shape:
            continue
        axes = [k for k, (a, b) in enumerate(zip(shape, grown, strict=True)) if a != b]
        if len(axes) != 1 or (shape[axes[0]], grown[axes[0]]) != (count, count + 1):
            raise ConfigError(
                f"training.init: {name} of the network is {tuple(shape)} for {count} modalities and "
                f"{tuple(grown)} for {count + 1}, which cannot be matched by the names of modalities; start "
                "from a run with the same modalities in the same order"
            )
        parts[name] = _Axis(name, axes[0])
    return parts


def _shapes(config: Config, modalities: Sequence[str]) -> dict[str, torch.Size]:
    """The shapes of the weights of the network for some modalities."""
    data = config.data.model_copy(update={"modalities": tuple(modalities)})
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build_model(config.model_copy(update={"data": data}))
    return {name: value.shape for name, value in model.state_dict().items()}
