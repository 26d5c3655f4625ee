"""Claims and results of the paper (arXiv 2605.12483), by the rows of our report (route/stage)."""

from collections.abc import Iterable
from typing import NamedTuple


class Claim(NamedTuple):
    """`lower` < `higher`, two rows of the report."""

    text: str
    lower: str
    higher: str
    by: str = "paper"  # who says so


COLD, FULL, HALF = "cold/cold", "full/full_opd", "half/student_grpo"
RAW, SAME_SIZE = "raw_teacher/raw_teacher_opd", "same_size/same_size_opd"
SFT, SFT_THEN_GRPO = "sft_transfer/sft_transfer", "sft_transfer/sft_transfer_grpo"
OPD, OPD_THEN_GRPO = "opd_only/opd_only", "opd_only/opd_only_grpo"
EQUAL_TOKENS = "cold_matched_tokens/cold_matched_tokens"
EQUAL_FLOPS = "cold_matched_flops/cold_matched_flops"
CONTROL, SEMI_PAPER = "control of ours", "arXiv 2610.11291"
CLAIMS = (
    Claim("raw-teacher bridge < cold GRPO", RAW, COLD),
    Claim("cold GRPO < RL-teacher bridge", COLD, FULL),
    Claim("SFT < OPD only, on 1H", SFT, OPD),
    Claim("OPD only < FKL, OPD, on 1H", OPD, "half/opd"),
    Claim(
        "OPD < OPD on the initial student's rollouts", "half/opd", "semi_opd/semi_opd", SEMI_PAPER
    ),
    Claim("SFT < OPD only, then GRPO on 2H", SFT_THEN_GRPO, OPD_THEN_GRPO),
    Claim("OPD only < FKL, OPD, then GRPO on 2H", OPD_THEN_GRPO, HALF),
    Claim("replay of 1H < new labels 2H", "replay/replay_grpo", HALF),
    Claim("cold GRPO < bridge from it (same size)", COLD, SAME_SIZE, "paper, as no worse"),
    Claim("cold GRPO at equal tokens < RL-teacher bridge", EQUAL_TOKENS, FULL, CONTROL),
    Claim("cold GRPO at equal FLOPs < RL-teacher bridge", EQUAL_FLOPS, FULL, CONTROL),
)

BENCHMARKS = ("math500", "aime24", "aime25")
# Student Qwen3-1.7B: row -> avg@16 on BENCHMARKS, with each of the two teachers.
QWEN3 = {
    "models/full_teacher_grpo": ((88.4, 47.7, 36.7), (89.5, 47.1, 39.0)),
    COLD: ((75.9, 19.8, 17.1), (75.9, 19.8, 17.1)),
    FULL: ((79.3, 25.2, 20.2), (78.6, 24.6, 20.8)),
    "half/opd": ((75.4, 22.0, 16.7), (76.3, 22.7, 17.3)),
    HALF: ((78.5, 23.7, 18.5), (78.7, 23.1, 19.2)),
    "replay/replay_grpo": ((75.7, 21.6, 17.0), (75.6, 22.4, 17.6)),
    SFT_THEN_GRPO: ((77.3,), (77.2,)),
    OPD_THEN_GRPO: ((77.8,), (77.5,)),
    "sft_teacher/sft_teacher_opd": ((74.3, 21.8, 14.5), (75.8, 22.0, 15.1)),
    "sft_teacher/sft_teacher_grpo": ((77.2, 22.9, 18.4), (76.9, 23.2, 18.6)),
    RAW: ((71.5, 15.0, 10.6), (72.8, 16.7, 13.5)),
    SAME_SIZE: ((76.5, 20.6, 17.1), (76.5, 20.6, 17.1)),
}
# Table 8, student Llama-3.1-8B-Instruct.
LLAMA = {COLD: (59.8, 12.5, 7.2), RAW: (55.4, 8.8, 3.1), FULL: (62.1, 14.9, 9.2)}
RESULTS = {
    ("Qwen3-8B", "Qwen3-1.7B"): {row: values[0] for row, values in QWEN3.items()},
    ("Qwen3-14B", "Qwen3-1.7B"): {row: values[1] for row, values in QWEN3.items()},
    ("Llama-3.3-70B-Instruct", "Llama-3.1-8B-Instruct"): LLAMA,
}


def results_of(teacher: str, student: str) -> dict[str, dict[str, float]]:
    """Row -> benchmark -> the paper's accuracy in %; empty for models that it does not report."""
    results = RESULTS.get((teacher.rpartition("/")[2], student.rpartition("/")[2]), {})
    return {row: dict(zip(BENCHMARKS, values, strict=False)) for row, values in results.items()}


def routes_of(teacher: str, known: Iterable[str]) -> list[str]:
    """--routes paper: those that the paper reports for this teacher's family, of all `known`."""
    rows = LLAMA if "llama" in teacher.lower() else QWEN3
    return [route for route in known if any(row.startswith(f"{route}/") for row in rows)]
