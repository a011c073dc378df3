"""Conversations with pictures, video and answers to conditions, on a tiny random MLLM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from transformers import AutoTokenizer

from x2jax import sources
from x2jax.alignnet import AlignNet, AlignNetConfig
from x2jax.children import MLLMConfig, Precision
from x2jax.conditioning import Conditioner
from x2jax.encoders.generate import generate
from x2jax.encoders.qwen2_5_vl import (
    QWEN2_5_VL_7B_VISION,
    QwenConfig,
    VisionConfig,
    mrope_positions,
    pack,
    video_patches,
)
from x2jax.encoders.qwen2_5_vl.preprocess import image_patches
from x2jax.model import Model

TEMPLATE = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # noqa: E501
"""Qwen2.5-VL's, but for its names of keys that are not used here."""
LENGTH, EDGE = 96, 16


def picture(height=20, width=30, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def user(*items):
    return [{"role": "user", "content": list(items)}]


def text(words):
    return {"type": "text", "text": words}


def image(source):
    return {"type": "image", "image": source}


VIDEO = {"type": "video", "video": [picture(seed=s) for s in range(3)], "fps": 1.5}
CASES = {
    "text": "draw a red circle",
    "an image": user(image(picture())),
    "image and text": user(image(picture()), text("as a drawing")),
    "several images": user(image(picture()), text("and"), image(picture(31, 9, 1)), text("mixed")),
    "video": user(VIDEO, text("its last moment")),
    "dialogue": [
        {"role": "system", "content": "You draw."},
        *user(image(picture()), text("what is it?")),
        {"role": "assistant", "content": "a cat"},
        *user(text("draw it from behind")),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny family's tokenizer with Qwen2.5-VL's placeholders and chat template."""
    root = tmp_path_factory.mktemp("qwen")
    tokenizer = AutoTokenizer.from_pretrained(sources.TINY / "qwen", local_files_only=True)
    names = [f"<|{n}|>" for n in ("vision_start", "image_pad", "video_pad", "vision_end")]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def vision(folder):
    ids = AutoTokenizer.from_pretrained(folder, local_files_only=True).convert_tokens_to_ids
    tokens = dict(image_token=ids("<|image_pad|>"), video_token=ids("<|video_pad|>"))
    assert tokens["image_token"] != tokens["video_token"]
    return VisionConfig(2, 32, 2, 24, 32, (1,), patch=4, window=16, **tokens)


@pytest.fixture(scope="module")
def conditioner(folder, vision):
    return Conditioner(folder, vision, length=LENGTH, images=2, edge=EDGE)


@pytest.fixture(scope="module")
def model(vision):
    text_cfg = QwenConfig(2, 32, 4, 2, 48, 1040, True, (1, 1, 2))
    configs = {
        "mllm": MLLMConfig(text_cfg, vision),
        "alignnet": AlignNetConfig(3, 32, 20, 6),
    }
    return Model(configs, Precision("float32", "float32"), nnx.Rngs(0))


@jax.jit
def condition(model, inputs):
    return model.condition(inputs)


def test_one_program_conditions_on_everything(conditioner, model):
    """And each sample is as it would be alone, in another place of the batch."""
    inputs = conditioner(list(CASES.values()))
    assert jax.tree.map(lambda x: x.shape[0], inputs) == jax.tree.map(lambda _: len(CASES), inputs)
    together = condition(model, inputs)
    assert together.txt_BTD.shape == (len(CASES), LENGTH, 20)
    back = condition(model, conditioner(list(CASES.values())[::-1]))
    assert condition._cache_size() == 1
    np.testing.assert_allclose(back.txt_BTD[::-1], together.txt_BTD, atol=1e-5)
    np.testing.assert_allclose(back.pooled_BP[::-1], together.pooled_BP, atol=1e-5)
    assert len(np.unique(np.round(together.pooled_BP, 4), axis=0)) == len(CASES)


def expected_ids(tokenizer, conversation, tokens):
    """As transformers' processor makes them: placeholders repeated in the rendered text."""
    if isinstance(conversation, str):
        conversation = user(text(conversation))
    shown = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    for name, count in tokens:
        shown = shown.replace(f"<|{name}_pad|>", "<|hold|>" * count, 1)
    for name in ("image", "video"):
        if any(n == name for n, _ in tokens):
            shown = shown.replace("<|hold|>", f"<|{name}_pad|>")
    return tokenizer(shown, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_what_the_published_preprocessing_gives(case, folder, vision, conditioner):
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    conversation, size = CASES[case], (EDGE, EDGE)
    items = [i for m in conversation for i in m["content"]] if case != "text" else []
    media = [
        image_patches(i["image"], vision, size=size)
        if i["type"] == "image"
        else video_patches(i["video"], vision, fps=i["fps"], size=size)
        for i in items
        if isinstance(i, dict) and i["type"] != "text"
    ]
    for m in media:
        assert m.grid[1:] == (4, 4) and m.grid[0] == (2 if m.kind == "video" else 1)
    ids = expected_ids(tokenizer, conversation, [(m.kind, vision.tokens(m.grid)) for m in media])
    found = conditioner([conversation])
    assert found.ids_BT[0, found.mask_BT[0]].tolist() == ids
    assert not found.mask_BT[0, : LENGTH - len(ids)].any(), "left-padded"
    positions, deltas = mrope_positions(found.ids_BT, found.mask_BT, [media], vision)
    np.testing.assert_array_equal(found.positions_BT3, positions)
    np.testing.assert_array_equal(found.deltas_B, deltas)
    jax.tree.map(np.testing.assert_array_equal, found.vision, pack([media], vision, 32))


def test_files_are_read_as_what_they_hold(conditioner, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    one = conditioner([CASES["image and text"]])
    two = conditioner([user(image(str(tmp_path / "a.png")), text("as a drawing"))])
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_images_come_at_the_sizes_of_the_paper(folder):
    for edge, side in ((128, 10), (256, 18)):
        found = Conditioner(folder, QWEN2_5_VL_7B_VISION, images=3, edge=edge)
        assert found.patches == 3 * side**2, "140 and 252 pixels: whole tokens"


def test_the_program_of_text_alone_has_no_tower(folder, vision, model):
    inputs = Conditioner(folder, vision, length=LENGTH, images=0)(["a dog"])
    assert inputs.vision is None and inputs.positions_BT3 is None
    plain = Conditioner(folder, length=LENGTH)(["a dog"])
    jax.tree.map(np.testing.assert_array_equal, inputs, plain)
    seeing = Conditioner(folder, vision, length=LENGTH, images=1, edge=EDGE)(["a dog"])
    a, b = condition(model, inputs), condition(model, seeing)
    np.testing.assert_allclose(a.txt_BTD[:, -20:], b.txt_BTD[:, -20:], atol=1e-5)


def test_answers_condition_by_the_states_that_generating_them_has(folder, vision, model):
    """Reasoning: those of the answer. Dialogue: those of the question, then of the answer."""
    talk = [CASES["image and text"]]
    loose = Conditioner(folder, vision, length=LENGTH, images=2, edge=EDGE)
    tight = Conditioner(folder, vision, length=int(loose(talk).mask_BT.sum()), images=2, edge=EDGE)
    count = 6
    (answer,) = tight.answer(model.mllm, talk, count=count)
    assert loose.answer(model.mllm, talk, count=count) == [answer] and len(answer) == count
    assert isinstance(tight.text(answer), str)

    x = tight(talk)
    more = dict(positions_BT3=x.positions_BT3, vision=x.vision)
    out = generate(
        model.mllm, x.ids_BT, x.mask_BT, count=count, eos=(), deltas_B=x.deltas_B, **more
    )
    assert out.tokens_BG[0].tolist() == answer
    prompt = model.mllm.hidden_states(x.ids_BT, x.mask_BT, **more)
    reasoning = model.alignnet(out.states_NBGD)
    dialogue = model.alignnet(jnp.concatenate([prompt, out.states_NBGD], axis=2))
    for states, expected in (("answer", reasoning), ("all", dialogue)):
        found = condition(model, tight.answered(talk, [answer], states, count=count))
        np.testing.assert_allclose(found.txt_BTD, expected.txt_BTD, atol=2e-5)
        np.testing.assert_allclose(found.pooled_BP, expected.pooled_BP, atol=2e-5)
    # With room to spare the answer stands last, and pads before it where a text has its pads.
    padded = loose.answered(talk, [answer[:4]], count=count)
    assert (padded.select_Bt[0, :2] == 0).all() and not padded.mask_BT[0, 0]
    places = padded.select_Bt[0, 2:]
    assert padded.ids_BT[0, places].tolist() == answer[:4] and padded.mask_BT[0, places].all()


def test_the_gradient_through_chosen_states_is_exact(conditioner, model):
    inputs = conditioner.answered(["a dog"], [[5, 6, 7]], count=5)
    graph, weights = nnx.split(model.alignnet)

    def stacked(weights):
        states = model.mllm.hidden_states(
            inputs.ids_BT, inputs.mask_BT, positions_BT3=inputs.positions_BT3, vision=inputs.vision
        )
        chosen = jnp.take_along_axis(states, inputs.select_Bt[None, ..., None], axis=2)
        return jnp.sin(nnx.merge(graph, weights)(chosen).txt_BTD).sum()

    def summed(weights):
        align: AlignNet = nnx.merge(graph, weights)
        more = inputs._asdict()
        more.pop("deltas_B")
        return jnp.sin(align.condition(model.mllm, **more).txt_BTD).sum()

    a, b = jax.jit(jax.grad(stacked))(weights), jax.jit(jax.grad(summed))(weights)
    kernel, ours = a.conv.kernel[...], b.conv.kernel[...]
    assert jnp.abs(kernel).max() > 1e-2
    np.testing.assert_allclose(ours, kernel, atol=1e-5 * float(jnp.abs(kernel).max()))


def test_the_record_tells_templates_apart(folder, conditioner, tmp_path):
    other = Conditioner(folder, length=LENGTH)
    assert other.record["tokenizer"] == conditioner.record["tokenizer"]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.chat_template = TEMPLATE.replace("helpful", "terse")
    tokenizer.save_pretrained(tmp_path)
    changed = Conditioner(tmp_path, length=LENGTH).record
    assert changed["tokenizer"] != other.record["tokenizer"]
    assert {k: v for k, v in changed.items() if k != "tokenizer"} == {
        k: v for k, v in other.record.items() if k != "tokenizer"
    }


def bad(tmp_path):
    """Conversations that cannot be used, and what is said of them."""
    empty, junk = tmp_path / "empty.png", tmp_path / "junk.png"
    empty.write_bytes(b"")
    junk.write_bytes(b"no picture")
    cut = tmp_path / "cut.png"
    Image.fromarray(picture(64, 64)).save(cut)
    cut.write_bytes(cut.read_bytes()[:-2000])
    many = [image(picture(seed=s)) for s in range(3)]
    return {
        r"an empty conversation": [],
        r"message 0 has role 'human': use one of system, user": [{"role": "human", "content": "x"}],
        r"message 0 has no content": [{"role": "user", "content": []}],
        r"an item of type 'audio' with keys \['audio', 'type'\]: use": user(
            {"type": "audio", "audio": "a.wav"}
        ),
        r"an item of type 'image' with keys \['type', 'url'\]": user({"type": "image", "url": "u"}),
        r"\d+ tokens, 0 of them of images .* budget is 96: shorten": "word " * 200,
        r"have 48 patches, the budget is 32 \(2 images of 16 px\): send fewer": user(*many),
        r"its text holds <\|image_pad\|>, which stands for images": "a <|image_pad|>",
        r"no picture file .*nowhere": user(image(str(tmp_path / "nowhere.png"))),
        r"empty.png is empty \(0 bytes\)": user(image(str(empty))),
        r"junk.png is no picture that PIL can read": user(image(str(junk))),
        r"cannot read the picture .*cut.png": user(image(str(cut))),
        r"an image of 0 x 5 pixels is empty": user(image(picture(5, 0))),
        r"frames of a video need their rate": user({"type": "video", "video": [picture()]}),
        r"the video has no frames": user({"type": "video", "video": [], "fps": 1.0}),
    }


def test_bad_conversations_say_what_to_do(conditioner, tmp_path):
    for message, conversation in bad(tmp_path).items():
        with pytest.raises((ValueError, FileNotFoundError), match="sample 1: .*" + message):
            conditioner(["fine", conversation])


def test_models_and_templates_without_vision_are_named(folder, vision, tmp_path):
    with pytest.raises(ValueError, match=r"images or videos, but .* without a vision tower"):
        Conditioner(folder)([CASES["an image"]])
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # As the tiny family's before it had a tower: strings only.
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    blind = Conditioner(tmp_path, vision, edge=EDGE)
    assert blind(["text"]).mask_BT.any()
    with pytest.raises(ValueError, match=r"cannot render this conversation .TypeError"):
        blind([CASES["an image"]])
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="leaves out 1 of 1 images and videos: take the folder"):
        Conditioner(tmp_path, vision, edge=EDGE)([CASES["an image"]])
    with pytest.raises(ValueError, match="no tokenizer could be loaded from"):
        Conditioner(tmp_path / "nowhere")


def test_answers_must_fit(conditioner):
    for answer in ([], [1] * 5):
        with pytest.raises(ValueError, match=rf"sample 0: an answer of {len(answer)} tokens"):
            conditioner.answered(["a dog"], [answer], count=4)
