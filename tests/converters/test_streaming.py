"""Weights on their way: in chunks, hashed, resumed, dequantised, straight to devices."""

import json
import mmap
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from benchmarks import convert_speed
from converters import __main__ as cli
from converters import chunks, formats, load, native, shards
from converters.rules import T, Table, WeightsError, rule
from converters.safetensors_io import Spec, Tensors, open_file, open_tensors, write
from tests.converters.test_formats import SMALL_FLUX, published, rewrite, run
from x2jax.sharding import make_mesh

KINDS = [np.uint8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: np.dtype(k).name)
def test_transposed_matrices_are_moved_exactly(kind):
    x = (np.arange(300 * 500) % 251).reshape(300, 500).astype(kind)
    moved = chunks.contiguous(x.T, x.dtype)
    assert moved.flags.c_contiguous and moved.dtype == x.dtype
    np.testing.assert_array_equal(moved, np.ascontiguousarray(x.T))
    np.testing.assert_array_equal(chunks.contiguous(x.T, np.dtype(np.float32)), x.T.astype("f4"))


@pytest.mark.parametrize("axis", [0, 1])
def test_chunks_are_the_concatenation(axis):
    rng = np.random.default_rng(0)
    one = rng.standard_normal((6, 4)).T if axis else rng.standard_normal((4, 5, 3))
    pieces = [one, one + 1]
    whole = np.concatenate(pieces, axis)
    for size in (1, 100, 1 << 20):
        found = list(chunks.chunks(pieces, axis, np.dtype(np.float64), size))
        assert all(c.flags.c_contiguous for c in found)
        assert b"".join(c.tobytes() for c in found) == whole.tobytes()
    assert len(list(chunks.chunks(pieces, axis, np.dtype(np.float64), 1))) == len(whole)


def some_arrays():
    rng = np.random.default_rng(0)
    return {f"t{k}": rng.standard_normal((3, 5)).astype(np.float32) for k in range(5)}


class Reads:
    """Gives arrays, counts, and fails at one of them."""

    def __init__(self, arrays, bad=None):
        self.arrays, self.bad, self.names = arrays, bad, []

    def __call__(self, name):
        if name == self.bad:
            raise OSError("disk full")
        self.names.append(name)
        return self.arrays[name]


def cut_short(folder, arrays):
    """A write of five shards that fails at the fourth."""
    specs = {n: Spec(x.dtype, x.shape) for n, x in arrays.items()}
    kw = dict(max_shard=60, resume="a source")
    with pytest.raises(OSError, match="disk full") as e:
        write(folder / "m.safetensors", specs, Reads(arrays, "t3"), **kw)
    return specs, kw, e.value


def test_a_write_that_was_cut_short_goes_on(tmp_path):
    arrays = some_arrays()
    specs, kw, error = cut_short(tmp_path, arrays)
    assert "3 complete shards are kept" in error.__notes__[0]
    assert not list(tmp_path.glob("*.safetensors*")), "nothing partial in sight"
    reads = Reads(arrays)
    write(tmp_path / "m.safetensors", specs, reads, **kw)
    assert reads.names == ["t3", "t4"]
    whole = open_tensors(tmp_path)
    assert all(np.array_equal(whole[n], x) for n, x in arrays.items())
    assert not (tmp_path / ".m.partial").exists()


def test_the_disk_begins_while_chunks_are_made(tmp_path, monkeypatch):
    flushed, real = [], os.fdatasync
    monkeypatch.setattr(shards, "FLUSH", 40)
    monkeypatch.setattr(shards.os, "fdatasync", lambda fd: (flushed.append(fd), real(fd)))
    arrays = some_arrays()
    specs = {n: Spec(x.dtype, x.shape) for n, x in arrays.items()}
    write(tmp_path / "m.safetensors", specs, arrays.__getitem__)
    assert flushed
    assert all(np.array_equal(open_tensors(tmp_path)[n], x) for n, x in arrays.items())

    def full(fd):
        raise OSError("disk full")

    monkeypatch.setattr(shards.os, "fdatasync", full)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "n.safetensors", specs, arrays.__getitem__)
    assert [f.name for f in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("change", ["source", "values", "shapes"])
def test_what_does_not_match_is_written_again(tmp_path, change):
    arrays = some_arrays()
    specs, kw, _ = cut_short(tmp_path, arrays)
    wanted = ["t0", "t1", "t2", "t3", "t4"]
    if change == "source":
        kw["resume"] = "another source"
    elif change == "values":
        kept = tmp_path / ".m.partial" / "m-00002-of-00005.safetensors"
        data = bytearray(kept.read_bytes())
        data[-1] ^= 1
        kept.write_bytes(data)
        wanted = ["t1", "t3", "t4"]
    else:
        arrays["t4"] = arrays["t4"].reshape(5, 3)
        specs["t4"] = Spec(arrays["t4"].dtype, (5, 3))
        wanted = ["t3", "t4"]
    reads = Reads(arrays)
    write(tmp_path / "m.safetensors", specs, reads, **kw)
    assert reads.names == wanted
    assert all(np.array_equal(open_tensors(tmp_path)[n], x) for n, x in arrays.items())


def test_two_writers_of_one_file_are_refused(tmp_path):
    arrays = some_arrays()
    specs = {n: Spec(x.dtype, x.shape) for n, x in arrays.items()}

    def nested(name):
        write(tmp_path / "m.safetensors", specs, arrays.__getitem__)

    with pytest.raises(OSError, match="another process is writing"):
        write(tmp_path / "m.safetensors", specs, nested)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [np.zeros((3, 4), np.float32), [np.zeros(15, np.float16)]])
