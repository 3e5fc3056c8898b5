"""Jobs whose processes do not share logging.folder: each machine has a copy of the checkpoints, and
any of them continues the run."""

import filecmp
import json
import re
import shutil
import signal

import pytest
import torch

from rsb_ffcv.training import checkpoint
from tests.integration.runs import assert_same_run, options, rows, state
from tests.integration.test_go_back import MORE as GOING_BACK
from tests.integration.test_go_back import OVERFLOW

# Each process is a machine of its own. No process ever sees a file of the other folders, so none
# has to wait for it.
PREPARE = """
import os
from rsb_ffcv.training import copies
os.environ["SLURMD_NODENAME"] = "node" + os.environ.get("RANK", "0")
copies.FOLDER_SECONDS = 0
"""
MORE = {
    "model.arch": "test_resnet",
    "training.batch_size": 8,
    "training.optimizer": "sgd",
    "data.num_workers": 1,
}
WRITTEN = ("checkpoint_*.pt", "best.pt", "best_weights.pt")


@pytest.fixture(scope="module")
def whole(betons, tmp_path_factory, train):
    """Folder of the run of two processes that share it."""
    folder = tmp_path_factory.mktemp("folders") / "whole"
    statuses, out, err = train(options(betons, folder, **MORE), 2).wait()
    assert statuses == [0, 0] and "not shared" not in out, err
    return folder


@pytest.fixture
def job(betons, train):
    """job(folder, folder, ...): starts a job with one process for each folder."""

    def start(*folders, prepare="", stop_at=None, **more):
        own = {rank: [f"--logging.folder={folder}"] for rank, folder in enumerate(folders)}
        return train(
            options(betons, folders[0], **{**MORE, **more}),
            len(folders),
            own=own,
            prepare=PREPARE + prepare,
            stop_at=stop_at,
        )

    return start


def names(folder):
    return sorted(path.name for pattern in WRITTEN for path in folder.glob(pattern))


def assert_copies(folder, other):
    """Asserts that both have the same checkpoints, byte for byte."""
    assert names(folder) == names(other) and names(folder)
    assert filecmp.cmpfiles(folder, other, names(folder), shallow=False)[1:] == ([], [])


def test_copies_are_kept_and_the_run_equals_that_of_a_shared_folder(tmp_path, job, whole):
    a, b = tmp_path / "a", tmp_path / "b"
    statuses, out, err = job(a, b).wait()
    assert statuses == [0, 0], err
    assert (
        "logging.folder is not shared: process 0 (node0) writes the run, and process 1 (node1) "
        "keeps a copy of its checkpoints\n" in out
    )
    assert_same_run(a, whole)
    assert_copies(a, b)
    assert sorted(path.name for path in b.glob("[!.]*")) == names(b)


def killed(run, step, *folders):
    """Kills a run at its stop, when all folders have the checkpoint of `step` as the newest."""
    run.wait_for_stop()
    name = f"checkpoint_{step:09d}.pt"
    run.wait_until(lambda: all((folder / name).exists() for folder in folders))
    run.kill()
    run.wait()


def prepared(job, *folders, **more):
    """Folders of a run that was killed in its second epoch, after the checkpoint of the first."""
    run = job(*folders, stop_at=("epoch 2", 2), **{"checkpoint.every_minutes": 0, **more})
    killed(run, 3, *folders)


@pytest.mark.parametrize(
    "emptied", [*(pytest.param(it, marks=pytest.mark.long) for it in ("none", "a")), "b"]
)
def test_killed_run_continues_with_its_machines_exchanged(tmp_path, job, whole, emptied):
    """Process 0 is then on the other machine, b. One of the two folders may be lost."""
    a, b = tmp_path / "a", tmp_path / "b"
    prepared(job, a, b)
    shutil.rmtree(tmp_path / emptied, ignore_errors=True)
    statuses, out, err = job(b, a).wait()
    assert statuses == [0, 0] and f"resuming {b} after step 3 of 9" in out, err
    assert ("the newest checkpoint is that of process 1 (node1)" in out) is (emptied == "b")
    assert_same_run(b, whole)
    assert_copies(b, a)


