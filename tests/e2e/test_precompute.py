"""Features made before training: what they hold, when they are refused, that nothing changes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs.x2edit import get_config
from x2jax import recipes, sharding, sources
from x2jax.data.features import Features, ShardWriter, read_meta, record
from x2jax.precompute import precompute

SAMPLES, SHARD, HELD_OUT = 60, 25, 4


def config(**options):
    c = get_config()
    c.data, c.batch_size, c.held_out = f"tiny:{SAMPLES}", 4, HELD_OUT
    c.trainable = (r"adapter/.*",)
    c.image.buckets, c.text.language = "tiny-mixed", "mixed"
    c.update_from_flattened_dict(options)
    return c


def spoil(workdir):
    """Wipes the compressed part of a picture, behind its header; returns (sample, position)."""
    data = recipes.build(config(), workdir).data
    index, sampler = data.index, data.reader.sampler
    order = np.concatenate([sampler.batch(n) for n in range(5)])
    at = next(n for n, i in enumerate(order) if len(sampler.by_task[index.columns["task"][i]]) > 3)
    sample = int(order[at])
    offset, size = map(int, index.columns["target"][sample])
    with open(index.shards[index.columns["shard"][sample]], "r+b") as f:
        f.seek(offset)
        start = f.read(size).index(b"\xff\xda")  # of the scan
        f.seek(offset + start)
        f.write(bytes(size - start))
    return sample, at


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, folder of features, (sample that cannot be read, its position))."""
    workdir = tmp_path_factory.mktemp("run")
    broken = spoil(workdir)
    return workdir, precompute(config(), workdir, shard=SHARD), broken


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def streams(recipe, batches):
    """Clean image stream and condition of batches, as a step computes them."""
    mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
    by_path = sharding.param_shardings(recipe.skeleton.abstract, mesh)
    frozen = recipe.load_frozen(by_path)
    params = recipe.initial(0, by_path)

    @jax.jit
    def run(frozen, batch):
        model = recipe.skeleton.merge(params, frozen)
        return model.encode(batch, jax.random.key(5), 128, 16), model.condition(batch.text)

    return [run(frozen, jax.tree.map(jnp.asarray, b)) for b in batches], recipe.fingerprints(frozen)


def test_a_run_from_features_sees_what_the_step_would_have_computed(run):
    workdir, _, broken = run
    read = recipes.build(config(), workdir)
    online = recipes.build(config(features="none"), workdir)
    assert read.without == ("vae", "mllm", "alignnet") and online.without == ()
    heads = {p.split("/")[0] for p in read.skeleton.paths}
    assert heads == {"flux", "adapter"}, "neither loaded nor in the program"
    assert "vae, mllm, alignnet are neither loaded nor run" in read.notes[0] and not read.shows

    a, b = read.data.iterate(0), online.data.iterate(0)
    pairs = [(next(a), next(b)) for _ in range(6)]
    for x, y in pairs:
        np.testing.assert_array_equal(x.sample_id, y.sample_id)
        np.testing.assert_array_equal(x.sizes, y.sizes)
        assert x.pixels is None and y.moments is None
    assert broken[0] not in np.concatenate([x.sample_id for x, _ in pairs])
    assert len({tuple(s) for x, _ in pairs for s in x.sizes[:, 0].tolist()}) > 4

    first = [*[x for x, _ in pairs], read.data.held_out]
    second = [*[y for _, y in pairs], online.data.held_out]
    (found, prints), (expected, others) = streams(read, first), streams(online, second)
    assert prints == others, "a run may change from one to the other and resume"
    for (stream, condition), (ours, theirs) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(stream.roles_BI, ours.roles_BI)
        np.testing.assert_allclose(stream.tokens_BIC, ours.tokens_BIC, atol=2e-6)
        np.testing.assert_allclose(condition.txt_BTD, theirs.txt_BTD, atol=1e-5)
        np.testing.assert_allclose(condition.pooled_BP, theirs.pooled_BP, atol=1e-5)
        assert np.abs(stream.tokens_BIC).max() > 0.5 and np.abs(condition.txt_BTD).max() > 0.5


