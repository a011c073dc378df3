"""The mesh, and one rule table: path -> logical axes -> mesh axes.

Axes: `data` replicates parameters, `fsdp` shards them and the batch, `tensor` splits heads and MLP,
`expert` splits experts. Every parameter must match a rule; the first that matches decides.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from x2jax.trees import Params

AXES = ("data", "fsdp", "tensor", "expert")
BATCH = ("data", "fsdp")

LOGICAL = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": "expert",
    "rank": None,
    None: None,
}

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # MoE-LoRA
    (r"adapter/task_table/embedding", (None, "embed")),
    (r"adapter/.*/down", ("layers", "embed", "expert", "rank")),
    (r"adapter/.*/up", ("layers", "expert", "rank", "embed")),
    (r"adapter/.*/gate_(x|task)", ("layers", "embed", None)),
    # LightControl
    (r"control/nets/time_in/.*/kernel", ("layers", None, None)),
    (r"control/nets/.*time_emb_proj/kernel", ("layers", None, None)),
    (r"control/nets/.*/kernel", ("layers", None, None, None, "embed")),
    (r"control/.*", ()),
    # FLUX blocks
    (r"flux/(double|single)_blocks/.*/(q|k|v)/kernel", ("layers", "embed", "heads")),
    (r"flux/(double|single)_blocks/.*/proj/kernel", ("layers", "heads", "embed")),
    (r"flux/(double|single)_blocks/.*/mlp_in/kernel", ("layers", "embed", "mlp")),
    (r"flux/(double|single)_blocks/.*/mlp_out/kernel", ("layers", "mlp", "embed")),
    (r"flux/(double|single)_blocks/.*/lin/kernel", ("layers", "embed", None)),
    (r"flux/(double|single)_blocks/.*/(bias|scale)", ("layers", None)),
    (r"flux/(img_in|txt_in)/kernel", (None, "embed")),
    (r"flux/\w+_in/(in|out)_layer/kernel", (None, "embed")),
    (r"flux/final_layer/\w+/kernel", ("embed", None)),
    (r"flux/.*/bias", (None,)),
    # AlignNet
    (r"alignnet/(projector_in|projector_out)/kernel", ("embed", None)),
    (r"alignnet/.*", ()),
    # Qwen2.5-VL
    (r"mllm/embed_tokens/.*", ("vocab", "embed")),
    (r"mllm/lm_head/kernel", ("embed", "vocab")),
    (r"mllm/layers/.*/(q_proj|k_proj|v_proj)/kernel", ("layers", "embed", "heads")),
    (r"mllm/layers/.*/o_proj/kernel", ("layers", "heads", "embed")),
    (r"mllm/layers/.*/(gate_proj|up_proj)/kernel", ("layers", "embed", "mlp")),
    (r"mllm/layers/.*/down_proj/kernel", ("layers", "mlp", "embed")),
    (r"mllm/visual/patch_embed/kernel", (None, "embed")),
    (r"mllm/visual/blocks/attn/(q|k|v)/kernel", ("layers", "embed", "heads")),
    (r"mllm/visual/blocks/attn/proj/kernel", ("layers", "heads", "embed")),
    (r"mllm/visual/blocks/mlp/(gate_proj|up_proj)/kernel", ("layers", "embed", "mlp")),
    (r"mllm/visual/blocks/mlp/down_proj/kernel", ("layers", "mlp", "embed")),
    (r"mllm/visual/merger/mlp_in/kernel", ("embed", "mlp")),
    (r"mllm/visual/merger/mlp_out/kernel", ("mlp", "embed")),
    (r"mllm/(layers/)?.*(bias|scale)", ()),
    # T5 and CLIP
    (r"(t5/shared|clip/token_embedding)/embedding", ("vocab", "embed")),
    (r"(t5|clip)/blocks/attn/(q|k|v)/kernel", ("layers", "embed", "heads")),
    (r"(t5|clip)/blocks/attn/proj/kernel", ("layers", "heads", "embed")),
    (r"(t5|clip)/blocks/mlp/(gate_proj|up_proj|mlp_in)/kernel", ("layers", "embed", "mlp")),
    (r"(t5|clip)/blocks/mlp/(down_proj|mlp_out)/kernel", ("layers", "mlp", "embed")),
    (r"(t5|clip)/.*(bias|scale|position_bias/embedding|position_embedding/embedding)", ()),
    # The VAE is 168 MB: replicated.
    (r"vae/.*", ()),
)


def make_mesh(axes: Mapping[str, int], devices: Any = None) -> Mesh:
    """A mesh of `AXES` from sizes; one size may be -1 and takes the remaining devices.

    Raises:
      ValueError: unknown axis, or sizes that do not multiply to the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    unknown = sorted(set(axes) - set(AXES))
    if unknown:
        raise ValueError(f"unknown mesh axes {unknown}; the axes are {', '.join(AXES)}")
    sizes = [int(axes.get(a, 1)) for a in AXES]
    if sizes.count(-1) > 1:
        raise ValueError(f"at most one mesh axis may be -1, found {dict(axes)}")
    known = math.prod(s for s in sizes if s != -1)
    sizes = [devices.size // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != devices.size:
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {math.prod(sizes)} devices, "
            f"{devices.size} are here"
        )
    # Auto axes: shard_map, Optax and reshapes of sharded axes need no annotations of their own.
    return Mesh(devices.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def logical_axes(path: str) -> tuple[str | None, ...] | None:
    """Logical axes of a parameter, () for replicated, None if no rule matches."""
    return next((axes for rule, axes in RULES if re.fullmatch(rule, path)), None)


def param_shardings(abstract: Params, mesh: Mesh) -> dict[str, NamedSharding]:
    """A sharding for every parameter.

    An axis that does not divide evenly stays whole: small models on many devices are replicated in
    part rather than refused.

    Raises:
      ValueError: parameters without a rule, or rules of another rank; all are listed.
    """
    shardings, wrong = {}, []
    for path, x in abstract.items():
        axes = logical_axes(path)
        if axes is None:
            wrong.append(f"{path} {x.shape}: no rule")
        elif axes and len(axes) != len(x.shape):
            wrong.append(f"{path} {x.shape}: the rule has axes {axes}")
        else:
            names = [LOGICAL[a] for a in axes]
            spec = [
                n if n and x.shape[i] % mesh.shape[n] == 0 else None for i, n in enumerate(names)
            ]
            shardings[path] = NamedSharding(mesh, P(*spec))
    if wrong:
        raise ValueError("parameters that x2jax/sharding.py cannot place:\n  " + "\n  ".join(wrong))
    return shardings


def tree_shardings(
    tree: Any, by_path: Mapping[str, NamedSharding], shapes: Params, mesh: Mesh
) -> Any:
    """Shardings of any tree that holds `Params`: a leaf under a path is placed as that parameter.

    So Adam's moments lie where their parameters lie. A leaf that lacks one axis of its parameter,
    as Adafactor's rows and columns do, is placed by the axes that it has; everything else is
    replicated.

    Args:
      tree: of arrays or shapes.
      by_path: shardings of the parameters.
      shapes: the parameters or their shapes.
      mesh: of the shardings.
    """

    def place(key_path, leaf):
        names = [k.key for k in key_path if isinstance(k, jax.tree_util.DictKey)]
        path = next((n for n in names if n in by_path), None)
        if path is None:
            return NamedSharding(mesh, P())
        shape, spec = shapes[path].shape, by_path[path].spec
        if leaf.shape == shape:
            return by_path[path]
        axes = [*spec] + [None] * (len(shape) - len(spec))
        fits = [
            axes[:a] + axes[a + 1 :]
            for a in range(len(shape))
            if leaf.shape == shape[:a] + shape[a + 1 :]
        ]
        # Where two axes have one size, either placement is right: take the one that shards more.
        best = max(fits, key=lambda axes: sum(a is not None for a in axes), default=[])
        return NamedSharding(mesh, P(*best))

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh, *leading: None) -> NamedSharding:
    """The batch axis over data and fsdp, behind as many unsharded axes as there are `leading`."""
    return NamedSharding(mesh, P(*leading, BATCH))


def put_batch(batch: Any, sharding: NamedSharding) -> Any:
    """Each process's share of a host batch as one global array."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
