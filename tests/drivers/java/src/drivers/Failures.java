package drivers;

import static drivers.Database.execute;
import static drivers.Database.failure;
import static drivers.Database.fails;
import static drivers.Database.open;
import static drivers.Database.openDirect;
import static drivers.Database.read;
import static drivers.Database.same;
import static drivers.Database.scalar;
import static drivers.Report.test;

import java.sql.Connection;
import java.sql.SQLException;
import java.sql.SQLWarning;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import org.postgresql.util.PSQLException;
import org.postgresql.util.ServerErrorMessage;

/** Errors, warnings, cancelled queries, servers that are gone. */
final class Failures {
    private Failures() {}

    static void declare() {
        test("reads every field of an error", () -> {
            try (Connection connection = open()) {
                List<Object> found = new ArrayList<>();
                for (String sql : List.of(
                    "INSERT INTO matrix.item (name, price) VALUES ('x', -1)",
                    "INSERT INTO matrix.item (name) VALUES (NULL)",
                    "SELECT 1 +\n FROM nowhere",
                    "SELECT * FROM nowhere",
                    "SELECT 3::matrix.even",
                    "DO $$ BEGIN RAISE EXCEPTION 'a message' USING ERRCODE = 'ZX123',"
                        + " DETAIL = 'a detail', HINT = 'a hint', SCHEMA = 's',"
                        + " TABLE = 't', COLUMN = 'c', DATATYPE = 'd',"
                        + " CONSTRAINT = 'k'; END $$")) {
                    var error = (PSQLException) failure(() -> execute(connection, sql));
                    found.add(fields(error.getServerErrorMessage()));
                    same("5", scalar(connection, "SELECT 5"));
                }
                return found;
            }
        });

        test("reads warnings", () -> {
            try (Connection connection = open();
                    Statement statement = connection.createStatement()) {
                statement.execute(
                    "DO $$ BEGIN RAISE WARNING 'w' USING DETAIL = 'd';"
                        + " RAISE NOTICE 'n'; END $$");
                List<String> found = new ArrayList<>();
                SQLWarning warning = statement.getWarnings();
                for (; warning != null; warning = warning.getNextWarning()) {
                    found.add(warning.getSQLState() + " " + warning.getMessage());
                }
                return found;
            }
        });

        test("cancels a running statement", () -> {
            try (Connection connection = open(); Connection watch = openDirect()) {
                for (String sql : List.of("SELECT pg_sleep(20)", "SELECT pg_sleep(21)")) {
                    cancelled(connection, watch, sql);
                    same("1", scalar(connection, "SELECT 1"));
                }
                connection.setAutoCommit(false);
                cancelled(connection, watch, "SELECT pg_sleep(22)");
                fails("25P02", () -> read(connection, "SELECT 1"));
                connection.rollback();
                return read(connection, "SELECT 1");
            }
        });

        test("cancels a running statement with protocol 3.2", () -> {
            try (Connection connection = open("protocolVersion=3.2");
                    Connection watch = openDirect()) {
                cancelled(connection, watch, "SELECT pg_sleep(20)");
                return read(connection, "SELECT 1");
            }
        });

        test("ends a statement at its time limit", () -> {
            try (Connection connection = open();
                    Statement statement = connection.createStatement()) {
                statement.setQueryTimeout(1);
                fails("57014", () -> statement.executeQuery("SELECT pg_sleep(20)"));
                return read(connection, "SELECT 1");
            }
        });

        test("is told when its server is ended", () -> {
            try (Connection connection = open()) {
                SQLException ended = failure(() -> read(connection,
                    "SELECT pg_terminate_backend(pg_backend_pid())"));
                same(false, connection.isValid(5));
                return List.of(ended.getSQLState(), connection.isClosed());
            }
        });
    }

    private static List<Object> fields(ServerErrorMessage message) {
        return Arrays.asList(
            message.getSQLState(), message.getSeverity(), message.getMessage(),
            message.getDetail(), message.getHint(), message.getPosition(),
            message.getWhere(), message.getSchema(), message.getTable(),
            message.getColumn(), message.getDatatype(), message.getConstraint());
    }

    private static void cancelled(Connection connection, Connection watch, String sql)
        throws Exception {
        try (Statement statement = connection.createStatement()) {
            var ended = CompletableFuture.supplyAsync(() -> {
                try {
                    return failure(() -> statement.executeQuery(sql)).getSQLState();
                } catch (Exception other) {
                    return other.toString();
                }
            });
            String asleep = "SELECT count(*) FROM pg_stat_activity"
                + " WHERE datname = current_database() AND wait_event = 'PgSleep'";
            while (scalar(watch, asleep).equals("0")) Thread.onSpinWait();
            statement.cancel();
            same("57014", ended.get());
        }
    }
}
