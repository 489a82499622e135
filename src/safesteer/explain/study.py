"""All that is found out about a bank, for a report; each part is read beside what nothing looks like.

    explain_bank(model, bank) = cosines, separation by block, projections, tokens, risk neurons, doses, accounts of readings
                              + the same for random directions and swapped labels

Directions are read on prompts of the fit split, which the bank was fitted on too: separation and projections hold prompts out
again for themselves. Tokens, answers, doses and accounts are read on the tune split, which no direction was fitted on.

A stage that was left out, or that this model or bank cannot give, stands in `left_out` with the reason; it is never passed over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from safesteer.calibration import chosen_prompts
from safesteer.errors import SafeSteerError, need
from safesteer.explain import causal as held
from safesteer.explain import doses as dosing
from safesteer.explain import geometry, lens
from safesteer.explain import neurons as selective
from safesteer.explain.attribution import Attribution, attribute
from safesteer.explain.doses import DoseResponse, LayerEffects
from safesteer.explain.geometry import CosineMap, Material, Projection, Separation
from safesteer.explain.lens import Lens
from safesteer.explain.neurons import NeuronView
from safesteer.explain.sources import Sources
from safesteer.judges.base import Judge, in_sample, in_sample_text
from safesteer.models import LoadedModel
from safesteer.models.layout import written
from safesteer.prompts import PromptSet, builtin, builtin_categories, harmless_pool
from safesteer.prompts.sets import evenly
from safesteer.refusal import RefusalDirection, refusal_direction, steps
from safesteer.vectors import VectorBank
from safesteer.vectors.controls import randomised

Stage = Literal["refusal", "geometry", "tokens", "neurons", "causal", "doses", "attribution"]
STAGES: tuple[Stage, ...] = get_args(Stage)

SLIDES = 6  # blocks whose projections are kept: every picture makes the page longer
SHUFFLES = 4  # projections of each block with swapped labels: together they say how far an LDA axis gets on nothing
TYPICAL = 4  # harmless prompts whose final states the direct lens is read at
STRENGTHS = (0.0, 0.5, 1.0, 2.0)
NAMED = 3  # neurons of a category: the words of each are another reading of the model
WORDS = 10  # at either end of a lens
REFUSALS = 192  # harmful prompts among which those are looked for that the model declines

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StudySettings:
    """How much is read.

    `most`: pairs of a category for geometry and neurons. `worded`: harmful prompts of a category for `tokens`. `answered`:
    harmful prompts, of all categories together, that are answered at each dose and with neurons held; `placed`: those for which
    the dose is placed at one block after the other: enough for the best of thirty blocks to pass a test. `harmless`: pool prompts
    for the divergence, most of which the gate leaves at 0. `without`: stages to leave out.
    """

    most: int = 12
    worded: int = 2
    answered: int = 12
    placed: int = 24
    harmless: int = 48
    max_new_tokens: int = 48
    seed: int = 0
    without: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class Words:
    """What a category's direction writes: by steering, and by the direct lens at its last acting `block` (None: `left_out`)."""

    by_steering: Lens | None
    direct: Lens | None
    block: int


@dataclass(frozen=True)
class Account:
    """The readings of a harmful prompt, and of its harmless counterpart where it has one."""

    prompt: str
    harmful: Attribution
    matched_prompt: str | None
    matched: Attribution | None


@dataclass(frozen=True)
class Nothing:
    """The same figures of what means nothing: random directions of equal norm, and labels swapped within pairs.

    `category`: the one whose labels were swapped for `separation`.
    """

    cosines: CosineMap
    category: str = ""
    separation: Separation | None = None
    projection: Projection | None = None
    tokens: Lens | None = None


