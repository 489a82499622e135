"""The steered model inside the tools people already measure with: one module a tool, each through the tool's own plugin point.

    lm_eval       lm-evaluation-harness    a model, for generate_until and loglikelihood
    inspect_ai    Inspect                  a model provider
    garak         garak                    a function for its `function` generator

All three open a bank the same way: `bank` is a file, `policy` is `default`, `unsteered` or a policy file, and `model` stands in
for the model that the bank names. Nothing here imports torch before a bank is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safesteer.models import LoadedModel
    from safesteer.policy import Policy
    from safesteer.vectors import VectorBank


@dataclass(frozen=True)
class OpenedBank:
    """A bank, the policy that acts (checked against it), and the model to load (`revision` None: its default)."""

    bank: VectorBank
    policy: Policy
    model: str
    revision: str | None

    @property
    def acts(self) -> bool:
        """Whether the policy can change anything."""
        return any(how.strength for how in self.policy.categories.values())

    def load(self, device: str | None = None) -> LoadedModel:
        """Load the model. Raises `SafeSteerError`, or `FingerprintMismatchError` if the bank is not of this model."""
        from safesteer.models import load_model

        loaded = load_model(self.model, revision=self.revision, device=device)
        self.bank.check(loaded)
        return loaded


def open_bank(bank: str | Path, policy: str = "default", model: str | None = None) -> OpenedBank:
    """Read a bank and the policy for it. Raises `BankError`, `PolicyError`, or `SafeSteerError` if no model is named."""
    from safesteer.policy import Policy
    from safesteer.vectors import VectorBank
    from safesteer.vectors.locating import named_model

    opened = VectorBank.load(bank)
    if policy == "default":
        chosen = Policy.default(opened)
    elif policy == "unsteered":
        chosen = Policy.off()
    else:
        chosen = Policy.from_yaml(policy)
    return OpenedBank(opened, chosen.resolved(opened), *named_model(opened, model))
