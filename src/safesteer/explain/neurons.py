"""Risk neurons to look at: which ones a category excites more than other categories do, and what nothing looks like.

    specific_j = d'_j(c) - mean over the other categories k of d'_j(k)      ranks those of the largest |t_j(c)|
    p_j        = (1 + number of swaps whose largest |t| of any neuron reaches |t_j(c)|) / (1 + swaps)
    align_j    = cos(v_j, - w[c, l])      v_j: what neuron j adds to the residual stream per unit of activation

d', t, and the swaps of harmful and harmless within pairs are those of `safesteer.vectors.neurons` (Westfall and Young 1993), at
the last token of each prompt; w is the category's direction, away from the risk, at the nearest layer l of the bank.

A neuron named here differs between harmful prompts and their counterparts. That it causes anything is another question: see
`safesteer.explain.causal`. Neurons of gated feed-forward modules have no preferred sign: `d'`, `align` and `writes` are all of
a rising activation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from safesteer.activations import run_until
from safesteer.errors import SafeSteerError, UnsupportedModelError
from safesteer.explain.lens import Ending, Token, direct, token_texts
from safesteer.models import LoadedModel, encode, encode_all
from safesteer.models.layout import written
from safesteer.prompts import PromptSet, builtin, builtin_categories, harmless_pool
from safesteer.vectors import VectorBank
from safesteer.vectors.gate import auroc
from safesteer.vectors.neurons import (
    ERROR,
    SWAPS,
    neuron_activations,
    paired_t,
    separation,
    swapped_maxima,
    swapped_t,
    tap,
)

PLAIN = 0.001  # two-sided p of one neuron alone, for the number of neurons a layer
EXCITING = 3  # prompts shown a neuron
READ = 5  # neurons a category whose words are read through the unembedding
WORDS = 8
TYPICAL = 4  # harmless prompts whose final states the words are read at; each is read again for every neuron
EXPERTS = (
    "the neurons of a mixture are held together by its experts, so experts are shown instead, by the share of the routing that "
    "each is given; what an expert writes differs with its input, so neither words nor alignment are shown"
)
FEWEST = 6  # pairs: with fewer, more than 5% of all swaps leave every pair as it is or swap them all

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class PairReading:
    """The pairs of a category and what every neuron does at their last tokens.

    `values`: fp16 `[2 pairs, neurons]`, one a layer; the harmful prompts stand first, their counterparts after them.
    """

    pairs: Pairs
    values: list[torch.Tensor]

    @property
    def texts(self) -> list[str]:
        """The prompts in the order of `values`."""
        return [harmful for harmful, _ in self.pairs] + [matched for _, matched in self.pairs]


@dataclass(frozen=True)
class Exciting:
    """A prompt and the neuron's `activation` at its last token; from the user's words on it is highest, `peak`, at `token`."""

    text: str
    harmful: bool
    activation: float
    token: str
    peak: float


@dataclass(frozen=True)
class Neuron:
    """One neuron (or expert) of a category: `separation` is d', `p` family-wise over all neurons tested, `others` the mean d' in
    the other categories (None where there are none), `alignment` above 0 where it writes towards the risk.

    `alignment` is None for an expert, which writes something else for every input.
    `writes` and `unwrites`: tokens that it makes more and less likely (`lens.direct`), only for the first few of a category.
    """

    layer: int
    index: int
    separation: float
    t: float
    p: float
    auroc: float
    others: float | None
    alignment: float | None
    exciting: tuple[Exciting, ...]
    writes: tuple[Token, ...] = ()
    unwrites: tuple[Token, ...] = ()


@dataclass(frozen=True)
class CategoryNeurons:
    """The neurons of one category, from `pairs` pairs.

    `edge`: the |t| that no neuron at all passes in 95% of swaps; `survivors` pass it, excited and quieted ones alike;
    `swapped`: mean and largest number that pass it in other swaps. `plain`: the |t| of p < 0.001 for one neuron alone;
    `by_layer`: how many pass it in each block; `swapped_by_layer`: mean, least and greatest number with pairs swapped.
    `top`: the survivors, or as many of the largest |t| as
    were asked for where fewer survive; of them the most specific, excited before quieted ones.
    """

    pairs: int
    edge: float
    survivors: int
    swapped: tuple[float, int]
    plain: float
    by_layer: tuple[int, ...]
    swapped_by_layer: tuple[tuple[float, int, int], ...]
    top: tuple[Neuron, ...] = ()


@dataclass(frozen=True)
class NeuronView:
    """All categories; `tested` neurons in `layers` blocks. `note` says what cannot be shown for this model, or is empty.

    `unit`: what was tested; a mixture's experts stand for its neurons, by the share of the routing that each is given.
    """

    tested: int
    layers: int
    categories: dict[str, CategoryNeurons]
    note: str = ""
    unit: Literal["neurons", "experts"] = "neurons"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class _Measured:
    """One category: d' `[all neurons]`; the candidates' numbers among all, their t, and activations `[2 pairs, candidates]`."""

    found: CategoryNeurons
    texts: list[str]
    sizes: list[int]
    maxima: torch.Tensor
    separation: torch.Tensor
    candidates: torch.Tensor
    t: torch.Tensor
    activations: torch.Tensor


def find(
    loaded: LoadedModel,
    bank: VectorBank,
    prompts: Mapping[str, PromptSet] | None = None,
    *,
    most: int = 32,
    count: int = 10,
    swaps: int = SWAPS,
    seed: int = 0,
    force: Collection[str] = (),
    readings: Mapping[str, PairReading] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> NeuronView:
    """The `count` most specific neurons of each category, from at most `most` pairs of a prompt and its counterpart.

    `prompts` by category of the bank, default: the fit split of its built-in categories; `readings`: what `read_pairs` gave for
    them already. `progress` is called with the number of
    prompts just read, two a pair. A model whose neurons cannot be told apart gives no categories and a note. Raises
    `SafeSteerError` for a category with fewer than two pairs, and for a bank of another model (unless `force`).
    """
    bank.check(loaded, force)
    why = unreadable(loaded)
    if why:
        return NeuronView(0, loaded.layout.depth, {}, why)
    read = read_pairs(loaded, bank, prompts, most, progress=progress) if readings is None else readings
    measured = {name: _measure(some, count, swaps, seed) for name, some in read.items()}
    total = torch.stack([one.separation for one in measured.values()]).sum(dim=0)
    experts = not loaded.layout.neurons
    few = [name for name, some in read.items() if len(some.pairs) < FEWEST]
    notes = [f"{', '.join(few)}: no neuron can survive the swaps of fewer than {FEWEST} pairs"] if few else []
    ending = None
    try:
        if experts:
            notes.append(EXPERTS)
        else:
            ending = Ending(loaded, harmless_pool().texts[:TYPICAL])
    except UnsupportedModelError as error:
        notes.append(f"what neurons write cannot be put into words: {error}")
    categories = {}
    for name, one in measured.items():
        others = (total - one.separation) / max(1, len(measured) - 1)
        slots = (one.separation - others)[one.candidates].argsort(descending=True)[:count].tolist()
        top = [_neuron(one, slot, float(others[one.candidates[slot]]) if len(measured) > 1 else None) for slot in slots]
        top = _peaks(loaded, top)
        if not experts:
            top = _written(loaded, bank, name, top, ending)
        categories[name] = replace(one.found, top=tuple(top))
    sizes = next(iter(measured.values())).sizes
    return NeuronView(sum(sizes), len(sizes), categories, "; ".join(notes), "experts" if experts else "neurons")


def unreadable(loaded: LoadedModel) -> str:
    """Why the neurons of a model cannot be shown one by one; empty where they can."""
    try:
        if loaded.layout.routers and not loaded.layout.neurons:
            tap(loaded, 0)
            return ""
        columns = written(loaded.layout.projection(0))
    except UnsupportedModelError as error:
        return str(error)
    return "the weights are offloaded, so what neurons write cannot be read" if columns.is_meta else ""


def pairs_of(bank: VectorBank, prompts: Mapping[str, PromptSet] | None, most: int) -> dict[str, Pairs]:
    """At most `most` pairs of harmful prompt and counterpart a category of the bank, spread over each set."""
    sets = prompts or {n: builtin(n).split("fit") for n in bank.categories if n in builtin_categories()}
    if not sets:
        raise SafeSteerError("the bank holds no built-in category; give prompts with `matched` counterparts")
    found: dict[str, Pairs] = {}
    for name, some in sets.items():
        whole = [(one.text, one.matched) for one in some if one.matched is not None]
        take = min(most, len(whole))
        if take < 2:
            raise SafeSteerError(f"{name}: neurons need at least two prompts with `matched` counterparts; add some")
        found[bank.categories[bank.index(name)]] = [whole[index * len(whole) // take] for index in range(take)]
    return found


def read_pairs(
    loaded: LoadedModel,
    bank: VectorBank,
    prompts: Mapping[str, PromptSet] | None,
    most: int,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, PairReading]:
    """Every neuron at the last tokens of `pairs_of` the same arguments; `progress` as in `find`.

    Raises `UnsupportedModelError` for a model whose neurons cannot be read one by one.
    """
    found = {}
    for name, some in pairs_of(bank, prompts, most).items():
        one = PairReading(some, [])
        encoded = encode_all(loaded, one.texts)
        found[name] = replace(one, values=neuron_activations(loaded, encoded, progress=progress))
    return found


def alone(pairs: int, p: float = PLAIN) -> float:
    """The |t| that one neuron passes by chance with probability `p`, two-sided: Student's quantile for `pairs` - 1 degrees."""
    from scipy import stats

    return float(stats.t.isf(p / 2, pairs - 1))


