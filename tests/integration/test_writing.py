"""A conversion that is killed, whenever and however often, ends with the bytes of one that was not."""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("RSB_KILLS", "20"))

# The program, with work made safe after each picture instead of each second: a kill then finds more states
PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import rsb_ffcv.dataset.writer as writer
from rsb_ffcv import exit_status
import write_ffcv
writer.SYNC_SECONDS = {sync}
sys.argv = ["write_ffcv.py", *{arguments!r}]
print("begins", flush=True)
sys.exit(exit_status(write_ffcv.main))
"""


def begin(arguments, sync=0.0):
    code = PROGRAM.format(root=str(ROOT), arguments=list(map(str, arguments)), sync=sync)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begins\n"
    return process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """500 pictures of two classes, some to be shrunk, two that cannot be read."""
    root = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    for split, count in (("train", 400), ("val", 100)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
        for number in range(count):
            side = 200 if number % 3 else 700
            small = Image.fromarray(rng.integers(0, 256, (20, 25, 3), np.uint8))
            small.resize((side, side * 4 // 5)).save(root / split / "ab"[number % 2] / f"{number:04d}.jpg", quality=85)
    (root / "train" / "a" / "0100_broken.jpg").write_bytes(b"\xff\xd8\xff")
    (root / "val" / "b" / "0050_broken.png").write_bytes(b"")
    return root


def options(folder, target, workers):
    return [f"--cfg.data_dir={folder}", f"--cfg.write_path={target}", f"--cfg.num_workers={workers}", "--cfg.max_resolution=300",
            "--cfg.on_error=skip", "--cfg.max_skipped=0.02"]


def files(target) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in target.iterdir()}


def test_a_conversion_killed_at_random_instants_has_the_bytes_of_one_that_was_not(folder, tmp_path):
    began = time.monotonic()
    whole = begin(options(folder, tmp_path / "whole", 2))
    assert whole.wait() == 0
    lasts = time.monotonic() - began
    wanted = files(tmp_path / "whole")
    assert sorted(wanted) == ["train.beton", "train.beton.skipped.csv", "val.beton", "val.beton.skipped.csv"]
    rng, kills, runs, resumed = random.Random(0), 0, 0, 0
    while kills < KILLS:
        target = tmp_path / f"run_{runs}"
        runs += 1
        while True:
            process = begin(options(folder, target, rng.choice([1, 2, 3])), rng.choice([0.0, 0.02]))
            try:
                status = process.wait(rng.uniform(0.1, 0.8) * lasts if kills < KILLS else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                visible = {path.name for path in target.iterdir() if not path.name.startswith(".")} if target.exists() else set()
                assert all((target / name).read_bytes() == wanted[name] for name in visible)
                continue
            out, errors = process.communicate()
            assert status == 0, errors
            resumed += "going on after" in out
            break
        assert files(target) == wanted
    print(f"{kills} kills over {runs} conversions of {lasts:.1f} s, {resumed} of them ended from a part")
    assert resumed


def test_a_conversion_that_is_interrupted_keeps_all_that_is_done(folder, tmp_path):
    process = begin(options(folder, tmp_path, 2), sync=100.0)
    part = tmp_path / ".train.beton.part"
    while not part.exists() or part.stat().st_size < 9_500_000:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    process = begin(options(folder, tmp_path, 2))
    out, _ = process.communicate()
    assert process.returncode == 0 and "going on after" in out


def test_two_writers_of_one_file_do_not_meet(folder, tmp_path):
    first = begin(options(folder, tmp_path, 1))
    while not (tmp_path / ".train.beton.part").exists():
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    second = begin(options(folder, tmp_path, 1))
    _, errors = second.communicate()
    assert second.returncode == 2 and "another process is writing it" in errors.splitlines()[-1]
    first.send_signal(signal.SIGCONT)
    first.communicate()
    assert first.returncode == 0


def test_other_settings_do_not_go_on_with_what_was_begun(folder, tmp_path):
    process = begin(options(folder, tmp_path, 2))
    while not (tmp_path / ".train.beton.journal").exists() or (tmp_path / ".train.beton.journal").stat().st_size < 2000:
        time.sleep(0.001)
    process.kill()
    process.wait()
    for change, message in (("--cfg.jpeg_quality=80", "jpeg_quality 90, now 80"), ("--cfg.max_resolution=200", "max_resolution 300, now 200")):
        other = begin([*options(folder, tmp_path, 2), change])
        _, errors = other.communicate()
        assert other.returncode == 2 and message in errors.splitlines()[-1]
    assert begin(options(folder, tmp_path, 2)).wait() == 0
    finished = (tmp_path / "train.beton").stat().st_mtime_ns
    again = begin(options(folder, tmp_path, 2))
    out, _ = again.communicate()
    assert again.returncode == 0 and "is there already" in out and (tmp_path / "train.beton").stat().st_mtime_ns == finished
    other = begin([*options(folder, tmp_path, 2), "--cfg.jpeg_quality=80"])
    _, errors = other.communicate()
    assert other.returncode == 2 and "written with other settings (jpeg_quality 90, now 80)" in errors.splitlines()[-1]
    assert (tmp_path / "train.beton").stat().st_mtime_ns == finished


def test_a_read_only_target_is_named(folder, tmp_path):
    process = begin(options(folder, "/proc/nowhere", 1))
    _, errors = process.communicate()
    assert process.returncode == 2 and "cfg.write_path=/proc/nowhere" in errors.splitlines()[-1]
