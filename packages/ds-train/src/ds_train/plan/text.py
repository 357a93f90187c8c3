"""A plan in words and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_train.plan.planner import GIB, Plan
from ds_train.plan.published import Comparison


def show_plan(console: Console, plan: Plan, tokens: float | None) -> None:
    """Print what a plan holds, takes and costs."""
    recipe, cluster = plan.recipe, plan.cluster
    console.print(
        f"{plan.parameters / 1e9:,.1f}B parameters on {recipe.devices:,} x {cluster.name}\n"
        f"{mesh_of(plan)}; zero {recipe.zero}, {recipe.schedule}, {recipe.micro_batches} "
        f"micro-batches of {recipe.micro_batch} x {recipe.sequence:,} tokens, {recipe.precision}, "
        f"recompute {recipe.recompute}",
        highlight=False,
    )
    memory = Table("on a device of the busiest pipeline rank", "GiB")
    memory.columns[1].justify = "right"
    for name, size in plan.memory[plan.busiest].items():
        memory.add_row(name, f"{size / GIB:,.1f}")
    said = "fits" if plan.fits else "does NOT fit"
    memory.add_row(f"all: {said} in {cluster.memory:g}", f"{plan.peak / GIB:,.1f}", style="bold")
    console.print(memory)
    time = Table("in a step", "seconds", "share")
    for column in time.columns[1:]:
        column.justify = "right"
    for name, seconds in plan.seconds.items():
        time.add_row(name, f"{seconds:,.3f}", f"{seconds / plan.step_seconds:.1%}")
    time.add_row("all", f"{plan.step_seconds:,.3f}", "", style="bold")
    console.print(time)
    console.print(
        f"{plan.tokens_per_second:,.0f} tokens a second and device, {plan.utilisation:.0%} of what "
        "products alone would reach",
        highlight=False,
    )
    if tokens:
        price = f", {plan.price(tokens) / 1e6:,.3f}M dollars" if cluster.price else ""
        console.print(
            f"{tokens:.3g} tokens: {plan.device_hours(tokens):,.0f} device hours, "
            f"{plan.days(tokens):,.1f} days{price}",
            highlight=False,
        )


def show_candidates(console: Console, plans: Sequence[Plan], most: int = 8) -> None:
    """Print the best meshes beside each other."""
    table = Table("mesh", "schedule", "micro-batch", "recompute", "GiB", "tokens/s", title="Meshes")
    for column in table.columns[2:3] + table.columns[4:]:
        column.justify = "right"
    for plan in plans[:most]:
        recipe = plan.recipe
        table.add_row(
            mesh_of(plan),
            recipe.schedule,
            str(recipe.micro_batch),
            recipe.recompute,
            f"{plan.peak / GIB:,.1f}",
            f"{plan.tokens_per_second:,.0f}",
        )
    console.print(table)


def show_comparisons(console: Console, found: Sequence[Comparison]) -> None:
    """Print how far the model of costs is from published runs."""
    table = Table("published run", "tokens/s and device", "planned", "error", "source")
    for column in table.columns[1:4]:
        column.justify = "right"
    for run, plan, error in found:
        table.add_row(
            run.name,
            f"{run.tokens_per_second:,.0f}",
            f"{plan.tokens_per_second:,.0f}",
            "fitted" if run.fitted else f"{error:+.0%}",
            run.source,
        )
    console.print(table)


def error_line(found: Sequence[Comparison]) -> str:
    """Return one line on how far to trust a plan."""
    errors = [f"{error:+.0%} ({run.name})" for run, _, error in found if not run.fitted]
    fitted = next(run.name for run, _, _ in found if run.fitted)
    return f"One factor is fitted, to {fitted}. Errors at other published runs: {', '.join(errors)}"


def plan_as_json(plan: Plan, tokens: float | None) -> dict[str, Any]:
    """Return a plan for programs."""
    values: dict[str, Any] = {
        "recipe": vars(plan.recipe) | {"dp": plan.recipe.dp},
        "cluster": plan.cluster.model_dump(),
        "memory": list(plan.memory),
        "fits": plan.fits,
        "seconds": plan.seconds,
        "step_seconds": plan.step_seconds,
        "tokens_per_second_and_device": plan.tokens_per_second,
        "utilisation": plan.utilisation,
    }
    if tokens:
        values |= {
            "device_hours": plan.device_hours(tokens),
            "days": plan.days(tokens),
            "price": plan.price(tokens),
        }
    return values


def mesh_of(plan: Plan) -> str:
    """Return a mesh in words."""
    recipe = plan.recipe
    return f"pp {recipe.pp} x ep {recipe.ep} x dp {recipe.dp}"
