"""Files that are damaged are refused with a reason; files that are written are whole or absent."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from converters.rules import WeightsError
from converters.safetensors_io import Spec, open_file, open_tensors, write

F32 = np.dtype(np.float32)


def tensors(count: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"t{k}": rng.standard_normal((3, k + 1)).astype(np.float32) for k in range(count)}


def specs(arrays):
    return {n: Spec(x.dtype, x.shape) for n, x in arrays.items()}


def test_the_reference_implementation_reads_what_we_write_and_back(tmp_path):
    arrays = tensors()
    arrays["half"] = arrays["t0"].astype(ml_dtypes.bfloat16)
    arrays["empty"] = np.zeros((0, 4), np.float32)
    arrays["scalar"] = np.full((), 3, np.float32)
    write(tmp_path / "a.safetensors", specs(arrays), arrays.__getitem__)
    reference = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    ours = open_file(tmp_path / "a.safetensors")
    safetensors.numpy.save_file(arrays, tmp_path / "b.safetensors")
    theirs = open_file(tmp_path / "b.safetensors")
    for name, x in arrays.items():
        for found in (reference, ours, theirs):
            assert found[name].dtype == x.dtype and found[name].shape == x.shape
            np.testing.assert_array_equal(found[name], x)


def test_shards_with_an_index(tmp_path):
    arrays = tensors(6)
    file = tmp_path / "model.safetensors"
    files = write(file, specs(arrays), arrays.__getitem__, max_shard=80)
    assert len(files) > 3 and files[-1].name == "model.safetensors.index.json"
    back = open_tensors(tmp_path)
    assert list(back) == list(arrays)
    for name, x in arrays.items():
        np.testing.assert_array_equal(back[name], x)
    files[1].unlink()
    with pytest.raises(WeightsError, match="missing shard: model-00002"):
        open_tensors(tmp_path)
    write(file, specs(arrays), arrays.__getitem__)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"], "stale shards are gone"


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    arrays = tensors()
    file = tmp_path / "a.safetensors"
    write(file, specs(arrays), arrays.__getitem__)
    before = file.read_bytes()

    def broken(name):
        if name == "t2":
            raise OSError("disk full")
        return arrays[name]

    with pytest.raises(OSError, match="disk full"):
        write(file, specs(arrays), broken)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def damaged(header, data=b"\0" * 16) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "header of 0 bytes"),
        (b"\xff" * 64, "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer to one"),
        (damaged(b"{nonsense"), "not JSON"),
        (damaged(b"[1, 2]"), "not a JSON object"),
        (damaged({"a": ENTRY}, b"\0" * 8), "the file is truncated"),
        (damaged({"a": ENTRY}, b"\0" * 32), "belong to none"),
        (damaged({"a": ENTRY | {"shape": [5]}}), r"16 bytes for F32 \(5,\)"),
        (damaged({"a": ENTRY | {"shape": [-4]}}), "negative or non-integer"),
        (damaged({"a": ENTRY | {"dtype": "F31"}}), "unknown dtype 'F31'"),
        (damaged({"a": ENTRY, "b": ENTRY}), "overlaps"),
        (damaged({"a": {"dtype": "F32"}}), "no 'shape'"),
        (damaged({"a": 3}), "malformed header entry"),
        (damaged({"a": ENTRY | {"shape": [1 << 62, 1 << 62]}}), "16 bytes for F32"),
        # The product of this shape is 0 in 64 bits.
        (damaged({"a": ENTRY | {"shape": [1 << 62, 4], "data_offsets": [0, 0]}}, b""), "0 bytes"),
        (damaged({"a": ENTRY | {"shape": [10**40, 0], "data_offsets": [0, 0]}}, b""), "63 bits"),
        (damaged({"a": ENTRY | {"shape": [True, 4]}}), "non-integer"),
        (damaged({"a": ENTRY | {"shape": "22"}}), "malformed header entry"),
        (damaged({"a\u0007b": ENTRY}), "unprintable"),
        (damaged({"a": ENTRY, "__metadata__": {"x": 3}}), "__metadata__ is not strings"),
        (damaged({"a": ENTRY | {"data_offsets": [4, 20]}}, b"\0" * 20), "4 bytes before a"),
        (damaged(b"[" * 200_000), "not JSON"),
        (
            damaged(b'{"a":' + json.dumps(ENTRY).encode() + b',"a":{}}'),
            r"repeated names \['a'\]",
        ),
    ],
)
def test_damaged_files_are_refused_with_the_reason(tmp_path, content, reason):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=reason):
        open_file(file)
