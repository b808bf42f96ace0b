"""A small image classifier, whose last hidden layer is the feature network of the metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ebbflow.files import replacing, write_text
from ebbflow.metrics.features import extract, track

FOLDER = Path(__file__).parents[1] / "models" / "fashion-mnist-classifier"
FORMAT = "ebbflow-classifier"


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Classifier(nn.Module):
    """Two 3x3 convolutions a resolution, halved at each; images (B, C, H, W) in [-1, 1] -> logits.

    `features` gives the spatial mean of the last layer, (B, channels[-1]). `shape` is (C, H, W).
    """

    def __init__(
        self,
        shape: Sequence[int] = (1, 32, 32),
        channels: Sequence[int] = (32, 64, 128),
        classes: int = 10,
    ):
        super().__init__()
        self.shape = tuple(shape)
        self.config = {"shape": list(shape), "channels": list(channels), "classes": classes}
        layers: list[nn.Module] = []
        for before, after in zip((shape[0], *channels[:-1]), channels, strict=True):
            layers += [_convolution(before, after, 2), _convolution(after, after, 1)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1], classes)

    def features(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.shape:
            raise ValueError(
                f"images of shape {tuple(images.shape[1:])} for a classifier of {self.shape}"
            )
        return self.body(images).mean((-2, -1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def train(
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int = 7,
    batch: int = 128,
    learning_rate: float = 5e-3,
    seed: int = 0,
    progress: bool = False,
) -> Classifier:
    """Train on uint8 images (n, C, H, W) that have a dark border of two pixels, with labels (n,).

    AdamW on a one-cycle schedule; images are mirrored and shifted by up to two pixels at random.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(images.shape[1:], classes=int(labels.max()) + 1)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.05)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
    for index in track(order.split(batch)[:steps], "training the classifier", progress):
        down, right = (torch.randint(0, 5, (2,), generator=generator) - 2).tolist()
        x = torch.roll(images[index].float() / 127.5 - 1, (down, right), (-2, -1))
        half = len(x) // 2  # the order is random, so half of the batch is a random half
        x = torch.cat([x[:half].flip(-1), x[half:]]).contiguous(memory_format=torch.channels_last)
        loss = nn.functional.cross_entropy(network(x), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def accuracy(network: Classifier, images: Tensor, labels: Tensor, progress: bool = False) -> float:
    """Share of uint8 images (n, C, H, W) whose most likely class is the label."""
    return float((extract(network, images, progress=progress).argmax(1) == labels).double().mean())


def save(network: Classifier, folder: Path) -> None:
    """Write config.json and model.safetensors (half precision) to `folder`."""
    from safetensors.torch import save_file

    weights = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    with replacing(folder / "model.safetensors") as path:
        save_file(weights, path)
    write_text(
        folder / "config.json", json.dumps({"format": FORMAT, **network.config}, indent=1) + "\n"
    )


def load(folder: Path = FOLDER) -> Classifier:
    """The classifier saved in `folder`, by default the bundled one, in float32, for use.

    Raises ValueError for files that are damaged or say something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.pop("format", None) != FORMAT:
        raise ValueError(f"{folder} holds no classifier: its config.json has no format {FORMAT!r}")
    try:
        network = Classifier(**config)
        network.load_state_dict(load_file(folder / "model.safetensors"))
    except (TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no complete classifier: {error}") from error
    return network.float().eval()
