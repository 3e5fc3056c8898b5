"""Health policies, checkpoints, batch-norm statistics, label sets and file checks, each alone."""

import json
import os
import re
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import distributed as dist
from torch import nn

from rsb_ffcv import InputError
from rsb_ffcv.config.train import read_config
from rsb_ffcv.loading import TrainLoader
from rsb_ffcv.ops import native
from rsb_ffcv.training import build, checkpoint, compute, data, join, processes
from rsb_ffcv.training.evaluate import read_label_sets
from rsb_ffcv.training.health import BEFORE, RECENT, GoBack, Health, Stop
from rsb_ffcv.training.progress import slowest
from rsb_ffcv.training.step import OwnTime, RunningStatistics

STEPS = list(range(40, 44))


def health(**policies):
    messages: list[str] = []
    return Health(report=messages.append, **policies), messages


def test_non_finite_loss_is_reported_with_its_step():
    losses = [1.0, float("nan"), float("inf"), 1.0]
    checks, messages = health(non_finite="warn")
    checks.check_losses(STEPS, losses)
    assert messages == ["the loss of step 41 is nan"]
    with pytest.raises(Stop, match="step 41 is nan; lower lr.lr"):
        health()[0].check_losses(STEPS, losses)
    with pytest.raises(GoBack) as request:
        health(non_finite="act")[0].check_losses(STEPS, losses)
    assert request.value.skip == (40, 41) and request.value.factor == 1
    health(non_finite="off")[0].check_losses(STEPS, losses)


def feed(checks, level, readings=RECENT):
    for _ in range(readings):
        checks.check_losses(STEPS, [level] * 4)


def test_loss_rise_above_its_limit_is_reported_once():
    checks, messages = health()
    feed(checks, 2.0, RECENT + BEFORE)
    feed(checks, 2.19)
    assert not messages
    feed(checks, 2.3)
    assert len(messages) == 1 and "above its recent median, 2" in messages[0]
    checks.reset_history()
    feed(checks, 2.0, RECENT + BEFORE)
    feed(checks, 2.3)
    assert len(messages) == 2
    acting, _ = health(loss_rise="act")
    feed(acting, 2.0, RECENT + BEFORE)
    with pytest.raises(GoBack) as request:
        feed(acting, 2.3)
    assert request.value.factor == 0.5
    silent, messages = health(loss_rise="off")
    feed(silent, 2.0, RECENT + BEFORE)
    feed(silent, 9.0)
    assert not messages


def test_single_outlier_is_not_a_loss_rise():
    checks, messages = health()
    feed(checks, 2.0, RECENT + BEFORE)
    feed(checks, 50.0, 1)
    feed(checks, 2.0)
    assert not messages


@pytest.mark.parametrize(
    "classes, top1, reported",
    [
        (1000, 0.1, True),
        (1000, 0.2, False),
        (10, 11.0, True),
        (10, 20.0, False),
        (2, 51.0, True),
        (2, 60.0, False),
    ],
)
def test_top1_at_chance_is_reported_at_its_epoch(classes, top1, reported):
    checks, messages = health()
    for epoch in range(8):
        checks.check_accuracy(epoch, {"top1": top1}, classes=classes)
    assert len(messages) == reported and (
        not reported or "after epoch 5" in messages[0] and "learning rate" in messages[0]
    )
    if reported:
        with pytest.raises(Stop, match="health.chance=warn"):
            health(chance="act")[0].check_accuracy(4, {"top1": top1}, classes=classes)
        health(chance="off")[0].check_accuracy(4, {"top1": top1}, classes=classes)


def test_average_far_below_the_model_is_reported():
    row = {"top1": 60.0, "ema_top1": 0.1}
    checks, messages = health()
    assert (
        not checks.check_accuracy(20, row, classes=1000)
        and "59.9 percentage points below" in messages[0]
    )
    assert health(average="act")[0].check_accuracy(20, row, classes=1000)
    assert not health(average="off")[0].check_accuracy(20, row, classes=1000)
    assert not health(average="act")[0].check_accuracy(
        20, {"top1": 60.0, "ema_top1": 55.0}, classes=1000
    )
    assert not health(average="act")[0].check_accuracy(20, {"top1": 60.0}, classes=1000)


