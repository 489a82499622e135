"""An evaluation: conditions x suites -> responses -> outcomes -> intervals.

Everything that takes time goes through a ledger in `OUT/work`, so a killed run goes on; when all is done `responses.jsonl`,
`results.json` and `report.html` are written, each in one step.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from safesteer.engines import GenerationSettings
from safesteer.errors import SafeSteerError, need
from safesteer.evaluation.conditions import Condition, only, scaled
from safesteer.evaluation.judging import exchange_of, judge_all
from safesteer.evaluation.ledger import Ledger, key_of
from safesteer.evaluation.measures import negative_log_likelihoods, overlaps
from safesteer.evaluation.overlap import overlap
from safesteer.evaluation.report import render
from safesteer.evaluation.responding import condition_key, respond, respond_where_acting
from safesteer.evaluation.results import JudgeRecord, PolicyRecord, Results, SuiteRecord
from safesteer.evaluation.suites import Suite, check_distinct
from safesteer.evaluation.summary import CONTROL, dose_response, records, selectivity
from safesteer.files import json_lines, write_text
from safesteer.judges.agreement import kappa
from safesteer.judges.base import TRIAL, Judge, count_leanings, in_sample
from safesteer.judges.detectors import repetition
from safesteer.judges.relevance import Relevance
from safesteer.models import LoadedModel, fingerprint
from safesteer.next_token import divergences
from safesteer.policy import Policy
from safesteer.prompts import PromptSet, builtin, builtin_categories, concatenate, harmless_pool, soundalikes
from safesteer.vectors import VectorBank
from safesteer.vectors.fitting import package_version

MEASURED = 64  # rows measured between two entries of the ledger
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvaluationSettings:
    """How to evaluate; `temperature`, `batch_size` and `recommended` are those of `GenerationSettings`.

    `doses`: also answer the harmful suites at these multiples of the first policy. `selectivity`: also with each of its
    categories alone, on the first harmful suite. `seed` draws samples and the random directions.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    seed: int = 0
    batch_size: int | None = None
    doses: tuple[float, ...] = ()
    selectivity: bool = False
    recommended: bool = False


def check_request(suites: Sequence[Suite], conditions: Sequence[Condition], settings: EvaluationSettings) -> None:
    """Raise `SafeSteerError` for packages that are absent, and for what cannot be evaluated; no model is needed for it."""
    need("evaluate", "sacrebleu", "rouge_score", "scipy")
    check_distinct(suites)
    if settings.selectivity and not any(condition.kind == "none" for condition in conditions):
        raise SafeSteerError(
            "selectivity is a change against the unsteered model; leave out --no-controls or add --policy none"
        )


def evaluate(
    loaded: LoadedModel,
    bank: VectorBank,
    suites: Sequence[Suite],
    conditions: Sequence[Condition],
    judges: Sequence[Judge],
    settings: EvaluationSettings,
    out: Path,
    *,
    force: Collection[str] = (),
    progress: Progress = lambda stage, done, total: None,
) -> Results:
    """Run an evaluation and write `responses.jsonl`, `results.json` and `report.html` into `out`.

    What is asked for is checked before anything is answered (`check_request`); `doses` above the bank's ceiling are refused.
    The first judge decides the outcomes; the others are compared with it. `progress(stage, done, total)` counts responses.
    """
    if not suites or not judges:
        raise SafeSteerError("an evaluation needs at least one suite and one judge")
    check_request(suites, conditions, settings)
    jobs: list[tuple[Sequence[Suite], Sequence[Condition]]] = [(suites, conditions)]
    main = next((one for one in conditions if one.kind in ("policy", "default")), None)
    harmful = [suite for suite in suites if any(row.category is not None for row in suite)]
    if main is not None and settings.doses:
        jobs.append((harmful, [scaled(main, factor) for factor in settings.doses if factor not in (0.0, 1.0)]))
    alone = [only(main, name) for name in main.policy.categories] if main is not None and settings.selectivity else []
    relevance = Relevance()
    relevance.score([TRIAL])  # the sentence encoder is there
    seconds: dict[str, float] = {}
    model_digest = model_digest_of(loaded)
    generation = GenerationSettings(
        settings.max_new_tokens, settings.temperature, settings.seed, settings.batch_size, settings.recommended
    )
    sampling = generation.sampling(loaded.model.generation_config)
    work = out / "work"

    def stage(name: str, total: int) -> Callable[[int], None]:
        began, done = time.perf_counter(), 0
        progress(name, 0, total)

        def more(count: int) -> None:
            nonlocal done
            done += count
            progress(name, done, total)
            seconds[name] = round(time.perf_counter() - began, 2)

        return more

    count = sum(sum(map(len, some)) * len(used) for some, used in [*jobs, (harmful[:1], alone)])
    tick = stage("Generating", count)
    ledger = Ledger(work / "responses.jsonl")
    rows: list[dict[str, Any]] = []
    for some, used in jobs:
        rows += respond(
            loaded, some, used, generation, ledger,
            model_digest=model_digest, force=force, progress=tick,
        )  # fmt: skip
    if alone and harmful:
        unsteered = [row for row in rows if row["policy"] == CONTROL and row["suite"] == harmful[0].name]
        rows += respond_where_acting(
            loaded, harmful[0], alone, generation, ledger, unsteered,
            model_digest=model_digest, force=force, progress=tick,
        )  # fmt: skip

    shown = {condition.name for condition in conditions}
    answered = [row for row in rows if row["answered"]]
    for row in rows:
        row |= {"judges": {}, "outcome": None, "scores": {}, "failure": None, "leaning": None}
        row |= {"relevance": None, "repetition": None, "nll": None}
    judge_records = _judge(answered, judges, shown, work, stage)
    _measure(loaded, answered, relevance, work, model_digest, stage)
    _compare(rows)
    _diverge(loaded, rows, conditions, work, model_digest, force, stage)

    known, unknown = known_prompts(bank)
    shown_rows = [row for row in rows if row["policy"] in shown]
    results = Results(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=loaded.name,
        bank={"digest": bank.digest(), "categories": list(bank.categories), "provenance": bank.provenance},
        settings=asdict(settings) | asdict(sampling),
        policies=[_policy_record(condition) for condition in conditions],
        suites=[_suite_record(suite, known, unknown) for suite in suites],
        judges=judge_records,
        records=records(shown_rows),
        selectivity=selectivity(rows, main.name) if main else [],
        dose_response=dose_response(rows, main.name, settings.doses) if main else [],
        versions=_versions(),
        hardware=_hardware(loaded),
        seconds=seconds,
    )
    page = render(results, shown_rows)
    write_text(out / "responses.jsonl", json_lines(rows))
    write_text(out / "results.json", results.model_dump_json(indent=2) + "\n")
    write_text(out / "report.html", page)
    return results


