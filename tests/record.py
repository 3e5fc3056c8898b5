"""Runs the complete test suite, including `long` tests, and writes its log to
records/<date>_test_all/. `make test-all` runs this program.

The folder's README.md contains the result, the commit, whether files differ from the commit, the
sizes, the versions and the machine. The folder replaces earlier folders of this kind, even if tests
failed.
"""

import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["RSB_LONG"] = "1"

import runner  # noqa: E402

from tests.sizes import FUZZ_INPUTS, KILLS  # noqa: E402

PYTEST = ["-m", "pytest", "-rs", "--durations=40", "--color=no"]


def git(*arguments) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> int:
    pinned = [
        line.partition("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    ]
    commit, changed = (
        git("rev-parse", "HEAD"),
        git("status", "--porcelain", "--", ".", ":!records/*_test_all"),
    )
    began, lines = datetime.now(), []
    process = subprocess.Popen(
        [sys.executable, *PYTEST],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status, seconds = process.wait(), (datetime.now() - began).seconds
    facts = runner.environment(pinned)
    for earlier in (ROOT / "records").glob("*_test_all"):
        shutil.rmtree(earlier)
    folder = ROOT / "records" / f"{began:%Y-%m-%d}_test_all"
    folder.mkdir()
    (folder / "log.txt").write_text("".join(lines))
    changes = "".join(f" `{line.strip()}`" for line in changed.splitlines())
    machine = f"{facts['processor']} ({', '.join(facts['vectors'])}), {facts['cores']} cores"
    versions = ", ".join(
        f"{name} {version}" for name, version in facts["versions"].items() if version
    )
    (folder / "README.md").write_text(f"""# The complete test suite

| | |
|---|---|
| result | {lines[-1].strip().strip("= ")} (exit status {status}) |
| command | `make test-all`, started {began:%Y-%m-%d %H:%M} |
| commit | {commit}{", with changes:" if changed else ", without changes"}{changes} |
| sizes | {KILLS} kills, {FUZZ_INPUTS} damaged images (`tests/sizes.py`) |
| machine | {machine}, {facts["memory_gib"]} GiB |
| versions | Python {facts["python"]}; {versions} |

`log.txt` contains the skipped tests with reasons, what the tests report, and the 40 slowest tests.
""")
    print(f"{folder.relative_to(ROOT)}: written, {seconds // 60} min {seconds % 60} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
