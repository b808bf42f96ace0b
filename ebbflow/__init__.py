"""Three nouns and one verb: Schedule, Denoiser, Solver; sample.

Every public name is imported when it is first used, so that `import ebbflow` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebbflow import schedules as schedules
    from ebbflow.denoiser import Denoiser as Denoiser

__version__ = "0.1.0"

# Public name -> the module that defines it; a module is its own home.
_HOMES = {
    "Denoiser": "denoiser",
    "schedules": "schedules",
}

__all__ = ["Denoiser", "__version__", "schedules"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ebbflow' has no attribute {name!r}; it has {sorted(_HOMES)}")
    module = import_module(f"ebbflow.{home}")
    value = module if name == home else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
