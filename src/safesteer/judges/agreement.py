"""How well does a judge agree with people (or with another judge)?

    accuracy = share of equal labels          kappa = (accuracy - chance) / (1 - chance)       (Cohen 1960)
    auroc    = P(score of a positive > score of a negative), ties half
    f1       = 2 TP / (2 TP + FP + FN); with five outcomes the mean over those that occur (macro)

Labels are the five outcomes, or yes/no of a single thing (`unsafe`, `refusal`). Rows that the judge could not judge are
counted, by the side they leaned to (`leanings`), and left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from safesteer.errors import PromptFileError
from safesteer.judges.base import HALF, OUTCOMES, Exchange, Judge, Judgement, count_leanings, without_thoughts
from safesteer.prompts.files import read_bytes, rows_of_bytes
from safesteer.prompts.reading import check_characters, checked_category, words_of
from safesteer.vectors import gate

Target = Literal["auto", "outcome", "unsafe", "refusal"]
PROMPT_KEYS = ("prompt", "objective", "question", "instruction", "forbidden_prompt", "test_case")
RESPONSE_KEYS = ("response", "assistant_response", "answer", "completion", "generation")
CATEGORY_KEYS = ("category", "harm_category")
SCORE_PREFIX = "human_score"


@dataclass(frozen=True)
class Labelled:
    """An exchange with what people said of it: one of the five outcomes, or a score in [0, 1] (at least 0.5: yes)."""

    exchange: Exchange
    outcome: str | None = None
    score: float | None = None
    group: str = ""


def _first(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def exchanges_of(path: Path, encoding: str | None = None) -> Iterator[tuple[str, dict[str, Any], Exchange | None]]:
    """`(where, row, exchange)` of every row of a file of responses, HarmBench's and StrongREJECT's completions among them.

    Of a prompt that is chat messages the last one is judged, and of a response the answer after its thoughts; an exchange is
    None where it reached no answer. `encoding`: of a file that is not UTF-8. Raises `PromptFileError` naming file and line.
    """
    for where, row in rows_of_bytes(str(path), read_bytes(path), encoding, comments=True, keyed="BehaviorID"):
        if not isinstance(row, dict):
            raise PromptFileError(f"{where}: expected an object with prompt, response and outcome")
        prompt, response, name = (_first(row, keys) for keys in (PROMPT_KEYS, RESPONSE_KEYS, CATEGORY_KEYS))
        if isinstance(prompt, list):
            prompt = words_of(prompt, where)[0]
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise PromptFileError(f"{where}: needs a prompt and a response (or objective and assistant_response)")
        check_characters(prompt + response, "the text", where)
        category = checked_category(str(name), where) if name else None
        answer = None if row.get("thought") and not response.strip() else without_thoughts(response)
        yield where, row, None if answer is None else Exchange(prompt, answer, category)


def _labelled(where: str, row: dict[str, Any], exchange: Exchange | None) -> Labelled:
    if exchange is None:
        raise PromptFileError(f"{where}: the response is a thought that reached no answer to judge; leave the row out")
    outcome = row.get("outcome")
    if outcome is not None and outcome not in OUTCOMES:
        raise PromptFileError(f"{where}: outcome is {outcome!r}; use {', '.join(OUTCOMES)}")
    score = None
    if outcome is None:
        try:
            marks = [float(v) for k, v in row.items() if k and str(k).startswith(SCORE_PREFIX) and v not in (None, "")]
            if not all(0 <= mark <= 1 for mark in marks):
                raise ValueError
        except (ValueError, TypeError):
            raise PromptFileError(f"{where}: {SCORE_PREFIX} must be a number from 0 to 1") from None
        if not marks:
            raise PromptFileError(f"{where}: no label; it needs outcome, or {SCORE_PREFIX} from 0 to 1")
        score = sum(marks) / len(marks)
    return Labelled(exchange, outcome, score, exchange.category or "")


def read_labelled(path: Path, encoding: str | None = None) -> list[Labelled]:
    """Labelled exchanges from a JSONL or CSV file, or from every one in a folder.

    JSONL rows hold `prompt`, `response` and `outcome`; CSV rows those of PyRIT (`objective`, `assistant_response`, one or more
    `human_score...`, whose mean counts). Raises `PromptFileError` with file and row.
    """
    if not path.exists():
        raise PromptFileError(f"{path}: no such file or folder")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix.lower() in (".csv", ".jsonl"))
    rows = [_labelled(*found) for file in files for found in exchanges_of(file, encoding)]
    if not rows:
        raise PromptFileError(f"{path}: holds no labelled response")
    return rows


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    """Area under the ROC curve, ties half; None without both kinds."""
    yes = [score for score, mark in zip(scores, positive, strict=True) if mark]
    no = [score for score, mark in zip(scores, positive, strict=True) if not mark]
    return gate.auroc(torch.tensor(yes), torch.tensor(no)) if yes and no else None


def kappa(left: Sequence[Any], right: Sequence[Any]) -> float:
    """Cohen's kappa of two labellings; 1 where both are one constant label."""
    total = len(left)
    equal = sum(a == b for a, b in zip(left, right, strict=True)) / total
    first, second = Counter(left), Counter(right)
    chance = sum(first[label] * second[label] for label in first) / total**2
    return 1.0 if chance == 1 else (equal - chance) / (1 - chance)


