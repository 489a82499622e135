"""The report: findings as a page that needs no network, the figures as files, and the data behind each.

    write(study, folder)  ->  explain.html, figures/NAME.svg and .png (light), data/NAME.json and, for tables, .csv

A figure stands in the page as SVG in two variants, of which the reader's colour scheme chooses one. Everything is drawn before
anything is written, and each file is written atomically, the page last and an older one removed first, so that a page
that is there is whole.
"""

from __future__ import annotations

import base64
import csv
import functools
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from safesteer.errors import SafeSteerError, need
from safesteer.explain import about_effects, figures
from safesteer.explain.about_bank import bank_section, categories_section, geometry_section, tokens_section
from safesteer.explain.one_prompt import PromptView, prompt_section
from safesteer.explain.pieces import Drawn, Group, Row, Section, Shaded, Table
from safesteer.explain.study import Study
from safesteer.files import check_writable, json_text, write_atomically, write_text

PAGE = "explain.html"
INDEX = "data/index.json"


@dataclass(frozen=True)
class Rendered:
    """A figure as drawn: SVG text for each theme, and PNG bytes (light)."""

    light: str
    dark: str
    png: bytes


@dataclass(frozen=True)
class Written:
    """What `write` left: the page, and how many figures."""

    page: Path
    figures: int


def check_folder(folder: Path) -> None:
    """Raise `SafeSteerError` now, rather than after minutes of work, if the report cannot be drawn or written to `folder`."""
    need("explain", "matplotlib")
    for part in (folder, folder / "figures", folder / "data"):
        if part.exists() and not part.is_dir():
            raise SafeSteerError(f"{part} is a file; name a folder for the report")
    for name in (PAGE, "figures/probe.svg", INDEX):
        check_writable(folder / name)


def report_sections(study: Study, view: PromptView | None = None) -> list[Section]:
    """All sections, in order."""
    return [
        bank_section(study),
        *([prompt_section(view, study.bank)] if view is not None else []),
        categories_section(study),
        geometry_section(study),
        tokens_section(study),
        *about_effects.sections(study),
    ]


def draw(one: Drawn) -> Rendered:
    """A figure in both themes."""
    light = one.draw("light")
    svg = _svg(light)
    light.set_layout_engine("none")  # as laid out for the SVG
    return Rendered(svg, _svg(one.draw("dark")), figures._png(light))


def _svg(figure: Any) -> str:
    stream = io.BytesIO()
    figures._write(figure, stream, "svg")
    return stream.getvalue().decode("utf-8")


# -- files -------------------------------------------------------------------------------------------------------------


def write(
    study: Study,
    folder: Path,
    view: PromptView | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Draw everything, then write it to `folder`; files that an earlier report left there, and this one has not, are removed.

    `progress(done, total)` counts figures. Raises `SafeSteerError` where a file cannot be written or matplotlib is absent.
    """
    sections = report_sections(study, view)
    drawn = [one for section in sections for one in section.figures]
    rendered: dict[str, Rendered] = {}
    for one in drawn:
        rendered[one.name] = draw(one)
        progress(len(rendered), len(drawn))
    page = render(study, sections, rendered)
    files: dict[str, str | bytes] = {}
    for one in drawn:
        files |= _data(one.name, {"title": one.title, "data": one.data}, one.rows)
        files[f"figures/{one.name}.svg"] = rendered[one.name].light
        files[f"figures/{one.name}.png"] = rendered[one.name].png
    for table in (table for section in sections for table in section.tables):
        files |= _data(f"table_{table.name}", {"title": table.title, "data": table.data}, table.records)
    files |= _data("study", study.to_json(), ())
    if view is not None:
        files |= _data("prompt", view.to_json(), ())
    stale = set(_earlier(folder)) - files.keys()
    # An older page goes first and the new one comes last: where a page is, it belongs to the data beside it.
    (folder / PAGE).unlink(missing_ok=True)
    for name, content in files.items():
        _write_file(folder / name, content)
    _write_file(folder / INDEX, json.dumps({"files": sorted(files)}, indent=1) + "\n")
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    write_text(folder / PAGE, page)
    return Written(folder / PAGE, len(drawn))


def _data(name: str, data: Any, rows: Sequence[Row]) -> dict[str, str | bytes]:
    """`data/NAME.json`, and `data/NAME.csv` where there are rows."""
    files: dict[str, str | bytes] = {f"data/{name}.json": json_text(data, indent=1)}
    if rows:
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        files[f"data/{name}.csv"] = stream.getvalue()
    return files


def _earlier(folder: Path) -> list[str]:
    """What an earlier report wrote, by its own list; only plain names in its two folders."""
    try:
        listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in listed if isinstance(name, str) and re.fullmatch(r"(figures|data)/[\w-]+\.\w+", name)]


def _write_file(path: Path, content: str | bytes) -> None:
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    write_atomically(path, functools.partial(_put, data=data))


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


# -- the page ----------------------------------------------------------------------------------------------------------


def picture(one: Drawn, rendered: Rendered) -> Markup:
    """A figure for the page: two SVG images, each a document of its own, so that their ids cannot clash."""
    light, dark = (
        f"data:image/svg+xml;base64,{base64.b64encode(_slim(text).encode()).decode()}"
        for text in (rendered.light, rendered.dark)
    )
    alternative = escape(one.title)
    return Markup(
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}"><img src="{light}" alt="{alternative}"></picture>'
    )


def prose(text: str) -> Markup:
    """Escaped text, in which what stands between backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _slim(svg: str) -> str:
    """The same picture in about half the letters: two decimals inside tags, and each style written once, as a class."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r">\s+<", "><", svg)
    svg = re.sub(r"<[^<>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"font-family: [^;\"]*sans-serif", "font-family: 'DejaVu Sans', sans-serif", svg)
    counted = Counter(re.findall(r' style="([^"]*)"', svg))
    names = {style: f"s{place}" for place, (style, count) in enumerate(counted.items()) if count > 2}
    svg = re.sub(
        r' style="([^"]*)"', lambda found: f' class="{names[found[1]]}"' if found[1] in names else found[0], svg
    )
    rules = "".join(f".{name}{{{style}}}" for style, name in names.items())
    return svg.replace("<defs>", f"<defs><style>{rules}</style>", 1)


def shade(score: float, limit: float) -> str:
    """The share of full colour of a score, `0.42`, for a style."""
    return f"{min(1.0, abs(score) / limit):.2f}"


def render(study: Study, sections: Sequence[Section], rendered: dict[str, Rendered]) -> str:
    """The page as HTML text that encodes as UTF-8."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals.update(
        picture=lambda one: picture(one, rendered[one.name]), shade=shade, kind=_kind, visible=figures.visible
    )
    environment.filters["prose"] = prose
    template = (resources.files("safesteer.explain") / "templates" / PAGE).read_text(encoding="utf-8")
    page = environment.from_string(template).render(study=study, sections=sections)
    return page.encode("utf-8", "replace").decode("utf-8")


def _kind(part: Group | Table | Shaded) -> str:
    return type(part).__name__.lower()
