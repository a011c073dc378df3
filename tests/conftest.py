"""Every test runs on CPU, as four devices, in full float32."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Torch's models are small here: its threads would mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
FLAGS = {
    "xla_force_host_platform_device_count": 4,
    # Tests compile a lot and compute little: a third less processor time.
    "xla_backend_optimization_level": 0,
}
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [given, *(f"--{name}={value}" for name, value in FLAGS.items() if name not in given)]
).strip()

import jax  # noqa: E402  (the flags above must come first)

jax.config.update("jax_default_matmul_precision", "highest")
