"""A plan as text for people: what goes, what stays, what to know."""

from surgery.plan import Plan


def plan_table(plan: Plan, left_behind: list[str]) -> str:
    """Before, after and removed share of each size, then the notes."""
    before, after = plan.before, plan.after
    rows = [f"{'':<20}{'before':>18}{'after':>18}{'removed':>10}"]
    for name in ("vocab_size", "intermediate_size", "parameters", "nbytes"):
        old, new = getattr(before, name), getattr(after, name)
        label = {"nbytes": "bytes of weights"}.get(name, name)
        rows.append(f"{label:<20}{old:>18,}{new:>18,}{1 - new / old:>10.2%}")
    rows += [f"note: {note}" for note in plan.provenance.notes]
    if left_behind:
        rows.append(f"note: left behind: {', '.join(left_behind)}")
    if not plan.complete:
        rows.append("note: sizes only; give --stats to choose the channels and apply the plan")
    return "\n".join(rows)
