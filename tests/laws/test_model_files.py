"""Law 11 for models and statistics: they come back as they were; unknown or hostile content is
refused with a message; and a disk that fills up while writing loses nothing."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ebbflow as ef
from ebbflow import Plan
from ebbflow.networks import MLP
from tests.laws.test_files import BAD_JSON, JSON, changed, places

resource = pytest.importorskip("resource")


def model(**more: Any) -> ef.Denoiser:
    torch.manual_seed(2)
    net = MLP(3, width=16, blocks=1, classes=2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    facts: dict[str, Any] = {"prediction": "edm", "sigma_data": 0.5, "time": "angle"}
    return ef.Denoiser(net, ef.schedules.Cosine(), shape=(3,), **{**facts, **more})


FACTS: dict[str, dict[str, Any]] = {
    "edm": {},
    "noise": {"prediction": "noise", "sigma_data": None, "time": "log_snr"},
    "free shape": {"shape": None},
}


@pytest.mark.parametrize("facts", FACTS)
def test_models_come_back(facts: str, tmp_path: Path) -> None:
    right = model(**FACTS[facts]) if facts != "free shape" else model()
    right.shape = None if facts == "free shape" else right.shape
    data = torch.randn(50, 3, generator=torch.Generator().manual_seed(5))
    right.statistics = ef.Statistics.from_data(data, torch.arange(50) % 2)
    right.save(tmp_path)
    again = ef.load(tmp_path)
    for fact in ("schedule", "prediction", "time", "sigma_data", "shape"):
        assert getattr(again, fact) == getattr(right, fact), fact
    x, t = torch.randn(4, 3), torch.tensor(0.4)
    label = torch.tensor([0, 1, 2, 0])
    assert torch.equal(again(x, t, label=label), right(x, t, label=label))
    assert again.statistics is not None
    for kind in (None, 0, 1):
        one, two = (s.given(label=kind) for s in (again.statistics, right.statistics))
        assert one is not None and two is not None
        torch.testing.assert_close(one.mean, two.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one.covariance(), two.covariance(), rtol=1e-5, atol=1e-6)
    assert not again.net.training


@pytest.mark.parametrize("kind", ["exact", "low-rank", "cosine"])
def test_statistics_come_back(kind: str) -> None:
    data = torch.randn(40, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    right = ef.Statistics.from_data(data, torch.arange(40) % 3, kind=kind)
    again = ef.Statistics.from_tensors(right.tensors())
    for part in (None, 0, 1, 2):
        one, two = again.given(label=part), right.given(label=part)
        assert one is not None and two is not None
        assert torch.equal(one.mean, two.mean)
        torch.testing.assert_close(one.covariance(), two.covariance(), rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="lack 'variance'"):
        ef.Statistics.from_tensors({"mean": right.mean})


class Own(torch.nn.Module):
    """A network that the library does not know, with one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.second = torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_networks_of_ones_own_are_passed_back_in(tmp_path: Path) -> None:
    right = ef.Denoiser(Own(), ef.schedules.Linear(), "velocity", shape=(3,))
    right.save(tmp_path)
    with pytest.raises(ValueError, match=r"'Own' is not one of .*net="):
        ef.load(tmp_path)
    again = ef.load(tmp_path, net=Own())
    x = torch.randn(2, 3)
    assert torch.equal(again(x, 0.5), right(x, 0.5))
    with pytest.raises(ValueError, match="do not fit the network"):
        ef.load(tmp_path, net=MLP(3, width=16, blocks=1))
    with pytest.raises(ValueError, match=r"must be an nn\.Module"):
        ef.load(tmp_path, net=lambda x, t: x)


@pytest.mark.parametrize("content", BAD_JSON)
def test_bad_configurations_of_models_are_refused(content: str, tmp_path: Path) -> None:
    model().save(tmp_path)
    (tmp_path / "config.json").write_bytes(BAD_JSON[content])
    with pytest.raises(ValueError, match=r"config\.json"):
        ef.load(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model().save(path)
    return path


@given(data=st.data())
def test_a_model_with_any_value_changed_loads_or_is_refused(folder: Path, data: Any) -> None:
    path = folder / "config.json"
    right = json.loads(path.read_text())
    place = data.draw(st.sampled_from(places(right)[1:]))
    value = data.draw(JSON)
    path.write_text(json.dumps(changed(right, place, lambda p, key: p.__setitem__(key, value))))
    try:
        assert isinstance(ef.load(folder), ef.Denoiser)
    except ValueError as error:
        assert str(error)
    finally:
        path.write_text(json.dumps(right))


def test_unknown_keys_of_models_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    model().save(tmp_path)
    for key, message in (("predicton", "did you mean 'prediction'"), ("extra", "unknown key")):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: 1}))
        with pytest.raises(ValueError, match=message):
            ef.load(tmp_path)
    for key in set(config) - {"format", "version"}:
        rest = {k: v for k, v in config.items() if k != key}
        (tmp_path / "config.json").write_text(json.dumps(rest))
        with pytest.raises(ValueError, match=rf"missing \['{key}'\]"):
            ef.load(tmp_path)


def test_bad_weights_are_refused(tmp_path: Path) -> None:
    model().save(tmp_path)
    path = tmp_path / "model.safetensors"
    right = path.read_bytes()
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    for content in (b"", right[:5], right[: len(right) // 2], right[:-1], pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"safetensors.*pickled checkpoints are never read"):
            ef.load(tmp_path)
    torch.save(tensors, path)
    with pytest.raises(ValueError, match="never read"):
        ef.load(tmp_path)
    name = next(iter(tensors))
    for wrong in (
        {k: v for k, v in tensors.items() if k != name},
        {**tensors, "net.surplus": torch.zeros(1)},
        {**tensors, name: torch.zeros(7, 7)},
        {**tensors, "statistics.mean": torch.zeros(3)},
    ):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=r"fit|shape|lack"):
            ef.load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        ef.load(tmp_path)


def test_an_absent_model_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither a folder with config\.json nor one of"):
        ef.load(tmp_path / "nothing")


def test_a_hostile_network_takes_no_memory(folder: Path) -> None:
    path = folder / "config.json"
    right = json.loads(path.read_text())
    hostile = copy.deepcopy(right)
    hostile["network"]["config"]["width"] = 10**9
    path.write_text(json.dumps(hostile))
    with pytest.raises(ValueError, match="network"):
        ef.load(folder)
    path.write_text(json.dumps(right))


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file grows beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_files(tmp_path: Path) -> None:
    plan = ef.solvers.get("heun").plan(ef.schedules.VP(), 50)
    plan.save(tmp_path / "plan.json")
    model().save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    longer = ef.solvers.get("heun").plan(ef.schedules.VP(), 60)
    for write in (lambda: longer.save(tmp_path / "plan.json"), lambda: model().save(tmp_path)):
        with pytest.raises(OSError), full_disk(1000):
            write()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert Plan.load(tmp_path / "plan.json") == plan


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only networks"):
        ef.Denoiser(lambda x, t: x, ef.schedules.VP()).save(tmp_path)
    assert not list(tmp_path.iterdir())
