"""The command predict: classes of pictures, as the run's evaluation sees them."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from rsb_ffcv.export import formats
from rsb_ffcv.loading.batch import normalize
from rsb_ffcv.preprocessing import preprocess

ROOT = Path(__file__).parents[2]
CLASSES = ["amber", "blue", "cyan"]


def table(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_predictions_of_pictures_and_of_their_beton_file_are_equal(
    finished_run, exported, betons, pictures, command
):
    given = {"model": exported["uint8"], "lr_tta": 1, "top": 3, "batch_size": 8}
    status, text, err = command("predict", betons / "val.beton", given)
    metrics = torch.load(finished_run / "best_weights.pt", weights_only=True)["metrics"]
    assert status == 0 and f"top-1: {metrics['top1']:.2f} % of 27 images" in err
    from_beton = table(text)
    status, text, err = command("predict", pictures / "val", given)
    assert status == 0, err
    from_files = table(text)
    key = re.compile(r"\w+/\d+.jpg$")
    assert {key.search(row["path"])[0]: scores(row) for row in from_files} == {
        key.search(row["path"])[0]: scores(row) for row in from_beton
    }
    assert {row["target"] for row in from_beton} == set(CLASSES)


def scores(row):
    return {row[f"class_{n}"]: row[f"probability_{n}"] for n in (1, 2, 3)}


def test_probabilities_are_those_of_the_model(exported, pictures, command):
    path = pictures / "val" / "cyan" / "0.jpg"
    model, about = formats.read_model(exported["uint8"])
    with Image.open(path) as picture:
        pixels = preprocess(picture, **about.preprocessing())
    with torch.no_grad():
        expected = model(normalize(torch.from_numpy(pixels.copy())[None]))[0].softmax(0)
    status, text, err = command("predict", path, {"model": exported["uint8"], "format": "json"})
    assert status == 0, err
    (row,) = map(json.loads, text.splitlines())
    assert row["path"] == str(path)
    found = {one["class"]: one["probability"] for one in row["top"]}
    assert found == pytest.approx(dict(zip(CLASSES, expected.tolist())), abs=1e-5)
    assert list(found.values()) == sorted(found.values(), reverse=True)


@pytest.mark.parametrize("format", ["csv", "json"])
def test_unreadable_pictures_are_named(exported, pictures, tmp_path, format, command):
    """In their place in the output, on stderr, and by the exit status. The others are predicted."""
    good = pictures / "val" / "amber"
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes((good / "0.jpg").read_bytes()[:700])
    bad = [tmp_path / name for name in ("cut.jpg", "empty.png", "text.jpg")]
    out = tmp_path / "out"
    status, text, err = command(
        "predict",
        [good / "1.jpg", bad[0], good / "2.jpg", *bad[1:]],
        {"model": exported["uint8"], "format": format, "out": out, "batch_size": 2},
    )
    assert status == 1 and text == "" and "3 of 5 pictures could not be read" in err
    content = out.read_text()
    found = table(content) if format == "csv" else [*map(json.loads, content.splitlines())]
    assert [row["path"] for row in found] == [
        str(path) for path in (good / "1.jpg", bad[0], good / "2.jpg", *bad[1:])
    ]
    for row in found:
        if row["path"] in map(str, bad):
            assert row["error"].startswith(f"{row['path']}: not a readable picture")
            assert f"warning: {row['error']}" in err
            assert not row.get("class_1") and "top" not in row
            assert format == "json" or row["probability_3"] == ""  # all rows have all columns
        else:
            assert not row.get("error") and (row.get("class_1") or row["top"])


def test_output_appears_when_it_is_complete(exported, pictures, tmp_path, monkeypatch, command):
    out = tmp_path / "out.csv"
    out.write_text("previous")
    monkeypatch.setattr("rsb_ffcv.commands.predict._Predictor._scores", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("predict", pictures / "val", {"model": exported["uint8"], "out": out})
    assert out.read_text() == "previous" and list(tmp_path.iterdir()) == [out]


def test_file_of_other_classes_has_its_own_targets(exported, betons, tmp_path, command):
    """Classes are compared by name: the numbers of another file may differ."""
    from rsb_ffcv.dataset import subset

    subset(str(betons / "val.beton"), str(tmp_path / "one.beton"), num_workers=1, classes="cyan")
    status, text, _ = command("predict", tmp_path / "one.beton", {"model": exported["uint8"]})
    assert status == 0 and {row["target"] for row in table(text)} == {"cyan"}
    right = sum(row["class_1"] == "cyan" for row in table(text))
    status, _, err = command("predict", tmp_path / "one.beton", {"model": exported["uint8"]})
    assert f"top-1: {100 * right / 9:.2f} % of 9 images" in err


def test_images_of_other_classes_have_no_accuracy(exported, pictures, tmp_path, command):
    from rsb_ffcv.dataset import Place, write_splits

    for name, other in (("blue", "blue"), ("cyan", "violet")):
        shutil.copytree(pictures / "val" / name, tmp_path / "in" / "val" / other)
    place = Place(dataset="imagenet", data_dir=str(tmp_path / "in"))
    write_splits(place, str(tmp_path / "a.beton"), split="val", num_workers=1)
    status, _, err = command("predict", tmp_path / "a.beton", {"model": exported["uint8"]})
    assert status == 0 and "9 images of classes that the model does not have\n" in err
    assert re.search(r"top-1: [\d.]+ % of 9 images\n", err)


def test_names_that_are_no_text_are_kept(exported, pictures, tmp_path, command):
    name = os.fsencode(tmp_path) + b"/bad\xff.jpg"
    shutil.copy(pictures / "val" / "blue" / "0.jpg", os.fsdecode(name))
    (tmp_path / "link.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    given = [os.fsdecode(name), tmp_path / "link.jpg", tmp_path / "pipe.jpg"]
    done = subprocess.run(
        [
            *(sys.executable, "train_imagenet.py", "predict", *map(str, given)),
            f"--predict.model={exported['uint8']}",
        ],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[1].startswith(name)
    assert b"link.jpg: cannot be read" in done.stdout
    status, out, err = command(
        "predict", given, {"model": exported["uint8"], "format": "json", "out": tmp_path / "out"}
    )
    assert status == 1 and "2 of 3 pictures could not be read" in err
    rows = [*map(json.loads, (tmp_path / "out").read_text(encoding="ascii").splitlines())]
    assert os.fsencode(rows[0]["path"]) == name and "is not a file" in rows[2]["error"]


def test_output_is_a_regular_file(exported, pictures, tmp_path, command):
    """A link stays one, and a device is not replaced by a file."""
    (tmp_path / "link.csv").symlink_to("target.csv")
    given = {"model": exported["uint8"], "out": tmp_path / "link.csv"}
    status, _, err = command("predict", pictures / "val" / "blue", given)
    assert status == 0, err
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "target.csv").is_file()
    os.mkfifo(tmp_path / "pipe")
    given["out"] = tmp_path / "pipe"
    status, _, err = command("predict", pictures / "val" / "blue", given)
    assert status == 2 and "pipe: is not a regular file; give another predict.out" in err
    assert (tmp_path / "pipe").is_fifo()
