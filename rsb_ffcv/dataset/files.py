"""Access to the bytes of a source: a local folder or anything that fsspec reaches, read by name and
range; and the members of tar files.

Names are relative to the root that the user gave. Nothing outside the root is read: names that are
absolute or contain `..` are rejected, and so are symbolic links that leave the root, unless
follow_links is set.
"""

import errno
import io
import os
import posixpath
import stat
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, NoReturn, TypeVar

from rsb_ffcv import InputError, first_line
from rsb_ffcv.dataset.picture import BadPicture

Result = TypeVar("Result")

MAX_BYTES = 1 << 30  # upper limit for one picture file
# A remote read is tried TRIES times; the first pause is PAUSE seconds, and it doubles each time
TRIES, PAUSE = 4, 1.0
# Errors of the file system, not of the requested file
_FILE_SYSTEM_ERRORS = {
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
}


def is_url(path: str) -> bool:
    """Whether `path` is an fsspec URL, also a chained one (zip://...::...)."""
    return "://" in path or "::" in path


def open_root(data_dir: str, follow_links: bool = False) -> tuple["Local | Remote", str]:
    """Returns (root, name). If `data_dir` is a folder, it is the root, and name is empty. Otherwise
    name is a file in the root, or a pattern of files."""
    data_dir = data_dir.removeprefix("file://")
    root = Remote(data_dir) if is_url(data_dir) else Local(data_dir, follow_links)
    if root.is_folder(""):
        return root, ""
    parent, _, name = data_dir.rpartition("/")
    if any(mark in data_dir for mark in "*?[{"):  # the folder above the first pattern
        parent = posixpath.dirname(
            data_dir[: min(data_dir.find(mark) for mark in "*?[{" if mark in data_dir)]
        )
        name = data_dir[len(parent) :].lstrip("/")
    if not is_url(data_dir):
        parent = parent or ("/" if data_dir.startswith("/") else ".")
    return (Remote(parent) if is_url(data_dir) else Local(parent, follow_links)), name


