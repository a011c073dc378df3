"""What was trained, from wherever it lies: a run, an imported folder or a published adapter."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from converters import formats, native, x2edit
from converters.formats.base import there
from converters.formats.x2edit import adapter_config
from converters.load import Imported
from x2jax.checkpoint import load_trainable
from x2jax.trees import Params, matches, prefixed

SIDECAR = "export.json"
"""Written beside an export: step, config and fingerprints of the run it came from."""


class Trained(NamedTuple):
    """Attributes:
    params: path -> array on the host.
    meta: at least `config`, the run's config as a dict; of a run also `fingerprints`.
    """

    params: Params
    meta: dict[str, Any]


def open_trained(
    path: str | Path,
    step: int | None = None,
    *,
    ema: bool = False,
    only: tuple[str, ...] = (r".*",),
) -> Trained:
    """A trainable tree by path, with the config it was trained with.

    Args:
      path: workdir of a run, folder of `converters import`, or folder of an X2Edit trio.
      step: which checkpoint of a run; None for the newest.
      ema: the moving average of a run instead of its parameters.
      only: rules on paths that say what is read.

    Raises:
      FileNotFoundError: nothing of that kind there.
      WeightsError: files that do not fit together; every offender is listed.
      ValueError: `step` or `ema` asked of something that is not a run with them.
    """
    root = Path(path).expanduser()
    if native.is_native(root):
        tensors, about = native.open_folder(root)
        if "meta" not in about:
            raise ValueError(f"{root} holds {about.get('format')} weights, not a trained adapter")
        found = Trained({p: x for p, x in tensors.items() if matches(p, only)}, about["meta"])
    elif formats.FORMATS["x2edit"].is_here(root):
        found = _trio(root, only)
    else:
        return _run(root, step, ema, only)
    if step is not None or ema:
        raise ValueError(f"{root} is not a run: it has neither steps nor a moving average")
    return found


def _run(root: Path, step: int | None, ema: bool, only: tuple[str, ...]) -> Trained:
    params, meta = load_trainable(root, step, ema=ema, only=only)
    # What an earlier stage trained and this one kept frozen belongs to it: AlignNet, in X2Edit.
    earlier = meta["config"].get("init_from")
    if earlier:
        params = open_trained(earlier, only=only).params | params
    return Trained(params, meta)


def _trio(root: Path, only: tuple[str, ...]) -> Trained:
    fmt = formats.FORMATS["x2edit"]
    config = fmt.read(root)
    params: Params = {}
    for part in fmt.parts(config):
        read = Imported(fmt.locate(root, part), part.table, part.shapes)
        wanted = [p for p in read.specs if matches(f"{part.prefix}/{p}", only)]
        params |= prefixed({p: read(p) for p in wanted}, part.prefix)
    return Trained(params, trio_meta(root, config))


def trio_meta(root: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What the sidecar of an export says; for files of others, X2Edit's last stage.

    Args:
      root: folder of the trio.
      config: as the format's `read` gives it.
    """
    sidecar = root / SIDECAR
    if sidecar.is_file():
        meta = json.loads(sidecar.read_text())
    else:
        from configs.x2edit import get_config

        meta = {"config": json.loads(get_config("1024").to_json())}
    cfg = adapter_config(config)
    # Exports fold a scale into the weights.
    fields = ("experts", "rank", "double", "single", "series", "tasks")
    meta["config"]["adapter"] |= {k: getattr(cfg, k) for k in fields} | {"alpha": float(cfg.rank)}
    file = there(root, x2edit.ALIGNNET)
    meta["config"] |= {"alignnet": str(file and file.resolve()), "init_from": ""}
    return meta


def fit(given: Params, wanted: Params, what: str) -> Params:
    """`given` if each of its arrays has a place among `wanted`, and the same shape.

    Raises:
      ValueError: every parameter that is unknown or has another shape.
    """
    wrong = []
    for path, x in given.items():
        if path not in wanted:
            wrong.append(f"  {path} {tuple(x.shape)}: this model has no such parameter")
        elif tuple(x.shape) != tuple(wanted[path].shape):
            wrong.append(f"  {path}: {tuple(x.shape)}, needs {tuple(wanted[path].shape)}")
    if wrong:
        raise ValueError(f"{what} does not fit:\n" + "\n".join(wrong))
    return given


def placed(given: Params, like: Params, by_path: dict) -> Params:
    """The arrays of `given` that `like` has, in its dtypes, on the devices."""
    return {
        p: jax.device_put(given[p].astype(x.dtype), by_path[p])
        for p, x in like.items()
        if p in given
    }
