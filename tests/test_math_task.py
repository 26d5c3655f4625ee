"""The math task: what it reads as an answer, and what it calls right."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import grade

from benchmarks.check_labelled import judge
from common.run.inputs import ROOT
from common.tasks.math import extract_answer, gold, golds, is_right, prompt


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{2} \quad \text{and} \quad \boxed{3}", "2, 3"),
        (r"\boxed{1}, \boxed{2} and $\boxed{3}$", "1, 2, 3"),
        (r"\boxed{1} apples \text{ and } \boxed{2}", "1, 2"),
        (r"\boxed{1} apples, and then the answer is \boxed{2}", "2"),
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


def pairs(table: str) -> list[tuple[str, str]]:
    """Read `ANSWER => GOLD`, parted by line ends or three spaces."""
    return [tuple(pair.split(" => ")) for pair in re.split(r"\n|   +", table.strip())]


def verdicts(task, table: list[tuple[str, str]]) -> dict:
    replies = task.pool.call("is_right", [list(pair) for pair in table], patience=5)
    return {pair: reply.value for pair, reply in zip(table, replies, strict=True)}


WITHOUT_A_PARSER = r"""
x+1 => x+1   7.0 => 7   1,234 => 1234   0.1 => .10   1{,}234 => 1234   \$32,\!348 => 32348
1 234 => 1234   $5.$ => 5   Even => \text{even}   35.0\% => 35   \text{13} => 13   5e3 => 5000
"""
WRONG_WITHOUT_A_PARSER = r"""
-3 => 3   1,23 => 123   12 34 => 1234   Tuesday => Thursday   stressed => desserts   abc => cab
on => no   BA => AB   \frac{1}{3} => 0.5   8+4 => 12   x => 12
"""


@pytest.mark.parametrize(
    ("table", "right"), [(WITHOUT_A_PARSER, True), (WRONG_WITHOUT_A_PARSER, False)]
)
def test_numbers_and_words_need_no_parser(monkeypatch, table, right):
    monkeypatch.setattr("common.tasks.math._math_verify", None)
    for answer, wanted in pairs(table):
        assert is_right(answer, wanted) is right, (answer, wanted)
    assert is_right("1" * 40 + ".0", "1" * 40)
    assert not is_right("x", "1" * 3000)
    assert not is_right("9" * 3000, "1")
    assert not is_right("9" * 3000 + ".0", "9" * 3000)  # too long to be looked at


BOMBS = [r"\boxed{9^{9^{9^9}}}", r"\boxed{100000000!}"]

NOT_A_NUMBER = r"""
8 + 4 => 12   13-7-12 => -6   5+15-15 => 5   8 − 3 => 5   8 × 3 => 24   x=8+4 => 12   12/4 => 3
8+4\text{ apples} => 12   8+4 apples => 12   8 4 => 12   \frac{12}{4} => 3   2^{10} => 1024
5! => 120   \sqrt{16} => 4   \operatorname{gcd}(12, 8) => 4   \sum_{i=1}^3 i => 6   8 ÷ 4 => 2
10^6-1 => 999999   the sum is 8+4 => 12   8+4+7 m => 19   8+4+7+x-x => 19   $8+4+7$ x => 19
19 x/x => 19   19+0 => 19   19(\sin^2 x+\cos^2 x) => 19   1=8+4+7 => 19   12=8+4 => 12
5+7 => 12^\circ   5+7 => 12 \text{ cm}   5+7 => x=12   2x+4=10 => x=3   x+y=5 => 5
\binom{10}{3} => 120   17 \bmod 5 => 2   e^{\ln 3} => 3   1/2+1/4 => \frac{3}{4}
\begin{vmatrix}1&2\\3&4\end{vmatrix} => -2   7 \% + 5 \% => 12\%   (3-2, 1+1) => (1, 2)
\{2+2, 1\} => \{1, 4\}   [2-2, 1) => [0, 1)   2x \le 6 => x \le 3   -1<x+1<4 => -2<x<3
\begin{pmatrix}1+1\\2\end{pmatrix} => \begin{pmatrix}2\\2\end{pmatrix}   $8 4 7$ $+$ => 19
$\binom{10}{3}$ $!$ => 120   $12/4$ $?$ => 3   $x \le 6/2$ $+$ => x \le 3
$\frac{6}{8}$ $+$ => \frac{3}{4}   (\text{ is } \frac{76}{4}} => 19   x=12/4, x=4 => 3, 4
x=1 1, x=4 => 2, 4   x \approx 12/4 => 3   x \approx 8 4 7 => 19   x|_{x=12/4} => 3
(6/2, 6, 2) => (3, 6, 2)   (4/2, 4) => (2, 4)   1 1 => 2   \{1 1, 3\} => \{2,3\}
[0,3]\cup[2,5] => [0,5]   52_9 => 52_8   the length is 12\sqrt{5} => 12   84 minus one => 84
The total is 12x => 12   there are 12! ways => 12   84\text{ million} => 84   12 million => 12
\begin{pmatrix}1&2\\3&4\end{pmatrix}^T => \begin{pmatrix}1&3\\2&4\end{pmatrix}   12 pi => 12
\frac12\begin{pmatrix}2+2\\3\end{pmatrix} => \begin{pmatrix}2\\3/2\end{pmatrix}   6/x => 6
the answer is e^{\ln 36} => 36   the answer is 12π => 12   0.0000004\% => 10^{-7}   6xy => 6
18 \frac{2}{2} => 19   1.9 \times 10 => 19   8 and 11 => 19   ８＋１１ => 19   \text{8+11} => 19
8 plus 11 => 19   19/1 => 19   (8)(2) => 16   6, 7 => 6   6 \text{ or } 7 => 6   - -6 => 6
e-5 => 0.00001   10^{999} => 5   10^{999} => 0.5   \infty => 0.5
100/2 => 50\%   \{3,5\} => (3,5)   5 \text{ if } x>0, 6 \text{ otherwise} => 5   (8+11) => 19
"""
# What a policy might write for the sum, or another way round to the number.
HOSTILE = r"""
19 \text{ since 8+11} => 19   8+11\text{ i.e. 19} => 19   8+11 \Rightarrow 19 => 19
8+11 \to 19 => 19   8+11 \equiv 19 => 19   8+11, 19 => 19   \overline{8+11} => 19
8\overline{11} => 19   \frac{8+11}{1} => 19   19\%+0 => 19   8e0+11 => 19   {8+11} => 19
{{8}+{11}} => 19   \mathrm{8+11} => 19   \mbox{8+11} => 19   8\phantom{+}11 => 19
8 \oplus 11 => 19   ⁸+11 => 19   8⁺11 => 19   ⅛+⅛ => 1/4   ¼+¼ => 1/2   2¼-1 => 5/4
3/4-1/4 => 1/2   1/2/1 => 1/2   \frac{1}{2} \cdot 1 => 1/2   1+1/2 => 3/2   1 + \frac12 => 1.5
3 \div 2 => 1.5   3:2 => 1.5   3 over 2 => 1.5   50\% + 1 => 1.5   0.75 \times 2 => 1.5
7.5e-1*2 => 1.5   x = 3/1 => 3   x_{8+11} = 8+11 => 19   8+11 = 8+11 = 8 + 11 => 19
the sum 8+11 is 8+11 => 19   is 8+11 => 19   = 8+11 => 19   \in 8+11 => 19   19 apples + 0 => 19
8 apples and 11 pears => 19   8 apples + 11 apples => 19   \sqrt[3]{8} => 2   √4 => 2
4^{1/2} => 2   |2| => 2   \max(2,1) => 2   4 mod 3 + 1 => 2   \log_2 4 => 2   \ln e^2 => 2
i^2 => -1   e^{i\pi} => -1   \cos\pi => -1   2{,}000 - 1 => 1999   2,000-1 => 1999   1e3-1 => 999
10^3-1 => 999   1, 999 => 1999   \{1, 1+1\} => \{1,2\}   1 \cup 2 => 1, 2   (0,1+1) => (0,2)
[0,4/2] => [0,2]   (0,2)\cup(2,2+2) => (0,2)\cup(2,4)   x<1+1 => x<2   1+1>x => x<2   x+1<3 => x<2
8 \frac{22}{2} => 19   2 \times 9.5 => 19   \frac{38}{2} => 19   12−-7 => 19   8\,011+0 => 8011
f(8+11) => 19   \boxed{8+11} => 19   8+11 \approx 19 => 19   x \in [8+11] => 19   ½+½ => 1
5²-6 => 19   19^1 => 19   250 \times 10 => 2500   5 choose 2 => 10   8%+11% => 19
\frac{2}{2 \cdot 2} => \frac{1}{2}   3 - 2.5 => 0.5   x > 2-2 => (0,\infty)   3+3 => 6\%
3+3 => \$6   110_2 => 6   6 \bmod 7 => 6   6 times 1 => 6   3+3=6+0 => 6   \pm 6 => 6
\lfloor 6.5 \rfloor => 6   6.0000001 => 6   \int_0^6 dx => 6   3{+}3 => 6   3\text{ plus }3 => 6
\text{sum of }3\text{ and }3 => 6   a = 3, b = 3 => 6   3 \times 10^{0}+3 => 6
30\times 20 \% => 6   6 \text{ of } 12 => 6   12 ∶ 2 => 6   2·3 => 6   2*3 => 6   (2)(3) => 6
2\,3 => 6
"""
NOT_FINISHED = r"""
\sqrt{12}+\sqrt{27} => 5\sqrt{3}   (1+\sqrt{2})(3-\sqrt{2}) => 1+2\sqrt{2}   \ln 24-\ln 2 => \ln 12
2(1+\sqrt3)+3(1-\sqrt3) => 5-\sqrt3   \frac{6}{\sqrt3} => 2\sqrt3   \sqrt{7+4\sqrt3} => 2+\sqrt3
\frac{\sqrt6}{\sqrt2} => \sqrt3   \frac{12-2\sqrt3}{2} => 6-\sqrt3   (y\pi)|_{y=3^2} => 9\pi
\frac{1+\sqrt2}{\frac{1}{3-\sqrt2}} => 1+2\sqrt2   \frac12(22+22\sqrt5) => 11\sqrt5+11
\sin\frac{5\pi}{12} => \frac{\sqrt6+\sqrt2}{4}   (x+y)\vert_{x=8} => y+8
x=\sqrt{36-30} => x=\sqrt6   x=\sqrt{12}+\sqrt{27} => x=5\sqrt3   V=\pi\cdot2^2\cdot3 => V=12\pi
(1+\sqrt3)^2 => 4+2\sqrt3   (\sqrt2+1)^3 => 7+5\sqrt2   \sqrt2(1+\sqrt2) => 2+\sqrt2
\sqrt3\cdot\sqrt2 => \sqrt6   \sqrt{2\cdot17} => \sqrt{34}   \sqrt{|3|+10} => \sqrt{13}
2\pi\cdot6 => 12\pi   \pi 6^2 => 36\pi   2^{10}\pi => 1024\pi   e^{2}e^{3} => e^5
3.605551 => \sqrt{13}
2\begin{pmatrix}\sqrt2\\1\end{pmatrix} => \begin{pmatrix}2\sqrt2\\2\end{pmatrix}
x \ne 2-1 => x \ne 1   (1+2, \frac{\pi}{2}) => (3, \frac{\pi}{2})   2x+3x => 5x
\frac{2x+4}{2} => x+2   \sqrt{16}+x => 4+x   (-k+4)+(-2+3k) => 2k+2
\frac{\sec x}{\sin x}-\frac{\sin x}{\cos x} => \cot x   \frac{(10r^3)(4r^6)}{8r^4} => 5r^5
\lim_{h\to0}\frac{(x+h)^2-x^2}{h} => 2x
\frac{1}{2\cdot2} => \frac { 1 } { 4 }   2^{-2} => \frac { 1 } { 4 }
"""
ANOTHER = r"""
3 \text{ hours } 20 \text{ minutes} => 3 \text{ hours } 40 \text{ minutes}   cm^2 => 20 $cm^{2}$
3 => 3 \text{ apples and } 4 \text{ pears}   10 \text{ AM} => 10 \text{ PM}   10 cm => 10 m
10 cm => 10 \text{ m}   5 minutes => 5 hours   a + b + d => a + b + c   2\pi r => 2 \pi r h
\sin 2 t => \sin 2   20 m^2 => 20 $cm^{2}$   A => \textbf{(E)}\ 12   (1,2) => (2,1)
\frac{1}{3} => 0.5   hello => 5   [0, 1) => [0, 1]   C => B   11a+c => 7 = 11a+c   1:00 => 12:00
9 => 9m^2   2 => 2abcd   0 => R-r   0 => \pi(R^2-r^2)   r-R => R-r   1 => \frac{R}{r}
\frac{r}{R} => \frac{R}{r}   2r => R+r   m^2 => Mm   \frac{1}{2} => \frac{m}{M+m}   f(x) => F(x)
1 => \binom{N}{n}   2X => 2x   0=0 => N=n   1=2 => N=n   x=x+1 => y=y+2   N => N=n
x=2, y=1 => x=1, y=2   a=1, b=2 => x=1, y=2   3120 => (3,120)   100 => (0,100)   [0,495] => 495
x \in [0,495] => 495   \{0,495\} => 495   0,495 => 495   00,019 => 19   2251252 => (2,251,252)
(2,12)\cup 12102 => (2,12)\cup(12,102)   n! = 120 => 120   \{-\sqrt3,\sqrt3\} => (-\sqrt3, \sqrt3)
-\sqrt3,\sqrt3 => (-\sqrt3, \sqrt3)   \{a,b\} => (a,b)   (A) or (B) => A   (A), (B) => A
(A)(B)(C)(D)(E) => A   A. B. C. D. E. => A   x \not= 5 => 5   J => J: 4 \text{ hr}, S: 14 \text{ hr}
5 \text{ is not right} => 5   50% more than candidate => 50   (1,2;3) => (1,2,4)
\begin{pmatrix}1&2\end{pmatrix} => \begin{pmatrix}1\\2\end{pmatrix}   (6,6) => 6
"""
RIGHT = r"""
12 => 12   +12 => 12   x = 12 => 12   8+4=12 => 12   x=8+4=12 => 12   10^6 => 1000000
5 \times 10^{3} => 5000   25\text{ cm}^2 => 25   90^\circ => 90   \$5 => 5   5 min => 5
12 apples => 12   \frac{1}{2} => 0.5   1+x => x+1   x_1 = 12 => 12   f(3) = 12 => 12
60 \text{ miles}/\text{hour} => 60   9 \text{ m}/\text{s}^2 => 9   12 => x = 12   12 => 12^\circ
12 \text{ m}\cdot\text{s}^{-1} => 12   3\frac{1}{2} => 3.5   \frac{7}{2} => 3\frac{1}{2}
50\% => 0.5   5 \times 10^{-6} => 0.000005   \frac{7}{10} => 0.7   6, 6 => 6   2(x+1) => 2x+2
\frac{2+\sqrt{3}}{4} => \frac{1}{2}+\frac{\sqrt{3}}{4}   \frac{n(n+1)}{2} => \frac{n^2+n}{2}
2^5 => 2^{5}   84 \text{ square inches} => 84   12\pi \text{ cubic units} => 12\pi
y-2x=3 => y=2x+3   137\frac{1}{2}\ \mathrm{square\ yards} => 137.5   \$12 \text{ per hour} => 12
(3, 4]. => (3,4]   \angle ABC = 90^\circ => 90^\circ   \triangle ABC = 3\sqrt{13} => 3\sqrt{13}
12 eggs => 12   P(X=2) = \frac38 => \frac{3}{8}   \text{Total cost} = 12\pi => 12\pi
60 dollars => 60   \begin{pmatrix}1\\[4pt]2\end{pmatrix} => \begin{pmatrix}1\\2\end{pmatrix}
12 km/h => 12   \mathbb{R} => (-\infty,\infty)   [2,\infty) => x \ge 2   12° => 12^\circ
36 dollars => \$36   \(\$36\) => \$36   \$58{,}500 \text{ dollars} => 58500
137 1/2 => 137 \frac{1}{2}   N = 10{,}080 => 10080   \textbf{12} => 12   90^\circ. => 90^\circ
3\sqrt{13}. => 3\sqrt{13}   Evelyn. => \text{Evelyn}   \left(3, 4\right). => (3,4)
{(3, 4)} => (3,4)   3+4i => 3+4i   \frac{\sqrt3}{3} \approx 0.577 => \frac{\sqrt3}{3}
\frac{2}{3+\pi} => \frac{2}{\pi+3}   \frac{1}{2x} => \frac{1}{2x}   2\cos x - 1 => 2\cos(x)-1
\ln 2 + 3 => 3+\ln 2   xy => x \cdot y   \frac{x+1}{2} => (x+1)/2   \dfrac12 => \frac{1}{2}
\{2, 1\} => \{1,2\}   2\sqrt{2} => \sqrt{8}   (-\infty, 3] => (-\infty,3]   x^2+2x+1 => (x+1)^2
\text{(B)} => B   n + m => m+n   \left( 3, \frac{\pi}{2} \right) => (3,\pi/2)   20 => 20 $cm^{2}$
\frac{1}{2} b h => \frac{1}{2}bh   12.5\% => 12.5   12.5 => 12.5\%   \textit{13} => 13
\rm 13 => 13   \mathbf{\frac{1}{2}} => \frac12   \ 13 \  => 13   \frac{6}{8} => \frac{3}{4}
(\sqrt{2},\infty) => x > \sqrt{2}   12.0 => 12   \textbf{(E)}\ 12 => E   E => \textbf{(E)}\ 12
12 => \textbf{(E)}\ 12   12^{\mathrm{th}} => 12   a=-2, b=-2 => -2,-2   pi/2 => \frac{\pi}{2}
12dollars => 12   \frac{a+b}c => \frac{a+b}{c}   0.\overline{3} => \frac13   x>3 => (3,\infty)
12 \text{ m} => 12   0.3333333 => 1/3   -x > -1 => x < 1   \frac{1}{2} => 50\%   1000,99 => 1000.99
1.22 => 1,22   0.111 => 0,111   4x-2y+6=0 => y=2x+3
\frac{1}{2}+\frac{\sqrt3}{4} => \frac{2+\sqrt3}{4}   \frac{\sin x}{\cos x} => \tan x
(5,2),(7,2) => p=5,q=2;p=7,q=2   14.0-1.0i => 14-i   -(r-R) => R-r   y=2, x=1 => x=1, y=2
(3, 120) => (3,120)   1, 120 => \{1,120\}   (2, 12.0) \cup (12, 102) => (2,12)\cup(12,102)
\boxed{19} => 19   19°C => 19   x = \pm 2 => -2, 2   0.\dot{3} => \frac13   (a) => A
\frac { 1 } { 4 } => \frac{1}{4}   1+\sqrt{19}, 1-\sqrt{19} => 1 \pm \sqrt{19}
(1, \frac{\pi}{2}) => (1,\pi/2)
\begin{pmatrix}x+1\\2\end{pmatrix} => \begin{pmatrix}1+x\\2\end{pmatrix}
x >= 3 => [3,\infty)   x \geqslant 3 => [3,\infty)   x \gt 3 => (3,\infty)   x \lt 3 => (-\infty,3)
\\frac{1}{2} => \frac12   3\\sqrt{2} => 3\sqrt2   $@@@$ => @@@
"""
STILL_PAID = r"""
x+x => 2x   ab+5b+2a+10 => (a+5)(b+2)   x^2+y^2-2x=0 => (x-1)^2+y^2=1   f(x)=x^2+x^2 => f(x)=2x^2
\frac{1}{\sqrt2-1} => \sqrt2+1   \frac{2}{\sqrt5-1} => \frac{\sqrt5+1}{2}   \frac{\pi}{1/9} => 9\pi
\frac{3}{20} => 0.15   84/144 => \frac{7}{12}   25 \times 10^2 => 2500   600\% => 6
"""
UNICODE = r"""
√2 => \sqrt{2}   x²+1 => x^2+1   10³ => 1000   ½ => 0.5   3½ => 3.5   (−∞, 3] => (-\infty,3]
–7 => -7   １２ => 12   1２.5 => 12.5   2√3 => 2\sqrt{3}   x ≤ 3 => (-\infty,3]   5·10⁻³ => 0.005
"""


def test_an_expression_is_not_a_number(task):
    """A policy that is paid for the expression copies the problem's: seen after 31 GRPO steps."""
    table = pairs(NOT_A_NUMBER) + pairs(HOSTILE)
    assert [pair for pair, right in verdicts(task, table).items() if right is not False] == []
    equal = [(answer, answer) for answer, _ in table]
    assert [pair for pair, right in verdicts(task, equal).items() if right is not True] == []


