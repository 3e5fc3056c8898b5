"""Exported models: other programs load them, with the run's accuracy and the run's pixels."""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from PIL import Image

from rsb_ffcv.export import formats
from rsb_ffcv.export.description import Description, read_description
from rsb_ffcv.learning.model import build_model
from rsb_ffcv.loading import EvalLoader
from rsb_ffcv.loading.batch import normalize
from rsb_ffcv.preprocessing import preprocess
from tests.integration.runs import options, rows

ROOT = Path(__file__).parents[2]
CLASSES = ["amber", "blue", "cyan"]


def best(run):
    return torch.load(run / "best_weights.pt", weights_only=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", formats.INPUTS)
def test_exported_model_has_the_accuracy_of_the_trainer(
    finished_run, exported, call_program, kind, precision
):
    """On the evaluation file, with its settings: equal to the last digit for the torch formats (the
    input "float" rounds), and to 1e-4 for ONNX, which computes in fp32."""
    results = {}
    for path in (
        finished_run / "best_weights.pt",
        *(exported[kind] / name for name in ("model.safetensors", "model.pt2", "model.onnx")),
    ):
        status, out, err = call_program(
            "train_imagenet.py",
            "eval",
            "--config-file",
            finished_run / "config.json",
            f"--eval.weights={path}",
            f"--compute.precision={precision}",
        )
        assert status == 0, err
        results[path.suffix] = json.loads(out.splitlines()[-1])
    metrics = best(finished_run)["metrics"]
    for name in ("top1", "top5", "val_loss"):
        expected = results[".pt"][name]
        if precision == "fp32":
            assert expected == metrics[name]
        assert results[".safetensors"][name] == expected
        if kind == "uint8":
            assert results[".pt2"][name] == expected
        if precision == "fp32":
            assert results[".pt2"][name] == pytest.approx(expected, abs=1e-5)
            assert results[".onnx"][name] == pytest.approx(expected, abs=1e-4)


def test_timm_loads_the_folder_and_the_file(finished_run, exported):
    folder = exported["uint8"]
    model = build_model("resnet10t", 3).eval()
    model.load_state_dict(best(finished_run)["state_dict"])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        for loaded in (
            timm.create_model(f"local-dir:{folder}", pretrained=True),
            timm.create_model(
                "resnet10t", num_classes=3, checkpoint_path=str(folder / "model.safetensors")
            ),
        ):
            assert torch.equal(loaded.eval()(images), expected)
    assert json.loads((folder / "config.json").read_text())["label_names"] == CLASSES


@pytest.mark.parametrize("side, ratio", [(32, 0.875), (33, 0.95), (48, 1.0), (64, 0.3)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocess_makes_timms_pixels(betons, pictures, side, ratio, interpolation):
    """Exactly; and the loader's, which resizes and crops in one step, within one level."""
    transform = timm.data.create_transform(
        (3, side, side),
        interpolation=interpolation,
        crop_pct=ratio,
        crop_mode="center",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    loader = EvalLoader(
        betons / "val.beton",
        batch_size=27,
        resolution=side,
        num_workers=1,
        crop_ratio=ratio,
        interpolation=interpolation,
    )
    ((images, _, _),) = loader
    differing = 0.0
    for name, stored in zip(loader.beton.names(), images.numpy()):
        with Image.open(pictures / "val" / name) as picture:
            pixels = preprocess(picture, side=side, crop_ratio=ratio, interpolation=interpolation)
            expected = (255 * transform(picture)).round().to(torch.uint8).permute(1, 2, 0)
        assert np.array_equal(pixels, expected.numpy())
        difference = np.abs(pixels.astype(int) - stored)
        assert difference.max() <= 1
        differing += (difference > 0).mean() / 27
    assert differing < 0.02
    loader.close()


def test_preprocess_takes_pictures_of_any_kind():
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 256, (40, 60), dtype=np.uint8))
    pixels = preprocess(grey, side=32, crop_ratio=1.0)
    assert pixels.shape == (32, 32, 3) and (pixels[..., :1] == pixels).all()
    clear = Image.new("RGBA", (50, 40), (0, 0, 0, 0))
    assert (preprocess(clear, side=32, crop_ratio=1.0) == 255).all()
    turned = grey.convert("RGB")
    exif = turned.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    upright = preprocess(turned.rotate(270, expand=True), side=32, crop_ratio=1.0)
    assert np.array_equal(preprocess(Image.open(file), side=32, crop_ratio=1.0), upright)
    assert preprocess(Image.new("L", (3200, 32)), side=32, crop_ratio=1.0).shape == (32, 32, 3)
    with pytest.raises(ValueError, match="more than 100 times as long as wide"):
        preprocess(Image.new("1", (400_000, 1)), side=32, crop_ratio=1.0)


def test_programs_contain_what_a_user_needs(exported, pictures, monkeypatch):
    """The code in the model card, run in the folder as it is printed, gives the model's logits."""
    picture = pictures / "val" / "blue" / "3.jpg"
    model, about = formats.read_model(exported["uint8"])
    with Image.open(picture) as opened:
        pixels = preprocess(opened, **about.preprocessing())
    with torch.no_grad():
        expected = model(normalize(torch.from_numpy(pixels.copy())[None]))
    for kind, folder in exported.items():
        card = (folder / "README.md").read_text()
        blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert len(blocks) == 3
        for code in blocks:
            code = code.replace("hf-hub:<user>/" + kind, f"local-dir:{folder}")
            code = code.replace("picture.jpg", str(picture))
            found: dict[str, Any] = {}
            with monkeypatch.context() as context, torch.no_grad():
                context.chdir(folder)
                context.syspath_prepend(folder)
                context.delitem(sys.modules, "preprocessing", raising=False)
                exec(code, found)
            assert found["logits"][0].tolist() == pytest.approx(expected[0].tolist(), abs=1e-4)
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        known = session.get_modelmeta().custom_metadata_map
        assert json.loads(known["classes"]) == CLASSES
        assert {
            name: json.loads(known[name]) for name in ("side", "crop_ratio", "interpolation")
        } == about.preprocessing()


def test_card_states_what_the_run_measured(finished_run, exported):
    folder = exported["uint8"]
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "timm" and front["license"] == "unknown"
    metrics, about = best(finished_run)["metrics"], read_description(folder)
    assert f"| top-1, % | {metrics['top1']:.2f} |" in card
    assert about.metrics == metrics and about.classes == CLASSES
    environment = json.loads((finished_run / "environment.json").read_text())
    for split in ("train", "val"):
        assert environment["files"][split]["fingerprint"] in card
    assert "averaged with those of the mirrored picture" in card  # validation.lr_tta
    assert about.evaluation["epoch"] == best(finished_run)["epoch"] + 1
    recipe = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)[0])
    config = json.loads((finished_run / "config.json").read_text())
    assert all(recipe[name] == config[name] for name in recipe) and len(recipe) > 5


