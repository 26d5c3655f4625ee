"""The workflow: its plan, and one run of it with a step a stage."""

import json
import os
import re
import shlex
import shutil
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_report import planned
from test_scripts import run_process as run

import bridge
from common.model.flops import forward_flops
from common.model.load import load_model
from common.run.errors import RunFailure, UserError
from common.run.inputs import ROOT
from workflow import fit, memory, processes
from workflow.budget import most_flops
from workflow.presets import preset_of, script_args
from workflow.routes import RECIPES, ROUTES, ROWS, STUDENT, TEACHER, table_of_routes
from workflow.stages import Stage

TINY = [
    *("--num_steps", "1", "--prompts_per_step", "2", "--group_size", "2"),
    *("--num_samples", "2", "--num_problems", "8"),
]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the plan needs the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_the_plan_for_the_real_models_needs_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bridge.main(bridge.Args(teacher="Qwen/Qwen3-8B", dry_run=True))
    printed = capsys.readouterr().out
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("python ")]
    scripts = [command[1] for command in commands]
    assert scripts.count("evaluate.py") == 7
    assert [s for s in scripts if s != "evaluate.py"] == [
        *("grpo.py", "fkl_warmup.py", "opd.py", "grpo.py", "grpo.py")
    ]
    teacher_grpo = next(command for command in commands if command[1] == "grpo.py")
    assert teacher_grpo[teacher_grpo.index("--model") + 1] == "Qwen/Qwen3-8B"
    assert teacher_grpo[teacher_grpo.index("--learning_rate") + 1] == "1e-06"
    for source in ("paper", "authors' scripts", "ours: the paper's 10 epochs of a half"):
        assert re.search(rf"^teacher_grpo .* {source}", printed, re.MULTILINE)
    assert "# budget: at most\n" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("teacher", ["toy/teacher", "Qwen/Qwen3-8B"])
def test_every_planned_flag_is_one_of_its_script(teacher):
    args = bridge.Args(teacher=teacher, routes=("all",))
    for stage in planned(args)[0]:
        assert set(stage.flags) <= set(script_args(stage.kind).__dataclass_fields__), stage.name


@pytest.mark.parametrize("teacher", ["toy/teacher", "Qwen/Qwen3-8B"])
def test_labels_and_steps_are_matched(teacher):
    """Label uses: rollouts that are rewarded, or filtered by their verdict."""
    args = bridge.Args(teacher=teacher, routes=("all",))
    stages = {stage.name: stage for stage in planned(args)[0]}
    steps = {n: s.flags["num_steps"] for n, s in stages.items() if "eval" not in n}
    uses = {
        n: steps[n] * stages[n].flags["prompts_per_step"] * stages[n].flags["group_size"]
        for n in steps
    }
    paid = uses["teacher_grpo"] + uses["student_grpo"]  # half
    assert uses["cold"] == uses["full_teacher_grpo"] == paid
    assert uses["teacher_sft"] == uses["teacher_grpo"]
    assert {uses[n] for n in uses if n.endswith("_grpo")} == {
        *(uses["teacher_grpo"], uses["student_grpo"], uses["full_teacher_grpo"])
    }
    transfer = steps["fkl_warmup"] + steps["opd"]
    assert steps["opd_only"] == steps["sft_transfer"] == transfer
    if teacher.startswith("toy"):  # every student has as many updates
        assert steps["cold"] == transfer + steps["student_grpo"]
        for prefix in ("full", "raw_teacher", "same_size"):
            assert steps[f"{prefix}_fkl_warmup"] + steps[f"{prefix}_opd"] == steps["cold"]


def test_the_models_of_each_stage():
    """The trained one, those that are frozen beside it, and the one that samples."""
    stages = {stage.name: stage for stage in planned(bridge.Args(routes=("all",)))[0]}
    teacher, student = (stages[name].final for name in ("teacher_grpo", "fkl_warmup"))
    training = {name: stage for name, stage in stages.items() if stage.kind != "evaluate"}
    models = {name: stage.models(stage.args()) for name, stage in training.items()}
    assert models["fkl_warmup"] == ("toy/student", [teacher], teacher)
    assert models["opd"] == (student, [teacher], student)
    assert models["semi_opd"] == (student, [teacher, student], student)
    assert models["teacher_grpo"] == ("toy/teacher", [], "toy/teacher")
    args = replace(stages["teacher_grpo"].args(), kl_coef=0.1)
    assert stages["teacher_grpo"].models(args)[1] == ["toy/teacher"]
    args = replace(args, lora_rank=4)
    assert stages["teacher_grpo"].models(args)[1] == []  # the model with its adapters off


