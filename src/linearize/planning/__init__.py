"""`linearize plan`: what a conversion needs, known before it is paid for."""

from __future__ import annotations

from linearize.planning.estimate import plan_conversion
from linearize.planning.report import BlockPlan, ConversionPlan, Memory, StagePlan

__all__ = ["BlockPlan", "ConversionPlan", "Memory", "StagePlan", "plan_conversion"]
