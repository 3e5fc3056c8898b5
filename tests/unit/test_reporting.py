"""What a run shows while it runs: console and training.log, the line of an epoch, the figure, and
experiment trackers."""

import os
import pty
import random
import subprocess
import sys
import termios
import threading
import types

import numpy as np
import pytest
from PIL import Image

from rsb_ffcv import InputError, warn, warning_listeners
from rsb_ffcv.reporting import console, curves, trackers
from rsb_ffcv.reporting.console import Console, epoch_line

ROW = {
    "epoch": 11,
    "loss": "bce",
    "train_loss": 0.0045678,
    "train_top1": 41.23,
    "lr": 0.00498,
    "images_per_s": 2431.4,
    "images_per_s_with_val": 2210.2,
    "seconds": 100.0,
    "val_seconds": 10.0,
    "eta_s": 148000.0,
    "data_wait_s": 0.4,
    "peak_memory_mb": 9523.0,
    "top1": 55.62,
    "val_loss": 2.0,
}
BEST = {"top1": 56.04, "epoch": 9, "step": 100}


def test_line_of_an_epoch_shows_its_figures_and_fits_a_terminal():
    row = ROW | {"ema_top1": 52.84, "swa_top1": 50.0}
    line = epoch_line(row, 300, BEST)
    assert line == (
        "epoch 12/300: loss 0.00457, top-1 train 41.2 val 55.6 EMA 52.8 SWA 50.0 gap -14.4 "
        "best 56.0 (10), lr 0.00498, 2431 img/s (2210 with val), wait 0.4 %, 9.3 GiB, "
        "41 h 6 min left"
    )
    assert len(line.replace("SWA 50.0 ", "")) <= 165  # SWA's result is in the last line only
    without = {"epoch": 0, "train_loss": None, "seconds": 1.0, "lr": 0.1, "images_per_s": 0.0}
    without |= {"data_wait_s": 0.0, "peak_memory_mb": 512.0, "eta_s": 0.0}
    assert epoch_line(without, 1, {"top1": -1.0, "epoch": -1}) == (
        "epoch 1/1: lr 0.1, 0 img/s, wait 0.0 %, 0.5 GiB"
    )


def test_line_of_an_epoch_names_a_slow_process():
    def end(ms, percent):
        found = {"process": 3, "host": "node2", "own_step_ms": ms, "percent_above_median": percent}
        return epoch_line(ROW | {"slowest": found}, 300, BEST).partition(" left")[2]

    assert end(112.4, 9.2) == "; slowest: process 3 (node2), 112 ms a step, 9 % above the median"
    assert end(1234.5, 5.0).startswith("; slowest: process 3 (node2), 1234 ms a step, 5 % ")
    assert end(3.456, 50.0).startswith("; slowest: process 3 (node2), 3.5 ms a step, 50 % ")
    assert end(112.4, 4.9) == ""


def without_times(path):
    return [line.split(" ", 2)[2] for line in path.read_text().splitlines()]


def test_log_has_what_the_console_prints_and_the_error_at_the_end(tmp_path, capsys):
    (tmp_path / "training.log").write_text("2026-01-01 00:00:00 an earlier part\n")
    with pytest.raises(InputError), Console(True) as shown:
        shown.info("before the folder is known")
        shown.log_to(tmp_path)
        shown.info("two\nlines")
        shown.warn("by the console")
        warn("by any part")
        raise InputError("option=1: wrong; use 2")
    assert not warning_listeners
    assert without_times(tmp_path / "training.log") == [
        "an earlier part",
        "before the folder is known",
        "two",
        "lines",
        "warning: by the console",
        "warning: by any part",
        "error: option=1: wrong; use 2",
    ]
    out, err = capsys.readouterr()
    assert out == "before the folder is known\ntwo\nlines\n" and err.count("warning: by") == 2


def test_only_one_process_of_a_job_prints_and_logs(tmp_path, capsys):
    with Console(False) as shown:
        shown.log_to(tmp_path)
        for say in (shown.info, shown.warn, shown.progress):
            say("text")
        shown.bar("epoch 1", 3).update()
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_unwritable_log_is_one_warning_and_the_lines_are_written_later(tmp_path, capsys):
    folder = tmp_path / "gone"
    with Console(True) as shown:
        shown.log_to(folder)
        for text in ("first", "second"):
            shown.info(text)
        err = capsys.readouterr().err
        assert err.count("warning") == 1 and "training.log: cannot be written (No such file" in err
        folder.mkdir()
        shown.info("third")
    assert [line for line in without_times(folder / "training.log") if "warning" not in line] == [
        "first",
        "second",
        "third",
    ]


