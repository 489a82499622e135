"""The sections of a report on what a bank's directions go with and do: neurons, doses, accounts of readings, and the controls.

Study -> Section (text, figures with their data, tables)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from safesteer.evaluation.report import ORDER, number, outcome_title, percent, perplexity_of
from safesteer.evaluation.report import title as category_title
from safesteer.evaluation.statistics import perplexity, wilson
from safesteer.explain import figures, messages
from safesteer.explain.about_bank import (
    cosine_figure,
    left_out,
    projection_figure,
    separation_rows,
    split,
    words_figure,
)
from safesteer.explain.attribution import Attribution
from safesteer.explain.causal import CausalCheck
from safesteer.explain.doses import DoseResponse, LayerEffects
from safesteer.explain.figures import Theme
from safesteer.explain.geometry import Separation
from safesteer.explain.neurons import Neuron, NeuronView
from safesteer.explain.pieces import Cell, Drawn, Group, Row, Section, Table, file_name
from safesteer.explain.study import Account, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONDITIONS = {"unsteered": "unsteered", "selective": "selective neurons held", "random": "random neurons held"}

# -- risk neurons ------------------------------------------------------------------------------------------------------


def _neuron_row(category: str, one: Neuron) -> list[Cell]:
    exciting = one.exciting[0] if one.exciting else None
    prompt = "" if exciting is None else f"“{exciting.text}” ({'harmful' if exciting.harmful else 'counterpart'})"
    return [
        Cell(category_title(category)),
        Cell(f"{one.layer}/{one.index}"),
        Cell(number(one.separation), "" if one.others is None else f"others {number(one.others)}"),
        Cell(number(one.p)),
        Cell("–" if one.alignment is None else number(one.alignment)),
        Cell(", ".join(figures.visible(token.text.removeprefix(" ")) for token in one.writes[:5]) or "–", wide=True),
        Cell(prompt, "" if exciting is None else f"peaks at {figures.visible(exciting.token)!r}", wide=True),
    ]


def _neuron_layers(category: str, view: NeuronView) -> Drawn:
    found, unit = view.categories[category], view.unit
    title = messages.neurons(category, found, view.tested, unit)
    rows: list[Row] = [
        {"block": layer, "neurons": count, "swapped_mean": round(mean, 3), "swapped_low": low, "swapped_high": high}
        for layer, (count, (mean, low, high)) in enumerate(zip(found.by_layer, found.swapped_by_layer, strict=True))
    ]
    return Drawn(
        file_name("neurons", category),
        title,
        lambda theme: figures.neuron_layers(
            found.by_layer, found.swapped_by_layer, title, theme, unit=f"{unit} with p < 0.001 alone"
        ),
        rows,
        rows,
        f"Title: {unit} over |t| = {found.edge:.1f}, which none passes in 95% of swaps. Bars: over |t| = {found.plain:.1f}.",
    )


def neurons_section(study: Study) -> Section:
    """Survivors against swapped pairs, the top neurons, where they sit, and whether holding them does anything."""
    view = study.neurons
    parts: list[Group | Table] = []
    text: list[str] = []
    notes = left_out(study, "neurons", "neurons of some categories", "causal", "causal check of some categories")
    if view is not None and view.categories:
        clear = [name for name, one in view.categories.items() if messages.neurons_stand_out(one)]
        text.append(
            f"Of {view.tested:,} {view.unit}, how many tell harmful prompts of a category from their counterparts: more than in "
            f"any swap of the pairs for {len(clear)} of {len(view.categories)} categories. That one differs is no proof that it "
            "does anything."
        )
        order = sorted(view.categories, key=lambda name: -view.categories[name].survivors)
        heads = (
            "category",
            f"block/{view.unit[:-1]}",
            "d′",
            "p",
            "writes towards risk",
            "makes likelier",
            "most excited by",
        )
        parts = [
            *split([_neuron_layers(name, view) for name in order], "The other {} categories"),
            Table(
                "neurons",
                f"The most specific {view.unit} of each category",
                heads,
                [_neuron_row(name, one) for name in view.categories for one in view.categories[name].top],
                view.to_json(),
                True,
            ),
        ]
        notes.append(
            "d′: difference of means in standard deviations. p: family-wise, over all tested. Writes towards risk: cosine of "
            "what the neuron adds with minus the category's direction."
        )
    if view is not None and view.note:
        notes.append(f"{view.note}.")
    if study.causal is not None:
        text.append(messages.causal(study.causal))
        parts.append(_causal_table(study.causal))
    return Section("neurons", "Risk neurons", text, parts, notes)


def _causal_table(found: CausalCheck) -> Table:
    rows = []
    for condition, counts in found.counts.items():
        judged = sum(counts.values())
        cells = [
            Cell(f"{counts[outcome]} of {judged}", _interval(counts[outcome], judged) if judged else "")
            for outcome in ORDER
        ]
        nll = found.nll[condition]
        rows.append([Cell(CONDITIONS[condition]), *cells, Cell("–" if nll is None else perplexity_of(nll.value))])
    heads = ("condition", *map(outcome_title, ORDER), "perplexity of harmless answers")
    return Table("neurons_held", f"Holding {found.held} neurons (judge: {found.judge})", heads, rows, found.to_json())


def _interval(count: int, total: int) -> str:
    rate = wilson(count, total)
    return f"{percent(rate.low)} to {percent(rate.high)}"


# -- dose and response -------------------------------------------------------------------------------------------------


def _dose_rows(found: DoseResponse) -> list[Row]:
    rows: list[Row] = []
    for one in found.doses:
        row: dict[str, object] = {"strength": one.strength}
        row |= {str(outcome): count for outcome, count in one.outcomes.items()}
        row["not_judged"], row["no_answer"] = one.failures, one.unanswered
        row["perplexity"] = None if one.nll is None else round(perplexity(one.nll.value), 3)
        for name, measured in (("harmful", one.harmful), ("random", one.control), ("harmless", one.harmless)):
            row |= {f"kl_{name}": round(measured.value, 4), f"kl_{name}_low": round(measured.low, 4)}
            row[f"kl_{name}_high"] = round(measured.high, 4)
        rows.append(row)
    return rows


def response_figure(found: DoseResponse) -> Drawn:
    """Outcomes, perplexity and divergence over strength."""
    title = messages.response(found)
    known = [one for one in found.doses if one.judged]
    measured = [one.nll for one in known]

    def draw(theme: Theme) -> Figure:
        return figures.dose_response(
            [one.strength for one in known],
            {outcome: [one.outcomes[outcome] for one in known] for outcome in ORDER},
            [one.judged for one in known],
            title,
            theme,
            perplexity=[
                (perplexity(one.value), perplexity(one.low), perplexity(one.high))
                for one in measured
                if one is not None
            ]
            if None not in measured
            else (),
            kl=[(one.harmless.value, one.harmless.low, one.harmless.high) for one in known],
        )

    return Drawn(
        "dose_response",
        title,
        draw,
        found.to_json(),
        _dose_rows(found),
        f"{found.prompts} harmful prompts, always on, by their own category (judge: {found.judge}); {found.harmless} harmless "
        "ones under the default policy. Perplexity: geometric mean over the answers.",
    )


def layers_figure(found: LayerEffects) -> Drawn:
    """The effect of the whole dose at each block, beside a random direction's."""
    title = messages.layers(found)
    rows: list[Row] = [
        {
            "block": one.layer,
            "acts": one.acts,
            **{
                f"{name}_{edge}": round(getattr(interval, edge), 4)
                for name, interval in (("kl", one.effect), ("random", one.control))
                for edge in ("value", "low", "high")
            },
        }
        for one in found.layers
    ]

    def draw(theme: Theme) -> Figure:
        # The house style of `figures`, for a picture that it has not.
        with figures._drawing(theme) as palette:
            figure = figures._figure(title, 4.2)
            axes = figure.add_subplot()
            blocks = [one.layer for one in found.layers]
            for shift, name, colour, marker in (
                (-0.12, "effect", palette.calm, "o"),
                (0.12, "control", palette.control, "s"),
            ):
                intervals = [getattr(one, name) for one in found.layers]
                value = [one.value for one in intervals]
                bars = [[one.value - one.low for one in intervals], [one.high - one.value for one in intervals]]
                axes.errorbar(
                    [block + shift for block in blocks],
                    value,
                    yerr=bars,
                    color=colour,
                    marker=marker,
                    markersize=4,
                    elinewidth=1,
                    label="the bank's directions" if name == "effect" else "random directions",
                )
            axes.set_ylim(0, None)
            axes.set_ylabel("KL of the next token (nats),\n95% interval")
            axes.grid(axis="y")
            figures._layer_axis(axes, blocks)
            figures._acting(axes, [one.layer for one in found.layers if one.acts], palette)
            figures._legend(figure, axes)
            return figure

    return Drawn(
        "effect_by_layer",
        title,
        draw,
        found.to_json(),
        rows,
        f"{found.prompts} harmful prompts. A large effect is not yet a good one.",
    )


