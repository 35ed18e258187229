package drivers;

import java.net.URI;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.List;
import java.util.Objects;
import java.util.Properties;

/** Connections to the database under test, and assertions about what they read. */
final class Database {
    private Database() {}

    interface Work<T> {
        T run() throws Exception;
    }

    interface Failing {
        void run() throws Exception;
    }

    /** Open a connection the way under test; options are `name=value`. */
    static Connection open(String... options) throws SQLException {
        return DriverManager.getConnection(url("DRIVER_URL"), properties(options));
    }

    /** Open a connection that never goes through the proxy. */
    static Connection openDirect() throws SQLException {
        String variable = "DRIVER_DIRECT_URL";
        return DriverManager.getConnection(url(variable), login(variable));
    }

    static String url(String variable) {
        URI uri = URI.create(System.getenv(variable));
        return "jdbc:postgresql://" + uri.getHost() + ":" + uri.getPort() + uri.getPath();
    }

    static Properties login(String variable) {
        String[] login = URI.create(System.getenv(variable)).getUserInfo().split(":", 2);
        Properties properties = new Properties();
        properties.setProperty("user", login[0]);
        properties.setProperty("password", login[1]);
        return properties;
    }

    static Properties properties(String... options) {
        Properties properties = login("DRIVER_URL");
        for (String option : options) {
            String[] parts = option.split("=", 2);
            properties.setProperty(parts[0], parts[1]);
        }
        return properties;
    }

    /** Run work while another client holds the server that was used last. */
    static <T> T elsewhere(Work<T> work) throws Exception {
        try (Connection other = open()) {
            other.setAutoCommit(false);
            read(other, "SELECT 1");
            T result = work.run();
            other.commit();
            return result;
        }
    }

    static int execute(Connection connection, String sql) throws SQLException {
        try (Statement statement = connection.createStatement()) {
            statement.execute(sql);
            return statement.getUpdateCount();
        }
    }

    /** Run a simple statement and return its rows as text. */
    static List<List<String>> read(Connection connection, String sql)
        throws SQLException {
        try (Statement statement = connection.createStatement()) {
            return rows(statement.executeQuery(sql));
        }
    }

    static List<List<String>> rows(ResultSet result) throws SQLException {
        int columns = result.getMetaData().getColumnCount();
        List<List<String>> rows = new ArrayList<>();
        while (result.next()) {
            List<String> row = new ArrayList<>();
            for (int n = 1; n <= columns; n++) row.add(result.getString(n));
            rows.add(row);
        }
        return rows;
    }

    static String scalar(Connection connection, String sql) throws SQLException {
        return read(connection, sql).get(0).get(0);
    }

    static SQLException failure(Failing work) throws Exception {
        try {
            work.run();
        } catch (SQLException expected) {
            return expected;
        }
        throw new AssertionError("it did not fail");
    }

    static void fails(String state, Failing work) throws Exception {
        same(state, failure(work).getSQLState());
    }

    static void same(Object expected, Object actual) {
        String wanted = Report.asText(expected);
        String got = Report.asText(actual);
        if (!Objects.equals(wanted, got)) {
            throw new AssertionError("expected " + wanted + ", got " + got);
        }
    }
}
