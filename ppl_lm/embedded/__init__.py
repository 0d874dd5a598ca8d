"""The small language model that ships with the package: its grammar, weights and training script."""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"
