"""Models and tokenizers by path or hub id, and what must hold between two."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import HfApi, try_to_load_from_cache
from torch.utils.checkpoint import checkpoint

from common.model.head import head_weight, hidden_states
from common.model.lora import BaseOf, add_adapters, set_adapters
from common.model.shard import DTYPES, device_of, make_buffers, read_shards, shard
from common.run.errors import UserError, check, one_line
from common.run.inputs import model_path
from common.run.lazy import transformers
from common.tasks.data import prompt_text


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
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        hint = "accept its licence on its page of the hub, and log in: hf auth login"
        check(not refused, f"model {name} is gated, or does not exist: {hint}")
        reason = one_line(error)
        message = f"model {name} is neither a local folder nor a hub id that answers ({reason})"
        raise UserError(message) from error
    return path


def _load(kind: str, name: str, **kwargs):
    """transformers' AutoConfig, AutoTokenizer or AutoModelForCausalLM of that name."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = _find(name)
    try:
        load = getattr(transformers, kind).from_pretrained
        return load(path, trust_remote_code=False, **kwargs)  # False: None would ask on stdin
    except Exception as error:  # a damaged file, a missing package, an unknown architecture ...
        raise UserError(f"cannot load {name}: {one_line(error)}") from error


def load_tokenizer(
    name: str, teacher: str | None = None, chat_template: str | None = None
) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer of `name`; with the chat template of `chat_template`, a model or a .jinja file,
    if one is given.

    The teacher's, if one is given, must mean the same by every token: distillation compares
    distributions token by token. A base model without a template is trained on its teacher's.
    """
    tokenizer = _load("AutoTokenizer", name)
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
        try:
            prompt_text(tokenizer, [{"role": "user", "content": "1+1"}])
        except Exception as error:  # what a template raises is its own affair
            reason = one_line(error)
            message = f"--chat_template {chat_template} cannot be used: {reason}"
            raise UserError(message) from error
    theirs = None if teacher is None else _load("AutoTokenizer", teacher)
    if theirs is not None and tokenizer.chat_template is None:
        print(f"{name} has no chat template: it is trained on that of {teacher}")
        tokenizer.chat_template = theirs.chat_template
    check(
        tokenizer.chat_template is not None,
        f"{chat_template or name} has no chat template; name a .jinja file, or a model of the same "
        "family that has one, with --chat_template",
    )
    check(tokenizer.eos_token_id is not None, f"the tokenizer of {name} has no EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks go by length, never by token
    if theirs is not None:
        differing = len(dict(tokenizer.get_vocab().items() ^ theirs.get_vocab().items()))
        check(
            differing == 0,
            f"teacher {teacher} and student {name} have different vocabularies ({differing} tokens "
            "differ); choose two models of one family",
        )
        asked = [{"role": "user", "content": "1+1"}]
        if theirs.chat_template and prompt_text(theirs, asked) != prompt_text(tokenizer, asked):
            print(f"{name} and {teacher} have different chat templates: prompts are {name}'s")
    return tokenizer


def _read_template(source: str) -> str | None:
    if not source.endswith(".jinja"):
        return _load("AutoTokenizer", source).chat_template
    try:
        return Path(source).read_text()
    except OSError as error:
        raise UserError(f"cannot read --chat_template {source}: {error.strerror}") from error


def lacks_chat_template(name: str) -> bool:
    """Whether a model that is on this machine has none."""
    path = model_path(name)
    here = Path(path).exists() or try_to_load_from_cache(path, "tokenizer_config.json")
    return bool(here) and _load("AutoTokenizer", name).chat_template is None


def end_ids(tokenizer, *models) -> list[int]:
    """Every id that ends a turn: the tokenizer's EOS, what the chat template writes behind an
    answer, and those of the models' configs. A base model has another EOS than its instruct
    siblings."""
    ids = {tokenizer.eos_token_id}
    turn = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("2")[2]
    behind = tokenizer(text, add_special_tokens=False)["input_ids"][:1]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids |= special.intersection(behind)
    for config in (c for model in models for c in (model.generation_config, model.config)):
        listed = getattr(config, "eos_token_id", None)
        ids |= set(listed) if isinstance(listed, list) else {listed}
    return sorted(ids - {None})


def share_end_ids(tokenizer, *models) -> None:
    """Let what ends a turn of one model end those of all of them: a student that learns to write
    its teacher's EOS would else never stop. Goes into what is saved of them."""
    ids = end_ids(tokenizer, *models)
    for model in models:
        model.generation_config.eos_token_id = ids


