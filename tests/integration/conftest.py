"""Fixtures of runs that several files look at. They are read-only."""

import sys

import pytest

from tests.integration.runs import options


@pytest.fixture(scope="session")
def finished_run(betons, tmp_path_factory, train):
    """A finished run (see `options`)."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    statuses, _, err = train(options(betons, folder)).wait()
    assert statuses == [0], err
    return folder


@pytest.fixture(scope="session")
def exported(finished_run, tmp_path_factory):
    """{input: exported folder of `finished_run`} with all formats, for each input."""
    import train_imagenet

    found = {}
    for kind in ("uint8", "float"):
        found[kind] = tmp_path_factory.mktemp("exported") / kind
        saved, sys.argv = (
            sys.argv,
            [
                "train_imagenet.py",
                "export",
                str(finished_run),
                f"--export.folder={found[kind]}",
                "--export.formats=timm, torch,onnx",
                f"--export.input={kind}",
            ],
        )
        try:
            assert train_imagenet.main() == 0
        finally:
            sys.argv = saved
    return found


@pytest.fixture
def command(call_program):
    """command(name, words, options): calls train_imagenet.py with options of the section `name`.
    Returns (exit status, stdout, stderr)."""

    def call(name, words, given):
        flags = [f"--{name}.{key}={value}" for key, value in given.items()]
        words = words if isinstance(words, list) else [words]
        return call_program("train_imagenet.py", name, *words, *flags)

    return call
