"""What keeps README.md and docs/ true: links, lines of code, flags and metric keys."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TRAINERS = ("grpo.py", "opd.py", "fkl_warmup.py")
# Flags of other programs that the pages name.
FOREIGN_FLAGS = {"help", "no-deps", "shutdown_timeout", "logdir"}
FOREIGN_FLAGS |= {"nodes", "ntasks-per-node", "gpus-per-node", "signal"}  # Slurm's

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[tuple[str, str]]:
    """(path, anchor) of each link and picture that is no web address."""
    text = prose(page)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    local = [link for link in found if not re.match(r"[a-z]+:", link)]
    return [(path, anchor) for path, _, anchor in (link.partition("#") for link in local)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings]
    repeated = [f"{n}-{i}" for n, count in Counter(names).items() for i in range(1, count)]
    return {*names, *repeated}


def definitions(path: Path) -> dict[str, list[int]]:
    """Name of each function and class -> the lines that define it."""
    lines: dict[str, list[int]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if match := re.match(r"\s*(?:async )?(?:def|class) (\w+)", line):
            lines.setdefault(match[1], []).append(number)
    return lines


def test_pages_are_few_and_short():
    """Those that are written by hand, but for the exercises."""
    made = {"diff.md", "tutorial.md", "exercises.md"}
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.name not in made]
    lengths = [len(page.read_text().splitlines()) for page in [ROOT / "README.md", *pages]]
    assert lengths[0] <= 120
    assert max(lengths) <= 250
    assert len(lengths) <= 14
    assert sum(lengths) <= 2200


def test_no_path_of_a_machine_is_told():
    kinds = {".md", ".json", ".jsonl", ".txt", ".ipynb", ".svg"}
    for path in (ROOT / "docs").rglob("*"):
        if path.suffix in kinds:
            found = re.search(r"/(?:tmp|home|root|work)/\S*", path.read_text())
            assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


@every_page
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        target = page.parent / path if path else page
        assert target.exists(), f"{path}: no such file"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{path}#{anchor}: no such heading"


@every_page
def test_links_to_code_point_at_the_name_that_they_show(page):
    """They are all of the form [`name`](file.py#L123)."""
    named = re.findall(r"\[`(\w+)`\]\(([^)#\s]+\.py)#L(\d+)\)", prose(page))
    assert len(named) == sum(path.endswith(".py") and anchor != "" for path, anchor in links(page))
    wrong = []
    for name, path, number in named:
        lines = definitions(page.parent / path).get(name, [])
        if int(number) not in lines:
            right = " or ".join(f"#L{line}" for line in lines) or "nowhere in that file"
            wrong.append(f"{name} is not at {path}#L{number} but at {right}")
    assert not wrong, "; ".join(wrong)


@every_page
def test_math_stands_in_backticks(page):
    r"""$`x`$ or a math block: GitHub takes the backslash of "\{" and "\," out of a plain $x$."""
    text = re.sub(r"\$`[^`]+`\$|`[^`]+`", "", prose(page))
    assert "$" not in text


def test_flags_exist():
    known = set(FOREIGN_FLAGS)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]:
        if path.parent.name != "tests":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and node.name == "Args":
                    known |= {field.target.id for field in node.body if hasattr(field, "target")}
    known |= set(re.findall(r'add_argument\("--(\w+)"', (ROOT / "docs/exercise.py").read_text()))
    for path in (ROOT / "docs" / "variants").glob("*.diff"):
        known |= set(re.findall(r"^\+    (\w+): ", path.read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text()))
        missing = ", ".join(f"--{name}" for name in sorted(named - known))
        assert not missing, f"{page.relative_to(ROOT)} names flags that no script has: {missing}"


def test_metrics_are_documented_once_and_all():
    """Against the keys in the code; test_scripts.py checks what is logged."""
    text = (ROOT / "docs" / "runs.md").read_text()
    rows = re.findall(r"^\| `([a-z]+/[a-z_]+)` \|", text, re.MULTILINE)
    assert len(rows) == len(set(rows))
    sources = [*(ROOT / name for name in TRAINERS), *(ROOT / "common").rglob("*.py")]
    code = "".join(path.read_text() for path in sources)
    prefixes = "rollout|loss|policy|optim|sync|time|memory|eval"
    missing = set(re.findall(rf'"((?:{prefixes})/[a-z_]+)"', code)) - set(rows)
    assert not missing, f"docs/runs.md lacks {', '.join(sorted(missing))}"
