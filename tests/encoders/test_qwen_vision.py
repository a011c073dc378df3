"""Qwen2.5-VL's vision path against transformers: pixels, positions, tower, every hidden state."""

import ast
import dataclasses
import inspect
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import PartitionSpec as P
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from converters.qwen2_5_vl import qwen_table
from converters.rules import plan
from tests import parity
from x2jax.encoders.qwen2_5_vl import (
    QWEN2_5_VL_3B_VISION,
    QWEN2_5_VL_7B_VISION,
    Qwen2_5_VL,
    QwenConfig,
    VisionConfig,
    VisionTower,
    image_patches,
    mrope_positions,
    pack,
    video_patches,
)
from x2jax.encoders.qwen2_5_vl.preprocess import patch_positions, segments, smart_resize
from x2jax.encoders.qwen2_5_vl.segments import chunked, windowed
from x2jax.sharding import make_mesh, param_shardings
from x2jax.trees import prefixed, state_params

IMAGE, VIDEO = 38, 39
TEXT = QwenConfig(2, 32, 4, 2, 48, 40, False, (1, 1, 2))
VISION = VisionConfig(
    3, 32, 2, 24, 32, (1,), patch=4, window=16, image_token=IMAGE, video_token=VIDEO
)
PIXELS = dict(min_pixels=64, max_pixels=2000)
BUDGET = 320
F32 = dict(dtype=jnp.float32, param_dtype=jnp.float32)


def pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(height, width, seed=0):
    """Smooth, as photographs are."""
    small = Image.fromarray(pixels(7, 5, seed))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def image(height, width, seed=0):
    return image_patches(pixels(height, width, seed), VISION, **PIXELS)


def video(frames, height, width, fps, seed=0):
    stack = np.stack([pixels(height, width, seed + f) for f in range(frames)])
    return video_patches(stack, VISION, fps=fps, **PIXELS)


# Sizes whose windows (2 x 2 tokens) are ragged on both sides, on one side and on neither.
CASES = {
    "one image": [[image(24, 40)]],
    "three images": [[image(24, 40), image(32, 16, 1), image(40, 32, 2)]],
    "a video": [[video(5, 24, 32, 1.5)]],
    "a batch": [[video(3, 16, 24, 3.0), image(24, 24, 3)], [image(40, 24, 4)], []],
}


def prompt(batch, seed=0):
    """Ids and mask, left-padded: text around and between the images and videos."""
    rng = np.random.default_rng(seed)
    rows = []
    for media in batch:
        row = list(rng.integers(0, IMAGE, 3))
        for m in media:
            token = IMAGE if m.kind == "image" else VIDEO
            row += [token] * VISION.tokens(m.grid) + list(rng.integers(0, IMAGE, 2))
        rows.append(row)
    length = max(map(len, rows)) + 1
    ids = np.array([[0] * (length - len(r)) + r for r in rows])
    return ids, np.arange(length) >= length - np.array([len(r) for r in rows])[:, None]


def grids(batch, kind):
    found = [m.grid for media in batch for m in media if m.kind == kind]
    return torch.tensor(found) if found else None


def reference_inputs(batch):
    """Keyword arguments of transformers' `get_rope_index` for a batch."""
    ids, mask = prompt(batch)
    seconds = [m.seconds for media in batch for m in media if m.kind == "video"]
    return dict(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        mm_token_type_ids=torch.tensor(np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0))),
        image_grid_thw=grids(batch, "image"),
        video_grid_thw=grids(batch, "video"),
        second_per_grid_ts=seconds or None,
    )


def all_patches(batch, kind):
    found = [m.patches_PC for media in batch for m in media if m.kind == kind]
    return torch.tensor(np.concatenate(found)) if found else None


@pytest.fixture(scope="module")
def reference():
    config = Qwen2_5_VLConfig(text_config=TEXT.to_transformers(), **VISION.to_transformers())
    return parity.randomise(Qwen2_5_VLForConditionalGeneration(config))


@pytest.fixture(scope="module")
def ours(reference):
    def make():
        return Qwen2_5_VL(TEXT, VISION, **F32, rngs=nnx.Rngs(0))

    return parity.fill(
        make, qwen_table(TEXT, nested=True, vision=VISION), parity.tensors(reference)
    )


@jax.jit
def features(tower, inputs):
    return tower(inputs)


@jax.jit
def states_and_logits(model, ids, mask, positions, vision):
    states = model.hidden_states(ids, mask, positions_BT3=positions, vision=vision)
    return [*states, model.logits(states[-1])]


