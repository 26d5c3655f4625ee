"""Several ranks (gloo, on a CPU) against one: the same trajectory, checkpoints, failures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, torchrun
from safetensors.torch import load_file
from test_pair import save_under_other_ids
from transformers import LlamaConfig, LlamaForCausalLM

from common.model import save as saving
from common.run.inputs import ROOT

pytestmark = pytest.mark.slow
SIZES = ["--prompts_per_step", "5", "--group_size", "4", "--max_new_tokens", "24"]
STEPS = ["--num_steps", "5", "--warmup_steps", "1", "--checkpoint_every", "2"]
SMALL = [
    *SIZES,
    *STEPS,
    "--micro_batch_tokens",
    "150",
]  # some 4 and 3 micro-batches of 12 and 8 sequences
TRAINERS = {
    # Groups that agree are redrawn, and cost no update: ranks have unequal work everywhere.
    "grpo": [
        *(*SMALL, "--model", "toy/student", "--kl_coef", "0", "--num_minibatches", "2"),
        *("--dynamic_sampling", "--activation_checkpointing", "--learning_rate", "3e-4"),
    ],
    "opd": [*SMALL, "--eval_every", "5"],
    "fkl_warmup": SMALL,
    "fkl_warmup on given rollouts": SMALL,
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(ranks: int, script: str, *flags) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    path = str(ROOT / f"{script}.py")
    return [sys.executable, *(launch if ranks > 1 else []), path, *map(str, flags)]


def run(ranks: int, script: str, *flags) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(ranks, script, *flags), capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def largest_difference(one, other) -> float:
    """Over tensors, relative: |a - b| / |a|."""
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).norm() / a[name].norm()).item() for name in a)


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """trainer -> its folders after five steps at one rank and at two."""
    root = tmp_path_factory.mktemp("ranks")
    folders = {script: {n: root / f"{script}_{n}" for n in (1, 2)} for script in TRAINERS}
    sampled = root / "sampled.jsonl"
    for name, by_ranks in folders.items():
        for ranks, folder in by_ranks.items():
            script, *given = name.split(" on given ")
            flags = TRAINERS[name] + ["--rollouts", sampled] * len(given)
            done = run(ranks, script, *flags, "--output_dir", folder)
            assert done.stdout.count("finished ") == 1  # the other ranks are silent
            sampled.write_text((folder / "rollouts" / "step_1.jsonl").read_text())
    return folders


@pytest.mark.parametrize("script", TRAINERS)
def test_two_ranks_follow_the_trajectory_of_one(runs, script):
    one, two = runs[script][1], runs[script][2]
    assert largest_difference(one, two) <= 1e-5
    for step in range(1, 6):
        name = f"rollouts/step_{step}.jsonl"
        rows = [sorted((folder / name).read_text().splitlines()) for folder in (one, two)]
        assert rows[0] == rows[1]
    for row, other in zip(metrics_of(one), metrics_of(two), strict=True):
        assert row.keys() == other.keys()
        for name in (name for name in row if not name.startswith("time/")):
            assert other[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5), name
    counts = [json.loads((folder / "manifest.json").read_text()) for folder in (one, two)]
    assert counts[0] | {"seconds": 0} == pytest.approx(counts[1] | {"seconds": 0})


def test_two_ranks_with_a_teacher_of_another_vocabulary(tmp_path, tokenizer):
    teacher = save_under_other_ids(tmp_path / "teacher", tokenizer)
    for script in ("opd", "fkl_warmup"):
        flags = [*SIZES, "--num_steps", "2", "--warmup_steps", "1", "--teacher", teacher]
        one, two = tmp_path / f"{script}_1", tmp_path / f"{script}_2"
        for ranks, folder in ((1, one), (2, two)):
            run(ranks, script, *flags, "--output_dir", folder)
        assert largest_difference(one, two) <= 1e-5
        strict = [[row["policy/strict_positions"] for row in metrics_of(f)] for f in (one, two)]
        assert strict == [[1, 1], [1, 1]]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_checkpoint_loads_on_another_number_of_ranks(runs, tmp_path, before, after):
    folder = tmp_path / "cut"
    shutil.copytree(runs["opd"][before], folder)
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "final")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step_2", "step_4"}
    done = run(after, "opd", *TRAINERS["opd"], "--output_dir", folder)
    assert "after step 4" in done.stdout
    assert largest_difference(runs["opd"][1], folder) <= 1e-5
    assert [row["step"] for row in metrics_of(folder)] == [1, 2, 3, 4, 5]


def test_a_rank_without_any_work_does_not_hang(tmp_path):
    """One prompt for two ranks: one of them samples, trains and evaluates nothing."""
    flags = [*("--prompts_per_step", "1", "--group_size", "4", "--num_steps", "2")]
    for ranks in (1, 2):
        run(ranks, "grpo", *flags, "--output_dir", tmp_path / str(ranks))
    assert largest_difference(tmp_path / "1", tmp_path / "2") <= 1e-5


@pytest.mark.parametrize(("ranks", "flags"), [(1, []), (2, [])])
def test_offloaded_weights_train_the_same(runs, tmp_path, ranks, flags):
    """On one rank, where nothing but --cpu_offload shards, and with the gradients of a step's
    several micro-batches added up before they travel: the same to rounding."""
    own = [*TRAINERS["opd"], "--cpu_offload", *flags, "--output_dir", tmp_path / "run"]
    run(ranks, "opd", *own)
    assert largest_difference(runs["opd"][1], tmp_path / "run") <= 1e-5


@pytest.mark.parametrize("script", ["grpo", "fkl_warmup"])
def test_adapters_train_the_same_on_two_ranks(tmp_path, script):
    """Frozen weights and trained adapters in one FSDP2 group, with recomputed layers; a checkpoint
    of one rank goes on with two; the base is what it was."""
    flags = [*TRAINERS[script], "--lora_rank", "6", "--learning_rate", "1e-3"]
    for ranks in (1, 2):
        run(ranks, script, *flags, "--output_dir", tmp_path / str(ranks))
    assert largest_difference(tmp_path / "1", tmp_path / "2") <= 1e-5
    shutil.copytree(tmp_path / "1", tmp_path / "cut")
    (tmp_path / "cut" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "cut" / "final")
    run(2, script, *flags, "--output_dir", tmp_path / "cut")
    assert largest_difference(tmp_path / "1", tmp_path / "cut") <= 1e-5
    adapter = "final/adapter/adapter_model.safetensors"
    one, two = (load_file(tmp_path / name / adapter) for name in ("1", "2"))
    assert one.keys() == two.keys()
    base = load_file(ROOT / "toy" / "student" / "model.safetensors")
    final = load_file(tmp_path / "2" / "final" / "model.safetensors")
    assert all(torch.equal(base[name], final[name]) for name in base if "proj" not in name)


@pytest.mark.parametrize(("ranks", "flags"), [(1, []), (2, []), (1, ["--cpu_offload"])])
def test_adapters_in_bfloat16(tmp_path, ranks, flags):
    """The reference is the policy at its start; adapters of float32 move at a small rate."""
    own = [*SIZES, "--num_steps", "2", "--warmup_steps", "0", "--dtype", "bfloat16", *flags]
    own += ["--lora_rank", "4", "--learning_rate", "1e-5", "--activation_checkpointing"]
    run(ranks, "grpo", *own, "--output_dir", tmp_path / "run")
    assert metrics_of(tmp_path / "run")[0]["policy/kl_ref"] == 0.0
    adapter = load_file(tmp_path / "run" / "final" / "adapter" / "adapter_model.safetensors")
    assert all(t.dtype == torch.float32 for t in adapter.values())
    moved = [t.abs().max() for name, t in adapter.items() if "lora_B" in name]
    assert all(0 < largest < 1e-4 for largest in moved)


LOADED = """
import sys
from types import SimpleNamespace
import torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
from common.model import load as module
from common.model.lora import whole_weights