def test_copy_alone_continues_the_run(tmp_path, job, betons, train):
    """The machine of process 0 is lost. With one process left, sums are added in another order."""
    a, b = tmp_path / "a", tmp_path / "b"
    prepared(job, a, b)
    shutil.rmtree(a)
    statuses, out, err = train(options(betons, b, **MORE)).wait()
    assert statuses == [0] and f"resuming {b} after step 3 of 9" in out, err
    assert len(rows(b)) == 3 and (b / "final_weights.pt").exists() and not a.exists()


def test_signal_saves_on_each_machine(tmp_path, job, whole):
    """In the middle of an epoch, on the machine of the copy."""
    a, b = tmp_path / "a", tmp_path / "b"
    run = job(a, b, stop_at=("epoch 2", 1), **{"checkpoint.every_minutes": 0})
    run.wait_for_stop()
    run.signal(signal.SIGTERM, rank=1)
    run.wait_until(lambda: "SIGTERM" in run.err.read_text())
    run.go_on()
    statuses, _, err = run.wait()
    assert statuses == [75, 75], err
    assert_copies(a, b)
    assert (a / "requeue").exists() and not (b / "requeue").exists()
    statuses, out, err = job(b, a).wait()
    assert statuses == [0, 0] and f"resuming {b} after step 5 of 9" in out, err
    assert not (a / "requeue").exists()
    assert_same_run(b, whole)


@pytest.mark.long
def test_folder_is_shared_by_two_of_three_machines(tmp_path, job, betons, train):
    a, b = tmp_path / "a", tmp_path / "b"
    prepared(job, a, a, b)
    shutil.rmtree(a)
    statuses, out, err = job(b, a, a).wait()
    assert statuses == [0, 0, 0] and f"resuming {b} after step" in out, err
    assert "not shared: process 0 (node0) writes the run, and process 1 (node1) keeps a copy" in out
    assert_copies(a, b)
    assert len(rows(b)) == 3 and not rows(a)


@pytest.mark.long
def test_damaged_copy_is_replaced(tmp_path, job, whole):
    """The newest checkpoint of machine b, which has no other one, does not match its checksums."""
    a, b = tmp_path / "a", tmp_path / "b"
    prepared(job, a, b)
    path = b / "checkpoint_000000003.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    statuses, out, err = job(b, a).wait()
    assert statuses == [0, 0], err
    assert re.search(
        r"warning: process 0 \(node0\): .*/b/checkpoint_000000003.pt: damaged \(record .*; no other"
        r" checkpoint is left in this folder\n",
        err,
    ), err
    assert "warning: process 0 (node0): the checkpoint of process 1 (node1) is used\n" in err
    assert path.with_suffix(".damaged").exists()
    assert_same_run(b, whole)
    assert_copies(b, a)


def test_best_checkpoint_of_another_program_is_replaced(tmp_path, job, whole):
    a, b = tmp_path / "a", tmp_path / "b"
    prepared(job, a, b)
    (b / "best.pt").unlink()
    torch.save({"weight": torch.zeros(3)}, b / "best.pt")
    statuses, _, err = job(a, b).wait()
    assert statuses == [0, 0], err
    assert_same_run(a, whole)
    assert_copies(a, b)


def test_no_intact_copy_is_one_error(tmp_path, job):
    a, b = tmp_path / "a", tmp_path / "b"
    b.mkdir()
    (b / "checkpoint_000000003.pt").write_bytes(b"damaged")
    statuses, _, err = job(a, b).wait()
    assert statuses == [2, 2] and err.count("error:") == 1, err
    assert re.search(
        r"error: process 1 \(node1\): .*/b: none of its 1 checkpoints can be read; remove", err
    ), err


