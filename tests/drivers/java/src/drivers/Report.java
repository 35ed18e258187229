package drivers;

import java.io.PrintStream;
import java.io.PrintWriter;
import java.io.StringWriter;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HexFormat;
import java.util.List;
import java.util.Objects;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;

/**
 * The cases of the program: each runs once, in the order in which it was named, and is
 * printed as one line of JSON. See ../../../programs.py for who reads it.
 */
final class Report {
    private static final int CASE_TIMEOUT_S = 30;
    private static final int MAX_VALUE_CHARACTERS = 2_000;

    /** A case; returns what it read, for comparison with another way to the database. */
    interface Body {
        Object run() throws Exception;
    }

    private record Case(String name, Body body) {}

    private static final List<Case> cases = new ArrayList<>();

    private Report() {}

    static void test(String name, Body body) {
        cases.add(new Case(name, body));
    }

    static void run() throws Exception {
        PrintStream out = new PrintStream(System.out, true, StandardCharsets.UTF_8);
        ExecutorService threads =
            Executors.newCachedThreadPool(
                task -> {
                    Thread thread = new Thread(task);
                    thread.setDaemon(true);
                    return thread;
                });
        for (Case each : cases) {
            String value = "";
            String error = "";
            var running = threads.submit(each.body()::run);
            try {
                value = shortened(asText(running.get(CASE_TIMEOUT_S, TimeUnit.SECONDS)));
            } catch (ExecutionException failure) {
                error = trace(failure.getCause());
            } catch (TimeoutException late) {
                error = "not done within " + CASE_TIMEOUT_S + " s";
            }
            out.printf(
                "{\"case\": %s, \"ok\": %b, \"error\": %s, \"value\": %s}%n",
                json(each.name()), error.isEmpty(), json(error), json(value));
        }
        // A case that failed may have left threads behind.
        System.exit(0);
    }

    private static String trace(Throwable failure) {
        StringWriter trace = new StringWriter();
        failure.printStackTrace(new PrintWriter(trace));
        String text = trace.toString();
        return text.substring(0, Math.min(text.length(), MAX_VALUE_CHARACTERS));
    }

    static String asText(Object value) {
        if (value instanceof byte[] bytes) return HexFormat.of().formatHex(bytes);
        if (value instanceof Object[] array) return asText(Arrays.asList(array));
        if (value instanceof List<?> list) {
            return list.stream().map(Report::asText).toList().toString();
        }
        return Objects.toString(value);
    }

    private static String shortened(String text) throws Exception {
        if (text.length() <= MAX_VALUE_CHARACTERS) return text;
        byte[] bytes = text.getBytes(StandardCharsets.UTF_8);
        byte[] digest = MessageDigest.getInstance("SHA-256").digest(bytes);
        return "sha256 " + HexFormat.of().formatHex(digest);
    }

    private static String json(String text) {
        StringBuilder quoted = new StringBuilder("\"");
        for (char each : text.toCharArray()) {
            if (each == '"' || each == '\\') quoted.append('\\').append(each);
            else if (each < ' ') quoted.append(String.format("\\u%04x", (int) each));
            else quoted.append(each);
        }
        return quoted.append('"').toString();
    }
}
