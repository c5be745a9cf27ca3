"""The table of families, made from the table of axes and from what the tests cover."""

from surgery.families.schema import DECODER_FFN, EXPERT, FFN, SHARED, WIDE, Family, Wrapper
from surgery.families.table import FAMILIES, REFUSED
from tests.support.loading import NOT_IN_4
from tests.support.sample import KEYS
from tests.support.tiny_configs import TINY
from tests.support.tiny_encoders import ENCODERS, VOCABULARY_ALONE

MODELS = {
    "llama": "Llama 1, 2, 3; Falcon 3; SmolLM2; Yi",
    "mistral": "Mistral 7B, Nemo, Small",
    "ministral": "Ministral 8B",
    "ministral3": "Ministral 3",
    "qwen2": "Qwen 2, 2.5",
    "qwen3": "Qwen 3",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, text",
    "vaultgemma": "VaultGemma",
    "granite": "Granite 3",
    "granite_swa": "Granite with sliding windows",
    "olmo": "OLMo 1",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "smollm3": "SmolLM 3",
    "stablelm": "StableLM 2",
    "cohere": "Command R",
    "cohere2": "Command R7B, A",
    "exaone4": "EXAONE 4",
    "internlm3": "InternLM 3",
    "ernie4_5": "ERNIE 4.5 dense",
    "hunyuan_v1_dense": "Hunyuan dense",
    "seed_oss": "Seed-OSS",
    "helium": "Helium",
    "diffllama": "DiffLlama",
    "youtu": "Youtu-LLM",
    "phi3": "Phi-3, 3.5, 4",
    "glm": "GLM-4 9B",
    "glm4": "GLM-4-0414",
    "arcee": "AFM",
    "nemotron": "Nemotron 3, 4",
    "jais2": "Jais 2",
    "apertus": "Apertus",
    "starcoder2": "StarCoder 2",
    "nanochat": "nanochat",
    "phi": "Phi-1, 1.5, 2",
    "persimmon": "Persimmon",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder 1",
    "gptj": "GPT-J",
    "codegen": "CodeGen",
    "gpt_neo": "GPT-Neo",
    "gpt_neox": "Pythia, GPT-NeoX",
    "opt": "OPT",
    "biogpt": "BioGPT",
    "falcon": "Falcon 1, 2",
    "bloom": "BLOOM",
    "mpt": "MPT",
    "mixtral": "Mixtral",
    "phimoe": "Phi-3.5-MoE",
    "minimax_m2": "MiniMax M2",
    "olmoe": "OLMoE",
    "flex_olmo": "FlexOlmo",
    "qwen2_moe": "Qwen 1.5, 2 MoE",
    "qwen3_moe": "Qwen 3 MoE",
    "qwen3_next": "Qwen 3 Next",
    "deepseek_v2": "DeepSeek V2",
    "deepseek_v3": "DeepSeek V3, R1",
    "glm4_moe": "GLM-4.5, 4.6",
    "dots1": "dots.llm1",
    "solar_open": "Solar Open",
    "exaone_moe": "K-EXAONE",
    "afmoe": "Trinity",
    "ernie4_5_moe": "ERNIE 4.5 MoE",
    "hunyuan_v1_moe": "Hunyuan A13B",
    "cohere2_moe": "Command A MoE",
    "granitemoe": "Granite 3 MoE",
    "granitemoeshared": "Granite MoE, shared experts",
    "gpt_oss": "GPT-OSS",
    "llama4_text": "Llama 4, text",
    "gemma3": "Gemma 3",
    "mistral3": "Mistral Small 3.1, Ministral 3",
    "llama4": "Llama 4",
    "llava": "LLaVA 1.5",
    "internvl": "InternVL 3",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL dense",
    "aya_vision": "Aya Vision",
    "bailing_hybrid": "Ling, Ring with linear attention",
    "bamba": "Bamba",
    "deepseek_v32": "DeepSeek V3.2",
    "falcon_h1": "Falcon H1",
    "falcon_mamba": "Falcon Mamba",
    "gemma4": "Gemma 4",
    "gemma4_text": "Gemma 4, text",
    "glm4_moe_lite": "GLM-4.7 Flash",
    "glm4v": "GLM-4.1V",
    "glm4v_moe": "GLM-4.5V",
    "glm_moe_dsa": "GLM-5",
    "granitemoehybrid": "Granite 4",
    "idefics3": "Idefics 3",
    "jamba": "Jamba",
    "kimi_k25": "Kimi K2.5",
    "kimi_linear": "Kimi Linear",
    "lfm2": "LFM2",
    "lfm2_moe": "LFM2 mixtures",
    "lfm2_vl": "LFM2-VL",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "mamba": "Mamba",
    "mamba2": "Mamba 2",
    "mimo_v2_flash": "MiMo V2 Flash",
    "mistral4": "Mistral 4",
    "mistral_large4": "Mistral Large 4",
    "nemotron_h": "Nemotron H, Nemotron 3",
    "olmo_hybrid": "OLMo Hybrid",
    "paligemma": "PaliGemma",
    "qwen3_5": "Qwen 3.5",
    "qwen3_5_moe": "Qwen 3.5 mixtures",
    "qwen3_5_moe_text": "Qwen 3.5 mixtures, text",
    "qwen3_5_text": "Qwen 3.5, text",
    "qwen3_omni_moe_thinker": "Qwen3-Omni",
    "qwen3_vl_moe": "Qwen3-VL mixtures",
    "smolvlm": "SmolVLM",
    "bert": "BERT, LaBSE, BGE, E5, GTE, MiniLM",
    "distilbert": "DistilBERT",
    "roberta": "RoBERTa",
    "xlm-roberta": "XLM-R, multilingual E5, BGE-M3",
    "camembert": "CamemBERT",
    "mpnet": "MPNet, all-mpnet-base",
    "electra": "ELECTRA",
    "deberta-v2": "DeBERTa V3, mDeBERTa",
    "modernbert": "ModernBERT, GTE ModernBERT",
    "eurobert": "EuroBERT",
    "ernie": "ERNIE 2, 3",
    "megatron-bert": "Megatron-BERT",
    "rembert": "RemBERT",
    "big_bird": "BigBird",
    "bert-generation": "BertGeneration",
    "roc_bert": "RoCBert",
    "roformer": "RoFormer",
    "data2vec-text": "data2vec, text",
    "roberta-prelayernorm": "efficient_mlm",
    "xlm-roberta-xl": "XLM-R XL, XXL",
    "t5": "T5, Flan-T5, Sentence-T5",
    "mt5": "mT5",
    "umt5": "UMT5",
    "bart": "BART",
    "mbart": "mBART-25, mBART-50",
    "mvp": "MVP",
    "plbart": "PLBART",
    "blenderbot": "Blenderbot",
    "blenderbot-small": "Blenderbot Small",
    "bigbird_pegasus": "BigBird-Pegasus",
    "m2m_100": "NLLB-200, M2M-100",
    "marian": "Marian, as opus-mt-en-de",
    "pegasus": "PEGASUS",
    "whisper": "Whisper",
    "prophetnet": "ProphetNet",
    "udop": "UDOP",
    "pix2struct": "Pix2Struct, DePlot, MatCha",
    "pp_formulanet": "PP-FormulaNet",
    "vision-encoder-decoder": "TrOCR, Donut",
    "florence2": "Florence 2",
    "xlm": "XLM",
    "xlnet": "XLNet",
    "reformer": "Reformer",
    "xmod": "X-MOD",
    "trocr": "the decoder of TrOCR",
    "git": "GIT",
    "blip": "BLIP, captions",
    "idefics2": "Idefics 2",
    "kosmos-2": "Kosmos 2",
    "kosmos-2.5": "Kosmos 2.5",
    "deepseek_v4": "DeepSeek V4",
    "phi4_multimodal": "Phi-4 multimodal",
    "fast_vlm": "FastVLM",
    "perception_lm": "Perception LM",
    "gemma3n_text": "Gemma 3n, text",
    "gemma3n": "Gemma 3n",
    "longt5": "LongT5",
    "led": "LED",
    "pegasus_x": "PEGASUS-X",
    "switch_transformers": "Switch Transformers",
    "t5gemma2": "T5Gemma 2",
}
"""Model type → well-known models of it."""