@pytest.mark.parametrize(
    "more, message",
    [
        (
            {"lr.lr": 0.004},
            r"process 1 \(node1\): .*/a contains a run of another recipe \(lr.lr: 0.005 in the "
            r"folder, 0.004 now\); use its options, or another logging.folder",
        ),
        (
            {"checkpoint.resume": "never"},
            r"checkpoint.resume=never: .*/a has a checkpoint; use checkpoint.resume=auto",
        ),
    ],
)
def test_run_in_the_folder_of_one_machine_is_one_error(tmp_path, job, more, message):
    a, b = tmp_path / "a", tmp_path / "b"
    prepared(job, a)
    before = {path.name: path.read_bytes() for path in a.glob("*.pt")}
    statuses, _, err = job(b, a, **more).wait()
    assert statuses == [2, 2] and err.count("error:") == 1 and "Traceback" not in err, err
    assert re.search(f"error: {message}", err), err
    assert {path.name: path.read_bytes() for path in a.glob("*.pt")} == before
    assert not list(b.glob("*.pt"))


def test_folder_that_is_in_use_on_one_machine_is_one_error(tmp_path, job, betons, train):
    a, b = tmp_path / "a", tmp_path / "b"
    other = train(options(betons, b), stop_at=("epoch 1", 1))
    other.wait_for_stop()
    statuses, _, err = job(a, b).wait()
    other.kill()
    other.wait()
    assert statuses == [2, 2] and err.count("error:") == 1, err
    assert re.search(
        r"error: process 1 \(node1\): logging.folder=.*/b: another process is training", err
    ), err


def test_folder_that_one_machine_cannot_use_is_one_error(tmp_path, job):
    statuses, _, err = job(tmp_path / "a", "/dev/null/b").wait()
    assert statuses == [2, 2] and err.count("error:") == 1, err
    assert "error: process 1 (node1): logging.folder=/dev/null/b: cannot be used (Not a dir" in err
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize("full", [pytest.param(0, marks=pytest.mark.long), 1])
def test_full_disk_of_one_machine_is_a_warning(tmp_path, job, full):
    """The other machine has the checkpoints, and the best one that counts."""
    a, b = tmp_path / "a", tmp_path / "b"
    fails = f"""
if os.environ["RANK"] == "{full}":
    from rsb_ffcv.training import checkpoint
    plain = checkpoint.write
    def write(state, path):
        if path.name == "checkpoint_000000006.pt":
            raise checkpoint.InputError(f"{{path}}: cannot be written (No space left on device)")
        plain(state, path)
    checkpoint.write = write
"""
    statuses, _, err = job(a, b, prepare=fails).wait()
    assert statuses == [0, 0] and err.count("warning: ") == 1, err
    assert re.search(
        rf"warning: process {full} \(node{full}\): the checkpoint was not written: .*No space left",
        err,
    ), err
    steps = [[int(path.stem[-9:]) for path in sorted(at.glob("checkpoint_*"))] for at in (a, b)]
    assert steps[full] == [3, 9] and steps[1 - full] == [6, 9]
    assert filecmp.cmp(a / "checkpoint_000000009.pt", b / "checkpoint_000000009.pt", shallow=False)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_machine_that_cannot_store_what_it_is_sent_gets_the_state(tmp_path, job, whole, rank):
    """Machine a is empty, and cannot write files of other machines. It is process `rank`."""
    a, b = tmp_path / "a", tmp_path / "b"
    prepared(job, a, b)
    shutil.rmtree(a)
    fails = f"""
if os.environ["RANK"] == "{rank}":
    from rsb_ffcv.training import checkpoint
    plain = checkpoint.Store.put
    def put(self, name, content):
        if name.startswith("checkpoint"):
            raise checkpoint.InputError(f"{{name}}: cannot be written (No space left on device)")
        plain(self, name, content)
    checkpoint.Store.put = put
"""
    statuses, _, err = job(*((b, a) if rank else (a, b)), prepare=fails).wait()
    assert statuses == [0, 0], err
    assert (
        f"warning: process {rank} (node{rank}): checkpoint_000000003.pt: cannot be written (No "
        f"space left on device); the run continues without this copy\n" in err
    )
    assert_same_run(b if rank else a, whole)


