"""Configs: each file has `get_config(arg)`; run with `--config configs/FILE.py:ARG`."""
