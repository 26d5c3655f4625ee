"""How long a plan takes at least, the presets that take a day, and --quick."""

import json
from dataclasses import replace

import pytest
from test_bridge import ONE_GPU, QWEN, no_network, plan_of, settings_of  # noqa: F401
from test_report import planned

import bridge
from common.model.flops import forward_flops, update_flops
from common.run.errors import UserError
from workflow import memory
from workflow.fit import Machine
from workflow.hours import GPUS, gpu_of, in_words, print_extrapolation, seconds_of
from workflow.presets import read_file, read_preset

H100 = GPUS["H100"]


def machine_of(ranks: int) -> Machine:
    return Machine(ranks, ranks, 80e9, float("inf"), ("python",), False)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (50, "50 seconds"),
        (3600, "60 minutes"),
        (7200, "2 hours"),
        (86_400, "24 hours"),
        (300_000, "3.5 days"),
        (2_400_000, "4 weeks"),
    ],
)
def test_times_are_said_in_the_unit_of_people(seconds, words):
    assert in_words(seconds) == words


def test_a_stage_takes_the_longer_of_its_bytes_and_its_flops():
    """Of cold GRPO on Qwen3-1.7B, by hand, and 8 GPUs take an eighth."""
    args = bridge.Args(**QWEN | ONE_GPU, routes=("cold",))
    (stage,) = [s for s in planned(args)[0] if s.name == "cold"]
    shape, model = memory.shape_of("Qwen/Qwen3-1.7B"), memory.model_of("Qwen/Qwen3-1.7B")
    model.requires_grad_(True)
    own, completions, sizes = stage.args(), 1320 * 1024, [(256, 4096)]
    update = update_flops(model, sizes) + 2 * forward_flops(model, sizes)  # reference, old policy
    token = 2 * shape.layers * shape.kv
    at_once = (own.vllm_gpu_memory * 80e9 - 2 * shape.params) / (token * (256 + 2048))
    assert at_once < own.vllm_sequences
    cache = 4096 * token * (256 + 2048)
    read = 4096 / at_once * 2 * shape.params + cache
    expected = completions * (read / 3.35e12 + update / 989e12)
    assert seconds_of(stage, H100, machine_of(1)) == pytest.approx(expected, rel=1e-6)
    read = 4096 / 128 * 2 * shape.params + cache  # of a step's 1,024 completions each has 128
    expected = completions * (read / 3.35e12 + update / 989e12) / 8
    assert seconds_of(stage, H100, machine_of(8)) == pytest.approx(expected, rel=1e-6)
    faster = seconds_of(stage, H100._replace(bandwidth=1e18), machine_of(1))
    sampling = forward_flops(model, sizes, 8)
    assert faster == pytest.approx(completions * (sampling + update) / 989e12, rel=1e-6)


def test_a_gpu_is_known_by_its_name_or_by_a_flag():
    assert gpu_of("NVIDIA H200, 580.65", None) == GPUS["H200"]
    assert gpu_of("NVIDIA GeForce RTX 4090, 580.65", None) == GPUS["4090"]
    assert gpu_of("Quadro P400, 580.65", None) is None
    assert gpu_of("Quadro P400, 580.65", 98.9) == pytest.approx((98.9e12, 3.35e11))
    assert gpu_of("", 165) == GPUS["4090"]
    assert gpu_of("NVIDIA H100 PCIe, 580.65", None) == GPUS["H100 PCIe"]
    assert gpu_of("NVIDIA A100-SXM4-80GB, 580.65", None) == GPUS["A100"]
    assert gpu_of("NVIDIA A100-SXM4-40GB, 580.65", None).bandwidth == 1.555e12
    mixed = gpu_of("NVIDIA H200, 580.65; NVIDIA L40S, 580.65", None)
    assert mixed == GPUS["L40S"]  # ranks wait for one another


@pytest.mark.usefixtures("no_network")
def test_the_plan_ends_with_the_least_time_and_what_is_shorter(capsys):
    lora = ONE_GPU | {"teacher_lora_rank": 32}
    _, printed = plan_of(capsys, **lora)
    *_, last = printed.split("# least time")
    assert "weeks, without evaluations" in last
    assert "shorter: --preset one_gpu_day" in last
    assert "GPU(s) of 50 TFLOP/s and 0.17 TB/s" in plan_of(capsys, **lora | {"gpu_tflops": 50})[1]
    _, printed = plan_of(capsys, **lora | {"quick": True})
    assert "minutes, without evaluations" in printed
    assert "shorter" not in printed


