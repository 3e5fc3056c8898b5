"""What a user of a model needs beside its weights: `rsb_ffcv.json` of an exported folder."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rsb_ffcv import InputError, first_line
from rsb_ffcv.atomic import atomic_file

NAME = "rsb_ffcv.json"


@dataclass(frozen=True, kw_only=True)
class Description:
    """An exported model.

    arch: timm's name of the model.
    blurpool: whether `learning.model.add_blurpool` was applied to it. timm cannot load it then.
    classes: names in the order of the outputs.
    titles: readable names of the classes, or empty.
    side: of an evaluation image, in pixels.
    crop_ratio: side of the crop divided by the shorter side of the resized picture.
    interpolation: of the resize.
    mean, std: of the normalization, for RGB in 0 .. 1.
    weights: which weights of the run these are, "raw", "EMA" or "SWA"; empty: not known.
    metrics: their results, as measured by the run; empty: not known.
    evaluation: how they were measured: images, fingerprint of the file, precision, lr_tta (flip
        averaging), epoch; what is not known is missing.
    recipe: {section: {option: value}} of the run.
    lineage: the runs that it continues, the oldest first.
    data: images, classes and fingerprint of the training file; empty: not known.
    software: {package: version}, and the commit of the code.
    """

    arch: str
    blurpool: bool
    classes: list[str]
    titles: list[str]
    side: int
    crop_ratio: float
    interpolation: str
    mean: list[float]
    std: list[float]
    weights: str
    metrics: dict[str, float]
    evaluation: dict[str, Any]
    recipe: dict[str, dict[str, Any]]
    lineage: list[dict[str, Any]]
    data: dict[str, Any]
    software: dict[str, str | None]

    def preprocessing(self) -> dict[str, Any]:
        """The arguments of `preprocessing.preprocess`."""
        return {
            "side": self.side,
            "crop_ratio": self.crop_ratio,
            "interpolation": self.interpolation,
        }

    def write(self, folder: Path) -> None:
        """Raises InputError if it cannot be written."""
        with atomic_file(folder / NAME, "choose another `folder`") as file:
            file.write(json.dumps(asdict(self), indent=1, ensure_ascii=False).encode() + b"\n")


def read_description(folder: Path) -> Description:
    """Reads the description of an exported folder. Raises InputError if there is none."""
    path = folder / NAME
    try:
        return Description(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"`model`={folder}: no exported model ({first_line(error)}); give a folder that "
            f"`train_imagenet.py export` wrote"
        ) from error