REAL = {
    "llama": "SmolLM2-135M",
    "gemma3_text": "Gemma 3 270M",
    "bert": "all-MiniLM-L6-v2",
}
"""Model type → the published weights that were taken through the command line."""

PARTS = {
    FFN: "FFN",
    EXPERT: "experts",
    SHARED: "shared expert",
    DECODER_FFN: "the decoder's FFN",
    WIDE: "double-wide FFN",
}


def family_table() -> str:
    """Return the tables in Markdown: a row for each entry of FAMILIES; then what is refused."""
    alone = [each for each in FAMILIES.values() if isinstance(each, Family) and not each.widths]
    rows = [
        f"{len(FAMILIES)} types are supported. {len(FAMILIES) - len(alone)} of them lose more than "
        f"their vocabulary. {len(REFUSED)} others are refused.",
        "",
        "| model_type | such as | cut, beside the vocabulary | loads in | real weights |",
        "|---|---|---|---|---|",
    ]
    by_hand = {key.partition(":")[0] for key in (*TINY, *ENCODERS)}
    for name, entry in FAMILIES.items():
        cut = "what its language model has" if isinstance(entry, Wrapper) else widths(entry)
        majors = "5 and 4.57" if name in by_hand and name not in NOT_IN_4 else "5"
        rows.append(
            f"| {name} | {MODELS.get(name, '')} | {cut} | {majors} | {REAL.get(name, '')} |"
        )
    return "\n".join([*rows, "", *_refused()]) + "\n"


def _refused() -> list[str]:
    """A row for each reason to refuse a type."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        by_reason.setdefault(reason, []).append(name)
    rows = [f"| {reason} | {', '.join(names)} |" for reason, names in by_reason.items()]
    return ["| why not | model_type |", "|---|---|", *rows]


def widths(family: Family) -> str:
    """The channels that can be cut, by their keys in config.json."""
    by_key: dict[str, list[str]] = {}
    for axis, width in family.widths.items():
        by_key.setdefault(width.key, []).append(PARTS[axis])
    if not by_key:
        return f"nothing else: {family.only_vocabulary}"
    return "; ".join(f"{' and '.join(p)} (`{k}`)" for k, p in by_key.items())


def untested() -> set[str]:
    """Entries of FAMILIES that no tiny checkpoint stands for."""
    return set(FAMILIES) - {key.partition(":")[0] for key in (*KEYS, *ENCODERS, *VOCABULARY_ALONE)}
