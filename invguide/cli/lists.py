"""Commands that list what there is, or describe some of it in full: solvers, operators, priors."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from invguide.cli.describe import describe, describe_priors
from invguide.cli.terminal import app, command, print_entry

Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="NAME", help="Describe these in full [list all]."),
]


@command("solvers", app)
def solvers(names: Names = None) -> None:
    """List the solvers, what each needs, and how it errs; or describe some in full, settings included."""
    import invguide.solvers  # noqa: F401  fills the registry
    from invguide.solver import Solver

    if names:
        return describe(names, Solver.registry, "solver", _needs)
    for name, kind in sorted(Solver.registry.items()):
        summary, bias = _docstring(kind)
        defaults = f"{kind.num_steps} steps" if isinstance(kind.num_steps, int) else ""
        print_entry(name, [_needs(kind), defaults], [summary, f"Bias: {bias}" if bias else ""])


def _docstring(thing: Any) -> tuple[str, str]:
    """The first paragraph of a docstring, and its Bias section, on one line each."""
    from invguide.arguments.docstrings import sections

    parts = sections(thing)
    summary, bias = parts[""].split("\n\n")[0], parts.get("Bias", "")
    return " ".join(summary.split()), " ".join(bias.split())


def _needs(kind: Any) -> str:
    """What a solver needs, in words."""
    from invguide.solver import EnsembleSolver

    requires = kind.requires
    target = {
        "likelihood": "a measurement",
        "reward": "a reward",
        "either": "a measurement or a reward",
        "none": "nothing but the prior",
    }[requires.target]
    if requires.target == "none":
        return f"needs {target}"
    parts = [target]
    if requires.linear:
        parts.append("a linear operator")
    elif requires.gradient:
        parts.append("a differentiable operator")
    if requires.prior_vjp:
        parts.append("gradients of the prior")
    text = "needs " + ", ".join(parts)
    if not requires.gradient and not requires.linear:
        text += "; black boxes are fine"
    return text + ("; the samples are one ensemble" if issubclass(kind, EnsembleSolver) else "")


@command("operators", app)
def operators(names: Names = None) -> None:
    """List the forward operators and the tasks of `restore`; or describe some operators in full."""
    import inspect

    import invguide.operators as package
    from invguide.restoration.tasks import TASKS

    kinds = {name: getattr(package, name) for name in package.__all__}
    if names:
        return describe(names, kinds, "operator", _linearity)
    for name, kind in kinds.items():
        own = "__init__" in {
            m for k in kind.__mro__ if k.__module__.startswith("invguide") for m in vars(k)
        }
        arguments = list(inspect.signature(kind.__init__).parameters.values())[1:] if own else []
        call = (
            f"{name}({', '.join(str(a).split(':')[0].split('=')[0].strip() for a in arguments)})"
        )
        print_entry(call, [_linearity(kind)], [_docstring(kind)[0]])
    print("Tasks of `invguide restore`:")
    for task in TASKS.values():
        takes = " ".join("--" + o.replace("_", "-") for o in task.options)
        print(f"  {task.name:<17} {task.summary}{': ' if takes else ''}{takes}")


def _linearity(kind: type) -> str:
    from invguide.forward_operator import LinearOperator

    if kind.__name__ == "Composition":
        return "linear if its parts are"
    return "linear" if issubclass(kind, LinearOperator) else "nonlinear"


@command("priors", app)
def priors(names: Names = None) -> None:
    """List the priors that ship, the kinds that can be loaded, and public checkpoints; or describe some in full."""
    from invguide.priors.checkpoints.catalogue import PUBLIC, RECOGNISED
    from invguide.priors.checkpoints.embedded import EMBEDDED, weights_path

    if names:
        return describe_priors(names)
    for entry in EMBEDDED.values():
        path = weights_path(entry.name)
        card = path.with_suffix(".md")
        size = f"{path.stat().st_size / 1e6:.1f} MB" if path.exists() else "weights missing"
        details = [size, f"noise levels {entry.sigma_min:g} to {entry.sigma_max:g}"]
        lines = [entry.description[0].upper() + entry.description[1:]]
        lines.append(f"Card: {card}" if card.exists() else "No model card")
        print_entry(entry.name, details, lines)
    print("Whatever else holds a pretrained network (no code of a file is run):\n")
    for known in RECOGNISED:
        print_entry(known.name, [known.line], [known.description])
    print("Public checkpoints:\n")
    for known in PUBLIC:
        print_entry(known.name, [known.line], [known.description])
