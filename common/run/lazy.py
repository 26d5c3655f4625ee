"""Large packages, imported at their first use: --help and a wrong flag wait for torch alone."""

import importlib


class Lazy:
    """A module by name; the first attribute that is asked of it imports it."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self._name), attribute)


transformers = Lazy("transformers")
dtensor = Lazy("torch.distributed.tensor")
fsdp = Lazy("torch.distributed.fsdp")
checkpointing = Lazy("torch.distributed.checkpoint")
decoding = Lazy("common.sampling.decoding")


def import_all() -> None:
    """For a process whose children are forked: what each of them would import."""
    for module in (dtensor, fsdp, checkpointing, decoding):
        importlib.import_module(module._name)
    for name in ("PreTrainedModel", "AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig"):
        getattr(transformers, name)
