"""The command line: run, stages, lab, scale, test, doctor. Exit codes: 0 done, 1 a stage failed, 2 yours to mend, 130 Ctrl-C, 137 memory."""

import errno
import inspect
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from influence_kit.errors import UserError
from influence_kit.runner.live import clock
from influence_kit.runner.machine import repository, say
from influence_kit.runner.scheduler import RunFailed

# Options that take several values: `--only 03 05` means `--only 03 --only 05`.
MOST_SEEDS = 1000  # of one range
SEVERAL = ("--only", "--seeds", "--force")
INTERRUPTED = 130
NO_TEXT = "INFLUENCE_KIT_WITHOUT_REAL_TEXT"  # read by chapters too

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    help="Influence functions for language models: train, fit, score, and execute every chapter.",
)
Profile = Annotated[
    str,
    typer.Option(
        help="smoke, laptop, real, gpu, hub or a YAML file's path; by default laptop, for 12 real.", show_default=False
    ),
]
Only = Annotated[list[str], typer.Option(metavar="CHAPTER…", help="These chapters: 03, or 03_heavy_tails.")]
Seeds = Annotated[
    list[str], typer.Option(metavar="SEED…", help="These seeds instead of the profile's: 0,1,2 or 21-28.")
]
ShowPlan = Annotated[
    bool, typer.Option("--plan", help="Show the cost and do nothing; with --sequences, of that size (scale --help).")
]
Force = Annotated[list[str], typer.Option(metavar="STAGE|all", help="Make again: a kind of stage, a chapter, or all.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes at the same time (default: the cores).")]
WithoutRealText = Annotated[
    bool, typer.Option("--without-real-text", envvar=NO_TEXT, help="Leave out what needs downloaded text.")
]
Verify = Annotated[bool, typer.Option("--verify", help="Hash every cached file, not only those that changed.")]


def split(values: Iterable[str]) -> list[str]:
    """The words of options that may be repeated, or hold several between commas. Raises UserError for one without any."""
    words = [value.replace(",", " ").split() for value in values]
    if not all(words):
        raise UserError("an option of --only, --seeds or --force is empty: give it a value, or leave it out")
    return [word for some in words for word in some]


def select(wanted: Sequence[str], chapters: Sequence[str]) -> list[str]:
    """Chapters by number or name, in their own order. Raises UserError for an unknown one, listing all."""
    chosen = set()
    for word in wanted:
        stem = word.removesuffix(".ipynb").rpartition("/")[2]
        found = [chapter for chapter in chapters if stem in (chapter, chapter.split("_")[0], chapter.partition("_")[2])]
        if not found:
            raise UserError(f"unknown chapter {word!r}; there are {', '.join(chapters)}")
        chosen.update(found)
    return [chapter for chapter in chapters if chapter in chosen or not wanted]


def _seeds(words: Sequence[str]) -> list[int] | None:
    """Seeds in the order given, ranges (21-28) with both ends, each one once. Raises UserError for what is neither."""
    seeds: list[int] = []
    for word in words:
        first, _, last = word.partition("-")
        if (
            not (first.isdecimal() and (last or first).isdecimal())
            or word.endswith("-")
            or int(last or first) < int(first)
        ):
            raise UserError(f"--seeds takes whole numbers and ranges of them (0,1,2 or 21-28), not {word!r}")
        if int(last or first) - int(first) >= MOST_SEEDS:
            raise UserError(f"--seeds {word} are more than {MOST_SEEDS} seeds: give a shorter range")
        seeds += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(seeds)) or None


def _assignments(words: Sequence[str]) -> dict[str, str]:
    wrong = [word for word in words if not word.partition("=")[1]]
    if wrong:
        raise UserError(f"-p takes NAME=VALUE, not {wrong[0]!r}")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def _load(name: str, seeds: list[int] | None, without_real_text: bool):
    from influence_kit.findings.profiles import load_profile

    os.environ[NO_TEXT] = str(int(without_real_text))
    return load_profile(name, seeds=seeds, real_text=not without_real_text)


def _profile_of(chapters: Sequence[str]) -> str:
    """What runs where no profile is named: laptop, or where it has not what these chapters read the shortest that names them."""
    if not chapters:
        return "laptop"
    from influence_kit.findings.discovery import chapter_names, chapters_for
    from influence_kit.findings.profiles import load_profile, profile_names

    if set(chapters) <= set(chapters_for(load_profile("laptop"))):
        return "laptop"
    named = [profile for profile in map(load_profile, profile_names()) if profile.chapters]
    fit = [profile for profile in named if set(chapters) <= set(select(profile.chapters, chapter_names()))]
    return min(fit, key=lambda profile: profile.minutes).name if fit else "laptop"


