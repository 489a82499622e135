"""A policy: which categories act, how strongly, when, and on which tokens.

For one request with reading (o, C) of the bank's gate (opening o, categories read C):

    strength_c = s_c            if the category's gate is `always`
               = s_c * o        if it is `auto` and c is in C, else 0

    delta[kind, l] = cap( sum over c of strength_c * step[c, l]  where c steers tokens of that kind )

`cap` shortens the sum to its longest member: several categories share one dose, they do not pile up.
What is off has strength 0. A gate, layers or tokens that a policy does not name are the bank's own: gated where the bank has a
gate for the category, else always on.

A category with `site: neurons` acts on its risk neurons instead (`safesteer.vectors.neurons`): neuron j goes the share strength_c
of the way to its harmless level m_j; where several categories hold a neuron, the largest share and the mean level count.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from safesteer.errors import PolicyError
from safesteer.vectors import Reading, VectorBank
from safesteer.vectors.bank import Tokens

GateMode = Literal["auto", "always"]
ActsOn = Literal["directions", "neurons", "both"]

UNFIT = (
    "was found to make this model's answers worse when the bank was checked (see `safesteer inspect`), so it does not act; "
    "use --unverified (from Python `bank.unverified()`) if it shall all the same"
)
MOST_LAYERS = 10_000  # no model has as many; a typing error should not fill the memory
ROUNDING = 1e-5  # relative

# kinds of token, as in safesteer.engines.steering: 1 prompt, 2 last prompt token, 3 generated
KINDS_OF: dict[Tokens, tuple[int, ...]] = {
    "all": (1, 2, 3),
    "prompt": (1, 2),
    "generated": (3,),
    "continuation": (2, 3),
}


_MERGE = "tag:yaml.org,2002:merge"


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, and `<<` merges by YAML's rule: a mapping's own keys come before merged ones,
    and of several merged mappings the first. (PyYAML keeps the last of equal keys; which mapping it prefers differs by version.)
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [
            (_MERGE, _MERGE) if key.tag == _MERGE else (key.tag, self.construct_object(key))
            for key, _ in node.value
            if isinstance(key, yaml.ScalarNode)
        ]
        for key in keys:
            if keys.count(key) > 1:
                name = "<<" if key[0] == _MERGE else key[1]
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", node.start_mark)
        return node

    def flatten_mapping(self, node: Any) -> None:
        own = [pair for pair in node.value if pair[0].tag != _MERGE]
        merged: list[Any] = []
        for key, value in node.value:
            if key.tag == _MERGE:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
        for one in merged:
            if not isinstance(one, yaml.MappingNode):
                raise yaml.constructor.ConstructorError(None, None, "<< merges mappings alone", one.start_mark)
            self.flatten_mapping(one)
        node.value = [*(pair for one in reversed(merged) for pair in one.value), *own]


def is_off(value: Any) -> bool:
    """Whether plain data says off: false, `off`, `no`, `false` or empty text, or an empty list."""
    if isinstance(value, str):
        return value.strip().lower() in ("off", "no", "false", "")
    return value is False or (isinstance(value, list | tuple) and not value)


def parse_strength(value: Any) -> float:
    """A strength from plain data: a finite number, or 0 for what says off. Raises `PolicyError` for anything else."""
    if is_off(value):
        return 0.0
    try:
        if not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise PolicyError(f"{reprlib.repr(value)} is not a number; the strength must be a number such as 1.0, or off")


def sentence(error: ValidationError) -> str:
    """The first of pydantic's complaints: its place, and what is wrong there."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    words = first["msg"].removeprefix("Value error, ")
    return f"{place}: {words}" if place else words


