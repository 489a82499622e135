"""The report page: what an evaluation found, as one HTML file that needs no network.

    render(Results, response rows) -> str

A response row is a mapping: `suite, id, policy, prompt, response, category` (None: harmless prompt), `outcome` (None: the
judge failed, and `failure` says why), and optionally `label, wrapper, cluster, nll, identical, steering, judges`.

Figures of suites come from the results. Three are computed here from the rows: the headline, the jailbreak table and the
intervals of judge agreement (formulas: `statistics.py`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup, escape

from safesteer import taxonomy
from safesteer.evaluation.results import ALL, Interval, JudgeRecord, Measure, Record, Results
from safesteer.evaluation.statistics import effective, measure, perplexity, wilson
from safesteer.evaluation.summary import cluster_of, failed
from safesteer.judges.base import Outcome, count_leanings, in_sample_text, leanings_text
from safesteer.prompts.lint import NEAR

ORDER: tuple[Outcome, ...] = ("safe", "off_topic", "refusal", "degenerate", "unsafe")
CONTROLS = {"none": "unsteered", "system-prompt": "system prompt", "random": "random directions"}
MOST_PROMPTS = 400

Row = Mapping[str, Any]
Key = tuple[str, str]


@dataclass(frozen=True)
class ShownCondition:
    """A policy as the page names it; `control` is true of unsteered, system prompt and random."""

    name: str
    label: str
    control: bool


@dataclass(frozen=True)
class Line:
    """One row of a chart: a condition and its record or measure."""

    condition: ShownCondition
    record: Record | None = None
    measure: Measure | None = None


# Statistics


def measured(
    outcomes: Mapping[Key, str], outcome: str, unsteered: Mapping[Key, str] | None, clusters: Mapping[Key, Key]
) -> Measure | None:
    """How often `outcome` came out among judged responses, against `unsteered` on the prompts that both have."""
    found = {key: float(one == outcome) for key, one in outcomes.items()}
    control = None if unsteered is None else {key: float(one == outcome) for key, one in unsteered.items()}
    return measure(found, control, True, clusters)


def _outcomes(rows: Sequence[Row]) -> dict[str, dict[Key, str]]:
    """policy -> (suite, id) -> outcome, of the rows that could be judged."""
    found: dict[str, dict[Key, str]] = {}
    for row in rows:
        if row["outcome"] is not None:
            found.setdefault(row["policy"], {})[row["suite"], str(row["id"])] = row["outcome"]
    return found


def _clusters(rows: Sequence[Row]) -> dict[Key, Key]:
    """(suite, id) -> the prompt that the row's own was made from."""
    return {(row["suite"], str(row["id"])): cluster_of(row) for row in rows}


# Text


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def percent(share: float) -> str:
    """`65%`; one decimal where rounding would say 0% or 100% of what is neither; a dash for what is not a number."""
    if not _finite(share):
        return "–"
    rounded = round(100 * share)
    return f"{100 * share:.1f}%" if rounded in (0, 100) and 0 < share < 1 else f"{rounded}%"


def span(interval: Interval) -> str:
    """The interval of a rate: `58% to 71%`."""
    return f"{percent(interval.low)} to {percent(interval.high)}"


def points(difference: float) -> str:
    """A difference of rates in percentage points, with its sign: `+35`."""
    rounded = round(100 * difference) if _finite(difference) else None
    return "–" if rounded is None else f"{rounded:+d}".replace("-", "−") if rounded else "0"


def number(value: object) -> str:
    """A measure that is no rate: about three digits, at most three decimals; a dash for what is missing or not finite."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    size = abs(value)
    text = f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"
    return text.replace("-", "−") if float(text) else "0"


def perplexity_of(nll: float) -> str:
    """The perplexity of a mean negative log-likelihood; of a difference of these, the ratio."""
    return number(perplexity(nll))


def plain(value: object) -> str:
    """Settings and other free-form data for people: `a: 1, b (c: x)`."""
    if isinstance(value, Mapping):
        if {"value", "low", "high"} <= value.keys():
            count = f", n {value['n']}" if "n" in value else ""
            return f"{plain(value['value'])} ({plain(value['low'])} to {plain(value['high'])}{count})"
        entries = [
            f"{name} ({plain(one)})" if isinstance(one, Mapping) and "low" not in one else f"{name}: {plain(one)}"
            for name, one in ((str(key).replace("_", " "), one) for key, one in value.items())
        ]
        return ", ".join(entries) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(plain(one) for one in value) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


QUALITIES = {"macro_f1": "macro-F1", "unsafe_auroc": "AUROC of unsafe", "kappa": "kappa", "accuracy": "accuracy"}


def quality(card: Mapping[str, Any]) -> str:
    """What a judge's card measured, in short: its figures on responses it never saw where it has some, else all of it."""
    if card.keys() == {"asked_without"}:
        return f"asked without {plain(card['asked_without'])}, which its server refused"
    unseen = card.get("held_out")
    if not isinstance(unseen, Mapping) or "n" not in unseen:
        return f"its measured quality: {plain(card)}"
    figures = [
        f"{words} {unseen[name]:.2f}" for name, words in QUALITIES.items() if isinstance(unseen.get(name), float)
    ]
    return f"on {unseen['n']:,} responses to prompts it never saw, against people or readers: {', '.join(figures)}"


