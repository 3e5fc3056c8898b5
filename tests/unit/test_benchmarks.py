"""The benchmarks measure every contestant in turn and report the missing ones."""

import argparse
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import runner  # noqa: E402

from rsb_ffcv import InputError  # noqa: E402


def test_contestants_alternate_and_missing_ones_are_reported(tmp_path, monkeypatch):
    """The test sets the clock, because real durations depend on what else the machine does."""
    log = tmp_path / "turns"
    (tmp_path / "who.py").write_text(
        textwrap.dedent(f"""
        import time
        now = 0.0
        time.perf_counter = lambda: now
        class Sleeper:
            facts = {{"mean_pixel": [7.0]}}
            def __init__(self, name, seconds):
                self.name, self.seconds = name, iter(seconds)
            def repeat(self):
                if self.name == "late":
                    raise ValueError("wrong shape")
                global now
                open({str(log)!r}, "a").write(self.name)
                print("noise on stdout")
                now += next(self.seconds)
                return 10
        class Missing:
            def __init__(self):
                import a_package_that_nobody_has
        class Broken:
            def __init__(self):
                raise OSError("no such driver")
    """)
    )
    source = str(tmp_path / "who.py")
    monkeypatch.setattr(runner, "SETTLE_SECONDS", 0)
    result = runner.race(
        {
            "a": (f"{source}:Sleeper", {"name": "a", "seconds": [9, 0.05, 0.025, 0.1]}),
            "gone": (f"{source}:Missing", {}),
            "b": (f"{source}:Sleeper", {"name": "b", "seconds": [9, 1, 1, 1]}),
            "broken": (f"{source}:Broken", {}),
            "late": (f"{source}:Sleeper", {"name": "late", "seconds": []}),
        },
        3,
    )
    assert log.read_text() == "abababab"  # one warm-up, three measured repeats
    assert (
        "not installed" in result["gone"]["absent"]
        and "no such driver" in result["broken"]["absent"]
        and "wrong shape" in result["late"]["absent"]
    )
    assert result["a"]["repeats"] == [200, 400, 100] and result["b"]["repeats"] == [10, 10, 10]
    assert [result["a"][key] for key in ("low", "images_per_s", "high")] == pytest.approx(
        [100, 200, 400]
    )
    assert result["a"]["mean_pixel"] == [7.0]


def test_loader_table_shows_ratios_and_targets(monkeypatch):
    import loader

    def rate(value):
        return {"images_per_s": value, "low": value, "high": value}

    results: dict[str, Any] = {
        "threads": 2,
        "rows": {row: {"ours": rate(1000.0)} for row in loader.ROWS},
        "scaling": {"1": rate(500.0)},
        "first_batch": {"ours": {"seconds": [0.2]}, "stock ffcv": {"absent": "x"}},
        "class_mixing": {"random": {"median": 226.0, "least": 200}},
    }
    results["rows"]["crop"] |= {
        "stock ffcv": rate(250.0),
        "timm": rate(400.0),
        "DALI CPU": {"absent": "not installed"},
    }
    lines = loader.table(results).splitlines()
    assert any("stock ffcv" in line and "4.00 | 2.5 | reached" in line for line in lines)
    assert any("timm" in line and "2.50 | 6.0 | not reached" in line for line in lines)
    assert any("DALI CPU | not installed" in line and "not compared" in line for line in lines)


