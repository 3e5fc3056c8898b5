"""Runs programs written for FFCV with rsb_ffcv.ffcv instead of FFCV's Loader, and lists every
change that this needs.

    git clone https://github.com/libffcv/ffcv
    git clone https://github.com/libffcv/ffcv-imagenet
    python benchmarks/ffcv_programs.py --ffcv ffcv --imagenet ffcv-imagenet \\
        --train <train.beton> --val <val.beton> --out records/<date>_ffcv

1. FFCV's own tests (TESTS below), with the substitutions of SUBSTITUTED, and CIFAR-10 replaced by
   generated images. They need assertpy.
2. The two functions of ffcv-imagenet that make its loaders, taken from its train_imagenet.py, with
   the substitutions of `IMAGENET`: three epochs at two resolutions and an evaluation. The labels
   are compared with stock FFCV's, on the CPU: there, its NormalizeImage cannot follow ToTensor, so
   stock FFCV runs the pipelines up to ToTorchImage.

Neither checkout is changed. Out: README.md, results.json. Exit status: 1 if a test failed or a
label differs.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import runner  # noqa: E402

from rsb_ffcv.reporting.log import write_json  # noqa: E402
from rsb_ffcv.training import environment  # noqa: E402

TESTS = (
    "test_array_field",
    "test_augmentations",
    "test_basic_pipeline",
    "test_custom_field",
    "test_image_normalization",
    "test_image_pipeline",
    "test_image_read",
    "test_json_field",
    "test_loader_filter",
    "test_partial_batches",
    "test_partial_pipeline",
    "test_rrc",
    "test_traversal_orders",
)
# (pattern, replacement) in each line of the tests
SUBSTITUTED = (
    (r"^from ffcv\.loader import Loader\b", "from rsb_ffcv.ffcv import Loader"),
    (r"^from ffcv import Loader\b", "from rsb_ffcv.ffcv import Loader"),
    (r"^from ffcv\.loader\.loader import ORDER_TYPE, ", "from rsb_ffcv.ffcv import "),
    (r"'nccl'", "'gloo'"),
)
IMAGENET = (
    (
        r"^from ffcv\.loader import Loader, OrderOption",
        "from rsb_ffcv.ffcv import Loader, OrderOption",
    ),
    (r"f'cuda:\{self\.gpu\}'", "'cpu'"),
)
GENERATED = '''
import numpy as np
import torchvision.datasets
from PIL import Image


class GeneratedImages:
    """Instead of CIFAR-10: 50,000 images of 32 x 32 pixels."""

    def __init__(self, root, train, download):
        pass

    def __len__(self):
        return 50_000

    def __getitem__(self, index):
        coarse = np.random.default_rng(index).integers(0, 256, (4, 4, 3), np.uint8)
        return Image.fromarray(coarse).resize((32, 32), Image.BICUBIC), index % 10


torchvision.datasets.CIFAR10 = GeneratedImages
'''


def changed(text: str, substitutions: tuple[tuple[str, str], ...]) -> tuple[str, list[str]]:
    """The text after the substitutions, and the changed lines as a diff."""
    lines, differing = text.splitlines(), []
    for number, line in enumerate(lines):
        for pattern, replacement in substitutions:
            lines[number] = re.sub(pattern, replacement, lines[number])
        if lines[number] != line:
            differing += [f"- {line.strip()}", f"+ {lines[number].strip()}"]
    return "\n".join(lines) + "\n", differing


def run_tests(checkout: Path) -> dict[str, Any]:
    """Runs FFCV's tests. Returns the outcome of each, and the changed lines of each file."""
    changes: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for path in sorted((checkout / "tests").glob("*.py")):
            text, differing = changed(path.read_text(), SUBSTITUTED)
            (work / path.name).write_text(text)
            if differing and path.stem in TESTS:
                changes[path.stem] = differing
        (work / "conftest.py").write_text(GENERATED)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-q", "--tb=line"]
            + [f"{name}.py" for name in TESTS],
            cwd=work,
            env={**os.environ, "PYTHONPATH": python_path()},
            capture_output=True,
            text=True,
        )
    outcomes = re.findall(r"^(PASSED|FAILED|SKIPPED|ERROR) (\S+)(?: - (.*))?$", done.stdout, re.M)
    if not outcomes:
        raise SystemExit(f"pytest: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {
        "changes": changes,
        "outcomes": [
            {"test": test, "outcome": how.lower(), "why": why} for how, test, why in outcomes
        ],
        "summary": done.stdout.strip().splitlines()[-1],
    }


def python_path() -> str:
    return os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))


def loader_functions(path: Path) -> tuple[str, list[str]]:
    """create_train_loader and create_val_loader of ffcv-imagenet's program, as a module, with the
    imports and constants of the file that they use. Their decorators, which read the options, are
    left out. Returns the source and the changed lines."""
    text, differing = changed(path.read_text(), IMAGENET)
    tree = ast.parse(text)
    wanted = {"create_train_loader", "create_val_loader"}
    parts = [
        "import numpy as np",
        "import torch as ch",
        "from pathlib import Path",
        "from typing import List",
    ]
    for node in tree.body:
        names = {alias.name for alias in getattr(node, "names", [])}
        module = getattr(node, "module", "") or ""
        if isinstance(node, ast.ImportFrom) and re.match(r"(rsb_)?ffcv\b", module):
            parts.append(ast.unparse(node))
        if isinstance(node, ast.Assign) and not names:
            parts.append(ast.unparse(node))
        if isinstance(node, ast.ClassDef) and node.name == "ImageNetTrainer":
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name in wanted:
                    method.decorator_list = []
                    parts.append(ast.unparse(method))
    return "\n\n".join(parts), differing


