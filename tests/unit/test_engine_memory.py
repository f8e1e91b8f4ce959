"""What is released, and what that forbids: SGLang itself would die of it."""

from collections.abc import Sequence

import pytest

from adapter.verl_engine.control import EngineControl
from adapter.verl_engine.deaths import Deaths
from adapter.verl_engine.facts import EngineFacts
from adapter.verl_engine.memory import MemoryState

RELEASED = "memory is released; call resume_memory_occupation"


def released(*tags: str) -> MemoryState:
    state = MemoryState()
    state.mark_released(state.to_release(tags))
    return state


def resume(state: MemoryState, tags: Sequence[str] | str | None = None, *, keeps_weights: bool = False) -> list[str]:
    wanted = state.to_resume(tags)
    state.mark_resumed(wanted, keeps_weights=keeps_weights)
    return wanted


def test_nothing_is_forbidden_at_first() -> None:
    state = MemoryState()
    state.check_generate()
    state.check_update()


def test_none_means_all_that_is_left() -> None:
    state = released("weights")
    assert state.to_release(None) == ["kv_cache", "cuda_graph"]
    assert state.to_resume(None) == ["weights"]


def test_what_is_released_is_not_released_again() -> None:
    state = released("weights", "kv_cache")
    assert state.to_release(["weights"]) == []
    assert state.released == ("weights", "kv_cache")


def test_only_what_is_released_is_resumed() -> None:
    state = released("kv_cache")
    assert resume(state, ["weights", "kv_cache"]) == ["kv_cache"]
    assert resume(state) == []


def test_one_tag_may_be_a_text_and_is_taken_once() -> None:
    state = MemoryState()
    assert state.to_release("weights") == ["weights"]
    assert state.to_release(["weights", "weights"]) == ["weights"]


@pytest.mark.parametrize("call", ["to_release", "to_resume"])
def test_an_unknown_tag_is_refused_by_name(call: str) -> None:
    with pytest.raises(
        ValueError, match="'weight' is no kind of the engine's memory; there are kv_cache, weights, cuda"
    ):
        getattr(MemoryState(), call)(["weight"])


@pytest.mark.parametrize("tag", ["kv_cache", "weights", "cuda_graph"])
def test_nothing_is_generated_while_anything_is_released(tag: str) -> None:
    with pytest.raises(ValueError, match=f"{tag} {RELEASED}"):
        released(tag).check_generate()


def test_weights_are_not_sent_into_memory_that_is_not_there() -> None:
    released("kv_cache").check_update()
    with pytest.raises(ValueError, match=r"weights are released; call resume_memory_occupation\(\['weights'\]\)"):
        released("weights").check_update()


def test_weights_without_a_backup_must_be_sent_before_anything_is_generated() -> None:
    state = released("weights", "kv_cache")
    resume(state, "weights")
    state.check_update()
    state.mark_updated()
    resume(state)
    state.check_generate()


def test_weights_that_were_lost_are_not_generated_with() -> None:
    state = released("weights")
    resume(state)
    assert state.weights_lost
    with pytest.raises(ValueError, match="released without a backup and have not been sent since; update them first"):
        state.check_generate()


def test_weights_with_a_backup_come_back_as_they_were() -> None:
    state = released("weights")
    resume(state, keeps_weights=True)
    state.check_generate()


def test_an_update_that_leaves_names_out_counts_and_warns_once_of_what_they_hold(
    capsys: pytest.CaptureFixture[str],
) -> None:
    facts = EngineFacts(sidecar="unix:/nowhere")
    control = EngineControl(facts, Deaths(facts, "here"), None, acts=True)
    control.mark_updated(["model.rope"])
    assert capsys.readouterr().err == "", "nothing was lost"
    control.memory.mark_released(["weights"])
    control.memory.mark_resumed(["weights"], keeps_weights=False)
    control.mark_updated(["model.rope", "lm_*"])
    control.mark_updated(["model.rope", "lm_*"])
    said = capsys.readouterr().err
    assert said.count("left out by allow_missing (model.rope, lm_*) has undefined content") == 1
    control.memory.check_generate()