def test_the_tables_of_routes_name_only_what_there_is():
    """Every stage is some route's or in its past, every row is of a stage, and --help has each
    route."""
    seen = set()

    def visit(name: str) -> None:
        if name not in (TEACHER, STUDENT, None):
            seen.add(name)
            visit(RECIPES[name].model)
            visit(RECIPES[name].teacher)

    for route in ROUTES.values():
        visit(route.last)
    assert seen == RECIPES.keys()
    models = {*(name.replace(" ", "_") for name in (TEACHER, STUDENT)), "trained_teacher", *RECIPES}
    assert {row.partition("/")[0] for row in ROWS} == {"models", *ROUTES}
    assert {row.partition("/")[2] for row in ROWS} <= models
    for name, route in ROUTES.items():
        assert f"{name}/{route.last}" in ROWS
    assert table_of_routes() in (ROOT / "docs" / "bridge.md").read_text()
    help_text = run("bridge", "--help").stdout
    assert all(re.search(rf"^ +{name} +\S", help_text, re.MULTILINE) for name in ROUTES)


# === presets ===


def preset_file(folder, content: object) -> str:
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_users_preset_lies_over_the_built_in_one(tmp_path):
    mine = {
        "student_grpo": {"num_steps": 7, "kl_coef": 1, "dynamic_sampling": True},
        "evaluate": {"enforce_eager": False},
    }
    args = bridge.Args(preset=preset_file(tmp_path, mine), group_size=4)
    preset, built_in = preset_of(args), preset_of(bridge.Args())
    settings = preset["student_grpo"]
    assert settings["num_steps"].value == 7
    assert settings["num_steps"].source == "mine.json"
    assert settings["kl_coef"].value == 1.0
    assert isinstance(settings["kl_coef"].value, float)
    assert settings["learning_rate"] == built_in["student_grpo"]["learning_rate"]
    assert settings["group_size"].source == "command line"
    assert preset["opd"].keys() == built_in["opd"].keys()
    stages = {stage.name: stage for stage in planned(args)[0]}
    command = stages["student_grpo"].command
    assert "--num_steps 7 " in command
    assert "--dynamic_sampling" in command
    assert stages["cold"].flags["num_steps"] == 43  # as teacher_grpo and student_grpo
    assert "--no_enforce_eager" in stages["eval_opd"].command


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"grpo": {}}, "there is no kind of stage grpo; there are teacher_grpo, .*, evaluate"),
        ({"opd": {"kl_coef": 0.1}}, "mine.json: opd: Unrecognized options.* --kl_coef"),
        ({"opd": {"learning_rate": "high"}}, "opd: .*parsing --learning_rate: .*'high'"),
        ({"opd": {"num_steps": 1.5}}, "opd: .*parsing --num_steps: .*'1.5'"),
        ({"opd": {"seed": 3}}, "a preset cannot set seed of opd: the workflow does"),
        ({"opd": [1]}, "mine.json is not .* a JSON object: kind of stage -> flag -> value"),
        ([1], "mine.json is not .* a JSON object"),
        ('{"opd": ', "mine.json is not .* a JSON object"),
    ],
)
def test_a_preset_that_cannot_be_is_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        bridge.main(bridge.Args(preset=preset_file(tmp_path, content), dry_run=True))
    assert "\n" not in str(error.value)


def test_a_preset_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="none.json is not .* No such file"):
        preset_of(bridge.Args(preset=str(tmp_path / "none.json")))


# === the machine ===

QWEN = {"teacher": "Qwen/Qwen3-8B", "dry_run": True, "output_dir": "/tmp/never"}


def settings_of(printed: str, kind: str) -> dict[str, str]:
    rows = [line.split() for line in printed.splitlines() if line.startswith(f"{kind} ")]
    return {row[1]: row[2] for row in rows}


ONE_GPU = {"gpu_memory_gb": 80.0, "host_memory_gb": 256.0, "nproc_per_node": 1}


