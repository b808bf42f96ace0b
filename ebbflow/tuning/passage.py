"""A form run call by call in its own coordinates, and again from where other parameters differ."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ebbflow.centred import centre, restore
from ebbflow.denoiser import Denoiser
from ebbflow.tuning.references import References
from ebbflow.tuning.residual_form import Parameters, ResidualForm


@dataclass(frozen=True)
class Passage:
    """What the calls of one run found.

    residuals: rho_k (B, *axes) of the calls; sample: (B, *shape), the last state.
    """

    residuals: tuple[Tensor, ...]
    sample: Tensor


class Frame:
    """Some noise in the coordinates of a form.

    start: w(X_0) (B, *axes).
    """

    def __init__(self, form: ResidualForm, denoiser: Denoiser, part: References) -> None:
        self.form, self.part = form, part
        self.denoiser, x, self.mean = denoiser, part.start, None
        if form.centred:
            self.denoiser, (x,), self.mean = centre(denoiser, (x,), form.start, part.condition)
        self.shape = x.shape
        self._scales: dict[float, tuple[float, Tensor]] = {}
        self.start = self.inside(x, form.start)

    def scale(self, t: float) -> tuple[float, Tensor]:
        """alpha and S at time t."""
        if t not in self._scales:
            alpha, sigma = self.form.schedule.alpha(t).item(), self.form.schedule.sigma(t).item()
            self._scales[t] = alpha, (alpha**2 * self.form.axes.variance + sigma**2).sqrt()
        return self._scales[t]

    def inside(self, x: Tensor, t: float) -> Tensor:
        """w (B, *axes) of states about the mean at time t."""
        alpha, S = self.scale(t)
        z = self.form.axes.basis.forward(x)
        return (z - alpha * self.form.axes.mean.to(z)) / S.to(z)

    def outside(self, w: Tensor, t: float) -> Tensor:
        """The states (B, *shape) about the mean that are w at time t."""
        alpha, S = self.scale(t)
        z = alpha * self.form.axes.mean.to(w) + S.to(w) * w
        return self.form.axes.basis.inverse(z, self.shape)

    def residual(self, w: Tensor, t: float) -> Tensor:
        """rho (B, *axes) of a call at time t."""
        alpha, S = self.scale(t)
        axes = self.form.axes
        answer = axes.basis.forward(self.denoiser(self.outside(w, t), t, **self.part.condition))
        return answer - axes.mean.to(w) - (alpha * axes.variance / S).to(w) * w

    def state(self, k: int, gains: Tensor, rows: Tensor, residuals: list[Tensor]) -> Tensor:
        """w_k from what the calls before it found."""
        w = gains[k].to(self.start) * self.start + self.form.shift[k].to(self.start)
        for j in range(k):
            w = w + rows[k, j].to(w) * residuals[j]
        return w

    def sample(self, w: Tensor) -> Tensor:
        """The last state (B, *shape)."""
        end = self.form.end
        return restore(self.outside(w, end), self.mean, self.form.schedule, end)

    def run(self, parameters: Parameters, known: Passage | None = None, first: int = 0) -> Passage:
        """All calls; those before `first` are as in `known`."""
        form = self.form
        times = form.times(parameters).tolist()
        gains, rows = form.gains(parameters), form.coefficients(parameters)
        residuals = [] if known is None else list(known.residuals[:first])
        for k in range(len(residuals), form.nfe):
            residuals.append(self.residual(self.state(k, gains, rows, residuals), times[k]))
        last = self.state(form.nfe, gains, rows, residuals)
        return Passage(tuple(residuals), self.sample(last))
