"""Plain LoRA through the command line: imported, inspected, exported from folders and runs."""

import json

import numpy as np
import pytest

from converters import __main__ as cli
from converters import lora_peft, native
from converters.load import open_weights
from converters.lora_names import LAYOUTS
from tests.converters import loras
from tests.converters.loras import NO_PLACE, SMALL, lora_file, store
from tests.converters.test_x2edit import make_run
from tests.flux import test_parity as flux_parity
from x2jax.adapters import AdapterConfig
from x2jax.trained import open_trained

PLAIN = AdapterConfig(
    experts=0, tasks=0, rank=4, alpha=2.0, double=("img_attn/q", "txt_mlp/mlp_out"),
    single=("attn/proj", "mlp/mlp_out", "mlp/mlp_in"), series=(),
)  # fmt: skip


@pytest.fixture
def flux(tmp_path):
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux/config.json").write_text(json.dumps(SMALL.to_diffusers()))
    return str(tmp_path / "flux")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_detected_imported_and_exported(layout, flux, tmp_path, capsys):
    tensors = lora_file(layout) | {"lora_te1_x.lora_down.weight": np.ones((2, 3), np.float32)}
    file, ours, out = store(tmp_path / "a.safetensors", tensors), tmp_path / "ours", tmp_path / "o"
    ignore = ["--ignore", *NO_PLACE[layout][:2]] if layout in NO_PLACE else []
    command = ["import", "--from", str(file), "--out", str(ours), "--flux", flux, *ignore]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert f"{layout}: rank 5" in shown and "left out: " in shown and "lora_te1_x" in shown
    assert cli.main(["inspect", str(file), "--flux", flux, *ignore]) == 0
    assert f"{file}: {layout}, LoRA of" in capsys.readouterr().out
    assert cli.main(["export", "--from", str(ours), "--out", str(out)]) == 0
    found = open_weights(out / lora_peft.FILE)
    assert found.metadata["rank"] == "5"
    again = tmp_path / "again"
    command = ["import", "--from", str(out), "--out", str(again), "--flux", flux]
    assert cli.main([*command, "--format", "lora-peft"]) == 0
    a, b = (native.open_folder(p)[0] for p in (ours, again))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def test_a_lora_of_another_flux_and_options_out_of_place_are_refused(flux, tmp_path, capsys):
    file = store(tmp_path / "a.safetensors", lora_file("lora-xlabs"))
    out = str(tmp_path / "ours")
    assert cli.main(["import", "--from", str(file), "--out", out]) == 1
    assert "is it a LoRA of another FLUX?" in capsys.readouterr().err
    odd = store(tmp_path / "odd.safetensors", {"a": np.ones(3, np.float32)})
    assert cli.main(["inspect", str(odd), "--flux", flux]) == 1
    assert "--flux and --ignore are for LoRA files" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def trained_lora(seed: int = 0) -> dict[str, np.ndarray]:
    """A trained tree of `PLAIN` on `SMALL`, nothing in it zero."""
    import jax
    from flax import nnx

    from x2jax.adapters import Adapters
    from x2jax.trees import Skeleton

    make = lambda: Adapters(PLAIN, SMALL, rngs=nnx.Rngs(0))  # noqa: E731
    shapes = Skeleton(nnx.eval_shape(make)).abstract
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (rng.standard_normal(x.shape) / x.shape[-2] ** 0.5).astype(np.float32),
        {f"adapter/{p}": x for p, x in shapes.items()},
    )


def test_a_run_is_exported_as_diffusers_reads_it(flux, tmp_path):
    params = trained_lora()
    root = make_run(tmp_path / "run", params, PLAIN, flux=flux)
    assert cli.main(["export", "--from", str(root), "--out", str(tmp_path / "out")]) == 0
    file = tmp_path / "out" / lora_peft.FILE
    model = flux_parity.reference(SMALL)
    ours = loras.Ours(model)(PLAIN, {p.removeprefix("adapter/"): x for p, x in params.items()})
    adapted = loras.load_in_diffusers(model, file)
    assert len(adapted) == 2 * 2 + 2 * 2  # single proj_out has attention and MLP in one
    np.testing.assert_allclose(loras.run_diffusers(model), ours, atol=1e-4)
    header = open_weights(file).metadata
    assert (header["rank"], header["alpha"], header["step"]) == ("4", "4", "7")
    assert json.loads(header["config"])["adapter"]["alpha"] == 2.0
    back = tmp_path / "back"
    assert cli.main(["import", "--from", str(file), "--out", str(back), "--flux", flux]) == 0
    for path, x in open_trained(back).params.items():
        half = np.float32(0.5 if path.endswith("/up") else 1)
        np.testing.assert_array_equal(x, params[path] * half, err_msg=path)


def test_a_run_is_not_written_as_what_it_is_not(tmp_path, capsys):
    root = make_run(tmp_path / "run", trained_lora(), PLAIN)
    command = ["export", "--from", str(root), "--out", str(tmp_path / "out"), "--format"]
    assert cli.main([*command, "x2edit"]) == 1
    assert "it cannot be written as x2edit, only as lora-peft" in capsys.readouterr().err
