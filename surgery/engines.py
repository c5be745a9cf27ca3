"""What known constraints of engines a checkpoint breaks."""

from surgery.constraints import CONSTRAINTS, Constraint, ModelFacts, never
from surgery.family import EXPERT
from surgery.kinds import BYTE_LEVEL
from surgery.layout import Layout
from surgery.tokenizer import TokenizerFile

HEADS = "heads"


def engine_faults(facts: ModelFacts) -> list[str]:
    """Return one line per constraint that ``facts`` break: engine, effect, size, what to do.

    Of the entries on one size, the first that breaks at a degree of tensor parallelism speaks for
    its engine; heads speak for all sizes. What the facts alone decide is always told.
    """
    lines: list[str] = []
    told: set[tuple[str, str, int]] = set()
    for constraint in CONSTRAINTS:
        sizes = facts.sizes(constraint.of) if constraint.applies(facts) else {}
        for name, size in sizes.items():
            subject = HEADS if constraint.of.endswith(HEADS) else name
            broken = [
                tp
                for tp in constraint.degrees
                if not constraint.serves(size, tp)
                and not told & {(constraint.engine, name, tp), (constraint.engine, HEADS, tp)}
            ]
            if broken:
                lines.append(_line(constraint, f"{name} {size}", broken))
            if constraint.serves is not never:
                told |= {(constraint.engine, subject, tp) for tp in broken}
    return lines


def _line(constraint: Constraint, what: str, broken: list[int]) -> str:
    at = "" if broken[0] == 1 else f" at tp={', '.join(map(str, broken))}"
    effect = constraint.effect.value
    return f"{constraint.engine} ({effect}): {what}{at} {constraint.problem}; {constraint.fix}"


def facts_of(
    layout: Layout, tokenizer: TokenizerFile | None, source_vocab_size: int | None
) -> ModelFacts:
    """What engines look at in a checkpoint.

    Args:
        layout: The checkpoint.
        tokenizer: Its tokenizer, where it is of a kind that can be cut.
        source_vocab_size: V before the cut, where it is known.
    """
    experts = layout.family.widths.get(EXPERT)
    config = layout.config

    def size(key: str) -> int | None:
        value = config.get(key)
        return value if type(value) is int else None

    return ModelFacts(
        vocab_size=layout.vocab_size,
        widths=layout.widths,
        hidden_size=size("hidden_size"),
        num_attention_heads=size("num_attention_heads"),
        num_key_value_heads=size("num_key_value_heads"),
        expert_keys=(experts.key,) if experts and experts.key in layout.widths else (),
        tokens=max(tokenizer.token_ids.values(), default=-1) + 1 if tokenizer else None,
        source_vocab_size=source_vocab_size,
        misread_vocab_sizes=layout.family.misread_vocab_sizes,
        byte_level=tokenizer is not None and tokenizer.kind is BYTE_LEVEL,
    )
