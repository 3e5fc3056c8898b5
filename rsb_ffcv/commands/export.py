"""Exports the weights of a run for use in other programs."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from rsb_ffcv import InputError, __version__, counted, first_line, option_names, preprocessing, warn
from rsb_ffcv.atomic import atomic_folder
from rsb_ffcv.beton import About, read_beton
from rsb_ffcv.commands import only_folder
from rsb_ffcv.config.train import RECIPE, ExportOptions
from rsb_ffcv.export import formats
from rsb_ffcv.export.card import card
from rsb_ffcv.export.description import Description
from rsb_ffcv.learning.model import build_model
from rsb_ffcv.learning.weights import load_weights, model_of, read
from rsb_ffcv.loading.batch import MEAN, STD
from rsb_ffcv.reporting import log
from rsb_ffcv.training.checkpoint import BEST_WEIGHTS
from rsb_ffcv.training.environment import versions

FORMATS = ("timm", "torch", "onnx")
OPTIONS = {name: f"export.{name}" for name in ("folder", "formats", "which")}
OPTIONS["path"] = "export.weights"
FIX = "give the folder of a run"
PACKAGES = ("torch", "timm", "numpy", "pillow")


def export_run(runs: list[str], options: ExportOptions) -> None:
    """Writes the weights of a run to the new folder `options.folder`, with everything that is known
    about them, and prints what to do with it. runs: the folder of the run, alone.

    Raises InputError if the run, its weights or the classes cannot be read, or if the folder cannot
    be written.
    """
    run, folder = only_folder("export", runs, FIX), Path(options.folder)
    kinds = _formats(options.formats)
    repository = _repository(options.repository, folder)
    with option_names(OPTIONS):
        about, model = _described(run, options)
        model.eval()
        with atomic_folder(folder, "give a new export.folder") as unfinished:
            _check_space(model, unfinished, kinds)
            formats.write_weights(model, unfinished)
            if "timm" in kinds:
                formats.write_timm(model, about, unfinished, license=options.license)
            if "torch" in kinds:
                formats.write_torch(model, about, unfinished, kind=options.input)
            if "onnx" in kinds:
                formats.write_onnx(model, about, unfinished, kind=options.input)
            about.write(unfinished)
            shutil.copy(preprocessing.__file__, unfinished)
            text = card(
                about,
                license=options.license,
                repository=repository,
                formats=kinds,
                kind=options.input,
            )
            (unfinished / "README.md").write_text(text, encoding="utf-8")
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    if "timm" in kinds:
        print(f'timm:   timm.create_model("local-dir:{folder}", pretrained=True)')
        print(f"upload: hf upload {shlex.join([repository, str(folder)])} .")


def _check_space(model: Any, folder: Path, kinds: list[str]) -> None:
    """Raises InputError if the disk lacks space: torch's writer would abort the process."""
    size = sum(value.nbytes for value in model.state_dict().values()) + (1 << 20)
    needed, free = size * (1 + len({*kinds} - {"timm"})) * 1.05, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"`folder`={folder.parent}: {needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB "
            f"are free; free space, or give another"
        )


def _formats(text: str) -> list[str]:
    names = list(filter(None, text.replace(" ", "").split(",")))
    if not names or not set(names) <= set(FORMATS):
        raise InputError(
            f"export.formats={text!r}: must be any of {', '.join(FORMATS)}, separated by commas"
        )
    return names


def _repository(name: str, folder: Path) -> str:
    if not name:
        return f"<user>/{' '.join(folder.resolve().name.split())}"
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name, re.ASCII):
        raise InputError(
            f"export.repository={name!r}: must be <user>/<name>, of letters, digits, '-', '_' and "
            f"'.'"
        )
    return name


