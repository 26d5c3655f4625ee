"""The final model on disk, as transformers, vLLM and peft read it."""

import copy
import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from common.model.lora import ALPHA, layers_of, weight_names, whole_weight
from common.model.shard import ADAPTERS, full_weight
from common.run.folder import replace_folder, write_json, writing
from common.run.ranks import on_first_rank, rank


def save_final(model, tokenizer, folder: Path) -> None:
    """Save model and tokenizer as `folder`, whole or not at all; adapters merged, and alone in
    folder/adapter too. All ranks call it.

    In float32, the trained weights themselves: bfloat16 would drop what a stage has added up below
    half a unit of it, which at a rate of 1e-6 is all of some 30 steps.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    on_first_rank(lambda: shutil.rmtree(temporary, ignore_errors=True))
    with writing(folder):
        save_model(model, temporary)
        adapters = gather_weights(
            (f"base_model.model.{name}.{kind}.weight", full_weight(getattr(layer, kind), None))
            for name, layer in layers_of(model).items()
            for kind in ADAPTERS
        )
        if rank() == 0:
            tokenizer.save_pretrained(temporary)
            if adapters:
                save_adapters(model, adapters, temporary / "adapter")
            replace_folder(temporary, folder)


def gather_weights(weights) -> dict[str, torch.Tensor]:
    """Collect the pairs of a collective generator in the first rank's host memory."""
    return {name: weight.cpu().contiguous() for name, weight in weights if rank() == 0}


def save_model(model, folder: Path, file_size="4GB") -> None:
    """Save the weights in float32, and the model's configs. A sharded model is gathered file by
    file, each of at most `file_size`, in the first rank's host memory."""
    shapes = {name: model.get_parameter(name).shape for name in weight_names(model)}
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    files = split_torch_state_dict_into_shards(empty, max_shard_size=file_size)
    for file, in_file in files.filename_to_tensors.items():
        weights = gather_weights((n, whole_weight(model, n, torch.float32)) for n in in_file)
        if rank() == 0:
            folder.mkdir(exist_ok=True)
            save_file(weights, folder / file, {"format": "pt"})
    if rank() == 0:
        if files.is_sharded:
            index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
            write_json(folder / "model.safetensors.index.json", index)
        config = copy.deepcopy(model.config)
        config.dtype = torch.float32  # frozen weights may be loaded in another
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)


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
