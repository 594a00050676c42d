import time

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from dynamics.spectra.workers import mapped, single_threaded, single_threaded_workers


def blas_threads():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_one_thread_inside_and_as_before_outside():
    np.ones((2, 2)) @ np.ones((2, 2))  # BLAS is there
    torch.set_num_threads(2)
    try:
        before = blas_threads()
        with single_threaded():
            assert torch.get_num_threads() == 1
            assert blas_threads() == {1}
        assert torch.get_num_threads() == 2
        assert blas_threads() == before
    finally:
        torch.set_num_threads(1)


def test_each_worker_has_one_thread():
    with single_threaded_workers(2) as executor:
        assert list(executor.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4


def test_what_fails_cancels_what_has_not_begun():
    begun = []

    def work(number):
        begun.append(number)
        time.sleep(0.02)

    def interrupted():
        with single_threaded_workers(1) as executor:
            for number in range(100):
                executor.submit(work, number)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(begun) < 100


@pytest.mark.parametrize("ahead", [1, 3, 50])
def test_mapped_keeps_the_order_and_few_pending(ahead):
    pending, most = 0, 0

    def items():
        nonlocal pending, most
        for number in range(20):
            pending += 1
            most = max(most, pending)
            yield number

    results = []
    with single_threaded_workers(2) as executor:
        for result in mapped(executor, lambda number: number**2, items(), ahead):
            results.append(result)
            pending -= 1
    assert results == [number**2 for number in range(20)]
    assert most <= ahead + 1


def test_an_error_of_an_item_is_raised():
    with pytest.raises(ZeroDivisionError), single_threaded_workers(2) as executor:
        list(mapped(executor, lambda number: 1 / number, iter([1, 0, 2]), 1))


def test_fewer_workers_have_several_threads_each():
    with single_threaded_workers(2, threads=3) as executor:
        assert list(executor.map(lambda _: torch.get_num_threads(), range(4))) == [3] * 4
