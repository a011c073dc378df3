"""Conversations to what conditions FLUX through an MLLM and AlignNet (spec x2i.md section 3).

A conversation is a list of messages as chat templates of transformers take them:

    [{"role": "user", "content": [{"type": "image", "image": "cat.png"},
                                  {"type": "text", "text": "this cat, in watercolour"}]}]

`image` is a path, a PIL image or a uint8 array, `video` a path or frames (with their `fps`).
Earlier turns of "user" and "assistant", and a "system" message, may come first; a string is one
turn of the user.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from x2jax.encoders.generate import GREEDY, Sampling, generate
from x2jax.encoders.media import open_image, read_video
from x2jax.encoders.qwen2_5_vl import Media, VisionConfig, VisionInputs
from x2jax.encoders.qwen2_5_vl.positions import mrope_positions
from x2jax.encoders.qwen2_5_vl.preprocess import image_patches, pack, smart_resize, video_patches
from x2jax.encoders.tokenize import fingerprint_of, left_padded, longest_prefix, open_tokenizer

Message = Mapping[str, Any]
Conversation = str | Sequence[Message]

EDGE, DIALOGUE_EDGE = 128, 256
"""Pixels a side at which images reach the MLLM, and at which they do in dialogues."""
ANSWER = 128
"""Most tokens of an answer."""
ROLES, KINDS = ("system", "user", "assistant"), ("text", "image", "video")
FPS = 2.0
"""Frames a second that are sampled from video files."""


class MessageInputs(NamedTuple):
    """What `Model.condition` takes of conversations; shapes depend on the `Conditioner` alone.

    Attributes:
      ids_BT, mask_BT: token ids, left-padded, and True where there is a token.
      positions_BT3, deltas_B: rotary positions, and what generation adds to its own; None without a
        vision tower.
      vision: images and videos; None where the `Conditioner` has no room for any.
      select_Bt: places of the tokens whose states condition; None for all.
    """

    ids_BT: Int[np.ndarray, "B T"]
    mask_BT: Bool[np.ndarray, "B T"]
    positions_BT3: Int[np.ndarray, "B T 3"] | None = None
    deltas_B: Int[np.ndarray, "B"] | None = None
    vision: VisionInputs | None = None
    select_Bt: Int[np.ndarray, "B t"] | None = None


class Conditioner:
    """Callable: conversations -> `MessageInputs` of numpy arrays. Runs on the host.

    Attributes:
      length: budget of prompt tokens, those of images and videos included.
      patches: budget of patches a sample.
      truncated: how many conversations were cut.
    """

    def __init__(
        self,
        folder: str | Path,
        vision: VisionConfig | None = None,
        *,
        length: int = 512,
        images: int = 4,
        edge: int = EDGE,
        cut: bool = False,
    ):
        """Opens the tokenizer of a transformers folder.

        Args:
          folder: of the MLLM.
          vision: its vision tower; None for text alone.
          length: budget of tokens a conversation.
          images: how many images a conversation may have; two frames of a video count as one. 0
            leaves the tower out of the program.
          edge: pixels a side of an image, brought to whole tokens: 128 is 140 for Qwen2.5-VL.
          cut: whether the last message's text is cut at its end where a conversation has too many
            tokens, as training does; else that is an error.

        Raises:
          ValueError: no tokenizer, or one without a chat template or a pad token.
        """
        self._tokenizer = open_tokenizer(folder)
        self._folder, self._vision = folder, vision
        self.length, self.images, self.edge, self.patches = length, images, edge, 0
        self._cut, self.truncated = cut, 0
        if vision is not None:
            self._size = resized(edge, vision)
            self.patches = patch_budget(images, edge, vision)

    @property
    def record(self) -> dict[str, Any]:
        """What made the inputs: to be kept, and compared, with what came of them."""
        return {
            "length": self.length,
            "images": self.images,
            "edge": self.edge,
            "tokenizer": fingerprint_of(self._tokenizer),
        }

    def __call__(self, conversations: Sequence[Conversation]) -> MessageInputs:
        """Inputs for conversations that end with a user's turn, or with an answer.

        Raises:
          ValueError, FileNotFoundError: an empty or malformed conversation, one that exceeds the
            budget of tokens or patches, an image or video that cannot be read, or one for a model
            without a vision tower; says which sample.
        """
        return self._inputs(self._all(conversations), self.length)

    def answered(
        self,
        conversations: Sequence[Conversation],
        answers: Sequence[Sequence[int]],
        states: Literal["answer", "all"] = "answer",
        *,
        count: int = ANSWER,
    ) -> MessageInputs:
        """Inputs with generated answers behind the conversations.

        Args:
          answers: token ids, as `answer` gives them.
          states: "answer" conditions on the states of the answer alone (reasoning), "all" on those
            of conversation and answer, one after another along the token axis (dialogue).
          count: budget of tokens of an answer.

        Raises:
          ValueError: answers that are empty or exceed `count`, or as `__call__`.
        """
        samples = self._all(conversations)
        for b, answer in enumerate(answers):
            if not 0 < len(answer) <= count:
                raise ValueError(f"sample {b}: an answer of {len(answer)} tokens, not 1..{count}")
        rows = [(ids + list(a), m) for (ids, m), a in zip(samples, answers, strict=True)]
        # Wherever an answer is shorter than `count`, this leaves a pad in front of its row.
        inputs = self._inputs(rows, self.length + count)
        if states == "all":
            return inputs
        # DIFFERS: the published code has one sample and no pads. Here they stand as in a text.
        places = np.tile(np.arange(-count, 0, dtype=np.int32) + self.length + count, (len(rows), 1))
        for b, answer in enumerate(answers):
            places[b, : count - len(answer)] = 0
        return inputs._replace(select_Bt=places)

    def answer(
        self,
        mllm: Any,
        conversations: Sequence[Conversation],
        *,
        count: int = ANSWER,
        sampling: Sampling = GREEDY,
        key: Any = None,
    ) -> list[list[int]]:
        """What the MLLM answers, as token ids without the one that ends it; `text` reads them.

        Args:
          mllm: an `x2jax.encoders.qwen2_5_vl.Qwen2_5_VL`.
          count: most tokens.
          sampling, key: as `x2jax.encoders.generate.generate` takes them.
        """
        inputs = self(conversations)
        ends = [self._tokenizer.eos_token_id, self._tokenizer.pad_token_id]

        def run(mllm, x: MessageInputs, key):
            return generate(
                mllm,
                x.ids_BT,
                x.mask_BT,
                count=count,
                eos=ends,
                pad=ends[1],
                sampling=sampling,
                key=key,
                positions_BT3=x.positions_BT3,
                deltas_B=x.deltas_B,
                vision=x.vision,
                keep_states=False,
            )

        out = jax.device_get(jax.jit(run)(mllm, inputs, key))
        rows = [t[:n].tolist() for t, n in zip(out.tokens_BG, out.lengths_B, strict=True)]
        return [row[:-1] if row[-1] in ends else row for row in rows]

    def text(self, answer: Sequence[int]) -> str:
        """An answer in words."""
        return self._tokenizer.decode(answer, skip_special_tokens=True)

    def _all(self, conversations: Sequence[Conversation]) -> list[tuple[list[int], list[Media]]]:
        out = []
        for b, conversation in enumerate(conversations):
            try:
                out.append(self._sample(conversation))
            except (ValueError, FileNotFoundError) as e:
                raise type(e)(f"sample {b}: {e}") from None
        return out

    def _sample(self, conversation: Conversation) -> tuple[list[int], list[Media]]:
        """Token ids, each image's repeated as often as it has tokens, and the images."""
        messages, items = _parsed(conversation)
        if items and self._vision is None:
            raise ValueError(
                f"it has images or videos, but {self._folder} was opened without a vision tower: "
                "give the VisionConfig of its config.json"
            )
        media = [self._media(kind, item) for kind, item in items]
        patches = sum(len(m.patches_PC) for m in media)
        if patches > self.patches:
            raise ValueError(
                f"its images and videos have {patches} patches, the budget is {self.patches} "
                f"({self.images} images of {self.edge} px): send fewer, or raise `images`"
            )
        ids = self._tokens(messages, media)
        if len(ids) > self.length and self._cut:
            self.truncated += 1
            fits = lambda text: len(self._tokens(_ending(messages, text), media)) <= self.length  # noqa: E731
            ids = self._tokens(_ending(messages, longest_prefix(_end(messages), fits)), media)
        if len(ids) > self.length:
            seen = sum(self._vision.tokens(m.grid) for m in media) if self._vision else 0
            raise ValueError(
                f"{len(ids)} tokens, {seen} of them of images and videos; the budget is "
                f"{self.length}: shorten the text, send fewer images, or raise `length`"
            )
        return ids, media

    def _tokens(self, messages: list[dict[str, Any]], media: list[Media]) -> list[int]:
        last = messages[-1]["role"]
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=last != "assistant"
            )
        except Exception as e:  # a template raises what it likes
            raise ValueError(
                f"the chat template in {self._folder} cannot render this conversation "
                f"({type(e).__name__}: {e})"
            ) from None
        ids = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if self._vision is None:
            return ids
        cfg, out, rest = self._vision, [], list(media)
        tokens = {cfg.image_token: "image", cfg.video_token: "video"}
        for token in ids:
            if token not in tokens:
                out.append(token)
            elif rest and rest[0].kind == tokens[token]:
                out += [token] * cfg.tokens(rest.pop(0).grid)
            else:
                raise ValueError(
                    f"its text holds {self._tokenizer.decode([token])}, which stands for images "
                    "and videos: remove it"
                )
        if rest:
            raise ValueError(
                f"the chat template in {self._folder} leaves out {len(rest)} of {len(media)} "
                "images and videos: take the folder of a Qwen2.5-VL Instruct model"
            )
        return out

    def _media(self, kind: str, item: Mapping[str, Any]) -> Media:
        assert self._vision is not None
        source, size = item[kind], self._size
        if kind == "image":
            image = open_image(source) if isinstance(source, (str, Path)) else source
            return image_patches(image, self._vision, size=size)
        if isinstance(source, (str, Path)):
            most = self.images * self._vision.temporal_patch
            found = read_video(source, fps=item.get("fps", FPS), max_frames=max(most, 1))
            return video_patches(found.frames_FHW3, self._vision, fps=found.fps, size=size)
        if "fps" not in item:
            raise ValueError("frames of a video need their rate: 'fps', in frames a second")
        return video_patches(source, self._vision, fps=item["fps"], size=size)

    def _inputs(self, rows: Sequence[tuple[list[int], list[Media]]], length: int) -> MessageInputs:
        pad = self._tokenizer.pad_token_id
        ids, mask = left_padded([ids for ids, _ in rows], length, pad)
        if self._vision is None or not self.patches:
            return MessageInputs(ids, mask)
        media = [m for _, m in rows]
        positions, deltas = mrope_positions(ids, mask, media, self._vision)
        return MessageInputs(ids, mask, positions, deltas, pack(media, self._vision, self.patches))


