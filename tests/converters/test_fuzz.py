"""Damaged, renamed and hostile files: no crash, no hang, no partial output, always a reason."""

import json
import random
import resource
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from converters import __main__ as cli
from converters import native, pickles, single_file
from converters.pickle_check import check_pickle
from converters.rules import WeightsError
from converters.safetensors_io import open_file
from tests.converters.test_formats import published, rewrite, run

SECONDS = 60
"""Processor time limit of one case, which needs milliseconds; a busy machine may stand still."""
GROWTH = 600 << 20
"""Bytes that the peak of memory may grow in all cases together: the files are smaller than 1 MB."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Folders of every kind of file that is read: safetensors, pickle, config, ours."""
    root = tmp_path_factory.mktemp("originals")
    for name in ("flux-bfl", "flux-diffusers", "vae-bfl", "alignnet", "t5"):
        published(name, root / name)
    assert run("export", root / "alignnet", root / "comfy", "--format", "alignnet-comfyui") == 0
    assert run("import", root / "alignnet", root / "ours") == 0
    return root


def flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def splice(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    return rng.choice(
        (data[:a] + data[b:], data[:b] + data[a:], data[:a] + rng.randbytes(9) + data[a:])
    )


def renumber(data: bytes, rng: random.Random) -> bytes:
    """Another number in the place of one."""
    spots = [i for i, c in enumerate(data) if 48 <= c <= 57]
    if not spots:
        return flip(data, rng)
    i = rng.choice(spots)
    number = rng.choice(
        (b"0", b"-1", b"7", b"9" * 9, b"9" * 20, b"1e999", b"1.5", b"9" * 5000, b"NaN")
    )
    return data[:i] + number + data[i + 1 :]


def retype(data: bytes, rng: random.Random) -> bytes:
    """Another JSON value in the place of a quoted string."""
    quotes = [i for i, c in enumerate(data) if c == 34]
    if len(quotes) < 2:
        return flip(data, rng)
    k = rng.randrange(len(quotes) - 1)
    value = rng.choice(
        (b"null", b"[]", b"{}", b"true", b'"\\ud800"', b'"\\u0000"', b"[" * 9999, b'""')
    )
    return data[: quotes[k]] + value + data[quotes[k + 1] + 1 :]


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip,
    cut,
    splice,
    renumber,
    retype,
)


def mutate(file: Path, rng: random.Random) -> str:
    """Damages a file; its header where it has one. Returns what was done."""
    data, change = file.read_bytes(), rng.choice(MUTATIONS)
    if file.suffix != ".safetensors" or rng.random() < 0.15:
        file.write_bytes(change(data, rng))
        return f"{change.__name__} {file.name}"
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length], rng)
    # A header that changed its length, with and without a length that says so.
    size = len(header) if rng.random() < 0.8 else rng.choice((length, 0, 1 << 40, (1 << 64) - 1))
    file.write_bytes(size.to_bytes(8, "little") + header + data[8 + length :])
    return f"{change.__name__} header of {file.name}"


def rename(folder: Path, rng: random.Random) -> str:
    """Gives a file the name of another kind."""
    file = rng.choice([f for f in folder.iterdir() if f.is_file()])
    suffix = rng.choice((".safetensors", ".bin", ".pt", ".json", ".safetensors.index.json", ""))
    file.rename(file.with_name(file.name.split(".")[0] + suffix))
    return f"rename {file.name} to {suffix!r}"


def refused_or_whole(folder: Path, out: Path, capsys) -> bool:
    """Imports; whether it was refused. Asserts that it was one or the other, with a reason."""
    source = folder
    code = run("import", source, out)
    text = capsys.readouterr()
    if code == 0:
        tensors, about = native.open_folder(out)
        assert tensors and about["format"] and sorted(p.name for p in out.iterdir()) == [
            native.PARAMS, native.ABOUT
        ]  # fmt: skip
        shutil.rmtree(out)
        return False
    assert code == 1 and text.err.startswith("error: ") and len(text.err) > 20, text.err
    assert not out.exists() or not list(out.iterdir()), "something partial is left"
    return True


