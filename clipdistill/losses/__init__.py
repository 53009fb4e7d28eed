"""The formulas: one idea a file, summed by the objective."""