def test_without_a_terminal_a_line_a_minute_shows_the_progress(tmp_path, capsys, monkeypatch):
    now = 1000.0
    clock = types.SimpleNamespace(monotonic=lambda: now, strftime=lambda _: "day time")
    monkeypatch.setattr(console, "time", clock)
    with Console(True) as shown:
        shown.log_to(tmp_path)
        with shown.bar("epoch 3", 100, 10) as bar:
            for _ in range(9):
                now += 13
                bar.update()
                bar.set_postfix({"loss": "0.5"})
        assert capsys.readouterr().err == (
            "epoch 3: 15/100 (15 %), loss=0.5, about 18 min 25 s left\n"
        )
        shown.info("a line")  # after it, a minute passes again
        with shown.bar("validation", 3) as bar:
            now += 59
            bar.update()
            assert not capsys.readouterr().err
            now += 1
            bar.update(2)
        assert capsys.readouterr().err == "validation: 3/3 (100 %), about less than 1 s left\n"
    assert "validation: 3/3" in (tmp_path / "training.log").read_text()


def test_a_terminal_has_a_bar_that_lines_do_not_break(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "has_terminal", lambda: True)
    with Console(True) as shown, shown.bar("epoch 1", 4) as bar:
        shown.log_to(tmp_path)
        bar.update()
        bar.set_postfix({"loss": "0.5"})
        shown.warn("a warning")
    err = capsys.readouterr().err
    assert "\r" in err and "loss=0.5" in err
    assert "\rwarning: a warning\n" in err  # the bar was cleared before it
    assert without_times(tmp_path / "training.log") == ["warning: a warning"]


@pytest.mark.parametrize("rows, bar", [(24, True), (0, False)])
def test_bar_needs_a_terminal_of_known_size(rows, bar):
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (rows, 80))
    code = "from rsb_ffcv.reporting.console import has_terminal; print(has_terminal())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=its)
    for descriptor in (ours, its):
        os.close(descriptor)
    assert done.stdout.decode().strip() == str(bar)


# ---------------------------------------------------------------- the figure


def course(epochs, **more):
    """Rows of a run. more: key -> function of the epoch."""
    return [
        ROW | {"epoch": epoch, "resolution": 224, **{key: f(epoch) for key, f in more.items()}}
        for epoch in range(epochs)
    ]


def test_each_loss_has_its_own_panel():
    rows = [
        {"epoch": 0, "loss": "bce", "train_loss": 0.7, "lr": 0.1},
        {"epoch": 1, "loss": "bce", "train_loss": 0.5, "lr": 0.2, "top1": 20.0, "val_loss": 2.0},
        {
            "epoch": 2,
            "loss": "ce",
            "train_loss": 1.5,
            "lr": 0.0,
            "top1": 30.0,
            "val_loss": 1.0,
            "ema_top1": 40.0,
            "ema_val_loss": 0.5,
            "train_top1": 3.0,
            "images_per_s": 7.0,
        },
    ]
    found = [
        (title, unit, [line[:2] for line in lines])
        for title, unit, lines in curves.panels(rows, {3: 50.0, 1: 10.0})
    ]
    assert found == [
        (
            "top-1",
            "%",
            [
                ("expected", [(1, 10.0), (3, 50.0)]),
                ("training", [(3, 3.0)]),
                ("raw", [(2, 20.0), (3, 30.0)]),
                ("EMA", [(3, 40.0)]),
            ],
        ),
        ("training loss", "binary cross-entropy", [("", [(1, 0.7), (2, 0.5)])]),
        ("training loss", "cross-entropy", [("", [(3, 1.5)])]),
        (
            "validation loss",
            "cross-entropy",
            [("raw", [(2, 2.0), (3, 1.0)]), ("EMA", [(3, 0.5)])],
        ),
        ("learning rate at the end of the epoch", "", [("", [(1, 0.1), (2, 0.2), (3, 0.0)])]),
        ("throughput", "images/s", [("training", [(3, 7.0)])]),
    ]


