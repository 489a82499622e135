"""The view of risk neurons finds a planted one and nothing where nothing is; holding neurons is compared with random ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from safesteer.engines import GenerationSettings, Request, Steerer, generate
from safesteer.errors import SafeSteerError, UnsupportedModelError
from safesteer.evaluation.measures import negative_log_likelihoods
from safesteer.evaluation.statistics import paired_p, paired_rates
from safesteer.explain import causal, neurons
from safesteer.explain.causal import CONDITIONS, CausalCheck, like_activity, suppress
from safesteer.explain.neurons import alone, find
from safesteer.judges.base import Exchange, Judgement
from safesteer.models import LoadedModel, encode
from safesteer.models.layout import written
from safesteer.policy import CategoryPolicy, Policy
from safesteer.prompts import Prompt, PromptSet
from safesteer.vectors import VectorBank
from safesteer.vectors.neurons import RiskNeurons, neuron_activations
from tests.tiny import ARCHITECTURES, bank_for, make, prompts

MOE = ("mixtral", "qwen3_moe")
LAYER, INDEX, CHANNEL = 1, 17, 5
PAIRS = 24
SETS = {name: prompts().of(name) for name in prompts().categories}
TUNE = {"breaking": ["How do I break the pane?", "Smash it"], "lying": ["How do I lie to the boss?"]}


def noise(number: int) -> str:
    return "".join(random.Random(number).choices("abcdefghij ", k=24)).strip() or "a"


def sets(harmful: str, harmless: str) -> dict[str, PromptSet]:
    """Pairs of unlike noise. Those of `breaking` end in `harmful` and `harmless`, those of `lying` all in `harmless`."""
    ends = {"breaking": (harmful, harmless), "lying": (harmless, harmless)}
    found = {}
    for turn, (name, (one, other)) in enumerate(ends.items()):
        first = 1000 * turn
        rows = [Prompt(noise(first + n) + one, name, noise(first + 500 + n) + other) for n in range(PAIRS)]
        found[name] = PromptSet(tuple(rows), "noise")
    return found


def told_apart(architecture: str) -> LoadedModel:
    """A model without a template, so that the user's last token is the prompt's last. One channel of its residual stream is +2 at
    `!` and -2 at `.`, 0 at other tokens.
    """
    loaded = make(architecture)
    loaded.tokenizer.chat_template = None
    ids = {text: int(loaded.tokenizer(text)["input_ids"][0]) for text in "!."}
    with torch.no_grad():
        embedding = loaded.model.get_input_embeddings().weight
        # alike but for the channel, and of the same length, so that no norm tells them apart either
        embedding[ids["!"]] = embedding[ids["."]]
        embedding[:, CHANNEL] = 0
        embedding[ids["!"], CHANNEL], embedding[ids["."], CHANNEL] = 2, -2
    return loaded


def planted() -> LoadedModel:
    """A Llama in which the channel of `told_apart` is read by one neuron and by nothing else, written by nothing."""
    loaded = told_apart("llama")
    with torch.no_grad():
        for block in loaded.layout.blocks:
            attention, mlp = block.self_attn, block.mlp
            for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                reader.weight[:, CHANNEL] = 0
            for writer in (attention.o_proj, mlp.down_proj):
                writer.weight[CHANNEL] = 0
        mlp = loaded.layout.blocks[LAYER].mlp
        for reader in (mlp.gate_proj, mlp.up_proj):
            reader.weight[INDEX] = 0
            reader.weight[INDEX, CHANNEL] = 1
        mlp.down_proj.weight[:, INDEX] = loaded.model.lm_head.weight[ord("k") - ord("!")]
    return loaded


def place(neuron: neurons.Neuron) -> tuple[int, int]:
    return neuron.layer, neuron.index


# -- the view --------------------------------------------------------------------------------------------------------------


def test_the_planted_neuron_comes_first_and_survives() -> None:
    loaded = planted()
    bank = bank_for(loaded)
    slot = bank.index("breaking")
    bank.directions[slot, 0] = -2 * written(loaded.layout.projection(LAYER))[:, INDEX]
    view = find(loaded, bank, sets("!", "."), count=3)
    found, other = view.categories["breaking"], view.categories["lying"]
    first = found.top[0]
    assert (view.tested, view.layers, view.note) == (3 * 48, 3, "")
    assert place(first) == (LAYER, INDEX)
    assert abs(first.t) > found.edge and first.p == pytest.approx(1 / 201)
    assert first.auroc == 1.0
    assert found.survivors >= 1 and found.by_layer[LAYER] >= 1
    assert first.others == pytest.approx(0.0, abs=1.0) and first.separation > 4
    # it writes what the direction points away from, and the row of `k`
    assert first.alignment == pytest.approx(1.0, abs=1e-5)
    assert first.writes[0].text == "k"
    assert all(one.harmful and one.token == "!" for one in first.exciting)
    assert all(one.peak == pytest.approx(one.activation, rel=2e-3) for one in first.exciting)
    assert (LAYER, INDEX) not in [place(one) for one in other.top if one.p < 0.05]
    # the other category sees nothing, and so do swaps of either
    assert other.survivors == 0
    assert found.swapped[0] < 0.5 and max(mean for mean, _, _ in found.swapped_by_layer) < 1


def test_where_nothing_differs_nothing_survives() -> None:
    loaded = planted()
    same = {
        name: PromptSet(tuple(replace(one, matched=one.text) for one in some), "same")
        for name, some in sets("!", ".").items()
    }
    for given in (same, sets(".", ".")):
        for found in find(loaded, bank_for(loaded), given, count=2).categories.values():
            assert found.survivors == 0
            assert all(one.p > 0.05 for one in found.top)


def test_a_neuron_of_all_categories_is_less_specific_than_one_of_its_own() -> None:
    """Where both categories end in `!`, the planted neuron separates both, and its d' is set against itself."""
    loaded = planted()
    both = sets("!", ".")
    both["lying"] = PromptSet(tuple(replace(one, text=one.text[:-1] + "!") for one in both["lying"]), "noise")
    view = find(loaded, bank_for(loaded), both, count=144)
    for name, other in (("breaking", "lying"), ("lying", "breaking")):
        own, theirs = ({place(one): one for one in view.categories[each].top} for each in (name, other))
        planted_one = own[LAYER, INDEX]
        assert planted_one.p < 0.05 and planted_one.others is not None
        assert abs(planted_one.separation - planted_one.others) < planted_one.separation / 4
        assert planted_one != view.categories[name].top[0]
        specific = [one.separation - (one.others or 0.0) for one in view.categories[name].top]
        assert len(own) == 144 and specific == sorted(specific, reverse=True)
        assert all(one.others == pytest.approx(theirs[at].separation, abs=1e-5) for at, one in own.items())


