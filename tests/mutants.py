"""Mutation run: do the tests notice changes of one line that a careless hand could make?

Applies each change below to a copy of the tree, and runs there the tests that should fail. A change
that they let pass survives: a test is missing. By hand, some 20 minutes: python -m tests.mutants
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = (".git", ".venv", "runs", "__pycache__", ".*_cache")
LIMIT_S = 300  # of one run of tests; one that hangs has noticed
GRPO, OPD, FKL, EVALUATE = "grpo.py", "opd.py", "fkl_warmup.py", "evaluate.py"
STATISTICS = "common/statistics.py"
RUN, LOG = "common/run/run.py", "common/run/log.py"
HEAD, LOGPROB, DISTANCE = (f"common/model/{name}.py" for name in ("head", "logprob", "distance"))
LOAD, LORA, SAVE = (f"common/model/{name}.py" for name in ("load", "lora", "save"))
SHARD, TOKENIZER = "common/model/shard.py", "common/model/tokenizer.py"
SAMPLER, ENGINE = "common/sampling/sampler.py", "common/sampling/torch_engine.py"
ROLLOUT, BATCHES = "common/sampling/rollout.py", "common/sampling/batches.py"
POOL, TASK, ROWS, DATA, MATH = (
    f"common/tasks/{name}.py" for name in ("pool", "task", "rows", "data", "math")
)

# (targets of pytest, their changes: (file, text that is in it once, what takes its place)).
# fmt: off
MUTANTS = [
    # --- found to survive by a reader of the tests ---
    ("tests/test_updates.py -k 'plain_loop or learning_rate'", [
        (GRPO, "if args.num_epochs * args.num_minibatches > 1:", "if args.num_epochs > 1:"),
        (GRPO, "grad_norm(model, args.max_grad_norm)", "grad_norm(model, 1.0)"),
        (GRPO, "betas=(0.9, 0.95)", "betas=(0.9, 0.999)"),
        (SHARD, "(model.parameters(), limit)", '(model.parameters(), float("inf"))'),
        (RUN, "* step / args.warmup_steps", "* (step - 1) / args.warmup_steps"),
        (RUN, "cosine = 0.5 - 0.5", "cosine = 0.5 + 0.5"),
        (RUN, "(args.num_steps - step + 1)", "(args.num_steps - step)"),
    ]),
    ("tests/test_updates.py -k 'not plain_loop'", [
        (GRPO, "range(args.max_refills + 1)", "range(args.max_refills)"),
        (OPD, "share_end_ids(tokenizer, model, teacher, s", "share_end_ids(tokenizer, model, s"),
        (FKL, "share_end_ids(tokenizer, model, teacher)", "share_end_ids(tokenizer, model)"),
        (FKL, "trained=model", "trained=teacher"),
        (FKL, "if rollout.verdict.correct]", "if rollout.verdict.reward > 0]"),
        (RUN, "math.isfinite(loss) and math.isfinite(grad_norm)", "math.isfinite(loss)"),
        (RUN, "asdict(self._completed), self", "asdict(self.progress), self"),
    ]),
    ("tests/test_losses.py tests/test_gradients.py", [
        (OPD, "advantages = (teacher - student).detach()", "advantages = teacher - student"),
        (GRPO, "clipped * advantages < ratio", "clipped * advantages <= ratio"),
        (DISTANCE, "(entropy - teacher_entropy)", "(teacher_entropy - entropy)"),
    ]),
    ("tests/test_lora.py", [(LORA, "- 1) / layer.in_features", "- 1) / layer.out_features")]),
    ("tests/test_evaluate.py", [
        (STATISTICS, "if len(values) > 1:  # the", "if len(values) < 1:  # the"),
        (STATISTICS, "(mean * (1 - mean)), 1 / num_samples)", "(mean * (1 - mean)), 0.0)"),
        (EVALUATE, "done -= done % per_batch", "done -= 0"),
    ]),
    ("tests/test_task.py -k earlier_call", [(POOL, "if number != self.number:", "if False:")]),
    # --- the loss, its gradient, and the sum that divides it ---
    ("tests/test_losses.py tests/test_gradients.py", [
        (GRPO, "rewards.std(1, keepdim=True)", "rewards.std(1, correction=0, keepdim=True)"),
        (GRPO, "zip(batch.rollouts, logprobs", "zip(rollouts[:len(lengths)], logprobs"),
        (GRPO, "batch.tokens, args.temperature,", "batch.tokens, 1.0,"),
        (GRPO, "engine_ratio = (old_logprobs", "engine_ratio = (logprobs.detach()"),
        (GRPO, "engine_metrics(old_logprobs,", "engine_metrics(logprobs.detach(),"),
        (DISTANCE, "gap.exp()", "(-gap).exp()"),
        (GRPO, "for r in rollouts]\n    r", "for r in with_gradient(rollouts, args)]\n    r"),
        (GRPO, "sum_over_ranks(len(rollouts)) * a", "args.prompts_per_step * args.group_size * a"),
        (GRPO, "r.weight > 0 and", "r.weight >= 0 and"),
        (OPD, "likeliest(logp.detach(), min", "likeliest(logq, min"),
        (OPD, "(student - teacher)).sum(-1)", "(student - teacher))[:, :-1].sum(-1)"),
        (OPD, "/ args.temperature).log_softmax(-1)", ").log_softmax(-1)"),
        (OPD, "- math.log(2)", "- 0.5 * math.log(2)"),
        (OPD, ".clamp(min=LOWEST)", ""),
        (FKL, "(logq.exp() * (logq - logp))", "(logp.exp() * (logp - logq))"),
        (FKL, "/ args.temperature).log_softmax(-1)", ").log_softmax(-1)"),
        (HEAD, "if weight.grad is None:", "if True:"),
        (HEAD, "total[words] += ", "total[words] = "),
        (HEAD, "(loss_sum / denominator, part)", "(loss_sum / len(hidden), part)"),
        (HEAD, "            logits[rows] = gradient", "            logits[rows] += gradient"),
        (LOGPROB, "logits.float() / temperature)", "logits.float())"),
        (DISTANCE, "for x in (logp, logq))", "for x in (logp, logp))"),
        (BATCHES, "shuffled[first::num_minibatches]", "shuffled[first :: num_minibatches + 1]"),
        (BATCHES, 'f"{seed}-{epoch}"', "seed"),
        (BATCHES, "mask[b, len(row.prompt_ids) - 1 :", "mask[b, len(row.prompt_ids) :"),
    ]),
    # --- sampling ---
    ("tests/test_rollout.py tests/test_sampler.py", [
        (ENGINE, "= bool(padding.any())", "= False"),
        (ENGINE, "for seed in seeds[batch] for g", "for seed in seeds[: len(seeds[batch])] for g"),
        (LOGPROB, "torch.arange(whole, num_words,", "torch.arange(num_words, num_words,"),
        (SAMPLER, "if index == 0 or not taken:", "if not taken:"),
        (SAMPLER, "= prompt.problem, prompt.opens_thought", "= prompt.problem, False"),
        (SAMPLER, " and step < self.args.num_steps):", "):"),
        (ROLLOUT, "{str(row[KEY])} if KEY in row else ", ""),
    ]),
    # --- a run ---
    ("tests/test_updates.py -k 'plain_loop or drawn_again or stops or evaluated'", [
        (GRPO, "(args.seed, step, refill)", "(args.seed, step, 0)"),
        (GRPO, '("ref_logprobs", ref_model,', '("ref_logprobs", model,'),
        (OPD, "optimizer.zero_grad()", "pass"),
        (TOKENIZER, "eos_token_id = ids", "eos_token_id = ids[:1]"),
    ]),
    ("tests/test_losses.py -k mean_is_over", [
        (RUN, "sum(listed) / len(listed)", "sum(listed) / len(updates)"),
    ]),
    ("tests/test_scripts.py -k 'initial or given or resumed or budget or flops'", [
        (OPD, "sampled=sampled,", "sampled=model,"),
        (RUN, ' if rollout.finish != "given"]', "]"),
        (LOG, 'row["step"] <= step', 'row["step"] < step'),
        (RUN, "done.flops + done.teacher_flops", "done.flops"),
        (OPD, 'device, flops_role="teacher")', "device)"),
    ]),
    ("tests/test_updates.py -k 'signal or mid_update'", [
        (RUN, "together and not self._updating and", "together and"),
    ]),
    ("tests/test_lora.py tests/test_model.py -k 'not resumes'", [
        (SAVE, '"lora_alpha": ALPHA', '"lora_alpha": ALPHA / 2'),
        (LORA, 'f"{seed} {name}"', 'f"{seed}"'),
        (LOAD, "torch.float32 if trainable else DTYPES[dtype]", "DTYPES[dtype]"),
        (TOKENIZER, "special.intersection(behind)", "set(behind)"),
    ]),
    # --- data, grading and evaluation ---
    ("tests/test_data.py tests/test_math_task.py", [
        (ROWS, "if len(dict(pairs)) < len(pairs):", "if False:"),
        (DATA, "dict.fromkeys((*held_out, *evaluated))", "dict.fromkeys(held_out)"),
        (DATA, "texts = [text or problem.text", "texts = [text"),
        (MATH, ' if form in ("", ",") else [answer]', ""),
        (MATH, "|(?<![A-Za-z])(?:and|or)WORD|;)", "|;)"),
    ]),
    ("tests/test_task.py", [
        (POOL, "and worker.number > 2:", "and False:"),
        (POOL, '"it takes too long", note)', '"it takes too long")'),
        (POOL, "if worker and worker.process.poll() is None:", "if worker:"),
        (TASK, '["grade_timeout"] if timeout_s is None else timeout_s', '["grade_timeout"]'),
        (TASK, "            rows = rows[:1]", "            pass"),
    ]),
    ("tests/test_evaluate.py tests/test_report.py", [
        (EVALUATE, "seed=(*seed, first), **s", "seed=(*seed, 0), **s"),
        (EVALUATE, "rewards >= pass_threshold", "rewards > pass_threshold"),
        ("common/sampling/vote.py", 'not in ("timeout", "crash")', 'not in ("timeout",)'),
        (STATISTICS, "low_a, high_b - mean_b)", "low_a, mean_b - low_b)"),
        (STATISTICS, "alpha / (len(order) - rank)", "alpha / len(order)"),
    ]),
]
# fmt: on


def survives(folder: Path, targets: str, file: str, old: str, new: str) -> bool:
    """Whether the tests pass, in time, with this change in the tree at `folder`."""
    whole = (folder / file).read_text()
    (folder / file).write_text(whole.replace(old, new))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        command + shlex.split(targets),
        cwd=folder,
        env=settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            return process.wait(LIMIT_S) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            (folder / file).write_text(whole)
            with contextlib.suppress(ProcessLookupError):  # with what its tests have started
                os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="changes whose file or text holds this word")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at once")
    args = parser.parse_args()
    chosen = [(tests, *m) for tests, group in MUTANTS for m in group if args.only in " ".join(m)]
    unclear = [m for m in chosen if (ROOT / m[1]).read_text().count(m[2]) != 1]
    for _, file, old, _ in unclear:
        print(f"not there exactly once: {file}: {old}")
    if unclear:
        return 2
    folders: Queue[Path] = Queue()

    def try_one(mutant: tuple[str, ...]) -> bool:
        folder, began = folders.get(), time.monotonic()
        try:
            passed = survives(folder, *mutant)
        finally:
            folders.put(folder)
        tests, file, old, new = mutant
        what = f"{file}: {new}" if old else f"unchanged: {tests}"
        result = ("SURVIVED" if old else "passed") if passed else ("killed" if old else "FAILED")
        print(f"{result:8} {time.monotonic() - began:4.0f} s  {what}", flush=True)
        return passed

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as threads:
        for number in range(args.jobs):
            folder = Path(scratch, str(number))
            shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
            folders.put(folder)
        unchanged = [(tests, GRPO, "", "") for tests in dict.fromkeys(m[0] for m in chosen)]
        if not all(list(threads.map(try_one, unchanged))):
            return 2  # a test that fails anyway notices nothing
        survivors = [m for m, s in zip(chosen, threads.map(try_one, chosen), strict=True) if s]
    print(f"{len(survivors)} of {len(chosen)} survived")
    for _, *change in survivors:
        print("  " + " -> ".join(change))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
