"""Figures: each draws in both themes, says what it was given, is saved the same twice, and leaves no state behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from safesteer.errors import SafeSteerError
from safesteer.explain import figures
from safesteer.explain.geometry import cosine_map, project, separation_of
from tests.test_explain_geometry import planted
from tests.tiny import bank_for, make

pytest.importorskip("matplotlib")

TITLE = "Fraud is told from its counterparts from the thirteenth block on, and better than chance would have it"


def _bank() -> Any:
    bank = bank_for(make("llama"), layers=(0, 1, 2))
    return replace(bank, doses=torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.2]]))


def _outcomes() -> dict[str, list[int]]:
    return {"safe": [10, 60, 50], "unsafe": [60, 10, 5], "off_topic": [10, 10, 20], "refusal": [10, 0, 0],
            "degenerate": [10, 20, 25]}  # fmt: skip


MADE: dict[str, Callable[[figures.Theme], Any]] = {
    "cosines": lambda theme: figures.cosine_map(cosine_map(_bank()), TITLE, theme),
    "cosines before": lambda theme: figures.cosine_map(cosine_map(_bank()), TITLE, theme, before_shrinkage=True),
    "separation": lambda theme: figures.separation_by_layer(
        {name: separation_of(planted(), name, seeds=3) for name in "ab"}, TITLE, theme, highlight="b", acting=(2, 3)
    ),
    "doses": lambda theme: figures.doses_by_layer(_bank(), TITLE, theme),
    "lda": lambda theme: figures.projection(project(planted(), 2), TITLE, theme, category="a"),
    "pca": lambda theme: figures.projection(project(planted(), 2), TITLE, theme, plane="pca"),
    "tokens": lambda theme: figures.tokens(
        [(" sorry", 2.0), ("$a$", 1.5), ("\n", 1.0)], [("漢", -1.0), ("\x07", -2.0)], TITLE, theme, control=1.2
    ),
    "heat map": lambda theme: figures.token_heatmap(
        ["How", " do", " I", "\n", "$x$", " 漢字", "y" * 200], [0.1, None, 2.5, -3.0, 7.0, 1.0, 0.0], TITLE, theme,
        passage=(1, 4),
    ),
    "attribution": lambda theme: figures.attribution(
        {0: 0.5, 1: -0.2}, {0: 0.1, 1: 0.9}, TITLE, theme, embedding=0.3, constant=0.2, risk=1.8, threshold=1.0
    ),
    "undivided attribution": lambda theme: figures.attribution(
        {}, {}, TITLE, theme, embedding=0.3, constant=-0.5, risk=0.3, block={0: 0.1, 1: 0.4}
    ),
    "neuron layers": lambda theme: figures.neuron_layers([1, 5, 2], [(1.0, 0, 3)] * 3, TITLE, theme),
    "neuron effects": lambda theme: figures.neuron_effects(
        [("block 1, neuron 7", (0.2, 0.1, 0.3)), ("block 2, neuron 9", (-0.1, -0.2, 0.0))], TITLE, theme, unit="nats",
        control=(-0.05, 0.05),
    ),
    "doses and responses": lambda theme: figures.dose_response(
        [0, 1, 2], _outcomes(), [100] * 3, TITLE, theme, perplexity=[(5, 4, 6)] * 3, kl=[(0.1, 0.0, 0.2)] * 3
    ),
    "one panel": lambda theme: figures.dose_response([0, 1, 2], _outcomes(), [100] * 3, TITLE, theme),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_each_figure_draws_in_both_themes_and_its_text_stays_text(name: str, tmp_path: Path) -> None:
    grounds = []
    for theme in ("light", "dark"):
        figure = MADE[name](theme)  # type: ignore[arg-type]
        paths = figures.save(figure, tmp_path, theme)
        svg = paths["svg"].read_text(encoding="utf-8")
        assert "<text" in svg
        assert "Fraud is told from its counterparts" in svg
        assert "<dc:date>" not in svg
        assert paths["png"].read_bytes().startswith(b"\x89PNG")
        grounds.append(figure.get_facecolor())
        assert figure.get_figwidth() == figures.WIDTH
    assert grounds[0] != grounds[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dark.png", "dark.svg", "light.png", "light.svg"]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", MADE)
def test_axes_name_their_quantities_and_text_stays_inside(name: str) -> None:
    figure = MADE[name]("light")
    figure.draw_without_rendering()
    labels = [axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes]
    labels += [child.get_xlabel() for axes in figure.axes for child in axes.child_axes]
    assert any(labels)
    frame = figure.bbox
    for axes in figure.axes:
        low, high = sorted(axes.get_ylim())
        left, right = sorted(axes.get_xlim())
        ticks = [label for label in axes.get_xticklabels() if left <= label.get_position()[0] <= right]
        ticks += [label for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
        for text in [*axes.texts, *([axes.xaxis.label, axes.yaxis.label, *ticks] if axes.axison else [])]:
            if text.get_text() and text.get_visible():
                box = text.get_window_extent()
                assert box.x0 >= frame.x0 - 2, text.get_text()
                assert box.x1 <= frame.x1 + 2, text.get_text()
                assert box.y0 >= frame.y0 - 2, text.get_text()
    sizes = [text.get_fontsize() for axes in figure.axes for text in axes.texts]
    assert min([9.0, *sizes]) >= 7.5


def test_the_same_data_give_the_same_files(tmp_path: Path) -> None:
    once = figures.save(MADE["lda"]("light"), tmp_path / "a", "x")
    again = figures.save(MADE["lda"]("light"), tmp_path / "b", "x")
    for kind in ("svg", "png"):
        assert once[kind].read_bytes() == again[kind].read_bytes()


def test_figures_are_made_without_pyplot_show_themselves_in_a_notebook_and_leave_no_state() -> None:
    code = """if True:
    import sys
    from safesteer.explain import figures
    assert "matplotlib" not in sys.modules  # an extra
    import matplotlib
    state = lambda: {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if not key.startswith("backend")}
    before = state()
    assert figures.neuron_layers([1, 2], [], "t", "dark")._repr_png_().startswith(b"\\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules
    assert state() == before
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_matplotlib_drawing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SafeSteerError, match=r"pip install 'safesteer\[explain\]'"):
        figures.neuron_layers([1], [], "t")
    with pytest.raises(SafeSteerError, match=r"pip install 'safesteer\[explain\]'"):
        figures.token_heatmap(["a"], [0.0], "t")