def plan_of(capsys, **flags) -> tuple[dict[str, list[str]], str]:
    """The cells of the table of stages, and all that was printed."""
    bridge.main(bridge.Args(**QWEN | flags))
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}
    return cells, printed


@pytest.mark.usefixtures("no_network")
def test_one_gpu_of_80_gb_needs_one_flag_which_is_named(capsys):
    cells, printed = plan_of(capsys, **ONE_GPU)
    fits = {name: row[-1] for name, row in cells.items()}
    assert fits == dict.fromkeys(fits, "yes") | {"teacher_grpo": "NO"}
    (problem,) = re.findall(r"this would not run: (.*)", printed)
    assert problem == (
        "teacher_grpo of Qwen/Qwen3-8B needs 175 GB on each of 1 GPU(s) of 80 GB; it would fit "
        "with --teacher_lora_rank 32 (38 GB, vLLM 31 GB) or --teacher_cpu_offload (28 GB, vLLM 31 "
        "GB, host 147 GB) or more GPUs: --nproc_per_node 4 (64 GB, vLLM 31 GB)"
    )
    for flag in ({"teacher_lora_rank": 32}, {"teacher_cpu_offload": True}, {"nproc_per_node": 4}):
        cells, printed = plan_of(capsys, **ONE_GPU | flag)
        assert "would not run" not in printed
        assert "NO" not in [row[-1] for row in cells.values()]
        for kind in ("teacher_grpo", "fkl_warmup", "opd", "student_grpo"):
            assert 0.2 < float(settings_of(printed, kind)["vllm_gpu_memory"]) <= 0.85
    assert "# memory of teacher_grpo of Qwen/Qwen3-8B, GB for each of 4 ranks: computed" in printed
    assert "# disk: at most 415 GB of checkpoints, final models and rollouts" in printed
    printed = plan_of(capsys, **ONE_GPU, teacher_lora_rank=32, quick=True)[1]
    assert "# disk: at most 61 GB" in printed  # so short a run saves no checkpoint
    printed = plan_of(capsys, **ONE_GPU | {"gpu_memory_gb": 8.0})[1]
    assert "on each of 1 GPU(s) of 8 GB; no flag makes it fit" in printed


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("length", "sequences"), [(256, 1024), (1024, 512), (16_384, 256)])
def test_vllm_decodes_as_many_sequences_as_its_share_holds_half_long(capsys, length, sequences):
    small = {"teacher": "Qwen/Qwen3-1.7B", "student": "Qwen/Qwen3-0.6B", "max_prompt_tokens": 256}
    cells, printed = plan_of(capsys, **ONE_GPU | small | {"max_new_tokens": length})
    assert cells["student_grpo"][-2:] == [str(sequences), "yes"]
    chosen = settings_of(printed, "student_grpo")
    assert int(chosen.get("vllm_sequences", 256)) == sequences
    shape = memory.shape_of("Qwen/Qwen3-0.6B")
    cache = (256 + length) / 2 * shape.layers * shape.kv * 2
    share = 80e9 * float(chosen["vllm_gpu_memory"])
    assert sequences == 256 or sequences * cache + 2 * shape.params < share
    assert sequences == 1024 or 2 * sequences * cache > 0.8 * share


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("flags", "stage", "named"),
    [
        # The teacher's weights fit one GPU, and then nothing is left for vLLM.
        ({"teacher": "Qwen/Qwen3-14B", "nproc_per_node": 8}, "teacher_grpo", "--tensor_parallel 2"),
        ({"micro_batch_tokens": 160_000, "nproc_per_node": 8}, "opd", "--micro_batch_tokens 18432"),
        ({"gpu_memory_gb": 32.0}, "evaluate", "--max_new_tokens 8192"),
        ({"gpu_memory_gb": 24.0}, "opd", "--student_lora_rank 32 --student_cpu_offload"),
        ({"gpu_memory_gb": 24.0}, "student_grpo", "--student_cpu_offload"),
    ],
)
def test_what_would_make_a_stage_fit_is_named_and_does(capsys, flags, stage, named):
    """Each flag alone, or if none suffices beside LoRA."""
    _, printed = plan_of(capsys, **ONE_GPU | flags)
    (line,) = re.findall(rf"this would not run: {stage} of .* would fit with (.*)", printed)
    assert named in [re.sub(r" \(.*", "", way) for way in line.split(" or ")]
    words = [word.removeprefix("--") for word in named.split()]
    given = {}
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if not word.isdigit():
            given[word] = int(value) if value.isdigit() else True
    _, printed = plan_of(capsys, **ONE_GPU | flags | given)
    assert f"this would not run: {stage} of" not in printed


