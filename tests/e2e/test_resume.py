"""Exact resume: a run that was killed ends bitwise where the uninterrupted one ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from x2jax.checkpoint import load_trainable

STEPS, EVERY = 14, 3
COMMAND = (
    "-m x2jax.train --config configs/x2edit.py --config.data=tiny:160 --config.batch_size=4 "
    f"--config.steps={STEPS} --config.checkpoint_every={EVERY} --config.log_every=1 "
    "--config.sample_every=1000 --config.held_out=2 --config.preview.steps=1 "
    "--config.ema_decay=0.9 --config.image.buckets=tiny-mixed --config.accumulate=2"
).split()


def start(workdir, log):
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    with log.open("ab") as f:
        return subprocess.Popen(
            [sys.executable, *COMMAND, "--workdir", str(workdir)],
            env=environment, stdout=f, stderr=subprocess.STDOUT,
        )  # fmt: skip


def lines(workdir):
    """Training lines of metrics.jsonl without the rate; a last, cut line is left out."""
    found = []
    path = workdir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:
            break
        if "loss" in values:
            found.append({k: v for k, v in values.items() if k != "samples_per_second"})
    return found


def kill_after(process, workdir, step, delay):
    """SIGKILL once a step is logged and a moment has passed; False if the run ended before."""
    while not any(x["step"] >= step for x in lines(workdir)):
        if process.poll() is not None:
            return False
        time.sleep(0.02)
    time.sleep(delay)
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


@pytest.mark.slow
def test_killed_runs_end_bitwise_where_the_uninterrupted_one_ends(tmp_path):
    seed = random.randrange(1 << 32)
    print(f"seed of the kills: {seed}")
    rng = random.Random(seed)
    log = tmp_path / "log"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, log).wait() == 0, log.read_text()
    kills, reached = 0, 0
    while kills < 3:
        step = rng.randint(min(reached + 1, STEPS - 2), STEPS - 1)
        kills += kill_after(start(killed, log), killed, step, rng.uniform(0, 0.3))
        reached = max((x["step"] for x in lines(killed)), default=0)
        if reached == STEPS:
            break
    assert kills, "no kill hit a running process"
    assert start(killed, log).wait() == 0, log.read_text()

    expected, found = lines(whole), lines(killed)
    assert [x["step"] for x in found] == list(range(1, STEPS + 1))
    assert [x["sample_id"] for x in found] == [x["sample_id"] for x in expected]
    assert found == expected, "losses and norms are bitwise equal too"
    for ema in (False, True):
        a, _ = load_trainable(whole, STEPS, ema=ema)
        b, _ = load_trainable(killed, STEPS, ema=ema)
        assert a.keys() == b.keys()
        for path, x in a.items():
            np.testing.assert_array_equal(x, b[path], err_msg=path)