def _chosen(settings, only: Sequence[str]) -> tuple[list[str], list[str]]:
    """The chapters that a profile is for, and those of them that --only names. Raises UserError for one that it is not for."""
    from influence_kit.findings.discovery import chapter_names, chapters_for

    every = [name for name in select(settings.chapters, chapter_names()) if name in chapters_for(settings)]
    chapters = select(only, chapter_names()) if only else every
    if others := [name for name in chapters if name not in every]:
        raise UserError(
            f"profile {settings.name!r} is not for {', '.join(others)}, but for {', '.join(every)}: leave --profile out, or choose another"
        )
    return every, chapters


def _check_force(names: Sequence[str], stages: Iterable, chapters: Sequence[str]) -> set[str]:
    """What --force names, chapters by their full name. Raises UserError for what no stage is."""
    stages, kinds = list(stages), {"all"}
    below = stages.copy()
    while below:
        stage = below.pop()
        kinds |= {stage.kind, stage.label}
        below += stage.inputs.values()
    forced = set()
    for name in names:
        found = {name} & kinds or set(select([name], chapters) if any(name in c for c in chapters) else ()) & kinds
        if not found:
            listed = sorted({stage.kind for stage in stages} | {"all"})
            raise UserError(f"--force knows no {name!r}; it takes {', '.join(listed)}, or a chapter")
        forced |= found
    return forced


def _check_own(knobs: Mapping[str, object]) -> bool:
    """Whether a chapter is given a model or texts of the user's own. Raises UserError where they cannot be read, or tracked."""
    if not (knobs.get("model") or knobs.get("texts")):
        return False
    from influence_kit.findings.own import check_own

    check_own(knobs)
    return True


@app.command()
def run(
    profile: Profile = "",
    only: Only = [],  # noqa: B006  (typer reads it, nothing writes it)
    seeds: Seeds = [],  # noqa: B006
    plan: ShowPlan = False,
    force: Force = [],  # noqa: B006
    jobs: Jobs = None,
    without_real_text: WithoutRealText = False,
    update_expected: Annotated[
        bool, typer.Option("--update-expected", help="Make this run's tables what later runs are compared with.")
    ] = False,
    parameter: Annotated[
        list[str], typer.Option("-p", "--parameter", metavar="NAME=VALUE", help="A chapter's parameter.")
    ] = [],  # noqa: B006
    verify: Verify = False,
) -> None:
    """Make every stage, execute every chapter, write figures/<profile>/ and the verdicts.

    Other seeds, parameters, models or profiles than those that ship write a folder of their own, figures/runs/<name>/.
    """
    from influence_kit.findings.discovery import CHECKS, chapter_names, stages_for
    from influence_kit.findings.profiles import changed_from
    from influence_kit.publishing import notebooks
    from influence_kit.publishing.results import closing_screen, publish
    from influence_kit.publishing.runs import Run

    numbers, words = _seeds(split(seeds)), split(only)
    profile = profile or _profile_of(select(words, chapter_names()) if words else [])
    settings = _load(profile, numbers, without_real_text)
    changed = changed_from(profile, numbers, not without_real_text)
    every, chapters = _chosen(settings, words)
    root = notebooks.notebooks_folder().parent
    always = {"profile": profile} | ({"seeds": changed["seeds"]} if "seeds" in changed else {})
    paths = [root / "notebooks" / f"{chapter}.ipynb" for chapter in chapters]
    chosen = notebooks.chosen_parameters(paths, _assignments(parameter), always)
    knobs = {stem: {n: v for n, v in given.items() if n not in always} for stem, given in chosen.items()}
    if any(knobs.values()) and not only:  # the others would come out as ever
        paths = [path for path in paths if knobs[path.stem]]
    own = [_check_own(knobs[path.stem]) for path in paths]
    content = settings.model_dump(mode="json")
    executions = [
        notebooks.chapter_stage(
            path,
            chosen[path.stem],
            content,
            stages_for(settings, path.stem, knobs[path.stem]),
            changed | knobs[path.stem],
        )
        for path in paths
    ]
    run = Run(
        root, settings.name, changed | {name: value for path in paths for name, value in knobs[path.stem].items()}
    )
    labels = [path.stem for path in paths]
    run.check(labels, update_expected)
    stages = [stage for execution in executions for stage in execution.inputs.values()] + executions
    if run.changed and not plan:
        told = ", ".join(f"{name}={value}" for name, value in run.changed.items())
        say(f"{told}: results of {', '.join(labels)} go to {run.folder}")
    made = _make(stages, plan, split(force), chapter_names(), jobs, verify, CHECKS)
    if made is None:
        return
    claims, figures = publish(run.folder, executions, update_expected, run.expected, run.changed)
    total = len({stage.fingerprint for stage in stages})
    if made and (run.changed or labels == every):
        run.write(made, total, labels)
    print(closing_screen(claims, figures, run.folder))
    print(f"{made} made, {total - made} from the cache, in {clock(time.monotonic() - run.began)}; see {run.folder}")
    for path, yours in zip(paths, own):
        executed = run.folder / "notebooks" / path.name
        if only and (found := notebooks.answer(executed)):
            print(f"{path.stem}: {found}")
        if yours:
            print(f"your model and texts: the cards are in {executed}")