class PlainData(BaseModel):
    """Plain data in which a key without a value (null) is a key left out, and an unknown key an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _missing(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}
        return data


class CategoryPolicy(PlainData):
    """How one category acts.

    `strength`: 1 is the bank's calibrated dose. `gate`: `auto` acts only where the risk is read, `always` on every
    request; None: `auto` where the bank has a gate for the category, else `always`. `layers`: 0-based, None for the bank's own.
    `tokens`: `all`, `prompt`, `generated`, or `continuation` (the last prompt token and what follows); None for the bank's own.
    `site`: `directions` adds the category's direction, `neurons` holds its risk neurons at their harmless level (banks fitted
    with `--neurons`), `both` does both.

    Stands for it too: a number (its strength), what says off (strength 0), null (all of the defaults).
    """

    strength: float = 1.0
    gate: GateMode | None = None
    layers: tuple[int, ...] | None = None
    tokens: Tokens | None = None
    site: ActsOn = "directions"

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        if data is None:
            return {}
        return data if isinstance(data, Mapping | CategoryPolicy) else {"strength": data}

    @field_validator("strength", mode="before")
    @classmethod
    def _strength(cls, value: Any) -> float:
        return parse_strength(value)

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> tuple[int, ...]:
        return parse_layers(",".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


class Policy(PlainData):
    """What acts on a request. `categories` maps any name of a category to how it acts (a list of names: by the defaults); none:
    the request is left alone.
    """

    name: str = "policy"
    categories: dict[str, CategoryPolicy] = Field(default_factory=dict)
    research: bool = False

    @field_validator("categories", mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        if is_off(value):
            return {}
        if isinstance(value, list):
            if not all(isinstance(name, str) for name in value):
                raise PolicyError("a list of categories holds names alone")
            return dict.fromkeys(value)
        return value

    @classmethod
    def off(cls) -> Policy:
        """The policy that leaves every request alone."""
        return cls(name="off")

    @classmethod
    def default(cls, bank: VectorBank) -> Policy:
        """The bank's own: every category at strength 1, gated where the bank has a gate.

        Raises `PolicyError` where the bank's check found every category unfit; those that it found so are left out.
        """
        fit = [name for name in bank.categories if name not in bank.unfit]
        if not fit:
            raise PolicyError(f"every category of this bank {UNFIT}")
        return cls.of(dict.fromkeys(fit), name="default").resolved(bank)

    @classmethod
    def of(
        cls,
        categories: Mapping[str, Any],
        *,
        gate: GateMode | None = None,
        layers: tuple[int, ...] | None = None,
        tokens: Tokens | None = None,
        research: bool = False,
        name: str = "custom",
    ) -> Policy:
        """A policy from `categories` as a policy file has them: strengths, or more. Raises `PolicyError`.

        `gate`, `layers` and `tokens` hold for those that do not name their own. `research` allows negative strength, from Python
        only.
        """
        common = {"gate": gate, "layers": layers, "tokens": tokens}
        ways = {
            category: common | dict(how if isinstance(how, Mapping) else {"strength": how})
            for category, how in categories.items()
        }
        return cls._checked({"name": name, "categories": ways, "research": research}, name)

    @classmethod
    def parse(cls, data: Any, where: str = "policy") -> Policy:
        """A policy from plain data: a mapping with `categories`, or what says off. Raises `PolicyError`, with the place.

        Plain data cannot ask for research: negative strength is for Python only.
        """
        if is_off(data):
            return cls.off()
        if not isinstance(data, dict):
            raise PolicyError(f"{where}: expected a mapping such as {{categories: {{hate: 1.0}}}}")
        if "research" in data:
            raise PolicyError(f"{where}: research can be switched on only from Python")
        policy = cls._checked(data, where)
        if "categories" not in policy.model_fields_set:
            raise PolicyError(f"{where}: names no categories; write categories: {{hate: 1.0}}, or categories: off")
        return policy

    @classmethod
    def _checked(cls, data: Any, where: str) -> Policy:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PolicyError(f"{where}: {sentence(error)}") from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Policy:
        """Read a policy file. Raises `PolicyError` naming the file."""
        data = read_yaml(path)
        return cls.parse(data, str(path))

    def resolved(self, bank: VectorBank) -> Policy:
        """The same policy with the bank's canonical names, gates and tokens, checked against the bank.

        Raises `UnknownCategoryError`; `PolicyError` for a category that the bank's check found unfit, for a strength
        below 0 (unless research) or above the ceiling, for `gate: auto` with a bank that has no gate,
        and for a category named twice; `BankError` for absent layers.
        """
        categories: dict[str, CategoryPolicy] = {}
        for name, how in self.categories.items():
            canonical = bank.categories[bank.index(name)]
            if canonical in categories:
                raise PolicyError(f"{self.name}: {canonical} is named twice")
            if canonical in bank.unfit and how.strength != 0:
                raise PolicyError(f"{canonical} {UNFIT}")
            if how.strength < 0 and not self.research:
                raise PolicyError(f"{canonical}: strength {how.strength:g} is negative; use 0 or more")
            if abs(how.strength) > bank.strength_ceiling:
                raise PolicyError(
                    f"{canonical}: strength {how.strength:g} is above the bank's ceiling of {bank.strength_ceiling:g}"
                )
            read = bank.gate is not None and canonical in bank.gate.categories
            if how.gate == "auto" and not read:
                raise PolicyError(f"{canonical}: the bank has no gate for it; use gate: always")
            if how.layers is not None:
                bank.steps(canonical, how.layers)
            if how.site != "directions" and bank.neurons is None:
                raise PolicyError(f"{canonical}: the bank has no risk neurons; fit it with --neurons 256")
            own = {"gate": how.gate or ("auto" if read else "always"), "tokens": how.tokens or bank.tokens}
            categories[canonical] = how.model_copy(update=own)
        return self.model_copy(update={"categories": categories})

    @property
    def gated(self) -> bool:
        """Whether any category waits for its risk to be read, or may: what its gate is, the bank decides (`resolved`)."""
        return any(how.gate != "always" and how.strength != 0 for how in self.categories.values())


def read_yaml(path: str | Path) -> Any:
    """The plain data in a YAML file, in which no key stands twice. Raises `PolicyError` naming the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
    except OSError as error:
        raise PolicyError(f"{path} cannot be read ({error.strerror})") from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # the loader lets some through
        raise PolicyError(f"{path} is not valid YAML ({' '.join(str(error).split())})") from None