def message_shapes(
    batch: int, *, length: int, images: int, edge: int, vision: VisionConfig
) -> MessageInputs:
    """Shapes of what a `Conditioner` makes of `batch` conversations."""

    def array(dtype: str, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    patches = patch_budget(images, edge, vision)
    return MessageInputs(
        array("int32", length),
        array("bool", length),
        array("int32", length, 3),
        array("int32"),
        VisionInputs(
            array("float32", patches, vision.patch_width),
            array("int32", patches, 2),
            array("int32", patches),
            array("int32", patches),
            array("int32", patches // vision.merge**2),
        ),
    )


def resized(edge: int, vision: VisionConfig) -> tuple[int, int]:
    """(height, width) in pixels of a square image of `edge` pixels in whole tokens."""
    return smart_resize(edge, edge, factor=vision.factor, min_pixels=1, max_pixels=1 << 30)


def patch_budget(images: int, edge: int, vision: VisionConfig) -> int:
    """Patches of so many square images."""
    height, width = resized(edge, vision)
    return images * height * width // vision.patch**2


def _end(messages: list[dict[str, Any]]) -> str:
    """The text that the last message ends with; empty where it ends with something else."""
    content = messages[-1]["content"]
    return content if isinstance(content, str) else content[-1].get("text", "")


def _ending(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The same messages with another text at the end."""
    content = messages[-1]["content"]
    if isinstance(content, str):
        content = text
    elif content[-1]["type"] == "text":
        content = [*content[:-1], {"type": "text", "text": text}]
    return [*messages[:-1], messages[-1] | {"content": content}]


def _parsed(conversation: Conversation) -> tuple[list[dict[str, Any]], list[tuple[str, Any]]]:
    """Messages as chat templates take them, and images and videos in order."""
    if isinstance(conversation, str):
        conversation = [{"role": "user", "content": conversation}]
    if not conversation:
        raise ValueError("an empty conversation: it needs at least one message")
    messages, items = [], []
    for n, message in enumerate(conversation):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {n} has role {role!r}: use one of {', '.join(ROLES)}")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence) or not content:
            raise ValueError(f"message {n} has no content: give a string, or a list of items")
        for item in content:
            kind = item.get("type")
            if kind not in KINDS or kind not in item:
                raise ValueError(
                    f"message {n} has an item of type {kind!r} with keys {sorted(item)}: use "
                    '{"type": T, T: ...} with T one of ' + ", ".join(KINDS)
                )
        items += [(item["type"], item) for item in content if item["type"] != "text"]
        if all(item["type"] == "text" for item in content):
            # Templates of models without a tower know nothing but strings.
            messages.append({"role": role, "content": "".join(item["text"] for item in content)})
        else:
            shown = [i if i["type"] == "text" else {"type": i["type"]} for i in content]
            messages.append({"role": role, "content": shown})
    return messages, items