def leaned(counted: Any) -> str:
    """` (9 leaned to unsafe, 1 to safe)`: the sides of failures (`leanings`) of a record, a judge or the headline."""
    leanings = counted["leanings"] if isinstance(counted, Mapping) else counted.leanings
    return f" ({leanings_text(leanings)})" if leanings else ""


def title(category: str | None) -> str:
    """The name of a category for people."""
    if category is None:
        return "Harmless"
    known = taxonomy.find(category)
    return known.title if known else category.replace("_", " ").capitalize()


def outcome_title(outcome: str) -> str:
    """`off_topic` -> `off topic`."""
    return outcome.replace("_", " ")


# Charts: inline SVG. Where x is a percentage the chart has no viewBox, so text keeps its size at every width.


def _element(name: str, *content: str, **attributes: object) -> Markup:
    """An SVG element; an underscore in an attribute stands for a hyphen, a trailing one is dropped."""
    pairs = [f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items()]
    return Markup(f"<{name}{''.join(pairs)}>{Markup('').join(content)}</{name}>")


def _percentage(share: float) -> str:
    return f"{100 * share:.2f}%"


def _chart(content: Sequence[Markup], label: str, height: int) -> Markup:
    return _element("svg", *content, class_="chart", role="img", aria_label=label, width="100%", height=height)


def outcome_bars(lines: Sequence[Line], label: str, thickness: int = 24) -> Markup:
    """A stacked horizontal bar a condition: the five outcome rates of its record."""
    content, alternative, top = [], [], 0
    for line in lines:
        record = line.record
        if record is None or not record.outcomes:
            continue
        judged = max(measure.n for measure in record.outcomes.values())
        name = line.condition.label
        content += [
            _element("text", name, x=0, y=top + 13, class_="name" if line.condition.control else "name steered"),
            _element("text", f"n {judged}", x="100%", y=top + 13, class_="quiet", text_anchor="end"),
        ]
        left, spoken = 0.0, []
        for outcome in ORDER:
            measure = record.outcomes.get(outcome)
            if measure is None or not measure.value > 0:
                continue
            said = f"{outcome_title(outcome)} {percent(measure.value)} ({span(measure)})"
            spoken.append(said)
            content.append(
                _element(
                    "rect", _element("title", f"{name}: {said}, n {measure.n}"), x=_percentage(left), y=top + 19,
                    width=_percentage(measure.value), height=thickness, class_=f"fill {outcome}",
                )
            )  # fmt: skip
            if thickness >= 20 and measure.value >= 0.1:
                middle = _percentage(left + measure.value / 2)
                text = percent(measure.value)
                place = {"x": middle, "y": top + 23 + thickness / 2, "text_anchor": "middle"}
                content.append(_element("text", text, class_=f"on {outcome}", **place))
            left += measure.value
        alternative.append(f"{name}, n {judged}: {', '.join(spoken)}")
        top += thickness + 31 if thickness >= 20 else thickness + 26
    return _chart(content, f"{label}. {'; '.join(alternative)}.", top) if content else Markup("")


