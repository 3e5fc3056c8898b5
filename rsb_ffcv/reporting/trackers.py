"""Experiment trackers, which get the figures of a run in addition to `metrics.jsonl`.

Each tracker works in its own thread, so that a network that does not respond cannot delay a step,
and its errors are warnings. Trackers get numbers and the options of the run, nothing of the
environment: neither console output nor code.

There are two axes: the epoch, counted from 1, and the number of steps done. A run that is resumed,
or goes back, sends the values after that point again. A tracker shows the newer values, in
TensorBoard instead of the earlier ones.
"""

import importlib
import io
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol

from rsb_ffcv import InputError, first_line
from rsb_ffcv.atomic import append, atomic_file, make_folder
from rsb_ffcv.reporting.log import FIX

RUN_ID = "run_id"  # file with the run's name in trackers that need a unique one
EVENTS = "tensorboard/*/events.*"  # pattern of TensorBoard's files in the run's folder
CLOSE_SECONDS = 20.0  # for the values that are not sent when the run ends
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """The description of a run that trackers get.

    folder: of the run. Trackers keep local files there.
    id: unique, and the same after a restart.
    project: name of a group of runs.
    name: of the run.
    options: {section: {option: value}}.
    epoch: number of epochs done.
    step: number of steps done.
    """

    folder: Path
    id: str
    project: str
    name: str
    options: Mapping[str, Mapping[str, object]]
    epoch: int
    step: int


class Tracker(Protocol):
    """A tracker, opened for one process's part of a run. Every method may raise any exception."""

    def log(self, axis: str, number: int, values: dict[str, float]) -> None:
        """axis: "epoch" or "step". number: the position on it."""

    def rewind(self, epoch: int, step: int) -> None:
        """Values after these positions will be sent again."""

    def close(self, finished: bool) -> None:
        """Ends this part. finished: the run has reached its end."""


class TensorBoard:
    """Event files in tensorboard/ of the run's folder, for each axis in a folder of its own: with
    a purge step, TensorBoard ignores the earlier events of a folder from that position on.

    torch's SummaryWriter is not used: its thread opens files at times that nothing else knows, and
    would also write to the folder after another process has taken over the run.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._folder = run.folder / "tensorboard"
        self._open(run.epoch, run.step)

    def _open(self, epoch: int, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # TensorBoard reads the files of a folder in the order of their names
        name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._paths = {axis: self._folder / axis / name for axis in ("epoch", "step")}
        for axis, done in (("epoch", epoch), ("step", step)):
            make_folder(self._folder / axis)
            start = SessionLog(status=SessionLog.START)
            self._write(axis, Event(step=done + 1, file_version="brain.Event:2"))
            self._write(axis, Event(step=done + 1, session_log=start))

    def _write(self, axis: str, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        append(self._paths[axis], record.getvalue())

    def log(self, axis: str, number: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._write(axis, Event(step=number, summary=scalar(name, value)))

    def rewind(self, epoch: int, step: int) -> None:
        self._open(epoch, step)

    def close(self, finished: bool) -> None:
        pass


class WandB:
    """Weights & Biases. WANDB_MODE=offline keeps everything in wandb/ of the run's folder."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        offline = wandb.setup().settings.mode in ("offline", "dryrun")
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            # Offline, each part is a folder of the same run, which `wandb sync` joins.
            resume=None if offline else "allow",
            dir=str(run.folder),
            config={section: dict(values) for section, values in run.options.items()},
            settings=wandb.Settings(
                console="off", save_code=False, disable_code=True, disable_git=True, silent=True
            ),
        )
        for axis in ("epoch", "step"):
            self._run.define_metric(f"{axis}/*", step_metric=axis)

    def log(self, axis: str, number: int, values: dict[str, float]) -> None:
        self._run.log({axis: number, **{f"{axis}/{name}": x for name, x in values.items()}})

    def rewind(self, epoch: int, step: int) -> None:
        pass

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """MLflow at MLFLOW_TRACKING_URI, or else in mlflow.db of the run's folder."""

    def __init__(self, run: TrackedRun) -> None:
        # It reports its use to its authors otherwise.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        folder = run.folder.resolve()
        self._client = client = MlflowClient(uri or f"sqlite:///{folder}/mlflow.db")
        found = client.get_experiment_by_name(run.project)
        experiment = (
            found.experiment_id
            if found
            else client.create_experiment(
                run.project, artifact_location=None if uri else (folder / "mlflow").as_uri()
            )
        )
        own = client.search_runs([experiment], f"tags.rsb_ffcv_id = '{run.id}'")
        if own:
            self._id = own[0].info.run_id
            client.update_run(self._id, status="RUNNING")
            return
        self._id = client.create_run(experiment, run_name=run.name).info.run_id
        client.log_batch(
            self._id,
            params=[
                Param(f"{section}.{name}", str(value))
                for section, values in run.options.items()
                for name, value in values.items()
            ],
            tags=[RunTag("rsb_ffcv_id", run.id)],
        )

    def log(self, axis: str, number: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id,
            metrics=[
                self._metric(f"{axis}/{name}", value, now, number) for name, value in values.items()
            ],
        )

    def rewind(self, epoch: int, step: int) -> None:
        pass

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