def _described(run: Path, options: ExportOptions) -> tuple[Description, Any]:
    """The description of the weights, and the model with them."""
    config, rows = log.read_run(run, FIX)
    environment = _environment(run)
    path = Path(options.weights) if options.weights else run / BEST_WEIGHTS
    known = model_of(path)
    try:
        recipe = {section: dict(config[section]) for section in RECIPE}
        validation, files = recipe["validation"], environment.get("files", {})
        train, val = (dict(files.get(split, {})) for split in ("train", "val"))
        # A published file contains no folders of this machine.
        validation["labels"] = Path(validation["labels"]).name
        lineage = [
            step | {"checkpoint": "/".join(Path(step["checkpoint"]).parts[-2:])}
            for step in config.get("lineage", [])
        ]
        kind, metrics, epoch = _results(run, path, rows)
        evaluation = {name: val[name] for name in ("images", "fingerprint") if name in val}
        if "precision" in environment:
            evaluation["precision"] = environment["precision"]
        evaluation |= {"lr_tta": validation["lr_tta"], "epoch": epoch}
        classes, titles = _classes(
            options.data,
            config["data"]["train_dataset"],
            expected=known.get("num_classes"),
            fingerprint=train.get("fingerprint"),
        )
        about = Description(
            arch=(known or recipe["model"])["arch"],
            blurpool=recipe["training"]["use_blurpool"],
            classes=classes,
            titles=titles,
            side=validation["resolution"],
            crop_ratio=validation["crop_ratio"],
            interpolation=validation["interpolation"],
            mean=list(MEAN),
            std=list(STD),
            weights=kind,
            metrics=metrics,
            evaluation=evaluation if metrics else {},
            recipe=recipe,
            lineage=lineage,
            data={name: train[name] for name in ("images", "classes", "fingerprint") if train},
            software={
                "rsb_ffcv": environment.get("rsb_ffcv", __version__),
                "commit": environment.get("commit"),
                **environment.get("versions", versions(PACKAGES)),
            },
        )
        about.check()
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{run}: config.json or environment.json are not of a run ({first_line(error)}); {FIX}"
        ) from error
    model = build_model(about.arch, len(classes), blurpool=about.blurpool)
    load_weights(model, path, which=options.which)
    return about, model


def _environment(run: Path) -> dict[str, Any]:
    """environment.json of a run; empty, with a warning, if there is none."""
    try:
        found = json.loads((run / log.ENVIRONMENT).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        warn(f"{run}: has no readable {log.ENVIRONMENT}; the model card lacks what it says")
        return {}
    return found


def _results(
    run: Path, path: Path, rows: list[dict[str, Any]]
) -> tuple[str, dict[str, float], int | None]:
    """Of a file of weights of a run: which weights they are, their metrics as the run measured
    them, and the epoch, counted from 1. Weights that the run did not measure have none."""
    if path.resolve().parent != run.resolve():
        return "", {}, None
    if path.name == BEST_WEIGHTS:
        content = read(path)
        return log.WEIGHTS[content["weights"]], content["metrics"], content["epoch"] + 1
    final = re.fullmatch(r"final_weights_?(\w*)\.pt", path.name)
    which = (final[1] or "model") if final else ""
    if which not in log.PREFIXES or not rows:
        return "", {}, None
    found = log.results_of(rows[-1], log.PREFIXES[which])
    return log.WEIGHTS[which], found, rows[-1]["epoch"] + 1


def _classes(
    given: str, trained_on: str, *, expected: int | None, fingerprint: str | None
) -> tuple[list[str], list[str]]:
    """Names of the classes, and readable names, which may be empty.

    given: export.data.
    trained_on: data.train_dataset of the run, which is read if `given` is empty.
    expected: number of classes, if it is known.
    fingerprint: of the file that the run was trained on, if it is known.
    """
    path, fix = given or trained_on, "give export.data, a .beton file with the run's classes"
    try:
        beton = read_beton(path)
    except InputError as error:
        raise InputError(f"{error}; or {fix}") from error
    if not given and fingerprint and beton.fingerprint() != fingerprint:
        raise InputError(f"{path}: has other images than when the run was trained; {fix}")
    about: About | None = beton.about
    count = expected or beton.num_classes
    if about is None:  # written by FFCV: it lists no names
        return [str(label) for label in range(count)], []
    if len(about.classes) != count:
        raise InputError(
            f"{path}: has {counted(len(about.classes), 'class', 'classes')}, and the weights are "
            f"of a model with {count}; {fix}"
        )
    return about.classes, about.titles or _wordnet(about.classes)


def _wordnet(classes: list[str]) -> list[str]:
    """The lemmas of ImageNet's class names, such as n01440764; empty if these are no such names."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return []
    known = ImageNetInfo("imagenet-22k")
    try:
        return [known.label_name_to_description(name) for name in classes]
    except KeyError:
        return []
