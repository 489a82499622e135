"""Directions: the formulas, on small numbers."""

from __future__ import annotations

import pytest
import torch

from safesteer.activations import collect
from safesteer.errors import SafeSteerError
from safesteer.models import LoadedModel, encode
from safesteer.prompts import Prompt, PromptSet
from safesteer.vectors import FitSettings, fit
from safesteer.vectors.directions import (
    METHODS,
    clip_massive,
    direction,
    mean_difference,
    principal_component,
    pruned_mean_difference,
    shrink,
)
from tests.tiny import prompts

HARMFUL = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 6.0], [0.0, 0.0]])
HARMLESS = torch.tensor([[2.0, 0.0], [3.0, 2.0], [2.0, 9.0], [0.0, 4.0]])


def test_mean_difference_points_from_the_risk_to_the_harmless() -> None:
    assert mean_difference(HARMFUL, HARMLESS).tolist() == [0.25, 2.25]


def test_pruning_keeps_the_differences_at_or_above_the_median_norm() -> None:
    # differences (1, 0), (0, 2), (0, 3), (0, 4): norms 1, 2, 3, 4, median 2.5
    assert pruned_mean_difference(HARMFUL, HARMLESS, paired=True).tolist() == [0.0, 3.5]


def test_pruning_without_pairs_uses_the_harmless_mean() -> None:
    harmless = torch.tensor([[0.0, 4.0], [0.0, 8.0]])  # mean (0, 6)
    # differences (-1, 6), (-3, 6), (-2, 0), (0, 6): norms 6.08, 6.71, 2, 6, median 6.04
    assert pruned_mean_difference(HARMFUL, harmless, paired=False).tolist() == [-2.0, 6.0]


def test_the_principal_component_finds_the_planted_axis_and_its_sign() -> None:
    axis = torch.nn.functional.normalize(torch.randn(16), dim=0)
    harmful = torch.randn(50, 16) * 0.01
    harmless = harmful + torch.linspace(0.5, 2, 50)[:, None] * axis + torch.randn(50, 16) * 0.01
    found = principal_component(harmful, harmless, paired=True)
    assert float(torch.nn.functional.cosine_similarity(found, axis, dim=0)) > 0.999
    assert float(found.norm()) == pytest.approx(1.25, rel=0.02)


def test_massive_dimensions_are_clipped_and_the_share_is_told() -> None:
    reference = torch.randn(100, 64)
    reference[:, 7] *= 500
    vector = torch.ones(64)
    vector[7] = -100.0
    result = clip_massive(vector, reference.abs().mean(dim=0))
    assert result.direction[7] == -1.0
    assert torch.equal(result.direction[:7], vector[:7])
    assert result.share == pytest.approx(1 - 64 / (63 + 10_000))
    assert clip_massive(vector, torch.randn(100, 64).abs().mean(dim=0)).share == 0.0


def test_shrinking_moves_towards_the_shared_direction_at_equal_norm() -> None:
    directions = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    common = torch.tensor([1.0, 1.0, 0.0]) / 2**0.5
    assert torch.equal(shrink(directions, 0.0), directions)
    assert torch.equal(shrink(directions[:1], 0.7), directions[:1])
    torch.testing.assert_close(shrink(directions, 1.0), torch.stack([3 * common, 2 * common]))
    half = shrink(directions, 0.5)
    torch.testing.assert_close(half.norm(dim=1), torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(half[0] / 3, torch.nn.functional.normalize(torch.tensor([1.0, 0, 0]) + common, dim=0))


@pytest.mark.parametrize("method", METHODS)
def test_sizes_may_differ_and_nothing_to_learn_is_an_error(method: str) -> None:
    assert direction(method, torch.randn(5, 8), torch.randn(9, 8) + 1, paired=False).shape == (8,)  # type: ignore[arg-type]
    same = torch.randn(4, 8)
    with pytest.raises(SafeSteerError, match="do not differ"):
        direction(method, same, same, paired=True)  # type: ignore[arg-type]
    with pytest.raises(SafeSteerError, match="at least one"):
        direction(method, same[:0], same, paired=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no pairs"):
        direction(method, same, same[:1], paired=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_two_sets_of_one_size_are_not_taken_for_pairs(method: str, llama: LoadedModel) -> None:
    """Harmless prompts in another order, or one more of them, are the same harmless prompts."""
    own = [Prompt(text, None) for text in ("Name a river.", "What is jam?", "Who wrote it?")]
    breaking = PromptSet(prompts().of("breaking").prompts[:3])

    def against(harmless: list[Prompt]) -> torch.Tensor:
        settings = FitSettings(
            method=method,  # type: ignore[arg-type]
            layers=(1,), gate=False, position="last", harmless=PromptSet(tuple(harmless)),
        )  # fmt: skip
        return fit(llama, None, breaking, settings).directions[0, 0]

    torch.testing.assert_close(against(own), against(own[::-1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(against(own), against(own * 2), rtol=1e-4, atol=1e-5)


def test_counterparts_are_pairs_whatever_their_number(llama: LoadedModel) -> None:
    """Sizes agree here too; what says so is where the prompts come from."""
    rows = prompts().of("breaking")
    encoded = [encode(llama.tokenizer, text) for one in rows for text in (one.text, one.matched or "")]
    values = collect(llama, encoded, (1,)).values["residual", "last"][0]
    found = fit(llama, None, rows, FitSettings("default", "pca", None, (1,), "last", gate=False, shrinkage=0.0))
    expected = principal_component(values[::2], values[1::2], paired=True)
    torch.testing.assert_close(found.directions[0, 0], expected, rtol=1e-3, atol=1e-4)
    other = principal_component(values[::2], values[1::2], paired=False)
    assert float(torch.cosine_similarity(other, expected, dim=0)) < 0.999
