package drivers;

import static drivers.Database.execute;
import static drivers.Database.open;
import static drivers.Database.read;
import static drivers.Database.same;
import static drivers.Report.test;

import java.sql.BatchUpdateException;
import java.sql.Connection;
import java.sql.PreparedStatement;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;

/** Many statements before one wait, and errors in the middle of them. */
final class Batches {
    private static final String INSERT = "INSERT INTO matrix.item (name) VALUES (?)";
    private static final String COUNT = "SELECT count(*), max(name) FROM matrix.item";

    private Batches() {}

    static void declare() {
        test("runs a batch of 2,000 sets of parameters", () -> {
            try (Connection connection = open()) {
                return inserted(connection);
            }
        });

        test("runs a batch of 2,000 sets of parameters in rewritten statements", () -> {
            try (Connection connection = open("reWriteBatchedInserts=true")) {
                return inserted(connection);
            }
        });

        test("runs a batch of different statements", () -> {
            try (Connection connection = open();
                    Statement statement = connection.createStatement()) {
                statement.addBatch("INSERT INTO matrix.item (name) VALUES ('a'), ('b')");
                statement.addBatch("UPDATE matrix.item SET price = 1 WHERE name = 'a'");
                statement.addBatch("DELETE FROM matrix.item");
                return Arrays.toString(statement.executeBatch());
            }
        });

        test("recovers from an error in the middle of a batch", () -> {
            List<Object> found = new ArrayList<>();
            for (String threshold : List.of("0", "1", "5")) {
                try (Connection connection = open("prepareThreshold=" + threshold)) {
                    found.add(broken(connection));
                    found.add(read(connection, COUNT));
                    execute(connection, "DELETE FROM matrix.item");
                }
            }
            return found;
        });

        test("recovers from an error in the middle of a batch of a transaction", () -> {
            try (Connection connection = open("prepareThreshold=1")) {
                List<Object> found = new ArrayList<>();
                connection.setAutoCommit(false);
                execute(connection, "INSERT INTO matrix.item (name) VALUES ('before')");
                var savepoint = connection.setSavepoint();
                found.add(broken(connection));
                connection.rollback(savepoint);
                found.add(read(connection, COUNT));
                found.add(broken(connection));
                connection.rollback();
                found.add(read(connection, COUNT));
                connection.commit();
                return found;
            }
        });
    }

    private static Object inserted(Connection connection) throws Exception {
        try (PreparedStatement statement = connection.prepareStatement(INSERT)) {
            for (int n = 0; n < 2000; n++) {
                statement.setString(1, "name " + n);
                statement.addBatch();
            }
            same(2000, statement.executeBatch().length);
        }
        Object counted = read(connection, COUNT);
        execute(connection, "DELETE FROM matrix.item");
        return counted;
    }

    private static Object broken(Connection connection) throws Exception {
        try (PreparedStatement statement = connection.prepareStatement(INSERT)) {
            for (int n = 0; n < 20; n++) {
                statement.setString(1, "name " + (n == 12 ? 11 : n));
                statement.addBatch();
            }
            statement.executeBatch();
        } catch (BatchUpdateException expected) {
            return List.of(
                expected.getSQLState(), Arrays.toString(expected.getUpdateCounts()));
        }
        throw new AssertionError("it did not fail");
    }
}
