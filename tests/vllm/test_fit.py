"""A fit that reads inside vLLM equals the transformers reference, in however many chunks, and with one engine or several."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

vllm = pytest.importorskip("vllm")

from vllm.exceptions import VLLMValidationError  # noqa: E402

from safesteer.engines.vllm_collect import COLLECT, Job  # noqa: E402
from safesteer.engines.vllm_fit import InVllm, OnRay, Replica, _One, replicas, what_to_read  # noqa: E402
from safesteer.errors import SafeSteerError, SteeringError  # noqa: E402
from safesteer.models.files import ModelFiles, model_files  # noqa: E402
from safesteer.vectors import FitSettings, VectorBank, fit  # noqa: E402
from tests.tiny import Run, make, prompts  # noqa: E402

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "block_size": 32,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "enforce_eager": True,
    "gpu_memory_utilization": 0.1,
}
SETTINGS = FitSettings(layers=(0, 2), dose=0.5)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFiles, VectorBank]:
    """A tiny model's files, and what transformers fits on it."""
    folder = tmp_path_factory.mktemp("fit")
    loaded = make("llama", hidden_size=128, num_attention_heads=2, num_key_value_heads=2, head_dim=64)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safesteer.vectors.fitting.LENT", 2)  # as `few_pairs_are_lent` in every test
        return model_files(str(folder)), fit(loaded, None, prompts(), SETTINGS)


@pytest.fixture(scope="module")
def replica(fitted: tuple[ModelFiles, VectorBank]) -> Iterator[Replica]:
    files, _ = fitted
    one = Replica(str(files.folder), what_to_read(SETTINGS.complete(files.depth)), OPTIONS)
    yield one
    one.close()


def same(found: VectorBank, wanted: VectorBank) -> None:
    torch.testing.assert_close(found.directions, wanted.directions, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.doses, wanted.doses)
    torch.testing.assert_close(found.residual_norms, wanted.residual_norms, rtol=1e-4, atol=1e-5)
    assert found.gate is not None and wanted.gate is not None
    assert (found.gate.layers, found.gate.categories) == (wanted.gate.layers, wanted.gate.categories)
    for name in ("centres", "weights", "biases", "token_weights", "token_bias", "calm", "floors"):
        mine, theirs = getattr(found.gate, name), getattr(wanted.gate, name)
        # transformers keeps unit states in half precision
        assert float((mine - theirs).norm() / theirs.norm()) < 3e-3, name
    assert found.gate.low == pytest.approx(wanted.gate.low, abs=0.02)
    assert found.model.differences(wanted.model) == {}
    assert found.provenance["prompts"] == wanted.provenance["prompts"]


def fit_in(engines: Any, files: ModelFiles, counted: list[tuple[int, int]] | None = None) -> VectorBank:
    return fit(
        files, None, prompts(), SETTINGS,
        reader=lambda chosen, count: InVllm(engines, files, chosen, count),
        progress=lambda done, total: None if counted is None else counted.append((done, total)),
    )  # fmt: skip


def test_a_fit_equals_the_references(replica: Replica, fitted: tuple[ModelFiles, VectorBank]) -> None:
    """With pairs, a gate, answers, and what the built-in pairs lend; every prompt in chunks."""
    files, wanted = fitted
    assert wanted.provenance["position"] == "last+answer"
    counted: list[tuple[int, int]] = []
    same(fit_in(_One(replica), files, counted), wanted)
    assert counted[-1][0] == counted[-1][1]


class Failing:
    """A replica that reads a shard twice at every second call, as one does whose first answer was lost."""

    def __init__(self, replica: Replica) -> None:
        self._replica, self._calls = replica, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replica, name)

    def read(self, prompts: Any, jobs: Any) -> Mapping[str, Any]:
        self._calls += 1
        if self._calls % 2:
            self._replica.read(prompts, jobs)
        return self._replica.read(prompts, jobs)


def test_a_shard_that_is_read_again_counts_once(replica: Replica, fitted: tuple[ModelFiles, VectorBank]) -> None:
    files, wanted = fitted
    same(fit_in(_One(Failing(replica)), files), wanted)


def test_what_is_not_meant_for_a_fit_is_refused(replica: Replica, fitted: tuple[ModelFiles, VectorBank]) -> None:
    llm = replica._llm
    steer = vllm.SamplingParams(max_tokens=1, extra_args={"safesteer": '{"bank": "0", "categories": {}}'})
    with pytest.raises(VLLMValidationError, match="without a bank"):
        llm.generate([{"prompt_token_ids": [1, 2]}], steer, use_tqdm=False)
    job = Job("a", 1, "sum", span=(0, 2)).args()[COLLECT]
    for wrong in (
        '{"shard": 1}',
        "[" * 1000,
        5,
        job.replace('"a"', "[]"),
        job.replace("sum", "all"),
        job.replace("2", "Infinity"),
    ):
        odd = vllm.SamplingParams(max_tokens=1, extra_args={COLLECT: wrong})
        with pytest.raises(VLLMValidationError, match="not one that SafeSteer made"):
            llm.generate([{"prompt_token_ids": [1, 2]}], odd, use_tqdm=False)
    assert Job.parse(Job("a", 1, "sum", span=(0, 2)).args()[COLLECT]) == Job("a", 1, "sum", span=(0, 2))
    with pytest.raises(SafeSteerError, match="give --max-model-len 601"):
        replica.read([[1] * 600], [Job("", 0, "sum", span=(0, 1))])
    with pytest.raises(SafeSteerError, match="use mean-difference"):
        what_to_read(FitSettings(method="pca").complete(3))


