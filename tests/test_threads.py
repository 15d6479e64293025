"""Two threads of one process that compute at once: the same bits as one after the other."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cases import CPU, files_of, small_network

import ntkgen
from ntkgen.alone import alone
from ntkgen.jacobian.precision import exact_arithmetic, fixed_threads

X = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
V = torch.randn(24, 6, generator=torch.Generator().manual_seed(2))
SECONDS = 60


def scaled(factor):
    """A network of its own for each thread; made outside of it, since the random numbers are of the process."""
    model = small_network()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(factor)
    return model


def at_once(function, arguments):
    """Call a function in as many threads as there are arguments, as nearly at once as can be."""
    ready = threading.Barrier(len(arguments), timeout=SECONDS)

    def run(argument):
        ready.wait()
        return function(argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(run, arguments))


def state():
    """What is set for the whole process."""
    matmul, cudnn = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cudnn
    return torch.get_num_threads(), matmul, cudnn.benchmark, cudnn.deterministic


def test_only_one_thread_computes():
    inside, go_on, order = threading.Event(), threading.Event(), []

    def first():
        with exact_arithmetic(CPU, threads=3):
            inside.set()
            go_on.wait(SECONDS)
            order.append("first")

    def second():
        inside.wait(SECONDS)
        with exact_arithmetic(CPU):
            order.append("second")

    before = state()
    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    inside.wait(SECONDS)
    threads[1].join(0.05)
    assert order == []
    go_on.set()
    for thread in threads:
        thread.join(SECONDS)
    assert order == ["first", "second"]
    assert state() == before


def test_a_thread_may_enter_again_and_leaves_after_an_error():
    with alone(), exact_arithmetic(CPU), fixed_threads(2), exact_arithmetic(CPU, threads=3):
        assert torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError), exact_arithmetic(CPU):
        _ = 1 / 0
    entered = threading.Thread(target=lambda: exact_arithmetic(CPU).__enter__(), daemon=True)
    entered.start()
    entered.join(SECONDS)
    assert not entered.is_alive()


def test_two_operators_in_forward_mode_do_not_meet():
    def multiply(model):
        operator = ntkgen.NTKOperator(model, X, batch_size=1)
        assert operator.push == "forward"
        return operator @ V

    models = [scaled(1.0), scaled(1.5)]
    expected = [multiply(model) for model in models]
    assert all(map(torch.equal, at_once(multiply, models), expected))


def test_two_kernels_of_two_threads_have_the_bits_of_one_after_the_other(tmp_path):
    models = [scaled(1.0), scaled(1.5)]

    def compute(place):
        model = models[len(place) - 1]
        store = ntkgen.compute(model, X, store=tmp_path / place, tile_side=12, fsync=False)
        dense = ntkgen.ntk(model, X)
        return files_of(store.path), dense.numpy(), ntkgen.reference_ntk(model, X).numpy()

    before = state()
    expected = [compute(place) for place in ("a", "bb")]
    found = at_once(compute, ["c", "dd"])
    assert state() == before
    for (files, *arrays), (others, *them) in zip(expected, found, strict=True):
        assert files == others  # the certificate's too
        assert all(map(np.array_equal, arrays, them))
