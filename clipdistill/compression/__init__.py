"""Making a finished student and its index smaller, and measuring what each step costs."""

from clipdistill.compression.budget import (
    Asked,
    BudgetRow,
    Sides,
    Step,
    budget_rows,
    exact_step,
    index_step,
    most_lost,
)
from clipdistill.compression.choice import (
    Candidate,
    Judge,
    Miss,
    Variant,
    choose,
    front,
    keeping,
    nearest,
    try_all,
)
from clipdistill.compression.pruning import pruned
from clipdistill.compression.truncation import Cut, cuts, halves

__all__ = [
    "Asked",
    "BudgetRow",
    "Candidate",
    "Cut",
    "Judge",
    "Miss",
    "Sides",
    "Step",
    "Variant",
    "budget_rows",
    "choose",
    "cuts",
    "exact_step",
    "front",
    "halves",
    "index_step",
    "keeping",
    "most_lost",
    "nearest",
    "pruned",
    "try_all",
]
