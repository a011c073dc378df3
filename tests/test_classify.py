"""The task classifier: its confidence against teacher forcing of every name, model by model."""

import shutil

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3ForCausalLM
from transformers import Qwen3Config as TheirQwen3Config

from tests import parity
from tests.encoders.test_qwen_vision import VISION
from x2jax import classify
from x2jax.data.tasks import TASKS
from x2jax.encoders.choose import tree
from x2jax.encoders.qwen2_5_vl import QWEN_TINY, QwenConfig
from x2jax.encoders.qwen3 import Qwen3Config
from x2jax.sources import TINY
from x2jax.tiny import edits

INSTRUCTIONS = ["make the sky pink", "把左边的圆删除", "turn it into a pencil drawing, please"]
LENGTH = 64
SIZES = (2, 32, 4, 2)


def qwen3():
    cfg = Qwen3Config(*SIZES, 16, 48, QWEN_TINY.vocab, False)
    return Qwen3ForCausalLM(TheirQwen3Config(**cfg.to_transformers()))


def qwen2_5_vl():
    cfg = QwenConfig(*SIZES, 48, QWEN_TINY.vocab, False, (1, 1, 2))
    config = Qwen2_5_VLConfig(text_config=cfg.to_transformers(), **VISION.to_transformers())
    return Qwen2_5_VLForConditionalGeneration(config)


@pytest.fixture(scope="module", params=[qwen3, qwen2_5_vl], ids=lambda f: f.__name__)
def model_and_folder(request, tmp_path_factory):
    """A random model as transformers saves it, with the tiny family's tokenizer."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    model = parity.randomise(request.param())
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / "qwen" / file, folder)
    return model, folder


def teacher_forced(model, questions, text):
    """Normalised probability of each name, every sequence read on its own, without padding."""
    start, scores = questions._encode(text), []
    for answer in questions.answers(classify.NAMES):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([start + answer])).logits[0]
        each = torch.log_softmax(logits[len(start) - 1 : -1], -1)
        scores.append(float(each[torch.arange(len(answer)), torch.tensor(answer)].sum()))
    return torch.softmax(torch.tensor(scores), 0).numpy()


def test_confidence_equals_brute_force(model_and_folder):
    model, folder = model_and_folder
    found = classify.Classifier(str(folder), wording="raw", length=LENGTH, batch=2, dtype="float32")
    answers = found(INSTRUCTIONS)
    assert found._run._cache_size() == 1, "a rest of a batch must not compile anew"
    for text, answer in zip(INSTRUCTIONS, answers, strict=True):
        expected = teacher_forced(model, found._questions, text)
        mine = np.array(list(answer.probabilities.values()))
        np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-6)
        assert answer.task == 1 + expected.argmax() and answer.name == TASKS[answer.task]
        assert answer.confidence == mine.max() and abs(mine.sum() - 1) < 1e-5
    assert len({tuple(a.probabilities.values()) for a in answers}) == 3
    np.testing.assert_allclose(
        list(found(INSTRUCTIONS[1:2])[0].probabilities.values()),
        list(answers[1].probabilities.values()),
        rtol=1e-4,
    )


def test_the_tree_merges_beginnings():
    found = tree([[5, 6, 9], [5, 7, 9], [8, 9]])
    assert found.tokens_M.tolist() == [5, 6, 9, 7, 9, 8, 9]
    assert found.parents_M.tolist() == [-1, 0, 1, 0, 3, -1, 5]
    assert found.depths_M.tolist() == [0, 1, 2, 1, 2, 0, 1]
    assert found.nodes_CM.sum(axis=1).tolist() == [3, 3, 2]
    assert np.flatnonzero(found.sees_MM[4]).tolist() == [0, 3, 4]
    for wrong in ([[1], []], [[1, 2], [1]], [[1, 2], [1, 2]]):
        with pytest.raises(ValueError, match="must differ, hold a token, and not begin"):
            tree(wrong)


def test_the_command_classifies_with_the_tiny_family(capsys):
    prompts = [a for text in INSTRUCTIONS[:2] for a in ("--prompt", text)]
    assert classify.main(["--mllm", "tiny", "--length", "64", *prompts]) == 0
    out = capsys.readouterr().out
    assert out.count("confidence 0.") + out.count("confidence 1.") == 2
    assert all(text in out for text in INSTRUCTIONS[:2])


def test_the_tiny_family_names_the_tasks_of_instructions_that_it_has_not_read():
    tasks = [1 + k % 15 for k in range(30)]
    samples = [edits.edit(77, k, task) for k, task in enumerate(tasks)]
    ask = classify.Classifier("tiny", length=LENGTH, batch=30, dtype="float32")
    for texts in ([s.instruction_en for s in samples], [s.instruction_zh for s in samples]):
        right = [answer.task == task for answer, task in zip(ask(texts), tasks, strict=True)]
        assert np.mean(right) > 0.5, "chance is 1 in 15"


def test_wrong_requests_say_what_to_do(tmp_path, capsys):
    assert classify.main(["--mllm", str(tmp_path / "no"), "--prompt", "x"]) == 1
    assert "does not exist; needs a transformers folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert classify.main(["--mllm", str(tmp_path), "--prompt", "x"]) == 1
    assert "type 'llama'; known are qwen2_5_vl, qwen3" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}{")
    assert classify.main(["--mllm", str(tmp_path), "--prompt", "x"]) == 1
    assert "is not JSON" in capsys.readouterr().err
    assert classify.main(["--mllm", "tiny", "--length", "4", "--prompt", "x"]) == 1
    assert "text length 4 is too short" in capsys.readouterr().err
    assert classify.main(["--mllm", "tiny", "--length", "64", "--prompt", " "]) == 1
    assert "instructions [0] are empty: say what to change" in capsys.readouterr().err


def test_every_task_has_a_name_and_a_hint():
    text = classify.explained("make the sky pink")
    assert "make the sky pink" in text and len(classify.NAMES) == 15
    assert all(f"- {name}: " in text for name in classify.NAMES)
