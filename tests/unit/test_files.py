"""The commands on `.beton` files: info, verify, show, merge, subset, shard, concat, export,
estimate."""

import csv
import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from rsb_ffcv import InputError, beton, dataset
from rsb_ffcv.beton import read_beton
from rsb_ffcv.dataset import Encoding, Place, append, inspect, write_splits
from rsb_ffcv.dataset.readers import open_sources
from rsb_ffcv.loading import TrainLoader
from rsb_ffcv.ops import native
from tests import sources
from tests.sources import WNIDS, contents, expected, pictures, put


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder of train.beton (12 images, passed through) and val.beton (6)."""
    root = tmp_path_factory.mktemp("written")
    sources.folders(root / "in")
    write_splits(Place(dataset="imagenet", data_dir=str(root / "in")), str(root), num_workers=2)
    return root


@pytest.fixture
def copy(written, tmp_path):
    path = tmp_path / "train.beton"
    path.write_bytes((written / "train.beton").read_bytes())
    return path


def damage(path, sample: int, where: float = 0.5):
    file = read_beton(path)
    with open(path, "r+b") as opened:
        opened.seek(int(file.pointers[sample]) + int(where * int(file.sizes[sample])))
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("nameless", [".", "/"])
@pytest.mark.parametrize(
    "command, options",
    [
        ("info", ["path={}"]),
        ("verify", ["path={file}", "report={}"]),
        ("show", ["path={file}", "write_path={}"]),
        ("merge", ["paths={file}", "write_path={}"]),
        ("subset", ["path={file}", "write_path={}"]),
        ("concat", ["path=/", "paths={file}"]),
        ("export", ["path={file}", "write_path={}"]),
        ("write", ["data_dir={folder}/in", "write_path={folder}/out", "report={}"]),
    ],
)
def test_path_without_a_file_name_is_one_error_line(
    written, call_program, command, options, nameless
):
    given = [
        "--cfg." + option.format(nameless, file=written / "train.beton", folder=written)
        for option in options
    ]
    status, _, err = call_program("write_ffcv.py", command, *given)
    last = err.splitlines()[-1]
    assert status == 2 and (" names no file" in last or "write_path=" in last)
    assert "Traceback" not in err and not (written / "out").exists()


# ---- info ----------------------------------------------------------------------------------------


def test_info_describes_the_file(written):
    text = dataset.info(written / "train.beton")
    size = (written / "train.beton").stat().st_size
    for part in (
        f"12 images, 3 classes, {size} bytes",
        "jpg: 12 images",
        "width: 40 .. 44 px",
        "height: 40 .. 43 px",
        "jpeg_quality=90",
        "pass_through=True",
        "dataset=imagenet",
        "split=train",
        "kept=12",
        "rsb_ffcv=",
        "entry points for partial decoding: 12 images",
        "images per class (4 .. 4)",
        "n01440764          4  tench",
    ):
        assert part in text, (part, text)


def test_closed_pipe_is_not_an_error(written):
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).parents[2]
    info = f"{sys.executable} write_ffcv.py info --cfg.path={written}/train.beton"
    command = f"{info} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True)
    assert done.returncode in (0, 141) and "12 images" in done.stdout and done.stderr == ""


def test_info_of_a_stock_ffcv_file(written, tmp_path):
    path = stock(written / "train.beton", tmp_path / "stock.beton")
    text = dataset.info(path)
    assert "12 images, 3 classes" in text and "written by another program" in text


def stock(path, target):
    """Writes the file to `target` as FFCV would write it."""
    from tests.unit.test_beton import as_ffcv_writes_it

    target.write_bytes(as_ffcv_writes_it(path))
    return target


# ---- verify --------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", [0.0, 0.5, 1.0])
def test_intact_file_verifies(written, decode, capsys):
    assert dataset.verify(written / "train.beton", decode, 2)
    assert (
        f"0 of 12 images damaged; structure valid, all checksums compared, {int(12 * decode)} "
        f"images decoded without a fault" in capsys.readouterr().out
    )


def test_every_damaged_image_is_named(copy, tmp_path, capsys):
    for sample in (2, 7):
        damage(copy, sample)
    assert not dataset.verify(copy, 0.0, 2, report=str(tmp_path / "bad.csv"))
    shown = capsys.readouterr().out
    name = read_beton(copy).names()[7]
    assert (
        f"sample 7 ({name}) is damaged: its bytes do not match their checksum" in shown
        and "2 of 12 images damaged" in shown
    )
    with open(tmp_path / "bad.csv") as table:
        rows = list(csv.reader(table))
    assert rows[0] == ["sample", "path", "reason"] and [row[0] for row in rows[1:]] == ["2", "7"]


def test_damage_without_checksums_is_found_by_decoding(copy, tmp_path, capsys):
    path = stock(copy, tmp_path / "stock.beton")
    data = bytearray(path.read_bytes())
    file = read_beton(path)
    start, size = int(file.pointers[4]), int(file.sizes[4])
    data[start + size // 2 : start + size] = bytes(size - size // 2)
    path.write_bytes(data)
    assert dataset.verify(path, 0.0, 2) and not dataset.verify(path, 1.0, 2)
    assert "sample 4 (sample_00000004) is not a decodable JPEG" in capsys.readouterr().out


def test_damaged_image_is_not_counted_as_decoded(copy, capsys):
    damage(copy, 2)
    assert not dataset.verify(copy, 1.0, 2)
    assert "all checksums compared, 11 images decoded without a fault" in capsys.readouterr().out
    assert not dataset.verify(copy, 0.5, 2)
    assert "all checksums compared, 6 images decoded without a fault" in capsys.readouterr().out


def test_damaged_structure_is_reported(copy, tmp_path, capsys):
    with open(copy, "r+b") as file:
        file.seek(beton.front_bytes(3))
        file.write(b"\xff")
    assert not dataset.verify(copy, 1.0, 1, report=str(tmp_path / "bad.csv"))
    assert f"{copy}: damaged" in capsys.readouterr().out
    assert f',,"{copy}: damaged' in (tmp_path / "bad.csv").read_text()


def test_interrupted_verify_resumes(copy, monkeypatch, capsys):
    damage(copy, 3)
    monkeypatch.setattr(inspect, "REMEMBER_SECONDS", 0.0)
    real = inspect.read_verified
    seen: list[int] = []

    def interrupted(opened, file, index, *, decode):
        if index == 8 and not seen:
            seen.append(index)
            raise KeyboardInterrupt
        return real(opened, file, index, decode=decode)

    monkeypatch.setattr(inspect, "read_verified", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataset.verify(copy, 1.0, 1)

    def counted(opened, file, index, *, decode):
        seen.append(index)
        return real(opened, file, index, decode=decode)

    monkeypatch.setattr(inspect, "read_verified", counted)
    assert not dataset.verify(copy, 1.0, 1)
    shown = capsys.readouterr().out
    assert (
        "continuing after 8 of 12" in shown
        and "1 of 12 images damaged" in shown
        and seen == [8, 8, 9, 10, 11]
    )
    assert list(copy.parent.glob(".*")) == []
    # The changed time makes it another file, so that the verification starts from the beginning
    os.utime(copy)
    (copy.parent / f".{copy.name}.verify").write_text(
        json.dumps({"bytes": 1, "done": 8, "bad": []})
    )
    assert not dataset.verify(copy, 1.0, 1)


def test_verify_sets_the_exit_status(copy, call_program):
    assert (
        call_program("write_ffcv.py", "verify", f"--cfg.path={copy}", "--cfg.num_workers=2")[0] == 0
    )
    damage(copy, 0)
    status, shown, _ = call_program("write_ffcv.py", "verify", f"--cfg.path={copy}")
    assert status == 1 and "sample 0" in shown
    with open(copy, "r+b") as file:
        file.truncate(copy.stat().st_size - 1000)
    status, shown, errors = call_program("write_ffcv.py", "verify", f"--cfg.path={copy}")
    assert status == 1 and f"{copy}: " in shown and not errors
    assert call_program("write_ffcv.py", "verify", "--cfg.path=/nowhere.beton")[0] == 2
    status, _, errors = call_program("write_ffcv.py", "verfy")
    assert status == 2 and "did you mean verify?" in errors


# ---- merge, subset, shard ------------------------------------------------------------------------


def test_merged_shards_equal_the_file(written, tmp_path):
    parts = dataset.shard(str(written / "train.beton"), str(tmp_path / "parts"), 5, num_workers=2)
    assert [len(part) for part in parts] == [3, 3, 2, 2, 2] and all(
        part.about.classes == WNIDS for part in parts
    )
    assert parts[0].path.name == "train-00000-of-00005.beton"
    merged = dataset.merge([str(part.path) for part in parts], str(tmp_path / "merged.beton"), 2)
    whole = read_beton(written / "train.beton")
    assert contents(merged.path) == expected("train") and merged.names() == whole.names()
    assert (merged.labels == whole.labels).all() and (merged.extras == whole.extras).all()
    assert merged.about.settings == whole.about.settings and merged.about.source["split"] == "train"
    with pytest.raises(InputError, match="`shards`=13"):
        dataset.shard(str(written / "train.beton"), str(tmp_path / "many"), 13, num_workers=2)


def test_merge_matches_classes_by_name(written, tmp_path):
    first = dataset.subset(
        str(written / "train.beton"),
        str(tmp_path / "a.beton"),
        num_workers=1,
        classes=f"{WNIDS[2]},{WNIDS[0]}",
    )
    second = dataset.subset(
        str(written / "val.beton"), str(tmp_path / "b.beton"), num_workers=1, classes="1"
    )
    assert (
        first.about.classes == [WNIDS[0], WNIDS[2]]
        and second.about.classes == [WNIDS[1]]
        and set(first.labels) == {0, 1}
    )
    merged = dataset.merge([str(first.path), str(second.path)], str(tmp_path / "c.beton"), 2)
    assert merged.about.classes == WNIDS and merged.about.titles[2].startswith("great white shark")
    merged_pairs = [pair for pair in expected("train") if pair[0] != 1] + [
        pair for pair in expected("val") if pair[0] == 1
    ]
    assert contents(merged.path) == sorted(merged_pairs)


def test_merge_adds_checksums_and_entry_points_to_a_stock_file(written, tmp_path):
    path = stock(written / "train.beton", tmp_path / "stock.beton")
    merged = dataset.merge([str(path)], str(tmp_path / "sound.beton"), 2)
    assert (merged.extras == read_beton(written / "train.beton").extras).all() and contents(
        merged.path
    ) == expected("train")
    assert merged.about.classes == ["0", "1", "2"]
    # The stock file has no class names: its class numbers mean those of the other file
    both = dataset.merge([str(written / "val.beton"), str(path)], str(tmp_path / "both.beton"), 2)
    assert both.about.classes == WNIDS and contents(both.path) == sorted(
        expected("train") + expected("val")
    )


def test_subset_by_samples_and_classes(written, tmp_path):
    def take(**chosen):
        name = tmp_path / f"{len(list(tmp_path.iterdir()))}.beton"
        return dataset.subset(str(written / "train.beton"), str(name), num_workers=1, **chosen)

    names = read_beton(written / "train.beton").names()
    assert take(samples="0-2,5").names() == [names[0], names[1], names[2], names[5]]
    assert np.bincount(take(per_class=2).labels).tolist() == [2, 2, 2]
    both = take(classes="1", samples="3-6")
    assert both.names() == [names[4], names[5], names[6]] and both.about.classes == [WNIDS[1]]
    for wrong, message in (
        ({"samples": "12"}, "`samples`=12"),
        ({"samples": "x"}, "`samples`=x"),
        ({"classes": "shark"}, "no class 'shark'"),
        ({"classes": "0", "samples": "11"}, "no sample matches"),
    ):
        with pytest.raises(InputError, match=message):
            take(**wrong)


def test_damaged_sample_is_not_copied(copy, tmp_path):
    damage(copy, 5)
    with pytest.raises(InputError, match="sample 5 is damaged"):
        dataset.merge([str(copy)], str(tmp_path / "merged.beton"), 2)
    assert not (tmp_path / "merged.beton").exists()
    with pytest.raises(InputError, match="one of the files to read"):
        dataset.merge([str(copy)], str(copy), 2)
    with pytest.raises(InputError, match="sample 5 is damaged"):
        dataset.export(str(copy), str(tmp_path / "out"), 2)


# ---- concat --------------------------------------------------------------------------------------


def test_append_keeps_existing_images_in_place(copy, written, tmp_path):
    before, old = read_beton(copy), copy.read_bytes()
    file = dataset.concat(str(copy), [str(written / "val.beton")], 2)
    assert contents(copy) == sorted(expected("train") + expected("val"))
    assert (file.pointers[:12] == before.pointers).all() and (
        file.labels[:12] == before.labels
    ).all()
    assert file.names() == before.names() + read_beton(written / "val.beton").names()
    first = int(before.pointers.min())
    assert copy.read_bytes()[first : len(old)] == old[first:]
    assert (
        file.about.counts["kept"] == 18
        and file.about.source["images"] == 18
        and dataset.verify(copy, 1.0, 1)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["train.beton"]
    gap = slice(beton.front_bytes(18), first)
    assert not any(copy.read_bytes()[gap])
    with pytest.raises(InputError, match="would contain .* twice; 6 of the 6.*command subset"):
        dataset.concat(str(copy), [str(written / "val.beton")], 2)


def test_append_moves_images_to_make_room_for_the_table(copy, written, tmp_path, monkeypatch):
    """The table of many samples is longer than the free part of the file's first page."""
    for module in (beton, beton.layout, append, dataset.writer):
        monkeypatch.setattr(module, "PAGE_BYTES", 4096 * 16)
    small = dataset.subset(
        str(written / "train.beton"), str(tmp_path / "small.beton"), num_workers=1
    )
    many = tmp_path / "many"
    for number in range(3000):
        put(
            many / "train" / WNIDS[number % 3] / f"new_{number:04d}.jpg", sources.jpeg(0, 0, 8)
        ) if number < 3 else None
    (many / "val").mkdir()
    one = sources.jpeg(0, 0, 8)
    source = dataset.sources.Source(
        classes=WNIDS,
        names=[f"new_{number}" for number in range(3000)],
        labels=np.arange(3000) % 3,
        read=lambda index: one,
    )
    big = dataset.write_beton(
        tmp_path / "big.beton",
        source,
        store=dataset.storing(source, Encoding()),
        settings={},
        num_workers=2,
    )
    old = small.pointers.copy()
    file = dataset.concat(str(tmp_path / "small.beton"), [str(big.path)], 2)
    moved = file.pointers[:12] != old
    assert 0 < moved.sum() <= 12 and len(file) == 3012 and dataset.verify(file.path, 1.0, 2)
    assert [pair for pair in contents(file.path) if pair[1] != one] == expected("train")
    assert TrainLoader(file.path, batch_size=4, resolution=32, num_workers=1).steps_per_epoch == 753


