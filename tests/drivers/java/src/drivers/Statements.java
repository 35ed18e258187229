package drivers;

import static drivers.Database.elsewhere;
import static drivers.Database.execute;
import static drivers.Database.open;
import static drivers.Database.read;
import static drivers.Database.rows;
import static drivers.Database.same;
import static drivers.Report.test;

import java.sql.CallableStatement;
import java.sql.Connection;
import java.sql.ParameterMetaData;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.ResultSetMetaData;
import java.sql.Statement;
import java.sql.Types;
import java.util.ArrayList;
import java.util.List;
import org.postgresql.PGStatement;

/** Statements prepared, described, called, and their results. */
final class Statements {
    private Statements() {}

    static void declare() {
        test("goes over to a named statement at the fifth use", () -> {
            try (Connection connection = open()) {
                return reused(connection);
            }
        });

        test("names a statement at its first use", () -> {
            try (Connection connection = open("prepareThreshold=1")) {
                return reused(connection);
            }
        });

        test("uses 300 named statements in turn", () -> {
            try (Connection connection = open("prepareThreshold=1")) {
                return many(connection, 300);
            }
        });

        test("closes named statements that its cache has no room for", () -> {
            String[] options = {"prepareThreshold=1", "preparedStatementCacheQueries=3"};
            try (Connection connection = open(options)) {
                return many(connection, 20);
            }
        });

        test("prepares again after the session forgot its statements", () -> {
            try (Connection connection = open("prepareThreshold=1")) {
                List<Object> answers = new ArrayList<>();
                try (PreparedStatement statement =
                        connection.prepareStatement("SELECT ?::int * 2")) {
                    for (String forget : List.of("DEALLOCATE ALL", "DISCARD ALL")) {
                        for (int n = 0; n < 3; n++) {
                            statement.setInt(1, n);
                            answers.add(rows(statement.executeQuery()));
                        }
                        execute(connection, forget);
                    }
                    statement.setInt(1, 21);
                    answers.add(rows(statement.executeQuery()));
                }
                return answers;
            }
        });

        test("prepares again after the columns of its result changed", () -> {
            try (Connection connection = open("prepareThreshold=1")) {
                execute(connection, "CREATE TABLE matrix.grown AS SELECT 1 AS a");
                List<Object> answers = new ArrayList<>();
                try (PreparedStatement statement =
                        connection.prepareStatement("SELECT * FROM matrix.grown")) {
                    for (int n = 0; n < 3; n++) {
                        answers.add(rows(statement.executeQuery()));
                        answers.add(rows(statement.executeQuery()));
                        execute(connection,
                            "ALTER TABLE matrix.grown ADD COLUMN b" + n + " int DEFAULT 2");
                    }
                    answers.add(rows(statement.executeQuery()));
                } finally {
                    execute(connection, "DROP TABLE matrix.grown");
                }
                return answers;
            }
        });

        test("describes parameters and columns", () -> {
            try (Connection connection = open()) {
                String ask = "SELECT id, name AS n, price FROM matrix.item"
                    + " WHERE price > ? AND mood = ?::matrix.mood AND id = ANY (?)";
                List<Object> found = new ArrayList<>();
                try (PreparedStatement statement = connection.prepareStatement(ask)) {
                    ParameterMetaData parameters = statement.getParameterMetaData();
                    for (int n = 1; n <= parameters.getParameterCount(); n++) {
                        found.add(parameters.getParameterTypeName(n));
                    }
                    ResultSetMetaData columns = statement.getMetaData();
                    for (int n = 1; n <= columns.getColumnCount(); n++) {
                        found.add(columns.getColumnLabel(n));
                        found.add(columns.getColumnTypeName(n));
                        found.add(columns.isNullable(n));
                        found.add(columns.getScale(n));
                    }
                }
                return found;
            }
        });

        test("reads the results of several statements", () -> {
            try (Connection connection = open();
                    Statement statement = connection.createStatement()) {
                List<Object> found = new ArrayList<>();
                boolean isResult = statement.execute(
                    "SELECT 1; INSERT INTO matrix.item (name) VALUES ('a'), ('b');"
                        + " SELECT 'x;y' WHERE false; DELETE FROM matrix.item; SELECT 2");
                while (isResult || statement.getUpdateCount() != -1) {
                    found.add(isResult
                        ? rows(statement.getResultSet())
                        : statement.getUpdateCount());
                    isResult = statement.getMoreResults();
                }
                return found;
            }
        });

        test("returns keys that were made", () -> {
            try (Connection connection = open();
                    PreparedStatement statement = connection.prepareStatement(
                        "INSERT INTO matrix.item (name) VALUES (?), (?)",
                        new String[] {"name", "price"})) {
                statement.setString(1, "a");
                statement.setString(2, "b");
                statement.executeUpdate();
                List<List<String>> keys = rows(statement.getGeneratedKeys());
                execute(connection, "DELETE FROM matrix.item");
                return keys;
            }
        });

        test("calls functions and procedures", () -> {
            try (Connection connection = open()) {
                execute(connection,
                    "CREATE FUNCTION matrix.add(a int, b int, OUT c int, OUT d text)"
                        + " AS $$ SELECT a + b, 'x' $$ LANGUAGE sql");
                execute(connection,
                    "CREATE PROCEDURE matrix.store(a text) LANGUAGE plpgsql AS $$ BEGIN"
                        + " INSERT INTO matrix.item (name) VALUES (a); COMMIT;"
                        + " INSERT INTO matrix.item (name) VALUES (a || a); ROLLBACK;"
                        + " END $$");
                List<Object> found = new ArrayList<>();
                try (CallableStatement call =
                        connection.prepareCall("{call matrix.add(?, ?, ?, ?)}")) {
                    call.setInt(1, 40);
                    call.setInt(2, 2);
                    call.registerOutParameter(3, Types.INTEGER);
                    call.registerOutParameter(4, Types.VARCHAR);
                    call.execute();
                    found.add(call.getInt(3));
                    found.add(call.getString(4));
                }
                try (CallableStatement call =
                        connection.prepareCall("call matrix.store(?)")) {
                    call.setString(1, "ab");
                    call.execute();
                }
                found.add(read(connection, "SELECT name FROM matrix.item"));
                execute(connection, "DELETE FROM matrix.item");
                execute(connection, "DROP FUNCTION matrix.add");
                execute(connection, "DROP PROCEDURE matrix.store");
                return found;
            }
        });

        test("updates rows through a result", () -> {
            try (Connection connection = open();
                    Statement statement = connection.createStatement(
                        ResultSet.TYPE_SCROLL_INSENSITIVE, ResultSet.CONCUR_UPDATABLE)) {
                execute(connection, "INSERT INTO matrix.item (name) VALUES ('a'), ('b')");
                try (ResultSet result = statement.executeQuery(
                        "SELECT id, name, price FROM matrix.item ORDER BY id")) {
                    result.absolute(2);
                    result.updateString("name", "changed");
                    result.updateRow();
                    result.first();
                    result.deleteRow();
                    result.moveToInsertRow();
                    result.updateInt("id", -1);
                    result.updateString("name", "new");
                    result.insertRow();
                }
                List<?> left = read(connection,
                    "DELETE FROM matrix.item RETURNING name, id < 0");
                return left.stream().map(Object::toString).sorted().toList();
            }
        });
    }

    /** Use one statement often, now and then on a server that doesn't know it. */
    private static Object reused(Connection connection) throws Exception {
        List<Boolean> named = new ArrayList<>();
        try (PreparedStatement statement =
                connection.prepareStatement("SELECT ?::int * 2, ?::text")) {
            for (int n = 0; n < 24; n++) {
                statement.setInt(1, n);
                statement.setString(2, "t" + n);
                List<List<String>> answer = n % 3 == 0
                    ? elsewhere(() -> rows(statement.executeQuery()))
                    : rows(statement.executeQuery());
                same(List.of(List.of(n * 2, "t" + n)), answer);
                named.add(statement.unwrap(PGStatement.class).isUseServerPrepare());
            }
        }
        return named;
    }

    private static Object many(Connection connection, int count) throws Exception {
        for (int turn = 0; turn < 3; turn++) {
            for (int n = 0; n < count; n++) {
                try (PreparedStatement statement =
                        connection.prepareStatement("SELECT ?::int + " + n)) {
                    statement.setInt(1, turn);
                    same(List.of(List.of(n + turn)), rows(statement.executeQuery()));
                }
            }
        }
        return null;
    }
}