def test_average_with_a_share_of_initial_weights_is_not_checked():
    row = {"top1": 60.0, "ema_top1": 0.1}
    checks, messages = health(average="act")
    assert not checks.check_accuracy(20, row, classes=1000, initial_share=0.011) and not messages
    assert checks.check_accuracy(20, row, classes=1000, initial_share=0.009)
    assert "use ema.warmup=1 or a lower ema.decay" in messages[0]
    assert checks.check_accuracy(20, row, classes=1000, initial_share=0.0, ema_warmup=True)
    assert "; use a lower ema.decay" in messages[1] and "warmup" not in messages[1]


def test_health_state_is_saved_and_restored():
    checks, _ = health(non_finite="act")
    feed(checks, 2.0, 3)
    checks.skipped_steps.append(7)
    checks.lr_factor, checks.returns = 0.25, 2
    other, _ = health()
    other.load_state_dict(json.loads(json.dumps(checks.state_dict())))
    assert other.state_dict() == checks.state_dict()
    other.history.append(1.0)
    assert len(checks.history) == 3


def state(step, size=1000):
    torch.manual_seed(step)
    return {
        **dict.fromkeys(checkpoint.KEYS),
        "step": step,
        "model": {"w": torch.randn(size)},
        "rows": [],
    }


def test_store_keeps_the_newest_and_the_best(tmp_path):
    store = checkpoint.Store(tmp_path, keep=2)
    store.lock()
    for step in (3, 6, 9, 12):
        store.save(state(step), best=step == 6)
    assert store.finish()
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "best.pt",
        "checkpoint_000000009.pt",
        "checkpoint_000000012.pt",
    ]
    path, found = store.newest()
    assert path.name == "checkpoint_000000012.pt" and torch.equal(
        found["model"]["w"], state(12)["model"]["w"]
    )
    assert checkpoint.read(tmp_path / "best.pt")["step"] == 6
    store.close()


@pytest.mark.parametrize("links", [True, False])
def test_best_checkpoint_is_flushed_to_disk(tmp_path, monkeypatch, links):
    path, plain, flushed = tmp_path / "checkpoint_000000001.pt", os.fsync, []
    checkpoint.write(state(1), path)

    def refuse(*_):
        raise OSError(1, "no hard links here")

    def record(descriptor):
        flushed.append(os.fstat(descriptor).st_ino)
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    checkpoint.Store(tmp_path, 1).mark_best(path)
    best = tmp_path / "best.pt"
    assert best.samefile(path) is links and best.read_bytes() == path.read_bytes()
    assert flushed == [best.stat().st_ino] * (not links) + [tmp_path.stat().st_ino]