def _judge(
    rows: list[dict[str, Any]],
    judges: Sequence[Judge],
    shown: set[str],
    work: Path,
    stage: Callable[[str, int], Callable[[int], None]],
) -> list[JudgeRecord]:
    """Judge every row by every judge; the first decides `outcome` and `scores`. Agreement is over the conditions `shown`."""
    found: list[JudgeRecord] = []
    for number, judge in enumerate(judges):
        label = "Judging" if len(judges) == 1 else f"Judging ({judge.name})"
        tick = stage(label, len(rows))
        said = judge_all(judge, rows, Ledger(work / f"judge-{key_of(judge.name)}.jsonl"), tick)
        for row, one in zip(rows, said, strict=True):
            row["judges"][judge.name] = one.outcome
            if number == 0:
                row.update(outcome=one.outcome, scores={k: round(v, 4) for k, v in one.scores.items()})
                row |= {"failure": one.failure, "leaning": one.leaning}
        both = [
            (row["outcome"], one.outcome)
            for row, one in zip(rows, said, strict=True)
            if row["policy"] in shown and row["outcome"] and one.outcome
        ]
        compared = bool(both) and number > 0
        found.append(
            JudgeRecord(
                name=judge.name,
                decides=number == 0,
                failures=sum(one.failure is not None for one in said),
                leanings=count_leanings(one.leaning for one in said if one.failure is not None),
                agreement=sum(a == b for a, b in both) / len(both) if compared else None,
                kappa=kappa([a for a, _ in both], [b for _, b in both]) if compared else None,
                in_sample=in_sample(judge, (row["prompt"] for row in rows)),
                measured=getattr(judge, "card", {}),
            )
        )
    return found


def _measure(
    loaded: LoadedModel,
    rows: list[dict[str, Any]],
    relevance: Relevance,
    work: Path,
    model_digest: str,
    stage: Callable[[str, int], Callable[[int], None]],
) -> None:
    """Relevance, repetition and negative log-likelihood of every row; equal exchanges are measured once.

    An answer after a thought has no likelihood here: it was not said after the prompt alone.
    """
    for row, value in zip(rows, relevance.score([exchange_of(row) for row in rows]), strict=True):
        row["relevance"] = round(value, 4)
        row["repetition"] = round(repetition(row["response"]), 4)
    rows = [row for row in rows if row["thought"] is None]
    ledger = Ledger(work / "nll.jsonl")
    keys = [key_of("nll", model_digest, row["prompt"], row["response"]) for row in rows]
    waiting = {key: row for key, row in zip(keys, rows, strict=True) if key not in ledger}
    tick = stage("Measuring", len(waiting))
    order = sorted(waiting, key=lambda key: len(waiting[key]["prompt"]) + len(waiting[key]["response"]))
    for start in range(0, len(order), MEASURED):
        part = order[start : start + MEASURED]
        values = negative_log_likelihoods(
            loaded, [waiting[key]["prompt"] for key in part], [waiting[key]["response"] for key in part]
        )
        for key, found in zip(part, values, strict=True):
            ledger.put(key, None if found is None else round(found, 5))
        tick(len(part))
    for key, row in zip(keys, rows, strict=True):
        row["nll"] = ledger.get(key)


