"""`safesteer serve` on vLLM: requests that come and go at random are each answered as the library would alone."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.vllm.test_vllm import POLICIES, SECOND_RUNNER, TOKENS, World, world  # noqa: F401 - a fixture

vllm = pytest.importorskip("vllm")

from vllm.exceptions import VLLMValidationError  # noqa: E402

from safesteer.engines import GenerationSettings, Request, generate  # noqa: E402
from safesteer.errors import SafeSteerError, SteeringError  # noqa: E402
from safesteer.models import encode  # noqa: E402
from safesteer.models.decoding import Sampling  # noqa: E402
from safesteer.models.files import model_files  # noqa: E402
from safesteer.policy import Policy  # noqa: E402
from safesteer.server.app import HEADER, Limits, Serving, make_app  # noqa: E402
from safesteer.server.authority import Authority, Clients  # noqa: E402
from safesteer.server.engine import BusyError, Done, Event, Failed, Job, Piece, Planned, answer  # noqa: E402
from safesteer.server.on_vllm import VllmEngine, arguments  # noqa: E402
from safesteer.vectors import VectorBank  # noqa: E402

SMALL = ["--dtype", "float32", "--max-model-len", "256", "--block-size", "32", "--max-num-seqs", "4"]
SMALL += ["--max-num-batched-tokens", "64", "--enforce-eager"]


async def asked(serving: Serving, **body: Any) -> httpx.Response:
    """What a client gets for `body`."""
    whole = {
        "model": "tiny",
        "max_tokens": TOKENS,
        "temperature": 0,
        "messages": [{"role": "user", "content": "Smash it"}],
    }
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(serving)), base_url="http://t") as client:  # type: ignore[arg-type]
        return await client.post("/v1/chat/completions", json={**whole, **body}, timeout=60)


def start(world: World, **changes: Any) -> VllmEngine:  # noqa: F811
    files = model_files(str(world.model))
    world.bank.check(files.fingerprint(world.bank.model.weights))
    return VllmEngine(
        arguments(world.path, files.folder, SMALL), world.bank, files.tokenizer, set(files.stop_ids), **changes
    )


@pytest.fixture(scope="module")
def engine(world: World) -> Iterator[VllmEngine]:  # noqa: F811
    made = start(world)
    yield made
    made.close()


def test_requests_that_come_and_go_at_random_are_answered_as_alone(world: World, engine: VllmEngine) -> None:  # noqa: F811
    """96 requests under seven policies at random moments, a quarter of them left in the middle, over four slots."""
    dice = random.Random(5)
    encoded = {one.prompt: encode(world.loaded.tokenizer, str(one.prompt)) for one in world.requests}
    default = Policy.default(world.bank)
    found: dict[int, Any] = {}
    left: list[int] = []
    asked = [(dice.random() * 6, dice.random() < 0.25) for _ in range(2 * len(world.requests))]

    def go(number: int) -> None:
        request = world.requests[number % len(world.requests)]
        wait, leaves = asked[number]
        time.sleep(wait)
        job = Job(encoded[request.prompt], (request.policy or default).resolved(world.bank), TOKENS)
        if leaves:
            handle = engine.submit(job, lambda event: None)
            time.sleep(wait / 20)
            handle.abort()
            left.append(number)
        else:
            found[number] = answer(engine, job, 120)

    threads = [threading.Thread(target=go, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 10 < len(left) < 40 and len(found) + len(left) == len(asked)
    for number, one in found.items():
        wanted = world.expected[number % len(world.requests)]
        assert one.text.strip() == wanted.text
        assert [a.category for a in one.plan.acting] == [a["category"] for a in wanted.steering["acting"]]
    deadline = time.monotonic() + 10
    while engine._llm.get_num_unfinished_requests() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine._llm.get_num_unfinished_requests() == 0  # those that were left hold nothing
    assert engine.waiting == 0


def test_over_http_an_answer_is_the_librarys_and_says_what_acted(world: World, engine: VllmEngine) -> None:  # noqa: F811
    strong = Policy.of({"breaking": 1.0}, gate="always")
    authority = Authority(
        world.bank, Policy.off(), {"strict": strong.resolved(world.bank)}, Clients(may="any", most=1.5)
    )
    app = make_app(Serving(engine, authority, "tiny", Limits(most_tokens=64, default_tokens=8)))

    async def talk() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:  # type: ignore[arg-type]

            async def ask(**body: Any) -> httpx.Response:
                whole = {"max_tokens": TOKENS, "temperature": 0, "messages": [{"role": "user", "content": "Smash it"}]}
                return await client.post("/v1/chat/completions", json={"model": "tiny", **whole, **body}, timeout=60)

            plain, strict, own = await asyncio.gather(
                ask(), ask(model="tiny@strict"), ask(model="tiny@strict", steering={"breaking": 1.2}, stream=True)
            )
            for response, policy in ((plain, Policy.off()), (strict, strong)):
                wanted = generate(world.loaded, world.bank, [Request("Smash it", policy)], GenerationSettings(TOKENS))[
                    0
                ]
                assert response.json()["choices"][0]["message"]["content"].strip() == wanted.text
            assert (plain.headers[HEADER], strict.headers[HEADER]) == ("none", "breaking=1.00")
            assert own.headers[HEADER] == "breaking=1.20"
            lines = [line[6:] for line in own.text.split("\n\n") if line.startswith("data: {")]
            text = "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines)
            wanted = generate(
                world.loaded,
                world.bank,
                [Request("Smash it", Policy.of({"breaking": 1.2}, gate="always"))],
                GenerationSettings(TOKENS),
            )[0]
            assert text.strip() == wanted.text
            assert json.loads(lines[-1])["steering"]["acting"][0]["strength"] == 1.2
            refused = await ask(steering={"breaking": 1.6})
            assert refused.status_code == 400 and "limit" in refused.json()["error"]["message"]
            assert (await client.get("/health")).status_code == 200

    asyncio.run(talk())


@pytest.mark.parametrize("unverified", [False, True])
def test_what_a_check_found_unfit_acts_only_unverified(world: World, tmp_path: Path, unverified: bool) -> None:  # noqa: F811
    """The category of the largest dose, by which steering is tested at the start where it may act."""
    unfit = max(world.bank.categories, key=world.bank.dose)
    [fit] = set(world.bank.categories) - {unfit}
    path = tmp_path / "bank.safetensors"
    replace(world.bank, provenance={**world.bank.provenance, "check": {"unfit": [unfit]}}).save(path)
    bank = VectorBank.load(path).unverified() if unverified else VectorBank.load(path)
    made = VllmEngine(
        arguments(path, world.model, SMALL, unverified=unverified), bank, world.loaded.tokenizer, world.loaded.stop_ids
    )
    try:
        waiting = Policy.of(dict.fromkeys(bank.categories, 0.0), gate="always").resolved(bank)
        serving = Serving(made, Authority(bank, waiting, {}, Clients(may="any", most=1.5)), "tiny", Limits())
        served = asyncio.run(asked(serving, steering={fit: 1.0}))
        assert served.headers[HEADER] == f"{fit}=1.00"
        found = asyncio.run(asked(serving, steering={unfit: 1.0}))
        spec = {"bank": bank.digest(), "categories": {unfit: {"strength": 1.0, "gate": "always"}}}
        if unverified:
            policy = Policy.of({unfit: 1.0}, gate="always")
            [wanted] = generate(world.loaded, bank, [Request("Smash it", policy)], GenerationSettings(TOKENS))
            assert found.json()["choices"][0]["message"]["content"].strip() == wanted.text
            assert found.headers[HEADER] == f"{unfit}=1.00"
        else:
            assert found.status_code == 400 and f"{unfit} was found to make" in found.json()["error"]["message"]
            raw = made._next_token([1, 2, 3], {"safesteer": json.dumps(spec)})  # as a client of `vllm serve` says it
            with pytest.raises(VLLMValidationError, match=f"{unfit} was found to make"):
                made._wait(raw)
            assert made.alive
    finally:
        made.close()


def test_sampling_stop_words_and_a_full_queue(world: World, engine: VllmEngine) -> None:  # noqa: F811
    job = Job(
        encode(world.loaded.tokenizer, "How?"), Policy.of({"breaking": 1.0}, gate="always").resolved(world.bank), 12
    )
    whole = answer(engine, job).text
    word = whole[3:5]
    cut = answer(engine, replace(job, stop=(word,)))
    assert (cut.text, cut.reason) == (whole[: whole.index(word)], "stop")
    if not SECOND_RUNNER:  # whose sampling kernel Triton's interpreter cannot run
        warm = replace(job, sampling=Sampling(temperature=1.0, top_p=0.9), seed=3)
        assert answer(engine, warm).text == answer(engine, warm).text != whole
    engine._most_waiting, before = 1, engine._most_waiting
    seen: list[Event] = []
    ended = threading.Event()

    def note(event: Event) -> None:
        seen.append(event)
        if isinstance(event, Done | Failed):
            ended.set()

    try:
        engine.submit(job, note)
        with pytest.raises(BusyError, match="try again"):
            engine.submit(job, print)
    finally:
        engine._most_waiting = before
    assert ended.wait(30)
    assert isinstance(seen[0], Planned) and isinstance(seen[-1], Done)
    assert "".join(one.text for one in seen if isinstance(one, Piece)) == whole


def test_a_prompt_that_cannot_be_read_is_not_answered(
    world: World,  # noqa: F811
    engine: VllmEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def nothing(method: str, args: Any) -> Any:
        return [[None] * len(args[0])]

    job = Job(encode(world.loaded.tokenizer, "How?"), Policy.default(world.bank).resolved(world.bank), 4)
    assert job.policy.gated
    monkeypatch.setattr(engine._llm, "collective_rpc", nothing)
    with pytest.raises(SteeringError, match="not read"):
        answer(engine, job, 30)


def test_what_is_not_served(world: World, engine: VllmEngine, tmp_path: Path) -> None:  # noqa: F811
    for given, sentence in [
        (["--no-such-option", "3"], "does not take these options"),
        (["--data-parallel-size", "2"], "a server for each replica"),
        (["--model", "other"], "cannot be passed on"),
        (["--additional-config", '{"safesteer": {}}'], "cannot be passed on"),
    ]:
        with pytest.raises(SafeSteerError, match=sentence):
            arguments(world.path, world.model, given)
    with pytest.raises(SteeringError, match="cannot name `layers`"):
        engine.check(
            Policy.parse({"categories": {"breaking": {"layers": "1", "gate": "always"}}}, "p").resolved(world.bank)
        )
    other = replace(world.bank, model=replace(world.bank.model, weights={"model.norm.weight": (9.0,) * 32}))
    with pytest.raises(SafeSteerError, match="another model"):
        other.check(model_files(str(world.model)).fingerprint(other.model.weights))
    changed = tmp_path / "other.safetensors"
    VectorBank.save(replace(world.bank, provenance={"model": "x"}), changed)
    with pytest.raises(SteeringError, match="another bank"):
        VllmEngine(arguments(changed, world.model, SMALL), world.bank, world.loaded.tokenizer, world.loaded.stop_ids)


def test_when_vllm_ends_requests_fail_and_it_is_not_alive(world: World, engine: VllmEngine) -> None:  # noqa: F811
    job = Job(
        encode(world.loaded.tokenizer, "How?"), Policy.of({"breaking": 1.0}, gate="always").resolved(world.bank), 12
    )
    assert answer(engine, job).text
    [process] = engine._llm.engine_core.resources.engine_manager.processes
    process.kill()
    with pytest.raises(SteeringError, match=r"failed|ended"):
        for _ in range(100):
            answer(engine, job, 30)
    assert not engine.alive
    with pytest.raises(SteeringError, match="vLLM ended"):
        engine.submit(job, print)


@pytest.mark.parametrize(
    ("verb", "how", "status", "processes"),  # processes: the command, a tracker, the engine, its worker
    [("serve", signal.SIGINT, 130, 3), ("serve", signal.SIGTERM, 143, 4), ("fit", signal.SIGINT, 130, 4)],
)
def test_what_is_stopped_while_vllm_starts_leaves_no_process(
    world: World,  # noqa: F811
    tmp_path: Path,
    verb: str,
    how: signal.Signals,
    status: int,
    processes: int,
) -> None:
    model, bank, out = (str(one) for one in (world.model, world.path, tmp_path / "new.safetensors"))
    given = ["serve", bank, "--model", model, "--port", "0"] if verb == "serve" else ["fit", model, "--out", out]
    command = [sys.executable, "-m", "safesteer.cli.main", *given, "--engine", "vllm", *SMALL]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as running:

        def alive() -> list[str]:
            shown = subprocess.run(["ps", "-eo", "sid=,stat=,args="], capture_output=True, text=True, check=True).stdout
            rows = [line.split(maxsplit=2) for line in shown.splitlines()]
            return [row[2] for row in rows if row[0] == str(running.pid) and not row[1].startswith("Z")]

        def until(done: Callable[[], bool]) -> bool:
            deadline = time.monotonic() + 180
            while not done() and time.monotonic() < deadline:
                time.sleep(0.1)
            return done()

        try:
            assert until(lambda: len(alive()) >= processes)
            running.send_signal(how)
            assert running.wait(60) == status
            assert until(lambda: not alive())
        finally:
            running.kill()
    assert not list(tmp_path.iterdir())
