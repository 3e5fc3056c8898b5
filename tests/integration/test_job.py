"""Processes that do not belong together are rejected at the start. A process that is silent for too
long ends the job."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import psutil
import pytest
import torch

from rsb_ffcv import InputError
from rsb_ffcv.dataset import Place, write_splits
from rsb_ffcv.training import compute, join
from tests.conftest import ROOT
from tests.integration.runs import assert_same_run, options, rows
from tests.stops import wait_until

TWO = {"training.batch_size": 8, "data.num_workers": 1}


@pytest.fixture(scope="module")
def others(pictures, tmp_path_factory):
    """Folder of two training files: fewer.beton has 84 images. exchanged.beton has 96 of the same
    sizes, with two labels exchanged."""
    root = tmp_path_factory.mktemp("others")
    for name in ("fewer", "exchanged"):
        shutil.copytree(pictures / "train", root / name / "train")
    for number in range(4):
        for label in ("amber", "blue", "cyan"):
            (root / "fewer" / "train" / label / f"{number}.jpg").unlink()
    one, other = (root / "exchanged" / "train" / place for place in ("amber/3.jpg", "blue/3.jpg"))
    one.rename(root / "kept")
    other.rename(one)
    (root / "kept").rename(other)
    for name in ("fewer", "exchanged"):
        write_splits(
            Place(dataset="imagenet", data_dir=str(root / name)),
            str(root / f"{name}.beton"),
            split="train",
            num_workers=2,
        )
    return root


@pytest.mark.parametrize(
    "own, differs",
    [
        (
            "--data.train_dataset={others}/fewer.beton",
            r"data.train_dataset: 84 images of 3 classes, .*, but 96 images of 3 classes",
        ),
        (
            "--data.train_dataset={others}/exchanged.beton",
            r"data.train_dataset: 96 images of 3 classes, .*, but 96 images of 3 classes",
        ),
        ("--lr.lr=0.004", r"lr.lr: 0.004, but 0.005 on process 0"),
        ("--checkpoint.every_steps=2", r"checkpoint.every_steps: 2, but 0 on process 0"),
        ("--compute.precision=bf16", r"precision: bf16, but fp32 on process 0"),
    ],
)
def test_processes_with_different_files_or_recipes_are_rejected(
    betons, others, tmp_path, train, own, differs
):
    run = train(options(betons, tmp_path / "run", **TWO), 2, own={1: [own.format(others=others)]})
    statuses, _, err = run.wait()
    assert statuses == [2, 2] and err.count("error:") == 1 and "Traceback" not in err, err
    assert re.search(rf"error: process 1 \(.+\) differs from process 0 \(.+\): {differs}", err), err
    assert not (tmp_path / "run").exists()


def test_processes_with_different_versions_are_rejected(betons, tmp_path, train):
    newer = 'import os, timm\nif os.environ["RANK"] == "1": timm.__version__ = "99.0"'
    statuses, _, err = train(options(betons, tmp_path / "run", **TWO), 2, prepare=newer).wait()
    assert statuses == [2, 2] and "): timm: 99.0, but " in err and err.count("error:") == 1, err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_error_of_one_machine_ends_all_processes_and_is_reported_once(betons, tmp_path, train):
    own = {1: ["--compute.device=cuda"]}
    statuses, _, err = train(options(betons, tmp_path / "run", **TWO), 2, own=own).wait()
    assert statuses == [2, 2] and err.count("error:") == 1 and "Traceback" not in err, err
    assert re.search(r"error: process 1 \(.+\): compute.device=cuda: this machine has no", err), err


@pytest.mark.parametrize(
    "world, change, message",
    [
        (
            2,
            'RANK"] == "1": os.environ["WORLD_SIZE"] = "3',
            r"WORLD_SIZE=2 on process 0 \(.+\), but 3",
        ),
        (
            3,
            'RANK"] == "2": os.environ["RANK"] = "1',
            r"two processes have RANK=1 \(on .+ and .+\)",
        ),
    ],
)
def test_processes_that_do_not_agree_about_their_number_are_rejected(
    betons, tmp_path, train, world, change, message
):
    """All of them end, and one reports it."""
    run = train(
        options(betons, tmp_path / "run", **TWO),
        world,
        prepare=f'import os\nif os.environ["{change}"',
    )
    statuses, _, err = run.wait()
    assert statuses == [2] * world and err.count("error:") == 1 and "Traceback" not in err, err
    assert re.search(f"error: {message}", err), err


def test_same_file_under_another_path_is_accepted(betons, tmp_path, train):
    shutil.copytree(betons, tmp_path / "copy")
    own = {
        1: [
            f"--data.train_dataset={tmp_path}/copy/train.beton",
            f"--data.val_dataset={tmp_path}/copy/val.beton",
            "--data.in_memory=0",
        ]
    }
    statuses, _, err = train(
        options(betons, tmp_path / "run", **TWO, **{"training.epochs": 1, "lr.warmup_epochs": 0}),
        2,
        own=own,
    ).wait()
    assert statuses == [0, 0], err


@pytest.mark.long
@pytest.mark.parametrize("silent", [0, 1])
def test_silent_process_is_named_and_the_others_end(betons, tmp_path, train, silent):
    """The process is suspended in the middle of training. When it continues, it ends as well. The
    same command then resumes the run."""
    more = {**TWO, "training.epochs": 2, "checkpoint.every_minutes": 0}
    statuses, _, err = train(options(betons, tmp_path / "whole", **more), 2).wait()
    assert statuses == [0, 0], err
    run = train(
        options(betons, tmp_path / "run", **more, **{"dist.timeout_s": 10}),
        2,
        stop_at=("epoch 2", 1),
    )
    run.wait_for_stop()
    run.wait_until((tmp_path / "run" / "checkpoint_000000003.pt").exists)
    run.signal(signal.SIGSTOP, rank=silent)
    run.go_on()
    (status,), _, err = run.wait(rank=1 - silent)
    assert status == 3 and err.count("error:") == 1 and "Traceback" not in err, err
    assert re.search(
        rf"error: process {silent} \(.+\) of 2 did not respond for 10 s \(dist.timeout_s\)",
        err,
    ), err
    run.signal(signal.SIGCONT, rank=silent)
    (status,), _, err = run.wait(rank=silent)
    assert status == 3, err
    statuses, out, err = train(options(betons, tmp_path / "run", **more), 2).wait()
    assert statuses == [0, 0] and "resuming" in out, err
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# Code for three processes, with a clock that is not the machine's. Each group takes 10 ms. Process
# 1 waits for its images until the other two have all their gradients, which takes 70 ms more. They
# wait for its gradients in the meantime, as the clock shows after the step's last collective.
SLOW_PROCESS = """
import os, time
from types import SimpleNamespace
import torch, torch.distributed as dist
from rsb_ffcv.loading.batch import BatchTransform
from rsb_ffcv.training import join, step
rank, clock = int(os.environ["RANK"]), SimpleNamespace(now=0.0, step=0)
step.time = SimpleNamespace(perf_counter=lambda: clock.now)
draw, mark, end_step = BatchTransform.draw, step.OwnTime.mark, step.RunningStatistics.end_step
def joined():
    return join._joined[0].store
