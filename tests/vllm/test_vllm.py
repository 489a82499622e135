"""Steering inside the real vLLM (`vllm-cpu`) equals the transformers reference, whatever the scheduler does. `make test-vllm`."""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

vllm = pytest.importorskip("vllm")

from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

from safesteer.engines import GenerationSettings, Request, generate, read  # noqa: E402
from safesteer.engines import vllm as ours  # noqa: E402
from safesteer.engines.vllm_seams import CONNECTORS  # noqa: E402
from safesteer.errors import SafeSteerError, SteeringError  # noqa: E402
from safesteer.models import LoadedModel, encode, load_model  # noqa: E402
from safesteer.models.chat import turn_markers, turn_start  # noqa: E402
from safesteer.policy import Policy  # noqa: E402
from safesteer.vectors import VectorBank  # noqa: E402
from tests.test_explain_attribution import gated  # noqa: E402
from tests.tiny import make  # noqa: E402

GPUS = torch.cuda.device_count()  # asks the driver alone: a process that used CUDA cannot fork an engine
SECOND_RUNNER = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
TOKENS = 10
TEXTS = [f"How do I smash the vase number {number}?{'x' * (7 * number % 40)}" for number in range(16)]
POLICIES = [
    None,  # the bank's own, gated
    Policy.off(),
    Policy.of({"breaking": 1.0}, gate="always"),
    Policy.of({"lying": 1.5, "breaking": 0.5}, gate="always"),
    Policy.of({"breaking": 2.0}, gate="always", tokens="generated"),
    Policy.of({"breaking": 2.0}, gate="always", tokens="continuation"),
    Policy.of({"lying": 1.0}, gate="always", tokens="prompt"),
]
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "no prefix cache": {"enforce_eager": True, "enable_prefix_caching": False},
    "small chunks": {"enforce_eager": True, "max_num_batched_tokens": 32},
    "preempted": {"enforce_eager": True, "num_gpu_blocks_override": 12, "max_num_seqs": 6},
    "compiled": {},
    "two tensor-parallel workers": {"enforce_eager": True, "tensor_parallel_size": 2},
    "two pipeline stages": {"enforce_eager": True, "pipeline_parallel_size": 2},
    "compiled, two pipeline stages": {"pipeline_parallel_size": 2},
    "speculation by n-grams": {
        "enforce_eager": True,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1},
    },
    # The model itself, unsteered, drafts.
    "speculation by a model": {
        "enforce_eager": True,
        "speculative_config": {"method": "draft_model", "num_speculative_tokens": 3},
    },
}


@dataclass(frozen=True)
class World:
    """A model with its bank in files, and what the reference says."""

    loaded: LoadedModel
    bank: VectorBank
    model: Path
    path: Path
    requests: list[Request]
    expected: list[Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """vLLM's attention on CPUs knows heads of 64."""
    folder = tmp_path_factory.mktemp("vllm")
    loaded = make("llama", hidden_size=128, num_attention_heads=2, num_key_value_heads=2, head_dim=64)
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    recommend(folder / "model", num_beams=2, no_repeat_ngram_size=2, suppress_tokens=[1, 2, 3])
    bank = gated(loaded)
    risks = sorted(one.risk for one in read(loaded, bank, [Request(text) for text in TEXTS]))
    assert bank.gate is not None
    bank = replace(bank, gate=replace(bank.gate, low=risks[7], high=risks[12]))
    bank.save(folder / "bank.safetensors")
    # Every text under several policies: what one leaves in the cache must not reach another.
    requests = [
        Request(text, POLICIES[(number + turn) % len(POLICIES)])
        for turn in (0, 1, 3)
        for number, text in enumerate(TEXTS)
    ]
    expected = [generate(loaded, bank, [one], GenerationSettings(TOKENS))[0] for one in requests]
    assert len({one.text for one in expected}) > len(TEXTS)
    opened = [
        bool(one.steering["acting"]) for one, asked in zip(expected, requests, strict=True) if asked.policy is None
    ]
    assert True in opened and False in opened
    return World(loaded, bank, folder / "model", folder / "bank.safetensors", requests, expected)


def recommend(model: Path, **more: Any) -> None:
    """The generation_config.json of a checkpoint, as of one that is sampled by default."""
    tokens = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    sampled = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.5}
    (model / "generation_config.json").write_text(json.dumps({**tokens, **sampled, **more}))


