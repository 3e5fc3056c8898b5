"""Writes a Gradio app for an exported model: a folder that runs as it is, also as a Space of the
Hugging Face Hub."""

import json
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import timm
from PIL import Image

from rsb_ffcv import InputError, counted, export, option_names, preprocessing
from rsb_ffcv.atomic import atomic_folder
from rsb_ffcv.beton import JPG, Beton
from rsb_ffcv.commands.predict import sources
from rsb_ffcv.config.train import AppOptions
from rsb_ffcv.dataset.picture import load_rgb
from rsb_ffcv.export.description import NAME, Description, read_description
from rsb_ffcv.export.formats import CONFIG, WEIGHTS

GRADIO = "6.31.0"  # that the app was tested with
FIX = "give a folder that `train_imagenet.py export` wrote, with export.formats=timm"


def write_app(models: list[str], options: AppOptions) -> None:
    """Writes the app of an exported model to the new folder `options.folder`, and prints how to
    start it. models: the folder of the model, alone.

    Raises InputError if the model or an example cannot be read, or if the folder cannot be written.
    """
    if len(models) != 1:
        raise InputError(f"app: {counted(len(models), 'folder')}; {FIX}")
    model, folder = Path(models[0]), Path(options.folder)
    with option_names({"model": "app"}):
        about = read_description(model)
    for name in (CONFIG, WEIGHTS):
        if not (model / name).is_file():
            raise InputError(f"{model}: has no {name}; {FIX}")
    examples = _examples(options)
    with atomic_folder(folder, "give a new app.folder") as unfinished:
        shutil.copy(Path(export.__file__).with_name("app.py"), unfinished)
        shutil.copy(preprocessing.__file__, unfinished)
        (unfinished / "model").mkdir()
        for name in (CONFIG, WEIGHTS, NAME):
            shutil.copy(model / name, unfinished / "model")
        if examples:
            (unfinished / "examples").mkdir()
        for name, data in examples:
            (unfinished / "examples" / name).write_bytes(data)
        needed = f"gradio=={GRADIO}\ntorch\ntimm>={timm.__version__}\n"
        (unfinished / "requirements.txt").write_text(needed)
        (unfinished / "README.md").write_text(_card(about, folder), encoding="utf-8")
    name = folder.resolve().name
    print(f"{folder}: start it with: cd {folder}; pip install -r requirements.txt; python app.py")
    print(f"upload: hf upload --type=space <user>/{name} {folder} .")
    if examples:
        print(f"its {counted(len(examples), 'example')} are published with it")


def _card(about: Description, folder: Path) -> str:
    """The Space's README.md."""
    lines = ["---", f"title: {json.dumps(folder.resolve().name)}", "sdk: gradio"]
    lines += [f"sdk_version: {GRADIO}", "app_file: app.py", "---", ""]
    return "\n".join([*lines, f"{about.arch} for {len(about.classes):,} classes.", ""])


def _examples(options: AppOptions) -> list[tuple[str, bytes]]:
    """Name and content of each example, at most options.count, spread over the given pictures."""
    with option_names({"pictures": "app.examples"}):
        given = sources([part for part in options.examples.split(",") if part.strip()])
    each = [(source, index) for source in given for index in range(len(source))]
    found: list[tuple[str, bytes]] = []
    chosen = np.unique(np.linspace(0, len(each) - 1, min(options.count, len(each))).astype(int))
    for number in chosen.tolist():
        source, index = each[number]
        name, data = (_stored if isinstance(source, Beton) else _file)(source, index)
        found.append((f"{len(found) + 1:02d}_{name}", data))
    return found


def _file(paths: list[Path], index: int) -> tuple[str, bytes]:
    path = paths[index]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"app.examples: {path} cannot be read ({error.strerror}); leave it out"
        ) from error
    load_rgb(data, str(path))
    return path.name, data


def _stored(beton: Beton, index: int) -> tuple[str, bytes]:
    """A JPEG as it is stored, a raw image as PNG."""
    name = Path(beton.names()[index])
    with beton.open() as opened:
        if beton.modes[index] == JPG:
            return f"{name.stem}.jpg", beton.read(opened, index)[
                : int(beton.sizes[index])
            ].tobytes()
        png = BytesIO()
        Image.fromarray(beton.picture(opened, index)).save(png, "PNG")
        return f"{name.stem}.png", png.getvalue()
