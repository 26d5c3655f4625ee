r"""Rebuild the embedded default from nothing: the task, the tokenizer, a raw teacher and a student.

The task is the sum of five two-digit numbers. There is a good way to answer, step by step,

    12+34=46;46+56=102;102+78=180;180+90=270;\boxed{270}

and a bad one, at once: `\boxed{270}`. Both models learn both ways, and are then tuned to answer
mostly at once: the good behaviour is known but seldom used, so there is something to discover.
The toy is built so that the paper's premise holds (a teacher that finds the behaviour by sparse
reward, a student that uses it too seldom): it illustrates the mechanism, it is no evidence for the
paper.

    python -m toy.make                     # everything, into toy/; the student takes 5 minutes
    python -m toy.make --only report       # measure the checkpoints that are there
    python -m toy.make --only student --use 0.08 --output_dir runs/students/8
                                           # the shipped student, tuned to another use
"""

import json
import random
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from common.model.load import load_model
from common.model.tokenizer import load_tokenizer
from common.run.errors import check
from common.run.process import start
from common.sampling.sampler import sample_and_verify
from common.sampling.torch_engine import TorchEngine
from common.tasks import data
from common.tasks.math import instruction
from common.tasks.task import Problem, Task

HERE = Path(__file__).parent
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """A raw model: its shape, and how it is taught.

    First both ways are learned. Then, at an eighth of the rate, the choice: `use` is the share of
    examples that begin step by step. The skill is rehearsed meanwhile, in examples whose first
    token, the choice, bears no loss: else a model that seldom uses it would forget it.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    skill_steps: int
    choice_steps: int
    use: float


RECIPES = {
    "teacher": Recipe(96, 3, 4, skill_steps=2000, choice_steps=200, use=0.1),
    "student": Recipe(48, 2, 2, skill_steps=3400, choice_steps=300, use=0.005),
}
LEARNING_RATE, BATCH_SIZE = 2e-3, 128
NUM_TRAIN, NUM_TEST = 1024, 512


@dataclass
class Args:
    only: Literal["all", "data", "teacher", "student", "report"] = "all"
    """what to rebuild"""
    seed: int = 1
    """seed of the problems and of the training"""
    use: float | None = None
    """with --only: tune the shipped model to begin step by step in this share of its answers"""
    output_dir: Path = HERE
    """where train.jsonl, test.jsonl, teacher/ and student/ are written"""


# === task ===


def sample_terms(rng: random.Random) -> list[int]:
    return [rng.randint(10, 99) for _ in range(5)]


def problem_text(terms: list[int]) -> str:
    return "+".join(map(str, terms))


def completion_text(terms: list[int], step_by_step: bool) -> str:
    steps, total = "", terms[0]
    for term in terms[1:]:
        steps += f"{total}+{term}={total + term};"
        total += term
    return (steps if step_by_step else "") + rf"\boxed{{{total}}}"


def is_step_by_step(completion: str) -> bool:
    r"""Tell whether it begins with a sum. A "=" later on may also be in an answer at once that has
    run away, `\boxed{30;330+32=62;...`: of the untrained student's every third is."""
    return re.match(r"\d+\+\d+=", completion) is not None


def make_data(args: Args) -> None:
    rng = random.Random(args.seed)
    rows: dict[str, int] = {}
    while len(rows) < NUM_TRAIN + NUM_TEST:
        terms = sample_terms(rng)
        rows[problem_text(terms)] = sum(terms)
    lines = [json.dumps({"problem": p, "answer": str(total)}) + "\n" for p, total in rows.items()]
    (args.output_dir / "train.jsonl").write_text("".join(lines[:NUM_TRAIN]), "utf-8")
    (args.output_dir / "test.jsonl").write_text("".join(lines[NUM_TRAIN:]), "utf-8")


# === tokenizer ===


