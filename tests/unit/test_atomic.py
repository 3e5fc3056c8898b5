"""Atomic writes and locks, also on file systems without locks or that cannot flush a folder."""

import errno
import fcntl
import os
import stat

import pytest

from rsb_ffcv import InputError, atomic
from rsb_ffcv.training.checkpoint import Store


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(atomic, "_warned", set())


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_write_succeeds_if_the_folder_cannot_be_flushed(tmp_path, monkeypatch, capsys, number):
    plain = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    for content in (b"one", b"two"):
        with atomic.atomic_file(tmp_path / "file", "") as file:
            file.write(content)
        assert (tmp_path / "file").read_bytes() == content
    err = capsys.readouterr().err
    assert err.count("warning:") == 1 and f"{tmp_path}: this folder cannot be flushed" in err


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    store = Store(tmp_path, 1)
    store.lock()
    store.close()
    with open(tmp_path / "journal", "wb") as file:
        atomic.lock(file, tmp_path)
    err = capsys.readouterr().err
    assert err.count("warning:") == 1 and f"{tmp_path}: its file system has no locks" in err


def test_other_errors_of_a_lock_are_errors(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match="logging.folder=.*cannot be used"):
        Store(tmp_path, 1).lock()
