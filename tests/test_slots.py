"""Deltas of a flat batch: the right row for every token, and slots that are given back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from safesteer.engines.slots import TOGETHER, Slots
from safesteer.engines.vllm import NAME, Specs
from safesteer.engines.vllm_collect import What
from safesteer.engines.vllm_seams import fingerprint, untested
from safesteer.errors import SteeringError
from safesteer.models import LoadedModel
from safesteer.policy import Policy, composed, plan
from tests.tiny import bank_for


def rows(values: Sequence[float], layer: int = 1) -> torch.Tensor:
    """Prompt tokens are moved by a value, the last one by ten times that, generated ones by a hundred times; at one layer."""
    found = torch.zeros(len(values), 2, 3, 2)
    found[:, layer] = torch.tensor([1.0, 10.0, 100.0]).unsqueeze(1) * torch.tensor(values).view(-1, 1, 1)
    return found


def moves(slots: Slots, layer: int = 1) -> list[float]:
    return slots.table(layer)[slots.index, 0].tolist()


def test_each_token_gets_the_row_of_its_request_and_kind() -> None:
    slots = Slots((0, 1), 2, slots=2, tokens=12, dtype=torch.float32, device="cpu")
    asked: list[str] = []

    def rows_of(specs: Sequence[str]) -> torch.Tensor:
        asked.extend(specs)
        return rows([{"a": 1.0, "c": 2.0}[spec] for spec in specs])

    counts, computed, prompts = np.array([3, 2, 4]), np.array([0, 0, 1]), np.array([4, 2, 3])
    slots.fill(["a", None, "c"], counts, computed, prompts, rows_of)
    # a: the first three of four prompt tokens; then nothing; c: from its second token on, the third is its last, two generated
    assert moves(slots) == [1, 1, 1, 0, 0, 2, 20, 200, 200, 0, 0, 0]
    assert moves(slots, 0) == [0] * 12
    slots.fill(["c", "a", "a"], np.array([1, 2, 1]), np.array([5, 3, 0]), np.array([3, 4, 4]), rows_of)
    assert moves(slots)[:5] == [200, 10, 100, 1, 0]
    assert asked == ["a", "c"]


def test_a_spec_keeps_its_slot_until_another_needs_it() -> None:
    slots = Slots((0, 1), 2, slots=2, tokens=4, dtype=torch.float32, device="cpu")
    asked: list[str] = []

    def rows_of(specs: Sequence[str]) -> torch.Tensor:
        asked.extend(specs)
        return rows([float(spec) for spec in specs])

    one = np.array([1])
    for spec in ("1", "2", "1", "0", "2", "1"):  # "0" has the slot of "1", which comes back in that of "2"
        slots.fill([spec], one, one * 7, one, rows_of)
        assert moves(slots) == [100 * float(spec), 0, 0, 0]
    assert asked == ["1", "2", "0", "1"]
    slots.fill([None], one, one * 7, one, rows_of)
    assert moves(slots) == [0] * 4


def test_slots_come_back_and_leave_nothing_behind() -> None:
    slots = Slots((0, 1), 2, slots=1, tokens=4, dtype=torch.float32, device="cpu")
    one = np.array([1])
    for turn in range(5):
        layer = turn % 2
        slots.fill([f"{turn}"], one, one * 7, one, lambda specs, layer=layer: rows([1.0], layer))  # type: ignore[misc]
        assert (moves(slots, layer)[0], moves(slots, 1 - layer)[0]) == (100, 0)
    with pytest.raises(SteeringError, match="more steered requests"):
        slots.fill(["x", "y"], np.array([1, 1]), np.array([0, 0]), np.array([1, 1]), lambda specs: rows([1.0, 2.0]))


def test_layers_of_other_workers_are_left_to_them(llama: LoadedModel) -> None:
    bank = bank_for(llama, layers=(0, 1, 2))
    specs = Specs(bank)
    rates = specs.rates([specs.args(Policy.of({"breaking": 1.0, "lying": 2.0}))[NAME]])
    whole, here = (composed(rates, specs.steps(layers))[0] for layers in ((0, 1, 2), (2,)))
    torch.testing.assert_close(here, whole[:, :, 2:])


def test_a_worker_without_acting_blocks_fills_nothing(llama: LoadedModel) -> None:
    """A stage of a pipeline."""
    bank = bank_for(llama)
    specs = Specs(bank)
    slots = Slots((), bank.model.width, 1, 4, torch.float32, "cpu")
    one, spec = np.array([1]), specs.args(Policy.of({"breaking": 1.0}))[NAME]
    steps = specs.steps(())
    slots.fill([spec], one, one * 7, one, lambda new: composed(specs.rates(new), steps)[0].transpose(1, 2))
    assert slots.tables.numel() == 0


def test_many_new_specs_are_written_in_portions() -> None:
    slots = Slots((0, 1), 2, slots=40, tokens=40, dtype=torch.float32, device="cpu")
    sizes: list[int] = []

    def rows_of(specs: Sequence[str]) -> torch.Tensor:
        sizes.append(len(specs))
        return rows([float(spec) for spec in specs])

    ones = np.ones(40, dtype=np.int64)
    slots.fill([str(n % 37) for n in range(40)], ones, ones * 7, ones, rows_of)
    assert moves(slots) == [100 * (n % 37) for n in range(40)]
    assert sum(sizes) == 37 and max(sizes) == TOGETHER


@pytest.mark.parametrize("strengths", [{"breaking": 1.5}, {"breaking": 1.0, "lying": 2.0}])
def test_rows_made_where_the_tables_are_are_those_of_the_plan(llama: LoadedModel, strengths: dict[str, float]) -> None:
    bank = bank_for(llama, layers=(0, 1, 2))
    specs = Specs(bank)
    for kinds in ("all", "prompt", "generated", "continuation"):
        policy = Policy.of(strengths, tokens=kinds)
        meant = plan(policy.resolved(bank), bank).deltas
        made, caps = composed(specs.rates([specs.args(policy)[NAME]])[0], specs.steps(bank.acting))
        for place, layer in enumerate(bank.acting):
            torch.testing.assert_close(made[:, place], meant[layer][1:])
        assert bool((caps == 1).all()) == (len(strengths) == 1)


def test_engines_that_were_not_tested_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(**given: Any) -> Any:
        parallel = SimpleNamespace(
            pipeline_parallel_size=given.pop("stages", 1),
            data_parallel_size=given.pop("replicas", 1),
            use_ubatching=given.pop("overlap", False),
            distributed_executor_backend=given.pop("backend", "mp"),
        )
        plain = {"kv_transfer_config": None, "speculative_config": None, "cache_config": SimpleNamespace()}
        plain |= {"additional_config": {}, "use_v2_model_runner": True}
        return SimpleNamespace(parallel_config=parallel, **{**plain, **given})

    assert untested(config()) is None
    assert untested(config(kv_transfer_config=SimpleNamespace(kv_connector="OffloadingConnector"))) is None
    assert (
        untested(config(kv_transfer_config=SimpleNamespace(kv_connector="NixlConnector")))
        == "the KV connector NixlConnector"
    )
    drafts = SimpleNamespace(method="draft_model")
    assert untested(config(speculative_config=drafts)) is None
    assert untested(config(speculative_config=SimpleNamespace(method="eagle"))) == "speculative decoding by eagle"
    synthetic = SimpleNamespace(method="ngram", rejection_sample_method="synthetic")  # whatever the target says
    assert untested(config(speculative_config=synthetic)) == "drafts accepted by the synthetic method"
    assert untested(config(speculative_config=SimpleNamespace(method=None))) == "speculative decoding by None"
    assert untested(config(speculative_config=drafts, stages=2)) == "speculative decoding in a pipeline"
    assert untested(config(backend="ray")) is None
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    assert untested(config(backend="ray")) == "vLLM's first Ray executor"
    assert untested(config(stages=2)) is None
    assert "first runner" in str(untested(config(stages=2, use_v2_model_runner=False)))
    collect = What((1,)).options()["additional_config"]
    assert untested(config(stages=2, additional_config=collect)) == "pipeline parallelism in a fit"
    assert untested(config(speculative_config=drafts, additional_config=collect)) == "speculative decoding in a fit"
    assert untested(config(replicas=2)) == "data parallelism"
    assert untested(config(overlap=True)) == "dual batch overlap"


def test_a_fingerprint_holds_the_prompts_length_where_kinds_of_token_differ() -> None:
    def spec(**how: Any) -> str:
        return json.dumps({"bank": "b", "categories": {"x": how}})

    assert fingerprint(spec(tokens="all"), [1]) == fingerprint(spec(tokens="all"), [1, 2])
    for how in ({"tokens": "generated"}, {}):
        assert fingerprint(spec(**how), [1]) != fingerprint(spec(**how), [1, 2])
