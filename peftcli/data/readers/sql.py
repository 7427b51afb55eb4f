"""Tables and queries of databases, read-only, one row after another."""

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
"""What stands in a query and is not SQL: texts, quoted names and comments."""
_READING = re.compile(r"(select|with|values|table)\b", re.IGNORECASE)
_WRITING = re.compile(r"\b(insert|update|delete|into)\b", re.IGNORECASE)
_PASSWORD = re.compile(r"[?&](?:password|passwd|pwd)=([^&]+)", re.IGNORECASE)


def read_sqlite(file: DataFile) -> Iterator[Rows]:
    """The rows of a table or a query of an SQLite file, which is not written to.

    Raises:
        DataError: the table is not there, or the query fails, writes or is several.
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
        fix = f"look at {file.key}.table and {file.key}.query"
        if type(problem) is sqlite3.DatabaseError and problem.sqlite_errorcode in _BROKEN:
            fix = "fetch or write the file again"
        raise DataError(f"{place}: {' '.join(str(problem).split())[:200]}; {fix}") from problem


@dataclass
class DatabaseSource:
    """A table or a query of a database with an address.

    Attributes:
        name: as the data report shows it; it holds nothing of the address.
        address: of the database, as SQLAlchemy writes it; it may hold a password and is shown nowhere.
        section: the part of the recipe that names the rows.
        key: its dotted name, for messages.
    """

    name: str
    address: str
    section: FilesSection
    key: str
    files: tuple[Path, ...] = ()

    def fingerprint(self) -> str:
        """A digest of all rows: a database keeps none."""
        digest = hashlib.sha256()
        for rows in self.batches():
            digest.update(repr((list(rows.columns), list(rows.columns.values()))).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def batches(self) -> Iterator[Rows]:
        """The rows in the order in which the database gives them.

        Raises:
            DataError: the database cannot be reached, or the rows cannot be had.
            MachineError: SQLAlchemy or the driver of this database is not installed.
        """
        try:
            # By name, since the package is an extra that need not be installed.
            alchemy: Any = importlib.import_module("sqlalchemy")
        except ImportError as problem:
            raise MachineError(
                f"{self.name}: a database with an address is read by SQLAlchemy, which is not installed; "
                "pip install 'peftcli[sql]'"
            ) from problem
        try:
            engine = alchemy.create_engine(self.address)
        except ImportError as problem:
            raise MachineError(f"{self.name}: {self._safe(problem)}; install the driver of this database") from None
        except alchemy.exc.ArgumentError:
            raise DataError(f"{self.name}: is no address of a database, such as postgresql://user@host/name") from None
        count = 0
        try:
            for rows in self._read(alchemy, engine):
                count += len(rows)
                yield rows
        except alchemy.exc.SQLAlchemyError as problem:
            raise DataError(f"{self.name}: cannot be read: {self._safe(problem)}") from None
        finally:
            engine.dispose()
        if not count:
            raise DataError(f"{self.name}: no rows")

    def _read(self, alchemy: Any, engine: Any) -> Iterator[Rows]:
        with engine.connect() as connection:
            known = alchemy.inspect(connection)
            names = sorted([*known.get_table_names(), *known.get_view_names()])
            query = _query(self.section, names, self.name, self.key, engine.dialect.identifier_preparer.quote)
            # Without parameters a driver takes a % in the query as it stands.
            streaming = connection.execution_options(stream_results=True, max_row_buffer=BATCH_ROWS, no_parameters=True)
            result = streaming.exec_driver_sql(query)
            yield from _rows(self.name, self.name, list(result.keys()), result)

    def _safe(self, problem: Exception) -> str:
        """What a driver says, without any part of the address."""
        said = str(problem).split("\n")[0][:300]
        for secret in (self.address, *_passwords(self.address)):
            said = said.replace(secret, "***")
        return said


def open_database(section: SourceSection, key: str) -> DatabaseSource:
    """The rows of a database whose address stands in the recipe or in an environment variable.

    Raises:
        DataError: the recipe holds a password.
        MachineError: the environment variable is not set.
    """
    if section.url is not None:
        if _passwords(section.url):
            raise DataError(
                f"{key}.url: holds a password, and a recipe is copied into every run folder; put the address into an "
                f"environment variable and name that in {key}.url_env"
            )
        return DatabaseSource(_shown(section.url, section), section.url, section, key)
    assert section.url_env is not None  # the caller has seen to it
    address = os.environ.get(section.url_env)
    if not address:
        raise MachineError(
            f"{key}.url_env: the environment variable {section.url_env} is not set; export it with the address of the "
            "database"
        )
    return DatabaseSource(_shown(address, section), address, section, key)


def _passwords(address: str) -> list[str]:
    """The passwords in an address, as they are written and as they are meant."""
    found = _PASSWORD.findall(address)
    try:
        found += [urlsplit(address).password or ""]
    except ValueError:  # half of an IPv6 address, say; what stands before the @ may hold anything
        found += [address.rpartition("@")[0].rpartition(":")[2]]
    return [form for text in found if text for form in {text, unquote(text)}]


def _shown(address: str, section: FilesSection) -> str:
    """The kind of a database and what is read of it, such as `postgresql items`."""
    kind = re.match(r"[a-z0-9]+(?=[+:])", address)
    what = section.table or ("query" if section.query else "table")
    return f"{kind[0] if kind else 'database'} {what}"


def _query(section: FilesSection, tables: list[str], place: str, key: str, quoted: Callable[[str], str]) -> str:
    if section.table is not None and section.query is not None:
        raise DataError(f"{place}: {key}.table and {key}.query are both set; leave out one of them")
    if section.query is not None:
        return _checked_query(section.query, key)
    if section.table is None and len(tables) == 1:
        return f"SELECT * FROM {quoted(tables[0])}"
    if not tables:
        raise DataError(f"{place}: holds no tables; name another file")
    there = f"it has {listed(tables)}"
    if section.table is None:
        raise DataError(f"{place}: which table is meant? {there}; set {key}.table or {key}.query")
    if section.table not in tables:
        near = nearest(section.table, tables)
        hint = f"; did you mean {shown(near)}?" if near else f"; set {key}.table or {key}.query"
        raise DataError(f"{place}: no table {section.table}; {there}{hint}")
    return f"SELECT * FROM {quoted(section.table)}"


def _checked_query(query: str, key: str) -> str:
    bare = _ASIDE.sub(" ", query).strip().rstrip(";").rstrip()
    if ";" in bare:
        raise DataError(f"{key}.query: holds several statements; one that reads is expected")
    if not _READING.match(bare) or _WRITING.search(bare):
        raise DataError(f"{key}.query: is no query that only reads; begin it with SELECT or WITH")
    return query


def _rows(name: str, place: str, columns: list[str], rows: Iterable[Any]) -> Iterator[Rows]:
    double = double_names(columns)
    if double:
        raise DataError(f"{place}: the query names {listed(double)} twice; give each column a name of its own by AS")
    return gather(name, _items(rows), columns_of_tuples(columns))


def _items(rows: Iterable[Any]) -> Iterator[Item[Any]]:
    for number, row in enumerate(rows, start=1):
        yield number, row, sum(len(value) for value in row if isinstance(value, str | bytes))
