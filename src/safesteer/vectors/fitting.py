"""`fit`: prompts in, a calibrated bank out. No gradients, no responses, no labels beyond which prompts are harmful.

w[c, l]    = direction(harmful prompts of c, harmless prompts)          at every layer asked for, read where `position` says:
             `last` token, `mean` of the prompt's words, `answer`: mean of the model's own unsteered answer, or
             `last+answer`: w_last / ||w_last|| + w_answer / ||w_answer||, of their mean length
             A category whose prompts have no counterparts takes the direction that the built-in pairs share:
             shared[c, l] = unit(sum over built-in categories k, k not c, of unit(w[k, l])), from `LENT` pairs of each.
shrinkage  moves w[c, l] towards what categories share: by SHRINKAGE, or as asked, towards the mean of the bank's own, those that
             take shared[c, l] left out; in a bank of fewer than `FEW` categories with pairs, and nothing asked, by
             PRIOR / (PRIOR + pairs of c) towards shared[c, l].
dose[c, l] = DOSE / number of acting layers                             default recipe: a small dose on a band of layers
           = m * ||w[c, l]|| / norm[l]                                  paper recipe: raw multiplier m, one layer
"""

from __future__ import annotations

import datetime
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch

from safesteer import taxonomy
from safesteer.activations import Position, collect
from safesteer.answers import ANSWER_TOKENS, answer_means
from safesteer.errors import PromptFileError, SafeSteerError
from safesteer.models import EncodedPrompt, Fingerprint, LoadedModel, Site, encode_all, fingerprint
from safesteer.models.files import ModelFiles
from safesteer.models.loading import EMBEDDED
from safesteer.prompts import PromptSet, builtin, builtin_categories, concatenate, harmless_pool, soundalikes
from safesteer.prompts.forms import in_form
from safesteer.prompts.sets import evenly
from safesteer.vectors.bank import VectorBank
from safesteer.vectors.directions import Method, clip_massive, direction, shrink, towards
from safesteer.vectors.gate import (
    FALSE_ALARM,
    Gate,
    Joined,
    Turns,
    TurnSource,
    check_false_alarm,
    fit_gate,
    measured,
)
from safesteer.vectors.neurons import RiskNeurons, most_selective, neuron_activations

Recipe = Literal["default", "paper"]
ReadAt = Literal["last", "mean", "answer", "last+answer"]
READ_AT: tuple[ReadAt, ...] = get_args(ReadAt)
Harmless = Literal["auto", "matched", "shared", "builtin"]

# Fractions of the depth, chosen on the tune split of the embedded model (docs/method.md).
BAND = (0.2, 0.7)  # layers whose directions are kept, so that a policy can choose among them
ACTING = (0.4, 0.7)  # layers that act by default
GATE = (0.4, 0.5, 0.6)  # layers that the gate reads
ANSWERED = 16  # prompts of a category, and as many of its counterparts, whose answers are read
ANSWERED_POOL = 64
FEW = 6  # categories with pairs under which a bank does not know well what they share, and borrows it
PRIOR = 64  # pairs of its own for which a category counts as much as what it borrows
LENT = 16  # pairs of each built-in category, for the direction that they share
# Of how many prompts of a kind a gate reads one in another form.
FORMED = {"harmful": 2, "matched": 4, "pool": 2, "soundalike": 2}
DOSE = 0.26  # total relative dose over the acting layers; `safesteer.calibration` finds one for each model
DOSE_LAST = 0.28  # of directions that are not read in answers as well: they lose the topic later
SHRINKAGE = 0.5  # how far category directions are moved towards the one they share
PAPER_LAYERS = (14 / 32, 16 / 32, 20 / 32, 25 / 32, 31 / 32)  # the layers the paper tried, of 32; the first acts