def test_exported_files_name_no_folder_of_the_machine(exported, finished_run):
    for place in (finished_run.parent, ROOT, sys.prefix, Path.home(), timm.__file__):
        for path in exported["uint8"].iterdir():
            assert str(place).encode() not in path.read_bytes(), f"{path} names {place}"


def test_files_are_readable_for_everyone_who_may_read_new_files(exported, tmp_path):
    (tmp_path / "new").touch()
    for path in exported["uint8"].iterdir():
        assert path.stat().st_mode == (tmp_path / "new").stat().st_mode, path


def test_config_describes_these_weights(finished_run, tmp_path, command):
    """timm's starts from that of the weights which it publishes for the architecture."""
    folder = tmp_path / "model"
    status, out, err = command("export", finished_run, {"folder": folder, "license": "mit"})
    assert status == 0, err
    published = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert published["license"] == "mit"
    assert not {"tag", "origin_url", "paper_ids", "url", "hf_hub_id"} & published.keys()


def test_weights_of_elsewhere_have_no_metrics_of_the_run(finished_run, tmp_path, command):
    for number, name in enumerate(("final_weights.pt", "best_weights.pt")):
        other = tmp_path / "other" / name
        other.parent.mkdir(exist_ok=True)
        torch.save(torch.load(finished_run / "final_weights.pt", weights_only=True), other)
        folder = tmp_path / str(number)
        status, _, err = command("export", finished_run, {"folder": folder, "weights": other})
        assert status == 0, err
        assert not read_description(folder).metrics
        assert "did not measure" in (folder / "README.md").read_text()