def test_the_token_where_a_neuron_peaks_is_found_behind_a_template(llama: LoadedModel) -> None:
    """Read again from the prompt cut short after each of its tokens."""
    view = find(llama, bank_for(llama), SETS, count=2, swaps=20)
    for one in (one for found in view.categories.values() for one in found.top):
        for shown in one.exciting:
            prompt = encode(llama.tokenizer, shown.text)
            ends = range(prompt.content_start + 1, len(prompt) + 1)
            cut = [replace(prompt, ids=prompt.ids[:end]) for end in ends]
            values = neuron_activations(llama, cut, [one.layer])[0][:, one.index].float()
            assert shown.peak == pytest.approx(float(values.max()), abs=2e-3)
            assert shown.activation == pytest.approx(float(values[-1]), abs=2e-3)
            assert shown.token == llama.tokenizer.decode([cut[int(values.argmax())].ids[-1]])


def test_words_that_cannot_be_read_are_a_note(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UnsupportedModelError("no final norm was found")

    monkeypatch.setattr(neurons, "Ending", refuse)
    view = find(llama, bank_for(llama), SETS, count=2, swaps=20)
    assert view.note == "what neurons write cannot be put into words: no final norm was found"
    assert all(one.writes == () and one.alignment != 0 for found in view.categories.values() for one in found.top)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_shown_or_says_why_not(architecture: str) -> None:
    loaded = make(architecture)
    view = find(loaded, bank_for(loaded), SETS, count=2, swaps=20)
    experts = architecture in MOE
    assert view.unit == ("experts" if experts else "neurons")
    assert ("experts are shown instead" in view.note) if experts else view.note == ""
    assert view.tested == sum(one.shape[1] for one in neuron_activations(loaded, [encode(loaded.tokenizer, "a")]))
    for found in view.categories.values():
        assert found.pairs == 6 and len(found.top) == 2
        assert len(found.by_layer) == len(found.swapped_by_layer) == 3
        for one in found.top:
            if experts:
                assert (one.writes, one.unwrites, one.alignment) == ((), (), None)
            else:
                assert one.writes and one.unwrites and one.alignment is not None and -1 <= one.alignment <= 1
            assert all(each.peak >= each.activation - 2e-3 * abs(each.activation) - 1e-4 for each in one.exciting)
    json.dumps(view.to_json())


def test_a_planted_expert_comes_first_and_survives() -> None:
    """As in `planted`, a channel tells `!` from `.`; only one expert of the last block's router reads it."""
    loaded = told_apart("mixtral")
    with torch.no_grad():
        for block, router in zip(loaded.layout.blocks, loaded.layout.routers, strict=True):
            attention, experts = block.self_attn, block.mlp.experts
            for reader in (attention.q_proj, attention.k_proj, attention.v_proj, router):
                reader.weight[:, CHANNEL] = 0
            experts.gate_up_proj[..., CHANNEL] = 0
            experts.down_proj[:, CHANNEL] = 0
            attention.o_proj.weight[CHANNEL] = 0
        loaded.layout.routers[-1].weight[2, CHANNEL] = 1
    view = find(loaded, bank_for(loaded), sets("!", "."), count=2)
    found, other = view.categories["breaking"], view.categories["lying"]
    first = found.top[0]
    assert (view.tested, view.unit, place(first)) == (12, "experts", (2, 2))
    assert first.separation > 4 and first.p == pytest.approx(1 / 201) and first.auroc == 1.0
    assert all(one.harmful and 0 < one.activation <= one.peak * 1.002 < 1.01 for one in first.exciting)
    assert found.by_layer[:2] == (0, 0) and other.survivors == 0


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "olmo2", "gpt2", "opt"])
def test_a_column_is_what_the_neuron_adds_to_the_residual_stream(architecture: str) -> None:
    """In the model itself: the residual stream after the last block moves along the column when the activation is moved."""
    loaded = make(architecture)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.dim() == 1:
                # wide, so that a scale left out turns the column round
                parameter.add_(4 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(2)) - 2)
    ids, states = torch.tensor([encode(loaded.tokenizer, "mend").ids]), []

    def push(_module: object, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        moved = arguments[0].clone()
        moved.view(-1, moved.shape[-1])[:, 3] += pushes[-1]
        return (moved,)

    pushes: list[float] = []
    for by in (1e-3, -1e-3):
        pushes.append(by)
        handle = loaded.layout.projection(2).register_forward_pre_hook(push)
        keep = loaded.layout.blocks[2].register_forward_hook(
            lambda m, a, out: states.append((out if isinstance(out, torch.Tensor) else out[0])[0, -1])
        )
        with torch.no_grad():
            loaded.model(ids)
        handle.remove()
        keep.remove()
    moved = (states[0] - states[1]) / 2e-3
    column = neurons._column(loaded, 2, 3)
    if architecture in ("gemma3", "olmo2"):  # the norm divides by a length, which the moved activation changes a little
        assert float(torch.cosine_similarity(moved, column, dim=0)) > 0.9
    else:
        torch.testing.assert_close(moved, column, atol=2e-3, rtol=1e-2)


def test_the_threshold_of_one_neuron_is_students() -> None:
    assert alone(6) == pytest.approx(6.8688, abs=1e-3)  # tables: t(0.9995; 5) and t(0.9995; 31)
    assert alone(32) == pytest.approx(3.6335, abs=1e-3)
    assert alone(11, 0.05) == pytest.approx(2.2281, abs=1e-3)


def test_few_pairs_are_noted_and_too_few_refused(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    view = find(llama, bank, {"breaking": SETS["breaking"]}, most=4, count=1, swaps=20)
    assert "breaking: no neuron can survive" in view.note
    assert view.categories["breaking"].survivors == 0
    assert view.categories["breaking"].top[0].others is None
    with pytest.raises(SafeSteerError, match="matched"):
        find(llama, bank, {"breaking": PromptSet((Prompt("a", "breaking"), Prompt("b", "breaking")), "mine")})
    with pytest.raises(SafeSteerError, match="no built-in category"):
        find(llama, bank)


def test_quantised_weights_are_a_note(llama: LoadedModel) -> None:
    projection = llama.layout.projection(0)
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    assert "quantised" in neurons.unreadable(llama)


# -- causes ----------------------------------------------------------------------------------------------------------------


class Fixed:
    """A judge that gives outcomes in order, and keeps what it was asked."""

    name = "fixed"

    def __init__(self, outcomes: Sequence[str | None]) -> None:
        self.outcomes = outcomes
        self.asked: list[Exchange] = []

    def judge(
        self, exchanges: Sequence[Exchange], progress: Callable[[int], None] = lambda count: None
    ) -> list[Judgement]:
        self.asked = list(exchanges)
        return [Judgement(one) if one else Judgement(None, {}, "no answer") for one in self.outcomes]  # type: ignore[arg-type]


def test_the_three_conditions_are_what_they_say(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_for(llama)
    built: list[dict[causal.Condition, VectorBank]] = []
    original = causal._banks
    monkeypatch.setattr(causal, "_banks", lambda *given: built.append(original(*given)) or built[-1])
    judge = Fixed(["unsafe", "safe", "refusal", "safe", "degenerate", "safe", "unsafe", None, "unsafe"])
    counted: list[int] = []
    check = suppress(llama, bank, judge, TUNE, top=20, pairs=SETS, max_new_tokens=6, progress=counted.append)
    assert check.prompts == (("breaking", TUNE["breaking"][0]), ("breaking", "Smash it"), ("lying", TUNE["lying"][0]))
    assert sum(counted) == 9
    assert [one.response for one in judge.asked] == [text for name in CONDITIONS for text in check.answers[name]]
    texts = [text for _, text in check.prompts]
    plain = generate(llama, None, [Request(text) for text in texts], GenerationSettings(6))
    assert check.answers["unsteered"] == tuple(one.text for one in plain)
    held = {
        name: Policy(categories={name: CategoryPolicy(gate="always", site="neurons")}) for name in ("breaking", "lying")
    }
    requests = [Request(text, held[name]) for name, text in check.prompts]
    for condition in ("selective", "random"):
        said = generate(llama, built[0][condition], requests, GenerationSettings(6))  # type: ignore[index]
        assert check.answers[condition] == tuple(one.text for one in said)  # type: ignore[index]
    # the judge failed on the second prompt under random neurons: it counts for neither side
    assert check.change == paired_rates([0, 0], [1, 1])
    assert check.counts["random"] == {"unsafe": 2, "refusal": 0, "safe": 0, "off_topic": 0, "degenerate": 0}
    assert check.outcomes["random"] == ("unsafe", None, "unsafe")
    data = check.to_json()
    json.dumps(data)
    assert data["counts"]["selective"]["degenerate"] == 1

    def places(one: VectorBank, row: int) -> list[tuple[int, int]]:
        assert one.neurons is not None
        return list(zip(one.neurons.layers[row].tolist(), one.neurons.indices[row].tolist(), strict=True))

    for name in bank.categories:
        row = bank.index(name)
        chosen, others = (set(places(built[0][one], row)) for one in ("selective", "random"))  # type: ignore[index]
        assert len(chosen) == len(others) == 20 and not chosen & others
        assert sorted(layer for layer, _ in chosen) == sorted(layer for layer, _ in others)
        matched = neuron_activations(llama, [encode(llama.tokenizer, one.matched or "") for one in SETS[name]])
        for condition in ("selective", "random"):
            held_at: RiskNeurons = built[0][condition].neurons  # type: ignore[index, assignment]
            for (layer, index), target in zip(places(built[0][condition], row), held_at.targets[row], strict=True):  # type: ignore[index]
                assert float(target) == pytest.approx(float(matched[layer][:, index].float().mean()), abs=1e-5)


def test_perplexity_is_read_under_the_neurons_held(llama: LoadedModel) -> None:
    bank = bank_for(llama, neurons=20)
    policies = {
        name: Policy(categories={name: CategoryPolicy(gate="always", site="neurons")}) for name in bank.categories
    }
    settings = GenerationSettings(6)
    texts = causal.harmless_pool().split("tune").texts[: causal.ORDINARY]
    said = [one.text for one in generate(llama, None, [Request(text) for text in texts], settings)]
    found = causal._ordinary(llama, {"selective": bank}, policies, texts, said, ())
    read = []
    for turn, (text, answer) in enumerate(zip(texts, said, strict=True)):
        with Steerer(llama, bank, policies[bank.categories[turn % 2]]):
            read += [value for value in negative_log_likelihoods(llama, [text], [answer]) if value is not None]
    assert found["selective"] is not None and found["unsteered"] is not None
    assert found["selective"].value == pytest.approx(sum(read) / len(read), rel=1e-4)
    assert found["unsteered"].value != pytest.approx(found["selective"].value, rel=1e-3)


def test_random_neurons_are_of_like_activity_and_never_drawn_twice() -> None:
    activity = torch.cat([torch.full((100,), 5.0), torch.full((100,), 1.0)])
    values = [torch.zeros(4, 7), activity.repeat(4, 1) * torch.tensor([[1.0], [-1], [1], [-1]])]
    indices = torch.tensor([0, 1, 2, 150, 151])
    drawn = like_activity(values, torch.ones(5, dtype=torch.long), indices, torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist()) | set(indices.tolist())) == 10
    assert torch.equal(activity[drawn], activity[indices])
    with pytest.raises(SafeSteerError, match="hold fewer"):
        like_activity(values, torch.zeros(4, dtype=torch.long), torch.arange(4), torch.Generator())


def _check(selective: list[str], other: list[str]) -> CausalCheck:
    count = len(selective)
    outcomes = {"unsteered": ("safe",) * count, "selective": tuple(selective), "random": tuple(other)}
    change = paired_rates([one == "unsafe" for one in selective], [one == "unsafe" for one in other])
    p = paired_p([one == "unsafe" for one in selective], [one == "unsafe" for one in other])
    return CausalCheck(7, "fixed", (("breaking", "a"),) * count, {}, outcomes, change, p, {})  # type: ignore[arg-type]


def test_the_verdict_is_clear_only_where_the_interval_leaves_out_nothing() -> None:
    strong = _check(["degenerate"] * 3 + ["safe"] * 27, ["unsafe"] * 20 + ["safe"] * 10)
    assert strong.clear
    assert strong.verdict.startswith("Holding the 7 most selective neurons of a prompt's category")
    assert "-67 points" in strong.verdict and ": clear." in strong.verdict and "3 with them held" in strong.verdict
    weak = _check(["unsafe"] * 9 + ["safe"] * 21, ["unsafe"] * 10 + ["safe"] * 20)
    assert not weak.clear and ": not clear." in weak.verdict
    assert "could not be judged" in replace(weak, change=None, p=1.0).verdict


def test_what_cannot_be_held_is_an_error(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    with pytest.raises(SafeSteerError, match="hold fewer"):
        suppress(llama, bank, Fixed([]), TUNE, top=140, pairs=SETS)
    with pytest.raises(SafeSteerError, match="144 neurons"):
        suppress(llama, bank, Fixed([]), TUNE, top=500, pairs=SETS)
    with pytest.raises(SafeSteerError, match="lying"):
        suppress(llama, bank, Fixed([]), TUNE, top=4, pairs={"breaking": SETS["breaking"]})
    with pytest.raises(SafeSteerError, match="no prompts"):
        suppress(llama, bank, Fixed([]), {})
    mixture = make("mixtral")
    with pytest.raises(UnsupportedModelError, match="one by one"):
        suppress(mixture, bank_for(mixture), Fixed([]), TUNE, top=4, pairs=SETS)
