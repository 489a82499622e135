"""One figure = one message: data in, a `matplotlib.figure.Figure` out, the same in a notebook and in the report.

Colours are those of the evaluation report (near Okabe and Ito, Color Universal Design, 2008): orange for what is harmful or away
from zero upwards, blue for what is harmless, grey for controls. Shape or line style always says the same as colour.

Figures are made without pyplot, so nothing is kept alive behind the caller's back, and under matplotlib's own defaults,
so a user's style file changes nothing. Each is 6.4 inches wide with text of 9 to 11 points: legible on a phone.
Needs matplotlib: `pip install 'safesteer[explain]'`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from safesteer.errors import SafeSteerError
from safesteer.evaluation.report import outcome_title
from safesteer.evaluation.report import title as category_title
from safesteer.evaluation.statistics import wilson
from safesteer.explain.geometry import CosineMap, Projection, Separation
from safesteer.files import write_atomically
from safesteer.vectors import VectorBank

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Theme = Literal["light", "dark"]
WIDTH = 6.4  # inches
DOTS = 150  # an inch, of PNG
TITLE_LETTERS = 58  # of a title, in a line
MONO_POINTS = 11.0  # size of the tokens in a heat map
MONO_ADVANCE = 0.602  # width of a letter of DejaVu Sans Mono, in its size
# Figures of measure: value, low and high end of its interval.
Measured = tuple[float, float, float]


@dataclass(frozen=True)
class Palette:
    """The colours of a theme, by what they mean."""

    ground: str
    ink: str
    dim: str
    line: str
    harm: str
    calm: str
    control: str
    outcomes: Mapping[str, str]


PALETTES: dict[Theme, Palette] = {
    "light": Palette(
        ground="#ffffff",
        ink="#1d2330",
        dim="#5c6472",
        line="#dedbd4",
        harm="#b8450b",
        calm="#0b6fa4",
        control="#6b7280",
        outcomes={
            "safe": "#0b6fa4",
            "off_topic": "#3f948b",
            "refusal": "#b98314",
            "degenerate": "#6f6a75",
            "unsafe": "#b8450b",
        },
    ),
    "dark": Palette(
        ground="#1b1f26",
        ink="#e6e8ec",
        dim="#a0a8b5",
        line="#323943",
        harm="#ee8a50",
        calm="#62b6e2",
        control="#98a1b0",
        outcomes={
            "safe": "#62b6e2",
            "off_topic": "#8fd8cf",
            "refusal": "#e0b354",
            "degenerate": "#a8a3b0",
            "unsafe": "#ee8a50",
        },
    ),
}
MARKERS = {"safe": "o", "off_topic": "s", "refusal": "D", "degenerate": "x", "unsafe": "^"}


# -- how every figure looks --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _drawing(theme: Theme) -> Iterator[Palette]:
    """matplotlib's defaults and the theme's colours, as long as the block lasts."""
    try:
        from matplotlib import style
    except ImportError:
        raise SafeSteerError("figures need matplotlib; install it with pip install 'safesteer[explain]'") from None
    if theme not in PALETTES:
        raise SafeSteerError(f"unknown theme {theme!r}; use light or dark")
    palette = PALETTES[theme]
    settings: dict[str, Any] = {
        "figure.facecolor": palette.ground,
        "figure.dpi": DOTS,
        "axes.facecolor": palette.ground,
        "axes.edgecolor": palette.dim,
        "axes.labelcolor": palette.ink,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "axes.labelsize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "font.size": 10,
        "text.color": palette.ink,
        "text.parse_math": False,  # a token may hold dollar signs
        "xtick.color": palette.dim,
        "ytick.color": palette.dim,
        "xtick.labelcolor": palette.ink,
        "ytick.labelcolor": palette.ink,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "grid.color": palette.line,
        "grid.linewidth": 0.8,
        "hatch.linewidth": 0.8,
        "lines.linewidth": 2.0,
        "legend.frameon": False,
        "legend.fontsize": 9,
        **_STABLE,
    }
    with style.context(["default", settings]):
        yield palette


# SVG: text stays text, and the same figure gives the same bytes.
_STABLE: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "safesteer"}


def _figure(title: str, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(textwrap.fill(title, TITLE_LETTERS), x=0.01, ha="left", fontsize=11, fontweight="bold")
    # A notebook asks an object for this; without pyplot nobody else would draw it.
    figure._repr_png_ = functools.partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    _write(figure, stream, "png")
    return stream.getvalue()


def _write(figure: Figure, target: Any, kind: Literal["svg", "png"]) -> None:
    from matplotlib import style

    nothing = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with style.context(["default", _STABLE]), warnings.catch_warnings():
        # A token may hold letters that the font lacks: PNG then shows a box, SVG leaves it to the browser.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(target, format=kind, dpi=DOTS, facecolor=figure.get_facecolor(), metadata=nothing)


def save(figure: Figure, folder: str | Path, name: str) -> dict[str, Path]:
    """Write `name`.svg and `name`.png to `folder`, each atomically: `{"svg": path, "png": path}`.

    The same figure gives the same bytes. Raises `SafeSteerError` where the files cannot be written.
    """
    paths: dict[str, Path] = {}
    kinds: tuple[Literal["svg", "png"], ...] = ("svg", "png")
    for kind in kinds:
        path = Path(folder) / f"{name}.{kind}"
        write_atomically(path, functools.partial(_write, figure, kind=kind))
        paths[kind] = path
    return paths


def diverging(theme: Theme) -> Colormap:
    """Blue through the ground to orange: told apart with every kind of colour vision, and zero is nothing."""
    from matplotlib.colors import LinearSegmentedColormap

    ends = {
        "light": ("#053f66", "#3d93c4", "#f7f6f3", "#dd7a3a", "#7d2c03"),
        "dark": ("#9fdcff", "#3787b5", "#2a303a", "#c9652a", "#ffc08f"),
    }
    return LinearSegmentedColormap.from_list(f"safesteer-{theme}", ends[theme])


def _readable_on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever stands out from an RGB colour (0 to 1)."""
    red, green, blue = colour[:3]
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"


