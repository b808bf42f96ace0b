"""Value and gradient of seven implicit functions beside jaxopt and torchopt, where installed.

    python -m benchmarks.implicit [--size small|medium] [--repeats 5] [--problem ridge]

float64 on one thread, every library in a process of its own, each with those of its solvers that
were fastest here, at medium size, at a gradient right to 1e-7. All solve to the same tolerances:
1e-9 for the gradient of the ridge and the program's residuals, 1e-10 for fixed points, `SYSTEM`
for the linear systems of the derivatives. Cold is the first call, which compiles jaxopt's;
warm the least of the repeats after it; both in milliseconds of the processor. Memory is what a
warm call adds to the resident set at its height, from another process whose allocator returns what
is freed. A ratio is ours over theirs. Error is the greatest difference of the gradient, relative,
from the closed form or from a solution to 1e-13. torchopt has no solvers of its own for these
problems: it gets torch's L-BFGS, accelerated proximal gradient, Picard's iteration, and for the
program our interior point and for the simplex our projection.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LIBRARIES = ("ebbflow", "jaxopt", "torchopt")
SIZES = {
    "small": {
        "ridge": (200, 60),
        "lasso": (200, 60),
        "svm": (20, 30),
        "program": 40,
        "net": 100,
        "simplex": 1000,
        "transport": 40,
    },
    "medium": {
        "ridge": (3000, 800),
        "lasso": (1500, 500),
        "svm": (100, 150),
        "program": 200,
        "net": 800,
        "simplex": 100_000,
        "transport": 300,
    },
}
SYSTEM = 1e-8
Run = Callable[[np.ndarray], np.ndarray]


def problems(size: str) -> dict[str, dict[str, Any]]:
    """Data of each problem, and the point `at` which it is differentiated."""
    rng, sizes = np.random.default_rng(0), SIZES[size]

    def regression(name: str, at: Any) -> dict[str, Any]:
        a = rng.normal(size=sizes[name])
        return {"a": a, "y": rng.normal(size=len(a)), "at": at(a.shape[1])}

    ridge = regression("ridge", lambda n: np.full(n, 3.0))
    lasso = regression("lasso", lambda n: np.array(20.0))
    a = rng.normal(size=sizes["svm"])
    n = sizes["program"]
    q, e, m = rng.normal(size=(n, n)), rng.normal(size=(n // 8, n)), rng.normal(size=(n // 4, n))
    w = rng.normal(size=(sizes["net"], sizes["net"]))
    one, other = rng.normal(size=(2, sizes["transport"], 2))
    cost = ((one[:, None] - other - 1) ** 2).sum(-1)
    return {
        "ridge": ridge,
        "lasso": {**lasso, "step": np.array(1 / np.linalg.norm(lasso["a"], 2) ** 2)},
        "svm": {
            "a": a,
            "y": np.eye(3)[rng.integers(3, size=len(a))],
            "at": np.array(4.0),
            "step": np.array(4.0 / np.linalg.norm(a, 2) ** 2),
        },
        "program": {
            "q": q @ q.T / n + np.eye(n),
            "e": e,
            "d": np.ones(len(e)),
            "m": m,
            "h": np.full(len(m), 0.5),
            "at": rng.normal(size=n),
        },
        "network": {"w": 0.8 * w / np.linalg.norm(w, 2), "at": rng.normal(size=len(w))},
        "simplex": {"at": rng.normal(size=sizes["simplex"]) / sizes["simplex"]},
        "transport": {"at": cost / (0.05 * cost.mean())},
    }


def functions(name: str, t: dict[str, Any], numpy: Any) -> Callable[..., Any]:
    """The objective, or for the network the map; the same lines for torch and for jax."""
    if name == "ridge":
        return lambda x, at: 0.5 * ((t["a"] @ x - t["y"]) ** 2).sum() + 0.5 * (at * x * x).sum()
    if name == "lasso":
        return lambda x: 0.5 * ((t["a"] @ x - t["y"]) ** 2).sum()
    if name == "svm":
        residual = lambda x: t["a"].T @ (t["y"] - x)  # noqa: E731
        return lambda x, at: 0.5 * (residual(x) ** 2).sum() / at + (x * t["y"]).sum()
    return lambda z, at: numpy.tanh(t["w"] @ z + at)


def transport(log_sum: Callable[[Any, int], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Sinkhorn's map of the first potential between uniform laws, for a cost in units of the
    temperature, and the plan of a potential, times the number of points."""

    def second(f: Any, at: Any) -> Any:
        return math.log(len(f)) - log_sum(f[:, None] - at, 0)

    def sinkhorn(f: Any, at: Any) -> Any:
        new = math.log(len(f)) - log_sum(second(f, at)[None] - at, 1)
        return new - new.mean()

    def plan(f: Any, at: Any, exp: Callable[[Any], Any]) -> Any:
        return exp(f[:, None] + second(f, at)[None] - at) / len(f)

    return sinkhorn, plan


