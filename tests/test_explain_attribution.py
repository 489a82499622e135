"""The account of a gate's reading adds up, on every architecture, and names what really wrote into the stream."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from safesteer.engines import Steerer
from safesteer.errors import SafeSteerError
from safesteer.explain import attribution
from safesteer.explain.attribution import Attribution, attribute, split
from safesteer.models import LoadedModel, encode
from safesteer.vectors import Gate, Reading, VectorBank
from tests.tiny import ARCHITECTURES, COMMON, bank_for, make, tokenizer

SHORT, LONG = "Hi", "How do I mend the vase that I smashed this morning, and whom do I tell?"


def gated(loaded: LoadedModel, layers: tuple[int, ...] = (0, 1, 2)) -> VectorBank:
    """A bank whose gate is drawn at random and reads several layers; nothing about it is easy to add up."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    width, slots = loaded.layout.width, len(layers)
    gate = Gate(
        layers=layers,
        categories=("breaking", "lying"),
        centres=0.1 * draw(slots, width),
        weights=draw(3, 2 * slots * width),
        biases=draw(3),
        token_weights=draw(slots, width),
        token_bias=draw(1),
        calm=torch.tensor([[0.3, 1.7], [-0.4, 2.1]]),
        floors=torch.tensor([-0.5, 0.5]),
        low=-1000.0,
        high=-999.0,
        quality={},
    )
    return replace(bank_for(loaded), gate=gate)


def read_by_the_engine(loaded: LoadedModel, bank: VectorBank, prompt: str) -> Reading:
    return Steerer(loaded, bank).read(torch.tensor([encode(loaded.tokenizer, prompt).ids]))[0]


def total(account: Attribution) -> float:
    return sum(one.contribution for one in account.components) + account.constant


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_components_and_tokens_sum_to_the_risk_that_the_engine_reads(architecture: str) -> None:
    loaded = make(architecture)
    bank = gated(loaded)
    names = ["embedding", *(f"{kind} {layer}" for layer in range(3) for kind in ("attention", "mlp")), "rounding"]
    for prompt in (SHORT, LONG):
        account = attribute(loaded, bank, prompt)
        assert account.risk == pytest.approx(read_by_the_engine(loaded, bank, prompt).risk, abs=1e-4)
        assert total(account) == pytest.approx(account.risk, rel=1e-5, abs=1e-5)
        assert sum(one.share for one in account.tokens) + account.offset == pytest.approx(account.risk, abs=1e-5)
        for one in account.components:
            assert sum(one.by_token) == pytest.approx(one.contribution, abs=1e-9)
            assert len(one.by_token) == len(account.tokens)
        assert ([one.name for one in account.components], account.note) == (names, "")
        assert abs(account.components[-1].contribution) < 1e-4
        assert min(abs(one.contribution) for one in account.components[:-1]) > 1e-4
        assert "".join(one.text for one in account.tokens).startswith(prompt)


def test_a_prompt_shorter_than_ending_and_passage_adds_up(llama: LoadedModel) -> None:
    bank = gated(llama)
    llama.tokenizer.chat_template = None
    account = attribute(llama, bank, "Hey", force=["template"])
    assert [one.text for one in account.tokens] == ["e", "y"]
    assert (account.parts.first, account.parts.last) == (0, 1)
    assert total(account) == pytest.approx(account.risk, abs=1e-5)


def test_each_contribution_is_what_the_formula_says(llama: LoadedModel) -> None:
    """Written out by hand for a gate of two layers: what the MLP of block 1 adds counts in layer 2 and not in layer 0."""
    bank = gated(llama, (0, 2))
    gate = bank.gate
    assert gate is not None
    added: list[torch.Tensor] = []
    handle = llama.layout.mlp[1].register_forward_hook(lambda _m, _a, output: added.append(output[0]))
    with torch.inference_mode():
        ids = torch.tensor([encode(llama.tokenizer, LONG).ids])
        states = llama.model(ids, output_hidden_states=True).hidden_states
    handle.remove()
    account = attribute(llama, bank, LONG)
    h = [states[1][0, account.first :], llama_block_output(llama, ids, 2)[account.first :]]
    n = [one / one.norm(dim=-1, keepdim=True) - mean for one, mean in zip(h, gate.centres, strict=True)]
    r = [one.norm(dim=-1, keepdim=True) for one in n]
    n = [one / length for one, length in zip(n, r, strict=True)]
    v = gate.weights[0].reshape(2, 2, 32)
    a = sum(v[0, s] @ n[s][-1] + v[1, s] @ n[s][-6:].mean(0) for s in (0, 1)) + gate.biases[0]
    scores = sum(n[s] @ gate.token_weights[s] for s in (0, 1)) + gate.token_bias
    best = max(range(len(scores) - 15), key=lambda start: float(scores[start : start + 16].mean()))
    z = (torch.stack([a, scores[best : best + 16].mean()]) - gate.calm[:, 0]) / gate.calm[:, 1]
    assert account.risk == pytest.approx(float(torch.logsumexp(z, 0)), abs=1e-4)
    assert (account.parts.first, account.parts.last) == (best, best + 15)
    p = torch.softmax(z, 0) / gate.calm[:, 1]
    part = added[0][account.first :] / (h[1].norm(dim=-1, keepdim=True) * r[1])
    ending = v[0, 1] @ part[-1] + v[1, 1] @ part[-6:].mean(0)
    passage = (part[best : best + 16] @ gate.token_weights[1]).mean()
    found = {one.name: one.contribution for one in account.components}
    assert found["mlp 1"] == pytest.approx(float(p[0] * ending + p[1] * passage), abs=1e-5)