def parse_layers(text: str) -> tuple[int, ...]:
    """`15` -> (15,); `12-18` -> (12, ..., 18); `4,9,12-14` -> (4, 9, 12, 13, 14). Raises `PolicyError`."""
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            if int(last or first) >= MOST_LAYERS:
                raise ValueError
            layers.extend(range(int(first), int(last) + 1) if dash else [int(first)])
    except ValueError:
        layers = []
    if not layers:
        raise PolicyError(f"layers {text!r} are not understood; write 15, 12-18 or 4,9,12-14")
    return tuple(dict.fromkeys(layers))


@dataclass(frozen=True)
class Acting:
    """A category that really acts on a request.

    `strength` is what the policy and the gate gave it; `dose` the relative dose that was really added over all its layers, after
    the cap on several categories.
    """

    category: str
    strength: float
    dose: float
    layers: tuple[int, ...]
    tokens: Tokens
    gate: GateMode
    site: ActsOn = "directions"


@dataclass(frozen=True)
class Pull:
    """What happens to some neurons of a layer, for one request: neuron `indices[j]` goes the share `rates[kind, j]` of its way to
    `targets[j]`, at tokens of each kind. `indices`: int64 `[n]`; `rates`: fp32 `[4, n]`; `targets`: fp32 `[n]`.
    """

    indices: torch.Tensor
    rates: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """What happens to one request: who acts, what was read, and the deltas.

    `deltas`: layer -> fp32 `[4, width]`, one row a kind of token (0 is padding and stays zero); empty if nothing acts.
    `pulls`: layer -> what happens to its neurons.
    """

    policy: str
    acting: tuple[Acting, ...]
    deltas: dict[int, torch.Tensor]
    reading: Reading | None = None
    pulls: dict[int, Pull] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data for reports: the categories, doses and layers that really acted, and the gate's reading."""
        record: dict[str, Any] = {
            "policy": self.policy,
            "acting": [
                {
                    "category": one.category,
                    "strength": round(one.strength, 4),
                    "dose": round(one.dose, 5),
                    "layers": list(one.layers),
                    "tokens": one.tokens,
                    "gate": one.gate,
                    **({} if one.site == "directions" else {"site": one.site}),
                }
                for one in self.acting
            ],
        }
        if self.reading is not None:
            top = sorted(self.reading.topics.items(), key=lambda item: -item[1])[:3]
            record["reading"] = {
                "risk": round(self.reading.risk, 4),
                "opening": round(self.reading.opening, 4),
                "topics": {name: round(value, 4) for name, value in top},
            }
        return record


