"""One case a job: every solver on it, and every peer; jobs run side by side in processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context

from ebbflow.benchmark.measure import Case, Row, run_ours
from ebbflow.benchmark.problems import Problem


@dataclass(frozen=True)
class Job:
    """A case to measure. `problem` makes it, in the process that does the work."""

    problem: Callable[[], Problem]
    solvers: tuple[str, ...]
    budgets: tuple[int, ...]
    count: int
    seed: int
    peers: bool = False

    @property
    def parts(self) -> int:
        """What `run` counts: the reference, each solver, and each budget of the peers."""
        return 1 + len(self.solvers) + (len(self.budgets) if self.peers else 0)


@dataclass(frozen=True)
class Outcome:
    """Rows of one case; `missing` libraries with the reason; `unscored` runs of each library.

    reference: the estimated root mean square error of the reference, in deviations of the data.
    configurations: of the peers. idle: our solvers that could not run, with the reason.
    """

    problem: str
    setting: str
    rows: list[Row]
    reference: float
    deviation: float
    configurations: int = 0
    missing: dict[str, str] = field(default_factory=dict)
    unscored: dict[str, int] = field(default_factory=dict)
    idle: dict[str, str] = field(default_factory=dict)


def measure(job: Job, advance: Callable[[], None] = lambda: None) -> Outcome:
    """Do one job here."""
    case = Case(job.problem(), job.count, job.seed)
    accuracy = case.reference.error
    advance()
    rows: list[Row] = []
    idle: dict[str, str] = {}
    for name in job.solvers:
        try:
            found = run_ours(case, name, job.budgets)
        except (ValueError, ArithmeticError) as error:
            found, idle[name] = [], str(error)  # one solver that cannot does not stop the others
        if not found:
            idle.setdefault(name, "its budgets or statistics do not suffice")
        rows += found
        advance()
    configurations, missing, unscored = 0, {}, {}
    if job.peers:
        from ebbflow.benchmark.peers import gather, run_peers

        peers, missing = gather(case)
        configurations = len(peers)
        for budget in job.budgets:
            theirs, left = run_peers(case, peers, (budget,))
            rows += theirs
            unscored = {k: unscored.get(k, 0) + left.get(k, 0) for k in {*unscored, *left}}
            advance()
    problem = case.problem
    return Outcome(
        problem.name,
        problem.setting,
        rows,
        accuracy,
        case.deviation,
        configurations,
        missing,
        unscored,
        idle,
    )


def run(jobs: Sequence[Job], workers: int, advance: Callable[[], None]) -> list[Outcome]:
    """Outcomes in the order of the jobs; with several workers, each in a process of one thread."""
    if workers == 1 or len(jobs) == 1:
        return [measure(job, advance) for job in jobs]
    found: dict[int, Outcome] = {}
    # Started afresh: a fork would share the threads of torch, which it cannot.
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        waiting = {pool.submit(measure, job): i for i, job in enumerate(jobs)}
        try:
            for future in as_completed(waiting):
                found[waiting[future]] = future.result()
                for _ in range(jobs[waiting[future]].parts):
                    advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[i] for i in range(len(jobs))]


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
