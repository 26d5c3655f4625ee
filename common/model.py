"""Models and tokenizers by path or hub id, and what must hold between two of them."""

from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from common.logprob import head_weight, hidden_states
from common.run import ROOT, UserError, check, one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

logging.set_verbosity_error()
logging.disable_progress_bar()


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check(
        device != "cuda" or torch.cuda.is_available(),
        "--device cuda, but torch sees no GPU; use --device cpu",
    )
    return torch.device(device)


def model_path(name: str) -> str:
    """`toy/teacher` and `toy/student` work from any folder; all else stands as it is."""
    if not Path(name).exists() and (ROOT / name / "config.json").exists():
        return str(ROOT / name)
    return name


def _find(name: str) -> str:
    """`name` as a path or hub id that exists. One question: the hub's loader retries for 30 s."""
    path = model_path(name)
    if Path(path).exists():
        check((Path(path) / "config.json").is_file(), f"model folder {name} has no config.json")
        return path
    try:
        if try_to_load_from_cache(path, "config.json") is None:
            HfApi().model_info(path, timeout=20)
    except Exception as error:  # a dozen types; each of them means that there is no model
        reason = one_line(error)
        message = f"model {name} is neither a local folder nor a hub id that answers ({reason})"
        raise UserError(message) from error
    return path


def _load(load, name: str, **kwargs):
    path = _find(name)
    try:
        return load(path, trust_remote_code=False, **kwargs)  # False: None would ask on stdin
    except Exception as error:  # a damaged file, a missing package, an unknown architecture ...
        raise UserError(f"cannot load {name}: {one_line(error)}") from error


def load_tokenizer(name: str, teacher: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of `name`. The teacher's, if one is given, must mean the same by every token:
    distillation compares distributions token by token."""
    tokenizer = _load(AutoTokenizer.from_pretrained, name)
    check(
        tokenizer.chat_template is not None, f"{name} has no chat template; use an instruct model"
    )
    check(tokenizer.eos_token_id is not None, f"the tokenizer of {name} has no EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks go by length, never by token
    if teacher is not None:
        theirs = _load(AutoTokenizer.from_pretrained, teacher).get_vocab()
        differing = len(dict(tokenizer.get_vocab().items() ^ theirs.items()))
        check(
            differing == 0,
            f"teacher {teacher} and student {name} have different vocabularies ({differing} tokens "
            "differ); choose two models of one family",
        )
    return tokenizer


def load_model(
    name: str, dtype: str, device: torch.device, trainable: bool = False
) -> PreTrainedModel:
    """A causal language model: float32 weights if trainable, whatever `dtype`; else in it."""
    weights_dtype = torch.float32 if trainable else DTYPES[dtype]
    kwargs = {"dtype": weights_dtype, "use_safetensors": True}  # a pickle could run code
    model = _load(AutoModelForCausalLM.from_pretrained, name, **kwargs).to(device)
    model.requires_grad_(trainable)
    model.eval()  # never train(): dropout would make the sampled and the trained policy differ
    _check_head(model, name)
    return model


@torch.no_grad()
def _check_head(model: PreTrainedModel, name: str) -> None:
    """The chunked head is hidden @ W.T: a model that scales or caps logits would train wrong."""
    ids = torch.arange(4, device=model.device)[None]
    with torch.autocast(model.device.type, enabled=False):
        expected = model(input_ids=ids, use_cache=False).logits[0]
    hidden = hidden_states(model, ids, torch.ones_like(ids, dtype=torch.bool), model.dtype)
    same = torch.allclose(
        (hidden @ head_weight(model, model.dtype).T).float(), expected.float(), rtol=0.05, atol=0.05
    )
    check(
        same,
        f"{name} ({type(model).__name__}) scales or caps its logits behind the head: not supported",
    )
