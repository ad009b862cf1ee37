"""What vLLM's block hashes keep apart our chains keep apart: adapters, images and salts never mix."""

from __future__ import annotations

import itertools
import json
import subprocess

import pytest

from tests.engines.process import FOLDER, PYTHON, SKIP, clean_environment

pytestmark = pytest.mark.skipif(not PYTHON, reason=SKIP)

WHOLE, BEHIND_THE_IMAGE = 0, 2
"""How many leading blocks two kinds of one prompt share."""


def test_adapters_images_and_salts_never_mix() -> None:
    """One prompt is the same chain twice, and another one from the first block that something else belongs to."""
    command = [PYTHON, str(FOLDER / "vllm_chains.py")]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=clean_environment())
    assert ran.returncode == 0, ran.stderr[-2000:]
    chains: dict[str, list[str]] = json.loads(ran.stdout.rpartition("RESULT")[2])
    assert chains.pop("plain again") == chains["plain"]
    assert len(chains["plain"]) == 6
    for one, other in itertools.combinations(chains, 2):
        shared = [a == b for a, b in zip(chains[one], chains[other], strict=True)]
        first = BEHIND_THE_IMAGE if {one, other} <= {"plain", "image x", "image y"} else WHOLE
        if {one, other} == {"salt 1", "image x, salt 1"}:
            first = BEHIND_THE_IMAGE
        assert shared == [True] * first + [False] * (6 - first), (one, other)
