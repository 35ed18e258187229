package drivers;

import static drivers.Database.elsewhere;
import static drivers.Database.execute;
import static drivers.Database.fails;
import static drivers.Database.open;
import static drivers.Database.properties;
import static drivers.Database.read;
import static drivers.Database.same;
import static drivers.Database.scalar;
import static drivers.Database.url;
import static drivers.Report.test;

import java.sql.Connection;
import java.sql.DatabaseMetaData;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.util.ArrayList;
import java.util.List;

/** Logging in, with the driver's options, and what it asks of a new connection. */
final class Connecting {
    private Connecting() {}

    static void declare() {
        test("connects by URL", () -> {
            try (Connection connection = open()) {
                same(true, connection.isValid(5));
                return List.of(
                    read(connection, "SELECT current_user = session_user"),
                    connection.getMetaData().getDatabaseMajorVersion());
            }
        });

        test("connects to a primary, with TLS where there is any", () -> {
            String[] options = {"targetServerType=primary", "sslmode=prefer"};
            try (Connection connection = open(options)) {
                return read(connection, "SELECT 1");
            }
        });

        test("connects with protocol 3.2", () -> {
            try (Connection connection = open("protocolVersion=3.2")) {
                return read(connection, "SELECT 1");
            }
        });

        test("connects with settings of the start-up packet", () -> {
            String[] options = {
                "ApplicationName=a name",
                "currentSchema=matrix,public",
                "options=-c lock_timeout=42s -c statement_timeout=41s",
            };
            try (Connection connection = open(options)) {
                List<String> shown = new ArrayList<>();
                for (String name : List.of(
                    "application_name", "search_path", "lock_timeout",
                    "statement_timeout", "TimeZone", "extra_float_digits")) {
                    String ask = "SHOW " + name;
                    shown.add(elsewhere(() -> scalar(connection, ask)));
                }
                return shown;
            }
        });

        test("is refused with a wrong password", () -> {
            fails("28P01", () -> open("password=wrong"));
            return null;
        });

        test("is refused at an unknown database", () -> {
            String wrong = url("DRIVER_URL").replaceFirst("/[^/]*$", "/nowhere");
            fails("3D000", () -> DriverManager.getConnection(wrong, properties()));
            return null;
        });

        test("queries in each of the driver's modes", () -> {
            List<Object> answers = new ArrayList<>();
            for (String mode : List.of(
                "simple", "extended", "extendedForPrepared", "extendedCacheEverything")) {
                try (Connection connection = open("preferQueryMode=" + mode)) {
                    answers.add(queries(connection));
                }
            }
            for (Object answer : answers) same(answers.get(0), answer);
            return answers.get(0);
        });

        test("looks tables, columns and keys up", () -> {
            try (Connection connection = open()) {
                DatabaseMetaData data = connection.getMetaData();
                List<Object> found = new ArrayList<>();
                String[] columns = {"TABLE_NAME", "COLUMN_NAME", "TYPE_NAME", "NULLABLE"};
                try (ResultSet result = data.getColumns(null, "matrix", "%", "%")) {
                    while (result.next()) {
                        for (String name : columns) found.add(result.getString(name));
                    }
                }
                try (ResultSet result = data.getPrimaryKeys(null, "matrix", "item")) {
                    while (result.next()) found.add(result.getString("COLUMN_NAME"));
                }
                try (ResultSet result = data.getImportedKeys(null, "matrix", "part")) {
                    while (result.next()) found.add(result.getString("PKTABLE_NAME"));
                }
                return found;
            }
        });
    }

    private static Object queries(Connection connection) throws Exception {
        List<Object> answers = new ArrayList<>();
        String ask = "SELECT ?::int + 1, ?::text, ?::bytea";
        try (PreparedStatement statement = connection.prepareStatement(ask)) {
            for (int n = 0; n < 8; n++) {
                statement.setInt(1, n);
                statement.setString(2, "it's \\ ü");
                statement.setBytes(3, new byte[] {0, 1, (byte) 255});
                try (ResultSet result = statement.executeQuery()) {
                    result.next();
                    answers.add(result.getInt(1));
                    answers.add(result.getString(2));
                    answers.add(result.getBytes(3));
                }
            }
        }
        connection.setAutoCommit(false);
        execute(connection, "INSERT INTO matrix.item (name) VALUES ('a'), ('b')");
        fails("22012", () -> read(connection, "SELECT 1/0"));
        fails("25P02", () -> read(connection, "SELECT 1"));
        connection.rollback();
        answers.add(read(connection, "SELECT count(*) FROM matrix.item"));
        return answers;
    }
}
