"""Several files are one dataset: the shards of a file train exactly as the file."""

import numpy as np
import pytest
import torch
from PIL import Image

from rsb_ffcv import InputError, read_beton
from rsb_ffcv.beton import listed_files
from rsb_ffcv.dataset import Place, inspect, shard, subset, write_splits
from rsb_ffcv.loading import EvalLoader, TrainLoader, loader
from rsb_ffcv.loading.order import CHUNK_BYTES, epoch_order


@pytest.fixture(scope="module")
def shards(betons, tmp_path_factory):
    """A folder with the training file of `betons` in 5 parts, and in 2."""
    folder = tmp_path_factory.mktemp("shards")
    for count in (5, 2):
        shard(str(betons / "train.beton"), str(folder / str(count)), count, num_workers=2)
    return folder


def epochs(path, **options):
    made = TrainLoader(
        path, batch_size=16, resolution=32, num_workers=2, rand_augment="rand-m7", **options
    )
    batches = [batch for epoch in range(2) for batch in made.epoch(epoch)]
    made.close()
    return batches


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": "sequential"},
        {"order": "quasi_random", "window_bytes": 60_000},
        {"decode": "gpu"},
        {"rank": 1, "world_size": 3, "global_batch": 48, "repeats": 2},
    ],
)
def test_batches_do_not_depend_on_the_split_into_files(betons, shards, options):
    whole = epochs(betons / "train.beton", **options)
    listed = sorted(shards.glob("2/*.beton"))
    for given in (f"{shards}/5/*.beton", listed, ",".join(map(str, listed))):
        for batch, expected in zip(epochs(given, **options), whole, strict=True):
            assert torch.equal(batch.images, expected.images)
            assert torch.equal(batch.labels, expected.labels)
            assert np.array_equal(batch.slots, expected.slots)


def test_evaluation_does_not_depend_on_the_split_into_files(betons, shards):
    results = []
    for path in (betons / "train.beton", f"{shards}/5/*.beton"):
        made = EvalLoader(path, batch_size=10, resolution=32, num_workers=2, crop_ratio=0.9)
        results.append(list(made))
        made.close()
    for batch, expected in zip(*results, strict=True):
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.labels, expected.labels)


def test_description_does_not_depend_on_the_split_into_files(betons, shards):
    whole, five, two = (
        read_beton(path)
        for path in (betons / "train.beton", f"{shards}/5/*.beton", f"{shards}/2/*.beton")
    )
    names = whole.names()
    assert five.names() == two.names() == names
    for file in (whole, five, two):
        assert file.names_of([95, 0, 40, 95]) == {place: names[place] for place in (0, 40, 95)}
    assert five.fingerprint() == two.fingerprint() != whole.fingerprint()
    assert five.about is not None and whole.about is not None
    assert five.about.classes == whole.about.classes and five.about.counts == whole.about.counts
    assert five.about.settings["max_resolution"] == whole.about.settings["max_resolution"]
    with five.open() as several, whole.open() as one:
        for index in range(len(whole)):
            assert np.array_equal(five.read(several, index), whole.read(one, index))
    assert five.num_bytes == sum(path.stat().st_size for path in five.paths)


def test_classes_are_matched_by_name(betons, tmp_path):
    for number, classes in enumerate(("cyan,amber", "blue", "blue,cyan")):
        subset(
            str(betons / "train.beton"),
            str(tmp_path / f"{number}.beton"),
            num_workers=1,
            classes=classes,
        )
    several = read_beton(f"{tmp_path}/*.beton")
    assert several.about is not None and several.about.classes == ["amber", "blue", "cyan"]
    for name, label in zip(several.names(), several.labels.tolist()):
        assert name.split("/")[-2] == several.class_name(label)
    assert np.bincount(several.labels).tolist() == [32, 64, 64]


def test_windows_of_several_files_cover_what_they_contain():
    """The extents of each window contain its samples, in their files, and no file's end is passed:
    files of different lengths, samples that are not in the order of their pointers."""
    rng = np.random.default_rng(0)
    files = np.repeat([0, 1, 2], [300, 20, 500]).astype(np.uint16)
    sizes = rng.integers(1000, 200_000, len(files)).astype(np.uint64)
    pointers = np.empty(len(files), np.uint64)
    ends = []
    for number in range(3):
        chosen = rng.permutation(np.flatnonzero(files == number))
        pointers[chosen] = 8192 + np.cumsum(sizes[chosen]) - sizes[chosen]
        ends.append(int((pointers[chosen] + sizes[chosen]).max()))
    order = epoch_order(
        "quasi_random",
        0,
        0,
        files=files,
        pointers=pointers,
        sizes=sizes,
        window_bytes=5 * CHUNK_BYTES,
    )
    assert sorted(order.indices) == list(range(len(files))) and len(order.extents) > 5
    bounds = [*order.starts.tolist(), len(files)]
    for extents, first, last in zip(order.extents, bounds, bounds[1:]):
        for index in order.indices[first:last]:
            assert any(
                file == files[index]
                and offset <= pointers[index]
                and pointers[index] + sizes[index] <= offset + length
                for file, offset, length in extents.tolist()
            )
        assert all(offset + length <= ends[file] for file, offset, length in extents.tolist())
        assert extents[:, 2].sum() <= 7 * CHUNK_BYTES


