"""Loss and matches on examples, for one model or for many candidates in one pass, with the tokens spent.

Exact match needs no generation: under greedy decoding the target's token ids come out exactly when each of them, and a
stop token behind them where the target is shorter than the limit, is the arg-max under teacher forcing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from workbench.adapters import Adapter
from workbench.base import Base, Batch
from workbench.compose import LowRank, compose, grouped, slice_groups
from workbench.errors import MergeError, TaskError
from workbench.prompts import Prompt, tokenise
from workbench.tasks import Example, Task

__all__ = [
    "Encoded",
    "Packed",
    "Scores",
    "encode",
    "encode_all",
    "encode_task",
    "evaluate",
    "evaluate_many",
    "row_losses",
    "score",
    "word",
]


@dataclass(frozen=True)
class Encoded:
    """A prompt's and an answer's token ids; the answer ends in a stop token unless it fills the limit.

    Its length counts all tokens fed for it: by a causal model both, by an encoder–decoder the prompt's to the encoder and
    as many as the answer's to the decoder.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    reachable: bool = True  # a target longer than the limit, or with a stop token inside, never matches

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Scores:
    """loss (G, N): mean cross-entropy over answer tokens, nats; match (G, N): exact match, or what the task's metric says
    (true or false, or fp32 shares between 0 and 1 where one gives partial credit); tokens: all that were fed.
    """

    loss: Tensor
    match: Tensor
    tokens: int

    @property
    def accuracy(self) -> Tensor:
        """(G,) mean of the matches."""
        return self.match.float().mean(1)


def encode(base: Base, prompt: Prompt, target: str, limit: int = 64) -> Encoded:
    """One prompt and target; see `encode_all`."""
    return encode_all(base, [prompt], [target], limit)[0]


