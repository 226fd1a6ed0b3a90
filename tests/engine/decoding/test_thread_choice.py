"""The number of threads follows the times that steps took."""

from engine.decoding.cpu.thread_choice import ThreadChoice


class _Machine:
    """Steps whose seconds depend on their threads."""

    def __init__(self) -> None:
        self.seconds = {1: 1.0, 2: 0.6}
        self.now = 0.0
        self.threads: list[int] = []

    def work(self, num_threads: int) -> None:
        self.threads.append(num_threads)
        self.now += self.seconds[num_threads]


def _threads(machine: _Machine, choice: ThreadChoice, steps: int) -> list[int]:
    for _ in range(steps):
        choice.run(machine.work, 2)
    return machine.threads[-steps:]


def test_the_faster_way_is_taken_and_the_other_one_seldom_tried() -> None:
    machine = _Machine()
    taken = _threads(machine, ThreadChoice(lambda: machine.now), 1000)
    assert taken[:2] == [1, 2]
    assert 5 <= taken[2:].count(1) <= 12  # after 50 s each


def test_one_thread_is_taken_while_the_others_come_late() -> None:
    machine = _Machine()
    choice = ThreadChoice(lambda: machine.now)
    machine.seconds[2] = 20.0  # others use the machine
    assert _threads(machine, choice, 900)[2:].count(2) == 0  # a trial would take as long as twenty steps
    machine.seconds[2] = 0.6  # they have left
    _threads(machine, choice, 5000)
    assert _threads(machine, choice, 300).count(1) <= 4
    machine.seconds[2] = 20.0  # and come back
    assert _threads(machine, choice, 100).count(2) <= 2


def test_a_lucky_step_of_a_slow_way_does_not_make_it_the_faster_one() -> None:
    machine = _Machine()
    choice = ThreadChoice(lambda: machine.now)
    machine.seconds[2] = 20.0
    _threads(machine, choice, 900)
    machine.seconds[2] = 0.6
    while _threads(machine, choice, 1) == [1]:
        pass
    assert _threads(machine, choice, 100) == [1] * 100


def test_a_single_thread_needs_no_choice() -> None:
    machine = _Machine()
    choice = ThreadChoice(lambda: machine.now)
    for _ in range(20):
        choice.run(machine.work, 1)
    assert machine.threads == [1] * 20
