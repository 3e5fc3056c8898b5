"""Conversion of images to .beton: correct colours, the same bytes each time, and no partial file
after an error."""

import subprocess
import sys
import textwrap
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

from rsb_ffcv import InputError
from rsb_ffcv.beton import JPG, RAW, read_beton
from rsb_ffcv.config import write as options
from rsb_ffcv.dataset import Encoding, Place, write_splits, writer
from rsb_ffcv.dataset.picture import load_rgb
from rsb_ffcv.dataset.readers import READERS
from rsb_ffcv.dataset.synthetic import CLASSES, draw_picture, make_demo_images
from tests.conftest import ROOT

COLOUR = (200, 120, 40)


def stored(mode: str, path):
    """An image of the given mode with known RGB values: (path, RGB of every pixel, tolerance)."""
    picture = Image.new("RGB", (32, 24), COLOUR)
    grey = round(0.299 * COLOUR[0] + 0.587 * COLOUR[1] + 0.114 * COLOUR[2])
    if mode == "grey":
        picture.convert("L").save(path / "x.png")
        return path / "x.png", (grey,) * 3, 1
    if mode == "cmyk":
        picture.convert("CMYK").save(path / "x.jpg", quality=98)
        return path / "x.jpg", COLOUR, 4
    if mode == "palette":
        picture.convert("P", palette=Image.Palette.ADAPTIVE).save(path / "x.png")
        return path / "x.png", COLOUR, 1
    if mode == "palette with transparency":
        picture.convert("P", palette=Image.Palette.ADAPTIVE).save(path / "x.png", transparency=0)
        return path / "x.png", (255, 255, 255), 1
    if mode == "alpha":
        Image.new("RGBA", (32, 24), (*COLOUR, 128)).save(path / "x.png")
        return path / "x.png", tuple(round((c * 128 + 255 * 127) / 255) for c in COLOUR), 1
    if mode == "16 bit":
        Image.fromarray(np.full((24, 32), 40000, np.uint16)).save(path / "x.png")
        return path / "x.png", (round(40000 / 257),) * 3, 1
    if mode == "1 bit":
        Image.new("1", (32, 24), 1).save(path / "x.png")
        return path / "x.png", (255, 255, 255), 0
    raise AssertionError(mode)


@pytest.mark.parametrize(
    "mode", ["grey", "cmyk", "palette", "palette with transparency", "alpha", "16 bit", "1 bit"]
)
def test_every_image_mode_converts_to_correct_rgb(mode, tmp_path):
    path, colour, tolerance = stored(mode, tmp_path)
    pixels = load_rgb(path.read_bytes(), str(path))
    assert pixels.shape == (24, 32, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - colour).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # a white quarter, top left
    turn = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: lambda x: np.rot90(x, 3),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(turn(upright))).save(
        tmp_path / "x.jpg", quality=100, exif=exif
    )
    pixels = load_rgb((tmp_path / "x.jpg").read_bytes(), "x")
    assert pixels.shape == upright.shape and np.abs(pixels.astype(int) - upright).mean() < 3


def write(pictures, target, num_workers=2, chunk_size=100, subset=-1, **encoding):
    write_splits(
        Place(dataset="imagenet", data_dir=str(pictures)),
        str(target),
        split="",
        subset=subset,
        num_workers=num_workers,
        chunk_size=chunk_size,
        encoding=Encoding(**encoding),
    )
    return read_beton(target / "train.beton")


