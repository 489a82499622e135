"""What a figure says, in a sentence with its numbers; what the data does not show, no sentence claims.

    stands out     max over blocks of AUROC  >  max over blocks of AUROC with labels swapped, whichever draw is highest
    told apart     AUROC on the LDA axis     >  the highest of the draws with labels swapped
    moves more     z * deviation  >  CLEAR * the same of random directions        in nats, of steering's words
    words          z              >  CLEAR * z of random directions                of the direct lens
    differs        p < 0.05 of a paired test on the same prompts (of the best of several blocks: times their number)

The highest of 20 draws is passed by chance about once in 20 times; of twelve categories one may. The best block is chosen among
many, so the control's is too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from safesteer.evaluation.report import number, percent
from safesteer.evaluation.report import title as category_title
from safesteer.evaluation.statistics import ERROR
from safesteer.explain.causal import CausalCheck
from safesteer.explain.doses import DoseResponse, LayerEffects
from safesteer.explain.geometry import CosineMap, Projection, Separation
from safesteer.explain.lens import Lens
from safesteer.explain.neurons import FEWEST, CategoryNeurons
from safesteer.vectors import VectorBank
from safesteer.vectors.gate import auroc

CLEAR = 1.25  # times the z of random directions, from which words are said to stand out


def stands_out(found: Separation) -> bool:
    """Whether a category is told apart at some block better than labels swapped within pairs ever are at any."""
    return max(found.auroc) > max(found.shuffled.high)


def separation(category: str, found: Separation) -> str:
    """Where a category stands out, against swapped labels."""
    best, nothing = f"{max(found.auroc):.2f}", f"{max(found.shuffled.high):.2f}"
    name = category_title(category)
    if stands_out(found):
        return f"{name} stands out most at block {found.best} (AUROC {best}; labels swapped: at most {nothing})"
    return f"{name} does not stand out clearly: AUROC {best} at block {found.best}, labels swapped reach {nothing}"


def swapped_separation(category: str, found: Separation) -> str:
    """The same where labels were swapped: nothing to find."""
    verdict = "stands out all the same, by chance" if stands_out(found) else "does not stand out"
    return (
        f"{category_title(category)} with its labels swapped {verdict}: AUROC at most {max(found.auroc):.2f}, other swaps "
        f"{max(found.shuffled.high):.2f}"
    )


def median_cosine(found: CosineMap, cosines: Sequence[Sequence[float]]) -> float | None:
    """The median cosine of two different categories; None for one category."""
    own = [index for index, kind in enumerate(found.kinds) if kind == "category"]
    values = sorted(cosines[one][other] for one in own for other in own if other < one)
    return values[len(values) // 2] if values else None


def cosines(found: CosineMap, *, before: bool = False, random: bool = False) -> str:
    """How alike category directions are, against random ones."""
    matrix = found.before_shrinkage if before else found.cosines
    middle = None if matrix is None else median_cosine(found, matrix)
    if middle is None:
        return "One category: there is nothing to compare it with but random directions"
    expected = 0.0 if before or random else found.random_after_shrinkage
    nothing = (
        f"random ones moved alike: {expected:.2f}" if expected else f"two random ones: 0 ± {found.random_deviation:.2f}"
    )
    when = " before shrinkage" if before else ""
    if random:
        return f"Random directions in place of the bank's: median cosine {_signed(middle)} ({nothing})"
    if abs(middle - expected) <= 2 * found.random_deviation:
        return f"Category directions{when} are no more alike than chance: median cosine {_signed(middle)} ({nothing})"
    verdict = "are alike" if middle > expected else "point against each other"
    return f"Category directions{when} {verdict}: median cosine {_signed(middle)} ({nothing})"


def doses(bank: VectorBank) -> str:
    """Where a bank acts, and how strongly."""
    totals = sorted({round(bank.dose(name), 3) for name in bank.categories})
    acting = bank.acting
    if not acting:
        return "This bank acts nowhere by default"
    span = f"block {acting[0]}" if len(acting) == 1 else f"blocks {acting[0]} to {acting[-1]}"
    total = f"{totals[0]:g}" if len(totals) == 1 else f"{totals[0]:g} to {totals[-1]:g}"
    return f"Strength 1 adds {total} of the residual stream's length in all, at {span}"


def projection(found: Projection, shuffled: Sequence[float]) -> str:
    """How far the LDA axis tells held-out prompts apart, before and after steering."""
    nothing = f"labels swapped: at most {max(shuffled):.2f}" if shuffled else "no control"
    before, after = f"{found.auroc:.2f}", f"{found.auroc_after:.2f}"
    where = f"Block {found.layer}"
    if not shuffled or found.auroc > max(shuffled):
        if all(point.lda_after == point.lda for point in found.points):
            return f"{where}: held-out risk shows (AUROC {before}; {nothing}); steering has not moved it here"
        return f"{where}: held-out risk shows (AUROC {before}; {nothing}), {after} once steered"
    return f"{where}: held-out risk does not show clearly (AUROC {before}; {nothing}), {after} once steered"


def swapped_projection(found: Projection) -> str:
    """LDA axes fitted to swapped labels."""
    return f"Block {found.layer}, labels swapped: held-out AUROC {found.auroc:.2f}, where 0.5 is chance"


def components(found: Projection) -> str:
    """What PCA shows."""
    both = found.pca_share[0] + found.pca_share[1]
    return f"Block {found.layer}: the two leading components hold {percent(both)} of the variance, whatever it is about"


def category_projection(category: str, found: Projection) -> str:
    """One category on the LDA axis, on few prompts."""
    before, after, counterparts = [], [], []
    for point in found.points:
        if point.category == category and point.lda is not None and point.lda_after is not None:
            if point.kind == "harmful":
                before.append(point.lda[0])
                after.append(point.lda_after[0])
            elif point.kind == "matched":
                counterparts.append(point.lda[0])
    name = f"{category_title(category)}, block {found.layer}"
    if not before or not counterparts:
        return f"{name}: too few held-out prompts for a figure"
    now, then = (_auroc(values, counterparts) for values in (before, after))
    return f"{name}: AUROC {now:.2f} on {len(before)} held-out prompts, {then:.2f} once steered"


def reach(found: Lens) -> tuple[float, float]:
    """How far the words shown are moved, mean of both ends in the lens's unit, and how far random directions move theirs."""
    return found.z * found.deviation, found.control_z * found.control_deviation


