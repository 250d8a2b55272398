# SPDX-License-Identifier: Apache-2.0
"""Who may do what with a path, from its owner and mode alone. Pure; ACLs and security modules are not looked at."""

from __future__ import annotations

from pathlib import Path

from ppec_agentd.doctor.snapshot import PathFacts, UserFacts

SEARCH = 0o1
READ_WRITE = 0o6


def may(user: UserFacts, path: PathFacts, bits: int) -> bool:
    """Whether the user has all of `bits` (of 0o7) by the one class of the mode that applies to it (path_resolution(7)).

    Root may everything.
    """
    if user.uid == 0:
        return True
    if user.uid == path.uid:
        granted = path.mode >> 6
    elif path.gid in user.gids:
        granted = path.mode >> 3
    else:
        granted = path.mode
    return granted & bits == bits


def first_closed(user: UserFacts, folder: Path, paths: dict[Path, PathFacts]) -> PathFacts | None:
    """The first folder on the way from the root to `folder`, itself included, that the user can't pass through.

    Folders that are not there (yet) are passed over.
    """
    for step in (*reversed(folder.parents), folder):
        facts = paths.get(step)
        if facts is not None and facts.kind == "folder" and not may(user, facts, SEARCH):
            return facts
    return None
