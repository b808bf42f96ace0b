"""diffusers both ways: `load` makes a `Denoiser` of a pipeline, `Scheduler` a scheduler of a plan.

```python
denoiser = ef.interop.diffusers.load(pipeline)  # or the folder that save_pretrained wrote
guided = ef.guidance.ClassifierFree(denoiser, 4.0, null=denoiser.null())
condition = denoiser.condition(["a cat", "a red dog"])
latents = ef.sample(guided, (2, *denoiser.shape), steps=10, **condition)
images = denoiser.decode(latents)  # in [-1, 1]

# What the pipeline itself computes from the same noise, with the solver that its scheduler is:
again = ef.sample(
    guided,
    noise.shape,
    solver="ddim",
    times=denoiser.nodes(10),
    x_init=denoiser.start(noise, 10),
    **condition,
)
```

Any pipeline samples with a plan of ours, to the result of `ef.sample`:

```python
plan = ef.tune(denoiser, 6)
pipeline.scheduler = ef.interop.diffusers.Scheduler(plan)
pipeline(num_inference_steps=plan.nfe)
```

`grid` lists which scheduler is which solver. Class-conditional models take labels,
`denoiser.condition([3, 7])`; models of pixels have no `decode`. Importing this package imports
nothing of diffusers; using it does: `pip install 'ebbflow[peers]'`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebbflow.interop.diffusers.grid import nodes as nodes
    from ebbflow.interop.diffusers.grid import start as start
    from ebbflow.interop.diffusers.pipelines import load as load
    from ebbflow.interop.diffusers.scheduler import Scheduler as Scheduler
    from ebbflow.interop.diffusers.schedules import Facts as Facts
    from ebbflow.interop.diffusers.schedules import options_of as options_of
    from ebbflow.interop.diffusers.schedules import schedule_of as schedule_of

# Public name -> the module of this package that defines it.
_HOMES = {
    "Facts": "schedules",
    "Scheduler": "scheduler",
    "load": "pipelines",
    "nodes": "grid",
    "options_of": "schedules",
    "schedule_of": "schedules",
    "start": "grid",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(
            f"module 'ebbflow.interop.diffusers' has no attribute {name!r}; it has {sorted(_HOMES)}"
        )
    value = getattr(import_module(f"ebbflow.interop.diffusers.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOMES)
