"""The smallest example package passes its own tests. `.ci/examples` installs and type-checks all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PARROT = Path(__file__).parents[1] / "examples" / "agent-chat-parrot"


def test_the_parrot_passes_its_own_tests() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(PARROT)}
    outcome = subprocess.run(command, cwd=PARROT, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "2 passed" in outcome.stdout
