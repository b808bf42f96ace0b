"""Train the classifier whose features `ebbflow evaluate` compares, and write its folder.

    python scripts/train_classifier.py fashion_mnist.npz

The .npz holds uint8 `train_images`, `train_labels`, `test_images` and `test_labels`. The last
10,000 training images are left out of training and become the reference; the test images serve to
state the accuracy and the figures of held-out real images, nothing else. About eight minutes on one
core.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ebbflow import data
from ebbflow.files import write_text
from ebbflow.metrics import classifier
from ebbflow.metrics.features import extract
from ebbflow.metrics.frechet import Moments
from ebbflow.metrics.report import Reference, compare

REFERENCE = 10_000
VECTORS = 4_000
COUNTS = (200, 500, 1_000, 2_000, 5_000, 10_000)

CARD = """---
license: apache-2.0
library_name: ebbflow
pipeline_tag: image-classification
---
# Fashion-MNIST classifier

A small convolutional network ({parameters:,} parameters, half precision) for grey 32x32 images in
[-1, 1], trained by this project. Its last hidden layer ({features} numbers) is the feature network
of `ebbflow evaluate`.

- Test accuracy: **{accuracy:.2%}** of the 10,000 test images.
- Trained on {trained:,} of the 60,000 training images, zero-padded from 28x28 to 32x32, mirrored
  and shifted at random, {epochs} epochs, seed {seed}, one thread:

      python scripts/train_classifier.py fashion_mnist.npz

- Data: Fashion-MNIST, copyright 2017 Zalando SE, MIT licence (Han Xiao, Kashif Rasul, Roland
  Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms"), in
  a split of our own into 60,000 training and 10,000 test images. The weights are under the licence
  of this project.

`reference.safetensors` holds the features of the {reference:,} training images that the classifier
has not seen: the moments of all, and the vectors of {vectors:,}. Against it, held-out real images
(the first of the test images) get what a perfect generator would get:

| n | Fréchet | kernel ± s.e. | sliced | energy | C2ST | precision | recall | density | coverage |
|---|---|---|---|---|---|---|---|---|---|
{rows}

The figures are on this network's features: compare them with each other, never with those of other
networks, and only at equal counts.
"""
ROW = (
    "| {f.count:,} | {f.frechet:.3f} | {f.kernel:.4f} ± {f.kernel_standard_error:.4f} "
    "| {f.sliced_wasserstein:.3f} | {f.energy:.4f} | {f.two_sample_accuracy:.3f} "
    "| {f.precision:.3f} | {f.recall:.3f} | {f.density:.3f} | {f.coverage:.3f} |"
)


@dataclass(frozen=True)
class Options:
    data: Annotated[Path, tyro.conf.Positional]
    """The .npz file."""
    out: Path = classifier.FOLDER
    """The folder to write."""
    epochs: int = 7
    seed: int = 0
    threads: int = 1
    """CPU threads; another number rounds differently and gives other weights."""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    train, test = (
        data.read(
            options.data,
            size=32,
            fit="pad",
            images_key=f"{part}_images",
            labels_key=f"{part}_labels",
        )
        for part in ("train", "test")
    )
    train, unseen = train.split(REFERENCE)
    assert unseen is not None and train.labels is not None and test.labels is not None
    network = classifier.train(
        train.pixels, train.labels, epochs=options.epochs, seed=options.seed, progress=True
    )
    classifier.save(network, options.out)
    # All figures are of the files as stored.
    network = classifier.load(options.out)
    accuracy = classifier.accuracy(network, test.pixels, test.labels, progress=True)
    features = extract(network.features, unseen.pixels, progress=True)
    description = f"{REFERENCE:,} Fashion-MNIST training images"
    path = options.out / "reference.safetensors"
    Reference(description, Moments.of(features), features[:VECTORS]).save(path)
    reference = Reference.load(path)
    real = extract(network.features, test.pixels, progress=True)
    held_out = {count: compare(real[:count], reference) for count in COUNTS}
    replace(reference, held_out=held_out).save(path)
    card = CARD.format(
        parameters=sum(p.numel() for p in network.parameters()),
        features=features.shape[1],
        accuracy=accuracy,
        trained=len(train),
        epochs=options.epochs,
        seed=options.seed,
        reference=REFERENCE,
        vectors=VECTORS,
        rows="\n".join(ROW.format(f=figures) for figures in held_out.values()),
    )
    write_text(options.out / "README.md", card)
    logging.info("test accuracy %.4f, written to %s", accuracy, options.out)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(tyro.cli(Options))
