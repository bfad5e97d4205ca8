"""Work in groups of rows under a token budget that shrinks when memory runs out."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from tqdm import tqdm


def plan_micro_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Rows grouped by length, longest first, so that rows × longest stays within a token budget.

    A row longer than the budget goes alone. Longest first, so that a budget too large for memory
    shows in the first group.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= batch_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class TokenBudget:
    """Prompt tokens, padding included, of one forward pass; halved for good by each failure.

    Attributes:
        tokens: The budget as it is now.
        backoffs: Each time that memory ran out: the budget before and after, and the group.
    """

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.backoffs: list[dict[str, Any]] = []

    def groups(
        self, lengths: Sequence[int], work: Callable[[list[int]], None]
    ) -> Iterator[tuple[list[int], bool]]:
        """Do work on all rows, in groups that fit the budget.

        Args:
            lengths: Tokens of each row.
            work: Is called with the rows of a group; called again on smaller groups of the same
                rows where memory ran out. What it had stored of them is to be overwritten.

        Yields:
            Each group and whether it was done; one row that is alone and still does not fit was
            not.
        """
        waiting = plan_micro_batches(lengths, self.tokens)[::-1]
        while waiting:
            rows = waiting.pop()
            if self._fits(rows, work):
                yield rows, True
                continue
            # Here, and not where it is caught: there the failed pass is still held in memory.
            _free()
            longest = max(lengths[row] for row in rows)
            # Half of what failed: where that was one long row, other rows may fit as before.
            before, self.tokens = self.tokens, max(1, min(self.tokens, len(rows) * longest // 2))
            self.backoffs.append(
                {
                    "from_tokens": before,
                    "to_tokens": self.tokens,
                    "rows": len(rows),
                    "longest": longest,
                }
            )
            tqdm.write(
                f"The teacher ran out of memory with {len(rows)} rows of up to {longest:,} tokens; "
                f"its token budget goes from {before:,} to {self.tokens:,}.",
                file=sys.stderr,
            )
            if len(rows) == 1:
                yield rows, False
                rows = []
            rest = [row for group in [rows, *waiting[::-1]] for row in group]
            plan = plan_micro_batches([lengths[row] for row in rest], self.tokens)
            waiting = [[rest[index] for index in group] for group in plan][::-1]

    def _fits(self, rows: list[int], work: Callable[[list[int]], None]) -> bool:
        try:
            work(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True


def is_out_of_memory(error: Exception) -> bool:
    """Whether less at once may work: memory of any device ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    # Accelerate knows the devices' words; the rest are those of allocations outside PyTorch.
    return should_reduce_batch_size(error) or any(
        words in text
        for words in ("not enough memory", "bad allocation", "bad_alloc", "could not create a")
    )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