@dataclass(frozen=True)
class Study:
    """All findings. Stages that are None or empty stand in `left_out`, stage -> why. `seconds`: stage -> wall time.

    `projections` are those of `SLIDES` blocks; `shuffled`: the AUROC of the LDA axis with labels swapped, each draw at each of
    those blocks.
    """

    bank: VectorBank
    model: str
    depth: int
    categories: tuple[str, ...]
    settings: StudySettings
    sources_note: str
    cosines: CosineMap
    nothing: Nothing
    material: Material | None = None
    separations: dict[str, Separation] = field(default_factory=dict)
    projections: tuple[Projection, ...] = ()
    shuffled: tuple[float, ...] = ()
    words: dict[str, Words] = field(default_factory=dict)
    neurons: NeuronView | None = None
    causal: held.CausalCheck | None = None
    refusal: RefusalDirection | None = None
    doses: DoseResponse | None = None
    layers: LayerEffects | None = None
    accounts: dict[str, Account] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data; activations are left out."""
        return {
            "model": self.model,
            "depth": self.depth,
            "categories": list(self.categories),
            "digest": self.bank.digest(),
            "settings": {**vars(self.settings), "without": list(self.settings.without)},
            "note": self.sources_note,
            "cosines": self.cosines.to_json(),
            "refusal": self.refusal and {"declined": self.refusal.declined, "answered": self.refusal.answered},
            "prompts": _plain(self.material),
            "separation": {name: one.to_json() for name, one in self.separations.items()},
            "projections": [one.to_json() for one in self.projections],
            "shuffled": [round(value, 4) for value in self.shuffled],
            "tokens": {
                name: {"by_steering": _plain(one.by_steering), "direct": _plain(one.direct), "block": one.block}
                for name, one in self.words.items()
            },
            "neurons": _plain(self.neurons),
            "causal": _plain(self.causal),
            "doses": _plain(self.doses),
            "layers": _plain(self.layers),
            "attribution": {
                name: {
                    "prompt": one.prompt,
                    "harmful": one.harmful.to_json(),
                    "matched_prompt": one.matched_prompt,
                    "matched": _plain(one.matched),
                }
                for name, one in self.accounts.items()
            },
            "nothing": {name: one if isinstance(one, str) else _plain(one) for name, one in vars(self.nothing).items()},
            "left_out": self.left_out,
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }


def _plain(found: Any) -> Any:
    return None if found is None else found.to_json()


def explain_bank(
    loaded: LoadedModel,
    bank: VectorBank,
    judge: Judge,
    found: Sources,
    settings: StudySettings | None = None,
    *,
    force: Collection[str] = (),
    progress: Progress = lambda stage, done, total: None,
) -> Study:
    """Find out all of it, for the categories of `found` (see `sources`). `progress(stage, done, total)`.

    Raises `FingerprintMismatchError` for a bank of another model (unless `force`).
    """
    need("explain", "scipy")
    bank.check(loaded, force)
    work = _Work(loaded, bank, judge, found, settings or StudySettings(), force, progress)
    for stage in STAGES:
        work.run(stage)
    refusal: RefusalDirection | None = work.done.get("refusal")
    extra = None if refusal is None else {"refusal": refusal.directions}
    return Study(
        bank=bank,
        model=loaded.name,
        depth=loaded.layout.depth,
        categories=tuple(found.read),
        settings=work.settings,
        sources_note="; ".join(filter(None, (found.note, work.in_sample()))),
        cosines=geometry.cosine_map(bank, extra, seed=work.settings.seed),
        nothing=Nothing(geometry.cosine_map(work.control, seed=work.settings.seed), **work.nothing),
        left_out=work.left_out,
        seconds=work.seconds,
        **work.done,
    )


class _Work:
    """The stages of one study; each puts its findings into `done` and `nothing`, under the names of the fields."""

    def __init__(
        self,
        loaded: LoadedModel,
        bank: VectorBank,
        judge: Judge,
        found: Sources,
        settings: StudySettings,
        force: Collection[str],
        progress: Progress,
    ) -> None:
        self.loaded, self.bank, self.judge, self.found = loaded, bank, judge, found
        self.settings, self.force, self.progress = settings, force, progress
        self.control = randomised(bank, settings.seed)
        self.done: dict[str, Any] = {}
        self.nothing: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.pairs_read: dict[str, selective.PairReading] | None = None

    def run(self, stage: Stage) -> None:
        """One stage, or the reason why there is none."""
        if stage in self.settings.without:
            self.left_out[stage] = "it was left out on request (--without)"
            return
        began = time.perf_counter()
        try:
            getattr(self, f"_{stage}")()
        except SafeSteerError as error:
            self.left_out[stage] = str(error)
        self.seconds[stage] = time.perf_counter() - began

    def in_sample(self) -> str:
        """What is to be said of a judge that knows the prompts asked; empty where it judged none, or none of these."""
        judged = {name: one for name, one in self.done.items() if name in ("causal", "doses")}
        count = in_sample(self.judge, (one.text for own in self.found.asked.values() for one in own)) if judged else 0
        return in_sample_text(self.judge.name, count).rstrip(".")

    def _counting(self, label: str, total: int) -> Callable[[int], None]:
        done = 0
        self.progress(label, done, total)

        def more(count: int) -> None:
            nonlocal done
            done += count
            self.progress(label, done, total)

        return more

    def _texts(self, total: int, names: Sequence[str] | None = None) -> dict[str, list[str]]:
        """About `total` prompts, as many of each category; of evenly spread categories where there are more of these."""
        every = list(self.found.asked if names is None else names)
        chosen = [every[index * len(every) // total] for index in range(total)] if total < len(every) else every
        count = -(-total // len(chosen))
        return {name: [one.text for one in evenly(self.found.asked[name].prompts, count)] for name in chosen}

    def _paired(self, note: str) -> dict[str, PromptSet]:
        """Categories with two pairs or more; the others are named in `left_out` under `note`."""
        pairs = {name: [one for one in own if one.matched is not None] for name, own in self.found.read.items()}
        without = [name for name, own in pairs.items() if len(own) < 2]
        if without:
            self.left_out[note] = f"{', '.join(without)}: no harmless counterparts, so nothing to tell neurons by"
        return {name: PromptSet(tuple(own), name) for name, own in pairs.items() if len(own) >= 2}

    def _refusal(self) -> None:
        # A small bank's own prompts are too few to be declined often enough; what declines is the model, not the category.
        every = {name: builtin(name).split("fit") for name in builtin_categories()} | self.found.read
        texts = [text for own in chosen_prompts(every, REFUSALS).values() for text in own]
        more = self._counting("Looking for refusals", steps(len(texts)))
        self.done["refusal"] = refusal_direction(self.loaded, self.bank, texts, progress=more)

    def _geometry(self) -> None:
        most, seed = self.settings.most, self.settings.seed
        material = geometry.collect_for_explain(
            self.loaded,
            self.bank,
            self.found.read,
            most=most,
            force=self.force,
            progress=lambda done, total: self.progress("Reading prompts", done, total),
        )
        names = material.categories
        more = self._counting("Separating categories", len(names) + SLIDES)
        separations = {}
        for name in names:
            try:
                separations[name] = geometry.separation_of(material, name, seed=seed)
            except SafeSteerError as error:
                self.left_out[f"geometry, {name}"] = str(error)
            more(1)
        if not separations:
            raise SafeSteerError("no category has prompts enough to see how far it stands apart")
        first = max(separations, key=lambda name: max(separations[name].auroc))
        self.done |= {"material": material, "separations": separations}
        self.nothing |= {"category": first, "separation": _swapped_separation(material, first, seed)}
        blocks = [material.layers[place] for place in _places(len(material.layers), SLIDES)]
        slots = [material.slot(block) for block in blocks]
        kept = replace(material, layers=tuple(blocks), before=material.before[slots], after=material.after[slots])
        shuffled = []
        for place, block in enumerate(blocks):
            # Draws of their own at each block, so that all together are a control of more than a few.
            draws = range(seed + place * SHUFFLES, seed + (place + 1) * SHUFFLES)
            found = [geometry.project(kept, block, shuffle=draw) for draw in draws]
            shuffled += [one.auroc for one in found]
            self.nothing["projection"] = found[0]
            more(1)
        self.done |= {"projections": tuple(geometry.projections(kept)), "shuffled": tuple(shuffled)}

    def _tokens(self) -> None:
        texts, seed = self._texts(self.settings.worded * len(self.found.asked)), self.settings.seed
        typical = harmless_pool().texts[:TYPICAL]
        more = self._counting("Reading tokens", len(texts) + 1)
        words: dict[str, Words] = {}
        why: dict[str, str] = {}

        def attempt(kind: str, read: Callable[[], Lens]) -> Lens | None:
            # What one lens cannot show is no reason to leave out the other.
            if kind in why:
                return None
            try:
                return read()
            except SafeSteerError as error:
                why[kind] = str(error)
                return None

        def by_steering(bank: VectorBank, name: str) -> Lens:
            return lens.by_steering(self.loaded, bank, name, texts[name], WORDS, seed=seed, force=self.force)

        endings: list[lens.Ending] = []

        def direct(name: str, block: int) -> Lens:
            if not endings:
                endings.append(lens.Ending(self.loaded, typical))
            direction = self.bank.directions[self.bank.index(name), self.bank.layers.index(block)]
            return lens.direct(self.loaded, direction, WORDS, ending=endings[0], seed=seed)

        for name in texts:
            block = (self.bank.acting_layers(name) or self.bank.layers)[-1]
            words[name] = Words(
                attempt("by steering", lambda name=name: by_steering(self.bank, name)),  # type: ignore[misc]
                attempt("direct", lambda name=name, block=block: direct(name, block)),  # type: ignore[misc]
                block,
            )
            more(1)
        first = next(iter(texts))
        other = randomised(self.bank, seed + lens.STEERED_CONTROLS)  # a draw that is none of the lens's own controls
        self.nothing["tokens"] = attempt("by steering", lambda: by_steering(other, first))
        more(1)
        self.done["words"] = words
        self.left_out |= {f"tokens, {kind}": reason for kind, reason in why.items()}

    def _neurons(self) -> None:
        pairs = self._paired("neurons of some categories")
        if not pairs:
            raise SafeSteerError("no category has harmless counterparts, so there is nothing to tell neurons by")
        self.done["neurons"] = selective.find(
            self.loaded,
            self.bank,
            pairs,
            most=self.settings.most,
            count=NAMED,
            seed=self.settings.seed,
            force=self.force,
            readings=None if selective.unreadable(self.loaded) else self._read_pairs(pairs),
        )

    def _read_pairs(self, pairs: Mapping[str, PromptSet]) -> dict[str, selective.PairReading]:
        """Every neuron at these pairs, read once for all stages that ask."""
        if self.pairs_read is None:
            count = sum(2 * min(self.settings.most, len(own)) for own in pairs.values())
            more = self._counting("Reading neurons", count)
            self.pairs_read = selective.read_pairs(self.loaded, self.bank, pairs, self.settings.most, progress=more)
        return self.pairs_read

    def _causal(self) -> None:
        pairs = self._paired("causal check of some categories")
        if not pairs:
            raise SafeSteerError("no category has harmless counterparts, so there are no neurons to hold")
        self.loaded.layout.projection(0)
        texts = self._texts(self.settings.answered, list(pairs))
        self.done["causal"] = held.suppress(
            self.loaded,
            self.bank,
            self.judge,
            texts,
            top=min(held.TOP, _hundredth(self.loaded)),
            pairs=pairs,
            most=self.settings.most,
            seed=self.settings.seed,
            max_new_tokens=self.settings.max_new_tokens,
            force=self.force,
            readings=self._read_pairs(pairs),
            progress=self._counting("Holding neurons", 3 * sum(map(len, texts.values()))),
        )

    def _doses(self) -> None:
        texts = self._texts(self.settings.answered)
        pool = harmless_pool().split("tune")
        count = sum(map(len, texts.values()))
        self.done["doses"] = dosing.dose_response(
            self.loaded,
            self.bank,
            self.judge,
            texts,
            [one.text for one in evenly(pool.prompts, self.settings.harmless)],
            STRENGTHS,
            max_new_tokens=self.settings.max_new_tokens,
            seed=self.settings.seed,
            force=self.force,
            progress=self._counting("Answering at each dose", count * len(STRENGTHS)),
        )
        texts = self._texts(self.settings.placed)
        count = sum(map(len, texts.values()))
        self.done["layers"] = dosing.by_layer(
            self.loaded,
            self.bank,
            texts,
            seed=self.settings.seed,
            force=self.force,
            progress=self._counting("Dose by block", 2 * count * len(self.bank.layers)),
        )

    def _attribution(self) -> None:
        more = self._counting("Accounting for readings", len(self.found.asked))
        accounts: dict[str, Account] = {}
        for name, own in self.found.asked.items():
            # The first, not the best: an example that was chosen for how it turned out would show less.
            prompt = next((one for one in own if one.matched is not None), own.prompts[0])
            accounts[name] = Account(
                prompt.text,
                attribute(self.loaded, self.bank, prompt.text, force=self.force),
                prompt.matched,
                None if prompt.matched is None else attribute(self.loaded, self.bank, prompt.matched, force=self.force),
            )
            more(1)
        self.done["accounts"] = accounts


def _places(length: int, most: int) -> list[int]:
    """At most `most` places of a list, evenly spread, the last included."""
    count = min(most, length)
    return sorted({length - 1 - index * (length - 1) // max(1, count - 1) for index in range(count)})


def _hundredth(loaded: LoadedModel) -> int:
    """A hundredth of all neurons, so that a small model keeps nearly all of them."""
    width = written(loaded.layout.projection(0)).shape[1]
    return max(1, width * loaded.layout.depth // 100)


def _swapped_separation(material: Material, category: str, seed: int) -> Separation:
    """`separation` of a category whose labels were swapped once: a curve that must stay inside the controls."""
    paired = bool(material.select("matched", category))
    rows = material.select("harmful", category) + (
        material.select("matched", category) if paired else material.select("pool")
    )
    labels = torch.tensor([material.rows[index].kind == "harmful" for index in rows])
    pairs = [material.rows[index].pair for index in rows] if paired else None
    # Another seed than that of the controls: else the first of them would be this very draw.
    mixed = geometry.swapped(labels, pairs, torch.Generator().manual_seed(seed + 1))
    return geometry.separation(
        material.before[:, rows],
        mixed.tolist(),
        [material.rows[index].group for index in rows],
        pairs=pairs,
        layers=material.layers,
        seed=seed,
    )


def strongest(found: Mapping[str, Separation]) -> list[str]:
    """Categories by their highest AUROC, the highest first."""
    return sorted(found, key=lambda name: -max(found[name].auroc))
