"""Packs everything that a GPU machine without a network lacks to run benchmarks/gpu_check.py.

    make gpu-bundle        (python benchmarks/gpu_bundle.py --out gpu_bundle.tar.xz)

The machine has Linux on x86-64 with glibc 2.34 or later, Python 3.11 or 3.12, PyTorch for CUDA,
torchvision, timm, numba and OpenCV. The bundle has the committed files, the compiled core with
libturbojpeg beside it, and the other packages for both Pythons. Unpack it there, and run

    ./gpu_check.sh [--train /absolute/path/train.beton]

It installs nothing: packages of the bundle are found after those of the machine.
"""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_BYTES = 25 << 20
PYTHONS = ("3.11", "3.12")
# what the check imports, and the machine may lack
PACKAGES = (
    *("fastargs", "terminaltables", "tqdm", "psutil", "pyyaml"),
    *("pytest", "pluggy", "iniconfig", "pygments", "packaging"),
    *("matplotlib", "contourpy", "cycler", "fonttools", "kiwisolver", "pyparsing"),
    *("python-dateutil", "six"),
)
PURE = ("fonttools",)  # its compiled form is larger and does not help here
SOURCE = ("fastargs",)  # has no wheel
SCRIPT = """#!/bin/sh
# Runs the check on this machine. The options are those of benchmarks/gpu_check.py, such as
# --train /absolute/path/train.beton, a file of photographs. The record is in ./record.
set -eu
cd "$(dirname "$0")"
export PYTHONPATH="$PWD/packages:$PWD" RSB_COMMIT={commit}
exec python3 benchmarks/gpu_check.py --out record "$@"
"""
# Python imports it at its start; the packages come last, behind those of the machine.
CUSTOMIZE = """import os
import sys

sys.path.append(os.path.join(os.path.dirname(__file__), "%d.%d" % sys.version_info[:2]))
"""


def run(*command: object) -> str:
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def add_core(folder: Path) -> None:
    """Builds the core so that it looks for libturbojpeg beside itself, and copies both."""
    ops = folder / "rsb_ffcv" / "ops"
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--force"],
        cwd=folder,  # the committed source, as all of the bundle
        check=True,
        env={**os.environ, "LDFLAGS": "-Wl,-rpath,$ORIGIN -Wl,--disable-new-dtags"},
    )
    core = next(ops.glob("_native*.so"))
    listed = run("ldd", core)
    library = next(
        Path(line.split("=>")[1].split()[0]) for line in listed.splitlines() if "turbojpeg" in line
    )
    (ops / "libturbojpeg.so.0").write_bytes(library.read_bytes())


def add_packages(folder: Path) -> None:
    """Puts the packages for each Python into a folder of its own."""
    pins = dict(
        line.strip().lower().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    pip = (sys.executable, "-m", "pip")
    options = ("-q", "--no-deps", "--disable-pip-version-check")
    compact = ("--no-compile", "--target")
    with tempfile.TemporaryDirectory() as wheels:
        run(*pip, "wheel", *options, "--wheel-dir", wheels, *SOURCE)
        for version in PYTHONS:
            target = folder / version
            for pure in (False, True):
                names = [name for name in PACKAGES if (name in PURE) == pure and name not in SOURCE]
                platforms = ["any"] if pure else [f"manylinux_2_{n}_x86_64" for n in (28, 27, 17)]
                run(
                    *(*pip, "install", *options, *compact, target, "--only-binary=:all:"),
                    *("--python-version", version, "--implementation", "cp"),
                    *(part for platform in platforms for part in ("--platform", platform)),
                    *(f"{name}=={pins[name]}" if name in pins else name for name in names),
                    *([] if pure else Path(wheels).iterdir()),
                )
    (folder / "sitecustomize.py").write_text(CUSTOMIZE)


def bundle(out: Path) -> None:
    """Writes the bundle. Raises SystemExit if it is larger than MAX_BYTES."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "rsb_ffcv_check"
        archive = subprocess.run(
            ["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        add_core(folder)
        add_packages(folder / "packages")
        script = folder / "gpu_check.sh"
        script.write_text(SCRIPT.format(commit=run("git", "rev-parse", "HEAD")))
        script.chmod(0o755)
        unfinished = out.with_name(f".{out.name}.part")
        # xz finds what the packages of both Pythons have in common
        with tarfile.open(unfinished, "w:xz", preset=9) as packed:
            packed.add(folder, folder.name)
    size = unfinished.stat().st_size
    if size > MAX_BYTES:
        unfinished.unlink()
        raise SystemExit(f"error: the bundle has {size / 2**20:.1f} MiB, more than 25")
    unfinished.rename(out)
    print(f"{out}: {size / 2**20:.1f} MiB; unpack it, and run rsb_ffcv_check/gpu_check.sh")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_bundle.tar.xz"))
    bundle(parser.parse_args().out)


if __name__ == "__main__":
    main()
