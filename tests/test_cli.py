"""The command line: verbs, errors in one line, and samples that depend on their index only."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from ebbflow import images, solvers
from ebbflow.cli import _draw, _models, _outputs, main, papers, verbs
from ebbflow.cli.sample import Options, prepare
from ebbflow.denoiser import Denoiser
from ebbflow.guidance import ClassifierFree
from ebbflow.networks import MLP, UNet, count_parameters
from ebbflow.sampling import sample
from ebbflow.schedules import Cosine
from ebbflow.storage import load, save

SIZE = 8
CLASSES = 3
GUIDANCE = 1.5
STEPS = 3

Run = Callable[..., tuple[int, str, str]]


def randomised(net: torch.nn.Module) -> torch.nn.Module:
    """Weights that use every input (a fresh network's output is zero)."""
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small class-conditional image model of random weights."""
    torch.manual_seed(1)
    net = UNet(1, SIZE, width=8, multipliers=(1, 2), blocks=1, attention=(), classes=CLASSES)
    denoiser = Denoiser(
        randomised(net), Cosine(), "edm", (1, SIZE, SIZE), time="angle", sigma_data=0.5
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    sampling = {"solver": "dpm-solver++2m", "steps": STEPS, "guidance": GUIDANCE}
    save(denoiser, folder, details={"sampling": sampling, "training_command": "ebbflow train x"})
    return str(folder)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command in this process: (status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def expected(model: str, count: int, labels: list[int], seed: int = 0) -> torch.Tensor:
    """What the library itself draws with the model's own settings, in the command's batches."""
    denoiser = ClassifierFree(load(model), GUIDANCE, null={"label": CLASSES})
    return sample(
        denoiser,
        (count, 1, SIZE, SIZE),
        solver="dpm-solver++2m",
        steps=STEPS,
        seed=seed,
        batch=16,
        label=torch.tensor(labels),
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The dispatcher


def test_help_lists_every_verb(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert {"sample", "info", "papers"} <= set(verbs())
    for verb, summary in verbs().items():
        assert summary.endswith(".")
        assert re.search(rf"^  {verb} +{re.escape(summary)}$", out, re.MULTILINE)


@pytest.mark.parametrize("verb", verbs())
def test_the_examples_in_the_help_parse(verb: str, run: Run) -> None:
    module = import_module(f"ebbflow.cli.{verb}")
    lines = (line.strip() for line in module.__doc__.splitlines())
    examples = [re.split(r"\s{2,}", line)[0] for line in lines if line.startswith("ebbflow ")]
    assert examples
    for example in examples:
        name, *arguments = example.split()[1:]
        assert name == verb
        assert isinstance(tyro.cli(module.Options, args=arguments), module.Options)
    status, out, _ = run(verb, "--help")
    assert status == 0
    assert all(example in out for example in examples)


def test_version(run: Run) -> None:
    from ebbflow import __version__

    assert run("--version") == (0, f"ebbflow {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sampel"], ["'sampel'", "did you mean 'sample'?", "papers"]),
        (["sample", "--model", "nowhere"], ["'nowhere'"]),
        (["info", "nowhere"], ["'nowhere'"]),
        (["sample", "--model", "oracle", "--device", "quantum"], ["'quantum'", "auto, cpu"]),
        (["sample", "--model", "oracle", "--solver", "heum"], ["'heum'", "heun"]),
        (["sample", "--model", "oracle", "--steps", "0"], ["steps", "0"]),
        (["sample", "--model", "oracle", "--steps", "3", "--nfe", "4"], ["--steps 3", "--nfe 4"]),
        (["sample", "--model", "oracle", "--count", "0"], ["count", "0"]),
        (["sample", "--model", "oracle", "--batch", "0"], ["batch", "0"]),
        (["sample", "--model", "oracle", "--seed", "-1"], ["seed", "-1"]),
        (["sample", "--model", "oracle", "--classes", "0"], ["class 0", "no classes"]),
        (["sample", "--model", "oracle", "--guidance", "2"], ["guidance 2", "classes"]),
        (["sample", "--model", "oracle", "--out", "pictures"], ["NAME.npz"]),
        (["sample", "--model", "oracle", "--out", "a.jpg"], ["a.jpg", ".png"]),
        (["sample", "--model", "oracle", "--shard", "2/2"], ["2/2", "K/N"]),
        (["sample", "--model", "oracle", "--shard", "half"], ["'half'", "0/4"]),
        (["sample", "--model", "oracle", "--shard", "0/2"], ["--out FOLDER"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else None,
)
def test_an_error_is_one_clear_line(
    arguments: list[str],
    words: list[str],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_option_is_an_error(run: Run) -> None:
    status, out, err = run("sample", "--clases", "3")
    assert (status, out) == (2, "")
    assert "--classes" in err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(["info", "nowhere", "--debug"])


def test_an_interrupt_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(papers, "run", interrupted)
    assert run("papers") == (130, "", "interrupted\n")


def test_a_defect_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(options: object) -> None:
        raise AttributeError("a defect")

    monkeypatch.setattr(papers, "run", defective)
    with pytest.raises(AttributeError, match="a defect"):
        main(["papers"])


def test_a_reader_that_has_gone_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ebbflow", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


# `sample`: one grid


def test_without_options_a_grid_with_one_class_a_column(
    model: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run("sample", "--model", model)
    assert status == 0
    assert "72 samples" in out
    assert "sampling 15/15" in err
    labels = [i % CLASSES for i in range(72)]
    images.write_grid(expected(model, 72, labels), tmp_path / "expected.png", columns=9)
    assert contents(tmp_path)["samples.png"] == contents(tmp_path)["expected.png"]


def test_classes_count_and_seed(model: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a" / "grid.png"
    arguments = ["--classes", 2, 0, "--count", 5, "--seed", 7, "--out", path, "--json"]
    status, out, _ = run("sample", "--model", model, *arguments)
    report = json.loads(out)
    assert status == 0
    assert (report["drawn"], report["seed"], report["classes"]) == (5, 7, [2, 0])
    images.write_grid(expected(model, 5, [2, 0, 2, 0, 2], 7), tmp_path / "b.png", columns=5)
    assert path.read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("classes", range(40))
def test_a_grid_has_64_samples_and_whole_rows(classes: int) -> None:
    from ebbflow.cli.sample import grid_size

    columns, count = grid_size(classes)
    assert 64 <= count <= 128
    assert count % columns == 0
    if 0 < classes <= 16:
        assert columns % classes == 0


@pytest.mark.parametrize("option", ["--steps", "--nfe"])
def test_solver_and_cost(option: str, model: str, run: Run, tmp_path: Path) -> None:
    arguments = ["--solver", "heun", option, 5, "--guidance", 1, "--count", 1]
    _, out, _ = run("sample", "--model", model, *arguments, "--out", tmp_path / "a.png", "--json")
    report = json.loads(out)
    # Heun costs two calls a step and one in the last.
    assert (report["steps"], report["nfe"]) == ((5, 9) if option == "--steps" else (3, 5))
    assert report["solver"] == "heun"


def test_weights_that_are_not_numbers_are_reported(model: str, run: Run, tmp_path: Path) -> None:
    denoiser = load(model)
    with torch.no_grad():
        next(denoiser.net.parameters()).fill_(float("nan"))
    save(denoiser, tmp_path / "broken")
    status, _, err = run("sample", "--model", tmp_path / "broken", "--out", tmp_path / "a.png")
    assert status == 2
    assert "step 1 of" in err
    assert "100.0%" in err
    assert not (tmp_path / "a.png").exists()


# `sample`: a folder of single pictures


def test_a_folder_has_numbered_pictures_and_labels(model: str, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    status, out, _ = run("sample", "--model", model, "--count", 21, "--out", folder)
    assert status == 0
    assert "21 samples drawn" in out
    labels = [i % CLASSES for i in range(21)]
    for index, pixels in enumerate(images.to_uint8(expected(model, 21, labels)).numpy()):
        with Image.open(folder / f"{index:06d}.png") as picture:
            assert (np.array(picture) == pixels[:, :, 0]).all()
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"{index:06d}.png" for index in range(21)]
    assert [int(row["label"]) for row in rows] == labels
    assert len(contents(folder)) == 21 + 2


def test_an_interrupted_run_resumes_to_the_same_files(
    model: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["sample", "--model", model, "--count", 40]
    run(*command, "--out", tmp_path / "whole")
    write = images.write_png
    written = []

    def interrupted(pixels: np.ndarray, path: Path) -> None:
        if len(written) == 20:
            raise KeyboardInterrupt
        written.append(path)
        write(pixels, path)

    monkeypatch.setattr(images, "write_png", interrupted)
    assert run(*command, "--out", tmp_path / "parts")[0] == 130
    assert len(list((tmp_path / "parts").glob("*.png"))) == 20
    monkeypatch.setattr(images, "write_png", write)
    _, out, _ = run(*command, "--out", tmp_path / "parts", "--json")
    # 16 of the 20 make a whole chunk; the others are drawn again, to the same bytes.
    assert (json.loads(out)["drawn"], json.loads(out)["skipped"]) == (24, 16)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_parts_make_the_whole(
    model: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["sample", "--model", model, "--count", 40, "--out"]
    run(*command, tmp_path / "whole")
    assert "16 samples drawn" in run(*command, tmp_path / "parts", "--shard", "1/2")[1]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "24 samples drawn" in run(*command, tmp_path / "parts")[1]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_more_samples_continue_a_folder(model: str, run: Run, tmp_path: Path) -> None:
    command = ["sample", "--model", model, "--out"]
    for count in (16, 20, 3):
        assert run(*command, tmp_path / "grown", "--count", count)[0] == 0
    run(*command, tmp_path / "whole", "--count", 20)
    assert contents(tmp_path / "grown") == contents(tmp_path / "whole")


def test_another_recipe_is_refused(model: str, run: Run, tmp_path: Path) -> None:
    command = ["sample", "--model", model, "--count", 4, "--out", tmp_path / "a"]
    run(*command)
    before = contents(tmp_path / "a")
    status, _, err = run(*command, "--seed", 1)
    assert status == 2
    assert "seed 0, not 1" in err
    denoiser = load(model)
    with torch.no_grad():
        next(denoiser.net.parameters()).mul_(1.001)
    config = json.loads((Path(model) / "config.json").read_text())
    other = tmp_path / "other" / "tiny"
    save(denoiser, other, details=config["details"])
    status, _, err = run("sample", "--model", other, "--count", 4, "--out", tmp_path / "a")
    assert status == 2
    assert contents(tmp_path / "a") == before


def test_a_folder_of_other_pictures_is_left_alone(model: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "000000.png").write_bytes(b"mine")
    status, _, err = run("sample", "--model", model, "--count", 4, "--out", tmp_path)
    assert status == 2
    assert "other pictures" in err
    assert contents(tmp_path) == {"000000.png": b"mine"}


def test_weights_tell_models_apart(model: str) -> None:
    def digest() -> str:
        return _outputs.fingerprint(recipe)

    recipe, _ = prepare(Options(model=model, device="cpu"))
    before = digest()
    with torch.no_grad():
        next(recipe.denoiser.parameters()).view(-1)[0].mul_(1.0001)
    assert digest() != before


# `sample`: arrays, points, memory


def test_arrays_hold_pictures_and_labels(model: str, run: Run, tmp_path: Path) -> None:
    run("sample", "--model", model, "--count", 20, "--out", tmp_path / "a.npz")
    labels = [i % CLASSES for i in range(20)]
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["labels"].tolist() == labels
        pixels = images.to_uint8(expected(model, 20, labels)).numpy()
        assert (arrays["images"] == pixels).all()


def test_the_oracle_gives_its_own_law(run: Run, tmp_path: Path) -> None:
    count = 4096
    status, _, _ = run("sample", "--model", "oracle", "--out", tmp_path / "points.npz")
    assert status == 0
    points = np.load(tmp_path / "points.npz")["samples"].astype(np.float64)
    assert points.shape == (count, 2)
    # The mean of Gaussians on a circle, the k-th (from 1) of weight k / 36, at angle (k-1) pi / 4.
    weights = np.arange(1, 9) / 36
    angles = np.arange(8) * np.pi / 4
    radial = np.stack([np.cos(angles), np.sin(angles)], 1)
    along = np.stack([-np.sin(angles), np.cos(angles)], 1)
    mean = 0.8 * weights @ radial
    second = np.einsum("k,ki,kj->ij", weights * (0.64 + 0.002), radial, radial)
    second += np.einsum("k,ki,kj->ij", weights * 0.02, along, along)
    covariance = second - np.outer(mean, mean)
    # Five standard errors; the 20 steps' own bias is below one.
    error = 5 * np.sqrt(np.diag(covariance) / count)
    assert (np.abs(points.mean(0) - mean) < error).all()
    products = (points - mean)[:, :, None] * (points - mean)[:, None, :]
    assert (np.abs(products.mean(0) - covariance) < 5 * products.std(0) / np.sqrt(count)).all()


def test_the_oracle_draws_a_density(run: Run, tmp_path: Path) -> None:
    assert run("sample", "--model", "oracle", "--count", 500, "--out", tmp_path / "a.png")[0] == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (512, 512)
        shades = np.array(picture)
    # The law lives on a ring: nothing in the middle, something at its right end.
    assert (shades[192:320, 192:320] == 255).all()
    assert (shades[:, 448:] < 255).any()


def test_vectors_that_are_no_points_of_the_plane_go_to_arrays(run: Run, tmp_path: Path) -> None:
    net = randomised(MLP(5, width=8))
    save(Denoiser(net, Cosine(), shape=(5,), time="angle"), tmp_path / "vectors")
    command = ["sample", "--model", tmp_path / "vectors", "--count", 3, "--out"]
    status, _, err = run(*command, tmp_path / "a.png")
    assert status == 2
    assert "NAME.npz" in err
    assert run(*command, tmp_path / "a.npz")[0] == 0
    assert np.load(tmp_path / "a.npz")["samples"].shape == (3, 5)


class Greedy(torch.nn.Module):
    """Runs out of memory for more than `most` samples at once."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return 0.5 * x


def test_the_batch_is_halved_when_memory_runs_out() -> None:
    def streamed(most: int) -> tuple[torch.Tensor, list[int]]:
        net = Greedy(most)
        denoiser = Denoiser(net, Cosine(), shape=(2,))
        plan = solvers.get("ddpm").plan(Cosine(), 3)
        recipe = _draw.Recipe(denoiser, plan, (2,), (), 0, 8, torch.device("cpu"))
        parts = list(recipe.stream(_draw.Shard().chunks(20, 8)))
        assert [(c.start, c.stop) for c, _ in parts] == [(0, 8), (8, 16), (16, 20)]
        return torch.cat([samples for _, samples in parts]), net.calls

    samples, calls = streamed(2)
    # Refused at 8 and at 4; then ten batches of 2 (the last two of the third chunk), 3 steps each.
    assert calls == [8, 4, *[2] * 30]
    assert torch.equal(samples, streamed(8)[0])
    with pytest.raises(torch.OutOfMemoryError):
        streamed(0)


# `info` and `papers`


def test_info_states_a_models_facts(model: str, run: Run) -> None:
    _, out, _ = run("info", model, "--json")
    facts = json.loads(out)
    net = load(model).net
    assert isinstance(net, UNet)
    assert facts["parameters"] == count_parameters(net)
    assert (facts["classes"], facts["shape"]) == (CLASSES, [1, SIZE, SIZE])
    assert facts["training_command"] == "ebbflow train x"
    assert "ebbflow train x" in run("info", model)[1]


def test_info_lists_solvers_and_models(run: Run) -> None:
    _, out, _ = run("info", "--json")
    facts = json.loads(out)
    assert [solver["name"] for solver in facts["solvers"]] == solvers.list()
    orders = {solver["name"]: solver["order"] for solver in facts["solvers"]}
    assert orders == {name: solvers.get(name).order for name in solvers.list()}
    assert facts["torch"] == torch.__version__
    table = run("info")[1]
    assert all(name in table for name in solvers.list())
    assert all(row["model"] in table for row in facts["models"])


def test_the_oracle_is_a_model(run: Run) -> None:
    assert json.loads(run("info", "oracle", "--json")[1])["shape"] == [2]
    assert _models.classes_of(_models.open_model("oracle", torch.device("cpu"))) == 0


def test_papers_as_a_table_and_for_machines(run: Run) -> None:
    entries = json.loads(run("papers", "--json")[1])["papers"]
    assert [entry["id"] for entry in entries] == [paper.id for paper in papers.read()]
    table = run("papers")[1]
    assert all(entry["id"] in table for entry in entries)


def test_an_adaptive_solver_takes_a_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["sample", "--model", "oracle", "--solver", "dormand-prince", "--count", "50"]
    assert main([*asked, "--tolerance", "1e-3", "--out", "a.png"]) == 0
    assert "dormand-prince, as many calls as it takes" in capsys.readouterr().out
    assert main([*asked, "--steps", "20"]) == 2
    assert "tolerance" in capsys.readouterr().err
    assert main(["sample", "--model", "oracle", "--tolerance", "1e-3", "--solver", "ddim"]) == 2
    assert "has no parameter 'tolerance'" in capsys.readouterr().err