def test_readers_that_give_something_else_are_caught(tmp_path, wrong):
    with pytest.raises(ValueError):
        write(tmp_path / "m.safetensors", {"a": Spec(np.dtype("f4"), (3, 5))}, lambda name: wrong)
    assert not list(tmp_path.iterdir())


def test_hashes_are_recorded_and_verified(tmp_path, capsys):
    _, folder, file = published("flux-bfl", tmp_path / "published")
    assert cli.main(["inspect", str(folder), "--verify"]) == 0
    assert "as recorded" in capsys.readouterr().out
    assert run("import", folder, tmp_path / "ours", "--verify") == 0
    assert cli.main(["inspect", str(tmp_path / "ours"), "--verify"]) == 0
    for path in (file, tmp_path / "ours" / "params.safetensors"):
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        assert cli.main(["inspect", str(path.parent)]) == 0, "only --verify reads the data"
        assert cli.main(["inspect", str(path.parent), "--verify"]) == 1
    assert run("import", folder, tmp_path / "again", "--verify") == 1
    assert "it changed since it was written" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_native_folders_of_two_imports_are_refused(tmp_path):
    for seed, name in ((0, "a"), (1, "b")):
        _, folder, _ = published("alignnet", tmp_path / name, seed)
        assert run("import", folder, tmp_path / f"ours-{name}") == 0
    params = (tmp_path / "ours-a" / native.PARAMS).read_bytes()
    (tmp_path / "ours-b" / native.PARAMS).write_bytes(params)
    with pytest.raises(WeightsError, match="of two different imports"):
        native.open_folder(tmp_path / "ours-b")


@pytest.mark.parametrize("kind", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("end", ["scale_weight", "weight_scale", None])
def test_float8_files_of_the_community_are_dequantised(tmp_path, kind, end, capsys):
    _, _, file = published("flux-bfl", tmp_path / "published")
    found = open_file(file)
    tensors, wanted = {}, {}
    for name, x in found.items():
        if not name.endswith(".weight"):
            tensors[name] = wanted[name] = np.array(x)
            continue
        scale = np.float32(0.37) if end else np.float32(1)
        tensors[name] = (np.asarray(x, np.float32) / scale).astype(kind)
        dequantised = tensors[name].astype(np.float32) * scale
        wanted[name] = dequantised.astype(ml_dtypes.bfloat16)
        if end:
            layer = name.removesuffix("weight")
            tensors[layer + end] = np.full((), scale)
            tensors[layer + ("scale_input" if end == "scale_weight" else "input_scale")] = scale
    tensors = {f"model.diffusion_model.{n}": np.asarray(x) for n, x in tensors.items()}
    tensors["vae.decoder.conv_in.bias"] = np.ones(3, np.float32)
    rewrite(tmp_path / "fp8" / "f.safetensors", tensors, found.metadata)
    assert run("import", tmp_path / "fp8", tmp_path / "ours") == 0
    assert "vae.decoder.conv_in.bias" in capsys.readouterr().out
    assert run("export", tmp_path / "ours", tmp_path / "back") == 0
    assert run("export", tmp_path / "fp8", tmp_path / "direct", "--format", "flux-bfl") == 0
    for folder in ("back", "direct"):
        back = open_tensors(tmp_path / folder)
        assert set(back) == set(wanted)
        for name, x in wanted.items():
            assert back[name].dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(back[name], x, err_msg=name)


def test_scales_that_fit_nothing_are_refused(tmp_path, capsys):
    _, _, file = published("flux-bfl", tmp_path / "published")
    found = open_file(file)
    tensors = {n: np.array(x) for n, x in found.items()}
    tensors["img_in.weight"] = tensors["img_in.weight"].astype(ml_dtypes.float8_e4m3fn)
    tensors["img_in.weight_scale"] = np.ones((32, 1), np.float32)
    tensors["nothing.weight_scale"] = np.ones((), np.float32)
    rewrite(tmp_path / "f.safetensors", tensors, found.metadata)
    out = tmp_path / "out"
    assert run("import", tmp_path / "f.safetensors", out, "--format", "flux-bfl") == 1
    error = capsys.readouterr().err
    assert "nothing.weight_scale scales nothing.weight, which is not there" in error
    assert "img_in.weight_scale (32, 1): one scale a tensor is supported" in error


def test_a_config_of_the_user_overrides_what_the_file_says(tmp_path, capsys):
    _, _, file = published("flux-bfl", tmp_path / "published")
    bare = tmp_path / "bare.safetensors"
    rewrite(bare, {n: np.array(x) for n, x in open_file(file).items()})
    assert run("import", bare, tmp_path / "ours") == 1
    assert "head dim 16: no published FLUX.1 has it" in capsys.readouterr().err
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SMALL_FLUX.to_diffusers()))
    assert run("import", bare, tmp_path / "ours", "--config", str(config)) == 0
    assert native.open_folder(tmp_path / "ours")[1]["config"] == SMALL_FLUX.to_diffusers()


