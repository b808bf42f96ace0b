"""Other libraries' samplers, imported alone: each function returns a module or raises ImportError.

Their packages import image, metric and logging libraries that no sampler touches. Where those are
not installed, empty modules stand in for the moment of the import.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType


def diffusers() -> ModuleType:
    """The package; `pip install diffusers`."""
    return importlib.import_module("diffusers")


def k_diffusion() -> ModuleType:
    """`k_diffusion.sampling`; `pip install --no-deps k-diffusion`, then `pip install pillow
    safetensors scipy torchdiffeq torchsde tqdm`.

    The package's own `__init__` (which wants clip, clean-fid, scikit-image, wandb …) is not run,
    and `torchvision.transforms.functional`, of which `utils` converts pictures, may be missing.
    """
    if "k_diffusion.sampling" not in sys.modules:
        spec = importlib.util.find_spec("k_diffusion")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("No module named 'k_diffusion'")
        package = ModuleType("k_diffusion")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["k_diffusion"] = package
        stand_ins = _stand_ins("torchvision", "torchvision.transforms")
        try:
            importlib.import_module("k_diffusion.sampling")
        except ImportError:
            del sys.modules["k_diffusion"]
            raise
        finally:
            for name in stand_ins:
                del sys.modules[name]
    return sys.modules["k_diffusion.sampling"]


def azula() -> ModuleType:
    """The package with `noise`, `denoise` and `sample`; `pip install --no-deps azula`, then
    `pip install einops tqdm`."""
    for name in ("noise", "denoise", "sample"):
        importlib.import_module(f"azula.{name}")
    return sys.modules["azula"]


def _stand_ins(*names: str) -> list[str]:
    """Put empty modules where a package that is not installed would be; their names."""
    if importlib.util.find_spec(names[0]) is not None:
        return []
    for name in names:
        sys.modules[name] = ModuleType(name)
    sys.modules[names[-1]].functional = ModuleType("functional")  # pyright: ignore
    return list(names)
