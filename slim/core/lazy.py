"""Modules that are imported when they are first used.

A method's settings and its mathematics stand in one file, and a wrong setting must be reported
within a second; torch alone takes two to import. So files that Hydra instantiates from write::

    if TYPE_CHECKING:
        import torch
    else:
        torch = LazyModule("torch")
"""

from __future__ import annotations

import importlib
from collections.abc import Callable


class LazyModule:
    """Stands in for the module ``name`` and imports it at the first attribute that is asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        # inspection (copy, pickle, doctest) must not trigger the import
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        value = getattr(importlib.import_module(self._name), attribute)
        # inner loops ask often
        if isinstance(value, Callable | type) and not self._name.startswith("slim."):
            self.__dict__[attribute] = value
        return value
