"""What holds for every operation: the same bits each time, from any number of threads at once, after a fork."""

import os
import signal
import threading
import time
import warnings

import metalloid
import numpy as np
import pytest
from arrays import assert_same_bits


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


ROPE = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": 12345}
X = normal(300, 1024)
W = normal(1024)
Q, K, V = normal(2, 6, 150, 64), normal(2, 2, 200, 64), normal(2, 2, 200, 64)
DELTA = (
    normal(2, 150, 2, 32),
    normal(2, 150, 2, 32, seed=1) / 6,
    normal(2, 150, 4, 32),
    np.full((2, 150, 4), 0.9, np.float32),
)
TARGETS = np.arange(300)

# Large enough that the work is shared among threads.
CALLS = {
    "rms_norm": lambda: metalloid.rms_norm(X, W, 1e-5),
    "layer_norm": lambda: metalloid.layer_norm(X, W, W, 1e-5),
    "rope": lambda: metalloid.rope(Q, 64, **ROPE),
    "swiglu": lambda: metalloid.swiglu(X, X),
    "geglu": lambda: metalloid.geglu(X, X),
    "scaled_dot_product_attention": lambda: metalloid.scaled_dot_product_attention(
        Q, K, V, scale=0.125, causal=True, return_logsumexp=True
    ),
    "attention of one query": lambda: metalloid.scaled_dot_product_attention(Q[:, :, :1], K, V, scale=0.125),
    "kv_cache_sdpa_update": lambda: metalloid.kv_cache_sdpa_update(
        Q[:, :, :2].swapaxes(1, 2),
        K[:, :, :2].swapaxes(1, 2),
        V[:, :, :2].swapaxes(1, 2),
        normal(2, 500, 2, 64, seed=1),
        normal(2, 500, 2, 64, seed=2),
        400,
        None,
        0.125,
    ),
    "cross_entropy": lambda: metalloid.cross_entropy(X, TARGETS),
    "gated_delta_update": lambda: metalloid.gated_delta_update(*DELTA, DELTA[3]),
    "add_rms_norm": lambda: metalloid.add_rms_norm(X, X, W, 1e-5),
    "add_layer_norm": lambda: metalloid.add_layer_norm(X, X, W, W, 1e-5),
    "qk_norm_rope": lambda: metalloid.qk_norm_rope(Q, Q, None, None, 1e-6, 64, **ROPE),
}
every_operation = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def assert_same_results(a, b):
    if isinstance(a, np.ndarray):
        a, b = (a,), (b,)
    for one, other in zip(a, b, strict=True):
        assert_same_bits(one, other)


@every_operation
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_same_call_gives_the_same_bits(call, count, threads):
    threads(count)
    assert metalloid.get_num_threads() == count
    want = call()
    for _ in range(5):
        assert_same_results(call(), want)


@every_operation
def test_one_thread_and_two_agree(call, threads):
    threads(1)
    one = call()
    threads(2)
    two = call()
    for a, b in zip(
        one if isinstance(one, (tuple, list)) else (one,),
        two if isinstance(two, (tuple, list)) else (two,),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_eight_threads_call_at_once(threads):
    threads(2)
    want = {name: call() for name, call in CALLS.items()}
    failures, barrier = [], threading.Barrier(8)

    def work(index):
        try:
            barrier.wait(30)
            names = list(CALLS)
            for turn in range(3 * len(names)):
                name = names[(turn + index) % len(names)]
                assert_same_results(CALLS[name](), want[name])
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert not any(worker.is_alive() for worker in workers)
    assert not failures, failures[0]


def test_each_thread_has_its_own_error():
    """A refused call of one thread neither disturbs nor words the error of another."""
    failures, barrier = [], threading.Barrier(8)

    def work(index):
        try:
            barrier.wait(30)
            for _ in range(200):
                with pytest.raises(ValueError, match=rf"\b{index + 3}\b"):
                    metalloid.rms_norm(np.ones((2, 2), np.float32), np.ones(index + 3, np.float32), 1e-5)
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not failures, failures[0]


def in_a_child(work):
    """The exit code of `work()` in a forked child: 0 where it returns, None where it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python warns of a fork beside threads, which is the point here
        child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_may_call(threads):
    threads(2)
    want = {name: call() for name, call in CALLS.items()}  # the pool has started

    def work():
        for name, call in CALLS.items():
            assert_same_results(call(), want[name])
        assert in_a_child(lambda: assert_same_results(CALLS["rms_norm"](), want["rms_norm"])) == 0  # and its own child

    assert in_a_child(work) == 0
    for name, call in CALLS.items():  # the parent's pool still works
        assert_same_results(call(), want[name])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_while_other_threads_call_may_call(threads):
    threads(2)
    want, stop = CALLS["rms_norm"](), threading.Event()

    def busy():
        while not stop.is_set():
            CALLS["layer_norm"]()

    workers = [threading.Thread(target=busy) for _ in range(3)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(10):
            assert in_a_child(lambda: assert_same_results(CALLS["rms_norm"](), want)) == 0
    finally:
        stop.set()
        for worker in workers:
            worker.join(60)


@pytest.mark.parametrize("count", [-1, 1.5, "two", None])
def test_a_bad_thread_count_is_refused(count, threads):
    before = metalloid.get_num_threads()
    with pytest.raises((ValueError, TypeError)):
        threads(count)
    assert metalloid.get_num_threads() == before
