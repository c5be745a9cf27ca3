"""Constraints that engines are known to put on a checkpoint's sizes, and those it breaks."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from surgery.errors import SurgeryError
from surgery.families.schema import EXPERT
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.tokenizer.kinds import BYTE_LEVEL
from surgery.tokenizer.tokenizer_file import TokenizerFile

GROUP = 128
"""Usual group of AWQ and GPTQ, and side of DeepSeek's FP8 blocks."""

TP = (2, 4, 8)
"""Degrees of tensor parallelism to check."""


@dataclass(frozen=True)
class ModelFacts:
    """What engines look at in a checkpoint. A value that is None or 0 is not checked."""

    vocab_size: int
    """V': rows of the embedding."""
    widths: Mapping[str, int]
    """Config key → FFN width, such as ``{"intermediate_size": 1408}``."""
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    expert_keys: tuple[str, ...] = ()
    """Keys of ``widths`` that belong to routed experts."""
    tokens: int | None = None
    """Highest id of the tokenizer, plus one; None where there is a tokenizer.model, of which
    llama.cpp's converter leaves out tokens that have no row."""
    source_vocab_size: int | None = None
    """V of the source."""
    misread_vocab_sizes: Collection[int] = ()
    """Sizes V' by which llama.cpp's converter tells models of the family apart."""
    byte_level: bool = False
    """Whether the tokenizer is a byte-level BPE."""

    @property
    def vocab_pruned(self) -> bool:
        """Whether the vocabulary is known to be smaller than the source's."""
        return self.source_vocab_size not in (None, self.vocab_size)

    def sizes(self, of: str) -> dict[str, int]:
        """Return name → size of the field ``of``, of all ``widths``, or of those of ``experts``."""
        if of == "widths":
            return dict(self.widths)
        if of == "experts":
            return {key: self.widths[key] for key in self.expert_keys}
        size: int | None = getattr(self, of)
        return {of: size} if size else {}


class Effect(Enum):
    """What an engine does with a size that breaks its constraint."""

    CANNOT = "cannot"
    FALLS_BACK = "falls back"
    MISREADS = "misreads"
    SLOWER = "slower"


Serves = Callable[[int, int], bool]
"""Takes a size and a degree of tensor parallelism; returns whether the size can be served."""


def multiple(step: int) -> Serves:
    """Return whether every rank's part is a multiple of ``step``."""
    return lambda size, tp: size % (tp * step) == 0


def shared(size: int, tp: int) -> bool:
    """Whether key-value heads split over the ranks, or each is on a whole number of ranks."""
    return size % tp == 0 if size >= tp else tp % size == 0


def never(size: int, tp: int) -> bool:
    """No size is served: ``applies`` alone decides."""
    return False


def always(facts: ModelFacts) -> bool:
    """Apply to every checkpoint."""
    return True


@dataclass(frozen=True)
class Constraint:
    """A constraint that an engine is known to put on a size."""

    engine: str
    effect: Effect
    of: str
    """Argument of ``ModelFacts.sizes``; each size is checked."""
    serves: Serves
    problem: str
    """Continues a line that begins with "intermediate_size 1408"."""
    fix: str
    """What avoids that, in few words."""
    source: str
    """Repository and files where it was read."""
    degrees: tuple[int, ...] = (1,)
    """Degrees of tensor parallelism to check."""
    applies: Callable[[ModelFacts], bool] = always
    """Whether it concerns a checkpoint."""


QK_K = 256
"""Values of a block of llama.cpp's K-quants."""


def _narrow(facts: ModelFacts) -> bool:
    """Whether rows as long as the model is wide are no whole K-quant blocks."""
    return bool(facts.hidden_size and facts.hidden_size % QK_K)