@pytest.mark.parametrize("table", [NOT_FINISHED, ANOTHER])
def test_wrong_answers(task, table):
    assert [p for p, right in verdicts(task, pairs(table)).items() if right is not False] == []


@pytest.mark.parametrize("table", [RIGHT, UNICODE])
def test_right_answers(task, table):
    assert [p for p, right in verdicts(task, pairs(table)).items() if right is not True] == []


def test_unicode_in_gold_answers_and_zero_width_spaces(task):
    table = [(gold, answer) for answer, gold in pairs(UNICODE)] + [
        ("7\u200b", "7"),
        ("7", "7\u200b"),
    ]
    assert [p for p, right in verdicts(task, table).items() if right is not True] == []


def test_what_can_still_be_paid_for(task):
    """The price of judging texts instead of trees: docs/tasks.md counts it."""
    assert all(verdicts(task, pairs(STILL_PAID)).values())


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        (0.00001, ["0.00001"]),
        (12, ["12"]),
        (["9.6\n"], ["9.6"]),
        (["1", r"so \boxed{2}"], ["1", "2"]),
        ("work #### 5", ["5"]),
    ],
)
def test_gold_answers(answer, texts):
    assert golds({"answer": answer}) == texts


@pytest.mark.parametrize(
    "answer",
    [None, "", [], ["1", ""], "proof", r"\boxed{proof}", "notfound", "None", math.nan, math.inf],
)
def test_no_gold_answers(answer):
    with pytest.raises(ValueError, match="no answer"):
        gold({"answer": answer})


