"""Work that one server at a time does for all that share a database, as rows that its doer renews.

A turn saves work, it protects nothing: what is done in it must be right even when two do it at once, as they may when
one hangs for longer than its turn.
"""

from sqlalchemy import Connection, insert, select, update

from hueshift.server.store.database import lock, now
from hueshift.server.store.tables import turns


def take_turn(connection: Connection, name: str, owner: str, seconds: float, rest: float = 0.0) -> bool:
    """Take or renew a turn for so many seconds, in a writing transaction; False if another has it.

    False too if somebody ended a round less than `rest` seconds ago and `owner` has none begun.
    """
    lock(connection, f"turn/{name}")
    time = now(connection)
    row = connection.execute(select(turns).where(turns.c.name == name)).one_or_none()
    if row is None:
        connection.execute(insert(turns).values(name=name, owner=owner, expires=time + seconds))
        return True
    held = row.expires > time
    if held and row.owner != owner:
        return False
    if not held and row.done is not None and time - row.done < rest:
        return False
    connection.execute(update(turns).where(turns.c.name == name).values(owner=owner, expires=time + seconds))
    return True


def end_turn(connection: Connection, name: str, owner: str) -> None:
    """Give a turn back, its round done. Does nothing if another has taken it."""
    mine = (turns.c.name == name) & (turns.c.owner == owner)
    time = now(connection)
    connection.execute(update(turns).where(mine).values(expires=time, done=time))
