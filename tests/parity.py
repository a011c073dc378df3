"""Parity of our modules with tiny random torch references, through the shipped rule tables."""

import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from converters.rules import Table, plan
from x2jax.trees import Skeleton

jax.config.update("jax_default_matmul_precision", "highest")


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every weight a value that matters: no zero bias, no unit scale; returns the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
    return module.eval()


def tensors(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict as numpy, copied."""
    return {k: v.detach().numpy().copy() for k, v in module.state_dict().items()}


def fill(
    make: Callable[[], nnx.Module], table: Table, source: Mapping[str, np.ndarray]
) -> nnx.Module:
    """Our module with the weights of `source`; checks that exporting gives `source` back."""
    skeleton = Skeleton(nnx.eval_shape(make))
    shapes = {path: tuple(x.shape) for path, x in skeleton.abstract.items()}
    found = plan(table, shapes, {k: v.shape for k, v in source.items()})
    ours = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
    for name, entry in found.entries.items():
        for part, piece in entry.pieces(source[name]):
            ours[part.path][part.at] = piece
    for name, entry in found.entries.items():
        back = entry.assemble(lambda part: ours[part.path][part.at])
        np.testing.assert_array_equal(back, source[name], err_msg=f"export of {name}")
    return skeleton.merge({path: jnp.asarray(x) for path, x in ours.items()})


def distance(ours, reference) -> float:
    """Largest absolute difference over all outputs, relative to an output's scale if above 1."""
    worst = 0.0
    for a, b in zip(ours, reference, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert a.shape == b.shape, f"ours {a.shape}, reference {b.shape}"
        gap = float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))
        worst = max(worst, gap if np.isfinite(gap) else np.inf)
    return worst


def assert_parity(ours, reference, tol: float = 1e-4) -> float:
    """Asserts that all outputs agree within `tol`; returns the distance."""
    gap = distance(ours, reference)
    assert gap <= tol, f"outputs differ by {gap:.3g}, more than {tol:.3g}"
    return gap


def assert_every_weight_matters(
    reference: torch.nn.Module,
    run: Callable[[], list],
    ours: list,
    tol: float = 1e-4,
    exempt: Mapping[str, str] | None = None,
    size: float = 0.5,
) -> None:
    """Asserts that parity holds, and fails after perturbing any one tensor of the reference.

    Args:
      reference: the torch module whose parameters are perturbed in turn, and restored.
      run: its outputs (arrays) with its present weights.
      ours: our outputs with the unperturbed weights.
      tol: the tolerance of the parity; a perturbation must exceed it tenfold.
      exempt: regular expression of a name -> why it cannot matter. Exempt tensors must indeed not
        matter, so that the list stays honest.
      size: perturbation relative to the tensor's root mean square.
    """
    exempt = dict(exempt or {})
    assert_parity(ours, run(), tol)
    generator = torch.Generator().manual_seed(1)
    wrong, used = [], set()
    for name, p in reference.named_parameters():
        kept = p.detach().clone()
        scale = size * kept.square().mean().sqrt().clamp_min(1e-3)
        with torch.no_grad():
            p.add_(scale * torch.randn(p.shape, generator=generator))
            gap = distance(ours, run())
            p.copy_(kept)
        patterns = [pattern for pattern in exempt if re.fullmatch(pattern, name)]
        used.update(patterns)
        if patterns and gap > tol:
            wrong.append(
                f"{name} is exempt ({exempt[patterns[0]]}) but changes outputs by {gap:.3g}"
            )
        elif not patterns and gap <= 10 * tol:
            wrong.append(
                f"{name} changes outputs by {gap:.3g} only: the parity would not notice it"
            )
    wrong += [f"exemption {pattern} matches no weight" for pattern in set(exempt) - used]
    assert not wrong, "\n".join(wrong)
    assert_parity(ours, run(), tol)