def torch_run(p: dict[str, Any], solve: Callable[[Any, Any], Any]) -> Run:
    """The gradient of the sum of squares of the solution."""
    import torch

    torch.set_num_threads(1)
    t = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in p.items()}

    def run(at: np.ndarray) -> np.ndarray:
        point = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(solve(t, point).square().sum(), point)
        return gradient.numpy()

    return run


def ebbflow(name: str, p: dict[str, Any], tol: float = 1e-10, system: float = SYSTEM) -> Run:
    import torch

    from ebbflow.differentiation import (
        conditions,
        fixed_point,
        linear,
        minimize,
        projections,
        proximal,
        quadratic_program,
        solvers,
    )

    def solve(t: dict[str, Any], at: Any) -> Any:
        if name == "simplex":
            return projections.simplex(at)
        f = functions(name, t, torch)
        zeros = torch.zeros(p["a"].shape[1] if "a" in p else len(at), dtype=torch.float64)
        if name == "transport":
            sinkhorn, plan = transport(torch.logsumexp)
            systems = linear.BiCGSTAB(system)
            return plan(
                fixed_point(sinkhorn, zeros, at, tol=tol, linear_solver=systems), at, torch.exp
            )
        if name == "ridge":
            # A quadratic: one exact step is better than several inexact ones.
            newton = solvers.Newton(linear_solver=linear.CG(tolerance=6e-13))
            return minimize(f, zeros, at, tol=1e-9, solver=newton, linear_solver=linear.CG(system))
        if name == "lasso":
            step = float(t["step"])
            prox = lambda z, w: proximal.lasso(z, step * w)  # noqa: E731
            condition = conditions.proximal_gradient(f, prox, step)
            return fixed_point(
                condition, zeros, (), at, tol=tol, linear_solver=linear.GMRES(system)
            )
        if name == "svm":
            step = float(t["step"])
            condition = conditions.projected_gradient(f, projections.simplex, step)
            start = torch.full_like(t["y"], 1 / 3)
            return fixed_point(condition, start, at, tol=tol, linear_solver=linear.GMRES(system))
        if name == "program":
            return quadratic_program(t["q"], at, t["e"], t["d"], t["m"], t["h"]).x
        stable = linear.BiCGSTAB(system)
        return fixed_point(f, zeros, at, tol=tol, solver="picard", linear_solver=stable)

    return torch_run(p, solve)


def jaxopt(name: str, p: dict[str, Any]) -> Run:
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import jaxopt
    from jaxopt import linear_solve

    t = {k: jnp.asarray(v) for k, v in p.items()}
    f = functions(name, t, jnp)

    def systems(solve: Callable[..., Any], tol: float = SYSTEM) -> dict[str, Any]:
        return {
            "implicit_diff_solve": lambda matvec, b, **_: solve(matvec, b, tol=tol, maxiter=50000)
        }

    def solve(at: Any) -> Any:
        if name == "simplex":
            return jaxopt.projection.projection_simplex(at)
        zeros = jnp.zeros(p["a"].shape[1] if "a" in p else len(p["at"]))
        if name == "transport":
            sinkhorn, plan = transport(jax.scipy.special.logsumexp)
            options = systems(linear_solve.solve_gmres)
            # Theirs is absolute, ours relative to the potential, whose norm is 170. Their Anderson
            # takes twice as long.
            method = jaxopt.FixedPointIteration(sinkhorn, tol=1.7e-8, maxiter=5000, **options)
            return plan(method.run(zeros, at).params, at, jnp.exp)
        if name == "ridge":
            # Every one of its line searches takes longer than steps of 1, which do converge here.
            options = systems(linear_solve.solve_cg) | {"tol": 1e-9, "stepsize": 1.0}
            method = jaxopt.LBFGS(f, maxiter=2000, **options)
            return method.run(zeros, at).params
        if name == "program":
            # Looser systems leave an error of 1e-2.
            method = jaxopt.OSQP(
                tol=1e-9, maxiter=20000, **systems(linear_solve.solve_normal_cg, 1e-12)
            )
            parts = {"params_eq": (t["e"], t["d"]), "params_ineq": (t["m"], t["h"])}
            return method.run(params_obj=(t["q"], at), **parts).params.primal
        if name == "network":
            options = systems(linear_solve.solve_bicgstab)
            method = jaxopt.FixedPointIteration(f, tol=1e-10, maxiter=1000, **options)
            return method.run(zeros, at).params
        # Its line search stalls at 1e-7, and ProjectedGradient ignores `implicit_diff_solve`.
        options = {"tol": 1e-10, "maxiter": 20000, "stepsize": float(p["step"])}
        options |= {"acceleration": False}
        if name == "lasso":
            options |= systems(linear_solve.solve_gmres)
            method = jaxopt.ProximalGradient(f, jaxopt.prox.prox_lasso, **options)
            return method.run(zeros, at).params
        options |= systems(linear_solve.solve_bicgstab)
        project = jax.vmap(jaxopt.projection.projection_simplex)
        method = jaxopt.ProximalGradient(f, lambda x, *_: project(x), **options)
        return method.run(jnp.full(p["y"].shape, 1 / 3), None, at).params

    gradient = jax.jit(jax.grad(lambda at: (solve(at) ** 2).sum()))
    return lambda at: np.asarray(gradient(jnp.asarray(at)).block_until_ready())


