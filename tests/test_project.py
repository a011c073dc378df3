"""The project keeps its own rules."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    p for folder in ("x2jax", "converters", "configs") for p in (ROOT / folder).rglob("*.py")
)
BLOCKED = ("torch", "diffusers", "torchvision", "tensorflow", "flax.linen")


def module(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def test_everything_imports_without_torch():
    names = [module(p) for p in SOURCES if p.name != "__main__.py"]
    code = (
        "import importlib, sys\n"
        f"for name in {BLOCKED[:4]}: sys.modules[name] = None\n"
        f"for name in {names}: importlib.import_module(name)\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_package_never_imports_torch():
    wrong = []
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = re.match(r"\s*(?:import|from)\s+([\w.]+)", line)
            if found and found[1].startswith(BLOCKED) and path.name != "pickles.py":
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small_and_say_what_they_are(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert text.startswith('"""'), "a module starts with what it is for"


def test_commands_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^\s+make ([\w-]+)", text, re.M))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{t}:", makefile, re.M) for t in targets)
    for name in set(re.findall(r"python -m ([\w.]+)", text)):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), f"README links to {link}"


def test_the_embedded_family_is_small():
    weights = ROOT / "x2jax" / "tiny" / "weights"
    total = sum(p.stat().st_size for p in weights.rglob("*") if p.is_file())
    assert 1e6 < total <= 12e6