dist.init_process_group("gloo")
folder = sys.argv[1]
module.load_model = None  # nobody loads a whole model
for dtype, trainable in (("float32", True), ("bfloat16", False)):
    kept = getattr(torch, dtype)
    args = SimpleNamespace(dtype=dtype, cpu_offload=False, lora_rank=0)
    args.activation_checkpointing = False
    model = module.load_for_training(folder, args, torch.device("cpu"), trainable=trainable)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=kept)
    expected, loaded = dict(whole.named_parameters()), dict(whole_weights(model, kept))
    assert loaded.keys() == expected.keys()
    assert all(loaded[name].equal(expected[name]) for name in expected)
    buffers = dict(whole.named_buffers())
    assert all(buffer.equal(buffers[name]) for name, buffer in model.named_buffers())
    local = sum(parameter.to_local().numel() for parameter in model.parameters())
    assert local < 0.6 * sum(parameter.numel() for parameter in whole.parameters())
    assert model.generation_config.eos_token_id == whole.generation_config.eos_token_id
if dist.get_rank() == 0:
    print("same")
"""


def test_each_rank_reads_its_part_of_several_files(tmp_path, tokenizer):
    """Sizes that do not divide by two; nothing whole in memory."""
    folder = tmp_path / "model"
    model = tiny_model(tokenizer)
    saving.save_model(model, folder, file_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert torchrun(LOADED.replace("sys.argv[1]", repr(str(folder))), tmp_path) == "same\n"


PEAK = """
import ctypes, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import torch, torch.distributed as dist
import torch.distributed.fsdp, transformers.modeling_utils  # before memory is looked at
from common.model.load import load_for_training

ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: else the C library keeps what is freed

