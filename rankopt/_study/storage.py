"""Where studies live: opening storages by URL, and giving up the trials of workers that died."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sqlite3
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rankopt._study.sqlite import (
    file_url,
    holds_studies,
    path_in,
    read_only_url,
    serialise,
    writable,
)
from rankopt.errors import MissingDependency, RankoptError, StudyError

if TYPE_CHECKING:
    import optuna

__all__ = [
    "DEFAULT_STORAGE",
    "HEARTBEAT_SECONDS",
    "LOST",
    "MAKE_ONE",
    "Leases",
    "close_storage",
    "open_storage",
    "retry",
    "shown",
    "storage_errors",
    "worker_name",
]

DEFAULT_STORAGE: Final = "rankopt-study.db"
# A worker that has not been heard of for this many heartbeats is taken for dead.
GRACE_HEARTBEATS: Final = 3
HEARTBEAT_SECONDS: Final = 20
# How long to wait for another process's transaction on one SQLite file.
SQLITE_SECONDS: Final = 60
MAX_RETRIES: Final = 3
MAKE_ONE: Final = "make one with rankopt.study(...) or `rankopt study create`"
# How many times as long a lease of another host lasts by the clock, which may be another one.
CLOCKS_APART: Final = 10
LEASE: Final = "lease"
LOST: Final = "lost"  # the numbers of the trials that held a configuration when workers died
DEATHS: Final = "deaths"  # how many of them died, and were not interrupted by hand
WORKER: Final = "worker"


def worker_name() -> str:
    """Host, process and a random part, so that no two workers ever share it."""
    return f"{platform.node()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"


def open_storage(spec: Any, *, heartbeat: int = HEARTBEAT_SECONDS, create: bool = True) -> Any:
    """An Optuna storage.

    Args:
        spec: A path or ``sqlite:///PATH`` (SQLite), a path ending in ``.journal`` or
            ``journal:///PATH`` (journal file), ``grpc://HOST:PORT``, any URL SQLAlchemy
            knows (``postgresql+psycopg://…``), an Optuna storage, or None (memory).
        heartbeat: Seconds between a database worker's signs of life.
        create: Whether to make a file that is not there.

    Raises:
        StudyError: The storage cannot be reached, is not there or is not Optuna's.
        MissingDependency: The database's driver is not installed.
    """
    import optuna

    if isinstance(heartbeat, bool) or not isinstance(heartbeat, int) or heartbeat < 1:
        raise StudyError(f"heartbeat={heartbeat!r}: expected whole seconds, at least 1")
    if spec is None:
        return optuna.storages.InMemoryStorage()
    if isinstance(spec, optuna.storages.BaseStorage):
        return spec
    if not isinstance(spec, (str, os.PathLike)):
        raise StudyError(f"storage={spec!r}: expected a path, a URL or an Optuna storage")
    text = os.fspath(spec)
    local = _local_path(text)
    if not create and local is not None and not Path(local).exists():
        raise StudyError(f"there is no study at {text}; {MAKE_ONE}")
    with storage_errors(shown(text)), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if text.startswith("journal:///") or ("://" not in text and text.endswith(".journal")):
            return _journal(text.removeprefix("journal:///"))
        if text.startswith("grpc://"):
            return _grpc(text)
        if local is not None:
            return _sqlite(text, local, heartbeat, create=create)
        return _database(text if "://" in text else f"sqlite:///{text}", heartbeat)


def _sqlite(text: str, path: str, heartbeat: int, *, create: bool) -> Any:
    """A file of SQLite; one that cannot be written is opened to be read."""
    if not Path(path).absolute().parent.is_dir():
        raise StudyError(f"storage {text}: its folder does not exist; create it first")
    there = Path(path).exists()
    if there and not create and not holds_studies(path):
        raise StudyError(f"there is no study at {text}, whose tables are others; {MAKE_ONE}")
    if there and not writable(path):
        return _database(read_only_url(path), heartbeat, serial=False)
    return _database(text if "://" in text else file_url(path), heartbeat)


def _database(url: str, heartbeat: int, *, serial: bool = True) -> Any:
    import optuna

    sqlite = url.startswith("sqlite")
    storage = optuna.storages.RDBStorage(
        url,
        engine_kwargs={"connect_args": {"timeout": SQLITE_SECONDS}} if sqlite else {},
        heartbeat_interval=heartbeat,
        grace_period=GRACE_HEARTBEATS * heartbeat,
        heartbeat_stale_trial_callback=retry,
    )
    if sqlite and serial:
        serialise(storage.engine)
    # Nobody has to close a study: its connections end with the last who knows the storage.
    weakref.finalize(storage, _disconnect, storage.scoped_session, storage.engine)
    return storage


def _disconnect(session: Any, engine: Any) -> None:
    session.remove()
    engine.dispose()


def close_storage(storage: Any) -> None:
    """Give back the connections of a database; nothing for other storages."""
    backend = getattr(storage, "_backend", storage)  # Optuna wraps databases in a cache
    if hasattr(backend, "engine"):
        _disconnect(backend.scoped_session, backend.engine)


def shown(spec: Any) -> str:
    """A storage in words, without its password.

    Example:
        >>> shown("postgresql://me:secret@host/db")
        'postgresql://me:***@host/db'
    """
    if spec is None:
        return "in memory"
    if not isinstance(spec, (str, os.PathLike)):
        return type(spec).__name__
    return re.sub(r"(://[^/:@]+):[^@/]*@", r"\1:***@", os.fspath(spec))


def _local_path(text: str) -> str | None:
    """The file behind a storage; None for servers, and for SQLite in memory."""
    if "://" not in text:
        path = text
    elif text.startswith("journal:///"):
        path = text.removeprefix("journal:///")
    elif re.match(r"sqlite(\+\w+)?:///", text):
        path = path_in(text)
    else:
        return None
    return None if not path or ":memory:" in path or path.startswith("file:") else path


def _journal(path: str) -> Any:
    from optuna.storages import JournalStorage

    from rankopt._study.journal import Journal

    target = Path(path).absolute()  # Optuna's lock is a link to it, which must lead somewhere
    if not target.parent.is_dir():
        raise StudyError(f"storage {path}: its folder does not exist; create it first")
    return JournalStorage(Journal(str(target)))


def _grpc(url: str) -> Any:
    from optuna.storages import GrpcStorageProxy

    host, _, port = url.removeprefix("grpc://").rstrip("/").rpartition(":")
    if not host or not port.isdigit():
        raise StudyError(f"storage {url}: expected grpc://HOST:PORT")
    storage = GrpcStorageProxy(host=host, port=int(port))
    storage.wait_server_ready(timeout=10)
    return storage


@contextlib.contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Turn what storages raise into a sentence; nothing finished is lost by any of them."""
    import optuna

    try:
        yield
    except (RankoptError, optuna.exceptions.UpdateFinishedTrialError):
        raise
    except (ImportError, ModuleNotFoundError) as error:
        raise MissingDependency(
            f"storage {where}: {error}; install the driver, such as `rankopt[postgresql]` "
            "for postgresql+psycopg:// or `rankopt[grpc]` for grpc://"
        ) from error
    except Exception as error:
        found = _of_storage(error)
        if found is None:
            raise
        cause = found.__cause__ or found
        text = str(getattr(cause, "orig", None) or cause).strip().splitlines()
        reason = text[0] if text else f"no answer ({type(cause).__name__})"
        raise StudyError(
            f"storage {where} fails: {reason}; trials that "
            "finished are kept: put it right (reachable, writable, space left) and run again"
        ) from error


def _of_storage(error: BaseException) -> BaseException | None:
    """The database's, file's or connection's exception behind an exception, if there is one.

    Optuna raises others, assertions among them, while it handles one.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    kinds = (SQLAlchemyError, optuna.exceptions.StorageInternalError, sqlite3.Error, OSError)
    known: BaseException | None = error
    while known is not None:
        if isinstance(known, kinds) or type(known).__module__.startswith("grpc"):
            return known
        known = known.__cause__ or known.__context__
    return None


def retry(
    study: optuna.Study, trial: optuna.trial.FrozenTrial, *, interrupted: bool = False
) -> None:
    """Queue the configuration of a trial whose worker died or was interrupted once more.

    The trial that was given up stays in the study as failed and names no error of its
    own; it is not counted. A configuration that `MAX_RETRIES` workers died of is left
    alone, whereas it may be interrupted by hand any number of times.
    """
    import optuna

    history = [*trial.user_attrs.get(LOST, []), trial.number]
    deaths = int(trial.user_attrs.get(DEATHS, 0)) + (not interrupted)
    if deaths > MAX_RETRIES:
        return
    kept = {k: v for k, v in trial.user_attrs.items() if k in ("plan", "warm")}
    study.add_trial(
        optuna.create_trial(
            state=optuna.trial.TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={**kept, LOST: history, DEATHS: deaths},
            system_attrs={k: v for k, v in trial.system_attrs.items() if k == "fixed_params"},
        )
    )


class Leases:
    """Signs of life for storages without heartbeats, and what both leave open.

    A worker writes its name and the time into the trial it runs; any worker gives up
    trials whose lease has run out: by the clock if the lease was written on the same host,
    else if it was not seen to change for as long, as clocks of hosts differ. Trials that
    were claimed but whose worker died before its first sign of life are given up likewise,
    in databases too.

    Args:
        study: The Optuna study.
        heartbeat: Seconds between renewals; a lease lasts three of them.
    """

    def __init__(self, study: optuna.Study, heartbeat: int) -> None:
        import optuna

        self.study, self.heartbeat = study, heartbeat
        storage = study._storage
        self._memory = isinstance(storage, optuna.storages.InMemoryStorage)
        self._beats = optuna.storages._heartbeat.is_heartbeat_enabled(storage)
        # Trial number to its last lease and when that was first seen, by this process's clock.
        self._seen: dict[int, tuple[float, float]] = {}

    @contextlib.contextmanager
    def held(self, trial: optuna.Trial, worker: str) -> Iterator[None]:
        """Hold the lease of a running trial until the block ends."""
        import optuna

        if self._memory:
            yield
            return
        if self._beats:
            # Optuna's thread keeps the database's heartbeat. The first beat is recorded here:
            # a worker killed before that thread got to it would hold its trial for ever.
            self.study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
        trial.set_user_attr(WORKER, worker)
        if self._beats:
            yield
            return
        stop = threading.Event()
        trial.set_user_attr(LEASE, time.time())

        def renew() -> None:
            while not stop.wait(self.heartbeat):
                try:
                    trial.set_user_attr(LEASE, time.time())
                except optuna.exceptions.UpdateFinishedTrialError:  # given up by another worker
                    return
                except Exception:  # the storage does not answer now; it may at the next beat
                    continue

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def reap(self) -> int:
        """Give up the trials of dead workers and queue them again; how many."""
        import optuna

        if self._memory:
            return 0
        if self._beats:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                optuna.storages.fail_stale_trials(self.study)
        states = (optuna.trial.TrialState.RUNNING,)
        return sum(
            self.give_up(trial)
            for trial in self.study.get_trials(deepcopy=False, states=states)
            if self._expired(trial)
        )

    def _expired(self, trial: optuna.trial.FrozenTrial) -> bool:
        patience = GRACE_HEARTBEATS * self.heartbeat
        if self._beats and WORKER in trial.user_attrs:
            return False  # the database's heartbeat decides
        lease = trial.user_attrs.get(LEASE)
        if lease is not None:
            if str(trial.user_attrs.get(WORKER)).startswith(f"{platform.node()}:"):
                return time.time() - float(lease) > patience
            known = self._seen.get(trial.number)
            if known is None or known[0] != lease:
                known = self._seen[trial.number] = float(lease), time.monotonic()
            unchanged = time.monotonic() - known[1]
            return max(unchanged, (time.time() - float(lease)) / CLOCKS_APART) > patience
        started = trial.datetime_start
        return started is not None and (datetime.now() - started).total_seconds() > patience

    def give_up(self, trial: optuna.trial.FrozenTrial, *, interrupted: bool = False) -> bool:
        """End a running trial and queue it again; False if it had ended."""
        import optuna

        try:
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            return False  # another worker was faster, or it finished after all
        retry(self.study, trial, interrupted=interrupted)
        return True