@app.command()
def stages(
    profile: Profile = "",
    only: Only = [],  # noqa: B006
    seeds: Seeds = [],  # noqa: B006
    plan: ShowPlan = False,
    force: Force = [],  # noqa: B006
    jobs: Jobs = None,
    without_real_text: WithoutRealText = False,
    verify: Verify = False,
) -> None:
    """Make the stages alone, without notebooks: for a machine whose cache folder is carried back afterwards."""
    from influence_kit.findings.discovery import CHECKS, chapter_names, stages_for

    words = split(only)
    profile = profile or _profile_of(select(words, chapter_names()) if words else [])
    settings = _load(profile, _seeds(split(seeds)), without_real_text)
    _, chapters = _chosen(settings, words)
    wanted = [stage for chapter in chapters for stage in stages_for(settings, chapter)]
    made = _make(wanted, plan, split(force), chapter_names(), jobs, verify, CHECKS)
    if made is not None:
        print(f"{made} stages made")


def _make(
    stages: list, show: bool, force: list[str], chapters: list[str], jobs: int | None, verify: bool, checks
) -> int | None:
    """Show the plan (then None), or check and carry it out: how many stages were made."""
    from influence_kit.publishing.costs import cost_of
    from influence_kit.runner import plan as planning
    from influence_kit.runner.scheduler import make_all

    forced = _check_force(force, stages, chapters)
    plan = planning.plan(stages, cost_of, jobs, forced, verify)
    if show:
        print(planning.describe(plan))
        return None
    planning.preflight(plan, checks)
    if plan.todo:
        say(f"{len(plan.todo)} stages to make, about {clock(plan.seconds)} on {plan.jobs} processes")
    return len(make_all(plan.todo, plan.costs, jobs, forced))


def _number(meaning: str, kind: Callable = int, least: float = 1) -> typer.models.OptionInfo:
    """An option that takes a number, written 64 or 1e7, of `least` or more."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf or kind(value) != value:
            wanted = "whole number" if kind is int else "number"
            raise typer.BadParameter(f"{text!r} is no {wanted} of {least:g} or more: give one, such as 64 or 1e7")
        return kind(value)

    return typer.Option(parser=number, metavar="NUMBER", help=meaning)


@app.command()
def scale(
    sequences: Annotated[int, _number("N, training sequences to scan.")],
    parameters: Annotated[float, _number("Of the model, embeddings not counted.", float)],
    length: Annotated[int | None, _number("T, tokens of a sequence (512).", least=2)] = None,
    queries: Annotated[int | None, _number("Q (64).")] = None,
    fit: Annotated[int | None, _number("Sequences that factors are fitted on (1e5, or all).")] = None,
    layers: Annotated[Literal["mlp", "all"], typer.Option(help="Whose weights carry influence.")] = "mlp",
    ranks: Annotated[int | None, _number("Processes, each on a device of its own (1).")] = None,
    blocks: Annotated[int | None, _number("Diagonal blocks of a covariance (1).")] = None,
    rank: Annotated[int | None, _number("Of query directions (whole).")] = None,
    batch_size: Annotated[int | None, _number("Sequences of a batch (32).")] = None,
    top: Annotated[int | None, _number("Keep this many of either end of a ranking (all scores).")] = None,
    self_influence: Annotated[bool, typer.Option("--self-influence", help="Norms of sequences too.")] = False,
    index_bytes: Annotated[int | None, _number("That an index keeps of a sequence (8192).")] = None,
    memory: Annotated[float | None, _number("Bytes of query directions in memory (2e9).", float, 0)] = None,
    disk: Annotated[float | None, _number("Bytes of temporary files (half of what is free).", float, 0)] = None,
    flops: Annotated[float | None, _number("Operations a second of a rank (measured here).", float)] = None,
    dtype: Annotated[
        Literal["float64", "float32", "bfloat16", "float16"], typer.Option(help="Of weights.")
    ] = "float32",
) -> None:
    """Time and bytes of fitting, scanning and indexing at any size; `run --plan --sequences 1e7 …` is the same."""
    from influence_kit.engine.scale import Work, decoder, describe, speed_of
    from influence_kit.engine.shelf import free_disk

    chosen: dict[str, float | None] = {"length": length, "queries": queries, "ranks": ranks, "blocks": blocks}
    chosen |= {"rank": rank, "batch_size": batch_size, "top": top, "index_bytes": index_bytes, "memory": memory}
    chosen |= {"fit": fit or min(100_000, sequences), "disk": free_disk() if disk is None else disk}
    given = {name: value for name, value in chosen.items() if value is not None}
    work = Work(sequences, self_influence=self_influence, dtype=dtype, **given)  # type: ignore[arg-type]
    try:
        print(describe(decoder(parameters, layers), work, speed_of(flops)))
    except ValueError as error:
        raise UserError(str(error)) from error


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def test(context: typer.Context) -> None:
    """Run the test suite; everything after `test` goes to pytest."""
    root = repository()
    if root is None or not (root / "tests").is_dir():
        raise UserError("no tests/ beside the package: clone the repository and run ./run_all.sh test there")
    os.chdir(root)
    os.environ.pop("INFLUENCE_KIT_CWD", None)  # tests stand where they are
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *context.args])


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lab(
    context: typer.Context,
    chapter: Annotated[str, typer.Argument(metavar="[CHAPTER]", help="Open this one: 03, or 03_heavy_tails.")] = "",
) -> None:
    """Open JupyterLab on the notebooks, with this environment's kernel and the cache; what follows goes to jupyter lab."""
    from influence_kit.findings.discovery import chapter_names
    from influence_kit.publishing.lab import command

    words = [chapter] if chapter.startswith("-") else []
    chosen = select([chapter], chapter_names()) if chapter and not words else []
    line, settings = command(chosen[0] if chosen else "", [*words, *context.args])
    os.environ.update(settings)
    sys.stdout.flush()
    os.execv(line[0], line)


