"""One policy through every door (Python, YAML, JSONL, command line, chat, HTTP, vLLM): what acts is what was asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safesteer.cli.generate import _read_requests
from safesteer.cli.options import parse_steer
from safesteer.engines.vllm import Specs
from safesteer.errors import PolicyError, SafeSteerError
from safesteer.models import LoadedModel
from safesteer.policy import CategoryPolicy, Plan, Policy, plan, read_yaml
from safesteer.server.authority import Authority, Clients
from safesteer.vectors import Reading, VectorBank
from tests.test_explain_attribution import gated
from tests.tiny import Run, bank_for, make

NAMES = ("breaking", "lying")
OPEN = Reading(1.0, 1.0, dict.fromkeys(NAMES, 1.0), NAMES)
OFF = ("off", "Off", "OFF", "no", "false", "False", "", " ", False, [])
NO_STRENGTH = (True, "on", "true", "hate", "0.5", "none", float("nan"), float("inf"), 10**400, [1.0], [False], [[]])
Doors = dict[str, Callable[[dict[str, Any]], Policy]]
QUICK = settings(
    max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return make("llama")


@pytest.fixture(scope="module")
def ungated(loaded: LoadedModel) -> VectorBank:
    return bank_for(loaded)


@pytest.fixture(scope="module")
def banks(loaded: LoadedModel, ungated: VectorBank) -> dict[str, VectorBank]:
    """With a gate, without, and one that was tuned to steer what follows the prompt."""
    return {
        "gated": gated(loaded, (0, 1)),
        "ungated": ungated,
        "tuned": replace(ungated, tokens="continuation"),
    }


def acting(policy: Policy, bank: VectorBank) -> dict[str, tuple[Any, ...]]:
    """What acts on a prompt in which everything is read."""
    decided: Plan = plan(policy.resolved(bank), bank, OPEN)
    return {one.category: (one.strength, one.gate, one.tokens, one.layers) for one in decided.acting}


def doors(bank: VectorBank, place: Path) -> Doors:
    """The doors that take a mapping of categories to how they act, each for one bank."""
    file, rows = place / "policy.yaml", place / "rows.jsonl"

    def from_file(data: Any) -> Path:
        file.write_text(yaml.safe_dump(data), encoding="utf-8")
        return file

    def row(asked: dict[str, Any]) -> Policy:
        rows.write_text(json.dumps({"prompt": "Open it", "policy": {"categories": asked}}) + "\n", encoding="utf-8")
        [(request, _)] = _read_requests(str(rows), bank, Policy.off(), {}, None)
        assert request.policy is not None
        return request.policy

    def of_objects(asked: dict[str, Any]) -> Policy:
        return Policy(categories={name: CategoryPolicy.model_validate(how) for name, how in asked.items()})

    return {
        "of": Policy.of,
        "objects": of_objects,
        "parse": lambda asked: Policy.parse({"categories": asked}),
        "yaml": lambda asked: Policy.from_yaml(from_file({"categories": asked})),
        "served": lambda asked: Authority.of(bank, from_file({"categories": asked})).policy,
        "variant": lambda asked: Authority.of(bank, from_file({"variants": {"v": {"categories": asked}}})).variant("v"),
        "row": row,
    }


def texts(asked: dict[str, Any]) -> list[str]:
    """As words of `--steer` and of /steer."""
    return [name if how is None else f"{name}={how}" for name, how in asked.items()]


def expected(asked: dict[str, Any], bank: VectorBank) -> dict[str, tuple[Any, ...]]:
    """What was asked, by the documentation alone."""
    out = {}
    for name, how in asked.items():
        ways = how if isinstance(how, dict) else {"strength": how}
        strength = ways.get("strength")
        strength = 1.0 if strength is None else strength if isinstance(strength, float) else 0.0
        layers = (1,) if ways.get("layers") is None else (0, 1)
        gate = ways.get("gate") or ("always" if bank.gate is None else "auto")
        if strength:
            out[name] = (strength, gate, ways.get("tokens") or bank.tokens, layers)
    return out


STRENGTHS = st.one_of(st.floats(0.01, 2.0), st.sampled_from(OFF), st.none())
WAYS = st.fixed_dictionaries(
    {},
    optional={
        "strength": STRENGTHS,
        "gate": st.sampled_from(["always", None]),
        "tokens": st.sampled_from(["all", "prompt", "generated", "continuation", None]),
        "layers": st.sampled_from([None]),
        "site": st.sampled_from(["directions", None]),
    },
)
SHORT = st.dictionaries(st.sampled_from(NAMES), STRENGTHS, max_size=2)


@pytest.mark.parametrize("kind", ["gated", "ungated", "tuned"])
def test_what_acts_is_what_was_asked_at_every_door(
    kind: str, banks: dict[str, VectorBank], tmp_path_factory: pytest.TempPathFactory
) -> None:
    bank = banks[kind]
    open_doors = doors(bank, tmp_path_factory.mktemp("doors"))

    @QUICK
    @given(st.dictionaries(st.sampled_from(NAMES), st.one_of(STRENGTHS, WAYS), max_size=2))
    def check(asked: dict[str, Any]) -> None:
        wanted = expected(asked, bank)
        for door, policy in open_doors.items():
            assert acting(policy(asked), bank) == wanted, door

    check()


@pytest.mark.parametrize("kind", ["gated", "ungated", "tuned"])
def test_strengths_said_in_words_act_the_same(kind: str, banks: dict[str, VectorBank]) -> None:
    bank = banks[kind]
    free = Authority(bank, Policy.off(), {}, Clients(may="any"))

    @QUICK
    @given(SHORT)
    def check(asked: dict[str, Any]) -> None:
        wanted = expected(asked, bank)
        said = {name: how for name, how in asked.items() if how is not None}
        assert acting(free.decide(None, said), bank) == expected(said, bank)
        spoken = {name: how for name, how in asked.items() if how != [] and str(how).strip()}
        assert acting(parse_steer(texts(spoken), None, None), bank) == expected(spoken, bank)
        if not any(gate == "auto" for _, gate, _, _ in wanted.values()):
            specs = Specs(bank)
            spec = json.dumps({"bank": specs.digest, "categories": asked})
            assert acting(specs.policy(spec), bank) == wanted

    check()


@pytest.mark.parametrize("value", NO_STRENGTH, ids=repr)
def test_what_is_neither_a_strength_nor_off_is_refused_with_its_place(
    value: Any, ungated: VectorBank, tmp_path: Path
) -> None:
    for door, policy in doors(ungated, tmp_path).items():
        if door == "objects" or (value == 10**400 and door in ("yaml", "served", "variant")):
            continue  # pydantic's own error; digits that PyYAML does not read
        for how in (value, {"strength": value, "gate": "always"}):
            with pytest.raises(PolicyError, match=r"breaking\.strength: .*must be a number"):
                policy({"breaking": how})
    with pytest.raises(PolicyError, match=r"breaking: .*must be a number"):
        Authority(ungated, Policy.off(), {}, Clients(may="any")).decide(None, {"breaking": value})
    if isinstance(value, str) and value != "0.5":  # a number, in words
        with pytest.raises(PolicyError, match=r"breaking\.strength: .*must be a number"):
            parse_steer([f"breaking={value}"], None, None)


@pytest.mark.parametrize(
    "off", [one for one in OFF if isinstance(one, str) and one.strip()] + ["n" + "o", "FALSE", "''", "[]"]
)
def test_off_as_people_write_it_in_yaml(off: str, ungated: VectorBank, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        f"categories: {{breaking: {off}, lying: {{strength: {off}}}}}\nvariants: {{a: {off}, b: {{categories: {off}}}}}\n"
    )
    found = Authority.of(ungated, path)
    assert [acting(one, ungated) for one in found.policies] == [{}, {}, {}]
    path.write_text(f"clients: {off}")
    assert Authority.of(ungated, path).clients.may == "none"  # and not the default
    path.write_text(f"categories: {off}")
    assert acting(Policy.from_yaml(path), ungated) == acting(Authority.of(ungated, path).policy, ungated) == {}


def test_no_door_takes_the_last_of_two_equal_keys(ungated: VectorBank, tmp_path: Path) -> None:
    twice = '{"breaking": 1.0, "breaking": "off"}'
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "x", "policy": {{"categories": {twice}}}}}\n')
    with pytest.raises(SafeSteerError, match="line 1: the key 'breaking' is given twice"):
        _read_requests(str(tmp_path / "rows.jsonl"), ungated, Policy.off(), {}, None)
    specs = Specs(ungated)
    with pytest.raises(SafeSteerError, match="the key 'breaking' is given twice"):
        specs.policy(f'{{"bank": "{specs.digest}", "categories": {twice}}}')


def test_a_key_without_a_value_takes_the_default(banks: dict[str, VectorBank], tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "name:\ncategories:\n  breaking:\n  lying: {strength: , gate: , layers: , tokens: , site: }\nclients:\nvariants:\n"
    )
    for bank in banks.values():
        assert Authority.of(bank, path).policy.categories == Policy.default(bank).categories
    with pytest.raises(PolicyError, match=r"breaking\.strenght"):
        Policy.parse({"categories": {"breaking": {"strenght": None}}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "strict"}, "names no categories"),
        ({"categories": None}, "names no categories"),
        ({}, "names no categories"),
        ({"categories": {"breaking": {"layers": []}}}, r"policy: categories\.breaking\.layers: .*not understood"),
        ({"categories": {"breaking": {"layers": [True]}}}, r"categories\.breaking\.layers"),
        ({"categories": {"breaking": {"layers": "x"}}}, r"categories\.breaking\.layers"),
        ({"categories": {"breaking": {"layers": False}}}, r"categories\.breaking\.layers"),
        ({"categories": {"breaking": {"gate": False}}}, r"categories\.breaking\.gate"),
        ({"categories": {"breaking": {"tokens": "off"}}}, r"categories\.breaking\.tokens"),
        ({"categories": "breaking"}, "categories"),
        (True, "expected a mapping"),
        (None, "expected a mapping"),
    ],
    ids=repr,
)
def test_a_policy_that_says_nothing_that_could_act_is_refused(data: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Policy.parse(data)


def test_layers_named_twice_are_one(ungated: VectorBank) -> None:
    once, twice = (Policy.of({"breaking": {"layers": layers}}) for layers in ([1], [1, "1"]))
    assert acting(once, ungated) == acting(twice, ungated)


def test_what_a_server_may_do_is_not_read_from_a_truth_value(ungated: VectorBank, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    for text in ("clients: {most: yes}", "clients: {most: off}", "clients: {may: off}"):
        path.write_text(text)
        with pytest.raises(PolicyError, match=r"clients\.m"):
            Authority.of(ungated, path)


# -- rows, chat, the command line, to their end ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(loaded: LoadedModel, banks: dict[str, VectorBank], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, and a gated bank that is always open."""
    place = tmp_path_factory.mktemp("saved")
    loaded.model.save_pretrained(place / "model")
    loaded.tokenizer.save_pretrained(place / "model")
    bank = banks["gated"]
    assert bank.gate is not None
    gate = replace(bank.gate, biases=torch.tensor([0.0, 1e3, 0.0]))  # it is always open, and reads of breaking
    replace(bank, gate=gate, provenance={**bank.provenance, "model": str(place / "model")}).save(
        place / "b.safetensors"
    )
    return place