JOINERS = "\u200c\u200d"  # which writing itself needs


def visible(text: str) -> str:
    """A token as it can be printed: white space and control characters become signs, nothing is left out."""
    signs = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    lead = len(text) - len(text.lstrip(" "))
    shown = signs[" "] * lead + text[lead:]
    return "".join(
        signs[letter]
        if letter in "\n\t\r"
        else (
            f"\\x{ord(letter):02x}"
            if unicodedata.category(letter) in ("Cc", "Cs", "Cf") and letter not in JOINERS
            else letter
        )
        for letter in shown
    )


def _layer_axis(axes: Axes, layers: Sequence[int], name: str = "block (0 is the first)") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.set_xlim(min(layers) - 0.6, max(layers) + 0.6)


def _acting(axes: Axes, acting: Sequence[int], palette: Palette, words: str = "steering acts") -> None:
    """Shade the blocks where steering acts."""
    if acting:
        axes.axvspan(min(acting) - 0.5, max(acting) + 0.5, color=palette.calm, alpha=0.10, linewidth=0, zorder=0)
        middle = (min(acting) + max(acting)) / 2
        axes.text(
            middle, 0.02, words, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=9,
            color=palette.calm,
        )  # fmt: skip


def _end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]], gap: float) -> None:
    """Write (y, text, colour) right of the axes, where lines end, pushed apart to at least `gap` in units of y."""
    placed: list[float] = []
    for y, _, _ in sorted(labels):
        placed.append(y if not placed else max(y, placed[-1] + gap))
    # Where pushing up went over the top, push back down.
    top = axes.get_ylim()[1]
    for index in range(len(placed) - 1, -1, -1):
        limit = top if index == len(placed) - 1 else placed[index + 1] - gap
        placed[index] = min(placed[index], limit)
    for y, (_, text, colour) in zip(placed, sorted(labels), strict=True):
        axes.annotate(
            text, (1, y), xycoords=axes.get_yaxis_transform(), xytext=(5, 0), textcoords="offset points", color=colour,
            va="center", fontsize=9, annotation_clip=False,
        )  # fmt: skip


