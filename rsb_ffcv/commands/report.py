"""Writes the report of a run, finished or not, from what its folder has."""

from rsb_ffcv import counted, option_names
from rsb_ffcv.commands import only_folder
from rsb_ffcv.reporting.log import REPORT
from rsb_ffcv.training.report import FIX, read_evaluation, write


def write_report(folders: list[str]) -> None:
    """Writes metrics.json and report.html in the run's folder, the only one of `folders`. Raises
    InputError if it has no run, or cannot be written."""
    folder = only_folder("report", folders, FIX)
    with option_names({"folder": "folder"}):
        made = write(folder, read_evaluation(folder))
    state = "finished" if made["finished"] else "not finished"
    lacks = "" if made["evaluation"] else "; results of each image come after the last epoch"
    print(f"{folder / REPORT}: {counted(len(made['epochs']), 'epoch')}, {state}{lacks}")
