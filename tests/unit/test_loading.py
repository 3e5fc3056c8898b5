"""The content of a batch is a function of (seed, epoch, batch). It does not depend on threads,
ranks or earlier reads."""

import ctypes
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time

import numba
import numpy as np
import psutil
import pytest
import torch

from rsb_ffcv import InputError
from rsb_ffcv.beton import HEADER, read_beton
from rsb_ffcv.loading import EvalLoader, TrainLoader, pool
from rsb_ffcv.loading.batch import WEIGHT_UNIT, BatchTransform, normalize
from rsb_ffcv.loading.order import CHUNK_BYTES, epoch_order, group_slots
from rsb_ffcv.ops import native
from rsb_ffcv.ops.operation import DrawnOperation

SPEC = "rand-m7-mstd0.5-inc1"


def loader(betons, **options):
    options = {
        "batch_size": 16,
        "resolution": 32,
        "num_workers": 2,
        "rand_augment": SPEC,
        **options,
    }
    return TrainLoader(betons / "train.beton", **options)


def batches(made, epoch, **options):
    found = list(made.epoch(epoch, **options))
    made.close()
    return found


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(one.images, other.images)
        and torch.equal(one.labels, other.labels)
        and np.array_equal(one.slots, other.slots)
        for one, other in zip(a, b)
    )


def order(kind="random", seed=0, epoch=0, count=1000, window_bytes=1 << 40, size=50_000):
    sizes = np.full(count, size, np.uint64)
    return epoch_order(
        kind,
        seed,
        epoch,
        files=np.zeros(count, np.uint16),
        pointers=8192 + np.cumsum(sizes) - sizes,
        sizes=sizes,
        window_bytes=window_bytes,
    )


def test_each_epoch_has_a_new_permutation():
    for kind, window_bytes in (("random", 1), ("quasi_random", 4 << 20)):
        orders = [
            order(kind, *which, window_bytes=window_bytes).indices
            for which in ((0, 0), (0, 1), (1, 0))
        ]
        for one in orders:
            assert sorted(one) == list(range(1000))
        assert not (orders[0] == orders[1]).all() and not (orders[0] == orders[2]).all()
        assert abs(np.corrcoef(orders[0], np.arange(1000))[0, 1]) < (
            0.1 if kind == "random" else 0.6
        )
    assert (order("sequential").indices == np.arange(1000)).all()