def encode_all(base: Base, prompts: Sequence[Prompt], targets: Sequence[str], limit: int = 64) -> list[Encoded]:
    """Tokenise prompts (`prompts.tokenise`) and, apart from them, their targets.

    An encoder–decoder's answers begin with what its tokenizer puts before every target (BART's `<s>`), which counts
    towards the limit as it does in generation. In a chat an answer ends as the assistant's turn does.

    Raises:
        TaskError: an empty prompt or target, characters in a target that the tokenizer does not know, or more tokens than
            the model can read.
        BaseError: an encoder–decoder whose configuration names no start token, or a chat template that fails.
    """
    tokenizer, apart = base.tokenizer, base.decoder_start is not None
    pairs = list(zip(prompts, targets, strict=True))
    if not pairs:  # tokenizers stumble over an empty list
        return []
    quiet = {"return_attention_mask": False, "verbose": False}
    bodies = tokenizer(list(targets), add_special_tokens=False, **quiet)["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}
    opening = [i for i in tokenizer(text_target=[""])["input_ids"][0] if i not in ends] if apart else []
    answers = []
    for target, body in zip(targets, bodies, strict=True):
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in body:
            raise TaskError(f"the tokenizer of {base.name} does not know every character of the target {target!r}")
        answers.append(opening + body + [base.stop_ids[0]] * (len(opening + body) < limit))
        if apart and base.positions and len(answers[-1]) > base.positions:
            raise TaskError(
                f"{target[:60]!r}… is {len(answers[-1])} tokens, more than the {base.positions} that {base.name} can write"
            )
    # There must be room for any answer up to the limit: generation, which knows no target, reads the same prompt.
    reserve = [max(limit, len(answer)) for answer in answers]
    out = []
    for (prompt, target), head, body, answer in zip(
        pairs, tokenise(base, prompts, reserve), bodies, answers, strict=True
    ):
        said = set(head) - {tokenizer.eos_token_id}
        if not said or not body:
            what = "target" if said else "prompt"
            raise TaskError(f"nothing to score: the {what} of {str(prompt)[-60:]!r} → {target!r} has no tokens")
        written = opening + body
        ends_early = bool(set(written) & set(base.stop_ids))  # decoding would end at a stop token inside
        out.append(Encoded(tuple(head), tuple(answer), len(written) <= limit and not ends_early))
    return out


def word(base: Base, task: Task, examples: Sequence[Example], *, shots: int = 0, seed: int = 0) -> list[Prompt]:
    """A task's prompts as the base reads them, texts or a chat's turns; `shots` demonstrations as in `encode_task`.

    Raises:
        TaskError: more demonstrations than training examples.
    """
    if shots > len(task.train):
        raise TaskError(f"{task.name}: {shots} demonstrations asked for, but only {len(task.train)} training examples")
    rng = random.Random(f"{task.name}|shots|{seed}")
    say = task.turns if base.chat else task.prompt
    return [say(example, rng.sample(task.train, shots) if shots else ()) for example in examples]


def encode_task(base: Base, task: Task, examples: Sequence[Example], *, shots: int = 0, seed: int = 0) -> list[Encoded]:
    """Encode a task's examples; `shots` puts that many of the training examples before each, drawn under the seed.

    Raises:
        TaskError: more demonstrations than training examples.
    """
    prompts = word(base, task, examples, shots=shots, seed=seed)
    return encode_all(base, prompts, [example.target for example in examples], task.max_new_tokens)


class Packed:
    """Encoded examples as right-padded tensors, from which any rows make a `Batch` for `Base.logits`.

    `lengths` (N,) are each row's tokens, and `parts` where they are read: in one row of a causal model, or the prompt's in
    the encoder and the answer's in the decoder. `width` is what one row holds, padded to the longest of each part.
    """

    def __init__(self, rows: Sequence[Encoded], base: Base):
        self.start, self.lengths = base.decoder_start, np.array([len(row) for row in rows])
        self.starts = np.array([len(row.prompt) for row in rows])
        together = self.start is None
        self.parts = (self.lengths,) if together else (self.starts, self.lengths - self.starts)
        self.width = sum(int(part.max()) for part in self.parts)
        ids = np.zeros((len(rows), self.parts[0].max()), np.int32)
        labels = np.full((len(rows), self.parts[-1].max()), -100, np.int32)
        for i, row in enumerate(rows):
            read = row.prompt + row.answer if together else row.prompt
            first = len(row.prompt) - 1 if together else 0  # the logits one place before predict it
            ids[i, : len(read)], labels[i, first : first + len(row.answer)] = read, row.answer
        self.ids, self.labels = torch.from_numpy(ids).to(base.device), torch.from_numpy(labels).to(base.device)

    def batch(self, index: np.ndarray) -> Batch:
        """These rows, with labels −100 outside answers; padding is trimmed to them."""
        where = torch.from_numpy(index).to(self.ids.device)
        length, last = (int(part[index].max()) for part in (self.parts[0], self.parts[-1]))
        ids = self.ids[where, :length].long()
        if self.start is None:
            keep = length - int(self.starts[index].min()) + 1
            return Batch(ids, self.labels[where, length - keep : length].long(), keep)
        labels = self.labels[where, :last].long()
        mask = torch.arange(length) < torch.from_numpy(self.starts[index])[:, None]
        decoder = labels.roll(1, 1).clamp(min=0)  # a label's padding is no token
        decoder[:, 0] = self.start
        return Batch(ids, labels, last, mask.to(ids.device), decoder)


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Per row: summed cross-entropy over answer tokens (fp32) and their number."""
    losses = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view(
        labels.shape
    )
    return losses.sum(1), (labels != -100).sum(1)


@torch.no_grad()
def score(
    base: Base,
    groups: Sequence[Sequence[Encoded]],
    updates: Mapping[str, LowRank] | None = None,
    *,
    max_tokens: int | None = None,
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = row_losses,
) -> Scores:
    """Score G groups of N examples each; group g under the g-th group of the updates.

    For a population of candidates on the same examples, repeat the list. Batches hold at most `max_tokens` tokens,
    padding included (default 16,384 on a processor, 524,288 on a GPU). `loss` of logits and labels gives sums and counts
    per row, whose quotient is `Scores.loss`.

    Raises:
        MergeError: groups of unequal size, or updates that cannot be split among them.
    """
    total = len(groups)
    if not total or len({len(group) for group in groups}) != 1 or not len(groups[0]):
        raise MergeError(f"expected groups of equally many examples, got sizes {sorted({len(g) for g in groups})}")
    count = len(groups[0])
    told = max((update.groups for update in (updates or {}).values()), default=1)
    parts = {
        n for u in (updates or {}).values() for n in (len(u.B) if u.B.ndim == 3 else 1, 1 if u.c is None else len(u.c))
    }
    if any(total % n for n in parts):
        raise MergeError(f"{total} groups of examples cannot be split among {told} candidates")
    budget = max_tokens or (524_288 if base.device.type == "cuda" else 16_384)
    lists = {id(group): group for group in groups}
    first = dict(zip(lists, np.cumsum([0, *[count] * (len(lists) - 1)]).tolist(), strict=True))
    rows = [row for group in lists.values() for row in group]
    packed, reach = Packed(rows, base), torch.tensor([row.reachable for row in rows])
    order = np.stack([np.argsort(packed.lengths[first[id(g)] : first[id(g)] + count], kind="stable") for g in groups])
    places = order + np.array([first[id(group)] for group in groups])[:, None]
    unit = math.lcm(*(total // n for n in parts if n > 1))  # a batch never splits what one stack or candidate covers
    chunk = max(unit, min(total, budget // packed.width) // unit * unit)
    losses, match, tokens = torch.zeros(total, count), torch.zeros(total, count, dtype=torch.bool), 0
    for start in range(0, total, chunk):
        stop = min(total, start + chunk)
        step = max(1, budget // ((stop - start) * packed.width))
        part = slice_groups(updates, start, stop, total) if updates and told > 1 else updates
        with compose(base.model, part) if part else nullcontext():
            for at in range(0, count, step):
                index = places[start:stop, at : at + step]
                batch = packed.batch(index.reshape(-1))
                tokens += int(packed.lengths[index].sum())
                logits = base.next_token_logits(batch)
                sums, counts = loss(logits, batch.labels)
                right = _answers_right(logits.argmax(-1), batch.labels, base.stop_ids).cpu()
                where = torch.arange(start, stop)[:, None], torch.from_numpy(order[start:stop, at : at + step])
                losses[where] = (sums / counts).cpu().view(index.shape)
                match[where] = (right & reach[index.reshape(-1)]).view(index.shape)
    return Scores(losses, match, tokens)


def _answers_right(best: Tensor, labels: Tensor, stops: Sequence[int]) -> Tensor:
    """(rows,) every answer token is the arg-max; where a stop token is due, any stop token will do."""
    right = (best == labels) | (labels == -100)
    if len(stops) > 1:
        ends = torch.tensor(stops, device=best.device)
        last = (labels != -100) & (torch.cumsum((labels != -100).flip(1), 1).flip(1) == 1)
        right |= last & torch.isin(labels, ends) & torch.isin(best, ends)
    return right.all(1)


def evaluate(
    base: Base,
    task: Task,
    updates: Mapping[str, LowRank] | None = None,
    *,
    split: str = "test",
    shots: int = 0,
    seed: int = 0,
) -> Scores:
    """Score a task's split by its metric, under updates of one or more groups (None: the base alone, zero-shot or in
    context).
    """
    from workbench.judging import judged  # which stands above this module

    examples = getattr(task, split)
    rows = encode_task(base, task, examples, shots=shots, seed=seed)
    told = max((update.groups for update in (updates or {}).values()), default=1)
    return judged(base, [task] * told, [examples] * told, [rows] * told, updates)


def evaluate_many(
    base: Base, adapters: Sequence[Adapter], tasks: Sequence[Task], *, split: str = "test"
) -> pd.DataFrame:
    """Accuracy, by each task's metric, of every adapter (rows) on every task (columns), all adapters side by side.

    Raises:
        TaskError: tasks of unequal size.
    """
    splits = [getattr(task, split) for task in tasks]
    if len({len(examples) for examples in splits}) != 1:
        raise TaskError(
            f"expected tasks of equally many {split} examples, got {[len(examples) for examples in splits]}"
        )
    updates = grouped(adapters, base.device)
    share = {}
    for task in tasks:
        share[task.name] = evaluate(base, task, updates, split=split).accuracy.numpy()
    return pd.DataFrame(share, index=[adapter.name for adapter in adapters])
