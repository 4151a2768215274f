"""The section ``model`` of a configuration: the network and its size."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from prism_meta.errors import ConfigError, raise_faults
from prism_meta.training.config.types import Section, Size

#: The package's own networks.
NETWORKS = ("prism", "unet", "conditioned_unet")
_NAMED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class ModelConfig(Section):
    """The network and its size."""

    #: PRISM's network; MONAI's U-Net with residual units and InstanceNorm, wrapped by ``wrap``; the same
    #: with a scale and a shift of its features from the mask (conditioned_unet); another network of MONAI,
    #: e.g. ``monai:SegResNet``; or one of your own, ``package.module:function``.
    network: str = "prism"
    #: Keyword arguments of a network that is named by module. MONAI's also get ``spatial_dims``,
    #: ``in_channels`` and ``out_channels``, and your own ``num_modalities``, ``num_classes`` and
    #: ``spatial_dims``.
    arguments: dict[str, JsonValue] = Field(default={})
    #: How PRISM's network weights the shown modalities; others have no fusion.
    fusion: Literal["region_aware", "mean", "attention"] = "region_aware"
    #: Channels at full resolution; they double at each of the ``depth`` scales. Networks that are named by
    #: module have arguments instead.
    width: Size = 8
    depth: Annotated[int, Field(strict=True, ge=2, le=12)] = 4

    @property
    def is_named(self) -> bool:
        """Whether the network is named by its module, so that ``arguments`` and not ``width`` apply."""
        return ":" in self.network

    @field_validator("network")
    @classmethod
    def _known(cls, name: str) -> str:
        if name in NETWORKS or _NAMED.fullmatch(name):
            return name
        nearest = difflib.get_close_matches(name, NETWORKS, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(
            f"got {name!r}, expected {', '.join(NETWORKS)}, a network of MONAI such as monai:SegResNet, or "
            f"one of your own as package.module:function{hint or '; give one'}"
        )

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        faults = []
        if self.network != "prism" and self.fusion != _default("fusion"):
            kind = self.network if self.is_named else "a U-Net"
            faults.append(
                f"fusion: {self.fusion} needs network = prism, because {kind} has no fusion; leave it out"
            )
        if self.is_named:
            faults += [
                f"{key}: {self.network} has no such size; leave it out, and use arguments"
                for key in ("width", "depth")
                if getattr(self, key) != _default(key)
            ]
        elif self.arguments:
            faults.append(
                f"arguments: network {self.network} has width, depth and fusion instead; leave them out"
            )
        raise_faults(ConfigError, faults)
        return self


def _default(key: str) -> Any:
    return ModelConfig.model_fields[key].default
