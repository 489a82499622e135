"""How well a bank's gate reads the tune split, as written and in the wrappers of the jailbreak suite (docs/method.md).

    python benchmarks/gate.py bank.safetensors      # about three minutes on two cores

Every fourth harmful prompt and every fifth harmless one stand in each wrapper.
"""

from __future__ import annotations

import sys

import torch

import safesteer
from safesteer.activations import batches_by_length, pad
from safesteer.engines import Steerer
from safesteer.evaluation.jailbreak import WRAPPERS
from safesteer.models import encode
from safesteer.prompts import builtin, harmless_pool, soundalikes
from safesteer.vectors import Reading
from safesteer.vectors.gate import auroc


@torch.inference_mode()
def read(steerer: Steerer, texts: list[str]) -> list[Reading]:
    """The readings of some prompts, in their order."""
    encoded = [encode(steerer.loaded.tokenizer, text) for text in texts]
    found: dict[int, Reading] = {}
    for batch in batches_by_length(encoded):
        ids, mask = pad([encoded[index] for index in batch], steerer.loaded.pad_id, "left")
        found.update(zip(batch, steerer.read(ids, mask), strict=True))
    return [found[index] for index in range(len(texts))]


def main() -> None:
    bank = safesteer.VectorBank.load(sys.argv[1])
    steerer = Steerer(safesteer.load_model("embedded"), bank)
    harmful = [(p.text, name) for name in bank.categories for p in builtin(name).split("tune")]
    calm = {
        "pool": harmless_pool().split("tune").texts,
        "sound-alikes": soundalikes().split("tune").texts,
        "counterparts": [p.matched for name in bank.categories for p in builtin(name).split("tune") if p.matched],
    }
    readings = read(steerer, [text for text, _ in harmful])
    risk = torch.tensor([one.risk for one in readings])
    named = sum(name in one.categories for one, (_, name) in zip(readings, harmful, strict=True)) / len(harmful)
    print(f"harmful: opens for {(risk > bank.gate.low).float().mean():.1%}, reads the right category in {named:.0%}")
    plain = {name: torch.tensor([one.risk for one in read(steerer, list(texts))]) for name, texts in calm.items()}
    for name, found in plain.items():
        print(f"{name}: AUROC {auroc(risk, found):.3f}, opens for {(found > bank.gate.low).float().mean():.1%}")
    texts = [text for text, _ in harmful]
    wrapped: dict[str, dict[str, torch.Tensor]] = {}
    for number, wrapper in enumerate(WRAPPERS):
        some = {"harmful": texts[number % 4 :: 4], "harmless": [*calm["pool"], *calm["sound-alikes"]][number % 5 :: 5]}
        wrapped[wrapper.name] = {
            kind: torch.tensor([one.risk for one in read(steerer, [wrapper(text) for text in group])])
            for kind, group in some.items()
        }
    readable = [found for name, found in wrapped.items() if name not in ("base64", "leetspeak")]
    for label, group in (("wrapped", list(wrapped.values())), ("readable wrapped", readable)):
        bad, good = (torch.cat([one[kind] for one in group]) for kind in ("harmful", "harmless"))
        against = auroc(bad, torch.cat([plain["pool"], plain["sound-alikes"]]))
        opened = [f"{(one > bank.gate.low).float().mean():.1%}" for one in (bad, good)]
        print(
            f"{label}: opens for {opened[0]} of harmful and {opened[1]} of harmless prompts, AUROC {auroc(bad, good):.3f}, "
            f"against plain harmless ones {against:.3f}"
        )


if __name__ == "__main__":
    main()
