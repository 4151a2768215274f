"""Averages of records, paired comparisons of two runs, and records as CSV files."""

from prism_meta.summary.averages import Cell, Summary, summarize
from prism_meta.summary.comparison import Change, Comparison, Interval, compare
from prism_meta.summary.records import HEADER, read_records, write_records

__all__ = [
    "HEADER",
    "Cell",
    "Change",
    "Comparison",
    "Interval",
    "Summary",
    "compare",
    "read_records",
    "summarize",
    "write_records",
]