def start(world: World, **options: Any) -> Any:
    if options.get("speculative_config", {}).get("method") == "draft_model":
        options["speculative_config"] = {**options["speculative_config"], "model": str(world.model)}
    defaults = {"max_model_len": 256, "block_size": 32, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    return vllm.LLM(
        str(world.model),
        dtype="float32",
        disable_log_stats=False,
        **{**defaults, **ours.options(world.path), **options},
    )


def stop(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


@pytest.fixture(scope="module")
def eager(world: World) -> Iterator[Any]:
    llm = start(world, enforce_eager=True)
    yield llm
    stop(llm)


@pytest.mark.parametrize("mode", MODES)
def test_every_answer_is_the_references(world: World, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 requests, more than slots, twice: the second time from a warm cache."""
    if not MODES[mode].get("enforce_eager"):
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    workers = math.prod(MODES[mode].get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size"))
    if GPUS and workers > GPUS:
        pytest.skip("needs more GPUs")
    if workers > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    if "pipeline_parallel_size" in MODES[mode]:  # a stage that only reads, and one that reads and steers
        monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,2")
    if "pipeline_parallel_size" in MODES[mode] and not SECOND_RUNNER:
        with pytest.raises(SafeSteerError, match="pipeline parallelism under vLLM's first runner"):
            start(world, **MODES[mode])
        return
    llm = start(world, **MODES[mode])
    try:
        states = ours.armed(llm)
        assert len(states) == workers
        assert {one["runner"] for one in states} == {2 if SECOND_RUNNER else 1}
        for _ in range(2):
            found = ours.generate(llm, world.bank, world.requests, GenerationSettings(TOKENS))
            for one, wanted in zip(found, world.expected, strict=True):
                assert one.text == wanted.text
                assert [a["category"] for a in one.steering["acting"]] == [
                    a["category"] for a in wanted.steering["acting"]
                ]
                if "reading" in wanted.steering:
                    assert one.steering["reading"]["risk"] == pytest.approx(
                        wanted.steering["reading"]["risk"], abs=1e-3
                    )
        assert ours.armed(llm)[0]["steered"] > 0
        if "speculative_config" in MODES[mode]:
            accepted = [one for one in llm.get_metrics() if one.name == "vllm:spec_decode_num_accepted_tokens"]
            assert sum(one.value for one in accepted) > 0
    finally:
        stop(llm)


@pytest.mark.skipif(SECOND_RUNNER or GPUS == 1, reason="two workers; the second runner has a sitecustomize of its own")
def test_eager_engines_do_alike_what_a_checkpoint_recommends(world: World, eager: Any) -> None:
    """Unasked nothing of it: what is expected was said without that file. Asked, the same of it."""
    requests = world.requests[:8]
    loaded = load_model(str(world.model))
    plain = [one.text for one in generate(loaded, world.bank, requests, GenerationSettings(TOKENS))]
    assert plain == [one.text for one in world.expected[:8]]
    asked = GenerationSettings(TOKENS, temperature=0.0, recommended=True)
    with pytest.raises(SafeSteerError, match="num_beams 2"):
        ours.generate(eager, world.bank, requests, asked)
    before = (world.model / "generation_config.json").read_text()
    recommend(world.model)
    try:
        found = [one.text for one in ours.generate(eager, world.bank, requests, asked)]
        loaded = load_model(str(world.model))
        assert found == [one.text for one in generate(loaded, world.bank, requests, asked)] != plain
        if not SECOND_RUNNER:  # whose sampling kernel Triton's interpreter cannot run
            warm = GenerationSettings(TOKENS, recommended=True)
            [sampled], [again], [cold] = (
                ours.generate(eager, world.bank, requests[2:3], one) for one in (warm, warm, asked)
            )
            assert sampled.text == again.text != cold.text
    finally:
        (world.model / "generation_config.json").write_text(before)


@pytest.mark.skipif(SECOND_RUNNER, reason="Triton's interpreter cannot run its sampling kernel")
def test_eager_engines_draw_by_a_seed_alike_however_a_prompt_is_cut(world: World, eager: Any) -> None:
    """Prompts of several passes, then of one (the cache has the rest); alone, and beside others that are cut elsewhere."""
    tokenizer = world.loaded.tokenizer
    prompts = [list(encode(tokenizer, f"{text} {'and so on ' * 12}").ids) for text in TEXTS[:4]]
    assert all(130 < len(one) < 240 for one in prompts)
    steered = ours.request_args(Policy.of({"breaking": 1.0}, gate="always"), world.bank)

    def ask(numbers: list[int]) -> list[list[int]]:
        given = [
            vllm.SamplingParams(
                max_tokens=TOKENS, ignore_eos=True, seed=number, extra_args=steered if number % 2 else None
            )
            for number in numbers
        ]
        outputs = eager.generate([{"prompt_token_ids": prompts[one]} for one in numbers], given, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in outputs]

    eager.reset_prefix_cache()
    together = ask([0, 1, 2, 3])
    assert len({tuple(one) for one in together}) == 4
    assert ask([3, 2, 1, 0])[::-1] == together
    eager.reset_prefix_cache()
    assert [ask([number])[0] for number in range(4)] == together


def test_workers_on_ray_answer_as_the_reference(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    tests = Path(__file__).parent
    if not GPUS:
        monkeypatch.setenv("PYTHONPATH", f"{tests / 'ray_without_gpus'}{os.pathsep}{tests.parent.parent}")
    ray.init(num_cpus=2, num_gpus=GPUS or 2, include_dashboard=False, log_to_driver=False)
    try:
        monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        llm = start(world, enforce_eager=True, tensor_parallel_size=2, distributed_executor_backend="ray")
        try:
            assert len(ours.armed(llm)) == 2
            for _ in range(2):
                found = ours.generate(llm, world.bank, world.requests, GenerationSettings(TOKENS))
                assert [one.text for one in found] == [one.text for one in world.expected]
        finally:
            stop(llm)
    finally:
        ray.shutdown()


def test_steered_blocks_are_not_shared_and_would_be_without_the_key(world: World, eager: Any) -> None:
    """The poisoning: steered, then unsteered, one prompt. Without the fingerprint in the salt the answer is the wrong one."""
    text = "How do I break this very long and quite particular window pane of the old house near the sea?"
    ids = list(encode(world.loaded.tokenizer, text).ids)
    assert len(ids) > 64
    args = ours.request_args(Policy.of({"breaking": 2.0}, gate="always"), world.bank)
    clean = generate(world.loaded, world.bank, [Request(text, Policy.off())], GenerationSettings(TOKENS))[0].text

    def ask(extra: Any) -> str:
        given = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, extra_args=extra)
        output = eager.generate([{"prompt_token_ids": ids}], given, use_tqdm=False)[0].outputs[0]
        return str(world.loaded.tokenizer.decode(output.token_ids, skip_special_tokens=True)).strip()

    steered = ask(args)
    assert steered != clean
    assert ask(None) == clean
    assert ask(args) == steered


@pytest.mark.parametrize("connector", CONNECTORS)
def test_blocks_that_come_back_from_a_connector_are_of_the_same_policy(world: World, connector: str) -> None:
    """All requests three times, vLLM's own cache emptied in between: blocks come from the connector, under the same keys."""
    transfer = {
        "kv_connector": connector,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 28},
    }
    device = {} if GPUS else {"worker_extension_cls": "tests.vllm.no_device.Extension"}
    llm = start(world, enforce_eager=True, kv_transfer_config=transfer, **device)

    def ask(ids: list[int], extra: Any = None) -> Any:
        given = vllm.SamplingParams(max_tokens=1, temperature=0, extra_args=extra)
        return llm.generate([{"prompt_token_ids": ids}], given, use_tqdm=False)[0]

    def emptied() -> bool:
        """Blocks on their way to the connector are held until a later pass says that they have arrived."""
        return any(llm.reset_prefix_cache() or ask([5, 6, 7]) is None for _ in range(10))

    try:
        steered = ours.request_args(Policy.of({"breaking": 1.0}, gate="always"), world.bank)  # as some of the requests
        prompt = list(encode(world.loaded.tokenizer, TEXTS[3]).ids)
        for _ in range(3):
            found = ours.generate(llm, world.bank, world.requests, GenerationSettings(TOKENS))
            assert [one.text for one in found] == [one.text for one in world.expected]
            for extra in (None, steered):
                assert emptied()
                assert ask(prompt, extra).num_cached_tokens > 0
            assert emptied()
    finally:
        stop(llm)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"safesteer": "{"}, "not JSON"),
        ({"safesteer": {"breaking": 1.0}}, "JSON string"),
        ({"safesteer": '{"categories": {}}'}, "`bank` and `categories`"),
        ({"safesteer": '{"bank": "0", "categories": {"breaking": 1.0}}'}, "another bank"),
        ({"safesteer": '{"bank": "DIGEST", "categories": {"gravity": 1.0}}'}, "gravity"),
        (
            {"safesteer": '{"bank": "DIGEST", "categories": {"breaking": {"strength": -1, "gate": "always"}}}'},
            "negative",
        ),
        ({"safesteer": '{"bank": "DIGEST", "categories": {"breaking": {"strength": 9, "gate": "always"}}}'}, "ceiling"),
        ({"safesteer": '{"bank": "DIGEST", "categories": {"breaking": 1.0}}'}, "always on"),
        (
            {"safesteer": '{"bank": "DIGEST", "categories": {"breaking": {"gate": "always", "layers": "1"}}}'},
            "cannot name `layers`",
        ),
        ({"safesteer": '{"bank": "DIGEST", "vectors": [1], "categories": {}}'}, "nothing else"),
        ({"safesteer_read": "[1, 2]"}, "a mark and a position"),
        ({"safesteer_read": '["a", -1]'}, "a mark and a position"),
        ({"safesteer_read": '["a", 3]'}, "ends before"),
    ],
)
def test_what_cannot_be_steered_as_asked_is_refused(
    world: World, eager: Any, extra: dict[str, Any], sentence: str
) -> None:
    digest = world.bank.digest()
    given = {name: one.replace("DIGEST", digest) if isinstance(one, str) else one for name, one in extra.items()}
    with pytest.raises(VLLMValidationError, match=sentence):
        eager.generate(
            [{"prompt_token_ids": [1, 2, 3]}], vllm.SamplingParams(max_tokens=1, extra_args=given), use_tqdm=False
        )