@pytest.mark.parametrize("devices", [1, 4])
def test_large_arrays_reach_devices_a_row_at_a_time(monkeypatch, devices):
    rng = np.random.default_rng(0)
    source = {f"w.{i}": rng.standard_normal((8, 12)).astype(np.float32) for i in range(5)}
    table = Table("rows", (rule("w.{i}", "w", T, at=("i",), i=range(5)),))
    mesh = make_mesh({"fsdp": 2, "data": -1}, jax.devices()[:devices]) if devices > 1 else None
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if mesh is not None:
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    abstract = {"w": jax.ShapeDtypeStruct((5, 12, 8), jnp.bfloat16, sharding=sharding)}
    monkeypatch.setattr(load, "CHUNK", 8)
    rows = []
    place = load._set_row
    monkeypatch.setattr(load, "_set_row", lambda *a: rows.append(a[1].shape) or place(*a))
    found = load.load(source, table, abstract)["w"]
    assert rows and all(r[0] == 1 for r in rows)
    assert found.sharding == sharding
    wanted = np.stack([x.T for x in source.values()]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(found), wanted)


def test_mixed_types_in_one_array_take_the_widest(tmp_path):
    fmt = formats.FORMATS["flux-bfl"]
    _, _, file = published("flux-bfl", tmp_path / "published")
    tensors = {n: np.array(x) for n, x in open_file(file).items()}
    name = "double_blocks.1.img_mod.lin.weight"
    tensors[name] = tensors[name].astype(np.float32) + np.float32(1e-6)
    (part,) = fmt.parts(SMALL_FLUX.to_diffusers())
    found = load.Imported(Tensors(tensors), part.table, part.shapes)
    kernel = found("double_blocks/img_mod/lin/kernel")
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[1], tensors[name].T)
    assert found("double_blocks/txt_mod/lin/kernel").dtype == ml_dtypes.bfloat16


def test_mapped_memory_is_given_back(tmp_path):
    file = tmp_path / "a.safetensors"
    x = np.random.default_rng(0).standard_normal((1 << 10, 1 << 12)).astype(np.float32)
    write(file, {"x": Spec(x.dtype, x.shape)}, lambda name: x)
    tensors = open_file(file)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    assert np.array_equal(tensors["x"], x)
    before = resident()
    tensors.release("x")
    assert resident() < before - (12 << 20), "16 MB were mapped"
    assert np.array_equal(tensors["x"], x)


@pytest.mark.slow
def test_a_large_checkpoint_needs_little_memory(tmp_path):
    held = np.ones(1 << 27)  # 1 GB here must not count there
    del held
    source = tmp_path / "flux.safetensors"
    limit = 1.5 * convert_speed.synthetic(0.9, source) + 500e6
    assert source.stat().st_size > 1.2 * limit
    for name, one, two in (("import", "flux.safetensors", "ours"), ("export", "ours", "back")):
        _, _, peak = convert_speed.convert(
            name, "--from", str(tmp_path / one), "--out", str(tmp_path / two)
        )
        assert 150e6 < peak < limit, f"{name}: {peak / 1e6:.0f} MB of {limit / 1e6:.0f}"
        print(f"{name}: {peak / 1e6:.0f} MB of {limit / 1e6:.0f}")