def rows_of(out: str) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in out.splitlines())


def test_a_row_that_says_off_is_answered_unsteered(run: Run, saved: Path) -> None:
    asked = [*OFF, None, 1.0, {"gate": "always"}]
    rows = [{"prompt": "Open it", "policy": {"categories": {"breaking": how}}} for how in asked]
    rows += [{"prompt": "Open it", "policy": how} for how in ("off", "No", False, [], {"categories": "off"})]
    file = saved / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = run(
        "generate", saved / "b.safetensors", "--prompts", file, "--compare", "--json", "--max-new-tokens", 4
    )
    assert status == 0, err
    acted = [[(one["category"], one["gate"]) for one in row["steering"]["acting"]] for row in rows_of(out)]
    assert acted[: len(OFF)] == [[]] * len(OFF) and acted[-5:] == [[]] * 5
    assert acted[len(OFF) : -5] == [[("breaking", "auto")], [("breaking", "auto")], [("breaking", "always")]]
    assert all(row["response"] == row["unsteered"] for row in rows_of(out) if not row["steering"]["acting"])


def test_an_empty_cell_of_a_csv_file_names_no_policy(run: Run, saved: Path) -> None:
    (saved / "rows.csv").write_text("prompt,policy\nOpen it,\nOpen it,off\n")
    arguments = ["--prompts", saved / "rows.csv", "--steer", "breaking=0.5", "--json", "--max-new-tokens", 2]
    status, out, err = run("generate", saved / "b.safetensors", *arguments)
    assert status == 0, err
    assert [[one["strength"] for one in row["steering"]["acting"]] for row in rows_of(out)] == [[0.5], []]


