"""The command doctor: its findings, with what they look at replaced."""

import importlib.metadata
import shutil
from types import SimpleNamespace

import pytest

from rsb_ffcv.commands import doctor
from rsb_ffcv.config.train import ONLY_FOR_RUNS, read_config


@pytest.fixture
def config(betons, tmp_path):
    """config(**options): of a small recipe."""

    def read(**more):
        options = {
            "data.train_dataset": betons / "train.beton",
            "data.val_dataset": betons / "val.beton",
            "data.in_memory": 1,
            "logging.folder": tmp_path / "new" / "run",
            "model.arch": "test_resnet",
            "resolution.min_res": 32,
            "resolution.max_res": 32,
            "training.batch_size": 16,
            "training.optimizer": "lamb",
            "ema.decay": 0.9,
            "compute.device": "cpu",
            **more,
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        return read_config(None, flags, unread={*ONLY_FOR_RUNS, "data.train_dataset"})

    return read


def found(check, c):
    return {finding.name: finding for finding in check(c)}


def test_doctor_of_a_good_recipe_prints_a_line_for_each_check(
    betons, tmp_path, call_program, monkeypatch
):
    monkeypatch.setattr(doctor, "LOADER_SECONDS", 0.1)
    monkeypatch.setattr(doctor, "STEP_SECONDS", 0.1)
    options = {
        "data.train_dataset": betons / "train.beton",
        "data.val_dataset": betons / "val.beton",
        "logging.folder": tmp_path / "run",
        "model.arch": "test_resnet",
        "resolution.min_res": 32,
        "resolution.max_res": 32,
        "training.batch_size": 16,
        "compute.device": "cpu",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    status, out, err = call_program("train_imagenet.py", "doctor", *flags)
    assert status == 0 and not err, err
    names = [line[6:].partition(":")[0] for line in out.splitlines()]
    for name in ("versions", "core", "threads", "data.train_dataset", "locks", "disk", "space"):
        assert name in names
    assert names[-2:] == ["speed", "num_workers"] and "images/s" in out
    assert all(line.startswith(("ok    ", "warn  ")) for line in out.splitlines())
    assert not (tmp_path / "run").exists() and not list(tmp_path.iterdir())
    options["data.val_dataset"] = tmp_path / "absent.beton"
    flags = [f"--{name}={value}" for name, value in options.items()]
    status, out, _ = call_program("train_imagenet.py", "doctor", *flags)
    assert status == 1 and "\nfail  data.val_dataset: " in out and "cannot be read" in out


def test_missing_packages_are_named(config, monkeypatch):
    def version(name):
        if name in missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    missing = {"ffcv"}
    assert "packages" not in found(doctor.versions, config())  # an extra of the wheel
    missing = {"ffcv", "numba"}
    finding = found(doctor.versions, config())["packages"]
    assert finding.status == "fail" and finding.text == "not installed: numba"
    assert "make set-up" in finding.remedy


def test_more_threads_than_cores_is_a_warning(config, monkeypatch):
    monkeypatch.setattr(doctor.compute, "available_cores", lambda: 8)
    assert found(doctor.threads, config(**{"data.num_workers": 8}))["threads"].status == "ok"
    many = {"data.num_workers": 8, "training.distributed": 1, "dist.world_size": 2}
    finding = found(doctor.threads, config(**many))["threads"]
    assert finding.status == "warn" and "data.num_workers=4" in finding.remedy


def test_files_larger_than_the_memory_are_found(config, monkeypatch):
    memory = SimpleNamespace(available=1000)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory)
    assert found(doctor.memory, config())["data.train_dataset"].status == "fail"
    finding = found(doctor.memory, config(**{"data.in_memory": 0}))["data.train_dataset"]
    assert finding.status == "warn" and "quasi_random" in finding.remedy
    slow = {"data.in_memory": 0, "data.order": "quasi_random"}
    assert found(doctor.memory, config(**slow))["data.train_dataset"].status == "ok"


def test_full_and_unwritable_disks_are_found(config, monkeypatch, tmp_path):
    usage = SimpleNamespace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    finding = found(doctor.folder, config())["space"]
    assert finding.status == "fail" and "up to 5 checkpoints" in finding.text
    size = doctor._checkpoint_bytes(config())
    usage.free = 5 * size
    assert found(doctor.folder, config())["space"].status == "ok"
    more = {"checkpoint.archive_every": 10, "training.epochs": 100}
    assert found(doctor.folder, config(**more))["space"].status == "fail"

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    assert found(doctor.folder, config())["logging.folder"].status == "fail"


def test_too_few_cores_for_the_device_are_found(config, monkeypatch):
    monkeypatch.setattr(doctor, "_thread_rate", lambda c, where: 500.0)
    monkeypatch.setattr(doctor, "_step_rate", lambda c, where: 2000.0)
    monkeypatch.setattr(doctor.compute, "available_cores", lambda: 5)
    assert "data.num_workers=5 or more" in found(doctor.speed, config())["num_workers"].text
    monkeypatch.setattr(doctor.compute, "available_cores", lambda: 4)
    finding = found(doctor.speed, config())["num_workers"]
    assert finding.status == "warn" and "data.decode=gpu" in finding.remedy


def test_doctor_names_the_place_in_a_job_and_what_is_wrong_with_it(config, monkeypatch):
    job = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "20016"}
    assert not found(doctor.job, config())
    for name, value in {**job, "SLURMD_NODENAME": "node2"}.items():
        monkeypatch.setenv(name, value)
    assert found(doctor.job, config())["job"] == doctor.Finding(
        "ok", "job", "process 1 of 2 on node2; process 0 listens at node1:20016"
    )
    monkeypatch.delenv("MASTER_ADDR")
    finding = found(doctor.job, config())["job"]
    assert finding.status == "fail" and "MASTER_ADDR is not; start the job" in finding.text


