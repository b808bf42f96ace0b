"""The bundled classifier and reference are what the card says; a trained one learns."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from ebbflow import data
from ebbflow.metrics import classifier, extract, frechet_distance
from ebbflow.metrics.report import Figures, Reference, compare

TEST_IMAGES = Path(__file__).parents[1] / "data_files" / "fashion_mnist_test_200.npz"


@pytest.fixture(scope="module")
def images() -> data.Images:
    return data.read(TEST_IMAGES, size=32, fit="pad")


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.load(classifier.FOLDER / "reference.safetensors")


def card() -> str:
    return (classifier.FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_cards_accuracy_is_true_within_binomial_error(images: data.Images) -> None:
    assert images.labels is not None
    (stated,) = re.findall(r"Test accuracy: \*\*([\d.]+)%\*\*", card())
    p = float(stated) / 100
    assert p >= 0.92
    found = classifier.accuracy(classifier.load(), images.pixels, images.labels)
    assert abs(found - p) < 3 * (p * (1 - p) / len(images)) ** 0.5


def test_the_card_states_the_command_and_the_licence_of_the_data() -> None:
    assert "python scripts/train_classifier.py fashion_mnist.npz" in card()
    assert "Zalando" in card() and "MIT" in card()


def test_the_files_are_small() -> None:
    files = {path.name: path.stat().st_size for path in classifier.FOLDER.iterdir()}
    assert files["model.safetensors"] < 800_000
    assert files["reference.safetensors"] < 1_500_000


def test_held_out_images_get_the_yardstick(images: data.Images, reference: Reference) -> None:
    """The 200 images are the first of the test part, from which the card's first row comes."""
    features = extract(classifier.load().features, images.pixels)
    found, stated = compare(features, reference), reference.held_out[200]
    assert found.frechet == pytest.approx(stated.frechet, rel=1e-3)
    assert found.coverage == pytest.approx(stated.coverage, abs=2e-3)
    assert f"| 200 | {found.frechet:.3f} |" in card()


def test_the_reference_keeps_its_promises(reference: Reference) -> None:
    """The vectors are some of those behind the moments; the yardsticks fall with the count."""
    assert frechet_distance(reference.features, reference.moments) < 0.1
    frechet = [figures.frechet for figures in reference.held_out.values()]
    assert frechet == sorted(frechet, reverse=True)
    nearest = reference.yardstick(30)
    assert nearest is not None and nearest.count == 200
    nearest = reference.yardstick(1300)
    assert nearest is not None and nearest.count == 1000


def test_harm_is_seen(images: data.Images, reference: Reference) -> None:
    network = classifier.load()
    smaller = Reference(reference.description, reference.moments, reference.features[:800])

    def measure(pixels: torch.Tensor) -> Figures:
        return compare(extract(network.features, pixels.to(torch.uint8)), smaller)

    pixels = images.pixels.float()
    assert images.labels is not None
    real = measure(pixels)
    blurred = measure(torch.nn.functional.avg_pool2d(pixels, 3, 1, 1))
    noisy = measure((pixels + 20 * torch.randn(pixels.shape)).clamp(0, 255))
    one_class = measure(pixels[images.labels == 7].repeat(8, 1, 1, 1))
    for harmed in (blurred, noisy, one_class):
        assert harmed.kernel > real.kernel + 2 * harmed.kernel_standard_error
        assert harmed.frechet > 3 * real.frechet
        assert harmed.energy > 0.1 > abs(real.energy)
        assert harmed.coverage < 0.7 * real.coverage
        assert harmed.two_sample_p_value < 1e-4 < real.two_sample_p_value
    assert blurred.precision < 0.85 * real.precision and noisy.precision < 0.85 * real.precision
    assert one_class.recall < 0.3 * real.recall


def test_training_learns_and_depends_on_the_seed_alone() -> None:
    """With a bright square or without it."""
    labels = torch.arange(96) % 2
    pixels = torch.randint(0, 60, (96, 1, 16, 16), dtype=torch.uint8)
    pixels[labels == 0, :, 5:11, 5:11] = 220
    torch.manual_seed(1)
    network = classifier.train(pixels, labels, epochs=6, batch=8)
    assert classifier.accuracy(network, pixels, labels) > 0.95
    torch.manual_seed(2)
    again = classifier.train(pixels, labels, epochs=6, batch=8)
    assert all(map(torch.equal, network.state_dict().values(), again.state_dict().values()))


def test_round_trip_in_half_precision(tmp_path: Path) -> None:
    network = classifier.Classifier((3, 16, 16), (4, 8), classes=5).eval()
    classifier.save(network, tmp_path)
    loaded = classifier.load(tmp_path)
    assert loaded.config == network.config
    for name, value in network.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match=r"\(1, 16, 16\).*\(3, 16, 16\)"):
        loaded(torch.zeros(2, 1, 16, 16))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    classifier.save(classifier.Classifier((1, 8, 8), (4,)), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="no complete classifier"):
        classifier.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "chanels": 3}))
    with pytest.raises(ValueError, match="chanels"):
        classifier.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no classifier"):
        classifier.load(tmp_path)
    (tmp_path / "reference.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="no complete reference"):
        Reference.load(tmp_path / "reference.safetensors")


def test_references_of_few_images_are_refused(tmp_path: Path) -> None:
    features = torch.randn(40, 8)
    reference = Reference.of(features, "mine")
    reference.save(tmp_path / "reference.safetensors")
    loaded = Reference.load(tmp_path / "reference.safetensors")
    assert (loaded.description, loaded.yardstick(40)) == ("mine", None)
    assert frechet_distance(loaded.moments, reference.moments) < 1e-6
    with pytest.raises(ValueError, match="7 samples are fewer than the 8 features"):
        compare(features, Reference.of(features[:7], "too few"))
    with pytest.raises(ValueError, match="5 images are too few for any figure"):
        compare(features[:5], reference, allow_few=True)
    assert compare(features[:6], reference, allow_few=True).count == 6
