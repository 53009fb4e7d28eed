"""The report: JSON first, then one self-contained HTML page made from it."""
