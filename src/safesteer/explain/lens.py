"""What a direction writes: the tokens that it makes more and less likely.

    direct        e(v) = mean over states h of  |h| * u_v . J_h d        less its mean over the vocabulary
    by steering   e(v) = mean over prompts of  log p_steered(v) - log p_unsteered(v),   where v is likely enough to be said

`d` is the direction at unit length, `h` what enters the model's final norm at the last token of some prompts, `J_h` the
Jacobian of that norm there, and `u_v` the row of the unembedding that gives the logit of token v.

`direct` is the logit lens (nostalgebraist 2020) as a derivative: logits per unit of dose, a dose of 1 being a push as long as
the state itself, if the push reached the final norm as it is. It is a linearisation, exact for a small push there and for
nothing else: the blocks between the layer of a direction and the final norm are skipped, and so are a soft cap and a scale
that some models put on their logits. So it names words for directions near the last block, and often little for those in the
middle: compare `z` with `control_z`, and mind that `z` is blunt: in a small model with tied embeddings even a token's own row,
whose lens begins with that token, stands out little more than a random direction does.

`by_steering` skips nothing, but speaks of these prompts and of the first token of an answer alone; and it leaves out tokens
that the model hardly ever says there, steered or not: the logarithm of a tiny probability moves most and means least.

Either names single tokens. A word that the tokenizer splits appears by its first piece at best, and a piece that continues
words stands for no word of its own (`Token.kind`).
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch.func import functional_call, jvp

from safesteer.activations import batches_by_length
from safesteer.engines import Steerer
from safesteer.errors import SafeSteerError, UnsupportedModelError
from safesteer.models import Conversation, LoadedModel, encode_all
from safesteer.next_token import BATCH_TOKENS, next_token
from safesteer.policy import Policy
from safesteer.prompts import harmless_pool
from safesteer.vectors import VectorBank
from safesteer.vectors.controls import randomised

Kind = Literal["word", "piece", "other"]

TYPICAL = 16  # harmless prompts whose final states stand for all
CONTROLS = 20  # random directions beside a direct lens, which cost one product with the unembedding each
STEERED_CONTROLS = 3  # random directions beside a lens by steering, which cost a pass over the prompts each
LEAST = 1e-4  # mean probability under which a token is too rare at the prompts' ends for a lens by steering
ROWS = 8192  # of the unembedding at once in fp32, so that a large one is not copied whole
ALIKE = 0.95  # correlation with the model's own logits, under which the final norm found is not the one it uses

_NORM = re.compile(r"norm|ln_f", re.IGNORECASE)
_WORD_STARTS = ("Ġ", "▁")  # how byte-level BPE and SentencePiece write the space that begins a word
_CONTINUES = "##"  # how WordPiece writes that none does
_UNUSED = re.compile(r"[<\[]\|?(unused|reserved)", re.IGNORECASE)


@dataclass(frozen=True)
class Token:
    """One entry of the vocabulary; `effect` is in the lens's unit.

    `kind`: `word` has a space before it (kept in `text`), `piece` is letters without one, which continue a word or begin a
    line or an answer, `other` is punctuation, digits or white space.
    """

    text: str
    id: int
    effect: float
    kind: Kind


@dataclass(frozen=True)
class Lens:
    """What a direction promotes and suppresses, strongest first.

    `unit` is that of `effect`. `skipped_promotes` and `skipped_suppresses`: how many entries stood among or above those
    shown and are no readable text (special, added or unused tokens, bytes that are half a character).
    `z_promotes` and `z_suppresses`: mean effect of the entries shown, in standard deviations over all `considered` entries,
    from their mean; `control_z_promotes` and `control_z_suppresses` the same of `controls` random directions of equal norm,
    on average: what nothing looks like, for the most extreme of many tokens stand out in any direction.
    `deviation`: one standard deviation, in `unit`; `control_deviation` that of the random directions, how much they move at all.
    """

    promotes: tuple[Token, ...]
    suppresses: tuple[Token, ...]
    unit: str
    skipped_promotes: int
    skipped_suppresses: int
    z_promotes: float
    z_suppresses: float
    controls: int
    control_z_promotes: float
    control_z_suppresses: float
    deviation: float
    control_deviation: float
    considered: int

    @property
    def junk(self) -> float:
        """Share of the top entries, of both ends, that were skipped."""
        skipped = self.skipped_promotes + self.skipped_suppresses
        return skipped / max(1, skipped + len(self.promotes) + len(self.suppresses))

    @property
    def z(self) -> float:
        """How far the top entries stand out, mean of both ends, in standard deviations over those considered."""
        return (self.z_promotes - self.z_suppresses) / 2

    @property
    def control_z(self) -> float:
        """The same of the random directions."""
        return (self.control_z_promotes - self.control_z_suppresses) / 2

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "junk": self.junk, "z": self.z, "control_z": self.control_z}


def direct(
    loaded: LoadedModel,
    direction: torch.Tensor,
    count: int = 12,
    *,
    prompts: Sequence[Conversation] | None = None,
    ending: Ending | None = None,
    controls: int = CONTROLS,
    seed: int = 0,
) -> Lens:
    """The direct lens of `direction` `[width]`, whose length does not matter: the `count` tokens at either end.

    `prompts` give the typical states (default: the first harmless ones that ship); an `ending` made of them before saves reading
    them again. Raises `UnsupportedModelError` where the final
    norm and the unembedding are not found, or do not give the model's own logits; `SafeSteerError` for a direction of
    another width or of length zero.
    """
    vector = direction.detach().float().cpu().flatten()
    if vector.shape[0] != loaded.layout.width or not float(vector.norm()) > 0:
        raise SafeSteerError(
            f"the direction has {vector.shape[0]} numbers and the length {float(vector.norm()):g}; give one that is not "
            f"zero, of the model's width {loaded.layout.width}"
        )
    if ending is None:
        ending = Ending(loaded, list(prompts) if prompts is not None else harmless_pool().texts[:TYPICAL])
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(controls, vector.shape[0], generator=generator)
    effects = ending.effects(torch.cat([vector[None], random]))
    return _lens(loaded, effects, torch.ones_like(effects, dtype=torch.bool), count, "logits per unit of dose")


@torch.inference_mode()
def by_steering(
    loaded: LoadedModel,
    bank: VectorBank,
    category: str,
    prompts: Sequence[Conversation],
    count: int = 12,
    *,
    least: float = LEAST,
    controls: int = STEERED_CONTROLS,
    seed: int = 0,
    force: Collection[str] = (),
) -> Lens:
    """What steering by `category`, always on at strength 1, does to the first token after `prompts`, on average, in nats.

    Of tokens whose mean probability, steered or unsteered, is at least `least`; 0 takes all of them.
    The controls are the same steering by random directions of equal norm. Raises `SafeSteerError` for no prompts, for a
    bank of another model (unless `force`), and for a category that steers generated tokens only, which no prompt shows.
    """
    if not prompts:
        raise SafeSteerError("there are no prompts to steer; give at least one")
    if bank.tokens == "generated":
        raise SafeSteerError("the bank steers generated tokens only, so the first one is the unsteered model's own")
    policy = Policy.of({category: 1.0}, gate="always")
    banks = [bank, *(randomised(bank, seed + index) for index in range(controls))]
    encoded = encode_all(loaded, prompts)
    sums: list[torch.Tensor | float] = [0.0] * len(banks)
    likely: list[torch.Tensor | float] = [0.0] * len(banks)
    unsteered: torch.Tensor | float = 0.0
    for batch in batches_by_length(encoded, BATCH_TOKENS):
        rows = [encoded[index] for index in batch]
        plain = next_token(loaded, rows)
        unsteered = unsteered + plain.exp().sum(dim=0).cpu()
        for slot, one in enumerate(banks):
            with Steerer(loaded, one, policy, force=force):
                steered = next_token(loaded, rows)
            sums[slot] = sums[slot] + (steered - plain).sum(dim=0).cpu()
            likely[slot] = likely[slot] + steered.exp().sum(dim=0).cpu()
    effects = torch.stack([torch.as_tensor(total) / len(encoded) for total in sums])
    steered_likely = torch.stack([torch.as_tensor(total) for total in likely])
    considered = torch.maximum(steered_likely, torch.as_tensor(unsteered)) >= least * len(encoded)
    return _lens(loaded, effects, considered, count, "nats at strength 1")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token in its place: joined they are the text of all, special tokens included.

    A token that ends within a character is given the empty string, and the one that completes it the whole character.
    """

    def decode(some: Sequence[int]) -> str:
        return str(tokenizer.decode(list(some), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts: list[str] = []
    start = read = 0  # tokens `start` to `read` stand before as context: some tokenizers drop a space that leads a text
    for end in range(1, len(ids) + 1):
        before, whole = decode(ids[start:read]), decode(ids[start:end])
        if whole.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(whole[len(before) :])
        start, read = read, end
    return tuple(texts)


class Ending:
    """The final norm and the unembedding of a model, and what enters them at the last token of some prompts."""

    def __init__(self, loaded: LoadedModel, prompts: Sequence[Conversation]) -> None:
        kind = type(loaded.model).__name__
        norms = [
            module
            for name, module in loaded.layout.decoder.named_children()
            if _NORM.search(f"{name} {type(module).__name__}") and "embed" not in name.lower()
        ]
        head = loaded.model.get_output_embeddings()
        if not norms or not isinstance(getattr(head, "weight", None), torch.Tensor):
            missing = "unembedding" if norms else "final norm"
            raise UnsupportedModelError(f"no {missing} was found in {kind}; read its directions by steering instead")
        self.norm: torch.nn.Module = norms[-1]
        self.unembedding: torch.Tensor = head.weight.detach()
        if (
            not self.unembedding.is_floating_point()
            or self.unembedding.is_meta
            or self.unembedding.shape[1] != loaded.layout.width
        ):
            raise UnsupportedModelError(
                f"the unembedding of {kind} is quantised, offloaded or of another width than the blocks; read its "
                "directions by steering instead"
            )
        # A copy in fp32: the type of the weights decides in what type most norms answer.
        self.parameters = {name: one.detach().float() for name, one in self.norm.named_parameters()}
        self.states, logits = self._run(loaded, prompts)
        bias = getattr(head, "bias", None)
        own = self._unembed(self._normed(self.states)) + (0.0 if bias is None else bias.detach().float().cpu())
        pairs = torch.stack([own, logits], dim=1)
        likeness = [float(torch.corrcoef(pair)[0, 1]) for pair in pairs]
        if not min(likeness) >= ALIKE:
            raise UnsupportedModelError(
                f"the final norm and unembedding found in {kind} do not give its logits (correlation {min(likeness):.2f}); "
                "read its directions by steering instead"
            )

    @torch.no_grad()
    def _run(self, loaded: LoadedModel, prompts: Sequence[Conversation]) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32: what enters the final norm, `[prompts, width]`, and the model's logits, `[prompts, vocabulary]` on the CPU."""
        states: list[torch.Tensor] = []
        logits: list[torch.Tensor] = []

        def keep(_module: Any, arguments: tuple[Any, ...], _output: Any) -> None:
            states.append(arguments[0].detach()[0, -1].float())

        handle = self.norm.register_forward_hook(keep)
        try:
            for encoded in encode_all(loaded, prompts):
                ids = torch.tensor([encoded.ids], device=loaded.device)
                logits.append(loaded.model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu())
        finally:
            handle.remove()
        if not prompts or len(states) != len(prompts):
            raise UnsupportedModelError(
                f"the final norm of {type(loaded.model).__name__} did not run once for each of {len(prompts)} prompts; "
                "read its directions by steering instead"
            )
        return torch.stack(states), torch.stack(logits)

    def _normed(self, states: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = functional_call(self.norm, self.parameters, (states,))
        return normed

    @torch.no_grad()
    def _unembed(self, vectors: torch.Tensor) -> torch.Tensor:
        """Logits without bias, fp32 `[n, vocabulary]` on the CPU."""
        moved = vectors.to(self.unembedding.device)
        return torch.cat([(moved @ rows.float().T).cpu() for rows in torch.split(self.unembedding, ROWS)], dim=1)

    def effects(self, directions: torch.Tensor) -> torch.Tensor:
        """e(v) of each direction `[n, width]`, fp32 `[n, vocabulary]` on the CPU."""
        lengths = self.states.norm(dim=-1, keepdim=True)
        pushed = []
        for direction in torch.nn.functional.normalize(directions, dim=-1).to(self.states.device):
            moved = jvp(self._normed, (self.states,), (lengths * direction,))[1]
            pushed.append(moved.detach().mean(dim=0))
        effects = self._unembed(torch.stack(pushed))
        return effects - effects.mean(dim=1, keepdim=True)


def _lens(loaded: LoadedModel, effects: torch.Tensor, considered: torch.Tensor, count: int, unit: str) -> Lens:
    """Both ends of the first row of `effects` `[1 + controls, vocabulary]`, beside the other rows; all where `considered`."""
    if count < 1:
        raise SafeSteerError(f"a lens of {count} tokens shows nothing; ask for at least one")
    describe = functools.cache(functools.partial(_describe, loaded.tokenizer, _added(loaded.tokenizer)))

    def top(row: int, sign: int) -> tuple[tuple[Token, ...], int, float]:
        """The readable tokens at one end, how many others were passed over, and the mean z of those shown."""
        ids = considered[row].nonzero().flatten()
        values = effects[row, ids]
        tokens: list[Token] = []
        skipped = 0
        for place in (sign * values).argsort(descending=True, stable=True).tolist():
            described = describe(int(ids[place]))
            if described is None:
                skipped += 1
                continue
            tokens.append(Token(described[0], int(ids[place]), float(values[place]), described[1]))
            if len(tokens) == count:
                break
        if not tokens:
            return (), skipped, 0.0
        shown = sum(token.effect for token in tokens) / len(tokens)
        return tuple(tokens), skipped, (shown - float(values.mean())) / max(_deviation(values), 1e-12)

    promotes, suppresses = top(0, 1), top(0, -1)
    other = range(1, len(effects))

    def mean(values: Iterable[float]) -> float:
        return sum(values) / max(1, len(other))

    return Lens(
        promotes=promotes[0],
        suppresses=suppresses[0],
        unit=unit,
        skipped_promotes=promotes[1],
        skipped_suppresses=suppresses[1],
        z_promotes=promotes[2],
        z_suppresses=suppresses[2],
        controls=len(other),
        control_z_promotes=mean(top(row, 1)[2] for row in other),
        control_z_suppresses=mean(top(row, -1)[2] for row in other),
        deviation=_deviation(effects[0, considered[0]]),
        control_deviation=mean(_deviation(effects[row, considered[row]]) for row in other),
        considered=int(considered[0].sum()),
    )


def _deviation(values: torch.Tensor) -> float:
    """Standard deviation of the values as they are; 0 of fewer than two."""
    return float(values.std(correction=0)) if len(values) else 0.0


def _added(tokenizer: Any) -> frozenset[int]:
    """Ids that stand for no text: special tokens, and those added to the vocabulary."""
    return frozenset((*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()))


def _describe(tokenizer: Any, added: frozenset[int], index: int) -> tuple[str, Kind] | None:
    """The text and kind of a vocabulary entry; None where it is no readable text."""
    raw = tokenizer.convert_ids_to_tokens(index) if index < len(tokenizer) and index not in added else None
    if not isinstance(raw, str) or _UNUSED.match(raw):
        return None
    text = str(tokenizer.decode([index], clean_up_tokenization_spaces=False))
    starts, continues = raw.startswith(_WORD_STARTS), raw.startswith(_CONTINUES) and len(raw) > len(_CONTINUES)
    if starts and not text.startswith(" "):
        text = " " + text  # SentencePiece drops the space of a text's first token
    text = text.removeprefix(_CONTINUES) if continues else text
    unreadable = [c for c in text if c == "\ufffd" or (unicodedata.category(c)[0] == "C" and not c.isspace())]
    if not text or unreadable:
        return None
    body = text[1:] if text.startswith(" ") else text
    if not body[:1].isalpha():
        return text, "other"
    return text, "word" if text.startswith(" ") else "piece"