@pytest.mark.usefixtures("no_network")
def test_a_machine_that_does_not_suffice_stops_before_anything_is_loaded(tmp_path, monkeypatch):
    gpu = {"gpu_memory_gb": 80.0, "nproc_per_node": 1}
    own = QWEN | {"dry_run": False, "output_dir": str(tmp_path / "run")}
    cases = [
        (
            gpu | {"host_memory_gb": 100.0, "teacher_cpu_offload": True},
            "needs 147 GB of host memory, where there are 100 GB",
        ),
        ({"gpu_memory_gb": 16.0, "host_memory_gb": 999.0}, r"needs \d+ GB on each of 1 GPU"),
        (
            gpu | {"host_memory_gb": 256.0, "teacher_cpu_offload": True},
            "need 415 GB of disk, and .* has 64 GB; choose an --output_dir on a larger disk",
        ),
    ]
    usage = type("Usage", (), {"free": 64e9})
    monkeypatch.setattr(fit.shutil, "disk_usage", lambda folder: usage)
    for there, message in cases:
        with pytest.raises(UserError, match=message):
            bridge.main(bridge.Args(**own, **there))
    assert not (tmp_path / "run").exists()


def test_several_gpus_and_machines_are_launched_by_torchrun(capsys):
    several = {"gpu_memory_gb": 80.0, "host_memory_gb": 999.0, "nproc_per_node": 8}
    bridge.main(bridge.Args(**QWEN, **several))
    printed = capsys.readouterr().out
    launch = "torchrun --nproc_per_node 8 --shutdown_timeout 600"
    assert printed.count(f"\n{launch} --standalone grpo.py ") == 3
    assert printed.count(f"\n{launch} --standalone evaluate.py ") == 7
    assert "cpu_offload" not in settings_of(printed, "teacher_grpo")
    address = {"nnodes": 2, "node_rank": 1, "master_addr": "one.example"}
    bridge.main(bridge.Args(**QWEN, **several, **address))
    launch += " --nnodes 2 --node_rank 1 --master_addr one.example"
    assert f"\n{launch} --master_port 29500 opd.py " in capsys.readouterr().out
    with pytest.raises(UserError, match="--nnodes needs --master_addr"):
        bridge.main(bridge.Args(**QWEN, **several, nnodes=2))
    with pytest.raises(UserError, match="--jobs is for the CPU"):
        bridge.main(bridge.Args(**QWEN, **several, jobs=2))


@pytest.mark.usefixtures("no_network")
def test_without_a_gpu_the_plan_is_for_one_of_80_gb_and_begins_with_a_table(capsys, monkeypatch):
    monkeypatch.setattr(fit.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e9))
    bridge.main(bridge.Args(**QWEN))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("there is no GPU here: planned for GPUs of 80 GB")
    header, _, *rows = [line.split("|")[1:-1] for line in lines[1:9] if line.startswith("|")]
    assert [cell.strip() for cell in header] == fit.FIT_HEADER
    names = ["teacher_grpo", "fkl_warmup", "opd", "student_grpo", "cold"]
    assert [row[0].strip() for row in rows] == names
    assert [row[-1].strip() for row in rows] == ["NO", "yes", "yes", "yes", "yes"]
    assert "of disk" not in "".join(lines)  # this machine's memory and disk do not count
    assert "host memory, where" not in "".join(lines)


# === runs ===


@pytest.mark.slow
def test_the_workflow_under_two_ranks(tmp_path):
    flags = [*TINY, "--routes", "raw_teacher", "--nproc_per_node", "2"]
    wrong = run("bridge", *flags, "--dataset", "nothing.jsonl", "--output_dir", tmp_path / "wrong")
    assert wrong.returncode == 2
    assert "nothing.jsonl does not exist" in wrong.stderr
    done = run("bridge", *flags, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["student_steps"] for row in rows] == [0, 0, 4]