@pytest.mark.parametrize(
    "kind",
    [
        "Ours",
        *(
            pytest.param(kind, marks=pytest.mark.long)
            for kind in ("Timm", "StockFFCV", "Door", "RegionDecode")
        ),
    ],
)
def test_every_contestant_reads_all_images(betons, pictures, kind):
    arguments = {
        "threads": 1,
        **(
            {"folder": str(pictures / "train")}
            if kind == "Timm"
            else {"path": str(betons / "train.beton")}
        ),
    }
    code = f"""
        import json, sys
        sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT)!r}]
        import contestants
        contestants.BATCH = 32
        print(json.dumps(contestants.{kind}(**{arguments}).repeat()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=900
    )
    if kind == "RegionDecode" and "headers" in done.stderr:
        pytest.skip("libjpeg-turbo's headers (libjpeg62-turbo-dev) are not installed")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == 96


@pytest.fixture(scope="module")
def peers(pictures, tmp_path_factory):
    """{row: {loader: result}} of ours and the peers that decode the same JPEG files, one repeat."""
    import loader

    work, settle = tmp_path_factory.mktemp("peers"), runner.SETTLE_SECONDS
    loader.prepare(pictures / "train", work, 128, threads=1)
    found = loader.contestants(work, 1)
    runner.SETTLE_SECONDS = 0
    rows = {
        "crop": ("ours", "torchvision", "WebDataset", "LitData", "SPDL", "DALI CPU"),
        "eval": ("ours", "torchvision", "SPDL"),
    }
    try:
        return {row: runner.race({n: found[row][n] for n in rows[row]}, 1) for row in rows}
    finally:
        runner.SETTLE_SECONDS = settle


@pytest.mark.parametrize(
    ("row", "name", "most"),
    [
        ("crop", "torchvision", 3.0),  # other random crops
        ("crop", "WebDataset", 3.0),
        ("crop", "LitData", 3.0),
        ("crop", "SPDL", 3.0),
        ("crop", "DALI CPU", 3.0),
        ("eval", "torchvision", 0.1),
        ("eval", "SPDL", 1.0),  # boxes of 40 px, rounded to chroma pixels
    ],
)
@pytest.mark.long
def test_peers_load_the_same_pixels_as_ours(peers, row, name, most):
    result = peers[row][name]
    if "not installed" in result.get("absent", ""):
        pytest.skip(result["absent"])
    assert result["mean_pixel"] == pytest.approx(peers[row]["ours"]["mean_pixel"], abs=most)


def test_loaders_with_other_pixels_are_not_compared():
    import contestants
    import loader
    import numpy as np

    def found(*mean):
        return {"images_per_s": 1.0, "mean_pixel": [*mean]}

    row = {
        "ours": found(120.0, 110.0, 100.0),
        "near": found(117.1, 112.9, 101.0),
        "far": found(120.0, 114.0, 100.0),
        "region": {},
    }
    checked = loader.refuse_wrong_pixels(row, 2048)
    assert [name for name in row if checked[name] != row[name]] == ["far"]
    assert checked["far"]["absent"].startswith("wrong pixels: mean [120.0, 114.0, 100.0]")
    assert loader.refuse_wrong_pixels(row, 512) == row  # fewer crops: twice the tolerance

    class Fixed(contestants.Loader):
        def __init__(self, batch):
            self.batch = batch

        def batches(self):
            return iter([self.batch, self.batch[:1]])

    pixels = np.zeros((2, 3, 224, 224), np.uint8)
    pixels[:, 1], pixels[1] = 9, 6
    for batch in (pixels, pixels.transpose(0, 2, 3, 1)):
        fixed = Fixed(batch)
        assert (fixed.repeat(), fixed.repeat()) == (3, 3)
        assert fixed.facts == {"mean_pixel": [2.0, 8.0, 2.0]}
    for wrong in (pixels.astype(np.float32), pixels[:, :, :200]):
        with pytest.raises(ValueError, match="a batch of"):
            Fixed(wrong).repeat()


@pytest.mark.long
def test_first_step_is_timed_and_its_errors_are_raised(betons, tmp_path):
    import start

    for name in ("train.beton", "val.beton"):
        (tmp_path / name).symlink_to(betons / name)
    assert 0.5 < start.first_step(start.command(tmp_path, "test_resnet", 96, 32, 1), tmp_path) < 240
    with pytest.raises(RuntimeError, match="no_such_net is not a model"):
        start.first_step(start.command(tmp_path, "no_such_net", 96, 32, 1), tmp_path)


def test_start_table_shows_ratios_and_targets():
    import start

    rows = {
        start.OURS: {"seconds": [3.0, 3.3, 3.2]},
        start.IMPORTS: {"seconds": [4.0, 4.0, 5.0]},
        start.FFCV: {"absent": "x"},
    }
    lines = start.table({"rows": rows}).splitlines()
    assert any("| 0.80 | 1.2 | reached |" in line for line in lines) and any(
        "| x |" in line for line in lines
    )
    rows[start.OURS] = {"seconds": [5.0]}
    assert "| 1.25 | 1.2 | not reached |" in start.table({"rows": rows})


def test_memory_of_the_writer_is_measured(tmp_path):
    import writer

    found = writer.memory(tmp_path, 20, 1)
    assert list(found) == ["2", "20"]
    assert all(0 < each["before_mib"] <= each["peak_mib"] for each in found.values())


@pytest.mark.long
def test_both_writers_write_all_images(pictures, tmp_path):
    code = f"""
        import sys
        sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT)!r}]
        import writer
        given = ({str(pictures)!r}, {str(tmp_path)!r}, 1, 30)
        print(writer.Ours(*given).repeat(), writer.StockFFCV(*given).repeat())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 and done.stdout.split()[-2:] == ["96", "96"], done.stderr
    from rsb_ffcv.beton import read_beton

    for name in ("ours", "stock"):
        file = read_beton(tmp_path / f"{name}.beton")
        assert len(file) == 96 and max(file.heights.max(), file.widths.max()) <= 30


