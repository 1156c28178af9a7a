"""Tests, and what they are made with."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
