"""The command eval: files of weights on an evaluation file, also class by class."""

import csv
import json

import pytest
import torch

from tests.integration.runs import rows


@pytest.fixture
def evaluate(betons, call_program):
    """evaluate(weights, **options): (status, result, stderr). The options are those of the run."""

    def call(weights, **more):
        given = {
            "eval.weights": weights,
            "data.val_dataset": betons / "val.beton",
            "validation.batch_size": 10,
            "validation.resolution": 32,
            "compute.device": "cpu",
            "compute.precision": "fp32",
            "compute.threads": 1,
            **more,
        }
        flags = [f"--{name}={value}" for name, value in given.items()]
        status, out, err = call_program("train_imagenet.py", "eval", *flags)
        return status, json.loads(out.splitlines()[-1]) if status == 0 else None, err

    return call


def test_weights_of_a_run_have_the_results_of_its_log(finished_run, evaluate, tmp_path):
    last = rows(finished_run)[-1]
    newest = max(finished_run.glob("checkpoint_*.pt"))
    for which, prefix in (("model", ""), ("ema", "ema_")):
        status, result, err = evaluate(newest, **{"eval.which": which})
        assert status == 0, err
        for name in ("top1", "top5", "val_loss"):
            assert result[name] == last[prefix + name]
    best = torch.load(finished_run / "best_weights.pt", weights_only=True)
    status, result, err = evaluate(
        finished_run / "best_weights.pt",
        **{"eval.csv": tmp_path / "classes.csv", "model.arch": "resnet50"},
    )
    assert status == 0, err
    assert result["top1"] == best["metrics"]["top1"] and result["images"] == 27
    with open(tmp_path / "classes.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["label"], row["name"], row["images"]) for row in table] == [
        ("0", "amber", "9"),
        ("1", "blue", "9"),
        ("2", "cyan", "9"),
    ]
    for name in ("top1", "top5"):
        mean = sum(float(row[name]) for row in table) / 3
        assert mean == pytest.approx(result[name], abs=0.01)


def test_weights_of_other_programs_need_their_architecture(finished_run, evaluate, tmp_path):
    weights = finished_run / "final_weights.pt"
    status, result, err = evaluate(weights, **{"model.arch": "resnet10t"})
    assert status == 0 and result["top1"] == rows(finished_run)[-1]["top1"], err
    status, _, err = evaluate(weights, **{"model.arch": "resnet18"})
    assert status == 2 and err.splitlines()[-1].startswith(f"error: eval.weights={weights}: ")
    status, _, err = evaluate(tmp_path / "absent.pt")
    assert status == 2 and f"eval.weights={tmp_path}/absent.pt: cannot be read" in err
    status, _, err = evaluate(weights, **{"eval.which": "ema", "model.arch": "resnet10t"})
    assert status == 2 and "eval.which=ema" in err
