"""The student equals a plain SASRec written with loops, and keeps what training relies on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cotrain.data.batches import SequenceBatch, SequenceDataset, collate, left_pad
from cotrain.data.packing import PackedSequences, RowGroup, pack, pack_together
from cotrain.student.losses import TrainingLoss
from cotrain.student.sasrec import SASRec, dropout

NUM_ITEMS, MAX_LENGTH = 23, 12
CE = TrainingLoss("chunked_ce")

items = st.integers(1, NUM_ITEMS)
row = st.lists(items, min_size=1, max_size=MAX_LENGTH)
rows = st.lists(row, min_size=1, max_size=6)
# The model is the same for all examples, and stays as it is.
same_model = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def model() -> SASRec:
    """Two layers, two heads, dropout on, and weights large enough that all of them matter."""
    torch.manual_seed(0)
    model = SASRec(NUM_ITEMS, hidden_size=8, num_layers=2, num_heads=2, max_length=MAX_LENGTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        model.item_embedding.weight[0] = 0
    return model.eval()


def packed(*histories: list[int]) -> PackedSequences:
    return pack([np.array(history) for history in histories])


@torch.no_grad()
def states_of(model: SASRec, *histories: list[int]) -> list[Tensor]:
    """(length, D) states of each row, out of one packed batch."""
    sequences = packed(*histories)
    return split_rows(model.encode(sequences), sequences)


def split_rows(values: Tensor, sequences: PackedSequences) -> list[Tensor]:
    places = zip(sequences.starts.tolist(), sequences.lengths.tolist(), strict=True)
    return [values[start : start + length] for start, length in places]


def batch_of(*histories: list[int], cut: list[int] | None = None) -> SequenceBatch:
    """The training batch whose rows are these items; the last item of each is a target only.

    Args:
        histories: Two items or more each.
        cut: Place within each row; none: the last one that has a target.
    """
    sequences, (targets,) = pack_together(
        [np.array(history[:-1]) for history in histories],
        [np.array(history[1:]) for history in histories],
    )
    places = sequences.lengths - 1 if cut is None else torch.tensor(cut)
    return SequenceBatch(
        user_index=torch.arange(len(histories)),
        sequences=sequences,
        target_ids=targets,
        cut=sequences.starts + places,
        history=left_pad([np.array(history[:-1]) for history in histories]),
        first_target=torch.zeros(len(histories), dtype=torch.int64),
    )


def random_rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, NUM_ITEMS + 1, length).tolist() for length in lengths]


def random_batch(lengths: list[int], seed: int = 0) -> SequenceBatch:
    return batch_of(*random_rows(lengths, seed))


# ---- the plain SASRec ---------------------------------------------------------------------------


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    spread = ((x - x.mean()) ** 2).mean()
    scaled = (x - x.mean()) / (spread + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def plain_states(items: list[int], weights: dict[str, Tensor], layers: int, heads: int) -> Tensor:
    """States of one sequence without padding, one position and one head at a time, in float64."""
    size = weights["item_embedding.weight"].shape[1]
    hidden = [
        weights["item_embedding.weight"][item] * math.sqrt(size)
        + weights["position_embedding.weight"][position]
        for position, item in enumerate(items)
    ]
    width = size // heads
    for layer in range(layers):
        block = f"blocks.{layer}."
        mixed = [linear(norm(x, weights, block + "attention_norm"), weights, block + "qkv")
                 for x in hidden]  # fmt: skip
        for position in range(len(items)):
            outputs = []
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                query = mixed[position][:size][part]
                scores = [
                    float(query @ mixed[earlier][size : 2 * size][part]) / math.sqrt(width)
                    for earlier in range(position + 1)
                ]
                shares = [math.exp(score - max(scores)) for score in scores]
                output = torch.zeros(width, dtype=torch.float64)
                for earlier in range(position + 1):
                    value = mixed[earlier][2 * size :][part]
                    output += shares[earlier] / sum(shares) * value
                outputs.append(output)
            attended = linear(torch.cat(outputs), weights, block + "attention_out")
            hidden[position] = hidden[position] + attended
        for position, x in enumerate(hidden):
            inner = gelu(linear(norm(x, weights, block + "ffn_norm"), weights, block + "ffn_in"))
            hidden[position] = x + linear(inner, weights, block + "ffn_out")
    return torch.stack([norm(x, weights, "final_norm") for x in hidden])


def doubles(model: SASRec) -> dict[str, Tensor]:
    return {name: value.double() for name, value in model.state_dict().items()}


def test_states_and_loss_equal_the_plain_sasrec(model):
    histories = random_rows([13, 2, 6, 9])
    batch = batch_of(*histories)
    output = model(batch, CE)
    weights = doubles(model)
    vectors = weights["item_embedding.weight"]
    loss = 0.0
    for history, states in zip(histories, split_rows(output.states, batch.sequences), strict=True):
        plain = plain_states(history[:-1], weights, layers=2, heads=2)
        torch.testing.assert_close(states.double(), plain, atol=1e-5, rtol=0)
        for state, target in zip(plain, history[1:], strict=True):
            # Softmax over the items; index 0 is none.
            logits = [float(state @ vectors[item]) for item in range(1, NUM_ITEMS + 1)]
            total = sum(math.exp(logit - max(logits)) for logit in logits)
            loss -= logits[target - 1] - max(logits) - math.log(total)
    assert output.n_targets == 12 + 1 + 5 + 8
    assert output.loss_sum.item() == pytest.approx(loss, rel=1e-5)


def test_scores_for_recommending_equal_those_of_the_plain_sasrec(model):
    # The longest is cut to what the model can read.
    histories = random_rows([MAX_LENGTH + 5, 1, 4, 4, MAX_LENGTH])
    scores = model.user_states([np.array(history) for history in histories]) @ model.item_vectors.T
    weights = doubles(model)
    for history, found in zip(histories, scores, strict=True):
        state = plain_states(history[-MAX_LENGTH:], weights, layers=2, heads=2)[-1]
        plain = weights["item_embedding.weight"] @ state
        torch.testing.assert_close(found.double(), plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("layers", "heads", "size"), [(1, 1, 4), (3, 4, 16)])
def test_other_shapes_equal_the_plain_sasrec(layers, heads, size):
    torch.manual_seed(1)
    model = SASRec(NUM_ITEMS, size, layers, heads, MAX_LENGTH).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    (states,) = states_of(model, [3, 1, 4, 1, 5])
    plain = plain_states([3, 1, 4, 1, 5], doubles(model), layers, heads)
    torch.testing.assert_close(states.double(), plain, atol=1e-5, rtol=0)


# ---- invariances --------------------------------------------------------------------------------


@same_model
@given(histories=rows, data=st.data())
def test_the_future_does_not_change_the_past(model, histories, data):
    """Other items after a position, of every row at once, leave it and all before it as they are,
    to the bit."""
    before = states_of(model, *histories)
    known = [data.draw(st.integers(0, len(history))) for history in histories]
    changed = [
        history[:keep] + [item % NUM_ITEMS + 1 for item in history[keep:]]
        for history, keep in zip(histories, known, strict=True)
    ]
    for one, other, keep in zip(before, states_of(model, *changed), known, strict=True):
        assert one[:keep].equal(other[:keep])
        if keep < len(one):
            assert not torch.allclose(one[keep], other[keep], atol=1e-4)


@same_model
@given(history=row, more=row, others=rows)
def test_a_longer_future_does_not_change_the_past(model, history, more, others):
    """Nor does it matter what the row is grouped with, once it is longer."""
    longer = (history + more)[:MAX_LENGTH]
    (alone,) = states_of(model, history)
    grown, *_ = states_of(model, longer, *others)
    torch.testing.assert_close(grown[: len(history)], alone, atol=1e-5, rtol=0)


def test_every_past_item_counts(model):
    """The counterpart: a state that ignored its past would pass the tests of causality."""
    history = [3, 1, 4, 1, 5, 9]
    (states,) = states_of(model, history)
    for position in range(6):
        changed = history.copy()
        changed[position] = 17
        moved = (states_of(model, changed)[0] - states).abs().amax(1)
        assert (moved[position:] > 1e-4).all()


@same_model
@given(histories=rows, others=rows, data=st.data())
def test_a_row_does_not_depend_on_the_rest_of_its_batch(model, histories, others, data):
    """Neither on the number of rows nor on their order, items and lengths; in float64, where
    nothing can hide behind the rounding."""
    model = model.double()
    alone = [states_of(model, history)[0] for history in histories]
    everybody = histories + others
    order = data.draw(st.permutations(range(len(everybody))))
    together = states_of(model, *(everybody[place] for place in order))
    for place, states in enumerate(alone):
        torch.testing.assert_close(together[order.index(place)], states, atol=1e-12, rtol=0)


@same_model
@given(histories=rows)
def test_a_row_alone_equals_itself_in_a_batch_up_to_float_rounding(model, histories):
    for history, states in zip(histories, states_of(model, *histories), strict=True):
        torch.testing.assert_close(states_of(model, history)[0], states, atol=1e-5, rtol=0)


def in_one_grid(sequences: PackedSequences, padding: int) -> PackedSequences:
    """The same rows in a single grid, `padding` columns wider than it need be."""
    num_rows, length = len(sequences.lengths), int(sequences.lengths.max()) + padding
    row_of = torch.arange(num_rows).repeat_interleave(sequences.lengths.sort().values)
    slots = row_of * length + sequences.positions
    group = RowGroup(num_rows, length, len(sequences.item_ids), slots)
    return replace(sequences, groups=(group,))


@pytest.mark.parametrize("padding", [0, 1, 3, 60])
def test_more_padding_changes_no_state(model, padding):
    sequences = packed(*random_rows([12, 3, 5, 1, 1, 7]))
    assert len(sequences.groups) > 1
    states = model.encode(sequences)
    again = model.encode(in_one_grid(sequences, padding))
    assert again.isfinite().all()
    torch.testing.assert_close(again, states, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ce", "chunked_ce"])
def test_gradients_of_a_batch_are_the_sum_of_those_of_its_rows(model, name):
    model = model.double()
    histories = random_rows([13, 2, 6, 9, 9, 3])

    def gradients(*batch: list[int]) -> dict[str, Tensor]:
        model.zero_grad()
        model(batch_of(*batch), TrainingLoss(name)).loss_sum.backward()
        found = {}
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None
            found[key] = parameter.grad.clone()
        return found

    together = gradients(*histories)
    alone = [gradients(history) for history in histories]
    for key, gradient in together.items():
        expected = torch.stack([one[key] for one in alone]).sum(0)
        torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=1e-10)


def test_user_state_is_the_state_at_the_cut(model):
    batch = batch_of([1, 2, 3, 4, 5], [6, 7, 8], cut=[1, 0])
    output = model(batch, CE)
    first, second = split_rows(output.states, batch.sequences)
    assert torch.equal(output.user_state, torch.stack([first[1], second[0]]))


# ---- dropout ------------------------------------------------------------------------------------


def test_dropout_is_drawn_in_training_only(model):
    sequences = packed(*random_rows([9, 9]))
    assert torch.equal(model.encode(sequences), model.encode(sequences))
    model.train()
    assert not torch.equal(model.encode(sequences), model.encode(sequences))
    model.dropout = 0.0
    for block in model.blocks:
        block.dropout = 0.0
    trained = model.encode(sequences)
    torch.testing.assert_close(trained, model.eval().encode(sequences), atol=1e-6, rtol=0)


def test_dropout_leaves_values_alone_outside_of_training():
    values = torch.randn(5, 3)
    assert dropout(values, 0.5, training=False) is values
    assert dropout(values, 0.0, training=True) is values


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(probability):
    """Regression: above 0.998 it divided by zero."""
    torch.manual_seed(0)
    count = 2**18
    share = min(255, max(1, round(256 * probability))) / 256
    assert abs(share - probability) <= 1 / 256
    found = dropout(torch.full((count,), 3.0), probability, training=True)
    kept = found != 0
    assert torch.allclose(found[kept], torch.tensor(3 / (1 - share)))
    spread = math.sqrt(share * (1 - share))
    assert abs((~kept).double().mean() - share) < 5 * spread / math.sqrt(count)
    assert abs(found.mean() - 3) < 5 * 3 * spread / (1 - share) / math.sqrt(count)
    # Eight decisions come out of one number: each of them has the same share.
    lanes = (~kept).view(-1, 8).double().mean(0)
    assert (abs(lanes - share) < 5 * spread / math.sqrt(count / 8)).all()


def test_the_bytes_behind_dropout_are_uniform_and_their_lanes_independent():
    count, values = 2**15, torch.ones(2**15)

    def kept(dropped: int) -> Tensor:
        torch.manual_seed(7)
        return dropout(values, dropped / 256, training=True) != 0

    # A value is kept where its byte is at least `dropped`: counted over all, that is the byte.
    drawn = torch.stack([kept(dropped) for dropped in range(1, 256)]).sum(0)
    for lane in drawn.view(-1, 8).T:
        expected = count / 8 / 256
        chi_square = ((lane.bincount(minlength=256) - expected) ** 2 / expected).sum()
        assert abs(chi_square - 255) < 6 * math.sqrt(2 * 255)
    correlations = torch.corrcoef(drawn.view(-1, 8).T.double()).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / math.sqrt(count / 8)


def test_dropout_repeats_itself_under_a_seed_and_differs_from_call_to_call():
    values = torch.randn(37, 11)  # not a multiple of eight
    torch.manual_seed(3)
    first, second = dropout(values, 0.4, True), dropout(values, 0.4, True)
    torch.manual_seed(3)
    assert dropout(values, 0.4, True).equal(first)
    assert dropout(values, 0.4, True).equal(second)
    assert not first.equal(second)
    assert dropout(values[:0], 0.4, True).shape == (0, 11)


def test_dropout_passes_its_gradient_where_it_kept_the_value():
    values = torch.randn(64, 8, requires_grad=True)
    found = dropout(values, 0.5, True)
    found.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.where(found != 0, 2.0, 0.0))


# ---- the loss -----------------------------------------------------------------------------------


def test_padding_row_gets_no_gradient_and_every_item_does(model):
    model.train()
    model(random_batch([13, 2, 6, 9]), CE).loss_sum.backward()
    gradient = model.item_embedding.weight.grad
    assert (gradient[0] == 0).all()
    # Tied: also an item that no row holds is pushed away from the states.
    assert (gradient[1:].abs().amax(1) > 0).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if name != "position_embedding.weight":
            assert (parameter.grad != 0).any(), name


def test_loss_ignores_how_the_padding_looks(model):
    batch = batch_of([1, 2, 3, 4, 5], [6, 7, 8])
    alone = [model(batch_of(row), CE).loss_sum.item() for row in ([1, 2, 3, 4, 5], [6, 7, 8])]
    assert model(batch, CE).loss_sum.item() == pytest.approx(sum(alone), rel=1e-5)
    with torch.no_grad():
        before = model(batch, CE).loss_sum
        # Large enough to win every softmax that it took part in.
        model.item_embedding.weight[0] = 100.0
        assert model(batch, CE).loss_sum == before


def test_loss_of_a_fresh_model_on_real_data_is_that_of_guessing(ml100k):
    dataset = SequenceDataset(ml100k, max_length=50, seed=0)
    torch.manual_seed(0)
    model = SASRec(ml100k.num_items, hidden_size=64, max_length=50)
    output = model(collate([dataset[user, 0] for user in dataset.users[:32].tolist()]), CE)
    mean = output.loss_sum.item() / output.n_targets.item()
    # Logits of variance 64 × 0.02² add about half of that.
    assert mean == pytest.approx(math.log(1682), abs=0.05)


# ---- saving -------------------------------------------------------------------------------------


def test_save_and_load_keep_sizes_and_states(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    loaded = SASRec.from_pretrained(tmp_path).eval()
    assert (loaded.hidden_size, loaded.max_length, len(loaded.blocks)) == (8, MAX_LENGTH, 2)
    assert loaded.dropout == model.dropout
    sequences = packed(*random_rows([12, 4]))
    assert torch.equal(loaded.encode(sequences), model.encode(sequences))
