"""How far two banks of one model are apart, such as those that two engines fitted.

    safesteer fit embedded --out here.safetensors
    safesteer fit embedded --out there.safetensors --engine vllm
    python benchmarks/same_bank.py here.safetensors there.safetensors

Prints ||a - b|| / ||a|| of each tensor of the bank and of its gate, the gates' thresholds (standard deviations), and the doses.
"""

from __future__ import annotations

import argparse
import json

from safesteer.vectors import VectorBank

GATE = ("centres", "weights", "biases", "token_weights", "token_bias", "calm", "floors")


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("banks", nargs=2)
    one, other = map(VectorBank.load, parser.parse_args().banks)
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in ("directions", "doses", "residual_norms")}
    found: dict[str, object] = {}
    if one.gate is not None and other.gate is not None:
        pairs |= {f"gate.{name}": (getattr(one.gate, name), getattr(other.gate, name)) for name in GATE}
        found |= {"gate.low": (one.gate.low, other.gate.low), "gate.high": (one.gate.high, other.gate.high)}
    far = {name: float(f"{float((a - b).norm() / a.norm()):.2g}") for name, (a, b) in pairs.items()}
    doses = [max(bank.dose(name) for name in bank.categories) for bank in (one, other)]
    print(json.dumps({**far, **found, "dose": doses, "model": one.model.differences(other.model)}, indent=1))


if __name__ == "__main__":
    main()
