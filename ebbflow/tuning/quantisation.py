"""Post-training quantisation: 8-bit networks, calibrated over the times of denoising."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebbflow import folders, networks, noise, schedules
from ebbflow.denoiser import Denoiser, Frozen, Wrapper
from ebbflow.files import as_list, read_json
from ebbflow.plan import Plan
from ebbflow.sampling import sample
from ebbflow.schedules import TimeLike
from ebbflow.statistics import Statistics
from ebbflow.storage import FACTS
from ebbflow.tuning.quantised_layers import (
    PARTS,
    Observer,
    QuantisedAttention,
    QuantisedLayer,
    Quantiser,
    attentions,
    check_bits,
    quantisable,
    replace,
)

FORMAT = "ebbflow-quantised"
_OWN = ("bits", "activation_bits", "layers", "attention")


@dataclass(frozen=True)
class CalibrationSet:
    """States x (N, *shape) at times t (N,), and the conditions under which they arose."""

    x: Tensor
    t: Tensor
    condition: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.t.shape != self.x.shape[:1] or len(self.x) < 1:
            raise ValueError(
                f"{tuple(self.x.shape)} states at {tuple(self.t.shape)} times: give (N, *shape) "
                "and (N,), N >= 1"
            )


class _Recorder(Wrapper):
    """Keeps, of each sample, the state at the call that was chosen for it."""

    def __init__(self, inner: Denoiser, chosen: Tensor) -> None:
        super().__init__(inner)
        self.chosen, self.call = chosen, 0
        self.x: Tensor | None = None
        self.t = torch.zeros(len(chosen), dtype=torch.float64)

    def at(self, t: TimeLike, x: Tensor, target: str = "x0") -> Frozen:
        frozen = self.net.at(t, x, target)  # pyright: ignore

        def record(x: Tensor, **condition: Any) -> Tensor:
            rows = self.chosen == self.call
            self.x = torch.empty_like(x) if self.x is None else self.x
            self.x[rows], self.t[rows] = x[rows], float(t)
            self.call += 1
            return frozen(x, **condition)

        return record


def denoising_states(
    denoiser: Denoiser,
    plan: Plan,
    count: int = 256,
    mean: float = 0.4,
    deviation: float = 0.4,
    *,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    **condition: Any,
) -> CalibrationSet:
    """Calibration states from denoising runs, each at a time of its own.

    One run of the plan with `count` samples; sample i is kept as the network sees it at the call
    `p_i` of the way from the data end (0) to noise (1), `p_i ~ N(mean, deviation²)` cut to [0, 1].
    Post-training Quantization on Diffusion Models (NDTC); its mean lies below 1/2, towards the
    data. Pass the denoiser as it will be used, guidance included. `shape` is that of
    one sample, unless the denoiser states it. Raises ValueError for a deviation that is negative.
    """
    shape = shape or denoiser.shape
    if shape is None or not deviation >= 0 or count < 1:
        raise ValueError(
            f"shape {shape}, deviation {deviation}, count {count}: need a shape of one sample, a "
            "deviation of at least 0 and a count of at least 1"
        )
    z = noise.normal(seed, range(count), 0, (1,), torch.float64, stream=5)[:, 0]
    place = (mean + deviation * z).clamp(0, 1)
    recorder = _Recorder(denoiser, ((1 - place) * (plan.nfe - 1)).round().long())
    sample(recorder, (count, *shape), plan=plan, seed=seed, **condition)
    assert recorder.x is not None
    return CalibrationSet(recorder.x, recorder.t, condition)


class Quantised(Denoiser):
    """A denoiser whose network has integer weights and rounds its layers' inputs.

    Made by `quantise` or `load`. It approximates the same law, so it keeps the statistics. Rounding
    has no slope: derivatives through it mean nothing.

    Args:
        net: a network whose layers have been replaced.
        like: the denoiser that it stands for.
        bits, activation_bits: of weights and of layers' inputs.
        layers, attention: names of what was replaced.
    """

    def __init__(
        self,
        net: nn.Module,
        like: Denoiser,
        bits: int,
        activation_bits: int,
        layers: list[str],
        attention: list[str],
    ) -> None:
        facts = (like.schedule, like.prediction, like.shape, like.statistics)
        super().__init__(net, *facts, like.time, like.sigma_data)
        self.bits, self.activation_bits = bits, activation_bits
        self.layers, self.attention = layers, attention

    @property
    def memory_ratio(self) -> float:
        """Bytes of the network, scales included, over those with float32 weights."""
        assert isinstance(self.net, nn.Module)
        now = before = 0
        for name, value in self.net.state_dict().items():
            owner, _, leaf = name.rpartition(".")
            now += value.numel() * value.element_size()
            added = isinstance(self.net.get_submodule(owner), Quantiser) or (
                owner in self.layers and leaf == "scale"
            )
            before += 0 if added else value.numel() * 4
        return now / before

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, the weights as integers; `load` reads them.

        Each file appears whole or not at all.
        """
        values: dict[str, Any] = {
            **{name: getattr(self, name) for name in (*FACTS, *_OWN) if name != "details"},
            "format": FORMAT,
            "version": 1,
            "schedule": self.schedule.config(),
            "shape": None if self.shape is None else list(self.shape),
            "details": {},
        }
        known = {} if self.statistics is None else self.statistics.tensors()
        tensors = {f"statistics.{name}": value.float() for name, value in known.items()}
        folders.write(self.net, folder, values, tensors)

    @staticmethod
    def load(folder: str | Path, net: nn.Module | None = None, integer: bool = False) -> Quantised:
        """Read what `save` wrote.

        net: an empty float network of the saved one's kind, for kinds that the library does not
        know; its layers are replaced. Raises ValueError where names or shapes differ from the
        saved network's, or for any other content.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: Quantised.save writes it")
        config = read_json(path)
        if config.get("format") != FORMAT:
            raise ValueError(f"{path}: format {config.get('format')!r}, expected {FORMAT!r}")
        named = config.get("network")
        if net is None:
            kind = networks.known().get(named.get("name", "")) if isinstance(named, dict) else None
            if kind is None or not isinstance(named, dict) or named.get("config") is None:
                raise ValueError(f"{path}: the network {named!r:.60} is unknown: pass net=")
            net = kind(**named["config"])
        bits, activation_bits = (check_bits(config.get(name)) for name in _OWN[:2])  # pyright: ignore
        layers, attention = (as_list(config.get(name), name) for name in _OWN[2:])
        places = {"layers": dict(quantisable(net)), "attention": attentions(net)}
        for what, names in (("layers", layers), ("attention", attention)):
            unknown = [name for name in names if name not in places[what]]
            if unknown:
                raise ValueError(
                    f"{path}: {what} {unknown[:3]} are not in this {type(net).__name__}: it is "
                    "another network than the quantised one"
                )
        for name in attention:
            parts: dict[str, nn.Module] = {part: Quantiser(activation_bits) for part in PARTS}
            replace(net, name, QuantisedAttention(net.get_submodule(name), parts))  # pyright: ignore
        for name in layers:
            layer, rounding = net.get_submodule(name), Quantiser(activation_bits)
            replace(net, name, QuantisedLayer(layer, rounding, bits, None, integer))
        keys = ("format", "version", "network", *FACTS, *_OWN)
        module, config, tensors = folders.read(folder, FORMAT, keys, net)
        known = {k.removeprefix("statistics."): v for k, v in tensors.items()}
        like = Denoiser(
            module,
            schedules.from_config(config["schedule"]),
            config["prediction"],
            config["shape"],
            Statistics.from_tensors(known) if known else None,
            config["time"],
            config["sigma_data"],
        )
        return Quantised(module, like, bits, activation_bits, layers, attention)


@torch.no_grad()
def quantise(
    denoiser: Denoiser,
    calibration: CalibrationSet,
    bits: int = 8,
    activation_bits: int | None = None,
    *,
    power: float | None = 2.0,
    skip: Collection[str] | None = None,
    attention: bool = True,
    integer: bool = False,
    batch: int = 64,
) -> Quantised:
    """Round a trained network to integers without training, from states that it meets.

    `x̂ = (clamp(round(x / D) + z, 0, 2^b - 1) - z) D`: weights have a D for each output channel
    (symmetric, z = 0, stored as int8), layers' inputs one D and z each, from their range over the
    calibration set. Linear and convolution layers, and the products of the library's own attention.
    Post-training Quantization on Diffusion Models.

    Args:
        denoiser: with a network; quantise what is inside guidance, not the guidance.
        calibration: such as `denoising_states(denoiser, plan)`.
        bits: of weights, 2 to 16; activation_bits: of inputs, the same unless given.
        power: p of the least `mean |x - x̂|^p` over 100 shrunken ranges, 2 for the mean square;
            None for the whole range.
        skip: names of layers to leave alone; the first and last on the way of x unless given.
        attention: whether attention's products are rounded too.
        integer: multiply integers in linear layers instead of rounded numbers: the same result to
            rounding. Slower by 20 to 35 times on CPUs without 8-bit units: meant for checking, and
            for devices that have them.
        batch: states of one call.
    Raises ValueError for a function, a wrapper, an unknown name in skip, or bits out of range.
    """
    if isinstance(denoiser, Wrapper) or not isinstance(denoiser.net, nn.Module):
        raise ValueError(
            f"{type(denoiser).__name__} holds {type(denoiser.net).__name__}: quantise the denoiser "
            "of the network itself and wrap the result"
        )
    activation_bits = check_bits(bits if activation_bits is None else activation_bits)
    check_bits(bits)
    net = deepcopy(denoiser.net).eval()
    found = dict(quantisable(net))
    twin = Denoiser(
        net, denoiser.schedule, denoiser.prediction, denoiser.shape, None, denoiser.time,
        denoiser.sigma_data,
    )  # fmt: skip
    skip = ends(twin, calibration, found) if skip is None else skip
    unknown = sorted(set(skip) - set(found))
    if unknown:
        raise ValueError(f"skip names {unknown[:3]}, which are no layers; known: {list(found)[:8]}")
    layers = [name for name in found if name not in skip]
    attending = attentions(net) if attention else []
    for name in attending:
        parts: dict[str, nn.Module] = {part: Observer() for part in PARTS}
        replace(net, name, QuantisedAttention(net.get_submodule(name), parts))  # pyright: ignore
    observers = {name: Observer() for name in layers}
    hooks = [
        found[name].register_forward_pre_hook(lambda _, inputs, o=observer: (o(inputs[0]),))
        for name, observer in observers.items()
    ]
    for rows in torch.arange(len(calibration.x)).split(batch):
        _call(twin, calibration, rows)
    for hook in hooks:
        hook.remove()
    for name in attending:
        module = net.get_submodule(name)
        for part in PARTS:
            seen: Any = getattr(module, part)
            setattr(module, part, seen.quantiser(activation_bits, power))
    for name, observer in observers.items():
        rounding = observer.quantiser(activation_bits, power)
        replace(net, name, QuantisedLayer(found[name], rounding, bits, power, integer))
    return Quantised(net, denoiser, bits, activation_bits, layers, attending)


def _call(denoiser: Denoiser, calibration: CalibrationSet, rows: Tensor, move: float = 0.0) -> None:
    count = len(calibration.x)
    condition = {
        name: value[rows] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
        for name, value in calibration.condition.items()
    }
    like = next(denoiser.parameters())
    x = calibration.x[rows].to(like.device, torch.promote_types(like.dtype, torch.float32))
    denoiser(x + move * torch.ones_like(x), calibration.t[rows], **condition)


def ends(
    denoiser: Denoiser, calibration: CalibrationSet, layers: Mapping[str, nn.Module]
) -> tuple[str, ...]:
    """The first and the last layer whose input depends on the state, and not on time alone."""
    rows = torch.arange(min(2, len(calibration.x)))
    runs: list[dict[str, Tensor]] = []
    for move in (0.0, 1.0):
        seen: dict[str, Tensor] = {}

        def watch(name: str, seen: dict[str, Tensor] = seen) -> Callable[..., None]:
            return lambda module, inputs: seen.__setitem__(name, inputs[0].detach().clone())

        hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
        _call(denoiser, calibration, rows, move)
        for hook in hooks:
            hook.remove()
        runs.append(seen)
    moved = [name for name, x in runs[0].items() if not torch.equal(x, runs[1][name])]
    return (moved[0], moved[-1]) if moved else ()
