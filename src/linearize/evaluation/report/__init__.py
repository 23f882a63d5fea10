"""The report of an evaluation: `report.json` as a typed value, and `report.html` drawn from it."""
