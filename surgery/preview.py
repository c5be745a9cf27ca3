"""A plan as text for people: what goes, what stays, what to know."""

from pathlib import Path

from surgery.companions import left_behind
from surgery.depth import spelled_layers
from surgery.errors import printable
from surgery.plan import Plan
from surgery.vocab_cost import ScriptCost, VocabularyCost

RULE = "V' and I' follow a rule of thumb; compact-surgery search finds the split for your model"
"""What to know of sizes that a ratio has given."""

SHOWN_SCRIPTS = 12
"""Scripts that lose most tokens; plan.json has them all."""


def plan_table(plan: Plan, source: Path) -> str:
    """Before, after and removed share of each size, then the notes; ``source`` is the plan's."""
    before, after = plan.before, plan.after
    sizes = [("vocab_size", before.vocab_size, after.vocab_size)]
    sizes += [(key, before.widths[key], after.widths[key]) for key in before.widths]
    if plan.layers:
        sizes.append(("layers", before.num_hidden_layers, after.num_hidden_layers))
    sizes.append(("parameters", before.parameters, after.parameters))
    sizes.append(("bytes of weights", before.nbytes, after.nbytes))
    wide = max(20, 2 + max(len(label) for label, _, _ in sizes))
    rows = [f"{'':<{wide}}{'before':>18}{'after':>18}{'removed':>10}"]
    for label, old, new in sizes:
        rows.append(f"{label:<{wide}}{old:>18,}{new:>18,}{1 - new / old:>10.2%}")
    if plan.vocabulary is not None:
        rows += ["", *_vocabulary_rows(plan.vocabulary)]
    if plan.layers:
        rows.append(f"layers: {spelled_layers(plan.layers)}")
    rows += [f"note: {note}" for note in plan.provenance.notes]
    if plan.dropped:
        rows.append(f"note: left out, for they only guess ahead: {', '.join(plan.dropped)}")
    if names := left_behind(source, plan.ids()):
        rows.append(f"note: left behind: {printable(', '.join(names))}")
    if not plan.complete:
        rows.append("note: sizes only; give `stats` to choose the channels and apply the plan")
    return "\n".join(rows)


def _vocabulary_rows(cost: VocabularyCost) -> list[str]:
    """Tokens that each script loses, and tokens per byte of its text where there is some."""
    lost = [script for script in cost.scripts if script.tokens_before > script.tokens_after]
    lost.sort(key=lambda script: script.tokens_after - script.tokens_before)
    heads = f"{'tokens of':<20}{'before':>18}{'after':>18}{'removed':>10}"
    measured = cost.text_bytes > 0
    rows = [heads + (f"{'text grows':>12}" if measured else "")]
    for script in lost[:SHOWN_SCRIPTS]:
        share = 1 - script.tokens_after / script.tokens_before
        row = f"{script.script:<20}{script.tokens_before:>18,}{script.tokens_after:>18,}"
        rows.append(f"{row}{share:>10.2%}{_growth(script):>12}".rstrip())
    if len(lost) > SHOWN_SCRIPTS:
        rows.append(f"and {len(lost) - SHOWN_SCRIPTS} other scripts, in the plan's file")
    if cost.tokens_per_byte_before and cost.tokens_per_byte_after:
        before, after = cost.tokens_per_byte_before, cost.tokens_per_byte_after
        rows.append(
            f"tokens per byte of the text: {before:.4f} before, {after:.4f} after "
            f"({after / before - 1:+.1%})"
        )
    else:
        rows.append("note: `data` shows how much longer text becomes")
    return rows


def _growth(script: ScriptCost) -> str:
    return f"{script.growth:+.1%}" if script.text_tokens_before else ""