def slow_draw(self, *arguments, **options):
    clock.now += 0.01
    if rank == 1:
        clock.now, clock.step = clock.now + 0.07, clock.step + 1
        # in the forward pass of its second step, DDP waits for all processes: it has new buckets
        while clock.step != 2 and joined().add("have gradients", 0) < 2 * clock.step:
            time.sleep(0.002)
    return draw(self, *arguments, **options)
def counted_mark(self):
    mark(self)
    if rank != 1 and len(self._steps[-1]) == 2:
        joined().add("have gradients", 1)
def synchronized_end(self):
    end_step(self)
    latest = torch.tensor(clock.now, dtype=torch.float64)
    dist.all_reduce(latest, dist.ReduceOp.MAX)
    clock.now = latest.item()
BatchTransform.draw, step.OwnTime.mark = slow_draw, counted_mark
step.RunningStatistics.end_step = synchronized_end
"""


def test_slowest_process_is_named_though_all_have_the_same_time_per_step(betons, tmp_path, train):
    more = {"training.batch_size": 8, "training.global_batch": 24, "data.num_workers": 1}
    more |= {"training.epochs": 2}
    flags = options(betons, tmp_path / "run", **more)
    statuses, out, err = train(flags, 3, prepare=SLOW_PROCESS).wait()
    assert statuses == [0, 0, 0], err
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["own_step_ms"] == [10, 80, 10]
        assert row["slowest"] == {
            "process": 1,
            "host": socket.gethostname(),
            "own_step_ms": 80,
            "percent_above_median": 700,
        }
    told = f"; slowest: process 1 ({socket.gethostname()}), 80 ms a step, 700 % above the median"
    assert [line.endswith(told) for line in out.splitlines() if line[:6] == "epoch "] == [True] * 2


# Code that writes the calls of process 0 to torch.distributed, but those of the heartbeat's thread,
# and the begin of each step and of each row, to a file
COUNTED = """
import os, threading
import torch.distributed as dist
from rsb_ffcv.training.progress import Progress
from rsb_ffcv.training.step import TrainStep
def note(*what):
    if os.environ["RANK"] == "0" and threading.current_thread() is threading.main_thread():
        with open("{path}", "a") as file:
            print(*what, file=file)