CLASSES: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def check(names: Iterable[str]) -> None:
    """Imports the packages of the trackers. Raises InputError for one that is not installed, or
    that needs a login."""
    for name in names:
        try:
            module = importlib.import_module(MODULES[name])
        except ImportError as error:
            raise InputError(
                f"logging.trackers={name}: cannot be imported ({first_line(error)}); "
                f"pip install {name}, or leave {name} out"
            ) from error
        if name == "wandb":
            offline = module.setup().settings.mode in ("offline", "dryrun", "disabled")
            # In a terminal, wandb.init would ask for a key and wait.
            if not offline and not module.login(prompt=False, verify=False):
                raise InputError(
                    "logging.trackers=wandb: not logged in; run `wandb login`, set WANDB_API_KEY, "
                    "or set WANDB_MODE=offline"
                )


def run_id(folder: Path) -> str:
    """The unique name of the run in `folder`, from its file `run_id`, which is written first if
    there is none. Raises InputError as atomic_file does."""
    path = folder / RUN_ID
    if not path.exists():
        with atomic_file(path, FIX) as file:
            file.write(f"{uuid.uuid4().hex}\n".encode())
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); remove it") from error


class Trackers:
    """The trackers of a run. Use it as a context manager: it ends them.

    trackers: name -> class.
    run: its description.
    warn: called with at most one warning per tracker.
    """

    def __init__(
        self,
        trackers: Mapping[str, Callable[[TrackedRun], Tracker]],
        run: TrackedRun,
        *,
        warn: Callable[[str], None],
    ) -> None:
        self._warn, self._finished = warn, False
        self._queues: dict[str, SimpleQueue[Any]] = {name: SimpleQueue() for name in trackers}
        self._threads = {
            name: threading.Thread(
                target=self._work, args=(name, opened, run), name=name, daemon=True
            )
            for name, opened in trackers.items()
        }
        for thread in self._threads.values():
            thread.start()

    def log(self, axis: str, number: int, values: Mapping[str, object]) -> None:
        """Sends the numbers among `values`. axis: "epoch" or "step". number: the position on
        it."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and name != axis
        }
        self._send("log", axis, number, numbers)

    def rewind(self, epoch: int, step: int) -> None:
        """Call after the run has gone back to these positions."""
        self._send("rewind", epoch, step)

    def finished(self) -> None:
        """Call when the run has reached its end."""
        self._finished = True

    def _send(self, *call: object) -> None:
        for queue in self._queues.values():
            queue.put(call)

    def _work(self, name: str, opened: Callable[[TrackedRun], Tracker], run: TrackedRun) -> None:
        failed = False

        def attempt(function: Callable[..., Any], *arguments: object) -> Any:
            nonlocal failed
            try:
                return function(*arguments)
            # A tracker raises nearly any exception. None of them is worth the run.
            except Exception as error:
                if not failed:
                    failed = True
                    self._warn(
                        f"logging.trackers: {name} failed ({first_line(error)}); the run "
                        f"continues, and metrics.jsonl is complete"
                    )

        tracker = attempt(opened, run)
        while tracker is not None:
            method, *arguments = self._queues[name].get()
            attempt(getattr(tracker, method), *arguments)
            if method == "close":
                return

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._send("close", self._finished)
        until = time.monotonic() + CLOSE_SECONDS
        for name, thread in self._threads.items():
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                self._warn(
                    f"logging.trackers: {name} does not respond; what it has not got after "
                    f"{CLOSE_SECONDS:g} s is missing there, and metrics.jsonl is complete"
                )
