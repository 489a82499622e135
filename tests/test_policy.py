"""Policies: what adds up, what is capped, what is refused."""

from __future__ import annotations

import pytest
import torch

from safesteer.errors import PolicyError
from safesteer.models import LoadedModel
from safesteer.policy import Policy, parse_layers, plan
from tests.tiny import bank_for


def test_one_category_adds_its_dose_of_the_residual_norm(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    [delta] = plan(Policy.of({"breaking": 0.5}).resolved(bank), bank).deltas.values()
    assert float(delta[1].norm()) == pytest.approx(0.5 * 0.8 * float(bank.residual_norms[0]), rel=1e-5)
    assert float(delta[0].norm()) == 0.0  # padding is never steered


def test_several_categories_share_one_dose_and_the_report_says_what_was_added(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    both = plan(Policy.of({"breaking": 1.0, "lying": 1.0}).resolved(bank), bank)
    single = plan(Policy.of({"breaking": 1.0}).resolved(bank), bank)
    assert float(both.deltas[1][1].norm()) <= float(single.deltas[1][1].norm()) * 1.0001
    steps = bank.steps("breaking")[1] + bank.steps("lying")[1]
    kept = float(both.deltas[1][1].norm() / steps.norm())
    assert [one.dose for one in both.acting] == pytest.approx([0.8 * kept] * 2, rel=1e-4)


def test_other_layers_share_the_total_dose(llama: LoadedModel) -> None:
    bank = bank_for(llama, layers=(0, 1, 2))
    wide = plan(Policy.of({"breaking": 1.0}).resolved(bank), bank).deltas
    narrow = plan(Policy.of({"breaking": 1.0}, layers=(2,)).resolved(bank), bank).deltas
    share = {layer: float(d[1].norm() / bank.residual_norms[layer]) for layer, d in wide.items()}
    assert share == pytest.approx(dict.fromkeys((0, 1, 2), 0.8 / 3), rel=1e-4)
    assert float(narrow[2][1].norm() / bank.residual_norms[2]) == pytest.approx(0.8, rel=1e-4)


def test_negative_strength_is_for_research_from_python_only(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    with pytest.raises(PolicyError, match="negative"):
        Policy.of({"breaking": -1.0}).resolved(bank)
    with pytest.raises(PolicyError, match="only from Python"):
        Policy.parse({"research": True, "categories": {"breaking": -1.0}})
    towards = plan(Policy.of({"breaking": -1.0}, research=True).resolved(bank), bank)
    away = plan(Policy.of({"breaking": 1.0}).resolved(bank), bank)
    assert torch.equal(towards.deltas[1], -away.deltas[1])


@pytest.mark.parametrize(
    ("text", "layers"), [("15", (15,)), ("12-14", (12, 13, 14)), ("4, 9,12-13", (4, 9, 12, 13)), ("3,3", (3,))]
)
def test_layers_are_written_as_people_write_them(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "5-2", "-1", "0-99999999999"])
def test_layers_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="not understood"):
        parse_layers(text)