def run_ours(model, batch):
    ids, mask = prompt(batch)
    positions, _ = mrope_positions(ids, mask, batch, VISION)
    out = states_and_logits(model, ids, mask, positions, pack(batch, VISION, BUDGET))
    return [np.asarray(x)[mask] for x in out]


def run_reference(model, batch):
    _, mask = prompt(batch)
    with torch.no_grad():
        out = model(
            **reference_inputs(batch),
            pixel_values=all_patches(batch, "image"),
            pixel_values_videos=all_patches(batch, "video"),
            output_hidden_states=True,
        )
    return [x.numpy()[mask] for x in (*out.hidden_states, out.logits)]


def test_the_tower_equals_transformers(reference, ours):
    batch = [[*CASES["three images"][0], *CASES["a video"][0]]]
    tower, grid = reference.model.visual, torch.tensor([m.grid for m in batch[0]])
    patches = torch.tensor(np.concatenate([m.patches_PC for m in batch[0]]))

    def run():
        with torch.no_grad():
            return [tower(patches, grid_thw=grid).pooler_output.numpy()]

    tokens = sum(VISION.tokens(m.grid) for m in batch[0])
    mine = [np.asarray(features(ours.visual, pack(batch, VISION, BUDGET)))[0, :tokens]]
    parity.assert_every_weight_matters(tower, run, mine, tol=1e-5)
    # Were the windows or the full blocks left out, the parity above would notice.
    graph, state = nnx.split(ours.visual)
    for full in ((), (0, 1, 2)):
        other = nnx.merge(graph, state)
        other.cfg = dataclasses.replace(VISION, full_blocks=full)
        seen = np.asarray(features(other, pack(batch, VISION, BUDGET)))[0, :tokens]
        assert parity.distance([seen], run()) > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_every_hidden_state_and_the_logits_equal_transformers(case, reference, ours):
    batch = CASES[case]
    parity.assert_every_weight_matters(
        reference, lambda: run_reference(reference, batch), run_ours(ours, batch), tol=2e-5
    )


