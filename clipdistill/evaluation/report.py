"""The retrieval report: rows of measured values with intervals, every query's hits, and the protocol they hold for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, final

from clipdistill.core.errors import MismatchError

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = "clipdistill.report/1"
EXACT = "exact"
INDEX_PREFIX = "index:"


@dataclass(frozen=True, slots=True)
class ReportRow:
    """One measured value.

    Attributes:
        set: The evaluation set's name.
        direction: ``text_to_image``, ``image_to_text`` or ``image_to_image``: queries, then gallery.
        pairing: ``teacher`` (teacher x teacher), ``student`` (student x student), ``student_query_teacher_index``, or
            the other way round ``teacher_query_student_index``.
        search: ``exact``, or ``index:`` and the FAISS factory.
        measure: ``success``, ``recall``, ``overlap``, ``teacher_top1``, ``rbo`` or ``retention``.
        k: The cut-off; for ``rbo`` the depth that was read.
        value: The mean over the queries (``retention``: the ratio of means); None where it is not defined.
        low: The lower end of the 95% bootstrap interval; None where the value is.
        high: The upper end.
        queries: How many queries.
        gallery: How many items were searched.
    """

    set: str
    direction: str
    pairing: str
    search: str
    measure: str
    k: int
    value: float | None
    low: float | None
    high: float | None
    queries: int
    gallery: int


@dataclass(frozen=True, slots=True)
class QueryRow:
    """What one query returned.

    Attributes:
        set: The evaluation set's name.
        direction: As in :class:`ReportRow`.
        pairing: As in :class:`ReportRow`.
        search: As in :class:`ReportRow`.
        query: The text, or the picture's key.
        keys: The hits, best first: picture keys, or texts.
        scores: Their inner products, rounded to six decimals.
        hit_ranks: The places, from 1, that hold a relevant item; None where the direction has no ground truth.
        overlap: Overlap with the teacher's exact top k, k being the largest cut-off; None without a teacher.
        success: By cut-off ("1", "5", "10"): 1 where a relevant item is in the top k; None without ground truth.
    """

    set: str
    direction: str
    pairing: str
    search: str
    query: str
    keys: tuple[str, ...]
    scores: tuple[float, ...]
    hit_ranks: tuple[int, ...] | None
    overlap: float | None
    success: dict[str, int] | None


@final
@dataclass(frozen=True, slots=True)
class RetrievalReport:
    """What an evaluation found.

    Attributes:
        rows: The measured values.
        per_query: The hits of each query, grouped by set, direction, pairing and search, in the order of the queries.
        protocol: For each set, plain values: pictures, texts, captions an image, queries x gallery of each direction,
            cut-offs, seed, resamples, fingerprints, tie rule, and what could not be measured and why.
    """

    rows: tuple[ReportRow, ...]
    per_query: tuple[QueryRow, ...]
    protocol: tuple[Mapping[str, Any], ...]

    def value(
        self,
        *,
        measure: str,
        k: int | None = None,
        direction: str = "text_to_image",
        pairing: str = "student",
        search: str = EXACT,
        set: str | None = None,
    ) -> float:
        """One measured value; NaN where it is not defined.

        Args:
            measure: As in :class:`ReportRow`.
            k: The cut-off; None where the measure has one only.
            direction: As in :class:`ReportRow`.
            pairing: As in :class:`ReportRow`.
            search: ``exact``, ``index`` for whichever index was measured, or ``index:`` with its factory.
            set: The evaluation set; None where the report has one only.

        Raises:
            KeyError: If no row, or more than one, is meant; it lists what exists.
        """
        wanted = {"measure": measure, "k": k, "direction": direction, "pairing": pairing, "set": set}
        chosen = {field: value for field, value in wanted.items() if value is not None}
        found = [
            row
            for row in self.rows
            if all(getattr(row, field) == value for field, value in chosen.items())
            and (row.search == search or (search == "index" and row.search.startswith(INDEX_PREFIX)))
        ]
        if len(found) != 1:
            raise KeyError(self._miss({**chosen, "search": search}, len(found)))
        value = found[0].value
        return math.nan if value is None else value

    def _miss(self, wanted: Mapping[str, Any], found: int) -> str:
        names = ("set", "direction", "pairing", "search", "measure", "k")
        held = {name: sorted({getattr(row, name) for row in self.rows}) for name in names}
        listed = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in held.items())
        return f"{found or 'no'} rows match {dict(wanted)}; exactly one is needed. The report has {listed}"

    def queries(self, **chosen: str) -> list[QueryRow]:
        """The hits of some queries.

        Args:
            chosen: Values of ``set``, ``direction``, ``pairing``, ``search`` or ``query``; those left out match all.
        """
        return [row for row in self.per_query if all(getattr(row, name) == value for name, value in chosen.items())]

    def to_json(self) -> dict[str, Any]:
        """The report as plain values, schema ``clipdistill.report/1``; undefined values are null."""
        return {
            "schema": SCHEMA,
            "rows": [asdict(row) for row in self.rows],
            "per_query": [_plain_query(row) for row in self.per_query],
            "protocol": [dict(part) for part in self.protocol],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RetrievalReport:
        """The report that :meth:`to_json` wrote.

        Raises:
            MismatchError: If it is of another schema.
        """
        if value.get("schema") != SCHEMA:
            raise MismatchError("report", "schema", SCHEMA, value.get("schema"), "Evaluate again with this version")
        return cls(
            rows=tuple(ReportRow(**row) for row in value["rows"]),
            per_query=tuple(_query_of(row) for row in value["per_query"]),
            protocol=tuple(value["protocol"]),
        )

    @staticmethod
    def merge(reports: Iterable[RetrievalReport]) -> RetrievalReport:
        """One report of several sets.

        Raises:
            ValueError: If a set occurs in two of them.
        """
        parts = list(reports)
        seen: set[str] = set()
        for part in parts:
            names = {row.set for row in part.rows}
            if seen & names:
                raise ValueError(
                    f"the set {sorted(seen & names)[0]!r} is in two of the reports: evaluate each set once"
                )
            seen |= names
        return RetrievalReport(
            rows=tuple(row for part in parts for row in part.rows),
            per_query=tuple(row for part in parts for row in part.per_query),
            protocol=tuple(row for part in parts for row in part.protocol),
        )

    def table(self) -> Table:
        """The report for a terminal: a line for each set, direction, pairing and search; intervals in brackets."""
        from rich.table import Table

        cutoffs = sorted({row.k for row in self.rows if row.measure in ("success", "overlap")})
        last = cutoffs[-1:]
        columns = [("success", k) for k in cutoffs]
        columns += [(name, k) for name in ("recall", "overlap", "retention") for k in last]
        table = Table(title="Retrieval", caption="success, recall: ground truth; overlap, retention: the teacher. 95%")
        for name in ("set", "direction", "queries x gallery", "pairing", "search"):
            table.add_column(name, no_wrap=True)
        for measure, k in columns:
            table.add_column(f"{measure}@{k}", justify="right", no_wrap=True)
        lines: dict[tuple[str, str, str, str, str], dict[tuple[str, int], ReportRow]] = {}
        for row in self.rows:
            head = (row.set, row.direction, f"{row.queries} x {row.gallery}", row.pairing, row.search)
            lines.setdefault(head, {})[(row.measure, row.k)] = row
        for head, cells in lines.items():
            table.add_row(*head, *(_cell(cells.get(column)) for column in columns))
        return table


def _cell(row: ReportRow | None) -> str:
    if row is None:
        return ""
    if row.value is None:
        return "n/a"
    if row.measure != "retention" or row.low is None or row.high is None:
        return f"{row.value:.3f}"
    return f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"


def _plain_query(row: QueryRow) -> dict[str, Any]:
    # dataclasses.asdict copies deeply, which takes minutes for some hundred thousand queries
    value = {field.name: getattr(row, field.name) for field in fields(row)}
    for name in ("keys", "scores", "hit_ranks"):
        value[name] = None if value[name] is None else list(value[name])
    return value


def _query_of(value: Mapping[str, Any]) -> QueryRow:
    ranks: Sequence[int] | None = value["hit_ranks"]
    return QueryRow(
        **{
            **value,
            "keys": tuple(value["keys"]),
            "scores": tuple(value["scores"]),
            "hit_ranks": None if ranks is None else tuple(ranks),
        }
    )
