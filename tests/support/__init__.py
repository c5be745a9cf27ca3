"""What several tests share: tiny checkpoints, servers, runs in processes of their own."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
"""The repository."""
