"""Labelled pictures into one `.beton` file that stock FFCV reads.

FFCV's own writer hands pages to processes and waits for a counter: one unreadable picture hangs it for ever, and the
file's bytes depend on which worker was faster. Here threads decode and encode (Pillow, OpenCV and libjpeg release the
interpreter lock), one thread lays the results into pages in dataset order, and the file stands under a temporary name
until it is complete, flushed and checked. The bytes are a function of the pictures and the settings alone.
"""
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from ffcv.fields import RGBImageField
from tqdm import tqdm

from rsb_ffcv import InputError, beton, first_line
from rsb_ffcv.atomic import atomic_file
from rsb_ffcv.dataset.picture import load_rgb
from rsb_ffcv.dataset.sources import Source
from rsb_ffcv.ops import draws, native

PAGE_BYTES = 1 << 23  # FFCV's default: 8 MiB


@dataclass(frozen=True)
class Encoding:
    """How an image is stored. mode: "jpg", "raw", "smart" (JPEG where raw pixels exceed smart_threshold bytes) or
    "proportion" (JPEG with compress_probability, drawn from the image's position). max_resolution: the longer side
    is shrunk to it, in pixels; 0 keeps every size. jpeg_quality: 1 .. 100."""
    mode: str = "jpg"
    max_resolution: int = 0
    jpeg_quality: int = 90
    smart_threshold: int = 3 * 256 * 256
    compress_probability: float = 0.5

    def encode(self, index: int, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, int, int]:
        """(bytes, entry points, both uint8; storage mode, height, width) of a uint8 (H, W, 3) image; JPEG by FFCV's own
        field.

        Shrinking averages areas (cv2.INTER_AREA) as FFCV does, to sides rounded to the nearest pixel; FFCV truncates
        a float product there and misses the stated maximum by one for many sizes.
        """
        ratio = self.max_resolution / max(pixels.shape)
        if 0 < ratio < 1:
            height, width = (max(1, round(side * ratio)) for side in pixels.shape[:2])
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        mode = self.mode
        if mode == "smart":
            mode = "jpg" if pixels.nbytes > self.smart_threshold else "raw"
        elif mode == "proportion":
            mode = "jpg" if draws.uniform(0, 0, index, draws.STORE, 0) < self.compress_probability else "raw"
        stored = []

        def malloc(size):
            stored.append(np.empty(size, np.uint8))
            return 0, stored[0]

        row = np.zeros(1, beton.IMAGE_METADATA)
        RGBImageField(mode, jpeg_quality=self.jpeg_quality).encode(row, pixels, malloc)
        height, width = pixels.shape[:2]
        is_jpeg = row["mode"][0] == beton.JPG
        entries = native.entry_points(stored[0], height, width) if is_jpeg else np.empty(0, np.uint8)
        return stored[0], entries, int(row["mode"][0]), height, width


def write_beton(path, source: Source, encoding: Encoding, num_workers: int, chunk_size: int = 100) -> dict:
    """Writes `source` to `path` and returns a summary: samples, classes, bytes.

    num_workers: threads, 1 or more. chunk_size: how many pictures may be encoded ahead of the writing. Raises
    InputError where a picture cannot be read or stored, or the file cannot be written; then nothing is left behind.
    """
    path = Path(path)
    with atomic_file(path, "free space or choose another cfg.write_path") as file:
        _write_file(file, source, encoding, num_workers, chunk_size, path.name)
        file.flush()
        checked = beton.read_beton(file.name)
    return {"path": str(path), "samples": len(checked), "classes": len(source.classes), "bytes": checked.num_bytes}


def _write_file(file, source, encoding, num_workers, chunk_size, title):
    count = len(source)
    header = np.zeros(1, beton.HEADER)
    header["version"], header["num_fields"] = beton.VERSION, 2
    header["page_size"], header["num_samples"] = PAGE_BYTES, count
    fields = np.zeros(2, beton.FIELD)
    for row, (name, type_id) in zip(fields, (("image", beton.IMAGE_TYPE_ID), ("label", beton.INT_TYPE_ID))):
        row["type_id"] = type_id
        row["name"][:len(name)] = np.frombuffer(name.encode(), np.uint8)
    metadata = np.zeros(count, beton.SAMPLE_METADATA)
    metadata["f1"] = source.labels
    table = np.zeros(count, beton.ALLOCATION)
    table["sample_id"] = np.arange(count)

    end = beton.HEADER.itemsize + fields.nbytes + metadata.nbytes
    end += -end % PAGE_BYTES
    file.truncate(end)
    file.seek(end)
    extras = np.zeros(count, beton.EXTRA)
    for index, (stored, entries, mode, height, width) in enumerate(_encoded(source, encoding, num_workers, chunk_size, title)):
        if len(stored) > PAGE_BYTES:
            raise InputError(f"{source.name(index)}: {len(stored)} bytes do not fit a page of {PAGE_BYTES}; "
                             f"lower cfg.max_resolution or use cfg.write_mode=jpg")
        if len(stored) + len(entries) > PAGE_BYTES:
            entries = entries[:0]
        left_in_page = -end % PAGE_BYTES or PAGE_BYTES  # FFCV reads page by page: no image may cross a boundary
        if len(stored) + len(entries) > left_in_page:
            file.write(bytes(left_in_page))
            end += left_in_page
        metadata["f0"][index] = (mode, width, height, end)
        table[index] = (index, end, len(stored))
        both = np.concatenate([stored, entries])
        extras[index] = native.checksum(both), len(entries)
        file.write(both)
        end += len(both)
    padding = -end % PAGE_BYTES
    file.write(bytes(padding))
    header["alloc_table_ptr"] = end + padding + extras.nbytes + beton.TRAILER.itemsize
    front = b"".join(part.tobytes() for part in (header, fields, metadata))
    for part in (extras, beton.make_trailer(extras, beton.structure_checksum(front, table)), table):
        file.write(part)
    file.seek(0)
    file.write(front)


def _encoded(source, encoding, num_workers, chunk_size, title):
    """Encoded images in dataset order, at most chunk_size of them (two a worker at least) ahead of the consumer."""
    def encode(index):
        pixels = load_rgb(source.pictures[index], source.name(index))
        if max(pixels.shape) > 65535:
            raise InputError(f"{source.name(index)}: {pixels.shape[1]} x {pixels.shape[0]} pixels are more than a "
                             f".beton holds (65535 a side); shrink or remove it")
        try:
            return encoding.encode(index, pixels)
        except (cv2.error, ValueError) as error:
            raise InputError(f"{source.name(index)}: {pixels.shape[1]} x {pixels.shape[0]} pixels cannot be stored "
                             f"({first_line(error)}); replace or remove it") from error

    cv2.setNumThreads(1)  # one thread a picture: the pool is the parallelism
    pool = ThreadPoolExecutor(num_workers)
    try:
        pending = deque()
        indices = iter(range(len(source)))
        for _ in tqdm(range(len(source)), desc=title, unit="img", smoothing=0.05):
            while len(pending) < max(chunk_size, 2 * num_workers) and (index := next(indices, None)) is not None:
                pending.append(pool.submit(encode, index))
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
