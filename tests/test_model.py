"""What is checked of models and tokenizers, and what must hold between two."""

import json
import shutil

import pytest
import torch
from conftest import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common.model import save as saving
from common.model.load import check_shapes, empty_model, load_model
from common.model.shard import make_buffers
from common.model.tokenizer import end_ids, load_tokenizer, share_end_ids
from common.run.errors import UserError
from common.run.inputs import ROOT
from common.sampling.torch_engine import TorchEngine

CPU = torch.device("cpu")
EOS, OTHER_EOS = "<|im_end|>", "<|endoftext|>"


def changed_copy(folder, template: str | None = "", eos: str = EOS, **generation):
    """The toy student with another template (None: without) and EOS, as base models are."""
    shutil.copytree(ROOT / "toy" / "student", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = eos
    if template != "":
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ids))
    (folder / "generation_config.json").write_text(json.dumps(ids | generation))
    return folder


@pytest.fixture
def base(tmp_path):
    return str(changed_copy(tmp_path / "base", template=None, eos=OTHER_EOS))


def test_a_base_model_is_trained_on_its_teachers_template(base, capsys):
    with pytest.raises(UserError, match="has no chat template; name a .jinja .* --chat_template"):
        load_tokenizer(base)
    tokenizer, teacher = load_tokenizer(base, "toy/teacher"), load_tokenizer("toy/teacher")
    assert tokenizer.chat_template == teacher.chat_template
    assert "is trained on that of toy/teacher" in capsys.readouterr().out
    assert load_tokenizer(base, chat_template="toy/teacher").chat_template
    assert capsys.readouterr().out == ""


def test_different_templates_are_told(tmp_path, capsys):
    load_tokenizer("toy/student", "toy/teacher")
    assert capsys.readouterr().out == ""
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    other = str(changed_copy(tmp_path / "other", template))
    load_tokenizer(other, "toy/teacher")
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "have different chat templates" in printed


def test_a_turn_ends_at_the_eos_of_either_model(base):
    """One vocabulary, two EOS: a student would learn its teacher's, and never stop."""
    tokenizer = load_tokenizer(base, "toy/teacher")
    eos, other = (tokenizer.convert_tokens_to_ids(token) for token in (EOS, OTHER_EOS))
    student, teacher = (load_model(name, "float32", CPU) for name in (base, "toy/teacher"))
    assert tokenizer.eos_token_id == other
    assert eos in end_ids(tokenizer)  # the template writes it behind an answer
    share_end_ids(tokenizer, student, teacher)
    for model in (student, teacher):
        assert set(model.generation_config.eos_token_id) == {eos, other}
        assert set(TorchEngine(model, tokenizer).eos_ids.tolist()) == {eos, other}


def test_the_end_of_a_turn_is_read_from_configs_too(tokenizer):
    model = tiny_model(tokenizer)
    model.generation_config.eos_token_id, model.config.eos_token_id = [11, 12], 13
    assert set(end_ids(tokenizer, model)) == {11, 12, 13, tokenizer.eos_token_id}


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
        {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
    ],
)
def test_what_loads_can_be_saved(tmp_path, settings):
    """Published generation configs are ones that save_pretrained refuses."""
    folder = changed_copy(tmp_path / "model", **settings)
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        GenerationConfig.from_pretrained(folder).save_pretrained(tmp_path / "refused")
    model = load_model(str(folder), "float32", CPU)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    assert again.eos_token_id == model.generation_config.eos_token_id is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_saved_in_float32_in_files_of_bounded_size(tokenizer, tmp_path, dtype, tied):
    """Whatever it computes in; and loads as transformers' own save does."""
    model = tiny_model(tokenizer, tie_word_embeddings=tied).to(dtype)
    saving.save_model(model, tmp_path / "parts", file_size="20KB")
    model.float().save_pretrained(tmp_path / "whole")
    sizes = [path.stat().st_size for path in (tmp_path / "parts").glob("*.safetensors")]
    assert len(sizes) > 1
    assert max(sizes) < 25_000
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("parts", "whole")
    )
    assert ours.dtype == theirs.dtype == torch.float32
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(state[name].equal(expected[name]) for name in expected)


def test_what_is_trained_has_float32_weights():
    """Pure bfloat16 weights do not move at a rate of 1e-6."""
    for dtype, trainable, expected in (
        ("bfloat16", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
        ("float32", False, torch.float32),
    ):
        model = load_model("toy/student", dtype, CPU, trainable)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert {parameter.requires_grad for parameter in model.parameters()} == {trainable}


def test_an_ordinary_token_that_a_template_writes_behind_an_answer_ends_no_turn(tokenizer):
    template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    dotted = AutoTokenizer.from_pretrained(ROOT / "toy" / "student")
    dotted.chat_template = template
    assert end_ids(dotted) == [dotted.eos_token_id]


def test_lengths_beyond_the_models_positions():
    names = ("toy/student", "toy/teacher")
    check_shapes(*names, length=512)
    with pytest.raises(UserError, match="are 513 together, and toy/student takes at most 512"):
        check_shapes(*names, length=513)


SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
ROPES = {
    "llama": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "qwen3": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    | {"original_max_position_embeddings": 64},
    "gemma3_text": None,  # two kinds of layers with two rotations; embeddings are scaled
}


@pytest.mark.parametrize("family", ROPES)
def test_what_is_in_no_file_is_computed_as_transformers_does(family):
    """Where a model is sharded, its layers are made without memory: buffers too."""
    rope = {"rope_parameters": ROPES[family]} if ROPES[family] else {}
    config = AutoConfig.for_model(family, **SMALL, **rope)
    expected = AutoModelForCausalLM.from_config(config).eval()
    model = empty_model(config, torch.float32).eval()
    model.to_empty(device="cpu").load_state_dict(expected.state_dict())
    for _, buffer in model.named_buffers():
        buffer.fill_(torch.nan)
    make_buffers(model, CPU)
    buffers = dict(model.named_buffers())
    assert buffers
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, msg=name)
    ids = torch.arange(50)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)