def test_a_row_that_is_refused_is_named(run: Run, saved: Path) -> None:
    (saved / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "policy": {"categories": {"breaking": true}}}\n')
    status, out, err = run("generate", saved / "b.safetensors", "--prompts", saved / "bad.jsonl")
    assert (status, out) == (1, "")
    assert "bad.jsonl, line 2: policy: categories.breaking.strength: True is not a number" in err


@pytest.mark.parametrize(
    ("steer", "gate", "acted"),
    [
        ("breaking=off", [], []),
        ("breaking=NO", [], []),
        ("breaking", [], [(1.0, "auto")]),
        ("breaking=0.5", [], [(0.5, "auto")]),
        ("breaking=0.5", ["--gate", "always"], [(0.5, "always")]),
    ],
)
def test_steer_and_chat_have_the_defaults_of_a_policy_file(
    steer: str, gate: list[str], acted: list[Any], run: Run, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--json", "--max-new-tokens", 2]
    status, out, err = run("generate", saved / "b.safetensors", "--prompt", "Open it", "--steer", steer, *gate, *more)
    assert status == 0, err
    [row] = rows_of(out)
    lines = iter(["hello", "/off", "hello", f"/steer {steer}", "hello", "/off breaking", "/steer breaking=", "hello"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, "/quit"))
    status, out, err = run("chat", saved / "b.safetensors", "--steer", steer, *gate, *more)
    first, off, again, last = rows_of(out)
    for one in (row, first, again, last):  # commands that are refused change nothing
        assert [(own["strength"], own["gate"]) for own in one["steering"]["acting"]] == acted
    assert off["steering"]["acting"] == []
    assert "/off takes nothing" in err and "there is no strength; write breaking=1.0, or breaking=off" in err


# -- YAML --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: &a {x: 1, y: 2}\nb: {<<: *a, z: 3}", {"x": 1, "y": 2, "z": 3}),
        ("a: &a {x: 1}\nb: {<<: *a, x: 2}", {"x": 2}),  # a mapping's own key comes first, wherever it stands
        ("a: &a {x: 1}\nb: {x: 2, <<: *a}", {"x": 2}),
        ("a: &a {x: 1}\nc: &c {x: 2, y: 2}\nb: {<<: [*a, *c]}", {"x": 1, "y": 2}),  # then the first that is merged
        ("a: &a {x: 1}\nc: &c {<<: *a, x: 2, y: 2}\nd: {<<: *c}\nb: {<<: *c, y: 3}", {"x": 2, "y": 3}),
        ("b: {<<: {x: 1}}", {"x": 1}),
        ("b: {1: a, '1': b}", {1: "a", "1": "b"}),
    ],
)
def test_merge_keys_work(text: str, found: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert read_yaml(path)["b"] == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b: {x: 1, x: 2}", "the key 'x' is given twice"),
        ("b: {x: 1, 'x': 2}", "the key 'x' is given twice"),
        ("b: {1: a, 0x1: b}", "the key 1 is given twice"),
        ("a: &a {x: 1, x: 2}\nb: {<<: *a}", "the key 'x' is given twice"),
        ("b: {<<: {x: 1, x: 2}}", "the key 'x' is given twice"),
        ("a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}", "the key 'y' is given twice"),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}", "the key '<<' is given twice"),
        ("b: {<<: 3}", "<< merges mappings alone"),
        ("b: {<<: [3]}", "<< merges mappings alone"),
        ("b: &b {<<: *b}", "not valid YAML"),
        ("b: {? [x] : 1}", "not valid YAML"),
    ],
)
def test_duplicate_keys_are_still_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=message):
        read_yaml(path)


