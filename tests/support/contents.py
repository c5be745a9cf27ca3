"""What lies in a checkpoint: tensors, bits, bytes of files."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by name."""
    files = sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def digests(root: Path) -> dict[str, str]:
    """Return path → SHA-256 of everything below ``root``."""
    return {
        str(path.relative_to(root)): hashlib.sha256(
            path.read_bytes() if path.is_file() else b"directory"
        ).hexdigest()
        for path in root.rglob("*")
    }
