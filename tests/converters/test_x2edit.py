"""The X2Edit trio: names and shapes as published, both ways bitwise, refused when wrong."""

import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs.x2edit import get_config
from converters import __main__ as cli
from converters import formats, native, pickles, safetensors_io
from converters.exporting import export
from converters.formats.x2edit import x2edit_config
from converters.importing import import_
from converters.rules import WeightsError, plan
from x2jax.adapters import X2EDIT, AdapterConfig, Adapters
from x2jax.alignnet import AlignNetConfig
from x2jax.checkpoint import Checkpointer
from x2jax.flux import FLUX_DEV, FLUX_TINY
from x2jax.state import TrainState
from x2jax.trained import open_trained
from x2jax.trees import Skeleton

X2EDIT_FORMAT = formats.FORMATS["x2edit"]
SMALL = AdapterConfig(experts=3, rank=4, tasks=16)


def expected_full_size() -> dict[str, tuple[int, ...]]:
    """formats.md section 2, written out."""
    out = {}
    blocks = [(f"transformer_blocks.{i}", "q k v proj") for i in range(19)]
    blocks += [(f"single_transformer_blocks.{i}", "q k v") for i in range(38)]
    for block, projections in blocks:
        for p in projections.split():
            name = f"{block}.attn.processor.{p}_moe_lora."
            for e in range(12):
                out[f"{name}experts.{e}.down.weight"] = (64, 3072)
                out[f"{name}experts.{e}.up.weight"] = (3072, 64)
            out[f"{name}shared_experts.down.weight"] = (64, 3072)
            out[f"{name}shared_experts.up.weight"] = (3072, 64)
            out[f"{name}gate.weight"] = (12, 6144)
    return out


def test_full_size_names_and_shapes_are_the_published_ones():
    abstract = Skeleton(nnx.eval_shape(lambda: Adapters(X2EDIT, FLUX_DEV, rngs=nnx.Rngs(0))))
    shapes = {f"adapter/{p}": tuple(x.shape) for p, x in abstract.abstract.items()}
    align = AlignNetConfig(29, 3584)
    (part,) = formats.FORMATS["alignnet"].parts(vars(align))
    shapes |= {f"alignnet/{p}": s for p, s in part.shapes.items()}
    config = x2edit_config({p: np.broadcast_to(0, s) for p, s in shapes.items()})
    lora, tasks, _ = X2EDIT_FORMAT.parts(config)
    entries = plan(lora.table, lora.shapes).entries
    found = {name: entry.shape for name, entry in entries.items()}
    assert found == expected_full_size()
    assert len(found) == 5130
    assert sum(map(math.prod, found.values())) == 985_251_840
    assert {n: e.shape for n, e in plan(tasks.table, tasks.shapes).entries.items()} == {
        "weight": (16, 3072)
    }
    assert lora.dtype == "bfloat16"


