"""What the gate read, token by token, and what steering changed in one answer.

    y, y'     greedy answers, unsteered and steered                 p, p'   the two models' next-token probabilities
    steps     p(y_i | x, y_<i) and p'(y_i | x, y_<i);   likewise of y'
    parts at  the first i with y_i != y'_i
    KL_i      sum over v of p(v | x, y_<i) log (p(v | x, y_<i) / p'(v | x, y_<i)),   in nats, for i up to where they part

Probabilities are read in one pass over prompt and answer. The prompt's width is told to the hooks, so that each token is steered
as the kind of token that it was in generation (see `engines.steering`): response tokens as generated, not as prompt.

    margin    risk - low,  above 0 where the gate begins to open
    scores    z(s(t)) of each token (see `vectors.gate`), in standard deviations of harmless prompts' passages
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch

from safesteer.engines import Steerer
from safesteer.engines.steering import Hooks
from safesteer.errors import SafeSteerError
from safesteer.explain.attribution import Parts, gate_of, gate_views, parts_of
from safesteer.explain.lens import token_texts
from safesteer.models import Conversation, EncodedPrompt, LoadedModel, check_lengths, encode, encode_all
from safesteer.models.chat import turn_markers, turn_start
from safesteer.models.thoughts import Thoughts
from safesteer.policy import Plan, Policy
from safesteer.vectors import VectorBank


@dataclass(frozen=True)
class Step:
    """One token of an answer, and the probability that the `unsteered` and the `steered` model gave it in its place."""

    text: str
    id: int
    unsteered: float
    steered: float


@dataclass(frozen=True)
class Continuations:
    """Two greedy answers to one prompt.

    The tokens of each are all that was generated, thoughts too, and end with the one that ended it, where it did not run into
    the limit; the texts are the answers, as `engines.generate` gives them. `parts_at`: index of the first token that differs,
    None where the answers are equal.
    `divergence`: KL in nats at each step up to and including that one, both having the same tokens before them (over the
    whole answer where they are equal). `steering` is `Plan.to_json`: what acted, and how strongly.
    """

    unsteered: tuple[Step, ...]
    steered: tuple[Step, ...]
    unsteered_text: str
    steered_text: str
    parts_at: int | None
    divergence: tuple[float, ...]
    steering: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@torch.inference_mode()
def compare(
    loaded: LoadedModel,
    bank: VectorBank,
    prompt: Conversation,
    policy: Policy | None = None,
    max_new_tokens: int = 64,
    *,
    system: str | None = None,
    force: Collection[str] = (),
) -> Continuations:
    """The greedy answers of the unsteered model and of the model steered by `policy` (None: the bank's default).

    Raises `SafeSteerError` for less than one token, and the errors of `Steerer`.
    """
    if max_new_tokens < 1:
        raise SafeSteerError(f"{max_new_tokens} new tokens make no answer; ask for at least one")
    encoded = encode_all(loaded, [prompt], system, room=max_new_tokens)[0]
    ids = encoded.ids
    steerer = Steerer(loaded, bank, policy, force=force)
    plain = _answer(loaded, ids, max_new_tokens)
    with steerer:
        steered = _answer(loaded, ids, max_new_tokens)
    plan = steerer.plans[0]
    # Neither answer is the beginning of the other: each has the token that ended it, or the same limit.
    pairs = enumerate(zip(plain, steered, strict=False))
    parts_at = next((place for place, (one, other) in pairs if one != other), None)
    off = Plan("off", (), {})
    of_plain = [_log_probabilities(loaded, bank, ids, plain, one) for one in (off, plan)]
    of_steered = [_log_probabilities(loaded, bank, ids, steered, one) for one in (off, plan)]
    before, after = (one[: None if parts_at is None else parts_at + 1] for one in of_plain)
    divergence = (before.exp() * (before - after)).sum(dim=-1).clamp_min(0.0)
    return Continuations(
        _steps(loaded, plain, of_plain),
        _steps(loaded, steered, of_steered),
        _text(loaded, encoded, plain),
        _text(loaded, encoded, steered),
        parts_at,
        tuple(divergence.tolist()),
        plan.to_json(),
    )


def _answer(loaded: LoadedModel, ids: tuple[int, ...], max_new_tokens: int) -> list[int]:
    """The greedy answer of the model as it stands now, up to and including the token that ends it."""
    prompt = torch.tensor([ids], device=loaded.device)
    output = loaded.model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=loaded.generation_config(max_new_tokens),
    )
    new: list[int] = output[0, len(ids) :].tolist()
    end = next((place for place, token in enumerate(new) if token in loaded.stop_ids), len(new) - 1)
    return new[: end + 1]


def _text(loaded: LoadedModel, prompt: EncodedPrompt, answer: list[int]) -> str:
    """As `engines.generate` decodes an answer, without the thought before it."""
    kept = answer[:-1] if answer and answer[-1] in loaded.stop_ids else answer
    return Thoughts(loaded.tokenizer).split(prompt, kept).text


def _log_probabilities(
    loaded: LoadedModel, bank: VectorBank, ids: tuple[int, ...], answer: list[int], plan: Plan
) -> torch.Tensor:
    """Log probabilities in each place of an answer, as in generation under `plan`: fp32 `[tokens, vocabulary]` on the CPU."""
    sequence = torch.tensor([[*ids, *answer]], device=loaded.device)
    hooks = Hooks(loaded.layout, bank.site, neurons=bank.neurons is not None)
    keywords: dict[str, Any] = {"attention_mask": torch.ones_like(sequence), "use_cache": False}
    if "logits_to_keep" in inspect.signature(loaded.model.forward).parameters:
        keywords["logits_to_keep"] = len(answer) + 1  # spares the vocabulary times a long prompt
    try:
        hooks.install()
        hooks.set_plans([plan])
        hooks.begin_request(len(ids))
        logits = loaded.model(input_ids=sequence, **keywords).logits[0, -len(answer) - 1 : -1]
    finally:
        hooks.remove()
    return torch.log_softmax(logits.float(), dim=-1).cpu()


def _steps(loaded: LoadedModel, answer: list[int], said: list[torch.Tensor]) -> tuple[Step, ...]:
    """The tokens of an answer with what the unsteered and the steered model said of them, `[tokens, vocabulary]` each."""
    chosen = torch.tensor(answer).unsqueeze(1)
    unsteered, steered = (one.gather(1, chosen).exp().flatten().tolist() for one in said)
    texts = token_texts(loaded.tokenizer, answer)
    return tuple(Step(*row) for row in zip(texts, answer, unsteered, steered, strict=True))


@dataclass(frozen=True)
class TokenScore:
    """A token and the gate's score of it, in standard deviations of harmless prompts' passages."""

    text: str
    id: int
    score: float


@dataclass(frozen=True)
class Topic:
    """A category as the gate read it.

    It is `read` where the gate opens and its `score` is the highest, or reaches both its `floor` and `SECOND` (see
    `vectors.gate`) of the highest.
    """

    category: str
    score: float
    floor: float
    read: bool


@dataclass(frozen=True)
class Readings:
    """What the gate read in a prompt's last turn, and how it scores the tokens of a response.

    `first`: position of the first of `tokens` in the whole prompt. `parts`: the ending and the strongest passage, whose first
    and last token are places among `tokens`. `margin`: risk - low. `topics`: highest first. `response` is empty where none was
    given; the gate was calibrated on prompts and not on responses, so compare its scores with each other and not with `low`.
    """

    tokens: tuple[TokenScore, ...]
    first: int
    risk: float
    low: float
    high: float
    margin: float
    opening: float
    parts: Parts
    topics: tuple[Topic, ...]
    response: tuple[TokenScore, ...] = ()

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories read, strongest first; none where the gate stayed closed."""
        return tuple(topic.category for topic in self.topics if topic.read)

    @property
    def hottest(self) -> int:
        """The place of the token with the highest score."""
        return max(range(len(self.tokens)), key=lambda index: self.tokens[index].score)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "categories": self.categories, "hottest": self.hottest}


