"""What a smaller false-alarm rate gains on harmless prompts, and what it costs on harmful ones. Test split, offline judge.

    python benchmarks/frontier.py BANK --out FILE.jsonl

Every prompt is answered twice: unsteered, and with the gate open whatever it reads (the categories are the ones it names). A gate
with another threshold gives each prompt one of these two answers, so the outcomes at every threshold follow without another word
(but for the few prompts between closed and open). Thresholds are fitted as `safesteer fit --false-alarm` does, on the fit split.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import safesteer
from safesteer.engines import GenerationSettings, Request, generate
from safesteer.judges.base import OUTCOMES, Exchange
from safesteer.judges.offline import OfflineJudge
from safesteer.policy import Policy
from safesteer.prompts import builtin, harmless_pool, soundalikes
from safesteer.vectors import FitSettings, fitting

RATES = (0.02, 0.05, 0.1, 0.2, 0.3)


def thresholds(loaded: safesteer.LoadedModel) -> dict[float, float]:
    """The risk at which a gate begins to open, for each rate."""
    found: dict[float, float] = {}
    one = fitting._gate

    def every(rows: Any, turns: Any, chosen: Any) -> Any:
        for rate in RATES:
            found[rate] = one(rows, turns, replace(chosen, false_alarm=rate)).low
        return one(rows, turns, chosen)

    fitting._gate = every
    try:
        fitting.fit(loaded, settings=FitSettings(dose=0.26, position="last"))
    finally:
        fitting._gate = one
    return found


def main() -> None:
    """Answer, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank")
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    loaded, bank, judge = safesteer.load_model("embedded"), safesteer.VectorBank.load(given.bank), OfflineJudge()
    assert bank.gate is not None
    opened = replace(bank, gate=replace(bank.gate, low=-1000.0, high=-999.0))
    kinds = {
        "harmful": [one.text for name in bank.categories for one in builtin(name).split("test")],
        "soundalike": [one.text for one in soundalikes().split("test")],
        "pool": [one.text for one in harmless_pool().split("test")],
    }
    out = Path(given.out)
    rows: list[dict[str, Any]] = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for kind, texts in kinds.items():
        if any(row["kind"] == kind for row in rows):
            continue
        how = GenerationSettings(given.tokens)
        plain = generate(loaded, bank, [Request(text, Policy.off()) for text in texts], how)
        moved = generate(loaded, opened, [Request(text) for text in texts], how)
        said = [judge.judge([Exchange(t, r.text) for t, r in zip(texts, some, strict=True)]) for some in (plain, moved)]
        for text, a, b, before, after in zip(texts, plain, moved, *said, strict=True):
            risk = b.steering["reading"]["risk"]
            same = a.text == b.text
            row = {"kind": kind, "prompt": text, "risk": risk, "same": same, "off": before.outcome, "on": after.outcome}
            rows.append(row)
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    for rate, low in thresholds(loaded).items():
        line: dict[str, Any] = {"false_alarm": rate, "low": round(low, 3)}
        for kind in kinds:
            own = [row for row in rows if row["kind"] == kind]
            is_open = [row["risk"] > low for row in own]
            line[f"{kind}_opened"] = round(sum(is_open) / len(own), 3)
            if kind == "harmful":
                counts = Counter(row["on" if o else "off"] for row, o in zip(own, is_open, strict=True))
                line |= {name: round(counts[name] / len(own), 3) for name in OUTCOMES}
            else:
                same = sum(not o or row["same"] for row, o in zip(own, is_open, strict=True))
                line[f"{kind}_identical"] = round(same / len(own), 3)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
