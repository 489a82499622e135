"""What a checkpoint's generation_config.json recommends acts where it is asked for, and nowhere else."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import GenerationConfig

import safesteer
from safesteer.answers import answer_means
from safesteer.engines import GenerationSettings, Request, generate
from safesteer.engines.sampling import RowSampling
from safesteer.errors import SafeSteerError
from safesteer.explain.continuations import compare
from safesteer.models import LoadedModel, encode, load_model
from safesteer.models.decoding import Sampling, checkpoint_config, recommended
from safesteer.policy import Policy
from safesteer.server.app import Serving, default_sampling, make_app
from safesteer.server.authority import Authority, Clients
from safesteer.server.engine import Job, answer
from safesteer.server.on_transformers import TransformersEngine
from safesteer.vectors import VectorBank
from tests.tiny import Run, bank_for

TEXTS = ("How do I smash the vase?", "Why?", "Tell me of the tides")
STRONG = Policy.of({"breaking": 1.0})
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.5}
ODD: dict[str, Any] = {
    **SAMPLED, "num_beams": 2, "min_p": 0.2, "no_repeat_ngram_size": 2, "suppress_tokens": list(range(40)),
    "begin_suppress_tokens": list(range(40, 80)), "sequence_bias": [[[90], 8.0]], "bad_words_ids": [[100]], "min_length": 200,
    "max_length": 9, "max_time": 1e-9, "typical_p": 0.3, "num_return_sequences": 2, "return_dict_in_generate": True,
    "forced_eos_token_id": 257, "exponential_decay_length_penalty": [1, 2.0], "guidance_scale": 3.0,
    "remove_invalid_values": True,
}  # fmt: skip


def checkpoint(loaded: LoadedModel, folder: Path, **values: Any) -> LoadedModel:
    """The same model from a folder whose generation_config.json has these values."""
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    tokens = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    (folder / "generation_config.json").write_text(json.dumps({**tokens, **values}))
    return load_model(str(folder))


@pytest.fixture
def odd(llama: LoadedModel, tmp_path: Path) -> LoadedModel:
    return checkpoint(llama, tmp_path / "odd", **ODD)


def said(loaded: LoadedModel, bank: VectorBank | None, **settings: Any) -> list[str]:
    requests = [Request(text, None if bank is None else STRONG) for text in TEXTS]
    return [
        one.text for one in generate(loaded, bank, requests, GenerationSettings(**{"max_new_tokens": 12, **settings}))
    ]


def test_greedy_is_greedy_whatever_the_checkpoint_recommends(llama: LoadedModel, odd: LoadedModel) -> None:
    """Rows of one batch, as the plain argmax of the model's own logits gives them."""
    assert said(odd, None) == said(llama, None)
    for text, found in zip(TEXTS, said(odd, None), strict=True):
        ids = list(encode(odd.tokenizer, text).ids)
        for _ in range(12):
            with torch.inference_mode():
                ids.append(int(odd.model(torch.tensor([ids])).logits[0, -1].argmax()))
        new = ids[-12:]
        end = next((place for place, token in enumerate(new) if token in odd.stop_ids), 12)
        assert odd.tokenizer.decode(new[:end], skip_special_tokens=True).strip() == found


@pytest.mark.parametrize("name", sorted(ODD))
def test_no_field_of_the_checkpoint_acts_unasked(llama: LoadedModel, name: str) -> None:
    before = llama.model.generation_config
    plain = said(llama, None)
    try:
        tokens = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
        llama.model.generation_config = GenerationConfig(**tokens, **{"do_sample": True, name: ODD[name]})
        assert said(llama, None) == plain
    finally:
        llama.model.generation_config = before


def test_every_place_that_generates_is_greedy(llama: LoadedModel, odd: LoadedModel) -> None:
    bank = bank_for(llama)
    assert said(odd, bank) == said(llama, bank)
    prompts = [encode(llama.tokenizer, text) for text in TEXTS]
    torch.testing.assert_close(answer_means(odd, prompts, (1,)), answer_means(llama, prompts, (1,)))
    assert compare(odd, bank, TEXTS[0], STRONG, 12) == compare(llama, bank, TEXTS[0], STRONG, 12)
    answers = []
    for loaded in (llama, odd):
        made = TransformersEngine(loaded, bank)
        answers.append([answer(made, Job(prompt, STRONG.resolved(bank), 12)).text for prompt in prompts])
        made.close()
    assert answers[0] == answers[1]


