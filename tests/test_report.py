"""The study's statistics against scipy and enumeration, its accounting against made-up stages."""

import importlib
import json
import shutil
from itertools import combinations

import numpy as np
import pytest
from conftest import SEED
from scipy.stats import ttest_1samp, ttest_rel

import bridge
from common.run.errors import UserError
from common.run.inputs import ROOT, inputs_of
from common.statistics import judge, t_interval, t_test
from workflow.fit import find_machine
from workflow.paper_results import CLAIMS, RESULTS, results_of
from workflow.presets import fill_in, preset_of
from workflow.routes import RECIPES, ROWS, plan


def test_t_interval_and_p_are_scipys():
    rng = np.random.default_rng(SEED)
    for count in (2, 3, 10):
        a, b = rng.normal(0.3, 1, count), rng.normal(0, 1, count)
        theirs = ttest_1samp(a, 0).confidence_interval(0.95)
        assert t_interval(a.tolist()) == pytest.approx(list(theirs))
        assert t_test((a - b).tolist()) == pytest.approx(ttest_rel(a, b).pvalue)
    assert t_interval([0.0, 1.0]) == pytest.approx([0.5 - 12.7062 / 2, 0.5 + 12.7062 / 2], 1e-4)
    assert t_interval([0.3]) is None
    assert t_interval([0.3, 0.3]) is None
    assert t_test([0.3, 0.3]) == 1.0


def test_t_interval_covers_where_a_bootstrap_of_five_seeds_does_not():
    rng = np.random.default_rng(SEED)
    samples = rng.normal(0, 1, (2000, 5))
    ours = np.mean([low <= 0 <= high for low, high in map(t_interval, samples.tolist())])
    means = samples[:, rng.integers(5, size=(1000, 5))].mean(-1)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    assert 0.935 < ours < 0.965
    assert np.mean((low <= 0) & (high >= 0)) < 0.9


def test_holm_is_the_closed_test_of_bonferroni():
    """A claim is rejected if and only if Bonferroni rejects every set of claims that holds it."""
    rng = np.random.default_rng(SEED)
    for _ in range(40):
        differences = rng.normal(rng.choice([0, 1.2], 4)[:, None], 1, (4, 5)).tolist()
        p = [t_test(values) for values in differences]
        sets = [set(s) for size in range(1, 5) for s in combinations(range(4), size)]
        for i, result in enumerate(judge(differences)):
            rejected = all(min(p[j] for j in s) < 0.05 / len(s) for s in sets if i in s)
            assert (result["verdict"] != "undecided") == rejected
            low, high = result["interval"]
            assert low < result["difference"] < high
            assert rejected == (low > 0 or high < 0)  # the interval that is shown says the same


def test_no_claim_passes_after_one_that_failed():
    """Holm's steps end at the first failure: 0.041 is over 0.05 / 2, so 0.0486 is not looked at."""
    differences = [[0.12, 0.22, 0.32, 0.52], [0.1, 0.2, 0.3, 0.5]]
    first, second = (t_test(values) for values in differences)
    assert 0.025 < first < second < 0.05
    assert [result["verdict"] for result in judge(differences)] == ["undecided"] * 2


def test_verdicts():
    up, down, noise = [0.2, 0.21, 0.19, 0.2], [-0.2, -0.21, -0.19, -0.2], [0.3, -0.3, 0.2, -0.1]
    verdicts = [result["verdict"] for result in judge([up, down, noise])]
    assert verdicts == ["supported", "not supported", "undecided"]
    assert judge([[0.5]])[0]["verdict"] == "undecided"  # one seed decides nothing
    for same in (0.0, 0.3):  # two equal differences would have p = 0
        result = judge([[same, same], noise])[0]
        assert result["verdict"] == "no verdict: the seeds do not differ"
        assert (result["interval"], result["p"]) == (None, 1.0)


# === accounting ===


def planned(args: bridge.Args):
    fill_in(args)
    return plan(args, preset_of(args), find_machine(args))


