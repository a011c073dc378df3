"""T5 and CLIP against transformers, padded and not."""

import dataclasses
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers import CLIPTextModel, T5EncoderModel

from converters import formats
from converters.clip import clip_table
from converters.load import Imported
from converters.rules import plan
from converters.t5 import OWN, t5_table
from tests import parity
from x2jax import children, sharding
from x2jax.encoders.clip import CLIP_L, CLIP_TINY, CLIPConfig, CLIPText
from x2jax.encoders.t5 import T5_TINY, T5_XXL, T5Config, T5Encoder, position_buckets
from x2jax.encoders.t5_clip import T5ClipInputs, T5ClipTokenizer
from x2jax.flux import FLUX_TINY
from x2jax.model import make_skeleton
from x2jax.tiny import language, tokenizers
from x2jax.trees import Skeleton

F32 = dict(dtype=jnp.float32, param_dtype=jnp.float32)
# Few buckets to a small distance, so that twelve tokens reach every one of them.
SMALL_T5 = T5Config(2, 24, 3, 16, 40, 30, buckets=8, max_distance=10)
SMALL_CLIP = CLIPConfig(2, 24, 3, 40, 30, positions=12, eos_token=29)
RNG = np.random.default_rng(0)
T5_IDS = RNG.integers(2, 30, (2, 12))
T5_IDS[1, 7:] = [1, 0, 0, 0, 0]  # end, pads
CLIP_IDS = RNG.integers(3, 27, (3, 12))
CLIP_IDS[:, 0] = 27
for row, (end, pad) in enumerate([(11, 29), (6, 29), (4, 0)]):
    CLIP_IDS[row, end], CLIP_IDS[row, end + 1 :] = 29, pad


def t5_reference(cfg):
    config = transformers.T5Config(**cfg.to_transformers())
    return parity.randomise(T5EncoderModel(config))


def clip_reference(cfg):
    return parity.randomise(CLIPTextModel(transformers.CLIPTextConfig(**cfg.to_transformers())))


@pytest.mark.parametrize("masked", [False, True])
def test_t5_equals_transformers(masked):
    model, mask = t5_reference(SMALL_T5), T5_IDS > 0
    with torch.no_grad():  # biases of a size that the softmax feels beside unscaled logits
        for p in (b.layer[0].SelfAttention for b in model.encoder.block):
            p.q.weight.mul_(0.3)
    source = parity.tensors(model)
    np.testing.assert_array_equal(source.pop(OWN), source["shared.weight"])
    ours = parity.fill(
        lambda: T5Encoder(SMALL_T5, **F32, rngs=nnx.Rngs(0)), t5_table(SMALL_T5), source
    )

    def run():
        given = torch.tensor(mask, dtype=torch.long) if masked else None
        with torch.no_grad():
            return [model(torch.tensor(T5_IDS), attention_mask=given).last_hidden_state]

    mine = jax.jit(lambda m, ids, mask: m(ids, mask))(
        ours, jnp.asarray(T5_IDS), jnp.asarray(mask) if masked else None
    )
    parity.assert_every_weight_matters(model, run, [mine], tol=1e-5)


@pytest.mark.parametrize("eos", [29, 2])
def test_clip_equals_transformers(eos):
    cfg = dataclasses.replace(SMALL_CLIP, eos_token=eos)
    model = clip_reference(cfg)
    ours = parity.fill(
        lambda: CLIPText(cfg, **F32, rngs=nnx.Rngs(0)),
        clip_table(cfg, prefix=""),
        parity.tensors(model),
    )

    def run():
        with torch.no_grad():
            out = model(torch.tensor(CLIP_IDS))
        return [out.last_hidden_state, out.pooler_output]

    mine = jax.jit(lambda m, ids: m(ids))(ours, jnp.asarray(CLIP_IDS))
    # The end token is the highest id here, so both conventions find it.
    np.testing.assert_array_equal(mine.pooled_BD[1], mine.states_BSD[1, 6])
    exempt = {r".*k_proj\.bias": "it shifts all logits of a query alike"}
    parity.assert_every_weight_matters(model, run, list(mine), tol=1e-5, exempt=exempt)


def test_the_two_ends_of_clip_differ_once_there_are_higher_ids():
    """A token added behind the end token's id: the legacy convention takes it for the end."""
    ids = CLIP_IDS.copy()
    ids[:, 3] = 29
    ids[1, 5], ids[1, 6] = 28, 28
    ids[:, 8] = 28
    made = {}
    for eos in (28, 2):
        cfg = dataclasses.replace(SMALL_CLIP, eos_token=eos)
        model = clip_reference(cfg)
        ours = parity.fill(
            lambda cfg=cfg: CLIPText(cfg, **F32, rngs=nnx.Rngs(0)),
            clip_table(cfg, prefix=""),
            parity.tensors(model),
        )
        made[eos] = ours(jnp.asarray(ids)).pooled_BD
        with torch.no_grad():
            parity.assert_parity([made[eos]], [model(torch.tensor(ids)).pooler_output], 1e-5)
    assert parity.distance([made[28]], [made[2]]) > 0.1


