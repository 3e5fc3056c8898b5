"""Images/s of the loaders, and conversions/s of the writer, of two checkouts, in turn, each in a
process of its own: python compare.py <before> <after> <file.beton> <repeats> <folder of images>"""

import json
import shutil
import statistics
import subprocess
import sys
import time

CODE = """
import sys, time, json
sys.path.insert(0, '.')
from contextlib import closing
from rsb_ffcv.loading import TrainLoader, EvalLoader
path, out = sys.argv[1], {}
common = dict(batch_size=256, resolution=224, num_workers=2)
for name, more in (("crop", {}), ("augment", {"rand_augment": "rand-m7-mstd0.5-inc1"})):
    with closing(TrainLoader(path, seed=0, **common, **more)) as loader:
        for _ in loader.epoch(0):
            pass
        began = time.perf_counter()
        n = sum(len(batch[1]) for batch in loader.epoch(1))
        out[name] = n / (time.perf_counter() - began)
with closing(EvalLoader(path, crop_ratio=0.95, **common)) as loader:
    began = time.perf_counter()
    n = sum(len(batch[1]) for batch in loader)
    out["eval"] = n / (time.perf_counter() - began)
print(json.dumps(out))
"""
before, after, path, repeats, images = sys.argv[1:]
found = {}


def writer(where, more):
    out = "/tmp/cmp_out"
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    subprocess.run(
        [
            f"{where}/.venv/bin/python",
            "write_ffcv.py",
            f"--cfg.data_dir={images}",
            f"--cfg.write_path={out}/x.beton",
            "--cfg.split=train",
            "--cfg.num_workers=2",
            *more,
        ],
        cwd=where,
        check=True,
        capture_output=True,
    )
    return 1 / (time.perf_counter() - began)


for repeat in range(int(repeats) + 1):
    for where in (before, after) if repeat % 2 else (after, before):
        done = subprocess.run(
            [f"{where}/.venv/bin/python", "-c", CODE, path],
            cwd=where,
            capture_output=True,
            text=True,
            check=True,
        )
        rates = json.loads(done.stdout)
        rates["write, kept"] = writer(where, [])
        rates["write, shrunk to 200"] = writer(where, ["--cfg.max_resolution=200"])
        for name, rate in rates.items() if repeat else ():
            found.setdefault(name, {}).setdefault(where, []).append(rate)
for name, by in found.items():
    pairs = [a / b for a, b in zip(by[after], by[before])]
    print(
        name,
        [round(statistics.median(by[w]), 3) for w in (before, after)],
        [f"{min(by[w]):.3g}..{max(by[w]):.3g}" for w in (before, after)],
        "after / before",
        round(statistics.median(pairs), 3),
        f"({min(pairs):.3f} .. {max(pairs):.3f})",
    )
