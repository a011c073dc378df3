"""Torch pickles, read weights-only and written; the one place that imports torch."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.pickle_check import check_pickle
from converters.rules import WeightsError
from converters.safetensors_io import Tensors

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def have_torch() -> bool:
    """Whether pickles can be read and written here."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path} is a torch pickle, and torch is not installed: pip install 'x2jax[torch]', or "
            "use the safetensors form of the file"
        ) from None
    return torch


def read(path: str | Path) -> Tensors:
    """The state dict in a pickle, mapped where the file allows it. No code in it is run.

    Raises:
      ImportError: torch is not installed.
      WeightsError: damaged, or holds anything besides tensors by name.
    """
    path = Path(path)
    torch = _torch(path)
    check_pickle(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        reason = ascii(str(e).strip().split("\n")[0])[:200]
        raise WeightsError(
            f"unreadable pickle {path}",
            [f"{type(e).__name__}: {reason}; truncated, not a torch file, or more than weights"],
        ) from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]  # the {"config", "state_dict"} wrapping
    if not isinstance(state, Mapping):
        raise WeightsError(
            f"pickle {path}", [f"holds a {type(state).__name__}, not tensors by name"]
        )
    size, wrong = path.stat().st_size, []
    for name, value in state.items():
        shown = ascii(name)[:120].strip("'")
        if not isinstance(value, torch.Tensor):
            wrong.append(f"{shown}: a {type(value).__name__}, not a tensor")
        elif not isinstance(name, str) or not name.isprintable():
            wrong.append(f"{shown}: a name that is no printable text")
        elif value.numel() * value.element_size() > size:  # a view that repeats its storage
            wrong.append(f"{shown}: {tuple(value.shape)} is larger than the file of {size} bytes")
        elif value.layout != torch.strided or value.is_quantized or value.is_complex():
            wrong.append(f"{shown}: a {value.layout} tensor of {value.dtype}, not plain numbers")
    if wrong:
        raise WeightsError(f"pickle {path}", wrong)
    return Tensors({name: _numpy(value, torch) for name, value in state.items()}, str(path))


def _numpy(value, torch) -> np.ndarray:
    value = value.detach()
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def write(
    path: str | Path, tensors: Mapping[str, np.ndarray], beside: Mapping[str, Any] | None = None
) -> None:
    """Writes a state dict as `torch.save` does, atomically.

    Args:
      path: the file.
      tensors: by name.
      beside: a config, to wrap as {"config", "state_dict"}; None for the bare state dict.

    Raises:
      ImportError: torch is not installed.
    """
    path = Path(path)
    torch = _torch(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Through a handle: given a path, torch writes its name into the file.
        with temporary.open("wb") as f:
            state = {name: _tensor(value, torch) for name, value in tensors.items()}
            wrapped = state if beside is None else {"config": dict(beside), "state_dict": state}
            torch.save(wrapped, f)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _tensor(value: np.ndarray, torch):
    value = np.array(value)
    if value.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)
