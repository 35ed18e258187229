package drivers;

import static drivers.Database.execute;
import static drivers.Database.openDirect;
import static drivers.Database.properties;
import static drivers.Database.read;
import static drivers.Database.rows;
import static drivers.Database.same;
import static drivers.Database.url;
import static drivers.Report.test;

import com.zaxxer.hikari.HikariConfig;
import com.zaxxer.hikari.HikariDataSource;
import java.sql.Connection;
import java.sql.PreparedStatement;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;

/** HikariCP with twenty connections and as many threads. */
final class Pools {
    private static final int SIZE = 20;

    private Pools() {}

    static void declare() {
        test("runs 1,000 queries in a pool of 20", () -> {
            try (HikariDataSource pool = pool()) {
                List<Callable<Object>> work = new ArrayList<>();
                for (int number = 0; number < 1000; number++) {
                    int n = number;
                    work.add(() -> {
                        try (Connection connection = pool.getConnection();
                                PreparedStatement statement = connection.prepareStatement(
                                    "SELECT ?::int + " + n % 5)) {
                            statement.setInt(1, n);
                            same(List.of(List.of(n + n % 5)),
                                rows(statement.executeQuery()));
                        }
                        return null;
                    });
                }
                return done(work);
            }
        });

        test("moves money in 200 transactions of a pool of 20", () -> {
            try (HikariDataSource pool = pool()) {
                List<Callable<Object>> work = new ArrayList<>();
                for (int number = 0; number < 200; number++) {
                    int n = number;
                    work.add(() -> {
                        try (Connection connection = pool.getConnection()) {
                            connection.setAutoCommit(false);
                            move(connection, -1, 1 + n % 4);
                            move(connection, 1, 5 + n % 6);
                            if (n % 5 == 0) connection.rollback();
                            else connection.commit();
                        }
                        return null;
                    });
                }
                done(work);
            }
            try (Connection connection = openDirect()) {
                Object balances =
                    read(connection, "SELECT id, balance FROM matrix.account ORDER BY id");
                execute(connection, "UPDATE matrix.account SET balance = 100");
                return balances;
            }
        });

        test("gives connections of a pool back as they were", () -> {
            HikariConfig config = config();
            config.setMaximumPoolSize(1);
            config.setReadOnly(false);
            try (HikariDataSource pool = new HikariDataSource(config)) {
                try (Connection connection = pool.getConnection()) {
                    connection.setReadOnly(true);
                    connection.setTransactionIsolation(
                        Connection.TRANSACTION_REPEATABLE_READ);
                    connection.setAutoCommit(false);
                    read(connection, "SELECT 1");
                }
                try (Connection connection = pool.getConnection()) {
                    return List.of(connection.isReadOnly(), connection.getAutoCommit(),
                        connection.getTransactionIsolation(),
                        read(connection, "SHOW transaction_read_only"));
                }
            }
        });
    }

    private static void move(Connection connection, int by, int id) throws Exception {
        try (PreparedStatement statement = connection.prepareStatement(
                "UPDATE matrix.account SET balance = balance + ? WHERE id = ?")) {
            statement.setInt(1, by);
            statement.setInt(2, id);
            same(1, statement.executeUpdate());
        }
    }

    private static HikariConfig config() {
        HikariConfig config = new HikariConfig();
        config.setJdbcUrl(url("DRIVER_URL"));
        config.setDataSourceProperties(properties());
        return config;
    }

    private static HikariDataSource pool() {
        HikariConfig config = config();
        config.setMaximumPoolSize(SIZE);
        return new HikariDataSource(config);
    }

    private static Object done(List<Callable<Object>> work) throws Exception {
        ExecutorService threads = Executors.newFixedThreadPool(SIZE);
        try {
            for (Future<Object> each : threads.invokeAll(work)) each.get();
        } finally {
            threads.shutdown();
        }
        return null;
    }
}
