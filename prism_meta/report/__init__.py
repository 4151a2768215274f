"""Reports: averages and comparisons of records, figures, terminal tables, and an HTML page."""

from prism_meta.report.averages import Cell, Summary, summarize, summarize_policies
from prism_meta.report.bootstrap import Interval
from prism_meta.report.comparison import Change, Comparison, compare

__all__ = [
    "Cell",
    "Change",
    "Comparison",
    "Interval",
    "Summary",
    "compare",
    "summarize",
    "summarize_policies",
]
