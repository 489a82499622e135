"""The figures of a report, one by one, for a notebook: the same functions, titles and data.

bank.plot.cosines()                    what a bank alone shows
plot(study, "separation_hate")         any figure of a study (and of a prompt's view), by the name of its file
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safesteer.errors import SafeSteerError
from safesteer.explain.about_bank import cosine_figure, doses_figure
from safesteer.explain.figures import Theme
from safesteer.explain.geometry import cosine_map
from safesteer.explain.one_prompt import PromptView
from safesteer.explain.report import report_sections
from safesteer.explain.study import Study
from safesteer.vectors import VectorBank

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class BankPlots:
    """Figures of a bank alone, which need no model. Each returns a matplotlib figure."""

    bank: VectorBank

    def cosines(self, theme: Theme = "light", *, before_shrinkage: bool = False) -> Figure:
        """How alike the directions are, as they act, or before they were moved towards each other.

        Raises `SafeSteerError` where nothing moved them, or the bank does not hold them.
        """
        found = cosine_map(self.bank)
        if before_shrinkage and found.before_shrinkage is None:
            raise SafeSteerError(
                "there are no directions before shrinkage: nothing moved these, or the bank was fitted before they were kept, "
                "and has to be fitted again"
            )
        return cosine_figure(found, "cosines", before=before_shrinkage).draw(theme)

    def doses(self, theme: Theme = "light") -> Figure:
        """The dose of each category, block by block."""
        return doses_figure(self.bank).draw(theme)


def plot(study: Study, name: str, theme: Theme = "light", view: PromptView | None = None) -> Figure:
    """A figure of the report on `study` (and on a prompt's `view`), by its name there.

    Raises `SafeSteerError` with the names that there are.
    """
    drawn = {one.name: one for section in report_sections(study, view) for one in section.figures}
    if name not in drawn:
        raise SafeSteerError(f"there is no figure {name!r}; there are {', '.join(drawn) or 'none'}")
    return drawn[name].draw(theme)
