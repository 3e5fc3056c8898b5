"""Compares the speed of this project's writer and stock FFCV's in one run, and measures the memory
of this project's writer.

    python benchmarks/writer.py --images <folder of class folders> --out records/<date>_writer

Repeats the list of images to `--count` images. Both writers run interleaved on the same number of
workers, with JPEG quality 90: once with every size kept (our writer then stores JPEGs unchanged),
once with all images shrunk to `--shrink` pixels. The times are of complete conversions in a process
that has imported what it needs: listing, encoding, flushing to disk (ours), reading back (ours).
Complete processes, with their imports, are timed as well. Memory: the peak resident size of a
process that writes `--small` small images, and of one that writes a tenth of them. Out:
results.json, table.md.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import runner  # noqa: E402

TARGETS = {"kept": 5.0, "shrunk": 1.5}
TITLES = {"kept": "every size kept (JPEGs pass through)", "shrunk": "every image shrunk"}


class Ours:
    def __init__(self, folder: str, target: str, workers: int, max_resolution: int):
        from rsb_ffcv.dataset import Encoding, Place, write_splits

        self.target = Path(target) / "ours.beton"
        self._write = lambda: write_splits(
            Place(dataset="imagenet", data_dir=folder),
            str(self.target),
            split="train",
            num_workers=workers,
            encoding=Encoding(max_resolution=max_resolution),
        )

    def repeat(self) -> int:
        from rsb_ffcv.beton import read_beton

        self.target.unlink(missing_ok=True)
        self._write()
        return len(read_beton(self.target))


class StockFFCV:
    def __init__(self, folder: str, target: str, workers: int, max_resolution: int):
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter
        from torchvision.datasets import ImageFolder

        def write():
            pictures = ImageFolder(f"{folder}/train")
            fields = {
                "image": RGBImageField(
                    write_mode="jpg", max_resolution=max_resolution or None, jpeg_quality=90
                ),
                "label": IntField(),
            }
            DatasetWriter(
                f"{target}/stock.beton", fields, num_workers=workers
            ).from_indexed_dataset(pictures)
            return len(pictures)

        self.repeat = write


def repeated(images: Path, work: Path, count: int):
    pictures = sorted(path for path in images.glob("*/*") if path.is_file())
    for number in range(count):
        picture = pictures[number % len(pictures)]
        to = work / "pictures" / "train" / picture.parent.name
        to.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, to / f"{number:06d}{picture.suffix}")


def processes(work: Path, workers: int, shrink: int, repeats: int) -> dict:
    """Returns {row: {name: seconds of complete processes}}, interleaved."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(repeats):
        for row, side in (("kept", 0), ("shrunk", shrink)):
            for name, kind in (("ours", "Ours"), ("stock ffcv", "StockFFCV")):
                os.sync()
                arguments = (str(work / "pictures"), str(work), workers, side)
                code = f"import writer; writer.{kind}{arguments!r}.repeat()"
                began = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-c", code],
                    cwd=HERE,
                    check=True,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                found.setdefault(row, {}).setdefault(name, []).append(time.perf_counter() - began)
    return found


def memory(work: Path, count: int, workers: int) -> dict:
    """Returns the peak resident MiB of writing `count` images of 64 px, and a tenth of them."""
    code = """
        import resource, sys
        from io import BytesIO
        import numpy as np
        from PIL import Image
        from rsb_ffcv.dataset import Encoding, storing
        from rsb_ffcv.dataset.sources import Source
        from rsb_ffcv.dataset.writer import write_beton
        count, target, workers = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
        rng, known = np.random.default_rng(0), []
        for _ in range(64):
            stream = BytesIO()
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(stream, "JPEG")
            known.append(stream.getvalue())
        names = [f"class_{n % 1000}/image_{n:08d}.jpg" for n in range(count)]
        source = Source(classes=[str(n) for n in range(1000)], names=names,
                        labels=np.arange(count) % 1000, read=lambda index: known[index % 64])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        write_beton(target, source, store=storing(source, Encoding()), settings={},
                    num_workers=workers)
        print(before / 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    """
    import textwrap

    found = {}
    for number in (count // 10, count):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                textwrap.dedent(code),
                str(number),
                str(work / f"{number}.beton"),
                str(workers),
            ],
            cwd=HERE.parent,
            check=True,
            capture_output=True,
            text=True,
        )
        before, peak = map(float, done.stdout.split()[-2:])
        found[str(number)] = {
            "before_mib": round(before, 1),
            "peak_mib": round(peak, 1),
            "file_mib": round((work / f"{number}.beton").stat().st_size / 2**20, 1),
        }
    return found