def test_bytes_are_independent_of_the_number_of_threads(pictures, tmp_path):
    for workers in (1, 4):
        write(
            pictures, tmp_path / str(workers), num_workers=workers, chunk_size=3, mode="proportion"
        )
    for name in ("train.beton", "val.beton"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes()


def test_write_modes_store_jpg_or_raw(pictures, tmp_path):
    assert (write(pictures, tmp_path / "jpg", mode="jpg").modes == JPG).all()
    assert (write(pictures, tmp_path / "raw", mode="raw").modes == RAW).all()
    smart = write(pictures, tmp_path / "smart", mode="smart", smart_threshold=12000)
    raw_bytes = smart.heights.astype(int) * smart.widths * 3
    assert ((smart.modes == RAW) == (raw_bytes <= 12000)).all() and 0 < (
        smart.modes == RAW
    ).sum() < 96
    share = (
        write(pictures, tmp_path / "p", mode="proportion", compress_probability=0.25).modes == JPG
    ).mean()
    assert 0.1 < share < 0.4


def test_raw_mode_stores_exact_pixels(pictures, tmp_path):
    file = write(pictures, tmp_path, mode="raw")
    data = np.fromfile(file.path, np.uint8)
    first = data[file.pointers[0] : file.pointers[0] + file.sizes[0]].reshape(
        file.heights[0], file.widths[0], 3
    )
    assert np.array_equal(
        first, load_rgb((pictures / "train" / "amber" / "0.jpg").read_bytes(), "")
    )


def test_longer_side_is_limited_and_small_images_are_unchanged(pictures, tmp_path):
    file = write(pictures, tmp_path, max_resolution=60)
    longer = np.maximum(file.heights, file.widths)
    whole = write(pictures, tmp_path / "whole")
    assert (
        longer.max() == 60
        and (longer == np.minimum(60, np.maximum(whole.heights, whole.widths))).all()
    )


def test_subset_limits_the_number_of_images(pictures, tmp_path):
    assert len(write(pictures, tmp_path, subset=10)) == 10


def test_images_do_not_cross_ffcv_pages(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for number in range(12):  # 1.2 MB each: six fit in a page of 8 MiB
            Image.fromarray(rng.integers(0, 256, (500, 800, 3), np.uint8)).save(
                tmp_path / split / "a" / f"{number}.png"
            )
    file = write(tmp_path, tmp_path / "out", mode="raw")
    page = 1 << 23
    assert (file.pointers // page == (file.pointers + file.sizes - np.uint64(1)) // page).all()
    assert file.pointers[-1] // page > file.pointers[0] // page


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_does_not_affect_the_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A], exif[0x8298] = 6, "camera", 72.0, "somebody"
    Image.new("RGB", (32, 24), COLOUR).save(tmp_path / "x.jpg", quality=98, exif=exif)
    whole = bytearray((tmp_path / "x.jpg").read_bytes())
    start, length = whole.index(b"Exif") + 6, len(exif.tobytes()) - 6
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[start + int(rng.integers(0, length))] = int(rng.integers(0, 256))
        pixels = load_rgb(bytes(damaged), "y.jpg")
        assert (
            sorted(pixels.shape) == [3, 24, 32] and np.abs(pixels.astype(int) - COLOUR).max() <= 6
        )


@pytest.mark.parametrize(
    "name, file",
    [
        ("val_500.ffcv", "val_500.ffcv"),
        ("folder/", "folder/val.beton"),
        ("x.beton", "x.beton"),
        ("plain", "plain"),
    ],
)
def test_with_a_split_write_path_is_the_file(pictures, tmp_path, name, file):
    write_splits(
        Place(dataset="imagenet", data_dir=str(pictures)),
        f"{tmp_path}/{name}",
        split="val",
        num_workers=1,
    )
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [
        file
    ]


def test_single_split_is_checked_against_the_classes_of_both(tmp_path):
    source = make(tmp_path)
    (source / "val" / "a" / "1.jpg").unlink()
    (source / "val" / "a").rmdir()
    with pytest.raises(InputError, match="same classes .only in one: a"):
        write_splits(
            Place(dataset="imagenet", data_dir=str(source)),
            str(tmp_path / "val.beton"),
            split="val",
            num_workers=1,
        )


def test_many_classes_are_summarized(tmp_path, capsys):
    """Those that lack images are named."""
    for label in range(40):
        folder = tmp_path / "in" / "train" / f"c{label:02d}"
        folder.mkdir(parents=True)
        for number in range(1 + label % 3):
            pixels = np.full((8, 8, 3), 5 * label + number, np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "in" / "train" / "c07" / "1.png").write_bytes(b"damaged")
    write_splits(
        Place(dataset="imagenet", data_dir=str(tmp_path / "in")),
        str(tmp_path / "a.beton"),
        split="train",
        num_workers=1,
        skip=True,
        max_skipped=0.1,
    )
    assert "images per class: 1 to 3, c07 1 of 2\n" in capsys.readouterr().out


def test_unwritable_demo_folder_is_an_error(tmp_path):
    with pytest.raises(
        InputError, match="/dev/null/x/train: cannot be .*; choose another `data_dir`"
    ):
        write_splits(Place(dataset="demo", data_dir="/dev/null/x"), str(tmp_path), num_workers=1)


def make(tmp_path, *, skip=()):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "in" / split / name).mkdir(parents=True)
            if f"{split}/{name}" not in skip:
                Image.new("RGB", (40, 40), COLOUR).save(tmp_path / "in" / split / name / "1.jpg")
    return tmp_path / "in"


@pytest.mark.parametrize(
    "damage, message",
    [
        ("missing folder", "in is not a folder"),
        ("empty folder", "`data_dir`=.*in: has no folder 'train' .it contains no folders.;"),
        ("no classes", "has no class folder"),
        ("class without images", "class 'b' has no image"),
        ("missing split", "`data_dir`=.*in: has no folder 'val' .it contains the folders train.;"),
        ("unreadable picture", "2.jpg: not a readable picture"),
        ("truncated picture", "2.jpg: not a readable picture"),
        ("empty file", "2.jpg: not a readable picture"),
        ("other classes in val", "do not have the same classes"),
    ],
)
def test_invalid_source_is_named_and_leaves_no_partial_file(tmp_path, damage, message):
    source = make(tmp_path, skip=("train/b",) if damage == "class without images" else ())
    picture = source / "val" / "b" / "2.jpg"
    if damage == "missing folder":
        source = source.with_name("absent") / "in"
    elif damage == "empty folder":
        source = tmp_path / "other" / "in"
        source.mkdir(parents=True)
    elif damage == "no classes":
        source = tmp_path / "other" / "in"
        (source / "train").mkdir(parents=True)
    elif damage == "missing split":
        (source / "val").rename(tmp_path / "moved")
    elif damage == "unreadable picture":
        picture.write_text("not a picture")
    elif damage == "truncated picture":
        whole = (source / "val" / "b" / "1.jpg").read_bytes()
        picture.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty file":
        picture.touch()
    elif damage == "other classes in val":
        (source / "val" / "b").rename(source / "val" / "c")
    with pytest.raises(InputError, match=message):
        write_splits(
            Place(dataset="imagenet", data_dir=str(source)), str(tmp_path / "out"), num_workers=2
        )
    left = (
        [path.name for path in (tmp_path / "out").rglob("*")] if (tmp_path / "out").exists() else []
    )
    assert {name for name in left if not name.startswith(".")} <= {"train.beton"}


def test_durations_are_readable():
    from rsb_ffcv import duration

    assert [duration(seconds) for seconds in (0.4, 1.2, 200, 7500)] == [
        "less than 1 s",
        "1 s",
        "3 min 20 s",
        "2 h 5 min",
    ]


def test_unwritable_target_is_named(pictures, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="`write_path`=.*file"):
        write_splits(
            Place(dataset="imagenet", data_dir=str(pictures)),
            str(tmp_path / "file" / "out"),
            num_workers=1,
        )


def test_image_larger_than_a_page_is_named(tmp_path):
    source = make(tmp_path)
    Image.new("RGB", (2000, 2000)).save(source / "train" / "a" / "huge.png")
    with pytest.raises(InputError, match="huge.png: 12000000 bytes"):
        write_splits(
            Place(dataset="imagenet", data_dir=str(source)),
            str(tmp_path / "out"),
            num_workers=1,
            encoding=Encoding(mode="raw"),
        )
    assert not [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]


def test_tiny_imagenet_layout_is_read(tmp_path):
    (tmp_path / "wnids.txt").write_text("n2\nn1\n")
    for name in ("n1", "n2"):
        (tmp_path / "train" / name / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64), COLOUR).save(
            tmp_path / "train" / name / "images" / f"{name}_0.JPEG"
        )
    (tmp_path / "val" / "images").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (64, 64), COLOUR).save(tmp_path / "val" / "images" / f"val_{number}.JPEG")
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text(
        "val_0.JPEG\tn2\t0\t0\t1\t1\nval_1.JPEG\tn1\t0\t0\t1\t1\nval_2.JPEG\tn2\t0\t0\t1\t1\n"
    )
    write_splits(
        Place(dataset="tiny_imagenet", data_dir=str(tmp_path)), str(tmp_path / "out"), num_workers=1
    )
    assert read_beton(tmp_path / "out" / "train.beton").labels.tolist() == [0, 1]
    assert read_beton(tmp_path / "out" / "val.beton").labels.tolist() == [1, 0, 1]
    annotations.write_text("../../secret.JPEG\tn2\t0\t0\t1\t1\n")
    with pytest.raises(InputError, match="val_annotations.txt:1"):
        write_splits(
            Place(dataset="tiny_imagenet", data_dir=str(tmp_path)),
            str(tmp_path / "out2"),
            num_workers=1,
        )


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "imagenette"])
def test_failed_download_is_one_clear_error(dataset, tmp_path, monkeypatch):
    import socket

    def offline(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "create_connection", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    with pytest.raises(InputError, match=f"{dataset} is not in"):
        write_splits(
            Place(dataset=dataset, data_dir=str(tmp_path)), str(tmp_path / "out"), num_workers=1
        )


def test_cifar_archives_on_disk_are_written(tmp_path, monkeypatch):
    """CIFAR-10's file layout. The checksums of torchvision are replaced by those of the small
    files that are made here."""
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    base = tmp_path / CIFAR10.base_folder
    base.mkdir()

    def save(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((base / name).read_bytes()).hexdigest()

    def part():
        return {"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": [0, 1, 2, 9]}

    monkeypatch.setattr(
        CIFAR10, "train_list", [save(f"data_batch_{i}", part()) for i in range(1, 6)]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [save("test_batch", part())])
    name, digest = save("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": digest})
    write_splits(
        Place(dataset="cifar10", data_dir=str(tmp_path)),
        str(tmp_path / "out"),
        num_workers=1,
        encoding=Encoding(mode="raw"),
    )
    train = read_beton(tmp_path / "out" / "train.beton")
    assert (
        len(train) == 20
        and train.labels.tolist() == [0, 1, 2, 9] * 5
        and (train.heights == 32).all()
    )


def test_demo_set_is_a_function_of_its_seed(tmp_path):
    make_demo_images(tmp_path / "a", {"train": 2, "val": 1})
    make_demo_images(tmp_path / "b", {"train": 2, "val": 1})
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.jpg"))
    assert len(files) == 30
    assert all(
        (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        for file in files
    )


def test_demo_classes_cannot_be_separated_by_mean_colour():
    means = np.array(
        [
            [
                np.asarray(draw_picture(name, np.random.default_rng([label, number]))).mean((0, 1))
                for number in range(40)
            ]
            for label, name in enumerate(CLASSES)
        ]
    )
    between, within = means.mean(1).std(0), means.std(1).mean(0)
    assert (between < 0.4 * within).all()


def test_settings_of_pillow_and_opencv_change_during_a_conversion_only(pictures, tmp_path):
    code = f"""
        import cv2
        from PIL import Image
        def now():
            return Image.MAX_IMAGE_PIXELS, cv2.getNumThreads()
        cv2.setNumThreads(3)
        before, during = now(), []
        from rsb_ffcv import dataset
        plain = dataset.write_beton
        dataset.write_beton = lambda *a, **k: (during.append(now()), plain(*a, **k))[1]
        assert now() == before
        place = dataset.Place(dataset="imagenet", data_dir={str(pictures)!r})
        dataset.write_splits(place, {str(tmp_path)!r}, split="val")
        assert (during, now()) == ([(None, 1)], before)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mode": "jpeg"}, "`mode`='jpeg': must be one of jpg, raw, smart, proportion"),
        ({"jpeg_quality": 500}, "`jpeg_quality`=500: must be 1 .. 100"),
        ({"max_resolution": -5}, "`max_resolution`=-5: must be 0 .. 65535"),
        ({"smart_threshold": -1}, "`smart_threshold`=-1"),
        ({"compress_probability": 1.5}, "`compress_probability`=1.5"),
        ({"max_pixels": 0}, "`max_pixels`=0"),
    ],
)
def test_encoding_refuses_what_the_command_line_refuses(settings, message):
    with pytest.raises(InputError, match=message):
        Encoding(**settings)


def test_unknown_dataset_and_split_are_refused(tmp_path):
    for place, split, message in (
        (Place(dataset="imagenett", data_dir=str(tmp_path)), "train", "`dataset`='imagenett'"),
        (Place(dataset="webdataset", data_dir=str(tmp_path)), "test", "`split`='test'"),
    ):
        with pytest.raises(InputError, match=message):
            write_splits(place, str(tmp_path / "out"), split=split)
    assert not list(tmp_path.iterdir())


def test_every_dataset_of_the_command_line_has_a_reader():
    (item,) = (item for item in fields(options.SourceOptions) if item.name == "dataset")
    assert set(item.metadata["limits"]["choices"]) == set(READERS)


def test_file_that_another_process_finishes_meanwhile_is_not_written_again(
    betons, pictures, tmp_path, monkeypatch
):
    """The other process finishes, and removes the journal, just before this one locks it."""
    place, path = Place(dataset="imagenet", data_dir=str(pictures)), tmp_path / "val.beton"
    plain, finished = writer.lock, list[int]()

    def lock(file, where):
        if not finished:
            finished.append(0)
            write_splits(place, str(path), split="val")
            finished[0] = path.stat().st_ino
        plain(file, where)

    monkeypatch.setattr(writer, "lock", lock)
    write_splits(place, str(path), split="val")
    assert path.stat().st_ino == finished[0] and list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == (betons / "val.beton").read_bytes()
