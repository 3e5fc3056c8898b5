"""The device kernels, emulated, and on a GPU if there is one: their pixels are the CPU core's, byte
for byte, in any order of threads. They compile for GPUs without spills, stacks or fused
products."""

import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rsb_ffcv import InputError
from rsb_ffcv.gpu import driver
from rsb_ffcv.gpu.batch import Decoded, DeviceDecoder
from rsb_ffcv.loading import EvalLoader, TrainLoader
from rsb_ffcv.loading.pool import Pool, Work
from rsb_ffcv.ops import native
from tests.images import KINDS, jpeg, photograph

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import kernels

# where the kernels run, and the order of the threads of an emulated block
PLACES = {"ascending": ("cpu", 0), "descending": ("cpu", 1), "random": ("cpu", 7)}
if torch.cuda.is_available():
    PLACES["GPU"] = ("cuda", 0)
DEVICES = sorted({device for device, _ in PLACES.values()})


def stored(data: bytes, entries: bytes, size: tuple[int, int], raw: bool = False):
    """One stored image: its bytes, and a SAMPLE record whose box is the whole image."""
    sample = np.zeros((), native.SAMPLE)
    sample["size"], sample["entry_bytes"], sample["raw"] = len(data), len(entries), raw
    sample["height"], sample["width"] = size
    sample["box"] = 0, 0, *size
    return data + entries, sample


def jpeg_sample(image, entered=True, **options):
    data, _ = jpeg(image, **options)
    size = image.shape[:2]
    entries = native.entry_points(np.frombuffer(data, np.uint8), *size).tobytes()
    return stored(data, entries if entered else b"", size)


def random_box(rng, height: int, width: int) -> tuple[float, ...]:
    """A crop: often between pixels, sometimes narrow or a single pixel."""
    sides = [
        1 if rng.random() < 0.1 else float(rng.uniform(0.2, 1)) * side for side in (height, width)
    ]
    top, left = (
        float(rng.uniform(0, side - length)) for side, length in zip((height, width), sides)
    )
    if rng.random() < 0.3:
        top, left = float(int(top)), float(int(left))
    return (top, left, *sides)


def decode(images, out, layers=(), *, place=("cpu", 0), memory_mb=64, scratch_bytes=None):
    """Decodes `images` of `stored` with the core and on a device.

    layers: LAYER records (n,) or (n, k) of each operation.

    Returns the pixels and statuses of both, and the kinds of the packed rows.
    """
    pool, file = Pool(2), os.memfd_create("images")
    device = DeviceDecoder(torch.device(place[0]), memory_mb, place[1])
    if scratch_bytes is not None:
        device._scratch_bytes = scratch_bytes
    try:
        samples = np.zeros(len(images), native.SAMPLE)
        for row, (data, sample) in enumerate(images):
            samples[row] = sample
            samples["pointer"][row] = os.lseek(file, 0, os.SEEK_CUR)
            os.write(file, data)
        samples["file"] = file
        operations = [
            (native.AUGMENT, drawn, drawn.shape[1] if drawn.ndim > 1 else 1) for drawn in layers
        ]
        shape = (len(images), *out, 3)
        slab = device.slab(
            samples, shape, draws=layers, memory=lambda size: pool.memory(size, place[0] == "cuda")
        )
        plain = pool.memory(shape, False)
        works = [
            Work(place, decoder=native.DECODE, samples=samples, operations=operations)
            for place in (plain, slab)
        ]
        for work in works:
            pool.submit(work)
            pool.wait(work)
        kinds = slab.records["kind"].copy()
        decoded = device.decode(slab)
        for row in decoded.failed_rows():  # as the loader does: the core makes them
            decoded.images[row], works[1].status[row] = plain[row], works[0].status[row]
        failed = decoded.status.numpy().copy()
        return (
            (plain.numpy().copy(), works[0].status),
            (decoded.images.cpu().numpy().copy(), works[1].status),
            kinds,
            failed,
        )
    finally:
        pool.close()
        os.close(file)