@dataclass(frozen=True)
class FitSettings:
    """How to fit; what is None is chosen by the recipe.

    `layers`: 0-based; they are read and they act. `harmless`: `matched` counterparts, the direction `shared` by the built-in
    pairs of other categories, the `builtin` pool, `auto` (matched where every prompt of a category has a counterpart, else
    shared), or a prompt set of your own. `dose`: total relative dose at strength 1. `multiplier`: raw m of the paper, instead
    of a dose. `shrinkage`: 0 (each category on its own) to 1 (one direction for all), towards what those categories of the
    bank share that have a direction of their own; None: see above. `gate`: whether to fit one. `false_alarm`: the share of
    harmless prompts for which it may open, 0 to 1. `neurons`: how many risk neurons to find for each category (from its
    matched pairs).
    """

    recipe: Recipe = "default"
    method: Method | None = None
    site: Site | None = None
    layers: tuple[int, ...] | None = None
    position: ReadAt | None = None
    harmless: Harmless | PromptSet | None = None
    dose: float | None = None
    multiplier: float | None = None
    shrinkage: float | None = None
    gate: bool | None = None
    false_alarm: float | None = None
    neurons: int = 0

    def complete(self, depth: int) -> CompleteSettings:
        """Fill in what the recipe says, for a model of `depth` blocks."""
        paper = self.recipe == "paper"
        harmless = self.harmless if self.harmless is not None else ("builtin" if paper else "auto")
        # Against prompts of another kind, answers differ by their form more than by their risk.
        unpaired = harmless == "builtin" or isinstance(harmless, PromptSet)
        position = self.position or ("mean" if paper else "last" if unpaired else "last+answer")
        if self.layers is not None:
            if not self.layers or min(self.layers) < 0 or max(self.layers) >= depth:
                raise SafeSteerError(f"layers {list(self.layers)} are not within 0 to {depth - 1} of this model")
            kept = acting = tuple(sorted(set(self.layers)))
        elif paper:
            kept = tuple(sorted({min(depth - 1, round(fraction * depth)) for fraction in PAPER_LAYERS}))
            acting = (min(depth - 1, round(PAPER_LAYERS[0] * depth)),)
        else:
            kept, acting = band(depth, *BAND), band(depth, *ACTING)
        return CompleteSettings(
            recipe=self.recipe,
            method=self.method or "mean-difference",
            site=self.site or ("attention" if paper else "residual"),
            kept_layers=kept,
            acting_layers=acting,
            position=position,
            harmless=harmless,
            dose=self.dose if self.dose is not None else (DOSE if "answer" in position else DOSE_LAST),
            multiplier=self.multiplier
            if self.multiplier is not None
            else (1.0 if paper and self.dose is None else None),
            shrinkage=self.shrinkage if self.shrinkage is not None else (0.0 if paper else SHRINKAGE),
            may_borrow=self.shrinkage is None and not paper,
            clip=not paper,
            gate=self.gate if self.gate is not None else not paper,
            false_alarm=self.false_alarm if self.false_alarm is not None else FALSE_ALARM,
            gate_layers=tuple(sorted({min(depth - 1, math.floor(fraction * depth)) for fraction in GATE})),
            neurons=self.neurons,
        )


@dataclass(frozen=True)
class CompleteSettings:
    """`FitSettings` with every choice made."""

    recipe: Recipe
    method: Method
    site: Site
    kept_layers: tuple[int, ...]
    acting_layers: tuple[int, ...]
    position: ReadAt
    harmless: Harmless | PromptSet
    dose: float
    multiplier: float | None
    shrinkage: float
    may_borrow: bool
    clip: bool
    gate: bool
    false_alarm: float
    gate_layers: tuple[int, ...]
    neurons: int


def band(depth: int, first: float, last: float) -> tuple[int, ...]:
    """The blocks between two fractions of the depth, at least one."""
    start = min(depth - 1, round(first * depth))
    return tuple(range(start, max(start, min(depth - 1, round(last * depth))) + 1))


@dataclass(frozen=True)
class Row:
    """One prompt to read: what it is (`harmful`, `matched`, `pool`, `soundalike`, `own`), and about which category.

    A row that is not `plain` stands in another form (`prompts.forms`), for the gate alone.
    """

    text: str
    kind: str
    category: str | None
    group: str
    plain: bool = True


MakeReader = Callable[["CompleteSettings", Callable[[int], None]], "Reader"]


