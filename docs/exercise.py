"""Empty a function of docs/exercises.md, or some of its lines, or put the solution back.

python docs/exercise.py 2             # its body goes to docs/exercise_2.txt
python docs/exercise.py 2 --solve     # and comes back; other exercises stay as they are
"""

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EMPTY = "raise NotImplementedError\n"


def exercise_of(number: int) -> tuple[str, Path, tuple[str, ...]]:
    """Return the name of an exercise's function, its file, and how the first and the last line
    begin that are to be written; none: all of the body."""
    page = (ROOT / "docs/exercises.md").read_text("utf-8")
    section = re.search(rf"^## {number}\. .+?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    if section is None:
        sys.exit(f"there is no exercise {number}")
    name, file = re.search(r"^\[`(\w+)`\]\(\.\./(\S+\.py)#", section[0], re.MULTILINE).groups()
    ends = re.search(r"\(The lines from `(.+)`\s+to\s+`(.+)`\s+are\s+emptied\.\)", section[0])
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
        begin = [i for i in range(first, last) if lines[i].strip().startswith(ends[0])]
        until = [i for i in range(first, last) if lines[i].strip().startswith(ends[1])]
        first, last = begin[0], until[-1] + 1
    return "".join(lines[:first]), "".join(lines[first:last]), "".join(lines[last:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("number", type=int)
    parser.add_argument("--solve", action="store_true")
    args = parser.parse_args()
    name, file, ends = exercise_of(args.number)
    solution = ROOT / "docs" / f"exercise_{args.number}.txt"
    if args.solve and not solution.exists():
        sys.exit(f"exercise {args.number} was not begun: there is no {solution.name}")
    begun = [int(path.stem[9:]) for path in (ROOT / "docs").glob("exercise_*.txt")]
    for other in begun if not args.solve else ():
        if exercise_of(other)[:2] == (name, file):
            sys.exit(f"exercise {other} was begun, in the same function; --solve it first")
    text = file.read_text("utf-8")
    if args.solve:
        before, _, after = parts(text, name)
        new = solution.read_text("utf-8")
        solution.unlink()
    else:
        before, body, after = parts(text, name)
        solution.write_text(body, "utf-8")
        before, body, after = parts(text, name, ends)
        new = re.match(r" +", body)[0] + EMPTY
    file.write_text(before + new + after, "utf-8")
    print(f"{name} in {file.relative_to(ROOT)} is {'solved' if args.solve else 'yours to write'}")


if __name__ == "__main__":
    main()