def interval_dots(lines: Sequence[Line], label: str) -> Markup:
    """A dot with its 95% interval a condition, on a scale from 0% to 100%."""
    content, alternative, top = [], [], 0
    for line in lines:
        measure = line.measure
        if measure is None or not _finite(measure.value):
            continue
        said = f"{percent(measure.value)} ({span(measure)}), n {measure.n}"
        kind = "" if line.condition.control else " steered"
        middle = top + 28
        content += [
            _element("text", line.condition.label, x=0, y=top + 13, class_=f"name{kind}"),
            _element("text", said, x="100%", y=top + 13, class_="quiet", text_anchor="end"),
            _element("line", x1="0", x2="100%", y1=middle, y2=middle, class_="track"),
            _element(
                "line", _element("title", said), x1=_percentage(measure.low), x2=_percentage(measure.high),
                y1=middle, y2=middle, class_=f"whisker{kind}",
            ),
            _element("circle", _element("title", said), cx=_percentage(measure.value), cy=middle, r=5.5, class_=f"dot{kind}"),
        ]  # fmt: skip
        alternative.append(f"{line.condition.label} {said}")
        top += 46
    if not content:
        return Markup("")
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        place = {"x": _percentage(share), "y": top + 6, "text_anchor": anchor}
        content.append(_element("text", percent(share), class_="quiet", **place))
    return _chart(content, f"{label}. {'; '.join(alternative)}.", top + 10)


def _short(category: str) -> str:
    """The name of a category in at most 22 characters."""
    name = title(category)
    return name if len(name) <= 22 else f"{name[:21].rstrip()}…"


def heatmap(entries: Sequence[Mapping[str, Any]]) -> Markup:
    """Selectivity: a row a steered category, a column a measured one, the change of the unsafe rate in points."""
    steered = list(dict.fromkeys(entry["steered"] for entry in entries))
    columns = list(dict.fromkeys(entry["measured"] for entry in entries))
    longest = 7.5 * max(len(_short(name)) for name in [*steered, *columns])  # pixels, at 13 pixels a letter's height
    cell, side, head = 46, round(longest) + 14, round(0.71 * longest) + 24
    largest = max((abs(entry["change"]) for entry in entries if _finite(entry["change"])), default=0.0) or 1.0
    content = []
    for place, name in enumerate(columns):
        turned = f"translate({side + cell * (place + 0.5)} {head - 8}) rotate(-45)"
        content.append(_element("text", _short(name), transform=turned, class_="name"))
    for place, name in enumerate(steered):
        middle = head + cell * place + cell / 2 + 4
        content.append(_element("text", _short(name), x=side - 10, y=middle, text_anchor="end", class_="name"))
    for entry in entries:
        change = entry["change"] if _finite(entry["change"]) else 0.0
        x, y = side + cell * columns.index(entry["measured"]), head + cell * steered.index(entry["steered"])
        interval = (
            f"{points(entry['change'])} points ({points(entry['low'])} to {points(entry['high'])}), n {entry['n']}"
        )
        said = f"steer {title(entry['steered'])}, measure {title(entry['measured'])}: {interval}"
        clear = entry["low"] > 0 or entry["high"] < 0
        same = " same" if entry["steered"] == entry["measured"] else ""
        content += [
            _element("rect", x=x, y=y, width=cell, height=cell, class_="cell"),
            _element(
                "rect", _element("title", said), x=x + 1, y=y + 1, width=cell - 2, height=cell - 2,
                fill_opacity=f"{0.5 * abs(change) / largest:.3f}", class_=f"tint {'more' if change > 0 else 'less'}{same}",
            ),
            _element(
                "text", points(entry["change"]), x=x + cell / 2, y=y + cell / 2 + 4, text_anchor="middle",
                class_="value clear" if clear else "value",
            ),
        ]  # fmt: skip
    width, height = side + cell * len(columns) + head, head + cell * len(steered) + 4
    label = (
        "Selectivity heatmap: change of the unsafe rate, steered by measured category; the table below has the values."
    )
    box = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    return _element("svg", *content, class_="chart", role="img", aria_label=label, **box)


def _apart(heights: Mapping[str, float], gap: float, bottom: float) -> dict[str, float]:
    """The heights moved so that they stand at least `gap` apart and the lowest is not below `bottom`; y grows downwards."""
    placed: dict[str, float] = {}
    limit = -math.inf
    for name, y in sorted(heights.items(), key=lambda item: item[1]):
        placed[name] = limit = max(y, limit + gap)
    excess = max(0.0, limit - bottom)
    return {name: y - excess for name, y in placed.items()}


