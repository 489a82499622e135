"""Where categories lie among activations: how alike their directions are, where they separate, and what steering moves.

    cosine      C[i, j]    = mean over acting layers l of  w_i,l . w_j,l / (||w_i,l|| ||w_j,l||)
    separation  AUROC[l]   = P(score of a harmful prompt > score of a harmless one),  score(x) = -a_l(x) . w_l,
                             w_l fitted without the fold that x is in
    PCA         (x, y)(a)  = V (a - mean),             V: top two right singular vectors of the centred activations
    LDA         (x, y)(a)  = B (S + r I)^-1/2 (a - mean),  S: covariance within classes, r: ridge * mean of its
    diagonal,
                             B: harmful against harmless, and the leading direction of the classes that is left

a_l(x) is the residual stream after block l at the last prompt token. Axes are fitted on unsteered activations and
kept for the steered ones, so that a move is a move and not a new view.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from safesteer.activations import batches_by_length, collect, pad
from safesteer.engines.steering import Hooks
from safesteer.errors import SafeSteerError
from safesteer.models import EncodedPrompt, LoadedModel, encode_all
from safesteer.models.layout import hidden_of
from safesteer.policy import Plan, Policy, plan
from safesteer.prompts import PromptSet, builtin, builtin_categories, harmless_pool
from safesteer.prompts.sets import evenly
from safesteer.vectors import VectorBank
from safesteer.vectors.directions import clip_massive, mean_difference
from safesteer.vectors.gate import auroc

Kind = Literal["harmful", "matched", "pool"]
PAIRS = 24  # of a category: enough for a picture, few enough for minutes on a CPU
LAYERS = 16  # about how many layers of the whole depth are read
FOLDS = 5
SHUFFLES = 20
RIDGE = 1.0  # of the mean diagonal of the covariance within classes


# -- material ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """One prompt of the material: its text, what it is, which category it is about (None: none), its subtopic.

    `pair` is shared by a harmful prompt and its counterpart and by no other prompt.
    """

    text: str
    kind: Kind
    category: str | None
    group: str
    pair: int


@dataclass(frozen=True)
class Material:
    """Activations to draw: `before` unsteered and `after` steered, both fp32 `[layers, prompts, width]`.

    `layers` are 0-based blocks, `rows` the prompts. Prompts of a category, its harmless counterparts too, were
    steered always on with their own category at strength 1; prompts of the pool have none and are the same before and
    after.
    """

    layers: tuple[int, ...]
    rows: tuple[Shown, ...]
    before: torch.Tensor
    after: torch.Tensor

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories present, in order of first appearance."""
        return tuple(dict.fromkeys(row.category for row in self.rows if row.category is not None))

    def select(self, kind: Kind, category: str | None = None) -> list[int]:
        """Positions of the rows of a kind (of one category, where it is named)."""
        return [
            index
            for index, row in enumerate(self.rows)
            if row.kind == kind and (category is None or row.category == category)
        ]

    def slot(self, layer: int) -> int:
        """Position of a layer (0-based block). Raises `SafeSteerError` for a layer that was not read."""
        if layer not in self.layers:
            raise SafeSteerError(f"layer {layer} was not read; choose one of {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)

    def to_json(self) -> dict[str, Any]:
        """Which prompts and layers were read; the activations themselves are left out."""
        return {
            "layers": list(self.layers),
            "prompts": [
                {"text": row.text, "kind": row.kind, "category": row.category, "group": row.group, "pair": row.pair}
                for row in self.rows
            ],
        }


def layers_through(depth: int, count: int = LAYERS) -> tuple[int, ...]:
    """Every k-th block of the whole depth, the last included; k is chosen so that there are about `count`."""
    return tuple(range(depth - 1, -1, -max(1, round(depth / count))))[::-1]


def collect_for_explain(
    loaded: LoadedModel,
    bank: VectorBank,
    prompts: Mapping[str, PromptSet] | None = None,
    pool: PromptSet | None = None,
    layers: Sequence[int] | None = None,
    *,
    most: int = PAIRS,
    force: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Material:
    """Read the prompts of each category, their counterparts and harmless ones, unsteered and steered.

    `prompts`: category of the bank -> its harmful prompts; None: the built-in ones of the fit split, on which the
    bank's directions were fitted too. `pool`: None for the built-in one. `most`: how many pairs of a category (and
    twice as many of the pool), evenly spread over what is given. `layers`: None for `layers_through` the depth.
    `progress(done, total)` counts readings. Steering follows the bank's own choice of tokens: one that leaves prompts
    alone moves nothing here. Raises `SafeSteerError` for no prompts, a category that ships none, or a layer that the
    model does not have; `FingerprintMismatchError` for a bank of another model (unless `force`).
    """
    bank.check(loaded, force)
    rows = _material_rows(bank, prompts, pool, most)
    encoded = encode_all(loaded, [row.text for row in rows])
    moved = sum(row.category is not None for row in rows)
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(done, len(rows) + moved)

    chosen = layers_through(loaded.layout.depth) if layers is None else layers
    read = collect(loaded, encoded, chosen, progress=count)
    before = read.values["residual", "last"]
    after = before.clone()
    for category in dict.fromkeys(row.category for row in rows if row.category is not None):
        own = [index for index, row in enumerate(rows) if row.category == category]
        policy = Policy.of({category: 1.0}, gate="always").resolved(bank)
        decided = plan(policy, bank)
        after[:, own] = _steered(loaded, bank, [encoded[index] for index in own], decided, read.layers, count)
    return Material(read.layers, tuple(rows), before, after)


def _material_rows(
    bank: VectorBank, prompts: Mapping[str, PromptSet] | None, pool: PromptSet | None, most: int
) -> list[Shown]:
    if prompts is None:
        absent = [name for name in bank.categories if name not in builtin_categories()]
        if absent:
            raise SafeSteerError(
                f"{', '.join(absent)}: no prompts ship for it; give the prompts the bank was fitted on"
            )
        prompts = {name: builtin(name).split("fit") for name in bank.categories}
    rows: list[Shown] = []
    pair = 0
    for name, own in prompts.items():
        category = bank.categories[bank.index(name)]
        for index, prompt in enumerate(evenly(own.prompts, most)):
            # A prompt without a subtopic is a group of its own, as in `fit`.
            group = f"{category}/{prompt.subtopic or index}"
            rows.append(Shown(prompt.text, "harmful", category, group, pair))
            if prompt.matched is not None:
                rows.append(Shown(prompt.matched, "matched", category, group, pair))
            pair += 1
    for index, prompt in enumerate(evenly((harmless_pool().split("fit") if pool is None else pool).prompts, 2 * most)):
        rows.append(Shown(prompt.text, "pool", None, f"pool/{prompt.subtopic or index}", pair + index))
    return rows


@torch.inference_mode()
def _steered(
    loaded: LoadedModel,
    bank: VectorBank,
    prompts: Sequence[EncodedPrompt],
    decided: Plan,
    layers: Sequence[int],
    progress: Callable[[int], None],
) -> torch.Tensor:
    """fp32 `[layers, prompts, width]`: the last prompt token, steered by one plan.

    Whole prompts in whole passes: `collect` would reuse a shared beginning that was read unsteered, and a pass that
    is cut short skips the check that steering reached every layer.
    """
    layout = loaded.layout
    values = torch.zeros(len(layers), len(prompts), layout.width)
    hooks = Hooks(layout, bank.site)
    hooks.set_plans([decided])
    handles: list[Any] = []
    try:
        hooks.install()
        for batch in batches_by_length(prompts):
            ids, mask = pad([prompts[index] for index in batch], loaded.pad_id, "right")
            last = mask.sum(dim=1) - 1

            def tap(slot: int, batch: list[int] = batch, last: torch.Tensor = last) -> Any:
                def read(_module: Any, _arguments: Any, output: Any) -> None:
                    hidden = hidden_of(output).reshape(len(batch), -1, layout.width)
                    rows = torch.arange(len(batch), device=hidden.device)
                    values[slot, batch] = hidden[rows, last.to(hidden.device)].float().cpu()

                return read

            # Put on after the steering hooks, so that they see what those added.
            handles = [layout.blocks[layer].register_forward_hook(tap(slot)) for slot, layer in enumerate(layers)]
            layout.decoder(input_ids=ids.to(loaded.device), attention_mask=mask.to(loaded.device), use_cache=False)
            for handle in handles:
                handle.remove()
            progress(len(batch))
    finally:
        for handle in handles:
            handle.remove()
        hooks.remove()
    return values


# -- cosines -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merge:
    """A step of the clustering: `members` (positions of names) join at `distance`, 1 - their average cosine."""

    members: tuple[int, ...]
    distance: float


@dataclass(frozen=True)
class CosineMap:
    """Cosines between directions, averaged over `layers` (0-based).

    `kinds`: `category`, `shared`, `extra` or `random`, one a name. `cosines`: `[names][names]`, of the directions
    that act. `before_shrinkage`: the same for the directions as the prompts gave them, which the bank keeps from its fit;
    None where nothing moved them, or the bank does not hold them. `order`: names as clustered, `merges` how.

    `moved`: whether `fit` moved any direction away from what its prompts gave. `shrinkage`: how far towards the direction they
    share; `borrowed`: the most that any was moved towards what the built-in categories share instead.

    What nothing looks like: two random directions have a cosine of 0 with the standard deviation `random_deviation` =
    1/sqrt(width). A random direction and the mean of k that it is one of: `random_with_shared` = 1/sqrt(k). Two of k random
    directions moved as these were (the median pair): `random_after_shrinkage`. Cosines that act are to be read against the last.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...]
    before_shrinkage: tuple[tuple[float, ...], ...] | None
    order: tuple[int, ...]
    merges: tuple[Merge, ...]
    layers: tuple[int, ...]
    moved: bool
    shrinkage: float
    borrowed: float
    random_deviation: float
    random_with_shared: float
    random_after_shrinkage: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "names": list(self.names),
            "kinds": list(self.kinds),
            "cosines": _rounded(self.cosines),
            "before_shrinkage": None if self.before_shrinkage is None else _rounded(self.before_shrinkage),
            "order": list(self.order),
            "merges": [{"members": list(one.members), "distance": round(one.distance, 4)} for one in self.merges],
            "layers": list(self.layers),
            "moved": self.moved,
            "shrinkage": self.shrinkage,
            "borrowed": self.borrowed,
            "random_deviation": round(self.random_deviation, 4),
            "random_with_shared": round(self.random_with_shared, 4),
            "random_after_shrinkage": round(self.random_after_shrinkage, 4),
        }


def cosine_map(
    bank: VectorBank, extra: Mapping[str, torch.Tensor] | None = None, *, seed: int = 0, randoms: int = 2
) -> CosineMap:
    """How alike the bank's category directions are, and how like the shared, `extra` and random ones.

    The shared direction is the unit mean of the unit category directions. `extra`: name -> `[layers, width]` at the
    bank's layers, such as a refusal direction. A random direction is one draw for all layers. Averaged over the
    layers where any category acts. A direction with the name of a category is called `NAME (direction)`. Raises
    `SafeSteerError` for an extra direction of another shape, or with a name of those that are added here.
    """
    acting = [slot for slot in range(len(bank.layers)) if bool((bank.doses[:, slot] != 0).any())]
    slots = acting or list(range(len(bank.layers)))
    width, count = bank.directions.shape[-1], len(bank.categories)
    others: dict[str, tuple[str, torch.Tensor]] = {}
    for name, vectors in (extra or {}).items():
        if vectors.shape != (len(bank.layers), width):
            raise SafeSteerError(
                f"the direction {name!r} has the shape {tuple(vectors.shape)}; give one of "
                f"[{len(bank.layers)}, {width}], a row for each layer of the bank"
            )
        others[name] = ("extra", vectors[slots].double().cpu())
    generator = torch.Generator().manual_seed(seed)
    for number in range(randoms):
        drawn = torch.randn(width, generator=generator, dtype=torch.float64)
        others[f"random {number + 1}"] = ("random", drawn.expand(len(slots), width))
    # A category may have one of these names; then the other one yields.
    names = (*bank.categories, *(f"{n} (direction)" if n in bank.categories else n for n in ("shared", *others)))
    if len(set(names)) < len(names):
        raise SafeSteerError("two directions have the same name; name the extra ones otherwise")

    def unit_of(directions: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(directions[:, slots].double(), dim=-1)

    def cosines(categories: torch.Tensor) -> torch.Tensor:
        shared = categories.mean(dim=0, keepdim=True)
        every = torch.cat([categories, shared, *(vectors.unsqueeze(0) for _, vectors in others.values())])
        every = torch.nn.functional.normalize(every, dim=-1)
        return torch.einsum("ild,jld->ij", every, every) / len(slots)

    acts = cosines(unit_of(bank.directions))
    shrunk, borrowed = _moved(bank)
    moved = any(shrunk) or any(0 < lent < 1 for lent in borrowed)
    earlier = cosines(unit_of(bank.unshrunk)) if moved and bank.unshrunk is not None else None
    order, merges = average_linkage(1 - (acts if earlier is None else earlier).numpy())
    return CosineMap(
        names=names,
        kinds=(*["category"] * count, "shared", *(kind for kind, _ in others.values())),
        cosines=_table(acts),
        before_shrinkage=None if earlier is None else _table(earlier),
        order=order,
        merges=merges,
        layers=tuple(bank.layers[slot] for slot in slots),
        moved=moved,
        shrinkage=max(shrunk),
        borrowed=max(borrowed),
        random_deviation=1 / math.sqrt(width),
        random_with_shared=1 / math.sqrt(count),
        random_after_shrinkage=_random_after(shrunk, borrowed),
    )


def _moved(bank: VectorBank) -> tuple[list[float], list[float]]:
    """How far (0 to 1) `fit` moved each category's direction towards the mean of the bank's own, and towards a borrowed one."""
    nowhere = [0.0] * len(bank.categories)
    # A control bank's directions were replaced after shrinking.
    if "control" in bank.provenance:
        return nowhere, nowhere
    sources = bank.provenance.get("prompts") or {}
    borrowed = [float(sources.get(name, {}).get("borrowed", 0.0)) for name in bank.categories]
    amount = float(bank.provenance.get("shrinkage") or 0.0) if borrowed.count(0.0) > 1 else 0.0
    return [0.0 if lent else amount for lent in borrowed], borrowed


def _random_after(shrunk: Sequence[float], borrowed: Sequence[float]) -> float:
    """The median cosine of two of as many random directions, moved as far as these; 0 for fewer than two.

    Each is (1 - a - b) u + a m + b e, u one of k random directions and m their unit mean, so that u . m = 1/sqrt(k). What is
    borrowed, e, has nothing in common with any; a direction that borrows has no part in m.
    """
    count = len(shrunk)
    a, b = torch.tensor(shrunk), torch.tensor(borrowed)
    base = torch.eye(count + 2)
    base[:count, count] = base[count, :count] = (b == 0) / max(1, borrowed.count(0.0)) ** 0.5
    mixed = torch.cat([torch.diag(1 - a - b), a[:, None], b[:, None]], dim=1)
    products = mixed @ base @ mixed.T
    lengths = products.diagonal().sqrt()
    cosines = products / (lengths[:, None] * lengths)
    expected = sorted(cosines[torch.ones(count, count).tril(-1).bool()].tolist())
    return expected[len(expected) // 2] if expected else 0.0


def average_linkage(distance: np.ndarray[Any, Any]) -> tuple[tuple[int, ...], tuple[Merge, ...]]:
    """Hierarchical clustering of `[n, n]` distances: the leaves in order, and each merge.

    Average linkage: two clusters are as far apart as their members are on average (UPGMA, Sokal and Michener 1958).
    """
    clusters: list[tuple[int, ...]] = [(index,) for index in range(len(distance))]
    merges: list[Merge] = []
    while len(clusters) > 1:
        apart, left, right = min(
            (float(distance[np.ix_(one, other)].mean()), i, j)
            for i, one in enumerate(clusters)
            for j, other in enumerate(clusters[:i])
        )
        # the larger first, so that what stands alone comes last
        joined = sum(sorted((clusters[right], clusters[left]), key=len, reverse=True), ())
        merges.append(Merge(joined, apart))
        clusters = [one for index, one in enumerate(clusters) if index not in (left, right)] + [joined]
    return clusters[0], tuple(merges)


# -- separation --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Band:
    """A control over several seeds, by layer: its mean, least and greatest value."""

    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"mean": _rounded(self.mean), "low": _rounded(self.low), "high": _rounded(self.high)}


@dataclass(frozen=True)
class Separation:
    """How well a direction tells harmful from harmless prompts that it was not fitted on, by layer.

    `auroc`: cross-validated, 0.5 is chance. `shuffled`: the same with labels that mean nothing, `random`: random
    directions; each over `seeds` draws. `harmful` and `harmless` count prompts, `folds` the folds that held both.
    """

    layers: tuple[int, ...]
    auroc: tuple[float, ...]
    shuffled: Band
    random: Band
    harmful: int
    harmless: int
    folds: int
    seeds: int

    @property
    def best(self) -> int:
        """The layer (0-based block) with the highest AUROC, the first of equals."""
        return self.layers[self.auroc.index(max(self.auroc))]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "layers": list(self.layers),
            "auroc": _rounded(self.auroc),
            "shuffled": self.shuffled.to_json(),
            "random": self.random.to_json(),
            "harmful": self.harmful,
            "harmless": self.harmless,
            "folds": self.folds,
            "seeds": self.seeds,
        }


def separation(
    activations: torch.Tensor,
    harmful: Sequence[bool],
    groups: Sequence[str],
    *,
    pairs: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    folds: int = FOLDS,
    seeds: int = SHUFFLES,
    seed: int = 0,
) -> Separation:
    """AUROC by layer of activations `[layers, prompts, width]`, cross-validated, with both controls.

    In each fold the difference of means, massive dimensions clipped as in `fit`, is fitted on the other folds and
    scores this one; the AUROC is that of pairs of prompts within a fold, so that no shift between folds counts.
    `groups` (subtopics) are never split over folds. `pairs`: a number that a harmful prompt shares with its
    counterpart.

    Shuffled labels: each pair is swapped by the toss of a coin, and no fixed half of them: if exactly half were
    swapped, the fold left out would lean against the others and the control would fall below 0.5. Without pairs the
    labels are permuted. `layers` (0-based) are only names; None counts from 0. Raises `SafeSteerError` where no fold
    holds both kinds.
    """
    labels = torch.tensor(list(harmful))
    values = activations.float().cpu()
    names = sorted(set(groups))
    fold_of = {name: index % folds for index, name in enumerate(names)}
    fold = torch.tensor([fold_of[name] for name in groups])

    def both(rows: torch.Tensor) -> bool:
        return bool(labels[rows].any()) and not bool(labels[rows].all())

    usable = [index for index in range(folds) if both(fold == index) and both(fold != index)]
    if not usable:
        raise SafeSteerError(
            "separation needs harmful and harmless prompts of at least two subtopics; give more prompts"
        )

    def measured(kinds: torch.Tensor, direction: torch.Tensor | None = None) -> list[float]:
        """AUROC by layer for the labels `kinds`; a given direction `[width]` is scored and not fitted."""
        found: list[float] = []
        for layer in values:
            total, weight = 0.0, 0
            for index in usable:
                test, rest = layer[fold == index], layer[fold != index]
                positive, known = kinds[fold == index], kinds[fold != index]
                ways = int(positive.sum()) * int((~positive).sum())
                if ways == 0 or not bool(known.any()) or bool(known.all()):
                    continue  # permuted labels without pairs may leave a fold with one kind
                fitted = direction
                if fitted is None:
                    fitted = clip_massive(mean_difference(rest[known], rest[~known]), rest.abs().mean(dim=0)).direction
                scores = -(test @ fitted)
                total += ways * auroc(scores[positive], scores[~positive])
                weight += ways
            found.append(total / weight if weight else 0.5)
        return found

    generator = torch.Generator().manual_seed(seed)
    shuffled, random = [], []
    for _ in range(seeds):
        shuffled.append(measured(swapped(labels, pairs, generator)))
        random.append(measured(labels, torch.randn(values.shape[-1], generator=generator)))
    return Separation(
        layers=tuple(range(len(values)) if layers is None else layers),
        auroc=tuple(measured(labels)),
        shuffled=_band(shuffled),
        random=_band(random),
        harmful=int(labels.sum()),
        harmless=int((~labels).sum()),
        folds=len(usable),
        seeds=seeds,
    )


def separation_of(
    material: Material, category: str, against: Kind = "matched", *, seeds: int = SHUFFLES, seed: int = 0
) -> Separation:
    """`separation` of a category's unsteered prompts from their counterparts, or from the `pool`.

    A category without counterparts is set against the pool in any case. Against counterparts it is the risk that must
    tell; against the pool the subject tells too, which is easy.
    """
    positive = material.select("harmful", category)
    negative = material.select("matched", category) if against == "matched" else []
    paired = bool(negative)
    rows = positive + (negative or material.select("pool"))
    return separation(
        material.before[:, rows],
        [material.rows[index].kind == "harmful" for index in rows],
        [material.rows[index].group for index in rows],
        pairs=[material.rows[index].pair for index in rows] if paired else None,
        layers=material.layers,
        seeds=seeds,
        seed=seed,
    )


def swapped(labels: torch.Tensor, pairs: Sequence[int] | None, generator: torch.Generator) -> torch.Tensor:
    """Labels that mean nothing, bool `[prompts]`: each pair swapped by a coin; without pairs, permuted."""
    if pairs is None:
        return labels[torch.randperm(len(labels), generator=generator)]
    numbers = {pair: index for index, pair in enumerate(dict.fromkeys(pairs))}
    coins = torch.rand(len(numbers), generator=generator) < 0.5
    return labels ^ coins[torch.tensor([numbers[pair] for pair in pairs])]


# -- projection --------------------------------------------------------------------------------------------------------

Place = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """A prompt in the plane. `row` is its position in `Material.rows`, `kind` what it counts as here (labels may be shuffled).

    `pca` and `lda` are unsteered, `..._after` steered; `lda` is None for the half on which its axes were fitted.
    """

    row: int
    kind: Kind
    category: str | None
    pca: Place
    pca_after: Place
    lda: Place | None
    lda_after: Place | None


@dataclass(frozen=True)
class Projection:
    """Prompts of a layer (0-based) in two planes.

    `pca_share`: share of the variance along each axis, 0 to 1; its units are those of the residual stream. LDA
    coordinates are in standard deviations within a class (with the ridge). `auroc`: along the LDA x axis, harmful
    against harmless counterparts, prompts not fitted on, unsteered; `auroc_after`: steered harmful against unsteered
    counterparts, so 0.5 is "as far as the axis can tell, harmless" and below 0.5 is beyond that. `shuffled`: labels
    were swapped, this is a control.
    """

    layer: int
    points: tuple[Point, ...]
    pca_share: tuple[float, float]
    auroc: float
    auroc_after: float
    shuffled: bool

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "layer": self.layer,
            "pca_share": _rounded(self.pca_share),
            "auroc": round(self.auroc, 4),
            "auroc_after": round(self.auroc_after, 4),
            "shuffled": self.shuffled,
            "points": [
                {
                    "row": point.row,
                    "kind": point.kind,
                    "category": point.category,
                    "pca": _rounded(point.pca),
                    "pca_after": _rounded(point.pca_after),
                    "lda": None if point.lda is None else _rounded(point.lda),
                    "lda_after": None if point.lda_after is None else _rounded(point.lda_after),
                }
                for point in self.points
            ],
        }


@dataclass(frozen=True)
class Axes:
    """Two axes `[2, width]` and the point `[width]` they are drawn through; fp64."""

    origin: torch.Tensor
    axes: torch.Tensor

    def of(self, activations: torch.Tensor) -> torch.Tensor:
        """Coordinates `[prompts, 2]` of activations `[prompts, width]`."""
        return (activations.double() - self.origin) @ self.axes.T


def pca_axes(activations: torch.Tensor) -> tuple[Axes, tuple[float, float]]:
    """The first two principal components of `[prompts, width]` (unit axes), and the share of variance each holds."""
    values = activations.double()
    origin = values.mean(dim=0)
    _, spread, right = torch.linalg.svd(values - origin, full_matrices=False)
    share = spread.square() / spread.square().sum().clamp_min(1e-30)
    return Axes(origin, right[:2]), (float(share[0]), float(share[1]))


def lda_axes(activations: torch.Tensor, harmful: torch.Tensor, harmless: torch.Tensor, classes: Sequence[Any]) -> Axes:
    """LDA axes of `[prompts, width]`: x from `harmless` to `harmful` (bool `[prompts]`), y the leading direction left.

    x is Fisher's discriminant with a ridge, (S + r I)^-1 (mean harmful - mean harmless), S the covariance within
    `classes`. y is where the means of the classes spread most once x is taken out (with fewer than three classes,
    where the prompts do). Both are scaled so that the spread within a class is about 1. Axes are fitted to the
    prompts given: shown on the same prompts they separate them however little there is to see (with more dimensions
    than prompts, always), so show others.
    """
    values = activations.double()
    origin = values.mean(dim=0)
    centred = values - origin
    numbers = {name: index for index, name in enumerate(dict.fromkeys(classes))}
    member = torch.nn.functional.one_hot(torch.tensor([numbers[name] for name in classes]), len(numbers)).double()
    means = (member.T @ centred) / member.sum(dim=0).unsqueeze(1)
    rest = (centred - member @ means) / math.sqrt(max(1, len(values) - len(numbers)))
    # (S + r I)^-1/2 by the singular vectors of the rows: width by width would be slow for a large model.
    _, spread, right = torch.linalg.svd(rest, full_matrices=False)
    ridge = float(RIDGE * spread.square().sum() / values.shape[1]) or 1e-12
    scale = (spread.square() + ridge).rsqrt() - ridge**-0.5

    def whiten(rows: torch.Tensor) -> torch.Tensor:
        whitened: torch.Tensor = rows * ridge**-0.5 + ((rows @ right.T) * scale) @ right
        return whitened

    across = whiten((centred[harmful].mean(dim=0) - centred[harmless].mean(dim=0)).unsqueeze(0))
    across = torch.nn.functional.normalize(across, dim=-1)
    spreads = means if len(numbers) > 2 else centred
    left = whiten(spreads - spreads.mean(dim=0))
    left = left - (left @ across.T) @ across
    _, _, directions = torch.linalg.svd(left, full_matrices=False)
    return Axes(origin, whiten(torch.cat([across, directions[:1]])))


def project(material: Material, layer: int, *, shuffle: int | None = None) -> Projection:
    """Prompts of a layer in the planes of PCA and LDA, before and after steering, on axes fitted before.

    PCA sees no labels and shows every prompt. LDA is fitted on one half of the subtopics of each category and shows
    the other half; shown on its own half it would separate what is not separate. x: harmful against matched
    counterparts (against the pool where there are none), y: the leading direction of categories left. Each axis
    points to the harmful side. `shuffle`: a seed for swapping labels within pairs, the control. Raises
    `SafeSteerError` for a layer that was not read or where a half lacks a kind.
    """
    slot = material.slot(layer)
    before, after = material.before[slot], material.after[slot]
    kinds = _kinds(material, shuffle)
    opposite: Kind = "matched" if "matched" in kinds else "pool"
    harmful = torch.tensor([kind == "harmful" for kind in kinds])
    harmless = torch.tensor([kind == opposite for kind in kinds])
    fitted = _fitting_half(material)
    if not all(bool((rows & half).any()) for rows in (harmful, harmless) for half in (fitted, ~fitted)):
        raise SafeSteerError("a projection needs harmful and harmless prompts in both halves; give more prompts")

    plane, share = pca_axes(before)
    classes = [(row.category, kind) for row, kind in zip(material.rows, kinds, strict=True)]
    chosen = fitted.nonzero().flatten().tolist()
    discriminant = lda_axes(before[fitted], harmful[fitted], harmless[fitted], [classes[index] for index in chosen])
    pca, pca_after = _oriented(plane, before, after, harmful, harmless)
    lda, lda_after = _oriented(discriminant, before, after, harmful & fitted, harmless & fitted)
    tested, counterparts = harmful & ~fitted, lda[harmless & ~fitted, 0]
    return Projection(
        layer=layer,
        points=tuple(
            Point(
                index,
                kind,
                row.category,
                _place(pca[index]),
                _place(pca_after[index]),
                None if held else _place(lda[index]),
                None if held else _place(lda_after[index]),
            )
            for index, (row, kind, held) in enumerate(zip(material.rows, kinds, fitted.tolist(), strict=True))
        ),
        pca_share=share,
        auroc=auroc(lda[tested, 0], counterparts),
        auroc_after=auroc(lda_after[tested, 0], counterparts),
        shuffled=shuffle is not None,
    )


def projections(material: Material, *, shuffle: int | None = None) -> list[Projection]:
    """`project` at every layer, for a slider: each axis is turned so that prompts stay on the side they were on before."""
    found: list[Projection] = []
    for layer in material.layers:
        one = project(material, layer, shuffle=shuffle)
        found.append(_aligned(one, found[-1]) if found else one)
    return found


def _kinds(material: Material, shuffle: int | None) -> list[Kind]:
    """What each row counts as: as it is, or with harmful and matched swapped within pairs by a coin."""
    kinds: list[Kind] = [row.kind for row in material.rows]
    if shuffle is None:
        return kinds
    generator = torch.Generator().manual_seed(shuffle)
    paired = {row.pair for row in material.rows if row.kind == "matched"}
    rows = [index for index, row in enumerate(material.rows) if row.pair in paired]
    if not rows:  # no counterparts: harmful and pool change places at random
        rows = list(range(len(kinds)))
        order = torch.randperm(len(rows), generator=generator).tolist()
        return [kinds[index] for index in order]
    harmful = torch.tensor([kinds[index] == "harmful" for index in rows])
    mixed = swapped(harmful, [material.rows[index].pair for index in rows], generator).tolist()
    for index, is_harmful in zip(rows, mixed, strict=True):
        kinds[index] = "harmful" if is_harmful else "matched"
    return kinds


def _fitting_half(material: Material) -> torch.Tensor:
    """Bool `[prompts]`: every second subtopic of each category; every second pair where a category has one subtopic."""
    half = torch.zeros(len(material.rows), dtype=torch.bool)
    for category in dict.fromkeys(row.category for row in material.rows):
        rows = [index for index, row in enumerate(material.rows) if row.category == category]
        groups = sorted({material.rows[index].group for index in rows})
        pairs = sorted({material.rows[index].pair for index in rows})
        for index in rows:
            row = material.rows[index]
            half[index] = (groups.index(row.group) if len(groups) > 1 else pairs.index(row.pair)) % 2 == 0
    return half


def _oriented(
    axes: Axes, before: torch.Tensor, after: torch.Tensor, harmful: torch.Tensor, harmless: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates `[prompts, 2]` before and after, each axis turned so that harmful prompts lie on its positive side."""
    placed, moved = axes.of(before), axes.of(after)
    sign = torch.where(placed[harmful].mean(dim=0) < placed[harmless].mean(dim=0), -1.0, 1.0)
    return placed * sign, moved * sign


def _aligned(one: Projection, previous: Projection) -> Projection:
    """`one` with the y axes, and the x axis of PCA, turned towards where `previous` put the same prompts."""

    def agreement(now: list[Place], then: list[Place]) -> Place:
        a, b = torch.tensor(now), torch.tensor(then)
        total = ((a - a.mean(dim=0)) * (b - b.mean(dim=0))).sum(dim=0)
        return (-1.0 if total[0] < 0 else 1.0), (-1.0 if total[1] < 0 else 1.0)

    pca = agreement([point.pca for point in one.points], [point.pca for point in previous.points])
    seen = [(a.lda, b.lda) for a, b in zip(one.points, previous.points, strict=True) if a.lda and b.lda]
    lda = (1.0, agreement([now for now, _ in seen], [then for _, then in seen])[1])

    def turn(place: Place | None, sign: Place) -> Any:
        return None if place is None else (place[0] * sign[0], place[1] * sign[1])

    points = tuple(
        Point(
            point.row,
            point.kind,
            point.category,
            turn(point.pca, pca),
            turn(point.pca_after, pca),
            turn(point.lda, lda),
            turn(point.lda_after, lda),
        )
        for point in one.points
    )
    return Projection(one.layer, points, one.pca_share, one.auroc, one.auroc_after, one.shuffled)


# -- small helpers -----------------------------------------------------------------------------------------------------


def _place(pair: torch.Tensor) -> Place:
    return float(pair[0]), float(pair[1])


def _table(matrix: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())


def _band(runs: Sequence[Sequence[float]]) -> Band:
    data = torch.tensor([list(run) for run in runs], dtype=torch.float64)  # as exact as what is set against it
    return Band(*(tuple(part.tolist()) for part in (data.mean(dim=0), data.amin(dim=0), data.amax(dim=0))))


def _rounded(values: Any) -> Any:
    return [_rounded(one) if isinstance(one, tuple) else round(one, 4) for one in values]
