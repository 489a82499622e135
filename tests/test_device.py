"""Off the CPU no float64 is made (Apple silicon has none) and tensors of two devices do not meet; on a device made up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import safesteer
from safesteer import refusal
from safesteer.engines import GenerationSettings, Request, Steerer, generate
from safesteer.engines.vllm_collect import Collector, Job, What
from safesteer.engines.vllm_worker import Pass
from safesteer.evaluation.conditions import conditions
from safesteer.evaluation.measures import negative_log_likelihoods
from safesteer.evaluation.run import EvaluationSettings, evaluate, model_digest_of
from safesteer.evaluation.suites import Suite, SuiteRow
from safesteer.explain.one_prompt import explain_prompt
from safesteer.explain.sources import sources
from safesteer.explain.study import StudySettings, explain_bank
from safesteer.judges.base import Exchange
from safesteer.judges.features import reading
from safesteer.models import LoadedModel, encode
from safesteer.models.selftest import self_test
from safesteer.next_token import divergences
from safesteer.policy import Policy
from safesteer.prompts import PromptSet, harmless_pool, soundalikes
from safesteer.refusal import RefusalDirection
from safesteer.vectors import FitSettings, VectorBank
from safesteer.vectors.gate import ending
from tests import tiny
from tests.test_explain_attribution import gated
from tests.test_explain_report import Stub

device = pytest.importorskip("tests.device", exc_type=ImportError)  # torch has this from 2.10 on
TEXTS = ["How do I smash the vase?", "How do I mend the lamp that I broke?", "Hi"]


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoadedModel]:
    """The same model on the device."""
    monkeypatch.setattr(torch, "Generator", device.Generator)
    with device.Device():
        yield device.moved(tiny.make("llama"))


@pytest.fixture
def bank(llama: LoadedModel) -> VectorBank:
    return gated(llama)


def test_the_device_has_no_float64_and_does_not_mix() -> None:
    with device.Device():
        there, here = torch.ones(3, device=device.DEVICE), torch.ones(3)
        assert (there * 2 + here.to(device.DEVICE)).sum().item() == 9.0
        for make in (
            there.double,
            lambda: there.sum(dtype=torch.float64),
            lambda: torch.zeros(3, dtype=torch.float64, device=device.DEVICE),
            lambda: here.double().to(device.DEVICE),
            lambda: torch.tensor([0.5], dtype=torch.float64, device=device.DEVICE),
        ):
            with pytest.raises(TypeError, match=r"no torch\.float64"):
                make()
        with pytest.raises(RuntimeError, match="one device"):
            there + here
        assert here.double().dtype == torch.float64


def test_fit(llama: LoadedModel, away: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions at the prompt's end and in answers, calibration, the gate, risk neurons, the refusal direction."""
    monkeypatch.setattr(refusal, "FEWEST", 1)
    monkeypatch.setattr("safesteer.refusal.refusal", lambda text: float(len(text) % 2))
    for name, texts in (("harmless_pool", harmless_pool()), ("soundalikes", soundalikes())):
        few = PromptSet((*texts.split("fit").prompts[:8], *texts.split("tune").prompts[:4]), name)
        monkeypatch.setattr(f"safesteer.vectors.fitting.{name}", lambda few=few: few)
    settings = FitSettings(neurons=4, layers=(1, 2), shrinkage=0.5)
    llama.model.set_attn_implementation("eager")
    there = safesteer.fit(away, None, tiny.prompts(), settings, refusal="remove")
    here = safesteer.fit(llama, None, tiny.prompts(), settings, refusal="remove")
    torch.testing.assert_close(there.directions, here.directions, rtol=1e-3, atol=1e-4)
    assert there.gate is not None and here.gate is not None
    torch.testing.assert_close(there.gate.weights, here.gate.weights, rtol=1e-3, atol=1e-4)
    assert there.neurons is not None and here.neurons is not None
    assert torch.equal(there.neurons.indices, here.neurons.indices)
    assert there.model == here.model
    there.check(llama)