def inside(name: str) -> str:
    """The relative path `name` without `.` parts. Raises ValueError if it could leave its
    folder."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name or is_url(name) or not parts:
        raise ValueError(f"'{name[:200]}' is not a path inside its folder")
    return "/".join(parts)


class Local:
    """A folder of this machine. follow_links: read symbolic links that leave it."""

    def __init__(self, root: str, follow_links: bool) -> None:
        self.root, self.follow_links = os.path.abspath(root), follow_links
        self._real = os.path.realpath(root)
        # folder -> whether it is below the root after links are resolved
        self._within: dict[str, bool] = {}

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def is_folder(self, name: str) -> bool:
        return os.path.isdir(self.path(name))

    def is_file(self, name: str) -> bool:
        return os.path.isfile(self.path(name))

    def folders(self, name: str) -> list[str]:
        """The names of the folders directly in a folder, sorted."""
        return sorted(entry.name for entry in os.scandir(self.path(name)) if entry.is_dir())

    def list(self, name: str = "") -> list[str]:
        """All files below a folder, sorted. Links to folders are followed, each folder once. Raises
        InputError if a folder cannot be listed."""

        def refuse(error: OSError) -> NoReturn:
            raise InputError(
                f"{error.filename}: cannot be listed ({error.strerror}); correct its permissions"
            )

        found: list[str] = []
        seen: set[str] = set()
        for where, folders, files in os.walk(self.path(name), onerror=refuse, followlinks=True):
            real = os.path.realpath(where)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            below = os.path.relpath(where, self.root)
            found += files if below == "." else [f"{below}/{file}" for file in files]
        return sorted(found)

    def stamp(self, name: str) -> tuple:
        """Size and modification time of the file. It changes when the file changes."""
        try:
            known = os.stat(self.path(name))
        except OSError:  # read() reports the reason
            return ()
        return known.st_size, known.st_mtime_ns

    def read(self, name: str, start: int = 0, length: int = -1) -> bytes:
        """`length` bytes of a file from byte `start` on; length -1: all.

        Raises BadPicture if the file cannot be read or is outside the root, InputError if the file
        system cannot be reached.
        """
        try:
            file = self._open(self.path(name))
            try:
                known = os.fstat(file)
                if not stat.S_ISREG(known.st_mode):
                    raise BadPicture(f"{self.path(name)}: not a regular file; replace or remove it")
                length = known.st_size - start if length < 0 else length
                _check_length(self.path(name), length)
                parts = []
                while length > 0 and (part := os.pread(file, length, start)):
                    parts.append(part)
                    start, length = start + len(part), length - len(part)
            finally:
                os.close(file)
        except OSError as error:
            # The whole folder is missing
            folder_is_missing = error.errno == errno.ENOENT and not os.path.isdir(
                os.path.dirname(self.path(name))
            )
            if folder_is_missing or error.errno in _FILE_SYSTEM_ERRORS:
                raise InputError(
                    f"{self.path(name)}: cannot be reached ({error.strerror}); when it can, run "
                    f"the same command again to continue"
                ) from error
            raise BadPicture(
                f"{self.path(name)}: cannot be read ({error.strerror}); replace or remove it"
            ) from error
        if length > 0:
            raise BadPicture(f"{self.path(name)}: ends {length} bytes early; replace or remove it")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _open(self, path: str) -> int:
        if not self.follow_links:
            folder = os.path.dirname(path)
            if folder not in self._within:
                self._within[folder] = self._is_below(folder)
            if not self._within[folder] or os.path.islink(path) and not self._is_below(path):
                raise BadPicture(
                    f"{path}: a link that leaves {self.root}; copy its target, or give "
                    f"`follow_links`=1"
                )
        # O_NONBLOCK: opening a named pipe must not block
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def _is_below(self, path: str) -> bool:
        return os.path.commonpath([self._real, os.path.realpath(path)]) == self._real

    def open(self, name: str) -> IO[bytes]:
        """Opens a seekable binary file."""
        return os.fdopen(self._open(self.path(name)), "rb")


class Remote:
    """A folder that fsspec reaches by its URL: s3://, gs://, http://, memory://, zip://...::..."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self.fs, root = fsspec.core.url_to_fs(url)
        except Exception as error:  # each file system of fsspec raises its own types
            raise InputError(
                f"`data_dir`={url}: {first_line(error)}; install the package that the message "
                f"names, or correct the URL"
            ) from error
        self.url, self.root = url.rstrip("/"), root.rstrip("/")

    def path(self, name: str) -> str:
        """The name to show in messages."""
        return f"{self.url}/{name}" if name else self.url

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _retry(self, name: str, request: Callable[[], Result]) -> Result:
        """Returns request(). If the network fails, it is retried after a pause.

        Raises BadPicture if the file is missing, InputError if permission is denied or the last try
        fails.
        """
        for attempt in range(TRIES):
            try:
                return request()
            except FileNotFoundError as error:
                raise BadPicture(f"{self.path(name)}: is missing; replace or remove it") from error
            except PermissionError as error:
                raise InputError(
                    f"{self.path(name)}: permission denied ({first_line(error)}); correct its "
                    f"permissions or your credentials, and run the same command again to continue"
                ) from error
            except Exception as error:  # each file system of fsspec raises its own types
                if attempt == TRIES - 1:
                    raise InputError(
                        f"{self.path(name)}: cannot be reached ({type(error).__name__}: "
                        f"{first_line(error)}); when it can, run the same command again to "
                        f"continue"
                    ) from error
                time.sleep(PAUSE * 2**attempt)
        raise AssertionError("the last try returns or raises")

    def is_folder(self, name: str) -> bool:
        return self._retry(name, lambda: self.fs.isdir(self._at(name)))

    def is_file(self, name: str) -> bool:
        return self._retry(name, lambda: self.fs.isfile(self._at(name)))

    def folders(self, name: str) -> list[str]:
        """As Local.folders. Raises InputError if the network fails."""
        entries = self._retry(name, lambda: self.fs.ls(self._at(name), detail=True))
        return sorted(
            entry["name"].rstrip("/").rpartition("/")[2]
            for entry in entries
            if entry["type"] == "directory"
        )

    def list(self, name: str = "") -> list[str]:
        """As Local.list. Raises InputError if the network fails."""
        found = self._retry(name, lambda: self.fs.find(self._at(name)))
        below = f"{self.root}/"
        # startswith: a web page may link to other sites
        return sorted(path[len(below) :] for path in found if path.startswith(below))

    def stamp(self, name: str) -> tuple:
        """Empty: requesting the times of a million files would take too long."""
        return ()

    def read(self, name: str, start: int = 0, length: int = -1) -> bytes:
        """As Local.read. Raises InputError if the network fails."""
        if length < 0:
            return self._retry(name, lambda: self.fs.cat_file(self._at(name)))
        _check_length(self.path(name), length)
        part = self._retry(
            name, lambda: self.fs.cat_file(self._at(name), start=start, end=start + length)
        )
        if len(part) > length:
            raise InputError(
                f"{self.path(name)}: its server sends whole files when a range is requested; "
                f"download it first"
            )
        if len(part) < length:
            raise BadPicture(
                f"{self.path(name)}: ends {length - len(part)} bytes early; replace or remove it"
            )
        return part

    def open(self, name: str) -> IO[bytes]:
        """As Local.open. Raises InputError if the network fails."""
        return self._retry(name, lambda: self.fs.open(self._at(name), "rb", block_size=1 << 20))


