"""The report of a run: what is found in the evaluation of each image, the document, its diagrams
and the page."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rsb_ffcv import InputError
from rsb_ffcv.reporting import charts, curves, log
from rsb_ffcv.reporting.page import page
from rsb_ffcv.training import environment, report

HOSTILE = '<script>alert("1")</script> & "><img src=x>'
SECTIONS = (
    "recipe",
    "curves",
    "throughput",
    "classes",
    "confused",
    "worst",
    "environment",
    "warnings",
)
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Checked(HTMLParser):
    """Asserts that every element is closed in the right order, and collects what the tests need."""

    def __init__(self, text):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        assert text.startswith("<!DOCTYPE html>\n")
        self.feed(text)
        self.close()
        assert not self.open
        self.ids = [value for name, value in self.attributes if name == "id"]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names) and (tag != "img" or "alt" in names)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):  # of SVG
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


class File(SimpleNamespace):
    """What findings needs of a Beton."""

    def __len__(self):
        return len(self.labels)

    def names_of(self, samples):
        return {number: f"{HOSTILE}_{number}.jpg" for number in samples}

    def fingerprint(self):
        return "0123456789abcdef"


def file_of(labels, classes, titles=False):
    names = [f"class_{number}" for number in range(classes)]
    about = SimpleNamespace(
        classes=names, titles=[f"title {HOSTILE}, {name}" for name in names] if titles else []
    )
    return File(labels=np.array(labels), about=about, path="/data/val.beton")


def row(epoch, **more):
    return {
        "epoch": epoch,
        "loss": "bce",
        "train_loss": 0.5,
        "train_top1": 20.0,
        "lr": 0.1,
        "resolution": 32,
        "images_per_s": 100.0,
        "seconds": 10.0,
        "val_seconds": 1.0,
        "data_wait_s": 0.5,
        "peak_memory_mb": 512.0,
        "own_step_ms": [99.0, 121.0],
        "slowest": {
            "process": 1,
            "host": HOSTILE,
            "own_step_ms": 121.0,
            "percent_above_median": 10,
        },
        "top1": 30.0 + epoch,
        "top5": 60.0,
        "val_loss": 2.0,
        **more,
    }


def found_of(images, classes, titles=False):
    """Findings of random predictions, and the arrays that they come from."""
    rng = np.random.default_rng(images)
    labels, predicted = rng.integers(0, classes, (2, images))
    in_five = (labels == predicted) | (rng.random(images) < 0.5)
    per_image = np.stack([predicted, in_five, rng.exponential(1.0, images)], 1)
    found = report.findings(
        file_of(labels, classes, titles),
        classes,
        weights="model",
        row=row(1),
        per_image=per_image,
        label_sets=None,
    )
    return found, labels, per_image


def write_run(folder, rows, epochs=2, **config):
    folder.mkdir(exist_ok=True)
    options = {
        "model": {"arch": "resnet18", "pretrained": False},
        "training": {"epochs": epochs},
        "logging": {"run_name": "", "expected": "1=25, 2=40"},
        **config,
    }
    log.write_json(folder / "config.json", options)
    log.write_metrics(folder, rows)
    return folder


# ---------------------------------------------------------------- findings


def test_findings_equal_a_slow_count():
    found, labels, per_image = found_of(400, 7)
    predicted = per_image[:, 0].astype(int).tolist()
    pairs: dict[tuple[int, int], list[int]] = {}
    for label, about in enumerate(found["classes"]):
        own = [n for n in range(400) if labels[n] == label]
        assert about["images"] == len(own) and about["name"] == f"class_{label}"
        assert about["correct"] == sum(predicted[n] == label for n in own)
        assert about["correct5"] == sum(per_image[n, 1] == 1 for n in own)
        assert about["predicted"] == predicted.count(label)
        assert about["top1"] == 100 * about["correct"] / about["images"]
        for n in own:
            if predicted[n] != label:
                pairs.setdefault((label, predicted[n]), []).append(n)
    expected = sorted(pairs, key=lambda pair: (-len(pairs[pair]), pair))[: report.CONFUSED]
    assert [(pair["label"], pair["predicted"]) for pair in found["confused"]] == expected
    for pair, shown in zip(expected, found["confused"]):
        worst = sorted(pairs[pair], key=lambda n: -per_image[n, 2])[: report.EXAMPLES]
        assert shown["images"] == len(pairs[pair])
        assert [image["sample"] for image in shown["examples"]] == worst
    order = sorted(range(400), key=lambda n: -per_image[n, 2])[: report.WORST]
    assert [image["sample"] for image in found["worst"]] == order
    for image in found["worst"]:
        n = image["sample"]
        assert (image["label"], image["predicted"], image["loss"]) == (
            labels[n],
            predicted[n],
            per_image[n, 2],
        )


def test_loss_that_is_no_number_is_the_worst_and_null_in_the_document():
    per_image = np.array([[0, 1, 0.1], [1, 1, math.nan], [0, 0, math.inf], [0, 0, 9.0]])
    found = report.findings(
        file_of([0, 0, 1, 1], 2),
        2,
        weights="model",
        row=row(0, val_loss=math.nan),
        per_image=per_image,
        label_sets=torch.tensor([[0, 1], [0, -1], [1, -1], [-1, -1]]),
    )
    assert [image["sample"] for image in found["worst"]] == [1, 2, 3, 0]
    assert [image["accepted"] for image in found["worst"]] == [False, False, False, True]
    plain = json.dumps(report._finite(found), allow_nan=False)
    assert [image["loss"] for image in json.loads(plain)["worst"]] == [None, None, 9.0, 0.1]


def test_classes_without_images_and_files_without_names_are_listed():
    beton = file_of([0, 0, 2], 3)
    beton.about = None
    per_image = np.array([[0, 1, 0.1], [4, 0, 1.0], [2, 1, 0.2]])
    found = report.findings(
        beton, 3, weights="ema", row=row(0, ema_top1=1.0), per_image=per_image, label_sets=None
    )
    assert [about["name"] for about in found["classes"]] == ["0", "1", "2", "3", "4"]
    assert [about["top1"] for about in found["classes"]] == [50.0, None, 100.0, None, None]
    assert found["top1"] == 1.0 and "top5" not in found  # of the EMA


# ---------------------------------------------------------------- the document


def test_document_has_rows_best_events_warnings_and_changes(tmp_path):
    rows = [row(0, events=["b", "a"]), row(1, ema_top1=50.0, skipped_samples=["sample 3 is bad"])]
    folder = write_run(tmp_path / "a_run", rows, lr={"lr": 0.7, "power": 1.0})
    (folder / "training.log").write_text(
        "2026-01-02 03:04:05 epoch 1/2: loss\n"
        "2026-01-02 03:04:06 warning: a\n"
        "2026-01-02 03:04:07 warning: the disk is full\n"
        "2026-01-02 03:04:08 warning: the disk is full\n"
    )
    made = report.write(folder, None)
    assert json.loads((folder / "metrics.json").read_text()) == made
    assert made["epochs"] == rows and made["finished"] and made["name"] == "a_run"
    assert made["best"] == {"top1": 50.0, "epoch": 1, "weights": "ema"}
    assert made["expected"] == [[1, 25.0], [2, 40.0]]
    assert made["changed_options"]["lr.lr"] == [0.5, 0.7]
    assert "lr.power" not in made["changed_options"]
    assert made["events"] == [
        {"epoch": 0, "text": "b"},
        {"epoch": 0, "text": "a"},
        {"epoch": 1, "text": "left out: sample 3 is bad"},
    ]
    assert made["warnings"] == [{"time": "2026-01-02 03:04:07", "text": "the disk is full"}]
    assert made["environment"] is None and made["evaluation"] is None
    text = Checked((folder / "report.html").read_text()).text
    assert "Start the same command again" in text and "no environment.json" in text
    assert "the disk is full" in text and "left out: sample 3 is bad" in text


def test_best_of_a_branch_is_its_own(tmp_path):
    lineage = [{"checkpoint": "/a/checkpoint.pt", "epochs": 1, "step": 3, "changed": {}}]
    rows = [row(0, top1=99.0), row(1, top1=20.0)]
    made = report.document(write_run(tmp_path, rows, lineage=lineage), None)
    assert made["best"]["epoch"] == 1 and made["lineage"] == lineage
    assert "lineage" not in made["config"]
    assert report.document(write_run(tmp_path, rows[:1], lineage=lineage), None)["best"] is None


def test_evaluation_of_another_state_is_not_used(tmp_path):
    folder = write_run(tmp_path, [row(0), row(1, val_loss=math.inf)])
    found, *_ = found_of(50, 3)
    report.write(folder, found)
    assert report.read_evaluation(folder) == found
    log.write_metrics(folder, [row(0), row(1), row(2)])
    assert report.read_evaluation(folder) is None
    (folder / "metrics.json").write_text("{")
    with pytest.raises(InputError, match=r"metrics.json: cannot be read .*; remove it"):
        report.read_evaluation(folder)


def test_report_needs_a_run(tmp_path, call_program):
    for arguments, message in (
        ([], "report: 0 folders; give the folder of a run"),
        ([tmp_path, tmp_path], "report: 2 folders; give the folder of a run"),
        ([tmp_path], f"{tmp_path}: no run, or one without results"),
    ):
        status, out, err = call_program("train_imagenet.py", "report", *arguments)
        assert status == 2 and not out and err.startswith(f"error: {message}")
        assert len(err.splitlines()) == 1
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    status, _, err = call_program("train_imagenet.py", "report", tmp_path)
    assert status == 2 and f"{tmp_path}/config.json: not of a run ('logging')" in err
    assert not list(tmp_path.glob("*.html")) and not list(tmp_path.glob(".*.part"))


def test_report_of_a_run_without_a_finished_epoch(tmp_path, call_program):
    folder = write_run(tmp_path / "run", [])
    status, out, err = call_program("train_imagenet.py", "report", folder)
    assert status == 0 and "0 epochs, not finished; results of each image come after" in out, err
    text = Checked((folder / "report.html").read_text()).text
    assert text.count("Missing: no epoch has finished") == 2
    assert text.count("So far 0 epochs of 2 have finished") == 3


# ---------------------------------------------------------------- the page


def made_of(tmp_path, images=60, classes=5, titles=True, rows=None):
    """The document of a run whose every text is hostile, and a picture of each image."""
    events = [f"event {HOSTILE}", "control \0 \x1b \x85"]
    rows = rows or [row(0), row(1, events=events, ema_top1=31.0, ema_val_loss=2.0)]
    lineage = [
        {"checkpoint": HOSTILE, "epochs": 0, "step": 5, "changed": {"lr.lr": [HOSTILE, 0.5]}}
    ]
    folder = write_run(
        tmp_path / "run",
        rows,
        logging={"run_name": HOSTILE, "expected": "1=25, 2=40, 9=90"},
        data={"train_dataset": HOSTILE},
        lr={"lr": 0.2},
        lineage=lineage,
    )
    files = {"path": HOSTILE, "images": 9, "classes": 5, "bytes": 10, "fingerprint": "ab"}
    about = {"command": HOSTILE, "versions": {"torch": "2", "ffcv": None}, "compile": False}
    log.write_json(folder / log.ENVIRONMENT, about | {"files": {"train": files, "val": files}})
    found, *_ = found_of(images, classes, titles)
    made = report._finite(report.document(folder, found))
    return json.loads(json.dumps(made)), dict.fromkeys(range(images), "/9j/4AAQ")


def test_page_is_well_formed_escaped_and_needs_no_network(tmp_path):
    made, pictures = made_of(tmp_path)
    text = page(made, pictures, no_pictures="")
    found = Checked(text)
    assert "http://" not in text and "https://" not in text and "url(" not in text
    assert "@import" not in text and "<link" not in text
    assert found.tags.count("script") == 1 and "alert(" in found.text  # as text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    sources = [value for name, value in found.attributes if name in ("src", "href")]
    assert sources and all(value.startswith(("#", "data:image/jpeg;base64,")) for value in sources)
    assert len(set(found.ids)) == len(found.ids)
    assert {value[1:] for value in sources if value[0] == "#"} == set(SECTIONS) <= set(found.ids)
    assert found.tags.count("h1") == found.tags.count("title") == 1
    examples = sum(len(pair["examples"]) for pair in made["evaluation"]["confused"])
    assert found.tags.count("img") == examples + len(made["evaluation"]["worst"])
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_page_shows_every_part_of_the_document(tmp_path):
    made, pictures = made_of(tmp_path)
    text = Checked(page(made, pictures, no_pictures="")).text
    for about in made["evaluation"]["classes"]:
        assert about["name"] in text and f"{about['top1']:.1f}" in text
    for pair in made["evaluation"]["confused"]:
        assert f"{pair['images']} of " in text
    for image in made["evaluation"]["worst"]:
        assert f"sample {image['sample']}, " in text and f"{image['loss']:.2f}" in text
    for part in (
        f"event {HOSTILE}",
        "torch 2",
        "top-1 (%)",
        "expected 40 training 20 raw 31 EMA 31",
        "1 25.00 % 30.00 % +5.00 2 40.00 % 31.00 % -9.00 9 90.00 % not reached –",
        "images/s in training, median 100",
        "finished, 2 epochs",
    ):
        assert part in text, part


def test_missing_pictures_are_explained(tmp_path):
    made, _ = made_of(tmp_path)
    pictures, reason = report._pictures(made)
    assert pictures == {} and "/data/val.beton" in reason
    found = Checked(page(made, pictures, no_pictures=reason))
    assert found.tags.count("img") == 0
    assert found.text.count("The pictures are missing: /data/val.beton") == 2


def test_pictures_are_those_of_the_evaluation_file(betons, tmp_path):
    from rsb_ffcv.beton import read_beton

    val = read_beton(betons / "val.beton")
    made, _ = made_of(tmp_path, images=27, classes=3)
    made["evaluation"] |= {"file": str(val.path), "fingerprint": val.fingerprint()}
    pictures, reason = report._pictures(made)
    listed = {image["sample"] for image in made["evaluation"]["worst"]}
    assert not reason and listed <= pictures.keys()
    for sample in listed:
        image = Image.open(io.BytesIO(base64.b64decode(pictures[sample])))
        whole = (int(val.widths[sample]), int(val.heights[sample]))
        assert image.format == "JPEG" and max(image.size) <= report.SIDE
        assert image.size == whole  # of at most 90 px, so they are not shrunk
        colours = np.asarray(image, np.float64).mean((0, 1))
        assert colours.argmax() == val.labels[sample]  # see conftest.make_pictures
    made["evaluation"]["fingerprint"] = "0" * 16
    assert report._pictures(made) == ({}, f"{val.path} has other images now")


def test_report_of_a_thousand_classes_and_many_epochs_is_small(tmp_path):
    rows = [row(epoch, ema_top1=1.0, ema_val_loss=1.0, swa_top1=2.0) for epoch in range(600)]
    made, _ = made_of(tmp_path, images=50_000, classes=1000, rows=rows)
    text = page(made, dict.fromkeys(range(50_000), "A" * 5000), no_pictures="")
    found = Checked(text)
    assert len(text) < 2e6 and len(json.dumps(made)) < 2e6
    assert "The 10 worst classes" in found.text and "All 1,000 classes" in found.text
    assert text.count("class_999<") >= 1 and found.tags.count("details") == 4


# ---------------------------------------------------------------- diagrams


def test_ticks_are_round_few_and_inside():
    rng = np.random.default_rng(0)
    for _ in range(500):
        low = float(rng.normal() * 10 ** rng.uniform(-6, 5))
        high = low + float(10 ** rng.uniform(-6, 5) + abs(low) * 1e-6)
        found = charts.ticks(low, high)
        margin = 1e-6 * (high - low)
        assert 1 <= len(found) <= 6, (low, high, found)
        assert all(low - margin <= tick <= high + margin for tick in found)
        steps = np.diff(found)
        assert np.allclose(steps, steps[0] if len(steps) else 0, rtol=1e-3)
    assert charts.ticks(0.5, 1.5, whole=True) == [1.0]
    assert charts.ticks(1, 300, count=6, whole=True) == [50, 100, 150, 200, 250, 300]


def test_chart_shows_every_line_of_its_panel():
    rows = [
        row(e, ema_top1=31.0, swa_top1=32.0 if e else math.nan, images_per_s_with_val=90.0)
        for e in range(3)
    ]
    for title, unit, lines in curves.panels(rows, {2: 30.0, 6: 40.0, 7: 50.0}):
        made = charts.chart(title, unit, lines)
        assert made.count("<polyline") == len(lines) and f"{title} over the epochs" in made
        for *_, colour, style in lines:
            assert f"--c:var(--{charts.NAMES[colour]})" in made
            assert not charts.DASHES[style] or f'"{charts.DASHES[style]}"' in made
        if title == "top-1":
            assert made.count("<circle") == 2  # the expected curve ends at twice the last epoch
            (swa,) = re.findall(r'--green\)" stroke-dasharray="[\d ]+" points="([^"]*)"', made)
            assert len(swa.split()) == 2  # the value that is no number is left out


def test_points_of_a_chart_are_where_the_axes_say():
    made = charts.chart("t", "u", [("raw", [(1, 0.0), (5, 50.0), (9, 100.0)], curves.BLUE, "-")])
    (points,) = re.findall(r'points="([^"]*)"', made)
    xs, ys = zip(*(map(float, point.split(",")) for point in points.split()))
    texts = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([\d.,]+)', made)
    across = {float(value): float(x) for x, _, anchor, value in texts if anchor == "middle"}
    up = {float(value): float(y) - 4 for _, y, anchor, value in texts if anchor == "end"}
    assert xs[1] == pytest.approx((xs[0] + xs[2]) / 2) and ys[1] == pytest.approx(
        sum(ys) / 3, abs=1
    )
    assert (up[0.0], up[100.0]) == pytest.approx((ys[0], ys[2]), abs=0.11)
    assert (across[4.0] + across[6.0]) / 2 == pytest.approx(xs[1], abs=0.11)
    single = charts.chart("t", "", [("raw", [(4, 7.0)], curves.BLUE, "-")])
    assert "<circle" in single and ">4</text>" in single
    assert "No values" in charts.chart("t", "", [("raw", [(4, math.nan)], curves.BLUE, "-")])


def test_histogram_counts_every_class():
    made = charts.histogram([0.0, 4.9, 5.0, 99.0, 100.0])
    heights = [float(text) for text in re.findall(r'height="([\d.]+)"', made)]
    scale = max(heights) / 2
    assert [round(height / scale) for height in heights] == [2, 1, *[0] * 17, 2]


# ---------------------------------------------------------------- environment


def test_environment_has_versions_and_no_variables(betons, monkeypatch):
    from rsb_ffcv.beton import read_beton
    from rsb_ffcv.training.compute import Compute

    monkeypatch.setenv("WANDB_API_KEY", "a-secret-token")
    train, val = (read_beton(betons / f"{name}.beton") for name in ("train", "val"))
    where = Compute(
        device=torch.device("cpu"),
        precision="bf16",
        compile=False,
        channels_last=True,
        world_size=3,
        hosts=("a", "a", "b"),
    )
    found = environment.describe(where, decode="cpu", threads=2, train=train, val=val)
    assert "a-secret-token" not in json.dumps(found)
    assert (found["processes"], found["hosts"], found["precision"]) == (3, 2, "bf16")
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["files"]["val"]["images"] == 27 and found["files"]["train"]["images"] == 96


def test_commit_is_that_of_the_packages_own_repository(tmp_path, monkeypatch):
    def git(*words):
        return environment._output("git", "-C", str(tmp_path), *words)

    git("init", "-q")
    name = ("-c", "user.name=a", "-c", "user.email=b")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    assert git(*name, "commit", "-q", "-m", "first") is not None
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    head = git("rev-parse", "HEAD")
    assert head and environment.commit() == head
    (tmp_path / "file").write_text("2")
    assert environment.commit() == f"{head} with changes"
    (tmp_path / "inside").mkdir()  # installed inside a repository of the user
    monkeypatch.setattr(environment, "ROOT", tmp_path / "inside")
    assert environment.commit() == ""


def test_driver_is_read_from_the_kernel_module(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "NVIDIA", tmp_path / "version")
    monkeypatch.setattr(environment, "_output", lambda *command: None)
    assert environment.driver() == "unknown"
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
    )
    assert environment.driver() == "570.86.15"
