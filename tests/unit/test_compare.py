"""The command compare."""

import json


def test_differences_and_results_of_runs_are_shown(tmp_path, call_program):
    for name, lr, tops in (("a", 0.1, (10.0, 30.0, 20.0)), ("b", 0.2, (15.0, 25.0))):
        folder = tmp_path / name
        folder.mkdir()
        config = {"lr": {"lr": lr, "power": 1.0}, "model": {"arch": "resnet50"}, "data": {"x": lr}}
        (folder / "config.json").write_text(json.dumps(config))
        rows = [
            {
                "epoch": epoch,
                "top1": top1,
                "train_loss": 1.0 / (epoch + 1),
                "val_loss": 2.0,
                "images_per_s": 100.0 * (epoch + 1),
                "seconds": 1800.0,
                "val_seconds": 1800.0,
                "events": ["message"] * epoch,
            }
            for epoch, top1 in enumerate(tops)
        ]
        if name == "b":
            rows[-1]["ema_top1"] = 26.5
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, b = tmp_path / "a", tmp_path / "b"
    status, out, err = call_program("train_imagenet.py", "compare", a, b)
    assert status == 0 and not err
    lines = [line.split() for line in out.splitlines() if line]
    assert lines[:2] == [[str(a), str(b)], ["lr.lr", "0.1", "0.2"]]
    table = {
        " ".join(line[:-n]): line[-n:] for line in lines[2:] for n in (4 if "%" in line else 2,)
    }
    assert table["top-1, raw weights, last"] == ["20.00", "%", "25.00", "%"]
    assert table["top-1, raw weights, best"] == ["30.00", "%", "25.00", "%"]
    assert any(line == ["top-1,", "EMA", "weights,", "last", "-", "26.50", "%"] for line in lines)
    assert table["epochs"] == ["3", "2"] and table["hours"] == ["3.00", "2.00"]
    assert table["train loss"] == ["0.3333", "0.5000"] and table["messages"] == ["3", "1"]
    assert table["images/s, median"] == ["200", "150"]
    status, out, _ = call_program("train_imagenet.py", "compare", a, a)
    assert status == 0 and out.splitlines()[1].startswith("the recipes are the same")


def test_folder_without_a_run_is_named(tmp_path, call_program):
    status, _, err = call_program("train_imagenet.py", "compare", tmp_path)
    assert (
        status == 2 and err == "error: compare: 1 folders; give the folders of two or more runs\n"
    )
    status, _, err = call_program("train_imagenet.py", "compare", tmp_path, tmp_path)
    assert status == 2 and err.startswith(f"error: {tmp_path}: no run, or one without results")
