"""The mode `pointwise`: the teacher is asked about each candidate by itself, yes or no."""

from collections.abc import Sequence

import torch

from cotrain.config import TeacherConfig
from cotrain.teacher.item_prompts import ItemPrompts
from cotrain.teacher.memory import TokenBudget
from cotrain.teacher.passes import Passes
from cotrain.teacher.reading import Ask, Look, Reader

# Rows whose prompts are read together; each leaves a state for every candidate until it is merged.
_ROWS = 256


class QuestionReader(Reader):
    """Scores each candidate by logit(Yes) − logit(No) where the answer is due.

    A softmax of these scores divides the odds of Yes of each candidate by the sum of all odds. K
    passes a row; a candidate's score depends on no other candidate, nor on its place.

    Args:
        passes: The decoder.
        prompts: Questions about one candidate.
        settings: Memory.
        budget: Prompt tokens of one pass.

    Source: TALLRec (Bao et al., RecSys 2023), which learns such an answer; the score is the
    difference of logits, where the paper takes the probability of Yes.
    """

    def __init__(
        self, passes: Passes, prompts: ItemPrompts, settings: TeacherConfig, budget: TokenBudget
    ):
        super().__init__(passes, prompts, settings, budget)
        self._questions = prompts

    def read(self, asks: Sequence[Ask], progress: str | None = None) -> list[Look]:
        """One look for each ask, in their order; its state is that of the best candidate."""
        looks = []
        for start in range(0, len(asks), _ROWS):
            some = asks[start : start + _ROWS]
            found = iter(
                self.read_prompts(
                    [
                        self._questions.build_question(history, item)
                        for history, shown in some
                        for item in shown
                    ],
                    progress,
                )
            )
            looks += [_merged([next(found) for _ in shown]) for _, shown in some]
        return looks

    def _modes(self):
        return {"pointwise": self._ask}

    def _ask(self, prompts: Sequence[list[int]], looks: Sequence[Look]) -> None:
        states = self.passes.last_states(prompts)
        answers = torch.tensor(self._questions.answer_ids, device=states.device)
        logits = self.passes.backbone.token_logits(states, answers)
        scores = logits[:, :1] - logits[:, 1:]  # (B, 1)
        for look, state, score in zip(looks, states, scores, strict=True):
            look.state, look.logits = state, score


def _merged(looks: Sequence[Look]) -> Look:
    """The looks at each candidate as one."""
    tokens = sum(look.prompt_tokens for look in looks)
    failure = next((look.failure for look in looks if look.failure), None)
    if failure:
        return Look(failure=failure, prompt_tokens=tokens)
    logits = torch.cat([look.logits for look in looks if look.logits is not None])
    return Look(logits=logits, state=looks[int(logits.argmax())].state, prompt_tokens=tokens)
