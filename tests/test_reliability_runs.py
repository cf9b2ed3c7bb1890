"""Few cases of what `python tests/reliability.py` tries often: spoilt checkpoints, a full disk, memory over a run."""

import numpy as np
import pytest
import reliable_runs


@pytest.mark.reliability
def test_a_spoilt_checkpoint_is_told_and_the_one_before_it_used(tmp_path):
    assert reliable_runs.spoilt_checkpoints(tmp_path, 10, seed=1).total() == 10


@pytest.mark.reliability
def test_without_room_or_place_what_was_saved_stays(tmp_path):
    assert reliable_runs.full_disk(tmp_path, 2, seed=1).total() == 2
    assert reliable_runs.no_place(tmp_path).total() >= 1


@pytest.mark.reliability
@pytest.mark.slow
def test_memory_stays_and_nothing_is_compiled_again(tmp_path):
    found = reliable_runs.soak(tmp_path, 200, warm=100)
    assert found["seconds compiling since"] == 0
    assert found["MiB at the end"] < found["MiB after warm-up"] + 32


def test_another_bit_in_a_final_state_is_seen(tmp_path):
    """A check of the checker: runs whose checkpoints differ in one bit are not the same."""
    for name, changed in (("one", 0.0), ("other", 1e-7)):
        for file in reliable_runs.BITWISE:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_text("{}\n")
        with reliable_runs.Checkpoints(tmp_path / name / "checkpoints" / "ppo") as checkpoints:
            checkpoints.save(3, {"w": np.array([1.0, 1.0 + changed], np.float32)})
    reliable_runs.same(tmp_path / "one", tmp_path / "one")
    with pytest.raises(AssertionError, match="'w'.* differs"):
        reliable_runs.same(tmp_path / "one", tmp_path / "other")