def test_figure_shows_every_curve_in_its_colour(tmp_path):
    rows = course(9, top1=lambda e: 5.0 * e, ema_top1=lambda e: 6.0 * e, swa_top1=lambda e: 3.0 * e)
    curves.draw_curves(rows, tmp_path / "curves.png", {5: 40.0})
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).reshape(-1, 3)
    for colour in (curves.BLACK, curves.BLUE, curves.VERMILION, curves.GREEN, curves.GREY):
        wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        assert (pixels == wanted).all(1).sum() > 20, colour


@pytest.mark.parametrize("kind, epochs", [(None, 3), (SystemExit, 3), (ValueError, 1)])
def test_figure_of_an_ended_run_has_all_epochs(tmp_path, monkeypatch, kind, epochs):
    """Epochs shorter than a figure's share of the time are drawn together."""
    drawn: list[int] = []
    monkeypatch.setattr(curves, "draw_curves", lambda rows, *_: drawn.append(len(rows)))
    shown = curves.Curves(tmp_path / "curves.png", {}, warn=lambda text: drawn.append(-1))
    shown._next_at = 0.0
    shown.update([ROW])
    shown._thread.join()
    shown._next_at = float("inf")
    shown.update([ROW] * 2)
    shown.update([ROW] * 3)
    shown.__exit__(kind, None, None)
    assert drawn == [1, 3][: 1 + (epochs == 3)]


def test_figure_that_cannot_be_drawn_is_one_warning(tmp_path):
    messages: list[str] = []
    shown = curves.Curves(tmp_path / "absent" / "curves.png", {}, warn=messages.append)
    for _ in range(2):
        shown.update([ROW])
        shown.complete()
    assert len(messages) == 1 and "training_curves.png was not drawn: " in messages[0]


# ---------------------------------------------------------------- trackers


class Recorder:
    """A tracker that records its calls. fail: the methods that raise."""

    def __init__(self, run, fail=()):
        self.calls, self.fail = [("open", run.id)], fail
        if "open" in fail:
            raise OSError("no route to host")

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            if name in self.fail:
                raise ConnectionError("network is unreachable\nwith details")

        return call


def tracked(tmp_path, **more):
    about = {"id": "abc", "project": "p", "name": "n", "options": {"lr": {"lr": 0.5}}}
    return trackers.TrackedRun(folder=tmp_path, **{**about, "epoch": 0, "step": 0, **more})


def test_trackers_get_numbers_and_no_texts(tmp_path):
    made: list[Recorder] = []
    messages: list[str] = []

    def opened(run):
        made.append(Recorder(run))
        return made[-1]

    with trackers.Trackers(
        {"one": opened, "two": opened}, tracked(tmp_path), warn=messages.append
    ) as used:
        used.log("epoch", 3, {"epoch": 2, "top1": 50, "loss": "bce", "train_loss": None, "lr": 0.1})
        used.rewind(2, 20)
        used.finished()
    assert not messages and len(made) == 2
    for tracker in made:
        assert tracker.calls == [
            ("open", "abc"),
            ("log", "epoch", 3, {"top1": 50.0, "lr": 0.1}),
            ("rewind", 2, 20),
            ("close", True),
        ]


@pytest.mark.parametrize("fail", ["open", "log", "close"])
def test_failing_tracker_is_one_warning_and_the_other_gets_everything(tmp_path, fail):
    made: list[Recorder] = []
    messages: list[str] = []

    def good(run):
        made.append(Recorder(run))
        return made[-1]

    with trackers.Trackers(
        {"bad": lambda run: Recorder(run, fail), "good": good},
        tracked(tmp_path),
        warn=messages.append,
    ) as used:
        for number in range(3):
            used.log("step", number, {"loss": 1.0})
    assert len(messages) == 1 and messages[0].startswith("logging.trackers: bad failed (n")
    assert "details" not in messages[0] and len(made[0].calls) == 5


def test_silent_tracker_delays_neither_a_step_nor_the_end_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.05)
    answers, messages = threading.Event(), list[str]()

    def opened(run):
        answers.wait()
        return Recorder(run)

    with trackers.Trackers(
        {"silent": opened},
        tracked(tmp_path),
        warn=messages.append,
    ) as used:
        used.log("step", 1, {"loss": 1.0})
    answers.set()
    assert messages[0].startswith("logging.trackers: silent does not respond")


