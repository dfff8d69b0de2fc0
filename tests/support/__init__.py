"""What several tests use. It imports no test, and a test imports helpers only from here."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
