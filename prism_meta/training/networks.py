"""Networks by the names that a configuration gives them: the package's, MONAI's, and a user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prism_meta.errors import ConfigError
from prism_meta.networks.conditioned import ConditionedNet, ConditionedUNet, unet
from prism_meta.networks.fusion import AttentionFusion, Fusion, MeanFusion, RegionAwareFusion
from prism_meta.networks.prediction import SegmentationModel
from prism_meta.networks.prism import PrismNet
from prism_meta.networks.wrapped import wrap
from prism_meta.training.config import Config

#: Names for MONAI's networks start with it: ``monai:SegResNet``.
_MONAI = "monai"


def build_model(config: Config) -> nn.Module:
    """The network that ``model.network`` names, with fresh weights.

    Raises:
        ConfigError: there is none of this name, it cannot be imported, or it refuses its arguments.

    Example:
        >>> from prism_meta.training.config import load_config
        >>> config = load_config(overrides=[
        ...     "model.network=monai:SegResNet", "model.arguments={init_filters = 8}"
        ... ])
        >>> type(build_model(config).net).__name__
        'SegResNet'
    """
    known: Mapping[str, Callable[[Config], nn.Module]] = {
        "prism": _prism,
        "unet": _unet,
        "conditioned_unet": _conditioned_unet,
    }
    name = config.model.network
    if name in known:
        return known[name](config)
    net = _named(config)
    if not isinstance(net, nn.Module):
        raise ConfigError(
            f"model.network: {name} returned {type(net).__name__}, expected a torch.nn.Module; correct it"
        )
    return net if isinstance(net, SegmentationModel) else wrap(net, config.data.modalities)


def _prism(config: Config) -> nn.Module:
    model, data = config.model, config.data
    fusions: Mapping[str, type[Fusion]] = {
        "region_aware": RegionAwareFusion,
        "mean": MeanFusion,
        "attention": AttentionFusion,
    }
    return PrismNet(
        num_modalities=len(data.modalities),
        num_classes=len(data.labels) + 1,
        spatial_dims=len(data.patch),
        width=model.width,
        depth=model.depth,
        fusion=fusions[model.fusion],
    )


def _unet(config: Config) -> nn.Module:
    data, model = config.data, config.model
    channels = [model.width * 2**scale for scale in range(model.depth)]
    net = unet(len(data.modalities), len(data.labels) + 1, len(data.patch), channels)
    return wrap(_laid_out(net, config), data.modalities)


def _conditioned_unet(config: Config) -> nn.Module:
    data, model = config.data, config.model
    net = ConditionedUNet(
        num_modalities=len(data.modalities),
        num_classes=len(data.labels) + 1,
        spatial_dims=len(data.patch),
        width=model.width,
        depth=model.depth,
    )
    return ConditionedNet(_laid_out(net, config), data.modalities)


def _laid_out(net: nn.Module, config: Config) -> nn.Module:
    if len(config.data.patch) == 3:
        # torch's CPU conv3d takes a slow path for small batches in the default memory layout.
        net = net.to(memory_format=torch.channels_last_3d)
    return net


def _named(config: Config) -> Any:
    """What the function or class of ``package:name`` returns."""
    source, _, name = config.model.network.partition(":")
    modalities, classes = len(config.data.modalities), len(config.data.labels) + 1
    dims = len(config.data.patch)
    if source == _MONAI:
        function = _attribute("monai.networks.nets", name, config.model.network)
        given = {"spatial_dims": dims, "in_channels": modalities, "out_channels": classes}
        takes = inspect.signature(function).parameters
        given = {key: value for key, value in given.items() if key in takes}
    else:
        function = _attribute(source, name, config.model.network)
        given = {"num_modalities": modalities, "num_classes": classes, "spatial_dims": dims}
    try:
        # Lists of a configuration are tuples here, as most signatures have them.
        return function(**{**given, **_with_tuples(config.model.arguments)})
    except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
        message = (str(error).splitlines() or [type(error).__name__])[0]
        # TypeErrors name the constructor, which says less than the class.
        message = re.sub(r"^\w+\.__init__\(\)|^__init__\(\)", f"{name}()", message)
        raise ConfigError(
            f"model.arguments: {message}; {config.model.network} is called with "
            f"{', '.join(f'{key}={value}' for key, value in given.items())} and the keys of "
            "model.arguments; correct them"
        ) from error


def _attribute(module: str, name: str, network: str) -> Callable[..., Any]:
    try:
        with _here_importable():
            imported = importlib.import_module(module)
    except Exception as error:  # a module of a user's own may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model.network: {network} cannot be imported ({reason}); give an installed module or one in "
            "the current folder, e.g. package.module:function, or a network of MONAI, e.g. "
            "monai:SegResNet"
        ) from error
    found = getattr(imported, name, None)
    if not callable(found):
        names = {each.lower(): each for each, value in vars(imported).items() if callable(value)}
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.0)
        hint = f"; did you mean {names[near[0]]}?" if near else "; correct the name"
        raise ConfigError(
            f"model.network: {module} has no function or class {name!r}, expected one that returns a "
            f"network{hint}"
        )
    return found  # type: ignore[no-any-return]


@contextmanager
def _here_importable() -> Iterator[None]:
    """Modules in the current folder can be imported, as with ``python -m``; installed ones come first."""
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")


def _with_tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_with_tuples, value))
    if isinstance(value, Mapping):
        return {key: _with_tuples(each) for key, each in value.items()}
    return value