def plan(policy: Policy, bank: VectorBank, reading: Reading | None = None) -> Plan:
    """Decide what acts on one request. `policy` must be resolved; a gated policy needs the request's `reading`."""
    if policy.gated and reading is None:
        raise PolicyError(f"the policy {policy.name!r} is gated but the prompt was not read")
    acting: list[Acting] = []
    found: list[tuple[float, list[int], dict[int, torch.Tensor]]] = []
    pulls: dict[int, list[Pull]] = {}
    for category, how in policy.categories.items():
        strength, gate, tokens = how.strength, how.gate or "auto", how.tokens or bank.tokens
        if gate == "auto" and reading is not None:
            strength *= reading.opening if category in reading.categories else 0.0
        if strength == 0:
            continue
        kinds = list(KINDS_OF[tokens])
        held = bank.neurons.at(bank.index(category)) if how.site != "directions" and bank.neurons is not None else {}
        for layer, (indices, targets) in held.items():
            rates = torch.zeros(4, len(indices))
            rates[kinds] = strength
            pulls.setdefault(layer, []).append(Pull(indices, rates, targets))
        steps = bank.steps(category, how.layers) if how.site != "neurons" else {}
        total = bank.dose(category) * strength if steps else 0.0
        acting.append(Acting(category, strength, total, tuple(steps or held), tokens, gate, how.site))
        if steps:
            found.append((strength, kinds, steps))
    layers = sorted({layer for _, _, steps in found for layer in steps})
    deltas, caps = torch.zeros(4, 0, 0), torch.ones(4, 0)
    if found:
        rates = torch.zeros(4, len(found))
        for place, (strength, kinds, _) in enumerate(found):
            rates[kinds, place] = strength
        deltas, caps = composed(rates, stacked([own for *_, own in found], layers, bank.model.width))
    for index, one in enumerate(acting):
        if one.site == "neurons":
            continue
        kept = caps[list(KINDS_OF[one.tokens])][:, [layers.index(layer) for layer in one.layers]].mean()
        acting[index] = replace(one, dose=one.dose * float(kept))
    together = {layer: _together(some) for layer, some in pulls.items()}
    return Plan(policy.name, tuple(acting), dict(zip(layers, deltas.unbind(1), strict=True)), reading, together)


def stacked(steps: Sequence[Mapping[int, torch.Tensor]], layers: Sequence[int], width: int) -> torch.Tensor:
    """The steps of each category at `layers`, fp32 `[categories, layers, width]`; zero where a category does not act."""
    together = torch.zeros(len(steps), len(layers), width)
    for row, own in zip(together, steps, strict=True):
        for place, layer in enumerate(layers):
            if layer in own:
                row[place] = own[layer]
    return together


def composed(rates: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Deltas: cap_l x sum over c of rate_c x step_{c, l}, no longer than the longest of its members.

    `rates` `[..., categories]` and `steps` `[categories, layers, width]` give deltas `[..., layers, width]` and caps
    `[..., layers]`, on the device where those are.
    """
    sums = (rates @ steps.flatten(1)).reshape(*rates.shape[:-1], *steps.shape[1:])
    longest = (rates.abs().unsqueeze(-1) * steps.norm(dim=2)).amax(dim=-2)
    norms = sums.norm(dim=-1)
    # A single member is as long as itself, but for rounding.
    caps = torch.where(norms > (1 + ROUNDING) * longest, longest / norms, 1.0)
    return sums * caps.unsqueeze(-1), caps


def _together(pulls: Sequence[Pull]) -> Pull:
    """The pulls of several categories on one layer as one: the largest rate and the mean target of each neuron."""
    if len(pulls) == 1:
        return pulls[0]
    indices, where = torch.cat([one.indices for one in pulls]).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    given = torch.cat([one.rates for one in pulls], dim=1)
    rates = torch.zeros(4, len(indices)).scatter_reduce(1, where.expand(4, -1), given, "amax", include_self=False)
    targets = torch.zeros(len(indices)).scatter_reduce(
        0, where, torch.cat([one.targets for one in pulls]), "mean", include_self=False
    )
    return Pull(indices, rates, targets)
