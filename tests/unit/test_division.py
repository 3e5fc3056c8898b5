"""A dataset without a val split is divided: each image is in exactly one split, and the division
depends on the names of the images only."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from rsb_ffcv import InputError
from rsb_ffcv.beton import read_beton
from rsb_ffcv.dataset import Place, files, info, write_splits
from rsb_ffcv.dataset.division import divided
from rsb_ffcv.dataset.picture import BadPicture
from rsb_ffcv.dataset.sources import Source
from tests import sources
from tests.sources import WNIDS, contents, expected, jpeg, pictures, put, put_tar


def write(place: Place, folder: Path, val_share=0.3, num_workers=2, **options) -> Path:
    write_splits(place, str(folder), val_share=val_share, num_workers=num_workers, **options)
    return folder


def flat(root: Path):
    for wnid, name, data in pictures("train"):
        put(root / wnid / name, data)


def below_train(root: Path):
    flat(root / "train")
    put(root / "test" / "unknown" / "1.JPEG", jpeg(0, 99))


def class_named_val(root: Path):
    flat(root)
    (root / WNIDS[2]).rename(root / "val")  # sorted behind the other classes, as before


def tar(root: Path, folder: str):
    members = [(f"{folder}{wnid}/{name}", data) for wnid, name, data in pictures("train")]
    put_tar(root, members)


def without_val(make, root: Path):
    """Only the train split of a layout."""
    make(root)
    for path in root.glob("*val*"):
        path.unlink()


def without_train_in_names(root: Path):
    without_val(sources.webdataset, root)
    for path in root.iterdir():
        path.rename(path.with_name(path.name.replace("train-", "")))


LISTS = functools.partial(sources.lists, numbers=False, head=True)
FORMS: dict[str, tuple[Callable[..., None], str, str]] = {
    "folder": (flat, "imagenet", ""),
    "folder, train": (below_train, "imagenet", ""),
    "folder, a class named val": (class_named_val, "imagenet", ""),
    "tar": (functools.partial(tar, folder="photos/"), "imagenet", ""),
    "tar, train": (functools.partial(tar, folder="photos/train/"), "imagenet", ""),
    "csv file": (LISTS, "csv", "/train.csv"),
    "csv folder": (functools.partial(without_val, LISTS), "csv", ""),
    "webdataset": (functools.partial(without_val, sources.webdataset), "webdataset", ""),
    "webdataset, no split in the names": (without_train_in_names, "webdataset", ""),
    "webdataset, pattern": (sources.webdataset, "webdataset", "/*train-{0000..0001}.tar"),
    "parquet": (functools.partial(without_val, sources.parquet), "parquet", ""),
    "datasets": (functools.partial(without_val, sources.parquet), "datasets", ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_image_of_every_form_is_in_exactly_one_split(form, tmp_path):
    make, dataset, pattern = FORMS[form]
    root = tmp_path / ("in.tar" if "tar," in form or form == "tar" else "in")
    make(root)
    out = write(Place(dataset=dataset, data_dir=f"{root}{pattern}"), tmp_path / "out")
    train, val = contents(out / "train.beton"), contents(out / "val.beton")
    assert sorted(train + val) == expected("train")  # all images differ
    for split in (train, val):
        assert {label for label, _ in split} == {0, 1, 2}
    abouts = [read_beton(out / f"{split}.beton").about for split in ("train", "val")]
    assert abouts[0].classes == abouts[1].classes and len(abouts[0].classes) == 3


def test_callable_is_called_once_with_train(tmp_path, monkeypatch):
    LISTS(tmp_path / "in")
    (tmp_path / "undivided_data.py").write_text(
        "def pairs(split):\n    assert split == 'train'\n    return [line.split(',') for line in "
        "open('in/train.csv').read().split()[1:]]\n"
    )
    monkeypatch.chdir(tmp_path)
    place = Place(dataset="callable", data_dir="in", callable="undivided_data:pairs")
    out = write(place, tmp_path / "out")
    written = [contents(out / f"{split}.beton") for split in ("train", "val")]
    assert sorted(written[0] + written[1]) == expected("train")


def named(counts: list[int], **more) -> Source:
    """A source of that many images in each class, none of which can be read."""
    labels = np.repeat(np.arange(len(counts)), counts)
    names = [f"{label}/{number}.jpg" for label, n in enumerate(counts) for number in range(n)]
    classes = [str(label) for label in range(len(counts))]
    more.setdefault("read", lambda index: b"")
    return Source(classes=classes, names=names, labels=labels, **more)


def names_of(source: Source, share: float) -> tuple[set[str], set[str]]:
    parts = divided(source, share, 1)
    train, val = set(parts["train"].names), set(parts["val"].names)
    assert not train & val and train | val == set(source.names)
    for part in parts.values():  # labels stay with their names
        for name, label in zip(part.names, part.labels):
            assert name.startswith(f"{label}/")
    return train, val


def test_an_image_is_in_val_if_the_hash_of_its_name_is_below_the_share():
    """The rule must not change: images that a model was trained on would get into val."""
    source = named([30, 40])
    _, val = names_of(source, 0.25)
    assert val == {
        name for name in source.names if xxhash.xxh64_intdigest(name.encode()) < 0.25 * 2**64
    }


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_share_holds_in_each_class(share):
    _, val = names_of(named([4000] * 5), share)
    for label in range(5):
        count = sum(name.startswith(f"{label}/") for name in val)
        assert abs(count - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5


def test_added_images_and_classes_move_no_image_from_train_to_val():
    train, val = names_of(named([40, 60, 5]), 0.2)
    for counts in ([41, 60, 5], [400, 61, 6], [40, 60, 500, 30]):
        more_train, more_val = names_of(named(counts), 0.2)
        assert not train & more_val
        if counts[2] == 5:
            assert val <= more_val
    assert len(more_train) > len(train)


def test_an_added_copy_moves_no_image_from_train_to_val():
    train, _ = names_of(named([60, 60]), 0.5)
    contents = [f"content of {number}".encode() for number in [*range(60)] * 2]
    source = named([60, 60], read=contents.__getitem__, size=lambda index: len(contents[index]))
    more_train, _ = names_of(source, 0.5)
    assert train < more_train


def test_order_of_the_source_does_not_matter():
    source = named([50, 50])
    assert names_of(source.chosen(np.arange(100)[::-1]), 0.3) == names_of(source, 0.3)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_small_classes_have_an_image_in_each_split_and_single_images_are_in_train(share, capsys):
    train, val = names_of(named([2, 3, 1, 0, 9, 1]), share)
    for label in (0, 1, 4):
        assert {name[0] for name in train} >= {str(label)} <= {name[0] for name in val}
    assert {"2/0.jpg", "5/0.jpg"} <= train
    rare = {0.001: val, 0.999: train - {"2/0.jpg", "5/0.jpg"}}[share]
    assert len(rare) == 3  # one of each class
    warning = "warning: 2 classes of 6 without an image in val, because there is only one, in train"
    assert f"{warning}: 2, 5\n" in capsys.readouterr().err


def test_images_that_cannot_be_used_do_not_count_as_images_of_their_class():
    source = named([2, 40], faults={0: "has no label"})
    for share in (0.1, 0.95):
        train, _ = names_of(source, share)
        assert {"0/0.jpg", "0/1.jpg"} <= train


def test_chosen_pictures_keep_what_is_known_about_them():
    whole = named(
        [3, 2],
        faults={1: "first", 3: "second"},
        read=lambda index: bytes([index]),
        place=lambda index: f"place {index}",
        stamp=lambda index: (index, "stamp"),
        size=lambda index: 10 * index,
    )
    part = whole.chosen(np.array([4, 1, 0])).chosen(np.array([1, 0]))
    assert part.names == ["0/1.jpg", "1/1.jpg"] and part.labels.tolist() == [0, 1]
    assert part.faults == {0: "first"}
    for method in ("read", "place", "stamp", "size"):
        known = [getattr(whole, method)(index) for index in (1, 4)]
        assert [getattr(part, method)(index) for index in (0, 1)] == known


def test_val_that_would_be_empty_is_an_error():
    with pytest.raises(InputError, match="^`val_share`=0.5: val would be empty"):
        divided(named([1, 1]), 0.5, 1)


def with_copies(root: Path):
    """60 images in each of two classes, a third of which occur twice, and one image in both."""
    for label, name in enumerate(("a", "b")):
        for number in range(60):
            data = jpeg(label, number % 40 + 1)
            put(root / name / f"{number}.jpg", data)
    put(root / "b" / "of_a.jpg", jpeg(0, 1))


def tar_of(root: Path, archive: Path):
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    put_tar(archive, [(str(path.relative_to(root)), path.read_bytes()) for path in paths])


@pytest.mark.parametrize("packed", [False, True])
def test_copies_of_an_image_are_in_the_same_split(packed, tmp_path, capsys):
    with_copies(tmp_path / "in")
    tar_of(tmp_path / "in", tmp_path / "in.tar")
    data_dir = str(tmp_path / ("in.tar" if packed else "in"))
    out = write(Place(dataset="imagenet", data_dir=data_dir), tmp_path / "out", 0.5)
    train, val = (
        read_beton(out / f"{name}.beton").extras["checksum"].tolist() for name in ("train", "val")
    )
    assert not set(train) & set(val)
    assert len(train) + len(val) == 121 and len({*train, *val}) == 80
    printed = capsys.readouterr().out
    assert "copies of other images: 41, each in the split of the other" in printed
    assert "byte-identical to an image of train" not in printed


def test_copies_are_reported_where_sizes_are_not_known(tmp_path, capsys, monkeypatch):
    """As those of a remote folder."""
    with_copies(tmp_path / "in")
    monkeypatch.setattr(files.Local, "stamp", lambda self, name: ())
    place = Place(dataset="imagenet", data_dir=str(tmp_path / "in"))
    out = write(place, tmp_path / "out", 0.5)
    train, val = (read_beton(out / f"{name}.beton").extras["checksum"] for name in ("train", "val"))
    shared = sum(checksum in set(train.tolist()) for checksum in val.tolist())
    assert shared > 5
    line = f"images of val that are byte-identical to an image of train: {shared} of {len(val)}\n"
    assert line in capsys.readouterr().out


def test_result_does_not_depend_on_the_number_of_workers_or_the_folder(tmp_path):
    with_copies(tmp_path / "in")
    shutil.copytree(tmp_path / "in", tmp_path / "elsewhere" / "moved")
    written = set()
    for workers, root in ((1, "in"), (5, "elsewhere/moved")):
        place = Place(dataset="imagenet", data_dir=str(tmp_path / root))
        out = write(place, tmp_path / f"out_{workers}", num_workers=workers)
        written.add(tuple((out / f"{name}.beton").read_bytes() for name in ("train", "val")))
    assert len(written) == 1


def test_bad_images_of_a_divided_dataset_are_skipped_and_reported(tmp_path):
    flat(tmp_path / "in")
    size = (tmp_path / "in" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").stat().st_size
    put(tmp_path / "in" / WNIDS[0] / "bad.JPEG", bytes(size))  # read as a possible copy
    put(tmp_path / "in" / WNIDS[0] / "empty.JPEG", b"")
    (tmp_path / "in" / WNIDS[1] / "link.JPEG").symlink_to("/etc/hostname")
    place = Place(dataset="imagenet", data_dir=str(tmp_path / "in"))
    with pytest.raises(BadPicture):
        write(place, tmp_path / "failed")
    assert not list((tmp_path / "failed").glob("val.beton"))
    out = write(place, tmp_path / "out", skip=True, max_skipped=0.9)
    written = [contents(out / f"{split}.beton") for split in ("train", "val")]
    assert sorted(written[0] + written[1]) == expected("train")
    reported = "".join(path.read_text() for path in out.glob("*.skipped.csv"))
    assert all(name in reported for name in ("bad.JPEG", "empty.JPEG", "link.JPEG"))


def test_share_is_kept_in_the_files_and_a_rerun_with_another_is_refused(tmp_path, capsys):
    flat(tmp_path / "in")
    place = Place(dataset="imagenet", data_dir=str(tmp_path / "in"))
    out = write(place, tmp_path / "out", 0.25)
    assert "val_share=0.25" in info(out / "val.beton")
    write(place, tmp_path / "out", 0.25)
    assert capsys.readouterr().out.count("exists already") == 2
    with pytest.raises(InputError, match="other settings \\(val_share 0.25, now 0.3\\)"):
        write(place, tmp_path / "out", 0.3)
    folders = tmp_path / "folders"
    sources.folders(folders)
    write(Place(dataset="imagenet", data_dir=str(folders)), tmp_path / "both", 0)
    assert "val_share" not in info(tmp_path / "both" / "val.beton")


@pytest.mark.parametrize("share", [1, 1.5, -0.1, float("nan")])
def test_share_out_of_range_is_one_error_line(share, tmp_path):
    flat(tmp_path / "in")
    with pytest.raises(InputError, match=f"^`val_share`={share}: must be above 0 and below 1"):
        write(Place(dataset="imagenet", data_dir=str(tmp_path / "in")), tmp_path / "out", share)
    assert not (tmp_path / "out").exists()


def folders_named(train: str, val: str, root: Path):
    sources.folders(root)
    (root / "train").rename(root / train)
    (root / "val").rename(root / val)


HAVE_VAL: dict[str, tuple[Callable[..., None], str, str, str]] = {
    "folders": (sources.folders, "imagenet", "", "the folder 'val'"),
    "other names": (
        functools.partial(folders_named, "training", "validation"),
        "imagenet",
        "",
        "the folder 'validation'",
    ),
    "tar": (sources.tar_of_folders, "imagenet", "/all.tar", "the folder 'val'"),
    "csv": (LISTS, "csv", "", "val.csv"),
    "shards": (sources.webdataset, "webdataset", "", "imagenet-val-0000.tar"),
    "pattern": (sources.webdataset, "webdataset", "/*{split}-*.tar", "{split} stands for"),
    "parquet": (sources.parquet, "parquet", "", "validation-00000-of-00002.parquet"),
    "datasets": (sources.parquet, "datasets", "", "the split validation"),
    "kaggle": (sources.kaggle, "kaggle", "", "every `dataset`=kaggle has"),
}


@pytest.mark.parametrize("form", HAVE_VAL)
def test_source_with_validation_images_is_refused(form, tmp_path):
    make, dataset, pattern, found = HAVE_VAL[form]
    make(tmp_path / "in")
    data_dir = f"{tmp_path / 'in'}{pattern}"
    with pytest.raises(InputError) as error:
        write(Place(dataset=dataset, data_dir=data_dir), tmp_path / "out")
    assert str(error.value).startswith(
        f"`val_share`: `data_dir`={data_dir} has validation images ({found}"
    )
    assert "leave out `val_share`" in str(error.value) and not (tmp_path / "out").exists()


def test_options_that_contradict_each_other_are_one_error_line(tmp_path, call_program):
    flat(tmp_path / "in")
    command = ["write_ffcv.py", f"--cfg.data_dir={tmp_path / 'in'}", "--cfg.val_share=0.2"]
    for more, message in (
        ([f"--cfg.write_path={tmp_path}/out", "--cfg.split=val"], "cfg.split=val: cannot be given"),
        (
            [f"--cfg.write_path={tmp_path}/out.beton"],
            f"cfg.write_path={tmp_path}/out.beton: is one file for two splits; give a folder\n",
        ),
        ([f"--cfg.write_path={tmp_path}/out", "--cfg.val_share=2"], "cfg.val_share='2' on the com"),
    ):
        status, _, err = call_program(*command, *more)
        assert status == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1, err
    status, out, _ = call_program(command[0], "estimate", *command[1:])
    assert status == 0 and "divided 12 images: " in out and "val: about" in out
    status, _, err = call_program(*command[:2], f"--cfg.write_path={tmp_path}/out")
    assert status == 2 and "or cfg.val_share to divide <class>/<image>" in err
    put(tmp_path / "above" / "in" / "a" / "1.JPEG", jpeg(0, 0))
    status, _, err = call_program(
        command[0], f"--cfg.data_dir={tmp_path}/above", command[2], f"--cfg.write_path={tmp_path}/o"
    )
    assert status == 2 and "has only the class folder 'in'; give the folder that" in err