def test_answers_are_compared_without_a_worker_too():
    code = "from common.tasks.math import is_right; print(is_right('x+1', '1+x'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "True\n"


def test_each_of_several_gold_answers_is_right(task):
    row = {"problem": "p", "answer": ["1", "2"]}
    (problem,) = task.problems([row], "d")
    outcomes = [v.outcome for v in task.grade([rf"\boxed{{{n}}}" for n in "123"], [problem] * 3)]
    assert (problem.gold, outcomes) == ("1 or 2", ["correct", "correct", "wrong"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([{"role": "user", "content": "p"}], "the row is a list; write"),
        (
            {"problem": [{"role": "user", "content": [{"type": "text", "text": "p"}]}]},
            "content is a list of parts; write",
        ),
    ],
)
def test_rows_that_are_written_otherwise(row, message):
    with pytest.raises(ValueError, match=message):
        prompt(row)


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

# Math-Verify's own tests; what people reported as wrong verdicts of graders.
DATA = Path(__file__).parent / "data"
GRADED, REPORTS = DATA / "math_answers.jsonl", DATA / "math_reports.jsonl"


def grade_file(*flags: str, file: Path = GRADED) -> list:
    command = [sys.executable, "-m", "benchmarks.check_labelled", str(file), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout)


def test_labelled_answers_of_other_projects():
    """Math-Verify's own tests: at least 95% of the rows without a note, no false positive."""
    (report,) = grade_file()
    rows = report["rows"] - report["flagged"]["rows"]
    assert report["rows"] == 260
    assert sum(report["outcomes"].values()) == report["rows"]
    assert report["false_positives"] == 0
    assert report["false_negatives"] <= 0.05 * rows
    assert report["rows_per_second"] > 0


@pytest.mark.slow
def test_false_negatives_are_shown():
    (report,) = grade_file()
    shown = [row for row in grade_file("--show", "fn") if not row["review"]]
    assert len(shown) == report["false_negatives"]
    assert all(row["expected"] == 1 and "read" in row for row in shown)
    assert [row for row in grade_file("--show", "fp") if not row["review"]] == []


def test_reported_verdicts():
    """One right answer is refused: a root of a symbol that may be negative."""
    (report,) = grade_file(file=REPORTS)
    assert (report["rows"], report["false_positives"], report["false_negatives"]) == (195, 0, 1)
