"""The math task: what it reads as an answer, and what it calls right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import grade

from benchmarks.check_labelled import judge
from common.run.inputs import ROOT
from common.tasks.math.answers import compare_cheaply, extract_answer
from common.tasks.task import Verdict


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{2} \quad \text{and} \quad \boxed{3}", "2, 3"),
        (r"\boxed{1}, \boxed{2} and $\boxed{3}$", "1, 2, 3"),
        (r"\boxed{1 + \boxed{2}}", r"1 + \boxed{2}"),
        ("Answer:\n5", None),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{3}", "3"),
        (r"\boxed{4} and \boxed{unfinished", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        ("Answer: 5", "5"),
        ("Answer: 5\nbut no\nAnswer: **6**", "6"),
        (r"Answer: 5, that is \boxed{6}", "6"),
        (r"\boxed{}", None),
        (r"\boxed{1", None),
        (r"so \boxed 2.", "2"),
        (r"\boxed 1,234.5 and", "1,234.5"),
        (r"\boxed B", "B"),
        (r"\boxed in", None),
        ("no answer here, just 12", None),
        ("", None),
    ],
)
def test_extraction(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("7", "7", True),
        ("x+1", "x+1", True),
        ("7.0", "7", True),
        ("1,234", "1234", True),
        ("-3", "3", False),
        ("0.1", ".10", True),
        ("1,23", "123", None),
        (r"1{,}234", "1234", True),
        (r"\$32,\!348", "32348", True),
        ("1 234", "1234", True),
        ("12 34", "1234", None),
        ("$5.$", "5", True),
        ("Even", r"\text{even}", True),
        ("Tuesday", "Thursday", False),
        ("stressed", "desserts", False),
        ("abc", "cab", False),
        ("on", "no", False),
        ("BA", "AB", False),
        ("xy", r"x \cdot y", None),
        ("x", "1" * 29, None),
        ("1" * 40 + ".0", "1" * 40, True),
        ("x", "1" * 3000, False),
        (r"\frac{1}{2}", "0.5", None),
        ("9" * 3000, "1", False),
    ],
)
def test_cheap_comparison(answer, gold, same):
    assert compare_cheaply(answer, gold) is same


@pytest.mark.parametrize(
    ("answer", "gold", "outcome"),
    [
        (r"\frac{1}{2}", "0.5", "correct"),
        (r"\dfrac12", r"\frac{1}{2}", "correct"),
        ("x=3", "3", "correct"),
        (r"50\%", "0.5", "correct"),
        (r"\{2, 1\}", r"\{1,2\}", "correct"),
        ("(1,2)", "(2,1)", "wrong"),
        (r"2\sqrt{2}", r"\sqrt{8}", "correct"),
        (r"\frac{1}{3}", "0.5", "wrong"),
        ("hello", "5", "wrong"),
        ("[0, 1)", "[0,1)", "correct"),
        ("[0, 1)", "[0, 1]", "wrong"),
        (r"(-\infty, 3]", r"(-\infty,3]", "correct"),
        (r"5\text{ cm}", "5", "correct"),
        (r"45^\circ", "45", "correct"),
        ("x^2+2x+1", "(x+1)^2", "correct"),
        (r"\text{(B)}", "B", "correct"),
        ("C", "B", "wrong"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", "correct"),
        (r"3\frac{1}{2}", "3.5", "correct"),
    ],
)
def test_equivalence(task, answer, gold, outcome):
    expected = Verdict(outcome, float(outcome == "correct"), answer)
    assert grade(task, [rf"\boxed{{{answer}}}"], [gold]) == [expected]


BOMBS = [r"\boxed{9^{9^{9^9}}}", r"\boxed{100000000!}"]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *(("8 + 4", "12"), ("13-7-12", "-6"), ("5+15-15", "5"), ("8 − 3", "5"), ("8 × 3", "24")),
        *((r"x=8+4", "12"), (r"8+4\text{ apples}", "12"), ("8+4 apples", "12"), ("8 4", "12")),
        *((r"\frac{12}{4}", "3"), ("2^{10}", "1024"), ("5!", "120"), (r"\sqrt{16}", "4")),
        *((r"\operatorname{gcd}(12, 8)", "4"), (r"\sum_{i=1}^3 i", "6"), ("10^6-1", "999999")),
        *(("the sum is 8+4", "12"), ("8+4+7 m", "19"), ("8+4+7+x-x", "19"), ("$8+4+7$ x", "19")),
        *(("19 x/x", "19"), ("19+0", "19"), (r"19(\sin^2 x+\cos^2 x)", "19"), ("1=8+4+7", "19")),
        *(("5+7", r"12^\circ"), ("5+7", r"12 \text{ cm}"), ("5+7", "x=12"), ("2x+4=10", "x=3")),
        *((r"\binom{10}{3}", "120"), ("17 \\bmod 5", "2"), (r"e^{\ln 3}", "3"), ("8 ÷ 4", "2")),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2"),
        *(("1/2+1/4", r"\frac{3}{4}"), (r"\frac{6}{8}", r"\frac{3}{4}"), (r"7 \% + 5 \%", r"12\%")),
        *(("(3-2, 1+1)", "(1, 2)"), (r"\{2+2, 1\}", r"\{1, 4\}"), ("[2-2, 1)", "[0, 1)")),
        *((r"\sqrt{12}+\sqrt{27}", r"5\sqrt{3}"), (r"(1+\sqrt{2})(3-\sqrt{2})", r"1+2\sqrt{2}")),
        *(("2x+3x", "5x"), ("x^2 x^3", "x^5"), ("2^3 x", "8x"), (r"2x \le 6", r"x \le 3")),
        (r"\begin{pmatrix}1+1\\2\end{pmatrix}", r"\begin{pmatrix}2\\2\end{pmatrix}"),
        # The text of one formula and the tree of another.
        *(("$8 4 7$ $+$", "19"), (r"$\binom{10}{3}$ $!$", "120"), ("$12/4$ $?$", "3")),
        *((r"$x \le 6/2$ $+$", r"x \le 3"), (r"$\frac{6}{8}$ $+$", r"\frac{3}{4}")),
        (r"(\text{ is } \frac{76}{4}}", "19"),
        *(("x=12/4, x=4", "3, 4"), ("x=1 1, x=4", "2, 4")),
        # What the parser carries out.
        *((r"x \approx 12/4", "3"), (r"x \approx 8 4 7", "19"), (r"x \approx \frac{6}{8}", "0.75")),
        *(("x|_{x=12/4}", "3"), (r"(y\pi)|_{y=3^2}", r"9\pi"), (r"(x+y)\vert_{x=8}", "y+8")),
        *(
            ("(6/2, 6, 2)", "(3, 6, 2)"),
            ("(4/2, 4)", "(2, 4)"),
            ("1 1", "2"),
            (r"\{1 1, 3\}", r"\{2,3\}"),
        ),
        (r"\begin{vmatrix}x&1\\1&x\end{vmatrix}", "x^2-1"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^T", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
        # Like terms in brackets, fractions and roots.
        *(("4(3r^3+5r-6)-6(2r^3-r^2+4r)", "6r^2-4r-24"), ("(1+2i)6-3i", "6+9i")),
        *((r"\frac{4+6a}{5}-\frac{1+3a}{4}", r"\frac{11+9a}{20}"), ("(x^2+1)-(x-2)", "x^2-x+3")),
        *((r"2(1+\sqrt3)+3(1-\sqrt3)", r"5-\sqrt3"), (r"\frac{2x+4}{2}", "x+2")),
        *((r"\frac{1}{\sqrt2-1}", r"\sqrt2+1"), (r"\frac{6}{\sqrt3}", r"2\sqrt3")),
        *((r"\sqrt{7+4\sqrt3}", r"2+\sqrt3"), (r"\frac{\sqrt6}{\sqrt2}", r"\sqrt3")),
        *((r"\frac{12-2\sqrt3}{2}", r"6-\sqrt3"), (r"\frac{\pi}{1/9}", r"9\pi")),
        *((r"\frac{1+\sqrt2}{\frac{1}{3-\sqrt2}}", r"1+2\sqrt2"), (r"\ln 24-\ln 2", r"\ln 12")),
        (r"\sin\frac{5\pi}{12}", r"\frac{\sqrt6+\sqrt2}{4}"),
        *((r"[0,3]\cup[2,5]", "[0,5]"), ("-1<x+1<4", "-2<x<3"), ("52_9", "52_8")),
        # A number at the beginning of something else.
        *(
            (r"the length is 12\sqrt{5}", "12"),
            ("The total is 12x", "12"),
            ("there are 12! ways", "12"),
        ),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}" * 2, r"\begin{pmatrix}7&10\\15&22\end{pmatrix}"),
        (r"\frac12\begin{pmatrix}2+2\\3\end{pmatrix}", r"\begin{pmatrix}2\\3/2\end{pmatrix}"),
        *((r"\frac12(22+22\sqrt5)", r"11\sqrt5+11"), (r"84\text{ million}", "84")),
        *(("84 minus one", "84"), (r"the answer is e^{\ln 36}", "36")),
        *(
            ("the answer is 12π", "12"),
            ("12 million", "12"),
            ("12 pi", "12"),
            (r"0.0000004\%", "10^{-7}"),
        ),
    ],
)
def test_an_expression_is_not_a_number(task, answer, gold):
    """A policy that is paid for the expression copies the problem's: seen after 31 GRPO steps."""
    replies = task.pool.call("is_right", [[answer, gold], [answer, answer]])
    assert [reply.value for reply in replies] == [False, True]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *(("12", "12"), ("+12", "12"), ("x = 12", "12"), ("8+4=12", "12"), ("12=8+4", "12")),
        *(("10^6", "1000000"), (r"5 \times 10^{3}", "5000"), (r"25\text{ cm}^2", "25")),
        *((r"90^\circ", "90"), (r"\$5", "5"), ("5 min", "5"), ("12 apples", "12")),
        *((r"\frac{1}{2}", "0.5"), ("1+x", "x+1"), ("x_1 = 12", "12"), ("f(3) = 12", "12")),
        *((r"60 \text{ miles}/\text{hour}", "60"), (r"9 \text{ m}/\text{s}^2", "9")),
        *((r"12 \text{ m}\cdot\text{s}^{-1}", "12"), ("12", "x = 12"), ("12", r"12^\circ")),
        *((r"3\frac{1}{2}", "3.5"), (r"\frac{7}{2}", r"3\frac{1}{2}"), (r"50\%", "0.5")),
        *((r"5 \times 10^{-6}", "0.000005"), (r"\frac{7}{10}", "0.7"), ("-x > -1", "x < 1")),
        *((r"\frac{2+\sqrt{3}}{4}", r"\frac{1}{2}+\frac{\sqrt{3}}{4}"), ("6, 6", "6")),
        *(("2(x+1)", "2x+2"), (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"), ("2^5", "2^{5}")),
        *((r"84 \text{ square inches}", "84"), (r"12\pi \text{ cubic units}", r"12\pi")),
        *((r"137\frac{1}{2}\ \mathrm{square\ yards}", "137.5"), (r"\$12 \text{ per hour}", "12")),
        *((r"\angle ABC = 90^\circ", r"90^\circ"), (r"\triangle ABC = 3\sqrt{13}", r"3\sqrt{13}")),
        *((r"P(X=2) = \frac38", r"\frac{3}{8}"), (r"\text{Total cost} = 12\pi", r"12\pi")),
        (r"\begin{pmatrix}1\\[4pt]2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        *((r"\frac12\begin{pmatrix}1\\3\end{pmatrix}", r"\begin{pmatrix}1/2\\3/2\end{pmatrix}"),),
        *((r"\mathbb{R}", r"(-\infty,\infty)"), (r"[2,\infty)", r"x \ge 2")),
        ("y-2x=3", "y=2x+3"),
        *(("12 eggs", "12"), ("60 dollars", "60"), ("12 km/h", "12"), ("12°", r"12^\circ")),
        *(
            ("36 dollars", r"\$36"),
            (r"\(\$36\)", r"\$36"),
            (r"\$58{,}500 \text{ dollars}", "58500"),
        ),
        *(("137 1/2", r"137 \frac{1}{2}"), (r"N = 10{,}080", "10080"), (r"\textbf{12}", "12")),
        *(
            (r"90^\circ.", r"90^\circ"),
            (r"3\sqrt{13}.", r"3\sqrt{13}"),
            ("Evelyn.", r"\text{Evelyn}"),
        ),
        *(("(3, 4].", "(3,4]"), (r"\left(3, 4\right).", "(3,4)"), ("{(3, 4)}", "(3,4)")),
        *((r"\frac{\sqrt3}{3} \approx 0.577", r"\frac{\sqrt3}{3}"), ("3+4i", "3+4i")),
        *((r"\frac{2}{3+\pi}", r"\frac{2}{\pi+3}"), (r"\frac{1}{2x}", r"\frac{1}{2x}")),
        *(
            (r"2\cos x - 1", r"2\cos(x)-1"),
            (r"\ln 2 + 3", r"3+\ln 2"),
            (r"\frac{x+1}{2}", "(x+1)/2"),
        ),
        ("The answer is 12 - I hope", "12"),
    ],
)
def test_a_finished_answer_is(task, answer, gold):
    assert task.pool.call("is_right", [[answer, gold]])[0].value is True


def test_unreadable_golds_are_named(task):
    golds = ["5", r"\frac{1}{2}", "Even", "(1, 2)", r"\frac{1}{", "@@@", r"\$32,\!348"]
    rows = [{"problem": "p", "answer": gold} for gold in golds]
    warnings = [problem.warning for problem in task.problems(rows, "d")]
    assert [bool(warning) for warning in warnings] == [gold in (golds[4], "@@@") for gold in golds]
    assert warnings[5] == "gold answer '@@@' cannot be read: only an equal string will be right"


def test_free_form_answers(task):
    texts = ["The answer is $4$", "4", "<think>4</think>", "5", "A: 4\nA: 9 ducks"]
    outcomes = [outcome for outcome, _ in judge(task.pool, texts, ["4"] * 5)]
    assert outcomes == ["correct", "correct", "no_answer", "wrong", "wrong"]
    assert [v.outcome for v in grade(task, texts, ["4"] * 5)] == ["no_answer"] * 5
    assert judge(task.pool, ["A: 7\nA: 4"], ["4"], "A:") == [("correct", "4")]


# === labelled answers ===

GRADED = Path(__file__).parent / "data" / "math_answers.jsonl"


def grade_file(*flags: str) -> list:
    command = [sys.executable, "-m", "benchmarks.check_labelled", str(GRADED), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout)


def test_labelled_answers_of_other_projects():
    """Math-Verify's own tests: at least 97% of the rows without a note, no false positive."""
    (report,) = grade_file()
    rows = report["rows"] - report["flagged"]["rows"]
    assert report["rows"] == 260
    assert sum(report["outcomes"].values()) == report["rows"]
    assert report["false_positives"] == 0
    assert report["false_negatives"] <= 0.03 * rows
    assert report["rows_per_second"] > 0


def test_false_negatives_are_shown():
    (report,) = grade_file()
    shown = [row for row in grade_file("--show", "fn") if not row["review"]]
    assert len(shown) == report["false_negatives"]
    assert all(row["expected"] == 1 and "read" in row for row in shown)
    assert [row for row in grade_file("--show", "fp") if not row["review"]] == []
