"""A conversion that is killed, at any instant and any number of times, ends with the bytes of one
that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
from PIL import Image

from tests.sizes import KILLS

ROOT = Path(__file__).parents[2]

# The program. It flushes its work after each image instead of each second, so that a kill finds
# more states. After update number `hold` (from 1) of its progress bars, it prints "held" and waits
# for a line.
PROGRAM = """
import signal, sys
sys.path.insert(0, {root!r})
import rsb_ffcv.dataset.writer as writer
from rsb_ffcv import exit_status
import write_ffcv

class Bar(writer.tqdm):
    moves = 0
    def update(self, by=1):
        super().update(by)
        Bar.moves += 1
        if Bar.moves == {hold}:
            print("held", flush=True)
            sys.stdin.readline()

writer.SYNC_SECONDS, writer.tqdm = {sync}, Bar
sys.argv = ["write_ffcv.py", *{arguments!r}]
# the shell that runs the tests may have set it to be ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
print("begins", flush=True)
sys.exit(exit_status(write_ffcv.main))
"""


def begin(arguments, sync=0.0, hold=0):
    code = PROGRAM.format(root=str(ROOT), arguments=list(map(str, arguments)), sync=sync, hold=hold)
    # The bars are drawn rarely, because stderr is not read while the program works
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TQDM_MININTERVAL": "60"},
    )
    assert process.stdout.readline() == "begins\n"
    return process


def wait_for_hold(process) -> tuple[bool, str]:
    """Returns when the program is held (True) or has ended (False), with its output up to that
    point."""
    hanging = Timer(300, process.kill)
    hanging.start()
    lines = []
    while (line := process.stdout.readline()) not in ("held\n", ""):
        lines.append(line)
    hanging.cancel()
    return line != "", "".join(lines)


def end(process, line="go on\n"):
    """Lets the program continue. Returns its exit status, and what it then writes to stdout and
    stderr."""
    try:
        out, errors = process.communicate(line, timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """500 images of two classes, some of which are shrunk, and two that cannot be read."""
    root = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    for split, count in (("train", 400), ("val", 100)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
        for number in range(count):
            side = 200 if number % 3 else 700
            small = Image.fromarray(rng.integers(0, 256, (20, 25, 3), np.uint8))
            small.resize((side, side * 4 // 5)).save(
                root / split / "ab"[number % 2] / f"{number:04d}.jpg", quality=85
            )
    (root / "train" / "a" / "0100_broken.jpg").write_bytes(b"\xff\xd8\xff")
    (root / "val" / "b" / "0050_broken.png").write_bytes(b"")
    return root


def options(folder, target, workers):
    return [
        f"--cfg.data_dir={folder}",
        f"--cfg.write_path={target}",
        f"--cfg.num_workers={workers}",
        "--cfg.max_resolution=300",
        "--cfg.on_error=skip",
        "--cfg.max_skipped=0.02",
    ]


def files(target) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in target.iterdir()}


def test_conversion_killed_at_random_instants_equals_uninterrupted(folder, tmp_path, report):
    assert end(begin(options(folder, tmp_path / "whole", 2)))[0] == 0
    uninterrupted = files(tmp_path / "whole")
    assert sorted(uninterrupted) == [
        "train.beton",
        "train.beton.skipped.csv",
        "val.beton",
        "val.beton.skipped.csv",
    ]
    rng, kills, runs, resumed = random.Random(0), 0, 0, 0
    while kills < KILLS:
        target = tmp_path / f"run_{runs}"
        runs += 1
        while True:
            # Progress bar updates before the kill; a complete conversion makes 512
            moves = rng.randrange(400) if kills < KILLS else 0
            process = begin(
                options(folder, target, rng.choice([1, 2, 3])), rng.choice([0.0, 0.02]), moves
            )
            held, out = wait_for_hold(process) if moves else (kills < KILLS, "")
            if held:
                process.stdin.write("go on\n")
                process.stdin.flush()
                # Any instant after a known point; no result depends on which one it is
                time.sleep(rng.uniform(0, 0.05 if moves else 1.0))
                process.kill()
            status, rest, errors = end(process)
            resumed += "continuing after" in out + rest
            if status != 0:
                assert status == -signal.SIGKILL, errors
                kills += 1
                visible = (
                    {path.name for path in target.iterdir() if not path.name.startswith(".")}
                    if target.exists()
                    else set()
                )
                assert all((target / name).read_bytes() == uninterrupted[name] for name in visible)
                continue
            break
        assert files(target) == uninterrupted
    report(f"{kills} kills over {runs} conversions, which resumed {resumed} times")
    assert resumed


def test_interrupted_conversion_keeps_finished_work(folder, tmp_path):
    process = begin(options(folder, tmp_path, 2), sync=1000.0, hold=200)
    assert wait_for_hold(process)[0]
    process.send_signal(signal.SIGINT)
    status, _, errors = end(process, "")
    assert status == 130, errors
    status, out, errors = end(begin(options(folder, tmp_path, 2)))
    assert status == 0 and "train.beton: continuing after 200 of 401 pictures" in out, errors


def test_second_writer_of_a_file_is_rejected(folder, tmp_path):
    first = begin(options(folder, tmp_path, 1), hold=1)
    assert wait_for_hold(first)[0]
    status, _, errors = end(begin(options(folder, tmp_path, 1)))
    assert status == 2 and "another process is writing it" in errors.splitlines()[-1]
    status, _, errors = end(first)
    assert status == 0, errors


def test_rerun_with_other_settings_is_rejected(folder, tmp_path):
    process = begin(options(folder, tmp_path, 2), hold=50)
    assert wait_for_hold(process)[0]
    process.kill()
    end(process)
    for change, message in (
        ("--cfg.jpeg_quality=80", "jpeg_quality 90, now 80"),
        ("--cfg.max_resolution=200", "max_resolution 300, now 200"),
    ):
        status, _, errors = end(begin([*options(folder, tmp_path, 2), change]))
        assert status == 2 and message in errors.splitlines()[-1]
    assert end(begin(options(folder, tmp_path, 2)))[0] == 0
    finished = (tmp_path / "train.beton").stat().st_mtime_ns
    status, out, _ = end(begin(options(folder, tmp_path, 2)))
    assert (
        status == 0
        and "exists already" in out
        and (tmp_path / "train.beton").stat().st_mtime_ns == finished
    )
    status, _, errors = end(begin([*options(folder, tmp_path, 2), "--cfg.jpeg_quality=80"]))
    assert (
        status == 2
        and "written with other settings (jpeg_quality 90, now 80)" in errors.splitlines()[-1]
    )
    assert (tmp_path / "train.beton").stat().st_mtime_ns == finished


def test_read_only_target_is_named(folder):
    status, _, errors = end(begin(options(folder, "/proc/nowhere", 1)))
    assert status == 2 and "cfg.write_path=/proc/nowhere" in errors.splitlines()[-1]
