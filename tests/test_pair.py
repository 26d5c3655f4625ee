"""Two vocabularies: strict positions against slow loops; a teacher that is the student under other
ids; whole runs."""

import json
import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import gradients, problem_of, tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import fkl_warmup
import opd
from common.model.load import load_model
from common.sampling import pair as pairs
from common.sampling.pair import Pair
from common.sampling.rollout import Rollout

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant]{% endif %}"
TEXTS = [
    r"12+34=46;46+56=102;\boxed{102}",
    "The answer is 15. It isn't 16,\n\n   as 7 + 8 = 15!",
    "def f(x):\n\treturn x ** 2  # naïve café 東京 🙂🙃",
    "  two spaces, \u00a0no break, e\u0301 and é, \u200bzero width",
    "",
    " ",
    "ﬁ ½ ² Ⅷ Ａ",
]


def trained(kind: str, size: int = 400) -> PreTrainedTokenizerFast:
    """A small tokenizer of a usual kind."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "sentencepiece"))
    special, alphabet = ["<s>", "<end>"], []
    if kind == "sentencepiece":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps)
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
        digits = [pre_tokenizers.Digits(individual_digits=True)] if kind == "digits" else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
        tokenizer.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
        if kind == "normalizing":
            tokenizer.normalizer = normalizers.NFKC()
    words = TEXTS * 3 + [f"{a}+{b}={a + b}" for a in range(40) for b in range(40)]
    trainer = trainers.BpeTrainer(
        vocab_size=size + len(special), special_tokens=special, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(words, trainer)
    if kind == "sentencepiece":  # its bytes are no special tokens
        spec = json.loads(tokenizer.to_str())
        spec["added_tokens"] = spec["added_tokens"][:2]
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<s>", chat_template=TEMPLATE
    )


KINDS = ("bytes", "digits", "sentencepiece", "prefix", "normalizing")


@pytest.fixture(scope="module")
def tokenizers(tokenizer):
    return {kind: trained(kind) for kind in KINDS} | {
        "toy": tokenizer,
        "small": trained("bytes", 300),
    }


def rollout_of(tokenizer, text: str, ended: bool = True) -> Rollout:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids += [tokenizer.eos_token_id] * ended
    problem = problem_of("p", "1")
    finish = "eos" if ended else "length"
    return Rollout([1], ids, torch.zeros(len(ids)), finish, text, problem, key=(0,))


def pair_of(student, teacher, sampled_by: int = 0) -> Pair:
    pair = Pair(student, teacher, sampled_by=sampled_by)
    pair.prompts = {problem_of("p", "1").key: [1, 1, 1]}
    return pair


def count_aligned(student, teacher, texts: list[str]) -> int:
    """Whatever is matched decodes to the same text, in both, with the same text before it."""
    pair = pair_of(student, teacher)
    aligned = 0
    for text, ended in product(texts, (True, False)):
        own = rollout_of(student, text, ended)
        other = pair.twin(own) if own.completion_ids else None
        if other is None:
            continue
        aligned += 1
        assert len(own.positions) == len(other.positions)
        for i, j in zip(own.positions, other.positions, strict=True):
            ids = (own.completion_ids[i], other.completion_ids[j])
            if i == len(own.completion_ids) - 1 and ended:
                assert ids == pair.ends
                continue
            pieces = [pair.pieces[side][ids[side]] for side in (0, 1)]
            assert pieces[0] == pieces[1] or b" " + pieces[0] == pieces[1]
            before = [
                b"".join(pair.pieces[side][k] for k in row.completion_ids[:n])
                for side, row, n in ((0, own, i), (1, other, j))
            ]
            assert before[1] in (before[0], b" " + before[0])
        if ended:
            assert own.positions[-1] == len(own.completion_ids) - 1
    return aligned


@pytest.mark.parametrize("teacher", [*KINDS, "toy"])
@pytest.mark.parametrize("student", [*KINDS, "toy"])
def test_strict_positions_cover_the_same_text(tokenizers, student, teacher):
    assert count_aligned(tokenizers[student], tokenizers[teacher], TEXTS) >= 2
    if student == teacher:
        pair = pair_of(tokenizers[student], tokenizers[teacher])
        for text in TEXTS[:2]:
            own = rollout_of(tokenizers[student], text)
            if pair.twin(own) is not None:
                assert own.positions == list(range(len(own.completion_ids)))


def test_pieces_are_what_decoding_gives(tokenizers):
    """Token by token behind others, for every text that a tokenizer gives back."""
    for name in ("bytes", "digits", "sentencepiece", "toy", "small"):
        tokenizer, pieces = tokenizers[name], pairs.pieces_of(tokenizers[name])
        for text in TEXTS[:2]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            for n in range(1, len(ids) + 1):
                joined = b"".join(pieces[i] for i in ids[:n])
                assert joined.decode(errors="replace") == tokenizer.decode(ids[:n])


def test_a_teacher_that_splits_digits(tokenizers):
    pair = pair_of(tokenizers["bytes"], tokenizers["digits"])
    own = rollout_of(tokenizers["bytes"], "12+34=46")
    other = pair.twin(own)
    digits = [
        i for i in own.completion_ids[:-1] if len(pair.pieces[0][i].strip(b"0123456789")) == 0
    ]
    assert any(len(pair.pieces[0][i]) > 1 for i in digits)
    matched = [pair.pieces[0][own.completion_ids[i]] for i in own.positions[:-1]]
    assert matched == [piece for piece in matched if len(piece) == 1]
    assert [pair.pieces[1][other.completion_ids[j]] for j in other.positions[:-1]] == matched
    assert pair.twins([own]) == [own]
    share = len(own.positions) / len(own.completion_ids)  # of the student's tokens
    assert pair.metrics() == {"policy/strict_positions": share}
    assert len(own.completion_ids) < len(other.completion_ids)


def test_what_cannot_be_given_back_is_left_out_and_counted(tokenizers):
    pair = pair_of(tokenizers["bytes"], tokenizers["normalizing"])
    right, lost = (rollout_of(tokenizers["bytes"], text) for text in (TEXTS[0], TEXTS[6]))
    half = rollout_of(tokenizers["bytes"], "東")
    half.completion_ids = half.completion_ids[:1]  # some bytes of a character
    half.finish = "length"
    special = rollout_of(tokenizers["bytes"], "1")
    special.completion_ids = [0, *special.completion_ids]  # <s> within the text
    kept = pair.twins([right, lost, half, special])
    assert kept == [right]
    assert right.twin.prompt_ids == [1, 1, 1]
    total = sum(len(r.completion_ids) for r in (right, lost, half, special))
    assert pair.metrics() == {"policy/strict_positions": len(right.positions) / total}
    assert pair.metrics() == {"policy/strict_positions": 0.0}  # of the next step


def test_the_teacher_may_have_sampled(tokenizers):
    pair = pair_of(tokenizers["bytes"], tokenizers["digits"], 1)
    sampled = rollout_of(tokenizers["digits"], TEXTS[0])
    (student,) = pair.twins([sampled])
    assert student.twin is sampled
    assert student.prompt_ids == [1, 1, 1]
    assert tokenizers["bytes"].decode(student.completion_ids[:-1]) == TEXTS[0]
    assert student.completion_ids[-1] == tokenizers["bytes"].eos_token_id


# === losses ===


def permuted(model, tokenizer, seed: int = 0):
    """The same model and tokenizer, under other ids."""
    order = list(range(len(tokenizer)))
    random.Random(seed).shuffle(order)  # old id -> new id
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["model"]["vocab"] = {token: order[i] for token, i in spec["model"]["vocab"].items()}
    for added in spec["added_tokens"]:
        added["id"] = order[added["id"]]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
    )
    copy = tiny_model(tokenizer)
    copy.load_state_dict(model.state_dict())
    weight = copy.get_output_embeddings().weight
    with torch.no_grad():
        weight[order] = model.get_output_embeddings().weight.clone()
    return copy, other, order


@pytest.mark.parametrize("top", [16, 1000])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "warmup"])
def test_a_teacher_under_other_ids_is_the_same_teacher(
    model, teacher, tokenizer, monkeypatch, top, divergence
):
    """The loss and its gradient are those of one vocabulary, over the same tokens."""
    monkeypatch.setattr(opd, "PAIR_TOP", top)
    monkeypatch.setattr(fkl_warmup, "PAIR_TOP", top)
    teacher = tiny_model(tokenizer, seed=1)
    other_teacher, other_tokenizer, order = permuted(teacher, tokenizer)
    pair = Pair(tokenizer, other_tokenizer)
    assert pair.teacher.tolist() == [order[i] for i in pair.student.tolist()]
    prompt = [6, 7, 8]
    pair.prompts = {problem_of("p", "1").key: [order[i] for i in prompt]}
    rollouts = [replace(rollout_of(tokenizer, text), prompt_ids=prompt) for text in TEXTS[:2]]
    for number, rollout in enumerate(rollouts):
        rollout.key = (number,)
    module = fkl_warmup if divergence == "warmup" else opd
    args = module.Args(micro_batch_tokens=64, chunk_size=16)
    if module is opd:
        args = replace(args, divergence=divergence)
    whole = pair.twins(rollouts)
    assert len(whole) == 2
    assert all(r.positions == list(range(len(r.completion_ids))) for r in whole)
    found = module.backward(model, other_teacher, whole, args, pair)
    found_gradients = gradients(model)

    loss, count = 0.0, sum(len(r.completion_ids) for r in rollouts)
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])[:, :-1]
        rows = slice(len(prompt) - 1, None)
        logits = model(ids).logits[0, rows][:, pair.student].double()
        with torch.no_grad():
            targets = teacher(ids).logits[0, rows][:, pair.student].double()
        ranked = targets if divergence == "warmup" else logits.detach()
        kept = ranked.topk(min(top, ranked.shape[1])).indices
        logp, logq = (x.gather(1, kept).log_softmax(-1) for x in (logits, targets))
        if divergence == "reverse_kl":
            loss = loss + (logp.exp() * (logp - logq)).sum()
        elif divergence == "jsd":
            mixture = torch.logsumexp(torch.stack([logp, logq]), 0) - torch.log(torch.tensor(2.0))
            halves = (x.exp() * (x - mixture) for x in (logp, logq))
            loss = loss + sum(half.sum() for half in halves) / 2
        else:
            loss = loss + (logq.exp() * (logq - logp)).sum()
    (loss / count).backward()
    assert found["loss/total"] == pytest.approx(loss.item() / count, rel=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-6)


# === whole runs ===


def save_under_other_ids(folder, tokenizer) -> str:
    """Save the toy teacher and its tokenizer with the ids shuffled. Returns the folder."""
    teacher = load_model("toy/teacher", "float32", torch.device("cpu"))
    _, other, order = permuted(tiny_model(tokenizer), tokenizer)
    with torch.no_grad():
        weight = teacher.get_output_embeddings().weight
        weight[order] = weight.clone()
    teacher.generation_config.eos_token_id = teacher.config.eos_token_id = other.eos_token_id
    teacher.generation_config.pad_token_id = teacher.config.pad_token_id = other.pad_token_id
    teacher.save_pretrained(folder)
    other.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def other_teacher(tmp_path, tokenizer):
    return save_under_other_ids(tmp_path / "teacher", tokenizer)


SMALL = {"prompts_per_step": 4, "group_size": 2, "num_steps": 2, "learning_rate": 1e-3}


def losses_of(module, folder, **flags) -> list[dict]:
    module.main(module.Args(**SMALL, **flags, output_dir=str(folder)))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_a_teacher_under_other_ids(tmp_path, other_teacher, monkeypatch, capsys):
    """What the student samples is what it samples beside the same teacher in its own ids; so are
    the losses, over all tokens that can be compared."""
    monkeypatch.setattr(opd, "PAIR_TOP", 1000)
    found = losses_of(opd, tmp_path / "pair", teacher=other_teacher)
    assert "two vocabularies, of 104 and 104 tokens: 102 are shared" in capsys.readouterr().out
    expected = losses_of(opd, tmp_path / "one")
    for row, other in zip(found, expected, strict=True):
        assert row["policy/strict_positions"] == 1
        assert row["rollout/length"] == other["rollout/length"]
        assert row["loss/total"] == pytest.approx(other["loss/total"], rel=1e-3)


@pytest.mark.parametrize("hard_labels", [False, True])
def test_a_warmup_with_a_teacher_under_other_ids(tmp_path, other_teacher, monkeypatch, hard_labels):
    monkeypatch.setattr(fkl_warmup, "PAIR_TOP", 1000)
    flags = {"hard_labels": hard_labels}
    found = losses_of(fkl_warmup, tmp_path / "pair", teacher=other_teacher, **flags)
    assert [row["policy/strict_positions"] for row in found] == [1, 1]
    assert all(row["loss/total"] > 0 for row in found)
    expected = losses_of(fkl_warmup, tmp_path / "one", **flags)
    assert ("policy/reverse_kl" in found[0]) == (not hard_labels)
    # The first answers are at once and the same; later ones are drawn in another order of ids.
    assert found[0]["loss/total"] == pytest.approx(expected[0]["loss/total"], rel=0.1)


def test_estimators_of_one_vocabulary_are_refused(tmp_path, other_teacher):
    with pytest.raises(Exception, match="two vocabularies need --estimator full"):
        losses_of(opd, tmp_path / "run", teacher=other_teacher, estimator="topk")