@pytest.mark.parametrize("forks", [False, True])
def test_jobs_run_what_is_ready_and_a_failure_stops_the_others(forks, tmp_path, monkeypatch):
    """Two stages at a time, none before what it needs."""
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "2"))
    log = tmp_path / "log"
    body = """
import json, pathlib, signal, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder, log = pathlib.Path(flags["--output_dir"]), pathlib.Path(flags["--log"])
write = lambda what: log.open("a").write(f"{what} {folder.name}\\n")
signal.signal(signal.SIGTERM, lambda *_: (write("stopped"), sys.exit(143)))
write("begin")
while f"begin {flags['--until']}\\n" not in log.read_text():
    time.sleep(0.02)
if folder.name == "bad":
    sys.exit(1)
folder.mkdir()
write("end")
(folder / "manifest.json").write_text("{}")
"""
    (tmp_path / "stub.py").write_text(body)
    monkeypatch.setattr(processes, "ROOT", tmp_path)

    def stage(name: str, until: str, *needs):
        """A stage that ends once the stage `until` has begun."""
        folder = tmp_path / "out" / name
        fixed_flags = {"until": until, "log": str(log), "output_dir": str(folder)}
        return Stage(name, "", "stub.py", folder, fixed_flags, {}, list(needs))

    a, b = stage("a", "d"), stage("b", "a")
    c, d = stage("c", "c", a), stage("d", "d", b)
    processes.run_stages([a, c, b, d], 2, forks)
    lines = log.read_text().split("\n")
    assert set(lines[:2]) == {"begin a", "begin b"}
    assert lines.index("begin d") < lines.index("end a") < lines.index("begin c")
    log.unlink()
    with pytest.raises(RunFailure, match="stage bad failed"):
        processes.run_stages([stage("slow", "nothing"), stage("bad", "slow")], 2, forks)
    assert "stopped slow" in log.read_text()


