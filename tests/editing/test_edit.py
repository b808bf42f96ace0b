"""Edits: neutral settings change nothing, masks are kept, and a new condition is followed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import ebbflow as ef
from ebbflow import editing, images
from ebbflow.cli import main
from ebbflow.guidance import ClassifierFree
from ebbflow.metrics import classifier
from tests.inversion.test_exact import conditional, start
from tests.laws.cases import oracle

COSINE = ef.schedules.Cosine()
LABEL = torch.tensor([0, 1] * 8)


@pytest.fixture(scope="module")
def data():
    denoiser = conditional(COSINE)
    x0 = ef.sample(denoiser, (16, 2), x_init=start(16), steps=20, label=LABEL)
    return denoiser, x0


def edit(denoiser, x0, label, **rest):
    source, target = {"label": LABEL}, {"label": label}
    return editing.edit(denoiser, x0, source=source, target=target, steps=20, **rest)


def test_the_same_condition_returns_the_data(data):
    denoiser, x0 = data
    for method in ("bdia", "edict", "leapfrog"):
        found = edit(denoiser, x0, LABEL, method=method, solver=None)
        assert found.difference.abs().max() < 1e-12
    assert edit(denoiser, x0, 1 - LABEL, strength=0.0).difference.abs().max() == 0


def test_more_strength_moves_further_towards_the_other_class(data):
    denoiser, x0 = data
    moved = [
        edit(denoiser, x0, 1 - LABEL, strength=s).difference.norm().item() for s in (0.2, 0.5, 1.0)
    ]
    assert 0 < moved[0] < moved[1] < moved[2]
    means = torch.tensor([[1.0, -0.5], [-1.2, 0.8]], dtype=torch.float64)
    after = edit(denoiser, x0, 1 - LABEL).after
    distance = torch.cdist(after, means)
    assert (distance.argmin(1) == 1 - LABEL).float().mean() > 0.8


def test_what_the_mask_covers_is_kept_bit_for_bit(data):
    _, x0 = data
    mask = torch.tensor([[1.0, 0.0]])
    for schedule in (COSINE, ef.schedules.VE(), ef.schedules.Linear()):
        found = edit(conditional(schedule), x0, 1 - LABEL, mask=mask)
        assert torch.equal(found.after[:, 1], x0[:, 1])
        assert found.difference[:, 0].abs().max() > 0.5
        # Without the last word on it, the solver alone keeps it too, where no noise is left.
        kept = editing.Kept(conditional(schedule), x0, mask)
        assert found.inversion is not None
        times = found.inversion.times[::-1]
        x1 = found.inversion.x1
        rest = {"solver": "ddim", "times": times, "x_init": x1, "label": 1 - LABEL}
        end = ef.sample(kept, x0.shape, **rest)
        # VE ends with sigma_min / sigma_max of the latent.
        assert (end - x0)[:, 1].abs().max() < (1e-2 if schedule != COSINE else 1e-12)


def test_classes_are_those_of_bayes(data):
    denoiser, x0 = data
    law = oracle("mixture")
    parts = [
        ef.oracles.GaussianMixture(law.means[[k]], law.covariances[[k]], [1.0]) for k in (0, 1)
    ]
    found = editing.classify(denoiser, x0, classes(16), samples=40)
    log_odds = parts[1].log_prob(x0) - parts[0].log_prob(x0)
    clear = log_odds.abs() > 1
    assert clear.sum() > 8
    assert torch.equal(found.argmin(1)[clear], (log_odds > 0).long()[clear])
    torch.testing.assert_close(found.mean(1), torch.ones(16, dtype=torch.float64))
    alone = editing.classify(denoiser, x0[5:6], classes(1), samples=40, first_index=5)
    torch.testing.assert_close(alone, found[5:6])
    with pytest.raises(ValueError, match="1 candidates and 3 samples: give at least 2 and 1"):
        editing.classify(denoiser, x0, classes(16)[:1], samples=3)


def classes(count):
    return [{"label": torch.full((count,), k)} for k in (0, 1)]


def test_great_circles_keep_the_variance():
    one, two = start(512)[:256], start(512)[256:]
    one, two = one.reshape(1, -1), two.reshape(1, -1)
    a, b = editing.spherical(one, two, 0.5)
    middle = a * one + b * two
    assert middle.norm() == pytest.approx((one.norm() + two.norm()).item() / 2, rel=2e-3)
    line = (one + two) / 2
    assert line.norm() == pytest.approx(one.norm().item() / math.sqrt(2), rel=0.1)
    a, b = editing.spherical(one, 2 * one, 0.25)
    assert (a.item(), b.item()) == pytest.approx((0.75, 0.25))


def test_interpolation_ends_at_its_ends(data):
    denoiser, x0 = data
    found = editing.interpolate(
        denoiser, x0[:4], x0[4:8], (0.0, 0.5, 1.0), steps=20, label=LABEL[:4]
    )
    torch.testing.assert_close(found[0], x0[:4], rtol=0, atol=1e-10)
    torch.testing.assert_close(found[2], x0[4:8], rtol=0, atol=1e-10)
    assert (found[1] - x0[:4]).abs().max() > 0.1
    with pytest.raises(ValueError, match="shares must lie in"):
        editing.interpolate(denoiser, x0, x0, [1.5], label=LABEL)


def biased(x, t, text):
    """A linear conditional denoiser: the condition is the mean of a Gaussian of variance 0.5."""
    alpha, sigma = COSINE.alpha(t)[:, None], COSINE.sigma(t)[:, None]
    gain = 0.5 * alpha / (0.5 * alpha**2 + sigma**2)
    return text + gain * (x - alpha * text)


def test_null_text_follows_the_pivot():
    denoiser = ef.Denoiser(biased, COSINE, shape=(2,))
    text = torch.full((4, 2), 0.7, dtype=torch.float64)
    null = {"text": torch.zeros(4, 2, dtype=torch.float64)}
    x0 = text + 0.7 * start(4)

    def ends(iterations, **rest):
        found = editing.null_text(
            denoiser, x0, scale=5.0, null=null, steps=10, iterations=iterations, text=text, **rest
        )
        return (found.sample() - found.pivot).abs().max().item(), found

    plain = ClassifierFree(denoiser, 5.0, null)
    error, found = ends(200, rate=0.1, tolerance=1e-10)
    without = ef.sample(
        plain, x0.shape, solver="ddim", times=found.times, x_init=found.x1, text=text
    )
    assert error < 1e-4 < 1e-1 < (without - found.pivot).abs().max()
    assert ends(1)[0] > 10 * error
    # In closed form, from the guided prediction back to the null that makes the first step right.
    t, s = (torch.tensor([t], dtype=torch.float64) for t in found.times[:2])
    alpha, sigma = COSINE.alpha(t), COSINE.sigma(t)
    gain = 0.5 * alpha / (0.5 * alpha**2 + sigma**2)
    kept = COSINE.sigma(s) / sigma
    nodes = found.times[::-1]
    states = {nodes[0]: COSINE.alpha(nodes[0]) * x0}
    rest = {"solver": "ddim", "times": nodes, "x_init": states[nodes[0]], "text": text}
    states |= {point.time: point.state for point in ef.trajectory(denoiser, x0.shape, **rest)}
    landed = states[found.times[1]]
    wanted = (landed - kept * found.x1) / (COSINE.alpha(s) - alpha * kept)
    absent = (5 * biased(found.x1, t, text) - wanted) / 4
    expected = (absent - gain * found.x1) / (1 - gain * alpha)
    torch.testing.assert_close(found.nulls[0]["text"], expected, rtol=0, atol=1e-3)


def test_null_text_with_the_labels_of_the_model_in_the_package():
    model = ef.load("fashion-mnist").requires_grad_(False)
    x0 = ef.sample(model, (1, 1, 32, 32), steps=6, seed=2, label=torch.tensor([9])).double()
    rows = torch.eye(11)
    null, label = {"label": rows[[10]]}, rows[[9]]
    rest = {"steps": 6, "iterations": 8, "rate": 0.1, "label": label}
    found = editing.null_text(model, x0, scale=3.0, null=null, **rest)
    plain = ClassifierFree(model, 3.0, null)
    rest = {"solver": "ddim", "times": found.times, "x_init": found.x1, "label": label}
    without = (ef.sample(plain, x0.shape, **rest) - found.pivot).norm()
    assert (found.sample() - found.pivot).norm() < 0.5 * without


def test_refusals(data):
    denoiser, x0 = data
    with pytest.raises(ValueError, match=r"strength must lie in .*got 2"):
        edit(denoiser, x0, LABEL, strength=2)
    with pytest.raises(ValueError, match="the mask spans 0 to 3"):
        edit(denoiser, x0, LABEL, mask=torch.tensor([0.0, 3.0]))
    with pytest.raises(ValueError, match="a mask needs a solver"):
        edit(denoiser, x0, LABEL, mask=torch.tensor([0.0, 1.0]), solver=None)
    with pytest.raises(ValueError, match="scale is 1: guidance of scale 1 asks for no null"):
        editing.null_text(denoiser, x0, scale=1.0, null={"label": x0}, label=LABEL)
    with pytest.raises(ValueError, match="must be a floating-point tensor"):
        editing.null_text(denoiser, x0, scale=2.0, null={"label": LABEL}, label=LABEL)


def test_the_command_makes_a_boot_a_sneaker_below_the_mask(tmp_path, capsys):
    model = ef.load("fashion-mnist").requires_grad_(False)
    label = torch.tensor([9])
    boot = ef.sample(model, (1, 1, 32, 32), steps=8, seed=1, label=label)
    images.write_grid(boot, tmp_path / "boot.png", columns=1, scale=1)
    mask = torch.full((1, 1, 32, 32), -1.0)
    mask[..., 4:, :] = 1.0
    images.write_grid(mask, tmp_path / "mask.png", columns=1, scale=1)
    arguments = ["edit", str(tmp_path / "boot.png"), "--to", "Sneaker"]
    arguments += ["--mask", str(tmp_path / "mask.png"), "--steps", "8", "--device", "cpu"]
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert (report["source"], report["source_guessed"], report["to"]) == (9, True, 7)
    assert report["round_trip_error"] < 1e-10 and report["changed"] > 0.05
    names = ("after.png", "before.png", "difference.png", "report.json")
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    before, after = (np.array(Image.open(out / f"{n}.png")) for n in ("before", "after"))
    assert (before[:4] == after[:4]).all() and (before != after).any()
    network = classifier.load()
    answers = [
        network(torch.tensor(x)[None, None].float() / 127.5 - 1).argmax(1).item()
        for x in (before, after)
    ]
    assert answers == [9, 7]
    assert main([*arguments[:2], "--source", "9", "--to", "Hat"]) == 2
    assert "class 'Hat': give a number, or one of T-shirt/top" in capsys.readouterr().err
