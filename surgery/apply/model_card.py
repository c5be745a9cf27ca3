"""The model card of an output: what was removed, by which method, and what was trained."""

import json
import re

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.families.schema import DECODER, ENCODER, ENCODER_DECODER, GLINER
from surgery.families.table import family_of
from surgery.files.strict_json import read_file
from surgery.planning.layers import format_layers
from surgery.planning.plan import Plan
from surgery.stats.channels import DEFAULT_CRITERION

LICENSE = re.compile(r"^license: *(\S+) *$", re.MULTILINE)
PIPELINE = re.compile(r"^pipeline_tag: *([\w-]+) *$", re.MULTILINE)


LEAST_SQUARES = "least squares"
"""How a repair's ``Replacement.what`` begins."""

RECONSTRUCTION = f"{LEAST_SQUARES} and reconstruction"
"""How it begins where FFNs were trained, too."""

COMPACT = "as in COMPACT (arXiv 2509.06836)"


def model_card(plan: Plan, checkpoint: Checkpoint) -> bytes:
    """Return README.md of the output; its license is the one that the source's card names.

    So is the task of an encoder.
    """
    base = plan.base or plan.published().source
    before, after = plan.before, plan.after
    removed = 1 - after.parameters / before.parameters
    sizes = [(key, size, after.widths[key]) for key, size in before.widths.items()]
    sizes += [("experts of a layer", before.experts, after.experts)] * bool(before.experts)
    widths = "\n".join(f"| {key} | {old:,} | {new:,} |" for key, old, new in sizes)
    claims = "".join(f"- {claim}\n" for claim in _claims(plan, checkpoint))
    text = f"""{_front_matter(plan, checkpoint)}

# {base}{f", pruned by {removed:.1%}" if removed else ""}

A {"smaller" if removed else "rewritten"} checkpoint of `{base}`.
The layout is the standard one and loads like its base model.

| | before | after |
|---|---:|---:|
| vocabulary rows | {before.vocab_size:,} | {after.vocab_size:,} |
{widths}
| layers | {before.num_hidden_layers} | {after.num_hidden_layers} |
| parameters | {before.parameters:,} | {after.parameters:,} |
| bytes of weights | {before.nbytes:,} | {after.nbytes:,} |

{claims}
{_training(plan)} Plan `{plan.digest[:16]}`, whole in `compact_surgery.json`.
"""
    return text.encode("utf-8")


def _front_matter(plan: Plan, checkpoint: Checkpoint) -> str:
    """Return the YAML at the top."""
    path = checkpoint.path / "README.md"
    card = read_file(path).decode("utf-8", "replace") if path.exists() else ""
    lines = ["---"]
    if plan.base:
        lines.append(f"base_model: {json.dumps(plan.base)}")
    if found := LICENSE.search(card):
        lines.append(f"license: {found[1]}")
    task, gliner = "text-generation", checkpoint.family == GLINER
    kind = family_of(checkpoint.config, checkpoint.config_path, checkpoint.family).kind
    if kind != DECODER:
        usual = {ENCODER: "feature-extraction", ENCODER_DECODER: "text2text-generation"}
        usual |= {kind: "token-classification"} if gliner else {}
        task = found[1] if (found := PIPELINE.search(card)) else usual.get(kind, task)
    pruned = ["- pruned"] if plan.after.parameters != plan.before.parameters else []
    library = f"library_name: {GLINER if gliner else 'transformers'}"
    lines += [library, f"pipeline_tag: {task}", "tags:", *pruned, "- compact-surgery", "---"]
    return "\n".join(lines)


def _training(plan: Plan) -> str:
    """Return what was trained."""
    made = plan.replaced
    if made and made.trained:
        return f"Trained: {made.what}."
    if made and made.what.startswith(RECONSTRUCTION):
        return "Trained: each FFN alone, towards the dense one, where that helps."
    return "Nothing was trained."


def _claims(plan: Plan, checkpoint: Checkpoint) -> list[str]:
    """Return what was removed or converted, a sentence or two each."""
    claims = [*_vocabulary_claims(plan), *_channel_claims(plan)]
    claims += [*_expert_claims(plan), *_layer_claims(plan)]
    opaque = checkpoint.opaque
    if plan.dequantize and (checkpoint.quantization is not None or opaque is not None):
        claims.append(f"{opaque.method if opaque else 'FP8'} weights were converted to bf16.")
    if plan.dropped:
        claims.append("Layers for multi-token prediction were left out.")
    return claims


def _vocabulary_claims(plan: Plan) -> list[str]:
    if plan.ids().identity:
        return []
    orders = {"merge-order": " by merge order", "frequency": " by their frequency in a text"}
    cost = plan.vocabulary
    by = orders.get(cost.order, "") if cost else ""
    before, after = plan.before.vocab_size, plan.after.vocab_size
    which = []
    if cost is not None:
        scripts = [s.script for s in cost.scripts if s.asked == "dropped"]
        which += [f"those of {', '.join(scripts)}"] if scripts else []
        lost = {s.script for s in cost.scripts if s.tokens_before > s.tokens_after}
        which += ["tokens reserved for later use"] if "reserved" in lost else []
    if cost is None or cost.by_rarity:
        which.append(f"the rarest{by}, {COMPACT}")
    named = f": {'; '.join(which)}" if which else ", which no token has"
    return [f"Vocabulary: {before - after:,} of {before:,} rows were removed{named}."]


def _channel_claims(plan: Plan) -> list[str]:
    if plan.after.widths == plan.before.widths:
        return []
    made = plan.provenance
    if made.criterion == "random":
        claims = ["FFN channels: those that are kept were drawn by chance."]
    else:
        method = f", {COMPACT}" if made.criterion == DEFAULT_CRITERION else ""
        claims = [f"FFN channels: kept by {made.criterion}{_over_text(plan)}{method}."]
    repaired = plan.replaced
    if repaired and (not repaired.trained or repaired.what.startswith(LEAST_SQUARES)):
        claims.append("Each down_proj that this helps was refitted by least squares.")
    return claims


def _expert_claims(plan: Plan) -> list[str]:
    criterion = plan.provenance.expert_criterion
    if criterion is None:
        return []
    by = {
        "random": "those that are kept were drawn by chance",
        "aimer": "kept by aimer, by their weights alone",
    }.get(criterion, f"kept by {criterion}{_over_text(plan)}")
    before, after = plan.before.experts, plan.after.experts
    return [f"Experts: {before - after} of {before} were removed from each layer; {by}."]


def _layer_claims(plan: Plan) -> list[str]:
    claims = []
    left_out = set(range(plan.before.num_hidden_layers)).difference(*plan.layers)
    if plan.layers and left_out:
        names = format_layers([[layer] for layer in sorted(left_out)])
        by = (
            f", those of least block influence{_over_text(plan)}, as in ShortGPT (arXiv 2403.03853)"
            if plan.provenance.layers_by_influence
            else ""
        )
        claims.append(f"Removed layers: {names}{by}.")
    merged = [group for group in plan.layers if len(group) > 1]
    if merged:
        names = format_layers(merged)
        claims.append(f"Layers merged into one: {names}, as in LaCo (arXiv 2402.11187).")
    return claims


def _over_text(plan: Plan) -> str:
    """Name the text that a choice was made by."""
    tokens = plan.provenance.calibration_tokens
    return f" over {tokens:,} calibration tokens" if tokens else ""
