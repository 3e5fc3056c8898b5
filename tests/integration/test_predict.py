"""The command predict: classes of pictures, as the run's evaluation sees them."""

import csv
import io
import json
import re

import pytest
import torch
from PIL import Image

from rsb_ffcv.export import formats
from rsb_ffcv.loading.batch import normalize
from rsb_ffcv.preprocessing import preprocess

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
