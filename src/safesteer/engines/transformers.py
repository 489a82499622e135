"""Steering `model.generate` and `model(...)` of a plain transformers model, inside a `with` block.

    with Steerer(loaded, bank):                  the bank's default policy, for every row
    with Steerer(loaded, bank, policy):          one policy for every row
    with Steerer(loaded, bank, [p0, p1, ...]):   row i of each batch by p_i

Gated policies read the prompt first: one pass up to the gate's last layer, before the request. Rows whose gates stay closed
get exactly what the unsteered model computes; rows whose gates open are steered from their first token on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from safesteer.activations import pad, run_until
from safesteer.engines.caches import cache_of, tokens_in
from safesteer.engines.steering import Hooks
from safesteer.errors import SteeringError
from safesteer.models import EncodedPrompt, LoadedModel
from safesteer.models.chat import TurnMarkers, turn_markers, turn_start
from safesteer.policy import Plan, Policy, plan
from safesteer.vectors import Reading, VectorBank

_MARK = "_safesteer_steerer"  # set on a model's instance while it is steered


class Steerer:
    """A policy (or one a row) bound to a model. A context manager; leaving it restores the model exactly.

    Raises `FingerprintMismatchError` for a bank of another model (unless `force`), and the errors of `Policy.resolved`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        bank: VectorBank,
        policy: Policy | Sequence[Policy] | None = None,
        *,
        force: Collection[str] = (),
    ) -> None:
        bank.check(loaded, force)
        self.loaded = loaded
        self.bank = bank
        self.plans: tuple[Plan, ...] = ()
        """What acted on each row of the latest request."""
        self._policies: tuple[Policy, ...] = ()
        self._hooks = Hooks(loaded.layout, bank.site, neurons=bank.neurons is not None)
        self._markers = turn_markers(loaded.tokenizer) if bank.gate is not None else TurnMarkers()
        self._cached: int | None = None  # tokens a cache must hold to continue the present request; None: no request
        self._cache: Callable[[], Any] | None = None  # gives that cache, once it was seen
        self._own_generate: Any = None  # a `generate` that stood on the model's instance before ours
        self._inside_generate = False
        self._reading = False
        self._handles: list[Any] = []
        self.assign(policy)

    def assign(self, policy: Policy | Sequence[Policy] | None) -> None:
        """Give the policy of the next requests: one for all rows, or one a row. None: the bank's default."""
        if policy is None:
            policy = Policy.default(self.bank)
        policies = (policy,) if isinstance(policy, Policy) else tuple(policy)
        if not policies:
            raise SteeringError("the list of policies is empty; give one a row")
        self._policies = tuple(one.resolved(self.bank) for one in policies)
        self._cached = None
        self.plans = ()
        self._hooks.set_deltas({})

    # -- the gate ------------------------------------------------------------------------------------------------------

    def read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> list[Reading]:
        """Read the risk of each prompt of a batch `[rows, tokens]`, padded on either side."""
        gate = self.bank.gate
        if gate is None:
            raise SteeringError("the bank has no gate")
        masks = [[1] * input_ids.shape[1]] * len(input_ids) if attention_mask is None else attention_mask.tolist()
        prompts = []
        for row, real in zip(input_ids.tolist(), masks, strict=True):
            own = tuple(token for token, is_real in zip(row, real, strict=False) if is_real) or (row[0],)
            prompts.append(EncodedPrompt(own, turn_start(own, self._markers), len(own)))
        # Padded on the right, whatever was given: positions then count from 0 in every model.
        ids, mask = pad(prompts, self.loaded.pad_id, "right")
        spans = [(prompt.content_start, prompt.content_end) for prompt in prompts]
        views: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

        def tap(slot: int) -> Any:
            def keep(hidden: torch.Tensor) -> None:
                views[slot] = gate.view(slot, hidden, spans)

            return keep

        taps = [(self.loaded.layout.blocks[layer], tap(slot)) for slot, layer in enumerate(gate.layers)]
        self._reading = True
        try:
            device = input_ids.device
            run_until(self.loaded, max(gate.layers), taps, input_ids=ids.to(device), attention_mask=mask.to(device))
        finally:
            self._reading = False
        return [
            gate.conclude([views[slot][row] for slot in range(len(gate.layers))], first)
            for row, (first, _) in enumerate(spans)
        ]

    def _prepare(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
        """Read the prompts where a policy asks for it, decide, and hand the deltas to the hooks."""
        rows = None if input_ids is None else input_ids.shape[0]
        policies = self._policies
        if len(policies) == 1 and rows is not None:
            policies = policies * rows
        elif rows is not None and len(policies) != rows:
            raise SteeringError(
                f"the batch has {rows} rows but {len(policies)} policies were given; give one policy a row"
            )
        readings: list[Reading | None] = [None] * len(policies)
        gated = [index for index, policy in enumerate(policies) if policy.gated]
        if gated:
            if input_ids is None:
                raise SteeringError("a gated policy needs input_ids to read; use gate: always with inputs_embeds")
            self._hooks.set_deltas({})
            chosen = torch.tensor(gated, device=input_ids.device)
            mask = None if attention_mask is None else attention_mask[chosen]
            for index, reading in zip(gated, self.read(input_ids[chosen], mask), strict=True):
                readings[index] = reading
        self.plans = tuple(plan(policy, self.bank, reading) for policy, reading in zip(policies, readings, strict=True))
        self._hooks.set_plans(self.plans)

    # -- the context ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Steerer:
        model = self.loaded.model
        if getattr(model, _MARK, None) is not None:
            raise SteeringError(
                "this model is being steered already; leave that context first, or use one policy a row"
            )
        original = model.generate

        def generate(inputs: Any = None, *arguments: Any, **keywords: Any) -> Any:
            input_ids = keywords.get("input_ids", inputs)
            mask = keywords.get("attention_mask")
            if mask is None and input_ids is not None:
                config = keywords.get("generation_config", arguments[0] if arguments else None)
                mask = self._inferred_mask(input_ids, config, keywords)
            embeds = keywords.get("inputs_embeds")
            width = input_ids.shape[1] if input_ids is not None else None
            if embeds is not None:
                width = embeds.shape[1]
            self._prepare(input_ids, mask)
            if tokens_in(cache_of(keywords)) != 0 and self._hooks.steers:
                raise SteeringError(
                    "generate was given a filled KV cache, whose tokens cannot be steered; pass the prompt alone"
                )
            self._hooks.begin_request(width)
            self._inside_generate = True
            try:
                return original(inputs, *arguments, **keywords)
            finally:
                self._inside_generate = False
                self._cached = None
                self._hooks.begin_request(None)

        try:
            decoder = self.loaded.layout.decoder
            self._handles.append(decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True))
            self._handles.append(decoder.register_forward_hook(self._after_forward))
            self._hooks.install()
            self._own_generate = model.__dict__.get("generate")
            object.__setattr__(model, "generate", generate)
            object.__setattr__(model, _MARK, self)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        self._hooks.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name in ("generate", _MARK):
            self.loaded.model.__dict__.pop(name, None)
        if self._own_generate is not None:
            object.__setattr__(self.loaded.model, "generate", self._own_generate)
            self._own_generate = None
        self._cached = None

    def _inferred_mask(self, input_ids: torch.Tensor, given: Any, keywords: dict[str, Any]) -> torch.Tensor | None:
        """The attention mask that `generate` infers where none is given: padding, unless it is also the end token.

        What these tokens are, its keywords say before the configuration `given` to it, and that before the model's own.
        """
        known: dict[str, Any] = {}
        for config in (self.loaded.model.generation_config, given):
            known |= {} if config is None else {name: one for name, one in config.to_dict().items() if one is not None}
        known |= keywords
        pad, ends = known.get("pad_token_id"), known.get("eos_token_id")
        if pad is None or pad in (ends if isinstance(ends, list) else [ends]) or not bool((input_ids == pad).any()):
            return None
        present: torch.Tensor = input_ids != pad
        return present.long()

    def _before_forward(self, _module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """A forward pass outside `generate`: with an empty cache a new request, else the next token of the present one."""
        if self._inside_generate or self._reading:
            return
        input_ids, mask, tokens = self._hooks.inputs(arguments, keywords)
        count = tokens.shape[1]
        cache = cache_of(keywords)
        if tokens_in(cache) != 0:
            self._continue(cache, count)
            return
        given = self._hooks.given or keywords  # a multimodal model makes masks of its own for its decoder
        if mask is None and given.get("attention_mask") is not None and any(one.gated for one in self._policies):
            raise SteeringError("a gated policy needs a 2-D attention mask to find the end of each prompt")
        self._prepare(input_ids, mask)
        self._cached, self._cache = count, None

    def _after_forward(self, _module: Any, _arguments: Any, output: Any) -> None:
        """Remember the cache of the present request."""
        if self._cached is not None and not self._inside_generate and not self._reading and isinstance(output, Mapping):
            cache = cache_of(output)
            try:
                self._cache = weakref.ref(cache)
            except TypeError:  # RWKV's is a list; no cache at all is None
                self._cache = lambda: cache

    def _continue(self, cache: Any, count: int) -> None:
        """Check that a pass with a filled cache goes on with the request that was read, one token a row."""
        if not any(how.strength for policy in self._policies for how in policy.categories.values()):
            return
        known = self._cache() if self._cache is not None else cache
        if self._cached is None or known is not cache or tokens_in(cache) not in (self._cached, None):
            raise SteeringError("the KV cache was filled before steering began; enter the context before the prefill")
        if count != 1:
            raise SteeringError(
                "several tokens came with a filled KV cache, unread; use generate, or prefill in one pass"
            )
        self._cached += count
