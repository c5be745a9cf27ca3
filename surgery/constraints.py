"""What engines are known to ask of the sizes of a checkpoint.

``CONSTRAINTS`` is the table; a new constraint is one entry. Each was read in the engine's source
(vLLM 0.33, SGLang 0.5.23, llama.cpp as of llama-cpp-python 0.3.36, torchao 0.18, mlx-lm 0.32,
PyTorch 2.13), and its ``source`` names repository and file.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum

GROUP = 128
"""Usual group of AWQ and GPTQ, and side of DeepSeek's FP8 blocks."""

TP = (2, 4, 8)
"""Degrees of tensor parallelism that are looked at."""


@dataclass(frozen=True)
class ModelFacts:
    """What engines look at in a checkpoint. What is None, or 0 heads, is not judged."""

    vocab_size: int
    """V': rows of the embedding."""
    widths: Mapping[str, int]
    """Config key → FFN width, such as ``{"intermediate_size": 1408}``."""
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    expert_keys: tuple[str, ...] = ()
    """Those of ``widths`` that routed experts have."""
    tokens: int | None = None
    """Highest id of the tokenizer, plus one."""
    source_vocab_size: int | None = None
    """V before the cut."""
    misread_vocab_sizes: Collection[int] = ()
    """The family's: sizes V' by which llama.cpp's converter tells models apart."""
    byte_level: bool = False
    """Whether the tokenizer is a byte-level BPE."""

    @property
    def vocab_cut(self) -> bool:
        """Whether the vocabulary is known to be smaller than the source's."""
        return self.source_vocab_size not in (None, self.vocab_size)

    def sizes(self, of: str) -> dict[str, int]:
        """Name → size: a field of that name, all ``widths``, or those of ``experts``."""
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
"""Whether a size can be served, given the degree of tensor parallelism."""


def multiple(step: int) -> Serves:
    """Every rank's part is a multiple of ``step``."""
    return lambda size, tp: size % (tp * step) == 0


def shared(size: int, tp: int) -> bool:
    """Key-value heads: split over the ranks, or each on a whole number of ranks."""
    return size % tp == 0 if size >= tp else tp % size == 0


def never(size: int, tp: int) -> bool:
    """Decided by the facts alone."""
    return False


def always(facts: ModelFacts) -> bool:
    """Concerns every checkpoint."""
    return True


@dataclass(frozen=True)
class Constraint:
    """What an engine is known to ask of a size."""

    engine: str
    effect: Effect
    of: str
    """What ``ModelFacts.sizes`` takes; each size is judged."""
    serves: Serves
    problem: str
    """Goes on from "intermediate_size 1408"."""
    fix: str
    source: str
    """Where it was read: repository and files."""
    degrees: tuple[int, ...] = (1,)
    """Degrees of tensor parallelism to judge at."""
    applies: Callable[[ModelFacts], bool] = always
    """Checkpoints it is about."""