def check_shapes(args, *names: str) -> None:
    """Positions that a model was not made for give nonsense, and no error; adapters may be wider
    than a layer of the first model, which is trained."""
    length = args.max_prompt_tokens + args.max_new_tokens
    if getattr(args, "lora_rank", 0):
        with torch.device("meta"):
            config = _load("AutoConfig", names[0])
            model = transformers.AutoModelForCausalLM.from_config(config)
            add_adapters(model, args.lora_rank, args.lora_alpha)
    for name in names:
        limit = _load("AutoConfig", name).get_text_config().max_position_embeddings
        check(
            length <= limit,
            f"--max_prompt_tokens and --max_new_tokens are {length} together, and {name} takes at "
            f"most {limit} tokens",
        )


def _make_savable(config: "transformers.GenerationConfig") -> None:
    """Published ones hold a temperature for greedy decoding, which save_pretrained refuses: at the
    end of training. None of these settings is used here."""
    try:
        config.validate(strict=True)
    except ValueError:
        ids = {n: v for n, v in config.to_diff_dict().items() if n.endswith("_token_id")}
        config.__dict__.update(transformers.GenerationConfig(**ids).__dict__)


def load_model(
    name: str, dtype: str, device: torch.device, trainable: bool = False
) -> "transformers.PreTrainedModel":
    """A causal language model: float32 weights if trainable, whatever `dtype`; else in it."""
    weights_dtype = torch.float32 if trainable else DTYPES[dtype]
    kwargs = {"dtype": weights_dtype, "use_safetensors": True}  # a pickle could run code
    model = _load("AutoModelForCausalLM", name, **kwargs).to(device)
    model.requires_grad_(trainable)
    _make_savable(model.generation_config)
    model.eval()  # never train(): dropout would make the sampled and the trained policy differ
    _check_head(model, name)
    return model


def load_for_training(
    name: str, args, device: torch.device, trainable: bool = False
) -> "transformers.PreTrainedModel":
    """As load_model; where there are ranks, sharded over them by FSDP2. Each rank reads its part of
    each tensor from the files: no whole copy is held anywhere. With --lora_rank what is trainable
    are adapters, and the rest is frozen in the compute type."""
    adapted = trainable and args.lora_rank > 0
    if dist.is_initialized():
        model = _load_sharded(name, args, device, trainable, adapted)
    else:
        model = load_model(name, args.dtype, device, trainable and not adapted)
        if adapted:
            add_adapters(model, args.lora_rank, args.lora_alpha)
            set_adapters(model, args.seed)
        _recompute_activations(model, args)
    frozen_teacher = not trainable and name == getattr(args, "teacher", None)
    model.flops_role = "teacher" if frozen_teacher else "policy"
    return model


def load_reference(model, args, device: torch.device):
    """The frozen policy that a run begins from: a copy, or `model` with its adapters off."""
    return BaseOf(model) if args.lora_rank else load_for_training(args.model, args, device)


def _load_sharded(
    name: str, args, device: torch.device, trainable: bool, adapted: bool
) -> "transformers.PreTrainedModel":
    config = _load("AutoConfig", name)
    with torch.device("meta"):
        dtype = torch.float32 if trainable and not adapted else DTYPES[args.dtype]
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.name_or_path = model_path(name)
    try:
        model.generation_config = transformers.GenerationConfig.from_pretrained(model_path(name))
    except OSError:  # not every folder has one
        model.generation_config = transformers.GenerationConfig.from_model_config(config)
    _make_savable(model.generation_config)
    model.requires_grad_(trainable).eval()
    if adapted:
        add_adapters(model, args.lora_rank, args.lora_alpha)
    _recompute_activations(model, args)
    shard(model, args, device)
    model.to_empty(device="cpu" if args.cpu_offload else device)
    read_shards(model, _find(name))
    if adapted:
        set_adapters(model, args.seed)
    make_buffers(model, device)
    _check_head(model, name)
    return model


def _recompute_activations(model, args) -> None:
    """--activation_checkpointing: keep each decoder layer's input only, compute the rest again in
    backward. (transformers' own switch works in train mode only, and turns the cache off.)"""
    if args.activation_checkpointing:
        for layer in model.get_decoder().layers:
            again = {"use_reentrant": False, "preserve_rng_state": False}
            layer.forward = partial(checkpoint, layer.forward, **again)


@torch.no_grad()
def _check_head(model, name: str) -> None:
    """The chunked head is hidden @ W.T: a model that scales or caps logits would train wrong."""
    ids = torch.arange(4, device=device_of(model))[None]
    expected = model(input_ids=ids, use_cache=False).logits[0]
    hidden = hidden_states(model, ids, torch.ones_like(ids, dtype=torch.bool))
    logits = hidden @ head_weight(model, hidden.dtype).T
    same = torch.allclose(logits.float(), expected.float(), rtol=0.05, atol=0.05)
    check(
        same,
        f"{name} ({type(model).__name__}) scales or caps its logits behind the head: not supported",
    )