def test_samples_that_cannot_be_read_are_replaced_alike(run):
    workdir, _, broken = run
    reports = []
    for features in ("", "none"):
        reader = recipes.build(config(features=features), workdir).data.reader
        sample = reader(broken[1])
        reports.append((int(sample["sample_id"]), sample["problems"]))
    assert reports[0] == reports[1]
    assert reports[0][1][0].sample_id == broken[0] and "cannot decode" in reports[0][1][0].reason


def test_another_share_and_another_start_write_the_same_bytes(run):
    workdir, folder, _ = run
    before = files(folder)
    assert sorted(before) == [f"{n:05d}.array_record" for n in range(3)] + ["meta.json"]
    (folder / "00001.array_record").unlink()
    with pytest.raises(ValueError, match=r"not complete: 1 of 3 shards are missing \(00001"):
        recipes.build(config(), workdir)
    (folder / ".00001.array_record.part").write_bytes(before["00001.array_record"][:5000])
    precompute(config(), workdir, share=(1, 2))
    assert files(folder) == before


def test_features_of_another_run_are_refused(run, tmp_path):
    workdir, _, _ = run

    def refused(**options):
        with pytest.raises(ValueError, match="were made for another run") as e:
            recipes.build(config(**options), workdir)
        return str(e.value).splitlines()[1:]

    assert refused(**{"text.length": 96, "text.template": "published"}) == [
        "  text.length: 64 in the features, 96 in this run",
        "  text.template: 'raw' in the features, 'published' in this run",
    ]
    (line,) = refused(**{"image.buckets": "tiny"})
    assert line.startswith("  image.buckets: [[40, 96], ")
    assert [x.split(":")[0].strip() for x in refused(**{"precision.compute": "bfloat16"})] == [
        "precision.compute"
    ] * 2
    for option, part in (("mllm", "qwen"), ("alignnet", "alignnet"), ("flux", "flux")):
        copy = other_weights(sources.TINY / part, tmp_path / part)
        (line,) = refused(**{option: str(copy)})
        assert f"contents of {'vae' if option == 'flux' else option}: " in line
    copy = other_weights(sources.TINY / "qwen", tmp_path / "pads", differ=False)
    mllm = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(mllm | {"pad_attention": "all"}))
    assert refused(mllm=str(copy)) == [
        "  pad_attention of mllm: 'self' in the features, 'all' in this run"
    ]
    with pytest.raises(ValueError, match="holds features of another run") as e:
        precompute(config(**{"text.length": 48}), workdir)
    assert "text: text.length: 64 in the features, 48 in this run" in str(e.value)
    # Fewer languages need less, and held-out samples or their number do not matter.
    for options in ({"text.language": "en"}, {"text.language": "zh"}, {"held_out": 6}):
        assert recipes.build(config(**options), workdir).without


def other_weights(source, copy, differ=True):
    """A copy of a folder, with every file of weights a little different."""
    for path in sorted(source.rglob("*")):
        target = copy / path.relative_to(source)
        if path.is_dir():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        data = bytearray(path.read_bytes())
        if path.suffix == ".safetensors":
            data[-1] ^= differ
        target.write_bytes(data)
    return copy


def test_what_trains_is_not_read_from_features(run):
    workdir, _, _ = run
    recipe = recipes.build(config(trainable=(r"adapter/.*", r"alignnet/.*")), workdir)
    assert recipe.without == ("vae",)
    batch = next(recipe.data.iterate(0))
    assert batch.moments is not None and batch.text.ids_BT.shape == (4, 64)


def test_damaged_and_missing_features_say_what_to_do(run, tmp_path):
    workdir, folder, _ = run
    with pytest.raises(FileNotFoundError, match=r"no features in .*: make them by python -m"):
        recipes.build(config(features=str(tmp_path)), workdir)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_meta(tmp_path)
    meta = read_meta(folder) | {"version": 0}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="is of version 0, this x2jax reads 1: delete"):
        read_meta(tmp_path)
    only_english = read_meta(folder) | {"languages": ["en"]}
    (tmp_path / "meta.json").write_text(json.dumps(only_english))
    with pytest.raises(ValueError, match=r"text\.language=mixed: the features lack zh"):
        Features(tmp_path, read_meta(folder)["made_of"], "mixed")