def doses_section(study: Study) -> Section:
    """What more of a dose does, and where a dose does most."""
    drawn = []
    notes = left_out(study, "doses")
    if study.doses is not None and any(one.judged for one in study.doses.doses):
        drawn.append(response_figure(study.doses))
        if study.doses.prompts < 100:
            notes.append(
                f"{study.doses.prompts} answers a strength are few: a sketch, with the intervals shown. More with `--answers`; "
                "`safesteer evaluate --doses` measures on whole suites."
            )
    elif study.doses is not None:
        notes.append(f"{messages.response(study.doses)}.")
    if study.layers is not None:
        drawn.append(layers_figure(study.layers))
    for found in (study.doses, study.layers):
        if found is not None and found.note and f"{found.note}." not in notes:
            notes.append(f"{found.note}.")
    return Section("doses", "Dose and response", (), [Group(drawn)] if drawn else (), notes)


# -- attribution -------------------------------------------------------------------------------------------------------


def contributions(account: Attribution, less: Mapping[str, float] | None = None) -> dict[str, float]:
    """Contribution by component name, and `constant`; `less` gives those of a difference instead."""
    if less is not None:
        return dict(less)
    return {**{one.name: one.contribution for one in account.components}, "constant": account.constant}


def account_figure(name: str, title: str, account: Attribution, less: Mapping[str, float] | None = None) -> Drawn:
    """Contributions block by block; with `less` (see `Attribution.less`), of the difference to other prompts."""
    values = contributions(account, less)
    parts: dict[str, dict[int, float]] = {"attention": {}, "mlp": {}, "block": {}}
    rest = {"embedding": 0.0, "rounding": 0.0}
    for one in account.components:
        if one.layer is None:
            rest[one.kind] = values[one.name]
        else:
            parts[one.kind][one.layer] = values[one.name]
    return Drawn(
        name,
        title,
        lambda theme: figures.attribution(
            parts["attention"],
            parts["mlp"],
            title,
            theme,
            embedding=rest["embedding"],
            constant=values["constant"] + rest["rounding"],
            risk=sum(values.values()),
            block=parts["block"],
        ),
        {"components": values, "sum": sum(values.values()), "risk": account.risk, "parts": vars(account.parts)},
        [{"component": key, "contribution": round(value, 5)} for key, value in values.items()],
        " ".join(
            [
                *(
                    ["The difference to other prompts; where it says risk, it is the difference of risks."]
                    if less
                    else []
                ),
                *([f"{account.note}."] if account.note else []),
            ]
        ),
    )


