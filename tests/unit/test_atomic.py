"""Atomic writes and locks, also on file systems without locks or that cannot flush a folder."""

import errno
import fcntl
import os
import stat

import pytest

from rsb_ffcv import InputError, atomic
from rsb_ffcv.atomic import atomic_file, atomic_folder
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
    for _ in range(2):
        with open(tmp_path / "journal", "wb") as file:
            atomic.lock(file, tmp_path)
    store = Store(tmp_path, 1)  # a run needs no locks
    store.lock()
    store.close()
    err = capsys.readouterr().err
    assert err.count("warning:") == 1 and f"{tmp_path}: its file system has no locks" in err


def test_other_errors_of_a_lock_are_errors(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match="logging.folder=.*cannot be used"):
        Store(tmp_path, 1).lock()


def test_folder_appears_complete_or_not_at_all(tmp_path):
    folder = tmp_path / "sub" / "new"
    with atomic_folder(folder, "choose another") as unfinished:
        (unfinished / "a").write_text("1")
        assert not folder.exists()
    assert (folder / "a").read_text() == "1"
    with (
        pytest.raises(InputError, match="new: exists already; choose another"),
        atomic_folder(folder, "choose another"),
    ):
        pass
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "b", "x") as unfinished:
        (unfinished / "c").mkdir()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["sub"]
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty", "x") as unfinished:
        (unfinished / "a").touch()
    assert list((tmp_path / "empty").iterdir()) == [tmp_path / "empty" / "a"]


def test_one_process_at_a_time_writes_a_folder(tmp_path):
    """The second one would otherwise put its half into the folder of the first."""
    folder = tmp_path / "new"
    with atomic_folder(folder, "choose another") as unfinished:
        (unfinished / "a").touch()
        with (
            pytest.raises(InputError, match="new: another process is writing it; choose another"),
            atomic_folder(folder, "choose another"),
        ):
            pass
        assert (unfinished / "a").exists()
    assert (folder / "a").exists() and [*tmp_path.iterdir()] == [folder]


def test_folder_of_a_killed_process_is_written_again(tmp_path):
    left = tmp_path / ".new.part"
    (left / "deep").mkdir(parents=True)
    (left / "old").touch()
    with atomic_folder(tmp_path / "new", "x") as unfinished:
        (unfinished / "a").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"] and not left.exists()


def test_file_of_a_link_is_replaced_and_a_device_is_not(tmp_path):
    (tmp_path / "link").symlink_to("target")
    with atomic_file(tmp_path / "link", "x") as file:
        file.write(b"1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"1"
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(InputError, match="pipe: is not a regular file; choose another"),
        atomic_file(tmp_path / "pipe", "choose another"),
    ):
        pass
    assert (tmp_path / "pipe").is_fifo()