def slow_order(keys, window_keys, files, *, pointers, sizes, window_bytes):
    """The definition of quasi_random, one sample after another. With one window: of random."""
    count, total = len(keys), 0
    found: dict[int, list[int]] = {}
    window: dict[int, int] = {}
    for sample in sorted(range(count), key=lambda sample: (files[sample], pointers[sample])):
        total += sizes[sample]
        found.setdefault((total - 1) // CHUNK_BYTES, []).append(sample)
    chunks, total = list(found.values()), 0
    for chunk in sorted(range(len(chunks)), key=lambda chunk: (window_keys[chunk], chunk)):
        total += sum(sizes[sample] for sample in chunks[chunk])
        window |= dict.fromkeys(chunks[chunk], (total - 1) // window_bytes)
    return sorted(range(count), key=lambda sample: (window[sample], keys[sample], sample))


@pytest.mark.parametrize("bits", [2, 11, 20, 64])  # of the draws, the others are 0
@pytest.mark.parametrize("sorted_by_place", [True, False])
def test_orders_are_those_of_a_stable_sort_also_of_equal_draws(monkeypatch, bits, sorted_by_place):
    from rsb_ffcv.ops import draws

    rng = np.random.default_rng(bits)
    drawn = {
        op: rng.integers(0, 1 << 64, 3000, np.uint64) >> np.uint64(64 - bits)
        for op in (draws.ORDER, draws.WINDOW)
    }
    monkeypatch.setattr(draws, "words64", lambda seed, epoch, op, count: drawn[op][:count])
    sizes = rng.integers(1, 60_000, 3000)
    pointers = (np.cumsum(sizes) - sizes)[slice(None) if sorted_by_place else rng.permutation(3000)]
    files = np.sort(rng.integers(0, 3, 3000))
    for kind, window_bytes in (("random", 1 << 40), ("quasi_random", 7 << 20)):
        made = epoch_order(
            kind,
            0,
            0,
            files=files.astype(np.uint16),
            pointers=pointers.astype(np.uint64),
            sizes=sizes.astype(np.uint64),
            window_bytes=window_bytes,
        )
        assert made.indices.tolist() == slow_order(
            drawn[draws.ORDER].tolist(),
            drawn[draws.WINDOW].tolist(),
            files.tolist(),
            pointers=pointers.tolist(),
            sizes=sizes.tolist(),
            window_bytes=window_bytes,
        )


def test_quasi_random_stays_within_its_windows():
    """Between two starts are only samples of the window's extents. Every byte is in one window. No
    window is larger than requested."""
    made = order("quasi_random", count=3000, window_bytes=10 << 20, size=60_000)
    assert 15 < len(made.starts) < 25 and made.starts[0] == 0
    first = 8192 + 60_000 * made.indices
    for window, (start, end) in enumerate(zip(made.starts, [*made.starts[1:], 3000])):
        assert not made.extents[window][:, 0].any()  # the only file
        extents = made.extents[window][:, 1:]
        inside = (first[start:end, None] >= extents[:, 0]) & (
            first[start:end, None] + 60_000 <= extents.sum(1)
        )
        assert (inside.sum(1) == 1).all()
        assert extents[:, 1].sum() == 60_000 * (end - start) <= (10 << 20) + 2 * CHUNK_BYTES
        assert extents[:, 1].max() <= CHUNK_BYTES + 60_000
        # Shuffled within the window
        assert abs(np.corrcoef(first[start:end], np.arange(end - start))[0, 1]) < 0.3
    assert (order("quasi_random", window_bytes=1 << 40).indices == order("random").indices).all()


def test_quasi_random_mixes_the_classes_of_a_sorted_file():
    """The number of classes in a batch of 256, for 1000 classes of 1300 images of 60 kB, sorted by
    class. The random order gives 226."""
    # A tenth of ImageNet, with windows of a tenth of the default size
    labels = np.repeat(np.arange(1000), 130)
    made = order("quasi_random", count=len(labels), window_bytes=(1 << 30) // 10, size=60_000)
    batches = labels[made.indices][: len(labels) // 256 * 256].reshape(-1, 256)
    classes = [len(set(batch)) for batch in batches]
    assert np.mean(classes) > 75 and min(classes) > 50


def test_repeated_augmentation_equals_timms_sampler(monkeypatch):
    """Against timm's RepeatAugSampler for 8 processes of 16 images, with the same permutation."""
    from timm.data.distributed_sampler import RepeatAugSampler

    permutation = order(count=1024).indices
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.from_numpy(permutation))
    theirs = [
        list(RepeatAugSampler(range(1024), num_replicas=8, rank=rank, num_repeats=3))
        for rank in range(8)
    ]
    for step in range(4):
        for place in range(8):
            slots = group_slots(step, place, batch_size=16, groups=8, repeats=3)
            assert (permutation[slots // 3] == theirs[place][16 * step : 16 * step + 16]).all()


def test_groups_of_a_step_cover_its_slots_once():
    for repeats in (1, 3):
        slots = np.concatenate(
            [group_slots(2, place, batch_size=8, groups=4, repeats=repeats) for place in range(4)]
        )
        assert sorted(slots) == list(range(64, 96))


EVERYTHING = {
    "rand_augment": SPEC,
    "color_jitter": (0.3, 0.3, 0.3, 0.1),
    "repeats": 3,
    "global_batch": 48,
}


@pytest.mark.parametrize(
    "options",
    [{}, EVERYTHING, {"rand_augment": "3a"}, {"order": "quasi_random", "window_bytes": 100_000}],
)
def test_batches_are_independent_of_the_number_of_threads(betons, options):
    one = batches(loader(betons, num_workers=1, **options), 3)
    assert len(one) == 6
    for threads in (2, 4, 16):
        assert equal(one, batches(loader(betons, num_workers=threads, **options), 3))


def test_repeats_of_an_image_differ_and_replace_others(betons):
    """With 3 repeats, the number of steps is the same. An epoch has a third of the images, each
    three times with different pixels."""
    made = loader(betons, repeats=3, global_batch=48, rand_augment="", interpolation="bilinear")
    order = epoch_order(
        "random",
        0,
        0,
        files=made.beton.files,
        pointers=made.beton.pointers,
        sizes=made.beton.sizes,
        window_bytes=1,
    ).indices
    views: dict[int, list] = {}
    for images, labels, slots in made.epoch(0):
        indices = order[slots // 3]
        assert (made.beton.labels[indices] == labels.numpy()).all()
        for index, image in zip(indices, images):
            views.setdefault(index, []).append(image)
    made.close()
    assert len(views) == 32 and all(len(copies) == 3 for copies in views.values())
    assert all(
        not torch.equal(copies[i], copies[j])
        for copies in views.values()
        for i, j in ((0, 1), (0, 2), (1, 2))
    )


def test_epochs_and_seeds_differ(betons):
    first = batches(loader(betons), 0)
    assert not equal(first, batches(loader(betons), 1)) and not equal(
        first, batches(loader(betons, seed=1), 0)
    )


def test_epoch_from_step_k_equals_the_tail_of_the_epoch(betons):
    for options in (
        {"global_batch": 32},
        EVERYTHING,
        {"order": "quasi_random", "window_bytes": 100_000, "global_batch": 32},
    ):
        made = loader(betons, **options)
        groups, steps = made.batches_per_step, made.steps_per_epoch
        whole = batches(made, 2)
        for step in range(steps + 1):
            assert equal(
                whole[groups * step :], batches(loader(betons, **options), 2, start_step=step)
            )


@pytest.mark.parametrize(
    "options",
    [{}, EVERYTHING, {"order": "quasi_random", "window_bytes": 100_000}, {"order": "sequential"}],
)
def test_ranks_together_equal_one_process(betons, options):
    options = {"batch_size": 8, "global_batch": 48, **options}
    alone = batches(loader(betons, **options), 0)
    for world_size in (2, 3, 4, 5):  # 4 and 5 do not divide the 6 groups of a step
        ranks = [
            loader(betons, rank=rank, world_size=world_size, **options)
            for rank in range(world_size)
        ]
        taken = [rank.batches_per_step for rank in ranks]
        assert sum(taken) == 6 and max(taken) - min(taken) == (world_size > 3)
        epochs = [iter(batches(rank, 0)) for rank in ranks]
        steps = range(len(alone) // 6)
        assert equal(alone, [next(epochs[place % world_size]) for _ in steps for place in range(6)])
        assert not any(list(epoch) for epoch in epochs)


def test_step_with_fewer_groups_than_processes_is_rejected(betons):
    with pytest.raises(InputError, match="`global_batch`=32: 2 groups of .*fewer than the 3 proc"):
        loader(betons, global_batch=32, world_size=3)
    with pytest.raises(InputError, match="`global_batch`=40 is not a multiple of `batch_size`=16"):
        loader(betons, global_batch=40)


def test_draws_depend_on_slots_not_on_batch_positions():
    from rsb_ffcv.loading.batch import erase_boxes
    from rsb_ffcv.ops.augment import ColorJitter, RandAugment
    from rsb_ffcv.ops.crop import RandomResizedCrop
    from rsb_ffcv.ops.operation import Address

    slots, sides = np.arange(100, 164), np.full(64, 300, np.uint16)
    for op in (
        RandomResizedCrop(32),
        RandAugment(SPEC),
        RandAugment("rand-n2-t3aw"),
        RandAugment("3a"),
        RandAugment("ta_wide"),
        ColorJitter(0.4, 0.4, 0.4, 0.1),
    ):
        whole = op.draw(Address(1, 2, slots), sides, sides)
        part = op.draw(Address(1, 2, slots[20:]), sides[20:], sides[20:])
        assert np.array_equal(whole[20:], part) and not np.array_equal(whole[:44], part)
    boxes = [
        erase_boxes(1, 2, chosen, 32, 32, 0.5, 0.02, 0.3, 0.3, 3.0)
        for chosen in (slots, slots[20:])
    ]
    assert np.array_equal(boxes[0][20:], boxes[1]) and not np.array_equal(boxes[0][:44], boxes[1])


def test_labels_match_their_images(betons):
    for images, labels, _ in batches(loader(betons, rand_augment=""), 0):
        assert torch.equal(images.float().mean((1, 2)).argmax(1), labels)


def test_kept_batches_are_not_overwritten(betons):
    made = loader(betons)
    kept = list(made.epoch(0))
    copies = [batch.images.clone() for batch in kept]
    list(made.epoch(1))
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(kept, copies))


def test_evaluation_yields_each_image_once_over_all_ranks(betons):
    alone = EvalLoader(
        betons / "val.beton", batch_size=8, resolution=32, num_workers=2, crop_ratio=0.9
    )
    expected = torch.cat([batch.images for batch in alone])
    assert len(expected) == 27
    parts = [
        EvalLoader(
            betons / "val.beton",
            batch_size=4,
            resolution=32,
            num_workers=1,
            crop_ratio=0.9,
            rank=rank,
            world_size=4,
        )
        for rank in range(4)
    ]
    seen = torch.empty_like(expected)
    numbers: list[int] = []
    for part in parts:
        for images, _, samples in part:
            seen[samples] = images
            numbers.extend(samples)
    assert torch.equal(seen, expected) and sorted(numbers) == list(range(27))


def damage(betons, tmp_path, samples) -> None:
    """Writes tmp_path/train.beton, in which the middle of the given samples is overwritten."""
    data = bytearray((betons / "train.beton").read_bytes())
    file = read_beton(betons / "train.beton")
    for sample in samples:
        start, size = int(file.pointers[sample]), int(file.sizes[sample])
        data[start + size // 2 : start + size // 2 + 20] = bytes(range(20))
    (tmp_path / "train.beton").write_bytes(data)


@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_damaged_image_error_names_its_sample(betons, tmp_path, decode):
    damage(betons, tmp_path, [17])
    made = loader(tmp_path, decode=decode)
    with pytest.raises(
        InputError, match="sample 17 is damaged: its bytes do not match their checksum"
    ):
        list(made.epoch(0))
    with pytest.raises(InputError, match="sample 17 "):  # the loader stays usable
        list(made.epoch(1))
    evaluation = EvalLoader(
        tmp_path / "train.beton",
        batch_size=8,
        resolution=32,
        num_workers=2,
        crop_ratio=0.9,
        decode=decode,
    )
    with pytest.raises(InputError, match="sample 17 "):
        list(evaluation)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 1},
        {"global_batch": 32, "rank": 1, "world_size": 2},
        {"decode": "gpu"},
    ],
)
def test_skip_replaces_a_bad_image_by_the_next_readable_one(betons, tmp_path, options):
    bad = [3, 17, 40, 41, 77]
    damage(betons, tmp_path, bad)
    whole, made = loader(betons, **options), loader(tmp_path, on_bad_sample="skip", **options)
    order = epoch_order(
        "random",
        0,
        1,
        files=made.beton.files,
        pointers=made.beton.pointers,
        sizes=made.beton.sizes,
        window_bytes=1,
    ).indices
    named = set()
    for intact, skipping in zip(whole.epoch(1), made.epoch(1), strict=True):
        assert np.array_equal(intact.slots, skipping.slots)
        for row, slot in enumerate(skipping.slots):
            same = torch.equal(intact[0][row], skipping[0][row])
            assert same == (order[slot] not in bad)
            if not same:
                named.add(int(order[slot]))
                replacement = next(
                    order[(slot + k) % 96]
                    for k in range(1, 96)
                    if order[(slot + k) % 96] not in bad
                )
                assert skipping[1][row] == made.beton.labels[replacement]
    assert {index for index, reason in made.skipped} == named and all(
        "checksum" in reason for _, reason in made.skipped
    )
    list(made.epoch(0))
    assert len(made.skipped) <= 5  # counted for each epoch
    whole.close(), made.close()


def test_skip_fails_if_all_images_are_damaged(betons, tmp_path):
    damage(betons, tmp_path, range(96))
    with pytest.raises(InputError, match="the 95 samples that follow it cannot be read either"):
        list(loader(tmp_path, on_bad_sample="skip").epoch(0))


def test_file_truncated_while_open_is_an_error(betons, tmp_path):
    (tmp_path / "train.beton").write_bytes((betons / "train.beton").read_bytes())
    made = loader(tmp_path)
    with open(tmp_path / "train.beton", "r+b") as file:
        file.truncate(int(made.beton.pointers[40]))
    with pytest.raises(InputError, match="cannot be read: the file ends"):
        list(made.epoch(0))


def test_epoch_after_an_early_close_is_complete(betons):
    made = loader(betons)
    epoch = made.epoch(0)
    next(epoch)
    epoch.close()
    assert equal(
        batches(loader(betons), 1),
        list(made.epoch(1)),
    )
    made.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(made.epoch(0))


class Held(DrawnOperation):
    """Blocks each image until `release` is set.

    begun: the slots, in the order in which threads began them.
    kept: for each image, whether its draws were the same before and after the wait.
    """

    def __init__(self):
        super().__init__()
        self.begun: list[int] = []
        self.kept: list[bool] = []
        self.release, self.came = threading.Event(), threading.Semaphore(0)

        def kernel(image, height, width, draw, scratch):
            before = draw[0]
            self.begun.append(before - 123456789)
            self.came.release()
            if not self.release.wait(60):
                self.release.set()  # the test fails: do not wait again
            self.kept.append(before == draw[0])
            return 0

        self.kernel = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_int64),
            ctypes.c_void_p,
        )(kernel)

    def draw(self, address, heights, widths):
        return address.slots + 123456789

    def generate_code(self):
        return ctypes.cast(self.kernel, ctypes.c_void_p).value

    def when_begun(self, images: int, action) -> threading.Thread:
        """Calls `action` on a thread once this number of images is blocked."""

        def act():
            for _ in range(images):
                self.came.acquire()
            action()

        thread = threading.Thread(target=act)
        thread.start()
        return thread


def test_close_from_another_thread_wakes_the_waiting_one(betons):
    held = Held()
    made = loader(betons, ops=[held], num_workers=1)
    closing = held.when_begun(1, made.close)
    with pytest.raises(RuntimeError, match="closed"):
        next(made.epoch(0))
    assert closing.is_alive()  # close() waits for the image in progress; next() did not
    held.release.set()
    closing.join()
    made.close()


@pytest.mark.parametrize("seed", range(30))
def test_overwritten_ranges_never_become_images(betons, tmp_path, seed):
    """Random bytes overwrite a random range. Either the file is rejected, or every image equals the
    undamaged one."""
    rng, data = np.random.default_rng(seed), np.fromfile(betons / "train.beton", np.uint8)
    file = read_beton(betons / "train.beton")
    table = int(data[:24].view(HEADER)["alloc_table_ptr"][0])
    low, high = (
        (int(file.pointers[0]), int(file.pointers[-1])),
        (0, 6000),
        (table - 2000, len(data)),
    )[(0, 0, 1, 0, 2)[seed % 5]]
    length = int(rng.choice([1, 2, 8, 100, 5000]))
    at = int(rng.integers(low, max(low + 1, high - length)))
    data[at : at + length] = rng.integers(0, 256, len(data[at : at + length]))
    data.tofile(tmp_path / "train.beton")
    try:
        made = loader(tmp_path, on_bad_sample="skip", rand_augment="")
    except InputError:
        return
    intact, order = (
        loader(betons, rand_augment=""),
        epoch_order(
            "random",
            0,
            0,
            files=file.files,
            pointers=file.pointers,
            sizes=file.sizes,
            window_bytes=1,
        ).indices,
    )
    for given, expected in zip(made.epoch(0), intact.epoch(0)):
        bad = {index for index, _ in made.skipped}
        rows = [row for row, slot in enumerate(given.slots) if order[slot] not in bad]
        assert torch.equal(given.images[rows], expected.images[rows])
        assert torch.equal(given.labels[rows], expected.labels[rows])
    assert len(made.skipped) <= 1 + length // 500
    made.close(), intact.close()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def has_threads(expected: int) -> bool:
    """Whether this process has, or soon has, this number of threads. The kernel still lists a
    thread for a short time after it was joined."""
    until = time.monotonic() + 60
    while threads() != expected and time.monotonic() < until:
        time.sleep(0.001)
    return threads() == expected


def test_close_and_garbage_collection_end_every_thread(betons):
    list(loader(betons).epoch(0))
    gc.collect()
    time.sleep(0.1)  # threads of earlier tests may still be listed as well
    before = threads()
    made = loader(betons, num_workers=5)
    assert threads() == before + 5
    epoch = made.epoch(0)
    next(epoch)
    made.close()
    assert has_threads(before)
    made = loader(betons, num_workers=5)
    epoch = made.epoch(0)
    next(epoch)
    del made, epoch
    gc.collect()
    assert has_threads(before)


def test_memory_is_flat_over_many_epochs(betons):
    made = loader(betons, batch_size=32, resolution=96)
    resident = []
    for epoch in range(100):
        for _ in made.epoch(epoch):
            pass
        resident.append(psutil.Process().memory_info().rss)
    made.close()
    assert np.mean(resident[80:]) - np.mean(resident[20:40]) < 2e6


def test_resolution_can_change_between_epochs(betons):
    """Nothing is compiled, and the threads stay the same."""
    made = loader(betons)
    list(made.epoch(0))
    before = set(os.listdir("/proc/self/task"))
    with numba.core.event.install_recorder("numba:compile") as compiled:
        for resolution in (40, 24, 48):
            made.resolution = resolution
            assert next(made.epoch(1))[0].shape == (16, resolution, resolution, 3)
    assert not compiled.buffer and set(os.listdir("/proc/self/task")) == before
    made.close()


@numba.cfunc(
    numba.int32(
        numba.types.CPointer(numba.uint8),
        numba.int32,
        numba.int32,
        numba.types.CPointer(numba.int64),
        numba.types.voidptr,
    )
)
def paint(image, height, width, draw, scratch):
    if draw[0] == 13:
        return 8
    for i in range(height * width * 3):
        image[i] = draw[0] % 256
    return 0


class Paint(DrawnOperation):
    """A user-defined op in numba. Fills the image with the slot's number, and refuses slot 13."""

    def draw(self, address, heights, widths):
        return address.slots

    def generate_code(self):
        return paint.address


def test_user_defined_op_is_applied(betons):
    made = loader(betons, ops=[Paint()])
    epoch = made.epoch(0, start_step=1)
    for number, (images, _, slots) in enumerate(epoch, 1):
        assert np.array_equal(slots, np.arange(16 * number, 16 * number + 16))
        assert (images == torch.from_numpy(slots % 256)[:, None, None, None]).all()
    with pytest.raises(InputError, match="parameters that are out of range; correct the operation"):
        next(made.epoch(0))
    made.resolution = 17.5
    with pytest.raises(ValueError, match="resolution=17.5"):
        made.epoch(0)
    made.close()


def test_user_defined_status_is_reported(betons):
    refuse = numba.cfunc(
        numba.int32(
            numba.types.CPointer(numba.uint8),
            numba.int32,
            numba.int32,
            numba.types.CPointer(numba.int64),
            numba.types.voidptr,
        )
    )(lambda image, height, width, draw, scratch: 77)

    class Refuse(Paint):
        def generate_code(self):
            return refuse.address

    made = loader(betons, ops=[Refuse()])
    with pytest.raises(
        InputError, match="was rejected by an operation, with status 77; correct the operation"
    ):
        next(made.epoch(0))
    made.close()


def test_stalled_loader_raises(betons):
    """In a separate process, because a stuck thread cannot be ended."""
    code = textwrap.dedent(f"""
        import ctypes, threading
        from rsb_ffcv.loading import TrainLoader, pool
        from rsb_ffcv.ops.operation import DrawnOperation
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 5)
        kernel = prototype(lambda *_: threading.Event().wait())
        class Stuck(DrawnOperation):
            def draw(self, address, heights, widths):
                return address.slots
            def generate_code(self):
                return ctypes.cast(kernel, ctypes.c_void_p).value
        pool.STALL_SECONDS = 1.0
        made = TrainLoader({str(betons / "train.beton")!r}, batch_size=16, resolution=32,
                           num_workers=2, ops=[Stuck()])
        try:
            next(made.epoch(0))
        except RuntimeError as error:
            print("said:", error, flush=True)
        import os
        os._exit(0)  # the interpreter would wait for its two stuck calls
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "said: the loader hangs: no image was finished for 1 s; in progress: /" in done.stdout, (
        done.stderr
    )
    assert "Current thread" in done.stderr


def test_memory_in_use_outlives_a_close_from_another_thread(betons):
    held = Held()
    made = loader(betons, batch_size=2, ops=[held])
    closing = held.when_begun(2, made.close)
    with pytest.raises(RuntimeError, match="closed"):
        next(made.epoch(0))
    gc.collect()
    # Overwrites freed memory, if there is any
    kept = [np.full(size, 7, np.int64) for size in (2, 8, 16, 64, 500) for _ in range(300)]
    held.release.set()
    closing.join()
    assert len(kept) == 1500 and held.kept == [True, True]


def test_interrupted_wait_keeps_the_batch_for_its_threads(betons, monkeypatch):
    held = Held()
    made = loader(betons, batch_size=2, ops=[held])
    epoch = made.epoch(0)

    def interrupted(batch, name=str):
        raise KeyboardInterrupt

    monkeypatch.setattr(made._pool, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(epoch)
    assert made._pool._state.held  # the only reference to these batches
    monkeypatch.undo()
    held.release.set()
    made.close()
    assert not made._pool._state.held and all(held.kept)


def test_open_epochs_end_silently_in_cycles_and_at_exit(betons):
    code = textwrap.dedent(f"""
        import gc
        from rsb_ffcv.loading import TrainLoader
        class Run:
            pass
        for number in range(20):
            run = Run()
            run.loader = TrainLoader({str(betons / "train.beton")!r}, batch_size=2, resolution=32,
                                     num_workers=2)
            run.batches = run.loader.epoch(0)
            next(run.batches)
            run.me = run
            if number < 19:
                del run
                gc.collect()
        print("end")
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_replacement_of_a_bad_image_precedes_prefetched_images(betons, tmp_path, monkeypatch):
    data, file = (
        bytearray((betons / "train.beton").read_bytes()),
        read_beton(betons / "train.beton"),
    )
    data[int(file.pointers[0]) + 300] ^= 255
    (tmp_path / "train.beton").write_bytes(data)
    held = Held()
    made = loader(
        tmp_path, batch_size=1, num_workers=1, order="sequential", on_bad_sample="skip", ops=[held]
    )
    submit = made._pool.submit

    def noted(batch, urgent=False):
        submit(batch, urgent)
        if urgent:
            held.release.set()

    monkeypatch.setattr(made._pool, "submit", noted)
    next(made.epoch(0))
    assert made.skipped and held.begun[:2] == [1, 0]
    made.close()


def test_slow_images_are_not_a_stall(betons, monkeypatch):
    """Any finished image restarts the timer. The core's wait is replaced: its 0.2 s pass at once,
    and every third call waits until one more image is finished."""
    calls, turns = [], threading.Semaphore(0)

    class Library:
        def __getattr__(self, name):
            return getattr(native.library, name)

        def rsb_pool_wait(self, handle, job, milliseconds):
            calls.append(milliseconds)
            if len(calls) % 3 == 0:
                before, until = self.rsb_pool_progress(handle), time.monotonic() + 60
                turns.release()
                while self.rsb_pool_progress(handle) == before and time.monotonic() < until:
                    time.sleep(0.001)
            return native.library.rsb_pool_wait(handle, job, 0)

    kernel = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 5)(
        lambda *_: 0 if turns.acquire(timeout=60) else 1
    )

    class InTurn(Paint):
        def generate_code(self):
            return ctypes.cast(kernel, ctypes.c_void_p).value

    monkeypatch.setattr(pool, "library", Library())
    monkeypatch.setattr(pool, "STALL_SECONDS", 1.0)
    made = loader(betons, batch_size=16, num_workers=1, ops=[InTurn()])
    epoch = made.epoch(0)
    next(epoch)
    assert 3 * 16 <= len(calls) <= 3 * 16 + 1 and set(calls) == {200}  # 9.6 s, as the loader counts
    turns.release(1000)
    monkeypatch.undo()
    epoch.close()
    made.close()


def test_forked_process_raises_instead_of_hanging(betons):
    made = loader(betons)
    child = os.fork()
    if child == 0:
        try:
            next(made.epoch(0))
        except RuntimeError as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    made.close()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 128}, "`global_batch`=128: .* has only 96 images"),
        ({"num_workers": 0}, "`num_workers`=0"),
        ({"global_batch": 24}, "`global_batch`=24"),
        ({"rand_augment": "rand-x9"}, "x9"),
        ({"rand_augment": "augmix"}, "augmix"),
        ({"order": "shuffled"}, "`order`='shuffled'"),
        ({"on_bad_sample": "ignore"}, "`on_bad_sample`='ignore'"),
        ({"repeats": 0}, "`repeats`=0"),
        ({"decode": "both"}, "`decode`='both'"),
        ({"rank": 2}, "`rank`=2"),
        ({"interpolation": "nearest"}, "`interpolation`='nearest'"),
        ({"color_jitter": (0, 0, 0, 1)}, r"`color_jitter`\[3\]=1 must be"),
        ({"batch_size": 0}, "`batch_size`=0"),
        ({"scale": (0.5, 0.1)}, "`scale`="),
        ({"scale": (0.5, 2)}, "`scale`="),
        ({"ratio": (0, 1)}, "`ratio`="),
        ({"flip_prob": 7}, "`flip_prob`=7"),
        ({"flip_prob": float("nan")}, "`flip_prob`=nan"),
    ],
)
def test_invalid_settings_are_named_and_leave_nothing_open(betons, options, message):
    gc.collect()
    process = psutil.Process()
    threads, files = process.num_threads(), process.num_fds()
    with pytest.raises(InputError, match=message) as caught:
        loader(betons, **options)
    assert caught.tb  # keeps the loader that could not be made
    assert process.num_threads() <= threads and process.num_fds() <= files


