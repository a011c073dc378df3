"""Latents and text features that were computed before: how they lie on disk.

    FOLDER/meta.json            what they are and what they were made of
    FOLDER/00000.array_record   the first `shard` samples of the index, a record each; and so on

A record is in safetensors format: the moments of every image slot, cut to the valid size, and the
text features and pooled vector of every language; or the reason why the sample cannot be read.
ArrayRecord compresses records, which all but removes the equal rows that pads give.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float
from safetensors.numpy import load, save

from x2jax.alignnet import Condition
from x2jax.data import records, transforms
from x2jax.data.batch import Moments

META = "meta.json"
VERSION = 1
SLOT_ARRAYS = ("mean", "logvar")
TEXT_ARRAYS = ("txt", "pooled")
LANGUAGES = {"en": records.ENGLISH, "zh": records.CHINESE}


class Features:
    """A folder of features, complete and of the run at hand; picklable.

    Attributes:
      parts: what of them is read: "moments", "text" or both.
      meta: contents of `meta.json`: `made_of` (by "samples" and part, what must agree with a run
        that reads them), `weights` (fingerprint by child, as checkpoints hold them), `languages`,
        `parts`, `dtype`, `factor` (pixels a latent), `samples`, `shard`.
    """

    def __init__(self, folder: Path, made_of: Mapping[str, Mapping[str, Any]], language: str):
        """Opens them for a run.

        Args:
          made_of: "samples", and the parts that are to be read, each with what it depends on.
          language: of the run.

        Raises:
          FileNotFoundError: no features there.
          ValueError: they were made with other weights, template, text length, buckets or samples
            (every difference is listed), lack a language, or are not complete.
        """
        self.folder, self.meta = folder, read_meta(folder)
        self.parts = tuple(k for k in made_of if k != "samples")
        differ = [d for k, of in made_of.items() for d in differences(self.meta["made_of"][k], of)]
        lacking = sorted(set(languages(language)) - set(self.meta["languages"]))
        if "text" in self.parts and lacking:
            differ.append(f"  text.language={language}: the features lack {', '.join(lacking)}")
        if differ:
            raise ValueError(
                f"the features in {folder} were made for another run; run x2jax.precompute again "
                "with this config and another --workdir, or undo:\n" + "\n".join(differ)
            )
        paths = shard_paths(folder, self.meta)
        missing = [p.name for p in paths if not p.is_file()]
        if missing:
            raise ValueError(
                f"the features in {folder} are not complete: {len(missing)} of {len(paths)} shards "
                f"are missing ({missing[0]} ...); run x2jax.precompute again, it goes on there"
            )
        self._source = grain.sources.ArrayRecordDataSource([str(p) for p in paths])
        if len(self._source) != self.meta["samples"]:
            raise ValueError(
                f"{folder} holds {len(self._source)} records, {META} says {self.meta['samples']}: "
                "delete the folder and run x2jax.precompute again"
            )

    def read(
        self, sample: int, canvas: tuple[int, int], slots: int, language: int
    ) -> dict[str, np.ndarray]:
        """Arrays of one sample, as integers where the dtype has no name in numpy.

        Args:
          sample: position in the index.
          canvas: (height, width) of the canvas in pixels.
          slots: image slots; those that hold no image are zero.
          language: bit of the language; the other one where the sample has only that.

        Raises:
          BadImage: the sample could not be read when the features were made; says why.
        """
        arrays = load(self._source[int(sample)])
        if "problem" in arrays:
            raise transforms.BadImage(arrays["problem"].tobytes().decode())
        out: dict[str, np.ndarray] = {}
        if "moments" in self.parts:
            height, width = (n // self.meta["factor"] for n in canvas)
            for name in SLOT_ARRAYS:
                found = [arrays[k] for s in range(slots) if (k := f"{name}.{s}") in arrays]
                out[name] = np.zeros((slots, height, width, found[0].shape[-1]), found[0].dtype)
                for s, x in enumerate(found):
                    out[name][s, : x.shape[0], : x.shape[1]] = x
        if "text" in self.parts:
            here = [k for k in LANGUAGES if f"txt.{k}" in arrays]
            chosen = next((k for k in here if LANGUAGES[k] == language), here[0])
            out |= {name: arrays[f"{name}.{chosen}"] for name in TEXT_ARRAYS}
        return out

    def moments(self, raw: Mapping[str, np.ndarray]) -> Moments | None:
        """Stacked arrays of `read` as part of a batch; None where there are none."""
        if "moments" not in self.parts:
            return None
        return Moments(*(_floats(raw[name], self.meta["dtype"]) for name in SLOT_ARRAYS))

    def condition(self, raw: Mapping[str, np.ndarray]) -> Condition:
        """Stacked arrays of `read` as the text of a batch."""
        return Condition(*(_floats(raw[name], self.meta["dtype"]) for name in TEXT_ARRAYS))


def record(
    slots: Mapping[int, Mapping[str, np.ndarray]], texts: Mapping[str, Mapping[str, np.ndarray]]
) -> bytes:
    """A sample as a record.

    Args:
      slots: image slot -> "mean" and "logvar" (h, w, c), cut to the valid size.
      texts: language -> "txt" (T, D) and "pooled" (P,).
    """
    parts = {
        f"{name}.{k}": x for k, of in (*slots.items(), *texts.items()) for name, x in of.items()
    }
    return save({name: _integers(x) for name, x in sorted(parts.items())})


def problem(reason: str) -> bytes:
    """The record of a sample that cannot be read."""
    return save({"problem": np.frombuffer(reason.encode(), np.uint8)})


class ShardWriter:
    """Writes one shard; it appears under its name when it is complete, or not at all."""

    def __init__(self, path: Path):
        self.path = path
        self._temporary = path.with_name(f".{path.name}.part")
        self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1")

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def close(self) -> None:
        """Completes the shard."""
        self._writer.close()
        os.replace(self._temporary, self.path)


def languages(language: str) -> list[str]:
    """Languages that a run in `language` asks for; held-out batches are English."""
    return ["en"] if language == "en" else ["en", "zh"]


def shard_paths(folder: Path, meta: Mapping[str, Any]) -> list[Path]:
    """Files of all shards, whether they are there or not."""
    count = -(-meta["samples"] // meta["shard"])
    return [folder / f"{n:05d}.array_record" for n in range(count)]


def read_meta(folder: Path) -> dict[str, Any]:
    """What is in a folder of features.

    Raises:
      FileNotFoundError: nothing. ValueError: `meta.json` is damaged, or of another version.
    """
    path = folder / META
    if not path.is_file():
        raise FileNotFoundError(
            f"no features in {folder}: make them by python -m x2jax.precompute with this config"
        )
    try:
        meta = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path} is not JSON ({e}); delete {folder} and make it again") from None
    if meta.get("version") != VERSION:
        raise ValueError(
            f"{path} is of version {meta.get('version')}, this x2jax reads {VERSION}: delete "
            f"{folder} and make it again"
        )
    return meta


def begin(folder: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Writes `meta.json`, or goes on with features that are there; returns what they are.

    Several processes may begin at once.

    Raises:
      ValueError: features of another run are there; every difference is listed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / META).is_file():
        temporary = folder / f".{META}.{os.getpid()}"
        temporary.write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, folder / META)
    there = read_meta(folder)

    def flat(m: Mapping[str, Any]) -> dict[str, Any]:
        made_of = {f"{part}: {k}": v for part, of in m["made_of"].items() for k, v in of.items()}
        return made_of | {k: m[k] for k in ("parts", "languages", "samples", "weights")}

    differ = differences(flat(there), flat(meta))
    if differ:
        raise ValueError(
            f"{folder} holds features of another run; delete it, or undo:\n" + "\n".join(differ)
        )
    return there


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for every entry that differs, with both values."""
    return [
        f"  {k}: {then.get(k, 'absent')!r} in the features, {now.get(k, 'absent')!r} in this run"
        for k in sorted(then.keys() | now.keys())
        if then.get(k) != now.get(k)
    ]


def _integers(x: Float[np.ndarray, "..."]) -> np.ndarray:
    """bfloat16 as its bits: neither safetensors' numpy reader nor shared memory knows its name."""
    x = np.ascontiguousarray(x)
    return x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x


def _floats(x: np.ndarray, dtype: str) -> Float[np.ndarray, "..."]:
    return x.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else x