def test_a_1024_px_sample_is_as_large_as_the_guide_says(tmp_path):
    """docs/conditioning.md: a record in bfloat16, with instructions of 60 of 512 tokens."""
    recipe = recipes.outline(get_config("1024"))
    vae, align, length = (
        recipe.configs["vae"],
        recipe.configs["alignnet"],
        recipe.config.text.length,
    )
    edge, slots = 1024 // vae.factor, recipe.config.image.slots
    rng = np.random.default_rng(0)

    def noise(*shape):
        return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    def words():
        pads = np.broadcast_to(noise(1, align.text_width), (length - 60, align.text_width))
        txt = np.concatenate([pads, noise(60, align.text_width)])
        return {"txt": txt, "pooled": noise(align.pooled_width)}

    moments = {
        s: {k: noise(edge, edge, vae.latent_channels) for k in ("mean", "logvar")}
        for s in range(slots)
    }
    texts = {"en": words(), "zh": words()}
    assert sum(x.nbytes for of in moments.values() for x in of.values()) == 2_097_152
    assert sum(x.nbytes for x in texts["en"].values()) == 4_195_840
    writer = ShardWriter(tmp_path / "00000.array_record")
    writer.write(record(moments, texts))
    writer.close()
    size = (tmp_path / "00000.array_record").stat().st_size
    assert 2.2e6 < size < 2.8e6, size


COMMAND = (
    "--config configs/x2edit.py --config.data=tiny:96 --config.batch_size=4 --config.held_out=4 "
    "--config.image.buckets=tiny-mixed --config.trainable=('adapter/.*',)"
)
TRAIN = (
    "--config.steps=6 --config.log_every=1 --config.sample_every=1000 --config.preview.steps=1 "
    "--config.text.language=mixed --config.checkpoint_every=100"
)


def start(module, workdir, log, *arguments):
    # One cache for all of them: what is tested is not how long a program takes to compile.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(log.with_name("cache"))}
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | cache
    command = [sys.executable, "-m", module, *COMMAND.split(), "--workdir", str(workdir)]
    with log.open("ab") as f:
        return subprocess.Popen(
            [*command, *arguments], env=environment, stdout=f, stderr=subprocess.STDOUT
        )


def losses(workdir):
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in x.items() if k != "samples_per_second"} for x in lines]
    return [x for x in lines if "loss" in x], [x for x in lines if "held_out_flow" in x]


@pytest.mark.slow
def test_a_killed_precompute_goes_on_and_training_reads_what_it_made(tmp_path):
    """The same bytes after SIGKILL; then the same trajectory with features and without."""
    log, whole, killed = tmp_path / "log", tmp_path / "whole", tmp_path / "killed"
    arguments = ("--config.text.language=mixed", "--shard=16")
    assert start("x2jax.precompute", whole, log, *arguments).wait() == 0, log.read_text()
    expected = files(whole / "features")
    seed = random.randrange(1 << 32)
    print(f"seed of the kills: {seed}")
    rng, kills = random.Random(seed), 0
    for done in (1, 4):
        process = start("x2jax.precompute", killed, log, *arguments)
        while len(list((killed / "features").glob("0*.array_record"))) < done:
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills, "no kill hit a running process"
    assert start("x2jax.precompute", killed, log, *arguments).wait() == 0, log.read_text()
    found = files(killed / "features")
    assert {k: v for k, v in found.items() if not k.endswith(".part")} == expected

    for features in ("", "none"):
        folder = tmp_path / f"train-{features}"
        where = features or str(killed / "features")
        done = start("x2jax.train", folder, log, *TRAIN.split(), f"--config.features={where}")
        assert done.wait() == 0, log.read_text()
    (ours, held), (theirs, held_online) = (losses(tmp_path / f"train-{f}") for f in ("", "none"))
    assert [x["sample_id"] for x in ours] == [x["sample_id"] for x in theirs]
    assert [x["step"] for x in ours] == list(range(1, 7))
    for x, y in zip([*ours, *held], [*theirs, *held_online], strict=True):
        for name in x.keys() - {"step", "sample_id"}:
            assert x[name] == pytest.approx(y[name], rel=1e-5, abs=1e-6), (name, x["step"])
    assert not list(Path(tmp_path / "train-" / "samples").glob("*")), "no decoder, no grids"