def _measure(read: PairReading, least: int, swaps: int, seed: int) -> _Measured:
    size, values = len(read.pairs), read.values
    sizes = [one.shape[1] for one in values]
    differences = [one[:size].float() - one[size:].float() for one in values]
    maxima = swapped_maxima(differences, swaps, seed)
    edge, plain = float(maxima.quantile(1 - ERROR)), alone(size)
    # Other swaps than those that set the edge: in these, how often it is passed would be known beforehand.
    signs = torch.randint(0, 2, (swaps, size), generator=torch.Generator().manual_seed(seed + 1)).float() * 2 - 1
    passed, by_layer = torch.zeros(swaps, dtype=torch.long), []
    for one in differences:
        t = swapped_t(one, signs).abs()
        passed += (t > edge).sum(dim=1)
        alike = (t > plain).sum(dim=1)
        by_layer.append((float(alike.float().mean()), int(alike.min()), int(alike.max())))
    own = [paired_t(one) for one in differences]
    t = torch.cat(own)
    survivors = int((t.abs() > edge).sum())
    candidates = t.abs().topk(min(max(least, survivors), len(t))).indices
    places = [_place(number, sizes) for number in candidates.tolist()]
    found = CategoryNeurons(
        pairs=size,
        edge=edge,
        survivors=survivors,
        swapped=(float(passed.float().mean()), int(passed.max())),
        plain=plain,
        by_layer=tuple(int((one.abs() > plain).sum()) for one in own),
        swapped_by_layer=tuple(by_layer),
    )
    activations = torch.stack([values[layer][:, index] for layer, index in places], dim=1).float()
    apart = torch.cat([separation(one[:size], one[size:]) for one in values])
    return _Measured(found, read.texts, sizes, maxima, apart, candidates, t[candidates], activations)