def test_preload_refuses_a_file_larger_than_free_memory(betons, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 1000})())
    with pytest.raises(InputError, match="GB of memory are free"):
        loader(betons).preload()


def test_unknown_modes_of_the_batch_transform_are_refused():
    with pytest.raises(
        InputError, match="`erase_mode`='random': must be one of const, rand, pixel"
    ):
        BatchTransform(seed=0, erase_mode="random")
    with pytest.raises(InputError, match="`mode`='image': must be one of batch, pair, elem"):
        BatchTransform(seed=0, mode="image")


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_counts_of_the_draws_equal_the_pixels(mode):
    """The partner of a white image is black: the mean of a mixed image is the weight of its own
    pixels. In a normalized image, only an erased pixel is 0."""
    images = torch.zeros(12, 40, 40, 3, dtype=torch.uint8)
    images[:6] = 255
    black, white = normalize(images)[[11, 0]].double().mean((1, 2, 3))
    mixes = BatchTransform(seed=1, mixup_alpha=1.0, cutmix_alpha=1.0, mix_prob=0.7, mode=mode)
    erases = BatchTransform(seed=1, erase_prob=0.5, mode=mode)
    for slots in np.arange(48).reshape(4, 12):
        drawn = mixes.draw(2, slots, (40, 40))
        mixed, _ = mixes.apply(images, drawn)
        share = (mixed.double().mean((1, 2, 3)) - black) / (white - black)
        own = torch.cat([share[:6], 1 - share[6:]])
        counts = drawn.counts()
        assert (counts["groups"], counts["images"], counts["pixels"]) == (1, 12, 12 * 1600)
        assert counts["mixed"] == (own < 0.99999).sum() and counts["erased"] == 0
        assert counts["weight"] * WEIGHT_UNIT == pytest.approx(own.sum().item(), abs=1e-4)
        drawn = erases.draw(2, slots, (40, 40))
        erased, _ = erases.apply(images, drawn)
        assert drawn.counts()["erased"] == (erased == 0).all(1).sum() > 0
        assert drawn.counts()["weight"] * WEIGHT_UNIT == 12 and not drawn.counts()["mixed"]
