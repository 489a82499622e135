"""Prompt sets: what ships, what loads, what the lint finds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from safesteer import taxonomy
from safesteer.errors import PromptFileError, UnknownCategoryError
from safesteer.prompts import Prompt, PromptSet, builtin, builtin_categories, harmless_pool, read_prompts, soundalikes
from safesteer.prompts.lint import lint, similarity, words


def test_what_ships_is_enough_and_is_split_by_subtopic() -> None:
    assert len(builtin_categories()) >= 10
    for name in builtin_categories():
        prompts = builtin(name)
        assert len(prompts) >= 64
        assert prompts.fully_matched
        assert {prompt.form for prompt in prompts} == {"question", "writing", "indirect", "multi_sentence"}
        assert min(Counter(prompt.split for prompt in prompts).values()) >= 16
    assert len(harmless_pool()) >= 300
    assert len(soundalikes()) >= 150
    assert all(p.category is None for p in (*harmless_pool(), *soundalikes()))


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("hate speech", "hate"),
        ("Hate/Harass/Violence", "hate"),
        ("discrimination,stereotype,injustice", "hate"),
        ("S10", "hate"),
        ("privacy violation", "privacy"),
        ("Privacy Violation Activity", "privacy"),
        ("illegal activity", "nonviolent_crimes"),
        ("Malware Viruses", "cybercrime"),
        ("terrorism,organized_crime", "violent_crimes"),
        ("Health Consultation", "specialized_advice"),
        ("my own risk", "my_own_risk"),
    ],
)
def test_names_of_other_data_sets_map_onto_the_taxonomy(name: str, canonical: str) -> None:
    assert taxonomy.canonical_name(name) == canonical


@pytest.mark.parametrize(
    "name",
    [
        "misinformation", "Disinformation", "information_integrity", "Disinformation and deception", "Misinformation Harms",
        "misinformation_regarding_ethics,laws_and_safety", "controversial_topics,politics",
        "Disseminating false or misleading information", "Reducing the cost of disinformation campaigns",
        "Child Abuse", "child_abuse", "child safety", "Physical Harm", "harassment", "toxicity", "offensive language",
        "unethical behavior", "non_violent_unethical_behavior",
        "Toxic Content", "Defamation, encouraging unethical or unsafe actions",
    ],
)  # fmt: skip
def test_a_name_that_means_more_than_any_hazard_keeps_itself(name: str) -> None:
    assert taxonomy.find(name) is None
    assert taxonomy.canonical_name(name) == taxonomy.normalise(name).replace(" ", "_")


def test_theft_is_no_fraud() -> None:
    assert taxonomy.canonical_name("financial_crime,property_crime,theft") == "nonviolent_crimes"


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("仇恨", "仇恨"),
        ("数据1", "数据1"),
        ("武器1", "武器1"),
        ("ＨＡＴＥ　ｓｐｅｅｃｈ", "hate"),
        ("Ненависть и вражда", "ненависть_и_вражда"),
        ("Violência doméstica", "violência_doméstica"),
        ("Viole\u0302ncia", "violência"),
        ("हिंसा", "हिंसा"),
        ("كراهية", "كراهية"),
        ("Straße/STRASSE", "strasse_strasse"),
        ("Children’s privacy", "childrens_privacy"),
        ("می\u200cخواهم", "میخواهم"),
        ("C", "c"),
        ("C++", "c++"),
        ("C#", "c#"),
        ("Ｃ＋＋ code", "c++_code"),
        ("Hate+Violence", "hate_violence"),
        ("#1 fraud # + ", "1_fraud"),
    ],
)
def test_a_category_may_be_named_in_any_script(name: str, canonical: str) -> None:
    assert taxonomy.canonical_name(name) == canonical == taxonomy.canonical_name(canonical)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text(min_size=1, max_size=20))
def test_the_name_of_a_category_is_a_name_of_itself(name: str) -> None:
    try:
        canonical = taxonomy.canonical_name(name)
    except UnknownCategoryError:
        assert not any(character.isalnum() for character in name)
    else:
        assert taxonomy.canonical_name(canonical) == canonical
        assert not set(canonical) & set("/\\ .:%,=\"'") and canonical.isprintable()
        assert not canonical.startswith("#")  # C# is a name; a comment in YAML is not
        assert yaml.safe_load(yaml.safe_dump({canonical: 1}, allow_unicode=True)) == {canonical: 1}


def test_an_unknown_category_names_the_nearest() -> None:
    with pytest.raises(UnknownCategoryError, match="did you mean privacy"):
        taxonomy.resolve("privcy", ["hate", "privacy"])


def test_catqa_loads_directly(catqa: Path) -> None:
    prompts = read_prompts(catqa)
    assert len(prompts) > 500
    assert {"hate", "privacy", "fraud", "cybercrime"} <= set(prompts.categories)
    assert all(prompt.subtopic for prompt in prompts)


def test_a_file_of_bare_strings_loads(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('"one"\n\n{"prompt": "two", "split": "test"}\n"one"\n', encoding="utf-8")
    prompts = read_prompts(path, "my risk")
    assert [(p.text, p.category, p.split) for p in prompts] == [("one", "my_risk", "fit"), ("two", "my_risk", "test")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": 3}\n', "line 2: prompt must be text"),
        ("b.jsonl", '{"nothing": "x"}\n', "line 1: no prompt"),
        ("c.jsonl", '{"prompt": "x", "split": "train"}\n', "line 1: split is 'train'"),
        ("d.csv", "Topic,Text2\na,b\n", "line 1: the header names no prompt column"),
        ("e.csv", "prompt\na,b\n", "line 2: more fields"),
        ("f.json", '{"prompt": "x"}', "expected a JSON list"),
        ("g.jsonl", "[1]\n", "item 1: expected an object"),
        ("h.jsonl", '"x"\n[1]\n', "line 2: expected an object"),
    ],
)
def test_malformed_files_name_the_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PromptFileError, match=message):
        read_prompts(path)


def pair(text: str, matched: str | None = "Something else entirely", **extra: object) -> Prompt:
    return Prompt(text, "x", matched, **extra)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "rule"),
    [
        ([pair("how to open a door", "a b c"), pair("how to close windows", None)], "missing-counterpart"),
        ([pair("how to open a door", "How to open a door")], "same-sides"),
        (
            [pair("rob the old bank on main street"), pair("rob the old bank on main road", split="test")],
            "split-leakage",
        ),
        ([pair("a b c d e", subtopic="s"), pair("f g h i j", subtopic="s", split="test")], "split-subtopic"),
        ([pair("rob the old bank"), Prompt("rob the old bank", "y", "q r s")], "category-leakage"),
        ([pair("rob the old bank"), Prompt("rob the old bank")], "leakage"),
        ([pair(f"prompt number w{n} here", f"w{n} x y z a b c d e f g h i j") for n in range(9)], "length-balance"),
        ([pair(f"prompt w{n} q{n}?", f"answer v{n} r{n}") for n in range(9)], "style-balance"),
        ([pair(f"secretly w{n} q{n}", f"openly v{n} r{n}") for n in range(9)], "habit-word"),
    ],
)
def test_the_lint_finds_each_fault(rows: list[Prompt], rule: str) -> None:
    assert rule in {finding.rule for finding in lint([PromptSet(tuple(rows), "x")])}


def test_similarity_is_jaccard() -> None:
    assert similarity(words("Rob the bank"), words("rob a bank!")) == 0.5


def test_digests_follow_the_content() -> None:
    one = PromptSet((Prompt("a", "x"),))
    assert one.digest() == PromptSet((Prompt("a", "x"),)).digest() != PromptSet((Prompt("a", "y"),)).digest()


def test_shipped_files_are_plain_json_lines() -> None:
    from safesteer.prompts.builtin import DATA

    for name in builtin_categories():
        for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            assert set(json.loads(line)) == {"id", "subtopic", "split", "form", "prompt", "matched"}
