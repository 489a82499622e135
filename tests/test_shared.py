"""Prompts without counterparts: the direction that the built-in pairs of other categories share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safesteer.models import LoadedModel
from safesteer.prompts import Prompt, PromptSet, builtin, builtin_categories
from safesteer.vectors import FitSettings, VectorBank, fit, fitting
from safesteer.vectors.directions import shrink

SETTINGS = {"layers": (1,), "gate": False, "position": "last", "shrinkage": 0.0}
ALONE = PromptSet(
    tuple(Prompt(f"How do I smash the {thing}?", "breaking") for thing in ("vase", "door", "lamp")), "mine"
)


def pairs_of(name: str) -> PromptSet:
    """The pairs of a built-in category that are lent."""
    own = tuple(builtin(name).split("fit"))
    return PromptSet(tuple(own[index * len(own) // fitting.LENT] for index in range(fitting.LENT)), name)


def fitted(
    loaded: LoadedModel, prompts: PromptSet | None, names: list[str] | None = None, **more: object
) -> VectorBank:
    return fit(loaded, names, prompts, FitSettings(**{**SETTINGS, **more}))  # type: ignore[arg-type]


@pytest.fixture
def each(llama: LoadedModel) -> dict[str, torch.Tensor]:
    """The unit direction of every built-in category, from the pairs it lends alone."""
    found = {}
    for name in builtin_categories():
        bank = fitted(llama, pairs_of(name))
        found[name] = torch.nn.functional.normalize(bank.directions[0, 0], dim=0)
    return found


def test_prompts_without_counterparts_take_the_direction_that_other_pairs_share(
    llama: LoadedModel, each: dict[str, torch.Tensor]
) -> None:
    bank = fitted(llama, ALONE)
    assert bank.provenance["prompts"]["breaking"]["harmless"] == "shared"
    expected = torch.stack(list(each.values())).sum(dim=0)
    assert torch.cosine_similarity(bank.directions[0, 0], expected, dim=0) > 0.99


def test_a_category_lends_nothing_to_itself(llama: LoadedModel, each: dict[str, torch.Tensor]) -> None:
    bank = fitted(llama, None, ["hate"], harmless="shared")
    others = torch.stack([value for name, value in each.items() if name != "hate"]).sum(dim=0)
    everything = others + each["hate"]
    got = bank.directions[0, 0]
    assert torch.cosine_similarity(got, others, dim=0) > torch.cosine_similarity(got, everything, dim=0)
    assert torch.cosine_similarity(got, others, dim=0) > 0.99


def test_with_counterparts_nothing_is_borrowed(llama: LoadedModel) -> None:
    paired = PromptSet(tuple(replace(one, matched=one.text.replace("smash", "mend")) for one in ALONE), "mine")
    assert fitted(llama, paired).provenance["prompts"]["breaking"]["harmless"] == "matched"
    assert fitted(llama, paired, harmless="builtin").provenance["prompts"]["breaking"]["harmless"] == "pool"


def test_it_is_read_in_answers_too(llama: LoadedModel) -> None:
    last, answer, both = (
        fitted(llama, ALONE, position=where).directions[0, 0] for where in ("last", "answer", "last+answer")
    )
    assert torch.cosine_similarity(last, answer, dim=0) < 0.99
    assert torch.cosine_similarity(both, last, dim=0) < 0.9999
    assert torch.cosine_similarity(both, last + answer, dim=0) > 0.5


def test_few_pairs_of_ones_own_are_moved_towards_the_shared_direction(
    llama: LoadedModel, each: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many pairs as `PRIOR`, half of each; the fewer there are, the more is borrowed."""
    paired = PromptSet(tuple(replace(one, matched=one.text.replace("smash", "mend")) for one in ALONE), "mine")
    own = torch.nn.functional.normalize(fitted(llama, paired).directions[0, 0], dim=0)
    shared = torch.nn.functional.normalize(torch.stack(list(each.values())).sum(dim=0), dim=0)
    monkeypatch.setattr(fitting, "PRIOR", len(paired))
    half = fitted(llama, paired, shrinkage=None)
    assert (
        half.provenance["prompts"]["breaking"] | {"harmless": "matched", "borrowed": 0.5}
        == half.provenance["prompts"]["breaking"]
    )
    assert torch.cosine_similarity(half.directions[0, 0], own + shared, dim=0) > 0.995
    monkeypatch.setattr(fitting, "PRIOR", 9 * len(paired))
    most = fitted(llama, paired, shrinkage=None)
    assert torch.cosine_similarity(most.directions[0, 0], 0.1 * own + 0.9 * shared, dim=0) > 0.995


