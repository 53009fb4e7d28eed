"""Making a finished student and its index smaller, and measuring what each step costs."""

from clipdistill.compression.budget import Asked, BudgetRow, Sides, Step, budget_rows, encoded, exact_step, index_step
from clipdistill.compression.choice import Candidate, Miss, choose, front, nearest, try_all
from clipdistill.compression.truncation import Cut, cuts, halves

__all__ = [
    "Asked",
    "BudgetRow",
    "Candidate",
    "Cut",
    "Miss",
    "Sides",
    "Step",
    "budget_rows",
    "choose",
    "cuts",
    "encoded",
    "exact_step",
    "front",
    "halves",
    "index_step",
    "nearest",
    "try_all",
]