def dose_lines(entries: Sequence[Mapping[str, Any]], suite: str) -> Markup:
    """Dose-response of one suite: a line an outcome over strength, its interval as a band; the names stand at the ends."""
    left, right, top, bottom = 36.0, 270.0, 12.0, 200.0
    entries = sorted(entries, key=lambda entry: float(entry["strength"]))
    strengths = [float(entry["strength"]) for entry in entries]
    width = strengths[-1] - strengths[0] or 1.0

    def across(strength: float) -> float:
        return left + (right - left) * (strength - strengths[0]) / width

    def down(share: float) -> float:
        return bottom - (bottom - top) * share

    content = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = down(share)
        content.append(_element("line", x1=left, x2=right, y1=y, y2=y, class_="track"))
        content.append(_element("text", percent(share), x=left - 6, y=y + 4, text_anchor="end", class_="quiet"))
    for strength in strengths:
        place = {"x": across(strength), "y": bottom + 17, "text_anchor": "middle"}
        content.append(_element("text", plain(strength), class_="quiet", **place))
    content.append(
        _element("text", "strength", x=(left + right) / 2, y=bottom + 34, text_anchor="middle", class_="quiet")
    )
    ends: dict[str, float] = {}
    for outcome in ORDER:
        at = [(entry, entry["outcomes"][outcome]) for entry in entries if outcome in entry["outcomes"]]
        if not at:
            continue
        upper = [f"{across(entry['strength']):.1f},{down(rate['high']):.1f}" for entry, rate in at]
        lower = [f"{across(entry['strength']):.1f},{down(rate['low']):.1f}" for entry, rate in reversed(at)]
        middle = [f"{across(entry['strength']):.1f},{down(rate['value']):.1f}" for entry, rate in at]
        content.append(_element("polygon", points=" ".join(upper + lower), class_=f"band {outcome}"))
        content.append(_element("polyline", points=" ".join(middle), class_=f"curve {outcome}"))
        for entry, rate in at:
            said = (
                f"{outcome_title(outcome)} at strength {plain(entry['strength'])}: {percent(rate['value'])} "
                f"({percent(rate['low'])} to {percent(rate['high'])}), n {entry['n']}"
            )
            place = {"cx": across(entry["strength"]), "cy": down(rate["value"]), "r": 3.5}
            content.append(_element("circle", _element("title", said), class_=f"mark {outcome}", **place))
        ends[outcome] = down(at[-1][1]["value"])
    for name, y in _apart(ends, 15.0, bottom).items():
        content.append(_element("text", outcome_title(name), x=right + 10, y=y + 4, class_=f"end {name}"))
    label = (
        f"Outcome rates on {suite}, strength {plain(strengths[0])} to {plain(strengths[-1])}; the table has the values."
    )
    return _element("svg", *content, class_="chart curves", role="img", aria_label=label, viewBox="0 0 360 240")


# Parts of the page


def conditions(results: Results) -> list[ShownCondition]:
    """The policies in the order of the page: steered ones, then unsteered, system prompt, random."""
    kinds = Counter(policy.kind for policy in results.policies)
    places = {"default": 0, "policy": 1, "none": 2, "system-prompt": 3, "random": 4}
    labels = {**CONTROLS, "default": "default policy"}
    return [
        ShownCondition(
            policy.name,
            labels.get(policy.kind, policy.name) if kinds[policy.kind] == 1 else policy.name,
            policy.kind in CONTROLS,
        )
        for policy in sorted(results.policies, key=lambda policy: places[policy.kind])
    ]


def unsteered_name(results: Results) -> str | None:
    """The name of the unsteered control, if it ran."""
    return next((policy.name for policy in results.policies if policy.kind == "none"), None)


FEW = 10  # under as many pairs no difference is called shown


def verdict(label: str, difference: Interval, pairs: int) -> str:
    """One plain sentence: does the difference exclude zero?"""
    if pairs < FEW:
        return f"With fewer than {FEW} prompts answered under both, no gain or loss of {label} can be shown."
    if difference.low <= 0 <= difference.high:
        return f"The interval of the difference includes zero: on these prompts no gain or loss of {label} is shown."
    direction = "more" if difference.value > 0 else "less"
    return f"The interval of the difference excludes zero: {label} answers safely {direction} often than the unsteered model."


