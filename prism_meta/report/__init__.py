"""Reports: averages and comparisons of records, figures, terminal tables, and an HTML page."""

from prism_meta.report.averages import Cell, Summary, summarize, summarize_policies
from prism_meta.report.comparison import Change, Comparison, Interval, compare

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
