"""What a batch holds is a function of (seed, epoch, batch): not of threads, ranks or what was read
before."""

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
from rsb_ffcv.loading.order import RUN_BYTES, epoch_order, group_slots
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
        pointers=8192 + np.cumsum(sizes) - sizes,
        sizes=sizes,
        window_bytes=window_bytes,
    )


def test_the_order_is_a_new_permutation_each_epoch():
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


def test_quasi_random_keeps_to_its_windows():
    """Between two starts, only samples of the window's extents; every byte in one window; windows
    no larger than asked."""
    made = order("quasi_random", count=3000, window_bytes=10 << 20, size=60_000)
    assert 15 < len(made.starts) < 25 and made.starts[0] == 0
    first = 8192 + 60_000 * made.indices
    for window, (start, end) in enumerate(zip(made.starts, [*made.starts[1:], 3000])):
        extents = made.extents[window]
        inside = (first[start:end, None] >= extents[:, 0]) & (
            first[start:end, None] + 60_000 <= extents.sum(1)
        )
        assert (inside.sum(1) == 1).all()
        assert extents[:, 1].sum() == 60_000 * (end - start) <= (10 << 20) + 2 * RUN_BYTES
        assert extents[:, 1].max() <= RUN_BYTES + 60_000
        assert (
            abs(np.corrcoef(first[start:end], np.arange(end - start))[0, 1]) < 0.3
        )  # mixed within the window
    assert (order("quasi_random", window_bytes=1 << 40).indices == order("random").indices).all()


def test_quasi_random_mixes_the_classes_of_a_sorted_file():
    """1000 classes of 1300 images of 60 kB, class after class: what a batch of 256 holds (random
    order: 226)."""
    labels = np.repeat(np.arange(1000), 130)  # a tenth of ImageNet, windows a tenth of the default
    made = order("quasi_random", count=len(labels), window_bytes=(1 << 30) // 10, size=60_000)
    batches = labels[made.indices][: len(labels) // 256 * 256].reshape(-1, 256)
    classes = [len(set(batch)) for batch in batches]
    assert np.mean(classes) > 75 and min(classes) > 50


def test_repeated_augmentation_is_dealt_as_timms_sampler_does(monkeypatch):
    """timm's RepeatAugSampler over 8 processes of 16 images, fed with our permutation."""
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


def test_the_groups_of_a_step_cover_its_slots_once():
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
def test_bytes_do_not_depend_on_the_number_of_threads(betons, options):
    one = batches(loader(betons, num_workers=1, **options), 3)
    assert len(one) == 6
    for threads in (2, 4, 16):
        assert equal(one, batches(loader(betons, num_workers=threads, **options), 3))


def test_copies_of_an_image_differ_and_count_for_others(betons):
    """Repeats of 3: as many steps, a third of the images, each three times with three faces."""
    made = loader(betons, repeats=3, global_batch=48, rand_augment="", interpolation="bilinear")
    order = epoch_order(
        "random", 0, 0, pointers=made.beton.pointers, sizes=made.beton.sizes, window_bytes=1
    ).indices
    faces: dict[int, list] = {}
    for images, labels, slots in made.epoch(0):
        indices = order[slots // 3]
        assert (made.beton.labels[indices] == labels.numpy()).all()
        for index, image in zip(indices, images):
            faces.setdefault(index, []).append(image)
    made.close()
    assert len(faces) == 32 and all(len(copies) == 3 for copies in faces.values())
    assert all(
        not torch.equal(copies[i], copies[j])
        for copies in faces.values()
        for i, j in ((0, 1), (0, 2), (1, 2))
    )


def test_epochs_and_seeds_differ(betons):
    first = batches(loader(betons), 0)
    assert not equal(first, batches(loader(betons), 1)) and not equal(
        first, batches(loader(betons, seed=1), 0)
    )


def test_an_epoch_from_step_k_is_the_tail_of_the_epoch(betons):
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
def test_ranks_together_see_what_one_sees(betons, options):
    options = {"batch_size": 8, "global_batch": 48, **options}
    alone = batches(loader(betons, **options), 0)
    for world_size in (2, 3, 4, 5):  # the last two do not divide the 6 groups of a step
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


def test_a_step_with_fewer_groups_than_processes_is_refused(betons):
    with pytest.raises(InputError, match="`global_batch`=32: 2 groups of .*fewer than the 3 proc"):
        loader(betons, global_batch=32, world_size=3)
    with pytest.raises(InputError, match="`global_batch`=40 is not a multiple of `batch_size`=16"):
        loader(betons, global_batch=40)


def test_draws_belong_to_slots_not_to_places_in_a_batch():
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


def test_labels_belong_to_their_images(betons):
    for images, labels, _ in batches(loader(betons, rand_augment=""), 0):
        assert torch.equal(images.float().mean((1, 2)).argmax(1), labels)


def test_batches_may_be_kept(betons):
    made = loader(betons)
    kept = list(made.epoch(0))
    copies = [batch.images.clone() for batch in kept]
    list(made.epoch(1))
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(kept, copies))


def test_evaluation_counts_every_image_once_over_any_number_of_ranks(betons):
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
    """tmp_path/train.beton with the middle of some samples overwritten."""
    data = bytearray((betons / "train.beton").read_bytes())
    file = read_beton(betons / "train.beton")
    for sample in samples:
        start, size = int(file.pointers[sample]), int(file.sizes[sample])
        data[start + size // 2 : start + size // 2 + 20] = bytes(range(20))
    (tmp_path / "train.beton").write_bytes(data)


def test_a_damaged_image_reaches_the_caller_with_its_number(betons, tmp_path):
    damage(betons, tmp_path, [17])
    made = loader(tmp_path)
    with pytest.raises(
        InputError, match="sample 17 is damaged: its bytes do not match their checksum"
    ):
        list(made.epoch(0))
    with pytest.raises(InputError, match="sample 17 "):  # and the loader lives on
        list(made.epoch(1))
    evaluation = EvalLoader(
        tmp_path / "train.beton", batch_size=8, resolution=32, num_workers=2, crop_ratio=0.9
    )
    with pytest.raises(InputError, match="sample 17 "):
        list(evaluation)


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 1}, {"global_batch": 32, "rank": 1, "world_size": 2}]
)
def test_skipping_replaces_a_bad_image_by_that_of_the_next_readable_slot(betons, tmp_path, options):
    bad = [3, 17, 40, 41, 77]
    damage(betons, tmp_path, bad)
    whole, made = loader(betons, **options), loader(tmp_path, on_bad_sample="skip", **options)
    order = epoch_order(
        "random", 0, 1, pointers=made.beton.pointers, sizes=made.beton.sizes, window_bytes=1
    ).indices
    named = set()
    for sound, mended in zip(whole.epoch(1), made.epoch(1), strict=True):
        assert np.array_equal(sound.slots, mended.slots)
        for row, slot in enumerate(mended.slots):
            same = torch.equal(sound[0][row], mended[0][row])
            assert same == (order[slot] not in bad)
            if not same:
                named.add(int(order[slot]))
                heir = next(
                    order[(slot + k) % 96]
                    for k in range(1, 96)
                    if order[(slot + k) % 96] not in bad
                )
                assert mended[1][row] == made.beton.labels[heir]
    assert {index for index, reason in made.skipped} == named and all(
        "checksum" in reason for _, reason in made.skipped
    )
    list(made.epoch(0))
    assert len(made.skipped) <= 5  # each epoch counts its own
    whole.close(), made.close()


