"""`report.html`: one self-contained file drawn from `report.json` alone."""

from linearize.evaluation.report.html import page, write_report_page
from linearize.evaluation.report.svg import inline_svg, save_plot

__all__ = ["inline_svg", "page", "save_plot", "write_report_page"]
