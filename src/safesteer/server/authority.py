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
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, StrictFloat, ValidationError

from safesteer.errors import PolicyError
from safesteer.policy import CategoryPolicy, PlainData, Policy, is_off, parse_strength, read_yaml, sentence
from safesteer.vectors import VectorBank

May = Literal["raise", "any", "none"]
SEPARATOR = "@"
MOST_NAMED = 64  # categories in one request


class Clients(PlainData):
    """What a client may ask for; `most`: the highest strength (None: the bank's ceiling)."""

    may: May = "raise"
    most: StrictFloat | None = Field(default=None, ge=0, allow_inf_nan=False)


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
        data = {"categories": data} if is_off(data) else data
        if not isinstance(data, dict):
            raise PolicyError(f"{path}: expected a mapping such as {{categories: {{hate: 1.0}}}}")
        variants, clients = (data.pop(key, None) for key in ("variants", "clients"))
        variants = {} if variants is None or is_off(variants) else variants
        if not isinstance(variants, dict):
            raise PolicyError(f"{path}: variants: expected names with a policy each")
        clients = {} if clients is None else {"may": "none"} if is_off(clients) else clients
        try:
            allowed = Clients.model_validate(clients)
        except ValidationError as error:
            raise PolicyError(f"{path}: clients.{sentence(error)}") from None
        if data.get("categories") is None:  # the bank's default policy
            data = {"name": "default", **data, "categories": Policy.default(bank).categories}
        policy = Policy.parse(data, str(path))
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
        try:
            strength = parse_strength(strength)
        except PolicyError:
            raise PolicyError(
                f'{category}: `steering` must be a number such as 1.0, or "off", and not {reprlib.repr(strength)}'
            ) from None
        most = min(self.bank.strength_ceiling, math.inf if self.clients.most is None else self.clients.most)
        least = own.strength if own is not None and self.clients.may == "raise" else 0.0
        if strength < 0:
            raise PolicyError(f"{category}: strength {strength:g} is negative; use 0 or more")
        if strength < least:
            raise PolicyError(f"{category}: this server lets clients raise strengths only; use {least:g} or more")
        if strength > max(most, least):
            raise PolicyError(f"{category}: strength {strength:g} is above this server's limit of {max(most, least):g}")
        return (own or CategoryPolicy()).model_copy(update={"strength": strength})


def _variant(name: Any, data: Any, where: str) -> Policy:
    if not isinstance(name, str) or not name or SEPARATOR in name or not (name.isascii() and name.isprintable()):
        raise PolicyError(f"{where}: {name!r} is no name; use plain letters, without {SEPARATOR}")
    if is_off(data):
        return Policy(name=name)
    if not isinstance(data, dict) or data.get("categories") is None:
        raise PolicyError(
            f"{where}: {name}: expected a policy with its categories, such as {{categories: {{hate: 1.5}}}}"
        )
    return Policy.parse({"name": name, **data}, f"{where}: {name}")
