"""`results.json`: what an evaluation found, in a versioned schema.

One `Record` a (policy, suite, category); category `all` is the whole suite. Every rate and mean comes with its 95% interval,
n, and the paired difference to the unsteered model on the same prompts.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 2
ALL = "all"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(_Model):
    """A value with its 95% interval. Rates and differences are fractions, not percent."""

    value: float
    low: float
    high: float


class Measure(Interval):
    """A value, its interval, how many responses it rests on, and the paired difference to unsteered (None: no such control)."""

    n: int
    difference: Interval | None = None


class Record(_Model):
    """What one policy did on one category of one suite.

    `outcomes` has the five outcome rates over the judged responses; `nll` is the mean negative log-likelihood of a token in
    nats, whose exponential is the perplexity. Absent measures (None) do not apply: no reference, a harmful suite, or nothing
    judged. `failures` counts responses whose judge failed; they are in no rate. `leanings` counts them by the side their
    unreadable judgement leaned to: `unsafe`, `safe` or `neither`. `unanswered` is the share of all `n` that reached no answer
    because their tokens went into a thought (None: the model does not think); they are in no other rate, and no failure.
    """

    policy: str
    suite: str
    category: str
    harmful: bool
    n: int
    failures: int
    leanings: dict[str, int] = Field(default_factory=dict)
    unanswered: Measure | None = None
    outcomes: dict[str, Measure]
    relevance: Measure | None = None
    nll: Measure | None = None
    repetition: Measure | None = None
    bleu: Measure | None = None
    rouge_l: Measure | None = None
    divergence: Measure | None = None
    identical: Measure | None = None
    steered: Measure | None = None


class JudgeRecord(_Model):
    """A judge: its name, whether it decided the outcomes, how it agrees with the first judge here, what its card measured, and
    to how many of the prompts here it was trained on graded answers (`in_sample`)."""

    name: str
    decides: bool
    failures: int
    leanings: dict[str, int] = Field(default_factory=dict)
    agreement: float | None = None
    kappa: float | None = None
    in_sample: int = 0
    measured: dict[str, Any] = Field(default_factory=dict)


class SuiteRecord(_Model):
    """A suite: where it came from, how many rows were used of how many, and its overlap with what the bank was fitted on."""

    name: str
    source: str
    digest: str
    used: int
    of: int
    harmful: int
    overlap: dict[str, Any] = Field(default_factory=dict)


class PolicyRecord(_Model):
    """A policy as evaluated: its name, what kind of condition it is, and its content."""

    name: str
    kind: Literal["policy", "default", "none", "system-prompt", "random"]
    content: dict[str, Any] = Field(default_factory=dict)


class Results(_Model):
    """The whole document."""

    schema_version: int = SCHEMA_VERSION
    created: str
    model: str
    bank: dict[str, Any]
    settings: dict[str, Any]
    policies: list[PolicyRecord]
    suites: list[SuiteRecord]
    judges: list[JudgeRecord]
    records: list[Record]
    selectivity: list[dict[str, Any]] = Field(default_factory=list)
    dose_response: list[dict[str, Any]] = Field(default_factory=list)
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: dict[str, float] = Field(default_factory=dict)
