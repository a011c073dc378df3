"""Qwen2.5-VL-7B compiles for eight v5e chips that are not here, weights sharded."""

import os
import re
import subprocess
import sys

import pytest

from x2jax.plan import HBM

WEIGHTS = {"text": 7_615_616_512 - 152_064 * 3584, "vision": 676_550_144}
"""Parameters that a pass reads: states need no output head."""


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_pass_of_the_7b_fits_eight_v5e_chips(name):
    command = f"-m benchmarks.aot_encoders --topology v5e:2x4 --batch 8 --only {name}"
    done = subprocess.run(
        [sys.executable, *command.split()],
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    found = re.search(rf"^{name} +(\d+) +(\d+) +(\d+)", done.stdout, re.M)
    assert found and "8 x TPU v5 lite" in done.stdout
    arguments, temporary, peak = (int(x) * 2**20 for x in found.groups())
    # Weights of two bytes, an eighth of them on each chip, and inputs.
    share = 2 * WEIGHTS[name] / 8
    assert share - 2**20 < arguments < share + 2**26
    assert temporary > 0 and peak < HBM["TPU v5 lite"] * 2**30 / 2