def assert_equal(core, device):
    (pixels, statuses), (others, other_statuses) = core, device
    assert statuses.tolist() == other_statuses.tolist()
    good = statuses == 0
    differing = [
        row for row in np.flatnonzero(good) if not np.array_equal(pixels[row], others[row])
    ]
    assert not differing, differing


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", [*KINDS, "grey", "raw"])
def test_any_crop_equals_the_cores(kind, place):
    rng, images = np.random.default_rng(len(kind)), []
    for trial in range(24):
        height, width = (int(side) for side in rng.integers(1, 260, 2))
        if trial % 6 == 0:
            height, width = (1 + trial, 400) if trial % 12 else (400, 1 + trial)
        image = photograph(rng, height, width)
        if kind == "raw":
            made = stored(image.tobytes(), b"", (height, width), raw=True)
        else:
            options = {"quality": int(rng.integers(20, 99)), **KINDS.get(kind, {})}
            made = jpeg_sample(image[..., 0] if kind == "grey" else image, **options)
        made[1]["box"] = random_box(rng, height, width)
        made[1]["filter"], made[1]["flip"], made[1]["rows_first"] = rng.integers(0, 2, 3)
        images.append(made)
    core, device, kinds, failed = decode(images, (45, 61), place=PLACES[place])
    assert_equal(core, device)
    assert not failed.any() and not core[1].any()
    usual = {"raw": native.PACKED_RAW, "progressive": 0, "restarts": 0}
    # libjpeg does not smooth subsampled chroma of few columns, and the core leaves these to it
    wide = [sample["width"] >= 5 for _, sample in images]
    assert (kinds[wide] == usual.get(kind, native.PACKED_JPEG)).all(), kinds


@pytest.mark.parametrize("device", DEVICES)
def test_crops_of_whole_large_images_equal_the_cores(device):
    """Enlarged, reduced more than 30 times, and with many segments in a block of threads."""
    rng = np.random.default_rng(5)
    images = []
    for size, subsampling in (((1500, 2100), 2), ((900, 1300), 0), ((2500, 64), 1), ((9, 3000), 2)):
        for filter, rows_first in itertools.product((0, 1), (0, 1)):
            made = jpeg_sample(photograph(rng, *size), subsampling=subsampling, quality=80)
            made[1]["filter"], made[1]["rows_first"] = filter, rows_first
            images.append(made)
    for out in ((1, 1), (30, 200)):
        core, made, kinds, failed = decode(images, out, place=(device, 0))
        assert_equal(core, made)
        assert (kinds == native.PACKED_JPEG).all() and not failed.any()


def layer(op: int, *argument: float, filter: int = 0, fill=(124, 116, 104)) -> np.ndarray:
    made = np.zeros((), native.LAYER)
    made["op"], made["filter"], made["fill"] = op, filter, fill
    made["argument"][: len(argument)] = argument
    return made


def turned(degrees: float, x: float, y: float, zoom: float = 1) -> tuple[float, ...]:
    """Coefficients of a rotation with a zoom and a shift."""
    c, s = zoom * np.cos(np.radians(degrees)), zoom * np.sin(np.radians(degrees))
    return (c, s, x, -s, c, y)


LAYERS = {
    "identity": [layer(native.IDENTITY)],
    "autocontrast": [layer(native.AUTOCONTRAST)],
    "equalize": [layer(native.EQUALIZE)],
    "invert": [layer(native.INVERT)],
    "posterize": [layer(native.POSTERIZE, bits) for bits in (0, 1, 2.7, 4, 7, 8)],
    "solarize": [layer(native.SOLARIZE, at) for at in (0, 0.5, 100, 128.3, 256)],
    "solarize_add": [layer(native.SOLARIZE_ADD, add) for add in (0, 30, 109.9, -20)],
    "color": [layer(native.COLOR, factor) for factor in (0, 0.1, 1, 1.9, -0.5)],
    "contrast": [layer(native.CONTRAST, factor) for factor in (0, 0.1, 1, 1.9)],
    "brightness": [layer(native.BRIGHTNESS, factor) for factor in (0, 0.1, 1, 1.9)],
    "sharpness": [layer(native.SHARPNESS, factor) for factor in (0, 0.1, 1, 1.9)],
    "blur": [layer(native.BLUR, sigma) for sigma in (0.1, 0.5, 1, 2, 3.3, 40)],
    "hue": [layer(native.HUE, shift) for shift in (-0.5, -0.1, 0, 0.3, 0.5)],
    "affine": [
        layer(native.AFFINE, *coefficients, filter=filter)
        for filter in (0, 1)
        for coefficients in (
            turned(0, 0, 0),
            turned(17, 3, -8.5),
            turned(-170, 60, 50.25),
            turned(5, -2, 2, 0.3),
            turned(40, 30, 1, 2.5),
            (1, 0.4, -7, 0, 1, 0),
            (5e4, 3, 0, 1, 1e4, 0),
            turned(0, 500, 0),
        )
    ],
    "nearest": [
        layer(native.AFFINE, *coefficients, filter=native.NEAREST, fill=(0, 0, 0))
        for coefficients in (
            turned(0, 0, 0),
            turned(90, 0, 40),
            turned(-170, 60, 50.25),
            turned(40, 30, 1, 2.5),
            (1, 0, -7, 0, 1, 0),
            (1, 0.4, -7, 0, 1, 0),
            (1, 0, 0.5, 1e-9, 1, -0.5),
            (3e4, 3, 0, 1, 1e4, 0),
        )
    ],
}


