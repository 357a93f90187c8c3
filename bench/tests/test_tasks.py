import numpy as np

from bench.targets import TARGETS
from bench.tasks import TASKS, Task, stream


def test_every_task_has_a_target_and_every_target_a_task():
    assert {task.key for task in TASKS} == TARGETS.keys()


def test_training_rows_are_cut_from_one_text_and_overlap_by_a_token():
    task = Task("train", 3, 4, "float32")
    rows = task.ids(100)
    assert rows.shape == (3, 5)
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    np.testing.assert_array_equal(np.append(rows[:, :-1].ravel(), rows[-1, -1]), task.text(100))


def test_every_system_gets_the_same_tokens_and_none_that_ends_a_text():
    np.testing.assert_array_equal(stream(50, 4, 300), stream(50, 4, 300))
    assert stream(50, 4, 300).min() == 2
    assert stream(50, 4, 300).max() == 49


def test_a_decode_row_counts_new_tokens_only():
    assert Task("decode", 8, 512, "float32", new=32).tokens == 256
    assert Task("train", 8, 256, "float32").tokens == 2048