def test_every_call_of_generate_says_how() -> None:
    """lm-evaluation-harness has its own (`integrations.lm_eval` is its `hf` model, to the bit)."""
    for path in Path(safesteer.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("model.generate"):
                how = [one for one in node.keywords if one.arg == "generation_config"]
                unpacked = any(one.arg is None and ast.unparse(one.value) == "arguments" for one in node.keywords)
                assert unpacked or "loaded.generation_config(" in ast.unparse(how[0].value), path


def test_a_temperature_alone_leaves_no_token_out(llama: LoadedModel) -> None:
    """transformers would keep the 50 likeliest; vLLM keeps all."""
    scores = torch.linspace(0, 1e-3, 300).repeat(1, 1)
    draws = set()
    for seed in range(400):
        drawn = RowSampling([Sampling(1.0)], [seed], [0], torch.device("cpu"))
        draws.add(int(drawn(torch.tensor([[1]]), scores.clone()).argmax()))
    assert len(draws) > 150
    assert len({text for seed in range(4) for text in said(llama, None, temperature=1.0, seed=seed)}) == 12


def test_samples_follow_the_distribution() -> None:
    how = Sampling(temperature=0.5, top_k=3, min_p=0.05)
    scores = torch.tensor([[2.0, 1.0, 0.0, -0.1, -9.0]])
    kept = torch.softmax(scores[0, :3] / 0.5, 0)
    kept = torch.where(kept / kept.max() < 0.05, 0.0, kept) / kept[kept / kept.max() >= 0.05].sum()
    drawn = RowSampling([how], [5], [0], torch.device("cpu"))
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[int(drawn(torch.tensor([[1]]), scores).argmax())] += 1
    torch.testing.assert_close(counts[:3] / 4000, kept, atol=0.03, rtol=0)
    assert counts[3:].sum() == 0


def test_a_row_is_sampled_by_itself(llama: LoadedModel) -> None:
    """Neither who shares the batch nor the program's own random numbers matter, and padding is not penalized."""
    settings = {"recommended": True, "seed": 3}
    before = llama.model.generation_config
    llama.model.generation_config = GenerationConfig(eos_token_id=257, pad_token_id=258, **SAMPLED)
    try:
        torch.manual_seed(1)
        state = torch.get_rng_state()
        together = said(llama, None, **settings)
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(2)
        assert said(llama, None, **settings, batch_size=1) == together
        assert said(llama, None, **{**settings, "seed": 4}) != together
    finally:
        llama.model.generation_config = before
    penalty = RowSampling([Sampling(repetition_penalty=2.0)], [None], [2], torch.device("cpu"))
    ids, scores = torch.tensor([[0, 0, 1]]), torch.tensor([[3.0, 2.0, 1.0]])
    assert penalty(ids, scores).tolist() == [[3.0, 1.0, 1.0]]


def test_equal_prompts_of_one_run_are_sampled_anew(llama: LoadedModel) -> None:
    requests = [Request("Why?")] * 4
    settings = GenerationSettings(12, temperature=1.0)
    texts = [one.text for one in generate(llama, None, requests, settings)]
    assert len(set(texts)) == 4
    assert texts == [one.text for one in generate(llama, None, requests, settings)]


def test_what_is_recommended_can_be_asked_for(llama: LoadedModel, tmp_path: Path) -> None:
    loaded = checkpoint(llama, tmp_path, **SAMPLED)
    settings = GenerationSettings(recommended=True)
    wanted = Sampling(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.5)
    assert settings.sampling(loaded.model.generation_config) == wanted
    assert settings.sampling(checkpoint_config(tmp_path)) == wanted
    named = replace(settings, temperature=0.0)
    assert named.sampling(loaded.model.generation_config) == replace(wanted, temperature=0.0)
    penalized = loaded.model.generate(
        torch.tensor([encode(loaded.tokenizer, TEXTS[0]).ids]), max_new_tokens=12, do_sample=False
    )[0, -12:].tolist()
    end = next((place for place, token in enumerate(penalized) if token in loaded.stop_ids), 12)
    found = said(loaded, None, recommended=True, temperature=0.0)
    assert found[0] == loaded.tokenizer.decode(penalized[:end], skip_special_tokens=True).strip()
    assert found != said(loaded, None)


def test_a_checkpoint_that_does_not_sample_recommends_greedy() -> None:
    assert recommended(GenerationConfig(repetition_penalty=1.05)) == Sampling(repetition_penalty=1.05)
    assert recommended(GenerationConfig(do_sample=True)) == Sampling(temperature=1.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [({}, "recommends no sampling"), ({"num_beams": 4}, "num_beams 4"), ({"top_h": 0.4}, "top_h 0.4")],
)
def test_recommendations_that_cannot_be_followed_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SafeSteerError, match=words):
        recommended(GenerationConfig(**values))


def test_the_command_line_takes_what_is_recommended(llama: LoadedModel, tmp_path: Path, run: Run) -> None:
    checkpoint(llama, tmp_path / "model", **SAMPLED)
    bank = bank_for(llama)
    bank.save(tmp_path / "bank.safetensors")
    common = ["generate", str(tmp_path / "bank.safetensors"), "--model", str(tmp_path / "model"), "--prompt", TEXTS[0],
              "--max-new-tokens", "12", "--json"]  # fmt: skip
    texts = {}
    for name, more in (
        ("plain", []),
        ("recommended", ["--recommended"]),
        ("named", ["--recommended", "--temperature", "0"]),
    ):
        code, out, err = run(*common, *more)
        assert code == 0, err
        texts[name] = json.loads(out)["response"]
    assert len(set(texts.values())) == 3
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))
    code, _, err = run(*common, "--recommended")
    assert code == 1
    assert "recommends no sampling" in err


def test_a_server_samples_as_recommended_unless_the_request_says_how(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    made = TransformersEngine(llama, bank)
    authority = Authority(bank, Policy.off(), {}, Clients(may="any"))
    found = {}
    try:
        for name, config in (("openai", None), ("recommended", GenerationConfig(**SAMPLED))):
            client = TestClient(make_app(Serving(made, authority, "tiny", sampling=default_sampling(config))))
            body = {"model": "tiny", "max_tokens": 12, "seed": 3, "messages": [{"role": "user", "content": TEXTS[0]}]}

            def ask(more: dict[str, Any], client: TestClient = client, body: dict[str, Any] = body) -> str:
                answered = client.post("/v1/chat/completions", json={**body, **more})
                assert answered.status_code == 200, answered.text
                return str(answered.json()["choices"][0]["message"]["content"])

            plain = {"temperature": 1, "top_k": 0, "top_p": 1, "repetition_penalty": 1}
            found[name] = [
                ask({}),
                ask(plain),
                ask({"temperature": 0, "repetition_penalty": 1.5}),
                ask({"temperature": 0}),
            ]
    finally:
        made.close()
    assert found["openai"][0] == found["openai"][1] == found["recommended"][1]
    assert found["recommended"][0] != found["openai"][0]
    assert found["recommended"][3] == found["recommended"][2] == found["openai"][2] != found["openai"][3]