def largest(values: Mapping[str, float], most: int = 1) -> list[tuple[str, float]]:
    """The components that add most, whatever their sign, without the constant."""
    parts = [(name, value) for name, value in values.items() if name != "constant"]
    return sorted(parts, key=lambda part: -abs(part[1]))[:most]


def _account(category: str, one: Account) -> Drawn:
    name = category_title(category)
    if one.matched is None:
        component, value = largest(contributions(one.harmful))[0]
        title = f"{name}: a risk of {one.harmful.risk:.2f}; the largest part is {component} ({messages.signed(value)})"
        return account_figure(file_name("attribution", category), title, one.harmful)
    less = one.harmful.less([one.matched])
    component, value = largest(less)[0]
    gap = one.harmful.risk - one.matched.risk
    title = (
        f"{name}: risk {one.harmful.risk:.2f}, its counterpart {one.matched.risk:.2f}; the largest part of the "
        f"{messages.signed(gap)} between them is {component} ({messages.signed(value)})"
    )
    return account_figure(file_name("attribution", category), title, one.harmful, less)


def attribution_section(study: Study) -> Section:
    """One example a category: which component the gate's reading comes from."""
    if not study.accounts:
        return Section("attribution", "Attribution", (), (), left_out(study, "attribution"))
    rows = [
        [
            Cell(category_title(name)),
            Cell(f"“{one.prompt}”", wide=True),
            Cell(number(one.harmful.risk)),
            Cell("–" if one.matched is None else number(one.matched.risk)),
            Cell("–" if one.matched_prompt is None else f"“{one.matched_prompt}”", wide=True),
        ]
        for name, one in study.accounts.items()
    ]
    text = [
        "Where the gate's reading of a prompt comes from: contributions of attention and MLP of each block, the embedding and a "
        "constant, which sum to the risk exactly (checked). Where a prompt has a harmless counterpart, the difference to that is "
        "shown, so that what both share goes. An account, not an experiment: take a component out and the others change too.",
    ]
    drawn = [_account(name, one) for name, one in study.accounts.items()]
    table = Table(
        "attribution",
        "The prompts: the first of each category (with a counterpart, where any has one), not chosen for how they turned out",
        ("category", "prompt", "risk", "counterpart's risk", "counterpart"),
        rows,
        {name: {"risk": one.harmful.risk, "prompt": one.prompt} for name, one in study.accounts.items()},
        True,
    )
    return Section("attribution", "Attribution", text, [*split(drawn, "The other {} categories"), table])