def _legend(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """Under the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, handlelength=1.8, columnspacing=1.4)


# -- categories --------------------------------------------------------------------------------------------------------


def cosine_map(data: CosineMap, title: str, theme: Theme = "light", *, before_shrinkage: bool = False) -> Figure:
    """A triangle of cosines, in the order of the clustering. A name stands at the end of its row and on top of its column.

    `before_shrinkage`: the directions as prompts gave them, instead of those that act. Raises `SafeSteerError` where the map
    has none.
    """
    cosines = data.before_shrinkage if before_shrinkage else data.cosines
    if cosines is None:
        raise SafeSteerError(
            "this bank's directions were not shrunk, or it does not hold them as they were before; draw the ones that act"
        )
    with _drawing(theme) as palette:
        count = len(data.order)
        figure = _figure(title, 6.0)
        axes = figure.add_subplot()
        colours = diverging(theme)
        values = np.array(cosines)[np.ix_(data.order, data.order)]
        shown = np.ma.masked_array(values, mask=np.triu(np.ones_like(values, dtype=bool)))
        mesh = axes.pcolormesh(shown, cmap=colours, vmin=-1, vmax=1, edgecolors=palette.ground, linewidth=1)
        for row in range(count):
            for column in range(row):
                value = values[row, column]
                axes.text(
                    column + 0.5, row + 0.5, str(round(100 * value)).replace("-", "−"), ha="center", va="center",
                    fontsize=7.5 if count > 12 else 9, color=_readable_on(colours((value + 1) / 2)),
                )  # fmt: skip
            name, kind = data.names[data.order[row]], data.kinds[data.order[row]]
            label = category_title(name) if kind == "category" else ("Shared by all" if kind == "shared" else name)
            axes.text(
                row + 0.15, row + 0.5, label[0].upper() + label[1:], va="center", fontsize=9,
                color=palette.ink if kind == "category" else palette.dim,
                fontstyle="normal" if kind == "category" else "italic",
            )  # fmt: skip
        axes.set_xlim(0, count + 5.5)
        axes.set_ylim(count, 0)
        axes.axis("off")
        bar = figure.colorbar(mesh, cax=axes.inset_axes((0.58, 0.92, 0.4, 0.03)), orientation="horizontal")
        bar.set_label("cosine (cells: in hundredths)", fontsize=9)
        nothing = [f"two random directions: 0 ± {100 * data.random_deviation:.0f}"]
        if data.random_after_shrinkage and not before_shrinkage:
            nothing.append(f"shrunk as these were: {100 * data.random_after_shrinkage:.0f}")
        axes.text(
            0.98,
            0.78,
            "\n".join(nothing),
            transform=axes.transAxes,
            ha="right",
            va="top",
            fontsize=9,
            color=palette.dim,
        )
        bar.set_ticks([-1, 0, 1], labels=["−1 opposite", "0", "1 same"])
        bar.outline.set_visible(False)
        return figure


def separation_by_layer(
    data: Mapping[str, Separation],
    title: str,
    theme: Theme = "light",
    *,
    highlight: str | None = None,
    acting: Sequence[int] = (),
) -> Figure:
    """AUROC by layer with its controls. `highlight`: the category whose line and controls stand out (default: the first).

    `acting`: the blocks (0-based) where steering acts, shaded.
    """
    chosen = highlight or next(iter(data))
    main = data[chosen]
    with _drawing(theme) as palette:
        figure = _figure(title, 4.3)
        axes = figure.add_subplot()
        _layer_axis(axes, main.layers)
        axes.set_ylabel("AUROC (1 separates, 0.5 is chance)")
        axes.set_ylim(min(0.2, *main.random.low, *main.shuffled.low), 1.02)
        _acting(axes, acting, palette)
        axes.axhline(0.5, color=palette.dim, linewidth=0.8)
        axes.fill_between(
            main.layers, main.shuffled.low, main.shuffled.high, color=palette.control, alpha=0.3, linewidth=0,
            label=f"labels shuffled, {main.seeds} times (range)",
        )  # fmt: skip
        for index, edge in enumerate((main.random.low, main.random.high)):
            label = f"random directions, {main.seeds} (range)" if index == 0 else None
            axes.plot(main.layers, edge, color=palette.control, linewidth=1.2, linestyle=(0, (4, 2)), label=label)
        others = [one for name, one in data.items() if name != chosen]
        for index, one in enumerate(others):
            label = "other categories" if index == 0 else None
            axes.plot(one.layers, one.auroc, color=palette.dim, linewidth=0.9, alpha=0.6, label=label)
        axes.plot(
            main.layers, main.auroc, color=palette.harm, marker="o", markersize=4, label=category_title(chosen),
            zorder=5,
        )  # fmt: skip
        axes.grid(axis="y")
        _legend(figure, axes)
        return figure


def doses_by_layer(bank: VectorBank, title: str, theme: Theme = "light") -> Figure:
    """Above: how long the residual stream and the directions are, by layer. Below: the dose of each block at strength 1."""
    with _drawing(theme) as palette:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        figure = _figure(title, 4.8)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        norms = bank.residual_norms.numpy()
        lengths = bank.directions.norm(dim=-1).numpy()
        above.plot(bank.layers, norms, color=palette.ink, marker="o", markersize=3)
        above.fill_between(
            bank.layers, lengths.min(axis=0), lengths.max(axis=0), color=palette.calm, alpha=0.3, linewidth=0
        )
        above.plot(bank.layers, np.median(lengths, axis=0), color=palette.calm, linestyle="--")
        above.set_yscale("log")  # a direction is often a hundred times shorter than the stream it is added to
        above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        above.yaxis.set_minor_formatter(NullFormatter())
        above.set_ylabel("length (L2 norm,\nlog scale)")
        above.grid(axis="y")
        ends = [
            (float(norms[-1]), "residual\nstream", palette.ink),
            (float(np.median(lengths[:, -1])), "directions:\nmedian, range", palette.calm),
        ]
        _end_labels(above, ends, 0.0)

        doses = 100 * bank.doses.numpy()
        middle = np.median(doses, axis=0)
        below.bar(bank.layers, middle, color=palette.calm, width=0.7)
        if bool((doses != middle).any()):
            for row in doses:
                below.plot(bank.layers, row, color=palette.dim, linewidth=0.8, alpha=0.6)
            _end_labels(below, [(float(middle[-1]), "bars: median\nlines: each", palette.dim)], 0.0)
        below.set_ylabel("dose (% of\nresidual norm)")
        below.grid(axis="y")
        _layer_axis(below, bank.layers)
        return figure


# -- geometry ----------------------------------------------------------------------------------------------------------


def projection(
    data: Projection,
    title: str,
    theme: Theme = "light",
    *,
    plane: Literal["lda", "pca"] = "lda",
    category: str | None = None,
) -> Figure:
    """Prompts before and after steering, side by side on the same axes.

    `plane`: `lda` shows the half of the prompts that its axes were not fitted on, `pca` all. `category`: the one that stands
    out; the others stay as small dots.
    """
    with _drawing(theme) as palette:
        figure = _figure(title, 4.0)
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        looks: dict[str, dict[str, Any]] = {
            "other": {"marker": ".", "s": 10, "color": palette.control, "alpha": 0.35, "linewidths": 0},
            "pool": {"marker": "+", "s": 26, "color": palette.ink, "linewidths": 0.9, "alpha": 0.75},
            "matched": {"marker": "o", "s": 20, "facecolors": "none", "edgecolors": palette.calm, "linewidths": 1.1},
            "harmful": {"marker": "^", "s": 24, "color": palette.harm, "linewidths": 0, "alpha": 0.85},
        }
        words = {
            "other": "other categories",
            "pool": "pool, never steered",
            "matched": "harmless counterpart",
            "harmful": "harmful",
        }
        for axes, after, name in zip(panels, (False, True), ("unsteered", "steered, always on"), strict=True):
            for look, style in looks.items():
                places = [
                    place
                    for point in data.points
                    if (place := _place_of(point, plane, after)) is not None
                    and look == ("other" if category and point.category not in (category, None) else point.kind)
                ]
                if places:
                    x, y = zip(*places, strict=True)
                    axes.scatter(x, y, label=words[look], **style)
            axes.set_title(name)
            axes.locator_params(nbins=5)
            axes.grid(color=palette.line)
            if plane == "pca":
                axes.set_xlabel(f"component 1 ({data.pca_share[0]:.0%} of the\nvariance), residual stream units")
            else:
                axes.set_xlabel("harmless  ←  risk  →  harmful\n(st. dev. within a class)")
        if plane == "pca":
            panels[0].set_ylabel(f"component 2 ({data.pca_share[1]:.0%})")
        else:
            panels[0].set_ylabel("leading axis left (st. dev.)")
        _legend(figure, panels[0], 4)
        return figure


def _place_of(point: Any, plane: str, after: bool) -> tuple[float, float] | None:
    place: tuple[float, float] | None = getattr(point, f"{plane}_after" if after else plane)
    return place


# -- tokens ------------------------------------------------------------------------------------------------------------


def tokens(
    promotes: Sequence[tuple[str, float]],
    suppresses: Sequence[tuple[str, float]],
    title: str,
    theme: Theme = "light",
    *,
    unit: str = "effect on the token's logit, per unit of dose",
    control: float | None = None,
) -> Figure:
    """What a direction promotes and suppresses: (token text, effect) each, strongest first.

    `control`: how far the strongest token of a random direction of equal norm goes, shaded on both sides of 0.
    """
    if not promotes and not suppresses:
        raise SafeSteerError("there are no tokens to draw")
    with _drawing(theme) as palette:
        rows = [*promotes, *suppresses]
        places = [index + (0.6 if index >= len(promotes) and promotes else 0.0) for index in range(len(rows))]
        figure = _figure(title, 1.3 + 0.23 * len(rows))
        axes = figure.add_subplot()
        colours = [palette.calm] * len(promotes) + [palette.harm] * len(suppresses)
        axes.barh(places, [effect for _, effect in rows], color=colours, height=0.72)
        axes.set_yticks(places, [visible(text) for text, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(places[-1] + 0.6, -0.6)
        axes.axvline(0, color=palette.dim, linewidth=0.8)
        axes.grid(axis="x")
        axes.set_xlabel(unit)
        axes.margins(x=0.08)
        # the free side of the bars
        if promotes:
            axes.text(
                0.02, places[0] - 0.35, "promoted →", transform=axes.get_yaxis_transform(), color=palette.calm, va="top"
            )
        if suppresses:
            axes.text(
                0.98, places[-1] + 0.35, "← suppressed", transform=axes.get_yaxis_transform(), color=palette.harm,
                ha="right", va="bottom",
            )  # fmt: skip
        if control is not None:
            axes.axvspan(
                -control, control, color=palette.control, alpha=0.25, linewidth=0, zorder=0,
                label="a random direction's strongest tokens reach this far",
            )  # fmt: skip
            _legend(figure, axes, 1)
        return figure


def token_heatmap(
    texts: Sequence[str],
    scores: Sequence[float | None],
    title: str,
    theme: Theme = "light",
    *,
    unit: str = "risk, in standard deviations of harmless prompts",
    limit: float | None = None,
    passage: tuple[int, int] | None = None,
) -> Figure:
    """Running text, each token shaded by its score (None: not read). `limit`: the score of full colour, on both sides of 0.

    `passage`: first token and the one past the last of a stretch to underline. White space that leads a token is kept.
    """
    if not texts or len(texts) != len(scores):
        raise SafeSteerError("a heat map needs tokens, and one score for each")
    with _drawing(theme) as palette:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.patches import Rectangle

        letters = int((WIDTH - 0.3) * 72 / (MONO_POINTS * MONO_ADVANCE))
        cells: list[tuple[int, int, str, float | None, int]] = []  # column, line, text, score, token
        column = line = 0
        for token, (text, score) in enumerate(zip(texts, scores, strict=True)):
            # One leading space is a gap as in the text; only what cannot be seen gets a sign.
            lead = " " if text.startswith(" ") else ""
            shown = lead + visible(text[len(lead) :])
            while shown:
                width = _columns(shown)
                if column and column + width > letters and width <= letters:
                    column, line = 0, line + 1
                    continue
                part = shown if column + width <= letters else shown[: max(1, letters - column)]
                cells.append((column, line, part, score, token))
                column, shown = column + _columns(part), shown[len(part) :]
                if shown or column >= letters:
                    column, line = 0, line + 1
        lines = max(cell[1] for cell in cells) + 1
        step = 1.75 * MONO_POINTS / 72
        top = 0.25 + 0.2 * (1 + len(title) // TITLE_LETTERS)
        height = top + lines * step + 0.75
        figure = _figure(title, height)
        figure.set_layout_engine("none")
        axes = figure.add_axes((0.15 / WIDTH, 0.75 / height, (WIDTH - 0.3) / WIDTH, lines * step / height))
        axes.set_xlim(0, letters)
        axes.set_ylim(lines, 0)
        axes.axis("off")
        extent = limit or max([3.0, *(abs(score) for score in scores if score is not None)])
        colours, scale = diverging(theme), Normalize(-extent, extent, clip=True)
        for column, line, text, score, token in cells:
            width = _columns(text)
            shade = colours(float(scale(score))) if score is not None else (0.0, 0.0, 0.0, 0.0)
            axes.add_patch(Rectangle((column, line + 0.1), width, 0.8, color=shade, linewidth=0))
            ink = _readable_on(shade) if score is not None else palette.dim
            axes.text(column, line + 0.5, text, family="monospace", fontsize=MONO_POINTS, va="center", color=ink)
            if passage and passage[0] <= token < passage[1]:
                axes.plot(
                    (column, column + width),
                    (line + 0.95,) * 2,
                    color=palette.ink,
                    linewidth=1.6,
                    solid_capstyle="butt",
                )
        bar_axes = figure.add_axes((0.3 / WIDTH, 0.5 / height, 2.6 / WIDTH, 0.12 / height))
        bar = figure.colorbar(ScalarMappable(scale, colours), cax=bar_axes, orientation="horizontal")
        bar.set_ticks([-extent, 0, extent], labels=[f"{-extent:.1f}".replace("-", "−"), "0", f"{extent:.1f}"])
        bar.set_label(unit, fontsize=9, loc="left")
        bar.outline.set_visible(False)
        if passage:
            figure.text(3.2 / WIDTH, 0.5 / height, "underlined: the strongest passage", fontsize=9, color=palette.dim)
        return figure


def _columns(text: str) -> int:
    """How many letters wide a text is in a monospaced font; letters of East Asian scripts are two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


# -- attribution -------------------------------------------------------------------------------------------------------


def attribution(
    attention: Mapping[int, float],
    mlp: Mapping[int, float],
    title: str,
    theme: Theme = "light",
    *,
    embedding: float,
    constant: float,
    risk: float,
    block: Mapping[int, float] | None = None,
    threshold: float | None = None,
) -> Figure:
    """Contributions to a risk reading: block (0-based) -> what its attention, its MLP, or the undivided `block` adds.

    `embedding` and `constant` are the rest, so that all of them sum to `risk`: the line below shows the sum as it grows, and
    `threshold` where the gate begins to open.
    """
    whole = block or {}
    layers = sorted({*attention, *mlp, *whole})
    if not layers:
        raise SafeSteerError("there are no contributions to draw")
    with _drawing(theme) as palette:
        figure = _figure(title, 5.0)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        start = layers[0] - 1.0  # before the first block
        parts = (
            ("attention", attention, palette.calm, -0.2, None),
            ("MLP", mlp, palette.harm, 0.2, "////"),
            ("block, not divided", whole, palette.control, 0.0, None),
        )
        for name, values, colour, shift, hatch in parts:
            if values:
                above.bar(
                    [layer + shift for layer in values], list(values.values()), color=colour, hatch=hatch,
                    edgecolor=palette.ground if hatch else colour, linewidth=0, width=0.4 if shift else 0.7, label=name,
                )  # fmt: skip
        base = embedding + constant
        above.bar([start], [base], color=palette.ink, width=0.7, label="embedding and constant")
        above.axhline(0, color=palette.dim, linewidth=0.8)
        above.set_ylabel("adds to the risk")
        above.grid(axis="y")
        sums = base + np.cumsum([sum(one.get(layer, 0.0) for one in (attention, mlp, whole)) for layer in layers])
        below.step([start, *layers], [base, *sums.tolist()], where="mid", color=palette.ink)
        below.axhline(0, color=palette.dim, linewidth=0.8)
        below.set_ylabel("sum so far")
        below.grid(axis="y")
        low, high = below.get_ylim()
        below.set_ylim(min(low, 0.0, threshold or 0.0), max(high, (threshold or 0.0) + 0.1 * (high - low)))
        span = below.get_ylim()[1] - below.get_ylim()[0]
        ends = [(risk, f"risk {risk:.2f}".replace("-", "−"), palette.ink)]
        if threshold is not None:
            below.axhline(threshold, color=palette.dim, linestyle="--", linewidth=1.2)
            ends.append((threshold, "gate opens", palette.dim))
        _layer_axis(below, [layers[0] - 1, *layers])
        _end_labels(below, ends, 0.16 * span)
        _legend(figure, above, 4)
        return figure


# -- neurons -----------------------------------------------------------------------------------------------------------


def neuron_layers(
    counts: Sequence[int],
    shuffled: Sequence[Measured],
    title: str,
    theme: Theme = "light",
    *,
    layers: Sequence[int] | None = None,
    unit: str = "risk neurons in the block",
) -> Figure:
    """How many neurons each block holds, against shuffled labels: (mean, least, greatest) a block.

    `layers` (0-based): the blocks counted, None for 0, 1, ...
    """
    blocks = list(range(len(counts)) if layers is None else layers)
    with _drawing(theme) as palette:
        figure = _figure(title, 4.0)
        axes = figure.add_subplot()
        axes.bar(blocks, counts, color=palette.harm, width=0.75, label="this category")
        if shuffled:
            mean, low, high = (np.array(part) for part in zip(*shuffled, strict=True))
            axes.errorbar(
                blocks, mean, yerr=(mean - low, high - mean), fmt="o", color=palette.ink, markersize=3.5, linewidth=1.2,
                label="labels shuffled (mean, range)",
            )  # fmt: skip
        axes.set_ylabel(unit)
        axes.grid(axis="y")
        _layer_axis(axes, blocks)
        _legend(figure, axes)
        return figure


def neuron_effects(
    rows: Sequence[tuple[str, Measured]],
    title: str,
    theme: Theme = "light",
    *,
    unit: str,
    control: tuple[float, float] | None = None,
) -> Figure:
    """An effect a row: (name, (value, low, high)), drawn from the top. `control`: the range of random neurons, shaded."""
    if not rows:
        raise SafeSteerError("there are no effects to draw")
    with _drawing(theme) as palette:
        figure = _figure(title, 1.5 + 0.28 * len(rows))
        axes = figure.add_subplot()
        places = np.arange(len(rows))
        value, low, high = (np.array(part) for part in zip(*(measured for _, measured in rows), strict=True))
        axes.errorbar(value, places, xerr=(value - low, high - value), fmt="o", color=palette.harm, linewidth=1.6)
        axes.axvline(0, color=palette.dim, linewidth=0.8)
        axes.set_yticks(places, [name for name, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(unit)
        axes.grid(axis="x")
        if control is not None:
            axes.axvspan(
                *control, color=palette.control, alpha=0.25, linewidth=0, zorder=0, label="random neurons (range)"
            )
            _legend(figure, axes, 1)
        return figure


# -- dose and response -------------------------------------------------------------------------------------------------


def dose_response(
    doses: Sequence[float],
    outcomes: Mapping[str, Sequence[int]],
    totals: Sequence[int],
    title: str,
    theme: Theme = "light",
    *,
    perplexity: Sequence[Measured] = (),
    kl: Sequence[Measured] = (),
    unit: str = "strength (1 is the bank's dose)",
) -> Figure:
    """Shares of outcomes over dose with 95% Wilson bars, and what harmless text pays.

    `outcomes`: name -> how many of `totals` responses had it at each dose, in the order of `doses`. `perplexity` and `kl`
    (nats): (value, low, high) at each dose, each a panel of its own where given. For a figure over layers give these as `doses`
    and say so in `unit`.
    """
    if not doses or not outcomes or any(len(counts) != len(doses) for counts in (*outcomes.values(), totals)):
        raise SafeSteerError("a dose-response figure needs doses, and one count and total for each")
    more = [
        (measures, label)
        for measures, label in ((perplexity, "perplexity\n(answers)"), (kl, "KL, harmless\n(nats)"))
        if measures
    ]
    with _drawing(theme) as palette:
        figure = _figure(title, 3.9 + 1.25 * len(more))
        panels = figure.subplots(1 + len(more), 1, sharex=True, height_ratios=(3, *[1.25] * len(more)), squeeze=False)
        axes = panels[0, 0]
        reach = max(doses) - min(doses) or 1.0
        ends = []
        for index, (name, counts) in enumerate(outcomes.items()):
            rates = [wilson(count, total) for count, total in zip(counts, totals, strict=True)]
            colour = palette.outcomes.get(name, palette.ink)
            # Beside each other, so that no bar hides another.
            x = [dose + (index - (len(outcomes) - 1) / 2) * 0.008 * reach for dose in doses]
            value = np.array([100 * rate.value for rate in rates])
            bars = (value - [100 * rate.low for rate in rates], [100 * rate.high for rate in rates] - value)
            axes.errorbar(x, value, yerr=bars, color=colour, marker=MARKERS.get(name, "o"), markersize=5, elinewidth=1)
            ends.append((float(value[-1]), outcome_title(name), colour))
        axes.set_ylim(0, 100)
        axes.set_ylabel("responses (%), 95% interval")
        axes.grid(axis="y")
        _end_labels(axes, ends, 6.5)
        for (measures, label), panel in zip(more, panels[1:, 0], strict=True):
            value, low, high = (np.array(part) for part in zip(*measures, strict=True))
            panel.errorbar(
                doses,
                value,
                yerr=(value - low, high - value),
                color=palette.ink,
                marker="o",
                markersize=4,
                elinewidth=1,
            )
            panel.set_ylim(0, None)
            panel.locator_params(axis="y", nbins=4)
            panel.set_ylabel(label)
            panel.grid(axis="y")
        panels[-1, 0].set_xlabel(unit)
        figure.align_ylabels()
        return figure