def test_a_file_of_damaged_images_ends_even_where_bad_ones_are_skipped(betons, tmp_path):
    damage(betons, tmp_path, range(96))
    with pytest.raises(InputError, match="the 95 samples that follow it cannot be read either"):
        list(loader(tmp_path, on_bad_sample="skip").epoch(0))


def test_a_file_that_shrinks_while_it_is_read_gives_an_error(betons, tmp_path):
    (tmp_path / "train.beton").write_bytes((betons / "train.beton").read_bytes())
    made = loader(tmp_path)
    with open(tmp_path / "train.beton", "r+b") as file:
        file.truncate(int(made.beton.pointers[40]))
    with pytest.raises(InputError, match="cannot be read: the file ends"):
        list(made.epoch(0))


def test_closing_an_epoch_early_gives_up_what_was_begun(betons):
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
    """Holds each image until `release` is set. begun: the slots, in the order in which threads came
    to them; kept: whether an image's draws were the same before and after."""

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
                self.release.set()  # a defect: once is enough to wait
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
        """Calls `action` on a thread once so many images are held."""

        def act():
            for _ in range(images):
                self.came.acquire()
            action()

        thread = threading.Thread(target=act)
        thread.start()
        return thread


def test_closing_from_another_thread_lets_go_who_waits(betons):
    held = Held()
    made = loader(betons, ops=[held], num_workers=1)
    closing = held.when_begun(1, made.close)
    with pytest.raises(RuntimeError, match="closed"):
        next(made.epoch(0))
    assert closing.is_alive()  # until the image is done, which who waited is not held up by
    held.release.set()
    closing.join()
    made.close()


@pytest.mark.parametrize("seed", range(30))
def test_overwritten_stretches_never_become_images(betons, tmp_path, seed):
    """Random bytes over a random stretch: the file is refused, or every image delivered is the
    undamaged one's."""
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
    sound, order = (
        loader(betons, rand_augment=""),
        epoch_order(
            "random", 0, 0, pointers=file.pointers, sizes=file.sizes, window_bytes=1
        ).indices,
    )
    for given, expected in zip(made.epoch(0), sound.epoch(0)):
        bad = {index for index, _ in made.skipped}
        rows = [row for row, slot in enumerate(given.slots) if order[slot] not in bad]
        assert torch.equal(given.images[rows], expected.images[rows])
        assert torch.equal(given.labels[rows], expected.labels[rows])
    assert len(made.skipped) <= 1 + length // 500
    made.close(), sound.close()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def has_threads(expected: int) -> bool:
    """Whether this process has so many, or soon has: the kernel lists one a little longer than it
    can be joined."""
    until = time.monotonic() + 60
    while threads() != expected and time.monotonic() < until:
        time.sleep(0.001)
    return threads() == expected


