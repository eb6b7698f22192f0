"""Ctrl-C and SIGTERM while a run trains: the first one stops it after the step, the second one at once."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run.

    Args:
        signum: the signal.
        message: where the run stands, and how to go on with it.
    """

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """Whether the run was asked to stop, and by which signal.

    Attributes:
        received: the signal that this process got while `caught`; None as long as there was none.
    """

    def __init__(self, accelerator: "Accelerator") -> None:
        self.received: int | None = None
        self._accelerator = accelerator

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catches the signals within the block, if it runs in the main thread: Python has no others there."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as `nohup` and a shell's `&` ask for
                    before[signum] = signal.signal(signum, self._receive)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
            self.received = None

    def agreed(self) -> int | None:
        """The signal that any process got; every process calls it at the same place and gets the same answer."""
        if self._accelerator.num_processes == 1:
            return self.received
        mine = torch.tensor([self.received or 0], device=self._accelerator.device)
        return int(self._accelerator.gather(mine).max()) or None

    def _receive(self, signum: int, _frame: Any) -> None:
        if self.received is not None:
            raise Interrupted(signum)
        self.received = signum
        if self._accelerator.is_main_process:
            name = signal.Signals(signum).name
            logger.warning("%s: saving after this step, then stopping. Once more stops at once, unsaved.", name)