def raw_image(rng, size: tuple[int, int], kind: int = 0):
    image = photograph(rng, *size)
    if kind == 1:
        image = np.broadcast_to(image[:1, :1], image.shape)  # one colour
    if kind == 2:
        image = rng.integers(0, 256, image.shape).astype(np.uint8)
    return stored(np.ascontiguousarray(image).tobytes(), b"", size, raw=True)


# pixels that are a multiple of 4, and that are not; more rows and columns than a block does at once
@pytest.mark.parametrize("out", [(1, 1), (2, 3), (3, 3), (64, 64), (37, 90), (5, 140)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_each_operation_equals_the_cores(name, out):
    rng = np.random.default_rng(3)
    images = [raw_image(rng, out, kind) for kind in range(3) for _ in LAYERS[name]]
    drawn = np.array(LAYERS[name] * 3)
    for place in PLACES.values():
        core, made, kinds, failed = decode(images, out, [drawn], place=place)
        assert_equal(core, made)
        assert (kinds == native.PACKED_RAW).all() and not failed.any() and not core[1].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("out", [(24, 50), (51, 23), (1, 90), (70, 1)], ids=str)
def test_any_affine_operation_equals_the_cores(out, device):
    """Also coefficients that are 0, tiny or huge, and whole numbers: borders of the image then lie
    on the centres of pixels."""
    rng = np.random.default_rng(out[0])
    drawn = []
    for trial in range(300):
        rows = rng.normal(0, 1, (2, 3))
        if trial % 3 == 0:
            rows = rng.integers(-2, 3, (2, 3)) / 2.0
        rows *= rng.choice([1, 1, 1, 1e-9, 1e4, 0], (2, 3))
        # a pixel within the image, or near it, that the middle of the output comes from
        middle = rng.uniform(-0.2, 1.2, 2) * out[::-1]
        rows[:, 2] = middle - rows[:, :2] @ (np.array(out[::-1]) / 2)
        if trial % 3 == 0:
            rows[:, 2] = np.round(2 * rows[:, 2]) / 2
        filter = trial // 3 % 3
        most = 3e4 if filter == native.NEAREST else 1e6
        drawn.append(layer(native.AFFINE, *rows.clip(-most, most).ravel(), filter=filter))
    images = [raw_image(rng, out, 2) for _ in drawn]
    core, made, *_, failed = decode(images, out, [np.array(drawn)], place=(device, 0))
    assert_equal(core, made)
    assert not failed.any() and not core[1].any()
    filled = (core[0] == (124, 116, 104)).all(axis=-1)
    assert 0.1 < filled.mean() < 0.9


@pytest.mark.parametrize("device", DEVICES)
def test_all_pairs_of_operations_equal_the_cores(device):
    rng = np.random.default_rng(4)
    pairs = [
        (layers[i % len(layers)], others[(i + 1) % len(others)])
        for i, (layers, others) in enumerate(itertools.product(LAYERS.values(), repeat=2))
    ]
    images = [raw_image(rng, (40, 33)) for _ in pairs]
    core, made, kinds, failed = decode(images, (40, 33), [np.array(pairs)], place=(device, 0))
    assert_equal(core, made)
    assert (kinds == native.PACKED_RAW).all() and not core[1].any()
    assert len({image.tobytes() for image in core[0]}) > 0.9 * len(pairs)


def test_invalid_layers_have_the_statuses_of_the_core():
    wrong = [
        layer(99),
        layer(-1),
        layer(native.BLUR, np.nan),
        layer(native.COLOR, 1e9),
        layer(native.AFFINE, 1, 0, 0, 0, np.inf, 0),
        layer(native.AFFINE, 1, 0, 0, 0, 2e6, 0),
        layer(native.AFFINE, 1, 0, 0, 0, 4e4, 0, filter=native.NEAREST),
        layer(native.AFFINE, 1, 0, 0, 0, 1, 0, filter=3),
    ]
    images = [raw_image(np.random.default_rng(0), (8, 8)) for _ in wrong]
    core, device, *_ = decode(images, (8, 8), [np.array(wrong)])
    assert core[1].tolist() == device[1].tolist() == [8] * len(wrong)


@pytest.mark.parametrize("device", DEVICES)
def test_damaged_images_equal_the_cores_or_fail_alike(device):
    """Bytes of the file and of the entry points. Where the segments of a row do not fit together,
    the core makes the row."""
    rng, images = np.random.default_rng(6), []
    for trial in range(400):
        height, width = (int(side) for side in rng.integers(20, 200, 2))
        options = list(KINDS.values())[trial % 4]
        data, sample = jpeg_sample(photograph(rng, height, width), **options)
        damaged = bytearray(data)
        start = int(sample["size"]) if trial % 3 == 0 else len(data) // 4
        for _ in range(1 + trial % 3):
            damaged[int(rng.integers(start, len(data)))] = int(rng.integers(0, 256))
        sample["box"] = random_box(rng, height, width)
        images.append((bytes(damaged), sample))
    core, made, kinds, failed = decode(images, (40, 40), place=(device, 0))
    assert_equal(core, made)
    assert (kinds == native.PACKED_JPEG).sum() > 100 and failed.sum() > 50
    assert 0 < (core[1] != 0).sum() < 300


def test_images_without_entry_points_are_made_by_the_core():
    rng = np.random.default_rng(8)
    images = [jpeg_sample(photograph(rng, 90, 70), entered=i % 2 == 0) for i in range(6)]
    drawn = np.array([layer(native.INVERT)] * 6)
    core, device, kinds, _ = decode(images, (32, 32), [drawn])
    assert_equal(core, device)
    assert kinds.tolist() == [native.PACKED_JPEG, native.PACKED_PIXELS] * 3


def test_memory_bounds_do_not_change_the_pixels():
    """Batches are cut into parts; an image that needs more than the bound is made by the core."""
    rng = np.random.default_rng(9)
    sides = [60, 64, 300, 62, 400, 61, 63]
    images = [jpeg_sample(photograph(rng, side, side)) for side in sides]
    drawn = np.array([layer(native.SHARPNESS, 1.5)] * len(images))
    core, device, kinds, _ = decode(images, (48, 48), [drawn])
    assert_equal(core, device)
    assert (kinds == native.PACKED_JPEG).all()
    core, device, kinds, _ = decode(images, (48, 48), [drawn], scratch_bytes=300_000)
    assert_equal(core, device)
    assert [side for side, kind in zip(sides, kinds) if kind == native.PACKED_PIXELS] == [300, 400]


def test_slabs_stay_within_32_bit_offsets():
    """Whatever `memory_mb` allows: more images than fit are left to the core."""
    device = DeviceDecoder(torch.device("cpu"), 65536)
    samples = np.zeros(4096, native.SAMPLE)
    samples["size"] = 4 << 20
    sizes = []

    def memory(shape):
        sizes.extend(shape)
        return torch.empty(1 << 26, dtype=torch.uint8)

    shape = (4096, 32, 32, 3)
    device.slab(samples, shape, draws=[], memory=memory)
    assert (1 << 31) < sizes[0] < 1 << 32
    with pytest.raises(
        InputError, match="`batch_size`=30000: images of 224 px are too many to dec"
    ):
        device.check(30_000, 224)


def test_too_little_device_memory_is_named_in_one_line(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(DeviceDecoder, "_decode", fail)
    with pytest.raises(
        InputError,
        match=r"^`memory_mb`=64: the device has too little free memory to decode \(CUDA out of "
        r"memory. Tried to allocate\); lower it or the batch size, or use `decode`=cpu$",
    ):
        decode([raw_image(np.random.default_rng(0), (8, 8))], (8, 8))


RECIPES: dict[str, dict] = {
    "crop": {},
    "RandAugment": {"rand_augment": "rand-m9-n3-mstd0.5-inc1"},
    "3-Augment, jitter": {"rand_augment": "3a", "color_jitter": (0.3, 0.3, 0.3, 0.1)},
    "TrivialAugment, repeats": {"rand_augment": "ta_wide", "repeats": 3},
    "torchvision's RandAugment": {"rand_augment": "ra-n3-m9"},
    "AutoAugment": {"rand_augment": "aa-cifar10"},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_train_loader_gives_the_same_batches(betons, recipe, device):
    given = [
        list(
            TrainLoader(
                betons / "train.beton",
                batch_size=8,
                resolution=40,
                num_workers=2,
                seed=3,
                decode=decode,
                device=device,
                **RECIPES[recipe],
            ).epoch(2, start_step=1)
        )
        for decode in ("cpu", "gpu")
    ]
    assert len(given[0]) == len(given[1]) > 3
    for one, other in zip(*given):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert one.slots.tolist() == other.slots.tolist()


def test_rows_that_the_device_leaves_to_the_core_are_in_the_batch(betons, monkeypatch):
    """As if the segments of two rows of each batch did not fit together."""
    options: dict[str, Any] = {"batch_size": 8, "resolution": 40, "num_workers": 2}

    def leave_two(decoded):
        decoded.images[[0, 5]] = 0
        return np.array([0, 5])

    monkeypatch.setattr(Decoded, "failed_rows", leave_two)
    plain, made = (
        TrainLoader(betons / "train.beton", decode=decode, **options) for decode in ("cpu", "gpu")
    )
    for one, other in zip(plain.epoch(1), made.epoch(1), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("device", DEVICES)
def test_eval_loader_gives_the_same_batches(betons, device):
    given = [
        list(
            EvalLoader(
                betons / "val.beton",
                batch_size=7,
                resolution=48,
                num_workers=2,
                crop_ratio=0.95,
                decode=decode,
                device=device,
            )
        )
        for decode in ("cpu", "gpu")
    ]
    assert len(given[0]) == len(given[1])
    for one, other in zip(*given):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


# ---- compiled for GPUs ----


@pytest.mark.parametrize(
    "major", [9, *(pytest.param(n, marks=pytest.mark.long) for n in (8, 10, 12))]
)
def test_kernels_compile_within_their_limits(major):
    """At most 64 registers; no warning, stack, local memory or fused products."""
    found = kernels.usage(major, 0)
    assert set(found) == set(driver.NAMES)
    for name, taken in found.items():
        assert taken["REG"] <= 64 and taken["STACK"] == taken["LOCAL"] == 0, (name, taken)
        threads = driver.THREADS[driver.NAMES.index(name)]
        assert 0.5 <= kernels.occupancy((major, 0), threads, taken) <= 1, (name, taken)
    ptx, _ = driver.compile_for(major, 0, ptx=True)
    assert b".visible .entry rsb_entropy" in ptx and b"fma.rn" not in ptx


def test_threads_of_a_block_are_those_of_the_kernels():
    """driver.THREADS and the constants of csrc/shared."""
    text = "".join(path.read_text() for path in (native.CSRC / "shared").glob("*.h"))
    constants = dict(re.findall(r"(\w+_THREADS) = (\d+)", text))
    listed = re.findall(r"KERNEL\((\w+), \w+, (\w+),", text)
    assert [name for name, _ in listed] == list(driver.NAMES)
    assert tuple(int(constants[name]) for _, name in listed) == driver.THREADS


def test_gpus_that_cannot_be_compiled_for_are_named():
    with pytest.raises(InputError, match="`decode`=gpu: NVRTC does not support GPUs of .* 3.5; "):
        driver.compile_for(3, 5)
    ptx, _ = driver.compile_for(99, 0)  # newer than NVRTC: the driver compiles it
    assert b".visible .entry rsb_entropy" in ptx


def test_driver_that_fails_is_named_in_one_line(monkeypatch):
    """A driver that is too old for the compiled kernels, as the CUDA driver reports it."""

    class OldDriver:
        def cuGetErrorString(self, status):
            return 0, b"the provided PTX was compiled with an unsupported toolchain"

        def cuModuleLoadData(self, image):
            return 222, None

    cuda = driver.Cuda.__new__(driver.Cuda)
    cuda._driver = OldDriver()
    with pytest.raises(
        InputError,
        match=r"^`decode`=gpu: cuModuleLoadData failed \(the provided PTX was compiled with an "
        r"unsupported toolchain\); update the NVIDIA driver if it is older than CUDA [\d.]+, or "
        r"use `decode`=cpu$",
    ):
        cuda._load(b"")


def test_kernels_that_do_not_compile_are_named_with_the_compilers_reason(monkeypatch, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "kernels.h").write_text("#error no such luck\n")
    monkeypatch.setattr(driver, "CSRC", tmp_path)
    with pytest.raises(InputError, match=r"for compute capability 9.0 \(.*no such luck"):
        driver.compile_for.__wrapped__(9, 0)


def test_missing_cuda_packages_are_named_in_one_line(monkeypatch):
    with pytest.raises(InputError, match="cuda-bindings cannot be imported .*; install it with"):
        driver.bindings("no_such_module")

    class WithoutLibrary:
        @staticmethod
        def nvrtcGetSupportedArchs():
            raise RuntimeError("Failure finding libnvrtc.so\nmore")

    monkeypatch.setattr(driver, "bindings", lambda name: WithoutLibrary)
    with pytest.raises(
        InputError,
        match=r"NVRTC cannot be loaded \(Failure finding libnvrtc.so\); install nvidia-cuda-nvrtc",
    ):
        driver.compile_for.__wrapped__(9, 0)
