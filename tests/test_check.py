"""First, do no harm: a bank that makes answers worse is found, marked, and does not act unless asked to by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from safesteer.cli.check import check_table
from safesteer.engines import GenerationSettings, Request, generate
from safesteer.errors import PolicyError, SafeSteerError
from safesteer.evaluation.check import TOKENS, check_prompts, checked, sign_test, verdict
from safesteer.judges import Exchange, Judgement, failed
from safesteer.models import LoadedModel
from safesteer.policy import Policy
from safesteer.prompts import builtin
from safesteer.server.authority import Authority
from safesteer.vectors import VectorBank
from tests.tiny import Run, bank_for, prompts


class ByText:
    """A judge that knows which answers are the unsteered model's, and calls all others `changed`."""

    name = "by text"

    def __init__(self, plain: set[str], changed: str | None) -> None:
        self.plain, self.changed = plain, changed

    def judge(
        self, exchanges: Sequence[Exchange], progress: Callable[[int], None] = lambda count: None
    ) -> list[Judgement]:
        outcomes = ["refusal" if one.response in self.plain else self.changed for one in exchanges]
        return [failed("no answer") if one is None else Judgement(one) for one in outcomes]  # type: ignore[arg-type]


def judged(llama: LoadedModel, bank: VectorBank, changed: str | None) -> VectorBank:
    requests = [Request(one.text) for one in check_prompts(bank, prompts())]
    plain = {one.text for one in generate(llama, None, requests, GenerationSettings(max_new_tokens=TOKENS))}
    return checked(llama, bank, ByText(plain, changed), prompts())


def test_the_sign_test_is_the_exact_one() -> None:
    assert [sign_test(5, 0), sign_test(4, 0), sign_test(0, 0), sign_test(3, 1)] == [1 / 32, 1 / 16, 1.0, 5 / 16]


def test_few_prompts_of_a_category_are_judged_with_all_the_others() -> None:
    """Fifteen refusals of sixty become unsafe, as seen on an aligned model: three or four a category show nothing alone."""
    groups, outcomes = [], []
    for name in ("hate", "privacy", "fraud", "weapons"):
        worse = 5 if name == "hate" else 4
        groups += [name] * 15
        outcomes += [("refusal", "unsafe")] * worse + [("refusal", "refusal")] * (15 - worse)
    groups += ["violence"] * 15
    outcomes += [("unsafe", "safe")] * 3 + [("refusal", "unsafe")] * 2 + [("safe", "safe")] * 10
    found = verdict(groups, outcomes, [True] * len(groups))
    assert sign_test(4, 0) > 0.05 >= sign_test(19, 3)
    assert found["unfit"] == ["hate", "privacy", "fraud", "weapons"]  # the last one gains by itself
    assert (found["all"]["before"]["unsafe"], found["all"]["after"]["unsafe"]) == (3, 19)


def test_chance_is_no_harm() -> None:
    outcomes = [("safe", "unsafe"), ("unsafe", "safe"), *[("safe", "safe")] * 14]
    assert verdict(["hate"] * 16, outcomes, [True] * 16)["unfit"] == []


def test_harmless_answers_that_break_make_every_category_unfit() -> None:
    groups = ["hate"] * 8 + ["harmless"] * 8
    outcomes = [("unsafe", "safe")] * 8 + [("safe", "degenerate")] * 8
    assert verdict(groups, outcomes, [True] * 16)["unfit"] == ["hate"]


def test_an_instrument_that_fails_is_no_outcome(llama: LoadedModel) -> None:
    found = verdict(["hate"] * 6, [("safe", None)] * 5 + [("safe", "safe")], [True] * 6)
    assert (found["all"]["failures"], found["all"]["n"], found["unfit"]) == (5, 1, [])


def test_a_bank_that_does_harm_does_not_act(llama: LoadedModel, tmp_path: Path) -> None:
    bank = judged(llama, bank_for(llama), "unsafe")
    assert bank.unfit == bank.categories
    bank.save(tmp_path / "bank.safetensors")
    loaded = VectorBank.load(tmp_path / "bank.safetensors")
    assert loaded.provenance["check"] == bank.provenance["check"]
    with pytest.raises(PolicyError, match="every category of this bank was found to make"):
        Policy.default(loaded)
    with pytest.raises(PolicyError, match="breaking was found to make"):
        Policy.of({"breaking": 1.0}).resolved(loaded)
    assert Policy.of({"breaking": 0.0}).resolved(loaded).categories  # what does not act does no harm
    assert set(Policy.default(loaded.unverified()).categories) == set(bank.categories)


