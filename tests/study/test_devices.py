from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
import torch

from rankopt import claim_device
from rankopt._study.devices import Device, timing_lock
from rankopt._study.storage import storage_errors
from rankopt.errors import RankoptError, RankoptWarning

FAKES = [Device("cuda:0", "GPU-a"), Device("cuda:1", "GPU-b")]


def test_claims_are_exclusive_and_end():
    with claim_device(devices=FAKES) as first:
        with claim_device(devices=FAKES) as second:
            assert {str(first), str(second)} == {"cuda:0", "cuda:1"}
            with (
                pytest.raises(RankoptError, match="cuda:0, cuda:1 are held by other workers"),
                claim_device(devices=FAKES),
            ):
                pass
            with claim_device(devices=FAKES, share=True) as shared:
                assert str(shared) in {"cuda:0", "cuda:1"}
        with claim_device("cuda:1", devices=FAKES) as again:  # free once more
            assert again == second
        with (
            pytest.raises(RankoptError, match="cuda:0 is held"),
            claim_device("cuda", devices=FAKES),
        ):
            pass


def test_a_device_is_known_by_its_identity():
    """CUDA_VISIBLE_DEVICES renames devices; the second one may be another's first."""
    renamed = [Device("cuda:0", "GPU-b")]
    with (
        claim_device("cuda:1", devices=FAKES),
        pytest.raises(RankoptError, match="cuda:0 is held"),
        claim_device(devices=renamed),
    ):
        pass


def test_the_cpu_is_for_everyone():
    with claim_device(devices=[]) as one, claim_device("cpu", devices=FAKES) as two:
        assert one == two == torch.device("cpu")
    with (
        pytest.raises(RankoptError, match="'cuda:7': this machine has cuda:0, cuda:1"),
        claim_device("cuda:7", devices=FAKES),
    ):
        pass
    with pytest.raises(RankoptError, match="has no CUDA device"), claim_device("cuda", devices=[]):
        pass
    with pytest.raises(RankoptError, match="threads=0"), claim_device("cpu", threads=0):
        pass


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no way to pin threads here")
def test_threads_get_cores_of_their_own():
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(len(cores) + 1)
    try:
        with claim_device("cpu", threads=1):
            assert torch.get_num_threads() == 1
            mine = os.sched_getaffinity(0)
            assert len(mine) == 1
            # All of this process's cores are taken: a second claim is not pinned further.
            with claim_device("cpu", threads=2):
                assert torch.get_num_threads() == 2
                assert os.sched_getaffinity(0) == mine
        assert torch.get_num_threads() == len(cores) + 1
        assert os.sched_getaffinity(0) == cores
    finally:
        torch.set_num_threads(threads)


def hold(pipe):
    with claim_device(devices=FAKES) as device:
        pipe.send(str(device))
        pipe.recv()


def worker():
    processes = multiprocessing.get_context("fork")
    ours, theirs = processes.Pipe()
    process = processes.Process(target=hold, args=(theirs,))
    process.start()
    return process, ours


def test_a_killed_worker_frees_its_device():
    workers = [worker() for _ in FAKES]
    try:
        assert {pipe.recv() for _, pipe in workers} == {"cuda:0", "cuda:1"}
        with pytest.raises(RankoptError, match="held by other"), claim_device(devices=FAKES):
            pass
        os.kill(workers[0][0].pid, signal.SIGKILL)
        workers[0][0].join(60)
        with claim_device(devices=FAKES) as free:
            assert free.type == "cuda"
    finally:
        for process, _ in workers:
            process.kill()
            process.join(60)


def test_no_folder_for_claims(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RANKOPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(RankoptError, match="set RANKOPT_CACHE"), claim_device(devices=FAKES):
        pass
    with pytest.warns(RankoptWarning, match=r"set RANKOPT_CACHE .*; models are timed without"):
        turn = timing_lock()
    with turn:
        pass


def test_errors_of_rankopt_are_not_the_storages():
    """Though the system's error is behind them, as where the cache cannot be written."""
    with pytest.raises(RankoptError, match="^no folder for the cache$"), storage_errors("s.db"):
        raise RankoptError("no folder for the cache") from PermissionError("no")
