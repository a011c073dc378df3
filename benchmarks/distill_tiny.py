"""X2I's headline in miniature: does FLUX predict as well under AlignNet as under T5 + CLIP?

    python -m benchmarks.distill_tiny --workdir RUNS                      # 3 seeds
    python -m benchmarks.distill_tiny --workdir RUNS --seeds 1 --steps 200

Distils a fresh AlignNet on the tiny family with configs/alignnet.py, then prints the flow-matching
loss of pictures whose captions it has not seen, at the same noise and timesteps: under the teacher,
under the distilled AlignNet, and for scale under shuffled captions and under an untrained AlignNet.
Teacher and student pictures from the same noise lie in RUNS/SEED/samples.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.alignnet import get_config
from x2jax import flow, recipes, sharding, train
from x2jax.data.caption_index import hash_of
from x2jax.flux.latents import patchify
from x2jax.recipes.alignnet import Distil
from x2jax.tiny import captions, world
from x2jax.trees import Params

BATCH = 32


class Pictures(NamedTuple):
    """Pictures with captions, noise and timesteps; n of them.

    Attributes: uint8 (n, H, W, 3); texts; sigmas (n,).
    """

    pixels: np.ndarray
    texts: list[str]
    sigma: np.ndarray


def unseen(recipe: Distil, count: int) -> Pictures:
    """Pictures of the tiny world whose captions are not among those trained on."""
    known = set(recipe.data.index.entries["hash"].tolist())
    rng = np.random.default_rng(12345)
    pixels, texts = [], []
    while len(texts) < count:
        scene = world.sample_scene(rng)
        text = captions.caption(scene, rng, "en")
        if hash_of(text) not in known:
            texts.append(text)
            pixels.append(world.render(scene, (recipe.objective.size,) * 2))
    sigma = rng.permutation((np.arange(count) + 0.5) / count).astype(np.float32)
    return Pictures(np.stack(pixels), texts, sigma)


def flow_losses(recipe: Distil, params: Params, frozen: Params, given: Pictures) -> dict[str, Any]:
    """Mean flow-matching loss by condition, at noise that depends on the picture alone."""

    @jax.jit
    def batch(params, frozen, pixels, sigma_B, teacher, student, key):
        model = recipe.skeleton.merge(params, frozen)
        mean, _ = model.vae.encode(pixels.astype(jnp.float32) / 127.5 - 1)
        x0 = patchify(model.vae.normalise(mean)).reshape(len(pixels), recipe.rows**2, -1)
        noise = jax.random.normal(key, x0.shape)
        x_t = flow.noised(x0, noise, sigma_B)
        scale = jnp.full(len(pixels), recipe.objective.guidance)

        def loss(text):
            v = model.flux(recipe.stream(x_t), *text, sigma_B, scale).velocity_BIC
            return jnp.square(v - (noise - x0)).mean()

        # The text of the next picture: another caption of the same distribution.
        shuffle = lambda text: jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), text)  # noqa: E731
        by_teacher, by_student = model.condition(teacher), model.condition(student)
        return {
            "teacher": loss(by_teacher),
            "student": loss(by_student),
            "teacher, shuffled": loss(shuffle(by_teacher)),
            "student, shuffled": loss(shuffle(by_student)),
        }

    sums: dict[str, float] = {}
    starts = range(0, len(given.texts), BATCH)
    for start in starts:
        rows = slice(start, start + BATCH)
        inputs = recipe.data.tokenize(given.texts[rows])
        found = batch(
            params, frozen, given.pixels[rows], given.sigma[rows], *inputs, jax.random.key(start)
        )
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + float(value) / len(starts)
    return sums


def run(seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Distils with one seed; returns losses by condition."""
    config = get_config().unlock()
    config.seed = seed
    if args.family:
        config.flux, config.mllm = f"{args.family}/flux", f"{args.family}/qwen"
    if args.steps:
        config.steps = args.steps
        config.checkpoint_every = config.sample_every = args.steps
    workdir = Path(args.workdir) / str(seed)
    params = train.train(config.lock(), workdir)
    recipe = recipes.build(config, workdir)
    assert isinstance(recipe, Distil)
    mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
    by_path = sharding.param_shardings(recipe.skeleton.abstract, mesh)
    frozen = recipe.load_frozen(by_path)
    given = unseen(recipe, args.pictures)
    found = flow_losses(recipe, jax.device_get(params), frozen, given)
    found["untrained"] = flow_losses(recipe, recipe.initial(seed, by_path), frozen, given)[
        "student"
    ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="holds one run a seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="of training; default the config's")
    parser.add_argument("--family", help="folder of flux/ and qwen/; default the embedded family")
    parser.add_argument("--pictures", type=int, default=1024)
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        rows.append(run(seed, args))
        print(f"seed {seed}:", {k: round(v, 5) for k, v in rows[-1].items()}, flush=True)
    print(f"flow-matching loss of {args.pictures} pictures with unseen captions")
    print(f"  {'condition':20}" + "".join(f"   seed {k}" for k in range(len(rows))) + "  / teacher")
    for name in rows[0]:
        values = [row[name] for row in rows]
        ratios = [row[name] / row["teacher"] - 1 for row in rows]
        print(
            f"  {name:20}"
            + "".join(f" {v:8.5f}" for v in values)
            + f"   {np.mean(ratios):+8.2%} (worst {max(ratios, key=abs):+.2%})"
        )


if __name__ == "__main__":
    main()