@pytest.mark.slow
def test_the_workflow_runs_skips_and_reports(tmp_path):
    folder = tmp_path / "out"
    done = run("bridge", *TINY, "--output_dir", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert len(rows) == 7
    uses = {row["title"]: row["label_uses"] for row in rows}
    assert (uses["untrained student"], uses["raw teacher"]) == (0, 0)
    assert uses["RL teacher: FKL, OPD (1H)"] == 4
    assert uses["RL teacher: FKL, OPD (1H), GRPO (2H)"] == uses["cold: GRPO (all)"] == 8
    report = (folder / "report.md").read_text()
    assert report.count("\n| ") == 2 * 9
    assert "it is no evidence" in report
    assert (folder / "report.png").read_bytes()[:4] == b"\x89PNG"
    again = run("bridge", *TINY, "--output_dir", folder)
    assert again.returncode == 0
    assert again.stdout.count("finished before") == 12
    other = run("bridge", *TINY, "--output_dir", folder, "--group_size", "4")
    assert other.returncode == 2
    assert "finished with other settings (group_size)" in other.stderr
    dropped = run("bridge", *TINY[:-2], "--output_dir", folder)  # --num_problems back to all
    assert dropped.returncode == 2
    assert "finished with other settings (num_problems)" in dropped.stderr
    weights = folder / "seed_0" / "fkl_warmup" / "final" / "model.safetensors"
    kept = weights.read_bytes()
    shutil.copy(ROOT / "toy" / "student" / "model.safetensors", weights)
    replaced = run("bridge", *TINY, "--output_dir", folder)
    assert replaced.returncode == 2
    assert "was finished with other files (model_fingerprint)" in replaced.stderr
    weights.write_bytes(kept)
    files = {path: path.read_bytes() for path in (folder / "seed_0" / "opd").glob("*.json*")}
    foreign = run("bridge", *TINY, "--output_dir", folder / "seed_0" / "opd")
    assert foreign.returncode == 2
    assert "is no study's" in foreign.stderr
    assert files == {path: path.read_bytes() for path in files}
    empty = run("bridge", "--seeds", "--output_dir", tmp_path / "empty")
    assert empty.returncode == 2
    assert "need a value each" in empty.stderr


@pytest.mark.slow
def test_a_failing_stage_stops_the_workflow(tmp_path):
    flags = [*TINY, "--dataset", "nothing.jsonl", "--output_dir", tmp_path / "out"]
    done = run("bridge", *flags)
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: stage teacher_grpo failed")
    assert "nothing.jsonl does not exist" in message
    assert "to retry: python grpo.py" in message
    assert not (tmp_path / "out" / "seed_0" / "fkl_warmup").exists()
    assert ROOT.joinpath("bridge.py").exists()


def test_the_budget_counts_as_training_does(monkeypatch):
    """FLOPs of a forward pass as they are counted, but for norms; passes of each trainer."""
    args = bridge.Args(num_minibatches=1)
    stages = {stage.name: stage for stage in planned(args)[0]}
    for name, model, passes in (
        ("opd", "toy/student", 3),
        ("student_grpo", "toy/student", 3),  # no reference: kl_coef is 0 in the toy's preset
    ):
        own = stages[name].args()
        lengths = [(own.max_prompt_tokens, own.max_new_tokens)] * own.group_size
        loaded = load_model(model, "float32", torch.device("cpu"))
        groups = own.num_steps * own.prompts_per_step
        sampling, update = most_flops(stages[name])
        once = groups * forward_flops(loaded, lengths)
        assert sampling == pytest.approx(
            groups * forward_flops(loaded, lengths, own.group_size), rel=0.03
        )
        if name == "opd":
            teacher = load_model("toy/teacher", "float32", torch.device("cpu"))
            update -= groups * forward_flops(teacher, lengths)
        assert update == pytest.approx(passes * once, rel=0.03)


def test_lora_by_kind_of_stage():
    """The rank goes where it was asked for, with the rate that suits it; the user's own wins."""
    args = bridge.Args(teacher="Qwen/Qwen3-8B", teacher_lora_rank=32)
    settings = {stage.name: stage.settings for stage in planned(args)[0]}
    assert settings["teacher_grpo"]["lora_rank"].value == 32
    assert settings["teacher_grpo"]["learning_rate"].value == pytest.approx(1e-5)
    assert "LoRA Without Regret" in settings["teacher_grpo"]["learning_rate"].note
    assert all("lora_rank" not in settings[name] for name in ("fkl_warmup", "opd", "student_grpo"))
    args = bridge.Args(teacher="Qwen/Qwen3-8B", student_lora_rank=16)
    settings = {stage.name: stage.settings for stage in planned(args)[0]}
    rates = {name: settings[name]["learning_rate"].value for name in settings if "eval" not in name}
    expected = {"teacher_grpo": 1e-6, "fkl_warmup": 1e-5, "opd": 2e-6, "student_grpo": 1e-5}
    assert {name: rates[name] for name in expected} == pytest.approx(expected)
    args = bridge.Args(teacher="Qwen/Qwen3-8B", teacher_lora_rank=32, learning_rate=3e-6)
    grpo = next(stage for stage in planned(args)[0] if stage.name == "teacher_grpo")
    assert grpo.settings["learning_rate"].value == 3e-6


@pytest.mark.slow
def test_the_workflow_on_another_task(tmp_path):
    """Every stage, the evaluations and the report; other rows and a changed task are noticed, and
    models that were deleted are not missed."""
    (tmp_path / "tasks").mkdir()
    for path in (ROOT / "examples" / "tasks").glob("countdown*"):
        shutil.copy(path, tmp_path / "tasks")
    task, folder = tmp_path / "tasks" / "countdown.py", tmp_path / "out"
    flags = [*TINY, "--task", task, "--max_prompt_tokens", "320", "--output_dir", folder]
    done = run("bridge", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads((folder / "results.json").read_text())["rows"]) == 7
    rows = (folder / "seed_0" / "opd" / "rollouts" / "step_1.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["problem"].startswith("Make ")
    again = run("bridge", *flags)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before") == 12
    file = task.with_name("countdown_test.jsonl")
    kept = file.read_text()
    file.write_text(kept.replace('"target": ', '"target": 9'))
    replaced = run("bridge", *flags)
    assert replaced.returncode == 2
    assert "prompts_fingerprint" in replaced.stderr
    file.write_text(kept)
    for model in (folder / "seed_0").glob("*/final"):
        shutil.rmtree(model)
    assert run("bridge", *flags).stdout.count("finished before") == 12
    task.write_text(task.read_text() + "\n# changed\n")
    changed = run("bridge", *flags)
    assert changed.returncode == 2
    assert "countdown.py fingerprint)" in changed.stderr
