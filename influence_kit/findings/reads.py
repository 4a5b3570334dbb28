"""What each chapter reads of a profile's grid, and what is looked at before any of it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from influence_kit.errors import UserError
from influence_kit.findings.families import END, dialogue_grid, planted_grid, text_grid
from influence_kit.findings.families import Planned as Trained
from influence_kit.findings.profiles import PlantedGrid, Profile
from influence_kit.runner.stages import Stage


def _start_here(profile: Profile) -> list[Trained]:
    return planted_grid(
        profile,
        "atlas",
        seeds=profile.seeds[:1],
        widths=[profile.atlas.family.sizes[min(1, len(profile.atlas.family.sizes) - 1)].width],
    )


def _worlds_and_models(profile: Profile) -> list[Trained]:
    return planted_grid(profile, "atlas", ("base", "shuffled"), fractions=()) + text_grid(profile, fractions=())


def _is_ekfac_right(profile: Profile) -> list[Trained]:
    _section(profile, "little_atlas", "02")
    found = planted_grid(profile, "little_atlas", extra=("rivals", "response", "bank", "reweighted"))
    for world in ("atlas", "ladder"):
        found += planted_grid(profile, world, widths=middle_width(profile, world), extra=("rivals",))
    return found + text_grid(profile, extra=("rivals", "bank"), section="little_text")


def middle_width(profile: Profile, world: str) -> list[int]:
    """The middle one of a family's widths, in a list; none where the profile has no such world."""
    grid = getattr(profile, world)
    widths = sorted({size.width for size in grid.family.sizes}) if grid else []
    return widths[len(widths) // 2 : len(widths) // 2 + 1]


def _heavy_tails(profile: Profile) -> list[Trained]:
    _section(profile, "little_atlas", "03")
    trained = planted_grid(profile, "atlas", fractions=(0.0, END)) + planted_grid(profile, "atlas", ("shuffled",))
    return trained + planted_grid(profile, "little_atlas", extra=("reweighted",)) + text_grid(profile, (0.0, END))


def _section(profile: Profile, world: str, chapter: str) -> PlantedGrid:
    found = getattr(profile, world)
    if found is None:
        raise UserError(
            f"profile {profile.name!r} has no `{world}` section, which chapter {chapter} reads: add one (as in laptop.yaml), or "
            "name the chapters you want by --only"
        )
    return found


def _trained_again(profile: Profile, world: str, chapter: str, *arms: str) -> list[Trained]:
    """Models of arms that a chapter trains again as its referee, without scans; UserError where the profile lacks one."""
    for arm in arms:
        if arm not in getattr(profile, world).arms:
            raise UserError(
                f"profile {profile.name!r} has no {world} arm `{arm}`, which chapter {chapter} trains again: add one (as in laptop.yaml), "
                "or name the chapters you want by --only"
            )
    return planted_grid(profile, world, arms, fractions=())


def _abstraction(profile: Profile) -> list[Trained]:
    section = _section(profile, "ladder", "04")
    dropped = [arm for arm in section.arms if arm.startswith("dropped_")]
    found = planted_grid(profile, "ladder", fractions=(*section.scan.fractions, END))
    return found + planted_grid(profile, "ladder", dropped, fractions=()) + text_grid(profile)


def _cross_lingual(profile: Profile) -> list[Trained]:
    along = (*profile.atlas.scan.fractions, END)
    arms = ("minority", "no_anchors", "half_anchors")
    found = planted_grid(profile, "atlas", fractions=along) + planted_grid(profile, "atlas", arms)
    found += _trained_again(profile, "atlas", "05", "without_translations")
    return found + (text_grid(profile, (*profile.text.scan.fractions, END)) if profile.text else [])


def _word_order(profile: Profile) -> list[Trained]:
    along = (*profile.atlas.scan.fractions[:1], END)
    arms = ("both_orders", "reversed", "bridged")
    return planted_grid(profile, "atlas", ("base", *arms), along, extra=("order",))


def _memorisation(profile: Profile) -> list[Trained]:
    found = planted_grid(profile, "atlas", fractions=(0.0, END), extra=("canaries",))
    found += _trained_again(profile, "atlas", "08", "without_copies")
    return found + text_grid(profile, (0.0, END), extra=("recital",))


def _layers_and_tokens(profile: Profile) -> list[Trained]:
    early = _section(profile, "deep", "09").scan.fractions[:1]
    found = planted_grid(profile, "deep", fractions=(0.0, END), extra=("layers", "maps"))
    found += planted_grid(profile, "deep", fractions=early, extra=("layers",))
    widest = [max(size.width for size in profile.text.family.sizes)] if profile.text else []
    return found + text_grid(profile, widths=widest, extra=("layers", "maps"))


def _cost_of_scanning(profile: Profile) -> list[Trained]:
    found = planted_grid(profile, "atlas", extra=("batching",)) + planted_grid(profile, "ladder", extra=("batching",))
    found += text_grid(profile, extra=("batching",))
    # An exact solution to compare with is affordable in the smallest models alone.
    small = [size.width for size in profile.ladder.family.sizes[:2]] if profile.ladder else []
    found += planted_grid(profile, "ladder", widths=small, extra=("cost",))
    small = [size.width for size in profile.text.family.sizes[:1]] if profile.text else []
    return found + text_grid(profile, widths=small, extra=("cost",))


def _role_play(profile: Profile) -> list[Trained]:
    found = dialogue_grid(profile, ("base", "unnamed"))
    if profile.cast is None:
        return found
    along, retrained = (*profile.cast.scan.fractions, END), [a for a in profile.cast.arms if profile.cast.arms[a].world.get("dropped")]
    worlds = planted_grid(profile, "cast", ("base", "description", "planning"), along)
    return worlds + planted_grid(profile, "cast", retrained, ()) + found


def _maths_and_code(profile: Profile) -> list[Trained]:
    section = _section(profile, "procedures", "11")
    found = planted_grid(profile, "procedures", fractions=(*section.scan.fractions, END))
    found += _trained_again(profile, "procedures", "11", "without_procedure", "without_names")
    return found + planted_grid(profile, "procedures", ("shuffled",))


# A chapter more: a function above that says what it reads, and its line here, under the notebook's name.
READS: dict[str, Callable[[Profile], list[Trained]]] = {
    "00_start_here": _start_here,
    "01_worlds_and_models": _worlds_and_models,
    "02_is_ekfac_right": _is_ekfac_right,
    "03_heavy_tails": _heavy_tails,
    "04_abstraction_vs_size": _abstraction,
    "05_cross_lingual": _cross_lingual,
    "06_role_play": _role_play,
    "07_word_order": _word_order,
    "08_memorisation": _memorisation,
    "09_layers_and_tokens": _layers_and_tokens,
    "10_cost_of_scanning": _cost_of_scanning,
    "11_maths_and_code": _maths_and_code,
}
CHAPTERS = list(READS)


def stages_for(profile: Profile, chapter: str) -> list[Stage]:
    """All stages a chapter reads, inputs before what is made of them, each once."""
    unique = {stage.fingerprint: stage for trained in READS[chapter](profile) for stage in trained.stages}
    return list(unique.values())


# Sources that are downloaded, and the files that do instead; `dialogue` takes a source and a folder as `text` does.
FETCHED = {"libreoffice": "libreoffice-help-<language>_*.deb", "wesnoth": "wesnoth-<series>-<campaign>_*.deb"}


def text_is_in_reach(todo: Sequence[Stage]) -> None:
    """Before any work: raise UserError when real text has to be fetched and cannot be."""
    for stage in todo:
        if stage.kind != "text":
            continue
        if stage.parameters["folder"] and not Path(stage.parameters["folder"]).exists():
            raise UserError(
                f"text folder {stage.parameters['folder']} does not exist: mend the profile or pass --without-real-text"
            )
        if stage.parameters["source"] in FETCHED:
            from influence_kit.packages import available

            if problem := available():
                raise UserError(
                    f"real text cannot be fetched: {problem}; run on Debian or Ubuntu (or in a container of one), put the "
                    f"{FETCHED[stage.parameters['source']]} files into a folder and name it in a profile of your own "
                    "(text: {source: debs, folder: …}), or pass --without-real-text"
                )


def device_is_there(todo: Sequence[Stage]) -> None:
    """Before any work: raise UserError when stages want a GPU and there is none."""
    wanted = {stage.parameters.get("device", "cpu") for stage in todo} - {"cpu"}
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"this profile computes on {', '.join(sorted(wanted))} and torch finds no GPU: use --profile laptop"
        )


CHECKS = (text_is_in_reach, device_is_there)
