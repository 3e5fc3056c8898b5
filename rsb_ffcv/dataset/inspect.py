"""Commands on a `.beton` file: print its content, verify it, export its images."""

import io
import json
import os
import re
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from rsb_ffcv import InputError, counted, first_line, warn
from rsb_ffcv.atomic import atomic_file, hidden, write_table
from rsb_ffcv.beton import (
    ARRAY_TYPE_ID,
    BYTES_TYPE_ID,
    FLOAT_TYPE_ID,
    IMAGE_TYPE_ID,
    JPG,
    JSON_TYPE_ID,
    RAW,
    SCALARS,
    TENSOR_TYPE_ID,
    Beton,
    Field,
    Images,
    OpenFiles,
    Structure,
    labelled_images,
    read_beton,
    read_images,
    read_structure,
)
from rsb_ffcv.dataset.workers import ordered
from rsb_ffcv.ops import native

REMEMBER_SECONDS = 5.0  # an interrupted verification repeats at most this much work
SHOWN = 20  # number of damaged images that are printed
WIDEST = 40  # longest bar of a histogram, in characters


def info(path: str | Path) -> str:
    """A readable description of a file, several lines: samples, classes, sizes, modes, settings,
    bytes, and its other fields. Raises InputError if it is damaged."""
    structure = read_structure(path)
    size = f"{structure.num_bytes} bytes ({structure.num_bytes / 1e9:.3f} GB)"
    lines, known = [f"{path}: {counted(len(structure), 'sample')}, {size}"], set()
    if structure.is_labelled:
        file, known = labelled_images(structure), {"image", "label"}
        classes = counted(file.num_classes, "class", "classes")
        lines = [f"{path}: {counted(len(file), 'image')}, {classes}, {size}"]
        lines += [*_images(file), *_origin(file)]
    for field in structure.fields:
        if field.name not in known:
            lines += _field(structure, field)
    return "\n".join(lines)


def _images(images: Images) -> list[str]:
    """How images are stored, and their sides."""
    pixels = images.heights.astype(int) * images.widths
    longer = np.maximum(images.heights, images.widths)
    lines = []
    for mode, name in ((JPG, "jpg"), (RAW, "raw")):
        if (chosen := images.modes == mode).any():
            lines.append(
                f"{name}: {counted(int(chosen.sum()), 'image')}, "
                f"{int(images.sizes[chosen].sum())} bytes, mean "
                f"{images.sizes[chosen].mean() / 1e3:.1f} kB, "
                f"{8 * images.sizes[chosen].sum() / pixels[chosen].sum():.2f} bits per pixel"
            )
    sides = ("width", images.widths), ("height", images.heights), ("longer side", longer)
    for name, values in sides:
        low, five, half, most, high = np.percentile(values, (0, 5, 50, 95, 100)).round().astype(int)
        lines.append(f"{name}: {low} .. {high} px, median {half}, 5 % .. 95 %: {five} .. {most}")
    lines.append("images by longer side:")
    edges = [0, *(64 * 2 ** (step / 2) for step in range(21))]
    histogram, _ = np.histogram(longer, [*edges, np.inf])
    for low, high, count in zip(edges, [*edges[1:], np.inf], histogram.tolist()):
        if count:
            bar = "#" * max(1, round(WIDEST * count / histogram.max()))
            lines.append(
                f"  {low:6.0f} .. {f'{high:.0f}' if high < np.inf else '':6} {count:9} {bar}"
            )
    return lines


def _origin(file: Beton) -> list[str]:
    """What the file says about itself, and its classes."""
    lines = []
    counts = np.bincount(file.labels, minlength=file.num_classes)
    if file.about is None:
        lines.append(
            "written by another program: it has no checksums, names, settings or entry points"
        )
    else:
        assert file.extras is not None  # a file has both or neither
        about = file.about
        entered = int((file.extras["entry_bytes"] > 0).sum())
        lines.append(
            f"entry points for partial decoding: {entered} images, "
            f"{int(file.extras['entry_bytes'].sum())} bytes"
        )
        for title, table in (
            ("written by", about.tool),
            ("settings", about.settings),
            ("source", about.source),
            ("pictures", about.counts),
        ):
            lines.append(f"{title}: " + ", ".join(f"{key}={value}" for key, value in table.items()))
    lines.append(f"images per class ({counts.min()} .. {counts.max()}):")
    for label, count in enumerate(counts.tolist()):
        title = file.about.titles[label] if file.about and file.about.titles else ""
        lines.append(f"  {label:5} {file.class_name(label):12} {count:7}  {title}".rstrip())
    return lines


