"""What `python -m x2jax.train` refuses, and how it says so."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from configs.x2edit import get_config
from tests.converters.test_x2edit import make_run, trained_tree
from x2jax import recipes, sources, train
from x2jax.metrics import Writer


def meta(**changes):
    config = get_config().unlock()
    config.update(changes)
    return {
        "config": json.loads(config.to_json()),
        "fingerprints": {"flux": "aa", "vae": "bb"},
        "data": {"fingerprint": "cc"},
    }


def test_a_workdir_of_another_config_lists_every_difference():
    config = get_config()
    prints = {"flux": "aa", "vae": "bb"}
    train.check_same_run(meta(), config, prints, "cc")
    train.check_same_run(meta(steps=3, flux="elsewhere"), config, prints, "cc")
    with pytest.raises(ValueError, match="this WORKDIR holds a run of another config") as e:
        train.check_same_run(
            meta(seed=5, optimizer={"learning_rate": 1.0}), config, {"flux": "xx", "vae": "bb"}, "d"
        )
    text = str(e.value)
    assert "config.seed: 5 then, 0 now" in text
    assert "config.optimizer.learning_rate: 1.0 then, 0.002 now" in text
    assert "the contents of flux: aa then, xx now" in text
    assert "the contents of data: cc then, d now" in text
    assert len(text.splitlines()) == 5


def test_unset_sources_say_how_to_get_each(tmp_path):
    with pytest.raises(ValueError) as e:
        recipes.build(get_config("1024"), tmp_path)
    for name in ("flux", "mllm", "alignnet", "data"):
        assert f"--config.{name}=...  " in str(e.value)
    assert str(e.value).count("hf download") == 4


def test_sources_that_are_missing_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--config.flux=\S+nowhere: .* does not exist"):
        sources.folder(str(tmp_path / "nowhere"), "flux", "flux")
    with pytest.raises(FileNotFoundError, match="a model folder"):
        sources.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        sources.read_config(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimiser.name=adamw"], "optimiser"),
        (["--config.optimizer.momentum=0.9"], "momentum"),
        (["--config.recipe=x2edits"], "unknown recipe 'x2edits': use one of "),
        (["--config.data=tiny:many"], "write tiny:N"),
        (["surplus"], "unexpected arguments: surplus"),
    ],
)
def test_command_lines_that_are_wrong(arguments, message, tmp_path):
    command = [sys.executable, "-m", "x2jax.train", "--config", "configs/x2edit.py"]
    done = subprocess.run(
        [*command, "--workdir", str(tmp_path / "run"), *arguments],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert message in done.stderr + done.stdout


def test_unknown_stages_and_options_are_refused():
    with pytest.raises(ValueError, match="unknown stage '768': use configs"):
        get_config("768")
    config = get_config()
    with pytest.raises(AttributeError, match='Did you mean "density"'):
        config.objective.densities = "uniform"


def test_default_workdirs():
    assert str(train.default_workdir("configs/x2edit.py:512")) == "runs/x2edit-512"
    assert str(train.default_workdir("configs/x2edit.py")) == "runs/x2edit"


def recipe_like(params):
    return SimpleNamespace(
        skeleton=SimpleNamespace(abstract=params),
        trainable_abstract={p: x for p, x in params.items() if p.startswith("adapter/")},
        without=(),
    )


def test_init_from_replaces_what_it_trained_and_nothing_else(tmp_path):
    params = trained_tree()
    root = make_run(tmp_path / "run", params)
    recipe = recipe_like({**params, "flux/x": np.zeros(2)})
    given = train.inherited(recipe, SimpleNamespace(init_from=str(root)))
    assert given.keys() == params.keys()
    like = {p: np.zeros(x.shape, np.float32) for p, x in recipe.skeleton.abstract.items()}
    placed = train.placed(given, like, dict.fromkeys(like))
    np.testing.assert_array_equal(placed["alignnet/fc/bias"], params["alignnet/fc/bias"])
    assert "flux/x" not in placed


def test_init_from_of_another_shape_lists_every_offender(tmp_path):
    params = trained_tree()
    root = make_run(tmp_path / "run", params)
    wanted = dict(params)
    path = "adapter/single_blocks/attn/q/down"
    wanted[path] = np.zeros((1, 2, 3, 4), np.float32)
    del wanted["alignnet/fc/bias"]
    with pytest.raises(ValueError, match="does not fit") as e:
        train.inherited(recipe_like(wanted), SimpleNamespace(init_from=str(root)))
    assert f"{path}: {params[path].shape}, needs (1, 2, 3, 4)" in str(e.value)
    assert "alignnet/fc/bias (6,): this model has no such parameter" in str(e.value)
    more = {**params, "adapter/double_blocks/txt_attn/q/down": np.zeros(1)}
    with pytest.raises(ValueError, match="lacks parameters:\n  adapter/double_blocks/txt_attn"):
        train.inherited(recipe_like(more), SimpleNamespace(init_from=str(root)))


def test_metrics_of_a_resumed_run_stand_once(tmp_path):
    writer = Writer(tmp_path, 0)
    for step in range(1, 5):
        writer.write(step, {"loss": step}, sample_id=[step])
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 5, "lo')  # as a killed run leaves it
    writer = Writer(tmp_path, 2)
    writer.write(3, {"loss": 30.0})
    writer.close()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(x["step"], x["loss"]) for x in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert lines[1]["sample_id"] == [2]
