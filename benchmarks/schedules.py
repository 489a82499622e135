"""Does a dose that falls while the answer is written do better than a constant one? Tune split, offline judge.

    python benchmarks/schedules.py BANK --out FILE.jsonl

Each harmful prompt is steered by its own category, always on. Of the generated token t (from 0) the step is multiplied by

    half H    2 ** (-t / H)
    first N   1 for t < N, then 0

Prints a line for each dose and schedule; those that FILE holds are not run again.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import safesteer
from outcomes import with_dose
from safesteer.engines import GenerationSettings, Request, generate, steering
from safesteer.judges.base import Exchange
from safesteer.judges.offline import OfflineJudge
from safesteer.policy import Policy
from safesteer.prompts import builtin

SCHEDULES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "constant": torch.ones_like,
    **{f"half {h}": lambda t, h=h: 2.0 ** (-t / h) for h in (16, 32, 64)},
    **{f"first {n}": lambda t, n=n: (t < n).float() for n in (4, 16, 32)},
}


def scheduled(factor: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Patch the hooks so that what a generated token is moved by is scaled; returns what undoes it."""
    before, block = steering.Hooks._before, steering.Hooks._block_hook

    def _before(self: Any, module: Any, arguments: Any, keywords: Any) -> None:
        before(self, module, arguments, keywords)
        if self._kinds is not None:
            cache = keywords.get("past_key_values")
            first = int(cache.get_seq_length()) if cache is not None else 0
            time = torch.arange(first, first + self._kinds.shape[1]) - self._prompt_width
            self._scale = torch.where(self._kinds == steering.GENERATED, factor(time.clamp_min(0).float()), 1.0)

    def _block_hook(self: Any, layer: int) -> Any:
        def hook(_module: Any, _arguments: Any, output: Any) -> Any:
            delta = self._deltas.get(layer)
            if delta is None or self._kinds is None:
                return None
            hidden = steering.hidden_of(output)
            self._reached[layer] = True
            added = delta[self._rows.unsqueeze(1), self._kinds] * self._scale.unsqueeze(-1)
            return steering.with_hidden(output, hidden + added.reshape(hidden.shape))

        return hook

    steering.Hooks._before, steering.Hooks._block_hook = _before, _block_hook  # type: ignore[method-assign]

    def undo() -> None:
        steering.Hooks._before, steering.Hooks._block_hook = before, block  # type: ignore[method-assign]

    return undo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank")
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--try", dest="tries", nargs="+", default=None, help="DOSE:SCHEDULE")
    given = parser.parse_args()
    loaded, bank, judge = safesteer.load_model("embedded"), safesteer.VectorBank.load(given.bank), OfflineJudge()
    prompts = [one for name in bank.categories for one in builtin(name).split("tune")]
    constant = [f"{dose}:constant" for dose in ("0.26", "0.28", "0.30", "0.32")]
    falling = [f"{dose}:{name}" for name in SCHEDULES if name != "constant" for dose in (0.26, 0.32)]
    tries = given.tries or constant + falling
    out = Path(given.out)
    done = {json.loads(line)["try"] for line in out.read_text().splitlines()} if out.exists() else set()
    for one in tries:
        if one in done:
            continue
        dose, name = one.split(":")
        used = with_dose(bank, float(dose), None)
        requests = [Request(p.text, Policy.of({p.category or "": 1.0}, gate="always")) for p in prompts]
        undo = scheduled(SCHEDULES[name])
        try:
            responses = generate(loaded, used, requests, GenerationSettings(given.tokens))
        finally:
            undo()
        rows = [(p.text, r.text) for p, r in zip(prompts, responses, strict=True)]
        counts = Counter(said.outcome for said in judge.judge([Exchange(*row) for row in rows]))
        line = {"try": one, "n": len(rows), **{k: round(v / len(rows), 3) for k, v in sorted(counts.items())}}
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