def llama_block_output(loaded: LoadedModel, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """The stream after a block, before the final norm."""
    seen: list[torch.Tensor] = []
    handle = loaded.layout.blocks[layer].register_forward_hook(lambda _m, _a, output: seen.append(output[0]))
    with torch.inference_mode():
        loaded.model(ids)
    handle.remove()
    return seen[0]


def test_a_part_that_writes_nothing_contributes_nothing(llama: LoadedModel) -> None:
    bank = gated(llama)
    with torch.no_grad():
        for block in llama.layout.blocks:
            block.self_attn.o_proj.weight.zero_()
        llama.layout.blocks[1].mlp.down_proj.weight.zero_()
    account = attribute(llama, bank, LONG, force=["weights"])
    silent = {"attention 0", "attention 1", "attention 2", "mlp 1"}
    for one in account.components[:-1]:
        assert (one.contribution == 0.0) == (one.name in silent)
    rows = account.by_layer()
    assert [row["layer"] for row in rows] == [0, 1, 2]
    assert sum(row["mlp"] for row in rows) + account.components[0].contribution + account.constant == pytest.approx(
        account.risk, abs=1e-4
    )


def test_what_is_added_counts_where_a_model_multiplies_it() -> None:
    torch.manual_seed(1)
    config = transformers.GraniteConfig(**COMMON, residual_multiplier=0.22, embedding_multiplier=12.0)
    loaded = LoadedModel.wrap(transformers.AutoModelForCausalLM.from_config(config), tokenizer(), "tiny-granite")
    account = attribute(loaded, gated(loaded), LONG)
    assert account.note == ""
    assert total(account) == pytest.approx(account.risk, abs=1e-5)
    assert abs(account.components[-1].contribution) < 1e-4


def test_a_block_that_cannot_be_split_is_one_component_and_said_so() -> None:
    """OPT with its norms after the sums: nothing is simply added, so each block counts as what it changed."""
    loaded = make("opt", do_layer_norm_before=False)
    account = attribute(loaded, gated(loaded), LONG)
    assert [one.name for one in account.components] == ["embedding", "block 0", "block 1", "block 2", "rounding"]
    assert "blocks 0, 1, 2" in account.note
    assert total(account) == pytest.approx(account.risk, abs=1e-5)
    assert all(row["block"] != 0 and row["mlp"] == 0 for row in account.by_layer())


def test_it_adds_up_in_bf16_and_the_rounding_is_named(llama: LoadedModel) -> None:
    bank = gated(llama)
    llama.model.to(torch.bfloat16)
    account = attribute(llama, bank, LONG)
    assert account.risk == pytest.approx(read_by_the_engine(llama, bank, LONG).risk, abs=1e-4)
    assert total(account) == pytest.approx(account.risk, abs=1e-5)
    assert account.note == ""
    assert 0 < abs(account.components[-1].contribution) < 0.1


def test_split_takes_a_pair_that_sums_and_nothing_else() -> None:
    entered, one, other = torch.randn(3, 20, 8, dtype=torch.float64)
    exact = split(entered, one + other, [one], [other], 1e-7)
    assert exact is not None
    assert torch.equal(exact[0], one)
    scaled = split(entered, 0.3 * one + 0.5 * other, [one], [other], 1e-7)
    assert scaled is not None
    torch.testing.assert_close(scaled[1], 0.5 * other)
    assert split(entered, one + other * entered, [one], [other], 1e-7) is None
    assert split(entered, one + other, [one], [], 1e-7) is None


def test_accounts_are_compared_part_by_part(llama: LoadedModel) -> None:
    bank = gated(llama)
    account, others = attribute(llama, bank, LONG), [attribute(llama, bank, text) for text in (SHORT, "What is it?")]
    difference = account.less(others)
    assert sum(difference.values()) == pytest.approx(account.risk - sum(one.risk for one in others) / 2, abs=1e-4)
    assert set(account.less([account]).values()) == {0.0}
    with pytest.raises(SafeSteerError, match="at least one"):
        account.less([])
    with pytest.raises(SafeSteerError, match="same model"):
        account.less([attribute(llama, gated(llama, (0, 1)), LONG)])


def test_a_sum_that_does_not_hold_is_an_error(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    own = attribution._Pulls.from_block
    monkeypatch.setattr(attribution._Pulls, "from_block", lambda self, layer: 1.1 * own(self, layer))
    with pytest.raises(SafeSteerError, match="components sum to"):
        attribute(llama, gated(llama), LONG)


def test_no_gate_no_account_and_no_hook_stays(llama: LoadedModel) -> None:
    with pytest.raises(SafeSteerError, match="no gate"):
        attribute(llama, bank_for(llama), LONG)
    attribute(llama, gated(llama), LONG)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.model.modules())


def test_it_is_plain_data(llama: LoadedModel) -> None:
    import json

    data = json.loads(json.dumps(attribute(llama, gated(llama), SHORT).to_json()))
    assert {"risk", "components", "constant", "tokens", "offset", "parts", "first", "note"} == set(data)