@pytest.mark.parametrize("name", ["safesteer", "safesteer_read"])
def test_a_prompt_that_comes_in_pieces_is_refused(world: World, eager: Any, name: str) -> None:
    steered = ours.request_args(Policy.of({"breaking": 1.0}, gate="always"), world.bank)
    extra = steered if name == "safesteer" else {name: '["a", 0]'}
    given = vllm.SamplingParams(max_tokens=1, extra_args=extra)
    with pytest.raises(VLLMValidationError, match="send it whole"):
        eager.llm_engine.input_processor.process_inputs("a", {"prompt_token_ids": [1, 2]}, given, resumable=True)


def test_an_engine_that_does_not_steer_is_not_taken_for_one(world: World, tmp_path: Path) -> None:
    with pytest.raises(SafeSteerError, match="no such bank"):
        ours.options(tmp_path / "absent.safetensors")
    with pytest.raises(SteeringError, match="reads the prompt first"):
        ours.request_args(Policy.default(world.bank), world.bank)
    with pytest.raises(SteeringError, match="cannot name `layers`"):
        ours.request_args(
            Policy.parse({"categories": {"breaking": {"layers": "1", "gate": "always"}}}, "p"), world.bank
        )
    assert ours.request_args(Policy.off(), world.bank) == {}
    llm = start(world, enforce_eager=True, additional_config={})
    try:
        with pytest.raises(SteeringError, match="not every worker steers"):
            ours.armed(llm)
        args = ours.request_args(Policy.of({"breaking": 1.0}, gate="always"), world.bank)
        with pytest.raises(VLLMValidationError, match="without a bank"):
            llm.generate(
                [{"prompt_token_ids": [1, 2]}], vllm.SamplingParams(max_tokens=1, extra_args=args), use_tqdm=False
            )
    finally:
        stop(llm)
    wrong = {"safesteer": {**ours.options(world.path)["additional_config"]["safesteer"], "digest": "0"}}
    with pytest.raises(SteeringError, match="another bank or version"):
        start(world, enforce_eager=True, additional_config=wrong)


