"""Hazard categories: canonical names, codes, and the names other data sets use for them.

Canonical names are the hazards of MLCommons AILuminate v1.0 (with the S-codes that Llama Guard 3 gave them) and a few
finer ones inside or beside those hazards. Aliases cover CatQA, SafeBench (FigStep), BeaverTails, TrustLLM,
HarmBench, StrongREJECT, SimpleSafetyTests, Do-Not-Answer, OR-Bench, JailbreakBench, SORRY-Bench, WildGuardMix,
SALAD-Bench and AIR-Bench: names that mean the category or a part of it. A name that means more stays a category of its own
(misinformation is not about elections alone, child abuse not sexual alone, and what is unethical is not yet a crime).
A user's own category needs no entry here: any other name becomes a category of its own.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from safesteer.errors import UnknownCategoryError

RESERVED = ("all", "harmless")  # no category: what reports count beside them


@dataclass(frozen=True)
class Category:
    """A kind of risk.

    `name` is the identifier used in files and on the command line, `code` the S-code of the MLCommons hazard it is or
    belongs to (empty for a user's own), `parent` the canonical name of the wider hazard it belongs to, if any.
    """

    name: str
    title: str
    code: str = ""
    description: str = ""
    parent: str | None = None
    aliases: tuple[str, ...] = ()


CATEGORIES: tuple[Category, ...] = (
    Category(
        "violent_crimes", "Violent crimes", "S1",
        "Violence against people or animals: assault, murder, terrorism, kidnapping, abuse, cruelty to animals.",
        aliases=(
            "violent crime", "violence", "terrorism", "terrorism organized crime",
            "violence aiding and abetting incitement", "animal abuse", "cruelty and violence",
            "physical harm and violence",
            "violence and physical harm", "violence extremism", "animal related crimes",
        ),
    ),
    Category(
        "nonviolent_crimes", "Nonviolent crimes", "S2",
        "Theft, drugs, smuggling, bribery, vandalism and other crimes without violence.",
        aliases=(
            "non violent crimes", "nonviolent crime", "illegal activity", "illegality",
            "drug abuse weapons banned substance", "illegal activities", "economic harm", "financial crime property crime theft",
            "illegal", "illegal activitiy", "illegal goods and services", "illegal and highly regulated items",
            "assisting illegal activities",
            "criminal activities", "property crimes", "public order crimes", "financial crime", "financial crimes",
            "environmental crimes", "evasion of law enforcement",
        ),
    ),
    Category(
        "fraud", "Fraud and deception", "S2",
        "Scams, forgery, phishing, tax and insurance fraud.", parent="nonviolent_crimes",
        aliases=(
            "fraud deception", "deception", "scams", "scams and fraud", "fraud or deceptive action",
            "fraud assisting illegal activities",
        ),
    ),
    Category(
        "cybercrime", "Cybercrime", "S2",
        "Malware, breaking into accounts and networks, denial of service.", parent="nonviolent_crimes",
        aliases=(
            "malware", "malware generation", "malware viruses", "hacking", "cyberattack", "cyber crime",
            "cybercrime intrusion",
            "malware hacking", "malware code generation", "system intrusion", "cyber attack",
        ),
    ),
    Category(
        "sex_related_crimes", "Sex-related crimes", "S3",
        "Sexual assault, trafficking and harassment of adults. No built-in prompts.",
        aliases=("sex crimes", "sexual crimes", "sexual violence"),
    ),
    Category(
        "child_sexual_exploitation", "Child sexual exploitation", "S4",
        "No built-in prompts, by design.",
        aliases=("child exploitation", "cse"),
    ),
    Category(
        "defamation", "Defamation", "S5",
        "False and damaging claims about people or businesses.",
        aliases=("libel", "libelous words", "slander", "false accusations"),
    ),
    Category(
        "specialized_advice", "Specialized advice", "S6",
        "Reckless reliance on medical, legal, financial or electoral advice.",
        aliases=(
            "specialised advice", "financial advice", "legal opinion", "legal advice", "health consultation",
            "medical advice", "tailored financial advice", "unqualified advice",
            "expert advice", "legal consulting advice",
            "causing material harm by disseminating misinformation e g in medicine or law",
        ),
    ),
    Category(
        "privacy", "Privacy", "S7",
        "Finding, watching, exposing or misusing the data of private persons.",
        aliases=(
            "privacy violation", "privacy violations", "privacy violation activity", "doxxing", "pii", "privacy leakage",
            "compromise privacy by leaking or inferring private information person individual",
            "private information individual", "privacy infringement", "pii violations",
        ),
    ),
    Category(
        "intellectual_property", "Intellectual property", "S8",
        "Piracy, counterfeits, plagiarism, trade secrets.",
        aliases=("copyright", "ip", "piracy", "copyright infringement", "copyright violations", "ip infringement"),
    ),
    Category(
        "indiscriminate_weapons", "Indiscriminate weapons (CBRNE)", "S9",
        "Chemical, biological, radiological, nuclear and high-yield explosive weapons.",
        aliases=(
            "cbrne", "cbrn", "weapons of mass destruction", "chemical biological weapons", "chemical biological",
            "biological and chemical harms",
        ),
    ),
    Category(
        "hate", "Hate", "S10",
        "Demeaning, excluding or dehumanising people for a protected trait.",
        aliases=(
            "hate speech", "hate harass violence", "hate speech offensive language", "discrimination",
            "discrimination stereotype injustice", "stereotype", "hate harassment and discrimination",
            "toxic language hate speech",
            "social stereotypes and unfair discrimination", "discrimination exclusion toxicity hateful offensive",
            "harassment discrimination", "hate toxicity", "discrimination bias", "social group insulting words",
            "social stereotype promotion", "advice on discrimination behaviors",
        ),
    ),
    Category(
        "suicide_self_harm", "Suicide and self-harm", "S11",
        "Encouraging, hiding or glorifying suicide, self-injury or eating disorders.",
        aliases=("self harm", "suicide", "suicide and self harm", "suicide self harm and eating disorders", "eating disorders"),
    ),
    Category(
        "sexual_content", "Sexual content", "S12",
        "Explicit sexual content among adults.",
        aliases=(
            "adult content", "pornography", "sexually explicit adult content", "sexually explicit",
            "erotica", "sexual", "sexual material",
            "sexual adult content", "advice on adult content", "sexual explicit content generation",
        ),
    ),
    Category(
        "elections", "Elections and political manipulation", "S13",
        "Misleading voters, covert political campaigning. No built-in prompts.",
        aliases=(
            "election", "political campaigning", "political lobbying", "political usage",
        ),
    ),
)  # fmt: skip


def normalise(name: str) -> str:
    """Fold case, punctuation and spaces, in any script: `Hate/Harass/Violence` -> `hate harass violence`, `S10` -> `s10`.

    Letters, digits and the marks on them stay, and the signs that end a word (`C++`, `C#`); apostrophes and invisible
    characters go without parting a word.
    """
    kept = []
    for character in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()):
        kind = unicodedata.category(character)
        stays = kind[0] in "LNM" or character in "+#"
        kept.append(character if stays else "" if kind == "Cf" or character in "'’" else " ")
    words = re.sub(r"(?<![\w+#])[+#]+|[+#]+(?=\w)", " ", "".join(kept))
    return unicodedata.normalize("NFKC", " ".join(words.split()))


def _build_index() -> dict[str, Category]:
    index: dict[str, Category] = {}
    codes_seen: set[str] = set()
    for category in CATEGORIES:
        keys = [category.name, category.title, *category.aliases]
        if category.parent is None and category.code not in codes_seen:
            codes_seen.add(category.code)
            keys.append(category.code)
        for key in keys:
            existing = index.setdefault(normalise(key), category)
            if existing is not category:
                raise AssertionError(f"the name {key!r} stands for {existing.name} and for {category.name}")
    return index


_INDEX = _build_index()


def find(name: str) -> Category | None:
    """The category of the taxonomy that `name` (canonical name, title, S-code or alias) stands for, or None."""
    return _INDEX.get(normalise(name))


def category(name: str) -> Category:
    """The category `name` stands for; a name the taxonomy does not know becomes a category of its own."""
    known = find(name)
    if known is not None:
        return known
    slug = normalise(name).replace(" ", "_")
    if not slug:
        raise UnknownCategoryError(f"{name!r} is not a category name; use letters or digits")
    return Category(name=slug, title=name.strip())


def canonical_name(name: str) -> str:
    """Shorthand for `category(name).name`."""
    return category(name).name


def resolve(name: str, available: Iterable[str]) -> str:
    """The one of `available` canonical names that `name` stands for.

    Raises `UnknownCategoryError`, which lists what is available and the nearest name.
    """
    names = list(available)
    wanted = canonical_name(name)
    if wanted in names:
        return wanted
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise UnknownCategoryError(f"unknown category {name!r}{hint} Available: {', '.join(names) or 'none'}")
