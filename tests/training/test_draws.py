from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ebbflow.data import Images
from ebbflow.schedules import Cosine
from ebbflow.training import Config
from ebbflow.training.draws import order, training_batch, validation_batch


def test_parts_of_a_batch_are_the_batch(images: Images, config: Config) -> None:
    config = replace(config, flip=True)
    whole = training_batch(images, config, Cosine(), 5, range(8))
    parts = [training_batch(images, config, Cosine(), 5, part) for part in (range(3), range(3, 8))]
    for name in ("x0", "t", "noise", "label"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(whole, name))


def test_every_epoch_sees_every_image_once_in_a_new_order() -> None:
    first, second = order(0, 10, 0, range(10)), order(0, 10, 10, range(10))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert not torch.equal(first, second)
    assert torch.equal(order(0, 10, 7, range(6)), torch.cat((first[7:], second[:3])))
    assert not torch.equal(order(1, 10, 0, range(10)), first)


def test_steps_and_seeds_differ(images: Images, config: Config) -> None:
    batches = [training_batch(images, config, Cosine(), step, range(8)) for step in (1, 2)]
    batches.append(training_batch(images, replace(config, seed=1), Cosine(), 1, range(8)))
    for name in ("x0", "t", "noise"):
        values = [getattr(batch, name) for batch in batches]
        assert not torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_labels_are_hidden_as_the_null_class_at_the_asked_rate(
    images: Images, config: Config, share: float
) -> None:
    config = replace(config, batch=4000, label_dropout=share)
    batch = training_batch(images, config, Cosine(), 1, range(4000))
    index = order(config.seed, len(images), 0, range(4000))
    assert batch.label is not None and images.labels is not None
    hidden = batch.label == images.classes
    assert abs(float(hidden.double().mean()) - share) <= 4 * (share * (1 - share) / 4000) ** 0.5
    assert torch.equal(batch.label[~hidden], images.labels[index][~hidden])


def test_half_of_the_images_are_mirrored(images: Images, config: Config) -> None:
    config = replace(config, batch=1000, flip=True)
    x0 = training_batch(images, config, Cosine(), 1, range(1000)).x0
    plain = images.floats(order(config.seed, len(images), 0, range(1000)))
    same = (x0 == plain).flatten(1).all(1)
    mirrored = (x0 == plain.flip(3)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 400 < int(mirrored.sum()) < 600


def test_times_are_stratified(images: Images, config: Config) -> None:
    t = training_batch(images, config, Cosine(), 3, range(8)).t
    level = torch.log(Cosine().sigma(t) / Cosine().alpha(t))
    normal = torch.distributions.Normal(config.noise_mean, config.noise_std)
    assert (normal.cdf(level) * 8).floor().tolist() == list(range(8))


def test_validation_is_the_same_every_time_and_in_any_parts(images: Images, config: Config) -> None:
    whole = validation_batch(images, config, Cosine(), range(24))
    part = validation_batch(images, config, Cosine(), range(5, 9))
    assert torch.equal(whole.noise[5:9], part.noise)
    assert torch.equal(whole.t[5:9], part.t)
    assert torch.equal(whole.x0, images.floats())
