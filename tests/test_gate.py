"""The gate: reading, thresholds, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safesteer.activations import collect
from safesteer.engines import GenerationSettings, Request, Steerer, generate
from safesteer.errors import SafeSteerError
from safesteer.models import LoadedModel, encode
from safesteer.policy import Policy
from safesteer.prompts import harmless_pool, soundalikes
from safesteer.vectors import FitSettings, fit
from safesteer.vectors import gate as gates
from safesteer.vectors.gate import Gate, Turns, auroc, ridge, strongest
from tests.test_invariants import TEXTS, batch, logits
from tests.tiny import bank_for, prompts


def fit_gate(turns: list[torch.Tensor], words: list[int], **rest: Any) -> Gate:
    return gates.fit_gate(Turns(turns, words), **rest)


def planted(count: int = 60, layers: int = 2, width: int = 16) -> dict[str, object]:
    """Turns of eight tokens with a planted risk direction and two planted topics."""
    generator = torch.Generator().manual_seed(5)
    risk, topic_a, topic_b = torch.eye(width)[:3]
    values, labels, harmful, groups, kinds = [], [], [], [], []
    for index in range(count):
        for label, topic in (("a", topic_a), ("b", topic_b), (None, torch.zeros(width))):
            for is_harmful in (True, False) if label else (False,):
                noise = torch.randn(layers, 8, width, generator=generator) * 0.3
                values.append(noise + topic + risk * float(is_harmful) + 0.5)
                labels.append(label)
                harmful.append(is_harmful)
                groups.append(f"{label}/{index % 10}")
                kinds.append("harmful" if is_harmful else "matched" if label else "pool")
    return {
        "turns": values, "words": [6] * len(values), "layers": range(layers), "labels": labels, "harmful": harmful,
        "groups": groups, "kinds": kinds,
    }  # fmt: skip


def test_a_planted_risk_is_read_and_its_category_named() -> None:
    data = planted()
    gate = fit_gate(**data)  # type: ignore[arg-type]
    assert gate.quality["auroc_against_pool"] > 0.99
    assert gate.quality["auroc_against_matched"] > 0.95
    readings = gate.read(data["turns"])  # type: ignore[arg-type]
    right = [
        reading.categories == (label,) if is_harmful else True
        for reading, label, is_harmful in zip(readings, data["labels"], data["harmful"], strict=True)  # type: ignore[call-overload]
    ]
    assert sum(right) / len(right) > 0.95
    calm = [r for r, kind in zip(readings, data["kinds"], strict=True) if kind == "pool"]  # type: ignore[call-overload]
    assert sum(bool(r.categories) for r in calm) / len(calm) <= 0.12


def test_harm_in_the_midst_of_a_long_harmless_prompt_is_read_where_it_stands() -> None:
    data = planted()
    gate = fit_gate(**data)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(9)
    risk, topic = torch.eye(16)[:2]
    calm = torch.randn(2, 120, 16, generator=generator) * 0.3 + 0.5
    hidden = calm.clone()
    hidden[:, 40:60] += risk + topic
    without, with_harm = gate.read([calm, hidden])
    assert not without.categories
    assert with_harm.categories == ("a",)
    tokens = torch.tensor(with_harm.tokens)
    assert 40 <= int(tokens.argmax()) < 60
    assert float(tokens[40:60].mean()) > float(tokens[:40].mean()) + 2


def test_the_risk_joins_ending_and_passage() -> None:
    data = planted()
    gate = fit_gate(**data)  # type: ignore[arg-type]
    turn = data["turns"][0]  # type: ignore[index]
    states = torch.nn.functional.normalize(
        torch.nn.functional.normalize(turn, dim=-1) - gate.centres.unsqueeze(1), dim=-1
    )
    ends = torch.cat([states[0, -1], states[1, -1], states[0, -6:].mean(0), states[1, -6:].mean(0)])
    a = gate.weights[0] @ ends + gate.biases[0]
    b = (states * gate.token_weights.unsqueeze(1)).sum(dim=(0, 2)).mean() + gate.token_bias[0]
    z = [(value - gate.calm[i, 0]) / gate.calm[i, 1] for i, value in enumerate((a, b))]
    expected = torch.log(z[0].exp() + z[1].exp())
    assert gate.read([turn])[0].risk == pytest.approx(float(expected), abs=1e-4)


def others(shift: float = 0.0, count: int = 400) -> Turns:
    """Harmless turns that no gate was fitted on, drawn as those of `planted` are, moved towards risk by `shift`."""
    generator = torch.Generator().manual_seed(11)
    calm = torch.randn(count, 2, 8, 16, generator=generator) * 0.3 + 0.5 + shift * torch.eye(16)[0]
    return Turns(list(calm), [6] * count)


def opens(gate: Gate, turns: Turns) -> float:
    found = gates.measured(gate, turns, ["pool"] * len(turns)).unseen["pool"]
    return found[0] / found[1]


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_the_gate_opens_for_as_many_harmless_prompts_as_asked(rate: float) -> None:
    """Of others than those that chose its threshold, so that it might be otherwise."""
    gate = fit_gate(**planted(200), false_alarm=rate)  # type: ignore[arg-type]
    deviation = (
        rate * (1 - rate) * (1 / 200 + 1 / 400)
    ) ** 0.5  # of a threshold of 200 prompts, and of the count in 400
    assert opens(gate, others()) == pytest.approx(rate, abs=3 * deviation)
    with pytest.raises(SafeSteerError, match="not between 0 and 1"):
        fit_gate(**planted(5), false_alarm=1.0)  # type: ignore[arg-type]


def test_false_alarms_are_counted_among_prompts_that_chose_nothing() -> None:
    """The share asked for holds of the prompts of the fit by construction; of others it may not, and then that is said."""
    gate = fit_gate(**planted(), false_alarm=0.1)  # type: ignore[arg-type]
    assert gate.unseen == {} and "opened_pool" not in gate.quality
    assert opens(gate, others(1.0)) > 0.9
    assert opens(gate, others(-1.0)) < 0.01
    # few harmless prompts choose a threshold that holds for few others
    data = planted(4)
    few = [opens(fit_gate(**{**data, "turns": [one + 0.2 * torch.randn_like(one) for one in data["turns"]]}), others())  # type: ignore[attr-defined, arg-type]
           for _ in range(4)]  # fmt: skip
    assert max(abs(share - 0.1) for share in few) > 0.05


def test_what_is_measured_is_what_the_gate_reads() -> None:
    gate = fit_gate(**planted())  # type: ignore[arg-type]
    turns = others(0.05, 50)
    expected = sum(reading.opening > 0 for reading in gate.read(turns._turns))
    assert 0 < expected < 50
    assert gates.measured(gate, turns, ["pool"] * 20 + ["soundalike"] * 30).unseen["pool"][1] == 20
    assert gates.measured(gate, turns, ["pool"] * 50).unseen == {"pool": (expected, 50)}


def test_a_fit_measures_its_gate_on_the_harmless_prompts_of_the_tune_split(llama: LoadedModel) -> None:
    counted: list[tuple[int, int]] = []
    bank = fit(
        llama, None, prompts(), FitSettings(layers=(1,), position="last", shrinkage=0.5),
        progress=lambda done, total: counted.append((done, total)),
    )  # fmt: skip
    assert bank.gate is not None and counted[-1][0] == counted[-1][1]
    for kind, texts in (("pool", harmless_pool()), ("soundalike", soundalikes())):
        unseen = [encode(llama.tokenizer, text) for text in texts.split("tune").texts]
        turns = collect(llama, unseen, bank.gate.layers, turn_layers=bank.gate.layers).turns
        opened = sum(reading.opening > 0 for reading in bank.gate.read(turns))
        assert bank.gate.unseen[kind] == (pytest.approx(opened, abs=1), len(unseen))


def test_strongest_is_the_best_window() -> None:
    scores = torch.zeros(50)
    scores[20:36] = 2.0
    assert float(strongest(scores)) == pytest.approx(2.0)
    assert float(strongest(torch.tensor([1.0, 3.0]))) == pytest.approx(2.0)


def test_shuffled_labels_read_nothing() -> None:
    data = planted()
    order = torch.randperm(len(data["harmful"]), generator=torch.Generator().manual_seed(2)).tolist()  # type: ignore[arg-type]
    data["harmful"] = [data["harmful"][i] for i in order]  # type: ignore[index]
    gate = fit_gate(**data)  # type: ignore[arg-type]
    assert 0.35 < gate.quality["auroc_against_matched"] < 0.65


def test_ridge_solves_the_normal_equations() -> None:
    x, y = torch.randn(40, 7).double(), torch.randn(40, 2).double()
    weights, biases = ridge(x, y, 0.1)
    centred = x - x.mean(0)
    strength = 0.1 * centred.square().sum(1).mean()
    primal = torch.linalg.solve(centred.T @ centred + strength * torch.eye(7), centred.T @ (y - y.mean(0))).T
    torch.testing.assert_close(weights, primal)
    torch.testing.assert_close(x.mean(0) @ weights.T + biases, y.mean(0))


def test_auroc_counts_ties_half() -> None:
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.875)


def test_a_gate_needs_both_sides() -> None:
    data = planted(5)
    data["harmful"] = [False] * len(data["harmful"])  # type: ignore[arg-type]
    with pytest.raises(SafeSteerError, match="harmful and harmless"):
        fit_gate(**data)  # type: ignore[arg-type]


def test_rows_whose_gate_stays_closed_are_bit_identical_and_reading_does_not_depend_on_the_batch(
    llama: LoadedModel,
) -> None:
    bank = bank_for(llama, gate=True)
    assert bank.gate is not None
    plain = logits(llama, batch(llama))
    with Steerer(llama, bank) as steerer:
        gated = logits(llama, batch(llama))
        together = [one.reading for one in steerer.plans]
        closed = [not one.acting for one in steerer.plans]
    for row in range(len(TEXTS)):
        if closed[row]:
            assert torch.equal(plain[row], gated[row])
    for side in ("left", "right"):
        with Steerer(llama, bank) as steerer:
            again = steerer.read(**batch(llama, side))
        for first, second in zip(together, again, strict=True):
            assert first is not None
            assert first.risk == pytest.approx(second.risk, abs=1e-4)


def test_the_gate_decides_row_by_row_and_says_so(llama: LoadedModel) -> None:
    from dataclasses import replace

    bank = bank_for(llama, gate=True)
    assert bank.gate is not None
    with Steerer(llama, bank) as steerer:
        risks = [reading.risk for reading in steerer.read(**batch(llama))]
    middle = sorted(risks)[1]
    gate = replace(bank.gate, low=middle - 1e-3, high=middle + 1e-3, floors=torch.full((2,), -10.0))
    opened = replace(bank, gate=gate)
    responses = generate(llama, opened, [Request(text) for text in TEXTS], GenerationSettings(4))
    for risk, response in zip(risks, responses, strict=True):
        assert bool(response.steering["acting"]) == (risk > gate.low)
        assert response.steering["reading"]["risk"] == pytest.approx(risk, abs=1e-3)


def test_a_bank_without_a_gate_refuses_a_gated_policy(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    with pytest.raises(SafeSteerError, match="no gate"):
        Policy.of({"breaking": 1.0}, gate="auto").resolved(bank)