def _compare(rows: list[dict[str, Any]]) -> None:
    """`identical` to unsteered, and BLEU and ROUGE-L: against the reference, else on harmless prompts against unsteered."""
    plain = {(row["suite"], row["id"]): row["response"] for row in rows if row["policy"] == CONTROL and row["answered"]}
    pairs = []
    for row in rows:
        own = plain.get((row["suite"], row["id"])) if row["answered"] else None
        row["identical"] = None if own is None or row["policy"] == CONTROL else row["response"] == own
        against = row["reference"] or (own if row["category"] is None and row["policy"] != CONTROL else None)
        row["bleu"] = row["rouge_l"] = None
        if against is not None and row["answered"]:
            pairs.append((row, against))
    scores = overlaps([row["response"] for row, _ in pairs], [against for _, against in pairs])
    for (row, _), (bleu, rouge) in zip(pairs, scores, strict=True):
        row["bleu"], row["rouge_l"] = round(bleu, 3), round(rouge, 4)


def _diverge(
    loaded: LoadedModel,
    rows: list[dict[str, Any]],
    conditions: Sequence[Condition],
    work: Path,
    model_digest: str,
    force: Collection[str],
    stage: Callable[[str, int], Callable[[int], None]],
) -> None:
    """Next-token KL of every steered condition on harmless prompts."""
    ledger = Ledger(work / "divergence.jsonl")
    jobs = []
    for condition in conditions:
        if condition.kind in ("none", "system-prompt"):
            continue
        basis = condition_key(condition, model_digest)
        own = [row for row in rows if row["policy"] == condition.name and row["category"] is None]
        for start in range(0, len(own), MEASURED):
            part = own[start : start + MEASURED]
            jobs.append((condition, part, key_of("divergence", basis, [row["prompt"] for row in part])))
    tick = stage("Comparing", sum(len(part) for _, part, _ in jobs))
    for condition, part, key in jobs:
        if key not in ledger:
            prompts = [row["prompt"] for row in part]
            policies: list[Policy] = [condition.policy] * len(part)
            ledger.put(key, divergences(loaded, condition.bank, prompts, policies, force=force))
        for row, value in zip(part, ledger.get(key), strict=True):
            row["divergence"] = round(value, 6)
        tick(len(part))


def model_digest_of(loaded: LoadedModel) -> str:
    """What responses depend on besides prompt and condition: parameters (sum and norm), generation config, versions."""
    sums = [
        [
            name,
            # row by row: a device may have no fp64, and one fp32 sum over all hides a single weight
            float(tensor.detach().sum(dim=-1, dtype=torch.float32).cpu().double().sum()),
            float(torch.linalg.vector_norm(tensor.detach().float())),
        ]
        for name, tensor in loaded.model.named_parameters()
    ]
    config = loaded.model.generation_config.to_json_string(use_diff=False)
    return key_of(fingerprint(loaded).to_json(), sums, config, str(loaded.device), _versions())


def _policy_record(condition: Condition) -> PolicyRecord:
    content: dict[str, Any] = {"categories": condition.policy.model_dump(mode="json")["categories"]}
    if condition.system:
        content["system"] = condition.system
    return PolicyRecord(name=condition.name, kind=condition.kind, content=content)


def known_prompts(bank: VectorBank) -> tuple[PromptSet, list[str]]:
    """The prompts that a bank was fitted on and its settings chosen on, and the categories whose prompts are not at hand.

    Those of a user's own file are not at hand; the counterparts come with the prompts.
    """
    named = bank.provenance.get("prompts", {})
    sets, unknown = [], []
    for name in bank.categories:
        if name in builtin_categories() and named.get(name, {}).get("digest") in _digests(name):
            sets.append(builtin(name).split("fit", "tune"))
        else:
            unknown.append(name)
    return concatenate(
        [*sets, harmless_pool().split("fit", "tune"), soundalikes().split("fit", "tune")], "fit and tune"
    ), unknown


def _digests(category: str) -> set[str]:
    """Digests of the built-in prompts of a category, whole and its fit split."""
    return {builtin(category).digest(), builtin(category).split("fit").digest()}


def _suite_record(suite: Suite, known: PromptSet, unknown: list[str]) -> SuiteRecord:
    found = overlap(suite, known)
    if unknown:
        found["not_checked"] = unknown
    return SuiteRecord(
        name=suite.name,
        source=suite.source,
        digest=suite.digest(),
        used=len(suite),
        of=suite.sampled_from or len(suite),
        harmful=sum(row.category is not None for row in suite),
        overlap=found,
    )


def _versions() -> dict[str, str]:
    names = ("safesteer", "torch", "transformers", "numpy", "sacrebleu", "rouge-score")
    return {"python": platform.python_version()} | {name: package_version(name, "absent") for name in names}


def _hardware(loaded: LoadedModel) -> dict[str, Any]:
    return {
        "device": str(loaded.device),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "system": platform.system(),
    }
