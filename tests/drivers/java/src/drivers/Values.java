package drivers;

import static drivers.Database.open;
import static drivers.Database.same;
import static drivers.Report.test;

import java.math.BigDecimal;
import java.sql.Array;
import java.sql.Connection;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.Timestamp;
import java.sql.Types;
import java.time.Instant;
import java.time.LocalDate;
import java.time.LocalDateTime;
import java.time.LocalTime;
import java.time.OffsetDateTime;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;
import java.util.UUID;
import org.postgresql.util.PGInterval;
import org.postgresql.util.PGobject;

/** Values of many types, in text and in binary. */
final class Values {
    static final String HARD_TEXT = "it's \"quoted\", \\ and \n\t; -- ? $1 naïve 🐘 漢字";

    private Values() {}

    /** What is sent as which type, and how Postgres shows what it got. */
    private record Value(String type, Object sent, String shown) {}

    static byte[] bytes(int length) {
        byte[] bytes = new byte[length];
        for (int n = 0; n < length; n++) bytes[n] = (byte) n;
        return bytes;
    }

    private static PGobject other(String type, String value) throws Exception {
        PGobject object = new PGobject();
        object.setType(type);
        object.setValue(value);
        return object;
    }

    private static List<Value> values(Connection connection) throws Exception {
        Array numbers = connection.createArrayOf("int4", new Integer[] {1, null, -3});
        Array words =
            connection.createArrayOf("text", new String[] {"a\"b", "c,d", "", "NULL"});
        Array table = connection.createArrayOf("int8", new Long[][] {{1L, 2L}, {3L, 4L}});
        Array doubles = connection.createArrayOf("float8", new Double[] {1.5, Double.NaN});
        String key = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11";
        return List.of(
            new Value("int2", (short) -32768, "-32768"),
            new Value("int4", Integer.MIN_VALUE, "-2147483648"),
            new Value("int8", Long.MAX_VALUE, "9223372036854775807"),
            new Value("float4", 1.5f, "1.5"),
            new Value("float4", Float.NaN, "NaN"),
            new Value("float8", -Double.MAX_VALUE, "-1.7976931348623157e+308"),
            new Value("float8", Double.MIN_VALUE, "5e-324"),
            new Value("float8", Double.NaN, "NaN"),
            new Value("float8", Double.POSITIVE_INFINITY, "Infinity"),
            new Value("float8", Double.NEGATIVE_INFINITY, "-Infinity"),
            new Value("numeric", new BigDecimal("-123456789012345678901234567890.0120"),
                "-123456789012345678901234567890.0120"),
            new Value("numeric", new BigDecimal("0.000000000001"), "0.000000000001"),
            new Value("text", HARD_TEXT, HARD_TEXT),
            new Value("text", "", ""),
            new Value("varchar", "x".repeat(300), "x".repeat(300)),
            new Value("char(5)", "ab", "ab"),
            new Value("bytea", bytes(256), "\\x" + HexFormat.of().formatHex(bytes(256))),
            new Value("bytea", bytes(0), "\\x"),
            new Value("bool", true, "true"),
            new Value("date", LocalDate.of(2026, 2, 28), "2026-02-28"),
            new Value("date", LocalDate.of(-43, 3, 15), "0044-03-15 BC"),
            new Value("time", LocalTime.of(13, 14, 15, 123_456_000), "13:14:15.123456"),
            new Value("timestamp", LocalDateTime.of(2026, 2, 28, 23, 59, 59, 500_000_000),
                "2026-02-28 23:59:59.5"),
            new Value("timestamptz", OffsetDateTime.parse("2026-05-06T07:08:09.123+02:00"),
                "2026-05-06 05:08:09.123+00"),
            new Value("timestamptz", Timestamp.from(Instant.EPOCH), "1970-01-01 00:00:00+00"),
            new Value("timestamptz", OffsetDateTime.MAX, "infinity"),
            new Value("interval", new PGInterval(1, 2, 3, 4, 5, 6.789),
                "1 year 2 mons 3 days 04:05:06.789"),
            new Value("uuid", UUID.fromString(key), key),
            new Value("json", other("json", "{\"a\":[1,null,\"ü\"]}"),
                "{\"a\":[1,null,\"ü\"]}"),
            new Value("jsonb", other("jsonb", "{\"b\":1,\"a\":[true]}"),
                "{\"a\": [true], \"b\": 1}"),
            new Value("int4[]", numbers, "{1,NULL,-3}"),
            new Value("text[]", words, "{\"a\\\"b\",\"c,d\",\"\",\"NULL\"}"),
            new Value("int8[]", table, "{{1,2},{3,4}}"),
            new Value("float8[]", doubles, "{1.5,NaN}"),
            new Value("matrix.mood", other("matrix.mood", "happy"), "happy"),
            new Value("matrix.pair", other("matrix.pair", "(1,\"a b\")"), "(1,\"a b\")"),
            new Value("int4range", other("int4range", "[1,10)"), "[1,10)"),
            new Value("inet", other("inet", "192.168.0.1/24"), "192.168.0.1/24"),
            new Value("bit(3)", other("bit", "101"), "101"));
    }

    static void declare() {
        test("sends and reads every type in text", () -> {
            try (Connection connection = open("prepareThreshold=0", "binaryTransfer=false")) {
                return everyType(connection);
            }
        });

        test("sends and reads every type in binary", () -> {
            // From the first execution on, rather than once the server prepared it.
            try (Connection connection = open("prepareThreshold=-1")) {
                return everyType(connection);
            }
        });

        test("sends and reads nulls of every type", () -> {
            try (Connection connection = open("prepareThreshold=1")) {
                for (Value value : values(connection)) {
                    String ask = "SELECT ?::" + value.type();
                    try (PreparedStatement statement = connection.prepareStatement(ask)) {
                        statement.setNull(1, Types.NULL);
                        ResultSet result = statement.executeQuery();
                        result.next();
                        same(null, result.getObject(1));
                    }
                }
                return null;
            }
        });

        test("sends 32,767 parameters", () -> {
            try (Connection connection = open()) {
                String list = "(?::int)" + ", (?::int)".repeat(32_766);
                String ask = "SELECT count(*), sum(n) FROM (VALUES " + list + ") v (n)";
                try (PreparedStatement statement = connection.prepareStatement(ask)) {
                    for (int n = 1; n <= 32_767; n++) statement.setInt(n, n);
                    return Database.rows(statement.executeQuery());
                }
            }
        });
    }

    private static Object everyType(Connection connection) throws Exception {
        List<Object> read = new ArrayList<>();
        for (Value value : values(connection)) {
            String type = value.type();
            String ask = "SELECT ?::" + type + ", (?::" + type + ")::text";
            try (PreparedStatement statement = connection.prepareStatement(ask)) {
                // Thrice, as the formats change once a statement is prepared.
                for (int turn = 0; turn < 3; turn++) {
                    statement.setObject(1, value.sent());
                    statement.setObject(2, value.sent());
                    try (ResultSet result = statement.executeQuery()) {
                        result.next();
                        same(value.shown(), result.getString(2));
                        Object object = result.getObject(1);
                        read.add(object instanceof Array a ? a.getArray() : object);
                        // The driver shows binary bytea as the name of a Java object.
                        boolean isBytes = object instanceof byte[];
                        read.add(isBytes ? null : result.getString(1));
                    }
                }
            }
        }
        return read;
    }
}