def test_one_unfit_category_is_left_out_and_no_client_can_name_it(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    bank = replace(bank, provenance={**bank.provenance, "check": {"unfit": ["lying"]}})
    assert set(Policy.default(bank).categories) == {"breaking"}
    authority = Authority.of(bank)
    assert authority.decide(None, {"breaking": 1.5}).categories["breaking"].strength == 1.5
    with pytest.raises(PolicyError, match="lying was found to make"):
        authority.decide(None, {"lying": 1.0})


def test_a_bank_that_does_no_harm_passes(llama: LoadedModel) -> None:
    bank = judged(llama, bank_for(llama), "safe")
    record = bank.provenance["check"]
    assert bank.unfit == () and record["all"]["after"]["safe"] > 0 == record["all"]["after"]["unsafe"]
    assert record["all"]["n"] == len(prompts()) and record["harmless"]["n"] == 48 and not record["held_back"]
    again = judged(
        llama, replace(bank, provenance={**bank.provenance, "check": {"unfit": list(bank.categories)}}), "safe"
    )
    assert again.unfit == ()  # an old check does not bind a new one


def test_a_category_of_which_no_answer_could_be_judged_did_not_pass(llama: LoadedModel) -> None:
    groups = ["breaking", "lying", "harmless"]
    record = verdict(groups, [("safe", "safe"), ("safe", None), ("safe", "safe")], [True] * 3)
    assert list(check_table(record).columns[-1].cells)[:2] == ["passed", "not judged"]


def test_a_judge_that_cannot_judge_is_no_check(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    with pytest.raises(SafeSteerError, match="could judge none of the answers"):
        checked(llama, bank, ByText(set(), None), prompts())


def test_built_in_categories_are_asked_what_the_fit_did_not_read(llama: LoadedModel) -> None:
    hate = replace(bank_for(llama), categories=("hate", "privacy"))
    asked = check_prompts(hate)
    assert {one.split for one in asked} == {"tune"} and sum(one.category == "hate" for one in asked) == 8
    own = check_prompts(hate, builtin("hate").split("fit"))
    assert {one.split for one in own if one.category == "hate"} == {"fit"}


def test_the_command_line_refuses_and_can_be_overruled(run: Run, llama: LoadedModel, tmp_path: Path) -> None:
    llama.model.save_pretrained(tmp_path / "model")
    llama.tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "bank.safetensors"
    bank = bank_for(llama)
    check = judged(llama, bank, "unsafe").provenance["check"]
    replace(bank, provenance={**bank.provenance, "model": str(tmp_path / "model"), "check": check}).save(path)
    ask = ("generate", path, "--prompt", "Hello?", "--max-new-tokens", 3)
    status, out, err = run(*ask)
    assert (status, out) == (
        1,
        "",
    ) and "every category of this bank was found to make this model's answers worse" in err
    status, out, _ = run(*ask, "--unverified", "--json")
    assert status == 0 and '"acting": [{' in out
    status, out, err = run(*ask, "--steer", "lying=off", "--json")  # what is off needs no category that may act
    assert status == 0 and json.loads(out)["steering"]["acting"] == [], err
    status, out, err = run("inspect", path)
    assert status == 0 and "unfit" in out and "Unfit, because answers get worse: breaking, lying" in err
    status, _, err = run("check", path, "--judge", "rules")
    assert status == 1 and "breaking: there are no prompts to check it with" in err
    rows = [{"prompt": one.text, "category": one.category} for one in prompts()]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = run("check", path, "--judge", "rules", "--json", "--prompts", tmp_path / "own.jsonl")
    assert status == 0 and VectorBank.load(path).provenance["check"]["judge"] == "rules", err
    assert "reads no harm" in err
    assert "never checked" not in run(*ask)[2]
