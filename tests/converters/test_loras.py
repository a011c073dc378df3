"""Community LoRAs: the same forward as in diffusers, both ways, and refused when wrong."""

import json
import re

import ml_dtypes
import numpy as np
import pytest

from converters import lora_peft
from converters.load import open_weights
from converters.lora import PLACES, open_lora
from converters.lora_names import LAYOUTS, bfl_targets, detect, diffusers_targets
from converters.lora_scale import METADATA, read_settings
from converters.rules import WeightsError
from converters.safetensors_io import Tensors
from tests import parity
from tests.converters import loras
from tests.converters.loras import NO_PLACE, SMALL, lora_file, store
from tests.flux import test_parity as flux_parity
from x2jax.flux import FLUX_DEV

TOL = 1e-4


@pytest.fixture(scope="module")
def ours():
    return loras.Ours(flux_parity.reference(SMALL))


def opened(tensors, layout, **kw):
    known = (p for p in NO_PLACE.get(layout, ()) if any(re.fullmatch(p, n) for n in tensors))
    kw = {"ignore": tuple(known)} | kw
    return open_lora(Tensors(tensors), LAYOUTS[layout], SMALL, **kw)


def refused(tensors, layout, **kw) -> list[str]:
    with pytest.raises(WeightsError) as e:
        opened(tensors, layout, **kw)
    return list(e.value.problems)


def exported(lora, **kw) -> dict[str, np.ndarray]:
    specs, read = lora_peft.exporter({p: lora.read(p) for p in lora.specs}, SMALL, **kw)
    return {n: read(n) for n in specs}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_forward_is_that_of_diffusers_and_every_tensor_matters(layout, ours, tmp_path):
    model, tensors = flux_parity.reference(SMALL), lora_file(layout)
    if layout == "lora-bfl":
        tensors |= loras.norms(model)  # diffusers asks for those of a control LoRA
    file = store(tmp_path / "lora.safetensors", tensors)
    without = loras.run_diffusers(model)
    loras.load_in_diffusers(model, file)
    expected = loras.run_diffusers(model)
    assert np.abs(expected - without).max() > 0.5
    read = open_weights(file)
    assert detect(read) is LAYOUTS[layout]
    parity.assert_parity([ours.of(opened(read, layout))], [expected], TOL)
    unseen = []
    for name, x in tensors.items():
        if not any(re.fullmatch(p, name) for p in NO_PLACE.get(layout, ())):
            gap = parity.distance([ours.of(opened(tensors | {name: x * 4}, layout))], [expected])
            unseen += [f"{name}: {gap:.2g}"] if gap < 10 * TOL else []
    assert not unseen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_exported_has_that_forward_in_diffusers_too(layout, ours, tmp_path):
    lora = opened(lora_file(layout), layout)
    tensors = exported(lora)
    model = flux_parity.reference(SMALL)
    file = store(tmp_path / lora_peft.FILE, tensors)
    adapted = loras.load_in_diffusers(model, file)
    assert len(adapted) == len({n.rsplit(".lora_", 1)[0] for n in tensors if ".lora_" in n})
    parity.assert_parity([ours.of(lora)], [loras.run_diffusers(model)], TOL)
    again = opened(tensors, "lora-peft")
    assert again.config == lora.config
    for path in lora.specs:
        np.testing.assert_array_equal(again.read(path), lora.read(path), err_msg=path)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_import_then_export_is_bitwise(dtype):
    tensors = lora_file("lora-peft", dtype=dtype)
    tensors = {n: x for n, x in tensors.items() if not n.endswith(".alpha")}
    back = exported(opened(tensors, "lora-peft"))
    assert {n for n in back if not n.endswith(".alpha")} == set(tensors)
    for name, x in tensors.items():
        assert back[name].dtype == dtype
        np.testing.assert_array_equal(back[name], x, err_msg=name)
    for name in set(back) - set(tensors):
        rank = len(tensors[name.replace(".alpha", ".lora_A.weight")])
        assert back[name] == rank, "a reader must not scale"


def test_a_scale_goes_into_lora_b_and_one_rank_needs_no_alpha():
    lora = opened(one("transformer.transformer_blocks.0.attn.to_q"), "lora-peft")
    plain, scaled = exported(lora), exported(lora, scale=0.5)
    assert sorted(plain) == [
        f"transformer.transformer_blocks.0.attn.to_q.lora_{h}.weight" for h in "AB"
    ]
    for name, x in scaled.items():
        np.testing.assert_array_equal(x, plain[name] * (0.5 if "lora_B" in name else 1))


def one(name: str, rank: int = 3, inputs: int = 32, outputs: int = 32, halves="lora_A lora_B"):
    """A file of one linear's LoRA."""
    rng = np.random.default_rng(0)
    shapes = zip(halves.split(), ((rank, inputs), (outputs, rank)), strict=True)
    return {f"{name}.{h}.weight": rng.standard_normal(s).astype(np.float32) for h, s in shapes}


