"""Files of many images: what a process keeps for each image is bounded."""

import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import many_images

from rsb_ffcv.beton import read_beton
from rsb_ffcv.dataset import inspect
from rsb_ffcv.loading import TrainLoader

COUNT = 200_000


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A folder with one.beton, COUNT images in 100 classes, and the same images in 8 shards."""
    work = tmp_path_factory.mktemp("many")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(many_images, "CLASSES", 100)
        many_images.make_files(work, COUNT, 8)
    return work


def test_files_of_the_benchmark_are_valid_and_the_same(many, capsys):
    path = many / "one.beton"
    assert inspect.verify(path, 0.01, num_workers=1)
    assert f"0 of {COUNT} images damaged" in capsys.readouterr().out
    assert f"{COUNT} images, 100 classes" in inspect.info(path)
    whole, shards = read_beton(path), read_beton(f"{many}/shards/*.beton")
    assert whole.names() == shards.names() and (whole.labels == shards.labels).all()
    assert (whole.extras["checksum"] == shards.extras["checksum"]).all()
    assert whole.names()[-1] == f"n00000099/n00000099_{COUNT - 1}.JPEG"


@pytest.mark.parametrize(
    ("files", "order"),
    [
        ("one", "random"),
        ("one", "quasi_random"),
        ("shards", "random"),
    ],
)
def test_memory_of_a_loader_is_bounded_for_each_image(many, files, order):
    """Without the draws, of which there are 8 bytes for each image: numba's memory is not seen."""

    def load(files):
        made = TrainLoader(
            many_images.given(str(many), files),
            batch_size=16,
            resolution=4,
            num_workers=1,
            order=order,
            window_bytes=1 << 20,
        )
        for epoch in range(2):
            batches = made.epoch(epoch)
            next(batches)
            batches.close()
        return made

    load("small").close()  # what does not depend on the number of images
    tracemalloc.start()
    try:
        made = load(files)
        kept, peak = (size / COUNT for size in tracemalloc.get_traced_memory())
    finally:
        tracemalloc.stop()
    made.close()
    assert peak < 115 and kept < 56  # bytes; the structure in the file has 60, the names 33


def test_a_few_names_are_read_without_making_all(many):
    file = read_beton(many / "one.beton")
    tracemalloc.start()
    try:
        names = file.names_of([0, 7, COUNT - 1])
        peak = tracemalloc.get_traced_memory()[1] / COUNT
    finally:
        tracemalloc.stop()
    assert names[7] == "n00000000/n00000000_7.JPEG" and len(names) == 3
    assert peak < 80  # bytes; of all names as str: 250


@pytest.mark.long
def test_benchmark_measures_both_checkouts_in_turn(many, tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    arguments = [f"--work={many}", f"--out={tmp_path}", f"--images={COUNT}", "--shards=8"]
    arguments += ["--repeats=1", f"--before={root}", "--only=file$|order random"]
    monkeypatch.setattr(sys, "argv", ["many_images.py", *arguments])
    many_images.main()
    results = json.loads((tmp_path / "results.json").read_text())
    for name in ("before", "now"):
        rows = results["rows"][name]
        assert set(rows) == {"one file", "one file, order random"}
        assert rows["one file"]["names"]["count"] == COUNT
        assert rows["one file"]["names"]["rss_mib"][0] > 50
    assert results["differences"] == []
    results["rows"]["now"]["one file"]["fingerprint"]["fingerprint"] = "another"
    assert many_images.differences(results["rows"]) == ["one file, fingerprint: fingerprint"]
    assert "| one file | read_beton |" in (tmp_path / "table.md").read_text()


@pytest.mark.long
def test_every_row_of_the_benchmark_runs(many, tmp_path, monkeypatch):
    arguments = [f"--work={many}", f"--out={tmp_path}", f"--images={COUNT}", "--shards=8"]
    monkeypatch.setattr(sys, "argv", ["many_images.py", *arguments, "--repeats=1"])
    many_images.main()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]["now"]
    assert len(rows) == 17
    training = rows["one file, run"]
    assert training["training: first step, resumed"]["checkpoint_bytes"] > 0


@pytest.mark.long
def test_process_with_all_images_of_imagenet_21k_needs_less_than_two_gib(tmp_path):
    """2 GB of disk, a minute."""
    labels = np.arange(many_images.IMAGES) * many_images.CLASSES // many_images.IMAGES
    many_images.make_file(tmp_path / "small.beton", 0, labels[:2000])
    many_images.make_file(tmp_path / "one.beton", 0, labels)
    for order in ("random", "quasi_random"):
        row = [str(tmp_path), "one", order, 1, 1]
        parts = many_images.measured_row(many_images.ROOT, "loader", row)
        assert max(part["anonymous_mib"] for part in parts.values()) < 2048, parts
        assert parts["later"]["anonymous_mib"] < 1200, parts