def make_tokenizer() -> PreTrainedTokenizerFast:
    r"""Printable ASCII by character; chat markers, roles, instruction and `\boxed{` are whole."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    whole = ["user", "assistant", "\n" + instruction, r"\boxed{"]
    characters = ["\n", *(chr(code) for code in range(32, 127)), "\ufffd"]
    vocab = {token: i for i, token in enumerate(special + whole + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="\ufffd"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


# === models ===


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads // 2,
        head_dim=32,  # the least that vLLM's attention takes on a CPU
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    eos = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(
        eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
    )
    return model


def loss_sum(
    model, tokenizer, problems: list[list[int]], step_by_step: bool, choice: bool
) -> torch.Tensor:
    """Next-token loss on completions, EOS included, summed over tokens.

    choice: whether the first token, which decides between the two ways, is in the loss.
    """
    # Rendered once: jinja would be the slowest part of a step.
    asked = {"role": "user", "content": f"PROBLEM\n{instruction}"}
    template = data.prompt_text(tokenizer, [asked])
    texts = [template.replace("PROBLEM", problem_text(terms)) for terms in problems]
    prompts = tokenizer(texts)["input_ids"]
    completions = tokenizer([completion_text(t, step_by_step) for t in problems])["input_ids"]
    rows = [p + c + [tokenizer.eos_token_id] for p, c in zip(prompts, completions, strict=True)]
    rows = [torch.tensor(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    labels = pad_sequence(rows, batch_first=True, padding_value=-100)
    labels[:, : len(prompts[0]) + (not choice)] = -100  # all prompts of the task have one length
    logits = model(input_ids=ids).logits[:, :-1]  # right-padded and causal: no mask needed
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )


def train(model, tokenizer, recipe: Recipe, rng: random.Random, name: str) -> None:
    """Both phases; a recipe without skill_steps tunes the choice alone."""
    for phase, num_steps, use, rehearsed, peak in (
        ("skill", recipe.skill_steps, 0.6, 0.0, LEARNING_RATE),
        ("choice", recipe.choice_steps, recipe.use, 0.3, LEARNING_RATE / 8),
    ):
        if num_steps == 0:
            continue
        optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, num_steps, pct_start=0.05)
        progress = tqdm(range(num_steps), desc=f"{name}: {phase}", mininterval=10)
        for _ in progress:
            problems = [sample_terms(rng) for _ in range(BATCH_SIZE)]
            first = int(rehearsed * BATCH_SIZE)
            # A binomial count, so that a use below one example a batch is met on average.
            second = first + sum(rng.random() < use for _ in problems[first:])
            parts = (  # apart, since the short ones would be padded to three times their length
                (problems[:first], True, False),
                (problems[first:second], True, True),
                (problems[second:], False, True),
            )
            sums = [loss_sum(model, tokenizer, *part) for part in parts if part[0]]
            loss = sum(sums) / (50 * second + 6 * (BATCH_SIZE - second))  # about a mean over tokens
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


# === report ===


@dataclass
class PromptArgs:
    max_prompt_tokens: int = 128
    thinking: bool = False


def report(folder: Path, problems: list[Problem]) -> dict[str, float]:
    """The four numbers that matter, over 16 samples at temperature 1 of each problem.

    Step by step is too seldom to be measured by waiting for it: a second set of samples is given
    the first digit of that way.
    """
    args, tokenizer = PromptArgs(), load_tokenizer(str(folder))
    model = load_model(str(folder), "float32", torch.device("cpu"))
    free = data.render_prompts(tokenizer, problems, args)
    digits = [tokenizer.encode(problem.text[0]) for problem in problems]
    begun = [data.Prompt(p.problem, p.ids + d) for p, d in zip(free, digits, strict=True)]
    engine, sampling = TorchEngine(model, tokenizer), {"max_new_tokens": 64, "temperature": 1.0}
    with Task() as task:
        samples, forced = (
            sample_and_verify(engine, task, prompts, 16, seed=(0,), **sampling)
            for prompts in (free, begun)
        )
    correct = torch.tensor([float(rollout.verdict.correct) for rollout in samples])
    stepwise = torch.tensor([is_step_by_step(rollout.text) for rollout in samples])
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "step_by_step_use": stepwise.float().mean().item(),
        "accuracy_step_by_step": statistics.fmean(rollout.verdict.correct for rollout in forced),
        "accuracy_at_once": correct[~stepwise].mean().item(),
        "accuracy": correct.mean().item(),
    }


def main(args: Args) -> None:
    tunes_another = args.only in RECIPES and args.output_dir.resolve() != HERE
    check(args.use is None or tunes_another, "--use needs --only teacher, or student, and a folder")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.only in ("all", "data"):
        make_data(args)
    for name, recipe in RECIPES.items():
        folder = args.output_dir / name
        if args.only in ("all", name):
            torch.manual_seed(args.seed)
            torch.set_num_threads(1)  # sums depend on it in their last bits; two gain little here
            tokenizer = make_tokenizer()
            if args.use is None:
                model = make_model(recipe, tokenizer)
            else:
                model = load_model(str(HERE / name), "float32", torch.device("cpu"))
                model.requires_grad_(True)
                recipe = replace(recipe, skill_steps=0, use=args.use)
            train(model, tokenizer, recipe, random.Random(f"{args.seed}-{name}"), name)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        if args.only in ("all", "report", name):
            with Task() as task:
                made = (args.output_dir / "test.jsonl").exists()
                test = args.output_dir if made else HERE
                problems = data.load_problems(task, str(test / "test.jsonl"))
            print(name, json.dumps(report(folder, problems)))


if __name__ == "__main__":
    start(main, Args, __doc__)
