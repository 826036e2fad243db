"""transformers' own Trainer in two processes: a lazy head takes the dense head's steps."""

import lazy_trainers


def test_trainer_in_two_processes_takes_the_same_steps() -> None:
    wrong = lazy_trainers.run(2)
    assert not wrong, "\n\n".join(f"{name}:\n{text}" for name, text in wrong.items())
