"""Who leaves a full house of clients for a newcomer."""

from __future__ import annotations

import pytest

from vmm.sockets import Peer, leaver

ROOT, ALICE, BOB = 0, 1000, 1001


@pytest.mark.parametrize(
    ("there", "newcomer", "leaves"),
    [
        # (uid, process) of those that are there, oldest first, and the index of who leaves
        ([(ALICE, 1), (ALICE, 1), (ALICE, 1)], (BOB, 2), 0),
        ([(ROOT, 9), (ALICE, 1), (ALICE, 2)], (BOB, 3), 1),
        ([(ROOT, 9), (ALICE, 1), (ALICE, 2)], (ALICE, 3), None),
        ([(ALICE, 1), (ALICE, 2), (ALICE, 2)], (ALICE, 3), 1),
        ([(ALICE, 2), (ALICE, 2), (BOB, 1)], (ALICE, 2), None),
        ([(ALICE, 1), (BOB, 2), (ROOT, 3)], (BOB, 4), None),
        ([(ALICE, 1), (ALICE, 2), (BOB, 3), (BOB, 3), (BOB, 3)], (BOB, 3), None),
        ([(ALICE, 1), (ALICE, 2), (BOB, 3), (BOB, 3), (BOB, 3)], (BOB, 4), 2),
        ([(ALICE, 1), (ALICE, 2), (BOB, 3), (BOB, 3), (BOB, 3)], (ALICE, 4), 2),
    ],
)
def test_who_makes_room(
    there: list[tuple[int, int]], newcomer: tuple[int, int], leaves: int | None
) -> None:
    """Of the user who has most places, or of the process; never for one of the same."""
    peers = {index: Peer(uid, uid, pid, ()) for index, (uid, pid) in enumerate(there)}
    uid, pid = newcomer
    assert leaver(peers, Peer(uid, uid, pid, ())) == leaves
