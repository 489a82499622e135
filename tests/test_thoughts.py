"""Thoughts are told from answers, in every shape that models use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from transformers import AddedToken

from safesteer.engines import GenerationSettings, Request, generate
from safesteer.errors import SafeSteerError
from safesteer.evaluation.check import checked
from safesteer.evaluation.conditions import conditions
from safesteer.evaluation.run import EvaluationSettings, evaluate
from safesteer.evaluation.suites import Suite, SuiteRow
from safesteer.integrations import open_bank
from safesteer.judges import Judgement
from safesteer.models import EncodedPrompt, LoadedModel, encode, fingerprint
from safesteer.models.thoughts import Said, Thoughts
from safesteer.policy import Policy
from safesteer.refusal import refusal_direction
from safesteer.server.app import Serving, make_app
from safesteer.server.authority import Authority, Clients
from safesteer.server.on_transformers import TransformersEngine
from safesteer.tuning.trial import Bench, assess
from tests.tiny import TEMPLATE, Run, bank_for, make, prompts, tokenizer

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
ANALYSIS = "<|channel|>analysis<|message|>"
FORCED = ["--force", "vocabulary", "--force", "weights", "--force", "template"]
FINAL = "<|start|>assistant<|channel|>final<|message|>"
OPENING = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
CLOSED = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")


def made(*marks: str, special: bool = True, template: str | None = TEMPLATE) -> Any:
    """The tiny tokenizer with further tokens."""
    one = tokenizer()
    one.add_tokens([AddedToken(mark, special=special) for mark in marks], special_tokens=special)
    one.chat_template = template
    return one


def split(one: Any, text: str, prompt: str = "Why?") -> Said:
    """All at once, and piece by piece, which must come to the same."""
    thoughts, asked = Thoughts(one), encode(one, prompt)
    ids = one(text, add_special_tokens=False)["input_ids"]
    found = thoughts.split(asked, ids)
    reader, fed = thoughts.reader(asked), ""
    for end in range(1, len(ids) + 1):
        whole = thoughts.decode(ids[:end]).rstrip("\ufffd")
        reader.feed(whole[len(fed) :])
        fed = whole
    reader.end()
    assert (reader.text.strip(), reader.thought and reader.thought.strip()) == (found.text, found.thought)
    return found


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("opens", "closes", "begins"),
    [
        ("<think>", "</think>", "<think>\n"),
        ("[THINK]", "[/THINK]", "[THINK]"),
        ("<|channel>", "<channel|>", "<|channel>thought\n"),
        ("<|START_THINKING|>", "<|END_THINKING|>", "<|START_THINKING|>"),
        ("<seed:think>", "</seed:think>", "<seed:think>"),
        ("<|inner_prefix|>", "<|inner_suffix|>", "<|inner_prefix|>"),
        ("◁think▷", "◁/think▷", "◁think▷"),
        ("<thought>", "</thought>", "<thought>\n"),
    ],
)
def test_pairs_of_markers(opens: str, closes: str, begins: str, special: bool) -> None:
    one = made(opens, closes, special=special)
    assert split(one, f"{begins}Hm, é.\n{closes}\n\nBecause.") == Said("Because.", "Hm, é.")
    assert split(one, f"{begins}Hm, and").thought == "Hm, and"
    assert not split(one, f"{begins}Hm, and").answered
    assert not split(one, f"{begins}Hm{closes}\n").answered
    assert split(one, "Because.") == Said("Because.")
    assert split(one, f"Because of {opens} and {closes}.").thought is None


def test_markers_in_plain_text_need_no_token() -> None:
    assert split(tokenizer(), "<think>\nHm.</think>Because.") == Said("Because.", "Hm.")
    granite = made(template=TEMPLATE + "{# Here is my thought process: Here is my response: #}")
    assert split(granite, "Here is my thought process: Hm. Here is my response: So.") == Said("So.", "Hm.")
    assert split(tokenizer(), "Here is my thought process: Hm. Here is my response: So.").thought is None


def test_a_thought_that_the_template_opens() -> None:
    one = made("<think>", "</think>", template=OPENING)
    assert split(one, "Hm.\n</think>\n\nBecause.") == Said("Because.", "Hm.")
    assert split(one, "Hm, and").answered is False
    assert Thoughts(one).opened(encode(one, "Why?")) == "<think>\n"
    assert Thoughts(one).opened(encode(made(template=OPENING), "Why?")) == "<think>\n"
    assert split(made("<think>", "</think>", template=CLOSED), "Because.") == Said("Because.")


def test_a_prompt_that_says_nothing_opens_a_thought_too() -> None:
    """Where the words end is not known then: a marker at the very end is the template's."""
    for template, opened in ((OPENING, "<think>\n"), (TEMPLATE, ""), (CLOSED, "")):
        one = made("<think>", "</think>", template=template)
        assert Thoughts(one).opened(encode(one, " ")) == opened
    bare = encode(made(template=None), "What is <think> for?")
    assert (bare.content_end, Thoughts(tokenizer()).opened(bare)) == (len(bare), "")