def test_an_answer_that_is_prompt_in_the_next_turn_is_steered_as_prompt(world: World, eager: Any) -> None:
    """Its blocks were computed as generated tokens; the next turn must not find them in the cache."""
    args = ours.request_args(Policy.of({"breaking": 2.0}, gate="always", tokens="generated"), world.bank)

    def ask(ids: list[int], tokens: int) -> Any:
        given = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1, extra_args=args)
        return eager.generate([{"prompt_token_ids": ids}], given, use_tqdm=False)[0].outputs[0]

    first = list(encode(world.loaded.tokenizer, "How do I break a plate of the old sort?").ids)
    turn = first + list(ask(first, 80).token_ids) + first[-5:]
    cached = ask(turn, TOKENS)
    eager.reset_prefix_cache()
    fresh = ask(turn, TOKENS)
    assert list(cached.token_ids) == list(fresh.token_ids)
    assert cached.cumulative_logprob == pytest.approx(fresh.cumulative_logprob, abs=1e-3)


def test_a_reading_shares_what_stands_before_the_users_words(world: World, eager: Any) -> None:
    """A long system prompt is computed once; the reading is the reference's, also after it came from the cache."""
    system = "You are a patient and careful assistant for the owners of old houses. " * 2
    for turn, text in enumerate(TEXTS[:4]):
        prompt = list(encode(world.loaded.tokenizer, text, system).ids)
        first = turn_start(prompt, turn_markers(world.loaded.tokenizer))
        assert 64 < first < len(prompt) < 250
        asked = ours.reading_params(f"shared {turn}", first)
        [output] = eager.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
        assert output.num_cached_tokens == (first // 32 * 32 if turn else 0)
        of_workers = eager.collective_rpc("safesteer_readings", args=([f"shared {turn}"],))
        found = ours.reading_of(world.bank, [shares[0] for shares in of_workers])
        [wanted] = read(world.loaded, world.bank, [Request(text, system=system)])
        assert found.risk == pytest.approx(wanted.risk, abs=1e-3)
        assert found.tokens == pytest.approx(wanted.tokens, abs=1e-2)


def test_an_engine_that_answers_with_drafts_does_not_start(world: World) -> None:
    """Accepted at a fixed rate, whatever the steered model says of them."""
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    drafts |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [1.0, 1.0]}
    with pytest.raises(SteeringError, match="drafts accepted by the synthetic method"):
        start(world, enforce_eager=True, speculative_config=drafts)


