"""The report: one self-contained HTML page, and the measurements that it shows."""

from dynmask.report.page import build_page
from dynmask.report.results import QualityRow, Results, SpeedRow, merge

__all__ = ["QualityRow", "Results", "SpeedRow", "build_page", "merge"]
