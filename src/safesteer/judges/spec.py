"""Judges by name, as given on the command line.

offline                         the judge that ships with SafeSteer (small, needs no hub)
rules                           detectors and topic relevance alone; knows nothing of harm
guard:ID[#FAMILY]               a guard model by hub id or folder, such as guard:Qwen/Qwen3Guard-Gen-0.6B; FAMILY says which it is
                                where its name does not
classifier:ID[#LABEL,...]       a sequence classifier; LABEL names its unsafe labels
openai:MODEL[@URL]              an OpenAI-compatible endpoint with a rubric; the key is in $OPENAI_API_KEY
moderation[:MODEL][@URL]        OpenAI moderations
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from safesteer.errors import SafeSteerError
from safesteer.judges.base import TRIAL, Exchange, Failure, Judge, Judgement
from safesteer.judges.combine import Completed
from safesteer.judges.relevance import Relevance

OPENAI = "https://api.openai.com/v1"
KINDS = (
    "offline", "rules", "guard:ID[#FAMILY]", "classifier:ID[#LABEL,...]", "openai:MODEL[@URL]", "moderation[:MODEL][@URL]"
)  # fmt: skip


READS_NO_HARM = "The judge rules reads no harm: its unsafe rate is always 0. Let offline or a guard decide."


class NoHarm:
    """A risk scorer that reads no harm: what is left are the detectors."""

    name = "rules"
    card: ClassVar[dict[str, str]] = {"limits": "reads no harm: its unsafe rate is always 0"}

    def score(
        self, exchanges: Sequence[Exchange], progress: Callable[[int], None] = lambda count: None
    ) -> list[dict[str, float] | Failure]:
        """Nothing, for every exchange."""
        progress(len(exchanges))
        return [{} for _ in exchanges]


class Specified:
    """A judge under the name of its spec, which says all that tells it from others: the address, the labels."""

    def __init__(self, name: str, judge: Judge) -> None:
        self.name = name
        self.inner = judge
        self.card: dict[str, Any] = getattr(judge, "card", {})
        self.identity: str = getattr(judge, "identity", "")

    def judge(
        self, exchanges: Sequence[Exchange], progress: Callable[[int], None] = lambda count: None
    ) -> list[Judgement]:
        """See `Judge.judge`."""
        return self.inner.judge(exchanges, progress)


def make_judge(spec: str) -> Judge:
    """The judge that `spec` names, under that name; models load at the first exchange.

    Raises `SafeSteerError` for an unknown one.
    """
    judge = _make(spec)
    return judge if judge.name == spec else Specified(spec, judge)


def make_judges(specs: Sequence[str]) -> list[Judge]:
    """The judges that `specs` name, each tried on one harmless exchange, so that one that cannot judge is known now.

    Raises `SafeSteerError` for an unknown one, one given twice, and one that fails.
    """
    judges = [make_judge(spec) for spec in specs]
    if len({one.name for one in judges}) < len(judges):
        raise SafeSteerError("a judge is given twice; give each once")
    for one in judges:
        failure = one.judge([TRIAL])[0].failure
        if failure is not None:
            raise SafeSteerError(
                f"the judge {one.name} could not judge a first, harmless answer ({failure}); mend it, or name another"
            )
    return judges


def _make(spec: str) -> Judge:
    from safesteer.judges.classifier import Classifier
    from safesteer.judges.endpoint import Moderation, RubricEndpoint
    from safesteer.judges.guards import Guard
    from safesteer.judges.offline import OfflineJudge

    kind, _, rest = spec.partition(":")
    if spec == "offline":
        return OfflineJudge()
    if spec == "rules":
        return Completed(NoHarm(), Relevance())
    if kind == "guard" and rest:
        identifier, _, family = rest.partition("#")
        return Completed(Guard(identifier, family=family or None), Relevance())
    if kind == "classifier" and rest:
        identifier, _, labels = rest.partition("#")
        return Completed(Classifier(identifier, labels.split(",") if labels else None), Relevance())
    if kind == "openai" and rest:
        model, url = _address(rest)
        return RubricEndpoint(url, model)
    if kind.partition("@")[0] == "moderation":
        name, url = _address(spec.removeprefix("moderation").removeprefix(":"))
        return Completed(Moderation(url, name or "omni-moderation-latest"), Relevance())
    raise SafeSteerError(f"--judge {spec!r} is not known; use one of {', '.join(KINDS)}")


def _address(text: str) -> tuple[str, str]:
    """Model and base URL of `MODEL[@URL]`; some models have an @ in their name (`@cf/meta/llama`)."""
    model, at, rest = text.partition("@http")
    if not at:
        model, at, rest = text.partition("@")
        return model, rest or OPENAI
    return model, f"http{rest}"
