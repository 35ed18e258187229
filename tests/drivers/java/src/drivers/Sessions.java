package drivers;

import static drivers.Database.elsewhere;
import static drivers.Database.execute;
import static drivers.Database.fails;
import static drivers.Database.open;
import static drivers.Database.openDirect;
import static drivers.Database.read;
import static drivers.Database.rows;
import static drivers.Database.same;
import static drivers.Database.scalar;
import static drivers.Report.test;

import java.sql.Connection;
import java.sql.ResultSet;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.List;
import org.postgresql.PGConnection;
import org.postgresql.PGNotification;

/** What lasts for a connection: settings, temporary tables, listening. */
final class Sessions {
    private static final int NOTIFICATION_TIMEOUT_MS = 5_000;

    private Sessions() {}

    static void declare() {
        test("keeps the settings of ten connections apart", () -> {
            List<Connection> opened = new ArrayList<>();
            for (int n = 0; n < 10; n++) opened.add(open());
            for (int n = 0; n < 10; n++) {
                Connection connection = opened.get(n);
                connection.setClientInfo("ApplicationName", "client " + n);
                connection.setSchema("s" + n);
                execute(connection, "SET lock_timeout = '" + (n + 1) + "s'");
            }
            for (int turn = 0; turn < 3; turn++) {
                for (int n = 0; n < 10; n++) {
                    same(
                        List.of(List.of("client " + n, "s" + n, (n + 1) + "s")),
                        read(opened.get(n),
                            "SELECT current_setting('application_name'),"
                                + " current_setting('search_path'),"
                                + " current_setting('lock_timeout')"));
                }
            }
            for (Connection connection : opened) connection.close();
            return null;
        });

        test("forgets at the end of a transaction what it set for it", () -> {
            try (Connection connection = open()) {
                connection.setAutoCommit(false);
                execute(connection, "SET LOCAL lock_timeout = '7s'");
                execute(connection, "SET LOCAL search_path = matrix");
                Object within = read(connection, "SELECT count(*) FROM item");
                connection.commit();
                fails("42P01", () -> read(connection, "SELECT count(*) FROM item"));
                connection.rollback();
                return List.of(within, scalar(connection, "SHOW lock_timeout"));
            }
        });

        test("hears of settings that the server reports", () -> {
            try (Connection connection = open()) {
                PGConnection driver = connection.unwrap(PGConnection.class);
                List<String> found = new ArrayList<>();
                connection.setAutoCommit(false);
                execute(connection, "SET LOCAL application_name = 'of the transaction'");
                found.add(driver.getParameterStatus("application_name"));
                connection.commit();
                found.add(driver.getParameterStatus("application_name"));
                found.add(driver.getParameterStatus("standard_conforming_strings"));
                return found;
            }
        });

        test("keeps a temporary table", () -> {
            try (Connection connection = open()) {
                execute(connection, "CREATE TEMP TABLE kept AS SELECT 1 AS a");
                Object found = elsewhere(() -> read(connection, "SELECT a FROM kept"));
                execute(connection, "DROP TABLE kept");
                return found;
            }
        });

        test("reads on after the commit", () -> {
            try (Connection connection = open();
                    Statement statement = connection.createStatement(
                        ResultSet.TYPE_FORWARD_ONLY, ResultSet.CONCUR_READ_ONLY,
                        ResultSet.HOLD_CURSORS_OVER_COMMIT)) {
                connection.setAutoCommit(false);
                statement.setFetchSize(10);
                ResultSet result = statement.executeQuery(
                    "SELECT n FROM generate_series(1, 100) n");
                result.next();
                connection.commit();
                return rows(result).size();
            }
        });

        test("hears notifications", () -> {
            try (Connection connection = open(); Connection other = openDirect()) {
                execute(connection, "LISTEN pgjdbc");
                execute(connection, "NOTIFY pgjdbc, 'of its own'");
                execute(other, "NOTIFY pgjdbc");
                execute(other, "SELECT pg_notify('pgjdbc', repeat('ü', 3000))");
                execute(other, "NOTIFY elsewhere; NOTIFY pgjdbc, 'last'");
                PGConnection driver = connection.unwrap(PGConnection.class);
                List<String> heard = new ArrayList<>();
                while (!heard.contains("last")) {
                    PGNotification[] some = driver.getNotifications(NOTIFICATION_TIMEOUT_MS);
                    if (some == null || some.length == 0) {
                        throw new AssertionError("heard only " + heard);
                    }
                    for (PGNotification each : some) heard.add(each.getParameter());
                }
                execute(connection, "UNLISTEN *");
                return heard;
            }
        });
    }
}
