"""Clips are decoded before they are asked for, in one thread, up to a bound in number and bytes."""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")


class Prefetcher:
    """`make(items)` gives what each item is, or an exception; items are hashable, and what they are depends on nothing else.

    So it changes only when something is made, never what. At most `room` items that are ready wait to be taken.
    """

    def __init__(self, make: Callable[[list[Item]], list[Result | Exception]], room: int, at_once: int) -> None:
        self.make, self.room, self.at_once = make, room, at_once
        self.urgent: dict[Item, None] = {}  # asked for now
        self.coming: dict[Item, None] = {}  # announced
        self.making: list[Item] = []
        self.ready: dict[Item, Result | Exception] = {}
        self.failure: BaseException | None = None
        self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.work, name="prefetcher", daemon=True)
        self.thread.start()

    def announce(self, items: Sequence[Item]) -> None:
        """Announces the items that come next, after those announced before."""
        with self.changed:
            self.coming.update(dict.fromkeys(item for item in items if item not in self.ready and item not in self.making))
            self.changed.notify_all()

    def take(self, items: Sequence[Item]) -> list[Result]:
        """The items, waiting for what is not ready yet; an item's exception is raised here."""
        with self.changed:
            missing = dict.fromkeys(item for item in items if item not in self.ready and item not in self.making)
            if len(self.ready) >= self.room and all(item in missing and item not in self.coming for item in items):
                self.ready, self.coming = {}, {}  # nobody asks for what was announced: make room
            for item in missing:
                self.coming.pop(item, None)
            self.urgent.update(missing)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.failure or self.closed or all(item in self.ready for item in items))
            if self.failure is not None:
                raise self.failure
            if self.closed:
                raise RuntimeError("prefetcher was closed")
            found = {item: self.ready.pop(item) for item in dict.fromkeys(items)}
            self.changed.notify_all()
        for item in found.values():
            if isinstance(item, Exception):
                raise item
        return [found[item] for item in items]

    def close(self) -> None:
        """Ends the thread once it has finished its current items."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join()

    def next_batch(self) -> list[Item]:
        """What to make now; empty when there is nothing, or no room."""
        if self.urgent:
            return list(self.urgent)[:self.at_once]
        return list(self.coming)[:max(0, min(self.at_once, self.room - len(self.ready)))]

    def work(self) -> None:
        """What the thread runs."""
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.closed or self.next_batch())
                    if self.closed:
                        return
                    self.making = self.next_batch()
                    for item in self.making:
                        self.urgent.pop(item, None)
                        self.coming.pop(item, None)
                results = self.make(self.making)
                with self.changed:
                    self.ready.update(zip(self.making, results, strict=True))
                    self.making = []
                    self.changed.notify_all()
        except BaseException as error:  # whoever waits must hear of it
            with self.changed:
                self.failure = error
                self.changed.notify_all()