class LostError(Exception):
    """Stands for `ray.exceptions.RayActorError`."""


class TaskError(Exception):
    """Stands for `ray.exceptions.RayTaskError`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


class EngineDeadError(Exception):
    """Stands for vLLM's."""


class Ray:
    """Stands for Ray: futures that are tasks not yet run."""

    class exceptions:  # noqa: N801
        RayActorError, RayTaskError = LostError, TaskError

    killed: ClassVar[list[Any]] = []

    @staticmethod
    def wait(futures: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return futures[:num_returns], futures[num_returns:]

    @staticmethod
    def get(future: Any) -> Any:
        return future()

    @classmethod
    def kill(cls, actor: Any) -> None:
        cls.killed.append(actor)


class Actor:
    """Squares numbers, `lives` times, and then fails."""

    def __init__(self, lives: int, failure: Exception) -> None:
        self.lives, self.failure, self.square = lives, failure, self

    def remote(self, value: int) -> Any:
        def run() -> int:
            self.lives -= 1
            if self.lives < 0:
                raise self.failure
            return value * value

        return run


@pytest.mark.parametrize("failure", [LostError(), TaskError(EngineDeadError())])
def test_a_task_whose_replica_died_is_done_by_another_and_counts_once(failure: Exception) -> None:
    tasks = [(value,) for value in range(7)]
    engines = OnRay(Ray, [Actor(100, failure), Actor(2, failure)])
    assert sorted(engines.map("square", tasks)) == [(value, value * value) for value in range(7)]
    engines.everywhere("square", 1)
    engines = OnRay(Ray, [Actor(2, failure), Actor(1, failure)])
    with pytest.raises(SteeringError, match="every replica died"):
        list(engines.map("square", tasks))
    with pytest.raises(SteeringError, match="every replica died"):
        engines.everywhere("square", 1)
    with pytest.raises(SafeSteerError, match="too long"):
        list(OnRay(Ray, [Actor(1, TaskError(SafeSteerError("too long")))]).map("square", tasks))
    with pytest.raises(SteeringError, match="a replica failed"):
        list(OnRay(Ray, [Actor(1, TaskError(ValueError("odd")))]).map("square", tasks))


def test_two_replicas_on_ray(fitted: tuple[ModelFiles, VectorBank], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    files, wanted = fitted
    with replicas(str(files.folder), what_to_read(SETTINGS.complete(files.depth)), OPTIONS, count=2) as engines:
        same(fit_in(engines, files), wanted)


def test_the_command_makes_the_bank_that_transformers_makes(
    fitted: tuple[ModelFiles, VectorBank], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a dose calibrated by an engine that steers; and what it cannot do is refused before an engine starts."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    folder = fitted[0].folder
    file = tmp_path / "own.jsonl"
    file.write_text(
        "\n".join(json.dumps({"prompt": p.text, "category": p.category, "matched": p.matched}) for p in prompts())
    )
    common = (
        "fit",
        folder,
        "--prompts",
        file,
        "--layers",
        "0,2",
        "--no-check",
    )  # whose judge is not in this environment
    engine = ("--engine", "vllm", "--max-model-len", 512, "--block-size", 32, "--enforce-eager")
    status, _, error = run(*common, "--out", tmp_path / "here.safetensors", "--json")
    assert status == 0, error
    status, said, error = run(*common, *engine, "--out", tmp_path / "there.safetensors", "--json")
    assert status == 0, error
    here, there = (VectorBank.load(tmp_path / f"{name}.safetensors") for name in ("here", "there"))
    assert json.loads(said)["provenance"]["calibration"] == there.provenance["calibration"]
    same(there, here)
    assert there.provenance["calibration"]["effect"] == pytest.approx(
        here.provenance["calibration"]["effect"], rel=1e-3
    )
    for wrong, sentence in (
        (("--method", "pca"), "use mean-difference"),
        (("--neurons", 4), "leave out --neurons"),
        (("--refusal", "remove"), "leave out --refusal"),
        (("--no-such-option",), "does not take these options"),
        (("--model", "other"), "cannot be passed on"),
        (("--pipeline-parallel-size", 2), "pipeline parallelism"),
        (("--device", "cpu"), "for --engine transformers"),
    ):
        status, _, error = run(*common, *engine, *wrong, "--out", tmp_path / "none.safetensors")
        assert status != 0 and sentence in error, (wrong, error)
    assert not (tmp_path / "none.safetensors").exists()