GPU_ENGINES = "vLLM, SGLang"
CONSTRAINTS = (
    Constraint(
        GPU_ENGINES,
        Effect.CANNOT,
        "num_attention_heads",
        multiple(1),
        "gives a rank no whole number of heads",
        "serve with another tp",
        "vllm-project/vllm vllm/config/model.py; "
        "sgl-project/sglang python/sglang/srt/models/llama.py",
        degrees=TP,
    ),
    Constraint(
        GPU_ENGINES,
        Effect.CANNOT,
        "num_key_value_heads",
        shared,
        "can be neither split over the ranks nor repeated on them",
        "serve with another tp",
        "vllm-project/vllm vllm/model_executor/models/llama.py; "
        "sgl-project/sglang python/sglang/srt/models/llama.py",
        degrees=TP,
    ),
    Constraint(
        GPU_ENGINES,
        Effect.CANNOT,
        "widths",
        multiple(1),
        "gives a rank no whole number of channels",
        "`target` tp=N",
        "vllm-project/vllm vllm/model_executor/layers/{linear,fused_moe/config}.py; "
        "sgl-project/sglang python/sglang/srt/layers/{linear,moe/fused_moe_triton/layer}.py",
        degrees=TP,
    ),
    Constraint(
        GPU_ENGINES,
        Effect.CANNOT,
        "widths",
        multiple(GROUP),
        f"gives a rank no whole groups of {GROUP}, so AWQ, GPTQ and FP8 in such groups do not load",
        f"`target` tp=N,group={GROUP}, or smaller groups",
        "vllm-project/vllm vllm/model_executor/layers/quantization/{auto_awq,utils/fp8_utils,"
        "compressed_tensors/schemes/compressed_tensors_wNa16}.py, issue 21695; sgl-project/sglang "
        "python/sglang/srt/layers/quantization/{awq/schemes/awq_linear,"
        "gptq/schemes/gptq_linear,fp8_utils}.py",
        degrees=(1, *TP),
    ),
    Constraint(
        "llama.cpp",
        Effect.CANNOT,
        "tokens",
        never,
        "are more than the embedding has rows, so the converter stops",
        "compact-surgery export leaves them out",
        "ggml-org/llama.cpp conversion/base.py (get_vocab_base)",
        applies=lambda facts: facts.tokens is not None and facts.tokens > facts.vocab_size,
    ),
    Constraint(
        "llama.cpp",
        Effect.CANNOT,
        "vocab_size",
        never,
        "is a pruned byte-level BPE, which stops its converter",
        "compact-surgery export writes the GGUF file",
        "ggml-org/llama.cpp conversion/base.py (get_vocab_base_pre)",
        applies=lambda facts: facts.vocab_pruned and facts.byte_level,
    ),
    Constraint(
        "llama.cpp",
        Effect.MISREADS,
        "vocab_size",
        never,
        "sets special tokens, for the converter takes 32016 for CodeLlama and 49152 for Granite",
        "another `vocab_size`",
        "ggml-org/llama.cpp conversion/llama.py (set_vocab)",
        applies=lambda facts: facts.vocab_pruned and facts.vocab_size in facts.misread_vocab_sizes,
    ),
    Constraint(
        "llama.cpp",
        Effect.FALLS_BACK,
        "widths",
        multiple(32),
        "is no multiple of 32, so down_proj stays F16 in every quantized file",
        "a multiple of 32, for K-quants of 256",
        "ggml-org/llama.cpp src/llama-quant.cpp (tensor_type_fallback), ggml/src/ggml-common.h, "
        "conversion/base.py",
    ),
    Constraint(
        "llama.cpp",
        Effect.FALLS_BACK,
        "widths",
        multiple(QK_K),
        f"is no multiple of {QK_K}, so down_proj gets no K-quant",
        f"`multiple_of` {QK_K}; a ratio then changes V', too",
        "ggml-org/llama.cpp src/llama-quant.cpp (tensor_type_fallback), ggml/src/ggml-common.h "
        "(QK_K)",
        applies=lambda facts: not _narrow(facts),
    ),
    Constraint(
        "llama.cpp",
        Effect.FALLS_BACK,
        "widths",
        multiple(QK_K),
        f"is no multiple of {QK_K}, so down_proj gets no K-quant; nor has hidden_size any",
        f"`multiple_of` {QK_K} for down_proj; a ratio then changes V', too",
        "ggml-org/llama.cpp src/llama-quant.cpp (tensor_type_fallback), ggml/src/ggml-common.h "
        "(QK_K)",
        applies=_narrow,
    ),
    Constraint(
        "llama.cpp",
        Effect.FALLS_BACK,
        "hidden_size",
        multiple(QK_K),
        "is no multiple of 256, so embeddings, q, k, v, gate_proj and up_proj get no K-quants",
        "no size of a plan changes that",
        "ggml-org/llama.cpp src/llama-quant.cpp (tensor_type_fallback)",
    ),
    Constraint(
        "transformers 5",
        Effect.CANNOT,
        "experts",
        multiple(8),
        "gives experts rows of no whole 16 bytes in bf16, which its grouped_mm refuses",
        'a multiple of 8, or experts_implementation="eager"',
        "huggingface/transformers src/transformers/integrations/moe.py; "
        "pytorch/pytorch torch/_meta_registrations.py (_meta_grouped_mm_common)",
    ),
    Constraint(
        "MLX",
        Effect.FALLS_BACK,
        "widths",
        multiple(64),
        "is no multiple of 64, so mlx_lm.convert leaves down_proj unquantized",
        "a multiple of 64",
        "ml-explore/mlx-lm mlx_lm/utils.py (quantize_model)",
    ),
    Constraint(
        "torchao",
        Effect.FALLS_BACK,
        "widths",
        multiple(16),
        "is no multiple of 16, so float8 skips gate_proj, up_proj and down_proj",
        "a multiple of 16",
        "pytorch/ao torchao/quantization/utils.py (_fp8_mm_compat); "
        "pytorch/pytorch torch/_meta_registrations.py (_scaled_mm)",
    ),
    Constraint(
        "torchao",
        Effect.FALLS_BACK,
        "widths",
        multiple(GROUP),
        f"is no multiple of {GROUP}, so int4 in groups of {GROUP} skips down_proj",
        f"a multiple of {GROUP}, or smaller groups",
        "pytorch/ao torchao/quantization/quant_api.py (_int4_weight_only_quantize_tensor)",
    ),
    *(
        Constraint(
            "PyTorch on GPUs",
            Effect.SLOWER,
            of,
            multiple(8),
            "is no multiple of 8, which bf16 and fp16 kernels are aligned to",
            "a multiple of 8",
            "pytorch/pytorch torch/_inductor/fx_passes/pad_mm.py (get_alignment_size)",
        )
        for of in ("vocab_size", "widths")
    ),
)
"""All known constraints. Within an engine, those without a size come first, then the worst."""

