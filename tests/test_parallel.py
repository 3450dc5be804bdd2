"""Ordered parallel map: order, memory bound, resume after kill -9, Ctrl-C, errors."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.core import parallel
from calib_nb.core.errors import ImageError, InputError
from calib_nb.core.parallel import Journal, next_batch_size, parallel_map

exact = settings(derandomize=True, deadline=None)


def quiet(function, items, **options):
    return parallel_map(function, items, progress=False, **options)


@settings(exact, max_examples=40)
@given(
    items=st.lists(st.integers(), max_size=600),
    workers=st.integers(1, 9),
    largest=st.integers(1, 50),
    known=st.sets(st.integers(0, 599)),
)
def test_order_equals_map(tmp_path_factory, items, workers, largest, known):
    keyed = list(enumerate(items))
    path = tmp_path_factory.mktemp("j") / "journal"
    book = Journal(path)
    book.add([(str(keyed[i]), -keyed[i][1]) for i in sorted(known) if i < len(items)])
    book.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "LARGEST_BATCH", largest)
        assert list(quiet(lambda pair: -pair[1], keyed, workers=workers)) == [-x for x in items]
        assert list(quiet(lambda pair: -pair[1], iter(keyed), workers=workers, journal=path)) == [-x for x in items]


def test_order_with_uneven_work():
    def uneven(x):
        time.sleep(0.002 * (x % 5))
        return x

    assert list(quiet(uneven, range(200), workers=8)) == list(range(200))


@pytest.mark.parametrize("workers", [1, 4])
def test_in_flight_never_above_the_window(workers):
    taken, given, worst = 0, 0, 0

    def endless():
        nonlocal taken
        for i in itertools.count():
            taken += 1
            yield i

    results = quiet(abs, endless(), workers=workers)
    for i, value in zip(range(20_000), results):
        given += 1
        worst = max(worst, taken - given)
        if i % 4000 == 0:
            time.sleep(0.05)  # a slow consumer: producers must not run away
        assert value == i
    results.close()
    assert worst <= (2 * workers + 2) * parallel.LARGEST_BATCH
    assert taken <= given + worst


def test_memory_does_not_grow_with_the_number_of_items():
    """200 results of 1 MB each through a slow consumer: the process never holds more than the window of them."""
    alive, worst, lock = 0, 0, threading.Lock()

    class Megabyte:
        def __init__(self):
            nonlocal alive, worst
            self.data = bytes(1_000_000)
            time.sleep(0.005)
            with lock:
                alive += 1
                worst = max(worst, alive)

        def __del__(self):
            nonlocal alive
            with lock:
                alive -= 1

    for value in quiet(lambda _: Megabyte(), range(200), workers=2):
        time.sleep(0.002)
        del value
    assert worst <= 2 * 2 + 2 + 6 * 2  # batches of one or two at 5 ms each


def test_a_slow_source_is_not_waited_for():
    taken = []

    def source():
        for i in range(8):
            time.sleep(0.05)
            taken.append(i)
            yield i

    results = quiet(lambda x: x, source(), workers=2)
    assert next(results) == 0 and len(taken) <= 2 * 2 + 1  # at most the window, however busy the machine is
    assert list(results) == list(range(1, 8))


@exact
@given(st.integers(1, 256), st.integers(1, 256), st.floats(0, 100))
def test_batch_size_is_bounded(size, done, seconds):
    assert 1 <= next_batch_size(size, done, seconds) <= min(2 * size, 256)


def test_error_in_its_place_and_named():
    def f(x):
        if x == 37:
            raise ImageError("bad", reason="empty")
        return x

    seen = []
    with pytest.raises(ImageError, match="bad") as caught:
        for value in quiet(f, range(1000), workers=2):
            seen.append(value)
    assert seen == list(range(37)) and caught.value.__notes__ == ["while working on item 37"]


def test_bad_arguments():
    with pytest.raises(InputError, match="at least 1"):
        quiet(abs, [], workers=0)
    with pytest.raises(InputError, match="unknown argument 'backend'; expected one of total, desc, unit"):
        quiet(abs, [], backend="process")


# --- the journal


def test_journal_cuts_a_torn_line_at_every_byte(tmp_path):
    whole = tmp_path / "whole"
    book = Journal(whole, "s")
    book.add([("a", 1), ("ü", {"x": 0.1}), ("c", None)])
    book.close()
    data = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in range(len(data) + 1):
        path = tmp_path / "cut"
        path.write_bytes(data[:cut])
        if 0 < cut < 19:  # not even the header's first word: it cannot be told from a file of someone else
            with pytest.raises(InputError, match="not a journal"):
                Journal(path, "s")
            continue
        book = Journal(path, "s")
        assert len(book.done) == max(0, sum(end <= cut for end in ends) - 1)
        book.add([("d", 4)])
        book.close()
        assert Journal(path, "s").done["d"] == 4
        assert all(json.loads(line) is not None for line in path.read_text().splitlines())


def test_journal_signature_and_foreign_file(tmp_path):
    path = tmp_path / "j"
    assert list(quiet(lambda x: x + 1, range(5), journal=path, signature="one")) == [1, 2, 3, 4, 5]
    calls = []
    assert (
        list(quiet(lambda x: calls.append(x) or x, range(5), journal=path, signature="one")) == [1, 2, 3, 4, 5]
        and calls == []
    )
    assert list(quiet(lambda x: x * 2, range(5), journal=path, signature="two")) == [0, 2, 4, 6, 8]
    image = tmp_path / "image.jpg"
    image.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(InputError, match="not a journal"):
        quiet(abs, [1], journal=image)
    assert image.read_bytes() == b"\xff\xd8\xff\xe0"


def test_a_journal_of_many_results_leaves_them_in_its_file(tmp_path):
    keys, value = [f"frame {k:06d}" for k in range(1000)], {"depth": [0.5] * 50}
    book = Journal(tmp_path / "j")
    book.add((key, value) for key in keys)
    book.add([(keys[7], "again")])
    book.close()
    tracemalloc.start()
    try:
        book = Journal(tmp_path / "j")
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert used < 1000 * 40 + 50_000  # bytes; the values alone take 450 each
    assert len(book.done) == 1000 and list(book.done)[:7] == keys[:7] and "frame" not in book.done
    assert all(book.done[key] == ("again" if key == keys[7] else value) for key in keys[::-1])
    book.close()


def test_what_a_journal_knows_needs_no_batch_of_its_own(tmp_path, monkeypatch):
    book = Journal(tmp_path / "j")
    book.add((str(x), -x) for x in range(2000) if x % 500)
    book.close()
    batches, whole = [], parallel._Batch

    def noted(engine, function, items, keys, known):
        batches.append((len(items), sum(value is parallel._NEW for value in known)))
        return whole(engine, function, items, keys, known)

    monkeypatch.setattr(parallel, "_Batch", noted)
    monkeypatch.setattr(parallel, "next_batch_size", lambda *_: 1)  # as with items that take a second
    monkeypatch.setattr(parallel, "BATCH_SECONDS", 60)
    assert list(quiet(lambda x: -x, range(2000), workers=2, journal=tmp_path / "j")) == [-x for x in range(2000)]
    assert len(batches) <= 2000 / parallel.LARGEST_BATCH + 5 and max(new for _, new in batches) == 1


def test_of_two_keys_with_one_hash_none_gets_the_value_of_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "hash", lambda key: len(key), raising=False)
    options = {"journal": tmp_path / "j", "key": str}
    assert list(quiet(lambda x: -x, range(20), **options)) == [-x for x in range(20)]
    calls = []
    assert list(quiet(lambda x: calls.append(x) or -x, range(20), **options)) == [-x for x in range(20)]
    assert len(calls) == 18  # one of each length was known


def test_journal_values_are_the_same_fresh_and_resumed(tmp_path):
    def f(x):
        return {"t": (x, 0.1 * x), "n": float("inf")}

    fresh = list(quiet(f, range(3), journal=tmp_path / "j"))
    assert fresh == list(quiet(f, range(3), journal=tmp_path / "j")) and fresh[1]["t"] == [1, 0.1]
    with pytest.raises(InputError, match="cannot be kept in a journal"):
        list(quiet(lambda x: object(), range(3), journal=tmp_path / "k"))


SCRIPT = """
import os, sys, time
from calib_nb.core.parallel import parallel_map
journal, calls, seconds, stop = sys.argv[1:]
def work(x):
    with open(calls, "a") as f:
        f.write(f"{x}\\n")
    time.sleep(float(seconds))
    while x >= int(stop) and not os.path.exists("go"):
        time.sleep(0.01)
    return x * x