def test_save_takes_a_snapshot(tmp_path):
    store, live = checkpoint.Store(tmp_path, 1), state(1, 3_000_000)
    store.lock()
    before = live["model"]["w"].clone()
    store.save(live, False)
    live["model"]["w"].zero_()
    store.finish()
    assert torch.equal(store.newest()[1]["model"]["w"], before)
    store.close()


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    store = checkpoint.Store(tmp_path, 2)
    store.lock()
    store.save(state(1), False)
    store.save(state(2), False)
    store.finish()
    newest = tmp_path / "checkpoint_000000002.pt"
    whole = newest.read_bytes()
    weights = whole.index(state(2)["model"]["w"].numpy().tobytes())
    rng = torch.Generator().manual_seed(0)
    places = [
        weights,
        weights + 1234,
        weights + 3999,
        *torch.randint(0, len(whole), (150,), generator=rng).tolist(),
    ]
    damages = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in places]
    damages += [whole[:length] for length in (0, 1, 100, len(whole) // 2, len(whole) - 1)] + [
        bytes(len(whole))
    ]
    fallen = 0
    for content in damages:
        newest.write_bytes(content)
        path, found = store.newest()
        err = capsys.readouterr().err
        if path == newest:  # a bit of padding or of a date, which is not read
            assert (
                torch.equal(found["model"]["w"], state(2)["model"]["w"])
                and found["step"] == 2
                and not err
            )
        else:
            fallen += 1
            assert found["step"] == 1 and re.search(
                "warning: .*000000002.pt: .*; falling back to the checkpoint before it", err
            ), err
    assert fallen > 60
    (tmp_path / "checkpoint_000000001.pt").write_bytes(b"")
    with pytest.raises(InputError, match="none of its 1 checkpoints can be read"):
        store.newest()
    store.close()


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    store = checkpoint.Store(tmp_path, 1)
    store.lock()
    store.save(state(6), False)
    store.finish()
    newest = tmp_path / "checkpoint_000000009.pt"
    newest.write_bytes(b"damaged")
    assert (
        store.newest()[1]["step"] == 6
        and not newest.exists()
        and newest.with_suffix(".damaged").exists()
    )
    newest.write_bytes(b"not looked at yet")
    store.save(state(7), False)
    assert store.finish() and (tmp_path / "checkpoint_000000007.pt").exists()
    store.close()


def test_damaged_checkpoint_that_cannot_be_renamed_is_a_warning(tmp_path, capsys):
    store = checkpoint.Store(tmp_path, 1)
    store.lock()
    store.save(state(6), False)
    store.finish()
    newest = tmp_path / "checkpoint_000000009.pt"
    newest.write_bytes(b"damaged")
    (newest.with_suffix(".damaged") / "a").mkdir(parents=True)
    assert store.newest()[1]["step"] == 6
    assert f"{newest}: cannot be renamed to .damaged (" in capsys.readouterr().err
    store.close()


def test_newest_regular_checkpoint_is_kept_for_going_back(tmp_path):
    store = checkpoint.Store(tmp_path, 2, regular=lambda step: step % 10 == 0)
    store.lock()
    for step in (10, 20, 21, 22, 23):
        store.save(state(step), False)
    assert store.finish() and [path.name[-6:-3] for path in sorted(tmp_path.glob("c*.pt"))] == [
        "020",
        "022",
        "023",
    ]
    assert store.newest()[1]["step"] == 23 and store.newest(regular=True)[1]["step"] == 20
    store.close()


def test_folder_is_locked_by_one_run(tmp_path):
    first, second = checkpoint.Store(tmp_path, 1), checkpoint.Store(tmp_path, 1)
    (tmp_path / ".checkpoint_000000001.pt.part").write_bytes(b"half")
    first.lock()
    assert not list(tmp_path.glob(".*.part"))
    with pytest.raises(InputError, match="another process is training in this folder"):
        second.lock()
    first.close()
    second.lock()
    second.close()


def test_run_removes_only_its_own_unfinished_files(tmp_path):
    """A conversion or an export may be unfinished in the same folder."""
    own = ["checkpoint_000000001.pt", "best.pt", "metrics.jsonl", "final_weights_ema.pt"]
    for name in (*own, "config.json", "training_curves.png", "train.beton"):
        (tmp_path / f".{name}.part").write_bytes(b"half")
    (tmp_path / ".exported.part").mkdir()
    store = checkpoint.Store(tmp_path, 1)
    store.lock()
    store.close()
    assert {path.name for path in tmp_path.glob(".*.part")} == {
        ".train.beton.part",
        ".exported.part",
    }


def test_unwritable_checkpoint_is_a_warning_and_keeps_the_others(tmp_path, capsys, monkeypatch):
    store = checkpoint.Store(tmp_path, 1)
    store.lock()
    store.save(state(1), True)
    store.finish()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store.save(state(2), True)
    assert not store.finish()
    assert (
        "the checkpoint was not written" in (err := capsys.readouterr().err)
        and "No space left" in err
    )
    monkeypatch.undo()
    assert store.newest()[1]["step"] == 1 and checkpoint.read(tmp_path / "best.pt")["step"] == 1
    store.save(state(3), False)
    assert store.finish() and store.newest()[1]["step"] == 3
    store.close()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_batch_norm_moves_once_per_step_by_the_mean_of_its_groups(groups):
    torch.manual_seed(0)
    batches = torch.randn(3, 4, 6, 5) * torch.arange(1, 5)[None, :, None, None] + 2
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).train()
    statistics, norm = RunningStatistics(model, groups, groups), model[1]
    mean, var = torch.zeros(5), torch.ones(5)
    for step in batches:
        seen = []
        for number, group in enumerate(step[:groups]):
            statistics.begin_group(number)
            seen.append(model[0](group).detach())
            model(group)
        statistics.end_step()
        mean = 0.9 * mean + 0.1 * torch.stack([batch.mean(0) for batch in seen]).mean(0)
        var = 0.9 * var + 0.1 * torch.stack([batch.var(0) for batch in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    assert norm.num_batches_tracked == 3


def test_own_time_on_a_device_is_that_of_its_events(monkeypatch):
    """The third moment comes 60 ms after the second: this time does not count."""
    times = iter((0.0, 30.0, 90.0, 95.0, 100.0, 140.0, 200.0, 206.0, 300.0))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.ms = next(times)

        def elapsed_time(self, end):
            return end.ms - self.ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    own = OwnTime(torch.device("cuda"))
    layer = nn.Linear(2, 1)
    for _ in range(2):
        own.begin_step()
        logits = layer(torch.ones(1, 2))
        own.mark_gradients(logits)
        assert len(own._steps[-1]) == 1
        logits.sum().backward()
        assert len(own._steps[-1]) == 2
        own.mark()
        own.mark()
    assert own.read() == [35.0, 46.0] and own.read() == []
    own.begin_step()
    own.begin_epoch()
    assert own.read() == []


def test_process_with_more_groups_is_not_slower_for_that():
    """Three processes take 4 groups: the first one takes 2."""
    found = slowest([200.0, 100.0, 110.0], [1.5, 0.75, 0.75], ["a", "b", "c"])
    assert found["own_step_ms"] == [200.0, 100.0, 110.0]
    assert found["slowest"] == {
        "process": 2,
        "host": "c",
        "own_step_ms": 110.0,
        "percent_above_median": 10.0,
    }


def test_label_sets_are_checked(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text("[[1, 2], [], 0]")
    names = ["b/x.jpg", "a/y.jpg", "c/z.jpg"]
    assert read_label_sets(str(path), names, 3).tolist() == [[1, 2], [-1, -1], [0, -1]]
    # In the order of class folders, not of image numbers
    numbered = [f"n0{number}/ILSVRC2012_val_{number:08d}.JPEG" for number in (3, 1)]
    assert read_label_sets(str(path), numbered, 3).tolist() == [[0, -1], [1, 2]]
    with pytest.raises(
        InputError,
        match="has 3 entries, but data.val_dataset has the image ILSVRC2012_val_00000004.JPEG",
    ):
        read_label_sets(str(path), ["ILSVRC2012_val_00000004.JPEG"], 3)
    for content, message in (
        ("[1, 2]", "has 2 entries"),
        ("[1, 2, 3]", "the entry of c/z.jpg is"),
        ("{", "cannot be read"),
        ("[1, [true], 'x']", "read"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=f"validation.labels=.*{message}"):
            read_label_sets(str(path), names, 3)
    with pytest.raises(InputError, match="cannot be read"):
        read_label_sets(str(tmp_path / "absent.json"), names, 3)


def test_mismatched_files_are_rejected_by_name(betons, tmp_path):
    from dataclasses import replace

    from rsb_ffcv.beton import About, read_beton
    from rsb_ffcv.config.train import read_config
    from rsb_ffcv.training.build import check_files

    def config(**more):
        return read_config(
            "",
            [
                f"--data.train_dataset={betons}/train.beton",
                f"--data.val_dataset={betons}/val.beton",
                "--data.num_workers=1",
                "--data.in_memory=0",
                "--logging.folder=x",
                *(f"--{name}={value}" for name, value in more.items()),
            ],
        )

    def with_about(file, **changed):
        return replace(file, about=About(**{**vars(file.about), **changed}))

    train, val = read_beton(betons / "train.beton"), read_beton(betons / "val.beton")
    assert (
        check_files(config(), train, val)
        == check_files(config(**{"model.num_classes": 3}), train, val)
        == 3
    )
    stock = replace(val, about=None)
    assert check_files(config(), train, stock) == 3
    for arguments, message in (
        (
            (config(**{"model.num_classes": 4}), train, val),
            "model.num_classes=4: data.train_dataset=.*train.beton has 3 classes",
        ),
        (
            (config(), train, with_about(val, classes=["amber", "cyan", "blue"])),
            "class 1 is 'cyan', and in .*train.beton it is 'blue'",
        ),
        (
            (config(), train, with_about(val, classes=["amber", "blue", "cyan", "red"])),
            "has 4 classes, and the training file has 3",
        ),
        (
            (config(), val, train),
            "train_dataset=.*val.beton was written from the split val.*exchange them",
        ),
        (
            (
                config(**{"resolution.max_res": 160}),
                with_about(train, settings={"max_resolution": 128}),
                val,
            ),
            "resolution.max_res=160: the images of .*train.beton were shrunk to "
            "cfg.max_resolution=128",
        ),
        (
            (config(), train, with_about(val, settings={"max_resolution": 200})),
            "validation.resolution=224: .*val.beton",
        ),
    ):
        with pytest.raises(InputError, match=message):
            check_files(*arguments)


def test_process_that_reports_an_error_does_not_report_lost_ones(monkeypatch, capsys):
    def lost(*_):
        raise RuntimeError("Connection closed by peer")

    def call(function, seconds):
        raise RuntimeError("the store is unreachable")

    ends: list[int] = []
    beat = processes.Heartbeat(1, ["a", "b"])
    beat._group = None
    monkeypatch.setattr(join, "_joined", [join._Joined(dist.HashStore(), 1, 2)])
    monkeypatch.setattr(processes.dist, "all_reduce", lost)
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda group: None)
    monkeypatch.setattr(join, "call_store", call)
    monkeypatch.setattr(processes.os, "_exit", ends.append)
    beat._beat()
    assert ends == [processes.LOST] and "process 0 (a) of 2 ended" in capsys.readouterr().err
    beat._group = None
    beat.__exit__(InputError, InputError("training.epochs=0"), None)
    beat._beat()
    assert ends == [processes.LOST] and not capsys.readouterr().err


def test_auto_decode_takes_the_faster_way_and_says_why(betons, monkeypatch):
    class Clock:
        """A second for each batch that the slower way has given."""

        now, slower = 0.0, ""

    def make(decode):
        loader = TrainLoader(
            betons / "train.beton", batch_size=8, resolution=16, num_workers=1, decode=decode
        )
        give = loader.epoch

        def epoch(number):
            for batch in give(number):
                Clock.now += 1.0 if decode == Clock.slower else 0.5
                yield batch

        monkeypatch.setattr(loader, "epoch", epoch)
        return loader

    monkeypatch.setattr(data, "perf_counter", lambda: Clock.now)
    Clock.slower = "cpu"
    assert data.faster_decode(make) == ("gpu", "8 images/s with cpu, 16 with gpu")
    Clock.slower = "gpu"
    assert data.faster_decode(make) == ("cpu", "16 images/s with cpu, 8 with gpu")

    def wrong(decode):
        loader = make(decode)
        if decode == "gpu":
            loader.seed = 1
        return loader

    assert data.faster_decode(wrong) == (
        "cpu",
        "the images that the gpu makes are wrong; please report it",
    )

    def fails(decode):
        if decode == "gpu":
            raise InputError("no driver")
        return make(decode)

    assert data.faster_decode(fails) == ("cpu", "gpu cannot be used: no driver")

    def out_of_memory(slab):
        raise RuntimeError("CUDA error\nmore")

    def fails_later(decode):
        loader = make(decode)
        if decode == "gpu":
            monkeypatch.setattr(loader._decoder, "decode", out_of_memory)
        return loader

    assert data.faster_decode(fails_later) == ("cpu", "gpu cannot be used: CUDA error")


def test_decode_on_a_device_that_is_not_there_is_an_error(betons, tmp_path, call_program):
    flags = {
        "config-file": "rsb_configs/demo.yaml",
        "data.train_dataset": betons / "train.beton",
        "data.val_dataset": betons / "val.beton",
        "model.num_classes": 3,
        "logging.folder": tmp_path / "run",
        "training.batch_size": 8,
        "resolution.min_res": 32,
        "resolution.max_res": 32,
        "validation.resolution": 32,
    }

    def run(**more):
        return call_program(
            "train_imagenet.py", *(f"--{name}={value}" for name, value in {**flags, **more}.items())
        )

    status, _, err = run(**{"data.decode": "gpu", "compute.device": "auto"})
    assert status == 2 and "data.decode=gpu: this run has no GPU; use data.decode=cpu" in err
    emulated = {"data.decode": "gpu", "compute.device": "cpu", "data.decode_memory_mb": 16}
    for larger in ({"resolution.max_res": 900}, {"validation.batch_size": 2000}):
        status, _, err = run(**emulated, **larger)
        assert status == 2 and re.search(
            r"error: data.decode_memory_mb=16: too little to decode batches of \d+ images of \d+ "
            r"px on the device; use \d+ or more, or use data.decode=cpu\n$",
            err,
        ), err


def test_jitter_and_hue_reach_the_loader(betons):
    given = [f"--data.{name}_dataset={betons / name}.beton" for name in ("train", "val")]
    given += ["--data.in_memory=0", "--logging.folder=run", "--training.batch_size=8"]
    where = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))

    def strengths(*more):
        config = read_config("", [*given, *more])
        with closing(build.train_loader(config, cast(Any, where), 1, decode="cpu")) as loader:
            jitter: Any = loader._ops[-1]
            return dict(zip(jitter.ops.astype(int).tolist(), jitter.high.tolist()))

    assert strengths("--augment.color_jitter=0.25", "--augment.hue=0.125") == {
        native.BRIGHTNESS: 1.25,
        native.CONTRAST: 1.25,
        native.COLOR: 1.25,
        native.HUE: 0.125,
    }
    assert strengths("--augment.hue=0.5") == {native.HUE: 0.5} and strengths() == {}
    with pytest.raises(InputError, match=r"augment.hue.*0\.6"):
        strengths("--augment.hue=0.6")


def test_a_run_draws_the_numbers_of_torch_manual_seed():
    where = compute.Compute(
        device=torch.device("cpu"), precision="fp32", compile=False, channels_last=True
    )
    torch.manual_seed(7)
    expected = torch.rand(3)
    where.seed(7)
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """tools(*names): makes these programs the only ones on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)

    def make(*names):
        for name in names:
            (tmp_path / name).touch(mode=0o755)

    return make


def test_what_torch_compile_lacks_is_named(tools, monkeypatch):
    monkeypatch.setattr(compute.sysconfig, "get_path", lambda *_: os.environ["PATH"])
    tools("Python.h")
    for kind, compiler in (("cpu", "a C++ compiler (g++"), ("cuda", "a C compiler (gcc")):
        assert compute.missing_for_compile(kind).startswith(compiler)
    monkeypatch.setenv("CC", "icx")
    tools("gcc", "g++")
    assert not compute.missing_for_compile("cpu")
    assert "that CC names" in compute.missing_for_compile("cuda")  # as Triton, which then fails
    tools("icx")
    assert not compute.missing_for_compile("cuda")
    monkeypatch.setattr(compute, "find_spec", lambda name: None)
    assert compute.missing_for_compile("cuda") == "the package triton"
    Path(os.environ["PATH"], "Python.h").unlink()
    assert compute.missing_for_compile("cpu") == "Python's headers (Debian: python3-dev)"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_without_a_compiler_auto_does_not_compile(tools, monkeypatch, capsys, kind):
    def compiles(choice):
        where = compute.set_up(
            kind, "fp32", compile=choice, channels_last=True, threads=torch.get_num_threads()
        )
        return where.compile

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(compute, "_device_id", lambda device: "")
    with pytest.raises(InputError, match=r"compute.compile=1: torch.compile needs .*compiler"):
        compiles("1")
    assert not compiles("0") and not compiles("auto")
    lines = capsys.readouterr().err.splitlines()
    if kind == "cpu":
        assert not lines
    else:
        assert len(lines) == 1 and lines[0].startswith("warning: compute.compile=auto: ")
    tools("gcc", "g++")
    assert compiles("1") and compiles("auto") == (kind == "cuda") and not compiles("0")
    assert not capsys.readouterr().err
