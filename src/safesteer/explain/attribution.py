"""Where a gate's reading comes from, component by component and token by token; it adds up.

    risk = sum over components k of contribution_k + constant  =  sum over tokens t of share_t + offset

    h_l(t)  = embedding(t) + sum over blocks m <= l of (attention_m(t) + mlp_m(t))        the residual stream after block l
    n_l(t)  = (h_l(t) / |h_l(t)| - mean_l) / r_l(t)                                       what the gate reads of it
    risk    = log(exp(z_a) + exp(z_b)) = p_a z_a + p_b z_b - p_a log p_a - p_b log p_b,   p = softmax(z_a, z_b)
            = sum over t, l of q_l(t) . n_l(t) + offset

z_a (ending) and z_b (strongest passage) are linear in n, so q_l(t) is a fixed vector once p and the place of the passage are
known (see `vectors.gate`). With the lengths |h| and r held at what they are for this prompt, n is linear in h, and so in the
components: contribution_k = sum over t, l of q_l(t) . k(t) / (|h_l(t)| r_l(t)), over the layers l that k comes before.

What counts as a component is what is added to the stream, after any norm or multiplier of its own. A block is split into
attention and MLP only where input + attention + MLP is its output, to rounding; else it is one component.

The split is exact but it is an account, not an experiment: without a component the lengths, p and everything after it would
change too. And large contributions may cancel: what all prompts share is in the components, and is taken off again in the
constant, which holds the gate's means. `less` takes another prompt's account off, so that what they share goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from safesteer.activations import run_until
from safesteer.errors import SafeSteerError
from safesteer.explain.lens import token_texts
from safesteer.models import Conversation, LoadedModel, encode_all
from safesteer.models.chat import turn_markers, turn_start
from safesteer.vectors import Gate, VectorBank
from safesteer.vectors.gate import TAIL, WINDOW

ComponentKind = Literal["embedding", "attention", "mlp", "block", "rounding"]

TOLERANCE = 1e-4  # of the risk (of 1, where it is smaller), within which the sum must hold
ROUNDINGS = 4.0  # of the parts' lengths, within which input + attention + MLP must be the output of a block
MINOR = 0.1  # of what a block adds, the most that rounding may take of it at most tokens

Watcher = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Component:
    """What one part of the model adds to the risk, in standard deviations of harmless prompts.

    `layer` is the block (0-based), None for `embedding` (what enters the first block) and `rounding` (what the model's own
    rounding took or gave in its sums). `by_token`: the same for each token read, of which `contribution` is the sum.
    """

    name: str
    kind: ComponentKind
    layer: int | None
    contribution: float
    by_token: tuple[float, ...]


@dataclass(frozen=True)
class TokenShare:
    """A token read, and its `share` of the risk: q(t) . n(t), zero where it is in neither the ending nor the passage."""

    text: str
    id: int
    share: float


@dataclass(frozen=True)
class Parts:
    """The two readings that a risk joins, in standard deviations of harmless prompts, and the share of each in it.

    The strongest passage is the tokens `first` to `last`, both included, counted from the first token read.
    """

    ending: float
    passage: float
    ending_share: float
    passage_share: float
    first: int
    last: int


@dataclass(frozen=True)
class Attribution:
    """An account of one reading: contributions and `constant` sum to `risk`, and so do token shares and `offset`.

    `first` is the position of the first token read, in the whole prompt. `note` says what could not be told apart.
    """

    risk: float
    components: tuple[Component, ...]
    constant: float
    tokens: tuple[TokenShare, ...]
    offset: float
    parts: Parts
    first: int
    note: str = ""

    def by_layer(self) -> list[dict[str, float]]:
        """For each block read, its contribution by kind: `layer`, `attention`, `mlp` and `block` (what was not split)."""
        rows: dict[int, dict[str, float]] = {}
        for one in self.components:
            if one.layer is not None:
                row = rows.setdefault(one.layer, {"layer": one.layer, "attention": 0.0, "mlp": 0.0, "block": 0.0})
                row[one.kind] += one.contribution
        return [rows[layer] for layer in sorted(rows)]

    def less(self, others: Sequence[Attribution]) -> dict[str, float]:
        """Contribution by name (and `constant`), less its mean over `others`: they sum to the difference of the risks.

        Raises `SafeSteerError` for no others, or for others of another model or gate.
        """
        mine = self._by_name()
        if not others or any(other._by_name().keys() != mine.keys() for other in others):
            raise SafeSteerError(
                "accounts can be compared only with others of the same model and bank; give at least one"
            )
        return {
            name: value - sum(other._by_name()[name] for other in others) / len(others) for name, value in mine.items()
        }

    def _by_name(self) -> dict[str, float]:
        return {**{one.name: one.contribution for one in self.components}, "constant": self.constant}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@torch.inference_mode()
def attribute(
    loaded: LoadedModel,
    bank: VectorBank,
    prompt: Conversation,
    *,
    system: str | None = None,
    force: Collection[str] = (),
) -> Attribution:
    """Account for the risk that the gate of `bank` reads in `prompt`, by two passes up to the gate's last layer.

    Raises `SafeSteerError` where the bank has no gate or the sum does not hold, `FingerprintMismatchError` for a bank of
    another model (unless `force`).
    """
    bank.check(loaded, force)
    gate = gate_of(bank)
    ids = encode_all(loaded, [prompt], system)[0].ids
    first = turn_start(ids, turn_markers(loaded.tokenizer))
    states: dict[int, torch.Tensor] = {}
    views = gate_views(loaded, gate, ids, [(first, len(ids))], states)[0]
    reading = gate.conclude(views, first)
    parts = parts_of(gate, views)
    pulls = _Pulls(gate, parts, torch.stack([states[slot][first:] for slot in range(len(gate.layers))]))
    walk = _Walk(loaded, pulls, first, max(gate.layers))
    walk.run(ids)
    texts = token_texts(loaded.tokenizer, ids[first:])
    shares = pulls.shares.tolist()
    attribution = Attribution(
        reading.risk,
        tuple(walk.components()),
        pulls.offset + float(pulls.centres.sum()),
        tuple(TokenShare(text, index, share) for text, index, share in zip(texts, ids[first:], shares, strict=True)),
        pulls.offset,
        parts,
        first,
        walk.note(),
    )
    sums = {
        "components": sum(one.contribution for one in attribution.components) + attribution.constant,
        "tokens": math.fsum(shares) + attribution.offset,
    }
    for name, total in sums.items():
        if not abs(total - reading.risk) <= TOLERANCE * max(1.0, abs(reading.risk)):
            raise SafeSteerError(
                f"the {name} sum to {total:.6f} but the gate reads {reading.risk:.6f}, so this model's risk cannot be "
                "accounted for; please report its architecture"
            )
    return attribution


def gate_of(bank: VectorBank) -> Gate:
    """The bank's gate. Raises `SafeSteerError` where it has none."""
    if bank.gate is None:
        raise SafeSteerError("the bank has no gate, so there is no reading to explain; fit one with a gate")
    return bank.gate