def test_changed_training_file_is_refused(finished_run, betons, tmp_path, command):
    """Its classes may be others."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["train_dataset"] = str(betons / "val.beton")
    (run / "config.json").write_text(json.dumps(config))
    status, _, err = command("export", run, {"folder": tmp_path / "model"})
    assert status == 2 and "val.beton: has other images than when the run was trained; give" in err
    given = {"folder": tmp_path / "model", "data": betons / "val.beton"}
    status, _, err = command("export", run, given)
    assert status == 0, err


@pytest.mark.parametrize(
    "file, change",
    [
        ("config.json", {"validation": {"resolution": "x", "labels": ""}}),
        ("config.json", {"lineage": 5}),
        ("config.json", {"data": {}}),
        ("environment.json", {"files": 5}),
        ("environment.json", {"versions": None}),
    ],
)
def test_edited_run_is_one_line(finished_run, tmp_path, command, file, change):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    content = json.loads((run / file).read_text())
    (run / file).write_text(json.dumps(content | change))
    status, _, err = command("export", run, {"folder": tmp_path / "model"})
    assert status == 2 and err.splitlines()[-1].startswith(f"error: {run}: config.json or env"), err


@pytest.mark.parametrize(
    "change",
    [
        {"side": 0},
        {"side": "48"},
        {"crop_ratio": 0},
        {"classes": None},
        {"titles": ["one"]},
        {"arch": 5},
        {"mean": [0, 0]},
        {"interpolation": "nearest"},
    ],
)
def test_edited_description_is_one_line(exported, pictures, tmp_path, command, change):
    folder = tmp_path / "model"
    shutil.copytree(exported["uint8"], folder)
    content = json.loads((folder / "rsb_ffcv.json").read_text())
    (folder / "rsb_ffcv.json").write_text(json.dumps(content | change))
    status, _, err = command("predict", pictures / "val", {"model": folder})
    assert (
        status == 2 and f"predict.model={folder}: no exported model ({next(iter(change))}=" in err
    )
    (folder / "rsb_ffcv.json").write_text(json.dumps(content | {"newer": 1}))
    status, _, err = command("predict", pictures / "val" / "blue", {"model": folder})
    assert status == 0, err


def test_damaged_weights_are_one_line(exported, pictures, tmp_path, command):
    folder = tmp_path / "model"
    shutil.copytree(exported["uint8"], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:9000])
    status, _, err = command("predict", pictures / "val", {"model": folder})
    message = f"error: predict.model={folder}: model.safetensors is missing, damaged or of another"
    assert status == 2 and err.startswith(message)


def test_full_disk_is_one_line(finished_run, tmp_path, command, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    given = {"folder": tmp_path / "model", "formats": "torch"}
    status, _, err = command("export", finished_run, given)
    assert status == 2 and f"export.folder={tmp_path}: " in err and " MB are free; " in err
    assert not list(tmp_path.iterdir())


def test_program_is_evaluated_on_its_classes_only(
    finished_run, exported, betons, tmp_path, command
):
    from rsb_ffcv.dataset import subset

    other = tmp_path / "other.beton"
    subset(str(betons / "val.beton"), str(other), num_workers=1, classes="blue,cyan")
    weights = exported["uint8"] / "model.pt2"
    common = ["--config-file", finished_run / "config.json"]
    given = {"weights": weights}
    status, _, err = command("eval", [*common, f"--data.val_dataset={other}"], given)
    assert status == 2 and "its classes (blue, cyan, ...) are not those of eval.weights=" in err
    status, _, err = command("eval", common, given | {"which": "ema"})
    assert status == 2 and f"eval.which=ema: eval.weights={weights} has one set" in err


def test_other_weights_of_the_run(finished_run, tmp_path, command):
    last = rows(finished_run)[-1]
    for number, (name, which, prefix) in enumerate(
        [("final_weights_ema.pt", "model", "ema_"), (None, "ema", None)]
    ):
        path = finished_run / name if name else max(finished_run.glob("checkpoint_*.pt"))
        folder = tmp_path / str(number)
        status, _, err = command(
            "export", finished_run, {"folder": folder, "weights": path, "which": which}
        )
        assert status == 0, err
        about = read_description(folder)
        assert about.metrics == (
            {key: last[prefix + key] for key in ("top1", "top5", "val_loss")} if prefix else {}
        )
        averaged = torch.load(finished_run / "final_weights_ema.pt", weights_only=True)
        model, _ = formats.read_model(folder)
        assert all(torch.equal(value, averaged[key]) for key, value in model.state_dict().items())
    assert "did not measure" in (folder / "README.md").read_text()


def test_lineage_of_a_branch_is_in_the_card(finished_run, betons, tmp_path, train, command):
    branch = tmp_path / "branch"
    more = {"checkpoint.branch": finished_run, "training.epochs": 4}
    statuses, _, err = train(options(betons, branch, **more)).wait()
    assert statuses == [0], err
    status, _, err = command("export", branch, {"folder": tmp_path / "model"})
    assert status == 0, err
    card = (tmp_path / "model" / "README.md").read_text()
    assert re.search(r"- `run/checkpoint_\d+.pt`, after 3 epochs; changed: .*epochs 3 -> 4", card)


def test_model_with_blurpool_is_exported_as_a_program(
    finished_run, betons, tmp_path, train, command
):
    """timm cannot build it."""
    folder, out = tmp_path / "run", tmp_path / "model"
    more = {"training.use_blurpool": 1, "training.epochs": 1, "mix.off_epochs": 0}
    statuses, _, err = train(options(betons, folder, **more)).wait()
    assert statuses == [0], err
    status, _, err = command("export", folder, {"folder": out})
    assert status == 2 and "export.formats=timm: timm cannot build a model with" in err
    status, _, err = command("export", folder, {"folder": out, "formats": "torch"})
    assert status == 0, err
    assert not (out / "config.json").exists()
    status, text, err = command("predict", betons / "val.beton", {"model": out, "lr_tta": 1})
    assert status == 0 and f"top-1: {best(folder)['metrics']['top1']:.2f} % of 27 images" in err
    status, _, err = command("app", out, {"folder": tmp_path / "app"})
    assert status == 2 and "has no config.json" in err


def test_readable_names_of_imagenets_classes():
    from rsb_ffcv.commands.export import _wordnet

    assert _wordnet(["n01440764", "n01443537"]) == [
        "tench, Tinca tinca",
        "goldfish, Carassius auratus",
    ]
    assert _wordnet(["n01440764", "amber"]) == _wordnet(["n00000001"]) == []


@pytest.mark.parametrize(
    "given, message",
    [
        ({"formats": "tim"}, "export.formats='tim': must be any of timm, torch, onnx"),
        ({"formats": ""}, "export.formats='': must be any of"),
        ({"repository": "name"}, "export.repository='name': must be <user>/<name>"),
        ({"weights": "none.pt"}, "export.weights=none.pt: cannot be read"),
        ({"which": "swa"}, "export.which=swa: "),
        ({"data": "none.beton"}, "none.beton: cannot be read"),
        ({"input": "float16"}, "export.input='float16' on the command line: must be one of"),
    ],
)
def test_wrong_option_is_one_line_and_leaves_nothing(
    finished_run, tmp_path, given, message, command
):
    status, _, err = command("export", finished_run, {"folder": tmp_path / "model", **given})
    assert status == 2 and err.splitlines()[-1].startswith(f"error: {message}"), err
    assert not list(tmp_path.iterdir())


def test_folders_that_do_not_fit(finished_run, exported, tmp_path, command):
    for name, words, given, message in [
        ("export", [], {"folder": tmp_path / "a"}, "export: 0 folders; give the folder of a run"),
        ("export", tmp_path, {"folder": tmp_path / "a"}, f"{tmp_path}: no run, or one without"),
        (
            "export",
            finished_run,
            {"folder": finished_run},
            f"{finished_run}: exists already; give a new export.folder",
        ),
        ("app", [], {"folder": tmp_path / "a"}, "app: 0 folders; "),
        ("app", finished_run, {"folder": tmp_path / "a"}, f"app={finished_run}: no exported model"),
        ("predict", [], {"model": exported["float"]}, "predict: no picture; "),
        ("predict", "no*.jpg", {"model": exported["float"]}, "no*.jpg: no such picture"),
        ("predict", tmp_path, {"model": exported["float"]}, f"{tmp_path}: no such picture"),
        (
            "predict",
            __file__,
            {"model": finished_run},
            f"predict.model={finished_run}: no exported model",
        ),
    ]:
        status, _, err = command(name, words, given)
        assert status == 2 and err.splitlines()[-1].startswith(f"error: {message}"), err
    assert not list(tmp_path.iterdir())


def test_missing_package_says_how_to_install_it(finished_run, tmp_path, monkeypatch, command):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as context:
            context.setitem(sys.modules, name, None)
            status, _, err = command(
                "export", finished_run, {"folder": tmp_path / "a", "formats": "onnx"}
            )
        assert status == 2
        assert (
            f"export.formats=onnx: needs the package {name}; install it: pip install {name}" in err
        )
    assert not list(tmp_path.iterdir())


def test_program_with_other_logits_is_refused(finished_run, tmp_path, monkeypatch, command):
    """As if an exporter had a defect."""
    plain = formats.Normalized.forward
    monkeypatch.setattr(
        formats.Normalized, "forward", lambda self, images: plain(self, images) + torch.rand(())
    )
    for kind in ("torch", "onnx"):
        status, _, err = command(
            "export", finished_run, {"folder": tmp_path / "a", "formats": kind}
        )
        assert status == 2 and "from the model's, more than" in err
    assert not list(tmp_path.iterdir())


def test_damaged_program_is_an_error(finished_run, exported, tmp_path, call_program):
    for name in ("model.pt2", "model.onnx"):
        path = tmp_path / name
        path.write_bytes((exported["uint8"] / name).read_bytes()[:5000])
        status, _, err = call_program(
            "train_imagenet.py",
            "eval",
            "--config-file",
            finished_run / "config.json",
            f"--eval.weights={path}",
        )
        assert status == 2
        assert f"error: eval.weights={path}: not a program of `train_imagenet.py export`" in err


@pytest.mark.long
@pytest.mark.parametrize(
    "arch, side",
    [
        ("resnet50", 64),
        ("vit_tiny_patch16_224", 224),
        ("deit3_small_patch16_224", 224),
        ("convnext_atto", 64),
        ("efficientnet_b0", 64),
        ("mobilenetv3_small_100", 64),
        ("swin_tiny_patch4_window7_224", 224),
        ("regnety_004", 64),
    ],
)
def test_architectures_are_exported_exactly(tmp_path, arch, side):
    """Also transformers, whose input size is fixed."""
    torch.manual_seed(0)
    model = build_model(arch, 7).eval()
    about = Description(
        arch=arch,
        blurpool=False,
        classes=[str(label) for label in range(7)],
        titles=[],
        side=side,
        crop_ratio=0.95,
        interpolation="bicubic",
        mean=[0.5, 0.4, 0.3],
        std=[0.1, 0.2, 0.3],
        weights="",
        metrics={},
        evaluation={},
        recipe={},
        lineage=[],
        data={},
        software={},
    )
    about.write(tmp_path)
    formats.write_weights(model, tmp_path)
    formats.write_timm(model, about, tmp_path, license="mit")
    formats.write_torch(model, about, tmp_path, kind="uint8")  # these compare themselves
    formats.write_onnx(model, about, tmp_path, kind="uint8")
    loaded, images = (
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(),
        torch.rand(2, 3, side, side),
    )
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