IMAGENET_RUN = """
import sys, types
import numpy as np, torch
{source}

train, val = {train!r}, {val!r}
trainer = types.SimpleNamespace(gpu=0, get_resolution=lambda epoch: 160)
loader = create_train_loader(trainer, train, 2, 64, 0, 1)
found = dict(shapes=[], labels=[], val=[])
for epoch, side in enumerate((160, 192, 160)):
    trainer.decoder.output_size = (side, side)
    for images, labels in loader:
        found["labels"].append(labels.clone())
    found["shapes"].append((tuple(images.shape), str(images.dtype), images.stride()))
for images, labels in create_val_loader(trainer, val, 2, 64, 192, 0):
    found["val"].append(labels.clone())
found["shapes"].append((tuple(images.shape), str(images.dtype), images.stride()))
found["labels"], found["val"] = torch.cat(found["labels"]), torch.cat(found["val"])
torch.save(found, sys.argv[1])
"""


def run_imagenet(checkout: Path, train: Path, val: Path) -> dict[str, Any]:
    """Runs both functions here and with stock FFCV, and compares what does not depend on pixels."""
    import torch

    source, differing = loader_functions(checkout / "train_imagenet.py")
    stock = re.sub(r"rsb_ffcv\.ffcv import", "ffcv.loader import", source)
    stock = re.sub(r",\s*NormalizeImage\([^)]*\)(?=\s*\])", "", stock)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("ours", source), ("stock", stock)):
            program, out = Path(folder) / f"{name}.py", Path(folder) / f"{name}.pt"
            program.write_text(IMAGENET_RUN.format(source=text, train=str(train), val=str(val)))
            done = subprocess.run(
                [sys.executable, program, out],
                env={**os.environ, "PYTHONPATH": python_path()},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            results.append(torch.load(out, weights_only=True))
    ours, theirs = results
    return {
        "changes": differing,
        "shapes": {"ours": ours["shapes"], "stock": theirs["shapes"]},
        "images": {"train": len(ours["labels"]), "val": len(ours["val"])},
        # the training order is quasi-random, which is not FFCV's here
        "same": torch.equal(ours["val"], theirs["val"])
        and len(ours["labels"]) == len(theirs["labels"]),
    }


def readme(results: dict[str, Any]) -> str:
    tests, imagenet, about = results["tests"], results["imagenet"], results["environment"]
    lines = [
        "# Programs written for FFCV, with rsb_ffcv.ffcv",
        "",
        f"`{results['command']}`, commit {results['commit']}, {about['date']}, {about['cores']} "
        f"cores of {about['processor']}, Python {about['python']}, ffcv "
        f"{about['versions']['ffcv']}, torch {about['versions']['torch']}.",
        "",
        "## FFCV's own tests",
        "",
        f"{tests['summary']}. Not passed:",
        "",
        *(
            f"- {one['test']}: {one['outcome']}, {one['why']}"
            for one in tests["outcomes"]
            if one["outcome"] != "passed"
        ),
        "",
        "CIFAR-10 is replaced by generated images of 32 px. Changed lines:",
        "",
    ]
    for name, differing in tests["changes"].items():
        lines += [f"{name}.py", "", "```diff", *differing, "```", ""]
    lines += [
        "## The loaders of ffcv-imagenet",
        "",
        f"create_train_loader and create_val_loader, three epochs at 160, 192 and 160 px and an "
        f"evaluation: {imagenet['images']['train']} training and {imagenet['images']['val']} "
        f"evaluation labels; "
        + ("as many, and the same evaluation labels, as" if imagenet["same"] else "NOT those of")
        + " stock FFCV. The decorators, which read the program's options, are left out. Stock FFCV "
        "runs the pipelines without NormalizeImage, which it has on GPUs only in this place. "
        "Changed lines:",
        "",
        "```diff",
        *imagenet["changes"],
        "```",
        "",
        "Shapes, types and strides, with NormalizeImage: " + json.dumps(imagenet["shapes"]["ours"]),
    ]
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ffcv", type=Path, required=True, help="checkout of libffcv/ffcv")
    parser.add_argument("--imagenet", type=Path, required=True, help="of libffcv/ffcv-imagenet")
    parser.add_argument("--train", type=Path, required=True, help=".beton file")
    parser.add_argument("--val", type=Path, required=True, help=".beton file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "command": f"benchmarks/ffcv_programs.py --train {options.train.name} "
        f"--val {options.val.name}",
        "commit": environment.commit(),
        "environment": runner.environment(["rsb_ffcv", "ffcv", "torch", "numba", "assertpy"]),
        "imagenet": run_imagenet(options.imagenet, options.train, options.val),
        "tests": run_tests(options.ffcv),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "results.json", results)
    (options.out / "README.md").write_text(readme(results))
    print(readme(results))
    failed = any(one["outcome"] in ("failed", "error") for one in results["tests"]["outcomes"])
    return int(failed or not results["imagenet"]["same"])


if __name__ == "__main__":
    sys.exit(main())
