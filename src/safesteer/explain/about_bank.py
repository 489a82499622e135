"""The sections of a report on what a bank is: its provenance, its categories, their geometry, and the words they move.

Study -> Section (text, figures with their data, tables)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from safesteer.evaluation.report import number, percent, plain
from safesteer.evaluation.report import title as category_title
from safesteer.explain import figures, messages
from safesteer.explain.geometry import CosineMap, Projection, Separation
from safesteer.explain.lens import Lens
from safesteer.explain.messages import signed
from safesteer.explain.pieces import Cell, Drawn, Group, Row, Section, Table, column_of, file_name
from safesteer.explain.study import Study, strongest
from safesteer.refusal import RefusalDirection
from safesteer.vectors import VectorBank
from safesteer.vectors.gate import Gate

SHOWN = 2  # figures of categories that stand open; the others are folded away


def split(drawn: Sequence[Drawn], heading: str) -> list[Group]:
    """The first figures open, the others folded away."""
    groups = [Group(drawn[:SHOWN])]
    return [*groups, Group(drawn[SHOWN:], heading.format(len(drawn) - SHOWN), "folded")] if drawn[SHOWN:] else groups


def left_out(study: Study, *stages: str) -> list[str]:
    """A sentence for each stage, of those named, that is not there."""
    return [
        f"Not shown ({stage}): {why}."
        for stage, why in study.left_out.items()
        if any(stage == one or stage.startswith(f"{one}, ") for one in stages)
    ]


# -- what this bank is -------------------------------------------------------------------------------------------------


def bank_section(study: Study) -> Section:
    """Model, categories, doses, provenance, gate."""
    bank, data = study.bank, study.bank.provenance
    sources = data.get("prompts") or {}
    rows = []
    for name in bank.categories:
        source, acting = sources.get(name, {}), bank.acting_layers(name)
        span = "none" if not acting else f"{acting[0]}" if len(acting) == 1 else f"{acting[0]} to {acting[-1]}"
        read = f"{source.get('count', '?')} against {source.get('harmless', '?')}"
        rows.append([Cell(category_title(name)), Cell(f"{bank.dose(name):.3f}"), Cell(span), Cell(read)])
    facts = {
        "model": study.model,
        "architecture": f"{bank.model.architecture}, {study.depth} blocks of width {bank.model.width}",
        "site": bank.site,
        "method": data.get("method"),
        "read at": data.get("position"),
        "recipe": data.get("recipe"),
        "shrinkage": data.get("shrinkage"),
        "borrowed": {name: one["borrowed"] for name, one in sources.items() if one.get("borrowed")},
        "tokens steered": bank.tokens,
        "strength ceiling": bank.strength_ceiling,
        "calibration": data.get("calibration"),
        "refusal direction removed": data.get("refusal"),
        "made": data.get("created"),
        "versions": data.get("versions"),
        "digest": bank.digest()[:16],
    }
    parts: list[Group | Table] = [
        Table(
            "bank",
            "Provenance",
            ("", "value"),
            [[Cell(name), Cell(plain(value), wide=True)] for name, value in facts.items() if value not in (None, {})],
            {key: value for key, value in facts.items() if value is not None},
            True,
        ),
        Table("categories", "Categories", ("category", "dose", "blocks", "prompts"), rows, sources),
    ]
    text = [
        f"{study.model} ({facts['architecture']}); {data.get('method', 'directions')} at the {bank.site} site, read at "
        f"{data.get('position', 'an unknown position')}, recipe {data.get('recipe', 'unknown')}.",
        _gate_words(bank.gate),
    ]
    if bank.gate is not None and bank.gate.quality:
        parts.append(_gate(bank.gate))
    parts.append(Group([doses_figure(bank)]))
    notes = [f"{study.sources_note}."] if study.sources_note else []
    if len(study.categories) < len(bank.categories):
        notes.append(f"This report reads {len(study.categories)} of the bank's {len(bank.categories)} categories.")
    return Section("bank", "What this bank is", text, parts, notes)


def doses_figure(bank: VectorBank) -> Drawn:
    """The dose of each category, block by block, with its message."""
    title = messages.doses(bank)
    rows: list[Row] = [
        {"layer": layer, "residual_norm": float(bank.residual_norms[slot])}
        | {
            column_of(name, "layer", "residual_norm"): float(bank.doses[bank.index(name), slot])
            for name in bank.categories
        }
        for slot, layer in enumerate(bank.layers)
    ]
    return Drawn("doses_by_layer", title, lambda theme: figures.doses_by_layer(bank, title, theme), rows, rows)


def _gate_words(gate: Gate | None) -> str:
    if gate is None:
        return "The bank has no gate: by default its categories act on every prompt."
    return (
        f"The gate reads block{'s' * (len(gate.layers) > 1)} {', '.join(map(str, gate.layers))}; "
        f"it begins to open at a risk of {gate.low:.2f} and is fully open at {gate.high:.2f}."
    )


def _gate(gate: Gate) -> Table:
    words = {"pool": "harmless pool", "soundalike": "sound-alikes", "matched": "harmless counterparts"}
    unseen = {kind: f"{opened} of {count} ({percent(opened / count)})" for kind, (opened, count) in gate.unseen.items()}
    crossed = {kind: percent(gate.quality.get(f"opened_{kind}", math.nan)) for kind in ("matched", "harmful")}
    opens = {**dict.fromkeys(words, "not measured"), **unseen, **crossed}
    rows = [
        [Cell(name), Cell(f"{gate.quality[f'auroc_against_{kind}']:.3f}"), Cell(opens[kind])]
        for kind, name in words.items()
        if f"auroc_against_{kind}" in gate.quality
    ]
    if "opened_harmful" in gate.quality:
        rows.append([Cell("harmful prompts"), Cell("–"), Cell(opens["harmful"])])
    title = (
        "How well the gate reads: cross-validated when the bank was fitted; how often it opens for the pool and sound-alikes, "
        "on prompts that took no part in the fit (tune split)"
    )
    return Table("gate", title, ("prompts", "AUROC of risk", "opens for"), rows, gate.quality)


# -- categories --------------------------------------------------------------------------------------------------------


def _cosine_rows(found: CosineMap, matrix: Sequence[Sequence[float]]) -> list[Row]:
    return [
        {
            "direction": found.names[row],
            **{column_of(found.names[column], "direction"): round(matrix[row][column], 4) for column in found.order},
        }
        for row in found.order
    ]


def cosine_figure(found: CosineMap, name: str, *, before: bool = False, random: bool = False) -> Drawn:
    """The map of cosines, with its message."""
    title = messages.cosines(found, before=before, random=random)
    if random:  # what bears a category's name here is nothing of it
        names = [
            f"random for {category_title(one)}" if kind == "category" else one
            for one, kind in zip(found.names, found.kinds, strict=True)
        ]
        kinds = ["random" if kind == "category" else kind for kind in found.kinds]
        found = replace(found, names=tuple(names), kinds=tuple(kinds))
    matrix = found.before_shrinkage if before else found.cosines
    return Drawn(
        name,
        title,
        lambda theme: figures.cosine_map(found, title, theme, before_shrinkage=before),
        found.to_json(),
        _cosine_rows(found, matrix or ()) if matrix else (),
        "Cosines averaged over the blocks that act, in the order of the clustering.",
    )


def separation_rows(found: Separation) -> list[Row]:
    """A row a block."""
    return [
        {
            "block": layer,
            "auroc": round(found.auroc[slot], 4),
            **{
                f"{kind}_{edge}": round(getattr(band, edge)[slot], 4)
                for kind, band in (("swapped", found.shuffled), ("random", found.random))
                for edge in ("mean", "low", "high")
            },
        }
        for slot, layer in enumerate(found.layers)
    ]


def _separation(study: Study, name: str) -> Drawn:
    found = study.separations[name]
    title = messages.separation(name, found)
    acting = study.bank.acting_layers(name)
    return Drawn(
        file_name("separation", name),
        title,
        lambda theme: figures.separation_by_layer(study.separations, title, theme, highlight=name, acting=acting),
        found.to_json(),
        separation_rows(found),
        f"{found.harmful} harmful prompts against {found.harmless} harmless ones, {found.folds} folds by subtopic.",
    )


def categories_section(study: Study) -> Section:
    """Cosines, clusters, and which blocks separate each category."""
    cosines = [cosine_figure(study.cosines, "cosines")]
    if study.cosines.before_shrinkage is not None:
        cosines.append(cosine_figure(study.cosines, "cosines_before_shrinkage", before=True))
    text = [
        "How alike the directions are."
        + (
            ""
            if study.cosines.before_shrinkage is None
            else " Fitting moved them towards what categories share, so the map before that says more about the categories, "
            "and the other about what steering does."
        ),
    ]
    if len(study.bank.categories) > 1:
        text.append(_clusters(study.cosines))
    if study.refusal is not None:
        text.append(_refusal(study.refusal, study.cosines))
    if study.separations:
        clear = [name for name in study.separations if messages.stands_out(study.separations[name])]
        text.append(
            f"Harmful prompts against {against(study)}, block by block: {len(clear)} of {len(study.separations)} categories "
            "stand out beyond every draw of swapped labels."
        )
    drawn = [_separation(study, name) for name in strongest(study.separations)]
    return Section(
        "categories",
        "Categories",
        text,
        [Group(cosines), *(split(drawn, "The other {} categories, block by block") if drawn else [])],
        [*_not_kept(study.cosines), *left_out(study, "refusal", "geometry")],
    )


def _not_kept(found: CosineMap) -> list[str]:
    """That cosines before shrinkage are missing, where there should be some."""
    if not found.moved or found.before_shrinkage is not None:
        return []
    return [
        "Not shown (cosines before shrinkage): this bank was fitted before its directions were kept as the prompts gave "
        "them; fit it again."
    ]


def against(study: Study) -> str:
    """What harmful prompts were told from: their counterparts, where a category has them, else the harmless pool."""
    paired = {row.category for row in study.material.rows if row.kind == "matched"} if study.material else set()
    if not paired:
        return "the harmless pool (the subject tells too)"
    return "their counterparts" + (" (or the pool, where there are none)" if paired != set(study.separations) else "")


def _refusal(read: RefusalDirection, found: CosineMap) -> str:
    """Whether steering pushes the model towards declining as well, or away from it."""
    what = (
        f"The refusal direction points from the {read.answered} harmful prompts that the unsteered model answered towards the "
        f"{read.declined} that it declined."
    )
    row = found.cosines[found.kinds.index("extra")]
    own = [(value, name) for value, name, kind in zip(row, found.names, found.kinds, strict=True) if kind == "category"]
    low, high = min(own), max(own)
    return (
        f"{what} The categories' cosines with it lie between {signed(low[0])} ({category_title(low[1])}) and "
        f"{signed(high[0])} ({category_title(high[1])}): above 0, steering "
        "pushes towards declining as well; below 0, away from it."
    )


def _clusters(found: CosineMap) -> str:
    """The two categories that join first, and how close."""
    merge = next((one for one in found.merges if all(found.kinds[index] == "category" for index in one.members)), None)
    if merge is None:
        return "No two categories join before another direction does."
    names = " and ".join(category_title(found.names[index]) for index in merge.members)
    when = " before shrinkage" if found.before_shrinkage is not None else ""
    return f"The first to join are {names}, at a cosine of {1 - merge.distance:.2f}{when}."


# -- geometry ----------------------------------------------------------------------------------------------------------


def projection_figure(name: str, found: Projection, title: str, **options: Any) -> Drawn:
    """Prompts of one block, before and after steering."""
    data = found.to_json()
    flat = [
        {
            "row": point["row"],
            "kind": point["kind"],
            "category": point["category"],
            **{
                f"{plane}_{axis}": None if point[plane] is None else point[plane][place]
                for plane in ("pca", "pca_after", "lda", "lda_after")
                for place, axis in enumerate("xy")
            },
        }
        for point in data["points"]
    ]
    return Drawn(
        name,
        title,
        lambda theme: figures.projection(found, title, theme, **options),
        data,
        flat,
        slide=f"block {found.layer}",
    )


def geometry_section(study: Study) -> Section:
    """LDA and PCA before and after steering, block by block, and one category at a time."""
    if not study.projections:
        return Section("geometry", "Geometry", (), (), left_out(study, "geometry"))
    last = study.projections[-1]
    acting = max((layer for name in study.categories for layer in study.bank.acting_layers(name)), default=last.layer)
    # Where steering has just done all it does: later blocks answer to it in ways of their own.
    shown = next((one for one in study.projections if one.layer >= acting), last)
    parts = [
        Group(
            [
                projection_figure(
                    f"lda_block_{one.layer}",
                    one,
                    messages.projection(one, study.shuffled),
                    plane="lda",
                )
                for one in study.projections
            ],
            "Harmful against harmless (LDA), on prompts the axes were not fitted on",
            "slider",
        ),
        Group(
            [
                projection_figure(f"pca_block_{one.layer}", one, messages.components(one), plane="pca")
                for one in study.projections
            ],
            "What varies most (PCA), which no label chose",
            "slider",
        ),
        Group(
            [
                projection_figure(
                    file_name("lda_of", name),
                    shown,
                    messages.category_projection(name, shown),
                    plane="lda",
                    category=name,
                )
                for name in study.categories
            ],
            f"Each category on the LDA axes of block {shown.layer}",
            "folded",
            "A category has few held-out prompts here; read its AUROC as a sketch.",
        ),
    ]
    text = [
        "A point is a prompt, at its last token. Axes are fitted on unsteered prompts and kept, so that a move is a move. "
        "Prompts of the pool are never steered here.",
        "Steering pushes along directions that separate these very prompts, so it has to move them across; what it does "
        "to answers is under Dose and response.",
    ]
    return Section("geometry", "Geometry", text, parts, left_out(study, "geometry"))


# -- tokens ------------------------------------------------------------------------------------------------------------


def _quoted(found: Lens, end: str, most: int = 6) -> str:
    tokens = getattr(found, end)[:most]
    return ", ".join(figures.visible(token.text.removeprefix(" ")) for token in tokens) or "–"


def words_figure(name: str, title: str, found: Lens) -> Drawn:
    """What steering makes more and less likely to be said first."""
    rows: list[Row] = [
        {
            "end": end,
            "token": figures.visible(token.text),
            "id": token.id,
            "kind": token.kind,
            "effect": round(token.effect, 4),
        }
        for end in ("promotes", "suppresses")
        for token in getattr(found, end)
    ]
    return Drawn(
        name,
        title,
        lambda theme: figures.tokens(
            [(token.text, token.effect) for token in found.promotes],
            [(token.text, token.effect) for token in found.suppresses],
            title,
            theme,
            unit="change of log probability (nats)",
            control=found.control_z * found.control_deviation,
        ),
        found.to_json(),
        rows,
        f"Of {found.considered} tokens likely enough to be said; passed over as no readable text: "
        f"{found.skipped_promotes + found.skipped_suppresses}.",
    )


def _lens_table(study: Study, name: str, title: str, of: Callable[[Any], Lens | None], folded: bool) -> Table:
    rows, data, unit = [], {}, ""
    for category, words in study.words.items():
        found = of(words)
        if found is None:
            continue
        data[category], unit = found.to_json(), found.unit
        steered = found is words.by_steering
        clear = messages.moves_more(found) if steered else messages.words_stand_out(found)
        own, nothing = messages.reach(found)
        rows.append(
            [
                Cell(category_title(category)),
                Cell(_quoted(found, "promotes"), wide=True),
                Cell(_quoted(found, "suppresses"), wide=True),
                Cell(number(own), f"random {number(nothing)}"),
                Cell(number(found.z), f"random {number(found.control_z)}"),
                Cell(("moves more" if steered else "stands out") if clear else "no clear difference"),
                Cell(percent(found.junk)),
            ]
        )
    heads = ("category", "more likely", "less likely", f"moved ({unit})", "z", "against random", "skipped")
    return Table(name, title, heads, rows, data, folded)


def tokens_section(study: Study) -> Section:
    """Words by steering, and by the direct lens with its control."""
    if not study.words:
        return Section("tokens", "Tokens", (), (), left_out(study, "tokens"))
    steered = {name: one.by_steering for name, one in study.words.items() if one.by_steering is not None}
    direct = [one.direct for one in study.words.values() if one.direct is not None]
    parts: list[Group | Table] = []
    text = []
    if steered:
        clear = sum(map(messages.moves_more, steered.values()))
        text.append(
            f"What steering makes more and less likely as the first word of an answer: for {clear} of {len(steered)} categories "
            f"its words move more than {messages.CLEAR:g} times as far as those of random directions of the same norm."
        )
        shared = messages.shared_words(list(steered.values()))
        text += [shared] if shared else []
        order = sorted(steered, key=lambda name: -messages.reach(steered[name])[0])
        drawn = [
            words_figure(file_name("tokens", name), messages.words(name, steered[name]), steered[name])
            for name in order
        ]
        parts += [
            _lens_table(study, "tokens_by_steering", "By steering", lambda one: one.by_steering, False),
            *split(drawn, "The other {} categories"),
        ]
    if direct:
        clear = sum(map(messages.words_stand_out, direct))
        blocks = sorted({one.block for one in study.words.values()})
        said = (
            "so its words, folded away below, are what any direction would give: read nothing into them"
            if clear == 0
            else "read the others as what any direction would give"
        )
        text.append(
            f"The direct lens (direction through the final norm and the unembedding, at block "
            f"{', '.join(map(str, blocks))}) stands out for {clear} of {len(direct)} categories; {said}."
        )
        parts.append(_lens_table(study, "tokens_direct", "By the direct lens", lambda one: one.direct, True))
    notes = [
        "A word that the tokenizer splits appears by its first piece at best. z: the words shown, in standard deviations over "
        "all words considered. A random direction's words stand out as well, for they are the most extreme of many.",
        *left_out(study, "tokens"),
    ]
    return Section("tokens", "Tokens", text, parts, notes)
