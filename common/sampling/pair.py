"""A student and a teacher of two vocabularies: what of them can be compared.

A divergence compares distributions over one set of tokens, after one text. So it is taken at strict
positions, where a token of each covers the same stretch of the completion, and over the tokens that
both have (arXiv 2610.08448: to add positions that do not match lost in all of its settings). All
goes by bytes, since a token may end inside a character.
"""

import json
import re
from dataclasses import replace
from itertools import accumulate

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from common.model.tokenizer import end_ids, load_teachers_tokenizer, turn_end
from common.run.errors import check
from common.run.ranks import gather, on_first_rank
from common.sampling.rollout import Rollout
from common.tasks.data import Prompt, render_prompts

BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}
PAIR_TOP = 16  # tokens of a distribution that are compared
END = (-1, -1)  # the span of an end of turn
Span = tuple[int, int]


class Pair:
    """The two tokenizers of a run, student's first, and what they share.

    student, teacher: int64 [S], the ids of each shared token: the same bytes, or the end of a turn.
    sampled_by: 0 if the student samples the completions, or they are given in its tokens; 1 if the
    teacher does. all_positions: give every token of the student's a loss, strict or not (SFT).
    """

    def __init__(self, student, teacher, device="cpu", sampled_by: int = 0, all_positions=False):
        self.here, self.there, self.all_positions = sampled_by, 1 - sampled_by, all_positions
        self.tokenizers, self.ends = (student, teacher), (turn_end(student), turn_end(teacher))
        self.pieces = [pieces_of(tokenizer) for tokenizer in self.tokenizers]
        own, other = ({piece: i for i, piece in pieces.items()} for pieces in self.pieces)
        ids = [self.ends, *((own[piece], other[piece]) for piece in own if piece in other)]
        self.student, self.teacher = torch.tensor(ids, device=device).T.contiguous()
        self.sampling = self.tokenizers[self.here]  # who has sampled
        self.prompts: dict[str, list[int]] = {}  # of the other side, by the problem's key
        self.counts = [0, 0]  # tokens of the student in this step: all, strict

    def render(self, prompts: list[Prompt], args) -> list[Prompt]:
        """Render the prompts' problems by the other model's template too. Returns the prompts that
        are short enough for both."""
        problems, other = [prompt.problem for prompt in prompts], self.tokenizers[self.there]
        others = on_first_rank(lambda: render_prompts(other, problems, args))
        self.prompts = {prompt.problem.key: prompt.ids for prompt in others}
        both = [prompt for prompt in prompts if prompt.problem.key in self.prompts]
        check(len(both) > 0, f"no prompt has {args.max_prompt_tokens} tokens or fewer in both")
        return both

    def spans(self, side: int, ids: list[int], ended: bool) -> tuple[bytes, list[Span]] | None:
        """Return the text of a completion and the stretch of it that each token covers; None if it
        has a special token before its end."""
        pieces = [self.pieces[side].get(i) for i in (ids[:-1] if ended else ids)]
        if None in pieces:
            return None
        bounds = [0, *accumulate(map(len, pieces))]
        return b"".join(pieces), [*zip(bounds, bounds[1:], strict=False), *[END] * ended]

    def twin(self, rollout: Rollout) -> Rollout | None:
        """Return a rollout's text in the other model's tokens, and set the strict positions of
        both. None if a tokenizer does not give the text back."""
        own, tokenizer = rollout.completion_ids, self.tokenizers[self.there]
        ended = rollout.finish == "eos" or own[-1] in end_ids(self.sampling)
        here = self.spans(self.here, own, ended)
        try:
            text = here[0].decode()
        except (TypeError, UnicodeDecodeError):  # a special token; half a character
            return None
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += [self.ends[self.there]] * ended
        there = self.spans(self.there, ids, ended)
        if there is None or there[0] not in (here[0], b" " + here[0]):
            return None
        shift = len(there[0]) - len(here[0])  # some begin every text with a space
        index = {(a + shift, b + shift): n for n, (a, b) in enumerate(here[1]) if a < b}
        index |= {END: len(own) - 1} if ended else {}
        pairs = [(index[span], n) for n, span in enumerate(there[1]) if span in index]
        rollout.positions = [i for i, _ in pairs]
        return replace(
            rollout,
            prompt_ids=self.prompts[rollout.problem.key],
            completion_ids=ids,
            logprobs=torch.zeros(len(ids)),
            positions=[j for _, j in pairs],
        )

    def twins(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Return the student's rollouts, each with the teacher's as its twin. Those that cannot be
        aligned are left out, and count as tokens without a strict position."""
        aligned = []
        for rollout in rollouts:
            twin = self.twin(rollout)
            student, teacher = (rollout, twin) if self.here == 0 else (twin, rollout)
            self.counts[0] += len((student or rollout).completion_ids)
            if twin is not None:
                self.counts[1] += len(student.positions)
                student.twin = teacher
                student.positions = None if self.all_positions else student.positions
                aligned.append(student)
        return aligned

    def metrics(self) -> dict[str, float]:
        """Return the share of this step's tokens that were strict positions; the next begins."""
        total, strict = map(sum, zip(*gather([self.counts]), strict=True))
        self.counts = [0, 0]
        return {"policy/strict_positions": strict / max(1, total)}


def load_pair(
    tokenizer, teacher: str, device: torch.device, teacher_samples: bool = False, sft: bool = False
) -> Pair | None:
    """Return the pair that a student's tokenizer and its teacher's make; None if they have one
    vocabulary. sft: every token of the student's has a loss."""
    other = load_teachers_tokenizer(tokenizer, teacher)
    if other is None:
        return None
    pair = Pair(tokenizer, other, device, int(teacher_samples), sft)
    print(
        f"two vocabularies, of {len(tokenizer):,} and {len(other):,} tokens: {len(pair.student):,} "
        "are shared, and are compared where one of each covers the same text"
    )
    return pair


def pieces_of(tokenizer) -> dict[int, bytes]:
    """Return the bytes that each token writes. Special tokens write none, and are left out."""
    check(tokenizer.is_fast, f"{tokenizer.name_or_path} has no fast tokenizer")
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    added, pieces, fallbacks = tokenizer.added_tokens_decoder, {}, {}
    for token, i in tokenizer.get_vocab().items():
        if i in added:
            if not added[i].special:
                pieces[i] = added[i].content.encode()
        elif "ByteLevel" in decoder:
            pieces[i] = bytes(BYTE_OF[letter] for letter in token)
        elif "ByteFallback" in decoder and re.fullmatch("<0x[0-9A-F]{2}>", token):
            fallbacks[i] = bytes([int(token[3:5], 16)])
        else:
            space = "\\u2581" in decoder  # sentencepiece's
            pieces[i] = (token.replace("\u2581", " ") if space else token).encode()
    return fallbacks | pieces  # of a byte that is a token too the token counts
