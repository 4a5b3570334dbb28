"""What a notebook works with: the models of its profile, and a place for its figures and claims."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from influence_kit.findings import families
from influence_kit.findings.profiles import changed_from, load_profile
from influence_kit.findings.trained import Trained
from influence_kit.runner.fingerprint import versions
from influence_kit.runner.machine import repository
from influence_kit.runner.stages import Stage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas
    from matplotlib.figure import Figure

    from influence_kit.measures.claims import Claim
    from influence_kit.measures.intervals import Estimate
    from influence_kit.reading.saved import SavedFigure


class Chapter:
    """A notebook's own place: `atlas`, `ladder`, `cast` and `text` give models, `figure` and `conclude` keep what it found.

    name: the notebook's stem; profile, seeds and real_text as on the command line. Files go where INFLUENCE_KIT_FIGURES says (set
    by run_all.sh), else to figures/scratch/.
    """

    def __init__(self, name: str, profile: str = "laptop", seeds: list[int] | None = None, real_text: bool = True):
        # transformers asks for widgets that no executed notebook can keep.
        warnings.filterwarnings("ignore", message="IProgress not found")
        self.name = name
        real_text = real_text and os.environ.get("INFLUENCE_KIT_WITHOUT_REAL_TEXT") != "1"
        self.profile = load_profile(profile, seeds, real_text)
        told = os.environ.get("INFLUENCE_KIT_CHANGED")  # by a run, which knows the notebook's parameters too
        self.changed = json.loads(told) if told else changed_from(profile, seeds, real_text)
        chosen = os.environ.get("INFLUENCE_KIT_FIGURES")
        self.folder = Path(chosen) if chosen else (repository() or Path.cwd()) / "figures" / "scratch"
        self.claims: list[Claim] = []
        self._stages: dict[str, Stage] = {}

    def planted(self, corpus: str, *arms: str, **choice) -> list[Trained]:
        """Models trained on a planted world: `arms` ("base" by default); `fractions`, `widths`, `seeds` narrow the grid, `extra`
        names further stages to make. An empty list where the profile has no such world."""
        return self._runs(families.planted_grid(self.profile, corpus, arms or ("base",), **choice))

    def atlas(self, *arms: str, **choice) -> list[Trained]:
        """Models trained on Atlas, chosen as in `planted`."""
        return self.planted("atlas", *arms, **choice)

    def ladder(self, *arms: str, **choice) -> list[Trained]:
        """Models trained on Ladder, chosen as in `planted`."""
        return self.planted("ladder", *arms, **choice)

    def cast(self, *arms: str, **choice) -> list[Trained]:
        """Models trained on Cast, chosen as in `planted`."""
        return self.planted("cast", *arms, **choice)

    def text(self, **choice) -> list[Trained]:
        """Models trained on real text (`section="little_text"`: the small family); an empty list in a run without it."""
        return self._runs(families.text_grid(self.profile, **choice))

    def dialogue(self, *arms: str, **choice) -> list[Trained]:
        """Models trained on spoken lines, chosen as in `planted`; an empty list in a run without real text."""
        return self._runs(families.dialogue_grid(self.profile, arms or ("base",), **choice))

    def _runs(self, trained: list[families.Planned]) -> list[Trained]:
        self._stages |= {stage.fingerprint: stage for one in trained for stage in one.stages}
        return [Trained(one) for one in trained]

    def rests_on(self, stages: Iterable[Stage]) -> None:
        """Name stages among those behind this chapter's figures, where it reads others than the profile's grids."""
        self._stages |= {stage.fingerprint: stage for stage in stages}

    @property
    def provenance(self) -> dict:
        """What every figure and table carries: profile, seeds, what was changed of the profile's plain run, versions, fingerprints
        of the stages behind it; no clock."""
        from influence_kit import __version__

        about: dict[str, object] = {
            "kit": __version__,
            "chapter": self.name,
            "profile": self.profile.name,
            "seeds": list(self.profile.seeds),
        }
        about["versions"] = versions(("torch", "transformers", "numpy", "matplotlib"))
        if self.changed:
            about["changed"] = self.changed
        return about | {"stages": sorted(fingerprint[:16] for fingerprint in self._stages)}

    def figure(self, fig: Figure, name: str, table: pandas.DataFrame, alt: str) -> SavedFigure:
        """Keep a figure as PNG and SVG with the table behind it; as a cell's last value it shows itself."""
        from matplotlib import pyplot

        from influence_kit.reading.saved import save_figure

        saved = save_figure(fig, self.folder, name, table=table, alt=alt, provenance=self.provenance)
        pyplot.close(fig)
        return saved

    def conclude(
        self, id: str, estimate: Estimate, referee: Claim | Estimate | None = None, gates: Sequence[Claim] = ()
    ) -> Claim:
        """Judge an estimate by the rule that `claims.yaml` has fixed for a claim, and keep the verdict.

        Args:
            id: Of the claim, one of this chapter's.
            estimate: What was measured, with its value within each seed.
            referee: What another method says, retraining above all: its estimate, or a claim of its own.
            gates: Checks that must be passed before the claim is read.

        Raises:
            UserError: An id that is not in the file, or belongs to another chapter.
        """
        from influence_kit.findings.fixed import rule_of
        from influence_kit.measures.claims import judged, row_of, write_json

        made = judged(rule_of(id, self.name), estimate, referee, gates)
        if any(old.id == made.id for old in self.claims):
            self.claims = [made if old.id == made.id else old for old in self.claims]
        else:
            self.claims.append(made)
        (self.folder / "claims").mkdir(parents=True, exist_ok=True)
        rows = [row_of(one) for one in self.claims]
        content = {"changed": self.changed, "claims": rows} if self.changed else rows
        write_json(self.folder / "claims" / f"{self.name}.json", content)
        return made

    def verdicts(self):
        """The chapter's verdict table, for the end of a notebook."""
        from IPython.display import Markdown

        from influence_kit.reading.verdicts import chapter_table_markdown

        return Markdown(chapter_table_markdown(self.claims))