def test_close_and_garbage_collection_end_every_thread(betons):
    list(loader(betons).epoch(0))
    gc.collect()
    time.sleep(0.1)  # for what earlier tests have left, likewise
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


def test_the_resolution_may_change_between_epochs_at_once(betons):
    """Without compiling anything, and on the same threads."""
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
    """An op of a user, in numba: the whole image takes the slot's number as its colour; slot 13 is
    refused."""

    def draw(self, address, heights, widths):
        return address.slots

    def generate_code(self):
        return paint.address


def test_an_op_of_ones_own_takes_part(betons):
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


def test_a_status_of_ones_own_is_told(betons):
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
        InputError, match="was refused by an operation, with status 77; correct the operation"
    ):
        next(made.epoch(0))
    made.close()


def test_a_loader_that_stands_still_says_so(betons):
    """In a process of its own: a stuck thread cannot be ended."""
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
        os._exit(0)  # the interpreter itself would wait for the two stuck calls into it
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (
        "said: the loader hangs: no image was finished for 1 s; in progress: sample " in done.stdout
    ), done.stderr
    assert "Current thread" in done.stderr


def test_what_threads_still_work_on_outlives_a_close_from_elsewhere(betons):
    held = Held()
    made = loader(betons, batch_size=2, ops=[held])
    closing = held.when_begun(2, made.close)
    with pytest.raises(RuntimeError, match="closed"):
        next(made.epoch(0))
    gc.collect()
    kept = [
        np.full(size, 7, np.int64) for size in (2, 8, 16, 64, 500) for _ in range(300)
    ]  # takes freed memory, if any is
    held.release.set()
    closing.join()
    assert len(kept) == 1500 and held.kept == [True, True]


def test_an_interrupted_wait_leaves_the_batch_to_its_threads(betons, monkeypatch):
    held = Held()
    made = loader(betons, batch_size=2, ops=[held])
    epoch = made.epoch(0)

    def interrupted(batch, name=str):
        raise KeyboardInterrupt

    monkeypatch.setattr(made._pool, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(epoch)
    assert made._pool._state.held  # nobody else has a word for these batches
    monkeypatch.undo()
    held.release.set()
    made.close()
    assert not made._pool._state.held and all(held.kept)


def test_open_epochs_end_quietly_with_a_cycle_and_with_the_interpreter(betons):
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


def test_the_replacement_of_a_bad_image_is_begun_before_all_that_was_begun_ahead(
    betons, tmp_path, monkeypatch
):
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


def test_slow_images_are_not_taken_for_a_standstill(betons, monkeypatch):
    """Any image that gets done counts. The wait for the core is replaced: its 0.2 s pass at once,
    and every third call waits until one image more is done."""
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
    assert 3 * 16 <= len(calls) <= 3 * 16 + 1 and set(calls) == {200}  # 9.6 s by its count
    turns.release(1000)
    monkeypatch.undo()
    epoch.close()
    made.close()


def test_a_forked_process_is_told_that_it_has_no_threads(betons):
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
        ({"batch_size": 128}, "holds 96"),
        ({"num_workers": 0}, "`num_workers`=0"),
        ({"global_batch": 24}, "`global_batch`=24"),
        ({"rand_augment": "rand-x9"}, "x9"),
        ({"rand_augment": "augmix"}, "augmix"),
        ({"order": "shuffled"}, "`order`='shuffled'"),
        ({"on_bad_sample": "ignore"}, "`on_bad_sample`='ignore'"),
        ({"repeats": 0}, "`repeats`=0"),
        ({"rank": 2}, "`rank`=2"),
        ({"interpolation": "nearest"}, "interpolation='nearest'"),
        ({"color_jitter": (0, 0, 0, 1)}, "color_jitter="),
        ({"batch_size": 0}, "`batch_size`=0"),
        ({"scale": (0.5, 0.1)}, "scale="),
        ({"scale": (0.5, 2)}, "scale="),
        ({"ratio": (0, 1)}, "ratio="),
        ({"flip_prob": 7}, "flip_prob=7"),
        ({"flip_prob": float("nan")}, "flip_prob=nan"),
    ],
)
def test_wrong_settings_are_named(betons, options, message):
    with pytest.raises(InputError, match=message):
        loader(betons, **options)


def test_a_file_that_does_not_fit_in_memory_is_refused_before_it_is_read(betons, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 1000})())
    with pytest.raises(InputError, match="GB of memory are free"):
        loader(betons).preload()