values = list(parallel_map(work, range(300), workers=2, journal=journal, progress=False))
assert values == [x * x for x in range(300)], values
print("whole")
"""


def start(tmp_path, seconds="0.01", stop=300):
    """A run whose items from number `stop` on wait for the file "go", however slow the machine is."""
    words = [str(tmp_path / "journal"), str(tmp_path / "calls"), seconds, str(stop)]
    environment = {**os.environ, "PYTHONPATH": str(Path(parallel.__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
        cwd=tmp_path,
    )


def wait_for_lines(file, count):
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if file.exists() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError("the run did not get going")


def test_kill_9_then_resume(tmp_path):
    process, journal = start(tmp_path, stop=120), tmp_path / "journal"
    wait_for_lines(tmp_path / "calls", 100)
    wait_for_lines(journal, 60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = len(journal.read_text().splitlines()) - 1
    assert 50 <= kept < 300
    with open(journal, "a") as f:
        f.write('["299", 89')  # and the kill tore a line
    (tmp_path / "calls").unlink()
    again = start(tmp_path)
    out, err = again.communicate(timeout=120)
    assert out == "whole\n" and err == "" and again.returncode == 0
    assert len((tmp_path / "calls").read_text().splitlines()) == 300 - kept


@pytest.mark.parametrize("after", [1, 60])
def test_ctrl_c(tmp_path, after):
    process = start(tmp_path, "0.02", stop=after)
    wait_for_lines(tmp_path / "calls", after)
    wait_for_lines(tmp_path / "journal", 1 + after // 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    (tmp_path / "go").touch()
    out, err = process.communicate(timeout=120)
    assert out == "" and process.returncode == -signal.SIGINT
    assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt")
    kept = len((tmp_path / "journal").read_text().splitlines()) - 1
    assert (kept >= 20) == (after == 60)
    (tmp_path / "calls").unlink()
    again = start(tmp_path, "0")
    assert again.communicate(timeout=120)[0] == "whole\n"
    assert len((tmp_path / "calls").read_text().splitlines()) == 300 - kept
