"""A plan as a diffusers scheduler: `pipeline.scheduler = Scheduler(plan)`.

A pipeline owns the loop. It reads `timesteps`, calls its network on the sample that it holds, and
hands the output to `step`, which returns the next sample to hold. Here that is the plan's next
query; registers, conversion and noise stay inside (`stepping.Run`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin  # pyright: ignore[reportMissingImports]
from diffusers.schedulers.scheduling_utils import (  # pyright: ignore[reportMissingImports]
    KarrasDiffusionSchedulers,
    SchedulerMixin,
)
from diffusers.utils.outputs import BaseOutput  # pyright: ignore[reportMissingImports]
from torch import Tensor

from ebbflow.files import read_tensors, write_tensors, write_text
from ebbflow.interop.diffusers.agreement import (
    Stored,
    facts_of,
    others,
    require_times,
    time_of,
    times,
    written,
)
from ebbflow.interop.diffusers.schedules import options_of
from ebbflow.interop.diffusers.stepping import (
    Answers,
    Run,
    draw_seed,
    first_query,
    is_state,
    prediction_of,
)
from ebbflow.plan import Plan
from ebbflow.schedules import VE, Betas, along

TENSORS = "plan.safetensors"


@dataclass
class SchedulerOutput(BaseOutput):
    """prev_sample: what the pipeline holds next, the plan's next query or its result.

    pred_original_sample: the prediction `E[x_0 | x_t]` of this call.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class Scheduler(SchedulerMixin, ConfigMixin):
    """A plan behind the protocol of diffusers' schedulers: the samples are those of `ef.sample`.

        pipeline.scheduler = Scheduler.from_config(pipeline.scheduler.config, plan=plan)
        image = pipeline(prompt, num_inference_steps=len(plan.times) - 1)

    The latents that the pipeline starts from are the plan's initial state (`x_init`), and what it
    holds between calls is the plan's next query, in the scale of `x_t`. Its network is called
    `plan.nfe` times; `num_inference_steps` is that number or the number of the plan's steps.

    Args:
        plan: on `Betas`, `Linear` (flow matching) or, with `like`, on `VE` (EDM).
        prediction_type: what the network predicts, in diffusers' words: "epsilon" (the default on
            betas), "v_prediction", "sample", "flow_prediction" (the default on a flow).
        like: the scheduler that the pipeline had, its configuration, the pipeline itself, or what
            `load` made of it. It says what the network predicts, what it is told as time and
            whether x_0 is clipped, and is refused where it describes another process than the
            plan's. `from_config(config, plan=plan)` is the same.
        seed: of the noise of stochastic plans; row i is sample i, as in `ef.sample(seed=seed)`,
            and the pipeline's generator only draws the first latents. None draws a seed for each
            run from that generator (`run_seed` says which), so that runs differ.
        scales_input: the pipeline hands what it gives the network to `scale_model_input` (Stable
            Diffusion and DiT do; DDPM, DDIM, Stable Diffusion 3 and Flux do not). It matters to
            plans whose first query is not the initial state, such as those of gaussian-residual:
            True maps the latents there, False makes it in any pipeline by one more network call
            at the start, whose answer is not used.

    It is saved with the pipeline. Before `from_pretrained` reads such a folder, this module has to
    be imported, for diffusers imports none that a file names; a pipeline that makes a scheduler of
    its own when it is built (DDIMPipeline) is given ours afterwards.

    A callback that changes the latents between two calls changes the plan's state where the next
    query is the state, and is refused elsewhere. As every scheduler of diffusers this one keeps
    the state of its run: one pipeline call at a time, in one thread. `set_timesteps` begins anew;
    a copy made in the middle of a run has to begin anew too.

    Raises ValueError, naming the field, for everything that does not fit together.
    """

    order = 1
    _compatibles = [  # noqa: RUF012 - diffusers reads it from the class
        *(kind.name for kind in KarrasDiffusionSchedulers),
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
    ]

    def __init__(
        self,
        plan: Plan,
        prediction_type: str | None = None,
        *,
        like: Any = None,
        seed: int | None = 0,
        scales_input: bool = False,
    ) -> None:
        self.facts = facts = facts_of(plan, like, prediction_type)
        self.plan, first = plan, plan.stages[0].query
        if scales_input and "Z" in first:
            raise ValueError(
                "scales_input is True, but the plan's first query draws noise, for a batch that "
                "guidance may have doubled by then: leave it False"
            )
        self._answers = Answers(facts, plan.schedule)
        self._maps = scales_input and not is_state(first)
        self._warm_up = not scales_input and not is_state(first)
        keys = others(like) or options_of(plan.schedule, facts.prediction, facts.sigma_data)
        self.register_to_config(
            **keys,
            plan=Stored(plan.to_config(), plan.tensors()),
            facts=written(facts),
            seed=seed,
            scales_input=scales_input,
        )
        grows = isinstance(plan.schedule, VE)
        self.init_noise_sigma = plan.schedule.sigma(plan.start).item() if grows else 1.0
        if isinstance(plan.schedule, Betas):
            self.betas = torch.tensor(plan.schedule.betas)
            self.alphas, self.final_alpha_cumprod = 1 - self.betas, torch.tensor(1.0)
            self.alphas_cumprod = (1 - self.betas.double()).cumprod(0).float()
        self.num_inference_steps: int | None = None
        self.run_seed: int | None = None
        self._begin_anew(torch.device("cpu"))

    def __len__(self) -> int:
        return int(self.config.get("num_train_timesteps", 1000))

    def __repr__(self) -> str:
        name, steps = self.plan.origin.get("solver", "a plan"), len(self.plan.times) - 1
        return f"Scheduler({name}, {steps} steps, {self.plan.nfe} calls, {self.facts.prediction})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_entry": 0, "_run": None, "_scaled": None}

    @property
    def step_index(self) -> int | None:
        """Network calls so far, None before the first."""
        return self._entry or None

    begin_index = 0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Begin anew. The plan fixes the times: whatever asks for others is refused.

        num_inference_steps: the plan's steps or its calls. sigmas: none, the plan's, or the
        `linspace(1, 1/n, n)` that flow pipelines send unasked. mu, the shift of a flow's times by
        the image's size, shifts nothing here.
        """
        steps, calls = len(self.plan.times) - 1, self.plan.nfe
        n = calls if num_inference_steps is None else num_inference_steps
        if timesteps is not None:
            require_times("timesteps", timesteps, self.timesteps)
        elif sigmas is not None:
            given = torch.as_tensor(sigmas).double().flatten()
            n = num_inference_steps or len(given)
            unasked = torch.linspace(1, 1 / len(given), len(given), dtype=torch.float64)
            if len(given) not in (steps, calls) or not torch.allclose(given, unasked, atol=1e-6):
                require_times("sigmas", given, self.sigmas[:-1])
        if n not in (steps, calls):
            calls_too = "" if calls == steps else f" of {calls} network calls"
            raise ValueError(
                f"num_inference_steps is {n}, but the plan has {steps} steps{calls_too}: pass "
                f"num_inference_steps={steps}, or make a plan of {n} steps"
            )
        self.num_inference_steps = n
        self._begin_anew(torch.device("cpu" if device is None else device))

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Refuse to start anywhere but at the plan's start."""
        if begin_index:
            raise ValueError(
                f"begin_index is {begin_index}: a plan cannot be entered in the middle; pass "
                "strength=1.0, or a plan that starts at the time of the image"
            )

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network is to see of the sample, which guidance may have repeated."""
        scaled = sample
        if self._maps and self._entry == 0:
            scaled = first_query(self.plan, sample).to(sample.dtype)
        if self.facts.sigma_data is not None:
            stage = max(self._entry - self._warm_up, 0)
            scale = self._answers.coefficients(self.plan.stages[stage].time)[2]
            scaled = scaled * scale.to(scaled)
        self._scaled = (sample, scaled)
        return scaled

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """From the network's output at one query to the next query, or to the plan's last state.

        model_output, sample: (B, *shape), the sample as the pipeline holds it; timestep: the next
        of `timesteps`; generator: read once a run, and only when `seed` is None.
        """
        if eta or use_clipped_model_output:
            raise ValueError(
                f"eta is {eta} and use_clipped_model_output {use_clipped_model_output}: a plan has "
                'its own noise; compile it into the plan, ef.solvers.get("ddim", eta=…)'
            )
        self._require_turn(timestep)
        call = f"model_output of call {self._entry + 1} of {len(self._expected)}"
        learned = str(self.config.get("variance_type")).startswith("learned")
        output = prediction_of(model_output, sample, learned, call)
        if self._scaled is not None and sample is self._scaled[1]:
            sample = self._scaled[0]  # some pipelines keep only what the network saw
        if self._run is None:
            run = self._run = self._start(sample, generator)
        else:
            run = self._run
            run.accept(sample)
        prediction = output if self._warm_up and self._entry == 0 else run.answer(output)
        self._entry, self._scaled = self._entry + 1, None
        previous = run.asked.to(sample.dtype, copy=True)  # the pipeline may write on its own
        if not return_dict:
            return previous, prediction.to(sample.dtype)
        return SchedulerOutput(prev_sample=previous, pred_original_sample=prediction)

    def _begin_anew(self, device: torch.device) -> None:
        told, sigmas = times(self.plan, self.facts)
        if self._warm_up:
            told = torch.cat([told[:1], told])
        self._expected = told.tolist()
        self.timesteps, self.sigmas = told.to(device), sigmas.to(device)
        self._entry, self._run, self._scaled = 0, None, None

    def _require_turn(self, timestep: Any) -> None:
        entry, expected = self._entry, self._expected
        if self.num_inference_steps is None or entry >= len(expected):
            done = f", all {len(expected)} calls are done" if entry else ""
            raise ValueError(f"call set_timesteps before step{done}")
        told, wanted = torch.as_tensor(timestep).flatten()[0].item(), expected[entry]
        if abs(told - wanted) > 1e-4 * max(1.0, abs(wanted)):
            raise ValueError(
                f"timestep is {told:g} at call {entry + 1} of {len(expected)}, expected {wanted:g}:"
                " a pipeline that starts in the middle (strength < 1) or "
                "skips timesteps cannot follow a plan; pass strength=1.0"
            )

    def _start(self, sample: Tensor, generator: Any) -> Run:
        if self._maps and self._scaled is None:
            raise ValueError(
                "scales_input is True, but the pipeline did not call scale_model_input, so its "
                "network did not see the plan's first query: pass scales_input=False"
            )
        seed = self.config["seed"]
        if seed is None:
            seed = draw_seed(generator) if self.plan.stochastic else 0
        self.run_seed = seed
        return Run(self.plan, self._answers, sample, seed)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha x0 + sigma noise` at the times that the network is told; (B, *shape).

        Before a run the first of `timesteps` means the plan's start, where the pipeline is then.
        """
        t = self._time(timesteps)
        return self.plan.schedule.add_noise(original_samples, t, noise)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, as flow pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of "v_prediction", `alpha noise - sigma x0`; (B, *shape)."""
        t, schedule = self._time(timesteps), self.plan.schedule
        alpha, sigma = (along(f(t), sample).to(sample) for f in (schedule.alpha, schedule.sigma))
        return alpha * noise - sigma * sample

    def _time(self, timesteps: Any) -> Tensor:
        told = torch.as_tensor(timesteps).double().cpu()
        told = told[0] if told.numel() == 1 and told.ndim else told
        t = time_of(self.plan.schedule, self.facts, told)
        if self.num_inference_steps is None or self._entry > 0:
            return t
        return torch.where(told == self.timesteps[0].double().cpu(), self.plan.start, t)

    @classmethod
    def from_config(
        cls,
        config: Any = None,
        return_unused_kwargs: bool = False,
        *,
        plan: Plan | None = None,
        **options: Any,
    ) -> Any:
        """From the configuration of the pipeline's scheduler and a plan, or from our own.

        options: prediction_type, seed and scales_input, as the class takes them.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"config is {config!r:.60}: pass pipeline.scheduler.config")
        stored: Any = config.get("plan")
        if plan is None:
            if stored is None:
                raise ValueError("config.plan is missing: Scheduler.from_config(config, plan=plan)")
            plan = Plan.from_config(stored, getattr(stored, "tensors", None))
        if stored is not None:
            kept = {name: config[name] for name in ("seed", "scales_input") if name in config}
            options = {**kept, **options}
        scheduler = cls(plan, like=config, **options)
        return (scheduler, {}) if return_unused_kwargs else scheduler

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """What `save_pretrained` wrote; kwargs are those of `load_config` and `from_config`."""
        found: Any = cls.load_config(
            pretrained_model_name_or_path, subfolder=subfolder, return_unused_kwargs=True, **kwargs
        )
        config, rest = found
        stored = config.get("plan")
        if isinstance(stored, Mapping) and "basis" in stored:
            folder = Path(pretrained_model_name_or_path)
            inside = folder / (subfolder or "")
            path = (inside if (inside / cls.config_name).is_file() else folder) / TENSORS
            config["plan"] = Stored(stored, read_tensors(path))
        return cls.from_config(config, return_unused_kwargs, **rest)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write `scheduler_config.json` and, beside it, the plan's tensors where it has any."""
        tensors = self.plan.tensors()
        if tensors:
            write_tensors(Path(save_directory) / TENSORS, tensors)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The configuration as diffusers writes it, but the plan's rows in their own order: sums in
        another one round differently."""
        values = {**json.loads(super().to_json_string()), "plan": self.config["plan"]}
        return json.dumps(values, indent=2) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        write_text(Path(json_file_path), self.to_json_string())