def test_doctor_names_the_interface_of_a_job_and_what_is_wrong_with_it(config, monkeypatch):
    """On a machine with two networks: process 0 is at 10.0.0.1, which eth0 reaches."""
    own = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"], "ib0": ["10.1.0.2"]}
    reached = {"10.0.0.1": ("10.0.0.2", True), "127.0.1.1": ("127.0.0.1", False)}
    monkeypatch.setattr(doctor.network, "interfaces", lambda: own)
    monkeypatch.setattr(doctor.network, "own_address", lambda address, _: reached[address])
    job = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "20016"}

    def network(**more):
        for name, value in {**job, "SLURMD_NODENAME": "node2", **more}.items():
            monkeypatch.setenv(name, value)
        return found(doctor.job, config())["network"]

    has = "; node2 has eth0 (10.0.0.2), ib0 (10.1.0.2)"
    assert network() == (
        "ok",
        "network",
        f"gloo uses eth0 (10.0.0.2), which reaches 10.0.0.1{has}",
        "",
    )
    assert network(LOCAL_WORLD_SIZE="2").text == f"all processes are on this machine{has}"
    here = {"RANK": "0", "MASTER_ADDR": "127.0.1.1", "LOCAL_WORLD_SIZE": "1"}
    assert "once they have connected" in network(**here).text
    finding = network(MASTER_ADDR="127.0.1.1")
    assert finding.status == "fail" and "127.0.1.1 is node2 itself (127.0.0.1)" in finding.text
    assert network(GLOO_SOCKET_IFNAME="ib0").text == f"gloo uses ib0 (GLOO_SOCKET_IFNAME){has}"
    finding = network(GLOO_SOCKET_IFNAME="ib7")
    assert finding.status == "fail" and "no such interface (ib7)" in finding.text
    finding = network(MASTER_ADDR="no.such.host.invalid")
    assert finding.status == "fail" and "node2 does not know this name" in finding.text


@pytest.mark.parametrize(
    "value, missing",
    [
        ("eth", ""),
        ("=eth0", ""),
        ("=eth", "eth"),
        ("^lo,docker", ""),
        ("^lo,eth", "lo, eth"),
        ("ib,eth", ""),
        ("ib", "ib"),
    ],
)
def test_interfaces_that_nccl_cannot_find_are_named(monkeypatch, value, missing):
    monkeypatch.setattr(doctor.network, "interfaces", lambda: {"lo": ["::1"], "eth0": ["::2"]})
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    assert not doctor.network.wrong_choice(nccl=False)
    wrong = doctor.network.wrong_choice(nccl=True)
    assert f"no such interface ({missing})" in wrong if missing else not wrong
