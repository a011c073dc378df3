"""Instructions read together with the pictures that they change, as X2I reads them."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from x2jax.conditioning import EDGE, Conditioner, MessageInputs
from x2jax.encoders.qwen2_5_vl import VisionConfig
from x2jax.encoders.tokenize import prompt


class PictureTokenizer:
    """Callable: instructions and the images of their samples -> `MessageInputs`.

    A sample is one turn of the user: its sources, then the instruction, cut at its end where it
    does not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        vision: VisionConfig,
        *,
        length: int,
        template: str,
        sources: int,
        edge: int = EDGE,
    ):
        """Opens the tokenizer of a transformers folder.

        Args:
          length: budget of tokens, those of the sources included.
          template: one of `x2jax.encoders.tokenize.TEMPLATES`.
          sources: most sources of a sample.
          edge: pixels a side at which they are seen; 128 as in X2I (spec x2i.md section 3).

        Raises:
          ValueError: an unknown template, or as `Conditioner`.
        """
        prompt("", template)
        self.template = template
        self._conditioner = Conditioner(
            folder, vision, length=length, images=sources, edge=edge, cut=True
        )

    @property
    def record(self) -> dict[str, Any]:
        """What made the inputs: to be kept, and compared, with what came of them."""
        return self._conditioner.record | {"template": self.template}

    @property
    def truncated(self) -> int:
        """How many instructions were cut."""
        return self._conditioner.truncated

    def __call__(
        self,
        instructions: list[str],
        pixels_BSHW3: UInt8[np.ndarray, "B S H W 3"],
        sizes_BS2: Int[np.ndarray, "B S 2"],
    ) -> MessageInputs:
        """Slot 0, the target, is not looked at; nor are empty slots."""
        conversations = []
        for text, pixels, sizes in zip(instructions, pixels_BSHW3, sizes_BS2, strict=True):
            content: list[dict[str, Any]] = [
                {"type": "image", "image": image[:height, :width]}
                for image, (height, width) in zip(pixels[1:], sizes[1:], strict=True)
                if height and width
            ]
            content.append({"type": "text", "text": prompt(text, self.template)})
            conversations.append([{"role": "user", "content": content}])
        return self._conditioner(conversations)


def read(tokenize: Any, texts: list[str], pixels: Any, sizes: Any) -> Any:
    """`Batch.text` of some samples by a tokenizer of texts, or of texts and pictures."""
    if isinstance(tokenize, PictureTokenizer):
        return tokenize(texts, pixels, sizes)
    return tokenize(texts)
