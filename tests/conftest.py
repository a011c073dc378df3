"""Every test runs on CPU, as four devices, in full float32."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4".strip()

import jax  # noqa: E402  (the flags above must come first)

jax.config.update("jax_default_matmul_precision", "highest")
