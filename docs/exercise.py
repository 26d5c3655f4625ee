"""Empty a function of docs/exercises.md, or some of its lines, or put the solution back.

python docs/exercise.py 2             # what was there goes to docs/exercise_2.txt
python docs/exercise.py 2 --solve     # and comes back in place of yours
"""

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def exercise_of(number: int) -> tuple[str, Path, tuple[str, ...]]:
    """Return the name of an exercise's function, its file, and how the lines begin behind and
    before which it is emptied; none: all of the body."""
    page = (ROOT / "docs/exercises.md").read_text("utf-8")
    section = re.search(rf"^## {number}\. .+?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    if section is None:
        sys.exit(f"there is no exercise {number}")
    name, file = re.search(r"^\[`(\w+)`\]\(\.\./(\S+\.py)#", section[0], re.MULTILINE).groups()
    between = r"\(The\s+lines\s+between\s+`(.+?)`\s+and\s+`(.+?)`\s+are\s+emptied\.\)"
    ends = re.search(between, section[0])
    return name, ROOT / file, ends.groups() if ends else ()


def parts(text: str, function: str, ends: tuple[str, ...] = ()) -> tuple[str, str, str]:
    """Return a file's text before a function's body, or before some of its lines, these, and what
    follows. The docstring stays before."""
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    (node,) = [n for n in nodes if n.name == function]
    body = node.body[1:] if ast.get_docstring(node) else node.body
    lines = text.splitlines(keepends=True)
    first, last = body[0].lineno - 1, node.end_lineno
    if ends:
        begins = [lines[i].strip().startswith for i in range(first, last)]
        behind, before = (next(i for i, b in enumerate(begins, first) if b(e)) for e in ends)
        first, last = behind + 1, before
    return "".join(lines[:first]), "".join(lines[first:last]), "".join(lines[last:])


def begin(number: int, file: Path, name: str, ends: tuple[str, ...]) -> None:
    """Put marks in the place of the solution, for the reader's own lines to stand between."""
    try:
        before, body, after = parts(file.read_text("utf-8"), name, ends)
    except SyntaxError as error:
        sys.exit(f"{file.name}, line {error.lineno}: {error.msg}; mend it first")
    indent = re.match(r" +", body)[0]
    marks = [f"{indent}# exercise {number}: {end}\n" for end in ("begin", "end")]
    (ROOT / "docs" / f"exercise_{number}.txt").write_text(body, "utf-8")
    empty = f"{marks[0]}{indent}raise NotImplementedError\n{marks[1]}"
    file.write_text(before + empty + after, "utf-8")


def solve(number: int, file: Path, solution: Path) -> None:
    """Put the solution in the place of what stands between the marks, Python or not."""
    text = file.read_text("utf-8")
    mark = rf"^ *# exercise {number}: {{}}\n"
    found = re.search(f"{mark.format('begin')}.*{mark.format('end')}", text, re.M | re.DOTALL)
    if found is None:
        sys.exit(f"{file.name} has no line '# exercise {number}: begin', or no such end")
    right = solution.read_text("utf-8")
    file.write_text(text[: found.start()] + right + text[found.end() :], "utf-8")
    solution.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("number", type=int)
    parser.add_argument("--solve", action="store_true")
    args = parser.parse_args()
    name, file, ends = exercise_of(args.number)
    solution = ROOT / "docs" / f"exercise_{args.number}.txt"
    if args.solve != solution.exists():
        sys.exit(f"exercise {args.number} was {'not begun' if args.solve else 'begun already'}")
    if args.solve:
        solve(args.number, file, solution)
    else:
        begin(args.number, file, name, ends)
    print(f"{name} in {file.relative_to(ROOT)} is {'solved' if args.solve else 'yours to write'}")


if __name__ == "__main__":
    main()