def own_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

def watch():
    while not done.is_set():
        seen.append(own_memory())
        time.sleep(0.002)

dist.init_process_group("gloo")
args = SimpleNamespace(dtype="float32", cpu_offload=False, lora_rank=0)
args.activation_checkpointing = False
seen, done, before = [], threading.Event(), own_memory()
watcher = threading.Thread(target=watch)
watcher.start()
model = load_for_training(sys.argv[1], args, torch.device("cpu"), trainable=True)
done.set()
watcher.join()
if dist.get_rank() == 0:
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    print((max(seen) - before) / whole)
"""


def test_no_rank_holds_a_whole_copy_while_it_loads(tmp_path):
    """Two ranks, a checkpoint of several files, 0.9 GB in float32: each takes its half, and the
    gathered layers of one forward pass. (Embedding and head are small here, as they are of 70B.)"""
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 24}
    config = LlamaConfig(vocab_size=1000, num_attention_heads=12, num_key_value_heads=4, **shape)
    whole = LlamaForCausalLM(config)
    whole.save_pretrained(tmp_path / "model", max_shard_size="100MB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 4
    share = float(torchrun(PEAK.replace("sys.argv[1]", repr(str(tmp_path / "model"))), tmp_path))
    print(f"peak of a rank: {share:.2f} of the whole model")
    assert share < 0.75


@pytest.mark.parametrize(("ranks", "flags"), [(1, []), (2, []), (1, ["--cpu_offload"])])
def test_policy_and_frozen_model_compute_alike_in_bfloat16(tmp_path, ranks, flags):
    """A student that is its teacher starts at a KL of 0, a policy at its reference."""
    shared = [*SIZES, "--num_steps", "1", "--dtype", "bfloat16", "--model", "toy/teacher", *flags]
    run(ranks, "opd", *shared, "--learning_rate", "1e-6", "--output_dir", tmp_path / "opd")
    (row,) = metrics_of(tmp_path / "opd")
    assert abs(row["policy/reverse_kl"]) < 1e-6
    assert abs(row["policy/forward_kl"]) < 1e-6
    assert row["optim/grad_norm"] < 1e-4
    run(ranks, "grpo", *shared, "--output_dir", tmp_path / "grpo")
    assert abs(metrics_of(tmp_path / "grpo")[0]["policy/kl_ref"]) < 1e-6


def test_bfloat16_compute_keeps_float32_weights_under_sharding(tmp_path):
    """At lr 1e-6 a bfloat16 weight would not move at all."""
    flags = [*SIZES, "--num_steps", "1", "--warmup_steps", "0", "--dtype", "bfloat16"]
    run(2, "opd", *flags, "--learning_rate", "1e-6", "--output_dir", tmp_path / "run")
    before = load_file(ROOT / "toy" / "student" / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for name in before:
        change = (after[name] - before[name]).abs()
        assert after[name].dtype == torch.float32
        assert 0 < change.max() < 3e-6, name


PREPARES = """
import opd
from common.model.tokenizer import load_tokenizer
from common.run.ranks import gather, join_ranks
from common.tasks import data
from common.tasks.task import Task

