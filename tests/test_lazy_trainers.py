"""transformers' own Trainer in two processes: a lazy head takes the dense head's steps."""

import lazy_trainers

# What does not hold yet: it must fail here until it is mended, and then be taken off this list.
OPEN = {"nothing supervised at all"}


def test_trainer_in_two_processes_takes_the_same_steps() -> None:
    wrong = lazy_trainers.run(2)
    assert set(wrong) == OPEN, "\n\n".join(f"{name}:\n{text}" for name, text in wrong.items())