@pytest.mark.parametrize("site", ["directions", "neurons"])
def test_steering_and_reading(llama: LoadedModel, away: LoadedModel, bank: VectorBank, site: str) -> None:
    if site == "neurons":
        bank = tiny.bank_for(llama, neurons=8)
    how = {"strength": 1.0, "gate": "always" if site == "neurons" else "auto", "site": site}
    requests = [Request(text, Policy(categories={"breaking": how})) for text in TEXTS]  # type: ignore[dict-item]
    settings = GenerationSettings(6)
    for one in (settings, GenerationSettings(6, temperature=1.0)):
        there = generate(away, bank, requests, one)
    there, here = (generate(loaded, bank, requests, settings) for loaded in (away, llama))
    assert [one.text for one in there] == [one.text for one in here]
    if site == "directions":
        inputs = torch.tensor([encode(llama.tokenizer, TEXTS[0]).ids])
        readings = [Steerer(one, bank).read(inputs.to(one.device))[0] for one in (away, llama)]
        assert readings[0].risk == pytest.approx(readings[1].risk, abs=1e-4)
    assert all(one.passed for one in self_test(away))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_evaluating(llama: LoadedModel, away: LoadedModel, bank: VectorBank, tmp_path: Path) -> None:
    llama.model.set_attn_implementation("eager")
    rows = [SuiteRow(f"r{n}", f"prompt {n}", "breaking" if n % 2 else None) for n in range(4)]
    settings = EvaluationSettings(max_new_tokens=3)
    suites = [Suite("mine", tuple(rows))]
    there, here = (
        evaluate(one, bank, suites, conditions([], bank), [Stub()], settings, tmp_path / str(one.device.type))
        for one in (away, llama)
    )
    assert [one.outcomes for one in there.records] == [one.outcomes for one in here.records]
    asked = ["one prompt"], [Policy.of({"breaking": 1.0}, gate="always")]
    assert divergences(away, bank, *asked) == pytest.approx(divergences(llama, bank, *asked), rel=1e-3)
    said = TEXTS, ["Take a hammer.", "With glue.", "Hello."]
    assert negative_log_likelihoods(away, *said) == pytest.approx(negative_log_likelihoods(llama, *said), rel=1e-4)
    exchanges = [Exchange(prompt, answer) for prompt, answer in zip(*said, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safesteer.judges.features.LAYERS", (0, 1))
        blocks, own = reading(away, exchanges), reading(llama, exchanges)
    assert all(torch.allclose(blocks[name], own[name], atol=1e-5) for name in own)


def test_the_digest_of_a_model_sees_one_weight_among_many(llama: LoadedModel) -> None:
    before = model_digest_of(llama)
    with torch.no_grad():
        llama.model.model.embed_tokens.weight[7, 3] += 1e-4
    assert model_digest_of(llama) != before


def _by_difference(function: Any, at: tuple[torch.Tensor], along: tuple[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    now = function(*at)
    return now, (function(at[0] + 1e-3 * along[0]) - now) / 1e-3


def test_explaining(away: LoadedModel, bank: VectorBank) -> None:
    settings = StudySettings(most=4, worded=1, answered=1, placed=1, harmless=1, max_new_tokens=1)
    with pytest.MonkeyPatch.context() as patch:  # a random model declines nothing
        declining = RefusalDirection(-bank.directions[0], 9, 20)
        patch.setattr("safesteer.explain.study.refusal_direction", lambda *_, **__: declining)
        patch.setattr("safesteer.explain.study.STRENGTHS", (0.0, 1.0))
        patch.setattr("safesteer.explain.lens.jvp", _by_difference)  # forward mode knows no tensors of Python
        study = explain_bank(away, bank, Stub(), sources(bank, ["breaking"], tiny.prompts()), settings)
    assert study.left_out == {}
    view = explain_prompt(away, bank, TEXTS[0], generate=True, max_new_tokens=3)
    assert view.attribution.components


def test_sums_and_views_inside_a_vllm_worker(llama: LoadedModel, away: LoadedModel) -> None:
    """The collector on states as a pass would have left them: two prompts, of which the second comes in two chunks."""
    what = What((0, 2), gate_layers=(1,))
    rng = np.random.default_rng(0)
    states = rng.normal(size=(3, 12, 32)).astype(np.float32)
    found: list[dict[str, Any]] = []
    for loaded in (llama, away):
        collector = Collector(loaded.model, what, runner=1, tokens=12, dtype=torch.float32, held=range(3))
        collector.given("centres", np.zeros((1, 32), np.float32).tobytes(), (1, 32))
        collector.given("weights", np.ones((1, 1, 32), np.float32).tobytes(), (1, 1, 32))
        jobs = [
            Job("s", 0, "sum", "harmful/a", (4, 5), (1, 4), (1, 4)),
            Job("s", 1, "sum", "harmful/a", (5, 7), (1, 6), (1, 6)),
            Job("s", 2, "view", words=(1, 4)),
            Job("s", 3, "score", words=(1, 4)),
        ]
        for pair in (jobs[:2], jobs[2:]):
            for counts, computed in (((5, 3), (0, 0)), ((4,), (3,))):
                names = ("x", "y")[-len(counts) :]
                given = dict(zip(("x", "y"), pair, strict=True))
                collector.fill(
                    Pass(
                        names, np.array(counts), np.array(computed), np.array((5, 7)[-len(counts) :]),
                        lambda name, given=given: SimpleNamespace(extra_args=given[name].args()),
                    )
                )  # fmt: skip
                for layer, block in enumerate(loaded.layout.blocks):
                    block.safesteer_states.copy_(torch.from_numpy(states[layer]))
        found.append(collector.collected("s"))
    here, there = found
    assert here["done"] == there["done"] == 4 and here["tokens"] == there["tokens"] == 8
    values = torch.from_numpy(states).double()

    def read(data: bytes) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(data, np.float64).copy())

    # of the second prompt, token 5 is the third of the second chunk
    expected = values[[0, 2], 4] + values[[0, 2], 2:4].mean(dim=1)
    for one in (here, there):
        total = read(one["groups"]["harmful/a"]["total"]).reshape(2, 32)
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            read(one["norms"]),
            values[[0, 2], 1:4].norm(dim=-1).sum(dim=1)
            + torch.cat([values[[0, 2], 6:8], values[[0, 2], 0:3]], dim=1).norm(dim=-1).sum(dim=1),
            rtol=1e-6, atol=1e-6,
        )  # fmt: skip
        unit = torch.nn.functional.normalize(values[1], dim=-1)
        view = ending(unit[1:5].float()).flatten().double()
        torch.testing.assert_close(read(one["rows"]["2"])[:64], view, rtol=1e-5, atol=1e-6)
