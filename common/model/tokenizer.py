"""Tokenizers, their chat templates, and the tokens that end a turn."""

import datetime
from collections.abc import Sequence
from pathlib import Path

import jinja2
from huggingface_hub import try_to_load_from_cache

from common.model.load import load_pretrained
from common.run.errors import UserError, check, one_line
from common.run.inputs import model_path

DAY = datetime.datetime(2024, 7, 26)  # templates write today's: prompts would change day by day
SAMPLE_CHAT = [{"role": "user", "content": "1+1"}]


def load_tokenizer(name: str, teacher: str | None = None, chat_template: str | None = None):
    """Load the tokenizer of `name`; with the chat template of `chat_template`, a model or a .jinja
    file, if one is given. A base model without a template is trained on its teacher's, if that has
    the same vocabulary.
    """
    tokenizer = load_pretrained("AutoTokenizer", name)
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
        try:
            prompt_text(tokenizer, SAMPLE_CHAT)
        except Exception as error:  # what a template raises is its own affair
            reason = one_line(error)
            message = f"--chat_template {chat_template} cannot be used: {reason}"
            raise UserError(message) from error
    teachers = None if teacher is None else load_pretrained("AutoTokenizer", teacher)
    if teachers is not None and teachers.get_vocab() != tokenizer.get_vocab():
        teachers = None
    if teachers is not None and tokenizer.chat_template is None:
        print(f"{name} has no chat template: it is trained on that of {teacher}")
        tokenizer.chat_template = teachers.chat_template
    check(
        tokenizer.chat_template is not None,
        f"{chat_template or name} has no chat template; name a .jinja file, or a model of the same "
        "family that has one, with --chat_template",
    )
    check(tokenizer.eos_token_id is not None, f"the tokenizer of {name} has no EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks go by length, never by token
    if teachers is not None:
        other = teachers.chat_template and prompt_text(teachers, SAMPLE_CHAT)
        if other and other != prompt_text(tokenizer, SAMPLE_CHAT):
            print(f"{name} and {teacher} have different chat templates: prompts are {name}'s")
    return tokenizer


def load_teachers_tokenizer(tokenizer, teacher: str):
    """Load the tokenizer of a teacher whose vocabulary is another than `tokenizer`'s; None if it is
    the same."""
    other = load_pretrained("AutoTokenizer", teacher)
    if other.get_vocab() == tokenizer.get_vocab():
        return None
    check(
        other.chat_template is not None and other.eos_token_id is not None,
        f"teacher {teacher} is of another vocabulary, and has no chat template or no EOS token of "
        "its own; save it with both",
    )
    if other.pad_token_id is None:
        other.pad_token = other.eos_token
    return other


def _read_template(source: str) -> str | None:
    if not source.endswith(".jinja"):
        return load_pretrained("AutoTokenizer", source).chat_template
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --chat_template {source}: {one_line(error)}") from error


def lacks_chat_template(name: str) -> bool:
    """Tell whether a model that is on this machine has none."""
    path = model_path(name)
    here = Path(path).exists() or try_to_load_from_cache(path, "tokenizer_config.json")
    return bool(here) and load_pretrained("AutoTokenizer", name).chat_template is None


def prompt_text(tokenizer, messages: Sequence[dict], thinking: bool = False) -> str:
    """Render the chat template over messages, ready for the assistant's turn."""
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=thinking,
            date_string=DAY.strftime("%d %b %Y"),  # Llama 3's
            strftime_now=DAY.strftime,
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the chat template refuses messages of {roles} ({one_line(error)}); change the task's "
            "prompt(), or name another --chat_template"
        ) from error


def end_ids(tokenizer, *models) -> list[int]:
    """Return every id that ends a turn: the tokenizer's EOS, what the chat template writes behind
    an answer, and those of the models' configs. A base model has another EOS than its instruct
    siblings."""
    ids = {tokenizer.eos_token_id, turn_end(tokenizer)}
    for config in (c for model in models for c in (model.generation_config, model.config)):
        listed = getattr(config, "eos_token_id", None)
        ids |= set(listed) if isinstance(listed, list) else {listed}
    return sorted(ids - {None})


def turn_end(tokenizer) -> int:
    """Return the id with which a chat template ends an answer; the EOS, if it ends with none."""
    turn = [*SAMPLE_CHAT, {"role": "assistant", "content": "2"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("2")[2]
    behind = tokenizer(text, add_special_tokens=False)["input_ids"][:1]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next(iter(special.intersection(behind)), tokenizer.eos_token_id)


def share_end_ids(tokenizer, *models) -> None:
    """Give every model the end-of-turn ids of all of them, in what is saved too: a student that
    learns to write its teacher's EOS would never stop otherwise."""
    ids = end_ids(tokenizer, *models)
    for model in models:
        model.generation_config.eos_token_id = ids
