"""Programs captured from lazy tensors: what they read, change and give, compared with the same on the host."""

import pytest
import torch

from dovetail.errors import ConfigError

FLOATS = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
INTEGERS = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


def store(kv_XD, x_TD, slots_T):
    return kv_XD.at[slots_T].set(x_TD), x_TD * 2


def words(*values):
    return torch.tensor(values, dtype=torch.int32)


def run(bridge, program, *values):
    return bridge.to_host(bridge.call(bridge.compile(program), words(*values)))


def test_weights_are_read_where_they_are(bridge):
    weight = bridge.adopt(torch.arange(6.0))
    program = bridge.trace(lambda packed_W: [packed_W + weight[:3], weight[3:] * packed_W], 3)
    for values in ((1, 2, 3), (-5, 0, 7)):
        first, second = run(bridge, program, *values)
        assert first.tolist() == [value + i for i, value in enumerate(values)]
        assert second.tolist() == [value * (i + 3) for i, value in enumerate(values)]
    assert weight.cpu().tolist() == [0, 1, 2, 3, 4, 5]


def test_adopted_tensors_are_copies(bridge):
    host = torch.ones(1000)
    adopted = bridge.adopt(host)
    host.zero_()
    assert adopted.cpu().sum() == 1000


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_every_dtype_comes_and_goes(bridge, dtype):
    host = torch.tensor([0.0, 1.0, 1.0]).to(dtype)
    adopted = bridge.adopt(host)
    back, _ = run(bridge, bridge.trace(lambda packed_W: [adopted, packed_W + 1], 1), 0)
    assert back.dtype == dtype
    assert torch.equal(back.float(), host.float())


def test_states_change_in_place(bridge):
    """Each program changes what the one before left, and XLA copies none of it."""
    kv = bridge.allocate((16, 4), torch.float32)
    bystander = bridge.allocate((7,), torch.float32)

    def step(packed_W):
        x_TD = packed_W[:, None].float().expand(2, 4) + kv.tensor[packed_W.long()]
        return bridge.apply(store, x_TD, packed_W.long(), states=[kv])

    programs = [bridge.trace(step, 2), bridge.trace(step, 2)]  # the second finds the first's, compiled
    assert [program.alias_bytes for program in programs] == [kv.tensor.nbytes] * 2
    assert kv.tensor.cpu().count_nonzero() == 0, "tracing changed a state"
    assert bystander not in programs[0].changed
    for times, program in enumerate([*programs, programs[0]], start=1):
        before = kv.tensor
        (doubled_TD,) = run(bridge, program, 3, 5)
        assert doubled_TD.tolist() == [[2.0 * 3 * times] * 4, [2.0 * 5 * times] * 4]
        assert kv.tensor is not before
        assert kv.tensor.cpu()[[3, 4, 5], 0].tolist() == [3.0 * times, 0, 5.0 * times]


def test_adopted_tensors_change_in_place(bridge):
    """By torch's operations in place, also through views, and without being read."""
    counts = bridge.adopt(torch.zeros(2, 3, dtype=torch.int32))

    def count(packed_W):
        counts.index_add_(0, packed_W.long(), torch.ones(1, 3, dtype=torch.int32, device=packed_W.device))
        counts.view(-1)[5] += 10
        return [counts * 2]

    def forget(packed_W):
        counts.zero_()
        return []

    counting, forgetting = bridge.trace(count, 1), bridge.trace(forget, 1)
    assert counting.alias_bytes == counts.nbytes
    assert run(bridge, counting, 1)[0].tolist() == [[0, 0, 0], [2, 2, 22]]
    assert run(bridge, counting, 0)[0].tolist() == [[2, 2, 2], [2, 2, 42]]
    assert counts.cpu().tolist() == [[1, 1, 1], [1, 1, 21]]
    assert run(bridge, forgetting, 0) == []
    assert counts.cpu().count_nonzero() == 0


def test_results_may_repeat_and_be_inputs(bridge):
    """torch_xla computes equal results once, and does not give inputs back."""
    weight = bridge.adopt(torch.arange(3.0))
    counts = bridge.adopt(torch.zeros(3))

    def step(packed_W):
        counts.add_(packed_W)
        total = weight + packed_W
        return [total, weight, total, counts, packed_W, weight + packed_W]

    program = bridge.trace(step, 3)
    for times in (1, 2):
        results = [result.tolist() for result in run(bridge, program, 1, 2, 3)]
        assert results == [[1, 3, 5], [0, 1, 2], [1, 3, 5], [times, 2 * times, 3 * times], [1, 2, 3], [1, 3, 5]]


