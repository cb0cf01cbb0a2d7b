"""A device process that another one can take the place of, at any instant.

After each register write and setting, and whenever the device says so, it writes down what it is
(`journal`), before anybody hears of it. Where its queues are lies in the in-flight areas. The VM
process knows which register writes are not in the journal, and makes those again.

    new process ─► state from the journal, nothing is served ─► register writes made again
                ─► the first read: from there on it is what the killed one was
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from config.errors import GuestError
from devices.journal import Journal
from devices.process import Process
from devices.spec import BUSY, Block, Legacy
from devices.transport import DRIVER_OK, ISR_CONFIG, ISR_QUEUE
from devices.viodev import CONFIG_CHANGE, MsgType

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.device import Device
    from devices.process import Order
    from devices.viodev import Channel, Imsg, ViodevMsg


_KICKS: Final = (Block.NOTIFY, Block.LEGACY + Legacy.QUEUE_NOTIFY)  # change no state


class LastingProcess(Process):
    """A process with a journal; `resumes` among its settings says that it is not the first."""

    def __init__(
        self,
        order: Order,
        fds: dict[str, int],
        create: Callable[..., Device],
        async_: Channel,
        sync: Channel,
    ) -> None:
        """See Process; `journal` is one more of its descriptors."""
        self._journal = Journal(fds.pop("journal"))
        self._handled, self._left = 0, dict[str, Any]()
        self._resumes = bool(order.settings.get("resumes"))
        self._stays_paused = bool(order.settings.get("paused"))
        super().__init__(order, fds, create, async_, sync)

    def begin(self) -> None:
        """See Process; and begin the journal, or know what is in it."""
        found = self._journal.read() if self._resumes else None
        if found is not None:
            self._left, self._handled = found
            self._device.recall(self._left["device"])
        super().begin()
        if not self._resumes:
            self.checkpoint()

    def _resume(self) -> None:
        if not self._resumes:
            return
        self._pause()
        self._device.totals[BUSY] = 0  # a predecessor may have died waiting
        if self._left:
            try:
                self._registers.load(self._left)
            except GuestError as err:
                self.transport.fail(err)
        while self._answer_one().type != MsgType.IO_READ:
            pass
        if self.transport.status & DRIVER_OK:
            # Nobody knows whether the driver has heard of what was done last.
            if self.transport.live:
                self.transport.isr |= ISR_QUEUE
                self.interrupt(0)
            if self.transport.has_news:
                self.transport.isr |= ISR_CONFIG
                self.interrupt(CONFIG_CHANGE)
        if not self._stays_paused:
            self._go_on(self._device.take_over)

    def _answer(self, message: ViodevMsg) -> None:
        try:
            super()._answer(message)
        except GuestError as err:
            self.transport.fail(err)
        if message.type == MsgType.IO_WRITE:
            self._handled += 1
            if message.reg in _KICKS:
                self._journal.count(self._handled)
            else:
                self.checkpoint()

    def _set(self, imsg: Imsg) -> dict[str, Any]:
        answer = super()._set(imsg)
        self.checkpoint()
        return answer

    def checkpoint(self) -> None:
        """Write down what is so now: before anybody hears of it."""
        self._journal.write(self._registers.save(killed=True), self._handled)
