"""Damaged files as input of the compiled core, built with sanitizers, and of the reader."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.sizes import FUZZ_INPUTS

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "rsb_ffcv" / "ops" / "csrc"
SOURCES = [path for path in sorted(CSRC.glob("*.c")) if path.stem != "pool"]
# what a device does: neither it nor its emulation may rely on -fwrapv
DEVICE = [path for path in SOURCES if path.stem in ("pack", "emulate")]
CORE = [path for path in SOURCES if path not in DEVICE]
FLAGS = ["-std=gnu11", "-g", "-fwrapv", "-ffp-contract=off", f"-I{CSRC}"]
# -fwrapv defines integer overflow; any other undefined behaviour ends the program.
SANITIZE = [
    "-O1",
    "-fsanitize=address,undefined",
    "-fno-sanitize=signed-integer-overflow,shift-base",
    "-fno-sanitize-recover=all",
]
STRICT = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(target, *arguments):
    compile_c(target, *FLAGS, *arguments, "-lturbojpeg", "-lm")


def compile_c(target, *arguments):
    done = subprocess.run(
        ["cc", *map(str, arguments), "-o", str(target)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Small JPEGs of every kind that the decoder treats differently."""
    folder, rng = tmp_path_factory.mktemp("seeds"), np.random.default_rng(0)
    kinds: list[dict[str, Any]] = [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"optimize": True},
        {"progressive": True},
        {"restart_marker_blocks": 3},
        {"quality": 100},
    ]
    for number in range(3 * len(kinds)):
        height, width = (int(side) for side in rng.integers(8, 100, 2))
        small = rng.integers(0, 256, (5, 6, 3), np.uint8)
        image = np.asarray(Image.fromarray(small).resize((width, height))) // 2 + rng.integers(
            0, 60, (height, width, 3)
        )
        picture = Image.fromarray(image.astype(np.uint8)).convert("L" if number >= 18 else "RGB")
        options: dict[str, Any] = {"quality": 80, **kinds[number % len(kinds)]}
        picture.save(folder / f"{number}.jpg", **options)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("portable", [False, True])
def test_damaged_images_cause_no_invalid_memory_access(seeds, tmp_path, report, portable):
    objects = [tmp_path / f"{path.stem}.o" for path in DEVICE]
    for path, target in zip(DEVICE, objects):  # signed overflow ends the program here
        flags = [flag for flag in FLAGS if flag != "-fwrapv"]
        compile_c(target, *flags, "-O1", *STRICT, "-c", path)
    build(
        tmp_path / "fuzz",
        *SANITIZE,
        *(["-DRSB_PORTABLE"] if portable else []),
        HERE / "fuzz_core.c",
        *CORE,
        *objects,
    )
    done = subprocess.run(
        [tmp_path / "fuzz", str(FUZZ_INPUTS), "1", *seeds],
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = done.stdout.splitlines()
    statuses = [int(part.split(": ")[-1]) for part in first.split(" inputs:")[1].split(",")]
    equal, left_to_core = map(int, re.findall(r"\d+", last))
    assert equal > FUZZ_INPUTS / 100 and left_to_core > FUZZ_INPUTS / 100
    # each kind of check rejected some images, and some images passed
    assert sum(statuses) == FUZZ_INPUTS and all(statuses[i] > 0 for i in (0, 1, 2, 3, 4, 8)), (
        done.stdout
    )
    report(done.stdout.strip())


@pytest.mark.long
def test_threads_of_a_device_block_do_not_race(seeds, tmp_path):
    build(
        tmp_path / "threads", "-O1", "-fsanitize=thread", "-pthread", HERE / "threads.c", *SOURCES
    )
    smallest = min(seeds, key=lambda path: path.stat().st_size)
    done = subprocess.run(
        [tmp_path / "threads", smallest], capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "14 images equal\n"


def test_a_damaged_structure_is_rejected_or_harmless(tmp_path, report):
    build(
        tmp_path / "core.so", *SANITIZE, "-shared", "-fPIC", "-pthread", *SOURCES, CSRC / "pool.c"
    )
    runtime = subprocess.run(
        ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    done = subprocess.run(
        [
            sys.executable,
            HERE / "fuzz_header.py",
            str(max(1000, FUZZ_INPUTS // 10)),
            "1",
            tmp_path / "core.so",
        ],
        capture_output=True,
        text=True,
        timeout=3600,
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert " rejected by the reader; of the others, " in done.stdout
    report(done.stdout.strip())


def test_the_portable_code_and_the_vector_code_give_the_same_bytes(seeds, tmp_path):
    from rsb_ffcv.ops import native

    build(
        tmp_path / "portable.so",
        "-O2",
        "-DRSB_PORTABLE",
        "-shared",
        "-fPIC",
        "-pthread",
        *SOURCES,
        CSRC / "pool.c",
    )
    results = []
    shipped = native.library
    try:
        for library in (shipped, native.bind(tmp_path / "portable.so")):
            native.library, rng, images = library, np.random.default_rng(0), []
            for path in seeds:
                with Image.open(path) as picture:
                    width, height = picture.size
                for trial in range(6):
                    sample = np.zeros((), native.SAMPLE)
                    sample["size"], sample["height"], sample["width"] = (
                        path.stat().st_size,
                        height,
                        width,
                    )
                    h, w = rng.uniform(1, height), rng.uniform(1, width)
                    sample["box"] = (rng.uniform(0, height - h), rng.uniform(0, width - w), h, w)
                    sample["filter"], sample["flip"], sample["rows_first"] = (
                        trial % 2,
                        trial % 3 == 0,
                        trial > 3,
                    )
                    with open(path, "rb") as file:
                        images.append(
                            native.load(
                                file.fileno(),
                                sample,
                                (int(rng.integers(1, 90)), int(rng.integers(1, 90))),
                            )
                        )
                layers = np.zeros(14, native.LAYER)
                layers["op"], layers["filter"] = np.arange(14), rng.integers(0, 3, 14)
                layers["argument"] = rng.uniform(0.2, 1.4, (14, 6)) * (1, 0.3, 9, 0.3, 1, 9)
                layers["argument"][native.POSTERIZE : native.SOLARIZE_ADD + 1, 0] = 3, 128, 77
                images += [native.augment(images[-1], layer) for layer in layers]
            results.append(images)
    finally:
        native.library = shipped
    assert len(results[0]) > 300 and all(
        np.array_equal(a, b) for a, b in zip(*results, strict=True)
    )
