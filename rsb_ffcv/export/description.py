"""What a user of a model needs beside its weights: `rsb_ffcv.json` of an exported folder."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rsb_ffcv import InputError, first_line

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

    def check(self) -> None:
        """Raises ValueError if a value cannot be used, for example after the file was edited."""

        def are_texts(values: object) -> bool:
            return isinstance(values, list) and all(isinstance(value, str) for value in values)

        def are_numbers(values: object) -> bool:
            return (
                isinstance(values, list)
                and len(values) == 3
                and all(isinstance(value, float | int) for value in values)
            )

        for name, is_right in (
            ("arch", isinstance(self.arch, str)),
            ("classes", are_texts(self.classes) and self.classes),
            ("titles", are_texts(self.titles) and len(self.titles) in (0, len(self.classes or ()))),
            ("side", type(self.side) is int and 0 < self.side <= 4096),
            ("crop_ratio", isinstance(self.crop_ratio, float | int) and 0 < self.crop_ratio <= 1),
            ("interpolation", self.interpolation in ("bilinear", "bicubic")),
            ("mean", are_numbers(self.mean)),
            ("std", are_numbers(self.std) and all(self.std)),
        ):
            if not is_right:
                raise ValueError(f"{name}={getattr(self, name)!r:.80}")

    def preprocessing(self) -> dict[str, Any]:
        """The arguments of `preprocessing.preprocess`."""
        return {
            "side": self.side,
            "crop_ratio": self.crop_ratio,
            "interpolation": self.interpolation,
        }

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read_description(folder: Path) -> Description:
    """Reads the description of an exported folder. Raises InputError if there is none."""
    path, known = folder / NAME, {item.name for item in fields(Description)}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = Description(**{name: content[name] for name in content if name in known})
        found.check()
        return found
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"`model`={folder}: no exported model ({first_line(error)}); give a folder that "
            f"`train_imagenet.py export` wrote"
        ) from error
