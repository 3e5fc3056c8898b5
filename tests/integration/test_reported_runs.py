"""metrics.json and report.html at the end of a run, and after interruptions."""

import json
import shutil
import signal
from contextlib import closing

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rsb_ffcv.learning.model import build_model
from rsb_ffcv.loading import EvalLoader
from rsb_ffcv.loading.batch import MEAN, normalize
from rsb_ffcv.reporting.log import REPORT
from tests.integration.runs import TIMINGS, options, rows
from tests.unit.test_report import Checked

SMALL = {"model.arch": "test_resnet", "model.drop_path": 0, "training.epochs": 2}
SWA = {**SMALL, "training.epochs": 3, "swa.epochs": 2, "swa.lr": 0.001}
NAMES = {"model": "final_weights.pt", "ema": "final_weights_ema.pt", "swa": "final_weights_swa.pt"}


@pytest.fixture(scope="module")
def finished(betons, tmp_path_factory, train):
    """A finished run with raw, EMA and SWA weights, and a second set of labels."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    accepted = [[number % 3] if number % 4 else [] for number in range(27)]
    labels = folder.parent / "labels.json"
    labels.write_text(json.dumps(accepted))
    more = {**SWA, "validation.labels": labels}
    statuses, out, err = train(options(betons, folder, **more)).wait()
    assert statuses == [0], err
    return folder, more, out


def document(folder, losses=True):
    """metrics.json without times and circumstances. losses: with those of single images."""
    made = json.loads((folder / "metrics.json").read_text())
    for row in made["epochs"]:
        for name in TIMINGS & row.keys():
            del row[name]
    for name in ("environment", "warnings", "name"):
        del made[name]
    del made["config"]["logging"]["folder"], made["changed_options"]["logging.folder"]
    listed = [pair["examples"] for pair in made["evaluation"]["confused"]]
    for image in sum(listed, made["evaluation"]["worst"]):
        if not losses:
            assert image.pop("loss") >= 0
    return made


def test_document_is_the_log_and_a_plain_evaluation(betons, finished):
    folder, _, out = finished
    assert f"report                      {folder / REPORT}" in out
    made = json.loads((folder / "metrics.json").read_text())
    assert made["finished"] and made["evaluation"]["epoch"] == 2
    assert made["epochs"] == [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert made["environment"] == json.loads((folder / "environment.json").read_text())
    found, last = made["evaluation"], made["epochs"][-1]
    prefixes = {"model": "", "ema": "ema_", "swa": "swa_"}
    assert found["weights"] == max(prefixes, key=lambda name: last[f"{prefixes[name]}top1"])
    for name in ("top1", "top5", "val_loss", "relabelled_top1", "relabelled_images"):
        assert found[name] == last[prefixes[found["weights"]] + name]
    model = build_model("test_resnet", 3, mean=MEAN)
    model.load_state_dict(torch.load(folder / NAMES[found["weights"]], weights_only=True))
    model.eval()
    loader = EvalLoader(
        betons / "val.beton", batch_size=27, resolution=32, num_workers=1, crop_ratio=224 / 256
    )
    with closing(loader), torch.no_grad():
        ((images, labels, _),) = loader
        images = normalize(images)
        logits = (model(images) + model(images.flip(3))) / 2  # lr_tta
    losses, predicted = F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1)
    for label, about in enumerate(found["classes"]):
        own = labels == label
        assert (about["images"], about["correct5"]) == (9, 9)
        assert about["correct"] == (predicted[own] == label).sum()
    pairs = [(pair["label"], pair["predicted"]) for pair in found["confused"]]
    matrix = np.zeros((3, 3), int)
    np.add.at(matrix, (labels.numpy(), predicted.numpy()), 1)
    assert {pair: found["confused"][n]["images"] for n, pair in enumerate(pairs)} == {
        (a, b): matrix[a, b] for a in range(3) for b in range(3) if a != b and matrix[a, b]
    }
    accepted = json.loads((folder.parent / "labels.json").read_text())
    assert len(found["worst"]) == 24
    for image in found["worst"]:
        n = image["sample"]
        assert image["loss"] == pytest.approx(float(losses[n]), rel=1e-4)
        assert image["predicted"] == predicted[n] and image["label"] == labels[n]
        assert image["accepted"] == (image["predicted"] in accepted[n])
    ordered = [image["loss"] for image in found["worst"]]
    assert ordered == sorted(ordered, reverse=True)
    page = Checked((folder / REPORT).read_text())
    assert page.tags.count("img") >= 24 and "finished, 3 epochs" in page.text
    assert "validation.labels" in page.text


def test_finished_run_writes_the_same_document_with_any_number_of_processes(
    betons, finished, tmp_path, train
):
    folder, more, _ = finished
    for world in (1, 2):
        other = tmp_path / str(world)
        shutil.copytree(folder, other)
        for name in ("metrics.json", REPORT):
            (other / name).unlink()
        flags = options(betons, other, **more, **{"training.batch_size": 16})
        statuses, out, err = train(flags, world).wait()
        assert statuses == [0] * world, err
        assert document(other, losses=world == 1) == document(folder, losses=world == 1)
        about = json.loads((other / "environment.json").read_text())
        assert about["command"] == json.loads((folder / "environment.json").read_text())["command"]
        assert out.count(f"{other / REPORT}") == 1 and not list(other.glob(".*.part"))


def test_interrupted_run_is_reported_and_completes_its_report(
    betons, finished, tmp_path, train, call_program
):
    folder, more, _ = finished
    other = tmp_path / "run"
    run = train(options(betons, other, **more), stop_at=("epoch 2", 1))
    run.wait_for_stop()
    run.signal(signal.SIGTERM)
    run.go_on()
    assert run.wait()[0] == [75]
    status, out, err = call_program("train_imagenet.py", "report", other)
    assert status == 0 and "1 epoch, not finished; results of each image" in out, err
    made = json.loads((other / "metrics.json").read_text())
    assert made["evaluation"] is None and not made["finished"] and len(made["epochs"]) == 1
    text = Checked((other / REPORT).read_text()).text
    assert text.count("So far 1 epoch of 3 has finished") == 3 and "not finished: 1 of 3" in text
    for at, kill in ((("report", 1), True), (("report", 2), False)):  # of 3 batches
        run = train(options(betons, other, **more), stop_at=at)
        run.wait_for_stop()
        run.signal(signal.SIGKILL if kill else signal.SIGTERM)
        run.go_on()
        assert run.wait()[0] == ([-9] if kill else [75])
        assert not json.loads((other / "metrics.json").read_text())["finished"]
    statuses, _, err = train(options(betons, other, **more)).wait()
    assert statuses == [0], err
    assert document(other) == document(folder)
    before = (other / "metrics.json").read_bytes(), (other / REPORT).read_bytes()
    status, out, err = call_program("train_imagenet.py", "report", other)
    assert status == 0 and out == f"{other / REPORT}: 3 epochs, finished\n", err
    assert ((other / "metrics.json").read_bytes(), (other / REPORT).read_bytes()) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("a")])
def test_report_that_cannot_be_written_is_one_warning(
    betons, tmp_path, call_program, monkeypatch, error
):
    from rsb_ffcv.training import report

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(report, "page", fail)
    more = {**SMALL, "training.epochs": 1, "lr.warmup_epochs": 0}
    status, out, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run", **more))
    assert status == 0, err
    (line,) = err.splitlines()
    assert line.startswith("warning: report.html was not written: ")
    assert line.endswith("; the run is complete, and the same command writes it")
    assert "best top-1" in out and REPORT not in out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"final_weights.pt", "metrics.json"} <= names and REPORT not in names
    assert not [name for name in names if name.endswith(".part")]
    monkeypatch.undo()
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run", **more))
    assert status == 0 and not err and (tmp_path / "run" / REPORT).exists()
    assert rows(tmp_path / "run")[0]["top1"] == document(tmp_path / "run")["epochs"][0]["top1"]
