"""The line: order, bound, one at a time, and how work ends."""

import asyncio
import threading

import pytest

from ds_serve.line import Line, LineFullError


class Work:
    """Pieces 0, 1, 2, each after a permit; it notes what happens to it."""

    def __init__(self, name, log):
        self.name = name
        self.log = log
        self.permits = threading.Semaphore(0)
        self.started = threading.Event()
        self.ended = threading.Event()

    def __call__(self):
        self.log.append(f"{self.name} starts")
        self.started.set()
        try:
            for i in range(3):
                assert self.permits.acquire(timeout=10)
                yield i
        finally:
            self.log.append(f"{self.name} ends")
            self.ended.set()


async def collect(job):
    return [piece async for piece in job]


async def reached(event):
    """Wait for a thread's event without blocking the loop."""
    assert await asyncio.to_thread(event.wait, 10)


def test_one_at_a_time_in_order_of_arrival():
    async def main():
        line, log = Line(max_waiting=2), []
        works = [Work(name, log) for name in "abc"]
        jobs = [line.submit(work) for work in works]
        for work in reversed(works):
            work.permits.release(3)
        results = await asyncio.gather(*map(collect, reversed(jobs)))
        line.close()
        return results, log

    results, log = asyncio.run(main())
    assert results == [[0, 1, 2]] * 3
    assert log == ["a starts", "a ends", "b starts", "b ends", "c starts", "c ends"]


def test_a_full_line_refuses_until_a_place_is_free():
    async def main():
        line, log = Line(max_waiting=1), []
        first, second, third = (Work(name, log) for name in "abc")
        job = line.submit(first)
        line.submit(second)
        with pytest.raises(LineFullError, match="1 requests are waiting") as refusal:
            line.submit(third)
        assert refusal.value.retry_after >= 1
        for work in (first, second, third):
            work.permits.release(3)
        await collect(job)
        await reached(second.started)
        assert await collect(line.submit(third)) == [0, 1, 2]
        line.close()

    asyncio.run(main())


def test_leaving_the_line_frees_the_place_and_starts_nothing():
    async def main():
        line, log = Line(max_waiting=1), []
        first, second, third = (Work(name, log) for name in "abc")
        job, left = line.submit(first), line.submit(second)
        left.cancel()
        assert await collect(left) == []
        stays = line.submit(third)
        first.permits.release(3)
        third.permits.release(3)
        assert await collect(job) == await collect(stays) == [0, 1, 2]
        line.close()
        return log

    assert not [entry for entry in asyncio.run(main()) if entry.startswith("b")]


def test_cancelled_work_stops_at_the_next_piece_and_cleans_up():
    async def main():
        line, log = Line(max_waiting=0), []
        work = Work("a", log)
        job = line.submit(work)
        work.permits.release(1)
        pieces = []
        async for piece in job:
            pieces.append(piece)
            job.cancel()
            work.permits.release(1)
        await reached(work.ended)
        line.close()
        return pieces, log

    assert asyncio.run(main()) == ([0], ["a starts", "a ends"])


def test_a_slow_reader_does_not_hold_up_the_next():
    async def main():
        line, log = Line(max_waiting=1), []
        unread, second = Work("a", log), Work("b", log)
        slow, job = line.submit(unread), line.submit(second)
        for work in (unread, second):
            work.permits.release(3)
        assert await collect(job) == [0, 1, 2]
        assert await collect(slow) == [0, 1, 2]
        line.close()

    asyncio.run(main())


def test_what_the_work_raises_reaches_the_reader_and_the_line_goes_on():
    def breaks():
        yield 1
        raise ArithmeticError("on purpose")

    async def main():
        line = Line(max_waiting=0)
        pieces = aiter(line.submit(breaks))
        assert await anext(pieces) == 1
        with pytest.raises(ArithmeticError, match="on purpose"):
            await anext(pieces)
        assert await collect(line.submit(lambda: iter_once(2))) == [2]
        line.close()

    asyncio.run(main())


def iter_once(piece):
    yield piece


def test_closing_ends_running_and_waiting_work():
    async def main():
        line, log = Line(max_waiting=1), []
        running, waiting = Work("a", log), Work("b", log)
        jobs = [line.submit(running), line.submit(waiting)]
        await reached(running.started)
        line.close()
        assert not line.open
        running.permits.release(1)
        assert [await collect(job) for job in jobs] == [[], []]
        await reached(running.ended)
        return log

    assert asyncio.run(main()) == ["a starts", "a ends"]