@app.command()
def doctor() -> None:
    """Say what this machine has and lacks, each with its remedy."""
    from influence_kit.runner import doctor

    doctor.main([])


def unfold(arguments: Sequence[str]) -> list[str]:
    """Give each value of an option that takes several its own option: `--only 03 05` -> `--only 03 --only 05`."""
    unfolded: list[str] = []
    option = ""
    for word in arguments:
        if word.startswith("-"):
            option = word if word in SEVERAL else ""
            count = 0
        elif option:
            unfolded += [option] if count else []
            count += 1
        unfolded.append(word)
    return unfolded


def at_scale(words: list[str]) -> list[str]:
    """`run --plan --sequences 1e7 …` -> `scale --sequences 1e7 …`. Raises UserError where --plan is missing."""
    options = {f"--{name.replace('_', '-')}" for name in inspect.signature(scale).parameters}
    asked = [word for word in words if word.partition("=")[0] in options]
    if words[:1] != ["run"] or not asked:
        return words
    if "--plan" not in words:
        raise UserError(f"{asked[0]} is about a cost, and nothing of that size is run from here: add --plan")
    return ["scale", *(word for word in words[1:] if word != "--plan")]


def _remedy(error: OSError) -> str:
    """One line for an error of the user's disk; "" for any other."""
    place = Path(error.filename) if isinstance(error.filename, str) else None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = place.parent if place else Path.cwd()
        return f"no space left in {where}: free some there, then run again (finished stages are kept)"
    if place and isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
        return f"{place}: {error.strerror}; move what is in the way, then run again (finished stages are kept)"
    if place and (isinstance(error, PermissionError) or error.errno == errno.EROFS):
        return f"cannot write or read {place} ({error.strerror}): mend that, then run again (finished stages are kept)"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; every foreseeable end is one line on stderr and an exit code (see the module's first line)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Inherited by every process of the run: the order of sets of strings, and threads that tokenizers would start.
    os.environ.setdefault("PYTHONHASHSEED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        words = words if words[:1] == ["test"] else at_scale(unfold(words))
        if app(words, prog_name="influence-kit", standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt  # typer makes a code of it
    except typer.TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        say(f"error: {message} (see --help)")
        return 2
    except UserError as error:
        say(f"error: {error}")
        return 2
    except RunFailed as failure:
        say(f"error: {failure}")
        return failure.exit_code
    except OSError as error:
        if not (remedy := _remedy(error)):
            raise
        say(f"error: {remedy}")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted; finished stages are kept, and unfinished ones go on from where they saved themselves")
        return INTERRUPTED
    return 0