GPU_ENGINES = "vLLM, SGLang"
CONSTRAINTS = (
    Constraint(
        GPU_ENGINES,
        Effect.CANNOT,
        "num_attention_heads",
        multiple(1),
        "gives a rank no whole number of heads",
        "serve with another tp; no width changes that",
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
        "serve with another tp; no width changes that",
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
        "choose the width with `target` tp=N",
        "vllm-project/vllm vllm/model_executor/layers/{linear,fused_moe/config}.py; "
        "sgl-project/sglang python/sglang/srt/layers/{linear,moe/fused_moe_triton/layer}.py",
        degrees=TP,
    ),
    Constraint(
        GPU_ENGINES,
        Effect.CANNOT,
        "widths",
        multiple(GROUP),
        f"gives a rank no whole groups of {GROUP}: AWQ, GPTQ or FP8 weights so grouped do not load",
        f"choose the width with `target` tp=N,group={GROUP}, or quantize in smaller groups",
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
        "are more than the embedding has rows: the converter stops",
        "give the embedding a row for every token",
        "ggml-org/llama.cpp conversion/base.py (get_vocab_base)",
        applies=lambda facts: facts.tokens is not None and facts.tokens > facts.vocab_size,
    ),
    Constraint(
        "llama.cpp",
        Effect.CANNOT,
        "vocab_size",
        never,
        "is a cut byte-level BPE: the converter knows pre-tokenizers by a hash of ids and stops",
        "add the hash it prints to its table, with the pre-tokenizer of the source",
        "ggml-org/llama.cpp conversion/base.py (get_vocab_base_pre)",
        applies=lambda facts: facts.vocab_cut and facts.byte_level,
    ),
    Constraint(
        "llama.cpp",
        Effect.MISREADS,
        "vocab_size",
        never,
        "sets special tokens: the converter takes 32016 for CodeLlama and adds its fill-in ids, "
        "49152 for Granite and switches the bos token off",
        "choose another V'",
        "ggml-org/llama.cpp conversion/llama.py (set_vocab)",
        applies=lambda facts: facts.vocab_cut and facts.vocab_size in facts.misread_vocab_sizes,
    ),
    Constraint(
        "llama.cpp",
        Effect.FALLS_BACK,
        "widths",
        multiple(32),
        "is no multiple of 32, so down_proj stays F16 in every quantized file",
        "`multiple_of` 256 avoids that",
        "ggml-org/llama.cpp src/llama-quant.cpp (tensor_type_fallback), ggml/src/ggml-common.h, "
        "conversion/base.py",
    ),
    Constraint(
        "llama.cpp",
        Effect.FALLS_BACK,
        "widths",
        multiple(256),
        "is no multiple of 256, so down_proj gets Q4_0 to Q8_0 in place of a K-quant",
        "`multiple_of` 256 avoids that",
        "ggml-org/llama.cpp src/llama-quant.cpp (tensor_type_fallback), ggml/src/ggml-common.h "
        "(QK_K)",
    ),
    Constraint(
        "llama.cpp",
        Effect.FALLS_BACK,
        "hidden_size",
        multiple(256),
        "is no multiple of 256, so embeddings, q, k, v, gate_proj and up_proj get no K-quants",
        "no width changes that",
        "ggml-org/llama.cpp src/llama-quant.cpp (tensor_type_fallback)",
    ),
    Constraint(
        "transformers 5",
        Effect.CANNOT,
        "experts",
        multiple(8),
        "gives experts rows of no whole 16 bytes in bf16, which its grouped_mm refuses",
        'choose a multiple of 8, or load with experts_implementation="eager"',
        "huggingface/transformers src/transformers/integrations/moe.py; "
        "pytorch/pytorch torch/_meta_registrations.py (_meta_grouped_mm_common)",
    ),
    Constraint(
        "MLX",
        Effect.FALLS_BACK,
        "widths",
        multiple(64),
        "is no multiple of 64, so mlx_lm.convert leaves down_proj unquantized",
        "choose a multiple of 64",
        "ml-explore/mlx-lm mlx_lm/utils.py (quantize_model)",
    ),
    Constraint(
        "torchao",
        Effect.FALLS_BACK,
        "widths",
        multiple(16),
        "is no multiple of 16, so float8 skips gate_proj, up_proj and down_proj",
        "choose a multiple of 16",
        "pytorch/ao torchao/quantization/utils.py (_fp8_mm_compat); "
        "pytorch/pytorch torch/_meta_registrations.py (_scaled_mm)",
    ),
    Constraint(
        "torchao",
        Effect.FALLS_BACK,
        "widths",
        multiple(GROUP),
        f"is no multiple of {GROUP}, so int4 in groups of {GROUP} skips down_proj",
        f"choose a multiple of {GROUP}, or quantize in smaller groups",
        "pytorch/ao torchao/quantization/quant_api.py (_int4_weight_only_quantize_tensor)",
    ),
    *(
        Constraint(
            "PyTorch on GPUs",
            Effect.SLOWER,
            of,
            multiple(8),
            "is no multiple of 8, which bf16 and fp16 kernels are aligned to",
            "choose a multiple of 8",
            "pytorch/pytorch torch/_inductor/fx_passes/pad_mm.py (get_alignment_size)",
        )
        for of in ("vocab_size", "widths")
    ),
)
"""All that is known. Of one engine: what the facts alone decide, then per size the worst first."""
