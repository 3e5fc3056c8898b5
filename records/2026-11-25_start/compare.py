"""Images/s of the loaders of two checkouts, in turn, each in a process of its own:
python compare.py <checkout before> <checkout after> <file.beton> <repeats>"""

import json
import statistics
import subprocess
import sys

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
        n = sum(len(labels) for images, labels in loader.epoch(1))
        out[name] = n / (time.perf_counter() - began)
with closing(EvalLoader(path, crop_ratio=0.95, **common)) as loader:
    began = time.perf_counter()
    n = sum(len(labels) for images, labels in loader)
    out["eval"] = n / (time.perf_counter() - began)
print(json.dumps(out))
"""

before, after, path, repeats = sys.argv[1:]
found: dict[str, dict[str, list[float]]] = {}
for repeat in range(int(repeats) + 1):
    for where in (before, after):
        command = [f"{where}/.venv/bin/python", "-c", CODE, path]
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=True)
        for name, rate in json.loads(done.stdout).items() if repeat else ():
            found.setdefault(name, {}).setdefault(where, []).append(rate)
for name, by in found.items():
    pairs = list(zip(by[after], by[before]))
    medians = [round(statistics.median(by[where])) for where in (before, after)]
    print(name, medians, "after / before", round(statistics.median(a / b for a, b in pairs), 3))
