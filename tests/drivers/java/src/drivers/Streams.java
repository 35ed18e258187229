package drivers;

import static drivers.Database.execute;
import static drivers.Database.fails;
import static drivers.Database.open;
import static drivers.Database.read;
import static drivers.Database.rows;
import static drivers.Database.same;
import static drivers.Report.test;

import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.OutputStream;
import java.io.StringReader;
import java.io.StringWriter;
import java.nio.charset.StandardCharsets;
import java.sql.CallableStatement;
import java.sql.Connection;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.Statement;
import java.sql.Types;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import org.postgresql.PGConnection;
import org.postgresql.copy.CopyIn;
import org.postgresql.copy.CopyManager;
import org.postgresql.copy.PGCopyOutputStream;
import org.postgresql.largeobject.LargeObject;
import org.postgresql.largeobject.LargeObjectManager;

/** Large values, results in parts, COPY, large objects. */
final class Streams {
    private static final String COPY_IN = "COPY matrix.wide (id, body) FROM STDIN";

    private Streams() {}

    static void declare() {
        test("sends and reads 10 MB of text and of bytea", () -> {
            String text = "aé漢🐘".repeat(1_000_000);
            byte[] bytes = Values.bytes(10_485_760);
            String insert = "INSERT INTO matrix.wide (body, bytes) VALUES (?, ?)"
                + " RETURNING body, bytes, md5(bytes)";
            try (Connection connection = open("prepareThreshold=-1");
                    PreparedStatement statement = connection.prepareStatement(insert)) {
                List<String> digests = new ArrayList<>();
                for (boolean streamed : List.of(false, true)) {
                    if (streamed) {
                        statement.setCharacterStream(1, new StringReader(text));
                        statement.setBinaryStream(2, new ByteArrayInputStream(bytes));
                    } else {
                        statement.setString(1, text);
                        statement.setBytes(2, bytes);
                    }
                    ResultSet result = statement.executeQuery();
                    result.next();
                    same(true, text.equals(result.getString(1)));
                    same(true, Arrays.equals(bytes, result.getBytes(2)));
                    digests.add(result.getString(3));
                }
                execute(connection, "DELETE FROM matrix.wide");
                return digests;
            }
        });

        test("reads results in parts", () -> {
            try (Connection connection = open(); Statement one = connection.createStatement();
                    Statement two = connection.createStatement()) {
                connection.setAutoCommit(false);
                one.setFetchSize(70);
                two.setFetchSize(33);
                String ask = "SELECT n FROM generate_series(1, 1000) n";
                try (ResultSet first = one.executeQuery(ask);
                        ResultSet second = two.executeQuery(ask)) {
                    for (int n = 1; n <= 1000; n++) {
                        first.next();
                        second.next();
                        same(n, first.getInt(1));
                        same(n, second.getInt(1));
                        if (n % 400 == 0) read(connection, "SELECT 1");
                    }
                    same(false, first.next() || second.next());
                }
                connection.commit();
                return read(connection, "SELECT 1");
            }
        });

        test("leaves results of a named statement before their end", () -> {
            try (Connection connection = open("prepareThreshold=1", "defaultRowFetchSize=10");
                    PreparedStatement statement = connection.prepareStatement(
                        "SELECT n, repeat('x', 100) FROM generate_series(1, ?) n")) {
                connection.setAutoCommit(false);
                for (int turn = 0; turn < 5; turn++) {
                    statement.setInt(1, 100_000);
                    try (ResultSet result = statement.executeQuery()) {
                        for (int n = 1; n <= 25; n++) result.next();
                        same(25, result.getInt(1));
                    }
                }
                connection.commit();
                return read(connection, "SELECT 1");
            }
        });

        test("meets an error in the middle of a result", () -> {
            try (Connection connection = open(); Statement statement =
                    connection.createStatement()) {
                connection.setAutoCommit(false);
                statement.setFetchSize(10);
                ResultSet result = statement.executeQuery(
                    "SELECT 100 / (50 - n) FROM generate_series(1, 100) n");
                for (int n = 1; n <= 40; n++) result.next();
                fails("22012", () -> rows(result));
                connection.rollback();
                return read(connection, "SELECT 1");
            }
        });

        test("reads at most so many rows", () -> {
            try (Connection connection = open("prepareThreshold=1");
                    PreparedStatement statement = connection.prepareStatement(
                        "SELECT n FROM generate_series(1, 1000) n")) {
                statement.setMaxRows(3);
                return List.of(rows(statement.executeQuery()),
                    rows(statement.executeQuery()), read(connection, "SELECT 1"));
            }
        });

        test("reads a cursor that a function returns", () -> {
            try (Connection connection = open()) {
                execute(connection,
                    "CREATE FUNCTION matrix.opened() RETURNS refcursor LANGUAGE plpgsql"
                        + " AS $$ DECLARE c refcursor; BEGIN OPEN c FOR"
                        + " SELECT n, n * 2 FROM generate_series(1, 5) n; RETURN c; END $$");
                connection.setAutoCommit(false);
                try (CallableStatement call =
                        connection.prepareCall("{? = call matrix.opened()}")) {
                    call.registerOutParameter(1, Types.REF_CURSOR);
                    call.execute();
                    Object found = rows((ResultSet) call.getObject(1));
                    connection.rollback();
                    execute(connection, "DROP FUNCTION matrix.opened");
                    connection.commit();
                    return found;
                }
            }
        });

        test("copies in and out", () -> {
            StringBuilder lines = new StringBuilder();
            for (int n = 0; n < 50_000; n++) lines.append(n + "\tname " + n + " ü\n");
            try (Connection connection = open()) {
                CopyManager copy = copyManager(connection);
                same(50_000, copy.copyIn(COPY_IN, new StringReader(lines.toString())));
                StringWriter out = new StringWriter();
                copy.copyOut(
                    "COPY (SELECT id, body FROM matrix.wide ORDER BY id) TO STDOUT", out);
                same(true, out.toString().equals(lines.toString()));
                return execute(connection, "DELETE FROM matrix.wide");
            }
        });

        test("copies 10 MB in binary and in a transaction", () -> {
            try (Connection connection = open()) {
                execute(connection,
                    "INSERT INTO matrix.wide SELECT n, repeat('naïve 🐘', 7000),"
                        + " sha256(n::text::bytea) FROM generate_series(1, 150) n");
                CopyManager copy = copyManager(connection);
                ByteArrayOutputStream out = new ByteArrayOutputStream();
                copy.copyOut("COPY matrix.wide TO STDOUT (FORMAT binary)", out);
                connection.setAutoCommit(false);
                execute(connection, "CREATE TABLE matrix.twin (LIKE matrix.wide)");
                try (OutputStream into = new PGCopyOutputStream(
                        connection.unwrap(PGConnection.class),
                        "COPY matrix.twin FROM STDIN (FORMAT binary)", 12_345)) {
                    into.write(out.toByteArray());
                }
                Object same = read(connection,
                    "SELECT count(*) FROM matrix.wide NATURAL JOIN matrix.twin");
                connection.rollback();
                execute(connection, "DELETE FROM matrix.wide");
                connection.commit();
                return List.of(same, out.size());
            }
        });

        test("recovers from a copy whose data is wrong", () -> {
            try (Connection connection = open()) {
                CopyManager copy = copyManager(connection);
                StringReader word = new StringReader("1\tx\nno number\ty\n");
                fails("22P02", () -> copy.copyIn(COPY_IN, word));
                StringReader half = new StringReader("1\n");
                fails("22P04", () -> copy.copyIn(COPY_IN, half));
                return read(connection, "SELECT count(*) FROM matrix.wide");
            }
        });

        test("gives up a copy that it began", () -> {
            try (Connection connection = open()) {
                CopyManager copy = copyManager(connection);
                CopyIn into = copy.copyIn(COPY_IN);
                byte[] line = "1\tx\n".getBytes(StandardCharsets.UTF_8);
                for (int n = 0; n < 1000; n++) into.writeToCopy(line, 0, line.length);
                into.cancelCopy();
                return read(connection, "SELECT count(*) FROM matrix.wide");
            }
        });

        test("writes and reads a large object by function calls", () -> {
            try (Connection connection = open()) {
                connection.setAutoCommit(false);
                LargeObjectManager objects =
                    connection.unwrap(PGConnection.class).getLargeObjectAPI();
                byte[] bytes = Values.bytes(3_000_000);
                long oid = objects.createLO();
                try (LargeObject object = objects.open(oid, LargeObjectManager.WRITE)) {
                    object.write(bytes);
                }
                connection.commit();
                List<Object> found = new ArrayList<>();
                try (LargeObject object = objects.open(oid, LargeObjectManager.READ)) {
                    found.add(object.size());
                    object.seek(1_000_001);
                    found.add(object.read(5));
                    object.seek(0);
                    same(true, Arrays.equals(bytes, object.read(3_000_000)));
                }
                objects.delete(oid);
                connection.commit();
                fails("42704", () -> objects.open(oid, LargeObjectManager.READ).size());
                connection.rollback();
                found.add(read(connection, "SELECT 1"));
                return found;
            }
        });
    }

    private static CopyManager copyManager(Connection connection) throws Exception {
        return connection.unwrap(PGConnection.class).getCopyAPI();
    }
}