join_ranks("cpu")
args, tokenizer, task = opd.Args(eval_every=1), load_tokenizer("toy/student"), Task()
task.pool.close()
sets = [data.training_prompts(task, tokenizer, args)]
sets.append(data.evaluation_prompts(task, tokenizer, args))
sizes, workers = gather([list(map(len, sets))]), gather([len(task.pool._workers) > 0])
prints = gather([data.fingerprint(task, s)["prompts_fingerprint"] for s in sets])
task.pool.close()
print(sizes, workers, prints[:2] == prints[2:])
"""


def test_one_rank_prepares_the_prompts_of_all(tmp_path):
    printed = torchrun(PREPARES, tmp_path)
    assert printed.splitlines()[-1] == "[[1024, 512], [1024, 512]] [True, False] True"
    assert printed.count("1024 rows") == 1


def test_the_users_mistake_is_told_by_each_rank_in_one_line(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"problem": "a"}')
    flags = ["--dataset", tmp_path / "d.jsonl", "--output_dir", tmp_path / "out"]
    done = subprocess.run(
        command(2, "opd", *flags), capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert "rank 0: error: dataset " in done.stderr
    assert "gloo" not in done.stderr  # no rank waits for one that has gone


def test_evaluation_is_the_same(tmp_path):
    flags = ["--model", "toy/student", "--num_problems", "9", "--num_samples", "4"]
    for ranks in (1, 2):
        run(ranks, "evaluate", *flags, "--output_dir", tmp_path / str(ranks))
    for name in ("results.json", "samples/toy.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def newest_checkpoint(folder) -> int:
    names = [path.name for path in (folder / "checkpoints").glob("step_*")]
    return max((int(name[5:]) for name in names if name[5:].isdigit()), default=0)


def begin(folder, after: int, checkpoint_every: int) -> subprocess.Popen:
    """grpo.py under two ranks, once it has completed the step after this one."""
    flags = [*SIZES, "--num_steps", "500", "--checkpoint_every", checkpoint_every]
    flags += ["--output_dir", folder]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(2, "grpo", *flags), **pipes, env=ENVIRONMENT)
    until = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(metrics_of(folder)) <= after:
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    return process


@pytest.mark.faults
def test_a_killed_rank_ends_all_with_a_message_and_a_resumable_folder(tmp_path):
    folder = tmp_path / "run"
    process = begin(folder, after=2, checkpoint_every=1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(word) for word in children]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "rank 0: " in errors
    assert "the same command goes on" in errors
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    saved = newest_checkpoint(folder)
    assert saved >= 2
    process = begin(folder, after=saved + 1, checkpoint_every=1000)  # resumes
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert "stopped by SIGTERM" in errors
    steps = [row["step"] for row in metrics_of(folder)]
    assert steps == list(range(1, len(steps) + 1))
    assert newest_checkpoint(folder) == steps[-1]  # the last completed step was saved
