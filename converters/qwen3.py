"""Qwen3 text models as transformers saves them (`Qwen3ForCausalLM`)."""

from converters.decoder import DecoderSizes, decoder_rules
from converters.rules import Table


def qwen3_table(cfg: DecoderSizes) -> Table:
    """Names of transformers and paths of `x2jax.encoders.qwen3.Qwen3`."""
    rules, ignore = decoder_rules(cfg, "model.")
    return Table("Qwen3, transformers", tuple(rules), tuple(ignore))