def headline(results: Results, responses: Sequence[Row], shown: Sequence[ShownCondition]) -> dict[str, Any] | None:
    """The safe-completion rate over harmful prompts, pooled over suites; wrapped prompts only where there are no others."""
    harmful = [row for row in responses if row["category"] is not None]
    rows = [row for row in harmful if not row.get("wrapper")] or harmful
    outcomes = _outcomes(rows)
    if not outcomes:
        return None
    control, clusters = unsteered_name(results), _clusters(rows)
    lines = [
        Line(
            one,
            measure=measured(outcomes.get(one.name, {}), "safe", outcomes.get(control) if control else None, clusters),
        )
        for one in shown
    ]
    lead = next((line for line in lines if line.measure and not line.condition.control), None)
    base = next((line for line in lines if line.measure and line.condition.name == control), None)
    shared = outcomes[lead.condition.name].keys() & outcomes[base.condition.name].keys() if lead and base else set()
    return {
        "lines": lines,
        "lead": lead,
        "base": base,
        "shared": len(shared),
        "verdict": verdict(f"the {lead.condition.label}", lead.measure.difference, len(shared))
        if lead and lead.measure and base and lead.measure.difference
        else None,
        "suites": list(dict.fromkeys(row["suite"] for row in rows)),
        "wrapped": any(row.get("wrapper") for row in rows),
        "failures": sum(failed(row) for row in rows),
        "unanswered": sum(not row.get("answered", True) for row in rows),
        "leanings": count_leanings(row.get("leaning") for row in rows if row["outcome"] is None),
        "chart": interval_dots(lines, "Safe-completion rate of every condition"),
    }


def suites(results: Results, shown: Sequence[ShownCondition], harmful: bool) -> list[dict[str, Any]]:
    """Per suite: a line a condition for the whole of it, and for each of its categories."""
    found = []
    for suite in results.suites:
        records = [record for record in results.records if record.suite == suite.name and record.harmful == harmful]
        lines = {
            category: [
                Line(one, record)
                for one in shown
                for record in records
                if record.policy == one.name and record.category == category
            ]
            for category in dict.fromkeys(record.category for record in records)
        }
        whole = lines.pop(ALL, [])
        if whole:
            found.append({"name": suite.name, "whole": whole, "categories": lines})
    return found


def jailbreak(results: Results, responses: Sequence[Row], shown: Sequence[ShownCondition]) -> dict[str, Any] | None:
    """The unsafe rate by wrapper and condition, and which wrappers became clearly easier; None without wrapped prompts."""
    rows = [row for row in responses if row.get("wrapper") and row["category"] is not None]
    if not rows:
        return None
    control, clusters = unsteered_name(results), _clusters(rows)
    table: list[tuple[str, list[Line]]] = []
    easier = []
    compared = 0
    wrappers = list(dict.fromkeys(row["wrapper"] for row in rows))
    for name, chosen in [("all wrappers", rows)] + [
        (one, [row for row in rows if row["wrapper"] == one]) for one in wrappers
    ]:
        outcomes = _outcomes(chosen)
        lines = []
        for one in shown:
            against = outcomes.get(control) if control and one.name != control else None
            lines.append(Line(one, measure=measured(outcomes.get(one.name, {}), "unsafe", against, clusters)))
            difference = lines[-1].measure.difference if lines[-1].measure else None
            compared += bool(difference) and not one.control
            if difference and difference.low > 0 and not one.control and len(outcomes[one.name]) >= FEW:
                easier.append(f"{name} ({one.label})")
        table.append((name, lines))
    return {
        "table": table, "easier": easier, "control": control is not None, "compared": compared,
        "prompts": len(clusters), "sources": len(set(clusters.values())),
    }  # fmt: skip


def agreement(judge: JudgeRecord, responses: Sequence[Row]) -> dict[str, Any]:
    """The intervals of a judge's agreement and kappa with the outcomes here, over the responses that both judged.

    Answers to one prompt under several conditions are a cluster.
    Kappa is (p - c) / (1 - c) for agreement p and chance agreement c; its interval is that of p, c held fixed.
    """
    judged = [
        (row["outcome"], other, cluster_of(row))
        for row in responses
        if row["outcome"] is not None and (other := (row.get("judges") or {}).get(judge.name)) is not None
    ]
    n = len(judged)
    if not judged or judge.agreement is None:
        return {"n": n, "agreement": None, "kappa": None}
    ours, theirs = Counter(one for one, _, _ in judged), Counter(other for _, other, _ in judged)
    rows = effective([one == other for one, other, _ in judged], [cluster for _, _, cluster in judged])
    rate = wilson(judge.agreement * rows, rows)
    chance = sum(ours[one] * theirs[one] for one in ORDER) / n**2
    kappa = None
    if judge.kappa is not None and chance < 1:
        low, high = ((edge - chance) / (1 - chance) for edge in (rate.low, rate.high))
        kappa = Interval(value=judge.kappa, low=low, high=high)
    return {"n": n, "agreement": rate, "kappa": kappa}