def test_a_scale_that_the_files_type_cannot_hold_makes_it_float32():
    name = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = one(name, halves="lora_down lora_up")
    tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in tensors.items()}
    path = "double_blocks/img_attn/proj/up"
    for alpha, dtype in ((1.5, ml_dtypes.bfloat16), (1.0, np.float32)):
        lora = opened(tensors | {f"{name}.alpha": np.float32(alpha)}, "lora-kohya")
        assert lora.specs[path].dtype == dtype
        up = tensors[f"{name}.lora_up.weight"].astype(np.float32) * np.float32(alpha / 3)
        np.testing.assert_array_equal(lora.read(path)[0, 0].astype(np.float32), up.T)
    assert any("alpha / rank of 0.333333" in n for n in lora.notes)


def test_missing_blocks_and_projections_are_zero_and_reported():
    lora = opened(one("transformer.transformer_blocks.1.attn.to_k"), "lora-peft")
    assert lora.config.double == ("img_attn/k",) and lora.config.single == ()
    assert lora.config.experts == 0 and lora.config.scale == 1
    down = lora.read("double_blocks/img_attn/k/down")
    assert not down[0].any() and down[1].all()
    assert lora.notes[:2] == [
        "double blocks without img_attn/k: 0 (nothing is added)",
        "no single block is adapted",
    ]


