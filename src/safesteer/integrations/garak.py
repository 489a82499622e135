"""garak: a function for its `function` generator, the one way in which garak takes a model from another package.

    garak --target_type function.Multiple --target_name safesteer.integrations.garak#respond \
          --generator_options '{"function": {"Multiple": {"kwargs": {"bank": "BANK", "policy": "POLICY"}}}}' ...

garak looks for generator classes in its own package only. Its `function` generator hands over the last message of a
conversation, so probes of several turns lose the earlier ones.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from safesteer.integrations import open_bank

if TYPE_CHECKING:
    from safesteer.integrations import OpenedBank
    from safesteer.models import LoadedModel


@lru_cache(maxsize=1)  # garak calls a function, so there is no object of ours that could hold the model
def _load(bank: str, policy: str, model: str | None) -> tuple[OpenedBank, LoadedModel]:
    opened = open_bank(bank, policy, model)
    return opened, opened.load()


def respond(
    prompt: str,
    generations: int,
    *,
    bank: str,
    policy: str = "default",
    model: str | None = None,
    max_new_tokens: int = 150,
    temperature: float = 0.0,
) -> list[str | None]:
    """`generations` answers to `prompt`; all alike at temperature 0, so ask for one then (`--generations 1`). A thought that
    came to no answer is None, garak's own for no output.

    Raises `SafeSteerError` for a bank, a policy or a model that cannot be used.
    """
    from safesteer.engines import GenerationSettings, Request, generate

    opened, loaded = _load(bank, policy, model)
    settings = GenerationSettings(max_new_tokens, temperature)
    requests = [Request(prompt, opened.policy)] * generations
    responses = generate(loaded, opened.bank if opened.acts else None, requests, settings)
    return [response.text if response.answered else None for response in responses]
