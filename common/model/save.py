"""The final model on disk, as transformers, vLLM and peft read it."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.model.lora import ALPHA, layers_of, whole_weights
from common.model.shard import ADAPTERS, full_weight
from common.run.folder import replace_folder, writing
from common.run.ranks import on_first_rank, rank


def save_final(model, tokenizer, folder: Path) -> None:
    """Save model and tokenizer as `folder`, whole or not at all; adapters merged, and alone in
    folder/adapter too. All ranks call it: a sharded model is gathered parameter by parameter, into
    the first rank's host memory.

    In float32, the trained weights themselves: bfloat16 would drop what a stage has added up below
    half a unit of it, which at a rate of 1e-6 is all of some 30 steps.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    on_first_rank(lambda: shutil.rmtree(temporary, ignore_errors=True))
    with writing(folder):
        weights = gather_weights(whole_weights(model, torch.float32))
        adapters = gather_weights(
            (f"base_model.model.{name}.{kind}.weight", full_weight(getattr(layer, kind), None))
            for name, layer in layers_of(model).items()
            for kind in ADAPTERS
        )
        if rank() == 0:
            save_model(model, weights, temporary)
            tokenizer.save_pretrained(temporary)
            if adapters:
                save_adapters(model, adapters, temporary / "adapter")
            replace_folder(temporary, folder)


def gather_weights(weights) -> dict[str, torch.Tensor]:
    """Collect the pairs of a collective generator in the first rank's host memory."""
    return {name: weight.cpu().contiguous() for name, weight in weights if rank() == 0}


def save_model(model, weights: dict[str, torch.Tensor], folder: Path, shard_size="4GB") -> None:
    """Save float32 weights with the model's configs, in files of at most `shard_size`."""
    loaded_as = model.config.dtype
    model.save_pretrained(folder, state_dict=weights, max_shard_size=shard_size)
    model.config.dtype = torch.float32  # save_pretrained has written that of frozen weights
    model.config.save_pretrained(folder)
    model.config.dtype = loaded_as


def save_adapters(model, adapters: dict[str, torch.Tensor], folder: Path) -> None:
    """Save adapters as peft.PeftModel.from_pretrained(base model, folder) reads them."""
    folder.mkdir()
    save_file(adapters, folder / "adapter_model.safetensors")
    layers = layers_of(model)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_dropout": 0.0, "bias": "none"}
    config |= {"r": len(next(iter(layers.values())).lora_A), "lora_alpha": ALPHA}
    config["base_model_name_or_path"] = model.name_or_path
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in layers})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), "utf-8")
