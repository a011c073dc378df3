"""Conversations with pictures, video and answers to conditions, by the MLLM that ships."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from transformers import AutoTokenizer

from x2jax import sharding, sources
from x2jax.alignnet import AlignNet
from x2jax.children import Precision, configs_of, find_sources, load_child
from x2jax.conditioning import Conditioner
from x2jax.encoders.generate import generate
from x2jax.encoders.qwen2_5_vl import (
    QWEN2_5_VL_7B_VISION,
    VisionConfig,
    mrope_positions,
    pack,
    video_patches,
)
from x2jax.encoders.qwen2_5_vl.preprocess import image_patches
from x2jax.model import make_skeleton
from x2jax.tiny import world

TEMPLATE = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # noqa: E501
"""Qwen2.5-VL's, but for its names of keys that are not used here."""
LENGTH, EDGE, ROWS = 96, 64, 8


def picture(height=50, width=70, seed=0):
    return world.render(world.sample_scene(np.random.default_rng(seed)), (width, height))


def moving(frames):
    """A scene, nearer in every frame."""
    scene = world.sample_scene(np.random.default_rng(9))
    return [world.render(scene.replace(zoom=1 + k / 4), (64, 48)) for k in range(frames)]


def user(*items):
    return [{"role": "user", "content": list(items)}]


def text(words):
    return {"type": "text", "text": words}


def image(source):
    return {"type": "image", "image": source}


VIDEO = {"type": "video", "video": moving(3), "fps": 1.5}
CASES = {
    "text": "draw a red circle",
    "an image": user(image(picture())),
    "image and text": user(image(picture()), text("as a drawing")),
    "several images": user(image(picture()), text("and"), image(picture(62, 20, 1)), text("mixed")),
    "video": user(VIDEO, text("its last moment")),
    "dialogue": [
        {"role": "system", "content": "You draw."},
        *user(image(picture()), text("what is it?")),
        {"role": "assistant", "content": "a cat"},
        *user(text("draw it from behind")),
    ],
}


@pytest.fixture(scope="module")
def folder():
    return sources.TINY / "qwen"


@pytest.fixture(scope="module")
def vision(folder):
    found = VisionConfig.from_transformers(sources.read_config(folder))
    assert found.image_token != found.video_token
    return found


@pytest.fixture(scope="module")
def conditioner(folder, vision):
    return Conditioner(folder, vision, length=LENGTH, images=2, edge=EDGE)


@pytest.fixture(scope="module")
def model():
    names = ("mllm", "alignnet")
    found = find_sources(dict.fromkeys(names, "tiny"), names, vision=True)
    skeleton = make_skeleton(configs_of(found), Precision("float32", "float32"))
    mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
    by_path = sharding.param_shardings(skeleton.abstract, mesh)
    mllm, alignnet = (load_child(skeleton, found, name, by_path) for name in names)
    return skeleton.merge(mllm | alignnet)


@jax.jit
def condition(model, inputs):
    return model.condition(inputs)


def test_one_program_conditions_on_everything(conditioner, model):
    """And each sample is as it would be alone, in another place of the batch."""
    inputs = conditioner(list(CASES.values()))
    assert jax.tree.map(lambda x: x.shape[0], inputs) == jax.tree.map(lambda _: len(CASES), inputs)
    together = condition(model, inputs)
    assert together.txt_BTD.shape == (len(CASES), LENGTH, model.alignnet.cfg.text_width)
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
        assert m.grid[1:] == (ROWS, ROWS) and m.grid[0] == (2 if m.kind == "video" else 1)
    ids = expected_ids(tokenizer, conversation, [(m.kind, vision.tokens(m.grid)) for m in media])
    found = conditioner([conversation])
    assert found.ids_BT[0, found.mask_BT[0]].tolist() == ids
    assert not found.mask_BT[0, : LENGTH - len(ids)].any(), "left-padded"
    positions, deltas = mrope_positions(found.ids_BT, found.mask_BT, [media], vision)
    np.testing.assert_array_equal(found.positions_BT3, positions)
    np.testing.assert_array_equal(found.deltas_B, deltas)
    jax.tree.map(np.testing.assert_array_equal, found.vision, pack([media], vision, 2 * ROWS**2))


def test_files_are_read_as_what_they_hold(conditioner, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    one = conditioner([CASES["image and text"]])
    two = conditioner([user(image(str(tmp_path / "a.png")), text("as a drawing"))])
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_pictures_and_a_video_from_files_condition(conditioner, model, tmp_path):
    """What the tower sees decides: another file under the same words is another condition."""
    av = pytest.importorskip("av", reason="pip install 'x2jax[video]'; make test does")
    for name, frames in (("forth", moving(8)), ("back", moving(8)[::-1])):
        with av.open(str(tmp_path / f"{name}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=4)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    for seed in range(2):
        Image.fromarray(picture(seed=seed)).save(tmp_path / f"{seed}.png")

    def shown(name):
        kind = "video" if name.endswith("mkv") else "image"
        return user({"type": kind, kind: str(tmp_path / name)}, text("draw this"))

    names = ["0.png", "1.png", "forth.mkv", "back.mkv"]
    inputs = conditioner([shown(n) for n in names] * 2)
    assert (inputs.vision.frames_BP.max(axis=1)[:4] == [1, 1, 2, 2]).all()
    np.testing.assert_array_equal(inputs.ids_BT[2], inputs.ids_BT[3])
    found = condition(model, inputs)
    np.testing.assert_allclose(found.pooled_BP[4:], found.pooled_BP[:4], atol=1e-5)
    apart = np.abs(found.pooled_BP[:4, None] - found.pooled_BP[None, :4]).max(axis=-1)
    assert apart[~np.eye(4, dtype=bool)].min() > 1e-3


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
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(cut)
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
        r"have 192 patches, the budget is 128 \(2 images of 64 px\): send fewer": user(*many),
        r"its text holds <\|image_pad\|>, which stands for images": "a <|image_pad|>",
        r"no picture file .*nowhere": user(image(str(tmp_path / "nowhere.png"))),
        r"empty.png is empty \(0 bytes\)": user(image(str(empty))),
        r"junk.png is no picture that PIL can read": user(image(str(junk))),
        r"cannot read the picture .*cut.png": user(image(str(cut))),
        r"an image of 0 x 5 pixels is empty": user(image(np.zeros((5, 0, 3), np.uint8))),
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
