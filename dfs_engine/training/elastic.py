"""Elastic restarts: where a process died, torchrun starts them all again, and the run goes on by itself.

torchrun's agent outlives the processes, and serves the store in which they meet. There a launch keeps the folders that
its runs have begun in. A run folder that is not among them is another launch's: that one goes on only when asked to.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from torch import distributed

from dfs_engine.checks import one_line

_AGENT = "TORCHELASTIC_USE_AGENT_STORE"  # set by torchrun, and by `accelerate launch`, which calls it


def max_restarts() -> int:
    """How often torchrun may start the processes of this run again; 0 without torchrun."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


def check_can_restart(run_dir: Path | None) -> None:
    """Raises ValueError where restarted processes could not find the run again."""
    if run_dir is None and max_restarts() > 0:
        raise ValueError(
            f"run_dir: expected a folder with torchrun's --max-restarts={max_restarts()}, got none: its default is new "
            "after each restart, so that the run would begin again. Add --run_dir FOLDER."
        )


def has_begun(run_dir: Path) -> bool:
    """Whether processes that torchrun started before these began the run in `run_dir`; False without torchrun."""
    store = _agents_store()
    return store is not None and store.check([_key(run_dir)])


def note_begin(run_dir: Path) -> None:
    """Says to processes that torchrun may start after these that the run in `run_dir` is theirs to go on with."""
    store = _agents_store()
    if store is not None:
        store.set(_key(run_dir), "begun")


def join_processes() -> None:
    """Makes torch's process group, where torchrun started processes of one machine again.

    torch's own way (2.15) leaves the addresses of the dead in the agent's store, and who is quick calls them there.
    Agents of several machines count restarts apart, so there it stays torch's way.
    """
    store = _agents_store()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    on_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if store is None or attempt == "0" or not on_one_machine or distributed.is_initialized():
        return
    rank, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = distributed.PrefixStore(f"attempt {attempt}", store)
    distributed.init_process_group(store=store, rank=rank, world_size=num_processes)


@contextlib.contextmanager
def peer_deaths() -> Iterator[None]:
    """Raises ConnectionError for what torch raises where a peer died; gloo has no class of its own for it."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, distributed.DistError) or "/gloo/" in str(error)):
            raise
        remedy = "torchrun starts" if max_restarts() else "torchrun --max-restarts 3 would start"
        reason = one_line(error)
        raise ConnectionError(
            f"expected every process of the run to live, but one is out of reach: {reason}. {remedy} all again."
        ) from error


def _agents_store() -> distributed.Store | None:
    if os.environ.get(_AGENT) != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(address, port, is_master=False, timeout=timedelta(minutes=5))
    return distributed.PrefixStore("dfs_engine", store)


def _key(run_dir: Path) -> str:
    return str(run_dir.absolute())
