"""Examples as token ids, and as tensors from which batches are cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from workbench.base import Base, Batch
from workbench.errors import TaskError
from workbench.prompts import Prompt, tokenise
from workbench.tasks import Example, Task

__all__ = ["Encoded", "Packed", "encode", "encode_all", "encode_task", "word"]


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


def word(
    base: Base, task: Task, examples: Sequence[Example], *, shots: int = 0, seed: int = 0, once: bool = False
) -> list[Prompt]:
    """A task's prompts as the base reads them, texts or a chat's turns; demonstrations as in `encode_task`.

    Raises:
        TaskError: more demonstrations than training examples.
    """
    if shots > len(task.train):
        raise TaskError(f"{task.name}: {shots} demonstrations asked for, but only {len(task.train)} training examples")
    rng = random.Random(f"{task.name}|shots|{seed}")
    say = task.turns if base.chat else task.prompt
    drawn = [rng.sample(task.train, shots) for _ in range(1 if once else len(examples))]
    return [say(example, drawn[0 if once else i]) for i, example in enumerate(examples)]


def encode_task(
    base: Base, task: Task, examples: Sequence[Example], *, shots: int = 0, seed: int = 0, once: bool = False
) -> list[Encoded]:
    """Encode a task's examples; `shots` puts that many of the training examples before each, drawn under the seed.

    Each example has demonstrations of its own; `once`: all have the same, which are then read once (see `score`).

    Raises:
        TaskError: more demonstrations than training examples.
    """
    prompts = word(base, task, examples, shots=shots, seed=seed, once=once)
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

    def batch(self, index: np.ndarray, *, tight: bool = False, where: torch.Tensor | None = None) -> Batch:
        """These rows, with labels −100 outside answers; padding is trimmed to them.

        A causal model's logits are taken from the first answer on; `tight`: at each row's own answer alone. `where` is index
        on the device, if it is there already, so that nothing waits for it.
        """
        where = torch.from_numpy(index).to(self.ids.device) if where is None else where
        length, last = (int(part[index].max()) for part in (self.parts[0], self.parts[-1]))
        ids = self.ids[where, :length].long()
        if self.start is None:
            keep = length - int(self.starts[index].min()) + 1
            longest = int((self.lengths - self.starts)[index].max())
            if tight and longest + 1 < keep:  # the last column predicts what comes behind the longest row
                first = torch.from_numpy(self.starts[index]).to(self.ids.device)[:, None] - 1
                at = (first + torch.arange(longest, device=self.ids.device)).clamp(max=length - 1)
                return Batch(ids, self.labels[where[:, None], at].long(), longest, at=at)
            return Batch(ids, self.labels[where, length - keep : length].long(), keep)
        labels = self.labels[where, :last].long()
        mask = torch.arange(length) < torch.from_numpy(self.starts[index])[:, None]
        decoder = labels.roll(1, 1).clamp(min=0)  # a label's padding is no token
        decoder[:, 0] = self.start
        return Batch(ids, labels, last, mask.to(ids.device), decoder)