@torch.inference_mode()
def gate_views(
    loaded: LoadedModel,
    gate: Gate,
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    states: dict[int, torch.Tensor] | None = None,
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """`Gate.view` at each of its layers in turn, for each of several spans (first, end) of one sequence, in one unsteered pass.

    Where `states` is given, it gets the residual stream of each layer, fp32 `[tokens, width]` on the CPU, by its place.
    """
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def tap(slot: int) -> Watcher:
        def keep(hidden: torch.Tensor) -> None:
            seen[slot] = [gate.view(slot, hidden, [span])[0] for span in spans]
            if states is not None:
                states[slot] = hidden[0].float().cpu()

        return keep

    taps = [(loaded.layout.blocks[layer], tap(slot)) for slot, layer in enumerate(gate.layers)]
    run_until(loaded, max(gate.layers), taps, input_ids=torch.tensor([list(ids)], device=loaded.device))
    return [[seen[slot][index] for slot in range(len(gate.layers))] for index in range(len(spans))]


def parts_of(gate: Gate, views: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Parts:
    """What `Gate.conclude` joins into the risk of a prompt, from the same `views`."""
    risk_and_topics, scores = gate.project(views)
    size = min(WINDOW, len(scores))
    means = scores.unfold(0, size, 1).mean(dim=-1)
    begin = int(means.argmax())
    both = torch.stack([risk_and_topics[0], means[begin]])
    z = (both - gate.calm[:, 0]) / gate.calm[:, 1]
    shares = torch.softmax(z, dim=0).tolist()
    return Parts(float(z[0]), float(z[1]), shares[0], shares[1], begin, begin + size - 1)


class _Pulls:
    """How a gate pulls on each layer's residual stream at each token, for one prompt: risk = sum of pull . h + constant.

    `of[l]` is q_l(t) / (|h_l(t)| r_l(t)), fp64 `[tokens, width]` on the CPU; `centres`: what the gate's means take off at each
    layer and token; `shares`: q(t) . n(t) of each token; `offset`: what no token has a part in.
    """

    def __init__(self, gate: Gate, parts: Parts, states: torch.Tensor) -> None:
        states = states.double()
        slots, count, width = states.shape
        tail, size = min(TAIL, count), parts.last - parts.first + 1
        (calm_ending, scale_ending), (calm_passage, scale_passage) = gate.calm.double().tolist()
        ending, passage = parts.ending_share / scale_ending, parts.passage_share / scale_passage
        at_last, at_tail = gate.weights[0].double().reshape(2, slots, width)
        q = torch.zeros_like(states)
        q[:, -1] += ending * at_last
        q[:, -tail:] += ending / tail * at_tail.unsqueeze(1)
        q[:, parts.first : parts.last + 1] += passage / size * gate.token_weights.double().unsqueeze(1)
        means = gate.centres.double().unsqueeze(1)
        lengths = states.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        centred = states / lengths - means
        spans = centred.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        self.layers = gate.layers
        self.of = q / (lengths * spans)
        self.centres = -(q * means / spans).sum(dim=-1)
        self.shares = (q * centred / spans).sum(dim=(0, 2))
        entropy = -sum(share * math.log(share) for share in (parts.ending_share, parts.passage_share) if share > 0)
        self.offset = (
            ending * (float(gate.biases[0]) - calm_ending) + passage * (float(gate.token_bias) - calm_passage) + entropy
        )

    def from_block(self, layer: int) -> torch.Tensor:
        """fp64 `[tokens, width]`: the pull on what block `layer` adds, over all layers read at or after it."""
        after = [slot for slot, read in enumerate(self.layers) if read >= layer]
        return torch.sum(self.of[after], dim=0)


class _Walk:
    """Hooks that project what enters the first block, and what each block adds, on the gate's pulls while one prompt runs."""

    def __init__(self, loaded: LoadedModel, pulls: _Pulls, first: int, last_layer: int) -> None:
        self.loaded = loaded
        self.pulls = pulls
        self.first = first
        self.last_layer = last_layer
        self._found: list[tuple[ComponentKind, int | None, torch.Tensor]] = []
        self._rounding = torch.zeros(pulls.shares.shape, dtype=torch.float64)
        self._whole: list[int] = []
        self._input: torch.Tensor | None = None
        # What each site put out, and then each module that took exactly that in: a norm, a dropout.
        self._chains: dict[str, list[torch.Tensor]] = {}

    def run(self, ids: Sequence[int]) -> None:
        layout = self.loaded.layout
        handles = []
        try:
            for layer in range(self.last_layer + 1):
                block = layout.blocks[layer]
                handles.append(block.register_forward_pre_hook(self._enter(layer), with_kwargs=True))
                for child in block.children():
                    sites = [site for site in ("attention", "mlp") if self._is_site(child, site, layer)]
                    handles.append(child.register_forward_hook(self._child(sites), with_kwargs=True))
                handles.append(block.register_forward_hook(self._leave(layer)))
            run_until(self.loaded, self.last_layer, [], input_ids=torch.tensor([list(ids)], device=self.loaded.device))
        finally:
            for handle in handles:
                handle.remove()

    def components(self) -> list[Component]:
        """What was found, in the order of the pass, and the rounding last."""
        found: list[tuple[ComponentKind, int | None, torch.Tensor]] = [*self._found, ("rounding", None, self._rounding)]
        return [
            Component(
                kind if layer is None else f"{kind} {layer}", kind, layer, float(values.sum()), tuple(values.tolist())
            )
            for kind, layer, values in found
        ]

    def note(self) -> str:
        """Which blocks could not be split; empty if all were."""
        if not self._whole:
            return ""
        blocks = ", ".join(map(str, self._whole))
        return f"attention and MLP were not told apart in the blocks {blocks}: what they put out is not what is added"

    def _is_site(self, module: torch.nn.Module, site: str, layer: int) -> bool:
        modules = self.loaded.layout.attention if site == "attention" else self.loaded.layout.mlp
        return bool(modules) and modules[layer] is module

    def _project(self, added: torch.Tensor, layer: int) -> torch.Tensor:
        return (added * self.pulls.from_block(layer)).sum(dim=-1)

    def _kept(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp64 `[tokens read, width]` on the CPU; a copy, for a module after it may add to it in place."""
        return hidden.detach().reshape(-1, hidden.shape[-1])[self.first :].cpu().double()

    def _enter(self, layer: int) -> Any:
        def hook(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            hidden = _first_tensor((*arguments, keywords.get("hidden_states")))
            if hidden is None:
                raise SafeSteerError(f"block {layer} was called without hidden states, so its part cannot be told")
            self._input = self._kept(hidden)
            self._chains = {"attention": [], "mlp": []}
            if layer == 0:
                self._found.append(("embedding", None, self._project(self._input, 0)))

        return hook

    def _child(self, sites: Sequence[str]) -> Any:
        def hook(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            put_out = _first_tensor(output if isinstance(output, tuple | list) else (output,))
            if put_out is None or put_out.shape[-1] != self.loaded.layout.width:
                return
            for site in sites:
                self._chains[site] = [self._kept(put_out)]
            if sites:
                return
            taken = _first_tensor((*arguments, keywords.get("hidden_states")))
            for chain in self._chains.values():
                if chain and taken is not None and taken.shape[-1] == put_out.shape[-1]:
                    same = self._kept(taken)
                    if same.shape == chain[-1].shape and torch.equal(same, chain[-1]):
                        chain.append(self._kept(put_out))

        return hook

    def _leave(self, layer: int) -> Any:
        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            hidden = _first_tensor(output if isinstance(output, tuple | list) else (output,))
            if hidden is None or self._input is None:
                raise SafeSteerError(f"block {layer} gave no hidden states, so its part cannot be told")
            added = self._kept(hidden) - self._input
            parts = split(
                self._input, added, self._chains["attention"], self._chains["mlp"], torch.finfo(hidden.dtype).eps
            )
            if parts is None:
                self._whole.append(layer)
                self._found.append(("block", layer, self._project(added, layer)))
                return
            self._found.append(("attention", layer, self._project(parts[0], layer)))
            self._found.append(("mlp", layer, self._project(parts[1], layer)))
            self._rounding += self._project(added - parts[0] - parts[1], layer)

        return hook


def split(
    entered: torch.Tensor,
    added: torch.Tensor,
    attention: Sequence[torch.Tensor],
    mlp: Sequence[torch.Tensor],
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What attention and MLP gave of what a block `added` to what `entered` it, all fp64 `[tokens, width]`; None if not told.

    `attention` and `mlp` are candidates, the likeliest last. A pair is taken if it sums to `added` within the rounding of a
    type whose precision is `epsilon`: as it is, or else each by a factor of its own that is the same for all numbers (some
    models multiply what they add).
    """
    for one in reversed(attention):
        for other in reversed(mlp):
            for first, second in _factors(one, other, added):
                rest = (added - first * one - second * other).norm(dim=-1)
                room = entered.norm(dim=-1) + abs(first) * one.norm(dim=-1) + abs(second) * other.norm(dim=-1)
                minor = rest.median() <= MINOR * added.norm(dim=-1).median()
                if bool((rest <= ROUNDINGS * epsilon * room).all()) and bool(minor):
                    return first * one, second * other
    return None


def _factors(one: torch.Tensor, other: torch.Tensor, added: torch.Tensor) -> Iterator[tuple[float, float]]:
    """1 and 1, and then those that fit best."""
    yield 1.0, 1.0
    pair = torch.stack([one.flatten(), other.flatten()], dim=1)
    first, second = torch.linalg.lstsq(pair, added.flatten().unsqueeze(1)).solution.flatten().tolist()
    yield first, second


def _first_tensor(values: Sequence[Any]) -> torch.Tensor | None:
    """The first tensor of several values, or None."""
    return next((value for value in values if isinstance(value, torch.Tensor)), None)
