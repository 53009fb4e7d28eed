"""Evaluation: encode once, search exactly and through an index, and compare with the truth and with the teacher."""

from clipdistill.evaluation.measured import evaluate, evaluate_embedded, evaluate_query_side
from clipdistill.evaluation.report import QueryRow, ReportRow, RetrievalReport
from clipdistill.evaluation.sets import Embedded, Judged, judged

__all__ = [
    "Embedded",
    "Judged",
    "QueryRow",
    "ReportRow",
    "RetrievalReport",
    "evaluate",
    "evaluate_embedded",
    "evaluate_query_side",
    "judged",
]
