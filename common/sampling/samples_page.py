"""The page on which a person reads completions with their verdicts."""

import html
from statistics import fmean

from common.sampling.rollout import Rollout

PAGE = """<!doctype html><meta charset="utf-8"><title>TITLE</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3em 0 }
summary { cursor: pointer; padding: .3em 0 }
.sample { border-left: 4px solid #c0392b; margin: .6em 0 .6em 1em; padding: 0 .8em }
.sample.correct { border-color: #27864a } .sample small { color: #666 }
body.correct .sample:not(.correct), body.other .sample.correct { display: none }
</style>
<h1>TITLE</h1>
<p>Show <select onchange="document.body.className = this.value">
<option value="">all completions<option value="correct">correct ones<option value="other">all others
</select></p>
"""


def samples_page(title: str, benchmarks: dict[str, list[Rollout]], num_samples: int) -> str:
    """One self-contained HTML page: the first 100 problems of each benchmark, every completion."""
    parts = [PAGE.replace("TITLE", html.escape(title))]
    for name, rollouts in benchmarks.items():
        num_problems = len(rollouts) // num_samples
        listed = range(min(100, num_problems))
        count = f"{len(listed)} of {num_problems} problems"
        parts.append(f"<h2>{html.escape(name)}: {count}</h2>\n")
        for problem in listed:
            group = rollouts[problem * num_samples : (problem + 1) * num_samples]
            right = f"{sum(rollout.verdict.correct for rollout in group)}/{num_samples} right"
            if any(rollout.verdict.outcome == "partial" for rollout in group):
                right += f", mean reward {fmean(r.verdict.reward for r in group):.2f}"
            parts.append(
                f"<details><summary>{right}: "
                f"{html.escape(group[0].problem.text)}</summary>\n<p>gold answer: "
                f"<code>{html.escape(group[0].problem.gold)}</code></p>\n"
            )
            for rollout in group:
                verdict, length = rollout.verdict, len(rollout.completion_ids)
                end = "cut off" if rollout.finish == "length" else "ended"
                outcome = verdict.outcome
                outcome += f" {verdict.reward:.2f}" if outcome == "partial" else ""
                outcome += f" ({verdict.message})" if verdict.message else ""
                read = "" if verdict.answer is None else f", read: {html.escape(verdict.answer)}"
                parts.append(
                    f'<div class="sample {verdict.outcome}"><small>{html.escape(outcome)}{read}; '
                    f"{length} tokens, {end}</small><pre>{html.escape(rollout.text)}</pre></div>\n"
                )
            parts.append("</details>\n")
    return "".join(parts)