def test_all_files_are_preloaded_and_advised(shards, monkeypatch):
    advised = []
    monkeypatch.setattr(
        loader.os, "posix_fadvise", lambda file, offset, length, advice: advised.append(file)
    )
    made = TrainLoader(
        f"{shards}/5/*.beton",
        batch_size=16,
        resolution=32,
        num_workers=1,
        order="quasi_random",
        window_bytes=60_000,
    )
    made.preload()
    list(made.epoch(0))
    assert len(set(advised)) == 5
    made.close()


def test_damage_names_the_file_and_the_sample(shards, tmp_path):
    for path in shards.glob("5/*.beton"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    third = sorted(tmp_path.iterdir())[2]
    file = read_beton(third)
    data = bytearray(third.read_bytes())
    data[int(file.pointers[4]) + 30] ^= 1
    third.write_bytes(data)
    number = 4 + sum(len(read_beton(path)) for path in sorted(tmp_path.iterdir())[:2])
    with pytest.raises(InputError) as caught:
        epochs(f"{tmp_path}/*.beton")
    assert str(caught.value).startswith(
        f"{third}: sample 4 (sample {number} of {tmp_path}/*.beton) is damaged: its bytes do not"
    )


def test_files_that_cannot_be_one_dataset_are_refused(betons, shards, tmp_path):
    first, second = sorted(shards.glob("2/*.beton"))
    (tmp_path / "link.beton").symlink_to(first)
    for given, message in (
        (f"{tmp_path}/none-*.beton", "none-[*].beton: no file matches this pattern; correct it"),
        ([first, second, tmp_path / "link.beton"], "link.beton: is named twice; name each file"),
        ([], "names 0 files; give 1 to"),
        (f"{first},{tmp_path}/missing.beton", "missing.beton: cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            read_beton(given)


def test_pattern_in_the_name_of_an_existing_file_is_that_file(betons, tmp_path):
    """Also a comma."""
    for name in ("a[1].beton", "b,c.beton"):
        (tmp_path / name).write_bytes((betons / "val.beton").read_bytes())
        assert listed_files(str(tmp_path / name)) == [tmp_path / name]


def test_several_files_are_subset_as_one(betons, shards, tmp_path):
    for path, name in ((betons / "train.beton", "a"), (f"{shards}/5/*.beton", "b")):
        subset(str(path), str(tmp_path / f"{name}.beton"), num_workers=2, samples="10-59")
    a, b = read_beton(tmp_path / "a.beton"), read_beton(tmp_path / "b.beton")
    assert a.fingerprint() == b.fingerprint() and a.names() == b.names()


def test_info_and_verify_say_that_they_take_one_file(shards):
    for command in (inspect.info, lambda path: inspect.verify(path, 1.0, 1)):
        with pytest.raises(InputError, match="cannot be read"):
            command(f"{shards}/5/*.beton")


def test_files_with_and_without_checksums_are_refused(betons, tmp_path):
    from tests.unit.test_beton import as_ffcv_writes_it

    (tmp_path / "plain.beton").write_bytes(as_ffcv_writes_it(betons / "val.beton"))
    with pytest.raises(InputError, match="plain.beton: has no checksums, and .*val.beton has; "):
        read_beton([betons / "val.beton", tmp_path / "plain.beton"])
    (tmp_path / "again.beton").write_bytes(as_ffcv_writes_it(betons / "train.beton"))
    several = read_beton(f"{tmp_path}/*.beton")
    assert len(several) == 96 + 27 and several.extras is None and several.about is None


def test_raw_images_of_several_files(tmp_path):
    for part in "ab":
        for label in range(2):
            folder = tmp_path / part / "train" / f"c{label}"
            folder.mkdir(parents=True)
            for number in range(3):
                pixels = np.full((8, 8, 3), 40 * label + number, np.uint8)
                Image.fromarray(pixels).save(folder / f"{part}{number}.png")
        write_splits(
            Place(dataset="imagenet", data_dir=str(tmp_path / part)),
            str(tmp_path / f"{part}.beton"),
            split="train",
            num_workers=1,
        )
    made = EvalLoader(
        [tmp_path / "a.beton", tmp_path / "b.beton"],
        batch_size=12,
        resolution=8,
        num_workers=1,
        crop_ratio=1.0,
    )
    (batch,) = made
    assert batch.labels.tolist() == [0, 0, 0, 1, 1, 1] * 2
    made.close()
