"""Measure students against their teacher: held-out loss, agreement, branches, recall, speed, tasks, chat, a report."""

from linearize.evaluation.recall import RecallItem, RecallReport, recall_beyond_window
from linearize.evaluation.report.schema import EvalReport
from linearize.evaluation.run import EvaluationOptions, bench, evaluate
from linearize.evaluation.speed import DecodeCost, cache_bytes, decode_cost
from linearize.evaluation.suites import SUITES
from linearize.evaluation.terminal import print_report
from linearize.metrics.language_model import (
    BranchAblation,
    LanguageModelingReport,
    branch_ablation,
    held_out_report,
    loss_only,
)
from linearize.metrics.report import (
    ConversionReport,
    StageReport,
    build_report,
    provenance,
    read_report,
    write_report,
)

__all__ = [
    "SUITES",
    "BranchAblation",
    "ConversionReport",
    "DecodeCost",
    "EvalReport",
    "EvaluationOptions",
    "LanguageModelingReport",
    "RecallItem",
    "RecallReport",
    "StageReport",
    "bench",
    "branch_ablation",
    "build_report",
    "cache_bytes",
    "decode_cost",
    "evaluate",
    "held_out_report",
    "loss_only",
    "print_report",
    "provenance",
    "read_report",
    "recall_beyond_window",
    "write_report",
]
