"""Django: migrations, models, transactions, cursors, and its ways to keep a
connection: one per thread, and psycopg's pool.

The models are those of django.contrib.auth, migrated there and back each way.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from urllib.parse import unquote, urlsplit

import django  # type: ignore[import-untyped]
import pytest
from django.conf import settings  # type: ignore[import-untyped]
from django.core.management import call_command  # type: ignore[import-untyped]
from django.db import (  # type: ignore[import-untyped]
    DataError,
    IntegrityError,
    OperationalError,
    ProgrammingError,
    connections,
    transaction,
)
from django.db.models import Count, F  # type: ignore[import-untyped]
from django.db.transaction import TransactionManagementError  # type: ignore[import-untyped]

from tests.drivers.conftest import Database

settings.configure(
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth"],
    DATABASES={},
    USE_TZ=True,
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
)
django.setup()

from django.contrib.auth.models import (  # type: ignore[import-untyped]  # noqa: E402
    Group,
    User,
)

#: One connection per thread, and its values: put in by the client, or bound by the
#: server in the extended protocol, prepared from the first time on.
KEPT: Mapping[str, Mapping[str, object]] = {
    "kept": {"CONN_MAX_AGE": None},
    "bound": {
        "CONN_MAX_AGE": None,
        "OPTIONS": {"server_side_binding": True, "prepare_threshold": 0},
    },
}
POOLED = {"OPTIONS": {"pool": {"min_size": 20, "max_size": 20}}}


def configure(database: Database, name: str, options: Mapping[str, object]) -> str:
    """Give Django a database; return its alias."""
    url = urlsplit(database.dsn)
    alias = f"{database.way}_{name}"
    connections.settings[alias] = {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": url.hostname,
        "PORT": url.port,
        "USER": unquote(url.username or ""),
        "PASSWORD": unquote(url.password or ""),
        "NAME": url.path[1:],
        **options,
    }
    connections.configure_settings(connections.settings)
    return alias


def migrate(alias: str, *target: str) -> None:
    call_command("migrate", *target, database=alias, verbosity=0, interactive=False)


@pytest.fixture(scope="module")
def migrated(database: Database) -> Iterator[None]:
    alias = configure(database, "migrated", {})
    try:
        migrate(alias)
        connections[alias].close()
        yield
        migrate(alias, "auth", "zero")
        migrate(alias, "contenttypes", "zero")
        assert "auth_user" not in connections[alias].introspection.table_names()
    finally:
        connections[alias].close()


@pytest.fixture(params=KEPT)
def alias(
    request: pytest.FixtureRequest, database: Database, migrated: None
) -> Iterator[str]:
    made = configure(database, request.param, KEPT[request.param])
    yield made
    User.objects.using(made).all().delete()
    Group.objects.using(made).all().delete()
    connections[made].close()
    del connections[made]


def add_users(alias: str, count: int) -> None:
    User.objects.using(alias).bulk_create(
        User(username=f"user {number}", first_name="ö" * (number % 9))
        for number in range(count)
    )


def test_migrations_are_all_applied(alias: str) -> None:
    shown = io.StringIO()
    call_command("showmigrations", database=alias, stdout=shown, no_color=True)
    assert "[X] 0001_initial" in shown.getvalue()
    assert "[ ]" not in shown.getvalue()
    assert "auth_user" in connections[alias].introspection.table_names()


def test_objects_are_stored_found_changed_and_deleted(alias: str) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 6, UTC)
    made = User.objects.using(alias).create(
        username="ögel 🐘", last_login=moment, is_staff=True
    )
    found = User.objects.using(alias).get(username="ögel 🐘")
    assert (found.pk, found.last_login, found.is_staff) == (made.pk, moment, True)
    found.email = "a@example.com"
    found.save()
    users = User.objects.using(alias).filter(email__endswith="example.com")
    assert users.update(first_name=F("email")) == 1
    assert users.get().first_name == "a@example.com"
    assert users.delete()[0] == 1


def test_relations_and_aggregates(alias: str) -> None:
    add_users(alias, 30)
    group = Group.objects.using(alias).create(name="some")
    group.user_set.add(*User.objects.using(alias).filter(username__contains="1"))
    groups = Group.objects.using(alias).annotate(size=Count("user"))
    assert [each.size for each in groups] == [12]
    users = User.objects.using(alias).prefetch_related("groups")
    assert sum(len(user.groups.all()) for user in users) == 12


def test_one_query_many_times(alias: str) -> None:
    add_users(alias, 5)
    for number in range(50):
        name = f"user {number % 5}"
        assert User.objects.using(alias).get(username=name).username == name


def test_atomic_blocks_are_savepoints_inside_of_each_other(alias: str) -> None:
    with transaction.atomic(using=alias):
        User.objects.using(alias).create(username="one")
        with pytest.raises(IntegrityError), transaction.atomic(using=alias):
            User.objects.using(alias).create(username="one")
        with transaction.atomic(using=alias):
            User.objects.using(alias).create(username="two")
        with pytest.raises(ZeroDivisionError), transaction.atomic(using=alias):
            User.objects.using(alias).create(username="three")
            raise ZeroDivisionError
    names = User.objects.using(alias).order_by("pk").values_list("username", flat=True)
    assert list(names) == ["one", "two"]


def test_a_broken_transaction_is_refused_until_its_end(alias: str) -> None:
    with (
        pytest.raises(TransactionManagementError),
        transaction.atomic(using=alias),
    ):
        with pytest.raises(IntegrityError):
            User.objects.using(alias).create(username=None)
        User.objects.using(alias).count()
    assert User.objects.using(alias).count() == 0


def test_errors_are_told_apart_and_recovered_from(alias: str) -> None:
    for _ in range(5):
        with connections[alias].cursor() as cursor:
            with pytest.raises(ProgrammingError):
                cursor.execute("SELECT * FROM nowhere")
            with pytest.raises(DataError):
                cursor.execute("SELECT 1 / %s::int", [0])
            cursor.execute("SELECT 1 / %s::int", [1])
            assert cursor.fetchone() == (1,)


def test_rows_are_locked_for_update(alias: str) -> None:
    add_users(alias, 3)
    with transaction.atomic(using=alias):
        locked = User.objects.using(alias).select_for_update(skip_locked=True)
        assert len(locked.filter(username="user 1")) == 1


def test_rows_are_iterated_by_a_cursor_of_a_transaction(alias: str) -> None:
    add_users(alias, 500)
    with transaction.atomic(using=alias):
        users = User.objects.using(alias).iterator(chunk_size=50)
        assert len({user.username for user in users}) == 500


def test_rows_are_iterated_by_a_cursor_without_a_transaction(alias: str) -> None:
    add_users(alias, 500)
    users = User.objects.using(alias).iterator(chunk_size=50)
    assert len({user.username for user in users}) == 500


def test_a_connection_is_kept_from_request_to_request(alias: str) -> None:
    opened = connections[alias]
    opened.ensure_connection()
    kept = opened.connection
    for _ in range(3):
        assert User.objects.using(alias).count() == 0
        opened.close_if_unusable_or_obsolete()
        assert opened.connection is kept


def test_10_mb_there_and_back(alias: str) -> None:
    value = "0123456789" * 1_000_000
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT %s::text", [value])
        assert cursor.fetchone() == (value,)


def test_copy_in_and_out(alias: str) -> None:
    rows = [(n, f"group {n}") for n in range(1000)]
    with transaction.atomic(using=alias), connections[alias].cursor() as cursor:
        with cursor.copy("COPY auth_group (id, name) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        groups = Group.objects.using(alias).order_by("id").values_list("id", "name")
        assert list(groups) == rows


def test_a_query_is_cancelled(database: Database, alias: str) -> None:
    running = connections[alias]
    running.ensure_connection()
    query = f"SELECT pg_sleep(60), '{os.urandom(4).hex()}'"
    beside = configure(database, "beside", {})

    def cancel_once_it_runs() -> None:
        with connections[beside].cursor() as cursor:
            while not cursor.execute(
                "SELECT FROM pg_stat_activity WHERE state = 'active'"
                " AND query LIKE 'SELECT pg_sleep(60)%%' AND pid <> pg_backend_pid()"
                " AND datname = current_database()"
            ).rowcount:
                pass
        connections[beside].close()
        running.connection.cancel_safe(timeout=10)

    with ThreadPoolExecutor(1) as threads:
        canceller = threads.submit(cancel_once_it_runs)
        with pytest.raises(OperationalError), running.cursor() as cursor:
            cursor.execute(query)
        canceller.result()
    assert User.objects.using(alias).count() == 0


def test_a_pool_of_20_runs_1000_queries(database: Database, migrated: None) -> None:
    alias = configure(database, "pooled", POOLED)

    def ask(number: int) -> object:
        try:
            with connections[alias].cursor() as cursor:
                cursor.execute("SELECT %s::int", [number])
                return cursor.fetchone()[0]
        finally:
            connections[alias].close()

    with ThreadPoolExecutor(30) as threads:
        assert list(threads.map(ask, range(1000))) == list(range(1000))
    connections[alias].close_pool()
