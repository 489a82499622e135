"""Requests made up from the server's own OpenAPI description: no 500, and no unsteered answer where steering was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, given, settings, strategies  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402

from safesteer.policy import Policy  # noqa: E402
from safesteer.server.app import Limits, Serving, make_app  # noqa: E402
from safesteer.server.authority import Authority, Clients  # noqa: E402
from safesteer.server.on_transformers import TransformersEngine  # noqa: E402
from tests.tiny import bank_for, make  # noqa: E402

TOKENS = 3
FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
Operations = dict[str, Any]


@pytest.fixture(scope="module")
def operations() -> Iterator[Operations]:
    """`POST /v1/completions` and the others, of a server whose clients may ask for anything."""
    loaded = make("llama")
    bank = bank_for(loaded)
    engine = TransformersEngine(loaded, bank)
    serving = Serving(engine, Authority(bank, Policy.off(), {}, Clients(may="any")), "tiny", Limits(most_tokens=TOKENS))
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(serving))
    yield {one.ok().label: one.ok() for one in schema.get_all_operations()}
    engine.close()


@pytest.mark.parametrize("label", ["POST /v1/chat/completions", "POST /v1/completions", "GET /v1/models/{name}"])
def test_whatever_is_asked_gets_an_answer_or_a_sentence(operations: Operations, label: str) -> None:
    seen: set[int] = set()

    valid = operations[label].as_strategy(generation_mode=GenerationMode.POSITIVE)

    @FUZZ
    @given(strategies.one_of(operations[label].as_strategy(), valid), valid, strategies.booleans())
    def check(anything: Any, ordinary: Any, ours: bool) -> None:
        case = ordinary if ours else anything
        if ours and isinstance(case.body, dict):  # else nearly all fail by the model's name
            case.body = {**case.body, "model": "tiny", "max_tokens": TOKENS, "steering": None}
            if isinstance(
                case.body.get("messages"), list
            ):  # a chat ends with the user's words; this template knows no tools
                told = [
                    {**one, "tool_calls": None} if isinstance(one, dict) else one for one in case.body["messages"][:20]
                ]
                case.body["messages"] = [*told, {"role": "user", "content": "Smash it?"}]
        response = case.call()
        seen.add(response.status_code)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert response.json()["error"]["message"]

    check()
    assert seen & {400, 404}
    if label.startswith("POST"):
        assert 200 in seen


NAMES = strategies.sampled_from(["breaking", "lying", "Breaking", "gravity", "", "breaking "])
NUMBERS = strategies.one_of(
    strategies.floats(0, 2),
    strategies.floats(-1, 3),
    strategies.sampled_from([0, 1, 2, True, "1", None, -0.0]),
)
STEERING = strategies.one_of(
    strategies.just("off"),
    strategies.dictionaries(strategies.sampled_from(["breaking", "lying"]), strategies.floats(0, 2), max_size=2),
    strategies.dictionaries(NAMES, NUMBERS, max_size=3),
    strategies.text(max_size=5),
    strategies.lists(strategies.integers(), max_size=2),
    strategies.none(),
)


@pytest.mark.parametrize("label", ["POST /v1/chat/completions", "POST /v1/completions"])
def test_steering_acts_as_asked_or_the_request_fails(operations: Operations, label: str) -> None:
    answered = 0

    @FUZZ
    @given(operations[label].as_strategy(), STEERING)
    def check(case: Any, asked: Any) -> None:
        nonlocal answered
        start = {"messages": [{"role": "user", "content": "Smash it?"}]} if "chat" in label else {"prompt": "Smash it?"}
        given_too = case.body if isinstance(case.body, dict) else {}
        kept = {name: given_too[name] for name in ("temperature", "top_p", "seed") if name in given_too}
        case.body = {"model": "tiny", "max_tokens": TOKENS, **start, **kept, "steering": asked}
        response = case.call()
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            return
        answered += 1
        wanted = (
            {name.strip().lower(): value for name, value in asked.items() if value} if isinstance(asked, dict) else {}
        )
        acted = {one["category"]: one["strength"] for one in response.json()["steering"]["acting"]}
        assert asked in ("off", None) or isinstance(asked, dict)
        assert set(acted) == set(wanted)
        for name, strength in wanted.items():
            assert not isinstance(strength, bool)
            assert acted[name] == pytest.approx(strength, abs=1e-4)

    check()
    assert answered > 10
