"""Checks what a run needs, before it starts: versions, device, core, memory, disk and speed.

Each check yields findings: "ok", "warn" (the run works, but not as well as it could) or "fail",
with the remedy.
"""

import fcntl
import ipaddress
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch.nn import functional as F

from rsb_ffcv import InputError, option_names
from rsb_ffcv.beton import read_beton
from rsb_ffcv.commands.plan import STATES, count_parameters, meta_model
from rsb_ffcv.config.train import TrainConfig, processes
from rsb_ffcv.gpu.driver import Cuda
from rsb_ffcv.learning.model import build_model
from rsb_ffcv.loading.batch import MEAN
from rsb_ffcv.ops.native import library
from rsb_ffcv.training import build, compute, environment, launch, network
from rsb_ffcv.training.environment import NVIDIA

PACKAGES = (*environment.PACKAGES, "fastargs")
WRITTEN_BYTES = 64 << 20
SLOW_MB_S = 50
LOADER_SECONDS, STEP_SECONDS = 2.0, 3.0
SPARE = 1.2  # threads more than the mean needs: images differ in size


class Finding(NamedTuple):
    """status: "ok", "warn" or "fail"."""

    status: str
    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return (
            f"{self.status:<4}  {self.name}: {self.text}{'; ' + self.remedy if self.remedy else ''}"
        )


def examine(c: TrainConfig) -> int:
    """Prints a line for each finding. Returns the exit status: 1 if a check failed."""
    failed = False
    for check in (versions, core, job, device, threads, memory, folder, speed):
        for finding in check(c):
            print(finding, flush=True)
            failed |= finding.status == "fail"
    return int(failed)


def versions(_: TrainConfig) -> Iterator[Finding]:
    installed = environment.versions(PACKAGES)
    found = [f"{name} {version}" for name, version in installed.items() if version]
    # only rsb_ffcv.ffcv needs ffcv
    missing = [name for name, version in installed.items() if not version and name != "ffcv"]
    found.insert(0, f"Python {platform.python_version()}")
    yield Finding("ok", "versions", ", ".join(found))
    if missing:
        yield Finding(
            "fail",
            "packages",
            f"not installed: {', '.join(missing)}",
            "run `make set-up`, or install them with pip",
        )


def core(_: TrainConfig) -> Iterator[Finding]:
    """The compiled core has been imported, so it is there."""
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    name = Path(library._name).name
    if " avx2" in flags:
        yield Finding("ok", "core", f"{name}, with AVX2")
    else:
        yield Finding(
            "warn",
            "core",
            f"{name}, without AVX2: the portable code gives the same bytes, slower",
            "use a processor with AVX2 where loading limits the training",
        )


