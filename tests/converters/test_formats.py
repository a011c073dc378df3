"""Every format through the command line: both ways bitwise, inspected, refused when wrong."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from converters import __main__ as cli
from converters import formats, native, pickles, safetensors_io
from converters.exporting import write
from converters.importing import import_
from converters.load import open_weights
from converters.rules import WeightsError
from x2jax.alignnet import AlignNetConfig
from x2jax.encoders.clip import CLIPConfig
from x2jax.encoders.qwen2_5_vl import QWEN_TINY, VisionConfig
from x2jax.encoders.qwen3 import Qwen3Config
from x2jax.encoders.t5 import T5Config
from x2jax.encoders.vae import TINY_VAE
from x2jax.flux import FLUX_TINY

SMALL_FLUX = dataclasses.replace(
    FLUX_TINY, width=32, heads=2, head_dim=16, axes=(4, 6, 6), double_blocks=2, single_blocks=2
)
SMALL_QWEN = dataclasses.replace(QWEN_TINY, layers=2, vocab=32)
SMALL_VISION = VisionConfig(2, 16, 2, 24, QWEN_TINY.width, (1,), image_token=30, video_token=31)
SMALL_VAE = dataclasses.replace(TINY_VAE, block_out_channels=(8, 16), norm_num_groups=4)
QWEN = {"model_type": "qwen2_5_vl", **SMALL_QWEN.to_transformers()}
CONFIGS = {
    "flux-diffusers": SMALL_FLUX.to_diffusers(),
    "qwen3": Qwen3Config(2, 12, 2, 1, 8, 20, 16, False).to_transformers(),
    "t5": T5Config(2, 12, 2, 4, 20, 16).to_transformers(),
    "clip": CLIPConfig(2, 12, 2, 20, 16, positions=9).to_transformers(),
    "flux-bfl": SMALL_FLUX.to_diffusers(),
    "vae-diffusers": SMALL_VAE.to_diffusers(),
    "vae-bfl": SMALL_VAE.to_diffusers(),
    "qwen2.5-vl": {**QWEN, **SMALL_VISION.to_transformers()},
    "alignnet": vars(AlignNetConfig(5, 12, 20, 6, "scale")),
    "lightcontrol": dict(
        stem=(4, 6, 8),
        widths=(8, 16),
        time_features=12,
        time_width=10,
        blocks=2,
        width=24,
        prefix="module.",
    ),
}
PAIRS = [("flux-diffusers", "flux-bfl"), ("vae-diffusers", "vae-bfl")]


def published(name: str, folder, seed: int = 0, config=None):
    """A folder of random bfloat16 weights in a format."""
    fmt = formats.FORMATS[name]
    rng = np.random.default_rng(seed)
    (part,) = fmt.parts(config or CONFIGS[name])
    params = {p: rng.standard_normal(s).astype(np.float32) for p, s in part.shapes.items()}
    write(fmt, config or CONFIGS[name], params, folder, "bfloat16")
    return fmt, folder, folder / part.file


def equal_data(a, b) -> bool:
    """Whether two files have the same tensors, byte for byte, in the same order."""
    x, y = open_weights(a), open_weights(b)
    return list(x) == list(y) and all(
        x[n].dtype == y[n].dtype and x[n].tobytes() == y[n].tobytes() for n in x
    )


@pytest.fixture(params=list(CONFIGS))
def source(request, tmp_path):
    return published(request.param, tmp_path / "published")


def test_import_then_export_is_bitwise(source, tmp_path, capsys):
    fmt, folder, file = source
    ours, again = tmp_path / "ours", tmp_path / "again"
    assert cli.main(["import", "--from", str(folder), "--out", str(ours)]) == 0
    assert cli.main(["export", "--from", str(ours), "--out", str(again)]) == 0
    assert equal_data(again / file.name, file)
    if fmt.has_config:
        assert json.loads((again / "config.json").read_text()) == CONFIGS[fmt.name]
    assert capsys.readouterr().out.count("wrote ") >= 2


@pytest.mark.parametrize("pair", PAIRS + [p[::-1] for p in PAIRS], ids="-".join)
def test_formats_of_a_kind_become_each_other_bitwise(pair, tmp_path):
    one, other = pair
    _, folder, file = published(one, tmp_path / "one")
    there, ours, back = (tmp_path / n for n in ("other", "ours", "back"))
    assert run("export", folder, there, "--format", other) == 0
    assert run("import", there, ours) == 0
    assert run("export", ours, back, "--format", one) == 0
    assert equal_data(back / file.name, file)


def run(command: str, source, out, *options: str) -> int:
    return cli.main([command, "--from", str(source), "--out", str(out), *options])


def test_another_kind_is_refused(tmp_path, capsys):
    _, folder, _ = published("vae-bfl", tmp_path / "vae")
    assert run("export", folder, tmp_path / "out", "--format", "flux-bfl") == 1
    assert "only as vae-diffusers, vae-bfl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dtype_is_the_users_choice(source, tmp_path):
    fmt, folder, _ = source
    import_(folder, fmt, tmp_path / "ours", "float32")
    assert {x.dtype for x in native.open_folder(tmp_path / "ours")[0].values()} == {
        np.dtype(np.float32)
    }


def test_inspect_says_what_it_is(source, capsys):
    fmt, folder, _ = source
    assert cli.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"{folder}: {fmt.name}," in out
    assert "complete; fills" in out


def open_file(file):
    """Copies of the tensors, and the metadata."""
    found = safetensors_io.open_file(file)
    return {n: np.array(x) for n, x in found.items()}, found.metadata


def rewrite(file, tensors, metadata=None):
    specs = {n: safetensors_io.Spec(x.dtype, x.shape) for n, x in tensors.items()}
    safetensors_io.write(file, specs, tensors.__getitem__, metadata=metadata or {})


def test_inspect_says_what_is_wrong(source, capsys):
    _, folder, file = source
    tensors, metadata = open_file(file)
    gone = sorted(tensors)[-1]
    del tensors[gone]
    rewrite(file, tensors, metadata)
    assert cli.main(["inspect", str(folder)]) == 1
    err = capsys.readouterr().err
    assert gone.removeprefix("module.") in err  # the wrapper is taken off when a file is opened


def test_another_formats_file_is_refused(tmp_path, capsys):
    _, flux, _ = published("flux-diffusers", tmp_path / "flux")
    out = str(tmp_path / "out")
    assert cli.main(["import", "--from", str(flux), "--out", out, "--format", "alignnet"]) == 1
    assert "not an AlignNet" in capsys.readouterr().err
    assert cli.main(["import", "--from", str(flux), "--out", out, "--format", "vae-diffusers"]) == 1
    assert "expected the config of an AutoencoderKL" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_files_are_shown_with_the_formats_known(tmp_path, capsys):
    spec = safetensors_io.Spec(np.dtype(np.float32), (2,))
    file = tmp_path / "odd.safetensors"
    safetensors_io.write(file, {"a.b": spec}, lambda name: np.ones(2, np.float32))
    assert cli.main(["inspect", str(file)]) == 1
    out = capsys.readouterr().out
    assert "a.b (2,)" in out and "flux-diffusers" in out
    assert cli.main(["import", "--from", str(file), "--out", str(tmp_path / "o")]) == 1
    assert "is of no format known here" in capsys.readouterr().err


def test_the_comfyui_wrapping_is_written_and_read(tmp_path):
    _, folder, file = published("alignnet", tmp_path / "published")
    assert run("export", folder, tmp_path / "comfy", "--format", "alignnet-comfyui") == 0
    (path,) = (tmp_path / "comfy").iterdir()
    state = torch.load(path, weights_only=True)
    assert set(state) == {"config", "state_dict"} and state["config"]["states"] == 5
    assert all(isinstance(x, torch.Tensor) for x in state["state_dict"].values())
    assert run("export", path, tmp_path / "raw", "--format", "alignnet") == 0
    assert equal_data(tmp_path / "raw" / file.name, file)


@pytest.mark.parametrize("wrapping", ["module", "config"])
def test_wrapped_alignnets_are_read(tmp_path, wrapping):
    fmt, folder, file = published("alignnet", tmp_path / "published")
    state = {n: torch.tensor(np.asarray(x, np.float32)) for n, x in open_weights(file).items()}
    if wrapping == "module":
        state = {f"module.{n}": x for n, x in state.items()}
    else:
        state = {"config": {"layers": 5}, "state_dict": state}
    path = tmp_path / "diffusion_pytorch_model.bin"
    torch.save(state, path)
    import_(path, fmt, tmp_path / "wrapped")
    import_(folder, fmt, tmp_path / "raw", "float32")
    a, b = (native.open_folder(tmp_path / n)[0] for n in ("wrapped", "raw"))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_a_qwen_with_a_vision_tower_says_what_it_leaves_out(tmp_path, capsys):
    fmt, folder, file = published("qwen2.5-vl", tmp_path / "published", config=QWEN)
    tensors = {n: np.array(x) for n, x in safetensors_io.open_file(file).items()}
    tensors["visual.patch_embed.proj.weight"] = np.ones((2, 2), jnp.bfloat16)
    specs = {n: safetensors_io.Spec(x.dtype, x.shape) for n, x in tensors.items()}
    safetensors_io.write(file, specs, tensors.__getitem__)
    import_(folder, fmt, tmp_path / "ours")
    assert "left out, known and not needed: visual.patch_embed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "renamed", "extra"),
    [
        ("t5", lambda n: n, ["encoder.embed_tokens.weight", "decoder.final_layer_norm.weight"]),
        ("t5", lambda n: n.replace("shared.", "encoder.embed_tokens."), ["lm_head.weight"]),
        ("clip", lambda n: n, ["text_model.embeddings.position_ids", "text_projection.weight"]),
        ("clip", lambda n: n.removeprefix("text_model."), ["embeddings.position_ids"]),
    ],
)
def test_text_encoders_are_read_under_each_of_their_names(tmp_path, name, renamed, extra, capsys):
    fmt, folder, file = published(name, tmp_path / "published")
    import_(folder, fmt, tmp_path / "ours")
    tensors = {renamed(n): np.array(x) for n, x in safetensors_io.open_file(file).items()}
    for other in extra:
        tensors[other] = np.arange(9, dtype=np.int64 if "ids" in other else np.float32)[None]
    specs = {n: safetensors_io.Spec(x.dtype, x.shape) for n, x in tensors.items()}
    safetensors_io.write(file, specs, tensors.__getitem__)
    import_(folder, fmt, tmp_path / "again")
    assert all(other in capsys.readouterr().out for other in extra[-1:])
    a, b = (native.open_folder(tmp_path / n)[0] for n in ("ours", "again"))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path])


def test_pickles_with_code_are_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("this code must never run",)

    torch.save({"weight": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(WeightsError, match="unreadable pickle"):
        pickles.read(tmp_path / "evil.bin")


def test_pickles_of_other_things_are_named(tmp_path):
    torch.save({"epoch": 3, "weight": torch.ones(2)}, tmp_path / "a.bin")
    with pytest.raises(WeightsError, match="epoch: a int, not a tensor"):
        pickles.read(tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(b"not a pickle")
    with pytest.raises(WeightsError, match="unreadable pickle"):
        pickles.read(tmp_path / "b.bin")


def test_missing_paths_and_usage(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / "no")]) == 1
    assert "no such file or folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in (*formats.FORMATS, "import", "export", "inspect"))