def moves_more(found: Lens) -> bool:
    """Whether steering moves its words clearly further than random directions of the same norm move theirs."""
    own, nothing = reach(found)
    return own > CLEAR * nothing


def words_stand_out(found: Lens) -> bool:
    """Whether the tokens at either end stand out among the others clearly more than those of random directions."""
    return found.z > CLEAR * found.control_z


def words(category: str, found: Lens) -> str:
    """How far steering moves its words, against random directions; z, by which they stand out among the others, beside it."""
    own, nothing = reach(found)
    beside = f"z {number(found.z)} and {number(found.control_z)}"
    name = category_title(category)
    if moves_more(found):
        return f"{name} moves its words by {number(own)} nats, a random direction by {number(nothing)} ({beside})"
    return f"{name} moves its words hardly more than a random direction: {number(own)} nats against {number(nothing)} ({beside})"


def shared_words(lenses: Sequence[Lens]) -> str:
    """The words that more than half of all categories have in common, which say nothing of any one."""
    if len(lenses) < 3:
        return ""
    found = []
    for end, said in (("promotes", "more"), ("suppresses", "less")):
        counted = Counter(token.text for one in lenses for token in getattr(one, end))
        common = [text.strip() for text, count in counted.most_common(6) if 2 * count > len(lenses)]
        if common:
            found.append(f"{said} likely {', '.join(common)}")
    if not found:
        return "No word is among those of more than half of the categories."
    return f"More than half of the categories share: {'; '.join(found)}. Such words speak of steering as such, not of a category."


def neurons_stand_out(found: CategoryNeurons) -> bool:
    """Whether more neurons pass the edge than in any swap."""
    return found.survivors > found.swapped[1]


def neurons(category: str, found: CategoryNeurons, tested: int, unit: str = "neurons") -> str:
    """How many neurons tell a category, against swapped pairs."""
    name, passed = category_title(category), f"{found.survivors} of {tested:,} {unit} pass"
    mean, most = number(found.swapped[0]), found.swapped[1]
    if found.pairs < FEWEST:
        return f"{name}: {found.pairs} pairs are too few to test single {unit}; it takes {FEWEST}"
    if neurons_stand_out(found):
        return f"{name}: {passed}, more than in any swap of its pairs ({mean} on average, at most {most})"
    return f"{name}: {passed}, which some swaps of its pairs reach too ({mean} on average, at most {most})"


def response(found: DoseResponse) -> str:
    """What the strongest dose does to unsafe answers."""
    first, last = found.doses[0], found.doses[-1]
    if not first.judged or not last.judged or found.change is None:
        return "The judge could not judge the answers, so no outcome can be shown"
    change = " to ".join(percent(one.outcomes["unsafe"] / one.judged) for one in (first, last))
    between = f"strength {first.strength:g} to {last.strength:g}, {last.judged} answers each, p {found.p:.2g}"
    if found.p < ERROR:
        return f"Unsafe answers go from {change} ({between})"
    return f"Unsafe answers go from {change}, which so few cannot tell from no change ({between})"


def layers(found: LayerEffects) -> str:
    """At which block the whole dose moves the next token most."""
    best = max(found.layers, key=lambda one: one.effect.value)
    p = min(1.0, best.p * len(found.layers))
    figures = f"{number(best.effect.value)} nats; a random direction there {number(best.control.value)}, p {p:.2g}"
    if p < ERROR and best.effect.value > best.control.value:
        return f"The whole dose at one block moves the next token most at block {best.layer} ({figures})"
    return f"No block moves the next token clearly more than a random direction does: block {best.layer}, {figures}"


def causal(found: CausalCheck) -> str:
    """The verdict of the causal check."""
    return found.verdict


def _auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    import torch

    return auroc(torch.tensor(positive), torch.tensor(negative))


def signed(value: float) -> str:
    """`+1.32`, `−0.20`."""
    return f"{value:+.2f}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
