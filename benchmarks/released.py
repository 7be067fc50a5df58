"""The released packages of others, imported so that they can run beside ours.

``make .venv/peers`` installs them without what they require: their samplers and wrappers need little of it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from typing import Any

__all__ = ["azula", "k_diffusion"]


def azula() -> Any:
    """azula, with its ``denoise``, ``noise`` and ``sample``."""
    for name in ("denoise", "noise", "sample"):
        importlib.import_module(f"azula.{name}")
    return sys.modules["azula"]


def k_diffusion() -> Any:
    """k-diffusion, with its ``external`` and ``sampling``.

    Importing the package imports its training code and all that this requires; these two modules need only a name of
    torchvision's to be there.
    """
    if "k_diffusion" not in sys.modules:
        found = importlib.util.find_spec("k_diffusion")
        if found is None or found.submodule_search_locations is None:
            raise ModuleNotFoundError("No module named 'k_diffusion'", name="k_diffusion")
        package = types.ModuleType("k_diffusion")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["k_diffusion"] = package
        with _without_torchvision():
            for name in ("external", "sampling"):
                setattr(package, name, importlib.import_module(f"k_diffusion.{name}"))
    return sys.modules["k_diffusion"]


@contextlib.contextmanager
def _without_torchvision() -> Any:
    """An empty torchvision for as long as it takes to import from it, where there is none."""
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.functional"]
    empty = [] if importlib.util.find_spec("torchvision") else names
    for name in empty:
        sys.modules[name] = types.ModuleType(name)
    if empty:
        sys.modules[names[1]].functional = sys.modules[names[2]]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in empty:
            del sys.modules[name]