def table(results: dict) -> str:
    lines = [
        "| conversion | writer | images/s (low .. high) | ours / it | target | | process |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, who in results["rows"].items():
        ours = who["ours"]["images_per_s"]
        for name, result in who.items():
            seconds = results["processes"][row][name]
            whole = f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} .. {max(seconds):.1f})"
            if "absent" in result:
                lines.append(
                    f"| {TITLES[row]} | {name} | {result['absent']} | | | not compared | |"
                )
                continue
            rate = f"{result['images_per_s']:,.0f} ({result['low']:,.0f} .. {result['high']:,.0f})"
            factor, target = ours / result["images_per_s"], TARGETS[row]
            outcome = (
                f"{factor:.2f} | {target} | {'reached' if factor >= target else 'not reached'}"
                if name != "ours"
                else " | | "
            )
            lines.append(f"| {TITLES[row]} | {name} | {rate} | {outcome} | {whole} |")
        ratio = statistics.median(results["processes"][row]["stock ffcv"]) / statistics.median(
            results["processes"][row]["ours"]
        )
        lines.append(f"| {TITLES[row]} | complete processes, stock / ours | | {ratio:.2f} | | | |")
    used = "; ".join(
        f"{count} images {m['peak_mib']:.0f} MiB "
        f"({m['before_mib']:.0f} before, file {m['file_mib']:.0f})"
        for count, m in results["memory"].items()
    )
    return "\n".join([*lines, "", f"Peak resident memory: {used}.", ""])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=Path, required=True, help="folder with one folder of images per class"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for results.json and table.md"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="threads (ours) or processes (stock)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="repeats of each writer, after one warm-up repeat"
    )
    parser.add_argument(
        "--count", type=int, default=5000, help="images per conversion; a shorter list is repeated"
    )
    parser.add_argument(
        "--shrink", type=int, default=200, help="longer side of the second conversion, in pixels"
    )
    parser.add_argument(
        "--small", type=int, default=100000, help="small images for the measurement of memory"
    )
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="writer-benchmark-"))
    try:
        repeated(options.images, work, options.count)
        results: dict[str, Any] = {
            "command": f"benchmarks/writer.py --images {options.images.name} "
            f"--workers {options.workers} --repeats {options.repeats} --count {options.count} "
            f"--shrink {options.shrink} --small {options.small}",
            "environment": runner.environment(
                ["rsb_ffcv", "ffcv", "opencv-python-headless", "pillow", "torchvision"]
            ),
            "rows": {},
        }
        for row, side in (("kept", 0), ("shrunk", options.shrink)):
            arguments = {
                "folder": str(work / "pictures"),
                "target": str(work),
                "workers": options.workers,
                "max_resolution": side,
            }
            results["rows"][row] = runner.race(
                {
                    "ours": (f"{HERE / 'writer.py'}:Ours", arguments),
                    "stock ffcv": (f"{HERE / 'writer.py'}:StockFFCV", arguments),
                },
                options.repeats,
            )
        results["processes"] = processes(
            work, options.workers, options.shrink, min(3, options.repeats)
        )
        results["memory"] = memory(work, options.small, options.workers)
    finally:
        shutil.rmtree(work)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