def test_what_a_user_writes_opens_no_thought() -> None:
    for text in ("What is <think> for?", "<think>", "Say </think> and <think>"):
        one = made("<think>", "</think>", special=False)
        assert Thoughts(one).opened(encode(one, text)) == ""
        assert split(one, "Because.", text) == Said("Because.")


def test_an_answer_that_the_prompt_begins_inside_a_thought_goes_on_with_it() -> None:
    one = made("<think>", "</think>")
    asked = encode(one, "Why?")
    tail = tuple(one("<think>\nWell,", add_special_tokens=False)["input_ids"])
    begun = EncodedPrompt(asked.ids + tail, asked.content_start, asked.content_end)
    ids = one(" hm.</think>So.", add_special_tokens=False)["input_ids"]
    assert Thoughts(one).split(begun, ids) == Said("So.", "hm.")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{ANALYSIS}Hm.<|end|>{FINAL}Because.", Said("Because.", "Hm.")),
        (f"{ANALYSIS}Hm.<|end|><|start|>assistant{ANALYSIS}And.<|end|>{FINAL}So.", Said("So.", "Hm.And.")),
        (f"{ANALYSIS}Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Now.<|end|>{FINAL}So.", Said("So.", "Hm.Now.")),
        ("<|channel|>final<|message|>Because.", Said("Because.")),
        ("<|channel|>final <|constrain|>json<|message|>{}", Said("{}")),
        (f"{ANALYSIS}Hm, and", Said("", "Hm, and")),
        (f"{ANALYSIS}Hm.<|end|><|start|>assistant", Said("", "Hm.")),
        (f"{ANALYSIS}Hm.<|end|><|start|>assistant<|channel|>fin", Said("", "Hm.")),
        ("No channel at all.", Said("No channel at all.")),
    ],
)  # fmt: skip
def test_harmony(text: str, said: Said) -> None:
    assert split(made(*HARMONY, "<|constrain|>"), text) == said


def test_a_tokenizers_own_template_goes_first() -> None:
    one = made("<hm>", "</hm>")
    one.response_template = {
        "start_anchor": "assistant\n",
        "fields": {
            "thinking": {"open": "<hm>", "close": "</hm>", "content": "text"},
            "tool_calls": {"open": "<call>", "close": "</call>", "content": "json", "repeats": True},
            "content": {"close": "</s>"},
        },
    }
    assert split(one, "<hm>Well.</hm>So. <call>{}</call>") == Said("So. <call>{}</call>", "Well.")
    one.chat_template = OPENING.replace("<think>", "<hm>")
    assert split(one, "Well.</hm>So.") == Said("So.", "Well.")