def test_append_numbers_new_classes_after_the_old_ones(written, tmp_path):
    first = dataset.subset(
        str(written / "train.beton"), str(tmp_path / "a.beton"), num_workers=1, classes="1,2"
    )
    file = dataset.concat(str(first.path), [str(written / "val.beton")], 1)
    assert file.about.classes == [WNIDS[1], WNIDS[2], WNIDS[0]] and np.bincount(
        file.labels
    ).tolist() == [6, 6, 2]


@pytest.mark.parametrize("stop_at", ["images", "tail", "front", "rename"])
def test_killed_append_is_recovered_by_the_next_call(copy, written, monkeypatch, stop_at, capsys):
    """Simulates that the process is killed at this point: nothing after it is executed."""

    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    before = copy.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(append._Append, "recover", lambda self, num_workers: {})
        if stop_at == "images":
            patched.setattr(append.Pages, "add", kill)
        elif stop_at == "tail":
            patched.setattr(append.beton, "write_structure", kill)
        elif stop_at == "front":
            real = beton.write_structure

            def half(path, end, *, before_front, **parts):
                def keep_and_die(front):
                    before_front(front)
                    with open(path, "r+b") as file:
                        file.write(front[: len(front) // 2])
                    raise Killed

                real(path, end, **parts, before_front=keep_and_die)

            patched.setattr(append.beton, "write_structure", half)
        else:
            patched.setattr(append, "read_back", kill)
        with pytest.raises(Killed):
            dataset.concat(str(copy), [str(written / "val.beton")], 1)
    assert not copy.exists()
    with pytest.raises(InputError, match="append.*interrupted"):
        read_beton(copy)
    if stop_at in ("images", "tail"):
        # The next append restores the file, even if it fails
        with pytest.raises(InputError, match="cannot be read|no such"):
            dataset.concat(str(copy), ["/nowhere.beton"], 1)
        assert copy.read_bytes() == before
    dataset.concat(str(copy), [str(written / "val.beton")], 1)
    assert contents(copy) == sorted(expected("train") + expected("val")) and dataset.verify(
        copy, 1.0, 1
    )
    assert list(copy.parent.glob(".*")) == []


def test_samples_are_not_appended_twice_in_one_call(copy, written):
    before, val = copy.read_bytes(), str(written / "val.beton")
    with pytest.raises(InputError, match="would contain .* twice; 6 of the 12"):
        dataset.concat(str(copy), [val, val], 1)
    assert copy.read_bytes() == before


def test_spaces_between_listed_files_are_ignored(written, tmp_path, call_program):
    paths = f"{written / 'train.beton'}, {written / 'val.beton'}"
    status, _, _ = call_program(
        "write_ffcv.py", "merge", f"--cfg.paths={paths}", f"--cfg.write_path={tmp_path / 'x.beton'}"
    )
    assert status == 0 and len(read_beton(tmp_path / "x.beton")) == 18


def test_failed_append_leaves_the_file_unchanged(copy, written, tmp_path):
    before = copy.read_bytes()
    other = tmp_path / "val.beton"
    other.write_bytes((written / "val.beton").read_bytes())
    damage(other, 3)
    with pytest.raises(InputError, match="sample 3 is damaged"):
        dataset.concat(str(copy), [str(other)], 1)
    path = stock(written / "val.beton", tmp_path / "stock.beton")
    with pytest.raises(InputError, match="another program wrote it"):
        dataset.concat(str(path), [str(copy)], 1)
    assert copy.read_bytes() == before and list(tmp_path.glob(".*")) == []


# ---- export, estimate, show ----------------------------------------------------------------------


def test_exported_jpegs_equal_the_source_bytes(written, tmp_path):
    dataset.export(str(written / "train.beton"), str(tmp_path / "out"), 2)
    exported = {
        str(path.relative_to(tmp_path / "out")): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert exported == {f"{wnid}/{name}": data for wnid, name, data in pictures("train")}
    with pytest.raises(InputError, match="exists"):
        dataset.export(str(written / "train.beton"), str(tmp_path / "out"), 2)


def test_exported_raw_images_are_lossless_pngs(tmp_path):
    sources.folders(tmp_path / "in")
    write_splits(
        Place(dataset="imagenet", data_dir=str(tmp_path / "in")),
        str(tmp_path / "val.beton"),
        split="val",
        num_workers=1,
        encoding=Encoding(mode="raw"),
    )
    dataset.export(str(tmp_path / "val.beton"), str(tmp_path / "out"), 1)
    for wnid, name, data in pictures("val"):
        exported = Image.open(tmp_path / "out" / wnid / name.replace(".JPEG", ".png"))
        assert np.array_equal(
            np.asarray(exported), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        )


def test_export_creates_the_folders_above(written, tmp_path):
    dataset.export(written / "val.beton", str(tmp_path / "new" / "out"), 1)
    assert len(list((tmp_path / "new" / "out").rglob("*.*"))) == 6
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_exported_names_stay_inside_the_folder(tmp_path):
    names = [
        "../../evil.jpg",
        "/etc/passwd",
        "..",
        "a/b.jpg",
        "c/b.jpg",
        "",
        ".hidden.jpg",
        "x" * 300 + ".jpg",
    ]
    source = dataset.sources.Source(
        classes=["../up", "..", "a/b"],
        names=names,
        labels=np.arange(len(names)) % 3,
        read=lambda index: sources.jpeg(0, index),
    )
    dataset.write_beton(
        tmp_path / "x.beton",
        source,
        store=dataset.storing(source, Encoding()),
        settings={},
        num_workers=1,
    )
    dataset.export(str(tmp_path / "x.beton"), str(tmp_path / "deep" / "out"), 1) if (
        tmp_path / "deep"
    ).mkdir() is None else None
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1 + len(names) and all(
        (tmp_path / "deep" / "out") in path.parents for path in files if path.suffix != ".beton"
    )
    assert sorted(path.read_bytes() for path in files if path.suffix != ".beton") == sorted(
        sources.jpeg(0, index) for index in range(len(names))
    )


def test_interrupted_export_is_hidden_and_resumes(written, tmp_path, monkeypatch):
    real = inspect.read_verified

    def interrupted(opened, file, index, *, decode):
        if index == 6:
            raise KeyboardInterrupt
        return real(opened, file, index, decode=decode)

    with monkeypatch.context() as patched:
        patched.setattr(inspect, "read_verified", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dataset.export(str(written / "train.beton"), str(tmp_path / "out"), 1)
    assert not (tmp_path / "out").exists()
    half = next((tmp_path / ".out.part").rglob("*.JPEG"))
    half.write_bytes(half.read_bytes()[:100])
    dataset.export(str(written / "train.beton"), str(tmp_path / "out"), 1)
    assert (
        len(list((tmp_path / "out").rglob("*.JPEG"))) == 12
        and len(half.parts)
        and not (tmp_path / ".out.part").exists()
    )
    assert (tmp_path / "out" / half.relative_to(tmp_path / ".out.part")).stat().st_size > 100


def test_estimate_is_within_half_of_the_size(pictures, tmp_path, call_program):
    """For the 96 training images of the suite."""
    status, shown, _ = call_program(
        "write_ffcv.py",
        "estimate",
        f"--cfg.data_dir={pictures}",
        "--cfg.num_workers=2",
        "--cfg.write_mode=raw",
        "--cfg.split=train",
    )
    assert status == 0 and "estimated from 96 of 96 images" in shown
    status, shown, _ = call_program(
        "write_ffcv.py",
        f"--cfg.data_dir={pictures}",
        f"--cfg.write_path={tmp_path}/x.beton",
        "--cfg.num_workers=2",
        "--cfg.write_mode=raw",
        "--cfg.split=train",
    )
    assert status == 0
    source = open_sources(Place(dataset="imagenet", data_dir=str(pictures)), ["train"])["train"]
    needed = dataset._estimate(
        "train", source, encoding=Encoding(mode="raw"), num_workers=2, chunk_size=100
    )
    assert abs(needed / (tmp_path / "x.beton").stat().st_size - 1) < 0.5


def test_insufficient_space_is_an_error_before_writing(pictures, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(InputError, match="about 0.02 GB are needed and 0.00 GB are free"):
        write_splits(
            Place(dataset="imagenet", data_dir=str(pictures)), str(tmp_path / "out"), num_workers=2
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_contact_sheet_equals_the_loaders_output(written, tmp_path, call_program):
    """Its cells are the stored pixels, and the loader's output for the sample in each epoch."""
    from rsb_ffcv.commands import show

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {arch: resnet18}\nresolution: {min_res: 192, max_res: 192}\naugment: "
        "{rand_augment: rand-m7-mstd0.5-inc1, "
        "erase_prob: 0.5}\ntraining: {epochs: 9, seed: 5}\n"
    )
    status, shown, errors = call_program(
        "write_ffcv.py",
        "show",
        f"--cfg.path={written}/train.beton",
        f"--cfg.write_path={tmp_path}/sheet.png",
        "--cfg.samples=1,9",
        f"--cfg.recipe={recipe}",
        "--cfg.epochs=3",
    )
    assert status == 0, errors
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    cell, step = show.CELL, show.CELL + show.GAP
    loader = TrainLoader(
        written / "train.beton",
        batch_size=4,
        resolution=192,
        num_workers=1,
        seed=5,
        rand_augment="rand-m7-mstd0.5-inc1",
    )
    epochs = [
        np.concatenate([images.numpy() for images, *_ in loader.epoch(epoch)]) for epoch in range(3)
    ]
    erased = 0
    for row in range(2):
        for epoch in range(3):
            shown = sheet[show.GAP + row * (step + show.LABEL) :, show.GAP + (1 + epoch) * step :][
                :cell, :cell
            ]
            same = (np.abs(epochs[epoch].astype(int) - shown).max(-1) <= 1).mean((1, 2))
            assert same.max() > 0.6
            erased += same.max() < 1
    assert 0 < erased < 6
    for arguments, message in (
        (["--cfg.samples=1", "--cfg.classes=1"], "give one of them"),
        (["--cfg.classes=x"], "no class 'x'"),
        (["--cfg.samples=99"], "cfg.samples=99"),
        (["--cfg.recipe=/nowhere.yaml"], "error: cfg.recipe=/nowhere.yaml: cannot be read"),
        (["--cfg.epochs=3"], "cfg.epochs=3: are the epochs of a recipe; give cfg.recipe"),
        ([f"--cfg.write_path={tmp_path}/x.jpg"], "x.jpg: must end in .png"),
        ([f"--cfg.write_path={tmp_path}/x"], "/x: must end in .png"),
    ):
        status, _, errors = call_program(
            "write_ffcv.py",
            "show",
            f"--cfg.path={written}/train.beton",
            f"--cfg.write_path={tmp_path}/x.png",
            *arguments,
        )
        assert status == 2 and message in errors and not list(tmp_path.glob("x*"))


def test_columns_of_a_contact_sheet_count_epochs_from_1(
    written, tmp_path, call_program, monkeypatch
):
    from rsb_ffcv.commands import show

    drawn, draw = [], show._sheet

    def kept(rows, texts):
        drawn.extend(texts)
        return draw(rows, texts)

    monkeypatch.setattr(show, "_sheet", kept)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {arch: resnet18}\ntraining: {epochs: 1}\n")
    status, _, errors = call_program(
        "write_ffcv.py",
        "show",
        f"--cfg.path={written}/train.beton",
        f"--cfg.write_path={tmp_path}/x.png",
        "--cfg.samples=1",
        f"--cfg.recipe={recipe}",
    )
    assert status == 0, errors
    assert drawn[0][1:] == [f"epoch {number}" for number in (1, 2, 3, 4, 5)]


def test_contact_sheet_of_classes_has_a_row_per_class(written, tmp_path, call_program):
    status, shown, _ = call_program(
        "write_ffcv.py",
        "show",
        f"--cfg.path={written}/train.beton",
        f"--cfg.write_path={tmp_path}/x.png",
        f"--cfg.classes={WNIDS[0]},2",
        "--cfg.count=3",
    )
    assert status == 0 and "6 images" in shown
    assert Image.open(tmp_path / "x.png").size == (3 * 196 + 4, 2 * 228 + 4)


# ---- recovery, links, forged files ---------------------------------------------------------------


def test_recovered_append_is_verified_before_it_is_visible(copy, written, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(append, "read_back", kill)
        with pytest.raises(Killed):
            dataset.concat(str(copy), [str(written / "val.beton")], 1)
    hidden = copy.with_name(".train.beton.appending")
    file = read_beton(hidden)
    whole = hidden.read_bytes()
    with open(hidden, "r+b") as opened:
        opened.seek(int(file.pointers[14]) + 300)
        opened.write(b"\0\0\0\0")
    with pytest.raises(InputError, match="sample 14 is damaged.*just after it was written"):
        dataset.concat(str(copy), [str(written / "val.beton")], 1)
    assert not copy.exists()
    hidden.write_bytes(whole)
    with monkeypatch.context() as patched:
        patched.setattr(append._Append, "finish", kill)  # killed between the rename and the end
        with pytest.raises(Killed):
            dataset.concat(str(copy), [str(written / "val.beton")], 1)
    assert len(dataset.concat(str(copy), [str(written / "val.beton")], 1)) == 18


def test_append_through_a_link_changes_its_target(copy, written, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.beton"
    link.symlink_to(copy)
    assert len(dataset.concat(str(link), [str(written / "val.beton")], 1)) == 18
    assert link.is_symlink() and len(read_beton(copy)) == 18


def test_repeated_appends_record_the_settings_of_each_part(written, tmp_path):
    sources.folders(tmp_path / "in")
    for number, quality in enumerate((90, 80, 70)):
        write_splits(
            Place(dataset="imagenet", data_dir=str(tmp_path / "in")),
            str(tmp_path / f"{number}.beton"),
            split="val",
            num_workers=1,
            encoding=Encoding(pass_through=False, jpeg_quality=quality),
        )
        target = read_beton(tmp_path / f"{number}.beton")
        names = [f"{number}/{name}" for name in target.names()]
        source = dataset.sources.Source(
            classes=WNIDS,
            names=names,
            labels=target.labels,
            read=lambda index: sources.jpeg(0, index),
        )
        dataset.write_beton(
            tmp_path / f"{number}_named.beton",
            source,
            store=dataset.storing(source, Encoding()),
            settings=target.about.settings,
            num_workers=1,
        )
    for number in (1, 2):
        file = dataset.concat(
            str(tmp_path / "0_named.beton"), [str(tmp_path / f"{number}_named.beton")], 1
        )
    assert [part["jpeg_quality"] for part in file.about.settings["of_parts"]] == [90, 80, 70]


def test_export_refuses_the_partial_export_of_another_file(written, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(inspect, "read_verified", stop)
        with pytest.raises(KeyboardInterrupt):
            dataset.export(str(written / "train.beton"), str(tmp_path / "out"), 1)
    with pytest.raises(InputError, match="an unfinished export of another file"):
        dataset.export(str(written / "val.beton"), str(tmp_path / "out"), 1)
    dataset.export(str(written / "train.beton"), str(tmp_path / "out"), 1)
    assert list(tmp_path.glob(".*")) == []


def test_many_equal_names_export_in_linear_time(monkeypatch):
    made, plain = [], inspect.Path

    def counted(*parts):
        made.append(parts)
        return plain(*parts)

    monkeypatch.setattr(inspect, "Path", counted)
    file = type(
        "File",
        (),
        {
            "num_classes": 1,
            "class_name": lambda self, label: "a",
            "names": lambda self: [f"{i}/rgb.jpg" for i in range(5000)],
            "labels": np.zeros(5000, int),
            "modes": np.zeros(5000, int),
        },
    )()
    # One attempt for the first name, two for each of the others
    assert len(set(inspect._places(file))) == 5000 and len(made) == 2 * 5000 - 1


def test_report_or_sheet_cannot_overwrite_the_file(copy, call_program):
    before = copy.read_bytes()
    for arguments in (("verify", f"--cfg.report={copy}"), ("show", f"--cfg.write_path={copy}")):
        status, _, errors = call_program("write_ffcv.py", *arguments, f"--cfg.path={copy}")
        assert status == 2 and "is the file itself" in errors
    assert copy.read_bytes() == before


def hostile(path, target, change):
    """Writes a copy whose description is changed by someone who can compute checksums."""
    whole = bytearray(path.read_bytes())
    table = int(np.frombuffer(whole, beton.HEADER, 1)["alloc_table_ptr"][0])
    at = table - beton.TRAILER.itemsize
    trailer = np.frombuffer(whole, beton.TRAILER, 1, at).copy()
    about = json.loads(whole[at - int(trailer["about_bytes"][0]) : at])
    text = change(about)
    start = at - int(trailer["about_bytes"][0])
    part = np.frombuffer(text, np.uint8)
    header = np.frombuffer(whole[:24], beton.HEADER, 1).copy()
    header["alloc_table_ptr"] = table + len(text) - int(trailer["about_bytes"][0])
    whole[:24] = header.tobytes()
    rows = np.frombuffer(whole, beton.ALLOCATION, -1, table).copy()
    trailer["about_bytes"], trailer["about"] = len(text), native.checksum(part)
    trailer["structure"] = beton.structure_checksum(
        bytes(whole[: beton.front_bytes(int(header["num_samples"][0]))]), rows
    )
    trailer["trailer"] = native.checksum(trailer.view(np.uint8)[:-8])
    target.write_bytes(whole[:start] + text + trailer.tobytes() + rows.tobytes())
    return target


def test_description_in_a_forged_file_is_checked(written, tmp_path):
    def with_part(name, value):
        return lambda about: json.dumps({**about, name: value}).encode()

    path = written / "val.beton"
    assert (
        read_beton(
            hostile(path, tmp_path / "same.beton", lambda about: json.dumps(about).encode())
        ).about
        == read_beton(path).about
    )
    for number, change in enumerate(
        (
            lambda about: b"[" * 100000,
            lambda about: b"{}",
            lambda about: b"nothing",
            with_part("classes", ["a", "a", "b"]),
            with_part("classes", ["\ud800", "a", "b"]),
            with_part("classes", [1, 2, 3]),
            with_part("counts", {"kept": "x"}),
            with_part("source", {"split": []}),
            with_part("settings", {"max_resolution": "x"}),
            with_part("source", 1),
            with_part("classes", ["a"]),
        )
    ):
        with pytest.raises(InputError, match="its description cannot be read|damaged: sample"):
            read_beton(hostile(path, tmp_path / f"{number}.beton", change))
