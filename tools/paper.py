"""The paper's Tables 2, 3, 6 and 8 from headers alone, beside the tool's own rule of thumb.

python -m tools.paper
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.layout.build import read_layout
from surgery.layout.layout import Layout
from surgery.planning.sizes import Sizes, split, whole
from tools.published import PUBLISHED
from tools.shapes import write_headers_only

SMALLEST_VOCAB = 1024
"""Stands for the bytes and special tokens that have to stay; the rule never comes near it."""


@dataclass(frozen=True)
class Row:
    """One pruned model of the paper."""

    model: str
    ratio: float
    """The target it was swept for; 0 is dense."""
    vocab_size: int
    intermediate_size: int
    parameters: str
    """As printed: millions, or billions for 70B."""

    @property
    def sizes(self) -> Sizes:
        """The two sizes as the tool has them."""
        return Sizes(self.vocab_size, {"intermediate_size": self.intermediate_size})


TABLE_8 = (
    Row("Qwen2.5-0.5B", 0.00, 151936, 4864, "494"),
    Row("Qwen2.5-0.5B", 0.10, 99968, 4736, "439"),
    Row("Qwen2.5-0.5B", 0.20, 49536, 4736, "394"),
    Row("Qwen2.5-0.5B", 0.35, 49536, 3456, "311"),
    Row("Llama-3.2-1B", 0.00, 128256, 8192, "1236"),
    Row("Llama-3.2-1B", 0.10, 67968, 8192, "1112"),
    Row("Llama-3.2-1B", 0.20, 56704, 7168, "989"),
    Row("Llama-3.2-1B", 0.35, 33792, 5760, "803"),
    Row("Gemma-3-1B", 0.00, 262144, 6912, "1009"),
    Row("Gemma-3-1B", 0.10, 174592, 6912, "908"),
    Row("Gemma-3-1B", 0.20, 86912, 6912, "807"),
    Row("Gemma-3-1B", 0.35, 95232, 5120, "656"),
    Row("Llama-3.1-8B", 0.00, 128256, 14336, "8030"),
    Row("Llama-3.1-8B", 0.10, 73216, 13440, "7227"),
    Row("Llama-3.1-8B", 0.20, 67328, 11520, "6424"),
    Row("Llama-3.1-8B", 0.35, 67840, 8448, "5220"),
    Row("Llama-3.1-70B", 0.00, 128256, 28672, "70.6"),
    Row("Llama-3.1-70B", 0.10, 112384, 25216, "63.5"),
    Row("Llama-3.1-70B", 0.20, 111872, 21632, "56.4"),
    Row("Llama-3.1-70B", 0.35, 110976, 16256, "45.9"),
)
"""Sizes of Table 8 with the Para (M) of Tables 2 and 3."""

TABLE_6 = tuple(
    Row("Qwen2.5-0.5B", 0.35, vocab_size, intermediate_size, parameters)
    for vocab_size, intermediate_size, parameters in (
        (151936, 2048, "312"),
        (131584, 2304, "311"),
        (111104, 2560, "309"),
        (90752, 2944, "315"),
        (70400, 3200, "314"),
        (49536, 3456, "311"),
        (29568, 3712, "310"),
        (9088, 3968, "308"),
    )
)
"""The sweep at about 37 %."""


def printed(parameters: int) -> str:
    """Format a count as the paper does: millions, or billions with a digit from 10 B on."""
    return f"{parameters / 1e9:.1f}" if parameters >= 1e10 else f"{parameters / 1e6:.0f}"


def layout_of(model: str, directory: Path) -> Layout:
    """Return the layout of a header-only checkpoint with the public shapes of ``model``."""
    return read_layout(Checkpoint.open(write_headers_only(directory / model, PUBLISHED[model])))


def parameters(layout: Layout, sizes: Sizes) -> int:
    """Count the parameters of a cut."""
    return layout.parameters(sizes.vocab_size, sizes.widths)


def main() -> None:
    """Print every row with what the tool computes and what its rule of thumb would choose."""
    with tempfile.TemporaryDirectory() as name:
        layouts = {model: layout_of(model, Path(name)) for model in PUBLISHED}
    print(
        f"{'model':<15}{'ratio':>6}{'V′':>8}{'I′':>7}{'paper':>8}{'tool':>8}"
        f"{'rule V′':>10}{'rule I′':>9}{'reached':>9}"
    )
    for row in (*TABLE_8, *TABLE_6):
        layout = layouts[row.model]
        full = whole(layout)
        found = printed(parameters(layout, row.sizes))
        rule = split(layout, row.ratio, SMALLEST_VOCAB) if row.ratio else full
        reached = 1 - parameters(layout, rule) / parameters(layout, full)
        print(
            f"{row.model:<15}{row.ratio:>6.0%}{row.vocab_size:>8}{row.intermediate_size:>7}"
            f"{row.parameters:>8}{found:>8}"
            f"{rule.vocab_size:>10}{rule.widths['intermediate_size']:>9}{reached:>9.2%}"
        )


if __name__ == "__main__":
    main()
