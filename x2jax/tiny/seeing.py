"""The tiny family with its vision tower in the way of FLUX: weights, pictures, and the flow loss.

What `x2jax.tiny.vision` trains and measures with. The gradient enters the language model here; in
`Model.condition` none does.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters.load import load
from converters.qwen2_5_vl import qwen_table
from x2jax.alignnet import Condition
from x2jax.children import MLLMConfig, Precision, configs_of, find_sources, load_child
from x2jax.conditioning import Conditioner, MessageInputs
from x2jax.encoders.qwen2_5_vl import QWEN_TINY, QWEN_TINY_VISION, VisionTower
from x2jax.encoders.tokenize import TextInputs
from x2jax.model import Model, make_skeleton
from x2jax.sharding import make_mesh, param_shardings
from x2jax.tiny import base, captioned, world
from x2jax.tiny.captioned import EDGE, TEXT
from x2jax.trees import Params, Skeleton, child, prefixed, state_params

NAMES = ("flux", "vae", "mllm", "alignnet")
TOWER, EMBEDDING, AROUND = "mllm/visual/", "mllm/embed_tokens/embedding", "around"
ROWS = EDGE // QWEN_TINY_VISION.factor
FIRST = QWEN_TINY_VISION.image_token - 2
"""Id of the token before a picture; the one behind it follows."""


class Seen(NamedTuple):
    """Pictures of scenes, host arrays.

    Attributes:
      scenes, pixels: what is drawn.
      mean, logvar: posterior moments.
      messages: a turn of the user with the picture alone.
    """

    scenes: list[world.Scene]
    pixels: np.ndarray
    mean: np.ndarray
    logvar: np.ndarray
    messages: MessageInputs

    def rows(self, rows: Any) -> tuple[Any, Any, MessageInputs]:
        """Moments of some pictures, and their messages: a batch of `flow_loss`."""
        return self.mean[rows], self.logvar[rows], take(self.messages, rows)


def take(tree: Any, rows: Any) -> Any:
    """Some rows of every array."""
    return jax.tree.map(lambda x: x[rows], tree)


def open_model(root: Path, fresh: bool, seed: int = 0) -> tuple[Skeleton, Params, Params]:
    """(skeleton, frozen weights, the tower's and the two embeddings'); `fresh` initialises them."""
    options = {"flux": str(root / "flux"), "mllm": str(root / "qwen")}
    options["alignnet"] = str(root / "alignnet")
    found = find_sources(options, NAMES, vision=not fresh)
    configs = configs_of(found) | {"mllm": MLLMConfig(QWEN_TINY, QWEN_TINY_VISION)}
    skeleton = make_skeleton(configs, Precision("float32", "float32"))
    by_path = param_shardings(skeleton.abstract, make_mesh({"fsdp": 1}, jax.devices()[:1]))
    params: Params = {}
    for name in NAMES:
        if name == "mllm" and fresh:
            abstract = child(skeleton.abstract, "mllm")
            text = {p: x for p, x in abstract.items() if not p.startswith("visual/")}
            params |= prefixed(load(root / "qwen", qwen_table(QWEN_TINY), text), "mllm")
        else:
            params |= load_child(skeleton, found, name, by_path)
    if fresh:
        params |= prefixed(fresh_tower(seed), TOWER.strip("/"))
    trained = {p: x for p, x in params.items() if p.startswith(TOWER)}
    trained[AROUND] = params[EMBEDDING][FIRST : FIRST + 2]
    return skeleton, {p: x for p, x in params.items() if p not in trained}, trained


def fresh_tower(seed: int) -> Params:
    """Both frames of a patch weigh the same, and stay so: a token of a video is of their mean."""
    kw = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    params = state_params(VisionTower(QWEN_TINY_VISION, rngs=nnx.Rngs(seed), **kw))
    kernel = params["patch_embed/kernel"]
    frames = kernel.reshape(QWEN_TINY_VISION.channels, QWEN_TINY_VISION.temporal_patch, -1)
    same = jnp.broadcast_to(frames[:, :1], frames.shape)
    # As long as words are, or the language model sees nothing else.
    small = {"merger/mlp_out/kernel": 0.1 * params["merger/mlp_out/kernel"]}
    return params | small | {"patch_embed/kernel": same.reshape(kernel.shape)}


def whole(frozen: Params, trained: Params) -> Params:
    """All weights, the two embeddings in their rows."""
    rows = frozen[EMBEDDING].at[FIRST : FIRST + 2].set(trained[AROUND])
    return frozen | {p: x for p, x in trained.items() if p != AROUND} | {EMBEDDING: rows}


def scenes(seed: int, count: int) -> tuple[list[world.Scene], np.ndarray]:
    """Scenes, and their pictures."""
    rng = np.random.default_rng(seed)
    drawn = [world.sample_scene(rng) for _ in range(count)]
    return drawn, np.stack([world.render(s, (EDGE, EDGE)) for s in drawn])


def see(root: Path, skeleton: Skeleton, weights: Params, seed: int, count: int) -> Seen:
    """Scenes of one seed, drawn and encoded."""
    drawn, pixels = scenes(seed, count)
    encoded = captioned.encoded(skeleton, weights, pixels, None)
    return Seen(drawn, pixels, encoded.mean, encoded.logvar, messages(root, list(pixels)))


def messages(root: Path, pictures: list[Any]) -> MessageInputs:
    """Messages that are one picture each."""
    conditioner = Conditioner(root / "qwen", QWEN_TINY_VISION, length=TEXT, images=1, edge=EDGE)
    return conditioner(
        [[{"role": "user", "content": [{"type": "image", "image": p}]}] for p in pictures]
    )


def condition(model: Model, inputs: TextInputs | MessageInputs) -> Condition:
    """As `Model.condition`, but the gradient enters the language model."""
    more: Any = {}
    if isinstance(inputs, MessageInputs):
        more = dict(positions_BT3=inputs.positions_BT3, vision=inputs.vision)
    states = model.mllm.hidden_states(inputs.ids_BT, inputs.mask_BT, **more)
    return model.alignnet(states)


def flow_loss(skeleton: Skeleton, mean: float = 0.0, teach: float = 0.0):
    """Function: flow loss of pictures under messages, as `x2jax.tiny.base.make_loss` has it.

    Args:
      mean: of the logit-normal u.
      teach: weight of the squared distance to what FLUX makes of the captions, that come fourth in
        a batch. It tells of the same picture without the noise that the target has.
    """

    def loss(params, batch, key):
        model: Model = skeleton.merge(params)
        moments, logvar, text = batch[:3]
        x = base.noised(model, moments, logvar, key, mean)

        def velocity(text):
            txt, pooled = condition(model, text)
            return model.flux(x.stream, txt, pooled, x.sigma, x.guidance).velocity_BIC

        found = velocity(text)
        total = jnp.square(found - x.target).mean()
        if teach:
            told = jax.lax.stop_gradient(velocity(batch[3]))
            total += teach * jnp.square(found - told).mean()
        return total

    return loss
