"""Bi-level meta-learning for multi-modal medical image segmentation with missing modalities.

The names of the API are listed in ``__init__.pyi``. Each is imported when it is first used, so that
``import prism_meta`` and the help of the command line do not wait for torch.

Example:
    >>> import prism_meta as pm
    >>> pm.SecondOrder(pm.SGD(lr=0.1)).name, "SecondOrder" in dir(pm)
    ('second_order', True)
"""

from importlib.metadata import PackageNotFoundError, version
from pkgutil import iter_modules

from lazy_loader import attach_stub

__getattr__, __dir__, _names = attach_stub(__name__, __file__)
# Subpackages can be reached as attributes, too, but ``import *`` leaves them out.
__all__ = sorted(set(_names) - {module.name for module in iter_modules(__path__)})

try:
    __version__ = version("prism-meta")
except PackageNotFoundError:  # a source folder that was not installed
    __version__ = "0+unknown"
