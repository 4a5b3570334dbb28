"""What a run would do and what it takes, before it does anything."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from influence_kit.errors import UserError
from influence_kit.files import free_disk
from influence_kit.runner.live import clock
from influence_kit.runner.machine import cache_root, cores, total_memory
from influence_kit.runner.scheduler import chain_seconds, needed
from influence_kit.runner.stages import Cost, Stage

# Files other than stages' own (logs, checkpoints of unfinished stages) and estimates that fall short.
DISK_MARGIN = 1.2


@dataclass(frozen=True)
class Plan:
    """The stages a run looks at, those it will make and what each takes (by fingerprint, inputs first), and all together."""

    stages: list[Stage]
    todo: dict[str, Stage]
    costs: dict[str, Cost]
    jobs: int

    @property
    def seconds(self) -> float:
        """Estimated time on `jobs` processes: no less than the work shared out, than the longest chain, or than a GPU's own work."""
        if not self.todo:
            return 0.0
        work = sum(self.costs[key].seconds * min(stage.threads, self.jobs) for key, stage in self.todo.items())
        gpus: dict[str, float] = defaultdict(float)
        for key, stage in self.todo.items():
            if stage.gpu is not None:
                gpus[stage.gpu] += self.costs[key].seconds
        return max(work / self.jobs, max(chain_seconds(self.todo, self.costs).values()), *gpus.values())

    @property
    def memory_bytes(self) -> int:
        """Estimated memory when the largest stages run at the same time."""
        return sum(sorted((cost.memory_bytes for cost in self.costs.values()), reverse=True)[: self.jobs])

    @property
    def disk_bytes(self) -> int:
        """Estimated disk of all that is to be made."""
        return sum(cost.disk_bytes for cost in self.costs.values())


def plan(
    stages: Iterable[Stage],
    cost_of: Callable[[Stage], Cost],
    jobs: int | None = None,
    force_kinds: Collection[str] = (),
    verify: bool = False,
) -> Plan:
    """Look at the cache: which of these stages, and of their inputs, are to be made, and what `cost_of` says that it takes."""
    stages = list({stage.fingerprint: stage for stage in stages}.values())
    todo = needed(stages, force_kinds, verify)
    listed = {stage.fingerprint for stage in stages}
    below = [stage for key, stage in todo.items() if key not in listed]
    return Plan(below + stages, todo, {key: cost_of(stage) for key, stage in todo.items()}, jobs or cores())


def preflight(plan: Plan, checks: Iterable[Callable[[list[Stage]], None]] = ()) -> None:
    """Refuse a run that could not end, before it begins.

    `checks` are called with the stages to make and raise UserError where something they need is out of reach (real
    text without network or apt, say). Raises UserError for too little disk at the cache, for a cache that cannot be
    written, or for a stage that needs more memory than the machine has.
    """
    if not plan.todo:
        return
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / ".writable"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {root} ({error.strerror}): mend that or set INFLUENCE_KIT_CACHE to another"
        ) from error
    need, free = DISK_MARGIN * plan.disk_bytes, free_disk(root)
    if need > free:
        raise UserError(
            f"needs about {need / 1e9:.1f} GB in {root}, {free / 1e9:.1f} GB free: set INFLUENCE_KIT_CACHE to a folder "
            "on a larger disk or free space there"
        )
    largest = max(plan.todo, key=lambda key: plan.costs[key].memory_bytes)
    if plan.costs[largest].memory_bytes > total_memory():
        raise UserError(
            f"stage {plan.todo[largest].name} needs about {plan.costs[largest].memory_bytes / 1e9:.1f} GB of memory, this machine has "
            f"{total_memory() / 1e9:.1f} GB: choose a smaller profile"
        )
    for check in checks:
        check(list(plan.todo.values()))


def describe(plan: Plan) -> str:
    """The plan as a table for the terminal: each stage with its state and estimates, then the totals."""
    width = max([len(stage.name) for stage in plan.stages] + [len("stage")])
    lines = [f"{'stage':<{width}}  {'state':<6}  {'time':>8}  {'memory':>8}  {'disk':>8}"]
    for stage in plan.stages:
        cost = plan.costs.get(stage.fingerprint)
        numbers = [clock(cost.seconds), size(cost.memory_bytes), size(cost.disk_bytes)] if cost else ["", "", ""]
        state = "to do" if cost else "cached"
        lines.append(f"{stage.name:<{width}}  {state:<6}  " + "  ".join(f"{number:>8}" for number in numbers).rstrip())
    cached = len(plan.stages) - len(plan.todo)
    lines.append(
        f"{len(plan.todo)} to do, {cached} cached; on {plan.jobs} process{'es' * (plan.jobs > 1)} about "
        f"{clock(plan.seconds)}, {size(plan.memory_bytes)} memory, {size(plan.disk_bytes)} disk in {cache_root()} "
        f"({size(free_disk(cache_root()))} free)"
    )
    return "\n".join(line.rstrip() for line in lines)


def size(count: float) -> str:
    """Bytes for people: 120 MB, 3.4 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
