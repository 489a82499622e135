"""Which policy acts on a request: the operator's, and what a client may change of it.

    policy      = the served one, or the variant that the model's name asks for (`NAME@strict`)
    strength_c <- what the client asks for category c, by the operator's word:
        raise   from the policy's own strength up to `most`       (default)
        any     from 0 up to `most`, and "off" for all of them
        none    a request that asks for anything is refused

A policy file for serving is a policy file with two keys more (without `categories`, the bank's default policy is served):

    categories: {hate: 1.0, privacy: 1.0}
    variants:
      strict: {categories: {hate: 1.5, privacy: 1.5}}
    clients: {may: raise, most: 1.5}

Clients name categories and strengths, nothing else: no vectors, no layers, no files, nothing below 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safesteer.errors import PolicyError
from safesteer.policy import CategoryPolicy, Policy, read_yaml
from safesteer.vectors import VectorBank

May = Literal["raise", "any", "none"]
SEPARATOR = "@"
MOST_NAMED = 64  # categories in one request
FARTHEST = 1e6  # no number beyond it is a strength


class Clients(BaseModel):
    """What a client may ask for; `most`: the highest strength (None: the bank's ceiling)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    may: May = "raise"
    most: float | None = Field(default=None, ge=0, allow_inf_nan=False)


@dataclass(frozen=True)
class Authority:
    """The operator's policies, checked against the bank. Immutable: a reload makes another."""

    bank: VectorBank
    policy: Policy
    variants: dict[str, Policy] = field(default_factory=dict)
    clients: Clients = field(default_factory=Clients)

    @classmethod
    def of(cls, bank: VectorBank, path: Path | None = None) -> Authority:
        """From a policy file, or the bank's default policy. Raises `PolicyError` (or another) naming the file."""
        if path is None:
            return cls(bank, Policy.default(bank).resolved(bank))
        data = read_yaml(path)
        if not isinstance(data, dict):
            raise PolicyError(f"{path}: expected a mapping such as {{categories: {{hate: 1.0}}}}")
        variants, clients = data.pop("variants", None) or {}, data.pop("clients", None) or {}
        if not isinstance(variants, dict):
            raise PolicyError(f"{path}: variants: expected names with a policy each")
        try:
            allowed = Clients.model_validate(clients)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(("clients", *(str(part) for part in first["loc"])))
            raise PolicyError(f"{path}: {place}: {first['msg']}") from None
        policy = Policy.parse(data, str(path))
        if "categories" not in data:
            policy = Policy.default(bank)
        named = {name: _variant(name, one, f"{path}: variants").resolved(bank) for name, one in variants.items()}
        return cls(bank, policy.resolved(bank), named, allowed)

    @property
    def policies(self) -> list[Policy]:
        """All that may be served without a client's word."""
        return [self.policy, *self.variants.values()]

    def variant(self, name: str | None) -> Policy:
        """The policy of a variant (None: the served one). Raises `PolicyError` for one that there is not."""
        if name is None:
            return self.policy
        if name not in self.variants:
            raise PolicyError(
                f"there is no variant {name!r}; use {', '.join(self.variants) or 'the model without one'}"
            )
        return self.variants[name]

    def decide(self, variant: str | None, asked: Literal["off"] | Mapping[str, float] | None) -> Policy:
        """The policy of one request, resolved. Raises `PolicyError` or `UnknownCategoryError` with a sentence for the client."""
        policy = self.variant(variant)
        if asked is None:
            return policy
        if self.clients.may == "none":
            raise PolicyError("this server decides on steering; leave out `steering`")
        if asked == "off":
            if self.clients.may != "any":
                raise PolicyError("this server does not let clients switch steering off; leave out `steering`")
            return Policy.off()
        if not isinstance(asked, Mapping):
            raise PolicyError('`steering` must be "off" or a mapping of categories to strengths, such as {"hate": 1.0}')
        if len(asked) > MOST_NAMED:
            raise PolicyError(f"`steering` names {len(asked)} categories; name at most {MOST_NAMED}")
        categories = dict(policy.categories)
        named: set[str] = set()
        for name, strength in asked.items():
            canonical = self.bank.categories[self.bank.index(name)]
            if canonical in named:
                raise PolicyError(f"`steering` names {canonical} twice")
            named.add(canonical)
            categories[canonical] = self._strength(canonical, strength, categories.get(canonical))
        return policy.model_copy(update={"name": f"{policy.name}+client", "categories": categories}).resolved(self.bank)

    def _strength(self, category: str, strength: Any, own: CategoryPolicy | None) -> CategoryPolicy:
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not -FARTHEST < strength < FARTHEST:
            raise PolicyError(f"{category}: the strength must be a number")
        most = min(self.bank.strength_ceiling, math.inf if self.clients.most is None else self.clients.most)
        least = own.strength if own is not None and self.clients.may == "raise" else 0.0
        if strength < 0:
            raise PolicyError(f"{category}: strength {strength:g} is negative; use 0 or more")
        if strength < least:
            raise PolicyError(f"{category}: this server lets clients raise strengths only; use {least:g} or more")
        if strength > max(most, least):
            raise PolicyError(f"{category}: strength {strength:g} is above this server's limit of {max(most, least):g}")
        if own is None:
            own = Policy.default(self.bank.unverified()).categories[category]  # `resolved` refuses unfit ones
        return own.model_copy(update={"strength": float(strength)})


def _variant(name: Any, data: Any, where: str) -> Policy:
    if not isinstance(name, str) or not name or SEPARATOR in name or not (name.isascii() and name.isprintable()):
        raise PolicyError(f"{where}: {name!r} is no name; use plain letters, without {SEPARATOR}")
    if not isinstance(data, dict) or "categories" not in data:
        raise PolicyError(
            f"{where}: {name}: expected a policy with its categories, such as {{categories: {{hate: 1.5}}}}"
        )
    return Policy.parse({"name": name, **data}, f"{where}: {name}")
