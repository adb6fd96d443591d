"""The plan on the terminal: what planning.py found, as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from ssmorph.convert.treatment import name_layers

# a speed to name beside operations, where no card could be measured
NAMED_TFLOPS = 100


def print_plan(plan: dict[str, Any]) -> None:
    """The plan on the terminal: a table of the layers, one of what becomes of the teacher's features, the estimate."""
    console = Console()
    table = Table(title=f"{plan['teacher']} ({plan['family']}), cache in float32")
    for column in ("layer", "becomes", "parameters", "cache per token", "cache fixed"):
        table.add_column(column, justify="left" if column == "becomes" else "right")
    for row in plan["layers"]:
        window = f" up to {row['cache_tokens']:,}" if row["cache_tokens"] is not None else ""
        per_token = f"{row['cache_bytes_per_token']:,} B{window}"
        kept = row["kept_heads"] if row["layer"] in plan["converted"] else []
        becomes = row["becomes"] + (f", keeps {', '.join(map(str, kept))}" if kept else "")
        cells = [str(row["layer"]), becomes, f"{row['parameters']:,}", per_token]
        table.add_row(*cells, f"{row['cache_bytes_fixed']:,} B")
    console.print(table)
    console.print(
        f"{len(plan['converted'])} layers converted: {plan['teacher_parameters']:,} parameters become"
        f" {plan['parameters']:,} ({plan['parameters_added']:+,})."
    )
    if plan["heads"]:
        console.print(
            f"Which heads stay is decided in the run, by a probe ({plan['heads']}); the table has as many or more."
        )
    if plan["placement"]:
        console.print(f"Which ones is decided in the run, by scores ({plan['placement']}); the table has as many.")
    console.print(
        f"From {plan['smaller_from_tokens']} tokens of context on, a converted layer's cache is the smaller one."
    )
    if plan["never_smaller"]:
        where = name_layers(plan["never_smaller"])
        console.print(f"Not in {where}: a sliding window keeps attention's smaller, or kept heads read all of it.")
    _print_treatment(console, plan)
    console.print(_stock(plan))
    _print_estimate(console, plan["estimate"])


def _stock(plan: dict[str, Any]) -> str:
    if plan["stock_export"] is None:
        return f"No architecture of other software has the decoder layers of {plan['family']}: nothing to export to."
    if plan["stock_export_obstacles"]:
        return f"No export to {plan['stock_export']}: {'; '.join(plan['stock_export_obstacles'])}."
    return f"`ssmorph export` will write it as {plan['stock_export']}, which loads without this package."


def _print_treatment(console: Console, plan: dict[str, Any]) -> None:
    features = Table("feature", "is", "how", title="What becomes of the teacher")
    with_costs = "measured_on" in plan
    if with_costs:
        features.add_column("measured", overflow="fold")
    for row in plan["treatment"]:
        cells = [row["feature"], row["treatment"], row["note"]]
        features.add_row(*cells, *([_cost(row["measured"])] if with_costs else []))
    console.print(features)
    text = plan.get("measured_on")
    if text is not None:
        console.print(
            "Measured: squared error of the attention output by that one change, as a share of its square, on"
            f" {text['windows']} held-out windows of {text['window']} tokens ({text['set']})."
        )


def _cost(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return ""
    if "not_measured" in measured:
        return f"not measured: {measured['not_measured']}"
    return f"median {measured['median']:.2g}, worst {measured['worst']:.2g} (layer {measured['worst_layer']})"


def _print_estimate(console: Console, estimate: dict[str, Any]) -> None:
    for name, stage in estimate["stages"].items():
        time = "" if stage["minutes"] is None else f", about {stage['minutes']} min here"
        console.print(f"  {name:14} {stage['tokens']:>13,} tokens  {stage['pflop']:g} PFLOP{time}")
    if estimate["minutes"] is None:
        hours = estimate["pflop"] * 1e3 / NAMED_TFLOPS / 3600
        console.print(
            f"{estimate['pflop']:g} PFLOP. Their time on {estimate['device']} is not known: no card was measured."
            f" At {NAMED_TFLOPS} TFLOP/s it would be {hours:.3g} hours."
        )
    else:
        console.print(f"About {estimate['minutes']} min on the CPU here ({estimate['matmul_gflops']} GFLOP/s).")
    console.print(f"Memory at its peak: about {estimate['memory_gib']} GiB, all in float32.")