def test_pack_table_shows_ratios_bytes_and_verdicts(betons):
    import pack

    options = argparse.Namespace(
        train=betons / "train.beton", batch=8, resolution=32, workers=1, repeats=2
    )
    row = pack.measure(options, "rand-m7-mstd0.5-inc1")
    assert len(row["ratios"]) == 2 and row["cpu_us"] > 0 and row["bytes"] > 0
    good = {"cpu_us": 600.0, "gpu_us": 50.0, "ratio": 12.0, "ratios": [11.0, 13.0]}
    good |= {"bytes": 60_000, "bytes_of_pixels": 150_000}
    results = {name: dict(good) for name in pack.ROWS}
    assert [text.endswith("reached") for _, text in pack.lines(results)[1:]] == [True, True]
    results["the same with RandAugment"]["ratio"] = 11.9
    results["random-resized crop + flip"]["bytes"] = 80_000
    assert [text.endswith("MISSED") for _, text in pack.lines(results)[1:]] == [True, True]


@pytest.mark.long
def test_gpu_check_runs_every_part_and_lists_what_fails(betons, tmp_path, monkeypatch):
    """On a CPU, which emulates the device, in the smallest form."""
    import gpu_check
    import torch

    def broken(options):
        raise RuntimeError("this part fails")

    monkeypatch.setattr(gpu_check, "limits", broken)
    options = argparse.Namespace(
        out=tmp_path / "record",
        train=betons / "train.beton",
        device=torch.device("cpu"),
        batch=16,
        resolution=32,
        workers=2,
        repeats=1,
        epochs=1,
        parts=["limits", "decode", "transforms", "step"],
        precisions=["fp32"],
        compile=["0"],
        arch="test_resnet",
        steps=2,
    )
    monkeypatch.setattr(gpu_check, "write_demo", lambda options: None)
    results = gpu_check.check(options)
    assert results["failed"] == {"limits": "RuntimeError: this part fails"}
    assert set(results["decode"]["crop"]["ms_per_batch"]) == set(gpu_check.driver.NAMES)
    assert results["decode"]["RandAugment"]["ms_per_batch"]["augment"] > 0
    assert all(row["images_per_s"] > 0 for row in results["step"]["fp32"]["loaded"].values())
    text = (tmp_path / "record" / "README.md").read_text()
    assert "FAILED: limits: RuntimeError: this part fails" in text
    assert text.count("not measured") == 5 and text.count("MISSED") == 2
    assert (tmp_path / "record" / "rates.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "record" / "check.json").read_text())["environment"]["source"]


@pytest.mark.long
def test_gpu_check_measures_limits_and_runs_tests_and_a_short_training(betons, tmp_path):
    import gpu_check
    import torch

    (tmp_path / "test_one.py").write_text("def test_a(): pass\n")
    options = argparse.Namespace(
        tests=[tmp_path / "test_one.py"],
        test_seconds=100,
        out=tmp_path,
        device=torch.device("cpu"),
        limit_bytes=1 << 16,
        repeats=1,
        workers=2,
        demo=betons,
        training=[
            *("--training.epochs=1", "--model.arch=test_resnet", "--training.batch_size=16"),
            *("--resolution.min_res=32", "--resolution.max_res=32", "--validation.resolution=32"),
            *("--model.num_classes=3", "--lr.warmup_epochs=0", "--mix.off_epochs=0"),
        ],
    )
    assert all(value > 0 for value in gpu_check.limits(options).values())
    results: dict = {"failed": {}, "seconds": {}}
    gpu_check.programs(options, results)
    assert results["training"]["epoch"] == 0 and results["training"]["top1"] >= 0
    assert results["tests"]["tests"] == 1 and not results["failed"]
    options.training.append("--training.epochs=none")
    gpu_check.programs(options, results)
    assert "training.epochs='none'" in results["failed"]["training"]


def test_gpu_check_counts_the_results_of_several_files_of_tests(tmp_path):
    import gpu_check

    files = [tmp_path / "test_one.py", tmp_path / "test_two.py"]
    files[0].write_text("def test_a(): pass\n\n\ndef test_b(): pass\n")
    files[1].write_text("import pytest\n\n\n@pytest.mark.skip\ndef test_c(): pass\n")
    options = argparse.Namespace(out=tmp_path, tests=files, test_seconds=100)
    assert gpu_check.tests(options) == {"tests": 3, "failures": 0, "errors": 0, "skipped": 1}
    files[1].write_text("def test_c():\n    assert False\n")
    with pytest.raises(RuntimeError, match="'failures': 1, .*test_two: 1; see the files tests_"):
        gpu_check.tests(options)
    files[1].write_text("import time\n\n\ndef test_c():\n    time.sleep(600)\n")
    options.tests, options.test_seconds = files[1:], 0.1
    with pytest.raises(RuntimeError, match="test_two: not finished after 0.1 s"):
        gpu_check.tests(options)


def test_gpu_check_table_shows_limits_and_verdicts():
    import gpu_check

    loaded = {"images_per_s": 3700.0, "waiting_for_data": 0.02, "of_synthetic": 0.98}
    fast = {"loaded": {"gpu": loaded}}
    results = {
        "decode": {"crop": {"gpu": 50000.0}, "RandAugment": {"gpu": 20000.0}},
        "step": {"fp16 compile": fast},
    }
    verdicts = [line.split("|")[-2].strip() for line in gpu_check.lines(results)[2:]]
    assert verdicts == ["reached", "MISSED", "reached", "MISSED", "reached", "", ""]


def test_every_recipe_with_figures_exists_and_points_lie_within_its_epochs(betons):
    import reproduce
    import yaml

    from rsb_ffcv.config.train import expected_curve, read_config

    data = [f"--data.{name}_dataset={betons / name}.beton" for name in ("train", "val")]
    curves = yaml.safe_load((ROOT / "benchmarks" / "curves.yaml").read_text())
    for name, curve in curves.items():
        recipe = str(ROOT / "rsb_configs" / f"{name}.yaml")
        assert expected_curve(read_config(None, ["--config-file", recipe, *data])), name
        assert reproduce.curve_of(name, ROOT / "benchmarks" / "curves.yaml") == curve
        assert curve["kind"] in ("published", "measured", "target") and curve["source"]
    for path in (ROOT / "rsb_configs").glob("*.yaml"):
        c = read_config(None, ["--config-file", str(path), *data])
        figures = expected_curve(c)
        assert figures or "No expected figures" in path.read_text(), path
        assert max(figures, default=0) <= c.training.epochs, path


@pytest.mark.long
def test_reproduce_trains_compares_and_writes_a_record(betons, tmp_path, monkeypatch):
    import reproduce

    (tmp_path / "curves.yaml").write_text("demo: {source: a test, kind: target, tolerance: 1}")
    arguments = [
        *("reproduce.py", "--recipe", "demo", "--out", tmp_path / "record"),
        *("--curves", tmp_path / "curves.yaml", f"--data.val_dataset={betons / 'val.beton'}"),
        *("--logging.expected=1=0.5, 2=100, 9=50", "--health.expected=off"),
        *("--training.epochs=2", "--model.arch=test_resnet", "--training.batch_size=16"),
        *("--resolution.min_res=32", "--resolution.max_res=32", "--validation.resolution=32"),
        *("--model.num_classes=3", "--lr.warmup_epochs=0", "--mix.off_epochs=0"),
        *("--compute.device=cpu", "--lr.lr=1e-9", f"--logging.folder={tmp_path / 'run'}"),
    ]

    def run(train):
        given = [*map(str, arguments), f"--data.train_dataset={train}"]
        monkeypatch.setattr(sys, "argv", given)
        return reproduce.main()

    damaged = tmp_path / "damaged.beton"
    damaged.write_bytes((betons / "train.beton").read_bytes()[:-1000])
    with pytest.raises(SystemExit) as ended:
        run(damaged)
    assert ended.value.code == 1 and not (tmp_path / "run").exists()

    assert run(betons / "train.beton") == 1
    text = (tmp_path / "record" / "README.md").read_text()
    assert "# demo: 2 of 2 epochs" in text and text.count("verified") == 2
    for verdict in ("reached |", "MISSED |", "not measured |"):
        assert text.count(verdict) == 1
    assert (tmp_path / "record" / "curve.png").stat().st_size > 10_000
    assert len((tmp_path / "record" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.long
def test_bundle_has_the_core_its_library_and_the_packages(tmp_path):
    """It needs the network, and a minute."""
    import tarfile

    import gpu_bundle

    gpu_bundle.bundle(tmp_path / "bundle.tar.xz")
    with tarfile.open(tmp_path / "bundle.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    root = tmp_path / "rsb_ffcv_check"
    core = next((root / "rsb_ffcv" / "ops").glob("_native*.so"))
    listed = subprocess.run(["ldd", core], capture_output=True, text=True, check=True).stdout
    assert f"{core.parent}/libturbojpeg.so.0" in listed
    for version in gpu_bundle.PYTHONS:
        found = {path.name for path in (root / "packages" / version).iterdir()}
        assert {"pytest", "matplotlib", "fastargs", "psutil", "kiwisolver", "fontTools"} <= found
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [root / "gpu_check.sh"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 2 and "no CUDA device" in done.stderr


def test_reproduce_names_a_recipe_without_figures(tmp_path):
    import reproduce

    with pytest.raises(InputError, match="--recipe=nope: curves.yaml has no figures of it; choose"):
        reproduce.curve_of("nope", ROOT / "benchmarks" / "curves.yaml")


def test_rehearsal_kills_once_in_each_part_of_the_run_and_in_every_way():
    import rehearsal

    plan = rehearsal.moments(100, 10)
    assert [moment.epoch // 10 for moment in plan] == list(range(10))
    assert {(moment.phase, moment.number.name) for moment in plan} == {
        *((phase, "SIGKILL") for phase in ("start", "epoch", "validation", "checkpoint")),
        *((phase, "SIGTERM") for phase in ("epoch", "validation")),
    }
    assert plan == rehearsal.moments(100, 10) != rehearsal.moments(100, 10, seed=1)


@pytest.mark.long
def test_rehearsal_compares_a_disturbed_run_and_finds_a_changed_row(tmp_path, monkeypatch, capsys):
    import rehearsal

    work, out = tmp_path / "work", tmp_path / "record"
    plan = [
        rehearsal.Moment(0, rehearsal.EPOCH, signal.SIGKILL, 0.0),
        rehearsal.Moment(1, rehearsal.EPOCH, signal.SIGTERM, 0.0),
    ]
    monkeypatch.setattr(rehearsal, "moments", lambda epochs, kills: plan[:kills])

    def run(*more):
        sizes = ("--images=2000", "--val-images=100", "--classes=10", "--batch=4", "--epochs=3")
        arguments = ["rehearsal.py", f"--work={work}", f"--out={out}", *sizes, *more]
        monkeypatch.setattr(sys, "argv", arguments)
        return rehearsal.main()

    assert run("--kills=2") == 0, capsys.readouterr()
    results = json.loads((out / "results.json").read_text())
    assert results["differences"] == [] and "bit by bit" in (out / "README.md").read_text()
    assert [kill["signal"] for kill in results["disturbed"]["kills"]] == ["SIGKILL", "SIGTERM"]
    assert results["undisturbed"]["processes"] == 1 and results["disturbed"]["processes"] == 3
    assert results["undisturbed"]["seconds_of_an_epoch"]["last tenth"]["steps"] > 0
    assert run("--kills=3", "--only=compare") == 1  # one is missing
    log = work / "disturbed" / "metrics.jsonl"
    lines = log.read_text().splitlines()
    changed = json.loads(lines[1])
    changed["ema_top1"] += 0.001
    log.write_text("\n".join([lines[0], json.dumps(changed), lines[2], ""]))
    assert run("--kills=2", "--only=compare") == 1
    assert json.loads((out / "results.json").read_text())["differences"] == ["epoch 2: ema_top1"]
    (work / "disturbed.jsonl").unlink()
    with pytest.raises(InputError, match="the disturbed run is not finished"):
        run("--kills=2", "--only=compare")


def test_what_processes_exchange_is_measured(run_program, tmp_path):
    few = ["--processes=2", "--steps=3", "--seconds=0.5", "--repeats=1"]
    status, out, err = run_program("benchmarks/processes.py", f"--out={tmp_path}", *few)
    assert status == 0, err
    found = json.loads((tmp_path / "processes.json").read_text())["processes"]["2"]
    assert found.keys() == {"start", "check_same", "row", "gradients", "vote", "heartbeat"}
    assert found["heartbeat"]["segments"] > 0 and found["vote"]["cpu_s"] > 0
    assert out == (tmp_path / "table.md").read_text() and "| vote, per step | 2 |" in out