def _field(structure: Structure, field: Field) -> list[str]:
    """A field that a classifier does not read. Raises InputError if it is damaged."""
    title = f"field {field.name!r}"
    if field.type_id in SCALARS:
        kind = "float" if field.type_id == FLOAT_TYPE_ID else "int"
        values = structure.column(field.name)
        return [f"{title}: {kind}, {values.min()} .. {values.max()}"]
    if field.type_id == IMAGE_TYPE_ID:
        lines = _images(read_images(structure, field.name))
        return [f"{title}: images", *(f"  {line}" for line in lines)]
    if field.type_id in (ARRAY_TYPE_ID, TENSOR_TYPE_ID):
        _, dtype, shape = structure.arrays(field.name)
        return [f"{title}: arrays, {dtype} of shape {shape}"]
    _, sizes = structure.texts(field.name)
    kind = "JSON" if field.type_id == JSON_TYPE_ID else "bytes"
    return [
        f"{title}: {kind}, {sizes.sum()} bytes, {sizes.min()} .. {sizes.max()} bytes per sample"
    ]


class _Samples:
    """The samples of a file with any fields, and how they are checked. Raises InputError if its
    structure is damaged."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self._beton = labelled_images(structure) if structure.is_labelled else None
        self._images: dict[str, Images] = {} if self._beton is None else {"image": self._beton}
        self._json: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for field in structure.fields:
            if field.type_id == IMAGE_TYPE_ID and field.name not in self._images:
                self._images[field.name] = read_images(structure, field.name)
            if field.type_id in (ARRAY_TYPE_ID, TENSOR_TYPE_ID):
                structure.arrays(field.name)
            if field.type_id in (BYTES_TYPE_ID, JSON_TYPE_ID):
                texts = structure.texts(field.name)
                if field.type_id == JSON_TYPE_ID:
                    self._json[field.name] = texts
        self.noun = "image" if list(self._images) == ["image"] else "sample"

    def __len__(self) -> int:
        return len(self.structure)

    def names(self) -> list[str]:
        """See Beton.names."""
        if self._beton is not None:
            return self._beton.names()
        return [f"sample_{number:08d}" for number in range(len(self))]

    def fingerprint(self) -> str:
        if self._beton is not None:
            return self._beton.fingerprint()
        return f"{native.checksum(self.structure.metadata.view(np.uint8)):016x}"

    def check(self, opened: OpenFiles, index: int, *, decode: bool) -> None:
        """Raises ValueError if the sample is damaged, OSError if it cannot be read. The arguments
        are those of read_verified."""
        for name, images in self._images.items():
            try:
                read_verified(opened, images, index, decode=decode)
            except ValueError as error:
                raise ValueError(str(error) if name == "image" else f"{name!r} {error}") from error
        for name, (pointers, sizes) in self._json.items():
            text = os.pread(int(opened.descriptors[0]), int(sizes[index]), int(pointers[index]))
            try:
                json.loads(text.partition(b"\0")[0])
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name!r} is not JSON: {first_line(error)}") from error


def verify(path: str | Path, decode: float, num_workers: int, *, report: str = "") -> bool:
    """Checks a file and returns whether it is valid: its structure, the checksum of every image and
    its entry points, whether images decode to the size in the metadata, and whether JSON can be
    read. Prints what is damaged: the structure (then nothing else is checked), or samples.

    decode: share of the samples whose images are decoded, 0 .. 1, spread evenly
    num_workers: threads
    report: CSV file that lists the damaged images, or empty

    After an interruption, the next call with the same file and share continues. For that, a hidden
    state file is kept beside the file if the folder is writable. Raises InputError if the file
    cannot be read.
    """
    if report and os.path.realpath(report) == os.path.realpath(path):
        raise InputError(f"`report`={report}: is the file itself; choose another")
    if report:
        hidden(Path(report), "part")  # raises now if it names no file
    try:
        file = _Samples(read_structure(path))
    except InputError as error:
        if isinstance(error.__cause__, OSError):  # no such file, or no permission
            raise
        _write_report(report, [("", "", str(error))])
        print(error, flush=True)
        return False
    note = hidden(Path(path), "verify")
    known = os.stat(path)
    mark = {
        "bytes": known.st_size,
        "changed": known.st_mtime_ns,
        "fingerprint": file.fingerprint(),
        "decode": decode,
    }

    def chosen(index: int) -> bool:
        return int((index + 1) * decode) > int(index * decode)

    done, bad = _remembered(note, mark)
    if done:
        print(f"{path}: continuing after {done} of {counted(len(file), file.noun)}", flush=True)
    remember_at = time.monotonic() + REMEMBER_SECONDS
    can_remember = True
    with (
        OpenFiles([Path(path)]) as opened,
        tqdm(
            total=len(file), initial=done, desc=Path(path).name, unit="img", smoothing=0.05
        ) as bar,
    ):

        def check(index: int) -> str | None:
            try:
                file.check(opened, index, decode=chosen(index))
            except (ValueError, OSError) as error:
                return first_line(error)
            return None

        with closing(
            ordered(
                check,
                range(done, len(file)),
                threads=num_workers,
                ahead=1000,
                name=lambda index: f"sample {index}",
            )
        ) as results:
            for index, why in enumerate(results, done):
                if why:
                    bad.append([index, why])
                bar.update()
                if can_remember and time.monotonic() > remember_at:
                    can_remember = _remember(note, {**mark, "done": index + 1, "bad": bad})
                    remember_at = time.monotonic() + REMEMBER_SECONDS
    with suppress(OSError):
        note.unlink(missing_ok=True)
    names = file.names() if bad else []
    for index, why in bad[:SHOWN]:
        print(f"sample {index} ({names[index]}) {why}")
    if len(bad) > SHOWN:
        print(f"and {len(bad) - SHOWN} more")
    _write_report(report, [(index, names[index], why) for index, why in bad])
    decoded = int(len(file) * decode) - sum(chosen(index) for index, _ in bad)
    checked = (
        "no checksums in the file" if file.structure.extras is None else "all checksums compared"
    )
    print(
        f"{path}: {len(bad)} of {counted(len(file), file.noun)} damaged; structure valid, "
        f"{checked}, {counted(decoded, file.noun)} decoded without a fault",
        flush=True,
    )
    return not bad


def _write_report(report: str, rows: list[tuple]) -> None:
    if report:
        write_table(report, ["sample", "path", "reason"], rows, fix="choose another `report`")


def read_verified(opened: OpenFiles, file: Images, index: int, *, decode: bool) -> np.ndarray:
    """Images.read; with `decode`, a JPEG is also decoded, and its size and entry points are
    compared with those in the file. Raises ValueError if the image is damaged, OSError if it cannot
    be read."""
    data = file.read(opened, index)
    height, width, size = int(file.heights[index]), int(file.widths[index]), int(file.sizes[index])
    if decode and file.modes[index] == JPG:
        native.resized(data[:size], (height, width), (height, width))
        if data.nbytes > size and not np.array_equal(
            data[size:], native.entry_points(data[:size], height, width)
        ):
            raise ValueError("has entry points that do not match it")
    return data


def _remembered(note: Path, mark: dict) -> tuple[int, list]:
    try:
        known = json.loads(note.read_text())
        return (
            (known["done"], known["bad"])
            if {name: known[name] for name in mark} == mark
            else (0, [])
        )
    except (OSError, ValueError, KeyError, TypeError):  # missing or unusable: start over
        return 0, []


def _remember(note: Path, content: dict) -> bool:
    try:
        with atomic_file(note, "") as file:
            file.write(json.dumps(content).encode())
    except InputError as error:
        warn(f"{first_line(error)} an interrupted verification would start over")
        return False
    return True


def export(path: str | Path, write_path: str, num_workers: int) -> None:
    """Writes each image to <write_path>/<class>/<name>: a JPEG byte for byte, a raw image as PNG.

    The folder gets its name at the end. Files that an interrupted call wrote are not written again.
    Raises InputError if an image is damaged, or the folder exists or cannot be written.
    """
    file = read_beton(path)
    target = Path(write_path)
    places = _places(file)
    try:
        if target.exists():
            raise InputError(
                f"`write_path`={target}: exists; give a folder that does not exist, or remove it"
            )
        unfinished, mark = hidden(target, "part"), hidden(target, "of")
        if unfinished.exists() and (not mark.exists() or mark.read_text() != file.fingerprint()):
            raise InputError(
                f"`write_path`={target}: contains an unfinished export of another file; remove "
                f"{unfinished}, or choose another"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(file.fingerprint())
        for folder in {place.parent for place in places}:
            (unfinished / folder).mkdir(parents=True, exist_ok=True)
        with file.open() as opened:

            def put(index: int) -> None:
                try:
                    stored = read_verified(opened, file, index, decode=False)
                except ValueError as error:
                    raise InputError(
                        f"{file.path}: sample {index} {error}; write the file again, or leave the "
                        f"sample out with subset"
                    ) from error
                place = unfinished / places[index]
                image = stored[: int(file.sizes[index])]
                data: np.ndarray | bytes = image
                if file.modes[index] == RAW:
                    data = _png(image.reshape(int(file.heights[index]), int(file.widths[index]), 3))
                if not place.exists() or place.stat().st_size != memoryview(data).nbytes:
                    place.write_bytes(data)

            with closing(
                ordered(
                    put, range(len(file)), threads=num_workers, name=lambda index: f"sample {index}"
                )
            ) as results:
                for _ in tqdm(
                    results, total=len(file), desc=target.name, unit="img", smoothing=0.05
                ):
                    pass
        unfinished.rename(target)
        mark.unlink()
    except OSError as error:
        raise InputError(
            f"`write_path`={target}: cannot be written ({error.strerror}); free space and run the "
            f"same command again, or choose another"
        ) from error
    print(
        f"{target}: {counted(len(file), 'image')} in "
        f"{counted(len({place.parent for place in places}), 'class', 'classes')}",
        flush=True,
    )


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _places(file: Beton) -> list[Path]:
    """<class>/<name> of each image. The paths are unique and stay inside the folder, whatever names
    the file contains."""
    classes = [_plain(file.class_name(label)) for label in range(file.num_classes)]
    if len(set(classes)) < len(classes):
        classes = [f"{label:05d}_{name}" for label, name in enumerate(classes)]
    taken: set[Path] = set()
    places: list[Path] = []
    numbers: dict[Path, int] = {}
    for name, label, mode in zip(file.names(), file.labels.tolist(), file.modes.tolist()):
        stem, suffix = os.path.splitext(_plain(name.rpartition("/")[2]))
        suffix = (
            ".png" if mode == RAW else suffix if suffix.lower() in (".jpg", ".jpeg") else ".jpg"
        )
        first = place = Path(classes[label], stem + suffix)
        while place in taken:
            numbers[first] = numbers.get(first, 0) + 1
            place = Path(classes[label], f"{stem}_{numbers[first]}{suffix}")
        taken.add(place)
        places.append(place)
    return places


def _plain(name: str) -> str:
    """The name as a plain file name: no folders, not hidden, not too long for a file system."""
    name = re.sub(r"[/\\\0]", "_", name).lstrip(".") or "_"
    stem, suffix = os.path.splitext(name)
    while len(os.fsencode(stem + suffix)) > 240:
        stem = stem[:-1]
        suffix = suffix[:20]
    return stem + suffix