def test_attention_in_pieces_equals_attention_with_a_mask():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 53, 2, 8)).astype(np.float32)
    # Ragged windows of at most 8, then padding that is longer than a window.
    lengths = [[8, 3, 8, 8, 1, 5, 8], [2, 8, 8, 8, 8, 8, 7]]
    numbers = [np.repeat(np.arange(1, 8), x) for x in lengths]
    windows = np.stack([np.pad(x, (0, 53 - len(x))) for x in numbers])
    frames = np.where(windows, (windows + 2) // 3, 0)
    for ids, pieces in (
        (windows, lambda: windowed(q, k, v, windows, 8)),
        (frames, lambda: chunked(q, k, v, frames, 16)),
        (frames, lambda: chunked(q, k, v, frames, 64)),
    ):
        mask = ids[:, None, :, None] == ids[:, None, None, :]
        whole = np.asarray(jax.nn.dot_product_attention(q, k, v, mask=mask))
        mine = np.asarray(pieces())
        assert mine.shape == whole.shape and np.isfinite(mine).all()
        np.testing.assert_allclose(mine[ids > 0], whole[ids > 0], atol=1e-6)


def test_text_alone_is_as_without_the_tower(ours):
    plain = Qwen2_5_VL(TEXT, **F32, rngs=nnx.Rngs(3))
    seeing = Qwen2_5_VL(TEXT, VISION, **F32, rngs=nnx.Rngs(3))
    a, b = state_params(plain), state_params(seeing)
    assert set(b) - set(a) == {p for p in b if p.startswith("visual/")}
    for path, x in a.items():
        np.testing.assert_array_equal(x, b[path])
    ids, mask = prompt([[], []])
    first = plain.hidden_states(jnp.asarray(ids), jnp.asarray(mask))
    np.testing.assert_array_equal(first, seeing.hidden_states(jnp.asarray(ids), jnp.asarray(mask)))
    positions, _ = mrope_positions(ids, mask, [[], []], VISION)
    empty = pack([[], []], VISION, 16)
    seen = seeing.hidden_states(
        jnp.asarray(ids), jnp.asarray(mask), positions_BT3=positions, vision=empty
    )
    np.testing.assert_allclose(np.asarray(seen)[:, mask], np.asarray(first)[:, mask], atol=1e-5)


def test_one_program_serves_every_size_and_the_budget_does_not_matter(ours):
    batches = [[[image(8, 8)]], CASES["three images"], CASES["a video"], [[]]]
    before = features._cache_size()
    seen = [np.asarray(features(ours.visual, pack(b, VISION, 324))) for b in batches]
    assert features._cache_size() == before + 1
    assert all(np.isfinite(x).all() for x in seen)
    for batch, wide in zip(batches, seen, strict=True):
        count = sum(VISION.tokens(m.grid) for m in batch[0])
        tight = features(ours.visual, pack(batch, VISION, max(4, 4 * count)))
        np.testing.assert_allclose(wide[0, :count], np.asarray(tight)[0, :count], atol=1e-5)


def test_images_of_a_sample_do_not_see_each_other(ours):
    together = features(ours.visual, pack(CASES["three images"], VISION, BUDGET))
    counts = [VISION.tokens(m.grid) for m in CASES["three images"][0]]
    parts = np.split(np.asarray(together)[0], np.cumsum(counts))
    for m, part in zip(CASES["three images"][0], parts, strict=False):
        alone = np.asarray(features(ours.visual, pack([[m]], VISION, BUDGET)))[0, : len(part)]
        np.testing.assert_allclose(alone, part, atol=1e-5)


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 8, 8), (3, 10, 6), (2, 22, 14)])
@pytest.mark.parametrize("cfg", [VISION, QWEN2_5_VL_7B_VISION], ids=["tiny", "7B"])
def test_windows_and_patch_positions_equal_transformers(grid, cfg):
    both = torch.tensor([[1, 6, 10], grid])
    frames, windows = segments([tuple(g) for g in both.tolist()], cfg)
    index, edges = get_vision_window_index(both, cfg.merge, cfg.window, cfg.patch)
    np.testing.assert_array_equal(np.argsort(windows, kind="stable"), index)
    lengths = np.unique(windows, return_counts=True)[1] * cfg.merge**2
    np.testing.assert_array_equal(np.cumsum(lengths), edges[1:])
    np.testing.assert_array_equal(
        np.unique(frames, return_counts=True)[1], [15] + [grid[1] * grid[2] // 4] * grid[0]
    )
    np.testing.assert_array_equal(
        patch_positions(grid, cfg), get_vision_position_ids(both[1:], cfg.merge)
    )


TEXT_ONLY = {"text": [[]], "text, padded": [[], []]}


@pytest.mark.parametrize("case", [*CASES, *TEXT_ONLY])
def test_position_ids_equal_get_rope_index(case, reference):
    batch = (CASES | TEXT_ONLY)[case]
    inputs, (ids, mask) = reference_inputs(batch), prompt(batch)
    if case == "text, padded":
        mask[0, :2] = False
        inputs["attention_mask"] = torch.tensor(mask, dtype=torch.long)
    expected, deltas = reference.model.get_rope_index(**inputs)
    positions, ours = mrope_positions(ids, mask, batch, VISION)
    assert (positions[~mask] == 1).all()  # tests/encoders/test_pads.py says why
    np.testing.assert_array_equal(positions[mask], expected.permute(1, 2, 0)[torch.tensor(mask)])
    np.testing.assert_array_equal(ours, deltas[:, 0])


@pytest.mark.parametrize("fps", [0.7, 1.0, 23.976, 30.0])
@pytest.mark.parametrize("rate", [2, 4, 25])
def test_video_time_is_cut_as_transformers_cuts_it(fps, rate, reference):
    cfg = dataclasses.replace(VISION, tokens_per_second=rate)
    batch = [[video(40, 8, 8, fps)._replace(seconds=2 / fps)]]
    reference.config.vision_config.tokens_per_second = rate
    expected, _ = reference.model.get_rope_index(**reference_inputs(batch))
    reference.config.vision_config.tokens_per_second = VISION.tokens_per_second
    ids, mask = prompt(batch)
    positions, _ = mrope_positions(ids, mask, batch, cfg)
    np.testing.assert_array_equal(positions[mask], expected.permute(1, 2, 0)[torch.tensor(mask)])


SIZES = [(100, 150), (300, 200), (37, 61), (28, 28), (20, 3000), (1200, 900), (57, 10)]


@pytest.mark.parametrize("size", SIZES)
def test_image_patches_equal_transformers_value_for_value(size):
    processor = Qwen2VLImageProcessorPil()
    cfg, some = QWEN2_5_VL_7B_VISION, [picture(*size), picture(60, 90, 1)]
    expected = processor(some, return_tensors="np")
    mine = [image_patches(x, cfg) for x in some]
    np.testing.assert_array_equal([m.grid for m in mine], expected["image_grid_thw"])
    np.testing.assert_array_equal(
        np.concatenate([m.patches_PC for m in mine]), expected["pixel_values"]
    )


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_other_modes_equal_transformers(mode):
    source = picture(40, 50).convert("RGB")
    if mode == "RGBA":
        source.putalpha(Image.fromarray(pixels(40, 50)[..., 0]))
    converted = source.convert(mode)
    expected = Qwen2VLImageProcessorPil()([converted], return_tensors="np")["pixel_values"]
    mine = image_patches(converted, QWEN2_5_VL_7B_VISION)
    np.testing.assert_array_equal(mine.patches_PC, expected)


def of_video_processor(name):
    """A function of transformers' video processor, whose module imports torchvision."""
    folder = Path(inspect.getfile(transformers)).parent / "models" / "qwen2_vl"
    tree = ast.parse((folder / "video_processing_qwen2_vl.py").read_text())
    found = next(x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == name)
    scope = {"torch": torch, "math": math, "VideoMetadata": None}  # the last for an annotation
    exec(compile(ast.Module([found], []), name, "exec"), scope)
    return scope[name]


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_video_patches_equal_transformers(frames):
    """Order, repeated last frame, scale; frames that need no resizing, so to float rounding."""
    cfg = QWEN2_5_VL_7B_VISION
    stack = np.stack([pixels(280, 420, f) for f in range(frames)])
    mine = video_patches([Image.fromarray(f) for f in stack], cfg, fps=4.0)
    assert mine.seconds == 0.5
    processor = Qwen2VLImageProcessorPil()
    mean, std = (255 * torch.tensor(x) for x in (processor.image_mean, processor.image_std))
    scaled = (torch.tensor(stack).permute(0, 3, 1, 2) - mean[:, None, None]) / std[:, None, None]
    expected, *grid = of_video_processor("patchify")(None, scaled[None], 14, 2, 2)
    assert mine.grid == tuple(grid) == (-(-frames // 2), 20, 30)
    np.testing.assert_allclose(mine.patches_PC, expected[0], atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_pil_and_torch_resize_alike(size):
    """torchvision, which transformers' other processors use, calls this function of torch."""
    rows, columns = smart_resize(*size, min_pixels=3136, max_pixels=1003520)
    for source in (picture(*size), Image.fromarray(pixels(*size))):
        mine = np.asarray(source.resize((columns, rows), Image.Resampling.BICUBIC))
        chw = torch.tensor(np.asarray(source)).permute(2, 0, 1)[None]
        other = torch.nn.functional.interpolate(
            chw, (rows, columns), mode="bicubic", antialias=True
        )
        gap = np.abs(mine.astype(int) - other[0].permute(1, 2, 0).numpy())
        assert gap.max() <= 2 and (gap > 0).mean() < 0.05, (gap.max(), (gap > 0).mean())


def test_one_compiled_program_is_also_what_every_budget_error_names():
    with pytest.raises(ValueError, match=r"sample 1: .* 60 patches, the budget is 32: lower max"):
        pack([[], [image(24, 40)]], VISION, 32)
    for budget in (0, 30):
        with pytest.raises(ValueError, match="must be a positive multiple of 4"):
            pack([[]], VISION, budget)


def test_bad_pictures_say_what_to_do():
    with pytest.raises(ValueError, match="10 x 0 pixels is empty: leave it out"):
        image(0, 10)
    with pytest.raises(ValueError, match="0 x 5 pixels is empty"):
        image_patches(Image.new("RGBA", (0, 5)), VISION)
    with pytest.raises(ValueError, match="2010 x 10 pixels is narrower than 1:200; crop it"):
        image(10, 2010)
    with pytest.raises(ValueError, match=r"min_pixels=9 must be in 1\.\.max_pixels=8"):
        image_patches(picture(9, 9), VISION, min_pixels=9, max_pixels=8)
    for wrong in (pixels(8, 8).astype(np.float32), pixels(8, 8)[..., 0], pixels(8, 8)[..., :2]):
        with pytest.raises(ValueError, match="must be uint8 of shape"):
            image_patches(wrong, VISION)


def test_bad_videos_say_what_to_do():
    for empty in ([], np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="the video has no frames: give at least one"):
            video_patches(empty, VISION, fps=1.0)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"must be positive: how many of these frames"):
            video(2, 8, 8, fps)
    with pytest.raises(ValueError, match=r"differ in size .8 x 16, 8 x 8.: resize"):
        video_patches([pixels(8, 8), pixels(16, 8)], VISION, fps=1.0)
    with pytest.raises(ValueError, match="0 x 8 pixels is empty"):
        video(2, 8, 0, 1.0)


def test_prompts_and_pictures_must_correspond(ours):
    two = [[image(16, 16), video(2, 16, 16, 1.0)]]
    ids, mask = prompt(two)
    with pytest.raises(ValueError, match=r"sample 0: the prompt has 8 image .* 1 images .* need 4"):
        mrope_positions(ids, mask, [two[0][:1]], VISION)
    with pytest.raises(ValueError, match=r"sample 0: item 0 is of kind 'video' .* order of the"):
        mrope_positions(ids, mask, [two[0][::-1]], VISION)
    with pytest.raises(ValueError, match="1 prompts, but images and videos of 2"):
        mrope_positions(ids, mask, [[], []], VISION)
    inputs = pack(two, VISION, 32)
    with pytest.raises(ValueError, match="need positions_BT3: make them by mrope_positions"):
        ours.hidden_states(ids, mask, vision=inputs)
    with pytest.raises(ValueError, match="no vision tower: build it with a VisionConfig"):
        blind = Qwen2_5_VL(TEXT, **F32, rngs=nnx.Rngs(0))
        blind.hidden_states(ids, mask, positions_BT3=np.zeros((*ids.shape, 3)), vision=inputs)
    with pytest.raises(ValueError, match="width 31, the language model's is 32"):
        Qwen2_5_VL(TEXT, dataclasses.replace(VISION, out_width=31), **F32, rngs=nnx.Rngs(0))


def test_both_namings_load_and_text_alone_ignores_the_tower(reference, ours):
    shapes = {p: x.shape for p, x in state_params(ours).items()}
    nested = {k: v.shape for k, v in parity.tensors(reference).items()}
    flat = {k.replace("language_model.", "").replace("model.visual", "visual"): s
            for k, s in nested.items()}  # fmt: skip
    assert "visual.blocks.0.attn.qkv.weight" in flat and "model.norm.weight" in flat
    for names, is_nested in ((nested, True), (flat, False)):
        found = plan(qwen_table(TEXT, nested=is_nested, vision=VISION), shapes, names)
        assert not found.ignored and len(found.entries) == len(names)
        text = {p: s for p, s in shapes.items() if not p.startswith("visual/")}
        found = plan(qwen_table(TEXT, nested=is_nested), text, names)
        assert sorted(found.ignored) == sorted(n for n in names if "visual." in n)


@pytest.mark.parametrize("cfg", [QWEN2_5_VL_7B_VISION, QWEN2_5_VL_3B_VISION], ids=["7B", "3B"])
def test_full_size_counts(cfg):
    config = Qwen2_5_VLConfig(**cfg.to_transformers()).vision_config
    with torch.device("meta"):
        model = type_of_tower()(config)
    skeleton = nnx.eval_shape(
        lambda: VisionTower(cfg, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    ours = sum(x.size for x in jax.tree.leaves(nnx.state(skeleton)))
    assert ours == sum(p.numel() for p in model.parameters())
    assert ours == {3584: 676_550_144, 2048: 668_684_288}[cfg.out_width]


def type_of_tower():
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    return modeling.Qwen2_5_VisionTransformerPretrainedModel


def test_configs_survive_the_round_trip():
    for cfg in (VISION, QWEN2_5_VL_7B_VISION, QWEN2_5_VL_3B_VISION):
        config = Qwen2_5_VLConfig(text_config=TEXT.to_transformers(), **cfg.to_transformers())
        assert VisionConfig.from_transformers(config.to_dict()) == cfg
    with pytest.raises(ValueError, match="no vision_config: this folder has no vision tower"):
        VisionConfig.from_transformers({"model_type": "qwen2_5_vl"})
    with pytest.raises(ValueError, match="lacks 'image_token_id'"):
        VisionConfig.from_transformers({"vision_config": VISION.to_transformers()["vision_config"]})
    with pytest.raises(ValueError, match="the config asks 'gelu'"):
        VisionConfig.from_transformers({"vision_config": {"hidden_act": "gelu"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(heads=3), "head dim that 4 divides"),
        (dict(heads=16), "head dim that 4 divides"),
        (dict(full_blocks=(3,)), "not among 3 layers"),
        (dict(window=7), "holds no token"),
    ],
)
def test_impossible_towers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(VISION, **change)


def test_every_parameter_of_the_tower_has_a_place_in_a_mesh(ours):
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    places = param_shardings(prefixed(state_params(ours), "mllm"), mesh)
    assert places["mllm/visual/blocks/attn/q/kernel"].spec == P(None, "fsdp", "tensor")
    assert places["mllm/visual/blocks/mlp/down_proj/kernel"].spec == P(None, "tensor", "fsdp")
    kernels = [p for p in places if p.startswith("mllm/visual/") and p.endswith("kernel")]
    assert all("fsdp" in places[p].spec for p in kernels) and len(kernels) == 10