def test_a_bank_of_many_categories_borrows_nothing(llama: LoadedModel) -> None:
    some = list(builtin_categories())[: fitting.FEW]
    prompts = PromptSet(tuple(p for name in some for p in tuple(builtin(name).split("fit"))[:2]), "some")
    bank = fitted(llama, prompts, shrinkage=None)
    assert {one["borrowed"] for one in bank.provenance["prompts"].values()} == {0.0}
    assert {
        one["borrowed"] for one in fitted(llama, prompts, some[1:], shrinkage=None).provenance["prompts"].values()
    } != {0.0}


def some_of(count: int) -> PromptSet:
    """Two pairs of each of a number of built-in categories."""
    names = list(builtin_categories())[:count]
    return PromptSet(tuple(p for name in names for p in tuple(builtin(name).split("fit"))[:2]), "some")


@pytest.mark.parametrize("count", [2, fitting.FEW])
@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.3, 1.0])
def test_a_category_without_counterparts_leaves_the_others_as_they_are(
    llama: LoadedModel, count: int, shrinkage: float | None
) -> None:
    """Whether shrinkage is chosen by the fit or said; and an explicit value holds, as the formula has it."""
    prompts = some_of(count)
    without = fitted(llama, prompts, shrinkage=shrinkage)
    with_one = fitted(llama, PromptSet((*prompts, *ALONE), "both"), shrinkage=shrinkage)
    assert with_one.categories == (*without.categories, "breaking")
    torch.testing.assert_close(with_one.directions[:count], without.directions, rtol=1e-4, atol=1e-5)
    lent = fitted(llama, ALONE).directions[0]
    torch.testing.assert_close(with_one.directions[count], lent, rtol=1e-4, atol=1e-5)
    used = fitting.SHRINKAGE if shrinkage is None else shrinkage
    if shrinkage is not None or count == fitting.FEW:
        raw = fitted(llama, prompts, shrinkage=0.0).directions[:, 0]
        torch.testing.assert_close(with_one.directions[:count, 0], shrink(raw, used), rtol=1e-4, atol=1e-5)
    for bank in (without, with_one):
        borrowed = {name: one["borrowed"] for name, one in bank.provenance["prompts"].items()}
        few = shrinkage is None and count < fitting.FEW
        assert bank.provenance["shrinkage"] == (None if few else used)
        assert all((borrowed[name] > 0) == few for name in without.categories)
        assert borrowed.get("breaking", 1.0) == 1.0


def test_the_default_of_matched_categories_is_what_it_was_to_the_bit(llama: LoadedModel) -> None:
    bank = fitted(llama, some_of(fitting.FEW), shrinkage=None)
    raw = fitted(llama, some_of(fitting.FEW), shrinkage=0.0)
    assert torch.equal(bank.directions[:, 0], shrink(raw.directions[:, 0], fitting.SHRINKAGE))
    assert bank.unshrunk is not None
    assert torch.equal(bank.unshrunk, raw.directions)


def test_the_directions_before_shrinkage_are_kept_and_come_back_from_the_file(
    llama: LoadedModel, tmp_path: Path
) -> None:
    bank = fitted(llama, PromptSet((*some_of(2), *ALONE), "both"), shrinkage=None)
    raw = fitted(llama, some_of(2), shrinkage=0.0)
    assert bank.unshrunk is not None
    torch.testing.assert_close(bank.unshrunk[:2], raw.directions, rtol=1e-4, atol=1e-5)
    bank.save(tmp_path / "bank.safetensors")
    again = VectorBank.load(tmp_path / "bank.safetensors").unshrunk
    assert again is not None and torch.equal(again, bank.unshrunk)
    replace(bank, unshrunk=None).save(tmp_path / "older.safetensors")
    assert VectorBank.load(tmp_path / "older.safetensors").unshrunk is None