class Source(Protocol):
    """Where directions are read: what some rows left behind at the kept layers."""

    def direction(self, name: str, harmless: str, slot: int, chosen: CompleteSettings) -> tuple[torch.Tensor, float]:
        """The direction of a category at a kept layer `[width]`, and the share of its energy that was clipped."""


class Reader(Protocol):
    """What reads prompts for a fit: a transformers model (`Here`), or the workers of vLLM (`safesteer.engines.vllm_fit`).

    Both take rows and their prompts in the same order; `layers` are 0-based.
    """

    def prompts(
        self,
        rows: Sequence[Row],
        encoded: Sequence[EncodedPrompt],
        layers: Sequence[int],
        site: Site,
        position: Position,
        turn_layers: Sequence[int] = (),
    ) -> tuple[Source, torch.Tensor, TurnSource | None]:
        """Directions in the prompts, the mean residual norm of their words at `layers`, and, of `turn_layers`, whole turns."""

    def answers(
        self, rows: Sequence[Row], encoded: Sequence[EncodedPrompt], layers: Sequence[int], site: Site
    ) -> Source:
        """Directions in the answers to the prompts."""


@dataclass(frozen=True)
class Activated:
    """A `Source` that holds activations `[layers, rows, width]`."""

    rows: Sequence[Row]
    activations: torch.Tensor

    def direction(self, name: str, harmless: str, slot: int, chosen: CompleteSettings) -> tuple[torch.Tensor, float]:
        """See `Source`."""
        values = self.activations[slot]
        harmful = [row.kind == "harmful" and row.category == name for row in self.rows]
        against = [row.kind == harmless and row.category in (name, None) for row in self.rows]
        sides = values[torch.tensor(harmful)], values[torch.tensor(against)]
        # Counterparts stand in the order of their prompts; other harmless prompts belong to none.
        vector = direction(chosen.method, *sides, paired=harmless == "matched")
        if not chosen.clip:
            return vector, 0.0
        result = clip_massive(vector, values.abs().mean(dim=0))
        return result.direction, round(result.share, 4)


@dataclass(frozen=True)
class Here:
    """A `Reader`: a transformers model in this process. `progress` is called with the number of prompts just read."""

    loaded: LoadedModel
    progress: Callable[[int], None] = lambda count: None

    def prompts(
        self,
        rows: Sequence[Row],
        encoded: Sequence[EncodedPrompt],
        layers: Sequence[int],
        site: Site,
        position: Position,
        turn_layers: Sequence[int] = (),
    ) -> tuple[Source, torch.Tensor, TurnSource | None]:
        """See `Reader`."""
        sites: tuple[Site, ...] = tuple(dict.fromkeys([site, *(["residual"] if turn_layers else [])]))  # type: ignore[list-item]
        every = sorted({*layers, *turn_layers})
        read = collect(self.loaded, encoded, every, sites, (position,), turn_layers=turn_layers, progress=self.progress)
        kept = [read.layers.index(layer) for layer in layers]
        turns = Turns(read.turns, read.words) if turn_layers else None
        return Activated(rows, read.values[site, position][kept]), read.residual_norms[kept], turns

    def answers(
        self, rows: Sequence[Row], encoded: Sequence[EncodedPrompt], layers: Sequence[int], site: Site
    ) -> Source:
        """See `Reader`."""
        return Activated(rows, answer_means(self.loaded, encoded, layers, site, progress=self.progress))


@dataclass(frozen=True)
class Subject:
    """What a fit must know of its model, wherever that runs."""

    name: str
    """`embedded`, a hub id, or the absolute path of a folder."""
    given: str
    revision: str | None
    tokenizer: Any
    depth: int
    width: int
    fingerprint: Fingerprint

    @classmethod
    def of(cls, model: LoadedModel | ModelFiles) -> Subject:
        """Of a model that is loaded, or of its files."""
        given = name = model.name
        folder = Path(given).expanduser()
        if name != EMBEDDED and folder.is_dir():
            name = str(folder.resolve())
        if isinstance(model, ModelFiles):
            print_of, depth, width = model.fingerprint(), model.depth, model.width
            return cls(name, given, model.revision, model.tokenizer, depth, width, print_of)
        revision = model.revision or getattr(model.model.config, "_commit_hash", None)
        layout = model.layout
        return cls(name, given, revision, model.tokenizer, layout.depth, layout.width, fingerprint(model))


