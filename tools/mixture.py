"""Train a small mixture of experts on the project's prose, to compare criteria of experts on.

    python -m tools.mixture -o build/mixture

It has Qwen3-MoE's shape: 4 layers of 16 experts, of which a token goes to 4, and some 3.5 million
parameters. The seed is fixed. It takes ten minutes on one busy core.
"""

import json
import time
from pathlib import Path

import click
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tools.synthetic_tokenizer import trained_tokenizer

TEXT = Path(__file__).parent / "text" / "calibration.txt"
VOCAB_SIZE, SEQ_LEN, BATCH = 2048, 128, 16
STEPS, WARMUP, SCHEDULE, RATE = 868, 100, 1500, 2e-3
"""Training stops before the learning rate has come down; the published figures are of this."""
SEED = 0

CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.001,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def rate_at(step: int) -> float:
    """Return the share of the learning rate: a warm-up, then a cosine to a tenth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.1 + 0.45 * (1 + float(np.cos(np.pi * min(1.0, (step - WARMUP) / (SCHEDULE - WARMUP)))))


def publish_config(path: Path) -> None:
    """Name a config.json's keys as published models have them.

    transformers 4 and mlx-lm ask for these; transformers 5 writes others.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    config["num_experts"] = config.pop("num_local_experts")
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@click.command()
@click.option("--steps", default=STEPS, show_default=True, help="Fewer give a worse model sooner.")
@click.option("-o", "output", type=click.Path(path_type=Path), required=True, metavar="DIR")
def main(steps: int, output: Path) -> None:
    """Train it and save it to DIR."""
    torch.manual_seed(SEED)
    rng, text, start = np.random.default_rng(SEED), TEXT.read_text("utf-8"), time.perf_counter()
    tokenizer = trained_tokenizer([text], VOCAB_SIZE, ["<|end|>"])
    ids = torch.tensor(tokenizer.encode(text).ids)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at)
    for step in range(steps):
        starts = rng.integers(0, len(ids) - SEQ_LEN, BATCH)
        batch = torch.stack([ids[first : first + SEQ_LEN] for first in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            seconds = time.perf_counter() - start
            click.echo(f"step {step}: loss {loss.item():.3f}, {seconds:.0f} s")
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(output)
    publish_config(output / "config.json")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>"
    ).save_pretrained(output)
    click.echo(f"{output}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
