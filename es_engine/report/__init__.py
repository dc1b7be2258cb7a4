"""One page on one run or many: curves over any budget, samples, configs; as a file, as PNGs, or served while runs go
on."""

from es_engine.report.data import RunData, RunGroup, find_runs, group_runs, read_run
from es_engine.report.page import Cell, Table, usual_title, write_report, write_run_report

__all__ = [
    "Cell",
    "RunData",
    "RunGroup",
    "Table",
    "find_runs",
    "group_runs",
    "read_run",
    "usual_title",
    "write_report",
    "write_run_report",
]