def test_clips_pads_do_not_reach_the_pooled_vector():
    ours = CLIPText(SMALL_CLIP, **F32, rngs=nnx.Rngs(0))
    whole = ours(jnp.asarray(CLIP_IDS[1:2])).pooled_BD
    np.testing.assert_allclose(ours(jnp.asarray(CLIP_IDS[1:2, :7])).pooled_BD, whole, atol=1e-6)
    with pytest.raises(ValueError, match="13 tokens, this CLIP has 12 positions"):
        ours(jnp.zeros((1, 13), jnp.int32))


def test_every_bucket_equals_transformers():
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(512)[None] - torch.arange(512)[:, None]
    for buckets, distance in ((32, 128), (8, 10)):
        theirs = T5Attention._relative_position_bucket(
            offset, num_buckets=buckets, max_distance=distance
        )
        ours = position_buckets(512, buckets, distance)
        np.testing.assert_array_equal(ours, theirs.numpy())
        # The bucket of distance 0 "after the query" is the only one without a use.
        assert set(ours.flatten()) == set(range(buckets)) - {buckets // 2}


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_full_size_equals_transformers_tensor_for_tensor(name):
    """Names, shapes and the number of parameters of T5-XXL's encoder and CLIP-L, abstractly."""
    bf16 = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    if name == "t5":
        cfg, table = T5_XXL, t5_table(T5_XXL)
        make = lambda: T5Encoder(T5_XXL, **bf16, rngs=nnx.Rngs(0))  # noqa: E731
        config, kind = transformers.T5Config(**cfg.to_transformers()), T5EncoderModel
    else:
        cfg, table = CLIP_L, clip_table(CLIP_L, prefix="")
        make = lambda: CLIPText(CLIP_L, **bf16, rngs=nnx.Rngs(0))  # noqa: E731
        config, kind = transformers.CLIPTextConfig(**cfg.to_transformers()), CLIPTextModel
    with torch.device("meta"):
        model = kind(config)
    shapes = {p: tuple(x.shape) for p, x in Skeleton(nnx.eval_shape(make)).abstract.items()}
    theirs = {n: tuple(x.shape) for n, x in model.state_dict().items()}
    found = plan(table, shapes, theirs)
    assert set(found.ignored) <= {OWN}
    count = sum(p.numel() for p in model.parameters())
    assert sum(int(np.prod(s)) for s in shapes.values()) == count
    assert count == {"t5": 4_762_310_656, "clip": 123_060_480}[name]


def test_bfloat16_stays_near_float32_and_float16_is_refused():
    """Activations beyond float16's range, as the published XXL has them, stay finite."""
    model = t5_reference(SMALL_T5)
    with torch.no_grad():
        model.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(1e6)
    source = parity.tensors(model)
    del source[OWN]

    def build(dtype):
        return parity.fill(
            lambda: T5Encoder(SMALL_T5, dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(0)),
            t5_table(SMALL_T5),
            source,
        )

    exact = build(jnp.float32)(jnp.asarray(T5_IDS))
    rough = build(jnp.bfloat16)(jnp.asarray(T5_IDS))
    assert rough.dtype == jnp.bfloat16
    error = np.asarray(rough, np.float32) - np.asarray(exact)
    assert np.sqrt(np.square(error).mean()) < 0.05 * np.sqrt(np.square(exact).mean())
    with pytest.raises(ValueError, match="overflows in float16"):
        build(jnp.float16)


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_folders_that_transformers_writes_are_read(tmp_path, name):
    t5 = name == "t5"
    model = t5_reference(SMALL_T5) if t5 else clip_reference(SMALL_CLIP)
    model.save_pretrained(tmp_path)
    found = formats.detect(tmp_path)
    assert found.name == name
    (part,) = found.parts(found.read(tmp_path))
    read = Imported(tmp_path, part.table, part.shapes)
    path = "shared/embedding" if t5 else "position_embedding/embedding"
    weight = model.shared.weight if t5 else model.embeddings.position_embedding.weight
    np.testing.assert_array_equal(read(path), weight.detach().numpy())
    assert set(read.specs) == set(part.shapes)
    sharding.param_shardings(
        {f"{name}/{p}": jax.ShapeDtypeStruct(s, np.float32) for p, s in part.shapes.items()},
        sharding.make_mesh({"fsdp": -1}),
    )


def test_a_flux_folder_conditions_as_transformers_does(tmp_path):
    """From the public layout, through the registry of children, to what conditions FLUX."""
    t5, clip = t5_reference(SMALL_T5), clip_reference(SMALL_CLIP)
    t5.save_pretrained(tmp_path / "text_encoder_2")
    clip.save_pretrained(tmp_path / "text_encoder")
    found = children.find_sources({"flux": str(tmp_path)}, ("t5", "clip"))
    configs = children.configs_of(found)
    assert configs == {"t5": SMALL_T5, "clip": SMALL_CLIP}
    skeleton = make_skeleton(configs, children.Precision("float32", "float32"))
    by_path = sharding.param_shardings(skeleton.abstract, sharding.make_mesh({"fsdp": -1}))
    params = {}
    for name in found:
        params |= children.load_child(skeleton, found, name, by_path)
    made = skeleton.merge(params).condition(T5ClipInputs(jnp.asarray(T5_IDS), CLIP_IDS))
    with torch.no_grad():
        txt = t5(torch.tensor(T5_IDS)).last_hidden_state
        pooled = clip(torch.tensor(CLIP_IDS)).pooler_output
    parity.assert_parity(list(made), [txt, pooled], 1e-5)
    flux = dataclasses.replace(FLUX_TINY, text_width=SMALL_T5.width)
    with pytest.raises(ValueError, match="the clip in there is 24 wide, this FLUX needs 64"):
        children.check_fit({"flux": flux, **configs}, {"t5": "here", "clip": "there"})


PROMPTS = [
    "A small dotted red cross at the top and a medium blue star at the left on a meadow.",
    "右上角有一个大的粉色光亮星星，背景是星空。",
    "",
    "Größe ☃",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("flux")
    texts = language.sentences(0, 400)
    tokenizers.make_t5(texts, root / "tokenizer_2")
    tokenizers.make_clip(texts, root / "tokenizer")
    return root


@pytest.mark.parametrize("length", [64, 12])
def test_tokens_equal_what_diffusers_makes(folder, length):
    """The call of diffusers' FluxPipeline, with the tokenizer classes that its folders name."""
    ours = T5ClipTokenizer(folder, length, length)
    made = pickle.loads(pickle.dumps(ours))(PROMPTS)
    pairs = (
        (transformers.T5TokenizerFast, "tokenizer_2", made.t5_ids_BT),
        (transformers.CLIPTokenizer, "tokenizer", made.clip_ids_BS),
    )
    for kind, name, ids in pairs:
        tokenizer = kind.from_pretrained(folder / name)
        theirs = tokenizer(PROMPTS, padding="max_length", max_length=length, truncation=True)
        np.testing.assert_array_equal(ids, theirs["input_ids"])
        assert ids.dtype == np.int32
    ours(PROMPTS)
    assert all((n > 0) == (length == 12) for n in ours.truncated.values())


def test_clips_vocabulary_is_laid_out_as_the_published_one(folder):
    """Start and end have the highest ids, so that the legacy convention finds the end."""
    ids = T5ClipTokenizer(folder, 64).__call__(PROMPTS).clip_ids_BS
    assert ids.shape == (4, 77)
    assert (ids[:, 0] == CLIP_TINY.vocab - 2).all()
    assert (ids.max(axis=1) == CLIP_TINY.vocab - 1).all() and (ids[:, -1] == ids.max()).all()


def test_bad_tokenizer_folders_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer_2 is missing: T5 needs the whole"):
        T5ClipTokenizer(tmp_path)
    shutil.copytree(folder, tmp_path / "flux")
    (tmp_path / "flux" / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        T5ClipTokenizer(tmp_path / "flux")
    (tmp_path / "flux" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"holds tokenizer_config\.json, and needs"):
        T5ClipTokenizer(tmp_path / "flux")
    with pytest.raises(ValueError, match="1 T5 and 77 CLIP tokens hold no text"):
        T5ClipTokenizer(folder, 1)


def test_configs_survive_the_round_trip():
    for cfg in (SMALL_T5, T5_TINY, T5_XXL):
        config = transformers.T5Config(**cfg.to_transformers()).to_dict()
        assert T5Config.from_transformers(config) == cfg
    for cfg in (SMALL_CLIP, CLIP_TINY, CLIP_L):
        config = transformers.CLIPTextConfig(**cfg.to_transformers()).to_dict()
        assert CLIPConfig.from_transformers(config) == cfg
    with pytest.raises(ValueError, match="found 'umt5'"):
        T5Config.from_transformers({"model_type": "umt5"})
    with pytest.raises(ValueError, match="asks 'relu'"):
        T5Config.from_transformers({"model_type": "t5", "feed_forward_proj": "relu"})
    with pytest.raises(ValueError, match="lacks 'num_layers'"):
        T5Config.from_transformers({"model_type": "t5", "feed_forward_proj": "gated-gelu"})
    with pytest.raises(ValueError, match="asks 'gelu'"):
        CLIPConfig.from_transformers({"model_type": "clip_text_model", "hidden_act": "gelu"})