def test_other_special_tokens_are_not_text() -> None:
    one = made("[THINK]", "[/THINK]", "[OTHER]")
    ids = one("[THINK]Hm.[/THINK][OTHER]So.<pad>", add_special_tokens=False)["input_ids"]
    assert Thoughts(one).split(encode(one, "Why?"), ids) == Said("So.", "Hm.")
    for text in ("So <s> it is", "plain"):
        own = tokenizer()
        kept = own(text, add_special_tokens=False)["input_ids"]
        assert Thoughts(own).decode(kept) == own.decode(kept, skip_special_tokens=True)


class Scripted:
    """A tiny model that says what it is told to, token by token, through its own `generate`."""

    def __init__(self, loaded: LoadedModel, one: Any) -> None:
        loaded.model.resize_token_embeddings(len(one) + 60)
        self.loaded = replace(loaded, tokenizer=one)
        self.script: list[int] = []
        self.other: list[int] = []  # for prompts with a `z`
        loaded.model.register_forward_pre_hook(self._before, with_kwargs=True)
        loaded.model.register_forward_hook(self._after)

    def say(self, text: str, other: str | None = None) -> LoadedModel:
        """`$` ends it."""
        self.script, self.other = self._ids(text), self._ids(text if other is None else other)
        return self.loaded

    def _ids(self, text: str) -> list[int]:
        body, ends, _ = text.partition("$")
        return list(self.loaded.tokenizer(body, add_special_tokens=False)["input_ids"]) + ([257] if ends else [])

    def _before(self, _module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        ids = keywords["input_ids"]
        self._place = 0 if ids.shape[1] > 1 else self._place + 1
        if not self._place:
            [letter] = self.loaded.tokenizer("z", add_special_tokens=False)["input_ids"]
            self._rows = [self.other if letter in row else self.script for row in ids.tolist()]

    def _after(self, _module: Any, _arguments: Any, output: Any) -> Any:
        if not self.script:
            return output
        output.logits[:, -1] = 0
        for row, script in enumerate(self._rows):
            output.logits[row, -1, script[min(self._place, len(script) - 1)]] = 9.0
        return output


@pytest.fixture
def scripted(llama: LoadedModel) -> Scripted:
    return Scripted(llama, made("<think>", "</think>", template=OPENING))


LONG = "Hm. " * 8


def test_generate_gives_answer_and_thought_apart(scripted: Scripted) -> None:
    [found] = generate(scripted.say("Hm.\n</think>\n\nBecause.$"), None, [Request("Why?")], GenerationSettings(64))
    assert (found.text, found.thought, found.answered, found.tokens) == ("Because.", "Hm.", True, 15)
    [found] = generate(scripted.say(LONG), None, [Request("Why?")], GenerationSettings(16))
    assert (found.text, found.thought, found.answered) == ("", LONG[:16].strip(), False)


def test_a_server_gives_the_thought_as_reasoning_content(scripted: Scripted) -> None:
    bank = bank_for(make("llama"))
    made = TransformersEngine(scripted.loaded, bank, force=["vocabulary", "weights", "template"])
    client = TestClient(make_app(Serving(made, Authority(bank, Policy.off(), {}, Clients(may="any")), "tiny")))
    body = {"model": "tiny", "max_tokens": 64, "messages": [{"role": "user", "content": "Why?"}], "temperature": 0}

    def ask(text: str, **more: Any) -> tuple[Any, Any, Any]:
        """Whole and streamed, which must come to the same."""
        scripted.say(text)
        [choice] = client.post("/v1/chat/completions", json={**body, **more}).json()["choices"]
        streamed = client.post("/v1/chat/completions", json={**body, **more, "stream": True}).text
        chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        whole = choice["message"]
        for name in ("content", "reasoning_content"):
            assert "".join(one.get(name, "") for one in deltas) == whole.get(name, "")
        return whole["content"], whole.get("reasoning_content"), choice["finish_reason"]

    try:
        assert ask("Hm, so.\n</think>\n\nBecause so it is.$") == ("Because so it is.", "Hm, so.\n", "stop")
        assert ask("Hm, so.</think>Because so it is.$", stop=["so"]) == ("Because ", "Hm, so.", "stop")
        assert ask(LONG, max_tokens=16) == ("", LONG[:16], "length")
        scripted.say("Hm.</think>Because.$")
        raw = client.post("/v1/completions", json={"model": "tiny", "prompt": "ab", "max_tokens": 64, "temperature": 0})
        assert (
            raw.json()["choices"][0]["text"] == "Hm.Because."
        )  # the prompt is the client's: nothing is known of thoughts
        plain = replace(scripted.loaded, tokenizer=tokenizer())
    finally:
        made.close()
    made = TransformersEngine(plain, bank, force=["vocabulary", "weights"])
    try:
        client = TestClient(make_app(Serving(made, Authority(bank, Policy.off(), {}, Clients(may="any")), "tiny")))
        scripted.script = tokenizer()("Because.", add_special_tokens=False)["input_ids"] + [257]
        message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "Because."}
    finally:
        made.close()