def trained_tree(cfg: AdapterConfig = SMALL, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    skeleton = Skeleton(nnx.eval_shape(lambda: Adapters(cfg, FLUX_TINY, rngs=nnx.Rngs(0))))
    shapes = {f"adapter/{p}": x.shape for p, x in skeleton.abstract.items()}
    (part,) = formats.FORMATS["alignnet"].parts(vars(AlignNetConfig(5, 12, 20, 6)))
    shapes |= {f"alignnet/{p}": s for p, s in part.shapes.items()}
    return {p: rng.standard_normal(s).astype(np.float32) for p, s in shapes.items()}


def make_run(root, params, cfg: AdapterConfig = SMALL, prints=None, **changes):
    """A workdir with one checkpoint, as training leaves it."""
    config = get_config().unlock()
    config.adapter = ConfigDict(
        dict(experts=cfg.experts, rank=cfg.rank, alpha=cfg.alpha, tasks=cfg.tasks)
        | ({} if cfg.experts else {k: getattr(cfg, k) for k in ("double", "single", "series")})
    )
    config.update(changes)
    checkpoints = Checkpointer(root, every=1, keep=1)
    state = TrainState(np.int32(7), jax.tree.map(jax.numpy.asarray, params), {}, {})
    meta = {"config": json.loads(config.to_json())} | ({"fingerprints": prints} if prints else {})
    checkpoints.save(7, state, meta, force=True)
    checkpoints.close()
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    params = trained_tree()
    return make_run(tmp_path_factory.mktemp("run"), params), params


@pytest.fixture
def trio(run, tmp_path):
    export(run[0], X2EDIT_FORMAT, tmp_path / "trio")
    return tmp_path / "trio"


def test_export_then_import_is_bitwise_in_float32(run, tmp_path):
    root, params = run
    export(root, X2EDIT_FORMAT, tmp_path / "trio", dtype="float32")
    back = open_trained(tmp_path / "trio")
    assert back.params.keys() == params.keys()
    for path, x in params.items():
        np.testing.assert_array_equal(back.params[path], x, err_msg=path)
    assert back.meta["config"]["adapter"]["experts"] == SMALL.experts


def test_export_import_export_is_bitwise_in_the_published_types(trio, tmp_path):
    import_(trio, X2EDIT_FORMAT, tmp_path / "ours")
    export(tmp_path / "ours", None, tmp_path / "again")
    for file in ("lora.safetensors", "task_embeddings.bin", "diffusion_pytorch_model.bin"):
        assert (trio / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_the_files_are_what_pytorch_users_expect(trio, run):
    import safetensors
    import torch

    params = run[1]
    with safetensors.safe_open(trio / "lora.safetensors", "pt") as f:
        assert f.metadata() is None
        lora = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    assert {x.dtype for x in lora.values()} == {torch.bfloat16}
    name = "transformer_blocks.2.attn.processor.proj_moe_lora."
    ours = {
        k: params[f"adapter/double_blocks/img_attn/proj/{k}"][2]
        for k in ("down", "up", "gate_x", "gate_task")
    }

    def equal(tensor, array):
        np.testing.assert_array_equal(
            tensor.float().numpy(), array.astype(ml_dtypes.bfloat16).astype(np.float32)
        )

    equal(lora[name + "experts.1.down.weight"], ours["down"][:, 1].T)
    equal(lora[name + "experts.1.up.weight"], ours["up"][1].T)
    equal(lora[name + "shared_experts.down.weight"], ours["down"][:, 3].T)
    equal(lora[name + "shared_experts.up.weight"], ours["up"][3].T)
    equal(
        lora[name + "gate.weight"], np.concatenate([ours["gate_x"].T, ours["gate_task"].T], axis=1)
    )
    table = torch.load(trio / "task_embeddings.bin", weights_only=True)
    assert list(table) == ["weight"]
    np.testing.assert_array_equal(table["weight"], params["adapter/task_table/embedding"])
    align = torch.load(trio / "diffusion_pytorch_model.bin", weights_only=True)
    np.testing.assert_array_equal(
        align["mlp.projector.0.weight"], params["alignnet/projector_in/kernel"].T
    )


def test_without_torch_twins_are_written_and_read(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pickles, "have_torch", lambda: False)
    export(run[0], X2EDIT_FORMAT, tmp_path)
    assert "pip install 'x2jax[torch]'" in capsys.readouterr().out
    names = sorted(p.name for p in tmp_path.iterdir())
    twins = ["diffusion_pytorch_model.safetensors", "task_embeddings.safetensors"]
    assert names == sorted(["export.json", "lora.safetensors", *twins])
    assert open_trained(tmp_path).params.keys() == run[1].keys()


def rewrite(folder, change):
    """Changes the tensors of `lora.safetensors`."""
    file = folder / "lora.safetensors"
    tensors = {n: np.array(x) for n, x in safetensors_io.open_file(file).items()}
    change(tensors)
    specs = {n: safetensors_io.Spec(x.dtype, x.shape) for n, x in tensors.items()}
    safetensors_io.write(file, specs, tensors.__getitem__, metadata=None)


def test_missing_extra_and_misshaped_tensors_are_listed_together(trio, tmp_path):
    gone = "transformer_blocks.0.attn.processor.q_moe_lora.experts.2.up.weight"
    bent = "single_transformer_blocks.5.attn.processor.v_moe_lora.gate.weight"

    def change(tensors):
        del tensors[gone]
        tensors["transformer_blocks.0.attn.processor.q_moe_lora.bias"] = np.zeros(3, np.float32)
        tensors[bent] = tensors[bent][:, :-1]

    rewrite(trio, change)
    align = pickles.read(trio / "diffusion_pytorch_model.bin")
    pickles.write(
        trio / "diffusion_pytorch_model.bin", {n: x for n, x in align.items() if n != "conv.bias"}
    )
    with pytest.raises(WeightsError) as e:
        import_(trio, X2EDIT_FORMAT, tmp_path / "ours")
    text = str(e.value)
    assert f"missing: {gone}" in text
    assert "unknown: transformer_blocks.0.attn.processor.q_moe_lora.bias (3,)" in text
    assert f"mis-shaped: {bent}" in text
    assert "diffusion_pytorch_model.bin: missing: conv.bias" in text
    assert len(e.value.problems) == 4
    assert not (tmp_path / "ours").exists()


def test_a_truncated_file_is_refused_with_the_reason(trio, tmp_path, capsys):
    file = trio / "lora.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert cli.main(["import", "--from", str(trio), "--out", str(tmp_path / "ours")]) == 1
    assert "the file is truncated: fetch it again" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_a_missing_file_of_the_trio_is_named(trio, tmp_path, capsys):
    (trio / "task_embeddings.bin").unlink()
    assert cli.main(["import", "--from", str(trio), "--out", str(tmp_path / "ours")]) == 1
    assert "lacks task_embeddings.bin (or their safetensors twins)" in capsys.readouterr().err


def test_adapters_that_the_format_cannot_hold_are_refused(tmp_path):
    cfg = AdapterConfig(experts=2, rank=4, double=("txt_attn/q",), single=("attn/q",), series=())
    root = make_run(tmp_path / "run", trained_tree(cfg), cfg)
    with pytest.raises(WeightsError, match="double-block txt_attn/q has no name in it"):
        export(root, X2EDIT_FORMAT, tmp_path / "trio")


def test_alpha_goes_into_the_up_projections(tmp_path):
    cfg = AdapterConfig(experts=2, rank=4, alpha=2.0)
    params = trained_tree(cfg)
    root = make_run(tmp_path / "run", params, cfg)
    export(root, X2EDIT_FORMAT, tmp_path / "trio", dtype="float32")
    back = open_trained(tmp_path / "trio")
    for path, x in params.items():
        factor = 0.5 if path.endswith("/up") else 1
        np.testing.assert_array_equal(back.params[path], x * np.float32(factor), err_msg=path)
    assert back.meta["config"]["adapter"]["alpha"] == cfg.rank


def test_a_frozen_alignnet_comes_from_where_the_run_had_it(run, trio, tmp_path):
    params = trained_tree(seed=1)
    only = {p: x for p, x in params.items() if p.startswith("adapter/")}
    file = trio / "diffusion_pytorch_model.bin"
    root = make_run(tmp_path / "run", only, alignnet=str(file))
    export(root, X2EDIT_FORMAT, tmp_path / "out")
    np.testing.assert_array_equal(
        open_trained(tmp_path / "out").params["alignnet/fc/bias"], run[1]["alignnet/fc/bias"]
    )


def test_a_later_stage_keeps_the_alignnet_of_the_earlier_one(run, tmp_path):
    root, first = run
    params = trained_tree(seed=1)
    only = {p: x for p, x in params.items() if p.startswith("adapter/")}
    later = open_trained(make_run(tmp_path / "run", only, init_from=str(root)))
    for path, x in later.params.items():
        source = first if path.startswith("alignnet/") else params
        np.testing.assert_array_equal(x, source[path], err_msg=path)


def test_foreign_files_get_the_last_stage_of_the_paper(trio):
    (trio / "export.json").unlink()
    meta = open_trained(trio).meta
    assert meta["config"]["objective"]["source_offset"] == 128
    assert meta["config"]["adapter"]["rank"] == SMALL.rank
    assert meta["config"]["alignnet"].endswith("diffusion_pytorch_model.bin")


def test_native_folders_say_what_they_are(trio, tmp_path):
    import_(trio, X2EDIT_FORMAT, tmp_path / "ours", "float32")
    tensors, about = native.open_folder(tmp_path / "ours")
    assert about["format"] == "x2edit"
    assert {x.dtype for x in tensors.values()} == {np.dtype(np.float32)}
    with pytest.raises(ValueError, match="not a run: it has neither steps"):
        open_trained(tmp_path / "ours", ema=True)