def fit(
    model: LoadedModel | ModelFiles,
    categories: Sequence[str] | None = None,
    prompts: PromptSet | None = None,
    settings: FitSettings | None = None,
    *,
    reader: MakeReader | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> VectorBank:
    """Fit a bank.

    `prompts` are your own harmful prompts, each with its category; `categories` restricts them, or names built-in ones.
    With neither, every built-in category is fitted. Only prompts of the `fit` split are read, and to measure the gate the
    harmless ones of the `tune` split. `reader(settings, count)` makes
    what reads them, which calls `count` with the number of prompts just read; a model that is loaded reads them itself.
    `progress(done, total)` counts prompts. Raises `SafeSteerError` (or a subclass) with one sentence on what to do.
    """
    subject = Subject.of(model)
    chosen = (settings or FitSettings()).complete(subject.depth)
    for what, value in (("dose", chosen.dose), ("multiplier", chosen.multiplier)):
        if value is not None and not 0 < value < math.inf:
            raise SafeSteerError(f"the {what} {value:g} must be a number above 0")
    check_false_alarm(chosen.false_alarm)
    if not 0 <= chosen.shrinkage <= 1:
        raise SafeSteerError(f"shrinkage {chosen.shrinkage:g} is not within 0 to 1")
    if isinstance(model, LoadedModel):
        model.layout.module(chosen.site, 0)
        if chosen.neurons:
            model.layout.projection(0)
    elif chosen.neurons:
        raise SafeSteerError("risk neurons are found by --engine transformers alone; leave out --neurons")
    sets = harmful_sets(categories, prompts)
    rows = _rows(sets, chosen)
    formed = _formed(rows) if chosen.gate else []
    unseen = _unseen() if chosen.gate else []
    spoken = _answered(rows, sets, chosen) if "answer" in chosen.position else []
    lent = _lent(sets, chosen)
    paired = _paired(sets) if chosen.neurons else {}
    asked = (
        len(rows)
        + len(formed)
        + len(unseen)
        + len(spoken)
        + len(lent) * ((chosen.position != "answer") + ("answer" in chosen.position))
    )
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(done, asked + 2 * sum(map(len, paired.values())))

    if reader is None:
        if not isinstance(model, LoadedModel):
            raise SafeSteerError("files alone read no prompts; give a reader, or load the model")
        reading: Reader = Here(model, count)
    else:
        reading = reader(chosen, count)
    position: Position = "mean" if chosen.position == "mean" else "last"
    layers, site = chosen.kept_layers, chosen.site
    gate_layers = chosen.gate_layers if chosen.gate else ()
    encoded = encode_all(model, [row.text for row in rows], room=ANSWER_TOKENS if spoken else 0)
    read, norms, turns = reading.prompts(rows, encoded, layers, site, position, gate_layers)
    sources = [read] if chosen.position != "answer" else []
    if spoken:
        sources.append(
            reading.answers([rows[index] for index in spoken], [encoded[index] for index in spoken], layers, site)
        )
    encoded_lent = encode_all(model, [row.text for row in lent])
    lenders: list[Source] = []
    if lent and chosen.position != "answer":
        lenders.append(reading.prompts(lent, encoded_lent, layers, site, position)[0])
    if lent and "answer" in chosen.position:
        lenders.append(reading.answers(lent, encoded_lent, layers, site))
    gate = None
    if turns is not None:
        encoded_forms = encode_all(model, [row.text for row in formed])
        forms = reading.prompts(formed, encoded_forms, gate_layers, "residual", "last", gate_layers)[2]
        gate = _gate([*rows, *formed], Joined([part for part in (turns, forms) if part is not None]), chosen)
        encoded_unseen = encode_all(model, [row.text for row in unseen])
        others = reading.prompts(unseen, encoded_unseen, gate_layers, "residual", "last", gate_layers)[2]
        if others is not None:
            gate = measured(gate, others, [row.kind for row in unseen])
    neurons = None
    if isinstance(model, LoadedModel) and chosen.neurons:
        neurons = _neurons(model, paired, chosen.neurons, count)
    return replace(_assemble(subject, sets, sources, lenders, norms, chosen, gate), neurons=neurons)


def harmful_sets(categories: Sequence[str] | None, prompts: PromptSet | None) -> dict[str, PromptSet]:
    """Category -> its harmful prompts of the fit split."""
    if prompts is None:
        available = builtin_categories()
        names = [taxonomy.resolve(name, available) for name in categories] if categories else list(available)
        return {name: builtin(name).split("fit") for name in dict.fromkeys(names)}
    if any(prompt.category is None for prompt in prompts):
        raise SafeSteerError(
            f"{prompts.name or 'the prompts'}: some prompts name no category; add one, or give --category"
        )
    own = prompts.categories
    sets: dict[str, PromptSet] = {}
    for name in categories or own:
        known = taxonomy.resolve(name, dict.fromkeys([*own, *builtin_categories()]))
        sets[known] = (prompts.of(known) if known in own else builtin(known)).split("fit")
        if not len(sets[known]):
            raise PromptFileError(f"{prompts.name or 'the prompts'}: {known} has no prompt in the fit split")
    if not sets:
        raise PromptFileError(f"{prompts.name or 'the prompts'}: holds no prompt")
    for name in set(sets) & set(taxonomy.RESERVED):
        raise SafeSteerError(
            f"a category cannot be named {name}; name the risk, and give harmless prompts as --harmless or matched"
        )
    return sets


def _source(name: str, prompts: PromptSet, chosen: CompleteSettings) -> str:
    """What stands against a category: harmless prompts (`matched`, `pool`, `own`), or other categories' pairs (`shared`)."""
    if isinstance(chosen.harmless, PromptSet):
        return "own"
    if chosen.harmless == "matched" and not prompts.fully_matched:
        raise SafeSteerError(f"{name}: not every prompt has a `matched` counterpart; use --harmless shared or a file")
    if chosen.harmless == "builtin":
        return "pool"
    return "matched" if chosen.harmless != "shared" and prompts.fully_matched else "shared"


def _rows(sets: dict[str, PromptSet], chosen: CompleteSettings) -> list[Row]:
    rows: list[Row] = []
    sources = {name: _source(name, prompts, chosen) for name, prompts in sets.items()}
    for name, prompts in sets.items():
        for index, prompt in enumerate(prompts):
            group = f"{name}/{prompt.subtopic or index}"
            rows.append(Row(prompt.text, "harmful", name, group))
            if prompt.matched is not None and (sources[name] == "matched" or chosen.gate):
                rows.append(Row(prompt.matched, "matched", name, group))
    if chosen.gate or "pool" in sources.values():
        rows += [Row(prompt.text, "pool", None, f"pool/{prompt.subtopic}") for prompt in harmless_pool().split("fit")]
    if chosen.gate:
        rows += [Row(p.text, "soundalike", None, f"soundalike/{p.identifier}") for p in soundalikes().split("fit")]
    if isinstance(chosen.harmless, PromptSet):
        if not len(chosen.harmless):
            raise PromptFileError(f"{chosen.harmless.name}: holds no prompt")
        rows += [Row(p.text, "own", None, f"own/{p.subtopic or i}") for i, p in enumerate(chosen.harmless)]
    return rows


def _lent(sets: dict[str, PromptSet], chosen: CompleteSettings) -> list[Row]:
    """Pairs of the built-in categories, where a category of the bank borrows the direction they share."""
    if not _borrowed(sets, chosen):
        return []
    rows: list[Row] = []
    for name in builtin_categories():
        pairs = [prompt for prompt in builtin(name).split("fit") if prompt.matched is not None]
        for prompt in evenly(pairs, LENT):
            group = f"{name}/{prompt.subtopic}"
            rows += [Row(prompt.text, "harmful", name, group), Row(prompt.matched or "", "matched", name, group)]
    return rows


def _answered(rows: Sequence[Row], sets: dict[str, PromptSet], chosen: CompleteSettings) -> list[int]:
    """The rows whose answers are read: evenly spread over each category's prompts and over what stands against them."""
    found: set[int] = set()
    for name, prompts in sets.items():
        harmless = _source(name, prompts, chosen)
        if harmless == "shared":
            continue
        for kind in ("harmful", harmless):
            own = [i for i, row in enumerate(rows) if row.kind == kind and row.category in (name, None)]
            found.update(evenly(own, ANSWERED if own and rows[own[0]].category else ANSWERED_POOL))
    return sorted(found)


def joined(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One direction of several `[width]`: the sum of their unit vectors, as long as they are on average.

    Activations averaged over an answer differ by less than those of one token; each counts by its direction alone.
    """
    if len(vectors) == 1:
        return vectors[0]
    lengths = torch.stack([vector.norm() for vector in vectors])
    total = torch.stack([torch.nn.functional.normalize(vector, dim=0) for vector in vectors]).sum(dim=0)
    return torch.nn.functional.normalize(total, dim=0) * lengths.mean()


def _assemble(
    subject: Subject,
    sets: dict[str, PromptSet],
    sources: Sequence[Source],
    lenders: Sequence[Source],
    norms: torch.Tensor,
    chosen: CompleteSettings,
    gate: Gate | None,
) -> VectorBank:
    unshrunk = torch.zeros(len(sets), len(chosen.kept_layers), subject.width)
    directions = unshrunk.clone()
    doses = torch.zeros(len(sets), len(chosen.kept_layers))
    clipped: dict[str, float] = {}
    borrowed = _borrowed(sets, chosen)
    own = [index for index, name in enumerate(sets) if name not in borrowed]
    lent = {
        (other, slot): _read_direction(lenders, other, "matched", slot, chosen)
        for other in (builtin_categories() if borrowed else ())
        for slot in range(len(chosen.kept_layers))
    }
    for index, (name, prompts) in enumerate(sets.items()):
        harmless = _source(name, prompts, chosen)
        for slot, layer in enumerate(chosen.kept_layers):
            shares = [0.0]
            if borrowed.get(name, 0.0) < 1:
                unshrunk[index, slot], share = _read_direction(sources, name, harmless, slot, chosen)
                shares.append(share)
            if name in borrowed:
                found = [lent[other, slot] for other in builtin_categories() if other != name]
                common = joined([vector for vector, _ in found])
                shares += [share for _, share in found]
                if borrowed[name] == 1:
                    unshrunk[index, slot] = common
                directions[index, slot] = towards(unshrunk[index, slot], common, borrowed[name])
            if layer in chosen.acting_layers and chosen.clip:
                clipped[name] = max(clipped.get(name, 0.0), *shares)
    for slot, layer in enumerate(chosen.kept_layers):
        directions[own, slot] = shrink(unshrunk[own, slot], chosen.shrinkage)
        if layer not in chosen.acting_layers:
            continue
        if chosen.multiplier is not None:
            doses[:, slot] = chosen.multiplier * directions[:, slot].norm(dim=-1) / norms[slot]
        else:
            doses[:, slot] = chosen.dose / len(chosen.acting_layers)
    return VectorBank(
        categories=tuple(sets),
        layers=chosen.kept_layers,
        site=chosen.site,
        directions=directions,
        doses=doses,
        residual_norms=norms,
        model=subject.fingerprint,
        gate=gate,
        unshrunk=unshrunk,
        provenance=_provenance(subject, sets, chosen, clipped),
    )


def _borrowed(sets: dict[str, PromptSet], chosen: CompleteSettings) -> dict[str, float]:
    """How far (0 to 1) each category is moved towards what the built-in pairs of others share; empty: none is."""
    sources = {name: _source(name, prompts, chosen) for name, prompts in sets.items()}
    paired = list(sources.values()).count("matched")
    amounts = {name: 1.0 for name, source in sources.items() if source == "shared"}
    if chosen.may_borrow and paired < FEW:
        amounts |= {name: PRIOR / (PRIOR + len(sets[name])) for name, source in sources.items() if source == "matched"}
    return amounts


def _read_direction(
    sources: Sequence[Source], name: str, harmless: str, slot: int, chosen: CompleteSettings
) -> tuple[torch.Tensor, float]:
    """One category's direction at a kept layer from all places where it is read, and the largest share that was clipped."""
    found = [source.direction(name, harmless, slot, chosen) for source in sources]
    return joined([vector for vector, _ in found]), max(share for _, share in found)


def _paired(sets: dict[str, PromptSet]) -> dict[str, list[tuple[str, str]]]:
    """Each category's harmful prompts and their counterparts. Raises `SafeSteerError` for a category without two pairs."""
    found = {
        name: [(prompt.text, prompt.matched) for prompt in prompts if prompt.matched is not None]
        for name, prompts in sets.items()
    }
    for name, pairs in found.items():
        if len(pairs) < 2:
            raise SafeSteerError(
                f"{name}: risk neurons need prompts with `matched` counterparts; add some or leave out --neurons"
            )
    return found


def _neurons(
    loaded: LoadedModel, paired: dict[str, list[tuple[str, str]]], number: int, count: Callable[[int], None]
) -> RiskNeurons:
    parts = []
    for pairs in paired.values():
        texts = [harmful for harmful, _ in pairs] + [matched for _, matched in pairs]
        values = neuron_activations(loaded, encode_all(loaded, texts), progress=count)
        parts.append(most_selective([v[: len(pairs)] for v in values], [v[len(pairs) :] for v in values], number))
    layers, indices, targets, found = (torch.stack(column) for column in zip(*parts, strict=True))
    return RiskNeurons(layers, indices, targets, found)


def _formed(rows: Sequence[Row]) -> list[Row]:
    """Some rows of each kind again, in one form after the other."""
    formed: list[Row] = []
    for kind, step in FORMED.items():
        chosen = [row for row in rows if row.kind == kind][::step]
        formed += [replace(row, text=in_form(row.text, number), plain=False) for number, row in enumerate(chosen)]
    return formed


def _unseen() -> list[Row]:
    """Harmless prompts of the tune split, which choose nothing here: on them a gate is measured."""
    kinds = {"pool": harmless_pool(), "soundalike": soundalikes()}
    return [
        Row(prompt.text, kind, None, f"{kind}/{prompt.identifier}")
        for kind, texts in kinds.items()
        for prompt in texts.split("tune")
    ]


def _gate(rows: Sequence[Row], turns: TurnSource, chosen: CompleteSettings) -> Gate:
    return fit_gate(
        turns,
        chosen.gate_layers,
        labels=[row.category for row in rows],
        harmful=[row.kind == "harmful" for row in rows],
        groups=[row.group for row in rows],
        kinds=["pool" if row.kind == "own" else row.kind for row in rows],
        plain=[row.plain for row in rows],
        false_alarm=chosen.false_alarm,
    )


def package_version(name: str, absent: str = "unknown") -> str:
    """The version of an installed package, or `absent`."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return absent


def _provenance(
    subject: Subject, sets: dict[str, PromptSet], chosen: CompleteSettings, clipped: dict[str, float]
) -> dict[str, Any]:
    harmless = chosen.harmless
    borrowed = _borrowed(sets, chosen)
    return {
        "model": subject.name,
        **({} if subject.given == subject.name else {"model_as_given": subject.given}),
        "revision": subject.revision,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "recipe": chosen.recipe,
        "method": chosen.method,
        "position": chosen.position,
        "site": chosen.site,
        "acting_layers": list(chosen.acting_layers),
        "multiplier": chosen.multiplier,
        "shrinkage": chosen.shrinkage if len(borrowed) < len(sets) else None,  # of those that borrow nothing
        "prompts": {
            name: {
                "source": prompts.name,
                "count": len(prompts),
                "digest": prompts.digest(),
                "harmless": _source(name, prompts, chosen),
                "borrowed": round(borrowed.get(name, 0.0), 4),
            }
            for name, prompts in sets.items()
        },
        "harmless": harmless.name if isinstance(harmless, PromptSet) else harmless,
        "harmless_digest": harmless.digest()
        if isinstance(harmless, PromptSet)
        else concatenate([harmless_pool(), soundalikes()]).digest(),
        "massive_share_clipped": clipped,
        "versions": {
            name: package_version(name) for name in ("safesteer", "torch", "transformers", "numpy", "safetensors")
        },
    }