def test_run_keeps_its_name_in_trackers(tmp_path):
    first = trackers.run_id(tmp_path)
    assert len(first) == 32 and trackers.run_id(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == ["run_id"]
    (tmp_path / "run_id").write_bytes(b"\xff")
    with pytest.raises(InputError, match="run_id: cannot be read .*; remove it"):
        trackers.run_id(tmp_path)


def test_tracker_that_is_not_installed_is_an_error_before_the_run(
    betons, tmp_path, call_program, monkeypatch
):
    from tests.integration.runs import options

    monkeypatch.setitem(sys.modules, "mlflow", None)  # an import of it fails
    for value, message in (
        (
            "mlflow",
            "logging.trackers=mlflow: cannot be imported (import of mlflow halted; None in ",
        ),
        ("tensorbord", "logging.trackers='tensorbord': must be any of tensorboard, wandb, mlflow"),
    ):
        flags = options(betons, tmp_path / "run", **{"logging.trackers": value})
        status, _, err = call_program("train_imagenet.py", *flags)
        assert status == 2 and err.count("\n") == 1 and message in err, err
        assert not (tmp_path / "run").exists()


def test_wandb_without_a_login_is_an_error_and_offline_needs_none(monkeypatch):
    mode = "online"
    fake = types.SimpleNamespace(
        setup=lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode)),
        login=lambda prompt, verify: prompt or verify,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(InputError, match="not logged in; run `wandb login`, set WANDB_API_KEY, or"):
        trackers.check(["wandb"])
    mode = "offline"
    trackers.check(["wandb"])


def log_twice(tracker, tmp_path):
    """A run of 3 epochs that is killed, resumed after 2 of them, and goes back to 1."""
    part = tracker(tracked(tmp_path))
    for epoch in (1, 2, 3):
        part.log("step", 10 * epoch, {"train_loss": float(epoch)})
        part.log("epoch", epoch, {"top1": float(epoch)})
    part.close(False)
    part = tracker(tracked(tmp_path, epoch=1, step=20))
    part.log("epoch", 2, {"top1": 2.0})
    part.log("step", 30, {"train_loss": 33.0})
    part.rewind(1, 10)
    for epoch in (2, 3):
        part.log("step", 10 * epoch, {"train_loss": 100.0 + epoch})
        part.log("epoch", epoch, {"top1": 100.0 + epoch})
    part.close(True)


@pytest.mark.long
def test_resumed_run_is_no_duplicate_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_twice(trackers.TensorBoard, tmp_path)
    for axis, tag, wanted in (
        ("epoch", "top1", [(1, 1.0), (2, 102.0), (3, 103.0)]),
        ("step", "train_loss", [(10, 1.0), (20, 102.0), (30, 103.0)]),
    ):
        events = EventAccumulator(str(tmp_path / "tensorboard" / axis))
        events.Reload()
        assert [(e.step, e.value) for e in events.Scalars(tag)] == wanted


