"""Write docs/diff.md: where the trainers differ, hunk by hunk, with the reasons for it.

    python docs/diff.py

The reasons stand in docs/diff_reasons.json, by files and place: a section, and the function in it.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

ROOT = Path(__file__).parents[1]
REASONS = "docs/diff_reasons.json"
CONTEXT = 1  # unchanged lines around a hunk; hunks with at most two of them in between are one
# What begins a piece of a trainer: the end of its docstring, a banner, a function or class.
MARK = re.compile(
    r'^(?P<imports>""")$|^# === (?P<section>.+) ===$|^ +# --- (?P<part>.+) ---$'
    r"|^(?:@.+\n)*(?:def|class) (?P<name>\w+)",
    re.MULTILINE,
)
HEAD = """# The difference

What turns [grpo.py](../grpo.py) into [opd.py](../opd.py), on-policy distillation, and what turns
opd.py into [fkl_warmup.py](../fkl_warmup.py), the forward-KL warmup. Above each change stands why.

Read grpo.py first, then this page from top to bottom; with little time only [score](#score) and
[loss](#loss). Lines with `-` are in the first file only, lines with `+` in the second. What is not
shown is the same in both, but for the module docstrings from "What to know" on.

| | hunks | lines `-` | lines `+` | both, without docstrings and `Args` |
|---|---|---|---|---|
"""
FOOT = """
*`python docs/diff.py` has made this page of the trainers and of the sentences in
[diff_reasons.json](diff_reasons.json); the last column is the README's.*
"""


@dataclass
class Hunk:
    """Neighbouring changed lines of one piece of a trainer, each behind "-", "+" or " "."""

    title: str  # the function and, behind ": ", its part; "" outside of functions
    place: str  # section and title
    only_in: str  # the file that has this piece, if the other has not
    lines: list[str]


def pieces(text: str) -> dict[tuple[str, str], list[str]]:
    """(section, title) -> lines of a trainer, in order."""
    marks = list(MARK.finditer(text))
    docstring = text[: marks[0].start()].partition("What to know:")[0]
    found = {("docstring", ""): docstring.rstrip().splitlines()}
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=True):
        if mark["imports"] or mark["section"]:
            section, title = mark["section"] or "imports", ""
        elif mark["name"]:
            name = title = mark["name"]
        else:
            title = f"{name}: {mark['part']}"
        found[section, title] = text[mark.start() : end].rstrip().splitlines()
    return found


def hunks(one: str, other: str) -> dict[str, list[Hunk]]:
    """Section -> what differs there between two trainers."""
    a, b = (pieces((ROOT / name).read_text("utf-8")) for name in (one, other))
    found, keys = {section: [] for section, _ in a | b}, (list(a), list(b))
    order = SequenceMatcher(None, *keys, autojunk=False).get_opcodes()
    for key in dict.fromkeys(k for _, i, j, m, n in order for k in keys[0][i:j] + keys[1][m:n]):
        only_in = "" if key in a and key in b else one if key in a else other
        match = SequenceMatcher(None, a.get(key, []), b.get(key, []), autojunk=False)
        for group in match.get_grouped_opcodes(CONTEXT):
            lines = []
            for tag, i, j, m, n in group:
                lines += [(" " if tag == "equal" else "-") + line for line in match.a[i:j]]
                lines += [f"+{line}" for line in match.b[m:n] if tag != "equal"]
            found[key[0]].append(Hunk(key[1], ", ".join(filter(None, key)), only_in, lines))
    return found


def counts(found: list[Hunk]) -> str:
    signs = Counter(line[0] for hunk in found for line in hunk.lines)
    return f"{signs['-']} | {signs['+']}"


def section_text(section: str, found: list[Hunk], why: dict[str, str]) -> str:
    text, place = f"\n### {section}\n", ""
    for hunk in found:
        if hunk.place != place:
            place = hunk.place
            if hunk.title:
                text += f"\n#### {hunk.title}{hunk.only_in and f', only in {hunk.only_in}'}\n"
            text += f"\n{why[place]}\n" if place in why else ""
        lines = "\n".join(line.rstrip() for line in hunk.lines).rstrip()
        text += f"\n```diff\n{lines}\n```\n"
    return text


def page() -> str:
    readme = dict(re.findall(r"`diff (.+)` \| (\d+) \|", (ROOT / "README.md").read_text("utf-8")))
    head, chapters, seen = HEAD, "", Counter()
    for pair, about in json.loads((ROOT / REASONS).read_bytes()).items():
        one, other = pair.split("/")
        sections, texts = hunks(one, other), ""
        found = sum(sections.values(), [])
        row = f"{len(found)} | {counts(found)} | {readme[f'{one} {other}']}"
        head += f"| {about['title']} | {row} |\n"
        chapters += f"\n## {about['title']}\n\n{about['in short']}\n\n"
        chapters += f"| | {one} only | {other} only |\n|---|---|---|\n"
        for section, own in sections.items():
            link = section
            if own:
                anchor = section.replace(" ", "-") + f"-{seen[section]}" * (seen[section] > 0)
                link = f"[{section}](#{anchor})"  # GitHub numbers the headings of one name
                seen[section] += 1
                texts += section_text(section, own, about["why"])
            chapters += f"| {link} | {counts(own)} |\n"
        chapters += texts
    return head + FOOT + chapters


if __name__ == "__main__":
    (ROOT / "docs/diff.md").write_text(page(), "utf-8")
