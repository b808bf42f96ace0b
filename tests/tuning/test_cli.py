"""`ebbflow tune`, and `ebbflow sample --plan`."""

import json

import numpy as np
import pytest

import ebbflow as ef
from ebbflow.cli import main

TUNE = ["tune", "--model", "oracle", "--nfe", "4", "--evaluations", "30000"]


def test_tune_then_sample(tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main([*TUNE, "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = report["held out"]
    tuned = found["tuned"]["mean"]
    assert all(tuned < other["mean"] for name, other in found.items() if name != "tuned")
    assert report["command"] == "ebbflow tune --model oracle --nfe 4 --evaluations 30000.0"
    assert json.loads(out.read_text())["origin"]["held out"] == found
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["plan.json", "plan.safetensors"]  # no trace of the state that was saved

    samples = tmp_path / "points.npz"
    arguments = ["sample", "--model", "oracle", "--count", "64", "--out", str(samples)]
    assert main([*arguments, "--plan", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["nfe"] == 4 and facts["solver"].startswith("plan ")
    assert np.isfinite(np.load(samples)["samples"]).all()


def test_a_table_says_how_well_it_did(tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ["--evaluations", "3000", "--samples", "24", "--out", str(out)]
    assert main([*TUNE[:5], *arguments]) == 0
    text = capsys.readouterr().out
    assert "tuned" in text and "dpm-solver++2m" in text and "--plan" in text


@pytest.mark.slow  # two minutes; tests/tuning/test_polish.py is quick
def test_polish_brings_pictures_nearer_to_real_ones(tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ["--nfe", "2", "--guidance", "1", "--evaluations", "3000", "--samples", "12"]
    assert main(["tune", *arguments, "--polish", "0.02", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["polished"]
    assert found["distance"] < found["distance before"] - 0.1 and found["departure"] < 0.0201


@pytest.mark.parametrize("method", ["times", "solvers"])
def test_searches_by_the_same_verb(tmp_path, capsys, method):
    out = tmp_path / "plan.json"
    arguments = ["--method", method, "--evaluations", "20000", "--samples", "64"]
    assert main([*TUNE[:5], *arguments, "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["error_after"] <= report["error_before"]
    assert report["evaluations"] <= 20000
    assert ef.Plan.load(out).nfe <= 4


def refuses(arguments, *words, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_refusals(tmp_path, capsys):
    refuses(["tune", "--out", "plan.pt"], "plan.pt", ".json", capsys=capsys)
    refuses([*TUNE[:3], "--nfe", "1"], "nfe is 1", capsys=capsys)
    refuses([*TUNE[:3], "--guidance", "2"], "guidance 2 needs", capsys=capsys)
    refuses([*TUNE[:3], "--start", "ddpm", "--evaluations", "3000"], "draws noise", capsys=capsys)
    refuses([*TUNE[:3], "--polish", "0.01"], "--polish", "--features", capsys=capsys)
    refuses([*TUNE[:3], "--polish", "-1"], "polish is -1", capsys=capsys)
    refuses(["sample", "--plan", str(tmp_path / "no.json")], "no.json", capsys=capsys)
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    refuses(["sample", "--plan", str(wrong)], "format", capsys=capsys)


def test_a_plan_takes_the_place_of_other_choices(tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main([*TUNE[:5], "--evaluations", "3000", "--samples", "24", "--out", str(out)]) == 0
    capsys.readouterr()
    given = ["sample", "--model", "oracle", "--plan", str(out), "--steps", "5"]
    refuses(given, "--plan", "--steps 5", capsys=capsys)
    given = ["sample", "--model", "fashion-mnist", "--plan", str(out), "--count", "1"]
    refuses(given, "prediction", capsys=capsys)