def _place(number: int, sizes: Sequence[int]) -> tuple[int, int]:
    """Layer and index of a neuron by its number among those of all layers."""
    layer = 0
    while number >= sizes[layer]:
        number, layer = number - sizes[layer], layer + 1
    return layer, number


def _neuron(one: _Measured, slot: int, others: float | None) -> Neuron:
    """A candidate as measured; where it peaks and what it writes come later."""
    values, pairs, t = one.activations[:, slot], one.found.pairs, float(one.t[slot])
    number = int(one.candidates[slot])
    layer, index = _place(number, one.sizes)
    rows = values.topk(min(EXCITING, len(values))).indices.tolist()
    return Neuron(
        layer=layer,
        index=index,
        separation=float(one.separation[number]),
        t=t,
        p=(1 + int((one.maxima >= abs(t)).sum())) / (1 + len(one.maxima)),
        auroc=auroc(values[:pairs], values[pairs:]),
        others=others,
        alignment=None,
        exciting=tuple(Exciting(one.texts[row], row < pairs, float(values[row]), "", 0.0) for row in rows),
    )


@torch.inference_mode()
def _peaks(loaded: LoadedModel, neurons: Sequence[Neuron]) -> list[Neuron]:
    """The neurons with the token at which each is highest in the prompts that excite it; each prompt is read once."""
    peaks: dict[tuple[str, int, int], tuple[str, float]] = {}
    for text in dict.fromkeys(one.text for neuron in neurons for one in neuron.exciting):
        prompt = encode(loaded.tokenizer, text)
        names, first = token_texts(loaded.tokenizer, prompt.ids), prompt.content_start
        wanted = [neuron for neuron in neurons if any(one.text == text for one in neuron.exciting)]
        read: dict[int, torch.Tensor] = {}

        def watch(layer: int, read: dict[int, torch.Tensor] = read) -> Any:
            module, activations = tap(loaded, layer)

            def hook(_module: Any, arguments: tuple[Any, ...]) -> None:
                read[layer] = activations(arguments[0].reshape(-1, arguments[0].shape[-1]))

            return module.register_forward_pre_hook(hook)

        layers = sorted({neuron.layer for neuron in wanted})
        handles = [watch(layer) for layer in layers]
        try:
            ids = torch.tensor([prompt.ids], device=loaded.device)
            run_until(loaded, layers[-1], (), input_ids=ids, attention_mask=torch.ones_like(ids))
        finally:
            for handle in handles:
                handle.remove()
        for neuron in wanted:
            peak = read[neuron.layer][first:, neuron.index].float().max(dim=0)
            peaks[text, neuron.layer, neuron.index] = names[first + int(peak.indices)], float(peak.values)

    def placed(neuron: Neuron, one: Exciting) -> Exciting:
        token, peak = peaks[one.text, neuron.layer, neuron.index]
        return replace(one, token=token, peak=peak)

    return [replace(neuron, exciting=tuple(placed(neuron, one) for one in neuron.exciting)) for neuron in neurons]


