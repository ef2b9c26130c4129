import time

import pytest

from hbll.sublinear import threads


@pytest.fixture(params=[1, 2, 5])
def count(request, monkeypatch):
    monkeypatch.setattr(threads, "thread_count", lambda: request.param)


@pytest.mark.usefixtures("count")
@pytest.mark.parametrize(("rows", "size"), [(1, 10), (10, 10), (11, 10), (97, 3)])
def test_results_come_in_the_order_of_the_chunks(rows, size):
    def work(chunks):
        for first, last in chunks:
            time.sleep(0.0005 * (first % 3))
            yield list(range(first, last))

    results = threads.in_chunks(work, rows, size)
    assert [row for result in results for row in result] == list(range(rows))
    assert all(len(result) == size for result in results[:-1])


@pytest.mark.usefixtures("count")
def test_an_error_in_a_thread_is_raised():
    def work(chunks):
        for first, _ in chunks:
            if first == 5:
                raise RuntimeError("chunk 5")
            yield first

    with pytest.raises(RuntimeError, match="chunk 5"):
        threads.in_chunks(work, 10, 1)
