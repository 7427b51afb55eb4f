"""Tables and queries of databases, read-only and streamed."""

import hashlib
import importlib
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from peftcli.data.readers.batches import Item, columns_of_tuples, double_names, gather
from peftcli.data.readers.files import DataFile
from peftcli.data.rows import BATCH_ROWS, Rows, listed, shown
from peftcli.errors import DataError, MachineError
from peftcli.nearest import nearest
from peftcli.recipe.schema import FilesSection, SourceSection

_BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_ASIDE = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`|--[^\n]*|/\*.*?\*/", re.DOTALL)
"""Strings, quoted names and comments in a query."""
_READING = re.compile(r"(select|with|values|table)\b", re.IGNORECASE)
_WRITING = re.compile(r"\b(insert|update|delete|into)\b", re.IGNORECASE)
_PASSWORD = re.compile(r"[?&](?:password|passwd|pwd)=([^&]+)", re.IGNORECASE)


def read_sqlite(file: DataFile) -> Iterator[Rows]:
    """The rows of a table or a query of an SQLite file, opened read-only.

    Raises:
        DataError: the table does not exist, or the query fails, writes or has several statements.
    """
    place = str(file.path)
    address = f"file:{quote(str(file.path))}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True)) as connection:
            tables = connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY name")
            names = [name for (name,) in tables if not name.startswith("sqlite_")]
            query = _query(file.section, names, place, file.key, lambda name: '"' + name.replace('"', '""') + '"')
            connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY)
            cursor = connection.execute(query)
            columns = [column[0] for column in cursor.description or ()]
            yield from _rows(file.name, place, columns, cursor)
    except (sqlite3.Error, sqlite3.Warning, UnicodeDecodeError) as problem:
        fix = f"check {file.key}.table and {file.key}.query"
        if type(problem) is sqlite3.DatabaseError and problem.sqlite_errorcode in _BROKEN:
            fix = "download or write the file again"
        raise DataError(f"{place}: {' '.join(str(problem).split())[:200]}; {fix}") from problem


@dataclass
class DatabaseSource:
    """A table or a query of a database with a URL.

    Attributes:
        name: for the data report, without the URL.
        address: SQLAlchemy URL; it may contain a password and is never shown.
        section: the section of the recipe.
        key: its dotted name, for messages.
    """

    name: str
    address: str
    section: FilesSection
    key: str
    files: tuple[Path, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 over all rows, since a database has no fingerprint."""
        digest = hashlib.sha256()
        for rows in self.batches():
            digest.update(repr((list(rows.columns), list(rows.columns.values()))).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def batches(self) -> Iterator[Rows]:
        """The rows in the order of the database.

        Raises:
            DataError: the database is not reachable, or the rows cannot be read.
            MachineError: SQLAlchemy or the database driver is not installed.
        """
        try:
            # Imported by name, because the package is an optional extra.
            alchemy: Any = importlib.import_module("sqlalchemy")
        except ImportError as problem:
            raise MachineError(
                f"{self.name}: reading a database URL needs SQLAlchemy, which is not installed; "
                "pip install 'peftcli[sql]'"
            ) from problem
        try:
            engine = alchemy.create_engine(self.address)
        except ImportError as problem:
            raise MachineError(f"{self.name}: {self._safe(problem)}; install the driver of the database") from None
        except alchemy.exc.ArgumentError:
            raise DataError(
                f"{self.name}: is not a database URL; use one such as postgresql://user@host/name"
            ) from None
        count = 0
        try:
            for rows in self._read(alchemy, engine):
                count += len(rows)
                yield rows
        except alchemy.exc.SQLAlchemyError as problem:
            raise DataError(
                f"{self.name}: cannot be read: {self._safe(problem)}; check the URL, the table and the query"
            ) from None
        finally:
            engine.dispose()
        if not count:
            raise DataError(f"{self.name}: no rows; check the table and the query")

    def _read(self, alchemy: Any, engine: Any) -> Iterator[Rows]:
        with engine.connect() as connection:
            known = alchemy.inspect(connection)
            names = sorted([*known.get_table_names(), *known.get_view_names()])
            query = _query(self.section, names, self.name, self.key, engine.dialect.identifier_preparer.quote)
            # Without parameters the driver does not interpret % in the query.
            streaming = connection.execution_options(stream_results=True, max_row_buffer=BATCH_ROWS, no_parameters=True)
            result = streaming.exec_driver_sql(query)
            yield from _rows(self.name, self.name, list(result.keys()), result)

    def _safe(self, problem: Exception) -> str:
        """The message of a driver, without the URL or its password."""
        text = str(problem).split("\n")[0][:300]
        for secret in (self.address, *_passwords(self.address)):
            text = text.replace(secret, "***")
        return text


def open_database(section: SourceSection, key: str) -> DatabaseSource:
    """The rows of a database whose URL is in the recipe or in an environment variable.

    Raises:
        DataError: the URL in the recipe contains a password.
        MachineError: the environment variable is not set.
    """
    if section.url is not None:
        if _passwords(section.url):
            raise DataError(
                f"{key}.url: contains a password, and a recipe is copied into every run folder; put the URL into an "
                f"environment variable and set {key}.url_env to its name"
            )
        return DatabaseSource(_shown(section.url, section), section.url, section, key)
    assert section.url_env is not None  # checked by the caller
    address = os.environ.get(section.url_env)
    if not address:
        raise MachineError(
            f"{key}.url_env: the environment variable {section.url_env} is not set; set it to the URL of the database"
        )
    return DatabaseSource(_shown(address, section), address, section, key)


def _passwords(address: str) -> list[str]:
    """The passwords in a URL, quoted and unquoted."""
    found = _PASSWORD.findall(address)
    try:
        found += [urlsplit(address).password or ""]
    except ValueError:  # an incomplete IPv6 address, for example; any text before the @ may be the password
        found += [address.rpartition("@")[0].rpartition(":")[2]]
    return [form for text in found if text for form in {text, unquote(text)}]


def _shown(address: str, section: FilesSection) -> str:
    """The database system and the table, such as `postgresql items`."""
    kind = re.match(r"[a-z0-9]+(?=[+:])", address)
    what = section.table or ("query" if section.query else "table")
    return f"{kind[0] if kind else 'database'} {what}"


def _query(section: FilesSection, tables: list[str], place: str, key: str, quoted: Callable[[str], str]) -> str:
    if section.table is not None and section.query is not None:
        raise DataError(f"{place}: {key}.table and {key}.query are both set; remove one of them")
    if section.query is not None:
        return _checked_query(section.query, key)
    if section.table is None and len(tables) == 1:
        return f"SELECT * FROM {quoted(tables[0])}"
    if not tables:
        raise DataError(f"{place}: has no tables; use another file")
    present = f"it has {listed(tables)}"
    if section.table is None:
        raise DataError(f"{place}: the table is ambiguous, {present}; set {key}.table or {key}.query")
    if section.table not in tables:
        near = nearest(section.table, tables)
        hint = f"; did you mean {shown(near)}?" if near else f"; set {key}.table or {key}.query"
        raise DataError(f"{place}: no table {section.table}; {present}{hint}")
    return f"SELECT * FROM {quoted(section.table)}"


def _checked_query(query: str, key: str) -> str:
    bare = _ASIDE.sub(" ", query).strip().rstrip(";").rstrip()
    if ";" in bare:
        raise DataError(f"{key}.query: has several statements; use a single query")
    if not _READING.match(bare) or _WRITING.search(bare):
        raise DataError(f"{key}.query: is not a read-only query; start it with SELECT or WITH")
    return query


def _rows(name: str, place: str, columns: list[str], rows: Iterable[Any]) -> Iterator[Rows]:
    double = double_names(columns)
    if double:
        raise DataError(f"{place}: the query has {listed(double)} twice; give each column a unique name with AS")
    return gather(name, _items(rows), columns_of_tuples(columns))


def _items(rows: Iterable[Any]) -> Iterator[Item[Any]]:
    for number, row in enumerate(rows, start=1):
        yield number, row, sum(len(value) for value in row if isinstance(value, str | bytes))