def make_up(stages) -> None:
    """Finished stages with numbers that tell them apart: the n-th has 10^4 n tokens and so on."""
    for n, stage in enumerate(stages, 1):
        stage.folder.mkdir(parents=True)
        script = importlib.import_module(stage.script.removesuffix(".py"))
        config = vars(script.Args(**stage.flags))
        if stage.script != "evaluate.py":
            config |= {"training_problems": 300 if stage.fixed_flags["split"] == "all" else 150}
        shutil.copytree(ROOT / "toy" / "student", stage.folder / "final")
        config |= inputs_of(script.Args(**stage.flags))
        config["environment"] = {
            "machine": "2 cores",
            "git_commit": f"c{stage.fixed_flags['seed']}",
        }
        (stage.folder / "config.json").write_text(json.dumps(config))
        if stage.script == "evaluate.py":
            counts = [n % 17, (3 * n) % 17, 16, 0]
            own = {"num_samples": 16, "num_problems": 4, "accuracy": sum(counts) / 64}
            own |= {"averages": [count / 16 for count in counts], "majority": 0.5}
            own |= {"rollout/length": 9.0, "rollout/truncated": 0.0}
            text = json.dumps({"benchmarks": {"toy": own}})
            (stage.folder / "samples").mkdir()
            (stage.folder / "samples" / "toy.jsonl").write_text('{"completion": "1+1=2"}\n')
        else:
            steps = stage.flags["num_steps"]
            own = {"step": steps, "cursor": 16 * steps, "verifier_calls": 256 * steps}
            own |= {"generated_tokens": 10_000 * n, "seconds": float(n)}
            text = json.dumps(own | {"flops": 1e12 * n, "teacher_flops": 1e9 * n})
            rows = [{"policy/reverse_kl": 1 / step} for step in range(1, steps + 1)]
            (stage.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        stage.manifest.write_text(text)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Every route of two seeds, made up."""
    folder = tmp_path_factory.mktemp("study")
    args = bridge.Args(routes=("all",), seeds=(1, 2), output_dir=str(folder), only_report=True)
    stages, _ = planned(args)
    make_up(stages)
    bridge.main(args)
    results = json.loads((folder / "results.json").read_text())
    return folder, stages, results


def test_cost_of_a_route(study):
    """half: distinct labels of 1H and 2H, uses of both GRPO stages, and all that four stages used;
    replay: the same labels twice; distillation uses none."""
    _, stages, results = study
    rows = {row["title"]: row for row in results["rows"]}
    number = {(s.fixed_flags["seed"], s.name): n for n, s in enumerate(stages, 1)}
    half = rows["RL teacher: FKL, OPD (1H), GRPO (2H)"]
    behind = ("teacher_grpo", "fkl_warmup", "opd", "student_grpo")
    numbers = [sum(number[seed, name] for name in behind) for seed in (1, 2)]
    assert half["distinct_labels"] == 300
    assert half["label_uses"] == 256 * (36 + 12)
    assert half["monitoring_calls"] == 256 * (12 + 24)
    assert half["student_steps"] == 12 + 24 + 12
    assert half["generated_tokens"] == pytest.approx(10_000 * sum(numbers) / 2)
    assert half["training_flops"] == pytest.approx(1e12 * sum(numbers) / 2)
    assert half["teacher_flops"] == pytest.approx(1e9 * sum(numbers) / 2)
    replay = rows["RL teacher: FKL, OPD (1H), GRPO (1H)"]
    assert (replay["distinct_labels"], replay["label_uses"]) == (150, 256 * 48)
    assert rows["raw teacher: FKL, OPD (all)"]["label_uses"] == 0
    assert rows["SFT teacher (1H)"]["label_uses"] == 256 * 36
    same_size = rows["RL student as teacher: FKL, OPD (all)"]
    assert same_size["label_uses"] == rows["cold: GRPO (all)"]["label_uses"] == 256 * 48
    assert same_size["student_steps"] == 48  # not the steps of its teacher
    assert rows["untrained student"]["generated_tokens"] == 0


def test_matched_controls_get_what_the_full_route_has_used(study):
    _, stages, _ = study
    of = {(s.fixed_flags["seed"], s.name): s for s in stages}
    done = [
        json.loads(of[2, name].manifest.read_text())
        for name in ("full_teacher_grpo", "full_fkl_warmup", "full_opd")
    ]
    tokens = of[2, "cold_matched_tokens"].flags["stop_at_tokens"]
    assert tokens == sum(manifest["generated_tokens"] for manifest in done)
    flops = of[2, "cold_matched_flops"].flags["stop_at_flops"]
    assert flops == sum(manifest["flops"] + manifest["teacher_flops"] for manifest in done)


def test_a_control_that_ended_before_its_budget_is_marked(study):
    folder, stages, results = study
    rows = {row["title"]: row for row in results["rows"]}
    of = {(s.fixed_flags["seed"], s.name): s for s in stages}
    for flag, keys in (("tokens", ["generated_tokens"]), ("flops", ["flops", "teacher_flops"])):
        controls = [of[seed, f"cold_matched_{flag}"] for seed in (1, 2)]
        used = [json.loads(s.manifest.read_text()) for s in controls]
        budgets = [s.flags[f"stop_at_{flag}"] for s in controls]
        short = [sum(u[key] for key in keys) < b for u, b in zip(used, budgets, strict=True)]
        assert any(short)  # as they are made up
        title = f"cold: GRPO (all), {flag} of full"
        assert rows[title]["not_matched"] == sum(short)
        marked = f"{title} (NOT matched in {sum(short)} seed(s): the bound on steps came first)"
        assert marked in (folder / "report.md").read_text()
    assert rows["cold: GRPO (all)"]["not_matched"] == 0
    assert sum("NOT matched" in claim["claim"] for claim in results["claims"]) == 2


def test_shared_stages_are_planned_once(study):
    _, stages, _ = study
    folders = [stage.folder for stage in stages]
    assert len(folders) == len(set(folders))
    assert sum("base" in str(folder) for folder in folders) == 2
    assert sum(s.script != "evaluate.py" for s in stages) == 2 * 26


def test_report_shows_routes_claims_and_conditions(study):
    folder, _, results = study
    report = (folder / "report.md").read_text()
    assert all(claim.text in report for claim in CLAIMS)
    assert len(results["claims"]) == len(CLAIMS)
    for row in results["rows"]:
        assert row["title"] in report
        result = row["benchmarks"]["toy"]
        assert result["accuracy"] == pytest.approx(np.mean(list(result["by_seed"].values())))
        assert (result["over_seeds"] is None) == (
            row["route"] == "models" and "(" not in row["title"]
        )
    assert (folder / "report.png").read_bytes()[:4] == b"\x89PNG"
    setting = results["setting"]  # of the stages, whoever writes the report
    assert (setting["machine"], setting["git_commit"]) == ("2 cores", "c0; c1; c2")
    assert setting["weights"] == "float32 from stage to stage, computed with in float32"


def test_a_finished_study_needs_no_model_between_its_stages(tmp_path):
    """Deleted ones are no replaced ones: it is reported. What is yet to run names what must run
    again before."""
    args = {"output_dir": str(tmp_path / "study"), "routes": ("half",)}
    stages = {stage.name: stage for stage in planned(bridge.Args(**args))[0]}
    make_up(stages.values())
    for name in ("teacher_grpo", "fkl_warmup", "opd"):
        shutil.rmtree(stages[name].folder / "final")
    (stages["student_grpo"].folder / "final" / "model.safetensors").unlink()
    bridge.main(bridge.Args(**args, only_report=True))
    assert len(json.loads((tmp_path / "study" / "results.json").read_text())["rows"]) == 6
    message = "".join(f".*seed_0/{n} too, and {n} runs again" for n in ("teacher_grpo", "opd"))
    with pytest.raises(UserError, match=message):  # replay_grpo goes on from opd's model
        bridge.main(bridge.Args(**args | {"routes": ("half", "replay")}))
    shutil.copytree(ROOT / "toy" / "teacher", stages["opd"].folder / "final")
    with pytest.raises(UserError, match=r"eval_opd was finished with other files \(model_"):
        bridge.main(bridge.Args(**args, only_report=True))


def test_only_report_needs_finished_stages(tmp_path):
    with pytest.raises(UserError, match="12 of 12 stages are not finished"):
        bridge.main(bridge.Args(output_dir=str(tmp_path / "none"), only_report=True))


def test_claims_and_paper_speak_of_rows_that_there_are():
    _, evaluations = planned(bridge.Args(teacher="Qwen/Qwen3-8B", routes=("all",)))
    rows = {evaluation.id for evaluation in evaluations}
    assert {row for claim in CLAIMS for row in (claim.lower, claim.higher)} <= rows
    assert set(RESULTS["Qwen3-8B", "Qwen3-1.7B"]) <= rows
    reported = results_of("Qwen/Qwen3-8B", "Qwen/Qwen3-1.7B")
    assert reported["half/student_grpo"] == {"math500": 78.5, "aime24": 23.7, "aime25": 18.5}
    assert reported["opd_only/opd_only_grpo"] == {"math500": 77.8}
    assert results_of("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B") == {}


METHODS = {"fkl_warmup": "FKL", "opd": "OPD", "semi_opd": "semi-OPD", "sft_transfer": "SFT"}
TEACHERS = {"teacher_grpo": "RL teacher", "teacher_sft": "SFT teacher"}
TEACHERS |= {"cold_grpo": "RL student as teacher"}


def title_of(name: str) -> str:
    """Who teaches, then what was done on which problems, from the recipes."""
    recipe = RECIPES[name]
    if recipe.kind in ("teacher_grpo", "teacher_sft"):
        return f"{TEACHERS[recipe.kind]} ({recipe.split})"
    chain = [recipe]
    while chain[0].model in RECIPES:
        chain.insert(0, RECIPES[chain[0].model])
    transfers = [step for step in chain if step.teacher]
    parts = [f"GRPO ({step.split})" for step in chain if not step.teacher]
    if recipe.budget_flag:
        parts.append(f"{recipe.budget_flag.removeprefix('stop_at_')} of full")
    if not transfers:
        return f"cold: {', '.join(parts)}"
    teacher = transfers[0].teacher
    methods = ", ".join(METHODS[step.kind] for step in transfers)
    parts.insert(0, f"{methods} ({transfers[0].split})")
    name = TEACHERS[RECIPES[teacher].kind] if teacher in RECIPES else teacher
    return f"{name}: {', '.join(parts)}"


def test_rows_and_their_titles():
    """Every row of the table is evaluated, and its title says what its recipes do."""
    _, evaluations = planned(bridge.Args(routes=("all",)))
    given = {"models/trained_teacher": "given RL teacher"}  # instead of training one
    assert {evaluation.id: evaluation.title for evaluation in evaluations} | given == ROWS
    for row in (row for row in ROWS if row.partition("/")[2] in RECIPES):
        assert ROWS[row] == title_of(row.partition("/")[2])