@torch.inference_mode()
def readings(
    loaded: LoadedModel,
    bank: VectorBank,
    prompt: Conversation,
    response: str | None = None,
    *,
    system: str | None = None,
    force: Collection[str] = (),
) -> Readings:
    """What the gate of `bank` reads in `prompt`, token by token, and in a `response` to it, all unsteered.

    Raises `SafeSteerError` where the bank has no gate, `FingerprintMismatchError` for a bank of another model (unless
    `force`).
    """
    bank.check(loaded, force)
    gate = gate_of(bank)
    encoded = encode(loaded.tokenizer, prompt, system)
    ids = encoded.ids
    first = turn_start(ids, turn_markers(loaded.tokenizer))
    said = tuple(loaded.tokenizer(response, add_special_tokens=False)["input_ids"]) if response else ()
    check_lengths([encoded], loaded.tokenizer, loaded.context, len(said))
    spans = [(first, len(ids)), *([(len(ids), len(ids) + len(said))] if said else [])]
    # One pass: no block sees what comes after, so the prompt reads the same with a response behind it.
    of_prompt, *of_response = gate_views(loaded, gate, ids + said, spans)
    reading = gate.conclude(of_prompt, first)
    spoken: list[float] = []
    for views in of_response:
        scores = torch.stack([score for _, score in views]).sum(dim=0) + gate.token_bias
        spoken = ((scores - gate.calm[1, 0]) / gate.calm[1, 1]).tolist()
    topics = [
        Topic(name, score, float(floor), name in reading.categories)
        for (name, score), floor in zip(reading.topics.items(), gate.floors, strict=True)
    ]
    return Readings(
        _scored(loaded, ids[first:], reading.tokens),
        first,
        reading.risk,
        gate.low,
        gate.high,
        reading.risk - gate.low,
        reading.opening,
        parts_of(gate, of_prompt),
        tuple(sorted(topics, key=lambda topic: -topic.score)),
        _scored(loaded, said, spoken),
    )


def _scored(loaded: LoadedModel, ids: tuple[int, ...], scores: Any) -> tuple[TokenScore, ...]:
    texts = token_texts(loaded.tokenizer, ids)
    return tuple(TokenScore(*row) for row in zip(texts, ids, scores, strict=True))