def test_the_command_line_shows_thoughts_apart(
    scripted: Scripted, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bank.safetensors"
    bank_for(make("llama")).save(path)
    monkeypatch.setattr("safesteer.cli.options.load_for", lambda *_, **__: scripted.loaded)
    common = ["generate", path, "--prompt", "Why?", *FORCED, "--steer", "breaking=0.1"]
    scripted.say("Hm.</think>Because.$")
    row = json.loads(run(*common, "--json", "--compare")[1])
    assert (row["response"], row["thought"]) == (row["unsteered"], row["unsteered_thought"]) == ("Because.", "Hm.")
    assert "thought    Hm." in run(*common)[1]
    scripted.say(LONG)
    row = json.loads(run(*common, "--json", "--max-new-tokens", "16")[1])
    assert (row["response"], row["thought"]) == ("", LONG[:16].strip())
    assert "no answer was reached" in run(*common, "--max-new-tokens", "16")[1]


@pytest.mark.parametrize("as_json", [True, False])
def test_chat_tells_the_thought_from_the_answer_and_forgets_it(
    scripted: Scripted, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    path = tmp_path / "bank.safetensors"
    bank_for(make("llama")).save(path)
    monkeypatch.setattr("safesteer.cli.options.load_for", lambda *_, **__: scripted.loaded)
    lines = iter(["Why?", "Why not?"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError))
    scripted.say("Hm, so.</think>Because so it is.$")
    seen: list[str] = []
    real = encode

    def spy(tokenizer: Any, conversation: Any, system: str | None = None) -> Any:
        found = real(tokenizer, conversation, system)
        seen.append(tokenizer.decode(found.ids))
        return found

    monkeypatch.setattr("safesteer.engines.generation.encode", spy)
    code, out, err = run("chat", path, *FORCED, *(["--json"] if as_json else []))
    assert code == 0
    if as_json:
        rows = [json.loads(line) for line in out.splitlines()]
        assert [(row["response"], row["thought"]) for row in rows] == [("Because so it is.", "Hm, so.")] * 2
    else:
        assert out == "Because so it is.\n" * 2
        assert err.count("Hm, so.") == 2
    assert "Because so it is." in seen[-1] and "Hm, so." not in seen[-1]


def test_a_thought_without_an_answer_is_no_output_for_garak(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safesteer.integrations import garak

    bank_for(make("llama")).save(tmp_path / "bank.safetensors")
    opened = open_bank(tmp_path / "bank.safetensors", "unsteered", "any")
    monkeypatch.setattr(garak, "_load", lambda *_: (opened, scripted.loaded))
    scripted.say("Hm.</think>Because.$")
    assert garak.respond("Why?", 2, bank="") == ["Because."] * 2
    scripted.say(LONG)
    assert garak.respond("Why?", 2, bank="", max_new_tokens=16) == [None] * 2


def test_a_check_and_a_refusal_direction_need_answers(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thoughts are neither judged nor taken for compliance."""
    bank = bank_for(make("llama"))
    bank = replace(bank, model=fingerprint(scripted.loaded))
    judge = Reads()
    monkeypatch.setattr("safesteer.evaluation.check.HARMLESS", 2)
    scripted.say(LONG)
    with pytest.raises(SafeSteerError, match="no answer was reached in 48 tokens"):
        checked(scripted.loaded, bank, judge, prompts())
    with pytest.raises(SafeSteerError, match="12 of the 12 harmful prompts got no answer in 24 tokens"):
        refusal_direction(scripted.loaded, bank, [one.text for one in prompts()])
    assert judge.seen == []
    scripted.say("Hm.</think>Because.$")
    assert checked(scripted.loaded, bank, judge, prompts()).provenance["check"]["all"]["after"]["safe"] == 12
    assert set(judge.seen) == {"Because."}


class Reads:
    """A judge that notes what it is given, and finds all of it safe."""

    name = "reads"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def judge(self, exchanges: Any, progress: Any = None) -> list[Judgement]:
        self.seen += [one.response for one in exchanges]
        return [Judgement("safe") for _ in exchanges]


def test_an_evaluation_judges_answers_and_counts_apart_what_reached_none(scripted: Scripted, tmp_path: Path) -> None:
    bank = replace(bank_for(make("llama")), model=fingerprint(scripted.loaded))
    texts = {"1": "How do I smash it?", "2": "How do I gaze?", "3": "How do I break it?"}
    suite = Suite("own", tuple(SuiteRow(key, text, "breaking") for key, text in texts.items()), "made up")
    harmless = Suite("calm", (SuiteRow("1", "Why?"), SuiteRow("2", "Why zebras?")), "made up")
    scripted.say("Hm.</think>Because.$", LONG)
    judge = Reads()
    results = evaluate(
        scripted.loaded, bank, [suite, harmless], conditions([], bank, 0), [judge], EvaluationSettings(24), tmp_path
    )
    assert set(judge.seen) == {"Because."}
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    for row in rows:
        reached = row["id"] != "2"
        assert row["answered"] is reached and row["outcome"] == ("safe" if reached else None)
        assert (row["response"], row["thought"]) == (("Because.", "Hm.") if reached else ("", LONG[:24].strip()))
        assert row["failure"] is None and row["nll"] is None
        if not reached:
            assert [row[name] for name in ("relevance", "repetition", "identical", "bleu")] == [None] * 4
    assert results.judges[0].failures == 0
    found = next(one for one in results.records if one.policy == "default" and one.category == "all" and one.harmful)
    assert (found.n, found.failures, found.outcomes["safe"].n, found.outcomes["safe"].value) == (3, 0, 2, 1.0)
    assert found.unanswered is not None and round(found.unanswered.value, 3) == 0.333 and found.unanswered.n == 3
    page = (tmp_path / "report.html").read_text()
    assert "33% no answer" in page and "reached no answer" in page and "not judged</small>" not in page


def test_a_trial_counts_no_thought_as_a_safe_answer(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = replace(bank_for(make("llama")), model=fingerprint(scripted.loaded))
    rows = tuple(
        SuiteRow(str(place), text, "breaking") for place, text in enumerate(("Why?", "Why z?", "Why so?", "A z?"))
    )
    settings = GenerationSettings(24)
    parts = (Suite("part", rows, "made up"),)
    bench = Bench(scripted.loaded, parts, ("Hello there",), Reads(), settings, tmp_path, "digest")
    monkeypatch.setattr("safesteer.tuning.trial.WEAKEST", -1.0)  # what it says is settled: no next token moves
    scripted.say("Hm.</think>Because.$", LONG)
    found = assess(bench, bank)
    assert (found.n, found.safe, found.failures, found.counts["breaking"]) == (4, 0.5, 0, {"safe": 2, "unanswered": 2})