def test_tensors_of_the_host_are_constants(bridge):
    """Whatever a step closes over: with the contents that it has when the step is traced."""
    table, scalar, rows = torch.arange(8.0).reshape(4, 2), torch.tensor(3.0), torch.tensor([2, 0])

    def step(packed_W):
        return [table[packed_W.long()] * scalar, torch.cat([packed_W, rows]), packed_W[rows]]

    program = bridge.trace(step, 3)
    table.zero_()
    looked_up, joined, picked = run(bridge, program, 3, 1, 2)
    assert looked_up.tolist() == [[18, 21], [6, 9], [12, 15]]
    assert joined.tolist() == [3, 1, 2, 2, 0]
    assert picked.tolist() == [2, 3]


def test_negative_numbers_are_shifted_and_not_divided(bridge):
    def shifted(numbers):
        places = torch.tensor([0, 1, 5, 31])
        long = numbers.long()
        return [numbers >> 5, long >> 30, numbers >> places, long << places, torch.bitwise_right_shift(numbers, 1)]

    numbers = words(-1, -(2**31), 2**31 - 1, -33)
    program = bridge.trace(shifted, 4)
    for found, expected in zip(run(bridge, program, *numbers), shifted(numbers), strict=True):
        assert torch.equal(found, expected)


def test_integers_are_multiplied_on_the_chip(bridge):
    def products(numbers):
        return [numbers.cumprod(0), numbers.reshape(2, 2).cumprod(1), (numbers > 1).long().cumprod(-1)]

    numbers = words(3, -2, 5, 7)
    program = bridge.trace(products, 4)
    for found, expected in zip(run(bridge, program, *numbers), products(numbers), strict=True):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype


def test_rows_are_sorted_and_put_back_on_the_chip(bridge):
    def there_and_back(numbers):
        ordered, order = numbers.long().sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(5, device=ordered.device))
        rows = ordered.float().unsqueeze(1) + torch.zeros(4, 3, device=ordered.device)
        return [starts, torch.empty_like(rows).index_copy_(0, order, rows)]

    starts, rows = run(bridge, bridge.trace(there_and_back, 4), *words(3, 0, 3, 1))
    assert starts.tolist() == [0, 1, 2, 2, 4]
    assert rows.tolist() == [[n] * 3 for n in (3, 0, 3, 1)]


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (lambda packed_W: [torch.zeros(int(packed_W[0]))], "needs to know values"),
        (lambda packed_W: [packed_W if packed_W[0] > 1 else -packed_W], "needs to know values"),
        (lambda packed_W: [packed_W.nonzero()], "aten::nonzero"),
        (lambda packed_W: [torch.zeros(3).add_(packed_W)], "has to be adopted"),
    ],
)
def test_what_cannot_be_a_program_is_refused(bridge, step, says):
    """And nothing of it is left behind."""
    counts = bridge.adopt(torch.zeros(3))

    def changing(packed_W):
        counts.add_(packed_W)
        return step(packed_W)

    with pytest.raises(RuntimeError, match=says):
        bridge.trace(changing, 3)
    assert counts.cpu().count_nonzero() == 0
    assert run(bridge, bridge.trace(lambda packed_W: [counts + packed_W], 3), 1, 2, 3)[0].tolist() == [1, 2, 3]


def test_what_xla_does_not_compile_is_refused_with_a_remedy(bridge, monkeypatch):
    def refuse(roots, devices):
        raise RuntimeError("INTERNAL: Mosaic failed to compile TPU kernel")

    monkeypatch.setattr("dovetail_tpu.bridges.capture.XLAC._xla_warm_up_cache", refuse)
    with pytest.raises(ConfigError, match=r"A step does not compile for cpu: report it .*Mosaic failed"):
        bridge.trace(lambda packed_W: [packed_W * 3], 3)


def test_programs_take_their_own_size(bridge):
    program = bridge.trace(lambda packed_W: [packed_W + 1], 3)
    with pytest.raises(ValueError, match="takes 3 words of input, not 2"):
        bridge.call(program, words(1, 2))


def test_states_are_freed_with_the_last_reference(bridge):
    before = len(bridge._buffers)
    state = bridge.allocate((2, 2), torch.float32)
    assert len(bridge._buffers) == before + 1
    del state
    assert len(bridge._buffers) == before
