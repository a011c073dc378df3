"""How fast, and in how much memory, a large checkpoint is imported and exported.

    python -m benchmarks.convert_speed [--gigabytes 4] [--rounds 1] [--folder DIR]

Writes a synthetic FLUX.1 of the real width in one BFL file, imports it, exports it again, and
beside each copies the same file with `shutil.copyfile`; all three end with fsync. Prints speeds as
shares of the copies before and after, processor time, and the peak resident memory of each
conversion, which runs in a process of its own. Exits with 1 where a share is below 70 %, or memory
above 1.5 x the largest tensor + 500 MB. Run it on an idle machine: a conversion needs two cores, a
copy hardly any. Needs three times the size on disk; deletes what it wrote.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from converters import safetensors_io
from converters.flux_bfl import flux_bfl_table
from converters.formats import FORMATS
from converters.rules import plan
from converters.safetensors_header import Spec
from x2jax.flux import FLUX_DEV

SHARE = 0.7
CHILD = """
import sys, time
import jax
jax.config.update("jax_platforms", "cpu")
from converters.__main__ import main
from converters.chunks import contiguous
import numpy as np
contiguous(np.zeros((512, 512), np.uint16).T, np.dtype(np.uint16))  # starts JAX's CPU
start, used = time.perf_counter(), time.process_time()
code = main(sys.argv[1:])
seconds, used = time.perf_counter() - start, time.process_time() - used
with open("/proc/self/status") as f:
    (peak,) = (line.split()[1] for line in f if line.startswith("VmHWM:"))
print("seconds", seconds, used, int(peak) * 1024)
sys.exit(code)
"""


def synthetic(gigabytes: float, file: Path) -> int:
    """Writes the checkpoint; returns the bytes of its largest tensor."""
    share = gigabytes / 23.8
    cfg = dataclasses.replace(
        FLUX_DEV,
        double_blocks=max(1, round(19 * share)),
        single_blocks=max(1, round(38 * share)),
    )
    (part,) = FORMATS["flux-bfl"].parts(cfg.to_diffusers())
    entries = plan(flux_bfl_table(cfg), part.shapes).entries
    kind = np.dtype(ml_dtypes.bfloat16)
    specs = {name: Spec(kind, entry.shape) for name, entry in entries.items()}
    noise = np.random.default_rng(0).standard_normal(1 << 22).astype(kind)

    def rows(name: str):
        left = specs[name].nbytes // kind.itemsize
        while left:
            yield noise[: min(left, noise.size)]
            left -= min(left, noise.size)

    safetensors_io.write(file, specs, rows, metadata=part.metadata, max_shard=None)
    return max(s.nbytes for s in specs.values())


def copy(source: Path, target: Path) -> float:
    """Seconds until a copy is on disk."""
    start = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb+") as f:
        os.fsync(f.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def convert(*arguments: str) -> tuple[float, float, int]:
    """Seconds, processor seconds and peak bytes of one command of `python -m converters`.

    The peak is the child's own VmHWM, mapped pages of files included. (`ru_maxrss` would not do: a
    child inherits that of the process that started it, however large it was.)
    """
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True
    )
    if child.returncode:
        raise RuntimeError(f"{arguments}: exit status {child.returncode}\n{child.stderr}")
    seconds, used, peak = child.stdout.rsplit("seconds", 1)[1].split()
    return float(seconds), float(used), int(peak)


def measure(folder: Path, gigabytes: float, rounds: int) -> bool:
    """Prints the figures; whether they are good."""
    source, ours, back = folder / "flux.safetensors", folder / "ours", folder / "back"
    largest = synthetic(gigabytes, source)
    size, limit = source.stat().st_size, 1.5 * largest + 500e6
    print(f"{size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB")
    commands = {
        "import": ["import", "--from", str(source), "--out", str(ours)],
        "export": ["export", "--from", str(ours), "--out", str(back)],
    }
    shares: dict[str, list[float]] = {name: [] for name in commands}
    good = True
    for _ in range(rounds):
        for name, arguments in commands.items():
            before = copy(source, folder / "copy")
            seconds, used, peak = convert(*arguments)
            after = copy(source, folder / "copy")
            shares[name].append((before + after) / 2 / seconds)
            good &= peak <= limit
            print(
                f"{name}: {size / seconds / 1e6:.0f} MB/s, {shares[name][-1]:.0%} of copying "
                f"({size / before / 1e6:.0f} and {size / after / 1e6:.0f} MB/s), "
                f"{used / size * 1e9:.2f} processor seconds a GB, peak {peak / 1e6:.0f} MB"
            )
        one, two = (safetensors_io.open_file(f) for f in (source, *back.glob("*.safetensors")))
        assert all(
            np.array_equal(x.view(np.uint16), two[n].view(np.uint16)) for n, x in one.items()
        )
        shutil.rmtree(ours)
        shutil.rmtree(back)
    median = {name: round(statistics.median(values), 3) for name, values in shares.items()}
    print(json.dumps({"median share of copying": median}))
    return good and min(median.values()) >= SHARE


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        return 0 if measure(Path(folder), args.gigabytes, args.rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
