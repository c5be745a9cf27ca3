"""The model card of an output: README.md with base model, sizes, method and plan."""

import json
import re

from surgery.checkpoint import Checkpoint
from surgery.depth import spelled_layers
from surgery.jsonfile import read_file
from surgery.plan import Plan

LICENSE = re.compile(r"^license: *(\S+) *$", re.MULTILINE)


def model_card(plan: Plan, checkpoint: Checkpoint) -> bytes:
    """Return README.md; the license is the one that the source's card names."""
    base = _base_model(plan, checkpoint)
    before, after = plan.before, plan.after
    removed = 1 - after.parameters / before.parameters
    head = ["---", f"base_model: {json.dumps(base)}"]
    card = checkpoint.path / "README.md"
    if card.exists() and (found := LICENSE.search(read_file(card).decode("utf-8", "replace"))):
        head.append(f"license: {found[1]}")
    widths = "\n".join(
        f"| {key} | {size:,} | {after.widths[key]:,} |" for key, size in before.widths.items()
    )
    text = f"""{chr(10).join(head)}
library_name: transformers
pipeline_tag: text-generation
tags:
- pruned
- compact-surgery
---

# {base}, pruned by {removed:.1%}

A smaller checkpoint of `{base}`: rare vocabulary rows and unimportant FFN channels were removed
with COMPACT (arXiv 2509.06836). {_layers(plan)}The layout is the standard one and loads like its
base model.

| | before | after |
|---|---:|---:|
| vocabulary rows | {before.vocab_size:,} | {after.vocab_size:,} |
{widths}
| layers | {before.num_hidden_layers} | {after.num_hidden_layers} |
| parameters | {before.parameters:,} | {after.parameters:,} |
| bytes of weights | {before.nbytes:,} | {after.nbytes:,} |

Channels by {plan.provenance.criterion} over {plan.provenance.calibration_tokens:,} calibration
tokens, tokens by merge order. Training-free. Plan `{plan.digest[:16]}`, whole in
`compact_surgery.json`.
"""
    return text.encode("utf-8")


def _layers(plan: Plan) -> str:
    if not plan.layers:
        return ""
    return (
        f"Of its layers {spelled_layers(plan.layers)} stay; those joined by + became one, as in\n"
        "LaCo (arXiv 2402.11187). "
    )


def _base_model(plan: Plan, checkpoint: Checkpoint) -> str:
    """The hub id where it is known, else the directory's name: never a local path."""
    for name in (checkpoint.config.get("_name_or_path"), plan.source.partition("@")[0]):
        if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return name
    return checkpoint.path.resolve().name
