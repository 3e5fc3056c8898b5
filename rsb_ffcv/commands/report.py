"""Writes the report of a run, finished or not, from what its folder has."""

from pathlib import Path

from rsb_ffcv import InputError, counted, option_names
from rsb_ffcv.reporting.log import REPORT
from rsb_ffcv.training.report import FIX, read_evaluation, write


def write_report(folders: list[str]) -> None:
    """Writes metrics.json and report.html in the run's folder, the only one of `folders`. Raises
    InputError if it has no run, or cannot be written."""
    if len(folders) != 1:
        raise InputError(f"report: {counted(len(folders), 'folder')}; {FIX}")
    folder = Path(folders[0])
    with option_names({"folder": "folder"}):
        made = write(folder, read_evaluation(folder))
    state = "finished" if made["finished"] else "not finished"
    lacks = "" if made["evaluation"] else "; results of each image come after the last epoch"
    print(f"{folder / REPORT}: {counted(len(made['epochs']), 'epoch')}, {state}{lacks}")