def test_tokens_are_shown_as_they_are() -> None:
    assert figures.visible(" sorry") == "␣sorry"
    assert figures.visible("a\n\t") == "a⏎⇥"
    assert figures.visible("\x07") == "\\x07"
    assert figures.visible("a b") == "a b"
    figure = MADE["tokens"]("light")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["␣sorry", "$a$", "⏎", "漢", "\\x07"]
    assert not any(label.get_parse_math() for label in figure.axes[0].get_yticklabels())


def test_the_heat_map_shows_every_token_once_and_shades_by_score() -> None:
    figure = MADE["heat map"]("light")
    axes = figure.axes[0]
    shown = "".join(text.get_text() for text in axes.texts)
    assert shown == "How do I⏎$x$ 漢字" + "y" * 200
    assert max(patch.get_x() + patch.get_width() for patch in axes.patches) <= axes.get_xlim()[1]
    colours = {text.get_text(): patch.get_facecolor() for text, patch in zip(axes.texts, axes.patches, strict=True)}
    assert colours["$x$"][0] > colours["⏎"][0]  # orange above zero, blue below
    assert colours[" do"][3] == 0  # not read


def test_the_sum_in_the_attribution_figure_ends_at_the_risk() -> None:
    below = MADE["attribution"]("light").axes[1]
    assert below.lines[0].get_ydata()[-1] == pytest.approx(1.8)


def test_wrong_input_is_refused_with_a_sentence() -> None:
    with pytest.raises(SafeSteerError, match="one score for each"):
        figures.token_heatmap(["a"], [], "t")
    with pytest.raises(SafeSteerError, match="one count and total"):
        figures.dose_response([0, 1], {"safe": [1]}, [2, 2], "t")
    with pytest.raises(SafeSteerError, match="light or dark"):
        figures.neuron_layers([1], [], "t", "sepia")  # type: ignore[arg-type]
    with pytest.raises(SafeSteerError, match="no tokens"):
        figures.tokens([], [], "t")
    with pytest.raises(SafeSteerError, match="not shrunk"):
        figures.cosine_map(cosine_map(replace(_bank(), provenance={})), "t", before_shrinkage=True)