def accelerated(step: Callable[[Any], Any], x: Any, tol: float = 1e-10) -> Any:
    """FISTA with restarts on a proximal gradient step."""
    y, momentum = x, 1.0
    for _ in range(20000):
        new = step(y)
        if (new - y).norm() <= tol * (1 + x.norm()):
            return new
        if ((y - new) * (new - x)).sum() > 0:
            momentum = 1.0
        ahead = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        x, y, momentum = new, new + (momentum - 1) / ahead * (new - x), ahead
    return x


def torchopt(name: str, p: dict[str, Any]) -> Run:
    import torch
    from torchopt.diff.implicit import custom_root
    from torchopt.linear_solve import solve_cg, solve_inv, solve_normal_cg

    from ebbflow.differentiation import conditions, projections, proximal
    from ebbflow.differentiation.programs import interior_point

    def solve(t: dict[str, Any], at: Any) -> Any:
        if name == "simplex":
            return projections.simplex(at)
        f = functions(name, t, torch)
        zeros = torch.zeros(p["a"].shape[1] if "a" in p else len(at), dtype=torch.float64)
        options: dict[str, Any] = {"argnums": 1, "solve": solve_inv()}
        if name == "ridge":
            options["solve"] = solve_cg(rtol=SYSTEM, atol=0)

            @custom_root(torch.func.grad(f), **options)
            def ridge(x: Any, at: Any) -> Any:
                x = x.clone().requires_grad_()
                settings = {"max_iter": 2000, "tolerance_grad": 1e-9, "tolerance_change": 0}
                method = torch.optim.LBFGS([x], line_search_fn="strong_wolfe", **settings)

                def closure() -> Any:
                    method.zero_grad()
                    with torch.enable_grad():
                        value = f(x, at.detach())
                    value.backward()
                    return value

                method.step(closure)
                return x.detach()

            return ridge(zeros, at)
        if name == "program":
            rest = (t["e"], t["d"]), (t["m"], t["h"])
            sizes = [len(at), len(t["d"]), len(t["h"])]

            def conditions_of(z: Any, at: Any) -> Any:
                x, nu, dual = z.split(sizes)
                stationary = t["q"] @ x + at + t["e"].T @ nu + t["m"].T @ dual
                slack = dual * (t["m"] @ x - t["h"])
                return torch.cat([stationary, t["e"] @ x - t["d"], slack])

            @custom_root(conditions_of, **options)
            def program(z: Any, at: Any) -> Any:
                return torch.cat(interior_point(z.split(sizes), (t["q"], at.detach()), *rest))

            return program(torch.zeros(sum(sizes), dtype=torch.float64), at)[: len(at)]
        if name in ("network", "transport"):
            if name == "transport":
                f, plan = transport(torch.logsumexp)
            if len(at) > 256:
                options["solve"] = solve_normal_cg(rtol=SYSTEM, atol=0)

            @custom_root(lambda z, at: f(z, at) - z, **options)
            def network(z: Any, at: Any) -> Any:
                for _ in range(5000):
                    new = f(z, at.detach())
                    if (new - z).norm() <= 1e-10 * (1 + z.norm()):
                        break
                    z = new
                return z

            found = network(zeros, at)
            return plan(found, at, torch.exp) if name == "transport" else found
        step = float(t["step"])
        if name == "lasso":
            prox = lambda z, w: proximal.lasso(z, step * w)  # noqa: E731
            condition = conditions.proximal_gradient(f, prox, step)
            fixed, start = lambda x, at: condition(x, (), at), zeros
        else:
            condition = conditions.projected_gradient(f, projections.simplex, step)
            fixed, start = lambda x, at: condition(x, at), torch.full_like(t["y"], 1 / 3)

        @custom_root(lambda x, at: fixed(x, at) - x, **options)
        def proximal_gradient(x: Any, at: Any) -> Any:
            return accelerated(lambda x: fixed(x, at.detach()), x)

        return proximal_gradient(start, at)

    return torch_run(p, solve)