# === presets of a day, and --quick ===


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("name", "ranks"), [("one_gpu_day", 1), ("eight_gpu_day", 8)])
def test_a_preset_of_a_day_fits_and_takes_a_day_at_half_of_the_limits(capsys, name, ranks):
    flags = {"preset": name, "gpu_memory_gb": 80.0, "nproc_per_node": ranks, "output_dir": "/no"}
    args = bridge.Args(**flags, host_memory_gb=256.0)
    stages, _ = planned(args)
    trained = [stage for stage in stages if stage.kind != "evaluate"]
    total = sum(seconds_of(stage, H100, machine_of(ranks)) for stage in trained)
    assert 0.4 * 86_400 < 2 * total < 86_400
    bridge.main(replace(args, dry_run=True))
    printed = capsys.readouterr().out
    assert "would not run" not in printed.replace("would not run: checkpoints", "")
    assert settings_of(printed, "opd")["num_steps"] == "100"
    assert f"{name}: Simple-OPD, arXiv 2608.06802" in printed
    named = read_file(name)
    assert (args.teacher, args.student) == (named["teacher"], named["student"])
    assert all(
        pair["source"]
        for kind in named.values()
        if isinstance(kind, dict)
        for pair in kind.values()
    )


def test_a_preset_leaves_the_models_that_were_named():
    args = bridge.Args(preset="one_gpu_day", teacher="Qwen/Qwen3-4B", student="Qwen/Qwen3-0.6B")
    bridge.fill_in(args)
    assert (args.teacher, args.student) == ("Qwen/Qwen3-4B", "Qwen/Qwen3-0.6B")


def test_an_unknown_preset_names_those_that_there_are():
    with pytest.raises(UserError, match="eight_gpu_day, one_gpu_day, or a JSON object"):
        read_preset("two_gpu_day")


def test_quick_makes_every_stage_small_and_leaves_flags_alone():
    args = bridge.Args(**QWEN | ONE_GPU, quick=True, routes=("all",), max_new_tokens=512)
    stages, _ = planned(args)
    kinds = {stage.kind for stage in stages}
    assert {kind for kind in read_preset("quick")} <= kinds
    for stage in stages:
        own = stage.args()
        assert own.max_new_tokens == 512
        if stage.kind == "evaluate":
            assert (own.num_problems, own.num_samples) == (20, 4)
        elif stage.budget_flag is None:
            assert own.prompts_per_step * own.group_size == 128
            assert own.num_steps <= 20
    with pytest.raises(UserError, match="--quick is for models of the hub"):
        bridge.main(bridge.Args(quick=True, dry_run=True))
    named = bridge.Args(teacher="Qwen/Qwen3-8B", quick=True)
    bridge.fill_in(named)
    assert named.output_dir == "runs/bridge-Qwen3-8B-quick"


def test_quick_ends_with_the_hours_of_the_whole(tmp_path, capsys):
    own = QWEN | ONE_GPU | {"output_dir": str(tmp_path), "routes": ("cold",)}
    quick, _ = planned(bridge.Args(**own, quick=True))
    whole, _ = planned(bridge.Args(**own))
    (stage,) = [stage for stage in quick if stage.name == "cold"]
    stage.folder.mkdir(parents=True)
    least = seconds_of(stage, H100, machine_of(1), 700)  # as long as they were
    counts = {"generated_tokens": 700 * 128, "verifier_calls": 128}
    stage.manifest.write_text(json.dumps({"seconds": 3 * least} | counts))
    machine = machine_of(1)
    print_extrapolation(quick, whole, H100, machine)
    (stage,) = [stage for stage in whole if stage.name == "cold"]
    expected = in_words(3 * seconds_of(stage, H100, machine))
    assert f"would train for {expected} (at most" in capsys.readouterr().out
    print_extrapolation(quick, whole, None, replace(machine, gpu=None))  # small models on a CPU
    assert "would train for" in capsys.readouterr().out


# === --trained_teacher ===


def test_a_given_teacher_takes_the_place_of_stage_1_in_every_route():
    names = ("half", "full", "sft_transfer", "sft_teacher", "raw_teacher")
    args = bridge.Args(**QWEN | ONE_GPU, trained_teacher="someone/Qwen3-8B-DAPO", routes=names)
    stages, evaluations = planned(args)
    flags = {stage.name: stage.fixed_flags for stage in stages}
    assert not {"teacher_grpo", "full_teacher_grpo"} & flags.keys()
    for name in ("fkl_warmup", "opd", "full_fkl_warmup", "full_opd", "sft_transfer"):
        assert flags[name]["teacher"] == "someone/Qwen3-8B-DAPO"
    assert flags["raw_teacher_opd"]["teacher"] == "Qwen/Qwen3-8B"
    assert flags["teacher_sft"]["model"] == "Qwen/Qwen3-8B"
    (row,) = [e for e in evaluations if e.id == "models/trained_teacher"]
    assert row.stage.fixed_flags["model"] == "someone/Qwen3-8B-DAPO"
