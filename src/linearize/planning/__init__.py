"""`linearize plan`: the cost of a conversion, estimated beforehand."""

from __future__ import annotations

from linearize.planning.estimate import plan_conversion
from linearize.planning.report import BlockPlan, ConversionPlan, Memory, StagePlan

__all__ = ["BlockPlan", "ConversionPlan", "Memory", "StagePlan", "plan_conversion"]
