package drivers;

import static drivers.Database.elsewhere;
import static drivers.Database.execute;
import static drivers.Database.fails;
import static drivers.Database.open;
import static drivers.Database.read;
import static drivers.Database.scalar;
import static drivers.Report.test;

import java.sql.Connection;
import java.sql.Savepoint;
import java.util.ArrayList;
import java.util.List;

/** Transactions, savepoints, isolation. */
final class Transactions {
    private static final String NAMES = "SELECT name FROM matrix.item ORDER BY name";

    private Transactions() {}

    static void declare() {
        test("runs a transaction with savepoints", () -> {
            try (Connection connection = open()) {
                connection.setAutoCommit(false);
                insert(connection, "kept");
                Savepoint one = connection.setSavepoint("one");
                fails("23505", () -> insert(connection, "kept"));
                fails("25P02", () -> insert(connection, "other"));
                connection.rollback(one);
                Savepoint two = connection.setSavepoint();
                insert(connection, "undone");
                connection.rollback(two);
                connection.releaseSavepoint(two);
                insert(connection, "too");
                connection.commit();
                return emptied(connection);
            }
        });

        test("saves before each statement of a transaction", () -> {
            List<Object> found = new ArrayList<>();
            for (String autosave : List.of("always", "conservative")) {
                String[] options = {
                    "autosave=" + autosave, "cleanupSavepoints=true", "prepareThreshold=1"
                };
                try (Connection connection = open(options)) {
                    connection.setAutoCommit(false);
                    insert(connection, "kept");
                    fails("23505", () -> insert(connection, "kept"));
                    if (autosave.equals("always")) insert(connection, "too");
                    else connection.rollback();
                    insert(connection, "last");
                    connection.commit();
                    found.add(emptied(connection));
                }
            }
            return found;
        });

        test("keeps the isolation level and reads only", () -> {
            try (Connection connection = open()) {
                List<Object> found = new ArrayList<>();
                connection.setTransactionIsolation(Connection.TRANSACTION_SERIALIZABLE);
                connection.setReadOnly(true);
                connection.setAutoCommit(false);
                for (int turn = 0; turn < 2; turn++) {
                    found.add(elsewhere(
                        () -> scalar(connection, "SHOW transaction_isolation")));
                    fails("25006", () -> insert(connection, "x"));
                    connection.rollback();
                }
                found.add(connection.getTransactionIsolation());
                connection.rollback();
                return found;
            }
        });

        test("fails at the commit for a deferred constraint", () -> {
            try (Connection connection = open()) {
                connection.setAutoCommit(false);
                execute(connection, "INSERT INTO matrix.part (item_id) VALUES (-1)");
                fails("23503", connection::commit);
                return read(connection, "SELECT count(*) FROM matrix.part");
            }
        });

        test("ends a failed transaction with a commit", () -> {
            try (Connection connection = open()) {
                connection.setAutoCommit(false);
                insert(connection, "gone");
                fails("22012", () -> read(connection, "SELECT 1/0"));
                connection.commit();
                return emptied(connection);
            }
        });
    }

    private static void insert(Connection connection, String name) throws Exception {
        try (var statement = connection.prepareStatement(
                "INSERT INTO matrix.item (name) VALUES (?)")) {
            statement.setString(1, name);
            statement.executeUpdate();
        }
    }

    private static Object emptied(Connection connection) throws Exception {
        Object names = read(connection, NAMES);
        execute(connection, "DELETE FROM matrix.item");
        if (!connection.getAutoCommit()) connection.commit();
        return names;
    }
}