def job(_: TrainConfig) -> Iterator[Finding]:
    """The processes that torchrun or srun has started."""
    try:
        place = launch.place_in_job()
    except InputError as error:
        yield Finding("fail", "job", str(error))
        return
    if place.world_size > 1:
        yield Finding(
            "ok",
            "job",
            f"process {place.rank} of {place.world_size} on {launch.host_name()}; process 0 "
            f"listens at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        )
        yield _network(place)


def _network(place: launch.Place) -> Finding:
    """The interface over which this process will reach the others."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    found, nccl = network.interfaces(), torch.cuda.is_available()
    try:
        launch.check_address(rank=1)  # not whether the port is free: the job may be using it
        own, _ = network.own_address(address, int(port))
    except InputError as error:
        return Finding("fail", "network", str(error))
    except OSError as error:
        text = f"{launch.host_name()} has no route to MASTER_ADDR={address} ({error.strerror})"
        return Finding("fail", "network", text, f"it has {network.shown(found)}")
    wrong = network.wrong_choice(nccl)
    if wrong:
        return Finding("fail", "network", wrong)
    loopback = ipaddress.ip_address(own).is_loopback
    if loopback and place.rank >= place.local_world_size < place.world_size:
        return Finding(
            "fail",
            "network",
            f"MASTER_ADDR={address} is {launch.host_name()} itself ({own}), but process 0 is on "
            f"another machine",
            "set MASTER_ADDR to an address of that machine, and see /etc/hosts",
        )
    if chosen := os.environ.get(network.GLOO):
        text = f"gloo uses {chosen} ({network.GLOO})"
    elif place.local_world_size == place.world_size:
        text = "all processes are on this machine"
    elif loopback:
        text = "gloo uses the interface that reaches the other machines, once they have connected"
    else:
        text = f"gloo uses {network.interface_of(own)} ({own}), which reaches {address}"
    if nccl:
        choice = os.environ.get(network.NCCL)
        text += f"; NCCL {f'uses {choice} ({network.NCCL})' if choice else 'chooses by itself'}"
    return Finding("ok", "network", f"{text}; {launch.host_name()} has {network.shown(found)}")


def device(c: TrainConfig) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        if NVIDIA.exists():
            yield Finding(
                "fail",
                "GPU",
                "there is an NVIDIA device, but torch cannot use it",
                "install the CUDA build of torch and a driver that fits it",
            )
        else:
            yield Finding("warn", "GPU", "none: training on the CPU is slow", "use a GPU")
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        yield Finding(
            "ok",
            f"GPU {number}",
            f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, "
            f"driver {environment.driver()}",
        )
    if torch.distributed.is_nccl_available():
        yield Finding("ok", "NCCL", environment.nccl_version())
    elif torch.cuda.device_count() > 1:
        yield Finding("fail", "NCCL", "not available", "install a build of torch that has it")
    try:
        Cuda(torch.device("cuda"))
        yield Finding("ok", "decode=gpu", "its kernels are compiled and loaded")
    except InputError as error:
        yield Finding("warn", "decode=gpu", str(error))
    if c.compute.compile != "0":
        lacking = compute.missing_for_compile("cuda")
        if lacking:
            auto = c.compute.compile == "auto"
            yield Finding(
                "warn" if auto else "fail",
                "torch.compile",
                f"needs {lacking}" + "; auto does not compile" * auto,
                "install it, or use compute.compile=0",
            )
        else:
            yield Finding("ok", "torch.compile", "triton, a C compiler and Python's headers")


def threads(c: TrainConfig) -> Iterator[Finding]:
    cores, requested = compute.available_cores(), c.data.num_workers
    count = processes(c)
    if isinstance(requested, str):
        yield Finding("ok", "threads", f"{max(1, cores // count)} of {cores} cores a process")
    elif requested * count > cores:
        yield Finding(
            "warn",
            "threads",
            f"data.num_workers={requested} of {count} processes on {cores} cores",
            f"use data.num_workers={max(1, cores // count)} or auto",
        )
    else:
        yield Finding("ok", "threads", f"data.num_workers={requested} on {cores} cores")


def memory(c: TrainConfig) -> Iterator[Finding]:
    free = psutil.virtual_memory().available
    for option in ("train_dataset", "val_dataset"):
        path = getattr(c.data, option)
        if not path:
            continue
        try:
            beton = read_beton(path)
        except InputError as error:
            yield Finding("fail", f"data.{option}", str(error))
            continue
        text = f"{path}: {len(beton)} images, {beton.num_bytes / 1e9:.1f} GB"
        if beton.num_bytes <= 0.9 * free:
            yield Finding("ok", f"data.{option}", f"{text}, fits in memory")
        elif c.data.in_memory:
            yield Finding(
                "fail",
                f"data.{option}",
                f"{text}; {free / 1e9:.1f} GB of memory are free",
                "use data.in_memory=0, with data.order=quasi_random on slow disks",
            )
        else:
            yield Finding(
                "warn" if c.data.order == "random" else "ok",
                f"data.{option}",
                f"{text}, more than the memory",
                "use data.order=quasi_random on slow disks" if c.data.order == "random" else "",
            )


def folder(c: TrainConfig) -> Iterator[Finding]:
    """Locks, flushes and writes in logging.folder, or where it would be created."""
    if not c.logging.folder:
        return
    wanted = Path(c.logging.folder).absolute()
    place = next(path for path in (wanted, *wanted.parents) if path.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield Finding("ok", "locks", f"{place} has file locks")
            except OSError as error:
                yield Finding(
                    "warn",
                    "locks",
                    f"{place} has no file locks ({error.strerror})",
                    "after a crash of its machine, a run continues after dist.timeout_s",
                )
            started = time.perf_counter()
            file.write(os.urandom(1 << 20) * (WRITTEN_BYTES >> 20))
            file.flush()
            os.fsync(file.fileno())
            rate = WRITTEN_BYTES / (time.perf_counter() - started) / 1e6
    except OSError as error:
        yield Finding(
            "fail",
            "logging.folder",
            f"{place} cannot be written ({error.strerror})",
            "choose another logging.folder",
        )
        return
    slow = rate < SLOW_MB_S
    yield Finding(
        "warn" if slow else "ok",
        "disk",
        f"{place} writes {rate:,.0f} MB/s",
        "checkpoints will take long: use a faster disk" if slow else "",
    )
    size, free = _checkpoint_bytes(c), shutil.disk_usage(place).free
    count = c.checkpoint.keep + 3  # the best one, the newest regular one, the one being written
    if c.checkpoint.archive_every:
        count += c.training.epochs // c.checkpoint.archive_every
    needed = count * size
    text = f"up to {count} checkpoints of {size / 1e9:.2f} GB, {free / 1e9:.1f} GB are free"
    if needed > free:
        yield Finding(
            "fail", "space", text, "free space, or lower checkpoint.keep or archive_every"
        )
    else:
        yield Finding("ok", "space", text)


def _checkpoint_bytes(c: TrainConfig) -> int:
    parameters = count_parameters(meta_model(c, c.model.num_classes or 1000))
    moments = STATES.get(c.training.optimizer, 2)
    return 4 * parameters * (1 + moments + bool(c.ema.decay) + bool(c.swa.epochs))


def speed(c: TrainConfig) -> Iterator[Finding]:
    """How many images/s a loader thread and a training step take, and the threads that follow."""
    if not c.data.train_dataset:
        yield Finding("ok", "speed", "not measured: data.train_dataset is not given")
        return
    where = build.hardware(replace(c, compute=replace(c.compute, compile="0")))
    try:
        per_thread = _thread_rate(c, where)
        step = _step_rate(c, where)
    except InputError as error:
        yield Finding("fail", "speed", str(error))
        return
    yield Finding(
        "ok",
        "speed",
        f"a loader thread makes {per_thread:,.0f} images/s, the training step takes {step:,.0f} "
        f"images/s without torch.compile",
    )
    cores, wanted = compute.available_cores(), -(-step * SPARE // per_thread)
    if wanted <= cores:
        yield Finding("ok", "num_workers", f"data.num_workers={wanted:.0f} or more suffices")
    else:
        yield Finding(
            "warn",
            "num_workers",
            f"{wanted:.0f} threads would be needed, and there are {cores} cores",
            "use data.decode=gpu, or a machine with more cores for each GPU",
        )


def _thread_rate(c: TrainConfig, where: compute.Compute) -> float:
    """Images per second of CPU time that decoding and augmenting take."""
    alone = replace(where, device=torch.device("cpu"), world_size=1, rank=0)
    batch = min(c.training.batch_size, len(read_beton(c.data.train_dataset)))
    training = replace(c.training, batch_size=batch, global_batch=0)
    with closing(
        build.train_loader(replace(c, training=training), alone, 1, decode="cpu")
    ) as loader:
        loader.resolution = c.resolution.max_res
        images, started, cpu = 0, time.perf_counter(), time.process_time()
        for epoch in range(1000):
            with closing(loader.epoch(epoch)) as batches:
                for made in batches:
                    images += len(made.labels)
                    if time.perf_counter() - started > LOADER_SECONDS:
                        return images / (time.process_time() - cpu)
    return images / (time.process_time() - cpu)


def _step_rate(c: TrainConfig, where: compute.Compute) -> float:
    """Images/s of forward and backward passes."""
    with option_names(build.TRAIN_OPTIONS):
        model: Any = build_model(c.model.arch, c.model.num_classes or 1000, mean=MEAN)
    model = model.to(where.device, memory_format=where.memory_format).train()
    batch = min(c.training.batch_size, 16) if where.device.type == "cpu" else c.training.batch_size
    side = c.resolution.max_res
    images = torch.randn(batch, 3, side, side, device=where.device)
    images = images.contiguous(memory_format=where.memory_format)
    labels = torch.zeros(batch, dtype=torch.int64, device=where.device)

    def step() -> None:
        with where.autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        if where.device.type == "cuda":
            torch.cuda.synchronize()

    with build.within_memory(c, "training", side):
        step()
        started, steps = time.perf_counter(), 0
        while time.perf_counter() - started < STEP_SECONDS:
            step()
            steps += 1
    return steps * batch / (time.perf_counter() - started)