def fuzz(originals: Path, tmp_path: Path, capsys, cases: range) -> None:
    kinds = sorted(p.name for p in originals.iterdir())
    refused = 0

    def hang(*_):
        raise TimeoutError(f"{done}: more than {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    handler = signal.signal(signal.SIGPROF, hang)
    try:
        for case in cases:
            rng = random.Random(case)
            folder = tmp_path / "case"
            shutil.copytree(originals / rng.choice(kinds), folder)
            files = sorted(f for f in folder.iterdir() if f.is_file())
            done = f"case {case}: {folder}"
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            done += rename(folder, rng) if rng.random() < 0.1 else mutate(rng.choice(files), rng)
            try:
                refused += refused_or_whole(folder, tmp_path / "out", capsys)
                assert cli.main(["inspect", str(folder)]) in (0, 1)
                capsys.readouterr()
            except BaseException as e:
                e.add_note(done)
                raise
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            shutil.rmtree(folder)
    finally:
        signal.signal(signal.SIGPROF, handler)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert grown < GROWTH, f"memory grew by {grown / 1e6:.0f} MB"
    assert refused > len(cases) // 2, "most of these files are damaged"


def test_damaged_files(originals, tmp_path, capsys):
    fuzz(originals, tmp_path, capsys, range(500))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_damaged_files(originals, tmp_path, capsys, part):
    fuzz(originals, tmp_path, capsys, range(1000 * part, 1000 * (part + 1)))


def archive(
    path: Path, change: Callable[[str, bytes], bytes], pack: int = zipfile.ZIP_STORED
) -> Path:
    """A copy of a torch file with its entries changed."""
    out = path.with_name("changed.bin")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", pack) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return out


@pytest.fixture
def pickle(tmp_path):
    pickles.write(tmp_path / "a.bin", {"w": np.ones((3, 4), np.float32)})
    return tmp_path / "a.bin"


def test_zip_bombs_are_not_unpacked(pickle):
    bomb = archive(
        pickle, lambda n, b: b"\0" * (64 << 20) if n.endswith("/0") else b, zipfile.ZIP_DEFLATED
    )
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(WeightsError, match="is compressed; torch stores what it saves"):
        pickles.read(bomb)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("function", [bytearray, torch.Tensor, print], ids=lambda f: f.__name__)
def test_pickles_that_ask_for_memory_are_not_believed(tmp_path, function):
    torch.save({"w": Call(function, 1 << 40)}, tmp_path / "a.bin")
    with pytest.raises(WeightsError, match=rf"it names .*{function.__name__}': more than weights"):
        pickles.read(tmp_path / "a.bin")


def test_tensors_larger_than_their_file_are_refused(tmp_path):
    torch.save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "a.bin")
    with pytest.raises(WeightsError, match="is larger than the file"):
        pickles.read(tmp_path / "a.bin")


def test_pickles_of_before_the_archive_are_named(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"an older pickle, which torch\.load"):
        check_pickle(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("name", "key", "value", "reason"),
    [
        ("flux-diffusers", "num_layers", 10**9, "num_layers = 1000000000, and the weights are"),
        ("flux-diffusers", "num_attention_heads", "many", "are not those of such a model"),
        ("flux-diffusers", "attention_head_dim", 0, "must be even and sum to head_dim 0"),
        ("vae-bfl", "block_out_channels", [8] * 10**5, "block_out_channels = "),
        ("vae-bfl", "layers_per_block", 10**9, "layers_per_block = 1000000000"),
        ("t5", "num_layers", 10**9, "num_layers = 1000000000, and the weights are"),
    ],
)
def test_configs_do_not_make_models_larger_than_their_files(
    tmp_path, capsys, name, key, value, reason
):
    _, folder, file = published(name, tmp_path / "p")
    path = folder / "config.json"
    if path.is_file():
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    else:
        found = open_file(file)
        config = json.loads(found.metadata[single_file.CONFIG]) | {key: value}
        copies = {n: np.array(x) for n, x in found.items()}
        rewrite(file, copies, {single_file.CONFIG: config})
    assert run("import", folder, tmp_path / "out") == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