@pytest.mark.long
def test_resumed_run_is_the_same_run_in_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    log_twice(trackers.MLflow, tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params == {"lr.lr": "0.5"}
    assert run.data.metrics == {"epoch/top1": 103.0, "step/train_loss": 103.0}
    history = client.get_metric_history(run.info.run_id, "epoch/top1")
    assert {m.step: m.value for m in sorted(history, key=lambda m: m.timestamp)}[2] == 102.0
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db"}


@pytest.mark.long
def test_resumed_run_is_the_same_run_in_wandb_and_has_no_secrets(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "5" * 40)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_this_test")
    monkeypatch.chdir(tmp_path)
    log_twice(trackers.WandB, tmp_path)
    parts = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(parts) == 2 and all(path.name.endswith("-abc") for path in parts)
    assert {path.name for path in tmp_path.iterdir()} == {"wandb"}
    for path in (tmp_path / "wandb").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"hf_secret" not in content and b"5" * 40 not in content, path
    assert "wandb" not in "".join(capfd.readouterr())


# ---------------------------------------------------------------- health of the course


def messages_of(rows, curve=(), **policies):
    from rsb_ffcv.training.health import Health

    found: list[str] = []
    checks = Health(report=found.append, **policies)
    for end in range(1, len(rows) + 1):
        checks.check_course(rows[:end], dict(curve))
    return found


def noisy(seed, sigma, epochs=300):
    """Top-1 of a run of A2: it rises to 79 %, with noise that falls with the learning rate."""
    draw = random.Random(seed).gauss
    return [
        79.0 - 60.0 * 0.9**e - 12.0 * (1 - e / epochs) + draw(0, sigma * (1 - 0.8 * e / epochs))
        for e in range(epochs)
    ]


def test_noise_of_a_normal_run_is_not_a_fall():
    for seed in range(20):
        top1 = noisy(seed, 1.0)
        rows = course(300, top1=top1.__getitem__, train_loss=lambda e: 0.01 - e / 1e5)
        assert not messages_of(rows), seed


def test_falling_top1_is_reported_once_for_each_set_of_weights():
    rising = [40.0 + e for e in range(20)]
    falling = [59.0 - 0.7 * e for e in range(20)]
    both = rising + falling
    down = {"train_loss": lambda e: 0.01 - e / 1e5}
    (message,) = messages_of(course(40, top1=both.__getitem__, **down))
    assert "the top-1 of the raw weights is 3." in message and "training loss falls" in message
    first = int(message.split()[2])
    assert 24 < first <= 29
    ema = {"top1": lambda e: 40.0 + e, "ema_top1": both.__getitem__}
    (message,) = messages_of(course(40, **ema, **down))
    assert "the top-1 of the EMA weights is 3." in message
    again = both + rising + falling
    assert len(messages_of(course(80, top1=again.__getitem__, **down))) == 2
    assert not messages_of(course(40, top1=both.__getitem__, train_loss=lambda e: 0.01 + e / 1e5))
    assert not messages_of(course(40, top1=both.__getitem__, **down), falling="off")
    assert not messages_of(course(40, top1=both.__getitem__, **down), fall=20.0)


def test_fall_is_not_measured_across_a_change_of_the_loss():
    rows = course(30, top1=lambda e: 70.0 if e < 20 else 60.0, train_loss=lambda e: 1.0 - e / 100)
    assert messages_of(rows)
    for row in rows[20:]:
        row["loss"] = "ce"
    assert not messages_of(rows)


def test_swa_below_the_raw_weights_is_reported():
    rows = course(10, top1=lambda e: 60.0 + e)
    rows[-1]["swa_top1"] = 64.2
    assert not messages_of(rows)
    rows[-1]["swa_top1"] = 63.0
    (message,) = messages_of(rows)
    assert "the top-1 of the SWA weights is 4.0 percentage points below" in message
    assert not messages_of(rows[-4:])  # too few epochs to know


def test_swa_that_falls_in_its_tail_is_reported():
    """As in a run that had 75.74 % after the first epoch of its tail, and 70.74 % after the 6th."""
    rows = course(15, top1=lambda e: min(73.0, 60.0 + 2 * e))
    for row, top1 in zip(rows[9:], (75.74, 75.0, 74.1, 73.2, 71.9, 70.74)):
        row["swa_top1"] = top1
    (message,) = messages_of(rows)
    assert message.startswith(
        "after epoch 14 the top-1 of the SWA weights is 3.8 percentage points below its own"
    )


def test_top1_below_the_expected_curve_is_reported_at_its_epochs():
    rows = course(12, top1=lambda e: 20.0, ema_top1=lambda e: 21.0)
    curve = {5: 24.1, 10: 23.9, 30: 55.0}
    (message,) = messages_of(rows, curve.items())
    assert "after epoch 5 top-1 is 21.0 %, and the recipe states 24.1 %" in message
    assert not messages_of(rows, curve.items(), expected="off")
    assert not messages_of(rows, curve.items(), behind=4.0)


def test_expected_curve_is_parsed_or_refused(betons, tmp_path):
    from rsb_ffcv.config.train import expected_curve, read_config
    from tests.integration.runs import options

    def curve(text):
        return expected_curve(
            read_config("", options(betons, tmp_path, **{"logging.expected": text}))
        )

    assert curve("5=25, 300=79.8") == {5: 25.0, 300: 79.8} and curve("") == {}
    for text in ("5:25", "5=", "0=10", "5=101", "5=nan", "x=3"):
        with pytest.raises(InputError, match=f"logging.expected='{text}': must be epoch=top-1"):
            curve(text)