def _written(
    loaded: LoadedModel, bank: VectorBank, category: str, neurons: Sequence[Neuron], ending: Ending | None
) -> list[Neuron]:
    """The neurons with their alignment and, where there is an `ending`, the words of the first `READ`."""
    found = []
    for rank, neuron in enumerate(neurons):
        column = _column(loaded, neuron.layer, neuron.index)
        nearest = min(range(len(bank.layers)), key=lambda slot, at=neuron.layer: abs(bank.layers[slot] - at))  # type: ignore[misc]
        direction = bank.directions[bank.index(category), nearest].float().cpu()
        neuron = replace(neuron, alignment=float(torch.cosine_similarity(column, -direction, dim=0)))
        if rank < READ and ending is not None and float(column.norm()) > 0:
            lens = direct(loaded, column, WORDS, ending=ending, controls=0)
            neuron = replace(neuron, writes=lens.promotes, unwrites=lens.suppresses)
        found.append(neuron)
    return found


@torch.no_grad()
def _column(loaded: LoadedModel, layer: int, index: int) -> torch.Tensor:
    """fp32 `[width]`: what a neuron adds to the residual stream per unit of activation.

    Where a norm stands in between (Gemma, OLMo-2), up to the length that it divides by.
    """
    column = written(loaded.layout.projection(layer))[:, index]
    for name, module in loaded.layout.blocks[layer].named_children():
        if "post_feedforward" in name:
            column = column * module(torch.ones_like(column)[None])[0].float()  # an RMS norm of ones is its scale
    return column.cpu()
