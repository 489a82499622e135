"""Responses of every condition to every suite, resumable.

Rows of a suite are sorted by length and cut into chunks; a chunk is generated as a whole and kept in the ledger as a whole,
so that a resumed run forms the same batches, and gives the same texts, as one that was never killed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

from safesteer.engines import GenerationSettings, Request, generate, read
from safesteer.evaluation.conditions import Condition
from safesteer.evaluation.ledger import Ledger, key_of
from safesteer.evaluation.suites import Suite, SuiteRow
from safesteer.models import LoadedModel, encode, encode_all
from safesteer.models.thoughts import Said
from safesteer.policy import plan
from safesteer.vectors import Reading

CHUNK = 64


def chunks(loaded: LoadedModel, suite: Suite, size: int = CHUNK) -> list[list[SuiteRow]]:
    """The rows of a suite, shortest prompts first, in chunks."""
    rows = sorted(suite, key=lambda row: (len(encode(loaded.tokenizer, row.prompt)), row.identifier))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def condition_key(condition: Condition, model: str) -> list[Any]:
    """What the responses of a condition depend on, as plain data."""
    used = condition.bank.digest() if condition.policy.categories else None
    return [model, used, condition.policy.model_dump(mode="json", exclude={"name"}), condition.system]


def respond(
    loaded: LoadedModel,
    suites: Sequence[Suite],
    conditions: Sequence[Condition],
    settings: GenerationSettings,
    ledger: Ledger,
    *,
    model_digest: str,
    force: Collection[str] = (),
    progress: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """One plain row a (condition, suite, prompt): `policy, suite, id, category, label, wrapper, resembles, cluster, prompt,
    response, thought, answered, reference, steering, tokens, seconds`, in the order of conditions, suites and rows. Where a
    thought came to no answer, `response` is empty and `answered` false.

    Chunks that the ledger holds are not generated again. `progress` counts rows, those of the ledger included. Raises
    `SafeSteerError` for a prompt that is too long, before the first answer.
    """
    how = asdict(settings)
    rows: list[dict[str, Any]] = []
    bases = [condition_key(condition, model_digest) for condition in conditions]
    for suite in suites:
        for system in dict.fromkeys(condition.system for condition in conditions):
            encode_all(loaded, [row.prompt for row in suite], system, room=settings.max_new_tokens)
    for suite in suites:
        parts = chunks(loaded, suite)
        for condition, basis in zip(conditions, bases, strict=True):
            found: dict[str, dict[str, Any]] = {}
            for part in parts:
                key = key_of("respond", basis, how, [[row.identifier, row.prompt] for row in part])
                if key not in ledger:
                    requests = [Request(row.prompt, condition.policy, condition.system) for row in part]
                    responses = generate(loaded, condition.bank, requests, settings, force=force)
                    ledger.put(
                        key,
                        [
                            {
                                "response": one.text,
                                "thought": one.thought,
                                "steering": one.steering,
                                "tokens": one.tokens,
                                "seconds": one.seconds,
                            }
                            for one in responses
                        ],
                    )
                for row, answer in zip(part, ledger.get(key), strict=True):
                    found[row.identifier] = answer
                progress(len(part))
            rows += [_row(condition, suite, row, found[row.identifier]) for row in suite]
    order = {condition.name: index for index, condition in enumerate(conditions)}
    return sorted(rows, key=lambda row: order[row["policy"]])


def respond_where_acting(
    loaded: LoadedModel,
    suite: Suite,
    conditions: Sequence[Condition],
    settings: GenerationSettings,
    ledger: Ledger,
    unsteered: Sequence[dict[str, Any]],
    *,
    model_digest: str,
    force: Collection[str] = (),
    progress: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Like `respond` to one suite, but prompts for which nothing acts keep the answer they have among the rows `unsteered`.

    A row on which nothing acts equals the unsteered model, so that many conditions of which each acts on few prompts cost
    little. Each prompt is read once for all conditions.
    """
    plain = {row["id"]: row for row in unsteered}
    gated = next((one.bank for one in conditions if one.policy.gated), None)
    requests = [Request(row.prompt, None, None) for row in suite]
    readings: Sequence[Reading | None] = [None] * len(suite)
    if gated is not None:
        readings = read(loaded, gated, requests, force=force)
    rows: list[dict[str, Any]] = []
    for condition in conditions:
        plans = [plan(condition.policy, condition.bank, reading) for reading in readings]
        acting = replace(suite, rows=tuple(row for row, one in zip(suite, plans, strict=True) if one.acting))
        done = respond(
            loaded, [acting], [condition], settings, ledger, model_digest=model_digest, force=force, progress=progress
        )
        answered = {row["id"]: row for row in done}
        for row, one in zip(suite, plans, strict=True):
            kept = {
                "response": plain[row.identifier]["response"],
                "thought": plain[row.identifier]["thought"],
                "tokens": 0,
                "seconds": 0.0,
                "steering": one.to_json(),
            }
            rows.append(answered.get(row.identifier) or _row(condition, suite, row, kept))
        progress(len(suite) - len(acting))
    return rows


def _row(condition: Condition, suite: Suite, row: SuiteRow, answer: dict[str, Any]) -> dict[str, Any]:
    steering = {**answer["steering"], "policy": condition.name}
    return {
        "policy": condition.name,
        "suite": suite.name,
        "id": row.identifier,
        "category": row.category,
        "label": row.label,
        "wrapper": row.wrapper,
        "resembles": row.resembles,
        "cluster": row.cluster,
        "prompt": row.prompt,
        "response": answer["response"],
        "thought": answer["thought"],
        "answered": Said(answer["response"], answer["thought"]).answered,
        "reference": row.reference,
        "steering": steering,
        "tokens": answer["tokens"],
        "seconds": round(answer["seconds"], 4),
    }