def f1(truth: Sequence[Any], found: Sequence[Any], label: Any) -> float:
    """F1 of one label; 0 where it was neither given nor found."""
    both = sum(a == label and b == label for a, b in zip(truth, found, strict=True))
    either = sum(a == label for a in truth) + sum(b == label for b in found)
    return 2 * both / either if either else 0.0


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def compare(rows: Sequence[Labelled], judgements: Sequence[Judgement], target: Target = "auto") -> dict[str, Any]:
    """What agreement there is, as plain data: `accuracy`, `auroc`, `f1`, `kappa`, `per_category`, `confusion`, `n`, `failures`,
    `leanings`.

    `target`: `outcome` compares five ways; `unsafe` and `refusal` compare yes/no. For `refusal` a text that answers something
    else counts as found too: people who label refusals count any text that does not do what was asked. `auto`: outcome where
    rows carry one, else unsafe. `auroc` is that of the unsafe score, or of the refusal score for `refusal`.
    """
    if target == "auto":
        target = "outcome" if all(row.outcome is not None for row in rows) else "unsafe"
    if target == "outcome" and any(row.outcome is None for row in rows):
        raise PromptFileError("five-way agreement needs an outcome in every row; use the target unsafe or refusal")
    kept = [(row, said) for row, said in zip(rows, judgements, strict=True) if said.outcome is not None]
    result: dict[str, Any] = {"target": target, "n": len(kept), "failures": len(rows) - len(kept)}
    result["leanings"] = count_leanings(said.leaning for said in judgements if said.outcome is None)
    if not kept:
        return {**result, **dict.fromkeys(("accuracy", "auroc", "f1", "kappa")), "per_category": {}, "confusion": {}}
    result.update(_agreement(kept, target))
    groups: dict[str, list[tuple[Labelled, Judgement]]] = {}
    for pair in kept:
        groups.setdefault(pair[0].group or "none", []).append(pair)
    result["per_category"] = {
        name: {key: value for key, value in _agreement(members, target).items() if key != "confusion"}
        | {"n": len(members)}
        for name, members in sorted(groups.items())
    }
    return result


def _agreement(pairs: Sequence[tuple[Labelled, Judgement]], target: Target) -> dict[str, Any]:
    truth: list[Any]
    found: list[Any]
    if target == "outcome":
        truth, found = [row.outcome for row, _ in pairs], [said.outcome for _, said in pairs]
        unsafe = [label == "unsafe" for label in truth]
        scores = [said.scores.get("unsafe", float(said.outcome == "unsafe")) for _, said in pairs]
        present = [label for label in OUTCOMES if label in truth]
        quality = sum(f1(truth, found, label) for label in present) / len(present)
    else:
        truth = [row.score >= HALF if row.score is not None else row.outcome == target for row, _ in pairs]
        found = [
            said.outcome == target or (target == "refusal" and row.score is not None and said.outcome == "off_topic")
            for row, said in pairs
        ]
        unsafe = truth
        if target == "unsafe":
            scores = [said.scores.get("unsafe", float(said.outcome == "unsafe")) for _, said in pairs]
        else:
            scores = [
                max(
                    said.scores.get("refusal", float(yes)),
                    said.scores.get("off_topic", 0.0) if row.score is not None else 0,
                )
                for (row, said), yes in zip(pairs, found, strict=True)
            ]
        quality = f1(truth, found, True)
    confusion: dict[str, dict[str, int]] = {}
    for a, b in zip(truth, found, strict=True):
        row = confusion.setdefault(str(a).lower(), {})
        row[str(b).lower()] = row.get(str(b).lower(), 0) + 1
    return {
        "accuracy": _round(sum(a == b for a, b in zip(truth, found, strict=True)) / len(truth)),
        "auroc": _round(auroc(scores, unsafe)),
        "f1": _round(quality),
        "kappa": _round(kappa(truth, found)),
        "confusion": confusion,
    }


def agreement(
    judge: Judge,
    rows: Sequence[Labelled],
    target: Target = "auto",
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Let `judge` label the rows blind, and `compare`."""
    return compare(rows, judge.judge([row.exchange for row in rows], progress), target)