def test_requests_with_an_adapter_are_steered_and_leave_later_ones_alone(world: World, tmp_path: Path) -> None:
    """With the adapter and without, steered and not in a batch; each as the reference, whose weights hold the adapter or not."""
    generator = torch.Generator().manual_seed(5)
    weights: dict[str, torch.Tensor] = {}
    merged = load_model(str(world.model))
    for number, block in enumerate(merged.model.model.layers):
        down, up = torch.randn(8, 128, generator=generator) / 8, torch.randn(128, 8, generator=generator) / 2
        name = f"base_model.model.model.layers.{number}.self_attn.q_proj"
        weights |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        block.self_attn.q_proj.weight.data += 2 * up @ down  # alpha / rank
    save_file(weights, tmp_path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    policies = [Policy.off(), Policy.of({"breaking": 1.5}, gate="always")]
    requests = [Request(text, policy) for text in TEXTS[:6] for policy in policies]
    expected = {
        adapted: [
            one.text for one in generate(loaded, world.bank, requests, GenerationSettings(TOKENS), force=["weights"])
        ]
        for adapted, loaded in ((False, world.loaded), (True, merged))
    }
    assert len({*expected[True], *expected[False]}) > len(requests)
    llm = start(world, enforce_eager=True, enable_lora=True, max_lora_rank=8)
    try:
        adapter = LoRARequest("random", 1, str(tmp_path))
        prompts = [{"prompt_token_ids": list(encode(world.loaded.tokenizer, one.prompt).ids)} for one in requests]
        extra = [ours.request_args(one.policy or Policy.off(), world.bank) or None for one in requests]
        given = [vllm.SamplingParams(temperature=0, max_tokens=TOKENS, extra_args=one) for one in extra]
        # One adapter a batch: vllm-cpu 0.32 gives requests without one the adapter of their batch, with or without this plugin.
        for adapted in (True, False, True):
            outputs = llm.generate(prompts, given, use_tqdm=False, lora_request=adapter if adapted else None)
            said_here = [
                str(world.loaded.tokenizer.decode(one.outputs[0].token_ids, skip_special_tokens=True)).strip()
                for one in outputs
            ]
            assert said_here == expected[adapted]
    finally:
        stop(llm)