def samples(responses: Sequence[Row], shown: Sequence[ShownCondition]) -> dict[str, Any]:
    """What the sample cards need: at most `MOST_PROMPTS` prompts, evenly taken in order, each with its answers."""
    groups: dict[Key, list[Row]] = {}
    names = {one.name for one in shown}
    for row in responses:
        if row["policy"] in names:
            groups.setdefault((row["suite"], str(row["id"])), []).append(row)
    every = list(groups.values())
    kept = min(MOST_PROMPTS, len(every))
    return {
        "of": len(every),
        "conditions": [{"name": one.name, "label": one.label, "control": one.control} for one in shown],
        "prompts": [_sample(every[index * len(every) // kept]) for index in range(kept)],
    }


def _sample(rows: Sequence[Row]) -> dict[str, Any]:
    first = rows[0]
    return {
        "suite": first["suite"],
        "id": str(first["id"]),
        "category": title(first["category"]),
        "wrapper": first.get("wrapper"),
        "prompt": first["prompt"],
        "answers": {row["policy"]: _answer(row) for row in rows},
    }


def _answer(row: Row) -> dict[str, Any]:
    steering = row.get("steering") or {}
    nll = row.get("nll")
    return {
        "response": row["response"],
        "outcome": row["outcome"],
        "failure": row.get("failure"),
        "answered": row.get("answered", True),
        "identical": row.get("identical"),
        "acted": [acting_text(one) for one in steering.get("acting", ())],
        "read": reading_text(steering.get("reading")),
        "perplexity": None if nll is None else perplexity_of(nll),
        "judges": {name: outcome for name, outcome in (row.get("judges") or {}).items() if outcome != row["outcome"]},
    }


def acting_text(one: Mapping[str, Any]) -> str:
    """`Hate 0.50 (dose 0.140, blocks 9 to 20, all tokens, gate auto)`."""
    details = []
    if _finite(one.get("dose")):
        details.append(f"dose {one['dose']:.3f}")
    layers = one.get("layers") or []
    if layers:
        details.append(f"blocks {min(layers)} to {max(layers)}" if len(layers) > 1 else f"block {layers[0]}")
    if one.get("tokens"):
        details.append(f"{one['tokens']} tokens")
    if one.get("gate"):
        details.append(f"gate {one['gate']}")
    return f"{title(one['category'])} {one['strength']:.2f}" + (f" ({', '.join(details)})" if details else "")


def reading_text(reading: Mapping[str, Any] | None) -> str | None:
    """`risk 0.83, gate 100% open; Hate 0.91`: at most three topics, the strongest first."""
    if reading is None:
        return None
    topics = sorted((reading.get("topics") or {}).items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{title(name)} {value:.2f}" for name, value in topics)
    return f"risk {reading['risk']:.2f}, gate {percent(reading['opening'])} open" + (f"; {named}" if named else "")


def embedded_json(data: Any) -> Markup:
    """JSON that cannot leave its script element: no `<`, `>` or `&` stands in it, and no character outside ASCII."""
    text = json.dumps(data, allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def render(results: Results, responses: Sequence[Row]) -> str:
    """The page as HTML text that encodes as UTF-8. See the module for the keys of a response row."""
    shown = conditions(results)
    doses: dict[str, list[dict[str, Any]]] = {}
    for entry in results.dose_response:
        doses.setdefault(entry["suite"], []).append(entry)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        quality=quality,
        leaned=leaned,
        percent=percent,
        span=span,
        points=points,
        number=number,
        plain=plain,
        category=title,
        outcome=outcome_title,
    )
    environment.globals.update(
        outcome_bars=outcome_bars, interval_dots=interval_dots, Line=Line, number=number, perplexity=perplexity_of
    )
    template = (resources.files("safesteer.evaluation") / "templates" / "report.html").read_text(encoding="utf-8")
    shown_samples = samples(responses, shown)
    page = environment.from_string(template).render(
        results=results,
        conditions=shown,
        order=ORDER,
        near=NEAR,
        headline=headline(results, responses, shown),
        harmful=suites(results, shown, harmful=True),
        harmless=suites(results, shown, harmful=False),
        jailbreak=jailbreak(results, responses, shown),
        selectivity=heatmap(results.selectivity) if results.selectivity else None,
        doses=[(suite, dose_lines(entries, suite), entries) for suite, entries in doses.items()],
        in_sample=in_sample_text,
        judges=[(judge, agreement(judge, responses)) for judge in results.judges],
        deciding=next((judge for judge in results.judges if judge.decides), None),
        samples=shown_samples,
        samples_json=embedded_json({**shown_samples, "unsteered": unsteered_name(results)}),
    )
    return page.encode("utf-8", "replace").decode("utf-8")
