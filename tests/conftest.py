"""Small real datasets that every test may use: made once a session, read only."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """train/ and val/ of three classes: noisy pictures of 40 .. 90 px whose hue tells the class. 32 + 8 a class."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 32), ("val", 9)):
        for label, name in enumerate(("amber", "blue", "cyan")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng([label, number, split == "val"])
                height, width = rng.integers(40, 91, 2)
                pixels = rng.integers(0, 120, (height, width, 3))
                pixels[..., label] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.jpg", quality=92)
    return root


@pytest.fixture(scope="session")
def betons(pictures, tmp_path_factory) -> Path:
    """Folder with train.beton (96 images) and val.beton (27), JPEG, 3 classes."""
    from rsb_ffcv.dataset import write_splits

    folder = tmp_path_factory.mktemp("betons")
    write_splits("imagenet", str(pictures), str(folder), num_workers=2)
    return folder


@pytest.fixture
def run_program():
    """Runs an entry script of the project as a user would: (exit status, stdout, stderr)."""
    def run(*arguments, timeout=300, env=None, **options):
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                              timeout=timeout, env={**os.environ, **(env or {})}, **options)
        return done.returncode, done.stdout, done.stderr
    return run


@pytest.fixture
def call_program(capfd):
    """An entry script's main() in this process, which has paid for its imports: (exit status, stdout, stderr)."""
    def call(script, *arguments):
        import importlib

        from rsb_ffcv import exit_status

        capfd.readouterr()
        main = importlib.import_module(script.removesuffix(".py")).main
        saved, sys.argv = sys.argv, [script, *map(str, arguments)]
        try:
            status = exit_status(main)
        finally:
            sys.argv = saved
        return status, *capfd.readouterr()
    return call
