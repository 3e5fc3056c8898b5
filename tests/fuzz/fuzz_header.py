"""Passes damaged `.beton` files to the reader, and the files that it accepts to the compiled core.

    python tests/fuzz/fuzz_header.py <count> <seed> <core.so>

A small file of JPEG and raw images, with and without checksums and entry points, is truncated or
damaged: anywhere, but mostly in its header, metadata, table and trailer. Either the reader refuses
it with an InputError, or each sample can be passed to the core, which returns an image or a reason.
Run it with the core built for AddressSanitizer and with its runtime preloaded.
"""

import io
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from rsb_ffcv import InputError, beton
from rsb_ffcv.ops import native


def small_file(count: int = 12, extras_too: bool = True) -> np.ndarray:
    """Returns the bytes of a complete file in the writer's layout, in pages of 4 KiB."""
    rng = np.random.default_rng(0)
    metadata, table = np.zeros(count, beton.SAMPLE_METADATA), np.zeros(count, beton.ALLOCATION)
    header, fields = np.zeros(1, beton.HEADER), np.zeros(2, beton.FIELD)
    for row, (name, kind) in zip(
        fields, ((b"image", beton.IMAGE_TYPE_ID), (b"label", beton.INT_TYPE_ID))
    ):
        row["type_id"], row["name"][:5] = kind, np.frombuffer(name, np.uint8)
    front = header.nbytes + fields.nbytes + metadata.nbytes
    end = front + -front % 4096
    images, extras = [bytes(end - front)], np.zeros(count, beton.EXTRA)
    for i in range(count):
        height, width = (int(side) for side in rng.integers(8, 40, 2))
        pixels, buffer = rng.integers(0, 256, (height, width, 3), np.uint8), io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=60)
        stored = pixels.tobytes() if i % 3 == 0 else buffer.getvalue()
        metadata[i] = ((beton.RAW if i % 3 == 0 else beton.JPG, width, height, end), i % 4)
        table[i] = (i, end, len(stored))
        entries = (
            native.entry_points(np.frombuffer(stored, np.uint8), height, width).tobytes()
            if i % 3
            else b""
        )
        extras[i] = native.checksum(np.frombuffer(stored + entries, np.uint8)), len(entries)
        images.append(stored + entries)
        end += len(stored + entries)
    images.append(bytes(-end % 4096))
    end += -end % 4096
    header["version"], header["num_fields"], header["page_size"], header["num_samples"] = (
        beton.VERSION,
        2,
        4096,
        count,
    )
    names = np.frombuffer(b"".join(b"image %d\0" % i for i in range(count)), np.uint8)
    about = np.frombuffer(
        json.dumps(
            asdict(
                beton.About(
                    tool={}, settings={}, source={}, classes=list("abcd"), titles=[], counts={}
                )
            )
        ).encode(),
        np.uint8,
    )
    header["alloc_table_ptr"] = end + (
        sum(map(len, (names, about))) + extras.nbytes + beton.TRAILER.itemsize if extras_too else 0
    )
    start = header.tobytes() + fields.tobytes() + metadata.tobytes()
    trailer = beton.make_trailer(
        extras,
        len(names),
        names_checksum=native.checksum(names),
        about=about,
        structure=beton.structure_checksum(start, table),
    )
    tail = [part.tobytes() for part in (extras, names, about, trailer)] if extras_too else []
    return np.frombuffer(b"".join([start, *images, *tail, table.tobytes()]), np.uint8)


def damage(whole: np.ndarray, rng) -> np.ndarray:
    data = whole.copy()
    header = whole[:24].view(beton.HEADER)[0]
    metadata = 24 + 2 * beton.FIELD.itemsize
    metadata_end = metadata + int(header["num_samples"]) * beton.SAMPLE_METADATA.itemsize
    regions = (
        (0, 24),
        (24, 24 + 20),
        (24 + beton.FIELD.itemsize, 24 + beton.FIELD.itemsize + 20),
        (metadata, metadata_end),
        (int(header["alloc_table_ptr"]) - 600, len(whole)),
        (0, len(whole)),
    )
    for _ in range(rng.integers(1, 4)):
        low, high = regions[rng.integers(len(regions))]
        at = int(rng.integers(low, high))
        if at >= len(data):
            continue
        kind = rng.integers(4)
        if kind == 0:
            data[at] ^= 1 << rng.integers(8)
        elif kind == 1:
            data[at : at + 8] = rng.integers(0, 256, len(data[at : at + 8]))
        elif kind == 2:
            data[at : at + rng.integers(1, 9)] = rng.choice([0, 255, 127])
        elif rng.integers(5) == 0:
            data = data[:at]
    at = int(header["alloc_table_ptr"]) - beton.TRAILER.itemsize
    if rng.integers(3) == 0 and len(data) == len(whole):  # also with a valid checksum
        trailer = data[at : at + beton.TRAILER.itemsize].view(beton.TRAILER)
        trailer["trailer"] = native.checksum(trailer.view(np.uint8)[:-8])
    return data if len(data) else whole[:1].copy()


def main(count: int, seed: int, core: str):
    native.library = native.bind(core)
    native._thread = native._ThreadLocal()
    rng, rejected, loaded = np.random.default_rng(seed), 0, 0
    reasons: dict[str, int] = {}
    files = [small_file(extras_too=with_extras) for with_extras in (True, False)]
    path = (
        f"/dev/shm/fuzz-{os.getpid()}.beton"
        if os.path.isdir("/dev/shm")
        else f"/tmp/fuzz-{os.getpid()}.beton"
    )
    try:
        for number in range(count):
            damage(files[number % 2], rng).tofile(path)
            try:
                file = beton.read_beton(path)
                file.names()
            except InputError:
                rejected += 1
                continue
            descriptor = os.open(path, os.O_RDONLY)
            for i in range(len(file)):
                sample = np.zeros((), native.SAMPLE)
                for name in ("height", "width", "pointer", "size"):
                    sample[name] = getattr(file, f"{name}s")[i]
                sample["raw"], sample["box"] = (
                    file.modes[i] == beton.RAW,
                    (0, 0, sample["height"], sample["width"]),
                )
                if file.extras is not None:
                    sample["verify"] = 1
                    sample["checksum"], sample["entry_bytes"] = file.extras[i]
                try:
                    native.load(descriptor, sample, (16, 16))
                    loaded += 1
                except ValueError as error:
                    reasons[str(error)] = reasons.get(str(error), 0) + 1
            os.close(descriptor)
    finally:
        os.unlink(path)
    print(
        f"{count} files: {rejected} rejected by the reader; of the others, {loaded} images loaded, "
        f"rejected: {reasons}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