Files = Local | Remote


def _check_length(path: str, length: int) -> None:
    if length > MAX_BYTES:
        raise BadPicture(
            f"{path}: {length} bytes are more than the limit for a picture ({MAX_BYTES}); "
            f"replace or remove it"
        )


def read_text(files: Files, name: str) -> str:
    """The text of a UTF-8 file. Raises InputError if it is not UTF-8."""
    try:
        return files.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{files.path(name)}: not UTF-8 text ({first_line(error)}); convert it"
        ) from error


class _Window(io.RawIOBase):
    """A file object over `length` bytes of a seekable file, from byte `start` on."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.at)
        part = self.file.read(max(0, min(len(buffer), self.length - self.at)))
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)


@contextmanager
def opened(files: Files, name: str) -> Iterator[IO[bytes]]:
    """Opens a seekable binary file. Raises InputError if it cannot be read."""
    try:
        with files.open(name) as file:
            yield file
    except OSError as error:
        raise InputError(
            f"{files.path(name)}: cannot be read ({first_line(error)}); replace it, or run the "
            f"same command again when it can be read"
        ) from error


def tar_members(
    file: IO[bytes], path: str, *, start: int = 0, length: int = -1
) -> Iterator[tuple[str, int, int]]:
    """Yields (name, first byte, bytes) of each member of a tar file. bytes is -1 if the member is
    not a regular file (a link, a device). Folders are left out. Only headers are read.

    file: the file that contains the archive, from byte `start` on, `length` bytes (-1: to the end)
    path: the archive's name in messages

    Raises InputError if the archive is damaged, truncated or compressed, or a member's name leaves
    its folder.
    """
    if length < 0:
        length = file.seek(0, os.SEEK_END)
    try:
        with tarfile.open(
            fileobj=io.BufferedReader(_Window(file, start, length), 4096), mode="r:"
        ) as archive:
            while (member := archive.next()) is not None:
                # tarfile keeps all members in memory
                archive.members.clear()  # type: ignore[attr-defined]  # missing in typeshed
                if member.size < 0 or archive.offset <= member.offset:
                    raise InputError(
                        f"{path}: damaged at byte {start + member.offset}; download it again"
                    )
                if member.isdir():
                    continue
                if member.isreg() and member.offset_data + member.size > length:
                    raise InputError(f"{path}: ends inside {member.name}; download it again")
                yield (
                    inside(member.name),
                    start + member.offset_data,
                    member.size if member.isreg() and not member.issparse() else -1,
                )
            rest = archive.offset
    except (tarfile.TarError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: not a usable tar archive ({first_line(error)}); give the file as "
            f"downloaded, not compressed"
        ) from error
    file.seek(start + rest)
    end = file.read(max(0, min(512, length - rest)))
    # tarfile treats a damaged header, and the end of the file at any point, as the archive's end
    if len(end) < 512 or end.strip(b"\0"):
        raise InputError(f"{path}: damaged or truncated at byte {start + rest}; download it again")
