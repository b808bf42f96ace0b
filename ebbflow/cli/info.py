"""Show versions, devices, models and solvers, or one model's facts.

Examples:
  ebbflow info                  what is installed, the models in the package, the solvers
  ebbflow info fashion-mnist    one model: size, schedule, how it was trained
  ebbflow info models/mine      a model that you trained
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from ebbflow.cli._shared import print_json, print_table


@dataclass(frozen=True)
class Options:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """A model in the package, a folder with config.json, or `oracle`."""
    json: bool = False
    """Print one JSON object instead of tables."""


def run(options: Options) -> None:
    if options.model is not None:
        facts = model_facts(options.model)
        if options.json:
            print_json(facts)
        else:
            print_table(("fact", "value"), [(k, _text(v)) for k, v in facts.items()])
        return
    system, models, solvers = _system(), _models(), solver_facts()
    if options.json:
        print_json({**system, "models": models, "solvers": solvers})
        return
    print_table(("system", ""), system.items())
    if models:
        print_table(tuple(models[0]), [[_text(v) for v in m.values()] for m in models], "Models")
    print_table(tuple(solvers[0]), [[_text(v) for v in s.values()] for s in solvers], "Solvers")


def model_facts(name: str) -> dict[str, Any]:
    """What is known of one model, as JSON values."""
    import torch

    from ebbflow.cli import _models

    denoiser = _models.open_model(name, torch.device("cpu"))
    config = _models.config_of(name)
    facts = {
        "model": name,
        "network": config["network"]["name"] if config else "closed form",
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "shape": list(denoiser.shape) if denoiser.shape else None,
        "classes": _models.classes_of(denoiser),
        "schedule": repr(denoiser.schedule),
        "prediction": denoiser.prediction,
        "time": denoiser.time,
        "statistics": denoiser.statistics is not None,
    }
    return facts | dict(config.get("details", {}))


def solver_facts() -> list[dict[str, Any]]:
    """Every solver's declared facts, as JSON values."""
    from ebbflow import solvers

    facts = []
    for name in solvers.list():
        solver = solvers.get(name)
        facts.append(
            {
                "name": name,
                "order": solver.order,
                "nominal order": solver.nominal_order,
                "stochastic": solver.stochastic,
                "adaptive": solver.adaptive,
                "needs": sorted(solver.needs),
                "reference": solver.reference,
            }
        )
    return facts


def _system() -> dict[str, str]:
    import torch

    import ebbflow

    device = "cpu"
    if torch.cuda.is_available():
        device = ", ".join(
            f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())
        )
    elif torch.backends.mps.is_available():
        device = "mps"
    return {
        "ebbflow": ebbflow.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": device,
        "threads": str(torch.get_num_threads()),
    }


def _models() -> list[dict[str, Any]]:
    from ebbflow.storage import bundled

    wanted = ("model", "parameters", "shape", "classes", "schedule", "prediction")
    return [{key: facts[key] for key in wanted} for facts in map(model_facts, bundled())]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return "-" if value is None else str(value)