def noted(name, function):
    def call(*arguments, **options):
        about = [arguments[0].dtype, arguments[0].nbytes] if "reduce" in name else []
        note(name, *about)
        return function(*arguments, **options)
    return call
for name in [name for name in dir(dist) if name.startswith(
    ("all_", "broadcast", "gather", "scatter", "reduce", "barrier", "monitored", "send", "recv")
)]:
    if callable(getattr(dist, name)):
        setattr(dist, name, noted(name, getattr(dist, name)))
for kind, method in ((TrainStep, "__call__"), (Progress, "row")):
    def begin(self, *arguments, __of=getattr(kind, method), __name=kind.__name__, **options):
        note("begin", __name)
        return __of(self, *arguments, **options)
    setattr(kind, method, begin)
"""


def test_a_step_has_one_small_vote_and_no_gather_of_objects(betons, tmp_path, train):
    """Besides its gradients, which DDP's C++ averages, and the statistics of batch norm. A row has
    one sum and one gather."""
    flags = options(betons, tmp_path / "run", **TWO)
    statuses, _, err = train(flags, 2, prepare=COUNTED.format(path=tmp_path / "calls")).wait()
    assert statuses == [0, 0], err
    steps = (tmp_path / "calls").read_text().split("begin TrainStep\n")[1:]
    assert len(steps) == 9  # 3 epochs
    for number, step in enumerate(steps, 1):
        of_step, *of_row = step.split("begin Progress\n")
        calls = of_step.splitlines()
        statistics = [call for call in calls if call.startswith("all_reduce torch.float32 ")]
        calls.remove(statistics[0])
        if number % 3 == 0:  # the last one of an epoch reads the losses, and they are checked
            assert calls[0].startswith("all_reduce torch.float64 ")
            del calls[0]
        assert calls[0] == "all_reduce torch.int32 4"
        assert number % 3 == 0 or len(calls) == 1
        assert bool(of_row) == (number % 3 == 0)
        if of_row:
            # and then the vote after the first batch of the validation
            assert of_row[0].splitlines()[:3] == [
                "all_reduce torch.float64 24",
                "all_gather_object",
                "all_reduce torch.int32 4",
            ]


@pytest.mark.parametrize("training", [True, False])
def test_parent_reports_a_killed_child_in_one_line(betons, tmp_path, free_port, training):
    """A child is killed in training, when the heartbeat of the other one detects it; or all are
    killed while they start, and only the parent is left to report it."""
    more = {
        **TWO,
        "training.epochs": 10000,
        "training.distributed": 1,
        "dist.world_size": 2,
        "dist.port": free_port,
    }
    job = subprocess.Popen(
        [sys.executable, "train_imagenet.py", *options(betons, tmp_path / "run", **more)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def is_worker(process):
        try:
            return "spawn_main" in " ".join(process.cmdline())
        except psutil.NoSuchProcess:  # it ended in between
            return False

    def children():
        return [child for child in psutil.Process(job.pid).children() if is_worker(child)]

    try:
        wait_until(lambda: len(children()) == 2, job)
        if training:
            wait_until((tmp_path / "run" / "metrics.jsonl").exists, job)
        for child in children()[: 1 if training else 2]:
            child.kill()
        _, err = job.communicate(timeout=300)
    finally:
        job.kill()
    assert job.returncode == 3 and "Traceback" not in err, err
    (line,) = re.findall("error: .*", err)
    assert re.match(r"error: process [01] .*of 2 ended", line) and line.endswith(
        "start the job again, and it resumes from the last checkpoint, if there is one"
    )
    assert "SIGTERM" not in err


@pytest.mark.parametrize(
    "variables, message",
    [
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "WORLD_SIZE=2 is set, but MASTER_ADDR and MASTER_PORT are not; start the job with "
            "torchrun",
        ),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "WORLD_SIZE=2 is set, but RANK is not",
        ),
        ({"RANK": "1"}, "RANK=1 and LOCAL_WORLD_SIZE=1 do not fit WORLD_SIZE=1"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one: must be"),
    ],
)
def test_incomplete_job_variables_are_one_error_line(
    betons, tmp_path, call_program, monkeypatch, variables, message
):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(join, "HELD_SECONDS", 0.0)
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run"))
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err
    assert not join._held  # the next error of this process does not wait


def test_only_visible_gpu_is_used_and_not_shared():
    assert [compute.own_device(rank, 8) for rank in range(8)] == list(range(8))
    assert [compute.own_device(rank, 1) for rank in range(8)] == [0] * 8
    with pytest.raises(
        InputError, match="LOCAL_RANK=2: no CUDA device is left for this process \\(2 visible\\)"
    ):
        compute.own_device(2, 2)
    compute.check_devices([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1"), ("b", ""), ("b", "")])
    with pytest.raises(InputError, match="processes 0 and 2 have the same GPU \\(a, GPU-1\\)"):
        compute.check_devices([("a", "GPU-1"), ("a", "GPU-2"), ("a", "GPU-1")])


def test_processes_bound_to_their_own_cores_do_not_share_them(monkeypatch):
    """As SLURM binds them. The third process of machine a may use cores of the other two."""
    cores = [{0, 1, 2, 3}, {4, 5, 6, 7}, {2, 3, 4, 5, 6, 7}, {0, 1, 2, 3}]
    hosts = ["a", "a", "a", "b"]
    places = [compute._Place(host, "", own) for host, own in zip(hosts, cores)]
    monkeypatch.setattr(compute.launch, "host_name", lambda: "a")
    monkeypatch.setattr(compute.launch, "place_in_job", lambda: (0, 1, 0, 1))
    monkeypatch.setattr(compute, "gather", lambda items: places)

    def sharing(own):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: own)
        return compute.set_up("cpu", "fp32", compile="0", channels_last=False, threads=1).sharing

    assert [sharing(own) for own in cores[:3]] == [2, 2, 3]
    assert sharing({0, 1}) == 1


@pytest.mark.parametrize("device", ["auto", pytest.param("cuda", marks=pytest.mark.long)])
def test_nvidia_device_that_torch_cannot_use_is_rejected(
    betons, tmp_path, call_program, monkeypatch, device
):
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    assert compute.nvidia_devices(str(tmp_path)) == f"{tmp_path}/nvidia0"
    monkeypatch.setattr(compute, "nvidia_devices", lambda: "/dev/nvidia0")
    monkeypatch.setattr(compute.torch.cuda, "is_available", lambda: False)

    def too_old():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040).\nPlease update "
            "your GPU driver"
        )

    monkeypatch.setattr(compute.torch.cuda, "init", too_old)
    monkeypatch.setattr(compute.torch.version, "cuda", "13.0")
    status, _, err = call_program(
        "train_imagenet.py", *options(betons, tmp_path / "run", **{"compute.device": device})
    )
    assert status == 2 and "Traceback" not in err
    assert re.search(
        rf"compute.device={device}: this machine has /dev/nvidia0, .*driver on your system is too "
        rf"old.*install a driver and a torch .*compute.device=cpu",
        err.splitlines()[-1],
    ), err
    status, _, err = call_program(
        "train_imagenet.py",
        *options(
            betons,
            tmp_path / "run",
            **{"compute.device": "cpu", "training.epochs": 1, "lr.warmup_epochs": 0},
        ),
    )
    assert status == 0 and len(rows(tmp_path / "run")) == 1, err


def test_hidden_devices_are_ignored(tmp_path, monkeypatch):
    (tmp_path / "nvidia0").touch()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert compute.nvidia_devices(str(tmp_path)) == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert compute.nvidia_devices(str(tmp_path))


def test_more_loader_threads_than_cores_is_a_warning(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(compute, "available_cores", lambda: 64)
    eight = compute.Compute(
        device=torch.device("cpu"),
        precision="fp32",
        compile=False,
        channels_last=True,
        rank=0,
        world_size=16,
        local_world_size=8,
        sharing=8,
    )
    assert (
        eight.loader_threads(8) == eight.loader_threads("auto") == 8 and not capsys.readouterr().err
    )
    assert eight.loader_threads(12) == 12
    assert (
        "data.num_workers=12: with 8 processes on these cores, this starts 96 threads on 64 "
        "cores; use data.num_workers=8 or auto" in capsys.readouterr().err
    )
    assert (
        compute.Compute(
            device=torch.device("cpu"),
            precision="fp32",
            compile=False,
            channels_last=True,
            rank=1,
            world_size=16,
            local_world_size=8,
            sharing=8,
        ).loader_threads(12)
        == 12
        and not capsys.readouterr().err
    )
    monkeypatch.setattr(compute, "available_cores", lambda: 4)
    assert eight.loader_threads("auto") == 1


def test_available_cores_follow_affinity_and_cpu_quota(monkeypatch):
    assert 1 <= compute.available_cores() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(compute.Path, "read_text", lambda path: "250000 100000\n")
    assert compute.available_cores() == 3
    monkeypatch.setattr(compute.Path, "read_text", lambda path: "max 100000\n")
    assert compute.available_cores() == 64


@pytest.mark.long
def test_resumed_job_of_three_processes_has_the_same_bits(betons, tmp_path, train):
    """A sum of three gradients depends on their order, that of two does not."""
    more = {"training.batch_size": 8, "training.epochs": 2, "mix.off_epochs": 0}
    assert train(options(betons, tmp_path / "whole", **more), 3).wait()[0] == [0] * 3
    run = train(options(betons, tmp_path / "run", **more), 3, stop_at=("epoch 2", 1))
    run.wait_for_stop()
    run.wait_until((tmp_path / "run" / "checkpoint_000000003.pt").exists)
    run.kill()
    run.wait()
    statuses, out, err = train(options(betons, tmp_path / "run", **more), 3).wait()
    assert statuses == [0] * 3 and "resuming" in out, err
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_process_that_dies_is_the_only_one_reported(betons, tmp_path, train):
    """Process 0 does not wait for process 2, but for process 1."""
    more = {"training.batch_size": 8}
    run = train(options(betons, tmp_path / "run", **more), 3, stop_at=("epoch 1", 1))
    run.wait_for_stop()
    run.signal(signal.SIGKILL, 2)
    statuses, _, err = run.wait()
    assert statuses == [3, 3, -signal.SIGKILL], err
    (line,) = re.findall("error: .*", err)
    assert re.match(r"error: process 2 \(\S+\) of 3 ended", line), err