def test_a_served_policy_can_be_built_on_another(ungated: VectorBank, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "categories: &base {breaking: {strength: 0.5, gate: always}, lying: off}\n"
        "variants: {strict: {categories: {<<: *base, lying: 1.5}}}\n"
    )
    found = Authority.of(ungated, path)
    assert {name: how.strength for name, how in found.policy.categories.items()} == {"breaking": 0.5, "lying": 0.0}
    strict = found.variant("strict").categories
    assert {name: how.strength for name, how in strict.items()} == {"breaking": 0.5, "lying": 1.5}


def test_one_default_for_the_gate(banks: dict[str, VectorBank]) -> None:
    gated, ungated = banks["gated"], banks["ungated"]
    same = (
        Policy.of({"breaking": 1.0}),
        Policy.parse({"categories": {"breaking": 1.0}}),
        parse_steer(["breaking"], None, None),
    )
    for bank, gate in ((gated, "auto"), (ungated, "always")):
        wanted = Policy.default(bank).categories["breaking"]
        assert wanted.gate == gate
        assert [one.resolved(bank).categories["breaking"] for one in same] == [wanted] * 3
    with pytest.raises(SafeSteerError, match="no gate"):
        Policy.of({"breaking": 1.0}, gate="auto").resolved(ungated)