def test_block_diagonal_fused_linears_keep_their_ranks():
    """kohya's `split_qkv` writes three LoRAs as one of three times the rank."""
    name, rng = "lora_unet_double_blocks_0_img_attn_qkv", np.random.default_rng(0)
    up = np.zeros((96, 6), np.float32)
    for k in range(3):
        up[32 * k : 32 * k + 32, 2 * k : 2 * k + 2] = rng.standard_normal((32, 2))
    down = rng.standard_normal((6, 32)).astype(np.float32)
    lora = opened({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, "lora-kohya")
    assert lora.config.rank == 2
    k_down = lora.read("double_blocks/img_attn/k/down")[0, :, 0]
    k_up = lora.read("double_blocks/img_attn/k/up")[0, 0]
    np.testing.assert_allclose(k_down @ k_up, (up @ down)[32:64].T, rtol=1e-6)


def test_text_encoder_parts_are_left_out_by_name():
    tensors = lora_file("lora-kohya")
    te = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    extra = one(te, inputs=8, outputs=9, halves="lora_down lora_up") | {f"{te}.alpha": np.ones(())}
    lora = opened(tensors | extra, "lora-kohya")
    assert sorted(lora.ignored) == sorted(extra)
    peft = lora_file("lora-peft") | one("text_encoder.text_model.encoder.layers.0.mlp.fc1")
    assert len(opened(peft, "lora-peft").ignored) == 2


def test_every_offender_is_listed_at_once():
    name = "transformer.transformer_blocks.0.attn."
    tensors = {
        **one(name + "to_q"),
        **one(name + "to_k", inputs=31),
        **one("transformer.transformer_blocks.7.attn.to_q"),
        **one("transformer.transformer_blocks.0.norm1.linear", outputs=192),
        **{
            n: x.astype(np.int8)
            for n, x in one("transformer.transformer_blocks.1.attn.to_v").items()
        },
        name + "to_out.0.lora_A.weight": np.ones((3, 32), np.float32),
        name + "to_q.lora_magnitude_vector": np.ones(32, np.float32),
        name + "to_q.lora_B.bias": np.ones(32, np.float32),
        "optimizer.step": np.ones((), np.float32),
    }
    text = "\n".join(refused(tensors, "lora-peft"))
    assert "mis-shaped: " + name + "to_k.lora_A.weight is (3, 31), expected (3, 32)" in text
    assert text.count("unknown: transformer.transformer_blocks.7.attn.to_q") == 2
    assert text.count("adapters do not adapt double_blocks/img_mod/lin; --ignore") == 2
    assert text.count("expected floating point") == 2
    assert "missing: the up projection of transformer_blocks.0.attn.to_out.0" in text
    assert "a DoRA rescales whole weights" in text
    assert "to_q.lora_B.bias (32,): the adapters have no bias" in text
    assert "unknown: optimizer.step" in text
    assert len(text.split("\n")) == 11
    kept = r".*(norm1|to_k|to_v|to_out|blocks\.7)\..*|.*(magnitude|bias).*|optimizer.*"
    lora = opened(tensors, "lora-peft", ignore=(kept,))
    assert lora.config.double == ("img_attn/q",)
    assert len(lora.ignored) == 12


@pytest.mark.parametrize("layout", ["lora-bfl", "lora-fal"])
def test_parts_that_have_no_place_are_refused_until_they_are_ignored(layout):
    problems = refused(lora_file(layout), layout, ignore=())
    expected = [n for n in lora_file(layout) if any(re.fullmatch(p, n) for p in NO_PLACE[layout])]
    assert len(problems) == len(expected) and all(p.startswith("no place: ") for p in problems)


def test_a_lora_that_does_nothing_is_refused():
    name = "transformer.transformer_blocks.0.attn.to_q"
    zero = one(name) | {f"{name}.lora_B.weight": np.zeros((32, 3), np.float32)}
    assert "it would change nothing" in refused(zero, "lora-peft")[0]
    text = one("text_encoder.text_model.encoder.layers.0.mlp.fc1")
    assert "no tensor of lora-peft" in refused(text, "lora-peft")[0]
    (problem,) = refused(lora_file("lora-peft"), "lora-peft", ignore=("typo.*",))
    assert "--ignore typo.* matches no name" in problem


def test_layouts_are_told_apart_and_other_files_are_none():
    for layout in LAYOUTS:
        assert detect(lora_file(layout)) is LAYOUTS[layout]
    assert detect(["transformer_blocks.0.attn.processor.q_moe_lora.experts.0.down.weight"]) is None
    assert detect(["transformer_blocks.0.attn.to_q.weight", "conv.weight"]) is None
    assert detect(["transformer_blocks.0.attn.to_q.lora.down.weight"]) is LAYOUTS["lora-peft"]
    comfy = "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight"
    assert detect([comfy]) is LAYOUTS["lora-bfl"]
    with pytest.raises(WeightsError, match="several layouts"):
        detect([*lora_file("lora-peft"), *lora_file("lora-kohya")])


def test_both_ways_to_name_flux_mean_the_same():
    a, b = (targets(FLUX_DEV).values() for targets in (diffusers_targets, bfl_targets))
    slots = [{(p, t.block) for t in v for p in t.paths} for v in (a, b)]
    assert slots[0] == slots[1]
    assert len({p for p, _ in slots[0]} & PLACES) == len(PLACES) == 18


@pytest.mark.parametrize("rslora", [False, True])
def test_settings_in_the_header_are_obeyed(rslora, ours, tmp_path):
    tensors = lora_file("lora-peft")
    tensors = {n: x for n, x in tensors.items() if not n.endswith(".alpha")}
    names = {n.removeprefix("transformer.").rsplit(".lora_", 1)[0]: len(x)
             for n, x in tensors.items() if "lora_A" in n}  # fmt: skip
    settings = {
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in names.items() if r != 2},
        "alpha_pattern": {"attn.to_k": 5},
        "target_modules": list(names),
        "use_rslora": rslora,
    }
    header = {METADATA: json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
    file = store(tmp_path / "lora.safetensors", tensors, header)
    model = flux_parity.reference(SMALL)
    loras.load_in_diffusers(model, file)
    read = open_weights(file)
    lora = opened(read, "lora-peft", settings=read_settings(file, read.metadata))
    parity.assert_parity([ours.of(lora)], [loras.run_diffusers(model)], TOL)
    wrong = settings | {"rank_pattern": {}}
    assert any(
        "the settings beside it say 2" in p for p in refused(read, "lora-peft", settings=wrong)
    )


def test_settings_beside_the_file_are_obeyed_and_other_methods_refused(tmp_path):
    path = tmp_path / "adapter_config.json"
    file = store(
        tmp_path / "adapter_model.safetensors",
        one("base_model.model.transformer_blocks.0.attn.to_q"),
    )
    for content, reason in (
        ({"use_dora": True}, "use_dora: True"),
        ({"peft_type": "LOHA"}, "peft_type: 'LOHA'"),
        ([1], "a list, not an object"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(WeightsError, match=reason):
            read_settings(file, {})
    path.write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    read = open_weights(file)
    double = opened(read, "lora-peft", settings=read_settings(file, {}))
    single = opened(read, "lora-peft")
    up = "double_blocks/img_attn/q/up"
    np.testing.assert_array_equal(double.read(up), 2 * single.read(up))


def test_moe_lora_is_not_written_as_plain_lora():
    params = {
        "double_blocks/img_attn/q/down": np.ones((2, 32, 5, 3), np.float32),
        "double_blocks/img_attn/q/up": np.ones((2, 5, 3, 32), np.float32),
        "double_blocks/img_attn/q/gate_x": np.ones((2, 32, 4), np.float32),
        "single_blocks/attn/k/down": np.ones((2, 32, 1, 3), np.float32),
    }
    with pytest.raises(WeightsError) as e:
        lora_peft.exporter(params, SMALL)
    text = str(e.value)
    assert "no place: double_blocks/img_attn/q/gate_x" in text
    assert text.count("mis-shaped: ") == 2
    assert "missing: single_blocks/attn/k/up" in text
