"""From judged responses to records: rates and means with intervals, paired differences (`statistics`).

    difference(policy) = mean over prompts i judged under both of ( x_i(policy) - x_i(unsteered) )

Responses whose judge failed are in no rate; their number is in `failures`, by the side they leaned to in `leanings`. So are
thoughts that came to no answer, which were not judged: `unanswered` is their share of all. Rows of one `cluster`
(wrappings of one prompt) are not taken for independent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from safesteer.evaluation.results import ALL, Measure, Record
from safesteer.evaluation.statistics import measure, paired_rates, rate
from safesteer.judges.base import OUTCOMES, count_leanings

Row = dict[str, Any]
CONTROL = "unsteered"


def cluster_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """What a row is a case of: the prompt that its own was made from, within its suite; else its own."""
    return row["suite"], str(row.get("cluster") or row["id"])


def _measure(
    rows: Sequence[Row], control: dict[str, Row], value: Callable[[Row], float | None], rates: bool
) -> Measure | None:
    def by_id(some: Iterable[Row]) -> dict[str, float]:
        return {row["id"]: found for row in some if (found := value(row)) is not None}

    clusters = {row["id"]: cluster_of(row) for row in rows}
    steered = bool(rows) and rows[0]["policy"] != CONTROL
    return measure(by_id(rows), by_id(control.values()) if steered else None, rates, clusters)


def _field(name: str) -> Callable[[Row], float | None]:
    return lambda row: None if row.get(name) is None else float(row[name])


def _outcome(name: str) -> Callable[[Row], float | None]:
    return lambda row: None if row["outcome"] is None else float(row["outcome"] == name)


def failed(row: Mapping[str, Any]) -> bool:
    """Whether there is an answer that the judge could not judge."""
    return row["outcome"] is None and bool(row.get("answered", True))


def _thinks(row: Row) -> bool:
    return row.get("thought") is not None


def _unanswered(row: Row) -> float:
    return float(not row.get("answered", True))


def _steered(row: Row) -> float:
    return float(bool(row["steering"]["acting"]))


def record(
    policy: str, suite: str, category: str, harmful: bool, rows: Sequence[Row], control: dict[str, Row]
) -> Record:
    """The record of one policy on some rows of a suite; `control` holds the unsteered rows by id."""
    judged = [row for row in rows if row["outcome"] is not None]
    own = [control[row["id"]] for row in rows if row["id"] in control]
    outcomes = {name: _measure(judged, control, _outcome(name), True) for name in OUTCOMES} if judged else {}
    return Record(
        policy=policy,
        suite=suite,
        category=category,
        harmful=harmful,
        n=len(rows),
        failures=sum(failed(row) for row in rows),
        leanings=count_leanings(row.get("leaning") for row in rows if failed(row)),
        unanswered=_measure(rows, control, _unanswered, True) if any(map(_thinks, [*rows, *own])) else None,
        outcomes={name: found for name, found in outcomes.items() if found is not None},
        relevance=_measure(rows, control, _field("relevance"), False),
        nll=_measure(rows, control, _field("nll"), False),
        repetition=_measure(rows, control, _field("repetition"), False),
        bleu=_measure(rows, control, _field("bleu"), False),
        rouge_l=_measure(rows, control, _field("rouge_l"), False),
        divergence=_measure(rows, control, _field("divergence"), False),
        identical=_measure(rows, control, _field("identical"), True),
        steered=_measure(rows, control, _steered, True),
    )


def records(rows: Sequence[Row]) -> list[Record]:
    """One record a (policy, suite, category) and one a (policy, suite) with category `all`, in the order of the rows.

    A suite of harmful and harmless prompts (XSTest) gets one `all` record a kind. Harmless rows are grouped by the label of the
    source, or by the category they resemble.
    """
    control: dict[str, dict[str, Row]] = defaultdict(dict)
    groups: dict[tuple[str, str, str, bool], list[Row]] = defaultdict(list)
    for row in rows:
        harmful = row["category"] is not None
        if row["policy"] == CONTROL:
            control[row["suite"]][row["id"]] = row
        groups[row["policy"], row["suite"], ALL, harmful].append(row)
        category = row["category"] or row.get("label") or row.get("resembles") or ""
        category = f"{ALL} (category)" if category == ALL else category
        if category:
            groups[row["policy"], row["suite"], category, harmful].append(row)
    return [
        record(policy, suite, category, harmful, members, control[suite])
        for (policy, suite, category, harmful), members in groups.items()
    ]


def selectivity(rows: Sequence[Row], policy: str) -> list[dict[str, Any]]:
    """The change in the unsafe rate of category `measured` when only category `steered` acts: plain cells with intervals."""
    control = {
        (row["suite"], row["id"]): row for row in rows if row["policy"] == CONTROL and row["outcome"] is not None
    }
    cells: dict[tuple[str, str], list[tuple[float, float, Hashable]]] = defaultdict(list)
    prefix = f"{policy} only "
    for row in rows:
        if (
            row["policy"].startswith(prefix)
            and row["category"]
            and row["outcome"]
            and (row["suite"], row["id"]) in control
        ):
            before = control[row["suite"], row["id"]]["outcome"] == "unsafe"
            cells[row["policy"].removeprefix(prefix), row["category"]].append(
                (float(row["outcome"] == "unsafe"), float(before), cluster_of(row))
            )
    return [
        {"steered": steered, "measured": measured, "n": len(pairs), "change": interval.value,
         "low": interval.low, "high": interval.high}
        for (steered, measured), pairs in cells.items()
        for interval in [paired_rates(*map(list, zip(*pairs, strict=True)))]
    ]  # fmt: skip


def dose_response(rows: Sequence[Row], policy: str, factors: Sequence[float]) -> list[dict[str, Any]]:
    """The five outcomes of harmful prompts at several strengths (0 is unsteered, 1 the policy), a point a (suite, strength)."""
    names = {f"{policy} x{factor:g}": factor for factor in factors} | {policy: 1.0, CONTROL: 0.0}
    groups: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in rows:
        if row["policy"] in names and row["category"] and row["outcome"] is not None:
            groups[row["suite"], names[row["policy"]]].append(row)
    swept = {suite for suite, factor in groups if factor not in (0.0, 1.0)}
    points = []
    for (suite, factor), members in sorted(groups.items()):
        if suite in swept:
            clusters = [cluster_of(row) for row in members]
            outcomes = {
                name: rate([float(row["outcome"] == name) for row in members], clusters).model_dump()
                for name in OUTCOMES
            }
            nll = _measure(members, {}, _field("nll"), False)
            points.append(
                {"suite": suite, "strength": factor, "n": len(members), "outcomes": outcomes,
                 "nll": nll.model_dump(include={"value", "low", "high"}) if nll else None}
            )  # fmt: skip
    return points
