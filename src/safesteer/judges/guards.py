"""Guard models: published safety classifiers that answer in words, each read in its own format (`guard_families`).

    unsafe = sum over labels of weight(label) P(label) / sum over labels of P(label)

P(label) is the probability, at the generated token that decides, of every token that begins the label; weights are 1 for
unsafe, 0 for safe, 0.5 for Qwen3Guard's `Controversial` (its authors leave it open: strict counts it as unsafe, loose as safe).
Where the deciding token mixes labels with other text, the weight of the label written counts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from safesteer.errors import SafeSteerError
from safesteer.files import folder_identity
from safesteer.judges.base import Exchange, Failure, answer_start, in_batches
from safesteer.judges.guard_families import Family, Reading, family_of, read
from safesteer.models import LoadedModel, load_model
from safesteer.models.loading import quiet_transformers

BATCH = 8
WORD_MARKS = " ▁Ġ\nĊ"  # what vocabularies put before a word


class Guard:
    """A guard model as a `RiskScorer`; it loads at the first call.

    `model_id`: a hub id or a local folder. `family`: None to read it off the id. `device`, `dtype`: see `load_model`.
    """

    def __init__(
        self,
        model_id: str,
        *,
        family: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int = BATCH,
    ) -> None:
        self.model_id = model_id
        self.identity = folder_identity(model_id)
        self.family = family_of(model_id, family)
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self._loaded: LoadedModel | None = None
        self._beginnings: dict[str, torch.Tensor] = {}

    @property
    def name(self) -> str:
        """`guard:` and the model id."""
        return f"guard:{self.model_id}"

    def score(
        self, exchanges: Sequence[Exchange], progress: Callable[[int], None] = lambda count: None
    ) -> list[dict[str, float] | Failure]:
        """See `RiskScorer.score`. Raises `SafeSteerError` if the model cannot be loaded or lacks its chat template."""
        return in_batches(exchanges, self.batch_size, self._score, progress)

    def _score(self, batch: Sequence[Exchange]) -> list[dict[str, float] | Failure]:
        asked = [self._ask(batch, arguments) for arguments in self.family.arguments]
        return [_worst(answers) for answers in zip(*asked, strict=True)]

    def _load(self) -> LoadedModel:
        if self._loaded is None:
            loaded = load_model(self.model_id, device=self.device, dtype=self.dtype)
            if self.family.prompt is None and not loaded.tokenizer.chat_template:
                raise SafeSteerError(
                    f"{self.model_id} ships no chat template, which {self.family.name} needs; use the published files"
                )
            if loaded.tokenizer.pad_token is None:
                loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
            self._beginnings = beginnings(loaded.tokenizer, self.family)
            self._loaded = loaded
        return self._loaded

    def _question(self, tokenizer: Any, exchange: Exchange, arguments: Mapping[str, Any]) -> str:
        texts = {"prompt": _plain(tokenizer, exchange.prompt), "response": _plain(tokenizer, exchange.response)}
        if self.family.prompt is not None:
            return self.family.prompt.format(**texts)
        turns = [(role, text.format(**texts)) for role, text in self.family.turns]
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.family.parts else text}
            for role, text in turns
        ]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **arguments))

    @torch.inference_mode()
    def _ask(self, batch: Sequence[Exchange], arguments: Mapping[str, Any]) -> list[dict[str, float] | Failure]:
        loaded = self._load()
        tokenizer = loaded.tokenizer
        encoded = [
            tokenizer(
                self._question(tokenizer, exchange, arguments),
                add_special_tokens=self.family.begin,
                return_token_type_ids=False,
            )
            for exchange in batch
        ]
        context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        room = None if context is None else context - self.family.max_new_tokens
        lengths = [len(one["input_ids"]) for one in encoded]
        readable = [row for row, length in enumerate(lengths) if room is None or length <= room]
        results: list[dict[str, float] | Failure] = [
            Failure(f"the question has {length} tokens, and {self.model_id} ({self.family.name}) has room for {room}")
            for length in lengths
        ]
        if not readable:
            return results
        inputs = tokenizer.pad([encoded[row] for row in readable], padding_side="left", return_tensors="pt")
        inputs = inputs.to(loaded.device)
        with quiet_transformers():
            output = loaded.model.generate(
                **inputs,
                generation_config=loaded.generation_config(
                    self.family.max_new_tokens, output_logits=True, return_dict_in_generate=True
                ),
            )
        answers = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()  # [readable, new tokens]
        for place, (row, answer) in enumerate(zip(readable, answers, strict=True)):
            results[row] = self._scores(tokenizer, answer, [step[place] for step in output.logits])
        return results

    def _scores(self, tokenizer: Any, tokens: list[int], logits: list[torch.Tensor]) -> dict[str, float] | Failure:
        thoughts = _thoughts(tokenizer, tokens)
        if thoughts == len(tokens) > 0:
            return Failure(f"the thoughts of {self.family.name} did not end within {thoughts} tokens")
        tokens, logits = tokens[thoughts:], logits[thoughts:]
        readings = read(self.family, _decode(tokenizer, tokens))
        if isinstance(readings, Failure):
            return readings
        scores = {}
        for reading in readings:
            deciding = next(
                step for step in range(len(tokens)) if len(_decode(tokenizer, tokens[: step + 1])) > reading.start
            )
            scores[reading.field.score] = self._expected(reading, tokens[deciding], logits[deciding])
        return scores

    def _expected(self, reading: Reading, token: int, logits: torch.Tensor) -> float:
        weights = reading.field.weights
        if token not in self._beginnings[reading.label]:
            return weights[reading.label]
        probabilities = logits.float().softmax(-1)  # [vocabulary]
        masses = {
            label: float(probabilities[self._beginnings[label].to(probabilities.device)].sum()) for label in weights
        }
        return sum(weights[label] * mass for label, mass in masses.items()) / sum(masses.values())


def _worst(answers: Sequence[dict[str, float] | Failure]) -> dict[str, float] | Failure:
    """The answer of the largest `unsafe`; a failure if any question failed."""
    read_answers = []
    for answer in answers:
        if isinstance(answer, Failure):
            return answer
        read_answers.append(answer)
    return max(read_answers, key=lambda scores: scores["unsafe"])


def beginnings(tokenizer: Any, family: Family) -> dict[str, torch.Tensor]:
    """For each label, the ids of the tokens it can begin with."""
    labels = {label for field in family.fields for label in field.weights}
    ids: dict[str, list[int]] = {label: [] for label in labels}
    for token, index in tokenizer.get_vocab().items():
        piece = token.strip(WORD_MARKS).lower()
        for label in labels:
            if piece and label.startswith(piece):
                ids[label].append(index)
    return {label: torch.tensor(found, dtype=torch.long) for label, found in ids.items()}


def _decode(tokenizer: Any, tokens: list[int], skip: bool = True) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False))


def _thoughts(tokenizer: Any, tokens: list[int]) -> int:
    """How many of the tokens are thoughts and not the answer."""
    start = answer_start(_decode(tokenizer, tokens, skip=False))
    return bisect_left(range(len(tokens)), start, key=lambda count: len(_decode(tokenizer, tokens[:count], skip=False)))


def _plain(tokenizer: Any, text: str) -> str:
    """`text` without the control tokens of the guard, so that what is judged cannot end its own turn."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, " ")
    return text
