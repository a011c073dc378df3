"""What all recipes share: children and their weights, what trains, what the loop asks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from x2jax import sources
from x2jax.children import (
    Precision,
    configs_of,
    find_sources,
    fresh_child,
    load_child,
    options,
    published_configs,
)
from x2jax.model import make_skeleton
from x2jax.sources import Source
from x2jax.step import Metrics
from x2jax.trees import Params, Skeleton, check_rules, child, fingerprint, matches


class Recipe:
    """A subclass says `children`, `fresh`, `open_data`, `batch`, `loss`, `held_out`, `preview`.

    Attributes:
      children: names of the parts whose weights come from the config's sources.
      config: the training config.
      found: sources of the children's weights; empty in an outline.
      configs: architectures by child, fresh ones included.
      skeleton: of the `Model`.
      trainable: rules on paths that say what trains.
      without: children whose outputs come with the batches, computed before; the model lacks them.
      notes: what the user should know at the start of a run.
      data: training and held-out batches, once `x2jax.recipes.build` has opened them.
    """

    children: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        config: Any,
        configs: Mapping[str, Any],
        found: Mapping[str, Source],
        without: tuple[str, ...] = (),
    ):
        self.config, self.found, self.without = config, dict(found), without
        self.notes: list[str] = []
        self.configs = {**configs, **self.fresh(configs)}
        self.precision = Precision(**config.precision)
        self.skeleton: Skeleton = make_skeleton(self.configs, self.precision, without)
        self.trainable = tuple(config.trainable)
        check_rules(self.skeleton.paths, self.trainable, "--config.trainable")
        self.data: Any = None

    @classmethod
    def require(cls, config: Any) -> None:
        """Raises ValueError naming every source of weights and data that is unset."""
        sources.require(config, (*options(cls.parts(config)), "data"))

    @classmethod
    def open(cls, config: Any) -> "Recipe":
        """With the sources that a config names; loads nothing yet. Raises as `find_sources`."""
        found = find_sources(config, cls.parts(config), vision=cls.sees(config))
        return cls(config, configs_of(found), found)

    @classmethod
    def outline(cls, config: Any) -> "Recipe":
        """From shapes alone, without weights or data: for `x2jax.plan`.

        Architectures come from the folders that the config names; where it names none at all, they
        are the published ones.
        """
        parts = cls.parts(config)
        if not any(config[option] for option in options(parts)):
            return cls(config, published_configs(parts, vision=cls.sees(config)), {})
        found = find_sources(config, parts, vision=cls.sees(config))
        return cls(config, configs_of(found), {})

    def with_precomputed(self, workdir: Path) -> "Recipe":
        """This recipe, but for the children whose outputs lie in the workdir or where the config
        says; for recipes that can do without them.
        """
        return self

    def from_features(self) -> "Recipe":
        """This recipe as it trains once all that can be was computed before: for `x2jax.plan`.

        Raises:
          ValueError: it reads no features.
        """
        raise ValueError(f"the recipe {self.config.recipe!r} reads no features")

    # What a recipe says.

    @classmethod
    def parts(cls, config: Any) -> tuple[str, ...]:
        """`children`, or what a config makes of them."""
        return cls.children

    @classmethod
    def sees(cls, config: Any) -> bool:
        """Whether the MLLM sees images."""
        return False

    def fresh(self, configs: Mapping[str, Any]) -> dict[str, Any]:
        """Architectures of the children that start untrained, given those of the others."""
        return {}

    def open_data(self, workdir: Path) -> Any:
        """Training and held-out batches: an object like `x2jax.data.edits.EditData`."""
        raise NotImplementedError

    def batch(self) -> Any:
        """Shapes of a micro-batch, as `jax.ShapeDtypeStruct`s."""
        raise NotImplementedError

    def loss(
        self, params: Params, frozen: Params, batch: Any, key: PRNGKeyArray
    ) -> tuple[Array, Metrics]:
        """Pure; differentiated with respect to `params`. Metrics named `count_*` are summed."""
        raise NotImplementedError

    def held_out(self, params: Params, frozen: Params, batch: Any) -> Metrics:
        """Pure; metrics of the held-out batch that compare between steps and runs."""
        raise NotImplementedError

    def preview(self, params: Params, frozen: Params, batch: Any) -> dict[str, Array]:
        """Columns of the sample grid beside what the batch holds: title -> pixels (B, H, W, 3)."""
        raise NotImplementedError

    # What the loop asks.

    @property
    def shows(self) -> bool:
        """Whether there are pictures for sample grids."""
        return True

    @property
    def trainable_abstract(self) -> Params:
        """Shapes of the trainable tree; float32 masters."""
        return {
            p: jax.ShapeDtypeStruct(x.shape, jnp.float32)
            for p, x in self.skeleton.abstract.items()
            if matches(p, self.trainable)
        }

    @property
    def source_paths(self) -> dict[str, str]:
        """Where each child's weights came from."""
        return {name: str(source.path) for name, source in self.found.items()}

    def load_frozen(self, by_path: Mapping[str, Any]) -> Params:
        """All weights that do not train."""
        return self._gather(by_path, self.config.seed, frozen=True)

    def initial(self, seed: int, by_path: Mapping[str, Any]) -> Params:
        """The trainable tree at step 0: fresh children, everything else as its source has it."""
        params = self._gather(by_path, seed, frozen=False)
        return {p: params[p].astype(x.dtype) for p, x in self.trainable_abstract.items()}

    def _gather(self, by_path: Mapping[str, Any], seed: int, *, frozen: bool) -> Params:
        """The frozen or the trainable part of all children; opens only those that have one."""
        trains, params = self.trainable_abstract, {}
        for name in self.configs:
            paths = [f"{name}/{p}" for p in child(self.skeleton.abstract, name)]
            wanted = [p for p in paths if (p not in trains) == frozen]
            if not wanted:
                continue
            if name in self.found:
                whole = load_child(self.skeleton, self.found, name, by_path)
            else:
                whole = fresh_child(self.configs, self.precision, name, seed, by_path)
            params |= {p: whole[p] for p in wanted}
        return params

    def fingerprints(self, frozen: Params) -> dict[str, str]:
        """One a frozen child: tells whether a run goes on with the weights it began with."""
        names = sorted({p.split("/")[0] for p in frozen})
        return {name: fingerprint(child(frozen, name)) for name in names}