# -- controls and limits -----------------------------------------------------------------------------------------------


def _swapped_separation(category: str, found: Separation) -> Drawn:
    title = messages.swapped_separation(category, found)
    return Drawn(
        "nothing_separation",
        title,
        lambda theme: figures.separation_by_layer({category: found}, title, theme),
        found.to_json(),
        separation_rows(found),
    )


def nothing_section(study: Study) -> Section:
    """The same figures for random directions and swapped labels."""
    nothing = study.nothing
    drawn = [cosine_figure(nothing.cosines, "nothing_cosines", random=True)]
    if nothing.separation is not None:
        drawn.append(_swapped_separation(nothing.category, nothing.separation))
    if nothing.projection is not None:
        drawn.append(
            projection_figure(
                "nothing_lda", nothing.projection, messages.swapped_projection(nothing.projection), plane="lda"
            )
        )
    if nothing.tokens is not None:
        own, others = messages.reach(nothing.tokens)
        title = f"A random direction moves its words by {number(own)} nats, others by {number(others)}"
        drawn.append(words_figure("nothing_tokens", title, nothing.tokens))
    text = [
        "The same figures where there is nothing to see: random directions of equal norm, and labels swapped within pairs. "
        "If a figure above looks like its fellow here, it shows nothing either.",
    ]
    return Section("nothing", "What nothing looks like", text, [Group(drawn)])


LIMITS = (
    "A title says that something stands out only where it passes its control: the highest of the draws with labels "
    "swapped, or a paired test at p < 0.05. Of twelve categories one may pass by chance.",
    "Separation and neurons are read on prompts of the fit split with folds or swaps of their own. Another kind of prompt may "
    "separate less.",
    "At the last token of a prompt only. What the model thinks in the middle of an answer is not shown.",
    "LDA axes have more dimensions than prompts; only prompts they were not fitted on are drawn.",
    "Tokens speak of the first word of an answer. Words of several tokens appear by a piece at best.",
    "A neuron that differs need not cause anything; see the check with neurons held, and mind its few prompts.",
    "Attribution sums exactly, with the lengths of the stream held as they are. It is not what would happen without a component.",
    "Outcomes are a judge's. The offline judge errs; read answers before you rely on a rate.",
)


def limits_section(study: Study) -> Section:
    """How to read the report, and what it cannot show for this model and bank."""
    notes = [f"{stage}: {why}." for stage, why in study.left_out.items()]
    if study.neurons is not None and study.neurons.note:
        notes.append(f"neurons: {study.neurons.note}.")
    undivided = sorted({one.harmful.note for one in study.accounts.values() if one.harmful.note})
    notes += [f"attribution: {note}." for note in undivided]
    for found in (study.doses, study.layers):
        if found is not None and found.note:
            notes.append(f"doses: {found.note}.")
    heading = "How to read this, and what it cannot show"
    shown = [f"Not shown for this model, bank or run: {note}" for note in dict.fromkeys(notes)]
    return Section("limits", heading, (), (), [*shown, *LIMITS])


def sections(study: Study) -> Sequence[Section]:
    """Every section on effects, in order."""
    return [
        neurons_section(study),
        doses_section(study),
        attribution_section(study),
        nothing_section(study),
        limits_section(study),
    ]