def reference(name: str, p: dict[str, Any]) -> np.ndarray:
    if name != "ridge":
        return ebbflow(name, p, tol=1e-13, system=1e-12)(p["at"])
    hessian = p["a"].T @ p["a"] + np.diag(p["at"])
    x = np.linalg.solve(hessian, p["a"].T @ p["y"])
    return -2 * x * np.linalg.solve(hessian, x)


def resident(field: str) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def measured(run: Run, at: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Answer, milliseconds of the processor, and growth of the resident set in MB."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    before, start = resident("VmRSS"), time.process_time()
    found = run(at)
    seconds = time.process_time() - start
    return found, 1e3 * seconds, (resident("VmHWM") - before) / 1024


def one_library(library: str, size: str, names: list[str], repeats: int) -> None:
    """Write a line of JSON for each problem."""
    make = {"ebbflow": ebbflow, "jaxopt": jaxopt, "torchopt": torchopt}[library]
    every = problems(size)
    for name in names:
        p = every[name]
        try:
            run = make(name, p)
        except ImportError:
            return
        found, cold, _ = measured(run, p["at"])
        warm = [measured(run, p["at"])[1:] for _ in range(repeats)]
        row = {
            "problem": name,
            "gradient": found.tolist(),
            "cold": cold,
            "warm": min(w[0] for w in warm),
            "memory": min(w[1] for w in warm),
        }
        print(json.dumps(row), flush=True)


def rows_of(library: str, arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Its row for each problem: times from one process, memory from another."""
    command = [sys.executable, "-m", "benchmarks.implicit", "--library", library]
    command += ["--size", arguments.size]
    command += [part for name in names for part in ("--problem", name)]
    one = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    thrifty = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    runs: list[dict[str, Any]] = []
    for repeats, extra in ((arguments.repeats, {}), (2, thrifty)):
        done = subprocess.run(
            [*command, "--repeats", str(repeats)],
            env=os.environ | one | extra,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"{library}: {done.stderr.strip().splitlines()[-1]}")
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        runs.append({row["problem"]: row for row in rows})
    times, memory = runs
    return {name: times[name] | {"memory": memory[name]["memory"]} for name in times}


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--problem", action="append", choices=list(problems("small")))
    parser.add_argument("--library", choices=LIBRARIES, help="this one alone, as JSON")
    arguments = parser.parse_args()
    names = arguments.problem or list(problems("small"))
    if arguments.library:
        one_library(arguments.library, arguments.size, names, arguments.repeats)
        return
    found = {library: rows_of(library, arguments, names) for library in LIBRARIES}
    every, kinds = problems(arguments.size), ("cold", "warm", "memory")
    ahead = {(library, kind): 0 for library in LIBRARIES for kind in kinds}
    print("problem   library     cold, ms  ratio   warm, ms  ratio  warm, MB  ratio    error")
    for name in names:
        truth, ours = reference(name, every[name]), found["ebbflow"][name]
        for library, rows in found.items():
            if name not in rows:
                continue
            row, cells = rows[name], ""
            for kind in kinds:
                # So that nothing is divided by nothing.
                ratio = (ours[kind] + 2e-3) / (row[kind] + 2e-3)
                ahead[library, kind] += ratio < 1
                cells += f"{row[kind]:9.2f}  {ratio:5.2f}  "
            error = np.abs(np.array(row["gradient"]) - truth).max() / np.abs(truth).max()
            print(f"{name:9s} {library:9s} {cells}{error:7.0e}", flush=True)
    for library in LIBRARIES[1:]:
        counts = ", ".join(f"{kind} {ahead[library, kind]}" for kind in kinds)
        print(f"ahead of {library} of {len(names)}: {counts}")


if __name__ == "__main__":
    main()