HEADS = "heads"


@dataclass(frozen=True)
class EngineNote:
    """A constraint that a checkpoint breaks."""

    engine: str
    effect: Effect
    size: str
    """Name of the size that breaks it, such as ``vocab_size`` or a key of config.json."""
    text: str
    """What the engine then does, and in parentheses what avoids that."""
    chosen: bool = False
    """Whether a plan changed the size, so that another plan can avoid it."""


def engine_notes(facts: ModelFacts, plan: Plan | None = None) -> list[EngineNote]:
    """Return a note for each constraint that ``facts`` break; ``plan`` is what they follow from.

    For each engine, size and degree of tensor parallelism, only the first broken constraint is
    reported. Broken heads hide the other sizes. Constraints that ``applies`` alone decides are
    always reported.
    """
    notes: list[EngineNote] = []
    changed = changed_sizes(plan) if plan is not None else set()
    reported: set[tuple[str, str, int]] = set()
    for constraint in CONSTRAINTS:
        sizes = facts.sizes(constraint.of) if constraint.applies(facts) else {}
        for name, size in sizes.items():
            subject = HEADS if constraint.of.endswith(HEADS) else name
            broken = [
                tp
                for tp in constraint.degrees
                if not constraint.serves(size, tp)
                and not reported & {(constraint.engine, name, tp), (constraint.engine, HEADS, tp)}
            ]
            if broken:
                at = "" if broken[0] == 1 else f" at tp={', '.join(map(str, broken))}"
                text = f"{name} {size}{at} {constraint.problem} ({constraint.fix})"
                of = (constraint.engine, constraint.effect, name)
                notes.append(EngineNote(*of, text, chosen=name in changed))
            if constraint.serves is not never:
                reported |= {(constraint.engine, subject, tp) for tp in broken}
    return notes


def by_engine(notes: Iterable[EngineNote]) -> list[str]:
    """Return a line for each engine and effect, with the sizes that cause it."""
    texts: dict[tuple[str, Effect], list[str]] = {}
    for note in notes:
        texts.setdefault((note.engine, note.effect), []).append(note.text)
    engines = dict.fromkeys(engine for engine, _ in texts)
    return [
        f"{engine}: {effect.value}: {'; '.join(said)}"
        for engine in engines
        for (of, effect), said in texts.items()
        if of == engine
    ]


def changed_sizes(plan: Plan) -> set[str]:
    """Return the sizes that ``plan`` changes, which another plan could choose otherwise."""
    before, after = plan.before, plan.after
    changed = {key for key, size in after.widths.items() if size != before.widths.get(key)}
    return changed | ({"vocab_size"} if after.vocab_size != before.vocab_size else set())


def engine_table(notes: Iterable[EngineNote], *, every: bool = False) -> str:
    """Return notes on engines as text, in lines under one heading; empty if there are none.

    Args:
        notes: From ``engine_notes``.
        every: Whether to show also those that no choice of sizes can change.
    """
    found = by_engine(note for note in notes if every or note.chosen)
    heading = "engines:" if every else "engines, by the sizes that change (`engines` shows all):"
    return "\n".join([heading, *(f"  {line}" for line in found)]) if found else ""


def planned_notes(plan: Plan, layout: Layout) -> list[EngineNote]:
    """Return the notes on the output of ``plan``, before it is written; ``layout`` is its source.

    Its tokens have rows as the source's have, so nothing is said of their number.
    """
    facts = facts_of(layout, plan.before.vocab_size)
    sizes = replace(facts, vocab_size=plan.after.vocab_size, widths=plan.after.widths, tokens=None)
    return engine_notes(sizes, plan)


def facts_of(layout: Layout, source_vocab_size: int | None) -> ModelFacts:
    """Return what engines look at in a checkpoint.

    Args:
        layout: The checkpoint.
        source_vocab_size: V of the source, where it is known.
    """
    try:
        tokenizer = TokenizerFile.open(layout.checkpoint.path)
    except SurgeryError:  # of a kind that cannot be pruned, or damaged: other checks say so
        tokenizer = None
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
        tokens=_converted_tokens(tokenizer),
        source_vocab_size=source_vocab_size,
        misread_vocab_sizes=layout.family.misread_vocab_sizes,
        byte_level=tokenizer is not None and tokenizer.kind is BYTE_LEVEL,
    )


def _converted_tokens(tokenizer: TokenizerFile | None) -> int | None:
    if tokenizer is None or tokenizer.path.with_name("tokenizer.model").is_file():
        return None
    return max(tokenizer.token_ids.values(), default=-1) + 1
