"""What the tables of Qwen's decoders share: embedding, layers, final norm and output head."""

from typing import Protocol

from converters.rules import Rule, T, rule


class DecoderSizes(Protocol):
    """What the rules need of a decoder's config."""

    layers: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool


def decoder_rules(cfg: DecoderSizes, root: str) -> tuple[list[Rule], list[str]]:
    """Rules between transformers' names and the paths of `x2jax.encoders.decoder.Decoder`.

    Args:
      cfg: sizes.
      root: what stands before `layers`, `embed_tokens` and `norm`, such as "model.".

    Returns:
      The rules, and patterns of names that are known and left out.
    """
    layer, layers = root + "layers.{i}.", range(cfg.layers)

    def leaf(name: str, kind: str, ours: str, *ops) -> Rule:
        path = f"layers/{name.replace('.', '/')}/{ours}"
        return rule(f"{layer}{name}.{kind}", path, *ops, at=("i",), i=layers)

    rules = [
        rule(f"{root}embed_tokens.weight", "embed_tokens/embedding"),
        rule(f"{root}norm.weight", "norm/scale"),
    ]
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["self_attn.q_norm", "self_attn.k_norm"] if cfg.qk_norm else []
    rules += [leaf(name, "weight", "scale") for name in norms]
    qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    rest = ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    rules += [leaf(name, "weight", "kernel", T) for name in qkv + rest]
    rules += [leaf(name, "bias", "bias") for name in qkv if cfg.qkv_bias]
    if cfg.tied:  # a tied head repeats the embedding
        return rules, [r"lm_head\.weight"]
    return [*rules, rule("lm_head.weight", "lm_head/kernel", T)], []