ENDED_BACK = """
from rsb_ffcv.training.resume import Checkpointer
go_back = Checkpointer.go_back
def ended(self, request):
    go_back(self, request)
    self.copies.finish()
    os.kill(os.getpid(), 9)
Checkpointer.go_back = ended
"""


@pytest.fixture(scope="module")
def gone_back(betons, tmp_path_factory, train):
    """Folder of a run of two processes that goes back from step 20 to step 12."""
    folder = tmp_path_factory.mktemp("folders") / "gone_back"
    flags = options(betons, folder, **{**MORE, **GOING_BACK, "training.batch_size": 4})
    statuses, _, err = train(flags, 2, prepare=OVERFLOW).wait()
    assert statuses == [0, 0] and "going back to step 12" in err, err
    return folder


@pytest.mark.parametrize("last", [pytest.param(12, marks=pytest.mark.long), 20])
def test_machine_that_was_away_does_not_bring_back_later_steps(tmp_path, job, gone_back, last):
    """Machine a is lost after step `last`. Machine b continues, goes back from step 20 to step 12,
    and is lost. Then a has a checkpoint of a later step, or another one of the same step."""
    a, b = tmp_path / "a", tmp_path / "b"
    more = {**GOING_BACK, "training.batch_size": 4}
    killed(job(a, b, prepare=OVERFLOW, stop_at=("epoch 2", last - 11), **more), last, a, b)
    _, _, err = job(b, b, prepare=OVERFLOW + ENDED_BACK, **more).wait()
    assert "going back to step 12" in err
    steps = [int(max(folder.glob("checkpoint_*")).stem[-9:]) for folder in (a, b)]
    assert steps == [last, 12]
    run = job(a, b, prepare=OVERFLOW, stop_at=("epoch 2", 1), **more)
    run.wait_for_stop()
    assert_copies(a, b)  # nothing is left of the later steps
    run.go_on()
    statuses, out, err = run.wait()
    assert statuses == [0, 0] and "the newest checkpoint is that of process 1 (node1)" in out, err
    assert f"resuming {a} after step 12 of 24" in out and "going back" not in err
    assert_same_run(a, gone_back)
    assert_copies(a, b)


@pytest.mark.long
def test_files_that_only_the_first_machine_has_are_sent(tmp_path, job, whole):
    """checkpoint.warm_start, checkpoint.branch and the run of training.eval_only. Each process has
    a working directory of its own."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    shutil.copy(whole / "final_weights.pt", tmp_path / "0" / "weights.pt")
    shutil.copytree(whole, tmp_path / "0" / "run")
    moved = f"os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])"
    a, b = tmp_path / "a", tmp_path / "b"
    for given, line in (
        ({"checkpoint.warm_start": "weights.pt"}, "starting from the weights of weights.pt: "),
        ({"checkpoint.branch": "run", "training.epochs": 4}, "branch of run/checkpoint_000000009"),
    ):
        statuses, out, err = job(a, b, prepare=moved, **given).wait()
        assert statuses == [0, 0] and line in out, err
        assert_copies(a, b)
        shutil.rmtree(a), shutil.rmtree(b)
    shutil.copytree(whole, tmp_path / "1" / "other")
    shutil.copytree(whole, tmp_path / "0" / "both")
    saved = state(whole)
    saved["model"] = {name: torch.zeros_like(value) for name, value in saved["model"].items()}
    (tmp_path / "1" / "both").mkdir()
    checkpoint.write(saved, tmp_path / "1" / "both" / "checkpoint_000000009.pt")
    last = rows(whole)[-1]
    for folder in ("run", "other", "both"):
        before = sorted(tmp_path.glob("?/*/*"))
        statuses, out, err = job(folder, folder, prepare=moved, **{"training.eval_only": 1}).wait()
        result = json.loads(out.splitlines()[-1])
        assert statuses == [0, 0] and result["step"] == 9, err
        assert result["val_loss"] == pytest.approx(last["val_loss"], rel=1e-5), folder
        assert sorted(tmp_path.glob("?/*/*")) == before
