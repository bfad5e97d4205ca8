"""Groups of rows under a token budget, and what happens when memory runs out."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotrain.data.interactions import InteractionData
from cotrain.teacher import memory, reading
from cotrain.teacher.memory import TokenBudget, is_out_of_memory, plan_micro_batches
from cotrain.teacher.passes import Passes
from cotrain.teacher.ranker import RankLLM
from cotrain.teacher.writing import Written

CUDA_OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 2000))
def test_micro_batches_partition_the_rows_within_the_budget(lengths: list[int], budget: int):
    groups = plan_micro_batches(lengths, budget)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= budget
    longest = [lengths[group[0]] for group in groups]
    assert longest == sorted(longest, reverse=True)


def limited(lengths: list[int], limit: int, done: list[list[int]]) -> Callable[[list[int]], None]:
    """Work that runs out of memory above `limit` padded tokens."""

    def work(rows: list[int]) -> None:
        if len(rows) * max(lengths[row] for row in rows) > limit:
            raise torch.OutOfMemoryError(CUDA_OOM)
        done.append(rows)

    return work


@given(
    st.lists(st.integers(1, 100), max_size=40), st.integers(1, 3000), st.integers(1, 3000)
)  # fmt: skip
def test_every_row_that_fits_is_done_once_whatever_the_memory(
    lengths: list[int], tokens: int, limit: int
):
    budget, done = TokenBudget(tokens), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(memory, "_free", lambda: None)  # collecting garbage takes a while
        yielded = list(budget.groups(lengths, limited(lengths, limit, done)))
    assert [rows for rows, fits in yielded if fits] == done
    assert sorted(row for rows, _ in yielded for row in rows) == list(range(len(lengths)))
    failed = [row for rows, fits in yielded if not fits for row in rows]
    assert sorted(failed) == [row for row, length in enumerate(lengths) if length > limit]
    # Each failure halves the budget; so there are few, and it never ends below half of what fits.
    assert len(budget.backoffs) <= len(failed) + 12
    if lengths and not failed:
        assert budget.tokens >= min(tokens, limit // 2, max(lengths) * len(lengths) // 2)


def test_each_failure_is_written_down(capsys: pytest.CaptureFixture[str]):
    lengths = [100] * 8
    budget, done = TokenBudget(1000), []
    list(budget.groups(lengths, limited(lengths, 250, done)))
    assert budget.backoffs == [
        {"from_tokens": 1000, "to_tokens": 400, "rows": 8, "longest": 100},
        {"from_tokens": 400, "to_tokens": 200, "rows": 4, "longest": 100},
    ]
    assert sorted(map(len, done)) == [2] * 4
    said = capsys.readouterr().err
    assert "ran out of memory with 8 rows of up to 100 tokens" in said
    assert "from 1,000 to 400" in said
    # Halved for good: the next rows begin with what is known to fit.
    list(budget.groups(lengths, limited(lengths, 250, done)))
    assert len(budget.backoffs) == 2


def test_one_long_row_that_never_fits_does_not_slow_the_others_down():
    """Regression: each of its attempts halved the budget again, down to one row at a time."""
    lengths = [500, *[10] * 50]
    budget = TokenBudget(1000)
    done: list[list[int]] = []
    for _ in range(5):
        done.clear()
        yielded = list(budget.groups(lengths, limited(lengths, 400, done)))
        assert [rows for rows, fits in yielded if not fits] == [[0]]
    assert budget.tokens == 250
    assert len(done) == 2
    # With another row, alone, and then once each time.
    assert len(budget.backoffs) == 6


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(CUDA_OOM), True),
        (RuntimeError("CUDA out of memory. Tried"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate "
                      "memory: you tried to allocate 4000 bytes. Error code 12"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough "
                      "memory: you tried to allocate 4000 bytes."), True),
        (RuntimeError("std::bad_alloc"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_what_counts_as_memory_that_ran_out(error: Exception, expected: bool):
    assert is_out_of_memory(error) == expected


def test_other_errors_are_not_caught():
    def work(rows: list[int]) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")

    budget = TokenBudget(100)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(budget.groups([10, 10], work))
    assert not budget.backoffs


def test_what_a_failed_pass_held_is_free_before_the_next_one():
    held: list[weakref.ref] = []

    def work(rows: list[int]) -> None:
        assert not any(reference() is not None for reference in held)
        states = torch.zeros(len(rows))
        states.grad_fn_of_a_cycle = states  # pyright: ignore[reportAttributeAccessIssue]
        held.append(weakref.ref(states))
        if len(rows) > 1:
            raise torch.OutOfMemoryError(CUDA_OOM)
        held.clear()

    gc.disable()
    try:
        list(TokenBudget(40).groups([10] * 4, work))
    finally:
        gc.enable()


# ---- verdicts under little memory ---------------------------------------------------------------


def rows_of(data: InteractionData, size: int) -> tuple[list, list, list]:
    return (
        [data.train_history(user)[: 1 + user].tolist() for user in range(6)],
        [list(range(1 + 5 * user, 1 + size + 5 * user)) for user in range(6)],
        [(0, user) for user in range(6)],
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "direct"},
        {"mode": "direct", "decision_position": "emit"},
        {"mode": "cot", "reasoning_tokens": 10},
        {"mode": "direct", "window": 3, "shuffles": 2},
    ],
    ids=["direct", "emit", "cot", "windows and shuffles"],
)
def test_a_run_with_little_memory_ends_with_the_same_verdicts(
    make_ranker: Callable[..., RankLLM], ml100k: InteractionData, monkeypatch: pytest.MonkeyPatch,
    settings: dict,
):  # fmt: skip
    rows = rows_of(ml100k, 5)
    whole = make_ranker(num_candidates=5, **settings).rank(*rows)
    assert whole.valid.all()
    decode = Passes._decode

    def little(self: Passes, ids: torch.Tensor, **options: object) -> torch.Tensor:
        if ids.numel() > 700:
            raise torch.OutOfMemoryError(CUDA_OOM)
        return decode(self, ids, **options)  # pyright: ignore[reportArgumentType]

    ranker = make_ranker(num_candidates=5, **settings)
    monkeypatch.setattr(Passes, "_decode", little)
    verdict = ranker.rank(*rows)
    assert ranker.backoffs
    assert verdict.valid.all()
    assert not verdict.failures
    if whole.identifier_logits is not None:
        assert verdict.identifier_logits is not None
        torch.testing.assert_close(
            verdict.identifier_logits, whole.identifier_logits, atol=1e-4, rtol=1e-4
        )
    torch.testing.assert_close(verdict.decision_state, whole.decision_state, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(verdict.ranks, whole.ranks)


def test_one_row_that_never_fits_is_a_failure_and_the_others_are_not(
    make_ranker: Callable[..., RankLLM], ml100k: InteractionData, monkeypatch: pytest.MonkeyPatch
):
    ranker = make_ranker(num_candidates=5)
    histories, candidates, seeds = rows_of(ml100k, 5)
    lengths = [
        len(ranker.prompts.build(history, shown))
        for history, shown in zip(histories, candidates, strict=True)
    ]
    longest, second = sorted(lengths)[-1:-3:-1]
    assert longest > second
    whole = ranker.rank(histories, candidates, seeds)
    decode = Passes._decode
    # A pass over the rest behind the prefix, one row; the longest alone is too much.
    skipped = len(ranker.prompts.prefix)

    def little(self: Passes, ids: torch.Tensor, **options: object) -> torch.Tensor:
        if ids.numel() > second - skipped:
            raise torch.OutOfMemoryError(CUDA_OOM)
        return decode(self, ids, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Passes, "_decode", little)
    verdict = ranker.rank(histories, candidates, seeds)
    good = torch.tensor([length != longest for length in lengths])
    assert verdict.valid.equal(good)
    assert verdict.failures == {"out_of_memory": 1}
    torch.testing.assert_close(verdict.ranks[good], whole.ranks[good])
    assert not verdict.decision_state[~good].any()
    # It does not stay in the way: with memory enough all are answered again.
    monkeypatch.setattr(Passes, "_decode", decode)
    assert ranker.rank(histories, candidates, seeds).valid.all()


def test_an_answer_after_memory_ran_out_is_not_the_failure_before_it(
    make_ranker: Callable[..., RankLLM], ml100k: InteractionData, monkeypatch: pytest.MonkeyPatch
):
    """Regression: what a first attempt had found stayed with the row when the second found more."""
    ranker = make_ranker(mode="generate")
    good = ranker.prompts.tokenizer.encode("A] > [B] > [C]", add_special_tokens=False)
    late = ranker.prompts.tokenizer.encode("so: [B] > [A] > [C]", add_special_tokens=False)
    attempts = []

    def write(passes: Passes, prompts: list, *_: object) -> object:
        attempts.append(len(prompts))
        answers = [Written(good, True, -1.0)] if len(prompts) == 1 else [Written([], True, -1.0)]
        answers += [Written(late, True, -1.0)] * (len(prompts) - 1)
        return answers, torch.zeros(len(prompts), 32)

    def no_memory(self: Passes, prompts: list) -> torch.Tensor:
        raise torch.OutOfMemoryError(CUDA_OOM)

    monkeypatch.setattr(reading, "write", write)
    # Which is asked for the row that began with other words, after both were parsed.
    monkeypatch.setattr(Passes, "last_states", no_memory)
    looks = ranker.reader.read([([1], [4, 5, 6]), ([2], [7, 8, 9])])
    assert attempts == [2, 1, 1]
    assert [look.failure for look in looks] == [None, None]
